"""Linear probes against features taken picture by picture and scikit-learn's classifier on them."""

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.linear_model import LogisticRegression

from gesso.data.decode import read_picture
from gesso.data.demo import DemoConfig, make_demo_classes
from gesso.data.index import Index
from gesso.data.index_writer import IndexWriter
from gesso.data.records import ImageBlock, Source, Strings, Verified
from gesso.data.transforms import Direct, InputConfig
from gesso.errors import ConfigError, DataError
from gesso.label_space import LabelSpace
from gesso.models.backbone import BackboneConfig
from gesso.models.build import build_model
from gesso.models.classifier import ClassifierConfig
from gesso.models.segmenter import SegmenterConfig
from gesso.structures import ImageBatch
from gesso.transfer.probe import STRENGTHS, _Features, default_layers, held_out, parse_layer, probe
from tests.models.helpers import random_batch, tiny_detector

COLOURS = {"red": (200, 60, 60), "green": (60, 200, 60), "blue": (60, 60, 200), "grey": (120, 120, 120)}
SQUARE = InputConfig(resize=Direct(side=64, mode="square"))


def write_index(folder: Path, pictures, names, labels) -> Index:
    """An index of pictures with the classes that ``labels`` names as present, a list for each picture."""
    (folder / "pictures").mkdir(parents=True)
    for number, pixels in enumerate(pictures):
        Image.fromarray(pixels).save(folder / "pictures" / f"{number:03d}.png")
    space = LabelSpace.from_names(names)
    counts = [len(own) for own in labels]
    verified = Verified(
        offsets=np.cumsum([0, *counts]),
        labels=np.array([space.index(name) for own in labels for name in own], np.int32),
        states=np.ones(sum(counts), np.int8),
    )
    block = ImageBlock(
        ids=np.arange(len(pictures)),
        names=Strings.of([f"{number:03d}.png" for number in range(len(pictures))]),
        widths=np.array([p.shape[1] for p in pictures], np.int32),
        heights=np.array([p.shape[0] for p in pictures], np.int32),
        verified=verified,
    )
    root = str(folder / "pictures")
    writer = IndexWriter(folder / "index", space, sources=[Source(name="t", root=root, split="", labelled=())])
    writer.add_images(block)
    return Index.open(writer.finish())


def noisy(name, seed, height=64, width=64):
    rng = np.random.default_rng(seed)
    noise = rng.normal(0, 70, (height, width, 3)) + rng.normal(0, 40, 3)
    return np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8)


def colours(folder, names, count, seed, extra=()):
    """``count`` noisy pictures of each colour in turn, then those of ``extra``: pairs of a colour and labels."""
    pairs = [(names[k % len(names)], [names[k % len(names)]]) for k in range(count * len(names))] + list(extra)
    pictures = [noisy(name, 1000 * seed + k) for k, (name, _) in enumerate(pairs)]
    known = sorted({label for _, labels in pairs for label in labels} | set(names), reverse=bool(seed % 2))
    return write_index(folder, pictures, known, [labels for _, labels in pairs])


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> tuple[Index, Index]:
    """Both with pictures of no class and of two, and the classes in another order; "grey" is known to one only."""
    root = tmp_path_factory.mktemp("colours")
    none = [("grey", []), ("red", ["red", "blue"])]
    train = colours(root / "train", ("red", "green", "blue"), 8, 1, none)
    val = colours(root / "val", ("red", "green", "blue"), 6, 2, [*none, ("grey", ["grey"])])
    assert train.label_space.names != val.label_space.names[:3]
    return train, val


@pytest.fixture(scope="module")
def analysis():
    """A detector with conv_proj, fc1 and fc2."""
    return tiny_detector("analysis")


def alone(model, index, row):
    """A picture as a batch of its own."""
    pixels = torch.tensor(read_picture(index.image_path(row))).permute(2, 0, 1)[None]
    size = torch.tensor([pixels.shape[2:]])
    zero = torch.zeros(1, dtype=torch.int64)
    return ImageBatch(
        images=pixels, sizes=size, scale=torch.ones(1, 2), original_sizes=size, image_index=zero, key=zero
    )


def slow_features(model, index, rows, layer):
    """Picture by picture; 64 pixels are 4 x 4 cells of stride 16."""
    vectors = []
    for row in rows:
        batch = alone(model, index, row)
        name, _, cells = layer.partition("@")
        found = model.features(batch, [name], boxes=torch.tensor([[[0.0, 0.0, 64.0, 64.0]]]))[name]
        vectors.append(F.adaptive_avg_pool2d(found, int(cells or 1)) if found.dim() == 4 else found)
    return torch.cat(vectors).flatten(1).numpy().astype(np.float64)


