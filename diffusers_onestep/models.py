"""Networks that diffusers does not have, and networks of random weights for students of other architectures."""

import copy
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn
from transformers import CLIPTextModel


class SpaceToDepthUNet2DModel(ModelMixin, ConfigMixin):
    r"""
    A [`UNet2DModel`] that works on space-to-depth pixels inside and is an ordinary pixel model outside: every
    `factor` x `factor` square of pixels becomes one position with `factor**2` times the channels, which makes small
    images fast on a CPU.

    Parameters:
        sample_size (`int`, *optional*, defaults to `32`): Height and width of the images.
        in_channels (`int`, *optional*, defaults to `1`): Channels of the noisy image.
        out_channels (`int`, *optional*, defaults to `1`): Channels of the prediction.
        factor (`int`, *optional*, defaults to `2`): Side of the squares; divides `sample_size`.
        block_out_channels (`tuple[int]`, *optional*, defaults to `(32, 64, 64)`): Channels of each level inside.
        attention_levels (`tuple[bool]`, *optional*, defaults to `(False, False, True)`): Which levels attend.
        layers_per_block (`int`, *optional*, defaults to `1`): Residual blocks per level.
        attention_head_dim (`int`, *optional*, defaults to `16`): Channels per attention head.
        norm_num_groups (`int`, *optional*, defaults to `8`): Groups of the group normalisation.
        dropout (`float`, *optional*, defaults to `0.0`): Dropout of the residual blocks.
        num_class_embeds (`int`, *optional*): Number of labels, a null label included.
        id2label (`dict[int, str]`, *optional*): Names of the labels, the null label left out.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 1,
        out_channels: int = 1,
        factor: int = 2,
        block_out_channels: tuple[int, ...] = (32, 64, 64),
        attention_levels: tuple[bool, ...] = (False, False, True),
        layers_per_block: int = 1,
        attention_head_dim: int = 16,
        norm_num_groups: int = 8,
        dropout: float = 0.0,
        num_class_embeds: int | None = None,
        id2label: dict[int, str] | None = None,
    ):
        super().__init__()
        if sample_size % factor:
            raise ValueError(f"`factor` must divide `sample_size` ({sample_size}), but is {factor}.")
        self.unet = UNet2DModel(
            sample_size=sample_size // factor,
            in_channels=in_channels * factor**2,
            out_channels=out_channels * factor**2,
            block_out_channels=tuple(block_out_channels),
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attention_levels),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention_levels)),
            layers_per_block=layers_per_block,
            attention_head_dim=attention_head_dim,
            norm_num_groups=norm_num_groups,
            dropout=dropout,
            num_class_embeds=num_class_embeds,
        )

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """Predict for `sample` `(B, C, H, W)` at `timestep` `(B,)` or a number, given `class_labels` `(B,)`."""
        squares = F.pixel_unshuffle(sample, self.config.factor)
        squares = self.unet(squares, timestep, class_labels=class_labels, return_dict=False)[0]
        sample = F.pixel_shuffle(squares, self.config.factor)
        return UNet2DOutput(sample=sample) if return_dict else (sample,)


class PromptedUNet(nn.Module):
    """A text-conditioned U-Net and its text encoder as one network, to be trained together.

    Args:
        unet (`UNet2DConditionModel`): the denoising network.
        text_encoder (`CLIPTextModel`): gives it `encoder_hidden_states`.
    """

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    @property
    def config(self):
        return self.unet.config

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """Predict for `sample` `(B, C, H, W)` at `timestep` `(B,)`, given the tokens `input_ids` `(B, L)`."""
        embeddings = self.text_encoder(input_ids).last_hidden_state
        return self.unet(sample, timestep, embeddings, return_dict=False)[0]


def network_from_config(config: dict[str, Any]) -> ModelMixin:
    """A diffusers model of random weights.

    Args:
        config (`dict`): as in a model's `config.json`; `_class_name` is a class of diffusers or of this package.

    Raises:
        ValueError: if there is no such model.
    """
    name = config.get("_class_name")
    cls = globals().get(str(name)) or getattr(diffusers, str(name), None)
    if not (isinstance(cls, type) and issubclass(cls, ModelMixin)):
        raise ValueError(f"`_class_name` of the student's config must be a model of diffusers, but is {name!r}.")
    return cls.from_config(config)


def shrunk(network: nn.Module, factor: float) -> ModelMixin:
    """A network of random weights like `network` whose widths are `factor` times as large, in whole norm groups.

    Args:
        network (`ModelMixin`): a U-Net with `block_out_channels`, or a transformer with `num_attention_heads`.
        factor (`float`): 0.5 gives about a quarter of the parameters.
    """
    if not 0 < factor <= 1:
        raise ValueError(f"`shrink` must lie between 0 and 1, but is {factor}.")
    config = copy.deepcopy(dict(getattr(network, "config", {})))
    if "block_out_channels" in config:
        group = config.get("norm_num_groups") or 1
        widths = [max(1, round(factor * width / group)) * group for width in config["block_out_channels"]]
        config["block_out_channels"] = widths
    elif "num_attention_heads" in config:
        heads = config["num_attention_heads"]
        config["num_attention_heads"] = max(1, round(factor * heads))
        # what has to be as wide as the transformer itself: SD3's captions, PixArt's and SANA's cross attention
        for key in ("caption_projection_dim", "cross_attention_dim"):
            if config.get(key) == heads * config["attention_head_dim"]:
                config[key] = config["num_attention_heads"] * config["attention_head_dim"]
    else:
        raise ValueError(
            "`shrink` needs a network with `block_out_channels` or `num_attention_heads`, but "
            f"{type(network).__name__} has neither: give a `student_config`."
        )
    return network_from_config(config | {"_class_name": type(network).__name__})
