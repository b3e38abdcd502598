"""State dictionaries with the names that detectron2 and mmdetection publish, and what their layers compute with them.

Written after their documentation and not after ours: functions on a state dictionary, in float64.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import batched_nms, roi_align

from gesso.structures import ImageBatch
from tests.models.torchvision_cases import differences

State = Mapping[str, Tensor]
BLOCKS = (3, 4, 6, 3)
RATIOS = (0.5, 1.0, 2.0)
MEAN_RGB, STD_RGB = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64) * scale


def conv(state: dict[str, Tensor], name: str, out: int, inputs: int, side: int, *, bias: bool = True) -> None:
    state[f"{name}.weight"] = random(out, inputs, side, side, scale=(2 / (inputs * side * side)) ** 0.5)
    if bias:
        state[f"{name}.bias"] = random(out, scale=0.1)


def norm(state: dict[str, Tensor], name: str, width: int, *, counted: bool) -> None:
    state[f"{name}.weight"] = torch.rand(width, dtype=torch.float64) * 0.5 + 0.4
    state[f"{name}.bias"] = random(width, scale=0.1)
    state[f"{name}.running_mean"] = random(width, scale=0.1)
    state[f"{name}.running_var"] = torch.rand(width, dtype=torch.float64) + 0.5
    if counted:
        state[f"{name}.num_batches_tracked"] = torch.tensor(9)


Layer = tuple[str, str]  # names of a convolution and of the norm behind it


def d2_layers(stage: int, block: int) -> dict[str, Layer]:
    """conv1, conv2, conv3 and the shortcut of a bottleneck, stages counted from 1."""
    start = f"backbone.bottom_up.res{stage + 1}.{block}"
    names = ("conv1", "conv2", "conv3", "shortcut")
    return {name: (f"{start}.{name}", f"{start}.{name}.norm") for name in names}


def mm_layers(stage: int, block: int) -> dict[str, Layer]:
    start = f"backbone.layer{stage}.{block}"
    three = {f"conv{k}": (f"{start}.conv{k}", f"{start}.bn{k}") for k in (1, 2, 3)}
    return {**three, "shortcut": (f"{start}.downsample.0", f"{start}.downsample.1")}


LAYERS = {"detectron2": d2_layers, "mmdetection": mm_layers}
STEM: dict[str, Layer] = {
    "detectron2": ("backbone.bottom_up.stem.conv1", "backbone.bottom_up.stem.conv1.norm"),
    "mmdetection": ("backbone.conv1", "backbone.bn1"),
}


def resnet(origin: str) -> dict[str, Tensor]:
    """A ResNet-50; the first convolution is small, as one that takes values of 0 to 255."""
    state: dict[str, Tensor] = {}
    counted = origin == "mmdetection"
    conv(state, STEM[origin][0], 64, 3, 7, bias=False)
    state[f"{STEM[origin][0]}.weight"] /= 50
    norm(state, STEM[origin][1], 64, counted=counted)
    for stage, count in enumerate(BLOCKS, start=1):
        width, inputs = 32 * 2**stage, 64 if stage == 1 else 64 * 2**stage
        for block in range(count):
            layers = LAYERS[origin](stage, block)
            sizes = {"conv1": (width, inputs, 1), "conv2": (width, width, 3), "conv3": (4 * width, width, 1)}
            if block == 0:
                sizes["shortcut"] = (4 * width, inputs, 1)
            for name, (out, into, side) in sizes.items():
                conv(state, layers[name][0], out, into, side, bias=False)
                norm(state, layers[name][1], out, counted=counted)
            inputs = 4 * width
    return state


def run_norm(state: State, name: str, x: Tensor) -> Tensor:
    mean, var, weight, bias = (state[f"{name}.{p}"] for p in ("running_mean", "running_var", "weight", "bias"))
    return (x - mean[:, None, None]) / (var + 1e-5).sqrt()[:, None, None] * weight[:, None, None] + bias[:, None, None]


def run_resnet(state: State, origin: str, x: Tensor, *, stride_in_1x1: bool) -> list[Tensor]:
    """C2 to C5 of prepared pictures."""

    def layer(names: Layer, given: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
        made = F.conv2d(given, state[f"{names[0]}.weight"], stride=stride, padding=padding)
        return run_norm(state, names[1], made)

    x = F.max_pool2d(layer(STEM[origin], x, 2, 3).relu(), 3, 2, 1)
    maps = []
    for stage, count in enumerate(BLOCKS, start=1):
        for block in range(count):
            stride = 2 if stage > 1 and block == 0 else 1
            first, second = (stride, 1) if stride_in_1x1 else (1, stride)
            layers = LAYERS[origin](stage, block)
            inner = layer(layers["conv1"], x, first).relu()
            inner = layer(layers["conv3"], layer(layers["conv2"], inner, second, 1).relu())
            x = (inner + (layer(layers["shortcut"], x, stride) if block == 0 else x)).relu()
        maps.append(x)
    return maps


def prepare(picture: Tensor, mean: tuple[float, ...], std: tuple[float, ...], *, bgr: bool) -> Tensor:
    """An RGB picture (3, H, W) of 0 to 255, with zeros right and below up to multiples of 32: (1, 3, H', W')."""
    values = picture.double().flip(0) if bgr else picture.double()
    values = (values - torch.tensor(mean).double()[:, None, None]) / torch.tensor(std).double()[:, None, None]
    height, width = picture.shape[1:]
    return F.pad(values, (0, -width % 32, 0, -height % 32))[None]


def apply(state: State, name: str, x: Tensor, *, stride: int = 1) -> Tensor:
    weight = state[f"{name}.weight"]
    return F.conv2d(x, weight, state[f"{name}.bias"], stride=stride, padding=weight.shape[-1] // 2)


def run_fpn(state: State, maps: list[Tensor], lateral: list[str], output: list[str]) -> list[Tensor]:
    """The levels with an input of their own, finest first."""
    inner = apply(state, lateral[-1], maps[-1])
    levels = [apply(state, output[-1], inner)]
    for k in reversed(range(len(maps) - 1)):
        inner = apply(state, lateral[k], maps[k]) + F.interpolate(inner, scale_factor=2, mode="nearest")
        levels.insert(0, apply(state, output[k], inner))
    return levels


def anchors_of(
    shapes: list[tuple[int, int]], strides: list[int], cells: list[list[tuple[float, float]]]
) -> list[Tensor]:
    """Anchors of each level, row after row; ``cells`` are the width and height of those of one cell, in order."""
    levels = []
    for (rows, columns), stride, sizes in zip(shapes, strides, cells, strict=True):
        boxes = [
            (x * stride - w / 2, y * stride - h / 2, x * stride + w / 2, y * stride + h / 2)
            for y in range(rows)
            for x in range(columns)
            for w, h in sizes
        ]
        levels.append(torch.tensor(boxes, dtype=torch.float64))
    return levels


def size_of(side: float, ratio: float, *, rounded: bool) -> tuple[float, float]:
    """Width and height of an anchor of the area side^2 and the height ratio x its width; half of them may be whole."""
    width, height = side / math.sqrt(ratio), side * math.sqrt(ratio)
    return (round(width / 2) * 2.0, round(height / 2) * 2.0) if rounded else (width, height)


def decode(anchors: Tensor, deltas: Tensor, weights: tuple[float, ...], size: tuple[int, int]) -> Tensor:
    """Boxes of anchors (n, 4) and deltas (n, 4), clipped to a picture of ``size``."""
    limit = math.log(1000 / 16)
    width, height = anchors[:, 2] - anchors[:, 0], anchors[:, 3] - anchors[:, 1]
    x = anchors[:, 0] + width / 2 + deltas[:, 0] / weights[0] * width
    y = anchors[:, 1] + height / 2 + deltas[:, 1] / weights[1] * height
    w = width * (deltas[:, 2] / weights[2]).clamp(max=limit).exp()
    h = height * (deltas[:, 3] / weights[3]).clamp(max=limit).exp()
    boxes = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=1)
    return boxes.clamp(min=0).minimum(torch.tensor([size[1], size[0]] * 2).double())


def by_anchor(map_: Tensor, values: int) -> Tensor:
    """(1, A x values, h, w) -> (h w A, values)."""
    _, channels, rows, columns = map_.shape
    return map_.view(channels // values, values, rows, columns).permute(2, 3, 0, 1).reshape(-1, values)


def propose(logits: list[Tensor], deltas: list[Tensor], anchors: list[Tensor], size: tuple[int, int]) -> Tensor:
    """The boxes of an RPN in test: 1000 of each level, NMS within a level, 1000 of all."""
    boxes, scores, level = [], [], []
    for k, (score, delta, anchor) in enumerate(zip(logits, deltas, anchors, strict=True)):
        best = score[:, 0].topk(min(1000, len(score)))
        boxes.append(decode(anchor[best.indices], delta[best.indices], (1, 1, 1, 1), size))
        scores.append(best.values)
        level.append(torch.full_like(best.indices, k))
    every, score, levels = torch.cat(boxes), torch.cat(scores), torch.cat(level)
    solid = ((every[:, 2:] - every[:, :2]) > 0).all(dim=1)
    every, score, levels = every[solid], score[solid], levels[solid]
    return every[batched_nms(every, score, levels, 0.7)[:1000]]


def pool(levels: list[Tensor], boxes: Tensor, side: int) -> Tensor:
    """RoIAlign of boxes (n, 4) from P2 to P5, at two points a cell and axis, which theirs adapts to the region."""
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    which = (4 + (area.sqrt() / 224 + 1e-8).log2()).floor().clamp(2, 5).long() - 2
    out = torch.zeros(len(boxes), levels[0].shape[1], side, side, dtype=torch.float64)
    for k, level in enumerate(levels[:4]):
        chosen = which == k
        out[chosen] = roi_align(level, [boxes[chosen]], side, 1 / (4 * 2**k), sampling_ratio=2, aligned=True)
    return out


def detect(boxes: Tensor, scores: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Scores above 0.05, NMS within a class at 0.5, the best 100."""
    good = scores > 0.05
    boxes, scores, labels = boxes[good], scores[good], labels[good]
    kept = batched_nms(boxes, scores, labels, 0.5)[:100]
    return {"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]}


def run_regions(
    pooled: Tensor, proposals: Tensor, fcs: list[tuple[Tensor, Tensor]], classes: Any, boxes: Any, size: tuple[int, int]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The box head with the background LAST: probabilities (n, C), boxes (n, C, 4), detections."""
    hidden = pooled.flatten(1)
    for weight, bias in fcs:
        hidden = (hidden @ weight.T + bias).relu()
    scores = (hidden @ classes[0].T + classes[1]).softmax(dim=1)[:, :-1]
    deltas = (hidden @ boxes[0].T + boxes[1]).view(len(pooled), -1, 4)
    count = scores.shape[1]
    decoded = decode(proposals.repeat_interleave(count, 0), deltas.reshape(-1, 4), (10, 10, 5, 5), size)
    labels = torch.arange(count).repeat(len(pooled))
    return scores, decoded.view(-1, count, 4), detect(decoded, scores.flatten(), labels)


def dense_detections(
    logits: list[Tensor], deltas: list[Tensor], anchors: list[Tensor], size: tuple[int, int]
) -> dict[str, Tensor]:
    """RetinaNet in test, of logits (n, C) of each level: 1000 pairs of each level, then NMS."""
    boxes, scores, labels = [], [], []
    for logit, delta, anchor in zip(logits, deltas, anchors, strict=True):
        best = logit.sigmoid().flatten().topk(min(1000, logit.numel()))
        at = best.indices // logit.shape[1]
        boxes.append(decode(anchor[at], delta[at], (1, 1, 1, 1), size))
        scores.append(best.values)
        labels.append(best.indices % logit.shape[1])
    return detect(torch.cat(boxes), torch.cat(scores), torch.cat(labels))


def picture() -> Tensor:
    """uint8 (3, H, W): coarse patches of colour with noise; no side is a multiple of 32."""
    g = torch.Generator().manual_seed(5)
    coarse = torch.randint(0, 256, (3, 11, 15), generator=g).repeat_interleave(8, 1).repeat_interleave(8, 2)
    return (coarse + torch.randint(-40, 40, coarse.shape, generator=g)).clamp(0, 255).to(torch.uint8)


def apart_at_most(ours: Tensor, theirs: Tensor) -> float:
    """How far a box of either is from the nearest of the other at most; those of equal scores may change places."""
    assert len(ours) == len(theirs)
    apart = (ours[:, None] - theirs).abs().amax(dim=-1)
    return float(torch.maximum(apart.amin(dim=0), apart.amin(dim=1)).max())


def paired(ours: Any, theirs: dict[str, Tensor]) -> tuple[float, float, int]:
    """The largest differences of boxes and scores of our detections and theirs, and how many there are."""
    valid = ours.valid[0]
    assert int(valid.sum()) == len(theirs["scores"])
    far, apart, _ = differences(theirs, ours.boxes[0][valid], ours.scores[0][valid], ours.labels[0][valid])
    assert len(set(theirs["labels"].tolist())) >= 3
    return far, apart, len(theirs["scores"])


def batch_of(given: Tensor) -> ImageBatch:
    size = torch.tensor([given.shape[1:]])
    zero = torch.zeros(1, dtype=torch.int64)
    padded = F.pad(given, (0, -given.shape[2] % 32, 0, -given.shape[1] % 32))
    return ImageBatch(
        images=padded[None], sizes=size, scale=torch.ones(1, 2), original_sizes=size, image_index=zero, key=zero
    )
