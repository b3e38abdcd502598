"""The plan of a recipe's memory: its grid, its limits, and what it says."""

import dataclasses

import pytest

from gesso.data.transforms import Direct, InputConfig
from gesso.errors import ConfigError
from gesso.models.norm import NormPolicy
from gesso.planning import memory
from gesso.planning.memory import BATCHES, RESOLUTIONS, Wishes, images_to_train, plan_memory
from gesso.planning.memory_page import basis, columns_of, disk_words, memory_report, memory_table, rows_of
from gesso.recipes.debug import tiny
from gesso.recipes.demo import direct
from gesso.reports.html import render_report
from gesso.run.config import DataConfig

GB = 10**9
SMALL = {"resolutions": (64, 96), "batches": (2, 3, 4)}


def recipe(make=tiny, **training):
    """A recipe with timm's smallest backbone."""
    config = make()
    backbone = dataclasses.replace(config.model.backbone, name="test_resnet")
    stage = dataclasses.replace(config.training, **training)
    model = dataclasses.replace(config.model, backbone=backbone)
    return dataclasses.replace(config, device="cpu", model=model, training=stage)


@pytest.fixture(autouse=True)
def _little_time(monkeypatch):
    monkeypatch.setattr(memory, "SECONDS", 0.0)


def planned(config, stage="training", budget=GB, **wishes):
    (found,) = plan_memory(config, "debug:tiny", [stage], Wishes(budget=budget, **{**SMALL, **wishes})).stages
    return found


def test_every_resolution_with_every_batch():
    found = planned(recipe())
    assert [(c.resolution, c.pictures) for c in found.choices] == [(s, n) for s in (64, 96) for n in (2, 3, 4)]
    assert [c.counted for c in found.choices] == [True, False, True] * 2
    assert [c.measured for c in found.choices] == [True] + [False] * 5
    assert {c.shape for c in found.choices} == {(64, 64), (96, 96)}
    by = {(c.resolution, c.pictures): c for c in found.choices}
    assert by[64, 2].bytes == found.parts.peak < by[64, 3].bytes < by[64, 4].bytes < by[96, 4].bytes
    for c in found.choices:
        assert c.days == pytest.approx(found.images / c.images_per_second / 86400)
    assert found.images == 12 * 8 and found.checkpoints == 4 and not found.left_out


def test_the_default_grid_has_the_papers_sides_and_the_recipes_own(monkeypatch):
    assert (RESOLUTIONS, BATCHES) == ((224, 320, 448, 640), (2, 4, 8, 16))
    monkeypatch.setattr(memory, "RESOLUTIONS", (65, 96))
    monkeypatch.setattr(memory, "BATCHES", (2, 3))
    found = planned(recipe(accumulate=2), resolutions=None, batches=None)
    assert [(c.resolution, c.pictures) for c in found.choices] == [(64, 2), (65, 2), (96, 2)]
    assert found.left_out == ("3 pictures: 3 pictures do not fall into accumulate = 2 parts",)
    low = planned(recipe(direct), "pretraining", resolutions=None, batches=None)
    assert {c.resolution for c in low.choices} == {64, 96}
    assert len(low.left_out) == 1 and low.left_out[0].startswith("65 pixels: side must be a multiple of 32")


def test_what_is_wished_for_must_be_possible():
    config = recipe(accumulate=2, input=InputConfig(resize=Direct(side=64)))
    with pytest.raises(ConfigError, match="multiple of 32"):
        planned(config, resolutions=(65,))
    with pytest.raises(ConfigError, match="accumulate = 2"):
        planned(config, batches=(3,))
    with pytest.raises(ConfigError, match=r"norm.images = 3 cannot be formed"):
        planned(recipe(norm=NormPolicy(kind="sync", images=3)), batches=(4,))
    with pytest.raises(ConfigError, match="no stage 'pretraining'"):
        planned(recipe(), "pretraining")


def test_no_batch_of_the_default_grid_may_do(monkeypatch):
    monkeypatch.setattr(memory, "BATCHES", (2, 4))
    with pytest.raises(ConfigError, match="it can have none of the batches 2, 4") as told:
        planned(recipe(batch_size=6, accumulate=3), batches=None)
    assert "--batches 3" in str(told.value)


