"""``--gpus N``: the same command in N processes on this machine, which torchrun starts."""

import contextlib
import logging
import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

import torch

from gesso import distributed
from gesso.commands.parsing import Result
from gesso.errors import ConfigError, GessoError, Interrupted, ProcessLost
from gesso.launch import is_launched, launch_id
from gesso.log import get_logger
from gesso.run.config import RunConfig

log = get_logger(__name__)

PROGRAM = "gesso"


def starts_others(gpus: int | None) -> bool:
    """Whether this process is to start others and not to work itself.

    Raises:
        ConfigError: no number of processes, or torchrun has started another number of them.
    """
    if gpus is None:
        return False
    if gpus < 1:
        raise ConfigError(f"--gpus must be at least 1, found {gpus}")
    world = distributed.announced_world_size()
    if is_launched() and gpus != world:
        raise ConfigError(f"--gpus is {gpus}, but torchrun has started {world} processes", remedy="Leave --gpus out.")
    return not is_launched()


def check_gpus(gpus: int, device: str) -> None:
    """ConfigError where there are some GPUs, but fewer than processes; without any, the processes share the CPU."""
    if distributed.choose_device(device).type == "cuda" and torch.cuda.device_count() < gpus:
        count = torch.cuda.device_count()
        raise ConfigError(f"--gpus is {gpus}, but there are {count}", remedy=f"Use --gpus {count}, or --device cpu.")


@contextlib.contextmanager
def joined(config: RunConfig, asked: Callable[[], bool]) -> Iterator[None]:
    """Within the block the processes that torchrun started are one group; alone, nothing happens.

    Where they stop because one of them was ``asked`` to, a torchrun that does not know of it is told.
    """
    began = distributed.initialise(distributed.choose_device(config.device), timeout_seconds=config.timeout_seconds)
    try:
        yield
    except Interrupted:
        tell_of_stop(asked())
        raise
    except BaseException:
        began = began and not distributed.is_left_to_end()
        raise
    finally:
        if began:
            distributed.shutdown()


def tell_of_stop(asked: bool) -> None:
    """Stops the torchrun of this machine where it does not know that a signal ended the run, and would start it again.

    That is so where the signal reached some processes of a machine and not the torchrun, which hands it to all of
    them. The torchruns of other machines go on without this one, or wait for it. All processes call it together.

    Args:
        asked: a signal reached this process.
    """
    if launch_id() is None:
        return
    machine = int(os.environ.get("GROUP_RANK", "0"))
    told = distributed.all_gather(torch.tensor([machine, int(asked)]), name="signals").tolist()
    here = [said for number, said in told if number == machine]
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if asked and restarts and (len(here) == 1 or not all(here)):
        os.kill(os.getppid(), signal.SIGTERM)


@contextlib.contextmanager
def told_once() -> Iterator[None]:
    """Mistakes in this block are found by all processes alike, and only the first of each machine tells."""
    try:
        yield
    except GessoError as error:
        error.told = int(os.environ.get("LOCAL_RANK", "0")) > 0
        raise


def start(gpus: int, words: Sequence[str]) -> Result:
    """Runs ``gesso WORDS`` in as many processes, which do all the talking; gives the exit code of the whole.

    It is what ``torchrun --standalone`` does. Where one process fails, the others get SIGTERM.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // gpus)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "300")  # an evaluation comes before its checkpoint
    torchs = logging.getLogger(distributed.LAUNCHER_LOG)  # would tell of every mistake once more
    torchs.propagate = False
    torchs.addHandler(logging.NullHandler())
    config = distributed.LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=gpus,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        signals_to_handle="SIGHUP,SIGQUIT",
    )
    program = [sys.argv[0]] if Path(sys.argv[0]).name == PROGRAM else ["-m", PROGRAM]
    exit_code = 0
    with _signals_handed_on():
        try:
            distributed.elastic_launch(config, sys.executable)(*program, *words)
        except distributed.SignalException as stop:
            exit_code = 128 + stop.sigval
        except distributed.ChildFailedError as error:
            failures = sorted(error.failures.items(), key=lambda item: item[1].timestamp)
            exit_code = _exit_code({rank: failure.exitcode for rank, failure in failures})
    return Result("", exit_code=exit_code)


@contextlib.contextmanager
def _signals_handed_on() -> Iterator[None]:
    """The first SIGINT or SIGTERM goes to all processes; while these save, further ones are left aside.

    torch kills what has not ended after 30 s (``TORCH_ELASTIC_SHUTDOWN_TIMEOUT``).
    """
    numbers = (signal.SIGINT, signal.SIGTERM)

    def receive(number: int, frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise distributed.SignalException(f"got signal {number}", signal.Signals(number))

    old = {number: signal.signal(number, receive) for number in numbers}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _exit_code(failed: dict[int, int]) -> int:
    """One exit code of those that failed, by rank in the order of time; minus the signal where one was killed.

    A mistake or a bug goes before what followed from it in the other processes.
    """
    for rank, code in failed.items():
        if code < 0 and code != -signal.SIGTERM:
            log.error("process %d was ended by %s", rank, signal.Signals(-code).name)
    codes = list(failed.values())
    for telling in (GessoError.exit_code, 1, ProcessLost.exit_code):
        if telling in codes:
            return telling
    first = codes[0]
    return first if first >= 0 else 128 - first
