"""Statistics of real images that generated ones are compared with: made, saved as safetensors, read and reused."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .data import load_images
from .features import Extractor
from .files import written_beside
from .metrics import moments, shuffled
from .repository import ASSETS

SHIPPED = {"fashion": ASSETS / "fashion_cnn" / "fashion_test.safetensors"}  # by the extractor's label
KEPT_FEATURES = 10_000


@dataclass
class Reference:
    """What real images look like to one extractor.

    Attributes:
        mean, covariance (`torch.Tensor`): float64 `(D,)` and `(D, D)`, of all images.
        features (`torch.Tensor`, *optional*): `(N, D)` of (some of) them, for all distances but Fréchet's.
        num_images (`int`, *optional*): behind the moments; None if the file does not say.
        extractor, weights (`str`, *optional*): label and digest of the extractor.
        source (`str`): where the images came from.
        captions (list of `str`, *optional*): of the images that `features` are of; not saved.
    """

    mean: torch.Tensor
    covariance: torch.Tensor
    features: torch.Tensor | None = None
    num_images: int | None = None
    extractor: str | None = None
    weights: str | None = None
    source: str = ""
    captions: list[str] | None = None

    @classmethod
    def from_images(
        cls,
        images: torch.Tensor,
        extractor: Extractor,
        source: str = "",
        extract: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> "Reference":
        """Statistics of uint8 `images` `(N, C, H, W)`; `extract` gives their features, by default all in this
        process."""
        features = extract(images) if extract else extractor(images)[0]
        return cls(*moments(features), features, len(images), extractor.label, extractor.digest(), source)

    @classmethod
    def load(
        cls,
        reference: str | os.PathLike | None,
        extractor: Extractor,
        split: str = "test",
        *,
        extract: Callable[[torch.Tensor], torch.Tensor] | None = None,
        resolution: int | None = None,
    ) -> "Reference":
        """Read statistics, or make them from images.

        Args:
            reference (`str`, *optional*): a safetensors file that `save` wrote; an `.npz` of EDM or ADM (`mu` and
                `sigma`, the images `arr_0`, or both), read without pickle; a data set of images (see `load_images`);
                or one of these files on the Hub, as `hf://datasets/USER/REPOSITORY/FILE`. By default what ships with
                the package for this extractor.
            extractor (`Extractor`): that of the images to compare with.
            split (`str`, *optional*, defaults to `"test"`): of a data set.
            extract (callable, *optional*): see `from_images`.
            resolution (`int`, *optional*): of a data set's images, see `load_images`.

        Raises:
            ValueError: if there is no reference, or if it is that of another extractor.
        """
        pictures = reference is not None and not str(reference).endswith((".safetensors", ".npz"))
        if resolution is not None and not pictures:
            raise ValueError(f"`resolution` must be None but for a data set of pictures, but is {resolution}.")
        if reference is None:
            if extractor.label not in SHIPPED:
                raise ValueError(
                    f"`reference` must be given for the extractor {extractor.label}: none ships with the package."
                )
            reference = SHIPPED[extractor.label]
        name = str(reference)
        path = _from_hub(name) if name.startswith("hf://") else name
        source = Path(name).name if path == name and Path(name).exists() else name  # published: no folders of a user
        if path.endswith(".safetensors"):
            found = cls._from_safetensors(path, extractor, source)
        elif path.endswith(".npz") and (arrays := _read_npz(path)).keys() & {"mu", "arr_0"}:
            if "arr_0" in arrays:
                images = torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2).contiguous()
                found = cls.from_images(images, extractor, source, extract)
            if "mu" in arrays:  # of the whole data set, of which ADM's images are a part
                mean, covariance = (torch.from_numpy(arrays[key]).double() for key in ("mu", "sigma"))
                features = found.features if "arr_0" in arrays else None
                found = cls(mean, covariance, features, source=source)
        elif path.endswith((".pkl", ".pt", ".pth")):
            raise ValueError(f"`reference` must be .safetensors, .npz or a data set, never a pickle, but is {name!r}.")
        else:
            real = load_images(path, split, resolution)
            size = "" if resolution is None else f", {resolution} x {resolution}"
            found = cls.from_images(real.images, extractor, f"{source}, {split}{size}", extract)
            return replace(found, captions=real.captions)
        blank = torch.zeros(1, extractor.channels, 32, 32, dtype=torch.uint8)
        dimension = extractor(blank)[0].shape[1]
        if found.mean.shape != (dimension,):
            raise ValueError(
                f"`reference` must have the {dimension} features of {extractor.label}, but {name!r} has "
                f"{tuple(found.mean.shape)}."
            )
        return found

    @classmethod
    def _from_safetensors(cls, path: str, extractor: Extractor, source: str) -> "Reference":
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if not {"mean", "covariance"} <= set(file.keys()):
                raise ValueError(f"`reference` must hold 'mean' and 'covariance', but {path!r} holds {file.keys()}.")
            mean, covariance = file.get_tensor("mean"), file.get_tensor("covariance")
            features = file.get_tensor("features").float() if "features" in file.keys() else None  # noqa: SIM118
        own = extractor.digest()
        if about.get("weights", own) != own:
            raise ValueError(
                f"`reference` {path!r} must be that of the extractor {extractor.label} with weights {own}, but is "
                f"that of {about['extractor']} with weights {about['weights']}."
            )
        number = int(about["num_images"]) if "num_images" in about else None
        known = (about.get(key) for key in ("extractor", "weights"))
        return cls(mean, covariance, features, number, *known, about.get("source") or source)

    def save(self, path: str | os.PathLike, features: int = KEPT_FEATURES) -> None:
        """Write safetensors, beside and then renamed, with the features of at most `features` images, drawn at random,
        in float16."""
        path = Path(path)
        tensors = {"mean": self.mean, "covariance": self.covariance}
        if self.features is not None and features:
            kept = self.features if len(self.features) <= features else shuffled(self.features)[:features]
            tensors["features"] = kept.half().contiguous()
        about = {"num_images": self.num_images, "extractor": self.extractor, "weights": self.weights}
        about = {k: str(v) for k, v in (about | {"source": self.source}).items() if v is not None}
        with written_beside(path) as beside:
            save_file(tensors, beside, about)


def _read_npz(path: str) -> dict[str, np.ndarray]:
    """The arrays of statistics; those of a data set are left to `load_images`."""
    if not Path(path).is_file():
        raise ValueError(f"`reference` must be a file or a data set, but {path!r} does not exist.")
    with np.load(path, allow_pickle=False) as arrays:
        return {key: arrays[key] for key in {"mu", "sigma", "arr_0"} & set(arrays.files)}


def _from_hub(address: str) -> str:
    """The cached copy of one file on the Hub."""
    from huggingface_hub import hf_hub_download

    parts = address.removeprefix("hf://").split("/")
    kind = parts.pop(0).removesuffix("s") if parts[0] == "datasets" else "model"
    if len(parts) < 3:
        raise ValueError(f"`reference` must be hf://[datasets/]USER/REPOSITORY/FILE, but is {address!r}.")
    return hf_hub_download("/".join(parts[:2]), "/".join(parts[2:]), repo_type=kind)
