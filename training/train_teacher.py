"""Train a small class-conditional pixel teacher, such as the shipped `fashion32`.

accelerate launch training/train_teacher.py --recipe fashion32 --dataset fashion32.npz --output_dir fashion32

`--recipe fashion-edm` is the same network with EDM's preconditioning, noise levels and sampler. The recipe `emoji-sd`,
a small Stable Diffusion, has flags of its own and a module of its own, `emoji_sd.py`.
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import emoji_sd
import torch
import torch.nn.functional as F
from diffusers import ConsistencyModelPipeline, DDPMScheduler, EDMEulerScheduler

from diffusers_onestep import Teacher, train
from diffusers_onestep.arguments import TrainArguments, run_script
from diffusers_onestep.data import Batches, load_images
from diffusers_onestep.methods.pretrain import Pretraining
from diffusers_onestep.models import SpaceToDepthUNet2DModel
from diffusers_onestep.pictures import picture, save_grid
from diffusers_onestep.repository import write_repository
from diffusers_onestep.sampling import sample

# the scheduler says what the network learns: DDPM's noise, or EDM's preconditioned denoising. One trailing step starts
# at the last timestep: several defaults would start at t = 0
RECIPES = {
    "fashion32": lambda: DDPMScheduler(timestep_spacing="trailing"),
    "fashion-edm": EDMEulerScheduler,
}
NETWORK = {"block_out_channels": (32, 64, 64), "attention_levels": (False, False, True)}


@dataclass
class TeacherArguments(TrainArguments):
    dataset: str = field(kw_only=True, metadata={"help": "An .npz file or a Hub data set of labelled images."})
    recipe: str = field(default="fashion32", metadata={"help": f"One of {sorted(RECIPES)}."})
    train_batch_size: int = 128
    max_train_steps: int = 14000
    learning_rate: float = 1.5e-3
    lr_scheduler: str = "cosine"
    lr_warmup_steps: int = 500
    ema_halflife_kimg: float = 50.0
    license: str | None = field(
        default=None,
        metadata={"help": "Of the model, in the Hub's spelling, such as mit; look at that of the data."},
    )
    label_dropout: float = field(default=0.1, metadata={"help": "How often the null label replaces the true one."})


def main(args: TeacherArguments) -> None:
    if args.recipe not in RECIPES:
        raise ValueError(f"`recipe` must be one of {sorted(RECIPES)}, but is {args.recipe!r}.")
    args.refuse_live_numbers()
    images = load_images(args.dataset)
    if images.labels is None:
        raise ValueError(f"`dataset` must have labels, but {args.dataset!r} has none.")
    _, channels, size, width = images.images.shape
    if width != size:
        raise ValueError(f"`dataset` must hold square images, but those of {args.dataset!r} are {size}x{width}.")
    multiple = 2 ** len(NETWORK["block_out_channels"])  # squares of two pixels, halved between levels
    if missing := -size % multiple:
        before, size = missing // 2, size + missing
        images.images = F.pad(images.images, (before, missing - before) * 2)
        print(f"The images are padded with black to {size}x{size}, sides that are a multiple of {multiple}.")
    torch.manual_seed(args.seed)
    classes = len(images.names)
    network = SpaceToDepthUNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        num_class_embeds=classes + 1,
        id2label=dict(enumerate(images.names)),
        **NETWORK,
    )
    pipeline = ConsistencyModelPipeline(network, RECIPES[args.recipe]())
    teacher = Teacher(pipeline)
    student = teacher.denoiser.requires_grad_(True)
    null = {"class_labels": torch.tensor([classes])}
    distiller = Pretraining(student, null, args.label_dropout)

    def save(folder: Path) -> None:
        # the stock pipeline that hands class labels to a U-Net, whatever the scheduler
        write_repository(ConsistencyModelPipeline(student.network, pipeline.scheduler), folder)

    def validate(folder: Path) -> dict[str, float]:
        generator = torch.Generator().manual_seed(args.seed)
        noise = torch.randn(4 * classes, *student_shape, generator=generator)
        cond = {"class_labels": torch.arange(classes).repeat(4)}
        steps = 18 if student.prediction_type == "edm" else 50
        samples = sample(student, teacher.reference_scheduler, noise, cond, num_inference_steps=steps)
        save_grid(picture(samples), folder / "samples.png", classes)
        return {}

    student_shape = distiller.sample_shape
    train(distiller, Batches(images, args.train_batch_size, args.seed), args, save=save, validate=validate)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe")
    if parser.parse_known_args()[0].recipe == emoji_sd.RECIPE:
        run_script(emoji_sd.main, emoji_sd.EmojiArguments)
    else:
        run_script(main, TeacherArguments)
