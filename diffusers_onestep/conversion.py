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
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, EDMEulerScheduler, UNet2DModel
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .checkpoints import StoredModule, first_line, read_checkpoint
from .files import write_json
from .models import EDM2UNet2DModel, EDMUNet2DModel
from .models.unet_edm import ARCHITECTURES, resample_kernel
from .pipelines import OneStepPipeline
from .schedulers import EDMHeunScheduler, student_scheduler
from .schedules import VE_SIGMAS, VP_BETA_D, VP_BETA_MIN, VP_STEPS, iddpm_sigmas, vp_sde_alphas_cumprod

State = dict[str, torch.Tensor]

KINDS = ("edm", "edm2", "guided-diffusion", "sid", "dmd2")
LICENCES = {
    "edm": ("cc-by-nc-sa-4.0", "EDM's weights are CC BY-NC-SA 4.0."),
    "edm2": ("cc-by-nc-sa-4.0", "EDM2's weights are CC BY-NC-SA 4.0."),
    "guided-diffusion": ("mit", "OpenAI's guided-diffusion weights are MIT."),
    "sid": ("apache-2.0", "SiD's model card says Apache-2.0; its teachers, EDM's weights, are CC BY-NC-SA 4.0."),
    "dmd2": ("cc-by-nc-4.0", "DMD2's weights are CC BY-NC 4.0."),
}
SID_SIGMA, DMD2_SIGMA = 2.5, 80.0
EDM_WRAPPERS = {"EDMPrecond": "edm", "VPPrecond": "vp", "VEPrecond": "ve", "iDDPMPrecond": "iddpm"}
STUDENT_WRAPPERS = ("EDMPrecond_EncoderDecoder", "EDM_2_Precond_EncoderDecoder", "EDM_2_Precond_Generator")
EDM2_WRAPPERS = ("Precond", *STUDENT_WRAPPERS[1:])
# DMD2's ImageNet-64 student is EDM's network
DMD2_IMAGENET = {
    "img_resolution": 64,
    "img_channels": 3,
    "label_dim": 1000,
    "model_type": "DhariwalUNet",
    "dropout": 0.0,
}
# by (num_channels, channel_mult, num_res_blocks): what the files of guided-diffusion do not say themselves
GUIDED_DIFFUSION = {
    (192, (1, 2, 3, 4), 3): {"image_size": 64, "new_attention_order": True, "noise_schedule": "cosine"},
    (256, (1, 1, 2, 3, 4), 2): {"image_size": 128, "num_heads": 4},
    (256, (1, 1, 2, 2, 4, 4), 2): {"image_size": 256},
    (256, (0.5, 1, 1, 2, 2, 4, 4), 2): {"image_size": 512},
}


