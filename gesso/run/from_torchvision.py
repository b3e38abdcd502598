"""A torchvision detector as one of ours, ready to predict, and our weights back into it.

Predictions read the pictures as torchvision does: resized in floating point, several in one batch, padded with zeros.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops.misc import FrozenBatchNorm2d

from gesso import distributed
from gesso.data import rle
from gesso.data.decode import Pixels, read_picture, upright_rgb
from gesso.data.records import Masks
from gesso.data.transforms import STRIDE, InputConfig, KeepRatio
from gesso.errors import ConfigError, DataError, InputError
from gesso.label_space import LabelSpace, normalise
from gesso.log import get_logger
from gesso.models.faster_rcnn import FasterRCNN, FasterRCNNConfig
from gesso.models.norm import NormPolicy, apply_norm_policy
from gesso.models.retinanet import RetinaNet, RetinaNetConfig
from gesso.models.torchvision_config import read_config
from gesso.models.torchvision_weights import from_torchvision_state, to_theirs
from gesso.run.predictor import Picture, Predictions, TrainedDetector
from gesso.structures import Detections, ImageBatch

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class TorchvisionDetector(TrainedDetector):
    """A detector that ``predict``s on pictures resized and padded as torchvision does it.

    Pictures stand in batches of ``batch_size`` in the order in which they are given; a smaller one is no more padded
    than torchvision's. ``detect`` and ``evaluate`` on an index read pictures as in training (``input``): the same
    sizes but for a pixel, rounded to whole values, on our fixed shapes.

    Attributes:
        short: the short side in pixels after the resize.
        long: no side becomes longer than this.
        fixed: width and height that every picture is resized to instead; None = the ratio of the sides stays.
        divisible: the padded sides are multiples of this.
    """

    short: int
    long: int
    fixed: tuple[int, int] | None
    divisible: int

    def predict(
        self,
        pictures: Sequence[Picture],
        *,
        min_score: float = 0.0,
        strict: bool = True,
        progress: Callable[[int], None] | None = None,
    ) -> list[Predictions]:
        """Detects in pictures of any size; arguments and errors are those of ``TrainedDetector.predict``."""
        if isinstance(pictures, str | Path | np.ndarray | Image.Image):
            raise InputError("one picture was given instead of a list", remedy="Write predict([picture]).")
        found: list[Predictions] = []
        given = list(enumerate(pictures))
        for first in range(0, len(given), self.batch_size):
            chunk = given[first : first + self.batch_size]
            read: list[Pixels] = []
            broken: dict[int, str] = {}
            for place, picture in chunk:
                try:
                    read.append(_pixels(picture, place))
                except DataError as error:
                    if strict:
                        raise
                    log.warning("%s (left out)", error)
                    broken[place] = str(error)
            made = iter(self._predict_batch(read, min_score) if read else [])
            found += [self._nothing(broken[place]) if place in broken else next(made) for place, _ in chunk]
            if progress is not None:
                progress(len(chunk))
        return found

    def batch(self, pictures: Sequence[Pixels]) -> ImageBatch:
        """The pictures (height, width, 3) as torchvision would batch them, in the type of the detector's weights."""
        dtype = self.model.get_buffer("mean").dtype
        resized = [self._resized(torch.tensor(p, device=self.device).permute(2, 0, 1).to(dtype)) for p in pictures]
        sizes = [(r.shape[1], r.shape[2]) for r in resized]
        H, W = (math.ceil(max(sides) / self.divisible) * self.divisible for sides in zip(*sizes, strict=True))
        originals = torch.tensor([picture.shape[:2] for picture in pictures])
        return ImageBatch(
            images=torch.stack([F.pad(r, (0, W - r.shape[2], 0, H - r.shape[1])) for r in resized]),
            sizes=torch.tensor(sizes).to(self.device),
            scale=(torch.tensor(sizes) / originals).float().to(self.device),
            original_sizes=originals.to(self.device),
            image_index=torch.arange(len(pictures)).to(self.device),
            key=torch.zeros(len(pictures), dtype=torch.int64).to(self.device),
        )

    def _resized(self, picture: Tensor) -> Tensor:
        how: dict[str, Any] = {"mode": "bilinear", "align_corners": False}
        if self.fixed is not None:
            return F.interpolate(picture[None], size=self.fixed[::-1], **how)[0]
        height, width = picture.shape[1:]
        factor = min(self.short / min(height, width), self.long / max(height, width))
        if min(height, width) * factor < 1:
            raise InputError(
                f"a picture of {width} x {height} pixels has no pixel left on its short side once it is resized",
                remedy="Cut it into pieces.",
            )
        return F.interpolate(picture[None], scale_factor=factor, recompute_scale_factor=True, **how)[0]

    def _predict_batch(self, pictures: Sequence[Pixels], min_score: float) -> list[Predictions]:
        batch = self.batch(pictures)
        detector = self.ready
        with torch.inference_mode():
            found: Detections = detector(batch)
        return [self._of_row(found, row, batch, min_score) for row in range(len(pictures))]

    def _of_row(self, found: Detections, row: int, batch: ImageBatch, min_score: float) -> Predictions:
        keep = found.valid[row] & (found.scores[row] >= min_score)
        height, width = batch.original_sizes[row].tolist()
        size = tuple(batch.sizes[row].tolist())
        boxes: Tensor = resize_boxes(found.boxes[row][keep].to(batch.images.dtype), size, (height, width))
        limit = torch.tensor([width, height, width, height], dtype=boxes.dtype, device=boxes.device)
        labels = found.labels[row][keep].cpu().numpy()
        masks = None if found.masks is None else _paste(found.masks[row][keep], boxes, (height, width))
        return Predictions(
            xyxy=torch.minimum(boxes, limit).float().cpu().numpy(),
            confidence=found.scores[row][keep].float().cpu().numpy(),
            class_id=labels,
            names=tuple(self.label_space.names[label] for label in labels.tolist()),
            masks=masks,
            size=(height, width),
        )

    def _nothing(self, error: str) -> Predictions:
        return Predictions(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), (), error)


