"""Gaussian teachers with known denoiser, and the quadrature that integrates their losses."""

import numpy as np
import torch
from torch import nn

from diffusers_onestep import EDMSchedule, FlowSchedule
from diffusers_onestep.denoiser import Denoiser, x0_coefficients


class GaussianNetwork(nn.Module):
    """The exact network for data N(mu, s**2) per pixel, whatever the schedule and prediction type."""

    def __init__(self, schedule, prediction_type, mu=0.3, s=0.5, dtype=torch.float32):
        super().__init__()
        self.schedule, self.prediction_type = schedule, prediction_type
        self.mu, self.s = (nn.Parameter(torch.tensor(float(v), dtype=dtype)) for v in (mu, s))

    def forward(self, sample, timestep, class_labels=None):
        alpha, sigma = self.schedule.alpha_sigma(timestep.double())
        c_skip, c_out = x0_coefficients(self.schedule, self.prediction_type, timestep)
        x_t = sample.double()
        if self.prediction_type == "edm":
            x_t = x_t * (sigma**2 + self.schedule.sigma_data**2).sqrt()
        mu, s = self.mu.double(), self.s.double()
        x0 = mu + alpha * s**2 / (alpha**2 * s**2 + sigma**2) * (x_t - alpha * mu)
        return ((x0 - c_skip * x_t) / c_out).to(sample.dtype)


def kinds_of_teachers(vp):
    """Every schedule with every prediction type that goes with it."""
    kinds = [(vp, name) for name in ("epsilon", "v_prediction", "sample")]
    return [*kinds, (FlowSchedule(), "flow_prediction"), (EDMSchedule(), "edm")]


def gaussian_denoiser(schedule, prediction_type, mu=0.3, s=0.5, dtype=torch.float32):
    return Denoiser(GaussianNetwork(schedule, prediction_type, mu, s, dtype), schedule, prediction_type)


def hermite_grid(n=40):
    """Points and weights of E over two independent standard normals: `(n*n,)` z, noise, weight."""
    x, w = np.polynomial.hermite_e.hermegauss(n)
    x, w = torch.from_numpy(x), torch.from_numpy(w / w.sum())
    z, noise = torch.meshgrid(x, x, indexing="ij")
    return z.flatten(), noise.flatten(), torch.outer(w, w).flatten()
