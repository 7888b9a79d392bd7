"""What a converted network is sampled by."""

import torch

from ..pipelines import OneStepPipeline
from ..schedulers import EDMHeunScheduler, student_scheduler
from .networks import Converted

SID_SIGMA, DMD2_SIGMA = 2.5, 80.0


def pipeline_of(converted: Converted, kind: str) -> OneStepPipeline:
    """A teacher with its scheduler, or a student with the level that it starts from."""
    scheduler = converted.scheduler
    if kind in ("sid", "dmd2"):
        sigma = SID_SIGMA if kind == "sid" else DMD2_SIGMA
        if converted.prediction_type != "edm":
            raise ValueError(f"`kind` {kind!r} must be an EDM network, but predicts {converted.prediction_type!r}.")
        t = EDMHeunScheduler().schedule.c_noise(torch.tensor(sigma)).item()
        scheduler = student_scheduler(scheduler, "edm", [t], sigma)
    id2label = {i: str(i) for i in range(converted.labels)} or None
    return OneStepPipeline(converted.network, scheduler, id2label)
