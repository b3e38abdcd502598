"""Any timm backbone as the maps C2 to C5.

Shape letters: B images, H x W padded pixels.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

from gesso.errors import ConfigError, nearest
from gesso.log import get_logger

log = get_logger(__name__)

LEVELS = {"C2": 4, "C3": 8, "C4": 16, "C5": 32}
_ANY_SIZE = {"swin": {"strict_img_size": False, "always_partition": True}}
_TRIAL = (64, 96)  # small; of some 100 timm networks, 160 x 224 refuses no other
_REMEDY = "Choose one such as resnet50, convnext_tiny or swin_tiny_patch4_window7_224."


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """A backbone by its timm name, and what of it is frozen."""

    name: str = "resnet50"
    """Any timm model that takes pictures of any size and gives maps at strides 4, 8, 16 and 32; with a tag, as in
    resnet50.a1_in1k, those weights."""
    pretrained: bool = True
    """Start from timm's ImageNet weights; where they cannot be fetched, a warning, and random weights."""
    pretrained_required: bool = False
    """Stop instead of the warning where ImageNet weights cannot be fetched."""
    frozen_stages: int = -1
    """-1 trains everything; 0 freezes the stem, 1 the stem and the stage of C2, up to 4, all of it."""
    drop_path: float = 0.0
    """Rate of stochastic depth, in backbones that have it; 0 turns it off, also where timm's own default is another.
    An exception to the rule that chance hashes a sample's key: timm draws it from torch's global generator, which the
    training loop seeds from the run's seed, the step and the process. So what a sample drops depends on its batch."""
    zero_init_residual: bool = True
    """Random weights: the last batch norm of a residual block starts at 0, as timm has it. False starts it at 1, as
    direct pre-training has it: the first hundreds of steps learn faster."""

    def __post_init__(self) -> None:
        if not -1 <= self.frozen_stages <= 4:
            raise ConfigError(f"backbone.frozen_stages is {self.frozen_stages}", remedy="Choose a number from -1 to 4.")
        if not 0 <= self.drop_path < 1:
            raise ConfigError(f"backbone.drop_path is {self.drop_path}", remedy="Choose a rate from 0 to below 1.")
        if self.pretrained_required and not self.pretrained:
            raise ConfigError("backbone.pretrained_required needs backbone.pretrained")


