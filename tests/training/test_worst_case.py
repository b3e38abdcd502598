import dataclasses
import logging
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from gesso.data.transforms import Direct, InputConfig, KeepRatio
from gesso.errors import ConfigError
from gesso.models.build import build_detector
from gesso.models.mask_head import MaskHeadConfig
from gesso.models.norm import NormPolicy
from gesso.recipes.small import small_detector
from gesso.structures import Targets
from gesso.training import worst_case
from gesso.training.loop import run_stage
from gesso.training.optimizer import SGD, AdamW, build_optimizer
from gesso.training.stage import Stage
from gesso.training.worst_case import largest_shape, rehearse, worst_batch
from tests.training.helpers import CPU, Recorder, Tiny, assert_same, batches, everything, new_stage, tiny_config

ROOT = Path(__file__).parents[2]
SHAPE = (16, 24)


def example(count: int = 4, slots: int = 3, mask_side: int = 0, classes: int = 0):
    """A batch of ``batches`` with more slots, most of them empty."""
    batch, targets = next(batches(0, batch_size=count))
    more = {
        name: torch.cat([value, value.new_zeros(count, slots - 1, *value.shape[2:])], 1)
        for name, value in vars(targets).items()
        if value is not None
    }
    if mask_side:
        more["masks"] = torch.zeros(count, slots, mask_side, mask_side, dtype=torch.uint8)
        more["mask_frames"] = torch.zeros(count, slots, 4)
    if classes:
        more["verified"] = torch.zeros(count, classes, dtype=torch.int8)
    channels_last = batch.images.contiguous(memory_format=torch.channels_last)
    return dataclasses.replace(batch, images=channels_last), Targets(**more)


def all_of(stage: Stage):
    """Everything, beside the tensors the rates, the counters and the random state."""
    return everything(stage) | {
        "rates": torch.tensor([group["lr"] for group in stage.optimizer.param_groups]),
        "counters": torch.tensor([stage.step, stage.sample, stage.seconds, stage.ema.updates if stage.ema else -1]),
        "alive": stage.alive.clone(),
        "random": torch.get_rng_state(),
    }


OPTIMIZERS = [SGD(rate=0.1), SGD(rate=0.1, momentum=0.0), AdamW(rate=0.01)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=["sgd", "no momentum", "adamw"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("done", [0, 3])
def test_a_rehearsal_changes_no_bit(optimizer, precision, done):
    """Neither of the stage as it stands, nor of what is trained from there on."""
    config = tiny_config(optimizer=optimizer, precision=precision, ema_decay=0.9 if done else None)
    plain, rehearsed = new_stage(config), new_stage(config)
    for stage in (plain, rehearsed) if done else ():
        run_stage(stage, batches(0), Recorder(stop_after=done).callbacks())
        stage.stopped = False
    before = all_of(rehearsed)
    rehearse(rehearsed, example(), SHAPE, name="training")
    assert_same(before, all_of(rehearsed))
    assert all(parameter.grad is None for parameter in rehearsed.module.parameters())
    first, second = Recorder(), Recorder()
    run_stage(plain, batches(plain.sample), first.callbacks())
    run_stage(rehearsed, batches(rehearsed.sample), second.callbacks())
    assert_same(everything(plain), everything(rehearsed))
    assert [row["loss"] for _, row in first.rows] == [row["loss"] for _, row in second.rows]


def test_a_rehearsal_is_the_largest_step(caplog):
    """The pictures, the objects and the state that the module and the optimizer see, and what is logged."""
    stage, seen = new_stage(tiny_config(optimizer=AdamW())), []

    class Spy(Tiny):
        def forward(self, batch, targets):
            moments = [len(stage.optimizer.state[p]) for group in stage.optimizer.param_groups for p in group["params"]]
            seen.append((batch.images.shape, targets.valid.sum().item(), set(moments), self.training))
            return super().forward(batch, targets)

    stage.module.__class__ = Spy
    with caplog.at_level(logging.INFO, logger="gesso"):
        done = rehearse(stage, example(), SHAPE, name="training")
    assert seen == [((4, 3, 16, 24), 12, {3}, True)]
    assert (done.pictures, done.shape, done.objects) == (4, SHAPE, 3)
    assert done.seconds > 0 and 0 < done.memory_gib < 1000
    assert "the largest step (4 pictures of 16 x 24 with 3 objects each) takes 0.0 s and " in caplog.text


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ZeroDivisionError])
def test_what_breaks_a_rehearsal_leaves_nothing_half_made(kind):
    """Ctrl-C after the running statistics have moved, and any other error."""
    stage = new_stage(tiny_config(optimizer=AdamW()))

    class Broken(Tiny):
        def forward(self, batch, targets):
            super().forward(batch, targets)
            raise kind

    stage.module.__class__ = Broken
    before = all_of(stage)
    with pytest.raises(kind):
        rehearse(stage, example(), SHAPE, name="training")
    assert_same(before, all_of(stage))


