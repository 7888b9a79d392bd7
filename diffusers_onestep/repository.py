"""Model folders: written so that they load at every moment, and the ones that ship with the package."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from diffusers import DiffusionPipeline

ASSETS = Path(__file__).parent / "assets"


def shipped_model(name: str) -> Path:
    """Folder of a model that ships with the package.

    Raises:
        ValueError: if there is none of this name; lists those that there are.
    """
    names = sorted(index.parent.name for index in ASSETS.glob("*/model_index.json"))
    if name not in names:
        raise ValueError(f"`name` must be one of the shipped models {names}, but is {name!r}.")
    return ASSETS / name


def resolve_model(path_or_id: str | os.PathLike) -> str:
    """A folder as it is, a shipped model's name as its folder, anything else as a Hub id."""
    path = Path(path_or_id)
    if not path.is_dir() and (ASSETS / path / "model_index.json").is_file():
        return str(ASSETS / path)
    return str(path_or_id)


def write_repository(
    pipeline: DiffusionPipeline, folder: Path, more: Callable[[Path], None] = lambda folder: None
) -> None:
    """Save a pipeline file by file, `model_index.json` last: a reader finds the old state, the new one, or, the first
    time, none.

    Args:
        pipeline (`DiffusionPipeline`): what to save, as safetensors.
        folder (`Path`): an existing or new folder; other files in it are left alone.
        more (callable, *optional*): writes further files of the repository into a folder that it is given.
    """
    folder = Path(folder)
    beside = folder / ".student.writing"
    shutil.rmtree(beside, ignore_errors=True)
    pipeline.save_pretrained(beside, safe_serialization=True)
    more(beside)
    files = sorted((f for f in beside.rglob("*") if f.is_file()), key=lambda f: f.name == "model_index.json")
    for file in files:
        target = folder / file.relative_to(beside)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, target)
    shutil.rmtree(beside)


def write_json(path: Path, content: dict) -> None:
    """Write beside, then rename."""
    beside = path.with_name(f".{path.name}.writing")
    beside.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(beside, path)
