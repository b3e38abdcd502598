"""What a run refuses, and that a refusal loses and leaves nothing."""

import dataclasses
import json
import logging

import numpy as np
import pytest
import torch

from gesso.data.index import Index
from gesso.data.index_writer import IndexWriter
from gesso.data.records import ImageBlock, ObjectBlock, Source, Strings
from gesso.data.select import subset
from gesso.errors import ConfigError, DataError, Interrupted, RunError, TrainingError
from gesso.label_space import LabelSpace
from gesso.models.norm import NormPolicy
from gesso.run.folder import RunFolder
from gesso.run.models import load_run
from gesso.run.train import train
from gesso.training.optimizer import SGD
from gesso.training.schedule import ScheduleConfig
from tests.run.helpers import Data, StopAfter, differences, rows, tensors, tiny_run, with_training

SHORT = {"steps": 4, "batch_size": 4, "checkpoint_every": 2, "evaluate_every": 4}


def rewritten(index: Index, out, space: LabelSpace, *, known_sizes: bool = True):
    """A copy of an index whose labels follow another label space, joined by name."""
    there = np.array(index.label_space.map_to(space).targets)
    writer = IndexWriter(out, space, sources=[Source(name="copy", root=str(index.image_path(0).parent), split="val")])
    count = len(index)
    sizes = (np.asarray(index.widths), np.asarray(index.heights)) if known_sizes else (np.zeros(count, np.int32),) * 2
    names = [index.image_path(i).name for i in range(count)]
    writer.add_images(
        ImageBlock(
            ids=np.asarray(index.image_ids),
            names=Strings.of(names),
            widths=sizes[0],
            heights=sizes[1],
            orientations=np.ones(count, np.uint8),
        )
    )
    objects = [index.objects(i) for i in range(count)]
    labels = there[np.concatenate([o.labels for o in objects])]
    keep = labels >= 0
    writer.add_objects(
        ObjectBlock(
            rows=np.repeat(np.arange(count), [len(o.labels) for o in objects])[keep],
            xyxy=np.concatenate([o.xyxy for o in objects])[keep],
            labels=labels[keep],
            annotation_ids=np.arange(1, len(labels) + 1)[keep],
            known_flags=np.zeros(int(keep.sum()), np.uint16),
        )
    )
    return writer.finish()


def test_a_folder_that_exists_is_refused(data, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match=r"exists already.*--resume"):
        train(tiny_run(data), tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_resume_needs_a_run(data, tmp_path):
    with pytest.raises(RunError, match="no such run folder"):
        train(tiny_run(data), tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()


def test_a_locked_run_is_refused_and_left_alone(data, straight):
    before = (straight / "metrics.jsonl").read_bytes()
    with RunFolder.open(straight).locked(), pytest.raises(RunError, match="another process"):
        train(tiny_run(data, **SHORT), straight, resume=True)
    assert (straight / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"steps": 8}, "training.steps was 4, is 8"),
        ({"optimizer": SGD(rate=0.5)}, "training.optimizer.rate was 0.01, is 0.5"),
        ({"precision": "float64"}, "training.precision was float32, is float64"),
    ],
)
def test_a_resume_with_another_option_names_it(data, straight, change, key):
    with pytest.raises(ConfigError, match=key):
        train(tiny_run(data, **SHORT | change), straight, resume=True)


def test_a_resume_may_change_what_changes_no_result(data, straight, tmp_path):
    with pytest.raises(Interrupted):
        train(tiny_run(data, **SHORT), tmp_path / "r", observer=StopAfter(1))
    config = with_training(tiny_run(data, workers=1, **SHORT), log_every=3, checkpoint_every=1, keep_checkpoints=9)
    train(dataclasses.replace(config, device="cpu"), tmp_path / "r", resume=True)
    one, two = tensors(straight), tensors(tmp_path / "r")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert {p.name for p in (tmp_path / "r" / "checkpoints").iterdir() if p.is_dir()} == {
        f"{k:08d}" for k in range(1, 5)
    }


