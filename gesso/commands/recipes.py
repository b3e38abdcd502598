"""``gesso recipes`` and ``gesso config RECIPE``."""

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from tyro.conf import Positional

from gesso.commands.parsing import Result, option_value, parse, table
from gesso.config import digest, flatten, from_dict, to_dict
from gesso.errors import GessoError
from gesso.models.build import ModelConfig
from gesso.recipes.catalog import Recipe, all_recipes, make_config
from gesso.run.config import RunConfig
from gesso.run.models import new_model


@dataclass(frozen=True)
class RecipesArguments:
    """Lists the recipes that come with Gesso."""

    check: bool = False
    """Build each one's configuration and detector; exit code 1 if one fails."""
    json: bool = False
    """Print JSON."""


def recipes(words: list[str]) -> Result:
    """``gesso recipes``."""
    given = parse(RecipesArguments, words, "recipes")
    rows = []
    built: set[ModelConfig] = set()
    for name, recipe in all_recipes().items():
        line = (inspect.getdoc(recipe) or "").splitlines()[0]
        rows.append((name, *([_check(recipe, built)] if given.check else []), line))
    columns = ("recipe", *(["check"] if given.check else []), "what it does")
    failed = given.check and any(row[1] != "ok" for row in rows)
    data = [
        dict(zip(("recipe", "check", "text") if given.check else ("recipe", "text"), row, strict=True)) for row in rows
    ]
    return Result(table(columns, rows), data if given.json else None, 1 if failed else 0)


def _check(recipe: Recipe, built: set[ModelConfig]) -> str:
    """What is wrong with a recipe, or ok; each detector is built once, without a download."""
    try:
        config = recipe()
        same = digest(from_dict(RunConfig, to_dict(config))) == digest(config)
        if config.model not in built:
            new_model(config, 2, pretrained=False)
            built.add(config.model)
    except GessoError as error:
        return str(error)
    return "ok" if same else "does not survive being stored"


@dataclass(frozen=True)
class ConfigArguments:
    """Prints every setting of a recipe, with the changes that are given as options."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    json: bool = False
    """Print JSON."""


def config(words: list[str]) -> Result:
    """``gesso config RECIPE``."""
    name, rest = recipe_name(words, "config")
    start = ConfigArguments(config=steps_before_epochs(make_config(name), rest))
    given = parse(ConfigArguments, rest, f"config {name}", default=start, known=option_names(start.config))
    text = table(("setting", "value"), [(key, str(value)) for key, value in flatten(given.config).items()])
    return Result(text, to_dict(given.config) if given.json else None)


def recipe_name(words: list[str], command: str) -> tuple[str, list[str]]:
    """The recipe's name, which stands first, and the other words."""
    if words and not words[0].startswith("-"):
        return words[0], words[1:]
    position = parse(_RecipeName, [word for word in words if word in ("-h", "--help")], command)
    return position.recipe, words


@dataclass(frozen=True)
class _RecipeName:
    """Takes the name of a recipe, then options; gesso recipes lists them, COMMAND RECIPE --help the options."""

    recipe: Positional[str]
    """For example demo:direct."""


def steps_before_epochs(config: RunConfig, words: list[str]) -> RunConfig:
    """The recipe's configuration without what the ``words`` replace: they say how long a stage is in another way."""
    changed: dict[str, Any] = {
        name: dataclasses.replace(stage, epochs=None, images=None)
        for name, stage in config.stages()
        if any(option_value(words, f"--{name}.{way}") is not None for way in ("steps", "epochs", "images"))
    }
    return dataclasses.replace(config, **changed)


def option_names(config: RunConfig) -> list[str]:
    """The options of a configuration as they are written on the command line."""
    return [key.replace("_", "-") for key in flatten(config) if not key.endswith("type")]
