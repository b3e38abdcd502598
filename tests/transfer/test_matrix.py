import dataclasses
import json

import pytest

from gesso.data.demo_index import demo_index
from gesso.data.demo_scenes import DemoConfig
from gesso.errors import ConfigError, Interrupted, RunError
from gesso.models.norm import NormPolicy
from gesso.run.cost import read_cost
from gesso.run.folder import RunFolder
from gesso.run.initial import read_weights
from gesso.run.train import train
from gesso.training.optimizer import SGD
from gesso.transfer.finetune import RateBy, Target, as_trained, fine_tuning
from gesso.transfer.lr_rule import weight_norm_rule
from gesso.transfer.matrix import Pretraining, plan_matrix, run_matrix
from gesso.transfer.page import write_page
from gesso.transfer.summary import summarise
from tests.run.helpers import Data, tiny_run

SHORT = {"steps": 2, "batch_size": 4, "checkpoint_every": 1, "evaluate_every": 1}


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    """Two small targets; the second has other classes."""
    root = tmp_path_factory.mktemp("targets")
    kept = {}
    for name, hierarchy in (("digits", False), ("tree", True)):
        for split, images in (("train", 12), ("val", 4)):
            scenes = DemoConfig(
                images=images, side=64, objects=(1, 3), scale=(0.2, 0.5), split=split, hierarchy=hierarchy
            )
            demo_index(root / name / split, scenes)
        kept[name] = Target(train=root / name / "train" / "index", val=root / name / "val" / "index")
    return kept


@pytest.fixture(scope="module")
def config(targets):
    target = targets["digits"]
    return tiny_run(Data(train=target.train, val=target.val), **SHORT)


@pytest.fixture(scope="module")
def pretrained(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("pretrained") / "run"
    train(dataclasses.replace(config, training=dataclasses.replace(config.training, steps=3)), out)
    return out


def starts(config, pretrained):
    return [
        Pretraining(name="scratch", config=config, recipe="debug:tiny"),
        Pretraining(name="boxes", init=pretrained, config=config),
    ]


@pytest.mark.slow
def test_a_matrix_is_trained_and_summed_up(targets, config, pretrained, tmp_path):
    entries = plan_matrix(
        starts(config, pretrained), targets, tmp_path / "m", parts=[None, ("backbone",)], seeds=(0, 1)
    )
    assert len(entries) == 2 * (1 + 2) * 2  # from nothing there is no choice of parts
    done = run_matrix(entries)
    assert not any(entry.error for entry in done)
    rows = summarise(done)
    assert [row.label for row in rows] == ["scratch", "boxes, all", "boxes, backbone"] * 2
    for row in rows:
        group = [entry for entry in done if (entry.target, entry.pretraining, entry.parts) == key(row)]
        values = [RunFolder(entry.job.path).evaluations()[-1]["AP"] for entry in group]
        assert len(values) == row.runs == 2
        assert row.mean == pytest.approx(sum(values) / 2)
        assert row.spread == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
        assert row.seconds == pytest.approx(sum(read_cost(RunFolder(e.job.path)).seconds for e in group) / 2)
        assert [step for step, _ in row.curve] == [1, 2]
    base, other = rows[0], rows[1]
    assert base.gain is None and base.cost is None and base.pretraining_days is None
    assert other.gain == pytest.approx(other.mean - base.mean)
    work = [row.work for row in (base, other)]
    assert other.cost == pytest.approx(work[1] / work[0] - 1) and min(work) > 0
    assert other.pretraining_days == read_cost(RunFolder(pretrained)).device_days
    loaded = json.loads((tmp_path / "m/digits/boxes/backbone/seed-0/weights.json").read_text())
    assert {name.split(".")[0] for name in loaded["loaded"]} == {"backbone"}
    loaded = json.loads((tmp_path / "m/tree/boxes/all/seed-1/weights.json").read_text())
    assert set(loaded["classes_new"]) == {"even", "odd", "digit"}
    page = write_page(tmp_path / "report.html", rows, title="Did it pay?").read_text()
    assert all(word in page for word in ("Did it pay?", "digits", "tree", "boxes, backbone", "device days", "<svg"))


def key(row):
    return row.target, row.pretraining, row.parts


@pytest.mark.slow
def test_only_what_is_missing_is_trained(targets, config, pretrained, tmp_path):
    target = {"digits": targets["digits"]}
    run_matrix(plan_matrix(starts(config, pretrained)[:1], target, tmp_path / "m"))
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "m").rglob("*") if path.is_file()}
    again = run_matrix(plan_matrix(starts(config, pretrained), target, tmp_path / "m", seeds=(0, 1)))
    assert [entry.name for entry in again] == [
        "digits/scratch/seed-0",
        "digits/scratch/seed-1",
        "digits/boxes/all/seed-0",
        "digits/boxes/all/seed-1",
    ]
    assert all(path.stat().st_mtime_ns == before for path, before in times.items())


