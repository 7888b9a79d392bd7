"""D-ODE solvers: diffusers' own ODE solvers with one fitted number per network call.

Kim, Tang and Yu, "Distilling ODE Solvers of Diffusion Models into Smaller Steps", CVPR 2024, arXiv:2309.16421. The
numbers are fitted by `fit_d_ode` (`methods/dode.py`) and live in the scheduler's config.
"""

import functools
import inspect
import math
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils import logging

logger = logging.get_logger(__name__)

Level = tuple[float, float]  # alpha and sigma of a node, in the coordinates of the scheduler's samples

# config keys besides the grid that change what a step does
_SOLVER_KEYS = (
    "prediction_type",
    "solver_order",
    "algorithm_type",
    "solver_type",
    "lower_order_final",
    "euler_at_final",
    "pndm_type",
    "clip_sample",
    "clip_sample_range",
    "thresholding",
    "dynamic_thresholding_ratio",
    "sample_max_value",
)
_STOCHASTIC = ("eta", "s_churn")


def first_order(source: Level, target: Level, space: str) -> tuple[float, float]:
    """`(a, w)` of the step `x_t = a * x_s + w * m` that is exact for a constant output `m`.

    Noise (`space` "epsilon"): `a = alpha_t / alpha_s`, `w = sigma_t - a * sigma_s`. Data ("sample"):
    `a = sigma_t / sigma_s`, `w = alpha_t - a * alpha_s`. Song et al. 2021 (DDIM), Eq. 12, solved for either.
    """
    (alpha_s, sigma_s), (alpha_t, sigma_t) = source, target
    if space == "epsilon":
        a = alpha_t / alpha_s
        return a, sigma_t - a * sigma_s
    a = sigma_t / sigma_s
    return a, alpha_t - a * alpha_s


def ratio(level: Level) -> float:
    """`sigma / alpha`, at most 1e6 where there is no signal."""
    alpha, sigma = level
    return sigma / max(alpha, 1e-6 * sigma)


def _settings(base: type, extra: dict[str, Any]) -> inspect.Signature:
    """The base scheduler's constructor arguments, then ours."""
    ours = extra | {"dode_tables": None, "dode_space": None, "dode_first_step": "none", "dode_on_unfitted": "error"}
    parameters = list(inspect.signature(base.__init__).parameters.values())
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters += [inspect.Parameter(name, keyword, default=default) for name, default in ours.items()]
    return inspect.Signature(parameters)


