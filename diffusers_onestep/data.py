"""Batches for training: any map-style data set, in an order that resumes and splits over ranks exactly."""

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import PartialState
from diffusers.utils import logging

from .files import read_json, write_json

logger = logging.get_logger(__name__)

PAIRS_RECORD = "pairs.json"  # how a folder of pairs was made
CAPTION_COLUMNS = ("text", "caption", "prompt")  # the usual names, in this order


class Samples(Protocol):
    """A data set that answers a list of places with a batch: `"x0"`, `"noise"`, `"target"` as it has them, and
    `"cond"`."""

    def __len__(self) -> int: ...

    def batch(self, places: list[int]) -> dict[str, Any]: ...


class Batches:
    """Endless batches in a new random order each epoch.

    Sample number `n` of a run (counted over steps, micro-batches and ranks) is place `n % len` of the permutation of
    epoch `n // len`: so any step can be started at once, and the global batch does not depend on how it is split.

    Args:
        samples (`Samples`): the data set.
        batch_size (`int`): samples per rank and micro-batch.
        seed (`int`, *optional*, defaults to 0): of the permutations.
    """

    def __init__(self, samples: Samples, batch_size: int, seed: int = 0):
        self.samples, self.batch_size, self.seed = samples, batch_size, seed
        self._epoch, self._order = -1, []

    def start(self, step: int, accelerator: Any, accumulation: int) -> Iterator[dict[str, Any]]:
        """This rank's micro-batches from optimiser step `step` on."""
        ranks, rank, size = accelerator.num_processes, accelerator.process_index, self.batch_size
        micro_batch = step * accumulation
        while True:
            first = (micro_batch * ranks + rank) * size
            yield self.samples.batch([self.place(n) for n in range(first, first + size)]) | {"batch_size": size}
            micro_batch += 1

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.start(0, PartialState(), 1)

    def place(self, n: int) -> int:
        """Where sample number `n` of the run lies in the data set."""
        epoch, offset = divmod(n, len(self.samples))
        if epoch != self._epoch:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.samples))
            self._epoch, self._order = epoch, order.tolist()
        return self._order[offset]


class Conditions:
    """Nothing but conditions, for data-free methods: one row for every label (or prompt), or none at all."""

    def __init__(self, cond: Mapping[str, torch.Tensor] | None = None):
        self.cond = dict(cond or {})

    def __len__(self):
        return len(next(iter(self.cond.values()))) if self.cond else 1

    def batch(self, places):
        return {"cond": {k: v[places] for k, v in self.cond.items()}}


def load_rows(dataset_name: str, split: str = "train") -> Any:
    """A `datasets` data set: a Hub id, a folder of `save_to_disk`, or a folder that `load_dataset` reads."""
    from datasets import load_dataset, load_from_disk

    if (Path(dataset_name) / "dataset_info.json").is_file():
        return load_from_disk(dataset_name)
    return load_dataset(dataset_name, split=split)


def column_of(rows: Any, name: str | None, argument: str, kind: str, usual: Sequence[str]) -> str:
    """The column `name`; if None, one of the `usual` names, or the only column of `kind`, `"string"` or `"image"`.

    Raises:
        ValueError: if there is none such.
    """
    from datasets import Image

    found = [k for k, v in rows.features.items() if isinstance(v, Image) == (kind == "image")]
    if kind == "string":
        found = [k for k in found if getattr(rows.features[k], "dtype", "") in ("string", "large_string", "list")]
    named = [name] if name else [k for k in usual if k in found] or (found if len(found) == 1 else [])
    if not named or named[0] not in rows.features:
        raise ValueError(f"`{argument}` must be a column of {sorted(rows.features)}, but is {name!r}.")
    return named[0]


def captions_of(rows: Any, column: str) -> list[str]:
    """The captions of a column; of several for one image the first, and "" for none."""
    captions = [caption[0] if isinstance(caption, list) and caption else caption for caption in rows[column]]
    return [caption if isinstance(caption, str) else "" for caption in captions]


class LabelledImages:
    """Images in memory as uint8 `(N, C, H, W)` with labels `(N,)` or None, and captions or None; `"x0"` comes in
    [-1, 1]."""

    def __init__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor | None,
        names: list[str] | None = None,
        captions: list[str] | None = None,
    ):
        self.images, self.labels, self.names, self.captions = images, labels, names, captions

    def __len__(self):
        return len(self.images)

    def batch(self, places):
        cond = {} if self.labels is None else {"class_labels": self.labels[places]}
        return {"x0": self.images[places].float() / 127.5 - 1, "cond": cond}


