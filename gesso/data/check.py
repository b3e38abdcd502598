"""Checks a data set: what import would find, without importing, and pictures that stand in two splits."""

import contextlib
import itertools
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gesso.data.duplicates import DISTANCE, fingerprints, group_near
from gesso.data.importing import Progress, import_data
from gesso.data.index import Index
from gesso.data.joining import TURNED
from gesso.data.maps import look_through_index
from gesso.data.pictures import read_headers
from gesso.data.records import Array
from gesso.data.semantic import VOID
from gesso.data.statistics import Statistics, images_with_labels, images_with_maps, statistics
from gesso.label_space import LabelSpace

EXAMPLES = 5
LEAK = "picture in both splits"
NEAR_LEAK = "nearly the same picture in both splits"
_HEAD = "index.json"

_LEGAL = frozenset((TURNED,))


class Example(NamedTuple):
    """One case: the image's name ("" for none), the annotation's id in the source (None for none), and details."""

    image: str
    annotation_id: int | None
    detail: str


@dataclass(frozen=True)
class Finding:
    """All cases of one kind.

    Attributes:
        what: the kind, in few words.
        count: how many cases.
        problem: True where something is wrong; False for what is worth knowing and legal.
        examples: the first few.
    """

    what: str
    count: int
    problem: bool
    examples: tuple[Example, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """What a check found.

    Attributes:
        source: what was checked.
        images, boxes, categories: what an import would keep.
        findings: problems first, then notes; within each the most frequent first.
    """

    source: str
    images: int
    boxes: int
    categories: int
    findings: tuple[Finding, ...]

    @property
    def problems(self) -> int:
        """The number of cases that are wrong; 0 = the data set is sound."""
        return sum(finding.count for finding in self.findings if finding.problem)


def check(
    source: str | Path | Index,
    *,
    against: str | Path | Index | None = None,
    format: str = "auto",
    split: str | None = None,
    images_root: str | Path | None = None,
    images: bool = True,
    near_duplicates: bool = False,
    label_space: LabelSpace | None = None,
    progress: Progress | None = None,
) -> CheckReport:
    """Finds what is wrong with a data set and leaves nothing behind.

    A source is imported into a temporary folder, so the findings are those of an import. Of an index, the pictures
    are read again (missing, broken, changed since the import); what its import mended is listed as notes. Pictures
    that stand in two splits of the source, or in ``against`` too, are found by their content hash.

    Args:
        source: a folder or annotation file, or an index (or its folder).
        against: another split, in either form.
        format: of sources: auto or one of ``readers.detect.Format``.
        split: the one split of ``source`` to check; None = all that it holds.
        images_root: where the pictures of ``source`` are; None = where the format puts them.
        images: False checks the annotations alone and reads no picture.
        near_duplicates: between splits, notes pictures that are nearly the same too; decodes all pictures.
        label_space: the categories to join by name, as in import.
        progress: told how far the reading is, as in import.

    Raises:
        DataError: the source cannot be read at all, or names a category that does not exist, or an index is damaged.
    """
    findings = _Findings()
    with contextlib.ExitStack() as stack:
        opener = _Opener(stack, format=format, images=images, label_space=label_space, progress=progress)
        parts = opener.open(source, split=split, images_root=images_root)
        hashes, counts = [], []
        for part in parts:
            hashes.append(_check_import(part, findings, images=images, progress=progress))
            counts.append(statistics(part.index))
            _add_counts(part.index, counts[-1], hashes[-1], findings)
        near = near_duplicates and images
        for (one, some), (two, more) in itertools.combinations(zip(parts, hashes, strict=True), 2):
            _compare(one.index, some, two.index, more, findings, near=near)
        for other in [] if against is None else opener.open(against, split=None, images_root=None):
            theirs = np.asarray(other.index.content_hashes)
            theirs = theirs if theirs.all() or not images else _hashes(other.index)
            for part, some in zip(parts, hashes, strict=True):
                _compare(part.index, some, other.index, theirs, findings, near=near)
    return CheckReport(
        source=str(source.path if isinstance(source, Index) else source),
        images=sum(count.images for count in counts),
        boxes=sum(count.boxes for count in counts),
        categories=len(parts[0].index.label_space),
        findings=findings.sorted(),
    )


@dataclass(frozen=True)
class _Part:
    """One split that is checked; ``temporary`` where it was imported for the check."""

    index: Index
    temporary: bool


class _Opener:
    """Opens indexes, and imports everything else into temporary folders that ``stack`` removes."""

    def __init__(
        self,
        stack: contextlib.ExitStack,
        *,
        format: str,
        images: bool,
        label_space: LabelSpace | None,
        progress: Progress | None,
    ) -> None:
        self._stack = stack
        self._format = format
        self._images = images
        self._label_space = label_space
        self._progress = progress

    def open(self, source: str | Path | Index, *, split: str | None, images_root: str | Path | None) -> list[_Part]:
        """The splits of ``source``."""
        if isinstance(source, Index):
            return [_Part(source, False)]
        if (Path(source) / _HEAD).is_file():
            return [_Part(Index.open(source), False)]
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="gesso-check-")))
        summary = import_data(
            source,
            folder / "index",
            format=self._format,
            split=split,
            images_root=images_root,
            images=self._images,
            label_space=self._label_space,
            hash_images=self._images,
            progress=self._progress,
        )
        return [_Part(Index.open(made.path), True) for made in summary.splits or (summary,)]


