"""Weights and numbers of torchvision's detectors as ours: the same heads, the same losses, and back again."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.misc import FrozenBatchNorm2d

import gesso.models.roi
import gesso.models.rpn
from gesso.errors import ConfigError
from gesso.models.build import build_detector
from gesso.models.cascade_rcnn import CascadeRCNNConfig
from gesso.models.faster_rcnn import FasterRCNNConfig
from gesso.models.fpn import FPNConfig
from gesso.models.matching import Sample
from gesso.models.retinanet import RetinaNetConfig
from gesso.models.torchvision_config import read_config, read_num_classes
from gesso.models.torchvision_weights import (
    from_torchvision_state,
    to_ours,
    to_theirs,
)
from gesso.structures import ImageBatch, Targets
from tests.models.torchvision_cases import CLASSES, KINDS, SECOND, as_theirs, build, made, pictures

TWO_STAGE = ["fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn"]
EXACT = 1e-9
TRAINED = ((96, 128), (112, 96))  # height and width of pictures that no resize changes


def unused(name: str, value: Tensor) -> Tensor:
    """The part of a weight of torchvision's that something reads: not the rows of the background's boxes and mask."""
    if "box_predictor.bbox_pred" in name:
        return value[4:]
    return value[1:] if "mask_fcn_logits" in name else value


def bare_name(name: str) -> str:
    """A weight's name in files from before torchvision 0.13."""
    for old, new in (
        ("rpn.head.conv.0.0.", "rpn.head.conv."),
        *((f"blocks.{k}.0.", f"blocks.{k}.") for k in range(4)),
        *((f"_head.conv.{k}.0.", f"_head.conv.{2 * k}.") for k in range(4)),
        *((f"roi_heads.mask_head.{k}.0.", f"roi_heads.mask_head.mask_fcn{k + 1}.") for k in range(4)),
    ):
        if old in name:
            return name.replace(old, new)
    return name


@pytest.mark.parametrize("kind", [*KINDS, *SECOND])
def test_there_and_back_is_the_same(kind):
    module = build(kind)
    theirs = {name: torch.randn_like(v) if v.is_floating_point() else v + 7 for name, v in module.state_dict().items()}
    config = read_config(module)
    ours = to_ours(theirs, config)
    detector = build_detector(config, read_num_classes(module))
    assert ours.keys() == detector.state_dict().keys()
    assert all(ours[name].shape == value.shape for name, value in detector.state_dict().items())
    back = to_theirs(ours, config)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(unused(name, back[name]), unused(name, value)) for name, value in theirs.items())
    assert all(back[name].shape == value.shape for name, value in theirs.items())
    again = to_ours(back, config)
    assert all(torch.equal(again[name], value) for name, value in ours.items())


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_old_with_frozen_norms(kind):
    module = build(kind)
    config, new = read_config(module), module.state_dict()
    old = {bare_name(name): value for name, value in new.items() if not name.endswith("num_batches_tracked")}
    assert old.keys() != new.keys()
    ours = to_ours(old, config)
    assert ours.keys() == to_ours(new, config).keys()
    assert all(torch.equal(value, ours[name]) for name, value in to_ours(new, config).items())
    module.load_state_dict(to_theirs(ours, config))


def test_the_numbers_are_read_off_the_module():
    module = build(
        "maskrcnn_resnet50_fpn",
        rpn_pre_nms_top_n_test=123,
        rpn_post_nms_top_n_train=45,
        rpn_nms_thresh=0.6,
        rpn_batch_size_per_image=32,
        box_score_thresh=0.1,
        box_detections_per_img=17,
        box_batch_size_per_image=64,
        bbox_reg_weights=(1.0, 2.0, 3.0, 4.0),
    )
    config = read_config(module)
    assert isinstance(config, FasterRCNNConfig) and config.mask_head is not None and config.rpn.use_padding
    assert (config.rpn.before_nms_test, config.rpn.after_nms, config.rpn.samples) == (123, 45, 32)
    assert (config.rpn.nms_iou, config.postprocess.min_score, config.postprocess.detections) == (0.6, 0.1, 17)
    assert config.postprocess.candidates == 1000 * (CLASSES - 1) and read_num_classes(module) == CLASSES - 1
    assert config.box_head.box_weights == (1.0, 2.0, 3.0, 4.0) and config.mask_head.samples == 16
    assert config.backbone.norm_eps == 1e-5 and config.backbone.frozen_stages == -1


