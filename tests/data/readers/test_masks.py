import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from gesso.data.index import Index
from gesso.data.known_spaces import known_space
from gesso.data.readers.masks import mask_splits
from gesso.data.semantic import read_semantic
from gesso.errors import DataError
from tests.command_line import picture

SIZE = (40, 30)
ADE = """Idx\tRatio\tTrain\tVal\tStuff\tName
1\t0.1576\t11664\t1172\t1\twall
2\t0.1072\t6046\t612\t1\tbuilding, edifice
3\t0.0878\t8265\t796\t1\tscreen, silver screen
4\t0.0480\t9336\t917\t0\tscreen;CRT screen
"""


def draw(path, *values, size=SIZE, palette=False):
    """A map with a block of each value."""
    pixels = np.zeros((size[1], size[0]), np.uint8)
    for i, value in enumerate(values):
        pixels[:, 3 * i : 3 * i + 3] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    opened = Image.fromarray(pixels)
    if palette:
        opened.putpalette(np.random.default_rng(0).integers(0, 256, 768).astype(np.uint8).tobytes())
    opened.save(path)
    return pixels


def pair(folder, name, *values, maps="masks", **more):
    picture(folder / "images" / f"{name}.jpg", SIZE, seed=len(name))
    return draw(folder / maps / f"{name}.png", *values, **more)


