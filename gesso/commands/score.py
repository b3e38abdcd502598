"""``gesso score``: one command a metric, for any pair of files. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gesso.commands.parsing import Result, parse, scores_text, table
from gesso.evaluation.classification import score_label_files
from gesso.evaluation.coco import score_coco
from gesso.evaluation.miss_rate import FPPI, score_miss_rate
from gesso.evaluation.segmentation import score_segmentation
from gesso.evaluation.voc import score_voc


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


@dataclass(frozen=True)
class VocArguments:
    """PASCAL VOC's AP of any pair of files. Boxes are x, y, x + w, y + h in inclusive pixels."""

    gt: Path
    """Ground truth: a COCO annotation file, or an index; objects that are difficult need not be found."""
    dt: Path
    """Detections: COCO results JSON, or the same columns as Parquet."""
    iou: float = 0.5
    """The least IoU of a right detection."""
    points: Literal["all", "11"] = "all"
    """The area under the whole curve (VOC2010 and later), or the mean of 11 points (VOC2007)."""
    json: bool = False
    """Print JSON; what cannot be measured is null."""


def voc(words: list[str]) -> Result:
    """``gesso score voc``."""
    given = parse(VocArguments, words, "score voc")
    scores = score_voc(given.gt, given.dt, iou=given.iou, points=given.points)
    return _result(scores, "AP", given.json)


@dataclass(frozen=True)
class MissRateArguments:
    """The log-average miss rate of pedestrians (CityPersons, Caltech), as a fraction, not in percent."""

    gt: Path
    """Ground truth: a COCO annotation file with vis_ratio, and height and ignore where they are needed, or an index."""
    dt: Path
    """Detections: COCO results JSON, or the same columns as Parquet."""
    subset: Literal["reasonable", "reasonable_small", "heavy", "all"] = "reasonable"
    """Which objects count, by their height and visible share."""
    citypersons_compat: bool = False
    """Follow CityPersons' code where it differs from Caltech's."""
    json: bool = False
    """Print JSON; -1 where the subset has no object."""


def miss_rate(words: list[str]) -> Result:
    """``gesso score miss-rate``."""
    given = parse(MissRateArguments, words, "score miss-rate")
    scores = score_miss_rate(given.gt, given.dt, subset=given.subset, citypersons_compat=given.citypersons_compat)
    points = [(f"{fppi:g}", recall) for fppi, recall in zip(FPPI, scores["recall_at_fppi"], strict=True)]
    text = f"{table(('score', 'value'), [('MR', scores['MR'])])}\n\n{table(('FPPI', 'recall'), points)}"
    return Result(text, scores if given.json else None)


@dataclass(frozen=True)
class MiouArguments:
    """Mean IoU and accuracies of label maps."""

    gt: Path
    """Ground truth: a folder of indexed or grey PNGs."""
    dt: Path
    """Predictions: a folder of PNGs of the same names and sizes."""
    num_classes: int
    """How many classes there are; their values begin at 0."""
    ignore: int = 255
    """The value of pixels in the ground truth that count for nothing."""
    reduce_zero_label: bool = False
    """In the ground truth, 0 counts for nothing either, and the classes begin at 1 (ADE20K)."""
    trimap: int | None = None
    """Score the pixels at most so far from an ignored one; the others are anti_trimap."""
    json: bool = False
    """Print JSON; what cannot be measured is null."""


def miou(words: list[str]) -> Result:
    """``gesso score miou``."""
    given = parse(MiouArguments, words, "score miou")
    scores = score_segmentation(
        given.gt,
        given.dt,
        num_classes=given.num_classes,
        ignore=given.ignore,
        reduce_zero_label=given.reduce_zero_label,
        trimap=given.trimap,
    )
    return _result(scores, "IoU", given.json, scores.get("anti_trimap"))


@dataclass(frozen=True)
class Top1Arguments:
    """How often the true class is the first guess, or among the first five."""

    gt: Path
    """Ground truth: CSV with the columns image and label."""
    dt: Path
    """Guesses: CSV with the columns image and label; for top5 several rows an image, the best first or with a column
    score. With one row an image top5 is the same as top1."""
    json: bool = False
    """Print JSON."""


def top1(words: list[str]) -> Result:
    """``gesso score top1``."""
    given = parse(Top1Arguments, words, "score top1")
    return _result(score_label_files(given.gt, given.dt), "top1", given.json)


def _result(scores: dict[str, Any], of_class: str, json: bool, outside: dict[str, Any] | None = None) -> Result:
    """The totals, and the value of each class (called ``of_class``) from the best to the worst; ``outside`` the trimap
    stands beside them."""
    parts = [scores] if outside is None else [scores, outside]
    totals = [(key, *(part[key] for part in parts)) for key in scores if key not in ("by_class", "anti_trimap")]
    classes = [(name, *(part["by_class"][name] for part in parts)) for name in scores["by_class"]]
    classes.sort(key=lambda row: -1.0 if row[1] is None else row[1], reverse=True)
    columns = [("value",), (of_class,)] if outside is None else [("trimap", "outside")] * 2
    text = f"{table(('score', *columns[0]), totals)}\n\n{table(('class', *columns[1]), classes)}"
    return Result(text, scores if json else None)
