"""Pipelines of text-to-image students: the stock ones, told how often the student's network is to be called."""

import functools
import inspect
import json
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    FluxPipeline,
    LCMScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    SanaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

from ..schedulers import DODESchedulerMixin, OneStepScheduler
from .pipeline_one_step import OneStepPipeline


class OneStepTextToImageMixin:
    r"""
    What all text-to-image students share, in front of their stock pipeline.

    The number of steps defaults to that of the student and guidance to off, since the student has it baked in; another
    number of steps, timesteps of one's own, guidance and negative prompts are refused. All else is the stock pipeline:
    LoRA, IP-Adapter, offloading, compilation, quantisation, another VAE, and
    `StableDiffusionImg2ImgPipeline.from_pipe(pipe)` for a student of several steps. Saved under the stock pipeline's
    name.
    """

    _stock: type[DiffusionPipeline]
    _guidance_argument = "guidance_scale"  # of classifier-free guidance
    _scales_noise = True  # does the stock pipeline multiply the noise by the scheduler's `init_noise_sigma`?
    # sides of latents that the stock pipeline has a table of sizes for, to one of which it takes a call's
    _binned_sizes: tuple[int, ...] = ()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls._stock = next(base for base in cls.__mro__ if base.__module__.startswith("diffusers."))
        cls.__call__ = _student_call(cls._stock.__call__)

    @classmethod
    def of(cls, pipeline: DiffusionPipeline, **replaced: Any) -> DiffusionPipeline:
        """This pipeline with the parts and settings of another of its kind, but for those that are `replaced`."""
        names = inspect.signature(cls.__init__).parameters.keys() - {"self"}
        given = pipeline.components | replaced
        own = cls(**{k: given[k] if k in given else pipeline.config[k] for k in names if k in given | pipeline.config})
        own.check_start()
        return own

    def check_start(self) -> None:
        """Raise a `ValueError` for a start that this pipeline can not make."""
        scale = getattr(self.scheduler, "init_noise_sigma", 1.0)
        if isinstance(self.scheduler, OneStepScheduler) and not self._scales_noise and abs(scale - 1) > 1e-6:
            raise ValueError(
                f"`start_ratio` must be left out for a {self._stock.__name__}, which starts at noise of unit "
                f"variance, but the student starts at {scale:.4g} times that."
            )

    def to_json_string(self) -> str:
        # the stock pipeline samples the same student, so that is what the index names
        index = json.loads(super().to_json_string())
        index["_class_name"] = self._stock.__name__
        return json.dumps(index, indent=2) + "\n"

    student_steps = OneStepPipeline.student_steps

    def check_student_inputs(self, given: dict[str, Any]) -> None:
        """Fill in the student's own values in the arguments of a call, and refuse others."""
        if self._binned_sizes and self.transformer.config.sample_size not in self._binned_sizes:
            given.setdefault("use_resolution_binning", False)  # the stock call would raise
        if self.student_steps is None:
            self._check_several_steps(given)
            return
        steps, guidance = given.get("num_inference_steps"), given.get("guidance_scale")
        if steps not in (None, self.student_steps):
            raise ValueError(
                f"`num_inference_steps` must be {self.student_steps}, the number that this student was trained for, "
                f"but is {steps}."
            )
        given["num_inference_steps"] = self.student_steps
        for name in ("timesteps", "sigmas"):
            if given.get(name) is not None:
                raise ValueError(f"`{name}` must be None: the student's own are in its scheduler; but is given.")
        own = self.own_guidance()
        if guidance not in (None, own, *((0, 1) if own == 1.0 else ())):
            raise ValueError(
                f"`guidance_scale` must be {own}, since the student has its guidance baked in, but is {guidance}."
            )
        given["guidance_scale"] = own
        if given.get("true_cfg_scale", 1.0) > 1.0:
            raise ValueError(f"`true_cfg_scale` must be 1.0 (off) on a student, but is {given['true_cfg_scale']}.")
        for name in [name for name in given if name.startswith("negative_prompt")]:
            value = given[name]
            if value is not None and (isinstance(value, torch.Tensor) or any(value)):
                raise ValueError(f"`{name}` must be None on a student, which has no guidance to use it with.")

    def own_guidance(self) -> float:
        """The guidance scale that the student is sampled with."""
        return 1.0

    def _check_several_steps(self, given: dict[str, Any]) -> None:
        """The same for a distilled solver or a model that takes any number of steps."""
        if isinstance(self.scheduler, DODESchedulerMixin):
            self._check_fitted(given)
        elif given.get("num_inference_steps") is None and isinstance(self.scheduler, LCMScheduler):
            given["num_inference_steps"] = 1
        elif given.get("num_inference_steps") is None:
            raise ValueError(
                f"`num_inference_steps` must be given for a model with a {type(self.scheduler).__name__}, which is no "
                "one-step student, but is None."
            )
        if given.get("guidance_scale") is None:
            given.pop("guidance_scale", None)  # the stock default

    def _check_fitted(self, given: dict[str, Any]) -> dict[str, Any]:
        """Fill in what the solver was fitted to; returns the table of the steps that are asked for."""
        fitted, steps = self.scheduler.fitted_steps, given.get("num_inference_steps")
        if steps is None and len(fitted) != 1:
            raise ValueError(f"`num_inference_steps` must be one of the fitted numbers {fitted}, but is None.")
        given["num_inference_steps"] = fitted[0] if steps is None else steps
        table = (self.scheduler.config.dode_tables or {}).get(str(given["num_inference_steps"]), {})
        name, own = self._guidance_argument, table.get("guidance_scale")
        if own is not None and given.get(name) not in (None, own):
            raise ValueError(f"`{name}` must be {own}, which the solver was fitted to, but is {given[name]}.")
        if own is not None:
            given[name] = own
        return table


