"""How good and how fast a model's images are: distances to real images, network evaluations (NFE), seconds."""

import inspect
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, EDMEulerScheduler, SchedulerMixin
from tqdm.auto import tqdm

from .families import family_of
from .features import CLIP, Extractor, load_extractor
from .files import write_json, written_beside
from .metrics import (
    agreement_points,
    bootstrap_error,
    density_coverage_points,
    diversity,
    frechet_distance_of_moments,
    inception_score,
    kernel_distance,
    kernel_distance_error,
    mean_distances,
    moments,
    precision_recall_points,
    retrieval_points,
    shuffled,
    square_root,
    standard_error,
)
from .network_calls import sample_shape_of
from .reference import Reference
from .sampling import picture, save_grid
from .teacher import Teacher

Sampler = Callable[[torch.Tensor, dict[str, Any], torch.Generator | None], torch.Tensor]

METRICS = (
    "fd",
    "kid",
    "precision_recall",
    "density_coverage",
    "inception_score",
    "diversity",
    "agreement",
    "clip_score",
    "retrieval",
)
# these want features of real images, not moments
AGAINST_IMAGES = {"kid", "precision_recall", "density_coverage", "retrieval"}
RETRIEVED = 5  # nearest real images in which a prompt's own is looked for
LATENCY_CALLS = 5
PACKAGES = ("diffusers-onestep", "torch", "diffusers", "transformers", "torch-fidelity")


@dataclass
class Score:
    """One number with its standard error (None if there are too few samples for one), what it was measured on and with
    which weights."""

    value: float
    error: float | None
    num_samples: int
    extractor: str
    weights: str  # digest


@dataclass
class Metrics:
    """One row of a table: a model at a number of network evaluations per image (NFE). `metric`, `value` and `error`
    are the first of `scores`."""

    model: str
    nfe: int
    metric: str
    value: float
    num_samples: int
    images_per_second: float
    seed: int
    error: float | None = None  # standard error of `value`
    extractor: str | None = None  # digest of the feature network's weights
    latency: float | None = None  # seconds of one image by itself
    reference: str | None = None
    num_reference: int | None = None
    resolution: list[int] | None = None  # height and width of the images, in pixels
    scores: dict[str, Score] = field(default_factory=dict)  # by name, such as KID-fashion

    def __post_init__(self):
        # rows of a metrics.json are read with Metrics(**row)
        self.scores = {name: Score(**v) if isinstance(v, dict) else v for name, v in self.scores.items()}


@dataclass
class Generated:
    """What all metrics of one model are computed from: features of its images, in the order of the noises."""

    model: str
    nfe: int
    seed: int
    images_per_second: float
    latency: float
    resolution: list[int]
    extractor: Extractor
    features: torch.Tensor
    logits: torch.Tensor | None
    groups: torch.Tensor | None = None  # which of them have one label or prompt
    prompts: list[str] | None = None
    cosines: torch.Tensor | None = None  # of each image with its prompt
    clip: CLIP | None = None