class DODESchedulerMixin:
    """
    A distilled solver: `x_next = base step + lambda_i * w_i * (m_i - m_{i-1})` (Kim et al. 2024).

    `m_i` is the denoising output that the base solver integrates at call `i`, in the space of noise or of data, and
    `w_i` its coefficient in the base's first-order step. Multistep solvers count as one first-order step with an
    *effective* output `m_i`, read off the base's own result, so nothing of the base class changes. Without a fitted
    table the scheduler is its base class.

    Besides the arguments of the base class:

    Args:
        dode_tables (`dict`, *optional*): Fitted tables by number of steps, as `fit_d_ode` makes them.
        dode_space (`str`, *optional*): `"epsilon"` or `"sample"`, by default that of the base solver.
        dode_first_step (`str`, defaults to `"none"`): `"noise"` takes the starting noise as the output before the
            first one (epsilon space only), as the authors' code does.
        dode_on_unfitted (`str`, defaults to `"error"`): On a number of steps that was not fitted: `"error"`, or
            `"base"` for a warning and the base solver.

    Not for stochastic steps (`eta`, `s_churn`, `sde-*`), nor for several `step` calls per timestep on different
    tensors.
    """

    _space = "sample"  # of `m`, unless the config says otherwise
    _free_space = True  # does the solver leave a choice?
    _extra_settings: dict[str, Any] = {}
    _stock_class: type

    # state of a run
    _dode_lambdas: list[list[float]] | None = None
    _dode_previous: tuple[int, torch.Tensor] | None = None
    _dode_nodes: list[Level] | None = None
    _dode_begin = 0
    _dode_refused = False
    _dode_warned = False

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        bases = (c for c in cls.__mro__ if issubclass(c, SchedulerMixin) and not issubclass(c, DODESchedulerMixin))
        base = next(bases, None)
        if base is None:  # a step between this mixin and the schedulers
            return
        cls._stock_class = next(c for c in base.__mro__ if c.__module__.startswith("diffusers."))
        settings = _settings(base, cls._extra_settings)

        def __init__(self, *args, **kwargs):
            given = settings.bind(self, *args, **kwargs)
            ours = {name: p.default for name, p in settings.parameters.items() if p.kind is p.KEYWORD_ONLY}
            of_base = {k: v for k, v in given.arguments.items() if k not in ours and k != "self"}
            base.__init__(self, **of_base)
            ours |= {k: v for k, v in given.arguments.items() if k in ours}
            self._check_settings(ours)
            self.register_to_config(**ours)

        if DISTILLED_SCHEDULERS.setdefault(cls._stock_class, cls) is not cls:
            return  # somebody's subclass of one of ours
        __init__.__signature__ = settings
        cls.__init__ = __init__
        # pipelines look for `eta`, `generator`, `timesteps` and `sigmas` in these signatures
        for name in ("set_timesteps", "step"):
            ours = getattr(DODESchedulerMixin, name)
            setattr(cls, name, functools.wraps(getattr(base, name))(_forwarding(ours)))

    @classmethod
    def _get_compatibles(cls) -> list[type]:
        # the list that an EDM scheduler inherits is empty
        stock = list(dict.fromkeys([cls._stock_class, *super()._get_compatibles()]))
        return stock + [ours for base, ours in DISTILLED_SCHEDULERS.items() if base in stock]

    def _check_settings(self, ours: dict[str, Any]) -> None:
        for key, allowed in {
            "dode_space": (None, "epsilon", "sample") if self._free_space else (None,),
            "dode_first_step": ("none", "noise"),
            "dode_on_unfitted": ("error", "base"),
        }.items():
            if ours[key] not in allowed:
                raise ValueError(f"`{key}` must be one of {allowed}, but is {ours[key]!r}.")
        if ours["dode_first_step"] == "noise" and (ours["dode_space"] or self.own_space) != "epsilon":
            raise ValueError("`dode_first_step` must be 'none' in sample space, but is 'noise'.")
        for steps, table in (ours["dode_tables"] or {}).items():
            rows = table.get("lambdas", [math.nan]) if isinstance(table, dict) else [math.nan]
            numbers = [v for row in rows for v in (row if isinstance(row, list) else [row])]
            finite = all(isinstance(v, (int, float)) and math.isfinite(v) for v in numbers)
            if not (isinstance(steps, str) and steps.isdigit() and finite):
                raise ValueError(
                    "`dode_tables` must map numbers of steps, as strings, to tables of finite `lambdas`, but has "
                    f"{steps!r}: {table}."
                )

    # tables

    @property
    def fitted_steps(self) -> list[int]:
        """The numbers of steps that there are tables for."""
        return sorted(int(steps) for steps in self.config.get("dode_tables") or {})

    def setting(self, key: str) -> Any:
        """The value of a config key that this class's constructor knows; None of one that only lies in the config, as
        those of another class do after `from_config`."""
        return self.config.get(key) if key in inspect.signature(type(self).__init__).parameters else None

    @property
    def own_space(self) -> str:
        """The space that the base solver works in."""
        return "epsilon" if self.setting("algorithm_type") == "dpmsolver" else self._space

    @property
    def dode_space(self) -> str:
        """Space of the denoising output, `"epsilon"` or `"sample"`."""
        return self.config.get("dode_space") or self.own_space

    def add_table(self, num_inference_steps: int, table: dict[str, Any]) -> None:
        """Keep the fitted `table` of a number of steps in the config; it replaces an older one."""
        tables = dict(self.config.get("dode_tables") or {}) | {str(num_inference_steps): table}
        self._check_settings({**self.config, "dode_tables": tables})
        self.register_to_config(dode_tables=tables)

    def fingerprint(self) -> dict[str, Any]:
        """What a table is valid for: base class, space, solver settings and the present grid."""
        own = inspect.signature(type(self).__init__).parameters
        return {
            "base_class": self._stock_class.__name__,
            "space": self.dode_space,
            "first_step": self.config.get("dode_first_step", "none"),
            "solver": {key: self.config[key] for key in _SOLVER_KEYS if key in own},
            "timesteps": [float(t) for t in self.timesteps],
            "sigmas": [ratio(level) for level in self.nodes],
        }

    def _active_lambdas(self) -> list[list[float]] | None:
        tables = self.config.get("dode_tables")
        if not tables:
            return None
        steps = self.num_inference_steps or len(self.timesteps)
        table = tables.get(str(steps))
        if table is None:
            message = f"`num_inference_steps` must be one of the fitted numbers {self.fitted_steps}, but is {steps}."
            if self.config.get("dode_on_unfitted") != "base":
                raise ValueError(message)
            if not self._dode_warned:
                logger.warning(f"{message} Sampling with the base solver, {self._stock_class.__name__}.")
                self._dode_warned = True
            return None
        for key, here in self.fingerprint().items():
            fitted = table.get(key)
            if not _same(here, fitted):
                raise ValueError(
                    f"The table of {steps} steps was fitted with `{key}` {fitted}, but this {type(self).__name__} has "
                    f"{here}. Restore the settings of the fit, fit anew, or drop the tables with `dode_tables=None`."
                )
        lambdas = [row if isinstance(row, list) else [row] for row in table["lambdas"]]
        if len(lambdas) != len(self.timesteps):
            raise ValueError(
                f"`lambdas` of {steps} steps must be {len(self.timesteps)}, one per call, but are {len(lambdas)}."
            )
        return lambdas if any(any(row) for row in lambdas) else None

    # the grid

    @property
    def nodes(self) -> list[Level]:
        """`(alpha, sigma)` at the `N + 1` nodes of the grid, noisiest first."""
        if self._dode_nodes is None:
            self._dode_nodes = self._levels()
        return self._dode_nodes

    def _levels(self) -> list[Level]:
        return [(1.0, float(sigma)) for sigma in self.sigmas]

    @property
    def node_timesteps(self) -> torch.Tensor:
        """The timestep of every node but the last, `(N,)`."""
        return self.timesteps

    def call_nodes(self, call: int) -> tuple[int, int]:
        """The nodes between which network call `call` of a whole run moves the sample."""
        return call, call + 1

    def is_fitted(self, call: int) -> bool:
        """Is there a number to fit for a call? Not where the next call replaces its state."""
        return True

    def check_grid(self) -> None:
        """Raise a `ValueError` if this solver's own steps do not meet its timesteps, or if it cannot be distilled."""
        algorithm = self.setting("algorithm_type")
        if str(algorithm).startswith("sde"):
            raise ValueError(f"`algorithm_type` must be deterministic to be distilled, but is {algorithm!r}.")
        if self.dode_space == "epsilon" and self.nodes[0][0] == 0:
            raise ValueError(
                "`dode_space` must be 'sample' where the first timestep holds no signal (`rescale_betas_zero_snr`), "
                "but is 'epsilon'."
            )

    # a run

    def set_timesteps(self, *args, **kwargs) -> None:
        super().set_timesteps(*args, **kwargs)
        self._dode_previous = self._dode_nodes = self._dode_lambdas = None
        self._dode_begin = 0
        self._dode_refused = True
        self._dode_lambdas = self._active_lambdas()
        self._dode_refused = False

    def step(self, *args, **kwargs) -> SchedulerOutput | tuple:
        if self._dode_refused:
            raise ValueError("`set_timesteps` must succeed before `step`, but it refused its number of steps.")
        if self._dode_lambdas is None:
            return super().step(*args, **kwargs)
        given = inspect.signature(self._stock_class.step).bind(self, *args, **kwargs).arguments
        model_output, timestep, sample = (given.pop(name) for name in ("model_output", "timestep", "sample"))
        del given["self"]
        return_dict = given.pop("return_dict", True)
        for name in _STOCHASTIC:
            if given.get(name):
                raise ValueError(f"`{name}` must be 0.0 with a distilled solver, but is {given[name]}.")
        dtype = sample.dtype
        work = torch.promote_types(dtype, torch.float32)
        call, output, directions = self.advance(model_output.to(work), timestep, sample.to(work), **given)
        for weight, direction in zip(self._dode_lambdas[call], reversed(directions), strict=False):
            if weight and direction is not None:
                output.prev_sample = output.prev_sample + weight * direction
        for name, value in output.items():
            if isinstance(value, torch.Tensor):
                output[name] = value.to(dtype)
        return output if return_dict else output.to_tuple()

    def advance(
        self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **options
    ) -> tuple[int, SchedulerOutput, tuple[torch.Tensor, torch.Tensor | None]]:
        """One step of the base solver, and where it may be corrected to.

        Returns:
            The number of the call, the base's output, and the directions `w_i * m_i` and `w_i * (m_i - m_{i-1})`, the
            second None where there is no previous output.
        """
        call = self._call(timestep)
        before = self._before(call, timestep, sample)
        output = super().step(model_output, timestep, sample, **options)
        m, w = self._output_and_weight(before, output)
        if m is None:
            self._dode_previous = None
            return call, output, (torch.zeros_like(sample), None)
        previous = self._dode_previous
        if call == 0 and self.config.get("dode_first_step") == "noise":
            previous = (self._previous_call(call), sample / self.nodes[0][1])
        difference = None
        if previous is not None and previous[0] == self._previous_call(call) and previous[1].shape == m.shape:
            difference = w * (m - previous[1])
        if self._keeps(call):
            self._dode_previous = (call, m)
        return call, output, (w * m, difference)

    def _call(self, timestep: Any) -> int:
        if self.step_index is None:
            self._init_step_index(timestep)
        return self.step_index

    def _previous_call(self, call: int) -> int:
        return call - 1

    def _keeps(self, call: int) -> bool:
        return True

    def _before(self, call: int, timestep: Any, sample: torch.Tensor) -> Any:
        """What must be known before the base moves on: `a`, `w` and the sample that its step starts from."""
        source, target = self.call_nodes(call)
        return *first_order(self.nodes[source], self.nodes[target], self.dode_space), sample

    def _output_and_weight(self, before: Any, output: SchedulerOutput) -> tuple[torch.Tensor | None, float]:
        """The effective output `m = (x_next - a * x) / w` and `w`; no output where the base does not move."""
        a, w, origin = before
        if w == 0:
            return None, w
        return (output.prev_sample - a * origin) / w, w


