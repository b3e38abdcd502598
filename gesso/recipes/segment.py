"""Semantic segmentation: PSPNet and DeepLab from the backbone of a detector, a classifier, or ImageNet.

Sources: ``pspnet`` is the network of Objects365, Tables 9 and 10, trained as Zhao et al., "Pyramid Scene Parsing
Network", 2017, section 4.1, but on crops of 480 pixels instead of 473, since sides are multiples of 32, of pictures
that are made 0.5 to 2 times as large as the crop, and neither turned nor blurred. ``deeplab`` is the network of "An
Analysis of Pre-Training on Object Detection" (Li et al. 2019, section 4.2) with its size of pictures, trained as Dai et
al., "Deformable Convolutional Networks", 2017, section 4.1. ``small`` is ours, for one small GPU or a CPU; it has the
plain head because PSPNet's learns much more slowly from random weights.

All load the backbone alone from weights named by --init, whatever they were trained for.
"""

from gesso.data.transforms import Direct, InputConfig, KeepRatio
from gesso.models.backbone import BackboneConfig
from gesso.models.norm import NormPolicy
from gesso.models.segmenter import DeepLabConfig, PSPConfig, SegmenterConfig
from gesso.run.config import DataConfig, RunConfig
from gesso.training.optimizer import SGD, AdamW
from gesso.training.schedule import ScheduleConfig
from gesso.training.stage import TrainingConfig

_DATA = DataConfig(workers=4, inference_batch_size=4)


def pspnet() -> RunConfig:
    """PSPNet with ResNet-50 on VOC 2012 with the extra pictures of SBD: 30,000 steps of 16 crops of 480 pixels."""
    return _pspnet(steps=30_000, background=True)


def pspnet_ade20k() -> RunConfig:
    """PSPNet with ResNet-50 on ADE20K, where value 0 of a map is no class: 150,000 steps of 16 crops of 480 pixels."""
    return _pspnet(steps=150_000, background=False)


def deeplab() -> RunConfig:
    """DeepLab with deformable ResNet-101 on VOC 2012: 30,000 steps of 8 pictures of 360 pixels, batch norm fixed."""
    backbone = BackboneConfig(
        name="resnet101.tv_in1k", output_stride=16, deformable_stages=(4,), deformable_version=1, deformable_groups=4
    )
    return RunConfig(
        model=SegmenterConfig(backbone=backbone, head=DeepLabConfig()),
        data=_DATA,
        init_parts=("backbone",),
        training=TrainingConfig(
            steps=30_000,
            batch_size=8,
            input=InputConfig(resize=KeepRatio(short_sides=(360,), long_side=600)),
            optimizer=SGD(rate=1e-3, momentum=0.9, weight_decay=5e-4),
            schedule=ScheduleConfig(base_images=8, warmup_steps=0, milestones=(2 / 3,)),
            norm=NormPolicy(kind="fixed"),
            frozen_stages=1,
            evaluate_every=5000,
        ),
    )


def small() -> RunConfig:
    """PSPNet in small, ResNet-10-T at stride 8, on any index with maps: 1,500 steps of 8 crops of 128."""
    backbone = BackboneConfig(name="resnet10t", pretrained=False, zero_init_residual=False, output_stride=8)
    return RunConfig(
        model=SegmenterConfig(backbone=backbone, head=DeepLabConfig()),
        init_parts=("backbone",),
        training=TrainingConfig(
            steps=1500,
            batch_size=8,
            input=InputConfig(resize=Direct(side=128)),
            optimizer=AdamW(rate=1e-3),
            schedule=ScheduleConfig(kind="poly", warmup_steps=50, warmup_ratio=0.01),
            clip_norm=10.0,
            checkpoint_every=250,
            evaluate_every=500,
        ),
    )


def _pspnet(*, steps: int, background: bool) -> RunConfig:
    backbone = BackboneConfig(name="resnet50.tv_in1k", output_stride=8)
    return RunConfig(
        model=SegmenterConfig(backbone=backbone, head=PSPConfig(auxiliary=0.4), background=background),
        data=_DATA,
        init_parts=("backbone",),
        training=TrainingConfig(
            steps=steps,
            batch_size=16,
            input=InputConfig(resize=Direct(side=480, low=0.5, high=2.0)),
            optimizer=SGD(rate=0.01, momentum=0.9, weight_decay=1e-4, bias_decay=1e-4, norm_decay=1e-4),
            schedule=ScheduleConfig(kind="poly", power=0.9, base_images=16, warmup_steps=0),
            norm=NormPolicy(kind="sync"),
            evaluate_every=steps // 6,
        ),
    )
