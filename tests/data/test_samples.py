"""One batch of a plan: its scale, colours and keys are the plan's, its verified classes those of the index."""

import cv2
import numpy as np
import pytest

from gesso.data.decode import colour
from gesso.data.index import Index
from gesso.data.index_writer import IndexWriter
from gesso.data.records import ImageBlock, ObjectBlock, Source, Strings, Verified
from gesso.data.samples import TrainingBuilder
from gesso.data.sampling import BatchPlan
from gesso.data.transforms import Direct, InputConfig, KeepRatio, colour_factors
from gesso.label_space import LabelSpace

from .sample_index import picture, write_index


@pytest.fixture
def index(tmp_path):
    return write_index(tmp_path, images=4, rich=False)


def build(index, config, *, label_map=None, **changes):
    count = len(index)
    plan = {"number": 0, "shape": 0, "scale": 0, "rows": np.arange(count), "keys": np.arange(count) * 1001 + 7}
    builder = TrainingBuilder(index, config, max_boxes=5, mask_side=0, label_map=label_map)
    return builder[BatchPlan(**{**plan, **changes}, spares=np.zeros((count, 1), np.int64))]


def test_keys_are_those_of_the_plan(index):
    built = build(index, InputConfig(resize=Direct(side=96)), keys=np.array([5, 3, 2**31, 9]))
    assert built.images["key"].tolist() == [5, 3, 2**31, 9]
    assert built.images["image_index"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("change", [{"brightness": 0.5}, {"contrast": 0.5}, {"saturation": 0.9}])
def test_colours_are_changed_by_the_factors_of_the_key(index, change):
    resize = Direct(side=128, low=1.0, high=1.0)
    plain = build(index, InputConfig(resize=resize, flip=0.0)).images
    options = InputConfig(resize=resize, flip=0.0, **change)
    found = build(index, options).images
    for slot, key in enumerate(found["key"].tolist()):
        expected = plain["images"][slot].numpy().copy()
        height, width = plain["sizes"][slot].tolist()
        colour(expected[:height, :width], colour_factors(options, key))
        assert np.array_equal(found["images"][slot].numpy(), expected)
        assert not np.array_equal(expected, plain["images"][slot].numpy())


@pytest.mark.parametrize(("scale", "short"), [(0, 64), (1, 96)])
def test_pictures_and_boxes_have_the_scale_of_the_plan(index, scale, short):
    options = InputConfig(resize=KeepRatio(short_sides=(64, 96), long_side=300), flip=0.0)
    longest = 3  # the shape that takes every wide picture
    wide = [row for row in range(4) if index.widths[row] >= index.heights[row]]
    built = build(index, options, scale=scale, shape=longest, rows=np.array(wide)[[0] * 4])
    assert built.images["sizes"].min(1).values.tolist() == [short] * 4
    factor = short / index.heights[wide[0]]
    boxes = built.targets["boxes"][0, : int(built.targets["valid"][0].sum())].numpy()
    assert np.allclose(boxes, index.objects(wide[0]).xyxy * factor, atol=1.0)


def test_verified_classes_come_in_the_classes_of_the_run(tmp_path):
    """Of two classes that become one, the less certain word counts; a box raises nothing that was withheld."""
    space = LabelSpace(names=("cat", "dog", "bike", "bicycle", "owl"), synonyms={"cycle": "bike", "velo": "bicycle"})
    run = LabelSpace(names=("emu", "cycle", "cat", "dog"), synonyms={"velo": "cycle"})
    said = [{0: 1, 2: 2, 3: 2}, {2: 1, 3: 2}, {2: 1}, {1: 2}]
    boxes = [[0, 1], [2], [3], [2, 3]]
    index = one_size(tmp_path / "data", space, said, boxes)
    label_map = space.map_to(run)
    assert label_map.targets == (2, 3, 1, 1, -1)
    built = build(index, InputConfig(resize=Direct(side=64)), label_map=label_map)
    assert built.targets["verified"].tolist() == [[0, 2, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 2]]
    whole = one_size(tmp_path / "whole", space, [{}, {0: 1}], [[1], [1, 3]], labelled=None)
    built = build(whole, InputConfig(resize=Direct(side=64)), label_map=label_map)
    assert built.targets["verified"].tolist() == [[0, 2, 2, 1], [0, 1, 1, 1]]


def test_without_image_level_labels_every_class_is_verified(index):
    run = LabelSpace.from_names(["person", "emu"])
    built = build(index, InputConfig(resize=Direct(side=64)), label_map=index.label_space.map_to(run))
    assert "verified" not in built.targets


def one_size(folder, space, said, boxes, labelled=()):
    """Pictures of 64 x 64 with boxes of the given labels, and what each picture's own labels say: label -> state."""
    folder.mkdir()
    for i in range(len(said)):
        cv2.imwrite(str(folder / f"{i}.png"), picture(i, 64, 64))
    size = np.full(len(said), 64, np.int32)
    verified = Verified(
        offsets=np.cumsum([0, *map(len, said)]),
        labels=np.array([label for entry in said for label in entry], np.int32),
        states=np.array([state for entry in said for state in entry.values()], np.int8),
    )
    writer = IndexWriter(folder / "index", space, sources=[Source(name="", root=str(folder), labelled=labelled)])
    names = Strings.of(f"{i}.png" for i in range(len(said)))
    writer.add_images(ImageBlock(ids=np.arange(len(said)), names=names, widths=size, heights=size, verified=verified))
    rows = np.repeat(np.arange(len(boxes)), [len(labels) for labels in boxes])
    xyxy = np.tile(np.array([[5, 5, 40, 40]], np.float32), (len(rows), 1))
    writer.add_objects(ObjectBlock(rows=rows, xyxy=xyxy, labels=np.concatenate(boxes)))
    return Index.open(writer.finish())
