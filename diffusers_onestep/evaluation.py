"""How good and how fast a model's images are: one distance, one number of network evaluations, one speed."""

import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers import SchedulerMixin
from tqdm.auto import tqdm

from .features import FashionCNN, reference_moments
from .metrics import bootstrap_error, frechet_distance_of_moments, moments
from .pipelines import OneStepPipeline
from .repository import write_json
from .sampling import picture, save_grid
from .teacher import Teacher

Sampler = Callable[[torch.Tensor, dict[str, torch.Tensor]], torch.Tensor]


@dataclass
class Metrics:
    """One row of a table: a model at a number of network evaluations (NFE)."""

    model: str
    nfe: int
    metric: str
    value: float
    num_samples: int
    images_per_second: float
    seed: int
    error: float | None = None  # bootstrap standard error of `value`
    extractor: str | None = None  # digest of the feature network's weights


def noises_and_labels(sample_shape, num_labels: int | None, num_samples: int, seed: int):
    """The same unit-variance noises for every model, and labels in turn: `(N, C, H, W)` and a `cond`."""
    noise = torch.randn(num_samples, *sample_shape, generator=torch.Generator().manual_seed(seed))
    return noise, {} if num_labels is None else {"class_labels": torch.arange(num_samples) % num_labels}


def evaluate(
    pipeline: OneStepPipeline | Teacher,
    *,
    name: str = "model",
    num_inference_steps: int | None = None,
    num_samples: int = 10_000,
    batch_size: int = 250,
    seed: int = 0,
    reference: str | Path | None = None,
    scheduler: SchedulerMixin | None = None,
    all_processes: bool = False,
) -> Metrics:
    """FD-fashion of a student or a teacher, and its images per second while sampling.

    Args:
        pipeline (`OneStepPipeline` or `Teacher`): what to sample; a teacher uses its own scheduler (DDIM for DDPM).
        name (`str`, *optional*, defaults to `"model"`): of the model in the table.
        num_inference_steps (`int`, *optional*): network evaluations; a student has its own number.
        num_samples (`int`, *optional*, defaults to 10000): a distance is comparable only at the same number.
        batch_size (`int`, *optional*, defaults to 250): samples at a time.
        seed (`int`, *optional*, defaults to 0): of the noises, which are the same for every model.
        reference (path, *optional*): safetensors with `mean` and `covariance`; by default Fashion-MNIST's test images.
        scheduler (`SchedulerMixin`, *optional*): a solver to sample a teacher with.
        all_processes (`bool`, *optional*, defaults to `False`): share the sampling; every process must call this.
    """
    if isinstance(pipeline, Teacher):
        shape, steps = pipeline.sample_shape, num_inference_steps
        if steps is None:
            raise ValueError("`num_inference_steps` must be given for a teacher.")
        device = pipeline.pipeline.device

        def run(noise, cond, generator):
            return pipeline.sample(noise, cond, num_inference_steps=num_inference_steps, scheduler=scheduler)

        if scheduler is not None:
            scheduler.set_timesteps(num_inference_steps)
            steps = len(scheduler.timesteps)
    else:
        if scheduler is not None:
            raise ValueError("`scheduler` must be None for a student, which has its own.")
        shape = pipeline.sample_shape
        device = pipeline.device
        pipeline.set_progress_bar_config(disable=True)

        def run(noise, cond, generator):
            return pipeline(
                latents=noise,
                num_inference_steps=num_inference_steps,
                generator=generator,
                output_type="latent",
                **cond,
            ).images

    state = PartialState()
    rank, ranks = (state.process_index, state.num_processes) if all_processes else (0, 1)
    network, features, seconds = FashionCNN.from_shipped(), [], 0.0
    noise, cond = noises_and_labels(shape, pipeline.num_labels, num_samples, seed)
    run(noise[:2].to(device), {k: v[:2].to(device) for k, v in cond.items()}, None)  # warm-up
    if not isinstance(pipeline, Teacher):
        steps = len(pipeline.scheduler.timesteps)
    own = torch.arange(num_samples).split(batch_size)[rank::ranks]
    for places in tqdm(own, desc=f"{name}, NFE {steps}", leave=False, disable=rank > 0):
        part = {k: v[places].to(device) for k, v in cond.items()}
        # of the noise between a few-step student's steps: the same, however the batches are shared
        generator = torch.Generator().manual_seed(seed + places[0].item())
        started = time.perf_counter()
        pixels = picture(run(noise[places].to(device), part, generator))
        seconds += time.perf_counter() - started
        features.append(network(pixels)[0])
    speed = sum(map(len, own)) / max(seconds, 1e-9)
    if ranks > 1:
        features = gather_object(features)
        speed = sum(gather_object([speed]))
    expected = reference_moments(reference) if reference else reference_moments()
    samples = torch.cat(features)

    def distance(samples: torch.Tensor) -> float:
        return frechet_distance_of_moments(*moments(samples), *expected)

    error = bootstrap_error(distance, samples, resamples=10)
    return Metrics(name, steps, network.name, distance(samples), num_samples, speed, seed, error, network.digest())


def markdown_table(rows: list[Metrics]) -> str:
    """Rows as a table for a terminal or a card."""
    lines = [f"| model | NFE | {rows[0].metric} (n = {rows[0].num_samples:,}) | images/s |", "|---|---|---|---|"]
    for row in rows:
        error = "" if row.error is None else f" ± {row.error:.2f}"
        lines.append(f"| {row.model} | {row.nfe} | {row.value:.2f}{error} | {row.images_per_second:.0f} |")
    return "\n".join(lines)


def comparison_grid(
    teacher: Teacher,
    student: Sampler,
    path: Path,
    *,
    columns: int = 10,
    seed: int = 0,
    num_inference_steps: int = 50,
    cond: dict[str, torch.Tensor] | None = None,
    guidance_scale: float = 1.0,
) -> None:
    """A picture of teacher (upper row of each pair) and student (lower) on the same noises and labels, or on `cond`,
    with `guidance_scale` for the teacher."""
    count = len(next(iter(cond.values()))) if cond else 2 * columns
    noise, labels = noises_and_labels(teacher.sample_shape, teacher.num_labels, count, seed)
    cond = cond or labels
    steps = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    above, below = (picture(teacher.decode(x0)) for x0 in (teacher.sample(noise, cond, **steps), student(noise, cond)))
    rows = [part for pair in zip(above.split(columns), below.split(columns), strict=True) for part in pair]
    save_grid(torch.cat(rows), path, columns, scale=2 if noise.shape[-1] == above.shape[-1] else 1)


def write_metrics(path: Path, rows: list[Metrics], *, command: str) -> None:
    """Rows as `metrics.json`, with all that it takes to measure them again."""
    write_json(path, provenance(command) | {"results": [asdict(row) for row in rows]})


def provenance(command: str) -> dict[str, Any]:
    """What numbers were measured with: command, versions, hardware."""
    return {
        "command": command,
        "versions": {name: version(name) for name in ("diffusers-onestep", "torch", "diffusers")},
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"{PartialState().num_processes} processes with {torch.get_num_threads()} threads each, "
        f"{'cuda' if torch.cuda.is_available() else 'no GPU'}",
    }


def quality_plot(rows: list[Metrics], path: Path) -> None:
    """Distance against network evaluations, a line per model with several and a point for each of the others."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    for name in dict.fromkeys(row.model for row in rows):
        own = sorted((row for row in rows if row.model == name), key=lambda row: row.nfe)
        axes.plot([row.nfe for row in own], [row.value for row in own], marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="network evaluations", ylabel=rows[0].metric)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
