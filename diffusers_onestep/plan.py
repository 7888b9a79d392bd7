"""`onestep plan`: what a training step needs, from config files alone.

The very step that `train()` runs is run on tensors without data (`FakeTensorMode`), while a dispatch mode counts the
bytes that are alive and the floating-point operations. So the numbers hold what autograd saves, what it recomputes,
what autocast copies and what the optimizer allocates in between; they do not hold a GPU's context, the workspaces of
its kernels and the fragmentation of its memory.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, UNet2DModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import (
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from . import schedulers
from .arguments import DTYPES
from .conditions import label_embeddings
from .denoiser import Denoiser, GuidedDenoiser
from .distillation import DistillationArguments
from .ema import HalfLifeEMA
from .methods.dmd import DMD
from .methods.score import ScoreDistiller
from .methods.sid import SiD
from .models import cast, network_from_config
from .optimization import configure_networks, optimizer_class
from .repository import resolve_model
from .schedules import NoiseSchedule
from .teacher import prediction_type_of

METHODS = {"sid": SiD, "dmd": DMD}
_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


# torch's counter knows the same kernels of a GPU only
@register_flop_formula(_CPU_ATTENTION)
def _attention_flops(q, k, v, *args, **kwargs) -> int:
    return sdpa_flop_count(q, k, v)


@register_flop_formula(_CPU_ATTENTION_BACKWARD)
def _attention_backward_flops(grad, q, k, v, *args, **kwargs) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


@dataclass
class PlanArguments(DistillationArguments):
    """The flags of a training script that decide about memory and time, and a few more."""

    output_dir: str = field(default="", metadata={"help": "Ignored."})
    method: str = field(default="sid", metadata={"help": "Method that is planned: sid or dmd."})
    resolution: int | None = field(default=None, metadata={"help": "Pixels on a side; default: the teacher's own."})
    sequential: bool = field(
        default=False, metadata={"help": "Of SiD: keep one score network's activations at a time."}
    )
    kappas: list[float] | None = field(
        default=None, metadata={"help": "Of SiD: SiD-LSG's guidance, as for train_sid.py."}
    )
    device: str = field(default="cuda", metadata={"help": "cuda or cpu: where the step is to run."})
    num_processes: int = field(default=1, metadata={"help": "Devices of the run, which share `global_batch_size`."})

    def __post_init__(self):
        super().__post_init__()
        if self.method not in METHODS:
            raise ValueError(f"`method` must be one of {sorted(METHODS)}, but is {self.method!r}.")
        for name in ("sequential", "kappas"):
            if getattr(self, name) and self.method != "sid":
                raise ValueError(f"`{name}` must be off with method {self.method!r}: it is a flag of 'sid'.")


@dataclass
class Plan:
    """What one step needs; bytes at the moment of the peak.

    Attributes:
        parameters (`dict[str, int]`): of the teacher, and what is trained of student and fake score.
        memory (`dict[str, int]`): bytes by purpose, which add up to the peak.
        flops (`int`): floating-point operations of a student update with its fake-score updates, on one device and
            micro-batch.
    """

    parameters: dict[str, int]
    memory: dict[str, int]
    flops: int

    @property
    def peak(self) -> int:
        """Bytes at the peak."""
        return sum(self.memory.values())

    def __str__(self) -> str:
        lines = [f"{'parameters: ' + name:<32}{count / 1e6:12,.1f} M" for name, count in self.parameters.items()]
        lines += [f"{name:<32}{count / 2**30:12.2f} GiB" for name, count in self.memory.items()]
        lines += [f"{'peak':<32}{self.peak / 2**30:12.2f} GiB"]
        lines += [f"{'per micro-batch and device':<32}{self.flops / 1e12:12,.2f} TFLOP"]
        return "\n".join(lines)


class MemoryMeter(TorchDispatchMode):
    """Bytes of all tensors that are made inside and still alive, and their most; floating-point operations.

    These are counted here and not by torch's `FlopCounterMode`, which follows modules and so keeps the graph of a call
    whose output is dropped: the decoder under a GAN's verdict.
    """

    def __init__(self):
        super().__init__()
        self.live = self.gradients = self.flops = 0
        self.reset()

    def reset(self) -> None:
        """Forget the peak so far."""
        self.peak, self.gradients_at_peak = self.live, self.gradients

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if (flops := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += flops(*args, **kwargs, out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.notice(tensor.untyped_storage())
        if self.live > self.peak:
            self.reset()
        return result

    @staticmethod
    def leave_out(tensors: Iterable[torch.Tensor]) -> None:
        """Do not count what is there already, when a view of it is made."""
        for tensor in tensors:
            tensor.untyped_storage().noticed = True

    def notice(self, storage: torch.UntypedStorage) -> None:
        if not hasattr(storage, "noticed"):  # views and in-place operations give back the storage they got
            storage.noticed, size = True, storage.nbytes()
            self.live += size
            weakref.finalize(storage, self.release, size)

    def release(self, size: int) -> None:
        self.live -= size

    def watch_gradient(self, parameter: torch.Tensor) -> None:
        """Count `parameter.grad` while it lives."""

        def arrived(parameter):
            storage = parameter.grad.untyped_storage()
            if not hasattr(storage, "gradient"):
                storage.gradient, size = True, storage.nbytes()
                self.gradients += size
                weakref.finalize(storage, self.gradient_gone, size)

        parameter.register_post_accumulate_grad_hook(arrived)

    def gradient_gone(self, size: int) -> None:
        self.gradients -= size


class CUDAAutocast(TorchFunctionMode):
    """The autocast of the CPU, whose kernels are planned, with CUDA's rule for what the CPU's leaves in half
    precision: norms and interpolation are computed, and keep their inputs, in float32."""

    IN_FLOAT32 = (F.group_norm, F.layer_norm, F.rms_norm, F.interpolate)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.IN_FLOAT32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.float, (args, kwargs))
        return func(*args, **(kwargs or {}))


def plan(args: PlanArguments) -> Plan:
    """What a step of the run needs that `args` describe. Of a Hub id, only JSON files are downloaded."""
    path = resolve_model(args.pretrained_teacher_model)
    index = DiffusionPipeline.load_config(path, revision=args.revision)
    name = "transformer" if index.get("transformer") else "unet"
    if name not in index:
        raise ValueError(f"`pretrained_teacher_model` must have a unet or a transformer, but {path!r} has neither.")

    def config(part: str, reader: Any = UNet2DModel) -> dict:  # any model reads the config of any other
        try:
            return reader.load_config(path, subfolder=part, revision=args.revision)
        except OSError as error:
            if part == "vae":
                raise
            try:  # old repositories of pixel models have all at their root
                return reader.load_config(path, revision=args.revision)
            except OSError:
                raise error from None

    network = config(name)
    scheduler_class = getattr(schedulers, index["scheduler"][1], None) or getattr(diffusers, index["scheduler"][1])
    scheduler = scheduler_class.from_config(config("scheduler", scheduler_class))
    scale = 1
    if index.get("vae"):
        vae = config("vae")
        scale = 2 ** (len(vae.get("block_out_channels") or vae["encoder_block_out_channels"]) - 1)
    if args.resolution is None and index.get("default_sample_size"):  # of our students of FLUX
        args = replace(args, resolution=index["default_sample_size"] * scale)
    return plan_step(network, scheduler, args, scale)


def plan_step(network_config: dict, scheduler: Any, args: PlanArguments, vae_scale: int = 1) -> Plan:
    """The same from a network's config and a scheduler.

    Args:
        network_config (`dict`): of a diffusers model, with its `_class_name`.
        scheduler ([`SchedulerMixin`]): the teacher's.
        args (`PlanArguments`): the run.
        vae_scale (`int`, *optional*, defaults to 1): pixels of a latent's side.
    """
    with torch.device("meta"):
        network = network_from_config(network_config).requires_grad_(False)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    teacher: Denoiser | GuidedDenoiser = Denoiser(network, schedule, prediction_type_of(scheduler, schedule))
    batch = {"batch_size": args.train_batch_size, "cond": example_cond(network, args.train_batch_size)}
    teacher = GuidedDenoiser(teacher, args.guidance_scale, {k: v[:1] for k, v in batch["cond"].items()})
    sample_shape = latent_shape(network, args.resolution, vae_scale)
    batch["x0"] = torch.zeros(args.train_batch_size, *sample_shape)
    options = {"kappas": args.kappas, "sequential": args.sequential} if args.method == "sid" else {}
    if args.offload_teacher and args.lora_rank is not None:
        raise ValueError("`offload_teacher` must be off with adapters, which live on the teacher's weights.")
    distiller = METHODS[args.method](
        teacher,
        start_ratio=args.start_ratio,
        student_timesteps=args.student_timesteps,
        fake_score_updates=args.fake_score_updates,
        sample_shape=sample_shape,
        lora=args.lora_config(),
        **options,
    )
    if args.teacher_dtype:
        cast(network, DTYPES[args.teacher_dtype])
    without_data(networks_of(distiller))
    if args.gan_weight:  # its size is found by a call
        distiller.add_head(args.gan_weight)
        without_data([distiller.head.to("meta")])
    for denoiser in (distiller.teacher, distiller.student, distiller.fake_score):
        configure_networks(denoiser, DTYPES.get(args.mixed_precision), args.gradient_checkpointing)
    return plan_distiller(distiller, batch, args)


def networks_of(distiller: ScoreDistiller) -> list[nn.Module]:
    """All networks of a method, the GAN's head among them."""
    heads = [] if distiller.head is None else [distiller.head]
    return [distiller.teacher, distiller.student, distiller.fake_score, *heads]


