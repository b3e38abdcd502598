"""Same seed, same run; nothing is lost."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gesso.errors import InputError, Interrupted, RunError
from gesso.evaluation.coco import score_coco
from gesso.run.folder import RunFolder
from gesso.run.observer import Observer
from gesso.run.train import train
from gesso.training.loop import run_stage
from tests.run.helpers import BACKBONE, StopAfter, differences, newest, rows, tensors, tiny_run, two_stages

SHORT = {"steps": 4, "batch_size": 4, "checkpoint_every": 2, "evaluate_every": 4}


def test_a_run_leaves_what_it_promises(straight):
    names = {path.name for path in straight.iterdir()}
    assert names >= {"config.json", "label_space.json", "lock", "metrics.jsonl", "log.txt", "checkpoints", "detections"}
    training, evaluations = [r for r in rows(straight) if "loss" in r], [r for r in rows(straight) if "AP" in r]
    assert [row["step"] for row in training] == [1, 2, 3, 4] and [row["step"] for row in evaluations] == [4]
    parts = ("rpn_objectness", "rpn_box", "box_class", "box_regression")
    for row in training:
        assert row["loss"] == pytest.approx(sum(row[part] for part in parts), rel=1e-5)
    assert [path.name for path in sorted((straight / "checkpoints").iterdir()) if path.is_dir()] == [
        "00000002",
        "00000004",
    ]


def test_the_log_has_a_line_a_step_with_all_that_a_row_says(straight):
    lines = (straight / "log.txt").read_text().splitlines()
    for step in (1, 2, 3, 4):
        (line,) = [line for line in lines if f" I training {step}/4: loss " in line]
        words = ("rpn_objectness", "rate", "img/s", "data", "forward", "backward", "communication", "optimizer", "GiB")
        assert all(word in line for word in (*words, "positive/negative rpn_objectness", " left"))
    assert any(" I step 4: AP " in line for line in lines)


def test_same_seed_same_run_and_workers_change_nothing(data, straight, tmp_path):
    train(tiny_run(data, workers=2, **SHORT), tmp_path / "again")
    assert differences(straight, tmp_path / "again") == []


def test_another_seed_is_another_run(data, straight, tmp_path):
    train(tiny_run(data, seed=1, val=False, **SHORT), tmp_path / "other")
    one, two = tensors(straight), tensors(tmp_path / "other")
    weights = [name for name in one if name.endswith(".weight") and one[name].ndim > 1]
    assert weights and not any(torch.equal(one[name], two[name]) for name in weights)


@pytest.mark.parametrize("stop", [1, 3])
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(data, straight, tmp_path, stop):
    config, out = tiny_run(data, **SHORT), tmp_path / "r"
    with pytest.raises(Interrupted, match=f"step {stop}.*go-on-command") as caught:
        train(config, out, observer=StopAfter(stop), how_to_resume="go-on-command")
    assert caught.value.exit_code == 130
    assert newest(out).name == f"{stop:08d}" and [row["step"] for row in rows(out)] == list(range(1, stop + 1))
    observer = StopAfter()
    train(config, out, resume=True, observer=observer)
    assert observer.seen == [("training", step) for step in range(stop + 1, 5)]
    assert differences(straight, out) == []


def test_a_torn_last_line_and_a_torn_checkpoint_are_passed_over(data, straight, tmp_path, caplog):
    """What a power cut leaves: the newest checkpoint is cut off, and so is the last row."""
    config, out = tiny_run(data, **SHORT), tmp_path / "r"
    with pytest.raises(Interrupted):
        train(config, out, observer=StopAfter(3))
    weights = out / "checkpoints" / "00000003" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    observer = StopAfter()
    train(config, out, resume=True, observer=observer)
    assert observer.seen[0] == ("training", 3), "goes on from step 2"
    assert "00000003" in (out / "log.txt").read_text() and weights.exists()
    assert differences(straight, out) == []


@pytest.mark.parametrize(
    "stops",
    [pytest.param((2,), marks=pytest.mark.slow), (3,), pytest.param((4,), marks=pytest.mark.slow), (1, 1, 2)],
    ids=str,
)
def test_two_stages_interrupted_in_either(data, two_stage_run, tmp_path, stops):
    config, out = two_stages(data), tmp_path / "r"
    resume = False
    for stop in stops:
        with pytest.raises(Interrupted):
            train(config, out, observer=StopAfter(stop), resume=resume)
        resume = True
    train(config, out, resume=True)
    assert differences(two_stage_run, out) == []


@pytest.fixture(scope="module")
def two_stage_run(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("two") / "run"
    observer = StopAfter()
    train(two_stages(data), out, observer=observer)
    assert observer.planned == ([("pretraining", 3), ("training", 3)], 2)
    return out


def test_stages_follow_each_other(two_stage_run):
    found = rows(two_stage_run)
    training = [(row["step"], row["stage"]) for row in found if "loss" in row]
    assert training == [(step, "pretraining" if step < 4 else "training") for step in (1, 2, 3, 4, 5, 6)]
    assert [(row["step"], row["stage"]) for row in found if "AP" in row] == [(5, "training"), (6, "training")]
    assert [row["images"] for row in found if "loss" in row] == [4, 8, 12, 16, 20, 24]


def test_a_finished_run_is_not_trained_again(straight, data):
    before = {path: path.read_bytes() for path in straight.rglob("*") if path.is_file() and path.name != "log.txt"}
    observer = StopAfter()
    result = train(tiny_run(data, **SHORT), straight, resume=True, observer=observer)
    scores = next(row for row in rows(straight) if "AP" in row)
    assert observer.seen == [] and result.scores is not None and result.scores["AP"] == scores["AP"]
    assert result.images == 16 and result.seconds > 0
    changed = [path.name for path, content in before.items() if path.read_bytes() != content]
    assert set(changed) <= {"lock", "report.html"}


def test_float64_is_trained_and_resumed(data, tmp_path):
    config = tiny_run(data, **SHORT | {"steps": 2, "precision": "float64", "evaluate_every": 2})
    train(config, tmp_path / "a")
    with pytest.raises(Interrupted):
        train(config, tmp_path / "b", observer=StopAfter(1))
    train(config, tmp_path / "b", resume=True)
    assert differences(tmp_path / "a", tmp_path / "b") == []
    found = tensors(tmp_path / "a")
    assert {v.dtype for n, v in found.items() if n.endswith(".weight") or "momentum" in n} == {torch.float64}


def test_a_full_disk_is_survived_and_said(data, straight, tmp_path, monkeypatch):
    """No checkpoint at step 2; training goes on, and the last one is there."""
    free = iter([0, 2**40])
    usage = type("Usage", (), {"__init__": lambda self, free: setattr(self, "free", free)})
    monkeypatch.setattr("gesso.training.checkpoint.shutil.disk_usage", lambda _: usage(next(free)))
    out = tmp_path / "r"
    train(tiny_run(data, **SHORT), out)
    assert " E no checkpoint at step 2: " in (out / "log.txt").read_text()
    assert [path.name for path in (out / "checkpoints").iterdir() if path.is_dir()] == ["00000004"]
    assert differences(straight, out) == []


def test_rows_and_detections_that_cannot_be_written_cost_themselves_alone(data, straight, tmp_path, monkeypatch):
    """The disk is full while steps 2 and 3 are logged and the first evaluation is kept; then there is room again."""
    out, append = tmp_path / "r", RunFolder.append

    def full(folder, row):
        if row["step"] in (2, 3) or ("AP" in row and row["step"] == 2):
            raise InputError("cannot be written: No space left on device", where=folder.metrics)
        append(folder, row)

    monkeypatch.setattr(RunFolder, "append", full)
    train(tiny_run(data, **SHORT | {"evaluate_every": 2}), out)
    assert [(row["step"], "AP" in row) for row in rows(out)] == [(1, False), (4, False), (4, True)]
    assert (out / "log.txt").read_text().count("No space left") == 3 and (out / "report.html").exists()
    one, two = tensors(straight), tensors(out)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_last_evaluation_is_the_result_and_must_be_written(data, straight, tmp_path, monkeypatch):
    config, out = tiny_run(data, **SHORT), tmp_path / "r"
    with monkeypatch.context() as patch:

        def refuse(*given):
            raise InputError("the disk is full", where=out)

        patch.setattr("gesso.run.predictor.write_detections", refuse)
        with pytest.raises(InputError, match="the disk is full"):
            train(config, out)
    train(config, out, resume=True)
    assert differences(straight, out) == []


def test_the_best_stays_the_best(data, tmp_path, monkeypatch):
    scores = iter([0.2, 0.9, 0.5, 0.9])
    monkeypatch.setattr("gesso.run.predictor.score_coco", lambda *given: score_coco(*given) | {"AP": next(scores)})
    train(tiny_run(data, **SHORT | {"evaluate_every": 1, "keep_checkpoints": 1}), tmp_path / "r")
    assert json.loads((tmp_path / "r" / "checkpoints" / "best.json").read_text()) == {"step": 2, "AP": 0.9}
    assert sorted(p.name for p in (tmp_path / "r" / "checkpoints").iterdir() if p.is_dir()) == ["00000002", "00000004"]


def test_a_stage_starts_from_the_averages_of_the_one_before(data, tmp_path, monkeypatch):
    began = {}

    def spy(stage, batches, callbacks):
        began[len(began)] = {name: value.clone() for name, value in stage.module.state_dict().items()}
        run_stage(stage, batches, callbacks)

    monkeypatch.setattr("gesso.run.session.run_stage", spy)
    config = two_stages(data)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, keep_checkpoints=9))
    train(config, tmp_path / "r")
    averages = load_file(tmp_path / "r" / "checkpoints" / "00000003" / "ema.safetensors")
    own = load_file(tmp_path / "r" / "checkpoints" / "00000003" / "model.safetensors")
    assert all(torch.equal(began[1][name], averages[name]) for name in averages)
    assert any(not torch.equal(own[name], averages[name]) for name in averages)


def test_a_best_step_without_a_checkpoint_is_not_the_best(data, tmp_path, monkeypatch):
    """The disk is full at the first evaluation, whatever its score; the second one is what can be loaded."""
    free = iter([0, 2**40])
    usage = type("Usage", (), {"__init__": lambda self, free: setattr(self, "free", free)})
    monkeypatch.setattr("gesso.training.checkpoint.shutil.disk_usage", lambda _: usage(next(free)))
    scores = iter([0.9, 0.1])
    monkeypatch.setattr("gesso.run.predictor.score_coco", lambda *given: score_coco(*given) | {"AP": next(scores)})
    train(tiny_run(data, **SHORT | {"evaluate_every": 2}), tmp_path / "r")
    best = json.loads((tmp_path / "r" / "checkpoints" / "best.json").read_text())
    assert best == {"step": 4, "AP": 0.1}


def test_a_full_disk_at_the_end_is_an_error_and_costs_no_step(data, straight, tmp_path, monkeypatch):
    config, out = tiny_run(data, **SHORT), tmp_path / "r"
    with monkeypatch.context() as patch:
        usage = type("Usage", (), {"free": 0})
        patch.setattr(
            "gesso.training.checkpoint.shutil.disk_usage",
            lambda _: usage if (out / "checkpoints" / "00000002").exists() else type("Usage", (), {"free": 2**40}),
        )
        with pytest.raises(RunError, match="disk"):
            train(config, out)
    train(config, out, resume=True)
    assert differences(straight, out) == []


@pytest.mark.slow
def test_killed_at_any_moment(data, tmp_path):
    """SIGKILL of the real command, twice, at moments that nobody chose; then it goes on to the same end."""
    config = tiny_run(data, batch_size=4, checkpoint_every=2, evaluate_every=6)
    train(config, tmp_path / "straight", recipe="debug:tiny")
    options = ["--training.batch-size", "4", "--training.checkpoint-every", "2", "--training.evaluate-every", "6"]
    options += ["--model.backbone.name", BACKBONE, "--data.train", str(data.train), "--data.val", str(data.val)]
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "gesso", "train", "debug:tiny", "--out", str(out), *options]
    kills, pause = 0, 0.0
    for _ in range(5):
        process = subprocess.Popen(
            [*command, *(["--resume"] if out.exists() else [])],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if kills < 2:
            _wait_for_rows(out, process)
            time.sleep(pause)
            pause += 0.37
        if kills < 2 and process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            continue
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        break
    assert kills >= 1
    assert differences(tmp_path / "straight", out) == []


def _wait_for_rows(run: Path, process: subprocess.Popen[str]) -> None:
    """Until the process has written a row of its own."""
    metrics = run / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns if metrics.exists() else 0
    size = metrics.stat().st_size if metrics.exists() else 0
    while process.poll() is None:
        if metrics.exists() and metrics.stat().st_mtime_ns != before and metrics.stat().st_size > size // 2:
            return
        time.sleep(0.02)


def test_first_weights_and_chance_depend_on_the_seed_alone(data, straight, tmp_path):
    """Whatever the process did before with the global generators."""
    torch.manual_seed(987)
    torch.rand(1000)
    np.random.seed(5)
    train(tiny_run(data, **SHORT), tmp_path / "r")
    assert differences(straight, tmp_path / "r") == []


def test_tensorboard_files_are_whole(data, tmp_path):
    pytest.importorskip("tensorboard")
    config = dataclasses.replace(tiny_run(data, steps=1, batch_size=2), tensorboard=True)
    train(config, tmp_path / "r", observer=Observer())
    from_file = next((tmp_path / "r" / "tensorboard").glob("events.*")).read_bytes()
    assert b"train/loss" in from_file and b"val/AP" in from_file


def test_the_configuration_is_kept(straight, data):
    stored = json.loads((straight / "config.json").read_text())
    assert stored["recipe"] == "debug:tiny" and stored["config"]["data"]["train"] == str(data.train)
    assert stored["environment"]["threads"] == 1 and stored["environment"]["torch"] == torch.__version__


def test_a_resume_with_broken_checkpoints_alone_is_refused_and_loses_nothing(data, straight, tmp_path):
    shutil.copytree(straight, tmp_path / "r")
    for weights in (tmp_path / "r" / "checkpoints").glob("*/model.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-1000])
    before = (tmp_path / "r" / "metrics.jsonl").read_bytes()
    with pytest.raises(RunError, match="none of its checkpoints is whole"):
        train(tiny_run(data, **SHORT), tmp_path / "r", resume=True)
    assert (tmp_path / "r" / "metrics.jsonl").read_bytes() == before
