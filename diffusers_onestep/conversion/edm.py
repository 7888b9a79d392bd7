"""Networks of EDM, SiD and EDM2: from the options and weights of their pickles."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, UNet2DModel
from diffusers.utils import logging

from ..models import EDM2UNet2DModel
from ..models.unet_edm import ARCHITECTURES
from ..schedulers import EDMHeunScheduler
from ..schedules import VE_SIGMAS, VP_BETA_D, VP_BETA_MIN, VP_STEPS, iddpm_sigmas, vp_sde_alphas_cumprod
from .adm import adm_network
from .kinds import EDM2_WRAPPERS, EDM_WRAPPERS, STUDENT_WRAPPERS
from .networks import Converted, State, load_network
from .options import checked_options
from .pickles import StoredModule

logger = logging.get_logger(__name__)

_VERSION = 6  # of the pickles' layout in all published files
EDM2_LATENTS = """The samples are latents of `stabilityai/sd-vae-ft-mse`, scaled channel by channel, which are decoded
without diffusers' scaling factor:

```python
import torch
from diffusers import AutoencoderKL

vae = AutoencoderKL.from_pretrained("stabilityai/sd-vae-ft-mse")
scale = 0.5 / torch.tensor([4.17, 4.62, 3.71, 3.28]).reshape(4, 1, 1)
bias = -torch.tensor([5.81, 3.25, 0.12, -2.15]).reshape(4, 1, 1) * scale
with torch.no_grad():
    images = vae.decode((latents - bias) / scale).sample.clamp(0, 1)
```"""

STOCK_IN_FLOAT64 = (
    "`UNet2DModel` embeds the timestep in float32, also where the network runs in float64: in float32 it agrees with "
    "the original to rounding, in float64 to about 1e-8 (3e-6 at the timesteps of DDPM); a `Denoiser` calls it so "
    "that it agrees to rounding there too."
)


def edm_network(content: Any, config: dict[str, Any]) -> Converted:
    """The network of a pickle of the EDM family."""
    module = content.get("ema") if isinstance(content, dict) else None
    if not isinstance(module, StoredModule):
        raise ValueError("`file` must be a pickle with a network `ema`, but has none.")
    if module.version != _VERSION:
        logger.warning(
            f"The file's {module.class_name!r} is of version {module.version}, but what is known is version {_VERSION}"
            " of EDM's pickles: compare a few samples with the original's."
        )
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
    notes = [STOCK_IN_FLOAT64] if isinstance(network, UNet2DModel) else []
    if preconditioning == "edm":
        return Converted(network, EDMEulerScheduler(sigma_data=sigma_data), "edm", labels, notes)
    if preconditioning == "ve":
        scheduler = EDMHeunScheduler(VE_SIGMAS[0], preconditioning="ve")
        return Converted(network, scheduler, "ve", labels, notes)
    products = vp_sde_alphas_cumprod() if preconditioning == "vp" else 1 / (1 + iddpm_sigmas() ** 2)
    betas = 1 - products / torch.cat([products.new_ones(1), products[:-1]])
    variance = {"variance_type": "learned_range"} if preconditioning == "iddpm" else {}
    scheduler = DDPMScheduler(trained_betas=betas.tolist(), clip_sample=False, timestep_spacing="trailing", **variance)
    return Converted(network, scheduler, "epsilon", labels, notes)


_IGNORED_OPTIONS = {"use_fp16", "sigma_min", "sigma_max", "epsilon_t"}
_IGNORED_OPTIONS |= {"label_dropout", "logvar_channels", "force_normalization", "use_gan"}
# what our schedules know no other values of
_FIXED_OPTIONS = {"beta_d": VP_BETA_D, "beta_min": VP_BETA_MIN, "M": VP_STEPS, "C_1": 0.001, "C_2": 0.008}
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
    options = checked_options({k: v for k, v in options.items() if k not in _IGNORED_OPTIONS})
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
    sigma_data = _take_common(settings, options, _EDM_NAMES)
    if not isinstance(settings["channel_mult_emb"], int):
        raise ValueError(f"`channel_mult_emb` must be a whole number, but is {settings['channel_mult_emb']!r}.")
    settings["augment_dim"] = options.pop("augment_dim", 0) or 0
    if preconditioning == "iddpm":
        settings["out_channels"] = 2 * settings["in_channels"]
    if not adm:
        given = {"embedding_type": "positional", "channel_mult_noise": 1, "encoder_type": "standard"}
        given |= {"decoder_type": "standard", "resample_filter": (1, 1)}
        given |= {k: options.pop(k) for k in _SONG_NAMES if k in options}
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
    options = checked_options({k: v for k, v in options.items() if k not in _IGNORED_OPTIONS})
    settings: dict[str, Any] = {}
    options.pop("model_type", None)
    if options.pop("resample_filter", (1, 1)) != (1, 1):
        raise ValueError("`resample_filter` of an EDM2 network must be [1, 1].")
    sigma_data = _take_common(settings, options, _EDM2_NAMES)
    if options:
        raise ValueError(f"`file` has options that no network of EDM2 knows: {sorted(map(str, options))}.")
    return settings, sigma_data


def _take_common(settings: dict[str, Any], options: dict[str, Any], names: Mapping[str, str]) -> float:
    """Move what EDM and EDM2 have in common from the options to the settings; returns `sigma_data`."""
    for key in _FIXED_OPTIONS.keys() & options.keys():
        if (value := options.pop(key)) != _FIXED_OPTIONS[key]:
            raise ValueError(f"`file` must have {_FIXED_OPTIONS[key]} as its option {key!r}, but has {value!r}.")
    for key in ("img_resolution", "img_channels"):
        if key not in options:
            raise ValueError(f"`file` must state the option {key!r}, but does not.")
    channels = options.pop("img_channels")
    settings |= {"in_channels": channels, "out_channels": channels}
    settings["num_class_embeds"] = options.pop("label_dim", 0) or None
    settings |= {names[k]: options.pop(k) for k in list(options) if k in names}
    return float(options.pop("sigma_data", 0.5))
