"""Semantic maps lie on the canvas as their pictures do, and pixels, boxes and masks with them, after every resize."""

import itertools
import logging

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gesso.data.demo import DemoConfig
from gesso.data.demo_index import demo_index
from gesso.data.index import Index
from gesso.data.index_writer import IndexWriter
from gesso.data.loading import training_batches
from gesso.data.placement import Placement
from gesso.data.records import ImageBlock, Masks, ObjectBlock, Polygons, Source, Strings
from gesso.data.semantic import SemanticMaps, draw_semantic, read_semantic
from gesso.data.transforms import Direct, ImageNetCrop, InputConfig, KeepRatio
from gesso.errors import ConfigError, DataError, TrainingError
from gesso.label_space import LabelSpace

SPACE = LabelSpace.from_names(["cat", "dog", "bird"])
COLOURS = np.array([(0, 0, 0), (250, 0, 0), (0, 250, 0), (0, 0, 250)], np.uint8)  # by value of the map
SIZES = [(120, 160), (160, 120), (97, 203), (140, 140), (333, 411)]
RESIZES = [
    KeepRatio(short_sides=(96, 160), long_side=256),
    KeepRatio(short_sides=(192, 320), long_side=512, divide=2),
    Direct(side=160),
    Direct(side=160, mode="square"),
    ImageNetCrop(side=128),
]


def write(folder, pictures, maps, objects=(), space=SPACE, size=None):
    """An index of arrays: pictures, maps (None: the picture has none; bytes: the file), (row, box, label, ring)s."""
    folder.mkdir()
    for i, (picture, values) in enumerate(zip(pictures, maps, strict=True)):
        Image.fromarray(picture).save(folder / f"{i}.png")
        if isinstance(values, bytes):
            (folder / f"map{i}.png").write_bytes(values)
        elif values is not None:
            Image.fromarray(values).save(folder / f"map{i}.png")
    writer = IndexWriter(folder / "index", space, sources=[Source(name="a", root=str(folder))])
    names = Strings.of(f"{i}.png" for i in range(len(pictures)))
    paths = Strings.of("" if values is None else f"map{i}.png" for i, values in enumerate(maps))
    widths, heights = (np.array([p.shape[side] for p in pictures], np.int32) for side in (1, 0))
    ids = np.arange(len(pictures))
    semantic = None if all(values is None for values in maps) else paths
    writer.add_images(ImageBlock(ids=ids, names=names, widths=widths, heights=heights, semantic=semantic))
    if objects:
        rows, boxes, labels, rings = zip(*objects, strict=True)
        masks = Masks.of([Polygons((np.array(ring, np.float32),)) for ring in rings])
        xyxy = np.array(boxes, np.float32)
        writer.add_objects(ObjectBlock(rows=np.array(rows), xyxy=xyxy, labels=np.array(labels), masks=masks))
    return Index.open(writer.finish())


