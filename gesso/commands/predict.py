"""``gesso predict``."""

import csv
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from tyro.conf import Positional

from gesso import files
from gesso.commands.observing import PictureCounter
from gesso.commands.parsing import Result, parse
from gesso.data.decode import read_picture
from gesso.errors import ConfigError
from gesso.evaluation.masks import as_json
from gesso.reports.drawing import draw_detections, write_map
from gesso.reports.progress import JobProgress, Stage
from gesso.run.classifying import FILE, TrainedClassifier
from gesso.run.models import load_run
from gesso.run.predictor import Predictions, TrainedDetector, find_pictures
from gesso.run.segmenting import Map, TrainedSegmenter


@dataclass(frozen=True)
class PredictArguments:
    """Predicts on pictures what the run has learnt.

    Of a detector: detections.json (COCO results) with images.json, and the pictures with boxes (and masks) on them; of
    a segmenter: maps/PICTURE.png (0 background, 1 + class) and the pictures with their classes on them; of a
    classifier: guesses.csv with the five likeliest classes of each picture.
    """

    run: Positional[Path]
    """The run."""
    pictures: Positional[tuple[str, ...]]
    """Pictures, folders or globs."""
    out: Path
    """A folder for what is predicted, and for the drawn pictures."""
    min_score: float = 0.3
    """Of a detector: detections with a lower score are neither drawn nor written."""
    draw: bool = True
    """--no-draw draws no pictures."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes a GPU where there is one."""
    json: bool = False
    """Print JSON."""
    keep: tuple[str, ...] = field(default=())
    """Of a detector: only these classes; all where none is named."""


def predict(words: list[str]) -> Result:
    """``gesso predict``."""
    given = parse(PredictArguments, words, "predict")
    if not given.pictures:
        raise ConfigError("no picture is named", remedy="Add pictures, folders or globs behind the run.")
    pictures = find_pictures(given.pictures)
    trained = load_run(given.run, device=given.device)
    if isinstance(trained, TrainedSegmenter):
        return _predict_maps(given, trained, pictures)
    if isinstance(trained, TrainedClassifier):
        return _predict_classes(given, trained, pictures)
    assert isinstance(trained, TrainedDetector)
    return _predict_boxes(given, trained, pictures)


def _predict_boxes(given: PredictArguments, detector: TrainedDetector, pictures: list[Path]) -> Result:
    wanted = {detector.label_space.names[detector.label_space.index(name)] for name in given.keep}
    given.out.mkdir(parents=True, exist_ok=True)  # what is wrong with it shall show before the work
    with JobProgress([Stage(name="predicting")]) as job:
        found = detector.predict(
            pictures,
            min_score=given.min_score,
            strict=False,
            progress=PictureCounter(job, "predicting", len(pictures)),
        )
    rows, images, drawn = [], [], []
    for number, (path, one) in enumerate(zip(pictures, found, strict=True), 1):
        if one.error is not None:
            continue
        one = one.of_classes(wanted) if wanted else one
        images.append({"id": number, "file_name": str(path)})
        rows += _results(number, one, detector.label_space.ids)
        drawn.append((path, one, given.out / f"{number:04d}-{path.stem}.jpg"))
    categories = [
        {"id": i, "name": n} for i, n in zip(detector.label_space.ids, detector.label_space.names, strict=True)
    ]
    files.write_json(given.out / "detections.json", rows)
    files.write_json(given.out / "images.json", {"images": images, "categories": categories})
    for path, one, target in drawn if given.draw else ():
        _draw(path, one, target, detector.label_space.names)
    lines = [f"{len(rows)} detections in {len(images)} pictures: {given.out / 'detections.json'}"]
    unread = [one.error for one in found if one.error is not None]
    lines += [f"left out: {error}" for error in unread]
    return Result("\n".join(lines), rows if given.json else None, 1 if unread else 0)


