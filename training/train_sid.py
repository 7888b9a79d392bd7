"""Distil a teacher into a one-step student without data: score identity distillation (arXiv:2404.04057).

accelerate launch training/train_sid.py --pretrained_teacher_model fashion32 --output_dir fashion32-sid
"""

from dataclasses import dataclass, field

from diffusers_onestep import SiD
from diffusers_onestep.arguments import parse_args
from diffusers_onestep.data import Batches, Conditions
from diffusers_onestep.distillation import DistillationArguments, train_student
from diffusers_onestep.presets import SID_PRESETS


@dataclass
class SiDArguments(DistillationArguments):
    alpha: float = field(default=1.2, metadata={"help": "Of the loss; the paper has 1.0 and 1.2."})
    start_ratio: float | None = 2.5
    noise_levels: str | None = field(
        default=None,
        metadata={"help": "karras, uniform or logit_normal; default: the paper's for the teacher's schedule."},
    )
    loss_scale: float = field(default=100.0, metadata={"help": "Factor on the student's loss."})
    sequential: bool = field(default=False, metadata={"help": "One score network's activations at a time."})
    adam_beta1: float = 0.0
    ema_halflife_kimg: float = 500.0


def main(args: SiDArguments) -> None:
    teacher = args.load_teacher()
    distiller = SiD(
        teacher.guided(args.guidance_scale),
        alpha=args.alpha,
        start_ratio=args.start_ratio,
        noise_levels=args.noise_levels,
        loss_scale=args.loss_scale,
        sequential=args.sequential,
        fake_score_updates=args.fake_score_updates,
        student=args.load_student(),
        student_timesteps=args.student_timesteps,
        lora=args.lora_config(),
    )
    batches = Batches(Conditions(teacher.encode()), args.train_batch_size, args.seed)
    train_student(distiller, batches, args, teacher)


if __name__ == "__main__":
    main(parse_args(SiDArguments, presets=SID_PRESETS))
