"""torchvision's detectors as our configuration: every number is read off the module."""

from typing import Any

from torch import nn
from torchvision.models.detection import FasterRCNN as TheirFasterRCNN
from torchvision.models.detection import RetinaNet as TheirRetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from torchvision.ops.misc import FrozenBatchNorm2d

from gesso.errors import ConfigError
from gesso.models.anchors import AnchorConfig
from gesso.models.backbone import BackboneConfig
from gesso.models.box_head import BoxHeadConfig
from gesso.models.faster_rcnn import FasterRCNNConfig
from gesso.models.fpn import FPNConfig
from gesso.models.layers import Norm
from gesso.models.losses import BoxLossConfig
from gesso.models.mask_head import MaskHeadConfig
from gesso.models.postprocess import PostprocessConfig
from gesso.models.resnets import RESNETS
from gesso.models.retinanet import RetinaHeadConfig, RetinaNetConfig
from gesso.models.roi import RoIPoolConfig, RoISamplingConfig
from gesso.models.rpn import RPNConfig

_EPS = 1e-5


def read_config(module: nn.Module) -> FasterRCNNConfig | RetinaNetConfig:
    """Our configuration of a torchvision detector; every number is read off the module.

    Raises:
        ConfigError: it is no such detector, or a part of it has no counterpart here.
    """
    if isinstance(module, TheirRetinaNet):
        return _read_retinanet(module)
    if isinstance(module, TheirFasterRCNN) and not module.roi_heads.has_keypoint():
        return _read_rcnn(module)
    raise ConfigError(
        f"{type(module).__name__} is no detector of torchvision's that has a counterpart here",
        remedy="Give a FasterRCNN, MaskRCNN or RetinaNet on a ResNet with a feature pyramid.",
    )


def read_num_classes(module: nn.Module) -> int:
    """C, our classes of a module that ``read_config`` knows: without the background of the two-stage detectors."""
    parts: Any = module
    if isinstance(module, TheirRetinaNet):
        return int(parts.head.classification_head.num_classes)
    return int(parts.roi_heads.box_predictor.cls_score.out_features) - 1


def _unknown(what: str) -> ConfigError:
    return ConfigError(
        f"this torchvision detector has {what}, which has no counterpart here",
        remedy="Those that fasterrcnn_, maskrcnn_ and retinanet_resnet50_fpn build have one, and their _v2.",
    )


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise _unknown(what)


def _read_rcnn(module: Any) -> FasterRCNNConfig:
    rpn, heads = module.rpn, module.roi_heads
    backbone, neck = _backbone_and_neck(module.backbone)
    _require(rpn.score_thresh == 0 and rpn.min_size == 1e-3, "a score threshold of proposals")
    _require(isinstance(heads.box_predictor, FastRCNNPredictor), f"a {type(heads.box_predictor).__name__}")
    convs, width, norm = _tower(rpn.head.conv, "an RPN head")
    roi = RoISamplingConfig(
        positive_iou=heads.proposal_matcher.high_threshold,
        negative_iou=heads.proposal_matcher.low_threshold,
        samples=heads.fg_bg_sampler.batch_size_per_image,
        positive_share=heads.fg_bg_sampler.positive_fraction,
    )
    kept, detections = rpn._post_nms_top_n["testing"], heads.detections_per_img
    return FasterRCNNConfig(
        backbone=backbone,
        neck=neck,
        anchors=_anchors(rpn.anchor_generator),
        rpn=RPNConfig(
            positive_iou=rpn.proposal_matcher.high_threshold,
            negative_iou=rpn.proposal_matcher.low_threshold,
            samples=rpn.fg_bg_sampler.batch_size_per_image,
            positive_share=rpn.fg_bg_sampler.positive_fraction,
            before_nms=rpn._pre_nms_top_n["training"],
            before_nms_test=rpn._pre_nms_top_n["testing"],
            after_nms=rpn._post_nms_top_n["training"],
            after_nms_test=kept,
            nms_iou=rpn.nms_thresh,
            convs=convs,
            width=width,
            norm=norm,
            use_padding=True,
        ),
        roi=roi,
        pool=_pool(heads.box_roi_pool, neck),
        box_head=_box_head(heads),
        mask_head=_mask_head(heads, roi, neck) if heads.has_mask() else None,
        postprocess=PostprocessConfig(
            detections=detections,
            min_score=heads.score_thresh,
            nms_iou=heads.nms_thresh,
            candidates=max(detections, kept * read_num_classes(module)),  # all of them
        ),
    )