def slow_probe(x, y, x_val, y_val, strength):
    mean, std = x.mean(axis=0), x.std(axis=0)
    std[std == 0] = 1
    classifier = LogisticRegression(C=strength, max_iter=1000).fit((x - mean) / std, y)
    return float((classifier.predict((x_val - mean) / std) == y_val).mean())


LAYERS = ("C5", "conv_proj@4", "conv_proj@2", "conv_proj", "fc1", "fc2")


def test_scores_equal_a_slow_version(sets, analysis):
    train, val = sets
    told = []
    analysis.train()
    found = probe(
        analysis, SQUARE, train, val, LAYERS, strength=0.01, batch_size=5, progress=lambda *row: told.append(row)
    )
    assert analysis.training and all(m.training for m in analysis.modules())
    assert tuple(found) == LAYERS and [found[name]["dim"] for name in LAYERS] == [96, 256, 64, 16, 32, 32]
    names = train.label_space.names
    y, y_val = (np.array([names.index(("red", "green", "blue")[k % 3]) for k in range(n)]) for n in (24, 18))
    analysis.eval()
    for layer in LAYERS:
        x, x_val = (slow_features(analysis, i, range(n), layer) for i, n in ((train, 24), (val, 18)))
        assert found[layer]["top1"] == slow_probe(x, y, x_val, y_val, 0.01), layer
        assert found[layer]["top5"] == 1 and found[layer]["strength"] == 0.01 and found[layer]["images"] == 18
    assert found["C5"]["top1"] > 0.5
    assert told[-1] == ("classifiers", 6, 6) and ("training pictures", 26, 26) in told
    assert ("validation pictures", 21, 21) in told


def test_the_strength_is_the_best_on_what_is_held_out(sets, analysis):
    train, val = sets
    found = probe(analysis, SQUARE, train, val, ["C5"])["C5"]
    names = train.label_space.names
    y = np.array([names.index(("red", "green", "blue")[k % 3]) for k in range(24)])
    x, held = slow_features(analysis.eval(), train, range(24), "C5"), held_out(y)
    shares = [slow_probe(x[~held], y[~held], x[held], y[held], strength) for strength in STRENGTHS]
    assert found["strength"] == STRENGTHS[int(np.argmax(shares))]


def small_backbone(name="test_resnet", **changes):
    return BackboneConfig(name=name, pretrained=False, **changes)


def test_padding_does_not_count(analysis):
    """Of a picture that covers the upper left quarter: maps cut to it, and the quarter as the one region."""
    batch, _ = random_batch(2)
    batch = dataclasses.replace(batch, sizes=torch.tensor([[64, 64], [32, 32]]))
    names = ("C2@4", "C5", "conv_proj@2", "roi", "fc2")
    found = _Features(analysis.eval(), [parse_layer(analysis, name) for name in names])(batch)
    boxes = torch.tensor([[[0.0, 0.0, 64.0, 64.0]], [[0.0, 0.0, 32.0, 32.0]]])
    whole = analysis.features(batch, ("C2", "C5", "conv_proj", "roi", "fc2"), boxes=boxes)
    for name, feature, cells in (("C2@4", "C2", 4), ("C5", "C5", 1), ("conv_proj@2", "conv_proj", 2)):
        values, half = whole[feature], whole[feature].shape[2] // 2
        for b, side in enumerate((2 * half, half)):
            expected = F.adaptive_avg_pool2d(values[b, :, :side, :side], cells).flatten()
            torch.testing.assert_close(found[name][b], expected)
    for name in ("roi", "fc2"):
        torch.testing.assert_close(found[name], whole[name].flatten(1))


def test_layers_of_every_kind_of_model(analysis):
    proj = tuple(f"conv_proj@{cells}" for cells in (14, 4, 2, 1))
    assert default_layers(analysis) == ("C5", *proj, "fc1", "fc2")
    assert default_layers(tiny_detector("rfcn")) == ("C5", *proj)
    assert default_layers(tiny_detector("faster_rcnn")) == ("C5", "fc1", "fc2")
    assert default_layers(tiny_detector("retinanet")) == ("C5",)
    assert default_layers(build_model(ClassifierConfig(backbone=small_backbone("test_vit")), 3)) == ("C4",)
    assert default_layers(build_model(SegmenterConfig(backbone=small_backbone(output_stride=16)), 3)) == ("C5",)
    assert parse_layer(analysis, "conv_proj@4") == ("conv_proj@4", "conv_proj", 4)
    assert parse_layer(analysis, "C5") == ("C5", "C5", 1) and parse_layer(analysis, "roi") == ("roi", "roi", 0)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("C6", "no feature 'C6'"),
        ("C5@", "has no number of cells"),
        ("C5@0", "has no number of cells"),
        ("C5@-2", "has no number of cells"),
        ("C5@4@2", "has no number of cells"),
        ("fc1@2", "fc1 has no cells"),
    ],
)
def test_wrong_layers(analysis, layer, message):
    with pytest.raises(ConfigError, match=message):
        parse_layer(analysis, layer)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=60))
