"""A U-Net that is fast on small images."""

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput


class SpaceToDepthUNet2DModel(UNet2DModel):
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
        ModelMixin.__init__(self)  # the layers are those of `self.unet`
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