def load_images(dataset: str, split: str = "train", resolution: int | None = None) -> LabelledImages:
    """Read images with labels or captions into memory.

    Args:
        dataset (`str`): an `.npz` with `images_SPLIT` `(N, H, W[, C])` uint8, `labels_SPLIT` and `class_names`; or
            what `load_rows` reads, with an image column, a `ClassLabel` column if it has labels, and a column `text`,
            `caption` or `prompt` if it has captions, of which there may be several for an image.
        split (`str`, *optional*, defaults to `"train"`): `"train"` or `"test"`.
        resolution (`int`, *optional*): side in pixels that the pictures of a data set are brought to, see `upright`;
            by default they must be of one size.

    Raises:
        ValueError: if there are no such images.
    """
    if resolution is not None and resolution < 1:
        raise ValueError(f"`resolution` must be at least 1, but is {resolution}.")
    if dataset.endswith(".npz"):
        if not Path(dataset).is_file():
            raise ValueError(f"`dataset` must be a file or a Hub data set, but {dataset!r} does not exist.")
        arrays = np.load(dataset, allow_pickle=False)
        if f"images_{split}" not in arrays.files:
            raise ValueError(f"`dataset` must hold `images_{split}`, but {dataset!r} holds {arrays.files}.")
        if resolution is not None:
            raise ValueError(f"`resolution` must be None for the .npz file {dataset!r}, but is {resolution}.")
        images, labels = arrays[f"images_{split}"], torch.from_numpy(arrays[f"labels_{split}"]).long()
        names = [str(name) for name in arrays["class_names"]]
        return LabelledImages(_channels_first(images), labels, names)
    from datasets import ClassLabel, Image

    rows = load_rows(dataset, split)
    image = next((k for k, v in rows.features.items() if isinstance(v, Image)), None)
    label = next((k for k, v in rows.features.items() if isinstance(v, ClassLabel)), None)
    caption = next((k for k in CAPTION_COLUMNS if k in rows.features), None)
    if image is None:
        raise ValueError(f"`dataset` must have an image column, but {dataset!r} has {sorted(rows.features)}.")
    size = None if resolution is None else (resolution, resolution)
    if not len(rows):
        raise ValueError(f"`dataset` must hold images, but {dataset!r} has none in its split {split!r}.")
    images = _in_memory((upright(picture, size) for picture in rows[image]), len(rows), dataset)
    labels = None if label is None else torch.tensor(rows[label])
    names = None if label is None else rows.features[label].names
    captions = None if caption is None else captions_of(rows, caption)
    return LabelledImages(images, labels, names, captions)


def _in_memory(pictures: Iterable[Any], number: int, dataset: str) -> torch.Tensor:
    """uint8 `(N, C, H, W)` of pictures of one size, grey ones as RGB beside coloured ones; in one array, as they are
    read, since large sets do not fit into memory twice."""
    images = None
    for place, picture in enumerate(pictures):
        pixels = torch.from_numpy(np.atleast_3d(np.array(picture))).permute(2, 0, 1)
        if images is None:
            images = torch.empty(number, *pixels.shape, dtype=torch.uint8)
        if (found := pixels.shape[1:]) != (first := images.shape[2:]):
            raise ValueError(
                f"`dataset` must hold images of one size, but {dataset!r} has {tuple(first)} and {tuple(found)} "
                "(height, width): resize them first (a reference: `--resolution` of make_reference.py, "
                "`--reference_resolution` of evaluate.py)."
            )
        if len(pixels) > images.shape[1]:  # the first of colour
            images = images.repeat(1, len(pixels), 1, 1)
        images[place] = pixels
    return images


def upright(picture: Any, size: tuple[int, int] | None = None) -> Any:
    """A `PIL.Image` as grey or RGB, turned as its camera was; with a `size` (height, width) resized to it (Lanczos),
    and its middle cut out."""
    from PIL import Image, ImageOps

    picture = ImageOps.exif_transpose(picture)
    if picture.mode not in ("L", "RGB"):  # palettes, transparency and sixteen bits are no values of pixels
        picture = picture.convert("RGB")
    return picture if size is None else ImageOps.fit(picture, size[::-1], Image.Resampling.LANCZOS)


def real_images(dataset: str, sample_shape: tuple[int, int, int], num_labels: int | None) -> LabelledImages:
    """The images of `load_images` as a pixel teacher takes them: of its shape, and with labels if it has any.

    Raises:
        ValueError: if they are of another shape, or lack its labels.
    """
    images = load_images(dataset)
    if (found := tuple(images.images.shape[1:])) != tuple(sample_shape):
        raise ValueError(
            f"`dataset` must hold images of the teacher's shape {tuple(sample_shape)} (channels, height, "
            f"width), but those of {dataset!r} have {found}."
        )
    if num_labels is None:
        return LabelledImages(images.images, None)
    low, high = (-1, -1) if images.labels is None else (value.item() for value in images.labels.aminmax())
    if low < 0 or high >= num_labels:
        found = "none" if images.labels is None else f"{low} to {high}"
        raise ValueError(
            f"`dataset` must have the teacher's labels 0..{num_labels - 1}, but those of {dataset!r} are {found}."
        )
    return images


