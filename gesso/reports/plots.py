"""Plots as SVG text, drawn by matplotlib without its global state (no pyplot), for pages that are light or dark.

Colours are CSS variables of the page: ink is ``currentColor``, lines of the grid ``var(--line)``, series
``var(--series-1)`` to ``var(--series-4)`` (orange, blue, green, purple: told apart by all common kinds of colour
vision); series differ in their dashes or hatches as well. Text stays text.
"""

import io
import math
import re
import unicodedata
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# matplotlib must be given real colours: these are exchanged for the page's variables afterwards.
_INK, _LINE = "#010203", "#020304"
_SERIES = ("#030405", "#040506", "#050607", "#060708")
_VARIABLES = {
    _INK: "currentColor",
    _LINE: "var(--line, #ddd)",
    _SERIES[0]: "var(--series-1, #b35a1f)",
    _SERIES[1]: "var(--series-2, #1f5fa8)",
    _SERIES[2]: "var(--series-3, #4d7d3a)",
    _SERIES[3]: "var(--series-4, #7d4e97)",
}
_CATEGORY, _LEGEND, _HALF_LEGEND = 26, 40, 20  # columns of text that have room
_DASHES = ("-", (0, (6, 1.5)), (0, (1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5)))
_STYLE: Any = {  # matplotlib types its keys as one long Literal
    "svg.fonttype": "none",
    "svg.hashsalt": "gesso",
    "font.family": "DejaVu Sans",  # measures the text; the page's own font draws it
    "font.size": 11,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _LINE,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,
}


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a plot: ``y`` over ``x``, equally long. ``breaks`` are x at which something changed (a stage)."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    breaks: tuple[float, ...] = ()


def line_plot(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    smoothing: float = 0.0,
    y_zero: bool = False,
    dots: bool = False,
) -> str:
    """Lines with a legend above.

    Args:
        series: at most four.
        x_label: with its unit.
        y_label: with its unit.
        smoothing: standard deviation of a Gaussian as a share of each line's length; the raw line stays, faint.
        y_zero: the y axis begins at 0.
        dots: marks the measured points.

    Returns:
        An ``<svg>`` element.
    """
    assert 0 < len(series) <= len(_SERIES), "one to four series"
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(4.6, 3.1)
        for line, colour, dash in zip(series, _SERIES, _DASHES, strict=False):
            x, y = np.asarray(line.x, float), np.asarray(line.y, float)
            if smoothing > 0 and len(y) > 2:
                axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.28)
                y = smooth(y, smoothing * len(y))
            marker = "o" if dots or len(x) == 1 else ""
            axes.plot(x, y, color=colour, linewidth=2, linestyle=dash, marker=marker, markersize=4, label=line.name)
            for at in line.breaks:
                axes.axvline(at, color=colour, linewidth=1, linestyle=(0, (1, 3)))
        axes.grid(axis="y", color=_LINE, linewidth=0.8)
        if y_zero:
            axes.set_ylim(bottom=0)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        _legend(figure, axes)
        return _to_svg(figure)


def bar_plot(categories: Sequence[str], series: Sequence[tuple[str, Sequence[float | None]]], *, x_label: str) -> str:
    """Horizontal bars: a group for each category, a bar in it for each series (name, values); None leaves a gap.

    Names of categories above 26 columns end in an ellipsis.

    Returns:
        An ``<svg>`` element, the taller the more categories there are.
    """
    assert 0 < len(series) <= len(_SERIES), "one to four series"
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(4.6, max(1.6, 0.9 + 0.17 * len(categories) * (len(series) + 0.7)))
        places, thick = np.arange(len(categories)), 0.8 / len(series)
        for i, ((name, values), colour) in enumerate(zip(series, _SERIES, strict=False)):
            lengths = np.array([math.nan if value is None else value for value in values])
            middle = places + (i - (len(series) - 1) / 2) * thick
            axes.barh(middle, lengths, thick * 0.86, color=colour, alpha=1 - 0.18 * (i % 2), label=name)
        axes.set_yticks(places, [_shorten(name, _CATEGORY) for name in categories])
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color=_LINE, linewidth=0.8)
        axes.set_xlabel(x_label)
        _legend(figure, axes)
        return _to_svg(figure)


def smooth(values: npt.NDArray[np.float64], sigma: float) -> npt.NDArray[np.float64]:
    """A Gaussian running mean of ``sigma`` points; at the ends the weights that fall outside are left out."""
    reach = max(1, math.ceil(3 * sigma))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / max(sigma, 1e-9)) ** 2)
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0.0), weights, "full")[reach : reach + len(values)]
    share = np.convolve(known.astype(float), weights, "full")[reach : reach + len(values)]
    result: npt.NDArray[np.float64] = np.divide(total, share, out=np.full(len(values), math.nan), where=share > 0)
    return result


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.set_axisbelow(True)
    return figure, axes


def _legend(figure: Figure, axes: Axes) -> None:
    """Above the whole figure, not the axes alone, which long names of categories make narrow."""
    handles, names = axes.get_legend_handles_labels()
    names = [_shorten(name, _LEGEND) for name in names]
    columns = 2 if len(names) > 1 and max(map(_columns, names)) <= _HALF_LEGEND else 1
    figure.legend(handles, names, loc="outside upper left", ncols=columns, frameon=False, borderaxespad=0.2)


def _shorten(name: str, most: int) -> str:
    """The name in at most ``most`` columns, the last of them an ellipsis where it is cut."""
    if _columns(name) <= most:
        return name
    while _columns(name) >= most:
        name = name[:-1]
    return name.rstrip() + "…"


def _columns(text: str) -> int:
    return sum(2 if _is_wide(letter) else 1 for letter in text)


def _is_wide(letter: str) -> bool:
    """Letters as of Chinese, about as wide as two others."""
    return unicodedata.east_asian_width(letter) in ("W", "F")


def _to_svg(figure: Figure) -> str:
    """The figure's ``<svg>`` element, cut free of what belongs to a file of its own."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from font")  # the page's own font draws the text
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r"<style type=\"text/css\">.*?</style>", "", text, flags=re.S)  # would apply to the whole page
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1; font-family: inherit", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return _unique_names(text)


def _unique_names(text: str) -> str:
    """Names of elements are made from what the plot shows, so that two plots of a page do not meet."""
    prefix = f"p{zlib.crc32(text.encode()):08x}-"
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    return re.sub(r'(url\(|href=")#', rf"\g<1>#{prefix}", text)
