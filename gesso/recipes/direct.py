"""Direct pre-training: the paper's tables, and the same in small for data of one's own.

Source: Li et al., "Rethinking Training from Scratch for Object Detection", 2021 (arXiv 2106.03112), and its published
configurations: train the whole detector from random weights on the target data itself, at low resolution, in large
batches, at a constant rate and with batch norm trained; then fine-tune it at full resolution with batch norm fixed.

``mask_p1x_1x`` is one run of both stages. P1x is 48 passes over COCO, 88k steps of 64 pictures; P2x to P4x are longer
in proportion. 1x is 12 passes, 88k steps of 16 pictures; ``6e`` and ``18e`` are 6 and 18 passes. Lengths are pictures:
for data of another size give others with ``--pretraining.images`` and ``--training.images``. Other combinations are
options too: P3x of RetinaNet is ``direct:retinanet_p1x_1x --pretraining.images 16886304``. All is meant for 8 GPUs, and
learns the same on any number that divides its batch and can form its groups of batch norm (docs/distributed.md).
``small`` recipes are ours, for one small GPU or a CPU, and reproduce no figure.

AP is what the paper or its repository reports for the row, box / mask. Settings that the configurations do not hold
come from the paper's text or the work that the row is taken from; where none says it, the recipe says "our choice".
"""

import dataclasses
from collections.abc import Callable

from gesso.data.transforms import MULTI_SCALE, Direct, ImageNetCrop, InputConfig, KeepRatio
from gesso.models.build import ModelConfig
from gesso.models.norm import NormPolicy
from gesso.recipes import detectors
from gesso.recipes.direct_stages import (
    AFFINE,
    BASE_IMAGES,
    CASCADE,
    COCO_IMAGES,
    FASTER,
    FIXED,
    FULL,
    LOW,
    MASK,
    ONE_X,
    P1X,
    RESNET,
    RESNET_IMAGENET,
    RETINANET,
    SWIN_MASK,
    SYNC,
    TWO_DROPS,
    Resize,
    Trainee,
    faster_rcnn,
    full_stage,
    pretraining_stage,
    sgd,
    stage,
)
from gesso.recipes.small import fine_tuning_stage, low_resolution_stage, scratch_stage, small_detector
from gesso.run.config import DataConfig, Part, RunConfig
from gesso.training.optimizer import SGD, AdamW
from gesso.training.schedule import ScheduleConfig
from gesso.training.stage import TrainingConfig

Recipe = Callable[[], RunConfig]

_COLOUR = {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2}
_SMALL_FULL = InputConfig(resize=KeepRatio(short_sides=(320,), long_side=427), **_COLOUR)
_SMALL_LOW = InputConfig(resize=Direct(side=160), **_COLOUR)
_DATA = DataConfig(workers=4)


def small() -> RunConfig:
    """Direct pre-training of a small detector on any index: 160 pixels in batches of 16, then 320 in batches of 4."""
    return RunConfig(
        model=small_detector(),
        pretraining=low_resolution_stage(_SMALL_LOW, steps=1000, checkpoint_every=200, evaluate_every=500),
        training=fine_tuning_stage(_SMALL_FULL, steps=1500, checkpoint_every=250, evaluate_every=500),
    )


def small_scratch() -> RunConfig:
    """The baseline of direct:small: the same detector from random weights at full resolution."""
    training = scratch_stage(_SMALL_FULL, steps=2500, checkpoint_every=250, evaluate_every=500)
    return RunConfig(model=small_detector(), training=training)


def small_fine_tune() -> RunConfig:
    """The second stage of direct:small alone, for weights named by --init; batch norm is fixed, so it needs them."""
    return dataclasses.replace(small(), pretraining=None)


def small_mask() -> RunConfig:
    """direct:small with a mask head, for an index with masks."""
    return dataclasses.replace(small(), model=detectors.mask_rcnn().model)


def small_cascade() -> RunConfig:
    """direct:small of Cascade R-CNN."""
    return dataclasses.replace(small(), model=detectors.cascade_rcnn().model)


def small_retinanet() -> RunConfig:
    """direct:small of RetinaNet."""
    return dataclasses.replace(small(), model=detectors.retinanet().model)


