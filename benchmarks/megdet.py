"""MegDet's claims in small: accuracy against the size of batch norm, and how large a batch still converges.

    uv run python benchmarks/megdet.py --out DIR [--parts norm,batch] [--seeds 3] [--processes 2] [--json]

The embedded scenes of the demo at 64 pixels, a ResNet-10-T with a pyramid, SGD. As the paper starts from ImageNet, all
runs start from the same weights: those of one run by AdamW on other scenes. Every run sees the same number of pictures,
in ``--processes`` processes over gloo.

- norm: batches of 64; batch norm takes its statistics over 2, 4, 8, 16, 32 and 64 pictures. In the paper (Table 3) the
  size 2 is worst, 32 best, and 64 loses again.
- batch: batches of 16 to 256 with linear scaling, without warm-up, with it, and with it and batch norm over 32 pictures
  (else over 2, what each GPU of the paper has). A run converges if no number is infinite and its AP50 reaches half of
  the best mean of its batch size 16.

With --json one object a line: a row for each run, then the means. DIR/rows.jsonl keeps the rows (a second call goes on
there), DIR/megdet.html shows the plots.
"""

import argparse
import dataclasses
import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from gesso import distributed
from gesso.data.demo import DemoConfig
from gesso.data.demo_index import demo_index
from gesso.data.transforms import InputConfig, KeepRatio
from gesso.errors import TrainingError
from gesso.models.norm import NormPolicy
from gesso.recipes.small import scratch_stage, small_detector
from gesso.reports.html import Plot, Plots, Report, Table, Text, write_report
from gesso.reports.plots import Series, line_plot
from gesso.run.config import DataConfig, RunConfig
from gesso.run.folder import RunFolder
from gesso.run.train import train
from gesso.training.optimizer import SGD
from gesso.training.schedule import ScheduleConfig
from gesso.training.stage import TrainingConfig

SIDE = 64
INPUT = InputConfig(resize=KeepRatio(short_sides=(SIDE,), long_side=SIDE), flip=0.0)
NORM_SIZES = (2, 4, 8, 16, 32, 64)
BATCHES = (16, 32, 64, 128, 256)
BASE_IMAGES = 16
ARMS = {"no warm-up": (False, 2), "warm-up": (True, 2), "warm-up, norm over 32": (True, 32)}
SCORES = ("AP", "AP50", "AP75")


def main() -> None:
    arguments = parse()
    if distributed.announced_world_size() == 1 and arguments.processes > 1:
        raise SystemExit(start(arguments.processes))
    torch.set_num_threads(1)
    distributed.initialise()
    rows_file = Path(arguments.out) / "rows.jsonl"
    rows = distributed.from_main(lambda: read(rows_file))
    distributed.from_main(lambda: make_data(Path(arguments.out) / "data", arguments.scenes))
    first_weights(arguments)
    known = {(row["part"], row["arm"], row["batch"], row["norm"], row["seed"]) for row in rows}
    for part in arguments.parts.split(","):
        for seed in range(arguments.seeds):
            for arm, batch, warmup, norm in PARTS[part](arguments.pictures):
                if (part, arm, batch, norm, seed) in known:
                    continue
                config = configuration(batch, warmup, norm, seed, arguments)
                row = {"part": part, "arm": arm, "batch": batch, "norm": norm, "seed": seed}
                row |= run(config, Path(arguments.out) / "run")
                rows.append(row)
                if distributed.is_main():
                    with rows_file.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
                    emit(row, arguments.json)
    if distributed.is_main():
        for row in means(rows):
            emit(row, arguments.json)
        report(rows, Path(arguments.out) / "megdet.html", arguments)
    distributed.shutdown()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="folder for the rows, the plots and the data")
    parser.add_argument("--parts", default="norm,batch")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--pictures", type=int, default=3200, help="pictures that each run sees")
    parser.add_argument("--base-rate", type=float, default=0.01, help="of a batch of 16")
    parser.add_argument("--scenes", type=int, default=1000, help="different training pictures")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def start(processes: int) -> int:
    """Calls this script again in several processes."""
    words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *sys.argv]
    return subprocess.call([sys.executable, *words], env=os.environ | {"OMP_NUM_THREADS": "1"})