def sample_shape(
    pipeline: Teacher | DiffusionPipeline, resolution: int | tuple[int, int] | None = None
) -> tuple[int, int, int]:
    """`(C, H, W)` of the noises that a model starts from, a text-to-image pipeline at `resolution` pixels."""
    family = None if isinstance(pipeline, Teacher) else family_of(pipeline)
    if resolution is not None and family is None:
        raise ValueError(
            f"`resolution` must be None for a {type(pipeline).__name__}, whose size is its own, but is {resolution}."
        )
    if hasattr(pipeline, "sample_shape"):
        return tuple(pipeline.sample_shape)
    network = network_of(pipeline)
    if family is not None:
        height, width = (side // pipeline.vae_scale_factor for side in family.size(pipeline, resolution))
        return family.latent_channels(network), height, width
    return sample_shape_of(network)


def image_shape(
    pipeline: Teacher | DiffusionPipeline, resolution: int | tuple[int, int] | None = None
) -> tuple[int, int, int]:
    """`(C, H, W)` of a model's images, those of a text-to-image pipeline at `resolution` pixels."""
    if isinstance(pipeline, Teacher):
        return (3, *pipeline.resolution) if pipeline.takes_prompts else tuple(pipeline.sample_shape)
    family = family_of(pipeline)
    return (3, *family.size(pipeline, resolution)) if family else sample_shape(pipeline, resolution)


def network_of(pipeline: Teacher | DiffusionPipeline) -> torch.nn.Module:
    """The network whose evaluations are counted."""
    if isinstance(pipeline, Teacher):
        return pipeline.denoiser.network
    return getattr(pipeline, "unet", None) or pipeline.transformer


def takes_prompts(pipeline: Teacher | DiffusionPipeline) -> bool:
    """Whether images are asked for by prompts."""
    if isinstance(pipeline, Teacher):
        return pipeline.takes_prompts
    return "prompt" in inspect.signature(type(pipeline).__call__).parameters


def spread(count: int, available: int) -> list[int]:
    """Which of the `available` prompts `count` samples have: all in turn or, with fewer samples than prompts, some
    from beginning to end, since files of prompts are often sorted by what they show."""
    return [i * available // count if count < available else i % available for i in range(count)]


def noises_and_labels(
    shape: Sequence[int], num_labels: int | None, num_samples: int, seed: int, prompts: Sequence[str] | None = None
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The same unit-variance noises for every model, and labels in turn or prompts (see `spread`): `(N, C, H, W)` and
    a `cond`."""
    noise = torch.randn(num_samples, *shape, generator=torch.Generator().manual_seed(seed))
    if prompts is not None:
        return noise, {"prompt": [prompts[i] for i in spread(num_samples, len(prompts))]}
    return noise, {} if num_labels is None else {"class_labels": torch.arange(num_samples) % num_labels}


def conditions(
    pipeline: Teacher | DiffusionPipeline,
    num_samples: int,
    seed: int,
    prompts: Sequence[str] | None,
    resolution: int | tuple[int, int] | None = None,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """`noises_and_labels` of one model."""
    if takes_prompts(pipeline) != (prompts is not None):
        wants = "prompts" if takes_prompts(pipeline) else "no prompts"
        raise ValueError(
            f"`prompts` must be {'given for a text-to-image model' if prompts is None else 'None for a pixel model'}: "
            f"this {type(pipeline).__name__} takes {wants}."
        )
    num_labels = None if prompts is not None else pipeline.num_labels
    return noises_and_labels(sample_shape(pipeline, resolution), num_labels, num_samples, seed, prompts)


def part_of(cond: dict[str, Any], places: Sequence[int]) -> dict[str, Any]:
    """Conditions of some of the samples."""
    return {k: v[places] if isinstance(v, torch.Tensor) else [v[i] for i in places] for k, v in cond.items()}


def sampler(
    pipeline: Teacher | DiffusionPipeline,
    *,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    scheduler: SchedulerMixin | None = None,
) -> Sampler:
    """A model as a function from unit-variance noises, conditions and a generator to uint8 pixels `(B, C, H, W)`.

    A pixel model of many steps is sampled as a teacher is, whose noises and solver it shares: by DDIM where its
    scheduler is DDPM, by Heun's method where it is EDM's.
    """
    many_steps = getattr(pipeline, "student_steps", None) is None and not takes_prompts(pipeline)
    if many_steps and type(pipeline.scheduler) in (DDPMScheduler, DDIMScheduler, EDMEulerScheduler):
        pipeline = pipeline if isinstance(pipeline, Teacher) else Teacher(pipeline)
    if isinstance(pipeline, Teacher):
        if num_inference_steps is None:
            raise ValueError("`num_inference_steps` must be given for a teacher.")
        if not pipeline.takes_prompts:

            def run(noise, cond, generator):
                return picture(
                    pipeline.sample(
                        noise,
                        cond,
                        num_inference_steps=num_inference_steps,
                        guidance_scale=1.0 if guidance_scale is None else guidance_scale,
                        scheduler=scheduler,
                    )
                )

            return run
        guidance = pipeline.family.guidance(pipeline, 1.0 if guidance_scale is None else guidance_scale)
        pipeline = pipeline.pipeline
    else:
        guidance = {"guidance_scale": guidance_scale}
    if scheduler is not None:
        raise ValueError("`scheduler` must be None for a student, which has its own, and for text-to-image models.")
    pipeline.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": num_inference_steps} | guidance
    given = {k: v for k, v in given.items() if v is not None}
    device, prompted, family = pipeline.device, takes_prompts(pipeline), family_of(pipeline)

    @torch.no_grad()
    def run(noise, cond, generator):
        cond = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in cond.items()}
        latents = noise.to(device, network_of(pipeline).dtype)
        output = "pt" if prompted else "latent"
        start = family.start(pipeline, latents) if family else {"latents": latents}
        images = pipeline(**start, generator=generator, output_type=output, **cond, **given).images
        return picture(2 * images - 1) if prompted else picture(images)

    return run


@contextmanager
def evaluations_of(network: torch.nn.Module):
    """Count the samples that `network` is evaluated on: guidance counts twice, whether batched or not."""
    seen = [0]

    def note(module, args, kwargs):
        sample = next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.ndim > 2)
        seen[0] += len(sample)

    handle = network.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def shared(number: int, batch_size: int, all_processes: bool, work: Callable[[torch.Tensor], tuple], **bar: Any):
    """Do `work(places)` on batches of `range(number)`, shared over the processes if wanted; every process gets all
    results, in order: each entry of the tuples joined."""
    state = PartialState()
    rank, ranks = (state.process_index, state.num_processes) if all_processes else (0, 1)
    own = list(enumerate(torch.arange(number).split(batch_size)))[rank::ranks]
    parts = [(i, work(places)) for i, places in tqdm(own, leave=False, disable=rank > 0, **bar)]
    if ranks > 1:
        parts = sorted(gather_object(parts), key=lambda part: part[0])
    columns = zip(*(part for _, part in parts), strict=True)
    return tuple(None if column[0] is None else torch.cat(column) for column in columns)


def extract(images: torch.Tensor, extractor: Extractor, *, all_processes: bool = False) -> torch.Tensor:
    """Features `(N, D)` of uint8 images, shared over the processes if wanted."""
    work = lambda places: extractor(images[places])[:1]  # noqa: E731
    return shared(len(images), extractor.batch_size, all_processes, work, desc="reference")[0]


def generate(
    pipeline: Teacher | DiffusionPipeline,
    extractor: Extractor,
    *,
    name: str = "model",
    num_inference_steps: int | None = None,
    num_samples: int = 10_000,
    batch_size: int = 250,
    seed: int = 0,
    scheduler: SchedulerMixin | None = None,
    guidance_scale: float | None = None,
    prompts: Sequence[str] | None = None,
    resolution: int | tuple[int, int] | None = None,
    clip: CLIP | None = None,
    all_processes: bool = False,
) -> Generated:
    """Sample a model and keep what its metrics need; arguments as those of `evaluate`."""
    run = sampler(
        pipeline, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, scheduler=scheduler
    )
    noise, cond = conditions(pipeline, num_samples, seed, prompts, resolution)
    one = range(1)
    with evaluations_of(network_of(pipeline)) as seen:
        image = run(noise[:1], part_of(cond, one), torch.Generator().manual_seed(seed))  # warm-up
    nfe, latencies, timed = seen[0], [], []
    for _ in range(LATENCY_CALLS):
        started = time.perf_counter()
        run(noise[:1], part_of(cond, one), torch.Generator().manual_seed(seed))
        latencies.append(time.perf_counter() - started)

    def work(places):
        # of the noise between a few-step student's steps: the same, however the batches are shared
        generator = torch.Generator().manual_seed(seed + places[0].item())
        own = part_of(cond, places)
        started = time.perf_counter()
        pixels = run(noise[places], own, generator)
        timed.append((len(places), time.perf_counter() - started))
        return *extractor(pixels), clip.score(pixels, own["prompt"]) if clip else None

    features, logits, cosines = shared(num_samples, batch_size, all_processes, work, desc=f"{name}, NFE {nfe}")
    timed = timed[1:] or timed  # the first of several batches is a warm-up of this shape
    speeds = [sum(n for n, _ in timed) / max(sum(t for _, t in timed), 1e-9)] if timed else []
    speed = sum(gather_object(speeds)) if all_processes and PartialState().num_processes > 1 else speeds[0]
    latency = sorted(latencies)[LATENCY_CALLS // 2]
    kinds = len(prompts) if prompts is not None else pipeline.num_labels or 1
    groups = torch.arange(num_samples) % kinds if num_samples > kinds else None
    size, asked = list(image.shape[-2:]), cond.get("prompt")
    return Generated(name, nfe, seed, speed, latency, size, extractor, features, logits, groups, asked, cosines, clip)


def measure(
    samples: Generated,
    reference: Reference | None,
    metrics: Sequence[str] = ("fd",),
    teacher: Generated | None = None,
) -> Metrics:
    """The numbers of sampled images.

    Errors are standard errors: of a distance by the bootstrap over the generated images, of KID by disjoint subsets,
    of an Inception Score by its ten splits (one below 100 images), of a mean over images in closed form with
    neighbourhoods held fixed.

    Args:
        samples (`Generated`): of `generate`.
        reference (`Reference`, *optional*): real images, for the metrics that compare with them.
        metrics (sequence of `str`, *optional*, defaults to `("fd",)`): of `METRICS`; the first heads the row.
        teacher (`Generated`, *optional*): of the same noises, for `agreement`.
    """
    check_metrics(metrics)
    for wanted, given in (("reference", reference), ("teacher", teacher)):
        need = {"fd", *AGAINST_IMAGES} if wanted == "reference" else {"agreement"}
        if given is None and need & set(metrics):
            raise ValueError(f"`{wanted}` must be given for the metrics {sorted(need & set(metrics))}, but is None.")
    if reference is not None and reference.features is None and AGAINST_IMAGES & set(metrics):
        raise ValueError(
            f"`reference` must hold features for the metrics {sorted(AGAINST_IMAGES & set(metrics))}, but has moments "
            "alone: give images, or a file of make_reference.py."
        )
    extractor, scores = samples.extractor, {}
    digest = extractor.digest()

    def score(value: float, error: float, extractor: Extractor, digest: str) -> Score:
        known = error if math.isfinite(error) else None
        return Score(value, known, len(samples.features), extractor.label, digest)

    for metric in metrics:
        if metric == "clip_score":
            if samples.cosines is None:
                raise ValueError("`metrics` must be without 'clip_score' for samples without prompts.")
            numbers = samples.cosines.mean().item(), standard_error(samples.cosines)
            scores[samples.clip.number("CLIP-score")] = score(*numbers, samples.clip, samples.clip.digest())
        else:
            for kind, value, error in _numbers(metric, samples, reference, teacher):
                scores[extractor.number(kind)] = score(value, error, extractor, digest)
    name, first = next(iter(scores.items()))
    return Metrics(
        samples.model,
        samples.nfe,
        name,
        first.value,
        first.num_samples,
        samples.images_per_second,
        samples.seed,
        first.error,
        first.weights,
        samples.latency,
        reference.source if reference else None,
        reference.num_images if reference else None,
        samples.resolution,
        scores,
    )


def _numbers(metric: str, samples: Generated, reference: Reference | None, teacher: Generated | None):
    """Kind, value and standard error of each number of one metric."""
    features = samples.features
    if metric == "fd":
        expected = reference.mean, reference.covariance, square_root(reference.covariance)

        def distance(features):
            return frechet_distance_of_moments(*moments(features), *expected)

        yield "FD", distance(features), bootstrap_error(distance, features, resamples=10)
    elif metric == "kid":
        yield "KID", kernel_distance(features, reference.features), kernel_distance_error(features, reference.features)
    elif metric == "inception_score":
        if samples.logits is None:
            raise ValueError(f"`metrics` must be without 'inception_score' for {samples.extractor.label}: no logits.")
        splits = 10 if len(features) >= 100 else 1
        value, deviation = inception_score(shuffled(samples.logits).double().softmax(1), splits)
        yield "IS", value, deviation / (splits - 1) ** 0.5 if splits > 1 else math.nan
    elif metric == "diversity":
        yield "diversity", diversity(features), 2 * standard_error(mean_distances(features))
    elif metric == "retrieval":
        if samples.prompts is None or reference.captions is None:
            raise ValueError("`metrics` must be without 'retrieval' unless models have prompts and images captions.")
        found = retrieval_points(features, samples.prompts, reference.features, reference.captions, RETRIEVED)
        yield f"recall-at-{RETRIEVED}", found.mean().item(), standard_error(found)
    elif metric == "agreement":
        points = agreement_points(features, teacher.features, samples.groups)
        yield "agreement", points.mean().item(), standard_error(points)
    else:
        shares = precision_recall_points if metric == "precision_recall" else density_coverage_points
        for name, points in zip(metric.split("_"), shares(reference.features, features), strict=True):
            yield name, points.mean().item(), standard_error(points)


def check_metrics(metrics: Sequence[str]) -> None:
    """Raise a `ValueError` unless there is at least one metric and all are known."""
    if not metrics or set(metrics) - set(METRICS):
        raise ValueError(f"`metrics` must be some of {list(METRICS)}, but are {list(metrics)}.")


def evaluate(
    pipeline: Teacher | DiffusionPipeline,
    *,
    name: str = "model",
    num_inference_steps: int | None = None,
    num_samples: int = 10_000,
    batch_size: int = 250,
    seed: int = 0,
    reference: str | Path | Reference | None = None,
    scheduler: SchedulerMixin | None = None,
    metrics: Sequence[str] = ("fd",),
    extractor: str | Extractor = "fashion",
    extractor_weights: str | None = None,
    guidance_scale: float | None = None,
    prompts: Sequence[str] | None = None,
    resolution: int | tuple[int, int] | None = None,
    clip_model: str | CLIP | None = None,
    teacher: Generated | None = None,
    all_processes: bool = False,
) -> Metrics:
    """How good a student or a teacher is, and its seconds.

    Args:
        pipeline (`OneStepPipeline`, another pipeline or `Teacher`): what to sample; a teacher uses its own scheduler
            (DDIM for DDPM).
        name (`str`, *optional*, defaults to `"model"`): of the model in the table.
        num_inference_steps (`int`, *optional*): steps; a student has its own number.
        num_samples (`int`, *optional*, defaults to 10000): a distance is comparable only at the same number.
        batch_size (`int`, *optional*, defaults to 250): samples at a time.
        seed (`int`, *optional*, defaults to 0): of the noises, which are the same for every model.
        reference (path or `Reference`, *optional*): see `Reference.load`; by default Fashion-MNIST's test images.
        scheduler (`SchedulerMixin`, *optional*): a solver to sample a teacher with.
        metrics (sequence of `str`, *optional*, defaults to `("fd",)`): of `METRICS`; the first heads the row.
        extractor (`str` or `Extractor`, *optional*, defaults to `"fashion"`): see `load_extractor`.
        extractor_weights (`str`, *optional*): see `load_extractor`.
        guidance_scale (`float`, *optional*): of a teacher (1.0 by default) or of a pipeline that takes it; that of
            FLUX feeds its guidance embedding, as a teacher's `embedded_guidance` does.
        prompts (sequence of `str`, *optional*): of a text-to-image model, used in turn, or some from beginning to end
            where there are more than samples.
        resolution (`int` or `tuple[int, int]`, *optional*): height and width in pixels of a text-to-image pipeline; by
            default its own. A teacher has its own.
        clip_model (`str` or `CLIP`, *optional*): of `"clip_score"`.
        teacher (`Generated`, *optional*): what `generate` gave of the teacher on the same noises, for `"agreement"`.
        all_processes (`bool`, *optional*, defaults to `False`): share the sampling; every process must call this.
    """
    check_metrics(metrics)
    device = network_of(pipeline).device
    if isinstance(extractor, str):
        extractor = load_extractor(extractor, extractor_weights, device)
    if "clip_score" in metrics and not isinstance(clip_model, CLIP):
        clip_model = load_extractor("clip", clip_model, device)
    if not isinstance(reference, Reference) and {"fd", *AGAINST_IMAGES} & set(metrics):
        reference = Reference.load(reference, extractor)
    samples = generate(
        pipeline,
        extractor,
        name=name,
        num_inference_steps=num_inference_steps,
        num_samples=num_samples,
        batch_size=batch_size,
        seed=seed,
        scheduler=scheduler,
        guidance_scale=guidance_scale,
        prompts=prompts,
        resolution=resolution,
        clip=clip_model if "clip_score" in metrics else None,
        all_processes=all_processes,
    )
    return measure(samples, reference, metrics, teacher)


def markdown_table(rows: list[Metrics]) -> str:
    """Rows as a table for a terminal or a card."""
    names = list(dict.fromkeys(name for row in rows for name in row.scores or [row.metric]))
    sizes = {row.num_samples for row in rows}
    count = f" (n = {rows[0].num_samples:,})" if len(sizes) == 1 else ""
    head = ["model", "NFE", f"{names[0]}{count}", *names[1:], "latency (ms)", "images/s"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        own = row.scores or {row.metric: row}
        cells = [stated(own[name].value, own[name].error) if name in own else "–" for name in names]
        latency = "–" if row.latency is None else f"{1000 * row.latency:.3g}"
        speed = row.images_per_second
        cells = [row.model, str(row.nfe), *cells, latency, f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def stated(value: float, error: float | None) -> str:
    """A value to the digits that its error leaves it."""
    if not error:
        return f"{value:#.3g}"
    digits = min(6, max(0, 1 - math.floor(math.log10(error))))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def comparison_grid(above: Sampler, below: Sampler, noise: torch.Tensor, cond: dict[str, Any], path: Path) -> None:
    """A picture of one model (upper row of each pair) and another (lower) on the same noises and conditions."""
    columns, generators = (len(noise) + 1) // 2, [torch.Generator().manual_seed(0) for _ in range(2)]
    pictures = [run(noise, cond, generator) for run, generator in zip((above, below), generators, strict=True)]
    rows = [part for pair in zip(*(p.split(columns) for p in pictures), strict=True) for part in pair]
    save_grid(torch.cat(rows), path, columns, scale=2 if rows[0].shape[-1] <= 64 else 1)


def write_metrics(path: Path, rows: list[Metrics], *, command: str) -> None:
    """Rows as `metrics.json`, with all that it takes to measure them again."""
    seeds = sorted({row.seed for row in rows})
    about = provenance(command) | {"seed": seeds[0] if len(seeds) == 1 else seeds}
    write_json(path, about | {"results": [asdict(row) for row in rows]})


def provenance(command: str) -> dict[str, Any]:
    """What numbers were measured with: command, versions, hardware."""
    return {
        "command": command,
        "versions": {"python": platform.python_version()} | _versions(PACKAGES),
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"{PartialState().num_processes} processes with {torch.get_num_threads()} threads each, "
        f"{'cuda' if torch.cuda.is_available() else 'no GPU'}",
    }


def _versions(names: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue  # an extra that is not installed took no part
    return found


def quality_plot(rows: list[Metrics], path: Path) -> None:
    """Distance against network evaluations, a line per model with several and a point for each of the others."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    for name in dict.fromkeys(row.model for row in rows):
        own = sorted((row for row in rows if row.model == name), key=lambda row: row.nfe)
        axes.plot([row.nfe for row in own], [row.value for row in own], marker="o", label=name)
    scale = "log" if all(row.value > 0 for row in rows) else "linear"  # an unbiased KID may be negative
    axes.set(xscale="log", yscale=scale, xlabel="network evaluations", ylabel=rows[0].metric)
    counts = sorted({row.nfe for row in rows})
    axes.set_xticks(counts, [str(count) for count in counts], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    save_figure(figure, path)


def save_figure(figure: Any, path: Path, dpi: int = 120) -> None:
    """Write a figure as PNG, beside first and then renamed."""
    with written_beside(path) as beside:
        figure.savefig(beside, dpi=dpi, format="png")
