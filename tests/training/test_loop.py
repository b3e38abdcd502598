import dataclasses
import itertools
import json
import math
import subprocess
import sys
from collections import Counter
from itertools import count
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gesso import config as configs
from gesso.errors import ConfigError, TrainingError
from gesso.random_key import fold
from gesso.structures import map_tensors, to_device
from gesso.training import loop
from gesso.training import step as steps
from gesso.training.ema import EMA
from gesso.training.loop import Callbacks, run_stage
from gesso.training.optimizer import SGD, AdamW, build_optimizer
from gesso.training.schedule import rate_factor
from gesso.training.stage import Stage, TrainingConfig
from gesso.training.timing import RowMeter
from tests.training.helpers import (
    CPU,
    Recorder,
    Tiny,
    assert_same,
    batches,
    everything,
    new_stage,
    restore,
    save,
    tiny_config,
)

OPTIMIZERS = [SGD(rate=0.1, backbone_factor=0.5), AdamW(rate=0.01)]
ROOT = Path(__file__).parents[2]


def test_one_stage_equals_a_plain_loop():
    """Weights, running statistics, averages and rows against the obvious way to write it."""
    config = tiny_config(optimizer=SGD(rate=0.1, norm_decay=1e-4, bias_decay=1e-4), precision="float64")
    stage, recorder = new_stage(config), Recorder()
    run_stage(stage, batches(0), recorder.callbacks())

    torch.manual_seed(0)
    module = Tiny().double().train()
    averages = {name: value.clone() for name, value in module.state_dict().items()}
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9, weight_decay=1e-4)
    stream, losses = batches(0), []
    for step in range(8):
        batch, targets = next(stream)
        torch.manual_seed(fold(11, step, 0))
        parts = module(batch, targets)
        total = parts["box"] + parts["label"]
        optimizer.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.param_groups[0]["lr"] = 0.1 * rate_factor(config.schedule, step, 8, 4)
        optimizer.step()
        losses.append((total.item(), norm.item()))
        decay = min(0.9, (1 + step) / (10 + step))
        for name, value in module.state_dict().items():
            averages[name] = decay * averages[name] + (1 - decay) * value if value.is_floating_point() else value
    torch.testing.assert_close(stage.module.state_dict(), module.state_dict(), rtol=1e-10, atol=1e-12)
    assert stage.ema is not None
    torch.testing.assert_close(stage.ema.average, averages, rtol=1e-10, atol=1e-12)
    for step, row in recorder.rows:
        assert (row["loss"], row["gradient_norm"]) == pytest.approx(losses[step - 1], rel=1e-10)
        assert row["loss"] == pytest.approx(row["box"] + row["label"])


def test_rows_and_calls():
    config = tiny_config(steps=14, checkpoint_every=4, evaluate_every=6)
    stage, recorder = new_stage(config), Recorder()
    run_stage(stage, batches(0), recorder.callbacks())
    assert [step for step, _ in recorder.rows] == [1, 2, 3, 5, 6, 9, 10, 12, 14]
    assert recorder.ticks == list(range(1, 15))
    assert recorder.events == [
        ("checkpoint", 4),
        ("evaluate", 6),
        ("checkpoint", 6),
        ("checkpoint", 8),
        ("evaluate", 12),
        ("checkpoint", 12),
        ("evaluate", 14),
        ("checkpoint", 14),
    ]
    row = dict(recorder.rows)[9]
    assert set(row) == {
        *("loss", "box", "label", "gradient_norm", "learning_rate", "images", "memory_gib", "seconds"),
        *("images_per_second", "images_per_second_per_gpu", "step_seconds", "eta_seconds"),
        *("data_share", "forward_share", "backward_share", "communication_share", "optimizer_share"),
    }
    assert row["images"] == 36
    assert row["learning_rate"] == pytest.approx(0.1 * rate_factor(config.schedule, 8, 14, 4))
    shares = [value for key, value in row.items() if key.endswith("_share")]
    assert 0 < row["memory_gib"] < 1000 and row["communication_share"] < 0.1  # alone, it waits for nobody
    assert 0.3 < sum(shares) <= 1 and all(share > 0 for share in shares)
    assert json.loads(json.dumps(row)) == row
    assert (stage.step, stage.sample) == (14, 56)


