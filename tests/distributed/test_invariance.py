"""1, 2 and 4 processes do the same: batches and random choices exactly, losses and gradients but for rounding."""

import itertools

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gesso import distributed
from gesso.data.index import Index
from gesso.data.loading import training_batches
from gesso.data.transforms import InputConfig, KeepRatio
from gesso.models.build import build_detector
from gesso.models.norm import NormPolicy, apply_norm_policy
from gesso.models.postprocess import PostprocessConfig
from gesso.run.predictor import TrainedDetector
from gesso.run.train import train
from gesso.structures import map_tensors
from gesso.training import loop
from gesso.training.loop import Callbacks, run_stage
from gesso.training.optimizer import SGD, build_optimizer
from gesso.training.schedule import ScheduleConfig
from gesso.training.stage import Stage, TrainingConfig
from gesso.training.step import train_step
from tests.distributed.processes import run
from tests.models.helpers import random_batch, tiny_config
from tests.run.helpers import newest, rows, tiny_run

INPUT = InputConfig(resize=KeepRatio(short_sides=(48, 64), long_side=96), brightness=0.2)
FIXED, SYNC = NormPolicy(kind="fixed"), NormPolicy(kind="sync")
WORLDS = (1, 2, 4)
MEASURED = ("loss", "rpn_", "box_", "mask", "gradient_norm")


def _stage(kind, norm, classes, *, batch_size=8, accumulate=1, clip=1.0, seed=5):
    torch.manual_seed(0)
    detector = build_detector(tiny_config(kind), classes)
    pictures = batch_size // (distributed.world_size() * accumulate)
    apply_norm_policy(detector, norm, pictures=pictures)
    detector.double()
    config = TrainingConfig(
        steps=12,
        batch_size=batch_size,
        accumulate=accumulate,
        input=INPUT,
        optimizer=SGD(rate=0.02),
        schedule=ScheduleConfig(kind="constant", warmup_steps=4),
        norm=norm,
        clip_norm=clip,
        precision="float64",
        log_every=1,
    )
    optimizer = build_optimizer(detector, config.optimizer)
    return Stage(config=config, module=detector, optimizer=optimizer, ema=None, device=torch.device("cpu"), seed=seed)


def _recorded(batches, seen):
    """The same batches; their image indices, keys and number of boxes go to ``seen``."""
    for batch, targets in batches:
        seen.append((batch.image_index.tolist(), batch.key.tolist(), int((targets.valid & ~targets.ignore).sum())))
        yield batch, targets


def _train(index, norm):
    """12 steps: what this process saw, the numbers of every step, and the weights and statistics at the end."""
    index = Index.open(index)
    stage = _stage("faster_rcnn", norm, len(index.label_space))
    share = {"rank": distributed.rank(), "world": distributed.world_size()}
    batches = training_batches(index, INPUT, seed=stage.seed, batch_size=8, max_boxes=8, **share)
    seen, numbers = [], []
    run_stage(
        stage,
        _recorded(batches, seen),
        Callbacks(row=lambda _, row: numbers.append(row), checkpoint=lambda _: None, evaluate=lambda _: None),
    )
    weights = {name: value.numpy() for name, value in stage.module.state_dict().items()}
    return seen, [_measured(row) for row in numbers], weights


def _measured(row):
    """The losses, the gradient's norm, and the ratios of samples."""
    return {name: value for name, value in row.items() if name.startswith(MEASURED)}


def _together(found):
    """The batches of all processes as those of one: ids and keys by step."""
    steps = zip(*(seen for seen, _, _ in found), strict=True)
    return [[list(itertools.chain(*(part[k] for part in step))) for k in range(2)] for step in steps]


@pytest.mark.slow
@pytest.mark.parametrize("norm", [FIXED, SYNC], ids=["fixed", "sync"])
def test_the_number_of_processes_changes_nothing(data, norm):
    by_world = {world: run(_train, world, data.train, norm) for world in WORLDS}
    (_, numbers, weights) = by_world[1][0]
    assert len(numbers) == 12 and numbers[-1]["loss"] < numbers[0]["loss"]
    assert {"gradient_norm", "rpn_objectness_positive_ratio", "box_class_positive_ratio"} <= numbers[0].keys()
    for world in WORLDS[1:]:
        found = by_world[world]
        assert _together(found) == _together(by_world[1])
        for _, rows_there, weights_there in found:
            _assert_close(rows_there, numbers, 1e-6)
            for name, value in weights.items():
                np.testing.assert_allclose(weights_there[name], value, rtol=0, atol=1e-6, err_msg=name)
    boxes = [step[2] for seen, _, _ in by_world[4] for step in seen]
    assert boxes.count(0) > 3 and max(boxes) > 1, "no process was without a box"


def _assert_close(found, expected, tolerance):
    assert len(found) == len(expected)
    for step, (one, other) in enumerate(zip(found, expected, strict=True), 1):
        assert one == pytest.approx(other, rel=tolerance, abs=tolerance), f"step {step}"


