"""The base of score distillation: a student, a frozen teacher, and a fake score that tracks the student's own samples.

DMD, SiD and their relatives differ in a loss, in the draw of noise levels, in the order and ratio of the updates, and
in whether gradients flow through the two scores (`methods/dmd.py`, `methods/sid.py`).
"""

from abc import abstractmethod
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from ..denoiser import Cond, Denoiser, GuidedDenoiser
from ..lora import trained_part
from ..models import has_train_mode
from ..schedules import EDMSchedule, VPSchedule
from .base import (
    Batch,
    Generators,
    OneStepDistiller,
    check_same_prediction,
    check_start_ratio,
    copy_denoiser,
    normal,
    uniform,
)
from .gan import Bottleneck, GANHead, gan_losses

# sigma / alpha of Stable Diffusion's scaled-linear betas at the ends of the papers' draws: the same levels elsewhere
SD_RATIO = {20: 0.138, 979: 12.9663, 980: 13.04}


class ScoreDistiller(OneStepDistiller):
    """A student trained on the difference between the teacher's score and that of its own samples.

    Args:
        teacher (`Teacher`, `Denoiser` or `GuidedDenoiser`): stays frozen; its guidance enters here.
        start_ratio (`float`, *optional*): `sigma / alpha` of the level that the student starts from, mapped through
            the teacher's schedule; the noisiest timestep if None.
        student_timesteps (`list` of timesteps, *optional*): overrides `start_ratio`; several make a few-step student.
        student (`Denoiser`, *optional*): where the student starts from, if not at the teacher.
        fake_score_updates (`int`, *optional*): fake-score updates per student update.
        gan_weight (`float`, *optional*): of the student's GAN loss; batches then need real images `"x0"`.
        gan_critic_weight (`float`, *optional*): of the critic's, in the fake score's loss.
        sample_shape (`tuple`, *optional*): `(C, H, W)` of model space, for networks without a diffusers config.
        compare (`bool`, *optional*, defaults to `True`): whether the method compares scores at all; without, there is
            no fake score.
        lora (`LoraConfig`, *optional*): makes student and fake score two float32 adapters on the teacher's weights
            instead of two copies; without `target_modules`, on every layer that is wider than the rank.
    """

    through_scores: bool  # do gradients of the student's loss flow through teacher and fake score?
    signal_free: bool  # does the student start at sigma * noise, rather than at unit variance?
    student_first: bool  # does the student move before the fake score, which then reuses its samples?
    dropout: bool  # are networks that learn in train mode?
    fake_guidance: tuple[float, float] = (1.0, 1.0)  # of the fake score: where it learns, where it is compared

    def __init__(
        self,
        teacher: Any,
        *,
        start_ratio: float | None,
        student_timesteps: list[float] | None,
        student: Denoiser | None,
        fake_score_updates: int,
        gan_weight: float,
        gan_critic_weight: float,
        sample_shape: tuple[int, int, int] | None,
        lora: LoraConfig | None,
        compare: bool = True,
    ):
        if fake_score_updates < 1:
            raise ValueError(f"`fake_score_updates` must be at least 1, but is {fake_score_updates}.")
        self.take_teacher(teacher, sample_shape)
        # of one sample; what guidance of the fake score would need
        self.negative_cond: Cond = getattr(teacher, "negative_cond", {})
        if teacher is not self.teacher:
            self.negative_cond = teacher.null_condition(1)
        self.student = copy_denoiser(self.teacher, lora)
        if student is not None:
            if lora is not None:
                raise ValueError("`student` must be None with `lora`, whose student starts at the teacher.")
            check_same_prediction(student, self.teacher)
            self.student.network = copy_denoiser(student).network  # on the teacher's schedule
        self.fake_score = copy_denoiser(self.teacher, lora) if compare else None
        self.fake_score_updates = fake_score_updates
        schedule = self.teacher.schedule
        if start_ratio is not None and student_timesteps is None:
            check_start_ratio(schedule, start_ratio)
        if student_timesteps is None:
            t_start = schedule.t_max if start_ratio is None else schedule.timestep(start_ratio).item()
            student_timesteps = [t_start]
        self.student_timesteps = list(student_timesteps)
        steps, low, high = self.student_timesteps, schedule.t_min, schedule.t_max
        falls = all(a > b for a, b in zip(steps, steps[1:], strict=False))
        if not steps or not falls or steps[0] > high + 1e-4 or steps[-1] < low - 1e-4:
            raise ValueError(f"`student_timesteps` must fall and lie between {low} and {high}, but are {steps}.")
        if isinstance(schedule, VPSchedule):
            self.student_timesteps = [int(t) for t in steps]
        _, sigma = schedule.alpha_sigma(torch.tensor(self.student_timesteps[:1], dtype=torch.float64))
        unit = not self.signal_free and not isinstance(schedule, EDMSchedule)
        self.init_noise_sigma = 1.0 if unit else sigma.item()
        self.gan_weight, self.gan_critic_weight = 0.0, gan_critic_weight
        self.head: GANHead | None = None
        if gan_weight:
            self.add_head(gan_weight)

    def add_head(self, gan_weight: float) -> None:
        """Make the GAN's head, as wide as the features in the middle of the fake score."""
        self.gan_weight = gan_weight
        self._bottleneck = Bottleneck(self.fake_score.network, self.sample_shape[1] / self.sample_shape[2])
        self.head = GANHead(*self._bottleneck_shape())

    @property
    def trainable(self) -> dict[str, nn.Module]:
        student = trained_part(self.student.network)
        if self.fake_score is None:
            return {"student": student}
        fake_score = trained_part(self.fake_score.network)
        if self.head is not None:
            fake_score = nn.ModuleList([fake_score, self.head])
        return {"student": student, "fake_score": fake_score}

    # the algorithm box

    def updates(self, batch, generator=None):
        reusable = None
        if self.student_first:
            self.learn("student")
            reusable = self.generate(batch, generator)
            loss = self.student_loss(reusable, batch, generator)
            reusable = reusable.detach()
            yield "student", loss
            del loss
        for _ in range(self.fake_score_updates):
            self.learn("fake_score")
            learned = self.fake_score_batch(batch, generator)
            if reusable is None:
                with torch.no_grad():
                    reusable = self.generate(learned, generator)
            loss = self.fake_score_loss(reusable, learned, generator)
            del learned  # other micro-batches come before this one goes on
            yield "fake_score", loss
            del loss
            reusable = None
        if not self.student_first:
            self.learn("student")
            loss = self.student_loss(self.generate(batch, generator), batch, generator)
            yield "student", loss

    def learn(self, name: str) -> None:
        """From now on gradients reach network `name` alone, and dropout, if the paper has it, is on in no other."""
        for other, weights in self._weights.items():
            for weight in weights:
                weight.requires_grad_(other == name)
        for other, network in self._learners.items():
            mode = self.dropout and self._has_train_mode[other] and other == name
            if network.training != mode:  # a walk through its modules
                network.train(mode)

    @property
    def _learners(self) -> dict[str, nn.Module]:
        """The whole networks, of which `trainable` may be adapters."""
        return {n: d.network for n in ("student", "fake_score") if (d := getattr(self, n)) is not None}

    @cached_property
    def _has_train_mode(self) -> dict[str, bool]:
        """Found once: of which networks does train mode change anything?"""
        return {name: has_train_mode(network) for name, network in self._learners.items()}

    @cached_property
    def _weights(self) -> dict[str, list[nn.Parameter]]:
        """Listed once: a walk through a network's modules takes milliseconds."""
        return {name: list(part.parameters()) for name, part in self.trainable.items()}

    def generate(self, batch: Batch, generator: Generators = None) -> torch.Tensor:
        """Samples of the student, `(B, C, H, W)`.

        A few-step student runs to a step that is drawn once for the whole global batch and keeps the graph of that
        step alone: DMD2's backward simulation (Yin et al. 2024, Sec. 4.5). Every call draws anew; conditions stay
        those of the batch, where DMD2 takes fresh ones for each fake-score update.
        """
        device = next(self.student.network.parameters()).device
        shape = (batch["batch_size"], *self.sample_shape)
        cond, steps = batch.get("cond"), self.student_timesteps
        last = 0
        if len(steps) > 1:
            last = int(torch.randint(len(steps), (), generator=batch.get("shared_generator")))
        x_t = self.init_noise_sigma * normal(shape, generator, device)
        with torch.no_grad():
            for t, t_next in zip(steps[:last], steps[1 : last + 1], strict=True):
                x0 = self.student(x_t, self._full(t, x_t), cond)
                x_t = self.student.add_noise(x0, normal(shape, generator, device), self._full(t_next, x_t))
        return self.last_step(x_t, self._full(steps[last], x_t), cond)

    def last_step(self, x_t: torch.Tensor, t: torch.Tensor, cond: Cond | None) -> torch.Tensor:
        """The one student call that keeps a graph."""
        return self.student(x_t, t, cond)

    @torch.no_grad()
    def sample(self, noise: torch.Tensor, cond: Cond | None = None, generator: Generators = None) -> torch.Tensor:
        """The student's images of unit-variance `noise`, by all its steps, with fresh noise of `generator` between."""
        x_t = self.init_noise_sigma * noise
        x0 = self.student(x_t, self._full(self.student_timesteps[0], x_t), cond)
        for t in self.student_timesteps[1:]:
            t = self._full(t, x0)
            x_t = self.student.add_noise(x0, normal(x0.shape, generator, x0.device), t)
            x0 = self.student(x_t, t, cond)
        return x0

    def fake_score_loss(self, x0: torch.Tensor, batch: Batch, generator: Generators = None) -> torch.Tensor:
        """Denoising score matching of the fake score on the student's samples `x0`, `mean` or `sum` as the paper has
        it."""
        t = self.fake_score_level(x0.shape[0], generator, x0.device)
        noise = normal(x0.shape, generator, x0.device)
        x_t = self.fake_score.add_noise(x0, noise, t)
        fake_x0 = self.guided_fake_score(self.fake_guidance[0])(x_t, t, batch.get("cond"))
        target = x0
        if self.sanitize_gradients:  # what overflowed is dropped, the divisor stays
            finite = (fake_x0.isfinite() & x0.isfinite()).flatten(1).all(1).reshape(-1, 1, 1, 1)
            fake_x0, target = (torch.where(finite, v, 0.0) for v in (fake_x0, x0))
        loss = self.reduce(self.fake_score_weight(t) * (fake_x0 - target) ** 2)
        if self.gan_weight:
            if "x0" not in batch:
                raise ValueError(f"`gan_weight` needs batches with real images 'x0', but these have {sorted(batch)}.")
            logits = self.critic_logits(x0, noise, t, batch, generator)
            loss = loss + self.gan_critic_weight * gan_losses(*logits)[0]
        return loss

    def logits_at(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, cond: Cond | None) -> torch.Tensor:
        """The head's verdict `(B, 1)` on `x0`, noised to `t`."""
        self.fake_score(self.fake_score.add_noise(x0, noise, t), t, cond)
        return self.last_logits(x0.shape[0])

    def last_logits(self, batch_size: int) -> torch.Tensor:
        """The head's verdict `(B, 1)` on what the fake score saw in its last call, under guidance on the half with a
        condition."""
        return self.head(self._bottleneck.take()[-batch_size:])

    def fake_score_batch(self, batch: Batch, generator: Generators = None) -> Batch:
        """The batch that the fake score learns from, in which a method may drop conditions."""
        return batch

    def guided_fake_score(self, guidance_scale: float) -> Denoiser | GuidedDenoiser:
        """The fake score with classifier-free guidance; itself at 1.0."""
        if guidance_scale == 1.0:
            return self.fake_score
        return GuidedDenoiser(self.fake_score, guidance_scale, self.negative_cond)

    def scores(self, x0: torch.Tensor, batch: Batch, generator: Generators = None):
        """`teacher_x0` and `fake_x0`, both at one noised version of `x0`, with a graph if the method needs one."""
        t = self.student_level(x0.shape[0], generator, x0.device)
        with torch.set_grad_enabled(self.through_scores and torch.is_grad_enabled()):
            x_t = self.student.add_noise(x0, normal(x0.shape, generator, x0.device), t)
            teacher_x0 = self.teacher(x_t, t, batch.get("cond"))
            fake_x0 = self.guided_fake_score(self.fake_guidance[1])(x_t, t, batch.get("cond"))
        self.diagnose(x0, teacher_x0, fake_x0)
        return teacher_x0, fake_x0

    @torch.no_grad()
    def diagnose(self, x0: torch.Tensor, teacher_x0: torch.Tensor, fake_x0: torch.Tensor) -> None:
        """Keep `E|d|**2` with `d = teacher_x0 - fake_x0`, the real objective, and `E[d * (fake_x0 - x0)]`, which is 0
        where the fake score is optimal."""
        d = (teacher_x0 - fake_x0).flatten(1)
        error_along_gap = (d * (fake_x0 - x0).flatten(1)).sum(1).mean()
        self.diagnostics = {"score_gap": (d**2).sum(1).mean(), "error_along_gap": error_along_gap}

    def diagnosis(self, diagnostics):
        """The real objective, and the fake score's lag `E[d * (fake_x0 - x0)] / E|d|**2`: a ratio of means, since that
        of single samples is noise."""
        if not diagnostics:
            return {}
        gap = diagnostics["score_gap"]
        return {"score_gap": gap, "fake_score_lag": diagnostics["error_along_gap"] / gap.clamp(min=1e-12)}

    # what a method decides

    @abstractmethod
    def student_loss(self, x0: torch.Tensor, batch: Batch, generator: Generators = None) -> torch.Tensor:
        """The student's loss for its samples `x0`."""

    @abstractmethod
    def critic_logits(
        self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, batch: Batch, generator: Generators
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The head's verdicts on the batch's real images and on the student's `x0`, from which it learns; the fake
        score has just seen `x0` at `noise` and `t`."""

    @abstractmethod
    def student_level(self, batch_size: int, generator: Generators, device: torch.device) -> torch.Tensor:
        """Timesteps `(B,)` at which the two scores are compared."""

    @abstractmethod
    def fake_score_level(self, batch_size: int, generator: Generators, device: torch.device) -> torch.Tensor:
        """Timesteps `(B,)` at which the fake score learns."""

    def fake_score_weight(self, t: torch.Tensor) -> torch.Tensor:
        """Weight of the squared `x0` error: the network's own training loss."""
        return self.fake_score.weight(t)

    @staticmethod
    @abstractmethod
    def reduce(error: torch.Tensor) -> torch.Tensor:
        """Elements `(B, C, H, W)` to a scalar."""

    def uniform_index(
        self, low: int, high: int, batch_size: int, generator: Generators, device: torch.device
    ) -> torch.Tensor:
        """Timesteps at uniform grid places `low..high`, both included."""
        u = uniform(batch_size, generator, device)
        return self.teacher.schedule.grid(low + (u * (high - low + 1)).long())

    def uniform_between(
        self, low_ratio: float, high_ratio: float, batch_size: int, generator: Generators, device: torch.device
    ) -> torch.Tensor:
        """Timesteps uniform between those of two ratios `sigma / alpha`, both included."""
        low, high = (self.teacher.schedule.timestep(ratio) for ratio in (low_ratio, high_ratio))
        u = uniform(batch_size, generator, device)
        return low + u * (high - low) if low.is_floating_point() else low + (u * (high - low + 1)).long()

    def _bottleneck_shape(self) -> tuple[int, tuple[int, int]]:
        """Found by a call that computes nothing: a large network is still on the CPU here."""
        network = self.fake_score.network
        weight = next(network.parameters())
        device = weight.device
        x_t = torch.zeros(1, *self.sample_shape, device=device)
        cond = {k: v.to(device) for k, v in self.negative_cond.items()}
        if not cond and getattr(network.config, "num_class_embeds", None) is not None:
            cond = {"class_labels": torch.zeros(1, dtype=torch.long, device=device)}
        t = self._full(self.student_timesteps[0], x_t)
        self.fake_score.schedule.alpha_sigma(t)  # tables that are kept are to hold numbers
        computing = nullcontext() if isinstance(weight, FakeTensor) else FakeTensorMode(allow_non_fake_inputs=True)
        with torch.no_grad(), computing:
            self.fake_score(x_t, t, cond)
        features = self._bottleneck.take()
        return features.shape[1], tuple(features.shape[2:])

    @staticmethod
    def _full(t: float, x: torch.Tensor) -> torch.Tensor:
        return torch.full((x.shape[0],), t, device=x.device)
