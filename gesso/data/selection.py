"""A smaller data set by a rule: some of the classes, some of the images. Pictures are not copied."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gesso.data.index import Index
from gesso.data.index_writer import check_target
from gesso.data.known_spaces import counterparts, has_broad_map
from gesso.data.narrowing import Narrowing
from gesso.data.select import subset
from gesso.data.statistics import image_classes, images_with_maps
from gesso.errors import ConfigError, DataError
from gesso.label_space import LabelSpace
from gesso.random_key import fold, stream

_SELECT = stream("select")

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class DroppedClass:
    """A class that was dropped: its name, the images that showed it, and its boxes."""

    name: str
    images: int
    boxes: int


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What ``select`` took and left.

    Attributes:
        path, images, boxes: of the new index.
        kept: the names of its classes.
        dropped: the classes that were dropped.
        emptied: images that showed dropped classes alone; they are left out, or kept as negatives.
        not_drawn: images that were not drawn, in ``rest`` where it was asked for.
        rest: the index of these, or None.
        notes: what the user should know, one line each.
    """

    path: str
    images: int
    boxes: int
    kept: tuple[str, ...]
    dropped: tuple[DroppedClass, ...]
    emptied: int
    not_drawn: int
    rest: str | None
    notes: tuple[str, ...]


def select(
    index: Index,
    out: str | Path,
    *,
    classes: Collection[str] | None = None,
    keep_empty: bool = False,
    fraction: float | None = None,
    images: int | None = None,
    per_class: int | None = None,
    seed: int = 0,
    rest: str | Path | None = None,
    overwrite: bool = False,
) -> Selection:
    """Writes a new index of some classes and some images of another.

    First the classes go that are not asked for, and with them the images that showed nothing else. Then images are
    drawn, in an order that hashes the seed and the image's id: of the same index and seed, a smaller draw is a part of
    every larger one, and another data set that holds the same images draws them in the same order.

    Args:
        index: the index to take from.
        out: the folder of the new index.
        classes: the names of the classes to keep; None = all.
        keep_empty: keeps images that showed dropped classes alone, as negatives.
        fraction: the share of the images to draw, in (0, 1]; rounded to a whole number.
        images: the number of images to draw.
        per_class: draws images until every class is shown by so many (or by all that there are). Where an image shows
            one class, every class gets just this number.
        seed: another seed, another draw.
        rest: the folder for a second index, of the images that are not drawn.
        overwrite: replaces indexes that stand there.

    Raises:
        ConfigError: nothing is asked for, two draws are, a number is out of range, or options exclude one another.
        DataError: a class does not exist, nothing is left, or a folder is taken.
    """
    _require_sense(classes, {"fraction": fraction, "images": images, "per-class": per_class}, rest)
    for target in (out, rest):
        if target is not None:
            check_target(Path(target).absolute(), overwrite=overwrite)
    narrowing = Narrowing.of(index.label_space, index.label_space.names if classes is None else classes)
    shown = _Shown(index)
    notes: list[str] = []
    stay = _staying(index, shown, narrowing, keep_empty, notes)
    order = _shuffled(index, stay, seed)
    if per_class is not None:
        drawn = shown.draw(order, narrowing, per_class, notes)
    else:
        drawn = order[: _number(len(order), fraction, images)]
    others = np.setdiff1d(stay, drawn)
    if not len(drawn):
        raise DataError("no image is drawn", where=index.path, remedy="Ask for more.")
    if rest is not None and not len(others):
        raise DataError("every image is drawn, so none is left for the rest", where=index.path)
    names = narrowing.space.names if (narrowing.targets < 0).any() else None
    made = subset(index, out, np.sort(drawn), classes=names, overwrite=overwrite)
    if rest is not None:
        subset(index, rest, others, classes=names, overwrite=overwrite)
    return Selection(
        path=str(out),
        images=len(made),
        boxes=made.num_boxes,
        kept=made.label_space.names,
        dropped=shown.dropped(narrowing.targets),
        emptied=int(shown.emptied(narrowing.targets).sum()),
        not_drawn=len(others),
        rest=None if rest is None else str(rest),
        notes=tuple(notes),
    )


def choose_classes(
    space: LabelSpace,
    *,
    only: Collection[str] = (),
    without: Collection[str] = (),
    only_of: LabelSpace | None = None,
    without_of: LabelSpace | None = None,
    broad: bool = False,
) -> tuple[str, ...]:
    """The names of the classes of ``space`` that are asked for, in its order.

    Args:
        space: whose classes.
        only: names to keep; empty = all.
        without: names to drop.
        only_of, without_of: keeps, or drops, what counts as a class of another space (``known_spaces.counterparts``).
        broad: near relatives count as well: SUV as car. Only where a broad map of the two spaces is known.

    Raises:
        DataError: a name does not exist.
        ConfigError: no broad map is known, or none of the classes counts as one of the other space.
    """
    stay = {space.index(name) for name in only} if only else set(range(len(space)))
    stay -= {space.index(name) for name in without}
    for other, kept in ((only_of, True), (without_of, False)):
        if other is None:
            continue
        if broad and not has_broad_map(space, other):
            raise ConfigError("--broad: no map of near relatives is known here", remedy="Leave it out.")
        counted = {space.index(name) for name in counterparts(space, other, "broad" if broad else "strict")}
        if not counted:
            what = f"none of the {len(space)} classes counts as one of the other {len(other)}"
            raise ConfigError(what, remedy="Name classes with --classes or --without-classes.")
        stay = stay & counted if kept else stay - counted
    if broad and only_of is None and without_of is None:
        raise ConfigError("--broad widens --only-classes-of or --without-classes-of", remedy="Give one of them.")
    return tuple(space.names[label] for label in sorted(stay))


