import subprocess
import sys

import pytest

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def read(folder):
    events = event_accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_rows_come_back(tmp_path):
    from gesso.reports.tensorboard import TensorBoardWriter

    with TensorBoardWriter(tmp_path) as writer:
        writer.add_row(1, {"step": 1, "loss": 2.5, "note": "text", "flag": True}, group="train")
        writer.add_row(2, {"step": 2, "loss": 2.0, "backward_share": 0.5, "eta_seconds": 9.0}, group="train")
        writer.add_row(2, {"AP": 0.25, "by_class": {"cat": 0.5}, "APl": None})
    assert read(tmp_path) == {
        "train/loss": [(1, 2.5), (2, 2.0)],
        "train/backward_share": [(2, 0.5)],
        "train/eta_seconds": [(2, 9.0)],
        "AP": [(2, 0.25)],
        "by_class/cat": [(2, 0.5)],
    }


def test_a_resume_replaces_what_it_writes_again(tmp_path):
    from gesso.reports.tensorboard import TensorBoardWriter

    with TensorBoardWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.add_row(step, {"loss": float(step)})
    with TensorBoardWriter(tmp_path, resumed_step=3) as writer:
        writer.add_row(3, {"loss": 30.0})
    assert read(tmp_path)["loss"] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_without_the_extra_the_remedy_is_named():
    code = (
        "import sys\nsys.modules['tensorboard'] = None\nfrom gesso.errors import ConfigError\n"
        "try:\n    import gesso.reports.tensorboard\nexcept ConfigError as e:\n    print(e)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "gesso[tensorboard]" in done.stdout
