"""Runs that train something else than a detector, by the same loop: a segmenter, a classifier."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from gesso.data.demo import DemoConfig, make_demo_classes
from gesso.data.importing import import_data
from gesso.data.index import Index
from gesso.errors import DataError, Interrupted, RunError
from gesso.evaluation.segmentation import Confusion, read_label_map
from gesso.models.backbone import BackboneConfig
from gesso.models.classifier import ClassifierConfig
from gesso.models.norm import NormPolicy
from gesso.models.segmenter import PSPConfig, SegmenterConfig
from gesso.run.models import load_detector, load_run
from gesso.run.train import train
from tests.run.helpers import BACKBONE, StopAfter, differences, tiny_run

_NET = BackboneConfig(name=BACKBONE, pretrained=False, zero_init_residual=False)
SEGMENTER = SegmenterConfig(
    backbone=dataclasses.replace(_NET, output_stride=8), head=PSPConfig(bins=(1, 2), width=16, dropout=0.0)
)
CLASSIFIER = ClassifierConfig(backbone=_NET)
SHORT = {"steps": 4, "batch_size": 4, "evaluate_every": 4, "checkpoint_every": 2}


def segmenting(data, **training):
    return dataclasses.replace(tiny_run(data, **SHORT | training), model=SEGMENTER)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Indexes of a folder of classes: 40 pictures to learn from, 20 others."""
    root = tmp_path_factory.mktemp("classes")
    for split, images in (("train", 40), ("val", 20)):
        make_demo_classes(root / split, DemoConfig(images=images, split=split, side=64))
        import_data(root / split, root / f"{split}-index")
    return Index.open(root / "train-index"), Index.open(root / "val-index")


def classifying(data, folders, **training):
    config = tiny_run(data, **SHORT | training)
    named = dataclasses.replace(config.data, train=folders[0].path, val=folders[1].path)
    return dataclasses.replace(config, model=CLASSIFIER, data=named)


@pytest.fixture(scope="module")
def segmented(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("segmented") / "run"
    return out, train(segmenting(data), out)


@pytest.fixture(scope="module")
def classified(data, folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("classified") / "run"
    return out, train(classifying(data, folders), out)


def test_the_scores_of_a_segmenter_are_those_of_its_maps(data, segmented):
    """Picture by picture: logits brought to the stored size, the highest class, one confusion matrix."""
    out, result = segmented
    index, run = Index.open(data.val), load_run(out)
    maps, broken = run.predict([index.image_path(row) for row in range(len(index))])
    confusion = Confusion(11)
    for row, drawn in enumerate(maps):
        truth = read_label_map(index.semantic_path(row))
        assert drawn.dtype == np.uint8 and drawn.shape == truth.shape
        confusion.add(truth, drawn)
    expected = confusion.scores(["background", *index.label_space.names])
    assert not broken and result.scores["mIoU"] == pytest.approx(expected["mIoU"])
    assert result.scores["pixel_accuracy"] == pytest.approx(expected["pixel_accuracy"])
    written = json.loads((out / "detections" / "00000004" / "confusion.json").read_text())
    assert written["classes"][:2] == ["background", index.label_space.names[0]]
    assert written["pixels"] == confusion.counts.tolist()
    report = (out / "report.html").read_text()
    assert "IoU by class" in report and "background" in report and f"mIoU {expected['mIoU']:.3f}" in report


def test_a_segmenter_learns(data, tmp_path):
    rows = train(segmenting(data, steps=30, log_every=1, evaluate_every=30), tmp_path / "r")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "r" / "metrics.jsonl").open() if '"loss"' in line]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:3])
    assert rows.scores["pixel_accuracy"] > 0.5


