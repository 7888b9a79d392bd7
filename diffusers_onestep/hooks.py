"""From a trained network to a student's repository and its pictures: how `train()` saves and shows one."""

from collections.abc import Callable
from pathlib import Path

from diffusers import DiffusionPipeline
from torch import nn

from .arguments import TrainArguments
from .data import Batches, Samples
from .denoiser import Cond
from .health import Images, Watch
from .lora import is_adapted, merged, save_lora_weights
from .methods.base import Distiller, OneStepDistiller
from .methods.dkdm import DKDM
from .models import without_variance
from .pictures import picture
from .reports import comparison_grid
from .repository import write_repository
from .sampler import shared_inputs, spread
from .sampling import sample
from .teacher import Teacher
from .trainer import train

PICTURES, PROMPTED_PICTURES = 20, 4  # on samples.png, of each model


def train_student(distiller: OneStepDistiller, batches: Batches, args: TrainArguments) -> None:
    """`train()`, saving the student as a repository of its teacher's kind and, beside it, a picture of both."""
    save, validate = student_hooks(distiller, args, batches.samples)
    train(distiller, batches, args, save=save, validate=validate)


def student_hooks(
    distiller: OneStepDistiller,
    args: TrainArguments,
    samples: Samples | None = None,
) -> tuple[Callable[[Path], None] | None, Callable[[Path], dict[str, float]] | None]:
    """How `train()` saves and shows a student; two times None if it was not made from a `Teacher`. The picture of a
    text-to-image student is of some of `samples`' prompts."""
    teacher = distiller.origin
    if not isinstance(teacher, Teacher):
        return None, None

    def network() -> nn.Module:  # as it is at the time: a sharded one is replaced while it is written
        return distiller.student.network

    def pipeline() -> DiffusionPipeline:
        whole = merged(network()) if is_adapted(network()) else network()
        return teacher.student_pipeline(whole, **distiller.student_settings)

    # a start that it can not make is an error now, not after the training
    teacher.student_pipeline(teacher.denoiser.network, **distiller.student_settings)

    def run(noise, cond, generator):
        device = next(network().parameters()).device
        return distiller.sample(noise.to(device), {k: v.to(device) for k, v in cond.items()}, generator)

    guidance_scale = getattr(distiller.teacher, "guidance_scale", 1.0)
    validate = validation(teacher, run, args, samples, guidance_scale=guidance_scale)
    return student_writer(pipeline, teacher, args, network), validate


def student_writer(
    pipeline: Callable[[], DiffusionPipeline],
    teacher: Teacher,
    args: TrainArguments,
    network: Callable[[], nn.Module],
) -> Callable[[Path], None]:
    """Writes a student's repository into a folder, the parts that training leaves alone only the first time. An
    adapter is merged into the weights, and is written beside them too."""
    complete = set()

    def save(folder: Path) -> None:
        whole = pipeline()

        def more(beside: Path) -> None:
            if is_adapted(network()):
                save_lora_weights(type(whole), teacher.network_name, network(), beside)

        parts = (teacher.network_name, "scheduler") if folder in complete else None
        write_repository(whole, folder, more, parts=parts, frozen=Path(args.output_dir))
        complete.add(folder)

    return save


def compression_hooks(
    distiller: DKDM,
    args: TrainArguments,
    num_inference_steps: int = 20,
    samples: Samples | None = None,
) -> tuple[Callable[[Path], None] | None, Callable[[Path], dict[str, float]] | None]:
    """How `train()` saves and shows a compressed model; two times None if it was not made from a `Teacher`."""
    teacher = distiller.origin
    if not isinstance(teacher, Teacher):
        return None, None
    student = distiller.student

    def pipeline() -> DiffusionPipeline:
        learned = distiller.chain.learned_variance
        return teacher.compressed_pipeline(student.network if learned else without_variance(student.network))

    def run(noise, cond, generator):
        return sample(student, teacher.reference_scheduler, noise, cond, num_inference_steps=num_inference_steps)

    save = student_writer(pipeline, teacher, args, lambda: student.network)
    guidance_scale = getattr(distiller.teacher, "guidance_scale", 1.0)
    return save, validation(teacher, run, args, samples, num_inference_steps, guidance_scale)


def validation(
    teacher: Teacher,
    student: Images,
    args: TrainArguments,
    samples: Samples | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float = 1.0,
) -> Callable[[Path], dict[str, float]]:
    """How `train()` shows a student: `samples.png`, below the teacher at so many steps (by default its
    `reference_steps`), and its live numbers. Those of a text-to-image student are of `samples`' prompts, some of them
    from beginning to end: of one kind alone they would be far from all images, however good."""
    prompted = teacher.takes_prompts
    if prompted and samples is None:
        return lambda folder: {}

    def prompts(count: int) -> Cond | None:
        return samples.batch(spread(min(count, len(samples)), len(samples)))["cond"] if prompted else None

    watch = None
    if args.validation_samples:
        cond = prompts(args.validation_samples)
        watch = Watch(teacher, args, cond=cond, decode=teacher.decode, guidance_scale=guidance_scale)

    def above(noise, cond, generator):
        steps = num_inference_steps or teacher.reference_steps
        settings = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
        return picture(teacher.decode(teacher.sample(noise, cond, **settings)))

    def below(noise, cond, generator):
        return picture(teacher.decode(student(noise, cond, generator)))

    def validate(folder: Path) -> dict[str, float]:
        cond = prompts(PROMPTED_PICTURES)
        count = len(next(iter(cond.values()))) if cond else PICTURES
        noise, labels = shared_inputs(teacher.sample_shape, teacher.num_labels, count, args.seed)
        comparison_grid(above, below, noise, cond or labels, folder / "samples.png")
        return watch(student) if watch else {}

    return validate


def default_hooks(distiller: Distiller, args: TrainArguments):
    """The hooks of a method that was made from a `Teacher`; two times None for any other."""
    if isinstance(distiller, DKDM):
        return compression_hooks(distiller, args)
    if isinstance(distiller, OneStepDistiller):
        return student_hooks(distiller, args)
    return None, None
