"""Distil a teacher into a one-step student that is its ODE trajectory, without data (arXiv:2411.08378).

accelerate launch training/train_pid.py --pretrained_teacher_model fashion32 --output_dir fashion32-pid \\
    --distance pseudo-huber
"""

from dataclasses import dataclass, field

from diffusers_onestep import PID
from diffusers_onestep.arguments import run_script
from diffusers_onestep.data import Batches
from diffusers_onestep.distillation import DistanceArguments
from diffusers_onestep.hooks import train_student
from diffusers_onestep.methods.pid import default_head
from diffusers_onestep.presets import PID_PRESETS


@dataclass
class PIDArguments(DistanceArguments):
    num_points: int = field(default=250, metadata={"help": "Points of the time grid, the paper's N; paper: 250."})
    rule: str = field(default="first", metadata={"help": "Derivative in time: first, second or exact."})
    distance: str = field(
        default="lpips-average",
        metadata={"help": "lpips-average (the paper's), lpips, stlpips, l1, l2 or pseudo-huber."},
    )
    head: str | None = field(default=None, metadata={"help": "network or teacher; default by prediction type."})
    optimizer: str = "radam"
    learning_rate: float = 2e-4
    ema_halflife_kimg: float = 500.0


def main(args: PIDArguments) -> None:
    teacher = args.load_teacher()
    distance = args.model_distance(teacher, args.distance, "distance")  # before prompts are encoded: it may be missing
    samples = args.load_samples(teacher)
    head = args.head or default_head(teacher.denoiser.prediction_type)
    distiller = PID(
        args.guided(teacher),
        num_points=args.num_points,
        start_ratio=args.start_ratio,
        rule=args.rule,
        distance=distance,
        head=head,
        student=args.load_student(head),
    )
    train_student(distiller, Batches(samples, args.train_batch_size, args.seed), args)


if __name__ == "__main__":
    run_script(main, PIDArguments, presets=PID_PRESETS)
