"""How good and how fast a model's images are: distances to real images, network evaluations (NFE), seconds."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline, SchedulerMixin
from tqdm.auto import tqdm

from .families import decode_sparingly
from .features import CLIP, Extractor, load_extractor
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
from .reference import Reference
from .reports import Metrics, Score
from .sampler import (
    batch_size_for,
    between_steps,
    evaluations_of,
    image_shape,
    inputs_of,
    network_of,
    part_of,
    sampler,
    takes_prompts,
)
from .teacher import Teacher

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


@dataclass
class Generated:
    """What all metrics of one model are computed from: features of its images, in the order of the noises."""

    model: str
    nfe: int
    seed: int
    images_per_second: float
    speed_error: float
    latency: float
    latency_error: float
    resolution: list[int]
    extractor: Extractor
    features: torch.Tensor
    logits: torch.Tensor | None
    groups: torch.Tensor | None = None  # which of them have one label or prompt
    prompts: list[str] | None = None
    cosines: torch.Tensor | None = None  # of each image with its prompt
    clip: CLIP | None = None


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
    batch_size: int | None = None,
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
    noise, cond = inputs_of(pipeline, num_samples, seed, prompts, resolution)
    shape = image_shape(pipeline, resolution)
    batch_size = batch_size or batch_size_for(shape)
    if takes_prompts(pipeline) and not isinstance(pipeline, Teacher):  # a teacher's does already
        decode_sparingly(pipeline.vae, *shape[1:])
    if clip and "prompt" not in cond:
        raise ValueError(f"`metrics` must be without 'clip_score' for a {type(pipeline).__name__} without prompts.")
    one = range(1)
    with evaluations_of(network_of(pipeline)) as seen:
        image = run(noise[:1], part_of(cond, one), torch.Generator().manual_seed(seed))  # warm-up
    nfe, latencies, timed = seen[0], [], []
    for _ in range(LATENCY_CALLS):
        started = time.perf_counter()
        run(noise[:1], part_of(cond, one), torch.Generator().manual_seed(seed))
        latencies.append(time.perf_counter() - started)

    def work(places):
        generator = between_steps(seed, places[0].item())  # the same, however the batches are shared
        own = part_of(cond, places)
        started = time.perf_counter()
        pixels = run(noise[places], own, generator)
        timed.append((len(places), time.perf_counter() - started))
        return *extractor(pixels), clip.score(pixels, own["prompt"]) if clip else None

    features, logits, cosines = shared(num_samples, batch_size, all_processes, work, desc=f"{name}, NFE {nfe}")
    timed = timed[1:] or timed  # the first of several batches is a warm-up of this shape
    speeds = [images_per_second(timed)] if timed else []
    if all_processes and PartialState().num_processes > 1:
        speeds = gather_object(speeds)
    speed, speed_error = sum(speed for speed, _ in speeds), math.hypot(*(error for _, error in speeds))
    latency = median(latencies), bootstrap_error(lambda calls: calls.median().item(), latencies, resamples=100)
    kinds = len(prompts) if prompts is not None else pipeline.num_labels or 1
    groups = torch.arange(num_samples) % kinds if num_samples >= 2 * kinds else None  # pairs of most of them
    size, asked = list(image.shape[-2:]), cond.get("prompt")
    seconds = (speed, speed_error, *latency)
    return Generated(name, nfe, seed, *seconds, size, extractor, features, logits, groups, asked, cosines, clip)


def images_per_second(timed: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Speed of batches (images, seconds), and its standard error as that of a ratio (Cochran 1977, Sec. 6.3); nan for
    one batch."""
    images, seconds = torch.tensor(timed, dtype=torch.float64).T
    speed = (images.sum() / seconds.sum()).item()
    if len(timed) < 2:
        return speed, math.nan
    return speed, standard_error(images - speed * seconds) / seconds.mean().item()


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
    check_reference(reference, metrics)
    extractor, scores = samples.extractor, {}
    digest = extractor.digest()

    def score(value: float, error: float, extractor: Extractor, digest: str, compared: int | None = None) -> Score:
        return Score(value, known(error), len(samples.features), extractor.label, digest, compared)

    for metric in metrics:
        if metric == "clip_score":
            if samples.cosines is None:
                raise ValueError("`metrics` must be without 'clip_score' for samples without prompts.")
            numbers = samples.cosines.mean().item(), standard_error(samples.cosines)
            scores[samples.clip.number("CLIP-score")] = score(*numbers, samples.clip, samples.clip.digest())
        else:
            compared = len(reference.features) if metric in AGAINST_IMAGES else None
            compared = reference.num_images if metric == "fd" else compared
            for kind, value, error in _numbers(metric, samples, reference, teacher):
                scores[extractor.number(kind)] = score(value, error, extractor, digest, compared)
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
        known(samples.latency_error),
        known(samples.speed_error),
        reference.source if reference else None,
        reference.num_images if reference else None,
        samples.resolution,
        scores,
    )


def known(error: float) -> float | None:
    """None where there were too few samples for an error."""
    return error if math.isfinite(error) else None


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


def check_reference(reference: Reference | None, metrics: Sequence[str]) -> None:
    """Raise a `ValueError` if metrics want features of real images and the reference has their moments alone."""
    wanting = sorted(AGAINST_IMAGES & set(metrics))
    if reference is not None and reference.features is None and wanting:
        raise ValueError(
            f"`reference` must hold features for the metrics {wanting}, but has moments alone: give images, or a file "
            "of make_reference.py."
        )


def evaluate(
    pipeline: Teacher | DiffusionPipeline,
    *,
    name: str = "model",
    num_inference_steps: int | None = None,
    num_samples: int = 10_000,
    batch_size: int | None = None,
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
        pipeline (`OneStepPipeline`, a text-to-image pipeline or `Teacher`): what to sample; a teacher by its
            `reference_scheduler`, as in training.
        name (`str`, *optional*, defaults to `"model"`): of the model in the table.
        num_inference_steps (`int`, *optional*): steps; a student has its own number.
        num_samples (`int`, *optional*, defaults to 10000): a distance is comparable only at the same number.
        batch_size (`int`, *optional*): samples at a time; by default 250, and fewer of images larger than 64 x 64.
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
    check_reference(reference, metrics)
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
