"""The GAN branch of score distillation: a head on the fake score's middle (DMD2, arXiv:2405.14867)."""

import torch
import torch.nn.functional as F
from torch import nn


def gan_losses(real_logits: torch.Tensor | None, fake_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Critic and student loss of the non-saturating GAN: `mean softplus(fake) + mean softplus(-real)` and
    `mean softplus(-fake)`. Without `real_logits` the first lacks its second term.

    Source: Yin et al. 2024 (DMD2), Sec. 4.3; at matched distributions they are 2 ln 2 and ln 2.
    """
    critic = F.softplus(fake_logits).mean()
    if real_logits is not None:
        critic = critic + F.softplus(-real_logits).mean()
    return critic, F.softplus(-fake_logits).mean()


class GANHead(nn.Module):
    """Bottleneck features `(B, C, h, w)` to one logit `(B, 1)`: stride-2 convolutions down to 4 x 4, then one of
    kernel 4 (Yin et al. 2024 (DMD2), App. F.1). Features are cast to float32 first. Sides that are no power of two end
    between 4 and 7, with more than one place; their logits are averaged."""

    def __init__(self, channels: int, size: int | tuple[int, int]):
        super().__init__()
        side = min(size) if isinstance(size, tuple) else size
        if side < 4:
            raise ValueError(f"`size` of the bottleneck must be at least 4, but is {size}.")
        # the paper's 32 groups; narrow networks get fewer, since a group of one value would be normalised to nothing
        groups = min(32, max(1, channels // 8))
        layers: list[nn.Module] = []
        while side >= 8:
            layers += [nn.Conv2d(channels, channels, 4, 2, 1), nn.GroupNorm(groups, channels), nn.SiLU()]
            side //= 2
        layers += [nn.Conv2d(channels, channels, 4), nn.GroupNorm(groups, channels), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 1))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.layers(features.float()).mean((2, 3))


class Bottleneck:
    """The features of a network's middle, as its last call left them: the output of a U-Net's middle block, or the
    image tokens after the middle block of a transformer, where they lie in the image.

    Args:
        network (`nn.Module`): a U-Net with a `mid_block`, or a transformer with `transformer_blocks`.
        aspect (`float`): height over width of the samples.
    """

    def __init__(self, network: nn.Module, aspect: float = 1.0):
        blocks = [*getattr(network, "transformer_blocks", []), *getattr(network, "single_transformer_blocks", [])]
        named = dict(network.named_modules())
        middle = next((m for name, m in named.items() if name.rpartition(".")[2] == "mid_block"), None)
        if middle is None and not blocks:
            raise ValueError(
                "`gan_weight` needs a U-Net with a `mid_block` or a transformer with `transformer_blocks`, but the "
                f"teacher is {type(network).__name__}."
            )
        self.aspect = aspect
        self.features: torch.Tensor | None = None
        (middle or blocks[(len(blocks) - 1) // 2]).register_forward_hook(self._keep)

    def _keep(self, module, inputs, output):
        # blocks of two streams return text and image, in this order
        self.features = output if isinstance(output, torch.Tensor) else output[-1]

    def take(self) -> torch.Tensor:
        """The features `(B, C, h, w)`, which are then let go."""
        features, self.features = self.features, None
        if features.ndim == 3:
            height = round((features.shape[1] * self.aspect) ** 0.5)
            features = features.transpose(1, 2).unflatten(2, (height, -1))
        return features
