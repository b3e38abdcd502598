import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gesso.data.index import Index
from gesso.data.index_writer import IndexWriter
from gesso.data.records import (
    CROWD,
    DIFFICULT,
    GROUP_OF,
    IGNORE,
    ImageBlock,
    Masks,
    ObjectBlock,
    Polygons,
    Source,
    Strings,
)
from gesso.data.rle import encode
from gesso.errors import ConfigError, DataError
from gesso.evaluation import coco
from gesso.evaluation.coco import KEYS, MASK_KEYS, score_coco, score_masks
from gesso.evaluation.detections import DetectionTable
from gesso.evaluation.ground_truth import load_ground_truth
from gesso.evaluation.masks import pack
from gesso.label_space import LabelSpace
from tests.evaluation.coco_cases import pycocotools_counts, random_case

GOLDEN_KEYS = {"APs": "AP_small", "APm": "AP_medium", "APl": "AP_large"}
GOLDEN_KEYS |= {"ARs": "AR_small", "ARm": "AR_medium", "ARl": "AR_large"}


def write(folder, truth, results):
    (folder / "gt.json").write_text(json.dumps(truth))
    (folder / "dt.json").write_text(json.dumps(results))
    return folder / "gt.json", folder / "dt.json"


def assert_golden(scores, expected, ids):
    for key in KEYS:
        assert scores[key] == pytest.approx(expected["stats"][GOLDEN_KEYS.get(key, key)], abs=1e-9), key
    by_class = list(scores["by_class"].values())
    assert by_class == pytest.approx([expected["per_category"][str(i)]["AP"] for i in ids], abs=1e-9)


def test_golden_val2014(golden):
    folder = golden / "coco"
    truth = folder / "instances_val2014_100_bbox.json"
    scores = score_coco(truth, folder / "instances_val2014_fakebbox100_results.json")
    ids = [c["id"] for c in json.loads(truth.read_text())["categories"]]
    assert_golden(scores, json.loads((folder / "expected_bbox.json").read_text()), ids)


def test_golden_edge_cases(golden, tmp_path):
    cases = json.loads((golden / "coco/edge_cases.json").read_text())
    assert len(cases) > 15
    for name, case in cases.items():
        scores = score_coco(*write(tmp_path, case["ground_truth"], case["detections"]))
        if name == "annotation_id_zero_quirk":
            assert scores["AP"] == pytest.approx(1)
            continue
        assert_golden(scores, case["expected"], [c["id"] for c in case["ground_truth"]["categories"]])


def counts_of(folder, truth, results, iou_type):
    gt, dt = write(folder, truth, results)
    loaded = load_ground_truth(gt, masks=iou_type == "segm")
    table = coco.read_detections(dt, loaded.category_ids, masks=iou_type == "segm")
    return coco._count(loaded, table, "here", iou_type), score_coco(gt, dt, iou_type)


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_equal_to_pycocotools_bit_for_bit(tmp_path_factory, iou_type, seed):
    truth, results = random_case(seed, masks=iou_type == "segm")
    if not results:
        return
    precision, recall, stats = pycocotools_counts(truth, results, iou_type)
    (ours, ours_recall, _), scores = counts_of(tmp_path_factory.mktemp("case"), truth, results, iou_type)
    assert np.array_equal(ours, precision)
    assert np.array_equal(ours_recall, recall)
    assert [scores[key] for key in KEYS] == stats.tolist()


def test_segm_with_boxes_takes_the_area_of_the_boxes_as_pycocotools_does(tmp_path):
    truth, results = random_case(3, masks=True)
    rng = np.random.default_rng(0)
    for row in results:
        row["bbox"] = [1.0, 2.0, *rng.uniform(5, 200, 2).tolist()]
    precision, _, _ = pycocotools_counts(truth, results, "segm")
    (ours, _, _), _ = counts_of(tmp_path, truth, results, "segm")
    assert np.array_equal(ours, precision)


def test_masks_alone_are_scored_as_boxes_too(tmp_path):
    truth, results = random_case(4, masks=True)
    precision, recall, _ = pycocotools_counts(truth, results, "bbox")
    (ours, ours_recall, _), _ = counts_of(tmp_path, truth, results, "bbox")
    assert np.array_equal(ours, precision)
    assert np.array_equal(ours_recall, recall)


