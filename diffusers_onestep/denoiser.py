"""One view over any teacher: `(x_t, t, cond) -> x0`, whatever the network predicts and in whatever dtype it runs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .network_calls import network_output
from .schedules import EDMSchedule, FlowSchedule, NoiseSchedule

Cond = dict[str, torch.Tensor]  # network inputs by name, `(B, ...)`

PREDICTION_TYPES = {
    # prediction_type: (c_skip, c_out) of x0 = c_skip * x_t + c_out * model_output, from alpha, sigma, sigma_data
    "epsilon": lambda alpha, sigma, _: (1 / alpha, -sigma / alpha),
    "v_prediction": lambda alpha, sigma, _: (alpha / (alpha**2 + sigma**2), -sigma / (alpha**2 + sigma**2)),
    "sample": lambda alpha, sigma, _: (torch.zeros_like(alpha), torch.ones_like(alpha)),
    "flow_prediction": lambda alpha, sigma, _: (1 / (alpha + sigma), -sigma / (alpha + sigma)),
    "ve": lambda _, sigma, __: (torch.ones_like(sigma), sigma),
    "edm": lambda _, sigma, sd: (sd**2 / (sigma**2 + sd**2), sigma * sd / (sigma**2 + sd**2).sqrt()),
}


def check_prediction_type(prediction_type: str) -> None:
    """Raise a `ValueError` unless `prediction_type` is a row of the table above."""
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"`prediction_type` must be one of {sorted(PREDICTION_TYPES)}, but is {prediction_type!r}.")


def x0_coefficients(
    schedule: NoiseSchedule, prediction_type: str, t: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`c_skip` and `c_out` of `x0 = c_skip * x_t + c_out * model_output`, each `(B, 1, 1, 1)` in float64."""
    alpha, sigma = schedule.alpha_sigma(t.double())
    return PREDICTION_TYPES[prediction_type](alpha, sigma, getattr(schedule, "sigma_data", None))


def predict_x0(
    schedule: NoiseSchedule, prediction_type: str, x_t: torch.Tensor, t: torch.Tensor, model_output: torch.Tensor
) -> torch.Tensor:
    """`x0 = c_skip * x_t + c_out * model_output`, in float32 (float64 for float64 samples), never clipped."""
    dtype = torch.promote_types(x_t.dtype, torch.float32)
    c_skip, c_out = x0_coefficients(schedule, prediction_type, t)
    c_skip, c_out = (c.to(dtype).reshape(-1, *[1] * (x_t.ndim - 1)) for c in (c_skip, c_out))
    return c_skip * x_t.to(dtype) + c_out * model_output.to(dtype)


def trajectory(f: torch.Tensor, z: torch.Tensor, t: torch.Tensor, t_max: float) -> torch.Tensor:
    """`x = t / t_max * z + (1 - t / t_max) * f`: the point at time `t` of a trajectory that starts at `z`, whatever
    `f` (PID, arXiv:2411.08378). `t` broadcasts; its unit is the noise level `sigma / alpha`, or `s` for flow."""
    return t / t_max * z + (1 - t / t_max) * f


