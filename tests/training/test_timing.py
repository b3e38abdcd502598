import time

import pytest
import torch

from gesso import distributed
from gesso.training.loop import run_stage
from gesso.training.timing import PHASES, Marks, RowMeter
from tests.distributed.processes import run
from tests.training.helpers import CPU, Recorder, batches, new_stage, tiny_config


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(distributed.traffic, "seconds", 7.0)
        monkeypatch.setattr(distributed.traffic, "last_bucket", 0.0)

    def work(self, seconds):
        self.now += seconds

    def wait(self, seconds):
        self.now += seconds
        distributed.traffic.seconds += seconds


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_phases_add_up_and_waiting_for_others_is_taken_out_of_them(clock):
    marks = Marks(CPU)
    clock.work(1)
    marks.mark("data")
    clock.work(0.5)
    marks.mark("")
    for _ in range(2):  # parts of a step
        clock.work(2)
        clock.wait(0.25)
        marks.mark("forward")
        clock.work(3)
        clock.wait(0.5)
        marks.mark("backward")
    clock.wait(0.75)
    marks.mark("communication")
    clock.work(4)
    marks.mark("optimizer")
    assert marks.seconds() == {"data": 1, "forward": 4, "backward": 6, "communication": 2.25, "optimizer": 4}


def test_what_follows_the_last_bucket_of_gradients_is_communication(clock):
    marks = Marks(CPU)
    clock.work(1)
    marks.mark("forward")
    clock.work(2)
    clock.wait(0.5)  # batch norm's
    distributed.traffic.last_bucket = clock.now
    clock.work(0.25)  # nothing counts it: the sum runs beside the backward pass
    marks.mark("backward")
    assert marks.seconds() == {"data": 0, "forward": 1, "backward": 2, "communication": 0.75, "optimizer": 0}


def test_a_bucket_of_an_earlier_step_counts_for_nothing(clock):
    distributed.traffic.last_bucket = clock.now - 1
    marks = Marks(CPU)
    marks.mark("forward")
    clock.work(2)
    marks.mark("backward")
    assert marks.seconds()["backward"] == 2


def test_a_row_says_means_and_begins_anew():
    meter = RowMeter()
    for step in (1, 2):
        meter.add({"loss": 3.0, "rpn_positive_ratio": 0.1 * step}, 2.0 * step, {"data": 1.0, "forward": 0.5 * step})
    row = meter.take(8, steps_left=10)
    expected = {
        "rpn_positive_ratio": 0.15,
        "images_per_second": 8 * 2 / 6,
        "images_per_second_per_gpu": 8 * 2 / 6,
        "step_seconds": 3.0,
        "eta_seconds": 30.0,
        "data_share": 2 / 6,
        "forward_share": 1.5 / 6,
    }
    assert row == pytest.approx({f"{phase}_share": 0.0 for phase in PHASES} | expected)
    assert meter == RowMeter()


def test_shares_never_pass_one():
    """On a GPU the phases of a step may take longer than the host's step."""
    meter = RowMeter()
    meter.add({}, 1.0, {"forward": 2.0, "backward": 2.0})
    row = meter.take(1, 0)
    assert sum(row[f"{phase}_share"] for phase in PHASES) == pytest.approx(1)


def _communicating(slow: bool) -> dict[str, float]:
    """Rows of one process of several; with ``slow``, process 1 comes late to every step."""
    stage, recorder = new_stage(tiny_config(steps=20, log_every=20, batch_size=8, ema_decay=None)), Recorder()
    stage.module.unused.requires_grad_(False)
    stream = batches(4 * distributed.rank())

    def late():
        for pair in stream:
            time.sleep(0.1 if slow and distributed.rank() == 1 else 0)
            yield pair

    run_stage(stage, late(), recorder.callbacks())
    assert distributed.traffic.last_bucket > 0
    return recorder.rows[-1][1]


def test_the_wait_for_a_slow_process_is_communication():
    fast, slow = run(_communicating, 2, True)
    assert fast["communication_share"] > 0.5 > fast["data_share"]
    assert slow["data_share"] > 0.5 > slow["communication_share"]
    for row in (fast, slow):
        assert row["images_per_second"] < 1.2 * 8 / 0.1  # the slowest counts; the fast one is a step ahead at most
        assert row["images_per_second_per_gpu"] == row["images_per_second"] / 2
        assert sum(row[f"{phase}_share"] for phase in PHASES) <= 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_events_measure_the_device_and_not_the_host():
    device = torch.device("cuda")
    large = torch.randn(4096, 4096, device=device)
    torch.cuda.synchronize()
    marks = Marks(device)
    began = time.perf_counter()
    for _ in range(200):
        large @ large
    launched = time.perf_counter() - began
    marks.mark("forward")
    torch.cuda.synchronize()
    took = time.perf_counter() - began
    assert marks.seconds()["forward"] == pytest.approx(took, rel=0.1) and launched < took / 2
