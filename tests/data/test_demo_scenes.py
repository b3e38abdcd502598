import collections
import dataclasses

import numpy as np
import pytest

from gesso import config as trees
from gesso.data.demo_scenes import CARD, VOID, DemoConfig, demo_label_space, make_scene
from gesso.data.demo_sources import DIGIT_NAMES
from gesso.errors import ConfigError

RICH = DemoConfig(side=96, parts=True, hierarchy=True, coarse_labels=0.3, hidden_labels=0.3)


def scenes(config, count=40):
    return [make_scene(config, number) for number in range(count)]


def slow_box(mask):
    points = [(x, y) for y in range(mask.shape[0]) for x in range(mask.shape[1]) if mask[y, x]]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    return [min(xs), min(ys), max(xs) + 1, max(ys) + 1]


@pytest.mark.parametrize("config", [DemoConfig(side=96), RICH], ids=["plain", "rich"])
def test_truth_of_a_scene(config):
    names = demo_label_space(config).names
    for scene in scenes(config, 12):
        assert scene.pixels.shape == (96, 96, 3) and scene.pixels.dtype == np.uint8
        for item in scene.objects:
            assert slow_box(item.mask) == item.visible_xyxy.tolist()
            x0, y0, x1, y1 = item.xyxy
            assert 0 <= x0 <= item.visible_xyxy[0] and item.visible_xyxy[2] <= x1 <= 96
            assert 0 <= y0 <= item.visible_xyxy[1] and item.visible_xyxy[3] <= y1 <= 96
            assert 0 <= item.occluded <= config.occlusion + 1e-9
            assert abs(item.mask.sum() / item.figure.mask.sum() - (1 - item.occluded)) < 1e-9
            assert item.name in names
        # The semantic map says the class of the topmost object, or void.
        for item in scene.objects:
            inside = scene.semantic[item.mask]
            allowed = {VOID, 1 + names.index(item.leaf)}
            if item.leaf == CARD:
                allowed |= set(range(1, 11))
            assert set(inside.tolist()) <= allowed
        free = ~np.any([item.mask for item in scene.objects] or [np.zeros((96, 96), bool)], axis=0)
        assert set(scene.semantic[free].tolist()) <= {0, VOID}


@pytest.mark.parametrize("config", [DemoConfig(side=96), RICH], ids=["plain", "rich"])
def test_the_semantic_map_is_void_where_a_neighbour_has_another_owner(config):
    names = demo_label_space(config).names
    for scene in scenes(config, 4):
        owner = np.zeros((96, 96), int)
        for place, item in enumerate(scene.objects, start=1):
            owner[item.mask] = place
        codes = np.array([0, *(1 + names.index(item.leaf) for item in scene.objects)])
        padded = np.pad(owner, 1, mode="edge")
        around = [padded[dy : dy + 96, dx : dx + 96] for dy in range(3) for dx in range(3)]
        border = np.any([other != owner for other in around], axis=0)
        assert np.array_equal(scene.semantic, np.where(border, VOID, codes[owner]))
        assert not scene.objects or border.any()


def test_masks_show_what_was_painted():
    """Painting an object anew over its own scene's background changes no pixel outside its rim."""
    for scene in scenes(DemoConfig(side=96), 10):
        changed = np.abs(scene.pixels.astype(int) - scene.background).max(-1)
        for item in scene.objects:
            assert np.median(changed[item.mask]) > 25
        for one, other in zip(scene.objects, scene.objects[1:], strict=False):
            assert not (one.mask & other.mask).any()


def test_a_scene_depends_on_its_number_alone():
    few, many = DemoConfig(images=3), DemoConfig(images=9000)
    assert np.array_equal(make_scene(few, 2).pixels, make_scene(many, 2).pixels)
    assert not np.array_equal(make_scene(few, 2).pixels, make_scene(few, 1).pixels)
    for change in ({"seed": 1}, {"split": "val"}):
        other = make_scene(dataclasses.replace(few, **change), 2)
        assert not np.array_equal(make_scene(few, 2).pixels, other.pixels)


