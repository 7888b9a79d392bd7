"""Published checkpoints to diffusers folders: EDM, SiD, EDM2, guided-diffusion and DMD2.

| kind | files | what comes out |
|---|---|---|
| `edm` | EDM's pickles, baselines too | a teacher |
| `edm2` | EDM2's pickles | a teacher, in latents or pixels |
| `guided-diffusion` | OpenAI's `.pt` | a teacher |
| `sid` | SiD's and SiDA's pickles | a one-step student that starts at `2.5 * noise` |
| `dmd2` | DMD2's `.bin` | a student: ImageNet-64 starts at `80 * noise`, text-to-image at a timestep |
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..cards import create_model_card
from ..files import write_json
from ..records import CONVERSION_RECORD, license_of, run_record
from ..repository import resolve_model
from .dmd2 import dmd2_imagenet_network, text_student
from .edm import edm_network
from .guided_diffusion import guided_diffusion_network
from .kinds import EDM_WRAPPERS, KINDS, STUDENT_WRAPPERS, kind_of, licence_of, method_of
from .networks import Converted
from .pickles import first_line, read_checkpoint
from .pipeline import pipeline_of


def convert(
    file: str | os.PathLike,
    out: str | os.PathLike,
    *,
    kind: str = "auto",
    base: str | os.PathLike | None = None,
    config: Mapping[str, Any] | None = None,
    student_timesteps: list[float] | None = None,
) -> str:
    """Convert a published checkpoint to a diffusers folder, with config, licence and card.

    No code of the file runs: see `read_checkpoint`. The folder is complete or absent.

    Args:
        file (path): a pickle, a `.pt`, a `.bin` or a safetensors file.
        out (path): the folder, which must not exist yet.
        kind (`str`, *optional*, defaults to `"auto"`): one of `KINDS`; `"auto"` tells by what the file holds.
        base (path or Hub id, *optional*): of a text-to-image student, the pipeline that it is the U-Net of.
        config (`dict`, *optional*): options of the network that override or complete those of the file: for pickles
            and DMD2's ImageNet student the names of EDM's constructor, for guided-diffusion those of its scripts.
        student_timesteps (`list`, *optional*): of a text-to-image student, noisiest first; by default told by the
            file's name.

    Returns:
        The kind.

    Raises:
        ValueError: on a wrong, truncated, hostile or unknown file, and if the file's tensors are not those of the
            network that its options describe, naming the first wrong one.
    """
    file, out = Path(file), Path(out)
    if kind not in ("auto", *KINDS):
        raise ValueError(f"`kind` must be 'auto' or one of {KINDS}, but is {kind!r}.")
    if out.exists():
        raise ValueError(f"`out` must not exist yet, but {str(out)!r} does.")
    content = read_checkpoint(file)
    if kind == "auto":
        kind = kind_of(content, file)
    if not isinstance(content, dict):
        raise ValueError(f"`file` {str(file)!r} must hold a dict, but holds a {type(content).__name__}.")
    wrappers = {"edm": tuple(EDM_WRAPPERS), "edm2": ("Precond",), "sid": ("EDMPrecond", "Precond", *STUDENT_WRAPPERS)}
    name = getattr(content.get("ema"), "class_name", None)
    if kind in wrappers and name not in wrappers[kind]:
        raise ValueError(f"`file` of the kind {kind!r} must hold one of {wrappers[kind]}, but holds {name!r}.")
    config = dict(config or {})
    if kind == "dmd2" and "conv_in.weight" in content:
        pipeline, notes = text_student(content, file, base, student_timesteps), []
    elif base is not None or student_timesteps is not None:
        raise ValueError("`base` and `student_timesteps` must be None but for text-to-image students.")
    else:
        read: dict[str, Callable[..., Converted]] = {
            "edm": edm_network,
            "sid": edm_network,
            "edm2": edm_network,
            "guided-diffusion": guided_diffusion_network,
            "dmd2": dmd2_imagenet_network,
        }
        try:
            converted = read[kind](content, config)
        except (ValueError, ArithmeticError, RuntimeError) as error:  # what numbers and shapes of a file can raise
            if str(error).startswith("`"):
                raise  # says what must be
            raise ValueError(
                f"`file` {str(file)!r} holds no network of the kind {kind!r}: {first_line(error)}."
            ) from error
        pipeline, notes = pipeline_of(converted, kind), converted.notes
    beside = out.with_name(f".{out.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        pipeline.save_pretrained(beside, safe_serialization=True)
        licence, sentence = licence_of(kind, file.name)
        record = run_record(*method_of(kind, file.name, name), license=licence) | base_record(base)
        with file.open("rb") as opened:
            source = {"file": file.name, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}
        source |= {"kind": kind, "license_note": sentence, "notes": notes}
        write_json(beside / CONVERSION_RECORD, record | source)
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    try:
        create_model_card(out)  # by the name that it has now
    except BaseException:
        shutil.rmtree(out)
        raise
    return kind


def base_record(base: str | os.PathLike | None) -> dict[str, Any]:
    """What a card says of the pipeline that all but the U-Net of a text-to-image student is of."""
    if base is None:
        return {}
    here = Path(resolve_model(base)).is_dir()
    return {
        "teacher": str(base),
        "base_model": None if here else str(base),
        "base_license": license_of(str(base)),
    }
