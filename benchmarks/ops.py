"""RoIAlign and NMS beside torchvision's, in one process, in turns.

    python benchmarks/ops.py [--threads 2] [--repeats 9] [--device cpu] [--json]

RoIAlign: 4 levels of a 320 px picture, 1024 RoIs in 2 pictures, 256 channels, float32. NMS: the boxes of a region
proposal network (8,819 in 5 levels) and those of a box head (5,000 in 365 classes), in clusters or spread out. The
figures are medians in ms; ratio is peer over ours, so above 1 we are faster. On a GPU, deterministic RoIAlign is
measured beside the other.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor

from gesso.models.ops.nms import batched_nms
from gesso.models.ops.roi_align import multilevel_roi_align

STRIDES = (4, 8, 16, 32)
SIDE = 320


def medians(repeats: int, device: str, *functions: Callable[[], object]) -> list[float]:
    """Median ms of each function, called in turns after one call that does not count."""
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(repeats + 1):
        for function, found in zip(functions, times, strict=True):
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                found.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(found) for found in times]


def result(
    bench: str, case: str, ours: float, peer: float, *, name: str = "torchvision", **more: Any
) -> dict[str, Any]:
    return {
        "bench": bench,
        "case": case,
        "peer": name,
        "ours_ms": round(ours, 3),
        "peer_ms": round(peer, 3),
        "ratio": round(peer / ours, 2),
        **more,
    }


def bench_roi_align(repeats: int, device: str) -> list[dict[str, Any]]:
    """Forward, and forward with backward, in both layouts of the maps; the gradient comes in that of the output."""
    torch.manual_seed(0)
    extent = 4 + torch.rand(2, 512, 2) ** 2 * 300
    centre = torch.rand(2, 512, 2) * SIDE
    boxes = torch.cat([centre - extent / 2, centre + extent / 2], dim=-1).clamp(0, SIDE).to(device)
    pooler = torchvision.ops.MultiScaleRoIAlign(list("0123"), 7, 2)
    found = []
    for layout, memory_format in (("nchw", torch.contiguous_format), ("channels_last", torch.channels_last)):
        maps = [torch.randn(2, 256, SIDE // s, SIDE // s, device=device) for s in STRIDES]
        maps = [m.contiguous(memory_format=memory_format).requires_grad_() for m in maps]

        def ours(maps: list[Tensor] = maps) -> Tensor:
            return multilevel_roi_align(maps, boxes, STRIDES)

        def peer(maps: list[Tensor] = maps) -> Tensor:
            pooled: Tensor = pooler(dict(zip("0123", maps, strict=True)), list(boxes), [(SIDE, SIDE)] * 2)
            return pooled

        def forward(align: Callable[[], Tensor]) -> Callable[[], object]:
            return torch.no_grad()(align)

        def both(align: Callable[[], Tensor], maps: list[Tensor] = maps) -> Callable[[], object]:
            gradient = torch.randn_like(align())
            return lambda: torch.autograd.grad(align(), maps, gradient)

        for step, make in (("forward", forward), ("forward+backward", both)):
            case = f"{step}, {layout}"
            found.append(result("roi_align", case, *medians(repeats, device, make(ours), make(peer))))
        if device == "cuda":
            plain = both(ours)

            def deterministic(run: Callable[[], object] = plain) -> None:
                torch.use_deterministic_algorithms(True)
                run()
                torch.use_deterministic_algorithms(False)

            fast, slow = medians(repeats, device, plain, deterministic)
            case = f"forward+backward, {layout}"
            found.append(result("roi_align", case, fast, slow, name="ours, deterministic"))
    return found


def boxes_of(kind: str, count: int) -> Tensor:
    """Boxes (count, 4) on 800 px: around 40 places, or anywhere."""
    if kind == "clustered":
        places, sizes = torch.rand(40, 2) * 800, 20 + torch.rand(40, 2) * 200
        which = torch.randint(0, 40, (count,))
        centre = places[which] + torch.randn(count, 2) * 0.15 * sizes[which]
        extent = sizes[which] * torch.exp(torch.randn(count, 2) * 0.15)
    else:
        centre, extent = torch.rand(count, 2) * 800, 10 + torch.rand(count, 2) * 150
    return torch.cat([centre - extent / 2, centre + extent / 2], dim=1)


def bench_nms(repeats: int, device: str) -> list[dict[str, Any]]:
    """One image, since the peer takes one; torchvision.ops.batched_nms picks its own way of doing it."""
    found = []
    for name, count, groups, threshold in (
        ("8819 boxes, 5 levels", 8819, 5, 0.7),
        ("5000 boxes, 365 classes", 5000, 365, 0.5),
    ):
        for kind in ("clustered", "spread"):
            torch.manual_seed(1)
            boxes, scores = boxes_of(kind, count).to(device), torch.rand(count, device=device)
            group = torch.randint(0, groups, (count,), device=device)
            valid = torch.ones(1, count, dtype=torch.bool, device=device)
            arguments = (boxes[None], scores[None], valid, group[None], threshold)
            kept = torchvision.ops.batched_nms(boxes, scores, group, threshold)
            same = torch.equal(batched_nms(*arguments)[0].nonzero().flatten(), kept.sort().values)
            ours, peer = medians(
                repeats,
                device,
                lambda a=arguments: batched_nms(*a),  # type: ignore[misc]
                lambda b=boxes, s=scores, g=group, t=threshold: torchvision.ops.batched_nms(b, s, g, t),  # type: ignore[misc]
            )
            found.append(result("nms", f"{name}, {kind}", ours, peer, kept=len(kept), same=same))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for bench in (bench_roi_align, bench_nms):
        for row in bench(arguments.repeats, arguments.device):
            row |= {"threads": arguments.threads, "device": arguments.device, "torch": torch.__version__}
            if arguments.json:
                print(json.dumps(row))
            else:
                print(
                    f"{row['bench']:10} {row['case']:38} ours {row['ours_ms']:9.2f} ms   "
                    f"{row['peer']} {row['peer_ms']:9.2f} ms   ratio {row['ratio']:.2f}"
                )


if __name__ == "__main__":
    main()
