import json
import re

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as reference

from gesso.data import rle
from gesso.data.importing import import_data
from gesso.data.index import Index
from gesso.data.readers.coco import read_coco
from gesso.errors import DataError

IMAGES = [{"id": 1, "file_name": "a.jpg", "width": 40, "height": 30}]
CATEGORIES = [{"id": 1, "name": "cat"}]
BOX = {"id": 5, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}


def read(path, annotations, images=IMAGES, categories=CATEGORIES):
    path = path / "x.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return read_coco(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"annotations": [BOX, {**BOX, "id": 6, "category_id": 9}]}, "x.json: annotation 6 has the category id 9"),
        ({"images": [{"file_name": "a.jpg"}]}, "an image cannot be understood"),
        ({"categories": [{"id": 1}]}, "a category cannot be understood"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, "category id 1 stands twice"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 2, "name": " A"}]}, "x.json: the category name"),
        ({"annotations": [{**BOX, "id": 2**70}]}, f"x.json: the id {2**70} in 'annotations' is too large"),
        ({"annotations": [BOX, {**BOX, "image_id": 2**63}]}, f"the image_id {2**63} in 'annotations' is too large"),
        ({"annotations": [{**BOX, "category_id": -(2**64)}]}, f"the category_id {-(2**64)} in 'annotations'"),
        ({"images": [*IMAGES, {"id": 2**63}]}, f"x.json: the id {2**63} in 'images' is too large"),
        ({"images": [{**IMAGES[0], "width": 99999999999}]}, "the width 99999999999 in 'images' is too large"),
        ({"categories": [*CATEGORIES, {"id": 2**63, "name": "x"}]}, f"x.json: the id {2**63} in 'categories' is too"),
        ({"images": [{"id": 1, "file_name": "\ud800.jpg"}]}, r"x.json: the text '\ud800.jpg' in 'images' is not"),
        ({"images": [{**IMAGES[0], "semantic": "\ud800"}]}, r"the text '\ud800' in 'images' is not Unicode"),
        ({"categories": [{"id": 1, "name": "c\ud800"}]}, r"the text 'c\ud800' in 'categories' is not Unicode"),
        ({"annotations": [{**BOX, "segmentation": "\ud800"}]}, r"the text '\ud800' in 'annotations' is not Unicode"),
    ],
)
def test_what_is_refused(tmp_path, change, words):
    with pytest.raises(DataError, match=re.escape(words)):
        read(tmp_path, **({"annotations": [BOX]} | change))


@pytest.mark.parametrize("missing", ["images", "annotations", "categories"])
def test_a_missing_list_is_named(tmp_path, missing):
    whole = {"images": IMAGES, "annotations": [BOX], "categories": CATEGORIES}
    del whole[missing]
    (tmp_path / "x.json").write_text(json.dumps(whole))
    with pytest.raises(DataError, match=f"'{missing}' is missing"):
        read_coco(tmp_path / "x.json")


def test_annotations_that_do_not_fit_are_mended_or_dropped(tmp_path):
    rows = [
        BOX,
        {**BOX, "id": 6, "bbox": [1, None, 3, 4]},
        {**BOX, "id": 7, "bbox": [1, 2, 3]},
        {**BOX, "id": 8, "segmentation": "?"},
        {**BOX, "id": 9, "segmentation": [[1, 2, 3]]},
        {**BOX, "id": 10, "segmentation": {"size": [30, 40], "counts": [5]}},
        {**BOX, "id": 11, "iscrowd": "1"},
        {key: value for key, value in BOX.items() if key != "bbox"} | {"segmentation": [[0, 0, 9, 0, 9, 5]]},
    ]
    found = read(tmp_path, rows)
    assert found.objects.annotation_ids.tolist() == [5, 6, 8, 9, 10, 11, 5]
    assert np.isnan(found.objects.xyxy[1]).any()
    assert found.objects.xyxy[6].tolist() == [0, 0, 9, 5]
    assert found.objects.flags.tolist() == [0, 0, 0, 0, 0, 1, 0]
    issues = [(issue.image, issue.annotation_id, issue.what) for issue in found.issues]
    assert issues == [
        ("a.jpg", 7, "annotation cannot be read"),
        ("a.jpg", 8, "mask cannot be read"),
        ("a.jpg", 9, "mask cannot be read"),
        ("a.jpg", 10, "mask cannot be read"),
    ]


