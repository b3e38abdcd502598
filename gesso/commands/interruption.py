"""Ctrl-C and SIGTERM: the first asks a run to stop after its step and save; the second stops at once."""

import contextlib
import logging
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from gesso.commands.parsing import option_value
from gesso.errors import Interrupted
from gesso.launch import is_launched, rank
from gesso.log import get_logger

log = get_logger(__name__)


class StopRequest:
    """Whether a stop was asked for, and by which signal; call it to know."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self) -> bool:
        """Whether a stop was asked for."""
        return self.signal is not None

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The signal handler. A launcher repeats its signals, and kills what does not end in time."""
        launched = is_launched()
        if self.signal is None:
            self.signal = number
            more = "" if launched else "; once more stops at once"
            level = logging.INFO if rank() else logging.WARNING
            log.log(level, "%s: finishing this step and saving%s", signal.Signals(number).name, more)
        elif not launched:
            raise KeyboardInterrupt


@contextlib.contextmanager
def graceful_stop() -> Iterator[StopRequest]:
    """Within the block, SIGINT and SIGTERM set the flag that is given; the old handlers come back afterwards.

    Under a launcher signals are ignored then: it ends all processes where one failed, and each shall still say why.
    ``Interrupted`` leaves with the exit code of the signal: 130 or 143. A process that stops because another one was
    asked to has got none; that is how pre-emption looks from other machines, and its code is 143.
    """
    request = StopRequest()
    old = {number: signal.signal(number, request.receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    except Interrupted as error:
        error.exit_code = 128 + (request.signal or signal.SIGTERM)
        raise
    finally:
        for number, handler in old.items():
            signal.signal(number, signal.SIG_IGN if is_launched() else handler)


def command_line(*words: str) -> str:
    """How the program was called, with these words behind it, for "go on with"."""
    program = "gesso" if not sys.argv[0].endswith("__main__.py") else "python -m gesso"
    if is_launched() and option_value(words, "--gpus") is None:
        others = "" if os.environ.get("GROUP_WORLD_SIZE") == "1" else "... "
        program = f"torchrun {others}--nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE', '...')} -m gesso"
    return f"{program} {shlex.join(words)}"


def again(words: Sequence[str]) -> str:
    """What to do after a command with these words was cut short: go on with its run, or call it once more."""
    out = option_value(words, "--out") or "runs/demo"
    begun = {"train": Path(out, "config.json"), "demo": Path(out)}.get(words[0] if words else "")
    if words[:1] == ["transfer"] and words[1:2] not in (["matrix"], ["probe"]):
        begun = Path(out, "config.json")
    if begun is not None and begun.exists() and "--resume" not in words:
        return f"Go on from the last checkpoint with: {command_line(*words, '--resume')}"
    return f"Nothing half-written is left; call it again: {command_line(*words)}"