def test_the_scores_of_a_classifier_are_those_of_its_guesses(classified, folders):
    out, result = classified
    index, run = folders[1], load_run(out)
    truth = [index.name(row).split("/")[-2] for row in range(len(index))]
    found, broken = run.predict([index.image_path(row) for row in range(len(index))])
    assert not broken and found.rows.tolist() == list(range(len(index)))
    names = np.array(run.label_space.names)[found.labels]
    assert result.scores["top1"] == pytest.approx(np.mean(names[:, 0] == truth))
    assert result.scores["top5"] == pytest.approx(np.mean([t in row for t, row in zip(truth, names, strict=True)]))
    rows = list(csv.DictReader((out / "detections" / "00000004" / "guesses.csv").open()))
    assert [row["label"] for row in rows[:5]] == names[0].tolist() and len(rows) == 5 * len(index)
    assert float(rows[0]["score"]) == pytest.approx(float(found.scores[0, 0]), abs=1e-5)
    assert "top1 by class" in (out / "report.html").read_text()


def test_the_probabilities_are_those_of_the_logits(classified, folders):
    out, _ = classified
    run, picture = load_run(out), folders[1].image_path(3)
    found, _ = run.predict([picture])
    pixels = torch.from_numpy(np.array(Image.open(picture).convert("RGB"))).permute(2, 0, 1)[None].float()
    small = F.interpolate(pixels, size=(64, 64), mode="bilinear") if pixels.shape[2:] != (64, 64) else pixels
    values = run.model.backbone((small - run.model.mean) / run.model.std)["C5"].mean((2, 3))
    expected = run.model.fc(values).softmax(1)[0].detach()
    order = expected.argsort(descending=True)[:5]
    assert found.labels[0].tolist() == order.tolist()
    np.testing.assert_allclose(found.scores[0], expected[order].numpy(), atol=1e-5)


@pytest.mark.parametrize("kind", ["segmenter", "classifier"])
def test_an_interrupted_run_goes_on_bit_for_bit(kind, data, folders, segmented, classified, tmp_path):
    config = segmenting(data) if kind == "segmenter" else classifying(data, folders)
    straight = (segmented if kind == "segmenter" else classified)[0]
    with pytest.raises(Interrupted):
        train(config, tmp_path / "r", observer=StopAfter(3))
    train(config, tmp_path / "r", resume=True)
    assert differences(straight, tmp_path / "r") == []


def test_a_classifier_starts_a_detector_and_a_detector_a_segmenter(data, classified, segmented, tmp_path):
    """The chain of the papers: classes of pictures, then boxes, then another task."""
    train(tiny_run(data, **SHORT), tmp_path / "boxes", init=classified[0])
    loaded = json.loads((tmp_path / "boxes" / "weights.json").read_text())
    backbone = [name for name in load_run(classified[0]).model.state_dict() if name.startswith("backbone.")]
    assert set(loaded["loaded"]) == set(backbone) and set(loaded["unexpected"]) == {"fc.weight", "fc.bias"}
    train(segmenting(data, norm=NormPolicy(kind="affine")), tmp_path / "maps", init=tmp_path / "boxes")
    loaded = json.loads((tmp_path / "maps" / "weights.json").read_text())
    assert set(loaded["loaded"]) == set(backbone)


def test_data_that_a_task_cannot_learn_from(data, folders, tmp_path):
    config = tiny_run(data, **SHORT)
    classes = dataclasses.replace(config.data, train=folders[0].path, val=None)
    with pytest.raises(DataError, match="has a semantic map, which a segmenter needs"):
        train(dataclasses.replace(config, model=SEGMENTER, data=classes), tmp_path / "r")
    with pytest.raises(DataError, match="has exactly one class, which a classifier needs"):
        train(dataclasses.replace(config, model=CLASSIFIER), tmp_path / "r")
    with pytest.raises(DataError, match="has a box"):
        train(dataclasses.replace(config, data=classes), tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_detector_is_asked_for(segmented):
    with pytest.raises(RunError, match="trained a Segmenter, no detector"):
        load_detector(segmented[0])
