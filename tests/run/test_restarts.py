"""A run knows the torchrun that began it, and goes on when that starts its processes again."""

import fcntl
import json
import threading

import pytest

from gesso.errors import ConfigError, Interrupted, RunError
from gesso.run import train as training
from gesso.run.train import train
from tests.run.helpers import StopAfter, differences, rows, tiny_run

SHORT = {"steps": 4, "batch_size": 4, "checkpoint_every": 2, "evaluate_every": 4}


@pytest.fixture
def launched(monkeypatch):
    """Sets the environment as torchrun does."""

    def begin(name, restarts=0):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
        monkeypatch.setenv("GROUP_RANK", "0")

    for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return begin


@pytest.mark.parametrize("stop", [None, 1, 3])
def test_a_group_that_is_started_again_goes_on_without_resume(data, straight, tmp_path, launched, stop):
    """Killed before its first step (nothing is there but the folder), before its first checkpoint, or after one."""
    config, out = tiny_run(data, **SHORT), tmp_path / "run"
    launched("job")

    def die(step):
        if step == stop:
            raise KeyboardInterrupt

    dying = StopAfter(then=die)
    if stop is None:
        dying.plan = lambda stages, evaluations: die(None)
    with pytest.raises(KeyboardInterrupt):
        train(config, out, recipe="debug:tiny", observer=dying)
    assert json.loads((out / "config.json").read_text())["launch"] == "job"
    launched("another")
    with pytest.raises(RunError, match="exists already"):
        train(config, out, recipe="debug:tiny")
    launched("job")
    train(config, out, recipe="debug:tiny")
    assert differences(straight, out) == []
    assert "torchrun started the processes again" in (out / "log.txt").read_text()


def test_a_group_that_is_started_again_is_the_same_run_or_none(data, tmp_path, launched):
    launched("job")
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(tiny_run(data, **SHORT), out, observer=StopAfter(1))
    with pytest.raises(ConfigError, match=r"training\.steps was 4, is 5"):
        train(tiny_run(data, **SHORT | {"steps": 5}), out)
    assert [row["step"] for row in rows(out)] == [1]


def test_a_run_remembers_the_launch_that_goes_on_with_it(data, tmp_path, launched):
    out, config = tmp_path / "run", tiny_run(data, **SHORT)
    with pytest.raises(Interrupted):
        train(config, out, observer=StopAfter(1))
    assert json.loads((out / "config.json").read_text())["launch"] is None
    launched("second")
    with pytest.raises(Interrupted):
        train(config, out, resume=True, observer=StopAfter(1))
    train(config, out)
    assert [row["step"] for row in rows(out) if "loss" in row] == [1, 2, 3, 4]


def test_a_group_that_is_started_again_waits_for_the_one_that_dies(data, tmp_path, launched, monkeypatch):
    """The lock of a process that still ends is waited for; another run's is not."""
    launched("job")
    out, config = tmp_path / "run", tiny_run(data, **SHORT)
    with pytest.raises(Interrupted):
        train(config, out, observer=StopAfter(1))
    with (out / "lock").open("a+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        monkeypatch.setattr(training, "PATIENCE", 0.2)
        with pytest.raises(RunError, match="another process"):
            train(config, out)
        monkeypatch.setattr(training, "PATIENCE", 60.0)
        release = threading.Timer(1.0, lambda: fcntl.flock(held, fcntl.LOCK_UN))
        release.start()
        train(config, out)
        assert release.finished.is_set()
        release.join()