def test_a_table_scores_as_its_file(tmp_path):
    truth, results = random_case(5)
    gt, dt = write(tmp_path, truth, results)
    loaded = load_ground_truth(gt)
    table = coco.read_detections(dt, loaded.category_ids)
    assert score_coco(loaded, table) == score_coco(gt, dt)


def test_no_detections_and_no_annotations(tmp_path):
    truth, _ = random_case(6)
    scores = score_coco(*write(tmp_path, truth, []))
    assert scores["AP"] == 0 and scores["AR100"] == 0
    scores = score_coco(*write(tmp_path, truth | {"annotations": []}, []))
    assert [scores[key] for key in KEYS] == [-1.0] * 12
    scores = score_coco(*write(tmp_path, {"images": [], "annotations": [], "categories": []}, []))
    assert scores["AP"] == -1 and scores["by_class"] == {}
    truth, _ = random_case(6, masks=True)
    assert score_coco(*write(tmp_path, truth, []), iou_type="segm")["AP"] == 0


def test_names_that_stand_twice_get_their_id(tmp_path):
    truth, results = random_case(7)
    for category in truth["categories"][:2]:
        category["name"] = "same"
    first, second = (category["id"] for category in truth["categories"][:2])
    by_class = score_coco(*write(tmp_path, truth, results))["by_class"]
    assert len(by_class) == 4
    assert {f"same ({first})", f"same ({second})"} <= by_class.keys()


def small_truth(**changes):
    annotation = {"id": 1, "image_id": 1, "category_id": 0, "bbox": [0, 0, 9, 9], "area": 81, "iscrowd": 0}
    return {
        "images": [{"id": 1, "height": 20, "width": 30}],
        "categories": [{"id": 0, "name": "a"}],
        "annotations": [annotation | changes],
    }


GOOD = {"image_id": 1, "category_id": 0, "bbox": [0, 0, 9, 9], "score": 0.5}


@pytest.mark.parametrize(
    ("truth", "row", "message"),
    [
        (small_truth(), GOOD | {"image_id": 8}, r"dt.json: result 1 .* is on image 8, which is not in .*gt.json"),
        (small_truth(), GOOD | {"category_id": 8}, r"result 1 .* unknown category id 8.*ground truth: 0"),
        (small_truth(image_id=4), GOOD, r"gt.json: annotation 0 .* image_id 4, which the file does not list"),
        (small_truth(category_id=4), GOOD, r"annotation 0 .* category_id 4"),
        (small_truth(bbox=None), GOOD, r"annotation 0 .* has no bbox"),
        (small_truth(bbox=[1, 2, 3]), GOOD, r"Expected `array` of length 4.*annotations\[0\].bbox"),
    ],
)
def test_data_that_does_not_fit_is_one_line(tmp_path, truth, row, message):
    with pytest.raises(DataError, match=message) as caught:
        score_coco(*write(tmp_path, truth, [GOOD, row]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [{"id": 1}], "annotations": [', r"not valid JSON: .* line 1, column 41"),
        ('{"images": [], "annotations": []}', r"missing required field `categories`"),
        ("[]", "Expected `object`, got `array`"),
        ('{"images": [{"id": 1}, {"id": "x"}], "annotations": [], "categories": []}', r"\$\.images\[1\]\.id"),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}',
            "two categories have the id 1",
        ),
        ('{"images": [], "annotations": [], "categories": [], "x": NaN}', "not valid JSON.*NaN"),
    ],
)
def test_broken_ground_truth_names_the_place(tmp_path, text, message):
    path = tmp_path / "gt.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        score_coco(path, DetectionTable.empty())
    with pytest.raises(DataError, match="No such file"):
        score_coco(tmp_path / "absent.json", DetectionTable.empty())


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ("abc", "RLE or a list of polygons"),
        ([[0, 0, 2, 0, 2]], "at least three points"),
        ([[0, 0, 2, 0, 2, "x"]], "no number"),
        ({"size": [20, 30], "counts": [1, 2]}, "do not fill"),
        ({"size": [20, 30], "counts": "zzzz"}, "negative|fill|form"),
        ({"size": [30, 20], "counts": [600]}, "do not fill a picture of 20 x 30"),
        (None, "RLE or a list"),
    ],
)
def test_broken_masks_of_the_ground_truth_are_no_silent_zero(tmp_path, segmentation, message):
    gt, dt = write(tmp_path, small_truth(segmentation=segmentation), [])
    with pytest.raises(DataError, match=f"annotation 0 .*({message})"):
        score_coco(gt, dt, "segm")


