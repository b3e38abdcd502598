"""Every pre-training for every target, with several parts and seeds: what is missing is trained, the rest is read.

OUT/TARGET/PRETRAINING/seed-0/          a run that starts from nothing, such as scratch or direct pre-training
OUT/TARGET/PRETRAINING/PARTS/seed-0/    a run that starts from the parts PARTS of pre-trained weights
OUT/results.json  OUT/report.html       the tables, and what they are made of
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gesso.errors import ConfigError, GessoError, InputError, RunError
from gesso.run.config import Part, RunConfig, check_same
from gesso.run.cost import RunCost, read_cost
from gesso.run.folder import ROW_KEYS, RunFolder
from gesso.run.models import trained_kind
from gesso.run.several import Job, train_all
from gesso.run.train import prepared
from gesso.training.checkpoint import newest_checkpoint
from gesso.transfer.finetune import RateBy, Target, fine_tuning
from gesso.transfer.lr_rule import RateRule

Parts = tuple[Part, ...] | None
ALL = "all"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """A way to begin: from weights, or from nothing.

    Attributes:
        name: in tables and as a folder.
        config: of the runs, such as a recipe's; ``finetune.as_trained`` gives that of a run.
        init: a run, a checkpoint folder or a published file; None = nothing.
        recipe: its name, kept in the runs.
    """

    name: str
    config: RunConfig
    init: Path | None = None
    recipe: str = ""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One run of the matrix, and what came of it.

    Attributes:
        target, pretraining: names.
        parts: joined by +, or "all"; "" where the run starts from nothing.
        seed: of the run.
        job: the run.
        primary: the name of the score that counts.
        scores: of its last evaluation, without classes; empty where it failed.
        curve: (step, primary score) of all its evaluations.
        cost: of the run; None where it failed.
        error: why it failed; "" where it did not.
        rule: how its learning rate was found; None where the configuration's stays.
    """

    target: str
    pretraining: str
    parts: str
    seed: int
    job: Job
    primary: str
    scores: Mapping[str, float] = field(default_factory=dict)
    curve: tuple[tuple[int, float], ...] = ()
    cost: RunCost | None = None
    error: str = ""
    rule: RateRule | None = None

    @property
    def name(self) -> str:
        """For messages and progress."""
        return "/".join(word for word in (self.target, self.pretraining, self.parts, f"seed-{self.seed}") if word)


def plan_matrix(
    pretrainings: Sequence[Pretraining],
    targets: Mapping[str, Target],
    out: Path,
    *,
    parts: Sequence[Parts] = (None,),
    seeds: Sequence[int] = (0,),
    rate_by: RateBy | None = None,
) -> list[Entry]:
    """The runs of a matrix, in the order target, pre-training, parts, seed; nothing is written.

    Args:
        pretrainings: the first is the baseline.
        targets: by name.
        out: the folder of the matrix.
        parts: for each start from weights, these parts of them; None = all.
        seeds: of the runs.
        rate_by: take the learning rate of runs that start from weights from these (``lr_rule``).

    Raises:
        ConfigError: a name stands twice or is no plain word; a configuration does not fit its data.
        DataError: a target's data cannot be used.
    """
    _check_names([p.name for p in pretrainings], "pre-training")
    _check_names(list(targets), "target")
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"a seed stands twice: {', '.join(map(str, seeds))}", remedy="Give each once.")
    entries = []
    for target_name, target in targets.items():
        for start in pretrainings:
            for chosen in parts if start.init is not None else (None,):
                for seed in seeds:
                    loaded = start.config.init_parts if chosen is None else chosen
                    word = "" if start.init is None else ALL if loaded is None else "+".join(loaded)
                    folder = out / target_name / start.name / word / f"seed-{seed}"
                    job, rule = _job(start, target, chosen, seed, folder, rate_by)
                    entries.append(
                        Entry(
                            target=target_name,
                            pretraining=start.name,
                            parts=word,
                            seed=seed,
                            job=job,
                            primary=trained_kind(job.config.model).primary,
                            rule=rule,
                        )
                    )
    return entries


def run_matrix(
    entries: Sequence[Entry],
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
    how_to_resume: str = "",
    at_once: int | None = None,
) -> list[Entry]:
    """Trains what is missing and reads what is there. A run that fails leaves its error; the others go on.

    Raises:
        Interrupted: it was asked to stop; what was trained is saved, and the next call goes on.
        ConfigError, RunError: a run is there that has another configuration, or starts from other weights.
    """
    missing = {entry.name: entry.job for entry in entries if not _is_finished(entry.job)}
    failed: dict[str, str] = {}
    if missing:
        done = train_all(
            missing,
            progress=progress,
            should_stop=should_stop,
            how_to_resume=how_to_resume,
            at_once=at_once,
            keep_going=True,
        )
        failed = {name: _words(result) for name, result in done.items() if isinstance(result, Exception)}
    return [
        dataclasses.replace(entry, error=failed[entry.name]) if entry.name in failed else _read(entry)
        for entry in entries
    ]


def _job(
    start: Pretraining, target: Target, parts: Parts, seed: int, folder: Path, rate_by: RateBy | None
) -> tuple[Job, RateRule | None]:
    if start.init is not None:
        made = fine_tuning(start.init, start.config, target, parts=parts, rate_by=rate_by, seed=seed)
        job = Job(path=folder, config=prepared(made.config), recipe=start.recipe, init=made.init.absolute())
        return job, made.rule
    data = dataclasses.replace(start.config.data, train=target.train, val=target.val, embedded=None)
    config = dataclasses.replace(start.config, seed=seed, data=data)
    return Job(path=folder, config=prepared(config), recipe=start.recipe), None


def _check_names(names: Sequence[str], what: str) -> None:
    for name in names:
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"'{name}' cannot be the name of a {what}", remedy="Use letters, digits, dots, dashes and underscores."
            )
        if names.count(name) > 1:
            raise ConfigError(f"two of them have the name of the {what} '{name}'", remedy="Give each its own name.")


def _is_finished(job: Job) -> bool:
    """Whether the run is there and done. ConfigError, RunError where another one is there."""
    if not (job.path / "config.json").is_file():
        return False
    folder = RunFolder.open(job.path)
    try:
        check_same(folder, job.config)
    except ConfigError as error:
        remedy = "Remove this run to make it anew, or name another --out."
        raise ConfigError(error.what, where=job.path, remedy=remedy) from error
    if folder.first_weights() != job.init:
        raise RunError(
            f"a run stands there that starts from {folder.first_weights() or 'new weights'}, not from "
            f"{job.init or 'new weights'}",
            where=job.path,
            remedy="Name another --out, or another name for this pre-training.",
        )
    newest = newest_checkpoint(folder.checkpoints)
    return newest is not None and newest.state.step == job.steps and _last(folder) is not None


def _read(entry: Entry) -> Entry:
    folder = RunFolder.open(entry.job.path)
    last = _last(folder)
    if last is None:
        raise InputError("its evaluations are gone", where=folder.metrics, remedy="Remove this run to make it anew.")
    scores = {key: value for key, value in last.items() if key not in ROW_KEYS and isinstance(value, float)}
    curve = tuple((int(row["step"]), float(row[entry.primary])) for row in folder.evaluations())
    return dataclasses.replace(entry, scores=scores, curve=curve, cost=read_cost(folder))


def _last(folder: RunFolder) -> dict[str, float] | None:
    evaluations = folder.evaluations()
    return evaluations[-1] if evaluations else None


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, GessoError) else f"{type(error).__name__}: {error}"
