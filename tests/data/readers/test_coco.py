import json
import re

import numpy as np
import pytest
from pycocotools import mask as reference

from gesso.data import rle
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
        ({"annotations": [{**BOX, "id": 2**70}]}, "too large"),
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
