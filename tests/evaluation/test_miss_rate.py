import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gesso.data.importing import import_data
from gesso.errors import ConfigError, DataError
from gesso.evaluation.detection_files import read_detections
from gesso.evaluation.ground_truth import load_ground_truth
from gesso.evaluation.miss_rate import FPPI, SUBSETS, score_miss_rate
from tests.evaluation.score_cases import by_score, iou, random_case, write

SETUPS = {
    "Reasonable": "reasonable",
    "Reasonable_small": "reasonable_small",
    "Reasonable_occ=heavy": "heavy",
    "All": "all",
}
RANGES = {
    "reasonable": (50, math.inf, 0.65, math.inf),
    "reasonable_small": (50, 75, 0.65, math.inf),
    "heavy": (50, math.inf, 0.2, 0.65),
    "all": (20, math.inf, 0.2, math.inf),
}


def reference(truth, results, subset, compat):
    """One detection after the other: the best free object of the subset, else an ignored one."""
    low, high, least, most = RANGES[subset]
    counted, ignored = [], []
    for a in truth["annotations"]:
        inside = low <= a["height"] <= high and least <= a["vis_ratio"] <= most
        (ignored if a["ignore"] or a["iscrowd"] or not inside else counted).append(a)
    if not counted:
        return -1.0, [-1.0] * 9
    taken, right, wrong, curve = set(), 0, 0, []
    for row in by_score(results):
        if not low / 1.25 <= row["bbox"][3] < high * 1.25:
            continue
        best, which = 0.5, None
        for a in counted:
            if a["image_id"] == row["image_id"] and a["id"] not in taken:
                overlap = iou(row["bbox"], a["bbox"])
                if overlap >= best:
                    best, which = overlap, a
        if which is not None:
            taken.add(which["id"])
            right += 1
        elif any(
            a["image_id"] == row["image_id"] and iou(row["bbox"], a["bbox"], of_first=True) >= 0.5 for a in ignored
        ):
            continue
        else:
            wrong += 1
        curve.append((wrong / len(truth["images"]), right / len(counted)))
    recalls = []
    for point in (0.01, 0.0178, 0.0316, 0.0562, 0.1, 0.1778, 0.3162, 0.5623, 1.0):
        reached = [recall for fppi, recall in curve if fppi <= point]
        before = curve[-1][1] if compat and curve else 0.0
        recalls.append(reached[-1] if reached else before)
    if compat and 1.0 in recalls:
        return 0.0, recalls
    return math.exp(sum(math.log(max(1 - recall, 1e-10)) for recall in recalls) / 9), recalls


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    images=st.sampled_from([2, 20]),
    subset=st.sampled_from(list(RANGES)),
    compat=st.booleans(),
)
def test_equal_to_one_detection_after_the_other(tmp_path_factory, seed, images, subset, compat):
    truth, results = random_case(seed, images=images, classes=1)
    files = write(tmp_path_factory.mktemp("case"), truth, results)
    scores = score_miss_rate(*files, subset=subset, citypersons_compat=compat)
    rate, recalls = reference(truth, results, subset, compat)
    assert scores["recall_at_fppi"] == pytest.approx(recalls, abs=1e-12)
    assert scores["MR"] == pytest.approx(rate, abs=1e-12)


def test_golden(golden, tmp_path):
    files = sorted((golden / "citypersons").glob("*.json"))
    assert len(files) >= 3
    for file in files:
        case = json.loads(file.read_text())
        paths = write(tmp_path, case["ground_truth"], case["detections"])
        for setup, expected in case["expected"].items():
            scores = score_miss_rate(*paths, subset=SETUPS[setup], citypersons_compat=True)
            assert scores["MR"] == pytest.approx(expected["MR"], abs=1e-9), (file.name, setup)


def people(*boxes, images=1, **fields):
    """Boxes (image, x, y, w, h), whole people of their boxes' height unless ``fields`` say otherwise."""
    truth = {"images": [{"id": i} for i in range(images)], "categories": [{"id": 1, "name": "Pedestrian"}]}
    rows = [{"image_id": image, "category_id": 1, "bbox": box, "vis_ratio": 1} | fields for image, *box in boxes]
    return truth | {"annotations": rows}


def found(*rows):
    return [{"image_id": image, "category_id": 1, "bbox": box, "score": score} for image, score, *box in rows]