def _paste(probabilities: Tensor, boxes: Tensor, size: tuple[int, int]) -> Masks:
    """The masks (n, T, T) in boxes (n, 4) on the whole picture, as torchvision pastes them: on whole pixels."""
    each = zip(probabilities.to(boxes.dtype), boxes, strict=True)
    pasted = (paste_masks_in_image(mask[None, None], box[None], size)[0, 0] >= 0.5 for mask, box in each)
    return Masks.of([rle.encode(mask.cpu().numpy()) for mask in pasted])


def from_torchvision(
    module: nn.Module, *, names: Sequence[str] | None = None, device: str = "cpu"
) -> TorchvisionDetector:
    """torchvision's Faster R-CNN, Mask R-CNN or RetinaNet as a detector of ours; the module is left as it is.

    The detector has the module's weights, numbers and precision (float64, or else float32), and finds the same. With
    the two-stage detectors ``class_id`` is torchvision's label - 1: ours are counted from 0 without a background. With
    RetinaNet it is torchvision's label as it is; published weights leave number 0 unused there.

    Args:
        module: as ``torchvision.models.detection.fasterrcnn_resnet50_fpn`` and the like build it.
        names: of the classes, such as ``weights.meta["categories"]``, with or without the background in front; None =
            torchvision's labels as words. A name that stands there before, as "N/A" does, gets its label behind it.
        device: cpu, cuda, cuda:N or auto.

    Raises:
        ConfigError: the module is no such detector, a part of it has no counterpart, or the names do not fit.
    """
    config = read_config(module)
    state = module.state_dict()
    detector = from_torchvision_state(state, config)
    if any(isinstance(part, FrozenBatchNorm2d) for part in module.modules()):
        apply_norm_policy(detector.backbone, NormPolicy(kind="fixed"))
    transform: Any = module.transform
    for name, values in (("mean", transform.image_mean), ("std", transform.image_std)):
        buffer = detector.get_buffer(name)
        buffer.copy_(torch.tensor(values, dtype=torch.float64).view_as(buffer) * 255)
    short, long, divisible = int(transform.min_size[-1]), int(transform.max_size), int(transform.size_divisible)
    space = _label_space(names, detector.num_classes, first=0 if isinstance(config, RetinaNetConfig) else 1)
    place = distributed.choose_device(device)
    return TorchvisionDetector(
        model=detector.to(place).eval(),
        label_space=space,
        input=InputConfig(resize=KeepRatio(short_sides=(min(short, long),), long_side=long, stride=STRIDE)),
        device=place,
        short=short,
        long=long,
        fixed=None if transform.fixed_size is None else tuple(transform.fixed_size),
        divisible=divisible,
    )


