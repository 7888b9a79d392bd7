"""How a teacher is made: denoising score matching in the network's own prediction space (Ho et al. 2020, Eq. 14), at
uniform timesteps or, for EDM, at its noise levels (Karras et al. 2022, Eq. 8); and before it, for latent models, an
autoencoder (Rombach et al. 2022)."""

import torch
from diffusers import AutoencoderKL
from torch import nn

from ..denoiser import Cond, Denoiser
from ..network_calls import sample_shape_of
from ..schedules import EDMSchedule
from .base import Distiller, Paper, edm_training_level, normal, uniform
from .distances import Distance, image_distance


class Pretraining(Distiller):
    """Train a diffusion network on real images: the "student" is the teacher of later runs.

    Args:
        student (`Denoiser`): the network to train.
        null_condition (`dict`, *optional*): the `cond` of one unconditional sample, which replaces the true one with
            probability `dropout`, for guidance.
        dropout (`float`, *optional*, defaults to 0.1): as in Ho & Salimans 2022, Sec. 5.
    """

    paper = Paper(
        title="Denoising Diffusion Probabilistic Models",
        arxiv_id="2006.11239",
        citation="Ho, Jain, Abbeel, NeurIPS 2020",
    )
    edm_paper = Paper(
        title="Elucidating the Design Space of Diffusion-Based Generative Models",
        arxiv_id="2206.00364",
        citation="Karras, Aittala, Aila, Laine, NeurIPS 2022",
    )
    max_grad_norm = 1.0

    def __init__(self, student: Denoiser, null_condition: Cond | None = None, dropout: float = 0.1):
        self.student = student
        self.paper = self.edm_paper if isinstance(student.schedule, EDMSchedule) else self.paper
        self.null_condition = null_condition
        self.dropout = dropout
        self.sample_shape = sample_shape_of(student.network)

    @property
    def trainable(self):
        return {"student": self.student.network}

    def updates(self, batch, generator=None):
        x0, cond = batch["x0"], dict(batch["cond"])
        batch_size, schedule = x0.shape[0], self.student.schedule
        if self.null_condition:
            dropped = uniform(batch_size, generator, x0.device) < self.dropout
            for name, null in self.null_condition.items():
                mask = dropped.view(-1, *[1] * (null.dim() - 1))
                cond[name] = torch.where(mask, null.to(x0.device), cond[name])
        if isinstance(schedule, EDMSchedule):
            t = edm_training_level(schedule, batch_size, generator, x0.device)
        else:
            t = schedule.grid((uniform(batch_size, generator, x0.device) * schedule.num_train_timesteps).long())
        noise = normal(x0.shape, generator, x0.device)
        pred_x0 = self.student(self.student.add_noise(x0, noise, t), t, cond)
        yield "student", (self.student.weight(t) * (pred_x0 - x0) ** 2).mean()


class Autoencoder(nn.Module):
    """An `AutoencoderKL` in the precision that the training loop asks for."""

    def __init__(self, network: AutoencoderKL):
        super().__init__()
        self.network = network
        self.autocast_dtype: torch.dtype | None = None

    def forward(self, x0: torch.Tensor, generator=None) -> tuple[torch.Tensor, torch.Tensor]:
        """Images `(B, C, H, W)` after encoding, a draw from the posterior, and decoding; and the divergence of the
        posterior from the standard normal in nats per latent element, a scalar."""
        with torch.autocast(x0.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            posterior = self.network.encode(x0).latent_dist
            decoded = self.network.decode(posterior.sample(generator)).sample
        return decoded.float(), posterior.kl().float().mean() / posterior.mean[0].numel()


class AutoencoderPretraining(Distiller):
    """Train the autoencoder of a latent diffusion model: the distance to the decoded image and, lightly weighted, the
    divergence of the latents from the standard normal (Rombach et al. 2022, Sec. 3.1 and App. G; without their
    adversarial term).

    Args:
        network (`AutoencoderKL`): what to train.
        kl_weight (`float`, *optional*, defaults to 1e-3): of the divergence in nats per latent element.
        distance (callable, *optional*): between batches of images; the mean absolute difference by default.
    """

    paper = Paper(
        title="High-Resolution Image Synthesis with Latent Diffusion Models",
        arxiv_id="2112.10752",
        citation="Rombach, Blattmann, Lorenz, Esser, Ommer, CVPR 2022",
    )
    max_grad_norm = 1.0

    def __init__(self, network: AutoencoderKL, kl_weight: float = 1e-3, distance: Distance | None = None):
        self.student = Autoencoder(network)
        self.kl_weight = kl_weight
        self.distance = distance or image_distance("l1")
        self.sample_shape = sample_shape_of(network)

    @property
    def trainable(self):
        return {"student": self.student.network}

    def updates(self, batch, generator=None):
        x0 = batch["x0"]
        decoded, divergence = self.student(x0, generator)
        distance = self.distance(decoded, x0)
        self.diagnostics = {"distance": distance.detach(), "divergence": divergence.detach()}
        yield "student", distance + self.kl_weight * divergence