def _recipe(
    text: str,
    model: ModelConfig,
    training: TrainingConfig,
    *,
    pretraining: TrainingConfig | None = None,
    init_parts: tuple[Part, ...] | None = None,
) -> Recipe:
    config = RunConfig(model=model, data=_DATA, pretraining=pretraining, training=training, init_parts=init_parts)

    def recipe() -> RunConfig:
        return config

    recipe.__doc__ = text
    return recipe


def _on_coco(trainee: Trainee, passes: int, optimizer: SGD | AdamW, norm: NormPolicy) -> TrainingConfig:
    """So many passes at full resolution."""
    return full_stage(
        passes * COCO_IMAGES,
        optimizer,
        norm=norm,
        frozen_stages=trainee.frozen_stages,
        precision=trainee.precision,
    )


def _direct(
    trainee: Trainee,
    p: int = 1,
    passes: int = 12,
    *,
    resize: Resize = LOW,
    per_gpu: int = 8,
    norm: NormPolicy = FIXED,
    note: str = "",
) -> Recipe:
    """P1x to P4x on COCO (``p``), then fine-tuning of so many passes."""
    return _recipe(
        f"{trainee.name}: P{p}x, then {passes} passes. {note}".strip(),
        trainee.random,
        _on_coco(trainee, passes, trainee.fine_tuning, norm),
        pretraining=pretraining_stage(trainee, p * P1X, resize=resize, per_gpu=per_gpu),
    )


def _pretraining(trainee: Trainee, p: int) -> Recipe:
    """The first stage alone, for runs that take parts of its weights by --init."""
    training = pretraining_stage(trainee, p * P1X)
    return _recipe(f"{trainee.name}: P{p}x alone; a fine-tuning takes it by --init.", trainee.random, training)


def _imagenet(
    trainee: Trainee, passes: int = 12, *, model: ModelConfig | None = None, norm: NormPolicy = AFFINE, note: str = ""
) -> Recipe:
    """The baseline: a backbone trained on ImageNet, then so many passes over COCO."""
    return _recipe(
        f"{trainee.name}: from ImageNet, {passes} passes. {note}".strip(),
        model or trainee.imagenet,
        _on_coco(trainee, passes, trainee.baseline, norm),
    )


def _parts(*parts: Part, note: str) -> Recipe:
    return _recipe(
        f"Mask R-CNN: 1x from a run of direct:mask_p4x (--init), of which it takes {', '.join(parts)}. {note}",
        MASK.random,
        _on_coco(MASK, 12, MASK.fine_tuning, FIXED),
        init_parts=parts,
    )


def _scratch(x: int, text: str, *, model: ModelConfig, norm: NormPolicy, resize: Resize = FULL) -> Recipe:
    """From random weights at full resolution, all layers trained, for ``x`` times 12 passes.

    As in He et al., "Rethinking ImageNet Pre-training" (2018), section 3: the rate drops 60k and 20k steps before the
    end, however long the training is, of 90k for each x. mmdetection's configuration of it warms up from a tenth.
    """
    schedule = ScheduleConfig(
        base_images=BASE_IMAGES, warmup_ratio=0.1, milestones=((x * 9 - 6) / (x * 9), (x * 9 - 2) / (x * 9))
    )
    optimizer = sgd(0.02, norm_decay=0.0)
    inputs = InputConfig(resize=resize)
    training = full_stage(x * ONE_X, optimizer, norm=norm, schedule=schedule, input=inputs, frozen_stages=-1)
    return _recipe(f"Mask R-CNN: from random weights, {x}x. {text}", model, training)


# Direct pre-training (Tables 1 and 4), and other detectors
mask_p1x_1x = _direct(MASK, 1, note="AP 40.0 / 35.8.")
mask_p2x_1x = _direct(MASK, 2, note="AP 41.0 / 36.6.")
mask_p3x_1x = _direct(MASK, 3, note="AP 41.5 / 37.0.")
mask_p4x_1x = _direct(MASK, 4, note="AP 41.7 / 37.3.")
faster_p1x_1x = _direct(FASTER, note="AP 39.3.")
cascade_p1x_1x = _direct(CASCADE, note="AP 41.5.")
retinanet_p1x_1x = _direct(RETINANET, note="AP 37.1.")
swin_p1x_1x = _direct(SWIN_MASK, note="AP 45.0 / 40.5.")
swin_p3x_1x = _direct(SWIN_MASK, 3, note="AP 46.9 / 41.9.")

