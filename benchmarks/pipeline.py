"""Images/s of one core: decode and resize, the whole input pipeline, and decoding at reduced scale.

    python benchmarks/pipeline.py [--json] [--rounds 5] [--images 64] [--steepness 1.6]

640x480 JPEG files (quality 90, 4:2:0) of noise whose amplitude falls as frequency to the power of minus the steepness:
1 has the spectrum of a sharp photograph (200 kB), 1.6 that of the peers' figures in the plan (70 kB). All methods take
turns within a round, each is timed by the CPU seconds of its thread, and the median over the rounds counts; ratios are
of the same run.

- ``decode_resize`` beside Pillow and torchvision: the short side becomes 448.
- ``pipeline_*``: files to batches of 16 with boxes. The peer ``torchvision_transforms`` does the work of
  ``pipeline_direct`` with torchvision's own parts, as its detection references put them together: ``decode_image``,
  ``ScaleJitter`` from 0.8 to 1.2 of 448, ``RandomCrop`` that pads, flip, ``SanitizeBoundingBoxes``, collate, all in
  uint8; ``torchvision_reference`` ends as the references do, with ``ToDtype(float32, scale=True)``. Theirs resize with
  antialiasing, as is their default; ours does below half size.
- ``reduced``: photographs side by side at 640x480, 1280x960 and 4000x3000, for ``Direct(448)`` at inference and for
  (800, 1333): read and drawn as ``decode.py`` does beside full decoding, and the differences of the pixels (0 to 255).
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from skimage.data import astronaut, coffee
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.io import ImageReadMode, decode_image, decode_jpeg, read_file
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from gesso.data.decode import draw, read_picture, reduction
from gesso.data.index import Index
from gesso.data.index_writer import IndexWriter
from gesso.data.loading import training_batches
from gesso.data.placement import Placement
from gesso.data.records import ImageBlock, ObjectBlock, Source, Strings
from gesso.data.transforms import Direct, InputConfig, KeepRatio, inference_placement
from gesso.label_space import LabelSpace

WIDTH, HEIGHT, SHORT = 640, 480, 448
PLACEMENT = Placement((HEIGHT, WIDTH), (SHORT, 597), (0, 0), (SHORT, 597), (SHORT, 608))
BATCH, BOXES = 16, 16


def make_pictures(folder: Path, count: int, steepness: float, distinct: int = 8) -> list[Path]:
    """``count`` files, copies of ``distinct`` pictures of coloured noise."""
    distance = np.hypot(np.fft.fftfreq(HEIGHT)[:, None] * HEIGHT, np.fft.rfftfreq(WIDTH)[None] * WIDTH)
    paths = []
    for i in range(count):
        paths.append(folder / f"{i}.jpg")
        if i >= distinct:
            paths[-1].write_bytes(paths[i % distinct].read_bytes())
            continue
        white = np.random.default_rng(i).normal(size=(3, HEIGHT, WIDTH))
        noise = np.fft.irfft2(np.fft.rfft2(white) / np.maximum(distance, 1) ** steepness, s=(HEIGHT, WIDTH))
        grey = noise.mean(0)
        picture = 118 + 55 * (0.35 * noise / noise.std() + 0.85 * grey / grey.std())
        pixels = np.clip(picture, 0, 255).astype(np.uint8).transpose(1, 2, 0)
        Image.fromarray(np.ascontiguousarray(pixels)).save(paths[-1], "JPEG", quality=90, subsampling=2)
    return paths


def make_index(folder: Path, paths: list[Path]) -> Index:
    random = np.random.default_rng(0)
    count = len(paths)
    corner = random.uniform(0, (WIDTH - 200, HEIGHT - 200), (count * BOXES, 2))
    boxes = np.concatenate([corner, corner + random.uniform(5, 200, corner.shape)], 1)
    writer = IndexWriter(
        folder / "index", LabelSpace.from_names(["a"]), sources=[Source(name="noise", root=str(folder))]
    )
    sizes = (np.full(count, side, np.int32) for side in (WIDTH, HEIGHT))
    names = Strings.of(path.name for path in paths)
    writer.add_images(ImageBlock(ids=np.arange(count), names=names, widths=next(sizes), heights=next(sizes)))
    rows = np.repeat(np.arange(count), BOXES)
    writer.add_objects(ObjectBlock(rows=rows, xyxy=boxes.astype(np.float32), labels=np.zeros(len(rows), np.int64)))
    return Index.open(writer.finish())


def ours(path: Path) -> None:
    canvas = np.zeros((*PLACEMENT.canvas, 3), np.uint8)
    draw(read_picture(path), PLACEMENT, canvas)


def pillow(path: Path) -> None:
    with Image.open(path) as image:
        np.asarray(image.convert("RGB").resize((597, SHORT), Image.Resampling.BILINEAR))


def torchvision_uint8(path: Path) -> None:
    F.resize(decode_jpeg(read_file(str(path)), mode=ImageReadMode.RGB), [SHORT, 597], antialias=True)


def pipeline(index: Index, config: InputConfig) -> Callable[[], int]:
    batches = training_batches(index, config, seed=0, batch_size=BATCH)

    def run() -> int:
        for _ in range(max(len(index) // BATCH, 1)):
            next(batches)
        return max(len(index) // BATCH, 1) * BATCH

    return run


class TorchvisionSet(Dataset[Any]):
    """Pictures and boxes of the index through torchvision's transforms."""

    def __init__(self, index: Index, *, floating: bool) -> None:
        self.paths = [str(index.image_path(i)) for i in range(len(index))]
        self.boxes = [torch.from_numpy(index.objects(i).xyxy.copy()) for i in range(len(index))]
        self.transform = v2.Compose(
            [
                v2.ScaleJitter((SHORT, SHORT), (0.8, 1.2), antialias=True),
                v2.RandomCrop(SHORT, pad_if_needed=True),
                v2.RandomHorizontalFlip(0.5),
                *([v2.ToDtype(torch.float32, scale=True)] if floating else []),
                v2.SanitizeBoundingBoxes(),
                v2.ToPureTensor(),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        image = tv_tensors.Image(decode_image(self.paths[i], mode=ImageReadMode.RGB))
        boxes = tv_tensors.BoundingBoxes(self.boxes[i], format="XYXY", canvas_size=image.shape[1:])
        target = {"boxes": boxes, "labels": torch.zeros(len(boxes), dtype=torch.int64)}
        pair: tuple[torch.Tensor, dict[str, torch.Tensor]] = self.transform(image, target)
        return pair


def collate(pairs: list[tuple[torch.Tensor, dict[str, torch.Tensor]]]) -> tuple[torch.Tensor, list[Any]]:
    return torch.stack([image for image, _ in pairs]), [target for _, target in pairs]


def torchvision_pipeline(index: Index, *, floating: bool) -> Callable[[], int]:
    batches = DataLoader(
        TorchvisionSet(index, floating=floating), BATCH, shuffle=True, drop_last=True, collate_fn=collate
    )

    def run() -> int:
        return sum(len(images) for images, _ in batches)

    return run


def side_by_side(height: int, width: int) -> np.ndarray:
    """A picture of sharp photographs in rows, uint8 (height, width, 3)."""
    photographs = [*load_sample_images().images, astronaut(), coffee()]
    parts = [photograph[:400, :500] for photograph in photographs]
    columns = [np.roll(np.arange(4), -row) for row in range(-(-height // 400))]
    rows = [np.concatenate([parts[k] for k in np.resize(order, -(-width // 500))], 1) for order in columns]
    return np.ascontiguousarray(np.concatenate(rows)[:height, :width])


def onto(canvas: np.ndarray, path: Path, placement: Placement, told: Placement | None) -> Callable[[], int]:
    def run() -> int:
        draw(read_picture(path, told), placement, canvas)
        return 1

    return run


def reduced_rows(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Reading and drawing with decoding at reduced scale beside full decoding."""
    rows = []
    for width, height in ((640, 480), (1280, 960), (4000, 3000)):
        path = folder / f"{width}.jpg"
        Image.fromarray(side_by_side(height, width)).save(path, quality=90, subsampling=2)
        for name, resize in (("direct 448", Direct()), ("800, 1333", KeepRatio())):
            _, placement = inference_placement(InputConfig(resize=resize), height, width)
            whole, reduced = (np.zeros((*placement.canvas, 3), np.uint8) for _ in range(2))
            methods = {"full": onto(whole, path, placement, None), "reduced": onto(reduced, path, placement, placement)}
            speeds = measure(methods, rounds)
            high, wide = placement.size
            difference = np.abs(reduced.astype(int) - whole)[:high, :wide]
            rows.append(
                {
                    "benchmark": "pipeline",
                    "what": f"reduced, {name}",
                    "source": f"{width}x{height} JPEG, {path.stat().st_size / 1000:.0f} kB",
                    "images_per_second": round(speeds["reduced"], 1),
                    "peer": "full decoding",
                    "peer_images_per_second": round(speeds["full"], 1),
                    "ratio": round(speeds["reduced"] / speeds["full"], 3),
                    "reduction": reduction(placement),
                    "mean_difference": round(float(difference.mean()), 2),
                    "largest_difference": int(difference.max()),
                }
            )
    return rows


def over(paths: list[Path], method: Callable[[Path], None]) -> Callable[[], int]:
    def run() -> int:
        for path in paths:
            method(path)
        return len(paths)

    return run


def measure(methods: dict[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """Median images per CPU second of each method."""
    speeds: dict[str, list[float]] = {name: [] for name in methods}
    for number in range(rounds + 1):
        for name, run in methods.items():
            start = time.thread_time()
            count = run()
            if number:  # the first round warms up
                speeds[name].append(count / (time.thread_time() - start))
    return {name: statistics.median(values) for name, values in speeds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--steepness", type=float, default=1.6)
    options = parser.parse_args()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    keep = KeepRatio(short_sides=(SHORT,), long_side=746)
    with tempfile.TemporaryDirectory() as name:
        paths = make_pictures(Path(name), options.images, options.steepness)
        index = make_index(Path(name), paths)
        methods = {
            "decode_resize": over(paths, ours),
            "pillow": over(paths, pillow),
            "torchvision": over(paths, torchvision_uint8),
            "pipeline_keep_ratio": pipeline(index, InputConfig(resize=keep)),
            "pipeline_direct": pipeline(index, InputConfig(resize=Direct())),
            "pipeline_direct_colour": pipeline(
                index, InputConfig(resize=Direct(), brightness=0.2, contrast=0.2, saturation=0.2)
            ),
            "torchvision_transforms": torchvision_pipeline(index, floating=False),
            "torchvision_reference": torchvision_pipeline(index, floating=True),
        }
        speeds = measure(methods, options.rounds)
        kilobytes = sum(path.stat().st_size for path in paths) / len(paths) / 1000
        more = reduced_rows(Path(name), options.rounds)
    whats = ("decode_resize", "pipeline_keep_ratio", "pipeline_direct", "pipeline_direct_colour")
    pairs = [(peer, what) for peer in ("pillow", "torchvision") for what in whats]
    pairs += [(peer, "pipeline_direct") for peer in ("torchvision_transforms", "torchvision_reference")]
    rows = [
        {
            "benchmark": "pipeline",
            "what": what,
            "source": f"{WIDTH}x{HEIGHT} JPEG, {kilobytes:.0f} kB",
            "images_per_second": round(speeds[what], 1),
            "peer": peer,
            "peer_images_per_second": round(speeds[peer], 1),
            "ratio": round(speeds[what] / speeds[peer], 3),
        }
        for peer, what in pairs
    ]
    text = "{what:24} {images_per_second:7.1f} images/s   {peer}: {peer_images_per_second:7.1f}   x{ratio}   {source}"
    for row in rows + more:
        line = text.format(**row)
        if "reduction" in row:
            line += "   1/{reduction}, off by {mean_difference} in the mean and {largest_difference} at most".format(
                **row
            )
        print(json.dumps(row) if options.json else line)


if __name__ == "__main__":
    main()
