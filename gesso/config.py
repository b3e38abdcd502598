"""Trees of frozen, typed dataclasses: to JSON and back, compared, hashed, changed at a dotted key.

A recipe returns such a tree (``run.RunConfig``); each part of it stands beside the code that it configures. Only
dataclasses, ``str int float bool None``, paths, enums-by-Literal, tuples and string-keyed mappings may stand in it.
A field whose type is a union of dataclasses is stored with the class name under ``"type"``.
"""

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from gesso.errors import ConfigError, nearest

T = TypeVar("T")


def to_dict(config: Any) -> Any:
    """The JSON-able form of a configuration tree: every dataclass a dictionary with its class name under ``type``."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
        return {"type": type(config).__name__, **fields}
    if isinstance(config, (tuple, list)):
        return [to_dict(value) for value in config]
    if isinstance(config, Mapping):
        return {str(key): to_dict(value) for key, value in config.items()}
    if isinstance(config, Path):
        return str(config)
    return config


def from_dict(cls: type[T], data: Any) -> T:
    """Builds ``cls`` from the form that ``to_dict`` gives.

    Raises:
        ConfigError: a key is unknown (the nearest is named) or missing, or a value has the wrong type; the message
            holds the dotted key.
    """
    return typing.cast(T, _build(cls, data, key=""))


def digest(config: Any) -> str:
    """The first 16 hex digits of the SHA-256 of the tree's canonical JSON form."""
    text = json.dumps(_canonical(to_dict(config)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _canonical(value: Any) -> Any:
    """2.0 is written as 2, so that a recipe that says ``rate=2`` hashes as its stored form does."""
    if isinstance(value, dict):
        return {key: _canonical(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_canonical(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def flatten(config: Any) -> dict[str, Any]:
    """The leaves of the tree by dotted key, in order: ``{"training.steps": 12, ...}``."""
    leaves: dict[str, Any] = {}

    def walk(value: Any, key: str) -> None:
        if isinstance(value, Mapping) and value:
            for name, inner in value.items():
                walk(inner, f"{key}.{name}" if key else str(name))
        else:
            leaves[key] = value

    walk(to_dict(config), "")
    return leaves


def differences(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """The dotted keys at which two trees differ, each with both values (None where a side has no such key)."""
    a, b = flatten(old), flatten(new)
    return {key: (a.get(key), b.get(key)) for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)}


def replace_at(config: T, key: str, value: Any) -> T:
    """A copy of the tree with the field at the dotted ``key`` set to ``value``. An unknown key raises ConfigError."""
    head, _, rest = key.partition(".")
    names = [f.name for f in dataclasses.fields(config)]  # type: ignore[arg-type]
    if head not in names:
        raise ConfigError(f"unknown key '{key}'", remedy=nearest(head, names))
    inner = replace_at(getattr(config, head), rest, value) if rest else value
    return dataclasses.replace(config, **{head: inner})  # type: ignore[type-var]


def _build(kind: Any, data: Any, *, key: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return data
    if origin in (typing.Union, types.UnionType):
        return _build_union(args, data, key=key)
    if origin is typing.Literal:
        if data not in args:
            raise ConfigError(f"{key}: '{data}' is not allowed", remedy=nearest(str(data), [str(a) for a in args]))
        return data
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(typing.cast(type, kind), data, key=key)
    if origin is tuple:
        if not isinstance(data, (list, tuple)):
            raise ConfigError(f"{key}: expected a list, found {data!r}")
        kinds = [args[0]] * len(data) if len(args) == 2 and args[1] is Ellipsis else list(args)
        if len(kinds) != len(data):
            raise ConfigError(f"{key}: expected {len(kinds)} values, found {len(data)}")
        return tuple(_build(k, v, key=f"{key}[{i}]") for i, (k, v) in enumerate(zip(kinds, data, strict=True)))
    if origin in (dict, Mapping):
        return {name: _build(args[1], value, key=f"{key}.{name}") for name, value in data.items()}
    return _build_leaf(kind, data, key=key)


def _build_leaf(kind: Any, data: Any, *, key: str) -> Any:
    if kind is type(None) and data is None:
        return None
    if kind is Path and isinstance(data, (str, Path)):
        return Path(data)
    if kind is float and isinstance(data, (int, float)) and not isinstance(data, bool):
        return float(data)
    if isinstance(kind, type) and isinstance(data, kind) and (kind is bool or not isinstance(data, bool)):
        return data
    raise ConfigError(f"{key}: expected {getattr(kind, '__name__', kind)}, found {data!r}")


def _build_union(args: tuple[Any, ...], data: Any, *, key: str) -> Any:
    if isinstance(data, Mapping) and "type" in data:
        known = {a.__name__: a for a in args if dataclasses.is_dataclass(a) and isinstance(a, type)}
        if data["type"] not in known:
            raise ConfigError(f"{key}: unknown type '{data['type']}'", remedy=nearest(str(data["type"]), known))
        return _build(known[data["type"]], data, key=key)
    for kind in args:
        try:
            return _build(kind, data, key=key)
        except ConfigError:
            continue
    names = " or ".join("null" if a is type(None) else getattr(a, "__name__", str(a)) for a in args)
    raise ConfigError(f"{key}: expected {names}, found {data!r}")


def _build_dataclass(cls: type, data: Any, *, key: str) -> Any:
    if not isinstance(data, Mapping):
        raise ConfigError(f"{key or 'the configuration'}: expected keys of {cls.__name__}, found {data!r}")
    kinds = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for name, value in data.items():
        inner = f"{key}.{name}" if key else str(name)
        if name == "type" and name not in fields:
            continue
        if name not in fields:
            raise ConfigError(f"unknown key '{inner}'", remedy=nearest(str(name), fields))
        values[name] = _build(kinds[name], value, key=inner)
    for name, spec in fields.items():
        required = spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigError(f"the key '{f'{key}.' if key else ''}{name}' is missing")
    return cls(**values)
