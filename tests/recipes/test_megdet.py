"""The recipes of MegDet against the numbers of SPEC.md, section 9, and the command line."""

import re

import pytest

from gesso.models.faster_rcnn import FasterRCNNConfig
from gesso.recipes import megdet
from gesso.recipes.catalog import all_recipes
from gesso.run.epochs import with_steps
from gesso.training.optimizer import SGD
from gesso.training.schedule import describe_rule, rate_factor
from gesso.training.stage import TrainingConfig

ROWS = {name: recipe for name, recipe in all_recipes().items() if name.startswith("megdet:")}
NAMES = sorted(ROWS)
FORM = re.compile(r"megdet:batch_(\d+)(_bn_(\d+))?(_half_rate)?(_long)?")


def parts(name: str) -> tuple[int, int, bool, bool]:
    """Pictures, pictures of the statistics (0 = fixed), half the rate, long: as the name says."""
    found = FORM.fullmatch(name)
    assert found, name
    return int(found[1]), int(found[3] or 0), bool(found[4]), bool(found[5])


def gpus(name: str) -> int:
    """As the description says."""
    found = re.search(r"on (\d+) GPUs?,", ROWS[name].__doc__ or "")
    assert found, name
    return int(found[1])


def rates(stage: TrainingConfig, steps: list[int]) -> list[float]:
    return [stage.optimizer.rate * rate_factor(stage.schedule, s, stage.steps, stage.batch_size) for s in steps]


def test_every_row_that_was_asked_for_is_there():
    rows = [parts(name) for name in NAMES]
    assert len(set(rows)) == len(rows)
    assert {batch for batch, bn, half, long in rows if not (bn or half or long)} == {2, 4, 8, 16, 32, 64, 128, 256}
    assert {bn for _, bn, _, _ in rows} == {0, 2, 4, 8, 16, 32, 64}
    assert {batch for batch, bn, half, _ in rows if half and not bn} == {16, 32, 64, 128}
    assert {(16, 16), (32, 32), (64, 32), (128, 32), (256, 32), (256, 16)} <= {
        (batch, bn) for batch, bn, _, long in rows if long
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_what_its_name_says(name):
    batch, bn, half, long = parts(name)
    stage = ROWS[name]().training
    assert stage.batch_size == batch and stage.accumulate == 1
    assert (stage.norm.kind, stage.norm.images) == (("sync", bn) if bn else ("fixed", None))
    assert stage.epochs == (18 if long else 11)
    text = ROWS[name].__doc__ or ""
    assert text.startswith(f"{batch} pictures a step") and "\n" not in text
    assert (f"over {bn} pictures" in text) == bool(bn)
    assert ("half the rate" in text, "long policy" in text) == (half, long)


@pytest.mark.parametrize("name", NAMES)
def test_the_rate_follows_the_paper(name):
    batch, _, half, long = parts(name)
    stage = with_steps(ROWS[name](), megdet.COCO_IMAGES).training
    assert stage == ROWS[name]().training, "the steps shown are those of COCO"
    assert stage.optimizer == SGD(rate=0.01 if half else 0.02, momentum=0.9, weight_decay=1e-4)
    base, epoch = stage.optimizer.rate, megdet.COCO_IMAGES / batch
    first, warm = rates(stage, [0, 500])
    assert warm == pytest.approx(base * batch / 16)
    assert first == pytest.approx(min(base, warm)), "MegDet: from r to k * r"
    middle = [round((number + 0.5) * epoch) for number in range(stage.epochs)]
    shares = [1, 0.1, 0.01, 0.005] if long else [1, 0.1, 0.01]
    lengths = [11, 3, 3, 1] if long else [8, 2, 1]
    expected = [share for share, length in zip(shares, lengths, strict=True) for _ in range(length)]
    assert rates(stage, middle)[1:] == pytest.approx([warm * share for share in expected][1:])
    assert stage.schedule.warmup_steps < 2 * epoch


@pytest.mark.parametrize("name", NAMES)
def test_the_gpus_divide_the_batch_and_form_the_groups(name):
    batch, bn, _, _ = parts(name)
    each = batch // gpus(name)
    assert each * gpus(name) == batch
    if bn:
        assert bn % each == 0 and gpus(name) % (bn // each) == 0
        assert bn // each <= 8, "a group lies within one machine of 8"
    else:
        assert each == 2


def test_the_published_sizes_of_a_cluster():
    """Abstract: at most 128 GPUs for 256 pictures; SPEC.md, section 9: BN size 16 is 8 GPUs with 2 pictures each."""
    assert gpus("megdet:batch_256_bn_16") == 128 and gpus("megdet:batch_16_bn_16") == 8


def test_what_the_paper_reports_to_fail_is_said():
    said = {parts(name)[:3] for name in NAMES if "did not converge" in (ROWS[name].__doc__ or "")}
    assert said == {(32, 0, False), (64, 0, False), (128, 0, False), (128, 0, True)}


@pytest.mark.parametrize("name", NAMES)
def test_detector_and_data(name):
    config = ROWS[name]()
    assert config.model == FasterRCNNConfig(backbone=config.model.backbone)
    assert config.model.backbone.name.startswith("resnet50.") and config.model.backbone.pretrained
    assert config.data.train is None and config.data.embedded is None
    resize = config.training.input.resize
    assert (resize.short_sides, resize.long_side) == ((800,), 1333)


def test_the_log_of_the_largest_batch():
    stage = megdet.batch_256_bn_16().training
    assert describe_rule(stage.schedule, stage.optimizer.rate, stage.batch_size, stage.steps) == [
        "learning rate 0.32 = 0.02 x 256 / 16 (linear scaling)",
        "warm-up over 500 steps from 0.02 to 0.32",
        "times 0.1 after steps 3,697 and 4,621, of 5,083 in all",
    ]


def test_other_sizes_are_options(gesso):
    options = ("--training.norm.images", "8", "--training.optimizer.rate", "0.01")
    training = gesso.json("config", "megdet:batch_64_bn_16", *options)["training"]
    assert training["norm"]["images"] == 8 and training["optimizer"]["rate"] == 0.01
