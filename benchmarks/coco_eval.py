"""COCO box scores at the size of COCO's validation set: ours beside pycocotools, in one run, each in its own process.

    python benchmarks/coco_eval.py [--images 5000] [--classes 80] [--per-image 100] [--repeat 3] [--json]

Makes a ground truth and detections in a temporary folder, reads and scores both files with each, and prints seconds
(median; imports apart), peak memory of the process, the ratio, and whether the twelve numbers are equal bit for bit.
"""

import argparse
import contextlib
import io
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

KEYS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
WIDTH, HEIGHT = 640, 480


def make(folder: Path, images: int, classes: int, per_image: int) -> int:
    """Writes gt.json and dt.json; detections are jittered objects and noise, about half each. Returns the objects."""
    rng = np.random.default_rng(20)
    share = 1 / np.arange(1, classes + 1)
    share /= share.sum()
    annotations: list[dict[str, Any]] = []
    with (folder / "dt.json").open("w") as file:
        file.write("[")
        for image in range(1, images + 1):
            boxes, labels = _objects(rng, 1 + int(rng.poisson(6.4)), share)
            for box, label in zip(boxes.tolist(), labels.tolist(), strict=True):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image,
                        "category_id": label,
                        "bbox": box,
                        "area": round(0.7 * box[2] * box[3], 3),
                        "iscrowd": int(rng.random() < 0.01),
                    }
                )
            rows = _detections(rng, image, boxes, labels, per_image, share)
            file.write((",\n" if image > 1 else "\n") + ",\n".join(map(json.dumps, rows)))
        file.write("\n]\n")
    truth = {
        "images": [{"id": i, "width": WIDTH, "height": HEIGHT} for i in range(1, images + 1)],
        "annotations": annotations,
        "categories": [{"id": k, "name": f"class {k}"} for k in range(1, classes + 1)],
    }
    (folder / "gt.json").write_text(json.dumps(truth))
    return len(annotations)


def _objects(rng: np.random.Generator, count: int, share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    size = np.exp(rng.uniform(np.log(6), np.log(320), (count, 2)))
    corner = rng.random((count, 2)) * np.maximum([WIDTH, HEIGHT] - size, 1)
    return np.round(np.concatenate([corner, size], axis=1), 2), rng.choice(len(share), count, p=share) + 1


def _detections(
    rng: np.random.Generator, image: int, boxes: np.ndarray, labels: np.ndarray, count: int, share: np.ndarray
) -> list[dict[str, Any]]:
    found, noise_labels = _objects(rng, count, share)
    at = rng.integers(0, len(boxes), count)
    shake = rng.normal(0, 0.1, (count, 4)) * rng.random((count, 1)) * 2
    near = boxes[at] + shake * np.tile(boxes[at, 2:], 2)
    true = (rng.random(count) < 0.5) & (near[:, 2:] > 1).all(1)
    found[true] = np.round(near[true], 2)
    kept = np.where(true & (rng.random(count) < 0.9), labels[at], noise_labels)
    score = np.round(np.where(true, np.exp(-4 * np.abs(shake).mean(1)), 0.5) * rng.random(count), 4)
    columns = zip(kept.tolist(), found.tolist(), score.tolist(), strict=True)
    return [{"image_id": image, "category_id": k, "bbox": b, "score": s} for k, b, s in columns]


# Each process imports what it measures and nothing else, so imports stand inside the functions.


def measure_ours(folder: Path) -> tuple[float, list[float]]:
    from gesso.evaluation.coco import score_coco  # noqa: PLC0415

    start = time.perf_counter()
    scores = score_coco(folder / "gt.json", folder / "dt.json")
    return time.perf_counter() - start, [scores[key] for key in KEYS]


def measure_pycocotools(folder: Path) -> tuple[float, list[float]]:
    from pycocotools.coco import COCO  # noqa: PLC0415
    from pycocotools.cocoeval import COCOeval  # noqa: PLC0415

    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(folder / "gt.json")
        evaluation = COCOeval(truth, truth.loadRes(str(folder / "dt.json")), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return time.perf_counter() - start, evaluation.stats.tolist()


MEASURES = {"gesso": measure_ours, "pycocotools": measure_pycocotools}


def run_apart(what: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", what, "--folder", str(folder)]
    start = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout) | {"process_seconds": round(time.perf_counter() - start, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--per-image", type=int, default=100)
    parser.add_argument("--repeat", type=int, default=3, help="runs of ours; pycocotools runs once")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", choices=sorted(MEASURES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        seconds, stats = MEASURES[args.one](args.folder)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"seconds": seconds, "peak_rss_mb": round(peak), "stats": stats}))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        objects = make(folder, args.images, args.classes, args.per_image)
        peer = run_apart("pycocotools", folder)
        runs = [run_apart("gesso", folder) for _ in range(args.repeat)]
    ours = runs[0] | {"seconds": statistics.median(run["seconds"] for run in runs)}
    ours["process_seconds"] = statistics.median(run["process_seconds"] for run in runs)
    ours["peak_rss_mb"] = max(run["peak_rss_mb"] for run in runs)
    size = {"images": args.images, "classes": args.classes, "objects": objects}
    size["detections"] = args.images * args.per_image
    for what, row in (("pycocotools", peer), ("gesso", ours)):
        line = {"benchmark": "coco_eval", "what": what, **size, **{k: v for k, v in row.items() if k != "stats"}}
        line["seconds"] = round(line["seconds"], 3)
        line["AP"] = row["stats"][0]
        if what == "gesso":
            line |= {"peer": "pycocotools", "ratio": round(peer["seconds"] / row["seconds"], 1)}
            line["bit_equal"] = peer["stats"] == row["stats"]
        print(json.dumps(line) if args.json else "  ".join(f"{key} {value}" for key, value in line.items()), flush=True)


if __name__ == "__main__":
    main()
