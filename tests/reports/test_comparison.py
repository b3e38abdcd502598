import numpy as np
import pytest

from gesso.reports.comparison import Arm, Point, comparison_report, verdict
from gesso.reports.html import Exhibit, Gallery, Mark, Table, render_report


def arm(name, ap, **changes):
    values = {
        "name": name,
        "phrase": name.lower(),
        "scores": {
            "AP": ap,
            "AP50": ap + 0.3,
            "AP75": ap,
            "APs": ap,
            "APm": ap,
            "APl": -1.0,
            "by_class": {"one": ap, "two": {"AP": ap / 2}},
        },
        "seconds": 120.0,
        "images": 3000,
        "losses": [Point(seconds=s, step=s, value=3 - s / 60) for s in range(120)],
        "scores_over_time": [Point(seconds=60, step=60, value=ap / 2), Point(seconds=120, step=120, value=ap)],
    }
    return Arm(**{**values, **changes})


def test_the_winner_is_named_with_its_lead():
    summary, hedge = verdict([arm("From scratch", 0.239), arm("Direct pre-training", 0.297)], seeds=1)
    assert summary.startswith("Direct pre-training won by 5.8 points of AP: 0.297 against 0.239.")
    assert "one seed" in hedge
    summary, _ = verdict([arm("From scratch", 0.3), arm("Direct pre-training", 0.2)], seeds=1)
    assert summary.startswith("From scratch won by 10.0 points of AP: 0.300 against 0.200.")


def test_a_tie_is_a_tie():
    summary, hedge = verdict([arm("A", 0.300), arm("B", 0.305)], seeds=3)
    assert summary.startswith("No winner: b reached an AP of 0.305, a 0.300.")
    assert "3 seeds" in hedge and "one seed" not in hedge


def test_unequal_time_is_said():
    summary, _ = verdict([arm("A", 0.2, seconds=60.0), arm("B", 0.3, seconds=240.0)], seeds=1)
    assert "60 s a" in summary and "4.0 min b" in summary
    assert "Each trained for" not in summary


def test_nothing_found_at_all():
    summary, _ = verdict([arm("A", -1.0), arm("B", float("nan"))], seeds=1)
    assert summary.startswith("No winner")


def test_the_page_holds_every_number():
    arms = [arm("From scratch", 0.239), arm("Direct pre-training", 0.297, images=7044, breaks=(60.0,))]
    pixels = np.zeros((32, 32, 3), np.uint8)
    marks = (Mark(xyxy=(1, 1, 9, 9), label="one"),)
    report = comparison_report(
        arms,
        title="T",
        task="Digits.",
        exhibits=[Exhibit(pixels=pixels, caption="scene", marks=(marks, (), marks))],
        commands=[("train", "gesso train direct:small")],
        settings={"seed": 0},
    )
    kinds = [type(section).__name__ for section in report.sections]
    assert kinds == ["Table", "Plots", "Gallery", "Plots", "Table", "Text"]
    scores = report.sections[0]
    assert isinstance(scores, Table)
    assert scores.rows[1] == (
        "Direct pre-training",
        0.297,
        pytest.approx(0.597),
        0.297,
        0.297,
        0.297,
        None,
        "2.0 min",
        7044,
    )
    assert (1, 1) in scores.best and (0, 1) not in scores.best
    assert all(column != 6 for _, column in scores.best)
    classes = report.sections[4]
    assert isinstance(classes, Table) and classes.folded
    assert classes.rows == (("one", 0.239, 0.297, "+0.058"), ("two", 0.1195, 0.1485, "+0.029"))
    assert isinstance(report.sections[2], Gallery)
    text = render_report(report)
    for words in ("won by 5.8 points", "0.297", "7,044", "gesso train direct:small", "Direct pre-training"):
        assert words in text


def test_bare_arms_need_no_curves_or_classes():
    bare = [arm(n, 0.1, losses=(), scores_over_time=(), scores={"AP": 0.1}) for n in "AB"]
    report = comparison_report(bare, title="T", task="")
    assert [type(section).__name__ for section in report.sections] == ["Table"]
    assert report.sections[0].best == ()
    render_report(report)


def test_many_classes_show_those_that_differ_most():
    names = [f"class {i}" for i in range(80)]
    a = arm("A", 0.2, scores={"AP": 0.2, "by_class": dict.fromkeys(names, 0.2)})
    b = arm("B", 0.3, scores={"AP": 0.3, "by_class": {n: 0.2 + i / 200 for i, n in enumerate(names)}})
    report = comparison_report([a, b], title="T", task="", seeds=1)
    svg = report.sections[2].plots[0].svg
    assert ">class 79<" in svg and ">class 0<" not in svg
    assert len(report.sections[3].rows) == 80
