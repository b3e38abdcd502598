import numpy as np
import pytest
from PIL import Image

from gesso.data.importing import import_data
from gesso.data.index import Index
from gesso.data.readers.detect import detect
from gesso.data.records import DIFFICULT, TRUNCATED
from gesso.errors import DataError

XML = """<annotation><filename>{name}</filename><size><width>{width}</width><height>30</height></size>{objects}
</annotation>"""
OBJECT = (
    "<object><name>{name}</name><difficult>{difficult}</difficult>{more}<bndbox><xmin>{box[0]}</xmin>"
    "<ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"
)


def write(folder, stem, *objects, width=40):
    for inner in ("Annotations", "JPEGImages"):
        (folder / inner).mkdir(parents=True, exist_ok=True)
    text = "".join(OBJECT.format(name=n, box=b, difficult=d, more=m) for n, b, d, m in objects)
    xml = XML.format(name=f"{stem}.jpg", width=width, objects=text)
    (folder / "Annotations" / f"{stem}.xml").write_text(xml)
    Image.new("RGB", (40, 30)).save(folder / "JPEGImages" / f"{stem}.jpg")


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
    lists = folder / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    for name, text in {"train": "a\nc\n", "val": "b\nz\n", "trainval": "a\nb\nc", "cat_train": "a 1\nc -1"}.items():
        (lists / f"{name}.txt").write_text(text)
    assert [found.split for found in detect(folder)] == ["train", "val"]
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