def test_what_no_column_holds_does_no_harm_in_an_annotation_that_is_dropped(tmp_path):
    large = 2**63
    rows = [
        {**BOX, "id": large, "image_id": large, "bbox": [1]},
        {**BOX, "segmentation": {"size": [30, 40], "counts": [large]}},
        {**BOX, "segmentation": {"size": [30, 40], "counts": "\ud800"}},
    ]
    issues = [(issue.annotation_id, issue.what) for issue in read(tmp_path, rows).issues]
    assert issues == [(None, "annotation cannot be read"), (5, "mask cannot be read"), (5, "mask cannot be read")]


def test_a_box_that_is_missing_is_that_of_the_mask(tmp_path):
    random = np.random.default_rng(0)
    masks = [random.random((30, 40)) < share for share in (0, 0.001, 0.002, 0.005, 0.5, 1)]
    pixels = np.arange(1200).reshape(40, 30).T  # as run lengths count them
    masks += [pixels % 30 == 29, pixels // 30 == 7, (pixels >= 100) & (pixels <= 140)]
    forms = [reference.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks]
    rows = [
        {
            "id": number,
            "image_id": 1,
            "category_id": 1,
            "segmentation": {"size": form["size"], "counts": form["counts"].decode()},
        }
        for number, form in enumerate(forms)
    ]
    found = read(tmp_path, [*rows, {**rows[0], "segmentation": [[1, 2, 3]]}, {**BOX, **rows[-1]}])
    assert np.isnan(found.objects.xyxy[[0, len(masks)]]).all()
    for form, box in zip(forms[1:], found.objects.xyxy[1:].tolist(), strict=False):
        x, y, width, height = reference.toBbox(form)
        assert box == [x, y, x + width, y + height]
    assert found.objects.xyxy[-1].tolist() == [1, 2, 4, 6]
    empty_runs = {**rows[0], "segmentation": {"size": [30, 40], "counts": [40, 0, 5, 3, 1152, 0]}}
    assert read(tmp_path, [empty_runs]).objects.xyxy.tolist() == [[1, 15, 2, 18]]


def test_a_mask_is_not_drawn_for_its_box(tmp_path):
    side = 2**25
    row = {"image_id": 1, "category_id": 1, "segmentation": {"size": [side, side], "counts": [0, side**2]}}
    assert read(tmp_path, [row]).objects.xyxy.tolist() == [[0, 0, side, side]]


def test_further_columns(tmp_path):
    rows = [{**BOX, "height": 9.5, "score": 0.25}, {**BOX, "vis_ratio": 0.5}]
    columns = read(tmp_path, rows).objects.columns
    assert {name: [None if np.isnan(value) else value for value in column] for name, column in columns.items()} == {
        "height": [9.5, None],
        "score": [0.25, None],
        "vis_ratio": [None, 0.5],
    }


@pytest.mark.parametrize(
    "place", ["s/images", "s", "s/images/val", "s/val", "images", "images/val", "val", "."], ids=lambda p: p or "."
)
def test_pictures_are_found_in_the_usual_places(tmp_path, place):
    (tmp_path / "s").mkdir()
    read(tmp_path / "s", [BOX])
    (tmp_path / "s" / "x.json").rename(tmp_path / "s" / "val.json")
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30)).save(tmp_path / place / "a.jpg")
    import_data(tmp_path / "s" / "val.json", tmp_path / "index")
    assert Index.open(tmp_path / "index").image_path(0).samefile(tmp_path / place / "a.jpg")


def test_both_forms_of_run_lengths(tmp_path):
    mask = np.zeros((30, 40), np.uint8)
    mask[3:9, 5:20] = 1
    text = reference.encode(np.asfortranarray(mask))["counts"].decode()
    counts = rle.uncompress(text.encode()).tolist()
    forms = [{"size": [30, 40], "counts": form} for form in (text, counts)]
    masks = read(tmp_path, [{**BOX, "segmentation": form} for form in forms]).objects.masks
    assert all(np.array_equal(rle.decode(masks[i]), mask) for i in range(2))


def test_an_image_id_that_stands_twice(tmp_path):
    found = read(tmp_path, [BOX], images=[*IMAGES, {"id": 1, "file_name": "b.jpg"}])
    assert list(found.images.names) == ["a.jpg"] and found.issues[0].what == "image id stands twice"


def test_ids_far_apart_and_empty_lists(tmp_path):
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in (-(2**60), 2**60, 0)]
    found = read(tmp_path, [{**BOX, "image_id": 2**60}], images=images)
    assert found.objects.rows.tolist() == [1] and found.images.widths.tolist() == [0, 0, 0]
    empty = read(tmp_path, [], images=[], categories=[])
    assert len(empty.images) == len(empty.objects) == len(empty.label_space) == 0
