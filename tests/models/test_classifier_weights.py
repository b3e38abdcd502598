"""Files of classifiers: our backbone gives the maps that torchvision's and timm's own networks give."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from gesso.errors import ConfigError, InputError
from gesso.models.backbone import Backbone, BackboneConfig
from gesso.models.classifier_weights import translate
from gesso.models.published import published_config, read_published

LEVELS = ("C2", "C3", "C4", "C5")
SWIN = "swin_tiny_patch4_window7_224"
LARGE = (448, 448)  # every map has more than one window a side, and whole ones


def restless(module: nn.Module) -> nn.Module:
    """Norms that do something."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.running_mean, -0.2, 0.2)
            nn.init.uniform_(part.running_var, 0.5, 2.0)
        if isinstance(part, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.uniform_(part.bias, -0.2, 0.2)
    return module.double().eval()


def ours_of(path: Path, name: str) -> Any:
    """Our backbone with the weights of the file, all of which are loaded or named as unused."""
    found = read_published(path)
    assert found.config is None and found.problem is not None and "of which the backbone can be used" in found.problem
    assert all(name.startswith("backbone.") for name in found.weights)
    backbone = Backbone(BackboneConfig(name=name, pretrained=False)).double()
    backbone.load_state_dict({name.removeprefix("backbone."): value for name, value in found.weights.items()})
    return backbone.eval()


def same_maps(backbone: Any, theirs: list[Tensor], images: Tensor) -> None:
    with torch.no_grad():
        ours = backbone(images)
    for name, wanted in zip(LEVELS, theirs, strict=True):
        assert ours[name].shape == wanted.shape
        assert (ours[name] - wanted).abs().max() < 1e-9 * max(1.0, float(wanted.abs().max())), name


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
@torch.no_grad()
def test_residual_networks_of_torchvision(name, tmp_path):
    torch.manual_seed(0)
    module = restless(getattr(torchvision.models, name)(weights=None))
    torch.save(module.state_dict(), tmp_path / "w.pth")
    images = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    wanted = create_feature_extractor(module, [f"layer{k}" for k in range(1, 5)])(images)
    same_maps(ours_of(tmp_path / "w.pth", name), list(wanted.values()), images)
    found = read_published(tmp_path / "w.pth")
    assert found.unused == ("fc.weight", "fc.bias") and found.origin == "timm"
    assert found.problem is not None and f"a classifier, {name}," in found.problem


@torch.no_grad()
def test_residual_networks_of_timm(tmp_path):
    torch.manual_seed(0)
    module = restless(timm.create_model("resnet50", pretrained=False))
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    images = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    _, *wanted = module.forward_intermediates(images, intermediates_only=True)
    same_maps(ours_of(tmp_path / "model.safetensors", "resnet50"), wanted, images)


@torch.no_grad()
def test_swin_of_torchvision(tmp_path):
    torch.manual_seed(0)
    module = restless(torchvision.models.swin_t(weights=None))
    torch.save(module.state_dict(), tmp_path / "w.pth")
    images = torch.randn(1, 3, *LARGE, dtype=torch.float64)
    wanted = create_feature_extractor(module, [f"features.{k}" for k in (1, 3, 5, 7)])(images)
    backbone = ours_of(tmp_path / "w.pth", SWIN)
    same_maps(backbone, [level.permute(0, 3, 1, 2) for level in wanted.values()], images)
    found = read_published(tmp_path / "w.pth")
    assert found.origin == "torchvision" and "windows" in found.notes[0]
    left = {
        name for name in module.state_dict() if "relative_position_index" in name or name.startswith(("norm.", "head."))
    }
    assert set(found.unused) == left


@torch.no_grad()
def test_swin_of_timm(tmp_path):
    torch.manual_seed(0)
    module = restless(timm.create_model(SWIN, pretrained=False, img_size=LARGE))
    torch.save({"model": module.state_dict()}, tmp_path / "w.pth")
    images = torch.randn(1, 3, *LARGE, dtype=torch.float64)
    wanted = module.forward_intermediates(images, intermediates_only=True)
    same_maps(ours_of(tmp_path / "w.pth", SWIN), wanted, images)
    found = read_published(tmp_path / "w.pth")
    assert found.origin == "timm" and all(name.startswith(("norm.", "head.")) for name in found.unused)


def test_the_files_of_swins_authors_have_the_next_step_at_the_end_of_a_stage():
    state = timm.create_model(SWIN, pretrained=False).state_dict()
    theirs = {}
    for name, value in state.items():
        start, _, rest = name.partition(".downsample.")
        theirs[f"layers.{int(start[-1]) - 1}.downsample.{rest}" if rest else name] = value
    theirs["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49)
    assert theirs.keys() != state.keys()
    wanted, found = translate(state), translate(theirs)
    assert found.weights.keys() == wanted.weights.keys()
    assert all(torch.equal(value, wanted.weights[name]) for name, value in found.weights.items())
    assert set(found.unused) - set(wanted.unused) == {"layers.0.blocks.0.attn.relative_position_index"}


def test_files_written_by_several_processes(tmp_path):
    state = torchvision.models.resnet18(weights=None).state_dict()
    torch.save(
        {"state_dict": {f"module.{name}": value for name, value in state.items()}, "epoch": 1}, tmp_path / "w.pth"
    )
    ours_of(tmp_path / "w.pth", "resnet18")


def test_a_classifier_is_no_detector(tmp_path):
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "w.pth")
    with pytest.raises(
        ConfigError, match=r"w\.pth: there is no detector here for these weights: it holds a classifier, r"
    ):
        published_config(tmp_path / "w.pth")


def test_weights_that_nobody_knows(tmp_path):
    torch.save(torchvision.models.vgg11(weights=None, num_classes=2).features.state_dict(), tmp_path / "w.pth")
    with pytest.raises(
        ConfigError, match=r"w\.pth: .*not known here: '0\.weight', '0\.bias', .* more. Known are detec"
    ):
        read_published(tmp_path / "w.pth")
    for value in ([1, 2], {"model": {"a": 1}}, torch.ones(3)):
        torch.save(value, tmp_path / "w.pth")
        with pytest.raises(InputError, match=r"the file holds no weights by name"):
            read_published(tmp_path / "w.pth")
