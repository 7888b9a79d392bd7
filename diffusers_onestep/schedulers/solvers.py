"""D-ODE's solvers by name, on the noise schedule of any teacher."""

from typing import Any

from diffusers import SchedulerMixin

from ..schedules import EDMSchedule, FlowSchedule, NoiseSchedule
from .scheduling_d_ode import (
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

_TRAILING = {"timestep_spacing": "trailing"}
_KARRAS = {
    "use_karras_sigmas": True,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "timestep_spacing": "linspace",
}
# name: class and settings, on grids that nest
SOLVERS: dict[str, tuple[type[DODESchedulerMixin], dict[str, Any]]] = {
    "ddim": (DistilledDDIMScheduler, _TRAILING),
    "pndm": (DistilledPNDMScheduler, _TRAILING | {"skip_prk_steps": True}),
    "ipndm": (DistilledPNDMScheduler, _TRAILING | {"skip_prk_steps": True, "pndm_type": "ipndm"}),
    "dpmsolver++": (DistilledDPMSolverMultistepScheduler, _TRAILING | {"algorithm_type": "dpmsolver++"}),
    "dpmsolver-singlestep": (
        DistilledDPMSolverSinglestepScheduler,
        {"lower_order_final": True, "algorithm_type": "dpmsolver++"},
    ),
    "deis": (DistilledDEISMultistepScheduler, _TRAILING | {"algorithm_type": "deis"}),
    "euler": (DistilledEulerDiscreteScheduler, _KARRAS),
    "edm-euler": (DistilledEDMEulerScheduler, {}),
    "edm-dpmsolver++": (DistilledEDMDPMSolverMultistepScheduler, {}),
    "heun": (DistilledHeunDiscreteScheduler, _KARRAS),
}

# diffusers' DEIS ends its flow grid at a level that depends on the number of steps
_FLOW_SOLVERS = (DistilledDPMSolverMultistepScheduler, DistilledDPMSolverSinglestepScheduler)


def solver_for(name: str, teacher_scheduler: SchedulerMixin, **settings: Any) -> DODESchedulerMixin:
    """The distilled scheduler `name` on a teacher's noise schedule, without tables.

    Args:
        name (`str`): a key of `SOLVERS`.
        teacher_scheduler (`SchedulerMixin`): whose config states the noise schedule and prediction type.
        settings: override those of `SOLVERS`.

    Raises:
        ValueError: if there is no such solver, or none for this kind of teacher.
    """
    config = teacher_scheduler.config
    schedule = NoiseSchedule.from_scheduler(teacher_scheduler)
    edm, flow = isinstance(schedule, EDMSchedule), isinstance(schedule, FlowSchedule)
    fits = [n for n in SOLVERS if n.startswith("edm-") == edm and not (flow and SOLVERS[n][0] not in _FLOW_SOLVERS)]
    if name not in fits:
        kind = f"{'flow matching ' if flow else ''}{type(teacher_scheduler).__name__}"
        raise ValueError(f"`solver` must be one of {fits} for a {kind}, but is {name!r}.")
    if config.get("preconditioning", "edm") != "edm":
        raise ValueError(f"`preconditioning` must be 'edm' for these solvers, but is {config.preconditioning!r}.")
    solver, defaults = SOLVERS[name]
    if name == "ddim":  # which clips unless it is told not to; of other kinds of schedulers none does
        defaults = {"clip_sample": bool(config.get("clip_sample", False))} | defaults
    if flow:
        defaults = {"use_flow_sigmas": True, "flow_shift": schedule.shift}
        defaults["prediction_type"] = config.get("prediction_type", "flow_prediction")
        config = {"num_train_timesteps": config.num_train_timesteps}
    return solver.from_config(config, **(defaults | settings | {"dode_tables": None}))
