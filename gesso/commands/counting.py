"""A progress line for an import, where standard error is a terminal."""

import contextlib
import sys
from collections.abc import Callable, Iterator

from gesso.reports.progress import JobProgress, Stage

Progress = Callable[[str, int, int], None]
STAGES = ("annotations", "pictures")


@contextlib.contextmanager
def counting() -> Iterator[Progress | None]:
    """Gives what ``import_data`` reports its progress to; None, and silence, without a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    with JobProgress([Stage(name=name) for name in STAGES]) as job:
        at = ""

        def show(stage: str, done: int, total: int) -> None:
            nonlocal at
            if stage != at:
                at = stage
                job.begin(stage)
            job.update(done=done, total=total)

        yield show
