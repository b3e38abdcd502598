"""The recipes of direct pre-training against the numbers of SPEC.md, section 10, and of the published code."""

import dataclasses
import re

import pytest

from gesso.data.transforms import Direct, ImageNetCrop, KeepRatio
from gesso.models.build import ModelConfig
from gesso.models.cascade_rcnn import CascadeRCNNConfig
from gesso.models.faster_rcnn import FasterRCNNConfig
from gesso.models.norm import NormPolicy
from gesso.models.retinanet import RetinaNetConfig
from gesso.recipes.catalog import all_recipes, make_config
from gesso.run.config import RunConfig, check_processes
from gesso.run.epochs import with_steps
from gesso.training.optimizer import SGD, AdamW
from gesso.training.schedule import describe_rule, rate_factor
from gesso.training.stage import TrainingConfig

NAMES = sorted(name.removeprefix("direct:") for name in all_recipes() if name.startswith("direct:"))
PAPER = [name for name in NAMES if not name.startswith("small")]
TWO_STAGES = [name for name in PAPER if make_config(f"direct:{name}").pretraining is not None]
LOAD = {"mask": (40.0, 35.8), "faster": (39.3,), "cascade": (41.5,), "retinanet": (37.1,), "swin": (45.0, 40.5)}


def made(name: str) -> RunConfig:
    return make_config(f"direct:{name}")


def first(name: str) -> TrainingConfig:
    stage = made(name).pretraining
    assert stage is not None
    return stage


def text(name: str) -> str:
    return all_recipes()[f"direct:{name}"].__doc__ or ""


def rate(stage: TrainingConfig, step: int) -> float:
    return stage.optimizer.rate * rate_factor(stage.schedule, step, stage.steps, stage.batch_size)


def drops(stage: TrainingConfig) -> list[int]:
    """The steps at which the rate falls, found from the rates themselves."""
    start, end, found = stage.schedule.warmup_steps, stage.steps, []
    while start < end and rate(stage, end - 1) < rate(stage, start) * (1 - 1e-9):
        low, high = start, end - 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if rate(stage, middle) == rate(stage, start) else (low, middle)
        found.append(high)
        start = high
    return found


def test_the_rows_of_the_paper_are_there():
    grid = {f"grid_{side}_{each}" for side in (224, 320, 448, 640) for each in (2, 4, 8, 16)}
    lengths = {f"mask_p{p}x{tail}" for p in (1, 2, 3, 4) for tail in ("", "_6e", "_1x", "_18e", "_2x")}
    others = {f"{kind}_p1x_1x" for kind in LOAD} | {f"{kind}_imagenet_1x" for kind in LOAD}
    others |= {"swin_p3x_1x", "mask_imagenet_2x", "voc_direct", "voc_imagenet", "tenth_coco_direct"}
    norms = {f"norm_{kind}_after_{start}" for kind in ("affine", "sync", "fixed") for start in ("direct", "imagenet")}
    parts = {f"parts_{part}" for part in ("backbone", "neck", "rpn", "box_head", "mask_head")}
    resizes = {f"resize_{style}" for style in ("imagenet", "stitcher", "square")}
    scratch = {f"scratch_{how}" for how in ("bn_4x", "gn_6x", "syncbn_6x", "syncbn_3x_multi_scale", "640_syncbn_3x")}
    assert set(PAPER) == grid | lengths | others | norms | parts | resizes | scratch


@pytest.mark.parametrize(
    ("name", "steps", "passes"), [("1", 87_950, 48), ("2", 175_899, 96), ("3", 263_848, 144), ("4", 351_798, 192)]
)
def test_p_is_so_many_steps_of_64_on_coco(name, steps, passes):
    """The published code rounds each of its 12 epochs up to 7,330 steps: 87,960, 175,920, 263,880 and 351,840."""
    stage = first(f"mask_p{name}x_1x")
    assert stage.images == passes * 117_266
    assert (stage.batch_size, stage.steps) == (64, steps)
    assert 0 <= 1 - stage.steps / (int(name) * 12 * 7330) < 2e-4
    alone = made(f"mask_p{name}x")
    assert alone.pretraining is None and alone.training == stage and alone.model == made("mask_p1x_1x").model


