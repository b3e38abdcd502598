"""Files of torchvision's detectors: the module that is read back finds what the module finds."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops.misc import FrozenBatchNorm2d

from gesso.errors import ConfigError
from gesso.models.build import build_detector
from gesso.models.faster_rcnn import FasterRCNNConfig
from gesso.models.norm import NormPolicy, apply_norm_policy
from gesso.models.published import PublishedWeights, published_config, read_published
from gesso.models.retinanet import RetinaNetConfig
from gesso.models.torchvision_config import read_config
from gesso.models.torchvision_files import COCO
from gesso.structures import ImageBatch
from tests.models.test_torchvision_weights import bare_name
from tests.models.torchvision_cases import CLASSES, KINDS, SECOND, as_theirs, build, differences, made, pictures, spread

SIZE = ((96, 128),)  # a picture that no resize changes
LABELS = detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
GAPS = [k for k, name in enumerate(LABELS) if name in ("N/A", "__background__")]
SILENT = -100.0  # what the bias of a label is that nothing has


def saved(module: nn.Module, folder: Path, *, new: bool = True) -> Path:
    path = folder / "published.pth"
    torch.save(module.state_dict(), path, _use_new_zipfile_serialization=new)
    return path


def detections(found: PublishedWeights) -> Any:
    """What the detector that was read finds in the picture."""
    assert found.config is not None and found.num_classes is not None
    detector = build_detector(found.config, found.num_classes).double()
    detector.load_state_dict(found.weights)
    apply_norm_policy(detector.backbone, NormPolicy(kind="affine"))
    size = torch.tensor(SIZE)
    batch = ImageBatch(
        images=as_theirs(pictures(4, SIZE))[0][None] * 255,
        sizes=size,
        scale=torch.ones(1, 2),
        original_sizes=size,
        image_index=torch.zeros(1, dtype=torch.int64),
        key=torch.zeros(1, dtype=torch.int64),
    )
    with torch.no_grad():
        return detector.eval()(batch)


def usual(module: Any) -> Any:
    """The counts and thresholds that torchvision has by default, and no resize."""
    if hasattr(module, "roi_heads"):
        module.rpn._post_nms_top_n["testing"] = 1000
        module.roi_heads.detections_per_img = 100
    else:
        module.detections_per_img, module.score_thresh = 300, 0.05
    module.transform._skip_resize = True
    return module.eval()


def compare(module: Any, found: PublishedWeights, labels: list[int]) -> None:
    """Both find the same; ``labels`` are torchvision's of our classes."""
    with torch.no_grad():
        theirs = usual(module)(as_theirs(pictures(4, SIZE)))[0]
    ours = detections(found)
    valid = ours.valid[0]
    assert int(valid.sum()) >= 20
    boxes, named = ours.boxes[0][valid], torch.tensor(labels)[ours.labels[0][valid]]
    far, apart, order = differences(theirs, boxes, ours.scores[0][valid], named)
    assert far < 1e-3 and apart < 1e-4
    assert (ours.masks is None) == ("masks" not in theirs)
    if ours.masks is not None:
        pasted = paste_masks_in_image(ours.masks[0][valid][:, None].double(), boxes.double(), SIZE[0])
        assert (pasted - theirs["masks"][order]).abs().max() < 1e-2  # where a box of a pixel moves by a hair


FAST = ("fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn")


