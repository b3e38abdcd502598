"""Large batches: ResNet-50 with a feature pyramid on COCO, at 2 to 256 pictures a step.

Source: Peng et al., "MegDet: A Large Mini-Batch Object Detector", CVPR 2018 (arXiv 1711.07240): Table 2 (batch norm
fixed, at the full and at half the rate), Table 3 (batch norm over groups of pictures), the policies normal and long.
The rate is 0.02 for 16 pictures and in proportion for others. Larger batches start at 0.02 and rise within 500 steps, a
length of our choice, since the paper prints none. All layers are trained, but for batch norm where it is fixed.

``batch_B`` has B pictures a step and batch norm fixed; ``batch_B_bn_N`` takes its statistics over groups of N pictures;
``_half_rate`` and ``_long`` say so. Other combinations are options: ``--training.norm.images 64``,
``--training.optimizer.rate 0.01``, ``--training.batch-size 512``. Groups of 16, 32 and 64 are the 8 GPUs of one machine
with 2, 4 and 8 pictures each. The number of GPUs in a recipe's description is the one that it is meant for: a run
learns the same on any number that divides its batch and can form its groups (docs/distributed.md).
"""

from collections.abc import Callable
from dataclasses import dataclass

from gesso.data.transforms import InputConfig, KeepRatio
from gesso.models.backbone import BackboneConfig
from gesso.models.faster_rcnn import FasterRCNNConfig
from gesso.models.norm import NormPolicy
from gesso.run.config import DataConfig, RunConfig
from gesso.training.optimizer import SGD
from gesso.training.schedule import ScheduleConfig
from gesso.training.stage import TrainingConfig

COCO_IMAGES = 118_287
"""Pictures of train2017; the steps that a recipe shows are for them, those of a run for its own data."""
RATE, BASE_IMAGES, WARMUP_STEPS = 0.02, 16, 500


@dataclass(frozen=True, kw_only=True)
class Policy:
    """When the rate drops, and to what share of itself, in epochs."""

    epochs: int
    drops: tuple[int, ...]
    factors: tuple[float, ...]


NORMAL = Policy(epochs=11, drops=(8, 10), factors=(0.1, 0.1))
LONG = Policy(epochs=18, drops=(11, 14, 17), factors=(0.1, 0.1, 0.5))


def _config(batch_size: int, norm: NormPolicy, policy: Policy, rate: float) -> RunConfig:
    epoch = round(COCO_IMAGES / batch_size)
    return RunConfig(
        model=FasterRCNNConfig(backbone=BackboneConfig(name="resnet50.tv_in1k")),
        data=DataConfig(workers=4),
        training=TrainingConfig(
            epochs=policy.epochs,
            steps=round(policy.epochs * COCO_IMAGES / batch_size),
            batch_size=batch_size,
            input=InputConfig(resize=KeepRatio(short_sides=(800,), long_side=1333)),
            optimizer=SGD(rate=rate, momentum=0.9, weight_decay=1e-4),
            schedule=ScheduleConfig(
                base_images=BASE_IMAGES,
                warmup_steps=WARMUP_STEPS,
                warmup_ratio=None,
                milestones=tuple(epoch / policy.epochs for epoch in policy.drops),
                factors=policy.factors,
            ),
            norm=norm,
            checkpoint_every=min(epoch, 1000),
            evaluate_every=epoch,
        ),
    )


def _row(
    batch_size: int, *, gpus: int, bn: int = 0, policy: Policy = NORMAL, half: bool = False, note: str = ""
) -> Callable[[], RunConfig]:
    """A row of a table as a recipe. ``bn`` is the number of pictures that statistics are taken over; 0 = fixed."""
    norm = NormPolicy(kind="sync", images=bn) if bn else NormPolicy(kind="fixed")
    rate = RATE / 2 if half else RATE

    def recipe() -> RunConfig:
        return _config(batch_size, norm, policy, rate)

    words = [f"{batch_size} pictures a step on {gpus} GPU{'s' * (gpus > 1)}"]
    words += [f"batch norm over {bn} pictures" if bn else "batch norm fixed"]
    words += ["half the rate"] * half + ["long policy"] * (policy is LONG)
    recipe.__doc__ = f"{', '.join(words)}. {note}".strip()
    return recipe


_SOME_FAIL = "The paper reports that some runs did not converge."
_FAILS = "The paper reports that it did not converge."
_WORSE = "The paper reports that it converged, to a lower accuracy."

# Table 2, and the other sizes without batch norm
batch_2 = _row(2, gpus=1)
batch_4 = _row(4, gpus=2)
batch_8 = _row(8, gpus=4)
batch_16 = _row(16, gpus=8)
batch_32 = _row(32, gpus=16, note=_SOME_FAIL)
batch_64 = _row(64, gpus=32, note=_FAILS)
batch_128 = _row(128, gpus=64, note=_FAILS)
batch_256 = _row(256, gpus=128)
batch_16_half_rate = _row(16, gpus=8, half=True)
batch_32_half_rate = _row(32, gpus=16, half=True)
batch_64_half_rate = _row(64, gpus=32, half=True, note=_WORSE)
batch_128_half_rate = _row(128, gpus=64, half=True, note=_FAILS)

# Table 3
batch_2_bn_2 = _row(2, gpus=2, bn=2)
batch_4_bn_4 = _row(4, gpus=4, bn=4)
batch_8_bn_8 = _row(8, gpus=8, bn=8)
batch_16_bn_2 = _row(16, gpus=8, bn=2)
batch_16_bn_16 = _row(16, gpus=8, bn=16)
batch_32_bn_32 = _row(32, gpus=8, bn=32)
batch_64_bn_64 = _row(64, gpus=8, bn=64)
batch_64_bn_32 = _row(64, gpus=16, bn=32)
batch_64_bn_16 = _row(64, gpus=32, bn=16)
batch_128_bn_32 = _row(128, gpus=32, bn=32)
batch_128_bn_16 = _row(128, gpus=64, bn=16)
batch_256_bn_32 = _row(256, gpus=64, bn=32)
batch_256_bn_16 = _row(256, gpus=128, bn=16)
batch_16_bn_16_long = _row(16, gpus=8, bn=16, policy=LONG)
batch_32_bn_32_long = _row(32, gpus=8, bn=32, policy=LONG)
batch_64_bn_32_long = _row(64, gpus=16, bn=32, policy=LONG)
batch_128_bn_32_long = _row(128, gpus=32, bn=32, policy=LONG)
batch_256_bn_32_long = _row(256, gpus=64, bn=32, policy=LONG)
batch_256_bn_16_long = _row(256, gpus=128, bn=16, policy=LONG)