@pytest.mark.parametrize("name", PAPER)
def test_steps_follow_from_pictures(name):
    config = made(name)
    assert with_steps(config, 5000) == config, "whatever the size of the data, as many pictures"
    for _, stage in config.stages():
        assert stage.epochs is None and stage.images is not None
        assert abs(stage.steps * stage.batch_size - stage.images) <= stage.batch_size / 2
        assert stage.evaluate_every * 12 >= stage.steps and stage.checkpoint_every <= 1000


@pytest.mark.parametrize("name", TWO_STAGES)
def test_pretraining(name):
    config, stage = made(name), first(name)
    per_gpu = int(name.split("_")[2]) if name.startswith("grid") else 8
    assert stage.batch_size == 8 * per_gpu
    assert stage.norm == NormPolicy(kind="sync", images=per_gpu), "the pictures of one of 8 GPUs"
    assert stage.frozen_stages == -1 and not config.model.backbone.pretrained
    assert stage.clip_norm is None and stage.ema_decay is None and stage.input.flip == 0.5
    per_image = {"retinanet": 0.04 / 64, "swin": 4e-4 / 64}.get(name.split("_")[0], 0.08 / 64)
    reached = per_image * stage.batch_size
    warm = 1000 if name.startswith("retinanet") else 500
    for step in (0, 1, warm // 2, warm - 1):
        assert rate(stage, step) == pytest.approx(reached * (1 - (1 - step / warm) * (1 - 0.01)))
    assert rate(stage, warm) == rate(stage, stage.steps - 1) == pytest.approx(reached)
    if name.startswith("swin"):
        wanted = AdamW(rate=1e-4, betas=(0.9, 0.999), weight_decay=0.05, norm_decay=0, bias_decay=0.05)
    else:
        base = 0.01 if name.startswith("retinanet") else 0.02
        wanted = SGD(rate=base, momentum=0.9, weight_decay=1e-4, norm_decay=0, bias_decay=1e-4)
    assert stage.optimizer == wanted
    if not name.startswith(("grid", "resize")):
        assert stage.input.resize == Direct(side=448, low=0.8, high=1.2, mode="keep")


PASSES = {"6e": 6, "1x": 12, "18e": 18, "2x": 24}
ON_COCO = [name for name in PAPER if not name.startswith(("voc", "tenth", "scratch")) and not re.search(r"p\dx$", name)]


@pytest.mark.parametrize("name", ON_COCO)
def test_fine_tuning(name):
    stage = made(name).training
    passes = PASSES.get(name.split("_")[-1], 12)
    assert stage.images == passes * 117_266 and stage.batch_size == 16
    epoch = 117_266 / 16
    assert drops(stage) == pytest.approx([passes * epoch * 8 / 12, passes * epoch * 11 / 12], abs=1)
    top = {"swin": 1e-4}.get(name.split("_")[0], 0.01 if name == "retinanet_imagenet_1x" else 0.02)
    at_passes = [rate(stage, round(share * stage.steps)) for share in (0.5, 0.8, 0.95)]
    assert at_passes == pytest.approx([top, top / 10, top / 100])
    assert rate(stage, 0) == pytest.approx(0.001 * top) and rate(stage, 500) == pytest.approx(top)
    assert stage.input.resize == KeepRatio(short_sides=(800,), long_side=1333)
    assert stage.optimizer.weight_decay == (0.05 if name.startswith("swin") else 1e-4)
    assert stage.frozen_stages == (-1 if name.startswith("swin") else 1)
    kind = re.match(r"norm_(\w+)_after", name)
    expected = kind[1] if kind else "affine" if "imagenet_" in name else "fixed"
    assert (stage.norm.kind, stage.norm.images) == (expected, None)
    assert made(name).model.backbone.pretrained == ("imagenet" in name and not name.startswith("resize"))


def heads(model: ModelConfig) -> tuple[int, int]:
    assert isinstance(model, FasterRCNNConfig)
    return model.box_head.convs, model.box_head.fcs


def test_detectors():
    for name in ("mask_p1x_1x", "swin_p1x_1x", "faster_p1x_1x", "norm_affine_after_imagenet", "swin_imagenet_1x"):
        assert heads(made(name).model) == (4, 1), "Shared4Conv1FC"
    for name in ("mask_imagenet_1x", "faster_imagenet_1x", "voc_imagenet"):
        assert heads(made(name).model) == (0, 2), "Shared2FC, as the baselines of the model zoo"
    masked = {name for name in PAPER if getattr(made(name).model, "mask_head", None) is not None}
    assert set(PAPER) - masked == {
        *(f"{kind}_{way}_1x" for kind in ("faster", "cascade", "retinanet") for way in ("p1x", "imagenet")),
        "voc_direct",
        "voc_imagenet",
    }
    cascade, retinanet = made("cascade_p1x_1x").model, made("retinanet_p1x_1x").model
    assert isinstance(cascade, CascadeRCNNConfig) and (cascade.box_head.convs, cascade.box_head.fcs) == (0, 2)
    assert (cascade.ious, cascade.stage_weights) == ((0.5, 0.6, 0.7), (1.0, 0.5, 0.25))
    assert isinstance(retinanet, RetinaNetConfig) and retinanet.head.box_loss.kind == "l1"
    model = made("mask_p1x_1x").model
    assert isinstance(model, FasterRCNNConfig)
    assert model.rpn.box_loss.kind == model.box_head.box_loss.kind == "l1"
    assert (model.rpn.before_nms, model.rpn.after_nms, model.roi.samples) == (2000, 1000, 512)
    assert model.backbone.zero_init_residual is False and model.backbone.frozen_stages == -1


def test_backbones():
    tags = {made(name).model.backbone.name for name in PAPER if made(name).model.backbone.pretrained}
    assert tags == {"resnet50.tv_in1k", "swin_tiny_patch4_window7_224.ms_in1k"}
    assert {made(name).model.backbone.name.split(".")[0] for name in PAPER if "swin" not in name} == {"resnet50"}
    for name in ("swin_p1x_1x", "swin_p3x_1x", "swin_imagenet_1x"):
        config = made(name)
        assert config.model.backbone.drop_path == 0.2
        assert {stage.precision for _, stage in config.stages()} == {"bfloat16"}


def test_from_random_weights():
    """He et al.: of 90k steps for each x, the rate drops 60k and 20k steps before the end."""
    for name, x in (("bn_4x", 4), ("gn_6x", 6), ("syncbn_6x", 6), ("syncbn_3x_multi_scale", 3)):
        config = made(f"scratch_{name}")
        stage = config.training
        assert stage.images == x * 12 * 117_266 and stage.frozen_stages == -1 and not config.model.backbone.pretrained
        before_the_end = [(stage.steps - step) * 90_000 * x / stage.steps for step in drops(stage)]
        assert before_the_end == pytest.approx([60_000, 20_000], abs=2)
        assert rate(stage, 500) == pytest.approx(0.02)
    kinds = [made(f"scratch_{name}").training.norm for name in ("bn_4x", "gn_6x", "syncbn_6x", "640_syncbn_3x")]
    assert [(norm.kind, norm.images) for norm in kinds] == [
        ("sync", 2),
        ("group_norm", None),
        ("sync", None),
        ("sync", None),
    ]
    for name, norm in (("bn_4x", "none"), ("gn_6x", "group"), ("syncbn_6x", "batch"), ("640_syncbn_3x", "none")):
        model = made(f"scratch_{name}").model
        assert isinstance(model, FasterRCNNConfig) and model.mask_head is not None
        assert {model.neck.norm, model.box_head.norm, model.mask_head.norm} == {norm} and heads(model) == (4, 1)
    scales = made("scratch_syncbn_3x_multi_scale").training.input.resize
    assert isinstance(scales, KeepRatio) and (min(scales.short_sides), max(scales.short_sides)) == (640, 800)
    low = made("scratch_640_syncbn_3x").training
    assert low.input.resize == Direct(side=640) and (low.batch_size, low.steps) == (64, 263_848)
    assert rate(low, 600) == pytest.approx(0.08) and len(drops(low)) == 2


def test_table_5_takes_more_and_more_parts():
    order = ("backbone", "neck", "rpn", "box_head", "mask_head")
    figures = (39.0, 39.4, 39.3, 41.7, 41.7)
    for count, (last, figure) in enumerate(zip(order, figures, strict=True), start=1):
        config = made(f"parts_{last}")
        assert config.init_parts == order[:count] and config.pretraining is None
        assert config.model == made("mask_p4x").model and config.training == made("mask_p4x_1x").training
        assert text(f"parts_{last}").endswith(f"Box AP {figure}.")
    assert all(made(name).init_parts is None for name in NAMES if not name.startswith("parts"))


def test_styles_of_resizing():
    assert first("resize_imagenet").input.resize == ImageNetCrop(side=448)
    assert first("resize_square").input.resize == Direct(side=448, mode="square")
    stitcher = first("resize_stitcher").input.resize
    assert isinstance(stitcher, KeepRatio)
    assert stitcher.place(600, 1000, shape=3, scale=0, key=None).size == (400, 666), "half of 800 x 1333"
    for name in ("resize_imagenet", "resize_square", "resize_stitcher"):
        assert dataclasses.replace(first(name), input=first("mask_p1x_1x").input) == first("mask_p1x_1x")


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("grid")])
def test_the_grid_sees_as_many_pictures_in_every_cell(name):
    side, per_gpu = (int(number) for number in name.split("_")[1:])
    stage = first(name)
    assert stage.input.resize == Direct(side=side) and stage.images == 48 * 117_266
    assert (stage.batch_size, stage.norm.images) == (8 * per_gpu, per_gpu)
    assert rate(stage, 500) == pytest.approx({2: 0.02, 4: 0.04, 8: 0.08, 16: 0.16}[per_gpu])
    if name == "grid_448_8":
        assert made(name) == made("mask_p1x_1x")


