"""Fit a distilled ODE solver to a teacher: one number per network call, in closed form (arXiv:2309.16421).

    accelerate launch training/fit_d_ode.py --pretrained_teacher_model fashion32 --output_dir fashion32-ddim \\
        --solver ddim --num_inference_steps 5 10

The scheduler goes to `output_dir/scheduler`: `pipe.scheduler = DistilledDDIMScheduler.from_pretrained(output_dir,
subfolder="scheduler")` in any pipeline of this teacher. `--save_pipeline` writes the whole repository.
"""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator

from diffusers_onestep import Teacher, fit_d_ode
from diffusers_onestep.arguments import parse_args
from diffusers_onestep.methods.base import normal
from diffusers_onestep.repository import write_repository
from diffusers_onestep.schedulers import SOLVERS, solver_for
from diffusers_onestep.trainer import sample_generators


@dataclass
class FitArguments:
    pretrained_teacher_model: str = field(metadata={"help": "A Hub id, a folder or a shipped name."})
    output_dir: str = field(metadata={"help": "Where the scheduler goes; tables there are kept beside the new ones."})
    solver: str = field(metadata={"help": f"One of {', '.join(SOLVERS)}."})
    num_inference_steps: list[int] = field(metadata={"help": "Numbers of steps to fit."})
    solver_order: int | None = field(default=None, metadata={"help": "Of dpmsolver and deis; default: diffusers'."})
    revision: str | None = field(default=None, metadata={"help": "Of the teacher's repository."})
    variant: str | None = field(default=None, metadata={"help": "Of the teacher's weights, such as fp16."})
    num_samples: int = field(default=100, metadata={"help": "Noises of the fit; paper: 20 to 100."})
    num_holdout_samples: int = field(default=100, metadata={"help": "Noises of the acceptance gate."})
    batch_size: int = field(default=100, metadata={"help": "Samples at a time on one device."})
    scale: int = field(default=10, metadata={"help": "Teacher's steps per step; paper: 10."})
    directions: int = field(default=1, metadata={"help": "2: an extension that fits two numbers per call."})
    prompts: str | None = field(default=None, metadata={"help": "File of prompts, one a line, taken in turn."})
    guidance_scale: float = field(default=1.0, metadata={"help": "Exactly as at inference."})
    seed: int = field(default=0, metadata={"help": "Of the noises."})
    mixed_precision: str | None = field(default=None, metadata={"help": "bf16 or fp16: of the network's calls."})
    save_pipeline: bool = field(default=False, metadata={"help": "Write the teacher's weights beside the scheduler."})
    push_to_hub: bool = field(default=False, metadata={"help": "Push what was written."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Default: the name of `output_dir`."})


def main(args: FitArguments) -> None:
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    teacher = Teacher.from_pretrained(
        args.pretrained_teacher_model, revision=args.revision, variant=args.variant, device=accelerator.device
    )
    teacher.denoiser.autocast_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    settings = {} if args.solver_order is None else {"solver_order": args.solver_order}
    scheduler = solver_for(args.solver, teacher.scheduler, **settings)
    folder = Path(args.output_dir) / "scheduler"
    if (folder / scheduler.config_name).is_file():
        kept = type(scheduler).from_pretrained(folder)
        for steps in kept.fitted_steps:
            scheduler.add_table(steps, kept.config.dode_tables[str(steps)])
    denoiser = teacher.guided(args.guidance_scale)
    conditions = all_conditions(teacher, args.prompts)

    def draw(first: int, count: int):
        """This process's share of noises `first .. first + count - 1`, and their conditions."""
        places = torch.arange(first, first + count)[accelerator.process_index :: accelerator.num_processes]
        noise = normal((len(places), *teacher.sample_shape), sample_generators(args.seed, 0, places.tolist()))
        cond = {k: v[places.to(v.device) % len(v)].to(accelerator.device) for k, v in conditions.items()}
        return noise.to(accelerator.device), cond

    noise, cond = draw(0, args.num_samples)
    holdout, holdout_cond = draw(args.num_samples, args.num_holdout_samples)
    refused = []
    for steps in args.num_inference_steps:
        report = fit_d_ode(
            scheduler,
            denoiser.call_network,
            steps,
            noise,
            scale=args.scale,
            holdout=holdout,
            cond=cond,
            holdout_cond=holdout_cond,
            batch_size=args.batch_size,
            directions=args.directions,
            notes={"guidance_scale": args.guidance_scale, "teacher_model": args.pretrained_teacher_model},
            progress_bar=accelerator.is_main_process,
        )
        accelerator.print(report)
        refused += [] if report.accepted else [steps]
    if accelerator.is_main_process and len(refused) < len(args.num_inference_steps):
        save(teacher, scheduler, args)
    if refused:
        accelerator.print(f"No table was kept for {refused} steps: the base solver is nearer to the teacher there.")
    if len(refused) == len(args.num_inference_steps):
        raise SystemExit("Nothing was saved.")


def all_conditions(teacher: Teacher, prompts: str | None) -> dict[str, torch.Tensor]:
    """The conditions that are taken in turn: every label, or every prompt of a file."""
    if teacher.takes_prompts != (prompts is not None):
        needed = "a file, for a text-to-image teacher" if teacher.takes_prompts else "None for this teacher"
        raise ValueError(f"`prompts` must be {needed}, but is {prompts!r}.")
    if prompts is None:
        return teacher.encode()
    lines = [line.strip() for line in Path(prompts).read_text().splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"`prompts` must have one prompt a line, but {prompts!r} has none.")
    return teacher.encode(lines)


def save(teacher: Teacher, scheduler, args: FitArguments) -> None:
    """The scheduler alone, or the teacher's whole repository with it; complete or as before."""
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if args.save_pipeline:
        teacher.pipeline.register_modules(scheduler=scheduler)
        write_repository(teacher.pipeline, folder)
    else:
        beside = folder / ".scheduler.writing"
        scheduler.save_pretrained(beside)
        (folder / "scheduler").mkdir(exist_ok=True)
        os.replace(beside / scheduler.config_name, folder / "scheduler" / scheduler.config_name)
        shutil.rmtree(beside)
    if args.push_to_hub:
        from huggingface_hub import create_repo, upload_folder

        repo = create_repo(args.hub_model_id or folder.name, exist_ok=True)
        upload_folder(repo_id=repo.repo_id, folder_path=folder, commit_message=f"Distilled {args.solver} solver")


if __name__ == "__main__":
    main(parse_args(FitArguments))
