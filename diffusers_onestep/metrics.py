"""Distances between sets of images, from features alone: `(N, D)` arrays or tensors in, numbers out."""

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
