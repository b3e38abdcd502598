"""Real processes over gloo for tests: ``run(function, world, *args)``.

The processes are forked from a server that has imported torch and Gesso once, so that a test takes a second and not
ten. ``function`` is a function at the top of a test module; what it returns has to be picklable.
"""

import multiprocessing as mp
import os
import queue
import socket
import traceback
from collections.abc import Callable
from typing import Any

_CONTEXT = mp.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "timm", "gesso.run.train"])


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def run(
    function: Callable[..., Any],
    world: int,
    *args: Any,
    seconds: float = 120,
    environment: dict[str, str] | None = None,
) -> list[Any]:
    """What ``function(*args)`` returns in each of ``world`` processes, by rank; an exception in one is raised here."""
    results = _CONTEXT.Queue()
    port = free_port()
    processes = [
        _CONTEXT.Process(target=_work, args=(function, rank, world, port, environment or {}, args, results))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    try:
        for _ in range(world):
            rank, value, error = results.get(timeout=seconds)
            if error is not None:
                raise AssertionError(f"process {rank} of {world}:\n{error}")
            found[rank] = value
    except queue.Empty:
        raise AssertionError(f"processes {sorted(set(range(world)) - set(found))} gave no result") from None
    finally:
        for process in processes:
            process.join(timeout=10 if len(found) == world else 0.1)
            if process.is_alive():
                process.kill()
                process.join()
    return [found[rank] for rank in range(world)]


def _work(
    function: Callable[..., Any],
    rank: int,
    world: int,
    port: int,
    environment: dict[str, str],
    args: tuple[Any, ...],
    results: Any,
) -> None:
    import torch

    from gesso import distributed

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)} | environment
    torch.set_num_threads(1)
    try:
        distributed.initialise()
        value = function(*args)
        distributed.barrier()
        distributed.shutdown()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        raise
    results.put((rank, value, None))
