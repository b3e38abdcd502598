import pytest
from PIL import Image

from gesso.data.importing import import_data
from gesso.data.index import Index
from gesso.data.readers.detect import detect
from gesso.data.readers.yolo_names import describe, parse
from gesso.errors import DataError


def write(folder, name, text, size=(40, 20), middle=""):
    picture, labels = folder / "images" / middle / f"{name}.png", folder / "labels" / middle / f"{name}.txt"
    for file in (picture, labels):
        file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(picture)
    if text is not None:
        labels.write_text(text)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "yolo"
    write(folder, "a", "1 0.5 0.5 0.25 0.5\n\n0 0.1 0.1 0.5 0.1 0.5 0.9\n0 0.9 0.5 0.4 0.5\n")
    write(folder, "b", None)
    write(folder, "c", "0 what\n")
    (folder / "classes.txt").write_text("cat\ndog\n")
    return folder


def test_shares_become_pixels(folder, tmp_path):
    summary = import_data(folder, tmp_path / "i")
    index = Index.open(tmp_path / "i")
    assert summary.format == "yolo" and index.label_space.names == ("cat", "dog")
    assert index.objects(0).xyxy.tolist() == [[15, 5, 25, 15], [4, 2, 20, 18], [28, 5, 40, 15]]
    assert index.objects(0).labels.tolist() == [1, 0, 0]
    first, ring, _ = index.masks(0)
    assert first is None and ring.rings[0].tolist() == [[4, 2], [20, 2], [20, 18]]
    assert len(index.objects(1).labels) == len(index.objects(2).labels) == 0
    assert summary.issues == {"annotation cannot be read": 1, "box beyond the border": 1}
    assert index.image_path(2).name == "c.png"


def test_masks_stay_with_their_boxes_when_a_picture_is_broken(folder, tmp_path):
    (folder / "images" / "a.png").write_bytes(b"")
    write(folder, "d", "1 0.5 0.5 0.5 0.5\n0 0.1 0.1 0.5 0.1 0.5 0.9\n")
    import_data(folder, tmp_path / "i")
    index = Index.open(tmp_path / "i")
    first, ring = index.masks(2)
    assert first is None and ring.rings[0].tolist() == [[4, 2], [20, 2], [20, 18]]


def test_without_pictures_shares_stay(folder, tmp_path):
    import_data(folder, tmp_path / "i", images=False)
    index = Index.open(tmp_path / "i")
    assert index.normalised.all() and not index.widths.any()
    assert index.objects(0).xyxy[0].tolist() == [0.375, 0.25, 0.625, 0.75]
    assert index.objects(0).xyxy[2, 2] == 1


def test_data_yaml_with_splits(tmp_path):
    folder = tmp_path / "y"
    write(folder, "a", "0 0.5 0.5 1 1", middle="train")
    write(folder, "b", "1 0.5 0.5 1 1", middle="val")
    (folder / "data.yaml").write_text("path: .\ntrain: images/train\nval: images/val\nnames:\n  0: cat\n  1: 'a dog'\n")
    summary = import_data(folder, tmp_path / "i")
    assert [(part.split, part.images, part.boxes) for part in summary.splits] == [("train", 1, 1), ("val", 1, 1)]
    assert Index.open(tmp_path / "i" / "val").label_space.names == ("cat", "a dog")
    summary = import_data(folder / "data.yaml", tmp_path / "v", split="val")
    assert summary.images == 1 and Index.open(tmp_path / "v").objects(0).labels.tolist() == [1]


@pytest.fixture
def splits(tmp_path):
    """A folder of pictures of the splits train and val, to which a test adds data.yaml."""
    write(tmp_path / "y", "a", "0 0.5 0.5 1 1", middle="train")
    write(tmp_path / "y", "b", "0 0.5 0.5 1 1", middle="val")
    return tmp_path / "y"


COCO8 = """# Ultralytics AGPL-3.0 License
path: coco8 # dataset root dir
train: images/train # train images (relative to 'path') 4 images
val: images/val # val images (relative to 'path') 4 images
{test}

# Classes
names:
  0: person
  1: bicycle

# Download script/URL (optional)
download: https://github.com/ultralytics/assets/releases/download/v0.0.0/coco8.zip
"""


@pytest.mark.parametrize(
    "test", ["test: # test images (optional)", "test:", "test: null", "test: ~", "test: ''", 'test: ""', "test: []", ""]
)
def test_an_optional_split_without_a_value(splits, tmp_path, test):
    (splits / "data.yaml").write_text(COCO8.format(test=test))
    summary = import_data(splits, tmp_path / "i")
    assert [(part.split, part.images) for part in summary.splits] == [("train", 1), ("val", 1)] and not summary.issues
    with pytest.raises(DataError, match=r"no split 'test'. Known: 'train', 'val'"):
        import_data(splits, tmp_path / "j", split="test")


