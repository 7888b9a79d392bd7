"""A pretrained diffusers pipeline as a teacher: its denoiser, its conditions, and the repository its student
becomes."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderTiny, DiffusionPipeline, EDMEulerScheduler, SchedulerMixin
from torch import nn

from .conditions import Labels, label_embeddings, label_ids, named_labels
from .denoiser import Cond, Denoiser, GuidedDenoiser
from .families import FAMILIES, decode_sparingly, family_of
from .models import without_variance
from .network_calls import sample_shape_of
from .pipelines import OneStepPipeline
from .repository import load_index, resolve_model, safetensors_only
from .sampling import deterministic, sample
from .schedulers import EDMHeunScheduler, student_scheduler
from .schedules import EDMSchedule, FlowSchedule, NoiseSchedule


class Teacher:
    """What a student learns from. Build it with `from_pretrained`.

    Args:
        pipeline (`DiffusionPipeline`): a pixel pipeline of a `unet` and a `scheduler`, unconditional or by class
            label; or a text-to-image pipeline (Stable Diffusion 1.x, 2.x, XL and 3.x, FLUX.1, PixArt, SANA), whose
            model space are its latents.
        id2label (`dict[int, str]`, *optional*): names of the class labels; by default those of the network's config.
        resolution (`int` or `tuple[int, int]`, *optional*): height and width in pixels of a text-to-image teacher; by
            default those of its network's config.
        embedded_guidance (`float`, *optional*, defaults to 3.5): what the guidance embedding of FLUX.1-dev is fed;
            other teachers have none.

    Attributes:
        denoiser (`Denoiser`): `(x_t, t, cond) -> x0`, frozen and in eval mode.
        pipeline (`DiffusionPipeline`): where it came from.
        sample_shape (`tuple[int, int, int]`): `(C, H, W)` of model space.
        family (`Family`, *optional*): the kind of text-to-image pipeline; None for pixels.
        name (`str`, *optional*): what it was loaded as, at `revision`; for the cards of its students.

    Example:

    ```python
    >>> from diffusers_onestep import Teacher
    >>> teacher = Teacher.from_pretrained("fashion32")
    >>> noise = torch.randn(8, *teacher.sample_shape)
    >>> images = teacher.sample(noise, teacher.encode(["Bag"] * 8), num_inference_steps=50)
    ```
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        id2label: dict[int, str] | None = None,
        *,
        resolution: int | tuple[int, int] | None = None,
        embedded_guidance: float = 3.5,
    ):
        self.family = family_of(pipeline)
        parts = {name for name, part in pipeline.components.items() if part is not None}
        if self.family is None and parts != {"unet", "scheduler"}:
            raise ValueError(
                "`pipeline` must be a pixel pipeline of a `unet` and a `scheduler` (unconditional or by class label) "
                f"or one of {[family.stock for family in FAMILIES]}, but is {type(pipeline).__name__}."
            )
        self.pipeline = pipeline
        self.name: str | None = None
        self.revision: str | None = None
        self.embedded_guidance = embedded_guidance
        network = getattr(pipeline, self.network_name).requires_grad_(False).eval()
        self.id2label = named_labels(id2label, network)
        self.scheduler = pipeline.scheduler
        schedule = NoiseSchedule.from_scheduler(self.scheduler)
        self.denoiser = Denoiser(network, schedule, prediction_type_of(self.scheduler, schedule))
        self._null: Cond | None = None
        if self.family is None:
            if resolution is not None:
                raise ValueError(f"`resolution` must be None for a pixel teacher, but is {resolution}.")
            self.sample_shape = sample_shape_of(network)
            return
        for name, part in pipeline.components.items():
            if isinstance(part, nn.Module) and name != self.network_name:
                part.requires_grad_(False).eval()
        self.resolution = self.family.size(pipeline, resolution)
        decode_sparingly(pipeline.vae, *self.resolution)
        height, width = (side // pipeline.vae_scale_factor for side in self.resolution)
        self.sample_shape = (self.family.latent_channels(network), height, width)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike,
        *,
        revision: str | None = None,
        variant: str | None = None,
        dtype: torch.dtype | dict[str, torch.dtype] = torch.float32,
        device: str | torch.device | None = None,
        resolution: int | tuple[int, int] | None = None,
        embedded_guidance: float = 3.5,
    ) -> "Teacher":
        """Load a diffusers pipeline without running it.

        Args:
            path_or_id (`str`): a Hub id, a folder, or the name of a shipped teacher.
            revision (`str`, *optional*): of the Hub repository.
            variant (`str`, *optional*): of the weights, such as `"fp16"`.
            dtype (`torch.dtype` or `dict`, *optional*, defaults to `torch.float32`): of the weights, or of those of
                parts of the pipeline by name; arithmetic outside the network is float32 all the same.
            device (`str` or `torch.device`, *optional*): where to put it.
            resolution, embedded_guidance: as the class takes them.
        """
        path = resolve_model(path_or_id)
        index = load_index(path, revision=revision)
        with safetensors_only(path, revision):
            pipeline = DiffusionPipeline.from_pretrained(
                path, revision=revision, variant=variant, use_safetensors=True, dtype=dtype
            )
        if device is not None:
            pipeline.to(device)
        teacher = cls(pipeline, index.get("id2label"), resolution=resolution, embedded_guidance=embedded_guidance)
        teacher.name, teacher.revision = str(path_or_id), revision
        return teacher

    @property
    def takes_prompts(self) -> bool:
        """Whether it is a text-to-image teacher."""
        return self.family is not None

    @property
    def network_name(self) -> str:
        """The component of the pipeline that is distilled."""
        return self.family.network if self.family else "unet"

    @property
    def num_labels(self) -> int | None:
        """How many labels there are to ask for, the null label left out; None if there are none."""
        embeddings = None if self.takes_prompts else label_embeddings(self.denoiser.network)
        return len(self.id2label) if embeddings and self.id2label else embeddings

    @property
    def null_label(self) -> int | None:
        """The label for "no label": the one embedding beyond the named labels, if there is one."""
        embeddings = None if self.takes_prompts else label_embeddings(self.denoiser.network)
        return embeddings - 1 if embeddings and self.id2label and embeddings == len(self.id2label) + 1 else None

    @torch.no_grad()
    def null_condition(self, batch_size: int) -> Cond:
        """The unconditional inputs for `batch_size` samples; empty if the teacher has none."""
        if self.takes_prompts:
            if self._null is None:
                self._null = self.family.null(self.pipeline)
            null = {k: v.expand(batch_size, *v.shape[1:]) for k, v in self._null.items()}
            return null | self.family.extra(self, batch_size)
        if self.null_label is None:
            return {}
        return {"class_labels": torch.full((batch_size,), self.null_label)}

    def encode(self, labels: Labels | None = None) -> Cond:
        """The `cond` of prompts, or of labels by id or name; all labels, one after another, if none are given."""
        if self.takes_prompts:
            return self.embed(labels) | self.family.extra(self, len(labels))
        if self.num_labels is None:
            if labels is not None:
                raise ValueError(f"`labels` must be None for an unconditional teacher, but is {labels!r}.")
            return {}
        wanted: Labels | Sequence[int] = range(self.num_labels) if labels is None else labels
        return {"class_labels": label_ids(wanted, self.num_labels, self.id2label)}

    @property
    def reference_scheduler(self) -> SchedulerMixin:
        """What the teacher is sampled with: its own scheduler, but DDIM for DDPM, as `deterministic` has it, and the
        paper's Heun method for a stock EDM one."""
        if type(self.scheduler) is EDMEulerScheduler:
            return EDMHeunScheduler.from_config(self.scheduler.config)
        return deterministic(self.scheduler)

    @property
    def reference_steps(self) -> int:
        """How many of its steps a picture of the teacher takes: 18 of Heun's method (Karras et al. 2022, Table 7), or
        50."""
        return 18 if isinstance(self.reference_scheduler, EDMHeunScheduler) else 50

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Cond:
        """The part of `encode` that depends on the prompts alone."""
        if not isinstance(prompts, (list, tuple)) or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"`labels` must be a list of prompts for a text-to-image teacher, but is {prompts!r}.")
        if any(part.device.type == "meta" for part in self.text_encoders().values()):
            raise ValueError("`labels` can not be encoded any more: the text encoders have been freed.")
        return self.family.embed(self.pipeline, list(prompts))

    def text_encoders(self) -> dict[str, nn.Module]:
        """The text encoders by their names in the pipeline."""
        parts = self.pipeline.components.items()
        return {k: v for k, v in parts if k.startswith("text_encoder") and v is not None}

    def free_text_encoders(self) -> None:
        """Let go of the text encoders' weights; their classes and configs stay. What is encoded is kept by
        `PromptEmbeddings`."""
        self.null_condition(1)
        for encoder in self.text_encoders().values():
            encoder.to("meta")

    def decode(self, x0: torch.Tensor, vae: AutoencoderTiny | None = None) -> torch.Tensor:
        """Images `(B, 3, H, W)` in [-1, 1] of latents, by the teacher's own autoencoder or a small `vae` that stands
        in for it; samples of a pixel teacher as they are. Gradients flow."""
        if not self.takes_prompts:
            return x0
        vae, (mean, std, shift) = self._vae(x0.device, vae)
        x0 = x0.float() * std / vae.config.scaling_factor + mean + shift
        return vae.decode(x0.to(vae.dtype), return_dict=False)[0].float()

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Model-space samples of images `(B, 3, H, W)` in [-1, 1]: the most likely latents, or the pixels."""
        if not self.takes_prompts:
            return images
        vae, (mean, std, shift) = self._vae(images.device)
        output = vae.encode(images.to(vae.dtype))
        latents = output.latent_dist.mode() if hasattr(output, "latent_dist") else output[0]
        return (latents.float() - shift - mean) / std * vae.config.scaling_factor

    def load_tiny_vae(self, path_or_id: str | os.PathLike) -> AutoencoderTiny:
        """A small autoencoder for the latents of this teacher, such as `madebyollin/taesd` for Stable Diffusion 1.x:
        its decoder takes a fraction of the memory and time. Its latents are the network's own, unscaled."""
        kind = AutoencoderTiny.load_config(path_or_id)["_class_name"]
        if kind != "AutoencoderTiny":
            raise ValueError(f"`tiny_vae` must be an AutoencoderTiny, but {str(path_or_id)!r} is an {kind}.")
        vae = AutoencoderTiny.from_pretrained(path_or_id, use_safetensors=True)
        found = vae.config.latent_channels, 2 ** (len(vae.config.decoder_block_out_channels) - 1)
        wanted = self.sample_shape[0], self.pipeline.vae_scale_factor
        if found != wanted:
            raise ValueError(
                f"`tiny_vae` must have {wanted[0]} latent channels and {wanted[1]} pixels on a side of each latent "
                f"for this {type(self.pipeline).__name__}, but {str(path_or_id)!r} has {found[0]} and {found[1]}."
            )
        return vae.requires_grad_(False).eval()

    def _vae(self, device: torch.device, vae: nn.Module | None = None):
        vae = (self.pipeline.vae if vae is None else vae).to(device)
        if vae.dtype == torch.float16 and vae.config.get("force_upcast"):
            vae.float()  # SDXL's overflows in half precision
        mean, std = (vae.config.get(f"latents_{name}") for name in ("mean", "std"))
        mean, std = (0 if v is None else torch.tensor(v, device=device).reshape(1, -1, 1, 1) for v in (mean, std))
        return vae, (mean, 1 if vae.config.get("latents_std") is None else std, vae.config.get("shift_factor") or 0)

    def guided(self, guidance_scale: float) -> Denoiser | GuidedDenoiser:
        """The denoiser with classifier-free guidance; itself at 1.0."""
        if guidance_scale == 1.0:
            return self.denoiser
        guided = GuidedDenoiser(self.denoiser, guidance_scale, self.null_condition(1))
        guided.origin = self
        return guided

    def sample(
        self,
        noise: torch.Tensor,
        cond: Cond | None = None,
        *,
        num_inference_steps: int,
        guidance_scale: float = 1.0,
        scheduler: SchedulerMixin | None = None,
    ) -> torch.Tensor:
        """The teacher's images `(B, C, H, W)` (or latents) of unit-variance noise, by its reference scheduler (DDIM
        for DDPM, Heun for EDM) or another one."""
        denoiser = self.guided(guidance_scale)
        return sample(
            denoiser, scheduler or self.reference_scheduler, noise, cond, num_inference_steps=num_inference_steps
        )

    def student_pipeline(self, network: nn.Module, **settings: Any) -> DiffusionPipeline:
        """The pipeline that a student of this teacher is saved as; `settings` are those of `student_scheduler`."""
        scheduler = student_scheduler(self.scheduler, self.denoiser.prediction_type, **settings)
        if self.takes_prompts:
            return self._with(network, scheduler)
        network = without_variance(network)
        known = named_labels(None, network) == self.id2label
        return OneStepPipeline(network, scheduler, None if known else self.id2label)

    def compressed_pipeline(self, network: nn.Module) -> DiffusionPipeline:
        """The pipeline of another network for the same many steps: this teacher's scheduler and labels. Of a network
        without the channels of a learned variance the scheduler expects none."""
        scheduler, config = self.scheduler, network.config
        learned = str(scheduler.config.get("variance_type")).startswith("learned")
        if learned and config.get("out_channels") == config.get("in_channels"):
            scheduler = type(scheduler).from_config(scheduler.config, variance_type="fixed_small")
        if self.takes_prompts:
            return self._with(network, scheduler)
        return OneStepPipeline(network, scheduler, self.id2label)

    def _with(self, network: nn.Module, scheduler: SchedulerMixin) -> DiffusionPipeline:
        from .pipelines import pipeline_text_to_image

        cls = getattr(pipeline_text_to_image, self.family.student)
        return cls.of(self.pipeline, scheduler=scheduler, **self.family.replaced(self, network))


def prediction_type_of(scheduler: Any, schedule: NoiseSchedule) -> str:
    """What a network returns, in our words, from the config of the scheduler it was trained with."""
    prediction_type = scheduler.config.get("prediction_type", "flow_prediction")
    if isinstance(schedule, FlowSchedule):
        return "flow_prediction"
    if isinstance(schedule, EDMSchedule):
        # diffusers' schedulers say epsilon, our students' the truth
        if prediction_type not in ("epsilon", schedule.prediction_type):
            raise ValueError(f"`prediction_type` of an EDM scheduler must be 'epsilon', but is {prediction_type!r}.")
        return schedule.prediction_type
    return prediction_type
