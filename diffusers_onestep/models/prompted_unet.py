"""A text-conditioned U-Net with its text encoder."""

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel


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
