"""``gesso score``: what each metric prints, and what it refuses in one line."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.evaluation.score_cases import write

BOX = [10, 10, 30, 80]


@pytest.fixture
def boxes(tmp_path):
    """A ground truth of two images and two classes; of three detections two are right. Gives --gt and --dt."""
    rows = [(1, 1, BOX, {}), (2, 1, BOX, {}), (2, 2, [90, 10, 30, 80], {"difficult": 1, "ignore": 1})]
    truth = {
        "images": [{"id": 1}, {"id": 2}],
        "categories": [{"id": 1, "name": "pedestrian"}, {"id": 2, "name": "rider"}],
        "annotations": [
            {"image_id": i, "category_id": c, "bbox": box, "vis_ratio": 1} | more for i, c, box, more in rows
        ],
    }
    found = [(1, BOX, 0.9), (1, [200, 10, 30, 80], 0.8), (2, BOX, 0.7)]
    results = [{"image_id": i, "category_id": 1, "bbox": box, "score": score} for i, box, score in found]
    gt, dt = write(tmp_path, truth, results)
    return "--gt", gt, "--dt", dt


@pytest.fixture
def maps(tmp_path):
    """Two label maps of two classes, of which one pixel in eight is wrong."""
    for folder, last in (("gt", 1), ("dt", 0)):
        (tmp_path / folder).mkdir()
        for number in range(2):
            array = np.array([[0, 0, 1, last], [0, 255 if folder == "gt" else 0, 1, 1]], np.uint8)
            Image.fromarray(array[:, ::-1] if number else array).save(tmp_path / folder / f"{number}.png")
    return "--gt", tmp_path / "gt", "--dt", tmp_path / "dt"


@pytest.fixture
def labels(tmp_path):
    (tmp_path / "gt.csv").write_text("image,label\na.jpg,cat\nb.jpg,dog\n")
    (tmp_path / "dt.csv").write_text("image,label\na.jpg,cat\nb.jpg,cat\nb.jpg,dog\n")
    return "--gt", tmp_path / "gt.csv", "--dt", tmp_path / "dt.csv"


def test_voc(gesso, boxes):
    scores = gesso.json("score", "voc", *boxes)
    assert scores == {"mAP": pytest.approx(5 / 6), "by_class": {"pedestrian": pytest.approx(5 / 6), "rider": None}}
    assert gesso.json("score", "voc", *boxes, "--points", "11")["mAP"] == pytest.approx((6 + 5 * 2 / 3) / 11)
    assert gesso.json("score", "voc", *boxes, "--iou", "1")["mAP"] == pytest.approx(5 / 6)
    assert gesso("score", "voc", *boxes).out == (
        "score  value\n-----  -----\nmAP    0.833\n\nclass          AP\n----------  -----\npedestrian  0.833\n"
        "rider           -\n"
    )


def test_miss_rate(gesso, boxes):
    scores = gesso.json("score", "miss-rate", *boxes)
    assert list(scores) == ["MR", "recall_at_fppi"]
    assert scores["recall_at_fppi"] == [0.5] * 7 + [1.0] * 2
    assert scores["MR"] == pytest.approx(0.5 ** (7 / 9) * 1e-10 ** (2 / 9))
    assert gesso.json("score", "miss-rate", *boxes, "--citypersons-compat")["MR"] == 0
    assert gesso.json("score", "miss-rate", *boxes, "--subset", "heavy")["MR"] == -1
    lines = gesso("score", "miss-rate", *boxes).out.splitlines()
    assert lines[2].split() == ["MR", "0.003"] and lines[4].split() == ["FPPI", "recall"]
    assert lines[6].split() == ["0.01", "0.500"] and lines[-1].split() == ["1", "1.000"]


def test_miou(gesso, maps):
    scores = gesso.json("score", "miou", *maps, "--num-classes", "3")
    assert list(scores) == ["mIoU", "pixel_accuracy", "mean_class_accuracy", "by_class"]
    assert scores["pixel_accuracy"] == pytest.approx(12 / 14)
    assert scores["by_class"] == {"0": pytest.approx(3 / 4), "1": pytest.approx(3 / 4), "2": None}
    near = gesso.json("score", "miou", *maps, "--num-classes", "3", "--trimap", "1")
    assert near["pixel_accuracy"] == 1 and near["by_class"]["1"] == 1
    assert near["anti_trimap"]["pixel_accuracy"] == pytest.approx(6 / 8)
    text = gesso("score", "miou", *maps, "--num-classes", "3").out
    assert text.splitlines()[0].split() == ["score", "value"] and "\nmIoU" in text and text.endswith("2          -\n")
    text = gesso("score", "miou", *maps, "--num-classes", "3", "--trimap", "1").out
    assert text.splitlines()[0].split() == ["score", "trimap", "outside"]


def test_miou_of_reduced_labels(gesso, maps, tmp_path):
    Image.fromarray(np.array([[0, 1, 2, 2]], np.uint8)).save(tmp_path / "gt" / "0.png")
    Image.fromarray(np.array([[1, 0, 1, 0]], np.uint8)).save(tmp_path / "dt" / "0.png")
    for folder in ("gt", "dt"):
        (tmp_path / folder / "1.png").unlink()
    scores = gesso.json("score", "miou", *maps, "--num-classes", "2", "--reduce-zero-label")
    assert scores["pixel_accuracy"] == pytest.approx(2 / 3)
    scores = gesso.json("score", "miou", *maps, "--num-classes", "3", "--ignore", "2")
    assert scores["pixel_accuracy"] == 0


def test_top1(gesso, labels):
    scores = gesso.json("score", "top1", *labels)
    assert scores == {"top1": 0.5, "top5": 1.0, "by_class": {"cat": 1.0, "dog": 0.0}}
    assert "top5   1.000" in gesso("score", "top1", *labels).out


@pytest.mark.parametrize("metric", ["voc", "miss-rate"])
def test_box_files_that_are_wrong(gesso, boxes, metric):
    _, gt, _, dt = boxes

    def line(truth=gt, found=dt):
        return gesso.mistake("score", metric, "--gt", truth, "--dt", found)

    absent = gt.with_name("absent.json")
    assert line(truth=absent).startswith(f"{absent}: No such file or directory.")
    assert line(found=absent).startswith(f"{absent}: No such file or directory.")
    assert line(truth=gt.parent).startswith(f"{gt.parent}: is no index")
    cut = gt.with_name("cut.json")
    for file, place in ((gt, "truth"), (dt, "found")):
        cut.write_bytes(file.read_bytes()[:-20])
        assert line(**{place: cut}).startswith(f"{cut}: this is not valid JSON: ")
    stray = {"image_id": 9, "category_id": 1, "bbox": BOX, "score": 0.5}
    cut.write_text(json.dumps([stray]))
    assert line(found=cut).startswith(f"{cut}: result 0 (counted from 0) is on image 9, which is not in {gt}. Score")
    cut.write_text(json.dumps([stray | {"image_id": 1, "category_id": 7}]))
    assert "has the unknown category id 7" in line(found=cut)


def test_options_that_are_wrong(gesso, boxes, maps):
    line = gesso.mistake("score", "miss-rate", *boxes, "--subset", "reasonabl")
    assert (
        line
        == "--subset of gesso score miss-rate cannot be 'reasonabl'. Did you mean 'reasonable' or 'reasonable_small'?"
    )
    assert "--points of gesso score voc cannot be '12'" in gesso.mistake("score", "voc", *boxes, "--points", "12")
    assert "the IoU must lie above 0" in gesso.mistake("score", "voc", *boxes, "--iou", "2")
    assert "gesso score miou needs --num-classes INT" in gesso.mistake("score", "miou", *maps)
    assert "classes must be 1 to 4096, found 0" in gesso.mistake("score", "miou", *maps, "--num-classes", "0")
    line = gesso.mistake("score", "miou", *maps, "--num-classes", "2", "--trimap", "0")
    assert line == "the trimap must be at least 1 pixel wide, found 0"
    assert "unknown command 'gesso score mious'. Did you mean 'miou'" in gesso.mistake("score", "mious")


def test_a_missing_ratio_is_asked_for(gesso, boxes):
    _, gt, _, _ = boxes
    truth = json.loads(gt.read_text())
    del truth["annotations"][1]["vis_ratio"]
    gt.write_text(json.dumps(truth))
    line = gesso.mistake("score", "miss-rate", *boxes)
    assert line.startswith(f"{gt}: annotation 1 (counted from 0) has no vis_ratio. Add")


def test_label_maps_that_are_wrong(gesso, maps):
    _, gt, _, dt = maps

    def line(*more):
        return gesso.mistake("score", "miou", *maps, "--num-classes", "2", *more)

    assert line("--gt", gt / "x").startswith(f"{gt / 'x'}: there is no such folder.")
    assert line("--ignore", "254").startswith(f"{gt / '0.png'}: a pixel has the value 255. The classes are 0 to 1, and")
    Image.new("L", (4, 2), 7).save(dt / "1.png")
    for more in ([], ["--trimap", "2"]):
        assert line(*more).startswith(f"{dt / '1.png'}: a pixel has the value 7.")
    Image.new("L", (2, 4)).save(dt / "1.png")
    assert line().startswith(f"{dt / '1.png'}: the prediction has 4 x 2 pixels, its truth {gt / '1.png'} has 2 x 4.")
    (dt / "1.png").unlink()
    assert line().startswith(f"{dt}: the prediction for {gt / '1.png'} is missing.")


def test_label_files_that_are_wrong(gesso, labels):
    _, gt, _, dt = labels
    dt.write_text("picture,label\na.jpg,cat\n")
    line = gesso.mistake("score", "top1", *labels)
    assert line.startswith(f"{dt}: the column 'image' is missing: the file has the columns picture, label.")
    dt.write_text("image,label\na.jpg,cat\nz.jpg,cat\n")
    assert gesso.mistake("score", "top1", *labels).startswith(f"{dt}: line 3: the image 'z.jpg' is not in {gt}.")
    assert "No such file" in gesso.mistake("score", "top1", "--gt", gt.with_name("x"), "--dt", dt)
