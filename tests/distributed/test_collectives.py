import numpy as np
import pytest
import torch

from gesso import distributed
from gesso.errors import ConfigError
from tests.distributed.processes import run


def _collectives():
    rank = distributed.rank()
    before = distributed.traffic.count
    summed = distributed.global_sum(torch.tensor([1.0, 2.0]) * (rank + 1)).tolist()
    gathered = distributed.all_gather(torch.arange(2) + rank).tolist()
    counted = distributed.traffic.count - before
    pairs = distributed.group(2)
    pair = distributed.all_reduce_sum(torch.tensor([float(rank)]), pair_handle := pairs).item()
    rows = distributed.gather_array(np.full((rank, 2), rank, np.float64)).tolist()
    with distributed.alone():
        alone = (distributed.world_size(), distributed.group_size(pair_handle))
        own = distributed.global_sum(torch.ones(1)).item()
    return summed, gathered, counted, pair, distributed.group_size(pairs), rows, alone, own


@pytest.mark.parametrize("world", [2, 4])
def test_collectives(world):
    for rank, found in enumerate(run(_collectives, world)):
        summed, gathered, counted, pair, size, rows, alone, own = found
        total = world * (world + 1) / 2
        assert summed == [total, 2 * total]
        assert gathered == [[r, r + 1] for r in range(world)]
        assert counted == 2
        assert (pair, size) == (float(rank // 2 * 4 + 1), 2)
        assert rows == [[r, r] for r in range(world) for _ in range(r)]
        assert (alone, own) == ((1, 1), 1.0)


def _machines():
    groups = distributed.group(2)
    return distributed.machines(), distributed.all_gather(torch.tensor([distributed.rank()]), groups).flatten().tolist()


def _of_machine(machine: str):
    import os

    os.environ["GROUP_RANK"] = machine.split(",")[distributed.rank()]
    return _machines()


def test_groups_lie_on_one_machine_also_where_ranks_are_dealt_out_in_turn():
    found = run(_of_machine, 4, "0,1,0,1")
    assert [ranks for _, ranks in found] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert all(machines == [0, 1, 0, 1] for machines, _ in found)


def _mistake():
    def work():
        raise ConfigError("a thing is wrong", where="there", remedy="Mend it.")

    try:
        distributed.from_main(work)
    except ConfigError as error:
        return str(error), error.told
    return None


def test_a_mistake_of_process_0_is_raised_in_all_and_told_once():
    line = "there: a thing is wrong. Mend it."
    assert run(_mistake, 2) == [(line, False), (line, True)]


def _answers():
    return distributed.from_main(lambda: {"rank": distributed.rank()})


def test_all_get_the_answer_of_process_0():
    assert run(_answers, 2) == [{"rank": 0}, {"rank": 0}]


def _fails():
    if distributed.rank() == 1:
        raise ValueError("of process 1")
    return 0


def test_the_runner_shows_what_fails():
    with pytest.raises(AssertionError, match="of process 1"):
        run(_fails, 2)