def to_torchvision(detector: TrainedDetector | nn.Module, module: nn.Module) -> nn.Module:
    """Writes a detector's weights into a torchvision module of the same form, in place, and returns it.

    What torchvision never reads becomes zero: box deltas and mask of the background.

    Args:
        detector: ours; of ``from_torchvision``, ``load``, or the module itself.
        module: torchvision's, built for as many classes (and the background, but for RetinaNet).

    Raises:
        ConfigError: the two differ in form: layers, classes, anchors, pooling, epsilon or normalisation of pictures.
    """
    ours = detector.model if isinstance(detector, TrainedDetector) else detector
    if not isinstance(ours, FasterRCNN | RetinaNet):
        raise ConfigError(f"torchvision has no counterpart of {type(ours).__name__}")
    theirs = read_config(module)
    _check_form(ours, theirs, module)
    written = to_theirs(ours.state_dict(), ours.config)
    target = module.state_dict()
    wrong = [name for name in target if name not in written or written[name].shape != target[name].shape]
    wrong += [name for name in written if name not in target and not name.endswith("num_batches_tracked")]
    if wrong:
        shapes = [tuple(state[wrong[0]].shape) if wrong[0] in state else "nothing" for state in (target, written)]
        raise ConfigError(
            f"the detector does not fit into the module: '{wrong[0]}' is {shapes[0]} there and {shapes[1]} here",
            remedy="Build the module of the same kind and with the same number of classes.",
        )
    with torch.no_grad():
        for name, value in target.items():
            value.copy_(written[name])
    return module


def _check_form(ours: FasterRCNN | RetinaNet, theirs: FasterRCNNConfig | RetinaNetConfig, module: Any) -> None:
    """Refuses what would give other detections with the same weights."""
    own = ours.config
    epsilons = {part.eps for part in ours.backbone.modules() if isinstance(part, nn.BatchNorm2d)}
    pairs: list[tuple[str, object, object]] = [
        ("kind", type(own).__name__, type(theirs).__name__),
        ("backbone", own.backbone.name.split(".")[0], theirs.backbone.name),
        ("backbone.output_stride", own.backbone.output_stride, 32),
        ("backbone.norm_eps", epsilons, {theirs.backbone.norm_eps}),
        ("neck", own.neck, theirs.neck),
        ("anchors", (own.anchors.levels(), own.anchors.ratios), (theirs.anchors.levels(), theirs.anchors.ratios)),
        ("anchors.rounded", own.anchors.rounded, True),
    ]
    if isinstance(own, FasterRCNNConfig) and isinstance(theirs, FasterRCNNConfig):
        pairs += [
            ("pool", own.pool, theirs.pool),
            ("box_head.box_weights", own.box_head.box_weights, theirs.box_head.box_weights),
            ("mask_head.pool_size", _mask_cells(own), _mask_cells(theirs)),
        ]
    for name, factor in (("mean", module.transform.image_mean), ("std", module.transform.image_std)):
        values = ours.get_buffer(name).flatten().tolist()
        pairs.append((f"{name} of pictures", [round(v / 255, 5) for v in values], [round(v, 5) for v in factor]))
    for name, here, there in pairs:
        if here != there:
            raise ConfigError(
                f"the detector does not fit into the module: {name} is {there} there and {here} here",
                remedy="Build the module of the same form.",
            )


def _mask_cells(config: FasterRCNNConfig) -> int | None:
    return None if config.mask_head is None else config.mask_head.pool_size


def _pixels(picture: object, place: int) -> Pixels:
    if isinstance(picture, str | Path):
        return read_picture(Path(picture))
    if isinstance(picture, Image.Image):
        return upright_rgb(picture)
    if not isinstance(picture, np.ndarray):
        what = f"picture {place} is of the type {type(picture).__name__}"
        raise InputError(what, remedy="Give a path, a uint8 (H, W, 3) RGB array, or a picture of Pillow's.")
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
        raise InputError(
            f"picture {place} must be uint8 (H, W, 3) RGB, found {picture.dtype} {picture.shape}",
            remedy="Convert it to RGB with 8 bits a channel.",
        )
    return np.ascontiguousarray(picture)


def _label_space(names: Sequence[str] | None, count: int, *, first: int) -> LabelSpace:
    """``count`` classes, of which number 0 is torchvision's label ``first``."""
    if names is None:
        words = [str(first + k) for k in range(count)]
    else:
        words = [] if isinstance(names, str) else list(names)
        if len(words) == count + first:
            words = words[first:]
        if len(words) != count:
            background = ", or one more with the background in front" if first else ""
            raise ConfigError(
                f"there are {len(words)} names for {count} classes", remedy=f"Give {count} names{background}."
            )
    seen: set[str] = set()
    for k, word in enumerate(words):
        if not normalise(word) or normalise(word) in seen:
            words[k] = f"{word} {first + k}"
        seen.add(normalise(words[k]))
    return LabelSpace(names=tuple(words), ids=tuple(range(first, first + count)))
