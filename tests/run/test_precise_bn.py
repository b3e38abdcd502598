"""Precise batch norm in a run: evaluated, saved beside the raw weights, restored, and the start of the next stage."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from gesso.data.index import Index
from gesso.errors import Interrupted
from gesso.models.norm import NormPolicy
from gesso.run.models import load_run
from gesso.run.predictor import TrainedDetector
from gesso.run.train import train
from gesso.training.checkpoint import read_checkpoint
from gesso.training.loop import run_stage
from tests.run.helpers import StopAfter, differences, tiny_run, two_stages

SHORT = {"steps": 4, "batch_size": 4, "checkpoint_every": 2, "evaluate_every": 4, "precise_bn": 8}


def saved(run, step):
    folder = run / "checkpoints" / f"{step:08d}"
    return [load_file(folder / f"{name}.safetensors") for name in ("model", "precise_bn")]


@pytest.fixture(scope="module")
def precise(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("precise") / "run"
    train(tiny_run(data, **SHORT), out)
    return out


def test_it_is_beside_the_raw_weights(straight, precise):
    """Which are those of the same run without it."""
    raw, statistics = saved(precise, 4)
    plain = load_file(straight / "checkpoints" / "00000004" / "model.safetensors")
    assert raw.keys() == plain.keys() and all(torch.equal(raw[name], plain[name]) for name in raw)
    assert statistics.keys() == {name for name in raw if "running_" in name}
    assert all(not torch.equal(statistics[name], raw[name]) for name in statistics)
    assert not (precise / "checkpoints" / "00000002" / "precise_bn.safetensors").exists()


def test_it_is_what_is_evaluated_and_loaded(data, precise):
    index = Index.open(data.val)
    scores, _ = load_run(precise).evaluate(index)
    row = next(row for row in map(json.loads, (precise / "metrics.jsonl").open()) if "AP" in row)
    assert {key: row[key] for key in scores if key != "by_class"} == pytest.approx(
        {key: value for key, value in scores.items() if key != "by_class"}
    )
    weights = load_run(precise).model.state_dict()
    _, statistics = saved(precise, 4)
    assert all(torch.equal(weights[name], value) for name, value in statistics.items())


@pytest.mark.parametrize("stop", [2, 4])
def test_a_resume_is_exact(data, precise, tmp_path, stop):
    config, out = tiny_run(data, **SHORT), tmp_path / "r"
    if stop < 4:
        with pytest.raises(Interrupted):
            train(config, out, observer=StopAfter(stop))
    else:
        train(config, out, observer=StopAfter(stop))
    train(config, out, resume=True)
    assert differences(precise, out) == []


def with_precise_first_stage(data):
    config = two_stages(data)
    first = dataclasses.replace(config.pretraining, precise_bn=8)
    second = dataclasses.replace(config.training, norm=NormPolicy(kind="fixed"), keep_checkpoints=9)
    return dataclasses.replace(config, pretraining=first, training=second)


@pytest.mark.parametrize("stop", [None, 3, 4])
def test_the_next_stage_starts_from_it(data, tmp_path, monkeypatch, stop):
    """Averages and precise statistics, also where the run is interrupted at the border of the stages, or after it."""
    began, out = [], tmp_path / "r"

    def spy(stage, batches, callbacks):
        began.append((stage.step, {name: value.clone() for name, value in stage.module.state_dict().items()}))
        run_stage(stage, batches, callbacks)

    monkeypatch.setattr("gesso.run.session.run_stage", spy)
    config = with_precise_first_stage(data)
    if stop is not None:
        with pytest.raises(Interrupted):
            train(config, out, observer=StopAfter(stop))
    train(config, out, resume=stop is not None)
    _, statistics = saved(out, 3)
    averages = load_file(out / "checkpoints" / "00000003" / "ema.safetensors")
    start = next(state for step, state in began[1:] if step == 0)
    for name, value in averages.items():
        assert torch.equal(start[name], statistics.get(name, value)), name
    end = load_file(out / "checkpoints" / "00000006" / "model.safetensors")
    assert all(torch.equal(end[name], value) for name, value in statistics.items()), "fixed ones stay"
    found = read_checkpoint(out / "checkpoints" / "00000003")
    assert found is not None and torch.equal(
        found.weights()["backbone.body.conv1.1.running_mean"], statistics["backbone.body.conv1.1.running_mean"]
    )


def test_fixed_statistics_are_left_and_said(data, tmp_path):
    train(tiny_run(data, **SHORT | {"norm": NormPolicy(kind="fixed")}), tmp_path / "r")
    assert "precise_bn changes nothing" in (tmp_path / "r" / "log.txt").read_text()
    assert not (tmp_path / "r" / "checkpoints" / "00000004" / "precise_bn.safetensors").exists()


def test_evaluations_use_the_averages(data, tmp_path, monkeypatch):
    """And the model has its own weights again afterwards."""
    seen, evaluate = [], TrainedDetector.evaluate

    def spy(self, *given, **options):
        seen.append({name: value.clone() for name, value in self.model.state_dict().items()})
        return evaluate(self, *given, **options)

    monkeypatch.setattr(TrainedDetector, "evaluate", spy)
    train(tiny_run(data, **SHORT | {"ema_decay": 0.5, "evaluate_every": 2}), tmp_path / "r")
    for step, weights in zip((2, 4), seen, strict=True):
        folder = tmp_path / "r" / "checkpoints" / f"{step:08d}"
        expected = load_file(folder / "ema.safetensors")
        if step == 4:
            expected |= load_file(folder / "precise_bn.safetensors")
        assert all(torch.equal(weights[name], value) for name, value in expected.items())
        own = load_file(folder / "model.safetensors")
        assert any(not torch.equal(own[name], expected[name]) for name in own)
        found = read_checkpoint(folder)
        assert found is not None and found.state.ema_updates == step
