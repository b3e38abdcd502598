import contextlib

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers.norm_act import BatchNormAct2d
from torch import nn

from gesso.distributed import EVERY
from gesso.errors import ConfigError
from gesso.models.norm import NormPolicy, PolicyBatchNorm2d, apply_norm_policy, statistics_held


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))


def statistics(module):
    return {name: value.clone() for name, value in module.state_dict().items() if "running" in name}


@pytest.mark.parametrize("kind", ["train", "sync"])
def test_over_the_whole_batch_it_is_plain_batch_norm(kind):
    plain, ours = small(), small()
    assert apply_norm_policy(ours, NormPolicy(kind=kind)) == 2
    x = torch.randn(4, 3, 9, 9)
    assert torch.equal(plain(x), ours(x))
    assert plain.state_dict().keys() == ours.state_dict().keys()
    for a, b in zip(plain.state_dict().values(), ours.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(plain.eval()(x), ours.eval()(x))


@pytest.mark.parametrize("kind", ["fixed", "affine"])
def test_fixed_statistics_survive_train(kind):
    module = small()
    x = torch.randn(4, 3, 9, 9)
    module(x)
    expected, before = module.eval()(x), statistics(module)
    apply_norm_policy(module, NormPolicy(kind=kind))
    module.train()
    assert torch.equal(module(x), expected)
    module(x).sum().backward()
    assert all(torch.equal(before[name], value) for name, value in statistics(module).items())
    assert all((p.grad is not None) == (kind == "affine") for m in (module[1], module[4]) for p in m.parameters())
    assert module[0].weight.grad is not None


def test_one_policy_follows_another():
    module = small()
    apply_norm_policy(module, NormPolicy(kind="fixed"))
    apply_norm_policy(module, NormPolicy(kind="train"))
    assert module[1].training and module[1].weight.requires_grad
    before = statistics(module)
    module(torch.randn(4, 3, 9, 9))
    assert all(not torch.equal(before[name], value) for name, value in statistics(module).items())
    module.eval()
    apply_norm_policy(module, NormPolicy(kind="sync"))
    assert not module[1].training, "the module's mode is kept"


def test_weights_frozen_before_stay_frozen():
    module = small()
    module[1].weight.requires_grad_(False)
    for kind in ("train", "fixed", "affine"):
        apply_norm_policy(module, NormPolicy(kind=kind))
    assert not module[1].weight.requires_grad and module[4].weight.requires_grad


def test_groups_of_images_equal_batch_norm_on_each_group():
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(5).double()
    nn.init.normal_(plain.weight)
    ours = nn.Sequential(nn.BatchNorm2d(5).double())
    ours[0].load_state_dict(plain.state_dict())
    apply_norm_policy(ours, NormPolicy(kind="train", images=2))
    x = torch.randn(6, 5, 4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    means = []
    parts = []
    for part in x.split(2):
        one = nn.BatchNorm2d(5).double()
        one.load_state_dict(plain.state_dict())
        parts.append(one(part))
        means.append(one.running_mean)
    (wanted,) = torch.autograd.grad((torch.cat(parts) * weight).sum(), x)
    out = ours(x)
    torch.testing.assert_close(out, torch.cat(parts))
    torch.testing.assert_close(torch.autograd.grad((out * weight).sum(), x)[0], wanted)
    torch.testing.assert_close(ours[0].running_mean, torch.stack(means).mean(0))
    assert ours[0].num_batches_tracked == 1
    with pytest.raises(ConfigError, match=r"groups of norm\.images = 2"):
        ours(x[:3])


def test_timm_layers_keep_their_activation():
    torch.manual_seed(0)
    net = timm.create_model("efficientnet_b0", features_only=True, pretrained=False)
    x = torch.randn(1, 3, 32, 32)
    expected = net.eval()(x)
    names = net.state_dict().keys()
    apply_norm_policy(net, NormPolicy(kind="fixed"))
    assert net.state_dict().keys() == names
    for a, b in zip(net.train()(x), expected, strict=True):
        assert a.shape == b.shape
    for a, b in zip(net.eval()(x), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_group_norm_replaces_batch_norm():
    module = small()
    nn.init.normal_(module[1].weight)
    weight = module[1].weight
    assert apply_norm_policy(module, NormPolicy(kind="group_norm")) == 2
    assert not any(isinstance(m, nn.BatchNorm2d) for m in module.modules())
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(module[1](x), nn.functional.group_norm(x, 8, weight, torch.zeros(8)))


@pytest.mark.parametrize("before", [None, "fixed"])
def test_group_norm_keeps_the_activation_of_timm(before):
    module = nn.Sequential(BatchNormAct2d(8, act_layer=nn.SiLU))
    nn.init.normal_(module[0].weight)
    if before:
        apply_norm_policy(module, NormPolicy(kind=before))
    apply_norm_policy(module, NormPolicy(kind="group_norm"))
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(module(x), nn.functional.silu(nn.functional.group_norm(x, 8, module[0].weight)))
    assert module[0].weight.requires_grad


def test_what_cannot_be_asked_for():
    with pytest.raises(ConfigError, match="no effect"):
        NormPolicy(kind="fixed", images=8)
    with pytest.raises(ConfigError, match="above 0"):
        NormPolicy(images=0)


@pytest.mark.parametrize("kind", ["train", "sync"])
def test_groups_that_one_process_cannot_form_are_refused_with_those_it_can(kind):
    for images in (1, 2, 3, 6):
        assert apply_norm_policy(small(), NormPolicy(kind=kind, images=images), pictures=6) == 2
    with pytest.raises(ConfigError) as raised:
        apply_norm_policy(small(), NormPolicy(kind=kind, images=4), pictures=6)
    assert str(raised.value) == "norm.images = 4 cannot be formed by a process with 6 pictures. Choose 1, 2, 3 or 6."
    with pytest.raises(ConfigError, match=r"Choose 1\."):
        apply_norm_policy(small(), NormPolicy(kind=kind, images=2), pictures=1)
    assert apply_norm_policy(small(), NormPolicy(kind=kind, images=4)) == 2, "no training follows"


def two_parts():
    return nn.ModuleDict({"backbone": small(), "neck": small(), "norm": nn.BatchNorm2d(3), "head": nn.Conv2d(3, 3, 1)})


def kinds(module):
    return [m.policy.kind if isinstance(m, PolicyBatchNorm2d) else type(m).__name__ for m in norms(module)]


def norms(module):
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d | nn.GroupNorm)]


def test_parts_follow_policies_of_their_own():
    module = two_parts()
    assert apply_norm_policy(module, NormPolicy(kind="fixed", parts=("backbone",))) == 2
    assert kinds(module) == ["fixed", "fixed", "BatchNorm2d", "BatchNorm2d", "BatchNorm2d"]
    assert apply_norm_policy(module, NormPolicy(kind="train", parts=("neck", "norm"))) == 3
    assert kinds(module) == ["fixed", "fixed", "train", "train", "train"]
    assert apply_norm_policy(module, NormPolicy(kind="group_norm", parts=("norm",))) == 1
    assert kinds(module) == ["fixed", "fixed", "train", "train", "GroupNormAct"]
    assert apply_norm_policy(module, NormPolicy(kind="fixed", parts=("norm",))) == 0, "group norm took its place"
    assert apply_norm_policy(module, NormPolicy(kind="affine")) == 4
    assert kinds(module) == ["affine"] * 4 + ["GroupNormAct"]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("backbon", r"norm\.parts: 'backbon' does not exist\. Did you mean 'backbone'\?"),
        ("head", r"norm\.parts: 'head' holds no batch norm\. Known: 'backbone', 'neck', 'norm'\."),
    ],
)
def test_parts_without_batch_norm_are_refused(part, message):
    with pytest.raises(ConfigError, match=message):
        apply_norm_policy(two_parts(), NormPolicy(kind="fixed", parts=("neck", part)))


