import numpy as np
import pytest
from PIL import Image

from gesso.data.importing import import_data
from gesso.data.index import Index
from gesso.data.readers.detect import choose, detect
from gesso.data.readers.voc import read_voc
from gesso.data.records import DIFFICULT, OCCLUDED, TRUNCATED
from gesso.errors import DataError

XML = """<annotation><filename>{name}</filename><size><width>{width}</width><height>30</height></size>{objects}
</annotation>"""
OBJECT = (
    "<object><name>{name}</name><difficult>{difficult}</difficult>{more}<bndbox><xmin>{box[0]}</xmin>"
    "<ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"
)


def write(folder, stem, *objects, width=40, name=None, stored=None):
    """``name`` stands in the file, ``stored`` is the picture's; both STEM.jpg where they are not given."""
    picture = folder / "JPEGImages" / (f"{stem}.jpg" if stored is None else stored)
    annotation = folder / "Annotations" / f"{stem}.xml"
    for file in (picture, annotation):
        file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(OBJECT.format(name=n, box=b, difficult=d, more=m) for n, b, d, m in objects)
    annotation.write_text(XML.format(name=f"{stem}.jpg" if name is None else name, width=width, objects=text))
    if stored != "":
        Image.new("RGB", (40, 30)).save(picture, format="JPEG")


