"""``gesso transfer``, ``gesso transfer matrix`` and ``gesso transfer probe``."""

import dataclasses
import json as json_text
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from tyro.conf import Positional

from gesso import config as configs
from gesso import files
from gesso.commands.interruption import command_line, graceful_stop
from gesso.commands.observing import ProgressObserver, job_progress, run_stages
from gesso.commands.parsing import Result, parse, scores_text, table
from gesso.data.index import Index
from gesso.data.transforms import Direct, InputConfig
from gesso.errors import ConfigError, GessoError, nearest
from gesso.recipes.catalog import all_recipes, make_config
from gesso.reports.progress import JobProgress, Stage
from gesso.run.config import Part, RunConfig
from gesso.run.folder import RunFolder
from gesso.run.models import load_run
from gesso.run.report import footer
from gesso.run.train import prepared, train
from gesso.transfer.finetune import RateBy, Target, as_trained, fine_tuning
from gesso.transfer.matrix import ALL, Entry, Parts, Pretraining, plan_matrix, run_matrix
from gesso.transfer.page import write_page
from gesso.transfer.probe import probe
from gesso.transfer.summary import Row, summarise

TRAINING = "training"
_ELSEWHERE = {
    "seed": "the seed as its own option",
    "data.train": "the training index as its own option",
    "data.val": "the validation index as its own option",
}
"""Settings that options of these commands say."""


@dataclass(frozen=True)
class TransferArguments:
    """Fine-tunes the weights of a run for other data; categories are joined by name."""

    pretrained: Positional[Path]
    """A run, a checkpoint folder, or a published file of weights."""
    data: Path
    """The index to learn from."""
    val: Path
    """The index to be measured on."""
    out: Path
    """The new run's folder."""
    recipe: str | None = None
    """How to fine-tune, such as direct:small_fine_tune; by default the run's own model and last stage, a detector's
    batch norm fixed."""
    parts: tuple[Part, ...] = ()
    """The parts that are loaded, such as backbone neck; by default all that the model has."""
    rate_by_weight_norm: bool = False
    """Take the learning rate from the size of the weights (Objects365, Table 5)."""
    reference: Path | None = None
    """With --rate-by-weight-norm: weights for which the recipe's rate is right; by default new ones of the model."""
    power: Literal[1, 2] = 2
    """With --rate-by-weight-norm: 2 compares sums of squares, 1 norms."""
    seed: int = 0
    """Another seed, another run."""
    set: tuple[str, ...] = ()
    """Settings to change, such as training.steps=300; gesso config RECIPE lists them."""
    resume: bool = False
    """Go on with an interrupted run."""
    json: bool = False
    """Print JSON."""


def transfer(words: list[str]) -> Result:
    """``gesso transfer``."""
    given = parse(TransferArguments, words, "transfer")
    chosen = as_trained(given.pretrained) if given.recipe is None else make_config(given.recipe)
    made = fine_tuning(
        given.pretrained,
        changed([chosen], given.set)[0],
        Target(train=given.data, val=given.val),
        parts=given.parts or None,
        rate_by=_rate_by(given.rate_by_weight_norm, given.reference, given.power),
        seed=given.seed,
    )
    config = prepared(made.config)
    again = command_line("transfer", *words, *([] if given.resume else ["--resume"]))
    steps = {name: stage.steps for name, stage in config.stages()}
    with graceful_stop() as stop, job_progress(run_stages(list(steps.items()), embedded=False)) as job:
        result = train(
            config,
            given.out,
            recipe=given.recipe or "",
            resume=given.resume,
            init=made.init,
            observer=ProgressObserver(job, steps, stop),
            how_to_resume=again,
        )
    loaded = files.read_json(given.out / "weights.json")
    lines = [] if made.rule is None else made.rule.lines()
    lines += [
        f"{len(loaded['loaded'])} tensors loaded, {len(loaded['remapped'])} carried over by class name, "
        f"{len(loaded['missing']) + len(loaded['wrong_shape']) + len(loaded['unnamed'])} new: "
        f"{given.out / 'weights.json'}",
        f"{result.path}: trained on {result.images:,} images in {result.seconds:.0f} s. "
        f"The report: {(result.path / 'report.html').absolute().as_uri()}",
    ]
    if result.scores is not None:
        lines.append(scores_text(result.scores))
    data = dataclasses.asdict(result) | {"path": str(result.path)}
    data["rate_rule"] = None if made.rule is None else dataclasses.asdict(made.rule) | {"rate": made.rule.rate}
    return Result("\n\n".join(lines), data if given.json else None)


