"""Run a training step of true size on random weights, on the CPU, and hold its memory against `onestep plan`.

    python training/measure_step.py --method sid --lora_rank 64 --resolution 256 --train_batch_size 1 \\
        --mixed_precision bf16 --teacher_dtype bf16

The network is Stable Diffusion 1.5's U-Net (860 M parameters) unless `--network_config` names another config.json;
`--width 0.5` makes it half as wide. The steps run in a fresh process: the kernel's high-water mark of its resident
memory, less what it held before it made networks, is compared with the plan. `--latency` times a student's call
instead, beside those of the bare network and decoder and of 50 guided steps.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline

from diffusers_onestep import Denoiser, GuidedDenoiser, NoiseSchedule, OneStepStableDiffusionPipeline
from diffusers_onestep.arguments import DTYPES, run_script
from diffusers_onestep.models import network_from_config
from diffusers_onestep.plan import METHODS, PlanArguments, example_cond, latent_shape, plan_step
from diffusers_onestep.schedulers import student_scheduler
from diffusers_onestep.trainer import Trainer

# stable-diffusion-v1-5, unet/config.json: all else is the default of UNet2DConditionModel
SD15_UNET = {
    "_class_name": "UNet2DConditionModel",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "in_channels": 4,
    "layers_per_block": 2,
    "out_channels": 4,
    "sample_size": 64,
}
SD15_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
VAE_SCALE = 8


@dataclass
class MeasureArguments(PlanArguments):
    pretrained_teacher_model: str = field(default="random", kw_only=True, metadata={"help": "Ignored."})
    device: str = field(default="cpu", metadata={"help": "Kind of step that the plan is made for: cpu or cuda."})
    network_config: str | None = field(
        default=None, metadata={"help": "A network's config.json; default: SD 1.5's U-Net."}
    )
    width: float = field(default=1.0, metadata={"help": "Factor on the channels of the network's levels."})
    steps: int = field(
        default=2, metadata={"help": "Steps to run: the last one is timed, when the optimizer has its states."}
    )
    latency: bool = field(
        default=False,
        metadata={"help": "Time one image of a student and of 50 guided steps instead of a training step."},
    )
    calls: int = field(default=9, metadata={"help": "Calls of the student whose median `--latency` takes."})
    measured: str | None = field(default=None, metadata={"help": "Internal: the file of the fresh process."})

    def network(self) -> dict:
        """The config of the network."""
        config = json.loads(Path(self.network_config).read_text()) if self.network_config else dict(SD15_UNET)
        if self.width != 1.0:
            config["block_out_channels"] = [round(self.width * c / 32) * 32 for c in config["block_out_channels"]]
        return config

    def scheduler(self) -> DDPMScheduler:
        """Stable Diffusion's noise."""
        return DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        )


def random_network(args: MeasureArguments) -> torch.nn.Module:
    torch.set_default_dtype(DTYPES[args.teacher_dtype or "fp32"])  # no larger copy is ever made
    network = network_from_config(args.network()).requires_grad_(False).eval()
    torch.set_default_dtype(torch.float32)
    return network


