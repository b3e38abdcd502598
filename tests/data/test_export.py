"""Each export is read back by a slow reader of its own, and by the importer."""

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from gesso.data.export import export
from gesso.data.index import Index
from gesso.data.index_writer import IndexWriter
from gesso.data.records import (
    CROWD,
    DIFFICULT,
    FLAGS,
    OCCLUDED,
    TRUNCATED,
    ImageBlock,
    ObjectBlock,
    Polygons,
    Rle,
    Source,
    Strings,
)
from gesso.data.select import subset
from gesso.errors import ConfigError, DataError, InputError
from gesso.label_space import LabelSpace

from .sample_index import write_index


def one_image(folder: Path, *, names=("a.jpg",), size=(100, 80), normalised=False, split="") -> Index:
    writer = IndexWriter(
        folder / "index", LabelSpace.from_names("xy"), sources=[Source(name="", root=str(folder), split=split)]
    )
    count = len(names)
    writer.add_images(
        ImageBlock(
            ids=np.arange(1, count + 1),
            names=Strings.of(names),
            widths=np.full(count, size[0]),
            heights=np.full(count, size[1]),
            normalised=np.full(count, normalised),
        )
    )
    box = np.array([[0.25, 0.5, 0.75, 1.0]] * count, np.float32)
    writer.add_objects(ObjectBlock(rows=np.arange(count), xyxy=box, labels=np.zeros(count, np.int64)))
    return Index.open(writer.finish())


def test_coco_holds_everything_a_slow_reader_finds(tmp_path):
    index = write_index(tmp_path)
    losses = export(index, tmp_path / "coco")
    assert len(losses) == 3 and "order" in losses[0] and "image-level" in losses[1] and "semantic" in losses[2]
    document = json.loads((tmp_path / "coco" / "annotations.json").read_text("utf-8"))
    assert [c["name"] for c in document["categories"]] == list(index.label_space.names)
    assert [c["id"] for c in document["categories"]] == [7, 0, 3, 90]
    assert [c.get("supercategory") for c in document["categories"]] == ["human", "animal", None, None]
    at = 0
    for row, image in enumerate(document["images"]):
        assert (image["id"], image["file_name"]) == (index.image_ids[row], index.name(row))
        assert (image["width"], image["height"]) == (index.widths[row], index.heights[row])
        assert image["licence"] == index.image_columns["licence"][row]
        assert image["photographer"] == index.image_columns["photographer"][row]
        objects, masks = index.objects(row), index.masks(row)
        for k in range(len(objects.labels)):
            annotation = document["annotations"][at]
            assert annotation["id"] == index.annotation_ids[at] and annotation["image_id"] == image["id"]
            assert annotation["category_id"] == (7, 0, 3, 90)[objects.labels[k]]
            x, y, w, h = annotation["bbox"]
            assert np.array_equal(np.array([x, y, x + w, y + h]).astype(np.float32), objects.xyxy[k])
            assert np.float32(annotation["area"]) == objects.areas[k]
            assert annotation["iscrowd"] == bool(objects.flags[k] & CROWD)
            for name in ("ignore", "difficult", "occluded", "truncated"):
                assert annotation[name] == bool(objects.flags[k] & FLAGS[name])
            assert "inside" not in annotation
            mask, written = masks[k], annotation.get("segmentation")
            if isinstance(mask, Polygons):
                rings = [np.array(ring, np.float32).reshape(-1, 2) for ring in written]
                assert all(np.array_equal(a, b) for a, b in zip(rings, mask.rings, strict=True))
            elif isinstance(mask, Rle):
                assert written == {"size": list(mask.size), "counts": mask.counts.decode()}
            else:
                assert written is None
            assert np.float32(annotation["vis_ratio"]) == index.object_columns["vis_ratio"][at]
            assert annotation["author"] == index.object_columns["author"][at]
            at += 1
    assert at == index.num_boxes == len(document["annotations"])