def ode_time(schedule: NoiseSchedule, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Time `u` and scale `c` with which every schedule has the ODE `dx/du = (x - x0(c * x)) / u`, float64 `(B, 1, 1,
    1)`: `u = sigma / alpha` and `c = alpha`, but `u = sigma` and `c = 1` for flow."""
    alpha, sigma = schedule.alpha_sigma(t.double())
    if isinstance(schedule, FlowSchedule):
        return sigma, torch.ones_like(sigma)
    return sigma / alpha, alpha


def end_of_trajectory(
    schedule: NoiseSchedule,
    head: str,
    x_start: torch.Tensor,
    start: torch.Tensor,
    t: torch.Tensor,
    model_output: torch.Tensor,
) -> torch.Tensor:
    """The state at timestep `t` of the trajectory that starts at `x_start`, over its scale `c`; at the least `t` it is
    the student's image.

    `head` is the prediction type by which `model_output` becomes `f` at `start`; "sample" takes it as it is. Dtype and
    shape as in `predict_x0`.
    """
    f = predict_x0(schedule, head, x_start, start, model_output)
    (u, _), (u_max, scale) = (ode_time(schedule, v) for v in (t, start))
    u, u_max, scale = (v.to(f.dtype).reshape(-1, *[1] * (f.ndim - 1)) for v in (u, u_max, scale))
    return trajectory(f, x_start.to(f.dtype) / scale, u, u_max)


def scale_input(schedule: NoiseSchedule, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """What the network sees of `x_t`: `c_in * x_t` for EDM, else `x_t` itself."""
    if not isinstance(schedule, EDMSchedule):
        return x_t
    _, sigma = schedule.alpha_sigma(t.double())
    return x_t * schedule.c_in(sigma).to(x_t.dtype)


class Denoiser(nn.Module):
    """A diffusion network seen as an `x0` predictor: `x0 = c_skip * x_t + c_out * network(scaled x_t, t, **cond)`.

    The network is called in its own dtype; all other arithmetic is float32 (float64 for float64 samples), and the
    result has the dtype of `x_t`. Nothing is clipped, so gradients flow through.

    Args:
        network (`nn.Module`): called as `network(x_t, t, **cond)`, or as its kind of diffusers model is
            (`network_calls.py`). Channels beyond those of `x_t` (a learned variance) are dropped.
        schedule (`NoiseSchedule`): the forward process that the network was trained on.
        prediction_type (`str`): `"epsilon"`, `"v_prediction"`, `"sample"`, `"flow_prediction"`, `"edm"` or
            `"ve"`.

    Raises:
        ValueError: if `prediction_type` is unknown, or is `"epsilon"` on a schedule without signal at its noisiest
        step.

    Example:

    ```python
    >>> from diffusers import DDPMPipeline
    >>> from diffusers_onestep import Denoiser, NoiseSchedule
    >>> pipe = DDPMPipeline.from_pretrained("google/ddpm-cifar10-32")
    >>> schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    >>> denoiser = Denoiser(pipe.unet, schedule, pipe.scheduler.config.prediction_type)
    ```
    """

    def __init__(self, network: nn.Module, schedule: NoiseSchedule, prediction_type: str):
        super().__init__()
        check_prediction_type(prediction_type)
        if isinstance(schedule, EDMSchedule) and prediction_type != schedule.prediction_type:
            raise ValueError(
                f"`prediction_type` must be {schedule.prediction_type!r} with the preconditioning "
                f"{schedule.preconditioning!r}, but is {prediction_type!r}."
            )
        if prediction_type in ("edm", "ve") and not isinstance(schedule, EDMSchedule):
            raise ValueError(
                f"`prediction_type` must not be {prediction_type!r} without an EDM schedule, but is so with "
                f"{type(schedule).__name__}."
            )
        if prediction_type == "epsilon":
            alpha, _ = schedule.alpha_sigma(torch.tensor([schedule.t_max], dtype=torch.float64))
            if alpha.item() < 1e-6:
                raise ValueError(
                    "`prediction_type` must not be 'epsilon' where the noisiest timestep holds no signal "
                    f"(alpha is {alpha.item():.1e} at t = {schedule.t_max}): x0 cannot be told from the noise there."
                )
        self.network = network
        self.schedule = schedule
        self.prediction_type = prediction_type
        self.autocast_dtype: torch.dtype | None = None  # set by the trainer for mixed precision
        self.input_dtype: torch.dtype | None = None  # and this where the network's own does not stay

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, cond: Cond | None = None) -> torch.Tensor:
        """Predicted `x0`, shape and dtype of `x_t` `(B, C, H, W)`, at timesteps `t` `(B,)`."""
        model_output = self.model_output(x_t, t, cond)
        return predict_x0(self.schedule, self.prediction_type, x_t, t, model_output).to(x_t.dtype)

    def model_output(self, x_t: torch.Tensor, t: torch.Tensor, cond: Cond | None = None) -> torch.Tensor:
        """The network output at `(x_t, t)`, `(B, C, H, W)`, in at least float32."""
        x_t = x_t.to(torch.promote_types(x_t.dtype, torch.float32))
        return self.call_network(scale_input(self.schedule, x_t, t), t, cond)

    def call_network(
        self, sample: torch.Tensor, t: torch.Tensor, cond: Cond | None = None, *, all_channels: bool = False
    ) -> torch.Tensor:
        """The network on an input that is scaled already, as a diffusers scheduler hands it out; dtype of `sample`.
        `all_channels` keeps a learned variance."""
        own = (p.dtype for p in self.network.parameters() if p.is_floating_point())
        dtype = self.input_dtype or next(own, sample.dtype)
        kwargs: dict[str, Any] = {k: v.to(dtype) if v.is_floating_point() else v for k, v in (cond or {}).items()}
        t = self.schedule.network_timestep(t.to(sample.device).expand(sample.shape[0]))
        # one autocast region per call: a longer one would hand weights cast under no_grad to a call that needs
        # gradients
        with torch.autocast(sample.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            output = network_output(self.network, sample.to(dtype), t, kwargs)
        return (output if all_channels else output[:, : sample.shape[1]]).to(sample.dtype)

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """`x_t = alpha * x0 + sigma * noise`, computed in at least float32, in the dtype of `x0`."""
        dtype = torch.promote_types(x0.dtype, torch.float32)
        alpha, sigma = self.schedule.alpha_sigma(t.double())
        return (alpha.to(dtype) * x0 + sigma.to(dtype) * noise).to(x0.dtype)

    def weight(self, t: torch.Tensor) -> torch.Tensor:
        """`1 / c_out**2`, `(B, 1, 1, 1)` in float32: `weight * (x0_pred - x0)**2` is the network's own training
        loss."""
        _, c_out = x0_coefficients(self.schedule, self.prediction_type, t)
        return (1 / c_out**2).float()


class GuidedDenoiser(nn.Module):
    """Classifier-free guidance as a denoiser: `uncond + guidance_scale * (cond - uncond)` (Ho & Salimans 2022, Eq. 6).

    Guiding `x0` equals guiding the model output, because `x0` is affine in it. One network call on the doubled batch;
    with `guidance_scale` 1.0 one call on the plain batch, and with 0.0 one on the negative condition.

    Args:
        denoiser (`Denoiser`): the conditional and unconditional model in one.
        guidance_scale (`float`): 1.0 means off.
        negative_cond (`dict` of tensors): the unconditional inputs, of batch size 1 or that of the call.
    """

    def __init__(self, denoiser: Denoiser, guidance_scale: float, negative_cond: Cond | None = None):
        super().__init__()
        if guidance_scale != 1.0 and not negative_cond:
            raise ValueError(
                f"`guidance_scale` must be 1.0 for a teacher without a null condition, but is {guidance_scale}."
            )
        self.denoiser = denoiser
        self.guidance_scale = guidance_scale
        self.origin: Any = None  # the `Teacher` that it was made from
        self.negative_cond = dict(negative_cond or {})

    @property
    def network(self) -> nn.Module:
        return self.denoiser.network

    @property
    def schedule(self) -> NoiseSchedule:
        return self.denoiser.schedule

    @property
    def prediction_type(self) -> str:
        return self.denoiser.prediction_type

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, cond: Cond | None = None) -> torch.Tensor:
        """Guided prediction of `x0`, shape and dtype of `x_t`."""
        return self._guided(self.denoiser, x_t, t, cond)

    def call_network(
        self, sample: torch.Tensor, t: torch.Tensor, cond: Cond | None = None, *, all_channels: bool = False
    ) -> torch.Tensor:
        """The guided network output for an input that is scaled already."""
        if all_channels:
            raise ValueError("`all_channels` must be False for a guided teacher, but is True.")
        return self._guided(self.denoiser.call_network, sample, t, cond)

    def _guided(self, predict: Callable, x: torch.Tensor, t: torch.Tensor, cond: Cond | None) -> torch.Tensor:
        if self.guidance_scale == 1.0:
            return predict(x, t, cond)
        t = t.expand(x.shape[0])
        negative = {k: v.to(x.device).expand(x.shape[0], *v.shape[1:]) for k, v in self.negative_cond.items()}
        if self.guidance_scale == 0.0:
            return predict(x, t, negative)
        if not cond or cond.keys() != negative.keys():
            raise ValueError(
                f"`cond` must have the keys {sorted(negative)} of `negative_cond`, but has {sorted(cond or {})}."
            )
        both = {k: torch.cat([negative[k], cond[k]]) for k in cond}
        uncond, conditional = predict(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return uncond + self.guidance_scale * (conditional - uncond)

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """`alpha * x0 + sigma * noise`."""
        return self.denoiser.add_noise(x0, noise, t)

    def weight(self, t: torch.Tensor) -> torch.Tensor:
        """`1 / c_out**2`."""
        return self.denoiser.weight(t)
