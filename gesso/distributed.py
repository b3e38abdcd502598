"""Processes: rank, world size, groups, device, and every collective. The only importer of ``torch.distributed``.

Everything works unchanged in one process, where no group exists and every collective gives back what it got.
``torchrun`` starts several, on one machine or many; ``initialise`` joins them. Tensors on the CPU go through gloo,
those on a GPU through NCCL.
"""

import contextlib
import inspect
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing import SignalException as SignalException  # for commands.launching
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError as ChildFailedError
from torch.distributed.launcher.api import LaunchConfig as LaunchConfig
from torch.distributed.launcher.api import elastic_launch as elastic_launch
from torch.nn.parallel import DistributedDataParallel

from gesso import launch
from gesso.errors import ConfigError, GessoError, ProcessLost

T = TypeVar("T")
E = TypeVar("E", bound=GessoError)
_LEAVE_BUFFERS: dict[str, Any] = {
    next(
        name
        for name in ("forward_sync_buffers", "broadcast_buffers")  # the newer name first
        if name in inspect.signature(DistributedDataParallel.__init__).parameters
    ): False
}
_LOST = (
    *("connection closed by peer", "connection reset by peer", "broken pipe", "timed out"),
    *("remote process exit", "ncclremoteerror", "communicator was aborted", "collective operation timeout"),
)
"""What gloo and torch's store (first line) and NCCL say where another process is gone or does not come."""
LAUNCHER_LOG = "torch.distributed.elastic"
"""The logger of torchrun."""
MARGIN = 60.0
"""Seconds by which torch's own time-out comes after the watchdog's, which says more."""
EVERY = 0
"""The group of all processes."""


@dataclass
class Traffic:
    """What the collectives of this process did so far, and the one that it is waiting in.

    Attributes:
        count: collectives begun, those of the gradient buckets excepted.
        seconds: that the host waited in them.
        current: the name of the one in progress, and when it began, by ``time.monotonic``; None outside.
        failed: the name of the first one that raised.
        last_bucket: when the last bucket of gradients was handed over, by ``time.perf_counter``.
        last_event: the same on a GPU, an event that tells when the device came there.
    """

    count: int = 0
    seconds: float = 0.0
    current: tuple[str, float] | None = None
    failed: str = ""
    last_bucket: float = 0.0
    last_event: torch.cuda.Event | None = None


@dataclass
class _Processes:
    """The groups that exist, by handle and by size, and whether this process acts for itself at the moment."""

    handles: list[dist.ProcessGroup | None] = field(default_factory=lambda: [None])
    by_size: dict[int, int] = field(default_factory=dict)
    alone: bool = False
    limit: timedelta | None = None


traffic = Traffic()
_processes = _Processes()


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes work together; 1 within ``alone``."""
    return dist.get_world_size() if dist.is_initialized() and not _processes.alone else 1


def is_main() -> bool:
    """Whether this process writes files and speaks for all."""
    return rank() == 0


def announced_world_size() -> int:
    """The number of processes that torchrun announces in the environment, before any group exists; 1 without it."""
    return launch.world_size()


def announced_rank() -> int:
    """The number of this process that torchrun announces in the environment; 0 without it."""
    return launch.rank()


def choose_device(wanted: str) -> torch.device:
    """The device of this process: "auto" takes the GPU of its LOCAL_RANK where there is one, else the CPU.

    Raises:
        ConfigError: "cuda" is asked for and there is no GPU, or fewer than processes on this machine.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device cuda is asked for, but torch finds no GPU", remedy="Use --device cpu or auto.")
    number = int(os.environ.get("LOCAL_RANK", "0"))
    if number >= torch.cuda.device_count():
        raise ConfigError(
            f"process {number} of this machine has no GPU of its own: there are {torch.cuda.device_count()}",
            remedy="Start one process a GPU, or use --device cpu.",
        )
    return torch.device("cuda", number)


def initialise(device: torch.device | None = None, *, timeout_seconds: float = 600) -> bool:
    """Joins the group that torchrun announces in the environment; alone, or a second time, does nothing.

    Returns whether it did, so that the one who began the group ends it.

    Args:
        device: of this process; on a GPU its tensors go through NCCL. None = the CPU.
        timeout_seconds: of the watchdog; a collective fails ``MARGIN`` seconds later.

    Raises:
        ProcessLost: not all processes arrive in that time.
    """
    if announced_world_size() == 1 or dist.is_initialized():
        return False
    cuda = device is not None and device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    limit = _processes.limit = timedelta(seconds=timeout_seconds + MARGIN)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=limit, **_meeting(limit))
    except RuntimeError as error:
        if not lost(error):
            raise
        what = f"the {announced_world_size()} processes of this run did not all arrive in {limit.seconds} s"
        raise ProcessLost(what, remedy="Start all of them again, or let the launcher do it.") from error
    return True


