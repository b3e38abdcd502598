import hashlib
import json
import re

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from gesso.data.demo import make_demo, make_demo_classes
from gesso.data.demo_scenes import DemoConfig, make_scene
from gesso.errors import ConfigError, InputError

CONFIG = DemoConfig(images=6, side=96, parts=True)


def digest(folder):
    """A hash of every file below ``folder``."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_same_seed_same_bytes_and_the_set_is_found_again(tmp_path):
    first = make_demo(tmp_path / "a", CONFIG)
    make_demo(tmp_path / "b", CONFIG)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert len(digest(tmp_path / "a")) == 2 * 6 + 2
    stamp = first.stat().st_mtime_ns
    calls = []
    assert make_demo(tmp_path / "a", CONFIG, progress=lambda done, total: calls.append(done)) == first
    assert first.stat().st_mtime_ns == stamp and not calls


def test_a_broken_off_set_is_made_whole(tmp_path):
    whole = make_demo(tmp_path / "a", CONFIG)
    before = digest(tmp_path / "a")
    whole.unlink()
    (tmp_path / "a" / "images" / "000003.jpg").write_bytes(b"torn")
    make_demo(tmp_path / "a", CONFIG)
    assert digest(tmp_path / "a") == before


def test_other_folders_are_refused(tmp_path):
    make_demo(tmp_path / "a", CONFIG)
    with pytest.raises(InputError, match="other settings"):
        make_demo(tmp_path / "a", DemoConfig(images=7, side=96))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "letter.txt").write_text("mine")
    with pytest.raises(InputError, match="no embedded data set"):
        make_demo(tmp_path / "b", CONFIG)
    (tmp_path / "c").write_text("a file")
    with pytest.raises(InputError):
        make_demo(tmp_path / "c", CONFIG)


def test_the_coco_file_says_what_the_scenes_hold(tmp_path, capsys):
    coco = COCO(str(make_demo(tmp_path / "a", CONFIG)))
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())][-1] == "card"
    ratios = []
    for number in range(CONFIG.images):
        scene = make_scene(CONFIG, number)
        image = coco.loadImgs(number + 1)[0]
        picture = np.asarray(Image.open(tmp_path / "a" / image["file_name"]), np.int32)
        assert np.abs(picture - scene.pixels).mean() < 4
        semantic = Image.open(tmp_path / "a" / image["semantic"])
        assert semantic.mode == "P"
        assert np.array_equal(np.asarray(semantic), scene.semantic)
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=[number + 1]))
        assert len(annotations) == len(scene.objects)
        for annotation, item in zip(annotations, scene.objects, strict=True):
            assert np.array_equal(coco.annToMask(annotation), item.mask)
            assert annotation["area"] == item.mask.sum()
            x, y, w, h = annotation["bbox"]
            assert [x, y, x + w, y + h] == item.xyxy.tolist()
            assert annotation["height"] == item.xyxy[3] - item.xyxy[1]
            ratios.append(annotation["vis_ratio"])
            whole_area = w * h
            x, y, w, h = annotation["visible_bbox"]
            assert [x, y, x + w, y + h] == item.visible_xyxy.tolist()
            assert abs(annotation["vis_ratio"] - w * h / whole_area) < 1e-4
            assert abs(annotation["occluded_share"] - item.occluded) < 1e-4
            assert coco.cats[annotation["category_id"]]["name"] == item.name
            whole = annotation.get("part_of")
            assert (whole is None) == (item.whole is None)
            if whole is not None:
                assert coco.cats[coco.anns[whole]["category_id"]]["name"] == "card"
                assert coco.anns[whole]["image_id"] == number + 1
    assert min(ratios) < 0.95 and max(ratios) == 1


def test_hidden_labels_leave_three_kinds_of_classes(tmp_path):
    config = DemoConfig(images=30, side=96, hidden_labels=0.4)
    document = json.loads(make_demo(tmp_path / "a", config).read_text())
    names = {c["id"]: c["name"] for c in document["categories"]}
    for number, image in enumerate(document["images"]):
        scene = make_scene(config, number)
        annotated = {names[a["category_id"]] for a in document["annotations"] if a["image_id"] == image["id"]}
        absent = {names[i] for i in image.get("neg_category_ids", [])}
        doubtful = {names[i] for i in image.get("not_exhaustive_category_ids", [])}
        assert absent.isdisjoint(item.leaf for item in scene.objects)
        assert doubtful <= annotated
        if scene.unverified:
            assert set(names.values()) - (annotated - doubtful) - absent == set(scene.unverified)
    assert len(document["annotations"]) < sum(len(make_scene(config, n).objects) for n in range(30))


def test_a_folder_of_classes(tmp_path):
    folder = make_demo_classes(tmp_path / "c", CONFIG, side=48)
    items = [item for number in range(CONFIG.images) for item in make_scene(CONFIG, number).objects]
    for count, item in enumerate(items):
        with Image.open(folder / item.leaf / f"{count:06d}.png") as picture:
            assert picture.size == (48, 48)
    assert len(list(folder.rglob("*.png"))) == len(items)
    before = digest(folder)
    assert make_demo_classes(folder, CONFIG, side=48) == folder
    assert digest(folder) == before
    with pytest.raises(InputError, match="other settings"):
        make_demo_classes(folder, CONFIG, side=32)
    with pytest.raises(ConfigError):
        make_demo_classes(tmp_path / "d", CONFIG, side=2)


def test_a_picture_of_a_class_shows_its_object(tmp_path):
    config = DemoConfig(images=8, side=96, objects=(1, 1))
    folder = make_demo_classes(tmp_path / "c", config, side=48)
    for number in range(8):
        scene = make_scene(config, number)
        x0, y0, x1, y1 = scene.objects[0].xyxy.tolist()
        size = round(1.3 * max(x1 - x0, y1 - y0))
        left, top = (min(max(round((low + high - size) / 2), 0), 96 - size) for low, high in ((x0, x1), (y0, y1)))
        crop = Image.fromarray(scene.pixels[top : top + size, left : left + size]).resize((48, 48))
        with Image.open(folder / scene.objects[0].leaf / f"{number:06d}.png") as picture:
            assert np.abs(np.asarray(picture, int) - np.asarray(crop, int)).mean() < 6


def test_an_unwritable_place_is_one_line(tmp_path):
    (tmp_path / "a").mkdir()
    make_demo(tmp_path / "a", DemoConfig(images=1, side=96)).unlink()
    (tmp_path / "a" / "images" / "000000.jpg").unlink()
    (tmp_path / "a" / "images").rmdir()
    (tmp_path / "a" / "images").write_text("in the way")
    with pytest.raises(InputError) as caught:
        make_demo(tmp_path / "a", DemoConfig(images=1, side=96))
    assert re.search(r"cannot be written", str(caught.value)) and "\n" not in str(caught.value)
