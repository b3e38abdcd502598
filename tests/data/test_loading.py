"""Batches: picture, boxes and masks move together; nothing depends on workers, processes or a restart."""

import itertools
import logging
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from gesso.data.demo import DemoConfig, make_demo_classes
from gesso.data.index import Index
from gesso.data.index_writer import IndexWriter
from gesso.data.loading import TrainingBatches, inference_batches, picture_batches, training_batches
from gesso.data.records import (
    CROWD,
    DIFFICULT,
    GROUP_OF,
    ImageBlock,
    Masks,
    ObjectBlock,
    Polygons,
    Source,
    Strings,
    Verified,
)
from gesso.data.rle import encode
from gesso.data.samples import Broken, Built, ImageSlots, TargetSlots, TrainingBuilder
from gesso.data.sampling import BatchStream
from gesso.data.transforms import Direct, ImageNetCrop, InputConfig, KeepRatio
from gesso.errors import ConfigError, DataError, InputError, TrainingError
from gesso.label_space import LabelSpace
from gesso.structures import Detections

SIZES = [(96, 96), (96, 128), (128, 96), (60, 200), (110, 90), (96, 128), (77, 77), (96, 128), (128, 96), (50, 64)]
KEEP = InputConfig(resize=KeepRatio(short_sides=(64, 96), long_side=160))
DIRECT = InputConfig(resize=Direct(side=96))
SPACE = LabelSpace.from_names(["cat", "dog", "bird"])


def write_index(folder, sizes, boxes, labels=None, flags=None, masks=None, sources=None, widths=None):
    """Pictures that are black but for their boxes, which are white; ``boxes`` is a list of lists of xyxy."""
    folder.mkdir(exist_ok=True)
    for i, ((height, width), inner) in enumerate(zip(sizes, boxes, strict=True)):
        picture = np.zeros((height, width, 3), np.uint8)
        for x1, y1, x2, y2 in inner:
            picture[y1:y2, x1:x2] = 255
        Image.fromarray(picture).save(folder / f"{i}.png")
    count = sum(map(len, boxes))
    writer = IndexWriter(
        folder / "index", SPACE, sources=sources or [Source(name="a", root=str(folder))], overwrite=True
    )
    writer.add_images(
        ImageBlock(
            ids=np.arange(len(sizes)),
            names=Strings.of(f"{i}.png" for i in range(len(sizes))),
            widths=np.array([w for _, w in sizes] if widths is None else widths, np.int32),
            heights=np.array([h for h, _ in sizes] if widths is None else widths, np.int32),
        )
    )
    writer.add_objects(
        ObjectBlock(
            rows=np.repeat(np.arange(len(sizes)), [len(inner) for inner in boxes]),
            xyxy=np.array([b for inner in boxes for b in inner], np.float32).reshape(-1, 4),
            labels=np.zeros(count, np.int64) if labels is None else np.array(labels),
            flags=None if flags is None else np.array(flags, np.uint16),
            masks=None if masks is None else Masks.of(masks),
        )
    )
    return Index.open(writer.finish())


