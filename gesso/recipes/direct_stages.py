"""What the recipes of direct pre-training share: the detectors of its published code, and the stages of a run.

Source: "Rethinking Training from Scratch for Object Detection" (Li et al. 2021, arXiv 2106.03112) and its published
configurations. No recipe of its own: a recipe is a function that returns a ``RunConfig``.

Lengths are pictures: ``ONE_X`` is 12 passes over the 117,266 pictures of COCO's train2017 that have boxes, ``P1X`` is
48. Rates are those for 16 pictures a step, and in proportion for others. Where the published detector cannot be had
exactly: regions are sampled 2 x 2 times a cell, there as often as their size suggests; ignored objects are no
negatives, there they may be; and Swin's maps have no norm of their own.
"""

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from gesso.data.transforms import Direct, ImageNetCrop, InputConfig, KeepRatio
from gesso.models.backbone import BackboneConfig
from gesso.models.box_head import BoxHeadConfig
from gesso.models.build import DetectorConfig
from gesso.models.cascade_rcnn import CascadeRCNNConfig
from gesso.models.faster_rcnn import FasterRCNNConfig
from gesso.models.fpn import FPNConfig
from gesso.models.layers import Norm
from gesso.models.losses import BoxLossConfig
from gesso.models.mask_head import MaskHeadConfig
from gesso.models.norm import NormPolicy
from gesso.models.retinanet import RetinaNetConfig
from gesso.models.roi import RoIPoolConfig
from gesso.models.rpn import RPNConfig
from gesso.training.optimizer import SGD, AdamW
from gesso.training.schedule import ScheduleConfig
from gesso.training.stage import TrainingConfig

COCO_IMAGES = 117_266
"""Pictures of train2017 with boxes: the others are left out, as the published code does."""
ONE_X, P1X = 12 * COCO_IMAGES, 48 * COCO_IMAGES
"""Pictures of 1x and of P1x."""
BASE_IMAGES, GPUS = 16, 8
"""Pictures of a step that rates are stated for; GPUs of the paper."""

RESNET = BackboneConfig(name="resnet50", pretrained=False, zero_init_residual=False)
RESNET_IMAGENET = BackboneConfig(name="resnet50.tv_in1k")
"""The weights of torchvision's first version, which the published configurations name."""
SWIN = BackboneConfig(name="swin_tiny_patch4_window7_224", pretrained=False, drop_path=0.2)
SWIN_IMAGENET = BackboneConfig(name="swin_tiny_patch4_window7_224.ms_in1k", drop_path=0.2)
FIXED, AFFINE, SYNC = NormPolicy(kind="fixed"), NormPolicy(kind="affine"), NormPolicy(kind="sync")

Resize: TypeAlias = KeepRatio | Direct | ImageNetCrop
FULL = KeepRatio(short_sides=(800,), long_side=1333)
LOW = Direct(side=448, low=0.8, high=1.2, mode="keep")

_L1 = BoxLossConfig(kind="l1")
_POOL = RoIPoolConfig(aligned=True)

TWO_DROPS = ScheduleConfig(
    base_images=BASE_IMAGES, warmup_steps=500, warmup_ratio=0.001, milestones=(8 / 12, 11 / 12), factor=0.1
)


def faster_rcnn(
    backbone: BackboneConfig, *, convs: int = 4, masks: bool = False, norm: Norm = "none"
) -> DetectorConfig:
    """Faster R-CNN, or Mask R-CNN.

    Args:
        backbone: its backbone.
        convs: 4 and one fully connected layer are the head of direct pre-training; 0 gives two fully connected layers.
        masks: whether there is a mask head.
        norm: behind the convolutions of the pyramid and the heads.
    """
    return FasterRCNNConfig(
        backbone=backbone,
        neck=FPNConfig(norm=norm),
        rpn=RPNConfig(after_nms=1000, box_loss=_L1),
        pool=_POOL,
        box_head=BoxHeadConfig(convs=convs, fcs=1 if convs else 2, norm=norm, box_loss=_L1),
        mask_head=MaskHeadConfig(norm=norm) if masks else None,
    )


def cascade_rcnn(backbone: BackboneConfig) -> DetectorConfig:
    """Cascade R-CNN, three heads of two fully connected layers."""
    head = BoxHeadConfig(class_agnostic=True, box_loss=BoxLossConfig(beta=1.0))
    return CascadeRCNNConfig(backbone=backbone, pool=_POOL, box_head=head)


