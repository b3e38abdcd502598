"""``gesso demo``: the main job on embedded data."""

import time
from dataclasses import dataclass
from pathlib import Path

from gesso.commands.interruption import command_line, graceful_stop
from gesso.commands.observing import PREPARING
from gesso.commands.parsing import Result, parse, table
from gesso.comparison import compare, demo_arms, difference
from gesso.reports.progress import JobProgress, Stage

TRAINING = "training both"
TASK = (
    "Task: find and name handwritten digits (10 classes) in photographs of 128 pixels; 1,000 scenes to learn from, 200 "
    "with other digits and other photographs to be measured on."
)
NEXT = (
    ("Read your own pictures and boxes (COCO JSON, VOC or YOLO)", "gesso data import photos/ --out data/all"),
    ("Divide them", "gesso data split data/all --out data --val 0.2"),
    (
        "Pre-train and fine-tune on them",
        "gesso train direct:small --data.train data/train --data.val data/val --out runs/a",
    ),
    ("See what it finds in a new picture", "gesso predict runs/a holiday.jpg --out out/"),
)


@dataclass(frozen=True)
class DemoArguments:
    """Trains a small detector twice for the same time, from scratch and by direct pre-training, and compares them."""

    out: Path = Path("runs/demo")
    """The folder to make: data, both runs, report.html."""
    seed: int = 0
    """Another seed, another pair of runs on the same data."""
    resume: bool = False
    """Go on with an interrupted demo."""
    json: bool = False
    """Print JSON."""


def demo(words: list[str]) -> Result:
    """``gesso demo``."""
    given = parse(DemoArguments, words, "demo")
    arms = demo_arms(given.seed)
    began = time.monotonic()
    stages = [Stage(name=PREPARING, expected_seconds=15), Stage(name=TRAINING, expected_seconds=240)]
    again = command_line("demo", *words, *([] if given.resume else ["--resume"]))
    with graceful_stop() as stop, JobProgress(stages) as job:
        begun: set[str] = set()

        def show(stage: str, done: int, total: int, detail: str = "") -> None:
            if stage not in begun:
                begun.add(stage)
                job.begin(stage)
            job.update(done=done, total=total, detail=detail)

        results = compare(
            arms,
            given.out,
            title="Does pre-training pay off?",
            task=TASK,
            commands=NEXT,
            resume=given.resume,
            prepare=lambda what, done, total: show(PREPARING, done, total, what),
            progress=lambda done, total: show(TRAINING, done, total),
            should_stop=stop,
            how_to_resume=again,
        )
    rows = [(arm.title, *results[arm.name].values()) for arm in arms]
    gain = difference(results, "scratch", "direct")
    text = table(("", *results["scratch"]), [*rows, ("difference", *gain.values(), None, None)])
    report = (given.out / "report.html").absolute()
    text += f"\n\n{time.monotonic() - began:.0f} s in all. The report: {report.as_uri()}"
    return Result(text, results if given.json else None)
