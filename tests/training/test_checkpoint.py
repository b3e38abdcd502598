import json
import resource
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gesso.errors import RunError
from gesso.training.checkpoint import best_checkpoint, newest_checkpoint, read_checkpoint
from gesso.training.loop import run_stage
from gesso.training.optimizer import AdamW
from tests.training.helpers import Recorder, batches, new_stage, restore, save, tiny_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def stage():
    """Two steps into a stage."""
    made = new_stage(tiny_config())
    run_stage(made, batches(0), Recorder(stop_after=2).callbacks())
    return made


def save_at(stage, folder, step, **options):
    stage.step = step
    return save(stage, folder, **options)


def steps(folder):
    """What stands in the folder, temporary things included."""
    return sorted(int(path.name) if path.name.isdigit() else path.name for path in folder.iterdir() if path.is_dir())


def flip_byte(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_folder_holds_what_the_contract_says(stage, tmp_path):
    found = save(stage, tmp_path, best=2)
    assert {path.name for path in found.path.iterdir()} == {
        *("model.safetensors", "ema.safetensors", "optimizer.pt", "state.json"),
    }
    head = json.loads((tmp_path / "00000002" / "state.json").read_text())
    assert (head["format_version"], head["step"], head["sample"], head["stage"]) == (1, 2, 8, "training")
    assert head["ema_updates"] == 2 and head["world_size"] == 1 and head["threads"] == torch.get_num_threads()
    assert set(head["sha256"]) == set(head["bytes"]) == {"model.safetensors", "ema.safetensors", "optimizer.pt"}
    assert json.loads((tmp_path / "latest.json").read_text()) == {"step": 2}
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 2
    again = read_checkpoint(found.path)
    assert again == found


def test_files_hold_the_state(stage, tmp_path):
    found = save(stage, tmp_path)
    weights = load_file(found.path / "model.safetensors")
    assert weights.keys() == stage.module.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in stage.module.state_dict().items())
    averages = found.weights()
    assert all(torch.equal(averages[name], value) for name, value in stage.ema.average.items())
    assert not torch.equal(averages["head.weight"], weights["head.weight"])


def test_without_averages_the_weights_are_the_models(tmp_path):
    stage = new_stage(tiny_config(ema_decay=None))
    found = save(stage, tmp_path)
    assert torch.equal(found.weights()["head.weight"], stage.module.head.weight)


def test_nothing_is_there_yet(tmp_path):
    assert newest_checkpoint(tmp_path / "no") is None
    assert best_checkpoint(tmp_path) is None


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "optimizer.pt", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_a_broken_checkpoint_is_passed_over_and_kept(stage, tmp_path, name, damage, caplog):
    save_at(stage, tmp_path, 4)
    broken = save_at(stage, tmp_path, 8).path / name
    if damage == "cut":
        broken.write_bytes(broken.read_bytes()[:-20])
    elif damage == "remove":
        broken.unlink()
    elif name == "state.json":
        broken.write_text(broken.read_text().replace('"model.safetensors": "', '"model.safetensors": "0'))
    else:
        flip_byte(broken)
    with caplog.at_level("WARNING", logger="gesso"):
        found = newest_checkpoint(tmp_path)
    assert found is not None and found.state.step == 4
    assert "00000008" in caplog.text and "passed over" in caplog.text
    assert steps(tmp_path) == [4, 8]


def test_another_format_version_is_passed_over(stage, tmp_path, caplog):
    save_at(stage, tmp_path, 4)
    file = save_at(stage, tmp_path, 8).path / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 2}))
    with caplog.at_level("WARNING", logger="gesso"):
        found = newest_checkpoint(tmp_path)
    assert found is not None and found.state.step == 4
    assert "format version 2" in caplog.text


def test_old_whole_ones_go_and_the_best_stays(stage, tmp_path):
    for step in (1, 2, 3, 4, 5):
        save_at(stage, tmp_path, step, keep=2, best=2 if step >= 2 else None)
    assert steps(tmp_path) == [2, 4, 5]
    found = best_checkpoint(tmp_path)
    assert found is not None and found.state.step == 2


def test_broken_ones_are_neither_counted_nor_removed(stage, tmp_path):
    """After a flipped byte at 12 the run goes on from 8: saving 10 must not cost 10 or 8."""
    for step in (4, 8, 12):
        save_at(stage, tmp_path, step)
    flip_byte(tmp_path / "00000012" / "model.safetensors")
    (tmp_path / "00000008" / "optimizer.pt").write_bytes(b"cut off")
    save_at(stage, tmp_path, 10, keep=2)
    assert steps(tmp_path) == [4, 8, 10, 12]
    found = newest_checkpoint(tmp_path)
    assert found is not None and found.state.step == 10
    save_at(stage, tmp_path, 12, keep=2)  # the broken one is written anew
    found = newest_checkpoint(tmp_path)
    assert found is not None and found.state.step == 12
    assert steps(tmp_path) == [8, 10, 12]


