"""One embedded data set and one finished run for all tests of runs, on one thread."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gesso.data.demo_index import demo_index
from gesso.data.demo_scenes import DemoConfig
from gesso.recipes.debug import tiny
from gesso.run.train import train
from tests.run.helpers import Data, tiny_run


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """The embedded data set of ``debug:tiny``, made once."""
    folder = tmp_path_factory.mktemp("data")
    embedded = tiny().data.embedded
    assert isinstance(embedded, DemoConfig)
    demo_index(folder / "train", embedded)
    demo_index(folder / "val", DemoConfig(images=4, side=64, objects=(1, 3), scale=(0.2, 0.5), split="val"))
    return Data(train=folder / "train" / "index", val=folder / "val" / "index")


@pytest.fixture(scope="package")
def straight(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps of 4 pictures without any interruption."""
    out = tmp_path_factory.mktemp("straight") / "run"
    train(tiny_run(data, steps=4, batch_size=4, checkpoint_every=2, evaluate_every=4), out, recipe="debug:tiny")
    return out
