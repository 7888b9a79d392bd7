"""Distil a teacher into a one-step student by distribution matching (arXiv:2311.18828, arXiv:2405.14867).

    accelerate launch training/train_dmd.py --pretrained_teacher_model fashion32 --output_dir fashion32-dmd \\
        --pairs fashion32-pairs --regression_weight 0.25 --regression_loss pseudo-huber

`--pairs` are made by `make_pairs.py`. DMD2 needs none: `--fake_score_updates 5`, and `--gan_weight 3e-3 --dataset
...` for its GAN branch on real images; a text-to-image teacher takes them, and their captions, from `--dataset_name`.

    accelerate launch training/train_dmd.py --pretrained_teacher_model stabilityai/stable-diffusion-xl-base-1.0 \\
        --output_dir sdxl-dmd2-4step --preset dmd2-sdxl-4step --dataset_name my/captioned-images
"""

from dataclasses import dataclass, field

from diffusers_onestep import DMD
from diffusers_onestep.arguments import run_script
from diffusers_onestep.data import Batches
from diffusers_onestep.distillation import DistanceArguments, DistillationArguments
from diffusers_onestep.hooks import train_student
from diffusers_onestep.presets import DMD_PRESETS


@dataclass
class DMDArguments(DistillationArguments, DistanceArguments):
    pairs: str | None = field(default=None, metadata={"help": "Teacher pairs, a folder of make_pairs.py."})
    level_ratios: list[float] | None = field(
        default=None,
        metadata={"help": "Least and largest sigma / alpha of the comparison; default: the papers'."},
    )
    matching_weight: float = field(
        default=1.0, metadata={"help": "Weight of distribution matching; 0: regression alone."}
    )
    regression_weight: float = field(
        default=0.0, metadata={"help": "Weight of the regression on pairs; papers: 0.1 to 1; 0: off."}
    )
    regression_loss: str = field(
        default="lpips", metadata={"help": "Distance of the regression: lpips, l2 or pseudo-huber."}
    )
    gan_critic_weight: float = field(
        default=0.01, metadata={"help": "Weight of the critic's GAN loss, with a gan_weight."}
    )
    adam_weight_decay: float = 0.01
    lr_warmup_steps: int = 500


def main(args: DMDArguments) -> None:
    if args.regression_weight and args.pairs is None:
        raise ValueError(f"`pairs` must be given with a `regression_weight` of {args.regression_weight}, but is None.")
    if not args.regression_weight and args.pairs is not None:
        raise ValueError(f"`pairs` must be None without a `regression_weight`, but is {args.pairs!r}.")
    args.check_images()
    if args.regression_weight and args.gan_weight:
        raise ValueError("`regression_weight` and `gan_weight` must not both be set: DMD has the one, DMD2 the other.")
    if args.tiny_vae is not None and not args.regression_weight:
        raise ValueError(f"`tiny_vae` must be None without a `regression_weight`, but is {args.tiny_vae!r}.")
    teacher = args.load_teacher()
    distance = args.regression_loss  # before prompts are encoded: its network may be missing
    if args.regression_weight:
        distance = args.model_distance(teacher, distance, "regression_loss")
    samples = args.load_samples(teacher, pairs=args.pairs)
    distiller = DMD(
        args.guided(teacher),
        start_ratio=args.start_ratio,
        level_ratios=args.level_ratios,
        matching_weight=args.matching_weight,
        regression_weight=args.regression_weight,
        regression_loss=distance,
        gan_weight=args.gan_weight,
        gan_critic_weight=args.gan_critic_weight,
        fake_score_updates=args.fake_score_updates,
        student=args.load_student(),
        student_timesteps=args.student_timesteps,
        lora=args.lora_config(),
    )
    train_student(distiller, Batches(samples, args.train_batch_size, args.seed), args)


if __name__ == "__main__":
    run_script(main, DMDArguments, presets=DMD_PRESETS)
