import dataclasses
import json

import pytest

from gesso.errors import Interrupted
from gesso.run.cost import read_cost
from gesso.run.folder import RunFolder
from gesso.run.train import train
from tests.run.helpers import StopAfter, tiny_run, two_stages


def test_a_run_records_what_it_cost(data, tmp_path):
    config = two_stages(data)
    result = train(config, tmp_path / "r")
    cost = read_cost(RunFolder(tmp_path / "r"))
    rows = [row for row in RunFolder(tmp_path / "r").rows() if "loss" in row]
    assert cost.seconds == result.seconds == pytest.approx(rows[-1]["seconds"])
    assert cost.images == result.images == rows[-1]["images"]
    assert cost.device_days == pytest.approx(cost.seconds / 86400) and cost.unit == "CPU days"
    waited = sum(row["data_share"] * row["step_seconds"] for row in rows)  # every step has a row
    assert 0 < cost.data_seconds == pytest.approx(waited, rel=0.05) and cost.data_seconds < cost.seconds
    assert cost.evaluation_seconds > 0
    assert 0 < cost.work == cost.processor_seconds, "on a CPU runs share the processors"


def test_the_cost_goes_on_after_an_interruption(data, tmp_path):
    config = tiny_run(data, steps=4, batch_size=4, checkpoint_every=2, evaluate_every=2)
    with pytest.raises(Interrupted):
        train(config, tmp_path / "r", observer=StopAfter(2))
    before = read_cost(RunFolder(tmp_path / "r"))
    train(config, tmp_path / "r", resume=True)
    after = read_cost(RunFolder(tmp_path / "r"))
    assert before.images == 8 and after.images == 16
    for key in ("seconds", "data_seconds", "evaluation_seconds", "device_days"):
        assert getattr(after, key) > getattr(before, key) > 0


def test_a_checkpoint_from_before_costs_were_kept(data, tmp_path):
    config = tiny_run(data, steps=2, batch_size=4, checkpoint_every=1)
    with pytest.raises(Interrupted):
        train(config, tmp_path / "r", observer=StopAfter(1))
    state = next((tmp_path / "r" / "checkpoints").glob("*/state.json"))
    head = json.loads(state.read_text())
    del head["cost"]
    state.write_text(json.dumps(head))
    (tmp_path / "r" / "cost.json").unlink()
    assert read_cost(RunFolder(tmp_path / "r")) is None
    train(dataclasses.replace(config), tmp_path / "r", resume=True)
    cost = read_cost(RunFolder(tmp_path / "r"))
    assert cost.seconds > 86400 * cost.device_days > 0
