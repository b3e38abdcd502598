"""Pictures that are the same or nearly the same: by content hash, and by a perceptual hash that is then verified.

Two pictures are near-duplicates where their 64-bit difference hashes (dHash: the sign of the horizontal gradient of the
picture shrunk to 9x8 grey pixels; N. Krawetz, "Kind of Like That", 2013) differ in at most ``distance`` bits and their
16x16 grey thumbnails correlate by at least ``CORRELATION``. The second test is ours: a hash of 64 bits alone joins
pictures that merely share a bright upper half. A flat picture (no texture left in its thumbnail) has no near-duplicate.

Candidates are found in sorted tables (Manku, Jain and Das Sarma, "Detecting near-duplicates for web crawling", WWW
2007): the hash is cut in ``distance + 3`` bands, and two hashes within the distance agree in at least three of them.
"""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from gesso.errors import ConfigError

THUMBNAIL = 16
CORRELATION = 0.99
FLAT = 4.0
DISTANCE = 5
MAX_DISTANCE = 8
_PAIRS_AT_ONCE = 1 << 18

Ints = npt.NDArray[np.int64]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Fingerprints:
    """What is compared of N pictures.

    Args:
        hashes: uint64 (N,), the difference hash.
        thumbnails: float32 (N, 256), grey, mean 0 and length 1; zero where the picture is flat or cannot be read.
        usable: bool (N,), False where the picture is flat or cannot be read.
    """

    hashes: npt.NDArray[np.uint64]
    thumbnails: npt.NDArray[np.float32]
    usable: npt.NDArray[np.bool_]


def difference_hash(grey: npt.NDArray[np.uint8]) -> int:
    """The 64-bit dHash of grey (H, W) uint8: bit 8 y + x says whether pixel (x + 1, y) of 9x8 is the brighter."""
    small = cv2.resize(grey, (9, 8), interpolation=cv2.INTER_AREA).astype(np.int16)
    bits = (small[:, 1:] > small[:, :-1]).ravel()
    return int(np.packbits(bits, bitorder="little").view(np.uint64)[0])


def fingerprint(path: Path) -> tuple[int, npt.NDArray[np.float32]] | None:
    """The hash and the (256,) thumbnail of one picture; None where it is flat or cannot be read."""
    grey = _read_grey(path)
    if grey is None:
        return None
    thumbnail = cv2.resize(grey, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA).astype(np.float32).ravel()
    thumbnail -= thumbnail.mean()
    length = float(np.linalg.norm(thumbnail))
    if length < FLAT * THUMBNAIL:
        return None
    return difference_hash(grey), (thumbnail / length).astype(np.float32)


def fingerprints(paths: Sequence[Path | None], *, progress: Progress | None = None) -> Fingerprints:
    """Reads the pictures with one thread a core; None stands for a picture that is not to be read.

    ``progress(done, all)`` is called every hundred pictures.
    """
    count = len(paths)
    hashes = np.zeros(count, np.uint64)
    thumbnails = np.zeros((count, THUMBNAIL * THUMBNAIL), np.float32)
    usable = np.zeros(count, bool)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for first in range(0, count, 1000):
            for row, found in enumerate(pool.map(_fingerprint_or_none, paths[first : first + 1000]), start=first):
                if found is not None:
                    hashes[row], thumbnails[row], usable[row] = found[0], found[1], True
                if progress is not None and (row + 1) % 100 == 0:
                    progress(row + 1, count)
    if progress is not None:
        progress(count, count)
    return Fingerprints(hashes, thumbnails, usable)