DISTILLED_SCHEDULERS: dict[type, type[DODESchedulerMixin]] = {}


def _forwarding(method):
    """A function of its own per class, so that each can carry the signature of its base."""
    return lambda self, *args, **kwargs: method(self, *args, **kwargs)


def _same(here: Any, fitted: Any) -> bool:
    if isinstance(here, list):
        close = functools.partial(math.isclose, rel_tol=1e-5, abs_tol=1e-6)
        return fitted is not None and len(here) == len(fitted) and all(map(close, here, fitted))
    return here == fitted


class _DiscreteTime(DODESchedulerMixin):
    """Solvers that step from one integer timestep to another, `num_train_timesteps // N` below."""

    _space = "epsilon"
    _own_steps = False  # does the solver step to the next timestep, whatever the stride?

    def _alpha_sigma(self, t: int) -> Level:
        product = float(self.alphas_cumprod[t]) if t >= 0 else float(self.final_alpha_cumprod)
        return math.sqrt(product), math.sqrt(1 - product)

    def _grid(self) -> list[int]:
        return [int(t) for t in self.node_timesteps]

    def _stride(self) -> int:
        return self.config.num_train_timesteps // self.num_inference_steps

    def _levels(self) -> list[Level]:
        grid = self._grid()
        return [self._alpha_sigma(t) for t in [*grid, grid[-1] - self._stride()]]

    def check_grid(self) -> None:
        super().check_grid()
        grid = self._grid()
        met = all(s - self._stride() == t for s, t in zip(grid, grid[1:], strict=False))
        if self.config.timestep_spacing != "trailing" or not (met or self._own_steps):
            raise ValueError(
                f"`num_inference_steps` must divide {self.config.num_train_timesteps} and `timestep_spacing` must be "
                f"'trailing' for {type(self).__name__}, whose steps would not meet its timesteps {grid} otherwise, "
                f"but they are {self.num_inference_steps} and {self.config.timestep_spacing!r}. "
                "`DistilledDPMSolverMultistepScheduler(solver_order=1)` is DDIM for any number of steps."
            )

    def _call(self, timestep: Any) -> int:
        grid = [int(t) for t in self.timesteps]
        if int(timestep) not in grid:
            raise ValueError(f"`timestep` must be one of {grid}, but is {int(timestep)}.")
        return grid.index(int(timestep))


