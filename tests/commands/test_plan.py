"""``gesso plan scaling`` and ``gesso plan bench`` on the command line."""

import json
import subprocess
import sys

import pytest

from gesso import config as configs
from gesso.label_space import LabelSpace
from gesso.planning.scaling import Network, StepMeasurement, Work, predict
from gesso.recipes.debug import tiny
from gesso.run.folder import RunFolder
from tests.command_line import environment

STEP = ("--step-seconds", "0.5", "--images-per-gpu", "2")


def run_folder(path, rows=(), world=1):
    folder = RunFolder.create(path, {"config": configs.to_dict(tiny()), "environment": {"world_size": world}})
    folder.write_label_space(LabelSpace(names=("cat", "dog")))
    for step, seconds in enumerate(rows, 1):
        folder.append({"step": step, "stage": "training", "step_seconds": seconds, "data_share": 0.2})
    return path


def test_the_table_has_a_row_for_each_number_of_gpus(gesso):
    shown = gesso("plan", "scaling", "debug:tiny", *STEP, "--gpus", "64, 1,8").out
    assert shown.startswith("Step: 0.5 s") and "over all GPUs" in shown
    rows = [line.split() for line in shown.splitlines() if line[:1].isdigit()]
    assert [row[:4] for row in rows] == [
        ["1", "1", "2", "0.0025"],
        ["8", "1", "16", "0.02"],
        ["64", "8", "128", "0.16"],
    ]
    assert rows[0][-1] == "1.000" and float(rows[1][-1]) > float(rows[2][-1])


def test_json_holds_what_the_model_says(gesso):
    words = ("--images", "1000", "--epochs", "3", "--accumulate", "2", "--norm-images", "4", "--jitter", "0.1")
    words += ("--gpus-per-machine", "4", "--inside-bandwidth", "50", "--inside-latency", "7", "--backward-share", "0.3")
    words += ("--between-bandwidth", "2", "--between-latency", "30")
    found = gesso.json("plan", "scaling", "debug:tiny", *STEP, *words)
    step, network, work = StepMeasurement(**found["step"]), Network(**found["network"]), Work(**found["work"])
    assert (step.seconds, step.images, step.norm_images, step.jitter, step.backward_share) == (0.5, 2, 4, 0.1, 0.3)
    assert list(found["network"].values()) == pytest.approx([4, 50e9, 7e-6, 2e9, 30e-6])
    assert (work.images, work.accumulate) == (3000, 2)
    assert step.gradient_bytes > 1e6 and step.norm_layers > 10 and step.messages == 1
    assert [row["gpus"] for row in found["rows"]] == [2**k for k in range(11)]
    for row in found["rows"]:
        again = predict(step, network, work, row["gpus"])
        assert (row["hours"], row["efficiency"]) == (again.hours, again.efficiency)
        assert row["learning_rate"] == pytest.approx(0.01 * row["batch"] / 8)
    assert "published" not in found


def test_the_recipes_options_change_the_detector_and_the_rate(gesso):
    words = ("--model.neck.width", "128", "--training.schedule.base-images", "4", "--training.norm.kind", "fixed")
    small, large = (gesso.json("plan", "scaling", "debug:tiny", *STEP, "--gpus", "1", *more) for more in ((), words))
    assert large["step"]["gradient_bytes"] > small["step"]["gradient_bytes"]
    assert large["rows"][0]["learning_rate"] == 2 * small["rows"][0]["learning_rate"]
    assert small["step"]["norm_layers"] > 0 and large["step"]["norm_layers"] == 0
    assert small["step"]["norm_images"] is None
    apart = gesso.json("plan", "scaling", "debug:tiny", *STEP, "--gpus", "8", "--norm-images", "0")
    assert apart["rows"][0]["norm"] == 0
    more = gesso.json("plan", "scaling", "debug:tiny", *STEP, "--classes", "300")
    assert more["step"]["gradient_bytes"] > small["step"]["gradient_bytes"]


def test_a_run_gives_the_step_and_needs_no_recipe(gesso, tmp_path):
    folder = run_folder(tmp_path / "run", [9.0, 2.0, 2.0])
    found = gesso.json("plan", "scaling", "--run", folder, "--gpus", "1")
    assert (found["step"]["seconds"], found["step"]["images"]) == (1.6, 8)
    assert found["step"]["data_seconds"] == pytest.approx(0.4)
    assert found["work"]["images"] == 96
    assert found["rows"][0]["hours"] == pytest.approx(12 * 2 / 3600)
    assert gesso.json("plan", "scaling", "debug:tiny", "--run", folder, "--gpus", "1") == found


