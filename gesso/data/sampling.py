"""One endless stream of global batches, a pure function of (seed, number of the first sample).

All pictures of a batch have one shape. Each shape has its own endless stream: one random order of its pictures an
epoch, and an epoch's remainder flows into the next. Which shape batch t takes follows a golden-ratio sequence (Weyl
sequence, H. Weyl 1916), in which every shape's share of any stretch of batches is nearly exact, so that every picture
is seen equally often. The whole state is one integer: the number of the next sample. Needs numpy only.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gesso.errors import ConfigError, DataError
from gesso.random_key import fold, integer, stream

ORDER, OFFSET, SCALE = (stream(f"sampling.{name}") for name in ("order", "offset", "scale"))
SPARES = 16
_GOLDEN = 0x9E3779B97F4A7C15
_TURN = 1 << 64
_CHUNK = 1 << 20

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """What one rank does for one global batch of which it takes b samples.

    Attributes:
        number: t, the batch's number in the stream.
        shape, scale: the numbers of the padded shape and of the short side, equal on all ranks.
        rows: (b,) int64, rows of the index.
        spares: (b, SPARES) int64, the rows that replace each one where it is broken: the next ones in order.
        keys: (b,) int64, the samples' keys.
    """

    number: int
    shape: int
    scale: int
    rows: Ints
    spares: Ints
    keys: Ints


class BatchStream:
    """The endless stream of batches of one rank.

    Args:
        shapes: (N,) the shape number of each picture (``KeepRatio.assign``).
        seed: of the run or stage.
        batch_size: of the global batch, over all ranks.
        num_scales: how many short sides there are to draw from, one a global batch.
        first_sample: a multiple of ``batch_size``.
        rank, world: this process takes the rank-th contiguous slice of each global batch.

    Raises:
        DataError: there is no picture.
        ConfigError: the batch cannot be divided among the processes, or ``first_sample`` is within a batch.
    """

    def __init__(
        self,
        shapes: npt.ArrayLike,
        *,
        seed: int,
        batch_size: int,
        num_scales: int = 1,
        first_sample: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        numbers = np.asarray(shapes)
        if not numbers.size:
            raise DataError("the data set has no picture to train on")
        if batch_size < 1 or batch_size % world:
            raise ConfigError(
                f"a batch of {batch_size} cannot be divided among {world} processes",
                remedy="Make the batch size a multiple of their number.",
            )
        if first_sample < 0 or first_sample % batch_size:
            raise ConfigError(f"the first sample {first_sample} is not a multiple of the batch size {batch_size}")
        self.seed, self.batch_size, self.num_scales = seed, batch_size, num_scales
        self.rank, self.world = rank, world
        self.number = first_sample // batch_size
        self._members: list[npt.NDArray[np.int32]] = []
        self._shapes = np.unique(numbers).tolist()
        for shape in self._shapes:
            self._members.append(np.flatnonzero(numbers == shape).astype(np.int32))
        self._ends = _thresholds([len(members) for members in self._members])
        self._offset = (fold(seed, OFFSET, 0) << 32) | fold(seed, OFFSET, 1)
        self._counts = self._count(0, self.number)
        self._orders: dict[tuple[int, int], npt.NDArray[np.int32]] = {}

    @property
    def sample(self) -> int:
        """The number of the next batch's first sample: the whole state."""
        return self.number * self.batch_size

    def __iter__(self) -> Iterator[BatchPlan]:
        return self

    def __next__(self) -> BatchPlan:
        number = self.number
        bucket = int(self._buckets(number, number + 1)[0])
        share = self.batch_size // self.world
        first = int(self._counts[bucket]) * self.batch_size + self.rank * share
        rows = self._rows(bucket, first, share + SPARES)
        windows = np.lib.stride_tricks.sliding_window_view(rows, SPARES + 1)
        samples = number * self.batch_size + self.rank * share + np.arange(share, dtype=np.int64)
        plan = BatchPlan(
            number=number,
            shape=self._shapes[bucket],
            scale=integer(self.seed, SCALE, number, high=self.num_scales),
            rows=rows[:share],
            spares=windows[:, 1:].copy(),
            keys=fold(np.int64(self.seed), samples),
        )
        self._counts[bucket] += 1
        self.number += 1
        return plan

    def _buckets(self, start: int, end: int) -> Ints:
        """The bucket of each of the batches ``start`` to ``end``."""
        steps = np.arange(end - start, dtype=np.uint64) * np.uint64(_GOLDEN)
        points = steps + np.uint64((self._offset + start * _GOLDEN) % _TURN)
        return np.searchsorted(self._ends, points, side="right").astype(np.int64)

    def _count(self, start: int, end: int) -> Ints:
        """How many of the batches ``start`` to ``end`` each bucket has."""
        counts = np.zeros(len(self._members), np.int64)
        for at in range(start, end, _CHUNK):
            counts += np.bincount(self._buckets(at, min(at + _CHUNK, end)), minlength=len(counts))
        return counts

    def _rows(self, bucket: int, first: int, count: int) -> Ints:
        """The rows at the positions ``first`` to ``first + count`` of a bucket's endless stream."""
        size = len(self._members[bucket])
        found = []
        while count > 0:
            epoch, at = divmod(first, size)
            take = min(count, size - at)
            found.append(self._order(bucket, epoch)[at : at + take])
            first, count = first + take, count - take
        rows: Ints = np.concatenate(found).astype(np.int64)
        return rows

    def _order(self, bucket: int, epoch: int) -> npt.NDArray[np.int32]:
        """The rows of a bucket in the random order of one epoch: sorted by their hashes."""
        if (bucket, epoch) not in self._orders:
            for old in [key for key in self._orders if key[0] == bucket and key[1] < epoch - 1]:
                del self._orders[old]
            members = self._members[bucket]
            hashes = fold(np.int64(self.seed), ORDER, np.int64(epoch), members.astype(np.int64))
            self._orders[bucket, epoch] = members[np.argsort(hashes, kind="stable")]
        return self._orders[bucket, epoch]


def _thresholds(sizes: list[int]) -> npt.NDArray[np.uint64]:
    """Where in [0, 2**64) the share of each bucket but the last ends; exact in integers."""
    total, ends, seen = sum(sizes), [], 0
    for size in sizes[:-1]:
        seen += size
        ends.append(seen * _TURN // total)
    return np.array(ends, np.uint64)
