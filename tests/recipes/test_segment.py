"""The recipes of segmentation against the numbers of SPEC.md, section 5, and of their papers."""

import pytest

from gesso.data.transforms import Direct, KeepRatio
from gesso.models.segmenter import DeepLabConfig, PSPConfig, SegmenterConfig
from gesso.recipes import segment
from gesso.recipes.catalog import make_config
from gesso.run.config import check_processes
from gesso.training.schedule import rate_factor
from gesso.training.stage import TrainingConfig


def rates(stage: TrainingConfig, *steps: int) -> list[float]:
    return [stage.optimizer.rate * rate_factor(stage.schedule, s, stage.steps, stage.batch_size) for s in steps]


@pytest.mark.parametrize("name", ["segment:pspnet", "segment:pspnet_ade20k", "segment:deeplab"])
def test_eight_gpus_and_one_can_run_it(name):
    for processes in (1, 2, 8):
        check_processes(make_config(name), processes)


def test_pspnet():
    for recipe, steps, background in ((segment.pspnet, 30_000, True), (segment.pspnet_ade20k, 150_000, False)):
        config = recipe()
        stage, model = config.training, config.model
        assert isinstance(model, SegmenterConfig) and isinstance(model.head, PSPConfig)
        assert (model.background, model.backbone.output_stride) == (background, 8)
        assert (model.head.auxiliary, model.head.bins) == (0.4, (1, 2, 3, 6))
        assert config.init_parts == ("backbone",)
        assert (stage.steps, stage.batch_size, stage.norm.kind) == (steps, 16, "sync")
        assert rates(stage, 0, steps // 2) == pytest.approx([0.01, 0.01 * 0.5**0.9])
        assert stage.input.resize == Direct(side=480, low=0.5, high=2.0)
        assert stage.input.resize.side % 32 == 0 and stage.input.resize.side - 473 < 32


def test_deeplab():
    config = segment.deeplab()
    stage, model = config.training, config.model
    assert isinstance(model, SegmenterConfig) and model.head == DeepLabConfig()
    backbone = model.backbone
    assert (backbone.name, backbone.output_stride, backbone.deformable_stages) == ("resnet101.tv_in1k", 16, (4,))
    assert config.init_parts == ("backbone",) and stage.norm.kind == "fixed"
    assert stage.input.resize == KeepRatio(short_sides=(360,), long_side=600)
    assert rates(stage, 0, 19_999, 20_001) == pytest.approx([1e-3, 1e-3, 1e-4])
