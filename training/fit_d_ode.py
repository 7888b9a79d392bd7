"""Fit a distilled ODE solver to a teacher: one number per network call, in closed form (arXiv:2309.16421).

    accelerate launch training/fit_d_ode.py --pretrained_teacher_model fashion32 --output_dir fashion32-ddim \\
        --solver ddim --num_inference_steps 5 10

The scheduler goes to `output_dir/scheduler`: `pipe.scheduler = DistilledDDIMScheduler.from_pretrained(output_dir,
subfolder="scheduler")` in any pipeline of this teacher. `--save_pipeline` writes the whole repository.
"""

import inspect
import json
import math
import os
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from diffusers_onestep import OneStepPipeline, Teacher, create_model_card, fit_d_ode
from diffusers_onestep.arguments import DTYPES, HubArguments, patient_accelerator, run_script
from diffusers_onestep.files import write_json
from diffusers_onestep.methods.base import normal, sample_generators
from diffusers_onestep.methods.dode import nested_teacher, paper
from diffusers_onestep.prompts import check_prompts, read_prompts
from diffusers_onestep.records import RUN_RECORD, run_record, without_secret_settings
from diffusers_onestep.repository import write_repository
from diffusers_onestep.run_folder import put_aside_old_numbers
from diffusers_onestep.sampling import dynamic_shift
from diffusers_onestep.schedulers import SOLVERS, DODESchedulerMixin, distilled_copy, solver_for