class DistilledDDIMScheduler(_DiscreteTime, DDIMScheduler):
    """
    DDIM with one fitted number per step, D-DDIM of Kim et al. 2024. Arguments: [`DDIMScheduler`] and
    [`DODESchedulerMixin`].

    Example:

    ```python
    >>> import torch
    >>> from diffusers_onestep import DistilledDDIMScheduler, Teacher, fit_d_ode
    >>> teacher = Teacher.from_pretrained("fashion32")
    >>> scheduler = DistilledDDIMScheduler.from_config(teacher.scheduler.config)
    >>> noise, cond = torch.randn(100, *teacher.sample_shape), teacher.encode(torch.arange(100) % 10)
    >>> report = fit_d_ode(scheduler, teacher.denoiser.call_network, 5, noise, cond=cond)
    >>> scheduler.fitted_steps
    [5]
    ```
    """


class _PNDM(PNDMScheduler):
    """diffusers' PNDM, and as `pndm_type` "ipndm" the multistep solver of Zhang & Chen 2022 (iPNDM), which starts with
    lower orders instead of a second evaluation. (diffusers' own `IPNDMScheduler` has a schedule of its own.)"""

    @functools.wraps(PNDMScheduler.set_timesteps)
    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None):
        super().set_timesteps(num_inference_steps, device)
        if self.config.get("pndm_type") == "ipndm":
            self.prk_timesteps, self.plms_timesteps = self._timesteps[:0], self._timesteps[::-1].copy()
            self.timesteps = torch.from_numpy(self.plms_timesteps).to(device)

    @functools.wraps(PNDMScheduler.step)
    def step(self, model_output: torch.Tensor, timestep: int, sample: torch.Tensor, return_dict: bool = True):
        if self.config.get("pndm_type") != "ipndm":
            return super().step(model_output, timestep, sample, return_dict)
        call = self._call(timestep)
        alpha, sigma = self.nodes[call]
        a, w = first_order(self.nodes[call], self.nodes[call + 1], "epsilon")
        eps = {
            "epsilon": lambda: model_output,
            "v_prediction": lambda: alpha * model_output + sigma * sample,
            "sample": lambda: (sample - alpha * model_output) / sigma,
        }[self.config.prediction_type]()
        self.ets = [*self.ets[-3:], eps]
        order = len(self.ets)
        combined = sum(c * e for c, e in zip(_ADAMS_BASHFORTH[order], reversed(self.ets), strict=True))
        prev_sample = a * sample + w * combined
        return SchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)


