import dataclasses
import json
import shutil

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from gesso.data.decode import read_picture
from gesso.data.index import Index
from gesso.errors import DataError, InputError, RunError
from gesso.evaluation.detection_files import read_detections
from gesso.evaluation.voc import score_voc
from gesso.run.models import load_run
from gesso.run.predictor import TrainedDetector, find_pictures
from gesso.run.train import train
from tests.run.helpers import differences, rows, tensors, tiny_run, two_stages


@pytest.fixture(scope="module")
def averaged(data, tmp_path_factory):
    """A run with averages, evaluated at every second of its four steps."""
    out = tmp_path_factory.mktemp("averaged") / "run"
    train(tiny_run(data, steps=4, batch_size=4, evaluate_every=2, ema_decay=0.5), out)
    return out


def columns(table):
    return table.image_id, table.label, table.score, table.xyxy


@pytest.mark.parametrize("run", ["straight", "averaged"])
def test_a_loaded_run_predicts_what_was_evaluated(data, request, run):
    path = request.getfixturevalue(run)
    step = json.loads((path / "checkpoints" / "best.json").read_text())["step"]
    index = Index.open(data.val)
    scores, found = load_run(path).evaluate(index)
    row = next(row for row in rows(path) if "AP" in row and row["step"] == step)
    assert scores == {key: row[key] for key in scores}
    stored = read_detections(path / "detections" / f"{step:08d}" / "detections.parquet", index.label_space.ids)
    assert len(found) > 0 and len(stored) == len(found)
    for one, two in zip(columns(found), columns(stored), strict=True):
        np.testing.assert_array_equal(one, two)


def test_averages_are_what_predicts(averaged):
    step = json.loads((averaged / "checkpoints" / "best.json").read_text())["step"]
    folder = averaged / "checkpoints" / f"{step:08d}"
    ema, own = load_file(folder / "ema.safetensors"), load_file(folder / "model.safetensors")
    weights = load_run(averaged).model.state_dict()
    assert all(torch.equal(weights[name], ema[name]) for name in ema)
    assert any(not torch.equal(weights[name], own[name]) for name in own)


def test_the_best_and_not_the_newest_is_loaded(averaged, tmp_path):
    """As if the first of two evaluations had been the better one."""
    shutil.copytree(averaged, tmp_path / "r")
    for step in (2, 4):
        path = tmp_path / "r" / "checkpoints" / f"{step:08d}" / "state.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"best_step": 2, "best_score": 0.9}))
    expected = load_file(averaged / "checkpoints" / "00000002" / "ema.safetensors")
    weights = load_run(tmp_path / "r").model.state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_paths_and_arrays_of_any_size_are_predicted_in_order(data, straight):
    detector, index = load_run(straight), Index.open(data.val)
    paths = [index.image_path(i) for i in range(3)]
    wide = cv2.resize(read_picture(paths[0]), (150, 70))
    found = detector.predict([paths[0], wide, str(paths[2]), read_picture(paths[0])])
    assert len(found) == 4
    np.testing.assert_array_equal(found[0].xyxy, found[3].xyxy)
    table = detector.detect(index)
    for one, row in ((found[0], 0), (found[2], 2)):
        of_row = table.of_image(int(index.image_ids[row]))
        np.testing.assert_allclose(one.xyxy, of_row.xyxy, rtol=1e-5, atol=1e-4)
        assert one.class_id.tolist() == of_row.label.tolist()
        assert one.names == tuple(detector.label_space.names[label] for label in one.class_id)
    assert len(found[1]) and found[1].xyxy[:, 2].max() > 64, "boxes lie on the stored picture"
    for one in found:
        assert (np.diff(one.confidence) <= 0).all()
        assert one.xyxy.dtype == np.float32 and one.class_id.dtype == np.int64


def test_few_scores_and_classes_can_be_chosen(data, straight):
    detector, index = load_run(straight), Index.open(data.val)
    (every,) = detector.predict([index.image_path(0)])
    middle = float(np.median(every.confidence))
    (some,) = detector.predict([index.image_path(0)], min_score=middle)
    assert 0 < len(some) < len(every) and some.confidence.min() >= middle
    name = every.names[0]
    one = every.of_classes({name})
    assert set(one.names) == {name} and len(one) == every.names.count(name) == len(one.xyxy)
    assert len(every.of_classes(())) == 0


