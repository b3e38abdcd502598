"""A trained detector out of a run: predictions on pictures of any size, and scores on an index."""

import dataclasses
import glob
import importlib
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from gesso import distributed
from gesso.data.decode import upright_rgb
from gesso.data.index import Index
from gesso.data.loading import picture_batches
from gesso.data.records import Array, Masks, Rle
from gesso.data.rle import decode
from gesso.errors import ConfigError, InputError
from gesso.evaluation.coco import score_coco, score_masks
from gesso.evaluation.detection_files import write_detections
from gesso.evaluation.detections import DetectionTable
from gesso.evaluation.further import Metric, further_scores
from gesso.evaluation.predict import gathered, predict, tabled
from gesso.run.data import has_masks
from gesso.run.trained import TrainedModel, known
from gesso.structures import ImageBatch

DETECTIONS = "detections.parquet"
PICTURES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"))
_MAGIC = frozenset("*?[")

Picture: TypeAlias = str | Path | np.ndarray[Any, np.dtype[np.uint8]] | Image.Image


@dataclass(frozen=True, eq=False)
class Predictions:
    """What was found in one picture, by falling score.

    Attributes:
        xyxy: (n, 4) float32 pixels of the stored picture.
        confidence: (n,) float32 in [0, 1].
        class_id: (n,) int64.
        names: (n,) the class names.
        error: why the picture could not be read; None where it could.
        masks: n run lengths (``records.Rle``) of the whole picture; None where the detector makes no masks.
        size: height and width of the stored picture; 0 where it could not be read.
    """

    xyxy: npt.NDArray[np.float32]
    confidence: npt.NDArray[np.float32]
    class_id: npt.NDArray[np.int64]
    names: tuple[str, ...]
    error: str | None = None
    masks: Masks | None = None
    size: tuple[int, int] = (0, 0)

    def __len__(self) -> int:
        return len(self.confidence)

    @property
    def mask(self) -> npt.NDArray[np.bool_] | None:
        """(n, height, width) bool, the masks drawn out on every call; None where the detector makes no masks."""
        if self.masks is None:
            return None
        drawn = np.zeros((len(self), *self.size), np.bool_)
        for place in range(len(self)):
            one = self.masks[place]
            assert isinstance(one, Rle), "a detection has no mask"
            drawn[place] = decode(one)
        return drawn

    def of_classes(self, names: Collection[str]) -> "Predictions":
        """Those of some classes, by name."""
        keep = np.array([name in names for name in self.names], dtype=bool)
        return dataclasses.replace(
            self,
            xyxy=self.xyxy[keep],
            confidence=self.confidence[keep],
            class_id=self.class_id[keep],
            names=tuple(name for name in self.names if name in names),
            masks=None if self.masks is None else self.masks.take(np.flatnonzero(keep)),
        )

    def to_supervision(self) -> Any:
        """The same as ``supervision.Detections``. ConfigError where supervision is not installed."""
        try:
            module = importlib.import_module("gesso.evaluation.supervision")
        except ModuleNotFoundError as error:
            what = "supervision is not installed"
            raise ConfigError(what, remedy="pip install 'gesso[supervision]'.") from error
        labels = dict(zip(self.class_id.tolist(), self.names, strict=True))
        every = [labels.get(i, "") for i in range(max(labels, default=-1) + 1)]
        return module.to_supervision(self.xyxy, self.confidence, self.class_id, every, self.mask)


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedDetector(TrainedModel[DetectionTable]):
    """A detector with what it needs to be used.

    Attributes:
        metrics: scores of other benchmarks that ``evaluate`` gives beside COCO's.
    """

    metrics: tuple[Metric, ...] = ()
    primary: ClassVar[str] = "AP"
    shown: ClassVar[tuple[str, ...]] = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")

    def predict(
        self,
        pictures: Sequence[Picture],
        *,
        min_score: float = 0.0,
        strict: bool = True,
        progress: Callable[[int], None] | None = None,
    ) -> list[Predictions]:
        """Detects in pictures of any size.

        Args:
            pictures: paths, uint8 (H, W, 3) RGB arrays, or Pillow's pictures.
            min_score: detections below it are left out.
            strict: raise where a picture cannot be read; otherwise its entry is empty and has an ``error``.
            progress: called after each batch with the number of its pictures.

        Returns:
            One entry a picture, in their order.

        Raises:
            DataError: a picture cannot be read, and ``strict`` is on.
            InputError: ``pictures`` is no list, or holds something else.
        """
        if isinstance(pictures, str | Path | np.ndarray | Image.Image):
            raise InputError("one picture was given instead of a list", remedy="Write predict([picture]).")
        given = [_as_read(p, place) for place, p in enumerate(pictures)]
        batches = picture_batches(given, self.input, batch_size=self.batch_size)
        sizes = np.zeros((len(given), 2), np.int64)
        found = predict(
            self.ready,
            _noting(batches, sizes),
            device=self.device,
            precision=self.precision,
            progress=progress,
        )
        if batches.broken and strict:
            raise batches.broken[0].error
        starts = np.searchsorted(found.image_id, np.arange(len(given) + 1))
        every = [
            dataclasses.replace(self._of_rows(found, np.arange(a, b), min_score), size=(height, width))
            for (a, b), (height, width) in zip(itertools.pairwise(starts), sizes.tolist(), strict=True)
        ]
        for broken in batches.broken:
            every[broken.row] = dataclasses.replace(every[broken.row], error=str(broken.error))
        return every

    def _of_rows(self, found: DetectionTable, rows: Array, min_score: float) -> Predictions:
        here = found.take(rows[found.score[rows] >= min_score])
        return Predictions(
            xyxy=here.xyxy.astype(np.float32),
            confidence=here.score.astype(np.float32),
            class_id=here.label,
            names=tuple(self.label_space.names[i] for i in here.label.tolist()),
            masks=here.masks,
        )

    def detect(
        self, index: Index, *, workers: int = 0, progress: Callable[[int], None] | None = None
    ) -> DetectionTable:
        """All detections on the pictures of an index, labelled in the detector's own label space.

        With several processes each takes its share of the pictures, and all get everything.

        Raises:
            DataError: more than 1% of the pictures, and three to spare, cannot be read.
        """
        own = tabled(self.outputs(index, workers=workers, progress=progress), np.asarray(index.image_ids))
        return gathered(own)

    def evaluate(
        self, index: Index, *, workers: int = 0, progress: Callable[[int], None] | None = None
    ) -> tuple[dict[str, Any], DetectionTable]:
        """COCO's scores on an index, joined by category name, and the detections (in the index's label space).

        They are those of the boxes (``coco.KEYS`` and ``by_class``); where the detector makes masks and the index has
        some, also ``coco.MASK_KEYS`` of the masks (see ``coco.score_masks``); and those of ``metrics``, see
        ``further_scores``.

        Raises:
            DataError: the detector and the index share no category.
        """
        there = self.joined(index)
        mapped = self.detect(index, workers=workers, progress=progress).map_labels(there)

        def scored() -> dict[str, Any]:
            masks = mapped.masks is not None and has_masks(index)
            scores = score_coco(index, mapped) | (score_masks(index, mapped) if masks else {})
            for metric in self.metrics:
                scores |= known(further_scores(index, mapped, metric))
            return scores

        return distributed.from_main(scored), mapped

    def keep(self, found: DetectionTable, folder: Path, index: Index) -> None:
        """Writes ``detections.parquet``."""
        write_detections(found, folder / DETECTIONS, index.label_space.ids)


