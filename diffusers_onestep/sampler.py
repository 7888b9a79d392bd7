"""Any model, teacher or pipeline, as a function from the noises and conditions that all models share to pixels."""

import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, EDMEulerScheduler, SchedulerMixin

from .families import family_of
from .methods.base import sample_generators
from .network_calls import sample_shape_of
from .pictures import picture
from .teacher import Teacher

Sampler = Callable[[torch.Tensor, dict[str, Any], torch.Generator | None], torch.Tensor]


def sample_shape(
    pipeline: Teacher | DiffusionPipeline, resolution: int | tuple[int, int] | None = None
) -> tuple[int, int, int]:
    """`(C, H, W)` of the noises that a model starts from, a text-to-image pipeline at `resolution` pixels."""
    family = None if isinstance(pipeline, Teacher) else family_of(pipeline)
    if resolution is not None and family is None:
        raise ValueError(
            f"`resolution` must be None for a {type(pipeline).__name__}, whose size is its own, but is {resolution}."
        )
    if hasattr(pipeline, "sample_shape"):
        return tuple(pipeline.sample_shape)
    network = network_of(pipeline)
    if family is not None:
        height, width = (side // pipeline.vae_scale_factor for side in family.size(pipeline, resolution))
        return family.latent_channels(network), height, width
    return sample_shape_of(network)


def image_shape(
    pipeline: Teacher | DiffusionPipeline, resolution: int | tuple[int, int] | None = None
) -> tuple[int, int, int]:
    """`(C, H, W)` of a model's images, those of a text-to-image pipeline at `resolution` pixels."""
    if isinstance(pipeline, Teacher):
        return (3, *pipeline.resolution) if pipeline.takes_prompts else tuple(pipeline.sample_shape)
    family = family_of(pipeline)
    return (3, *family.size(pipeline, resolution)) if family else sample_shape(pipeline, resolution)


def batch_size_for(image_shape: tuple[int, int, int]) -> int:
    """How many images are sampled at a time unless somebody knows better: 250 small ones, 8 of 512 x 512."""
    return max(1, min(250, 8 * 512**2 // math.prod(image_shape[1:])))


def network_of(pipeline: Teacher | DiffusionPipeline) -> torch.nn.Module:
    """The network whose evaluations are counted."""
    if isinstance(pipeline, Teacher):
        return pipeline.denoiser.network
    return getattr(pipeline, "unet", None) or pipeline.transformer


def takes_prompts(pipeline: Teacher | DiffusionPipeline) -> bool:
    """Whether images are asked for by prompts."""
    if isinstance(pipeline, Teacher):
        return pipeline.takes_prompts
    return "prompt" in inspect.signature(type(pipeline).__call__).parameters


def spread(count: int, available: int) -> list[int]:
    """Which of the `available` labels or prompts `count` samples have: all in turn or, with fewer samples than those,
    some from beginning to end, since they are often sorted by what they show."""
    return [i * available // count if count < available else i % available for i in range(count)]


class Noises:
    """`torch.randn(num_samples, *shape)` of a seed, drawn as it is read: of all samples only a part is held, so read
    from beginning to end (30,000 noises of 1024 x 1024 pixels are 29 GiB).

    Args:
        shape (sequence of `int`): `(C, H, W)` of one.
        num_samples (`int`): how many.
        seed (`int`): of the CPU's generator.
    """

    PART = 64  # samples: whole sixteens of values, which `torch.randn` draws at a time, so parts make the same numbers

    def __init__(self, shape: Sequence[int], num_samples: int, seed: int):
        self.shape, self.seed = (num_samples, *shape), seed
        self.parts = max(1, num_samples // self.PART)  # the last is longer: fewer than 16 values are drawn otherwise
        self._number, self._part, self._generator = -1, torch.empty(0), torch.Generator()

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, places: slice | Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Noises `(B, C, H, W)` of some samples."""
        places = torch.arange(len(self))[places]
        numbers = (places // self.PART).clamp(max=self.parts - 1)
        noise = torch.empty(len(places), *self.shape[1:])
        for number in numbers.unique().tolist():
            here = numbers == number
            noise[here] = self._read(number)[places[here] - number * self.PART]
        return noise

    def _read(self, number: int) -> torch.Tensor:
        if number < self._number or self._number < 0:
            self._number, self._generator = -1, self._generator.manual_seed(self.seed)
        while self._number < number:
            self._number += 1
            last = self._number == self.parts - 1
            samples = len(self) - self._number * self.PART if last else self.PART
            self._part = torch.randn(samples, *self.shape[1:], generator=self._generator)
        return self._part


def shared_inputs(
    shape: Sequence[int], num_labels: int | None, num_samples: int, seed: int, prompts: Sequence[str] | None = None
) -> tuple[Noises, dict[str, Any]]:
    """The same unit-variance noises for every model, and labels or prompts (see `spread`): `(N, C, H, W)`, read by
    places, and a `cond`."""
    noise = Noises(shape, num_samples, seed)
    if prompts is not None:
        return noise, {"prompt": [prompts[i] for i in spread(num_samples, len(prompts))]}
    return noise, {} if num_labels is None else {"class_labels": torch.tensor(spread(num_samples, num_labels))}


def between_steps(seed: int, place: int) -> torch.Generator:
    """Of the noise between a few-step student's steps, in the batch whose first sample is `place`: other noise than
    it started from."""
    return sample_generators(seed, place, ["between steps"])[0]


def inputs_of(
    pipeline: Teacher | DiffusionPipeline,
    num_samples: int,
    seed: int,
    prompts: Sequence[str] | None,
    resolution: int | tuple[int, int] | None = None,
) -> tuple[Noises, dict[str, Any]]:
    """`shared_inputs` of one model."""
    if takes_prompts(pipeline) != (prompts is not None):
        wants = "prompts" if takes_prompts(pipeline) else "no prompts"
        raise ValueError(
            f"`prompts` must be {'given for a text-to-image model' if prompts is None else 'None for a pixel model'}: "
            f"this {type(pipeline).__name__} takes {wants}."
        )
    if prompts is None and not hasattr(pipeline, "num_labels"):
        raise ValueError(
            f"`pipeline` must be a `OneStepPipeline`, a `Teacher` or a text-to-image pipeline, but is a "
            f"{type(pipeline).__name__}: load it by `Teacher.from_pretrained`."
        )
    num_labels = None if prompts is not None else pipeline.num_labels
    return shared_inputs(sample_shape(pipeline, resolution), num_labels, num_samples, seed, prompts)


def part_of(cond: dict[str, Any], places: Sequence[int]) -> dict[str, Any]:
    """Conditions of some of the samples."""
    return {k: v[places] if isinstance(v, torch.Tensor) else [v[i] for i in places] for k, v in cond.items()}


_AS_TEACHERS = (DDPMScheduler, DDIMScheduler, EDMEulerScheduler)


def sampler(
    pipeline: Teacher | DiffusionPipeline,
    *,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    scheduler: SchedulerMixin | None = None,
) -> Sampler:
    """A model as a function from unit-variance noises, conditions and a generator to uint8 pixels `(B, C, H, W)`.

    A pixel model of many steps is sampled as a teacher is, whose noises and solver it shares: by DDIM where its
    scheduler is DDPM, by Heun's method where it is EDM's.
    """
    many_steps = getattr(pipeline, "student_steps", None) is None and not takes_prompts(pipeline)
    teacher = pipeline if isinstance(pipeline, Teacher) else None
    if teacher is None and many_steps and type(pipeline.scheduler) in _AS_TEACHERS:
        teacher = Teacher(pipeline, getattr(pipeline, "id2label", None))
    if teacher is not None and num_inference_steps is None:
        raise ValueError("`num_inference_steps` must be given for a model of many steps.")
    if teacher is not None and not teacher.takes_prompts:
        return _by_solver(teacher, num_inference_steps, 1.0 if guidance_scale is None else guidance_scale, scheduler)
    if scheduler is not None:
        raise ValueError("`scheduler` must be None for a student, which has its own, and for text-to-image models.")
    if teacher is None:
        return _by_pipeline(pipeline, num_inference_steps, {"guidance_scale": guidance_scale})
    guidance = teacher.family.guidance(teacher, 1.0 if guidance_scale is None else guidance_scale)
    return _by_pipeline(teacher.pipeline, num_inference_steps, guidance, teacher.reference_scheduler)


def _by_solver(
    teacher: Teacher, num_inference_steps: int, guidance_scale: float, scheduler: SchedulerMixin | None
) -> Sampler:
    """A pixel teacher, by its reference scheduler or another one."""
    how = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, "scheduler": scheduler}

    def run(noise, cond, generator):
        return picture(teacher.sample(noise, cond, **how))

    return run


def _by_pipeline(
    pipeline: DiffusionPipeline,
    num_inference_steps: int | None,
    guidance: dict[str, Any],
    scheduler: SchedulerMixin | None = None,
) -> Sampler:
    """A pipeline's own call, by its own scheduler or another one."""
    pipeline.set_progress_bar_config(disable=True)
    given = {k: v for k, v in {"num_inference_steps": num_inference_steps, **guidance}.items() if v is not None}
    prompted, family = takes_prompts(pipeline), family_of(pipeline)
    parts = {} if scheduler is None else {"scheduler": scheduler}
    if getattr(pipeline, "safety_checker", None) is not None:  # its black squares are no images to measure
        parts["safety_checker"] = None

    @torch.no_grad()
    def run(noise, cond, generator):
        device = pipeline.device
        cond = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in cond.items()}
        latents = noise.to(device, network_of(pipeline).dtype)
        output = "pt" if prompted else "latent"
        start = family.start(pipeline, latents) if family else {"latents": latents}
        with replaced(pipeline, **parts):
            images = pipeline(**start, generator=generator, output_type=output, **cond, **given).images
        return picture(2 * images - 1) if prompted else picture(images)

    return run


@contextmanager
def replaced(pipeline: DiffusionPipeline, **parts: Any):
    """A pipeline with other parts for a while."""
    before = {name: getattr(pipeline, name) for name in parts}
    for name, part in parts.items():
        setattr(pipeline, name, part)
    try:
        yield
    finally:
        for name, part in before.items():
            setattr(pipeline, name, part)


@contextmanager
def evaluations_of(network: torch.nn.Module):
    """Count the samples that `network` is evaluated on: guidance counts twice, whether batched or not."""
    seen = [0]

    def note(module, args, kwargs):
        sample = next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.ndim > 2)
        seen[0] += len(sample)

    handle = network.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