# coefficients of the newest output first (Zhang & Chen 2022, Eqs. 20 to 23)
_ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


class DistilledPNDMScheduler(_DiscreteTime, _PNDM):
    """
    PLMS or iPNDM with one fitted number per call, D-PNDM of Kim et al. 2024.

    PLMS (diffusers' PNDM with `skip_prk_steps=True`) takes one evaluation more than its steps. iPNDM takes as many,
    and any number of trailing steps.

    Args:
        pndm_type (`str`, defaults to `"plms"`): `"plms"` or `"ipndm"`.
        kwargs: As in [`PNDMScheduler`] and [`DODESchedulerMixin`].
    """

    _extra_settings = {"pndm_type": "plms"}

    def _check_settings(self, ours: dict[str, Any]) -> None:
        super()._check_settings(ours)
        if ours["pndm_type"] not in ("plms", "ipndm"):
            raise ValueError(f"`pndm_type` must be 'plms' or 'ipndm', but is {ours['pndm_type']!r}.")

    @property
    def _own_steps(self) -> bool:
        return self.config.get("pndm_type") == "ipndm"

    @property
    def node_timesteps(self) -> torch.Tensor:
        return torch.from_numpy(self._timesteps[::-1].copy()).to(self.timesteps.device)

    def _levels(self) -> list[Level]:
        grid = self._grid()
        last = grid[-1] - self._stride()
        return [self._alpha_sigma(t) for t in [*grid, -1 if self._own_steps else last]]

    def check_grid(self) -> None:
        super().check_grid()
        if not (self._own_steps or self.config.skip_prk_steps):
            raise ValueError("`skip_prk_steps` must be True to distil PLMS, but is False.")

    def call_nodes(self, call: int) -> tuple[int, int]:
        if self._own_steps:
            return call, call + 1
        return (0, 1) if call < 2 else (call - 1, call)  # the first step is taken twice

    def _call(self, timestep: Any) -> int:
        if self._own_steps:
            return super()._call(timestep)
        first = super()._call(timestep)
        if self.counter == 0:
            self._dode_begin = first
        if self.counter < 2:
            return self._dode_begin + self.counter
        # the second of the two calls at the first step's end, if it is that one
        return max(i for i, t in enumerate(self.timesteps.tolist()) if t == int(timestep))

    def _before(self, call: int, timestep: Any, sample: torch.Tensor) -> Any:
        if self._own_steps or self._dode_begin == 0:
            a, w, _ = super()._before(call, timestep, sample)
        else:  # a partial start, which takes its own first step twice: these calls are not the table's
            stride = self._stride()
            source = int(timestep) + (stride if self.counter == 1 else 0)
            levels = (self._alpha_sigma(t) for t in (source, source - stride))
            a, w = first_order(*levels, self.dode_space)
            if self.counter < 2:
                self._dode_previous = None
        return a, w, self.cur_sample if self.counter == 1 else sample


