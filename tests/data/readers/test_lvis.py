import json
from pathlib import Path

import numpy as np
import pytest

from gesso.data.demo import make_demo
from gesso.data.demo_index import demo_index
from gesso.data.demo_scenes import DemoConfig
from gesso.data.importing import import_data
from gesso.data.index import Index
from gesso.data.readers.lvis import Lists, map_verdicts, verdicts
from gesso.errors import DataError
from gesso.label_space import LabelSpace

CATEGORIES = [{"id": number, "name": name} for number, name in ((7, "cat"), (3, "dog"), (5, "owl"), (9, "yak"))]


def save(path, images):
    boxes = [(1, 3), (1, 5), (2, 3), (3, 7)]
    rows = [
        {"id": i, "image_id": image, "category_id": category, "bbox": [1, 1, 5, 5]}
        for i, (image, category) in enumerate(boxes, 1)
    ]
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 9, "height": 9} | more for i, more in images]
    path.write_text(json.dumps({"images": images, "annotations": rows, "categories": CATEGORIES}))
    return path


@pytest.fixture
def source(tmp_path):
    lists = {"neg_category_ids": [9, 5], "not_exhaustive_category_ids": [3]}
    return save(tmp_path / "x.json", [(1, lists), (2, {"neg_category_ids": [7], "semantic": "maps/2.png"}), (3, {})])


def test_lists_become_verified_labels(source, tmp_path):
    import_data(source, tmp_path / "i", images=False)
    index = Index.open(tmp_path / "i")
    assert index.label_space.names == ("dog", "owl", "cat", "yak")
    # More dogs than the one with a box may be there; the owl's box speaks against the list of what is absent.
    assert index.verified(0).tolist() == [0, 1, 0, 2]
    assert index.verified(1).tolist() == [1, 0, 2, 0]
    assert index.verified(2).tolist() == [2, 2, 1, 2]  # without lists, everything is verified
    assert index.semantic_path(0) is None and index.semantic_path(1).parts[-2:] == ("maps", "2.png")


def test_an_image_whose_classes_are_all_in_doubt_verifies_nothing(tmp_path):
    doubt = {"neg_category_ids": [], "not_exhaustive_category_ids": [5, 3]}
    import_data(save(tmp_path / "x.json", [(1, doubt), (2, {}), (3, {})]), tmp_path / "i", images=False)
    index = Index.open(tmp_path / "i")
    assert index.objects(0).labels.tolist() == [0, 1]
    assert index.verified(0).tolist() == [0, 0, 0, 0]


def test_verdicts_themselves():
    lists = {8: Lists(absent=[3], partial=[5, 9]), 4: Lists(absent=[5], partial=[])}
    rows, labels = np.array([1, 0, 0, 0]), np.array([0, 0, 1, 0])
    found = verdicts(lists, np.array([8, 4, 6]), rows, labels, np.array([3, 5, 9]), where=Path("x.json"))
    assert found.offsets.tolist() == [0, 1, 3, 6]
    assert found.labels.tolist() == [0, 0, 1, 0, 1, 2] and found.states.tolist() == [1, 1, 2, 2, 2, 2]
    mapped = map_verdicts(found, np.array([2, -1, 0]))
    assert mapped.offsets.tolist() == [0, 1, 2, 4]
    assert mapped.labels.tolist() == [2, 2, 2, 0] and mapped.states.tolist() == [1, 1, 2, 2]


def test_in_another_label_space(source, tmp_path):
    space = LabelSpace.from_names(["emu", "owl", "cat", "dog"])
    import_data(source, tmp_path / "i", images=False, label_space=space)
    index = Index.open(tmp_path / "i")
    assert [index.verified(i).tolist() for i in range(3)] == [[0, 1, 0, 0], [0, 0, 2, 1], [0, 2, 1, 2]]


def test_a_file_without_lists_verifies_everything(tmp_path):
    import_data(save(tmp_path / "x.json", [(1, {}), (2, {}), (3, {})]), tmp_path / "i", images=False)
    index = Index.open(tmp_path / "i")
    assert index.verified(0) is None and index.semantic_path(0) is None


def test_an_unknown_category_in_a_list_is_refused(tmp_path):
    source = save(tmp_path / "x.json", [(1, {"neg_category_ids": [4]}), (2, {}), (3, {})])
    with pytest.raises(DataError, match="a list of image 1 has the category id 4, which 'categories' lacks"):
        import_data(source, tmp_path / "i", images=False)


def test_a_plain_import_of_the_demo_keeps_them(tmp_path):
    config = DemoConfig(images=8, side=96, hidden_labels=0.4)
    made = demo_index(tmp_path / "demo", config)
    import_data(make_demo(tmp_path / "demo" / "pictures", config), tmp_path / "i")
    index = Index.open(tmp_path / "i")
    assert index.label_space.names == made.label_space.names
    for row in range(8):
        assert index.verified(row).tolist() == made.verified(row).tolist()
        assert index.semantic_path(row) == made.semantic_path(row) and index.semantic_path(row).is_file()
