import logging

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import DropPath
from timm.models.senet import SEModule
from torch import nn

from gesso.errors import ConfigError
from gesso.models.backbone import Backbone, BackboneConfig
from gesso.models.norm import NormPolicy, apply_norm_policy
from gesso.models.ops.deform import DeformableConv2d
from gesso.models.stages import freeze

PLAIN = [
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3",
    "vit_tiny_patch16_224",
]


def backbone(name="resnet18", **changes):
    return Backbone(BackboneConfig(name=name, pretrained=False, **changes))


def shuffled_norms(net):
    """The network with batch norms that have seen something: every scale and mean matters."""
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) / 2 + 0.25)
    return net


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "resnet50",
        "resnet101",
        "seresnext101_32x4d",
        "legacy_seresnext101_32x4d",
        pytest.param("legacy_senet154", marks=pytest.mark.slow),
        "convnext_atto",
        "convnext_tiny",
        "mobilenetv3_small_050",
        "swin_tiny_patch4_window7_224",
    ],
)
def test_maps_of_any_timm_backbone(name):
    net = backbone(name).eval()
    with torch.no_grad():
        maps = net(torch.randn(2, 3, 64, 96))
    assert list(maps) == list(net.channels) == list(net.strides)
    for k, (level, channels) in enumerate(net.channels.items()):
        assert level == f"C{k + 2}" and net.strides[level] == 4 * 2**k
        assert maps[level].shape == (2, channels, 64 // 4 >> k, 96 // 4 >> k)


@pytest.mark.parametrize("name", ["resnet18", "legacy_seresnet18"])
def test_odd_sides_are_rounded_up(name):
    """To multiples of 4 at least: timm's old stem rounds the others down."""
    with torch.no_grad():
        maps = backbone(name).eval()(torch.randn(1, 3, 68, 100))
    assert [tuple(m.shape[2:]) for m in maps.values()] == [(17, 25), (9, 13), (5, 7), (3, 4)]


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
    paths = {name: module for name, module in net.body.named_modules() if isinstance(module, DropPath)}
    assert {name.split(".")[0] for name, m in paths.items() if m.training} == {f"stages_{k}" for k in range(stages, 4)}
    for module in paths.values():
        module.drop_prob = 0.5
    torch.manual_seed(4)
    images = torch.randn(8, 3, 64, 64)
    with torch.no_grad():
        first, second = net(images), net(images)
    assert [torch.equal(first[level], second[level]) for level in first] == [k < stages for k in range(4)]


def test_a_frozen_weight_of_its_own_does_not_freeze_what_is_around_it():
    net = backbone(frozen_stages=1)
    net.body.register_parameter("position", nn.Parameter(torch.zeros(1)))
    net.frozen = freeze(net.body, net._marks(), 1)
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
    with pytest.raises(ConfigError, match=r"\[16\], not at 4, 8, 16 and 32.*resnet50.*vit_small_patch14_dinov2"):
        backbone("mixer_s16_224")
    with pytest.raises(ConfigError, match=r"Did you mean 'vit_small_patch14_dinov2'"):
        backbone("vit_small_patch14_dinov4")
    with pytest.raises(ConfigError, match="no weights mark the end of that stage"):
        backbone("repvgg_a0", frozen_stages=4)
    with pytest.raises(ConfigError, match="from -1 to 4"):
        BackboneConfig(frozen_stages=5)


@pytest.mark.parametrize(
    "changes",
    [
        {"output_stride": 4},
        {"norm_eps": -1e-5},
        {"norm_eps": 1.0},
        {"deformable_stages": (0,)},
        {"deformable_stages": (4, 4)},
        {"deformable_version": 3},
        {"deformable_groups": 0},
        {"drop_path": 1.0},
        {"pretrained_required": True, "pretrained": False},
    ],
)
def test_values_out_of_range(changes):
    with pytest.raises(ConfigError, match="backbone." + next(iter(changes))):
        BackboneConfig(**changes)


@pytest.mark.parametrize("zero", [False, True])
def test_start_of_residual_blocks(zero):
    weights = [p for name, p in backbone(zero_init_residual=zero).named_parameters() if name.endswith("bn2.weight")]
    assert len(weights) == 8 and all((p == (0 if zero else 1)).all() for p in weights)


@pytest.mark.parametrize("name", PLAIN)
def test_map_of_a_plain_transformer(name):
    net = backbone(name).eval()
    patch = int(name.split("_patch")[1].split("_")[0])
    assert net.strides == {"C4": patch} and list(net.channels) == ["C4"]
    torch.manual_seed(0)
    images = torch.randn(2, 3, 2 * patch + 1, 4 * patch - 1)
    with torch.no_grad():
        found = net(images)["C4"]
        whole = F.pad(images, (0, 1, 0, patch - 1))
        same = timm.create_model(name, num_classes=0, dynamic_img_size=True).eval()
        same.load_state_dict(net.body.model.state_dict())
        tokens = same.forward_features(whole)[:, same.num_prefix_tokens :]
    assert found.shape == (2, net.channels["C4"], 3, 4)
    torch.testing.assert_close(found, tokens.transpose(1, 2).unflatten(2, (3, 4)))
    torch.testing.assert_close(found.mean(1), torch.zeros(2, 3, 4), atol=1e-5, rtol=0, msg="not the final norm's")


class ZeroAttention(nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


def test_the_grid_of_a_plain_transformer():
    """Cell k begins at pixel k * patch: without attention a pixel changes its own cell alone."""
    net = backbone("vit_tiny_patch16_224").eval()
    for block in net.body.model.blocks:
        block.ls1 = ZeroAttention()
    images = torch.randn(1, 3, 50, 70)
    with torch.no_grad():
        before = net(images)["C4"]
        for y, x in ((0, 0), (15, 16), (32, 47), (49, 69)):
            changed = images.clone()
            changed[:, :, y, x] += 3
            moved = (net(changed)["C4"] - before).abs().amax(1)[0] > 1e-5
            assert moved.nonzero().tolist() == [[y // 16, x // 16]]


@pytest.mark.parametrize("name", PLAIN[1:3])
def test_a_plain_transformer_trains_all_that_it_has(name):
    net = backbone(name, drop_path=0.2)
    assert max(m.drop_prob for m in net.modules() if isinstance(m, DropPath)) == pytest.approx(0.2)
    net(torch.randn(8, 3, 30, 30))["C4"].square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("stages", [-1, 0, 1, 3, 4])
@pytest.mark.parametrize("name", PLAIN[1:3])
def test_frozen_stages_of_a_plain_transformer(name, stages):
    net = backbone(name, frozen_stages=stages, drop_path=0.2).train()
    model = net.body.model
    assert len(model.blocks) == 12
    for k, block in enumerate(model.blocks):
        frozen = k < 3 * stages
        assert all(p.requires_grad != frozen for p in block.parameters())
        assert all(m.training != frozen for m in block.modules())
    before = (model.patch_embed.proj.weight, model.cls_token, model.reg_token, getattr(model, "pos_embed", None))
    assert all(p.requires_grad == (stages < 0) for p in before if p is not None)
    assert model.norm.weight.requires_grad == model.norm.training == (stages < 4)
    if stages < 4:
        net(torch.randn(2, 3, 30, 30))["C4"].square().sum().backward()
        assert all((p.grad is not None) == p.requires_grad for p in net.parameters())


def test_a_transformer_that_cannot_be_padded_through_options_is_padded():
    net = backbone("test_vit", frozen_stages=2)
    assert net(torch.randn(1, 3, 33, 40))["C4"].shape == (1, 64, 3, 3)


@pytest.mark.parametrize("output_stride", [16, 8])
def test_output_stride_is_torchvisions(output_stride):
    net = shuffled_norms(backbone("resnet50", output_stride=output_stride)).eval()
    theirs = torchvision.models.resnet50(replace_stride_with_dilation=[False, output_stride == 8, True])
    missing = theirs.load_state_dict(net.body.state_dict(), strict=False)
    assert missing.missing_keys == ["fc.weight", "fc.bias"] and not missing.unexpected_keys
    theirs = nn.Sequential(*list(theirs.eval().children())[:-2]).double()
    images = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        found = net.double()(images)["C5"]
        torch.testing.assert_close(found, theirs(images))
    assert found.shape[2:] == (64 // output_stride, 96 // output_stride)


@pytest.mark.parametrize("output_stride", [16, 8])
@pytest.mark.parametrize(
    "name", ["resnet18", "legacy_seresnet18", "legacy_seresnet50", "legacy_seresnext26_32x4d", "regnetx_002"]
)
def test_output_stride_keeps_the_values_of_the_old_cells(name, output_stride):
    """Squeeze and excitation is taken out: it averages over all cells."""
    torch.manual_seed(0)
    nets = [shuffled_norms(backbone(name, output_stride=s)).double().eval() for s in (32, output_stride)]
    nets[1].load_state_dict(nets[0].state_dict())
    for module in [m for net in nets for m in net.modules()]:
        for child, part in module.named_children():
            if isinstance(part, SEModule):
                setattr(module, child, nn.Identity())
    images = torch.randn(1, 3, 96, 128, dtype=torch.float64)
    with torch.no_grad():
        plain, atrous = (net(images) for net in nets)
    assert nets[1].strides == {name: min(stride, output_stride) for name, stride in nets[0].strides.items()}
    for level, stride in nets[1].strides.items():
        step = int(nets[0].strides[level] // stride)
        assert atrous[level].shape[2:] == (96 // stride, 128 // stride)
        torch.testing.assert_close(atrous[level][:, :, ::step, ::step], plain[level])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["legacy_senet154", "legacy_seresnext101_32x4d", "seresnext101_32x4d"])
def test_output_stride_of_the_big_ones(name):
    net = backbone(name, output_stride=16)
    assert net.strides == {"C2": 4, "C3": 8, "C4": 16, "C5": 16}
    dilated = {m.dilation for n, m in net.body.layer4.named_modules() if "conv2" in n}
    assert dilated == {(1, 1), (2, 2)}
    assert all(m.stride == (1, 1) for m in net.body.layer4.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize(
    "name", ["swin_tiny_patch4_window7_224", "vit_tiny_patch16_224", "hrnet_w18_small", "pvt_v2_b0"]
)
def test_a_backbone_without_output_stride_says_so(name):
    with pytest.raises(ConfigError, match=f"'{name}' has no output stride but 32.*backbone.output_stride to 32"):
        backbone(name, output_stride=16)


def test_norm_eps():
    assert {m.eps for m in backbone().modules() if isinstance(m, nn.BatchNorm2d)} == {1e-5}
    net = backbone(norm_eps=0.0)
    assert apply_norm_policy(net, NormPolicy(kind="fixed")) == 20
    assert {m.eps for m in net.modules() if isinstance(m, nn.BatchNorm2d)} == {0.0}
    net.train()(torch.randn(1, 3, 32, 32))["C5"].sum().backward()
    with pytest.raises(ConfigError, match="'convnext_atto' has no batch norm"):
        backbone("convnext_atto", norm_eps=1e-3)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("name", "count"), [("resnet18", 7), ("resnet50", 9), ("regnetx_002", 11)])
def test_deformable_stages_start_as_plain_ones(name, count, version):
    changes = {"resnet18": {"output_stride": 16}, "resnet50": {"output_stride": 16}}.get(name, {})
    net = shuffled_norms(backbone(name, deformable_stages=(3, 4), deformable_version=version, **changes)).eval()
    plain = backbone(name, **changes).eval()
    found = [n for n, m in net.named_modules() if isinstance(m, DeformableConv2d)]
    new = {key for key in net.state_dict() if ".offset." in key}
    if name.startswith("resnet"):
        assert all(n.startswith(("body.layer3", "body.layer4")) for n in found)
    convs = {n for n, m in plain.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)}
    stages = ("body.layer3", "body.layer4", "body.s3", "body.s4")
    assert set(found) == {n for n in convs if n.startswith(stages)}
    assert new == {f"{n}.offset.{part}" for n in found for part in ("weight", "bias")}
    assert not plain.load_state_dict(net.state_dict(), strict=False).missing_keys
    assert plain.state_dict().keys() == net.state_dict().keys() - new
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        ours, theirs = net.double()(images), plain.double()(images)
    for level in theirs:
        torch.testing.assert_close(ours[level], theirs[level])


@pytest.mark.parametrize("name", ["resnet18", "legacy_seresnet18"])
def test_frozen_atrous_and_deformable_stages_together(name):
    net = backbone(name, frozen_stages=3, output_stride=16, deformable_stages=(3, 4), deformable_version=2).train()
    trained = {n.split(".")[1] for n, p in net.named_parameters() if p.requires_grad}
    assert trained == {"layer4"}
    assert not net.body.layer3.training and net.body.layer4.training
    images = torch.randn(2, 3, 64, 64, requires_grad=True)
    net(images)["C5"].square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in net.parameters())
    assert images.grad.abs().sum() > 0, "the gradient goes through frozen stages"


@torch.no_grad()
def test_the_stride_in_the_first_convolution():
    """The same weights, and the maps of torchvision's network where the strides of its blocks are moved by hand."""
    theirs = torchvision.models.resnet50(weights=None).eval()
    net = backbone("resnet50", stride_in_1x1=True).eval()
    weights = {name: value for name, value in theirs.state_dict().items() if not name.startswith("fc.")}
    net.body.load_state_dict(weights)
    images = torch.randn(1, 3, 64, 96)
    usual = theirs.layer2(theirs.layer1(theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(images))))))
    for layer in (theirs.layer2, theirs.layer3, theirs.layer4):
        layer[0].conv1.stride, layer[0].conv2.stride = (2, 2), (1, 1)
    x = theirs.layer1(theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(images)))))
    maps = net(images)
    assert not torch.allclose(maps["C3"], usual, atol=0.1)
    for name, layer in (("C3", theirs.layer2), ("C4", theirs.layer3), ("C5", theirs.layer4)):
        x = layer(x)
        torch.testing.assert_close(maps[name], x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "resnetaa50"])
