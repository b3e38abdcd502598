"""The same detector in this project and in its peers, on the same synthetic batch; a module for the speed benchmarks.

All have a ResNet-50 with a feature pyramid, 80 classes, stem and first stage frozen, all batch norm fixed, 2000 boxes a
level before NMS and 1000 after it, 512 regions and 12 objects a picture, random weights (the last norm of each residual
block at 0.25, so that fixed statistics do not let the values grow), and pictures of the final size. A peer that is not
installed raises ImportError. Imports torch, torchvision and numpy beside this project at the top.
"""

import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from gesso.models.backbone import BackboneConfig
from gesso.models.build import DetectorConfig, build_detector
from gesso.models.faster_rcnn import FasterRCNNConfig
from gesso.models.mask_head import MaskHeadConfig
from gesso.models.norm import NormPolicy, apply_norm_policy
from gesso.models.retinanet import RetinaNetConfig
from gesso.models.rpn import RPNConfig
from gesso.structures import ImageBatch, Targets, to_device

MODELS = ("faster_rcnn", "mask_rcnn", "retinanet")
PEERS = ("torchvision", "detectron2", "mmdet")
CLASSES, OBJECTS, MASK_SIDE = 80, 12, 112


class Scene:
    """Pictures (uint8 (3, H, W)), boxes (12, 4), labels (12,) and, made when asked for, masks (12, H, W) uint8."""

    def __init__(self, batch: int, height: int, width: int, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        size = torch.tensor([width, height])
        self.images, self.boxes, self.labels = [], [], []
        for _ in range(batch):
            self.images.append(torch.randint(0, 256, (3, height, width), generator=g, dtype=torch.uint8))
            extent = size * torch.exp(torch.empty(OBJECTS, 2).uniform_(-3.0, -0.35, generator=g))
            centre = torch.rand(OBJECTS, 2, generator=g) * (size - extent) + extent / 2
            self.boxes.append(torch.cat([centre - extent / 2, centre + extent / 2], dim=1))
            self.labels.append(torch.randint(0, CLASSES, (OBJECTS,), generator=g))
        self.height, self.width = height, width

    def masks(self) -> list[Tensor]:
        """Each object fills its box."""
        found = []
        for boxes in self.boxes:
            masks = torch.zeros(OBJECTS, self.height, self.width, dtype=torch.uint8)
            for mask, (x1, y1, x2, y2) in zip(masks, boxes.round().int().tolist(), strict=True):
                mask[y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)] = 1
            found.append(masks)
        return found


def ours(model: str) -> DetectorConfig:
    """The configuration of this project's detector."""
    backbone = BackboneConfig(name="resnet50", pretrained=False, frozen_stages=1)
    if model == "retinanet":
        return RetinaNetConfig(backbone=backbone)
    mask = MaskHeadConfig(target_side=MASK_SIDE) if model == "mask_rcnn" else None
    return FasterRCNNConfig(backbone=backbone, rpn=RPNConfig(after_nms=1000), mask_head=mask)


