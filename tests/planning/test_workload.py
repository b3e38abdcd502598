import dataclasses

import pytest
from torch import nn

from gesso import config as configs
from gesso.errors import ConfigError, RunError
from gesso.models.norm import NormPolicy, apply_norm_policy
from gesso.planning.workload import (
    classes_of,
    detector_traffic,
    images_of,
    measured_step,
    module_traffic,
    stage_of,
    total_images,
)
from gesso.recipes.debug import tiny
from gesso.recipes.demo import direct
from gesso.run.config import DataConfig
from gesso.run.folder import RunFolder


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
        self.neck = nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6))
        self.frozen = nn.Linear(10, 10).requires_grad_(False)


def test_traffic_of_a_module_by_hand():
    found = module_traffic(Parts())
    parameters = 3 * 4 * 9 + 2 * 8 + (4 * 6 + 6) + 2 * 6
    assert found.gradient_bytes == 4 * parameters
    assert (found.norm_layers, found.norm_bytes) == (3, 2 * 4 * (4 + 4 + 6))
    only = module_traffic(Parts(), ("neck",))
    assert (only.gradient_bytes, only.norm_layers, only.norm_bytes) == (4 * parameters, 1, 2 * 4 * 6)


def test_fixed_batch_norm_sends_no_statistics():
    module = Parts()
    apply_norm_policy(module, NormPolicy(kind="fixed"))
    assert (module_traffic(module).norm_layers, module_traffic(module).norm_bytes) == (0, 0)


def test_a_recipes_detector_grows_with_its_classes():
    few, many = (detector_traffic(tiny(), n) for n in (10, 20))
    assert few.norm_layers == many.norm_layers > 0
    assert few.gradient_bytes < many.gradient_bytes < 1.1 * few.gradient_bytes


def run(tmp_path, rows, config=None, **environment):
    config = config or tiny()
    folder = RunFolder.create(tmp_path, {"config": configs.to_dict(config), "environment": environment})
    for row in rows:
        folder.append(row)
    return folder


def row(step, seconds, share=0.0, stage="training"):
    return {"step": step, "stage": stage, "step_seconds": seconds, "data_share": share}


def test_the_median_of_the_later_half(tmp_path):
    seconds = [9, 9, 9, 2, 4, 1, 3]
    rows = [row(i, s, 0.25) for i, s in enumerate(seconds)] + [{"step": 7, "stage": "training", "AP": 0.5}]
    found = measured_step(run(tmp_path, rows), "training")
    assert (found.seconds, found.data_seconds, found.images) == (0.75 * 2.5, 0.25 * 2.5, 8)


def test_a_step_of_several_parts_is_counted_by_the_part(tmp_path):
    config = dataclasses.replace(tiny(), training=dataclasses.replace(tiny().training, accumulate=4))
    found = measured_step(run(tmp_path, [row(1, 8.0, 0.5)], config), "training")
    assert (found.seconds, found.data_seconds, found.images) == (1.0, 1.0, 2)


def test_each_stage_has_its_own_rows(tmp_path):
    folder = run(tmp_path, [row(1, 5.0, stage="pretraining"), row(2, 1.0)], direct())
    assert measured_step(folder, "pretraining").seconds == 5
    assert measured_step(folder, "training").seconds == 1


def test_runs_that_do_not_tell_a_step_are_refused(tmp_path):
    with pytest.raises(RunError, match="no row of metrics"):
        measured_step(run(tmp_path / "a", []), "training")
    with pytest.raises(RunError, match="measured on 4 processes"):
        measured_step(run(tmp_path / "b", [row(1, 1.0)], world_size=4), "training")


def test_stages_by_name():
    assert stage_of(direct(), "pretraining").batch_size == 16
    with pytest.raises(ConfigError, match="no stage 'pretraining'"):
        stage_of(tiny(), "pretraining")


def test_classes_and_pictures_of_the_embedded_data_and_of_none():
    assert (classes_of(tiny()), images_of(tiny())) == (10, 32)
    bare = dataclasses.replace(tiny(), data=DataConfig())
    assert (classes_of(bare), images_of(bare)) == (None, None)


def test_total_images():
    config, stage = tiny(), tiny().training
    by_epochs = dataclasses.replace(stage, epochs=3.0)
    bare = dataclasses.replace(config, data=DataConfig())
    assert total_images(config, stage, None, None) == 12 * 8
    assert total_images(config, stage, 1000, 2) == 2000
    assert total_images(config, stage, None, 2) == 64
    assert total_images(config, by_epochs, None, None) == 96
    assert total_images(config, by_epochs, 100, None) == 300
    with pytest.raises(ConfigError, match="--epochs"):
        total_images(config, stage, 1000, None)
    with pytest.raises(ConfigError, match="--images"):
        total_images(bare, stage, None, 2)
