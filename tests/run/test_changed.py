"""A run that goes on with another recipe: refused, or insisted on key by key."""

import dataclasses
import json

import pytest

from gesso import api
from gesso.errors import ConfigError, Interrupted, RunError
from gesso.models.fpn import FPNConfig
from gesso.run.config import check_same, read_run_config
from gesso.run.folder import RunFolder
from gesso.run.train import train
from gesso.training.optimizer import SGD
from tests.run.helpers import StopAfter, differences, rows, tensors, tiny_run, two_stages

SHORT = {"steps": 4, "batch_size": 4, "checkpoint_every": 2, "evaluate_every": 4}
OTHER = {"optimizer": SGD(rate=0.02, momentum=0.5), "clip_norm": 3.0}


@pytest.fixture
def stopped(data, tmp_path):
    """A run that was stopped after two steps."""
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(tiny_run(data, **SHORT), out, observer=StopAfter(2))
    return out


def stored(out):
    return json.loads((out / "config.json").read_text())


def test_all_differences_are_listed_and_the_option_named(data, straight):
    config = tiny_run(data, seed=3, **SHORT | OTHER)
    with pytest.raises(ConfigError) as caught:
        check_same(RunFolder.open(straight), config)
    assert caught.value.what == (
        "the configuration is not that of the run: seed was 0, is 3; training.clip_norm was 10.0, is 3.0; "
        "training.optimizer.momentum was 0.9, is 0.5; training.optimizer.rate was 0.01, is 0.02"
    )
    assert caught.value.remedy.endswith(
        "--allow-changed seed training.clip_norm training.optimizer.momentum training.optimizer.rate"
    )


@pytest.mark.parametrize(
    ("allowed", "refused"),
    [
        ((), ["training.clip_norm", "training.optimizer.momentum", "training.optimizer.rate"]),
        (("training.clip_norm",), ["training.optimizer.momentum", "training.optimizer.rate"]),
        (("training.optimizer",), ["training.clip_norm"]),
        (("training.optimizer.rate", "training.clip-norm"), ["training.optimizer.momentum"]),
    ],
)
def test_only_what_is_allowed_may_differ(data, straight, allowed, refused):
    config = tiny_run(data, **SHORT | OTHER)
    with pytest.raises(ConfigError) as caught:
        check_same(RunFolder.open(straight), config, allowed)
    assert caught.value.remedy.split("--allow-changed ")[1].split() == refused


@pytest.mark.parametrize("allowed", [("training",), ("training.optimizer", "training.clip_norm")])
def test_what_was_allowed_is_given_back(data, straight, allowed):
    changes = check_same(RunFolder.open(straight), tiny_run(data, **SHORT | OTHER), allowed)
    assert changes == {
        "training.clip_norm": (10.0, 3.0),
        "training.optimizer.momentum": (0.9, 0.5),
        "training.optimizer.rate": (0.01, 0.02),
    }


@pytest.mark.parametrize(("key", "nearest"), [("training.optimiser", "training.optimizer"), ("sed", "seed")])
def test_an_unknown_key_names_the_nearest(data, straight, key, nearest):
    with pytest.raises(ConfigError, match=f"no key '{key}'.*'{nearest}'"):
        check_same(RunFolder.open(straight), tiny_run(data, **SHORT), [key])


def test_a_run_goes_on_with_what_was_allowed_and_remembers_it(data, straight, stopped):
    before = stored(stopped)
    config = tiny_run(data, **SHORT | OTHER)
    with pytest.raises(ConfigError, match="--allow-changed"):
        train(config, stopped, resume=True)
    assert stored(stopped) == before
    train(config, stopped, resume=True, allow_changed=["training.optimizer", "training.clip_norm"])
    assert read_run_config(RunFolder.open(stopped)).training == config.training
    assert stored(stopped)["changed"] == [
        {"step": 2, "key": "training.clip_norm", "old": 10.0, "new": 3.0},
        {"step": 2, "key": "training.optimizer.momentum", "old": 0.9, "new": 0.5},
        {"step": 2, "key": "training.optimizer.rate", "old": 0.01, "new": 0.02},
    ]
    assert {key: value for key, value in stored(stopped).items() if key not in ("config", "changed")} == {
        key: value for key, value in before.items() if key != "config"
    }
    assert rows(stopped)[:2] == rows(straight)[:2], "what was learnt before stays"
    assert [row["learning_rate"] for row in rows(stopped) if "loss" in row][2:] == pytest.approx([0.011, 0.0155])
    assert differences(straight, stopped), "the change counts"
    assert "from step 2 on training.clip_norm is 3.0; it was 10.0" in (stopped / "log.txt").read_text()
    train(config, stopped, resume=True)
    with pytest.raises(ConfigError, match=r"clip_norm was 3\.0, is 10\.0"):
        train(tiny_run(data, **SHORT), stopped, resume=True)