def _box_head(heads: Any) -> BoxHeadConfig:
    head = heads.box_head
    dx, dy, dw, dh = map(float, heads.box_coder.weights)
    weights = (dx, dy, dw, dh)
    if isinstance(head, TwoMLPHead):
        width = head.fc6.out_features
        _require(head.fc7.out_features == width, "a box head of two widths")
        return BoxHeadConfig(width=width, box_weights=weights)
    _require(isinstance(head, FastRCNNConvFCHead), f"a {type(head).__name__}")
    convs, conv_width, norm = _tower([part for part in head if isinstance(part, nn.Sequential)], "a box head")
    widths = {part.out_features for part in head if isinstance(part, nn.Linear)}
    _require(convs > 0 and len(widths) == 1, "a box head without convolutions, or of several widths")
    return BoxHeadConfig(
        convs=convs,
        conv_width=conv_width,
        norm=norm,
        fcs=sum(isinstance(part, nn.Linear) for part in head),
        width=widths.pop(),
        box_weights=weights,
    )


def _mask_head(heads: Any, roi: RoISamplingConfig, neck: FPNConfig) -> MaskHeadConfig:
    convs, width, norm = _tower(heads.mask_head, "a mask head")
    last = heads.mask_predictor
    _require(isinstance(last, MaskRCNNPredictor), f"a {type(last).__name__}")
    _require(last.conv5_mask.out_channels == width, "a mask head of two widths")
    pool, box_pool = heads.mask_roi_pool, heads.box_roi_pool
    for name in ("sampling_ratio", "canonical_level", "canonical_scale"):
        _require(getattr(pool, name) == getattr(box_pool, name), f"another {name} for masks than for boxes")
    return MaskHeadConfig(
        half_pixel=True,
        convs=convs,
        width=width,
        norm=norm,
        pool_size=_pool(pool, neck).size,
        samples=max(1, int(roi.samples * roi.positive_share)),
    )


def _read_retinanet(module: Any) -> RetinaNetConfig:
    head, boxes = module.head, module.head.regression_head
    backbone, neck = _backbone_and_neck(module.backbone)
    convs, width, norm = _tower(head.classification_head.conv, "a head")
    _require(_tower(boxes.conv, "a head") == (convs, width, norm), "two different towers")
    _require(tuple(map(float, boxes.box_coder.weights)) == (1.0,) * 4, "weights of the box deltas")
    return RetinaNetConfig(
        backbone=backbone,
        neck=neck,
        anchors=_anchors(module.anchor_generator),
        head=RetinaHeadConfig(
            convs=convs,
            width=width,
            norm=norm,
            positive_iou=module.proposal_matcher.high_threshold,
            negative_iou=module.proposal_matcher.low_threshold,
            box_loss=BoxLossConfig(kind=boxes._loss_type, beta=1.0),
            mean="image",
            candidates=module.topk_candidates,
            use_padding=True,
        ),
        postprocess=PostprocessConfig(
            detections=module.detections_per_img,
            min_score=module.score_thresh,
            nms_iou=module.nms_thresh,
            candidates=max(module.detections_per_img, module.topk_candidates),
            min_side=0.0,
        ),
    )


def _backbone_and_neck(backbone: Any) -> tuple[BackboneConfig, FPNConfig]:
    _require(isinstance(backbone, BackboneWithFPN), "no feature pyramid")
    return _backbone(backbone.body), _neck(backbone)