@pytest.fixture
def index(tmp_path):
    """One white box a picture, with a polygon or run-length mask, or none."""
    boxes = [[(w // 4, h // 3, w // 4 + 30, h // 3 + 25)] for h, w in SIZES]
    masks = []
    for i, ((height, width), [(x1, y1, x2, y2)]) in enumerate(zip(SIZES, boxes, strict=True)):
        full = np.zeros((height, width), np.uint8)
        full[y1:y2, x1 : (x1 + x2) // 2] = 1
        middle = (x1 + x2) / 2
        ring = np.array([(x1, y1), (middle, y1), (middle, y2), (x1, y2)], np.float32)
        masks.append([Polygons((ring,)), encode(full), None][i % 3])
    return write_index(tmp_path / "data", SIZES, boxes, labels=[i % 3 for i in range(len(SIZES))], masks=masks)


def take(batches, count):
    found = list(itertools.islice(batches, count))
    batches.close()
    return found


def equal(a, b):
    return all(
        (getattr(x, name) is None and getattr(y, name) is None) or torch.equal(getattr(x, name), getattr(y, name))
        for x, y in zip(a, b, strict=True)
        for name in vars(x)
    )


@pytest.mark.parametrize("options", [KEEP, DIRECT, InputConfig(resize=Direct(side=96, mode="square"))])
def test_picture_boxes_and_masks_move_together(index, options):
    flipped = set()
    for batch, targets in take(training_batches(index, options, seed=1, batch_size=4, max_boxes=5, mask_side=14), 20):
        assert batch.images.shape[:2] == (4, 3) and batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert targets.boxes.shape == (4, 5, 4) and targets.masks.shape == (4, 5, 14, 14)
        for i in range(4):
            row = int(batch.image_index[i])
            height, width = batch.sizes[i].tolist()
            picture = batch.images[i].float().mean(0)
            assert not picture[height:].any() and not picture[:, width:].any()
            assert tuple(batch.original_sizes[i].tolist()) == SIZES[row]
            white = (picture > 127).nonzero()
            if not targets.valid[i].any():
                assert len(white) <= 2 * (height + width) and options is not KEEP
                continue
            assert targets.valid[i].tolist() == [True, False, False, False, False]
            y1, x1 = white.min(0).values.tolist()
            y2, x2 = (white.max(0).values + 1).tolist()
            assert np.abs(targets.boxes[i, 0].numpy() - [x1, y1, x2, y2]).max() <= 1.01
            assert targets.labels[i, 0] == row % 3 and targets.box_id[i, 0] == row + 1
            if row % 3 == 2:
                assert not targets.masks[i, 0].any() and not targets.mask_frames[i, 0].any()
                continue
            assert torch.equal(targets.mask_frames[i, 0], targets.boxes[i, 0])
            if options is KEEP:  # the mask is the left half of the box, or the right half where mirrored
                left, right = targets.masks[i, 0, :, :6].float().mean(), targets.masks[i, 0, :, 8:].float().mean()
                assert {float(left), float(right)} == {0.0, 1.0}
                flipped.add(float(left))
    assert options is not KEEP or flipped == {0.0, 1.0}


def test_objects_that_the_crop_loses_are_dropped(tmp_path):
    """Sixteen white objects: those that are left, clipped, cover all the white that the crop shows, and no more."""
    boxes = [[(x, y, x + 8, y + 8) for y in range(4, 64, 16) for x in range(4, 64, 16)]]
    small = write_index(tmp_path / "d", [(64, 64)], boxes)
    options = InputConfig(resize=Direct(side=64, low=2.0, high=2.0), flip=0.5)
    numbers = set()
    for batch, targets in take(training_batches(small, options, seed=1, batch_size=4, max_boxes=16), 10):
        for picture, found, valid, ids in zip(batch.images, targets.boxes, targets.valid, targets.box_id, strict=True):
            covered = torch.zeros(64, 64)
            for x1, y1, x2, y2 in found[valid].tolist():
                assert 0 <= x1 < x2 <= 64 and 0 <= y1 < y2 <= 64
                covered[int(y1) : int(y2), int(x1) : int(x2)] = 1
            assert torch.equal(picture[0] > 127, covered.bool())
            assert not found[~valid].any() and not ids[~valid].any()
            assert ids[valid].tolist() == sorted(set(ids[valid].tolist()))
            numbers.add(int(valid.sum()))
    assert min(numbers) == 4 and max(numbers) <= 9


@pytest.mark.parametrize("options", [KEEP, DIRECT])
def test_workers_change_nothing(index, options):
    runs = [
        take(training_batches(index, options, seed=7, batch_size=4, workers=workers, mask_side=7), 9)
        for workers in (0, 1, 3)
    ]
    assert all(equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_a_restart_goes_on_where_it_was(index):
    batches = training_batches(index, KEEP, seed=7, batch_size=4)
    whole = list(itertools.islice(batches, 5))
    assert batches.sample == 20
    whole += list(itertools.islice(batches, 4))
    rest = take(training_batches(index, KEEP, seed=7, batch_size=4, first_sample=20, workers=2), 4)
    assert all(equal(a, b) for a, b in zip(whole[5:], rest, strict=True))
    other = take(training_batches(index, KEEP, seed=8, batch_size=4), 9)
    assert not all(equal(a, b) for a, b in zip(whole, other, strict=True))


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_batches_of_one(index, world):
    alone = take(training_batches(index, KEEP, seed=3, batch_size=8), 6)
    ranks = [
        take(training_batches(index, KEEP, seed=3, batch_size=8, rank=rank, world=world), 6) for rank in range(world)
    ]
    for step, (batch, targets) in enumerate(alone):
        for name in vars(batch):
            parts = torch.cat([getattr(rank[step][0], name) for rank in ranks])
            assert torch.equal(parts, getattr(batch, name)), name
        assert torch.equal(torch.cat([rank[step][1].boxes for rank in ranks]), targets.boxes)


def test_no_global_generator_is_touched(index):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    take(training_batches(index, DIRECT, seed=1, batch_size=2, workers=1), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_labels_are_joined_by_name(index):
    run = LabelSpace.from_names(["bird", "fish", "cat"])
    label_map = index.label_space.map_to(run)
    for batch, targets in take(training_batches(index, KEEP, seed=1, batch_size=4, label_map=label_map), 8):
        for row, valid, label in zip(
            batch.image_index.tolist(), targets.valid[:, 0].tolist(), targets.labels[:, 0].tolist(), strict=True
        ):
            assert (valid, label) == {0: (True, 2), 1: (False, 0), 2: (True, 0)}[row % 3]


def test_flags_become_ignore_and_go_first_where_there_are_too_many(tmp_path):
    boxes = [[(4 * i, 4 * i, 4 * i + 20, 4 * i + 20) for i in range(8)]]
    flags = [0, CROWD, 0, DIFFICULT, 0, GROUP_OF, 0, 0]
    small = write_index(tmp_path / "d", [(96, 96)], boxes, flags=flags)
    options = InputConfig(resize=KeepRatio(short_sides=(96,), long_side=96), flip=0.0)
    _, targets = take(training_batches(small, options, seed=1, batch_size=1), 1)[0]
    assert targets.ignore[0, :9].tolist() == [False, True, False, True] + 5 * [False]
    assert targets.valid[0].sum() == 8
    batches = training_batches(small, options, seed=1, batch_size=1, max_boxes=7)
    _, targets = next(batches)
    assert targets.ignore[0].sum() == 1 and targets.valid.all()  # of equal size: the last one goes
    assert targets.box_id[0].tolist() == [1, 2, 3, 5, 6, 7, 8]
    assert (batches.surplus, batches.left_out) == (1, 1)


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_the_largest_objects_stay_where_there_are_too_many(tmp_path, flip):
    """Large on the canvas, that is: of the last box most lies outside the picture."""
    sides = [10, 30, 12, 25, 12, 40, 20, 96]
    boxes = [[(4, 4, 4 + side, 4 + side) for side in sides[:-1]] + [(90, 90, 186, 186)]]
    flags = [0, 0, 0, 0, 0, CROWD, 0, 0]
    small = write_index(tmp_path / "d", [(96, 96)], boxes, flags=flags)
    options = InputConfig(resize=KeepRatio(short_sides=(96,), long_side=96), flip=flip)
    for count, ids in ((7, [1, 2, 3, 4, 5, 7, 8]), (4, [2, 3, 4, 7]), (5, [2, 3, 4, 5, 7]), (1, [2])):
        batches = training_batches(small, options, seed=1, batch_size=2, max_boxes=count)
        _, targets = take(batches, 1)[0]
        assert targets.box_id.tolist() == [ids, ids] and targets.valid.all() and not targets.ignore.any()
        assert (batches.surplus, batches.left_out) == (2, 2 * (8 - count))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_log_counts_what_is_left_out(tmp_path, caplog, monkeypatch, workers):
    monkeypatch.setattr(logging.getLogger("gesso"), "propagate", True)
    options = InputConfig(resize=Direct(side=64, low=1.0, high=1.0))
    boxes = [[(5, 5, 20 + i, 40) for i in range(5)], [(5, 5, 20, 40)]]
    small = write_index(tmp_path / "d", [(64, 64)] * 2, boxes)
    batches = training_batches(small, options, seed=2, batch_size=2, max_boxes=3, workers=workers)
    assert len(take(batches, 120)) == 120
    assert (batches.surplus, batches.left_out) == (120, 240)
    said = [r.getMessage() for r in caplog.records]
    assert [line.split(" of the pictures drawn")[0] for line in said] == [
        f"{2 * count} objects left out so far, in {count}" for count in (1, 10, 100)
    ]
    assert all("data.max_boxes = 3" in line for line in said)
    caplog.clear()
    take(training_batches(small, options, seed=2, batch_size=2, max_boxes=5, workers=workers), 3)
    assert not caplog.records


def test_image_level_labels_reach_the_targets(tmp_path):
    sources = [Source(name="a", root=str(tmp_path / "d"), labelled=("cat", "bird"))]
    partly = write_index(tmp_path / "d", [(64, 64)], [[(5, 5, 40, 40)]], labels=[2], sources=sources)
    run = LabelSpace.from_names(["bird", "fish", "dog", "cat"])
    options = InputConfig(resize=KeepRatio(short_sides=(64,), long_side=64))
    label_map = partly.label_space.map_to(run)
    _, targets = take(training_batches(partly, options, seed=0, batch_size=2, label_map=label_map), 1)[0]
    assert targets.verified.tolist() == [[1, 0, 0, 2]] * 2


def test_a_broken_picture_is_replaced_by_the_next_counted_and_named_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("gesso"), "propagate", True)
    options = InputConfig(resize=Direct(side=64))
    whole = write_index(tmp_path / "d", [(64, 64)] * 200, [[(5, 5, 40, 40)]] * 200)
    rows = [b.image_index.tolist() for b, _ in take(training_batches(whole, options, seed=2, batch_size=4), 120)]
    order = [row for batch in rows for row in batch]
    bad = order[9]
    (tmp_path / "d" / f"{bad}.png").write_bytes(b"")
    for workers in (0, 2):
        caplog.clear()
        batches = training_batches(whole, options, seed=2, batch_size=4, workers=workers)
        found = [row for b, _ in itertools.islice(batches, 119) for row in b.image_index.tolist()]
        expected = [order[i + 1] if row == bad else row for i, row in enumerate(order[:-4])]
        assert found == expected
        assert batches.replaced == order[:-4].count(bad) > 1
        assert [r.getMessage().count(f"{bad}.png") for r in caplog.records] == [1]
        batches.close()


def test_too_many_broken_pictures_stop_the_run(tmp_path):
    options = InputConfig(resize=Direct(side=64))
    whole = write_index(tmp_path / "d", [(64, 64)] * 30, [[(5, 5, 40, 40)]] * 30)
    (tmp_path / "d" / "3.png").write_text("no picture")
    with pytest.raises(TrainingError, match=r"could not be read.*gesso data check") as caught:
        take(training_batches(whole, options, seed=2, batch_size=4), 200)
    assert "3.png" in str(caught.value) and "\n" not in str(caught.value)
    for i in range(30):
        (tmp_path / "d" / f"{i}.png").unlink()
    for workers in (0, 1):
        with pytest.raises(TrainingError, match="cannot be read: No such file"):
            next(training_batches(whole, options, seed=2, batch_size=4, workers=workers))


def draw_broken(broken, count):
    """Draws batches of 100 of which the numbers ``broken`` (by batch, else one) could not be read."""

    class Reported(torch.utils.data.Dataset):
        def __getitem__(self, plan):
            images, targets = ImageSlots(1, (1, 1)).tensors(), TargetSlots(1, 1, 0, None).tensors()
            lost = [Broken(0, DataError("the picture is empty"))] * broken.get(plan.number, 1)
            return Built(images=images, targets=targets, broken=lost)

    take(TrainingBatches(Reported(), BatchStream(np.zeros(9), seed=0, batch_size=100), workers=0), count)


def test_one_broken_picture_in_a_hundred_and_three_to_spare_are_borne():
    draw_broken({0: 4}, 100)
    with pytest.raises(TrainingError, match="104 pictures could not be read in drawing the last 10000"):
        draw_broken({99: 5}, 100)


def test_broken_pictures_count_for_ten_thousand_samples():
    draw_broken({0: 4, 100: 4}, 101)
    draw_broken(dict.fromkeys(range(98), 0) | {98: 50, 99: 50}, 100)
    with pytest.raises(TrainingError, match="104 pictures could not be read in drawing the last 10000"):
        draw_broken({0: 4, 99: 2}, 100)


def test_another_size_than_in_the_index_is_a_broken_picture(index, tmp_path):
    Image.new("RGB", (33, 44)).save(tmp_path / "data" / "0.png")
    batches = inference_batches(index, DIRECT, batch_size=4)
    assert 0 not in {row for batch in batches for row in batch.image_index.tolist()}
    [(row, error)] = batches.broken
    assert row == 0 and "33 x 44, expected 96 x 96" in str(error)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("options", [KEEP, DIRECT])
def test_inference_sees_every_picture_once(index, options, workers):
    batches = inference_batches(index, options, batch_size=4, workers=workers)
    length, rows, shapes = len(batches), [], []
    for batch in batches:
        assert len(batch.images) == 4
        empty = batch.image_index < 0
        assert not batch.images[empty].any()
        assert not (empty[:-1] & ~empty[1:]).any()
        rows.append(batch.image_index[~empty].tolist())
        shapes.append(tuple(batch.images.shape[2:]))
    assert len(rows) == length and len(batches) == 0
    assert sorted(itertools.chain(*rows)) == list(range(len(SIZES)))
    for shape in set(shapes):
        inside = [row for part, its in zip(rows, shapes, strict=True) for row in part if its == shape]
        assert inside == sorted(inside)
    assert len(set(shapes)) <= 5
    assert [shape for shape, _ in itertools.groupby(shapes)] == list(dict.fromkeys(shapes))


def test_inference_is_shared_by_processes(index):
    rows = [
        [r for b in inference_batches(index, DIRECT, batch_size=2, rank=k, world=3) for r in b.image_index.tolist()]
        for k in range(3)
    ]
    assert [sorted(set(part) - {-1}) for part in rows] == [list(range(k, len(SIZES), 3)) for k in range(3)]


def test_boxes_of_inference_go_back_to_the_original(index):
    for batch in inference_batches(index, KEEP, batch_size=3):
        for i, row in enumerate(batch.image_index.tolist()):
            if row < 0:
                continue
            scale = batch.scale[i].flip(0).repeat(2)
            there = torch.from_numpy(index.objects(row).xyxy.copy()) * scale
            detections = Detections(
                boxes=there.expand(3, 1, 4),
                scores=torch.ones(3, 1),
                labels=torch.zeros(3, 1).long(),
                valid=torch.ones(3, 1).bool(),
            )
            back = detections.to_original(batch).boxes[i]
            torch.testing.assert_close(back, torch.from_numpy(index.objects(row).xyxy.copy()))


def test_pictures_of_any_size(tmp_path):
    arrays = [np.full((h, w, 3), 10 + i, np.uint8) for i, (h, w) in enumerate([(50, 50), (480, 640), (1, 900), (7, 7)])]
    Image.new("RGB", (31, 17), (200, 0, 0)).save(tmp_path / "a.png")
    (tmp_path / "b.jpg").write_text("text")
    given = [*arrays, tmp_path / "a.png", tmp_path / "b.jpg", tmp_path / "none.jpg"]
    batches = picture_batches(given, KEEP, batch_size=2)
    seen = {}
    for batch in batches:
        assert len(batch.images) == 2
        for i, place in enumerate(batch.image_index.tolist()):
            if place >= 0:
                seen[place] = batch.original_sizes[i].tolist()
                assert batch.images[i, :, 0, 0].tolist() == ([200, 0, 0] if place == 4 else [10 + place] * 3)
    assert seen == {0: [50, 50], 1: [480, 640], 2: [1, 900], 3: [7, 7], 4: [17, 31]}
    assert [row for row, _ in batches.broken] == [5, 6]
    with pytest.raises(InputError, match="uint8"):
        next(picture_batches([np.zeros((5, 5), np.uint8)], KEEP, batch_size=1))


def photographs(folder):
    """Two JPEG files of 900 x 1203 pixels, the second turned by EXIF, with a bright box each, and an index of them."""
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(2):
        picture = np.full((900, 1203, 3), 60, np.uint8)
        picture[300:600, 400:800] = (220, 180, 140)
        stored = Image.fromarray(np.rot90(picture) if i else picture)
        stored.save(folder / f"{i}.jpg", quality=95, **({"exif": exif} if i else {}))
    writer = IndexWriter(folder / "index", SPACE, sources=[Source(name="a", root=str(folder))])
    names = Strings.of(f"{i}.jpg" for i in range(2))
    widths, heights = np.full(2, 1203, np.int32), np.full(2, 900, np.int32)
    writer.add_images(ImageBlock(ids=np.arange(2), names=names, widths=widths, heights=heights))
    boxes = np.array([[400, 300, 800, 600]] * 2, np.float32)
    writer.add_objects(ObjectBlock(rows=np.arange(2), xyxy=boxes, labels=np.zeros(2, np.int64)))
    return Index.open(writer.finish())


@pytest.mark.parametrize("options", [KEEP, DIRECT, InputConfig(resize=ImageNetCrop(side=96))])
def test_large_photographs_come_reduced_and_right(tmp_path, monkeypatch, options):
    """Boxes lie where they do after full decoding, in training, evaluation and prediction, and pixels all but do."""
    index = photographs(tmp_path / "d")
    paths = [index.image_path(i) for i in range(2)]

    def all_batches():
        pairs = take(training_batches(index, options, seed=1, batch_size=2), 8)
        inference = [*inference_batches(index, options, batch_size=2), *picture_batches(paths, options, batch_size=2)]
        return pairs, inference

    pairs, inference = all_batches()
    assert torch.equal(inference[0].images, inference[1].images)
    monkeypatch.setattr("gesso.data.decode.reduction", lambda placement: 1)
    monkeypatch.setattr("gesso.data.loading.reduction", lambda placement: 1)
    whole_pairs, whole_inference = all_batches()
    changed = 0
    found, expected = ([b for b, _ in p] + i for p, i in ((pairs, inference), (whole_pairs, whole_inference)))
    for batch, whole in zip(found, expected, strict=True):
        difference = (batch.images.int() - whole.images.int()).abs()
        assert difference.float().mean() < 0.5 and difference.max() < 80  # half the step at an edge
        assert all(torch.equal(getattr(batch, n), getattr(whole, n)) for n in vars(batch) if n != "images")
        changed += int(difference.max()) > 0
    assert changed >= 2
    for (_, targets), (_, whole_targets) in zip(pairs, whole_pairs, strict=True):
        assert torch.equal(targets.boxes, whole_targets.boxes)


@pytest.mark.parametrize("resize", [Direct(side=64), KeepRatio(short_sides=(64,), long_side=96), ImageNetCrop(side=64)])
def test_a_data_set_of_classes_needs_no_box(tmp_path, resize):
    """As folders of classes are stored: a label a picture, verified, and nothing else."""
    make_demo_classes(tmp_path / "c", DemoConfig(images=2, side=96), side=48)
    paths = sorted((tmp_path / "c").rglob("*.png"))
    names = sorted({path.parent.name for path in paths})
    labels = np.array([names.index(path.parent.name) for path in paths])
    source = Source(name="c", root=str(tmp_path / "c"), labelled=tuple(names))
    writer = IndexWriter(tmp_path / "index", LabelSpace.from_names(names), sources=[source])
    count = len(paths)
    sides = np.full(count, 48, np.int32)
    verified = Verified(offsets=np.arange(count + 1), labels=labels, states=np.ones(count, np.int8))
    files = Strings.of(str(path.relative_to(tmp_path / "c")) for path in paths)
    writer.add_images(ImageBlock(ids=np.arange(count), names=files, widths=sides, heights=sides, verified=verified))
    index = Index.open(writer.finish())
    options = InputConfig(resize=resize)
    rows = set()
    for workers in (0, 1):
        batches = training_batches(index, options, seed=1, batch_size=4, max_boxes=3, mask_side=7, workers=workers)
        for batch, targets in take(batches, 8):
            assert targets.boxes.shape == (4, 3, 4) and targets.masks.shape == (4, 3, 7, 7)
            assert not targets.boxes.any() and not targets.valid.any() and not targets.ignore.any()
            expected = torch.full((4, len(names)), 2).scatter(
                1, torch.from_numpy(labels)[batch.image_index][:, None], 1
            )
            assert torch.equal(targets.verified.long(), expected)
            assert batch.images.flatten(1).any(1).all()
            rows |= set(batch.image_index.tolist())
    assert len(rows) > 3
    seen = [row for batch in inference_batches(index, options, batch_size=4) for row in batch.image_index.tolist()]
    assert sorted(row for row in seen if row >= 0) == list(range(count))


def test_unknown_sizes_and_bad_numbers_are_refused(tmp_path, index):
    unknown = write_index(tmp_path / "u", [(64, 64)] * 3, [[]] * 3, widths=[0, 64, 64])
    with pytest.raises(DataError, match=r"sizes of 1 pictures are unknown, the first is '0\.png'"):
        training_batches(unknown, DIRECT, seed=0, batch_size=1)
    for bad in ({"max_boxes": 0}, {"mask_side": -1}, {"workers": -1}, {"batch_size": 0}):
        with pytest.raises(ConfigError):
            training_batches(index, DIRECT, **{"seed": 0, "batch_size": 2, **bad})
    with pytest.raises(ConfigError):
        inference_batches(index, DIRECT, batch_size=0)


def test_workers_get_the_index_as_its_path(index):
    builder = TrainingBuilder(index, KEEP, max_boxes=5, mask_side=0, label_map=None)
    assert len(pickle.dumps(builder)) < 4000


SCRIPT = """
import sys
from gesso.data.index import Index
from gesso.data.loading import training_batches
from gesso.data.transforms import Direct, InputConfig
index = Index.open(sys.argv[1])
batches = training_batches(index, InputConfig(resize=Direct(side=96)), seed=0, batch_size=4, workers=2)
next(batches)
print("ready", flush=True)
try:
    for batch in batches:
        pass
except KeyboardInterrupt:
    batches.close()
    print("closed", flush=True)
"""


def test_ctrl_c_ends_the_workers_without_a_trace(index):
    command = [sys.executable, "-c", SCRIPT, str(index.path)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.3)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert out == "closed\n" and err == "" and process.returncode == 0
