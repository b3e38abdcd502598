"""A detector and a batch that are small enough for every test."""

from typing import Any

import torch

from gesso.models.anchors import AnchorConfig
from gesso.models.backbone import BackboneConfig
from gesso.models.box_head import BoxHeadConfig
from gesso.models.build import build_detector
from gesso.models.faster_rcnn import FasterRCNN, FasterRCNNConfig
from gesso.models.postprocess import PostprocessConfig
from gesso.models.roi import RoISamplingConfig
from gesso.models.rpn import RPNConfig
from gesso.structures import ImageBatch, Targets

NUM_CLASSES = 5


def tiny_config(**changes: Any) -> FasterRCNNConfig:
    parts: dict[str, Any] = {
        "backbone": BackboneConfig(name="resnet18", pretrained=False),
        "fpn_width": 16,
        "anchors": AnchorConfig(sizes=(8.0, 16.0, 32.0, 64.0, 128.0)),
        "rpn": RPNConfig(before_nms=100, before_nms_test=100, after_nms=32, after_nms_test=32),
        "roi": RoISamplingConfig(samples=16),
        "box_head": BoxHeadConfig(width=32),
        "postprocess": PostprocessConfig(detections=20, candidates=100),
    }
    return FasterRCNNConfig(**(parts | changes))


def tiny_detector(seed: int = 0, **changes: Any) -> FasterRCNN:
    torch.manual_seed(seed)
    detector = build_detector(tiny_config(**changes), NUM_CLASSES)
    assert isinstance(detector, FasterRCNN)
    return detector


def random_batch(
    count: int = 2, side: int = 64, slots: int = 6, filled: int = 3, seed: int = 0, num_classes: int = NUM_CLASSES
) -> tuple[ImageBatch, Targets]:
    """Noise, with ``filled`` valid boxes in each picture."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.full((count, 2), side)
    batch = ImageBatch(
        images=torch.randint(0, 256, (count, 3, side, side), generator=g, dtype=torch.uint8),
        sizes=sizes,
        scale=torch.ones(count, 2),
        original_sizes=sizes,
        image_index=torch.arange(count),
        key=torch.randint(0, 2**62, (count,), generator=g),
    )
    low = torch.rand(count, slots, 2, generator=g) * side * 0.6
    size = (0.1 + 0.3 * torch.rand(count, slots, 2, generator=g)) * side
    valid = (torch.arange(slots) < filled).expand(count, slots).clone()
    targets = Targets(
        boxes=torch.cat([low, low + size], dim=-1) * valid[..., None],
        labels=torch.randint(0, num_classes, (count, slots), generator=g) * valid,
        valid=valid,
        ignore=torch.zeros(count, slots, dtype=torch.bool),
        box_id=torch.arange(count * slots).view(count, slots) * valid,
    )
    return batch, targets
