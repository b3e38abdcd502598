"""The launch scripts: static checks, and the words that they build, read by torchrun's own parser."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from gesso.recipes.catalog import all_recipes

ROOT = Path(__file__).parents[1]
SLURM = ROOT / "launch" / "slurm.sh"
KUBERNETES = ROOT / "launch" / "kubernetes.yaml"
RECORD = """#!/usr/bin/env python3
import json, os, sys
from pathlib import Path
with Path(os.environ["RECORD"]).open("a") as file:
    print(json.dumps([Path(sys.argv[0]).name, *sys.argv[1:]]), file=file)
"""
SRUN = """
if "PROGRESS" in os.environ:
    latest = Path(os.environ["PROGRESS"], "checkpoints", "latest.json")
    latest.parent.mkdir(parents=True, exist_ok=True)
    latest.write_text('{"step": 8}')
sys.exit(int(os.environ.get("STATUS", "0")))
"""
SCONTROL = """
if sys.argv[1] == "show":
    print("node-03", "node-04", sep="\\n")
"""
TWO_MACHINES = """#!/bin/bash
while [ "$1" != torchrun ]; do shift; done
status=0
for machine in 1 2; do "$@" & pids="$pids $!"; done
echo $pids > torchruns
for pid in $pids; do wait $pid || status=$?; done
exit $status
"""


class Machine:
    """A machine whose srun, scontrol, torchrun and gesso write down what they are called with."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.record = folder, folder / "record.jsonl"
        programs = folder / "bin"
        programs.mkdir()
        for name, more in (("srun", SRUN), ("scontrol", SCONTROL), ("torchrun", ""), ("gesso", "")):
            (programs / name).write_text(RECORD + more)
            (programs / name).chmod(0o755)
        self.environment = {"PATH": f"{programs}:{os.environ['PATH']}", "RECORD": str(self.record)}

    def call(self, *words: str | Path, code: int = 0, **environment: str) -> str:
        done = subprocess.run(
            [str(word) for word in words],
            cwd=self.folder,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == code, done
        return done.stderr

    def calls(self, program: str) -> list[list[str]]:
        """The words of each call of a program."""
        lines = self.record.read_text().splitlines() if self.record.exists() else []
        return [words for name, *words in map(json.loads, lines) if name == program]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def slurm(machine: Machine, *words: str, code: int = 0, **environment: str) -> str:
    job = {"SLURM_JOB_ID": "4242", "SLURM_JOB_NODELIST": "node-[03-04]", "SLURM_JOB_NUM_NODES": "2"}
    job |= {"SLURM_CPUS_PER_TASK": "64"}
    return machine.call("bash", SLURM, *words, code=code, **job, **environment)


def directives() -> dict[str, str]:
    lines = re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", SLURM.read_text(), re.MULTILINE)
    return dict(lines)


def worker(machine: Machine, words: list[str]) -> list[str]:
    """What a process that torchrun starts by these words calls gesso with."""
    before = len(machine.calls("gesso"))
    machine.call(*words)
    return machine.calls("gesso")[before]


def pod() -> dict:
    [container] = job()["spec"]["template"]["spec"]["containers"]
    return container


def job() -> dict:
    return next(part for part in yaml.safe_load_all(KUBERNETES.read_text()) if part["kind"] == "Job")


def environment_of_pod(index: int) -> dict[str, str]:
    given = {entry["name"]: entry.get("value", "10.0.0.7") for entry in pod()["env"]}
    return given | {"JOB_COMPLETION_INDEX": str(index)}


def test_slurm_is_bash():
    subprocess.run(["bash", "-n", SLURM], check=True)
    assert os.access(SLURM, os.X_OK)


def test_slurm_asks_for_what_the_script_uses():
    asked = directives()
    assert (asked["nodes"], asked["gpus-per-node"], asked["ntasks-per-node"]) == ("16", "8", "1")
    assert "requeue" in asked and asked["open-mode"] == "append"


def test_slurm_signals_the_steps_and_leaves_time_to_save():
    name, seconds = directives()["signal"].split("@")
    assert name == "TERM", "B:TERM would reach the shell alone"
    waits = re.search(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-(\d+)", SLURM.read_text())
    assert waits and int(waits[1]) < int(seconds)


def test_slurm_starts_one_torchrun_a_machine(machine):
    slurm(machine, "runs/a", "megdet:batch_256_bn_16", "--data.train", "data/my train")
    [words] = machine.calls("srun")
    start = words.index("torchrun")
    assert words[:start] == ["--cpus-per-task=64", "--kill-on-bad-exit=0"]
    given = get_args_parser().parse_args(words[start + 1 :])
    assert (given.nnodes, given.nproc_per_node, given.max_restarts) == ("2", "gpu", 3)
    assert (given.rdzv_backend, given.rdzv_endpoint, given.rdzv_id) == ("c10d", "node-03:29642", "4242")
    assert given.no_python
    called = worker(machine, [given.training_script, *given.training_script_args])
    assert called == ["train", "megdet:batch_256_bn_16", "--data.train", "data/my train", "--out", "runs/a"]


def test_slurm_takes_another_number_of_processes(machine):
    slurm(machine, "runs/a", "debug:tiny", PROCESSES_PER_NODE="4")
    [words] = machine.calls("srun")
    assert "--nproc-per-node=4" in words


def test_slurm_goes_on_with_a_run_that_is_there(machine):
    """Each process looks when it starts, so that also one that torchrun starts again goes on."""
    slurm(machine, "runs/a", "debug:tiny")
    [words] = machine.calls("srun")
    given = get_args_parser().parse_args(words[words.index("torchrun") + 1 :])
    command = [given.training_script, *given.training_script_args]
    assert worker(machine, command) == ["train", "debug:tiny", "--out", "runs/a"]
    (machine.folder / "runs" / "a").mkdir(parents=True)
    (machine.folder / "runs" / "a" / "config.json").write_text("{}")
    assert worker(machine, command) == ["train", "debug:tiny", "--resume", "--out", "runs/a"]


@pytest.mark.parametrize(
    ("status", "progress", "requeued"), [(0, True, False), (1, True, True), (1, False, False), (143, True, True)]
)
def test_slurm_queues_again_what_got_further(machine, status, progress, requeued):
    more = {"PROGRESS": str(machine.folder / "run")} if progress else {}
    slurm(machine, "run", "debug:tiny", code=status, STATUS=str(status), **more)
    assert (["requeue", "4242"] in machine.calls("scontrol")) == requeued


def test_slurm_does_not_queue_again_what_stands_still(machine):
    """The second attempt saves nothing new."""
    latest = machine.folder / "run" / "checkpoints" / "latest.json"
    latest.parent.mkdir(parents=True)
    latest.write_text('{"step": 8}')
    slurm(machine, "run", "debug:tiny", code=1, STATUS="1", PROGRESS=str(machine.folder / "run"))
    assert ["requeue", "4242"] not in machine.calls("scontrol")


def test_slurm_says_how_it_is_called(machine):
    assert "usage: sbatch launch/slurm.sh RUN RECIPE" in slurm(machine, "runs/a", code=2)
    assert not machine.calls("srun")


@contextlib.contextmanager
def two_machines(machine: Machine, *words: str) -> Iterator[subprocess.Popen]:
    """The script at work, with a real torchrun of one process on each of two machines, which are this one."""
    programs = machine.folder / "bin"
    for name in ("torchrun", "gesso"):
        (programs / name).unlink(missing_ok=True)
    (programs / "srun").write_text(TWO_MACHINES)
    (programs / "scontrol").write_text((RECORD + SCONTROL).replace("node-03", "localhost"))
    job = {"SLURM_JOB_ID": "4242", "SLURM_JOB_NODELIST": "x", "SLURM_JOB_NUM_NODES": "2", "PROCESSES_PER_NODE": "1"}
    paths = {"PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment = os.environ | machine.environment | job | paths
    script = subprocess.Popen(["bash", SLURM, *words], cwd=machine.folder, env=environment, start_new_session=True)
    try:
        yield script
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(script.pid, signal.SIGKILL)


def torchruns(machine: Machine) -> list[int]:
    return [int(pid) for pid in (machine.folder / "torchruns").read_text().split()]


def wait_for(ready: Callable[[], bool], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.mark.slow
def test_slurm_through_a_time_limit_and_a_killed_process(machine):
    """Stopped as SLURM does it and queued again; then one process is killed, and torchrun starts all of them again."""
    run, words = machine.folder / "run", ("run", "debug:tiny", "--device", "cpu", "--training.steps", "60")

    def saved() -> int:
        latest = run / "checkpoints" / "latest.json"
        return json.loads(latest.read_text())["step"] if latest.exists() else 0

    with two_machines(machine, *words) as script:
        wait_for(lambda: saved() >= 4)
        for pid in torchruns(machine):
            os.kill(pid, signal.SIGTERM)
        assert script.wait(300) != 0
    assert machine.calls("scontrol")[-1] == ["requeue", "4242"]
    stopped = saved()
    assert stopped < 60
    with two_machines(machine, *words) as script:
        wait_for(lambda: saved() > stopped)
        [process] = subprocess.run(
            ["pgrep", "-P", str(torchruns(machine)[1])], capture_output=True, text=True, check=True
        ).stdout.split()
        os.kill(int(process), signal.SIGKILL)
        assert script.wait(600) == 0
    assert machine.calls("scontrol").count(["requeue", "4242"]) == 1
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 61))


def test_kubernetes_parts_fit_together():
    service, made = yaml.safe_load_all(KUBERNETES.read_text())
    name, spec = made["metadata"]["name"], made["spec"]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"job-name": name}
    inner = spec["template"]["spec"]
    assert inner["subdomain"] == service["metadata"]["name"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"] == 16
    assert inner["restartPolicy"] == "Never", "podFailurePolicy needs it"
    assert {mount["name"] for mount in pod()["volumeMounts"]} == {volume["name"] for volume in inner["volumes"]}
    waits = int(environment_of_pod(0)["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert waits < inner["terminationGracePeriodSeconds"]


@pytest.mark.parametrize(("index", "host"), [(0, "true"), (3, "false")])
def test_kubernetes_starts_one_torchrun_a_pod(machine, index, host):
    container, spec = pod(), job()["spec"]
    machine.call(*container["command"], *container["args"], **environment_of_pod(index))
    [words] = machine.calls("torchrun")
    given = get_args_parser().parse_args(words)
    assert int(given.nnodes) == spec["completions"]
    assert int(given.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert given.rdzv_endpoint == f"{job()['metadata']['name']}-0.{spec['template']['spec']['subdomain']}:29400"
    assert given.rdzv_conf == f"read_timeout=900,join_timeout=900,is_host={host}"
    assert (given.rdzv_backend, given.local_addr, given.no_python) == ("c10d", "10.0.0.7", True)
    assert container["args"][0].count("exec torchrun") == 1, "torchrun gets the SIGTERM, not a shell before it"
    called = worker(machine, [given.training_script, *given.training_script_args])
    assert called[0] == "train" and called[1] in all_recipes() and called[-2] == "--out"
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert all(Path(word).parents[-2].as_posix() in mounts for word in called if word.startswith("/"))


def test_kubernetes_goes_on_with_a_run_that_is_there(machine):
    container = pod()
    script = container["args"][0].replace("/runs/a", str(machine.folder / "a"))
    machine.call(*container["command"], script, **environment_of_pod(0))
    [words] = machine.calls("torchrun")
    given = get_args_parser().parse_args(words)
    command = [given.training_script, *given.training_script_args]
    assert "--resume" not in worker(machine, command)
    (machine.folder / "a").mkdir()
    (machine.folder / "a" / "config.json").write_text("{}")
    assert worker(machine, command)[-3:] == ["--resume", "--out", str(machine.folder / "a")]


@pytest.mark.parametrize("path", ["launch/slurm.sh", "launch/kubernetes.yaml", "docs/distributed.md"])
def test_every_recipe_that_is_named_exists(path):
    named = set(re.findall(r"\b(?:megdet|debug|demo|direct|detectors):[a-z][a-z0-9_]*\b", (ROOT / path).read_text()))
    assert named and named <= set(all_recipes())
