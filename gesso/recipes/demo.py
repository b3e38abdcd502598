"""The demo: handwritten digits in photographs, at 128 pixels, small enough for two CPU cores.

Source of the comparison: "Rethinking Training from Scratch for Object Detection" (direct pre-training), Tables 1 and 2:
the whole detector is first trained on the target data at half the resolution, with large batches and trained batch
norm, then at full resolution with batch norm fixed. Both recipes spend the same time on training.
"""

from gesso.data.demo import DemoConfig
from gesso.data.transforms import Direct, InputConfig, KeepRatio
from gesso.recipes.small import fine_tuning_stage, low_resolution_stage, scratch_stage, small_detector
from gesso.run.config import DataConfig, RunConfig

SIDE = 128
_SCENES = DemoConfig(images=1000, side=SIDE, objects=(1, 4), scale=(0.2, 0.5), occlusion=0.3, crowding=0.1)
_DATA = DataConfig(embedded=_SCENES, embedded_val=200, workers=0)
_FULL = InputConfig(resize=KeepRatio(short_sides=(SIDE,), long_side=SIDE), flip=0.0)
_LOW = InputConfig(resize=Direct(side=SIDE // 2), flip=0.0)  # digits are not mirrored


def scratch() -> RunConfig:
    """The baseline of the demo: from random weights at full resolution."""
    return RunConfig(
        model=small_detector(),
        data=_DATA,
        training=scratch_stage(_FULL, steps=690, checkpoint_every=230, evaluate_every=345),
    )


def direct() -> RunConfig:
    """Direct pre-training of the demo: half resolution in large batches, then full resolution, batch norm fixed."""
    return RunConfig(
        model=small_detector(),
        data=_DATA,
        pretraining=low_resolution_stage(_LOW, steps=255, checkpoint_every=130, evaluate_every=1000),
        training=fine_tuning_stage(_FULL, steps=345, checkpoint_every=175, evaluate_every=175),
    )
