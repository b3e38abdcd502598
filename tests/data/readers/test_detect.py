import json

import pytest

from gesso.data.check import check
from gesso.data.demo import DemoConfig, make_demo
from gesso.data.importing import import_data
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


def test_json_of_labels_of_whole_pictures_is_no_coco(tmp_path):
    labels = json.dumps({"classes": [{"id": 0, "name": "a"}], "images": [{"id": 1, "label": 0}]})
    put(tmp_path, val_DOT_json=labels, images__val__a__1_DOT_jpg="x", images__val__b__1_DOT_jpg="x")
    assert kinds(tmp_path) == [("folder", "val")]
    put(tmp_path, val_DOT_json=json.dumps({"classes": [{"id": 0}], "images": [], "annotations": []}))
    assert kinds(tmp_path) == [("coco", "")]


def test_folders_of_pictures_alone_are_taken_last(tmp_path):
    put(tmp_path, images__a__1_DOT_jpg="x", images__b__2_DOT_jpg="x")
    assert kinds(tmp_path) == [("folder", "")]
    put(tmp_path, masks__a__1_DOT_png="x")
    assert kinds(tmp_path) == [("masks", "")]
    assert kinds(tmp_path, format="folder") == [("folder", "")]
    put(tmp_path, val_DOT_json=COCO)
    assert kinds(tmp_path) == [("coco", "")]
    assert kinds(tmp_path, format="masks") == [("masks", "")]


def test_a_mat_file_is_of_citypersons(tmp_path):
    put(tmp_path, annotations__anno_val_DOT_mat="x", anno_train_DOT_mat="x")
    assert kinds(tmp_path) == [("citypersons", "train"), ("citypersons", "val")]
    assert kinds(tmp_path / "anno_train.mat") == [("citypersons", "")]
    with pytest.raises(DataError, match="format of this file is not known"):
        detect(tmp_path / "anno_train.mat", "coco")


@pytest.mark.parametrize("format", ["citypersons", "sun397", "flowers102", "masks", "folder", "yolo"])
def test_a_format_that_is_not_there(tmp_path, format):
    put(tmp_path, x_DOT_txt="x")
    with pytest.raises(DataError, match=r"holds no annotations: found x\.txt\. Sought: "):
        detect(tmp_path, format)


def test_several_formats_need_a_choice(tmp_path):
    put(tmp_path, val_DOT_json=COCO, Annotations__a_DOT_xml="<annotation/>")
    with pytest.raises(DataError, match=r"several formats \(coco, voc\).*--format"):
        detect(tmp_path)
    assert kinds(tmp_path, format="voc") == [("voc", "")]


def test_json_whose_keys_are_no_lists_is_no_coco(tmp_path):
    put(
        tmp_path,
        settings_DOT_json='{"images": 3}',
        package_DOT_json='{"categories": ["x"]}',
        other_DOT_json='{"categories" : {}, "annotations":"x"}',
    )
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(DataError, match="holds no annotations"):
        detect(tmp_path)
    put(tmp_path, true_DOT_json='{"images"\n:\n[ {')
    assert kinds(tmp_path) == [("coco", "")]


def test_the_embedded_data_set_is_a_source(tmp_path):
    annotations = make_demo(tmp_path / "demo", DemoConfig(images=4, side=64))
    assert [found.path for found in detect(tmp_path / "demo")] == [annotations]
    assert import_data(tmp_path / "demo", tmp_path / "index").images == check(tmp_path / "demo").images == 4
    assert not check(tmp_path / "demo").problems
    with pytest.raises(DataError, match="holds no annotations"):
        detect(tmp_path / "index")


def test_xml_of_another_kind_is_no_voc(tmp_path):
    head = '<?xml version="1.0" encoding="UTF-8"?><!-- <annotation> -->'
    put(tmp_path, val_DOT_json=COCO, _DOT_idea__a_DOT_xml=f"{head}<project><annotation/></project>")
    assert kinds(tmp_path) == [("coco", "")]
    put(tmp_path, z_DOT_xml=f"{head}<annotation></annotation>")
    with pytest.raises(DataError, match="several formats"):
        detect(tmp_path)


def test_broken_xml_may_be_voc(tmp_path):
    put(tmp_path, Annotations__a_DOT_xml="no xml", Annotations__b_DOT_xml='<?xml version="1.0" encoding="no"?><a/>')
    assert kinds(tmp_path) == [("voc", "")]


def test_lists_of_voc_are_splits_unless_they_are_of_one_class(tmp_path):
    put(
        tmp_path,
        Annotations__a_DOT_xml="<annotation/>",
        **{"Annotations__scan 1_DOT_xml": "<annotation/>"},
        ImageSets__Main__train_DOT_txt="a\n",
        ImageSets__Main__val_DOT_txt="a\n",
        ImageSets__Main__trainval_DOT_txt="a\n",
        ImageSets__Main__train_small_DOT_txt="\na\n",
        ImageSets__Main__train_scans_DOT_txt="scan 1\n",
        ImageSets__Main__cat_train_DOT_txt="\na  1\n",
        ImageSets__Main__dog_train_DOT_txt="a -1\n",
    )
    found = detect(tmp_path)
    assert [one.split for one in found] == ["train", "train_scans", "train_small", "trainval", "val"]
    assert [one.split for one in choose(found, None, tmp_path)] == ["train", "train_scans", "train_small", "val"]
    assert [one.split for one in choose(found, "trainval", tmp_path)] == ["trainval"]
    with pytest.raises(DataError, match="no split 'cat_train'"):
        choose(found, "cat_train", tmp_path)


def test_a_list_of_everything_is_taken_where_its_parts_are_not_there(tmp_path):
    put(tmp_path, Annotations__a_DOT_xml="<annotation/>", ImageSets__Main__trainval_DOT_txt="a")
    assert [one.split for one in choose(detect(tmp_path), None, tmp_path)] == ["trainval"]


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
