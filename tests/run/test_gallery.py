import numpy as np
from PIL import Image

from gesso.data.index import Index
from gesso.data.index_writer import IndexWriter
from gesso.data.records import CROWD, DIFFICULT, ImageBlock, ObjectBlock, Source, Strings
from gesso.evaluation.detections import DetectionTable
from gesso.label_space import LabelSpace
from gesso.run.gallery import exhibits

CAT, DOG = 0, 1


def index_of(folder, objects, pictures=1):
    """``objects``: (picture, label, xyxy, flags)."""
    folder.mkdir()
    for number in range(pictures):
        Image.new("RGB", (64, 48), (number, 90, 0)).save(folder / f"{number}.png")
    writer = IndexWriter(
        folder / "i", LabelSpace.from_names(["cat", "dog"]), sources=[Source(name="s", root=str(folder))]
    )
    writer.add_images(
        ImageBlock(
            ids=np.arange(pictures) + 10,
            names=Strings.of(f"{number}.png" for number in range(pictures)),
            widths=np.full(pictures, 64),
            heights=np.full(pictures, 48),
        )
    )
    rows, labels, boxes, flags = zip(*objects, strict=True)
    writer.add_objects(
        ObjectBlock(
            rows=np.array(rows),
            labels=np.array(labels),
            xyxy=np.array(boxes, np.float32),
            flags=np.array(flags, np.uint16),
        )
    )
    return Index.open(writer.finish())


def table(found):
    """``found``: (image id, label, score, xyxy)."""
    ids, labels, scores, boxes = zip(*found, strict=True)
    return DetectionTable(
        image_id=np.array(ids), label=np.array(labels), score=np.array(scores), xyxy=np.array(boxes, np.float64)
    )


def kinds(marks):
    return [(mark.label, mark.kind) for mark in marks]


def test_right_wrong_and_missed(tmp_path):
    index = index_of(
        tmp_path / "d", [(0, CAT, (2, 2, 20, 20), 0), (0, DOG, (30, 2, 50, 20), 0), (0, CAT, (2, 30, 20, 46), 0)]
    )
    found = table(
        [
            (10, CAT, 0.9, (2, 2, 20, 21)),
            (10, CAT, 0.8, (2, 2, 20, 20)),  # the object is taken
            (10, CAT, 0.7, (30, 2, 50, 20)),  # of the wrong class
            (10, DOG, 0.3, (30, 2, 50, 20)),  # below what is shown
            (10, CAT, 0.6, (2, 40, 20, 46)),  # overlaps too little
        ]
    )
    (exhibit,) = exhibits(index, [found], count=4, min_score=0.5)
    truth, marks = exhibit.marks
    assert kinds(truth) == [("cat", "truth"), ("dog", "truth"), ("cat", "truth")]
    assert kinds(marks) == [
        ("cat", "right"),
        ("cat", "wrong"),
        ("cat", "wrong"),
        ("cat", "wrong"),
        ("dog", "missed"),
        ("cat", "missed"),
    ]
    assert [mark.score for mark in marks[:4]] == [0.9, 0.8, 0.7, 0.6] and marks[4].score is None
    assert np.array_equal(exhibit.pixels, np.asarray(Image.open(tmp_path / "d" / "0.png")))


def test_what_is_ignored_is_neither_missed_nor_counted_against(tmp_path):
    index = index_of(
        tmp_path / "d",
        [(0, CAT, (0, 0, 60, 20), CROWD), (0, DOG, (2, 30, 20, 46), DIFFICULT), (0, CAT, (30, 25, 50, 45), 0)],
    )
    found = table(
        [
            (10, CAT, 0.9, (5, 5, 15, 15)),  # within the crowd
            (10, DOG, 0.8, (2, 30, 20, 46)),
            (10, CAT, 0.7, (30, 25, 50, 45)),
            (10, CAT, 0.6, (40, 15, 60, 40)),  # too little of it lies in the crowd
        ]
    )
    (exhibit,) = exhibits(index, [found], count=1, min_score=0.5)
    assert kinds(exhibit.marks[0]) == [("cat", "ignored"), ("dog", "ignored"), ("cat", "truth")]
    assert kinds(exhibit.marks[1]) == [("cat", "ignored"), ("dog", "ignored"), ("cat", "right"), ("cat", "wrong")]


def test_a_picture_that_broke_gives_its_place_to_the_next(tmp_path):
    objects = [(number, CAT, (2, 2, 20, 20), 0) for number in range(4)]
    index = index_of(tmp_path / "d", objects, pictures=5)
    found = table([(10, CAT, 0.9, (2, 2, 20, 20))])
    every = [one.caption for one in exhibits(index, [found], count=9, min_score=0.5)]
    assert sorted(every) == ["0.png", "1.png", "2.png", "3.png"], "a picture without objects is not shown"
    (tmp_path / "d" / every[0]).write_bytes(b"")
    Image.new("RGB", (9, 9)).save(tmp_path / "d" / every[1])
    assert [one.caption for one in exhibits(index, [found], count=1, min_score=0.5)] == [every[2]]