def test_held_out_pictures(classes):
    labels = np.array(classes, np.int64)
    held = held_out(labels)
    assert held.shape == labels.shape and np.array_equal(held, held_out(labels))
    for one in set(classes):
        count, taken = classes.count(one), int(held[labels == one].sum())
        assert taken == (0 if count == 1 else max(1, count // 5))


def test_what_is_held_out_does_not_lie_together():
    held = held_out(np.zeros(1000, np.int64))
    assert held.sum() == 200 and all(20 <= part.sum() <= 60 for part in np.split(held, 5))


def test_wrong_values_and_too_little_memory(sets, analysis):
    train, val = sets
    for wrong in ({"strength": 0.0}, {"layers": ()}, {"memory_gib": 0.0}):
        with pytest.raises(ConfigError):
            probe(analysis, SQUARE, train, val, **wrong)
    with pytest.raises(
        ConfigError, match=r"42 pictures take 0\.0 GiB, more than 1e-05; the largest layer is conv_proj"
    ):
        probe(analysis, SQUARE, train, val, ["C5", "conv_proj@4"], memory_gib=1e-5)


def test_data_that_cannot_be_probed(sets, analysis, tmp_path, caplog):
    train, val = sets
    none = colours(tmp_path / "none", ("red", "blue"), 0, 2, [("red", []), ("red", ["red", "blue"])])
    one = colours(tmp_path / "one", ("red",), 4, 2)
    single = colours(tmp_path / "single", ("red", "blue"), 1, 2)
    other = colours(tmp_path / "other", ("grey",), 3, 2)
    for first, second, message in (
        (none, val, "no picture has exactly one class"),
        (train, none, "no picture has exactly one class"),
        (one, val, "all its pictures are of one class"),
        (single, val, "no class has two pictures"),
        (train, other, "none of its pictures is of a class that"),
    ):
        with pytest.raises(DataError, match=message) as error:
            probe(analysis, SQUARE, first, second, ["C5"])
        assert error.value.where and "\n" not in str(error.value)
    with caplog.at_level(logging.WARNING):
        assert probe(analysis, SQUARE, single, val, ["C5"], strength=0.1)["C5"]["images"] == 12
    assert any("7 pictures are left out" in row.message for row in caplog.records)


def test_a_diverged_model_and_broken_pictures(sets, analysis, tmp_path):
    train, val = sets
    broken = colours(tmp_path / "broken", ("red", "blue"), 6, 2)
    for row in range(2):
        broken.image_path(row).write_bytes(b"no picture")
    assert probe(analysis, SQUARE, train, broken, ["C5"], strength=0.1)["C5"]["images"] == 10
    for row in range(2, 6):
        broken.image_path(row).write_bytes(b"no picture")
    with pytest.raises(DataError, match="6 of 12 pictures could not be read"):
        probe(analysis, SQUARE, train, broken, ["C5"], strength=0.1)
    diverged = tiny_detector("analysis")
    torch.nn.init.constant_(next(diverged.parameters()), float("nan"))
    with pytest.raises(DataError, match="the layer C5 is not finite"):
        probe(diverged, SQUARE, train, val, ["C5"], strength=0.1)


@pytest.mark.slow
def test_random_features_tell_the_embedded_digits_better_than_chance(tmp_path):
    """Ten classes; C3 of an untrained network, on 4 x 4 cells, tells more than guesses do."""
    kept = {}
    for split, images in (("train", 120), ("val", 30)):
        folder = make_demo_classes(tmp_path / split, DemoConfig(images=images, split=split), side=64)
        paths = sorted(folder.glob("*/*.png"))
        names = sorted({path.parent.name for path in paths})
        pictures = [read_picture(path) for path in paths]
        kept[split] = write_index(tmp_path / f"{split}_index", pictures, names, [[p.parent.name] for p in paths])
    torch.manual_seed(0)
    config = ClassifierConfig(backbone=dataclasses.replace(small_backbone(), zero_init_residual=False))
    found = probe(build_model(config, 10), SQUARE, kept["train"], kept["val"], ["C3@4", "C5"], batch_size=64)
    assert found["C3@4"]["top1"] > 0.18 and 0.6 < found["C3@4"]["top5"] < 1