class _SigmaRatio(DODESchedulerMixin):
    """Solvers on `sigma / alpha` whose samples are variance preserving (or flow)."""

    def _levels(self) -> list[Level]:
        return [tuple(map(float, self._sigma_to_alpha_sigma_t(sigma.double()))) for sigma in self.sigmas]


class DistilledDPMSolverMultistepScheduler(_SigmaRatio, DPMSolverMultistepScheduler):
    """
    DPM-Solver++ (orders 1 to 3) with one fitted number per step. Arguments: [`DPMSolverMultistepScheduler`] and
    [`DODESchedulerMixin`].

    The authors' code has no D-DPM-Solver++; the rule is the same.
    """


class DistilledDEISMultistepScheduler(_SigmaRatio, DEISMultistepScheduler):
    """
    Log-rho DEIS (orders 1 to 3) with one fitted number per step, D-DEIS(rho). Arguments: [`DEISMultistepScheduler`]
    and [`DODESchedulerMixin`].
    """

    _space = "epsilon"


class DistilledDPMSolverSinglestepScheduler(_SigmaRatio, DPMSolverSinglestepScheduler):
    """
    Singlestep DPM-Solver (orders 1 to 3) with one fitted number per call. Arguments: [`DPMSolverSinglestepScheduler`]
    and [`DODESchedulerMixin`].

    Within a block of a higher order `w_i` is the coefficient of the newest output in that block's update.
    """

    _free_space = False

    def call_nodes(self, call: int) -> tuple[int, int]:
        return call + 1 - self.order_list[call], call + 1

    def _before(self, call: int, timestep: Any, sample: torch.Tensor) -> float:
        known = sum(output is not None for output in self.model_outputs)
        order = min(self.order_list[call], known + 1)
        # the update is linear in the outputs: its answer to a unit of the newest one is that one's coefficient
        zero, one = sample.new_tensor(0.0), sample.new_tensor(1.0)
        return float(self.singlestep_dpm_solver_update([zero, zero, one], sample=zero, order=order))

    def _output_and_weight(self, before: float, output: SchedulerOutput):
        return self.model_outputs[-1], before


