"""Every detector in small, trained alike on the embedded data set of the demo: 1,200 batches of 8 from random weights.

Each is the published one in all but widths and counts, and in the stride of the single-level ones: 8 instead of 16,
because the objects have 25 to 64 pixels in pictures of 128. The papers stand in the modules of the detectors.
"""

import dataclasses

from gesso.models.anchors import AnchorConfig
from gesso.models.backbone import BackboneConfig
from gesso.models.box_head import BoxHeadConfig
from gesso.models.build import DetectorConfig
from gesso.models.cascade_rcnn import CascadeRCNNConfig
from gesso.models.faster_rcnn import FasterRCNNConfig
from gesso.models.fpn import FPNConfig
from gesso.models.mask_head import MaskHeadConfig
from gesso.models.postprocess import PostprocessConfig
from gesso.models.retinanet import RetinaNetConfig
from gesso.models.rfcn import FineClassifierConfig, RFCNConfig
from gesso.models.roi import RoIPoolConfig, RoISamplingConfig
from gesso.models.rpn import RPNConfig
from gesso.models.single_level import SingleLevelConfig
from gesso.recipes import demo
from gesso.recipes.small import scratch_stage, small_detector
from gesso.run.config import RunConfig

_ATROUS = BackboneConfig(name="resnet10t", pretrained=False, zero_init_residual=False, output_stride=8)
_ONE_LEVEL = AnchorConfig(sizes=(32.0,), scales=(0.75, 1.25, 2.0))
_RPN = RPNConfig(samples=64, before_nms=400, before_nms_test=400, after_nms=150, after_nms_test=150, width=64)
_FEW = PostprocessConfig(candidates=500)


def faster_rcnn() -> RunConfig:
    """Faster R-CNN with a feature pyramid."""
    return _with(small_detector())


def mask_rcnn() -> RunConfig:
    """Mask R-CNN."""
    return _with(dataclasses.replace(small_detector(), mask_head=MaskHeadConfig(width=64, target_side=56)))


def cascade_rcnn() -> RunConfig:
    """Cascade R-CNN with three heads."""
    small = small_detector()
    return _with(
        CascadeRCNNConfig(
            backbone=small.backbone,
            neck=small.neck,
            anchors=small.anchors,
            rpn=small.rpn,
            roi=small.roi,
            pool=small.pool,
            box_head=BoxHeadConfig(width=256, class_agnostic=True),
            postprocess=small.postprocess,
        )
    )


def retinanet() -> RunConfig:
    """RetinaNet."""
    return _with(
        RetinaNetConfig(
            backbone=small_detector().backbone,
            neck=FPNConfig(width=64, inputs=("C3", "C4", "C5"), extra_levels=1, extra="conv_c5"),
            anchors=AnchorConfig(sizes=(24.0, 48.0, 96.0, 192.0), scales=(1.0, 2**0.5)),
            postprocess=_FEW,
        )
    )


def rfcn() -> RunConfig:
    """R-FCN, with hard examples."""
    return _with(
        RFCNConfig(
            backbone=_ATROUS,
            neck=SingleLevelConfig(width=256),
            anchors=_ONE_LEVEL,
            rpn=_RPN,
            roi=RoISamplingConfig(samples=64, hard_examples=True),
            postprocess=_FEW,
        )
    )


def rfcn_3000() -> RunConfig:
    """R-FCN-3000: objectness by position-sensitive maps, the class by a classifier of its own (here ten classes)."""
    model = rfcn().model
    assert isinstance(model, RFCNConfig)
    return _with(dataclasses.replace(model, fine=FineClassifierConfig(width=256)))


def single_level() -> RunConfig:
    """The detector of An Analysis of Pre-Training: one level, ConvProj, FC1, FC2, class-agnostic boxes."""
    return _with(
        FasterRCNNConfig(
            backbone=_ATROUS,
            neck=SingleLevelConfig(width=64),
            anchors=_ONE_LEVEL,
            rpn=_RPN,
            roi=RoISamplingConfig(samples=64),
            pool=RoIPoolConfig(size=14),
            box_head=BoxHeadConfig(width=256, class_agnostic=True),
            postprocess=_FEW,
        )
    )


def _with(model: DetectorConfig) -> RunConfig:
    base = demo.scratch()
    stage = scratch_stage(base.training.input, steps=1200, checkpoint_every=400, evaluate_every=400)
    return dataclasses.replace(base, model=model, training=dataclasses.replace(stage, batch_size=8))
