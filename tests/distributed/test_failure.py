"""A step that is not finite in one process alone: all stop, nothing changes in any, and the whole batch is kept."""

import dataclasses
import json
import math

import pytest
import torch

from gesso import distributed
from gesso.errors import TrainingError
from gesso.models.detector import Detector
from gesso.models.norm import NormPolicy
from gesso.run.failure import read_failure, save_failure
from gesso.run.folder import RunFolder
from gesso.run.replay import replay
from gesso.run.train import train
from gesso.structures import map_tensors
from gesso.training.step import train_step
from tests.distributed.processes import run
from tests.run.helpers import tiny_run

SHORT = {"steps": 6, "batch_size": 4, "checkpoint_every": 9, "evaluate_every": 9}
STEP = 3


def _state(stage):
    """Weights, running statistics, averages and momentum of a stage."""
    found = {f"module.{name}": value for name, value in stage.module.state_dict().items()}
    found |= {f"ema.{name}": value for name, value in stage.ema.average.items()}
    for number, state in stage.optimizer.state_dict()["state"].items():
        found |= {f"{number}.{name}": value for name, value in state.items() if isinstance(value, torch.Tensor)}
    return {name: value.clone() for name, value in found.items()}


def _poison_picture(chosen):
    """A picture's values become too large for the first layers, in training and in evaluation."""
    normalise = Detector.normalise

    def poisoned(self, batch):
        values = normalise(self, batch)
        bad = torch.isin(batch.key, torch.tensor(chosen, dtype=torch.int64))
        return torch.where(bad[:, None, None, None], values * 1e38, values)

    return poisoned


def _train(out, kind):
    """Trains until a picture of process 1 is bad in step 3; what this process saw."""
    seen, chosen, patch = {}, [], pytest.MonkeyPatch()

    def step(stage, batch, targets, **options):
        if stage.step == STEP - 1:
            seen.update(stage=stage, before=_state(stage), keys=batch.key.tolist(), boxes=targets.boxes.sum().item())
            if distributed.rank() == 1:
                chosen.append(int(batch.key[0]))
        return train_step(stage, batch, targets, **options)

    patch.setattr("gesso.training.loop.train_step", step)
    patch.setattr(Detector, "normalise", _poison_picture(chosen))
    config = tiny_run(None, val=False, **SHORT, ema_decay=0.9, norm=NormPolicy(kind=kind))
    try:
        with pytest.raises(TrainingError) as caught:
            train(config, out)
    finally:
        patch.undo()
    before, after = seen["before"], _state(seen["stage"])
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    moved = any(name.endswith("momentum_buffer") and value.any() for name, value in before.items())
    return {
        "message": str(caught.value),
        "told": caught.value.told,
        "same": before.keys() == after.keys() and not changed,
        "moved": moved,
        "keys": seen["keys"],
        "boxes": seen["boxes"],
        "weights": {
            name.removeprefix("module."): v.numpy() for name, v in before.items() if name.startswith("module.")
        },
    }


@pytest.mark.parametrize("kind", ["train", pytest.param("sync", marks=pytest.mark.slow)])
def test_one_bad_picture_in_one_process_stops_all_and_changes_nothing(tmp_path, monkeypatch, kind):
    out = tmp_path / "r"
    first, second = run(_train, 2, out, kind)
    file = out / "failures" / "00000003.pt"
    for found in (first, second):
        assert found["message"].startswith("step 3: a loss or gradient is not finite")
        assert found["message"].endswith(f"repeat it with gesso debug replay {file}")
        assert found["same"] and found["moved"]
    assert (first["told"], second["told"]) == (False, True)
    kept = read_failure(file)
    assert (kept.step, kept.world_size) == (3, 2)
    assert kept.batch.key.tolist() == first["keys"] + second["keys"]
    assert kept.targets.boxes[:2].sum().item() == first["boxes"] and kept.targets.boxes[2:].sum() == second["boxes"]
    assert kept.weights.keys() == first["weights"].keys()
    assert all((value.numpy() == first["weights"][name]).all() for name, value in kept.weights.items())
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]
    monkeypatch.setattr(Detector, "normalise", _poison_picture([second["keys"][0]]))
    found = replay(file)
    assert found.repeated and found.processes == 2
    assert found.finding.module.startswith("backbone.body.")
    if kind == "train":
        assert all(picture.place in (2, 3) for picture in found.bad_pictures), "those of process 1"
    assert 2 in [picture.place for picture in found.bad_pictures]


