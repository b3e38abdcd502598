"""The first module with a number that is not finite, against networks in which it is known."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gesso.models.norm import NormPolicy, apply_norm_policy
from gesso.run.finite import watching
from tests.models.helpers import KINDS, random_batch, step, tiny_detector


class Overflow(nn.Module):
    """Infinite where the input is above a limit."""

    def __init__(self, limit=-torch.inf):
        super().__init__()
        self.limit = limit

    def forward(self, x):
        return torch.where(x > self.limit, torch.inf, x)


class _Steep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.inf


class Steep(nn.Module):
    """The identity, with an infinite gradient."""

    def forward(self, x):
        return _Steep.apply(x)


class Scale(nn.Module):
    def __init__(self, by=1.5):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(by))

    def forward(self, x):
        return x * self.weight


class Residual(nn.Module):
    """x + branch(x), or x + branch(join(x)) with code of its own."""

    def __init__(self, branch, join=None):
        super().__init__()
        self.branch, self.join = branch, join

    def forward(self, x):
        return x + self.branch(x if self.join is None else self.join(x))


class Pair(NamedTuple):
    one: torch.Tensor
    two: torch.Tensor


def watch(module, x=None):
    """The findings of a forward and (where the loss is finite) a backward pass."""
    x = torch.ones(4, 3) if x is None else x
    with watching(module) as seen:
        loss = module(x.requires_grad_()).sum()
        if loss.isfinite():
            loss.backward()
    return seen


def test_a_finite_network_has_no_finding():
    seen = watch(nn.Sequential(Scale(), Residual(Scale()), nn.ReLU(inplace=True)))
    assert seen.forward is None and seen.backward is None


def test_the_innermost_module_with_finite_inputs_is_named():
    seen = watch(nn.Sequential(Scale(), nn.Sequential(Scale(-1.0), Residual(Overflow())), Scale()))
    found = seen.forward
    assert (found.module, found.kind, found.what) == ("1.1.branch", "Overflow", "its output")
    assert found.input_range == (-1.5, -1.5) and (found.bad, found.values) == (12, 12)


def test_rows_that_are_not_finite():
    x = torch.ones(4, 3)
    x[1, 2] = x[3, 0] = x[3, 1] = 9
    found = watch(nn.Sequential(Overflow(limit=5)), x).forward
    assert (found.bad, found.rows, found.length, found.input_range) == (3, (1, 3), 4, (1, 9))


def test_code_between_modules_is_its_modules():
    """No child makes it: they get it."""
    seen = watch(nn.Sequential(Scale(), Residual(Scale(), join=lambda x: x / 0), Scale()))
    assert (seen.forward.module, seen.forward.kind) == ("1", "Residual")
    seen = watch(Residual(Scale(), join=lambda x: x * torch.nan))
    assert seen.forward.module == ""


def test_an_input_that_is_not_finite_is_no_module_s_fault():
    assert watch(nn.Sequential(Scale(), Scale()), torch.full((2, 3), torch.inf)).forward is None


@pytest.mark.parametrize("kind", ["tuple", "named", "dict", "keyword"])
def test_numbers_are_found_in_structures(kind):
    class Inner(nn.Module):
        def forward(self, value=None):
            bad = value["x"] / 0
            return {"tuple": (1, bad), "named": Pair(bad, bad), "dict": {"a": [bad]}, "keyword": bad}[kind]

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            self.inner(value={"x": x}) if kind == "keyword" else self.inner({"x": x})
            return x

    seen = watch(Outer())
    assert (seen.forward.module, seen.forward.input_range) == ("inner", (1, 1))


def test_where_the_gradient_ceases_to_be_finite():
    seen = watch(nn.Sequential(Scale(), nn.Sequential(Steep(), Scale(2.0)), Scale()))
    assert seen.forward is None
    found = seen.backward
    assert (found.module, found.kind, found.what) == ("1.0", "Steep", "the gradient of its input")
    assert (found.bad, found.rows, found.length) == (12, (0, 1, 2, 3), 4)


@pytest.mark.parametrize("steep", [0, 1])
def test_the_gradient_of_an_input_is_that_of_its_own_call(steep):
    """Two modules share their input, and one of them is at fault."""

    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.ways = nn.ModuleList([Steep() if k == steep else Scale() for k in range(2)])

        def forward(self, x):
            x = x * 2
            return self.ways[0](x) + self.ways[1](x)

    assert watch(Fork()).backward.module == f"ways.{steep}"


def test_one_call_of_two_is_enough():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.steep = Scale(), Steep()

        def forward(self, x):
            return self.layer(x) + self.layer(self.steep(x * 3))

    assert watch(Twice()).backward.module == "steep"


def test_the_gradient_of_a_weight_may_overflow_alone():
    class Flat(nn.Module):
        """Huge inputs meet a tiny weight."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(1e-30))

        def forward(self, x):
            return (x * self.weight).sum()

    seen = watch(nn.Sequential(Scale(1.0), nn.Sequential(Flat())), torch.full((8, 100), 1e38))
    assert (seen.backward.module, seen.backward.what) == ("1.0", "the gradient of its weight")
    assert seen.backward.length == 0 and seen.backward.values == 1


