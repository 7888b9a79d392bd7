"""FSDP2: networks whose weights, gradients and optimizer states are spread over all ranks.

Accelerate's settings (`training/configs/fsdp2.yaml`) say how; torch's `fully_shard` does it, to every network of a
method by itself. (`Accelerator.prepare` takes one network with its optimizer, on GPUs only, and under bf16 hands the
network timesteps rounded to bf16, where 999 is 1000.) A sharded network answers only when all ranks call it.
"""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType, parse_flag_from_env
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from .arguments import DTYPES
from .denoiser import Denoiser
from .methods.gan import GANHead


class Sharding:
    """How networks are spread over the ranks of a run.

    Args:
        accelerator (`Accelerator`): whose ranks and devices they are.
        plugin (`FullyShardedDataParallelPlugin`): Accelerate's settings, of which `reshard_after_forward`,
            and `transformer_cls_names_to_wrap` are followed; without the latter, a network's own `_no_split_modules`
            are its blocks.
        autocast_dtype (`torch.dtype`, *optional*): in which trained weights travel; gradients travel in float32.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        plugin: FullyShardedDataParallelPlugin,
        autocast_dtype: torch.dtype | None = None,
    ):
        if plugin.fsdp_version != 2:
            raise ValueError(f"`fsdp_version` of the launcher must be 2, but is {plugin.fsdp_version}.")
        if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
            raise ValueError("`fsdp_offload_params` of the launcher must be false, but is true.")
        if autocast_dtype == torch.float16:
            raise ValueError("`mixed_precision` must be 'no' or 'bf16' with FSDP, but is 'fp16'.")
        self.mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        self.blocks = plugin.transformer_cls_names_to_wrap
        self.reshard_after_forward = plugin.reshard_after_forward
        self.dtype = autocast_dtype
        self.networks: list[Any] = []

    @classmethod
    def of(cls, accelerator: Accelerator) -> "Sharding | None":
        """What the launcher asks for; None without FSDP, or with one process on a CPU."""
        if accelerator.num_processes == 1 and accelerator.distributed_type == DistributedType.FSDP:
            raise ValueError("`num_processes` of the launcher must be 2 or more with FSDP, but is 1.")
        # on CPUs Accelerate makes data parallelism of it, without a word
        if accelerator.num_processes == 1 or not parse_flag_from_env("ACCELERATE_USE_FSDP"):
            return None
        plugin = getattr(accelerator.state, "fsdp_plugin", None) or FullyShardedDataParallelPlugin()
        return cls(accelerator, plugin, DTYPES.get(accelerator.mixed_precision))

    def shard(self, network: nn.Module) -> None:
        """Spread a network in place: its repeated blocks one by one, then what is left."""
        if isinstance(network, nn.ModuleList):  # networks that are trained as one, and called by themselves
            for part in network:
                self.shard(part)
            return
        if any(p.dim() == 0 for p in network.parameters()):
            raise ValueError(
                f"FSDP must have networks without scalar parameters, but {type(network).__name__} has some: use DDP."
            )
        trained = any(p.requires_grad for p in network.parameters())
        # inputs are cast by autocast, layer by layer: a cast here would round timesteps
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        if trained and self.dtype is not None and not isinstance(network, GANHead):  # which computes in float32
            policy = MixedPrecisionPolicy(self.dtype, torch.float32, cast_forward_inputs=False)
        names = set(self.blocks or getattr(network, "_no_split_modules", None) or ())
        blocks = [module for module in network.modules() if type(module).__name__ in names]
        for block in reversed(blocks):  # inner ones first
            fully_shard(block, mesh=self.mesh, mp_policy=policy, reshard_after_forward=self.reshard_after_forward)
        # what is left stays in one piece until the backward pass, which may come in through inner features (GAN)
        fully_shard(network, mesh=self.mesh, mp_policy=policy, reshard_after_forward=False)
        self.networks.append(network)

    def reshard(self) -> None:
        """Let go of what is in one piece since a call without a backward pass: it does not follow when weights
        change."""
        parts = (part for network in self.networks for part in network.modules())
        for part in parts:
            if isinstance(part, FSDPModule):
                part.reshard()


def keep_input_dtypes(module: nn.Module) -> None:
    """Let every `Denoiser` cast inputs to its network's dtype of now: a sharded network's weights change theirs while
    they travel."""
    for part in module.modules():
        if isinstance(part, Denoiser):
            part.input_dtype = next(part.network.parameters()).dtype


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in one piece; all ranks must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def without_weights(network: nn.Module) -> nn.Module:
    """A copy of a network whose parameters hold no data."""
    empty = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in network.parameters()}
    return copy.deepcopy(network, empty)


def gather(tensors: Iterable[tuple[str, torch.Tensor]], keep: bool) -> dict[str, torch.Tensor]:
    """Tensors in one piece on the CPU, for the ranks that are to `keep` them; all ranks must call it."""
    pieces = {}
    for name, tensor in tensors:
        tensor = whole(tensor.detach())
        if keep:
            pieces[name] = tensor.cpu().contiguous()
    return pieces


def save_part(network: nn.Module, optimizer: torch.optim.Optimizer, path: Path, main: bool) -> None:
    """Write a trained network and the states of its optimizer, in one piece, to `path`; all ranks must call it."""
    tensors = gather(_named_state(network, optimizer), main)
    if main:
        save_file(tensors, path)


def load_part(network: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Take up what `save_part` wrote, by any number of ranks that share the network."""
    with safe_open(path, "pt") as file:
        for name, tensor in network.state_dict().items():
            restore(tensor, file.get_tensor(f"network.{name}"))
        parameters = _parameters(optimizer)
        for name in sorted(file.keys()):
            if name.startswith("optimizer."):
                _, number, part = name.split(".")
                parameter = parameters[int(number)]
                # a fused optimizer counts its steps on the GPU
                optimizer.state[parameter][part] = _like(parameter, file.get_tensor(name).to(parameter.device))


@torch.no_grad()
def restore(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Put a `value` in one piece into a tensor that may be spread."""
    tensor.copy_(_like(tensor, value))


def _named_state(network, optimizer) -> Iterable[tuple[str, torch.Tensor]]:
    yield from ((f"network.{name}", tensor) for name, tensor in network.state_dict().items())
    for number, parameter in enumerate(_parameters(optimizer)):
        for name, value in optimizer.state[parameter].items():
            yield f"optimizer.{number}.{name}", value


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _like(tensor: Any, value: torch.Tensor) -> torch.Tensor:
    """`value`, spread as `tensor` is if it is as large."""
    if not isinstance(tensor, DTensor) or value.shape != tensor.shape:
        return value
    # every rank has read it: nothing is sent
    return distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)