def retinanet(backbone: BackboneConfig) -> DetectorConfig:
    """RetinaNet."""
    return RetinaNetConfig(backbone=backbone)


def sgd(rate: float, *, norm_decay: float) -> SGD:
    """The field's SGD; biases decay as weights do, norm parameters as told."""
    return SGD(rate=rate, momentum=0.9, weight_decay=1e-4, bias_decay=1e-4, norm_decay=norm_decay)


_PRE, _TUNE = sgd(0.02, norm_decay=0.0), sgd(0.02, norm_decay=1e-4)
_ADAM_W = AdamW(rate=1e-4, betas=(0.9, 0.999), weight_decay=0.05, bias_decay=0.05)


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """A detector of the paper and how it is trained; all rates are for 16 pictures."""

    name: str
    """As the paper calls it."""
    random: DetectorConfig
    """With a random backbone."""
    imagenet: DetectorConfig
    """The baseline, with a backbone trained on ImageNet."""
    pretraining: SGD | AdamW = _PRE
    """The optimizer of direct pre-training."""
    fine_tuning: SGD | AdamW = _TUNE
    """The optimizer of fine-tuning."""
    baseline: SGD | AdamW = _TUNE
    """The optimizer of the baseline."""
    warmup_steps: int = 500
    """Of direct pre-training."""
    frozen_stages: int = 1
    """Of fine-tuning and of the baseline."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of every stage."""


MASK = Trainee(
    name="Mask R-CNN",
    random=faster_rcnn(RESNET, masks=True),
    imagenet=faster_rcnn(RESNET_IMAGENET, convs=0, masks=True),
)
FASTER = Trainee(name="Faster R-CNN", random=faster_rcnn(RESNET), imagenet=faster_rcnn(RESNET_IMAGENET, convs=0))
CASCADE = Trainee(name="Cascade R-CNN", random=cascade_rcnn(RESNET), imagenet=cascade_rcnn(RESNET_IMAGENET))
RETINANET = Trainee(
    name="RetinaNet",
    random=retinanet(RESNET),
    imagenet=retinanet(RESNET_IMAGENET),
    pretraining=sgd(0.01, norm_decay=0.0),
    baseline=sgd(0.01, norm_decay=1e-4),
    warmup_steps=1000,
)
SWIN_MASK = Trainee(
    name="Mask R-CNN on Swin-T",
    random=faster_rcnn(SWIN, masks=True),
    imagenet=faster_rcnn(SWIN_IMAGENET, masks=True),
    pretraining=_ADAM_W,
    fine_tuning=_ADAM_W,
    baseline=_ADAM_W,
    frozen_stages=-1,
    precision="bfloat16",
)


def stage(images: int, batch_size: int, **settings: Any) -> TrainingConfig:
    """A stage over so many pictures, repeats included; it is evaluated twelve times."""
    steps = round(images / batch_size)
    return TrainingConfig(
        images=images,
        steps=steps,
        batch_size=batch_size,
        checkpoint_every=min(1000, steps),
        evaluate_every=-(-steps // 12),
        **settings,
    )


def pretraining_stage(trainee: Trainee, images: int, *, resize: Resize = LOW, per_gpu: int = 8) -> TrainingConfig:
    """Direct pre-training: low resolution, a constant rate, batch norm trained over the pictures of one of 8 GPUs."""
    return stage(
        images,
        per_gpu * GPUS,
        precision=trainee.precision,
        input=InputConfig(resize=resize),
        optimizer=trainee.pretraining,
        schedule=ScheduleConfig(
            kind="constant", base_images=BASE_IMAGES, warmup_steps=trainee.warmup_steps, warmup_ratio=0.01
        ),
        norm=NormPolicy(kind="sync", images=per_gpu),
        frozen_stages=-1,
    )


def full_stage(
    images: int, optimizer: SGD | AdamW, *, norm: NormPolicy, schedule: ScheduleConfig = TWO_DROPS, **settings: Any
) -> TrainingConfig:
    """Training at full resolution, 16 pictures a step: fine-tuning and its baselines."""
    settings = {"input": InputConfig(resize=FULL), **settings}
    return stage(images, BASE_IMAGES, optimizer=optimizer, norm=norm, schedule=schedule, **settings)
