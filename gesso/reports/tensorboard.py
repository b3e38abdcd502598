"""Rows of ``metrics.jsonl`` as TensorBoard scalars. Needs the extra ``tensorboard``; imported by nothing but choice."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from gesso.errors import ConfigError

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError as error:
    raise ConfigError("TensorBoard is not installed", remedy="pip install 'gesso[tensorboard]'") from error


class TensorBoardWriter:
    """Writes event files below a folder. Use as a context manager, or ``close`` it."""

    def __init__(self, folder: Path, *, resumed_step: int | None = None) -> None:
        """``resumed_step``: the first step that is written again; TensorBoard hides what stood there before."""
        self._writer = SummaryWriter(str(folder), purge_step=resumed_step)

    def add_row(self, step: int, row: Mapping[str, object], *, group: str = "") -> None:
        """Adds every number of a row at ``step``; inner mappings (``by_class``) become tags with slashes.

        Args:
            step: the time axis.
            row: names and values; what is no number is passed over, as is ``step`` itself.
            group: put before each tag: ``group="train"`` gives ``train/loss``.
        """
        for tag, value in _numbers(row, group):
            if tag.rpartition("/")[2] != "step":
                self._writer.add_scalar(tag, value, step)

    def close(self) -> None:
        """Flushes to disk and closes the file."""
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _numbers(row: Mapping[str, object], prefix: str) -> Iterator[tuple[str, float]]:
    for name, value in row.items():
        tag = f"{prefix}/{name}" if prefix else str(name)
        if isinstance(value, Mapping):
            yield from _numbers(value, tag)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield tag, float(value)
