"""Makes a step of a run not finite."""

import torch

from gesso.training.loop import run_stage
from gesso.training.step import train_step

LAYER = "neck.lateral.1.0"


class Poison:
    """Makes a step of a run not finite by one layer's weights; keeps the batches and the state from before that step.

    Attributes:
        step: over all stages.
        batches: of the steps of the stage at hand, by their numbers.
        before: the module's state when the step began.
    """

    def __init__(self, monkeypatch, step, layer=LAYER, factor=torch.nan):
        self.step, self.layer, self.factor = step, layer, factor
        self.batches, self.stages, self.before, self.count = {}, [], {}, 0
        monkeypatch.setattr("gesso.run.session.run_stage", self.run_stage)
        monkeypatch.setattr("gesso.training.loop.train_step", self.train_step)

    def run_stage(self, stage, batches, callbacks):
        self.stages.append(stage)
        run_stage(stage, batches, callbacks)

    def train_step(self, stage, batch, targets, **options):
        self.count += 1
        self.batches[stage.step + 1] = batch, targets
        if self.count == self.step:
            module = dict(stage.module.named_modules())[self.layer]
            with torch.no_grad():
                module.weight.mul_(self.factor)
            self.before = {name: value.clone() for name, value in stage.module.state_dict().items()}
        return train_step(stage, batch, targets, **options)
