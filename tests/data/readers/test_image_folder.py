import numpy as np
import pytest

from gesso.data.demo import DemoConfig, make_demo_classes
from gesso.data.index import Index
from tests.command_line import coco, picture


def classes(folder, *names, pictures=2, first=0):
    for number, name in enumerate(names):
        for i in range(pictures):
            picture(folder / name / f"{i}.jpg", seed=first + number * 50 + i)


def shown(index):
    """The class of each image, which must be told of every other class too."""
    states = [index.verified(row) for row in range(len(index))]
    assert all(np.sort(state)[0] == 1 and (state == 1).sum() == 1 and (state > 0).all() for state in states)
    return [index.label_space.names[int(np.argmax(state == 1))] for state in states]


@pytest.mark.parametrize("above", ["", "images", "256_ObjectCategories/more"])
def test_classes(gesso, tmp_path, above):
    classes(tmp_path / "s" / above, "dog", "cat", "t-shirt")
    picture(tmp_path / "s" / above / "cat" / "deep" / "er" / "x.png", seed=9)
    (tmp_path / "s" / above / "cat" / "notes.txt").write_text("x")
    made = gesso.json("data", "import", tmp_path / "s", "--out", tmp_path / "i")
    assert (made["format"], made["images"], made["boxes"], made["labels"]) == ("folder", 7, 0, 7)
    index = Index.open(tmp_path / "i")
    assert index.label_space.names == ("cat", "dog", "t-shirt") and not index.num_boxes
    assert shown(index) == [name.split("/")[0] for name in index.names]
    assert all(index.image_path(row).is_file() for row in range(7))
    assert index.sources[0].labelled is None and len(index.verified_columns.labels) == 7


@pytest.mark.parametrize("above", ["", "images"])
def test_splits_have_the_classes_of_all_splits(gesso, tmp_path, above):
    base = tmp_path / "s" / above
    classes(base / "train", "cat", "dog")
    classes(base / "val", "dog", "zebra", first=100)
    classes(base / "test", "cat", first=200)
    made = gesso.json("data", "import", tmp_path / "s", "--out", tmp_path / "i")
    assert [part["split"] for part in made["splits"]] == ["train", "test", "val"]
    assert made["categories"] == 3 and made["labels"] == 10
    index = Index.open(tmp_path / "i" / "val")
    assert index.label_space.names == ("cat", "dog", "zebra") and shown(index) == ["dog"] * 2 + ["zebra"] * 2
    gesso("data", "import", tmp_path / "s", "--split", "val", "--out", tmp_path / "j")
    alone = Index.open(tmp_path / "j")
    assert alone.label_space == index.label_space and alone.image_ids.tolist() == index.image_ids.tolist()
    report = gesso.json("data", "check", tmp_path / "s")
    assert report["problems"] == 0
    unused = next(note["examples"] for note in report["findings"] if note["what"] == "class without images")
    told = ["cat (in val)", "dog (in test)", "zebra (in test)", "zebra (in train)"]
    assert sorted(detail for _, _, detail in unused) == told


def test_numbers_before_the_names_as_in_caltech_256(gesso, tmp_path):
    classes(tmp_path / "s", "001.ak47", "002.american-flag", "257.clutter")
    (tmp_path / "s" / "002.american-flag" / "greg" / "vision309").mkdir(parents=True)
    gesso("data", "import", tmp_path / "s", "--out", tmp_path / "i")
    assert Index.open(tmp_path / "i").label_space.names == ("ak47", "american-flag", "clutter")


def test_numbers_stay_where_one_folder_has_none(gesso, tmp_path):
    classes(tmp_path / "s", "1.0", "2.0", "other")
    gesso("data", "import", tmp_path / "s", "--out", tmp_path / "i")
    assert Index.open(tmp_path / "i").label_space.names == ("1.0", "2.0", "other")


