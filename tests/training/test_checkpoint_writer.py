import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gesso.errors import RunError
from gesso.training import checkpoint as checkpoints
from gesso.training.checkpoint import newest_checkpoint, take_snapshot
from gesso.training.checkpoint_writer import CheckpointWriter
from gesso.training.loop import run_stage
from tests.training.helpers import Recorder, batches, everything, new_stage, restore, save, state_of, tiny_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def stage():
    """Two steps into a stage."""
    made = new_stage(tiny_config())
    run_stage(made, batches(0), Recorder(stop_after=2).callbacks())
    made.stopped = False
    return made


class Gate:
    """Holds the thread that writes until ``open``."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.entered = threading.Event()
        self.open = self._event.set

    def __call__(self) -> None:
        self.entered.set()
        assert self._event.wait(30)


@pytest.fixture
def gate():
    made = Gate()
    yield made
    made.open()


def snapshot(stage, folder, **options):
    return take_snapshot(folder, state_of(stage, **options), stage.module, stage.optimizer, stage.ema)


def test_training_goes_on_and_what_is_written_is_the_past(stage, tmp_path, gate):
    writer = CheckpointWriter(tmp_path / "meanwhile", first=gate)
    save(stage, tmp_path / "at once")
    writer.begin(snapshot(stage, tmp_path / "meanwhile"), keep=3)
    before = everything(stage)
    run_stage(stage, batches(stage.sample), Recorder(stop_after=3).callbacks())
    assert writer.busy and newest_checkpoint(tmp_path / "meanwhile") is None
    assert not any(
        torch.equal(value, before[name])
        for name, value in everything(stage).items()
        if "weight" in name and "unused" not in name and "frozen" not in name
    )
    gate.open()
    found = writer.result()
    assert found is not None and found == newest_checkpoint(tmp_path / "meanwhile")
    assert not writer.busy and not writer.open and writer.result() is None
    for name in ("model.safetensors", "ema.safetensors", "optimizer.pt", "state.json"):
        assert (found.path / name).read_bytes() == (tmp_path / "at once" / "00000002" / name).read_bytes()
    again = new_stage(tiny_config(), init=9)
    restore(found, again)
    assert all(torch.equal(value, before[name]) for name, value in everything(again).items())


def test_one_at_a_time(stage, tmp_path, gate):
    writer = CheckpointWriter(tmp_path, first=gate)
    writer.begin(snapshot(stage, tmp_path), keep=3)
    with pytest.raises(AssertionError, match="not settled"):
        writer.begin(snapshot(stage, tmp_path), keep=3)
    gate.open()
    writer.close()


def test_a_failed_write_is_raised_by_result_once_and_the_next_one_is_tried(stage, tmp_path):
    writer = CheckpointWriter(tmp_path)
    (tmp_path / "00000002").mkdir()
    (tmp_path / "latest.json").mkdir()  # cannot be replaced by a file
    writer.begin(snapshot(stage, tmp_path), keep=3)
    with pytest.raises(RunError, match="cannot be written"):
        writer.result()
    assert writer.result() is None
    (tmp_path / "latest.json").rmdir()
    writer.begin(snapshot(stage, tmp_path), keep=3)
    assert writer.result() is not None


def test_what_comes_first_fails_the_write(stage, tmp_path):
    def refuse() -> None:
        raise RunError("the rows cannot be flushed")

    writer = CheckpointWriter(tmp_path, first=refuse)
    writer.begin(snapshot(stage, tmp_path), keep=3)
    with pytest.raises(RunError, match="the rows"):
        writer.result()
    assert newest_checkpoint(tmp_path) is None


def test_old_ones_are_removed_by_the_thread(stage, tmp_path):
    writer = CheckpointWriter(tmp_path)
    for step in (1, 2, 3, 4):
        stage.step = step
        writer.begin(snapshot(stage, tmp_path, best=2 if step > 1 else None), keep=1)
        writer.result()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["00000002", "00000004"]


def test_an_interrupted_wait_loses_nothing(stage, tmp_path, gate, monkeypatch):
    """Ctrl-C while the last checkpoint is waited for: it becomes whole, and its result can be asked for again."""
    writer = CheckpointWriter(tmp_path, first=gate)
    writer.begin(snapshot(stage, tmp_path), keep=3)
    with monkeypatch.context() as patch:

        def interrupt(_):
            raise KeyboardInterrupt

        patch.setattr("gesso.training.checkpoint_writer.futures.wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            writer.result()
    assert newest_checkpoint(tmp_path) is None
    gate.open()
    writer.close()
    assert writer.result() == newest_checkpoint(tmp_path) is not None


END = """
import sys, time
from pathlib import Path
from gesso.training.checkpoint_writer import CheckpointWriter
from tests.training.helpers import new_stage, state_of, tiny_config
from gesso.training.checkpoint import take_snapshot
folder, how = Path(sys.argv[1]), sys.argv[2]
stage = new_stage(tiny_config())
writer = CheckpointWriter(folder, first=lambda: time.sleep(1))
writer.begin(take_snapshot(folder, state_of(stage), stage.module, stage.optimizer, stage.ema), keep=3)
if how == "interrupted":
    raise KeyboardInterrupt
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ended", "interrupted"])
def test_the_end_of_the_process_waits_for_the_write(tmp_path, how):
    done = subprocess.run(
        [sys.executable, "-c", END, str(tmp_path), how], cwd=ROOT, timeout=120, check=False, stderr=subprocess.DEVNULL
    )
    assert (done.returncode == 0) == (how == "ended")
    assert newest_checkpoint(tmp_path) is not None


def test_precise_statistics_stand_in_a_file_of_their_own(stage, tmp_path):
    precise = {"backbone.1.running_mean": torch.full((4,), 0.5), "backbone.1.running_var": torch.full((4,), 2.0)}
    found = checkpoints.save_checkpoint(
        tmp_path, state_of(stage), stage.module, stage.optimizer, stage.ema, keep=3, precise=precise
    )
    assert load_file(found.path / "precise_bn.safetensors").keys() == precise.keys()
    weights, own = found.weights(), load_file(found.path / "model.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in precise.items())
    assert torch.equal(weights["head.weight"], stage.ema.average["head.weight"])
    assert all(torch.equal(own[name], value) for name, value in stage.module.state_dict().items())
    assert all(torch.equal(found.precise_statistics()[name], value) for name, value in precise.items())
    (found.path / "precise_bn.safetensors").unlink()
    assert newest_checkpoint(tmp_path) is None, "it is one of the files that make the checkpoint whole"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_copy_from_a_gpu_does_not_wait_for_it(stage, tmp_path):
    module = stage.module.cuda()
    large = torch.randn(8192, 8192, device="cuda")
    snapshot = take_snapshot(tmp_path, state_of(stage), module, stage.optimizer, None)  # makes the pinned memory
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(50):
        large @ large
    snapshot = take_snapshot(tmp_path, state_of(stage), module, stage.optimizer, None)
    held = time.perf_counter() - began
    with torch.no_grad():
        module.head.weight.zero_()
    torch.cuda.synchronize()
    assert held < (time.perf_counter() - began) / 2
    found = checkpoints.write_snapshot(tmp_path, snapshot, keep=1)
    assert found.weights()["head.weight"].abs().sum() > 0
