"""A trained segmenter: maps of pictures of any size, and mean IoU on an index."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from gesso import distributed, files
from gesso.data.index import Index
from gesso.data.loading import picture_batches
from gesso.data.samples import Broken
from gesso.data.semantic import VOID, read_semantic
from gesso.errors import DataError
from gesso.evaluation.predict import outputs
from gesso.evaluation.segmentation import Confusion
from gesso.models.segmenter import Segmenter, class_map
from gesso.run.trained import TrainedModel, known
from gesso.structures import ImageBatch

Map = npt.NDArray[np.uint8]
BACKGROUND = "background"
_MAPS_FILE = "confusion.json"


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedSegmenter(TrainedModel[Confusion]):
    """A segmenter with what it needs to be used. What it finds on an index is a confusion matrix over its pixels."""

    primary: ClassVar[str] = "mIoU"
    shown: ClassVar[tuple[str, ...]] = ("mIoU", "pixel_accuracy", "mean_class_accuracy")

    @property
    def background(self) -> bool:
        """Whether value 0 of a map is a class of its own."""
        assert isinstance(self.model, Segmenter)
        return self.model.config.background

    def predict(
        self, pictures: list[Path], *, progress: Callable[[int], None] | None = None
    ) -> tuple[list[Map | None], list[str]]:
        """The semantic map (H, W) of each picture at its own size: 0 background, 1 + class.

        Returns:
            The maps, None where a picture cannot be read, and what is wrong with those.
        """
        batches = picture_batches(pictures, self.input, batch_size=self.batch_size)
        found: list[Map | None] = [None] * len(pictures)
        for batch, _, logits in outputs(
            self.ready, batches, device=self.device, precision=self.precision, progress=progress
        ):
            for slot, row in enumerate(batch.image_index.tolist()):
                if row >= 0:
                    found[row] = self._map(batch, logits, slot)
        return found, [str(broken.error) for broken in batches.broken]

    def evaluate(
        self, index: Index, *, workers: int = 0, progress: Callable[[int], None] | None = None
    ) -> tuple[dict[str, Any], Confusion]:
        """mIoU, pixel_accuracy, mean_class_accuracy and by_class at the stored resolution, and the confusion matrix.

        Pictures without a map count for nothing. A score is -1 where there is nothing to measure on.

        Raises:
            DataError: the segmenter and the index share no category; a category is missing in an index whose maps have
                no background that its pixels could fall to; a map cannot be used.
        """
        values, confusion, broken = self._values(index), self._empty(index), list[Broken]()
        for batch, _, logits in self.outputs(index, workers=workers, progress=progress, broken=broken):
            for slot, row in enumerate(batch.image_index.tolist()):
                path = index.semantic_path(row) if row >= 0 else None
                if path is None:
                    continue
                guess = values[self._map(batch, logits, slot)]
                try:
                    confusion.add(read_semantic(path), guess, where=(path, index.name(row)))
                except DataError as error:
                    broken.append(Broken(row, error))
        counts = distributed.all_reduce_sum(torch.from_numpy(confusion.counts), name="confusion matrix")
        confusion.counts = counts.numpy()
        return known(confusion.scores(self._names(index))), confusion

    def keep(self, found: Confusion, folder: Path, index: Index) -> None:
        """Writes ``confusion.json``: the classes, and the pixels of each class (row) by the class that was found."""
        files.write_json(folder / _MAPS_FILE, {"classes": self._names(index), "pixels": found.counts.tolist()})

    def _map(self, batch: ImageBatch, logits: torch.Tensor, slot: int) -> Map:
        size, original = (tuple(of[slot].tolist()) for of in (batch.sizes, batch.original_sizes))
        padded = (batch.images.shape[2], batch.images.shape[3])
        found = class_map(logits[slot], padded, size, original, background=self.background)
        drawn: Map = found.cpu().numpy()
        return drawn

    def _names(self, index: Index) -> list[str]:
        return [BACKGROUND] * self.background + list(index.label_space.names)

    def _empty(self, index: Index) -> Confusion:
        return Confusion(len(self._names(index)), ignore=VOID, reduce_zero_label=not self.background)

    def _values(self, index: Index) -> Map:
        """(256,) from values of the segmenter's maps to the classes of ``_empty``."""
        there = self.joined(index)
        if there.dropped and not self.background:
            raise DataError(
                f"it lacks the categories {', '.join(there.dropped[:4])}, and its maps have no background",
                where=index.path,
                remedy="Evaluate on data with the same categories.",
            )
        values = np.zeros(VOID + 1, np.uint8)
        for label, target in enumerate(there.targets):
            values[1 + label] = max(target + self.background, 0)
        return values
