"""``gesso train``, ``gesso evaluate`` and ``gesso predict``."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from PIL import Image
from tyro.conf import Positional

from gesso import files
from gesso.commands.interruption import command_line, graceful_stop
from gesso.commands.launching import check_gpus, joined, start, starts_others, told_once
from gesso.commands.observing import ProgressObserver, job_progress, run_stages
from gesso.commands.parsing import Result, option_value, parse, scores_text
from gesso.commands.recipes import option_names, recipe_name, steps_before_epochs
from gesso.data.decode import read_picture
from gesso.data.index import Index
from gesso.errors import ConfigError
from gesso.evaluation.masks import as_json
from gesso.recipes.catalog import make_config
from gesso.reports.drawing import draw_detections
from gesso.reports.progress import JobProgress, Stage
from gesso.run.config import RunConfig, read_run_config
from gesso.run.folder import RunFolder
from gesso.run.predictor import Predictions, find_pictures, load_run
from gesso.run.train import check, prepared, train


@dataclass(frozen=True)
class TrainArguments:
    """Trains a detector by a recipe; every field of the recipe is an option."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    out: Path | None = None
    """The run's folder: new, or with --resume that of an interrupted run."""
    resume: bool = False
    """Go on with the run in --out, as it was started."""
    init: Path | None = None
    """A run or checkpoint folder whose weights to start from."""
    gpus: int | None = None
    """Processes on this machine, one a GPU (without any they share the CPU); torchrun starts them."""
    allow_changed: Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction] = ()
    """With --resume: settings that may differ from those that the run began with, such as training.optimizer.rate."""
    json: bool = False
    """Print JSON."""


def train_(words: list[str]) -> Result:
    """``gesso train``."""
    with told_once():
        name, given = _train_arguments(words)
        assert given.out is not None
        allowed = [key for keys in given.allow_changed for key in keys]
        if starts_others(given.gpus):
            assert given.gpus is not None
            check_gpus(given.gpus, given.config.device)
            beginning: dict[str, Any] = {"resume": given.resume, "init": given.init, "allow_changed": allowed}
            check(given.config, given.out, given.gpus, **beginning)
            return start(given.gpus, ["train", *words])
        config = prepared(given.config)
    again = command_line("train", *words, *([] if given.resume else ["--resume"]))
    steps = {stage: part.steps for stage, part in config.stages()}
    stages = run_stages(list(steps.items()), embedded=config.data.train is None)
    with graceful_stop() as stop, job_progress(stages) as job, joined(config, stop):
        result = train(
            config,
            given.out,
            recipe=name,
            resume=given.resume,
            init=given.init,
            allow_changed=allowed,
            observer=ProgressObserver(job, steps, stop),
            how_to_resume=again,
        )
    lines = [
        f"{result.path}: trained on {result.images:,} images in {result.seconds:.0f} s. "
        f"The report: {(result.path / 'report.html').absolute().as_uri()}"
    ]
    if result.scores is not None:
        lines.append(scores_text(result.scores))
    data = dataclasses.asdict(result) | {"path": str(result.path)}
    return Result("\n\n".join(lines), data if given.json else None)


def _train_arguments(words: list[str]) -> tuple[str, TrainArguments]:
    """The recipe's name, and all options."""
    name, rest = recipe_name(words, "train")
    recipe = make_config(name)
    start = TrainArguments(config=steps_before_epochs(_stored(rest, name) or recipe, rest))
    given = parse(TrainArguments, rest, f"train {name}", default=start, known=option_names(start.config))
    if given.out is None:
        raise ConfigError("the run's folder is not named", remedy="Add --out RUN.")
    return name, given


def _stored(words: list[str], name: str) -> RunConfig | None:
    """The configuration of the run that ``--resume`` names, so that it goes on as it was started."""
    out = option_value(words, "--out")
    if "--resume" not in words or out is None:
        return None
    folder = RunFolder.open(Path(out))
    stored = folder.read_config()
    if stored.get("recipe") != name:
        raise ConfigError(
            f"this run was started with the recipe '{stored.get('recipe')}', not '{name}'",
            where=folder.path,
            remedy="Name its own recipe, or another folder.",
        )
    return read_run_config(folder)


@dataclass(frozen=True)
class EvaluateArguments:
    """COCO's scores of a run's best checkpoint on an index; categories are joined by name.

    A detector that makes masks is also scored by them, where the index has masks.
    """

    run: Positional[Path]
    """The run."""
    data: Path
    """The index."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes a GPU where there is one."""
    workers: int = 1
    """Processes that load pictures."""
    json: bool = False
    """Print JSON."""


def evaluate(words: list[str]) -> Result:
    """``gesso evaluate``."""
    given = parse(EvaluateArguments, words, "evaluate")
    detector, index = load_run(given.run, device=given.device), Index.open(given.data)
    with JobProgress([Stage(name="evaluating")]) as job:
        scores, _ = detector.evaluate(index, workers=given.workers, progress=_Counter(job, "evaluating", len(index)))
    return Result(scores_text(scores), scores if given.json else None)


@dataclass(frozen=True)
class PredictArguments:
    """Detects in pictures: COCO results JSON, and the pictures with boxes (and masks) drawn on them."""

    run: Positional[Path]
    """The run."""
    pictures: Positional[tuple[str, ...]]
    """Pictures, folders or globs."""
    out: Path
    """A folder for detections.json, images.json and the drawn pictures."""
    min_score: float = 0.3
    """Detections with a lower score are neither drawn nor written."""
    draw: bool = True
    """--no-draw writes detections.json alone."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes a GPU where there is one."""
    json: bool = False
    """Print JSON."""
    keep: tuple[str, ...] = field(default=())
    """Only these classes; all where none is named."""


def predict(words: list[str]) -> Result:
    """``gesso predict``."""
    given = parse(PredictArguments, words, "predict")
    if not given.pictures:
        raise ConfigError("no picture is named", remedy="Add pictures, folders or globs behind the run.")
    pictures = find_pictures(given.pictures)
    detector = load_run(given.run, device=given.device)
    wanted = {detector.label_space.names[detector.label_space.index(name)] for name in given.keep}
    given.out.mkdir(parents=True, exist_ok=True)  # what is wrong with it shall show before the work
    with JobProgress([Stage(name="predicting")]) as job:
        found = detector.predict(
            pictures,
            min_score=given.min_score,
            strict=False,
            progress=_Counter(job, "predicting", len(pictures)),
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
    with files.atomic_file(target) as temporary:
        Image.fromarray(drawn).save(temporary, format="JPEG", quality=92)


class _Counter:
    """Adds up the pictures of each batch and moves the line."""

    def __init__(self, job: JobProgress, name: str, total: int) -> None:
        self._job, self._total, self._done = job, total, 0
        job.begin(name)

    def __call__(self, count: int) -> None:
        self._done += count
        self._job.update(done=self._done, total=self._total)
