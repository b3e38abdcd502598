import itertools
import re
import xml.etree.ElementTree as ET

from gesso.planning.page import COLUMNS, basis, plan_rows, scaling_report
from gesso.planning.scaling import Network, Plan, StepMeasurement, Work, predict
from gesso.reports.html import Plots, Table, render_report

STEP = StepMeasurement(seconds=0.5, images=2, gradient_bytes=167e6, messages=7, norm_layers=50, norm_bytes=4e5)
WORK = Work(images=1e6)


def plan(*counts):
    rows = tuple(predict(STEP, Network(), WORK, n) for n in counts)
    return Plan(name="some:recipe", step=STEP, network=Network(), work=WORK, rate=0.02 / 16, rows=rows)


def points(svg, colour):
    """The points of the longest line of a colour."""
    paths = [
        p.get("d") for p in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}path") if colour in p.get("style", "")
    ]
    return [
        tuple(map(float, pair))
        for pair in re.findall(r"[ML] ([\d.]+) ([\d.]+)", max(paths, key=lambda path: path.count("L")))
    ]


def test_rows_have_the_numbers_of_the_plan():
    (row,) = plan_rows(plan(8))
    shown = dict(zip(COLUMNS, row, strict=True))
    found = predict(STEP, Network(), WORK, 8)
    assert (shown["GPUs"], shown["machines"], shown["batch"], shown["rate"]) == (8, 1, 16, "0.02")
    assert float(shown["hours"]) == float(f"{found.hours:.3g}")
    assert float(shown["norm"]) == float(f"{found.norm:.3g}")
    assert shown["efficiency"] == found.efficiency


def test_the_page_shows_every_number_of_gpus_and_the_published_points():
    report = scaling_report(plan(1, 8, 1024))
    tables = [section for section in report.sections if isinstance(section, Table)]
    assert [row[0] for row in tables[0].rows] == [row[0] for row in tables[1].rows] == [1, 8, 1024]
    assert {*tables[0].columns, *tables[1].columns} == set(COLUMNS)
    text = render_report(report)
    for word in ("some:recipe", "1,024 GPUs", "MegDet, published", "PFDet, published", "calibration", "held out"):
        assert word in text


def test_hours_fall_along_a_line_where_nobody_waits():
    report = scaling_report(plan(1, 2, 4, 8))
    plots = next(section for section in report.sections if isinstance(section, Plots)).plots
    ideal = points(plots[0].svg, "var(--series-2")
    steps = {(round(x1 - x0, 2), round(y1 - y0, 2)) for (x0, y0), (x1, y1) in itertools.pairwise(ideal)}
    assert len(ideal) == 4 and len(steps) == 1


def test_one_number_of_gpus_is_enough_and_no_plan_too():
    assert len(scaling_report(plan(64)).figures) == 1
    alone = scaling_report(None)
    assert not alone.figures and "MegDet" in render_report(alone)


def test_what_it_rests_on_is_said_in_full():
    said = " ".join(basis(plan(1)))
    for word in ("0.5 s", "2 pictures", "167 MB in 7 messages", "50 layers", "over all GPUs", "12.5 GB/s", "1,000,000"):
        assert word in said
