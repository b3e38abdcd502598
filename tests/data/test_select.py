import shutil

import cv2
import numpy as np
import pytest

from gesso.data import index_writer
from gesso.data.index import Index
from gesso.data.index_writer import IndexWriter
from gesso.data.records import ImageBlock, ObjectBlock, Source, Strings
from gesso.data.select import split, subset
from gesso.errors import ConfigError, DataError, InputError
from gesso.label_space import LabelSpace

from .sample_index import picture, write_index


def same_mask(a, b):
    if a is None or b is None:
        return a is b
    if hasattr(a, "counts"):
        return a == b
    return len(a.rings) == len(b.rings) and all(np.array_equal(p, q) for p, q in zip(a.rings, b.rings, strict=True))


def assert_same_image(a: Index, i: int, b: Index, k: int):
    assert (a.name(i), a.image_ids[i], a.widths[i], a.heights[i]) == (
        b.name(k),
        b.image_ids[k],
        b.widths[k],
        b.heights[k],
    )
    assert a.image_path(i) == b.image_path(k)
    assert a.semantic_path(i) == b.semantic_path(k)
    for name in ("content_hashes", "orientations", "normalised"):
        assert getattr(a, name)[i] == getattr(b, name)[k], name
    for x, y in zip(a.objects(i)[:4], b.objects(k)[:4], strict=True):
        assert np.array_equal(x, y)
    at, to = slice(*a.offsets[i : i + 2].tolist()), slice(*b.offsets[k : k + 2].tolist())
    for name in ("annotation_ids", "known_flags"):
        assert np.array_equal(getattr(a, name)[at], getattr(b, name)[to])
    assert all(same_mask(p, q) for p, q in zip(a.masks(i), b.masks(k), strict=True))
    u, v = a.verified(i), b.verified(k)
    assert (u is None and v is None) or np.array_equal(u, v)
    assert a.image_columns.keys() == b.image_columns.keys() and a.object_columns.keys() == b.object_columns.keys()
    for name in a.image_columns:
        assert a.image_columns[name][i] == b.image_columns[name][k]
    for name in a.object_columns:
        assert list(a.object_columns[name][at]) == list(b.object_columns[name][to])


@pytest.mark.parametrize("rich", [True, False])
def test_subset_keeps_everything(tmp_path, monkeypatch, rich):
    monkeypatch.setattr("gesso.data.select._BLOCK", 4)
    index = write_index(tmp_path, rich=rich)
    rows = [7, 0, 3, 23, 12, 9, 2]
    part = subset(index, tmp_path / "part", rows)
    assert len(part) == 7 and part.label_space == index.label_space
    for k, i in enumerate(rows):
        assert_same_image(index, i, part, k)
    assert part.objects(1).box_ids.tolist() == []
    assert np.concatenate([part.objects(k).box_ids for k in range(7)]).tolist() == list(range(1, part.num_boxes + 1))
    assert [issue.image for issue in part.issues()] == (["sub/0003.png"] if rich else [])
    part.verify()


def test_subset_may_be_empty(tmp_path):
    part = subset(write_index(tmp_path, pictures=False), tmp_path / "part", [])
    assert (len(part), part.num_boxes) == (0, 0)


@pytest.mark.parametrize("rows", [[0, 24], [-1], [3, 3]])
def test_subset_refuses_wrong_rows(tmp_path, rows):
    with pytest.raises(InputError):
        subset(write_index(tmp_path, pictures=False), tmp_path / "part", rows)
    assert not (tmp_path / "part").exists()


def ids_of(made):
    return {part.name: set(Index.open(part.path).image_ids.tolist()) for part in made.parts}


def big(folder, images=600, seed=0):
    """Many images without pictures, with classes from common to rare."""
    ids = np.arange(1, images + 1)
    per_image = [np.random.default_rng([seed, int(i)]).random(8) < 0.6 / np.arange(1, 9) ** 1.5 for i in ids]
    pairs = np.argwhere(np.array(per_image))
    writer = IndexWriter(folder, LabelSpace.from_names("abcdefgh"), sources=[Source(name="", root=str(folder))])
    size = np.full(len(ids), 100, np.int32)
    writer.add_images(ImageBlock(ids=ids, names=Strings.of(f"{i}.jpg" for i in ids), widths=size, heights=size))
    boxes = np.tile(np.array([[1, 2, 30, 40]], np.float32), (len(pairs), 1))
    writer.add_objects(ObjectBlock(rows=pairs[:, 0], xyxy=boxes, labels=pairs[:, 1]))
    return Index.open(writer.finish())


