"""Compress a teacher into another network without data (arXiv:2409.03550); the student takes as many steps as before.

accelerate launch training/train_dkdm.py --pretrained_teacher_model fashion32 --output_dir fashion32-small --shrink 0.5
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from diffusers_onestep import DKDM, Denoiser, Teacher, train
from diffusers_onestep.arguments import DTYPES, run_script
from diffusers_onestep.data import Batches, Conditions, Samples
from diffusers_onestep.distillation import TeacherArguments
from diffusers_onestep.hooks import compression_hooks
from diffusers_onestep.models import network_from_config, shrunk
from diffusers_onestep.optimization import configure_networks
from diffusers_onestep.presets import DKDM_PRESETS
from diffusers_onestep.prompts import PromptEmbeddings, digest
from diffusers_onestep.run_folder import checkpoint_to_go_on_from


@dataclass
class DKDMArguments(TeacherArguments):
    student_config: str | None = field(
        default=None, metadata={"help": "Network of the student: a diffusers model config, a JSON file."}
    )
    shrink: float | None = field(
        default=None, metadata={"help": "Instead of student_config: width of the student over the teacher's."}
    )
    scheme: str = field(
        default="dynamic",
        metadata={"help": "How samples are made of the teacher's chain: dynamic, shuffled, iterative or synthetic."},
    )
    reservoir_ratio: float = field(default=0.4, metadata={"help": "Slots over batch times steps; paper: 0.4."})
    num_steps: int | None = field(default=None, metadata={"help": "Steps of the teacher's chain; default: all."})
    clip: bool | None = field(default=None, metadata={"help": "Clip the teacher's x0; default: its scheduler's."})
    deterministic: bool = field(default=False, metadata={"help": "Step the teacher by its ODE."})
    learned_variance: bool | None = field(
        default=None,
        metadata={"help": "Whether the student learns the variance; default: if the teacher has one and no guidance."},
    )
    reservoir_dtype: str = field(default="float32", metadata={"help": "How samples are kept: float32 or float16."})
    pin_memory: bool = field(default=False, metadata={"help": "Keep the reservoir in page-locked memory."})
    preparation_batch_size: int = field(
        default=250, metadata={"help": "Samples at a time while the reservoir is filled, before training."}
    )
    validation_inference_steps: int = field(
        default=20, metadata={"help": "Steps that the live distance samples the student with."}
    )
    learning_rate: float = 1e-4
    ema_halflife_kimg: float = 500.0


def main(args: DKDMArguments) -> None:
    if (args.student_config is None) == (args.shrink is None):
        raise ValueError(
            "One of `student_config` and `shrink` must be given, but they are "
            f"{args.student_config!r} and {args.shrink}."
        )
    if args.dry_run:  # a reservoir is large, and takes hours to fill
        args.train_batch_size, args.global_batch_size, args.num_steps = 2, None, 4
        checkpoint = None
    else:
        checkpoint = checkpoint_to_go_on_from(Path(args.output_dir), args.resume_from_checkpoint)
    if args.reservoir_dtype not in ("float32", "float16"):
        raise ValueError(f"`reservoir_dtype` must be 'float32' or 'float16', but is {args.reservoir_dtype!r}.")
    accelerator = args.accelerator()
    own_batch = args.train_batch_size * args.gradient_accumulation_steps
    if args.global_batch_size:
        own_batch = args.global_batch_size // accelerator.num_processes
    teacher = args.load_teacher()
    samples = args.load_samples(teacher)
    torch.manual_seed(args.seed)  # the student starts at random
    if args.shrink is not None:
        network = shrunk(teacher.denoiser.network, args.shrink)
    else:
        network = network_from_config(json.loads(Path(args.student_config).read_text()))
    student = Denoiser(network, teacher.denoiser.schedule, teacher.denoiser.prediction_type)
    distiller = DKDM(
        args.guided(teacher),
        student,
        batch_size=own_batch,
        scheme=args.scheme,
        reservoir_ratio=args.reservoir_ratio,
        num_steps=args.num_steps,
        clip=args.clip,
        stochastic=False if args.deterministic else None,
        learned_variance=args.learned_variance,
        cond=trajectory_conditions(teacher, samples, args.guidance_scale),
        dtype=getattr(torch, args.reservoir_dtype),
        pin_memory=args.pin_memory,
    )
    save, validate = compression_hooks(distiller, args, args.validation_inference_steps, samples)
    if not args.dry_run and checkpoint is None:  # the first update prepares it, or `train` reads it
        prepare(distiller, args, accelerator)
    train(distiller, Batches(Conditions(), args.train_batch_size, args.seed), args, save=save, validate=validate)


def trajectory_conditions(teacher: Teacher, samples: Samples, guidance_scale: float):
    """Rows of conditions: with null ones among them where the student is to be guided, not the teacher."""
    if isinstance(samples, PromptEmbeddings):
        return samples if guidance_scale != 1.0 else samples.with_null()
    return teacher.encode() if guidance_scale != 1.0 else None


def prepare(distiller: DKDM, args: DKDMArguments, accelerator: Accelerator) -> None:
    """Fill the reservoir, each process its own, on the device and in the precision of the run; a run that goes on
    without a checkpoint takes the one that it has left in the folder.

    Raises:
        ValueError: if what is left in the folder was made for another run.
    """
    folder, settings = Path(args.output_dir) / "reservoir", reservoir_settings(distiller, args, accelerator)
    parts = sorted(folder.glob("reservoir-*.safetensors"))
    if args.resume_from_checkpoint and parts:
        found = [distiller.reservoir.made_for(part) for part in parts]
        if found == [settings] * accelerator.num_processes:
            distiller.load_state(folder, accelerator.process_index, accelerator.num_processes)
            return
        if others := [own for own in found if own != settings]:
            differing = {k: (others[0].get(k, "unrecorded"), v) for k, v in settings.items() if others[0].get(k) != v}
            raise ValueError(
                f"`output_dir` must hold a reservoir of this run, but that in {str(folder)!r} has "
                + ", ".join(f"`{name}` {theirs!r} instead of {ours!r}" for name, (theirs, ours) in differing.items())
                + ": go on as it was begun, give another folder, or delete this one to prepare it anew."
            )
        accelerator.print(f"The reservoir in {folder} is not complete: preparing it anew.")
    if args.cpu_threads:
        torch.set_num_threads(args.cpu_threads)
    distiller.teacher.to(accelerator.device)
    configure_networks(distiller.teacher, DTYPES.get(accelerator.mixed_precision), checkpointing=False)
    distiller.prepare(
        seed=args.seed * accelerator.num_processes + accelerator.process_index,
        batch_size=args.preparation_batch_size,
        progress_bar=accelerator.is_main_process,
    )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for part in parts:  # of a run with more processes, perhaps
            part.unlink()
        folder.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    distiller.save_state(folder, accelerator.process_index, settings)
    accelerator.wait_for_everyone()


def reservoir_settings(distiller: DKDM, args: DKDMArguments, accelerator: Accelerator) -> dict[str, Any]:
    """What makes a reservoir the one of a run."""
    chain, reservoir = distiller.chain, distiller.reservoir
    names = ["pretrained_teacher_model", "revision", "variant", "guidance_scale", "embedded_guidance", "scheme"]
    prompts = getattr(reservoir.cond, "prompts", None)
    return {name: getattr(args, name) for name in names} | {
        "seed": args.seed,
        "num_processes": accelerator.num_processes,
        "prompts": None if prompts is None else digest(*(prompt or "" for prompt in prompts)),
        "slots": len(reservoir),
        "conditions": len(reservoir.cond),
        "num_steps": chain.num_steps,
        "clip": chain.clip,
        "stochastic": chain.stochastic,
    }


if __name__ == "__main__":
    run_script(main, DKDMArguments, presets=DKDM_PRESETS)
