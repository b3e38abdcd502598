"""Activations computed twice: nothing else changes, the bytes are those really alive, and the choice is the best."""

import copy
import dataclasses
import itertools
import logging
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gesso.errors import ConfigError
from gesso.models import segments
from gesso.models.build import build_detector
from gesso.models.folding import fold_batch_norm
from gesso.models.norm import NormPolicy, apply_norm_policy
from gesso.models.segments import Segment, find_units
from gesso.models.simple_pyramid import SimplePyramidConfig
from gesso.recipes.small import small_detector
from gesso.training.activations import UnitCost, bytes_alive, measure_units, total_bytes
from gesso.training.ema import EMA
from gesso.training.memory import Memory, apply_memory, held_bytes, parse_memory, plan_memory, save_memory
from gesso.training.optimizer import SGD, AdamW, build_optimizer
from tests.models.helpers import KINDS, random_batch, tiny_detector

CLASSES = 5


def made(backbone="resnet10t", *, kind="train", drop_path=0.0, frozen=-1, dtype=torch.float64):
    config = small_detector(backbone=backbone)
    config = dataclasses.replace(
        config, backbone=dataclasses.replace(config.backbone, drop_path=drop_path, frozen_stages=frozen)
    )
    if backbone.startswith(("vit", "eva")):
        config = dataclasses.replace(config, neck=SimplePyramidConfig(width=32))
    torch.manual_seed(0)
    detector = build_detector(config, CLASSES)
    apply_norm_policy(detector, NormPolicy(kind=kind))
    return detector.to(dtype).train()


def everything_of(detector, forward=None, side=64):
    """Losses, gradients and buffers of a step, and the random state behind it."""
    torch.manual_seed(5)
    detector.zero_grad(set_to_none=True)
    losses = (detector if forward is None else forward)(*random_batch(side=side))
    sum(losses.values()).backward()
    gradients = {f"gradient.{name}": p.grad for name, p in detector.named_parameters() if p.grad is not None}
    buffers = {f"buffer.{name}": buffer.clone() for name, buffer in detector.named_buffers()}
    return {**losses, **gradients, **buffers, "random": torch.get_rng_state()}


def assert_same(found, wanted, tolerance=1e-12):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def saved(detector, text, side=64):
    """The detector under a choice, and the plan."""
    least = held_bytes(detector, build_optimizer(detector, SGD()), None)
    return save_memory(detector, parse_memory(text), *random_batch(side=side), fixed_bytes=least)


def half_budget(detector, side=64):
    """A budget between the least and none, so that something is computed twice and something is not."""
    fixed = held_bytes(detector, build_optimizer(detector, SGD()), None)
    costs = measure_units(detector, *random_batch(side=side))
    peaks = [plan_memory(parse_memory(text), costs, fixed).peak_bytes for text in ("none", "stages", "sqrt")]
    return f"budget={(peaks[0] + min(peaks[1:])) / 2e6:.6f}MB"


# The detector computes the same.


@pytest.mark.parametrize("choice", ["none", "stages", "sqrt", "budget"])
def test_a_step_is_the_same_under_every_choice(choice):
    plain = made(drop_path=0.2)
    other = copy.deepcopy(plain)
    plan = saved(other, half_budget(other) if choice == "budget" else choice)
    assert bool(plan.segments) == (choice != "none")
    if choice == "budget":
        assert plan.units < plan.all_units
    for _ in range(2):  # running statistics of the first step go into nothing of the second, but must be counted once
        assert_same(everything_of(other), everything_of(plain))
    assert all(b == 2 for name, b in other.named_buffers() if name.endswith("num_batches_tracked"))


