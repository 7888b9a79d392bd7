"""Networks that diffusers does not have, and networks of random weights for students of other architectures."""

import copy
from typing import Any

import diffusers
import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from .prompted_unet import PromptedUNet
from .unet_edm import EDMUNet2DModel
from .unet_edm2 import EDM2UNet2DModel, MPConv
from .unet_space_to_depth import SpaceToDepthUNet2DModel

__all__ = [
    "EDM2UNet2DModel",
    "EDMUNet2DModel",
    "PromptedUNet",
    "SpaceToDepthUNet2DModel",
    "cast",
    "has_train_mode",
    "network_from_config",
    "set_dropout",
    "shrunk",
    "without_variance",
]


def network_from_config(config: dict[str, Any]) -> ModelMixin:
    """A diffusers model of random weights.

    Args:
        config (`dict`): as in a model's `config.json`; `_class_name` is a class of diffusers or of this package.

    Raises:
        ValueError: if there is no such model.
    """
    name = config.get("_class_name")
    cls = globals().get(str(name)) or getattr(diffusers, str(name), None)
    if not (isinstance(cls, type) and issubclass(cls, ModelMixin)):
        raise ValueError(f"`_class_name` of the student's config must be a model of diffusers, but is {name!r}.")
    # diffusers would ignore the values that it marks as defaults, changed or not
    return cls.from_config({key: value for key, value in config.items() if key != "_use_default_values"})


def cast(network: nn.Module, dtype: torch.dtype) -> None:
    """The weights of a network in another dtype, but for the parts that it names to be kept in float32, as diffusers
    loads them."""
    kept = set(getattr(network, "_keep_in_fp32_modules", None) or ())
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if tensor.is_floating_point() and not kept & set(name.split(".")):
            tensor.data = tensor.data.to(dtype)


def has_train_mode(network: nn.Module) -> bool:
    """Whether train mode changes a network: by dropout, its own or an adapter's, or by normalising its weights."""
    own = getattr(network, "config", {}).get("dropout") != 0.0
    return own or any(isinstance(m, MPConv) or (isinstance(m, nn.Dropout) and m.p > 0) for m in network.modules())


def set_dropout(network: nn.Module, probability: float) -> None:
    """Make the dropout of a network what it would be with `dropout` `probability` in its config, and say so there.

    Raises:
        ValueError: if its config has no `dropout`.
    """
    models = [part for part in network.modules() if isinstance(part, ModelMixin) and "dropout" in part.config]
    if not models:
        raise ValueError(f"`network_dropout` must be None for {type(network).__name__}: its config has no `dropout`.")
    for model in models:
        model.register_to_config(dropout=probability)
        with torch.device("meta"):
            like = network_from_config(dict(model.config) | {"_class_name": type(model).__name__})
        parts = dict(model.named_modules())
        for name, other in like.named_modules():
            if isinstance(other, nn.Dropout):
                parts[name].p = other.p
            elif isinstance(vars(other).get("dropout"), float):
                parts[name].dropout = other.dropout


def without_variance(network: nn.Module) -> nn.Module:
    """The network without the channels of a learned variance, which a one-step student has no use for; its other
    weights are the same tensors. Networks that have none stay as they are."""
    config = dict(getattr(network, "config", {}))
    channels = config.get("in_channels")
    if not channels or config.get("out_channels") != 2 * channels:
        return network
    with torch.device("meta"):
        cut = network_from_config(config | {"out_channels": channels, "_class_name": type(network).__name__})
    expected = cut.state_dict()

    def means(name: str, weight: torch.Tensor) -> torch.Tensor:
        if weight.shape == expected[name].shape:
            return weight
        # the head: rows are channels, of each place of a patch where a transformer makes patches
        return weight.unflatten(0, (-1, 2 * channels))[:, :channels].flatten(0, 1)

    cut.load_state_dict({k: means(k, v) for k, v in network.state_dict().items()}, assign=True)
    for name, buffer in network.named_buffers():  # also those that are no part of the state
        owner, _, leaf = name.rpartition(".")
        setattr(cut.get_submodule(owner), leaf, buffer)
    return cut.eval()


def shrunk(network: nn.Module, factor: float) -> ModelMixin:
    """A network of random weights like `network` whose widths are `factor` times as large, in whole norm groups.

    Args:
        network (`ModelMixin`): a U-Net with `block_out_channels`, or a transformer with `num_attention_heads`.
        factor (`float`): 0.5 gives about a quarter of the parameters.
    """
    if not 0 < factor <= 1:
        raise ValueError(f"`shrink` must lie between 0 and 1, but is {factor}.")
    config = copy.deepcopy(dict(getattr(network, "config", {})))
    if "block_out_channels" in config:
        group = config.get("norm_num_groups") or 1
        widths = [max(1, round(factor * width / group)) * group for width in config["block_out_channels"]]
        config["block_out_channels"] = widths
    elif "model_channels" in config:  # of the EDM family, whose groups are a quarter of the channels at most
        config["model_channels"] = max(1, round(factor * config["model_channels"] / 4)) * 4
    elif "num_attention_heads" in config:
        heads = config["num_attention_heads"]
        config["num_attention_heads"] = max(1, round(factor * heads))
        # what has to be as wide as the transformer itself: SD3's captions, PixArt's and SANA's cross attention
        for key in ("caption_projection_dim", "cross_attention_dim"):
            if config.get(key) == heads * config["attention_head_dim"]:
                config[key] = config["num_attention_heads"] * config["attention_head_dim"]
    else:
        raise ValueError(
            "`shrink` needs a network with `block_out_channels` or `num_attention_heads`, but "
            f"{type(network).__name__} has neither: give a `student_config`."
        )
    return network_from_config(config | {"_class_name": type(network).__name__})
