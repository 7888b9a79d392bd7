"""The kinds of text-to-image pipelines: how each encodes prompts and images, and what else its network is told.

A family's `embed` gives what depends on the prompt alone, and can be kept on disk; `extra` what depends on the size of
the image. Both together are the `cond` of the network.
"""

import copy
import inspect
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, __version__
from torch import nn

from .denoiser import Cond


class Family:
    """What stock pipelines of one kind have in common, Stable Diffusion 1.x and 2.x by default.

    Attributes:
        stock (`str`): their class in diffusers.
        network (`str`): the component that is distilled.
    """

    stock = "StableDiffusionPipeline"
    network = "unet"
    patch = 1  # latents on a side of what the network takes as one

    @property
    def student(self) -> str:
        """The pipeline class of its students."""
        return f"OneStep{self.stock}"

    def embed(self, pipeline: DiffusionPipeline, prompts: list[str]) -> Cond:
        """What the text encoders make of prompts, one row each."""
        embeddings, _ = pipeline.encode_prompt(prompts, self.device(pipeline), 1, False)
        return {"encoder_hidden_states": embeddings}

    def null(self, pipeline: DiffusionPipeline) -> Cond:
        """The same of no prompt, as the stock pipeline's guidance has it by default; one row."""
        return self.embed(pipeline, [""])

    def extra(self, teacher: Any, batch_size: int) -> Cond:
        """What the network is told besides the prompt."""
        return {}

    def device(self, pipeline: DiffusionPipeline) -> torch.device:
        """Where the text encoders are."""
        return pipeline.text_encoder.device

    def latent_channels(self, network: Any) -> int:
        """Channels of model space."""
        return network.config.in_channels

    def default_size(self, pipeline: DiffusionPipeline) -> tuple[int, int]:
        """Height and width in pixels, where none are asked for."""
        size = getattr(pipeline, self.network).config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * pipeline.vae_scale_factor, width * pipeline.vae_scale_factor

    def size(self, pipeline: DiffusionPipeline, resolution: int | tuple[int, int] | None) -> tuple[int, int]:
        """Height and width in pixels at `resolution`, by default those of the network's config."""
        size = (resolution, resolution) if isinstance(resolution, int) else resolution
        height, width = size or self.default_size(pipeline)
        patch = max(self.patch, getattr(pipeline, self.network).config.get("patch_size") or 1)
        least = pipeline.vae_scale_factor * patch
        if height < least or width < least or height % least or width % least:
            raise ValueError(f"`resolution` must be a multiple of {least}, but is {resolution}.")
        return height, width

    def replaced(self, teacher: Any, network: nn.Module) -> dict[str, Any]:
        """What a student's pipeline has instead of the teacher's: its network, with the trained size in its config."""
        height, width = teacher.sample_shape[1:]
        if height != width or height == network.config.sample_size:  # stock pipelines default to squares
            return {self.network: network}
        settings = self.size_settings(network, height)
        network = copy.copy(network)  # the same weights with a config of its own
        # stock Stable Diffusion takes a size below 64 for a mistake in configs of old versions
        network.register_to_config(sample_size=height, _diffusers_version=__version__, **settings)
        return {self.network: network}

    def size_settings(self, network: nn.Module, size: int) -> dict[str, Any]:
        """What else is to change in the config when its `sample_size` does, for the network to stay the same."""
        return {}

    def guidance(self, teacher: Any, guidance_scale: float) -> dict[str, Any]:
        """Arguments of the teacher's stock call for classifier-free guidance."""
        return {"guidance_scale": guidance_scale}

    def start(self, pipeline: DiffusionPipeline, latents: torch.Tensor) -> dict[str, Any]:
        """Arguments of a stock call to start at `latents` `(B, C, H, W)`."""
        height, width = (side * pipeline.vae_scale_factor for side in latents.shape[-2:])
        return {"latents": latents, "height": height, "width": width}


class StableDiffusionXL(Family):
    stock = "StableDiffusionXLPipeline"

    def embed(self, pipeline, prompts):
        embeddings, _, pooled, _ = pipeline.encode_prompt(
            prompts, device=self.device(pipeline), do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": embeddings, "text_embeds": pooled}

    def null(self, pipeline):
        # zeros if the pipeline says `force_zeros_for_empty_prompt`, which is what its guidance was trained on
        _, embeddings, _, pooled = pipeline.encode_prompt([""], device=self.device(pipeline))
        return {"encoder_hidden_states": embeddings, "text_embeds": pooled}

    def extra(self, teacher, batch_size):
        # original size, crop and target size: an uncropped image of the size that is trained
        size = teacher.resolution
        return {"time_ids": torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32).repeat(batch_size, 1)}

    def device(self, pipeline):
        return pipeline.text_encoder_2.device


