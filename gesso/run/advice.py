"""What the papers measured, for a run that chooses otherwise. It is said once, in the log; the run's choice counts."""

from torch import nn

from gesso.models.detector import Detector
from gesso.models.model import Model
from gesso.run.config import RunConfig, Task


def norm_advice(config: RunConfig, model: Model, started_from: Task | None) -> str | None:
    """A word on batch norm in the last stage of a detector; None where there is nothing to say.

    Source: "Rethinking Training from Scratch for Object Detection", Table 2, COCO box AP of Mask R-CNN with ResNet-50.

    Args:
        config: of the run.
        model: its model.
        started_from: the task of the weights that it starts from, None where they are new or timm's.
    """
    if not isinstance(model, Detector) or not any(isinstance(m, nn.BatchNorm2d) for m in model.backbone.modules()):
        return None
    kind = config.training.norm.kind
    if config.pretraining is not None or started_from == "detection":
        if kind not in ("fixed", "group_norm"):  # which was not measured there
            return (
                f"training.norm.kind is {kind} after the pre-training of a whole detector; direct pre-training's "
                "Table 2 measured 40.4 AP with batch norm fixed, 37.8 otherwise"
            )
    elif (config.model.backbone.pretrained or started_from == "classification") and kind == "fixed":
        return (
            "training.norm.kind is fixed after the pre-training of a classifier; direct pre-training's Table 2 "
            "measured 39.2 AP with affine, 38.7 with fixed"
        )
    return None
