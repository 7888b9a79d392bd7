"""Measure students against their teacher on the same noises.

    accelerate launch training/evaluate.py --model fashion32-onestep --pretrained_teacher_model fashion32 \\
        --teacher_steps 1 5 50 --num_samples 10000 --output_dir evaluation

writes `metrics.json`, `samples.png` (teacher above the first student, same noises) and `quality.png`. In a student's
own folder, which is the default, the numbers go into its card too, and `--push_to_hub` pushes it.
"""

from dataclasses import dataclass, field
from pathlib import Path

from accelerate import Accelerator

from diffusers_onestep import OneStepPipeline, OneStepScheduler, Teacher, create_model_card, evaluate
from diffusers_onestep.arguments import HubArguments, parse_args
from diffusers_onestep.evaluation import comparison_grid, markdown_table, quality_plot, write_metrics
from diffusers_onestep.records import command_line


@dataclass
class EvaluateArguments(HubArguments):
    model: list[str] = field(default_factory=list, metadata={"help": "Students: folders, Hub ids or shipped names."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Where the numbers and pictures go; default: the first student's folder."}
    )
    pretrained_teacher_model: str | None = field(default=None, metadata={"help": "Their teacher."})
    teacher_steps: list[int] = field(
        default_factory=lambda: [1, 2, 5, 10, 20, 50], metadata={"help": "Steps at which to sample the teacher."}
    )
    num_inference_steps: list[int] | None = field(
        default=None, metadata={"help": "Steps of models that are no one-step students; default: the fitted ones."}
    )
    num_samples: int = field(default=10_000, metadata={"help": "A distance is comparable only at the same number."})
    batch_size: int = field(default=250, metadata={"help": "Samples at a time."})
    reference: str | None = field(default=None, metadata={"help": "Statistics of make_reference.py."})
    seed: int = field(default=0, metadata={"help": "Of the noises."})


def model_steps(pipeline: OneStepPipeline, args: EvaluateArguments) -> list[int | None]:
    """The numbers of steps to sample a model with; None for a student's own."""
    if pipeline.student_steps is not None or isinstance(pipeline.scheduler, OneStepScheduler):
        return [None]
    steps = args.num_inference_steps or getattr(pipeline.scheduler, "fitted_steps", None)
    if not steps:
        raise ValueError(
            f"`num_inference_steps` must be given for a model with a {type(pipeline.scheduler).__name__}, but is None."
        )
    return list(steps)


def main(args: EvaluateArguments) -> None:
    state = Accelerator()
    if args.output_dir is None and not (args.model and Path(args.model[0]).is_dir()):
        raise ValueError("`output_dir` must be given unless the first `model` is a folder, but is None.")
    output_dir = Path(args.output_dir or args.model[0])
    in_student = (output_dir / "model_index.json").is_file()
    if args.push_to_hub and not in_student:
        raise ValueError(f"`output_dir` must be the student's folder to be pushed, but is {args.output_dir!r}.")
    if state.is_main_process:
        args.open_repository(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    shared = {
        "num_samples": args.num_samples,
        "batch_size": args.batch_size,
        "seed": args.seed,
        "reference": args.reference,
        "all_processes": True,
    }
    teacher = None
    if args.pretrained_teacher_model:
        teacher = Teacher.from_pretrained(args.pretrained_teacher_model, device=state.device)
    rows = []
    students = [OneStepPipeline.from_pretrained(path).to(state.device) for path in args.model]
    for name, pipeline in zip(args.model, students, strict=True):
        for steps in model_steps(pipeline, args):
            rows.append(evaluate(pipeline, name=name, num_inference_steps=steps, **shared))
            state.print(rows[-1], flush=True)
    for steps in args.teacher_steps if teacher else []:
        rows.append(evaluate(teacher, name="teacher", num_inference_steps=steps, **shared))
        state.print(rows[-1], flush=True)
    if not state.is_main_process:
        return
    print(markdown_table(rows))
    write_metrics(output_dir / "metrics.json", rows, command=command_line() or "")
    quality_plot(rows, output_dir / "quality.png")
    if teacher and students:
        pipeline, steps = students[0], model_steps(students[0], args)[-1]
        comparison_grid(
            teacher,
            lambda noise, cond: (
                pipeline(latents=noise, num_inference_steps=steps, output_type="latent", **cond).images
            ),
            output_dir / "samples.png",
            seed=args.seed,
        )
    if in_student:
        create_model_card(output_dir)
    args.push(output_dir)


if __name__ == "__main__":
    main(parse_args(EvaluateArguments))
