"""What a run takes on disk: its checkpoints and its data."""

from dataclasses import dataclass

import numpy as np

from gesso.data.index import Index
from gesso.run.config import RunConfig

SAMPLE = 500
"""Pictures of an index whose sizes are looked at."""


@dataclass(frozen=True, kw_only=True)
class Disk:
    """Bytes on disk.

    Attributes:
        checkpoint: of one checkpoint, the largest of all stages.
        checkpoints: how many a run keeps, the best one included.
        data: of the data set; None where the recipe names none.
        data_words: how they were found.
    """

    checkpoint: int
    checkpoints: int
    data: int | None
    data_words: str

    @property
    def bytes(self) -> int:
        """Altogether."""
        return self.checkpoint * self.checkpoints + (self.data or 0)


def data_bytes(config: RunConfig) -> tuple[int | None, str]:
    """The bytes of a recipe's data, and how they were found."""
    data = config.data
    if data.train is None and data.embedded is not None:
        scenes = data.embedded.images + data.embedded_val
        return scenes * data.embedded.side**2 * 3, f"at most, for {scenes:,} scenes that are drawn in the run's folder"
    indexes = [Index.open(path) for path in (data.train, data.val) if path is not None]
    if not indexes:
        return None, "no data is named"
    return sum(
        map(_index_bytes, indexes)
    ), f"the indexes, and {sum(map(len, indexes)):,} pictures by a sample of each set"


def _index_bytes(index: Index) -> int:
    """The files of an index, and its pictures by the mean size of a sample of those that are there."""
    rows = np.unique(np.linspace(0, len(index) - 1, min(len(index), SAMPLE)).astype(int))
    sizes = [path.stat().st_size for row in rows if (path := index.image_path(int(row))).is_file()]
    own = sum(path.stat().st_size for path in index.path.rglob("*") if path.is_file())
    return own + (round(len(index) * sum(sizes) / len(sizes)) if sizes else 0)
