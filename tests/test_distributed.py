import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gesso import distributed
from gesso.errors import ConfigError

ROOT = Path(__file__).parents[1]

WORK = """
import json, sys, torch
from gesso import distributed
before = (distributed.rank(), distributed.world_size(), distributed.announced_world_size())
distributed.initialise()
distributed.initialise()
value = torch.tensor([1.0, 10.0], dtype=torch.float64) * (distributed.rank() + 1)
summed = distributed.all_reduce_sum(value)
print(json.dumps([before, distributed.rank(), distributed.world_size(), distributed.is_main(), summed.tolist()]))
distributed.shutdown()
assert distributed.world_size() == 1
"""


def test_one_process_needs_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    distributed.initialise()
    assert (distributed.rank(), distributed.world_size(), distributed.announced_world_size()) == (0, 1, 1)
    assert distributed.is_main()
    value = torch.tensor([3.0])
    assert distributed.all_reduce_sum(value) is value and value.item() == 3.0
    distributed.shutdown()


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.choose_device("auto") == distributed.choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="no GPU"):
        distributed.choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert distributed.choose_device("auto") == torch.device("cuda", 3)
    assert distributed.choose_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(ConfigError, match="no GPU of its own: there are 4"):
        distributed.choose_device("auto")


@pytest.mark.slow
def test_two_real_processes(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    processes = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        command = [sys.executable, "-c", WORK]
        processes.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
    try:
        said = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert said == [[[0, 1, 2], rank, 2, rank == 0, [3.0, 30.0]] for rank in range(2)]
    assert [process.returncode for process in processes] == [0, 0]
