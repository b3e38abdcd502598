"""What computing activations twice saves and costs: memory none, stages, sqrt and budgets on R50-FPN Faster R-CNN.

    uv run python benchmarks/memory.py [--memories stages,sqrt] [--norm fixed|train] [--frozen 1] [--batch 2]
        [--height 320 --width 320] [--rounds 5] [--threads 1] [--device cpu|cuda] [--dtype fp32|bf16] [--json]

A row a choice, in one process. Bytes are those of tensors really alive: on a GPU the allocator's, on the CPU counted
from every operator's outputs until their storage is freed. They are taken twice:

    maps     backbone and FPN alone, the gradient of every level of ones. ``kept`` is alive at the end of the forward
             pass, the levels themselves included; ``peak`` is the most until the end of the backward pass, the largest
             segment computed again and the gradients of activations included
    step     forward and backward of the whole detector: the most at any time. ``step_saved_of_maps`` is what that falls
             by, as a share of ``kept`` with memory none

Weights and their gradients are there before and do not count. ``planned`` is what the plan expects of backbone and FPN:
the stored inputs, and these with the largest segment. Every saving is a share of the same number with memory none.
Seconds are those of whole steps with SGD, the choices in turn, ``--rounds`` times; the ratio is the median over the
rounds, to memory none of the same round. On the CPU it is the process's own time, so that a busy machine disturbs less.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
import detectors

from gesso.models.build import build_detector
from gesso.models.norm import NormPolicy, apply_norm_policy
from gesso.structures import ImageBatch, to_device
from gesso.training.activations import bytes_alive, measure_units
from gesso.training.memory import Plan, apply_memory, held_bytes, parse_memory, plan_memory
from gesso.training.optimizer import SGD, build_optimizer


def main() -> None:
    given = arguments()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    for row in compare(given):
        print(json.dumps(row) if given.json else "  ".join(f"{k} {v}" for k, v in row.items()), flush=True)


def arguments() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memories", default="stages,sqrt", help="beside none; a budget is written budget=2GB")
    parser.add_argument("--norm", default="train", choices=("train", "affine", "fixed"))
    parser.add_argument("--frozen", type=int, default=-1, help="stages of the backbone that are frozen; 1 = C2 too")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--height", type=int, default=800 if cuda else 320)
    parser.add_argument("--width", type=int, default=1344 if cuda else 320)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10 if cuda else 1, help="of each choice in a round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def compare(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each choice."""
    device = torch.device(given.device)
    config = detectors.ours("faster_rcnn")
    config = replace(config, backbone=replace(config.backbone, frozen_stages=given.frozen))
    detector: Any = build_detector(config, detectors.CLASSES)
    detectors.damp(detector)
    apply_norm_policy(detector, NormPolicy(kind=given.norm))
    detector.to(device).train()
    scene = detectors.Scene(given.batch, given.height, given.width)
    batch, targets = (to_device(part, device) for part in detectors.tensors(scene, slots=100, masks=False))
    optimizer = build_optimizer(detector, SGD(rate=1e-9))

    def precision() -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=given.dtype == "bf16")

    def backward() -> None:
        with precision():
            loss = torch.stack(list(detector(batch, targets).values())).sum()
        loss.backward()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        backward()
        optimizer.step()

    step()
    with precision():
        costs = measure_units(detector, batch, targets)
    held = held_bytes(detector, optimizer, None)
    plans = {name: plan_memory(parse_memory(name), costs, held) for name in ["none", *given.memories.split(",")]}
    bytes: dict[str, dict[str, int]] = {}
    for name, plan in plans.items():
        apply_memory(detector, plan)
        bytes[name] = of_maps(detector, batch, precision) | {"step_peak": of_step(detector, batch, backward)}
    seconds = rounds(given, detector, plans, step, device)
    for name, plan in plans.items():
        yield {
            "memory": name,
            "batch": given.batch,
            "size": [given.height, given.width],
            "norm": given.norm,
            "frozen": given.frozen,
            "dtype": given.dtype,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {given.threads} threads",
            "segments": len(plan.segments),
            **{f"{key}_mb": round(value / 1e6, 1) for key, value in bytes[name].items()},
            **{f"{key}_saved": saved(bytes[name][key], bytes["none"][key]) for key in bytes[name]},
            "step_saved_of_maps": round(
                (bytes["none"]["step_peak"] - bytes[name]["step_peak"]) / bytes["none"]["kept"], 3
            ),
            "planned_kept_saved": saved(plan.kept_bytes, plan.all_bytes),
            "planned_with_largest_saved": saved(plan.kept_bytes + plan.largest_bytes, plan.all_bytes),
            "planned_step_mb": round((plan.peak_bytes - held) / 1e6, 1),
            "step_s": round(statistics.median(seconds[name]), 4),
            "ratio": round(statistics.median(a / b for a, b in zip(seconds[name], seconds["none"], strict=True)), 3),
        }


def saved(bytes: int, without: int) -> float:
    return round(1 - bytes / without, 3)


def rounds(
    given: argparse.Namespace, detector: Any, plans: dict[str, Plan], step: Callable[[], None], device: torch.device
) -> dict[str, list[float]]:
    """Seconds of a step for every choice and round."""
    found: dict[str, list[float]] = {name: [] for name in plans}
    for number in range(given.rounds + 1):
        for name, plan in plans.items():
            apply_memory(detector, plan)
            began = now(device)
            for _ in range(given.steps):
                step()
            if number:  # the first round warms up
                found[name].append((now(device) - began) / given.steps)
    return found


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def of_maps(detector: Any, batch: ImageBatch, precision: Callable[[], torch.autocast]) -> dict[str, int]:
    """Bytes of backbone and FPN at the end of their forward pass, and the most until the end of the backward pass."""
    with gradients_there(detector) as known, bytes_alive(batch.images.device, [*known, *vars(batch).values()]) as alive:
        with precision():
            found = detector.maps(batch)
        levels = [found[name] for name in detector.neck.names]
        del found
        kept = alive.now()
        torch.autograd.backward(levels, [torch.ones_like(level) for level in levels])
        return {"kept": kept, "peak": alive.most()}


def of_step(detector: nn.Module, batch: ImageBatch, backward: Callable[[], None]) -> int:
    """The most bytes of a forward and backward pass of the whole detector."""
    with gradients_there(detector) as known, bytes_alive(batch.images.device, [*known, *vars(batch).values()]) as alive:
        backward()
        return alive.most()


@contextlib.contextmanager
def gradients_there(detector: nn.Module) -> Iterator[list[Tensor]]:
    """Within the block every weight has a gradient already, which a backward pass adds to; gives all these tensors."""
    for parameter in detector.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    try:
        gradients = [p.grad for p in detector.parameters() if p.grad is not None]
        yield [*detector.parameters(), *detector.buffers(), *gradients]
    finally:
        detector.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main()
