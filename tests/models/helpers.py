"""Detectors, a batch and a watch that are small enough for every test."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gesso.models.anchors import AnchorConfig
from gesso.models.backbone import BackboneConfig
from gesso.models.box_head import BoxHeadConfig
from gesso.models.build import DetectorConfig, build_detector
from gesso.models.cascade_rcnn import CascadeRCNNConfig
from gesso.models.faster_rcnn import FasterRCNNConfig
from gesso.models.fpn import FPNConfig
from gesso.models.losses import BoxLossConfig
from gesso.models.mask_head import MaskHeadConfig
from gesso.models.postprocess import PostprocessConfig
from gesso.models.retinanet import RetinaHeadConfig, RetinaNetConfig
from gesso.models.rfcn import FineClassifierConfig, PositionSensitiveConfig, RFCNConfig
from gesso.models.roi import RoIPoolConfig, RoISamplingConfig
from gesso.models.rpn import RPNConfig
from gesso.models.semantic import SegmentationConfig
from gesso.models.simple_pyramid import SimplePyramidConfig
from gesso.models.single_level import SingleLevelConfig
from gesso.structures import ImageBatch, Targets, map_tensors

NUM_CLASSES = 5


def _backbone(name: str = "test_resnet", **changes: Any) -> BackboneConfig:
    return BackboneConfig(name=name, pretrained=False, zero_init_residual=False, **changes)


def _two_stages() -> dict[str, Any]:
    return {
        "backbone": _backbone(),
        "neck": FPNConfig(width=16),
        "anchors": AnchorConfig(sizes=(8.0, 16.0, 32.0, 64.0, 128.0)),
        "rpn": RPNConfig(before_nms=100, before_nms_test=100, after_nms=32, after_nms_test=32),
        "roi": RoISamplingConfig(samples=16),
        "pool": RoIPoolConfig(canonical_size=32.0),  # so that regions fall on several levels
        "box_head": BoxHeadConfig(width=32),
        "postprocess": PostprocessConfig(detections=20, candidates=100),
    }


def _mask_head(**changes: Any) -> MaskHeadConfig:
    return MaskHeadConfig(**({"convs": 1, "width": 8, "pool_size": 7, "samples": 8, "target_side": 28} | changes))


def _faster_rcnn() -> FasterRCNNConfig:
    return FasterRCNNConfig(**_two_stages())


def _mask_rcnn() -> FasterRCNNConfig:
    return dataclasses.replace(_faster_rcnn(), mask_head=_mask_head())


def _mask_rcnn_convs() -> FasterRCNNConfig:
    head = BoxHeadConfig(convs=4, conv_width=8, fcs=1, width=32, norm="group")
    masks = _mask_head(norm="group", class_agnostic=True)
    return dataclasses.replace(_faster_rcnn(), box_head=head, mask_head=masks)


def _cascade_rcnn() -> CascadeRCNNConfig:
    return CascadeRCNNConfig(**(_two_stages() | {"box_head": BoxHeadConfig(width=32, class_agnostic=True)}))


def _cascade_masks() -> CascadeRCNNConfig:
    return dataclasses.replace(_cascade_rcnn(), mask_head=_mask_head())


def _retinanet() -> RetinaNetConfig:
    return RetinaNetConfig(
        backbone=_backbone(),
        neck=FPNConfig(width=16, inputs=("C3", "C4", "C5"), extra_levels=2, extra="conv_c5"),
        anchors=AnchorConfig(sizes=(8.0, 16.0, 32.0, 64.0, 128.0), scales=(1.0, 2**0.5)),
        head=RetinaHeadConfig(convs=1, candidates=50, prior=0.1),
        postprocess=PostprocessConfig(detections=20),
    )


def _rfcn() -> RFCNConfig:
    return RFCNConfig(
        backbone=_backbone(output_stride=16),
        neck=SingleLevelConfig(width=16),
        anchors=AnchorConfig(sizes=(16.0,), scales=(0.5, 1.0, 2.0)),
        rpn=RPNConfig(width=16, before_nms=100, before_nms_test=100, after_nms=32, after_nms_test=32),
        roi=RoISamplingConfig(samples=16, hard_examples=True),
        head=PositionSensitiveConfig(size=3),
        postprocess=PostprocessConfig(detections=20, candidates=100),
    )


def _rfcn_3000() -> RFCNConfig:
    random_sample = RoISamplingConfig(samples=16)
    few = PostprocessConfig(detections=20, candidates=100, min_score=0.01)
    return dataclasses.replace(
        _rfcn(), roi=random_sample, fine=FineClassifierConfig(width=16, samples=3), postprocess=few
    )


def _analysis() -> FasterRCNNConfig:
    return dataclasses.replace(
        _faster_rcnn(),
        backbone=_backbone(output_stride=16),
        neck=SingleLevelConfig(width=16),
        anchors=AnchorConfig(sizes=(16.0,), scales=(0.5, 1.0, 2.0)),
        pool=RoIPoolConfig(size=14),
        box_head=BoxHeadConfig(width=32, class_agnostic=True),
    )


def _vit() -> FasterRCNNConfig:
    return dataclasses.replace(_faster_rcnn(), backbone=_backbone("test_vit"), neck=SimplePyramidConfig(width=16))


def _everything() -> FasterRCNNConfig:
    return dataclasses.replace(
        _faster_rcnn(),
        backbone=_backbone(deformable_stages=(2, 4), deformable_version=2),
        neck=FPNConfig(width=16, norm="batch", context="psp"),
        rpn=dataclasses.replace(_two_stages()["rpn"], convs=2, width=12, norm="batch", use_padding=True),
        roi=RoISamplingConfig(samples=16, hard_examples=True),
        box_head=BoxHeadConfig(
            convs=2,
            conv_width=8,
            fcs=1,
            width=32,
            norm="group",
            classifier="sigmoid",
            box_loss=BoxLossConfig(kind="giou", weight=10.0),
        ),
        mask_head=_mask_head(norm="batch"),
        segmentation=SegmentationConfig(convs=1, width=8),
    )


KINDS: dict[str, Callable[[], DetectorConfig]] = {
    "faster_rcnn": _faster_rcnn,
    "mask_rcnn": _mask_rcnn,
    "mask_rcnn_convs": _mask_rcnn_convs,
    "cascade_rcnn": _cascade_rcnn,
    "cascade_masks": _cascade_masks,
    "retinanet": _retinanet,
    "rfcn": _rfcn,
    "rfcn_3000": _rfcn_3000,
    "analysis": _analysis,
    "vit": _vit,
    "everything": _everything,
}


def tiny_config(kind: str = "faster_rcnn", **changes: Any) -> Any:
    return dataclasses.replace(KINDS[kind](), **changes)


def tiny_detector(kind: str = "faster_rcnn", *, seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    return build_detector(tiny_config(kind, **changes), NUM_CLASSES)


def random_batch(
    count: int = 2,
    side: int = 64,
    slots: int = 6,
    filled: int = 3,
    seed: int = 0,
    num_classes: int = NUM_CLASSES,
    masks: bool = False,
) -> tuple[ImageBatch, Targets]:
    """Noise, with ``filled`` valid boxes in each picture, and random masks (B, M, 28, 28) inside them if wanted."""
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
    boxes = torch.cat([low, low + size], dim=-1) * valid[..., None]
    targets = Targets(
        boxes=boxes,
        labels=torch.randint(0, num_classes, (count, slots), generator=g) * valid,
        valid=valid,
        ignore=torch.zeros(count, slots, dtype=torch.bool),
        box_id=torch.arange(count * slots).view(count, slots) * valid,
        masks=(torch.rand(count, slots, 28, 28, generator=g) > 0.5).byte() if masks else None,
        mask_frames=boxes.clone() if masks else None,
    )
    return batch, targets


def step(detector: Any, batch: ImageBatch, targets: Targets) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses and gradients by name."""
    detector.zero_grad()
    losses = detector(batch, targets)
    sum(losses.values()).backward()
    return losses, {name: p.grad.clone() for name, p in detector.named_parameters() if p.grad is not None}


