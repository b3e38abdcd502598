import itertools
import json
import shutil

import numpy as np
import pytest

from gesso.data.index import Index
from tests.command_line import coco, picture

DETECTION = (
    "bccd",
    "chess_pieces",
    "coco_mini",
    "dali_pixabay",
    "nuclei",
    "openimages_mini",
    "pedestrian",
    "playing_cards",
    "pretrain_mix",
    "raccoon",
)
KEPT = ("labels", "flags", "image_ids", "widths", "heights", "content_hashes")


def counted(file):
    document = json.loads(file.read_text())
    return len(document["images"]), len(document["annotations"]), len(document["categories"])


@pytest.mark.parametrize("name", DETECTION)
def test_every_real_set_is_imported_whole(gesso, real_sets, tmp_path, name):
    made = gesso.json("data", "import", real_sets / name, "--out", tmp_path / "i")
    assert made["format"] == "coco" and {part["split"] for part in made["splits"]} == {"train", "val"}
    for part in made["splits"]:
        images, boxes, categories = counted(real_sets / name / f"{part['split']}.json")
        dropped = sum(count for what, count in part["issues"].items() if what != "box beyond the border")
        assert (part["images"], part["categories"]) == (images, categories)
        assert part["boxes"] == boxes - dropped and dropped <= 0.002 * boxes, part["issues"]
        index = Index.open(part["path"])
        assert len(index) == images and index.num_boxes == part["boxes"] and index.image_path(0).is_file()


@pytest.fixture
def real_index(gesso, real_sets, tmp_path):
    gesso("data", "import", real_sets / "raccoon", "--split", "val", "--out", tmp_path / "index")
    return tmp_path / "index"


def test_check_stats_and_split_of_a_real_set(gesso, real_sets, real_index, tmp_path):
    checked = gesso.json("data", "check", real_sets / "raccoon" / "val.json")
    assert checked["problems"] == 0 and checked["images"] == 38 and checked["boxes"] == 39
    found = gesso.json("data", "stats", real_index)
    assert found["boxes"] == 39 and sum(row["boxes"] for row in found["classes"]) == 39
    made = gesso.json("data", "split", real_index, "--out", tmp_path / "parts", "--val", "0.25", "--test", "5")
    assert {part["name"]: part["images"] for part in made["parts"]} == {"train": 23, "val": 10, "test": 5}
    ids = [Index.open(part["path"]).image_ids.tolist() for part in made["parts"]]
    assert sorted(itertools.chain.from_iterable(ids)) == Index.open(real_index).image_ids.tolist()
    leak = gesso("data", "check", real_index, "--against", tmp_path / "parts" / "val", code=1)
    assert "picture in both splits" in leak.out
    assert gesso.json("data", "check", tmp_path / "parts" / "train", "--against", tmp_path / "parts" / "val")


@pytest.mark.parametrize("format", ["coco", "voc", "yolo"])
def test_import_export_import_is_stable(gesso, real_index, tmp_path, format):
    indexes = [Index.open(real_index)]
    for turn in (1, 2):
        out = tmp_path / f"export{turn}"
        words = ("--out", out, "--format", format, "--pictures", "copy")
        not_kept = gesso.json("data", "export", indexes[-1].path, *words)["not_kept"]
        gesso("data", "import", out, "--out", tmp_path / f"again{turn}")
        indexes.append(Index.open(tmp_path / f"again{turn}"))
        assert format != "coco" or not not_kept
    first, second, third = indexes
    for index in (second, third):
        assert index.label_space.names == first.label_space.names and index.num_boxes == first.num_boxes
    for key in KEPT:
        assert np.array_equal(getattr(second, key), getattr(third, key)), key
        if format == "coco":
            assert np.array_equal(getattr(first, key), getattr(second, key)), key
    assert list(second.names) == list(third.names)
    tolerance = {"coco": 0, "voc": 0, "yolo": 1e-3}[format]
    assert np.abs(second.boxes - third.boxes).max() <= tolerance
    rows = {name.rsplit("/")[-1]: row for row, name in enumerate(first.names)}
    for row, name in enumerate(second.names):
        before = first.objects(rows[name.rsplit("/")[-1]]).xyxy
        assert np.abs(second.objects(row).xyxy - before).max() <= max(tolerance, 0 if format == "coco" else 0.51)


@pytest.mark.parametrize("format", ["voc", "yolo"])
def test_an_image_keeps_its_id_when_others_come(gesso, tmp_path, format):
    coco(tmp_path / "source", 4)
    gesso("data", "import", tmp_path / "source", "--out", tmp_path / "i")
    gesso("data", "export", tmp_path / "i", "--out", tmp_path / "e", "--format", format, "--pictures", "copy")
    gesso("data", "import", tmp_path / "e", "--out", tmp_path / "before")
    some = next((tmp_path / "e").rglob("1.png"))
    picture(some.with_name("0.png"), seed=77)
    for file in (*(tmp_path / "e").rglob("1.xml"), *(tmp_path / "e").rglob("1.txt")):
        shutil.copyfile(file, file.with_stem("0"))
        file.with_stem("0").write_text(file.read_text().replace("1.png", "0.png"))
    for file in (tmp_path / "e").rglob("ImageSets/**/*.txt"):
        file.write_text("0\n" + file.read_text())
    gesso("data", "import", tmp_path / "e", "--out", tmp_path / "after")
    before, after = (
        dict(zip(i.names, i.image_ids.tolist(), strict=True))
        for i in map(Index.open, (tmp_path / "before", tmp_path / "after"))
    )
    assert len(before) == 4 and len(set(after.values())) == 5
    assert before.items() <= after.items() and all(0 < number < 2**52 for number in after.values())


def test_json_and_text_tell_the_same(gesso, tmp_path):
    coco(tmp_path / "source", boxes=2)
    assert gesso("data", "import", tmp_path / "source", "--out", tmp_path / "i").out == (
        f"{tmp_path}/i: 3 images, 6 boxes, 2 categories\n"
    )
    made = gesso.json("data", "import", tmp_path / "source", "--out", tmp_path / "i", "--overwrite")
    assert (made["images"], made["boxes"], made["categories"], made["issues"]) == (3, 6, 2, {})
    assert "3 images, 6 boxes, 2 categories" in gesso("data", "check", tmp_path / "i").out
    assert gesso("data", "export", tmp_path / "i", "--out", tmp_path / "e").out == f"wrote {tmp_path}/e\n"
