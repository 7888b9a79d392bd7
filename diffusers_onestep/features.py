"""Feature networks that ship with the package, and the statistics of their reference images."""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from .repository import ASSETS


class FashionCNN(nn.Module):
    """The Fashion-MNIST classifier behind `FD-fashion`: uint8 grey `(N, 1, 32, 32)` to 128 features and 10 logits."""

    name = "FD-fashion"
    input_shape = (1, 32, 32)

    def __init__(self):
        super().__init__()
        channels, strides = (1, 16, 32, 48, 64, 128), (2, 1, 2, 1, 2)
        self.body = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
                for a, b, stride in zip(channels, channels[1:], strides, strict=False)
            )
        )
        self.fc = nn.Linear(128, 10)

    @classmethod
    def from_shipped(cls) -> "FashionCNN":
        """The shipped weights, frozen."""
        network = cls()
        state = load_file(ASSETS / "fashion_cnn" / "model.safetensors")
        counters = {k: v for k, v in network.state_dict().items() if k.endswith("num_batches_tracked")}
        network.load_state_dict(counters | state)
        return network.requires_grad_(False).eval()

    def digest(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of the weights, by name."""
        sha = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            sha.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        return sha.hexdigest()[:16]

    @torch.no_grad()
    def forward(self, pixels: torch.Tensor, batch_size: int = 500) -> tuple[torch.Tensor, torch.Tensor]:
        """Features `(N, 128)` and logits `(N, 10)` of uint8 `pixels` `(N, 1, 32, 32)`."""
        if pixels.dtype != torch.uint8 or tuple(pixels.shape[1:]) != self.input_shape:
            raise ValueError(f"`pixels` must be uint8 (N, 1, 32, 32), but are {pixels.dtype} {tuple(pixels.shape)}.")
        parts = [self.body(part.float() / 127.5 - 1).mean((2, 3)) for part in pixels.split(batch_size)]
        features = torch.cat(parts)
        return features, self.fc(features)


def reference_moments(path: str | Path = ASSETS / "fashion_cnn" / "fashion_test.safetensors"):
    """Mean and covariance of the reference images' features; by default the 10,000 Fashion-MNIST test images."""
    statistics = load_file(path)
    return statistics["mean"], statistics["covariance"]
