"""Noise schedules: what `alpha` and `sigma` are at a timestep, read from any diffusers scheduler.

`x_t = alpha * x0 + sigma * noise`, with `t` in the unit of the teacher's diffusers scheduler and growing with the
noise.
"""

import math
from abc import ABC, abstractmethod

import torch
from diffusers import SchedulerMixin


class NoiseSchedule(ABC):
    """Signal and noise scale of a diffusion as functions of the timestep, as diffusers' scheduler defines them.

    Attributes:
        t_min (`float`): the least noisy timestep.
        t_max (`float`): the noisiest timestep.
        num_train_timesteps (`int`): how many levels the papers' grids divide the schedule into.
    """

    t_min: float
    t_max: float
    num_train_timesteps: int

    @staticmethod
    def from_scheduler(scheduler: SchedulerMixin) -> "NoiseSchedule":
        """The schedule that a diffusers scheduler's config states.

        Raises:
            ValueError: if it is neither variance preserving nor flow matching nor EDM.
        """
        config, name = scheduler.config, type(scheduler).__name__
        if config.get("schedule_type") == "edm" or name.startswith(("EDM", "DistilledEDM")):
            return EDMSchedule(config.sigma_min, config.sigma_max, config.sigma_data, config.num_train_timesteps)
        if config.get("schedule_type") == "flow" or "FlowMatch" in name or config.get("use_flow_sigmas"):
            return FlowSchedule(config.num_train_timesteps, config.get("shift", config.get("flow_shift")) or 1.0)
        if hasattr(scheduler, "alphas_cumprod"):
            return VPSchedule(scheduler.alphas_cumprod)
        raise ValueError(
            "`scheduler` must be variance preserving (has `alphas_cumprod`), a FlowMatch or an EDM scheduler, "
            f"but is {name}."
        )

    @abstractmethod
    def alpha_sigma(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`alpha` and `sigma`, each `(B, 1, 1, 1)`, at timesteps `t` `(B,)`: computed in float64, returned in the
        dtype of `t` if that is floating, else in float32."""

    @abstractmethod
    def timestep(self, ratio: torch.Tensor | float) -> torch.Tensor:
        """The timestep whose `sigma / alpha` is `ratio` (VP: the nearest one); the inverse of `ratio`."""

    def ratio(self, t: torch.Tensor) -> torch.Tensor:
        """`sigma / alpha` at `t`, shaped like `t`, in float64."""
        alpha, sigma = self.alpha_sigma(torch.as_tensor(t).double().reshape(-1))
        return (sigma / alpha).reshape(torch.as_tensor(t).shape)

    def grid(self, index: torch.Tensor) -> torch.Tensor:
        """Timestep of place `index` (`0 <= index < num_train_timesteps`, ascending noise) on the grid that the DMD
        papers draw from: the timesteps themselves for VP and flow, Karras levels for EDM (DMD, App. B.1)."""
        return index


def _shaped(alpha: torch.Tensor, sigma: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = t.dtype if t.is_floating_point() else torch.float32
    return alpha.to(dtype).reshape(-1, 1, 1, 1), sigma.to(dtype).reshape(-1, 1, 1, 1)


class VPSchedule(NoiseSchedule):
    """Variance preserving: `alpha**2 = alphas_cumprod[t]`, `alpha**2 + sigma**2 = 1` (Ho et al. 2020, Eq. 4).

    Timesteps are 0..T-1; a fractional one interpolates `alphas_cumprod`.
    """

    def __init__(self, alphas_cumprod: torch.Tensor):
        self.alphas_cumprod = torch.as_tensor(alphas_cumprod).detach().double().cpu()
        self.num_train_timesteps = len(self.alphas_cumprod)
        self.t_min, self.t_max = 0, self.num_train_timesteps - 1
        self._tables = {}  # one copy per device, so that a step never waits for a transfer

    def alpha_sigma(self, t):
        table = self._tables.setdefault(t.device, self.alphas_cumprod.to(t.device))
        position = t.double().clamp(0, self.t_max)
        below = position.long()
        above = (below + 1).clamp(max=self.t_max)
        signal = torch.lerp(table[below], table[above], position - below)
        return _shaped(signal.sqrt(), (1 - signal).sqrt(), t)

    def timestep(self, ratio):
        ratio = torch.as_tensor(ratio, dtype=torch.float64)
        log_ratios = 0.5 * torch.log((1 - self.alphas_cumprod) / self.alphas_cumprod).to(ratio.device)
        distance = (log_ratios.clamp(max=1e3) - ratio.log().clamp(max=1e3)[..., None]).abs()
        return distance.argmin(-1)


class FlowSchedule(NoiseSchedule):
    """Flow matching: `alpha = 1 - s`, `sigma = s`, `t = num_train_timesteps * s` (Lipman et al. 2023, Eq. 20).

    A solver's times are `shift * s / (1 + (shift - 1) * s)` of even ones (Esser et al. 2024, Eq. 23).
    """

    def __init__(self, num_train_timesteps: int = 1000, shift: float = 1.0):
        self.num_train_timesteps, self.shift = num_train_timesteps, shift
        self.t_min, self.t_max = 0.0, float(num_train_timesteps)

    def alpha_sigma(self, t):
        s = t.double() / self.num_train_timesteps
        return _shaped(1 - s, s, t)

    def timestep(self, ratio):
        ratio = torch.as_tensor(ratio, dtype=torch.float64)
        return (self.num_train_timesteps * (1 - 1 / (1 + ratio))).float()

    def grid(self, index):
        return self.t_max * (index + 1) / self.num_train_timesteps


class EDMSchedule(NoiseSchedule):
    """EDM: `alpha = 1`, `sigma` is the noise level and `t = 0.25 * ln(sigma)` (Karras et al. 2022, Table 1)."""

    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        num_train_timesteps: int = 1000,
    ):
        self.sigma_min, self.sigma_max, self.sigma_data = sigma_min, sigma_max, sigma_data
        self.num_train_timesteps = num_train_timesteps
        self.t_min, self.t_max = 0.25 * math.log(sigma_min), 0.25 * math.log(sigma_max)

    def alpha_sigma(self, t):
        sigma = torch.exp(4 * t.double())
        return _shaped(torch.ones_like(sigma), sigma, t)

    def timestep(self, ratio):
        return (0.25 * torch.as_tensor(ratio, dtype=torch.float64).log()).float()

    def grid(self, index):
        return self.timestep(karras_sigma(index / (self.num_train_timesteps - 1), self.sigma_min, self.sigma_max))


def karras_sigma(u: torch.Tensor, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> torch.Tensor:
    """Noise level at `u` in [0, 1], ascending: `(sigma_min**(1/rho) + u * (sigma_max**(1/rho) -
    sigma_min**(1/rho)))**rho` (Karras et al. 2022, Eq. 5, counted from the other end)."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (low + torch.as_tensor(u).double() * (high - low)) ** rho
