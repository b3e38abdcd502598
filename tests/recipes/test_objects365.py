"""The recipes of Objects365 against the numbers of SPEC.md, sections 4 and 6.1."""

import pytest

from gesso.data.transforms import KeepRatio
from gesso.models.faster_rcnn import FasterRCNNConfig
from gesso.recipes import objects365
from gesso.recipes.catalog import all_recipes, make_config
from gesso.run.config import check_processes
from gesso.training.schedule import rate_factor
from gesso.training.stage import TrainingConfig

NAMES = sorted(name for name in all_recipes() if name.startswith("objects365:"))


def rates(stage: TrainingConfig, *steps: int) -> list[float]:
    return [stage.optimizer.rate * rate_factor(stage.schedule, s, stage.steps, stage.batch_size) for s in steps]


def test_the_promised_recipes_are_there():
    targets = {
        f"{data}_{parts}" for data in ("coco", "voc", "citypersons") for parts in ("backbone", "backbone_and_head")
    }
    assert set(NAMES) == {f"objects365:{name}" for name in {"pretrain", "coco_imagenet"} | targets}


@pytest.mark.parametrize("name", NAMES)
def test_eight_gpus_and_one_can_run_it(name):
    for processes in (1, 2, 8):
        check_processes(make_config(name), processes)


def test_objects365():
    """SPEC.md, section 6.1."""
    config = objects365.pretrain()
    stage = config.training
    assert isinstance(config.model, FasterRCNNConfig) and config.init_parts is None
    assert (stage.steps, stage.batch_size, stage.images) == (1_350_000, 16, 21_600_000)
    assert (stage.norm.kind, stage.norm.images) == ("sync", None)
    assert stage.input.resize == KeepRatio(short_sides=(800,), long_side=1333)
    assert rates(stage, 899_999, 900_001, 1_199_999, 1_200_001) == pytest.approx([0.02, 0.002, 0.002, 0.0002])


@pytest.mark.parametrize("name", [name for name in NAMES if "backbone" in name])
def test_fine_tuning_after_objects365(name):
    """Table 5: from 0.003 to 0.0006 and 0.00012, the rate at convergence."""
    config = make_config(name)
    stage = config.training
    steps = {"coco": 90_000, "voc": 12_400, "citypersons": 180_000}[name.split(":")[1].split("_")[0]]
    assert stage.steps == steps
    before, after = round(steps * 6 / 9), round(steps * 8 / 9)
    found = rates(stage, before - 1, before + 1, after - 1, after + 1, steps - 1)
    assert found == pytest.approx([0.003, 0.0006, 0.0006, 0.00012, 0.00012])
    head = ("backbone", "neck", "rpn", "box_head")
    assert config.init_parts == (head if name.endswith("_head") else ("backbone",))
    assert config.model == objects365.pretrain().model, "so that all of it can be loaded"


def test_the_baseline_of_table_5():
    stage = objects365.coco_imagenet().training
    assert rates(stage, 59_999, 60_001, 89_999) == pytest.approx([0.02, 0.002, 0.0002])
