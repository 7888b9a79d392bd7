"""The sampler of EDM (Karras et al. 2022, Algorithms 1 and 2): Heun's method on Karras noise levels."""

import math

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from ..denoiser import predict_x0, scale_input
from ..schedules import EDMSchedule, karras_sigma


class EDMHeunScheduler(SchedulerMixin, ConfigMixin):
    """
    Heun's method for networks with one of the four preconditionings of Karras et al. 2022, Table 1: `2 N - 1` network
    calls for `N` steps. It starts at `sigma_max * noise` exactly, and works in the dtype of the samples: float64
    samples give the authors' results.

    Args:
        sigma_min (`float`, defaults to 0.002): Least noise level, raised to that of the preconditioning's networks.
        sigma_max (`float`, defaults to 80.0): Largest noise level, lowered likewise.
        sigma_data (`float`, defaults to 0.5): Standard deviation of the data, of the preconditioning "edm".
        num_train_timesteps (`int`, defaults to 1000): See [`EDMSchedule`].
        prediction_type (`str`, defaults to `"epsilon"`): As in [`EDMEulerScheduler`], which knows `"epsilon"` for what
            an EDM network predicts.
        rho (`float`, defaults to 7.0): Exponent of the grid.
        preconditioning (`str`, defaults to `"edm"`): `"edm"`, `"vp"`, `"ve"` or `"iddpm"`; see [`EDMSchedule`].
        s_churn (`float`, defaults to 0.0): Amount of fresh noise, 0 for the ODE (40 for ImageNet-64 in the paper).
        s_min (`float`, defaults to 0.0): Least noise level at which there is fresh noise (0.05).
        s_max (`float`, *optional*): Largest such level (50).
        s_noise (`float`, defaults to 1.0): Inflation of the fresh noise (1.003).
    """

    _compatibles = ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"]
    order = 2

    @register_to_config
    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        num_train_timesteps: int = 1000,
        prediction_type: str = "epsilon",
        rho: float = 7.0,
        preconditioning: str = "edm",
        s_churn: float = 0.0,
        s_min: float = 0.0,
        s_max: float | None = None,
        s_noise: float = 1.0,
    ):
        if prediction_type != "epsilon":
            raise ValueError(f"`prediction_type` must be 'epsilon', but is {prediction_type!r}.")
        self.schedule = EDMSchedule(sigma_min, sigma_max, sigma_data, num_train_timesteps, preconditioning)
        self.num_inference_steps: int | None = None
        self.set_timesteps(18)

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the starting noise."""
        return self.hats[0]

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None):
        """
        Set the levels of a run: `N` of them and 0, `timesteps` has one entry for each of the `2 N - 1` network calls.

        Args:
            num_inference_steps (`int`): N.
            device (`str` or `torch.device`, *optional*): Where to put the timesteps.
        """
        if num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` must be at least 1, but is {num_inference_steps}.")
        config, schedule = self.config, self.schedule
        grid = torch.linspace(1, 0, num_inference_steps, dtype=torch.float64) if num_inference_steps > 1 else [1.0]
        sigmas = schedule.round_sigma(karras_sigma(grid, schedule.sigma_min, schedule.sigma_max, config.rho))
        gamma = min(config.s_churn / num_inference_steps, math.sqrt(2) - 1)
        s_max = math.inf if config.s_max is None else config.s_max
        hats = torch.where((sigmas >= config.s_min) & (sigmas <= s_max), sigmas * (1 + gamma), sigmas)
        hats = schedule.round_sigma(hats)
        calls = torch.stack([hats, torch.cat([sigmas[1:], sigmas.new_zeros(1)])], dim=1).flatten()[:-1]
        self.num_inference_steps = num_inference_steps
        self.sigmas, self.hats = [*sigmas.tolist(), 0.0], hats.tolist()
        self.levels = calls
        self.timesteps = schedule.c_noise(calls).float().to(device)
        self._call, self._slope, self._start = 0, None, None

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """What the network sees: `c_in * sample`, at the level of the next call."""
        return scale_input(self.schedule, sample, self.time(sample))

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """
        A half of Heun's step: Euler's, then its correction by the slope at its end.

        Args:
            model_output (`torch.Tensor`): What the network returned.
            timestep (`float` or `torch.Tensor`): Not used: calls are counted.
            sample (`torch.Tensor`): The noisy sample, before `scale_model_input`.
            generator (`torch.Generator` or list, *optional*): Of the fresh noise.
            return_dict (`bool`, defaults to `True`): Whether to return a [`SchedulerOutput`].
        """
        index, corrects = self._call // 2, self._call % 2 == 1
        if self._call == 0:  # the authors draw noise at every step; that of the first is in `init_noise_sigma`
            self._churn(sample, 0, generator)
        sigma = self.levels[self._call].item()
        x0 = predict_x0(self.schedule, self.schedule.prediction_type, sample, self.time(sample), model_output)
        slope = (sample - x0) / sigma
        hat, target = self.hats[index], self.sigmas[index + 1]
        if corrects:
            prev_sample = self._start + (target - hat) * (self._slope + slope) / 2
        else:
            self._start, self._slope = sample, slope
            prev_sample = sample + (target - hat) * slope
        self._call += 1
        if (corrects or target == 0) and index + 1 < self.num_inference_steps:
            prev_sample = self._churn(prev_sample, index + 1, generator)
        prev_sample = prev_sample.to(sample.dtype)
        return SchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)

    def _churn(self, sample: torch.Tensor, index: int, generator) -> torch.Tensor:
        if not self.config.s_churn:
            return sample
        noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
        fresh = max(self.hats[index] ** 2 - self.sigmas[index] ** 2, 0.0) ** 0.5
        return sample + fresh * self.config.s_noise * noise

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """`original_samples + sigma * noise` at `timesteps` `(B,)`."""
        sigma = self.schedule.alpha_sigma(timesteps.double().reshape(-1))[1]
        return original_samples + sigma.to(original_samples) * noise

    def time(self, sample: torch.Tensor) -> torch.Tensor:
        """The timestep of the next call, `(1,)` in float64, on the device of `sample`."""
        return self.schedule.c_noise(self.levels[self._call].to(sample.device)).reshape(1)

    def __len__(self) -> int:
        return self.config.num_train_timesteps
