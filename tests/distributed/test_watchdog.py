"""Hanging and lost processes, with real ones: who says what, and with which exit code they leave."""

import contextlib
import os
import re
import signal
import sys
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from gesso import distributed, log
from gesso.errors import ConfigError, GessoError, ProcessLost
from gesso.models.norm import NormPolicy, apply_norm_policy
from gesso.structures import map_tensors
from gesso.training.optimizer import SGD, build_optimizer
from gesso.training.schedule import ScheduleConfig
from gesso.training.stage import Stage, TrainingConfig
from gesso.training.step import train_step
from gesso.training.watchdog import Watchdog
from tests.distributed.processes import _CONTEXT, free_port
from tests.models.helpers import random_batch, tiny_detector

LIMIT = 3.0
LONG = 60.0
IDS = np.array([17, 39, 4, 2**40, 81, 6, 7, 8])


@dataclass(frozen=True)
class Left:
    """How a process left: its exit code, and what it wrote to standard error."""

    code: int | None
    said: str

    @property
    def lines(self) -> list[str]:
        """Those of the log and of the command line."""
        return [line for line in self.said.splitlines() if line.startswith("gesso: ") or line[2:3] == ":"]


def leave(function, world, folder, *args, only=None):
    """How each of ``world`` processes leaves ``function``; waits for those in ``only`` and kills the others."""
    port = free_port()
    files = [folder / f"stderr-{rank}" for rank in range(world)]
    processes = [
        _CONTEXT.Process(target=_child, args=(function, rank, world, port, files[rank], args)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    found = {}
    try:
        for rank in range(world) if only is None else only:
            processes[rank].join(timeout=100)
            found[rank] = Left(processes[rank].exitcode, files[rank].read_text())
    finally:
        for process in processes:
            process.kill()
            process.join()
    return found


def _child(function, rank, world, port, stderr, args):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    sys.stderr = stderr.open("w", buffering=1)
    os.dup2(sys.stderr.fileno(), 2)
    torch.set_num_threads(1)
    log.to_stderr()
    try:
        function(*args)
    except GessoError as error:  # as the command line does
        sys.stderr.write(f"gesso: {error}\n")
        sys.exit(error.exit_code)


def _stage(kind):
    torch.manual_seed(0)
    detector = tiny_detector("faster_rcnn")
    config = TrainingConfig(
        steps=12, batch_size=4, optimizer=SGD(rate=0.01), schedule=ScheduleConfig(warmup_steps=0), precision="float64"
    )
    apply_norm_policy(detector, NormPolicy(kind=kind), pictures=2)
    detector.double()
    cpu = torch.device("cpu")
    optimizer = build_optimizer(detector, config.optimizer)
    return Stage(config=config, module=detector, optimizer=optimizer, ema=None, device=cpu, seed=5)


def _part():
    """This process's two pictures of four."""
    batch, targets = random_batch(count=4)
    part = slice(2 * distributed.rank(), 2 * distributed.rank() + 2)
    return map_tensors(batch, lambda tensor: tensor[part]), map_tensors(targets, lambda tensor: tensor[part])


def _train(end, kind, at):
    """Three steps of two processes; before step 811 + ``at`` process 1 stops to work as ``end`` says."""
    distributed.initialise(timeout_seconds=4 * LIMIT)
    stage, (batch, targets) = _stage(kind), _part()
    with Watchdog(LIMIT) as dog:
        for step in range(3):
            dog.beat(811 + step, IDS[4 * distributed.rank() :][:4])
            if distributed.rank() == 1 and step == at:
                END[end]()
            train_step(stage, batch, targets).read()
            stage.step += 1
    distributed.shutdown()


def _sleep():
    time.sleep(LONG)


def _sleep_before_backward():
    before = distributed.waiting

    @contextlib.contextmanager
    def waiting(name, **options):
        if name == "sum of gradients":
            _sleep()
        with before(name, **options):
            yield

    distributed.waiting = waiting


END = {
    "sleep": _sleep,
    "backward": _sleep_before_backward,
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "kind", "at", "collective"),
    [
        ("sleep", "fixed", 2, "counts of samples"),
        ("sleep", "sync", 2, "batch norm"),
        ("backward", "fixed", 2, "sum of gradients"),
        ("stop", "fixed", 2, "counts of samples"),
        ("sleep", "fixed", 0, "comparison of the modules"),
        ("sleep", "fixed", 1, "forward pass"),
    ],
)
def test_a_process_that_does_not_come_is_reported_by_the_other(tmp_path, end, kind, at, collective):
    left = leave(_train, 2, tmp_path, end, kind, at, only=[0])[0]
    assert left.code == 75, left.said
    (line,) = left.lines
    said = f"in '{collective}' at step {811 + at}, its batch has the image ids 17, 39, 4, {2**40}; another process may"
    assert re.search(rf" E rank 0 has waited \d+ s {re.escape(said)}", line), line
    assert "Traceback" not in left.said and "File" in left.said and "train_step" in left.said  # the stacks


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fixed", "sync"])
def test_a_killed_process_is_noticed_by_the_other(tmp_path, kind):
    left = leave(_train, 2, tmp_path, "kill", kind, 2)
    assert (left[0].code, left[1].code) == (75, -signal.SIGKILL), left[0].said
    (line,) = left[0].lines
    collective = {"fixed": "counts of samples", "sync": "batch norm"}[kind]
    assert f"another process of this run was lost (rank 0 noticed at step 813 in '{collective}')" in line
    assert "Traceback" not in left[0].said


def _boxless():
    """Three steps in which the pictures of process 1 have no object."""
    distributed.initialise(timeout_seconds=60)
    stage, (batch, targets) = _stage("fixed"), _part()
    if distributed.rank() == 1:
        targets = map_tensors(targets, torch.zeros_like)
    with Watchdog(30) as dog:
        for step in range(3):
            dog.beat(step, IDS[:2])
            losses, finite = train_step(stage, batch, targets).read()
            assert finite and losses["box_regression"] > 0
            stage.step += 1
    distributed.shutdown()


def test_a_batch_without_any_box_is_an_ordinary_case(tmp_path):
    left = leave(_boxless, 2, tmp_path)
    assert [left[rank].code for rank in range(2)] == [0, 0] and not any(left[rank].said for rank in range(2)), left


def _slow_main():
    """All wait for process 0, which works within ``from_main``; 2 hangs for good."""
    distributed.initialise(timeout_seconds=60)
    with Watchdog(LIMIT):
        distributed.from_main(lambda: time.sleep(LIMIT / 2))
        distributed.from_main(_sleep)


@pytest.mark.slow
def test_process_0_that_does_not_come_back_is_reported_by_all_others(tmp_path):
    left = leave(_slow_main, 3, tmp_path, only=[1, 2])
    for rank in (1, 2):
        assert left[rank].code == 75
        (line,) = left[rank].lines
        assert re.search(rf"rank {rank} has waited \d+ s in 'work of process 0' before its first step; ", line), line


def _lonely():
    distributed.MARGIN = 1
    if int(os.environ["RANK"]) == 0:
        distributed.initialise(timeout_seconds=1)


def test_processes_that_never_arrive_are_told(tmp_path):
    left = leave(_lonely, 2, tmp_path, only=[0])[0]
    assert left.code == 75
    (line,) = left.lines
    assert line.startswith("gesso: the 2 processes of this run did not all arrive in 2 s. Start all of them again")


def _mistake():
    distributed.initialise(timeout_seconds=60)
    with Watchdog(30):
        if distributed.rank() == 1:
            raise ConfigError("this machine has another file")
        distributed.barrier()


def test_the_process_that_failed_says_why_and_the_others_that_it_is_gone(tmp_path):
    left = leave(_mistake, 2, tmp_path)
    assert (left[0].code, left[1].code) == (ProcessLost.exit_code, 2)
    assert left[1].lines == ["gesso: this machine has another file"]
    assert "rank 0 noticed before its first step in 'barrier'" in left[0].lines[0]