def test_split_gives_every_image_to_one_part_and_balances_classes(tmp_path):
    index = big(tmp_path / "all")
    made = split(index, tmp_path / "out", {"train": 0.7, "val": 0.2, "test": 0.1}, near_duplicates=False)
    ids = ids_of(made)
    assert sum(map(len, ids.values())) == 600 and set.union(*ids.values()) == set(index.image_ids.tolist())
    assert made.left_out == made.duplicates == made.near_duplicates == 0
    counts = np.array([part.images_by_class for part in made.parts])
    due = counts.sum(0) * np.array([[0.7], [0.2], [0.1]])
    assert (np.abs(counts - due) <= np.maximum(0.1 * due + 1, 1)).mean() > 0.95
    assert [part.images for part in made.parts] == pytest.approx([420, 120, 60], rel=0.08)
    assert [part.boxes for part in made.parts] == [Index.open(part.path).num_boxes for part in made.parts]


def test_split_takes_numbers(tmp_path):
    made = split(big(tmp_path / "all"), tmp_path / "out", {"val": 57, "test": 30}, near_duplicates=False)
    assert {part.name: part.images for part in made.parts} == {"train": 513, "val": 57, "test": 30}
    few = split(big(tmp_path / "b"), tmp_path / "few", {"train": 100, "val": 50}, near_duplicates=False)
    assert ([part.images for part in few.parts], few.left_out) == ([100, 50], 450)


def test_split_depends_on_ids_and_seed_alone(tmp_path):
    index = big(tmp_path / "all")
    shuffled = subset(index, tmp_path / "shuffled", np.random.default_rng(0).permutation(600))
    first = ids_of(split(index, tmp_path / "a", near_duplicates=False))
    assert ids_of(split(shuffled, tmp_path / "b", near_duplicates=False)) == first
    assert ids_of(split(index, tmp_path / "c", seed=1, near_duplicates=False)) != first


def test_added_images_leave_the_others_where_they_were(tmp_path):
    old, new = big(tmp_path / "old", 600), big(tmp_path / "new", 700)
    options = {"near_duplicates": False, "parts": {"train": 0.8, "val": 0.2}}
    plain = [ids_of(split(i, tmp_path / f"plain{k}", balance=False, **options)) for k, i in enumerate((old, new))]
    assert all(plain[0][name] <= plain[1][name] for name in plain[0])
    before = ids_of(split(old, tmp_path / "before", **options))
    after = ids_of(split(new, tmp_path / "after", **options))
    assert sum(len(before[name] - after[name]) for name in before) <= 30
    kept = ids_of(split(new, tmp_path / "kept", keep=tmp_path / "before", **options))
    assert all(before[name] <= kept[name] for name in before)
    assert sum(map(len, kept.values())) == 700


def test_duplicates_and_near_duplicates_stay_together(tmp_path):
    """Twenty pictures, each with an exact and a recompressed copy far away in the order of ids."""
    root = tmp_path / "pictures"
    root.mkdir()
    hashes = np.zeros(60, np.uint64)
    for i in range(20):
        cv2.imwrite(str(root / f"{i}.jpg"), picture(i, 120, 160), [cv2.IMWRITE_JPEG_QUALITY, 95])
        shutil.copy(root / f"{i}.jpg", root / f"{i + 20}.jpg")
        cv2.imwrite(
            str(root / f"{i + 40}.jpg"), cv2.resize(picture(i, 120, 160), (100, 75)), [cv2.IMWRITE_JPEG_QUALITY, 60]
        )
        hashes[[i, i + 20]], hashes[i + 40] = 1 + i, 1000 + i
    writer = IndexWriter(tmp_path / "all", LabelSpace.from_names("a"), sources=[Source(name="", root=str(root))])
    size = np.full(60, 100, np.int32)
    names = Strings.of(f"{i}.jpg" for i in range(60))
    writer.add_images(ImageBlock(ids=np.arange(60), names=names, widths=size, heights=size, hashes=hashes))
    index = Index.open(writer.finish())
    made = split(index, tmp_path / "out", {"train": 0.5, "val": 0.5})
    assert (made.duplicates, made.near_duplicates, made.largest_group) == (20, 20, 3)
    for ids in ids_of(made).values():
        assert {i % 20 for i in ids} == {i for i in ids if i < 20} and len(ids) % 3 == 0
    alone = split(index, tmp_path / "exact", {"train": 0.5, "val": 0.5}, near_duplicates=False)
    assert alone.near_duplicates == 0
    for ids in ids_of(alone).values():
        assert {i for i in ids if i < 20} == {i - 20 for i in ids if 20 <= i < 40}


