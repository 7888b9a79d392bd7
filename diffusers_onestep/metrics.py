"""Distances between sets of images, from features alone: `(N, D)` arrays or tensors in, numbers out."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

Features = torch.Tensor | np.ndarray
ROWS = 2000  # of a matrix of all pairs, at a time


def moments(features: Features) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean `(D,)` and unbiased covariance `(D, D)` of `(N, D)` features, in float64."""
    features = torch.as_tensor(features).double()
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"`features` must be (N, D) with N >= 2, but have shape {tuple(features.shape)}.")
    return features.mean(0), torch.cov(features.T)


def square_root(covariance: torch.Tensor) -> torch.Tensor:
    """The symmetric root `(D, D)` of a covariance; rounding below 0 counts as 0."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance_of_moments(
    mean_a: torch.Tensor,
    covariance_a: torch.Tensor,
    mean_b: torch.Tensor,
    covariance_b: torch.Tensor,
    root_b: torch.Tensor | None = None,
) -> float:
    """`|mean_a - mean_b|**2 + tr(A + B - 2 (B^(1/2) A B^(1/2))^(1/2))` (Heusel et al. 2017, Eq. 6), with symmetric
    eigendecompositions in float64; `root_b` is `square_root(covariance_b)`, if it is known."""
    root = square_root(covariance_b) if root_b is None else root_b
    cross = torch.linalg.eigvalsh(root @ covariance_a @ root).clamp(min=0).sqrt().sum()
    difference = mean_a - mean_b
    return (difference @ difference + covariance_a.trace() + covariance_b.trace() - 2 * cross).item()


def frechet_distance(a: Features, b: Features) -> float:
    """Fréchet distance of two sets of features `(N, D)` and `(M, D)`, each seen as a Gaussian."""
    return frechet_distance_of_moments(*moments(a), *moments(b))


def kernel_distance(a: Features, b: Features) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel `(x . y / D + 1)**3` (Binkowski et al. 2018, Eq. 4),
    over all pairs, in float64."""
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    n, m, dimension = len(a), len(b), a.shape[1]

    def total(x, y):
        return sum(((part @ y.T / dimension + 1) ** 3).sum() for part in x.split(ROWS))

    def same(x):
        return (total(x, x) - (((x * x).sum(1) / dimension + 1) ** 3).sum()) / (len(x) * (len(x) - 1))

    return (same(a) + same(b) - 2 * total(a, b) / (n * m)).item()


def kernel_distance_error(a: Features, b: Features, subsets: int = 10) -> float:
    """Standard error of `kernel_distance` from as many disjoint random subsets of both sides; the unbiased estimate
    cannot be resampled with replacement, where samples meet themselves."""
    if min(len(a), len(b)) < 2 * subsets:
        return float("nan")
    a, b = shuffled(a), shuffled(b)
    values = [kernel_distance(*parts) for parts in zip(a.tensor_split(subsets), b.tensor_split(subsets), strict=True)]
    return torch.tensor(values, dtype=torch.float64).std().item() / subsets**0.5


def shuffled(features: Features, seed: int = 0) -> torch.Tensor:
    """In a random order: data sets and files of prompts are often sorted, and parts of them then of one kind."""
    features = torch.as_tensor(features)
    return features[torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))]


def _neighbour_radius(points: torch.Tensor, k: int) -> torch.Tensor:
    """Distance `(N,)` of each point to its `k`-th neighbour."""
    if len(points) <= k:
        raise ValueError(f"`k` must be less than the number of samples ({len(points)}), but is {k}.")
    # the nearest is the sample itself
    return torch.cat(
        [torch.cdist(part, points).topk(k + 1, dim=1, largest=False).values[:, -1] for part in points.split(ROWS)]
    )


