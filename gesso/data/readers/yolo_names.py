"""The description of a YOLO data set: class names and places of pictures, from data.yaml, classes.txt or obj.names.

Of YAML only what these files use is understood: top-level keys with a value, and lists and number-keyed tables of
strings, in block or in bracket form.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gesso.errors import DataError

_SPLITS = ("train", "val", "valid", "test")
_OPTIONAL = ("test",)
_NAME_FILES = ("classes.txt", "obj.names", "labels/classes.txt")
_TOP = re.compile(r"^([A-Za-z_][\w-]*)\s*:\s*(.*)$")
_NULLS = ("", "~", "null", "Null", "NULL")


@dataclass(frozen=True)
class Description:
    """What a data.yaml says.

    Attributes:
        root: the folder that pictures are relative to.
        names: class number -> name, by rising number from 0.
        places: split -> folders of pictures or text files that list pictures.
    """

    root: Path
    names: Mapping[int, str]
    places: Mapping[str, list[Path]]

    @property
    def missing(self) -> dict[str, Path]:
        """Optional split -> the first of its places that does not exist: often a test set that is not given out."""
        absent = {split: [p for p in self.places.get(split, ()) if not p.exists()] for split in _OPTIONAL}
        return {split: places[0] for split, places in absent.items() if places}


def describe(path: Path) -> Description:
    """The description in ``path``, a data.yaml or a folder with classes.txt.

    Raises:
        DataError: there are no names, a class number has none, or the file cannot be read.
    """
    if path.is_file():
        return _of_yaml(path)
    for name in _NAME_FILES:
        if (path / name).is_file():
            return Description(path, _of_lines(path / name), {})
    remedy = "Write the names of the classes, one a line, into classes.txt, or give a data.yaml."
    raise DataError("the class names are missing", where=path, remedy=remedy)


def _of_lines(file: Path) -> dict[int, str]:
    """The class number is the line's, from 0 on."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").rstrip().splitlines()]
    except UnicodeDecodeError as error:
        raise DataError(f"the class names cannot be read: {error}", where=file, remedy="Save them as UTF-8.") from None
    if "" in lines:
        what = f"line {lines.index('') + 1} is blank, so the class number {lines.index('')} has no name"
        raise DataError(what, where=file, remedy="Name the class, or remove the line if the labels do not count it.")
    return dict(enumerate(lines))


def _of_yaml(path: Path) -> Description:
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except ValueError as error:
        remedy = "Write it as Ultralytics' data.yaml files are, or choose another --format."
        raise DataError(f"this YAML file cannot be read: {error}", where=path, remedy=remedy) from None
    names = values.get("names", {})
    if isinstance(names, str):
        names = {0: names}
    if sorted(names) != list(range(len(names))) or not names:
        remedy = "Write them as a list, or as 'number: name' one a line, or choose another --format."
        raise DataError("'names' should give a name to each class number from 0 on", where=path, remedy=remedy)
    root = path.parent
    base = values.get("path")
    if isinstance(base, str) and base:
        root = next((p for p in (root / base, Path(base)) if p.is_dir()), root)
    places = {}
    for split in _SPLITS:
        given = values.get(split, "")
        listed = [text for text in ([given] if isinstance(given, str) else given.values()) if text]
        if listed:
            places[split] = [_place(root, path.parent, text) for text in listed]
    return Description(root, {number: names[number] for number in range(len(names))}, places)


def _place(root: Path, folder: Path, text: str) -> Path:
    """Exporters write paths from the root, from the file, or (with a stray ../) from a neighbour of either."""
    inner = text.removeprefix("../")
    candidates = (root / text, folder / text, root / inner, folder / inner)
    return next((place for place in candidates if place.exists()), root / text)


def parse(text: str) -> dict[str, str | dict[int, str]]:
    """The top-level keys of a description; lists become tables by number. ValueError names the line at fault."""
    values: dict[str, str | dict[int, str]] = {}
    key, pending = "", ""
    for number, raw in enumerate(text.splitlines(), start=1):
        line = _without_comment(raw).rstrip()
        if pending:
            pending += " " + line.strip()
        elif not line.strip() or line in ("---", "..."):
            continue
        elif (top := _TOP.match(line)) is not None:
            key, value = top[1], top[2].strip()
            values[key] = {} if value in _NULLS else _scalar(value)
            pending = value if value[:1] in ("[", "{") else ""
        elif key and (line[0] in " -"):
            table = values[key]
            if isinstance(table, dict):
                _add_entry(table, line.strip())
            continue
        else:
            raise ValueError(f"line {number} is not understood: {line.strip()[:40]}")
        if pending and pending.endswith("]" if pending[0] == "[" else "}"):
            values[key], pending = _brackets(pending), ""
    if pending:
        raise ValueError(f"the brackets after '{key}' are not closed")
    return values


def _add_entry(table: dict[int, str], line: str) -> None:
    if line == "-" or line.startswith("- "):
        table[len(table)] = _scalar(line[1:].strip())
        return
    number, colon, value = line.partition(":")
    if colon and number.strip().strip("'\"").isdigit():
        table[int(number.strip().strip("'\""))] = _scalar(value.strip())


def _brackets(text: str) -> dict[int, str]:
    words = [w.strip() for w in re.findall(r"""(?:"(?:[^"\\]|\\.)*"|'(?:[^']|'')*'|[^,])+""", text[1:-1]) if w.strip()]
    table: dict[int, str] = {}
    for word in words:
        _add_entry(table, word if text[0] == "{" else f"- {word}")
    return table


def _scalar(text: str) -> str:
    if len(text) >= 2 and text[0] == text[-1] == '"':
        return str(json.loads(text))
    if len(text) >= 2 and text[0] == text[-1] == "'":
        return text[1:-1].replace("''", "'")
    return text


def _without_comment(line: str) -> str:
    """The line without a comment that begins outside quotation marks."""
    inside = ""
    for i, char in enumerate(line):
        if inside:
            inside = "" if char == inside else inside
        elif char in "'\"" and (i == 0 or not line[i - 1].isalnum()):
            inside = char
        elif char == "#" and (i == 0 or line[i - 1] in " \t"):
            return line[:i]
    return line