def by_time(kinds: Iterable[str]) -> list[Any]:
    return [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


@pytest.mark.parametrize("kind", by_time([*KINDS, *SECOND]))
def test_every_kind_finds_the_same(kind, tmp_path):
    module = made(kind)
    found = read_published(saved(module, tmp_path))
    assert found.origin == "torchvision" and found.problem is None and not found.unused
    assert found.classes is None and "does not name its" in found.notes[-1]
    theirs = read_config(usual(module))
    backbone = dataclasses.replace(theirs.backbone, frozen_stages=1)
    assert published_config(tmp_path / "published.pth") == dataclasses.replace(
        theirs, backbone=backbone, **all_candidates(theirs, found)
    )
    first = 0 if isinstance(theirs, RetinaNetConfig) else 1
    assert found.num_classes == CLASSES - first
    compare(module, found, list(range(first, CLASSES)))


def all_candidates(theirs: FasterRCNNConfig | RetinaNetConfig, found: PublishedWeights) -> dict[str, Any]:
    assert found.config is not None
    return {"postprocess": dataclasses.replace(theirs.postprocess, candidates=found.config.postprocess.candidates)}


@pytest.mark.parametrize("kind", by_time(KINDS))
@pytest.mark.parametrize("new", [True, False], ids=["new", "old"])
def test_published_files_have_the_eighty_classes(kind, new, tmp_path):
    """Frozen norms with an epsilon of 0 and 91 labels, in the names and the format of their time."""
    torch.manual_seed(3)
    module: Any = spread(build(kind, num_classes=91).double(), pictures(4, SIZE))
    retina = isinstance(module, detection.RetinaNet)
    last = module.head.classification_head.cls_logits if retina else module.roi_heads.box_predictor.cls_score
    with torch.no_grad():
        last.bias.view(-1, 91)[:, GAPS if retina else GAPS[1:]] = SILENT
    state = {name: v for name, v in module.state_dict().items() if not (new and "num_batches_tracked" in name)}
    frozen = FrozenBatchNorm2d if new else nn.BatchNorm2d
    for part in list(module.modules()):
        for name, child in list(part.named_children()):
            if new and isinstance(child, nn.BatchNorm2d):
                norm = frozen(child.num_features, eps=0.0).double()
                norm.load_state_dict(child.state_dict(), strict=False)
                setattr(part, name, norm)
    path = tmp_path / "published.pth"
    named = state if new else {bare_name(name): v for name, v in state.items()}
    torch.save(named, path, _use_new_zipfile_serialization=new)
    found = read_published(path)
    assert found.problem is None and not found.unused and found.classes == COCO and found.num_classes == 80
    assert found.config is not None and found.config.backbone.norm_eps == (0.0 if new else 1e-5)
    assert "labels have no category" in found.notes[0]
    compare(module, found, [label for label in range(91) if label not in GAPS])


def test_the_eighty_names():
    assert len(COCO) == 80 and len(set(COCO)) == 80 and COCO[0] == "person" and COCO[-1] == "toothbrush"
    assert [label for label, name in enumerate(LABELS) if name in COCO] == [k for k in range(91) if k not in GAPS]


def test_other_depths_and_keypoints(tmp_path):
    deep = detection.FasterRCNN(resnet_fpn_backbone(backbone_name="resnext50_32x4d", weights=None), num_classes=4)
    config = published_config(saved(deep, tmp_path))
    assert config.backbone.name == "resnext50_32x4d"
    build_detector(config, 3).load_state_dict(read_published(tmp_path / "published.pth").weights)
    points = detection.keypointrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    found = read_published(saved(points, tmp_path))
    assert found.config is not None and found.num_classes == 1
    assert found.unused and all(name.startswith("roi_heads.keypoint_") for name in found.unused)
    counted = len(found.unused) + len(found.weights)
    assert counted == len(points.state_dict())


def test_detectors_of_another_kind_give_their_backbone(tmp_path):
    module = detection.fcos_resnet50_fpn(weights=None, weights_backbone=None)
    found = read_published(saved(module, tmp_path))
    assert found.config is None and found.problem is not None
    assert "backbone.body.layer4.2.conv3.weight" in found.weights and found.unused
    assert len(found.weights) + len(found.unused) == len(module.state_dict())
    with pytest.raises(ConfigError, match=r"published\.pth: there is no detector here .* Name a detector with the"):
        published_config(tmp_path / "published.pth")
    small = detection.fasterrcnn_mobilenet_v3_large_fpn(weights=None, weights_backbone=None)
    with pytest.raises(ConfigError, match="its backbone is none of the residual networks"):
        published_config(saved(small, tmp_path))


def test_a_part_that_is_missing_or_strange_is_said(tmp_path):
    module = build("fasterrcnn_resnet50_fpn")
    state = module.state_dict()
    path = tmp_path / "published.pth"
    torch.save({name: value for name, value in state.items() if "rpn.head.bbox_pred" not in name}, path)
    with pytest.raises(ConfigError, match=r"do not make up the detector: 'rpn\.head\.deltas\.weight'"):
        published_config(path)
    torch.save({**state, "roi_heads.more.weight": torch.ones(1)}, path)
    with pytest.raises(ConfigError, match=r"parts that have no counterpart here: 'roi_heads\.more\.weight'"):
        published_config(path)
    assert read_published(path).unused == ("roi_heads.more.weight",)
