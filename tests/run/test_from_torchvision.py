"""A detector of torchvision's as ours finds the same, and our weights go back into it."""

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.misc import FrozenBatchNorm2d

import gesso
from gesso.errors import ConfigError, DataError, InputError
from gesso.models.norm import PolicyBatchNorm2d
from gesso.run.from_torchvision import from_torchvision, to_torchvision
from gesso.run.predictor import Predictions
from tests.models.helpers import tiny_detector
from tests.models.torchvision_cases import CLASSES, KINDS, SECOND, as_theirs, build, differences, made, pictures, spread

ENOUGH = 20


def same(found: list[Predictions], theirs: list[dict[str, Any]], *, first: int) -> tuple[float, float]:
    """The same detections, at least 20 a picture, of several classes; ``first`` = torchvision's label of class 0."""
    assert len(found) == len(theirs)
    box, score = 0.0, 0.0
    for ours, other in zip(found, theirs, strict=True):
        assert len(ours) >= ENOUGH
        far, off, order = differences(other, ours.xyxy, ours.confidence, ours.class_id + first)
        box, score = max(box, far), max(score, off)
        if "masks" in other:
            drawn, wanted = ours.mask, other["masks"][order, 0].numpy() >= 0.5
            assert drawn is not None and drawn.shape == wanted.shape and wanted.any(axis=(1, 2)).sum() >= ENOUGH
            common, union = (drawn & wanted).sum(axis=(1, 2)), (drawn | wanted).sum(axis=(1, 2))
            assert (common >= 0.999 * union).all()
        else:
            assert ours.masks is None
    assert len({label for ours in found for label in ours.class_id.tolist()}) >= 3
    assert box < 1e-2 and score < 1e-4
    return box, score


def first_label(kind: str) -> int:
    return 0 if kind.startswith("retinanet") else 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_pictures_give_the_same_detections(kind):
    """Two sizes in one batch, so that both are padded, and both resized."""
    module = made(kind)
    given = pictures()
    with torch.no_grad():
        theirs = module(as_theirs(given))
    detector = gesso.from_torchvision(module)
    assert detector.batch(given).images.shape == (2, 3, 128, 128)
    assert detector.batch(given).sizes.tolist() == [[89, 128], [128, 96]]
    same(detector.predict(given), theirs, first=first_label(kind))
    if kind.startswith("retinanet"):  # torchvision keeps what the edge of the picture cuts down to nothing
        assert any(((f.xyxy[:, 2:] - f.xyxy[:, :2]).min(axis=1) < 1e-2).any() for f in detector.predict(given))


@pytest.mark.slow
@pytest.mark.parametrize("kind", SECOND)
def test_the_second_versions_give_the_same_detections(kind):
    module = made(kind)
    with torch.no_grad():
        theirs = module(as_theirs(pictures()))
    same(from_torchvision(module).predict(pictures()), theirs, first=first_label(kind))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_larger_pictures_with_the_usual_counts(kind):
    """1000 proposals, 100 or 300 detections, more of the levels in use; the second picture becomes larger."""
    torch.manual_seed(1)
    given = pictures(5, ((240, 300), (90, 64)))
    module = spread(build(kind, min_size=224, max_size=320).double(), given)
    with torch.no_grad():
        theirs = module(as_theirs(given))
    same(from_torchvision(module).predict(given), theirs, first=first_label(kind))


@pytest.mark.slow
def test_frozen_norms_with_epsilon_zero_and_a_fixed_size():
    """Epsilon 0 is what published weights of the first versions have."""
    torch.manual_seed(2)
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    module = detection.FasterRCNN(backbone, num_classes=CLASSES, fixed_size=(128, 96), box_detections_per_img=30)
    for part in module.modules():
        if isinstance(part, FrozenBatchNorm2d):
            part.eps = 0.0
    spread(module.double(), pictures())
    with torch.no_grad():
        theirs = module(as_theirs(pictures()))
    detector = from_torchvision(module)
    same(detector.predict(pictures()), theirs, first=1)
    assert detector.batch(pictures()).sizes.tolist() == [[96, 128]] * 2
    assert to_torchvision(detector, copy.deepcopy(module)) is not module
    norms = [part for part in detector.model.backbone.modules() if isinstance(part, PolicyBatchNorm2d)]
    assert norms and not any(norm.training for norm in detector.model.train().backbone.modules() if norm in norms)


def small(**changes: Any) -> nn.Module:
    """A fast module of random weights that finds something."""
    torch.manual_seed(4)
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d)
    options: dict[str, Any] = {"num_classes": 4, "min_size": 64, "max_size": 96, "rpn_post_nms_top_n_test": 50}
    return detection.FasterRCNN(backbone, **options | changes).eval()


