"""What holds for all commands: help, JSON, light starts, closed pipes."""

import json
import subprocess
import sys

import pytest

from gesso.cli import COMMANDS
from tests.command_line import coco, environment, process

HEAVY = (
    "demo",
    "train",
    "transfer",
    "transfer matrix",
    "transfer probe",
    "evaluate",
    "predict",
    "recipes",
    "config",
    "debug replay",
)
HEAVY += ("plan memory", "plan scaling", "plan bench")
LIGHT = [name for name in COMMANDS if name not in HEAVY]


@pytest.mark.parametrize("name", COMMANDS)
def test_help(gesso, name):
    recipe = ["debug:tiny"] if name in ("train", "config", "plan memory") else []
    shown = gesso(*name.split(), *recipe, "--help")
    assert shown.out.startswith(f"usage: gesso {name}") and not shown.err
    assert "--json" in shown.out
    assert "(required)" in shown.out or name in (
        "demo",
        "recipes",
        "train",
        "config",
        "plan memory",
        "plan scaling",
        "plan bench",
    )


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"], ["help"]])
def test_help_of_all_names_every_command(gesso, words):
    shown = gesso(*words).out
    assert all(f"\n  {name} " in shown for name in COMMANDS)


def test_help_of_a_group_and_version(gesso):
    assert (
        gesso("data").out
        == gesso("data", "--help").out
        == "usage: gesso data import|check|stats|split|select|export ... [--help]\n"
    )
    assert gesso("--version").out.startswith("gesso ")


def test_light_commands_start_without_torch(tmp_path):
    """One process for all of them: none loads torch, whatever came before."""
    coco(tmp_path / "source")
    calls = [[*name.split(), "--help"] for name in LIGHT]
    calls += [["--help"], ["dta"], ["data", "import", "source", "--out", "i"], ["data", "stats", "i"]]
    calls += [["data", "check", "source"], ["data", "export", "i", "--out", "e"], ["data", "split", "i", "--out", "p"]]
    script = f"""
import sys
from gesso.cli import main
for call in {calls!r}:
    main(call)
    assert "torch" not in sys.modules, call
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1 and "unknown command 'gesso dta'" in done.stderr


def test_json_is_one_document(gesso, tmp_path):
    coco(tmp_path / "source", 10)
    truth = tmp_path / "source" / "annotations.json"
    detections = tmp_path / "detections.json"
    rows = json.loads(truth.read_text())["annotations"]
    found = [{key: row[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9} for row in rows]
    detections.write_text(json.dumps(found))
    index = tmp_path / "i"
    assert gesso.json("data", "import", tmp_path / "source", "--out", index)["images"] == 10
    assert gesso.json("data", "stats", index)["boxes"] == 10
    assert gesso.json("data", "check", index)["problems"] == 0
    assert len(gesso.json("data", "split", index, "--out", tmp_path / "p")["parts"]) == 2
    assert gesso.json("data", "export", index, "--out", tmp_path / "e")["out"] == str(tmp_path / "e")
    for ground_truth in (truth, index):
        scores = gesso.json("score", "coco", "--gt", ground_truth, "--dt", detections)
        assert scores["AP"] == pytest.approx(1) and scores["by_class"]["cat"] == pytest.approx(1)
    assert {row["recipe"] for row in gesso.json("recipes")} >= {"debug:tiny", "demo:direct", "direct:small"}
    assert gesso.json("config", "debug:tiny", "--training.steps", "3")["training"]["steps"] == 3


def test_the_program_itself(tmp_path):
    coco(tmp_path / "source")
    done = process("data", "import", "source", "--out", "i", cwd=tmp_path)
    assert (done.code, done.out, done.err) == (0, "i: 3 images, 3 boxes, 2 categories\n", "")
    done = process("data", "import", "nowhere", "--out", "j", cwd=tmp_path)
    assert (done.code, done.out, done.err) == (2, "", "gesso: nowhere: does not exist. Check the path.\n")


@pytest.mark.parametrize("words", [["--help"], ["data", "import", "--help"], ["data", "stats", "i"]])
def test_a_closed_pipe_is_no_error(gesso, tmp_path, words):
    coco(tmp_path / "source")
    gesso("data", "import", tmp_path / "source", "--out", tmp_path / "i")
    with subprocess.Popen(
        [sys.executable, "-m", "gesso", *words], cwd=tmp_path, env=environment(), stdout=-1, stderr=-1
    ) as running:
        assert running.stdout and running.stderr
        running.stdout.close()  # before it writes, as head does where it has seen enough
        assert running.stderr.read() == b"" and running.wait(60) == 0