def picture(value: Any, b: int) -> Any:
    """Picture b alone."""
    return map_tensors(value, lambda tensor: tensor[b : b + 1])


class Watch(TorchDispatchMode):
    """Fails on every operator that waits for the device, or whose shape depends on data.

    It cannot see into an operator that is not torch's own. Those that are allowed have tests of their own, and it is no
    proof that they do not wait: on a GPU, gesso::batched_nms waits inside (``models/ops/nms.py`` says so).
    """

    OPAQUE = (
        "gesso::global_sum",  # in one process a copy, in several one collective
        "mkldnn::_linear_pointwise",
        "gesso::batched_nms",
        "gesso::roi_align",
        "gesso::roi_align_backward",
        "torchvision::deform_conv2d",
        "torchvision::_deform_conv2d_backward",
    )

    FORBIDDEN = (
        "nonzero",
        "_local_scalar_dense",
        "masked_select",
        "unique",
        "_unique2",
        "argwhere",
        "is_nonzero",
        "equal",
    )

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        self.seen.add(f"{func.namespace}::{name}")
        assert func.namespace == "aten" or f"{func.namespace}::{name}" in self.OPAQUE, f"{name} cannot be seen into"
        assert name not in self.FORBIDDEN and not name.startswith("unique"), f"{name} waits for the device"
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            dtypes = {i.dtype for i in args[1] if i is not None}
            assert torch.bool not in dtypes, f"{name} by a mask"
            source = args[0]
            assert not source.is_floating_point(), f"{name} reads values by advanced indexing: its backward races"
        return func(*args, **(kwargs or {}))
