"""The run of the tests, ``debug:tiny`` on an embedded data set that all tests share, and how two runs are compared."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from gesso.data.transforms import Direct, InputConfig
from gesso.recipes.debug import tiny
from gesso.run.config import RunConfig
from gesso.run.observer import Observer
from gesso.training.optimizer import AdamW
from gesso.training.stage import TrainingConfig
from gesso.training.timing import PHASES

BACKBONE = "test_resnet"
TIMES = ("seconds", "images_per_second", "images_per_second_per_gpu", "step_seconds", "eta_seconds", "memory_gib")
SHARES = tuple(f"{phase}_share" for phase in PHASES)


@dataclasses.dataclass(frozen=True)
class Data:
    """Indexes of the shared data set."""

    train: Path
    val: Path


def tiny_run(data: Data | None, *, seed: int = 0, workers: int = 0, val: bool = True, **training: Any) -> RunConfig:
    """``debug:tiny`` on named indexes, with timm's smallest backbone; ``training`` changes its stage."""
    config = tiny()
    backbone = dataclasses.replace(config.model.backbone, name=BACKBONE)
    named = {} if data is None else {"train": data.train, "val": data.val if val else None}
    return dataclasses.replace(
        config,
        seed=seed,
        model=dataclasses.replace(config.model, backbone=backbone),
        data=dataclasses.replace(config.data, workers=workers, **named),
        training=dataclasses.replace(config.training, **training),
    )


def two_stages(data: Data) -> RunConfig:
    """Pre-training with averages and AdamW, then training: everything that a checkpoint must carry."""
    config = tiny_run(data, steps=3, batch_size=4, checkpoint_every=2, evaluate_every=2)
    first = dataclasses.replace(
        config.training,
        steps=3,
        input=InputConfig(resize=Direct(side=32)),
        ema_decay=0.9,
        optimizer=AdamW(rate=1e-3),
        evaluate_every=10,
        checkpoint_every=2,
    )
    return dataclasses.replace(config, pretraining=first)


def with_training(config: RunConfig, **changes: Any) -> RunConfig:
    training: TrainingConfig = dataclasses.replace(config.training, **changes)
    return dataclasses.replace(config, training=training)


class StopAfter(Observer):
    """Asks to stop after a number of steps of a process; remembers what it was told."""

    def __init__(self, steps: int | None = None, then: Callable[[int], None] | None = None) -> None:
        self.steps, self.then = steps, then
        self.count = 0
        self.seen: list[tuple[str, int]] = []
        self.planned: tuple[list[tuple[str, int]], int] | None = None
        self.should_stop = lambda: self.steps is not None and self.count >= self.steps

    def plan(self, stages: list[tuple[str, int]], evaluations: int) -> None:
        self.planned = (stages, evaluations)

    def step(self, stage: str, step: int) -> None:
        self.count += 1
        self.seen.append((stage, step))
        if self.then is not None:
            self.then(self.count)


def rows(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without times; every line must be whole."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES + SHARES} for line in lines]


def newest(run: Path) -> Path:
    return max(path for path in (run / "checkpoints").iterdir() if path.name.isdigit())


def tensors(run: Path) -> dict[str, Tensor]:
    """Everything in the newest checkpoint: weights, buffers, averages and the optimizer's state."""
    folder = newest(run)
    found = {f"{f.name}/{name}": value for f in folder.glob("*.safetensors") for name, value in load_file(f).items()}
    return found | dict(_leaves(torch.load(folder / "optimizer.pt", weights_only=True), "optimizer"))


def _leaves(value: Any, name: str) -> list[tuple[str, Tensor]]:
    if isinstance(value, Mapping):
        return [leaf for key, inner in value.items() for leaf in _leaves(inner, f"{name}/{key}")]
    if isinstance(value, list | tuple):
        return [leaf for key, inner in enumerate(value) for leaf in _leaves(inner, f"{name}/{key}")]
    if isinstance(value, Tensor):
        return [(name, value)]
    return [(name, torch.tensor(value, dtype=torch.float64))] if isinstance(value, int | float) else []


def differences(a: Path, b: Path) -> list[str]:
    """The names of what is not equal bit for bit in the newest checkpoints, rows and detections of two runs."""
    one, two = tensors(a), tensors(b)
    found = sorted(one.keys() ^ two.keys())
    found += [name for name in one.keys() & two.keys() if not torch.equal(one[name], two[name])]
    found += [] if rows(a) == rows(b) else ["metrics.jsonl"]
    for file in sorted((a / "detections").glob("*/*.parquet")):
        if file.read_bytes() != (b / file.relative_to(a)).read_bytes():
            found.append(str(file.relative_to(a)))
    return found