class _Findings:
    """Counts cases by kind and keeps the first few of each."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, bool], int] = {}
        self._examples: dict[tuple[str, bool], list[Example]] = {}

    def add(self, what: str, example: Example, *, problem: bool) -> None:
        self.add_many(what, 1, (example,), problem=problem)

    def add_many(self, what: str, count: int, examples: Iterable[Example], *, problem: bool) -> None:
        if not count:
            return
        key = (what, problem)
        self._counts[key] = self._counts.get(key, 0) + count
        kept = self._examples.setdefault(key, [])
        kept.extend(list(examples)[: EXAMPLES - len(kept)])

    def sorted(self) -> tuple[Finding, ...]:
        found = [
            Finding(what, count, problem, tuple(self._examples[what, problem]))
            for (what, problem), count in self._counts.items()
        ]
        return tuple(sorted(found, key=lambda finding: (not finding.problem, -finding.count, finding.what)))


def _check_import(part: _Part, findings: _Findings, *, images: bool, progress: Progress | None) -> Array:
    """Adds the import report, and for an index what has become of its pictures. Returns their content hashes.

    Raises:
        DataError: a column of an index is not what was written.
    """
    if not part.temporary:
        part.index.verify()
    for issue in part.index.iter_issues():
        what = issue.what if part.temporary else f"mended at import: {issue.what}"
        detail = ", ".join(word for word in (issue.action, issue.detail) if word)
        problem = part.temporary and issue.what not in _LEGAL
        findings.add(what, Example(issue.image, issue.annotation_id, detail), problem=problem)
    if part.temporary or not images:
        return np.asarray(part.index.content_hashes)
    _check_maps(part.index, findings, progress)
    return _check_pictures(part.index, findings, progress)


def _check_maps(index: Index, findings: _Findings, progress: Progress | None) -> None:
    """Reads all semantic maps of an index, and notes classes that none of them shows."""
    if not images_with_maps(index).any():
        return
    seen = np.zeros(VOID + 1, bool)
    tell = None if progress is None else lambda done: progress("pictures", done, len(index))
    for row, found in enumerate(look_through_index(index, progress=tell)):
        if found.what:
            findings.add(found.what, Example(index.name(row), None, found.detail), problem=True)
        seen |= found.values
    names = index.label_space.names
    absent = [Example("", None, name) for name, shown in zip(names, seen[1:], strict=False) if not shown]
    findings.add_many("class in no semantic map", len(absent), absent, problem=False)


def _check_pictures(index: Index, findings: _Findings, progress: Progress | None) -> Array:
    """Reads all pictures of an index again. Returns their content hashes, 0 where a picture cannot be read."""
    hashes = np.zeros(len(index), np.uint64)
    known = np.asarray(index.content_hashes)
    paths = (index.image_path(row) for row in range(len(index)))
    tell = None if progress is None else lambda done: progress("pictures", done, len(index))
    for row, header in enumerate(read_headers(paths, progress=tell)):
        name = index.name(row)
        if header.problem:
            findings.add(header.problem, Example(name, None, header.detail), problem=True)
            continue
        hashes[row] = header.content_hash
        size = (int(index.widths[row]), int(index.heights[row]))
        if header.transposed != size and all(size):
            detail = f"{size[0]}x{size[1]} in the index, {header.transposed[0]}x{header.transposed[1]} in the file"
            findings.add("picture has another size", Example(name, None, detail), problem=True)
        elif known[row] and known[row] != hashes[row]:
            findings.add("picture has changed since the import", Example(name, None, ""), problem=True)
    return hashes


def _add_counts(index: Index, counts: Statistics, hashes: Array, findings: _Findings) -> None:
    def note(what: str, rows: Array, detail: str = "") -> None:
        examples = (Example(index.name(int(row)), None, detail) for row in rows[:EXAMPLES])
        findings.add_many(what, len(rows), examples, problem=False)

    if not counts.images:
        findings.add("no image", Example("", None, "nothing to train on"), problem=True)
    elif not (counts.boxes or counts.labels or counts.maps):
        what = "no box, no label of a picture and no semantic map at all"
        findings.add(what, Example("", None, "nothing can be trained on it"), problem=True)
    bare = (np.diff(index.offsets) == 0) & ~images_with_labels(index) & ~images_with_maps(index)
    note("picture without a box (negative)", np.flatnonzero(bare))
    unknown = (np.asarray(index.widths) <= 0) | (np.asarray(index.heights) <= 0)
    note("picture of unknown size", np.flatnonzero(unknown))
    for what, count in (
        ("crowd box", counts.crowd),
        ("ignored box", counts.ignore),
        ("difficult box", counts.difficult),
    ):
        findings.add_many(what, count, (), problem=False)
    split = index.sources[0].split
    unused = [Example("", None, f"{name} (in {split})" if split else name) for name in counts.unused]
    findings.add_many("class without images", len(unused), unused, problem=False)
    _, first, copies = np.unique(hashes, return_index=True, return_inverse=True)
    again = np.flatnonzero((first[copies] != np.arange(len(hashes))) & (hashes != 0))
    examples = (
        Example(index.name(int(row)), None, f"same content as {index.name(int(first[copies[row]]))}")
        for row in again[:EXAMPLES]
    )
    findings.add_many("picture stands twice", len(again), examples, problem=False)


def _compare(index: Index, hashes: Array, other: Index, theirs: Array, findings: _Findings, *, near: bool) -> None:
    for space, beside, where in (
        (index.label_space, other.label_space, "here"),
        (other.label_space, index.label_space, "in the other split"),
    ):
        dropped = [Example("", None, name) for name in space.map_to(beside).dropped]
        findings.add_many(f"class only {where}", len(dropped), dropped, problem=False)
    both = np.isin(hashes, theirs[theirs != 0]) & (hashes != 0)
    rows = np.flatnonzero(both)
    twin = {int(value): row for row, value in reversed(list(enumerate(theirs.tolist())))} if len(rows) else {}
    examples = (
        Example(index.name(int(row)), None, f"the same as {other.name(twin[int(hashes[row])])}")
        for row in rows[:EXAMPLES]
    )
    findings.add_many(LEAK, len(rows), examples, problem=True)
    if near:
        pairs = list(_near_pairs(index, other, np.flatnonzero(~both)))
        near_examples = (Example(index.name(a), None, f"nearly the same as {other.name(b)}") for a, b in pairs)
        findings.add_many(NEAR_LEAK, len(pairs), near_examples, problem=False)


def _hashes(index: Index) -> Array:
    paths = (index.image_path(row) for row in range(len(index)))
    return np.array([header.content_hash for header in read_headers(paths)], np.uint64)


def _near_pairs(index: Index, other: Index, rows: Array) -> Iterator[tuple[int, int]]:
    """(row here, row there) for each of ``rows`` that falls into one group of near-duplicates with a picture there."""
    paths = [index.image_path(int(row)) for row in rows] + [other.image_path(row) for row in range(len(other))]
    prints = fingerprints(paths)
    labels = group_near(np.arange(len(paths), dtype=np.int64), prints, distance=DISTANCE)
    there = {int(label): row for row, label in reversed(list(enumerate(labels[len(rows) :])))}
    for row, label in zip(rows.tolist(), labels[: len(rows)].tolist(), strict=True):
        if label in there:
            yield row, there[label]