def _meeting(limit: timedelta) -> dict[str, Any]:
    """Where the processes meet: in torchrun's own store, under a name of this group; as torch does it without one."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, timeout=limit)  # type: ignore[attr-defined]
    me = {"rank": announced_rank(), "world_size": announced_world_size()}
    name = launch.meet(store, me["rank"], me["world_size"], seconds=limit.total_seconds())
    return {"store": dist.PrefixStore(name, store), **me}  # type: ignore[attr-defined]


def lost(error: BaseException) -> bool:
    """Whether an exception of torch says that another process is gone, or did not come to a collective in time."""
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _LOST)


def is_left_to_end() -> bool:
    """Whether a process in which something failed has to end without leaving its groups: NCCL would wait for others."""
    return dist.is_initialized() and "nccl" in dist.get_backend()


def shutdown() -> None:
    """Leaves all groups."""
    _processes.handles, _processes.by_size = [None], {}
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within the block this process works for itself: collectives give back what they got, the world size is 1."""
    before, _processes.alone = _processes.alone, True
    try:
        yield
    finally:
        _processes.alone = before


@contextlib.contextmanager
def waiting(name: str, *, counted: bool = True) -> Iterator[None]:
    """Says within the block that the host waits for other processes (or for the device), and for what.

    The time is not ``counted`` in ``traffic.seconds`` where the host also works, as in a backward pass.
    """
    outer, began = traffic.current, time.monotonic()
    traffic.current = (name, began)
    try:
        yield
    except BaseException:
        traffic.failed = traffic.failed or name
        raise
    finally:
        traffic.current = outer
        if counted:
            traffic.seconds += time.monotonic() - began


@contextlib.contextmanager
def _collective(name: str) -> Iterator[None]:
    traffic.count += 1
    with waiting(name):
        yield


def machines() -> list[int]:
    """The number of the machine of each rank, in the order of the ranks; equal numbers are one machine."""
    own = torch.tensor([int(os.environ.get("GROUP_RANK", "0"))])
    return [int(number) for number in all_gather(own, name="machines").flatten()]


def group(size: int) -> int:
    """A handle of the group of ``size`` processes that this one is in; all processes have to ask for it together.

    Groups are runs of ranks, ordered by machine, so that a group lies on one machine wherever that is possible. The
    last one is smaller where ``size`` does not divide the world size.
    """
    if world_size() == 1 or size >= world_size():
        return EVERY
    if size not in _processes.by_size:
        by_machine = machines()
        order = sorted(range(world_size()), key=lambda r: (by_machine[r], r))
        for start in range(0, world_size(), size):
            ranks = order[start : start + size]
            with waiting("making of groups"):
                made = dist.new_group(ranks, timeout=_processes.limit)
            if isinstance(made, dist.ProcessGroup):  # a number stands for a group of others
                _processes.handles.append(made)
                _processes.by_size[size] = len(_processes.handles) - 1
    return _processes.by_size[size]


def group_size(handle: int = EVERY) -> int:
    """How many processes are in a group; 1 within ``alone``."""
    if world_size() == 1:
        return 1
    return dist.get_world_size(_processes.handles[handle])


def all_reduce_sum(value: Tensor, handle: int = EVERY, *, name: str = "sum") -> Tensor:
    """Adds ``value`` over all processes of a group, in place; in one process it stays as it is."""
    if group_size(handle) > 1:
        with _collective(name):
            dist.all_reduce(value, group=_processes.handles[handle])
    return value


def all_gather(value: Tensor, handle: int = EVERY, *, name: str = "gather") -> Tensor:
    """(k, ...) ``value`` (...) of all k processes of a group, in the order of their ranks; all of one shape."""
    count = group_size(handle)
    if count == 1:
        return value[None]
    found = [torch.empty_like(value) for _ in range(count)]
    with _collective(name):
        dist.all_gather(found, value.contiguous(), group=_processes.handles[handle])
    return torch.stack(found)


