"""A plain vision transformer of timm as a map: one resolution from the patches to the end.

Shape letters: B images, H x W pixels, p pixels a side of a patch, c channels.
"""

from typing import Any

import torch.nn.functional as F
from timm.models import is_model_in_modules
from torch import Tensor, nn

from gesso.models.stages import StageMarks

_MODULES = ("vision_transformer", "vision_transformer_sam", "deit", "eva")  # of timm


def is_plain_transformer(name: str) -> bool:
    """Whether a timm name, with a tag or without, is that of a plain vision transformer."""
    return bool(is_model_in_modules(name.split(".")[0], _MODULES))


class PlainTransformer(nn.Module):
    """(B, 3, H, W) normalised pictures -> [(B, c, H/p, W/p)], sides rounded up, with zeros right and below.

    The map holds the last block's patch tokens after the final norm, where the network has one.

    Attributes:
        channels: c.
        patch: p.
    """

    def __init__(self, model: Any) -> None:
        """Takes a timm network that was built without a classifier and with ``dynamic_img_size`` where it knows it.

        Raises:
            AttributeError: the network gives no maps of its blocks.
        """
        super().__init__()
        self.model = model
        self.last: list[int] = model.prune_intermediate_layers(1, prune_norm=False)
        info = model.feature_info[-1]
        self.channels: int = info.get("num_chs_norm", info["num_chs"])  # those of SAM's neck, which is its norm
        self.patch: int = info["reduction"]

    def forward(self, images: Tensor) -> list[Tensor]:
        """The map of pictures of any size, alone in a list as in timm's other feature extractors."""
        below, right = -images.shape[2] % self.patch, -images.shape[3] % self.patch
        if below or right:
            images = F.pad(images, (0, right, 0, below))
        maps: list[Tensor] = self.model.forward_intermediates(
            images, indices=self.last, norm=True, intermediates_only=True
        )
        return maps

    def marks(self) -> StageMarks:
        """The stages: quarters of the blocks."""
        depth = len(self.model.blocks)
        a, b, c, d = (f"model.blocks.{max(round(k * depth / 4), 1) - 1}" for k in (1, 2, 3, 4))
        return StageMarks("model.blocks.0", (a, b, c, d), whole=True)
