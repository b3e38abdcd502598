"""Detecting in one picture of 640 x 480: this project's detectors against torchvision's, from uint8 pixels to boxes.

    uv run python benchmarks/inference.py [--models faster_rcnn,mask_rcnn,retinanet] [--dtypes fp32,bf16]
        [--short 800 --long 1333] [--rounds 7] [--threads 2] [--device cpu|cuda] [--json]

Both resize to the same size and have the same form of detector with random weights; they take turns in one process, and
a ratio is that of the medians. Ours has torchvision's weights, so both find about the same number of objects.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import detectors
import numpy as np
import torch
from torch import nn

from gesso.data.transforms import InputConfig, KeepRatio
from gesso.label_space import LabelSpace
from gesso.models.build import build_detector
from gesso.models.torchvision_weights import to_ours
from gesso.run.predictor import TrainedDetector

HEIGHT, WIDTH = 480, 640


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(detectors.MODELS))
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--short", type=int, default=800)
    parser.add_argument("--long", type=int, default=1333)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for model in given.models.split(","):
        for dtype in given.dtypes.split(","):
            for row in compare(given, model, dtype):
                print(json.dumps(row) if given.json else "  ".join(f"{k} {v}" for k, v in row.items()), flush=True)


def compare(given: argparse.Namespace, model: str, dtype: str) -> Iterator[dict[str, Any]]:
    """One row: seconds of either, and their ratio."""
    torch.manual_seed(0)
    picture = torch.randint(0, 256, (HEIGHT, WIDTH, 3), dtype=torch.uint8).numpy()
    device = torch.device(given.device)
    peer = torchvision_detector(given, model)
    sides = {"ours": ours(given, model, dtype, peer, device), "torchvision": theirs(peer, device)}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    found: dict[str, int] = {}
    for number in range(given.rounds + 2):
        for name, detect in sides.items():
            began = time.perf_counter()
            with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
                found[name] = detect(picture)
            if number >= 2:
                seconds[name].append(time.perf_counter() - began)
    own, peer = (statistics.median(seconds[name]) for name in sides)
    yield {
        "model": model,
        "dtype": dtype,
        "batch": 1,
        "peer": "torchvision",
        "ratio": round(peer / own, 3),
        "ours_s": round(own, 4),
        "peer_s": round(peer, 4),
        "detections": [found["ours"], found["torchvision"]],
        "size": [given.short, given.long],
        "device": given.device,
    }


def ours(
    given: argparse.Namespace, model: str, dtype: str, peer: nn.Module, device: torch.device
) -> Callable[[np.ndarray], int]:
    """This project's detector behind its public door, with the peer's weights."""
    config = detectors.ours(model)
    detector = build_detector(config, detectors.CLASSES)
    detector.load_state_dict(to_ours(peer.state_dict(), config), strict=False)
    ready = TrainedDetector(
        model=detector.to(device).eval(),
        label_space=LabelSpace.from_names(str(k) for k in range(detectors.CLASSES)),
        input=InputConfig(resize=KeepRatio(short_sides=(given.short,), long_side=given.long)),
        device=device,
        batch_size=1,
        precision="bfloat16" if dtype == "bf16" else "float32",
    )
    return lambda picture: len(ready.predict([picture])[0])


def torchvision_detector(given: argparse.Namespace, model: str) -> nn.Module:
    """Logits are widened, so that some scores pass the threshold as they would after training."""
    detector = detectors.torchvision_detector(model, given.short, given.long, resize=True)
    with torch.no_grad():
        if model == "retinanet":
            for layer in detector.head.classification_head.conv.modules():
                if isinstance(layer, nn.Conv2d):
                    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            detector.head.classification_head.cls_logits.weight.mul_(10)
        else:
            detector.roi_heads.box_predictor.cls_score.weight.mul_(30)
    return detector


def theirs(peer: nn.Module, device: torch.device) -> Callable[[np.ndarray], int]:
    """torchvision's."""
    detector = peer.to(device).eval()

    def detect(picture: np.ndarray) -> int:
        image = torch.from_numpy(picture).to(device).permute(2, 0, 1).float().div(255)
        return len(detector([image])[0]["scores"].cpu())

    return detect


if __name__ == "__main__":
    main()
