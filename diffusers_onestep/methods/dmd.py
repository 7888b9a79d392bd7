"""DMD (Yin et al., CVPR 2024, arXiv:2311.18828) and DMD2 (Yin et al., NeurIPS 2024, arXiv:2405.14867)."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig

from ..denoiser import Denoiser
from ..schedules import VPSchedule
from .base import Paper, normal
from .distances import image_distance
from .gan import gan_losses
from .score import SD_RATIO, ScoreDistiller

DMD2 = Paper(
    title="Improved Distribution Matching Distillation for Fast Image Synthesis",
    arxiv_id="2405.14867",
    citation="Yin, Gharbi, Park, Zhang, Shechtman, Durand, Freeman, NeurIPS 2024",
)


def distribution_matching_loss(x0: torch.Tensor, teacher_x0: torch.Tensor, fake_x0: torch.Tensor) -> torch.Tensor:
    """`0.5 * mean((x0 - stopgrad(x0 - g))**2)` with `g = (fake_x0 - teacher_x0) / mean|x0 - teacher_x0|` per sample.

    Its gradient in `x0` is `g / x0.numel()` exactly; none flows into the other two. The value, half the mean of
    `g**2`, says nothing about convergence. The normaliser has a floor of 1e-5.

    Args:
        x0, teacher_x0, fake_x0 (`torch.Tensor`): `(B, ...)`: student's sample and its two denoisings at one `(x_t,
            t)`.

    Source: Yin et al. 2024 (DMD), Eqs. 7 and 8 and Algorithm 2, which lacks their factor `alpha`.
    """
    dtype = torch.promote_types(x0.dtype, torch.float32)
    with torch.no_grad():
        sample, teacher_x0, fake_x0 = x0.to(dtype), teacher_x0.to(dtype), fake_x0.to(dtype)
        w = (sample - teacher_x0).flatten(1).abs().mean(1).clamp(min=1e-5)
        g = (fake_x0 - teacher_x0) / w.reshape(-1, *[1] * (x0.ndim - 1))
        target = sample - g
    return 0.5 * F.mse_loss(x0.to(dtype), target)


class DMD(ScoreDistiller):
    """Distribution matching, with DMD's regression on teacher pairs or DMD2's GAN branch and two time scales as
    options.

    Defaults are DMD without pairs, one fake-score update per student update; `fake_score_updates=5` and a
    `gan_weight` make it DMD2. All networks run without dropout, and both gradients are clipped at norm 10.

    Args:
        teacher (`Teacher`, `Denoiser` or `GuidedDenoiser`): what to distil; the fake score is never guided.
        start_ratio (`float`, *optional*): `sigma / alpha` that the student starts from; by default the noisiest
            timestep.
        level_ratios (`tuple[float, float]`, *optional*): least and largest `sigma / alpha` at which the scores are
            compared. By default the papers' draws: 2 % to 98 % of the grid for EDM and flow; for VP `(0.138, 13.04)`,
            which is t = 20 to 980 of Stable Diffusion. DDPM's linear betas reach 130 at t = 980, where the error of
            epsilon drowns the difference of the scores.
        matching_weight (`float`, *optional*, defaults to 1.0): of distribution matching; 0.0 leaves the regression
            alone, without a fake score: DMD2's warm-up of a one-step SDXL student (Yin et al. 2024, App. F.4).
        regression_weight (`float`, *optional*, defaults to 0.0): of the regression on pairs (`"noise"`, `"target"`);
            0.25 in the paper's conditional runs.
        regression_loss (`str` or callable, *optional*, defaults to `"lpips"`): see `image_distance`.
        gan_weight (`float`, *optional*, defaults to 0.0): of the student's GAN loss (batches need real images `"x0"`).
        gan_critic_weight (`float`, *optional*, defaults to 0.01): of the critic's.
        student, student_timesteps, fake_score_updates, sample_shape, lora: see `ScoreDistiller`.
    """

    paper = Paper(
        title="One-step Diffusion with Distribution Matching Distillation",
        arxiv_id="2311.18828",
        citation="Yin, Gharbi, Zhang, Shechtman, Durand, Freeman, Park, CVPR 2024",
    )
    through_scores, signal_free, student_first, dropout = False, False, True, False
    max_grad_norm = 10.0

    def __init__(
        self,
        teacher: Any,
        *,
        start_ratio: float | None = None,
        level_ratios: tuple[float, float] | list[float] | None = None,
        matching_weight: float = 1.0,
        regression_weight: float = 0.0,
        regression_loss: str | Callable = "lpips",
        gan_weight: float = 0.0,
        gan_critic_weight: float = 0.01,
        fake_score_updates: int = 1,
        student: Denoiser | None = None,
        student_timesteps: list[float] | None = None,
        sample_shape: tuple[int, int, int] | None = None,
        lora: LoraConfig | None = None,
    ):
        if gan_weight and not matching_weight:
            raise ValueError(
                f"`gan_weight` must be 0 with `matching_weight` 0, whose run has no fake score, but is {gan_weight}."
            )
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
            compare=bool(matching_weight),
        )
        if gan_weight or fake_score_updates > 1 or len(self.student_timesteps) > 1 or not matching_weight:
            self.paper = DMD2
        if level_ratios is not None and not (len(level_ratios) == 2 and 0 < level_ratios[0] < level_ratios[1]):
            raise ValueError(f"`level_ratios` must be two rising positive numbers, but are {level_ratios}.")
        if level_ratios is None and isinstance(self.teacher.schedule, VPSchedule):
            level_ratios = SD_RATIO[20], SD_RATIO[980]
        if not matching_weight and not regression_weight:
            raise ValueError("`matching_weight` and `regression_weight` must not both be 0.")
        self.level_ratios = level_ratios
        self.matching_weight = matching_weight
        self.regression_weight = regression_weight
        self._distance = None
        if regression_weight:
            named = isinstance(regression_loss, str)
            self._distance = image_distance(regression_loss, "regression_loss") if named else regression_loss

    def updates(self, batch, generator=None):
        if self.matching_weight:
            yield from super().updates(batch, generator)
        else:
            self.learn("student")
            yield "student", self.regression_weight * self.regression_loss(batch)

    def student_loss(self, x0, batch, generator=None):
        loss = self.matching_weight * distribution_matching_loss(x0, *self.scores(x0, batch, generator))
        if self.regression_weight:
            loss = loss + self.regression_weight * self.regression_loss(batch)
        if self.gan_weight:
            loss = loss + self.gan_weight * gan_losses(None, self.logits(x0, batch, generator))[1]
        return loss

    def critic_logits(self, x0, noise, t, batch, generator):
        return self.logits(batch["x0"], batch, generator), self.logits(x0, batch, generator)

    def logits(self, x0, batch, generator=None) -> torch.Tensor:
        """The head's verdict `(B, 1)` on `x0`, noised afresh at any timestep (diffusion GAN)."""
        t = self.fake_score_level(x0.shape[0], generator, x0.device)
        return self.logits_at(x0, normal(x0.shape, generator, x0.device), t, batch.get("cond"))

    def regression_loss(self, batch) -> torch.Tensor:
        """Distance between the student's image of a pair's noise and the teacher's."""
        for key in ("noise", "target"):
            if key not in batch:
                raise ValueError(
                    f"`regression_weight` needs batches with 'noise' and 'target', but these have {sorted(batch)}."
                )
        x_t = self.init_noise_sigma * batch["noise"]
        x0 = self.student(x_t, self._full(self.student_timesteps[0], x_t), batch.get("cond"))
        return self._distance(x0, batch["target"])

    def student_level(self, batch_size, generator, device):
        if self.level_ratios is not None:
            return self.uniform_between(*self.level_ratios, batch_size, generator, device)
        n = self.teacher.schedule.num_train_timesteps
        return self.uniform_index(round(0.02 * n), round(0.98 * n), batch_size, generator, device)

    def fake_score_level(self, batch_size, generator, device):
        return self.uniform_index(0, self.teacher.schedule.num_train_timesteps - 1, batch_size, generator, device)

    @staticmethod
    def reduce(error):
        return error.mean()
