"""The small recipes train a step, and start from each other."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from gesso.data.demo import make_demo, make_demo_classes
from gesso.data.importing import import_data
from gesso.files import read_json
from gesso.recipes.catalog import make_config
from gesso.recipes.debug import tiny
from gesso.run.config import RunConfig
from gesso.run.train import train
from tests.run.helpers import rows

DETECTORS = ("small", "small_scratch", "small_mask", "small_cascade", "small_retinanet")
SCENES = tiny().data.embedded


def in_a_step(config: RunConfig, data: Path | None = None) -> RunConfig:
    """One step a stage, of four pictures; on an index, or on 16 scenes of the embedded data set."""
    stages = {
        name: dataclasses.replace(
            stage,
            steps=1,
            batch_size=4,
            schedule=dataclasses.replace(stage.schedule, warmup_steps=0),
            checkpoint_every=1,
            evaluate_every=1,
        )
        for name, stage in config.stages()
    }
    embedded = None if data else dataclasses.replace(SCENES, images=16)
    where = dataclasses.replace(config.data, train=data, embedded=embedded, embedded_val=2, workers=0)
    return dataclasses.replace(config, data=where, **stages)


def loss(run: Path) -> float:
    """Of the last step."""
    return float([row for row in rows(run) if "loss" in row][-1]["loss"])


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    out = tmp_path_factory.mktemp("classes")
    pictures = make_demo_classes(out / "pictures", dataclasses.replace(SCENES, images=16))
    return Path(import_data(pictures, out / "index", format="folder").path)


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    out = tmp_path_factory.mktemp("maps")
    scenes = make_demo(out / "scenes", dataclasses.replace(SCENES, images=16)).parent
    shutil.copytree(scenes / "images", out / "set" / "images")
    shutil.copytree(scenes / "semantic", out / "set" / "masks")
    return Path(import_data(out / "set", out / "index", format="masks").path)


@pytest.mark.slow
@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector(name, tmp_path):
    train(in_a_step(make_config(f"direct:{name}")), tmp_path / "run")
    assert 0 < loss(tmp_path / "run") < 1e4


@pytest.mark.slow
def test_a_classifier_starts_a_detector(classes, tmp_path):
    train(in_a_step(make_config("classify:small"), classes), tmp_path / "classifier")
    assert 0 < loss(tmp_path / "classifier") < 10
    train(in_a_step(make_config("direct:small_fine_tune")), tmp_path / "detector", init=tmp_path / "classifier")
    found = read_json(tmp_path / "detector" / "weights.json")
    loaded = found["loaded"]
    assert loaded and all(name.startswith("backbone.") for name in loaded)
    assert not [name for name in found["missing"] if name.startswith("backbone.")], "the whole backbone is there"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["classify:small_fine_tune", "segment:small"])
def test_a_detector_starts_others(name, classes, maps, tmp_path):
    train(in_a_step(make_config("direct:small_scratch")), tmp_path / "detector")
    data = classes if name.startswith("classify") else maps
    train(in_a_step(make_config(name), data), tmp_path / "other", init=tmp_path / "detector")
    assert 0 < loss(tmp_path / "other") < 10
    found = read_json(tmp_path / "other" / "weights.json")
    assert found["loaded"] and not [key for key in found["missing"] if key.startswith("backbone.")]
