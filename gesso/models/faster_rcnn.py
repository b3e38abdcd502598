"""Faster R-CNN with a feature pyramid.

Shape letters: B images, H x W padded pixels, R regions an image, M ground-truth slots.

Sources: Faster R-CNN (Ren et al. 2015); Feature Pyramid Networks (Lin et al. 2017), section 4. The conventions are
torchvision's ``fasterrcnn_resnet50_fpn``, except where shapes have to be fixed and for what lies in the padding: an
anchor whose centre lies outside the picture proper is neither trained on nor proposed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gesso.errors import ConfigError, nearest
from gesso.models.anchors import AnchorConfig, AnchorGenerator
from gesso.models.backbone import Backbone, BackboneConfig
from gesso.models.box_head import BoxHead, BoxHeadConfig
from gesso.models.fpn import FeaturePyramid
from gesso.models.losses import mean_over_batch
from gesso.models.postprocess import PostprocessConfig, detect_regions
from gesso.models.roi import RoIPoolConfig, RoIPooler, RoISamplingConfig, sample_rois
from gesso.models.rpn import RegionProposalNetwork, RPNConfig
from gesso.structures import Detections, ImageBatch, Targets


@dataclass(frozen=True, kw_only=True)
class FasterRCNNConfig:
    """Faster R-CNN with a feature pyramid; the defaults are those for pictures of 800 pixels."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """The backbone."""
    fpn_width: int = 256
    """Channels of the pyramid's levels."""
    anchors: AnchorConfig = field(default_factory=AnchorConfig)
    """Anchors of P2 to P6."""
    rpn: RPNConfig = field(default_factory=RPNConfig)
    """The first stage."""
    roi: RoISamplingConfig = field(default_factory=RoISamplingConfig)
    """Which proposals train the second stage."""
    pool: RoIPoolConfig = field(default_factory=RoIPoolConfig)
    """How their features are pooled."""
    box_head: BoxHeadConfig = field(default_factory=BoxHeadConfig)
    """The second stage."""
    postprocess: PostprocessConfig = field(default_factory=PostprocessConfig)
    """What is kept in inference."""

    def __post_init__(self) -> None:
        if self.fpn_width < 1:
            raise ConfigError(f"fpn_width is {self.fpn_width}", remedy="Choose a number above 0.")
        if len(self.anchors.sizes) < 4:
            raise ConfigError(
                f"anchors.sizes has {len(self.anchors.sizes)} levels", remedy="Give one size for each of P2 to P6."
            )


