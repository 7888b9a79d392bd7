"""How each kind of network is called with `(x_t, t, cond)`: its own names and layouts for what all of them take; and
what shape of samples it takes."""

import inspect
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate.utils import extract_model_from_parallel
from diffusers.models.embeddings import Timesteps
from torch import nn

from .models.unet_edm import PositionalEmbedding


def network_output(network: nn.Module, sample: torch.Tensor, t: torch.Tensor, cond: dict[str, Any]) -> torch.Tensor:
    """The output `(B, C, H, W)` of any diffusers network.

    Args:
        network (`nn.Module`): a diffusers model, compiled or wrapped or not, or `(x_t, t, **cond)`.
        sample (`torch.Tensor`): `(B, C, H, W)`, in the network's dtype.
        t (`torch.Tensor`): `(B,)`, in the unit of the teacher's scheduler.
        cond (`dict` of tensors): flat; what a family nests (SDXL's `text_embeds` and `time_ids`) is nested here.
    """
    if network not in _known:
        _known[network] = _call_of(network)
    output = _known[network](network, sample, t, dict(cond))
    return output if isinstance(output, torch.Tensor) else output[0]


_known: WeakKeyDictionary[nn.Module, Callable] = WeakKeyDictionary()  # it takes milliseconds to find out


def _call_of(network: nn.Module) -> Callable:
    bare = extract_model_from_parallel(network, keep_torch_compile=False)
    own = (_CALLS[cls.__name__] for cls in type(bare).__mro__ if cls.__name__ in _CALLS)
    named = "timestep" in inspect.signature(network.forward).parameters
    return next(own, _by_name if named else _by_place)


def sample_shape_of(network: nn.Module) -> tuple[int, int, int]:
    """`(C, H, W)` of the samples that a network was made for, from its diffusers config.

    Raises:
        ValueError: if it has none.
    """
    config = getattr(network, "config", None)
    if config is None:
        raise ValueError("`sample_shape` must be given for a teacher whose network has no diffusers config.")
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return config.in_channels, height, width


def execution_device(network: nn.Module) -> torch.device:
    """Where a call of the network computes: the device of its weights, or the one that an offloading hook takes them
    to."""
    return getattr(getattr(network, "_hf_hook", None), "execution_device", None) or next(network.parameters()).device


def _by_name(network, sample, t, cond):
    return network(sample, timestep=t, **cond)


def _by_place(network, sample, t, cond):
    return network(sample, t, **cond)


def _unet_2d(network, sample, t, cond):
    """Of float64 samples: with the timestep's embedding in float64 too, which diffusers computes in float32."""
    bare = extract_model_from_parallel(network, keep_torch_compile=False)
    if sample.dtype != torch.float64 or t.dtype != torch.float64 or not isinstance(bare.time_proj, Timesteps):
        return _by_place(network, sample, t, cond)
    stock = bare.time_proj
    exact = PositionalEmbedding(stock.num_channels, stock.downscale_freq_shift)
    half = stock.num_channels // 2

    def embed(module, args, output):
        cos_sin = exact(args[0])
        return cos_sin if stock.flip_sin_to_cos else cos_sin.roll(half, 1)

    hook = stock.register_forward_hook(embed)
    try:
        return _by_place(network, sample, t, cond)
    finally:
        hook.remove()


def _unet(network, sample, t, cond):
    added = {k: cond.pop(k) for k in ("text_embeds", "time_ids") if k in cond}
    return network(sample, t, **cond, added_cond_kwargs=added or None)


def _pixart(network, sample, t, cond):
    added = {k: cond.pop(k, None) for k in ("resolution", "aspect_ratio")}
    return network(sample, timestep=t, **cond, added_cond_kwargs=added)


def _sana(network, sample, t, cond):
    return network(sample, timestep=t * network.config.timestep_scale, **cond)


def _flux(network, sample, t, cond):
    """2 x 2 latents make a token; `t` is counted to 1; positions of text are all zero."""
    from diffusers import FluxPipeline

    batch_size, channels, height, width = sample.shape
    ids = FluxPipeline._prepare_latent_image_ids(batch_size, height // 2, width // 2, sample.device, sample.dtype)
    output = network(
        FluxPipeline._pack_latents(sample, batch_size, channels, height, width),
        timestep=t / 1000,
        img_ids=ids,
        txt_ids=ids.new_zeros(cond["encoder_hidden_states"].shape[1], 3),
        **cond,
    )
    return FluxPipeline._unpack_latents(output[0], height, width, 1)


_CALLS = {
    "UNet2DModel": _unet_2d,
    "UNet2DConditionModel": _unet,
    "PixArtTransformer2DModel": _pixart,
    "SanaTransformer2DModel": _sana,
    "FluxTransformer2DModel": _flux,
}
