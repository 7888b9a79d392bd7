"""SiD: score identity distillation (Zhou et al., ICML 2024, arXiv:2404.04057), for any schedule and prediction type;
with the long and short guidance of SiD-LSG (Zhou et al., ICLR 2025, arXiv:2406.01561) and the GAN branch of SiDA
(Zhou et al., ICLR 2025, arXiv:2410.14919)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.utils import logging
from peft import LoraConfig
from torch.utils.checkpoint import checkpoint

from ..augmentation import AUGMENT_DIM, augment
from ..denoiser import Denoiser, GuidedDenoiser
from ..models import set_dropout
from ..schedules import EDMSchedule, FlowSchedule, VPSchedule, karras_sigma
from .base import Paper, edm_training_level, normal, uniform
from .gan import gan_losses
from .score import SD_RATIO, ScoreDistiller

logger = logging.get_logger(__name__)

SID_LSG = Paper(
    title="Guided Score identity Distillation for Data-Free One-Step Text-to-Image Generation",
    arxiv_id="2406.01561",
    citation="Zhou, Wang, Zheng, Huang, ICLR 2025",
)
SID_FEW_STEP = Paper(
    title="Few-Step Diffusion via Score identity Distillation",
    arxiv_id="2505.12674",
    citation="Zhou, Gu, Wang, arXiv 2025",
)
SID_DIT = Paper(
    title="Score Distillation of Flow Matching Models",
    arxiv_id="2509.25127",
    citation="Zhou, Gu, Zheng, Song, He, Zhang, Hu, Yang, arXiv 2025",
)
SIDA = Paper(
    title="Adversarial Score identity Distillation: Rapidly Surpassing the Teacher in One Step",
    arxiv_id="2410.14919",
    citation="Zhou, Zheng, Gu, Wang, Huang, ICLR 2025",
)


def sid_loss(
    x0: torch.Tensor, teacher_x0: torch.Tensor, fake_x0: torch.Tensor, *, alpha: float = 1.0, normalize: bool = True
) -> torch.Tensor:
    """`w * d * ((teacher_x0 - x0) - alpha * d)` with `d = teacher_x0 - fake_x0`, summed over pixels, mean over the
    batch.

    `w = 1 / mean|x0 - teacher_x0|` per sample, without gradient, if `normalize`. Gradients flow into all three
    arguments. A sample with a non-finite value is dropped; the divisor stays the batch size.

    Args:
        x0, teacher_x0, fake_x0 (`torch.Tensor`): `(B, ...)`: student's sample and its two denoisings at one `(x_t,
            t)`.
        alpha (`float`): the paper has 1.0 and 1.2; 0.5 gives half the exact gradient of the Fisher divergence.

    Source: Zhou et al. 2024, Eqs. 22 and 23.
    """
    batch_size = x0.shape[0]
    dtype = torch.promote_types(x0.dtype, torch.float32)
    x0, teacher_x0, fake_x0 = (v.to(dtype).flatten(1) for v in (x0, teacher_x0, fake_x0))
    finite = (x0.isfinite() & teacher_x0.isfinite() & fake_x0.isfinite()).all(1, keepdim=True)
    x0, teacher_x0, fake_x0 = (torch.where(finite, v, 0.0) for v in (x0, teacher_x0, fake_x0))
    d = teacher_x0 - fake_x0
    loss = (d * ((teacher_x0 - x0) - alpha * d)).sum(1)
    if normalize:
        loss = loss / (x0 - teacher_x0).detach().abs().mean(1).clamp(min=1e-5)
    return loss.sum() / batch_size


class SiD(ScoreDistiller):
    """One-step student without data (but for its GAN branch): the score identity loss, whose gradient flows through
    teacher and fake score.

    Args:
        teacher (`Teacher`, `Denoiser` or `GuidedDenoiser`): what to distil.
        alpha (`float`, *optional*, defaults to 1.2): of the loss.
        start_ratio (`float`, *optional*): `sigma / alpha` that the student starts from, at `sigma * noise`: by default
            2.5, and for flow teachers pure noise (SiD-DiT).
        noise_levels (`str`, *optional*): `"karras"` (both draws of the EDM runs, as ratios `sigma / alpha`),
            `"uniform"` (the Stable Diffusion runs: uniform timesteps between the ratios of its t = 20 and t = 979) or
            `"logit_normal"` (the flow runs). Defaults to that of the paper for the teacher's schedule.
        loss_scale (`float`, *optional*, defaults to 100.0): factor on the student's loss; matters for Adam's epsilon
            and fp16.
        kappas (`float` or four of them, *optional*): guidance scales of SiD-LSG (Zhou et al. 2025): of the fake score
            where it learns (1), of the fake score (2 and 3, which must be equal) and of the teacher (4) in the
            student's loss. One number stands for all four, the published long and short guidance; `(1, 1, 1, kappa)`
            is plain guidance of the teacher, as a `GuidedDenoiser` has it. Where the fake score is guided, it learns
            a tenth of the samples without their condition.
        sequential (`bool`, *optional*, defaults to `False`): backpropagate through one score network at a time: peak
            activations of one network instead of three, for three more forwards.
        augment_probability (`float`, *optional*, defaults to 0.0): of each geometric change of the images that the
            fake score learns from, for networks that take augmentation labels (0.12 and 0.15 in the paper's runs); the
            student's step and sampling have none.
        gan_weight (`float`, *optional*, defaults to 0.0): of the student's GAN loss beside SiD's, inside `loss_scale`,
            on real images `"x0"` of the batches: SiDA, but with DMD2's head, constant weights and no warm-up. Beside a
            sum over pixels it is far larger than DMD2's; 10 helped on `emoji-sd`, whose latents have 256 elements.
        gan_critic_weight (`float`, *optional*, defaults to 1.0): of the critic's, beside a sum over pixels too.
        network_dropout (`float`, *optional*): dropout of the student and the fake score; by default the teacher's.
        student, student_timesteps, fake_score_updates, sample_shape, lora: see `ScoreDistiller`.
    """

    paper = Paper(
        title="Score identity Distillation: Exponentially Fast Distillation of Pretrained Diffusion Models for "
        "One-Step Generation",
        arxiv_id="2404.04057",
        citation="Zhou, Zheng, Wang, Yin, Huang, ICML 2024",
    )
    through_scores, signal_free, student_first, dropout = True, True, False, True
    sanitize_gradients = True

    def __init__(
        self,
        teacher: Any,
        *,
        alpha: float = 1.2,
        start_ratio: float | None = None,
        noise_levels: str | None = None,
        loss_scale: float = 100.0,
        kappas: float | Sequence[float] | None = None,
        sequential: bool = False,
        augment_probability: float = 0.0,
        gan_weight: float = 0.0,
        gan_critic_weight: float = 1.0,
        network_dropout: float | None = None,
        fake_score_updates: int = 1,
        student: Denoiser | None = None,
        student_timesteps: list[float] | None = None,
        sample_shape: tuple[int, int, int] | None = None,
        lora: LoraConfig | None = None,
    ):
        schedule = (teacher if isinstance(teacher, torch.nn.Module) else teacher.denoiser).schedule
        if start_ratio is None and not isinstance(schedule, FlowSchedule):
            start_ratio = 2.5
        super().__init__(
            teacher,
            start_ratio=start_ratio,
            student_timesteps=student_timesteps,
            student=student,
            fake_score_updates=fake_score_updates,
            gan_weight=gan_weight,
            gan_critic_weight=gan_critic_weight,
            sample_shape=sample_shape,
            lora=lora,
        )
        default = {EDMSchedule: "karras", FlowSchedule: "logit_normal", VPSchedule: "uniform"}
        self.noise_levels = noise_levels or default[type(self.teacher.schedule)]
        if self.noise_levels not in default.values():
            raise ValueError(f"`noise_levels` must be one of {sorted(default.values())}, but is {noise_levels!r}.")
        self.alpha, self.loss_scale, self.sequential = alpha, loss_scale, sequential
        if not 0 <= augment_probability <= 1:
            raise ValueError(f"`augment_probability` must lie between 0 and 1, but is {augment_probability}.")
        self.augment_probability = augment_probability
        config = getattr(self.teacher.network, "config", None) or {}
        if augment_probability and config.get("augment_dim", 0) != AUGMENT_DIM:
            logger.warning("The teacher takes no augmentation labels: the fake score learns from plain images.")
            self.augment_probability = 0.0
        if network_dropout is not None:
            for network in (self.student.network, self.fake_score.network):
                set_dropout(network, network_dropout)
        if self.augment_probability and (kappas is not None or gan_weight):
            raise ValueError(
                f"`augment_probability` must be 0 together with `kappas` or `gan_weight`, but is "
                f"{augment_probability}: neither has augmentation labels."
            )
        if kappas is not None:
            self._guide(kappas)
        if gan_weight and 0.0 in self.fake_guidance:
            raise ValueError(
                f"`kappas` of the fake score must not be 0 together with `gan_weight`, but are {kappas}: the critic "
                "judges with the condition."
            )
        if isinstance(schedule, FlowSchedule):
            self.paper = SID_DIT
        elif len(self.student_timesteps) > 1:
            self.paper = SID_FEW_STEP
        elif gan_weight:
            self.paper = SIDA
        elif self.fake_guidance != (1.0, 1.0):
            self.paper = SID_LSG

    def _guide(self, kappas: float | Sequence[float]) -> None:
        four = [float(kappas)] * 4 if isinstance(kappas, (int, float)) else [float(k) for k in kappas]
        four = four * 4 if len(four) == 1 else four
        if len(four) != 4 or four[1] != four[2]:
            raise ValueError(f"`kappas` must be one number or four with equal middle ones, but are {kappas}.")
        if isinstance(self.teacher, GuidedDenoiser):
            if self.teacher.guidance_scale != 1.0:
                raise ValueError(
                    "`kappas` must be None for a teacher with a guidance scale of its own "
                    f"({self.teacher.guidance_scale}), but are {kappas}."
                )
            self.teacher = self.teacher.denoiser
        if four != [1.0] * 4 and not self.negative_cond:
            raise ValueError(f"`kappas` must be 1.0 for a teacher without a null condition, but are {kappas}.")
        self.fake_guidance = (four[0], four[1])
        if four != [1.0] * 4:
            self.teacher = GuidedDenoiser(self.teacher, four[3], self.negative_cond)

    def fake_score_batch(self, batch, generator=None):
        if self.fake_guidance == (1.0, 1.0):
            return batch
        cond = batch["cond"]
        sample = next(iter(cond.values()))
        dropped = uniform(batch["batch_size"], generator, sample.device) < 0.1
        kept = {}
        for name, given in cond.items():
            mask = dropped.reshape(-1, *[1] * (given.ndim - 1))
            kept[name] = torch.where(mask, self.negative_cond[name].to(given), given)
        return batch | {"cond": kept}

    def student_loss(self, x0, batch, generator=None):
        if self.sequential:
            return self.loss_scale * self.sequential_loss(x0, batch, generator)
        loss = sid_loss(x0, *self.scores(x0, batch, generator), alpha=self.alpha)
        if self.gan_weight:
            loss = loss + self.gan_loss(x0.shape[0])
        return self.loss_scale * loss

    def gan_loss(self, batch_size: int) -> torch.Tensor:
        """The student's weighted loss against the critic, on the features of the score's own call; as in SiDA, logits
        beyond 10 have no gradient, nor have non-finite ones."""
        logits = self.last_logits(batch_size).nan_to_num(nan=0.0).clamp(-10, 10)
        return self.gan_weight * gan_losses(None, logits)[1]

    def critic_logits(self, x0, noise, t, batch, generator):
        fake_logits = self.last_logits(x0.shape[0])
        return self.logits_at(batch["x0"], noise, t, batch.get("cond")), fake_logits

    def fake_score_loss(self, x0, batch, generator=None):
        if self.augment_probability:
            x0, labels = augment(x0, self.augment_probability, generator)
            batch = batch | {"cond": dict(batch.get("cond") or {}) | {"augment_labels": labels}}
        return super().fake_score_loss(x0, batch, generator)

    def last_step(self, x_t, t, cond):
        if self.sequential and torch.is_grad_enabled():
            return checkpoint(self.student, x_t, t, cond, use_reentrant=False)
        return super().last_step(x_t, t, cond)

    def sequential_loss(self, x0, batch, generator=None):
        """The same value and gradient as the plain loss, with one score network's activations at a time.

        Gradients of the loss in its three arguments come from a pass without graph; each network is then run again
        for its vector-Jacobian product, and the student again in the backward pass.
        """
        cond, leaf = batch.get("cond"), x0.detach().requires_grad_(True)
        t = self.student_level(x0.shape[0], generator, x0.device)
        noise = normal(x0.shape, generator, x0.device)
        with torch.no_grad():
            x_t = self.student.add_noise(leaf, noise, t)
            networks = self.teacher, self.guided_fake_score(self.fake_guidance[1])
            predictions = [network(x_t, t, cond) for network in networks]
        self.diagnose(x0, *predictions)
        teacher_x0, fake_x0 = (p.requires_grad_(True) for p in predictions)
        with torch.enable_grad():
            loss = sid_loss(leaf, teacher_x0, fake_x0, alpha=self.alpha)
            direct, *cotangents = torch.autograd.grad(loss, (leaf, teacher_x0, fake_x0))
            for network, cotangent in zip(networks, cotangents, strict=True):
                outputs = [network(self.student.add_noise(leaf, noise, t), t, cond)]
                if self.gan_weight and network is not self.teacher:
                    outputs.append(self.gan_loss(x0.shape[0]))
                    loss = loss + outputs[1].detach()
                direct = direct + torch.autograd.grad(outputs, leaf, [cotangent, None][: len(outputs)])[0]
        direct = direct.nan_to_num(nan=0.0)  # 0 * inf, of samples that the loss has left out
        # the value of the loss, with the gradient that was just found
        return loss.detach() + (direct.detach() * (x0 - x0.detach())).sum()

    def student_level(self, batch_size, generator, device):
        if self.noise_levels == "karras":
            return self.teacher.schedule.timestep(karras_sigma(0.8 * uniform(batch_size, generator, device)))
        return self._other_level(batch_size, generator, device)

    def fake_score_level(self, batch_size, generator, device):
        if self.noise_levels == "karras":
            return edm_training_level(self.teacher.schedule, batch_size, generator, device)
        return self._other_level(batch_size, generator, device)

    def _other_level(self, batch_size, generator, device):
        schedule = self.teacher.schedule
        if self.noise_levels == "logit_normal":
            # s = sigmoid(N(ln 2, 1.6**2)) and ratio = s / (1 - s)
            return schedule.timestep(torch.exp(math.log(2) + 1.6 * normal((batch_size,), generator, device).double()))
        return self.uniform_between(SD_RATIO[20], SD_RATIO[979], batch_size, generator, device)

    def fake_score_weight(self, t):
        """The network's own loss; for VP always that of the noise, `alpha**2 / sigma**2`, also for v teachers."""
        if isinstance(self.teacher.schedule, VPSchedule):
            alpha, sigma = self.teacher.schedule.alpha_sigma(t.double())
            return ((alpha / sigma) ** 2).float()
        return super().fake_score_weight(t)

    @staticmethod
    def reduce(error):
        return error.flatten(1).sum(1).mean()