def synced(module):
    """The operators for several processes, in a group of one."""
    for place in (1, 4):
        module[place] = PolicyBatchNorm2d(module[place], NormPolicy(kind="sync"), EVERY)


WAYS = {
    "whole batch": lambda module: apply_norm_policy(module, NormPolicy()),
    "groups": lambda module: apply_norm_policy(module, NormPolicy(images=2)),
    "operators": synced,
}


@pytest.mark.parametrize("way", WAYS)
def test_held_statistics_do_not_move(way):
    module = small()
    WAYS[way](module)
    x = torch.randn(4, 3, 9, 9)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with statistics_held():
        held = module(x)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(module(x), held)
    assert all(not torch.equal(value, before[name]) for name, value in statistics(module).items())
    assert module[1].num_batches_tracked == module[4].num_batches_tracked == 1


def test_a_group_of_one_process_is_plain_batch_norm():
    plain, ours = small(), small()
    synced(ours)
    x = torch.randn(4, 3, 9, 9)
    plain(x).square().sum().backward()
    ours(x).square().sum().backward()
    for a, b in zip(plain.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
    for a, b in zip(plain.state_dict().values(), ours.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("way", WAYS)
def test_compiled_graphs_are_whole_and_do_the_same(way):
    torch._dynamo.reset()
    eager, module = small(), small()
    WAYS[way](eager)
    WAYS[way](module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 3, 9, 9)
    for hold in (False, True, False):
        for one, forward in ((eager, eager), (module, compiled)):
            one.zero_grad()
            with statistics_held() if hold else contextlib.nullcontext():
                forward(x).square().sum().backward()
        for a, b in zip(eager.parameters(), module.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
        for a, b in zip(eager.state_dict().values(), module.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b)


def test_a_layer_repeats_its_source_in_float64_and_bfloat16():
    source = nn.BatchNorm2d(3).double()
    layer = PolicyBatchNorm2d(source, NormPolicy())
    assert layer(torch.randn(2, 3, 2, 2, dtype=torch.float64)).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert (
            PolicyBatchNorm2d(nn.BatchNorm2d(3), NormPolicy())(torch.randn(2, 3, 2, 2).bfloat16()).dtype
            == torch.bfloat16
        )


def test_a_head_on_regions_is_grouped_by_pictures():
    """Two pictures of 8 regions: a group of two pictures is all 16 rows, a group of one is the 8 of a picture."""
    rows = torch.randn(16, 6, 3, 3)
    for images, groups in ((2, 1), (1, 2)):
        head = nn.Sequential(nn.BatchNorm2d(6))
        apply_norm_policy(head, NormPolicy(kind="train", images=images), pictures=2)
        expected = torch.cat([F.batch_norm(part, None, None, training=True) for part in rows.chunk(groups)])
        torch.testing.assert_close(head.train()(rows), expected)
