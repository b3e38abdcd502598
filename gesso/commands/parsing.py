"""What all commands share: from words to a dataclass, from a result to text.

A command is a function ``(words) -> Result``; it parses its words into a frozen dataclass whose docstrings are the
help. Only ``cli.py`` prints.
"""

import contextlib
import dataclasses
import io
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, get_args, get_type_hints

import tyro

from gesso.errors import ConfigError, nearest

T = TypeVar("T")
_MASK = "mask_"
"""Begins the keys of the scores of masks."""
_POSITIONAL = get_args(tyro.conf.Positional[str])[1]


@dataclass(frozen=True)
class Result:
    """What a command found: ``text`` for people; ``data`` instead of it, as JSON, where --json was given."""

    text: str
    data: Any = None
    exit_code: int = 0


def parse(kind: type[T], words: Sequence[str], name: str, *, default: T | None = None, known: Sequence[str] = ()) -> T:
    """Parses ``words`` into the dataclass ``kind``; tyro's boxed errors become one-line ConfigErrors.

    Args:
        kind: the dataclass.
        words: what stands behind the command's name.
        name: the command's name, for messages.
        default: an instance whose values are the defaults.
        known: options beside the fields of ``kind``, to name the nearest of a misspelt one.
    """
    caught = io.StringIO()
    arguments: dict[str, Any] = {"args": list(words), "prog": f"gesso {name}", "return_unknown_args": True}
    if default is not None:
        arguments["default"] = default
    try:
        with contextlib.redirect_stderr(caught):
            value, unknown = tyro.cli(kind, config=(tyro.conf.AvoidSubcommands,), **arguments)
    except SystemExit as leave:
        if not leave.code:
            raise
        raise _mistake(caught.getvalue(), words, kind, name, known) from None
    if unknown:
        raise _unknown(unknown[0], kind, name, known)
    return value  # type: ignore[no-any-return]


def option_value(words: Sequence[str], option: str) -> str | None:
    """The value behind ``option`` in words that are not parsed yet: ``--out RUN`` or ``--out=RUN``; the last counts."""
    found = [value for word, value in itertools.pairwise(words) if word == option]
    found += [word.removeprefix(f"{option}=") for word in words if word.startswith(f"{option}=")]
    return found[-1] if found else None


def _unknown(word: str, kind: type[Any], name: str, known: Sequence[str]) -> ConfigError:
    """The error for an option or argument that the command does not have."""
    if not word.startswith("-"):
        return ConfigError(f"gesso {name} does not take the argument '{word}'", remedy=f"See gesso {name} --help.")
    option = word.split("=")[0]
    close = nearest(option.lstrip("-").replace("_", "-"), _options(kind, known))
    return ConfigError(f"unknown option '{option}' of gesso {name}", remedy=re.sub("'([^' ]+)'", r"'--\1'", close))


def _options(kind: type[Any], known: Sequence[str]) -> list[str]:
    """The names of the options, without dashes: ``known``, and the fields that are neither positional nor a tree."""
    found = list(known)
    for name, hint in get_type_hints(kind, include_extras=True).items():
        inner, *marks = get_args(hint) or (hint,)
        if not dataclasses.is_dataclass(inner) and _POSITIONAL not in marks:
            found.append(name.replace("_", "-"))
    return found


def _mistake(boxed: str, words: Sequence[str], kind: type[Any], name: str, known: Sequence[str]) -> ConfigError:
    """A boxed error as one line; a misspelt option goes before what is missing because of it."""
    options = {form for option in _options(kind, known) for form in (option, _negated(option))} | {"help"}
    for word in words:
        if word.startswith("--") and word[2:].split("=")[0].replace("_", "-") not in options:
            return _unknown(word, kind, name, known)
    lines = [line.strip("│╭╮╰╯─") for line in boxed.splitlines()]
    inner = " ".join(line for line in lines if not line.lstrip().startswith("For full helptext"))
    text = " ".join(re.sub("[─-]{3,}", " ", inner).split())
    see = f"See gesso {name} --help."
    if choice := re.search(r"invalid choice '(.*?)' for argument '(.*?)'. Expected one of \((.*?)\)", text):
        value, option, allowed = choice.groups()
        remedy = nearest(value, re.findall(r"'(.*?)'", allowed))
        return ConfigError(f"{option} of gesso {name} cannot be '{value}'", remedy=remedy)
    if "Missing from" in text:
        return ConfigError(f"gesso {name} needs {_missing(lines)}", remedy=see)
    if lacking := re.search(r"Missing value for argument '(.*?)'", text):
        return ConfigError(f"a value is missing behind {lacking[1]} of gesso {name}", remedy=see)
    if wrong := re.search(r"Error parsing (\S+): .*?Argument helptext: \S+ (.*?) .*", text):
        option, expected = wrong[1], wrong[2].removeprefix("{None}|")
        given = re.search(r"'([^']*)'\]?\.?(?= Got errors| Argument helptext)", text)
        found = f", found '{given[1]}'" if given else ""
        return ConfigError(f"{option} of gesso {name} takes {expected}{found}", remedy=see)
    return ConfigError(text.split("Argument helptext")[0] or "the call cannot be understood", remedy=see)


def _missing(lines: Sequence[str]) -> str:
    """The required arguments in a boxed error: how each is written, and in brackets what it is."""
    first = next(i for i, line in enumerate(lines) if "Missing from" in line) + 1
    last = next(i for i, line in enumerate(lines) if "For full helptext" in line)
    inner = [line for line in lines[first:last] if line.strip(" -─")]
    indents = [len(line) - len(line.lstrip()) for line in inner]
    found = ""
    for line, indent in zip(inner, indents, strict=True):
        found += f"; {line.strip()}:" if indent == indents[0] else f" {line.strip()}"
    return found.removeprefix("; ").replace(". (required)", "")


def _negated(option: str) -> str:
    head, dot, last = option.rpartition(".")
    return f"{head}{dot}no-{last}"


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Plain text columns: the first left-aligned, the others right-aligned; text in the last one is left-aligned."""
    cells = [list(columns), *([cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    left = {0} | ({len(columns) - 1} if any(isinstance(row[-1], str) for row in rows) else set())
    lines = [
        "  ".join(
            c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def cell(value: object) -> str:
    """A value as a table shows it: floats with three decimals, a dash for what does not exist (None, -1, NaN)."""
    if isinstance(value, float):
        return "-" if value == -1 or value != value else f"{value:.3f}"
    return "-" if value is None else str(value)


def scores_text(scores: dict[str, Any]) -> str:
    """The scores, those of masks beside those of boxes where there are any, and the first of each class: two tables."""
    numbers = {key: value for key, value in scores.items() if isinstance(value, float)}
    masks = {key.removeprefix(_MASK): numbers.pop(key) for key in list(numbers) if key.startswith(_MASK)}
    columns = ("score", "boxes", "masks") if masks else ("score", "value")
    rows = [(key, value, *([masks.get(key)] if masks else [])) for key, value in numbers.items()]
    totals = table(columns, rows)
    classes = sorted(scores["by_class"].items(), key=lambda item: -item[1])
    return f"{totals}\n\n{table(('class', next(iter(numbers)).removeprefix('m')), classes)}"
