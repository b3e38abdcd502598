"""Ctrl-C and SIGTERM: the first asks a run to stop after its step and save; the second stops at once."""

import contextlib
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from gesso.commands.parsing import option_value
from gesso.log import get_logger

log = get_logger(__name__)


class StopRequest:
    """Whether a stop was asked for; call it to know."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self) -> bool:
        """Whether a stop was asked for."""
        return self.asked

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        log.warning("%s: finishing this step and saving; once more stops at once", signal.Signals(number).name)


@contextlib.contextmanager
def graceful_stop() -> Iterator[StopRequest]:
    """Within the block, SIGINT and SIGTERM set the flag that is given; the old handlers come back afterwards."""
    request = StopRequest()
    old = {number: signal.signal(number, request.receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def command_line(*words: str) -> str:
    """How the program was called, with these words behind it, for "go on with"."""
    program = "gesso" if not sys.argv[0].endswith("__main__.py") else "python -m gesso"
    return f"{program} {shlex.join(words)}"


def again(words: Sequence[str]) -> str:
    """What to do after a command with these words was cut short: go on with its run, or call it once more."""
    out = option_value(words, "--out") or "runs/demo"
    begun = {"train": Path(out, "config.json"), "demo": Path(out)}.get(words[0] if words else "")
    if begun is not None and begun.exists() and "--resume" not in words:
        return f"Go on from the last checkpoint with: {command_line(*words, '--resume')}"
    return f"Nothing half-written is left; call it again: {command_line(*words)}"
