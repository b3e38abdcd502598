"""Batch norm over several processes beside torch's own in each process and beside one written by hand.

    python benchmarks/sync_norm.py [--world 2] [--batch 2] [--side 224] [--dtype float32] [--repeats 9] [--json]

Forward and backward of the 53 batch norms of a ResNet-50, in processes over gloo with one thread each, channels_last.
Torch's ``BatchNorm2d`` does not communicate; its ``SyncBatchNorm`` refuses the CPU. The one written by hand adds up
count, sum and sum of squares in one reduction forward and both sums in one backward. The figures are medians of
process 0 in ms, all three in turns: time that passed (ms) and time on the processor (cpu_ms), which leaves out the
waiting for other processes and other programs. ratio is peer over ours in time that passed and cpu_ratio in time on
the processor, so above 1 we are faster. A row a shape, and "all 53" is their sum, each as often as the network has it.
"""

import argparse
import json
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from gesso import distributed
from gesso.models.norm import NormPolicy, apply_norm_policy

SHAPES = (
    (64, 2, 1),
    (64, 4, 6),
    (256, 4, 4),
    (128, 4, 1),
    (128, 8, 7),
    (512, 8, 5),
    (256, 8, 1),
    (256, 16, 11),
    (1024, 16, 7),
    (512, 16, 1),
    (512, 32, 5),
    (2048, 32, 4),
)
"""Channels, stride, and how many norms of a ResNet-50 have them."""


class ByHand(torch.autograd.Function):
    """The obvious form: sums of x and x^2 in one reduction."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        C = x.shape[1]
        count = x.new_tensor([x.numel() // C], dtype=torch.float32)
        sums = torch.cat([x.sum((0, 2, 3)), x.square().sum((0, 2, 3)), count])
        distributed.all_reduce_sum(sums)
        mean, square = sums[:C] / sums[-1], sums[C:-1] / sums[-1]
        inverse = torch.rsqrt(square - mean.square() + eps)
        normalised = (x - mean.view(C, 1, 1)) * inverse.view(C, 1, 1)
        ctx.save_for_backward(normalised, weight, inverse, sums[-1])
        return (normalised * weight.view(C, 1, 1) + bias.view(C, 1, 1)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        normalised, weight, inverse, count = ctx.saved_tensors
        C = gradient.shape[1]
        of_bias, of_weight = gradient.float().sum((0, 2, 3)), (gradient * normalised).sum((0, 2, 3))
        sums = distributed.all_reduce_sum(torch.cat([of_bias, of_weight])) / count
        shift, slope = sums[:C].view(C, 1, 1), sums[C:].view(C, 1, 1)
        found = (gradient - shift - normalised * slope) * (weight * inverse).view(C, 1, 1)
        return found.to(gradient.dtype), of_weight, of_bias, None


class HandWritten(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = ByHand.apply(input, self.weight, self.bias, self.eps)
        return out


def medians(repeats: int, *functions: Callable[[], object]) -> list[Tensor]:
    """Median ms of each function, passed and on the processor (2,), in turns after one call that does not count."""
    times: list[list[tuple[float, float]]] = [[] for _ in functions]
    for turn in range(repeats + 1):
        for function, found in zip(functions, times, strict=True):
            distributed.barrier()
            start, used = time.perf_counter(), time.process_time()
            function()
            if turn:
                found.append((time.perf_counter() - start, time.process_time() - used))
    return [torch.tensor(found).median(0).values * 1e3 for found in times]


def forms(C: int) -> dict[str, nn.Module]:
    """Ours first."""
    ours = nn.Sequential(nn.BatchNorm2d(C))
    apply_norm_policy(ours, NormPolicy(kind="sync"))
    return {"ours": ours, "torch, no communication": nn.BatchNorm2d(C), "written by hand": HandWritten(C)}


def measure(options: argparse.Namespace, C: int, stride: int) -> dict[str, Tensor]:
    dtype, side = getattr(torch, options.dtype), options.side // stride
    torch.manual_seed(distributed.rank())
    values, gradient = (
        torch.randn(options.batch, C, side, side).to(dtype).contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    )

    def step(module: nn.Module) -> Callable[[], object]:
        leaves = [values.detach().requires_grad_(), *module.parameters()]
        return lambda: torch.autograd.grad(module(leaves[0]), leaves, gradient)

    found = forms(C)
    return dict(zip(found, medians(options.repeats, *(step(module) for module in found.values())), strict=True))


def work(rank: int, port: int, options: argparse.Namespace) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(options.world)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    distributed.initialise()
    total: dict[str, Tensor] = {}
    for C, stride, often in SHAPES:
        found = measure(options, C, stride)
        for name, ms in found.items():
            total[name] = total.get(name, torch.zeros(2)) + often * ms
        side = options.side // stride
        report(f"{options.batch}x{C}x{side}x{side}", found, options)
    report("all 53", total, options)
    distributed.shutdown()


def report(case: str, found: dict[str, Tensor], options: argparse.Namespace) -> None:
    if not distributed.is_main():
        return
    ours, ours_cpu = found.pop("ours").tolist()
    for peer, times in found.items():
        ms, cpu = times.tolist()
        row = {
            "bench": "sync_norm",
            "case": case,
            "peer": peer,
            "ours_ms": round(ours, 3),
            "peer_ms": round(ms, 3),
            "ratio": round(ms / ours, 2),
            "ours_cpu_ms": round(ours_cpu, 3),
            "peer_cpu_ms": round(cpu, 3),
            "cpu_ratio": round(cpu / ours_cpu, 2),
            "dtype": options.dtype,
            "processes": options.world,
            "threads": 1,
            "torch": torch.__version__,
        }
        if options.json:
            print(json.dumps(row), flush=True)
        else:
            print(
                f"{case:14} ours {row['ours_ms']:8.3f} ms   {peer:23} {row['peer_ms']:8.3f} ms   "
                f"ratio {row['ratio']:.2f}   on the processor {row['cpu_ratio']:.2f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, default=2, help="processes")
    parser.add_argument("--batch", type=int, default=2, help="pictures of a process")
    parser.add_argument("--side", type=int, default=224, help="of a picture, in pixels")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, options), nprocs=options.world)  # type: ignore[attr-defined, no-untyped-call]


if __name__ == "__main__":
    main()
