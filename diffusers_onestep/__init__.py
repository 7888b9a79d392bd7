"""One-step students of pretrained diffusion models, for Hugging Face diffusers."""

import importlib
from typing import TYPE_CHECKING, Any

from diffusers.pipelines.pipeline_loading_utils import ALL_IMPORTABLE_CLASSES, LOADABLE_CLASSES

_PUBLIC = {
    "denoiser": ["Denoiser", "GuidedDenoiser"],
    "schedules": ["NoiseSchedule", "VPSchedule", "FlowSchedule", "EDMSchedule"],
    "teacher": ["Teacher"],
    "methods.dkdm": ["DKDM"],
    "methods.dmd": ["DMD"],
    "methods.pid": ["PID"],
    "methods.sid": ["SiD"],
    "trainer": ["train"],
    "schedulers": [
        "EDMHeunScheduler",
        "OneStepScheduler",
        "DistilledDDIMScheduler",
        "DistilledPNDMScheduler",
        "DistilledDPMSolverMultistepScheduler",
        "DistilledDPMSolverSinglestepScheduler",
        "DistilledDEISMultistepScheduler",
        "DistilledEulerDiscreteScheduler",
        "DistilledEDMEulerScheduler",
        "DistilledEDMDPMSolverMultistepScheduler",
        "DistilledHeunDiscreteScheduler",
    ],
    "methods.dode": ["fit_d_ode", "DODEReport"],
    "pipelines": ["OneStepPipeline"],
    "pipelines.pipeline_text_to_image": [
        "OneStepStableDiffusionPipeline",
        "OneStepStableDiffusionXLPipeline",
        "OneStepStableDiffusion3Pipeline",
        "OneStepFluxPipeline",
        "OneStepPixArtAlphaPipeline",
        "OneStepPixArtSigmaPipeline",
        "OneStepSanaPipeline",
    ],
    "prompts": ["PromptEmbeddings", "CaptionedLatents"],
    "models": ["EDMUNet2DModel", "EDM2UNet2DModel", "SpaceToDepthUNet2DModel"],
    "repository": ["shipped_model"],
    "evaluation": ["evaluate"],
    "reports": ["Metrics"],
    "cards": ["create_model_card"],
    "hub": ["push_student"],
    "conversion": ["convert"],
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}
# diffusers' loader looks for these two on the library that a repository names
_LOADER_BASES = {
    "ModelMixin": "diffusers.models.modeling_utils",
    "SchedulerMixin": "diffusers.schedulers.scheduling_utils",
}

__all__ = sorted(_MODULE_OF)

# repositories then name our classes as ["diffusers_onestep", "OneStepScheduler"], and load from the Hub too
_METHODS = {base: ["save_pretrained", "from_pretrained"] for base in _LOADER_BASES}
LOADABLE_CLASSES["diffusers_onestep"] = _METHODS
ALL_IMPORTABLE_CLASSES.update(_METHODS)


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    if name in _LOADER_BASES:
        return getattr(importlib.import_module(_LOADER_BASES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


if TYPE_CHECKING:
    from .cards import create_model_card
    from .conversion import convert
    from .denoiser import Denoiser, GuidedDenoiser
    from .evaluation import evaluate
    from .hub import push_student
    from .methods.dkdm import DKDM
    from .methods.dmd import DMD
    from .methods.dode import DODEReport, fit_d_ode
    from .methods.pid import PID
    from .methods.sid import SiD
    from .models import EDM2UNet2DModel, EDMUNet2DModel, SpaceToDepthUNet2DModel
    from .pipelines import OneStepPipeline
    from .pipelines.pipeline_text_to_image import (
        OneStepFluxPipeline,
        OneStepPixArtAlphaPipeline,
        OneStepPixArtSigmaPipeline,
        OneStepSanaPipeline,
        OneStepStableDiffusion3Pipeline,
        OneStepStableDiffusionPipeline,
        OneStepStableDiffusionXLPipeline,
    )
    from .prompts import CaptionedLatents, PromptEmbeddings
    from .reports import Metrics
    from .repository import shipped_model
    from .schedulers import (
        DistilledDDIMScheduler,
        DistilledDEISMultistepScheduler,
        DistilledDPMSolverMultistepScheduler,
        DistilledDPMSolverSinglestepScheduler,
        DistilledEDMDPMSolverMultistepScheduler,
        DistilledEDMEulerScheduler,
        DistilledEulerDiscreteScheduler,
        DistilledHeunDiscreteScheduler,
        DistilledPNDMScheduler,
        EDMHeunScheduler,
        OneStepScheduler,
    )
    from .schedules import EDMSchedule, FlowSchedule, NoiseSchedule, VPSchedule
    from .teacher import Teacher
    from .trainer import train
