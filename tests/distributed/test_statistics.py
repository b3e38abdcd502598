"""Running statistics of single processes, or of groups of them, are those of process 0 once a stage is over."""

import dataclasses
from pathlib import Path

import pytest

from gesso.models.norm import NormPolicy
from gesso.recipes.debug import tiny
from gesso.run import session
from gesso.run.train import train
from tests.distributed.processes import run


def _buffers_when_stages_begin_and_end(folder: str, policy: NormPolicy) -> list[list[float]]:
    """The sums of all running statistics, at both ends of both stages."""
    found: list[list[float]] = []
    original = session.run_stage

    def watched(stage, batches, callbacks):
        for step in (None, original):
            if step is not None:
                step(stage, batches, callbacks)
            found.append([float(buffer.double().sum()) for buffer in stage.module.buffers()])

    session.run_stage = watched
    try:
        config = tiny()
        first = dataclasses.replace(config.training, steps=3, norm=policy, checkpoint_every=3)
        second = dataclasses.replace(config.training, steps=2, norm=NormPolicy(kind="fixed"), checkpoint_every=2)
        train(dataclasses.replace(config, pretraining=first, training=second), Path(folder))
    finally:
        session.run_stage = original
    return found


@pytest.mark.parametrize("policy", [NormPolicy(kind="train"), NormPolicy(kind="sync", images=2)], ids=["train", "sync"])
def test_a_fixed_stage_begins_with_the_same_statistics_everywhere(tmp_path, policy):
    first, second = run(_buffers_when_stages_begin_and_end, 2, str(tmp_path / "run"), policy)
    assert len(first) == 4
    assert first == second
    assert first[1] != first[0] and first[3] == first[2], "statistics move in the first stage and stay in the second"
