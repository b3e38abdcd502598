"""A training step (forward, backward, SGD) of this project's detectors against those of its peers.

    uv run python benchmarks/train_step.py [--models faster_rcnn,mask_rcnn,retinanet] [--batches 2] [--dtypes fp32,bf16]
        [--height 320 --width 320] [--peers torchvision,detectron2,mmdet] [--rounds 3] [--threads 2]
        [--device cpu|cuda] [--compile] [--profile] [--json]

Every measurement is a process of its own, so that peak memory is that of one detector; ours and the peers take turns,
``--rounds`` times, and a ratio is that of the medians. torchvision runs in both memory layouts, and the faster one is
what we compare with. The floor is the time of our convolutions and linear layers alone, forward and backward at their
shapes. On a GPU the step runs under torch.cuda.set_sync_debug_mode("error"), and the share of the peak is that of the
rate which a large matrix product reaches in the same process. ``build_step`` is a hook for other scripts.
"""

import argparse
import contextlib
import json
import resource
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
import detectors

from gesso.models.layers import RegionLinear
from gesso.training.optimizer import SGD, build_optimizer

NAMES = {"fasterrcnn": "faster_rcnn", "maskrcnn": "mask_rcnn"}


def main() -> None:
    given = arguments()
    if given.child:
        print(json.dumps(measure(given)))
        return
    for model in given.models.split(","):
        for batch in map(int, given.batches.split(",")):
            for dtype in given.dtypes.split(","):
                for row in compare(given, model, batch, dtype):
                    print(json.dumps(row) if given.json else "  ".join(f"{k} {v}" for k, v in row.items()), flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(detectors.MODELS))
    parser.add_argument("--batches", default="2")
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--peers", default=",".join(detectors.PEERS))
    parser.add_argument("--height", type=int, default=320)
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--budget", type=float, default=12.0, help="seconds of timed steps, at least three steps")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="compile ours into one graph")
    parser.add_argument("--profile", action="store_true", help="where the time of ours goes")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    parser.add_argument("--layout", default="cl", help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(given: argparse.Namespace, model: str, batch: int, dtype: str) -> Iterator[dict[str, Any]]:
    """One row for each peer that is installed, and one for ours alone."""
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    wanted = ["ours", *(f"{peer}:{layout}" for peer in given.peers.split(",") for layout in ("nchw", "cl"))]
    for number in range(given.rounds):
        for who in list(wanted):
            found = child(given, model, batch, dtype, who, last=number == given.rounds - 1)
            if "skip" in found:
                wanted.remove(who)
                print(f"{who} {model} {dtype}: {found['skip']}", file=sys.stderr)
                continue
            runs[who].append(found)
    mine = runs.pop("ours")
    own = statistics.median(r["step_s"] for r in mine)
    common = {"model": model, "dtype": dtype, "batch": batch, "size": [given.height, given.width]}
    details = {k: v for k, v in mine[-1].items() if k not in ("step_s", "peak_mb")}
    memory = max(r["peak_mb"] for r in mine)
    row = {**common, "ours_s": round(own, 4), "images_per_s": round(batch / own, 3), "ours_mb": memory, **details}
    if "floor_s" in row:
        row["share_of_floor"] = round(row["floor_s"] / own, 3)
    if "peak_tflops" in row:
        row["share_of_peak"] = round(row["tflop"] / own / row["peak_tflops"], 3)
    yield row
    for peer in given.peers.split(","):
        layouts = {who: statistics.median(r["step_s"] for r in found) for who, found in runs.items() if peer in who}
        if layouts:
            best = min(layouts, key=lambda who: layouts[who])
            yield {
                **common,
                "peer": peer,
                "ratio": round(layouts[best] / own, 3),
                "ours_s": round(own, 4),
                "peer_s": round(layouts[best], 4),
                "peer_layout": best.split(":")[1],
                "ours_mb": memory,
                "peer_mb": min(r["peak_mb"] for r in runs[best]),
                "device": given.device,
                "compiled": given.compile,
            }


def child(given: argparse.Namespace, model: str, batch: int, dtype: str, who: str, *, last: bool) -> dict[str, Any]:
    """A measurement in a process of its own."""
    peer, _, layout = who.partition(":")
    words = [sys.executable, __file__, "--child", peer, "--models", model, "--batches", str(batch), "--dtypes", dtype]
    for name in ("height", "width", "steps", "warmup", "budget", "threads", "device"):
        words += [f"--{name}", str(getattr(given, name))]
    words += ["--layout", layout or "cl", *(["--compile"] if given.compile else [])]
    words += ["--profile"] if given.profile and last and peer == "ours" else []
    ran = subprocess.run(words, capture_output=True, text=True)
    lines = [line for line in ran.stdout.splitlines() if line.startswith("{")]
    if not lines:
        return {"skip": (ran.stderr.strip().splitlines() or ["no output"])[-1]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step, peak memory, and for ours the floor."""
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    device = torch.device(given.device)
    scene = detectors.Scene(int(given.batches), given.height, given.width)
    began = time.perf_counter()
    try:
        if given.child == "ours":
            detector, loss = detectors.build_ours(given.models, scene, device, given.compile)
        else:
            build = detectors.BUILDERS[given.child]
            detector, loss = build(given.models, scene, device, given.layout == "cl")
        step = make_step(detector, loss, given.dtypes, device, ours=given.child == "ours")
        step()
        first = time.perf_counter() - began
        seconds = timed(step, given, device)
    except Exception as error:  # noqa: BLE001  (a peer that cannot run is left out, whatever its reason)
        return {"skip": f"{type(error).__name__}: {str(error)[:200]}"}
    row: dict[str, Any] = {"step_s": seconds, "peak_mb": peak_memory(device)}
    if given.child == "ours":
        row |= floor(detector, loss, given, device) | {"first_step_s": round(first, 1)}
        if device.type == "cuda":
            row["peak_tflops"] = round(matmul_rate(given.dtypes), 1)
        if given.profile:
            row["profile"] = profile(step, device)
    return row


def make_step(
    detector: nn.Module, loss: Callable[[], Tensor], dtype: str, device: torch.device, *, ours: bool = True
) -> Callable[[], Tensor]:
    """Forward, backward and update; nothing of it is read on the host. Peers have torch's SGD as they come with it."""
    if ours:
        optimizer = build_optimizer(detector, SGD(rate=1e-9))
    else:
        trained = [parameter for parameter in detector.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=1e-9, momentum=0.9, weight_decay=1e-4)

    def step() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
            value = loss()
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        return value.detach()

    return step


def timed(step: Callable[[], Tensor], given: argparse.Namespace, device: torch.device) -> float:
    """The median of some steps; on a GPU the mean of all of them in one go, for ours without any wait in between."""
    for _ in range(given.warmup):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
        began = time.perf_counter()
        with no_waits() if given.child == "ours" else contextlib.nullcontext():
            for _ in range(given.steps * 3):
                step()
        torch.cuda.synchronize()
        return (time.perf_counter() - began) / (given.steps * 3)
    times: list[float] = []
    while len(times) < given.steps and (sum(times) < given.budget or len(times) < 3):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


@contextlib.contextmanager
def no_waits() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**20)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def floor(
    detector: nn.Module, loss: Callable[[], Tensor], given: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """The time of convolutions and linear layers alone, and their floating-point operations, forward and backward."""
    calls: list[tuple[nn.Module, tuple[int, ...], bool]] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        calls.append((module, tuple(inputs[0].shape), inputs[0].requires_grad))

    layers = (nn.Conv2d, nn.Linear, nn.ConvTranspose2d, RegionLinear)
    hooks = [m.register_forward_hook(note) for m in detector.modules() if isinstance(m, layers)]
    torch._dynamo.config.disable = True
    with torch.autocast(device.type, torch.bfloat16, enabled=given.dtypes == "bf16"):
        loss()
    torch._dynamo.config.disable = False
    for hook in hooks:
        hook.remove()
    seconds = sum(layer_seconds(*call, given.dtypes, device) for call in calls)
    return {"floor_s": round(seconds, 4), "tflop": round(sum(flops(*call) for call in calls) / 1e12, 4)}


def layer_seconds(module: nn.Module, shape: tuple[int, ...], differentiate: bool, dtype: str, device: Any) -> float:
    """The best of three, forward and backward."""
    x = torch.randn(shape, device=device)
    if x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    x = (x.bfloat16() if dtype == "bf16" else x).requires_grad_(differentiate)
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
            y = module(x)
        if y.requires_grad:
            y.backward(torch.ones_like(y))
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
        module.zero_grad(set_to_none=True)
    return best


def flops(module: Any, shape: tuple[int, ...], differentiate: bool) -> float:
    """Multiply-adds count as two; backward costs one forward for the weights and one for the input, where needed."""
    if isinstance(module, nn.Linear):
        forward = 2.0 * shape[0] * module.in_features * module.out_features
    elif isinstance(module, RegionLinear):
        forward = 2.0 * shape[0] * module.weight.numel()
    elif isinstance(module, nn.ConvTranspose2d):
        forward = 2.0 * shape[0] * shape[2] * shape[3] * module.weight.numel()
    else:
        rows, columns = (
            (shape[2 + i] + 2 * module.padding[i] - module.dilation[i] * (module.kernel_size[i] - 1) - 1)
            // module.stride[i]
            + 1
            for i in (0, 1)
        )
        forward = 2.0 * shape[0] * rows * columns * module.weight.numel()
    return forward * (1 + module.weight.requires_grad + differentiate)


def matmul_rate(dtype: str) -> float:
    """Tera floating-point operations a second of a large matrix product on this GPU."""
    n = 8192
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    a, b = (torch.randn(n, n, device="cuda", dtype=kind) for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(20):
        a @ b
    torch.cuda.synchronize()
    return 20 * 2 * n**3 / (time.perf_counter() - began) / 1e12


GROUPS = {
    "convolution": ("convolution", "conv2d", "conv_"),
    "linear": ("addmm", "linear", "::mm", "bmm"),
    "roi_align": ("roi_align", "embedding_bag"),
    "nms": ("nms",),
    "optimizer": ("_fused_sgd", "optimizer"),
    "norm": ("batch_norm",),
    "copy": ("copy_", "::cat", "contiguous"),
}


def profile(step: Callable[[], Tensor], device: torch.device) -> dict[str, float]:
    """Shares of the time by kind of operator, from torch's profiler; what is in no group is ``other``."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as record:
        step()
    shares: dict[str, float] = defaultdict(float)
    for event in record.key_averages():
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        group = next((g for g, words in GROUPS.items() if any(w in event.key for w in words)), "other")
        shares[group] += own
    total = sum(shares.values())
    return {name: round(share / total, 3) for name, share in sorted(shares.items(), key=lambda item: -item[1])}


def build_step(
    model: str, num_classes: int, size: int, batch: int, dtype: str, channels_last: bool, make_batch: Any
) -> Callable[[], Tensor]:
    """The hook of other scripts: a step of our detector, as a function without arguments."""
    del num_classes, channels_last, make_batch  # 80 classes, always channels_last, the same kind of batch
    scene = detectors.Scene(batch, size, size)
    detector, loss = detectors.build_ours(NAMES.get(model, model), scene, torch.device("cpu"), False)
    return make_step(detector, loss, dtype, torch.device("cpu"))


if __name__ == "__main__":
    main()
