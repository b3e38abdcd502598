"""Weights with mmdetection's names: its layers, written down a second time, give what ours give with them."""

import collections
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gesso.errors import ConfigError
from gesso.models.build import build_detector
from gesso.models.faster_rcnn import FasterRCNNConfig
from gesso.models.published import PublishedWeights, published_config, read_published
from gesso.models.retinanet import RetinaNetConfig
from tests.models.published_cases import (
    MEAN_RGB,
    RATIOS,
    STD_RGB,
    anchors_of,
    apart_at_most,
    apply,
    batch_of,
    by_anchor,
    conv,
    dense_detections,
    paired,
    picture,
    pool,
    prepare,
    propose,
    random,
    resnet,
    run_fpn,
    run_regions,
    run_resnet,
    size_of,
)

WIDTH, FC = 32, 64
NAMES = ("cat", "dog", "cow", "hen", "bee", "ant")
CLASSES = len(NAMES)
ROUNDED = False
RELU_BEFORE_P7 = False
CLOSE = 1e-6
SECOND = """img_norm_cfg = dict(
    mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
model = dict(type='FasterRCNN', backbone=dict(type='ResNet', depth=50, style='pytorch'))
"""
SECOND_CAFFE = """img_norm_cfg = dict(
    mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], to_rgb=False)
model = dict(backbone=dict(type='ResNet', depth=50, norm_eval=True, style='caffe'))
"""
THIRD_CAFFE = """model = dict(
    backbone=dict(depth=50, norm_cfg=dict(requires_grad=False, type='BN'), style='caffe', type='ResNet'),
    data_preprocessor=dict(
        bgr_to_rgb=False,
        mean=[
            103.53,
            116.28,
            123.675,
        ],
        std=[
            1.0,
            1.0,
            1.0,
        ],
        type='DetDataPreprocessor'),
    type='MaskRCNN')
"""
CAFFE = ((103.53, 116.28, 123.675), (1.0, 1.0, 1.0))


class HistoryBuffer:
    """Stands for what mmengine keeps in a file: an object of a class of its own."""

    def __init__(self) -> None:
        self.values = torch.ones(3)