def test_mask_of_another_size_and_missing_masks(tmp_path):
    truth = small_truth(segmentation=[[0, 0, 9, 0, 9, 9]])
    gt, dt = write(tmp_path, truth, [GOOD | {"segmentation": {"size": [10, 30], "counts": [300]}}])
    with pytest.raises(DataError, match=r"mask of result 0 .* is of 10 x 30 pixels, its image has 20 x 30"):
        score_coco(gt, dt, "segm")
    table = DetectionTable(image_id=[1], label=[0], score=[0.5], xyxy=[[0, 0, 9, 9]])
    with pytest.raises(DataError, match="no masks"):
        score_coco(gt, table, "segm")
    with pytest.raises(DataError, match="read without masks"):
        score_coco(load_ground_truth(gt), table, "segm")


def test_tables_are_checked(tmp_path):
    gt, _ = write(tmp_path, small_truth(), [])
    xyxy = [[0, 0, 9, 9]]
    with pytest.raises(DataError, match=r"label 3, but .* has 1 classes"):
        score_coco(gt, DetectionTable(image_id=[1], label=[3], score=[0.5], xyxy=xyxy))
    with pytest.raises(DataError, match="not finite"):
        score_coco(gt, DetectionTable(image_id=[1], label=[0], score=[np.nan], xyxy=xyxy))
    with pytest.raises(ConfigError, match="Did you mean 'bbox'"):
        score_coco(gt, DetectionTable.empty(), "box")


def index_of(folder, truth, flags=None, masks=None):
    space = LabelSpace(
        names=tuple(c["name"] for c in truth["categories"]), ids=tuple(c["id"] for c in truth["categories"])
    )
    writer = IndexWriter(folder / "index", space, sources=[Source(name="here", root=str(folder))])
    images, annotations = truth["images"], truth["annotations"]
    writer.add_images(
        ImageBlock(
            ids=np.array([i["id"] for i in images], np.int64),
            names=Strings.of(f"{i['id']}.jpg" for i in images),
            widths=np.array([i["width"] for i in images], np.int32),
            heights=np.array([i["height"] for i in images], np.int32),
        )
    )
    row = {i["id"]: k for k, i in enumerate(images)}
    xyxy = np.array([a["bbox"] for a in annotations], np.float32).reshape(-1, 4)
    xyxy[:, 2:] += xyxy[:, :2]
    crowd = np.array([CROWD * a["iscrowd"] for a in annotations], np.uint16)
    writer.add_objects(
        ObjectBlock(
            rows=np.array([row[a["image_id"]] for a in annotations], np.int64),
            xyxy=xyxy,
            labels=np.array([space.ids.index(a["category_id"]) for a in annotations], np.int64),
            flags=crowd if flags is None else np.array(flags, np.uint16),
            areas=np.array([a["area"] for a in annotations], np.float32),
            masks=None if masks is None else Masks.of(masks),
        )
    )
    return writer.finish()


@pytest.mark.parametrize("seed", range(4))
def test_an_index_scores_as_its_file(tmp_path, seed):
    truth, results = random_case(seed)
    gt, dt = write(tmp_path, truth, results)
    path = index_of(tmp_path, truth)
    expected = score_coco(gt, dt)
    assert score_coco(path, dt) == expected  # half pixels are exact in float32
    assert score_coco(Index.open(path), dt) == expected


@pytest.mark.parametrize(("flag", "ap"), [(0, 0.0), (IGNORE, -1.0), (DIFFICULT, -1.0), (CROWD, -1.0), (GROUP_OF, 0.0)])
def test_ignored_objects_of_an_index_count_for_nothing(tmp_path, flag, ap):
    path = index_of(tmp_path, small_truth(), flags=[flag])
    assert score_coco(path, DetectionTable.empty())["AP"] == ap


