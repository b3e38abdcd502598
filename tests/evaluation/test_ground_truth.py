import numpy as np
import pytest

from gesso.data.importing import import_data
from gesso.errors import DataError
from gesso.evaluation.ground_truth import load_ground_truth
from tests.evaluation.score_cases import random_case, write


def test_details_are_the_fields_of_the_file(tmp_path):
    truth, _ = random_case(2)
    rows = truth["annotations"]
    for key in ("height", "vis_ratio", "difficult", "ignore", "iscrowd"):
        del rows[0][key]
        rows[1][key] = None
    gt, _ = write(tmp_path, truth, [])
    details = load_ground_truth(gt, details=True).details
    assert details.difficult.tolist() == [bool(a.get("difficult")) for a in rows]
    assert details.ignore.tolist() == [bool(a.get("ignore") or a.get("iscrowd")) for a in rows]
    assert details.heights.tolist() == [a.get("height") or a["bbox"][3] for a in rows]
    ratios = [np.nan if a.get("vis_ratio") is None else a["vis_ratio"] for a in rows]
    assert np.array_equal(details.vis_ratios, ratios, equal_nan=True)
    assert load_ground_truth(gt).details is None


def test_details_of_an_index_are_those_of_its_file(tmp_path):
    truth, _ = random_case(3)
    for image in truth["images"]:
        image["file_name"] = f"{image['id']}.png"
    truth["images"].sort(key=lambda image: image["id"])
    truth["annotations"].sort(key=lambda a: a["image_id"])
    gt, _ = write(tmp_path, truth, [])
    import_data(gt, tmp_path / "index", images=False)
    of_file, of_index = (load_ground_truth(source, details=True) for source in (gt, tmp_path / "index"))
    assert len(of_file.rows) > 5 and np.array_equal(of_file.rows, of_index.rows)
    for name in ("difficult", "ignore"):
        assert np.array_equal(getattr(of_file.details, name), getattr(of_index.details, name))
    assert of_index.details.vis_ratios.dtype == np.float32
    for limit in (0.2, 0.65):  # a Python float is compared in the column's own type
        assert np.array_equal(of_file.details.vis_ratios >= limit, of_index.details.vis_ratios >= limit)
        assert np.array_equal(of_file.details.vis_ratios <= limit, of_index.details.vis_ratios <= limit)
    assert of_file.details.heights == pytest.approx(of_index.details.heights)
    assert load_ground_truth(tmp_path / "index").details is None


def test_details_that_are_no_numbers_are_refused_where_they_are_read(tmp_path):
    truth, _ = random_case(4)
    truth["annotations"][1]["vis_ratio"] = "much"
    gt, _ = write(tmp_path, truth, [])
    assert len(load_ground_truth(gt).rows) == len(truth["annotations"])
    with pytest.raises(DataError, match=r"Expected `float \| null`, got `str` in \$.annotations\[1\].vis_ratio"):
        load_ground_truth(gt, details=True)
