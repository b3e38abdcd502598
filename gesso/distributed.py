"""Processes: rank, world size and device. The only importer of ``torch.distributed``.

Everything works unchanged in one process, where no group exists. ``torchrun`` starts several; training with several
processes comes with its own chapter, until then ``run.py`` refuses a world of more than one.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor

from gesso.errors import ConfigError


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and speaks for all."""
    return rank() == 0


def announced_world_size() -> int:
    """The number of processes that torchrun announces in the environment, before any group exists; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def initialise() -> None:
    """Joins the group that torchrun announces in the environment: NCCL on GPUs, gloo on CPUs; alone, does nothing."""
    if announced_world_size() > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(choose_device("cuda"))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def shutdown() -> None:
    """Leaves the group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def choose_device(wanted: str) -> torch.device:
    """The device of this process: "auto" takes the GPU of its LOCAL_RANK where there is one, else the CPU.

    Raises:
        ConfigError: "cuda" is asked for and there is no GPU.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device cuda is asked for, but torch finds no GPU", remedy="Use --device cpu or auto.")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def all_reduce_sum(value: Tensor) -> Tensor:
    """Adds ``value`` over all processes, in place; in one process it stays as it is."""
    if world_size() > 1:
        dist.all_reduce(value)
    return value
