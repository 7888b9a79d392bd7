"""Pixels of samples, and pictures of them on disk."""

from pathlib import Path

import torch

from .files import written_beside

PICTURE_FILES = (".png", ".jpg", ".jpeg", ".webp")


def picture(x0: torch.Tensor) -> torch.Tensor:
    """Pixels `(B, C, H, W)` uint8 of samples in [-1, 1]."""
    return ((x0.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def check_picture(path: Path, argument: str) -> None:
    """Raise a ValueError that names `argument` if no picture can be written to `path`."""
    if path.suffix.lower() not in PICTURE_FILES:
        raise ValueError(f"`{argument}` must end in one of {PICTURE_FILES}, but is {str(path)!r}.")
    if not path.parent.is_dir():
        raise ValueError(f"`{argument}` must lie in an existing folder, but {str(path.parent)!r} is none.")


def save_grid(pixels: torch.Tensor, path: Path, columns: int, scale: int = 2) -> None:
    """Write uint8 pixels `(B, C, H, W)` as one picture of rows of `columns`, beside first and then renamed."""
    from PIL import Image

    missing = -len(pixels) % columns
    pixels = torch.cat([pixels, pixels.new_full((missing, *pixels.shape[1:]), 255)])  # white where a row ends early
    rows = [torch.cat(list(row), dim=2) for row in pixels.split(columns)]
    grid = torch.cat(rows, dim=1).permute(1, 2, 0).numpy()
    image = Image.fromarray(grid.squeeze(-1) if grid.shape[-1] == 1 else grid)
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    with written_beside(path) as beside:
        image.save(beside, format=Image.registered_extensions()[path.suffix.lower()])
