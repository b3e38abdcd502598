"""Masks around a run: what it is refused for, what it is scored by, what it predicts and what its report shows."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from gesso.data.index import Index
from gesso.data.index_writer import IndexWriter
from gesso.data.records import ImageBlock, Masks, ObjectBlock, Rle
from gesso.data.rle import decode
from gesso.errors import ConfigError, DataError
from gesso.evaluation.coco import KEYS, MASK_KEYS, score_coco
from gesso.evaluation.detection_files import read_detections
from gesso.models.mask_head import MaskHeadConfig
from gesso.run.config import RunConfig
from gesso.run.data import check_data
from gesso.run.folder import RunFolder
from gesso.run.models import load_run
from gesso.run.report import last_detections, write_run_report
from gesso.run.train import train
from tests.run.helpers import Data, rows, tiny_run

HEAD = MaskHeadConfig(convs=1, width=16, target_side=28)


def masked_run(data: Data, **training) -> RunConfig:
    config = tiny_run(data, **{"steps": 2, "batch_size": 4, "evaluate_every": 2} | training)
    postprocess = dataclasses.replace(config.model.postprocess, detections=20)
    model = dataclasses.replace(config.model, mask_head=HEAD, postprocess=postprocess)
    return dataclasses.replace(config, model=model)


def with_masks(index: Index, out: Path, masks: Masks | None) -> Path:
    """A copy of an index with other masks."""
    writer = IndexWriter(out, index.label_space, sources=index.sources)
    writer.add_images(ImageBlock(ids=index.image_ids, names=index.names, widths=index.widths, heights=index.heights))
    objects = np.repeat(np.arange(len(index)), np.diff(index.offsets))
    writer.add_objects(ObjectBlock(rows=objects, xyxy=index.boxes, labels=index.labels, masks=masks))
    return writer.finish()


@pytest.fixture(scope="module")
def masked(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("masked") / "run"
    train(masked_run(data), out, recipe="own:masks")
    return out


def test_masks_are_learnt_and_scored(data, masked):
    losses, scores = ([row for row in rows(masked) if key in row] for key in ("mask", "AP"))
    assert len(losses) == 2 and all(row["mask"] > 0 for row in losses)
    found, table = load_run(masked).evaluate(Index.open(data.val))
    assert found == {key: scores[-1][key] for key in (*KEYS, "by_class", *MASK_KEYS)}
    stored = read_detections(
        masked / "detections" / "00000002" / "detections.parquet", Index.open(data.val).label_space.ids, masks=True
    )
    assert len(table) == len(stored) > 0
    assert [table.masks[i] for i in range(len(table))] == [stored.masks[i] for i in range(len(stored))]
    again = score_coco(data.val, stored, "segm")
    assert [again[key] for key in ("AP", "AP50", "AP75")] == [found[f"mask_{key}"] for key in ("AP", "AP50", "AP75")]


def test_validation_data_without_masks_is_scored_by_boxes_alone(data, masked, tmp_path):
    index = Index.open(data.val)
    for masks in (None, Masks.none(index.num_boxes)):
        bare = Index.open(with_masks(index, tmp_path / f"bare{masks is None}", masks))
        scores, table = load_run(masked).evaluate(bare)
        assert set(scores) == {*KEYS, "by_class"} and table.masks is not None


def test_predictions_carry_their_masks(data, masked):
    detector, index = load_run(masked), Index.open(data.val)
    (found,) = detector.predict([index.image_path(0)])
    height, width = found.size
    assert (height, width) == (index.heights[0], index.widths[0])
    assert found.mask.shape == (len(found), height, width) and found.mask.dtype == bool and len(found) == 20
    table = detector.detect(index).of_image(int(index.image_ids[0]))
    for place in (0, 7):
        assert found.masks[place] == table.masks[place]
        np.testing.assert_array_equal(found.mask[place], decode(table.masks[place]).astype(bool))
    middle = float(np.median(found.confidence))
    (some,) = detector.predict([index.image_path(0)], min_score=middle)
    np.testing.assert_array_equal(some.mask, found.mask[found.confidence >= middle])
    one = found.of_classes({found.names[3]})
    keep = np.array([name == found.names[3] for name in found.names])
    np.testing.assert_array_equal(one.mask, found.mask[keep])
    nothing = found.of_classes(())
    assert nothing.mask.shape == (0, height, width)
    (none,) = detector.predict([np.zeros((30, 50, 3), np.uint8)], min_score=1.0)
    assert len(none) == 0 and none.mask.shape == (0, 30, 50)


def test_a_detector_without_a_mask_head_has_none(data, straight):
    (found,) = load_run(straight).predict([Index.open(data.val).image_path(0)])
    assert found.masks is None and found.mask is None and found.of_classes(()).masks is None
    assert found.size == (64, 64)


def test_masks_of_a_picture_that_cannot_be_read(masked, tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    broken, good = load_run(masked).predict([tmp_path / "text.jpg", np.zeros((30, 50, 3), np.uint8)], strict=False)
    assert broken.error is not None and broken.size == (0, 0) and broken.mask.shape == (0, 0, 0)
    assert good.mask.shape[1:] == (30, 50)


def test_masks_for_supervision(data, masked):
    pytest.importorskip("supervision", reason="needs the extra supervision")
    (found,) = load_run(masked).predict([Index.open(data.val).image_path(0)])
    np.testing.assert_array_equal(found.to_supervision().mask, found.mask)


def test_the_report_shows_scores_and_masks(data, masked):
    folder, index = RunFolder.open(masked), Index.open(data.val)
    assert isinstance(last_detections(folder, index).masks[0], Rle)
    page = write_run_report(folder, index).read_text()
    last = folder.evaluations()[-1]
    assert "Scores of the masks" in page and f"AP {last['AP']:.3f}, of the masks {last['mask_AP']:.3f}." in page
    assert '<path class="truth" d="M' in page


def test_the_report_of_a_run_without_masks_shows_none(data, straight):
    page = write_run_report(RunFolder.open(straight), Index.open(data.val)).read_text()
    assert "masks" not in page.partition("Settings")[0] and '<path class="truth"' not in page


def test_an_index_without_any_mask_is_refused_before_a_folder_is_made(data, tmp_path):
    index = Index.open(data.train)
    for name, masks in (("a", None), ("b", Masks.none(index.num_boxes))):
        bare = with_masks(index, tmp_path / name, masks)
        config = masked_run(Data(train=bare, val=data.val))
        with pytest.raises(DataError) as caught:
            train(config, tmp_path / "r")
        assert str(caught.value).startswith(f"{bare}: none of its {index.num_boxes} objects has a mask")
        assert "model.mask_head" in str(caught.value) and not (tmp_path / "r").exists()
        check_data(config.data, dataclasses.replace(config.model, mask_head=None))
    with pytest.raises(ConfigError, match="no training data"):
        check_data(dataclasses.replace(config.data, train=None, embedded=None), config.model)


def test_some_objects_without_masks_are_fine(data, masked, tmp_path):
    train_index, val_index = Index.open(data.train), Index.open(data.val)
    some = [
        with_masks(index, tmp_path / name, index.mask_columns.without(np.arange(0, index.num_boxes, 2)))
        for name, index in (("train", train_index), ("val", val_index))
    ]
    train(masked_run(Data(*some)), tmp_path / "r")
    assert {"mask_AP"} <= json.loads((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()[-1]).keys()