def lists(folder, **splits):
    (folder / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
    for name, text in splits.items():
        (folder / "ImageSets" / "Main" / f"{name}.txt").write_text(text)


def names(folder, **more):
    return list(read_voc(folder, **more).images.names)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "voc"
    write(folder, "a", ("dog", (1, 1, 40, 30), 0, "<truncated>1</truncated>"), ("cat", (5.5, 2, 9, 7), 1, ""))
    write(folder, "b", ("Dog", (3, 3, 3, 3), 0, "<part><name>head</name></part>"), ("cat", ("x", 1, 2, 3), 0, ""))
    write(folder, "c", width=99)
    return folder


def test_boxes_are_inclusive_pixels_from_one(folder, tmp_path):
    summary = import_data(folder, tmp_path / "i")
    index = Index.open(tmp_path / "i")
    assert summary.format == "voc" and index.label_space.names == ("cat", "dog")
    assert index.objects(0).xyxy.tolist() == [[0, 0, 40, 30], [4.5, 1, 9, 7]]
    assert index.objects(0).labels.tolist() == [1, 0]
    assert index.objects(1).xyxy.tolist() == [[2, 2, 3, 3]] and len(index.objects(2).labels) == 0
    assert index.flags.tolist() == [TRUNCATED, DIFFICULT, 0]
    assert index.known_flags.tolist() == [TRUNCATED | DIFFICULT, DIFFICULT, DIFFICULT]
    assert np.array_equal(index.widths, [40, 40, 40]) and index.image_path(0).is_file()
    assert summary.issues == {"box is not finite": 1, "picture has another size": 1}


def test_splits_come_from_image_sets(folder, tmp_path):
    lists(folder, train="a\nc\n", val="b\nz\n", trainval="a\nb\nc", cat_train="a 1\nc -1")
    assert [found.split for found in choose(detect(folder), None, folder)] == ["train", "val"]
    summary = import_data(folder, tmp_path / "i")
    assert [part.images for part in summary.splits] == [2, 1]
    assert [issue.image for issue in Index.open(tmp_path / "i" / "val").issues() if "missing" in issue.what] == ["z"]


def test_broken_xml_is_left_out_and_all_broken_refused(folder, tmp_path):
    (folder / "Annotations" / "b.xml").write_text("<annotation><object>")
    summary = import_data(folder, tmp_path / "i")
    assert summary.images == 2 and summary.issues["annotation file cannot be read"] == 1
    for file in (folder / "Annotations").iterdir():
        file.write_text("no xml")
    with pytest.raises(DataError, match="none of 3 annotation files could be read"):
        import_data(folder, tmp_path / "j")


def test_without_pictures(folder, tmp_path):
    import_data(folder, tmp_path / "i", images=False)
    assert Index.open(tmp_path / "i").widths.tolist() == [40, 40, 99]


def test_a_split_by_name(folder, tmp_path):
    lists(folder, train="a\nc\n", val="b\n", trainval="a\nb\nc\n", train_small="c\n")
    assert import_data(folder, tmp_path / "i", split="train_small").images == 1
    assert import_data(folder, tmp_path / "j", split="trainval").images == 3


def test_a_line_of_a_list_is_a_whole_name(folder):
    for stem in ("my cat", "scan 1", "scan", "d 0"):
        write(folder, stem)
    lists(folder, mine="my cat\n\n  scan 1\t\nscan 0\nd 0  -1\nmy dog\n", bytes="")
    (folder / "ImageSets" / "Main" / "bytes.txt").write_bytes(b"a\n\xff\n")
    found = read_voc(folder, split="mine")
    assert list(found.images.names) == ["my cat.jpg", "scan 1.jpg", "scan.jpg", "d 0.jpg"]
    assert [(issue.image, issue.what) for issue in found.issues] == [("my dog", "annotation file is missing")]
    assert [issue.image for issue in read_voc(folder, split="bytes").issues] == ["\udcff"]


def test_the_picture_with_the_name_of_the_annotation_file_comes_first(tmp_path):
    write(tmp_path, "a", name="a.jpg")
    write(tmp_path, "b", name="a.jpg")
    write(tmp_path, "c", name="a.jpg", stored="c.WebP")
    write(tmp_path, "d", name="other.jpg", stored="other.jpg")
    write(tmp_path, "e", name="", stored="e.JPEG")
    write(tmp_path, "f", name="f.txt", stored="f.tif")
    write(tmp_path, "g", name="", stored="")
    write(tmp_path, "h", name="far.png", stored="")
    assert names(tmp_path) == ["a.jpg", "b.jpg", "c.WebP", "other.jpg", "e.JPEG", "f.tif", "g.jpg", "far.png"]


def test_of_pictures_with_the_same_name_the_given_one_is_taken(tmp_path):
    for stored in ("a.bmp", "a.png", "a.jpg"):
        write(tmp_path, "a", name="a.png", stored=stored)
    assert names(tmp_path) == ["a.png"]
    write(tmp_path, "a", name="A.PNG")
    assert names(tmp_path) == ["a.bmp"]


def test_folders_of_annotations(tmp_path):
    write(tmp_path, "one/a", name="a.jpg")
    write(tmp_path, "two/a", name="a.jpg")
    write(tmp_path, "two/b", name="deep/b.jpg", stored="deep/b.jpg")
    write(tmp_path, "two/c", name="", stored="c.png")
    assert names(tmp_path) == ["one/a.jpg", "two/a.jpg", "deep/b.jpg", "c.png"]
    lists(tmp_path, val="two/a\n")
    assert names(tmp_path, split="val") == ["two/a.jpg"]


def test_occluded(folder, tmp_path):
    box = (1, 1, 9, 9)
    write(folder, "d", ("cat", box, 0, "<occluded>1</occluded>"), ("dog", box, 0, "<occluded>0</occluded>"))
    import_data(folder, tmp_path / "i")
    index = Index.open(tmp_path / "i")
    assert index.objects(3).flags.tolist() == [OCCLUDED, 0]
    assert index.known_flags[-2:].tolist() == [DIFFICULT | OCCLUDED] * 2


def test_semantic_maps_are_numbered_by_the_20_classes(folder, tmp_path):
    maps = folder / "SegmentationClass"
    maps.mkdir()
    Image.new("L", (40, 30), 12).save(maps / "b.png")
    import_data(folder, tmp_path / "i")
    index = Index.open(tmp_path / "i")
    assert [index.semantic_path(row) is None for row in range(3)] == [True, False, True]
    assert index.semantic_path(1).samefile(maps / "b.png")
    assert len(index.label_space) == 20 and index.label_space.names[12 - 1] == "dog"
    assert {index.label_space.names[label] for label in index.labels} == {"cat", "dog"}


def test_semantic_maps_of_other_classes_are_left_out(folder, tmp_path):
    write(folder, "d", ("raccoon", (1, 1, 9, 9), 0, ""))
    (folder / "SegmentationClass").mkdir()
    Image.new("L", (40, 30), 1).save(folder / "SegmentationClass" / "b.png")
    issues = import_data(folder, tmp_path / "i").issues
    assert issues.items() >= {("semantic maps are numbered by VOC's 20 classes", 1)}
    assert Index.open(tmp_path / "i").semantic is None


@pytest.mark.parametrize("width", [99999999999, 2**31, "1e400", "nan", "wide", "-4", ""])
def test_a_size_that_is_none_is_unknown(folder, width):
    write(folder, "a", width=width)
    assert read_voc(folder).images.widths.tolist() == [0, 40, 99]


def test_corners_beyond_any_number(folder, tmp_path):
    write(folder, "a", ("cat", ("1e300", 1, 2, 3), 0, ""))
    assert import_data(folder, tmp_path / "i").issues["box is not finite"] == 2


@pytest.mark.parametrize("text", ["<project/>", '<?xml version="1.0" encoding="no"?><annotation/>'])
def test_what_is_no_annotation_is_left_out(folder, text):
    (folder / "Annotations" / "a.xml").write_text(text)
    found = read_voc(folder)
    assert list(found.images.names) == ["b.jpg", "c.jpg"]
    assert [(issue.image, issue.what) for issue in found.issues] == [("a", "annotation file cannot be read")]
