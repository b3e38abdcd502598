import logging

import pytest
import timm
import torch
from timm.layers import DropPath
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


@pytest.mark.parametrize("stages", [0, 2, 4])
def test_frozen_stages_drop_nothing(stages):
    net = backbone("convnext_atto", frozen_stages=stages, drop_path=0.5).train()
    dropping = {name.split(".")[0] for name, m in net.body.named_modules() if isinstance(m, DropPath) and m.training}
    assert dropping == {f"stages_{k}" for k in range(stages, 4)}
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        first, second = net(images), net(images)
    assert [torch.equal(first[level], second[level]) for level in first] == [k < stages for k in range(4)]


def test_a_frozen_weight_of_its_own_does_not_freeze_what_is_around_it():
    net = backbone(frozen_stages=1)
    net.body.register_parameter("position", nn.Parameter(torch.zeros(1)))
    net.frozen = net._freeze(1)
    assert not net.body.position.requires_grad
    assert net.train().body.layer4.training and not net.body.layer1.training


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


@pytest.mark.parametrize("name", ["coat_tiny", "hiera_tiny_224", "efficientformerv2_s0", "halonet26t", "inception_v3"])
def test_a_backbone_of_one_input_size_is_refused(name):
    with pytest.raises(ConfigError, match=f"'{name}' does not take pictures of any size") as caught:
        backbone(name)
    assert "resnet50" in str(caught.value) and ": ." not in str(caught.value)


def test_a_backbone_off_the_grid_is_refused():
    with pytest.raises(ConfigError, match=r"C5 of \(64, 96\) pixels is \(2, 4\), not \(2, 3\)"):
        backbone("mobilevitv2_050")


@pytest.mark.parametrize("name", ["resnet18", "efficientvit_b0"])
def test_building_draws_no_more_chance_than_timm_and_changes_no_statistics(name):
    torch.manual_seed(3)
    expected = timm.create_model(name, features_only=True).state_dict()
    state = torch.get_rng_state()
    torch.manual_seed(3)
    net = backbone(name)
    assert torch.equal(torch.get_rng_state(), state)
    assert expected.keys() == net.body.state_dict().keys()
    assert all(torch.equal(value, expected[key]) for key, value in net.body.state_dict().items())
    assert all(module.training for module in net.modules())


@pytest.mark.parametrize("name", ["convnext_atto", "swin_tiny_patch4_window7_224", "nextvit_small"])
def test_drop_path(name):
    def rates(**changes):
        return [m.drop_prob for m in backbone(name, **changes).modules() if isinstance(m, DropPath)]

    assert max(rates(drop_path=0.3)) == pytest.approx(0.3)
    assert not any(rates()), "0 turns timm's own default off"


def test_drop_path_of_a_backbone_without_it():
    backbone("efficientvit_b0")
    with pytest.raises(ConfigError, match=r"drop_path_rate.*set backbone\.pretrained or backbone\.drop_path"):
        backbone("efficientvit_b0", drop_path=0.1)


def test_what_cannot_be_a_backbone():
    with pytest.raises(ConfigError, match=r"Did you mean.*'resnet18'"):
        backbone("resnet1_8")
    with pytest.raises(ConfigError, match="not at 4, 8, 16 and 32"):
        backbone("vit_tiny_patch16_224")
    with pytest.raises(ConfigError, match="no weights mark the end of that stage"):
        backbone("repvgg_a0", frozen_stages=4)
    with pytest.raises(ConfigError, match="from -1 to 4"):
        BackboneConfig(frozen_stages=5)


@pytest.mark.parametrize("zero", [False, True])
def test_start_of_residual_blocks(zero):
    weights = [p for name, p in backbone(zero_init_residual=zero).named_parameters() if name.endswith("bn2.weight")]
    assert len(weights) == 8 and all((p == (0 if zero else 1)).all() for p in weights)
