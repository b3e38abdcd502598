"""VOC's AP, the miss rate and mIoU of 5,000 images each, from files to numbers.

    python benchmarks/scores.py [--metrics voc miss-rate miou] [--images 5000] [--repeat 3] [--json]

Makes ground truths and predictions in a temporary folder (boxes as ``coco_eval.py`` makes them, 100 detections an
image; label maps of 500 x 375 pixels and 21 classes, as indexed PNGs) and scores them as ``gesso score`` does. Each run
is a process of its own; given are the processor seconds of the scoring (median; imports apart), of the whole process,
and its peak memory. Run it with OMP_NUM_THREADS=1.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from coco_eval import make
from PIL import Image

CLASSES, WIDTH, HEIGHT = 21, 500, 375
DETECTIONS = 100


def make_boxes(folder: Path, images: int, classes: int) -> None:
    """Files of ``coco_eval.make`` whose objects have the fields of VOC and CityPersons."""
    folder.mkdir()
    make(folder, images, classes, DETECTIONS)
    truth = json.loads((folder / "gt.json").read_text())
    rng = np.random.default_rng(21)
    for annotation in truth["annotations"]:
        annotation["difficult"] = int(rng.random() < 0.1)
        annotation["ignore"] = int(rng.random() < 0.2)
        annotation["height"] = annotation["bbox"][3]
        annotation["vis_ratio"] = round(float(rng.uniform(0.2, 1)), 3)
    if classes == 1:
        truth["categories"][0]["name"] = "pedestrian"
    (folder / "gt.json").write_text(json.dumps(truth))


def make_maps(folder: Path, images: int) -> None:
    """Ellipses with a void border of five pixels; the predictions' are shifted a little, and have pixels of noise."""
    rng = np.random.default_rng(22)
    palette = rng.integers(0, 256, 768, np.uint8).tobytes()
    for name in ("gt", "dt"):
        (folder / name).mkdir(parents=True)
    for number in range(images):
        truth, prediction = np.zeros((2, HEIGHT, WIDTH), np.uint8)
        for _ in range(int(rng.integers(2, 7))):
            label, turn = int(rng.integers(1, CLASSES)), float(rng.uniform(0, 180))
            centre, axes = rng.integers(0, (WIDTH, HEIGHT)), rng.integers(15, 140, 2)
            moved = centre + rng.integers(-6, 7, 2)
            cv2.ellipse(truth, centre.tolist(), axes.tolist(), turn, 0, 360, 255, 5)
            cv2.ellipse(truth, centre.tolist(), axes.tolist(), turn, 0, 360, label, -1)
            cv2.ellipse(truth, centre.tolist(), axes.tolist(), turn, 0, 360, 255, 5)
            cv2.ellipse(prediction, moved.tolist(), axes.tolist(), turn, 0, 360, label, -1)
        prediction[rng.integers(0, HEIGHT, 300), rng.integers(0, WIDTH, 300)] = rng.integers(0, CLASSES, 300)
        for name, array in (("gt", truth), ("dt", prediction)):
            image = Image.fromarray(array, "P")
            image.putpalette(palette)
            image.save(folder / name / f"{number:06}.png")


MAKERS = {
    "voc": lambda folder, images: make_boxes(folder, images, 20),
    "miss-rate": lambda folder, images: make_boxes(folder, images, 1),
    "miou": make_maps,
}


# Each process imports what it measures and nothing else, so imports stand inside the functions.


def measure_voc(folder: Path) -> float:
    from gesso.evaluation.voc import score_voc  # noqa: PLC0415

    start = time.process_time()
    assert score_voc(folder / "gt.json", folder / "dt.json")["mAP"] > 0
    return time.process_time() - start


def measure_miss_rate(folder: Path) -> float:
    from gesso.evaluation.miss_rate import score_miss_rate  # noqa: PLC0415

    start = time.process_time()
    assert 0 < score_miss_rate(folder / "gt.json", folder / "dt.json")["MR"] < 1
    return time.process_time() - start


def measure_miou(folder: Path) -> float:
    from gesso.evaluation.segmentation import score_segmentation  # noqa: PLC0415

    start = time.process_time()
    assert score_segmentation(folder / "gt", folder / "dt", num_classes=CLASSES)["mIoU"] > 0
    return time.process_time() - start


def measure_trimap(folder: Path) -> float:
    from gesso.evaluation.segmentation import score_segmentation  # noqa: PLC0415

    start = time.process_time()
    assert score_segmentation(folder / "gt", folder / "dt", num_classes=CLASSES, trimap=10)["mIoU"] > 0
    return time.process_time() - start


MEASURES = {
    "voc": measure_voc,
    "miss-rate": measure_miss_rate,
    "miou": measure_miou,
    "miou --trimap 10": measure_trimap,
}


def run_apart(what: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", what, "--folder", str(folder)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--metrics", nargs="+", choices=sorted(MAKERS), default=list(MAKERS))
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", choices=sorted(MEASURES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        seconds = MEASURES[args.one](args.folder)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"cpu_seconds": seconds, "process_cpu_seconds": time.process_time(), "peak_rss_mb": peak}))
        return
    for metric in args.metrics:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "files"
            MAKERS[metric](folder, args.images)
            for what in (one for one in MEASURES if one.split()[0] == metric):
                runs = [run_apart(what, folder) for _ in range(args.repeat)]
                line: dict[str, Any] = {"benchmark": "scores", "what": what, "images": args.images}
                for key in ("cpu_seconds", "process_cpu_seconds"):
                    line[key] = round(statistics.median(run[key] for run in runs), 2)
                line["peak_rss_mb"] = round(max(run["peak_rss_mb"] for run in runs))
                shown = json.dumps(line) if args.json else "  ".join(f"{key} {value}" for key, value in line.items())
                print(shown, flush=True)


if __name__ == "__main__":
    main()
