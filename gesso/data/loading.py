"""Batches for training and inference, made by worker processes whose number changes nothing.

The plan of each batch is drawn in the main process (``sampling.py``); a worker builds a whole batch (``samples.py``);
only whole batches cross a process border, and they arrive in order (``workers.py``).
"""

from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from gesso.data.decode import Pixels, read_picture, reduction
from gesso.data.index import Index
from gesso.data.pictures import read_header
from gesso.data.placement import Placement
from gesso.data.samples import Broken, Built, ImageSlots, InferenceBuilder, TrainingBuilder
from gesso.data.sampling import BatchStream
from gesso.data.transforms import InputConfig, inference_placement
from gesso.data.workers import Results
from gesso.errors import ConfigError, DataError, InputError, TrainingError
from gesso.label_space import LabelMap
from gesso.log import get_logger
from gesso.structures import ImageBatch, Targets

log = get_logger(__name__)

WINDOW = 10_000
MAX_SHARE = 0.01
ALLOWANCE = 3


def training_batches(
    index: Index,
    input: InputConfig,
    *,
    seed: int,
    batch_size: int,
    first_sample: int = 0,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    max_boxes: int = 100,
    mask_side: int = 0,
    label_map: LabelMap | None = None,
    semantic: bool = False,
) -> "TrainingBatches":
    """The endless training batches of one process, from sample ``first_sample`` on.

    The stream is a pure function of (seed, first_sample): it depends neither on the number of workers nor on that of
    processes.

    Args:
        index: the data set.
        input: resize, crop, flip and colour.
        seed: of the run or stage.
        batch_size: of the global batch, over all processes; B is its ``world``-th part.
        first_sample: the sample to go on from, a multiple of ``batch_size`` (``TrainingBatches.sample``).
        workers: worker processes; 0 builds in this process.
        rank: this process takes the rank-th contiguous slice of each global batch.
        world: the number of processes.
        max_boxes: M. Where a picture has more, the ones to ignore go first, then the smallest; the log counts them.
        mask_side: S of ``Targets.masks``; 0 leaves masks out. An object without a mask has an all-zero mask frame.
        label_map: from the index's labels to the run's (``LabelSpace.map_to``); None keeps the index's.
        semantic: with ``Targets.semantic``, (B, H, W) uint8: 0 background, 1 + label in the run's labels, 255 void,
            padding, or a picture without a map.

    Raises:
        DataError: the index has no picture, pictures of unknown size, or no semantic map where they are asked for.
        ConfigError: a number is out of range, the batch cannot be divided among the processes, or there are too many
            classes for semantic maps.
    """
    if max_boxes < 1 or mask_side < 0:
        raise ConfigError(f"max_boxes must be at least 1 and mask_side at least 0, found {max_boxes} and {mask_side}")
    stream = BatchStream(
        _shapes(index, input),
        seed=seed,
        batch_size=batch_size,
        num_scales=input.resize.num_scales,
        first_sample=first_sample,
        rank=rank,
        world=world,
    )
    builder = TrainingBuilder(
        index, input, max_boxes=max_boxes, mask_side=mask_side, label_map=label_map, semantic=semantic
    )
    return TrainingBatches(builder, stream, workers)


