"""ADM networks by EDM's names: as a stock `UNet2DModel` where that is the same network."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.models.modeling_utils import ModelMixin

from ..models import EDMUNet2DModel
from .networks import State, check_size, check_state, load_network


def adm_network(settings: Mapping[str, Any], state: State) -> ModelMixin:
    """An `EDMUNet2DModel`, or a stock `UNet2DModel` if that is the same network."""
    stock = stock_settings(settings)
    if stock is None:
        return load_network(EDMUNet2DModel, settings, state)
    check_size(settings, state)
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
