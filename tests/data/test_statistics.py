import numpy as np
import pytest

from gesso.data import statistics
from gesso.data.index import Index
from gesso.data.index_writer import IndexWriter
from gesso.data.records import CROWD, DIFFICULT, IGNORE, ImageBlock, ObjectBlock, Source, Strings
from gesso.data.select import subset
from gesso.data.statistics import image_classes, images_per_class

from .sample_index import SPACE, write_index


def shown(index, row):
    """The classes that an image shows, by boxes and by its own labels."""
    given = index.verified_columns
    found = set(index.objects(row).labels.tolist())
    if given is not None:
        for k in range(given.offsets[row], given.offsets[row + 1]):
            found |= {int(given.labels[k])} if given.states[k] == 1 else set()
    return found


def test_counts_are_those_of_a_slow_count(tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "_CELLS", 20)
    index = write_index(tmp_path, images=50)
    found = statistics.statistics(index)
    objects = [index.objects(i) for i in range(50)]
    numbers = [len(o.labels) for o in objects]
    flags = np.concatenate([o.flags for o in objects])
    areas = np.concatenate([o.areas for o in objects])
    assert (found.images, found.boxes, found.categories) == (50, sum(numbers), 4)
    assert found.labels == sum(index.verified_columns.states == 1) > 0
    assert found.maps == sum(index.semantic_path(i) is not None for i in range(50)) > 0
    bare = [i for i in range(50) if not shown(index, i) and index.semantic_path(i) is None]
    assert found.negatives == len(bare) > 0
    assert found.unused == ()
    assert found.boxes_per_image_mean == pytest.approx(sum(numbers) / 50)
    assert (found.boxes_per_image_median, found.boxes_per_image_max) == (np.median(numbers), max(numbers))
    for flag, value in ((CROWD, found.crowd), (IGNORE, found.ignore), (DIFFICULT, found.difficult)):
        assert value == sum(bool(f & flag) for f in flags.tolist()) > 0
    assert found.masks == sum(mask is not None for i in range(50) for mask in index.masks(i))
    assert (found.small, found.medium, found.large) == (
        sum(a < 1024 for a in areas),
        sum(1024 <= a < 9216 for a in areas),
        sum(a >= 9216 for a in areas),
    )
    assert found.widths == (min(index.widths), int(np.median(index.widths)), max(index.widths))
    for label, row in enumerate(found.classes):
        assert row.name == index.label_space.names[label]
        assert row.images == sum(label in shown(index, i) for i in range(50))
        assert row.boxes == sum((o.labels == label).sum() for o in objects)
        assert row.share == pytest.approx(row.boxes / sum(numbers))
    assert images_per_class(index).tolist() == [row.images for row in found.classes]


def test_boxes_of_unknown_size_are_neither_small_nor_large(tmp_path):
    writer = IndexWriter(tmp_path / "i", SPACE, sources=[Source(name="", root=str(tmp_path))])
    sizes, shares = np.array([0, 640, 0], np.int32), np.array([True, False, True])
    names = Strings.of(["a.jpg", "b.jpg", "c.jpg"])
    writer.add_images(ImageBlock(ids=np.arange(3), names=names, widths=sizes, heights=sizes, normalised=shares))
    xyxy = np.array([[0, 0, 0.5, 0.5], [0, 0, 9, 9], [0, 0, 200, 100], [0.1, 0.1, 0.9, 0.9]], np.float32)
    writer.add_objects(ObjectBlock(rows=np.array([0, 1, 1, 2]), xyxy=xyxy, labels=np.zeros(4, np.int64)))
    found = statistics.statistics(Index.open(writer.finish()))
    assert (found.boxes, found.small, found.medium, found.large, found.unsized) == (4, 1, 0, 1, 2)


def test_image_classes_lists_each_pair_once(tmp_path):
    index = write_index(tmp_path, pictures=False)
    slow = [(i, label) for i in range(24) for label in sorted(shown(index, i))]
    rows, labels = image_classes(index)
    assert list(zip(rows.tolist(), labels.tolist(), strict=True)) == slow


def test_no_images_and_no_boxes_are_counted_too(tmp_path):
    index = write_index(tmp_path, pictures=False, rich=False)
    empty = statistics.statistics(subset(index, tmp_path / "empty", []))
    assert (empty.images, empty.boxes, empty.boxes_per_image_mean, empty.widths) == (0, 0, 0.0, (0, 0, 0))
    negatives = statistics.statistics(subset(index, tmp_path / "negatives", [0, 6, 12]))
    assert (negatives.images, negatives.negatives, negatives.boxes) == (3, 3, 0)
    assert len(negatives.unused) == 4