def _whole_run(out, config):
    """``train``; what this process's steps were done on."""
    seen, step = [], loop.train_step

    def recording(stage, batch, targets, **options):
        seen.append((batch.image_index.tolist(), batch.key.tolist(), 0))
        return step(stage, batch, targets, **options)

    loop.train_step = recording
    try:
        train(config, out)
    finally:
        loop.train_step = step
    return seen, [], {}


@pytest.mark.slow
def test_a_whole_run_is_the_same_with_any_number_of_processes(data, tmp_path):
    """``debug:tiny`` with its synchronised batch norm, and everything around the steps."""
    config = tiny_run(data, precision="float64")
    assert config.training.norm.kind == "sync" and config.training.steps == 12
    batches = {world: _together(run(_whole_run, world, tmp_path / str(world), config)) for world in WORLDS}
    assert len(batches[1]) == 12 and batches[2] == batches[4] == batches[1]
    one = tmp_path / "1"
    model, expected = load_file(newest(one) / "model.safetensors"), rows(one)
    for world in WORLDS[1:]:
        there, found = tmp_path / str(world), rows(tmp_path / str(world))
        assert [row["step"] for row in found] == [row["step"] for row in expected] == [*range(1, 13), 12]
        _assert_close([_measured(row) for row in found[:12]], [_measured(row) for row in expected[:12]], 1e-6)
        assert _scores(found[12]) == pytest.approx(_scores(expected[12]), abs=1e-6)
        for name, value in load_file(newest(there) / "model.safetensors").items():
            torch.testing.assert_close(value, model[name], rtol=0, atol=1e-6, msg=name)


def _scores(row):
    return {name: value for name, value in row.items() if name.startswith("A")}


def _gradients(kind, norm, batch_size, accumulate):
    """The numbers and all gradients of one step, in which the second half of the pictures has no object."""
    stage = _stage(kind, norm, 5, batch_size=batch_size, accumulate=accumulate, clip=None)
    batch, targets = random_batch(count=batch_size, side=64, masks=True, seed=4)
    half = batch_size // 2
    targets = map_tensors(targets, lambda tensor: torch.cat([tensor[:half], torch.zeros_like(tensor[half:])]))
    own = torch.arange(batch_size).tensor_split(distributed.world_size())[distributed.rank()]
    part = map_tensors(batch, lambda tensor: tensor[own]), map_tensors(targets, lambda tensor: tensor[own])
    numbers, _ = train_step(stage, *part).read()
    return numbers, {name: p.grad.numpy().copy() for name, p in stage.module.named_parameters() if p.requires_grad}


def _assert_same_gradients(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-10, abs=1e-12)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in found[1].items():
        np.testing.assert_allclose(gradient, expected[1][name], rtol=1e-10, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_parts_add_up_to_the_whole(accumulate):
    """With masks, and with parts that have no sample of the losses of boxes and masks at all."""
    _assert_same_gradients(_gradients("mask_rcnn", FIXED, 8, accumulate), _gradients("mask_rcnn", FIXED, 8, 1))


def test_parts_add_up_where_each_is_a_group_of_batch_norm():
    norm = NormPolicy(kind="sync", images=4)
    _assert_same_gradients(_gradients("mask_rcnn", norm, 8, 2), _gradients("mask_rcnn", norm, 8, 1))


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_parts_of_two_processes_add_up_to_the_whole(accumulate):
    expected = _gradients("mask_rcnn", FIXED, 8, 1)
    for found in run(_gradients, 2, "mask_rcnn", FIXED, 8, accumulate):
        _assert_same_gradients(found, expected)


def _evaluated(index):
    """The detections of a detector with masks on an index, and its scores."""
    index = Index.open(index)
    torch.manual_seed(1)
    config = tiny_config("mask_rcnn", postprocess=PostprocessConfig(detections=100, candidates=320, min_score=0.0))
    detector = build_detector(config, len(index.label_space)).double().eval()
    ready = TrainedDetector(
        model=detector,
        label_space=index.label_space,
        input=INPUT,
        device=torch.device("cpu"),
        batch_size=2,
        precision="float64",
    )
    scores, found = ready.evaluate(index)
    return scores, {name: getattr(found, name) for name in ("image_id", "label", "score", "xyxy")}, list(found.masks)


@pytest.mark.slow
@pytest.mark.parametrize("images", [5, 2])
def test_an_evaluation_is_the_same_with_any_number_of_processes(data, two_images, images):
    """Also where the pictures cannot be divided among them, and where there are fewer than processes."""
    index = data.val if images == 5 else two_images
    scores, columns, masks = _evaluated(index)
    assert len(np.unique(columns["image_id"])) == images and "mask_AP" in scores
    assert images == 2 or scores["AR100"] > 0
    for world in WORLDS[1:]:
        for found_scores, found, found_masks in run(_evaluated, world, index):
            assert found_scores == scores
            assert found_masks == masks
            for name, column in columns.items():
                np.testing.assert_allclose(found[name], column, rtol=0, atol=1e-9, err_msg=name)