@dataclass
class Converted:
    """A network and what it is sampled with.

    Attributes:
        network (`ModelMixin`): with the file's weights, in float32.
        scheduler (`SchedulerMixin`): of a teacher, or of the teacher that a student came from.
        prediction_type (`str`): what the network predicts.
        labels (`int`): how many class labels there are to ask for, 0 if none.
    """

    network: ModelMixin
    scheduler: SchedulerMixin
    prediction_type: str
    labels: int = 0
    notes: list[str] = field(default_factory=list)


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
        except Exception as error:  # options of a hostile file can raise anything
            if isinstance(error, ValueError) and str(error).startswith("`"):
                raise  # says what must be
            raise ValueError(
                f"`file` {str(file)!r} holds no network of the kind {kind!r}: {first_line(error)}."
            ) from error
        pipeline, notes = pipeline_of(converted, kind), converted.notes
    beside = out.with_name(f".{out.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        pipeline.save_pretrained(beside, safe_serialization=True)
        name, sentence = LICENCES[kind]
        write_json(
            beside / "conversion.json",
            {"kind": kind, "file": file.name, "sha256": digest(file), "license": name, "license_note": sentence},
        )
        (beside / "README.md").write_text(card(pipeline, kind, file.name, out.name, notes))
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return kind


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
            if "alpha" in str(file.absolute()) or "sid" in file.name.casefold():
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


# EDM, SiD, EDM2


def edm_network(content: Any, config: dict[str, Any]) -> Converted:
    """The network of a pickle of the EDM family."""
    module = content.get("ema") if isinstance(content, dict) else None
    if not isinstance(module, StoredModule):
        raise ValueError("`file` must be a pickle with a network `ema`, but has none.")
    state = module.state_dict()
    options = module.options() | config
    if "model_type" not in options:
        inner = (module.state.get("_modules") or {}).get("model")
        if isinstance(inner, StoredModule):
            options["model_type"] = inner.class_name
    return network_from_edm(module.class_name, options, state)


def network_from_edm(wrapper: str, options: Mapping[str, Any], state: State) -> Converted:
    """The network that a wrapper's class name and options describe, with the weights of its state dict (original
    names, prefix included).

    ADM networks that `UNet2DModel` states exactly become one; all others are an `EDMUNet2DModel` or
    `EDM2UNet2DModel`, whose parameter names are the original ones without their prefix.
    """
    if wrapper in EDM2_WRAPPERS:
        settings, sigma_data = edm2_settings(options)
        state = {k.removeprefix("unet."): v for k, v in state.items() if not k.startswith("logvar_")}
        network = load_network(EDM2UNet2DModel, settings, state)
        notes = [EDM2_LATENTS] if settings["in_channels"] == 4 else []
        labels = settings["num_class_embeds"] or 0
        return Converted(network, EDMEulerScheduler(sigma_data=sigma_data), "edm", labels, notes)
    preconditioning = EDM_WRAPPERS.get("EDMPrecond" if wrapper == STUDENT_WRAPPERS[0] else wrapper)
    if preconditioning is None:
        raise ValueError(f"`file` holds a {wrapper!r}, which is none of {(*EDM_WRAPPERS, *EDM2_WRAPPERS)}.")
    settings, sigma_data = edm_settings(options, preconditioning)
    levels = state.get("u")
    if preconditioning == "iddpm" and levels is not None:
        expected = iddpm_sigmas().flip(0)
        if levels.numel() != 1001 or not torch.allclose(levels.flatten()[:-1].double(), expected, rtol=2e-3):
            raise ValueError("`file` has other noise levels `u` than those of 1000 iDDPM steps.")
    state = {k.removeprefix("model."): v for k, v in state.items() if k != "u"}
    network = adm_network(settings, state)
    labels = settings["num_class_embeds"] or 0
    if preconditioning == "edm":
        return Converted(network, EDMEulerScheduler(sigma_data=sigma_data), "edm", labels)
    if preconditioning == "ve":
        scheduler = EDMHeunScheduler(VE_SIGMAS[0], preconditioning="ve")
        return Converted(network, scheduler, "ve", labels)
    products = vp_sde_alphas_cumprod() if preconditioning == "vp" else 1 / (1 + iddpm_sigmas() ** 2)
    betas = 1 - products / torch.cat([products.new_ones(1), products[:-1]])
    variance = {"variance_type": "learned_range"} if preconditioning == "iddpm" else {}
    scheduler = DDPMScheduler(trained_betas=betas.tolist(), clip_sample=False, timestep_spacing="trailing", **variance)
    return Converted(network, scheduler, "epsilon", labels)


_IGNORED_OPTIONS = {"use_fp16", "sigma_min", "sigma_max", "epsilon_t"}
_IGNORED_OPTIONS |= {"label_dropout", "logvar_channels", "force_normalization", "use_gan"}
# what our schedules know no other values of
_FIXED_OPTIONS = {"beta_d": VP_BETA_D, "beta_min": VP_BETA_MIN, "M": VP_STEPS, "C_1": 0.001, "C_2": 0.008}
# numbers that no shape of a tensor tells, and their range
_NUMBERS = {"sigma_data": (1e-3, 1e3), "dropout": (0, 1), "clip_act": (1e-3, 1e6)}
_NUMBERS |= dict.fromkeys(("label_balance", "concat_balance", "res_balance", "attn_balance"), (0, 1))
# option of EDM's and EDM2's constructors: name in our configs
_EDM_NAMES = {
    "img_resolution": "sample_size",
    "model_channels": "model_channels",
    "channel_mult": "channel_mult",
    "channel_mult_emb": "channel_mult_emb",
    "num_blocks": "layers_per_block",
    "attn_resolutions": "attention_resolutions",
    "dropout": "dropout",
}
_SONG_NAMES = ("embedding_type", "channel_mult_noise", "encoder_type", "decoder_type", "resample_filter")
_EDM2_NAMES = _EDM_NAMES | {"channels_per_head": "attention_head_dim", "channel_mult_noise": "channel_mult_noise"}
_EDM2_NAMES |= {k: k for k in ("label_balance", "concat_balance", "res_balance", "attn_balance", "clip_act")}


def edm_settings(options: Mapping[str, Any], preconditioning: str) -> tuple[dict[str, Any], float]:
    """Config of an `EDMUNet2DModel`, and `sigma_data`, from the options of a wrapper of EDM."""
    options = dict(options)
    default = "SongUNet" if preconditioning in ("vp", "ve") else "DhariwalUNet"
    kind = str(options.pop("model_type", default)).removesuffix("_EncoderDecoder")
    if kind not in ("SongUNet", "DhariwalUNet"):
        raise ValueError(f"`model_type` must be 'SongUNet' or 'DhariwalUNet', but is {kind!r}.")
    adm = kind == "DhariwalUNet"
    if adm:
        settings = {"architecture": "adm", "model_channels": 192, "channel_mult": (1, 2, 3, 4), "layers_per_block": 3}
        settings |= {"attention_resolutions": (32, 16, 8)}
    else:
        settings = {"architecture": "ddpmpp", "model_channels": 128, "channel_mult": (1, 2, 2, 2)}
        settings |= {"layers_per_block": 4, "attention_resolutions": (16,)}
    settings |= {"channel_mult_emb": 4, "dropout": 0.1}
    sigma_data = _common(settings, options, _EDM_NAMES)
    settings["augment_dim"] = int(options.pop("augment_dim", 0) or 0)
    if preconditioning == "iddpm":
        settings["out_channels"] = 2 * settings["in_channels"]
    if not adm:
        given = {"embedding_type": "positional", "channel_mult_noise": 1, "encoder_type": "standard"}
        given |= {"decoder_type": "standard", "resample_filter": (1, 1)}
        given |= {k: _plain(options.pop(k)) for k in _SONG_NAMES if k in options}
        ncsnpp = ARCHITECTURES["ncsnpp"]
        settings["decoder_type"] = given.pop("decoder_type")
        named = ("embedding", "noise_channels", "encoder", "taps")
        if tuple(given.values()) == tuple(ncsnpp[k] for k in named):
            settings["architecture"] = "ncsnpp"
        elif tuple(given.values()) != tuple(ARCHITECTURES["ddpmpp"][k] for k in named):
            settings |= given
    if options:
        raise ValueError(f"`file` has options that no network of EDM knows: {sorted(map(str, options))}.")
    return settings, sigma_data


def edm2_settings(options: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
    """Config of an `EDM2UNet2DModel`, and `sigma_data`, from the options of a wrapper of EDM2."""
    options, settings = dict(options), {}
    options.pop("model_type", None)
    if tuple(options.pop("resample_filter", (1, 1))) != (1, 1):
        raise ValueError("`resample_filter` of an EDM2 network must be [1, 1].")
    sigma_data = _common(settings, options, _EDM2_NAMES)
    if options:
        raise ValueError(f"`file` has options that no network of EDM2 knows: {sorted(map(str, options))}.")
    return settings, sigma_data


def _common(settings: dict[str, Any], options: dict[str, Any], names: Mapping[str, str]) -> float:
    for key in _IGNORED_OPTIONS & options.keys():
        del options[key]
    for key in _FIXED_OPTIONS.keys() & options.keys():
        if (value := _plain(options.pop(key))) != _FIXED_OPTIONS[key]:
            raise ValueError(f"`file` must have {_FIXED_OPTIONS[key]} as its option {key!r}, but has {value!r}.")
    for key in _NUMBERS.keys() & options.keys():
        value, (low, high) = _plain(options[key]), _NUMBERS[key]
        if not isinstance(value, (int, float)) or not low <= value <= high:
            raise ValueError(f"`file` must have a number in [{low}, {high}] as its option {key!r}, but has {value!r}.")
    for key in ("img_resolution", "img_channels"):
        if key not in options:
            raise ValueError(f"`file` must state the option {key!r}, but does not.")
    channels = _plain(options.pop("img_channels"))
    settings |= {"in_channels": channels, "out_channels": channels}
    settings["num_class_embeds"] = _plain(options.pop("label_dim", 0)) or None
    settings |= {names[k]: _plain(options.pop(k)) for k in list(options) if k in names}
    return float(_plain(options.pop("sigma_data", 0.5)))


def _plain(value: Any) -> Any:
    """A number, a short text or a tuple of numbers: what options may be."""
    if isinstance(value, (list, tuple)) and len(value) <= 16:
        return tuple(_plain(v) for v in value) if not any(isinstance(v, (list, tuple)) for v in value) else None
    if isinstance(value, (int, float, type(None))) or (isinstance(value, str) and len(value) < 40):
        return value
    raise ValueError(f"`file` has an option that is a {type(value).__name__}.")


# weights


def load_network(cls: type[ModelMixin], settings: Mapping[str, Any], state: State) -> ModelMixin:
    """A network of `cls` with the weights of `state`, whose names and shapes are compared exactly first.

    Resampling filters are no weights: they are compared with the config's and dropped.
    """
    _check_size(settings, state)
    with torch.device("meta"):
        expected = cls(**settings).state_dict()
    filters = {k for k in state if k.endswith("resample_filter")}
    taps = settings.get("resample_filter") or ARCHITECTURES[settings.get("architecture", "ddpmpp")]["taps"]
    kernel = resample_kernel(tuple(taps))
    for key in filters:
        if state[key].shape != kernel.shape or not torch.allclose(state[key].float(), kernel, atol=1e-3):
            raise ValueError(f"`file` does not fit its config: {key!r} is not the filter of the taps {tuple(taps)}.")
    state = {k: v for k, v in state.items() if k not in filters}
    check_state(state, expected)
    network = cls(**settings)
    network.load_state_dict({k: v.float() for k, v in state.items()})
    return network.eval()


def _check_size(settings: Mapping[str, Any], state: State) -> None:
    # a config may state anything: nothing is built that has more parts than the file has tensors
    levels, blocks = settings.get("channel_mult", (1, 2, 3, 4)), settings.get("layers_per_block", 3)
    size = settings.get("sample_size")
    whole = (blocks, size, settings["in_channels"], settings.get("model_channels", 1))
    if not all(isinstance(n, int) and 0 < n < 1 << 20 for n in whole) or not isinstance(levels, tuple) or not levels:
        raise ValueError(f"`file` has a config of unusable sizes: {dict(settings)}.")
    if len(levels) * blocks > len(state):
        raise ValueError(f"`file` does not fit its config: {len(state)} tensors for {len(levels)} x {blocks} blocks.")


def check_state(state: State, expected: Mapping[str, torch.Tensor]) -> None:
    """Raise a `ValueError` that names the first tensor that is missing, unknown or of another shape."""
    for key in (*expected, *state):
        given, wanted = (tuple(d[key].shape) if key in d else "none" for d in (state, expected))
        if given != wanted:
            raise ValueError(f"`file` does not fit its config: {key!r} must be {wanted}, but is {given}.")


def adm_network(settings: Mapping[str, Any], state: State) -> ModelMixin:
    """An `EDMUNet2DModel`, or a stock `UNet2DModel` if that is the same network."""
    stock = stock_settings(settings)
    if stock is None:
        return load_network(EDMUNet2DModel, settings, state)
    _check_size(settings, state)
    with torch.device("meta"):
        expected = EDMUNet2DModel(**settings).state_dict()
    state = {k: v for k, v in state.items() if not k.endswith("resample_filter")}
    check_state(state, expected)
    network = UNet2DModel(**stock)
    network.load_state_dict(adm_to_stock(settings, state))
    return network.eval()


def stock_settings(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Config of the `UNet2DModel` that states an ADM network exactly; None if there is none."""
    mult, channels = settings["channel_mult"], settings["model_channels"]
    widths = [int(channels * m) for m in mult]
    sizes = [settings["sample_size"] >> level for level in range(len(mult))]
    attends = [size in settings["attention_resolutions"] for size in sizes]
    exact = (
        settings["architecture"] == "adm"
        and not settings.get("augment_dim")
        and settings.get("num_attention_heads") is None
        and all(width % 64 == 0 and width >= 128 for width in widths)  # 32 groups, heads of 64 channels
        and widths[0] == channels
        and settings["channel_mult_emb"] == 4
    )
    if not exact:
        return None
    labels = settings["num_class_embeds"]
    return {
        "sample_size": settings["sample_size"],
        "in_channels": settings["in_channels"],
        "out_channels": settings["out_channels"],
        "block_out_channels": widths,
        "layers_per_block": settings["layers_per_block"],
        "down_block_types": ["AttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attends],
        "up_block_types": ["AttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in reversed(attends)],
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attention_head_dim": 64,
        "norm_num_groups": 32,
        "attn_norm_num_groups": 32,
        "norm_eps": 1e-5,
        "time_embedding_type": "positional",
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "dropout": settings["dropout"],
        "num_class_embeds": labels + 1 if labels else None,
    }


_RESNET = {"norm0": "norm1", "conv0": "conv1", "affine": "time_emb_proj", "norm1": "norm2", "conv1": "conv2"}
_RESNET |= {"skip": "conv_shortcut"}
_ATTENTION = {"norm2": "group_norm", "proj": "to_out.0"}


def adm_to_stock(settings: Mapping[str, Any], state: State) -> State:
    """Weights of an ADM network by EDM's names to those of a `UNet2DModel`; the class table gets a zero row, the null
    label."""
    size, levels = settings["sample_size"], len(settings["channel_mult"])
    outer = {"map_layer0": "time_embedding.linear_1", "map_layer1": "time_embedding.linear_2"}
    outer |= {"out_norm": "conv_norm_out", "out_conv": "conv_out", f"enc.{size}x{size}_conv": "conv_in"}
    stock: State = {}
    for key, value in state.items():
        value = value.float()
        name, _, kind = key.rpartition(".")
        if name == "map_label":
            stock["class_embedding.weight"] = torch.cat([value.T, value.new_zeros(1, len(value))])
            continue
        if name in outer:
            stock[f"{outer[name]}.{kind}"] = value
            continue
        side, block, part = name.split(".")
        resolution, _, role = block.partition("_")
        level = (size // int(resolution.partition("x")[0])).bit_length() - 1
        up = levels - 1 - level
        if role in ("in0", "in1"):
            resnet, attention = f"mid_block.resnets.{role[2]}", "mid_block.attentions.0"
        elif role == "down":
            resnet, attention = f"down_blocks.{level - 1}.downsamplers.0", ""
        elif role == "up":
            resnet, attention = f"up_blocks.{up - 1}.upsamplers.0", ""
        else:
            place = f"down_blocks.{level}" if side == "enc" else f"up_blocks.{up}"
            resnet, attention = (f"{place}.{parts}.{role[5:]}" for parts in ("resnets", "attentions"))
        if part == "qkv":
            rows = value.reshape(-1, 3, *value.shape[1:2]) if kind == "weight" else value.reshape(-1, 3)
            for j, target in enumerate(("to_q", "to_k", "to_v")):
                stock[f"{attention}.{target}.{kind}"] = rows[:, j].contiguous()
        elif part in _ATTENTION:
            value = value.flatten(1) if part == "proj" and kind == "weight" else value
            stock[f"{attention}.{_ATTENTION[part]}.{kind}"] = value
        else:
            stock[f"{resnet}.{_RESNET[part]}.{kind}"] = value
    return stock


# guided-diffusion and DMD2


def guided_diffusion_network(content: Any, config: dict[str, Any]) -> Converted:
    """A network of OpenAI's guided-diffusion: its shape is read from the tensors, the rest is that of the published
    file of this shape, or of `config` (`image_size`, `num_heads` or `num_head_channels`, `use_new_attention_order`,
    `noise_schedule`, `attention_resolutions`, `dropout`)."""
    state: State = {k: v for k, v in content.items() if isinstance(v, torch.Tensor)}
    if "time_embed.0.weight" not in state or "input_blocks.0.0.weight" not in state:
        raise ValueError("`file` must be a state dict of guided-diffusion, but is not.")
    channels = state["time_embed.0.weight"].shape[1]
    mult, blocks = _guided_levels(state, channels)
    names = {"use_new_attention_order": "new_attention_order", "attention_resolutions": "attention"}
    known = {"image_size", "num_heads", "num_head_channels", "noise_schedule", "dropout", *names}
    if unknown := config.keys() - known:
        raise ValueError(f"`config` must have keys of {sorted(known)}, but has {sorted(unknown)}.")
    published = GUIDED_DIFFUSION.get((channels, mult, blocks), {})
    flags = published | {names.get(k, k): v for k, v in config.items()}
    if "image_size" not in flags:
        raise ValueError(
            f"`config` must be given for a network of {channels} channels, levels {mult} and {blocks} blocks, which "
            f"is none of the published ones: with `image_size`, and others of {sorted(known)}."
        )
    attention = flags.get("attention", (32, 16, 8))
    if isinstance(attention, str):
        attention = tuple(int(n) for n in attention.split(","))
    out_channels, in_channels = state["out.2.weight"].shape[0], state["input_blocks.0.0.weight"].shape[1]
    if out_channels != 2 * in_channels and not config:
        raise ValueError(
            f"`file` must be a guided-diffusion network with a learned variance, but has {out_channels} outputs: "
            "consistency models and classifiers are not converted."
        )
    if flags.get("num_head_channels", 64) != 64:
        raise ValueError(f"`num_head_channels` must be 64, but is {flags['num_head_channels']}.")
    settings = {
        "sample_size": flags["image_size"],
        "in_channels": in_channels,
        "out_channels": out_channels,
        "architecture": "adm",
        "model_channels": channels,
        "channel_mult": mult,
        "channel_mult_emb": 4,
        "layers_per_block": blocks,
        "attention_resolutions": tuple(attention),
        "num_attention_heads": flags.get("num_heads"),
        "dropout": flags.get("dropout", 0.0),
        "num_class_embeds": state["label_emb.weight"].shape[0] if "label_emb.weight" in state else None,
    }
    _check_size(settings, state)
    renamed = guided_to_edm(settings, state, bool(flags.get("new_attention_order")))
    cosine = flags.get("noise_schedule", "linear") == "cosine"
    scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2" if cosine else "linear",
        variance_type="learned_range" if out_channels == 2 * in_channels else "fixed_small",
        timestep_spacing="trailing",
    )
    return Converted(adm_network(settings, renamed), scheduler, "epsilon", settings["num_class_embeds"] or 0)


def _guided_levels(state: State, channels: int) -> tuple[tuple[float, ...], int]:
    """`channel_mult` and blocks per level: every level but one has an upsampling block after its last one."""
    names = [key.split(".") for key in state if key.endswith(".in_layers.0.weight")]
    levels = 1 + sum(name[0] == "output_blocks" and name[2] != "0" for name in names)
    count = 1 + sum(name[0] == "input_blocks" for name in names)
    convolutions = [f"input_blocks.{k}.0.out_layers.3.weight" for k in range(1, count)]
    blocks = count // levels - 1  # the convolution or a downsampling block goes before those of a level
    if count % levels or blocks < 1 or not all(key in state for key in convolutions):
        raise ValueError(
            "`file` must be a U-Net of guided-diffusion with residual resampling, but its blocks are others."
        )
    mult = [state[key].shape[0] / channels for key in convolutions[:: blocks + 1]]
    return tuple(int(m) if m == int(m) else m for m in mult), blocks


_GUIDED_RESNET = {"in_layers.0": "norm0", "in_layers.2": "conv0", "emb_layers.1": "affine", "out_layers.0": "norm1"}
_GUIDED_RESNET |= {"out_layers.3": "conv1", "skip_connection": "skip"}
_GUIDED_ATTENTION = {"norm": "norm2", "qkv": "qkv", "proj_out": "proj"}


def guided_to_edm(settings: Mapping[str, Any], state: State, new_order: bool) -> State:
    """Weights by guided-diffusion's names to EDM's, rows of the attention in EDM's order."""
    size, blocks, levels = settings["sample_size"], settings["layers_per_block"], len(settings["channel_mult"])
    sizes = [size >> level for level in range(levels)]
    encoder, decoder = [f"enc.{size}x{size}_conv"], []
    for level, own in enumerate(sizes):
        encoder += [f"enc.{own}x{own}_down"] * bool(level) + [f"enc.{own}x{own}_block{i}" for i in range(blocks)]
    for own in reversed(sizes):
        decoder += [f"dec.{own}x{own}_block{i}" for i in range(blocks + 1)]
    outer = {"time_embed.0": "map_layer0", "time_embed.2": "map_layer1", "out.0": "out_norm", "out.2": "out_conv"}
    outer["input_blocks.0.0"] = encoder[0]
    renamed: State = {}
    for key, value in state.items():
        value = value.float()
        name, _, kind = key.rpartition(".")
        if key == "label_emb.weight":
            renamed["map_label.weight"] = value.T.contiguous()
            continue
        if name in outer:
            renamed[f"{outer[name]}.{kind}"] = value
            continue
        side, place, *rest = name.split(".")
        if side == "middle_block":
            block, rest = f"dec.{sizes[-1]}x{sizes[-1]}_in{1 if place == '2' else 0}", rest
        elif side in ("input_blocks", "output_blocks"):
            block = (encoder if side == "input_blocks" else decoder)[int(place)]
            if side == "output_blocks" and rest[0] != "0" and rest[1] not in _GUIDED_ATTENTION:
                resolution = 2 * int(block.partition("x")[0][4:])
                block = f"dec.{resolution}x{resolution}_up"  # EDM counts it to the next level
            rest = rest[1:]
        else:
            raise ValueError(f"`file` has a tensor {key!r} that no U-Net of guided-diffusion knows.")
        part = _GUIDED_RESNET.get(".".join(rest)) or _GUIDED_ATTENTION.get(".".join(rest))
        if part is None:
            raise ValueError(f"`file` has a tensor {key!r} that no U-Net of guided-diffusion knows.")
        if part in ("qkv", "proj") and kind == "weight":
            value = value.reshape(*value.shape[:2], 1, 1)  # of a Conv1d
        if part == "qkv":
            width = len(value) // 3
            heads = settings["num_attention_heads"] or width // 64
            tail = value.shape[1:]
            order = (3, heads, -1, *tail) if new_order else (heads, 3, -1, *tail)
            rows = value.reshape(order)
            rows = rows.permute(1, 2, 0, *range(3, rows.ndim)) if new_order else rows.transpose(1, 2)
            value = rows.reshape(3 * width, *tail)
        renamed[f"{block}.{part}.{kind}"] = value
    return renamed


def dmd2_imagenet_network(content: Any, config: dict[str, Any]) -> Converted:
    """DMD2's ImageNet-64 student: EDM's network by its own names, without options in the file."""
    state = {k: v for k, v in content.items() if isinstance(v, torch.Tensor)}
    return network_from_edm("EDMPrecond", DMD2_IMAGENET | config, state)


def text_student(
    state: State, file: Path, base: str | os.PathLike | None, student_timesteps: list[float] | None
) -> DiffusionPipeline:
    """A base pipeline with DMD2's U-Net, and a scheduler that starts where the student does."""
    if base is None:
        raise ValueError(
            "`base` must be the pipeline that this U-Net belongs to (Stable Diffusion XL or 1.5, a folder or a Hub "
            "id), but is None."
        )
    if student_timesteps is None:
        name = str(file.absolute()).casefold()
        known = {"4step": [999, 749, 499, 249], "1step": [399], "sdv1.5": [999]}
        student_timesteps = next((steps for part, steps in known.items() if part in name), None)
        if student_timesteps is None:
            raise ValueError(
                f"`student_timesteps` must be given for {str(file)!r}: its name has none of {sorted(known)}."
            )
    state = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
    pipeline = DiffusionPipeline.from_pretrained(base, use_safetensors=True)
    check_state(state, pipeline.unet.state_dict())
    pipeline.unet.load_state_dict({k: v.float() for k, v in state.items()})
    scheduler = student_scheduler(pipeline.scheduler, "epsilon", student_timesteps, 1.0)
    pipeline.register_modules(scheduler=scheduler)
    return pipeline


# the folder


def pipeline_of(converted: Converted, kind: str) -> OneStepPipeline:
    """A teacher with its scheduler, or a student with the level that it starts from."""
    scheduler = converted.scheduler
    if kind in ("sid", "dmd2"):
        sigma = SID_SIGMA if kind == "sid" else DMD2_SIGMA
        if converted.prediction_type != "edm":
            raise ValueError(f"`kind` {kind!r} must be an EDM network, but predicts {converted.prediction_type!r}.")
        t = EDMHeunScheduler().schedule.c_noise(torch.tensor(sigma)).item()
        scheduler = student_scheduler(scheduler, "edm", [t], sigma)
    id2label = {i: str(i) for i in range(converted.labels)} or None
    return OneStepPipeline(converted.network, scheduler, id2label)


EDM2_LATENTS = (
    "The samples are latents of `stabilityai/sd-vae-ft-mse`, scaled channel by channel: `raw = (latent - bias) / "
    "scale` with `scale = 0.5 / [4.17, 4.62, 3.71, 3.28]` and `bias = -[5.81, 3.25, 0.12, -2.15] * scale`; "
    "`vae.decode(raw)`, without diffusers' scaling factor, gives images in [0, 1]."
)


def digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def card(pipeline: DiffusionPipeline, kind: str, file: str, name: str, notes: list[str]) -> str:
    """README.md of a converted folder."""
    licence, sentence = LICENCES[kind]
    student = kind in ("sid", "dmd2")
    labelled = bool(getattr(pipeline, "num_labels", None))
    if student:
        asked = "class_labels=[0, 1]" if labelled else "batch_size=2"
        asked = asked if isinstance(pipeline, OneStepPipeline) else 'prompt="a photo of a cat"'
        use = f'pipe = OneStepPipeline.from_pretrained("{name}")\nimages = pipe({asked}).images'
    else:
        asked = "teacher.encode([0] * 8), " if labelled else ""
        use = f'teacher = Teacher.from_pretrained("{name}")\nnoise = torch.randn(8, *teacher.sample_shape)\n'
        use += f"x0 = teacher.sample(noise, {asked}num_inference_steps=18)"
    classes = "OneStepPipeline" if student else "Teacher"
    scheduler = {k: v for k, v in pipeline.scheduler.config.items() if not k.startswith("_") and k != "trained_betas"}
    text = "\n\n".join(notes)
    return f"""---
library_name: diffusers
license: {licence}
tags: [diffusers-onestep, {kind}, {"one-step" if student else "teacher"}]
---

# {name}

Converted from `{file}` by `onestep convert` ({kind}). {sentence} A converted model keeps the licence of its weights.

```python
import torch
from diffusers_onestep import {classes}

{use}
```

`{type(pipeline.unet).__name__}`, {sum(p.numel() for p in pipeline.unet.parameters()):,} parameters, float32;
`{type(pipeline.scheduler).__name__}`: `{json.dumps(scheduler, default=str)}`

{text}
"""
