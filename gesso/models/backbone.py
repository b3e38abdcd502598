"""Any timm backbone: a network of four stages as the maps C2 to C5, a plain vision transformer as the map C4.

Shape letters: B images, H x W padded pixels.

Sources: DeepLab (Chen et al. 2017), section 3.1, for ``output_stride``; Deformable Convolutional Networks (Dai et al.
2017) and its second version (Zhu et al. 2018) for ``deformable_stages``.
"""

from dataclasses import dataclass
from typing import Any, Literal

import timm
import torch
from timm.models import is_model_in_modules
from timm.models.resnet import Bottleneck
from torch import Tensor, nn

from gesso.errors import ConfigError, nearest
from gesso.log import get_logger
from gesso.models.norm import PolicyBatchNorm2d
from gesso.models.plain_transformer import PlainTransformer, is_plain_transformer
from gesso.models.stages import StageMarks, freeze, make_atrous, make_deformable, set_norm_eps

log = get_logger(__name__)

LEVELS = {"C2": 4, "C3": 8, "C4": 16, "C5": 32}
_PLAIN_MAP = "C4"  # whatever its stride
_OWN_ATROUS = ("senet",)  # timm's modules whose networks know no output stride, and that make_atrous fits
_ANY_SIZE = {"swin": {"strict_img_size": False, "always_partition": True}}
_DISPENSABLE = {"drop_path_rate", "dynamic_img_size", "strict_img_size", "always_partition"}
_TRIAL = (64, 96)  # small; of some 100 timm networks, 160 x 224 refuses no other
_REMEDY = (
    "Choose one such as resnet50, convnext_tiny or swin_tiny_patch4_window7_224, or a plain vision transformer such as "
    "vit_small_patch14_dinov2."
)


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """A backbone by its timm name, what of it is frozen, and what is changed in it."""

    name: str = "resnet50"
    """Any timm model that takes pictures of any size and gives maps at strides 4, 8, 16 and 32, or a plain vision
    transformer, which gives one map; with a tag, as in resnet50.a1_in1k, those weights."""
    pretrained: bool = True
    """Start from timm's ImageNet weights; where they cannot be fetched, a warning, and random weights."""
    pretrained_required: bool = False
    """Stop instead of the warning where ImageNet weights cannot be fetched."""
    frozen_stages: int = -1
    """-1 trains everything; 0 freezes the stem, 1 the stem and the stage of C2, up to 4, all of it. In a plain vision
    transformer 0 freezes all before the first block (patch and position embedding, extra tokens), and each stage is a
    quarter of the blocks, the final norm with the last."""
    drop_path: float = 0.0
    """Rate of stochastic depth, in backbones that have it; 0 turns it off, also where timm's own default is another.
    An exception to the rule that chance hashes a sample's key: timm draws it from torch's global generator, which the
    training loop seeds from the run's seed, the step and the process. So what a sample drops depends on its batch."""
    zero_init_residual: bool = True
    """Random weights: the last batch norm of a residual block starts at 0, as timm has it. False starts it at 1, as
    direct pre-training has it: the first hundreds of steps learn faster."""
    output_stride: Literal[32, 16, 8] = 32
    """Coarsest stride: 16 takes the stride out of the last stage and dilates its convolutions by 2 instead, so that C5
    has cells of 16 pixels; 8 does so with the last two. The weights stay those of 32, and so do the values at every
    second cell, but for what averages over the map (squeeze and excitation). In networks where timm has it, and in its
    legacy_senet family."""
    norm_eps: float | None = None
    """Epsilon of all batch norms; none = the network's own, mostly 1e-5. torchvision's published detectors were
    trained with 0.0, which torch only computes where batch norm does not train (the norm kinds affine and fixed)."""
    stride_in_1x1: bool = False
    """A bottleneck of a ResNet has its stride in the first convolution, of 1x1, as in the paper and in the weights that
    detectron2 publishes; timm and torchvision have it in the 3x3 one."""
    deformable_stages: tuple[int, ...] = ()
    """Stages, of 1 (C2) to 4 (C5), whose 3x3 convolutions are deformable, shortcuts aside. They start as the plain
    ones, with the same weights."""
    deformable_version: Literal[1, 2] = 1
    """1 moves the cells of their kernels, 2 also weighs them (modulated)."""
    deformable_groups: int = 1
    """How many parts of the channels have offsets of their own."""

    def __post_init__(self) -> None:
        if not -1 <= self.frozen_stages <= 4:
            raise ConfigError(f"backbone.frozen_stages is {self.frozen_stages}", remedy="Choose a number from -1 to 4.")
        if not 0 <= self.drop_path < 1:
            raise ConfigError(f"backbone.drop_path is {self.drop_path}", remedy="Choose a rate from 0 to below 1.")
        if self.pretrained_required and not self.pretrained:
            raise ConfigError("backbone.pretrained_required needs backbone.pretrained")
        if self.output_stride not in (32, 16, 8):
            raise ConfigError(f"backbone.output_stride is {self.output_stride}", remedy="Choose 32, 16 or 8.")
        if self.norm_eps is not None and not 0 <= self.norm_eps < 1:
            raise ConfigError(f"backbone.norm_eps is {self.norm_eps}", remedy="Choose a number from 0 to below 1.")
        stages = self.deformable_stages
        if not set(stages) <= {1, 2, 3, 4} or len(set(stages)) < len(stages):
            raise ConfigError(f"backbone.deformable_stages is {stages}", remedy="Name each stage of 1 to 4 once.")
        if self.deformable_version not in (1, 2):
            raise ConfigError(f"backbone.deformable_version is {self.deformable_version}", remedy="Choose 1 or 2.")
        if self.deformable_groups < 1:
            raise ConfigError(f"backbone.deformable_groups is {self.deformable_groups}", remedy="Choose 1 or above.")


