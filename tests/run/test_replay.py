"""A failed step is repeated: the same numbers, and the module that made the first one that is not finite."""

import dataclasses
import math

import pytest
import torch

from gesso.errors import InputError, RunError, TrainingError
from gesso.models.box_head import BoxHead
from gesso.models.detector import Detector
from gesso.models.faster_rcnn import FasterRCNN
from gesso.models.losses import LossTerm
from gesso.models.norm import NormPolicy
from gesso.run.failure import read_failure, save_failure
from gesso.run.folder import RunFolder
from gesso.run.replay import replay
from gesso.run.train import train
from gesso.structures import ImageBatch
from gesso.training.optimizer import SGD
from gesso.training.schedule import ScheduleConfig
from gesso.training.step import train_step
from tests.run.helpers import rows, tiny_run, two_stages
from tests.run.poison import Poison

SHORT = {"steps": 6, "batch_size": 4, "checkpoint_every": 9, "evaluate_every": 9}


def keep_step(monkeypatch, run, step):
    """Keeps a step of a run as if it had failed, though all is finite."""

    def keeping(stage, *part, **options):
        if stage.step == step - 1:
            save_failure(RunFolder(run), "training", stage, step, *part)
        return train_step(stage, *part, **options)

    monkeypatch.setattr("gesso.training.loop.train_step", keeping)
    return run / "failures" / f"{step:08d}.pt"


def replaced_later(monkeypatch, owner, name, function):
    """From the second step of a run on, a method is another one."""

    def choose(stage, *part, **options):
        if stage.step == 1:
            monkeypatch.setattr(owner, name, function)
        return train_step(stage, *part, **options)

    monkeypatch.setattr("gesso.training.loop.train_step", choose)


def failed(config, out):
    """The file of the step at which a run fails."""
    with pytest.raises(TrainingError):
        train(config, out)
    (file,) = (out / "failures").iterdir()
    return file


LAYERS = {
    "backbone.body.conv1.0": "Conv2d",
    "backbone.body.layer3.0.bn2": "PolicyBatchNorm2d",
    "neck.lateral.1.0": "Conv2d",
    "rpn.head.objectness": "Conv2d",
    "box_head.fcs.0": "RegionLinear",
    "box_head.boxes": "Linear",
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("factor", [torch.nan, 1e38])
def test_the_layer_that_is_at_fault_is_named(data, tmp_path, monkeypatch, layer, factor):
    Poison(monkeypatch, 2, layer, factor)
    found = replay(failed(tiny_run(data, **SHORT), tmp_path / "r"))
    assert found.repeated and not math.isfinite(found.losses["loss"]) and found.gradient_norm is None
    assert (found.stage, found.step, found.processes, found.pictures, found.device) == ("training", 2, 1, 4, "cpu")
    if factor != factor:
        assert (found.finding.module, found.finding.kind) == (layer, LAYERS[layer])
        assert found.bad_weights == (f"{layer}.weight",)
    else:  # large, until it overflows: there, or a layer or two later
        assert found.finding is not None and found.bad_weights == ()
        assert found.largest_weight[0] == f"{layer}.weight" or "bn" in layer
    assert not found.backward and not found.broken_pictures and not found.inexact
    least, largest = found.finding.input_range
    assert math.isfinite(least) and math.isfinite(largest) and found.finding.bad > 0


def test_an_absurd_rate(data, tmp_path):
    schedule = ScheduleConfig(kind="constant", warmup_steps=0)
    config = tiny_run(data, **SHORT | {"clip_norm": None, "optimizer": SGD(rate=1e12), "schedule": schedule})
    found = replay(failed(config, tmp_path / "r"))
    assert found.repeated and found.finding is not None and found.largest_weight[1] > 1e6


SAME = {
    "as it is": {},
    "accumulate": {"accumulate": 2},
    "groups": {"norm": NormPolicy(kind="train", images=2)},
    "fixed": {"norm": NormPolicy(kind="fixed")},
    "group_norm": {"norm": NormPolicy(kind="group_norm")},
    "bfloat16": {"precision": "bfloat16"},
    "float64": {"precision": "float64", "accumulate": 4},
}


@pytest.mark.parametrize("case", SAME)
def test_losses_and_gradients_are_those_of_the_step(data, tmp_path, monkeypatch, case):
    """A step that was finite, kept all the same; and it is said that it cannot be made to fail."""
    file = keep_step(monkeypatch, tmp_path / "r", 3)
    train(tiny_run(data, **SHORT | {"steps": 3, **SAME[case]}), tmp_path / "r")
    row = next(row for row in rows(tmp_path / "r") if row["step"] == 3 and "loss" in row)
    found = replay(file)
    assert not found.repeated and found.finding is None and not found.bad_gradients
    assert {"loss", "rpn_objectness", "rpn_box", "box_class", "box_regression"} == found.losses.keys()
    for name, value in found.losses.items():
        assert value == pytest.approx(row[name], rel=1e-6 if case != "float64" else 1e-12), name
    assert found.gradient_norm == pytest.approx(row["gradient_norm"], rel=1e-4 if case != "float64" else 1e-10)


def test_drop_path_of_one_process_is_repeated(data, tmp_path, monkeypatch):
    config = tiny_run(data, **SHORT | {"steps": 2})
    backbone = dataclasses.replace(config.model.backbone, drop_path=0.5)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, backbone=backbone))
    file = keep_step(monkeypatch, tmp_path / "r", 2)
    train(config, tmp_path / "r")
    torch.manual_seed(77)
    row = next(row for row in rows(tmp_path / "r") if row["step"] == 2 and "loss" in row)
    found = replay(file)
    assert found.losses["loss"] == pytest.approx(row["loss"], rel=1e-6) and found.inexact == ()