def test_a_picture_that_cannot_be_read_is_named(straight, tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(DataError, match=r"text\.jpg"):
        load_run(straight).predict([tmp_path / "text.jpg"])


@pytest.mark.parametrize("best", [2, 5])
def test_a_run_of_two_stages_is_loaded_with_the_best_ones_input(data, tmp_path, monkeypatch, best):
    """Every evaluation, too, is at the resolution of its stage."""
    config = two_stages(data)
    config = dataclasses.replace(config, pretraining=dataclasses.replace(config.pretraining, evaluate_every=1))
    inputs, steps = [], iter([1, 2, 3, 5, 6])

    def scored(detector, index, **more):
        inputs.append(detector.input)
        scores, found = evaluate(detector, index, **more)
        return scores | {"AP": 0.9 if next(steps) == best else 0.5}, found

    evaluate = TrainedDetector.evaluate
    monkeypatch.setattr(TrainedDetector, "evaluate", scored)
    train(config, tmp_path / "r")
    assert json.loads((tmp_path / "r" / "checkpoints" / "best.json").read_text()) == {"step": best, "AP": 0.9}
    first, second = (stage.input for _, stage in config.stages())
    assert first != second and inputs == [first] * 3 + [second] * 2
    assert load_run(tmp_path / "r").input == (first if best == 2 else second)


def test_what_is_no_list_of_pictures_is_refused(straight):
    detector = load_run(straight)
    pixels = np.zeros((40, 50, 3), np.uint8)
    for one in ("holiday.jpg", pixels, Image.fromarray(pixels)):
        with pytest.raises(InputError, match="instead of a list"):
            detector.predict(one)
    with pytest.raises(InputError, match="picture 1 is of the type int"):
        detector.predict([pixels, 7])


def test_pictures_of_pillow_are_read_as_their_files(data, straight, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    index = Index.open(data.val)
    Image.open(index.image_path(0)).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as picture:
        one, two = load_run(straight).predict([tmp_path / "a.png", picture])
    assert len(one) > 0
    np.testing.assert_array_equal(one.xyxy, two.xyxy)


def test_a_choice_of_classes_keeps_the_error(straight, tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    (found,) = load_run(straight).predict([tmp_path / "text.jpg"], strict=False)
    assert found.error is not None and found.of_classes(["one"]).error == found.error


def test_what_is_no_run_is_refused(tmp_path, straight):
    with pytest.raises(RunError, match="no such run folder"):
        load_run(tmp_path / "none")
    shutil.copytree(straight, tmp_path / "r")
    shutil.rmtree(tmp_path / "r" / "checkpoints")
    with pytest.raises(RunError, match="no whole checkpoint"):
        load_run(tmp_path / "r")


def test_find_pictures(tmp_path):
    for name in ("b.PNG", "a.jpg", "sub/c.webp", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = [path.name for path in find_pictures([tmp_path, tmp_path / "a.jpg", str(tmp_path / "*.jpg")])]
    assert sorted(names) == ["a.jpg", "b.PNG", "c.webp"]
    (tmp_path / "empty").mkdir()
    for wrong in (tmp_path / "gone.jpg", tmp_path / "empty", str(tmp_path / "*.tiff")):
        with pytest.raises(InputError, match="no "):
            find_pictures([wrong])


def test_evaluation_does_not_disturb_training(data, straight, tmp_path):
    """An evaluation after every step, and the weights of a run that is evaluated once."""
    config = tiny_run(data, steps=4, batch_size=4, checkpoint_every=2, evaluate_every=1)
    train(config, tmp_path / "r")
    one, two = tensors(straight), tensors(tmp_path / "r")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert "metrics.jsonl" in differences(straight, tmp_path / "r"), "it has more rows"


def test_an_evaluation_without_its_pictures_is_refused(data, straight, monkeypatch):
    def gone(path, *_):
        raise DataError("the picture cannot be read: No such file or directory", where=path)

    monkeypatch.setattr("gesso.data.samples.read_picture", gone)
    with pytest.raises(DataError, match="4 of 4 pictures could not be read"):
        load_run(straight).evaluate(Index.open(data.val))


def test_scores_of_other_benchmarks_beside_cocos(data, straight, tmp_path):
    """They are what the evaluators say of the same detections."""
    config = dataclasses.replace(tiny_run(data, steps=1, batch_size=4, evaluate_every=1), metrics=("voc",))
    result = train(config, tmp_path / "r", init=straight)
    index, run = Index.open(data.val), load_run(tmp_path / "r")
    scores, table = run.evaluate(index)
    assert scores == result.scores
    assert scores["voc_AP50"] == pytest.approx(score_voc(index, table, inclusive=False)["mAP"])
    assert scores["voc_AP70"] == pytest.approx(score_voc(index, table, iou=0.7, inclusive=False)["mAP"])
    assert scores["voc_AP50_11"] == pytest.approx(score_voc(index, table, points="11", inclusive=False)["mAP"])


def test_scores_that_the_data_does_not_allow_are_refused_at_once(data, tmp_path):
    config = dataclasses.replace(tiny_run(data), metrics=("miss_rate",))
    with pytest.raises(DataError, match="no category 'pedestrian'"):
        train(config, tmp_path / "r")
    assert not (tmp_path / "r").exists()
