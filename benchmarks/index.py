"""Import, opening, reading and memory of an index at the size of Objects365, beside pycocotools.

    python benchmarks/index.py [--images 600000 --boxes 9600000] [--peer-images 60000] [--folder DIR] [--json]

Makes a COCO JSON file (1.5 GB at full size), imports it without pictures in a process of its own, and measures that
process, fresh processes that open the index, reads of random images, and workers, forked and spawned. The peer reads
a smaller file of the same kind, in the same run; ratios are peer over ours.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gesso.data.index import Index

CATEGORIES = 365
BLOCK = 100_000


def write_coco(file: Path, *, images: int, boxes: int, seed: int = 0) -> None:
    """A COCO file with the shape of Objects365: images first, many classes, one box in fifty beyond the border."""
    rng = np.random.default_rng(seed)
    with file.open("w", encoding="ascii") as out:
        categories = [{"id": k, "name": f"class {k}", "supercategory": "none"} for k in range(1, CATEGORIES + 1)]
        out.write(f'{{"info": {{}}, "categories": {json.dumps(categories)}, "images": [')
        for start in range(0, images, BLOCK):
            count = min(BLOCK, images - start)
            rows = (
                f'{{"id": {k}, "file_name": "images/v1/patch{k % 51}/objects365_v1_{k:08d}.jpg", '
                f'"width": 640, "height": 480, "license": 5}}'
                for k in range(start + 1, start + count + 1)
            )
            out.write((", " if start else "") + ", ".join(rows))
        out.write('], "annotations": [')
        for start in range(0, boxes, BLOCK):
            count = min(BLOCK, boxes - start)
            ids = np.arange(start + 1, start + count + 1)
            image = np.sort(rng.integers(1, images + 1, count)) if start % 2 else rng.integers(1, images + 1, count)
            width, height = rng.uniform(4, 300, (2, count))
            x = rng.uniform(0, 1, count) * (640 - width) + np.where(rng.random(count) < 0.02, 40, 0)
            y = rng.uniform(0, 1, count) * (480 - height)
            columns = (ids, image, rng.integers(1, CATEGORIES + 1, count), x, y, width, height, width * height)
            rows = (
                f'{{"id": {a}, "image_id": {b}, "category_id": {c}, "bbox": [{d:.4f}, {e:.4f}, {f:.4f}, {g:.4f}], '
                f'"area": {h:.4f}, "iscrowd": 0, "isfake": 0}}'
                for a, b, c, d, e, f, g, h in zip(*(column.tolist() for column in columns), strict=True)
            )
            out.write((", " if start else "") + ", ".join(rows))
        out.write("]}\n")


def measured(code: str, *words: str) -> dict[str, Any]:
    """Runs Python ``code`` in a fresh process; it prints JSON. Adds the peak memory of that process."""
    tail = (
        "\nimport json, resource\n"
        "found['peak_mb'] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "print(json.dumps(found))"
    )
    done = subprocess.run([sys.executable, "-c", code + tail, *words], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


IMPORT = """
import sys, time
from gesso.data.importing import import_data
start = time.perf_counter()
summary = import_data(sys.argv[1], sys.argv[2], images=False)
found = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time(),
         "images": summary.images, "boxes": summary.boxes, "issues": sum(summary.issues.values())}
"""
OPEN = """
import sys, time
from gesso.data.index import Index
start = time.perf_counter()
index = Index.open(sys.argv[1])
opened = time.perf_counter()
index.objects(len(index) // 2)
found = {"open_ms": 1e3 * (opened - start), "first_read_ms": 1e3 * (time.perf_counter() - opened)}
"""
PEER = """
import contextlib, io, sys, time
from pycocotools.coco import COCO
start = time.perf_counter()
with contextlib.redirect_stdout(io.StringIO()):
    coco = COCO(sys.argv[1])
found = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time()}
ids = list(coco.imgs)[::7][:5000]
start = time.perf_counter()
for image in ids:
    coco.loadAnns(coco.getAnnIds(imgIds=[image]))
found["read_us"] = 1e6 * (time.perf_counter() - start) / len(ids)
"""


def read_us(index: Index, reads: int, seed: int = 0) -> float:
    """Microseconds to get and copy boxes and labels of a random image."""
    rows = np.random.default_rng(seed).integers(0, len(index), reads).tolist()
    start = time.perf_counter()
    for row in rows:
        objects = index.objects(row)
        objects.xyxy.copy(), objects.labels.copy()
    return 1e6 * (time.perf_counter() - start) / reads


def private_mb() -> float:
    """Memory of this process alone (USS), in MB."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def forked_mb(path: Path, reads: int) -> list[float]:
    """USS of each of four forked workers after their reads. The parent holds the opened index."""
    index = Index.open(path)
    read_us(index, 1000)
    reader, writer = os.pipe()
    go_reader, go_writer = os.pipe()
    children = []
    for worker in range(4):
        child = os.fork()
        if child == 0:
            read_us(index, reads, seed=worker)
            os.write(writer, f"{private_mb():.3f}\n".encode())
            os.read(go_reader, 1)
            os._exit(0)
        children.append(child)
    text = b""
    while text.count(b"\n") < 4:
        text += os.read(reader, 1000)
    os.write(go_writer, b"0000")
    for child in children:
        os.waitpid(child, 0)
    return [float(line) for line in text.split()]