@pytest.mark.parametrize("choice", ["stages", "sqrt"])
@pytest.mark.parametrize(
    "backbone", ["resnet50", "convnext_atto", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"]
)
def test_a_step_is_the_same_with_every_kind_of_backbone(backbone, choice):
    plain = made(backbone, drop_path=0.2)
    other = copy.deepcopy(plain)
    plan = saved(other, choice)
    assert plan.units == plan.all_units > 10
    assert_same(everything_of(other), everything_of(plain))


FORMS = ("regnetx_002", "densenet121", "hrnet_w18_small", "efficientnet_b0", "pvt_v2_b0")
MORE_FORMS = ("vgg16", "dla34", "swinv2_tiny_window8_256", "legacy_seresnet50", "fastvit_t8", "eva02_tiny_patch14_224")


@pytest.mark.parametrize("backbone", [*FORMS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_FORMS)])
def test_a_step_is_the_same_with_networks_of_other_forms(backbone):
    """Blocks called one by one, lists that grow or are changed, branches, and single layers."""
    plain = made(backbone)
    other = copy.deepcopy(plain)
    assert saved(other, "sqrt").units > 3
    assert_same(everything_of(other), everything_of(plain))
    segments.install(other, [Segment(unit.holder, unit.start, unit.stop) for unit in find_units(other)])
    assert_same(everything_of(other), everything_of(plain))  # where the second step is the second with batch norm


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_the_same_with_every_detector(kind):
    plain = tiny_detector(kind).double().train()
    other = copy.deepcopy(plain)
    batch = random_batch(masks=True)
    if kind == "everything":
        batch = (batch[0], dataclasses.replace(batch[1], semantic=torch.zeros(2, 64, 64, dtype=torch.uint8)))
    plan = save_memory(other, Memory("sqrt"), *batch, fixed_bytes=0)
    assert plan.units > 1
    found = []
    for detector in (plain, other):
        losses = detector(*batch)
        sum(losses.values()).backward()
        found.append(losses | {name: p.grad for name, p in detector.named_parameters() if p.grad is not None})
    assert_same(found[1], found[0])


@pytest.mark.parametrize("kind", ["train", "sync", "affine", "fixed", "group_norm"])
def test_running_statistics_are_updated_once_under_every_norm_policy(kind):
    plain = made(kind=kind, dtype=torch.float32)
    other = copy.deepcopy(plain)
    saved(other, "sqrt")
    assert_same(everything_of(other), everything_of(plain), tolerance=1e-6)


