import json

import pytest

from gesso.data.readers.detect import choose, detect
from gesso.errors import DataError

COCO = json.dumps({"images": [], "annotations": [], "categories": []})


def put(folder, **files):
    for name, text in files.items():
        file = folder / name.replace("__", "/").replace("_DOT_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def kinds(folder, **more):
    return [(found.format, found.split) for found in detect(folder, **more)]


def test_coco(tmp_path):
    put(tmp_path, val_DOT_json=COCO, train_DOT_json=COCO, other_DOT_json="[1]")
    assert kinds(tmp_path) == [("coco", "train"), ("coco", "val")]
    assert kinds(tmp_path / "val.json") == [("coco", "")]
    assert choose(detect(tmp_path), "val", tmp_path)[0].path == tmp_path / "val.json"


def test_of_coco_annotations_the_instances_are_taken(tmp_path):
    put(tmp_path, annotations__instances_val2017_DOT_json=COCO, annotations__captions_val2017_DOT_json=COCO)
    assert kinds(tmp_path) == [("coco", "")]


def test_several_formats_need_a_choice(tmp_path):
    put(tmp_path, val_DOT_json=COCO, Annotations__a_DOT_xml="<annotation/>")
    with pytest.raises(DataError, match=r"several formats \(coco, voc\).*--format"):
        detect(tmp_path)
    assert kinds(tmp_path, format="voc") == [("voc", "")]


def test_nothing(tmp_path):
    with pytest.raises(DataError, match="the folder is empty"):
        detect(tmp_path)
    put(tmp_path, a_DOT_jpg="x", b_DOT_jpg="x")
    with pytest.raises(DataError, match="found 2 pictures but no annotations"):
        detect(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        detect(tmp_path / "none")
    with pytest.raises(DataError, match=r"unknown format 'cocoo'.*'coco'"):
        detect(tmp_path, "cocoo")
    with pytest.raises(DataError, match="format of this file is not known"):
        detect(tmp_path / "a.jpg")
