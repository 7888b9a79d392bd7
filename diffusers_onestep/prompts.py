"""Prompts and captioned images as training data: text embeddings and latents, computed once and kept on disk.

A file each, as safetensors, named by digests of the encoder and of what was encoded: any run, rank or machine that
needs the same one finds it, and an interrupted encoding goes on where it stopped.
"""

import hashlib
import json
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from huggingface_hub.constants import HF_HOME
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm

from .data import captions_of, upright
from .teacher import Teacher

DEFAULT_CACHE = str(Path(HF_HOME) / "diffusers_onestep")


def digest(*parts: str | bytes) -> str:
    """A name for `parts`, 40 hexadecimal digits."""
    total = hashlib.blake2b(digest_size=20)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little") + data)
    return total.hexdigest()


def network_digest(network: nn.Module) -> str:
    """A name for a network's class, weights and dtype."""
    total = hashlib.blake2b(type(network).__name__.encode(), digest_size=20)
    for name, tensor in sorted(network.state_dict().items()):
        total.update(f"{name}/{tensor.dtype}/{tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def text_digest(teacher: Teacher) -> str:
    """A name for all that the embedding of a prompt depends on: pipeline, text encoders and tokenizers."""
    parts = ["2", type(teacher.pipeline).__name__]  # the first grows when `Family.embed` changes
    for name, part in sorted(teacher.pipeline.components.items()):
        if name.startswith("text_encoder") and part is not None:
            parts += [name, network_digest(part)]
        if name.startswith("tokenizer") and part is not None:
            parts += [name, type(part).__name__, str(part.model_max_length), str(part.padding_side)]
            parts += [json.dumps(sorted(part.get_vocab().items())), str(part.pad_token_id)]
    return digest(*parts)


def check_prompts(wanted: bool, path: str | None) -> None:
    """Raise a `ValueError` unless a file of prompts is given where the teacher takes them, and only there."""
    if wanted != (path is not None):
        needed = "a file, for a text-to-image teacher" if wanted else "None for this teacher"
        raise ValueError(f"`prompts` must be {needed}, but is {path!r}.")


def read_prompts(path: str) -> list[str]:
    """The prompts of a text file, one a line; blank lines are left out.

    Raises:
        ValueError: if there are none.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"`prompts` must be a UTF-8 file of one prompt a line, but {path!r}: {error}.") from error
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts:
        raise ValueError(f"`prompts` must have one prompt a line, but {path!r} has none.")
    return prompts


class TensorCache:
    """Dicts of tensors on disk by key, each complete or absent."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, key: str) -> Path:
        """Where `key` is, or would be."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def read(self, key: str) -> dict[str, torch.Tensor]:
        """The tensors of `key`."""
        return load_file(self.path(key))

    def write(self, key: str, tensors: dict[str, torch.Tensor]) -> None:
        """Keep the tensors of `key`, beside first: processes may write the same one at once."""
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.writing")
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, beside)
        beside.replace(path)

    def fill(self, keys: Sequence[str], encode: Any, batch_size: int, what: str) -> None:
        """Encode what is missing: `encode(places)` gives one dict of tensors for each place in `keys`.

        Every process takes its share, told from the keys alone, since they start at different times; then each looks
        again, since not all need to share a disk.
        """
        state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))  # as `Accelerator` reads it
        for rank, ranks in ((state.process_index, state.num_processes), (0, 1)):
            places = {key: i for i, key in enumerate(keys) if int(key, 16) % ranks == rank}
            own = sorted(i for key, i in places.items() if not self.path(key).is_file())
            batches = [own[i : i + batch_size] for i in range(0, len(own), batch_size)]
            for batch in tqdm(batches, desc=what, disable=not own or not state.is_main_process):
                for place, tensors in zip(batch, encode(batch), strict=True):
                    self.write(keys[place], tensors)
            state.wait_for_everyone()


class PromptEmbeddings:
    """Prompts as conditions, one row each: a data set for `Batches`.

    Args:
        teacher (`Teacher`): a text-to-image teacher, whose text encoders are still there.
        prompts (`list[str]`): None stands for no prompt, the teacher's null condition.
        cache_dir (path, *optional*): where embeddings are kept.
        batch_size (`int`, *optional*, defaults to 16): prompts at a time.
        device (`torch.device`, *optional*): where to encode; by default where the text encoders are.
    """

    def __init__(
        self,
        teacher: Teacher,
        prompts: Iterable[str | None],
        cache_dir: str | Path = DEFAULT_CACHE,
        *,
        batch_size: int = 16,
        device: torch.device | None = None,
    ):
        self.teacher, self.prompts = teacher, list(prompts)
        if not self.prompts:
            raise ValueError("`prompts` must hold at least one prompt, but are empty.")
        encoders = text_digest(teacher)
        self.cache = TensorCache(Path(cache_dir) / "text" / encoders)
        self.keys = [None if prompt is None else digest(prompt) for prompt in self.prompts]
        asked = {key: prompt for key, prompt in zip(self.keys, self.prompts, strict=True) if key is not None}
        keys, texts = list(asked), list(asked.values())
        if device is not None and not all(self.cache.path(key).is_file() for key in keys):
            for encoder in teacher.text_encoders().values():
                encoder.to(device)

        def encode(places: list[int]):
            rows = teacher.embed([texts[i] for i in places])
            return [{k: v[i] for k, v in rows.items()} for i in range(len(places))]

        self.cache.fill(keys, encode, batch_size, "encoding prompts")

    def __len__(self):
        return len(self.prompts)

    def cond(self, places: Sequence[int]) -> dict[str, torch.Tensor]:
        """The `cond` of the prompts at `places`."""
        extra = self.teacher.family.extra(self.teacher, len(places))
        null = {k: v[0].cpu() for k, v in self.teacher.null_condition(1).items() if k not in extra}
        rows = [null if self.keys[i] is None else self.cache.read(self.keys[i]) for i in places]
        return {k: torch.stack([row[k] for row in rows]) for k in null} | extra

    def batch(self, places):
        return {"cond": self.cond(places)}

    def with_null(self, share: float = 0.1) -> "PromptEmbeddings":
        """The same with so many null conditions after them that they are a `share` of all rows."""
        count = max(1, round(len(self) * share / (1 - share)))
        more = object.__new__(PromptEmbeddings)
        more.teacher, more.cache = self.teacher, self.cache
        more.prompts, more.keys = self.prompts + [None] * count, self.keys + [None] * count
        return more


class CaptionedLatents:
    """Real images as latents `"x0"` with the `cond` of their captions: a data set for `Batches`.

    Args:
        teacher (`Teacher`): a text-to-image teacher.
        rows (`datasets.Dataset`): with columns of images and captions.
        image_column, caption_column (`str`): their names.
        cache_dir, batch_size, device: see `PromptEmbeddings`.
    """

    def __init__(
        self,
        teacher: Teacher,
        rows: Any,
        image_column: str,
        caption_column: str,
        cache_dir: str | Path = DEFAULT_CACHE,
        *,
        batch_size: int = 16,
        device: torch.device | None = None,
    ):
        captions = captions_of(rows, caption_column)
        self.prompts = PromptEmbeddings(teacher, captions, cache_dir, batch_size=batch_size, device=device)
        height, width = teacher.resolution
        source = digest(network_digest(teacher.pipeline.vae), rows._fingerprint, image_column, f"{height}x{width}")
        self.cache = TensorCache(Path(cache_dir) / "latents" / source)
        self.keys = [digest(str(place)) for place in range(len(rows))]
        device = device or teacher.pipeline.vae.device

        def encode(places: list[int]):
            images = torch.stack([as_tensor(rows[i][image_column], height, width) for i in places])
            return [{"x0": latents} for latents in teacher.encode_images(images.to(device))]

        self.cache.fill(self.keys, encode, batch_size, "encoding images")

    def __len__(self):
        return len(self.prompts)

    def batch(self, places):
        x0 = torch.stack([self.cache.read(self.keys[i])["x0"] for i in places])
        return self.prompts.batch(places) | {"x0": x0}


class PromptPairs:
    """Teacher pairs `"noise"` and `"target"` with the `cond` of their prompts: a data set for `Batches`.

    Args:
        teacher (`Teacher`): a text-to-image teacher.
        rows (`datasets.Dataset`): with the columns `noise`, `target` and `prompt`.
        settings: as of `PromptEmbeddings`.
    """

    def __init__(self, teacher: Teacher, rows: Any, **settings: Any):
        if "prompt" not in rows.column_names:
            raise ValueError(f"`pairs` must have a column 'prompt' for this teacher, but have {rows.column_names}.")
        self.prompts = PromptEmbeddings(teacher, rows["prompt"], **settings)
        self.rows = rows.select_columns(["noise", "target"]).with_format("torch")

    def __len__(self):
        return len(self.rows)

    def batch(self, places):
        return self.prompts.batch(places) | self.rows[places]


def as_tensor(picture: Any, height: int, width: int) -> torch.Tensor:
    """A picture as `(3, height, width)` in [-1, 1], see `upright`."""
    pixels = np.array(upright(picture, (height, width)).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1
