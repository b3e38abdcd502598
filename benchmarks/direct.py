"""Does pre-training pay off on real pictures, at equal compute? From scratch, direct, and from the largest set.

    uv run python benchmarks/direct.py --data DIR [--sets bccd,raccoon,playing_cards] [--largest pretrain_mix]
        [--seeds 3] [--seconds 150] [--json] [--plot FILE.svg]

DIR holds one folder a set with COCO files for training and validation (``train.json`` and ``val.json``, or what
``gesso data import`` finds). All arms use the small detector (ResNet-10-T, random weights):

- scratch: at full resolution, from random weights.
- direct: half the compute on the set itself at low resolution with large batches, half at full resolution with batch
  norm fixed (direct pre-training).
- transfer: half the compute on the largest set at low resolution, half on the set at full resolution with batch norm
  fixed; classes are joined by name.

The steps of each arm are chosen so that it trains for ``--seconds`` of processor time on one thread, by timing a few
steps of each stage first: that does not depend on what else the machine does. The measured processor time stands in
the table; that of the transfer arm holds its pre-training, which is made once a seed and counts in full for each set.
With --json one object a line: a row for each set, arm and seed, then the means.
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
from gesso.reports.plots import bar_plot
from gesso.run.config import DataConfig, RunConfig
from gesso.run.observer import Observer
from gesso.run.train import train
from gesso.training.stage import TrainingConfig

SETS = ("bccd", "raccoon", "playing_cards")
LARGEST = "pretrain_mix"
SCORES = ("AP", "AP50", "AP75")
ARMS = ("scratch", "direct", "transfer")
PACE_STEPS = 12
PRE_SHARE = 0.5  # of the seconds, spent at low resolution


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        large = read_set(Path(arguments.data) / arguments.largest, out / "largest")
        for name in arguments.sets.split(","):
            indexes = read_set(Path(arguments.data) / name, out / name)
            side = min(full_side(indexes["train"]), arguments.max_side)
            pace = measure_pace(indexes, side, out / name / "pace")
            pace["large"] = measure_pace(large, side, out / name / "pace", only="low")["low"]
            for seed in seeds:
                first = pretrain(large, side, pace["large"], arguments.seconds, seed, out / f"largest-{side}-{seed}")
                for arm, config in arms(indexes, side, pace, arguments.seconds, seed).items():
                    row = run_arm(name, arm, seed, config, out / name / f"{arm}-{seed}", first)
                    rows.append(row)
                    emit(row, arguments.json)
    summed = means(rows)
    for row in summed:
        emit(row, arguments.json)
    if arguments.plot is not None:
        draw(summed, arguments.plot)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of image sets")
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--largest", default=LARGEST, help="the set that the arm transfer pre-trains on")
    parser.add_argument("--plot", type=Path, help="an SVG file")
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


def measure_pace(indexes: dict[str, Index], side: int, out: Path, only: str = "") -> dict[str, float]:
    """Processor seconds of a step of each stage, or of one, after a warm start."""
    pace = {}
    for name, stage in stages(side).items():
        if only not in ("", name):
            continue
        config = RunConfig(
            model=small_detector(),
            data=DataConfig(train=indexes["train"].path, workers=0),
            training=dataclasses.replace(stage, steps=PACE_STEPS),
        )
        timer = Timer()
        train(config, out / name, observer=timer)
        pace[name] = statistics.median(b - a for a, b in itertools.pairwise(timer.times[2:]))
        shutil.rmtree(out / name)
    return pace


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """What the arm transfer starts from, and what it took."""

    path: Path
    seconds: float
    images: int


def pretrain(large: dict[str, Index], side: int, pace: float, seconds: float, seed: int, out: Path) -> Pretrained:
    """Half the compute on the largest set; made once for all sets of one resolution."""
    steps = max(round(PRE_SHARE * seconds / pace), 1)
    config = RunConfig(
        seed=seed,
        model=small_detector(),
        data=DataConfig(train=large["train"].path, workers=0),
        training=dataclasses.replace(stages(side)["low"], steps=steps),
    )
    kept = out / "pretrained.json"
    if not kept.exists():
        timer = Timer()
        images = train(config, out / "run", observer=timer).images
        kept.write_text(json.dumps({"seconds": timer.total(), "images": images}))
    return Pretrained(out / "run", **json.loads(kept.read_text()))


def arms(
    indexes: dict[str, Index], side: int, pace: dict[str, float], seconds: float, seed: int
) -> dict[str, RunConfig]:
    """All arms, each with the steps that fill ``seconds`` (transfer: the half that its pre-training leaves)."""
    plain = stages(side)
    data = DataConfig(train=indexes["train"].path, val=indexes["val"].path, workers=0)

    def filled(name: str, share: float) -> TrainingConfig:
        return dataclasses.replace(plain[name], steps=max(round(share * seconds / pace[name]), 1))

    base = RunConfig(seed=seed, model=small_detector(), data=data, training=filled("fine", 1 - PRE_SHARE))
    return {
        "scratch": dataclasses.replace(base, training=filled("scratch", 1.0)),
        "direct": dataclasses.replace(base, pretraining=filled("low", PRE_SHARE)),
        "transfer": base,
    }


def run_arm(name: str, arm: str, seed: int, config: RunConfig, out: Path, first: Pretrained) -> dict[str, Any]:
    timer, transfers = Timer(), arm == "transfer"
    done = train(config, out, observer=timer, init=first.path if transfers else None)
    shutil.rmtree(out)
    assert done.scores is not None
    seconds, images = timer.total() + first.seconds * transfers, done.images + first.images * transfers
    scores = {key: round(done.scores[key], 4) for key in SCORES}
    return {"set": name, "arm": arm, "seed": seed, **scores, "seconds": round(seconds, 1), "images": images}


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and range over the seeds, by set and arm, and the difference with the number of seeds that agree."""
    found = []
    for name in dict.fromkeys(row["set"] for row in rows):
        of_set = {arm: [row for row in rows if row["set"] == name and row["arm"] == arm] for arm in ARMS}
        for arm, some in of_set.items():
            row: dict[str, Any] = {"set": name, "arm": arm, "seeds": len(some)}
            for key in (*SCORES, "seconds", "images"):
                values = [one[key] for one in some]
                row[key] = round(statistics.mean(values), 4)
                row[f"{key}_range"] = [min(values), max(values)]
            found.append(row)
        for arm in ARMS[1:]:
            gains = [d["AP"] - s["AP"] for s, d in zip(of_set["scratch"], of_set[arm], strict=True)]
            gain = round(statistics.mean(gains), 4)
            found.append({"set": name, "arm": f"{arm} - scratch", "AP": gain, "seeds_won": sum(g > 0 for g in gains)})
    return found


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """AP by set, a bar for each arm."""
    sets = list(dict.fromkeys(row["set"] for row in rows))
    values = {(row["set"], row["arm"]): row["AP"] for row in rows}
    path.write_text(bar_plot(sets, [(arm, [values[one, arm] for one in sets]) for arm in ARMS], x_label="AP"))


def emit(row: dict[str, Any], as_json: bool) -> None:
    print(json.dumps(row) if as_json else "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
