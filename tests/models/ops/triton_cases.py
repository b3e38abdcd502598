"""Cases for the Triton kernels: run on a GPU by test_triton.py, and here, as a program, through Triton's interpreter.

TRITON_INTERPRET=1 python -m tests.models.ops.triton_cases
"""

import torch

from gesso.models.ops import nms, roi_align, triton_nms, triton_roi_align


def nms_cases(device="cpu"):
    """Name, boxes, scores, valid, groups: integer corners make equal boxes, exact thresholds and empty boxes."""
    g = torch.Generator().manual_seed(0)

    def example(B, N, groups, dtype=torch.float32, spread=12, levels=6):
        low = torch.randint(0, spread, (B, N, 2), generator=g)
        boxes = torch.cat([low, low + torch.randint(0, 12, (B, N, 2), generator=g)], dim=-1).to(dtype)
        scores = torch.randint(-levels, levels, (B, N), generator=g).to(dtype) / levels
        valid = torch.rand(B, N, generator=g) > 0.15
        return [boxes, scores, valid, torch.randint(-1, groups, (B, N), generator=g)]

    cases = {
        "one box": example(3, 1, 1),
        "64 boxes": example(1, 64, 1),
        "65 boxes in float64": example(2, 65, 2, torch.float64),
        "many ties in several groups": example(2, 140, 4),
        "one group": example(1, 130, 1, spread=40),
        "no boxes": example(2, 0, 1),
        "no images": example(0, 5, 1),
    }
    same = example(1, 130, 1, levels=1)
    same[0][:] = torch.tensor([3.0, 4.0, 9.0, 12.0])
    cases["all but one are dropped"] = same
    chain = example(1, 140, 1)
    start = torch.arange(140.0)
    chain[0] = torch.stack([start, start * 0, start + 4, start * 0 + 5], dim=-1)[None]
    chain[1] = -start[None] / 140
    cases["a chain: each box overlaps the next"] = chain
    nothing = example(2, 70, 2)
    nothing[2][:] = False
    cases["nothing is valid"] = nothing
    rubbish = example(2, 100, 2)
    rubbish[0][~rubbish[2]], rubbish[1][~rubbish[2]] = torch.nan, torch.nan
    cases["NaN where not valid"] = rubbish
    zeros = example(1, 80, 1)
    zeros[1][:] = torch.where(torch.arange(80) % 2 == 0, 0.0, -0.0)
    cases["0.0 and -0.0 are equal scores"] = zeros
    return {name: [value.to(device) for value in case] for name, case in cases.items()}


def roi_cases(device="cpu", channels=5):
    """Name, maps, boxes (2, R, 4), output size, sampling ratio, position-sensitive."""
    g = torch.Generator().manual_seed(1)

    def maps(*sides, depth=1):
        return [torch.randn(2, channels * depth, h, w, generator=g) for h, w in sides]

    def boxes(count, side=64):
        centre = torch.rand(2, count, 2, generator=g) * side
        half = torch.exp(torch.rand(2, count, 2, generator=g) * 4.5) / 2
        return torch.cat([centre - half, centre + half], dim=-1)

    levels = ((16, 12), (8, 6), (4, 3))
    odd = boxes(8)
    odd[0, :6] = torch.tensor(
        [
            [5.0, 5.0, 5.0, 5.0],
            [9.0, 9.0, 2.0, 3.0],
            [-90.0, -90.0, -80.0, -80.0],
            [torch.nan] * 4,
            [-torch.inf, -torch.inf, torch.inf, torch.inf],
            [1e30, 1e30, 2e30, 2e30],
        ]
    )
    small = boxes(3)
    small[..., 2:] = small[..., :2] + 3
    cases = {
        "three levels": (maps(*levels), boxes(3), 3, 2, False),
        "odd boxes": (maps(*levels), odd, 2, 1, False),
        "two levels without a RoI": (maps(*levels), small, 2, 2, False),
        "average of a RoI": (maps((8, 6)), boxes(1), 1, 7, False),
        "position-sensitive": (maps((8, 6), depth=9), odd[:, 3:], 3, 1, True),
        "one pixel": (maps((1, 1)), boxes(2), 2, 2, False),
        "no RoIs": (maps(*levels), boxes(0), 2, 2, False),
    }
    return {name: ([m.to(device) for m in case[0]], case[1].to(device), *case[2:]) for name, case in cases.items()}


def interpret_nms():
    for name, arguments in nms_cases().items():
        for threshold in (0.3, 0.5):
            kept = triton_nms.batched_nms(*arguments, threshold)
            assert torch.equal(kept, nms.batched_nms(*arguments, threshold)), f"{name}, threshold {threshold}"
    arguments = nms_cases()["many ties in several groups"]
    whole, triton_nms.MASK_BYTES = triton_nms.MASK_BYTES, 1
    kept = triton_nms.batched_nms(*arguments, 0.5)
    triton_nms.MASK_BYTES = whole
    assert torch.equal(kept, nms.batched_nms(*arguments, 0.5)), "one image at a time"


def interpret_roi_align():
    for dtype in (torch.float32, torch.bfloat16):
        for name, (maps, boxes, size, ratio, sensitive) in roi_cases().items():
            if dtype == torch.bfloat16 and name != "odd boxes":
                continue
            maps, rois = [m.to(dtype) for m in maps], boxes.reshape(-1, 4)
            level = roi_align.roi_levels(rois, num_levels=len(maps), canonical_level=4, canonical_size=80.0)
            extent = roi_align._extent(rois, level, [4.0, 8.0, 16.0][: len(maps)], size, sensitive)
            image = torch.arange(len(rois)) % 2
            arguments = (extent, level, image)
            expected = torch.ops.gesso.roi_align(maps, *arguments, size, ratio, sensitive)
            tables = [m.permute(0, 2, 3, 1).contiguous() for m in maps]
            cells = triton_roi_align.forward(tables, *arguments, size, ratio, sensitive)
            torch.testing.assert_close(cells, expected, msg=lambda text, name=name: f"{name}: {text}")
            gradient = torch.randn(cells.shape, generator=torch.Generator().manual_seed(2))
            sides = [m.shape[2] for m in maps], [m.shape[3] for m in maps]
            wanted = torch.ops.gesso.roi_align_backward(gradient, *arguments, 2, *sides, ratio, sensitive)
            found = [torch.zeros(table.shape) for table in tables]
            triton_roi_align.backward(found, *arguments, gradient, ratio, sensitive)
            for a, b in zip(found, wanted, strict=True):
                torch.testing.assert_close(a.permute(0, 3, 1, 2), b, msg=lambda text, name=name: f"{name}: {text}")


if __name__ == "__main__":
    interpret_nms()
    interpret_roi_align()
