import os
import random
import threading
import time

import pytest
from torch.distributed import HashStore

from gesso import launch
from gesso.launch import is_launched, is_restart, launch_id, meet

NAMES = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "WORLD_SIZE", "RANK")


@pytest.fixture
def torchrun(monkeypatch):
    """Sets the environment as torchrun does."""

    def begin(name, restarts=0):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))

    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    return begin


def test_without_torchrun_there_is_one_process(torchrun, monkeypatch):
    assert (launch.rank(), launch.world_size(), launch_id()) == (0, 1, None)
    assert not is_launched() and not is_restart(None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert is_launched() and launch_id() is None and not is_restart(None)


def test_a_launch_is_known_by_its_name(torchrun):
    torchrun("job 7")
    assert is_launched() and launch_id() == "job 7"
    assert is_restart("job 7") and not is_restart("job 8") and not is_restart(None)


def test_a_launch_without_a_name_is_its_process_and_has_begun_before(torchrun):
    torchrun("none")
    mine = launch_id()
    assert str(os.getppid()) in mine and not is_restart(mine)
    torchrun("none", restarts=1)
    assert is_restart(mine) and not is_restart("process 1 on nowhere")


def meeting(store, count, chance):
    """The names that a group of threads agrees on, which come one after the other in any order."""
    found = [None] * count

    def come(number):
        time.sleep(chance.uniform(0, 0.1))
        found[number] = meet(store, number, count, seconds=20)

    threads = [threading.Thread(target=come, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return set(found)


@pytest.mark.parametrize("seed", range(3))
def test_every_group_in_one_store_has_a_name_of_its_own(seed):
    """Groups of several sizes, and between them what dead processes left: a word without an answer."""
    store, chance, seen = HashStore(), random.Random(seed), set()
    for count in (4, 4, 2, 1, 3, 4):
        names = meeting(store, count, chance)
        assert len(names) == 1 and None not in names and not names & seen
        seen |= names
        store.set(f"gesso/hello/{chance.randrange(1, 4)}", "a word of the dead")


@pytest.mark.parametrize("number", [0, 1])
def test_nobody_waits_for_ever(number):
    with pytest.raises(RuntimeError, match="timed out"):
        meet(HashStore(), number, 2, seconds=0.1)
