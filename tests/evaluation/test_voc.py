import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gesso.data.importing import import_data
from gesso.errors import ConfigError, DataError
from gesso.evaluation.detection_files import read_detections
from gesso.evaluation.detections import DetectionTable
from gesso.evaluation.ground_truth import load_ground_truth
from gesso.evaluation.voc import score_voc
from tests.evaluation.score_cases import by_score, iou, random_case, write


def reference(truth, results, threshold, points):
    """One detection after the other, one class after the other."""
    found = {}
    for category in truth["categories"]:
        objects = [a for a in truth["annotations"] if a["category_id"] == category["id"]]
        positives = sum(not a["difficult"] for a in objects)
        if not positives:
            found[category["name"]] = None
            continue
        taken, right, wrong, curve = set(), 0, 0, []
        for row in by_score([r for r in results if r["category_id"] == category["id"]]):
            best, which = -1.0, None
            for a in objects:
                if a["image_id"] == row["image_id"] and (overlap := iou(row["bbox"], a["bbox"], extra=1.0)) > best:
                    best, which = overlap, a
            if best >= threshold and which["difficult"]:
                continue
            if best >= threshold and which["id"] not in taken:
                taken.add(which["id"])
                right += 1
            else:
                wrong += 1
            curve.append((right / positives, right / (right + wrong)))
        found[category["name"]] = area(curve) if points == "all" else eleven(curve)
    known = [value for value in found.values() if value is not None]
    return (sum(known) / len(known) if known else None), found


def area(curve):
    total, before = 0.0, 0.0
    for i, (recall, _) in enumerate(curve):
        total += (recall - before) * max(p for _, p in curve[i:])
        before = recall
    return total


def eleven(curve):
    return sum(max([p for r, p in curve if r >= t], default=0.0) for t in np.arange(0, 1.1, 0.1)) / 11


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), threshold=st.sampled_from([0.3, 0.5, 0.7]), points=st.sampled_from(["all", "11"]))
def test_equal_to_one_detection_after_the_other(tmp_path_factory, seed, threshold, points):
    truth, results = random_case(seed)
    scores = score_voc(*write(tmp_path_factory.mktemp("case"), truth, results), iou=threshold, points=points)
    mean, by_class = reference(truth, results, threshold, points)
    assert list(scores["by_class"]) == list(by_class)
    assert scores["by_class"] == pytest.approx(by_class, abs=1e-12)
    assert scores["mAP"] == pytest.approx(mean, abs=1e-12)


def xywh(box):
    top, left, bottom, right = box
    return [left, top, right - left, bottom - top]


def golden_case(case, classes):
    truth = {"images": [], "annotations": [], "categories": [{"id": c, "name": f"c{c}"} for c in range(classes)]}
    results = []
    for image, boxes in enumerate(case["gt_bboxes"]):
        truth["images"].append({"id": image})
        flags = case.get("gt_difficults") or [[False] * len(b) for b in case["gt_bboxes"]]
        for box, label, difficult in zip(boxes, case["gt_labels"][image], flags[image], strict=True):
            row = {"image_id": image, "category_id": label, "bbox": xywh(box), "difficult": difficult}
            truth["annotations"].append(row)
        found = (case[f"pred_{what}"][image] for what in ("bboxes", "labels", "scores"))
        for box, label, score in zip(*found, strict=True):
            results.append({"image_id": image, "category_id": label, "bbox": xywh(box), "score": score})
    return truth, results


def test_golden_cases(golden, tmp_path):
    cases = json.loads((golden / "voc/voc_ap_cases.json").read_text())["cases"]
    assert len(cases) >= 5
    for case in cases:
        expected = case["expected"]
        files = write(tmp_path, *golden_case(case, len(expected["AP_all_point"])))
        for points, key in (("all", "AP_all_point"), ("11", "AP_11_point")):
            scores = score_voc(*files, iou=case["iou_thresh"], points=points)
            assert list(scores["by_class"].values()) == pytest.approx(expected[key], abs=1e-9), case["name"]
            assert scores["mAP"] == pytest.approx(expected[f"m{key}"], abs=1e-9), case["name"]