def plan_distiller(distiller: ScoreDistiller, batch: dict, args: PlanArguments) -> Plan:
    """The same from a method and a batch: a step is run, with weights that may be without data."""
    networks = networks_of(distiller)
    parts = {name: list(part.parameters()) for name, part in distiller.trainable.items()}
    meter, optimizers = MemoryMeter(), {}
    # the gradients of a first micro-batch live through those that follow, of which one tells all
    accumulation = args.gradient_accumulation_steps
    if args.global_batch_size:
        accumulation = args.global_batch_size // (args.train_batch_size * args.num_processes)
    micro_batches = 2 if accumulation > 1 else 1
    frozen = {id(p): p for p in distiller.teacher.parameters()}
    meter.leave_out(tensor for network in networks for tensor in (*network.parameters(), *network.buffers()))
    with meter:
        for name, parameters in parts.items():
            optimizers[name] = _optimizer(args, parameters)
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            optimizers[name].step()
            optimizers[name].zero_grad()
        ema = HalfLifeEMA(parts["student"], 1.0, 1.0) if args.ema_halflife_kimg else None
        for parameter in (p for parameters in parts.values() for p in parameters):
            meter.watch_gradient(parameter)
        held = meter.live
        meter.reset()
        peaks: list[tuple[int, int, int]] = []  # of every update: frozen weights, other bytes, gradients among them
        uses: list[bool] = []  # of the teacher in an update; offloaded, it is away after each

        def note_peak():
            here = uses or not args.offload_teacher
            peaks.append((_bytes(frozen.values()) if here else 0, meter.peak, meter.gradients_at_peak))
            uses.clear()
            meter.reset()

        noting = distiller.teacher.network.register_forward_pre_hook(lambda *_: uses.append(True))
        with CUDAAutocast() if args.device == "cuda" else nullcontext():
            for name, *_ in zip(*(_backward(distiller.updates(batch)) for _ in range(micro_batches)), strict=True):
                optimizers[name].step()
                for optimizer in optimizers.values():
                    optimizer.zero_grad()
                note_peak()
        noting.remove()
        if ema is not None:
            for parameter in parts["student"]:
                parameter.requires_grad_(True)
            ema.step(parts["student"])
            note_peak()
    averages = _bytes(parts["student"]) if ema is not None else 0
    frozen_bytes, live, gradients = max(peaks, key=lambda peak: peak[0] + peak[1])
    memory = {
        "weights, frozen": frozen_bytes,
        "weights, trained": sum(map(_bytes, parts.values())),
        "optimizer": held - averages,
        "EMA": averages,
        "gradients": gradients,
        "activations and temporaries": live - held - gradients,
    }
    counts = {"teacher": frozen.values()} | {f"{name.replace('_', ' ')}, trained": p for name, p in parts.items()}
    return Plan({k: sum(p.numel() for p in v) for k, v in counts.items()}, memory, meter.flops // micro_batches)


def _backward(updates: Iterable[tuple[str, torch.Tensor]]) -> Iterator[str]:
    """A micro-batch's updates, as far as their gradients."""
    for name, loss in updates:
        loss.backward()
        del loss
        yield name


def without_data(modules: Iterable[nn.Module]) -> None:
    """Let meta weights pass for weights on the CPU, so that its kernels and its autocast are what is counted; weights
    that are shared stay shared."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    known: dict[int, torch.Tensor] = {}

    def fake(tensor):
        if id(tensor) not in known:
            pretended = FakeTensor(mode, tensor.detach(), torch.device("cpu"))
            if isinstance(tensor, nn.Parameter):
                pretended = nn.Parameter(pretended, requires_grad=tensor.requires_grad)
            known[id(tensor)] = pretended
        return known[id(tensor)]

    for part in (part for module in modules for part in module.modules()):
        for tensors in (part._parameters, part._buffers):
            tensors.update({name: fake(tensor) for name, tensor in tensors.items() if tensor is not None})


def latent_shape(network: nn.Module, resolution: int | None, vae_scale: int) -> tuple[int, int, int]:
    """`(C, H, W)` of model space at `resolution` pixels."""
    config = network.config
    packed = "Flux" in type(network).__name__  # whose tokens are 2 x 2 latents
    size = config.get("sample_size") or (128 if packed else None)
    if resolution is not None:
        if resolution % vae_scale:
            raise ValueError(f"`resolution` must be a multiple of {vae_scale}, but is {resolution}.")
        size = resolution // vae_scale
    if size is None:
        raise ValueError("`resolution` must be given for a network whose config has no `sample_size`.")
    height, width = (size, size) if isinstance(size, int) else size
    return config.in_channels // (4 if packed else 1), height, width


# tokens of a prompt: what the stock pipelines pad to
_PROMPT_TOKENS = {
    "UNet2DConditionModel": 77,
    "SD3Transformer2DModel": 77 + 256,
    "FluxTransformer2DModel": 512,
    "PixArtTransformer2DModel": 300,
    "SanaTransformer2DModel": 300,
}


def example_cond(network: nn.Module, batch_size: int) -> dict[str, torch.Tensor]:
    """Conditions of the right shape for a network, zero throughout."""
    config, kind = network.config, type(network).__name__
    if kind not in _PROMPT_TOKENS:
        return {"class_labels": torch.zeros(batch_size, dtype=torch.long)} if label_embeddings(network) else {}
    keys = ("joint_attention_dim", "caption_channels", "cross_attention_dim")
    width = next(config[key] for key in keys if config.get(key))
    cond = {"encoder_hidden_states": torch.zeros(batch_size, _PROMPT_TOKENS[kind], width)}
    if config.get("pooled_projection_dim"):
        cond["pooled_projections"] = torch.zeros(batch_size, config.pooled_projection_dim)
    if config.get("guidance_embeds"):
        cond["guidance"] = torch.zeros(batch_size)
    if getattr(network, "use_additional_conditions", False):
        cond |= {"resolution": torch.zeros(batch_size, 2), "aspect_ratio": torch.zeros(batch_size, 1)}
    if config.get("addition_embed_type") == "text_time":
        sizes = 6 * config.addition_time_embed_dim
        cond["text_embeds"] = torch.zeros(batch_size, config.projection_class_embeddings_input_dim - sizes)
        cond["time_ids"] = torch.zeros(batch_size, 6)
    return cond


class EightBitStates(torch.optim.Optimizer):
    """What an AdamW8bit, of bitsandbytes or torchao, keeps: two bytes a weight, in float32 for tensors of less than
    4096 weights, and a float32 scale for every 256 of each."""

    def step(self):
        for parameter in self.param_groups[0]["params"]:
            if not self.state[parameter]:
                small = parameter.numel() < 4096
                for name in ("state1", "state2"):
                    kind = torch.float32 if small else torch.uint8
                    self.state[parameter][name] = torch.zeros_like(parameter, dtype=kind)
                    if not small:
                        self.state[parameter][f"{name}_scale"] = parameter.new_zeros(-(-parameter.numel() // 256))


def _optimizer(args: PlanArguments, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if args.optimizer == "adamw8bit":
        return EightBitStates(parameters, {})
    # RAdam's loop over all tensors at once, torch's default on a GPU, makes temporaries as large as a network
    loop = {"foreach": args.device == "cuda"} if args.optimizer == "radam" else {}
    return optimizer_class(args.optimizer)(parameters, **loop)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