@dataclass
class FitArguments(HubArguments):
    pretrained_teacher_model: str = field(metadata={"help": "A Hub id, a folder or a shipped name."})
    output_dir: str = field(metadata={"help": "Where the scheduler goes; tables there are kept beside the new ones."})
    solver: str = field(metadata={"help": f"One of {', '.join(SOLVERS)}."})
    num_inference_steps: list[int] = field(metadata={"help": "Numbers of steps to fit."})
    solver_order: int | None = field(
        default=None, metadata={"help": "Order of dpmsolver and deis; default: diffusers'."}
    )
    revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the teacher's repository; default: main."}
    )
    variant: str | None = field(
        default=None,
        metadata={"help": "Variant of the teacher's weight files, such as fp16; default: the plain ones."},
    )
    num_samples: int = field(default=100, metadata={"help": "Noises that numbers are fitted to; paper: 20 to 100."})
    num_holdout_samples: int = field(
        default=100, metadata={"help": "Other noises, on which the fit must beat its solver to be kept."}
    )
    batch_size: int = field(default=100, metadata={"help": "Samples at a time on one device."})
    scale: int = field(default=10, metadata={"help": "Teacher's steps per step; paper: 10."})
    directions: int = field(
        default=1, metadata={"help": "Numbers per network call: 1, the paper's, or 2, an extension."}
    )
    prompts: str | None = field(
        default=None, metadata={"help": "Text-to-image: a file of prompts, one a line, taken in turn."}
    )
    resolution: int | None = field(
        default=None, metadata={"help": "Text-to-image: height and width in pixels; default: the teacher's."}
    )
    embedded_guidance: float = field(default=3.5, metadata={"help": "What FLUX.1-dev's guidance embedding is fed."})
    guidance_scale: float = field(
        default=1.0, metadata={"help": "Guidance of the teacher, exactly as at inference; 1.0: off."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the noises."})
    mixed_precision: str | None = field(
        default=None, metadata={"help": "no, bf16 or fp16 of the network's calls; default: the launcher's."}
    )
    save_pipeline: bool = field(default=False, metadata={"help": "Write the teacher's weights beside the scheduler."})


def main(args: FitArguments) -> None:
    accelerator = patient_accelerator(mixed_precision=args.mixed_precision)
    teacher = Teacher.from_pretrained(
        args.pretrained_teacher_model,
        revision=args.revision,
        variant=args.variant,
        device=accelerator.device,
        resolution=args.resolution,
        embedded_guidance=args.embedded_guidance,
    )
    check_prompts(teacher.takes_prompts, args.prompts)
    teacher.denoiser.autocast_dtype = DTYPES.get(accelerator.mixed_precision)
    settings = {} if args.solver_order is None else {"solver_order": args.solver_order}
    if teacher.scheduler.config.get("use_dynamic_shifting"):
        shift = math.exp(dynamic_shift(teacher.scheduler, teacher.sample_shape))
        settings |= {"use_dynamic_shifting": True, "time_shift_type": "exponential", "flow_shift": shift}
    scheduler = solver_for(args.solver, teacher.scheduler, **settings)
    if args.save_pipeline and args.guidance_scale != 1.0 and not teacher.takes_prompts:
        raise ValueError(
            "`save_pipeline` must be False for a guided pixel teacher, whose pipeline samples without guidance, but "
            f"is True with `guidance_scale` {args.guidance_scale}."
        )
    embeds = teacher.denoiser.network.config.get("guidance_embeds")
    notes = {
        "guidance_scale": args.guidance_scale,
        "embedded_guidance": args.embedded_guidance if embeds else None,
        "teacher_model": args.pretrained_teacher_model,
        "revision": args.revision,
        "variant": args.variant,
        "prompts": args.prompts,
        "sample_shape": list(teacher.sample_shape),
        "mixed_precision": str(accelerator.mixed_precision),
        "seed": args.seed,
    }
    take_up(scheduler, notes, args)
    for steps in args.num_inference_steps:  # an unfit number ends the program before the first fit
        student = distilled_copy(scheduler)
        student.set_timesteps(steps)
        student.check_grid()
        nested_teacher(student, args.scale, None)
    if accelerator.is_main_process:
        args.open_repository(args.output_dir)
    started = time.perf_counter()
    denoiser = teacher.guided(args.guidance_scale)
    conditions = all_conditions(teacher, args)

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
            notes=notes,
            progress_bar=accelerator.is_main_process,
        )
        accelerator.print(report)
        if not report.accepted:
            refused.append(steps)
        elif accelerator.is_main_process:
            save(scheduler, args)
    if refused:
        accelerator.print(f"Nothing was saved for {refused} steps: the base solver is nearer to the teacher there.")
    if len(refused) == len(args.num_inference_steps):
        raise SystemExit("Nothing was saved.")
    if accelerator.is_main_process:
        finish(teacher, scheduler, args, time.perf_counter() - started)


def take_up(scheduler: DODESchedulerMixin, notes: dict, args: FitArguments) -> None:
    """Keep the tables that are in the folder already, if they are of the same solver, teacher, resolution, prompts and
    guidance.

    Raises:
        ValueError: if they are not.
    """
    folder = Path(args.output_dir) / "scheduler"
    if not (folder / scheduler.config_name).is_file():
        return
    before, now = scheduler.load_config(folder), json.loads(scheduler.to_json_string())
    shared = ["teacher_model", "revision", "variant", "guidance_scale", "embedded_guidance", "sample_shape", "prompts"]
    keys = {"_class_name", *inspect.signature(type(scheduler).__init__).parameters} - {"self", "dode_tables"}
    differing = [key for key in keys if before.get(key) != now.get(key)]
    for steps, table in (before.get("dode_tables") or {}).items():
        # a table of an earlier release may lack one
        differing += [key for key in shared if key in table and table[key] != notes[key]]
        if not differing:
            scheduler.add_table(int(steps), table)
    if differing:
        raise ValueError(
            f"`output_dir` must be new or hold tables of the same solver and teacher, but {args.output_dir!r} differs "
            f"in {sorted(set(differing))}."
        )


def all_conditions(teacher: Teacher, args: FitArguments) -> dict[str, torch.Tensor]:
    """The conditions that are taken in turn: every label, or as many prompts of a file as there are samples."""
    if args.prompts is None:
        return teacher.encode()
    lines = read_prompts(args.prompts)[: args.num_samples + args.num_holdout_samples]
    parts = [teacher.encode(lines[i : i + args.batch_size]) for i in range(0, len(lines), args.batch_size)]
    return {k: torch.cat([part[k] for part in parts]) for k in parts[0]}


def save(scheduler: DODESchedulerMixin, args: FitArguments) -> None:
    """The scheduler, complete or as before."""
    folder = Path(args.output_dir)
    put_aside_old_numbers(folder)
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    beside = folder / ".scheduler.writing"
    scheduler.save_pretrained(beside)
    os.replace(beside / scheduler.config_name, folder / "scheduler" / scheduler.config_name)
    shutil.rmtree(beside)


def finish(teacher: Teacher, scheduler: DODESchedulerMixin, args: FitArguments, seconds: float) -> None:
    """What goes beside the scheduler: the card and what it is made of, and the teacher's weights and the Hub if asked
    for."""
    folder = Path(args.output_dir)
    if args.save_pipeline:
        pipeline = teacher.pipeline
        if teacher.takes_prompts:
            pipeline.register_modules(scheduler=scheduler)
        else:  # stock DDPM and DDIM pipelines know neither labels nor the calls of other solvers
            pipeline = OneStepPipeline(teacher.denoiser.network, scheduler, teacher.id2label)
        write_repository(pipeline, folder)
    write_json(folder / "training_args.json", without_secret_settings(asdict(args)))
    record = run_record("D-ODE", paper, args.pretrained_teacher_model, args.revision)
    labels = {"id2label": teacher.id2label, "num_labels": None if teacher.takes_prompts else teacher.num_labels}
    write_json(folder / RUN_RECORD, record | labels | {"seconds": round(seconds, 1)})
    create_model_card(folder)
    args.push(folder)


if __name__ == "__main__":
    run_script(main, FitArguments)
