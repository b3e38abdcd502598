"""Stages made ready for one step: their input at other resolutions, and the largest batch."""

import dataclasses

import pytest
import torch

from gesso.data.transforms import Direct, InputConfig, KeepRatio
from gesso.errors import ConfigError
from gesso.models.build import build_model
from gesso.models.classifier import ClassifierConfig
from gesso.models.mask_head import MaskHeadConfig
from gesso.models.segmenter import SegmenterConfig
from gesso.planning.stages import (
    at_resolution,
    in_one_process,
    new_stage,
    resolution_of,
    with_stage,
    worst_pair,
    worst_shape,
)
from gesso.recipes.debug import tiny
from gesso.recipes.demo import direct
from gesso.run.config import DataConfig

CPU = torch.device("cpu")


def test_a_square_takes_its_side():
    moved = at_resolution(InputConfig(resize=Direct(side=448, low=0.5), flip=0.1), 224)
    assert moved == InputConfig(resize=Direct(side=224, low=0.5), flip=0.1)
    assert resolution_of(moved) == 224
    with pytest.raises(ConfigError, match="multiple of 32"):
        at_resolution(moved, 225)


def test_sides_that_keep_the_ratio_grow_together():
    input = InputConfig(resize=KeepRatio(short_sides=(640, 800), long_side=1333))
    assert at_resolution(input, 800) == input
    half = at_resolution(input, 400)
    assert half.resize == KeepRatio(short_sides=(320, 400), long_side=666)
    assert resolution_of(half) == 400
    assert at_resolution(input, 1).resize == KeepRatio(short_sides=(1,), long_side=2)


def test_divided_pictures_count_as_they_are():
    input = InputConfig(resize=KeepRatio(short_sides=(800,), long_side=1333, divide=2))
    assert resolution_of(input) == 400
    assert at_resolution(input, 200).resize == KeepRatio(short_sides=(400,), long_side=666, divide=2)
    assert resolution_of(at_resolution(input, 200)) == 200


def test_the_worst_shape_is_that_of_the_data_or_of_any():
    config = tiny()
    assert worst_shape(config, config.training.input) == (64, 64)
    bare = dataclasses.replace(config, data=DataConfig())
    assert worst_shape(bare, config.training.input) == (64, 96)


def test_stages_are_exchanged_by_name():
    changed = dataclasses.replace(direct().training, batch_size=2)
    config = with_stage(direct(), "training", changed)
    assert config.training == changed and config.pretraining == direct().pretraining
    alone = in_one_process(direct(), "pretraining", 6)
    assert (alone.pretraining.batch_size, alone.pretraining.compile) == (6, False)


def test_a_new_stage_takes_the_statistics_it_can():
    config = tiny()
    norm = dataclasses.replace(config.training.norm, images=8)
    config = with_stage(config, "training", dataclasses.replace(config.training, norm=norm, ema_decay=0.9))
    stage = new_stage(in_one_process(config, "training", 2), "training", CPU, 2)
    assert stage.config.norm.images is None and stage.ema is not None
    assert new_stage(config, "training", CPU, 8).config.norm.images == 8


def test_the_worst_pair_has_what_the_model_learns_from():
    model = dataclasses.replace(tiny().model, mask_head=MaskHeadConfig(target_side=28))
    batch, targets = worst_pair(build_model(model, 3), 2, (64, 96), 5, CPU)
    assert batch.images.shape == (2, 3, 64, 96) and bool(targets.valid.all())
    assert targets.masks.shape == (2, 5, 28, 28) and targets.semantic is None and targets.verified is None
    backbone = dataclasses.replace(tiny().model.backbone, name="test_resnet")
    _, targets = worst_pair(build_model(SegmenterConfig(backbone=backbone), 3), 2, (64, 96), 5, CPU)
    assert targets.semantic.shape == (2, 64, 96) and targets.masks is None
    _, targets = worst_pair(build_model(ClassifierConfig(backbone=backbone), 3), 2, (64, 96), 5, CPU)
    assert targets.verified.shape == (2, 3)