def test_the_numbers_of_retinanet():
    first, second = (read_config(build(kind)) for kind in ("retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2"))
    assert isinstance(first, RetinaNetConfig) and isinstance(second, RetinaNetConfig)
    assert first.anchors.sizes[:4] == (32.0, 40.0, 50.0, 64.0) and first.anchors.per_cell == 9
    assert isinstance(first.neck, FPNConfig) and isinstance(second.neck, FPNConfig)
    assert (first.neck.inputs, first.neck.extra, second.neck.extra) == (("C3", "C4", "C5"), "conv_p5", "conv_c5")
    assert (first.head.mean, first.head.box_loss.kind, second.head.box_loss.kind) == ("image", "l1", "giou")
    assert (first.head.norm, second.head.norm, first.postprocess.detections) == ("none", "group", 300)


def test_frozen_backbones_and_other_depths():
    backbone = resnet_fpn_backbone(backbone_name="resnext50_32x4d", weights=None, trainable_layers=2)
    module = detection.FasterRCNN(backbone, num_classes=3)
    for part in module.modules():
        if isinstance(part, FrozenBatchNorm2d):
            part.eps = 0.0
    config = read_config(module)
    assert (config.backbone.name, config.backbone.frozen_stages) == ("resnext50_32x4d", 2)
    assert config.backbone.norm_eps == 0.0
    detector = from_torchvision_state(module.state_dict(), config)
    assert detector.num_classes == 2 and len(detector.backbone.frozen) > 0


def batch_of(module: nn.Module, sizes: tuple[tuple[int, int], ...]) -> tuple[ImageBatch, Any]:
    """The same pictures for both: ours, and torchvision's list after its transform; no resize changes them."""
    given = as_theirs(pictures(4, sizes))
    theirs, _ = module.transform(given)
    whole = torch.zeros(theirs.tensors.shape, dtype=torch.float64)
    for row, picture in zip(whole, given, strict=True):
        row[:, : picture.shape[1], : picture.shape[2]] = picture * 255
    each = torch.tensor([picture.shape[1:] for picture in given])
    batch = ImageBatch(
        images=whole,
        sizes=each,
        scale=torch.ones(len(given), 2),
        original_sizes=each,
        image_index=torch.arange(len(given)),
        key=torch.arange(len(given)) + 5,
    )
    return batch, theirs


def ours_of(module: nn.Module) -> Any:
    detector = from_torchvision_state(module.state_dict(), read_config(module))
    for name, values in (("mean", module.transform.image_mean), ("std", module.transform.image_std)):
        buffer = detector.get_buffer(name)
        buffer.copy_(torch.tensor(values, dtype=torch.float64).view_as(buffer) * 255)
    return detector


