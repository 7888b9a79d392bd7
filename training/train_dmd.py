"""Distil a teacher into a one-step student by distribution matching (arXiv:2311.18828, arXiv:2405.14867).

    accelerate launch training/train_dmd.py --pretrained_teacher_model fashion32 --output_dir fashion32-dmd \\
        --pairs fashion32-pairs --regression_weight 0.25 --regression_loss pseudo-huber

`--pairs` are made by `make_pairs.py`. DMD2 needs none: `--fake_score_updates 5`, and `--gan_weight 3e-3 --dataset
...` for its GAN branch on real images; a text-to-image teacher takes them, and their captions, from `--dataset_name`.

    accelerate launch training/train_dmd.py --pretrained_teacher_model stabilityai/stable-diffusion-xl-base-1.0 \\
        --output_dir sdxl-dmd2-4step --preset dmd2-sdxl-4step --dataset_name my/captioned-images
"""

from dataclasses import dataclass, field

from diffusers_onestep import DMD, Teacher
from diffusers_onestep.arguments import run_script
from diffusers_onestep.data import Batches, LabelledImages, Samples, load_images
from diffusers_onestep.distillation import DistanceArguments, DistillationArguments, train_student
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
    gan_weight: float = field(
        default=0.0, metadata={"help": "Weight of the student's GAN loss; paper: 1e-3 to 5e-3; 0: off."}
    )
    gan_critic_weight: float = field(
        default=0.01, metadata={"help": "Weight of the critic's GAN loss, with a gan_weight."}
    )
    dataset: str | None = field(default=None, metadata={"help": "Real images for the GAN branch of a pixel teacher."})
    adam_weight_decay: float = 0.01
    lr_warmup_steps: int = 500


def main(args: DMDArguments) -> None:
    images = args.dataset if args.dataset_name is None else args.dataset_name
    for weight, name, source in (("regression_weight", "pairs", args.pairs), ("gan_weight", "dataset", images)):
        if getattr(args, weight) and source is None:
            raise ValueError(f"`{name}` must be given with a `{weight}` of {getattr(args, weight)}, but is None.")
        if not getattr(args, weight) and getattr(args, name) is not None:
            raise ValueError(f"`{name}` must be None without a `{weight}`, but is {getattr(args, name)!r}.")
    if args.regression_weight and args.gan_weight:
        raise ValueError("`regression_weight` and `gan_weight` must not both be set: DMD has the one, DMD2 the other.")
    if args.tiny_vae is not None and not args.regression_weight:
        raise ValueError(f"`tiny_vae` must be None without a `regression_weight`, but is {args.tiny_vae!r}.")
    teacher = args.load_teacher()
    if teacher.takes_prompts and args.dataset is not None:
        raise ValueError(
            f"`dataset` must be None for a text-to-image teacher, whose images are those of `dataset_name`, but is "
            f"{args.dataset!r}."
        )
    distance = args.regression_loss  # before prompts are encoded: its network may be missing
    if args.regression_weight:
        distance = args.model_distance(teacher, distance, "regression_loss")
    samples: Samples
    if args.gan_weight and not teacher.takes_prompts:
        args.refuse_prompts()
        samples = real_images(args.dataset, teacher)
    else:
        pairs = args.pairs if args.regression_weight else None
        samples = args.load_samples(teacher, images=bool(args.gan_weight), pairs=pairs)
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
        sample_shape=teacher.sample_shape,
        lora=args.lora_config(),
    )
    train_student(distiller, Batches(samples, args.train_batch_size, args.seed), args, teacher)


def real_images(dataset: str, teacher: Teacher) -> LabelledImages:
    """The images of `load_images` as a pixel teacher takes them: of its shape, and with labels if it has any.

    Raises:
        ValueError: if they are of another shape, or lack its labels.
    """
    images, num_labels = load_images(dataset), teacher.num_labels
    if (found := tuple(images.images.shape[1:])) != tuple(teacher.sample_shape):
        raise ValueError(
            f"`dataset` must hold images of the teacher's shape {tuple(teacher.sample_shape)} (channels, height, "
            f"width), but those of {dataset!r} have {found}."
        )
    if num_labels is None:
        return LabelledImages(images.images, None)
    low, high = (-1, -1) if images.labels is None else (value.item() for value in images.labels.aminmax())
    if low < 0 or high >= num_labels:
        found = "none" if images.labels is None else f"{low} to {high}"
        raise ValueError(
            f"`dataset` must have the teacher's labels 0..{num_labels - 1}, but those of {dataset!r} are {found}."
        )
    return images


if __name__ == "__main__":
    run_script(main, DMDArguments, presets=DMD_PRESETS)
