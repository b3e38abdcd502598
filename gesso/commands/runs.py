"""``gesso train`` and ``gesso evaluate``."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from gesso.commands.interruption import command_line, graceful_stop
from gesso.commands.launching import check_gpus, joined, start, starts_others, told_once
from gesso.commands.observing import PictureCounter, ProgressObserver, job_progress, run_stages
from gesso.commands.parsing import Result, option_value, parse, scores_text
from gesso.commands.recipes import option_names, recipe_name, steps_before_epochs
from gesso.data.index import Index
from gesso.errors import ConfigError
from gesso.recipes.catalog import make_config
from gesso.reports.progress import JobProgress, Stage
from gesso.run.config import RunConfig, read_run_config
from gesso.run.folder import RunFolder
from gesso.run.models import load_run
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
    """The scores of a run's best checkpoint on an index; categories are joined by name.

    Of a detector COCO's, also of its masks where it makes some and the index has some; of a segmenter mIoU and
    accuracies, at the maps' own size; of a classifier top1 and top5.
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
    trained, index = load_run(given.run, device=given.device), Index.open(given.data)
    with JobProgress([Stage(name="evaluating")]) as job:
        progress = PictureCounter(job, "evaluating", len(index))
        scores, _ = trained.evaluate(index, workers=given.workers, progress=progress)
    return Result(scores_text(scores), scores if given.json else None)
