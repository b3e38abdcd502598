"""The Triton kernels: through Triton's interpreter, compiled without a GPU, and on a GPU where there is one."""

import importlib
import importlib.util
import os
import subprocess
import sys

import pytest
import torch
import torchvision

from gesso.models.ops.nms import batched_nms
from gesso.models.ops.roi_align import multilevel_roi_align

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
STRIDES = (4, 8, 16)


@needs_triton
def test_the_kernels_compute_what_the_cpu_does():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.models.ops.triton_cases"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def compiled(kernel, capability, types, constants, aligned=(), **options):
    """The assembly text of a kernel for an NVIDIA GPU that need not be there; raises if it does not compile."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    found = compile_kernel(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert found.asm["cubin"]
    return found.asm["ptx"]


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_nms_compiles_for_a_gpu(capability, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = importlib.import_module("gesso.models.ops.triton_nms")
    sizes = {"N": "i32", "W": "i32", "mask": "*i64", "order": "*i64", "valid": "*u8", "keep": "*u8"}
    for dtype in ("fp32", "fp64"):
        types = {**sizes, "boxes": f"*{dtype}", "threshold": f"*{dtype}", "groups": "*i64"}
        constants = {"DOUBLE": dtype == "fp64"}
        text = compiled(kernels._overlap_kernel, capability, types, constants, num_warps=8, enable_fp_fusion=False)
        assert "fma" not in text and "div.rn" in text and "div.full" not in text
    for words, rows in ((1, 64), (256, 16), (2048, 2)):
        constants = {"WORDS": words, "ROWS": rows}
        compiled(kernels._scan_kernel, capability, sizes, constants, num_warps=8, enable_fp_fusion=False)


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("sensitive", [False, True])
def test_roi_align_compiles_for_a_gpu(capability, sensitive, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = importlib.import_module("gesso.models.ops.triton_roi_align")
    types = {"here": "i32", "H": "i32", "W": "i32", "C": "i32", "extent": "*fp32", "level": "*i64", "image": "*i64"}
    types |= {"pooled": "*fp32", "gradient": "*fp32"}
    for size, ratio, cells in ((7, 2, 8), (1, 7, 1)):
        constants = {"SIZE": size, "RATIO": ratio, "POSITION_SENSITIVE": sensitive, "CELLS": cells, "CHANNELS": 128}
        options = {"num_warps": 4, "enable_fp_fusion": False}
        for dtype in ("*fp32", "*bf16", "*fp16"):
            compiled(kernels._forward_kernel, capability, {**types, "rows": dtype}, constants, ("rows", "C"), **options)
        text = compiled(kernels._backward_kernel, capability, {**types, "rows": "*fp32"}, constants, **options)
        assert "add" in text and "f32" in text


@pytest.fixture
def no_wait():
    """Fails every operation that makes the host wait for the device."""

    def run(function):
        function()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return function()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return run


def spread_boxes(count, groups, seed=0):
    g = torch.Generator().manual_seed(seed)
    centre = torch.rand(2, count, 2, generator=g) * 800
    half = 5 + torch.rand(2, count, 2, generator=g) * 75
    scores, valid = torch.rand(2, count, generator=g), torch.rand(2, count, generator=g) > 0.1
    group = torch.randint(0, groups, (2, count), generator=g)
    return [x.cuda() for x in (torch.cat([centre - half, centre + half], dim=-1), scores, valid, group)]


@pytest.mark.gpu
def test_nms_on_a_gpu_equals_the_cpu(no_wait):
    from tests.models.ops.triton_cases import nms_cases

    for name, arguments in nms_cases("cuda").items():
        for threshold in (0.0, 0.3, 0.5, 0.7):
            kept = no_wait(lambda a=arguments, t=threshold: batched_nms(*a, t))
            assert torch.equal(kept.cpu(), batched_nms(*(a.cpu() for a in arguments), threshold)), name


@pytest.mark.gpu
@pytest.mark.parametrize(("count", "groups"), [(8819, 5), (5000, 365), (4000, 1), (70000, 50)])
def test_nms_on_a_gpu_equals_torchvision(count, groups, no_wait):
    boxes, scores, valid, group = spread_boxes(count, groups)
    kept = no_wait(lambda: batched_nms(boxes, scores, valid, group, 0.5))
    expected = torch.zeros_like(valid)
    for b in range(2):
        for value in range(groups):
            slots = (valid[b] & (group[b] == value)).nonzero().flatten()
            expected[b, slots[torchvision.ops.nms(boxes[b, slots], scores[b, slots], 0.5)]] = True
    assert torch.equal(kept, expected)


def pooled_and_gradients(maps, boxes, **options):
    maps = [m.detach().requires_grad_() for m in maps]
    pooled = multilevel_roi_align(maps, boxes, STRIDES[: len(maps)], canonical_size=80.0, **options)
    weight = torch.linspace(-1, 1, pooled.numel(), device=pooled.device, dtype=pooled.dtype).view(pooled.shape)
    return [pooled.detach(), *torch.autograd.grad(pooled, maps, weight)]


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("channels", [5, 256])
def test_roi_align_on_a_gpu_equals_the_cpu(deterministic, dtype, channels, no_wait):
    from tests.models.ops.triton_cases import roi_cases

    for name, (maps, boxes, size, ratio, sensitive) in roi_cases("cuda", channels).items():
        maps = [m.to(dtype) for m in maps]
        options = {"output_size": size, "sampling_ratio": ratio, "position_sensitive": sensitive, "aligned": sensitive}
        expected = pooled_and_gradients([m.cpu() for m in maps], boxes.cpu(), **options)
        torch.use_deterministic_algorithms(deterministic)
        try:
            found = no_wait(lambda m=maps, b=boxes, o=options: pooled_and_gradients(m, b, **o))
            again = pooled_and_gradients(maps, boxes, **options)
        finally:
            torch.use_deterministic_algorithms(False)
        for a, b, c in zip(found, expected, again, strict=True):
            tolerance = {} if a.dtype != torch.float32 else {"atol": 1e-4, "rtol": 1e-4}
            torch.testing.assert_close(a.cpu(), b, msg=lambda text, name=name: f"{name}: {text}", **tolerance)
            assert not deterministic or torch.equal(a, c)


@pytest.mark.gpu
def test_roi_align_compiles_into_one_graph_on_a_gpu():
    from tests.models.ops.triton_cases import roi_cases

    maps, boxes, *_ = roi_cases("cuda", 16)["three levels"]
    expected = multilevel_roi_align(maps, boxes, STRIDES)
    compiled_align = torch.compile(multilevel_roi_align, fullgraph=True)
    torch.testing.assert_close(compiled_align(maps, boxes, STRIDES), expected)