class Backbone(nn.Module):
    """(B, 3, H, W) normalised pictures -> ``{"C2": (B, c2, H/4, W/4), ..., "C5": (B, c5, H/32, W/32)}``.

    A plain vision transformer gives ``{"C4": (B, c, H/p, W/p)}``, p the side of its patches: the last block's tokens
    after the final norm, where it has one. It takes any H and W: sides are rounded up, with zeros right and below.
    Other networks want multiples of 32, or round some up and some down. Cell k begins at pixel k times the stride.

    Attributes:
        channels: of each map, by its name.
        strides: pixels of the picture per cell of each map, by its name.
        mean: what the weights expect as the mean of each channel, in 0..1; ``std`` likewise.

    Raises:
        ConfigError: timm has no such backbone, its weights are needed and cannot be fetched, it has no such maps or
            stages, it does not take pictures of any size, or something that is asked for does not fit it.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.body: Any = _create(config)
        self.index, self.strides, self.channels = self._find_levels(config)
        self.channels_come_last = getattr(self.body, "output_fmt", "NCHW") == "NHWC"
        cfg = timm.get_pretrained_cfg(config.name)
        self.mean: tuple[float, ...] = tuple(cfg.mean) if cfg else timm.data.IMAGENET_DEFAULT_MEAN
        self.std: tuple[float, ...] = tuple(cfg.std) if cfg else timm.data.IMAGENET_DEFAULT_STD
        self._adapt(config)
        self._fixed = {name for name, value in self.body.named_parameters() if not value.requires_grad}
        self._frozen_stages = config.frozen_stages
        self.frozen: list[str] = []
        self.freeze()
        self._try_out(config.name)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The maps of normalised pictures (B, 3, H, W) by name, finest first, always in the order (B, C, H, W)."""
        maps = self.body(images)
        if self.channels_come_last:
            maps = [m.permute(0, 3, 1, 2) for m in maps]
        return {name: maps[at] for name, at in self.index.items()}

    def freeze(self, stages: int | None = None) -> None:
        """Freezes as many stages as ``BackboneConfig.frozen_stages`` says, or others, and trains the rest.

        A batch norm that follows a policy is told whether its weights may be trained; call it before the next policy.
        """
        for name, value in self.body.named_parameters():
            value.requires_grad_(name not in self._fixed)
        self.frozen = freeze(self.body, self._marks(), self._frozen_stages if stages is None else stages)
        for module in self.body.modules():
            if isinstance(module, PolicyBatchNorm2d):
                module.set_trained(module.weight.requires_grad)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Backbone":
        """As ``nn.Module.train``, but frozen stages stay in evaluation mode (batch norm, drop path)."""
        super().train(mode)
        for name in self.frozen:
            self.body.get_submodule(name).eval()
        return self

    def _find_levels(self, config: BackboneConfig) -> tuple[dict[str, int], dict[str, float], dict[str, int]]:
        """Which of the body's maps are taken, by the names they get here, their strides and their channels."""
        if isinstance(self.body, PlainTransformer):
            return {_PLAIN_MAP: 0}, {_PLAIN_MAP: float(self.body.patch)}, {_PLAIN_MAP: self.body.channels}
        reductions: list[int] = self.body.feature_info.reduction()
        coarsest = config.output_stride
        strides = {name: min(stride, coarsest) for name, stride in LEVELS.items()}
        if coarsest == 32 and set(LEVELS.values()) <= set(reductions):
            index = {name: _last(reductions, stride) for name, stride in LEVELS.items()}
        elif coarsest < 32 and [min(value, coarsest) for value in reductions[-4:]] == list(strides.values()):
            index = {name: len(reductions) - 4 + k for k, name in enumerate(LEVELS)}
        else:
            wanted = "4, 8, 16 and 32" if coarsest == 32 else ", ".join(map(str, strides.values()))
            raise ConfigError(
                f"the backbone '{config.name}' has maps at strides {sorted(set(reductions))}, not at {wanted}",
                remedy=_REMEDY,
            )
        channels = self.body.feature_info.channels()
        floats = {name: float(stride) for name, stride in strides.items()}
        return index, floats, {name: channels[at] for name, at in index.items()}

    def _adapt(self, config: BackboneConfig) -> None:
        """Changes in the built network what the configuration asks for and timm's builder does not know."""
        if config.norm_eps is not None and not set_norm_eps(self.body, config.norm_eps):
            raise ConfigError(
                f"backbone.norm_eps is set, but '{config.name}' has no batch norm", remedy="Leave it out."
            )
        if config.stride_in_1x1 and not _move_strides(self.body):
            raise ConfigError(
                f"backbone.stride_in_1x1 is set, but '{config.name}' has no bottleneck with its stride in the 3x3",
                remedy="Leave it out, or choose a residual network such as resnet50 with an output stride of 32.",
            )
        if _dilates_itself(config):
            rate = 1
            for level, stride in LEVELS.items():
                if stride > config.output_stride:
                    make_atrous(self.body.get_submodule(self._prefix(level)), rate, 2 * rate)
                    rate *= 2
        for stage in config.deformable_stages:
            if isinstance(self.body, PlainTransformer):
                raise ConfigError(
                    f"backbone.deformable_stages: '{config.name}' is a plain transformer, without convolutions",
                    remedy="Leave it out, or choose a residual network such as resnet50.",
                )
            make_deformable(self.body, self._marks(), stage, config.deformable_version, config.deformable_groups)

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
        for level, stride in self.strides.items():
            found, wanted = tuple(maps[level].shape[2:]), tuple(-int(-side // stride) for side in _TRIAL)
            if found != wanted:
                raise ConfigError(
                    f"the backbone '{name}' has maps off the grid: {level} of {_TRIAL} pixels is {found}, not {wanted}",
                    remedy=_REMEDY,
                )
            if maps[level].shape[1] != self.channels[level]:
                raise ConfigError(f"the backbone '{name}' gives {level} with other channels than timm says")
        self.train()

    def _marks(self) -> StageMarks:
        """Where the stages lie. Stage k ends where C(k+1) is read."""
        if isinstance(self.body, PlainTransformer):
            return self.body.marks()
        a, b, c, d = (self._prefix(level) for level in LEVELS)
        return StageMarks(a, (a, b, c, d))

    def _prefix(self, level: str) -> str:
        """The module of the body that gives a map; timm writes layers.0 as layers_0 where it flattens a network."""
        name: str = self.body.feature_info.module_name()[self.index[level]]
        modules = dict(self.body.named_modules())
        return name if name in modules else name.replace(".", "_")


def _last(values: list[int], wanted: int) -> int:
    return len(values) - 1 - values[::-1].index(wanted)


def _move_strides(body: nn.Module) -> int:
    """Moves the stride of each bottleneck from its 3x3 convolution to the 1x1 before, in place; returns how many."""
    strided = [block for block in body.modules() if isinstance(block, Bottleneck) and block.conv2.stride != (1, 1)]
    for block in strided:
        block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)
    return len(strided)


def _dilates_itself(config: BackboneConfig) -> bool:
    """Whether the stride has to be taken out here because timm does not do it."""
    return config.output_stride < 32 and bool(is_model_in_modules(config.name.split(".")[0], _OWN_ATROUS))


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
    body = _network(config, pretrained=False)
    if not config.zero_init_residual:
        for module in body.modules():
            if isinstance(module, nn.BatchNorm2d) and module.affine and not bool(module.weight.any()):
                nn.init.ones_(module.weight)
    return body


def _network(config: BackboneConfig, *, pretrained: bool) -> Any:
    """timm's network, without the options that it does not know where it can do without them.

    Raises:
        ConfigError: timm cannot make it, or cannot make maps of it.
        OSError: the weights cannot be fetched.
    """
    options: dict[str, Any] = {"pretrained": pretrained, "drop_path_rate": config.drop_path}
    options |= next((more for start, more in _ANY_SIZE.items() if config.name.startswith(start)), {})
    plain = is_plain_transformer(config.name)
    options |= {"num_classes": 0, "dynamic_img_size": True} if plain else {"features_only": True}
    if config.output_stride < 32 and not _dilates_itself(config):
        options["output_stride"] = config.output_stride
    while True:
        try:
            made = timm.create_model(config.name, **options)
            return PlainTransformer(made) if plain else made
        except (RuntimeError, AttributeError, TypeError, ValueError, AssertionError) as error:
            wanted = {"drop_path_rate"} if config.drop_path else set()
            unknown = [key for key in (_DISPENSABLE - wanted) & options.keys() if f"'{key}'" in str(error)]
            if not isinstance(error, TypeError) or not unknown:
                raise _unusable(config, error) from error
            del options[unknown[0]]


def _unusable(config: BackboneConfig, error: Exception) -> ConfigError:
    if "output_stride" in str(error) or (config.output_stride < 32 and isinstance(error, AssertionError)):
        return ConfigError(
            f"the backbone '{config.name}' has no output stride but 32: timm cannot take the strides out of its stages",
            remedy="Set backbone.output_stride to 32, or choose a network such as resnet50 or convnext_tiny.",
        )
    return ConfigError(
        f"timm cannot make feature maps of the backbone '{config.name}': {str(error) or type(error).__name__}",
        remedy="Choose another one such as resnet50, or set backbone.pretrained or backbone.drop_path otherwise.",
    )
