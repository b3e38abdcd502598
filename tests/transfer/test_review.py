"""What a review of transfers found: weights left out, runs counted twice, and advice that leads nowhere."""

import dataclasses

import pytest

from gesso.commands.interruption import again
from gesso.commands.transfer import changed
from gesso.data.demo_index import demo_index
from gesso.data.demo_scenes import DemoConfig
from gesso.errors import ConfigError, Interrupted
from gesso.models.norm import NormPolicy
from gesso.recipes.debug import tiny
from gesso.run.cost import RunCost
from gesso.run.several import Job
from gesso.run.train import train
from gesso.transfer.finetune import RateBy, Target, as_trained, fine_tuning
from gesso.transfer.matrix import Entry, Pretraining, plan_matrix, run_matrix
from gesso.transfer.summary import summarise
from tests.run.helpers import Data, tiny_run

SHORT = {"steps": 2, "batch_size": 4, "checkpoint_every": 1, "evaluate_every": 2}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    root = tmp_path_factory.mktemp("target")
    for split, images in (("train", 12), ("val", 4)):
        demo_index(root / split, DemoConfig(images=images, side=64, objects=(1, 3), scale=(0.2, 0.5), split=split))
    return Target(train=root / "train" / "index", val=root / "val" / "index")


@pytest.fixture(scope="module")
def config(target):
    return tiny_run(Data(train=target.train, val=target.val), **SHORT)


@pytest.fixture(scope="module")
def first(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("first") / "run"
    train(config, out)
    return out


def test_all_of_a_run_is_loaded_though_it_began_from_a_part(config, target, first, tmp_path):
    """What a run started from is no wish for what starts from it: a matrix calls this "all"."""
    train(dataclasses.replace(config, init_parts=("backbone",)), tmp_path / "r", init=first)
    made = fine_tuning(tmp_path / "r", as_trained(tmp_path / "r"), target)
    assert made.config.init_parts is None


def test_a_run_with_group_norm_goes_on_with_it(config, target, tmp_path):
    training = dataclasses.replace(config.training, norm=NormPolicy(kind="group_norm"))
    train(dataclasses.replace(config, training=training), tmp_path / "r")
    made = fine_tuning(tmp_path / "r", as_trained(tmp_path / "r"), target)
    assert made.config.training.norm.kind == "group_norm"
    train(made.config, tmp_path / "on", init=made.init)


def test_images_that_are_no_length_of_a_stage():
    (found,) = changed([tiny()], ["training.norm.images=2"])
    assert found.training.norm == dataclasses.replace(tiny().training.norm, images=2)
    (found,) = changed([tiny()], ["data.embedded.images=9"])
    assert found.data.embedded is not None and found.data.embedded.images == 9


def test_seeds_are_not_counted_twice(config, target, tmp_path):
    with pytest.raises(ConfigError, match="seed"):
        plan_matrix([Pretraining(name="a", config=config)], {"t": target}, tmp_path / "m", seeds=(0, 0))


def test_no_target_takes_the_place_of_another(gesso, target, tmp_path):
    words = ("--target", f"t={target.train},{target.val}", f"t={target.val},{target.val}", "--out", tmp_path / "m")
    words += ("--set", "model.backbone.name=test_resnet", "training.steps=1", "training.checkpoint_every=1")
    said = gesso.mistake("transfer", "matrix", "--pretraining", "a=debug:tiny", *words)
    assert "target 't'" in said


def test_a_resume_does_not_take_other_weights(gesso, config, target, first, tmp_path):
    train(dataclasses.replace(config, seed=5), tmp_path / "other")
    words = ("--data", target.train, "--val", target.val, "--out", tmp_path / "r")
    gesso("transfer", first, *words)
    assert "did not start from" in gesso.mistake("transfer", tmp_path / "other", *words, "--resume")


def test_the_rate_does_not_follow_from_weights_that_are_left_out(config, target, first):
    with pytest.raises(ConfigError, match="backbone"):
        fine_tuning(first, config, target, parts=("rpn",), rate_by=RateBy())


def test_the_rate_does_not_depend_on_the_seed(config, target, first):
    """The runs of a matrix differ in their seeds alone."""
    rates = {
        fine_tuning(first, config, target, rate_by=RateBy(), seed=seed).config.training.optimizer.rate
        for seed in (0, 1)
    }
    assert len(rates) == 1


def test_a_transfer_that_was_cut_short_goes_on_with_resume(first):
    assert "--resume" in again(["transfer", "somewhere", "--out", str(first)])


@pytest.mark.slow
def test_after_a_stop_no_further_run_begins(config, target, tmp_path):
    names = ("a", "b", "c")
    entries = plan_matrix([Pretraining(name=name, config=config) for name in names], {"t": target}, tmp_path / "m")
    with pytest.raises(Interrupted):
        run_matrix(entries, should_stop=lambda: True, at_once=1)
    assert not any((tmp_path / "m" / "t" / name).exists() for name in names)


def test_a_score_that_does_not_exist_has_no_mean(config, tmp_path):
    cost = RunCost(device="CPU", seconds=1.0, data_seconds=0.0, evaluation_seconds=0.0, device_days=0.0, images=1)
    entry = Entry(
        target="t",
        pretraining="a",
        parts="",
        seed=0,
        job=Job(path=tmp_path, config=config),
        primary="AP",
        scores={"AP": -1.0, "AP50": 0.5, "APl": -1.0},
        curve=((1, -1.0), (2, -1.0)),
        cost=cost,
    )
    (row,) = summarise([entry])
    assert row.mean is None and row.scores == {"AP50": 0.5} and row.curve == ()
