"""What every test may use: the shared golden data where it is there, and a CUDA device where it is there."""

import logging
import os
from pathlib import Path

import pytest

from tests.command_line import Command

os.environ.setdefault("HF_HUB_OFFLINE", "1")

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture
def golden() -> Path:
    """The folder of golden data; the test is skipped where it is absent."""
    folder = SHARED / "golden"
    if not folder.is_dir():
        pytest.skip("the golden data is not beside this checkout")
    return folder


@pytest.fixture
def real_sets() -> Path:
    """The folder of real image sets; the test is skipped where it is absent."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip("the real image sets are not beside this checkout")
    return folder


@pytest.fixture
def gesso(capsys):
    """The command line in this process: ``gesso("data", "stats", index)``; see ``tests.command_line.Command``."""
    yield Command(capsys)
    log = logging.getLogger("gesso")
    for handler in [handler for handler in log.handlers if getattr(handler, "gesso_stderr", False)]:
        log.removeHandler(handler)  # it holds the captured stream of this test