def drawn(size, seed):
    """A picture of rectangles side by side, each an object whose mask, its left half, has its class's colour."""
    random, (height, width) = np.random.default_rng(seed), size
    picture, values = np.zeros((*size, 3), np.uint8), np.zeros(size, np.uint8)
    objects = []
    for column in range(2):
        for row in range(2):
            x1, y1 = column * width // 2 + int(random.integers(2, 9)), row * height // 2 + int(random.integers(2, 9))
            x2, y2 = x1 + int(random.integers(20, width // 2 - 9)), y1 + int(random.integers(20, height // 2 - 9))
            x2 -= (x2 - x1) % 2
            middle, label = (x1 + x2) // 2, int(random.integers(3))
            values[y1:y2, x1:middle] = 1 + label
            objects.append(((x1, y1, x2, y2), label, [(x1, y1), (middle, y1), (middle, y2), (x1, y2)]))
    picture[:] = COLOURS[values]
    return picture, values, objects


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    scenes = [drawn(size, seed) for seed, size in enumerate(SIZES)]
    objects = [(row, *found) for row, scene in enumerate(scenes) for found in scene[2]]
    return write(tmp_path_factory.mktemp("drawn") / "a", [s[0] for s in scenes], [s[1] for s in scenes], objects)


def take(batches, count):
    found = list(itertools.islice(batches, count))
    batches.close()
    return found


def inner(values, margin):
    """Where all pixels within ``margin`` have one value; not at the border, beyond which a crop goes on."""
    same = torch.ones_like(values, dtype=torch.bool)
    padded = torch.nn.functional.pad(values[None, None].float(), (margin,) * 4, value=-1)[0, 0]
    for dy, dx in itertools.product(range(2 * margin + 1), repeat=2):
        same &= padded[dy : dy + values.shape[0], dx : dx + values.shape[1]] == values
    return same


@pytest.mark.parametrize("resize", RESIZES, ids=lambda r: type(r).__name__)
def test_pixels_boxes_masks_and_maps_move_together(index, resize):
    """Away from edges every pixel has the colour of the map's value; boxes hold it; their masks cover its pixels."""
    options = InputConfig(resize=resize, flip=0.5)
    colours = torch.from_numpy(COLOURS.astype(np.int64))
    seen = 0
    for batch, targets in take(training_batches(index, options, seed=3, batch_size=4, mask_side=28, semantic=True), 12):
        assert targets.semantic.dtype == torch.uint8 and targets.semantic.shape == batch.images[:, 0].shape
        for i in range(4):
            height, width = batch.sizes[i].tolist()
            values = targets.semantic[i]
            assert (values[height:] == 255).all() and (values[:, width:] == 255).all()
            values = values[:height, :width]
            assert set(values.unique().tolist()) <= {0, 1, 2, 3}
            margin = 1 + int(max(batch.scale[i].tolist()))
            sure = inner(values, margin)
            pixels = batch.images[i, :, :height, :width].permute(1, 2, 0).long()
            assert (pixels - colours[values.long()]).abs()[sure].max() <= 2
            covered = torch.zeros(height, width, dtype=torch.bool)
            for slot in targets.valid[i].nonzero()[:, 0].tolist():
                x1, y1, x2, y2 = targets.boxes[i, slot].tolist()
                columns, rows = ((torch.arange(28) + 0.5) / 28 * (b - a) + a for a, b in ((x1, x2), (y1, y2)))
                at = rows.long().clamp(max=height - 1)[:, None], columns.long().clamp(max=width - 1)[None]
                mask, there = targets.masks[i, slot], sure[at]
                assert torch.equal(mask[there] == 1, values[at][there] == targets.labels[i, slot] + 1)
                covered[int(y1) : int(y2) + 1, int(x1) : int(x2) + 1] = True
                seen += int(there.sum())
            assert not (values[~covered] > 0)[sure[~covered]].any()  # no object without its box
    assert seen > 5000


@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    high=st.integers(1, 64),
    wide=st.integers(1, 64),
    flip=st.booleans(),
    seed=st.integers(0, 100),
)
def test_maps_are_drawn_pixel_by_pixel(height, width, high, wide, flip, seed):
    random = np.random.default_rng(seed)
    values = random.integers(0, 256, (height, width), dtype=np.uint8)
    top, left = int(random.integers(0, high)), int(random.integers(0, wide))
    placement = Placement((height, width), (high, wide), (top, left), (high - top, wide - left), (64, 96), flip)
    canvas = np.full((64, 96), 77, np.uint8)
    draw_semantic(values, placement, canvas)
    expected = np.full((64, 96), 77, np.uint8)
    for y, x in itertools.product(range(high - top), range(wide - left)):
        across = wide - left - 1 - x if flip else x
        expected[y, across] = values[
            (2 * (y + top) + 1) * height // (2 * high), (2 * (x + left) + 1) * width // (2 * wide)
        ]
    assert np.array_equal(canvas, expected)


@pytest.mark.parametrize("mode", ["P", "L", "1"])
def test_the_numbers_of_a_file_are_read_and_not_its_colours(tmp_path, mode):
    values = np.arange(30 * 40, dtype=np.int64).reshape(30, 40) % (2 if mode == "1" else 256)
    image = Image.fromarray(values.astype(np.uint8))
    if mode == "P":
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    if mode == "1":
        image = Image.fromarray(values.astype(bool))
    image.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as stored:
        assert stored.mode == mode
    found = read_semantic(tmp_path / "a.png")
    assert found.dtype == np.uint8 and found.flags.c_contiguous and np.array_equal(found, values)


def test_what_is_no_map_is_named(tmp_path):
    Image.new("RGB", (4, 5)).save(tmp_path / "colour.png")
    Image.fromarray(np.zeros((4, 5), np.uint16)).save(tmp_path / "deep.png")
    Image.new("L", (90, 90)).save(tmp_path / "whole.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-30])
    (tmp_path / "text.png").write_text("no map")
    (tmp_path / "empty.png").touch()
    said = {
        "colour.png": "pixels of mode RGB",
        "deep.png": "pixels of mode I;16",
        "torn.png": "cannot be read",
        "text.png": "no picture",
        "empty.png": "no picture",
        "none.png": "cannot be read: No such file",
    }
    for name, what in said.items():
        with pytest.raises(DataError, match=what) as caught:
            read_semantic(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)


GREY = [np.full((64, 64, 3), 90, np.uint8)] * 3


def test_values_become_those_of_the_run(tmp_path):
    values = np.array([[0, 1, 2, 3, 255]], np.uint8).repeat(64, 0).repeat(13, 1)[:, :64]
    index = write(tmp_path / "d", GREY[:2], [values, None])
    run = LabelSpace.from_names(["fish", "bird", "cat"])
    label_map = index.label_space.map_to(run)
    options = InputConfig(resize=Direct(side=64, low=1.0, high=1.0), flip=0.0)
    batches = training_batches(index, options, seed=0, batch_size=2, label_map=label_map, semantic=True)
    expected = np.array([0, 3, 0, 2, 255], np.uint8).repeat(13)[:64]  # the run has no dog: background, as its objects
    for batch, targets in take(batches, 3):
        for row, found in zip(batch.image_index.tolist(), targets.semantic, strict=True):
            assert (found.numpy() == (expected if row == 0 else 255)).all()
    maps = SemanticMaps(index, np.array(label_map.targets))
    assert np.array_equal(maps.read(0), np.tile(expected, (64, 1))) and maps.read(1) is None


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (np.zeros((64, 65), np.uint8), "map is 65 x 64, its picture 64 x 64"),
        (np.full((64, 64), 4, np.uint8), "holds the value 4, and there are 3 classes"),
        (np.full((64, 64), 254, np.uint8), "holds the value 254"),
        (b"no map", "no picture of a known format"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_wrong_map_is_replaced_counted_and_named_once(tmp_path, caplog, monkeypatch, workers, bad, what):
    monkeypatch.setattr(logging.getLogger("gesso"), "propagate", True)
    good = np.full((64, 64), 3, np.uint8)
    index = write(tmp_path / "d", GREY[:1] * 300, [bad, *[good] * 299])
    options = InputConfig(resize=Direct(side=64, low=1.0, high=1.0))
    batches = training_batches(index, options, seed=1, batch_size=4, semantic=True, workers=workers)
    found = take(batches, 160)
    assert batches.replaced == 640 // 300 or batches.replaced == 640 // 300 + 1
    assert all((targets.semantic == 3).all() and (batch.image_index > 0).all() for batch, targets in found)
    [said] = [record.getMessage() for record in caplog.records]
    assert what in said and "map0.png" in said
    rows = [b.image_index.tolist() for b, _ in take(training_batches(index, options, seed=1, batch_size=4), 160)]
    assert 0 in itertools.chain(*rows)  # without maps the picture itself is good


def test_too_many_wrong_maps_stop_the_run(tmp_path):
    index = write(tmp_path / "d", GREY, [np.full((64, 64), 9, np.uint8)] * 3)
    with pytest.raises(TrainingError, match="semantic map holds the value 9"):
        next(training_batches(index, InputConfig(resize=Direct(side=64)), seed=1, batch_size=4, semantic=True))


def test_maps_that_cannot_be_are_refused_at_once(tmp_path):
    index = write(tmp_path / "d", GREY, [None] * 3)
    options = InputConfig(resize=Direct(side=64))
    with pytest.raises(DataError, match="no semantic maps"):
        training_batches(index, options, seed=1, batch_size=1, semantic=True)
    _, targets = take(training_batches(index, options, seed=1, batch_size=1), 1)[0]
    assert targets.semantic is None
    many = LabelSpace.from_names([str(i) for i in range(255)])
    index = write(tmp_path / "many", GREY, [np.full((64, 64), 254, np.uint8)] * 3, space=many)
    with pytest.raises(ConfigError, match="class 254 has no number"):
        training_batches(index, options, seed=1, batch_size=1, semantic=True)
    few = many.map_to(LabelSpace.from_names(["253", "0"]))
    batches = training_batches(index, options, seed=1, batch_size=1, label_map=few, semantic=True)
    _, targets = take(batches, 1)[0]
    assert set(targets.semantic.unique().tolist()) <= {1, 255} and (targets.semantic == 1).any()


def test_the_demo_has_maps(tmp_path):
    index = demo_index(tmp_path / "demo", DemoConfig(images=3, side=96))
    options = InputConfig(resize=KeepRatio(short_sides=(96,), long_side=96), flip=0.0)
    for batch, targets in take(training_batches(index, options, seed=0, batch_size=3, semantic=True), 1):
        for row, found in zip(batch.image_index.tolist(), targets.semantic.numpy(), strict=True):
            assert np.array_equal(found, read_semantic(index.semantic_path(row)))
            assert found.max() == 255 and len(np.unique(found)) > 2