def _channels_first(images: np.ndarray) -> torch.Tensor:
    images = torch.from_numpy(images)
    return images[:, None].contiguous() if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()


class Pairs:
    """Teacher pairs from a `datasets` data set: `"noise"`, `"target"` and conditions; and the `record` of how they
    were made, empty if nobody kept one."""

    def __init__(self, rows: Any, record: Mapping[str, Any] | None = None):
        self.rows = rows.with_format("torch")
        self.record = dict(record or {})

    def __len__(self):
        return len(self.rows)

    def batch(self, places):
        rows = self.rows[places]
        cond = {k: v for k, v in rows.items() if k not in ("noise", "target")}
        return {"noise": rows["noise"], "target": rows["target"], "cond": cond}

    def check(self, sample_shape: tuple[int, ...], teacher: str, **guidance: float) -> "Pairs":
        """These, if they are of `sample_shape` and, as far as is recorded, of the same `guidance` (`guidance_scale`,
        `embedded_guidance`); pairs of a `teacher` of another name, which may be the same one, give a warning.

        Raises:
            ValueError: if they are not.
        """
        found = tuple(self.rows[0]["noise"].shape) if len(self) else None
        if found != tuple(sample_shape):
            raise ValueError(f"`pairs` must have the teacher's shape {tuple(sample_shape)}, but have {found}.")
        for name, scale in guidance.items():
            if self.record.get(name, scale) != scale:
                raise ValueError(
                    f"`{name}` must be that of `pairs`, {self.record[name]}, but is {scale}: regression and "
                    "distribution matching would pull the student to different images."
                )
        if (made := self.record.get("pretrained_teacher_model", teacher)) != teacher:
            logger.warning(f"`pairs` were made by {made!r}: the teacher {teacher!r} must be the same model.")
        return self


def write_pairs(rows: Iterator[dict[str, torch.Tensor]], folder: Path, sample_shape: tuple[int, int, int]) -> None:
    """Stream teacher pairs to disk as a `datasets` data set, written beside and then renamed.

    Args:
        rows (iterator of `dict`): `"noise"` and `"target"` of `sample_shape`, and labels or a `"prompt"`.
        folder (`Path`): must not exist yet.
        sample_shape (`tuple`): `(C, H, W)`.
    """
    from datasets import Array3D, Dataset, Features, Value
    from datasets.arrow_writer import ArrowWriter

    if folder.exists():
        raise ValueError(f"`output_dir` must not exist yet, but {str(folder)!r} does.")
    first = next(rows)
    tensors = {k: Array3D(sample_shape, "float32") for k in ("noise", "target")}
    kinds = {k: Value("string" if isinstance(v, str) else "int64") for k, v in first.items() if k not in tensors}
    features = Features(tensors | kinds)
    beside = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    with ArrowWriter(features=features, path=str(beside / "rows.arrow")) as writer:
        for row in chain([first], rows):
            plain = {k: v if isinstance(v, str) else int(v) for k, v in row.items() if k not in tensors}
            writer.write({k: row[k].numpy() for k in tensors} | plain)
        writer.finalize()
    Dataset.from_file(str(beside / "rows.arrow")).save_to_disk(beside / "pairs")
    (beside / "pairs").rename(folder)
    shutil.rmtree(beside)


def join_pairs(parts: list[Path], folder: Path, record: Mapping[str, Any]) -> None:
    """Make one data set of those that several processes wrote, with a `record` of how, and remove the parts."""
    from datasets import concatenate_datasets, load_from_disk

    beside = folder.with_name(f".{folder.name}.joining")
    concatenate_datasets([load_from_disk(part) for part in parts]).save_to_disk(beside)
    write_json(beside / PAIRS_RECORD, dict(record))
    beside.rename(folder)
    for part in parts:
        shutil.rmtree(part)


def load_pairs(path: str) -> Pairs:
    """Teacher pairs that `make_pairs.py` stored in a folder, or that lie on the Hub.

    Raises:
        ValueError: if there are no columns `noise` and `target`.
    """
    from datasets import load_dataset, load_from_disk

    rows = load_from_disk(path) if Path(path).is_dir() else load_dataset(path, split="train")
    if missing := {"noise", "target"} - set(rows.column_names):
        raise ValueError(f"`pairs` must have the columns 'noise' and 'target', but {path!r} lacks {sorted(missing)}.")
    record = Path(path) / PAIRS_RECORD
    return Pairs(rows, read_json(record) if record.is_file() else None)