def test_pictures_of_every_kind_and_broken_ones(tmp_path):
    module = spread(small(), pictures())
    detector = from_torchvision(module, names=["cat", "dog", "N/A"])
    assert next(detector.model.parameters()).dtype == torch.float32
    given = pictures(9, ((40, 60), (60, 40), (50, 50)))
    Image.fromarray(given[1]).save(tmp_path / "picture.png")
    (tmp_path / "broken.png").write_bytes(b"nothing")
    mixed = [given[0], tmp_path / "picture.png", Image.fromarray(given[2])]
    seen: list[int] = []
    found, plain = detector.predict(mixed, progress=seen.append), detector.predict(given)
    assert seen == [3] and [len(f) for f in found] == [len(f) for f in plain]
    assert all(np.array_equal(a.xyxy, b.xyxy) for a, b in zip(found, plain, strict=True))
    assert found[0].size == (40, 60) and set(found[0].names) <= {"cat", "dog", "N/A"}
    assert all((f.xyxy >= 0).all() and (f.xyxy <= [60, 60, 60, 60]).all() and f.xyxy.dtype == np.float32 for f in found)
    best = detector.predict(given, min_score=0.5)
    assert all((f.confidence >= 0.5).all() for f in best) and len(best[0]) < len(found[0])
    with pytest.raises(DataError, match=r"broken\.png"):
        detector.predict([tmp_path / "broken.png"])
    left = detector.predict([tmp_path / "broken.png", *given], strict=False)
    assert left[0].error is not None and len(left[0]) == 0
    assert np.array_equal(left[1].xyxy, found[0].xyxy)
    assert detector.predict([]) == []
    with pytest.raises(InputError, match="one picture was given"):
        detector.predict(given[0])
    with pytest.raises(InputError, match="picture 1 must be uint8"):
        detector.predict([given[0], given[0].astype(np.float32)])
    with pytest.raises(InputError, match="of the type int"):
        detector.predict([3])


def test_more_than_eight_pictures_are_several_batches():
    detector = from_torchvision(spread(small(), pictures()))
    many = pictures(1, ((40, 60),) * 9 + ((90, 40),))
    seen: list[int] = []
    found = detector.predict(many, progress=seen.append)
    assert seen == [8, 2] and len(found) == 10
    alone = detector.predict(many[8:])
    assert all(np.array_equal(a.xyxy, b.xyxy) for a, b in zip(found[8:], alone, strict=True))


def test_names():
    module = small()
    space = from_torchvision(module).label_space
    assert space.names == ("1", "2", "3") and space.ids == (1, 2, 3)
    space = from_torchvision(module, names=["__background__", "N/A", "dog", "N/A"]).label_space
    assert space.names == ("N/A", "dog", "N/A 3")
    with pytest.raises(ConfigError, match="2 names for 3 classes"):
        from_torchvision(module, names=["cat", "dog"])
    with pytest.raises(ConfigError, match="names for 3 classes"):
        from_torchvision(module, names="cat")
    with pytest.raises(ConfigError, match="Linear is no detector"):
        from_torchvision(nn.Linear(1, 1))
    retina = build("retinanet_resnet50_fpn", num_classes=91)
    assert from_torchvision(retina).label_space.names[:2] == ("0", "1")
    published = detection.RetinaNet_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    space = from_torchvision(retina, names=published).label_space
    assert space.names[1] == "person" and space.names[12] == "N/A" and space.ids[12] == 12 and len(space) == 91


def test_weights_go_back_and_the_module_finds_the_same():
    module = spread(small(), pictures())
    before = copy.deepcopy(module.state_dict())
    detector = gesso.from_torchvision(module)
    with torch.no_grad():
        for parameter in detector.model.parameters():
            parameter.mul_(1.01)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    empty = small()
    written = gesso.to_torchvision(detector, empty)
    assert written is empty
    assert torch.equal(written.rpn.head.cls_logits.weight, module.rpn.head.cls_logits.weight * 1.01)
    assert not written.roi_heads.box_predictor.bbox_pred.weight[:4].any()
    with torch.no_grad():
        theirs = written(as_theirs(pictures(), torch.float32))
    for ours, other in zip(detector.predict(pictures()), theirs, strict=True):
        assert len(ours) == len(other["scores"]) > 0
        assert np.abs(ours.confidence - other["scores"].numpy()).max() < 1e-4


def test_modules_of_another_form_are_not_written():
    detector = from_torchvision(small())
    with pytest.raises(ConfigError, match=r"cls_score\.weight' is .* there and .* here"):
        to_torchvision(detector, small(num_classes=6))
    with pytest.raises(ConfigError, match="kind is RetinaNetConfig there"):
        to_torchvision(detector, build("retinanet_resnet50_fpn"))
    with pytest.raises(ConfigError, match="backbone is resnet50 there and resnet18 here"):
        to_torchvision(detector.model, build("fasterrcnn_resnet50_fpn"))
    with pytest.raises(ConfigError, match=r"box_head\.box_weights"):
        to_torchvision(detector, small(bbox_reg_weights=(1.0, 1.0, 1.0, 1.0)))
    with pytest.raises(ConfigError, match="mean of pictures"):
        to_torchvision(detector, small(image_mean=[0.5, 0.5, 0.5]))
    with pytest.raises(ConfigError, match="no counterpart of Linear"):
        to_torchvision(nn.Linear(1, 1), small())
    with pytest.raises(ConfigError, match="backbone is resnet18 there"):
        to_torchvision(tiny_detector(), small())
    with pytest.raises(ConfigError, match="no detector"):
        to_torchvision(dataclasses.replace(detector, model=detector.model), nn.Linear(1, 1))
