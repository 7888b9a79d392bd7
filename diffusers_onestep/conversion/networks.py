"""Weights of a file into a network, names and shapes compared exactly first."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..models.unet_edm import ARCHITECTURES, resample_kernel

State = dict[str, torch.Tensor]


@dataclass
class Converted:
    """A network and what it is sampled with.

    Attributes:
        network (`ModelMixin`): with the file's weights, in float32.
        scheduler (`SchedulerMixin`): of a teacher, or of the teacher that a student came from.
        prediction_type (`str`): what the network predicts.
        labels (`int`): how many class labels there are to ask for, 0 if none.
        notes (`list[str]`): what the card says besides.
    """

    network: ModelMixin
    scheduler: SchedulerMixin
    prediction_type: str
    labels: int = 0
    notes: list[str] = field(default_factory=list)


def load_network(cls: type[ModelMixin], settings: Mapping[str, Any], state: State) -> ModelMixin:
    """A network of `cls` with the weights of `state`, whose names and shapes are compared exactly first.

    Resampling filters are no weights: they are compared with the config's and dropped.
    """
    check_size(settings, state)
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


def check_size(settings: Mapping[str, Any], state: State) -> None:
    """Raise a `ValueError` for sizes of which no network can be: a config may state anything, and nothing is built
    that has more parts than the file has tensors."""
    levels, blocks = settings.get("channel_mult", (1, 2, 3, 4)), settings.get("layers_per_block", 3)
    size = settings.get("sample_size")
    whole = (blocks, size, settings["in_channels"], settings.get("model_channels", 1))
    if not all(isinstance(n, int) and 0 < n < 1 << 20 for n in whole) or not isinstance(levels, tuple) or not levels:
        raise ValueError(f"`file` has a config of unusable sizes: {dict(settings)}.")
    if any(int(settings.get("model_channels", 192) * m) < 4 for m in levels):  # a group has 4 channels
        raise ValueError(f"`file` must have levels of at least 4 channels, but has {levels} times {whole[-1]}.")
    if len(levels) * blocks > len(state):
        raise ValueError(f"`file` does not fit its config: {len(state)} tensors for {len(levels)} x {blocks} blocks.")


def check_state(state: State, expected: Mapping[str, torch.Tensor]) -> None:
    """Raise a `ValueError` that names the first tensor that is missing, unknown or of another shape."""
    for key in (*expected, *state):
        given, wanted = (tuple(d[key].shape) if key in d else "none" for d in (state, expected))
        if given != wanted:
            raise ValueError(f"`file` does not fit its config: {key!r} must be {wanted}, but is {given}.")
