"""DMD2's students: EDM's network on ImageNet-64, and U-Nets of text-to-image pipelines."""

import os
import re
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

from ..schedulers import student_scheduler
from .edm import network_from_edm
from .networks import Converted, State, check_state

DMD2_IMAGENET = {
    "img_resolution": 64,
    "img_channels": 3,
    "label_dim": 1000,
    "model_type": "DhariwalUNet",
    "dropout": 0.0,
}


def dmd2_imagenet_network(content: Any, config: dict[str, Any]) -> Converted:
    """DMD2's ImageNet-64 student: EDM's network by its own names, without options in the file."""
    state = {k: v for k, v in content.items() if isinstance(v, torch.Tensor)}
    return network_from_edm("EDMPrecond", DMD2_IMAGENET | config, state)


_TIMESTEPS = {"4step": [999, 749, 499, 249], "1step": [399], "sdv1.5": [999]}  # by a part of a published name


def told_timesteps(file: Path) -> list[float]:
    """A published student's timesteps, by the name of its file, else of its folder; of Stable Diffusion 1.5 the
    folder `sdv1.5` holds a folder per run."""
    file = file.absolute()
    for name in (file.name, file.parent.name):
        for part, steps in _TIMESTEPS.items():
            if re.search(rf"(?<!\d){re.escape(part)}", name.casefold()):
                return steps
    if file.parent.parent.name.casefold() == "sdv1.5":
        return _TIMESTEPS["sdv1.5"]
    raise ValueError(
        f"`student_timesteps` must be given for {str(file)!r}: neither its name nor its folder's has one of "
        f"{sorted(_TIMESTEPS)}."
    )


def text_student(
    state: State, file: Path, base: str | os.PathLike | None, student_timesteps: list[float] | None
) -> DiffusionPipeline:
    """A base pipeline with DMD2's U-Net, and a scheduler that starts where the student does."""
    if base is None:
        raise ValueError(
            "`base` must be the pipeline that this U-Net belongs to (Stable Diffusion XL or 1.5, a folder or a Hub "
            "id), but is None."
        )
    if student_timesteps is None:
        student_timesteps = told_timesteps(file)
    state = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
    pipeline = DiffusionPipeline.from_pretrained(base, use_safetensors=True, dtype=torch.float32)
    if not isinstance(getattr(pipeline, "unet", None), UNet2DConditionModel):
        raise ValueError(
            f"`base` must be a text-to-image pipeline with a U-Net, but {str(base)!r} is a {type(pipeline).__name__} "
            f"of {sorted(pipeline.components)}."
        )
    check_state(state, pipeline.unet.state_dict())
    pipeline.unet.load_state_dict({k: v.float() for k, v in state.items()})
    scheduler = student_scheduler(pipeline.scheduler, "epsilon", student_timesteps, 1.0)
    pipeline.register_modules(scheduler=scheduler)
    return pipeline