@pytest.mark.parametrize("hint", [None, "", "{", "[]", '{"step": "x"}', '{"step": 99}', '{"step": 8}'])
def test_hints_do_not_decide(stage, tmp_path, hint):
    save_at(stage, tmp_path, 4, best=4)
    save_at(stage, tmp_path, 8, best=4)
    (tmp_path / "latest.json").write_text('{"step": 99}')
    if hint is None:
        (tmp_path / "best.json").unlink()
    else:
        (tmp_path / "best.json").write_text(hint)
    newest, best = newest_checkpoint(tmp_path), best_checkpoint(tmp_path)
    assert newest is not None and newest.state.step == 8
    assert best is not None and best.state.step == 4


def test_a_broken_best_gives_the_newest(stage, tmp_path):
    save_at(stage, tmp_path, 4, best=4)
    save_at(stage, tmp_path, 8, best=4)
    found = best_checkpoint(tmp_path)
    assert found is not None and found.state.step == 4
    flip_byte(tmp_path / "00000004" / "ema.safetensors")
    found = best_checkpoint(tmp_path)
    assert found is not None and found.state.step == 8


def test_too_little_space_is_seen_before_writing(stage, tmp_path, monkeypatch):
    save_at(stage, tmp_path, 4)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 30, 1 << 30, 1 << 19))
    with pytest.raises(RunError, match=r"0 MiB free, a checkpoint needs 1 MiB") as raised:
        save_at(stage, tmp_path, 8)
    assert str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)
    assert steps(tmp_path) == [4]


@pytest.mark.parametrize("limit", [100, 2_000])
def test_a_write_that_fails_midway_leaves_nothing_behind(stage, tmp_path, limit):
    """A real failing write: files may not grow beyond a limit, which hits another file of the checkpoint each time."""
    before = save_at(stage, tmp_path, 4)
    sizes = json.loads((before.path / "state.json").read_text())["bytes"]
    assert 100 < sizes["model.safetensors"] < 2_000 < sizes["optimizer.pt"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(RunError, match=r"a checkpoint of 1 MiB cannot be written: .") as raised:
            save_at(stage, tmp_path, 8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert "\n" not in str(raised.value) and "00000008" in str(raised.value)
    assert steps(tmp_path) == [4]
    found = newest_checkpoint(tmp_path)
    assert found == before


KILLED = """
import sys, time, torch
from pathlib import Path
from torch import nn
from gesso.training import checkpoint
from gesso.training.checkpoint import CheckpointState, save_checkpoint
from gesso.training.optimizer import SGD, build_optimizer
module = nn.Linear(4, 4)
optimizer = build_optimizer(module, SGD())
def save(step):
    state = CheckpointState(step=step, stage="training", stage_step=step, sample=0, seconds=0.0, world_size=1,
                            threads=1, config_hash="")
    save_checkpoint(Path(sys.argv[1]), state, module, optimizer, None, keep=3)
def half(value, file):
    file.write_bytes(b"half an optimizer")
    print("writing", flush=True)
    time.sleep(120)
save(4)
checkpoint.torch.save = half
save(8)
"""


@pytest.mark.slow
def test_a_kill_in_the_middle_of_writing_costs_nothing(stage, tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    leftover = tmp_path / f".00000008.{process.pid}.tmp"
    assert (leftover / "model.safetensors").exists() and not (tmp_path / "00000008").exists()
    found = newest_checkpoint(tmp_path)
    assert found is not None and found.state.step == 4
    assert leftover.exists()  # reading removes nothing
    save_at(stage, tmp_path, 8)
    assert steps(tmp_path) == [4, 8]


def test_optimizer_file_is_read_without_unpickling(stage, tmp_path):
    found = save(stage, tmp_path)

    class Evil:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    torch.save({"state": Evil()}, found.path / "optimizer.pt")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        found.load_optimizer(stage.optimizer)


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"optimizer": AdamW()}, "optimizer state"),
        ({"precision": "float64", "ema_decay": None}, None),
    ],
)
def test_what_does_not_fit_is_said(stage, tmp_path, other, what):
    found = save(stage, tmp_path)
    if what is None:
        found.load_model(new_stage(tiny_config(**other)).module)  # another precision fits
        wrong = torch.nn.Linear(2, 2)
        with pytest.raises(RunError, match="its weights do not fit: "):
            found.load_model(wrong)
        return
    with pytest.raises(RunError, match=f"its {what} do not fit|its {what}"):
        restore(found, new_stage(tiny_config(**other)))
