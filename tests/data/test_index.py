import json
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest

from gesso.data.index import Index
from gesso.data.index_writer import IndexWriter
from gesso.data.records import (
    CROWD,
    ImageBlock,
    Issue,
    IssueBlock,
    Masks,
    ObjectBlock,
    Polygons,
    Rle,
    Source,
    Strings,
    Verified,
)
from gesso.errors import DataError, InputError
from gesso.label_space import LabelSpace

SPACE = LabelSpace.from_names(["cat", "dog", "owl"])
RING = np.array([[0, 0], [4, 0], [4, 4]], np.float32)


def images(count, **more):
    return ImageBlock(
        ids=np.arange(count) * 10 + 7,
        names=Strings.of(f"p/{k}é.jpg" for k in range(count)),
        widths=np.full(count, 40),
        heights=np.full(count, 30),
        **more,
    )


def objects(rows, seed=0, **more):
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, 10, (len(rows), 2))
    xyxy = np.concatenate([low, low + rng.uniform(1, 9, (len(rows), 2))], 1).astype(np.float32)
    labels = rng.integers(0, 3, len(rows))
    return ObjectBlock(rows=np.array(rows, np.int64), xyxy=xyxy, labels=labels, **more)


def write(path, *blocks, root=None, overwrite=False, first=None, labelled=None, issues=()):
    source = Source(name="s", root=str(root or path.parent), split="train", labelled=labelled)
    writer = IndexWriter(path, SPACE, sources=[source], overwrite=overwrite)
    writer.add_images(images(4) if first is None else first)
    for block in blocks:
        writer.add_objects(block)
    writer.add_issues(issues)
    return Index.open(writer.finish())


def test_objects_come_back_by_image_in_the_order_of_the_source(tmp_path):
    a, b = objects([2, 0, 2], annotation_ids=np.array([5, 6, 7])), objects([0, 3, 2], seed=1)
    index = write(tmp_path / "i", a, b)
    rows, xyxy = np.concatenate([a.rows, b.rows]), np.concatenate([a.xyxy, b.xyxy])
    labels = np.concatenate([a.labels, b.labels])
    assert len(index) == 4 and index.num_boxes == 6
    count = 0
    for i in range(4):
        found = index.objects(i)
        assert np.array_equal(found.xyxy, xyxy[rows == i]) and found.xyxy.dtype == np.float32
        assert np.array_equal(found.labels, labels[rows == i])
        assert found.box_ids.tolist() == list(range(count + 1, count + 1 + len(found.labels)))
        sides = found.xyxy[:, 2:] - found.xyxy[:, :2]
        assert np.allclose(found.areas, sides.prod(1))
        count += len(found.labels)
    assert index.annotation_ids.tolist() == [6, 0, 5, 7, 0, 0]
    assert [index.name(i) for i in range(4)] == list(index.names) == [f"p/{k}é.jpg" for k in range(4)]
    assert index.image_path(1) == tmp_path / "p" / "1é.jpg"
    assert index.label_space == SPACE
    index.verify()


def test_masks_flags_and_further_columns_follow_their_objects(tmp_path):
    masks = [Polygons((RING, RING + 1)), None, Rle((30, 40), b"abc")]
    a = objects(
        [3, 1, 0],
        masks=Masks.of(masks),
        flags=np.array([CROWD, 0, 0]),
        columns={"author": Strings.of(["x", "y", "z"]), "score": np.array([0.5, 1, 2], np.float32)},
    )
    index = write(tmp_path / "i", a, objects([0], seed=1))
    assert index.masks(0) == [masks[2], None] and index.masks(1) == [None] and index.masks(2) == []
    (found,) = index.masks(3)
    assert [ring.tolist() for ring in found.rings] == [RING.tolist(), (RING + 1).tolist()]
    assert index.flags.tolist() == [0, 0, 0, CROWD]
    assert list(index.object_columns["author"]) == ["z", "", "y", "x"]
    assert np.array_equal(index.object_columns["score"], np.array([2, np.nan, 1, 0.5], np.float32), equal_nan=True)