# Their baselines from ImageNet; the head of Mask and Faster R-CNN is that of mmdetection's model zoo, whose AP it is
mask_imagenet_1x = _imagenet(MASK, note="AP 38.2 / 34.7.")
mask_imagenet_2x = _imagenet(MASK, 24)
faster_imagenet_1x = _imagenet(FASTER, note="AP 37.4.")
cascade_imagenet_1x = _imagenet(CASCADE, note="AP 40.3.")
retinanet_imagenet_1x = _imagenet(RETINANET, note="AP 36.5.")
swin_imagenet_1x = _imagenet(SWIN_MASK, note="AP 43.8 / 39.6. Four convolutions in the box head, as after P1x.")

# And from random weights
scratch_bn_4x = _scratch(
    4,
    "Batch norm over the 2 pictures of a GPU, in the backbone alone (our choice).",
    model=MASK.random,
    norm=NormPolicy(kind="sync", images=2),
)
scratch_gn_6x = _scratch(
    6,
    "Group norm in the backbone, the pyramid and both heads.",
    model=faster_rcnn(RESNET, masks=True, norm="group"),
    norm=NormPolicy(kind="group_norm"),
)
scratch_syncbn_6x = _scratch(
    6,
    "Batch norm over the 16 pictures of a step in the backbone, the pyramid and both heads.",
    model=faster_rcnn(RESNET, masks=True, norm="batch"),
    norm=SYNC,
)
scratch_syncbn_3x_multi_scale = _scratch(
    3,
    "As direct:scratch_syncbn_6x, with short sides from 640 to 800.",
    model=faster_rcnn(RESNET, masks=True, norm="batch"),
    norm=SYNC,
    resize=KeepRatio(short_sides=MULTI_SCALE, long_side=1333),
)
scratch_640_syncbn_3x = _recipe(
    "Mask R-CNN: as DropBlock trains, all of it at 640 x 640 from random weights, 64 pictures a step. 3x counts steps, "
    "as P3x does, and the rate drops after 8 and 11 twelfths (both our choice).",
    MASK.random,
    stage(
        3 * P1X,
        64,
        input=InputConfig(resize=Direct(side=640)),
        optimizer=MASK.pretraining,
        schedule=TWO_DROPS,
        norm=SYNC,
        frozen_stages=-1,
    ),
)

# Table 2: what batch norm does in fine-tuning. The paper's 40.4 and 39.2 are above its Table 1: settings differ that
# it does not name; a box head with four convolutions explains those from ImageNet.
_HEAD_4 = faster_rcnn(RESNET_IMAGENET, masks=True)
norm_affine_after_direct = _direct(MASK, norm=AFFINE, note="Batch norm affine.")
norm_sync_after_direct = _direct(MASK, norm=SYNC, note="Batch norm over the 16 pictures of a step.")
norm_fixed_after_direct = _direct(MASK, norm=FIXED, note="Batch norm fixed: the best of the three, AP 40.4.")
norm_affine_after_imagenet = _imagenet(MASK, model=_HEAD_4, norm=AFFINE, note="Batch norm affine: AP 39.2.")
norm_sync_after_imagenet = _imagenet(MASK, model=_HEAD_4, norm=SYNC, note="Batch norm over the 16 pictures of a step.")
norm_fixed_after_imagenet = _imagenet(MASK, model=_HEAD_4, norm=FIXED, note="Batch norm fixed: AP 38.7.")

# Table 5: which parts of P4x are loaded
mask_p1x = _pretraining(MASK, 1)
mask_p2x = _pretraining(MASK, 2)
mask_p3x = _pretraining(MASK, 3)
mask_p4x = _pretraining(MASK, 4)
parts_backbone = _parts("backbone", note="Box AP 39.0.")
parts_neck = _parts("backbone", "neck", note="Box AP 39.4.")
parts_rpn = _parts("backbone", "neck", "rpn", note="Box AP 39.3.")
parts_box_head = _parts("backbone", "neck", "rpn", "box_head", note="Box AP 41.7.")
parts_mask_head = _parts("backbone", "neck", "rpn", "box_head", "mask_head", note="Box AP 41.7.")