def _noting(batches: Iterable[ImageBatch], sizes: Array) -> Iterator[ImageBatch]:
    """The batches, while ``sizes`` (N, 2) takes the height and width of each picture that comes along."""
    for batch in batches:
        real = batch.image_index >= 0
        sizes[batch.image_index[real].numpy()] = batch.original_sizes[real].numpy()
        yield batch


def _as_read(picture: object, place: int) -> Path | npt.NDArray[np.uint8]:
    if isinstance(picture, str | Path):
        return Path(picture)
    if isinstance(picture, Image.Image):
        return upright_rgb(picture)
    if isinstance(picture, np.ndarray):
        return picture
    what = f"picture {place} is of the type {type(picture).__name__}"
    raise InputError(what, remedy="Give a path, a uint8 (H, W, 3) RGB array, or a picture of Pillow's.")


def find_pictures(words: Sequence[str | Path]) -> list[Path]:
    """The picture files that the words name: files, folders (all pictures below them), and globs; each once, in order.

    Raises:
        InputError: a word names nothing, or a folder or glob without pictures.
    """
    found: dict[Path, None] = {}
    for word in words:
        path = Path(word)
        if path.is_dir():
            some = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in PICTURES and p.is_file()]
        elif path.exists():
            some = [path]
        elif _MAGIC & set(str(word)):
            matches = glob.glob(str(word), recursive=True)  # noqa: PTH207  (Path.glob takes no absolute pattern)
            some = [p for p in map(Path, sorted(matches)) if p.suffix.lower() in PICTURES]
        else:
            raise InputError("there is no such picture or folder", where=path, remedy="Check the path.")
        if not some:
            raise InputError("no picture is found there", where=path, remedy=f"Known: {', '.join(sorted(PICTURES))}.")
        found |= dict.fromkeys(some)
    return list(found)
