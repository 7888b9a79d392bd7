"""What a converted folder holds: the pipeline, and its card."""

import hashlib
import json
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from ..pipelines import OneStepPipeline
from ..schedulers import EDMHeunScheduler, student_scheduler
from .edm import DECODE_EDM2_LATENTS, EDM2_LATENTS
from .kinds import licence_of
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


def digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def card(pipeline: DiffusionPipeline, kind: str, file: str, name: str, notes: list[str]) -> str:
    """README.md of a converted folder."""
    licence, sentence = licence_of(kind, file)
    student = kind in ("sid", "dmd2")
    imports = "import torch"
    labelled = bool(getattr(pipeline, "num_labels", None))
    if student:
        asked = "class_labels=[0, 1]" if labelled else "batch_size=2"
        asked = asked if isinstance(pipeline, OneStepPipeline) else 'prompt="a photo of a cat"'
        use = f'pipe = OneStepPipeline.from_pretrained("{name}")\n'
        if EDM2_LATENTS in notes:
            imports += "\nfrom diffusers import AutoencoderKL"
            use += f'latents = pipe({asked}, output_type="latent").images\n{DECODE_EDM2_LATENTS}'
        else:
            use += f"images = pipe({asked}).images"
    else:
        asked = "teacher.encode([0] * 8), " if labelled else ""
        use = f'teacher = Teacher.from_pretrained("{name}")\nnoise = torch.randn(8, *teacher.sample_shape)\n'
        use += f"x0 = teacher.sample(noise, {asked}num_inference_steps=18)"
    classes = "OneStepPipeline" if student else "Teacher"
    scheduler = {k: v for k, v in pipeline.scheduler.config.items() if not k.startswith("_") and k != "trained_betas"}
    text = "\n\n".join(notes)
    return f"""---
library_name: diffusers
license: {licence}
tags: [diffusers-onestep, {kind}, {"one-step" if student else "teacher"}]
---

# {name}

Converted from `{file}` by `onestep convert` ({kind}). {sentence} A converted model keeps the licence of its weights.

```python
{imports}
from diffusers_onestep import {classes}

{use}
```

`{type(pipeline.unet).__name__}`, {sum(p.numel() for p in pipeline.unet.parameters()):,} parameters, float32;
`{type(pipeline.scheduler).__name__}`: `{json.dumps(scheduler, default=str)}`

{text}
"""