def test_numbers_are_written_as_short_as_they_were(tmp_path):
    index = write_index(tmp_path, rich=False)
    export(index, tmp_path / "a.json")
    boxes = [a["bbox"] for a in json.loads((tmp_path / "a.json").read_text())["annotations"]]
    assert all(len(repr(value).split(".")[1]) <= 2 for box in boxes for value in box)


def test_an_empty_index_is_a_valid_document(tmp_path):
    empty = subset(write_index(tmp_path), tmp_path / "empty", [])
    for kind in ("coco", "voc", "yolo"):
        export(empty, tmp_path / kind, kind)
    document = json.loads((tmp_path / "coco" / "annotations.json").read_text())
    assert (document["images"], document["annotations"], len(document["categories"])) == ([], [], 4)


def test_annotation_ids_that_stand_twice_are_counted_anew(tmp_path):
    index = one_image(tmp_path, names=("a.jpg", "b.jpg"))
    losses = export(index, tmp_path / "a.json")
    assert any("counted anew" in loss for loss in losses)
    assert [a["id"] for a in json.loads((tmp_path / "a.json").read_text())["annotations"]] == [1, 2]


@pytest.mark.parametrize("whole", [True, False])
def test_voc_holds_boxes_names_and_three_flags(tmp_path, whole):
    index = write_index(tmp_path, whole_pixels=whole)
    losses = export(index, tmp_path / "voc", "voc")
    for word in ("'crowd'", "'ignore'", "masks", "areas", "image ids", "licence", "order"):
        assert any(word in loss for loss in losses), word
    assert not any("'difficult'" in loss for loss in losses)
    listed = (tmp_path / "voc" / "ImageSets" / "Main" / "train.txt").read_text().split()
    assert listed == [index.name(i).removesuffix(".png") for i in range(24)]
    for row, stem in enumerate(listed):
        root = ElementTree.parse(tmp_path / "voc" / "Annotations" / f"{stem}.xml").getroot()
        assert root.findtext("filename") == index.name(row)
        assert (int(root.findtext("size/width")), int(root.findtext("size/height"))) == (
            index.widths[row],
            index.heights[row],
        )
        objects = index.objects(row)
        found = root.findall("object")
        assert [index.label_space.index(o.findtext("name")) for o in found] == objects.labels.tolist()
        for element, box, flags in zip(found, objects.xyxy, objects.flags.tolist(), strict=True):
            texts = [element.findtext(f"bndbox/{name}") for name in ("xmin", "ymin", "xmax", "ymax")]
            assert not whole or all(text.isdigit() for text in texts)
            values = np.array([float(text) for text in texts]) - [1, 1, 0, 0]
            assert np.array_equal(values.astype(np.float32), box)
            for name, bit in (("truncated", TRUNCATED), ("difficult", DIFFICULT), ("occluded", OCCLUDED)):
                assert int(element.findtext(name)) == bool(flags & bit)


def test_yolo_holds_boxes_classes_and_single_rings(tmp_path):
    index = write_index(tmp_path)
    losses = export(index, tmp_path / "yolo", "yolo")
    for word in ("'crowd'", "'difficult'", "masks", "image ids"):
        assert any(word in loss for loss in losses), word
    yaml = (tmp_path / "yolo" / "data.yaml").read_text()
    assert 'train: images/train\nnc: 4\nnames:\n  0: "person"\n  1: "dog"\n  2: "traffic light"\n' in yaml
    rings = lost = 0
    for row in range(24):
        lines = (tmp_path / "yolo" / "labels" / "train" / index.name(row)).with_suffix(".txt").read_text().splitlines()
        size = np.array([index.widths[row], index.heights[row]], np.float64)
        objects, masks = index.objects(row), index.masks(row)
        assert len(lines) == len(objects.labels)
        for line, label, box, mask in zip(lines, objects.labels, objects.xyxy, masks, strict=True):
            numbers = np.array([float(word) for word in line.split()[1:]])
            assert int(line.split()[0]) == label
            if isinstance(mask, Polygons) and len(mask.rings) == 1:
                rings += 1
                assert np.array_equal((numbers.reshape(-1, 2) * size).astype(np.float32), mask.rings[0])
                continue
            lost += mask is not None
            low, high = numbers[:2] - numbers[2:] / 2, numbers[:2] + numbers[2:] / 2
            assert np.array_equal(np.concatenate([low * size, high * size]).astype(np.float32), box)
    assert rings > 5 and any(loss.startswith(f"{lost} masks") for loss in losses)