def near_pairs(hashes: npt.NDArray[np.uint64], distance: int) -> Iterator[tuple[Ints, Ints]]:
    """Pairs of rows (a, b) whose hashes differ in at most ``distance`` bits, in pieces; a pair may come several times.

    Raises:
        ConfigError: the distance is not within 0..8.
    """
    if not 0 <= distance <= MAX_DISTANCE:
        raise ConfigError(f"a distance of {distance} bits between near-duplicates", remedy=f"Use 0 to {MAX_DISTANCE}.")
    bands = distance + 3
    edges = [64 * band // bands for band in range(bands + 1)]
    masks = [((1 << (high - low)) - 1) << low for low, high in itertools.pairwise(edges)]
    for chosen in itertools.combinations(masks, 3):
        keys = hashes & np.uint64(sum(chosen))
        order = np.argsort(keys, kind="stable").astype(np.int64)
        for a, b in _pairs_of_runs(keys[order]):
            left, right = order[a], order[b]
            near = np.bitwise_count(hashes[left] ^ hashes[right]) <= distance
            if near.any():
                yield left[near], right[near]


def join(labels: Ints, a: Ints, b: Ints) -> Ints:
    """Joins the groups of rows ``a`` with those of rows ``b``; ``labels[i]`` is the first row of i's group."""
    labels = labels.copy()
    while True:
        left, right = labels[a], labels[b]
        differ = left != right
        if not differ.any():
            return labels
        a, b = a[differ], b[differ]
        left, right = left[differ], right[differ]
        np.minimum.at(labels, np.maximum(left, right), np.minimum(left, right))
        while True:
            shorter = labels[labels]
            if np.array_equal(shorter, labels):
                break
            labels = shorter


def group_equal(content: npt.NDArray[np.uint64], known: npt.NDArray[np.bool_]) -> Ints:
    """int64 (N,): the first row with the same content hash, or the row itself; rows that are not known stay alone."""
    labels = np.arange(len(content), dtype=np.int64)
    rows = np.flatnonzero(known)
    if len(rows):
        _, first, inverse = np.unique(content[rows], return_index=True, return_inverse=True)
        labels[rows] = rows[first[inverse]]
    return labels


def group_near(labels: Ints, prints: Fingerprints, *, distance: int = DISTANCE) -> Ints:
    """Joins near-duplicates into the groups ``labels`` (as from ``group_equal``). Returns the new labels.

    Groups are closed under the relation: a near b and b near c puts a and c together.
    """
    rows = np.flatnonzero(prints.usable & (labels == np.arange(len(labels))))
    for a, b in near_pairs(prints.hashes[rows], distance):
        left, right = rows[a], rows[b]
        apart = labels[left] != labels[right]
        left, right = left[apart], right[apart]
        if len(left):
            alike = np.einsum("nd,nd->n", prints.thumbnails[left], prints.thumbnails[right]) >= CORRELATION
            labels = join(labels, left[alike], right[alike])
    return labels


def _fingerprint_or_none(path: Path | None) -> tuple[int, npt.NDArray[np.float32]] | None:
    return None if path is None else fingerprint(path)


def _read_grey(path: Path) -> npt.NDArray[np.uint8] | None:
    try:
        data = np.fromfile(path, np.uint8)
    except OSError:
        return None
    if not len(data):
        return None
    try:
        grey = cv2.imdecode(data, cv2.IMREAD_REDUCED_GRAYSCALE_4)
        if grey is not None and min(grey.shape) < 2 * THUMBNAIL:
            grey = cv2.imdecode(data, cv2.IMREAD_GRAYSCALE)
    except cv2.error:
        return None
    return None if grey is None else np.asarray(grey, np.uint8)


def _pairs_of_runs(keys: npt.NDArray[np.uint64]) -> Iterator[tuple[Ints, Ints]]:
    """All pairs of positions within each run of equal sorted ``keys``, in pieces of about 2**18 pairs."""
    if len(keys) < 2:
        return
    starts = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
    ends = np.append(starts[1:], len(keys))
    after = np.repeat(ends, ends - starts) - np.arange(len(keys)) - 1
    first = np.flatnonzero(after > 0)
    after = after[first]
    at = 0
    total = np.cumsum(after)
    while at < len(first):
        done = total[at - 1] if at else 0
        stop = max(at + 1, int(np.searchsorted(total, done + _PAIRS_AT_ONCE, side="right")))
        counts = after[at:stop]
        a = np.repeat(first[at:stop], counts)
        offset = np.arange(len(a)) - np.repeat(np.cumsum(counts) - counts, counts)
        yield a.astype(np.int64), (a + 1 + offset).astype(np.int64)
        at = stop
