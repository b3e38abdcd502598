"""Classifiers of whole pictures: ImageNet, folders of classes, and fine-tuning of pre-trained backbones.

Source of ``imagenet``: Goyal et al., "Accurate, Large Minibatch SGD", 2017, section 5.1: ResNet-50, 90 passes, batch
norm over the 32 pictures of one of 8 GPUs. ``fine_tune`` is for the comparison of "An Analysis of Pre-Training on
Object Detection" (Li et al. 2019), whose settings we could not find: a tenth of the rate over 30 passes is our choice.
The ``small`` recipes are ours, for one small GPU or a CPU.

A classifier's run is a start for detectors with the same backbone: ``gesso train direct:small_fine_tune --init RUN``.
"""

from gesso.data.transforms import ImageNetCrop, InputConfig
from gesso.models.backbone import BackboneConfig
from gesso.models.classifier import ClassifierConfig
from gesso.models.norm import NormPolicy
from gesso.recipes.small import small_detector
from gesso.run.config import DataConfig, RunConfig
from gesso.training.optimizer import SGD, AdamW
from gesso.training.schedule import ScheduleConfig
from gesso.training.stage import TrainingConfig

IMAGENET_IMAGES = 1_281_167
"""Pictures of ILSVRC 2012; the steps that ``imagenet`` shows are for them, those of a run for its own data."""
SUN_IMAGES = 19_850
"""Training pictures of SUN-397; the steps that ``fine_tune`` shows are for them, those of a run for its own data."""
_INPUT = InputConfig(resize=ImageNetCrop(side=224, inference="centre"))
_SMALL_INPUT = InputConfig(resize=ImageNetCrop(side=96, area=(0.25, 1.0), inference="centre"))
_SMALL = ClassifierConfig(backbone=small_detector().backbone)


def imagenet() -> RunConfig:
    """ResNet-50 from random weights, 90 passes: crops of 224, 256 pictures a step, the rate 0.1 and three drops."""
    return RunConfig(
        model=ClassifierConfig(backbone=BackboneConfig(name="resnet50", pretrained=False)),
        data=DataConfig(workers=8, inference_batch_size=64),
        training=TrainingConfig(
            epochs=90,
            steps=round(90 * IMAGENET_IMAGES / 256),
            batch_size=256,
            input=_INPUT,
            optimizer=SGD(rate=0.1, momentum=0.9, weight_decay=1e-4, bias_decay=1e-4),
            schedule=ScheduleConfig(base_images=256, warmup_steps=0, milestones=(30 / 90, 60 / 90, 80 / 90)),
            norm=NormPolicy(kind="sync", images=32),
            checkpoint_every=1000,
            evaluate_every=5004,
        ),
    )


def fine_tune() -> RunConfig:
    """ResNet-50 from the backbone of any run (--init), or from ImageNet: 30 passes, 64 pictures a step."""
    return RunConfig(
        model=ClassifierConfig(backbone=BackboneConfig(name="resnet50.tv_in1k")),
        data=DataConfig(workers=4, inference_batch_size=64),
        init_parts=("backbone",),
        training=TrainingConfig(
            epochs=30,
            steps=round(30 * SUN_IMAGES / 64),
            batch_size=64,
            input=_INPUT,
            optimizer=SGD(rate=0.01, momentum=0.9, weight_decay=1e-4, bias_decay=1e-4),
            schedule=ScheduleConfig(kind="cosine", base_images=64, warmup_steps=100, warmup_ratio=0.1),
            norm=NormPolicy(kind="sync", images=32),
            checkpoint_every=500,
            evaluate_every=500,
        ),
    )


def small() -> RunConfig:
    """ResNet-10-T from random weights on a folder of classes: 2,000 steps of 64 pictures of 96 pixels."""
    return RunConfig(model=_SMALL, training=_small_stage(steps=2000, rate=2e-3))


def small_fine_tune() -> RunConfig:
    """classify:small from the backbone of any run with this backbone (--init): 600 steps, a quarter of the rate."""
    return RunConfig(model=_SMALL, init_parts=("backbone",), training=_small_stage(steps=600, rate=5e-4))


def _small_stage(*, steps: int, rate: float) -> TrainingConfig:
    return TrainingConfig(
        steps=steps,
        batch_size=64,
        input=_SMALL_INPUT,
        optimizer=AdamW(rate=rate),
        schedule=ScheduleConfig(kind="cosine", warmup_steps=50, warmup_ratio=0.01),
        clip_norm=10.0,
        checkpoint_every=200,
        evaluate_every=200,
    )
