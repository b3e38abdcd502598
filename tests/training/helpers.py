"""A tiny module with all that training touches: convolutions, batch norm, dropout, a backbone, frozen parts."""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gesso.random_key import fold
from gesso.structures import ImageBatch, Targets
from gesso.training.checkpoint import Checkpoint, CheckpointState, save_checkpoint
from gesso.training.ema import EMA
from gesso.training.loop import Callbacks
from gesso.training.optimizer import SGD, build_optimizer
from gesso.training.schedule import ScheduleConfig
from gesso.training.stage import Stage, TrainingConfig
from gesso.training.step import Row

CPU = torch.device("cpu")


class Tiny(nn.Module):
    """Two losses of a batch, as a detector has them; ``poison`` is the picture index whose loss is not a number."""

    def __init__(self, *, poison: int | None = None) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.frozen = nn.Conv2d(4, 4, 1).requires_grad_(False)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(4, 5)
        self.unused = nn.Linear(2, 2)
        self.poison = poison

    def forward(self, batch: ImageBatch, targets: Targets) -> dict[str, Tensor]:
        dtype = self.head.weight.dtype
        maps = self.frozen(self.backbone(batch.images.to(dtype) / 255))
        scores = self.head(self.dropout(maps.mean((2, 3))))
        box = F.smooth_l1_loss(scores[:, :4], targets.boxes[:, 0].to(scores.dtype) / 8)
        label = F.cross_entropy(scores, targets.labels[:, 0])
        if self.poison is not None:
            label = label * torch.where((batch.image_index == self.poison).any(), float("nan"), 1.0)
        return {"box": box, "label": label}


def batches(first_sample: int, batch_size: int = 4, seed: int = 3) -> Iterator[tuple[ImageBatch, Targets]]:
    """An endless stream that is a pure function of (seed, first sample)."""
    sample, B = first_sample, batch_size
    while True:
        chance = torch.Generator().manual_seed(fold(seed, sample))
        index = torch.arange(sample, sample + B)
        sizes = torch.full((B, 2), 8)
        images = torch.randint(0, 256, (B, 3, 8, 8), generator=chance, dtype=torch.uint8)
        corner = torch.rand(B, 1, 2, generator=chance) * 4
        yield (
            ImageBatch(
                images=images, sizes=sizes, scale=torch.ones(B, 2), original_sizes=sizes, image_index=index, key=index
            ),
            Targets(
                boxes=torch.cat([corner, corner + 3], 2),
                labels=torch.randint(0, 5, (B, 1), generator=chance),
                valid=torch.ones(B, 1, dtype=torch.bool),
                ignore=torch.zeros(B, 1, dtype=torch.bool),
                box_id=index[:, None] + 1,
            ),
        )
        sample += B


def tiny_config(**changes: object) -> TrainingConfig:
    settings: dict[str, object] = {
        "steps": 8,
        "batch_size": 4,
        "optimizer": SGD(rate=0.1),
        "schedule": ScheduleConfig(warmup_steps=3),
        "clip_norm": 1.0,
        "ema_decay": 0.9,
        "log_every": 3,
        "checkpoint_every": 100,
        "evaluate_every": 100,
    }
    return TrainingConfig(**(settings | changes))  # type: ignore[arg-type]


def new_stage(config: TrainingConfig, *, init: int = 0, poison: int | None = None) -> Stage:
    torch.manual_seed(init)
    module = Tiny(poison=poison)
    module.to(torch.float64 if config.precision == "float64" else torch.float32)
    module.to(memory_format=torch.channels_last)
    ema = None if config.ema_decay is None else EMA(module, config.ema_decay)
    optimizer = build_optimizer(module, config.optimizer)
    return Stage(config=config, module=module, optimizer=optimizer, ema=ema, device=CPU, seed=11)


def state_of(stage: Stage, *, best: int | None = None) -> CheckpointState:
    return CheckpointState(
        step=stage.step,
        stage="training",
        stage_step=stage.step,
        sample=stage.sample,
        seconds=stage.seconds,
        world_size=1,
        threads=torch.get_num_threads(),
        config_hash="0" * 16,
        ema_updates=0 if stage.ema is None else stage.ema.updates,
        best_score=None if best is None else 0.5,
        best_step=best,
    )


def save(stage: Stage, folder: Path, *, keep: int = 3, best: int | None = None) -> Checkpoint:
    return save_checkpoint(folder, state_of(stage, best=best), stage.module, stage.optimizer, stage.ema, keep=keep)


def restore(found: Checkpoint, stage: Stage) -> None:
    found.load_model(stage.module)
    found.load_optimizer(stage.optimizer)
    if stage.ema is not None:
        found.load_ema(stage.ema)
    stage.step, stage.sample, stage.seconds = found.state.stage_step, found.state.sample, found.state.seconds


class Recorder:
    """Callbacks that write down what was called."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.rows: list[tuple[int, Row]] = []
        self.events: list[tuple[str, int]] = []
        self.ticks: list[int] = []
        self.stop_after = stop_after

    def callbacks(self) -> Callbacks:
        return Callbacks(
            row=lambda step, row: self.rows.append((step, row)),
            checkpoint=lambda stage: self.events.append(("checkpoint", stage.step)),
            evaluate=lambda stage: self.events.append(("evaluate", stage.step)),
            tick=self.ticks.append,
            should_stop=lambda: self.stop_after is not None and len(self.ticks) >= self.stop_after,
        )


def everything(stage: Stage) -> dict[str, Tensor]:
    """All tensors that training changes, copied."""
    found = {f"module.{name}": value for name, value in stage.module.state_dict().items()}
    if stage.ema is not None:
        found |= {f"ema.{name}": value for name, value in stage.ema.average.items()}
    names = {parameter: name for name, parameter in stage.module.named_parameters()}
    for parameter, state in stage.optimizer.state.items():
        found |= {f"optimizer.{names[parameter]}.{key}": value for key, value in state.items()}
    return {name: value.detach().clone() for name, value in found.items() if isinstance(value, Tensor)}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, different
