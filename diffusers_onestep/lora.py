"""One trunk: networks that are LoRA adapters (peft) on the weights of one frozen network.

Every adapter has its own tree of modules, and all trees hold the very same weight tensors. Nothing is ever switched:
gradients through several of them, recomputation in gradient checkpointing, hooks and dropout are right by
construction, and the teacher stays the untouched network that it was.
"""

import copy
import dataclasses
import json
from pathlib import Path

import torch
from diffusers.loaders import PeftAdapterMixin
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"  # diffusers' name
_ADAPTER = "default"
_ADAPTABLE = (nn.Linear, nn.Conv2d)


def adapted(network: nn.Module, config: LoraConfig) -> nn.Module:
    """`network` with an adapter that changes nothing yet, on the weights of `network` itself, which are frozen.

    The adapter's weights are float32 (float64 on a float64 network), whatever the dtype of the trunk.

    Args:
        network (`nn.Module`): the trunk; it is left without adapters.
        config (`LoraConfig`): without `target_modules`, every linear and convolution layer is adapted that is wider
            than the rank.

    Raises:
        ValueError: if `network` has adapters or no layer that takes one, or `config` trains weights of the trunk.
    """
    if is_adapted(network):
        raise ValueError("`network` must have no adapters of its own, but has: fuse and unload them first.")
    if config.bias != "none" or config.modules_to_save:
        raise ValueError(
            "`lora` must leave the trunk as it is (`bias` 'none', no `modules_to_save`), but has "
            f"{config.bias!r} and {config.modules_to_save}."
        )
    targets = config.target_modules or _wide_layers(network, config.r)
    if not targets:
        if not any(isinstance(module, _ADAPTABLE) for module in network.modules()):
            raise ValueError(
                "`network` must have linear or convolution layers of torch for adapters to sit on, but "
                f"{type(network).__name__} has none: train it without `lora`."
            )
        raise ValueError(f"`r` of `lora` must be less than the width of a layer, but is {config.r}.")
    network.requires_grad_(False)
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    network = copy.deepcopy(network, shared)
    inject_adapter_in_model(dataclasses.replace(config, target_modules=targets), network, _ADAPTER)
    for parameter in adapter(network).parameters():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return network


def _wide_layers(network: nn.Module, rank: int) -> list[str]:
    """Linear and ungrouped convolution layers that a rank-`rank` update is smaller than."""
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, _ADAPTABLE) and getattr(module, "groups", 1) == 1 and min(module.weight.shape[:2]) > rank
    ]


def is_adapted(network: nn.Module) -> bool:
    """Does the network have adapters?"""
    return any(isinstance(module, BaseTunerLayer) for module in network.modules())


def adapter(network: nn.Module) -> nn.ModuleDict:
    """The adapter of a network that `adapted` made, and nothing of the trunk, as a module."""
    return nn.ModuleDict(
        {
            f"{name}/{part}".replace(".", "/"): getattr(layer, part)[_ADAPTER]
            for name, layer in network.named_modules()
            if isinstance(layer, BaseTunerLayer)
            for part in layer.adapter_layer_names
            if _ADAPTER in getattr(layer, part)
        }
    )


def leave_dtypes_to_autocast(network: nn.Module) -> None:
    """Let adapters take their inputs as they are, for autocast to cast: each of peft's own casts would keep a copy for
    the backward pass."""
    for layer in network.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.cast_input_dtype_enabled = False


def trained_part(network: nn.Module) -> nn.Module:
    """What is trained of a network: its adapter if it has one, else all of it."""
    return adapter(network) if is_adapted(network) else network


@torch.no_grad()
def merged(network: nn.Module) -> nn.Module:
    """A plain network on the CPU with the adapter added to the weights, in float32 (float64 for float64)."""
    weights = {
        id(p): nn.Parameter(p.to("cpu", torch.promote_types(p.dtype, torch.float32), copy=True), requires_grad=False)
        for p in network.parameters()
    }
    network = copy.deepcopy(network, weights).cpu()
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, BaseTunerLayer)}
    for name, layer in layers.items():
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, layer.get_base_layer())
    del network.peft_config
    return network


def save_lora_weights(pipeline_class: type, component: str, network: nn.Module, folder: Path) -> None:
    """Write the adapter as diffusers' `pytorch_lora_weights.safetensors`, its rank, alpha and targets in the header;
    nothing for networks that diffusers loads no adapters into.

    Args:
        pipeline_class (`type`): whose `load_lora_weights` is to read it.
        component (`str`): what the pipeline calls the network: `"unet"` or `"transformer"`.
        network (`nn.Module`): made by `adapted`.
        folder (`Path`): where to write.
    """
    if not (isinstance(network, PeftAdapterMixin) and hasattr(pipeline_class, "save_lora_weights")):
        return
    config = network.peft_config[_ADAPTER].to_dict()
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    pipeline_class.save_lora_weights(
        folder,
        **{
            f"{component}_lora_layers": get_peft_model_state_dict(network, adapter_name=_ADAPTER),
            f"{component}_lora_adapter_metadata": json.loads(json.dumps(config)),
        },
    )