def test_what_is_left_out_is_told(gesso, tmp_path):
    classes(tmp_path / "s", "cat", "dog")
    (tmp_path / "s" / "mouse").mkdir()
    (tmp_path / "s" / "cat" / "9.png").write_bytes(b"no picture")
    picture(tmp_path / "s" / "loose.jpg")
    picture(tmp_path / "s" / ".hidden" / "x.jpg")
    made = gesso.json("data", "import", tmp_path / "s", "--out", tmp_path / "i")
    assert made["images"] == 4 and made["categories"] == 2
    assert made["issues"] == {
        "folder of a class without pictures": 1,
        "picture in no folder of a class": 1,
        "picture cannot be read": 1,
    }
    shown(Index.open(tmp_path / "i"))
    assert gesso.json("data", "check", tmp_path / "s", code=1)["problems"] == 3


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["cat"], "a folder for each of two or more classes"),
        (["train/cat", "val/cat"], "a folder for each of two or more classes"),
        (["train2017", "val2017"], "holds no annotations"),
        (["Cat", "cat"], "stands twice"),
    ],
)
def test_no_set_of_classes(gesso, tmp_path, names, words):
    classes(tmp_path / "s", *names)
    assert words in gesso.mistake("data", "import", tmp_path / "s", "--out", tmp_path / "i")
    assert words in gesso.mistake("data", "import", tmp_path / "s", "--format", "folder", "--out", tmp_path / "i")
    assert not (tmp_path / "i").exists()


def test_boxes_go_before_folders(gesso, tmp_path):
    coco(tmp_path / "s")
    classes(tmp_path / "s" / "crops", "cat", "dog")
    assert gesso.json("data", "import", tmp_path / "s", "--out", tmp_path / "i")["format"] == "coco"
    made = gesso.json("data", "import", tmp_path / "s" / "crops", "--out", tmp_path / "j")
    assert made["format"] == "folder" and made["images"] == 4


def test_a_class_that_another_label_space_lacks_is_refused(gesso, tmp_path):
    classes(tmp_path / "s", "cat", "dog")
    classes(tmp_path / "t", "cat", "dgo")
    gesso("data", "import", tmp_path / "s", "--out", tmp_path / "i")
    words = ("--classes-from", tmp_path / "i", "--out", tmp_path / "j")
    line = gesso.mistake("data", "import", tmp_path / "t", *words)
    assert "'dgo' (2 pictures in all) is not in the label space" in line and "'dog'" in line


def test_split_balances_the_classes_and_export_says_what_is_lost(gesso, tmp_path):
    rng = np.random.default_rng(0)
    for number, name in enumerate(("cat", "dog")):
        for i in range(20):
            picture(tmp_path / "s" / name / f"{i}.png", size=(20 + number, 20 + i), seed=int(rng.integers(1000)))
    gesso("data", "import", tmp_path / "s", "--out", tmp_path / "i")
    made = gesso.json("data", "split", tmp_path / "i", "--out", tmp_path / "p", "--val", "0.25", "--no-near-duplicates")
    assert [part["images"] for part in made["parts"]] in ([30, 10], [29, 11], [31, 9])
    for part in ("train", "val"):
        index = Index.open(tmp_path / "p" / part)
        counts = np.bincount([index.label_space.index(name) for name in shown(index)])
        assert counts.min() >= 0.4 * counts.sum()
    for format in ("coco", "voc", "yolo"):
        lost = gesso.json("data", "export", tmp_path / "i", "--out", tmp_path / format, "--format", format)["not_kept"]
        assert any("image-level labels" in line for line in lost)
    counted = gesso.json("data", "stats", tmp_path / "i")
    assert (counted["boxes"], counted["labels"], counted["negatives"], counted["unused"]) == (0, 40, 0, [])
    assert [row["images"] for row in counted["classes"]] == [20, 20]


@pytest.mark.parametrize(("name", "images", "count"), [("clothing_cls", 1044, 10), ("grocery_cls", 1275, 81)])
def test_real_sets(gesso, real_sets, tmp_path, name, images, count):
    made = gesso.json("data", "import", real_sets / name, "--out", tmp_path / "i")
    assert (made["format"], made["images"], made["labels"], made["categories"]) == ("folder", images, images, count)
    assert {part["split"] for part in made["splits"]} == {"train", "val"} and not made["issues"]
    train, val = (Index.open(part["path"]) for part in made["splits"])
    assert train.label_space == val.label_space
    assert shown(train) == [name.split("/")[1] for name in train.names]


def test_the_embedded_classes(gesso, tmp_path):
    make_demo_classes(tmp_path / "demo", DemoConfig(images=12, side=96), side=32)
    made = gesso.json("data", "import", tmp_path / "demo", "--out", tmp_path / "i")
    assert made["format"] == "folder" and made["images"] == made["labels"] > 12 and made["categories"] > 1
