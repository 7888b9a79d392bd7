"""The front door for students, and the pipeline of pixel students."""

import inspect
import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import DDPMParallelScheduler, DDPMScheduler, DiffusionPipeline, LCMScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from ..conditions import Labels, label_embeddings, label_ids, named_labels
from ..network_calls import sample_shape_of
from ..repository import load_index, resolve_model, safetensors_only
from ..schedulers import OneStepScheduler

PIXEL_PIPELINES = ("OneStepPipeline", "ConsistencyModelPipeline", "DDPMPipeline", "DDIMPipeline")

LEARNED_VARIANCE = (DDPMScheduler, DDPMParallelScheduler)  # which take a network's channels of it
LCM_STEPS = 50  # `original_inference_steps` of a stock LCMScheduler, which any number of steps may be taken with


class OneStepPipeline(DiffusionPipeline):
    r"""
    Images from a one-step (or few-step) student in as many network calls as it was trained for.

    `OneStepPipeline.from_pretrained` is the door to every kind of student; this class itself samples pixel students,
    unconditional or by class label. It is saved under the name of the stock pipeline that samples it too
    ([`ConsistencyModelPipeline`]).

    Parameters:
        unet (`ModelMixin`): The student, a [`UNet2DModel`] or one with the same call.
        scheduler ([`SchedulerMixin`]): A [`OneStepScheduler`], or the stock [`LCMScheduler`] that states the same
            rule.
        id2label (`dict[int, str]`, *optional*): Names of the class labels; by default those of the network's config.

    Example:

    ```python
    >>> from diffusers_onestep import OneStepPipeline
    >>> pipe = OneStepPipeline.from_pretrained("fashion32-onestep")
    >>> image = pipe(class_labels="Sandal").images[0]
    ```
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents"]

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin, id2label: dict[int, str] | None = None):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        if id2label:
            self.register_to_config(id2label=dict(id2label))
        self.id2label = named_labels(id2label, unet)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """
        Load a student.

        Args:
            pretrained_model_name_or_path (`str`): A Hub id, a folder, or the name of a shipped student.
            kwargs: As in [`DiffusionPipeline.from_pretrained`] (`revision`, `token`, `local_files_only`, ...). Weights
                must be safetensors, and code in a repository does not run unless `trust_remote_code=True`.

        Raises:
            ValueError: if the repository names a pipeline that is no student of a kind this class samples, or does
                not exist, or may not be read.
            ConnectionError: if it is not in the cache and the Hub fails, or cannot be reached.
            OSError: if it has no safetensors weights.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError("`use_safetensors` must be True, but is False: other weights are pickles.")
        kwargs["use_safetensors"] = True
        if "torch_dtype" not in kwargs:  # without one, transformers takes that of the file, diffusers this one
            kwargs.setdefault("dtype", torch.float32)
        path = resolve_model(pretrained_model_name_or_path)
        if "dduf_file" not in kwargs:  # an archive has no index outside
            hub = ("cache_dir", "force_download", "token", "local_files_only", "revision")
            name = load_index(path, **{k: kwargs[k] for k in hub if k in kwargs}).get("_class_name")
            if name not in PIXEL_PIPELINES:
                from .pipeline_text_to_image import TEXT_TO_IMAGE_PIPELINES

                if name not in TEXT_TO_IMAGE_PIPELINES:
                    raise ValueError(
                        "`pretrained_model_name_or_path` must name a pipeline of "
                        f"{(*PIXEL_PIPELINES, *TEXT_TO_IMAGE_PIPELINES)}, but {path!r} names {name!r}."
                    )
                with safetensors_only(path, kwargs.get("revision")):
                    return TEXT_TO_IMAGE_PIPELINES[name].from_pretrained(path, **kwargs)
        with safetensors_only(path, kwargs.get("revision")):
            return super().from_pretrained(path, **kwargs)

    def to_json_string(self) -> str:
        # the stock pipeline samples the same student, so that is what the index names; but not transformers
        index = json.loads(super().to_json_string())
        if "Transformer" not in type(self.unet).__name__:
            index["_class_name"] = "ConsistencyModelPipeline"
        return json.dumps(index, indent=2) + "\n"

    @property
    def student_steps(self) -> int | None:
        """How many steps the student was trained for; None if its scheduler allows any number."""
        if isinstance(self.scheduler, OneStepScheduler):
            return len(self.scheduler.config.student_timesteps or []) or None
        if isinstance(self.scheduler, LCMScheduler):
            steps = self.scheduler.config.original_inference_steps
            return None if steps == LCM_STEPS else steps
        return None

    @property
    def num_timesteps(self) -> int:
        """How many steps the present call takes, for callbacks."""
        return len(self.scheduler.timesteps)

    @property
    def num_labels(self) -> int | None:
        """How many labels can be asked for; None for an unconditional student."""
        embeddings = label_embeddings(self.unet)
        return len(self.id2label) if embeddings and self.id2label else embeddings

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """`(C, H, W)` of the images."""
        return sample_shape_of(self.unet)

    def check_inputs(
        self,
        num_images: int,
        num_inference_steps: int | None,
        guidance_scale: float,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> None:
        if self.student_steps is not None and num_inference_steps not in (None, self.student_steps):
            raise ValueError(
                f"`num_inference_steps` must be {self.student_steps}, the number that this student was trained for, "
                f"but is {num_inference_steps}."
            )
        if (
            num_inference_steps is None
            and self.student_steps is None
            and not isinstance(self.scheduler, (OneStepScheduler, LCMScheduler))
        ):
            fitted = getattr(self.scheduler, "fitted_steps", None)
            raise ValueError(
                f"`num_inference_steps` must be given for a model with a {type(self.scheduler).__name__}, which is no "
                f"one-step student{f', and be one of the fitted numbers {fitted}' if fitted else ''}, but is None."
            )
        if num_inference_steps is not None and num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` must be at least 1, but is {num_inference_steps}.")
        if guidance_scale not in (0.0, 1.0):
            raise ValueError(
                "`guidance_scale` must be 1.0 (off) on this student, which has no guidance at sampling time, "
                f"but is {guidance_scale}."
            )
        if isinstance(generator, list) and len(generator) != num_images:
            raise ValueError(
                f"`generator` must be one generator or a list of {num_images}, one per image, "
                f"but has {len(generator)}."
            )
        shape = (num_images, *self.sample_shape)
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"`latents` must have shape {shape}, but have {tuple(latents.shape)}.")
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be of {self._callback_tensor_inputs}, but has {unknown}."
            )

    def prepare_labels(self, class_labels: Labels | None, batch_size: int, generator: Any) -> torch.Tensor | None:
        """`(batch_size,)` label ids: those asked for, or drawn uniformly; None for an unconditional student."""
        if self.num_labels is None:
            if class_labels is not None:
                raise ValueError(f"`class_labels` must be None for an unconditional student, but is {class_labels!r}.")
            return None
        if class_labels is None:
            if isinstance(generator, list):  # one per image, as in EDM's and SiD's scripts
                draws = [torch.randint(self.num_labels, (), generator=g, device=g.device) for g in generator]
                return torch.stack(draws[:batch_size])
            device = None if generator is None else generator.device
            return torch.randint(self.num_labels, (batch_size,), generator=generator, device=device)
        ids = label_ids(class_labels, self.num_labels, self.id2label)
        if len(ids) not in (1, batch_size):
            raise ValueError(
                f"`class_labels` must be one label or as many as `batch_size` ({batch_size}), but are {len(ids)}."
            )
        return ids.expand(batch_size)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: Labels | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (diffusers' signature)
    ) -> ImagePipelineOutput | tuple:
        r"""
        Args:
            batch_size (`int`, *optional*): Number of labels; by default as many as are given.
            class_labels (`int`, `str`, list of them or `torch.Tensor`, *optional*): Labels by id or name; drawn
                uniformly if not given.
            num_images_per_prompt (`int`, *optional*, defaults to 1): Images per label.
            num_inference_steps (`int`, *optional*): The student's own number, which is the default.
            guidance_scale (`float`, *optional*, defaults to 1.0): Must be off: the student has baked in its guidance.
            generator (`torch.Generator` or list of them, *optional*): For deterministic images.
            latents (`torch.Tensor`, *optional*): Unit-variance noise to start from, `(B, C, H, W)`.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an [`ImagePipelineOutput`].
            callback_on_step_end (`Callable`, *optional*): Called as `(pipeline, step, timestep, kwargs)` after each
                step.
            callback_on_step_end_tensor_inputs (`list`, *optional*): Tensors handed to it.

        Returns:
            [`ImagePipelineOutput`] or `tuple` of the images.

        Raises:
            ValueError: on arguments that the student cannot serve, naming what is allowed.
        """
        # 1. Check inputs
        if num_images_per_prompt < 1:
            raise ValueError(f"`num_images_per_prompt` must be at least 1, but is {num_images_per_prompt}.")
        if batch_size is None:
            if class_labels is not None and np.ndim(class_labels):
                batch_size = len(class_labels)
            else:
                batch_size = 1 if latents is None else len(latents) // num_images_per_prompt
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, but is {batch_size}.")
        num_images = batch_size * num_images_per_prompt
        self.check_inputs(
            num_images, num_inference_steps, guidance_scale, generator, latents, callback_on_step_end_tensor_inputs
        )
        if self.sample_shape[0] not in (1, 3) and output_type != "latent":
            raise ValueError(
                f"`output_type` must be 'latent' for a student of {self.sample_shape[0]} channels, whose samples are "
                f"no pixels, but is {output_type!r}."
            )
        device = self._execution_device

        # 2. Prepare timesteps
        self.scheduler.set_timesteps(num_inference_steps or self.student_steps or 1, device=device)

        # 3. Prepare latents
        if latents is None:
            shape = (num_images, *self.sample_shape)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        latents = latents.to(device, self.unet.dtype) * self.scheduler.init_noise_sigma

        # 4. Prepare labels, after the latents: these are the stock pipeline's whatever the labels
        labels = self.prepare_labels(class_labels, batch_size, generator)
        cond = {}
        if labels is not None:
            cond["class_labels"] = labels.to(device).repeat_interleave(num_images_per_prompt)

        # 5. One student call per timestep
        noisy = "generator" in inspect.signature(self.scheduler.step).parameters
        step_kwargs = {"generator": generator} if noisy else {}
        with self.progress_bar(total=len(self.scheduler.timesteps)) as progress_bar:
            for i, t in enumerate(self.scheduler.timesteps):
                model_input = self.scheduler.scale_model_input(latents, t)
                model_output = self.unet(model_input, t.expand(num_images), **cond, return_dict=False)[0]
                if not isinstance(self.scheduler, LEARNED_VARIANCE):
                    model_output = model_output[:, : latents.shape[1]]
                latents = self.scheduler.step(model_output, t, latents, **step_kwargs, return_dict=False)[0]
                if callback_on_step_end is not None:
                    tensors = dict.fromkeys(callback_on_step_end_tensor_inputs, latents)
                    latents = callback_on_step_end(self, i, t, tensors).get("latents", latents)
                progress_bar.update()

        # 6. Decode
        images = latents if output_type == "latent" else self.image_processor.postprocess(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
