"""Direct pre-training on data of one's own, at the scale of one small GPU or a CPU.

Source: "Rethinking Training from Scratch for Object Detection", section 3: pre-train the whole detector on the target
data at low resolution with large batches and trained batch norm; then fine-tune at full resolution with batch norm
fully fixed. The paper's own settings (Tables 1 to 10) come as recipes of their own.
"""

from gesso.data.transforms import Direct, InputConfig, KeepRatio
from gesso.recipes.small import fine_tuning_stage, low_resolution_stage, scratch_stage, small_detector
from gesso.run.config import RunConfig

_COLOUR = {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2}
_FULL = InputConfig(resize=KeepRatio(short_sides=(320,), long_side=427), **_COLOUR)
_LOW = InputConfig(resize=Direct(side=160), **_COLOUR)


def small() -> RunConfig:
    """Direct pre-training of a small detector on any index: 160 pixels in batches of 16, then 320 in batches of 4."""
    return RunConfig(
        model=small_detector(),
        pretraining=low_resolution_stage(_LOW, steps=1000, checkpoint_every=200, evaluate_every=500),
        training=fine_tuning_stage(_FULL, steps=1500, checkpoint_every=250, evaluate_every=500),
    )


def small_scratch() -> RunConfig:
    """The baseline of direct:small: the same detector from random weights at full resolution."""
    return RunConfig(
        model=small_detector(), training=scratch_stage(_FULL, steps=2500, checkpoint_every=250, evaluate_every=500)
    )
