"""Faults under torchrun: a process is killed, a machine goes, a number does not fit; nothing is lost and all goes on.

The instants are drawn from a seed. ``GESSO_FAULT_RUNS=20 pytest -m slow tests/distributed/test_elastic.py`` runs each
test that kills at twenty of them.
"""

import os
import random
import re
import shutil
import signal
import time

import pytest

from tests.distributed.launched import GESSO, TORCHRUN, launching, steps_of, training_rows, weights
from tests.distributed.processes import free_port
from tests.run.helpers import differences

SEEDS = range(int(os.environ.get("GESSO_FAULT_RUNS", "1")))
TINY = ("train", "debug:tiny", "--training.precision", "float64")
STANDALONE = (*TORCHRUN, "--standalone", "--nproc-per-node")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run of four processes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with launching(folder / "said") as begin:
        call = begin(*STANDALONE, 4, *GESSO, *TINY, "--out", folder / "run")
        assert call.wait() == 0, call.err
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_a_killed_process_costs_no_bit(undisturbed, tmp_path, seed):
    """At a random step, before the first checkpoint or after it; torchrun starts all four again, without --resume."""
    chance, out = random.Random(seed), tmp_path / "run"
    step, rank = chance.randrange(12), chance.randrange(4)
    with launching(tmp_path / "said") as begin:
        call = begin(*STANDALONE, 4, "--max-restarts", 2, *GESSO, *TINY, "--out", out)
        call.until(lambda: (out / "config.json").exists() and max(steps_of(out), default=0) >= step)
        time.sleep(chance.uniform(0, 0.5))
        os.kill(call.workers()[rank], signal.SIGKILL)
        assert call.wait() == 0, call.err
    assert "torchrun started the processes again: going on with this run" in call.err
    assert weights(out) == weights(undisturbed)
    assert differences(undisturbed, out) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_the_run_goes_on_at_half_the_size_when_a_machine_goes(undisturbed, tmp_path, seed):
    """Two torchruns with two processes each, as on two machines; one is killed with all that it started."""
    out, port = tmp_path / "run", free_port()
    step = random.Random(seed).randrange(4, 10)
    with launching(tmp_path / "said") as begin:
        first, second = (_machine(begin, port, out, host) for host in (True, False))
        second.until(lambda: second.world_size() == 4 and max(steps_of(out), default=0) >= step)
        second.kill()
        assert first.wait() == 0, first.err
    last = (out / "log.txt").read_text().split("torchrun started the processes again")[-1]
    assert "world_size was 4, is 2" in last
    assert re.search(r"going on from step [48]\n", last), "from the last checkpoint"
    rows = training_rows(out)
    assert [row["step"] for row in rows] == list(range(1, 13))
    for row, other in zip(rows, training_rows(undisturbed), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-6)


def _machine(begin, port, out, host):
    conf = f"is_host={int(host)},last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=2"
    meeting = (
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        f"127.0.0.1:{port}",
        "--rdzv-id",
        "job",
        "--rdzv-conf",
        conf,
    )
    size = ("--nnodes", "1:2", "--nproc-per-node", 2, "--max-restarts", 2)
    return begin(*TORCHRUN, *size, *meeting, *GESSO, *TINY, "--out", out)


@pytest.mark.slow
def test_a_stop_that_one_process_was_asked_for_is_no_failure(tmp_path):
    """SIGTERM to a worker, of which torchrun knows nothing: all save, and it does not start them again."""
    out = tmp_path / "run"
    with launching(tmp_path / "said") as begin:
        call = begin(*STANDALONE, 2, "--max-restarts", 2, *GESSO, *TINY, "--out", out)
        call.until(lambda: len(steps_of(out)) > 1)
        os.kill(call.workers()[1], signal.SIGTERM)
        assert call.wait() != 0
    reached = max(steps_of(out))
    assert f"interrupted at step {reached}; everything up to it is saved" in call.err
    assert "going on" not in call.err and (out / "checkpoints" / f"{reached:08d}").is_dir()
    assert reached < 12 and "torchrun --nproc-per-node 2 -m gesso train" in call.err


@pytest.mark.slow
def test_a_size_that_does_not_fit_names_those_that_do(undisturbed, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with launching(tmp_path / "said") as begin:
        call = begin(*STANDALONE, 3, *GESSO, *TINY, "--out", out, "--resume")
        assert call.wait() != 0  # torchrun's own
    assert set(re.findall(r"exitcode +: (\d+)", call.err)) == {"2"}
    told = [line for line in call.err.splitlines() if line.startswith("gesso: ")]
    assert len(told) == 1 and "cannot be divided among 3 processes. Start 1, 2, 4, 8 processes" in told[0]
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