def resident(key: str) -> int:
    """A line of /proc/self/status in bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def run_steps(args: MeasureArguments) -> dict:
    """In the fresh process: the steps, their time, and the memory that they took."""
    before = resident("VmRSS")  # libraries are loaded
    network = random_network(args)
    denoiser = Denoiser(network, NoiseSchedule.from_scheduler(args.scheduler()), "epsilon")
    cond = example_cond(network, args.train_batch_size)
    sample_shape = latent_shape(network, args.resolution, VAE_SCALE)
    real = torch.randn(args.train_batch_size, *sample_shape)
    batch = {"batch_size": args.train_batch_size, "cond": cond, "x0": real}
    options = {"sequential": args.sequential, "kappas": args.kappas} if args.method == "sid" else {}
    distiller = METHODS[args.method](
        GuidedDenoiser(denoiser, args.guidance_scale, {k: v[:1] for k, v in cond.items()}),
        start_ratio=args.start_ratio,
        student_timesteps=args.student_timesteps,
        fake_score_updates=args.fake_score_updates,
        gan_weight=args.gan_weight,
        sample_shape=sample_shape,
        lora=args.lora_config(),
        **options,
    )
    with tempfile.TemporaryDirectory() as folder:
        args.output_dir = folder
        trainer = Trainer(distiller, args)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
        seconds = []
        for _ in range(args.steps):
            started = time.perf_counter()
            losses = trainer.train_step([batch])
            seconds.append(time.perf_counter() - started)
    peak = resident("VmHWM") - before
    return {"peak": peak, "before": before, "seconds": seconds, "losses": losses}


def run_latency(args: MeasureArguments) -> dict:
    """In the fresh process: seconds of one image by the bare network and decoder, by the student's pipeline, and by
    the teacher's with 50 guided steps. All start from embeddings of the prompt and noise that is there."""
    network = random_network(args)
    dtype = next(network.parameters()).dtype
    parts = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    parts |= {"unet": network, "vae": AutoencoderKL(**SD15_VAE).to(dtype).eval(), "requires_safety_checker": False}
    scheduler = args.scheduler()
    teacher = StableDiffusionPipeline(scheduler=DDIMScheduler.from_config(scheduler.config), **parts)
    student = OneStepStableDiffusionPipeline(
        scheduler=student_scheduler(scheduler, "epsilon", student_timesteps=[980], init_noise_sigma=1.0), **parts
    )
    shape = latent_shape(network, args.resolution, VAE_SCALE)
    x_t, t = torch.randn(1, *shape, dtype=dtype), torch.full((1,), 980)
    prompt = example_cond(network, 1)["encoder_hidden_states"].to(dtype)
    size = {"height": args.resolution, "width": args.resolution, "latents": x_t, "output_type": "pt"}
    for pipeline in (teacher, student):
        pipeline.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def bare():
        teacher.vae.decode(network(x_t, t, prompt).sample)

    def one_step():
        student(prompt_embeds=prompt, **size)

    def fifty_guided_steps():
        teacher(prompt_embeds=prompt, negative_prompt_embeds=prompt, num_inference_steps=50, **size)

    def seconds(call):
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    bare(), one_step()
    pairs = [(seconds(bare), seconds(one_step)) for _ in range(args.calls)]  # in turn: other work slows both
    times = {"bare": median(b for b, _ in pairs), "student": median(s for _, s in pairs)}
    return times | {"teacher": seconds(fifty_guided_steps)}


def main(args: MeasureArguments) -> None:
    if args.measured:
        result = run_latency(args) if args.latency else run_steps(args)
        Path(args.measured).write_text(json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        flags = {k: v for k, v in asdict(args).items() if v not in (None, False) and k != "output_dir"}
        command = [f"--{k}={v}" for k, v in flags.items() if not isinstance(v, (bool, list))]
        command += [f"--{k}" for k, v in flags.items() if v is True]
        command += [part for k, v in flags.items() if isinstance(v, list) for part in (f"--{k}", *map(str, v))]
        # freed memory goes back to the system at once, so that what is resident is what is alive
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}
        done = subprocess.run([sys.executable, __file__, *command, "--measured", report], env=environment)
        if done.returncode:
            raise SystemExit(done.returncode)  # it has said why
        result = json.loads(report.read_text())
    if args.latency:
        bare, student, teacher = (result[name] for name in ("bare", "student", "teacher"))
        print(f"bare network and decoder {bare:.3f} s, student's pipeline {student:.3f} s: {student / bare:.3f} times")
        print(f"teacher's pipeline, 50 guided steps, {teacher:.1f} s: {teacher / student:.1f} times the student's")
        return
    planned = plan_step(args.network(), args.scheduler(), args, VAE_SCALE)
    print(planned)
    print(f"{'measured peak':<32}{result['peak'] / 2**30:12.2f} GiB, {result['peak'] / planned.peak:.3f} of the plan")
    print(f"{'process before':<32}{result['before'] / 2**30:12.2f} GiB")
    print(f"{'seconds':<32}{result['seconds'][-1]:12.1f}")


if __name__ == "__main__":
    run_script(main, MeasureArguments)
