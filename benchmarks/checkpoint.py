"""How long a checkpoint holds the training loop: written by it, and written by a thread beside it.

    uv run python benchmarks/checkpoint.py [--backbone resnet50] [--ema] [--repeat 5] [--folder DIR] [--json]

The detector is Faster R-CNN with a feature pyramid, the optimizer SGD with momentum. "held" is the time that the loop
cannot go on; "written" that until the checkpoint is whole on the disk. Beside the thread, matrix products stand for
training: "slower" is how much longer they take while it writes. On a GPU the products run there.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gesso.models.backbone import BackboneConfig
from gesso.models.build import build_detector
from gesso.models.faster_rcnn import FasterRCNNConfig
from gesso.training.checkpoint import CheckpointState, save_checkpoint, take_snapshot
from gesso.training.checkpoint_writer import CheckpointWriter
from gesso.training.ema import EMA
from gesso.training.optimizer import SGD, build_optimizer

CLASSES, SIDE = 80, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--ema", action="store_true", help="keep averages as well")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk that is measured; else a temporary one")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = BackboneConfig(name=arguments.backbone, pretrained=False)
    detector = build_detector(FasterRCNNConfig(backbone=backbone), CLASSES).to(device)
    optimizer, ema = build_optimizer(detector, SGD()), EMA(detector, 0.9) if arguments.ema else None
    given = (detector, optimizer, ema)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        folder = Path(scratch)
        write_at_once(folder, 0, given)  # the first one makes buffers and caches
        at_once = [write_at_once(folder, step, given) for step in range(1, arguments.repeat + 1)]
        meanwhile = [write_meanwhile(folder, step, given, device) for step in range(arguments.repeat + 1)][1:]
        size = sum(file.stat().st_size for file in (folder / f"{arguments.repeat:08d}").iterdir())
    rows = [
        {"way": "at once", "held_s": median(at_once), "written_s": median(at_once)},
        {"way": "meanwhile", **{key: median([row[key] for row in meanwhile]) for key in meanwhile[0]}},
    ]
    about = {"backbone": arguments.backbone, "ema": arguments.ema, "device": device.type, "mb": round(size / 1e6)}
    for row in rows:
        whole = about | row
        print(json.dumps(whole) if arguments.json else "  ".join(f"{key} {value}" for key, value in whole.items()))


def write_at_once(folder: Path, step: int, given: Any) -> float:
    synchronise()
    began = time.perf_counter()
    save_checkpoint(folder, state(step), *given, keep=1)
    return time.perf_counter() - began


def write_meanwhile(folder: Path, step: int, given: Any, device: torch.device) -> dict[str, float]:
    writer, work = CheckpointWriter(folder), products(device)
    work()
    alone = statistics.median(work() for _ in range(5))
    began = time.perf_counter()
    writer.begin(take_snapshot(folder, state(step), *given), keep=1)
    held = time.perf_counter() - began
    beside = []
    while writer.busy:
        beside.append(work())
    writer.result()
    written = time.perf_counter() - began
    writer.close()
    slower = statistics.mean(beside) / alone if beside else 1.0
    return {"held_s": held, "written_s": written, "slower": slower}


def products(device: torch.device) -> Callable[[], float]:
    matrix = torch.randn(SIDE, SIDE, device=device)

    def work() -> float:
        began = time.perf_counter()
        for _ in range(4):
            matrix @ matrix
        synchronise()
        return time.perf_counter() - began

    return work


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def state(step: int) -> CheckpointState:
    return CheckpointState(
        step=step,
        stage="training",
        stage_step=step,
        sample=0,
        seconds=0.0,
        world_size=1,
        threads=torch.get_num_threads(),
        config_hash="",
    )


def median(values: list[float]) -> float:
    return round(statistics.median(values), 3)


if __name__ == "__main__":
    main()