def test_the_second_stage_has_the_norm_of_both(data, tmp_path, monkeypatch):
    """Group norm in the first stage stays; the second one's step is repeated with it."""
    config = two_stages(data)
    first = dataclasses.replace(config.pretraining, norm=NormPolicy(kind="group_norm"))
    Poison(monkeypatch, 5)
    found = replay(failed(dataclasses.replace(config, pretraining=first), tmp_path / "r"))
    assert (found.stage, found.step, found.stage_step) == ("training", 5, 2)
    assert found.finding.module == "neck.lateral.1.0"


def test_the_picture_that_is_at_fault_is_named(data, tmp_path, monkeypatch):
    """With fixed batch norm the others stay finite."""
    bad, normalise = {}, Detector.normalise

    def poisoned(self, batch):
        values = normalise(self, batch)
        return torch.where((batch.key == bad.get("key", -1))[:, None, None, None], values * 1e38, values)

    def choose(stage, batch, targets, **options):
        if stage.step == 1:
            bad.update(key=int(batch.key[2]), row=int(batch.image_index[2]))
        return train_step(stage, batch, targets, **options)

    monkeypatch.setattr(Detector, "normalise", poisoned)
    monkeypatch.setattr("gesso.training.loop.train_step", choose)
    found = replay(failed(tiny_run(data, **SHORT | {"norm": NormPolicy(kind="fixed")}), tmp_path / "r"))
    assert found.finding.module.startswith("backbone.body.")
    (picture,) = found.bad_pictures
    assert (picture.place, picture.row) == (2, bad["row"])
    assert picture.name.endswith((".png", ".jpg")) and found.finding.rows == (2,)


def test_regions_tell_their_picture(data, tmp_path, monkeypatch):
    forward = BoxHead.forward

    def poisoned(self, pooled, batch_size):
        found = forward(self, pooled, batch_size)
        return found._replace(logits=torch.cat([found.logits[:1], found.logits[1:2] / 0, found.logits[2:]]))

    replaced_later(monkeypatch, BoxHead, "forward", poisoned)
    found = replay(failed(tiny_run(data, **SHORT), tmp_path / "r"))
    assert (found.finding.module, found.finding.kind) == ("box_head", "BoxHead")
    assert [picture.place for picture in found.bad_pictures] == [1]


def test_a_loss_that_the_detector_s_own_code_makes(data, tmp_path, monkeypatch):
    """No module is at fault; each picture's own losses tell which one it is."""
    losses = FasterRCNN.losses

    def poisoned(self, maps, batch, targets):
        found = losses(self, maps, batch, targets)
        share = torch.where(batch.key == bad[0], torch.inf, 0.0).sum()
        return found | {"rpn_box": LossTerm(found["rpn_box"].total + share, found["rpn_box"].samples)}

    bad = [-1]

    def choose(stage, batch, targets, **options):
        if stage.step == 2:
            bad[0] = int(batch.key[3])
        return train_step(stage, batch, targets, **options)

    monkeypatch.setattr(FasterRCNN, "losses", poisoned)
    monkeypatch.setattr("gesso.training.loop.train_step", choose)
    found = replay(failed(tiny_run(data, **SHORT), tmp_path / "r"))
    assert (found.finding.module, found.finding.kind) == ("", "FasterRCNN")
    assert found.losses["rpn_box"] == math.inf and math.isfinite(found.losses["box_class"])
    assert [picture.place for picture in found.bad_pictures] == [3]


class _Steep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient / 0


