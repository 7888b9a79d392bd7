"""What a training step needs of torch besides its method: precision, optimizers, mean gradients, memory."""

import ctypes
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.utils import is_bitsandbytes_available, is_torchao_available

from .lora import leave_dtypes_to_autocast


def configure_networks(module: torch.nn.Module, autocast_dtype: torch.dtype | None, checkpointing: bool) -> None:
    """Tell every `Denoiser` (or `Autoencoder`) in `module` in which precision its network is called, and what that
    keeps."""
    for part in module.modules():
        if hasattr(part, "autocast_dtype"):
            part.autocast_dtype = autocast_dtype
            if autocast_dtype is not None:
                leave_dtypes_to_autocast(part.network)
            if checkpointing:
                checkpoint_gradients(part.network)


def checkpoint_gradients(network: torch.nn.Module) -> None:
    """Let a network compute most activations again in the backward pass."""
    if not getattr(network, "_supports_gradient_checkpointing", False):
        raise ValueError(f"`gradient_checkpointing` must be off for a {type(network).__name__}, which has none.")
    network.enable_gradient_checkpointing()


def optimizer_class(name: str) -> Callable[..., torch.optim.Optimizer]:
    """The optimizer that a name of `--optimizer` means."""
    if name != "adamw8bit":
        radam = partial(torch.optim.RAdam, decoupled_weight_decay=True)
        return {"adamw": partial(torch.optim.AdamW, fused=True), "radam": radam}[name]
    if torch.cuda.is_available() and is_bitsandbytes_available():
        from bitsandbytes.optim import AdamW8bit
    elif is_torchao_available():
        from torchao.optim import AdamW8bit
    else:
        raise ValueError(
            "`optimizer` 'adamw8bit' needs bitsandbytes on a CUDA GPU, or torchao anywhere: pip install bitsandbytes "
            "torchao."
        )
    return AdamW8bit


def set_learning_rate(group: dict[str, Any], rate: float) -> None:
    """Of a group of parameters, whose rate torchao's optimizers keep as a tensor."""
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def keep_freed_memory() -> None:
    """Have glibc keep up to 2 GB of freed activations for the next pass: given back and asked for again, every page of
    them costs a fault, a tenth of a step's time on the shipped teachers. Thresholds of the environment go first."""
    own = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & os.environ.keys()
    if own or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", ""):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**25)  # the largest that it takes; beyond, blocks come and go alone


def average_gradients(
    accelerator: Accelerator, parameters: list[torch.nn.Parameter], transfer_size: int = 2**26
) -> None:
    """Replace every gradient by its mean over all ranks, in transfers of about `transfer_size` numbers."""
    waiting: list[torch.Tensor] = []
    for gradient in (*(p.grad for p in parameters if p.grad is not None), None):
        if gradient is not None:
            waiting.append(gradient)
        if waiting and (gradient is None or sum(g.numel() for g in waiting) >= transfer_size):
            flat = accelerator.reduce(torch.cat([g.flatten() for g in waiting]), "mean")
            for target, mean in zip(waiting, flat.split([g.numel() for g in waiting]), strict=True):
                target.copy_(mean.view_as(target))
            waiting = []
