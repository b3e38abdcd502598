"""A recipe for tests: everything that a real run does, in seconds on a CPU."""

from gesso.data.demo import DemoConfig
from gesso.data.transforms import InputConfig, KeepRatio
from gesso.models.norm import NormPolicy
from gesso.recipes.small import small_detector
from gesso.run.config import DataConfig, RunConfig
from gesso.training.optimizer import SGD
from gesso.training.schedule import ScheduleConfig
from gesso.training.stage import TrainingConfig


def tiny() -> RunConfig:
    """Seconds on a CPU: 12 steps of 8 pictures of 64 pixels, batch norm synchronised over the global batch."""
    return RunConfig(
        model=small_detector(),
        data=DataConfig(
            embedded=DemoConfig(images=32, side=64, objects=(1, 3), scale=(0.2, 0.5)), embedded_val=8, workers=0
        ),
        training=TrainingConfig(
            steps=12,
            batch_size=8,
            input=InputConfig(resize=KeepRatio(short_sides=(64,), long_side=96)),
            optimizer=SGD(rate=0.01),
            schedule=ScheduleConfig(kind="constant", warmup_steps=4, warmup_ratio=0.1),
            norm=NormPolicy(kind="sync"),
            clip_norm=10.0,
            log_every=1,
            checkpoint_every=4,
            evaluate_every=12,
            keep_checkpoints=3,
        ),
    )
