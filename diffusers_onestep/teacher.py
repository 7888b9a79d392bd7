"""A pretrained diffusers pipeline as a teacher: its denoiser, its conditions, and the repository its student
becomes."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin, StableDiffusionPipeline
from torch import nn

from .conditions import Labels, label_embeddings, label_ids, named_labels
from .denoiser import Cond, Denoiser, GuidedDenoiser
from .methods.base import sample_shape_of
from .pipelines import OneStepPipeline
from .repository import load_index, resolve_model, safetensors_only
from .sampling import sample
from .schedulers import student_scheduler
from .schedules import EDMSchedule, FlowSchedule, NoiseSchedule


class Teacher:
    """What a student learns from. Build it with `from_pretrained`.

    Args:
        pipeline (`DiffusionPipeline`): a pixel pipeline of a `unet` and a `scheduler`, unconditional or by class
            label; or a `StableDiffusionPipeline`, whose model space are its latents.
        id2label (`dict[int, str]`, *optional*): names of the class labels; by default those of the network's config.

    Attributes:
        denoiser (`Denoiser`): `(x_t, t, cond) -> x0`, frozen and in eval mode.
        pipeline (`DiffusionPipeline`): where it came from.
        sample_shape (`tuple[int, int, int]`): `(C, H, W)` of model space.
        name (`str`, *optional*): what it was loaded as, at `revision`; for the cards of its students.

    Example:

    ```python
    >>> from diffusers_onestep import Teacher
    >>> teacher = Teacher.from_pretrained("fashion32")
    >>> noise = torch.randn(8, *teacher.sample_shape)
    >>> images = teacher.sample(noise, teacher.encode(["Bag"] * 8), num_inference_steps=50)
    ```
    """

    def __init__(self, pipeline: DiffusionPipeline, id2label: dict[int, str] | None = None):
        self.takes_prompts = isinstance(pipeline, StableDiffusionPipeline)
        parts = {name for name, part in pipeline.components.items() if part is not None}
        if not self.takes_prompts and parts != {"unet", "scheduler"}:
            raise ValueError(
                "`pipeline` must be a pixel pipeline of a `unet` and a `scheduler` (unconditional or by class label) "
                f"or a StableDiffusionPipeline, but is {type(pipeline).__name__}."
            )
        self.pipeline = pipeline
        self.name: str | None = None
        self.revision: str | None = None
        self.id2label = named_labels(id2label, pipeline.unet)
        self.scheduler = pipeline.scheduler
        network = pipeline.unet.requires_grad_(False).eval()
        schedule = NoiseSchedule.from_scheduler(self.scheduler)
        self.denoiser = Denoiser(network, schedule, _prediction_type(self.scheduler, schedule))
        self.sample_shape = sample_shape_of(self.denoiser)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike,
        *,
        revision: str | None = None,
        variant: str | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> "Teacher":
        """Load a diffusers pipeline without running it.

        Args:
            path_or_id (`str`): a Hub id, a folder, or the name of a shipped teacher.
            revision (`str`, *optional*): of the Hub repository.
            variant (`str`, *optional*): of the weights, such as `"fp16"`.
            dtype (`torch.dtype`, *optional*): of the weights; arithmetic outside the network is float32 all the same.
            device (`str` or `torch.device`, *optional*): where to put it.
        """
        path = resolve_model(path_or_id)
        index = load_index(path, revision=revision)
        with safetensors_only(path):
            pipeline = DiffusionPipeline.from_pretrained(
                path, revision=revision, variant=variant, use_safetensors=True, **({"dtype": dtype} if dtype else {})
            )
        if device is not None:
            pipeline.to(device)
        teacher = cls(pipeline, index.get("id2label"))
        teacher.name, teacher.revision = str(path_or_id), revision
        return teacher

    @property
    def num_labels(self) -> int | None:
        """How many labels there are to ask for, the null label left out; None if unconditional."""
        embeddings = label_embeddings(self.denoiser.network)
        return len(self.id2label) if embeddings and self.id2label else embeddings

    @property
    def null_label(self) -> int | None:
        """The label for "no label": the one embedding beyond the named labels, if there is one."""
        embeddings = label_embeddings(self.denoiser.network)
        return embeddings - 1 if embeddings and self.id2label and embeddings == len(self.id2label) + 1 else None

    def null_condition(self, batch_size: int) -> dict[str, torch.Tensor]:
        """The unconditional inputs for `batch_size` samples; empty if the teacher has none."""
        if self.takes_prompts:
            return self.encode([""] * batch_size)
        if self.null_label is None:
            return {}
        return {"class_labels": torch.full((batch_size,), self.null_label)}

    @torch.no_grad()
    def encode(self, labels: Labels | None = None) -> dict[str, torch.Tensor]:
        """The `cond` of prompts, or of labels by id or name; all labels, one after another, if none are given."""
        if self.takes_prompts:
            if not isinstance(labels, (list, tuple)) or not all(isinstance(prompt, str) for prompt in labels):
                raise ValueError(f"`labels` must be a list of prompts for a text-to-image teacher, but is {labels!r}.")
            embeddings, _ = self.pipeline.encode_prompt(list(labels), self.pipeline.device, 1, False)
            return {"encoder_hidden_states": embeddings}
        if self.num_labels is None:
            if labels is not None:
                raise ValueError(f"`labels` must be None for an unconditional teacher, but is {labels!r}.")
            return {}
        wanted: Labels | Sequence[int] = range(self.num_labels) if labels is None else labels
        return {"class_labels": label_ids(wanted, self.num_labels, self.id2label)}

    def guided(self, guidance_scale: float) -> Denoiser | GuidedDenoiser:
        """The denoiser with classifier-free guidance; itself at 1.0."""
        if guidance_scale == 1.0:
            return self.denoiser
        return GuidedDenoiser(self.denoiser, guidance_scale, self.null_condition(1))

    def sample(
        self,
        noise: torch.Tensor,
        cond: Cond | None = None,
        *,
        num_inference_steps: int,
        guidance_scale: float = 1.0,
        scheduler: SchedulerMixin | None = None,
    ) -> torch.Tensor:
        """The teacher's images `(B, C, H, W)` (or latents) of unit-variance noise, by its own scheduler (DDIM for
        DDPM) or another one."""
        denoiser = self.guided(guidance_scale)
        return sample(denoiser, scheduler or self.scheduler, noise, cond, num_inference_steps=num_inference_steps)

    def student_pipeline(self, network: nn.Module, **settings: Any) -> OneStepPipeline:
        """The pipeline that a student of this teacher is saved as; `settings` are those of `student_scheduler`."""
        self.check_distillable()
        scheduler = student_scheduler(self.scheduler, self.denoiser.prediction_type, **settings)
        known = named_labels(None, network) == self.id2label
        return OneStepPipeline(network, scheduler, None if known else self.id2label)

    def compressed_pipeline(self, network: nn.Module) -> OneStepPipeline:
        """The pipeline of another network for the same many steps: this teacher's scheduler and labels."""
        self.check_distillable()
        return OneStepPipeline(network, self.scheduler, self.id2label)

    def check_distillable(self) -> None:
        """Raise a `ValueError` for teachers whose one-step students have no pipeline yet."""
        if self.takes_prompts:
            raise ValueError(
                "`teacher` must be a pixel pipeline to be distilled into one step: text-to-image teachers are taken "
                f"by fit_d_ode so far, but it is a {type(self.pipeline).__name__}."
            )


def _prediction_type(scheduler: Any, schedule: NoiseSchedule) -> str:
    prediction_type = scheduler.config.get("prediction_type", "flow_prediction")
    if isinstance(schedule, FlowSchedule):
        return "flow_prediction"
    if isinstance(schedule, EDMSchedule):
        if prediction_type != "epsilon":
            raise ValueError(f"`prediction_type` of an EDM scheduler must be 'epsilon', but is {prediction_type!r}.")
        return "edm"
    return prediction_type
