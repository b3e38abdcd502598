"""The log: one logger, lines on standard error, and a copy in the run folder.

Modules do ``log = get_logger(__name__)``. Only ``cli.py`` and ``run/train.py`` attach handlers. Of several processes
that torchrun starts, those above 0 say warnings alone, with their number before them.
"""

import logging
import sys
from pathlib import Path

from gesso import launch

ROOT = "gesso"
_FORMAT = "%(asctime)s %(levelname).1s {}%(message)s"


def prefix() -> str:
    """What stands before every line of this process: ``"[rank 2] "``, nothing in process 0."""
    return f"[rank {launch.rank()}] " if launch.rank() else ""


def get_logger(name: str) -> logging.Logger:
    """The logger of a module; ``name`` is its ``__name__``."""
    return logging.getLogger(name if name.startswith(ROOT) else f"{ROOT}.{name}")


def to_stderr(level: int = logging.INFO) -> logging.Handler:
    """Sends the log to standard error, once, however often it is called. Returns the handler."""
    level = max(level, logging.WARNING) if launch.rank() else level
    root = logging.getLogger(ROOT)
    root.setLevel(logging.DEBUG)
    for handler in root.handlers:
        if getattr(handler, "gesso_stderr", False):
            handler.setLevel(level)
            return handler
    handler = logging.StreamHandler(sys.stderr)
    handler.gesso_stderr = True  # type: ignore[attr-defined]
    return _attach(handler, level)


def to_file(path: Path) -> logging.Handler:
    """Appends the log to a file. Returns the handler, for ``detach``."""
    return _attach(_FileHandler(path, encoding="utf-8"), logging.INFO)


class _FileHandler(logging.FileHandler):
    """A full disk costs the copy of a line, which stands on standard error, and prints no traceback there."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def detach(handler: logging.Handler) -> None:
    """Takes a handler off again and closes it."""
    logging.getLogger(ROOT).removeHandler(handler)
    handler.close()


def _attach(handler: logging.Handler, level: int) -> logging.Handler:
    root = logging.getLogger(ROOT)
    root.setLevel(logging.DEBUG)
    handler.setLevel(level)
    handler.setFormatter(logging.Formatter(_FORMAT.format(prefix()), datefmt="%H:%M:%S"))
    root.addHandler(handler)
    return handler
