from .scheduling_d_ode import (
    DISTILLED_SCHEDULERS,
    DistilledDDIMScheduler,
    DistilledDEISMultistepScheduler,
    DistilledDPMSolverMultistepScheduler,
    DistilledDPMSolverSinglestepScheduler,
    DistilledEDMDPMSolverMultistepScheduler,
    DistilledEDMEulerScheduler,
    DistilledEulerDiscreteScheduler,
    DistilledHeunDiscreteScheduler,
    DistilledPNDMScheduler,
    DODESchedulerMixin,
)
from .scheduling_one_step import OneStepScheduler, OneStepSchedulerOutput, student_scheduler

__all__ = [
    "DISTILLED_SCHEDULERS",
    "DODESchedulerMixin",
    "DistilledDDIMScheduler",
    "DistilledDEISMultistepScheduler",
    "DistilledDPMSolverMultistepScheduler",
    "DistilledDPMSolverSinglestepScheduler",
    "DistilledEDMDPMSolverMultistepScheduler",
    "DistilledEDMEulerScheduler",
    "DistilledEulerDiscreteScheduler",
    "DistilledHeunDiscreteScheduler",
    "DistilledPNDMScheduler",
    "OneStepScheduler",
    "OneStepSchedulerOutput",
    "student_scheduler",
]
