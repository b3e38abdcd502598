"""``gesso data import | check | stats | split | select | export``. Imports no torch."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from gesso.commands.counting import counting
from gesso.commands.parsing import Result, parse, table
from gesso.data.check import CheckReport, check
from gesso.data.export import export
from gesso.data.importing import import_data
from gesso.data.index import REPORT, Index
from gesso.data.known_spaces import KNOWN, known_space
from gesso.data.readers.detect import FormatChoice
from gesso.data.select import split
from gesso.data.selection import Selection, choose_classes, select
from gesso.data.statistics import statistics
from gesso.errors import ConfigError, DataError, nearest
from gesso.label_space import LabelSpace


@dataclass(frozen=True)
class ImportArguments:
    """Reads a data set into an index: boxes are checked and repaired, and every case is written into its report."""

    source: Positional[Path]
    """A folder, or one annotation file."""
    out: Path
    """The index to make."""
    format: FormatChoice = "auto"
    """The format; auto looks."""
    split: str | None = None
    """Which split to take, where the source holds several."""
    images_root: Path | None = None
    """Where the pictures are, if not where the source says."""
    images: bool = True
    """--no-images imports the annotations alone."""
    classes_from: Path | None = None
    """An index whose categories to use, in its order; the classes are joined by name."""
    overwrite: bool = False
    """Replace an index that stands at --out."""
    json: bool = False
    """Print JSON."""


def import_(words: list[str]) -> Result:
    """``gesso data import``."""
    given = parse(ImportArguments, words, "data import")
    with counting() as count:
        summary = import_data(
            given.source,
            given.out,
            format=given.format,
            split=given.split,
            images_root=given.images_root,
            images=given.images,
            label_space=Index.open(given.classes_from).label_space if given.classes_from else None,
            overwrite=given.overwrite,
            progress=count,
        )
    more = "".join(f", {count} {what}" for what, count in (("labels", summary.labels), ("maps", summary.maps)) if count)
    lines = [f"{given.out}: {summary.images} images, {summary.boxes} boxes{more}, {summary.categories} categories"]
    if summary.issues:
        cases = sorted(summary.issues.items(), key=lambda item: -item[1])
        reports = [str(Path(part.path) / REPORT) for part in summary.splits or (summary,) if part.issues]
        lines += [table(("repaired or left out", "cases"), cases), f"Every case: {', '.join(reports)}"]
    return Result("\n".join(lines), dataclasses.asdict(summary) if given.json else None)


@dataclass(frozen=True)
class CheckArguments:
    """Finds what an import would repair or leave out, and pictures that stand in two splits. Exit code 1 if any."""

    source: Positional[Path]
    """A data set or an index."""
    against: Path | None = None
    """Another split: pictures in both are found by their content."""
    format: FormatChoice = "auto"
    """The format; auto looks."""
    split: str | None = None
    """Which split to take, where the source holds several."""
    images_root: Path | None = None
    """Where the pictures are, if not where the source says."""
    images: bool = True
    """--no-images looks at the annotations alone."""
    near_duplicates: bool = False
    """Also look for nearly equal pictures in both splits."""
    json: bool = False
    """Print JSON."""


def check_(words: list[str]) -> Result:
    """``gesso data check``."""
    given = parse(CheckArguments, words, "data check")
    report = check(
        given.source,
        against=given.against,
        format=given.format,
        split=given.split,
        images_root=given.images_root,
        images=given.images,
        near_duplicates=given.near_duplicates,
    )
    data = dataclasses.asdict(report) | {"problems": report.problems} if given.json else None
    return Result(_check_text(report), data, 1 if report.problems else 0)


def _check_text(report: CheckReport) -> str:
    parts = [f"{report.source}: {report.images} images, {report.boxes} boxes, {report.categories} categories"]
    for title, wanted in (("problem", True), ("note", False)):
        rows = [
            (
                finding.what,
                finding.count,
                "; ".join(
                    " ".join(str(part) for part in case if part not in (None, "")) for case in finding.examples[:2]
                ),
            )
            for finding in report.findings
            if finding.problem == wanted
        ]
        if rows:
            parts.append(table((title, "cases", "for example"), rows))
    parts.append(f"{report.problems} problems" if report.problems else "no problem found")
    return "\n\n".join(parts)


@dataclass(frozen=True)
class StatsArguments:
    """Counts the images, boxes and classes of an index."""

    index: Positional[Path]
    """The index."""
    json: bool = False
    """Print JSON."""


def stats(words: list[str]) -> Result:
    """``gesso data stats``."""
    given = parse(StatsArguments, words, "data stats")
    found = dataclasses.asdict(statistics(Index.open(given.index)))
    counts = [
        (key.replace("_", " "), " / ".join(map(str, value)) if isinstance(value, tuple) else value)
        for key, value in found.items()
        if key not in ("classes", "unused")
    ]
    classes = [tuple(row.values()) for row in found["classes"]]
    text = f"{table(('count', 'value'), counts)}\n\n{table(('class', 'images', 'boxes', 'share'), classes)}"
    return Result(text, found if given.json else None)


@dataclass(frozen=True)
class SplitArguments:
    """Divides an index by a hash of the image ids; duplicates and near-duplicates stay together, classes balanced."""

    index: Positional[Path]
    """The index to divide."""
    out: Path
    """The parts become OUT/train, OUT/val and OUT/test."""
    train: float | None = None
    """A share below 1, or a number of images; without it, what the other parts leave."""
    val: float | None = None
    """A share or a number of images; 0.2 where no part is given."""
    test: float | None = None
    """A share or a number of images."""
    seed: int = 0
    """Another seed, another split."""
    near_duplicates: bool = True
    """--no-near-duplicates looks for equal files only, and decodes no picture."""
    balance: bool = True
    """--no-balance takes the hash of the image id alone: an image stays in its part when others are added."""
    keep: Path | None = None
    """An earlier split of the same images: what stands in one of its parts stays there."""
    json: bool = False
    """Print JSON."""


def split_(words: list[str]) -> Result:
    """``gesso data split``."""
    given = parse(SplitArguments, words, "data split")
    index = Index.open(given.index)
    values = {name: getattr(given, name) for name in ("train", "val", "test")}
    wanted: dict[str, float | int] = {
        name: _share_or_number(name, value) for name, value in values.items() if value is not None
    }
    made = split(
        index,
        given.out,
        wanted or {"val": 0.2},
        seed=given.seed,
        near_duplicates=given.near_duplicates,
        balance=given.balance,
        keep=given.keep,
    )
    rows = [(str(part.path), part.images, part.boxes) for part in made.parts]
    data = None
    if given.json:
        parts = [{"name": p.name, "path": str(p.path), "images": p.images, "boxes": p.boxes} for p in made.parts]
        data = dataclasses.asdict(made) | {"parts": parts}
    return Result("\n".join([table(("part", "images", "boxes"), rows), *made.notes]), data)


def _share_or_number(name: str, value: float) -> float | int:
    if value < 1:
        return value
    if not value.is_integer():
        raise ConfigError(f"--{name} {value:g} is neither a share below 1 nor a number of images")
    return int(value)


@dataclass(frozen=True)
class SelectArguments:
    """Makes a smaller index: some of the classes, some of the images. Pictures are not copied."""

    index: Positional[Path]
    """The index to take from."""
    out: Path
    """The index to make."""
    classes: tuple[str, ...] = ()
    """Keep these classes alone."""
    without_classes: tuple[str, ...] = ()
    """Drop these classes."""
    only_classes_of: str | None = None
    """Keep what counts as a class of coco, voc, objects365-v1, objects365-v2, or of another index."""
    without_classes_of: str | None = None
    """Drop what counts as a class of coco, voc, objects365-v1, objects365-v2, or of another index."""
    broad: bool = False
    """Near relatives count as well: SUV as car, pigeon as bird."""
    keep_empty: bool = False
    """Keep images that showed dropped classes alone, as negatives."""
    fraction: float | None = None
    """Draw this share of the images: 0.1 is every tenth, and a part of 0.2 with the same seed."""
    images: int | None = None
    """Draw this number of images."""
    per_class: int | None = None
    """Draw images until every class is shown by this number."""
    seed: int = 0
    """Another seed, another draw."""
    rest: Path | None = None
    """A second index, of the images that are not drawn."""
    overwrite: bool = False
    """Replace indexes that stand there."""
    json: bool = False
    """Print JSON."""


def select_(words: list[str]) -> Result:
    """``gesso data select``."""
    given = parse(SelectArguments, words, "data select")
    index = Index.open(given.index)
    asked = (given.classes, given.without_classes, given.only_classes_of, given.without_classes_of, given.broad)
    classes = None
    if any(asked):
        classes = choose_classes(
            index.label_space,
            only=given.classes,
            without=given.without_classes,
            only_of=_space_of(given.only_classes_of),
            without_of=_space_of(given.without_classes_of),
            broad=given.broad,
        )
    made = select(
        index,
        given.out,
        classes=classes,
        keep_empty=given.keep_empty,
        fraction=given.fraction,
        images=given.images,
        per_class=given.per_class,
        seed=given.seed,
        rest=given.rest,
        overwrite=given.overwrite,
    )
    return Result(_select_text(made, index, given.keep_empty), dataclasses.asdict(made) if given.json else None)


def _space_of(word: str | None) -> LabelSpace | None:
    """The label space that is known by a name, or that of an index."""
    if word is None or word in KNOWN:
        return None if word is None else known_space(word)
    if not Path(word).exists():
        remedy = nearest(word, KNOWN)
        raise DataError(f"'{word}' is neither a label space that is known by name nor an index", remedy=remedy)
    return Index.open(word).label_space


def _select_text(made: Selection, index: Index, keep_empty: bool) -> str:
    lines = [
        f"{made.path}: {made.images} images of {len(index)}, {made.boxes} boxes of {index.num_boxes}, "
        f"{len(made.kept)} categories of {len(index.label_space)}",
        f"kept: {', '.join(made.kept)}",
    ]
    if made.dropped:
        rows = [(one.name, one.images, one.boxes) for one in made.dropped]
        lines.append(table(("dropped class", "images", "boxes"), rows))
    if made.emptied:
        fate = "kept as negatives" if keep_empty else "left out"
        lines.append(f"{made.emptied} images that showed dropped classes alone: {fate}")
    if made.not_drawn:
        lines.append(f"{made.not_drawn} images not drawn" + (f": {made.rest}" if made.rest else ""))
    return "\n".join([*lines, *made.notes])


@dataclass(frozen=True)
class ExportArguments:
    """Writes an index as COCO JSON, VOC XML or YOLO; what the format cannot hold is said."""

    index: Positional[Path]
    """The index."""
    out: Path
    """A new folder (or, for COCO, a .json file)."""
    format: Literal["coco", "voc", "yolo"] = "coco"
    """The format."""
    pictures: Literal["none", "link", "copy"] = "none"
    """Bring the pictures too."""
    overwrite: bool = False
    """Replace an earlier export."""
    json: bool = False
    """Print JSON."""


def export_(words: list[str]) -> Result:
    """``gesso data export``."""
    given = parse(ExportArguments, words, "data export")
    losses = export(
        Index.open(given.index), given.out, given.format, pictures=given.pictures, overwrite=given.overwrite
    )
    text = "\n".join([f"wrote {given.out}", *(f"not kept: {loss}" for loss in losses)])
    return Result(text, {"out": str(given.out), "not_kept": losses} if given.json else None)
