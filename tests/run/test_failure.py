"""A step that was not finite is kept with its batch, and with the weights from before it."""

import dataclasses
import resource

import pytest
import torch

from gesso.errors import InputError, TrainingError
from gesso.run.failure import read_failure, save_failure
from gesso.run.folder import RunFolder
from gesso.run.train import train
from tests.run.helpers import StopAfter, rows, tiny_run, two_stages
from tests.run.poison import Poison


def same(a, b):
    """Whether two batches or targets are equal bit for bit, in types too."""
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a)]
    return all(one is two is None or (one.dtype == two.dtype and torch.equal(one, two)) for one, two in pairs)


SHORT = {"steps": 6, "batch_size": 4, "checkpoint_every": 9, "evaluate_every": 9}


def test_what_is_kept(data, tmp_path, monkeypatch):
    """The step, its batch, and the state from before it, though one more step ran until the host knew."""
    poison, out = Poison(monkeypatch, 3), tmp_path / "r"
    with pytest.raises(TrainingError, match=r"step 3: ") as caught:
        train(tiny_run(data, **SHORT), out)
    file = out / "failures" / "00000003.pt"
    assert str(caught.value).endswith(f" It is kept: repeat it with gesso debug replay {file}")
    kept = read_failure(file)
    assert (kept.stage, kept.step, kept.stage_step, kept.world_size) == ("training", 3, 3, 1)
    assert (kept.seed, kept.device) == (poison.stages[0].seed, "cpu")
    assert poison.count == 4 and len(poison.batches) == 4
    assert same(kept.batch, poison.batches[3][0]) and same(kept.targets, poison.batches[3][1])
    assert not same(kept.batch, poison.batches[4][0])
    assert kept.weights.keys() == poison.before.keys()
    for name, value in poison.before.items():
        torch.testing.assert_close(kept.weights[name], value, rtol=0, atol=0, equal_nan=True)
    assert [path.name for path in file.parent.iterdir()] == ["00000003.pt"]
    assert [row["step"] for row in rows(out)] == [1, 2]


def test_the_first_step_of_a_new_run_is_kept_too(data, tmp_path, monkeypatch):
    """A run that fails before its first step leaves no folder; this one has something to look at."""
    Poison(monkeypatch, 1)
    with pytest.raises(TrainingError, match="00000001"):
        train(tiny_run(data, **SHORT), tmp_path / "r")
    assert read_failure(tmp_path / "r" / "failures" / "00000001.pt").step == 1


def test_steps_count_over_all_stages_and_the_last_failure_alone_is_kept(data, tmp_path, monkeypatch):
    config, out = two_stages(data), tmp_path / "r"
    Poison(monkeypatch, 2)
    with pytest.raises(TrainingError, match=r"step 2: .*00000002\.pt"):
        train(config, out)
    assert read_failure(out / "failures" / "00000002.pt").stage == "pretraining"
    monkeypatch.undo()
    Poison(monkeypatch, 5)
    with pytest.raises(TrainingError, match=r"step 2: .*00000005\.pt"):
        train(config, out, resume=True)
    assert [path.name for path in (out / "failures").iterdir()] == ["00000005.pt"]
    kept = read_failure(out / "failures" / "00000005.pt")
    assert (kept.stage, kept.step, kept.stage_step) == ("training", 5, 2)


def test_after_a_failure_a_run_goes_on_from_its_checkpoint(data, straight, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        Poison(patch, 4)
        with pytest.raises(TrainingError):
            train(tiny_run(data, **SHORT | {"steps": 4, "checkpoint_every": 2, "evaluate_every": 4}), tmp_path / "r")
    train(
        tiny_run(data, **SHORT | {"steps": 4, "checkpoint_every": 2, "evaluate_every": 4}), tmp_path / "r", resume=True
    )
    assert rows(tmp_path / "r") == rows(straight)


def test_a_full_disk_does_not_hide_the_error(data, tmp_path, monkeypatch, caplog):
    """The real refusal of the system: no file may grow over 100 kB."""
    out, limit = tmp_path / "r", resource.getrlimit(resource.RLIMIT_FSIZE)
    poison = Poison(monkeypatch, 3)

    def cramped(*given):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
        try:
            return save_failure(*given)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    monkeypatch.setattr("gesso.run.session.save_failure", cramped)
    with pytest.raises(TrainingError, match=r"step 3: .*clip gradients \(clip_norm\)\.$"):
        train(tiny_run(data, **SHORT), out)
    assert "could not be kept" in caplog.text and "could not be kept" in (out / "log.txt").read_text()
    assert not (out / "failures").exists() and poison.count == 4


def test_a_folder_that_takes_no_file_does_not_hide_the_error(data, tmp_path, monkeypatch, caplog):
    Poison(monkeypatch, 3)
    observer = StopAfter(then=lambda count: (tmp_path / "r" / "failures").write_text("in the way") if count == 1 else 0)
    with pytest.raises(TrainingError, match=r"clip_norm\)\.$"):
        train(tiny_run(data, **SHORT), tmp_path / "r", observer=observer)
    assert "could not be kept" in caplog.text


@pytest.fixture
def kept(data, tmp_path, monkeypatch):
    """The file of a failed step."""
    Poison(monkeypatch, 2)
    with pytest.raises(TrainingError):
        train(tiny_run(data, **SHORT | {"steps": 2}), tmp_path / "kept")
    return tmp_path / "kept" / "failures" / "00000002.pt"


def test_files_that_are_none(kept, tmp_path):
    file = tmp_path / "file.pt"
    with pytest.raises(InputError, match=r"file\.pt: No such file or directory\. Check the path\."):
        read_failure(file)
    with pytest.raises(InputError, match="Is a directory"):
        read_failure(tmp_path)
    whole = kept.read_bytes()
    for content in (b"", b"no archive at all", whole[:-1000], whole[: len(whole) // 2], whole[:5000]):
        file.write_bytes(content)
        with pytest.raises(InputError, match="not the file of a failed step, or it is broken"):
            read_failure(file)
    stored = torch.load(kept, weights_only=True)
    lacking = {key: value for key, value in stored.items() if key != "targets"}
    for value in ({"weight": torch.ones(1)}, torch.ones(3), {"format_version": 1}, lacking, stored | {"extra": 1}):
        torch.save(value, file)
        with pytest.raises(InputError, match="not the file of a failed step, or it is broken"):
            read_failure(file)
    torch.save(stored | {"format_version": 2}, file)
    with pytest.raises(InputError, match=r"version 2 of its format.*Gesso that wrote it"):
        read_failure(file)


def test_a_file_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"format_version": 1, "stage": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match="not the file"):
        read_failure(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_paths_are_quoted_for_the_shell(kept, tmp_path, data):
    folder = RunFolder(tmp_path / "two words")
    (tmp_path / "kept").rename(folder.path)
    failure = read_failure(folder.path / "failures" / kept.name)
    stage = type("Stage", (), {"seed": 0, "device": torch.device("cpu"), "module": torch.nn.Linear(1, 1)})()
    said = save_failure(folder, "training", stage, 7, failure.batch, failure.targets)
    assert said.endswith(f"gesso debug replay '{folder.path}/failures/00000007.pt'")
    assert same(read_failure(folder.path / "failures" / "00000007.pt").batch, failure.batch)
