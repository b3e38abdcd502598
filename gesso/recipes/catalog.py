"""Finds recipes by name: ``module:function`` in ``gesso.recipes``, or a dotted path of the user's own.

A recipe is a function without arguments that returns a ``RunConfig``. There is no registry: a function in a file is
enough.
"""

import importlib
import importlib.util
import inspect
import pkgutil
import sys
import traceback
from collections.abc import Callable
from types import ModuleType

from gesso import recipes
from gesso.errors import ConfigError, GessoError, nearest
from gesso.run.config import RunConfig

Recipe = Callable[[], RunConfig]


def all_recipes() -> dict[str, Recipe]:
    """Every recipe that comes with Gesso, by its name ``module:function``, sorted."""
    found: dict[str, Recipe] = {}
    for info in pkgutil.iter_modules(recipes.__path__):
        module = importlib.import_module(f"{recipes.__name__}.{info.name}")
        found |= {f"{info.name}:{name}": function for name, function in _recipes_of(module).items()}
    return dict(sorted(found.items()))


def find_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ConfigError: there is none; the nearest names are given. A user's module that cannot be imported is named too.
    """
    known = all_recipes()
    if name in known:
        return known[name]
    if "" not in sys.path:
        sys.path.insert(0, "")  # the user's own modules, which an installed program does not see by itself
    module_name, colon, function = name.partition(":")
    nowhere = not module_name or module_name.startswith(".")
    if not colon or nowhere or ("." not in module_name and importlib.util.find_spec(module_name) is None):
        raise ConfigError(f"there is no recipe '{name}'", remedy=nearest(name, known))
    try:
        module = importlib.import_module(module_name)
    except (ImportError, SyntaxError) as error:
        raise ConfigError(
            f"the recipe '{name}' cannot be imported: {error}", remedy="Check the dotted path."
        ) from error
    own = _recipes_of(module)
    if function not in own:
        if inspect.isfunction(getattr(module, function, None)):
            raise ConfigError(
                f"{name} is a function, but no recipe",
                remedy="A recipe takes no arguments, and its return annotation is RunConfig: def name() -> RunConfig.",
            )
        raise ConfigError(f"{module_name} has no recipe '{function}'", remedy=nearest(function, own))
    return own[function]


def make_config(name: str) -> RunConfig:
    """What the recipe of that name returns.

    Raises:
        ConfigError: there is none, or it fails; the message holds the place.
    """
    recipe = find_recipe(name)
    try:
        return recipe()
    except GessoError:
        raise
    except Exception as error:  # a user's code may raise anything
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"the recipe '{name}' fails: {type(error).__name__}: {error}",
            where=f"{place.filename}:{place.lineno}",
            remedy="Mend it there.",
        ) from error


def _recipes_of(module: ModuleType) -> dict[str, Recipe]:
    """Public functions of the module's own whose return annotation is RunConfig."""
    return {
        name: function
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if not name.startswith("_")
        and function.__module__ == module.__name__
        and inspect.signature(function).return_annotation in (RunConfig, "RunConfig")
        and not inspect.signature(function).parameters
    }
