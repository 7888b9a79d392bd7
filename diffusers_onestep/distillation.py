"""What the distillation scripts share: their flags, and the step from a trained network to a student's repository."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from accelerate.utils import set_seed
from peft import LoraConfig

from .arguments import TrainArguments
from .denoiser import Denoiser
from .evaluation import comparison_grid, conditions, sampler
from .health import Images, Watch
from .lora import is_adapted, merged, save_lora_weights
from .methods.base import Batch, Distiller, OneStepDistiller
from .methods.dkdm import DKDM
from .pipelines import OneStepPipeline
from .repository import write_repository
from .sampling import picture, sample
from .teacher import Teacher
from .trainer import train

PICTURES = 20  # on samples.png, of each model


@dataclass
class TeacherArguments(TrainArguments):
    """Flags of everything that learns from a teacher."""

    pretrained_teacher_model: str = field(kw_only=True, metadata={"help": "A Hub id, a folder or a shipped name."})
    revision: str | None = field(default=None, metadata={"help": "Of the teacher's repository."})
    variant: str | None = field(default=None, metadata={"help": "Of the teacher's weights, such as fp16."})
    guidance_scale: float = field(default=1.0, metadata={"help": "Of the teacher; the student bakes it in."})

    def load_teacher(self) -> Teacher:
        """The frozen teacher."""
        set_seed(self.seed)  # adapters and heads that are made next start at random
        teacher = Teacher.from_pretrained(self.pretrained_teacher_model, revision=self.revision, variant=self.variant)
        teacher.check_distillable()
        return teacher


@dataclass
class StudentArguments(TeacherArguments):
    """Flags of one-step students."""

    student_init: str | None = field(default=None, metadata={"help": "Model that the student starts as."})
    start_ratio: float | None = field(
        default=None, metadata={"help": "sigma / alpha that the student starts from; default: the method's."}
    )

    def load_student(self) -> Denoiser | None:
        """The model that `--student_init` names."""
        return Teacher.from_pretrained(self.student_init).denoiser if self.student_init else None


@dataclass
class DistillationArguments(StudentArguments):
    """Flags of score distillation."""

    student_timesteps: list[float] | None = field(
        default=None, metadata={"help": "Timesteps themselves, noisiest first; several: a few-step student."}
    )
    fake_score_updates: int = field(default=1, metadata={"help": "Fake-score updates per student update."})
    lora_rank: int | None = field(
        default=None, metadata={"help": "Train student and fake score as adapters on the teacher's own weights."}
    )
    lora_alpha: float | None = field(default=None, metadata={"help": "Default: `lora_rank`, a scale of 1."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Ends of layer names; default: all layers wider than the rank."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.lora_rank is None and (self.lora_alpha is not None or self.lora_target_modules):
            raise ValueError("`lora_rank` must be given with `lora_alpha` or `lora_target_modules`, but is None.")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(f"`lora_rank` must be at least 1, but is {self.lora_rank}.")

    def lora_config(self) -> LoraConfig | None:
        """What the `lora_` flags say."""
        if self.lora_rank is None:
            return None
        alpha = self.lora_rank if self.lora_alpha is None else self.lora_alpha
        return LoraConfig(r=self.lora_rank, lora_alpha=alpha, target_modules=self.lora_target_modules)


def train_student(
    distiller: OneStepDistiller, batches: Iterable[Batch], args: StudentArguments, teacher: Teacher
) -> None:
    """`train()`, saving the student as a repository of `teacher`'s kind and, beside it, a picture of both."""
    save, validate = student_hooks(distiller, args, teacher)
    train(distiller, batches, args, save=save, validate=validate)


def student_hooks(
    distiller: OneStepDistiller, args: TrainArguments, teacher: Teacher | None = None
) -> tuple[Callable[[Path], None] | None, Callable[[Path], dict[str, float]] | None]:
    """How `train()` saves and shows a student; two times None if it was not made from a `Teacher`."""
    teacher = teacher or distiller.origin
    if not isinstance(teacher, Teacher):
        return None, None
    network = distiller.student.network

    def pipeline() -> OneStepPipeline:
        return teacher.student_pipeline(network, **distiller.student_settings)

    def save(folder: Path) -> None:
        if not is_adapted(network):
            return write_repository(pipeline(), folder)
        whole = merged(network)
        complete = teacher.student_pipeline(whole, **distiller.student_settings)
        component = next(name for name, part in complete.components.items() if part is whole)
        write_repository(
            complete, folder, lambda beside: save_lora_weights(type(complete), component, network, beside)
        )

    def run(noise, cond, generator):
        device = next(network.parameters()).device
        return distiller.sample(noise.to(device), {k: v.to(device) for k, v in cond.items()}, generator)

    return save, validation(teacher, run, args)


def compression_hooks(
    distiller: DKDM, args: TrainArguments, num_inference_steps: int = 20
) -> tuple[Callable[[Path], None] | None, Callable[[Path], dict[str, float]] | None]:
    """How `train()` saves and shows a compressed model; two times None if it was not made from a `Teacher`."""
    teacher = distiller.origin
    if not isinstance(teacher, Teacher):
        return None, None
    student = distiller.student

    def save(folder: Path) -> None:
        write_repository(teacher.compressed_pipeline(student.network), folder)

    def run(noise, cond, generator):
        return sample(student, teacher.scheduler, noise, cond, num_inference_steps=num_inference_steps)

    return save, validation(teacher, run, args, num_inference_steps)


def validation(
    teacher: Teacher, student: Images, args: TrainArguments, num_inference_steps: int = 50
) -> Callable[[Path], dict[str, float]]:
    """How `train()` shows a student: `samples.png`, below the teacher at so many steps, and its live numbers."""
    watch = Watch(teacher, args) if args.validation_samples else None

    def validate(folder: Path) -> dict[str, float]:
        above = sampler(teacher, num_inference_steps=num_inference_steps)
        noise, cond = conditions(teacher, PICTURES, args.seed, None)
        comparison_grid(above, lambda *inputs: picture(student(*inputs)), noise, cond, folder / "samples.png")
        return watch(student) if watch else {}

    return validate


def default_hooks(distiller: Distiller, args: TrainArguments):
    """The hooks of a method that was made from a `Teacher`; two times None for any other."""
    if isinstance(distiller, DKDM):
        return compression_hooks(distiller, args)
    if isinstance(distiller, OneStepDistiller):
        return student_hooks(distiller, args)
    return None, None
