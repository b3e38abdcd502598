"""Weights with detectron2's names: its layers, written down a second time, give what ours give with them."""

import pickle
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
from gesso.models.torchvision_files import COCO
from tests.models.published_cases import (
    RATIOS,
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

WIDTH, FC, CLASSES = 32, 64, 80
MEAN, ONE, FAIR = (103.53, 116.28, 123.675), (1.0, 1.0, 1.0), (57.375, 57.12, 58.395)
ROUNDED = False
CLOSE = 1e-6
BOX, CLS = "roi_heads.box_predictor.bbox_pred", "roi_heads.box_predictor.cls_score"


def pyramid(levels: tuple[int, ...]) -> dict[str, Tensor]:
    torch.manual_seed(2)
    state = resnet("detectron2")
    for level in levels:
        conv(state, f"backbone.fpn_lateral{level}", WIDTH, 64 * 2**level, 1)
        conv(state, f"backbone.fpn_output{level}", WIDTH, WIDTH, 3)
    return state


def rcnn(*, masks: bool) -> dict[str, Tensor]:
    state = pyramid((2, 3, 4, 5))
    conv(state, "proposal_generator.rpn_head.conv", WIDTH, WIDTH, 3)
    conv(state, "proposal_generator.rpn_head.objectness_logits", 3, WIDTH, 1)
    conv(state, "proposal_generator.rpn_head.anchor_deltas", 12, WIDTH, 1)
    state["proposal_generator.rpn_head.anchor_deltas.weight"] *= 0.1
    sizes = {"roi_heads.box_head.fc1": (FC, WIDTH * 49), "roi_heads.box_head.fc2": (FC, FC)}
    for name, (out, inputs) in {**sizes, CLS: (CLASSES + 1, FC), BOX: (CLASSES * 4, FC)}.items():
        state[f"{name}.weight"] = random(out, inputs, scale=inputs**-0.5)
        state[f"{name}.bias"] = random(out, scale=0.3)
    if masks:
        for k in range(1, 5):
            conv(state, f"roi_heads.mask_head.mask_fcn{k}", WIDTH, WIDTH, 3)
        state["roi_heads.mask_head.deconv.weight"] = random(WIDTH, WIDTH, 2, 2, scale=0.2)
        state["roi_heads.mask_head.deconv.bias"] = random(WIDTH, scale=0.1)
        conv(state, "roi_heads.mask_head.predictor", CLASSES, WIDTH, 1)
    return state


def retinanet() -> dict[str, Tensor]:
    state = pyramid((3, 4, 5))
    conv(state, "backbone.top_block.p6", WIDTH, 2048, 3)
    conv(state, "backbone.top_block.p7", WIDTH, WIDTH, 3)
    for tower in ("cls_subnet", "bbox_subnet"):
        for k in range(0, 8, 2):
            conv(state, f"head.{tower}.{k}", WIDTH, WIDTH, 3)
    conv(state, "head.cls_score", 9 * CLASSES, WIDTH, 3)
    conv(state, "head.bbox_pred", 36, WIDTH, 3)
    state["head.bbox_pred.weight"] *= 0.1
    state["head.cls_score.bias"] -= 3
    return state


def published(state: dict[str, Tensor], folder: Path) -> Path:
    """As detectron2's model zoo writes it."""
    path = folder / "model_final.pkl"
    arrays = {name: value.numpy() for name, value in state.items()}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}))
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