SPAWNED = """
import importlib
import random
import sys
from pathlib import Path
from gesso.data.index import Index
index = Index.open(sys.argv[1])
for module in sys.argv[3:]:
    importlib.import_module(module)
for _ in range(int(sys.argv[2])):
    index.objects(random.randrange(len(index)))
lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
print(sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024, flush=True)
sys.stdin.read(1)
"""


def spawned_mb(path: Path, reads: int, *modules: str) -> list[float]:
    """USS of each of four fresh processes that import ``gesso.data.index`` and ``modules``, all alive at once."""
    command = [sys.executable, "-c", SPAWNED, str(path), str(reads), *modules]
    workers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    found = [float(worker.stdout.readline()) for worker in workers if worker.stdout is not None]
    for worker in workers:
        worker.communicate("x")
    return found


def run(folder: Path, *, images: int, boxes: int, peer_images: int, reads: int, emit: Callable[..., None]) -> None:
    file, out = folder / "train.json", folder / "index"
    start = time.perf_counter()
    write_coco(file, images=images, boxes=boxes)
    emit("make", seconds=time.perf_counter() - start, mb=file.stat().st_size / 1e6, images=images, boxes=boxes)
    emit("import", **measured(IMPORT, str(file), str(out)))
    emit("index_size", mb=sum(f.stat().st_size for f in out.iterdir()) / 1e6)
    opens = [measured(OPEN, str(out)) for _ in range(15)]
    emit("open", first_ms=opens[0]["open_ms"], median_ms=statistics.median(one["open_ms"] for one in opens),
         first_read_ms=statistics.median(one["first_read_ms"] for one in opens))  # fmt: skip
    index = Index.open(out)
    read_us(index, 1000)
    ours_us = statistics.median(read_us(index, reads, seed) for seed in range(3))
    emit("read", us=ours_us, reads=reads)
    emit("forked_workers", private_mb=max(forked_mb(out, reads)), workers=4)
    emit("spawned_workers", private_mb=max(spawned_mb(out, reads)), workers=4)
    # What a spawned worker of the loader imports when it unpickles its builder: torch, OpenCV, Pillow.
    emit("spawned_loader_workers", private_mb=max(spawned_mb(out, reads, "gesso.data.samples")), workers=4)
    file.unlink()
    if not peer_images:
        return
    small = folder / "small.json"
    write_coco(small, images=peer_images, boxes=16 * peer_images)
    ours = measured(IMPORT, str(small), str(folder / "small"))
    opened = measured(OPEN, str(folder / "small"))
    peer = measured(PEER, str(small))
    emit("peer", peer="pycocotools", images=peer_images, boxes=16 * peer_images, peer_seconds=peer["seconds"],
         import_seconds=ours["seconds"], ratio_import=peer["seconds"] / ours["seconds"],
         ratio_import_cpu=peer["cpu_seconds"] / ours["cpu_seconds"],
         ratio_open=1e3 * peer["seconds"] / opened["open_ms"], ratio_peak=peer["peak_mb"] / ours["peak_mb"],
         ratio_read=peer["read_us"] / ours_us)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=600_000)
    parser.add_argument("--boxes", type=int, default=9_600_000)
    parser.add_argument("--peer-images", type=int, default=60_000, help="0 leaves the peer out")
    parser.add_argument("--reads", type=int, default=50_000)
    parser.add_argument("--folder", type=Path, help="where to make the files (2.5 GB at full size)")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()

    def emit(name: str, **values: float | str) -> None:
        row = {"benchmark": name, **{k: round(v, 3) if isinstance(v, float) else v for k, v in values.items()}}
        print(json.dumps(row) if given.json else "  ".join(f"{k}={v}" for k, v in row.items()), flush=True)

    with tempfile.TemporaryDirectory(prefix="gesso-index-", dir=given.folder) as folder:
        run(Path(folder), images=given.images, boxes=given.boxes, peer_images=given.peer_images, reads=given.reads,
            emit=emit)  # fmt: skip


if __name__ == "__main__":
    main()