def _finite(out, config):
    """Trains three steps and keeps the third one, which is finite."""

    def keeping(stage, *part, **options):
        if stage.step == STEP - 1:
            save_failure(RunFolder(out), "training", stage, STEP, *part)
        return train_step(stage, *part, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gesso.training.loop.train_step", keeping)
        train(config, out)


NORMS = {
    "train": NormPolicy(kind="train"),
    "train, groups": NormPolicy(kind="train", images=1),
    "sync": NormPolicy(kind="sync"),
    "sync, groups of processes": NormPolicy(kind="sync", images=4),
    "sync, groups in a process": NormPolicy(kind="sync", images=1),
    "fixed": NormPolicy(kind="fixed"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "accumulate"), [*((norm, 1) for norm in NORMS), ("train", 2), ("sync", 2)])
def test_one_process_repeats_the_numbers_of_several(tmp_path, norm, accumulate):
    """Of a step that was finite: losses and the norm of all gradients, in float64."""
    world, batch_size = (4, 8) if "processes" in norm else (2, 4 * accumulate)
    config = tiny_run(
        None,
        val=False,
        **SHORT | {"steps": 3, "batch_size": batch_size, "precision": "float64"},
        norm=NORMS[norm],
        accumulate=accumulate,
    )
    out = tmp_path / "r"
    run(_finite, world, out, config)
    found = replay(out / "failures" / "00000003.pt")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    row = next(row for row in lines if row["step"] == 3)
    assert (found.processes, found.pictures, found.repeated) == (world, batch_size, False)
    for name, value in found.losses.items():
        assert value == pytest.approx(row[name], rel=1e-11), name
    assert found.gradient_norm == pytest.approx(row["gradient_norm"], rel=1e-9) and math.isfinite(found.gradient_norm)


def _parts(folder):
    """Keeps a batch whose numbers tell process and picture."""
    rank, count = distributed.rank(), 3
    kept = read_failure(folder.path / "failures" / "00000003.pt")

    def of_rank(tensor):
        rows = torch.arange(count) + 10 * rank
        shape = (count, *tensor.shape[1:])
        return rows.view(-1, *[1] * (tensor.ndim - 1)).expand(shape).to(tensor.dtype).contiguous()

    stage = type("Stage", (), {"seed": 0, "device": torch.device("cpu"), "module": torch.nn.Linear(1, 1)})()
    batch, targets = map_tensors(kept.batch, of_rank), map_tensors(kept.targets, of_rank)
    return save_failure(folder, "training", stage, 9, batch, targets)


def test_parts_are_joined_in_the_order_of_the_processes(tmp_path):
    out = tmp_path / "r"
    config = tiny_run(None, val=False, **SHORT | {"steps": 3})
    _finite(out, config)
    said = run(_parts, 3, RunFolder(out))
    assert said == [f"It is kept: repeat it with gesso debug replay {out}/failures/00000009.pt"] * 3
    kept = read_failure(out / "failures" / "00000009.pt")
    expected = torch.tensor([0, 1, 2, 10, 11, 12, 20, 21, 22])
    for part in (kept.batch, kept.targets):
        for field in dataclasses.fields(part):
            tensor = getattr(part, field.name)
            if tensor is not None:
                rows = expected.view(-1, *[1] * (tensor.ndim - 1)).to(tensor.dtype)
                assert torch.equal(tensor, rows.expand(tensor.shape))