@pytest.mark.parametrize(
    ("training", "wishes", "least"),
    [
        ({"norm": NormPolicy(kind="train")}, {}, 8),
        ({"norm": NormPolicy(kind="sync")}, {}, 8),
        ({"norm": NormPolicy(kind="sync", images=16)}, {}, 8),
        ({"norm": NormPolicy(kind="train", images=2), "accumulate": 2}, {"batches": (4,)}, 4),
        ({"norm": NormPolicy(kind="fixed")}, {}, 1),
        ({"norm": NormPolicy(kind="train")}, {"least_pictures": 3}, 3),
    ],
)
def test_batch_norm_wants_pictures(training, wishes, least):
    assert planned(recipe(**training), **{"batches": (2,), "resolutions": (64,), **wishes}).limits.least == least


def test_no_resolution_above_the_last_stage_is_taken(monkeypatch):
    monkeypatch.setattr(memory, "RESOLUTIONS", (96,))
    config = recipe(direct)
    last = planned(config, resolutions=None, batches=(2,))
    assert last.chosen.resolution == 128 and "up to the recipe's, 128," in last.reason
    first = planned(config, "pretraining", resolutions=None, batches=(2,))
    assert first.chosen.resolution == 96 and "these are the most" in first.reason
    assert first.options == (
        "--pretraining.input.resize.side 96",
        "--pretraining.batch-size 2",
        "--pretraining.images 4080",
    )
    assert planned(config, "pretraining", resolutions=(160,), batches=(2,)).chosen.resolution == 160


def test_the_recipes_own_budget_leaves_out_what_it_is_too_small_for():
    found = planned(recipe(memory="budget=35MB"), resolutions=(64, 160), batches=(2, 4))
    assert len(found.left_out) in (1, 2), "the smallest can be had, the largest cannot"
    assert all("160 pixels" in words and "does not fit into the memory budget" in words for words in found.left_out)
    assert len(found.choices) + len(found.left_out) == 4 and all(c.counted for c in found.choices)
    assert max(c.bytes for c in found.choices) <= 35_000_000


def test_too_large_to_measure_here(monkeypatch):
    monkeypatch.setattr(memory, "memory_at_hand", lambda device: 10**6)
    plan = plan_memory(recipe(), "debug:tiny", ["training"], Wishes(budget=GB, **SMALL))
    (found,) = plan.stages
    assert found.pace is None and {c.seconds for c in found.choices} == {None}
    assert (found.chosen.resolution, found.chosen.pictures) == (96, 4)
    assert "not measured" in basis(plan, found)[1] and rows_of([found.chosen])[0][-3:] == ("-", "-", "-")
    assert render_report(memory_report(plan)).count("<svg") == 1


def test_pictures_of_a_stage():
    config = recipe()
    assert images_to_train(config, config.training, Wishes(budget=1)) == 96
    assert images_to_train(config, config.training, Wishes(budget=1, images=10, epochs=2)) == 20
    by_epochs = dataclasses.replace(config.training, epochs=5.0)
    assert images_to_train(config, by_epochs, Wishes(budget=1)) == 5 * 32
    bare = dataclasses.replace(config, data=DataConfig())
    assert images_to_train(bare, by_epochs, Wishes(budget=1)) == 96
    by_images = dataclasses.replace(config.training, images=77)
    assert images_to_train(bare, by_images, Wishes(budget=1)) == 77


def test_the_page_and_the_words():
    config = recipe(direct)
    names = [name for name, _ in config.stages()]
    budget = planned(config, resolutions=(64,), batches=(4,)).parts.peak
    plan = plan_memory(config, "demo:direct", names, Wishes(budget=budget, least_pictures=2, **SMALL))
    assert plan.unit == "CPU days" and plan.device.startswith("CPU, ")
    text = render_report(memory_report(plan))
    assert text.count("<svg") == 4
    for word in (
        "demo:direct",
        "pretraining",
        "gesso train demo:direct --pretraining.input.resize.side",
        "CPU days",
    ):
        assert word in text
    columns, rows = memory_table(plan.stages[1])
    assert columns == ("resolution", "2 pictures", "3 pictures", "4 pictures")
    assert rows[0][0] == "64" and rows[1][3].endswith("MB*") and rows[0][1].endswith("MB")
    best = [c for c in plan.stages[1].choices if c.best]
    (first, *_) = rows_of(best)
    shown = dict(zip(columns_of(plan), first, strict=True))
    assert (shown["resolution"], shown["padded"], shown["pictures"]) == (64, "64 x 64", best[0].pictures)
    said = " ".join(basis(plan, plan.stages[1]))
    for word in ("others lie on the line", "weights 6MB", "measured: 64 x 64 x 2", "Work: 1,380 pictures"):
        assert word in said
    assert "3 checkpoints of" in disk_words(plan)
