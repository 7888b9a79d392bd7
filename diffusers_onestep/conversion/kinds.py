"""What a published file is: told by what it holds."""

import re
from pathlib import Path
from typing import Any

from ..methods.base import Paper
from ..methods.dmd import DMD2
from ..methods.pretrain import Pretraining
from ..methods.sid import SIDA, SiD
from .pickles import StoredModule

GUIDED_DIFFUSION = Paper(
    title="Diffusion Models Beat GANs on Image Synthesis",
    arxiv_id="2105.05233",
    citation="Dhariwal, Nichol, NeurIPS 2021",
)
SCORE_SDE = Paper(
    title="Score-Based Generative Modeling through Stochastic Differential Equations",
    arxiv_id="2011.13456",
    citation="Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole, ICLR 2021",
)
EDM2 = Paper(
    title="Analyzing and Improving the Training Dynamics of Diffusion Models",
    arxiv_id="2312.02696",
    citation="Karras, Aittala, Lehtinen, Hellsten, Aila, Laine, CVPR 2024",
)
_METHODS = {  # of most files of a kind
    "edm": ("EDM", Pretraining.edm_paper),
    "edm2": ("EDM2", EDM2),
    "guided-diffusion": ("guided-diffusion", GUIDED_DIFFUSION),
    "sid": ("SiD", SiD.paper),
    "dmd2": ("DMD2", DMD2),
}
KINDS = tuple(_METHODS)
LICENCES = {
    "edm": ("cc-by-nc-sa-4.0", "EDM's weights are CC BY-NC-SA 4.0."),
    "edm2": ("cc-by-nc-sa-4.0", "EDM2's weights are CC BY-NC-SA 4.0."),
    "guided-diffusion": ("mit", "OpenAI's guided-diffusion weights are MIT."),
    "sid": ("apache-2.0", "SiD's model card says Apache-2.0; its teachers, EDM's weights, are CC BY-NC-SA 4.0."),
    "dmd2": ("cc-by-nc-4.0", "DMD2's weights are CC BY-NC 4.0."),
}
_BASELINES = {  # files of EDM that were others' networks, as its README says: licence, sentence, method
    "baseline-cifar10-32x32-uncond-": (
        "apache-2.0",
        "EDM's file derives from score_sde's weights, which are Apache-2.0.",
        ("score_sde", SCORE_SDE),
    ),
    "baseline-imagenet-64x64-cond-": (
        "mit",
        "EDM's file derives from OpenAI's guided-diffusion weights, which are MIT.",
        ("guided-diffusion", GUIDED_DIFFUSION),
    ),
}
EDM_WRAPPERS = {"EDMPrecond": "edm", "VPPrecond": "vp", "VEPrecond": "ve", "iDDPMPrecond": "iddpm"}
STUDENT_WRAPPERS = ("EDMPrecond_EncoderDecoder", "EDM_2_Precond_EncoderDecoder", "EDM_2_Precond_Generator")
EDM2_WRAPPERS = ("Precond", *STUDENT_WRAPPERS[1:])


def licence_of(kind: str, name: str) -> tuple[str, str]:
    """The licence of the weights of a file of this name: its id, and a sentence."""
    baseline = _baseline(kind, name)
    return baseline[:2] if baseline else LICENCES[kind]


def method_of(kind: str, name: str, wrapper: str | None) -> tuple[str, Paper]:
    """What the weights of a file of this name were made by, and its paper; `wrapper` is the class in a pickle."""
    if kind == "sid" and wrapper in STUDENT_WRAPPERS:  # SiD's own are an EDMPrecond
        return "SiDA", SIDA
    baseline = _baseline(kind, name)
    return baseline[2] if baseline else _METHODS[kind]


def _baseline(kind: str, name: str) -> tuple[str, str, tuple[str, Paper]] | None:
    found = (entry for start, entry in _BASELINES.items() if kind == "edm" and name.startswith(start))
    return next(found, None)


def kind_of(content: Any, file: Path) -> str:
    """What a file is, by what it holds."""
    if isinstance(content, dict) and isinstance(content.get("ema"), StoredModule):
        name = content["ema"].class_name
        if name in STUDENT_WRAPPERS:
            return "sid"
        if name == "Precond":
            return "edm2"
        if name in EDM_WRAPPERS:
            if len(content) > 1 or name != "EDMPrecond" or file.name.startswith(("edm-", "baseline-")):
                return "edm"
            # SiD's files lie in a folder `alpha1.2`, or have its method in their names
            places = "/".join(file.absolute().parts[-2:])
            if re.search(r"alpha\d", places) or re.search(r"(?<![a-z])sid(?![b-z])", file.name.casefold()):
                return "sid"
            raise ValueError(
                f"`kind` must be given for {str(file)!r}, a lone EDMPrecond: 'edm' for a teacher, 'sid' for a "
                "one-step student."
            )
        raise ValueError(f"`file` {str(file)!r} holds a {name!r}, which is none of {(*EDM_WRAPPERS, *EDM2_WRAPPERS)}.")
    keys = set(content) if isinstance(content, dict) else set()
    if "input_blocks.0.0.weight" in keys:
        return "guided-diffusion"
    if "model.map_layer0.weight" in keys or "conv_in.weight" in keys:
        return "dmd2"
    hints = {
        "fake_unet.": "is the critic of a DMD2 run, which nobody samples from",
        "real_unet.": "is the critic of a DMD2 run, which nobody samples from",
        "lora": "is a LoRA, which diffusers loads itself: `pipe.load_lora_weights`",
    }
    for hint, meaning in hints.items():
        if any(hint in key.casefold() for key in keys if isinstance(key, str)):
            raise ValueError(f"`file` {str(file)!r} {meaning}.")
    raise ValueError(f"`file` {str(file)!r} is readable, but is none of the kinds {KINDS}.")
