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
            levels = (config.sigma_min, config.sigma_max, config.sigma_data, config.num_train_timesteps)
            return EDMSchedule(*levels, config.get("preconditioning", "edm"))
        if config.get("schedule_type") == "flow" or "FlowMatch" in name or config.get("use_flow_sigmas"):
            return FlowSchedule(config.num_train_timesteps, config.get("shift", config.get("flow_shift")) or 1.0)
        if config.get("timestep_type") == "continuous":
            raise ValueError(
                f"`scheduler` must have discrete timesteps, but is a {name} with `timestep_type` 'continuous': give "
                "an EDMEulerScheduler for a network of EDM's preconditioning."
            )
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

    def network_timestep(self, t: torch.Tensor) -> torch.Tensor:
        """What the network is told for `t`."""
        return t


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
        if t.device not in self._tables:
            self._tables[t.device] = self.alphas_cumprod.to(t.device)
        table = self._tables[t.device]
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
    """Noise levels themselves: `alpha = 1`, and `t` is the `c_noise` of one of the four preconditionings of Karras et
    al. 2022, Table 1.

    | `preconditioning` | `t` | the network sees | `prediction_type` |
    |---|---|---|---|
    | `"edm"` | `ln(sigma) / 4` | `x_t / sqrt(sigma**2 + sigma_data**2)` | `"edm"` |
    | `"vp"` | 999 times the time of the VP SDE | `x_t / sqrt(sigma**2 + 1)` | `"epsilon"` |
    | `"ve"` | `ln(sigma / 2)` | `x_t` | `"ve"` |
    | `"iddpm"` | DDPM's timestep, with the cosine schedule; the network sees whole ones | as `"vp"` | `"epsilon"` |

    Args:
        sigma_min, sigma_max (`float`): range of noise levels, cut to what networks of the preconditioning know.
        sigma_data (`float`): standard deviation of the data; of "edm" alone.
        num_train_timesteps (`int`): see `grid`.
        preconditioning (`str`): as above.
    """

    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        num_train_timesteps: int = 1000,
        preconditioning: str = "edm",
    ):
        if preconditioning not in PRECONDITIONINGS:
            raise ValueError(f"`preconditioning` must be one of {PRECONDITIONINGS}, but is {preconditioning!r}.")
        self.preconditioning, self.sigma_data = preconditioning, sigma_data
        self.num_train_timesteps = num_train_timesteps
        self._levels: dict[torch.device, torch.Tensor] = {}  # one copy per device
        least, largest = 0.0, math.inf
        if preconditioning == "ve":
            least, largest = VE_SIGMAS
        elif preconditioning == "vp":
            least, largest = VP_SIGMAS
        elif preconditioning == "iddpm":
            least, largest = self.iddpm_levels()[[0, -1]].tolist()
        self.sigma_min, self.sigma_max = max(sigma_min, least), min(sigma_max, largest)
        ends = self.c_noise(torch.tensor([self.sigma_min, self.sigma_max], dtype=torch.float64))
        self.t_min, self.t_max = ends.tolist()

    @property
    def prediction_type(self) -> str:
        """What a network with this preconditioning predicts."""
        return {"edm": "edm", "ve": "ve"}.get(self.preconditioning, "epsilon")

    def c_in(self, sigma: torch.Tensor) -> torch.Tensor:
        """The scale of the network's input at noise levels `sigma`."""
        if self.preconditioning == "ve":
            return torch.ones_like(sigma)
        return (sigma**2 + (self.sigma_data**2 if self.preconditioning == "edm" else 1)).rsqrt()

    def c_noise(self, sigma: torch.Tensor) -> torch.Tensor:
        """The timestep of noise levels `sigma`, in float64."""
        sigma = sigma.double()
        if self.preconditioning == "edm":
            return sigma.log() / 4
        if self.preconditioning == "ve":
            return (sigma / 2).log()
        if self.preconditioning == "vp":
            log_term = 2 * VP_BETA_D * torch.log1p(sigma**2)
            return (VP_STEPS - 1) * ((VP_BETA_MIN**2 + log_term).sqrt() - VP_BETA_MIN) / VP_BETA_D
        levels = self.iddpm_levels(sigma.device)
        above = torch.searchsorted(levels, sigma.contiguous()).clamp(1, len(levels) - 1)
        low, high = levels[above - 1], levels[above]
        return above - 1 + (sigma - low) / (high - low)

    def alpha_sigma(self, t):
        time = t.double()
        if self.preconditioning == "edm":
            sigma = torch.exp(4 * time)
        elif self.preconditioning == "ve":
            sigma = 2 * time.exp()
        elif self.preconditioning == "vp":
            time = time / (VP_STEPS - 1)
            sigma = torch.expm1(VP_BETA_D * time**2 / 2 + VP_BETA_MIN * time).clamp(min=0).sqrt()
        else:
            levels = self.iddpm_levels(t.device)
            below = time.floor().clamp(0, len(levels) - 2).long()
            sigma = levels[below] + (time - below) * (levels[below + 1] - levels[below])
        return _shaped(torch.ones_like(sigma), sigma, t)

    def timestep(self, ratio):
        return self.c_noise(torch.as_tensor(ratio, dtype=torch.float64)).float()

    def grid(self, index):
        return self.timestep(karras_sigma(index / (self.num_train_timesteps - 1), self.sigma_min, self.sigma_max))

    def network_timestep(self, t):
        if self.preconditioning != "iddpm":
            return t
        sigma = self.alpha_sigma(t.double())[1].flatten()
        return (self.iddpm_levels(t.device) - sigma[:, None]).abs().argmin(1).to(t.dtype).reshape(t.shape)

    def round_sigma(self, sigma: torch.Tensor) -> torch.Tensor:
        """The noise level nearest to `sigma` that the network was trained at."""
        if self.preconditioning != "iddpm":
            return sigma
        levels = self.iddpm_levels(sigma.device)
        return levels[(levels - sigma.double()[..., None]).abs().argmin(-1)].to(sigma.dtype)

    def iddpm_levels(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Noise levels of DDPM's timesteps 0..999 with the cosine schedule, ascending, in float64."""
        if torch.device(device) not in self._levels:
            self._levels[torch.device(device)] = iddpm_sigmas().to(device)
        return self._levels[torch.device(device)]


PRECONDITIONINGS = ("edm", "vp", "ve", "iddpm")
VP_BETA_D, VP_BETA_MIN, VP_STEPS = 19.9, 0.1, 1000  # of the VP SDE (Karras et al. 2022, Table 1)
VP_TIMES = (1e-5, 1.0)  # between which it was trained
VP_SIGMAS = tuple(math.sqrt(math.expm1(VP_BETA_D * t**2 / 2 + VP_BETA_MIN * t)) for t in VP_TIMES)
VE_SIGMAS = (0.02, 100.0)  # of the VE SDE


def iddpm_sigmas(steps: int = 1000) -> torch.Tensor:
    """`u_{steps - 1 - t}` of the iDDPM preconditioning for `t` = 0..steps-1, float64: `u_{j-1} = sqrt((u_j**2 + 1) /
    max(abar(j-1) / abar(j), C1) - 1)` with `abar(j) = sin(pi j / (2 steps (1 + C2)))**2` (Karras et al. 2022, Table
    1), computed in float32 as it was for the checkpoints: the least level differs by 5e-4 from the exact one."""
    c1, c2 = 0.001, 0.008
    abar = (0.5 * math.pi * torch.arange(steps + 1) / steps / (1 + c2)).sin() ** 2
    u = torch.zeros(steps + 1)
    for j in range(steps, 0, -1):
        u[j - 1] = ((u[j] ** 2 + 1) / (abar[j - 1] / abar[j]).clamp(min=c1) - 1).sqrt()
    return u[:-1].flip(0).double()


def vp_sde_alphas_cumprod() -> torch.Tensor:
    """`alpha**2` of the VP SDE at timesteps 0..999 (times `c_noise / 999`), float64; the first at the SDE's least
    time, for there is no noise at 0."""
    time = torch.arange(VP_STEPS, dtype=torch.float64) / (VP_STEPS - 1)
    time[0] = VP_TIMES[0]
    return torch.exp(-(VP_BETA_D * time**2 / 2 + VP_BETA_MIN * time))


def karras_sigma(u: torch.Tensor, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> torch.Tensor:
    """Noise level at `u` in [0, 1], ascending: `(sigma_min**(1/rho) + u * (sigma_max**(1/rho) -
    sigma_min**(1/rho)))**rho` (Karras et al. 2022, Eq. 5, counted from the other end)."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (low + torch.as_tensor(u).double() * (high - low)) ** rho
