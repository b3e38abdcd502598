"""Fine-tuning: a pre-trained run, a target, and the configuration of the run that joins them.

The rules are those of the papers: batch norm is fixed after the pre-training of a whole detector and affine after that
of a classifier ("Rethinking Training from Scratch for Object Detection", Table 2), and the learning rate can follow
from the size of the weights (``lr_rule``).
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from gesso.errors import ConfigError, RunError
from gesso.models.build import DetectorConfig
from gesso.models.norm import NormPolicy
from gesso.run.config import Part, RunConfig, read_run_config
from gesso.run.folder import RunFolder
from gesso.run.initial import InitialWeights, read_weights
from gesso.run.models import new_model
from gesso.transfer.lr_rule import RateRule, weight_norm_rule, with_rule


@dataclass(frozen=True, kw_only=True)
class Target:
    """What to fine-tune for: indexes to learn from and to be measured on."""

    train: Path
    val: Path


@dataclass(frozen=True, kw_only=True)
class RateBy:
    """Take the learning rate from the weight norm."""

    reference: Path | None = None
    """Weights for which the recipe's rate is right; None = new weights of the same model, or timm's where the
    configuration takes those."""
    power: Literal[1, 2] = 2
    """2 compares sums of squares, 1 their roots."""


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """A run that starts from pre-trained weights.

    Attributes:
        config: of the run.
        init: its weights.
        rule: how the learning rate was found; None where the recipe's stays.
    """

    config: RunConfig
    init: Path
    rule: RateRule | None = None


def fine_tuning(
    pretrained: Path,
    config: RunConfig,
    target: Target,
    *,
    parts: tuple[Part, ...] | None = None,
    rate_by: RateBy | None = None,
    seed: int = 0,
) -> FineTuning:
    """The run that fine-tunes pre-trained weights for a target.

    Args:
        pretrained: a run, a checkpoint folder, or a published file.
        config: of the fine-tuning, such as a recipe's or that of ``as_trained``.
        target: the data.
        parts: the parts of the weights that are loaded; None = as the configuration says.
        rate_by: take the learning rate from the weight norm; None = the configuration's.
        seed: of the run.

    Raises:
        ConfigError: no rate can be found.
        RunError: there are no weights.
    """
    _check_there(pretrained)
    data = dataclasses.replace(config.data, train=target.train, val=target.val, embedded=None)
    chosen = dataclasses.replace(config, seed=seed, data=data, init_parts=config.init_parts if parts is None else parts)
    rule = None
    if rate_by is not None:
        _check_backbone(chosen)
        rule = _rule(chosen, read_weights(pretrained), rate_by)
        chosen = dataclasses.replace(chosen, training=with_rule(chosen.training, rule))
    return FineTuning(config=chosen, init=pretrained, rule=rule)


def as_trained(pretrained: Path) -> RunConfig:
    """The model and last stage of a run, as the configuration of its own fine-tuning; a detector's batch norm is fixed.

    Raises:
        RunError: there is nothing of that name.
        ConfigError: it is no run.
    """
    _check_there(pretrained)
    if not (pretrained / "config.json").is_file():
        raise ConfigError(
            "only a run knows how to go on: a checkpoint or a published file needs a recipe",
            where=pretrained,
            remedy="Add --recipe, such as direct:small_fine_tune.",
        )
    config = read_run_config(RunFolder.open(pretrained))
    stage = config.training
    if isinstance(config.model, DetectorConfig) and stage.norm.kind != "group_norm":
        stage = dataclasses.replace(stage, norm=NormPolicy(kind="fixed"))
    return dataclasses.replace(config, pretraining=None, training=stage, init_parts=None)


def _check_there(pretrained: Path) -> None:
    if not pretrained.exists():
        raise RunError("there are no weights of that name", where=pretrained, remedy="Check the path.")


def _check_backbone(config: RunConfig) -> None:
    if config.init_parts is not None and "backbone" not in config.init_parts:
        raise ConfigError(
            "the learning rate cannot follow from the weights of a backbone that is not loaded",
            remedy="Load the backbone too, or leave out --rate-by-weight-norm.",
        )


def _rule(config: RunConfig, pretrained: InitialWeights, rate_by: RateBy) -> RateRule:
    """By the backbones alone: a classifier has nothing else in common with a detector."""
    if rate_by.reference is not None:
        reference = read_weights(rate_by.reference).weights
    else:
        torch.manual_seed(0)
        reference = new_model(config, 2, pretrained=None).state_dict()
    own = {name: value for name, value in pretrained.weights.items() if name.startswith("backbone.")}
    return weight_norm_rule(own, reference, config.training.optimizer.rate, power=rate_by.power)
