"""What torchrun says to the processes that it starts, in their environment and in its store.

torchrun starts all its processes again (``--max-restarts``) when one of them fails, and at another size where machines
come or go (``--nnodes MIN:MAX``), always with the command line that it was given: without ``--resume``. A run therefore
remembers which torchrun began it. The store through which the processes find each other stays the same, with all that
the processes before left in it. A torchrun that gets SIGINT or SIGTERM hands it to its processes, waits 30 s for them
and starts nothing again; every exit code but 0 is a failure to it.
"""

import os
import time
import uuid
from typing import Protocol

_RUN_ID = "TORCHELASTIC_RUN_ID"
_NAMELESS = "none"
"""What torchrun calls a launch without ``--rdzv-id`` and without ``--standalone``."""


class Store(Protocol):
    """The methods of a store of ``torch.distributed`` that are used here."""

    def check(self, keys: list[str], /) -> bool:
        """Whether all of these are there."""

    def get(self, key: str, /) -> bytes:
        """The value of a key that is there."""

    def set(self, key: str, value: str, /) -> None:
        """Puts a value there, or another one."""


def rank() -> int:
    """The number of this process that torchrun announces; 0 without it."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of processes that torchrun announces; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_launched() -> bool:
    """Whether torchrun, or whatever sets its environment variables, started this process."""
    return _RUN_ID in os.environ or world_size() > 1


def launch_id() -> str | None:
    """Which torchrun started this process; stays the same when it starts the group again. None without torchrun.

    It is the ``--rdzv-id``, which all machines share, or else the torchrun process of this machine.
    """
    name = os.environ.get(_RUN_ID)
    return f"process {os.getppid()} on {os.uname().nodename}" if name == _NAMELESS else name


def is_restart(launch: str | None) -> bool:
    """Whether a run that was begun under ``launch`` is that of this process's own torchrun, started again."""
    named = os.environ.get(_RUN_ID) != _NAMELESS
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return launch is not None and launch == launch_id() and (named or restarts > 0)


def meet(store: Store, number: int, count: int, *, seconds: float) -> str:
    """A name for a group of processes that is none of an earlier group's in the same store; all of them call it.

    Process 0 makes it up. Each other one leaves a word that is its own, and gets the name as the answer to this word.

    Args:
        store: shared by all of them.
        number: of this process, below ``count``.
        seconds: the most that it may take.

    Raises:
        RuntimeError: timed out.
    """
    own, end = uuid.uuid4().hex, time.monotonic() + seconds
    if number:
        store.set(f"gesso/hello/{number}", own)
        while not store.check([f"gesso/answer/{own}"]):
            _wait(end)
        name = store.get(f"gesso/answer/{own}").decode()
        store.set(f"gesso/{name}/{number}", "")
        return name
    for other in range(1, count):
        hello, here = f"gesso/hello/{other}", f"gesso/{own}/{other}"
        while not store.check([here]):
            if store.check([hello]):  # it may be that of a process before
                store.set(f"gesso/answer/{store.get(hello).decode()}", own)
            _wait(end)
    return own


def _wait(end: float) -> None:
    if time.monotonic() > end:
        raise RuntimeError("timed out in waiting for the processes of the group")
    time.sleep(0.02)
