"""The residual networks that torchvision and timm have under the same names, told apart by their weights."""

import re
from collections import Counter
from collections.abc import Mapping

from torch import Tensor

RESNETS = {  # blocks, their number in each stage, groups and width of the first stage's 3x3 convolutions
    ("BasicBlock", (2, 2, 2, 2), 1, 64): "resnet18",
    ("BasicBlock", (3, 4, 6, 3), 1, 64): "resnet34",
    ("Bottleneck", (3, 4, 6, 3), 1, 64): "resnet50",
    ("Bottleneck", (3, 4, 6, 3), 1, 128): "wide_resnet50_2",
    ("Bottleneck", (3, 4, 6, 3), 32, 128): "resnext50_32x4d",
    ("Bottleneck", (3, 4, 23, 3), 1, 64): "resnet101",
    ("Bottleneck", (3, 4, 23, 3), 1, 128): "wide_resnet101_2",
    ("Bottleneck", (3, 4, 23, 3), 32, 256): "resnext101_32x8d",
    ("Bottleneck", (3, 4, 23, 3), 64, 256): "resnext101_64x4d",
    ("Bottleneck", (3, 8, 36, 3), 1, 64): "resnet152",
}
LAYER = re.compile(  # a weight of such a network, but for its classifier
    r"(conv1\.weight|bn1\.\w+|layer[1-4]\.\d+\.(conv[123]\.weight|bn[123]\.\w+|downsample\.(0\.weight|1\.\w+)))"
)


def resnet_of(state: Mapping[str, Tensor], prefix: str = "") -> str | None:
    """timm's name of the network whose weights stand in ``state`` behind ``prefix``; None where it has none here."""
    blocks = Counter(
        int(found[1])
        for name in state
        if (found := re.fullmatch(re.escape(prefix) + r"layer(\d)\.\d+\.conv1\.weight", name))
    )
    middle = state.get(f"{prefix}layer1.0.conv2.weight")
    if middle is None or middle.ndim != 4 or f"{prefix}conv1.weight" not in state:
        return None
    width, each = middle.shape[:2]
    kind = "Bottleneck" if f"{prefix}layer1.0.conv3.weight" in state else "BasicBlock"
    depth = (blocks[1], blocks[2], blocks[3], blocks[4])
    return RESNETS.get((kind, depth, width // max(each, 1), width))
