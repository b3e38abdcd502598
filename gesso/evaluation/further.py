"""The scores that other benchmarks than COCO ask for, beside COCO's: those of PASCAL VOC and of CityPersons."""

from typing import Literal, get_args

from gesso.data.index import Index
from gesso.evaluation.detections import DetectionTable
from gesso.evaluation.miss_rate import Subset, score_miss_rate
from gesso.evaluation.voc import score_voc

Metric = Literal["voc", "miss_rate"]


def further_scores(index: Index, found: DetectionTable, metric: Metric) -> dict[str, float | None]:
    """The numbers of one benchmark, in the index's label space; None where there is nothing to measure on.

    - voc: ``voc_AP50`` and ``voc_AP70``, the area under the whole curve at IoU 0.5 and 0.7, as An Analysis of
      Pre-Training has it, and ``voc_AP50_11``, of eleven points.
    - miss_rate: ``MR_reasonable``, ``MR_reasonable_small``, ``MR_heavy`` and ``MR_all``, log-average miss rates.
    """
    if metric == "voc":
        return {
            "voc_AP50": score_voc(index, found, iou=0.5, inclusive=False)["mAP"],
            "voc_AP70": score_voc(index, found, iou=0.7, inclusive=False)["mAP"],
            "voc_AP50_11": score_voc(index, found, iou=0.5, points="11", inclusive=False)["mAP"],
        }
    subsets: tuple[Subset, ...] = get_args(Subset)
    return {f"MR_{subset}": score_miss_rate(index, found, subset=subset)["MR"] for subset in subsets}
