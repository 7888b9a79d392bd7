"""PID, physics informed distillation (Tee et al., TMLR 2024, arXiv:2411.08378)."""

from functools import cached_property
from typing import Any

import torch
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..denoiser import Cond, Denoiser, end_of_trajectory, ode_time, predict_x0, scale_input, trajectory
from ..schedules import FlowSchedule, VPSchedule, karras_sigma
from .base import OneStepDistiller, Paper, check_same_prediction, check_start_ratio, copy_denoiser, normal, uniform
from .distances import DISTANCES, Distance, image_distance

__all__ = ["PID", "residual", "time_grid", "trajectory"]


def time_grid(n: int, t_min: float, t_max: float, rho: float = 7.0) -> torch.Tensor:
    """`n` times, descending from `t_max` to `t_min`, both included, float64: `(t_max**(1/rho) + i / (n - 1) *
    (t_min**(1/rho) - t_max**(1/rho)))**rho` (Karras et al. 2022, Eq. 5)."""
    return karras_sigma(torch.linspace(1, 0, n, dtype=torch.float64), t_min, t_max, rho)


def residual(
    f_t: torch.Tensor, f_s: torch.Tensor, t: torch.Tensor, s: torch.Tensor, t_max: torch.Tensor | float
) -> torch.Tensor:
    """`A = x - t * dx/dt` by the first-order rule from `t` to `s`: `w1 * f_t + w2 * f_s`, where the noise cancels.

    `w1 = -s * (1 - t / t_max) / (t - s)` and `w2 = t * (1 - s / t_max) / (t - s)` sum to 1; on a solution of the ODE
    `A` is the teacher's `x0` at `(x, t)`.

    Args:
        f_t, f_s (`torch.Tensor`): the student's `f` at both times, `(B, ...)`.
        t, s, t_max (`torch.Tensor`): broadcastable times.

    Source: Tee et al. 2024, Sec. 3, with its `x` from `trajectory` put in.
    """
    return (-s * (1 - t / t_max) * f_t + t * (1 - s / t_max) * f_s) / (t - s)


def central_residual(f_t, f_a, f_b, t, a, b, t_max) -> torch.Tensor:
    """`A` with the derivative from `a` to `b`, on both sides of `t`: second order in the step."""
    slope = ((1 - a / t_max) * f_a - (1 - b / t_max) * f_b) / (a - b)
    return (1 - t / t_max) * f_t - t * slope


def default_head(prediction_type: str) -> str:
    """`"teacher"` where reading the network as the teacher multiplies nothing, `"network"` elsewhere."""
    return "teacher" if prediction_type in ("v_prediction", "flow_prediction") else "network"


