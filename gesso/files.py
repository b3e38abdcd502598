"""Files that matter are written whole or not at all: a temporary name, fsync, rename. The only owner of that dance."""

import contextlib
import errno
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gesso.errors import InputError

_MANY = 256


@contextlib.contextmanager
def new_parents(path: Path) -> Iterator[None]:
    """On an error, the folders above ``path`` that were made in the block go again, where they are empty."""
    missing = list(itertools.takewhile(lambda parent: not parent.exists(), path.absolute().parents))
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # one that is not empty, or was never made
            for parent in missing:
                parent.rmdir()
        raise


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside ``path``; at the end of the block it is flushed and renamed to ``path``.

    On any error the temporary file is removed and ``path`` stays as it was. A full disk is an InputError that says so.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with new_parents(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            _flush(temporary)
            temporary.replace(path)
            _flush(path.parent)
        except OSError as error:
            raise _explain(error, path) from error
        finally:
            with contextlib.suppress(NotADirectoryError):  # a file stands where the folder should be: said above
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Gives a temporary folder beside ``path``; at the end its files are flushed and it is renamed to ``path``.

    Raises:
        InputError: ``path`` exists and ``overwrite`` is off, or the disk is full.
    """
    if path.exists() and not overwrite:
        raise InputError("exists already", where=path, remedy="Name another folder, or replace it with --overwrite.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with new_parents(path):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            _flush_below(temporary)
            if path.exists():
                old = path.with_name(f".{path.name}.{os.getpid()}.old")
                path.rename(old)
                try:
                    temporary.rename(path)
                finally:
                    if not path.exists():  # also at Ctrl-C: never without one of the two
                        old.rename(path)
                shutil.rmtree(old) if old.is_dir() else old.unlink()
            else:
                temporary.rename(path)
            _flush(path.parent)
        except OSError as error:
            raise _explain(error, path) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes a whole text file atomically, as UTF-8."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically, indented, with a final line end."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file. InputError where it is missing, no text, or breaks off (line and column are named)."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(
            f"this is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}", where=path
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"this is not a text file (byte {error.start})", where=path) from error
    except OSError as error:
        raise InputError(error.strerror or "cannot be read", where=path, remedy="Check the path.") from error


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_below(folder: Path) -> None:
    """Flushes a folder with all that is in it; many files together, because each alone takes milliseconds."""
    entries = [entry for entry in folder.rglob("*") if not entry.is_symlink()]
    if len(entries) > _MANY:
        os.sync()
        return
    for entry in (*entries, folder):
        _flush(entry)


def _explain(error: OSError, path: Path) -> InputError:
    if error.errno == errno.ENOSPC:
        free = shutil.disk_usage(path.parent if path.parent.exists() else Path.cwd()).free
        return InputError(
            f"the disk is full ({free / 2**20:.0f} MiB free); nothing was changed",
            where=path,
            remedy="Free some space, or name a folder on another disk.",
        )
    return InputError(
        f"cannot be written: {error.strerror or error}", where=path, remedy="Check the path and its rights."
    )
