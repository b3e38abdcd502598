"""The same task trained in several ways, side by side, and a report: the demo."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gesso import files
from gesso.errors import RunError
from gesso.recipes import demo
from gesso.run.config import RunConfig
from gesso.run.data import Progress, open_data
from gesso.run.folder import RunFolder
from gesso.run.report import write_comparison
from gesso.run.session import RunResult
from gesso.run.several import Job, train_all

SCORES = ("AP", "AP50", "AP75", "APs", "APm", "APl")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of training: ``name`` is its key and folder, ``title`` stands in tables, ``phrase`` within sentences."""

    name: str
    title: str
    phrase: str
    recipe: str
    config: RunConfig


def demo_arms(seed: int) -> tuple[Arm, Arm]:
    """The two arms of the demo."""
    return (
        Arm(
            name="scratch",
            title="From scratch",
            phrase="training from scratch",
            recipe="demo:scratch",
            config=dataclasses.replace(demo.scratch(), seed=seed),
        ),
        Arm(
            name="direct",
            title="Direct pre-training",
            phrase="direct pre-training",
            recipe="demo:direct",
            config=dataclasses.replace(demo.direct(), seed=seed),
        ),
    )


def compare(
    arms: Sequence[Arm],
    out: Path,
    *,
    title: str,
    task: str,
    commands: Sequence[tuple[str, str]] = (),
    resume: bool = False,
    prepare: Progress = lambda what, done, total: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
    how_to_resume: str = "",
) -> dict[str, dict[str, Any]]:
    """Trains every arm in ``out/NAME`` on the same data and writes ``out/report.html``.

    Arms train at the same time where ``run.several.train_all`` says so.

    Args:
        arms: at least two; the first is the baseline. Their data is that of the first.
        out: a new folder, or with ``resume`` one in which a comparison was interrupted: finished arms are kept.
        title, task, commands: of the report.
        resume: go on.
        prepare: told how far the embedded data is, which is made once, in ``out/data``.
        progress: (steps done, steps in all), over all arms.
        should_stop: asked twice a second; the arms then save and stop.
        how_to_resume: the command that goes on, for the message of an interruption.

    Returns:
        By arm: AP, AP50, AP75, APs, APm, APl, seconds of training, and images seen in training.

    Raises:
        RunError: ``out`` is not empty (without ``resume``). Otherwise as ``train``.
    """
    if not resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(
            "this folder is not empty", where=out, remedy="Go on with --resume, or name another folder with --out."
        )
    if resume and not (out / "data").is_dir():
        raise RunError("no comparison was begun here", where=out, remedy="Begin one without --resume.")
    out.mkdir(parents=True, exist_ok=True)
    index, val = open_data(arms[0].config.data, out, prepare)
    assert val is not None, "a comparison needs validation data"
    data = dataclasses.replace(arms[0].config.data, train=index.path, val=val.path, embedded=None)
    arms = [dataclasses.replace(arm, config=dataclasses.replace(arm.config, data=data)) for arm in arms]
    jobs = {arm.name: Job(path=out / arm.name, config=arm.config, recipe=arm.recipe) for arm in arms}
    done = train_all(jobs, progress=progress, should_stop=should_stop, how_to_resume=how_to_resume)
    results = {}
    for name, one in done.items():
        assert isinstance(one, RunResult), "errors were raised"
        results[name] = {key: (one.scores or {})[key] for key in SCORES} | {
            "seconds": one.seconds,
            "images": one.images,
        }
    runs = [(arm.title, arm.phrase, RunFolder.open(out / arm.name)) for arm in arms]
    write_comparison(out / "report.html", runs, val, title=title, task=task, commands=commands)
    files.write_json(out / "results.json", results)
    return results


def difference(results: Mapping[str, Mapping[str, Any]], base: str, other: str) -> dict[str, float | None]:
    """What ``other`` gains over ``base`` in each score; None where a score does not exist."""
    return {key: results[other][key] - results[base][key] if results[base][key] >= 0 else None for key in SCORES}