def test_published(gesso):
    shown = gesso("plan", "scaling", "--published").out
    assert "held out" in shown and "83" in shown and "35.8 ms" in shown
    found = gesso.json("plan", "scaling", "--published")
    assert list(found) == ["published"]
    rows = {row["gpus"]: row for row in found["published"]["megdet"]["rows"]}
    assert all(abs(rows[n]["error"]) < 0.1 and rows[n]["held_out"] for n in (64, 128))
    assert found["published"]["pfdet"][0]["efficiency"] == pytest.approx(0.83)
    both = gesso.json("plan", "scaling", "debug:tiny", *STEP, "--published")
    assert both["published"] == found["published"] and both["rows"]


def test_the_page(gesso, tmp_path):
    shown = gesso("plan", "scaling", "debug:tiny", *STEP, "--out", tmp_path / "a").out
    page = (tmp_path / "a" / "scaling.html").read_text()
    assert (tmp_path / "a" / "scaling.html").as_uri() in shown
    assert "debug:tiny" in page and page.count("<svg") == 4 and "1,024 GPUs" in page
    gesso("plan", "scaling", "--published", "--out", tmp_path / "b")
    assert (tmp_path / "b" / "scaling.html").read_text().count("<svg") == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "nothing is named to plan. Add a recipe, or --run RUN, or --published."),
        ("debug:tiny", "the step on one GPU is not known"),
        ("debug:tiny --step-seconds 1", "the step on one GPU is not known"),
        ("debug:tiny --step-seconds 0 --images-per-gpu 1", "--step-seconds is 0.0"),
        ("debug:tiny --step-seconds nan --images-per-gpu 1", "--step-seconds is nan"),
        ("debug:tiny --step-seconds inf --images-per-gpu 1", "a step needs a time"),
        ("debug:tiny --step-seconds 1 --images-per-gpu 0", "at least one picture"),
        ("debug:tiny --step-seconds 1 --images-per-gpu 2 --norm-images 3", "over 3 pictures cannot be had with 2"),
        ("debug:tiny --step-seconds 1 --images-per-gpu 2 --gpus 1,0", "--gpus is '1,0'"),
        ("debug:tiny --step-seconds 1 --images-per-gpu 2 --gpus 1,-8", "--gpus is '1,-8'"),
        ("debug:tiny --step-seconds 1 --images-per-gpu 2 --gpus many", "--gpus is 'many'"),
        ("debug:tiny --step-seconds 1 --images-per-gpu 2 --images 100", "Add --epochs E."),
        ("debug:tiny --step-seconds 1 --images-per-gpu 2 --images 0 --epochs 1", "there must be pictures"),
        ("debug:tiny --step-seconds 1 --images-per-gpu 2 --between-bandwidth 0", "both bandwidths must be above 0"),
        ("debug:tiny --step-seconds 1 --images-per-gpu 2 --stage pretraining", "there is no stage 'pretraining'"),
        ("debug:tiny --step-seconds 1 --images-per-gpu 2 --classes 0", "a detector of 0 classes"),
        ("debug:tiny --step-second 1", "unknown option '--step-second' of gesso plan scaling debug:tiny. Did you mean"),
        ("debug:tny", "there is no recipe 'debug:tny'"),
        ("--run nowhere", "nowhere: there is no such run folder"),
        ("--run empty", "empty: no row of metrics.jsonl says how long a step"),
        ("--run many", "many: its steps were measured on 2 processes"),
        ("--run one --step-seconds 1", "--run gives the step"),
        ("demo:scratch --run one --model.neck.width 32", "the recipe has another detector than the run"),
    ],
)
def test_mistakes_are_one_line(gesso, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    run_folder(tmp_path / "empty")
    run_folder(tmp_path / "many", [1.0], world=2)
    run_folder(tmp_path / "one", [1.0])
    assert said in gesso.mistake("plan", "scaling", *words.split())


def test_bench_of_one_process(gesso):
    words = ("--model.backbone.name", "test_resnet", "--device", "cpu", "--steps", "1")
    shown = gesso("plan", "bench", *words).out
    assert shown.startswith("1 process on 1 machine (cpu), each with 8 pictures of 64 x 64 a step")
    assert "gesso plan scaling debug:tiny --step-seconds" in shown
    hint = shown.splitlines()[-1].split("gesso ")[1].split()
    assert "1.000" in gesso(*hint).out
    found = gesso.json("plan", "bench", "debug:tiny", *words)
    assert (found["processes"], found["efficiency"]) == (1, None) and found["alone"] > 0
    assert "--steps is 0" in gesso.mistake("plan", "bench", "--steps", "0")
    assert "there is no stage" in gesso.mistake("plan", "bench", "--stage", "pretraining")


@pytest.mark.slow
def test_bench_under_torchrun(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    call = ["-m", "gesso", "plan", "bench", "debug:tiny", "--model.backbone.name", "test_resnet", "--device", "cpu"]
    done = subprocess.run(
        [*launcher, *call, "--steps", "2", "--json"], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[0])
    assert found["processes"] == 2 and found["images"] == 4 and found["inside"]["bandwidth"] > 0
    assert found["efficiency"] == pytest.approx(found["together"] / found["alone"])
