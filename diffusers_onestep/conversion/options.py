"""What the options of a network may be: a file may state anything, and nothing is built from it unchecked."""

from collections.abc import Mapping
from typing import Any

_MOST = 1 << 20
# whole numbers, and the least of each; those that may be 0 may also be None
_WHOLE = {"img_resolution": 1, "img_channels": 1, "model_channels": 1, "num_blocks": 1, "channels_per_head": 1}
_WHOLE |= {"label_dim": 0, "augment_dim": 0, "image_size": 1, "num_heads": 0, "num_head_channels": 0}
# numbers and their range
_NUMBERS = {"sigma_data": (1e-3, 1e3), "dropout": (0, 1), "clip_act": (1e-3, 1e6)}
_NUMBERS |= dict.fromkeys(("label_balance", "concat_balance", "res_balance", "attn_balance"), (0, 1))
_MULTIPLIERS = ("channel_mult_emb", "channel_mult_noise")
_LISTS = ("channel_mult", "attn_resolutions", "attention_resolutions", "resample_filter")


def checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, each a number, a short text or a tuple of them; a `ValueError` names the first that can describe no
    network of EDM, EDM2 or guided-diffusion."""
    checked = {key: _plain(value) for key, value in options.items()}
    for key, value in checked.items():
        if key in _WHOLE:
            least = _WHOLE[key]
            fits = (type(value) is int and least <= value < _MOST) or (value is None and least == 0)
            allowed = f"a whole number from {least} to {_MOST}"
        elif key in _NUMBERS:
            low, high = _NUMBERS[key]
            fits, allowed = _is_number(value) and low <= value <= high, f"a number in [{low}, {high}]"
        elif key in _MULTIPLIERS:
            fits, allowed = value is None or (_is_number(value) and 0 < value < _MOST), "a positive number"
        elif key in _LISTS:
            fits = isinstance(value, tuple) and all(_is_number(v) and 0 <= v < _MOST for v in value)
            allowed = "a list of numbers"
        else:
            continue
        if not fits:
            raise ValueError(f"`file` must have {allowed} as its option {key!r}, but has {value!r}.")
    return checked


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    """A number, a short text or a tuple of numbers: what options may be."""
    if isinstance(value, (list, tuple)) and len(value) <= 16:
        return tuple(_plain(v) for v in value) if not any(isinstance(v, (list, tuple)) for v in value) else None
    if isinstance(value, (int, float, type(None))) or (isinstance(value, str) and len(value) < 40):
        return value
    raise ValueError(f"`file` has an option that is a {type(value).__name__}.")
