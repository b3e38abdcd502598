import dataclasses
import time

import pytest

from gesso import comparison
from gesso.errors import Interrupted, RunError, TrainingError
from gesso.recipes.debug import tiny
from gesso.run.folder import RunFolder
from gesso.training.optimizer import SGD


def arms(steps=4):
    config = tiny()
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=steps))
    two = dataclasses.replace(
        config, pretraining=config.training, training=dataclasses.replace(config.training, steps=2)
    )
    return (
        comparison.Arm(name="one", title="One", phrase="one stage", recipe="debug:tiny", config=config),
        comparison.Arm(name="two", title="Two", phrase="two stages", recipe="debug:tiny", config=two),
    )


@pytest.mark.slow
def test_compare_trains_every_arm_and_writes_one_report(tmp_path):
    seen = []
    results = comparison.compare(
        arms(), tmp_path / "c", title="T", task="Task.", progress=lambda done, total: seen.append((done, total))
    )
    assert list(results) == ["one", "two"]
    assert results["one"]["images"] == 4 * 8 and results["two"]["images"] == 6 * 8
    assert all(0 <= one["AP"] <= 1 and one["seconds"] > 0 for one in results.values())
    assert seen and seen[-1][1] == 10 and max(done for done, _ in seen) <= 10
    page = (tmp_path / "c" / "report.html").read_text()
    assert "One" in page and "Two" in page and "http-equiv" in page
    assert not (tmp_path / "c" / "one" / "data").exists(), "the data is made once, for both"
    with pytest.raises(RunError, match="--resume"):
        comparison.compare(arms(), tmp_path / "c", title="T", task="Task.")
    again = comparison.compare(arms(), tmp_path / "c", title="T", task="Task.", resume=True)
    assert again == results


@pytest.mark.slow
def test_a_stopped_comparison_goes_on(tmp_path):
    began = time.monotonic()

    def stop() -> bool:
        return any(RunFolder(tmp_path / "c" / name).rows() for name in ("one", "two")) or time.monotonic() - began > 200

    with pytest.raises(Interrupted, match="again with"):
        comparison.compare(
            arms(steps=60), tmp_path / "c", title="T", task="Task.", should_stop=stop, how_to_resume="again with"
        )
    assert not (tmp_path / "c" / "report.html").exists()
    assert any((tmp_path / "c" / name / "checkpoints").exists() for name in ("one", "two"))
    results = comparison.compare(arms(steps=60), tmp_path / "c", title="T", task="Task.", resume=True)
    assert results["one"]["images"] == 60 * 8 and (tmp_path / "c" / "report.html").exists()


@pytest.mark.slow
def test_the_arm_that_failed_is_named_and_not_the_one_that_was_stopped(tmp_path):
    good, bad = arms(steps=400)
    training = dataclasses.replace(bad.config.training, optimizer=SGD(rate=1e12), clip_norm=None)
    bad = dataclasses.replace(bad, config=dataclasses.replace(bad.config, pretraining=None, training=training))
    with pytest.raises(TrainingError, match="not finite"):
        comparison.compare((good, bad), tmp_path / "c", title="T", task="Task.")


def test_a_folder_without_a_comparison_is_not_resumed(tmp_path):
    (tmp_path / "photos").mkdir()
    for folder in ("photos", "none"):
        with pytest.raises(RunError, match="no comparison was begun here"):
            comparison.compare(arms(), tmp_path / folder, title="T", task="Task.", resume=True)
    assert not (tmp_path / "none").exists() and not any((tmp_path / "photos").iterdir())


def test_difference_leaves_out_what_does_not_exist():
    scratch = dict.fromkeys(comparison.SCORES, 0.25) | {"APl": -1.0}
    direct = dict.fromkeys(comparison.SCORES, 0.5) | {"APl": -1.0}
    gained = comparison.difference({"a": scratch, "b": direct}, "a", "b")
    assert gained["AP"] == 0.25 and gained["APl"] is None
