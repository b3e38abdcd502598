import dataclasses

import numpy as np

from gesso.data.index import Index
from gesso.data.index_writer import IndexWriter
from gesso.data.records import CROWD, ImageBlock, ObjectBlock
from gesso.run.folder import RunFolder
from gesso.run.report import write_run_report
from gesso.run.train import train
from tests.run.helpers import tiny_run


def test_scores_curves_pictures_and_settings_stand_in_it(data, straight):
    page = write_run_report(RunFolder.open(straight), Index.open(data.val)).read_text()
    row = RunFolder.open(straight).evaluations()[-1]
    assert f"AP {row['AP']:.3f}." in page and "debug:tiny" in page and "Training loss" in page
    for name in ("training.optimizer.rate", "seven", "Ground truth"):
        assert name in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page


def test_a_run_without_evaluation_has_one_too(data, tmp_path):
    train(tiny_run(data, val=False, steps=2, batch_size=4), tmp_path / "r")
    assert "Nothing was evaluated." in (tmp_path / "r" / "report.html").read_text()


def test_where_nothing_can_be_measured_no_number_is_shown(data, tmp_path):
    """All objects are crowds, so every AP is -1."""
    index = Index.open(data.val)
    writer = IndexWriter(tmp_path / "crowds", index.label_space, sources=index.sources)
    writer.add_images(ImageBlock(ids=index.image_ids, names=index.names, widths=index.widths, heights=index.heights))
    rows = np.repeat(np.arange(len(index)), np.diff(index.offsets))
    flags = np.full(len(rows), CROWD, np.uint16)
    writer.add_objects(ObjectBlock(rows=rows, xyxy=index.boxes, labels=index.labels, flags=flags))
    config = tiny_run(data, steps=2, batch_size=4, evaluate_every=1)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, val=writer.finish()))
    train(config, tmp_path / "r")
    page = (tmp_path / "r" / "report.html").read_text()
    assert "no object to measure on" in page and "-1.0" not in page and "not judged" in page
