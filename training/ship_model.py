"""Copy a trained model into the package: half-precision safetensors, stamped by today's code, and the record of its
training; and make the card of it in `model_cards/`.

python training/ship_model.py outputs/fashion32 fashion32

The card's own words are in the package's `assets/NAME/notes.md`, its pictures beside it. Without a folder the card
alone is made anew.
"""

import argparse
import json
import re
import shutil
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

import diffusers_onestep  # noqa: F401 (registers its classes with the loader)
from diffusers_onestep import OneStepPipeline
from diffusers_onestep.cards import render_card
from diffusers_onestep.files import write_json, write_text
from diffusers_onestep.records import RUN_RECORD
from diffusers_onestep.repository import ASSETS, write_repository

MODEL_CARDS = Path(__file__).parents[1] / "model_cards"
PICTURES = ("samples", "quality", "health", "curves")


def main(folder: str | None, name: str) -> None:
    if folder is not None:
        ship(folder, name)
    write_text(MODEL_CARDS / f"{name}.md", shipped_card(name))


def shipped_card(name: str) -> str:
    """The card of a shipped model, with the pictures that lie in `model_cards/`."""
    files = {kind: f"{name}-{kind}.png" for kind in PICTURES}
    there = {kind: file for kind, file in files.items() if (MODEL_CARDS / file).is_file()}
    return render_card(ASSETS / name, name, pictures=there)


def renamed(text: str, folder: str, name: str) -> str:
    """`text` with another name where it has `folder`, but not where that is a part of a word or a path."""
    return re.sub(rf"(?<![\w./-]){re.escape(folder)}(?![\w-])", name, text)


def ship(folder: str, name: str) -> None:
    index = json.loads((Path(folder) / "model_index.json").read_text())
    is_teacher = index["scheduler"][1] in ("DDPMScheduler", "DDIMScheduler", "EDMEulerScheduler")
    loader = DiffusionPipeline if is_teacher else OneStepPipeline
    pipeline = loader.from_pretrained(folder, dtype=torch.float16)
    write_repository(pipeline, ASSETS / name)
    for file in ("training_args.json", RUN_RECORD, "metrics.json"):
        if (Path(folder) / file).is_file():
            shutil.copy(Path(folder) / file, ASSETS / name)
    for path in (ASSETS / name).rglob("*.json"):  # without folders of this machine
        text = path.read_text()
        config = json.loads(renamed(text, str(Path(folder)), name))
        config.pop("_name_or_path", None)
        if config != json.loads(text):
            write_json(path, config)
    if (notice := Path(folder) / "NOTICE").is_file():
        shutil.copy(notice, ASSETS / name)
    size = sum(file.stat().st_size for file in Path(ASSETS / name).rglob("*") if file.is_file())
    print(f"{ASSETS / name}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", help="Output of a training script.")
    parser.add_argument("name", help="Name of the shipped model.")
    main(**vars(parser.parse_args()))