def test_changes_add_up(data, stopped):
    once, twice = (tiny_run(data, **SHORT | {"optimizer": SGD(rate=rate)}) for rate in (0.02, 0.03))
    with pytest.raises(Interrupted):
        train(once, stopped, resume=True, allow_changed=["training"], observer=StopAfter(1))
    train(twice, stopped, resume=True, allow_changed=["training"])
    assert [(row["step"], row["old"], row["new"]) for row in stored(stopped)["changed"]] == [
        (2, 0.01, 0.02),
        (3, 0.02, 0.03),
    ]


def test_a_change_that_the_checkpoint_cannot_hold_changes_nothing(data, stopped, straight):
    before = stored(stopped)
    config = tiny_run(data, **SHORT)
    wider = dataclasses.replace(config, model=dataclasses.replace(config.model, neck=FPNConfig(width=32)))
    with pytest.raises(RunError, match="its weights do not fit"):
        train(wider, stopped, resume=True, allow_changed=["model"])
    assert stored(stopped) == before
    train(config, stopped, resume=True)
    assert differences(straight, stopped) == []


def test_what_is_over_cannot_be_changed(data, stopped, tmp_path):
    with pytest.raises(ConfigError, match=r"training\.steps is 1, and 2 are done"):
        train(tiny_run(data, **SHORT | {"steps": 1}), stopped, resume=True, allow_changed=["training"])
    one_stage = tiny_run(data, **SHORT)
    with pytest.raises(ConfigError, match="its stages cannot be others"):
        two = dataclasses.replace(one_stage, pretraining=one_stage.training)
        train(two, stopped, resume=True, allow_changed=["pretraining"])
    config, out = two_stages(data), tmp_path / "two"
    with pytest.raises(Interrupted):
        train(config, out, observer=StopAfter(4))
    longer = dataclasses.replace(config, pretraining=dataclasses.replace(config.pretraining, steps=5))
    with pytest.raises(ConfigError, match="the stage pretraining is over, and its steps stay"):
        train(longer, out, resume=True, allow_changed=["pretraining.steps"])


def test_a_run_may_become_longer(data, stopped):
    config = tiny_run(data, **SHORT | {"steps": 6})
    result = api.train(config, stopped, resume=True, allow_changed=["training.steps"])
    assert result.images == 24 and [row["step"] for row in rows(stopped) if "loss" in row] == list(range(1, 7))
    assert tensors(stopped)


def test_the_option_is_for_a_resume(data, tmp_path):
    with pytest.raises(ConfigError, match="--resume"):
        train(tiny_run(data, **SHORT), tmp_path / "new", allow_changed=["training"])
    assert not (tmp_path / "new").exists()


def test_the_command_line_lists_and_insists(gesso, data, tmp_path):
    out = tmp_path / "run"
    call = ("train", "debug:tiny", "--out", out, "--data.train", data.train, "--data.val", data.val)
    gesso(*call, "--training.steps", 1)
    line = gesso.mistake(*call, "--resume", "--training.steps", 2, "--training.clip-norm", 5)
    assert "training.clip_norm was 10.0, is 5.0; training.steps was 1, is 2" in line
    insist = line.split("insist with ")[1].split()
    assert insist == ["--allow-changed", "training.clip_norm", "training.steps"]
    longer = (*call, "--resume", "--training.steps", 2, "--training.clip-norm", 5)
    assert "training.steps was 1" in gesso.mistake(*longer, "--allow-changed", "training.clip_norm")
    separately = ("--allow-changed", "training.clip_norm", "--allow-changed", "training.steps")
    assert gesso.json(*longer, *separately)["images"] == 16
    assert [row["key"] for row in stored(out)["changed"]] == ["training.clip_norm", "training.steps"]