def _require_sense(
    classes: Collection[str] | None, draws: Mapping[str, float | int | None], rest: str | Path | None
) -> None:
    given = {name: value for name, value in draws.items() if value is not None}
    if len(given) > 1:
        raise ConfigError(f"--{' and --'.join(given)} exclude one another", remedy="Give one of them.")
    if classes is None and not given:
        raise ConfigError("nothing is asked for", remedy="Name classes or a number of images; see --help.")
    if rest is not None and not given:
        raise ConfigError("--rest takes what is not drawn, and nothing is", remedy="Give --fraction, for example.")
    for name, value in given.items():
        if name == "fraction" and not 0 < value <= 1:
            raise ConfigError(f"--fraction {value:g} is outside (0, 1]", remedy="0.1 is every tenth image.")
        if name != "fraction" and value < 1:
            raise ConfigError(f"--{name} {value} is below 1")


def _staying(index: Index, shown: "_Shown", narrowing: Narrowing, keep_empty: bool, notes: list[str]) -> Ints:
    """The rows of the images that stay when classes go; says what becomes of their maps."""
    if not len(narrowing.space):
        raise DataError("no class is left", where=index.path, remedy="Drop fewer of them.")
    if (narrowing.targets >= 0).all():
        if keep_empty:
            raise ConfigError("no class is dropped, so no image is emptied by it", remedy="Leave out --keep-empty.")
        return np.arange(len(index))
    if images_with_maps(index).any():
        if not len(shown.rows):
            what = "its semantic maps number all classes, so none of these can be dropped"
            raise DataError(what, where=index.path, remedy="Choose images alone, with --fraction for example.")
        notes.append("semantic maps are left out: they number all classes")
    empty = shown.emptied(narrowing.targets)
    if not keep_empty:
        stay = np.flatnonzero(~empty)
        if not len(stay):
            raise DataError("no image is left", where=index.path, remedy="Drop fewer classes.")
        return stay
    if index.verified_columns is not None and not index.num_boxes and empty.any():
        what = "an image of a dropped class would show no class at all"
        raise ConfigError(what, where=index.path, remedy="Leave out --keep-empty.")
    return np.arange(len(index))


def _number(count: int, fraction: float | None, images: int | None) -> int:
    """How many of ``count`` images to draw."""
    if images is not None and images > count:
        raise ConfigError(f"--images {images} are more than there are: {count}", remedy="Ask for fewer.")
    return round(fraction * count) if fraction is not None else count if images is None else images


def _shuffled(index: Index, rows: Ints, seed: int) -> Ints:
    """The rows in the order in which they are drawn."""
    ids = np.asarray(index.image_ids)[rows]
    return rows[np.lexsort((rows, ids, fold(seed, _SELECT, ids)))]


class _Shown:
    """The (image, class) pairs of an index, by boxes and labels, each once."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.rows, self.labels = image_classes(index)

    def emptied(self, targets: Ints) -> npt.NDArray[np.bool_]:
        """bool (N,): the image shows classes, but none that stays."""
        shows, stays = np.zeros(len(self.index), bool), np.zeros(len(self.index), bool)
        shows[self.rows] = True
        stays[self.rows[targets[self.labels] >= 0]] = True
        return shows & ~stays

    def dropped(self, targets: Ints) -> tuple[DroppedClass, ...]:
        """The classes that go."""
        count = len(targets)
        images = np.bincount(self.labels, minlength=count).tolist()
        boxes = np.bincount(self.index.labels, minlength=count).tolist()
        names = self.index.label_space.names
        return tuple(
            DroppedClass(name=names[label], images=images[label], boxes=boxes[label])
            for label in np.flatnonzero(targets < 0).tolist()
        )

    def draw(self, order: Ints, narrowing: Narrowing, per_class: int, notes: list[str]) -> Ints:
        """The rows of the images that are among the first ``per_class`` of any class that stays, rising."""
        places = np.full(len(self.index), -1, np.int64)
        places[order] = np.arange(len(order))
        labels = narrowing.targets[self.labels].astype(np.int64)
        wanted = np.flatnonzero((labels >= 0) & (places[self.rows] >= 0))
        wanted = wanted[np.lexsort((places[self.rows[wanted]], labels[wanted]))]
        labels = labels[wanted]
        counts = np.bincount(labels, minlength=len(narrowing.space))
        ranks = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
        few = [
            f"{name} ({count})" for name, count in zip(narrowing.space.names, counts, strict=True) if count < per_class
        ]
        if few:
            notes.append(f"classes with fewer than {per_class} images, of which all were drawn: {', '.join(few)}")
        return np.unique(self.rows[wanted[ranks < per_class]])