def copies(folder, groups, each=2):
    """Images without boxes or pictures: ``groups`` of ``each`` exact copies, next to one another."""
    count = groups * each
    writer = IndexWriter(folder, LabelSpace.from_names("a"), sources=[Source(name="", root=str(folder))])
    size, names = np.full(count, 100, np.int32), Strings.of(f"{i}.jpg" for i in range(count))
    hashes = np.repeat(np.arange(1, groups + 1), each).astype(np.uint64)
    writer.add_images(ImageBlock(ids=np.arange(count), names=names, widths=size, heights=size, hashes=hashes))
    return Index.open(writer.finish())


def test_an_image_stays_in_its_earlier_part_though_its_copy_is_in_another(tmp_path):
    index = copies(tmp_path / "all", 20)
    for name, rows in (("train", range(0, 30, 2)), ("val", range(1, 30, 2))):
        subset(index, tmp_path / "before" / name, list(rows))
    parts = {"train": 0.5, "val": 0.5}
    made = split(index, tmp_path / "out", parts, near_duplicates=False, keep=tmp_path / "before")
    ids = ids_of(made)
    assert set(range(0, 30, 2)) <= ids["train"] and set(range(1, 30, 2)) <= ids["val"]
    assert sum(map(len, ids.values())) == 40
    assert "15 images stay in their earlier part, though a duplicate of theirs is in another" in made.notes


def test_a_number_that_is_not_met_is_noted(tmp_path):
    index = copies(tmp_path / "all", 30)
    made = split(index, tmp_path / "out", {"val": 7, "test": 12}, near_duplicates=False)
    images = {part.name: part.images for part in made.parts}
    assert images["val"] in (6, 8) and images["test"] == 12
    assert made.notes == (f"val has {images['val']} images instead of 7: groups stay together",)
    kept = split(index, tmp_path / "kept", {"val": 2}, near_duplicates=False, keep=tmp_path / "out")
    assert kept.notes == (
        f"val has {images['val']} images instead of 2: images stay in their earlier part, and groups together",
    )


def test_an_empty_part_is_noted(tmp_path):
    one = copies(tmp_path / "all", 1, each=1)
    made = split(one, tmp_path / "out", {"train": 0.8, "val": 0.2}, near_duplicates=False)
    [empty] = [part.name for part in made.parts if not part.images]
    assert made.notes == (f"{empty} is empty: there are too few images, or groups stay together",)


def test_pictures_that_cannot_be_read_are_noted(tmp_path):
    made = split(write_index(tmp_path, pictures=False), tmp_path / "out")
    assert any("24 pictures" in note for note in made.notes) and any("no content hash" in note for note in made.notes)


def test_split_writes_all_parts_or_none(tmp_path, monkeypatch):
    index = big(tmp_path / "all")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("stays")
    finish, calls = IndexWriter.finish, []

    def fail_second(self):
        calls.append(self.path)
        if len(calls) == 2:
            raise DataError("the disk is full", where=self.path)
        return finish(self)

    monkeypatch.setattr(index_writer.IndexWriter, "finish", fail_second)
    with pytest.raises(DataError, match="full"):
        split(index, tmp_path / "out", near_duplicates=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_split_refuses_one_line_each(tmp_path):
    index = big(tmp_path / "all", 20)
    empty = subset(index, tmp_path / "empty", [])
    split(index, tmp_path / "there", near_duplicates=False)
    for error, call in (
        (DataError, lambda: split(empty, tmp_path / "x", near_duplicates=False)),
        (DataError, lambda: split(index, tmp_path / "there", near_duplicates=False)),
        (ConfigError, lambda: split(index, tmp_path / "x", {"val": 21}, near_duplicates=False)),
        (ConfigError, lambda: split(index, tmp_path / "x", distance=99)),
        (InputError, lambda: split(index, tmp_path / "x", keep=tmp_path / "nowhere", near_duplicates=False)),
    ):
        with pytest.raises(error) as raised:
            call()
        assert "\n" not in str(raised.value)
        assert not (tmp_path / "x").exists()
