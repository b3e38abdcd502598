"""``gesso debug replay``: text, JSON and exit codes of a run that really failed."""

import shutil

import pytest
import torch

from gesso.errors import TrainingError
from gesso.run.failure import save_failure
from gesso.run.folder import RunFolder
from gesso.run.train import train
from gesso.training.step import train_step
from tests.run.helpers import tiny_run
from tests.run.poison import LAYER, Poison

SHORT = {"steps": 3, "batch_size": 4, "checkpoint_every": 9, "evaluate_every": 9}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The file of a step that failed."""
    out = tmp_path_factory.mktemp("failed") / "r"
    with pytest.MonkeyPatch.context() as patch:
        Poison(patch, 2)
        with pytest.raises(TrainingError):
            train(tiny_run(None, val=False, **SHORT), out)
    return out / "failures" / "00000002.pt"


@pytest.fixture(scope="module")
def finite(tmp_path_factory):
    """The file of a step that did not fail."""
    out = tmp_path_factory.mktemp("finite") / "r"

    def keeping(stage, *part, **options):
        if stage.step == 1:
            save_failure(RunFolder(out), "training", stage, 2, *part)
        return train_step(stage, *part, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gesso.training.loop.train_step", keeping)
        train(tiny_run(None, val=False, **SHORT | {"steps": 2}), out)
    return out / "failures" / "00000002.pt"


def test_the_module_is_named(gesso, kept):
    lines = gesso("debug", "replay", kept, "--device", "cpu").out.splitlines()
    assert lines[0] == "step 2 (training 2), 4 pictures; repeated in one process on cpu"
    assert lines[1].startswith("loss nan, ") and "gradient_norm" not in lines[1]
    assert f"The first module with a number that is not finite: {LAYER} (Conv2d)" in lines
    assert any(line.startswith("  its output: ") and line.endswith("values are not finite") for line in lines)
    assert "  pictures: all" in lines and f"not finite among the weights: {LAYER}.weight" in lines
    assert any(line.startswith("the largest weight: ") for line in lines)


def test_json(gesso, kept):
    found = gesso.json("debug", "replay", kept)
    assert found["repeated"] is True and found["losses"]["loss"] == "nan" and found["gradient_norm"] is None
    finding = found["finding"]
    assert (finding["module"], finding["kind"], finding["what"]) == (LAYER, "Conv2d", "its output")
    assert finding["bad"] == finding["values"] and finding["input_range"][0] < finding["input_range"][1]
    assert [picture["place"] for picture in found["bad_pictures"]] == [0, 1, 2, 3]
    assert all(picture["name"] for picture in found["bad_pictures"])


def test_what_is_finite_this_time(gesso, finite):
    shown = gesso("debug", "replay", finite, code=1).out
    assert "This time everything is finite." in shown and "gradient_norm" in shown
    found = gesso.json("debug", "replay", finite, code=1)
    assert found["repeated"] is False and found["finding"] is None and isinstance(found["losses"]["loss"], float)


def test_the_printed_command_is_the_one_that_works(gesso, kept, tmp_path):
    """In a folder whose name has a blank, too."""
    shutil.copytree(kept.parents[1], tmp_path / "two words")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert LAYER in gesso("debug", "replay", "two words/failures/00000002.pt").out


def test_mistakes_are_one_line(gesso, kept, tmp_path):
    assert gesso.mistake("debug", "replay", tmp_path / "no.pt").endswith(
        "no.pt: No such file or directory. Check the path."
    )
    assert "Is a directory" in gesso.mistake("debug", "replay", tmp_path)
    broken = tmp_path / "broken.pt"
    broken.write_bytes(kept.read_bytes()[:5000])
    assert "not the file of a failed step, or it is broken" in gesso.mistake("debug", "replay", broken)
    torch.save({"weight": torch.ones(2)}, broken)
    assert "not the file of a failed step" in gesso.mistake("debug", "replay", broken)
    moved = tmp_path / "moved.pt"
    moved.write_bytes(kept.read_bytes())
    assert "lies in no run's folder" in gesso.mistake("debug", "replay", moved)
    assert "needs PATH: RUN/failures/STEP.pt" in gesso.mistake("debug", "replay")
    assert "cannot be 'tpu'" in gesso.mistake("debug", "replay", kept, "--device", "tpu")
    if not torch.cuda.is_available():
        assert "torch finds no GPU" in gesso.mistake("debug", "replay", kept, "--device", "cuda")


def test_the_group_has_its_help(gesso):
    assert gesso("debug", "--help").out == "usage: gesso debug replay ... [--help]\n"
    assert "Exit code 0" in gesso("debug", "replay", "--help").out
