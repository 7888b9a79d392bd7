"""Files like those that EDM's code writes, made without it: networks of random weights in the original layout."""

import pickle
import sys
import types
from collections import OrderedDict
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

SOURCE = "raise SystemExit('the source text of a checkpoint was run')"
VERSION = 6
BUFFERS = ("resample_filter", "freqs", "phases", "u")
HOOKS = ("_backward_hooks", "_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks")


class Persistent:
    """What pickles as a call of EDM's reconstruction function."""

    def __init__(self, class_name, state, source=SOURCE):
        self.meta = {
            "type": "class",
            "version": VERSION,
            "module_src": source,
            "class_name": class_name,
            "state": state,
        }

    def __reduce__(self):
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


@contextmanager
def original_modules():
    """The two modules whose names the files hold, for as long as a file is written."""
    names = ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util")
    modules = {name: types.ModuleType(name) for name in names}
    # a file names what rebuilds it and has nothing of it
    for member, base, name in (("_reconstruct_persistent_obj", object, names[1]), ("EasyDict", dict, names[3])):
        setattr(modules[name], member, type(member, (base,), {"__module__": name}))
    sys.modules.update(modules)
    try:
        yield modules
    finally:
        for name in names:
            del sys.modules[name]


def module(class_name, tensors, options=None, source=SOURCE):
    """A persistent module with everything below it, of tensors by dotted name."""
    state = {name: OrderedDict() for name in HOOKS} | {"training": False, "_non_persistent_buffers_set": set()}
    state |= {"_parameters": OrderedDict(), "_buffers": OrderedDict(), "_modules": OrderedDict()}
    state |= {"skip_scale": np.float64(0.5**0.5), "use_fp16": False}
    if options is not None:
        state |= {"_init_args": (), "_init_kwargs": options}
    children = {}
    for name, tensor in tensors.items():
        head, _, rest = name.partition(".")
        if rest:
            children.setdefault(head, {})[rest] = tensor
        elif head in BUFFERS:
            state["_buffers"][head] = tensor
        else:
            state["_parameters"][head] = nn.Parameter(tensor)
    for name, own in children.items():
        if name in ("enc", "dec"):
            container = nn.ModuleDict()
            container._modules.update(module("", own).meta["state"]["_modules"])
            state["_modules"][name] = container
        else:
            state["_modules"][name] = module("Part", own, source=source)
    return Persistent(class_name, state, source)


def write_pickle(path, wrapper, options, tensors, source=SOURCE, easy=False, **others):
    """A file like EDM's: `tensors` by the original names, prefix included."""
    with original_modules() as modules, open(path, "wb") as file:
        content = {"ema": module(wrapper, tensors, options, source)} | others
        pickle.dump(modules["dnnlib.util"].EasyDict(content) if easy else content, file, protocol=4)
    return path


def random_weights(network, prefix, seed=0):
    """Tensors by the original names, none of them zero, for one of our networks."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in network.state_dict().items():
        fan_in = max(1, tensor[0].numel()) if tensor.ndim else 1
        noise = torch.rand(tensor.shape, generator=generator) * 2 - 1
        one = 1.0 if tensor.ndim == 1 and name.endswith("norm0.weight") else 0.0
        state[f"{prefix}.{name}"] = one + noise * (3 / fan_in) ** 0.5 if tensor.ndim != 1 else 0.75 * one + 0.5 * noise
    return state
