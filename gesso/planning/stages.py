"""A stage of a recipe made ready for a single step, and the largest batch of one process."""

import dataclasses
from typing import Any

import torch
from torch import nn

from gesso import distributed
from gesso.data.index import Index
from gesso.data.transforms import InputConfig, Shape
from gesso.models.classifier import Classifier
from gesso.models.model import Model
from gesso.planning.workload import CLASSES, classes_of, stage_of
from gesso.run.config import RunConfig
from gesso.run.models import follow_stages, new_model
from gesso.structures import ImageBatch, Targets, to_device
from gesso.training.ema import EMA
from gesso.training.optimizer import build_optimizer
from gesso.training.stage import Stage, TrainingConfig
from gesso.training.worst_case import Pair, largest_shape, worst_batch


def with_stage(config: RunConfig, name: str, stage: TrainingConfig) -> RunConfig:
    """A copy with another stage of that name."""
    changed: dict[str, Any] = {name: stage}
    return dataclasses.replace(config, **changed)


def in_one_process(config: RunConfig, name: str, pictures: int) -> RunConfig:
    """A copy whose stage of that name has so many pictures a step, and is not compiled."""
    return with_stage(config, name, dataclasses.replace(stage_of(config, name), batch_size=pictures, compile=False))


def new_planned_model(config: RunConfig) -> Model:
    """The recipe's model with random weights, as many classes as its data has, else ``CLASSES``."""
    torch.manual_seed(config.seed)
    return new_model(config, classes_of(config) or CLASSES, pretrained=False)


def prepare_model(model: Model, config: RunConfig, name: str, share: int) -> TrainingConfig:
    """Lets a model follow a stage in which this process has ``share`` pictures of a step; gives the stage as followed.

    One process takes batch-norm statistics over the pictures it has, where groups would hold more.
    """
    settings = stage_of(config, name)
    norm, pictures = settings.norm, share // settings.accumulate
    if distributed.world_size() == 1 and norm.images is not None and norm.images > pictures:
        settings = dataclasses.replace(settings, norm=dataclasses.replace(norm, images=None))
    return follow_stages(model, with_stage(config, name, settings), name, pictures=pictures)


def stage_for(model: Model, config: RunConfig, settings: TrainingConfig, device: torch.device) -> Stage:
    """A stage at its beginning, with a model that is on its device."""
    return Stage(
        config=settings,
        module=model,
        optimizer=build_optimizer(model, settings.optimizer),
        ema=None if settings.ema_decay is None else EMA(model, settings.ema_decay),
        device=device,
        seed=config.seed,
    )


def new_stage(config: RunConfig, name: str, device: torch.device, share: int) -> Stage:
    """A stage at its beginning, with a new model; the same in all processes."""
    model = new_planned_model(config)
    settings = prepare_model(model, config, name, share)
    model.to(device, number_type(settings))
    return stage_for(model, config, settings, device)


def number_type(settings: TrainingConfig) -> torch.dtype:
    """The type of a stage's weights."""
    return torch.float64 if settings.precision == "float64" else torch.float32


def resolution_of(input: InputConfig) -> int:
    """The side of a resize in pixels: of the square, or the (longest) short side."""
    resize: Any = input.resize
    return int(resize.side if hasattr(resize, "side") else max(resize.short_sides) // resize.divide)


def at_resolution(input: InputConfig, side: int) -> InputConfig:
    """The same input with another ``resolution_of``; the long side and other short sides grow with it.

    Raises:
        ConfigError: the resize cannot have it.
    """
    resize: Any = input.resize
    if hasattr(resize, "side"):
        return dataclasses.replace(input, resize=dataclasses.replace(resize, side=side))
    high = side * resize.divide
    factor = high / max(resize.short_sides)
    short = tuple(dict.fromkeys(max(resize.divide, round(one * factor)) for one in resize.short_sides))
    long = max(round(resize.long_side * factor), high)
    return dataclasses.replace(input, resize=dataclasses.replace(resize, short_sides=short, long_side=long))


def worst_shape(config: RunConfig, input: InputConfig) -> Shape:
    """The padded shape of most pixels that the recipe's data gives; without data, of all there are."""
    if config.data.train is not None:
        index = Index.open(config.data.train)
        return largest_shape(input, index.heights, index.widths)
    if config.data.embedded is not None:
        side = [config.data.embedded.side]
        return largest_shape(input, side, side)
    return largest_shape(input, [100, 100, 100, 400], [100, 133, 400, 100])


def worst_pair(model: nn.Module, count: int, shape: Shape, slots: int, device: torch.device) -> Pair:
    """The worst batch of one process, ``count`` pictures with an object in each of ``slots``, on its device."""
    side = model.mask_side if isinstance(model, Model) else 0
    maps = isinstance(model, Model) and model.semantic
    two = torch.zeros(count, 2, dtype=torch.int64)
    number = torch.arange(count) + count * distributed.rank()
    slot = torch.zeros(count, slots, dtype=torch.int64)
    boxes = torch.zeros(count, slots, 4)
    batch = ImageBatch(
        images=torch.zeros(count, 3, 1, 1, dtype=torch.uint8),
        sizes=two,
        scale=torch.ones(count, 2),
        original_sizes=two,
        image_index=number,
        key=number,
    )
    targets = Targets(
        boxes=boxes,
        labels=slot,
        valid=slot.bool(),
        ignore=slot.bool(),
        box_id=slot,
        verified=torch.zeros(count, model.num_classes, dtype=torch.int8) if isinstance(model, Classifier) else None,
        masks=torch.zeros(count, slots, side, side, dtype=torch.uint8) if side else None,
        mask_frames=boxes if side else None,
        semantic=torch.zeros(count, 1, 1, dtype=torch.uint8) if maps else None,
    )
    batch, targets = worst_batch((batch, targets), shape, count)
    return to_device(batch, device), to_device(targets, device)
