"""Distil a teacher into a one-step student without data: score identity distillation (arXiv:2404.04057).

    accelerate launch training/train_sid.py --pretrained_teacher_model fashion32 --output_dir fashion32-sid

With real images, `--gan_weight 10 --dataset ...` (text-to-image: `--dataset_name`) adds a GAN branch, as SiDA does.
"""

from dataclasses import dataclass, field

from diffusers_onestep import SiD
from diffusers_onestep.arguments import run_script
from diffusers_onestep.data import Batches
from diffusers_onestep.distillation import DistillationArguments
from diffusers_onestep.hooks import train_student
from diffusers_onestep.presets import SID_PRESETS


@dataclass
class SiDArguments(DistillationArguments):
    alpha: float = field(default=1.2, metadata={"help": "alpha of the student's loss; the paper has 1.0 and 1.2."})
    noise_levels: str | None = field(
        default=None,
        metadata={"help": "Drawn noise levels: karras, uniform or logit_normal; default: the paper's."},
    )
    loss_scale: float = field(default=100.0, metadata={"help": "Factor on the student's loss."})
    kappas: list[float] | None = field(
        default=None,
        metadata={"help": "SiD-LSG's guidance: one scale for all, or four (fake 1-3, teacher 4); default: none."},
    )
    augment_probability: float = field(
        default=0.0,
        metadata={"help": "Probability of each change of the fake score's images; paper: 0.12, 0.15; 0: off."},
    )
    gan_critic_weight: float = field(
        default=1.0, metadata={"help": "Weight of the critic's GAN loss, beside a sum over pixels."}
    )
    network_dropout: float | None = field(
        default=None, metadata={"help": "Dropout of student and fake score; default: the teacher's."}
    )
    sequential: bool = field(
        default=False, metadata={"help": "Keep one score network's activations at a time: less memory, more time."}
    )
    adam_beta1: float = 0.0
    ema_halflife_kimg: float = 500.0


def main(args: SiDArguments) -> None:
    args.check_images()
    teacher = args.load_teacher()
    samples = args.load_samples(teacher)
    distiller = SiD(
        args.guided(teacher),
        alpha=args.alpha,
        start_ratio=args.start_ratio,
        noise_levels=args.noise_levels,
        loss_scale=args.loss_scale,
        kappas=args.kappas,
        sequential=args.sequential,
        augment_probability=args.augment_probability,
        gan_weight=args.gan_weight,
        gan_critic_weight=args.gan_critic_weight,
        network_dropout=args.network_dropout,
        fake_score_updates=args.fake_score_updates,
        student=args.load_student(),
        student_timesteps=args.student_timesteps,
        lora=args.lora_config(),
    )
    train_student(distiller, Batches(samples, args.train_batch_size, args.seed), args)


if __name__ == "__main__":
    run_script(main, SiDArguments, presets=SID_PRESETS)