def test_speed_is_a_mean_over_the_steps_since_the_last_row(monkeypatch):
    """With a clock that moves one second at each look: the step's own two, and eight marks of its phases."""
    clock = count()
    monkeypatch.setattr(loop.time, "perf_counter", lambda: float(next(clock)))
    stage, recorder = new_stage(tiny_config(steps=9)), Recorder()
    run_stage(stage, batches(0), recorder.callbacks())
    for step, row in recorder.rows:
        assert (row["step_seconds"], row["images_per_second"], row["eta_seconds"]) == (9.0, 4 / 9, 9.0 * (9 - step))
        shares = {name: row[f"{name}_share"] * 9 for name in ("data", "forward", "backward", "communication")}
        assert shares == pytest.approx({"data": 1, "forward": 1, "backward": 1, "communication": 1})
        assert row["optimizer_share"] * 9 == pytest.approx(3)
        assert row["seconds"] == 9.0 * step


def test_ratios_are_means_over_the_steps_since_the_last_row(monkeypatch, tmp_path):
    """Also where the run was interrupted between two rows."""
    config = tiny_config(steps=9, log_every=4)
    given = lambda step: {"rpn_positive_ratio": 1 / (step + 3)}  # noqa: E731

    def run(stage, callbacks):
        train, first = steps.train_step, stage.step

        def with_ratios(stage, *rest, **options):
            numbers = train(stage, *rest, **options)
            return Ratios(numbers, given(stage.step + 1))

        monkeypatch.setattr(loop, "train_step", with_ratios)
        run_stage(stage, batches(4 * first), callbacks)
        monkeypatch.undo()

    whole = Recorder()
    run(new_stage(config), whole.callbacks())
    for (before, _), (step, row) in itertools.pairwise([(0, {}), *whole.rows]):
        expected = [given(k)["rpn_positive_ratio"] for k in range(before + 1, step + 1)]
        assert row["rpn_positive_ratio"] == pytest.approx(sum(expected) / len(expected), rel=1e-12)
    assert [step for step, _ in whole.rows] == [1, 2, 4, 5, 8, 9]

    stage, first, second = new_stage(config), Recorder(stop_after=7), Recorder()
    callbacks = first.callbacks()
    run(stage, callbacks)
    kept = json.loads(json.dumps(callbacks.meter.kept()))
    assert kept["steps"] == 2
    stage.stopped = False
    run(stage, dataclasses.replace(second.callbacks(), meter=RowMeter.resumed(kept)))
    interrupted = {step: row["rpn_positive_ratio"] for step, row in first.rows + second.rows}
    assert interrupted == {step: row["rpn_positive_ratio"] for step, row in whole.rows}


@dataclasses.dataclass
class Ratios:
    """The numbers of a step with others beside them."""

    numbers: steps.Numbers
    more: dict

    def read(self):
        found, finite = self.numbers.read()
        return found | self.more, finite


def test_a_stop_request_finishes_the_step_and_saves():
    stage, recorder = new_stage(tiny_config()), Recorder(stop_after=4)
    run_stage(stage, batches(0), recorder.callbacks())
    assert stage.stopped and stage.step == 4
    assert recorder.events == [("checkpoint", 4)]
    whole = new_stage(tiny_config(steps=4, schedule=stage.config.schedule))
    whole.config = stage.config
    run_stage(whole, batches(0), Recorder(stop_after=4).callbacks())
    assert_same(everything(stage), everything(whole))


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=["sgd", "adamw"])
@pytest.mark.parametrize("bad_step", [1, 2, 5])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_loss_that_is_no_number_leaves_everything_as_before(optimizer, bad_step, clip):
    """The flag is read one step late; the bad step and the one after it change no bit."""
    config = tiny_config(optimizer=optimizer, clip_norm=clip)
    poison = (bad_step - 1) * config.batch_size + 2
    good = new_stage(config, poison=poison)
    if bad_step > 1:
        run_stage(good, batches(0), Recorder(stop_after=bad_step - 1).callbacks())
    stage, recorder = new_stage(config, poison=poison), Recorder()
    with pytest.raises(TrainingError, match=rf"step {bad_step}: .*box 0\.\d+, label nan") as raised:
        run_stage(stage, batches(0), recorder.callbacks())
    assert "\n" not in str(raised.value)
    assert not recorder.events
    after = everything(stage)
    if bad_step == 1:  # AdamW makes its moments at the first step
        moments = {name: value for name, value in after.items() if name.startswith("optimizer.")}
        assert all(bool((value == 0).all()) for value in moments.values())
        after = {name: value for name, value in after.items() if name not in moments}
        assert_same(after, {n: v for n, v in everything(good).items() if n not in moments})
    else:
        assert_same(after, everything(good))


