import numpy as np
import pytest
from pycocotools import mask as coco_mask

from gesso.data.demo_index import demo_index
from gesso.data.demo_scenes import DemoConfig, demo_label_space, make_scene
from gesso.data.records import Rle
from gesso.errors import InputError

RICH = DemoConfig(images=12, side=96, parts=True, hierarchy=True, coarse_labels=0.3, hidden_labels=0.4)


def decoded(mask):
    assert isinstance(mask, Rle)
    return coco_mask.decode({"size": list(mask.size), "counts": mask.counts}).astype(bool)


@pytest.mark.parametrize("config", [DemoConfig(images=12, side=96), RICH], ids=["plain", "rich"])
def test_the_index_holds_the_scenes(tmp_path, config):
    index = demo_index(tmp_path, config)
    assert len(index) == 12
    assert index.label_space == demo_label_space(config)
    assert index.issues() == []
    columns = index.object_columns
    at = 0
    for i in range(12):
        scene = make_scene(config, i)
        shown = [item for item in scene.objects if not item.hidden_label]
        found = index.objects(i)
        assert np.array_equal(found.xyxy, np.array([item.xyxy for item in shown]).reshape(-1, 4))
        assert [index.label_space.names[label] for label in found.labels] == [item.name for item in shown]
        assert found.areas.tolist() == [item.mask.sum() for item in shown]
        for mask, item in zip(index.masks(i), shown, strict=True):
            assert np.array_equal(decoded(mask), item.mask)
        rows = slice(at, at + len(shown))
        assert np.array_equal(columns["visible_xyxy"][rows], np.array([o.visible_xyxy for o in shown]).reshape(-1, 4))
        assert np.allclose(columns["occluded_share"][rows], [item.occluded for item in shown], atol=1e-4)
        numbers = dict(zip(map(id, shown), index.annotation_ids[rows].tolist(), strict=True))
        wholes = [None if item.whole is None else scene.objects[item.whole] for item in shown]
        assert columns["part_of"][rows].tolist() == [numbers.get(id(whole), 0) for whole in wholes]
        at += len(shown)
        assert index.image_path(i).is_file()
        semantic = index.semantic_path(i)
        assert semantic is not None and semantic.is_file()
    assert at == index.num_boxes
    assert np.any(columns["part_of"]) == config.parts


def test_verified_classes(tmp_path):
    index = demo_index(tmp_path, RICH)
    names = np.array(index.label_space.names)
    space = index.label_space
    unverified = withheld = 0
    for i in range(len(index)):
        scene = make_scene(RICH, i)
        annotated = {item.name for item in scene.objects if not item.hidden_label}
        states = index.verified(i)
        shown = annotated | {above for name in annotated for above in space.ancestors(name)}
        assert set(names[states == 0]) == set(scene.unverified)
        assert set(names[states == 1]) == shown - set(scene.unverified)
        present = {item.leaf for item in scene.objects}
        assert present.isdisjoint(names[states == 2])
        unverified += (states == 0).sum()
        withheld += len(annotated & set(scene.unverified))
    assert unverified > 20 and withheld > 3


def test_with_no_label_left_nothing_is_verified(tmp_path):
    index = demo_index(tmp_path, DemoConfig(images=3, side=96, hidden_labels=1.0))
    assert index.num_boxes == 0
    assert all((index.verified(i) == 0).all() for i in range(3))


def test_it_is_made_once(tmp_path):
    config = DemoConfig(images=3, side=96)
    demo_index(tmp_path, config)
    stamp = (tmp_path / "index" / "index.json").stat().st_mtime_ns
    calls = []
    index = demo_index(tmp_path, config, progress=lambda done, total: calls.append(done))
    assert index.verified(0) is None
    assert not calls and (tmp_path / "index" / "index.json").stat().st_mtime_ns == stamp
    with pytest.raises(InputError, match="other settings"):
        demo_index(tmp_path, DemoConfig(images=4, side=96))