def apart(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == torch.float64
    return float((ours - theirs).abs().max())


@pytest.mark.parametrize("kind", TWO_STAGE)
@torch.no_grad()
def test_the_heads_of_two_stages_give_the_same(kind):
    module = made(kind)
    detector = ours_of(module).eval()
    batch, images = batch_of(module, TRAINED)
    maps = detector.maps(batch)
    features = module.backbone(images.tensors)
    for name, key in zip(("P2", "P3", "P4", "P5", "P6"), features, strict=True):
        assert apart(maps[name], features[key]) < 1e-8  # of values around 50
    logits, deltas = detector.rpn.head(list(features.values()))
    objectness, regression = module.rpn.head(list(features.values()))
    flat, turned = detection.rpn.concat_box_prediction_layers(objectness, regression)
    assert apart(torch.cat(logits, dim=1).view(-1, 1), flat) < EXACT
    assert apart(torch.cat(deltas, dim=1).view(-1, 4), turned) < EXACT
    anchors = module.rpn.anchor_generator(images, list(features.values()))
    predictions = detector.rpn([maps[f"P{k}"] for k in range(2, 7)], (128, 128), batch.sizes)
    assert torch.equal(predictions.anchors, anchors[0])

    found, _ = module.rpn(images, features, None)
    proposals = detector.rpn.propose(predictions, batch.sizes)
    for row, boxes in enumerate(found):
        assert apart(proposals.boxes[row][proposals.valid[row]], boxes) < 1e-8

    regions = [boxes[:40] for boxes in found]
    pooled = module.roi_heads.box_roi_pool(features, regions, images.image_sizes)
    classes, boxes = module.roi_heads.box_predictor(module.roi_heads.box_head(pooled))
    named = dict(zip(("P2", "P3", "P4", "P5"), features.values(), strict=False))
    ours = detector.box_head(detector.pooler(named, torch.stack(regions)), 2)
    assert apart(ours.logits.flatten(0, 1), classes) < EXACT
    assert apart(ours.deltas.flatten(0, 1), boxes.view(80, -1, 4)[:, 1:]) < EXACT

    if detector.mask_branch is not None:
        some = [boxes[:6] for boxes in found]
        labels = torch.arange(12) % (CLASSES - 1)
        pooled = module.roi_heads.mask_roi_pool(features, some, images.image_sizes)
        masks = module.roi_heads.mask_predictor(module.roi_heads.mask_head(pooled))
        cells = detector.mask_branch.pooler(named, torch.stack(some))
        assert apart(detector.mask_branch.head(cells, labels), masks[torch.arange(12), labels + 1]) < EXACT


@torch.no_grad()
def test_the_head_of_retinanet_gives_the_same():
    module = made("retinanet_resnet50_fpn")
    detector = ours_of(module).eval()
    batch, images = batch_of(module, TRAINED)
    maps, features = detector.maps(batch), list(module.backbone(images.tensors).values())
    for k, level in enumerate(features):
        assert apart(maps[f"P{k + 3}"], level) < 1e-8
    theirs = module.head(features)
    logits, deltas = detector.head(features)
    assert apart(torch.cat(logits, dim=1), theirs["cls_logits"]) < EXACT
    assert apart(torch.cat(deltas, dim=1), theirs["bbox_regression"]) < EXACT
    anchors = module.anchor_generator(images, features)
    assert torch.equal(detector.predictions(maps, batch).anchors, anchors[0])


def truth_of(sizes: tuple[tuple[int, int], ...], *, first: int, side: int) -> tuple[Targets, list[dict[str, Tensor]]]:
    """Objects with round masks, for both; torchvision's labels begin with ``first``."""
    g = torch.Generator().manual_seed(2)
    B, M = len(sizes), 6
    targets = Targets(
        boxes=torch.zeros(B, M, 4),
        labels=torch.zeros(B, M, dtype=torch.int64),
        valid=torch.zeros(B, M, dtype=torch.bool),
        ignore=torch.zeros(B, M, dtype=torch.bool),
        box_id=torch.zeros(B, M, dtype=torch.int64),
        masks=torch.zeros(B, M, side, side, dtype=torch.uint8),
        mask_frames=torch.zeros(B, M, 4),
    )
    assert targets.masks is not None and targets.mask_frames is not None
    theirs = []
    for row, (height, width) in enumerate(sizes):
        count = M - row
        low = torch.rand(count, 2, generator=g) * torch.tensor([width, height]) * 0.6 + 2
        far = low + 8 + torch.rand(count, 2, generator=g) * torch.tensor([width, height]) * 0.25
        boxes = torch.cat([low, far], dim=1).round()
        labels = torch.randint(1, CLASSES - 1, (count,), generator=g)
        y, x = torch.meshgrid(torch.arange(side) + 0.5, torch.arange(side) + 0.5, indexing="ij")
        middle, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
        out = ((x - middle[:, 0, None, None]) / half[:, 0, None, None]).square()
        out = out + ((y - middle[:, 1, None, None]) / half[:, 1, None, None]).square()
        masks = (out < 1).to(torch.uint8)
        targets.boxes[row, :count], targets.labels[row, :count] = boxes, labels
        targets.valid[row, :count] = True
        targets.masks[row, :count] = masks
        targets.mask_frames[row, :count] = torch.tensor([0.0, 0.0, side, side])
        theirs.append({"boxes": boxes.double(), "labels": labels + first, "masks": masks[:, :height, :width]})
    return targets, theirs


class SamplesOf:
    """Stands for torchvision's sampler and takes the places that ours drew, ``places`` giving theirs."""

    def __init__(self, positive: list[Tensor], negative: list[Tensor]) -> None:
        self.positive, self.negative = positive, negative

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        masks = []
        for places in (self.positive, self.negative):
            masks.append([torch.zeros(len(label), dtype=torch.bool) for label in labels])
            for mask, place in zip(masks[-1], places, strict=True):
                mask[place] = True
        for label, own, other in zip(labels, *masks, strict=True):
            assert (label[own] >= 1).all() and (label[other] == 0).all(), "the same boxes match"
        return masks[0], masks[1]


def sampler_of(picked: Sample, counts: list[int] | None = None, slots: int = 0) -> SamplesOf:
    """``counts``: proposals of each picture, of ``slots`` of ours; ground truth stands behind them."""
    parts = []
    for kind in (picked.positive, picked.valid & ~picked.positive):
        places = [place[chosen] for place, chosen in zip(picked.place, kind, strict=True)]
        if counts is not None:
            places = [torch.where(p < slots, p, p - slots + n) for p, n in zip(places, counts, strict=True)]
        parts.append(places)
    return SamplesOf(*parts)


@pytest.mark.parametrize("kind", TWO_STAGE)
def test_the_losses_of_two_stages_are_the_same(kind, monkeypatch):
    module = made(kind)
    for sampler in (module.rpn.fg_bg_sampler, module.roi_heads.fg_bg_sampler):
        sampler.batch_size_per_image = 32
    module.rpn._post_nms_top_n["training"] = 200
    detector = ours_of(module)
    batch, _ = batch_of(module, TRAINED)
    targets, wanted = truth_of(TRAINED, first=1, side=128)
    drawn: list[Sample] = []
    for place in (gesso.models.rpn, gesso.models.roi):
        draw = place.sample
        monkeypatch.setattr(place, "sample", lambda *a, _draw=draw, **k: drawn.append(_draw(*a, **k)) or drawn[-1])
    proposed: list[Any] = []
    propose = detector.rpn.propose
    monkeypatch.setattr(detector.rpn, "propose", lambda *a: proposed.append(propose(*a)) or proposed[-1])
    with torch.no_grad():
        ours = detector.train()(batch, targets)

    counts = proposed[0].valid.sum(dim=1).tolist()
    module.rpn.fg_bg_sampler = sampler_of(drawn[0])
    module.roi_heads.fg_bg_sampler = sampler_of(drawn[1], counts, proposed[0].valid.shape[1])
    module.transform._skip_resize = True
    with torch.no_grad():
        theirs = module.train()(as_theirs(pictures(4, TRAINED)), wanted)
    assert all(int(sample.positive.sum()) > 8 for sample in drawn)
    names = {
        "rpn_objectness": "loss_objectness",
        "rpn_box": "loss_rpn_box_reg",
        "box_class": "loss_classifier",
        "box_regression": "loss_box_reg",
        "mask": "loss_mask",
    }
    assert {names[name] for name in ours} == theirs.keys()
    for name, value in ours.items():
        assert float(value) > 1e-3 and abs(float(value - theirs[names[name]])) < 1e-6, name


@pytest.mark.parametrize("kind", ["retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2"])
def test_the_losses_of_retinanet_are_the_same(kind):
    module = made(kind)
    detector = ours_of(module)
    batch, _ = batch_of(module, TRAINED)
    targets, wanted = truth_of(TRAINED, first=0, side=128)
    module.transform._skip_resize = True
    with torch.no_grad():
        ours = detector.train()(batch, targets)
        theirs = module.train()(as_theirs(pictures(4, TRAINED)), wanted)
    for name, other in (("focal", "classification"), ("box", "bbox_regression")):
        assert float(ours[name]) > 1e-3 and abs(float(ours[name] - theirs[other])) < 1e-6, name


def test_weights_of_another_architecture_are_refused():
    two_stage, one_stage = build("fasterrcnn_resnet50_fpn"), build("retinanet_resnet50_fpn")
    with pytest.raises(ConfigError, match=r"^'backbone\.fpn\.extra_blocks\.p6\.weight', .* and \d+ more .*rpn\."):
        to_ours(one_stage.state_dict(), read_config(two_stage))
    with pytest.raises(ConfigError, match=r"'rpn\.head\.conv.*RetinaNet"):
        from_torchvision_state(two_stage.state_dict(), read_config(one_stage))
    deep = read_config(two_stage)
    deep = dataclasses.replace(deep, backbone=dataclasses.replace(deep.backbone, name="resnet101"))
    with pytest.raises(ConfigError, match=r"resnet101: 'backbone\.body\.layer3\.6\.conv1\.weight' is missing, .* more"):
        from_torchvision_state(two_stage.state_dict(), deep)
    narrow = dataclasses.replace(read_config(two_stage), neck=FPNConfig(width=128))
    with pytest.raises(ConfigError, match=r"has the shape .* instead of"):
        from_torchvision_state(two_stage.state_dict(), narrow)
    with pytest.raises(ConfigError, match="cls_score"):
        from_torchvision_state({}, read_config(two_stage))
    with pytest.raises(ConfigError, match="CascadeRCNNConfig"):
        to_ours(two_stage.state_dict(), CascadeRCNNConfig())
    with pytest.raises(ConfigError, match="'mask_branch"):
        to_theirs({"mask_branch.head.masks.bias": torch.zeros(1)}, read_config(two_stage))


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: nn.Linear(1, 1), "Linear is no detector"),
        (lambda: detection.fcos_resnet50_fpn(weights=None, weights_backbone=None), "FCOS is no detector"),
        (lambda: detection.keypointrcnn_resnet50_fpn(weights=None, weights_backbone=None), "KeypointRCNN is no det"),
        (
            lambda: detection.fasterrcnn_mobilenet_v3_large_fpn(weights=None, weights_backbone=None),
            "another backbone than a whole ResNet",
        ),
        (lambda: build("fasterrcnn_resnet50_fpn", rpn_score_thresh=0.1), "a score threshold of proposals"),
    ],
)
def test_what_has_no_counterpart_is_refused(make, what):
    with pytest.raises(ConfigError, match=what):
        read_config(make())
