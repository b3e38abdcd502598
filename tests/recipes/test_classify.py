"""The recipes of classifiers against the numbers of their papers."""

import pytest

from gesso.data.transforms import ImageNetCrop
from gesso.models.classifier import ClassifierConfig
from gesso.recipes import classify, direct, segment
from gesso.recipes.catalog import make_config
from gesso.run.config import check_processes
from gesso.run.epochs import with_steps
from gesso.training.schedule import rate_factor
from gesso.training.stage import TrainingConfig


def rates(stage: TrainingConfig, *steps: int) -> list[float]:
    return [stage.optimizer.rate * rate_factor(stage.schedule, s, stage.steps, stage.batch_size) for s in steps]


@pytest.mark.parametrize("name", ["classify:imagenet", "classify:fine_tune"])
def test_eight_gpus_and_one_can_run_it(name):
    for processes in (1, 2, 8):
        check_processes(make_config(name), processes)


def test_imagenet():
    """Goyal et al., section 5.1."""
    config = with_steps(classify.imagenet(), 1_281_167)
    stage = config.training
    assert config == classify.imagenet() and stage.steps == 450_410
    assert isinstance(config.model, ClassifierConfig) and not config.model.backbone.pretrained
    assert (stage.batch_size, stage.norm.images) == (256, 32)
    assert (stage.optimizer.weight_decay, stage.optimizer.momentum, stage.optimizer.norm_decay) == (1e-4, 0.9, 0)
    epoch = stage.steps / 90
    middles = [round((number + 0.5) * epoch) for number in range(90)]
    assert rates(stage, *middles) == pytest.approx([0.1] * 30 + [0.01] * 30 + [0.001] * 20 + [0.0001] * 10)
    assert rates(stage, 0) == [pytest.approx(0.1)]
    resize = stage.input.resize
    assert isinstance(resize, ImageNetCrop) and (resize.side, resize.inference) == (224, "centre")
    shown = resize.place(400, 600, shape=0, scale=0, key=None)
    assert min(shown.resized) == 256 and shown.size == (224, 224)


def test_fine_tuning_of_classifiers_takes_the_backbone():
    for name, rate in (("fine_tune", 0.01), ("small_fine_tune", 5e-4)):
        config = make_config(f"classify:{name}")
        assert config.init_parts == ("backbone",)
        assert rates(config.training, config.training.schedule.warmup_steps)[0] == pytest.approx(rate, rel=0.05)
    assert classify.fine_tune().model.backbone.name == "resnet50.tv_in1k"
    assert with_steps(classify.fine_tune(), 1020).training.steps == round(30 * 1020 / 64), "Flowers-102"


def test_small_models_share_a_backbone():
    """So that a classifier, a detector and a segmenter can start from each other."""
    backbones = {make_config(name).model.backbone for name in ("classify:small", "classify:small_fine_tune")}
    assert backbones == {direct.small_fine_tune().model.backbone}
    assert segment.small().model.backbone.name == direct.small().model.backbone.name