def test_data_without_a_box_is_refused_and_leaves_no_folder(data, tmp_path):
    index = Index.open(data.train)
    empty = np.array([i for i in range(len(index)) if not len(index.objects(i).labels)], np.int64)
    if not len(empty):
        writer = IndexWriter(tmp_path / "empty", index.label_space, sources=[Source(name="e", root=".", split="train")])
        writer.add_images(
            ImageBlock(ids=np.arange(2), names=Strings.of(["a", "b"]), widths=np.full(2, 9), heights=np.full(2, 9))
        )
        writer.finish()
    else:
        subset(index, tmp_path / "empty", empty)
    with pytest.raises(DataError, match=r"none of its .* images has a box"):
        train(tiny_run(Data(train=tmp_path / "empty", val=data.val)), tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_data_that_cannot_be_used_leaves_no_folder(data, tmp_path):
    missing = tiny_run(Data(train=tmp_path / "nowhere", val=data.val))
    with pytest.raises(DataError, match="nowhere"):
        train(missing, tmp_path / "r")
    other = rewritten(Index.open(data.val), tmp_path / "other", LabelSpace.from_names(["cat", "dog"]))
    with pytest.raises(DataError, match="shares no category name"):
        train(tiny_run(Data(train=data.train, val=other)), tmp_path / "r")
    no_data = tiny_run(None)
    with pytest.raises(ConfigError, match=r"--data\.train"):
        train(dataclasses.replace(no_data, data=dataclasses.replace(no_data.data, embedded=None)), tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_pictures_of_unknown_size_are_refused_before_a_folder_is_made(data, tmp_path):
    index = Index.open(data.train)
    unknown = rewritten(index, tmp_path / "unknown", index.label_space, known_sizes=False)
    with pytest.raises(DataError, match=r"unknown.*--no-images"):
        train(tiny_run(Data(train=unknown, val=data.val)), tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_model_that_cannot_be_built_leaves_no_folder(data, tmp_path):
    config = tiny_run(data, **SHORT)
    backbone = dataclasses.replace(config.model.backbone, name="resnet81")
    wrong = dataclasses.replace(config, model=dataclasses.replace(config.model, backbone=backbone))
    with pytest.raises(ConfigError, match="resnet81"):
        train(wrong, tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_validation_data_in_another_order_is_joined_by_name(data, straight, tmp_path):
    """Reversed categories, one more and one less: the same scores for those that are shared."""
    index = Index.open(data.val)
    space = LabelSpace.from_names(["giraffe", *reversed(index.label_space.names)])
    mixed = rewritten(index, tmp_path / "mixed", space)
    train(tiny_run(Data(train=data.train, val=mixed), **SHORT), tmp_path / "r")
    evaluation = next(row for row in rows(tmp_path / "r") if "AP" in row)
    expected = next(row for row in rows(straight) if "AP" in row)
    assert evaluation["by_class"].pop("giraffe") == -1
    assert evaluation == expected
    assert "giraffe" in (tmp_path / "r" / "log.txt").read_text()


def test_a_resume_with_other_categories_is_refused(data, tmp_path):
    """The index at the same path was made anew in another order: the detector would learn the wrong names."""
    index = Index.open(data.train)
    path = rewritten(index, tmp_path / "index", index.label_space)
    config, out = tiny_run(Data(train=path, val=data.val), **SHORT), tmp_path / "r"
    with pytest.raises(Interrupted):
        train(config, out, observer=StopAfter(1))
    path.rename(tmp_path / "old")
    rewritten(index, path, LabelSpace.from_names(list(reversed(index.label_space.names))))
    with pytest.raises(DataError, match="other categories, or in another order"):
        train(config, out, resume=True)
    assert RunFolder.open(out).read_label_space() == index.label_space


def test_a_loss_that_explodes_keeps_the_run(data, tmp_path):
    """The checkpoint before the explosion stays, and the rows up to it."""
    config = tiny_run(
        data,
        **SHORT
        | {"steps": 30, "checkpoint_every": 1, "clip_norm": None, "optimizer": SGD(rate=1e12)}
        | {"schedule": ScheduleConfig(kind="constant", warmup_steps=0)},
    )
    with pytest.raises(TrainingError, match=r"step \d+: a loss or gradient is not finite") as caught:
        train(config, tmp_path / "r")
    step = int(str(caught.value).split("step ")[1].split(":")[0])
    assert step > 1, "the first step is finite"
    found = tensors(tmp_path / "r")
    assert all(value.isfinite().all() for value in found.values())
    assert [row["step"] for row in rows(tmp_path / "r") if "loss" in row] == list(range(1, step))


def test_a_run_from_other_weights_is_resumed_from_them(data, straight, tmp_path):
    """Killed before its first checkpoint, it starts again from the same weights without being told."""
    config = tiny_run(data, **SHORT | {"steps": 2})
    train(config, tmp_path / "a", init=straight)

    def die(step: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "b", init=straight, observer=StopAfter(then=die))
    train(config, tmp_path / "b", resume=True)
    assert differences(tmp_path / "a", tmp_path / "b") == []
    train(config, tmp_path / "c")
    assert differences(tmp_path / "a", tmp_path / "c"), "the weights to start from count"
    with pytest.raises(ConfigError, match="--init"):
        train(config, tmp_path / "b", init=tmp_path / "c", resume=True)


def test_weights_to_start_from_that_are_not_there(data, tmp_path):
    with pytest.raises(RunError, match="no whole checkpoint"):
        train(tiny_run(data, **SHORT), tmp_path / "r", init=data.val)
    assert not (tmp_path / "r").exists()


def test_a_run_whose_pictures_are_gone_leaves_no_folder(data, tmp_path, monkeypatch):
    def gone(path, *_):
        raise DataError("the picture cannot be read: No such file or directory", where=path)

    monkeypatch.setattr("gesso.data.samples.read_picture", gone)
    with pytest.raises(TrainingError, match="pictures could not be read in drawing the last 4"):
        train(tiny_run(data, **SHORT), tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_norms_of_a_finished_stage_are_there_after_a_resume(data, tmp_path):
    """The first stage replaces batch norm by group norm; a resume in the second stage must do so as well."""
    config = tiny_run(data, steps=2, batch_size=4, norm=NormPolicy(kind="fixed"))
    first = dataclasses.replace(config.training, steps=1, norm=NormPolicy(kind="group_norm"))
    config = dataclasses.replace(config, pretraining=first)
    train(config, tmp_path / "a")
    with pytest.raises(Interrupted):
        train(config, tmp_path / "b", observer=StopAfter(2))
    train(config, tmp_path / "b", resume=True)
    assert differences(tmp_path / "a", tmp_path / "b") == []
    assert not any("running_mean" in name for name in load_run(tmp_path / "b").model.state_dict())


def test_an_environment_that_changed_is_said(data, tmp_path, caplog):
    config, out = tiny_run(data, **SHORT), tmp_path / "r"
    with pytest.raises(Interrupted):
        train(config, out, observer=StopAfter(3))
    stored = json.loads((out / "config.json").read_text())
    stored["environment"]["threads"] = 64
    (out / "config.json").write_text(json.dumps(stored))
    with caplog.at_level(logging.WARNING, logger="gesso"):
        train(config, out, resume=True)
    assert "threads was 64, is 1" in (out / "log.txt").read_text()
