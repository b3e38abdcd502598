"""``gesso score coco``. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gesso.commands.parsing import Result, parse, scores_text
from gesso.evaluation.coco import score_coco


@dataclass(frozen=True)
class CocoArguments:
    """COCO's AP and AR of any pair of files. Definitions: pycocotools."""

    gt: Path
    """Ground truth: a COCO annotation file, or an index."""
    dt: Path
    """Detections: COCO results JSON, or the same columns as Parquet."""
    iou_type: Literal["bbox", "segm"] = "bbox"
    """Compare boxes or masks."""
    json: bool = False
    """Print JSON."""


def coco(words: list[str]) -> Result:
    """``gesso score coco``."""
    given = parse(CocoArguments, words, "score coco")
    scores = score_coco(given.gt, given.dt, given.iou_type)
    return Result(scores_text(scores), scores if given.json else None)
