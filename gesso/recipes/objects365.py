"""Objects365: its baseline, and fine-tuning of what it pre-trained.

Source: Shao et al., "Objects365: A Large-scale, High-quality Dataset for Object Detection", ICCV 2019: Faster R-CNN
with ResNet-50 and a feature pyramid, batch norm over the 16 pictures of a step, 1,350k steps. Fine-tuning starts at
0.003, which is 0.02 times the ratio of the weight norms of Objects365 and ImageNet (0.15, section 4.3.1), and drops to
a fifth twice; ``gesso transfer`` finds the ratio of other weights. Name the weights with --init; without it the
backbone is that of ImageNet, and ``coco_imagenet`` has the rate for that.

``backbone`` takes the backbone alone, ``backbone_and_head`` also the pyramid and both heads, whose rows of classes are
carried over by name (the comparison of Tables 11 and 12). Not printed, and our choice: the warm-up, the drops at six
and eight ninths, 16 pictures a step everywhere, on VOC the size of pictures and 12 passes, on CityPersons full
resolution. Semantic segmentation (Tables 9 and 10) is in ``segment``.
"""

from collections.abc import Callable

from gesso.data.transforms import InputConfig, KeepRatio
from gesso.models.backbone import BackboneConfig
from gesso.models.faster_rcnn import FasterRCNNConfig
from gesso.models.norm import NormPolicy
from gesso.run.config import DataConfig, Part, RunConfig
from gesso.training.optimizer import SGD
from gesso.training.schedule import ScheduleConfig
from gesso.training.stage import TrainingConfig

BATCH = 16
RATE, RATIO = 0.02, 0.15
ONE_X, VOC, CITYPERSONS = 90_000, 12_400, 180_000
"""Steps of fine-tuning."""
_COCO_INPUT = KeepRatio(short_sides=(800,), long_side=1333)
_VOC_INPUT = KeepRatio(short_sides=(600,), long_side=1000)
_STREET_INPUT = KeepRatio(short_sides=(1024,), long_side=2048)
_HEAD: tuple[Part, ...] = ("backbone", "neck", "rpn", "box_head")


def _config(
    resize: KeepRatio,
    steps: int,
    rate: float,
    drops: tuple[float, float],
    factor: float,
    parts: tuple[Part, ...] | None,
) -> RunConfig:
    return RunConfig(
        model=FasterRCNNConfig(backbone=BackboneConfig(name="resnet50.tv_in1k")),
        data=DataConfig(workers=4),
        init_parts=parts,
        training=TrainingConfig(
            images=steps * BATCH,
            steps=steps,
            batch_size=BATCH,
            input=InputConfig(resize=resize),
            optimizer=SGD(rate=rate, momentum=0.9, weight_decay=1e-4),
            schedule=ScheduleConfig(base_images=BATCH, milestones=drops, factor=factor),
            norm=NormPolicy(kind="sync"),
            evaluate_every=-(-steps // 12),
        ),
    )


def pretrain() -> RunConfig:
    """The baseline: 1,350k steps of 16 pictures, the rate times 0.1 after 900k and 1,200k."""
    return _config(_COCO_INPUT, 1_350_000, RATE, (900 / 1350, 1200 / 1350), 0.1, None)


def coco_imagenet() -> RunConfig:
    """COCO 1x from ImageNet: the rate 0.02, times 0.1 twice (Table 5)."""
    return _config(_COCO_INPUT, ONE_X, RATE, (6 / 9, 8 / 9), 0.1, ("backbone",))


def _fine_tuning(
    text: str, resize: KeepRatio, steps: int, parts: tuple[Part, ...] = ("backbone",)
) -> Callable[[], RunConfig]:
    def recipe() -> RunConfig:
        return _config(resize, steps, RATIO * RATE, (6 / 9, 8 / 9), 0.2, parts)

    recipe.__doc__ = text
    return recipe


coco_backbone = _fine_tuning("COCO 1x from Objects365's backbone (Table 5).", _COCO_INPUT, ONE_X)
coco_backbone_and_head = _fine_tuning(
    "COCO 1x from Objects365's backbone, pyramid and heads.", _COCO_INPUT, ONE_X, _HEAD
)
voc_backbone = _fine_tuning("VOC 07+12 from Objects365's backbone (Table 7).", _VOC_INPUT, VOC)
voc_backbone_and_head = _fine_tuning("VOC 07+12 from Objects365's backbone, pyramid and heads.", _VOC_INPUT, VOC, _HEAD)
citypersons_backbone = _fine_tuning(
    "CityPersons from Objects365's backbone, 180k steps (Table 8).", _STREET_INPUT, CITYPERSONS
)
citypersons_backbone_and_head = _fine_tuning(
    "CityPersons from Objects365's backbone, pyramid and heads, 180k steps.", _STREET_INPUT, CITYPERSONS, _HEAD
)