def test_a_backward_pass_alone(data, tmp_path, monkeypatch):
    """The loss is finite, and a gradient is not."""
    forward = BoxHead.forward

    def steep(self, pooled, batch_size):
        return forward(self, _Steep.apply(pooled), batch_size)

    replaced_later(monkeypatch, BoxHead, "forward", steep)
    found = replay(failed(tiny_run(data, **SHORT), tmp_path / "r"))
    assert found.repeated and found.backward and math.isfinite(found.losses["loss"])
    assert not math.isfinite(found.gradient_norm)
    assert (found.finding.module, found.finding.what) == ("box_head", "the gradient of its input")
    assert "backbone.body.conv1.0.weight" in found.bad_gradients
    assert not any(name.startswith(("box_head", "rpn")) for name in found.bad_gradients)


def test_a_norm_that_overflows_by_itself(data, tmp_path, monkeypatch):
    """Gradients of 1e30 are finite, and their squares are not."""
    forward = BoxHead.forward

    class Loud(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 1e30

    def loud(self, pooled, batch_size):
        found = forward(self, pooled, batch_size)
        return found._replace(logits=Loud.apply(found.logits))

    replaced_later(monkeypatch, BoxHead, "forward", loud)
    found = replay(failed(tiny_run(data, **SHORT), tmp_path / "r"))
    assert found.repeated and found.finding is None and found.gradient_norm == math.inf and not found.bad_gradients


def test_a_batch_that_is_not_finite_itself(data, tmp_path, monkeypatch):
    """No module is at fault: the picture is named."""
    seen = []

    def with_nan(value, device):
        if isinstance(value, ImageBatch):
            seen.append(value)
            images = value.images.float()
            images[1, 0, 5, 5] = torch.nan if len(seen) == 2 else 0
            return dataclasses.replace(value, images=images)
        return value

    monkeypatch.setattr("gesso.training.loop.to_device", with_nan)
    found = replay(failed(tiny_run(data, **SHORT), tmp_path / "r"))
    assert found.repeated and found.finding is None
    assert [(picture.place, picture.row) for picture in found.broken_pictures] == [(1, int(seen[1].image_index[1]))]


@pytest.fixture(scope="module")
def kept(data, tmp_path_factory):
    """The file of a failed step."""
    with pytest.MonkeyPatch.context() as patch:
        Poison(patch, 2)
        return failed(tiny_run(data, **SHORT), tmp_path_factory.mktemp("kept") / "r")


def test_the_same_twice(kept):
    assert repr(replay(kept)) == repr(replay(kept))


def test_a_file_outside_its_run_is_refused(kept, data, tmp_path):
    alone = tmp_path / "00000002.pt"
    alone.write_bytes(kept.read_bytes())
    with pytest.raises(InputError, match=r"lies in no run's folder.*Put it back to RUN/failures\.$"):
        replay(alone)
    other = tmp_path / "other"
    train(tiny_run(data, steps=1, batch_size=3, val=False), other)
    (other / "failures").mkdir()
    moved = other / "failures" / kept.name
    moved.write_bytes(kept.read_bytes())
    replay(moved)  # of the same form: nothing contradicts it
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(config.replace('"accumulate": 1', '"accumulate": 3'))
    with pytest.raises(InputError, match="this is no step of the run"):
        replay(moved)
    (other / "config.json").write_text(config.replace('"width": 64', '"width": 32'))
    with pytest.raises(RunError, match="not those of the detector of"):
        replay(moved)


def test_data_that_is_gone_costs_the_names_alone(kept, monkeypatch):
    monkeypatch.setattr("gesso.run.replay.Index.open", _gone)
    found = replay(kept)
    assert found.finding.module == "neck.lateral.1.0"
    assert [picture.name for picture in found.bad_pictures] == [None] * 4
    rows_of = read_failure(kept).batch.image_index.tolist()
    assert [picture.row for picture in found.bad_pictures] == rows_of


def _gone(path):
    raise InputError("does not exist", where=path)


def test_memory_that_does_not_suffice(kept, monkeypatch):
    def scarce(*given, **named):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("gesso.run.replay._repeat", scarce)
    with pytest.raises(RunError, match=r"memory of cpu does not suffice.*--device cpu"):
        replay(kept)


def test_what_is_inexact_is_said(kept, monkeypatch):
    failure = read_failure(kept)
    monkeypatch.setattr("gesso.run.replay.read_failure", lambda path: dataclasses.replace(failure, device="cuda"))
    assert replay(kept).inexact == ("The step was made on cuda, which rounds otherwise than cpu.",)


@pytest.mark.gpu
def test_on_a_gpu(kept):
    found = replay(kept, device="cuda")
    assert found.finding.module == "neck.lateral.1.0" and found.device == "cuda" and len(found.inexact) == 1