@dataclass(frozen=True)
class MatrixArguments:
    """Trains every pre-training for every target, with several parts and seeds, and tells whether it paid.

    What is missing is trained, what is there is read: the same command goes on after a stop.
    """

    out: Path
    """The folder of the matrix: runs, results.json, report.html."""
    pretraining: tuple[str, ...]
    """NAME=RECIPE begins from nothing (scratch=direct:small_scratch, direct=direct:small), NAME=RUN from weights
    (coco=runs/coco). The first is the baseline."""
    target: tuple[str, ...]
    """NAME=TRAIN,VAL: two indexes, such as cells=data/cells/train,data/cells/val."""
    recipe: str | None = None
    """How to fine-tune from weights, such as direct:small_fine_tune; by default as gesso transfer does."""
    parts: tuple[str, ...] = (ALL,)
    """What is loaded of weights, each choice a run of its own: all, backbone, backbone+neck, ..."""
    seeds: tuple[int, ...] = (0,)
    """The seeds; each is a run of its own."""
    rate_by_weight_norm: bool = False
    """Take the learning rate from the size of the weights (Objects365, Table 5)."""
    set: tuple[str, ...] = ()
    """Settings to change in all runs that have them, such as training.steps=300."""
    at_once: int | None = None
    """How many runs at the same time; by default one a core on a CPU, one on a GPU."""
    json: bool = False
    """Print JSON."""


def matrix(words: list[str]) -> Result:
    """``gesso transfer matrix``."""
    given = parse(MatrixArguments, words, "transfer matrix")
    if given.at_once is not None and given.at_once < 1:
        raise ConfigError(f"--at-once must be at least 1, found {given.at_once}")
    entries = plan_matrix(
        _pretrainings(given),
        _targets(given.target),
        given.out,
        parts=[_parts(word) for word in given.parts],
        seeds=given.seeds,
        rate_by=RateBy() if given.rate_by_weight_norm else None,
    )
    again = command_line("transfer", "matrix", *words)
    with graceful_stop() as stop, JobProgress([Stage(name=TRAINING)]) as job:
        job.begin(TRAINING)
        done = run_matrix(
            entries,
            progress=lambda steps, total: job.update(done=steps, total=total),
            should_stop=stop,
            how_to_resume=again,
            at_once=given.at_once,
        )
    rows = summarise(done)
    results = {"rows": [vars(row) for row in rows], "runs": [_as_dict(entry) for entry in done]}
    files.write_json(given.out / "results.json", results)
    page = write_page(given.out / "report.html", rows, title="Did pre-training pay?", footer=_footer(done))
    rules = dict.fromkeys(
        f"{entry.pretraining}: {line}" for entry in done if entry.rule is not None for line in entry.rule.lines()
    )
    text = f"{chr(10).join([*rules, _text(rows)])}\n\nThe report: {page.absolute().as_uri()}"
    failed = [f"{entry.name}: {entry.error}" for entry in done if entry.error]
    text += "".join(f"\nfailed: {line}" for line in failed)
    return Result(text, results if given.json else None, 1 if failed else 0)


@dataclass(frozen=True)
class ProbeArguments:
    """Tells how well a linear classifier names whole pictures by the frozen features of a run's model, layer by layer.

    Nothing of the model is trained; the classifier is a logistic regression.
    """

    run: Positional[Path]
    """The run: of a detector, segmenter or classifier."""
    data: Path
    """The index to learn from, of pictures with one class each."""
    val: Path
    """The index to be measured on."""
    layers: tuple[str, ...] = ()
    """Such as C5, conv_proj@4 (averaged to 4 x 4 cells) or fc1; by default the last map of the backbone and what comes
    behind it."""
    side: int | None = None
    """Pictures are resized to this side, a multiple of 32; by default as the run evaluates."""
    strength: float | None = None
    """Of the classifiers, the inverse of their penalty; by default chosen on a part of the pictures for each layer."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes a GPU where there is one."""
    workers: int = 1
    """Processes that load pictures."""
    json: bool = False
    """Print JSON."""


def probe_(words: list[str]) -> Result:
    """``gesso transfer probe``."""
    given = parse(ProbeArguments, words, "transfer probe")
    trained = load_run(given.run, device=given.device)
    size = trained.input if given.side is None else InputConfig(resize=Direct(side=given.side))
    begun: set[str] = set()
    with JobProgress([Stage(name=name) for name in ("training pictures", "validation pictures", "classifiers")]) as job:

        def show(what: str, done: int, total: int) -> None:
            if what not in begun:
                begun.add(what)
                job.begin(what)
            job.update(done=done, total=total)

        found = probe(
            trained.model,
            size,
            Index.open(given.data),
            Index.open(given.val),
            given.layers or None,
            precision=trained.precision,
            batch_size=trained.batch_size,
            workers=given.workers,
            strength=given.strength,
            progress=show,
        )
    rows = [(name, one["top1"], one["top5"], one["dim"], f"{one['strength']:g}") for name, one in found.items()]
    return Result(table(("layer", "top1", "top5", "features", "strength"), rows), found if given.json else None)


