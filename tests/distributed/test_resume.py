"""Runs that are killed at random moments and go on are those that were never disturbed.

Processes are killed by SIGKILL: at a random time after a step, while a checkpoint is being written, or soon after they
began. They are forked from a server that has imported everything, so that a start takes no ten seconds, and call
``train``, as the command line does; the last test calls the command line itself.
"""

import dataclasses
import itertools
import json
import os
import random
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gesso.data.index import Index
from gesso.data.loading import training_batches
from gesso.errors import GessoError
from gesso.random_key import fold
from gesso.run.session import STAGES
from gesso.run.train import train
from tests.distributed.launched import GESSO, TORCHRUN, launching, steps_of
from tests.distributed.processes import _CONTEXT, free_port
from tests.run.helpers import BACKBONE, differences, newest, rows, tiny_run, two_stages

SHORT = {"steps": 11, "checkpoint_every": 2, "evaluate_every": 6}
"""Epochs have three batches (24 pictures), so that most checkpoints lie within one."""
SEEDS = [int(seed) for seed in os.environ.get("GESSO_KILL_SEEDS", "0").split()]
"""Other seeds kill at other moments: ``GESSO_KILL_SEEDS="1 2 3"``."""


@dataclasses.dataclass(frozen=True)
class Kill:
    """When processes are killed: ``delay`` seconds after so many more rows, after a write began, or after the start."""

    when: str
    more: int
    delay: float

    @staticmethod
    def draw(chance: random.Random) -> "Kill":
        when = chance.choice(("row", "row", "write", "write", "start"))
        return Kill(when, chance.randint(1, 4), chance.random() * {"row": 0.3, "write": 0.1, "start": 3.0}[when])


def half_written(out: Path) -> set[Path]:
    return set((out / "checkpoints").glob(".*.tmp"))


class Group:
    """``train`` in one or several processes; goes on where there is a run already."""

    def __init__(self, config, out, world, *, slow=False):
        self.out, self.said = out, out.with_name(f"{out.name}.stderr")
        self.rows, self.half_written = len(steps_of(out)), half_written(out)
        resume, port = (out / "config.json").exists(), free_port()
        self.processes = [
            _CONTEXT.Process(target=_train, args=(config, out, self.said, (rank, world, port), resume, slow))
            for rank in range(world)
        ]
        for process in self.processes:
            process.start()

    def until(self, kill):
        """Waits for the moment; False where they have ended before."""
        while not self._due(kill):
            if all(process.exitcode == 0 for process in self.processes):
                return False
            self._check((None, 0))
            time.sleep(0.001)
        time.sleep(kill.delay)
        return True

    def kill(self, kill, chance):
        """Kills all processes, one a moment after the other; False where they had ended before."""
        if not self.until(kill):
            return False
        for process in chance.sample(self.processes, len(self.processes)):
            process.kill()
            time.sleep(chance.choice((0, chance.random() * 0.3)))
        for process in self.processes:
            process.join()
        return any(process.exitcode == -signal.SIGKILL for process in self.processes)

    def end(self):
        """Waits until it is done."""
        for process in self.processes:
            process.join(timeout=300)
        self._check((0,))

    def _due(self, kill):
        if kill.when == "write":
            return bool(half_written(self.out) - self.half_written)
        return kill.when == "start" or len(steps_of(self.out)) >= self.rows + kill.more

    def _check(self, allowed):
        codes = [process.exitcode for process in self.processes]
        assert all(code in allowed for code in codes), f"exit codes {codes}\n{self.said.read_text()}"


