from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from gesso import config
from gesso.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Square:
    side: int = 4


@dataclass(frozen=True, kw_only=True)
class Circle:
    radius: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Inner:
    steps: int = 10
    kind: Literal["a", "b"] = "a"
    sides: tuple[int, ...] = (1, 2)
    where: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    shape: Square | Circle = field(default_factory=Square)
    inner: Inner = field(default_factory=Inner)
    extra: Inner | None = None


def test_round_trip_keeps_types():
    tree = Outer(name="x", shape=Circle(radius=2), inner=Inner(where=Path("a/b"), sides=(3,)), extra=Inner(kind="b"))
    back = config.from_dict(Outer, config.to_dict(tree))
    assert back == tree and isinstance(back.inner.where, Path) and isinstance(back.shape, Circle)
    assert config.digest(back) == config.digest(tree)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"name": "x", "iner": {}}, ["unknown key 'iner'", "'inner'"]),
        ({"name": "x", "inner": {"step": 1}}, ["unknown key 'inner.step'", "'steps'"]),
        ({"inner": {}}, ["'name' is missing"]),
        ({"name": "x", "inner": {"steps": "many"}}, ["inner.steps", "int", "'many'"]),
        ({"name": "x", "inner": {"steps": True}}, ["inner.steps", "int"]),
        ({"name": "x", "inner": {"kind": "c"}}, ["inner.kind", "'c'"]),
        ({"name": "x", "inner": {"sides": [1, "b"]}}, ["inner.sides[1]"]),
        ({"name": "x", "shape": {"type": "Sqare"}}, ["shape", "'Square'"]),
        (7, ["Outer"]),
    ],
)
def test_mistakes_are_named_with_their_key(data, words):
    with pytest.raises(ConfigError) as caught:
        config.from_dict(Outer, data)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_differences_and_digest():
    old = Outer(name="x")
    new = config.replace_at(old, "inner.steps", 11)
    assert config.differences(old, new) == {"inner.steps": (10, 11)}
    assert config.differences(old, Outer(name="x")) == {}
    assert config.digest(old) != config.digest(new)
    assert config.flatten(new)["inner.steps"] == 11


def test_replace_at_names_the_nearest_key():
    with pytest.raises(ConfigError, match="'steps'"):
        config.replace_at(Outer(name="x"), "inner.stps", 1)
