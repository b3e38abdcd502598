"""What a run takes on disk."""

import dataclasses

import pytest
import torch

from gesso.data.demo import DemoConfig
from gesso.data.demo_index import demo_index
from gesso.planning.account import StepAccount
from gesso.planning.disk import Disk, data_bytes
from gesso.recipes.debug import tiny
from gesso.run.config import DataConfig
from gesso.run.train import train


def test_an_index_counts_with_its_pictures(tmp_path):
    index = demo_index(tmp_path / "scenes", DemoConfig(images=6, side=64))
    rows = range(len(index))
    pictures = sum(index.image_path(i).stat().st_size for i in rows)
    own = sum(path.stat().st_size for path in index.path.rglob("*") if path.is_file())
    config = dataclasses.replace(tiny(), data=DataConfig(train=index.path))
    found, words = data_bytes(config)
    assert found == pytest.approx(pictures + own, abs=1)
    assert "6 pictures" in words
    both = dataclasses.replace(config, data=DataConfig(train=index.path, val=index.path))
    assert data_bytes(both)[0] == 2 * found
    for i in rows:
        index.image_path(i).unlink()
    assert data_bytes(config)[0] == own


def test_embedded_scenes_and_no_data():
    found, words = data_bytes(tiny())
    assert found == (32 + 8) * 64 * 64 * 3 and "at most" in words
    assert data_bytes(dataclasses.replace(tiny(), data=DataConfig())) == (None, "no data is named")


def test_altogether():
    disk = Disk(checkpoint=5, checkpoints=3, data=2, data_words="")
    assert disk.bytes == 17 and dataclasses.replace(disk, data=None).bytes == 15


def test_a_checkpoint_is_as_large_as_counted(tmp_path):
    config = tiny()
    backbone = dataclasses.replace(config.model.backbone, name="test_resnet")
    training = dataclasses.replace(config.training, steps=1, batch_size=2, ema_decay=0.9)
    config = dataclasses.replace(
        config, device="cpu", model=dataclasses.replace(config.model, backbone=backbone), training=training
    )
    train(config, tmp_path / "run")
    (folder,) = (tmp_path / "run" / "checkpoints").glob("[0-9]*")
    written = sum(path.stat().st_size for path in folder.iterdir())
    counted = StepAccount(config, "training", device=torch.device("cpu")).count((64, 64), 2).checkpoint
    assert written == pytest.approx(counted, rel=0.05)