class DistilledEulerDiscreteScheduler(DODESchedulerMixin, EulerDiscreteScheduler):
    """
    Euler's method on `sigma / alpha` with one fitted number per step. Arguments: [`EulerDiscreteScheduler`] and
    [`DODESchedulerMixin`].
    """


class DistilledEDMEulerScheduler(DODESchedulerMixin, EDMEulerScheduler):
    """
    Euler's method for EDM networks with one fitted number per step, D-DDIM on EDM of Kim et al. 2024. Arguments:
    [`EDMEulerScheduler`] and [`DODESchedulerMixin`].
    """


class DistilledEDMDPMSolverMultistepScheduler(DODESchedulerMixin, EDMDPMSolverMultistepScheduler):
    """
    DPM-Solver++ for EDM networks with one fitted number per step. Arguments: [`EDMDPMSolverMultistepScheduler`] and
    [`DODESchedulerMixin`].
    """


class DistilledHeunDiscreteScheduler(DODESchedulerMixin, HeunDiscreteScheduler):
    """
    Experimental: Heun's method with a number for each of its `2 N - 1` calls. Arguments: [`HeunDiscreteScheduler`] and
    [`DODESchedulerMixin`].

    A corrector looks back at its own predictor, the last call, which is Euler's, at the last predictor. (The authors'
    difference compares two outputs at nearly one place, which is ill conditioned.) All other predictors keep 0: their
    states are not the solver's, and moving them onto the teacher's would spoil Heun's order.
    """

    _free_space = False

    def _levels(self) -> list[Level]:
        return [(1.0, float(sigma)) for sigma in [self.sigmas[0], *self.sigmas[1::2]]]

    @property
    def node_timesteps(self) -> torch.Tensor:
        return torch.cat([self.timesteps[:1], self.timesteps[1::2]])

    def call_nodes(self, call: int) -> tuple[int, int]:
        return call // 2, call // 2 + 1

    def is_fitted(self, call: int) -> bool:
        return call % 2 == 1 or call == len(self.timesteps) - 1

    def _previous_call(self, call: int) -> int:
        return call - 1 if call % 2 else call - 2

    def _keeps(self, call: int) -> bool:
        return call % 2 == 0

    def _before(self, call: int, timestep: Any, sample: torch.Tensor) -> float:
        (_, sigma), (_, sigma_next) = (self.nodes[node] for node in self.call_nodes(call))
        return (sigma - sigma_next) / (2 * sigma_next) if call % 2 else 1 - sigma_next / sigma

    def _output_and_weight(self, before: float, output: SchedulerOutput):
        return output.pred_original_sample, before


def distilled_copy(scheduler: SchedulerMixin) -> DODESchedulerMixin:
    """A distilled scheduler without tables on the config of `scheduler`, stock or ours.

    Raises:
        ValueError: if its class has no distilled version.
    """
    stock = next((c for c in type(scheduler).__mro__ if c in DISTILLED_SCHEDULERS), None)
    if stock is None:
        allowed = sorted(c.__name__ for c in DISTILLED_SCHEDULERS)
        raise ValueError(f"`scheduler` must be one of {allowed}, but is {type(scheduler).__name__}.")
    return DISTILLED_SCHEDULERS[stock].from_config(scheduler.config, dode_tables=None)
