"""Does direct pre-training pay off on real pictures? From scratch against direct, the same compute, several seeds.

    uv run python benchmarks/real_sets.py --data DIR [--sets bccd,raccoon] [--seeds 3] [--seconds 150] [--json]

DIR holds one folder a set with COCO files for training and validation (``train.json`` and ``val.json``, or what
``gesso data import`` finds). Both arms use the small detector (ResNet-10-T, random weights). The steps of each arm are
chosen so that it trains for ``--seconds`` of processor time on one thread, by timing a few steps of each stage first:
that does not depend on what else the machine does. The measured processor time stands in the table. With --json one
object a line: a row for each set, arm and seed, then the means.
"""

import argparse
import dataclasses
import itertools
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from gesso.data.importing import import_data
from gesso.data.index import Index
from gesso.data.transforms import Direct, InputConfig, KeepRatio
from gesso.errors import GessoError
from gesso.recipes.small import fine_tuning_stage, low_resolution_stage, scratch_stage, small_detector
from gesso.run.config import DataConfig, RunConfig
from gesso.run.observer import Observer
from gesso.run.train import train
from gesso.training.stage import TrainingConfig

SETS = ("bccd", "raccoon", "playing_cards", "chess_pieces")
SCORES = ("AP", "AP50", "AP75")
PRE_SHARE = 0.5  # of the seconds, spent at low resolution


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in arguments.sets.split(","):
            indexes = read_set(Path(arguments.data) / name, Path(scratch) / name)
            side = min(full_side(indexes["train"]), arguments.max_side)
            pace = measure_pace(indexes, side, Path(scratch) / name / "pace")
            for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
                for arm, config in arms(indexes, side, pace, arguments.seconds, seed).items():
                    row = run_arm(name, arm, seed, config, Path(scratch) / name / f"{arm}-{seed}")
                    rows.append(row)
                    emit(row, arguments.json)
    for row in means(rows):
        emit(row, arguments.json)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of image sets")
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=150.0, help="processor time of an arm's training")
    parser.add_argument("--max-side", type=int, default=192, help="largest full resolution (short side in pixels)")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def read_set(source: Path, out: Path) -> dict[str, Index]:
    """The indexes of the two splits, joined by category name."""
    try:
        import_data(source, out)
    except GessoError as error:
        sys.exit(f"{source}: {error}")
    return {split: Index.open(out / split) for split in ("train", "val")}


def full_side(index: Index) -> int:
    """The full resolution: the median short side of the training pictures as a multiple of 32, 128 to 256 pixels."""
    short = statistics.median(min(h, w) for h, w in zip(index.heights.tolist(), index.widths.tolist(), strict=True))
    return min(max(round(short / 32) * 32, 128), 256)


def stages(side: int) -> dict[str, TrainingConfig]:
    """The stages of both arms; the steps are set by ``arms``."""
    colour = {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2}
    full = InputConfig(resize=KeepRatio(short_sides=(side,), long_side=round(side * 4 / 3)), **colour)
    low = InputConfig(resize=Direct(side=round(side * 0.6 / 32) * 32), **colour)
    often = {"checkpoint_every": 10_000, "evaluate_every": 10_000, "keep_checkpoints": 1}
    return {
        "scratch": scratch_stage(full, steps=200, **often),
        "low": low_resolution_stage(low, steps=200, **often),
        "fine": fine_tuning_stage(full, steps=200, **often),
    }


class Timer(Observer):
    """Processor time after each step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def step(self, stage: str, step: int) -> None:
        self.times.append(time.process_time())

    def total(self) -> float:
        """Seconds of all steps; the first one's are taken to be the mean of the others."""
        return (self.times[-1] - self.times[0]) * len(self.times) / max(len(self.times) - 1, 1)


def measure_pace(indexes: dict[str, Index], side: int, out: Path, steps: int = 12) -> dict[str, float]:
    """Processor seconds of a step of each stage, after a warm start."""
    pace = {}
    for name, stage in stages(side).items():
        config = RunConfig(
            model=small_detector(),
            data=DataConfig(train=indexes["train"].path, workers=0),
            training=dataclasses.replace(stage, steps=steps),
        )
        timer = Timer()
        train(config, out / name, observer=timer)
        pace[name] = statistics.median(b - a for a, b in itertools.pairwise(timer.times[2:]))
        shutil.rmtree(out / name)
    return pace


def arms(
    indexes: dict[str, Index], side: int, pace: dict[str, float], seconds: float, seed: int
) -> dict[str, RunConfig]:
    """Both arms, each with the steps that fill ``seconds``."""
    plain = stages(side)
    data = DataConfig(train=indexes["train"].path, val=indexes["val"].path, workers=0)

    def filled(name: str, share: float) -> TrainingConfig:
        return dataclasses.replace(plain[name], steps=max(round(share * seconds / pace[name]), 1))

    return {
        "scratch": RunConfig(seed=seed, model=small_detector(), data=data, training=filled("scratch", 1.0)),
        "direct": RunConfig(
            seed=seed,
            model=small_detector(),
            data=data,
            pretraining=filled("low", PRE_SHARE),
            training=filled("fine", 1 - PRE_SHARE),
        ),
    }


def run_arm(name: str, arm: str, seed: int, config: RunConfig, out: Path) -> dict[str, Any]:
    timer = Timer()
    done = train(config, out, observer=timer)
    shutil.rmtree(out)
    assert done.scores is not None
    scores = {key: round(done.scores[key], 4) for key in SCORES}
    return {"set": name, "arm": arm, "seed": seed, **scores, "seconds": round(timer.total(), 1), "images": done.images}


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and range over the seeds, by set and arm, and the difference with the number of seeds that agree."""
    found = []
    for name in dict.fromkeys(row["set"] for row in rows):
        of_set = {
            arm: [row for row in rows if row["set"] == name and row["arm"] == arm] for arm in ("scratch", "direct")
        }
        for arm, some in of_set.items():
            row: dict[str, Any] = {"set": name, "arm": arm, "seeds": len(some)}
            for key in (*SCORES, "seconds", "images"):
                values = [one[key] for one in some]
                row[key] = round(statistics.mean(values), 4)
                row[f"{key}_range"] = [min(values), max(values)]
            found.append(row)
        gains = [d["AP"] - s["AP"] for s, d in zip(of_set["scratch"], of_set["direct"], strict=True)]
        gain = round(statistics.mean(gains), 4)
        found.append({"set": name, "arm": "direct - scratch", "AP": gain, "seeds_won": sum(g > 0 for g in gains)})
    return found


def emit(row: dict[str, Any], as_json: bool) -> None:
    print(json.dumps(row) if as_json else "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
