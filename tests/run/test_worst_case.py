"""The largest step before the first one: it changes no run, and what does not fit ends a run before it begins."""

import dataclasses

import pytest
import torch

from gesso.data.loading import training_batches
from gesso.errors import ConfigError, Interrupted
from gesso.models.mask_head import MaskHeadConfig
from gesso.run.train import train
from gesso.training.step import train_step
from gesso.training.worst_case import rehearse
from tests.run.helpers import StopAfter, differences, rows, tiny_run, two_stages

SHORT = {"steps": 4, "batch_size": 4, "checkpoint_every": 2, "evaluate_every": 4}
REHEARSED = "the largest step (4 pictures of 64 x 64 with 100 objects each) takes "


def scarce(monkeypatch, most: int, *, from_trial: int = 1):
    """Memory for ``most`` pictures, from one trial on; returns the batch sizes that were tried."""
    tried = []

    def step(stage, batch, targets):
        tried.append(len(batch.images))
        if len(tried) >= from_trial and len(batch.images) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return train_step(stage, batch, targets)

    monkeypatch.setattr("gesso.training.worst_case.train_step", step)
    return tried


def test_a_run_is_the_same_without_it(data, straight, tmp_path, monkeypatch):
    monkeypatch.setattr("gesso.run.session.rehearse", lambda *given, **named: None)
    train(tiny_run(data, **SHORT), tmp_path / "r")
    assert differences(straight, tmp_path / "r") == []
    assert REHEARSED in (straight / "log.txt").read_text()
    assert REHEARSED not in (tmp_path / "r" / "log.txt").read_text()


def test_it_is_done_once_a_stage_and_at_a_resume(data, tmp_path, monkeypatch):
    began, config, out = [], two_stages(data), tmp_path / "r"

    def spy(stage, example, shape, *, name, begun):
        began.append((name, stage.step, shape, begun))
        return rehearse(stage, example, shape, name=name, begun=begun)

    monkeypatch.setattr("gesso.run.session.rehearse", spy)
    with pytest.raises(Interrupted):
        train(config, out, observer=StopAfter(4))
    train(config, out, resume=True)
    train(config, out, resume=True)
    assert began == [
        ("pretraining", 0, (32, 32), False),
        ("training", 0, (64, 64), True),
        ("training", 1, (64, 64), True),
    ]
    training = [row["step"] for row in rows(out) if "loss" in row]
    assert training == [1, 2, 3, 4, 5, 6], "its numbers stand in no row"


def test_what_does_not_fit_leaves_no_folder(data, tmp_path, monkeypatch):
    tried = scarce(monkeypatch, 3)
    with pytest.raises(
        ConfigError,
        match=r"4 pictures of 64 x 64 .*; 3 do\. Set --training\.batch-size 3, or --training\.accumulate 2,",
    ):
        train(tiny_run(data, **SHORT), tmp_path / "r")
    assert tried == [4, 2, 3] and not (tmp_path / "r").exists()
    train(tiny_run(data, **SHORT | {"batch_size": 3}), tmp_path / "r")


def test_a_later_stage_that_does_not_fit_loses_nothing(data, tmp_path, monkeypatch):
    config, out = two_stages(data), tmp_path / "r"
    train(config, tmp_path / "straight")
    with monkeypatch.context() as patch:
        scarce(patch, 1, from_trial=2)
        with pytest.raises(ConfigError, match=r"one does\. Go on where .* new run with --training\.batch-size 1\."):
            train(config, out)
    train(config, out, resume=True)
    assert differences(tmp_path / "straight", out) == []


def test_ctrl_c_within_it_is_ctrl_c_before_the_first_step(data, straight, tmp_path, monkeypatch):
    config, out = tiny_run(data, **SHORT), tmp_path / "r"

    def interrupted(stage, batch, targets):
        train_step(stage, batch, targets)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("gesso.training.worst_case.train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(config, out)
    assert not list((out / "checkpoints").glob("[0-9]*"))
    train(config, out, resume=True)
    assert differences(straight, out) == []


@pytest.mark.parametrize("side", [0, 16])
def test_masks_are_loaded_where_the_detector_learns_them(data, tmp_path, monkeypatch, side):
    asked, seen, config = [], [], tiny_run(data, val=False, **SHORT | {"steps": 1})

    def batches(*given, **named):
        asked.append(named["mask_side"])
        return training_batches(*given, **named)

    def spy(stage, example, shape, **named):
        seen.append(example[1].masks)
        return rehearse(stage, example, shape, **named)

    monkeypatch.setattr("gesso.run.session.training_batches", batches)
    monkeypatch.setattr("gesso.run.session.rehearse", spy)
    head = MaskHeadConfig(convs=1, width=8, target_side=side) if side else None
    train(dataclasses.replace(config, model=dataclasses.replace(config.model, mask_head=head)), tmp_path / "r")
    assert asked == [side] and ("mask" in rows(tmp_path / "r")[0]) == bool(side)
    assert (seen[0] is None) if not side else seen[0].shape == (4, 100, side, side)
