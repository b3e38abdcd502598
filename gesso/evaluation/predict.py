"""From a model and batches to predictions: of a detector, a table of detections."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gesso import distributed
from gesso.data.records import Array, Masks
from gesso.evaluation.detections import DetectionTable
from gesso.evaluation.masks import paste
from gesso.structures import Detections, ImageBatch, to_device

Precision = Literal["bfloat16", "float32", "float64"]


class Output(NamedTuple):
    """A batch on the CPU and on the device, and what the model says of it, on the device."""

    batch: ImageBatch
    there: ImageBatch
    found: Any


def predict(
    detector: nn.Module,
    batches: Iterable[ImageBatch],
    *,
    device: torch.device | str,
    precision: Precision = "float32",
    image_ids: Array | None = None,
    progress: Callable[[int], None] | None = None,
) -> DetectionTable:
    """Detects in every batch and gathers what is found, in the order of the images.

    The detector runs in inference mode and is left as it was (training or not). The device is waited for once a batch.

    Args:
        detector: on ``device``; ``ImageBatch -> Detections``.
        batches: on the CPU; slots with ``image_index`` -1 are padded repeats and are left out.
        device: where the detector is.
        precision: "bfloat16" runs under autocast; otherwise the detector's own types count.
        image_ids: (N,) int64, the id of each row of the index (``Index.image_ids``); None = the row itself.
        progress: called after each batch with the number of images in it.

    Returns:
        Boxes in pixels of the stored pictures, clipped to them; masks pasted at the picture's size where the detector
        makes masks. Ordered by image id, then falling score.
    """
    return tabled(outputs(detector, batches, device=device, precision=precision, progress=progress), image_ids)


def tabled(found: Iterable[Output], image_ids: Array | None = None) -> DetectionTable:
    """The table of a detector's ``outputs``; see ``predict``."""
    tables = [_table(one.batch, one.found.to_original(one.there), image_ids) for one in found]
    return DetectionTable.concatenate(tables).ordered()


def gathered(table: DetectionTable) -> DetectionTable:
    """The detections of all processes, each of which had its share of the pictures, in the order of the images."""
    if distributed.world_size() == 1:
        return table
    masks = table.masks
    if not distributed.all_agree(masks is None) and masks is None:  # this process has found nothing
        masks = Masks.none(len(table))
    columns = [distributed.gather_array(c) for c in (table.image_id, table.label, table.score, table.xyxy)]
    joined = DetectionTable(
        image_id=columns[0],
        label=columns[1],
        score=columns[2],
        xyxy=columns[3],
        masks=None if masks is None else _gathered_masks(masks),
    )
    return joined.ordered()


def _gathered_masks(masks: Masks) -> Masks:
    """The masks of all processes: lengths are gathered, offsets follow from them."""
    kinds, parts, lengths, data = (
        distributed.gather_array(column)
        for column in (masks.kinds, np.diff(masks.offsets), np.diff(masks.part_offsets), masks.data)
    )
    offsets, part_offsets = (np.concatenate([np.zeros(1, np.int64), np.cumsum(column)]) for column in (parts, lengths))
    return Masks(kinds=kinds, offsets=offsets, part_offsets=part_offsets, data=data)


def outputs(
    model: nn.Module,
    batches: Iterable[ImageBatch],
    *,
    device: torch.device | str,
    precision: Precision = "float32",
    progress: Callable[[int], None] | None = None,
) -> Iterator[Output]:
    """Each batch with what the model says of it; arguments as of ``predict``.

    The model runs in inference mode and is left as it was (training or not) once all batches are through.
    """
    training = [module for module in model.modules() if module.training]
    kind = torch.device(device).type
    model.eval()
    try:
        for batch in batches:
            with torch.inference_mode(), torch.autocast(kind, torch.bfloat16, enabled=precision == "bfloat16"):
                there = to_device(batch, device)
                found = model(there)
            yield Output(batch, there, found)
            if progress is not None:
                progress(int((batch.image_index >= 0).sum()))
    finally:
        for module in training:
            module.training = True


def _table(batch: ImageBatch, found: Detections, image_ids: Array | None) -> DetectionTable:
    """The valid detections of one batch; ``batch`` is on the CPU, ``found`` on the device, in original pixels."""
    columns, masks = _to_host(found)
    index = batch.image_index.numpy()
    image, slot = np.nonzero((columns[..., 6] > 0) & (index >= 0)[:, None])
    kept = columns[image, slot]
    row = index[image]
    table = DetectionTable(
        image_id=row if image_ids is None else np.asarray(image_ids)[row],
        label=kept[:, 5],
        score=kept[:, 4],
        xyxy=kept[:, :4],
    )
    if masks is None:
        return table
    sizes = batch.original_sizes.tolist()
    picked = zip(image.tolist(), masks[image, slot], kept[:, :4], strict=True)
    pasted = Masks.of([paste(mask, box, (sizes[i][0], sizes[i][1])) for i, mask, box in picked])
    return DetectionTable(image_id=table.image_id, label=table.label, score=table.score, xyxy=table.xyxy, masks=pasted)


def _to_host(found: Detections) -> tuple[Array, Array | None]:
    """(B, D, 7) x1, y1, x2, y2, score, label, valid, and the masks (B, D, S, S): one copy, one wait."""
    parts: list[Tensor] = [found.boxes, found.scores[..., None], found.labels[..., None], found.valid[..., None]]
    if found.masks is not None:
        parts.append(found.masks.flatten(2))
    kind = torch.float64 if found.boxes.dtype == torch.float64 else torch.float32
    packed = torch.cat([part.to(kind) for part in parts], dim=-1).cpu().numpy()
    columns: Array = packed[..., :7].astype(np.float64)
    if found.masks is None:
        return columns, None
    return columns, packed[..., 7:].reshape(found.masks.shape)
