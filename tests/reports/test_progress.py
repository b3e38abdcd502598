import io
import logging
import sys

import pytest
from rich.console import Console

from gesso.reports.progress import ROWS, JobProgress, Stage, describe, format_seconds, row_line


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def job(clock, stages=(("data", 10.0), ("training", 100.0)), **options):
    listed = [Stage(name=name, expected_seconds=seconds) for name, seconds in stages]
    console = options.pop("console", None) or Console(file=io.StringIO(), force_terminal=False)
    return JobProgress(listed, console=console, clock=clock, **options)


def test_time_left_is_exact_where_the_pace_is_steady():
    clock = Clock()
    with job(clock) as progress:
        progress.begin("data")
        assert progress.seconds_left() == pytest.approx(110)
        for done in range(1, 101):
            clock.now = 0.2 * done  # 20 s in all: twice as long as expected
            progress.update(done=done, total=100)
            if done >= 10:
                assert progress.seconds_left() == pytest.approx(20 - clock.now + 200)
        progress.begin("training")
        assert progress.seconds_left() == pytest.approx(200)
        clock.now = 20 + 30
        progress.update(done=50, total=100)
        assert progress.seconds_left() == pytest.approx(30)
        assert progress.share_done() == pytest.approx(50 / 80)


def test_a_slow_first_step_does_not_explode_the_estimate():
    clock = Clock()
    with job(clock, (("training", 100.0),)) as progress:
        progress.begin("training")
        clock.now = 10.0
        progress.update(done=1, total=1000)
        assert progress.seconds_left() < 300  # a plain extrapolation would say 9,990


def test_stages_may_be_left_out():
    clock = Clock()
    with job(clock, (("a", 5.0), ("b", 5.0), ("c", 5.0))) as progress:
        progress.begin("c")
        assert progress.seconds_left() == pytest.approx(5)


def test_without_a_terminal_lines_are_few(caplog):
    clock = Clock()
    with caplog.at_level(logging.INFO, logger="gesso.progress"), job(clock, plain_every=15.0) as progress:
        progress.begin("training")
        for step in range(1, 101):
            clock.now = float(step)
            progress.update(done=step, total=100, detail=f"loss {step}")
    lines = [record.getMessage() for record in caplog.records]
    steps = [line for line in lines if "training " in line and "/100" in line]
    assert len(steps) == 7  # at 1, 16, 31, ..., 91
    assert steps[0].startswith("training 1/100, ")
    assert steps[-1] == "training 91/100, 9 s left, loss 91"
    assert lines[-1] == "training done in 1:40 min"


def test_in_a_terminal_a_line_is_drawn_and_log_lines_pass_above(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    console = Console(stderr=True, force_terminal=True, width=140, color_system=None)
    logger, handler = logging.getLogger("gesso"), logging.StreamHandler(stream)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    clock = Clock()
    try:
        with job(clock, console=console) as progress:
            progress.begin("data")
            clock.now = 5.0
            progress.update(done=500, total=1000, detail="loss 1.25")
            assert handler.stream is not stream
            logger.info("a line of the log")
        assert handler.stream is stream
    finally:
        logger.removeHandler(handler)
    drawn = stream.getvalue()
    for words in ("data", "500/1,000", "left", "loss 1.25", "a line of the log"):
        assert words in drawn
    assert sys.stderr is stream


def test_rows_stand_for_the_plain_lines(caplog):
    """Rows every 10 s: no plain line beside them. Every 40 s: plain ones in between."""
    for every, plain in ((10, [1, 55]), (40, [1, 16, 31, 55])):
        clock = Clock()
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="gesso"), job(clock, plain_every=15.0) as progress:
            progress.begin("training")
            for step in range(1, 56):
                clock.now = float(step)
                if step % every == 0 and step <= 40:
                    logging.getLogger(ROWS).info("a row")
                progress.update(done=step, total=100)
        lines = [record.getMessage() for record in caplog.records if "/100" in record.getMessage()]
        assert [int(line.split()[1].split("/")[0]) for line in lines] == plain
        assert not logging.getLogger(ROWS).filters


def test_where_a_line_is_drawn_rows_are_not_said_twice(monkeypatch, tmp_path):
    """They go to the file of the log alone; other lines go to both."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    logger, handler = logging.getLogger("gesso"), logging.StreamHandler(stream)
    file = logging.FileHandler(tmp_path / "log.txt")
    logger.setLevel(logging.INFO)
    for each in (handler, file):
        logger.addHandler(each)
    try:
        with job(Clock(), console=Console(stderr=True, force_terminal=True, width=140, color_system=None)) as progress:
            progress.begin("training")
            logging.getLogger(ROWS).info("a row within")
            logger.info("another line")
        logging.getLogger(ROWS).info("a row after")
    finally:
        for each in (handler, file):
            logger.removeHandler(each)
        file.close()
    assert "a row within" not in stream.getvalue()
    assert "another line" in stream.getvalue() and "a row after" in stream.getvalue()
    written = (tmp_path / "log.txt").read_text().splitlines()
    assert [line for line in written if "training" not in line] == ["a row within", "another line", "a row after"]


ROW = {
    "step": 112,
    "stage": "training",
    "loss": 1.5,
    "rpn_box_loss": 0.25,
    "class_loss": 1.25,
    "rpn_positive_ratio": 0.0123,
    "class_positive_ratio": 0.25,
    "gradient_norm": 12.345,
    "learning_rate": 0.0125,
    "images_per_second": 53.21,
    "images_per_second_per_gpu": 26.605,
    "data_share": 0.05,
    "forward_share": 0.3,
    "backward_share": 0.5,
    "communication_share": 0.0,
    "optimizer_share": 0.1,
    "step_seconds": 0.2,
    "eta_seconds": 245.0,
    "seconds": 20.0,
    "images": 896,
    "memory_gib": 1.0,
}


def test_describe():
    row = ROW
    assert describe(row) == "loss 1.500 (rpn_box 0.250 class 1.250), 53.2 img/s, data wait 5%, 1.00 GiB"
    assert describe({}) == ""
    scores = {"step": 12, "stage": "training", "seconds": 3.5, "AP": 0.25, "AP50": 0.5, "by_class": {}}
    assert describe(scores) == "AP 0.250"
    assert describe(scores | {"mask_AP": 0.125, "mask_AP50": 0.25}) == "AP 0.250, mask AP 0.125"


def test_row_line():
    assert row_line(ROW, 12, 600) == (
        "training 12/600: loss 1.500 (rpn_box 0.250 class 1.250), gradient 12.3, rate 0.0125, 53.2 img/s (26.6 each), "
        "data 5% forward 30% backward 50% communication 0% optimizer 10%, "
        "positive/negative rpn 0.0123 class 0.25, 1.00 GiB, 4:05 min left"
    )
    alone = ROW | {"images_per_second_per_gpu": 53.21}
    assert ", 53.2 img/s, data 5%" in row_line(alone, 12, 600)
    assert row_line({"loss": 2.0}, 1, 2) == "training 1/2: loss 2.000"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1:00 min"),
        (245, "4:05 min"),
        (7800, "2:10 h"),
        (float("inf"), "?"),
        (-1, "0 s"),
    ],
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text