def pyramid(inputs: int) -> dict[str, Tensor]:
    torch.manual_seed(4)
    state = resnet("mmdetection")
    for k in range(inputs):
        conv(state, f"neck.lateral_convs.{k}.conv", WIDTH, 2048 // 2 ** (inputs - 1 - k), 1)
        conv(state, f"neck.fpn_convs.{k}.conv", WIDTH, WIDTH, 3)
    return state


def rcnn(*, masks: bool) -> dict[str, Tensor]:
    state = pyramid(4)
    conv(state, "rpn_head.rpn_conv", WIDTH, WIDTH, 3)
    conv(state, "rpn_head.rpn_cls", 3, WIDTH, 1)
    conv(state, "rpn_head.rpn_reg", 12, WIDTH, 1)
    state["rpn_head.rpn_reg.weight"] *= 0.1
    head = "roi_head.bbox_head."
    sizes = {"shared_fcs.0": (FC, WIDTH * 49), "shared_fcs.1": (FC, FC), "fc_cls": (CLASSES + 1, FC)}
    for name, (out, inputs) in {**sizes, "fc_reg": (CLASSES * 4, FC)}.items():
        state[f"{head}{name}.weight"] = random(out, inputs, scale=inputs**-0.5)
        state[f"{head}{name}.bias"] = random(out, scale=0.3)
    classes = state[f"{head}fc_cls.weight"]
    classes -= classes.mean(dim=1, keepdim=True)  # so that no class wins everywhere
    classes *= 3
    if masks:
        for k in range(4):
            conv(state, f"roi_head.mask_head.convs.{k}.conv", WIDTH, WIDTH, 3)
        state["roi_head.mask_head.upsample.weight"] = random(WIDTH, WIDTH, 2, 2, scale=0.2)
        state["roi_head.mask_head.upsample.bias"] = random(WIDTH, scale=0.1)
        conv(state, "roi_head.mask_head.conv_logits", CLASSES, WIDTH, 1)
    return state


def retinanet() -> dict[str, Tensor]:
    state = pyramid(3)
    conv(state, "neck.fpn_convs.3.conv", WIDTH, 2048, 3)
    conv(state, "neck.fpn_convs.4.conv", WIDTH, WIDTH, 3)
    for tower in ("cls_convs", "reg_convs"):
        for k in range(4):
            conv(state, f"bbox_head.{tower}.{k}.conv", WIDTH, WIDTH, 3)
    conv(state, "bbox_head.retina_cls", 9 * CLASSES, WIDTH, 3)
    conv(state, "bbox_head.retina_reg", 36, WIDTH, 3)
    state["bbox_head.retina_reg.weight"] *= 0.1
    state["bbox_head.retina_cls.bias"] -= 3
    return state


def second(config: str) -> dict[str, Any]:
    """What version 2 keeps beside the weights."""
    return {"mmdet_version": "2.11.0", "config": config, "CLASSES": NAMES, "epoch": 12, "hook_msgs": {}}


def third(config: str) -> dict[str, Any]:
    """What version 3 keeps beside the weights."""
    palette = [(220, 20, 60)] * CLASSES
    return {"cfg": config, "dataset_meta": {"classes": NAMES, "palette": palette}, "mmengine_version": "0.7.0"}


def published(state: dict[str, Tensor], meta: dict[str, Any], folder: Path) -> Path:
    path = folder / "published.pth"
    hub = {"log_scalars": {"train/lr": HistoryBuffer()}}
    torch.save({"meta": meta, "state_dict": collections.OrderedDict(state), "message_hub": hub}, path)
    return path


def ours_of(found: PublishedWeights) -> Any:
    assert found.config is not None and found.num_classes == CLASSES, found.problem
    detector = build_detector(found.config, CLASSES).double()
    detector.load_state_dict(found.weights)
    return detector.eval()


def near(ours: Tensor, theirs: Tensor) -> bool:
    assert ours.shape == theirs.shape
    return bool((ours - theirs).abs().max() <= CLOSE * theirs.abs().max())


def rows(maps: list[Tensor], values: int) -> list[Tensor]:
    return [by_anchor(level, values) for level in maps]


@pytest.mark.parametrize(
    ("meta", "pictures", "caffe"),
    [
        (second(SECOND), (MEAN_RGB, STD_RGB), False),
        (second(SECOND_CAFFE), CAFFE, True),
        (third(THIRD_CAFFE), CAFFE, True),
    ],
    ids=["2", "2 caffe", "3 caffe"],
)
@torch.no_grad()
def test_two_stages_give_what_mmdetection_gives(meta, pictures, caffe, tmp_path):
    masks = "mmdet_version" not in meta
    state, given = rcnn(masks=masks), picture()
    if not caffe:
        state["backbone.conv1.weight"] *= 58  # its pictures have about unit variance
    found = read_published(published(state, meta, tmp_path))
    assert found.origin == "mmdetection" and found.classes == NAMES and not found.unused
    assert any("backbone.stride_in_1x1" in note for note in found.notes) == caffe
    detector, batch = ours_of(found), batch_of(given)
    assert detector.config.backbone.stride_in_1x1 == caffe

    maps = run_resnet(state, "mmdetection", prepare(given, *pictures, bgr=caffe), stride_in_1x1=caffe)
    names = [[f"neck.{kind}_convs.{k}.conv" for k in range(4)] for kind in ("lateral", "fpn")]
    levels = run_fpn(state, maps, *names)
    levels.append(F.max_pool2d(levels[-1], 1, 2))
    own = detector.maps(batch)
    for k, level in enumerate(maps):
        assert near(own[f"C{k + 2}"], level)
    for k, level in enumerate(levels):
        assert near(own[f"P{k + 2}"], level)

    hidden = [apply(state, "rpn_head.rpn_conv", level).relu() for level in levels]
    logits = rows([apply(state, "rpn_head.rpn_cls", h) for h in hidden], 1)
    deltas = rows([apply(state, "rpn_head.rpn_reg", h) for h in hidden], 4)
    cells = [[size_of(8.0 * stride, ratio, rounded=ROUNDED) for ratio in RATIOS] for stride in (4, 8, 16, 32, 64)]
    anchors = anchors_of([(x.shape[2], x.shape[3]) for x in levels], [4, 8, 16, 32, 64], cells)
    size = (given.shape[1], given.shape[2])
    proposals = propose(logits, deltas, anchors, size)
    predictions = detector.rpn([own[f"P{k}"] for k in range(2, 7)], (96, 128), batch.sizes)
    proposed = detector.rpn.propose(predictions, batch.sizes)
    assert apart_at_most(proposed.boxes[0][proposed.valid[0]], proposals) < 1e-4

    head = "roi_head.bbox_head."
    fcs = [(state[f"{head}shared_fcs.{k}.weight"], state[f"{head}shared_fcs.{k}.bias"]) for k in (0, 1)]
    last = [(state[f"{head}{name}.weight"], state[f"{head}{name}.bias"]) for name in ("fc_cls", "fc_reg")]
    scores, _, wanted = run_regions(pool(levels, proposals, 7), proposals, fcs, *last, size)
    heads = detector.box_head(detector.pooler(own, proposals[None]), 1)
    assert near(detector.box_head.scores(heads)[0], scores)
    detections = detector(batch)
    far, apart, count = paired(detections, wanted)
    assert far < 1e-3 and apart < 1e-5 and count >= 20

    assert (detections.masks is None) == (not masks)
    if masks:
        x = pool(levels, wanted["boxes"], 14)
        for k in range(4):
            x = apply(state, f"roi_head.mask_head.convs.{k}.conv", x).relu()
        upsample = (state["roi_head.mask_head.upsample.weight"], state["roi_head.mask_head.upsample.bias"])
        x = apply(state, "roi_head.mask_head.conv_logits", F.conv_transpose2d(x, *upsample, stride=2).relu())
        own_masks = x[torch.arange(count), wanted["labels"]].sigmoid()
        assert (detections.masks[0][detections.valid[0]] - own_masks).abs().max() < 1e-4


@torch.no_grad()
def test_retinanet_gives_what_mmdetection_gives(tmp_path):
    state, given = retinanet(), picture()
    state["backbone.conv1.weight"] *= 58  # its pictures have about unit variance
    found = read_published(published(state, second(SECOND), tmp_path))
    assert found.origin == "mmdetection" and found.classes == NAMES and not found.unused
    detector, batch = ours_of(found), batch_of(given)

    maps = run_resnet(state, "mmdetection", prepare(given, MEAN_RGB, STD_RGB, bgr=False), stride_in_1x1=False)
    names = [[f"neck.{kind}_convs.{k}.conv" for k in range(3)] for kind in ("lateral", "fpn")]
    levels = run_fpn(state, maps[1:], *names)
    levels.append(apply(state, "neck.fpn_convs.3.conv", maps[-1], stride=2))
    sixth = levels[-1].relu() if RELU_BEFORE_P7 else levels[-1]
    levels.append(apply(state, "neck.fpn_convs.4.conv", sixth, stride=2))
    own = detector.maps(batch)
    for k, level in enumerate(levels):
        assert near(own[f"P{k + 3}"], level)

    def tower(name: str, level: Tensor) -> Tensor:
        for k in range(4):
            level = apply(state, f"bbox_head.{name}.{k}.conv", level).relu()
        return level

    logits = rows([apply(state, "bbox_head.retina_cls", tower("cls_convs", level)) for level in levels], CLASSES)
    deltas = rows([apply(state, "bbox_head.retina_reg", tower("reg_convs", level)) for level in levels], 4)
    sides = [[4 * 8 * 2 ** (k + third / 3) for third in range(3)] for k in range(5)]
    cells = [[size_of(side, ratio, rounded=ROUNDED) for ratio in RATIOS for side in level] for level in sides]
    anchors = anchors_of([(x.shape[2], x.shape[3]) for x in levels], [8, 16, 32, 64, 128], cells)
    wanted = dense_detections(logits, deltas, anchors, (given.shape[1], given.shape[2]))
    far, apart, count = paired(detector(batch), wanted)
    assert far < 1e-3 and apart < 1e-5 and count >= 20


def test_the_numbers_are_those_of_its_configurations(tmp_path):
    config = published_config(published(rcnn(masks=True), third(THIRD_CAFFE), tmp_path))
    assert isinstance(config, FasterRCNNConfig) and config.mask_head is not None
    assert config.backbone.stride_in_1x1 and not config.backbone.pretrained and config.backbone.frozen_stages == 1
    assert (config.rpn.after_nms, config.rpn.after_nms_test) == (1000, 1000) and config.rpn.box_loss.kind == "l1"
    config = published_config(published(retinanet(), second(SECOND), tmp_path))
    assert isinstance(config, RetinaNetConfig) and config.head.box_loss.kind == "l1" and config.head.convs == 4


def test_a_file_that_says_nothing_is_read_as_usual_and_says_so(tmp_path):
    torch.save({"state_dict": rcnn(masks=False)}, tmp_path / "w.pth")
    found = read_published(tmp_path / "w.pth")
    assert found.config is not None and not found.config.backbone.stride_in_1x1 and found.classes is None
    assert "does not say how pictures" in found.notes[0] and "does not name its 6 classes" in found.notes[-1]
    other = read_published(published(rcnn(masks=False), {**second(SECOND), "CLASSES": ("a", "b")}, tmp_path))
    assert other.classes is None


def test_version_1_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"published\.pth: the weights are of mmdetection 1, .* version 2 or 3\.$"):
        read_published(published(rcnn(masks=False), {**second(SECOND), "mmdet_version": "1.2.0+abc"}, tmp_path))
    state = {name.replace("roi_head.", ""): value for name, value in rcnn(masks=False).items()}
    with pytest.raises(ConfigError, match="of mmdetection 1"):
        read_published(published(state, {}, tmp_path))


def test_what_is_no_such_detector_is_said(tmp_path):
    state = rcnn(masks=False)
    for more in (
        "roi_head.bbox_head.1.fc_cls.weight",
        "backbone.layer2.0.conv2_offset.weight",
        "bbox_head.atss_cls.bias",
    ):
        path = published({**state, more: torch.ones(1)}, second(SECOND), tmp_path)
        with pytest.raises(
            ConfigError, match="it has parts that have no counterpart here: '" + more.replace(".", r"\.")
        ):
            published_config(path)
        assert read_published(path).unused == (more,)
    swin = {name: value for name, value in state.items() if not name.startswith("backbone.")}
    with pytest.raises(ConfigError, match=r"no counterpart here: 'backbone\.patch_embed"):
        published_config(published({**swin, "backbone.patch_embed.norm.bias": torch.ones(1)}, second(SECOND), tmp_path))