def test_a_gradient_that_is_no_number_stops_too():
    class Kink(Tiny):
        def forward(self, batch, targets):
            losses = super().forward(batch, targets)
            return losses | {"kink": (self.head.weight * 0).sum().sqrt()}  # 0, with an infinite slope

    config = tiny_config()
    stage = new_stage(config)
    torch.manual_seed(0)
    stage.module = Kink()
    stage.optimizer = build_optimizer(stage.module, config.optimizer)
    before = stage.module.head.weight.detach().clone()
    with pytest.raises(TrainingError, match="kink 0, gradient_norm nan"):
        run_stage(stage, batches(0), Recorder().callbacks())
    assert torch.equal(stage.module.head.weight, before)


def test_nothing_bad_is_saved():
    """A checkpoint that is due at the bad step is not made."""
    stage, recorder = new_stage(tiny_config(checkpoint_every=3), poison=10), Recorder()
    with pytest.raises(TrainingError, match="step 3"):
        run_stage(stage, batches(0), recorder.callbacks())
    assert not recorder.events


class Watch(TorchDispatchMode):
    """Counts the operations that would make the host wait for a device, or give a shape that depends on data."""

    WAITS = ("_local_scalar_dense", "nonzero", "item", "masked_select", "is_nonzero", "equal", "unique")

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        boolean = name == "index" and any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
        self.seen[name if name in self.WAITS or boolean else "harmless"] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=["sgd", "adamw"])
def test_a_step_never_waits_for_the_device(optimizer):
    stage = new_stage(tiny_config(optimizer=optimizer))
    stream = batches(0)
    pairs = [next(stream) for _ in range(3)]
    with Watch() as watch:
        for batch, targets in pairs:
            steps.train_step(stage, to_device(batch, CPU), to_device(targets, CPU))
    assert set(watch.seen) == {"harmless"} and watch.seen["harmless"] > 100
    with Watch() as watch:
        bool(torch.ones(2).sum() > 0)
    assert watch.seen["_local_scalar_dense"] == 1