def test_golden_sample_of_object_detection_metrics(golden, tmp_path):
    sample = json.loads((golden / "voc/object_detection_metrics_sample.json").read_text())
    truth = {
        "images": [{"id": i} for i in sorted({int(a["image"]) for a in sample["ground_truth"]})],
        "categories": [{"id": 4, "name": "person"}],
        "annotations": [
            {"image_id": int(a["image"]), "category_id": 4, "bbox": a["bbox_xywh"]} for a in sample["ground_truth"]
        ],
    }
    results = [
        {"image_id": int(d["image"]), "category_id": 4, "bbox": d["bbox_xywh"], "score": d["score"]}
        for d in sample["detections"]
    ]
    files = write(tmp_path, truth, results)
    for threshold, expected in sample["expected_by_iou"].items():
        for points, key in (("all", "all_point"), ("11", "eleven_point")):
            scores = score_voc(*files, iou=float(threshold), points=points)
            assert scores["by_class"]["person"] == pytest.approx(expected[key]["person"]["AP"], abs=1e-9)
            assert scores["mAP"] == scores["by_class"]["person"]


def one_class(objects, found, **fields):
    truth = {"images": [{"id": 1}], "categories": [{"id": 0, "name": "a"}], "annotations": []}
    for box in objects:
        truth["annotations"].append({"image_id": 1, "category_id": 0, "bbox": box, **fields})
    rows = [{"image_id": 1, "category_id": 0, "bbox": box, "score": score} for box, score in found]
    return truth, rows


def test_pixels_are_inclusive(tmp_path):
    """Boxes of 1 x 2 and 1 x 1 pixels: IoU 1 / 2, though w = 0."""
    files = write(tmp_path, *one_class([[0, 0, 0, 1]], [([0, 0, 0, 0], 0.9)]))
    assert score_voc(*files)["mAP"] == 1
    assert score_voc(*files, iou=0.51)["mAP"] == 0


def test_a_recall_of_three_tenths_does_not_reach_the_fourth_point(tmp_path):
    places = [[20 * i, 0, 9, 9] for i in range(10)]
    files = write(tmp_path, *one_class(places, [(box, 0.9) for box in places[:3]]))
    assert score_voc(*files, points="all")["mAP"] == pytest.approx(0.3)
    assert score_voc(*files, points="11")["mAP"] == pytest.approx(3 / 11)


def test_nothing_to_measure_is_none(tmp_path):
    scores = score_voc(*write(tmp_path, *one_class([[0, 0, 9, 9]], [([0, 0, 9, 9], 0.9)], difficult=1)))
    assert scores == {"mAP": None, "by_class": {"a": None}}
    assert score_voc(*write(tmp_path, *one_class([[0, 0, 9, 9]], [])))["mAP"] == 0
    assert score_voc(*write(tmp_path, {"images": [], "annotations": [], "categories": []}, []))["mAP"] is None


def test_an_index_and_a_table_score_as_the_files(tmp_path):
    truth, results = random_case(11)
    for image in truth["images"]:
        image["file_name"] = f"{image['id']}.png"
    gt, dt = write(tmp_path, truth, results)
    import_data(gt, tmp_path / "index", images=False)
    scores = score_voc(gt, dt)
    of_index = score_voc(tmp_path / "index", dt)
    assert of_index["by_class"] == pytest.approx(scores["by_class"]) and scores["mAP"] > 0
    loaded = load_ground_truth(gt, details=True)
    assert score_voc(loaded, read_detections(dt, loaded.category_ids)) == scores


def test_wrong_calls_are_refused(tmp_path):
    files = write(tmp_path, *one_class([[0, 0, 9, 9]], []))
    for wrong in (0, -0.5, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="IoU must lie above 0"):
            score_voc(*files, iou=wrong)
    with pytest.raises(ConfigError, match=r"unknown points '12'.*'11'"):
        score_voc(*files, points="12")
    with pytest.raises(DataError, match="read without details"):
        score_voc(load_ground_truth(files[0]), DetectionTable.empty())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_boxes_that_end_behind_their_last_pixel(tmp_path_factory, seed):
    """With ``inclusive=False`` a box that is a pixel wider and higher is the same box."""
    truth, results = random_case(seed)
    expected = score_voc(*write(tmp_path_factory.mktemp("inclusive"), truth, results))
    for row in (*truth["annotations"], *results):
        x, y, w, h = row["bbox"]
        row["bbox"] = [x, y, w + 1, h + 1]
    found = score_voc(*write(tmp_path_factory.mktemp("behind"), truth, results), inclusive=False)
    assert found["mAP"] == pytest.approx(expected["mAP"]) and found["by_class"] == pytest.approx(expected["by_class"])
