import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gesso.data.demo_scenes import DemoConfig
from gesso.data.sampling import BatchStream
from gesso.errors import DataError
from gesso.recipes.debug import tiny
from gesso.run.config import DataConfig, RunConfig
from gesso.run.epochs import training_images, with_steps
from gesso.training.stage import TrainingConfig


def run(**stages: TrainingConfig | None) -> RunConfig:
    return dataclasses.replace(tiny(), **stages)


@pytest.mark.parametrize(
    ("epochs", "images", "batch_size", "steps"),
    [
        (11, 118_287, 16, 81_322),  # MegDet's normal policy on COCO: 11 * 118,287 / 16 = 81,322.3
        (11, 118_287, 256, 5_083),
        (1, 100, 8, 12),  # 12.5, to the even number
        (0.5, 100, 8, 6),
        (1, 3, 8, 1),  # never none
    ],
)
def test_steps_follow_from_epochs(epochs, images, batch_size, steps):
    config = run(training=TrainingConfig(epochs=epochs, batch_size=batch_size, steps=7))
    assert with_steps(config, images).training.steps == steps


def test_each_stage_has_its_own_and_nothing_else_changes():
    config = run(
        pretraining=TrainingConfig(steps=5, batch_size=4, epochs=2.0), training=TrainingConfig(steps=5, batch_size=4)
    )
    found = with_steps(config, 40)
    assert found.pretraining == dataclasses.replace(config.pretraining, steps=20)
    assert dataclasses.replace(found, pretraining=config.pretraining) == config


def test_without_epochs_nothing_changes():
    config = run(pretraining=None)
    assert with_steps(config, 1_000) == config


@given(
    epochs=st.floats(0.01, 50), images=st.integers(1, 10**7), batch_size=st.integers(1, 512), stored=st.integers(1, 9)
)
def test_it_is_idempotent_and_as_close_as_steps_can_be(epochs, images, batch_size, stored):
    once = with_steps(run(training=TrainingConfig(epochs=epochs, batch_size=batch_size, steps=stored)), images)
    assert with_steps(once, images) == once
    missed = abs(once.training.steps * batch_size - epochs * images)
    assert missed <= batch_size / 2 * (1 + 1e-9) or once.training.steps == 1


def test_the_steps_of_an_epoch_see_every_picture_once():
    config = with_steps(run(training=TrainingConfig(epochs=1, batch_size=8)), 40)
    stream = BatchStream([0] * 40, seed=0, batch_size=8, num_scales=1)
    rows = [row for plan in itertools.islice(stream, config.training.steps) for row in plan.rows]
    assert sorted(rows) == list(range(40))


def test_pictures_are_counted(data, tmp_path):
    assert training_images(DataConfig(train=data.train)) == 32
    assert training_images(DataConfig(embedded=DemoConfig(images=17))) == 17
    assert training_images(DataConfig(train=data.val, embedded=DemoConfig(images=17))) == 4, "the named index counts"
    with pytest.raises(DataError):
        training_images(DataConfig(train=tmp_path / "none"))
