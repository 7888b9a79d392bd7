"""EDM's augmentation that does not leak: geometric changes of an image, and the labels that tell a network of them."""

import math

import torch
import torch.nn.functional as F

from .methods.base import Generators, normal, uniform

AUGMENT_DIM = 9


def augment(
    images: torch.Tensor, probability: float, generator: Generators = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images `(B, C, H, W)` after random geometric changes, and their labels `(B, 9)`.

    x-flips are fair coins. With `probability` each, independently: y-flip (a fair coin), scaling by `2**(0.2 w_s)`,
    rotation by an angle in (-pi, pi), scaling by `2**(+-0.2 w_a)` along a direction, and translation by 0.125 of the
    size times `t`, all of one affine resampling with reflected borders. It is bicubic here, where the authors
    oversample with a wavelet.

    The labels are `[x-flip, y-flip, w_s, cos(angle) - 1, sin(angle), w_a cos(direction), w_a sin(direction), t_x,
    t_y]`, zero for what was left out (Karras et al. 2022, App. F.2).
    """
    batch_size, device = images.shape[0], images.device
    on = [uniform(batch_size, generator, device) < p for p in (1.0, *[probability] * 5)]
    x_flip, y_flip = (on[i] * (uniform(batch_size, generator, device) < 0.5).float() for i in (0, 1))
    w_scale = on[2] * normal((batch_size,), generator, device)
    angle = on[3] * (2 * uniform(batch_size, generator, device) - 1) * math.pi
    w_aniso = on[4] * normal((batch_size,), generator, device)
    direction = (2 * uniform(batch_size, generator, device) - 1) * math.pi
    direction = direction * (uniform(batch_size, generator, device) < 0.5)
    shift = on[5][:, None] * normal((batch_size, 2), generator, device)
    labels = [x_flip, y_flip, w_scale, angle.cos() - 1, angle.sin()]
    labels += [w_aniso * direction.cos(), w_aniso * direction.sin(), shift[:, 0], shift[:, 1]]

    # what the image undergoes, in the order of the labels; sampling needs the inverse
    matrix = torch.diag_embed(torch.stack([1 - 2 * x_flip, 1 - 2 * y_flip], dim=1))
    matrix = 2 ** (0.2 * w_scale)[:, None, None] * matrix
    matrix = _rotation(-angle) @ matrix
    stretch = torch.diag_embed(torch.stack([2 ** (0.2 * w_aniso), 2 ** (-0.2 * w_aniso)], dim=1))
    matrix = _rotation(direction) @ stretch @ _rotation(-direction) @ matrix
    inverse = torch.linalg.inv(matrix)
    offset = -inverse @ (0.25 * shift[:, :, None])  # the image is 2 wide in these coordinates
    grid = F.affine_grid(torch.cat([inverse, offset], dim=2), list(images.shape), align_corners=False)
    changed = F.grid_sample(images.float(), grid, "bicubic", "reflection", align_corners=False)
    only_flipped = (on[2] | on[3] | on[4] | on[5]).logical_not().reshape(-1, 1, 1, 1)
    flipped = torch.where(x_flip.reshape(-1, 1, 1, 1) > 0, images.flip(3), images)
    flipped = torch.where(y_flip.reshape(-1, 1, 1, 1) > 0, flipped.flip(2), flipped)
    return torch.where(only_flipped, flipped, changed.to(images.dtype)), torch.stack(labels, dim=1)


def _rotation(angle: torch.Tensor) -> torch.Tensor:
    """Matrices `(B, 2, 2)`."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
