import dataclasses
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from gesso import distributed
from gesso.data.loading import training_batches
from gesso.models.norm import NormPolicy, PolicyBatchNorm2d, apply_norm_policy
from gesso.random_key import fold
from gesso.recipes.debug import tiny
from gesso.run.models import new_model
from gesso.training.ema import EMA
from gesso.training.loop import run_stage
from gesso.training.optimizer import build_optimizer
from gesso.training.precise_bn import precise_statistics
from gesso.training.stage import Stage
from tests.distributed.processes import run
from tests.run.helpers import tiny_run
from tests.training.helpers import CPU, Recorder, assert_same, batches, everything, new_stage, tiny_config


def trained(**changes):
    stage = new_stage(tiny_config(**{"precision": "float64", "steps": 3, "precise_bn": 12} | changes))
    run_stage(stage, batches(0), Recorder().callbacks())
    return stage


def reference(stage, pictures):
    """All inputs of the one norm, one below the other; slow and plain. ``pictures`` = whole batches."""
    module, inputs = stage.module, []
    own = {name: value.clone() for name, value in module.state_dict().items()}
    module.load_state_dict(own if stage.ema is None else stage.ema.average)
    module.train()
    hook = module.backbone[1].register_forward_pre_hook(lambda _, given: inputs.append(given[0].detach().clone()))
    with torch.no_grad():
        for number, (batch, targets) in enumerate(itertools.islice(batches(stage.sample), pictures // 4)):
            torch.manual_seed(fold(stage.seed, stage.step + number, 0))
            module(batch, targets)
    hook.remove()
    module.load_state_dict(own)
    rows = torch.cat(inputs).permute(1, 0, 2, 3).flatten(1)
    return {"backbone.1.running_mean": rows.mean(1), "backbone.1.running_var": rows.var(1)}


@pytest.mark.parametrize("decay", [None, 0.9])
@pytest.mark.parametrize(("wanted", "drawn"), [(12, 12), (9, 12), (1, 4)])
def test_equals_all_inputs_together(decay, wanted, drawn):
    """Of the averages where they are kept; as many whole batches as hold the pictures."""
    stage = trained(ema_decay=decay, precise_bn=wanted)
    found = precise_statistics(stage, batches(stage.sample))
    torch.testing.assert_close(found, reference(stage, drawn), rtol=1e-12, atol=1e-14)
    running = stage.module.state_dict()
    assert all(not torch.allclose(value, running[name], rtol=1e-3) for name, value in found.items())


def test_is_close_in_float32():
    stage = trained(precision="float32")
    found = precise_statistics(stage, batches(stage.sample))
    assert {value.dtype for value in found.values()} == {torch.float32}
    torch.testing.assert_close(found, reference(stage, 12), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("decay", [None, 0.9])
def test_nothing_in_the_stage_changes(decay):
    stage = trained(ema_decay=decay)
    stage.module.eval()
    before = everything(stage)
    precise_statistics(stage, batches(stage.sample))
    assert_same(before, everything(stage))
    assert not stage.module.training and not stage.module.backbone[1]._forward_pre_hooks
    assert all(parameter.grad is None for parameter in stage.module.frozen.parameters())


def test_an_error_leaves_everything_as_before():
    stage = trained()
    before = everything(stage)
    with pytest.raises(StopIteration):
        precise_statistics(stage, itertools.islice(batches(stage.sample), 2))
    assert_same(before, everything(stage))
    assert not stage.module.backbone[1]._forward_pre_hooks


@pytest.mark.parametrize("kind", ["affine", "fixed", "group_norm"])
def test_without_statistics_in_training_there_is_nothing_to_do(kind):
    stage = trained()
    apply_norm_policy(stage.module, NormPolicy(kind=kind))
    assert precise_statistics(stage, iter(())) == {}


def detector_stage(index, *, images: int | None, accumulate: int = 1):
    config = tiny_run(None, precision="float64", ema_decay=0.9, precise_bn=24, accumulate=accumulate)
    world = distributed.world_size()
    torch.manual_seed(0)
    detector = new_model(config, len(index.label_space), pretrained=False)
    apply_norm_policy(detector, NormPolicy(kind="sync", images=images), pictures=8 // (world * accumulate))
    detector.double()
    stage = Stage(
        config=config.training,
        module=detector,
        optimizer=build_optimizer(detector, config.training.optimizer),
        ema=EMA(detector, 0.9),
        device=CPU,
        seed=5,
        step=4,
        sample=32,
    )
    stream = training_batches(
        index,
        config.training.input,
        seed=5,
        batch_size=8,
        first_sample=stage.sample,
        rank=distributed.rank(),
        world=world,
        max_boxes=10,
    )
    return stage, stream


def _of_detector(path, images):
    from gesso.data.index import Index

    found = precise_statistics(*detector_stage(Index.open(path), images=images))
    return {name: value.numpy() for name, value in found.items()}


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    from gesso.data.demo_index import demo_index

    return demo_index(tmp_path_factory.mktemp("data"), tiny().data.embedded)


@pytest.mark.slow
@pytest.mark.parametrize("images", [None, 2])
def test_several_processes_find_the_same(index, images):
    alone = _of_detector(index.path, images)
    one, two = run(_of_detector, 2, index.path, images)
    assert one.keys() == two.keys() == alone.keys() and len(alone) > 10
    for name, value in alone.items():
        np.testing.assert_array_equal(one[name], two[name])
        np.testing.assert_allclose(one[name], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_norm_of_a_detector_is_found(index, accumulate):
    """A picture passes in a batch as in training: in one of the parts of a step."""
    stage, stream = detector_stage(index, images=None, accumulate=accumulate)
    stage.config = dataclasses.replace(stage.config, precise_bn=8)
    inputs: dict[str, list[torch.Tensor]] = {}
    norms = {name: part for name, part in stage.module.named_modules() if isinstance(part, PolicyBatchNorm2d)}
    hooks = [
        part.register_forward_pre_hook(lambda _, given, name=name: inputs.setdefault(name, []).append(given[0].clone()))
        for name, part in norms.items()
    ]
    found = precise_statistics(stage, stream)
    for hook in hooks:
        hook.remove()
    assert len(norms) == len(inputs) == len(found) / 2 > 5
    for name, each in inputs.items():
        assert [len(given) for given in each] == [8 // accumulate] * accumulate
        rows = torch.cat(each).permute(1, 0, 2, 3).flatten(1)
        torch.testing.assert_close(found[f"{name}.running_mean"], rows.mean(1), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found[f"{name}.running_var"], rows.var(1), rtol=1e-10, atol=1e-12)


class Twice(nn.Module):
    """One norm that is used twice in a pass, on maps of two sizes, as a head on a pyramid is."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, batch, targets):
        images = batch.images.double()
        return {"loss": (self.norm(images) ** 2).mean() + (self.norm(images[..., ::2, ::2]) ** 2).mean()}


def test_a_norm_that_is_used_twice_has_one_population():
    config = tiny_config(precision="float64", precise_bn=8, ema_decay=None)
    module = Twice().double()
    optimizer = build_optimizer(module, config.optimizer)
    stage = Stage(config=config, module=module, optimizer=optimizer, ema=None, device=CPU, seed=0)
    found = precise_statistics(stage, batches(0))
    images = [batch.images.double() for batch, _ in itertools.islice(batches(0), 2)]
    rows = torch.cat(
        [part.permute(1, 0, 2, 3).flatten(1) for whole in images for part in (whole, whole[..., ::2, ::2])], 1
    )
    torch.testing.assert_close(found, {"norm.running_mean": rows.mean(1), "norm.running_var": rows.var(1)})