def resumed(config, folder, *, at):
    """``at`` steps, a checkpoint, new objects with other first weights, and the other steps."""
    first = new_stage(config)
    run_stage(first, batches(0), Recorder(stop_after=at).callbacks())
    found = save(first, folder)
    second, recorder = new_stage(config, init=99), Recorder()
    restore(found, second)
    run_stage(second, batches(second.sample), recorder.callbacks())
    return second, recorder


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=["sgd", "adamw"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float64"])
def test_resume_is_exact(tmp_path, optimizer, precision):
    config = tiny_config(optimizer=optimizer, precision=precision)
    whole, recorder = new_stage(config), Recorder()
    run_stage(whole, batches(0), recorder.callbacks())
    second, later = resumed(config, tmp_path, at=3)
    assert_same(everything(whole), everything(second))
    losses = {step: (row["loss"], row["gradient_norm"]) for step, row in recorder.rows}
    assert {step: (row["loss"], row["gradient_norm"]) for step, row in later.rows} == {
        step: values for step, values in losses.items() if step > 3
    }
    assert whole.ema is not None and second.ema is not None and whole.ema.updates == second.ema.updates == 8


def test_resume_without_averages_is_exact(tmp_path):
    config = tiny_config(ema_decay=None, clip_norm=None)
    whole = new_stage(config)
    run_stage(whole, batches(0), Recorder().callbacks())
    second, _ = resumed(config, tmp_path, at=5)
    assert_same(everything(whole), everything(second))
    assert not (tmp_path / "00000005" / "ema.safetensors").exists()


RESUME = """
import sys, torch
from pathlib import Path
from gesso.training.checkpoint import newest_checkpoint
from gesso.training.loop import Callbacks, run_stage
from tests.training.helpers import Recorder, batches, new_stage, restore, save, tiny_config
torch.set_num_threads(int(sys.argv[2]))
stage = new_stage(tiny_config(), init=99)
restore(newest_checkpoint(Path(sys.argv[1])), stage)
run_stage(stage, batches(stage.sample), Recorder().callbacks())
save(stage, Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_resume_in_another_process_is_exact(tmp_path):
    first, whole = new_stage(tiny_config()), new_stage(tiny_config())
    run_stage(whole, batches(0), Recorder().callbacks())
    save(whole, tmp_path / "whole")
    run_stage(first, batches(0), Recorder(stop_after=3).callbacks())
    save(first, tmp_path)
    command = [sys.executable, "-c", RESUME, str(tmp_path), str(torch.get_num_threads())]
    subprocess.run(command, check=True, cwd=ROOT, timeout=120)
    for name in ("model.safetensors", "ema.safetensors", "optimizer.pt"):
        assert (tmp_path / "00000008" / name).read_bytes() == (tmp_path / "whole" / "00000008" / name).read_bytes()


def test_dropout_depends_on_seed_and_step_alone():
    """What the global generator did before a step, in evaluation for example, does not matter."""
    plain, disturbed = new_stage(tiny_config()), new_stage(tiny_config())
    run_stage(plain, batches(0), Recorder().callbacks())
    recorder = Recorder()
    callbacks = recorder.callbacks()
    noisy = Callbacks(
        row=callbacks.row,
        checkpoint=callbacks.checkpoint,
        evaluate=callbacks.evaluate,
        tick=lambda step: torch.manual_seed(step * 77),
    )
    run_stage(disturbed, batches(0), noisy)
    assert_same(everything(plain), everything(disturbed))
    other = new_stage(tiny_config())
    other.seed = 12
    run_stage(other, batches(0), Recorder().callbacks())
    assert not torch.equal(other.module.head.weight, plain.module.head.weight)


def test_the_optimizer_learns():
    config = tiny_config(steps=60, log_every=60, optimizer=SGD(rate=0.2))
    stage, recorder = new_stage(config), Recorder()
    stage.module.dropout.p = 0.0
    same = next(batches(0))
    run_stage(stage, iter(lambda: same, None), recorder.callbacks())
    rows = dict(recorder.rows)
    assert rows[60]["loss"] < 0.7 * rows[1]["loss"]
    assert math.isfinite(rows[60]["gradient_norm"])


@pytest.mark.slow
def test_compiled_step_is_one_graph_and_equals_the_eager_one():
    config = tiny_config(steps=3, precision="float64")
    eager, compiled = new_stage(config), new_stage(tiny_config(steps=3, precision="float64", compile=True))
    for stage in (eager, compiled):
        stage.module.dropout.p = 0.0
        run_stage(stage, batches(0), Recorder().callbacks())
    torch.testing.assert_close(everything(eager), everything(compiled), rtol=1e-9, atol=1e-10)


def test_every_padded_shape_has_its_graph(monkeypatch):
    """More shapes than torch's own limit: five aspect ratios at several short sides, in two stages."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **how: compiled(module, backend="eager", **how))
    torch.compiler.reset()
    stage, recorder = new_stage(tiny_config(steps=12, log_every=1, compile=True)), Recorder()
    stream = batches(0)

    def growing():
        for side in count(8):
            batch, targets = next(stream)
            yield dataclasses.replace(batch, images=torch.zeros(4, 3, side, side, dtype=torch.uint8)), targets

    run_stage(stage, growing(), recorder.callbacks())
    assert recorder.ticks[-1] == 12


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=["sgd", "adamw"])
def test_no_step_synchronises_a_gpu(optimizer):
    config = tiny_config(optimizer=optimizer, compile=False)
    cpu, gpu = new_stage(config), new_stage(config)
    gpu.device = torch.device("cuda")
    gpu.module.cuda()
    gpu = Stage(
        config=config,
        module=gpu.module,
        optimizer=build_optimizer(gpu.module, optimizer),
        ema=EMA(gpu.module, 0.9),
        device=gpu.device,
        seed=gpu.seed,
    )
    for stage in (cpu, gpu):
        stage.module.dropout.p = 0.0
    run_stage(cpu, batches(0), Recorder().callbacks())
    torch.cuda.set_sync_debug_mode("error")
    try:
        pinned = ((to_pinned(batch), to_pinned(targets)) for batch, targets in batches(0))
        run_stage(gpu, pinned, Recorder().callbacks())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    ours = {name: value.cpu() for name, value in everything(gpu).items()}
    torch.testing.assert_close(ours, everything(cpu), rtol=1e-3, atol=1e-4)


def to_pinned(value):
    return map_tensors(value, lambda tensor: tensor.pin_memory())


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"log_every": 0},
        {"keep_checkpoints": 0},
        {"clip_norm": 0.0},
        {"ema_decay": 1.0},
    ],
)
def test_ranges(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        TrainingConfig(**wrong)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=["sgd", "adamw"])
def test_configuration_survives_storage(optimizer):
    config = tiny_config(optimizer=optimizer, clip_norm=None)
    assert configs.from_dict(TrainingConfig, configs.to_dict(config)) == config