def test_a_step_is_the_same_in_mixed_precision():
    plain = made("resnet50", dtype=torch.float32)
    other = copy.deepcopy(plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert saved(other, "sqrt").segments
        wanted, found = everything_of(plain), everything_of(other)
    assert_same(found, wanted, tolerance=1e-6)
    assert not torch.equal(everything_of(copy.deepcopy(plain))["rpn_box"], wanted["rpn_box"])


def test_batch_norm_that_follows_no_policy_is_updated_once():
    plain = build_detector(small_detector(), CLASSES).double().train()
    assert any(type(module) is nn.BatchNorm2d for module in plain.backbone.modules())
    other = copy.deepcopy(plain)
    saved(other, "sqrt")
    assert_same(everything_of(other), everything_of(plain))


@pytest.mark.parametrize("choice", ["stages", "sqrt"])
def test_frozen_stages_are_not_computed_again(choice):
    plain = made("resnet50", frozen=2, kind="fixed")
    other = copy.deepcopy(plain)
    plan = saved(other, choice)
    assert {segment.holder for segment in plan.segments} == {"backbone.body.layer3", "backbone.body.layer4", "neck"}
    assert_same(everything_of(other), everything_of(plain))


def test_the_forward_pass_of_a_segment_runs_twice_in_training_and_once_otherwise():
    detector = made("resnet50")
    plan = saved(detector, "sqrt")
    calls = []
    for name in ("layer1.0", "layer4.2"):
        detector.backbone.body.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    everything_of(detector)
    assert plan.units == plan.all_units
    assert sorted(calls) == ["layer1.0"] * 2 + ["layer4.2"] * 2
    calls.clear()
    with torch.no_grad():
        detector(*random_batch())
        detector.eval()(random_batch()[0])
    assert sorted(calls) == ["layer1.0"] * 2 + ["layer4.2"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["resnet10t", "vit_tiny_patch16_224"])
def test_a_compiled_step_is_one_graph_and_the_same_and_keeps_less(backbone):
    found, kept = {}, {}
    for choice in ("none", "sqrt"):
        torch._dynamo.reset()
        detector = made(backbone, drop_path=0.2)
        saved(detector, choice)
        compiled = torch.compile(detector, fullgraph=True, dynamic=False, backend="aot_eager")
        found[choice] = everything_of(detector, compiled)
        kept[choice] = bytes_for_backward(compiled(*random_batch()), detector)
    assert_same(found["sqrt"], found["none"])
    assert kept["sqrt"] < 0.75 * kept["none"]


def bytes_for_backward(losses, detector):
    """What a compiled graph hands to its backward graph, weights and buffers aside."""
    todo, sizes = [loss.grad_fn for loss in losses.values()], {}
    while todo:
        node = todo.pop()
        todo += [following for following, _ in node.next_functions if following is not None]
        if "CompiledFunction" in type(node).__name__:
            sizes |= {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in node.saved_tensors}
    known = {t.untyped_storage().data_ptr() for t in (*detector.parameters(), *detector.buffers())}
    return sum(size for key, size in sizes.items() if key not in known)


# Where the units lie.


@pytest.mark.parametrize("backbone", ["resnet50", "convnext_atto", "swin_tiny_patch4_window7_224", *FORMS])
def test_units_hold_nearly_all_weights_of_a_backbone_each_once(backbone):
    detector = made(backbone, dtype=torch.float32)
    names = []
    for unit in find_units(detector):
        holder = detector.get_submodule(unit.holder)
        parts = list(holder.children())[unit.start : unit.stop] if unit.stop else [holder]
        names += [id(parameter) for part in parts for parameter in part.parameters()]
        assert unit.name == unit.holder or parts[0] is detector.get_submodule(unit.name)
    assert len(names) == len(set(names))
    inside = sum(p.numel() for p in detector.parameters() if id(p) in set(names))
    everything = sum(p.numel() for part in (detector.backbone, detector.neck) for p in part.parameters())
    assert inside > 0.9 * everything


def test_the_units_of_a_residual_network_are_its_stem_its_blocks_and_the_neck():
    names = [unit.name.removeprefix("backbone.body.") for unit in find_units(made("resnet50"))]
    blocks = [f"layer{stage}.{k}" for stage, count in enumerate((3, 4, 6, 3), 1) for k in range(count)]
    assert names == ["conv1", "maxpool", *blocks, "neck"]


# Installing leaves no trace.


def test_names_of_weights_stay_and_another_choice_takes_the_place_of_the_former():
    detector = made("resnet50")
    names = list(detector.state_dict())
    before = {name: set(vars(module)) for name, module in detector.named_modules()}
    for choice in ("sqrt", "stages"):
        plan = saved(detector, choice)
        assert list(detector.state_dict()) == names
        assert set(segments.installed(detector)) == {segment.holder for segment in plan.segments}
    saved(detector, "none")
    assert segments.installed(detector) == {}
    assert {name: set(vars(module)) for name, module in detector.named_modules()} == before


def test_a_copy_computes_with_its_own_weights():
    detector = made("resnet50", dtype=torch.float32)
    saved(detector, "sqrt")
    other = copy.deepcopy(detector)
    plain = copy.deepcopy(detector)
    saved(plain, "none")
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.zero_()
    assert_same(everything_of(other), everything_of(plain), tolerance=1e-6)
    assert all(p.grad is None for p in detector.parameters())


def test_a_detector_with_segments_is_folded_for_inference():
    detector = made(dtype=torch.float32).eval()
    images = random_batch()[0]
    wanted = detector(images).boxes
    saved(detector, "sqrt")
    torch.testing.assert_close(fold_batch_norm(detector)(images).boxes, wanted, rtol=1e-3, atol=1e-2)


# Measuring.


def test_measuring_leaves_everything_as_it_was():
    detector = made(drop_path=0.2)
    saved(detector, "sqrt")
    everything_of(detector)
    detector.eval()
    detector.rpn.train()
    state = {name: value.clone() for name, value in detector.state_dict().items()}
    gradients = {name: p.grad for name, p in detector.named_parameters()}
    values = {name: None if grad is None else grad.clone() for name, grad in gradients.items()}
    modes = [module.training for module in detector.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in detector.modules()]
    chosen, chance = segments.installed(detector), torch.get_rng_state()
    measure_units(detector, *random_batch())
    assert_same(detector.state_dict(), state, tolerance=0)
    assert all(p.grad is gradients[name] for name, p in detector.named_parameters())
    assert_same(
        {n: g for n, g in gradients.items() if g is not None}, {n: g for n, g in values.items() if g is not None}, 0
    )
    assert [module.training for module in detector.modules()] == modes
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in detector.modules()] == hooks
    assert segments.installed(detector) == chosen
    assert torch.equal(torch.get_rng_state(), chance)


