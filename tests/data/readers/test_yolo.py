import pytest
from PIL import Image

from gesso.data.importing import import_data
from gesso.data.index import Index
from gesso.data.readers.yolo_names import parse
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
