"""The watchdog in one process, with waits that are made up; real hangs are in tests/distributed/test_watchdog.py."""

import threading
import time

import numpy as np
import pytest

from gesso import distributed
from gesso.errors import ConfigError, GessoError, ProcessLost
from gesso.training.watchdog import Watchdog

CLOSED = "[pair.cc:561] Connection closed by peer [127.0.0.1]:11164. This is typically caused by a remote worker"


class Ended(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def two_processes(monkeypatch):
    """What a watchdog sees in process 1 of 2, and how it ended the process."""
    codes = []

    def end(code):
        codes.append(code)
        raise Ended  # os._exit does not come back

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr("os._exit", end)
    monkeypatch.setattr(threading, "excepthook", lambda raised: None)
    return codes


def test_a_long_wait_is_told_in_one_line_and_ends_the_process(two_processes, caplog):
    with Watchdog(0.3) as dog:
        dog.beat(812, np.array([17, 39, 2**40]))
        with distributed.waiting("counts of samples"):
            time.sleep(0.8)
    (record,) = caplog.records
    assert record.levelname == "ERROR" and two_processes == [75]
    said = record.getMessage()
    assert said.startswith("rank 1 has waited 0 s in 'counts of samples' at step 812, its batch has the image ids 17, ")
    assert "39, 1099511627776; another process may hang" in said and "\n" not in said


def test_a_wait_before_the_first_step_and_a_large_batch(two_processes, caplog):
    with Watchdog(0.2), distributed.waiting("work of process 0"):
        time.sleep(0.6)
    with Watchdog(0.2) as dog:
        dog.beat(3, np.arange(100))
        with distributed.waiting("gradients"):
            time.sleep(0.6)
    first, second = (record.getMessage() for record in caplog.records)
    assert "in 'work of process 0' before its first step; another" in first
    assert "62, 63 and 36 more;" in second


def test_work_without_a_wait_and_many_short_waits_are_no_hang(two_processes, caplog):
    with Watchdog(0.3) as dog:
        dog.beat(1, np.array([1]))
        time.sleep(0.7)
        for _ in range(40):
            with distributed.waiting("batch norm"):
                time.sleep(0.02)
    assert not caplog.records and not two_processes


def test_the_outer_wait_goes_on_where_an_inner_one_ends(two_processes, caplog):
    """The backward pass as a whole, with the collectives of batch norm inside it."""
    before = distributed.traffic.seconds
    with Watchdog(0.4), distributed.waiting("gradients", counted=False):
        with distributed.waiting("batch norm"):
            time.sleep(0.1)
        time.sleep(0.9)
    assert "in 'gradients'" in caplog.records[0].getMessage()
    assert distributed.traffic.current is None and 0.1 <= distributed.traffic.seconds - before < 0.2


def test_a_lost_process_is_told_with_rank_step_and_collective(two_processes):
    with (
        pytest.raises(ProcessLost, match=r"rank 1 noticed at step 5 in 'batch norm'\)\. .*--resume") as caught,
        Watchdog(60) as dog,
    ):
        dog.beat(5, np.array([1]))
        with distributed.waiting("gradients"), distributed.waiting("batch norm"):
            raise RuntimeError(CLOSED)
    assert caught.value.exit_code == 75 and isinstance(caught.value, GessoError)


def test_other_exceptions_stay_what_they_are(two_processes):
    for error in (ValueError("timed out"), RuntimeError("mat1 and mat2 shapes cannot be multiplied")):
        with pytest.raises(type(error), match=str(error)), Watchdog(60):
            raise error


def test_one_process_is_not_watched(caplog):
    with pytest.raises(RuntimeError, match="closed by peer"), Watchdog(0.1), distributed.waiting("the device"):
        assert not [thread for thread in threading.enumerate() if thread.name == "watchdog"]
        time.sleep(0.4)
        raise RuntimeError(CLOSED)
    assert not caplog.records


@pytest.mark.parametrize(
    "text",
    [
        CLOSED,
        "[unbound_buffer.cc:78] Timed out waiting 4000ms for recv operation to complete",
        "Timed out after 3 seconds waiting for clients. 1/2 clients joined.",
        "NCCL communicator was aborted on rank 0.",
        "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
    ],
)
def test_what_torch_says_of_a_lost_process(text):
    assert distributed.lost(RuntimeError(text)) and not distributed.lost(ValueError(text))


def test_a_time_out_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="above 0 seconds, found 0"):
        Watchdog(0)