def _train(config, out, said, place, resume, slow):
    os.environ |= dict(zip(("RANK", "WORLD_SIZE", "MASTER_PORT"), map(str, place), strict=True))
    os.environ |= {"LOCAL_RANK": str(place[0]), "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    sys.stderr = said.open("a", buffering=1)
    os.dup2(sys.stderr.fileno(), 2)
    torch.set_num_threads(1)
    if slow:
        fsync = os.fsync
        os.fsync = lambda descriptor: (time.sleep(1.0), fsync(descriptor))
    try:
        train(config, out, resume=resume)
    except GessoError as error:
        sys.stderr.write(f"gesso: {error}\n")
        sys.exit(error.exit_code)


def with_kills(config, out, seed, *, worlds=(1,), workers=(0,), kills=3):
    """Kills a run up to ``kills`` times; it goes on, in turn with so many processes and loaders. How often it did."""
    chance = random.Random(seed)
    for count in range(kills + 1):
        data = dataclasses.replace(config.data, workers=workers[count % len(workers)])
        group = Group(dataclasses.replace(config, data=data), out, worlds[count % len(worlds)])
        if count == kills:
            group.end()
        elif not group.kill(Kill.draw(chance), chance):
            return count
    return kills


def undisturbed(config, out, world):
    Group(config, out, world).end()
    return out


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """The same run without any kill, by 1 and by 2 processes."""
    folder = tmp_path_factory.mktemp("straight")
    return {world: undisturbed(tiny_run(data, **SHORT), folder / str(world), world) for world in (1, 2)}


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("seed", SEEDS)
def test_killed_at_random_moments_bit_for_bit(data, straight, tmp_path, seed, world):
    """Also with another number of loader processes each time, and in the middle of an epoch."""
    count = with_kills(tiny_run(data, **SHORT), tmp_path / "r", seed, worlds=(world,), workers=(0, 2, 1, 0))
    assert count > 0
    assert differences(straight[world], tmp_path / "r") == []


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("seed", SEEDS)
def test_killed_within_the_writing_of_a_checkpoint(data, straight, tmp_path, seed, world):
    """Flushing takes seconds, much longer than the processes are killed after one another: the kill cannot miss it."""
    config, out, chance = tiny_run(data, **SHORT), tmp_path / "r", random.Random(seed)
    for _ in range(2):
        before = half_written(out)
        assert Group(config, out, world, slow=True).kill(Kill("write", 0, chance.random() * 0.1), chance)
        assert half_written(out) - before, "it was not hit"
    undisturbed(config, out, world)
    assert differences(straight[world], out) == [] and not half_written(out)


@pytest.mark.slow
@pytest.mark.parametrize("worlds", [(1, 2), (2, 1)], ids=str)
@pytest.mark.parametrize("seed", SEEDS)
def test_killed_and_gone_on_with_another_number_of_processes(data, tmp_path, seed, worlds):
    config = tiny_run(data, precision="float64", **SHORT | {"steps": 12})
    one = undisturbed(config, tmp_path / "one", 1)
    chance, out = random.Random(seed), tmp_path / "r"
    assert Group(config, out, worlds[0]).kill(Kill("row", chance.randint(3, 8), chance.random() * 0.2), chance)
    before = _world_size(out)
    undisturbed(config, out, worlds[1])
    assert (before, _world_size(out)) == worlds
    expected, found = rows(one), rows(out)
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert row.keys() == other.keys()
        numbers = {name: value for name, value in other.items() if isinstance(value, float)}
        assert {name: row[name] for name in numbers} == pytest.approx(numbers, rel=1e-6, abs=1e-6)
    for name, value in load_file(newest(one) / "model.safetensors").items():
        torch.testing.assert_close(load_file(newest(out) / "model.safetensors")[name], value, rtol=0, atol=1e-6)


def _world_size(run):
    """How many processes made the newest checkpoint."""
    return json.loads((newest(run) / "state.json").read_text())["world_size"]


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("seed", SEEDS)
def test_two_stages_killed_at_random_moments(data, tmp_path, seed, world):
    """Averages, AdamW, then SGD: everything that a checkpoint carries."""
    config = two_stages(data)
    straight = undisturbed(config, tmp_path / "straight", world)
    with_kills(config, tmp_path / "r", seed, worlds=(world,), workers=(0, 1), kills=4)
    assert (newest(straight) / "ema.safetensors").exists() == (config.training.ema_decay is not None)
    assert differences(straight, tmp_path / "r") == []


@pytest.mark.slow
def test_the_others_leave_when_one_is_killed_and_all_go_on(data, straight, tmp_path):
    config, out = tiny_run(data, **SHORT), tmp_path / "r"
    for end, lost, code in ((0, 1, 75), (1, 0, 75)):
        group = Group(config, out, 2)
        assert group.until(Kill("row", 2, 0.0))
        group.processes[lost].kill()
        group.processes[end].join(timeout=60)
        assert group.processes[end].exitcode == code
    said = group.said.read_text()
    assert "Traceback" not in said
    noticed = re.findall(r"gesso: another process of this run was lost \(rank (.) noticed at step \d+ in '.+'\)", said)
    assert noticed == ["0", "1"]
    undisturbed(config, out, 2)
    assert differences(straight[2], out) == []


@pytest.mark.slow
def test_the_others_leave_when_one_hangs_and_all_go_on(data, straight, tmp_path):
    config, out = tiny_run(data, **SHORT), tmp_path / "r"
    group = Group(dataclasses.replace(config, timeout_seconds=5), out, 2)
    assert group.until(Kill("row", 3, 0.0))
    os.kill(group.processes[1].pid, signal.SIGSTOP)
    try:
        group.processes[0].join(timeout=60)
        assert group.processes[0].exitcode == 75
    finally:
        group.processes[1].kill()
        group.processes[1].join()
    (line,) = [line for line in (out / "log.txt").read_text().splitlines() if " E " in line]
    found = re.search(r" E rank 0 has waited \d+ s in '.+' at step (\d+), its batch has the image ids ([\d, ]+);", line)
    assert found, line
    seen = training_batches(
        Index.open(data.train), config.training.input, seed=fold(0, STAGES["training"]), batch_size=8
    )
    batch = next(itertools.islice(seen, int(found[1]) - 1, None))[0]
    ids = Index.open(data.train).image_ids[batch.image_index[:4].numpy()]
    assert [int(word) for word in found[2].split(",")] == ids.tolist()
    undisturbed(config, out, 2)
    assert differences(straight[2], out) == []


@pytest.mark.slow
def test_the_command_line_under_torchrun_is_killed_and_goes_on(data, straight, tmp_path):
    """All processes at once, torchrun included, as when a machine fails."""
    out = tmp_path / "r"
    options = {"model.backbone.name": BACKBONE, "data.train": data.train, "data.val": data.val}
    options |= {f"training.{key.replace('_', '-')}": value for key, value in SHORT.items()}
    command = (*TORCHRUN, "--standalone", "--nproc-per-node", "2", *GESSO, "train", "debug:tiny", "--out", out)
    words = [*command, *(word for key, value in options.items() for word in (f"--{key}", value))]
    with launching(tmp_path / "logs") as begin:
        first = begin(*words)
        first.until(lambda: len(steps_of(out)) >= 5)
        first.kill()
        assert len(steps_of(out)) < 11
        again = begin(*words, "--resume")
        assert again.wait() == 0, again.err
    assert differences(straight[2], out) == []
