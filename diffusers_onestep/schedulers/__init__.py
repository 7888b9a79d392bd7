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
    distilled_copy,
)
from .scheduling_edm_heun import EDMHeunScheduler
from .scheduling_one_step import OneStepScheduler, OneStepSchedulerOutput, student_scheduler
from .solvers import SOLVERS, solver_for

__all__ = [
    "DISTILLED_SCHEDULERS",
    "SOLVERS",
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
    "EDMHeunScheduler",
    "OneStepScheduler",
    "OneStepSchedulerOutput",
    "distilled_copy",
    "solver_for",
    "student_scheduler",
]