def test_an_index_with_masks(tmp_path):
    truth = small_truth()
    picture = np.zeros((20, 30), np.uint8)
    picture[:9, :9] = 1
    path = index_of(tmp_path, truth, masks=[encode(picture)])
    table = DetectionTable(image_id=[1], label=[0], score=[1], xyxy=[[0, 0, 9, 9]], masks=Masks.of([encode(picture)]))
    assert score_coco(path, table, "segm")["AP"] == pytest.approx(1)
    half = picture.copy()
    half[:9, :4] = 0
    table = DetectionTable(image_id=[1], label=[0], score=[1], xyxy=[[0, 0, 9, 9]], masks=Masks.of([encode(half)]))
    assert score_coco(path, table, "segm")["AP50"] == pytest.approx(1)
    assert score_coco(path, table, "segm")["AP75"] == 0


def test_an_index_without_masks_or_with_equal_ids_is_refused(tmp_path):
    truth = small_truth()
    with pytest.raises(DataError, match=r"annotation 0 .* has no mask"):
        score_coco(index_of(tmp_path, truth), DetectionTable.empty(), "segm")
    truth["images"] *= 2
    (tmp_path / "b").mkdir()
    with pytest.raises(DataError, match="two images have the id 1"):
        score_coco(index_of(tmp_path / "b", truth), DetectionTable.empty())


@pytest.mark.parametrize("seed", range(4))
def test_masks_of_detections_with_boxes_are_scored_as_pycocotools_scores_them_without(tmp_path, seed):
    """The area of a mask decides which range it is in, whatever box stands beside it."""
    truth, results = random_case(seed, masks=True)
    masks = []
    for annotation in truth["annotations"]:
        segmentation = annotation["segmentation"]
        if isinstance(segmentation, dict):
            masks.append(pack(segmentation))
            continue
        ring = np.array(segmentation[0], np.float32)
        annotation["segmentation"] = [ring.astype(float).tolist()]
        masks.append(Polygons((ring.reshape(-1, 2),)))
    gt, dt = write(tmp_path, truth, results)
    found = coco.read_detections(dt, load_ground_truth(gt).category_ids, masks=True)
    wide = np.concatenate([found.xyxy[:, :2], found.xyxy[:, :2] + 500], axis=1)
    table = DetectionTable(image_id=found.image_id, label=found.label, score=found.score, xyxy=wide, masks=found.masks)
    *_, stats = pycocotools_counts(truth, results, "segm")
    scores = score_masks(Index.open(index_of(tmp_path, truth, masks=masks)), table)
    assert list(scores) == list(MASK_KEYS) and list(scores.values()) == stats[:6].tolist()


def test_objects_without_a_mask_are_neither_missed_nor_false_when_masks_are_scored(tmp_path):
    truth = small_truth()
    truth["annotations"].append(truth["annotations"][0] | {"id": 2, "bbox": [15, 5, 10, 10]})
    picture = np.zeros((2, 20, 30), np.uint8)
    picture[0, :9, :9] = 1
    picture[1, 6:14, 16:24] = 1
    index = Index.open(index_of(tmp_path, truth, masks=[encode(picture[0]), None]))

    def found(*places):
        table = DetectionTable(
            image_id=[1] * len(places),
            label=[0] * len(places),
            score=[0.9 if place else 0.5 for place in places],
            xyxy=[[0, 0, 9, 9]] * len(places),
            masks=Masks.of([encode(picture[place]) for place in places]),
        )
        return score_masks(index, table)["mask_AP"]

    assert found(0) == pytest.approx(1)
    assert found(0, 1) == pytest.approx(1), "what lies in the box of the object without a mask is not judged"
    assert found(1) == 0
    assert score_masks(index, DetectionTable.empty())["mask_AP"] == 0


def test_no_mask_at_all_can_be_scored_on_nothing(tmp_path):
    index = Index.open(index_of(tmp_path, small_truth()))
    assert set(score_masks(index, DetectionTable.empty()).values()) == {-1.0}
