import json
import shutil

import cv2
import numpy as np
import pytest

from gesso.data.check import EXAMPLES, LEAK, NEAR_LEAK, check
from gesso.data.importing import import_data
from gesso.data.index import Index
from gesso.errors import DataError

from .sample_index import picture, write_index


def write_coco(folder, *, names, boxes=(), split="train", start=0, categories=("cat", "dog")):
    """A COCO file folder/annotations/split.json, pictures in folder/images; boxes: (image, category, xywh, crowd)."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    for number, name in enumerate(names, start=start):
        if not (folder / "images" / name).exists():
            cv2.imwrite(str(folder / "images" / name), picture(number, 60, 80), [cv2.IMWRITE_JPEG_QUALITY, 95])
    document = {
        "images": [{"id": i, "file_name": name, "width": 80, "height": 60} for i, name in enumerate(names, 1)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(categories)],
        "annotations": [
            {"id": i, "image_id": image, "category_id": category, "bbox": list(box), "area": 1, "iscrowd": crowd}
            for i, (image, category, box, crowd) in enumerate(boxes, 11)
        ],
    }
    (folder / "annotations" / f"{split}.json").write_text(json.dumps(document))
    return folder


GOOD = [(1, 0, (1, 2, 30, 20), 0), (2, 1, (5, 5, 40, 30), 0), (3, 0, (0, 0, 80, 60), 1)]
BAD = [
    *GOOD,
    (1, 0, (50, 10, 60, 20), 0),
    (1, 1, (5, 5, 0, 9), 0),
    (2, 1, (5, 5, 40, 30), 0),
    (2, 1, (20, 5, -4, 30), 0),
    (9, 1, (5, 5, 40, 30), 0),
]


def by_kind(report):
    return {finding.what: finding for finding in report.findings}


def test_a_sound_set_has_no_problem_but_notes(tmp_path):
    source = write_coco(
        tmp_path, names=["1.jpg", "2.jpg", "3.jpg", "4.jpg"], boxes=GOOD, categories=("cat", "dog", "yak")
    )
    before = sorted(tmp_path.rglob("*"))
    report = check(source)
    found = by_kind(report)
    assert (report.images, report.boxes, report.categories, report.problems) == (4, 3, 3, 0)
    assert {what: f.count for what, f in found.items()} == {
        "crowd box": 1,
        "picture without a box (negative)": 1,
        "class without images": 1,
    }
    assert found["picture without a box (negative)"].examples[0].image == "4.jpg"
    assert "yak" in found["class without images"].examples[0].detail
    assert sorted(tmp_path.rglob("*")) == before


def test_check_finds_what_import_finds(tmp_path):
    names = [f"{i}.jpg" for i in range(1, 7)]
    source = write_coco(tmp_path / "set", names=names, boxes=BAD)
    (source / "images" / "4.jpg").write_bytes(b"")
    (source / "images" / "5.jpg").write_text("no picture")
    (source / "images" / "6.jpg").unlink()
    report = check(source)
    summary = import_data(source, tmp_path / "index")
    problems = {finding.what: finding.count for finding in report.findings if finding.problem}
    assert problems == summary.issues and report.problems == sum(summary.issues.values()) == 8
    assert len(problems) == 8
    assert (report.images, report.boxes) == (summary.images, summary.boxes)
    empty = by_kind(report)["box is empty"].examples[0]
    assert (empty.image, empty.annotation_id) == ("1.jpg", 15)
    # Of the index itself these are mended, and the pictures that are left are sound.
    again = check(tmp_path / "index")
    assert again.problems == 0
    assert {f.what: f.count for f in again.findings if "mended" in f.what} == {
        f"mended at import: {what}": count for what, count in problems.items()
    }


def test_examples_are_few_and_counts_are_whole(tmp_path):
    boxes = [(1, 0, (1 + i, 2, 0, 5), 0) for i in range(20)]
    finding = by_kind(check(write_coco(tmp_path, names=["1.jpg"], boxes=boxes + GOOD[:1])))["box is empty"]
    assert (finding.count, len(finding.examples)) == (20, EXAMPLES)


def test_pictures_in_both_splits_are_found(tmp_path):
    train = write_coco(tmp_path / "train", names=["1.jpg", "2.jpg", "3.jpg"], boxes=GOOD)
    val = write_coco(tmp_path / "val", names=["a.jpg", "b.jpg", "c.jpg"], boxes=GOOD, start=50)
    assert check(train, against=val).problems == 0
    shutil.copy(train / "images" / "2.jpg", val / "images" / "b.jpg")
    low = cv2.imread(str(train / "images" / "3.jpg"))
    cv2.imwrite(str(val / "images" / "c.jpg"), low, [cv2.IMWRITE_JPEG_QUALITY, 60])
    report = check(train, against=val, near_duplicates=True)
    found = by_kind(report)
    assert report.problems == found[LEAK].count == 1
    assert found[LEAK].examples[0].image == "2.jpg" and "b.jpg" in found[LEAK].examples[0].detail
    assert found[NEAR_LEAK].count == 1 and not found[NEAR_LEAK].problem
    assert found[NEAR_LEAK].examples[0].image == "3.jpg"
    import_data(train, tmp_path / "a")
    import_data(val, tmp_path / "b", hash_images=False)
    for against in (tmp_path / "b", Index.open(tmp_path / "b"), val):
        assert by_kind(check(tmp_path / "a", against=against))[LEAK].count == 1


def test_the_splits_of_one_source_are_compared(tmp_path):
    write_coco(tmp_path, names=["1.jpg", "2.jpg", "3.jpg"], boxes=GOOD, split="train")
    write_coco(tmp_path, names=["3.jpg", "4.jpg", "5.jpg"], boxes=GOOD, split="val", start=70)
    report = check(tmp_path)
    assert (report.images, report.problems) == (6, 1)
    assert by_kind(report)[LEAK].examples[0].image == "3.jpg"
    assert check(tmp_path, split="val").problems == 0


def test_classes_that_differ_and_copies_are_noted(tmp_path):
    train = write_coco(tmp_path / "train", names=["1.jpg", "2.jpg", "3.jpg"], boxes=GOOD)
    shutil.copy(train / "images" / "1.jpg", train / "images" / "3.jpg")
    val = write_coco(
        tmp_path / "val", names=["a.jpg", "b.jpg", "c.jpg"], boxes=GOOD, start=9, categories=("dog", "emu")
    )
    found = by_kind(check(train, against=val))
    assert found["class only here"].examples[0].detail == "cat"
    assert found["class only in the other split"].examples[0].detail == "emu"
    assert found["picture stands twice"].examples[0].image == "3.jpg"
    assert not any(finding.problem for finding in found.values())


def test_an_index_whose_pictures_changed_is_no_longer_sound(tmp_path):
    import_data(write_coco(tmp_path / "set", names=[f"{i}.jpg" for i in range(1, 6)], boxes=GOOD), tmp_path / "index")
    images = tmp_path / "set" / "images"
    (images / "1.jpg").unlink()
    (images / "2.jpg").write_bytes(b"")
    cv2.imwrite(str(images / "3.jpg"), picture(3, 50, 50))
    cv2.imwrite(str(images / "4.jpg"), picture(99, 60, 80))
    report = check(tmp_path / "index")
    assert {f.what: f.examples[0].image for f in report.findings if f.problem} == {
        "picture is missing": "1.jpg",
        "picture is empty": "2.jpg",
        "picture has another size": "3.jpg",
        "picture has changed since the import": "4.jpg",
    }
    assert check(tmp_path / "index", images=False).problems == 0


def test_nothing_to_train_on_is_a_problem(tmp_path):
    report = check(write_coco(tmp_path, names=["1.jpg"]))
    found = by_kind(report)["no box, no label of a picture and no semantic map at all"]
    assert found.problem and report.problems == 1


def test_annotations_alone(tmp_path):
    source = write_coco(tmp_path, names=["1.jpg", "2.jpg", "3.jpg"], boxes=GOOD)
    shutil.rmtree(source / "images")
    with pytest.raises(DataError):
        check(source)
    assert check(source, images=False).problems == 0


def test_the_import_report_of_a_rich_index_is_kept_apart(tmp_path):
    """The sample's hashes and semantic maps are made up: its pictures count as changed, its maps as missing."""
    report = check(write_index(tmp_path))
    found = by_kind(report)
    assert found["picture has changed since the import"].count == 24
    assert found["semantic map is missing"].count == 16 == report.problems - 24
    assert not found["mended at import: missing"].problem
    assert np.all([finding.count >= len(finding.examples) for finding in report.findings])


def test_an_index_whose_numbers_were_changed_is_told(tmp_path):
    index = write_index(tmp_path)
    column = index.path / "label.npy"
    data = bytearray(column.read_bytes())
    data[-1] ^= 0x55
    column.write_bytes(data)
    with pytest.raises(DataError, match=r"label\.npy: a column's checksum differs"):
        check(Index.open(index.path), images=False)
