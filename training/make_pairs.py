"""Make teacher pairs for DMD's regression: noises, and the images that a deterministic solver makes of them.

    accelerate launch training/make_pairs.py --pretrained_teacher_model fashion32 --output_dir fashion32-pairs \\
        --num_pairs 10000 --num_inference_steps 50
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm.auto import tqdm

from diffusers_onestep import Teacher
from diffusers_onestep.arguments import patient_accelerator, run_script
from diffusers_onestep.data import join_pairs, write_pairs
from diffusers_onestep.methods.base import normal, sample_generators
from diffusers_onestep.prompts import check_prompts, read_prompts
from diffusers_onestep.sampling import check_deterministic


@dataclass
class PairArguments:
    pretrained_teacher_model: str = field(metadata={"help": "A Hub id, a folder or a shipped name."})
    output_dir: str = field(metadata={"help": "New folder of the data set."})
    revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the teacher's repository; default: main."}
    )
    variant: str | None = field(
        default=None,
        metadata={"help": "Variant of the teacher's weight files, such as fp16; default: the plain ones."},
    )
    num_pairs: int = field(default=10_000, metadata={"help": "Pairs to make; papers: 25,000 to 12 million."})
    num_inference_steps: int = field(default=50, metadata={"help": "Steps of the teacher's solver."})
    guidance_scale: float = field(
        default=1.0, metadata={"help": "Guidance of the teacher, as the student's training will have it; 1.0: off."}
    )
    prompts: str | None = field(
        default=None, metadata={"help": "Text-to-image: a file of prompts, one a line, taken in turn."}
    )
    resolution: int | None = field(
        default=None, metadata={"help": "Text-to-image: height and width in pixels; default: the teacher's."}
    )
    embedded_guidance: float = field(default=3.5, metadata={"help": "What FLUX.1-dev's guidance embedding is fed."})
    batch_size: int = field(default=250, metadata={"help": "Pairs at a time."})
    seed: int = field(default=0, metadata={"help": "Seed of the noises."})

    def __post_init__(self):
        for name in ("num_pairs", "num_inference_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, but is {getattr(self, name)}.")


def main(args: PairArguments) -> None:
    accelerator = patient_accelerator()
    if args.num_pairs < accelerator.num_processes:
        raise ValueError(
            f"`num_pairs` must be at least the number of processes, {accelerator.num_processes}, but is "
            f"{args.num_pairs}."
        )
    folder = Path(args.output_dir)
    if folder.exists():
        raise ValueError(f"`output_dir` must not exist yet, but {args.output_dir!r} does.")
    teacher = Teacher.from_pretrained(
        args.pretrained_teacher_model,
        revision=args.revision,
        variant=args.variant,
        device=accelerator.device,
        resolution=args.resolution,
        embedded_guidance=args.embedded_guidance,
    )
    solver = teacher.reference_scheduler
    check_deterministic(solver, "The scheduler of `pretrained_teacher_model`")
    check_prompts(teacher.takes_prompts, args.prompts)
    prompts = read_prompts(args.prompts) if args.prompts else None
    labels = {} if prompts else teacher.encode()
    own = torch.arange(args.num_pairs).tensor_split(accelerator.num_processes)[accelerator.process_index]

    def rows():
        for places in tqdm(own.split(args.batch_size), disable=not accelerator.is_main_process, desc="pairs"):
            generators = sample_generators(args.seed, 0, places.tolist())
            noise = normal((len(places), *teacher.sample_shape), generators)
            own_prompts = [prompts[place % len(prompts)] for place in places.tolist()] if prompts else None
            stored = {k: v[places % len(v)] for k, v in labels.items()}
            cond = teacher.encode(own_prompts) if prompts else stored
            stored = {"prompt": own_prompts} if prompts else stored
            target = teacher.sample(
                noise.to(accelerator.device),
                {k: v.to(accelerator.device) for k, v in cond.items()},
                num_inference_steps=args.num_inference_steps,
                guidance_scale=args.guidance_scale,
            ).cpu()
            for i in range(len(places)):
                yield {"noise": noise[i], "target": target[i]} | {k: v[i] for k, v in stored.items()}

    parts = [folder.with_name(f".{folder.name}.part-{rank}") for rank in range(accelerator.num_processes)]
    shutil.rmtree(parts[accelerator.process_index], ignore_errors=True)
    write_pairs(rows(), parts[accelerator.process_index], teacher.sample_shape)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        names = ("pretrained_teacher_model", "revision", "variant", "num_inference_steps", "guidance_scale", "seed")
        record = {name: getattr(args, name) for name in names} | {"scheduler": type(solver).__name__}
        if teacher.takes_prompts:
            record["embedded_guidance"] = args.embedded_guidance
        join_pairs(parts, folder, record)


if __name__ == "__main__":
    run_script(main, PairArguments)
