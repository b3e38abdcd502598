"""Every recipe is whole: it can be stored, and its detector and input fit together."""

import dataclasses
import functools
import re

import pytest

from gesso import config as configs
from gesso.errors import ConfigError
from gesso.models.build import ModelConfig
from gesso.recipes.catalog import all_recipes, find_recipe, make_config
from gesso.recipes.debug import tiny
from gesso.run.config import RunConfig
from gesso.run.models import new_model
from gesso.training.schedule import rate_factor

NAMES = sorted(all_recipes())


def test_the_promised_recipes_are_there():
    assert {"debug:tiny", "demo:direct", "demo:scratch", "direct:small", "classify:small", "segment:small"} <= set(
        NAMES
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_can_be_stored_and_read_back(name):
    config = find_recipe(name)()
    assert isinstance(config, RunConfig)
    assert configs.from_dict(RunConfig, configs.to_dict(config)) == config
    assert find_recipe(name)() == config, "a recipe is a pure function"


@functools.cache
def built(model: ModelConfig) -> bool:
    new_model(dataclasses.replace(tiny(), model=model), 3, pretrained=False)
    return True


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_makes_sense(name):
    config = find_recipe(name)()
    assert built(config.model)
    for _, stage in config.stages():
        assert stage.schedule.warmup_steps < stage.steps
        scale = stage.batch_size / (stage.schedule.base_images or stage.batch_size)
        looked_at = range(0, stage.steps, max(stage.steps // 1000, 1))
        rates = [rate_factor(stage.schedule, step, stage.steps, stage.batch_size) / scale for step in looked_at]
        assert min(rates) > 0 and 0.9 < max(rates) <= 1
        assert stage.checkpoint_every <= stage.steps, "a crash must not cost the whole stage"


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_names_its_source(name):
    assert (find_recipe(name).__doc__ or "").strip()


def test_tiny_is_what_the_tests_rely_on():
    config = tiny()
    assert (config.training.batch_size, config.training.norm.kind) == (8, "sync")
    assert (config.training.log_every, config.training.checkpoint_every, config.training.steps) == (1, 4, 12)


def test_arms_of_the_demo_differ_in_training_alone():
    direct, scratch = find_recipe("demo:direct")(), find_recipe("demo:scratch")()
    changed = {re.split(r"\.", key)[0] for key in configs.differences(direct, scratch)}
    assert changed <= {"pretraining", "training"} and direct.seed == scratch.seed
    assert direct.pretraining is not None and scratch.pretraining is None
    assert direct.training.norm.kind == "fixed" and direct.training.input == scratch.training.input


@pytest.mark.parametrize(
    ("name", "hint"),
    [("demo:dirct", "demo:direct"), ("debug:tinny", "debug:tiny"), ("nonsense", "Known|mean"), ("a:b:c", "no recipe")]
    + [(name, "no recipe") for name in (":", ":tiny", ".x:y", "..x.z:y", ".:y")],
)
def test_a_misspelt_recipe_gets_a_hint(name, hint):
    with pytest.raises(ConfigError, match=hint):
        find_recipe(name)


def test_a_recipe_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").touch()
    (tmp_path / "mine" / "cats.py").write_text(
        "from gesso.recipes.debug import tiny\nfrom gesso.run.config import RunConfig\n\n\n"
        "def small() -> RunConfig:\n    return tiny()\n\n\ndef helper(steps: int) -> RunConfig:\n    return tiny()\n"
    )
    (tmp_path / "mine" / "broken.py").write_text("import no_such_module_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_recipe("mine.cats:small")() == tiny()
    for wrong, why in (
        ("mine.cats:smal", "small"),
        ("mine.cats:tiny", "is a function, but no recipe"),
        ("mine.cats:helper", "is a function, but no recipe"),
        ("mine.broken:x", "no_such_module_at_all"),
        ("mine.gone:x", "cannot be imported"),
    ):
        with pytest.raises(ConfigError, match=why):
            find_recipe(wrong)


def test_a_recipe_with_a_syntax_error_is_told_in_one_line(tmp_path, monkeypatch):
    """Found in the working folder, as ``python -m`` would."""
    (tmp_path / "brokenrecipes.py").write_text("def mine(:\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"'brokenrecipes:mine' cannot be imported: .*line 1"):
        find_recipe("brokenrecipes:mine")


def test_a_recipe_that_fails_says_where(tmp_path, monkeypatch):
    (tmp_path / "own_failing.py").write_text(
        "from gesso.run.config import RunConfig\n\n\ndef broken() -> RunConfig:\n    raise ValueError('oops')\n\n\n"
        "def bare():\n    return None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"own_failing.py:5.*'own_failing:broken' fails: ValueError: oops"):
        make_config("own_failing:broken")
    with pytest.raises(ConfigError, match="is a function, but no recipe"):
        make_config("own_failing:bare")