def build_ours(model: str, scene: Scene, device: torch.device, compile: bool) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The detector in training mode, and what gives its loss on the scene."""
    config = ours(model)
    detector = build_detector(config, CLASSES)
    damp(detector)
    apply_norm_policy(detector, NormPolicy(kind="fixed"))
    detector = detector.to(device).train()
    batch, targets = tensors(scene, slots=100, masks=model == "mask_rcnn")
    batch, targets = to_device(batch, device), to_device(targets, device)
    forward = torch.compile(detector, fullgraph=True, dynamic=False) if compile else detector

    def loss() -> Tensor:
        return torch.stack(list(forward(batch, targets).values())).sum()

    return detector, loss


def tensors(scene: Scene, *, slots: int, masks: bool) -> tuple[ImageBatch, Targets]:
    """The scene as this project takes it, with ``slots`` object slots, as the loader would give it."""
    B = len(scene.images)
    images = torch.stack(scene.images).to(memory_format=torch.channels_last)
    sizes = torch.tensor([[scene.height, scene.width]]).repeat(B, 1)
    boxes, labels = torch.zeros(B, slots, 4), torch.zeros(B, slots, dtype=torch.int64)
    boxes[:, :OBJECTS], labels[:, :OBJECTS] = torch.stack(scene.boxes), torch.stack(scene.labels)
    valid = (torch.arange(slots) < OBJECTS).repeat(B, 1)
    batch = ImageBatch(
        images=images,
        sizes=sizes,
        scale=torch.ones(B, 2),
        original_sizes=sizes,
        image_index=torch.arange(B),
        key=torch.arange(B) + 1,
    )
    grid = torch.ones(B, slots, MASK_SIDE, MASK_SIDE, dtype=torch.uint8) if masks else None
    targets = Targets(
        boxes=boxes,
        labels=labels,
        valid=valid,
        ignore=torch.zeros_like(valid),
        box_id=torch.zeros_like(labels),
        masks=grid,
        mask_frames=boxes if masks else None,
    )
    return batch, targets


def build_torchvision(
    model: str, scene: Scene, device: torch.device, channels_last: bool
) -> tuple[nn.Module, Callable[[], Tensor]]:
    """torchvision's detector, its batch really made channels_last where asked (a ``model.to`` alone does not do it)."""
    detector = torchvision_detector(model, min(scene.height, scene.width), max(scene.height, scene.width))
    detector = detector.to(device).train()
    if channels_last:
        detector = detector.to(memory_format=torch.channels_last)
        join = detector.transform.batch_images
        detector.transform.batch_images = lambda images, size_divisible=32: join(images, size_divisible).contiguous(
            memory_format=torch.channels_last
        )
    images = [image.to(device).float().div_(255) for image in scene.images]
    offset = 0 if model == "retinanet" else 1
    targets = [
        {"boxes": boxes.to(device), "labels": labels.to(device) + offset}
        for boxes, labels in zip(scene.boxes, scene.labels, strict=True)
    ]
    if model == "mask_rcnn":
        for target, masks in zip(targets, scene.masks(), strict=True):
            target["masks"] = masks.to(device)
    return detector, lambda: sum(detector(images, targets).values())


def torchvision_detector(model: str, short: int, long: int, *, resize: bool = False) -> nn.Module:
    """torchvision's detector of the same form, on pictures of the final size unless ``resize``."""
    common: dict[str, Any] = {"min_size": short, "max_size": long, "_skip_resize": not resize}
    parts: dict[str, Any] = {"weights": None, "norm_layer": FrozenBatchNorm2d, "trainable_layers": 3}
    if model == "retinanet":
        extra = LastLevelP6P7(2048, 256)
        backbone = resnet_fpn_backbone(backbone_name="resnet50", returned_layers=[2, 3, 4], extra_blocks=extra, **parts)
        detector: nn.Module = RetinaNet(backbone, CLASSES, **common)
    else:
        kind = MaskRCNN if model == "mask_rcnn" else FasterRCNN
        backbone = resnet_fpn_backbone(backbone_name="resnet50", **parts)
        detector = kind(backbone, CLASSES + 1, rpn_post_nms_top_n_train=1000, **common)
    damp(detector)
    return detector