class Backbone(nn.Module):
    """(B, 3, H, W) normalised pictures -> ``{"C2": (B, c2, H/4, W/4), ..., "C5": (B, c5, H/32, W/32)}``.

    Attributes:
        channels: of each map, by its name.
        mean: what the weights expect as the mean of each channel, in 0..1; ``std`` likewise.

    Raises:
        ConfigError: timm has no such backbone, its weights are needed and cannot be fetched, it has no such maps or
            stages, or it does not take pictures of any size.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.body: Any = _create(config)
        info = self.body.feature_info
        reductions: list[int] = info.reduction()
        if not set(LEVELS.values()) <= set(reductions):
            raise ConfigError(
                f"the backbone '{config.name}' has maps at strides {sorted(set(reductions))}, not at 4, 8, 16 and 32",
                remedy=_REMEDY,
            )
        self.index = {name: _last(reductions, stride) for name, stride in LEVELS.items()}
        self.channels: dict[str, int] = {name: info.channels()[at] for name, at in self.index.items()}
        self.channels_come_last = getattr(self.body, "output_fmt", "NCHW") == "NHWC"
        cfg = timm.get_pretrained_cfg(config.name)
        self.mean: tuple[float, ...] = tuple(cfg.mean) if cfg else timm.data.IMAGENET_DEFAULT_MEAN
        self.std: tuple[float, ...] = tuple(cfg.std) if cfg else timm.data.IMAGENET_DEFAULT_STD
        self.frozen: list[str] = self._freeze(config.frozen_stages)
        self._try_out(config.name)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The maps C2 to C5 of normalised pictures (B, 3, H, W), always in the order (B, C, H, W)."""
        maps = self.body(images)
        if self.channels_come_last:
            maps = [m.permute(0, 3, 1, 2) for m in maps]
        return {name: maps[at] for name, at in self.index.items()}

    def train(self, mode: bool = True) -> "Backbone":
        """As ``nn.Module.train``, but frozen stages stay in evaluation mode (batch norm, drop path)."""
        super().train(mode)
        for name in self.frozen:
            self.body.get_submodule(name).eval()
        return self

    def _try_out(self, name: str) -> None:
        """Refuses a network that is bound to one input size or whose maps are off the grid, by a small black picture.

        In evaluation mode, so that neither running statistics nor the random state change.
        """
        self.eval()
        try:
            with torch.no_grad():
                maps = self(torch.zeros(1, 3, *_TRIAL))
        except Exception as error:
            why = str(error) or type(error).__name__
            raise ConfigError(
                f"the backbone '{name}' does not take pictures of any size: {why}", remedy=_REMEDY
            ) from error
        for level, stride in LEVELS.items():
            found, wanted = tuple(maps[level].shape[2:]), tuple(-(-side // stride) for side in _TRIAL)
            if found != wanted:
                raise ConfigError(
                    f"the backbone '{name}' has maps off the grid: {level} of {_TRIAL} pixels is {found}, not {wanted}",
                    remedy=_REMEDY,
                )
        self.train()

    def _freeze(self, stages: int) -> list[str]:
        """Freezes everything up to the end of a stage; returns the modules that have to stay in evaluation mode: those
        whose parameters are all frozen, whatever else is inside them.

        Parameters stand in the order of the forward pass in every timm backbone with feature maps. Stage k of the
        network ends where C(k+1) is read; the stem is what comes before the first module of stage 1.
        """
        if stages < 0:
            return []
        names = [name for name, _ in self.body.named_parameters()]
        stage = self._prefix("C2" if stages == 0 else f"C{stages + 1}")
        inside = [i for i, name in enumerate(names) if name.startswith(stage + ".")]
        if not inside:
            raise ConfigError(
                f"backbone.frozen_stages is {stages}, but no weights mark the end of that stage in this backbone",
                remedy="Choose -1 or another number, or another backbone.",
            )
        end = inside[0] if stages == 0 else inside[-1] + 1
        frozen, trained = set(names[:end]), names[end:]
        for name in frozen:
            self.body.get_parameter(name).requires_grad_(False)
        return sorted(_holders(frozen) - _holders(trained))

    def _prefix(self, level: str) -> str:
        """The module of the body that gives a map; timm writes layers.0 as layers_0 where it flattens a network."""
        name: str = self.body.feature_info.module_name()[self.index[level]]
        modules = dict(self.body.named_modules())
        return name if name in modules else name.replace(".", "_")


def _last(values: list[int], wanted: int) -> int:
    return len(values) - 1 - values[::-1].index(wanted)


def _holders(names: Iterable[str]) -> set[str]:
    """Every module around the parameters of these names, "" for the whole."""
    paths = [name.split(".") for name in names]
    return {".".join(path[:depth]) for path in paths for depth in range(len(path))}


def _create(config: BackboneConfig) -> Any:
    """The timm network, with ImageNet weights where they are asked for and can be had."""
    if not timm.is_model(config.name.split(".")[0]):
        raise ConfigError(f"timm has no backbone '{config.name}'", remedy=nearest(config.name, timm.list_models()))
    if config.pretrained:
        try:
            return _network(config, pretrained=True)
        except OSError as error:
            if config.pretrained_required:
                raise ConfigError(
                    f"the ImageNet weights of '{config.name}' cannot be fetched ({type(error).__name__})",
                    remedy="Connect to the network once, or set backbone.pretrained_required to false.",
                ) from error
            log.warning(
                "NO PRE-TRAINED WEIGHTS: those of '%s' cannot be fetched (%s); the backbone starts at random",
                config.name,
                type(error).__name__,
            )
        except (RuntimeError, AttributeError, TypeError) as error:
            raise _unusable(config, error) from error
    try:
        body = _network(config, pretrained=False)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise _unusable(config, error) from error
    if not config.zero_init_residual:
        for module in body.modules():
            if isinstance(module, nn.BatchNorm2d) and module.affine and not bool(module.weight.any()):
                nn.init.ones_(module.weight)
    return body


def _network(config: BackboneConfig, *, pretrained: bool) -> Any:
    options: dict[str, Any] = {"features_only": True, "pretrained": pretrained}
    options |= next((more for start, more in _ANY_SIZE.items() if config.name.startswith(start)), {})
    try:
        return timm.create_model(config.name, drop_path_rate=config.drop_path, **options)
    except TypeError:
        if config.drop_path:
            raise
        return timm.create_model(config.name, **options)  # networks without stochastic depth know no rate, not even 0


def _unusable(config: BackboneConfig, error: Exception) -> ConfigError:
    return ConfigError(
        f"timm cannot make feature maps of the backbone '{config.name}': {error}",
        remedy="Choose another one, or set backbone.pretrained or backbone.drop_path otherwise.",
    )