@torch.library.custom_op("gesso::global_sum", mutates_args=())
def global_sum(value: Tensor) -> Tensor:
    """``value`` added over all processes, as an operator that a compiled graph keeps whole; no gradient flows."""
    return all_reduce_sum(value.clone(), name="counts of samples")


@global_sum.register_fake
def _(value: Tensor) -> Tensor:
    return torch.empty_like(value)


def gather_array(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The rows of ``array`` (n, ...) of all processes one below the other; n may differ, type and the rest may not."""
    if world_size() == 1:
        return array
    lengths = [int(n) for n in all_gather(torch.tensor([len(array)]), name="gather of rows").flatten()]
    width = int(np.prod(array.shape[1:])) * array.dtype.itemsize
    padded = torch.zeros(max(max(lengths) * width, 1), dtype=torch.uint8)
    padded[: len(array) * width] = torch.from_numpy(
        np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8).copy()
    )
    rows = all_gather(padded, name="gather of rows").numpy()
    found = [rows[r, : n * width].tobytes() for r, n in enumerate(lengths)]
    return np.frombuffer(b"".join(found), array.dtype).reshape(sum(lengths), *array.shape[1:])


def broadcast(value: T, *, name: str = "broadcast") -> T:
    """What process 0 has, in all of them; small plain data."""
    if world_size() == 1:
        return value
    box = [value]
    with _collective(name):
        dist.broadcast_object_list(box, src=0)
    return box[0]


def all_agree(yes: bool) -> bool:
    """Whether every process says yes."""
    return int(all_reduce_sum(torch.tensor(int(yes)), name="agreement")) == world_size()


def from_main(work: Callable[[], T]) -> T:
    """What ``work`` gives in process 0, where it runs as if ``alone``, in all of them; small plain data.

    A GessoError of it is raised in all of them; only process 0 has to tell (``GessoError.told``).
    """
    if world_size() == 1:
        return work()
    result: T | None = None
    error: Exception | None = None
    if is_main():
        try:
            with alone():
                result = work()
        except Exception as raised:  # noqa: BLE001  (the others must not wait for ever)
            error = raised
    shared = error if isinstance(error, GessoError) or error is None else GessoError(f"process 0 failed: {error!r}")
    result, shared = broadcast((result, shared), name="work of process 0")
    if error is not None:
        raise error
    if shared is not None:
        shared.told = True
        raise shared
    return result  # type: ignore[return-value]


def told_by_main(error: E) -> E:
    """``error``, which all processes raise together and only process 0 has to tell."""
    error.told = not is_main()
    return error


def same_everywhere(tensors: Iterable[Tensor]) -> None:
    """Overwrites tensors by those of process 0, in place; all processes give them in one order."""
    if world_size() > 1:
        with _collective("broadcast of weights"):
            for tensor in tensors:
                dist.broadcast(tensor, src=0)


def barrier() -> None:
    """Waits until all processes are here."""
    if world_size() > 1:
        with _collective("barrier"):
            dist.barrier()


class _Parallel(DistributedDataParallel):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with waiting("forward pass", counted=False):  # the second one agrees on the order of the buckets first
            return super().forward(*args, **kwargs)  # type: ignore[no-untyped-call]


def data_parallel(module: nn.Module) -> nn.Module:
    """``module`` with its gradients added over all processes, in buckets and while the backward pass runs.

    In one process it is the module itself. Buffers are left alone: batch norm sees to its own.
    """
    if world_size() == 1:
        return module
    warnings.filterwarnings("ignore", message="Grad strides do not match")  # of a 1 x 1 filter, all are the same
    with waiting("comparison of the modules"):
        parallel = _Parallel(module, gradient_as_bucket_view=True, **_LEAVE_BUFFERS)
    parallel.register_comm_hook(None, _add_bucket)
    return parallel


def _add_bucket(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """Starts the sum of one bucket of gradients over all processes."""
    traffic.last_bucket = time.perf_counter()
    if bucket.buffer().is_cuda:
        traffic.last_event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        traffic.last_event.record()
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    future: torch.futures.Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
    return future


@contextlib.contextmanager
def gradients_held(module: nn.Module) -> Iterator[None]:
    """Within the block backward passes only add up gradients in this process alone."""
    with module.no_sync() if isinstance(module, DistributedDataParallel) else contextlib.nullcontext():
        yield
