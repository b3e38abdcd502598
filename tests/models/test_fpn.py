import torch
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from gesso.models.fpn import FeaturePyramid


def test_equals_torchvision():
    torch.manual_seed(0)
    channels = {"C2": 4, "C3": 6, "C4": 8, "C5": 10}
    ours = FeaturePyramid(channels, 5)
    reference = FeaturePyramidNetwork(list(channels.values()), 5, LastLevelMaxPool())
    names = [f"{part}_blocks.{k}.0.{p}" for part in ("inner", "layer") for k in range(4) for p in ("weight", "bias")]
    reference.load_state_dict(dict(zip(names, ours.state_dict().values(), strict=True)))
    # Sides that do not halve evenly: the top-down path goes by size, not by a factor.
    maps = {name: torch.randn(2, c, -(-20 >> k), -(-27 >> k)) for k, (name, c) in enumerate(channels.items())}
    found = ours(maps)
    assert tuple(found) == ours.out_names == ("P2", "P3", "P4", "P5", "P6")
    for a, b in zip(found.values(), reference(maps).values(), strict=True):
        torch.testing.assert_close(a, b)


def test_start():
    fpn = FeaturePyramid({"C2": 4, "C3": 4}, 8, subsampled_levels=0)
    assert fpn.out_names == ("P2", "P3")
    assert all((p == 0).all() for name, p in fpn.named_parameters() if name.endswith("bias"))
