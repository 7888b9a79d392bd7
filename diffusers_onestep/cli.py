"""The console command `onestep`: for people without a script."""

import argparse
import json
import os
import shutil
import time
from dataclasses import fields
from pathlib import Path

from .errors import input_errors


def main(argv: list[str] | None = None) -> None:
    """`onestep quickstart | sample | info | convert | push | plan`."""
    parser = argparse.ArgumentParser(prog="onestep", description="One-step students of diffusion models.")
    commands = parser.add_subparsers(dest="command", required=True)
    quick = commands.add_parser("quickstart", help="distil the shipped teacher into a one-step student, live")
    quick.add_argument(
        "--output_dir",
        default="onestep-quickstart",
        help="where the student and samples.png go (default: %(default)s)",
    )
    quick.add_argument("--max_train_steps", type=int, default=220, help="student updates (default: %(default)s)")
    quick.add_argument(
        "--num_samples", type=int, default=1000, help="images per row of the final table (default: %(default)s)"
    )
    quick.add_argument("--resume_from_checkpoint", choices=["latest"], help="go on where Ctrl-C has stopped it")
    quick.set_defaults(run=quickstart)
    sampling = commands.add_parser("sample", help="write a picture of a student's images")
    sampling.add_argument("model", help="a folder, a Hub id or a shipped name")
    sampling.add_argument("--class_labels", nargs="*", help="labels by id or name; default: drawn at random")
    sampling.add_argument("--prompts", nargs="*", help="what a text-to-image student is to show, an image each")
    sampling.add_argument(
        "--num_images", type=int, default=10, help="number of images without labels (default: %(default)s)"
    )
    sampling.add_argument(
        "--num_inference_steps",
        type=int,
        help="of a model that is no one-step student: a distilled solver's, a teacher",
    )
    sampling.add_argument("--seed", type=int, default=0, help="of the noises and random labels (default: %(default)s)")
    sampling.add_argument(
        "--output", default="samples.png", help="the picture to write: .png, .jpg or .webp (default: %(default)s)"
    )
    sampling.add_argument(
        "--dtype", choices=["fp32", "bf16", "fp16"], default="fp32", help="of the weights (default: %(default)s)"
    )
    sampling.set_defaults(run=sample)
    about = commands.add_parser("info", help="say what a model folder holds")
    about.add_argument("model", help="a folder or a shipped name")
    about.set_defaults(run=info)
    converting = commands.add_parser("convert", help="turn a published checkpoint into a diffusers folder")
    converting.add_argument("file", help="a checkpoint of EDM, SiD, EDM2, guided-diffusion or DMD2")
    converting.add_argument("out", help="the folder to write")
    converting.add_argument(
        "--kind", default="auto", help="auto (told by what the file holds), edm, edm2, guided-diffusion, sid or dmd2"
    )
    converting.add_argument("--base", help="of a text-to-image student: the pipeline whose U-Net it is")
    converting.add_argument("--config", help="JSON file of the network's options, where the file has none")
    converting.add_argument(
        "--student_timesteps",
        nargs="+",
        type=int,
        help="of a text-to-image student, noisiest first; default: told by the file's name",
    )
    converting.set_defaults(run=convert)
    pushing = commands.add_parser("push", help="push a student's folder to the Hub, with its card")
    pushing.add_argument("folder", help="what a training script wrote")
    pushing.add_argument("repo_id", help="user/name, or name for the user who is logged in")
    pushing.add_argument("--private", action="store_true", help="make the repository private, if it is new")
    pushing.add_argument("--revision", help="branch to commit to; default: main")
    pushing.add_argument("--create_pr", action="store_true", help="open a pull request instead")
    pushing.set_defaults(run=push)
    planning = commands.add_parser(
        "plan", help="say what memory and work a training step needs, from config files alone", add_help=False
    )
    planning.set_defaults(run=plan)
    known, flags = parser.parse_known_args(argv)
    args = vars(known)
    if args.pop("command") == "plan":
        args["flags"] = flags
    elif flags:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    with input_errors("onestep"):
        args.pop("run")(**args)


