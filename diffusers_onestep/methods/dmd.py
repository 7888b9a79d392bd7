"""DMD (Yin et al., CVPR 2024, arXiv:2311.18828) and DMD2 (Yin et al., NeurIPS 2024, arXiv:2405.14867)."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import nn

from ..denoiser import Denoiser
from ..schedules import VPSchedule
from .base import Paper, normal
from .distances import image_distance
from .score import SD_RATIO, ScoreDistiller


def distribution_matching_loss(x0: torch.Tensor, teacher_x0: torch.Tensor, fake_x0: torch.Tensor) -> torch.Tensor:
    """`0.5 * mean((x0 - stopgrad(x0 - g))**2)` with `g = (fake_x0 - teacher_x0) / mean|x0 - teacher_x0|` per sample.

    Its gradient in `x0` is `g / x0.numel()` exactly; none flows into the other two. The value, half the mean of
    `g**2`, says nothing about convergence. The normaliser has a floor of 1e-5.

    Args:
        x0, teacher_x0, fake_x0 (`torch.Tensor`): `(B, ...)`: student's sample and its two denoisings at one `(x_t,
            t)`.

    Source: Yin et al. 2024 (DMD), Eqs. 7 and 8 and Algorithm 2, whose weight lacks Eq. 8's `1 / alpha`.
    """
    dtype = torch.promote_types(x0.dtype, torch.float32)
    with torch.no_grad():
        sample, teacher_x0, fake_x0 = x0.to(dtype), teacher_x0.to(dtype), fake_x0.to(dtype)
        w = (sample - teacher_x0).flatten(1).abs().mean(1).clamp(min=1e-5)
        g = (fake_x0 - teacher_x0) / w.reshape(-1, *[1] * (x0.ndim - 1))
        target = sample - g
    return 0.5 * F.mse_loss(x0.to(dtype), target)


def gan_losses(real_logits: torch.Tensor | None, fake_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Critic and student loss of the non-saturating GAN: `mean softplus(fake) + mean softplus(-real)` and
    `mean softplus(-fake)`. Without `real_logits` the first lacks its second term.

    Source: Yin et al. 2024 (DMD2), Sec. 4.3; at matched distributions they are 2 ln 2 and ln 2.
    """
    critic = F.softplus(fake_logits).mean()
    if real_logits is not None:
        critic = critic + F.softplus(-real_logits).mean()
    return critic, F.softplus(-fake_logits).mean()


class GANHead(nn.Module):
    """Bottleneck features `(B, C, h, w)` to one logit `(B, 1)`: stride-2 convolutions down to 4 x 4, then one of
    kernel 4 (Yin et al. 2024 (DMD2), App. F.1). Features are cast to float32 first. Sides that are no power of two end
    between 4 and 7, with more than one place; their logits are averaged."""

    def __init__(self, channels: int, size: int | tuple[int, int]):
        super().__init__()
        side = min(size) if isinstance(size, tuple) else size
        if side < 4:
            raise ValueError(f"`size` of the bottleneck must be at least 4, but is {size}.")
        # the paper's 32 groups; narrow networks get fewer, since a group of one value would be normalised to nothing
        groups = min(32, max(1, channels // 8))
        layers: list[nn.Module] = []
        while side >= 8:
            layers += [nn.Conv2d(channels, channels, 4, 2, 1), nn.GroupNorm(groups, channels), nn.SiLU()]
            side //= 2
        layers += [nn.Conv2d(channels, channels, 4), nn.GroupNorm(groups, channels), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 1))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.layers(features.float()).mean((2, 3))


class Bottleneck:
    """The features of a network's middle, as its last call left them: the output of a U-Net's middle block, or the
    image tokens after the middle block of a transformer, where they lie in the image.

    Args:
        network (`nn.Module`): a U-Net with a `mid_block`, or a transformer with `transformer_blocks`.
        aspect (`float`): height over width of the samples.
    """

    def __init__(self, network: nn.Module, aspect: float = 1.0):
        blocks = [*getattr(network, "transformer_blocks", []), *getattr(network, "single_transformer_blocks", [])]
        named = dict(network.named_modules())
        middle = next((m for name, m in named.items() if name.rpartition(".")[2] == "mid_block"), None)
        if middle is None and not blocks:
            raise ValueError(
                "`gan_weight` needs a U-Net with a `mid_block` or a transformer with `transformer_blocks`, but the "
                f"teacher is {type(network).__name__}."
            )
        self.aspect = aspect
        self.features: torch.Tensor | None = None
        (middle or blocks[(len(blocks) - 1) // 2]).register_forward_hook(self._keep)

    def _keep(self, module, inputs, output):
        # blocks of two streams return text and image, in this order
        self.features = output if isinstance(output, torch.Tensor) else output[-1]

    def take(self) -> torch.Tensor:
        """The features `(B, C, h, w)`, which are then let go."""
        features, self.features = self.features, None
        if features.ndim == 3:
            height = round((features.shape[1] * self.aspect) ** 0.5)
            features = features.transpose(1, 2).unflatten(2, (height, -1))
        return features


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
            alone, without fake-score updates: DMD2's warm-up of a one-step SDXL student (Yin et al. 2024, App. F.4).
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
        super().__init__(
            teacher,
            start_ratio=start_ratio,
            student_timesteps=student_timesteps,
            student=student,
            fake_score_updates=fake_score_updates,
            sample_shape=sample_shape,
            lora=lora,
        )
        if level_ratios is not None and not (len(level_ratios) == 2 and 0 < level_ratios[0] < level_ratios[1]):
            raise ValueError(f"`level_ratios` must be two rising positive numbers, but are {level_ratios}.")
        if level_ratios is None and isinstance(self.teacher.schedule, VPSchedule):
            level_ratios = SD_RATIO[20], SD_RATIO[980]
        if not matching_weight and not regression_weight:
            raise ValueError("`matching_weight` and `regression_weight` must not both be 0.")
        self.level_ratios = level_ratios
        self.matching_weight = matching_weight
        self.regression_weight, self.gan_weight = regression_weight, gan_weight
        self.gan_critic_weight = gan_critic_weight
        self._distance = None
        if regression_weight:
            named = isinstance(regression_loss, str)
            self._distance = image_distance(regression_loss, "regression_loss") if named else regression_loss
        self.head: GANHead | None = None
        if gan_weight:
            self.add_head()

    def add_head(self) -> None:
        """Make the GAN's head, as wide as the features in the middle of the fake score."""
        self._bottleneck = Bottleneck(self.fake_score.network, self.sample_shape[1] / self.sample_shape[2])
        self.head = GANHead(*self._bottleneck_shape())

    @property
    def trainable(self):
        parts = super().trainable
        if self.head is None:
            return parts
        return parts | {"fake_score": nn.ModuleList([parts["fake_score"], self.head])}

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
        if self.head is not None:
            fake_logits = self.logits(x0, batch, generator)
            loss = loss + self.gan_weight * gan_losses(None, fake_logits)[1]
        return loss

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

    def fake_score_loss(self, x0, batch, generator=None):
        loss = super().fake_score_loss(x0, batch, generator)
        if self.head is not None:
            if "x0" not in batch:
                raise ValueError(f"`gan_weight` needs batches with real images 'x0', but these have {sorted(batch)}.")
            logits = self.logits(batch["x0"], batch, generator), self.logits(x0, batch, generator)
            loss = loss + self.gan_critic_weight * gan_losses(*logits)[0]
        return loss

    def logits(self, x0, batch, generator=None) -> torch.Tensor:
        """The head's verdict `(B, 1)` on `x0`, noised afresh at any timestep (diffusion GAN)."""
        t = self.fake_score_level(x0.shape[0], generator, x0.device)
        x_t = self.fake_score.add_noise(x0, normal(x0.shape, generator, x0.device), t)
        self.fake_score(x_t, t, batch.get("cond"))
        return self.head(self._bottleneck.take())

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

    def _bottleneck_shape(self) -> tuple[int, tuple[int, int]]:
        network = self.fake_score.network
        device = next(network.parameters()).device
        x_t = torch.zeros(1, *self.sample_shape, device=device)
        cond = {k: v.to(device) for k, v in self.negative_cond.items()}
        if not cond and getattr(network.config, "num_class_embeds", None) is not None:
            cond = {"class_labels": torch.zeros(1, dtype=torch.long, device=device)}
        with torch.no_grad():
            self.fake_score(x_t, self._full(self.student_timesteps[0], x_t), cond)
        features = self._bottleneck.take()
        return features.shape[1], tuple(features.shape[2:])