@pytest.mark.parametrize("test", ["test: ../test/images", "test: [images/val, images/test]", "test: test-dev2017.txt"])
def test_an_optional_split_without_pictures(splits, tmp_path, test):
    (splits / "data.yaml").write_text(COCO8.format(test=test))
    summary = import_data(splits, tmp_path / "i")
    assert [part.split for part in summary.splits] == ["train", "val"]
    for part in summary.splits:
        (issue,) = Index.open(part.path).issues()
        assert issue.what == "split has no pictures" and issue.action == "left out"
        assert issue.detail.startswith("test: ") and issue.detail.endswith(" does not exist")
    with pytest.raises(DataError, match=r"test.* of pictures does not exist. Correct the path"):
        import_data(splits, tmp_path / "j", split="test")


@pytest.mark.parametrize("text", ["train: images/no\nval: images/val\nnames: [a]", "test: images/no\nnames: [a]"])
def test_a_split_without_pictures_is_refused_where_it_is_needed(splits, tmp_path, text):
    (splits / "data.yaml").write_text(text)
    with pytest.raises(DataError, match=r"images/no' of pictures does not exist"):
        import_data(splits, tmp_path / "i")


def test_all_splits_of_a_description(splits, tmp_path):
    write(splits, "c", None, middle="test")
    (splits / "data.yaml").write_text("train:\n  - images/train\n  - images/val\ntest: images/test\nnames: [a]\n")
    assert [(found.split, found.by_name_only) for found in detect(splits)] == [("train", False), ("test", False)]
    assert [part.images for part in import_data(splits, tmp_path / "i").splits] == [2, 1]


@pytest.mark.parametrize("text", ["names: [a\n", "train: images/train\n", "names:\n  1: a\n"])
def test_a_description_that_is_none_is_named_with_a_remedy(splits, text):
    (splits / "data.yaml").write_text(text)
    with pytest.raises(DataError, match=r"data\.yaml: .*--format"):
        detect(splits)


def test_lists_of_pictures(splits, tmp_path):
    (splits / "train.txt").write_text("images/train/a.png\n\n./images/val/b.png\n")
    (splits / "val.txt").write_text(f"{splits / 'images' / 'val' / 'b.png'}\n")
    (splits / "data.yaml").write_text("train: train.txt\nval: val.txt\nnames: [cat]\n")
    summary = import_data(splits, tmp_path / "i")
    assert [(part.split, part.images, part.boxes) for part in summary.splits] == [("train", 2, 2), ("val", 1, 1)]
    assert list(Index.open(tmp_path / "i" / "train").names) == ["images/train/a.png", "images/val/b.png"]


def test_class_names_are_numbered_by_line(folder):
    names = folder / "classes.txt"
    names.write_text("cat\n dog \n\n  \n")
    assert describe(folder).names == {0: "cat", 1: "dog"}
    for text, line in (("cat\n\ndog\n", 2), ("\ncat\ndog", 1)):
        names.write_text(text)
        with pytest.raises(DataError, match=rf"classes\.txt: line {line} is blank, so the class number {line - 1} "):
            describe(folder)
    names.write_bytes(b"caf\xe9\n")
    with pytest.raises(DataError, match="UTF-8"):
        describe(folder)


def test_a_class_number_without_a_name_is_refused(folder, tmp_path):
    (folder / "labels" / "b.txt").write_text("0 .5 .5 1 1\n2 .5 .5 1 1\n")
    with pytest.raises(DataError, match=r"b\.txt: line 2 has the class 2, but there are 2 class names"):
        import_data(folder, tmp_path / "i")


@pytest.mark.parametrize(
    "text",
    [
        "names: [cat, 'a, b', \"d#\"]  # three\nnc: 3",
        "names:\n- cat\n- 'a, b'\n- \"d#\"\n",
        "# top\nnames:\n  0: cat # first\n  1: a, b\n  2: d#\n",
        "names: {0: cat, 1: 'a, b', 2: 'd#'}",
        "names: ['cat',\n   'a, b',\n 'd#']\n",
    ],
)
def test_forms_of_names(text):
    assert parse(text)["names"] == {0: "cat", 1: "a, b", 2: "d#"}


@pytest.mark.parametrize("text", ["names: [a, b", "what is this", "}{"])
def test_what_is_no_description(text):
    with pytest.raises(ValueError):
        parse(text)