def test_the_largest_shape_is_one_that_occurs():
    config = InputConfig(resize=KeepRatio(short_sides=(64, 128), long_side=256))
    assert largest_shape(config, [100, 100], [100, 90]) == (192, 128)
    assert largest_shape(config, [100], [100]) == (128, 128)
    assert largest_shape(config, [100, 100], [100, 300]) == (128, 256)
    assert largest_shape(config, [300, 100], [100, 100]) == (256, 128)
    assert largest_shape(InputConfig(resize=Direct(side=64)), [7, 3000], [3000, 7]) == (64, 64)


@pytest.mark.parametrize("slots", [1, 2, 3, 7, 100, 1000])
@pytest.mark.parametrize("shape", [(32, 32), (64, 256), (800, 1344), (1344, 800)])
def test_the_objects_are_valid_and_all_over_the_picture(slots, shape):
    batch, targets = worst_batch(example(slots=slots, mask_side=8, classes=5), shape, 2)
    assert targets.boxes.shape == (2, slots, 4) and targets.valid.all() and not targets.ignore.any()
    low, high = targets.boxes[..., :2], targets.boxes[..., 2:]
    assert (low >= 0).all() and (high <= torch.tensor([shape[1], shape[0]])).all() and (high > low).all()
    assert slots < 7 or (low.amin((0, 1)) < 0.25 * high.amax((0, 1))).all()
    assert slots < 7 or (high.amax((0, 1)) > 0.75 * torch.tensor([shape[1], shape[0]])).all()
    assert torch.equal(targets.mask_frames, targets.boxes) and targets.masks.all() and targets.verified.all()
    assert (batch.sizes == torch.tensor(shape)).all() and batch.images.float().std() > 10


def test_the_batch_has_the_form_of_the_real_ones():
    """Or the graph that is compiled for it would not be the one of the real steps."""
    real = example(mask_side=8, classes=5)
    made = worst_batch(real, (8, 8), 4)
    for ours, theirs in zip(made, real, strict=True):
        for field in dataclasses.fields(theirs):
            a, b = getattr(ours, field.name), getattr(theirs, field.name)
            assert (a is None) == (b is None), field.name
            if a is not None:
                assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), field.name
    without = worst_batch(example(), (8, 8), 4)[1]
    assert (without.masks, without.mask_frames, without.verified, without.semantic) == (None,) * 4


class Hungry(Tiny):
    """Runs out of memory above ``most`` pictures; notes the batch sizes and what of earlier batches is still held."""

    def arm(self, most, error):
        self.most, self.error, self.tried, self.held = most, error, [], []
        return self

    def forward(self, batch, targets):
        assert not any(reference() is not None for reference in self.held), "an earlier trial is still in memory"
        held = batch.images.to(torch.float32) * 2
        self.held.append(weakref.ref(held))
        self.tried.append(len(batch.images))
        if len(batch.images) > self.most:
            super().forward(batch, targets)
            raise self.error[0](self.error[1])
        return super().forward(batch, targets)