def _backbone(body: Any) -> BackboneConfig:
    stages: list[Any] = [getattr(body, f"layer{k}", None) for k in range(1, 5)]
    block = stages[0][0] if all(isinstance(stage, nn.Sequential) for stage in stages) else None
    if not isinstance(block, BasicBlock | Bottleneck):
        raise _unknown("another backbone than a whole ResNet")
    form = (type(block).__name__, tuple(map(len, stages)), block.conv2.groups, block.conv2.out_channels)
    if form not in RESNETS:
        raise _unknown("a ResNet of unusual depth or width")
    dilated = any(m.dilation != (1, 1) for m in body.modules() if isinstance(m, nn.Conv2d))
    _require(not dilated, "dilated convolutions in its backbone")
    norms = [m for m in body.modules() if isinstance(m, FrozenBatchNorm2d | nn.BatchNorm2d)]
    epsilons = {norm.eps for norm in norms}
    _require(len(epsilons) == 1, "no batch norm in its backbone, or several epsilons")
    frozen = -1
    for part in (body.conv1, *stages):
        if any(parameter.requires_grad for parameter in part.parameters()):
            break
        frozen += 1
    return BackboneConfig(name=RESNETS[form], pretrained=False, frozen_stages=frozen, norm_eps=epsilons.pop())


def _neck(backbone: Any) -> FPNConfig:
    fpn, extra = backbone.fpn, backbone.fpn.extra_blocks
    norms = {_norm(block) for part in (fpn.inner_blocks, fpn.layer_blocks) for block in part}
    _require(len(norms) == 1, "a feature pyramid of several norms")
    _require(extra is None or isinstance(extra, LastLevelMaxPool | LastLevelP6P7), f"a {type(extra).__name__}")
    return FPNConfig(
        width=fpn.inner_blocks[0][0].out_channels,
        inputs=tuple(f"C{int(name.removeprefix('layer')) + 1}" for name in backbone.body.return_layers),
        extra_levels=0 if extra is None else 1 if isinstance(extra, LastLevelMaxPool) else 2,
        extra="subsample" if not isinstance(extra, LastLevelP6P7) else "conv_p5" if extra.use_P5 else "conv_c5",
        norm=norms.pop(),
    )


def _anchors(generator: Any) -> AnchorConfig:
    _require(isinstance(generator, AnchorGenerator), f"a {type(generator).__name__}")
    counts, ratios = {len(sizes) for sizes in generator.sizes}, {tuple(r) for r in generator.aspect_ratios}
    _require(len(counts) == len(ratios) == 1, "anchors that are not of one kind on every level")
    return AnchorConfig(
        sizes=tuple(float(size) for sizes in generator.sizes for size in sizes),
        ratios=tuple(map(float, ratios.pop())),
        sizes_per_level=counts.pop(),
        fitted=True,
    )


def _pool(pool: Any, neck: FPNConfig) -> RoIPoolConfig:
    _require(isinstance(pool, MultiScaleRoIAlign), f"a {type(pool).__name__}")
    _require(list(pool.featmap_names) == [str(k) for k in range(len(neck.inputs))], "regions pooled from other levels")
    _require(pool.output_size[0] == pool.output_size[1], "pooled features that are not square")
    return RoIPoolConfig(
        size=pool.output_size[0],
        sampling_ratio=pool.sampling_ratio,
        canonical_level=pool.canonical_level,
        canonical_size=float(pool.canonical_scale),
    )


def _tower(blocks: Any, what: str) -> tuple[int, int, Norm]:
    """Number, width and norm of 3x3 convolutions that are all alike."""
    kinds = {(block[0].out_channels, _norm(block)) for block in blocks}
    plain = all((b[0].kernel_size, b[0].stride, b[0].dilation) == ((3, 3), (1, 1), (1, 1)) for b in blocks)
    _require(len(kinds) == 1 and plain, f"{what} whose convolutions are not all alike and 3x3")
    return len(blocks), *kinds.pop()


def _norm(block: Any) -> Norm:
    norm = next((part for part in block if isinstance(part, nn.BatchNorm2d | nn.GroupNorm)), None)
    if norm is None:
        return "none"
    _require(norm.eps == _EPS, "a norm with an unusual epsilon")
    if isinstance(norm, nn.BatchNorm2d):
        return "batch"
    _require(norm.num_groups == 32, "group norm of other than 32 groups")
    return "group"