def voc(folder, train=("a", "b"), val=("c",), maps="SegmentationClass"):
    """Numbered maps with a palette, as VOC has them."""
    drawn = {}
    for number, name in enumerate((*train, *val)):
        picture(folder / "JPEGImages" / f"{name}.jpg", SIZE, seed=number)
        drawn[name] = draw(folder / maps / f"{name}.png", 1 + number, 20, 255, palette=True)
    (folder / "ImageSets" / "Segmentation").mkdir(parents=True, exist_ok=True)
    for split, names in {"train": train, "val": val, "trainval": (*train, *val)}.items():
        (folder / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")
    return drawn


def sbd(folder, train=("b", "d", "c"), val=("e",), pictures=True):
    drawn = {}
    (folder / "img").mkdir(parents=True)
    (folder / "cls").mkdir()
    for number, name in enumerate((*train, *val)):
        if pictures:
            picture(folder / "img" / f"{name}.jpg", SIZE, seed=number)
        pixels = np.zeros((SIZE[1], SIZE[0]), np.uint8)
        pixels[5:9, 3:] = 7 + number
        savemat(folder / "cls" / f"{name}.mat", {"GTcls": {"Segmentation": pixels, "CategoriesPresent": [7]}})
        drawn[name] = pixels
    for split, names in (("train", train), ("val", val)):
        (folder / f"{split}.txt").write_text("\n".join(names))
    return drawn


def maps_of(path):
    """The maps of an index by the stem of the picture."""
    index = Index.open(path)
    return {index.image_path(row).stem: read_semantic(index.semantic_path(row)) for row in range(len(index))}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, pixels in wanted.items():
        assert np.array_equal(found[name], pixels), name


@pytest.mark.parametrize("names", [None, "cat\ndog\nzebra\n", "Background\ncat\ndog\nzebra"])
def test_two_folders(gesso, tmp_path, names):
    drawn = {"a": pair(tmp_path / "s", "a", 1, 255), "deep/b": pair(tmp_path / "s", "deep/b", 2, 3, palette=True)}
    if names:
        (tmp_path / "s" / "classes.txt").write_text(names)
    made = gesso.json("data", "import", tmp_path / "s", "--out", tmp_path / "i")
    assert (made["format"], made["images"], made["boxes"], made["maps"]) == ("masks", 2, 0, 2)
    index = Index.open(tmp_path / "i")
    assert index.label_space.names == (("cat", "dog", "zebra") if names else ("class 1", "class 2", "class 3"))
    assert_same(maps_of(tmp_path / "i"), {"a": drawn["a"], "b": drawn["deep/b"]})
    assert gesso.json("data", "check", tmp_path / "i")["problems"] == 0
    assert gesso.json("data", "check", tmp_path / "s")["problems"] == 0
    counted = gesso.json("data", "stats", tmp_path / "i")
    assert (counted["maps"], counted["negatives"], counted["unused"]) == (2, 0, [])


def test_splits_and_the_names_of_ade20k(gesso, tmp_path):
    for split, values in (("training", (1, 2)), ("validation", (3, 0))):
        for name in ("a", "bb"):
            pair(tmp_path / "s", f"{split}/{name}", *values, maps="annotations")
    (tmp_path / "s" / "objectInfo150.txt").write_text(ADE)
    made = gesso.json("data", "import", tmp_path / "s", "--out", tmp_path / "i")
    assert [(part["split"], part["images"]) for part in made["splits"]] == [("training", 2), ("validation", 2)]
    names = ("wall", "building", "screen, silver screen", "screen;CRT screen")
    assert all(Index.open(part["path"]).label_space.names == names for part in made["splits"])
    found = gesso.json("data", "check", tmp_path / "i" / "validation")["findings"]
    assert [(note["what"], note["count"]) for note in found] == [("class in no semantic map", 3)]


def test_split_and_fraction_keep_the_maps(gesso, tmp_path):
    drawn = {f"{i:02}": pair(tmp_path / "s", f"{i:02}", 1 + i % 2) for i in range(12)}
    gesso("data", "import", tmp_path / "s", "--out", tmp_path / "i")
    gesso("data", "split", tmp_path / "i", "--out", tmp_path / "p", "--val", "0.25", "--no-near-duplicates")
    both = maps_of(tmp_path / "p" / "train") | maps_of(tmp_path / "p" / "val")
    assert_same(both, drawn)
    gesso("data", "select", tmp_path / "i", "--out", tmp_path / "q", "--fraction", "0.25")
    found = maps_of(tmp_path / "q")
    assert len(found) == 3 and all(np.array_equal(pixels, drawn[name]) for name, pixels in found.items())
    line = gesso.mistake("data", "select", tmp_path / "i", "--out", tmp_path / "r", "--without-classes", "class 1")
    assert "semantic maps number all classes" in line


def test_what_is_left_out_is_told(gesso, tmp_path):
    source = tmp_path / "s"
    for name in "abcdefg":
        pair(source, name, 1, 2)
    (source / "classes.txt").write_text("cat\ndog\n")
    draw(source / "masks" / "b.png", 1, 38)
    (source / "masks" / "c.png").write_bytes((source / "masks" / "a.png").read_bytes()[:60])
    draw(source / "masks" / "d.png", 1, size=(30, 40))
    Image.new("RGB", SIZE).save(source / "masks" / "e.png")
    (source / "masks" / "f.png").unlink()
    draw(source / "masks" / "z.png", 1)
    made = gesso.json("data", "import", source, "--out", tmp_path / "i")
    assert made["images"] == made["maps"] == 2 and maps_of(tmp_path / "i").keys() == {"a", "g"}
    assert made["issues"] == {
        "semantic map has an unknown value": 1,
        "semantic map cannot be read": 2,
        "semantic map has another size": 1,
        "picture without a semantic map": 1,
        "semantic map without a picture": 1,
    }
    report = gesso.json("data", "check", source, code=1)
    assert report["problems"] == 6
    details = {finding["what"]: finding["examples"][0][2] for finding in report["findings"]}
    assert f"{source}/masks/b.png: 38, but there are 2 classes" in details["semantic map has an unknown value"]


def test_check_finds_maps_that_were_changed_later(gesso, tmp_path):
    for name in "abc":
        pair(tmp_path / "s", name, 1, 2)
    gesso("data", "import", tmp_path / "s", "--out", tmp_path / "i")
    draw(tmp_path / "s" / "masks" / "a.png", 3)
    (tmp_path / "s" / "masks" / "b.png").unlink()
    report = gesso.json("data", "check", tmp_path / "i", code=1)
    assert {finding["what"] for finding in report["findings"] if finding["problem"]} == {
        "semantic map has an unknown value",
        "semantic map is missing",
    }
    assert "a.png: 3, but there are 2 classes" in gesso("data", "check", tmp_path / "i", code=1).out


@pytest.mark.parametrize(
    ("values", "names", "words"),
    [
        ((255,), None, "no semantic map shows a class"),
        ((255,), "cell", "no semantic map shows a class"),
        ((0,), None, "no semantic map shows a class"),
        ((7,), "cell", "no semantic map can be used; semantic map has an unknown value"),
        ((1,), "cell\ncell", "classes.txt: the category name 'cell' stands twice"),
        ((1,), " ", "classes.txt: names 0 classes"),
    ],
)
def test_maps_of_another_numbering(gesso, tmp_path, values, names, words):
    pair(tmp_path / "s", "a", *values)
    if names:
        (tmp_path / "s" / "classes.txt").write_text(names)
    assert words in gesso.mistake("data", "import", tmp_path / "s", "--out", tmp_path / "i")
    assert not (tmp_path / "i").exists()


def test_another_label_space_is_refused_unless_it_begins_alike(gesso, tmp_path):
    for name, words in (("s", "cat\ndog"), ("t", "dog\ncat"), ("u", "cat\ndog\nzebra")):
        pair(tmp_path / name, "a", 1, 2)
        (tmp_path / name / "classes.txt").write_text(words)
    for name in "tu":
        gesso("data", "import", tmp_path / name, "--out", tmp_path / f"{name}i")
    words = ("data", "import", tmp_path / "s", "--out", tmp_path / "i", "--classes-from")
    assert "numbered by other classes" in gesso.mistake(*words, tmp_path / "ti")
    assert gesso.json(*words, tmp_path / "ui")["categories"] == 3


def test_voc(gesso, tmp_path):
    drawn = voc(tmp_path / "VOC2012")
    made = gesso.json("data", "import", tmp_path / "VOC2012", "--out", tmp_path / "i")
    assert made["format"] == "masks" and [part["split"] for part in made["splits"]] == ["train", "val"]
    assert Index.open(tmp_path / "i" / "train").label_space == known_space("voc")
    assert_same(maps_of(tmp_path / "i" / "train"), {name: drawn[name] for name in "ab"})
    gesso("data", "import", tmp_path / "VOC2012", "--split", "trainval", "--out", tmp_path / "j")
    assert_same(maps_of(tmp_path / "j"), drawn)


def test_voc_with_boxes_too_is_asked_for_by_format(gesso, tmp_path):
    voc(tmp_path / "s")
    (tmp_path / "s" / "Annotations").mkdir()
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    text = f"<annotation><filename>a.jpg</filename><object><name>cat</name>{box}</object></annotation>"
    (tmp_path / "s" / "Annotations" / "a.xml").write_text(text)
    assert gesso.json("data", "import", tmp_path / "s", "--out", tmp_path / "i")["format"] == "voc"
    index = Index.open(tmp_path / "i")
    assert index.semantic_path(0) is not None and len(index.label_space) == 20
    words = ("--format", "masks", "--split", "val", "--out", tmp_path / "j")
    assert gesso.json("data", "import", tmp_path / "s", *words)["maps"] == 1


def test_lists_of_more_pictures(gesso, tmp_path):
    drawn = voc(tmp_path / "s")
    drawn["x"] = draw(tmp_path / "s" / "SegmentationClassAug" / "x.png", 5)
    picture(tmp_path / "s" / "JPEGImages" / "x.jpg", SIZE)
    lists = tmp_path / "s" / "ImageSets" / "Segmentation"
    (lists / "trainaug.txt").write_text("a\nx\n")
    (lists / "train_aug.txt").write_text("/JPEGImages/x.jpg /SegmentationClassAug/x.png\n")
    for split, names in (("trainaug", "ax"), ("train_aug", "x")):
        gesso("data", "import", tmp_path / "s", "--split", split, "--out", tmp_path / split)
        assert_same(maps_of(tmp_path / split), {name: drawn[name] for name in names})


def test_a_list_that_names_a_missing_picture(gesso, tmp_path):
    voc(tmp_path / "s")
    with (tmp_path / "s" / "ImageSets" / "Segmentation" / "val.txt").open("a") as file:
        file.write("gone\n")
    made = gesso.json("data", "import", tmp_path / "s", "--split", "val", "--out", tmp_path / "i")
    assert made["issues"] == {"picture is missing": 1} and made["images"] == 1


def test_sbd_is_drawn_beside_the_index(gesso, tmp_path):
    drawn = sbd(tmp_path / "s")
    made = gesso.json("data", "import", tmp_path / "s", "--out", tmp_path / "i")
    assert [(part["split"], part["maps"]) for part in made["splits"]] == [("train", 3), ("val", 1)]
    assert_same(maps_of(tmp_path / "i" / "train"), {name: drawn[name] for name in "bdc"})
    assert sorted(file.name for file in (tmp_path / "i" / "train.maps").iterdir()) == ["b.png", "c.png", "d.png"]
    assert gesso.json("data", "check", tmp_path / "i" / "train")["problems"] == 0
    assert gesso.json("data", "check", tmp_path / "s")["problems"] == 0
    gesso("data", "import", tmp_path / "s", "--out", tmp_path / "i", "--overwrite")
    gesso("data", "select", tmp_path / "i" / "train", "--images", "2", "--out", tmp_path / "j")
    assert all(np.array_equal(pixels, drawn[name]) for name, pixels in maps_of(tmp_path / "j").items())
    assert not [file for file in (tmp_path / "i").iterdir() if file.name.startswith(".")]


def test_drawn_maps_go_where_the_index_cannot_be_written(gesso, tmp_path, monkeypatch):
    sbd(tmp_path / "s")

    def fails(self):
        raise DataError("no room")

    monkeypatch.setattr("gesso.data.importing.IndexWriter.finish", fails)
    assert "no room" in gesso.mistake("data", "import", tmp_path / "s", "--out", tmp_path / "i")
    assert not [file for file in tmp_path.rglob("*") if file.suffix in (".png", ".maps")]


def test_what_stands_beside_the_index_is_not_overwritten(gesso, tmp_path):
    sbd(tmp_path / "s")
    words = ("data", "import", tmp_path / "s", "--split", "val", "--out", tmp_path / "i")
    gesso(*words)
    (tmp_path / "i.maps" / "notes.txt").write_text("mine")
    assert "i.maps: holds other things than semantic maps" in gesso.mistake(*words, "--overwrite")
    assert (tmp_path / "i.maps" / "notes.txt").is_file()


@pytest.mark.parametrize("places", [("VOC2012", "dataset"), ("VOCdevkit/VOC2012", "benchmark_RELEASE/dataset")])
def test_voc_and_sbd_together(gesso, tmp_path, places):
    """VOC train a, b; val c. SBD b, d, c, e: of b VOC's map is taken, c is in VOC's val."""
    of_voc = voc(tmp_path / "s" / places[0])
    of_sbd = sbd(tmp_path / "s" / places[1], pictures=False)
    for name in "de":
        picture(tmp_path / "s" / places[0] / "JPEGImages" / f"{name}.jpg", SIZE)
    made = gesso.json("data", "import", tmp_path / "s", "--out", tmp_path / "i")
    assert [(part["split"], part["maps"]) for part in made["splits"]] == [("train", 4), ("val", 1)]
    wanted = {name: of_voc[name] for name in "ab"} | {name: of_sbd[name] for name in "de"}
    assert_same(maps_of(tmp_path / "i" / "train"), wanted)
    assert_same(maps_of(tmp_path / "i" / "val"), {"c": of_voc["c"]})
    gesso("data", "import", tmp_path / "s", "--split", "train-voc", "--out", tmp_path / "j")
    assert_same(maps_of(tmp_path / "j"), {name: of_voc[name] for name in "ab"})


def test_a_broken_mat_of_sbd(gesso, tmp_path):
    sbd(tmp_path / "s")
    savemat(tmp_path / "s" / "cls" / "b.mat", {"GTcls": {"Boundaries": 1}})
    (tmp_path / "s" / "cls" / "c.mat").write_bytes(b"x" * 300)
    savemat(tmp_path / "s" / "cls" / "d.mat", {"GTcls": {"Segmentation": np.full((30, 40), 21, np.uint8)}})
    line = gesso.mistake("data", "import", tmp_path / "s", "--split", "train", "--out", tmp_path / "i")
    assert "no semantic map can be used" in line and "b.mat: GTcls.Segmentation is no map" in line
    assert [file.name for file in tmp_path.iterdir()] == ["s"]
    savemat(tmp_path / "s" / "cls" / "b.mat", {"GTcls": {"Segmentation": np.full((30, 40), 20, np.uint8)}})
    made = gesso.json("data", "import", tmp_path / "s", "--split", "train", "--out", tmp_path / "i")
    assert made["issues"] == {"semantic map cannot be read": 1, "semantic map has an unknown value": 1}
    assert maps_of(tmp_path / "i").keys() == {"b"}


def test_splits_of_what_is_no_set_of_masks(tmp_path):
    picture(tmp_path / "images" / "a.jpg")
    (tmp_path / "masks").mkdir()
    assert mask_splits(tmp_path) == [] == mask_splits(tmp_path / "none")