@pytest.mark.slow
def test_a_matrix_goes_on_after_a_stop(targets, config, pretrained, tmp_path):
    target = {"digits": targets["digits"]}
    entries = plan_matrix(starts(config, pretrained), target, tmp_path / "m")
    with pytest.raises(Interrupted, match="saved"):
        run_matrix(entries, should_stop=lambda: True, how_to_resume="gesso transfer matrix", at_once=1)
    done = run_matrix(entries)
    assert not any(entry.error for entry in done) and all(entry.cost is not None for entry in done)


@pytest.mark.slow
def test_a_run_that_fails_does_not_stop_the_others(targets, config, pretrained, tmp_path):
    wild = dataclasses.replace(config.training, optimizer=SGD(rate=1e30), clip_norm=None, steps=6)
    bad = Pretraining(name="wild", config=dataclasses.replace(config, training=wild))
    entries = plan_matrix([*starts(config, pretrained)[:1], bad], {"digits": targets["digits"]}, tmp_path / "m")
    good, failed = run_matrix(entries)
    assert not good.error and "not finite" in failed.error and failed.cost is None
    rows = summarise([good, failed])
    assert rows[1].failed == 1 and rows[1].mean is None and rows[1].gain is None
    assert "not finite" in write_page(tmp_path / "report.html", rows, title="t").read_text()


@pytest.mark.slow
def test_another_run_in_the_place_is_refused(targets, config, pretrained, tmp_path):
    target = {"digits": targets["digits"]}
    run_matrix(plan_matrix(starts(config, pretrained)[:1], target, tmp_path / "m"))
    faster = dataclasses.replace(config, training=dataclasses.replace(config.training, optimizer=SGD(rate=0.5)))
    with pytest.raises(ConfigError, match=r"optimizer\.rate was 0\.01, is 0\.5.*Remove this run"):
        run_matrix(plan_matrix([Pretraining(name="scratch", config=faster)], target, tmp_path / "m"))
    one = Pretraining(name="boxes", init=pretrained, config=config)
    run_matrix(plan_matrix([one], target, tmp_path / "m"))
    other = dataclasses.replace(one, init=tmp_path / "m/digits/scratch/seed-0")
    with pytest.raises(RunError, match="starts from"):
        run_matrix(plan_matrix([other], target, tmp_path / "m"))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("a", "a"), "the name of the pre-training 'a'"),
        (("a/b",), "cannot be the name of a pre-training"),
        (("..",), "cannot be the name"),
    ],
)
def test_names_that_are_no_folders(targets, config, names, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        plan_matrix([Pretraining(name=name, config=config) for name in names], targets, tmp_path)


def test_parts_are_called_what_they_are(targets, config, pretrained, tmp_path):
    """Where a configuration says which parts are loaded, and the matrix does not."""
    start = Pretraining(name="a", init=pretrained, config=dataclasses.replace(config, init_parts=("backbone", "rpn")))
    entries = plan_matrix([start], {"digits": targets["digits"]}, tmp_path, parts=[None, ("neck",)])
    assert [entry.parts for entry in entries] == ["backbone+rpn", "neck"]


def test_a_run_is_its_own_fine_tuning(pretrained, targets):
    """Its model and last stage, batch norm fixed, on the new data."""
    made = fine_tuning(pretrained, as_trained(pretrained), targets["tree"], seed=3)
    assert made.config.training.norm == NormPolicy(kind="fixed") and made.config.pretraining is None
    assert made.config.data.train == targets["tree"].train and made.config.seed == 3 and made.rule is None
    with pytest.raises(ConfigError, match="only a run knows"):
        as_trained(next((pretrained / "checkpoints").glob("0*")))


def test_the_rate_from_the_weights(pretrained, config, targets, tmp_path):
    train(dataclasses.replace(config, seed=9), tmp_path / "reference")
    made = fine_tuning(pretrained, config, targets["digits"], rate_by=RateBy(reference=tmp_path / "reference"))
    weights = []
    for run in (pretrained, tmp_path / "reference"):
        weights.append({n: v for n, v in read_weights(run).weights.items() if n.startswith("backbone.")})
    assert made.rule == weight_norm_rule(*weights, config.training.optimizer.rate)
    assert made.config.training.optimizer.rate == made.rule.rate
    by_new = fine_tuning(pretrained, config, targets["digits"], rate_by=RateBy(power=1))
    assert by_new.rule is not None and 0 < by_new.rule.ratio <= 1 and by_new.rule.power == 1