class TrainingBatches(Iterator[tuple[ImageBatch, Targets]]):
    """Endless pairs of ImageBatch and Targets on the CPU, pinned where a GPU is there, from ``training_batches``.

    A picture that cannot be read, or whose semantic map cannot, is replaced by the next in order. More than 1% of the
    last 10,000 samples, and three to spare, raises TrainingError. The first picture with more than ``max_boxes``
    objects is warned of, and how many there were so far at the 10th, the 100th and so on.

    Attributes:
        sample: the number of the next batch's first sample, the whole state of the stream.
        replaced: how many pictures of this process could not be read and were replaced.
        surplus: how many pictures of this process had more than ``max_boxes`` objects.
        left_out: how many objects of these were left out.
    """

    def __init__(self, builder: TrainingBuilder, stream: BatchStream, workers: int) -> None:
        self.sample = stream.sample
        self.replaced = 0
        self.surplus = 0
        self.left_out = 0
        self._next_word = 1
        self._batch_size = stream.batch_size
        self._share = stream.batch_size // stream.world
        self._named: set[int] = set()
        self._recent: deque[int] = deque(maxlen=max(WINDOW // self._share, 1))
        self._results = Results(builder, stream, workers)

    def __next__(self) -> tuple[ImageBatch, Targets]:
        built = next(self._results)
        self._account(built)
        self._account_left_out(built)
        self.sample += self._batch_size
        return built.image_batch(), built.as_targets()

    def _account(self, built: Built) -> None:
        """Counts and names what was replaced, and stops where it is too much."""
        self.replaced += len(built.broken)
        self._recent.append(len(built.broken))
        for row, error in built.broken:
            if row not in self._named:
                self._named.add(row)
                log.warning("%s (replaced by the next picture)", error)
        broken, samples = sum(self._recent), len(self._recent) * self._share
        if not built.images or broken > MAX_SHARE * samples + ALLOWANCE:
            last = built.broken[-1].error
            raise TrainingError(
                f"{broken} pictures could not be read in drawing the last {samples}; the last one: {last.what}",
                where=last.where,
                remedy="Mend or remove the broken files (gesso data check lists them) and go on with --resume.",
            )

    def _account_left_out(self, built: Built) -> None:
        """Counts the objects that found no room, and says so at 1, 10, 100, ... pictures."""
        self.surplus += built.surplus
        self.left_out += built.left_out
        if self.surplus < self._next_word:
            return
        while self._next_word <= self.surplus:
            self._next_word *= 10
        log.warning(
            "%d objects left out so far, in %d of the pictures drawn, which had more than data.max_boxes = %d "
            "(those to ignore go first, then the smallest; raise data.max_boxes to keep them)",
            self.left_out,
            self.surplus,
            built.targets["valid"].shape[1],
        )

    def close(self) -> None:
        """Ends the workers. Further batches cannot be drawn."""
        self._results.close()


def inference_batches(
    index: Index,
    input: InputConfig,
    *,
    batch_size: int,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
) -> "InferenceBatches":
    """Every picture of the index once, in its order within each padded shape, the shapes one after the other.

    Process ``rank`` of ``world`` gets the rows rank, rank + world, ...; the last batch of a shape is filled up with
    black pictures of image_index -1. There is no chance in it: no crop, no flip, the largest short side.

    Raises:
        DataError: the index has pictures of unknown size.
        ConfigError: ``batch_size`` is below 1.
    """
    _check_batch(batch_size)
    shapes = _shapes(index, input)
    rows = np.arange(rank, len(index), world, dtype=np.int64)
    plans = [plan for shape in np.unique(shapes[rows]).tolist() for plan in _chunks(rows, shapes, shape, batch_size)]
    return InferenceBatches(InferenceBuilder(index, input), plans, workers)


class InferenceBatches(Iterator[ImageBatch]):
    """The batches of ``inference_batches``.

    Attributes:
        broken: the pictures that could not be read so far; their slots are black and have image_index -1.
    """

    def __init__(self, builder: InferenceBuilder, plans: list[tuple[int, npt.NDArray[np.int64]]], workers: int) -> None:
        self.broken: list[Broken] = []
        self._left = len(plans)
        self._results = Results(builder, plans, min(workers, len(plans)))

    def __len__(self) -> int:
        """How many batches are left."""
        return self._left

    def __next__(self) -> ImageBatch:
        built = next(self._results)
        self._left -= 1
        for broken in built.broken:
            log.warning("%s (left out)", broken.error)
        self.broken.extend(built.broken)
        return built.image_batch()

    def close(self) -> None:
        """Ends the workers."""
        self._results.close()


def picture_batches(
    pictures: Iterable[Path | Pixels],
    input: InputConfig,
    *,
    batch_size: int,
) -> "PictureBatches":
    """Batches of paths or uint8 (H, W, 3) RGB arrays of any size; image_index is the place among ``pictures``.

    Pictures are read as they are drawn; a batch leaves when its shape has ``batch_size`` of them, the rest at the end,
    filled up with black pictures of image_index -1.

    Raises:
        ConfigError: ``batch_size`` is below 1.
        InputError: an array is no uint8 (H, W, 3) picture.
    """
    _check_batch(batch_size)
    return PictureBatches(pictures, input, batch_size)


class PictureBatches(Iterator[ImageBatch]):
    """The batches of ``picture_batches``.

    Attributes:
        broken: the pictures that could not be read so far; they stand in no batch.
    """

    def __init__(self, pictures: Iterable[Path | Pixels], config: InputConfig, batch_size: int) -> None:
        self.broken: list[Broken] = []
        self._config, self._batch_size = config, batch_size
        self._batches = self._run(pictures)

    def __next__(self) -> ImageBatch:
        return next(self._batches)

    def _run(self, pictures: Iterable[Path | Pixels]) -> Iterator[ImageBatch]:
        waiting: dict[int, list[tuple[int, Pixels, Placement]]] = {}
        for place, given in enumerate(pictures):
            try:
                picture, placement = self._read(given, place)
            except DataError as error:
                log.warning("%s (left out)", error)
                self.broken.append(Broken(place, error))
                continue
            shape = int(self._config.resize.assign(*placement.original)[0])
            group = waiting.setdefault(shape, [])
            group.append((place, picture, placement))
            if len(group) == self._batch_size:
                yield self._batch(waiting.pop(shape))
        for shape in sorted(waiting):
            yield self._batch(waiting[shape])

    def _read(self, given: Path | Pixels, place: int) -> tuple[Pixels, Placement]:
        """A picture and its placement; where the head of a file says that it will shrink, it may come reduced."""
        if isinstance(given, Path):
            head = read_header(given, content_hash=False)
            if not head.problem:
                width, height = head.transposed
                placement = inference_placement(self._config, height, width)[1]
                if reduction(placement) > 1:
                    return read_picture(given, placement), placement
        picture = read_picture(given) if isinstance(given, Path) else _checked(given, place)
        return picture, inference_placement(self._config, *picture.shape[:2])[1]

    def _batch(self, group: list[tuple[int, Pixels, Placement]]) -> ImageBatch:
        slots = ImageSlots(self._batch_size, group[0][2].canvas)
        for slot, (place, picture, placement) in enumerate(group):
            slots.fill(slot, picture, placement, row=place)
        built = Built(images=slots.tensors())
        return (built.pin_memory() if torch.cuda.is_available() else built).image_batch()


def _shapes(index: Index, config: InputConfig) -> npt.NDArray[np.int64]:
    heights, widths = np.asarray(index.heights), np.asarray(index.widths)
    unknown = np.flatnonzero((heights < 1) | (widths < 1))
    if len(unknown):
        raise DataError(
            f"the sizes of {len(unknown)} pictures are unknown, the first is '{index.name(int(unknown[0]))}'",
            where=index.path,
            remedy="Import the data with its pictures (without --no-images).",
        )
    return config.resize.assign(heights, widths)


def _chunks(
    rows: npt.NDArray[np.int64], shapes: npt.NDArray[np.int64], shape: int, batch_size: int
) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    members = rows[shapes[rows] == shape]
    for start in range(0, len(members), batch_size):
        chunk = np.full(batch_size, -1, np.int64)
        part = members[start : start + batch_size]
        chunk[: len(part)] = part
        yield shape, chunk


def _check_batch(batch_size: int) -> None:
    if batch_size < 1:
        raise ConfigError(f"the batch size must be at least 1, found {batch_size}")


def _checked(picture: Pixels, place: int) -> Pixels:
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
        raise InputError(
            f"picture {place} must be uint8 (H, W, 3) RGB, found {picture.dtype} {picture.shape}",
            remedy="Convert it to RGB with 8 bits a channel.",
        )
    return np.ascontiguousarray(picture)
