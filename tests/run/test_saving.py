import json
import threading

import pytest
import torch

from gesso import distributed
from gesso.errors import RunError
from gesso.run.folder import RunFolder
from gesso.run.saving import Saver
from gesso.training import checkpoint_writer
from gesso.training.checkpoint import best_checkpoint, newest_checkpoint, write_snapshot
from gesso.training.loop import run_stage
from tests.distributed.processes import run
from tests.training.helpers import Recorder, batches, new_stage, tiny_config


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(tmp_path / "run", {})


@pytest.fixture
def stage():
    made = new_stage(tiny_config(steps=9))
    run_stage(made, batches(0), Recorder(stop_after=2).callbacks())
    made.stopped = False
    return made


@pytest.fixture
def gate(monkeypatch):
    """Writes wait until it is set."""
    opened = threading.Event()

    def write(*given, **options):
        assert opened.wait(30)
        return write_snapshot(*given, **options)

    monkeypatch.setattr(checkpoint_writer, "write_snapshot", write)
    yield opened
    opened.set()


def fail(monkeypatch):
    def refuse(*given, **options):
        raise RunError("a checkpoint cannot be written: the disk is full")

    monkeypatch.setattr(checkpoint_writer, "write_snapshot", refuse)


def save(saver, stage, step, *, required=False):
    stage.step = step
    saver.save(stage, name="training", step=step, meter={}, precise={}, required=required)


def test_a_save_is_written_meanwhile_and_settled(folder, stage, gate):
    saver = Saver(folder, "hash")
    saver.scored(0.5, 2)
    save(saver, stage, 2)
    saver.poll()
    assert newest_checkpoint(folder.checkpoints) is None
    gate.set()
    saver.settle()
    found = newest_checkpoint(folder.checkpoints)
    assert found is not None and (found.state.step, found.state.best_step, found.state.best_score) == (2, 2, 0.5)
    assert found.state.config_hash == "hash"


def test_a_second_save_waits_and_says_that_the_disk_is_slow(folder, stage, gate, caplog):
    saver = Saver(folder, "")
    save(saver, stage, 2)
    threading.Timer(0.2, gate.set).start()
    with caplog.at_level("WARNING", logger="gesso"):
        save(saver, stage, 4)
    assert newest_checkpoint(folder.checkpoints).state.step >= 2
    assert "checkpoint of step 2 is still being written" in caplog.text and "checkpoint_every = 100" in caplog.text
    saver.close()
    assert newest_checkpoint(folder.checkpoints).state.step == 4


def test_a_failed_write_is_loud_and_costs_itself_alone(folder, stage, monkeypatch, caplog):
    saver = Saver(folder, "")
    saver.scored(0.2, 2)
    save(saver, stage, 2)
    saver.settle()
    with monkeypatch.context() as patch:
        fail(patch)
        saver.scored(0.9, 4)
        with caplog.at_level("ERROR", logger="gesso"):
            save(saver, stage, 4)
            while "no checkpoint at step 4: a checkpoint cannot be written" not in caplog.text:
                saver.poll()
    assert saver.best == (0.2, 2), "what cannot be loaded is not the best"
    saver.scored(0.5, 6)
    save(saver, stage, 6)
    saver.close()
    found = best_checkpoint(folder.checkpoints)
    assert found is not None and found.state.step == 6 and found.state.best_score == 0.5


def test_a_required_save_waits_and_raises(folder, stage, monkeypatch):
    saver = Saver(folder, "")
    save(saver, stage, 2, required=True)
    assert newest_checkpoint(folder.checkpoints) is not None
    fail(monkeypatch)
    with pytest.raises(RunError, match="the disk is full"):
        save(saver, stage, 4, required=True)


def test_a_failure_before_a_required_save_does_not_fail_it(folder, stage, monkeypatch, caplog):
    saver = Saver(folder, "")
    saver.scored(0.9, 2)
    with monkeypatch.context() as patch:
        fail(patch)
        save(saver, stage, 2)
        while saver._writer.busy:
            pass
    save(saver, stage, 4, required=True)
    assert "no checkpoint at step 2" in caplog.text
    assert json.loads((folder.checkpoints / "latest.json").read_text()) == {"step": 4}
    assert newest_checkpoint(folder.checkpoints).state.best_step is None


def test_the_end_of_a_stage_waits_and_goes_on(folder, stage, monkeypatch, caplog):
    """What follows forks loaders, which must not happen beside a thread that writes."""
    saver = Saver(folder, "")
    save(saver, stage, 9)
    assert not saver._writer.open and newest_checkpoint(folder.checkpoints) is not None
    fail(monkeypatch)
    save(saver, stage, 9)
    assert "no checkpoint at step 9" in caplog.text


def test_rows_are_on_the_disk_first(folder, stage, monkeypatch):
    order = []
    monkeypatch.setattr(RunFolder, "flush", lambda self: order.append(("rows", self.checkpoints.exists())))
    saver = Saver(folder, "")
    save(saver, stage, 2, required=True)
    assert order == [("rows", False)]


def _save(path, fails):
    torch.manual_seed(0)
    stage = new_stage(tiny_config(steps=9))
    saver = Saver(RunFolder(path), "")
    save(saver, stage, 2)
    if fails and distributed.is_main():
        saver._writer._first = lambda: (_ for _ in ()).throw(RunError("the disk is full", where=path))
    try:
        save(saver, stage, 4, required=True)
    except RunError as error:
        return str(error), error.told
    finally:
        saver.close()
    return saver._writer._thread._threads == set()


def test_process_0_writes_and_the_others_learn_what_failed(folder):
    main, other = run(_save, 2, folder.path, False)
    assert (main, other) == (False, True), "only process 0 has a thread"
    assert newest_checkpoint(folder.checkpoints).state.step == 4
    assert newest_checkpoint(folder.checkpoints).state.world_size == 2
    line = f"{folder.path}: the disk is full"
    assert run(_save, 2, folder.path, True) == [(line, False), (line, True)]
