"""Every mistake that a user can make, as one small tree of exceptions.

    GessoError                 the message is one line: what is wrong, where, what to do
    +-- InputError             a path, a file or a value in a file is wrong
    |   +-- DataError          a data set cannot be read or used
    +-- ConfigError            a recipe, an option or a key is wrong
    +-- RunError               a run folder or a checkpoint cannot be used
    +-- TrainingError          training had to stop (too many broken pictures, a loss that is not finite)
    +-- ProcessLost            another process of the same run is gone
    Interrupted                stopped by Ctrl-C or a signal; carries the command that goes on

The command line prints the message and leaves with ``exit_code``. Anything else that is raised is a bug of ours.
"""

import difflib
from collections.abc import Iterable
from pathlib import Path


class GessoError(Exception):
    """A mistake that the user can mend. ``str(error)`` is one line; the exit code is 2."""

    exit_code = 2
    told = False
    """Another process of the same run says it to the user."""

    def __init__(self, what: str, *, where: str | Path | None = None, remedy: str | None = None) -> None:
        """``what`` is wrong, ``where`` it stands (file, line, image id), and the ``remedy``; joined into one line."""
        self.what = what
        self.where = None if where is None else str(where)
        self.remedy = remedy
        line = what if self.where is None else f"{self.where}: {what}"
        if remedy:
            line = f"{line.rstrip('.')}. {remedy}"
        super().__init__(" ".join(line.split()))


class InputError(GessoError):
    """A path, a file or a value in a file is wrong."""


class DataError(InputError):
    """A data set cannot be read or used."""


class ConfigError(GessoError):
    """A recipe, an option or a key is wrong."""


class RunError(GessoError):
    """A run folder or a checkpoint cannot be used."""


class TrainingError(GessoError):
    """Training had to stop."""


class ProcessLost(GessoError):
    """Another process of the same run is gone. The exit code 75 asks a launcher to start all of them again."""

    exit_code = 75


class Interrupted(GessoError):
    """Stopped by Ctrl-C or a signal. The message names the command that goes on; the exit code is 130, or 143 for
    SIGTERM."""

    exit_code = 130


def nearest(name: str, known: Iterable[str], *, limit: int = 3) -> str:
    """A sentence that names the known words most like ``name``: ``"Did you mean 'a' or 'b'?"``, or lists a few."""
    words = sorted(set(known))
    close = difflib.get_close_matches(name, words, n=limit, cutoff=0.5)
    if close:
        return "Did you mean " + " or ".join(f"'{word}'" for word in close) + "?"
    shown = ", ".join(f"'{word}'" for word in words[:8]) + (" and more" if len(words) > 8 else "")
    return f"Known: {shown}." if words else "None is known."
