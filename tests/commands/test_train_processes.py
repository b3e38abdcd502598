"""``gesso train --gpus N``: one command, several processes, one voice and one exit code."""

import functools
import json
import os
import signal
import time

import pytest
import torch

from gesso import distributed
from gesso.commands import launching as launcher
from gesso.commands.interruption import StopRequest, command_line, graceful_stop
from gesso.errors import ConfigError, Interrupted
from tests.distributed.launched import GESSO, launching, training_rows, weights
from tests.distributed.processes import run as run_processes
from tests.run.helpers import differences

TINY = ("train", "debug:tiny", "--training.precision", "float64")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run of two processes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with launching(folder / "said") as begin:
        run = begin(*GESSO, *TINY, "--gpus", 2, "--out", folder / "run", "--json")
        assert run.wait() == 0, run.err
        return folder / "run", run


@pytest.mark.slow
def test_two_processes_learn_what_one_does_and_speak_with_one_voice(undisturbed, gesso, tmp_path):
    two, called = undisturbed
    gesso(*TINY, "--out", tmp_path / "one")
    one = training_rows(tmp_path / "one")
    for row, other in zip(one, training_rows(two), strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-9)
    assert len(one) == 12
    result = json.loads(called.out)
    assert result["images"] == 96 and result["path"] == str(two)
    assert called.err.count("12/12: loss") == 1 and "rank" not in called.err and "Traceback" not in called.err
    stored = json.loads((two / "config.json").read_text())
    assert stored["environment"]["world_size"] == 2 and stored["launch"]


@pytest.mark.slow
def test_a_signal_stops_all_after_one_step_and_a_resume_changes_nothing(undisturbed, tmp_path):
    """SIGTERM (143), then Ctrl-C (130) of the run that went on, then to the end."""
    run, reached = tmp_path / "run", 0
    with launching(tmp_path / "said") as begin:
        for number, resume in ((signal.SIGTERM, ()), (signal.SIGINT, ("--resume",))):
            call = begin(*GESSO, *TINY, "--gpus", 2, "--out", run, *resume)
            call.until(functools.partial(_is_past, run, reached + 1))
            call.process.send_signal(number)
            time.sleep(0.01)
            call.process.send_signal(number)  # impatience changes nothing
            assert call.wait() == 128 + number, call.err
            before, reached = reached, training_rows(run)[-1]["step"]
            assert before < reached < 12
            assert (run / "checkpoints" / f"{reached:08d}").is_dir()
            told = [line for line in call.err.splitlines() if line.startswith("gesso: ")]
            assert len(told) == 1 and f"interrupted at step {reached}; everything up to it is saved" in told[0]
            assert told[0].endswith(f"--gpus 2 --out {run} --resume") and "python -m gesso train" in told[0]
            assert "Traceback" not in call.err
        call = begin(*GESSO, *TINY, "--gpus", 2, "--out", run, "--resume")
        assert call.wait() == 0, call.err
    assert differences(undisturbed[0], run) == []


def _is_past(run, step):
    return any(row["step"] > step for row in training_rows(run))


@pytest.mark.slow
def test_a_process_that_is_killed_ends_all_with_the_code_to_start_again(tmp_path):
    run = tmp_path / "run"
    with launching(tmp_path / "said") as begin:
        call = begin(*GESSO, *TINY, "--gpus", 2, "--out", run)
        call.until(lambda: len(training_rows(run)) > 5)
        os.kill(call.workers()[1], signal.SIGKILL)
        assert call.wait() == 75, call.err
    assert "process 1 was ended by SIGKILL" in call.err and "another process of this run was lost" in call.err
    assert weights(run, 4)