def _balls_around(points: torch.Tensor, support: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each point, how many of the support's balls hold it; for each ball, whether it holds any point."""
    radius = _neighbour_radius(support, k)
    counts, used = [], torch.zeros(len(support), dtype=torch.bool)
    for part in points.split(ROWS):
        inside = torch.cdist(part, support) <= radius
        counts.append(inside.sum(1))
        used |= inside.any(0)
    return torch.cat(counts).double(), used.double()


def precision_recall_points(real: Features, generated: Features, k: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """For each generated sample whether it lies within the real manifold, and for each real one the converse; a
    manifold are the balls around its samples, each out to the `k`-th neighbour (Kynkäänniemi et al. 2019, Eq. 2)."""
    real, generated = torch.as_tensor(real).double(), torch.as_tensor(generated).double()
    precise, recalled = _balls_around(generated, real, k)[0], _balls_around(real, generated, k)[0]
    return (precise > 0).double(), (recalled > 0).double()


def precision_recall(real: Features, generated: Features, k: int = 3) -> tuple[float, float]:
    """Shares of generated samples within the real manifold and of real ones within the generated manifold (see
    `precision_recall_points`)."""
    precise, recalled = precision_recall_points(real, generated, k)
    return precise.mean().item(), recalled.mean().item()


def density_coverage_points(real: Features, generated: Features, k: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """For each generated sample in how many real neighbourhoods it lies, over `k`, and for each real one whether its
    neighbourhood holds a generated sample; it reaches to the `k`-th neighbour (Naeem et al. 2020, Eqs. 4 and 5)."""
    real, generated = torch.as_tensor(real).double(), torch.as_tensor(generated).double()
    counts, covered = _balls_around(generated, real, k)
    return counts / k, covered


def density_coverage(real: Features, generated: Features, k: int = 5) -> tuple[float, float]:
    """The means of `density_coverage_points`. Of equal distributions: 1 and `1 - 0.5**k`."""
    density, coverage = density_coverage_points(real, generated, k)
    return density.mean().item(), coverage.mean().item()


def standard_error(points: torch.Tensor) -> float:
    """Of the mean of independent values `(N,)`: what the bootstrap finds for a mean, in closed form."""
    return (points.double().std() / len(points) ** 0.5).item()


def inception_score(probabilities: Features, splits: int = 10) -> tuple[float, float]:
    """Mean and standard deviation over `splits` of `exp(E KL(p(y|x) || p(y)))` (Salimans et al. 2016, Sec. 4), from
    class probabilities `(N, K)`, split in the order that they have."""
    probabilities = torch.as_tensor(probabilities).double()
    if not torch.allclose(probabilities.sum(1), torch.ones(len(probabilities), dtype=torch.float64), atol=1e-4):
        raise ValueError("`probabilities` must sum to 1 in every row: give probabilities, not logits.")
    scores = []
    for part in probabilities.tensor_split(splits):
        marginal = part.mean(0, keepdim=True)
        divergence = torch.special.xlogy(part, part) - torch.special.xlogy(part, marginal)
        scores.append(divergence.sum(1).mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item() if splits > 1 else 0.0


def mean_distances(features: Features) -> torch.Tensor:
    """Mean distance `(N,)` of each sample to all others."""
    features = torch.as_tensor(features).double()
    sums = torch.cat([torch.cdist(part, features).sum(1) for part in features.split(ROWS)])
    return sums / (len(features) - 1)


def diversity(features: Features) -> float:
    """Mean distance of two samples: `E|f(x) - f(y)|` over all pairs. Its standard error is twice that of the mean of
    `mean_distances` (Hoeffding 1948)."""
    return mean_distances(features).mean().item()


def agreement(a: Features, b: Features, groups: torch.Tensor | None = None) -> float:
    """How far two models make the same image of the same noise: `1 - E|a_i - b_i| / E|a_i - b_j|`; 1 for identical
    images, 0 if the noise does not matter. With `groups` `(N,)`, such as labels, `j` is of the group of `i`."""
    return agreement_points(a, b, groups).mean().item()


def agreement_points(a: Features, b: Features, groups: torch.Tensor | None = None) -> torch.Tensor:
    """`1 - |a_i - b_i| / E|a_i - b_j|` for each noise `(N,)`; see `agreement`."""
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    if a.shape != b.shape:
        raise ValueError(
            f"`a` and `b` must be of the same noises, but have shapes {tuple(a.shape)}, {tuple(b.shape)}."
        )
    same, total, pairs = (a - b).norm(dim=1), 0.0, 0
    for group in (None,) if groups is None else groups.unique():
        own = slice(None) if group is None else groups == group
        total += sum(torch.cdist(part, b[own]).sum() for part in a[own].split(ROWS)) - same[own].sum()
        pairs += len(a[own]) * (len(a[own]) - 1)
    return 1 - same / (total / pairs)


def retrieval_points(
    features: Features, prompts: Sequence[str], real: Features, captions: Sequence[str], k: int = 5
) -> torch.Tensor:
    """For each image `(N,)` whether one of the `k` real images nearest to it, by the cosine of their features, has the
    image's prompt for its caption (recall at `k`). A prompt that is nobody's caption is never found."""
    features, real = (nn.functional.normalize(torch.as_tensor(f).double(), dim=1) for f in (features, real))
    if (len(prompts), len(captions)) != (len(features), len(real)):
        raise ValueError(
            f"`prompts` and `captions` must be one per image ({len(features)}, {len(real)}), but are {len(prompts)}, "
            f"{len(captions)}."
        )
    if k > len(real):
        raise ValueError(f"`k` must be at most the number of real images ({len(real)}), but is {k}.")
    number = {caption: n for n, caption in enumerate(dict.fromkeys(captions))}
    wanted, held = torch.tensor([number.get(p, -1) for p in prompts]), torch.tensor([number[c] for c in captions])
    nearest = torch.cat([(part @ real.T).topk(k, dim=1).indices for part in features.split(ROWS)])
    return (held[nearest] == wanted[:, None]).any(1).double()


def bootstrap_error(
    statistic: Callable[[torch.Tensor], float], samples: Features, resamples: int = 20, seed: int = 0
) -> float:
    """Standard deviation of `statistic` over samples `(N, ...)` drawn again with replacement (Efron 1979)."""
    samples, generator = torch.as_tensor(samples), torch.Generator().manual_seed(seed)
    draws = (torch.randint(len(samples), (len(samples),), generator=generator) for _ in range(resamples))
    values = torch.tensor([statistic(samples[draw]) for draw in draws], dtype=torch.float64)
    return values.std().item()