def test_the_bytes_of_a_residual_block_are_those_counted_by_hand():
    """Stride 1, width w and 4w: behind two convolutions and their norms w each, before the sum and behind it 4w."""
    costs = {cost.name: cost for cost in measure_units(made("resnet50", dtype=torch.float32), *random_batch(side=64))}
    block = costs["backbone.body.layer3.2"]
    cells = 2 * 4 * 4 * 4  # pictures, height, width, bytes of a number
    inside = cells * (256 + 256 + 256 + 256 + 1024)  # inputs of two norms, their outputs, the input of the last norm
    statistics = 4 * 2 * (256 + 256 + 1024)
    assert block.input_bytes == cells * 1024
    assert inside <= block.bytes <= inside + 2 * statistics
    assert block.seconds > 0
    assert not block.bound
    assert costs["backbone.body.layer3.0"].bound


@pytest.mark.parametrize("kind", ["train", "fixed"])
@pytest.mark.parametrize("backbone", ["resnet50", "convnext_atto", "vit_tiny_patch16_224"])
def test_the_bytes_add_up_to_those_alive(backbone, kind):
    """All that is alive behind backbone and neck, counted by storage, is what the units are said to keep."""
    detector = made(backbone, kind=kind, dtype=torch.float32)
    costs = measure_units(detector, *random_batch(side=128))
    for choice in ("none", "stages", "sqrt"):
        plan = plan_memory(parse_memory(choice), costs, 0)
        apply_memory(detector, plan)
        images, _ = random_batch(side=128)
        known = [*detector.parameters(), *detector.buffers(), *vars(images).values()]
        with bytes_alive(torch.device("cpu"), known) as alive:
            maps = detector.maps(images)
            levels = [maps[name] for name in detector.neck.names]
            del maps
            kept = alive.now()
        assert plan.all_bytes == total_bytes(costs[:-1])
        assert kept == pytest.approx(plan.kept_bytes + sum(level.nbytes for level in levels), rel=0.05)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("choice", ["stages", "sqrt", "budget"])
