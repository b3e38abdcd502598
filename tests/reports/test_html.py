import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from gesso.errors import InputError
from gesso.reports.html import (
    Exhibit,
    Figure,
    Gallery,
    Mark,
    Plot,
    Plots,
    Report,
    Table,
    Text,
    format_cell,
    render_report,
    write_report,
)
from gesso.reports.plots import Series, line_plot

VOID_TAGS = {"meta", "image", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags are closed in order, and keeps what was seen."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words, self.ids = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for key, value in attributes if key == "id"]
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for key, value in attributes if key == "id"]

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        self.words.append(data)


def picture(value=100):
    return np.full((48, 64, 3), value, np.uint8)


def full_report():
    svg = line_plot([Series(name="a", x=[0, 1, 2], y=[3, 2, 1])], x_label="s", y_label="loss")
    other = line_plot([Series(name="b", x=[0, 1, 2], y=[3, 2, 2])], x_label="s", y_label="loss")
    marks = (
        (Mark(xyxy=(1, 2, 30, 40), label="cat"),),
        (Mark(xyxy=(1, 2, 30, 41), label="cat", score=0.875, kind="right"),),
    )
    return Report(
        title="Title <one>",
        summary="Won & lost",
        hedge="One seed.",
        figures=(Figure(label="AP", value="0.297", note="n"),),
        sections=(
            Table(
                title="Scores",
                columns=("", "AP", "images"),
                rows=(("a", 0.25, 1200), ("b", None, 3)),
                best=((0, 1),),
            ),
            Table(title="Folded", columns=("", "x"), rows=(("<i>", "yes"),), folded=True),
            Plots(
                title="Curves", plots=(Plot(svg=svg, caption="c", alt="falls"), Plot(svg=other, caption="d", alt="e"))
            ),
            Gallery(
                title="Pictures",
                columns=("truth", "found"),
                exhibits=(Exhibit(pixels=picture(), caption="one", marks=marks),) * 2,
            ),
            Text(title="Go on", paragraphs=("p",), commands=(("train", "gesso train x --out <run>"),)),
        ),
        settings={"training.steps": 600, "name": "<b>"},
        footer="end",
    )


def test_the_page_is_well_formed_and_needs_nothing_else():
    text = render_report(full_report())
    page = Page(text)
    assert len(page.ids) == len(set(page.ids)), "an id stands twice"
    names = [tag for tag, _ in page.tags]
    assert "script" not in names and "link" not in names and "iframe" not in names
    for tag, attributes in page.tags:
        for key in ("src", "href", "xlink:href"):
            value = attributes.get(key)
            assert value is None or value.startswith(("#", "data:")), f"{tag} {key}={value}"
            if value and value.startswith("#"):
                assert value[1:] in page.ids
    assert not re.search(r"url\((?!#|['\"]?#)", text)
    for target in re.findall(r"url\(#([^)]*)\)", text):
        assert target in page.ids


def test_words_are_escaped():
    text = render_report(full_report())
    assert "Title &lt;one&gt;" in text and "<one>" not in text
    assert "&lt;run&gt;" in text and "<run>" not in text
    assert "&lt;b&gt;" in text and "&lt;i&gt;" in text
    assert "Won &amp; lost" in text


def test_what_is_seen_is_said_in_words_too():
    page = Page(render_report(full_report()))
    labels = [a["aria-label"] for _, a in page.tags if a.get("role") == "img"]
    assert labels.count("falls") == 1
    assert "one, truth: cat" in labels
    assert "one, found: cat 0.88 (right)" in labels
    assert dict(page.tags)["html"]["lang"] == "en"


def test_table_cells_and_best():
    text = render_report(full_report())
    assert '<td class="number best">0.250</td>' in text
    assert '<td class="number">1,200</td>' in text
    assert '<td class="number">–</td>' in text


def test_pictures_come_back_out():
    pixels = picture()
    pixels[:, :32] = (200, 30, 30)
    gallery = Gallery(title="g", columns=("a",), exhibits=(Exhibit(pixels=pixels, caption="c", marks=((),)),))
    text = render_report(Report(title="t", summary="s", sections=(gallery,)))
    (data,) = re.findall(r"data:image/jpeg;base64,([^\"]+)", text)
    back = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))), np.int32)
    assert back.shape == pixels.shape
    assert np.abs(back - pixels).mean() < 4
    assert "c, a: no box" in text


def test_a_picture_is_stored_once_and_boxes_stand_where_they_should():
    text = render_report(full_report())
    assert text.count("data:image/jpeg") == 2  # two exhibits, two columns each
    assert text.count('<rect class="right" x="1" y="2" width="29" height="39"/>') == 2


def test_large_pictures_are_made_smaller():
    big = np.random.default_rng(0).integers(0, 256, (1500, 2000, 3), np.uint8)
    gallery = Gallery(title="g", columns=("a",), exhibits=(Exhibit(pixels=big, caption="c", marks=((),)),))
    assert len(render_report(Report(title="t", summary="s", sections=(gallery,)))) < 600_000


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (0.29731, "0.297"),
        (1234.56, "1,234.6"),
        (5136, "5,136"),
        (True, "yes"),
        ("2.0 min", "2.0 min"),
        (-0.5, "-0.500"),
    ],
)
def test_format_cell(value, text):
    assert format_cell(value) == text


def test_writing(tmp_path):
    report = full_report()
    path = write_report(tmp_path / "runs" / "report.html", report)
    assert path.read_text(encoding="utf-8") == render_report(report)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError):
        write_report(tmp_path / "file" / "report.html", report)


def test_labels_stay_on_the_picture():
    marks = tuple(
        Mark(xyxy=box, label="a long label", score=0.5, kind="wrong")
        for box in [(60, 0, 64, 5), (0, 0, 64, 48), (-5, -5, 10, 10), (40, 40, 64, 48)]
    )
    gallery = Gallery(title="g", columns=("a",), exhibits=(Exhibit(pixels=picture(), caption="c", marks=(marks,)),))
    text = render_report(Report(title="t", summary="s", sections=(gallery,)))
    for x, y in re.findall(r'<text class="wrong" x="([-\d.]+)" y="([-\d.]+)"', text):
        assert 0 <= float(x) < 64 and 0 < float(y) <= 48


def test_masks_of_marks_are_paths_below_their_boxes():
    rings = (((1.0, 2.0), (30.25, 2.0), (30.0, 40.0)), ((5.0, 5.0), (9.0, 5.0), (9.0, 9.0)))
    marks = (
        (Mark(xyxy=(1, 2, 30, 40), label="cat", outline=rings), Mark(xyxy=(1, 2, 30, 40), label="dog")),
        (Mark(xyxy=(1, 2, 30, 41), label="cat", score=0.875, kind="right"),),
    )
    gallery = Gallery(title="g", columns=("a", "b"), exhibits=(Exhibit(pixels=picture(), caption="c", marks=marks),))
    text = render_report(Report(title="t", summary="s", sections=(gallery,)))
    Page(text)
    path = '<path class="truth" d="M1.0,2.0 30.2,2.0 30.0,40.0ZM5.0,5.0 9.0,5.0 9.0,9.0Z"/>'
    assert text.count("<path") == text.count(path) == 1
    assert text.index(path) < text.index("<rect")
