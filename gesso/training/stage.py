"""One stage of training: its configuration, and what changes in it from step to step."""

import functools
import resource
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from gesso import distributed
from gesso.data.transforms import InputConfig
from gesso.errors import ConfigError
from gesso.models.losses import BatchLosses
from gesso.models.model import Model
from gesso.models.norm import NormPolicy
from gesso.structures import ImageBatch, Targets
from gesso.training.ema import EMA
from gesso.training.memory import parse_memory
from gesso.training.optimizer import SGD, AdamW
from gesso.training.schedule import ScheduleConfig
from gesso.training.timing import Cost

MOST_GRAPHS = 64
"""Two stages of five padded shapes at five short sides each are 50; torch's own limit is 8."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One stage of training."""

    steps: int = 90_000
    """Optimizer steps of the stage."""
    epochs: float | None = None
    """Passes over the training data instead of ``steps``, which follow from it when the run begins."""
    images: int | None = None
    """Pictures to train on, repeats included, instead of ``steps``, which follow from it and the batch size."""
    batch_size: int = 16
    """Pictures of a step, over all processes."""
    accumulate: int = 1
    """Parts that a process does its pictures of a step in, one after the other, to save memory. The gradient is that
    of the whole; batch norm sees one part at a time."""
    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    """bfloat16 is mixed precision; float64 is for tests."""
    input: InputConfig = field(default_factory=InputConfig)
    """How pictures are resized and augmented."""
    optimizer: SGD | AdamW = field(default_factory=SGD)
    """The optimizer."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The learning rate over the steps."""
    norm: NormPolicy = field(default_factory=NormPolicy)
    """What batch norm does."""
    frozen_stages: int | None = None
    """How much of the backbone is frozen in this stage, as ``model.backbone.frozen_stages`` counts; None = as that
    says."""
    clip_norm: float | None = None
    """The largest norm of all gradients together; None = no clipping."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the weights, and evaluate it; None = none."""
    precise_bn: int = 0
    """Pictures, rounded up to whole batches, over which the running statistics are taken anew at the end of the stage;
    0 = they stay as they are."""
    memory: str = "none"
    """Activations of backbone and neck that are computed twice to save memory: none, stages, sqrt (Chen et al. 2016),
    or budget=11GB, the cheapest choice that fits."""
    compile: bool | None = None
    """Compile the step as one graph; None = on a GPU, not on a CPU."""
    log_every: int = 20
    """Steps between rows of metrics.jsonl (steps 1, 2, 5 and 10 are always logged)."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; the last step and every evaluation make one too."""
    evaluate_every: int = 5000
    """Steps between evaluations; the last step of the run is always evaluated."""
    keep_checkpoints: int = 2
    """How many checkpoints stay, beside the best one."""

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "accumulate",
            "log_every",
            "checkpoint_every",
            "evaluate_every",
            "keep_checkpoints",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"training: {name} must be at least 1, found {getattr(self, name)}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(f"training: clip_norm must be above 0, found {self.clip_norm}")
        if self.epochs is not None and not self.epochs > 0:
            raise ConfigError(f"training: epochs must be above 0, found {self.epochs}")
        if self.images is not None and self.images < 1:
            raise ConfigError(f"training: images must be at least 1, found {self.images}")
        if self.images is not None and self.epochs is not None:
            raise ConfigError("training: epochs and images both say how long it is", remedy="Set one of them to None.")
        if self.frozen_stages is not None and not -1 <= self.frozen_stages <= 4:
            raise ConfigError(f"training: frozen_stages must lie between -1 and 4, found {self.frozen_stages}")
        parse_memory(self.memory)
        if self.precise_bn < 0:
            raise ConfigError(f"training: precise_bn must be at least 0, found {self.precise_bn}")
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"training: {self.batch_size} pictures do not fall into accumulate = {self.accumulate} parts"
            )
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ConfigError(f"training: ema_decay must lie in [0, 1), found {self.ema_decay}")


@dataclass(kw_only=True)
class Stage:
    """A stage in progress: what changes from step to step."""

    config: TrainingConfig
    module: nn.Module
    optimizer: torch.optim.Optimizer
    ema: EMA | None
    device: torch.device
    seed: int
    step: int = 0
    sample: int = 0
    seconds: float = 0.0
    stopped: bool = False
    cost: Cost = field(default_factory=Cost)
    alive: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.alive = torch.ones((), device=self.device)

    @property
    def compiles(self) -> bool:
        """Whether the forward pass is compiled."""
        return self.device.type == "cuda" if self.config.compile is None else self.config.compile

    @functools.cached_property
    def compiled(self) -> nn.Module:
        """The module, or its compiled form; made once, so that a graph that is there is used again."""
        if not self.compiles:
            return self.module
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
        return torch.compile(self.module, fullgraph=True, dynamic=False)  # type: ignore[return-value]

    @functools.cached_property
    def parallel(self) -> nn.Module:
        """The same, whose gradients are added over all processes, which make it together.

        Made before the first forward pass, also one ``alone``: a graph that was compiled without it is not divided into
        buckets, and all its gradients come at the end.
        """
        return distributed.data_parallel(self.compiled)

    @property
    def holds_gradients(self) -> bool:
        """Whether a backward pass adds nothing over processes at the moment although ``parallel`` is there."""
        return distributed.world_size() == 1 and "parallel" in vars(self)

    def losses(self, batch: ImageBatch, targets: Targets, counts: Tensor | None = None) -> BatchLosses:
        """The forward pass; ``counts`` of the global batch, where it is known already. See ``Model.forward``."""
        several = distributed.world_size() > 1 or self.holds_gradients
        run = self.parallel if several and torch.is_grad_enabled() else self.compiled
        if isinstance(self.module, Model):
            found: BatchLosses = run(batch, targets, counts=counts, counted=True)
            return found
        return BatchLosses(run(batch, targets), torch.zeros(0, dtype=torch.int64), {})


def peak_memory(device: torch.device) -> float:
    """GiB: on a GPU the most that tensors held, on a CPU the largest resident set of this process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