class PID(OneStepDistiller):
    """The student is the teacher's ODE trajectory as a function of its start and of time, trained on the ODE's own
    residual: `d(A, sg[teacher_x0(x, t)])`. No images, no pairs, no other network.

    Times are noise levels `sigma / alpha` (`s` for flow) at the teacher's own timesteps.

    Args:
        teacher (`Teacher`, `Denoiser` or `GuidedDenoiser`): stays frozen; guidance enters here.
        num_points (`int`, *optional*, defaults to 250): N of the time grid. On a VP schedule neighbours that fall on
            one timestep are merged; on a flow schedule times are even, and shifted as the teacher's scheduler's are.
        start_ratio (`float`, *optional*): the noise level where trajectories start, by default the noisiest one, but
            at most 80. Not for flow, which starts at pure noise.
        rule (`str`, *optional*, defaults to `"first"`): the derivative in time: `"first"` order to the next smaller
            time, `"second"` order (central, one more student call) or `"exact"` (forward-mode through the network).
        distance (`str` or callable, *optional*, defaults to `"lpips-average"`): see `image_distance`.
        head (`str`, *optional*): what the network's output is: `"network"` takes it as the clean end `f` itself, as
            published for EDM networks; `"teacher"` converts it as the teacher's prediction type at the start, where
            `f` then is the teacher's `x0` when training starts. By default `"teacher"` for v and flow teachers, else
            `"network"`: of epsilon the conversion multiplies every error by `start_ratio`, rounding in bf16 included.
        student (`Denoiser`, *optional*): where the student starts from, if not at the teacher.
        sample_shape (`tuple`, *optional*): `(C, H, W)` of model space, for networks without a diffusers config.
    """

    paper = Paper(
        title="Physics Informed Distillation for Diffusion Models",
        arxiv_id="2411.08378",
        citation="Tee, Zhang, Yoon, Gowda, Kim, Yoo, TMLR 2024",
    )

    def __init__(
        self,
        teacher: Any,
        *,
        num_points: int = 250,
        start_ratio: float | None = None,
        rule: str = "first",
        distance: str | Distance = "lpips-average",
        head: str | None = None,
        student: Denoiser | None = None,
        sample_shape: tuple[int, int, int] | None = None,
    ):
        if rule not in ("first", "second", "exact"):
            raise ValueError(f"`rule` must be 'first', 'second' or 'exact', but is {rule!r}.")
        if head not in (None, "network", "teacher"):
            raise ValueError(f"`head` must be 'network' or 'teacher', but is {head!r}.")
        if num_points < 3:
            raise ValueError(f"`num_points` must be at least 3, but is {num_points}.")
        self.take_teacher(teacher, sample_shape)
        self.student = copy_denoiser(self.teacher)
        if student is not None:
            check_same_prediction(student, self.teacher)
            network = copy_denoiser(student).network.eval()  # dropout would differ between the two times
            self.student = Denoiser(network, self.teacher.schedule, self.teacher.prediction_type)
        self.rule = rule
        if isinstance(distance, str) and distance not in DISTANCES:
            raise ValueError(f"`distance` must be one of {sorted(DISTANCES)}, but is {distance!r}.")
        self._distance = distance
        own = self.teacher.prediction_type
        self.head = head or default_head(own)
        self.prediction_type = own if self.head == "teacher" else "sample"
        self.timesteps = self._timesteps(num_points, start_ratio)
        u, scale = ode_time(self.teacher.schedule, self.timesteps)
        self.times = u.flatten()
        self.start = self.timesteps[0].item()
        self.student_timesteps = [self.timesteps[-1].item()]
        self.init_noise_sigma = (self.times[0] * scale.flatten()[0]).item()

    def _timesteps(self, n: int, start_ratio: float | None) -> torch.Tensor:
        """The time grid as timesteps of the teacher, noisiest first."""
        schedule = self.teacher.schedule
        if isinstance(schedule, FlowSchedule):
            if start_ratio is not None:
                raise ValueError(f"`start_ratio` must be None for a flow teacher, but is {start_ratio}.")
            s = torch.linspace(1, 1 / schedule.num_train_timesteps, n, dtype=torch.float64)
            return schedule.t_max * schedule.shift * s / (1 + (schedule.shift - 1) * s)
        low, high = (schedule.ratio(torch.tensor(float(t))).item() for t in (schedule.t_min, schedule.t_max))
        if start_ratio is not None:
            check_start_ratio(schedule, start_ratio)
        timesteps = schedule.timestep(time_grid(n, low, start_ratio or min(high, 80.0)))
        if isinstance(schedule, VPSchedule):
            timesteps = timesteps.unique().flip(0)
        if len(timesteps) < 3:
            raise ValueError(
                f"`start_ratio` must leave at least 3 timesteps of the teacher, but {start_ratio} with `num_points` "
                f"{n} leaves {timesteps.tolist()}."
            )
        return timesteps

    @property
    def trainable(self):
        return {"student": self.student.network}

    @cached_property
    def distance(self) -> Distance:
        """The distance of the loss, whose network is loaded when it is first needed."""
        return image_distance(self._distance) if isinstance(self._distance, str) else self._distance

    @property
    def student_settings(self):
        return super().student_settings | {
            "parameterization": "trajectory",
            "start_timestep": self.start,
            "trajectory_head": self.head,
        }

    # the algorithm box

    def updates(self, batch, generator=None):
        if self.student.autocast_dtype is not None and "Flux" in type(self.student.network).__name__:
            raise ValueError(
                "`mixed_precision` must be 'no' for PID on FLUX, whose network rounds its times to the lower "
                "precision and so takes neighbours on the grid for one, but is "
                f"{self.student.autocast_dtype}."
            )
        device = next(self.student.network.parameters()).device
        noise = normal((batch["batch_size"], *self.sample_shape), generator, device)
        index = (uniform(batch["batch_size"], generator, device) * len(self.timesteps)).long()
        self.student.network.requires_grad_(True)
        yield "student", self.loss(noise, index, batch.get("cond"))

    def loss(self, noise: torch.Tensor, index: torch.Tensor, cond: Cond | None = None) -> torch.Tensor:
        """The residual loss at places `index` `(B,)` of the time grid, for unit-variance `noise`."""
        x_start = self.init_noise_sigma * noise
        last = len(self.timesteps) - 1
        following = torch.where(index < last, index + 1, index - 1)
        if self.rule == "exact":
            f_t, slope = self.derivative(x_start, index, cond)
            t = self._u(index)
            A = f_t - t * (1 - t / self._u(torch.zeros_like(index))) * slope
        else:
            interior = (index > 0) & (index < last) & (self.rule == "second")
            before = torch.where(interior, index - 1, index)
            places = [index, following] if self.rule == "first" else [index, before, following]
            f = self.f(x_start, torch.cat(places), cond, repeats=len(places)).chunk(len(places))
            t, *others, t_max = (self._u(i) for i in (*places, torch.zeros_like(index)))
            A = residual(*f, t, *others, t_max) if self.rule == "first" else central_residual(*f, t, *others, t_max)
            f_t = f[0]
        timesteps = self._t(index)
        with torch.no_grad():
            x_t = self.point(f_t.detach(), x_start, index)
            teacher_x0 = self.teacher(x_t, timesteps, cond)
        self.diagnostics = {"residual": ((A.detach() - teacher_x0) ** 2).mean()}
        return self.distance(A, teacher_x0)

    def f(
        self, x_start: torch.Tensor, index: torch.Tensor, cond: Cond | None = None, repeats: int = 1
    ) -> torch.Tensor:
        """The student's `f` at places `index` `(repeats * B,)` for starts `(B, C, H, W)`, float32, in one call."""
        x_start = x_start.repeat(repeats, *[1] * (x_start.ndim - 1))
        cond = {k: v.repeat(repeats, *[1] * (v.ndim - 1)) for k, v in (cond or {}).items()}
        return self._f_at(x_start, self._t(index), cond)

    def _f_at(self, x_start, t, cond):
        # the network always sees the start, and of time nothing but the embedding of `t`
        start = torch.full((x_start.shape[0],), self.start, device=x_start.device, dtype=torch.float64)
        output = self.student.call_network(scale_input(self.student.schedule, x_start, start), t, cond)
        return predict_x0(self.student.schedule, self.prediction_type, x_start, start, output)

    def derivative(self, x_start, index, cond):
        """`f` and its exact derivative in the ODE's time, by forward mode through the network."""
        t = self._t(index).float()
        schedule, h = self.teacher.schedule, 0.5 if isinstance(self.teacher.schedule, VPSchedule) else 1e-4
        low, high = (t.double() - h).clamp(min=schedule.t_min), (t.double() + h).clamp(max=schedule.t_max)
        du = (ode_time(schedule, high)[0] - ode_time(schedule, low)[0]).flatten()
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward mode
            return jvp(lambda v: self._f_at(x_start, v, dict(cond or {})), (t,), (((high - low) / du).float(),))

    def point(self, f: torch.Tensor, x_start: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """The trajectory's point at places `index`, in the teacher's coordinates."""
        (u, scale), (u_max, scale_max) = (
            [v.to(f.dtype) for v in ode_time(self.teacher.schedule, self._t(i))] for i in (index, 0 * index)
        )
        return scale * trajectory(f, x_start / scale_max, u, u_max)

    def _t(self, index: torch.Tensor) -> torch.Tensor:
        return self.timesteps.to(index.device)[index]

    def _u(self, index: torch.Tensor) -> torch.Tensor:
        return self.times.to(index.device)[index].float().reshape(-1, 1, 1, 1)

    @torch.no_grad()
    def sample(self, noise, cond=None, generator=None):
        """The student's images of unit-variance `noise`, in one call; `generator` is not needed."""
        x_start = self.init_noise_sigma * noise
        start, end = (torch.full((len(noise),), t, device=noise.device) for t in (self.start, *self.student_timesteps))
        schedule = self.student.schedule
        output = self.student.call_network(scale_input(schedule, x_start, start), end, cond)
        return end_of_trajectory(schedule, self.prediction_type, x_start, start, end, output)
