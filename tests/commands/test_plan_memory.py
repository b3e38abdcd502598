"""``gesso plan memory`` on the command line."""

import pytest

from gesso.planning import memory

RECIPE = ("debug:tiny", "--model.backbone.name", "test_resnet", "--device", "cpu")
GRID = ("--resolutions", "96,64", "--batches", "2, 4")


@pytest.fixture(autouse=True)
def _little_time(monkeypatch):
    monkeypatch.setattr(memory, "SECONDS", 0.0)


def test_tables_and_what_to_take(gesso):
    called = gesso("plan", "memory", *RECIPE, *GRID, "--memory", "1GB")
    first, second, *rest = called.out.splitlines()
    assert first.startswith("training at 96 pixels with 4 pictures a device: ")
    assert "fit at no resolution" in first, "8 pictures for batch norm are not in the grid"
    assert second.startswith("On one device: gesso train debug:tiny --training.input.resize.short-sides 96 ")
    rows = [line.split() for line in rest if line[:1].isdigit()]
    assert [row[0] for row in rows[-2:]] == ["64", "96"], "the memory of both resolutions"
    assert any(line.startswith("Disk: ") for line in rest)
    assert "counting the memory of 4 settings" in called.err


def test_the_options_are_understood(gesso):
    found = gesso.json("plan", "memory", *RECIPE, *GRID, "--memory", "1GB", "--least-pictures", "1")
    words = " ".join(found["stages"]["training"]["recommended"]["options"]).split()
    assert words == [
        *("--training.input.resize.short-sides", "96", "--training.input.resize.long-side", "144"),
        *("--training.batch-size", "4", "--training.images", "96"),
    ]
    config = gesso.json("config", "debug:tiny", *words)
    assert config["training"]["batch_size"] == 4 and config["training"]["images"] == 96
    assert config["training"]["input"]["resize"]["short_sides"] == [96]


def test_json(gesso):
    words = (*GRID, "--memory", "30MB", "--images", "1000", "--epochs", "2", "--least-pictures", "2")
    found = gesso.json("plan", "memory", *RECIPE, *words)
    assert (found["recipe"], found["memory"], found["unit"]) == ("debug:tiny", 30_000_000, "CPU days")
    stage = found["stages"]["training"]
    assert [(s["resolution"], s["batch"]) for s in stage["settings"]] == [(64, 2), (64, 4), (96, 2), (96, 4)]
    for setting in stage["settings"]:
        assert setting["fits"] == (setting["memory"] <= 30_000_000)
        assert setting["days"] == pytest.approx(2000 / setting["images_per_second"] / 86400)
    recommended = stage["recommended"]
    assert recommended["fits"] and recommended["best"] and "highest resolution" in recommended["reason"]
    assert stage["images"] == 2000 and stage["time"]["measured"][0]["pictures"] == 2
    parts = stage["memory_of_smallest"]
    assert sum(parts[k] for k in ("weights", "gradients", "optimizer", "buffers", "activations")) == parts["peak"]
    assert found["disk"]["bytes"] == 4 * found["disk"]["checkpoint"] + found["disk"]["data"]


def test_recomputation_needs_less(gesso):
    def needed(*more):
        found = gesso.json("plan", "memory", *RECIPE, "--memory", "1GB", "--resolutions", "96", "--batches", "4", *more)
        return found["stages"]["training"]["settings"][0]["memory"]

    assert needed("--training.memory", "sqrt") < needed()
    assert needed("--training.accumulate", "2") < needed()


def test_each_stage_or_one_and_the_page(gesso, tmp_path):
    words = ("demo:direct", "--model.backbone.name", "test_resnet", "--device", "cpu", "--memory", "1GB")
    words += ("--resolutions", "96", "--batches", "2")
    shown = gesso("plan", "memory", *words, "--out", tmp_path / "a").out
    assert "pretraining at 96 pixels" in shown and "\ntraining at 96 pixels" in shown
    assert (tmp_path / "a" / "memory.html").as_uri() in shown
    assert (tmp_path / "a" / "memory.html").read_text().count("<svg") == 4
    one = gesso.json("plan", "memory", *words, "--stage", "pretraining")
    assert list(one["stages"]) == ["pretraining"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("debug:tiny", "gesso plan memory debug:tiny needs --memory"),
        ("debug:tiny --memory much", "--memory is 'much'. Give an amount in MB, GB, MiB or GiB, such as 11GB."),
        ("debug:tiny --memory 0GB", "--memory is '0GB'"),
        ("debug:tiny --memory 11", "--memory is '11'"),
        ("debug:tiny --memory -1GB", "--memory"),
        ("debug:tny --memory 1GB", "there is no recipe 'debug:tny'"),
        ("debug:tiny --memory 1GB --stage pretraining", "there is no stage 'pretraining'"),
        ("debug:tiny --memory 1GB --resolutions 0", "--resolutions is '0'. Give numbers above 0 with commas"),
        ("debug:tiny --memory 1GB --batches two", "--batches is 'two'"),
        ("debug:tiny --memory 1GB --least-pictures 0", "--least-pictures is 0"),
        ("debug:tiny --memory 1GB --images 7", "Add --epochs E."),
        ("demo:direct --memory 1GB --stage pretraining --resolutions 65", "side must be a multiple of 32"),
        ("debug:tiny --memory 1GB --training.norm.images 3 --batches 4", "norm.images = 3 cannot be formed"),
        ("debug:tiny --memry 1GB", "unknown option '--memry' of gesso plan memory debug:tiny. Did you mean"),
    ],
)
def test_mistakes_are_one_line(gesso, words, said):
    assert said in gesso.mistake("plan", "memory", *words.split())


def test_a_memory_that_nothing_fits_into(gesso):
    told = gesso.mistake("plan", "memory", *RECIPE, *GRID, "--memory", "1MB")
    assert told.startswith("training: nothing fits into 1MB: the smallest setting, 64 pixels with 2 pictures, needs ")
    needed = told.split("needs ")[1].split(".")[0]
    assert f"Give --memory {needed} or more" in told
    found = gesso.json("plan", "memory", *RECIPE, *GRID, "--memory", needed)
    assert [s["fits"] for s in found["stages"]["training"]["settings"]] == [True, False, False, False]
