"""Steps counted without values hold the bytes that real steps hold, to a thousandth."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from gesso.errors import ConfigError
from gesso.models.mask_head import MaskHeadConfig
from gesso.models.model import Model
from gesso.planning.account import SharesRead, StepAccount, choose_memory, count_step
from gesso.planning.stages import in_one_process, new_stage, with_stage, worst_pair
from gesso.planning.workload import stage_of
from gesso.recipes import detectors
from gesso.recipes.debug import tiny
from gesso.training.optimizer import SGD, AdamW, build_optimizer
from gesso.training.stage import Stage
from gesso.training.step import train_step

CPU = torch.device("cpu")
SHAPE = (64, 96)


def small(config, **training):
    """A recipe with timm's smallest backbone and a changed stage."""
    backbone = dataclasses.replace(config.model.backbone, name="test_resnet")
    model = dataclasses.replace(config.model, backbone=backbone)
    stage = dataclasses.replace(config.training, **training)
    return dataclasses.replace(config, device="cpu", model=model, training=stage)


def real(config, shape, pictures, device=CPU):
    """The bytes of a real step, with the shares and the seconds that an account may learn."""
    stage = new_stage(in_one_process(config, "training", pictures), "training", device, pictures)
    pair = worst_pair(stage.module, pictures, shape, config.data.max_boxes, device)
    seconds = choose_memory(stage, pair)
    with SharesRead() as reads:
        train_step(stage, *pair).read()
    return count_step(stage, pair), reads.shares, seconds


def assert_counted(config, shape=SHAPE, pictures=4):
    found, shares, seconds = real(config, shape, pictures)
    account = StepAccount(config, "training", device=CPU)
    account.learn(shares, seconds)
    counted = account.count(shape, pictures)
    assert dataclasses.replace(counted, peak=found.peak) == found
    assert math.isclose(counted.peak, found.peak, rel_tol=1e-3)
    return found


@pytest.mark.parametrize(
    "training",
    [
        {},
        {"optimizer": AdamW(), "ema_decay": 0.9},
        {"optimizer": SGD(momentum=0.0), "precision": "bfloat16"},
        {"precision": "float64", "clip_norm": 0.1},
        {"memory": "sqrt", "accumulate": 2},
        {"memory": "stages", "precision": "bfloat16"},
        {"memory": "budget=40MB"},
    ],
    ids=lambda training: "-".join(training) or "plain",
)
def test_a_count_is_what_a_real_step_holds(training):
    found = assert_counted(small(tiny(), **training))
    assert found.activations > 0 and found.checkpoint < found.peak


KINDS = ("faster_rcnn", "mask_rcnn", "cascade_rcnn", "retinanet")


@pytest.mark.parametrize("kind", [*KINDS, *(pytest.param(k, marks=pytest.mark.slow) for k in ("rfcn", "single_level"))])
def test_every_detector(kind):
    config = dataclasses.replace(getattr(detectors, kind)(), device="cpu")
    assert_counted(config, shape=(128, 96), pictures=2)


def test_the_parts_by_hand():
    config = small(tiny(), optimizer=AdamW(), ema_decay=0.9)
    found = StepAccount(config, "training", device=CPU).count(SHAPE, 2)
    module = new_stage(in_one_process(config, "training", 2), "training", CPU, 2).module
    weights = sum(p.nbytes for p in module.parameters())
    assert found.weights == weights
    assert found.gradients == sum(p.nbytes for p in module.parameters() if p.requires_grad)
    assert weights < found.optimizer / 2 * 1.001 < 1.01 * weights  # two moments, and a step number each
    kept = sum(value.nbytes for value in module.state_dict().values())
    assert found.buffers == kept + sum(buffer.nbytes for buffer in module.buffers())
    assert found.peak == found.weights + found.gradients + found.optimizer + found.buffers + found.activations


class Sine(nn.Module):
    """sum(sin(w x)) over the pictures x: autograd keeps x and w x."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))

    def forward(self, batch, targets):
        return {"sine": (batch.images.float() * self.w).sin().sum()}


def test_the_peak_by_hand():
    """In the backward pass of the sine there are four tensors of the pictures: x, w x, cos(w x), and the gradient."""
    module = Sine()
    stage = Stage(
        config=tiny().training, module=module, optimizer=build_optimizer(module, SGD()), ema=None, device=CPU, seed=0
    )
    pair = worst_pair(module, 2, (32, 64), 1, CPU)
    given = sum(value.nbytes for part in pair for value in vars(part).values() if value is not None)
    floats = 4 * 2 * 3 * 32 * 64
    assert floats == 4 * pair[0].images.nbytes
    assert abs(count_step(stage, pair).activations - given - 4 * floats) < 256


def test_masks_need_the_share_that_a_real_step_reads():
    config = small(dataclasses.replace(tiny(), model=dataclasses.replace(tiny().model, mask_head=MaskHeadConfig())))
    found, shares, _ = real(config, SHAPE, 2)
    assert min(shares) == 0.25, "of 64 regions 16 are positive"
    account = StepAccount(config, "training", device=CPU)
    blind = account.count(SHAPE, 2)
    account.learn(shares, {})
    assert math.isclose(account.count(SHAPE, 2).peak, found.peak, rel_tol=1e-3)
    assert blind.peak > found.peak


def test_the_same_step_is_counted_once(monkeypatch):
    account = StepAccount(small(tiny()), "training", device=CPU)
    first = account.count(SHAPE, 2)
    monkeypatch.setattr(account, "_count", None)
    assert account.count(SHAPE, 2) is first and account.trains_norm


def test_the_norm_policy_is_followed():
    config = small(tiny())
    norm = dataclasses.replace(config.training.norm, kind="fixed")
    account = StepAccount(
        with_stage(config, "training", dataclasses.replace(config.training, norm=norm)), "training", device=CPU
    )
    account.count(SHAPE, 2)
    assert not account.trains_norm


def test_nothing_is_computed():
    """A step that would take terabytes is counted."""
    config = small(tiny())
    found = StepAccount(config, "training", device=CPU).count((64, 64), 10_000_000)
    assert found.peak > 1e13


def test_a_model_that_reads_numbers_is_refused(monkeypatch):
    before = Model.normalise

    def reading(self, batch):
        return before(self, batch) * batch.images.float().sum().item()

    monkeypatch.setattr(Model, "normalise", reading)
    with pytest.raises(ConfigError, match="cannot be counted without a real step"):
        StepAccount(small(tiny()), "training", device=CPU).count(SHAPE, 2)


def test_a_batch_that_cannot_be_trained_on_is_refused():
    with pytest.raises(ConfigError, match="1 pictures of 32 x 32 cannot be trained on: Expected more than 1 value"):
        StepAccount(small(tiny()), "training", device=CPU).count((32, 32), 1)


def test_a_budget_that_is_too_small_is_refused():
    with pytest.raises(ConfigError, match="does not fit into the memory budget"):
        StepAccount(small(tiny(), memory="budget=1MB"), "training", device=CPU).count(SHAPE, 2)


@pytest.mark.gpu
def test_on_a_gpu_the_allocator_holds_nearly_as_much():
    config = dataclasses.replace(tiny(), device="cuda")
    device = torch.device("cuda")
    found, shares, seconds = real(config, (320, 320), 8, device)
    account = StepAccount(config, "training", device=device)
    account.learn(shares, seconds)
    assert math.isclose(account.count((320, 320), 8).peak, found.peak, rel_tol=0.15)
    assert stage_of(config, "training").precision == "float32"
