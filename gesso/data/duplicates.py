"""Pictures that are the same or nearly the same: by content hash, and by a perceptual hash that is then verified.

Two pictures are near-duplicates where their 64-bit difference hashes (dHash: the sign of the horizontal gradient of the
picture shrunk to 9x8 grey pixels; N. Krawetz, "Kind of Like That", 2013) differ in at most ``distance`` bits and their
16x16 grey thumbnails correlate by at least ``CORRELATION``. The second test is ours: a hash of 64 bits alone joins
pictures that merely share a bright upper half. A flat picture (no texture left in its thumbnail) has no near-duplicate.

Candidates are found in sorted tables (Manku, Jain and Das Sarma, "Detecting near-duplicates for web crawling", WWW
2007): the hash is cut in ``distance + 3`` bands, and two hashes within the distance agree in at least three of them.
A pair is compared in the first table in which it agrees, and only while its pictures are in different groups. In each
table neighbours come first, so that the alike pictures of a static camera are one group before their pairs are listed.
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


def near_pairs(hashes: npt.NDArray[np.uint64], distance: int, groups: Ints) -> Iterator[tuple[Ints, Ints]]:
    """Pairs of rows (a, b) of different groups whose hashes differ in at most ``distance`` bits, in pieces.

    A pair may come twice.

    Args:
        hashes: uint64 (N,), in rising order, so that the neighbours in a table are those that differ least.
        distance: 0 to 8.
        groups: int64 (N,), the group of each row. The caller may join groups in it, in place, between the pieces.

    Raises:
        ConfigError: the distance is not within 0..8.
    """
    if not 0 <= distance <= MAX_DISTANCE:
        raise ConfigError(f"a distance of {distance} bits between near-duplicates", remedy=f"Use 0 to {MAX_DISTANCE}.")
    bands = distance + 3
    edges = [64 * band // bands for band in range(bands + 1)]
    masks = [np.uint64(((1 << (high - low)) - 1) << low) for low, high in itertools.pairwise(edges)]
    for chosen in itertools.combinations(range(bands), 3):
        keys = hashes & np.bitwise_or.reduce([masks[band] for band in chosen])
        others = [masks[band] for band in range(chosen[-1]) if band not in chosen]
        for a, b in _candidates(keys, groups):
            differing = hashes[a] ^ hashes[b]
            near = (groups[a] != groups[b]) & (np.bitwise_count(differing) <= distance)
            for mask in others:  # a pair that agrees here too was in an earlier table
                near &= (differing & mask) != 0
            if near.any():
                yield a[near], b[near]


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
    rows = rows[np.argsort(prints.hashes[rows], kind="stable")]
    groups = np.arange(len(rows), dtype=np.int64)
    for a, b in near_pairs(prints.hashes[rows], distance, groups):
        left, right = prints.thumbnails[rows[a]], prints.thumbnails[rows[b]]
        alike = np.einsum("nd,nd->n", left, right) >= CORRELATION
        groups[:] = join(groups, a[alike], b[alike])
    return join(labels, rows, rows[groups])


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


def _candidates(keys: npt.NDArray[np.uint64], groups: Ints) -> Iterator[tuple[Ints, Ints]]:
    """The pairs of rows with one key, in pieces: neighbours first, then all that are of different groups by then."""
    order = np.argsort(keys, kind="stable").astype(np.int64)
    equal = np.flatnonzero(np.diff(keys[order]) == 0)
    for first in range(0, len(equal), _PAIRS_AT_ONCE):
        at = equal[first : first + _PAIRS_AT_ONCE]
        yield order[at], order[at + 1]
    rows = order[np.union1d(equal, equal + 1)]
    if len(rows):
        rows = rows[np.lexsort((groups[rows], keys[rows]))]
        for a, b in _pairs_between_groups(keys[rows], groups[rows]):
            yield rows[a], rows[b]


def _pairs_between_groups(keys: npt.NDArray[np.uint64], groups: Ints) -> Iterator[tuple[Ints, Ints]]:
    """All pairs of positions with one key and different groups, in pieces of about 2**18 pairs; both are sorted."""
    new_key = np.diff(keys) != 0
    group_ends = _run_ends(new_key | (np.diff(groups) != 0))
    after = _run_ends(new_key) - group_ends
    first = np.flatnonzero(after)
    total = np.cumsum(after[first])
    at = 0
    while at < len(first):
        done = total[at - 1] if at else 0
        stop = max(at + 1, int(np.searchsorted(total, done + _PAIRS_AT_ONCE, side="right")))
        counts = after[first[at:stop]]
        a = np.repeat(first[at:stop], counts)
        offset = np.arange(len(a)) - np.repeat(np.cumsum(counts) - counts, counts)
        yield a, group_ends[a] + offset
        at = stop


def _run_ends(borders: npt.NDArray[np.bool_]) -> Ints:
    """int64 (N,): the end of each position's run; ``borders`` (N - 1,) says where the next position is of another."""
    ends = np.append(np.flatnonzero(borders) + 1, len(borders) + 1)
    return np.repeat(ends, np.diff(ends, prepend=0)).astype(np.int64)