def test_yolo_keeps_shares_of_unknown_sizes_and_the_others_refuse(tmp_path):
    index = one_image(tmp_path, size=(0, 0), normalised=True, split="val")
    export(index, tmp_path / "yolo", "yolo")
    assert (tmp_path / "yolo" / "labels" / "val" / "a.txt").read_text() == "0 0.5 0.75 0.5 0.5\n"
    for kind in ("coco", "voc"):
        with pytest.raises(DataError, match="size"):
            export(index, tmp_path / kind, kind)
        assert not (tmp_path / kind).exists()
    pixels = one_image(tmp_path / "pixels", size=(0, 0))
    with pytest.raises(DataError, match="size"):
        export(pixels, tmp_path / "yolo2", "yolo")


@pytest.mark.parametrize("how", ["link", "copy"])
@pytest.mark.parametrize(("kind", "place"), [("coco", "images"), ("voc", "JPEGImages"), ("yolo", "images/train")])
def test_pictures_are_brought(tmp_path, how, kind, place):
    index = write_index(tmp_path)
    export(index, tmp_path / "out", kind, pictures=how)
    for row in range(24):
        brought = tmp_path / "out" / place / index.name(row)
        assert brought.read_bytes() == index.image_path(row).read_bytes()
        assert brought.is_symlink() == (how == "link")
    if kind == "coco":
        document = json.loads((tmp_path / "out" / "annotations.json").read_text())
        assert document["images"][1]["file_name"] == "sub/0001.png"


def test_mistakes_are_told_in_one_line_and_leave_nothing(tmp_path):
    index = write_index(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    same_stem = one_image(tmp_path / "stem", names=("a.jpg", "a.png"))
    outside = one_image(tmp_path / "outside", names=("../a.jpg",))
    index.image_path(3).unlink()
    for error, call in (
        (ConfigError, lambda: export(index, tmp_path / "out", "pascal")),
        (ConfigError, lambda: export(index, tmp_path / "out", pictures="move")),
        (ConfigError, lambda: export(index, tmp_path / "out.json", "voc")),
        (InputError, lambda: export(index, tmp_path / "mine")),
        (InputError, lambda: export(index, tmp_path / "mine", overwrite=True)),
        (InputError, lambda: export(index, tmp_path / "out", pictures="copy")),
        (DataError, lambda: export(same_stem, tmp_path / "out", "yolo")),
        (DataError, lambda: export(outside, tmp_path / "out", "voc")),
    ):
        with pytest.raises(error) as raised:
            call()
        assert "\n" not in str(raised.value)
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.json").exists()
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_an_earlier_export_may_be_overwritten(tmp_path):
    index = write_index(tmp_path)
    for kind in ("coco", "voc", "yolo"):
        export(index, tmp_path / "out", kind, overwrite=True)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [".gesso-export", "data.yaml", "labels"]
    export(index, tmp_path / "a.json")
    with pytest.raises(InputError, match="exists"):
        export(index, tmp_path / "a.json")
    export(index, tmp_path / "a.json", overwrite=True)


def test_a_data_set_of_the_users_own_is_never_overwritten(tmp_path):
    """It has the very names of an export."""
    index = write_index(tmp_path)
    for name in ("annotations.json", "images/0.png"):
        (tmp_path / "own" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / name).write_text("mine")
    with pytest.raises(InputError, match="was not exported by Gesso"):
        export(index, tmp_path / "own", overwrite=True)
    assert (tmp_path / "own" / "images" / "0.png").read_text() == "mine"
    export(index, tmp_path / "e")
    export(index, tmp_path / "e", "voc", overwrite=True)
    assert (tmp_path / "e" / "Annotations").is_dir()