def changed(all_configs: Sequence[RunConfig], words: Sequence[str]) -> list[RunConfig]:
    """The configurations with every ``KEY=VALUE`` set in each that has the key.

    Raises:
        ConfigError: a word is no KEY=VALUE, none has the key, or the values do not fit.
    """
    trees = [configs.to_dict(config) for config in all_configs]
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"--set {word}: this is no KEY=VALUE", remedy="For example --set training.steps=300.")
        key = key.replace("-", "_")
        if key in _ELSEWHERE:
            raise ConfigError(f"--set {key} has no effect here", remedy=f"Give {_ELSEWHERE[key]}.")
        having = [tree for tree, config in zip(trees, all_configs, strict=True) if key in configs.flatten(config)]
        if not having:
            known = {name for config in all_configs for name in configs.flatten(config) if not name.endswith("type")}
            raise ConfigError(f"--set: there is no setting '{key}'", remedy=nearest(key, known))
        for tree in having:
            _set(tree, key, text)
    return [configs.from_dict(RunConfig, tree) for tree in trees]


def _set(tree: dict[str, Any], key: str, text: str) -> None:
    """Sets a value, JSON or a plain word; the length of a stage is said in one way at a time."""
    try:
        value = json_text.loads(text)
    except ValueError:
        value = text
    *parents, last = key.split(".")
    for name in parents:
        tree = tree[name]
    if parents in (["pretraining"], ["training"]) and last in ("steps", "epochs", "images"):
        tree |= {"epochs": None, "images": None}
    tree[last] = value


def _rate_by(wanted: bool, reference: Path | None, power: Literal[1, 2]) -> RateBy | None:
    if not wanted and power != 2:
        raise ConfigError("--power is for --rate-by-weight-norm", remedy="Add that, or leave this out.")
    if not wanted and reference is not None:
        raise ConfigError("--reference is for --rate-by-weight-norm", remedy="Add that, or leave this out.")
    return RateBy(reference=reference, power=power) if wanted else None


def _pretrainings(given: MatrixArguments) -> list[Pretraining]:
    found: list[Pretraining] = []
    for word in given.pretraining:
        name, equals, what = word.partition("=")
        if not equals or not what:
            raise ConfigError(f"--pretraining {word}: this is no NAME=RECIPE or NAME=RUN")
        if Path(what).exists():
            config = as_trained(Path(what)) if given.recipe is None else make_config(given.recipe)
            found.append(Pretraining(name=name, config=config, init=Path(what), recipe=given.recipe or ""))
        elif ":" in what:
            found.append(Pretraining(name=name, config=make_config(what), recipe=what))
        else:
            raise ConfigError(
                f"--pretraining {word}: '{what}' is neither a run nor a recipe", remedy=nearest(what, all_recipes())
            )
    new = changed([start.config for start in found], given.set)
    return [dataclasses.replace(start, config=config) for start, config in zip(found, new, strict=True)]


def _targets(words: Sequence[str]) -> dict[str, Target]:
    found: dict[str, Target] = {}
    for word in words:
        name, target = _target(word)
        if name in found:
            raise ConfigError(f"two of them have the name of the target '{name}'", remedy="Give each its own name.")
        found[name] = target
    return found


def _target(word: str) -> tuple[str, Target]:
    name, equals, paths = word.partition("=")
    both = paths.split(",")
    if not equals or len(both) != 2 or not all(both):
        raise ConfigError(f"--target {word}: this is no NAME=TRAIN,VAL", remedy="Name two indexes.")
    return name, Target(train=Path(both[0]), val=Path(both[1]))


def _parts(word: str) -> Parts:
    if word == ALL:
        return None
    known: dict[str, Part] = {part: part for part in get_args(Part)}
    for part in word.split("+"):
        if part not in known:
            raise ConfigError(f"--parts {word}: there is no part '{part}'", remedy=nearest(part, (*known, ALL)))
    return tuple(known[part] for part in word.split("+"))


def _text(rows: Sequence[Row]) -> str:
    columns = ("target", "pre-training", "score", "mean", "spread", "gain", "seconds", "cost", "seeds")
    return table(
        columns,
        [
            (
                row.target,
                row.label,
                row.primary,
                row.mean,
                row.spread,
                row.gain,
                None if row.seconds is None else round(row.seconds),
                "-" if row.cost is None else f"{100 * row.cost:+.0f}%",
                row.runs,
            )
            for row in rows
        ],
    )


def _as_dict(entry: Entry) -> Mapping[str, Any]:
    cost = None if entry.cost is None else dataclasses.asdict(entry.cost)
    names = ("target", "pretraining", "parts", "seed", "primary", "scores", "curve", "error")
    return {name: getattr(entry, name) for name in names} | {"path": str(entry.job.path), "cost": cost}


def _footer(entries: Sequence[Entry]) -> str:
    for entry in entries:
        try:
            return footer(RunFolder.open(entry.job.path).read_config()["environment"])
        except GessoError:
            continue
    return ""
