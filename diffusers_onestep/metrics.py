"""Distances between sets of images, from features alone: `(N, D)` arrays or tensors in, numbers out."""

from collections.abc import Callable

import numpy as np
import torch

Features = torch.Tensor | np.ndarray


def moments(features: Features) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean `(D,)` and unbiased covariance `(D, D)` of `(N, D)` features, in float64."""
    features = torch.as_tensor(features).double()
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"`features` must be (N, D) with N >= 2, but have shape {tuple(features.shape)}.")
    return features.mean(0), torch.cov(features.T)


def frechet_distance_of_moments(
    mean_a: torch.Tensor, covariance_a: torch.Tensor, mean_b: torch.Tensor, covariance_b: torch.Tensor
) -> float:
    """`|mean_a - mean_b|**2 + tr(A + B - 2 (A^(1/2) B A^(1/2))^(1/2))` (Heusel et al. 2017, Eq. 6), with symmetric
    eigendecompositions in float64."""
    values, vectors = torch.linalg.eigh(covariance_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp(min=0).sqrt().sum()
    difference = mean_a - mean_b
    return (difference @ difference + covariance_a.trace() + covariance_b.trace() - 2 * cross).item()


def frechet_distance(a: Features, b: Features) -> float:
    """Fréchet distance of two sets of features `(N, D)` and `(M, D)`, each seen as a Gaussian."""
    return frechet_distance_of_moments(*moments(a), *moments(b))


def kernel_distance(a: Features, b: Features) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel `(x . y / D + 1)**3` (Binkowski et al. 2018, Eq. 4),
    over all pairs at once, in float64."""
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    n, m, dimension = len(a), len(b), a.shape[1]

    def kernel(x, y):
        return (x @ y.T / dimension + 1) ** 3

    within_a, within_b = kernel(a, a), kernel(b, b)
    same = (within_a.sum() - within_a.trace()) / (n * (n - 1)) + (within_b.sum() - within_b.trace()) / (m * (m - 1))
    return (same - 2 * kernel(a, b).mean()).item()


def precision_recall(real: Features, generated: Features, k: int = 3) -> tuple[float, float]:
    """Shares of generated samples within the real manifold and of real ones within the generated manifold: in a ball
    around some sample, out to its `k`-th neighbour (Kynkäänniemi et al. 2019, Eq. 2)."""
    real, generated = torch.as_tensor(real).double(), torch.as_tensor(generated).double()

    def covered(points, support):
        radius = torch.cdist(support, support).kthvalue(k + 1, dim=1).values  # the nearest is the sample itself
        return (torch.cdist(points, support) <= radius).any(1).double().mean().item()

    return covered(generated, real), covered(real, generated)


def density_coverage(real: Features, generated: Features, k: int = 5) -> tuple[float, float]:
    """How many real neighbourhoods a generated sample lies in, over `k`, and the share of real samples whose
    neighbourhood holds a generated one; a neighbourhood reaches to the `k`-th neighbour (Naeem et al. 2020, Eqs. 4
    and 5). Of equal distributions: 1 and `1 - 0.5**k`."""
    real, generated = torch.as_tensor(real).double(), torch.as_tensor(generated).double()
    radius = torch.cdist(real, real).kthvalue(k + 1, dim=1).values  # the nearest is the sample itself
    inside = torch.cdist(real, generated) <= radius[:, None]
    return (inside.sum(0).double().mean() / k).item(), inside.any(1).double().mean().item()


def inception_score(probabilities: Features, splits: int = 10) -> tuple[float, float]:
    """Mean and standard deviation over `splits` of `exp(E KL(p(y|x) || p(y)))` (Salimans et al. 2016, Sec. 4), from
    class probabilities `(N, K)`."""
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


def diversity(features: Features) -> float:
    """Mean distance of two samples: `E|f(x) - f(y)|` over all pairs."""
    features = torch.as_tensor(features).double()
    n = len(features)
    return (torch.cdist(features, features).sum() / (n * (n - 1))).item()


def agreement(a: Features, b: Features) -> float:
    """How far two models make the same image of the same noise: `1 - E|a_i - b_i| / E|a_i - b_j|`; 1 for identical
    images, 0 if the noise does not matter."""
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    if a.shape != b.shape:
        raise ValueError(
            f"`a` and `b` must be of the same noises, but have shapes {tuple(a.shape)}, {tuple(b.shape)}."
        )
    distances = torch.cdist(a, b)
    same = distances.diagonal().mean()
    n = len(a)
    return (1 - same / ((distances.sum() - n * same) / (n * (n - 1)))).item()


def bootstrap_error(
    statistic: Callable[[torch.Tensor], float], samples: Features, resamples: int = 20, seed: int = 0
) -> float:
    """Standard deviation of `statistic` over samples `(N, ...)` drawn again with replacement (Efron 1979)."""
    samples, generator = torch.as_tensor(samples), torch.Generator().manual_seed(seed)
    draws = (torch.randint(len(samples), (len(samples),), generator=generator) for _ in range(resamples))
    values = torch.tensor([statistic(samples[draw]) for draw in draws], dtype=torch.float64)
    return values.std().item()
