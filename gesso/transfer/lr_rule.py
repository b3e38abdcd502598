"""The learning rate of fine-tuning from the size of the weights that it starts from.

Source: Shao et al., "Objects365", ICCV 2019, section 4.3.1 and Table 5. Weights from a long pre-training are smaller
than those of an ImageNet classifier, so that a step of the usual rate changes them more. The paper scales the rate by
the ratio of their sizes, 0.85e3 to 5.67e3 = 0.15, and lets it drop to a fifth twice. It calls the size L2-Norm; 5.67e3
can only be a sum of squares (as a norm of a ResNet-50 it would be 1.17), so that is what is taken here by default.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from gesso.errors import ConfigError
from gesso.training.stage import TrainingConfig

DECAY = 0.2
"""What the rate is multiplied by at each drop (Objects365, Table 5)."""
_TABLES = ("position_bias_table", "pos_embed")


@dataclass(frozen=True, kw_only=True)
class RateRule:
    """A learning rate with its derivation.

    Attributes:
        base: the rate for weights of the reference's size.
        pretrained, reference: N of both, over the weights that they have in common.
        tensors: how many these are.
        power: 2 sums squares, 1 takes the root of that, the norm itself.
        ratio: pretrained / reference, at most 1.
    """

    base: float
    pretrained: float
    reference: float
    tensors: int
    power: Literal[1, 2]
    ratio: float

    @property
    def rate(self) -> float:
        """The rate to fine-tune with."""
        return self.base * self.ratio

    def lines(self) -> list[str]:
        """The derivation, for the log."""
        what = "sum of squares" if self.power == 2 else "L2 norm"
        clipped = "" if self.pretrained <= self.reference else ", clipped to 1"
        return [
            f"N, the {what} of {self.tensors} weights of convolutions and linear layers that both have: "
            f"{self.pretrained:.4g} pre-trained, {self.reference:.4g} in the reference",
            f"learning rate {self.base:g} x {self.pretrained:.4g} / {self.reference:.4g}{clipped} = {self.rate:.4g} "
            f"(Objects365, Table 5), times {DECAY:g} at each drop",
        ]


def weight_norm_rule(
    pretrained: Mapping[str, Tensor], reference: Mapping[str, Tensor], base: float, *, power: Literal[1, 2] = 2
) -> RateRule:
    """The rate by the ratio of N(pretrained) to N(reference).

    N sums over the weights of convolutions and linear layers that stand in both under the same name and of the same
    shape; biases, norms and their statistics, and position tables are left out.

    Args:
        pretrained: the weights that fine-tuning starts from.
        reference: other weights of the same form, for which ``base`` is right: an ImageNet classifier's, or new ones.
        base: the rate for the reference.
        power: 2 = sum of squares; 1 = its root.

    Raises:
        ConfigError: they have no such weight in common, or those of the reference are all zero.
    """
    common = [
        name
        for name, value in pretrained.items()
        if _is_weight(name, value) and name in reference and reference[name].shape == value.shape
    ]
    if not common:
        raise ConfigError(
            "the pre-trained weights and the reference have no weight of a convolution or linear layer in common",
            remedy="Take a reference with the same backbone.",
        )
    own, other = (sum(float(of[name].double().square().sum()) for name in common) for of in (pretrained, reference))
    if not other > 0:
        raise ConfigError("all weights of the reference are zero", remedy="Take other weights as the reference.")
    if power == 1:
        own, other = own**0.5, other**0.5
    return RateRule(
        base=base, pretrained=own, reference=other, tensors=len(common), power=power, ratio=min(own / other, 1.0)
    )


def with_rule(stage: TrainingConfig, rule: RateRule) -> TrainingConfig:
    """A stage of fine-tuning with the rule's rate, which drops to a fifth at each milestone (a cosine stays one)."""
    schedule = stage.schedule
    if schedule.kind == "multi_step":
        schedule = dataclasses.replace(schedule, factor=DECAY, factors=())
    optimizer = dataclasses.replace(stage.optimizer, rate=rule.rate)
    return dataclasses.replace(stage, optimizer=optimizer, schedule=schedule)


def _is_weight(name: str, value: Tensor) -> bool:
    table = any(word in name for word in _TABLES)
    return value.ndim >= 2 and name.rpartition(".")[2] == "weight" and value.is_floating_point() and not table
