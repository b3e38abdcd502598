"""From ``gesso train`` to the first step on an index of Objects365's size.

    uv run python benchmarks/first_step.py [--images 600000 --boxes 9600000] [--workers 2] [--json]

Makes an index (not a COCO file) whose pictures are a few real files, then starts the command line in a process of its
own, in eager mode on the CPU with the recipe direct:small, and waits for the first row of metrics.jsonl.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from gesso.data.index_writer import IndexWriter
from gesso.data.records import ImageBlock, ObjectBlock, Source, Strings
from gesso.label_space import LabelSpace

CATEGORIES, FILES = 365, 8
WIDTH, HEIGHT = 640, 480


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=600_000)
    parser.add_argument("--boxes", type=int, default=9_600_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        index = make_index(folder, arguments.images, arguments.boxes)
        seconds = sorted(first_step(index, folder / f"run{i}", arguments.workers) for i in range(arguments.repeat))
    row = {
        "images": arguments.images,
        "boxes": arguments.boxes,
        "seconds_to_first_step": round(seconds[len(seconds) // 2], 2),
        "all": [round(s, 2) for s in seconds],
        "goal": 15.0,
    }
    print(json.dumps(row) if arguments.json else "  ".join(f"{key} {value}" for key, value in row.items()))


def make_index(folder: Path, images: int, boxes: int) -> Path:
    """An index of ``images`` rows over a few JPEG files, with random boxes."""
    rng = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    for number in range(FILES):
        noise = rng.integers(0, 256, (HEIGHT // 16, WIDTH // 16, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((WIDTH, HEIGHT)).save(folder / "pictures" / f"{number}.jpg", quality=90)
    space = LabelSpace.from_names(f"class {k}" for k in range(CATEGORIES))
    writer = IndexWriter(folder / "index", space, sources=[Source(name="made", root=str(folder / "pictures"))])
    writer.add_images(
        ImageBlock(
            ids=np.arange(1, images + 1),
            names=Strings.of(f"{k % FILES}.jpg" for k in range(images)),
            widths=np.full(images, WIDTH, np.int32),
            heights=np.full(images, HEIGHT, np.int32),
        )
    )
    corner = rng.uniform(0, 1, (boxes, 2)).astype(np.float32) * np.float32((WIDTH - 200, HEIGHT - 200))
    xyxy = np.concatenate([corner, corner + rng.uniform(8, 200, (boxes, 2)).astype(np.float32)], 1)
    writer.add_objects(
        ObjectBlock(rows=rng.integers(0, images, boxes), xyxy=xyxy, labels=rng.integers(0, CATEGORIES, boxes))
    )
    return writer.finish()


def first_step(index: Path, out: Path, workers: int) -> float:
    """Seconds from the start of the process to the first row of metrics.jsonl."""
    command = [sys.executable, "-m", "gesso", "train", "direct:small", "--out", str(out), "--data.train", str(index)]
    command += ["--data.workers", str(workers), "--device", "cpu", "--pretraining.compile", "False"]
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        while not (out / "metrics.jsonl").exists():
            if process.poll() is not None:
                sys.exit(f"training ended early: {process.stderr.read().decode() if process.stderr else ''}")
            time.sleep(0.02)
        return time.monotonic() - began
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


if __name__ == "__main__":
    main()