CPU_WORDS = (
    "[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
)
ERRORS = [
    (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB"),
    (RuntimeError, CPU_WORDS),
    (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    (MemoryError, ""),
]


def hungry(most, *, error=ERRORS[0], batch_size=16, **changes):
    stage = new_stage(tiny_config(batch_size=batch_size, **changes))
    stage.module.__class__ = Hungry
    stage.module.arm(most, error)
    return stage


def refused(stage, **how):
    share = stage.config.batch_size
    with pytest.raises(ConfigError) as caught:
        rehearse(stage, example(share), (40, 64), **({"name": "training"} | how))
    assert caught.value.__cause__ is None and caught.value.__context__ is None
    return str(caught.value)


@pytest.mark.parametrize("error", ERRORS, ids=["gpu", "cpu", "cublas", "python"])
def test_what_does_not_fit_is_said_with_the_setting_that_would(error):
    stage = hungry(6, error=error)
    said = refused(stage)
    assert said.startswith("a step of 16 pictures of 40 x 64 with 3 objects each, in float32, does not fit into "), said
    assert " GiB; 6 do. Set --training.batch-size 6, or --training.accumulate 4, or try --training.memory sqrt." in said
    assert stage.module.tried == [16, 8, 4, 6, 7]


@pytest.mark.parametrize(
    ("most", "tried", "words"),
    [
        (15, [16, 8, 12, 14, 15], "15 do. Set --pretraining.batch-size 15, or --pretraining.accumulate 2,"),
        (8, [16, 8, 12, 10, 9], "8 do. Set"),
        (1, [16, 8, 4, 2, 1], "one does. Set --pretraining.batch-size 1, or --pretraining.accumulate 16,"),
        (
            0,
            [16, 8, 4, 2, 1],
            "no smaller batch did. Lower --pretraining.batch-size and --pretraining.input.resize.short",
        ),
    ],
)
def test_the_largest_batch_that_fits_is_found(most, tried, words):
    stage = hungry(most)
    assert words in refused(stage, name="pretraining")
    assert stage.module.tried == tried


def test_one_picture_that_does_not_fit():
    stage = hungry(0, batch_size=1, input=InputConfig(resize=Direct(side=64)))
    said = refused(stage)
    assert "a step of 1 picture of" in said and "Lower --training.input.resize.side, or train where" in said


def test_a_run_that_has_begun_cannot_change_its_batch_size():
    said = refused(hungry(6), begun=True)
    assert "Go on where there is more memory, or start a new run with --training.batch-size 6." in said


def test_batch_norm_over_groups_takes_whole_groups():
    stage = hungry(11, norm=NormPolicy(images=4))
    assert "8 do." in refused(stage) and stage.module.tried == [16, 8, 12]


def test_compiled_batches_are_halves_alone(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module, **how: module)
    stage = hungry(7, compile=True)
    assert "4 do." in refused(stage) and stage.module.tried == [16, 8, 4]


def test_another_error_is_no_lack_of_memory():
    with pytest.raises(RuntimeError, match="shapes"):
        rehearse(hungry(6, error=(RuntimeError, "shapes do not match")), example(16), SHAPE, name="training")


class Payload:
    """Something that a graph holds."""


class Hold(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, payload):
        ctx.payload = payload
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class Fail(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise torch.OutOfMemoryError("out of memory")


def test_a_backward_pass_that_runs_out_of_memory_holds_nothing():
    """torch keeps what it still had to do, the branch that is not failed, in a queue of the thread."""
    payloads = []

    class Late(Tiny):
        def forward(self, batch, targets):
            payload = Payload()
            payloads.append(weakref.ref(payload))
            held = Hold.apply(self.head.weight, payload).sum()
            return {"held": held, "failed": Fail.apply(self.head.bias).sum()}

    stage = new_stage(tiny_config())
    stage.module.__class__ = Late
    assert worst_case._attempt(stage, example(), SHAPE, 4) is None
    assert len(payloads) == 1 and payloads[0]() is None


@pytest.mark.parametrize("masks", [False, True])
def test_a_detector_rehearses_and_trains_without_any_object(masks):
    """A whole batch without ground truth: finite losses, and the weights move."""
    stage, pair = detector_stage(masks), detector_batch()
    recorder = Recorder()
    rehearse(stage, pair, (64, 64), name="training")
    before = everything(stage)
    run_stage(stage, iter([pair, pair]), recorder.callbacks())
    for _, row in recorder.rows:
        assert all(torch.isfinite(torch.tensor(value)) for value in row.values()), row
        assert row["box_regression"] == row["rpn_box"] == row.get("mask", 0) == 0 and ("mask" in row) == masks
        assert row["rpn_objectness"] > 0 and row["box_class"] > 0
    assert recorder.ticks == [1, 2] and stage.step == 2
    after = everything(stage)
    assert any(not torch.equal(before[name], after[name]) for name in before if name.endswith("weight"))
    assert all(value.isfinite().all() for value in after.values())


def detector_stage(masks: bool) -> Stage:
    torch.manual_seed(0)
    head = MaskHeadConfig(convs=1, width=8, target_side=8) if masks else None
    module = build_detector(dataclasses.replace(small_detector(backbone="test_resnet"), mask_head=head), 5)
    config = tiny_config(steps=2, batch_size=2, log_every=1, ema_decay=None)
    optimizer = build_optimizer(module, config.optimizer)
    return Stage(config=config, module=module, optimizer=optimizer, ema=None, device=CPU, seed=1)


def detector_batch():
    batch, targets = next(batches(0, batch_size=2))
    sizes = torch.full((2, 2), 64)
    images = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    empty = {name: None if value is None else torch.zeros_like(value) for name, value in vars(targets).items()}
    empty |= {"masks": torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "mask_frames": torch.zeros(2, 1, 4)}
    return dataclasses.replace(batch, images=images, sizes=sizes, original_sizes=sizes), Targets(**empty)


LIMITED = """
import resource, torch
from gesso.errors import ConfigError
from gesso.models.build import build_detector
from gesso.recipes.small import small_detector
from gesso.training.stage import Stage, TrainingConfig
from gesso.training.step import train_step
from gesso.training.optimizer import AdamW, build_optimizer
from gesso.training.worst_case import rehearse, worst_batch
from tests.training.helpers import CPU, batches
torch.set_num_threads(1)
torch.manual_seed(0)
config = TrainingConfig(batch_size=16, optimizer=AdamW())
module = build_detector(small_detector(backbone="test_resnet"), 5)
optimizer = build_optimizer(module, config.optimizer)
stage = Stage(config=config, module=module, optimizer=optimizer, ema=None, device=CPU, seed=1)
example = next(batches(0, batch_size=16))
rehearse(stage, example, (64, 64), name="training")
status = open("/proc/self/status").read()
limit = int(status.split("VmSize:")[1].split()[0]) * 1024 + 700 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    rehearse(stage, example, (512, 512), name="training")
except ConfigError as error:
    print(error)
    most = int(str(error).split("batch-size ")[1].split(",")[0])
    assert train_step(stage, *worst_batch(example, (512, 512), max(most // 2, 1))).read()[1]
    print("trained")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_real_lack_of_memory():
    """A process that may not have more address space than some pictures take; afterwards it is free again."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert "a step of 16 pictures of 512 x 512 with 1 objects each, in float32, does not fit into" in done.stdout
    assert done.stdout.endswith("trained\n")


def test_the_graph_that_is_compiled_is_that_of_the_steps(monkeypatch):
    """A rehearsal and real steps of one shape compile once."""
    counter, compiled = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **how: compiled(module, backend=counter, **how))
    torch.compiler.reset()
    stage, pair = new_stage(tiny_config(steps=3, compile=True)), example(classes=5)
    rehearse(stage, pair, (8, 8), name="training")
    assert counter.frame_count == 1
    run_stage(stage, iter([pair] * 3), Recorder().callbacks())
    assert counter.frame_count == 1 and stage.step == 3
