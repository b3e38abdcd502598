"""The memory that `gesso plan memory` predicts against what a real step holds, and how long the command takes.

    uv run python benchmarks/memory_plan.py [--only 0,3] [--threads 1] [--json]

A row a setting: small detectors and those with ResNet-50, resolutions, batches, precisions, optimizers, and memory with
and without computing activations twice. ``predicted_mb`` is what the plan says of the setting in a grid from 2 to 16
pictures, so that batches in between come off its line. ``measured_mb`` is the peak of a real step, in its own process:
on a CPU the bytes of all tensors alive, weights and the optimizer's state included, counted from every operator
that makes them until they are freed; on a GPU the allocator's. Beside it the largest resident set of that process after
two plain steps, and what it was before them (Python, torch, the weights, and with memory sqrt the passes that choose
what is computed twice). The ratio is predicted over measured; the goal is 15%. The last row is the time of the command
for a small recipe, and that of processors; the goal is 60 s on two cores.
"""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gesso import distributed
from gesso.planning.account import choose_memory, count_step
from gesso.planning.memory import Wishes, plan_memory
from gesso.planning.stages import at_resolution, in_one_process, new_stage, with_stage, worst_pair, worst_shape
from gesso.planning.workload import stage_of
from gesso.recipes.catalog import make_config
from gesso.run.config import RunConfig
from gesso.training.optimizer import SGD, AdamW
from gesso.training.step import train_step

COMMAND = ("plan", "memory", "direct:small", "--memory", "11GB", "--json")
GRID = (2, 16)


class Setting(NamedTuple):
    recipe: str
    stage: str
    resolution: int
    batch: int
    precision: str
    optimizer: str
    memory: str


SETTINGS = (
    Setting("detectors:faster_rcnn", "training", 224, 4, "float32", "AdamW", "none"),
    Setting("detectors:mask_rcnn", "training", 320, 4, "float32", "AdamW", "none"),
    Setting("detectors:cascade_rcnn", "training", 448, 2, "bfloat16", "AdamW", "none"),
    Setting("detectors:retinanet", "training", 320, 8, "float32", "SGD", "none"),
    Setting("direct:small", "pretraining", 448, 8, "float32", "SGD", "sqrt"),
    Setting("direct:faster_p1x_1x", "pretraining", 320, 2, "float32", "SGD", "none"),
    Setting("megdet:batch_16", "training", 224, 4, "bfloat16", "SGD", "sqrt"),
    Setting("direct:mask_p1x_1x", "pretraining", 224, 4, "float32", "SGD", "none"),
    Setting("direct:retinanet_p1x_1x", "pretraining", 448, 2, "float32", "AdamW", "none"),
    Setting("direct:cascade_p1x_1x", "pretraining", 224, 2, "bfloat16", "SGD", "sqrt"),
)


def main() -> None:
    given = arguments()
    if given.child is not None:
        torch.set_num_threads(given.threads)
        print(json.dumps(measured(SETTINGS[given.child])))
        return
    for row in rows(given):
        print(json.dumps(row) if given.json else "  ".join(f"{k} {v}" for k, v in row.items()), flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(map(str, range(len(SETTINGS)))), help="numbers of settings")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def rows(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for number in map(int, given.only.split(",")):
        setting = SETTINGS[number]
        predicted = prediction(setting)
        call = [sys.executable, __file__, "--child", str(number), "--threads", str(given.threads)]
        found = json.loads(subprocess.run(call, check=True, capture_output=True, text=True).stdout)
        yield setting._asdict() | {
            "predicted_mb": round(predicted / 1e6, 1),
            **found,
            "ratio": round(predicted / 1e6 / found["measured_mb"], 4),
        }
    began, before = time.perf_counter(), os.times()
    subprocess.run([sys.executable, "-m", "gesso", *COMMAND], check=True, capture_output=True)
    seconds, after = time.perf_counter() - began, os.times()
    busy = after.children_user + after.children_system - before.children_user - before.children_system
    yield {"command": " ".join(("gesso", *COMMAND)), "seconds": round(seconds, 1), "processor_seconds": round(busy, 1)}


def configured(setting: Setting) -> RunConfig:
    """The recipe with the precision, optimizer and memory of a setting."""
    config = make_config(setting.recipe)
    stage = dataclasses.replace(
        stage_of(config, setting.stage),
        precision=setting.precision,
        optimizer={"SGD": SGD(), "AdamW": AdamW()}[setting.optimizer],
        memory=setting.memory,
    )
    return with_stage(config, setting.stage, stage)


def prediction(setting: Setting) -> int:
    """Bytes, of the plan."""
    wishes = Wishes(
        budget=10**15,
        resolutions=(setting.resolution,),
        batches=tuple(sorted({*GRID, setting.batch})),
        images=1,
        epochs=1,
    )
    (stage,) = plan_memory(configured(setting), setting.recipe, [setting.stage], wishes).stages
    return next(one.bytes for one in stage.choices if one.pictures == setting.batch)


def measured(setting: Setting) -> dict[str, float]:
    """Megabytes of a real step, and resident ones."""
    config = configured(setting)
    device = distributed.choose_device(config.device)
    shape = worst_shape(config, at_resolution(stage_of(config, setting.stage).input, setting.resolution))
    alone = in_one_process(config, setting.stage, setting.batch)
    stage = new_stage(alone, setting.stage, device, setting.batch)
    pair = worst_pair(stage.module, setting.batch, shape, config.data.max_boxes, device)
    choose_memory(stage, pair)
    before = resident()
    for _ in range(2):
        train_step(stage, *pair).read()
    after = resident()
    peak = count_step(stage, pair).peak
    return {"measured_mb": round(peak / 1e6, 1), "resident_before_mb": before, "resident_mb": after}


def resident() -> float:
    """Megabytes: the largest resident set so far of this process alone (Linux counts it anew for each program)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None, "no /proc"
    return round(int(found[1]) * 1024 / 1e6, 1)


if __name__ == "__main__":
    main()