class StableDiffusion3(Family):
    stock = "StableDiffusion3Pipeline"
    network = "transformer"

    def embed(self, pipeline, prompts):
        embeddings, _, pooled, _ = pipeline.encode_prompt(
            prompts, None, None, device=self.device(pipeline), do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}


class Flux(Family):
    """FLUX.1; `extra` feeds the guidance embedding of its guidance-distilled networks."""

    stock = "FluxPipeline"
    network = "transformer"
    patch = 2

    def embed(self, pipeline, prompts):
        embeddings, pooled, _ = pipeline.encode_prompt(prompts, None, device=self.device(pipeline))
        return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}

    def extra(self, teacher, batch_size):
        if not teacher.denoiser.network.config.guidance_embeds:
            return {}
        return {"guidance": torch.full((batch_size,), teacher.embedded_guidance)}

    def latent_channels(self, network):
        return network.config.in_channels // 4

    def default_size(self, pipeline):
        size = pipeline.default_sample_size * pipeline.vae_scale_factor
        return size, size

    def replaced(self, teacher, network):
        height, width = teacher.sample_shape[1:]
        given = {self.network: network}
        if height == width:
            given["default_sample_size"] = height
        if network.config.guidance_embeds:
            given["embedded_guidance"] = teacher.embedded_guidance
        return given

    def guidance(self, teacher, guidance_scale):
        given = {"guidance_scale": teacher.embedded_guidance}
        return given if guidance_scale == 1.0 else given | {"true_cfg_scale": guidance_scale, "negative_prompt": ""}

    def start(self, pipeline, latents):
        return super().start(pipeline, latents) | {"latents": pipeline._pack_latents(latents, *latents.shape)}


class PixArt(Family):
    stock = "PixArtAlphaPipeline"
    network = "transformer"
    patches = "pos_embed"  # the network's layer that knows positions
    encoding: tuple[str, ...] = ("clean_caption",)  # arguments of the stock call that are about prompts

    def embed(self, pipeline, prompts):
        embeddings, mask, _, _ = pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=self.device(pipeline), **self.settings(pipeline)
        )
        return {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask}

    def null(self, pipeline):
        _, _, embeddings, mask = pipeline.encode_prompt([""], device=self.device(pipeline), **self.settings(pipeline))
        return {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask}

    def settings(self, pipeline) -> dict[str, Any]:
        """Arguments of `encode_prompt` besides the prompt, as the stock call has them by default."""
        parameters = inspect.signature(pipeline.__call__).parameters
        return {name: parameters[name].default for name in self.encoding}

    def extra(self, teacher, batch_size):
        if not teacher.denoiser.network.use_additional_conditions:
            return {}
        height, width = teacher.resolution
        return {
            "resolution": torch.tensor([[height, width]], dtype=torch.float32).repeat(batch_size, 1),
            "aspect_ratio": torch.tensor([[height / width]]).repeat(batch_size, 1),
        }

    def size_settings(self, network, size):
        given, layer = {}, getattr(network, self.patches)
        if layer.pos_embed is not None:  # positions are in units of `sample_size / interpolation_scale`
            given["interpolation_scale"] = layer.interpolation_scale * (size // layer.patch_size) / layer.base_size
        if hasattr(network, "use_additional_conditions"):  # by default told from `sample_size`
            given["use_additional_conditions"] = network.use_additional_conditions
        return given

    def start(self, pipeline, latents):
        return super().start(pipeline, latents) | {"use_resolution_binning": False}


class PixArtSigma(PixArt):
    stock = "PixArtSigmaPipeline"


class Sana(PixArt):
    stock = "SanaPipeline"
    patches = "patch_embed"
    # the instruction is put before every prompt but the negative one
    encoding = ("clean_caption", "complex_human_instruction")

    def extra(self, teacher, batch_size):
        return {}


FAMILIES = (Family(), StableDiffusionXL(), StableDiffusion3(), Flux(), PixArt(), PixArtSigma(), Sana())


def decode_sparingly(vae: AutoencoderKL, height: int, width: int) -> None:
    """Images above 256 x 256 one at a time: a decoder's memory grows with the pixels."""
    if height * width > 256**2:
        vae.enable_slicing()


def family_of(pipeline: DiffusionPipeline) -> Family | None:
    """The family that a pipeline is of, or whose student it is; None if it takes no prompts."""
    names = {cls.__name__ for cls in type(pipeline).__mro__}
    return next((family for family in FAMILIES if family.stock in names), None)