ONE = (0, 10, 10, 30, 80)


def test_all_found_and_nothing_found(tmp_path):
    scores = score_miss_rate(*write(tmp_path, people(ONE), found((0, 0.9, *ONE[1:]))))
    assert scores["MR"] == pytest.approx(1e-10) and scores["recall_at_fppi"] == [1.0] * 9
    assert list(scores) == ["MR", "recall_at_fppi"] and len(FPPI) == 9
    files = write(tmp_path, people(ONE), [])
    for compat in (False, True):
        assert score_miss_rate(*files, citypersons_compat=compat) == {"MR": 1.0, "recall_at_fppi": [0.0] * 9}
    assert score_miss_rate(*write(tmp_path, people(), found((0, 0.9, *ONE[1:])))) == {
        "MR": -1.0,
        "recall_at_fppi": [-1.0] * 9,
    }


def test_a_first_false_positive_in_few_images(tmp_path):
    """In 4 images one false positive is 0.25 FPPI: six points lie before it, two at it, and none counts a later one."""
    rows = found((1, 0.9, 100, 10, 30, 80), (0, 0.5, *ONE[1:]))
    files = write(tmp_path, people(ONE, (2, 10, 10, 30, 80), images=4), rows)
    caltech, citypersons = (score_miss_rate(*files, citypersons_compat=compat) for compat in (False, True))
    assert caltech["recall_at_fppi"] == [0.0] * 6 + [0.5] * 3
    assert caltech["MR"] == pytest.approx(0.5 ** (3 / 9))
    assert citypersons["recall_at_fppi"] == [0.5] * 9
    assert citypersons["MR"] == pytest.approx(0.5)


def test_one_point_without_a_miss(tmp_path):
    rows = found((1, 0.9, 100, 10, 30, 80), (0, 0.5, *ONE[1:]))
    files = write(tmp_path, people(ONE, images=4), rows)
    assert score_miss_rate(*files)["MR"] == pytest.approx(1e-10 ** (3 / 9))
    assert score_miss_rate(*files, citypersons_compat=True)["MR"] == 0


def test_a_detection_in_an_ignored_region_is_no_false_positive(tmp_path):
    inner = (0, 0.9, 20, 20, 10, 50)  # a small part of ONE: only IoA reaches 1/2
    other = (0, 200, 10, 30, 80)
    rows = found(inner, inner, (0, 0.5, *other[1:]))
    truth = people(ONE, other)
    assert score_miss_rate(*write(tmp_path, truth, rows))["recall_at_fppi"] == [0.0] * 9
    for change in ({"ignore": 1}, {"iscrowd": 1}, {"vis_ratio": 0.6}, {"height": 40}, {"ignore": 1, "vis_ratio": None}):
        truth["annotations"][0] = people(ONE, **change)["annotations"][0]
        assert score_miss_rate(*write(tmp_path, truth, rows))["recall_at_fppi"] == [1.0] * 9, change


@pytest.mark.parametrize(("height", "counts"), [(39.9, False), (40, True), (93.7, True), (93.75, False)])
def test_heights_of_detections_may_lie_a_quarter_outside(tmp_path, height, counts):
    rows = found((0, 0.9, 10, 10, 30, height), (0, 0.5, 200, 10, 30, 60))
    files = write(tmp_path, people((0, 200, 10, 30, 60)), rows)
    recalls = score_miss_rate(*files, subset="reasonable_small")["recall_at_fppi"]
    assert recalls[0] == (0.0 if counts else 1.0), "one that counts is false, and comes first"


def test_limits_belong_to_the_subset(tmp_path):
    for subset, fields in (
        ("reasonable", {"height": 50, "vis_ratio": 0.65}),
        ("reasonable_small", {"height": 75, "vis_ratio": 0.65}),
        ("heavy", {"height": 50, "vis_ratio": 0.2}),
        ("heavy", {"height": 50, "vis_ratio": 0.65}),
        ("all", {"height": 20, "vis_ratio": 0.2}),
    ):
        assert score_miss_rate(*write(tmp_path, people(ONE, **fields), []), subset=subset)["MR"] == 1, fields
    for subset, fields in (
        ("reasonable", {"height": 49.9}),
        ("reasonable", {"vis_ratio": 0.64}),
        ("reasonable_small", {"height": 75.1}),
        ("heavy", {"vis_ratio": 0.66}),
        ("all", {"height": 19}),
    ):
        assert score_miss_rate(*write(tmp_path, people(ONE, **fields), []), subset=subset)["MR"] == -1, fields


