"""Model folders: written so that they load at every moment, and the ones that ship with the package."""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from torch import nn

from .files import read_json, write_json

ASSETS = Path(__file__).parent / "assets"


def shipped_model(name: str) -> Path:
    """Folder of a model that ships with the package.

    Raises:
        ValueError: if there is none of this name; lists those that there are.
    """
    if name not in shipped_names():
        raise ValueError(f"`name` must be one of the shipped models {shipped_names()}, but is {name!r}.")
    return ASSETS / name


def shipped_names() -> list[str]:
    """The models that `shipped_model` knows."""
    return sorted(index.parent.name for index in ASSETS.glob("*/model_index.json"))


def resolve_model(path_or_id: str | os.PathLike) -> str:
    """A folder as it is, a shipped model's name as its folder, anything else as a Hub id."""
    path = Path(path_or_id)
    if not path.is_dir() and (ASSETS / path / "model_index.json").is_file():
        return str(ASSETS / path)
    return str(path_or_id)


def load_index(path_or_id: str, **hub: Any) -> dict[str, Any]:
    """`model_index.json` of a folder or a Hub repository.

    Args:
        path_or_id (`str`): what `resolve_model` gave.
        hub: `revision`, `token`, `cache_dir`, `local_files_only`, ... of `hf_hub_download`.

    Raises:
        ValueError: if there is no such repository or revision, or no access to it, or it holds no pipeline.
        ConnectionError: if the Hub fails, or cannot be reached and the file is not in its cache.
    """
    about = _about(path_or_id)
    if Path(path_or_id).is_dir():
        file = Path(path_or_id) / "model_index.json"
        if not file.is_file():
            raise ValueError(f"{about} is a folder without a model_index.json.")
        return read_json(file)
    with hub_errors(path_or_id, hub.get("revision")):
        try:
            return read_json(Path(hf_hub_download(path_or_id, "model_index.json", **hub)))
        except RemoteEntryNotFoundError as error:
            raise ValueError(f"{about} has no model_index.json: it holds no pipeline.") from error
        except HFValidationError as error:
            raise ValueError(f"{about} is none of them.") from error


def _about(path_or_id: str) -> str:
    return f"{path_or_id!r} must be a folder of a model, a shipped model {shipped_names()} or a Hub repository, but"


@contextmanager
def hub_errors(path_or_id: str, revision: str | None = None) -> Iterator[None]:
    """Inside, what goes wrong on the way from the Hub is an error that says what to do about it."""
    name = repr(path_or_id)
    try:
        yield
    except GatedRepoError as error:
        raise ValueError(
            f"{name} is gated: ask for access at https://huggingface.co/{path_or_id} and log in (`hf auth login`)."
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"`revision` must be a branch, tag or commit of {name}, but is {revision!r}.") from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{_about(path_or_id)} does not exist, or is private: then log in with `hf auth login`."
        ) from error
    except IncompleteSnapshotError as error:
        raise ConnectionError(f"{name} is in the cache in part. Try again when the Hub can be reached.") from error
    except LocalEntryNotFoundError as error:
        raise ConnectionError(
            f"{name} is no folder, no shipped model {shipped_names()} and not in the cache, and the Hub could not be "
            "reached (or HF_HUB_OFFLINE is set): try again when it can."
        ) from error
    except HTTPError as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else 0
        if 400 <= status < 500 and status not in (408, 429):
            raise ValueError(f"{name} could not be read: {error}") from error
        raise ConnectionError(
            f"The Hub failed while {name} was downloaded ({error}). "
            "Try again: files that have arrived are not downloaded twice."
        ) from error


@contextmanager
def safetensors_only(path_or_id: str, revision: str | None = None) -> Iterator[None]:
    """Load with `use_safetensors=True` inside: the error of weights that are none says why they are not loaded."""
    with hub_errors(path_or_id, revision):
        try:
            yield
        except (HTTPError, LocalEntryNotFoundError):
            raise
        except OSError as error:
            if error.errno is not None or "safetensors" not in str(error):  # a full disk, no permission
                raise
            if "Unable to load weights" in str(error):
                raise OSError(
                    f"{path_or_id!r} must have weights that can be read: a file is damaged or incomplete, get it "
                    f"again. ({error})"
                ) from error
            raise OSError(
                f"{path_or_id!r} must have its weights as safetensors: others are pickles, which can run code. "
                f"Ask its authors for safetensors, or convert the weights if you trust them. ({error})"
            ) from error


def write_repository(
    pipeline: DiffusionPipeline,
    folder: Path,
    more: Callable[[Path], None] = lambda folder: None,
    *,
    parts: Iterable[str] | None = None,
    frozen: Path | None = None,
) -> None:
    """Save a pipeline file by file, `model_index.json` last: a reader finds the old state, the new one, or, the first
    time, none.

    Args:
        pipeline (`DiffusionPipeline`): what to save, as safetensors.
        folder (`Path`): an existing or new folder; other files in it are left alone.
        more (callable, *optional*): writes further files of the repository into a folder that it is given.
        parts (names, *optional*): what to write; all others, which `folder` holds already, stay as they are.
        frozen (`Path`, *optional*): the folder where `keep_parts` has put those whose weights have been freed.
    """
    folder = Path(folder)
    beside = folder / ".student.writing"
    shutil.rmtree(beside, ignore_errors=True)
    names = list(pipeline.components if parts is None else parts)
    freed = [name for name in names if is_freed(pipeline.components[name])]
    if parts is None and not freed:
        pipeline.save_pretrained(beside, safe_serialization=True)
    else:
        write_parts(pipeline, beside, [name for name in names if name not in freed])
        pipeline.save_config(beside)
    if frozen is not None and Path(frozen) != folder:
        for name in freed:
            shutil.copytree(Path(frozen) / name, beside / name, copy_function=_link)
    more(beside)
    _move(beside, folder)


def is_freed(part: Any) -> bool:
    """Whether a part of a pipeline has given up its weights."""
    return isinstance(part, nn.Module) and any(p.device.type == "meta" for p in part.parameters())


def keep_parts(pipeline: DiffusionPipeline, folder: Path, names: Iterable[str]) -> None:
    """Save parts of a pipeline into `folder`, each complete or as it was, for their weights to be freed."""
    beside = Path(folder) / ".parts.writing"
    shutil.rmtree(beside, ignore_errors=True)
    write_parts(pipeline, beside, names)
    _move(beside, Path(folder))


def write_parts(pipeline: DiffusionPipeline, folder: Path, names: Iterable[str]) -> None:
    """Save parts of a pipeline as `save_pretrained` of the whole does."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        part = pipeline.components[name]
        if hasattr(part, "save_pretrained"):
            part.save_pretrained(folder / name)


def _move(beside: Path, folder: Path) -> None:
    for config in beside.glob("*/*config.json"):  # where the parts came from: folders of this machine
        content = read_json(config)
        if content.pop("_name_or_path", None) is not None:
            write_json(config, content)
    files = sorted((f for f in beside.rglob("*") if f.is_file()), key=lambda f: f.name == "model_index.json")
    for file in files:
        target = folder / file.relative_to(beside)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, target)
    shutil.rmtree(beside)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # not on every file system
        shutil.copy2(source, target)
