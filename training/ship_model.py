"""Copy a trained model into the package: half-precision safetensors, stamped by today's code.

python training/ship_model.py outputs/fashion32 fashion32
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

import diffusers_onestep  # noqa: F401 (registers its classes with the loader)
from diffusers_onestep import OneStepPipeline
from diffusers_onestep.repository import ASSETS, write_json, write_repository


def main(folder: str, name: str) -> None:
    index = json.loads((Path(folder) / "model_index.json").read_text())
    is_teacher = index["scheduler"][1] in ("DDPMScheduler", "DDIMScheduler")
    loader = DiffusionPipeline if is_teacher else OneStepPipeline
    pipeline = loader.from_pretrained(folder, dtype=torch.float16)
    write_repository(pipeline, ASSETS / name)
    for path in (ASSETS / name).rglob("*.json"):
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None) is not None:  # a folder of this machine
            write_json(path, config)
    if (notice := Path(folder) / "NOTICE").is_file():
        shutil.copy(notice, ASSETS / name)
    size = sum(file.stat().st_size for file in Path(ASSETS / name).rglob("*") if file.is_file())
    print(f"{ASSETS / name}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="Output of a training script.")
    parser.add_argument("name", help="Name of the shipped model.")
    main(**vars(parser.parse_args()))
