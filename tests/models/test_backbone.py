import logging

import pytest
import timm
import torch
from torch import nn

from gesso.errors import ConfigError
from gesso.models.backbone import Backbone, BackboneConfig
from gesso.models.norm import NormPolicy, apply_norm_policy


def backbone(name="resnet18", **changes):
    return Backbone(BackboneConfig(name=name, pretrained=False, **changes))


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "mobilenetv3_small_050", "swin_tiny_patch4_window7_224"])
def test_maps_of_any_timm_backbone(name):
    net = backbone(name).eval()
    with torch.no_grad():
        maps = net(torch.randn(2, 3, 64, 96))
    for k, (level, channels) in enumerate(net.channels.items()):
        assert level == f"C{k + 2}"
        assert maps[level].shape == (2, channels, 64 // 4 >> k, 96 // 4 >> k)


def test_mean_and_std_are_those_of_the_weights():
    assert backbone().mean == timm.get_pretrained_cfg("resnet18").mean
    assert backbone("mobilenetv3_small_050").std == timm.get_pretrained_cfg("mobilenetv3_small_050").std


@pytest.mark.parametrize("stages", [-1, 0, 1, 4])
def test_frozen_stages_of_a_resnet(stages):
    net = backbone(frozen_stages=stages)
    frozen = {name for name, p in net.body.named_parameters() if not p.requires_grad}
    parts = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")
    expected = parts[: 0 if stages < 0 else 2 + stages]
    assert {name.split(".")[0] for name in frozen} == set(expected)
    assert all(name in frozen for name, _ in net.body.named_parameters() if name.split(".")[0] in expected)
    apply_norm_policy(net, NormPolicy(kind="train"))
    net.train()
    for name, module in net.body.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.training == (name.split(".")[0] not in expected)
            assert module.weight.requires_grad == module.training


def test_frozen_stem_of_other_families():
    assert {
        n.split(".")[0]
        for n, p in backbone("convnext_atto", frozen_stages=0).body.named_parameters()
        if not p.requires_grad
    } == {"stem_0", "stem_1"}
    names = [
        n for n, p in backbone("mobilenetv3_small_050", frozen_stages=1).body.named_parameters() if not p.requires_grad
    ]
    assert all(n.startswith(("conv_stem", "bn1", "blocks.0")) for n in names) and len(names) > 3


def test_without_a_network_the_warning_is_loud_and_the_weights_random(caplog, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    create = timm.create_model

    def offline(name, pretrained=False, **options):
        if pretrained:
            raise ConnectionError("no network")
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with caplog.at_level(logging.WARNING, logger="gesso"):
        Backbone(BackboneConfig(name="resnet18"))
    assert [r.message for r in caplog.records] == [
        "NO PRE-TRAINED WEIGHTS: those of 'resnet18' cannot be fetched (ConnectionError); the backbone starts at random"
    ]
    with pytest.raises(ConfigError, match="cannot be fetched"):
        Backbone(BackboneConfig(name="resnet18", pretrained_required=True))


def test_what_cannot_be_a_backbone():
    with pytest.raises(ConfigError, match=r"Did you mean.*'resnet18'"):
        backbone("resnet1_8")
    with pytest.raises(ConfigError, match="not at 4, 8, 16 and 32"):
        backbone("vit_tiny_patch16_224")
    with pytest.raises(ConfigError, match="from -1 to 4"):
        BackboneConfig(frozen_stages=5)


@pytest.mark.parametrize("zero", [False, True])
def test_start_of_residual_blocks(zero):
    weights = [p for name, p in backbone(zero_init_residual=zero).named_parameters() if name.endswith("bn2.weight")]
    assert len(weights) == 8 and all((p == (0 if zero else 1)).all() for p in weights)
