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
