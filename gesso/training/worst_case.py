"""The largest step of a stage, tried before its first one, so that memory does not run out in the middle of a run.

The step is the loop's own, with made-up pictures and objects, and with the flag down that gates every update: it takes
the memory of a real step and changes nothing. Afterwards a GPU has that memory at hand, and the largest graph is
compiled. Where it does not fit, smaller batches are tried, and the error says which one does.
"""

import gc
import math
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gesso import distributed
from gesso.data.transforms import InputConfig, KeepRatio, Shape
from gesso.errors import ConfigError, GessoError
from gesso.log import get_logger
from gesso.structures import ImageBatch, Targets, map_tensors, to_device
from gesso.training.activations import is_lack_of_memory
from gesso.training.stage import Stage, peak_memory
from gesso.training.step import train_step

log = get_logger(__name__)

Pair = tuple[ImageBatch, Targets]
_RELATIVE_SIDES = (0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What the largest step took.

    Attributes:
        pictures: B, of this process.
        shape: height and width of the padded pictures.
        objects: M, in each picture.
        seconds: of the one step; where the stage is compiled, with the compilation.
        memory_gib: on a GPU the most that tensors held; on a CPU the largest resident set of the process so far, which
            an earlier stage or an evaluation may have reached.
    """

    pictures: int
    shape: Shape
    objects: int
    seconds: float
    memory_gib: float


def largest_shape(input: InputConfig, heights: npt.ArrayLike, widths: npt.ArrayLike) -> Shape:
    """The padded shape of most pixels, over all scales, into which one of these pictures goes; of equal ones one."""
    numbers = np.unique(input.resize.assign(heights, widths)).tolist()
    shapes = [input.resize.shapes(scale)[number] for scale in range(input.resize.num_scales) for number in numbers]
    return max(shapes, key=math.prod)


def rehearse(stage: Stage, example: Pair, shape: Shape, *, name: str, begun: bool = False) -> Rehearsal:
    """Does the largest step once: a whole batch of ``shape`` with an object in every slot.

    Weights, running statistics, moments, averages, random states and the stage's counters are afterwards what they
    were, also where it raises. What it takes is logged; a GPU's peak is counted anew from there on.

    Args:
        stage: at its beginning, or where a checkpoint left it.
        example: a batch of the stage on the CPU: which fields there are, B, M and the side of masks are taken from it.
        shape: of ``largest_shape``.
        name: the stage's key in the configuration, for the remedy.
        begun: steps of this run are done, so that its batch size is settled.

    Raises:
        ConfigError: it does not fit in memory; the message says how many pictures do.
    """
    share, objects = example[1].valid.shape
    if stage.compiles:
        log.info("compiling the largest step, %s", _words(share, shape, objects))
    _ = stage.parallel  # all processes make it together
    done = _attempt(stage, example, shape, share)
    if distributed.all_agree(done is not None):
        assert done is not None
        if distributed.world_size() > 1:  # the buckets of gradients take their final order in the first step
            _step(stage, example, shape, share)
    else:
        log.info("%s do not fit in memory; looking for what does", _words(share, shape, objects))
        most = _most_pictures(stage, example, shape, share)
        raise distributed.told_by_main(_refusal(stage, share, most, shape, objects, name, begun))
    log.info(
        "the largest step (%s) takes %.1f s%s and %.2f GiB",
        _words(share, shape, objects),
        done.seconds,
        " with its compilation" if stage.compiles else "",
        done.memory_gib,
    )
    return done


def worst_batch(example: Pair, shape: Shape, count: int) -> Pair:
    """``count`` pictures of noise of one padded ``shape``, with M valid objects of many sizes all over each.

    The fields are those of ``example``, of the same types and memory layout.
    """
    batch, targets = (map_tensors(part, lambda tensor: tensor[:count]) for part in example)
    assert isinstance(batch, ImageBatch)
    assert isinstance(targets, Targets)
    H, W = shape
    noise = torch.randint(0, 256, (H, W, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    sizes = torch.tensor([H, W]).repeat(count, 1)
    boxes = _spread(targets.valid.shape[1], shape).repeat(count, 1, 1).to(targets.boxes.dtype)
    full = {name: None if value is None else torch.ones_like(value) for name, value in vars(targets).items()}
    return (
        replace(
            batch,
            images=noise.repeat(count, 1, 1, 1).permute(0, 3, 1, 2).to(batch.images.dtype),
            sizes=sizes,
            original_sizes=sizes,
            scale=torch.ones_like(batch.scale),
        ),
        replace(
            targets,
            boxes=boxes,
            labels=torch.zeros_like(targets.labels),
            valid=torch.ones_like(targets.valid),
            ignore=torch.zeros_like(targets.ignore),
            verified=full["verified"],
            masks=full["masks"],
            mask_frames=None if targets.mask_frames is None else boxes,
            semantic=None if targets.semantic is None else targets.semantic.new_zeros(count, H, W),
        ),
    )


def _spread(count: int, shape: Shape) -> Tensor:
    """(count, 4) float32 xyxy: centres on a grid over the picture, sides from half a cell of it to four cells."""
    H, W = shape
    columns = max(round(math.sqrt(count * W / H)), 1)
    rows = -(-count // columns)
    number = torch.arange(count)
    cell = torch.tensor([W / columns, H / rows])
    centre = (torch.stack([number % columns, number // columns], 1) + 0.5) * cell
    half = cell * torch.tensor(_RELATIVE_SIDES)[number % len(_RELATIVE_SIDES), None] / 2
    return torch.cat([(centre - half).clamp(min=0), torch.minimum(centre + half, torch.tensor([W, H]))], 1)


def _step(stage: Stage, example: Pair, shape: Shape, count: int) -> None:
    """One step of ``count`` pictures that changes nothing."""
    with _unchanged(stage):
        batch, targets = worst_batch(example, shape, count)
        train_step(stage, to_device(batch, stage.device), to_device(targets, stage.device)).read()


def _attempt(stage: Stage, example: Pair, shape: Shape, count: int) -> Rehearsal | None:
    """One step of this process alone, which changes nothing; None where memory runs out, and it is free again.

    Alone, because a process without memory would leave the others waiting within the step.
    """
    cuda = stage.device.type == "cuda"
    older = torch.zeros((), requires_grad=True) * 1
    try:
        if cuda:
            torch.cuda.reset_peak_memory_stats(stage.device)
        began = time.perf_counter()
        with distributed.alone():
            _step(stage, example, shape, count)
        return Rehearsal(
            pictures=count,
            shape=shape,
            objects=example[1].valid.shape[1],
            seconds=time.perf_counter() - began,
            memory_gib=peak_memory(stage.device),
        )
    except (RuntimeError, MemoryError) as error:
        if not is_lack_of_memory(error):
            raise
    finally:
        if cuda:
            torch.cuda.reset_peak_memory_stats(stage.device)
    # The error and its frames are gone by now. What torch still had to do of a backward pass on the CPU is not: it
    # waits, with its activations, for the next one on this thread, which drops it if its own nodes are older.
    older.backward()  # type: ignore[no-untyped-call]
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    return None


@contextmanager
def _unchanged(stage: Stage) -> Iterator[None]:
    """Within the block steps change nothing for good, and the optimizer has all its state, as it will have later."""
    optimizer, ema, alive = stage.optimizer, stage.ema, stage.alive
    buffers = [(buffer, buffer.detach().clone()) for buffer in stage.module.buffers()]
    rates = [group["lr"] for group in optimizer.param_groups]
    known = set(optimizer.state)
    updates = 0 if ema is None else ema.updates
    with torch.random.fork_rng([stage.device] if stage.device.type == "cuda" else []):
        try:
            stage.alive = torch.zeros_like(alive)
            _make_state(optimizer, stage.alive)
            yield
        finally:
            stage.alive = alive
            if ema is not None:
                ema.updates = updates
            optimizer.zero_grad(set_to_none=True)
            for parameter in [p for p in optimizer.state if p not in known]:
                del optimizer.state[parameter]
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            vars(optimizer).pop("found_inf", None)
            for buffer, value in buffers:
                buffer.copy_(value)


def _make_state(optimizer: torch.optim.Optimizer, alive: Tensor) -> None:
    """Makes the moments that torch would make at the first step, by a step that is skipped."""
    for parameter in (p for group in optimizer.param_groups for p in group["params"] if p not in optimizer.state):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.found_inf = 1.0 - alive  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _most_pictures(stage: Stage, example: Pair, shape: Shape, share: int) -> int:
    """How many pictures fit, of the ``share`` that do not; 0 where none does.

    Where the stage is compiled, each batch size has to be compiled: only halves of halves are tried there.
    """
    group, parts = stage.config.norm.images, stage.config.accumulate
    unit = parts
    if group is not None and share % (group * parts) == 0:
        unit = group * parts  # batch norm over groups takes whole groups

    def fits(count: int) -> bool:
        try:
            fitting = _attempt(stage, example, shape, count * unit) is not None
        except (RuntimeError, ValueError, GessoError) as error:
            log.debug("a batch of %d cannot be trained on: %s", count * unit, error)  # batch norm of one value
            fitting = False
        return distributed.all_agree(fitting)

    return unit * _most(fits, share // unit, exact=not stage.compiles)


def _most(fits: Callable[[int], bool], too_many: int, *, exact: bool) -> int:
    """The largest number below ``too_many`` that fits, or not ``exact`` the largest half of a half; 0 for none."""
    number = too_many // 2
    while number and not fits(number):
        too_many, number = number, number // 2
    while exact and number and too_many - number > 1:
        middle = (number + too_many) // 2
        if fits(middle):
            number = middle
        else:
            too_many = middle
    return number


def _refusal(stage: Stage, share: int, most: int, shape: Shape, objects: int, name: str, begun: bool) -> ConfigError:
    size = most * distributed.world_size()
    if not most:
        keep = isinstance(stage.config.input.resize, KeepRatio)
        keys = [f"--{name}.input.resize.{key}" for key in (("short-sides", "long-side") if keep else ("side",))]
        keys = (
            [f"--{name}.batch-size", *keys] if share > 1 else keys
        )  # a process short of memory may have tried in vain
        remedy = f"Lower {' and '.join(keys)}, or train where there is more memory."
    elif begun:
        remedy = f"Go on where there is more memory, or start a new run with --{name}.batch-size {size}."
    else:
        parts = stage.config.accumulate * -(-share // most)
        while share % parts:
            parts += 1
        remedy = f"Set --{name}.batch-size {size}, or --{name}.accumulate {parts}, or try --{name}.memory sqrt."
    verdict = "one does" if most == 1 else f"{most} do" if most else "no smaller batch did"
    return ConfigError(
        f"a step of {_words(share, shape, objects)}, in {stage.config.precision}, does not fit into "
        f"{_memory_there_is(stage.device):.1f} GiB; {verdict}",
        remedy=remedy,
    )


def _words(count: int, shape: Shape, objects: int) -> str:
    return f"{count} picture{'' if count == 1 else 's'} of {shape[0]} x {shape[1]} with {objects} objects each"


def _memory_there_is(device: torch.device) -> float:
    """GiB that this process may have: what is free on its GPU and what it holds there; the machine's, or its limit."""
    if device.type == "cuda":
        return (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)) / 2**30
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return (machine if limit == resource.RLIM_INFINITY else min(machine, limit)) / 2**30