def norm_runs(pictures: int) -> list[tuple[str, int, bool, int]]:
    return [("warm-up", 64, True, size) for size in NORM_SIZES]


def batch_runs(pictures: int) -> list[tuple[str, int, bool, int]]:
    return [(arm, batch, warmup, min(norm, batch)) for batch in BATCHES for arm, (warmup, norm) in ARMS.items()]


PARTS = {"norm": norm_runs, "batch": batch_runs}


def configuration(batch: int, warmup: bool, norm: int, seed: int, arguments: argparse.Namespace) -> RunConfig:
    """A run over ``arguments.pictures`` pictures; the rate is scaled by the batch, the warm-up takes a tenth."""
    steps = max(arguments.pictures // batch, 1)
    own = batch // distributed.world_size()
    policy = NormPolicy(kind="train" if own % norm == 0 else "sync", images=norm)
    return RunConfig(
        seed=seed,
        device="cpu",
        model=small_detector(),
        data=DataConfig(
            train=Path(arguments.out) / "data" / "train" / "index",
            val=Path(arguments.out) / "data" / "val" / "index",
            workers=0,
            inference_batch_size=50,
        ),
        training=TrainingConfig(
            steps=steps,
            batch_size=batch,
            precision="bfloat16",
            input=INPUT,
            optimizer=SGD(rate=arguments.base_rate),
            schedule=ScheduleConfig(
                kind="multi_step",
                base_images=BASE_IMAGES,
                warmup_steps=steps // 10 if warmup else 0,
                warmup_ratio=None,
                milestones=(8 / 11, 10 / 11),
            ),
            norm=policy,
            log_every=max(steps // 10, 1),
            checkpoint_every=1_000_000,
            evaluate_every=1_000_000,
            keep_checkpoints=1,
        ),
    )


def make_data(folder: Path, images: int) -> None:
    """The scenes that all runs share."""
    look: dict[str, Any] = {"side": SIDE, "objects": (1, 4), "scale": (0.25, 0.5), "occlusion": 0.3, "crowding": 0.1}
    demo_index(folder / "train", DemoConfig(images=images, **look))
    demo_index(folder / "val", DemoConfig(images=200, split="val", **look))
    demo_index(folder / "other", DemoConfig(images=images, seed=1, **look))


def first_weights(arguments: argparse.Namespace) -> None:
    """Trains the weights that all runs start from, once."""
    folder = Path(arguments.out) / "first"
    if (folder / "report.html").exists():
        return
    distributed.from_main(lambda: shutil.rmtree(folder, ignore_errors=True))
    stage = scratch_stage(INPUT, steps=300, checkpoint_every=10_000, evaluate_every=10_000)
    stage = dataclasses.replace(stage, batch_size=16, precision="bfloat16")
    config = configuration(16, True, 16, 0, arguments)
    data = dataclasses.replace(config.data, train=Path(arguments.out) / "data" / "other" / "index")
    scores = train(dataclasses.replace(config, training=stage, data=data), folder).scores or {}
    if distributed.is_main():
        emit({"part": "first weights", **{name: round(scores[name], 4) for name in SCORES}}, arguments.json)


def run(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Trains in ``folder`` and gives the scores; a run that is not finite has none."""
    distributed.from_main(lambda: shutil.rmtree(folder, ignore_errors=True))
    began = time.perf_counter()
    try:
        scores = train(config, folder, init=folder.with_name("first")).scores or {}
    except TrainingError as error:
        return {"AP": None, "AP50": None, "AP75": None, "loss": None, "error": error.what[:120]}
    losses = distributed.from_main(lambda: [row["loss"] for row in RunFolder.open(folder).rows() if "loss" in row])
    found: dict[str, Any] = {name: round(scores[name], 4) for name in SCORES}
    return found | {"loss": round(losses[-1], 4), "seconds": round(time.perf_counter() - began, 1)}


def read(file: Path) -> list[dict[str, Any]]:
    file.parent.mkdir(parents=True, exist_ok=True)
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each setting, over its seeds; a run that is not finite counts as 0."""
    groups: dict[tuple[str, str, int, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["part"], row["arm"], row["batch"], row["norm"]), []).append(row)
    found = []
    for (part, arm, batch, norm), some in groups.items():
        values = {name: [row[name] or 0.0 for row in some] for name in SCORES}
        found.append(
            {
                "part": f"{part} mean",
                "arm": arm,
                "batch": batch,
                "norm": norm,
                "seeds": len(some),
                **{name: round(statistics.mean(values[name]), 4) for name in SCORES},
                "AP_low": min(values["AP"]),
                "AP_high": max(values["AP"]),
                "failed": sum(row["AP"] is None for row in some),
            }
        )
    return found


def converged(rows: list[dict[str, Any]]) -> list[tuple[str, int]]:
    """Of each arm the largest batch all of whose seeds converge."""
    some = [row for row in rows if row["part"] == "batch"]
    best = max((m["AP50"] for m in means(some) if m["batch"] == min(BATCHES)), default=0.0)
    found = []
    for arm in ARMS:
        good = [
            batch
            for batch in BATCHES
            if (own := [row for row in some if row["arm"] == arm and row["batch"] == batch])
            and all((row["AP50"] or 0.0) >= best / 2 for row in own)
        ]
        found.append((arm, max(good, default=0)))
    return found


def verdict(rows: list[dict[str, Any]]) -> str:
    """Whether the paper's direction holds."""
    sizes = {m["norm"]: m["AP"] for m in means(rows) if m["part"] == "norm mean"}
    parts = []
    if set(NORM_SIZES) <= sizes.keys():
        best = max(sizes, key=lambda size: sizes[size])
        worst = min(sizes, key=lambda size: sizes[size])
        loses = sizes[64] < sizes[32]
        parts.append(
            f"Batch norm over {best} pictures is best and over {worst} worst (the paper: 32 and 2); 64 "
            f"{'loses against 32, as in the paper' if loses else 'does not lose against 32, unlike in the paper'}."
        )
    if any(row["part"] == "batch" for row in rows):
        largest = ", ".join(f"{arm}: {batch or 'none'}" for arm, batch in converged(rows))
        parts.append(f"The largest batch that converges: {largest}.")
    return " ".join(parts)


def report(rows: list[dict[str, Any]], path: Path, arguments: argparse.Namespace) -> None:
    """The page with the plots; no number stands on it that is not in rows.jsonl."""
    some = means(rows)
    plots = []
    sizes = sorted((m for m in some if m["part"] == "norm mean"), key=lambda m: m["norm"])
    if sizes:
        x = [math.log2(m["norm"]) for m in sizes]
        names = (("mean of the seeds", "AP"), ("lowest", "AP_low"), ("highest", "AP_high"))
        lines = [Series(name=name, x=x, y=[m[key] for m in sizes]) for name, key in names]
        caption = "AP against the pictures that batch norm takes its statistics over, batches of 64"
        svg = line_plot(lines, x_label="log2 of the pictures of a group", y_label="AP", dots=True)
        plots.append(Plot(svg=svg, caption=caption, alt=caption))
    batches = [m for m in some if m["part"] == "batch mean"]
    if batches:
        lines = []
        for arm in ARMS:
            own = sorted((m for m in batches if m["arm"] == arm), key=lambda m: m["batch"])
            x = [math.log2(m["batch"]) for m in own]
            lines.append(Series(name=arm, x=x, y=[m["AP50"] for m in own]))
        caption = "AP50 against the pictures of a batch, with the rate scaled linearly and the same pictures seen"
        svg = line_plot(lines, x_label="log2 of the batch", y_label="AP50", dots=True)
        plots.append(Plot(svg=svg, caption=caption, alt=caption))
    columns = ("part", "arm", "batch", "norm", "seeds", "AP", "AP_low", "AP_high", "AP50", "failed")
    table = Table(title="Means", columns=columns, rows=tuple(tuple(m[c] for c in columns) for m in some))
    command = ("Again", f"python {shlex.join(sys.argv)}")
    sections = (Plots(title="Plots", plots=tuple(plots)), table, Text(title="Command", commands=(command,)))
    write_report(path, Report(title="MegDet's claims in small", summary=verdict(rows), sections=sections))


def emit(row: dict[str, Any], as_json: bool) -> None:
    line = json.dumps(row) if as_json else "  ".join(f"{key} {value}" for key, value in row.items())
    print(line, flush=True)


if __name__ == "__main__":
    main()