def test_a_thousand_detections_an_image_count(tmp_path):
    crowd = found(*((0, 0.9 - i / 10_000, 500.0, 10, 30, 10) for i in range(1000)))  # too low to be judged
    files = write(tmp_path, people(ONE), crowd[:999] + found((0, 0.1, *ONE[1:])))
    assert score_miss_rate(*files)["recall_at_fppi"][0] == 1
    files = write(tmp_path, people(ONE), crowd + found((0, 0.1, *ONE[1:])))
    assert score_miss_rate(*files)["recall_at_fppi"][0] == 0


def test_only_pedestrians_are_scored(tmp_path):
    truth = people(ONE)
    truth["categories"] = [{"id": 0, "name": "ignore region"}, {"id": 1, "name": "person"}, {"id": 2, "name": "rider"}]
    rider = {"image_id": 0, "category_id": 2, "bbox": [99, 10, 30, 80]}
    truth["annotations"].append(rider)
    rows = [rider | {"score": 0.95}, *found((0, 0.9, *ONE[1:]))]
    assert score_miss_rate(*write(tmp_path, truth, rows))["recall_at_fppi"] == [1.0] * 9
    truth["categories"][1]["name"] = "people"
    with pytest.raises(
        DataError, match=r"no category 'pedestrian' or 'person', but 'ignore region', 'people', 'rider'"
    ):
        score_miss_rate(*write(tmp_path, truth, rows))


def test_an_index_and_a_table_score_as_the_files(tmp_path):
    truth, results = random_case(5, images=40, classes=1)
    for image in truth["images"]:
        image["file_name"] = f"{image['id']}.png"
    gt, dt = write(tmp_path, truth, results)
    import_data(gt, tmp_path / "index", images=False)
    loaded = load_ground_truth(gt, details=True)
    table = read_detections(dt, loaded.category_ids)
    for subset in SUBSETS:
        scores = score_miss_rate(gt, dt, subset=subset)
        assert 0 < scores["MR"] < 1
        of_index = score_miss_rate(tmp_path / "index", dt, subset=subset)
        assert of_index["recall_at_fppi"] == pytest.approx(scores["recall_at_fppi"])
        assert score_miss_rate(loaded, table, subset=subset) == scores


def test_an_index_without_these_columns_takes_the_boxes_height_and_asks_for_the_ratio(tmp_path):
    truth = people(ONE)
    truth["images"][0] |= {"file_name": "0.png", "width": 300, "height": 300}
    truth["annotations"][0]["id"] = 1
    gt, dt = write(tmp_path, truth, [])
    import_data(gt, tmp_path / "index", images=False)
    details = load_ground_truth(tmp_path / "index", details=True).details
    assert details.heights.tolist() == [80] and details.vis_ratios.tolist() == [1]
    assert score_miss_rate(tmp_path / "index", dt)["MR"] == 1
    del truth["annotations"][0]["vis_ratio"]
    gt, dt = write(tmp_path, truth, [])
    import_data(gt, tmp_path / "other", images=False)
    for source in (gt, tmp_path / "other"):
        with pytest.raises(DataError, match=r"annotation 0 .* has no vis_ratio. Add"):
            score_miss_rate(source, dt)


def test_an_unknown_subset_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"unknown subset 'reasonabel'. Did you mean 'reasonable'"):
        score_miss_rate(*write(tmp_path, people(ONE), []), subset="reasonabel")


def test_among_equal_overlaps_the_later_object_is_taken(tmp_path):
    """The first detection lies halfway between both; the second can find but one of them."""
    left, right = (0, 0, 10, 40, 80), (0, 8, 10, 40, 80)
    halfway = (0, 0.9, 4, 10, 40, 80)
    for second, recalls in ((left, 1.0), ((0, 16, 10, 40, 80), 0.5)):
        files = write(tmp_path, people(left, right, images=1), found(halfway, (0, 0.8, *second[1:])))
        assert score_miss_rate(*files)["recall_at_fppi"][0] == recalls
    assert np.isclose(iou([4, 10, 40, 80], left[1:]), iou([4, 10, 40, 80], right[1:]))