def test_mistakes_are_told_before_any_process_is_started(gesso, tmp_path, monkeypatch):
    monkeypatch.setattr(launcher, "start", lambda *given: pytest.fail("processes were started"))
    out = tmp_path / "run"
    line = gesso.mistake(*TINY, "--gpus", 3, "--out", out)
    assert "8 pictures a step cannot be divided among 3 processes. Start 1, 2, 4, 8 processes" in line
    assert "at least 1, found 0" in gesso.mistake(*TINY, "--gpus", 0, "--out", out)
    assert "takes INT, found 'two'" in gesso.mistake(*TINY, "--gpus", "two", "--out", out)
    assert "--out RUN" in gesso.mistake(*TINY, "--gpus", 2)
    assert "nowhere" in gesso.mistake(*TINY, "--gpus", 2, "--out", out, "--data.train", tmp_path / "nowhere")
    assert "no such run folder" in gesso.mistake(*TINY, "--gpus", 2, "--out", out, "--resume")
    assert not out.exists()
    (out / "mine").mkdir(parents=True)
    assert "exists already" in gesso.mistake(*TINY, "--gpus", 2, "--out", out)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device in ("auto", "cuda"):
        with pytest.raises(ConfigError, match=r"--gpus is 4, but there are 2\. Use --gpus 2"):
            launcher.check_gpus(4, device)
        launcher.check_gpus(2, device)
    launcher.check_gpus(4, "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    launcher.check_gpus(4, "auto")
    with pytest.raises(ConfigError, match="finds no GPU"):
        launcher.check_gpus(4, "cuda")


def test_under_torchrun_the_number_must_be_its_own(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert launcher.starts_others(1) and launcher.starts_others(2) and not launcher.starts_others(None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not launcher.starts_others(2)
    with pytest.raises(ConfigError, match="torchrun has started 2 processes"):
        launcher.starts_others(4)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    assert not launcher.starts_others(1)


@pytest.mark.parametrize(
    ("failed", "code"),
    [
        ({1: 2, 0: 75}, 2),
        ({0: 75, 1: 2}, 2),
        ({1: 1, 0: -signal.SIGTERM}, 1),
        ({1: -signal.SIGKILL, 0: 75}, 75),
        ({0: -signal.SIGKILL}, 137),
        ({0: 143, 1: 143}, 143),
        ({1: 130, 0: 130}, 130),
    ],
)
def test_one_exit_code_for_all(failed, code):
    assert launcher._exit_code(failed) == code


def test_threads_are_shared_among_the_processes(monkeypatch):
    seen = {}
    monkeypatch.setattr(launcher.os, "sched_getaffinity", lambda process: range(9))

    def elastic_launch(config, program):
        seen["processes"], seen["threads"] = config.nproc_per_node, os.environ["OMP_NUM_THREADS"]
        return lambda *words: None

    monkeypatch.setattr(distributed, "elastic_launch", elastic_launch)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    for expected in ("7", "2"):
        assert launcher.start(4, ["train"]).exit_code == 0
        assert seen == {"processes": 4, "threads": expected}
        del os.environ["OMP_NUM_THREADS"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_exit_code_says_which_signal_it_was(number, code):
    with pytest.raises(Interrupted) as caught, graceful_stop() as stop:
        assert not stop()
        signal.raise_signal(number)
        assert stop()
        raise Interrupted("saved")
    assert caught.value.exit_code == code
    with pytest.raises(Interrupted) as caught, graceful_stop():
        raise Interrupted("another process got a signal")
    assert caught.value.exit_code == 143


def test_a_second_signal_stops_at_once_but_under_a_launcher(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    alone = StopRequest()
    alone.receive(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        alone.receive(signal.SIGINT, None)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    launched = StopRequest()
    for number in (signal.SIGTERM, signal.SIGINT):
        launched.receive(number, None)
    assert launched() and launched.signal == signal.SIGTERM


def test_how_to_go_on_is_how_it_was_called(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr("sys.argv", ["/usr/bin/gesso"])
    assert command_line("train", "a b") == "gesso train 'a b'"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    assert command_line("train", "--gpus", "4") == "gesso train --gpus 4"
    assert command_line("train") == "torchrun --nproc-per-node 4 -m gesso train"
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert command_line("train") == "torchrun ... --nproc-per-node 4 -m gesso train"


def _tell(asked, machines, told, restarts):
    """In each process: ``tell_of_stop`` with a recorder in place of the signal."""
    rank = distributed.rank()
    os.environ |= {"TORCHELASTIC_RUN_ID": "job", "GROUP_RANK": str(machines[rank])}
    os.environ["TORCHELASTIC_MAX_RESTARTS"] = str(restarts)
    sent = []
    os.kill = lambda pid, number: sent.append((pid, number))
    launcher.tell_of_stop(asked[rank])
    return sent == [(os.getppid(), signal.SIGTERM)] if told[rank] else sent == []


@pytest.mark.parametrize(
    ("asked", "machines", "told", "restarts"),
    [
        ((True, True), (0, 0), (False, False), 2),  # the launcher handed it on
        ((False, True), (0, 0), (False, True), 2),  # it knows nothing
        ((False, True), (0, 0), (False, False), 0),  # and would start nothing again
        ((False, False), (0, 0), (False, False), 2),
        ((True, True, False), (0, 0, 1), (False, False, False), 2),  # the other machine goes on without this one
        ((True, False), (0, 1), (True, False), 2),  # alone on its machine, one cannot tell, and once more does no harm
    ],
)
def test_a_launcher_is_told_of_a_stop_that_it_does_not_know_of(asked, machines, told, restarts):
    assert run_processes(_tell, len(asked), asked, machines, told, restarts) == [True] * len(asked)
