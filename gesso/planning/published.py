"""The scaling model against published figures: MegDet, which it is calibrated on and checked by, and PFDet.

MegDet (Peng et al., CVPR 2018), Table 3: ResNet-50 with a pyramid on COCO, 11 epochs, 2 pictures a GPU, batch norm over
16 pictures (the 8 GPUs of one machine). The rows of 8 and 32 GPUs give two numbers, the seconds of a step and the
effective latency between machines; the rows of 64 and 128 GPUs are predicted. Assumed: 118,287 pictures an epoch
(train2017), 167 MB of gradients (our own detector of this kind), the default bandwidths, nothing hidden behind the
backward pass. Batch norm stays within a machine in all rows, so that its time is part of the step's.

What to know about this check: the two numbers come from two rows, but which number stands beside the seconds of a step
was chosen with all four rows in view. Calibrated on the same two rows, the bandwidth between machines alone gives -12%
and -30% for 64 and 128 GPUs, and the scatter of step times alone -9% and -25%. What fits is a cost that grows by the
same seconds with every machine: hops of a ring, as the planner has them. The rows cannot tell it from a fixed cost of
1.8 hours a run (start-up, evaluation): at a fixed number of pictures a GPU both give the same hours. The latency found,
36 ms for all messages of a step together, is 0.19 ms for each of 189 gradients, far above that of today's networks.

PFDet (Akiba et al., 2018): 512 V100 GPUs, batch 512, 16 epochs of Open Images in 33 hours, 83% efficiency. These are
two published numbers and no second row: the seconds of a step and their scatter are solved for, and nothing is
predicted. Assumed: 1.74 million pictures an epoch; 64 machines of 8, the default network; efficiency against GPUs that
need not wait for each other; a Faster R-CNN with SENet-154 and a pyramid, whose gradients (534 MB, one message, as
ChainerMN packs them) and batch norms (157 layers, over one machine) are those of our own detector of this kind; nothing
hidden behind the backward pass.
"""

import dataclasses
from dataclasses import dataclass

from gesso.planning.scaling import (
    Calibration,
    MeasuredHours,
    Network,
    Prediction,
    StepMeasurement,
    Work,
    calibrate,
    largest_of,
    predict,
)

MEGDET_CALIBRATION = (MeasuredHours(gpus=8, hours=39.5), MeasuredHours(gpus=32, hours=11.2))
MEGDET_HELD_OUT = (MeasuredHours(gpus=64, hours=6.5), MeasuredHours(gpus=128, hours=4.1))
MEGDET_WORK = Work(images=11 * 118_287)
MEGDET_STEP = StepMeasurement(seconds=0.0, images=2, gradient_bytes=167e6, backward_share=0.0)
"""Its seconds are found by the calibration."""

PFDET = MeasuredHours(gpus=512, hours=33.0)
PFDET_EFFICIENCY = 0.83
PFDET_WORK = Work(images=16 * 1_740_000)
PFDET_STEP = StepMeasurement(
    seconds=0.0,
    images=1,
    gradient_bytes=534e6,
    backward_share=0.0,
    norm_layers=157,
    norm_bytes=990_208,
    norm_images=8,
)
"""Its seconds and its jitter are solved for."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One published training time beside that of the model.

    Attributes:
        gpus: of it.
        published: hours.
        predicted: hours.
        held_out: the calibration did not see it.
    """

    gpus: int
    published: float
    predicted: float
    held_out: bool

    @property
    def error(self) -> float:
        """(predicted - published) / published."""
        return self.predicted / self.published - 1


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What PFDet's training comes to where one assumption is another.

    Attributes:
        name: which.
        step: with it.
        network: with it.
        prediction: for 512 GPUs.
    """

    name: str
    step: StepMeasurement
    network: Network
    prediction: Prediction


def megdet() -> tuple[Calibration, list[Row]]:
    """The calibration, and its rows and the held-out ones, by rising numbers of GPUs."""
    found = calibrate(MEGDET_CALIBRATION, MEGDET_STEP, Network(), MEGDET_WORK)
    rows = [
        Row(
            gpus=row.gpus,
            published=row.hours,
            predicted=predict(found.step, found.network, MEGDET_WORK, row.gpus).hours,
            held_out=row in MEGDET_HELD_OUT,
        )
        for row in (*MEGDET_CALIBRATION, *MEGDET_HELD_OUT)
    ]
    return found, rows


def pfdet() -> list[Assumptions]:
    """The assumptions that give 33 hours and 83%, first, and what others would give."""
    step, network = _solved(), Network()
    slow = dataclasses.replace(network, between_bandwidth=1.25e9)
    megdets = dataclasses.replace(network, between_latency=megdet()[0].network.between_latency)
    cases = [
        ("as published, solved for the step and its scatter", step, network),
        ("all GPUs equally fast in every step", dataclasses.replace(step, jitter=0.0), network),
        ("twice the scatter", dataclasses.replace(step, jitter=2 * step.jitter), network),
        ("batch norm over all 512 GPUs", dataclasses.replace(step, norm_images=None), network),
        ("10 Gb/s between machines", step, slow),
        ("the latency found for MegDet", step, megdets),
    ]
    return [
        Assumptions(name=name, step=s, network=n, prediction=predict(s, n, PFDET_WORK, PFDET.gpus))
        for name, s, n in cases
    ]


def _solved() -> StepMeasurement:
    """PFDet's step: 83% of the published step is computing, and scatter is what the network does not explain."""
    idle = predict(PFDET_STEP, Network(), PFDET_WORK, PFDET.gpus)
    whole = PFDET.hours * 3600 / idle.steps
    seconds = PFDET_EFFICIENCY * whole
    scatter = (whole - seconds - idle.step_seconds) / (seconds * largest_of(PFDET.gpus))
    return dataclasses.replace(PFDET_STEP, seconds=seconds, jitter=scatter)