def test_verified_labels(tmp_path):
    verified = Verified(
        offsets=np.array([0, 0, 1, 2, 2]), labels=np.array([1, 0]), states=np.array([2, 1], dtype=np.int8)
    )
    rows = objects([0, 0, 1, 1, 1, 2])
    rows.labels[:] = [0, 2, 0, 1, 2, 2]

    def states(labelled):
        index = write(tmp_path / "i", rows, first=images(4, verified=verified), labelled=labelled, overwrite=True)
        return [None if (found := index.verified(i)) is None else found.tolist() for i in range(4)]

    # A box speaks against an absence. It verifies a class by itself only beside the word of the source alone.
    assert states(("cat",)) == [[1, 0, 1], [1, 1, 0], [1, 0, 0], [2, 0, 0]]
    assert states(()) == [[0, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert states(None) == [None, [1, 1, 1], [1, 2, 1], None]
    assert write(tmp_path / "j").verified(0) is None


def test_labels_of_large_label_spaces_are_not_cut_off(tmp_path):
    space = LabelSpace.from_names(f"class {k}" for k in range(2**15 + 3))
    rows = objects([0, 1])
    rows.labels[:] = [2**15 + 2, 7]
    writer = IndexWriter(tmp_path / "i", space, sources=[Source(name="s", root=str(tmp_path))])
    writer.add_images(images(2))
    writer.add_objects(rows)
    assert Index.open(writer.finish()).labels.tolist() == [2**15 + 2, 7]
    assert write(tmp_path / "j", objects([0])).labels.dtype == np.int16


def test_semantic_paths(tmp_path):
    index = write(tmp_path / "i", first=images(2, semantic=Strings.of(["", "m.png"])))
    assert index.semantic_path(0) is None and index.semantic_path(1) == tmp_path / "m.png"
    assert write(tmp_path / "j").semantic_path(0) is None


def test_report(tmp_path):
    block = IssueBlock(what="box is empty", action="dropped", rows=np.array([2]), annotation_ids=np.array([9]))
    index = write(tmp_path / "i", issues=[Issue("a", None, "w", "x", "d"), block])
    assert index.issues() == [Issue("a", None, "w", "x", "d"), Issue("p/2é.jpg", 9, "box is empty", "dropped")]


def test_an_index_without_images_or_boxes(tmp_path):
    index = write(tmp_path / "i", first=images(0))
    assert len(index) == 0 and index.boxes.shape == (0, 4)
    assert len(write(tmp_path / "j").objects(3).labels) == 0


def test_pickles_as_its_path(tmp_path):
    index = write(tmp_path / "i", objects([1] * 5000))
    index.objects(1)
    text = pickle.dumps(index)
    assert len(text) < 1000
    assert np.array_equal(pickle.loads(text).objects(1).xyxy, index.objects(1).xyxy)


def test_pictures_are_found_after_a_move_together_and_alone(tmp_path):
    (tmp_path / "a" / "pics").mkdir(parents=True)
    write(tmp_path / "a" / "i", root=tmp_path / "a" / "pics")
    shutil.move(tmp_path / "a" / "i", tmp_path / "alone")
    assert Index.open(tmp_path / "alone").image_path(0).parents[1] == tmp_path / "a" / "pics"
    shutil.move(tmp_path / "alone", tmp_path / "a" / "i")
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert Index.open(tmp_path / "b" / "i").image_path(0).parents[1] == tmp_path / "b" / "pics"


def test_nothing_is_overwritten_unasked(tmp_path):
    write(tmp_path / "i", objects([0]))
    with pytest.raises(DataError, match="stands here already"):
        write(tmp_path / "i")
    assert write(tmp_path / "i", overwrite=True).num_boxes == 0
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "x.jpg").write_bytes(b"1")
    for overwrite in (False, True):
        with pytest.raises(DataError, match="not empty"):
            write(tmp_path / "photos", overwrite=overwrite)
    (tmp_path / "empty").mkdir()
    assert len(write(tmp_path / "empty")) == 4
    assert {p.name for p in tmp_path.iterdir()} == {"i", "photos", "empty"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_nothing_half_written_is_left(tmp_path, monkeypatch, error):
    write(tmp_path / "i", objects([0]))

    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr("gesso.data.index_writer._Folder._write_report", fail)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else InputError, match=r"full|^$"):
        write(tmp_path / "i", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["i"]
    assert Index.open(tmp_path / "i").num_boxes == 1


def test_damage_is_named(tmp_path):
    index = write(tmp_path / "i", objects([0, 1]))
    column = index.path / "xyxy.npy"
    whole = column.read_bytes()
    column.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DataError, match=r"xyxy\.npy: a column's checksum differs"):
        Index.open(index.path).verify()
    column.write_bytes(whole[:-4])
    with pytest.raises(DataError, match=r"xyxy.npy.*has \d+ bytes instead of"):
        Index.open(index.path)
    column.unlink()
    with pytest.raises(DataError, match=r"xyxy.npy.*is missing"):
        Index.open(index.path)
    head = json.loads((index.path / "index.json").read_text())
    (index.path / "index.json").write_text(json.dumps(head | {"version": 99}))
    with pytest.raises(DataError, match="format version 99"):
        Index.open(index.path)


@pytest.mark.parametrize(
    "change", [{"version": None}, {"columns": None}, {"boxes": None}, {"columns": 3}, {"format": 1}]
)
def test_a_head_without_its_keys_is_refused(tmp_path, change):
    file = write(tmp_path / "i").path / "index.json"
    head = json.loads(file.read_text()) | change
    file.write_text(json.dumps({key: value for key, value in head.items() if value is not None}))
    with pytest.raises(DataError, match=r"index\.json: is not the head of an index"):
        Index.open(tmp_path / "i")


def test_what_is_no_index_is_told_apart(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        Index.open(tmp_path / "none")
    with pytest.raises(DataError, match=r"holds no index\.json"):
        Index.open(tmp_path)
    write(tmp_path / "set" / "train")
    with pytest.raises(DataError, match="holds the indexes train"):
        Index.open(tmp_path / "set")
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="is a file"):
        Index.open(tmp_path / "file")


def test_index_imports_little():
    code = "import sys, gesso.data.index; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "PIL", "cv2", "msgspec", "torchvision", "pyarrow"} & set(found)