def test_a_step_holds_no_more_than_is_expected(choice, mixed):
    detector = made("resnet50", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        plan = saved(detector, half_budget(detector, 160) if choice == "budget" else choice, side=160)
    batch, targets = random_batch(side=160)
    there = [*detector.parameters(), *detector.buffers()]
    gradients = sum(p.nbytes for p in detector.parameters() if p.requires_grad)
    fixed = held_bytes(detector, build_optimizer(detector, SGD()), None)
    known = [*there, *vars(batch).values(), *(t for t in vars(targets).values() if t is not None)]
    detector.zero_grad(set_to_none=True)
    with bytes_alive(torch.device("cpu"), known) as alive:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = sum(detector(batch, targets).values())
        loss.backward()
        held = alive.most()
    assert 0.5 * plan.peak_bytes < fixed - gradients + held <= plan.peak_bytes
    if choice == "budget":
        assert plan.memory.budget is not None
        assert plan.peak_bytes <= plan.memory.budget


def test_copies_of_weights_in_half_precision_are_counted_once_and_aside():
    detector = made("resnet50", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        costs = measure_units(detector, *random_batch())
    parts = (detector.backbone, detector.neck)
    copied = [m.weight for part in parts for m in part.modules() if isinstance(m, nn.Conv2d)]
    assert costs[0] == UnitCost(name="copies of weights", bytes=sum(2 * weight.numel() for weight in copied))
    plan = plan_memory(Memory(), costs, 0)
    assert plan.all_bytes == plan.kept_bytes == total_bytes(costs[1:-1])


def test_a_batch_that_does_not_fit_is_measured_by_one_picture(monkeypatch, caplog):
    detector = made("resnet50", dtype=torch.float32)
    whole = measure_units(detector, *random_batch(4, side=128))
    forward, sizes = detector.forward, []

    def short_of_memory(batch, targets):
        sizes.append(len(batch.images))
        if len(batch.images) > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        return forward(batch, targets)

    detector.forward = short_of_memory
    with caplog.at_level(logging.INFO):
        scaled = measure_units(detector, *random_batch(4, side=128))
    assert sizes == [4, 1, 1]
    assert "all 4 pictures do not fit" in caplog.text
    for a, b in zip(scaled[:-1], whole[:-1], strict=True):
        assert a.name == b.name
        assert a.bytes + a.input_bytes == pytest.approx(b.bytes + b.input_bytes, rel=0.15)


def test_other_errors_of_a_step_are_not_taken_for_a_lack_of_memory(monkeypatch):
    detector = made()

    def broken(batch, targets):
        raise RuntimeError("a shape is wrong")

    detector.forward = broken
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        measure_units(detector, *random_batch())


def test_a_segment_never_begins_where_its_input_is_changed_in_place():
    detector = made()
    layers = detector.backbone.body.layer3
    layers.append(nn.Conv2d(256, 256, 3, padding=1).double())
    layers.append(nn.ReLU(inplace=True))
    layers.append(nn.Conv2d(256, 256, 3, padding=1).double())
    plain = copy.deepcopy(detector)
    costs = measure_units(detector, *random_batch())
    assert [cost.name for cost in costs if not cost.starts] == ["backbone.body.layer3.2"]
    for choice in ("stages", "sqrt"):
        other = copy.deepcopy(plain)
        assert saved(other, choice).units > 2
        assert_same(everything_of(other), everything_of(copy.deepcopy(plain)))


def test_the_held_bytes_are_those_that_exist_after_a_step():
    for config in (SGD(rate=1e-3), AdamW(rate=1e-3)):
        detector = made(dtype=torch.float32)
        ema = EMA(detector, 0.9)
        optimizer = build_optimizer(detector, config)
        expected = held_bytes(detector, optimizer, ema)
        everything_of(detector)
        optimizer.step()
        moments = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
        gradients = [p.grad for p in detector.parameters() if p.grad is not None]
        tensors = [*detector.parameters(), *detector.buffers(), *gradients, *moments, *ema.average.values()]
        assert expected == pytest.approx(sum(t.nbytes for t in tensors), rel=1e-3)
        assert held_bytes(detector, optimizer, ema) == pytest.approx(expected, rel=1e-3)


# Planning.


def chain(*sizes, heads=(0, 0)):
    """Costs of a chain of (bytes, input bytes, seconds) in one holder, and of the heads."""
    units = [
        UnitCost(
            name=f"u{k}", bytes=b, input_bytes=i, seconds=s, holder="net", start=k, stop=k + 1, stage="net", whole=True
        )
        for k, (b, i, s) in enumerate(sizes)
    ]
    return [UnitCost(name="backbone", bytes=0), *units, UnitCost(name="heads", bytes=heads[0], input_bytes=heads[1])]


@st.composite
def costs(draw, most=7):
    """Stages of units in a row, some of them by themselves, with maps on their borders."""
    found = [UnitCost(name="backbone", bytes=draw(st.integers(0, 50)))]
    for stage in range(draw(st.integers(1, 3))):
        joined, whole = draw(st.booleans()), draw(st.booleans())
        for k in range(draw(st.integers(1, max(most // 3, 1)))):
            name = f"s{stage}.{k}"
            found.append(
                UnitCost(
                    name=name,
                    bytes=(size := draw(st.integers(0, 1000))),
                    largest_bytes=draw(st.integers(0, size)),
                    input_bytes=draw(st.integers(0, 300)),
                    seconds=draw(st.integers(0, 100)) / 8,
                    holder=f"s{stage}" if joined else name,
                    start=k if joined else 0,
                    stop=k + 1 if joined else 0,
                    stage=f"s{stage}",
                    whole=whole,
                    starts=draw(st.integers(0, 9)) > 0,
                    bound=k == 0,
                )
            )
    return [*found, UnitCost(name="heads", bytes=draw(st.integers(0, 500)), input_bytes=draw(st.integers(0, 100)))]


def covered(costs, segment):
    """The units that a segment runs."""
    if not segment.stop:
        return [k for k, c in enumerate(costs) if c.name == segment.holder or (c.stage == segment.holder and c.holder)]
    inside = range(segment.start, segment.stop)
    return [k for k, c in enumerate(costs) if c.holder == segment.holder and c.stop and c.start in inside]


def slowly(costs, plan):
    """Kept bytes, the largest segment and the peak of activations, by going back through a step unit by unit."""
    runs = [covered(costs, segment) for segment in plan.segments]
    first = {k: run[0] for run in runs for k in run}
    whole = [cost.bytes + cost.input_bytes for cost in costs]
    held = [whole[k] if k not in first else costs[k].input_bytes * (first[k] == k) for k in range(len(costs))]
    peak = 0
    for k, cost in enumerate(costs):
        begin = first.get(k, k)
        output = costs[k + 1].input_bytes if k + 1 < len(costs) else 0
        maps = sum(costs[i].input_bytes for i in range(k + 1) if costs[i].bound)
        there = sum(held[:begin]) + sum(whole[begin : k + 1]) + output
        peak = max(peak, there + 2 * output + maps, there + 2 * cost.largest_bytes + maps)
    inner = [sum(whole[k] for k in run) - costs[run[0]].input_bytes for run in runs]
    return sum(held[:-1]), max(inner, default=0), peak


@settings(max_examples=200, deadline=None)
@given(costs())
def test_a_plan_says_what_it_takes(costs):
    for choice in ("none", "stages", "sqrt"):
        plan = plan_memory(parse_memory(choice), costs, 1000)
        units = [k for segment in plan.segments for k in covered(costs, segment)]
        assert len(units) == len(set(units))
        assert all(costs[segment[0]].starts for segment in (covered(costs, s) for s in plan.segments))
        kept, largest, peak = slowly(costs, plan)
        assert (plan.kept_bytes, plan.largest_bytes, plan.peak_bytes) == (kept, largest, peak + 1000)
        assert plan.seconds == pytest.approx(sum(costs[k].seconds for k in units))


@settings(max_examples=200, deadline=None)
@given(costs())
def test_sqrt_never_takes_more_than_none_or_stages(costs):
    none, stages, sqrt = (plan_memory(parse_memory(text), costs, 0) for text in ("none", "stages", "sqrt"))
    assert sqrt.kept_bytes + sqrt.largest_bytes <= none.kept_bytes
    assert sqrt.kept_bytes + sqrt.largest_bytes <= stages.kept_bytes + stages.largest_bytes
    assert sqrt.peak_bytes <= none.peak_bytes


@settings(max_examples=100, deadline=None)
@given(costs(), st.lists(st.integers(0, 8000), min_size=2, max_size=5))
def test_a_larger_budget_is_never_slower_and_every_plan_keeps_within_it(costs, budgets):
    before = None
    for budget in sorted(budgets):
        try:
            plan = plan_memory(Memory("budget", budget), costs, 100)
        except ConfigError:
            assert before is None
            continue
        assert plan.peak_bytes <= budget
        assert before is None or plan.seconds <= before.seconds
        before = plan


@settings(max_examples=60, deadline=None)
@given(costs(most=4), st.integers(0, 4000))
def test_the_choices_are_the_best_of_all(costs, budget):
    """Beside every set of segments that there is."""
    every = list(everything_that_there_is(costs))
    sums = [(plan.kept_bytes + plan.largest_bytes, plan.seconds) for plan in every]
    sqrt = plan_memory(Memory("sqrt"), costs, 0)
    assert sqrt.kept_bytes + sqrt.largest_bytes == min(sums)[0]
    fitting = [plan.seconds for plan in every if plan.peak_bytes <= budget]
    try:
        assert plan_memory(Memory("budget", budget), costs, 0).seconds == pytest.approx(min(fitting))
    except ConfigError as error:
        assert not fitting
        assert f"the least is {-(-min(plan.peak_bytes for plan in every) // 10**6)}MB" in str(error)


def everything_that_there_is(costs):
    """All plans, by choosing among all segments of neighbouring units that can run as one."""
    options = []
    for start, stop in itertools.combinations(range(len(costs) + 1), 2):
        run = costs[start:stop]
        row = run[0].stop > 0 and len({c.holder for c in run}) == 1
        stage = all(c.whole and c.stage == run[0].stage for c in run) and sum(
            c.stage == run[0].stage for c in costs
        ) == len(run)
        if all(c.holder for c in run) and run[0].starts and not any(c.bound for c in run[1:]):
            if row or len(run) == 1:
                options.append((range(start, stop), Segment(run[0].holder, run[0].start, run[-1].stop)))
            elif stage:
                options.append((range(start, stop), Segment(run[0].stage, 0, 0)))
    for size in range(len(options) + 1):
        for chosen in itertools.combinations(options, size):
            units = [k for run, _ in chosen for k in run]
            if len(units) == len(set(units)):
                plan = dataclasses.replace(
                    plan_memory(Memory(), costs, 0), segments=tuple(segment for _, segment in chosen)
                )
                kept, largest, peak = slowly(costs, plan)
                seconds = sum(costs[k].seconds for k in units)
                yield dataclasses.replace(
                    plan, kept_bytes=kept, largest_bytes=largest, peak_bytes=peak, seconds=seconds
                )


def test_sqrt_of_equal_layers_takes_the_square_root():
    """Chen et al., section 4.1: n layers of equal bytes in segments of about sqrt(n) take about 2 sqrt(n)."""
    for n in (16, 64, 100):
        plan = plan_memory(Memory("sqrt"), chain(*[(0, 1000, 1.0)] * n), 0)
        assert plan.kept_bytes + plan.largest_bytes <= (2 * n**0.5 + 1) * 1000


def test_a_budget_too_small_names_the_least_and_the_least_does():
    some = chain((10**9, 10**8, 1.0), (10**9, 10**8, 1.0), heads=(10**8, 0))
    with pytest.raises(ConfigError, match="does not fit into the memory budget of 1000MB: the least is") as raised:
        plan_memory(parse_memory("budget=1GB"), some, 3 * 10**9)
    least = str(raised.value).split("Set memory to ")[1].split(" ")[0]
    assert plan_memory(parse_memory(least), some, 3 * 10**9).segments
    assert "3000MB of it" in str(raised.value)


def test_a_deep_network_is_planned_too():
    chance = random.Random(0)
    units = [
        UnitCost(
            name=f"{stage}.{k}",
            bytes=chance.randrange(10**8),
            input_bytes=chance.randrange(10**7),
            seconds=chance.random(),
            holder=f"{stage}",
            start=k,
            stop=k + 1,
            stage=f"{stage}",
        )
        for stage, blocks in enumerate((3, 8, 36, 3))
        for k in range(blocks)
    ]
    plan = plan_memory(Memory("budget", 10**9), [*units, UnitCost(name="heads", bytes=10**8)], 0)
    assert plan.peak_bytes <= 10**9
    assert 0 < plan.units < 50


# What is asked for.


@pytest.mark.parametrize(
    ("text", "memory"),
    [
        ("none", Memory()),
        ("stages", Memory("stages")),
        ("sqrt", Memory("sqrt")),
        ("budget=11GB", Memory("budget", 11 * 10**9)),
        ("budget=1.5GiB", Memory("budget", 3 * 2**29)),
        ("budget=900 mb", Memory("budget", 9 * 10**8)),
        ("budget=64MiB", Memory("budget", 2**26)),
    ],
)
def test_the_setting_is_read(text, memory):
    assert parse_memory(text) == memory


@pytest.mark.parametrize(
    "text",
    [
        "",
        "all",
        "Sqrt",
        "budget",
        "budget=",
        "budget=11",
        "budget=11KB",
        "budget=-1GB",
        "budget=0GB",
        "11GB",
        "budget=1GB ",
    ],
)
def test_any_other_setting_is_refused_in_a_line(text):
    with pytest.raises(
        ConfigError, match=r"Write none, stages, sqrt, or a budget in MB, GB, MiB or GiB such as budget=11GB"
    ):
        parse_memory(text)


def test_a_plan_says_in_a_line_what_it_does():
    line = plan_memory(Memory("sqrt"), chain(*[(10**6, 10**6, 1.0)] * 16), 0).describe()
    assert line.startswith("memory sqrt: 16 of 16 blocks are computed twice, in ")
    assert "100% of their forward pass" in line
    assert "\n" not in line
    assert plan_memory(Memory(), chain((1, 1, 1.0)), 0).describe() == "memory none: nothing is computed twice"
