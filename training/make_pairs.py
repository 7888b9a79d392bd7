"""Make teacher pairs for DMD's regression: noises, and the images that a deterministic solver makes of them.

    accelerate launch training/make_pairs.py --pretrained_teacher_model fashion32 --output_dir fashion32-pairs \\
        --num_pairs 10000 --num_inference_steps 50
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from diffusers_onestep import Teacher
from diffusers_onestep.arguments import parse_args
from diffusers_onestep.data import write_pairs


@dataclass
class PairArguments:
    pretrained_teacher_model: str = field(metadata={"help": "A Hub id, a folder or a shipped name."})
    output_dir: str = field(metadata={"help": "Folder of the data set."})
    num_pairs: int = field(default=10_000, metadata={"help": "Paper: 25,000 to 500,000."})
    num_inference_steps: int = field(default=50, metadata={"help": "Steps of the teacher's solver."})
    guidance_scale: float = field(default=1.0, metadata={"help": "As the student's training will have it."})
    batch_size: int = field(default=250, metadata={"help": "Pairs at a time."})
    seed: int = field(default=0, metadata={"help": "Of the noises."})


def main(args: PairArguments) -> None:
    accelerator = Accelerator()
    teacher = Teacher.from_pretrained(args.pretrained_teacher_model, device=accelerator.device)
    labels = teacher.encode()

    def rows():
        for first in tqdm(range(0, args.num_pairs, args.batch_size), disable=not accelerator.is_main_process):
            places = torch.arange(first, min(first + args.batch_size, args.num_pairs))
            generators = [torch.Generator().manual_seed(args.seed * args.num_pairs + int(n)) for n in places]
            noise = torch.stack([torch.randn(teacher.sample_shape, generator=g) for g in generators])
            cond = {k: v[places % len(v)].to(accelerator.device) for k, v in labels.items()}
            target = teacher.sample(
                noise.to(accelerator.device),
                cond,
                num_inference_steps=args.num_inference_steps,
                guidance_scale=args.guidance_scale,
            ).cpu()
            yield from (
                {"noise": n, "target": x} | {k: v[i].cpu() for k, v in cond.items()}
                for i, (n, x) in enumerate(zip(noise, target, strict=True))
            )

    write_pairs(rows(), Path(args.output_dir), teacher.sample_shape)


if __name__ == "__main__":
    main(parse_args(PairArguments))
