"""Measure students against their teacher on the same noises.

    accelerate launch training/evaluate.py --model fashion32-onestep --pretrained_teacher_model fashion32 \\
        --teacher_steps 1 5 50 --num_samples 10000 --output_dir evaluation \\
        --metrics fd kid precision_recall density_coverage inception_score diversity agreement

writes `metrics.json`, `quality.png` (the first number against network evaluations) and `samples.png` (teacher above
the first student, same noises). All processes share the sampling, and find what one would. In a student's own folder,
which is the default, the numbers go into its card too, and `--push_to_hub` pushes it. FID with EDM's statistics, a
distance of ImageNet features that needs no download, and text-to-image:

    accelerate launch training/evaluate.py --model cifar10-sid --extractor inception-v3-compat \\
        --reference cifar10-32x32.npz --num_samples 50000
    accelerate launch training/evaluate.py --model cifar10-sid --extractor effnet-lite0 --reference cifar10
    accelerate launch training/evaluate.py --model sd15-dmd --prompts prompts.txt --extractor dinov2 \\
        --metrics clip_score diversity
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count, product
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from diffusers_onestep import Metrics, OneStepPipeline, OneStepScheduler, Teacher, create_model_card
from diffusers_onestep.arguments import DTYPES, HubArguments, patient_accelerator, run_script
from diffusers_onestep.evaluation import (
    AGAINST_IMAGES,
    METRICS,
    check_metrics,
    check_reference,
    extract,
    generate,
    measure,
)
from diffusers_onestep.features import EXTRACTORS, load_extractor
from diffusers_onestep.hooks import PICTURES, PROMPTED_PICTURES
from diffusers_onestep.prompts import read_prompts
from diffusers_onestep.records import command_line
from diffusers_onestep.reference import Reference
from diffusers_onestep.reports import comparison_grid, markdown_table, quality_plot, stated, write_metrics
from diffusers_onestep.sampler import (
    Sampler,
    batch_size_for,
    image_shape,
    inputs_of,
    network_of,
    part_of,
    sample_shape,
    sampler,
    takes_prompts,
)


@dataclass
class EvaluateArguments(HubArguments):
    model: list[str] = field(default_factory=list, metadata={"help": "Students: folders, Hub ids or shipped names."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Where the numbers and pictures go; default: the first student's folder."}
    )
    pretrained_teacher_model: str | None = field(
        default=None,
        metadata={"help": "Teacher to measure them against, a Hub id, a folder or a shipped name; default: none."},
    )
    revision: str | None = field(
        default=None, metadata={"help": "Of the teacher's Hub repository: branch, tag or commit; default: its main."}
    )
    variant: str | None = field(default=None, metadata={"help": "Of the teacher's weights, such as fp16."})
    dtype: str = field(default="fp32", metadata={"help": "fp32, bf16 or fp16: of all models' weights."})
    teacher_steps: list[int] = field(
        default_factory=lambda: [1, 2, 5, 10, 20, 50], metadata={"help": "Steps at which to sample the teacher."}
    )
    guidance_scale: list[float] = field(
        default_factory=lambda: [1.0],
        metadata={"help": "Guidance of the teacher; several make a row each; 1.0: off."},
    )
    num_inference_steps: list[int] | None = field(
        default=None, metadata={"help": "Steps of models that are no one-step students; default: the fitted ones."}
    )
    num_samples: int = field(
        default=10_000, metadata={"help": "Images of each model; a distance is comparable only at the same number."}
    )
    batch_size: int | None = field(
        default=None, metadata={"help": "Samples at a time; default: 250, and fewer of images larger than 64x64."}
    )
    metrics: list[str] = field(
        default_factory=lambda: ["fd"], metadata={"help": f"Some of {', '.join(METRICS)}; the first is plotted."}
    )
    extractor: str = field(
        default="fashion", metadata={"help": f"Network whose features are compared: {', '.join(sorted(EXTRACTORS))}."}
    )
    extractor_weights: str | None = field(
        default=None,
        metadata={"help": "A file for Inception, a Hub id or folder for DINOv2 and CLIP; default: the usual ones."},
    )
    clip_model: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the CLIP score's network, for the metric clip_score."}
    )
    reference: str | None = field(
        default=None,
        metadata={"help": "File of make_reference.py, .npz of EDM or ADM, or a data set; default: Fashion-MNIST's."},
    )
    reference_split: str = field(default="test", metadata={"help": "Split of a `reference` that is a data set."})
    reference_resolution: int | None = field(
        default=None,
        metadata={"help": "Pixels to which its images are resized, their middle cut out; default: as they are."},
    )
    prompts: str | None = field(
        default=None,
        metadata={"help": "Text-to-image: a file of prompts, one a line; default: the reference's captions."},
    )
    resolution: int | None = field(
        default=None, metadata={"help": "Text-to-image: height and width in pixels; default: the models' own."}
    )
    embedded_guidance: float | None = field(
        default=None,
        metadata={"help": "What FLUX.1-dev's guidance embedding is fed; default: 3.5, and what a student has."},
    )
    mixed_precision: str | None = field(
        default=None, metadata={"help": "no, bf16 or fp16 of the networks' calls; default: the launcher's."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the noises."})

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"`dtype` must be one of {list(DTYPES)}, but is {self.dtype!r}.")


def model_steps(pipeline: DiffusionPipeline, args: EvaluateArguments) -> list[int | None]:
    """The numbers of steps to sample a model with; None for a student's own."""
    if getattr(pipeline, "student_steps", None) is not None or isinstance(pipeline.scheduler, OneStepScheduler):
        return [None]
    steps = args.num_inference_steps or getattr(pipeline.scheduler, "fitted_steps", None)
    if not steps:
        raise ValueError(
            f"`num_inference_steps` must be given for a model with a {type(pipeline.scheduler).__name__}, but is None."
        )
    return list(steps)


