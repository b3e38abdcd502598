"""A trained classifier: the classes of whole pictures, and top-1 accuracy on an index."""

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from gesso import distributed, files
from gesso.data.index import Index
from gesso.data.loading import picture_batches
from gesso.evaluation.classification import ranks_of_truth, score_ranks
from gesso.evaluation.predict import outputs
from gesso.run.data import picture_labels
from gesso.run.trained import TrainedModel, known

GUESSES = 5
FILE = "guesses.csv"


@dataclass(frozen=True, kw_only=True)
class Guesses:
    """The likeliest classes of N pictures.

    Attributes:
        rows: (N,) int64, the pictures' rows in the index, or places among the given ones.
        labels: (N, G) int64 in the classifier's label space, the likeliest first.
        scores: (N, G) float32, their probabilities.
    """

    rows: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedClassifier(TrainedModel[Guesses]):
    """A classifier with what it needs to be used."""

    primary: ClassVar[str] = "top1"
    shown: ClassVar[tuple[str, ...]] = ("top1", "top5")

    def predict(
        self, pictures: list[Path], *, progress: Callable[[int], None] | None = None
    ) -> tuple[Guesses, list[str]]:
        """The likeliest classes of each picture that can be read, and what is wrong with the others."""
        batches = picture_batches(pictures, self.input, batch_size=self.batch_size)
        parts = []
        for batch, _, logits in outputs(
            self.ready, batches, device=self.device, precision=self.precision, progress=progress
        ):
            rows = batch.image_index.numpy()
            parts.append(_guesses(rows[rows >= 0], logits.double().cpu().numpy()[rows >= 0]))
        return _joined(parts, len(self.label_space)), [str(broken.error) for broken in batches.broken]

    def evaluate(
        self, index: Index, *, workers: int = 0, progress: Callable[[int], None] | None = None
    ) -> tuple[dict[str, Any], Guesses]:
        """top1, top5 and by_class of the pictures with exactly one class, and the guesses for all pictures.

        A guess of a class that the index lacks is wrong. A score is -1 where there is nothing to measure on.

        Raises:
            DataError: the classifier and the index share no category, or the model has diverged.
        """
        columns, width = self._columns(index)
        truth = picture_labels(index)
        parts, ranks, labels = [], [], []
        for batch, _, logits in self.outputs(index, workers=workers, progress=progress):
            rows = batch.image_index.numpy()
            scores = logits.double().cpu().numpy()[rows >= 0]
            rows = rows[rows >= 0]
            parts.append(_guesses(rows, scores))
            told = truth[rows] >= 0
            ranks.append(ranks_of_truth(_spread(scores[told], columns, width), truth[rows[told]]))
            labels.append(truth[rows[told]])
        own = [np.concatenate([np.zeros(0, np.int64), *part]) for part in (ranks, labels)]
        every = [distributed.gather_array(part) for part in own]
        found = _joined(parts, len(self.label_space))
        found = Guesses(
            rows=distributed.gather_array(found.rows),
            labels=distributed.gather_array(found.labels),
            scores=distributed.gather_array(found.scores),
        )
        return known(score_ranks(every[0], every[1], index.label_space.names)), found

    def keep(self, found: Guesses, folder: Path, index: Index) -> None:
        """Writes ``guesses.csv`` with the columns image, label and score, up to five rows a picture."""
        files.write_text(folder / FILE, self.as_csv(found, [index.name(row) for row in range(len(index))]))

    def as_csv(self, found: Guesses, names: list[str]) -> str:
        """The guesses as CSV, image by image in the order of the rows, the likeliest class first."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("image", "label", "score"))
        for at in np.argsort(found.rows, kind="stable").tolist():
            for label, score in zip(found.labels[at].tolist(), found.scores[at].tolist(), strict=True):
                writer.writerow((names[found.rows[at]], self.label_space.names[label], f"{score:.6f}"))
        return text.getvalue()

    def _columns(self, index: Index) -> tuple[npt.NDArray[np.int64], int]:
        """(C,) where each of the classifier's classes stands among those of the index, what it lacks behind them; and
        how many there are with these."""
        targets = np.array(self.joined(index).targets, np.int64)
        absent, here = targets < 0, len(index.label_space)
        targets[absent] = here + np.arange(absent.sum())
        return targets, here + int(absent.sum())


def _spread(scores: npt.NDArray[np.float64], columns: npt.NDArray[np.int64], width: int) -> npt.NDArray[np.float64]:
    """The scores (N, C) in the columns of the index (N, width); classes that the classifier does not know come last."""
    least = scores.min(axis=1, keepdims=True, initial=0.0) - 1
    spread = np.repeat(least, width, axis=1)
    spread[:, columns] = scores
    return spread


def _guesses(rows: npt.NDArray[np.int64], logits: npt.NDArray[np.float64]) -> Guesses:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
    shares = shifted / shifted.sum(axis=1, keepdims=True)
    best = np.argsort(-shares, axis=1, kind="stable")[:, :GUESSES]
    return Guesses(rows=rows, labels=best, scores=np.take_along_axis(shares, best, axis=1).astype(np.float32))


def _joined(parts: list[Guesses], classes: int) -> Guesses:
    none = np.zeros((0, min(classes, GUESSES)))
    return Guesses(
        rows=np.concatenate([np.zeros(0, np.int64), *(part.rows for part in parts)]),
        labels=np.concatenate([none.astype(np.int64), *(part.labels for part in parts)]),
        scores=np.concatenate([none.astype(np.float32), *(part.scores for part in parts)]),
    )