def _student_call(stock_call: Callable) -> Callable:
    signature = inspect.signature(stock_call)
    own = ("num_inference_steps", "guidance_scale")

    @functools.wraps(stock_call)
    def __call__(self, *args, **kwargs):
        call = signature.bind(self, *args, **kwargs)
        self.check_student_inputs(call.arguments)
        if not isinstance(self.scheduler, OneStepScheduler):
            return stock_call(*call.args, **call.kwargs)
        # the stock calls of flow models hand no generator to the scheduler
        self.scheduler.generator = call.arguments.get("generator")
        try:
            return stock_call(*call.args, **call.kwargs)
        finally:
            self.scheduler.generator = None

    parameters = [p.replace(default=None) if p.name in own else p for p in signature.parameters.values()]
    __call__.__signature__ = signature.replace(parameters=parameters)
    return __call__


class OneStepStableDiffusionPipeline(OneStepTextToImageMixin, StableDiffusionPipeline):
    """Students of Stable Diffusion 1.x and 2.x."""


class OneStepStableDiffusionXLPipeline(OneStepTextToImageMixin, StableDiffusionXLPipeline):
    """Students of Stable Diffusion XL."""


class OneStepStableDiffusion3Pipeline(OneStepTextToImageMixin, StableDiffusion3Pipeline):
    """Students of Stable Diffusion 3 and 3.5."""

    _scales_noise = False


class OneStepPixArtAlphaPipeline(OneStepTextToImageMixin, PixArtAlphaPipeline):
    """Students of PixArt-alpha."""

    _binned_sizes = (32, 64, 128)


class OneStepPixArtSigmaPipeline(OneStepTextToImageMixin, PixArtSigmaPipeline):
    """Students of PixArt-sigma."""

    _binned_sizes = (32, 64, 128, 256)


class OneStepSanaPipeline(OneStepTextToImageMixin, SanaPipeline):
    """Students of SANA."""

    _binned_sizes = (16, 32, 64, 128)
    _scales_noise = False

    def check_student_inputs(self, given):
        super().check_student_inputs(given)
        for side in ("height", "width"):  # the stock default is 1024, whatever the network
            given.setdefault(side, self.transformer.config.sample_size * self.vae_scale_factor)


class OneStepFluxPipeline(OneStepTextToImageMixin, FluxPipeline):
    r"""
    Students of FLUX.1.

    Parameters:
        embedded_guidance (`float`, *optional*): What the network's guidance embedding was fed in training; the default
            and only allowed `guidance_scale` of a call.
        default_sample_size (`int`, *optional*, defaults to 128): Height and width of the latents that it was trained
            on, the default of a call.
    """

    _guidance_argument = "true_cfg_scale"
    _scales_noise = False

    def __init__(
        self,
        scheduler,
        vae,
        text_encoder,
        tokenizer,
        text_encoder_2,
        tokenizer_2,
        transformer,
        image_encoder=None,
        feature_extractor=None,
        embedded_guidance: float | None = None,
        default_sample_size: int = 128,
    ):
        super().__init__(
            scheduler,
            vae,
            text_encoder,
            tokenizer,
            text_encoder_2,
            tokenizer_2,
            transformer,
            image_encoder,
            feature_extractor,
        )
        self.register_to_config(embedded_guidance=embedded_guidance, default_sample_size=default_sample_size)
        self.default_sample_size = default_sample_size

    def own_guidance(self):
        return self.config.embedded_guidance or 1.0

    def _check_fitted(self, given):
        table = super()._check_fitted(given)
        if given.get("true_cfg_scale", 1.0) > 1.0 and given.get("negative_prompt") is None:
            given["negative_prompt"] = ""  # without one the stock call leaves guidance out
        if given.get("guidance_scale") is None and table.get("embedded_guidance") is not None:
            given["guidance_scale"] = table["embedded_guidance"]
        return table


TEXT_TO_IMAGE_PIPELINES = {cls._stock.__name__: cls for cls in OneStepTextToImageMixin.__subclasses__()}
