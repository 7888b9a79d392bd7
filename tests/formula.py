"""Weights by formula: the same numbers on every machine, for networks whose files are too large to keep."""

import zlib

import numpy as np
import torch


def u(name, count):
    """`count` numbers in [-1, 1) of a name: a 64-bit mixer of `(i + 1 + crc32(name) * 2**32)`, 24 bits of it."""
    with np.errstate(over="ignore"):
        z = np.arange(1, count + 1, dtype=np.uint64) + np.uint64(zlib.crc32(name.encode()) << 32)
        z = z * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return torch.from_numpy((z >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - np.float32(1))


def formula_state(network, prefix):
    """Weights of one of our networks, by the original names."""
    state = {}
    for key, tensor in network.state_dict().items():
        name = f"{prefix}.{key}"
        values = u(name, tensor.numel()).reshape(tensor.shape)
        if key.endswith("freqs"):
            values = 16 * values
        elif key.endswith("phases"):
            values = 3 * values
        elif tensor.ndim == 0:
            values = 0.75 + 0.25 * values
        elif tensor.ndim == 1:
            values = (1 if key.endswith("weight") else 0) + 0.25 * values
        else:
            values = values * (3 / tensor[0].numel()) ** 0.5
        state[name] = values
    return state
