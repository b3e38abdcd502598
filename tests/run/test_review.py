"""What a review of runs found: settings that would change nothing, and one file that would end a whole run."""

import dataclasses

import pytest

from gesso.data.demo_index import demo_index
from gesso.data.demo_scenes import DemoConfig
from gesso.data.semantic import VOID, read_semantic
from gesso.errors import ConfigError
from gesso.models.norm import NormPolicy, PolicyBatchNorm2d
from gesso.run.models import follow_stage, load_run, new_model
from gesso.run.train import train
from tests.run.helpers import tiny_run, with_training
from tests.run.test_tasks import SEGMENTER

SHORT = {"steps": 1, "batch_size": 4, "evaluate_every": 1, "checkpoint_every": 1}


def segmenting(data, **training):
    return dataclasses.replace(tiny_run(data, **SHORT | training), model=SEGMENTER)


@pytest.mark.parametrize("broken", [b"no picture", None])
def test_a_semantic_map_that_cannot_be_read_costs_its_picture_and_not_the_run(data, tmp_path, broken):
    """As a broken picture does; training leaves such a picture out too."""
    scenes = DemoConfig(images=6, side=64, objects=(1, 3), scale=(0.2, 0.5), split="val")
    index = demo_index(tmp_path / "val", scenes)
    path = index.semantic_path(0)
    assert path is not None
    if broken is None:
        path.unlink()
    else:
        path.write_bytes(broken)
    config = segmenting(data)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, val=index.path))
    assert train(config, tmp_path / "r").scores["pixel_accuracy"] >= 0
    _, confusion = load_run(tmp_path / "r").evaluate(index)
    others = [read_semantic(index.semantic_path(row)) for row in range(1, len(index))]
    assert confusion.counts.sum() == sum((values != VOID).sum() for values in others)


def test_a_batch_norm_that_a_policy_leaves_alone_stays_as_the_stage_before_left_it(data):
    """A fixed backbone stays fixed where the next stage speaks of the neck alone."""
    config = tiny_run(data, **SHORT)
    neck = dataclasses.replace(config.model.neck, norm="batch")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, neck=neck))
    model = new_model(config, 3, pretrained=False)
    follow_stage(model, with_training(config, norm=NormPolicy(kind="fixed")).training)
    follow_stage(model, with_training(config, norm=NormPolicy(kind="train", parts=("neck",))).training)
    norms = [module for module in model.backbone.modules() if isinstance(module, PolicyBatchNorm2d)]
    assert norms and all(norm.policy.kind == "fixed" for norm in norms)
    assert not any(norm.weight.requires_grad or norm.bias.requires_grad for norm in norms)


def test_memory_that_a_segmenter_would_not_save_is_refused(data, tmp_path):
    with pytest.raises(ConfigError, match="memory"):
        train(segmenting(data, memory="stages"), tmp_path / "r")


def test_metrics_of_detections_are_refused_for_a_segmenter(data, tmp_path):
    with pytest.raises(ConfigError, match="metrics"):
        train(dataclasses.replace(segmenting(data), metrics=("voc",)), tmp_path / "r")
