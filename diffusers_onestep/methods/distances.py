"""Distances between batches of images, as losses: perceptual networks behind one protocol, and plain ones."""

from collections.abc import Callable
from urllib.error import URLError

import torch
import torch.nn.functional as F
from torch import nn

# two batches `(B, C, H, W)` of images in [-1, 1] to the mean distance, a scalar
Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def image_distance(name: str, argument: str = "distance") -> Distance:
    """A distance between batches of images in [-1, 1], one number for the batch.

    Args:
        name (`str`): `"lpips"` (VGG-16, inputs resized to 224 pixels if smaller; Zhang et al. 2018), `"stlpips"`
            (shift-tolerant LPIPS on AlexNet, whose weights the package `stlpips-pytorch` carries), `"lpips-average"`
            (LPIPS with average for max pooling, as PID was published), `"l1"`, `"l2"`
            (means over pixels) or `"pseudo-huber"` (`sqrt(square + c**2) - c`, `c = 0.00054 * sqrt(CHW)`; Song &
            Dhariwal 2023, Eq. 7, per pixel).
        argument (`str`, *optional*): what errors call it.

    Raises:
        RuntimeError: if a network's weights are neither here nor to be had.
    """
    if name not in DISTANCES:
        raise ValueError(f"`{argument}` must be one of {sorted(DISTANCES)}, but is {name!r}.")
    try:
        return DISTANCES[name]()
    except (URLError, OSError, ImportError) as error:
        needs = "lpips and torchvision's VGG-16 weights, which are not in its cache and could not be downloaded"
        if name == "stlpips":
            needs = "`pip install 'diffusers-onestep[stlpips]'`"
        raise RuntimeError(
            f"`{argument}` {name!r} needs {needs} ({error}). Without a network use --{argument} l2 or pseudo-huber."
        ) from error


class Decoded:
    """A distance between the images that latents stand for.

    Args:
        name (`str`): see `image_distance`.
        decode (callable): latents to images in [-1, 1], with a graph.
        argument (`str`, *optional*): what errors call it.
    """

    def __init__(self, name: str, decode: Callable[[torch.Tensor], torch.Tensor], argument: str = "distance"):
        self.decode, self.distance = decode, image_distance(name, argument)

    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.distance(self.decode(a), self.decode(b))


class Perceptual:
    """A perceptual network as a distance.

    Args:
        network (`nn.Module`): `(a, b) -> (B, ...)` on RGB images in [-1, 1].
        size (`int`): smaller images are resized to it, bilinearly.
    """

    def __init__(self, network: nn.Module, size: int):
        self.network, self.size = network.requires_grad_(False).eval(), size

    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        # of an epsilon teacher, what it predicts for a young student's points may lie far outside [-1, 1]
        if (size := b.detach().abs().mean().item()) > 16:
            raise ValueError(
                f"`b` must be images in [-1, 1] for a perceptual distance, but is {size:.3g} in the mean."
            )
        return self.network.to(a.device)(*(self._rgb(images) for images in (a, b))).mean()

    def _rgb(self, images: torch.Tensor) -> torch.Tensor:
        if images.shape[1] not in (1, 3):
            raise ValueError(
                f"`a` and `b` must have 1 or 3 channels, but have {images.shape[1]}: these are no pixels."
            )
        images = images.expand(-1, 3, -1, -1)
        if min(images.shape[-2:]) >= self.size:
            return images
        return F.interpolate(images, size=(self.size, self.size), mode="bilinear")


def _lpips() -> Distance:
    import lpips

    return Perceptual(lpips.LPIPS(net="vgg", verbose=False), 224)


def _lpips_average() -> Distance:
    distance = _lpips()
    average_pooling(distance.network)
    return distance


def average_pooling(network: nn.Module) -> None:
    """Put average pooling of the same windows in the place of a network's max pooling."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.MaxPool2d):
                setattr(module, name, nn.AvgPool2d(child.kernel_size, child.stride, child.padding))


def _stlpips() -> Distance:
    from stlpips_pytorch.stlpips import LPIPS

    return Perceptual(LPIPS(net="alex", variant="shift_tolerant"), 64)


def _pseudo_huber(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    c = 0.00054 * a[0].numel() ** 0.5
    square = ((a - b) ** 2).flatten(1).sum(1)
    return ((square + c**2).sqrt() - c).mean() / a[0].numel() ** 0.5


PERCEPTUAL = ("lpips", "lpips-average", "stlpips")  # they take images, not latents
DISTANCES: dict[str, Callable[[], Distance]] = {
    "lpips": _lpips,
    "lpips-average": _lpips_average,
    "stlpips": _stlpips,
    "l1": lambda: F.l1_loss,
    "l2": lambda: F.mse_loss,
    "pseudo-huber": lambda: _pseudo_huber,
}
