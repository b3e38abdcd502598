"""Small data sets for tests with several processes, made once; and one thread in this process, as in the others."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gesso.data.demo_index import demo_index
from gesso.data.demo_scenes import DemoConfig
from gesso.data.index import Index
from gesso.data.select import subset
from tests.run.helpers import Data


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Scenes of 64 pixels: 24 to train on, about a third of them without any object, and 5 to evaluate on."""
    folder = tmp_path_factory.mktemp("data")
    for split, images, objects in (("train", 24, (0, 1)), ("val", 5, (1, 3))):
        config = DemoConfig(images=images, side=64, objects=objects, scale=(0.2, 0.5), split=split)
        demo_index(folder / split, config)
    return Data(train=folder / "train" / "index", val=folder / "val" / "index")


@pytest.fixture(scope="package")
def two_images(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first two pictures of the validation set."""
    return subset(Index.open(data.val), tmp_path_factory.mktemp("two") / "index", [0, 1]).path