@pytest.mark.parametrize("masks", [False, True], ids=["faster", "mask"])
@torch.no_grad()
def test_two_stages_give_what_detectron2_gives(masks, tmp_path):
    state, given = rcnn(masks=masks), picture()
    found = read_published(published(state, tmp_path))
    assert found.origin == "detectron2" and found.classes == COCO and not found.unused
    detector, batch = ours_of(found), batch_of(given)

    size = (given.shape[1], given.shape[2])
    maps = run_resnet(state, "detectron2", prepare(given, MEAN, ONE, bgr=True), stride_in_1x1=True)
    names = [[f"backbone.fpn_{kind}{k}" for k in range(2, 6)] for kind in ("lateral", "output")]
    levels = run_fpn(state, maps, *names)
    levels.append(F.max_pool2d(levels[-1], 1, 2))
    own = detector.maps(batch)
    for k, level in enumerate(maps):
        assert near(own[f"C{k + 2}"], level)
    for k, level in enumerate(levels):
        assert near(own[f"P{k + 2}"], level)

    head = "proposal_generator.rpn_head."
    hidden = [apply(state, head + "conv", level).relu() for level in levels]
    logits = rows([apply(state, head + "objectness_logits", h) for h in hidden], 1)
    deltas = rows([apply(state, head + "anchor_deltas", h) for h in hidden], 4)
    cells = [[size_of(32.0 * 2**k, ratio, rounded=ROUNDED) for ratio in RATIOS] for k in range(5)]
    shapes = [(level.shape[2], level.shape[3]) for level in levels]
    anchors = anchors_of(shapes, [4, 8, 16, 32, 64], cells)
    predictions = detector.rpn([own[f"P{k}"] for k in range(2, 7)], (96, 128), batch.sizes)
    assert near(predictions.logits[0], torch.cat(logits)[:, 0]) and near(predictions.deltas[0], torch.cat(deltas))
    assert near(predictions.anchors, torch.cat(anchors)) and bool(predictions.inside.all())
    proposals = propose(logits, deltas, anchors, size)
    proposed = detector.rpn.propose(predictions, batch.sizes)
    assert apart_at_most(proposed.boxes[0][proposed.valid[0]], proposals) < 1e-4

    fcs = [(state[f"roi_heads.box_head.fc{k}.weight"], state[f"roi_heads.box_head.fc{k}.bias"]) for k in (1, 2)]
    last = [(state[f"{name}.weight"], state[f"{name}.bias"]) for name in (CLS, BOX)]
    scores, _, wanted = run_regions(pool(levels, proposals, 7), proposals, fcs, *last, size)
    heads = detector.box_head(detector.pooler(own, proposals[None]), 1)
    assert near(detector.box_head.scores(heads)[0], scores)
    detections = detector(batch)
    far, apart, count = paired(detections, wanted)
    assert far < 1e-3 and apart < 1e-5 and count >= 20

    if masks:
        x = pool(levels, wanted["boxes"], 14)
        for k in range(1, 5):
            x = apply(state, f"roi_heads.mask_head.mask_fcn{k}", x).relu()
        deconv = (state["roi_heads.mask_head.deconv.weight"], state["roi_heads.mask_head.deconv.bias"])
        x = apply(state, "roi_heads.mask_head.predictor", F.conv_transpose2d(x, *deconv, stride=2).relu())
        own_masks = x[torch.arange(count), wanted["labels"]].sigmoid()
        assert (detections.masks[0][detections.valid[0]] - own_masks).abs().max() < 1e-4


@torch.no_grad()
def test_retinanet_gives_what_detectron2_gives(tmp_path):
    state, given = retinanet(), picture()
    found = read_published(published(state, tmp_path))
    assert found.origin == "detectron2" and found.classes == COCO and not found.unused
    detector, batch = ours_of(found), batch_of(given)

    maps = run_resnet(state, "detectron2", prepare(given, MEAN, ONE, bgr=True), stride_in_1x1=True)
    names = [[f"backbone.fpn_{kind}{k}" for k in range(3, 6)] for kind in ("lateral", "output")]
    levels = run_fpn(state, maps[1:], *names)
    levels.append(apply(state, "backbone.top_block.p6", maps[-1], stride=2))
    levels.append(apply(state, "backbone.top_block.p7", levels[-1].relu(), stride=2))
    own = detector.maps(batch)
    for k, level in enumerate(levels):
        assert near(own[f"P{k + 3}"], level)

    def tower(name: str, level: Tensor) -> Tensor:
        for k in range(0, 8, 2):
            level = apply(state, f"head.{name}.{k}", level).relu()
        return level

    logits = rows([apply(state, "head.cls_score", tower("cls_subnet", level)) for level in levels], CLASSES)
    deltas = rows([apply(state, "head.bbox_pred", tower("bbox_subnet", level)) for level in levels], 4)
    sides = [[32.0 * 2 ** (k + third / 3) for third in range(3)] for k in range(5)]
    cells = [[size_of(side, ratio, rounded=ROUNDED) for side in level for ratio in RATIOS] for level in sides]
    anchors = anchors_of([(x.shape[2], x.shape[3]) for x in levels], [8, 16, 32, 64, 128], cells)
    wanted = dense_detections(logits, deltas, anchors, (given.shape[1], given.shape[2]))
    far, apart, count = paired(detector(batch), wanted)
    assert far < 1e-3 and apart < 1e-5 and count >= 20