def test_code_that_makes_the_loss_is_the_watched_module_s():
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(Scale(), Scale())

        def forward(self, x):
            return (self.body(x) * 0).sum().sqrt()  # 0, with an infinite slope

    found = watch(Loss()).backward
    assert (found.module, found.what) == ("", "the gradient of the output of body.1")


def test_what_works_in_place_hides_nothing():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.steep, self.norm, self.act = Steep(), Scale(), nn.ReLU(inplace=True)

        def forward(self, x):
            y = self.norm(self.act(self.steep(x * 1.0)))
            y += x
            return self.act(y)

    assert watch(nn.Sequential(Scale(), Block(), nn.ReLU(inplace=True), Scale())).backward.module == "1.steep"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_in_networks_of_any_form(data):
    """A chain of modules, some of them nested, some residual, with one bad module anywhere."""
    names: list[str] = []

    def grow(prefix, depth):
        children = []
        for k in range(data.draw(st.integers(1, 3))):
            name = f"{prefix}{k}"
            form = data.draw(st.sampled_from(["leaf", "nested", "residual"])) if depth < 3 else "leaf"
            if form == "leaf":
                names.append(name)
                children.append(Scale(1.1))
            elif form == "nested":
                children.append(grow(f"{name}.", depth + 1))
            else:
                children.append(Residual(grow(f"{name}.branch.", depth + 1)))
        return nn.Sequential(*children)

    net = grow("", 0)
    bad = data.draw(st.sampled_from(names))
    backward = data.draw(st.booleans())
    net.set_submodule(bad, Steep() if backward else Overflow())
    seen = watch(net, torch.rand(4, 3))
    found = seen.backward if backward else seen.forward
    assert found is not None and found.module == bad


@pytest.mark.parametrize("pictures", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_detectors_are_watched_without_a_change(kind, pictures):
    """The losses are the same bit for bit, the gradients but for the order of sums; nothing is found, no hook stays."""
    plain, watched = tiny_detector(kind).double().train(), tiny_detector(kind).double().train()
    for detector in (plain, watched):
        apply_norm_policy(detector, NormPolicy(kind="train"))
    batch, targets = random_batch(pictures, 128 // pictures, masks=True)
    losses, gradients = step(plain, batch, targets)
    with watching(watched) as seen:
        same_losses, same_gradients = step(watched, batch, targets)
    assert seen.forward is None and seen.backward is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in watched.modules())
    assert all(torch.equal(losses[name], same_losses[name]) for name in losses)
    assert gradients.keys() == same_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(same_gradients[name], gradient, rtol=1e-9, atol=1e-12)


def layers(detector, batch, targets):
    """(name, module) of the modules with a weight of their own, and whether each is called in training."""
    called, hooks = set(), []
    for name, module in detector.named_modules():
        hooks.append(module.register_forward_hook(lambda *_, name=name: called.add(name)))
    with torch.no_grad():
        detector(batch, targets)
    for hook in hooks:
        hook.remove()
    own = [(name, m) for name, m in detector.named_modules() if "weight" in dict(m.named_parameters(recurse=False))]
    return [(name, module, name in called) for name, module in own]


def _named(detector, batch, targets, choose=lambda found: found):
    """Poisons one layer after the other, forwards and backwards: (expected, found) where these differ."""
    wrong = []
    for name, module, called in choose(layers(detector, batch, targets)):
        expected = name if called else name.rpartition(".")[0]  # its parent uses the weight
        before = module.weight.detach().clone()
        module.weight.data.fill_(torch.nan)
        with watching(detector) as seen, torch.no_grad():
            detector(batch, targets)
        module.weight.data.copy_(before)
        wrong.append((expected, seen.forward and seen.forward.module))
        if not called:
            continue
        hook = module.register_forward_hook(lambda _, __, output: _Steep.apply(output))
        with watching(detector) as seen:
            sum(detector(batch, targets).values()).backward()
        hook.remove()
        assert seen.forward is None
        wrong.append((expected, seen.backward and seen.backward.module))
    return [pair for pair in wrong if pair[0] != pair[1]]


def test_layers_of_a_detector_are_named():
    assert not _named(tiny_detector("mask_rcnn").train(), *random_batch(2, 64, masks=True), lambda found: found[::9])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_of_every_detector_is_named(kind):
    assert not _named(tiny_detector(kind).train(), *random_batch(2, 64, masks=True))
