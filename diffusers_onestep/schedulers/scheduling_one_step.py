"""The sampling rule of one-step and few-step students: every step predicts x0, and noise is added between steps."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, LCMScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from ..denoiser import check_prediction_type, end_of_trajectory, predict_x0, scale_input
from ..schedules import EDMSchedule, FlowSchedule, NoiseSchedule, VPSchedule


@dataclass
class OneStepSchedulerOutput(BaseOutput):
    """
    Output of one step.

    Args:
        prev_sample (`torch.Tensor`): The next noisier-to-cleaner sample; `x0` itself after the last step.
        pred_original_sample (`torch.Tensor`): The predicted `x0`.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


class OneStepScheduler(SchedulerMixin, ConfigMixin):
    """
    Sampling with a student that predicts `x0` in one step; or in a few, with fresh noise between them.

    Args:
        num_train_timesteps (`int`, defaults to 1000): Timesteps of the teacher.
        beta_start (`float`, defaults to 0.0001): Of a variance-preserving teacher, as are the next three.
        beta_end (`float`, defaults to 0.02): Last beta.
        beta_schedule (`str`, defaults to `"linear"`): As in [`DDPMScheduler`].
        trained_betas (`list[float]`, *optional*): Betas themselves.
        prediction_type (`str`, defaults to `"epsilon"`): `"epsilon"`, `"v_prediction"`, `"sample"`,
            `"flow_prediction"`, `"edm"` or `"ve"`.
        schedule_type (`str`, defaults to `"vp"`): `"vp"`, `"flow"` or `"edm"`.
        sigma_min (`float`, defaults to 0.002): Of an EDM teacher, as are the next two.
        sigma_max (`float`, defaults to 80.0): Largest noise level.
        sigma_data (`float`, defaults to 0.5): Standard deviation of the data.
        preconditioning (`str`, defaults to `"edm"`): Of an EDM teacher: `"edm"`, `"vp"`, `"ve"` or `"iddpm"`.
        student_timesteps (`list`, *optional*): Timesteps that the student was trained for, noisiest first. Without it
            any number of evenly spaced steps is allowed.
        init_noise_sigma (`float`, defaults to 1.0): Scale of the noise that sampling starts from.
        parameterization (`str`, defaults to `"teacher"`): How the network's output becomes `x0`: as in the teacher, or
            as the end of a `"trajectory"` that starts at `start_timestep` (PID).
        start_timestep (`float`, *optional*): Where trajectories start; the network still sees that noise, whatever the
            timestep.
        trajectory_head (`str`, defaults to `"network"`): What the network's output is of a trajectory: its clean end
            itself, or with `"teacher"` what the teacher's prediction type makes of it at `start_timestep`.
    """

    _compatibles = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        prediction_type: str = "epsilon",
        schedule_type: str = "vp",
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        preconditioning: str = "edm",
        student_timesteps: list[float] | None = None,
        init_noise_sigma: float = 1.0,
        parameterization: str = "teacher",
        start_timestep: float | None = None,
        trajectory_head: str = "network",
    ):
        check_prediction_type(prediction_type)
        for key, value, allowed in (
            ("parameterization", parameterization, ("teacher", "trajectory")),
            ("trajectory_head", trajectory_head, ("network", "teacher")),
        ):
            if value not in allowed:
                raise ValueError(f"`{key}` must be one of {allowed}, but is {value!r}.")
        if parameterization == "trajectory" and (start_timestep is None or len(student_timesteps or []) != 1):
            raise ValueError(
                "`start_timestep` and one of `student_timesteps` must be given with `parameterization` 'trajectory', "
                f"but are {start_timestep} and {student_timesteps}."
            )
        self.schedule: NoiseSchedule
        if schedule_type == "vp":
            ddpm = DDPMScheduler(num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas)
            self.betas, self.alphas_cumprod = ddpm.betas, ddpm.alphas_cumprod
            self.schedule = VPSchedule(ddpm.alphas_cumprod)
        elif schedule_type == "flow":
            self.schedule = FlowSchedule(num_train_timesteps)
        elif schedule_type == "edm":
            self.schedule = EDMSchedule(sigma_min, sigma_max, sigma_data, num_train_timesteps, preconditioning)
        else:
            raise ValueError(f"`schedule_type` must be 'vp', 'flow' or 'edm', but is {schedule_type!r}.")
        low, high = self.schedule.t_min, self.schedule.t_max
        for before, t in zip([None, *(student_timesteps or [])], student_timesteps or [], strict=False):
            if not low - 1e-4 <= t <= high + 1e-4 or (before is not None and t >= before):
                raise ValueError(
                    f"`student_timesteps` must fall and lie between {low} and {high}, but are {student_timesteps}."
                )
        self.init_noise_sigma = init_noise_sigma
        self.num_inference_steps: int | None = None
        self.generator = None  # of the noise between steps, where the pipeline hands none to `step`
        self.set_timesteps(len(student_timesteps) if student_timesteps else 1)

    @classmethod
    def from_config(cls, config: dict[str, Any] | None = None, **kwargs):
        """
        As in other schedulers, from the config of a variance-preserving one.

        Raises:
            ValueError: on the config of a scheduler of another kind, whose noise levels it does not state.
        """
        if isinstance(config, dict) and "schedule_type" not in config:  # of a scheduler of diffusers
            of_another_kind = [key for key in ("shift", "sigma_data") if key in config]
            of_another_kind += [key for key in ("use_flow_sigmas", "rescale_betas_zero_snr") if config.get(key)]
            if of_another_kind:
                raise ValueError(
                    "`config` must be of a variance-preserving scheduler without zero terminal SNR, but has "
                    f"{of_another_kind}: `schedulers.student_scheduler` makes a student's scheduler of any kind."
                )
        return super().from_config(config, **kwargs)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
    ):
        """
        Set the timesteps of a run.

        Args:
            num_inference_steps (`int`, *optional*): How many, at least 1; a trained student allows its own number
                alone, and that is the default.
            device (`str` or `torch.device`, *optional*): Where to put them.
            sigmas, mu: What stock flow pipelines compute for their own grid; only the number of sigmas counts here.

        Raises:
            ValueError: on another number of steps than the student was trained for, or than there are timesteps.
        """
        trained = self.config.student_timesteps
        count = num_inference_steps if sigmas is None else len(sigmas)
        if count is None:
            count = len(trained) if trained else 1
        if trained and count != len(trained):
            raise ValueError(
                f"`num_inference_steps` must be {len(trained)}, the number that this student was trained for, "
                f"but is {count}."
            )
        if trained:
            timesteps = torch.as_tensor(trained)
        else:
            n = self.config.num_train_timesteps
            if not 1 <= count <= n:
                raise ValueError(f"`num_inference_steps` must be between 1 and {n}, but is {count}.")
            index = np.round(np.arange(n, 0, -n / count)[:count]).astype(np.int64) - 1
            timesteps = self.schedule.grid(torch.from_numpy(index))
        self.num_inference_steps = count
        self.timesteps = timesteps.to(device)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """For pipelines that say where they start; every step finds its place by its timestep."""

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """What the network sees of `sample`: scaled for EDM teachers, unchanged for all others."""
        if not isinstance(self.schedule, EDMSchedule):
            return sample
        if self.config.parameterization == "trajectory":
            timestep = self.config.start_timestep
        work = sample.to(torch.promote_types(sample.dtype, torch.float32))
        scaled = scale_input(self.schedule, work, self._as_batch(timestep, sample))
        return scaled.to(sample.dtype)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> OneStepSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """
        Predict `x0`, and add fresh noise of the next timestep if there is one.

        Args:
            model_output (`torch.Tensor`): What the network returned.
            timestep (`float` or `torch.Tensor`): The timestep it was called at.
            sample (`torch.Tensor`): The noisy sample, before `scale_model_input`.
            generator (`torch.Generator` or list, *optional*): Of the noise between steps.
            return_dict (`bool`, defaults to `True`): Whether to return a [`OneStepSchedulerOutput`].
        """
        t = self._as_batch(timestep, sample)
        if self.config.parameterization == "trajectory":
            start = self._as_batch(self.config.start_timestep, sample)
            head = self.config.prediction_type if self.config.trajectory_head == "teacher" else "sample"
            x0 = end_of_trajectory(self.schedule, head, sample, start, t, model_output)
        else:
            x0 = predict_x0(self.schedule, self.config.prediction_type, sample, t, model_output)
        prev_sample = x0
        position = (self.timesteps.to(t.device) - t[0]).abs().argmin().item()
        if position + 1 < len(self.timesteps):
            generator = self.generator if generator is None else generator
            noise = randn_tensor(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
            prev_sample = self.add_noise(x0, noise, self._as_batch(self.timesteps[position + 1], sample))
        prev_sample, x0 = prev_sample.to(sample.dtype), x0.to(sample.dtype)
        if not return_dict:
            return prev_sample, x0
        return OneStepSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x0)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """`alpha * original_samples + sigma * noise` at `timesteps` `(B,)`."""
        alpha, sigma = self.schedule.alpha_sigma(timesteps.double().reshape(-1))
        shape = (-1, *[1] * (original_samples.ndim - 1))
        alpha, sigma = (v.to(original_samples).reshape(shape) for v in (alpha, sigma))
        return alpha * original_samples + sigma * noise

    def scale_noise(self, sample: torch.Tensor, timestep: float | torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """`add_noise` as the image-to-image pipelines of flow models call it."""
        return self.add_noise(sample, noise, self._as_batch(timestep, sample))

    def _as_batch(self, timestep: float | torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(sample.shape[0])

    def __len__(self) -> int:
        return self.config.num_train_timesteps


def student_scheduler(
    teacher_scheduler: SchedulerMixin,
    prediction_type: str,
    student_timesteps: list[float],
    init_noise_sigma: float,
    **trajectory: Any,
) -> SchedulerMixin:
    """The scheduler that a student is saved with: a stock `LCMScheduler` where that states the rule, so that plain
    diffusers samples the student, else a `OneStepScheduler`.

    An LCM scheduler truncated after timestep `T0` starts there with unit variance and returns `x0`; with as many
    original steps as the student has it spaces them evenly and refuses more.

    Args:
        teacher_scheduler (`SchedulerMixin`): whose noise schedule the student keeps.
        prediction_type (`str`): of the student's network.
        student_timesteps (`list`): noisiest first.
        init_noise_sigma (`float`): scale of the starting noise.
        trajectory: `parameterization`, `start_timestep` and `trajectory_head` of a trajectory student.
    """
    schedule = NoiseSchedule.from_scheduler(teacher_scheduler)
    config: dict[str, Any] = {"num_train_timesteps": schedule.num_train_timesteps}
    if isinstance(schedule, VPSchedule):
        given = teacher_scheduler.config
        config |= {k: given[k] for k in ("beta_start", "beta_end", "beta_schedule", "trained_betas") if k in given}
        restated = DDPMScheduler(**config).alphas_cumprod.double()
        if not torch.equal(restated, schedule.alphas_cumprod):
            # rescaled or otherwise changed after the betas: state the betas that give the same products
            products = schedule.alphas_cumprod
            config["trained_betas"] = (1 - products / torch.cat([products.new_ones(1), products[:-1]])).tolist()
        if not trajectory and (stock := _as_lcm(config, prediction_type, student_timesteps, init_noise_sigma)):
            return stock
    elif isinstance(schedule, EDMSchedule):
        config |= {"schedule_type": "edm", "sigma_data": schedule.sigma_data}
        config |= {"sigma_min": schedule.sigma_min, "sigma_max": schedule.sigma_max}
        if schedule.preconditioning != "edm":
            config["preconditioning"] = schedule.preconditioning
    else:
        config |= {"schedule_type": "flow"}
    return OneStepScheduler(
        **config,
        prediction_type=prediction_type,
        student_timesteps=list(student_timesteps),
        init_noise_sigma=init_noise_sigma,
        **trajectory,
    )


def _as_lcm(
    config: dict, prediction_type: str, student_timesteps: list, init_noise_sigma: float
) -> LCMScheduler | None:
    if init_noise_sigma != 1.0 or prediction_type not in ("epsilon", "sample", "v_prediction"):
        return None
    betas = DDPMScheduler(**config).betas[: int(student_timesteps[0]) + 1].tolist()
    scheduler = LCMScheduler(
        num_train_timesteps=len(betas),
        trained_betas=betas,
        prediction_type=prediction_type,
        original_inference_steps=len(student_timesteps),
        clip_sample=False,
        steps_offset=1,  # not used by LCM; Stable Diffusion's pipeline warns of any other
    )
    scheduler.set_timesteps(len(student_timesteps))
    return scheduler if scheduler.timesteps.tolist() == list(student_timesteps) else None