def model_guidance(pipeline: DiffusionPipeline, embedded_guidance: float | None) -> dict[str, float]:
    """The argument that feeds a model's guidance embedding, if it is to be fed something else than its own."""
    if embedded_guidance is None:
        return {}
    if not network_of(pipeline).config.get("guidance_embeds"):
        raise ValueError(
            f"`embedded_guidance` must be None for a {type(pipeline).__name__}, whose network has no guidance "
            f"embedding, but is {embedded_guidance}."
        )
    given = {"guidance_scale": embedded_guidance}
    if getattr(pipeline, "student_steps", None) is not None:
        pipeline.check_student_inputs(dict(given))  # a student's is baked in
    return given


def main(args: EvaluateArguments) -> None:
    state = patient_accelerator(mixed_precision=args.mixed_precision)
    check_metrics(args.metrics)
    if args.output_dir is None and not (args.model and Path(args.model[0]).is_dir()):
        raise ValueError("`output_dir` must be given unless the first `model` is a folder, but is None.")
    if "agreement" in args.metrics and not args.pretrained_teacher_model:
        raise ValueError("`pretrained_teacher_model` must be given for the metric 'agreement', but is None.")
    output_dir = Path(args.output_dir or args.model[0])
    in_student = (output_dir / "model_index.json").is_file()
    measured = [*args.model, args.pretrained_teacher_model][0]
    if measured is None:
        raise ValueError("`model` or `pretrained_teacher_model` must be given, but neither is.")
    if in_student and output_dir.resolve() != Path(measured).resolve():
        raise ValueError(
            f"`output_dir` must be the folder of {measured!r}, whose numbers go into its card, or of no model, but is "
            f"{str(output_dir)!r}."
        )
    if args.push_to_hub and not in_student:
        raise ValueError(f"`output_dir` must be the student's folder to be pushed, but is {args.output_dir!r}.")
    if state.is_main_process:
        args.open_repository(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    extractor = load_extractor(args.extractor, args.extractor_weights, state.device)
    teacher = target = None
    if args.pretrained_teacher_model:
        given = {} if args.embedded_guidance is None else {"embedded_guidance": args.embedded_guidance}
        teacher = Teacher.from_pretrained(
            args.pretrained_teacher_model,
            revision=args.revision,
            variant=args.variant,
            dtype=DTYPES[args.dtype],
            resolution=args.resolution,
            **given,
        )
        model_guidance(teacher.pipeline, args.embedded_guidance)
    students = [OneStepPipeline.from_pretrained(path, dtype=DTYPES[args.dtype]) for path in args.model]
    fed = [model_guidance(pipeline, args.embedded_guidance) for pipeline in students]
    models = [*([teacher] if teacher else []), *students]
    for model in models:  # what can not be sampled or measured is an error now
        if not extractor.takes(shape := image_shape(model, args.resolution)):
            other = "give --extractor effnet-lite0 and its --reference" if shape[0] in (1, 3) else "these are latents"
            raise ValueError(
                f"`extractor` must be one for images of shape {shape}, but {args.extractor!r} takes "
                f"({extractor.allowed}) alone: {other}."
            )
    shapes = {name: sample_shape(model, args.resolution) for name, model in zip(args.model, students, strict=True)}
    if teacher and any(shape != teacher.sample_shape for shape in shapes.values()):
        raise ValueError(
            f"`resolution` must be one at which all models have the same noises, but the teacher's are of shape "
            f"{teacher.sample_shape}, and of the students {shapes}."
        )
    batch_size = args.batch_size or batch_size_for(image_shape(models[0], args.resolution))
    steps_of = [model_steps(pipeline, args) for pipeline in students]
    blank = torch.zeros(1, *image_shape(models[0], args.resolution), dtype=torch.uint8)
    if "inception_score" in args.metrics and extractor(blank)[1] is None:
        raise ValueError(f"`metrics` must be without 'inception_score' for {extractor.label}, which has no logits.")
    if "clip_score" in args.metrics and not all(map(takes_prompts, models)):
        raise ValueError("`metrics` must be without 'clip_score' for models without prompts.")
    reference = None
    if {"fd", *AGAINST_IMAGES} & set(args.metrics):
        share = partial(extract, extractor=extractor, all_processes=True)
        images = {"split": args.reference_split, "resolution": args.reference_resolution}
        reference = Reference.load(args.reference, extractor, extract=share, **images)
        check_reference(reference, args.metrics)
    for model in models:
        state.prepare_model(network_of(model), device_placement=False, evaluation_mode=True)
    prompts = read_prompts(args.prompts) if args.prompts else None
    if prompts is None and reference and any(takes_prompts(model) for model in models):
        prompts = reference.captions
    sample = partial(
        generate,
        extractor=extractor,
        num_samples=args.num_samples,
        batch_size=batch_size,
        seed=args.seed,
        prompts=prompts,
        clip=load_extractor("clip", args.clip_model, state.device) if "clip_score" in args.metrics else None,
        all_processes=True,
    )
    teacher_rows, student_rows, pictures = [], [], []
    numbers = output_dir / "metrics.json"

    def keep() -> None:
        """All rows so far, on disk after each: a run that is cut off leaves them."""
        rows = student_rows + teacher_rows
        if len(rows) == 1 and numbers.is_file():  # other metrics of the same models, perhaps
            free = (output_dir / f"metrics-{number}.json" for number in count(1))
            numbers.replace(next(path for path in free if not path.exists()))
        precision = state.mixed_precision if args.dtype == "fp32" else args.dtype
        write_metrics(numbers, rows, command=command_line() or "", precision=precision)

    steps_and_scales = product(sorted(args.teacher_steps, reverse=True), reversed(args.guidance_scale))
    for steps, guidance_scale in steps_and_scales if teacher else ():
        own = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
        name = "teacher" if len(args.guidance_scale) == 1 else f"teacher, guidance {guidance_scale:g}"
        with on_device(teacher, state.device):
            samples = sample(teacher, name=name, **own)
        target = target or samples  # what students are to agree with: the teacher at its most steps
        if state.is_main_process:  # others share the sampling, and have no numbers
            teacher_rows.insert(0, report(samples, reference, args.metrics, target))
            keep()
        pictures = pictures or [in_parts(teacher, sampler(teacher, **own), state.device, batch_size)]
    for name, pipeline, guidance, own_steps in zip(args.model, students, fed, steps_of, strict=True):
        for steps in own_steps:
            with on_device(pipeline, state.device):
                samples = sample(
                    pipeline, name=name, num_inference_steps=steps, resolution=args.resolution, **guidance
                )
            if state.is_main_process:
                student_rows.append(report(samples, reference, args.metrics, target))
                keep()
    rows = student_rows + teacher_rows
    if not rows:
        return
    print(markdown_table(rows))
    quality_plot(rows, output_dir / "quality.png")
    if teacher and students:
        run = sampler(students[0], num_inference_steps=steps_of[0][-1], **fed[0])
        pictures.append(in_parts(students[0], run, state.device, batch_size))
        number = PROMPTED_PICTURES if takes_prompts(teacher) else PICTURES
        comparison_grid(*pictures, *inputs_of(teacher, number, args.seed, prompts), output_dir / "samples.png")
    if in_student:
        create_model_card(output_dir)
    args.push(output_dir)


@contextmanager
def on_device(model: Teacher | DiffusionPipeline, device: torch.device) -> Iterator[None]:
    """Only the model that is sampled is on the device."""
    pipeline = model.pipeline if isinstance(model, Teacher) else model
    pipeline.to(device)
    try:
        yield
    finally:
        pipeline.to("cpu")


def in_parts(model: Teacher | DiffusionPipeline, run: Sampler, device: torch.device, batch_size: int) -> Sampler:
    """A sampler with its model on the device only while it runs, and no more samples at a time than were measured."""

    def draw(noise, cond, generator):
        with on_device(model, device):
            parts = torch.arange(len(noise)).split(batch_size)
            return torch.cat([run(noise[places], part_of(cond, places), generator) for places in parts])

    return draw


def report(samples, reference, metrics, teacher) -> Metrics:
    """One row, measured and said at once."""
    row = measure(samples, reference, metrics, teacher)
    numbers = ", ".join(f"{name} {stated(score.value, score.error)}" for name, score in row.scores.items())
    print(f"{row.model}, NFE {row.nfe}: {numbers}", flush=True)
    return row


if __name__ == "__main__":
    run_script(main, EvaluateArguments)