class FasterRCNN(nn.Module):
    """``(ImageBatch, Targets) -> losses`` in training mode, ``(ImageBatch) -> Detections`` in evaluation mode.

    The parts are plain modules: ``backbone``, ``fpn``, ``rpn``, ``box_head`` hold all the weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: FasterRCNNConfig, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.backbone = Backbone(config.backbone)
        channels = self.backbone.channels
        self.fpn = FeaturePyramid(
            channels, config.fpn_width, subsampled_levels=len(config.anchors.sizes) - len(channels)
        )
        self.rpn = RegionProposalNetwork(config.rpn, width=config.fpn_width, anchors=AnchorGenerator(config.anchors))
        self.pooler = RoIPooler(config.pool, self.fpn.out_names[: len(channels)])
        self.box_head = BoxHead(
            config.box_head, channels=config.fpn_width, pooled_size=config.pool.size, num_classes=num_classes
        )
        for name, values in (("mean", self.backbone.mean), ("std", self.backbone.std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1) * 255, persistent=False)

    def forward(self, batch: ImageBatch, targets: Targets | None = None) -> dict[str, Tensor] | Detections:
        """Losses in training mode, detections in evaluation mode.

        Args:
            batch: the pictures, uint8.
            targets: ground truth; needed in training mode, not looked at in evaluation mode.

        Returns:
            In training mode ``rpn_objectness``, ``rpn_box``, ``box_class`` and ``box_regression``, 0-dim tensors;
            each is a mean over the samples of the global batch, and the loss is their sum.
        """
        maps = self._pyramid(batch)
        if not self.training:
            return self._detect(batch, maps)
        assert targets is not None, "training mode needs targets"
        predictions = self.rpn(list(maps.values()), self._shape(batch), batch.sizes)
        terms = self.rpn.losses(predictions, targets, batch.key)
        proposals = self.rpn.propose(predictions, batch.sizes)
        regions = sample_rois(proposals.boxes, proposals.valid, targets, batch.key, self.config.roi)
        heads = self.box_head(self.pooler(maps, regions.boxes), len(batch.images))
        terms |= self.box_head.losses(heads, regions)
        return {name: mean_over_batch(term) for name, term in terms.items()}

    def feature_names(self) -> tuple[str, ...]:
        """The names that ``features`` knows, from the picture to the last layer."""
        return (*self.backbone.channels, *self.fpn.out_names, "roi", *self.box_head.layer_names)

    @torch.no_grad()
    def features(self, batch: ImageBatch, names: Sequence[str], *, boxes: Tensor | None = None) -> dict[str, Tensor]:
        """Activations by name, in the module's current mode (call ``eval()`` first).

        - C2 to C5: (B, channels, H / 2^k, W / 2^k) of the backbone, k the number in the name.
        - P2 to P6: (B, fpn_width, H / 2^k, W / 2^k) of the pyramid.
        - roi: (B, R, fpn_width, S, S), pooled from the pyramid inside ``boxes``.
        - fc1, fc2: (B, R, width), the box head's hidden layers, after the ReLU.

        Args:
            batch: the pictures.
            names: of ``feature_names``.
            boxes: (B, R, 4) xyxy on the padded picture, needed for roi, fc1 and fc2: the ground truth's, or others.

        Raises:
            ConfigError: a name is unknown, or boxes are needed and missing.
        """
        known = self.feature_names()
        for name in names:
            if name not in known:
                raise ConfigError(f"the detector has no feature '{name}'", remedy=nearest(name, known))
        found = dict(self.backbone(self._normalise(batch)))
        found |= self.fpn(found)
        regional = {"roi", *self.box_head.layer_names} & set(names)
        if regional:
            if boxes is None:
                raise ConfigError(f"the feature '{min(regional)}' needs boxes", remedy="Pass boxes=(B, R, 4).")
            pooled = self.pooler(found, boxes)
            layers = {"roi": pooled, **self.box_head.hidden(pooled)}
            found |= {name: value.unflatten(0, boxes.shape[:2]) for name, value in layers.items()}
        return {name: found[name] for name in names}

    def _normalise(self, batch: ImageBatch) -> Tensor:
        """Pictures (B, 3, H, W) as the backbone expects them, zero in the padding, channels_last."""
        images = batch.images.to(memory_format=torch.channels_last)
        values = (images.to(self.mean.dtype) - self.mean) / self.std
        rows = torch.arange(images.shape[2], device=images.device) < batch.sizes[:, :1]
        columns = torch.arange(images.shape[3], device=images.device) < batch.sizes[:, 1:]
        return values * (rows[:, None, :, None] & columns[:, None, None, :])

    def _pyramid(self, batch: ImageBatch) -> dict[str, Tensor]:
        maps: dict[str, Tensor] = self.fpn(self.backbone(self._normalise(batch)))
        return maps

    @staticmethod
    def _shape(batch: ImageBatch) -> tuple[int, int]:
        return batch.images.shape[2], batch.images.shape[3]

    def _detect(self, batch: ImageBatch, maps: dict[str, Tensor]) -> Detections:
        predictions = self.rpn(list(maps.values()), self._shape(batch), batch.sizes)
        proposals = self.rpn.propose(predictions, batch.sizes)
        heads = self.box_head(self.pooler(maps, proposals.boxes), len(batch.images))
        return detect_regions(
            proposals.boxes,
            proposals.valid,
            heads,
            batch.sizes,
            self.config.box_head.box_weights,
            self.config.postprocess,
        )
