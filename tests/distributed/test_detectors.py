"""A step of every detector by two processes is that of one process on the whole batch, with a process without boxes."""

import dataclasses

import numpy as np
import pytest
import torch

from gesso import distributed
from gesso.models.build import build_detector
from gesso.models.mask_head import MaskHeadConfig
from gesso.models.norm import NormPolicy, apply_norm_policy
from gesso.recipes import detectors
from gesso.structures import map_tensors
from gesso.training.optimizer import SGD, build_optimizer
from gesso.training.schedule import ScheduleConfig
from gesso.training.stage import Stage, TrainingConfig
from gesso.training.step import train_step
from tests.distributed.processes import run
from tests.models.helpers import NUM_CLASSES, random_batch, tiny_config

MASKS = MaskHeadConfig(width=16, convs=1, samples=16, target_side=28)


def _cascade_with_masks():
    return dataclasses.replace(detectors.cascade_rcnn().model, mask_head=MASKS)


def _retinanet_by_image():
    model = detectors.retinanet().model
    return dataclasses.replace(model, head=dataclasses.replace(model.head, mean="image"))


def _without_hard_examples(model):
    """Hard examples are drawn among the regions of one process: such a run depends on the number of processes."""
    return dataclasses.replace(model, roi=dataclasses.replace(model.roi, hard_examples=False))


CASES = {
    "faster_rcnn": lambda: detectors.faster_rcnn().model,
    "mask_rcnn": lambda: dataclasses.replace(detectors.faster_rcnn().model, mask_head=MASKS),
    "cascade_rcnn": lambda: detectors.cascade_rcnn().model,
    "cascade_masks": _cascade_with_masks,
    "retinanet": lambda: detectors.retinanet().model,
    "retinanet_by_image": _retinanet_by_image,
    "rfcn": lambda: _without_hard_examples(detectors.rfcn().model),
    "rfcn_3000": lambda: _without_hard_examples(detectors.rfcn_3000().model),
    "single_level": lambda: detectors.single_level().model,
    "everything": lambda: _without_hard_examples(tiny_config("everything")),
}


def _stage(case):
    torch.manual_seed(0)
    detector = build_detector(CASES[case](), NUM_CLASSES)
    apply_norm_policy(detector, NormPolicy(kind="fixed"))
    detector.double()
    config = TrainingConfig(
        steps=3,
        batch_size=4,
        optimizer=SGD(rate=1e-3),
        schedule=ScheduleConfig(warmup_steps=0),
        clip_norm=None,
        precision="float64",
    )
    optimizer = build_optimizer(detector, config.optimizer)
    return Stage(config=config, module=detector, optimizer=optimizer, ema=None, device=torch.device("cpu"), seed=5)


def _part(masks, boxless):
    """This process's share of four pictures, of which the second half has no object where ``boxless``."""
    batch, targets = random_batch(count=4, side=64, masks=masks, seed=3)
    if boxless:
        targets = map_tensors(targets, lambda tensor: torch.cat([tensor[:2], torch.zeros_like(tensor[2:])]))
    own = torch.arange(4).tensor_split(distributed.world_size())[distributed.rank()]
    return map_tensors(batch, lambda tensor: tensor[own]), map_tensors(targets, lambda tensor: tensor[own])


def _steps(case):
    """The numbers and every gradient of three steps, the second one with a process without any box.

    A parameter without a gradient in one of the processes fails the next step under DDP.
    """
    torch.set_num_threads(1)
    stage = _stage(case)
    found = []
    for boxless in (False, True, False):
        numbers, finite = train_step(stage, *_part(stage.module.mask_side > 0, boxless)).read()
        assert finite
        trained = {name: p.grad for name, p in stage.module.named_parameters() if p.requires_grad}
        found.append((numbers, {name: None if grad is None else grad.numpy().copy() for name, grad in trained.items()}))
        stage.step += 1
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_do_the_step_of_one(case):
    alone = _steps(case)
    for found in run(_steps, 2, case):
        for (numbers, gradients), (wanted, expected) in zip(found, alone, strict=True):
            assert numbers == pytest.approx(wanted, rel=1e-8, abs=1e-10)
            assert gradients.keys() == expected.keys()
            for name, gradient in gradients.items():
                assert gradient is not None and expected[name] is not None, f"{name} has no gradient"
                np.testing.assert_allclose(gradient, expected[name], rtol=1e-8, atol=1e-10, err_msg=name)
    for numbers, _ in alone:
        losses = [value for name, value in numbers.items() if not name.endswith(("_ratio", "gradient_norm"))]
        assert len(losses) > 2 and all(value > 0 for value in losses), numbers