def _results(image_id: int, found: Predictions, category_ids: tuple[int, ...]) -> list[dict[str, Any]]:
    """COCO results: xywh in pixels, masks as run lengths in text, category ids of the run's label space."""
    boxes = found.xyxy.astype(float).tolist()
    rows: list[dict[str, Any]] = [
        {"image_id": image_id, "category_id": category_ids[c], "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
        for (x1, y1, x2, y2), c, score in zip(boxes, found.class_id.tolist(), found.confidence.tolist(), strict=True)
    ]
    if found.masks is not None:
        for place, row in enumerate(rows):
            row["segmentation"] = as_json(found.masks[place])
    return rows


def _draw(path: Path, found: Predictions, target: Path, names: tuple[str, ...]) -> None:
    drawn = draw_detections(
        read_picture(path), found.xyxy, found.names, found.confidence, classes=names, masks=found.mask
    )
    _save(drawn, target)


def _predict_maps(given: PredictArguments, segmenter: TrainedSegmenter, pictures: list[Path]) -> Result:
    names = _map_names(pictures)
    (given.out / "maps").mkdir(parents=True, exist_ok=True)
    with JobProgress([Stage(name="predicting")]) as job:
        found, unread = segmenter.predict(pictures, progress=PictureCounter(job, "predicting", len(pictures)))
    for number, (path, name, drawn) in enumerate(zip(pictures, names, found, strict=True), 1):
        if drawn is None:
            continue
        with files.atomic_file(given.out / "maps" / f"{name}.png") as temporary:
            write_map(temporary, drawn)
        if given.draw:
            _draw_map(path, drawn, given.out / f"{number:04d}-{path.stem}.jpg", segmenter.label_space.names)
    done = [str(given.out / "maps" / f"{n}.png") for n, drawn in zip(names, found, strict=True) if drawn is not None]
    lines = [f"{len(done)} maps: {given.out / 'maps'}", *(f"left out: {error}" for error in unread)]
    return Result("\n".join(lines), done if given.json else None, 1 if unread else 0)


def _map_names(pictures: list[Path]) -> list[str]:
    """The names of the pictures without their endings. ConfigError where two would write the same map."""
    stems = [path.stem for path in pictures]
    for path in pictures:
        if stems.count(path.stem) > 1:
            raise ConfigError(
                f"two pictures have the name '{path.stem}', and so would their maps",
                remedy="Predict on one folder at a time.",
            )
    return stems


def _draw_map(path: Path, found: Map, target: Path, names: tuple[str, ...]) -> None:
    """The picture with each class of its map in its colour, within the box around all of its pixels."""
    values = [value for value in np.unique(found).tolist() if value]
    masks = np.stack([found == value for value in values]) if values else np.zeros((0, *found.shape), bool)
    boxes = np.array([_around(mask) for mask in masks], np.float32).reshape(-1, 4)
    drawn = draw_detections(read_picture(path), boxes, [names[v - 1] for v in values], classes=names, masks=masks)
    _save(drawn, target)


def _around(mask: npt.NDArray[np.bool_]) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _predict_classes(given: PredictArguments, classifier: TrainedClassifier, pictures: list[Path]) -> Result:
    given.out.mkdir(parents=True, exist_ok=True)
    with JobProgress([Stage(name="predicting")]) as job:
        found, unread = classifier.predict(pictures, progress=PictureCounter(job, "predicting", len(pictures)))
    text = classifier.as_csv(found, [str(path) for path in pictures])
    files.write_text(given.out / FILE, text)
    lines = [f"guesses for {len(found.rows)} pictures: {given.out / FILE}", *(f"left out: {error}" for error in unread)]
    data = [dict(row) for row in csv.DictReader(io.StringIO(text))]
    return Result("\n".join(lines), data if given.json else None, 1 if unread else 0)


def _save(drawn: Map, target: Path) -> None:
    with files.atomic_file(target) as temporary:
        Image.fromarray(drawn).save(temporary, format="JPEG", quality=92)
