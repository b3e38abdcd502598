import dataclasses
import json

import pytest

from gesso.commands.transfer import changed
from gesso.data.demo import DemoConfig, make_demo_classes
from gesso.data.demo_index import demo_index
from gesso.errors import ConfigError
from gesso.recipes.debug import tiny
from gesso.run.config import read_run_config
from gesso.run.folder import RunFolder
from gesso.run.train import train
from gesso.training.optimizer import SGD

TINY = ("--set", "model.backbone.name=test_resnet", "training.steps=2", "training.evaluate_every=1")


@pytest.fixture(scope="module")
def indexes(tmp_path_factory):
    root = tmp_path_factory.mktemp("indexes")
    for split, images in (("train", 12), ("val", 4)):
        demo_index(root / split, DemoConfig(images=images, side=64, objects=(1, 3), scale=(0.2, 0.5), split=split))
    return root / "train" / "index", root / "val" / "index"


@pytest.fixture(scope="module")
def pretrained(indexes, tmp_path_factory):
    out = tmp_path_factory.mktemp("pretrained") / "run"
    (config,) = changed([tiny()], TINY[1:])
    train(dataclasses.replace(config, data=dataclasses.replace(config.data, train=indexes[0], embedded=None)), out)
    return out


def names(indexes):
    return "--data", indexes[0], "--val", indexes[1]


def test_settings_are_changed_where_they_are():
    one = tiny()
    two = dataclasses.replace(one, pretraining=one.training)
    found = changed([one, two], ["pretraining.steps=7", "training.optimizer.rate=0.5", "training.epochs=2"])
    assert found[0].pretraining is None and found[1].pretraining.steps == 7
    assert all(config.training.optimizer == dataclasses.replace(one.training.optimizer, rate=0.5) for config in found)
    assert isinstance(found[0].training.optimizer, SGD) and found[0].training.epochs == 2
    (sides,) = changed([one], ["training.input.resize.short_sides=[96, 128]", "training.input.resize.long-side=160"])
    assert sides.training.input.resize.short_sides == (96, 128) and sides.training.input.resize.long_side == 160


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("training.steps", "this is no KEY=VALUE"),
        ("training.stps=3", "no setting 'training.stps'. Did you mean 'training.steps'"),
        ("training.steps=many", "training.steps: expected int, found 'many'"),
        ("training.steps=0", "steps must be at least 1"),
        ("seed=3", "--set seed has no effect here"),
        ("data.train=x", "the training index as its own option"),
    ],
)
def test_settings_that_cannot_be(word, said):
    with pytest.raises(ConfigError, match=said):
        changed([tiny()], [word])


def test_a_run_is_fine_tuned(gesso, pretrained, indexes, tmp_path):
    out = tmp_path / "r"
    found = gesso.json("transfer", pretrained, *names(indexes), "--out", out, "--parts", "backbone", "neck")
    assert found["scores"]["AP"] >= 0 and found["rate_rule"] is None
    config = read_run_config(RunFolder.open(out))
    assert config.training.norm.kind == "fixed" and config.init_parts == ("backbone", "neck")
    loaded = json.loads((out / "weights.json").read_text())
    assert {name.split(".")[0] for name in loaded["loaded"]} == {"backbone", "neck"}
    assert gesso("transfer", pretrained, *names(indexes), "--out", out, code=2).err.count("exists already") == 1


def test_the_rate_by_the_weight_norm(gesso, pretrained, indexes, tmp_path):
    words = (*names(indexes), "--out", tmp_path / "r", "--recipe", "debug:tiny", *TINY, "--rate-by-weight-norm")
    shown = gesso("transfer", pretrained, *words).out
    assert "N, the sum of squares of" in shown and "(Objects365, Table 5)" in shown
    config = read_run_config(RunFolder.open(tmp_path / "r"))
    assert config.training.optimizer.rate <= tiny().training.optimizer.rate


@pytest.mark.slow
def test_a_matrix_of_two_targets(gesso, pretrained, indexes, tmp_path):
    both = f"{indexes[0]},{indexes[1]}"
    words = ("--pretraining", "scratch=debug:tiny", f"boxes={pretrained}", "--recipe", "debug:tiny", *TINY)
    words += ("--target", f"a={both}", f"b={both}", "--parts", "all", "backbone", "--out", tmp_path / "m")
    found = gesso.json("transfer", "matrix", *words)
    assert [(row["target"], row["pretraining"], row["parts"]) for row in found["rows"]] == [
        (target, *rest) for target in "ab" for rest in (("scratch", ""), ("boxes", "all"), ("boxes", "backbone"))
    ]
    first, other = found["rows"][0], found["rows"][3]
    assert first["mean"] == other["mean"], "the same data, recipe and seed"
    page = (tmp_path / "m" / "report.html").read_text()
    assert "Did pre-training pay?" in page and "boxes, backbone" in page
    again = gesso("transfer", "matrix", *words).out
    assert "boxes, backbone" in again and json.loads((tmp_path / "m" / "results.json").read_text())["runs"]


def test_a_probe(gesso, pretrained, tmp_path):
    for split, images in (("train", 40), ("val", 10)):
        make_demo_classes(tmp_path / split, DemoConfig(images=images, split=split, side=64))
        gesso("data", "import", tmp_path / split, "--out", tmp_path / f"{split}-index")
    words = ("transfer", "probe", pretrained, "--data", tmp_path / "train-index", "--val", tmp_path / "val-index")
    found = gesso.json(*words, "--layers", "C5", "fc1", "--strength", "0.1", "--workers", "0")
    assert list(found) == ["C5", "fc1"] and 0 <= found["C5"]["top1"] <= found["C5"]["top5"] <= 1
    assert "no feature 'C9'" in gesso.mistake(*words, "--layers", "C9")


def test_mistakes(gesso, pretrained, indexes, tmp_path):
    out = ("--out", tmp_path / "r")
    both = f"{indexes[0]},{indexes[1]}"
    assert "no weights of that name" in gesso.mistake("transfer", tmp_path / "none", *names(indexes), *out)
    assert "needs a recipe" in gesso.mistake("transfer", indexes[0], *names(indexes), *out)
    said = gesso.mistake("transfer", pretrained, *names(indexes), *out, "--reference", pretrained)
    assert "--reference is for --rate-by-weight-norm" in said
    said = gesso.mistake("transfer", pretrained, *names(indexes), *out, "--power", "1")
    assert "--power is for --rate-by-weight-norm" in said
    matrix = ("transfer", "matrix", *out)
    for words, part in (
        (("--pretraining", "scratch", "--target", f"a={both}"), "no NAME=RECIPE or NAME=RUN"),
        (("--pretraining", "a=nothing", "--target", f"a={both}"), "neither a run nor a recipe"),
        (("--pretraining", "a=debug:tny", "--target", f"a={both}"), "Did you mean 'debug:tiny'"),
        (("--pretraining", "a=debug:tiny", "--target", "a=b"), "no NAME=TRAIN,VAL"),
        (("--pretraining", "a=debug:tiny", "--target", f"a={both}", "--parts", "backbone+nek"), "no part 'nek'"),
        (("--pretraining", "a=debug:tiny", "--target", f"a={both}", "--at-once", "0"), "at least 1"),
        (("--pretraining", "a=debug:tiny", "--target", f"a={both},x"), "no NAME=TRAIN,VAL"),
        (("--pretraining", "a=debug:tiny", "--target", f"a={tmp_path},{indexes[1]}"), "is no index"),
    ):
        assert part in gesso.mistake(*matrix, *words), words
    assert not (tmp_path / "r").exists()
