"""One self-contained HTML page from plain data: text, figures of merit, tables, plots, and pictures with boxes.

The page needs no network and no script: styles are inline, plots are inline SVG, pictures are data URIs, and a content
security policy in it forbids everything else. It follows the reader's light or dark setting, prints, and scrolls wide
tables inside their own frame.
"""

import base64
import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from gesso.files import write_text

Cell: TypeAlias = str | int | float | None
MarkKind: TypeAlias = Literal["truth", "right", "wrong", "missed", "ignored"]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A number that the reader should see first: ``value`` in large type, ``label`` above, ``note`` below it."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Text:
    """Paragraphs, and commands to copy, under a title."""

    title: str
    paragraphs: tuple[str, ...] = ()
    commands: tuple[tuple[str, str], ...] = ()
    """(what it does, the command line)"""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table; floats are written with three decimals, None as a dash. The first column names the row."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    best: tuple[tuple[int, int], ...] = ()
    """(row, column) of the cells to set in bold."""
    folded: bool = False
    """Shows the title alone until the reader opens it."""

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), f"a row of '{self.title}' has another length"


@dataclass(frozen=True, kw_only=True)
class Plot:
    """An SVG of ``plots.py`` with a ``caption``; ``alt`` says in words what it shows, for those who cannot see it."""

    svg: str
    caption: str
    alt: str


@dataclass(frozen=True, kw_only=True)
class Plots:
    """Plots side by side, one below the other on a narrow screen."""

    title: str
    plots: tuple[Plot, ...]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A box on a picture: ``xyxy`` in its pixels. ``score`` is written behind the label where there is one.

    ``outline`` holds the borders of its mask, closed rings of x, y in pixels, filled by the even-odd rule.
    """

    xyxy: tuple[float, float, float, float]
    label: str
    score: float | None = None
    kind: MarkKind = "truth"
    outline: tuple[tuple[tuple[float, float], ...], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Exhibit:
    """One picture, uint8 (H, W, 3) RGB, shown once for each column of the gallery with that column's marks."""

    pixels: npt.NDArray[np.uint8]
    caption: str
    marks: tuple[tuple[Mark, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Pictures in rows; the columns say what is drawn on them (ground truth, one detector, another)."""

    title: str
    columns: tuple[str, ...]
    exhibits: tuple[Exhibit, ...]
    note: str = ""

    def __post_init__(self) -> None:
        assert all(len(e.marks) == len(self.columns) for e in self.exhibits), "one tuple of marks for each column"


Section: TypeAlias = Text | Table | Plots | Gallery


@dataclass(frozen=True, kw_only=True)
class Report:
    """A page. ``summary`` is the answer in a sentence or two; ``hedge`` says how far to trust it."""

    title: str
    summary: str
    hedge: str = ""
    figures: tuple[Figure, ...] = ()
    sections: tuple[Section, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Shown folded, as a table of keys and values."""
    footer: str = ""


def write_report(path: Path, report: Report) -> Path:
    """Writes the page as one file, whole or not at all. Returns ``path``.

    Raises:
        InputError: the file cannot be written.
    """
    write_text(path, render_report(report))
    return path


def render_report(report: Report) -> str:
    """The page as text; the same report gives the same text."""
    return _ENVIRONMENT.get_template("report.html").render(report=report)


def format_cell(value: Cell) -> str:
    """The text of a table's cell: 0.297, 5,136, a dash for None and for what is not finite."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3f}"
    return value


def _is_numeric(value: Cell) -> bool:
    """Whether a cell is set to the right: a number, a dash, or a text that begins as a number ("2.0 min")."""
    if isinstance(value, str):
        return re.match(r"[+−-]?\d", value) is not None
    return not isinstance(value, bool)


def _data_uri(pixels: npt.NDArray[np.uint8]) -> str:
    """A JPEG of the picture; of a long side above 640 pixels a smaller one."""
    image = Image.fromarray(pixels)
    image.thumbnail((640, 640))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _mark_text(mark: Mark) -> str:
    return mark.label if mark.score is None else f"{mark.label} {mark.score:.2f}"


def _alt(exhibit: Exhibit, column: int, heading: str) -> str:
    """What stands on a picture, in words."""
    marks = exhibit.marks[column]
    named = ", ".join(f"{_mark_text(m)} ({m.kind})" if m.kind != "truth" else _mark_text(m) for m in marks[:12])
    rest = f" and {len(marks) - 12} more" if len(marks) > 12 else ""
    return f"{exhibit.caption}, {heading}: {named or 'no box'}{rest}"


def _place(mark: Mark, width: int, height: int) -> dict[str, float]:
    """Where the box and its label go in the picture's pixels: the label above the box, or inside where no room is."""
    x0, y0, x1, y1 = mark.xyxy
    size = max(width, height) * 0.046
    text_width = len(_mark_text(mark)) * size * 0.56
    return {
        "x": round(x0, 2),
        "y": round(y0, 2),
        "width": round(max(x1 - x0, 0), 2),
        "height": round(max(y1 - y0, 0), 2),
        "text_x": round(min(max(x0, 0), max(width - text_width, 0)), 2),
        "text_y": round(y0 - size * 0.3 if y0 > size * 1.3 else min(y1 + size, height - size * 0.3), 2),
    }


def _path(mark: Mark) -> str:
    """The outline as the ``d`` of an SVG path."""
    return "".join("M" + " ".join(f"{x:.1f},{y:.1f}" for x, y in ring) + "Z" for ring in mark.outline)


def _shows_ignored(gallery: Gallery) -> bool:
    return any(m.kind == "ignored" for exhibit in gallery.exhibits for marks in exhibit.marks for m in marks)


def _kind(section: Section) -> str:
    return type(section).__name__.lower()


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("gesso.reports", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        cell=format_cell,
        data_uri=_data_uri,
        mark_text=_mark_text,
        kind=_kind,
        shows_ignored=_shows_ignored,
        path=_path,
        svg=Markup,  # plots.py escapes its words
    )
    environment.tests["numeric"] = _is_numeric
    environment.globals.update(alt=_alt, place=_place)
    return environment


_ENVIRONMENT = _environment()