def quickstart(
    output_dir: str, max_train_steps: int, num_samples: int, resume_from_checkpoint: str | None = None
) -> None:
    """Distil `fashion32` by SiD and compare: teacher, fresh student, shipped student."""
    import torch

    from . import OneStepPipeline, SiD, Teacher, create_model_card, evaluate
    from .data import Batches, Conditions
    from .distillation import DistillationArguments
    from .files import read_json
    from .hooks import train_student
    from .presets import FASHION32_QUICKSTART
    from .records import command_line
    from .reports import markdown_table, write_metrics

    started = time.perf_counter()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(os.cpu_count() or 1)
    teacher = Teacher.from_pretrained("fashion32")
    method, loop = FASHION32_QUICKSTART["method"], FASHION32_QUICKSTART["loop"]
    earlier = Path(output_dir) / "training_args.json"
    if resume_from_checkpoint is None and earlier.is_file():
        settings = {"pretrained_teacher_model": "fashion32"} | loop
        if settings.items() <= read_json(earlier).items():  # of an earlier quickstart, and of nothing else
            shutil.rmtree(Path(output_dir) / "checkpoints", ignore_errors=True)
    args = DistillationArguments(
        output_dir=output_dir,
        pretrained_teacher_model="fashion32",
        max_train_steps=max_train_steps,
        checkpointing_steps=max_train_steps,
        checkpoints_total_limit=1,
        resume_from_checkpoint=resume_from_checkpoint,
        **loop,
    )
    print(f"Distilling fashion32 into one step with SiD: {max_train_steps} updates of {args.train_batch_size} images.")
    distiller = SiD(teacher, **method)
    train_student(distiller, Batches(Conditions(teacher.encode()), args.train_batch_size, args.seed), args)
    device = teacher.denoiser.network.device  # where the training has put it
    fresh = OneStepPipeline.from_pretrained(output_dir).to(device)
    shipped = OneStepPipeline.from_pretrained("fashion32-onestep").to(device)
    rows = [
        evaluate(teacher, name="teacher", num_inference_steps=n, num_samples=num_samples, seed=1) for n in (1, 5, 50)
    ]
    rows.append(evaluate(fresh, name="this student", num_samples=num_samples, seed=1))
    rows.append(evaluate(shipped, name="shipped student", num_samples=num_samples, seed=1))
    write_metrics(Path(output_dir) / "metrics.json", rows, command=command_line() or "onestep quickstart")
    create_model_card(output_dir)
    print(f"\n{markdown_table(rows)}\n")
    print(f"Student: {output_dir}   Pictures: {output_dir}/samples.png (teacher above student)")
    print(f"Done in {time.perf_counter() - started:.0f} s. Next: onestep sample {output_dir}")


def sample(
    model: str,
    class_labels: list[str] | None,
    prompts: list[str] | None,
    num_images: int,
    num_inference_steps: int | None,
    seed: int,
    output: str,
    dtype: str,
) -> None:
    """One picture with all images, ten a row, four of text-to-image students."""
    import torch

    from . import OneStepPipeline, Teacher
    from .arguments import DTYPES
    from .pictures import check_picture, picture, save_grid

    check_picture(Path(output), "output")
    pipeline = OneStepPipeline.from_pretrained(model, dtype=DTYPES[dtype])
    pipeline.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    settings = {"generator": torch.Generator().manual_seed(seed)}
    if num_inference_steps is not None:
        settings["num_inference_steps"] = num_inference_steps
    if not isinstance(pipeline, OneStepPipeline):
        if not prompts or class_labels:
            raise ValueError(
                "`prompts` must be given for a text-to-image student, and no `class_labels`, but they are "
                f"{prompts} and {class_labels}."
            )
        images = pipeline(prompts, output_type="pt", **settings).images
        save_grid(picture(2 * images - 1), Path(output), min(4, len(prompts)), scale=1)
        print(f"{len(prompts)} images in {output}")
        return
    if prompts:
        raise ValueError(f"`prompts` must not be given for a student that takes none, but are {prompts}.")
    if pipeline.student_steps is None:  # as teachers are sampled
        pipeline.scheduler = Teacher(pipeline).reference_scheduler
    if (channels := pipeline.sample_shape[0]) not in (1, 3):
        raise ValueError(
            f"`model` must make images, but {model!r} makes latents of {channels} channels: call the pipeline with "
            "output_type='latent', and decode them as its teacher's card says."
        )
    labels = [int(label) if label.isdigit() else label for label in class_labels] if class_labels else None
    batch_size = len(labels) if labels else num_images
    images = pipeline(batch_size, class_labels=labels, output_type="pt", **settings).images
    save_grid(picture(2 * images - 1), Path(output), min(10, batch_size))
    print(f"{batch_size} images in {output}")