def test_labels_change_no_pixel():
    plain = DemoConfig(side=96)
    marked = DemoConfig(side=96, hierarchy=True, coarse_labels=1.0, hidden_labels=0.5)
    for number in range(8):
        a, b = make_scene(plain, number), make_scene(marked, number)
        assert np.array_equal(a.pixels, b.pixels)
        assert [item.leaf for item in a.objects] == [item.leaf for item in b.objects]
        assert {item.name for item in b.objects} <= {"even", "odd"}
        assert a.unverified == () and not any(item.hidden_label for item in a.objects)


def test_hidden_labels_are_unverified_and_so_are_absent_classes():
    config = DemoConfig(side=96, hidden_labels=0.4)
    hidden = total = absent_unverified = absent = 0
    for scene in scenes(config, 150):
        present = {item.name for item in scene.objects}
        for item in scene.objects:
            total += 1
            hidden += item.hidden_label
            assert not item.hidden_label or item.name in scene.unverified
        absent += 10 - len(present)
        absent_unverified += len(set(scene.unverified) - present)
    assert abs(hidden / total - 0.4) < 0.08
    assert abs(absent_unverified / absent - 0.4) < 0.06


def test_long_tail():
    def counts(exponent):
        config = DemoConfig(side=96, long_tail=exponent, occlusion=0.9)
        found = collections.Counter(item.leaf for scene in scenes(config, 200) for item in scene.objects)
        return np.array([found[name] for name in DIGIT_NAMES]) / found.total()

    flat, tail = counts(0.0), counts(1.5)
    assert np.abs(flat - 0.1).max() < 0.05
    expected = (1.0 + np.arange(10)) ** -1.5
    assert np.abs(tail - expected / expected.sum()).max() < 0.06


def test_number_and_size_of_objects():
    config = DemoConfig(side=192, objects=(2, 4), scale=(0.15, 0.3))
    found = scenes(config, 40)
    assert {len(scene.objects) for scene in found} <= {1, 2, 3, 4}
    sizes = np.array([max(o.xyxy[2] - o.xyxy[0], o.xyxy[3] - o.xyxy[1]) for s in found for o in s.objects]) / 192
    assert sizes.min() > 0.13 and sizes.max() < 0.33
    assert make_scene(DemoConfig(side=96, objects=(0, 0)), 0).objects == ()


def test_occlusion_can_be_switched_off():
    for scene in scenes(DemoConfig(side=96, occlusion=0.0, crowding=1.0), 30):
        assert all(item.occluded == 0 for item in scene.objects)
    shares = [item.occluded for scene in scenes(DemoConfig(side=96, crowding=1.0), 30) for item in scene.objects]
    assert max(shares) > 0.3
    assert np.mean(np.array(shares) > 0.02) > 0.25


def test_parts_stand_on_their_whole():
    config = DemoConfig(side=96, parts=True)
    space = demo_label_space(config)
    on_card = digits = 0
    for scene in scenes(config):
        for item in scene.objects:
            digits += item.leaf != CARD
            if item.whole is not None:
                on_card += 1
                whole = scene.objects[item.whole]
                assert (whole.leaf, item.leaf) in space.parts
                assert (item.mask & whole.mask).sum() >= 0.97 * item.mask.sum()
    assert 0.2 < on_card / digits < 0.7


def test_hierarchy():
    space = demo_label_space(DemoConfig(hierarchy=True))
    assert space.ancestors("seven") == {"odd", "digit"}
    assert space.ancestors("even") == {"digit"}
    assert len(space) == 13
    assert demo_label_space(DemoConfig()).supercategories[:2] == ("even", "odd")


def test_config_survives_storage_and_checks_ranges():
    assert trees.from_dict(DemoConfig, trees.to_dict(RICH)) == RICH
    for wrong in (
        {"images": 0},
        {"side": 8},
        {"objects": (3, 2)},
        {"scale": (0.0, 0.3)},
        {"scale": (0.12, 0.9)},
        {"side": 32},
        {"long_tail": -1.0},
        {"hidden_labels": 1.5},
        {"occlusion": 1.0},
        {"coarse_labels": 0.5},
    ):
        with pytest.raises(ConfigError):
            DemoConfig(**wrong)