# Styles of resizing in pre-training; Direct's is mask_p1x_1x
resize_imagenet = _direct(MASK, resize=ImageNetCrop(side=448), note="Pre-trained on ImageNet style crops of 448.")
resize_stitcher = _direct(
    MASK,
    resize=KeepRatio(short_sides=(800,), long_side=1333, divide=2),
    note="Pre-trained on pictures of half of (1333, 800), as in Stitcher.",
)
resize_square = _direct(
    MASK, resize=Direct(side=448, mode="square"), note="Pre-trained on stretched pictures, as the paper's text has it."
)


def _grid(side: int, per_gpu: int) -> Recipe:
    note = f"Figure 4: pre-trained at {side} pixels, {per_gpu} pictures a GPU, over as many pictures (our choice)."
    return _direct(MASK, resize=Direct(side=side), per_gpu=per_gpu, note=note)


# Figure 4: resolution and pictures a GPU
grid_224_2 = _grid(224, 2)
grid_224_4 = _grid(224, 4)
grid_224_8 = _grid(224, 8)
grid_224_16 = _grid(224, 16)
grid_320_2 = _grid(320, 2)
grid_320_4 = _grid(320, 4)
grid_320_8 = _grid(320, 8)
grid_320_16 = _grid(320, 16)
grid_448_2 = _grid(448, 2)
grid_448_4 = _grid(448, 4)
grid_448_8 = _grid(448, 8)
grid_448_16 = _grid(448, 16)
grid_640_2 = _grid(640, 2)
grid_640_4 = _grid(640, 4)
grid_640_8 = _grid(640, 8)
grid_640_16 = _grid(640, 16)

# Figure 2: other lengths of fine-tuning
mask_p1x_6e = _direct(MASK, 1, 6)
mask_p2x_6e = _direct(MASK, 2, 6)
mask_p3x_6e = _direct(MASK, 3, 6)
mask_p4x_6e = _direct(MASK, 4, 6)
mask_p1x_18e = _direct(MASK, 1, 18)
mask_p2x_18e = _direct(MASK, 2, 18)
mask_p3x_18e = _direct(MASK, 3, 18)
mask_p4x_18e = _direct(MASK, 4, 18)
mask_p1x_2x = _direct(MASK, 1, 24)
mask_p2x_2x = _direct(MASK, 2, 24)
mask_p3x_2x = _direct(MASK, 3, 24)
mask_p4x_2x = _direct(MASK, 4, 24)

# Where it fails: little data. Rates and lengths of VOC are mmdetection's (12 passes of 16,551 pictures).
_VOC_SCHEDULE = ScheduleConfig(base_images=BASE_IMAGES, warmup_steps=0, milestones=(9 / 12,))
_VOC = full_stage(
    12_400 * 16,
    sgd(0.01, norm_decay=1e-4),
    norm=FIXED,
    schedule=_VOC_SCHEDULE,
    input=InputConfig(resize=KeepRatio(short_sides=(600,), long_side=1000)),
    frozen_stages=1,
)
voc_direct = _recipe(
    "Faster R-CNN on VOC 07+12: P93k, then 12.4k steps of 16. Worse than from ImageNet: AP50 72.0 against 79.5.",
    FASTER.random,
    _VOC,
    pretraining=pretraining_stage(FASTER, 93_000 * 64),
)
voc_imagenet = _recipe(
    "Faster R-CNN on VOC 07+12: from ImageNet, 12.4k steps of 16. AP50 79.5.",
    FASTER.imagenet,
    dataclasses.replace(_VOC, norm=AFFINE),
)
tenth_coco_direct = _recipe(
    "Mask R-CNN on a tenth of COCO (gesso data split): P60k, then 30k steps of 16 at the rate 0.04. The paper's 'decay "
    "0.02' is read as what the rate drops to each time.",
    MASK.random,
    full_stage(
        30_000 * 16,
        sgd(0.04, norm_decay=1e-4),
        norm=FIXED,
        schedule=dataclasses.replace(TWO_DROPS, factor=0.02),
        frozen_stages=1,
    ),
    pretraining=pretraining_stage(MASK, 60_000 * 64),
)