def test_the_numbers_are_those_of_its_configurations(tmp_path):
    config = published_config(published(rcnn(masks=True), tmp_path))
    assert isinstance(config, FasterRCNNConfig) and config.mask_head is not None
    assert config.backbone.stride_in_1x1 and not config.backbone.pretrained and config.backbone.frozen_stages == 1
    assert (config.rpn.before_nms, config.rpn.after_nms) == (2000, 1000)
    assert (config.rpn.before_nms_test, config.rpn.after_nms_test) == (1000, 1000)
    assert config.pool.aligned and not config.mask_head.half_pixel
    assert config.box_head.box_loss.kind == config.rpn.box_loss.kind == "l1"
    assert (config.box_head.width, config.box_head.fcs, config.mask_head.convs) == (FC, 2, 4)
    config = published_config(published(retinanet(), tmp_path))
    assert isinstance(config, RetinaNetConfig) and config.head.box_loss.kind == "l1" and config.head.convs == 4


def with_means(mean: tuple[float, ...], std: tuple[float, ...]) -> dict[str, Tensor]:
    return {"pixel_mean": torch.tensor(mean).view(3, 1, 1), "pixel_std": torch.tensor(std).view(3, 1, 1)}


@pytest.mark.parametrize(
    ("mean", "std", "bgr", "in_1x1"),
    [(MEAN, ONE, True, True), (MEAN, FAIR, True, False), (MEAN[::-1], FAIR[::-1], False, False)],
)
@torch.no_grad()
def test_older_files_say_how_pictures_are_prepared(mean, std, bgr, in_1x1, tmp_path):
    state, given = rcnn(masks=False), picture()
    if std != ONE:
        state["backbone.bottom_up.stem.conv1.weight"] *= 58
    cells = {f"proposal_generator.anchor_generator.cell_anchors.{k}": torch.zeros(3, 4) for k in range(5)}
    found = read_published(published({**state, **with_means(mean, std), **cells}, tmp_path))
    assert sorted(found.unused) == sorted({**with_means(mean, std), **cells})
    assert not any("does not say how" in note for note in found.notes)
    detector = ours_of(found)
    maps = run_resnet(state, "detectron2", prepare(given, mean, std, bgr=bgr), stride_in_1x1=in_1x1)
    assert near(detector.maps(batch_of(given))["C5"], maps[-1])


def test_what_is_no_such_detector_is_said(tmp_path):
    state = rcnn(masks=False)
    for more in (
        "roi_heads.box_head.conv1.weight",
        "backbone.fpn_lateral2.norm.weight",
        "roi_heads.res5.0.conv1.weight",
    ):
        with pytest.raises(
            ConfigError, match="it has parts that have no counterpart here: '" + more.replace(".", r"\.")
        ):
            published_config(published({**state, more: torch.ones(1)}, tmp_path))
    without = {name: value for name, value in state.items() if "fpn" not in name}
    with pytest.raises(ConfigError, match="it has no feature pyramid"):
        published_config(published(without, tmp_path))
    with pytest.raises(ConfigError, match=r"mean .* not ImageNet's"):
        published_config(published({**state, **with_means((1.0, 2.0, 3.0), ONE)}, tmp_path))
    one = {**state, "roi_heads.keypoint_head.conv_fcn1.weight": torch.ones(1)}
    found = read_published(published(one, tmp_path))
    assert found.config is not None and found.unused == ("roi_heads.keypoint_head.conv_fcn1.weight",)


def test_frozen_norms_of_old_have_no_statistics(tmp_path):
    state = {name: v for name, v in rcnn(masks=False).items() if ".running_" not in name}
    found = read_published(published(state, tmp_path))
    assert found.problem is None
    assert bool((found.weights["backbone.body.bn1.running_var"] == 1).all())
    assert bool((found.weights["backbone.body.bn1.running_mean"] == 0).all())


def test_box_heads_for_all_classes_alike(tmp_path):
    state = rcnn(masks=False)
    state |= {f"{BOX}.weight": state[f"{BOX}.weight"][:4], f"{BOX}.bias": state[f"{BOX}.bias"][:4]}
    config = published_config(published(state, tmp_path))
    assert isinstance(config, FasterRCNNConfig) and config.box_head.class_agnostic
