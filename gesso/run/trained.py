"""What every trained model has, whatever it predicts: how it is used, scored, and which score counts."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch

from gesso import distributed
from gesso.data.index import Index
from gesso.data.loading import ALLOWANCE, MAX_SHARE, inference_batches
from gesso.data.samples import Broken
from gesso.data.transforms import InputConfig
from gesso.errors import DataError
from gesso.evaluation.predict import Output, Precision, outputs
from gesso.label_space import LabelMap, LabelSpace
from gesso.models.folding import fold_batch_norm
from gesso.models.model import Model

Found = TypeVar("Found")


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedModel(ABC, Generic[Found]):
    """A model with what it needs to be used. ``Found`` is what it predicts on a whole index.

    Attributes:
        model: the module, on ``device``; what it knows is taken over at the first use.
        label_space: the categories that it predicts.
        input: how pictures become its input.
        device: where it runs.
        batch_size: pictures at a time.
        precision: "bfloat16" is mixed precision; otherwise the types of the module count.
        primary: the score that says which checkpoint is the best; higher is better.
        shown: the scores that tables show, the primary one first.
    """

    model: Model
    label_space: LabelSpace
    input: InputConfig
    device: torch.device
    batch_size: int = 8
    precision: Precision = "float32"
    primary: ClassVar[str]
    shown: ClassVar[tuple[str, ...]]

    @cached_property
    def ready(self) -> Model:
        """The model as it is run: with its batch norms folded into the convolutions."""
        return fold_batch_norm(self.model) if isinstance(self.model, Model) else self.model

    @abstractmethod
    def evaluate(
        self, index: Index, *, workers: int = 0, progress: Callable[[int], None] | None = None
    ) -> tuple[dict[str, Any], Found]:
        """The scores on an index, joined by category name, and the predictions that they are of.

        With several processes each takes its share of the pictures, and all get everything.
        """

    @abstractmethod
    def keep(self, found: Found, folder: Path, index: Index) -> None:
        """Writes the predictions of ``evaluate`` on ``index`` into a new folder of a run. InputError where it fails."""

    def joined(self, index: Index) -> LabelMap:
        """From the model's categories to those of an index. DataError where they share none."""
        there = self.label_space.map_to(index.label_space)
        if all(target < 0 for target in there.targets):
            raise DataError(
                f"none of its categories ({', '.join(index.label_space.names[:4])} ...) is one that the model knows "
                f"({', '.join(self.label_space.names[:4])} ...)",
                where=index.path,
                remedy="Evaluate on data with the same category names.",
            )
        return there

    def outputs(
        self, index: Index, *, workers: int, progress: Callable[[int], None] | None, broken: Sequence[Broken] = ()
    ) -> Iterator[Output]:
        """This process's share of the pictures of an index, batch by batch, with what the model says of them.

        Raises:
            DataError: more than 1% of the pictures, and three to spare, cannot be read, over all processes; it comes
                after the last batch, in all of them.
        """
        batches = inference_batches(
            index,
            self.input,
            batch_size=self.batch_size,
            workers=workers,
            rank=distributed.rank(),
            world=distributed.world_size(),
        )
        try:
            yield from outputs(self.ready, batches, device=self.device, precision=self.precision, progress=progress)
        finally:
            batches.close()
        refuse_broken([*batches.broken, *broken], index)


def refuse_broken(found: Sequence[Broken], index: Index) -> None:
    """DataError in all processes where too many pictures could not be read; all of them call it."""
    broken = int(distributed.all_reduce_sum(torch.tensor(len(found)), name="broken pictures"))
    if broken <= MAX_SHARE * len(index) + ALLOWANCE:
        return
    last = found[-1].error if found else None
    error = DataError(
        f"{broken} of {len(index)} pictures could not be read"
        + ("" if last is None else f", the last one: {last.what}"),
        where=index.path if last is None else last.where,
        remedy="Mend or remove the broken files (gesso data check lists them).",
    )
    raise distributed.told_by_main(error)


def known(scores: dict[str, Any]) -> dict[str, Any]:
    """The scores with -1 for those that do not exist, as COCO has it, so that all can be compared."""
    return {
        key: known(value) if isinstance(value, dict) else -1.0 if value is None else value
        for key, value in scores.items()
    }
