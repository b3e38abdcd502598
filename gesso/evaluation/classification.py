"""Scores of classification: how often the true class is a model's first guess, or among its first five.

Definition: Russakovsky et al., ImageNet Large Scale Visual Recognition Challenge, IJCV 2015, section 4.1 (there as
errors).
"""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gesso.data.records import Array
from gesso.errors import DataError
from gesso.label_space import normalise

_NOT_GUESSED = np.iinfo(np.int64).max


def ranks_of_truth(scores: Array, labels: Array) -> Array:
    """The place (N,) int64 of each picture's true class among the classes by falling score; 0 is the first.

    Of classes with equal scores the one with the lower number goes first.

    Args:
        scores: (N, C) float, finite; of any kind (logits, probabilities).
        labels: (N,) integer, the true classes.

    Raises:
        DataError: a score is not finite.
    """
    if not np.isfinite(scores).all():
        row = int(np.argmin(np.isfinite(scores).all(1)))
        raise DataError(f"a score of picture {row} (counted from 0) is not finite", remedy="The model has diverged.")
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    before = np.arange(scores.shape[1]) < labels[:, None]
    ranks: Array = np.count_nonzero((scores > own) | ((scores == own) & before), axis=1)
    return ranks


def score_ranks(ranks: Array, labels: Array, names: Sequence[str]) -> dict[str, Any]:
    """The scores of N pictures; processes gather ``ranks`` and ``labels`` first.

    Args:
        ranks: (N,) integer, see ``ranks_of_truth``.
        labels: (N,) integer, the true classes.
        names: one a class.

    Returns:
        The shares of pictures, in [0, 1], ``top1`` with rank 0 and ``top5`` with a rank below 5; and ``by_class``:
        name -> top1 of the pictures of this class. None where there is no picture.
    """
    first = ranks == 0
    pictures = np.bincount(labels, minlength=len(names)).tolist()
    right = np.bincount(labels[first], minlength=len(names)).tolist()
    shares = [k / n if n else None for k, n in zip(right, pictures, strict=True)]
    return {
        "top1": float(first.mean()) if len(ranks) else None,
        "top5": float((ranks < 5).mean()) if len(ranks) else None,
        "by_class": dict(zip(names, shares, strict=True)),
    }


def score_classification(scores: Array, labels: Array, names: Sequence[str]) -> dict[str, Any]:
    """The scores of N pictures from a model's scores (N, C) and the true classes (N,); see ``score_ranks``."""
    return score_ranks(ranks_of_truth(scores, labels), labels, names)


def score_label_files(ground_truth: str | Path, predictions: str | Path) -> dict[str, Any]:
    """The scores of guesses in a CSV file.

    Names of classes are compared as label spaces do: without regard to case and white space.

    Args:
        ground_truth: CSV with the columns ``image`` and ``label``, one row an image; other columns count for nothing.
        predictions: the same, with one row or several for each image of the ground truth: its guesses, the best first
            or, with a column ``score``, by falling score.

    Returns:
        As ``score_ranks``; a class is named as in its first row. ``top5`` looks at the first five guesses that are
        given: with one guess an image it is the same as ``top1``.

    Raises:
        DataError: a file is missing, has no such columns, or a row is incomplete; an image stands twice in the ground
            truth, has no guess, or is guessed but not in the ground truth; a class is guessed twice for an image.
    """
    truth_path, path = Path(ground_truth), Path(predictions)
    truth: dict[str, str] = {}
    names: dict[str, str] = {}
    for row in _rows(truth_path):
        if row.image in truth:
            raise DataError(f"line {row.line}: the image '{row.image}' stands twice", where=truth_path)
        truth[row.image] = normalise(row.label)
        names.setdefault(truth[row.image], row.label)
    guesses: dict[str, dict[str, float]] = {image: {} for image in truth}
    for row in _rows(path):
        if row.image not in truth:
            what = f"line {row.line}: the image '{row.image}' is not in {truth_path}"
            raise DataError(what, where=path, remedy="Score against the set that was predicted.")
        label = normalise(row.label)
        if label in guesses[row.image]:
            what = f"line {row.line}: the class '{row.label}' is guessed twice for the image '{row.image}'"
            raise DataError(what, where=path, remedy="Guess each class once.")
        guesses[row.image][label] = row.score
    for image, of_image in guesses.items():
        if not of_image:
            what = f"there is no guess for the image '{image}' of {truth_path}"
            raise DataError(what, where=path, remedy="Every image needs one.")
    ranks = np.array([_rank(guesses[image], label) for image, label in truth.items()], np.int64)
    numbers = {name: number for number, name in enumerate(names)}
    labels = np.array([numbers[label] for label in truth.values()], np.int64)
    return score_ranks(ranks, labels, list(names.values()))


class _Row(NamedTuple):
    line: int
    image: str
    label: str
    score: float


def _rank(guesses: Mapping[str, float], label: str) -> int:
    """The place of ``label`` among the guesses for one image, by falling score; among equal scores as they stand."""
    ordered = sorted(guesses, key=lambda name: -guesses[name])
    return ordered.index(label) if label in guesses else _NOT_GUESSED


def _rows(path: Path) -> list[_Row]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True, skipinitialspace=True)
            columns = reader.fieldnames or ()
            for name in ("image", "label"):
                if name not in columns:
                    found = f"has the columns {', '.join(columns)}" if columns else "is empty"
                    what = f"the column '{name}' is missing: the file {found}"
                    raise DataError(what, where=path, remedy="The first line is: image,label")
            return [_row(path, reader.line_num, row) for row in reader]
    except OSError as error:
        raise DataError(error.strerror or str(error), where=path, remedy="Check the path.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"this is not a text file (byte {error.start})", where=path, remedy="Check it.") from error
    except csv.Error as error:
        raise DataError(f"line {reader.line_num}: this is not valid CSV: {error}", where=path) from error


def _row(path: Path, line: int, row: dict[str, str | None]) -> _Row:
    image, label = ((row[name] or "").strip() for name in ("image", "label"))
    if not image or not label:
        raise DataError(f"line {line}: the {'label' if image else 'image'} is missing", where=path)
    given = row.get("score", "0") or ""
    try:
        score = float(given)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise DataError(f"line {line}: the score is no finite number, but '{given}'", where=path)
    return _Row(line, image, label, score)