def test_little_data():
    voc, tenth = made("voc_direct"), made("tenth_coco_direct")
    assert (first("voc_direct").steps, voc.training.steps) == (93_000, 12_400)
    assert (first("tenth_coco_direct").steps, tenth.training.steps) == (60_000, 30_000)
    assert rate(tenth.training, 600) == pytest.approx(0.04)
    assert rate(tenth.training, 29_999) == pytest.approx(0.04 * 0.02**2)
    assert voc.training.steps * 16 / 16_551 == pytest.approx(12, abs=0.02), "12 passes of VOC 07+12"
    assert drops(voc.training) == [9_300] and rate(voc.training, 0) == pytest.approx(0.01)
    assert "72.0" in text("voc_direct") and "79.5" in text("voc_direct")
    assert dataclasses.replace(voc.training, norm=made("voc_imagenet").training.norm) == made("voc_imagenet").training


def test_published_figures():
    for p, box, mask in ((1, 40.0, 35.8), (2, 41.0, 36.6), (3, 41.5, 37.0), (4, 41.7, 37.3)):
        assert text(f"mask_p{p}x_1x").endswith(f"AP {box:.1f} / {mask:.1f}.")
    for kind, figures in LOAD.items():
        assert text(f"{kind}_p1x_1x").endswith(f"AP {' / '.join(map(str, figures))}.")
    assert "AP 38.2 / 34.7." in text("mask_imagenet_1x") and "AP 46.9 / 41.9." in text("swin_p3x_1x")
    assert "40.4" in text("norm_fixed_after_direct")
    assert "39.2" in text("norm_affine_after_imagenet") and "38.7" in text("norm_fixed_after_imagenet")


@pytest.mark.parametrize("name", PAPER)
def test_eight_gpus_and_one_can_run_it(name):
    for processes in (1, 2, 8):
        check_processes(made(name), processes)


def test_the_log_of_p1x():
    stage = first("mask_p1x_1x")
    assert describe_rule(stage.schedule, stage.optimizer.rate, stage.batch_size, stage.steps) == [
        "learning rate 0.08 = 0.02 x 64 / 16 (linear scaling)",
        "warm-up over 500 steps from 0.0008 to 0.08",
        "constant over 87,950 steps",
    ]


def test_other_combinations_are_options(gesso):
    pretraining = gesso.json("config", "direct:retinanet_p1x_1x", "--pretraining.images", "16886304")["pretraining"]
    assert pretraining["images"] == 144 * 117_266


def test_the_small_recipes_share_their_stages():
    direct = made("small")
    for name in ("small_mask", "small_cascade", "small_retinanet"):
        assert dataclasses.replace(made(name), model=direct.model) == direct and made(name).model != direct.model
        assert made(name).model.backbone == direct.model.backbone
    assert made("small_fine_tune") == dataclasses.replace(direct, pretraining=None)
    assert made("small_fine_tune").training.norm.kind == "fixed"