def build_detectron2(
    model: str, scene: Scene, device: torch.device, channels_last: bool
) -> tuple[nn.Module, Callable[[], Tensor]]:
    """detectron2's detector. ImportError where it is not installed."""
    zoo = importlib.import_module("detectron2.model_zoo")
    structures = importlib.import_module("detectron2.structures")
    name = {
        "faster_rcnn": "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
        "retinanet": "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
        "mask_rcnn": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
    }[model]
    config = zoo.get_config(name)
    config.MODEL.DEVICE, config.MODEL.WEIGHTS = str(device), ""
    config.MODEL.ROI_HEADS.NUM_CLASSES = config.MODEL.RETINANET.NUM_CLASSES = CLASSES
    config.INPUT.MASK_FORMAT = "bitmask"
    detector = importlib.import_module("detectron2.modeling").build_model(config)
    damp(detector)
    detector.train()
    if channels_last:
        detector = detector.to(memory_format=torch.channels_last)
        before = detector.preprocess_image

        def preprocess(inputs: list[dict[str, Any]]) -> Any:
            found = before(inputs)
            return structures.ImageList(found.tensor.contiguous(memory_format=torch.channels_last), found.image_sizes)

        detector.preprocess_image = preprocess
    inputs = []
    masks = scene.masks() if model == "mask_rcnn" else [None] * len(scene.images)
    for image, boxes, labels, mask in zip(scene.images, scene.boxes, scene.labels, masks, strict=True):
        size = (scene.height, scene.width)
        objects = structures.Instances(size, gt_boxes=structures.Boxes(boxes.clone()), gt_classes=labels.clone())
        if mask is not None:
            objects.gt_masks = structures.BitMasks(mask.bool())
        inputs.append({"image": image, "height": size[0], "width": size[1], "instances": objects})
    importlib.import_module("detectron2.utils.events").EventStorage(0).__enter__()
    return detector, lambda: sum(detector(inputs).values())


def build_mmdet(
    model: str, scene: Scene, device: torch.device, channels_last: bool
) -> tuple[nn.Module, Callable[[], Tensor]]:
    """MMDetection's detector. ImportError where it is not installed."""
    mmcv = importlib.import_module("mmcv")
    if mmcv.__version__.startswith("2.2"):
        mmcv.__version__ = "2.1.0"  # mmdet 3.3.0 asserts mmcv < 2.2.0
    mmdet = importlib.import_module("mmdet")
    structures = importlib.import_module("mmdet.structures")
    importlib.import_module("mmdet.utils").register_all_modules(init_default_scope=True)
    name = {
        "faster_rcnn": "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py",
        "retinanet": "retinanet/retinanet_r50_fpn_1x_coco.py",
        "mask_rcnn": "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py",
    }[model]
    root = os.path.join(os.path.dirname(mmdet.__file__), ".mim", "configs")  # noqa: PTH118, PTH120
    config = importlib.import_module("mmengine.config").Config.fromfile(os.path.join(root, name))  # noqa: PTH118
    config.model.backbone.init_cfg, config.model.backbone.style = None, "pytorch"
    detector = importlib.import_module("mmdet.registry").MODELS.build(config.model).to(device)
    damp(detector)
    detector.train()
    if channels_last:
        detector = detector.to(memory_format=torch.channels_last)
    data = importlib.import_module("mmengine.structures").InstanceData
    bitmaps = importlib.import_module("mmdet.structures.mask").BitmapMasks
    size = (scene.height, scene.width)
    head = {"img_shape": size, "ori_shape": size, "pad_shape": size, "batch_input_shape": size}
    samples = []
    masks = scene.masks() if model == "mask_rcnn" else [None] * len(scene.images)
    for boxes, labels, mask in zip(scene.boxes, scene.labels, masks, strict=True):
        sample = structures.DetDataSample(metainfo={**head, "scale_factor": (1.0, 1.0)})
        sample.gt_instances = data(bboxes=boxes.clone(), labels=labels.clone())
        if mask is not None:
            sample.gt_instances.masks = bitmaps(mask.numpy(), *size)
        sample.ignored_instances = data(bboxes=torch.zeros(0, 4))
        samples.append(sample)

    def loss() -> Tensor:
        there = detector.data_preprocessor({"inputs": list(scene.images), "data_samples": samples}, training=True)
        images = there["inputs"].contiguous(memory_format=torch.channels_last) if channels_last else there["inputs"]
        total: Tensor = detector.parse_losses(detector(images, there["data_samples"], mode="loss"))[0]
        return total

    return detector, loss


def damp(detector: nn.Module) -> None:
    """Sets the last norm's scale of each bottleneck to 0.25."""
    for name, module in detector.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 1 and name.endswith(("bn3", "conv3.norm")):
            with torch.no_grad():
                weight.fill_(0.25)


BUILDERS = {"torchvision": build_torchvision, "detectron2": build_detectron2, "mmdet": build_mmdet}
VERSIONS = {"torch": torch.__version__, "torchvision": torchvision.__version__}
