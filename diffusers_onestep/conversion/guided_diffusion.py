"""Networks of OpenAI's guided-diffusion: their shape is read from the tensors."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDPMScheduler

from .adm import adm_network
from .networks import Converted, State, check_size
from .options import checked_options

# by (num_channels, channel_mult, num_res_blocks): what the files of guided-diffusion do not say themselves
GUIDED_DIFFUSION = {
    (192, (1, 2, 3, 4), 3): {"image_size": 64, "new_attention_order": True, "noise_schedule": "cosine"},
    (256, (1, 1, 2, 3, 4), 2): {"image_size": 128, "num_heads": 4},
    (256, (1, 1, 2, 2, 4, 4), 2): {"image_size": 256},
    (256, (0.5, 1, 1, 2, 2, 4, 4), 2): {"image_size": 512},
}


def guided_diffusion_network(content: Any, config: dict[str, Any]) -> Converted:
    """A network of OpenAI's guided-diffusion: its shape is read from the tensors, the rest is that of the published
    file of this shape, or of `config` (`image_size`, `num_heads` or `num_head_channels`, `use_new_attention_order`,
    `noise_schedule`, `attention_resolutions`, `dropout`)."""
    state: State = {k: v for k, v in content.items() if isinstance(v, torch.Tensor)}
    known_by = ("time_embed.0.weight", "input_blocks.0.0.weight", "out.2.weight")
    if not all(key in state and state[key].ndim > 1 for key in known_by):
        raise ValueError("`file` must be a state dict of guided-diffusion, but is not.")
    channels = state["time_embed.0.weight"].shape[1]
    mult, blocks = guided_levels(state, channels)
    names = {"use_new_attention_order": "new_attention_order", "attention_resolutions": "attention"}
    known = {"image_size", "num_heads", "num_head_channels", "noise_schedule", "dropout", *names}
    if unknown := config.keys() - known:
        raise ValueError(f"`config` must have keys of {sorted(known)}, but has {sorted(unknown)}.")
    if isinstance(config.get("attention_resolutions"), str):
        config |= {"attention_resolutions": [int(n) for n in config["attention_resolutions"].split(",")]}
    config = checked_options(config)
    published = GUIDED_DIFFUSION.get((channels, mult, blocks), {})
    flags = published | {names.get(k, k): v for k, v in config.items()}
    if "image_size" not in flags:
        raise ValueError(
            f"`config` must be given for a network of {channels} channels, levels {mult} and {blocks} blocks, which "
            f"is none of the published ones: with `image_size`, and others of {sorted(known)}."
        )
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
        "attention_resolutions": flags.get("attention", (32, 16, 8)),
        "num_attention_heads": flags.get("num_heads"),
        "dropout": flags.get("dropout", 0.0),
        "num_class_embeds": state["label_emb.weight"].shape[0] if "label_emb.weight" in state else None,
    }
    check_size(settings, state)
    try:
        renamed = guided_to_edm(settings, state, bool(flags.get("new_attention_order")))
    except LookupError as error:  # a name without a place, a tensor with too few dimensions
        raise ValueError("`file` has tensors that no U-Net of guided-diffusion of its size has.") from error
    cosine = flags.get("noise_schedule", "linear") == "cosine"
    scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2" if cosine else "linear",
        variance_type="learned_range" if out_channels == 2 * in_channels else "fixed_small",
        timestep_spacing="trailing",
    )
    return Converted(adm_network(settings, renamed), scheduler, "epsilon", settings["num_class_embeds"] or 0)


def guided_levels(state: State, channels: int) -> tuple[tuple[float, ...], int]:
    """`channel_mult` and blocks per level: every level but one has an upsampling block after its last one."""
    names = [key.split(".") for key in state if key.endswith(".in_layers.0.weight")]
    levels = 1 + sum(name[0] == "output_blocks" and name[2] != "0" for name in names)
    count = 1 + sum(name[0] == "input_blocks" for name in names)
    convolutions = [f"input_blocks.{k}.0.out_layers.3.weight" for k in range(1, count)]
    blocks = count // levels - 1  # the convolution or a downsampling block goes before those of a level
    if count % levels or blocks < 1 or not all(key in state and state[key].ndim for key in convolutions):
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