def test_the_stride_in_the_first_convolution_of_a_bottleneck_only(name):
    with pytest.raises(ConfigError, match=r"backbone\.stride_in_1x1 is set, but .* no bottleneck with its stride in"):
        backbone(name, stride_in_1x1=True)


@pytest.mark.parametrize("stage", [1, 4])
@pytest.mark.parametrize("name", ["convnext_atto", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"])
def test_a_stage_that_cannot_be_deformable(name, stage):
    with pytest.raises(ConfigError, match=r"backbone\.deformable_stages.*such as resnet50"):
        backbone(name, deformable_stages=(stage,))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("resnet18", {"deformable_stages": (4,), "deformable_version": 2, "output_stride": 16}),
        ("vit_small_patch14_dinov2", {"frozen_stages": 3}),
        ("vit_small_patch16_dinov3", {"frozen_stages": 3}),
    ],
)
def test_one_graph(name, changes):
    torch.manual_seed(0)
    net = backbone(name, **changes)
    images = torch.randn(2, 3, 64, 96)
    level = list(net.channels)[-1]
    eager = net(images)[level]
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")(images)[level]
    torch.testing.assert_close(compiled, eager, atol=1e-4, rtol=1e-4)
    compiled.sum().backward()
    assert any(p.grad is not None for p in net.parameters())