def convert(
    file: str, out: str, kind: str, base: str | None, config: str | None, student_timesteps: list[int] | None
) -> None:
    """A diffusers folder of a published checkpoint."""
    from .conversion import convert

    options = None
    if config is not None:
        try:
            options = json.loads(Path(config).read_text())
        except (OSError, ValueError) as error:  # no file, no text, no JSON
            raise ValueError(f"`config` must be a readable JSON file, but {config!r} is not: {error}.") from error
        if not isinstance(options, dict):
            raise ValueError(
                f"`config` must be a JSON object of options, but {config!r} has a {type(options).__name__}."
            )
    kind = convert(file, out, kind=kind, base=base, config=options, student_timesteps=student_timesteps)
    print(f"{file} ({kind}) is now {out}")
    info(out)


def info(model: str) -> None:
    """What `model_index.json` and the configs say."""
    from .records import CONVERSION_RECORD
    from .repository import resolve_model

    folder = Path(resolve_model(model))
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"`model` must be a folder with a model_index.json or a shipped name, but is {model!r}.")
    index = json.loads((folder / "model_index.json").read_text())
    print(f"{folder}\n  pipeline: {index['_class_name']}")
    for name, entry in index.items():
        if isinstance(entry, list) and not name.startswith("_"):
            print(f"  {name}: {'.'.join(str(part) for part in entry)}")
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    for key in ("student_timesteps", "init_noise_sigma", "original_inference_steps", "num_train_timesteps"):
        if key in scheduler:
            print(f"  {key}: {scheduler[key]}")
    if (folder / CONVERSION_RECORD).is_file():
        source = json.loads((folder / CONVERSION_RECORD).read_text())
        print(f"  converted from: {source['file']} ({source['kind']})\n  licence: {source['license']['license']}")


def push(folder: str, repo_id: str, private: bool, revision: str | None, create_pr: bool) -> None:
    """One commit of the student, its card, metrics and pictures."""
    from . import push_student

    url = push_student(folder, repo_id, private=private, revision=revision, create_pr=create_pr)
    print(f"Pushed: {url}")


def plan(flags: list[str]) -> None:
    """What a step of `train_sid.py` or `train_dmd.py` with these flags needs."""
    from .arguments import parse_args
    from .plan import PlanArguments
    from .plan import plan as plan_run
    from .presets import DMD_PRESETS, SID_PRESETS

    method = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    method.add_argument("--method", default="sid")
    known = DMD_PRESETS if method.parse_known_args(flags)[0].method == "dmd" else SID_PRESETS
    planned = {f.name for f in fields(PlanArguments)}
    presets = {
        name: {flag: value for flag, value in settings.items() if flag in planned}
        for name, settings in known.items()
        if settings.get("matching_weight") != 0  # compares no scores
    }
    print(plan_run(parse_args(PlanArguments, flags, presets, program="onestep plan")))
    print(
        "Not counted: text encoders, VAE, perceptual losses, and of the GPU the context, the workspaces of kernels "
        "and fragmentation."
    )


if __name__ == "__main__":
    main()
