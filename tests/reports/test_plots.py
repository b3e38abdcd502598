import re
import warnings
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pytest

from gesso.reports.plots import Series, bar_plot, line_plot, smooth

PATHS = "{http://www.w3.org/2000/svg}path"


def two_lines(**options):
    series = [
        Series(name="from scratch", x=[0, 1, 2, 3], y=[4, 3, 2, 1]),
        Series(name="direct <&>", x=[0, 1, 2, 3], y=[4, 2, 1, 0.5], breaks=(1.5,)),
    ]
    return line_plot(series, x_label="seconds", y_label="loss", **options)


def test_the_svg_is_one_element_of_the_page():
    svg = two_lines()
    root = ET.fromstring(svg)
    assert root.tag.endswith("svg") and root.get("viewBox")
    assert "<style" not in svg and "<metadata" not in svg and "<?xml" not in svg
    words = "".join(root.itertext())
    for word in ("from scratch", "direct <&>", "seconds", "loss"):
        assert word in words


def test_colours_are_the_pages_own():
    svg = two_lines()
    assert "currentColor" in svg and "var(--series-1" in svg and "var(--series-2" in svg and "var(--line" in svg
    left = set(re.findall(r"#[0-9a-f]{6}", svg)) - {"#b35a1f", "#1f5fa8"}
    assert not left, f"a colour that does not follow the page: {left}"


def test_lines_go_through_their_points():
    svg = line_plot([Series(name="a", x=[0, 5, 10], y=[0, 1, 0])], x_label="x", y_label="y")
    paths = [p for p in ET.fromstring(svg).iter(PATHS) if "var(--series-1" in (p.get("style") or "")]
    longest = max(paths, key=lambda p: len(p.get("d")))
    points = [tuple(map(float, pair)) for pair in re.findall(r"[ML] ([\d.]+) ([\d.]+)", longest.get("d"))]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == pytest.approx(x2 - x1)
    assert y0 == pytest.approx(y2) and y1 < y0


def test_same_plot_same_text_and_names_of_two_plots_do_not_meet():
    assert two_lines() == two_lines()
    first, second = (set(re.findall(r'id="([^"]+)"', svg)) for svg in (two_lines(), two_lines(smoothing=0.3)))
    assert first and second and first.isdisjoint(second)
    for svg in (two_lines(), two_lines(dots=True)):
        names = set(re.findall(r'id="([^"]+)"', svg))
        assert set(re.findall(r"url\(#([^)]+)\)", svg)) <= names
        assert set(re.findall(r'href="#([^"]+)"', svg)) <= names


def test_global_state_is_left_alone():
    before = dict(matplotlib.rcParams)
    two_lines()
    assert dict(matplotlib.rcParams) == before


def test_bars_have_the_length_of_their_values():
    svg = bar_plot(["cat", "dog"], [("a", [0.5, 0.25]), ("b", [None, 1.0])], x_label="AP")
    words = "".join(ET.fromstring(svg).itertext())
    assert "cat" in words and "dog" in words and "AP" in words

    def lengths(variable):
        found = []
        for path in ET.fromstring(svg).iter(PATHS):
            if variable in (path.get("style") or "") and "clip-path" in path.attrib:
                xs = [float(x) for x, _ in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path.get("d"))]
                found.append(max(xs) - min(xs))
        return found

    first, second = lengths("var(--series-1"), lengths("var(--series-2")
    assert first[0] == pytest.approx(2 * first[1], rel=1e-3)
    assert max(second) == pytest.approx(4 * first[1], rel=1e-3)


@pytest.mark.parametrize("name", ["x" * 60, "W" * 60, "very " * 40, "信号機" * 20, "信号機"])
def test_names_of_any_length_and_script_leave_room_for_the_bars(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = bar_plot([name, "dog"], [(name, [0.5, 0.25]), ("b" * 30, [1.0, 1.0])], x_label="AP")
        line_plot([Series(name=name, x=[0, 1], y=[0, 1])] * 2, x_label="x", y_label="y")
    root = ET.fromstring(svg)
    texts = list(root.iter("{http://www.w3.org/2000/svg}text"))
    assert all(len(t.text) <= 40 for t in texts)
    label = next(t for t in texts if "text-anchor: end" in t.get("style", "") and t.text != "dog")
    assert label.text == name or (label.text.endswith("…") and name.startswith(label.text[:-1]))
    assert 3 < len(label.text) <= 26 or name == "信号機"
    letter = 11 if "信" in name else 0  # a Chinese letter is a square of the font's size
    assert 0.95 * letter * len(label.text) < float(label.get("x")) < 300, "of 331 points; the rest are bars"


def test_smooth_equals_the_slow_way():
    rng = np.random.default_rng(0)
    values = rng.normal(size=30)
    values[7] = np.nan
    sigma = 2.0
    for i, smoothed in enumerate(smooth(values, sigma)):
        total = weight = 0.0
        for j, value in enumerate(values):
            if abs(i - j) <= 6 and np.isfinite(value):
                w = np.exp(-0.5 * ((i - j) / sigma) ** 2)
                total, weight = total + w * value, weight + w
        assert smoothed == pytest.approx(total / weight)
    assert np.isnan(smooth(np.full(4, np.nan), 1.0)).all()


def test_a_single_point_is_drawn():
    svg = line_plot([Series(name="a", x=[3], y=[0.5])], x_label="x", y_label="y")
    assert "<use" in svg
