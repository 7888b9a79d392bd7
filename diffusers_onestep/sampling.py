"""Many-step sampling of a teacher with diffusers' own schedulers."""

from collections.abc import Callable

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from .denoiser import Cond, Denoiser, GuidedDenoiser
from .network_calls import execution_device


def deterministic(scheduler: SchedulerMixin) -> SchedulerMixin:
    """DDPM, which has no deterministic steps of its own, as DDIM on the same config (Song et al. 2021, Eq. 12); DDIM
    with trailing timesteps, so that the first one is the noisiest. Others as they are."""
    if type(scheduler) in (DDPMScheduler, DDIMScheduler):
        return DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing")
    return scheduler


@torch.no_grad()
def sample(
    denoiser: Denoiser | GuidedDenoiser,
    scheduler: SchedulerMixin,
    noise: torch.Tensor,
    cond: Cond | None = None,
    *,
    num_inference_steps: int,
) -> torch.Tensor:
    """Solve the teacher's ODE from unit-variance `noise` `(B, C, H, W)` with a stock scheduler; returns `x0`.

    DDPM and DDIM are replaced as in `deterministic`. Tensors move to the network's device.
    """
    device = execution_device(denoiser.network)
    noise, cond = noise.to(device), {k: v.to(device) for k, v in (cond or {}).items()}
    return _solve(lambda x, t: denoiser.call_network(x, t, cond), scheduler, noise, num_inference_steps)


def _solve(
    predict: Callable, scheduler: SchedulerMixin, noise: torch.Tensor, num_inference_steps: int
) -> torch.Tensor:
    scheduler = deterministic(scheduler)
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) and scheduler.config.use_dynamic_shifting:
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        scheduler.set_timesteps(sigmas=sigmas, mu=dynamic_shift(scheduler, noise.shape), device=noise.device)
    else:
        scheduler.set_timesteps(num_inference_steps, device=noise.device)
    # flow schedulers have neither a scale of the noise nor one of the input
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
    for t in scheduler.timesteps:
        x = scheduler.step(predict(scale(x, t), t), t, x).prev_sample
    return x


def check_deterministic(scheduler: SchedulerMixin, what: str) -> None:
    """Raise a `ValueError` that says `what` it is if `sample` with this scheduler draws noise on the way: if two runs
    from one start, of a network that answers 0, end apart."""
    own, ends = type(scheduler).from_config(scheduler.config), []
    with torch.random.fork_rng(devices=[]):
        for seed in (0, 1):
            torch.manual_seed(seed)
            ends.append(_solve(lambda x, t: torch.zeros_like(x), own, torch.ones(1, 1, 8, 8), 4))
    if not torch.equal(*(end.nan_to_num() for end in ends)):  # NaN, of unstable steps, is not equal to itself
        settings = {k: v for k, v in scheduler.config.items() if k in ("algorithm_type", "stochastic_sampling")}
        solver = type(scheduler).__name__ + (f" with {settings}" if settings else "")
        raise ValueError(f"{what} must be deterministic, such as DDIM, but is {solver}.")


def dynamic_shift(scheduler: SchedulerMixin, shape: tuple[int, ...]) -> float:
    """The `mu` of a scheduler whose shift grows with the number of tokens, of 2 x 2 latents each, as FLUX.1's pipeline
    computes it for samples of `shape` `(..., H, W)`."""
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    return calculate_shift(shape[-2] * shape[-1] // 4, *(scheduler.config[name] for name in names))
