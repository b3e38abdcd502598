"""What the small recipes share: a detector (ResNet-10-T, a pyramid of 64 channels, few proposals) and its stages.

It is Faster R-CNN as published in all but its widths and counts; objects of a tenth of a picture of 100 to 400 pixels
are its home. The stages are those of "Rethinking Training from Scratch for Object Detection" in small, with AdamW. No
recipe of its own: a recipe is a function that returns a ``RunConfig``.
"""

from typing import Any

from gesso.data.transforms import InputConfig
from gesso.models.anchors import AnchorConfig
from gesso.models.backbone import BackboneConfig
from gesso.models.box_head import BoxHeadConfig
from gesso.models.faster_rcnn import FasterRCNNConfig
from gesso.models.fpn import FPNConfig
from gesso.models.norm import NormPolicy
from gesso.models.postprocess import PostprocessConfig
from gesso.models.roi import RoIPoolConfig, RoISamplingConfig
from gesso.models.rpn import RPNConfig
from gesso.training.optimizer import AdamW
from gesso.training.schedule import ScheduleConfig
from gesso.training.stage import TrainingConfig


def small_detector(*, pretrained: bool = False, backbone: str = "resnet10t") -> FasterRCNNConfig:
    """Faster R-CNN for small pictures; ``backbone`` is any timm name."""
    return FasterRCNNConfig(
        backbone=BackboneConfig(name=backbone, pretrained=pretrained, zero_init_residual=False),
        neck=FPNConfig(width=64),
        anchors=AnchorConfig(sizes=(16.0, 32.0, 64.0, 128.0, 256.0)),
        rpn=RPNConfig(samples=64, before_nms=200, before_nms_test=200, after_nms=150, after_nms_test=150),
        roi=RoISamplingConfig(samples=64),
        pool=RoIPoolConfig(canonical_size=112.0),
        box_head=BoxHeadConfig(fcs=2, width=256),
        postprocess=PostprocessConfig(candidates=500),
    )


def scratch_stage(input: InputConfig, *, steps: int, **changes: Any) -> TrainingConfig:
    """Training from random weights at full resolution, batches of 4."""
    warmup = min(50, steps // 4)
    return _stage(input, steps, batch_size=4, rate=1e-3, schedule=_cosine(warmup, 0.01), changes=changes)


def low_resolution_stage(input: InputConfig, *, steps: int, **changes: Any) -> TrainingConfig:
    """The first stage of direct pre-training: low resolution, batches of 16, a constant rate, batch norm trained."""
    schedule = ScheduleConfig(kind="constant", warmup_steps=min(50, steps // 4), warmup_ratio=0.01)
    return _stage(input, steps, batch_size=16, rate=1e-3, schedule=schedule, changes=changes)


def fine_tuning_stage(input: InputConfig, *, steps: int, **changes: Any) -> TrainingConfig:
    """The second stage: full resolution, batches of 4, half the rate, all batch norm fixed."""
    warmup = min(20, steps // 4)
    changes = {"norm": NormPolicy(kind="fixed"), **changes}
    return _stage(input, steps, batch_size=4, rate=5e-4, schedule=_cosine(warmup, 0.1), changes=changes)


def _cosine(warmup: int, ratio: float) -> ScheduleConfig:
    return ScheduleConfig(kind="cosine", warmup_steps=warmup, warmup_ratio=ratio)


def _stage(
    input: InputConfig, steps: int, *, batch_size: int, rate: float, schedule: ScheduleConfig, changes: dict[str, Any]
) -> TrainingConfig:
    return TrainingConfig(
        steps=steps,
        batch_size=batch_size,
        input=input,
        optimizer=AdamW(rate=rate),
        schedule=schedule,
        clip_norm=10.0,
        **changes,
    )
