"""D-ODE (Kim, Tang & Yu, CVPR 2024, arXiv:2309.16421): the numbers of a distilled solver, fitted in closed form."""

import copy
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging
from tqdm.auto import tqdm

from ..denoiser import Cond
from ..reports import stated_root
from ..sampling import check_deterministic
from ..schedulers.scheduling_d_ode import (
    DistilledDPMSolverMultistepScheduler,
    DistilledEDMDPMSolverMultistepScheduler,
    DODESchedulerMixin,
    distilled_copy,
    ratio,
)
from .base import Paper

logger = logging.get_logger(__name__)

paper = Paper(
    title="Distilling ODE Solvers of Diffusion Models into Smaller Steps",
    arxiv_id="2309.16421",
    citation="Kim, Tang, Yu, CVPR 2024",
)

Predict = Callable[..., torch.Tensor]


@dataclass
class DODEReport:
    """What a fit found, by network call where there are lists.

    Attributes:
        lambdas: the fitted numbers, one list of `directions` numbers per call: of `w (m_i - m_{i-1})`, and with two
            directions of `w m_i`.
        stderr: their sandwich standard errors.
        cosine: `cos` between the fitted correction and the error of the base step.
        heldout_mse, heldout_mse_base: mean squared distance of the final samples to the teacher's, on held-out noise.
        heldout_stderr, heldout_stderr_base: their standard errors; None for one sample.
        accepted: whether the first is not above the second; only then is the table registered.
    """

    num_inference_steps: int
    lambdas: list[list[float]]
    stderr: list[list[float]]
    cosine: list[float]
    heldout_mse: float
    heldout_mse_base: float
    heldout_stderr: float | None
    heldout_stderr_base: float | None
    accepted: bool
    network_evaluations: int
    seconds: float
    table: dict[str, Any]

    def __str__(self):
        lines = [f"{self.num_inference_steps} steps ({self.network_evaluations:,} evaluations, {self.seconds:.1f} s)"]
        for call, (lambdas, stderr, cosine) in enumerate(zip(self.lambdas, self.stderr, self.cosine, strict=True)):
            fitted = ", ".join(f"{v:+.4f} ± {e:.4f}" for v, e in zip(lambdas, stderr, strict=True))
            lines.append(f"  call {call}: lambda {fitted}, cos {cosine:.3f}")
        verdict = "accepted" if self.accepted else "REFUSED: the base solver is nearer to the teacher"
        rmse = stated_root(self.heldout_mse, self.heldout_stderr)
        rmse_base = stated_root(self.heldout_mse_base, self.heldout_stderr_base)
        lines.append(f"  held-out RMSE to the teacher {rmse}, base solver {rmse_base}: {verdict}")
        return "\n".join(lines)


def solve(gram: torch.Tensor, projection: torch.Tensor, ridge: float = 0.0) -> torch.Tensor:
    """`lambda* = argmin |r - D lambda|**2 = (D'D)^-1 D'r`, in float64.

    Args:
        gram (`torch.Tensor`): `D'D`, `(k, k)`.
        projection (`torch.Tensor`): `D'r`, `(k,)`.
        ridge (`float`, *optional*): relative to the diagonal of `gram`.

    Source: Kim et al. 2024, whose code solves the same least squares for one direction.
    """
    return torch.linalg.solve(gram + ridge * torch.diag(gram.diagonal()), projection)


@torch.no_grad()
def fit_d_ode(
    scheduler: DODESchedulerMixin,
    predict: Predict,
    num_inference_steps: int,
    noise: torch.Tensor,
    *,
    scale: int = 10,
    teacher_scheduler: SchedulerMixin | None = None,
    holdout: torch.Tensor | None = None,
    cond: Cond | None = None,
    holdout_cond: Cond | None = None,
    batch_size: int | None = None,
    directions: int = 1,
    ridge: float = 0.0,
    notes: Mapping[str, Any] | None = None,
    progress_bar: bool = True,
) -> DODEReport:
    """Fit the numbers of a distilled solver for one number of steps, and register them in `scheduler`'s config.

    Call after call, on the student's own states: with `r` the teacher's state at the next node minus the base
    step's, and `d = w (m_i - m_{i-1})`, `lambda_i = <d, r> / |d|**2` over the whole batch; then the step is taken. No
    gradients, `B (M + N)` evaluations for a teacher of `M` steps, and those of the held-out batch.

    A number is set to zero where its direction is below a thousandth of `w m_i`, and where it is smaller than twice
    its standard error, which needs more than one sample.

    In a run of several processes each gives its own share of the noises; the sums are taken over all of them.

    Args:
        scheduler (`DODESchedulerMixin`): one of the distilled schedulers.
        predict (`Callable`): `predict(scaled_sample, t)`, or with `cond` `predict(scaled_sample, t, cond)`: the final
            model output, guidance included.
        num_inference_steps (`int`): steps to fit.
        noise (`torch.Tensor`): unit-variance noises `(B, ...)`.
        scale (`int`, *optional*, defaults to 10): steps of the teacher per step of the student.
        teacher_scheduler (`SchedulerMixin`, *optional*): the teacher's solver on its own grid. By default
            DPM-Solver++(2M) on the student's kind of grid.
        holdout (`torch.Tensor`, *optional*): noises of the acceptance gate; by default as many fresh ones.
        cond (`dict` of tensors, *optional*): conditions of `noise`, `(B, ...)`.
        holdout_cond (`dict` of tensors, *optional*): those of `holdout`; by default `cond`, if there are as many.
        batch_size (`int`, *optional*): evaluate in micro-batches of so many; the numbers do not depend on it.
        directions (`int`, *optional*, defaults to 1): with 2, an extension that is not in the paper, `w m_i` is
            fitted beside `w (m_i - m_{i-1})` (in the manner of IIA, arXiv:2304.11328).
        ridge (`float`, *optional*, defaults to 0.0): relative ridge of the least squares.
        notes (`dict`, *optional*): what else the table should remember, such as the guidance scale.
        progress_bar (`bool`, *optional*, defaults to `True`): whether to show one.

    Returns:
        [`DODEReport`]; its table is registered if it is accepted.

    Raises:
        ValueError: if the teacher's grid does not contain the student's, naming the remedy.
        FloatingPointError: if an evaluation is not finite.
    """
    if not isinstance(scheduler, DODESchedulerMixin):
        raise ValueError(f"`scheduler` must be a distilled scheduler, but is {type(scheduler).__name__}.")
    if directions not in (1, 2):
        raise ValueError(f"`directions` must be 1 or 2, but is {directions}.")
    if num_inference_steps < 1 or scale < 1:
        raise ValueError(
            f"`num_inference_steps` and `scale` must be at least 1, but are {num_inference_steps} and {scale}."
        )
    if len(noise) < 1 or (batch_size is not None and batch_size < 1):
        raise ValueError(f"`noise` and `batch_size` must be at least 1, but are {len(noise)} and {batch_size}.")
    started = time.perf_counter()
    device, noise = noise.device, noise.to(torch.promote_types(noise.dtype, torch.float32))
    student = distilled_copy(scheduler)
    student.set_timesteps(num_inference_steps, device=device)
    student.check_grid()
    teacher, places = nested_teacher(student, scale, teacher_scheduler, device)
    count = int(_total(torch.tensor(len(noise), device=device)))
    if holdout is None:
        state = PartialState()
        generator = torch.Generator().manual_seed(0x0DE)
        fresh = torch.randn(count, *noise.shape[1:], generator=generator, dtype=noise.dtype)
        holdout = fresh[state.process_index :: state.num_processes][: len(noise)].to(device)
    holdout = holdout.to(noise.dtype)
    if holdout_cond is None:
        if cond and len(holdout) != len(noise):
            raise ValueError(
                f"`holdout_cond` must be given for a `holdout` of {len(holdout)} beside a `noise` of {len(noise)}."
            )
        holdout_cond = cond
    counted = _Counted(predict)
    calls = len(student.timesteps)
    parts = _parts(noise, cond, batch_size, "cond")
    held_parts = _parts(holdout, holdout_cond, batch_size, "holdout_cond")
    evaluations = len(noise) * (len(teacher.timesteps) + calls) + len(holdout) * (len(teacher.timesteps) + 2 * calls)
    with tqdm(total=evaluations, unit="eval", desc=f"{num_inference_steps} steps", disable=not progress_bar) as bar:
        counted.bar = bar
        runs = [_Run(student, teacher, places, part_noise, part_cond, counted) for part_noise, part_cond in parts]
        lambdas, stderr, cosine = [], [], []
        for call in range(calls):
            for run in runs:
                run.advance(call, directions)
            fitted, errors, cos = _fit_call(runs, ridge, f"{num_inference_steps} steps, call {call}")
            for run in runs:
                run.correct(fitted)
            lambdas.append(fitted), stderr.append(errors), cosine.append(cos)
        table = dict(notes or {}) | student.fingerprint()
        table |= {
            "lambdas": [row if directions > 1 else row[0] for row in lambdas],
            "stderr": [row if directions > 1 else row[0] for row in stderr],
            "cosine": cosine,
            "directions": directions,
            "batch_size": count,
            "teacher": {"class": teacher._stock_class.__name__, "steps": len(teacher.nodes) - 1},
        }
        held_out = _held_out(student, teacher, places, held_parts, counted, num_inference_steps, table)
    if not math.isfinite(held_out["heldout_mse"] + held_out["heldout_mse_base"]):
        raise FloatingPointError(f"D-ODE: the held-out samples of {num_inference_steps} steps are not finite.")
    accepted = held_out["heldout_mse"] <= held_out["heldout_mse_base"]
    table |= held_out
    report = DODEReport(
        num_inference_steps=num_inference_steps,
        lambdas=lambdas,
        stderr=stderr,
        cosine=cosine,
        **held_out,
        accepted=accepted,
        network_evaluations=counted.samples,
        seconds=time.perf_counter() - started,
        table=table,
    )
    if accepted:
        scheduler.add_table(num_inference_steps, table)
    else:
        logger.warning(f"The table of {num_inference_steps} steps is not kept: on held-out noise the base is better.")
    return report


def nested_teacher(
    student: DODESchedulerMixin, scale: int, teacher_scheduler: SchedulerMixin | None, device: Any = None
) -> tuple[DODESchedulerMixin, list[int]]:
    """The teacher's solver, and the places of the student's nodes on its grid.

    Grids without a last timestep of their own nest at `scale * N` steps, those that include both ends of the schedule
    at `(N - 1) * scale + 1`. Whichever contains the student's nodes, level by level, is taken.

    Raises:
        ValueError: if neither does.
    """
    steps, trained = student.num_inference_steps or len(student.timesteps), student.config.num_train_timesteps
    if scale > trained // steps:
        logger.warning(f"`scale` is lowered from {scale} to {trained // steps}: the teacher has {trained} timesteps.")
        scale = max(1, trained // steps)
    own = teacher_scheduler is None
    fine = distilled_copy(student if own else teacher_scheduler)
    if not own and fine.config.get("prediction_type") != student.config.get("prediction_type"):
        raise ValueError(
            f"`teacher_scheduler` must have the student's prediction type {student.config.get('prediction_type')!r}, "
            f"but has {fine.config.get('prediction_type')!r}."
        )
    if not own:
        check_deterministic(teacher_scheduler, "`teacher_scheduler`")
    if places := _places(student, fine, steps, scale, device, own):
        return (_on_grid_of(fine) if own else fine), places
    others = [c for c in range(2, min(20, trained // steps) + 1) if _places(student, fine, steps, c, device, own)]
    if others:
        raise ValueError(f"`scale` must be one of {others} for {steps} steps on this grid, but is {scale}.")
    grid = f"{type(student).__name__} (`timestep_spacing` {student.setting('timestep_spacing')!r})"
    # the least level of a curved grid depends on the number of steps but on 'linspace'
    curved = any(student.setting(f"use_{kind}_sigmas") for kind in ("karras", "exponential", "beta"))
    raise ValueError(
        f"`num_inference_steps` {steps} on this grid of {grid} is not contained in that of "
        f"{type(fine)._stock_class.__name__} with more steps. Build the scheduler with "
        f"`timestep_spacing={'linspace' if curved else 'trailing'!r}`, whose grids nest."
    )


def _places(student, fine, steps: int, scale: int, device, own: bool) -> list[int] | None:
    """The places of the student's nodes on the grid of `fine` at `scale` times the steps; None if it lacks them."""
    for count, places in (
        (scale * steps, [scale * k for k in range(steps + 1)]),
        ((steps - 1) * scale + 1, [*(scale * k for k in range(steps)), (steps - 1) * scale + 1]),
    ):
        fine.set_timesteps(count, device=device)
        pairs = zip(student.nodes, places, strict=True)
        whole = len(fine.nodes) == count + 1 and (own or _meets_its_timesteps(fine))
        if whole and all(_same_level(level, fine.nodes[place]) for level, place in pairs):
            return places
    return None


def _meets_its_timesteps(teacher: DODESchedulerMixin) -> bool:
    try:
        teacher.check_grid()
    except ValueError:
        return False
    return True


def _same_level(a: tuple[float, float], b: tuple[float, float], tolerance: float = 1e-5) -> bool:
    """Equal `sigma / alpha`, whatever the coordinates."""
    here, there = ratio(a), ratio(b)
    return abs(here - there) <= tolerance * max(here, there) + 1e-8


def _on_grid_of(fine: DODESchedulerMixin) -> DODESchedulerMixin:
    """DPM-Solver++(2M) on the timesteps of `fine`."""
    edm = "sigma_data" in fine.config
    config = {k: v for k, v in fine.config.items() if not k.startswith("dode_")}
    settings: dict[str, Any] = {"algorithm_type": "dpmsolver++", "solver_order": 2, "final_sigmas_type": "zero"}
    if not edm:
        settings |= {"timestep_spacing": "linspace", "use_lu_lambdas": False}
        settings |= {f"use_{kind}_sigmas": False for kind in ("karras", "exponential", "beta")}
    solver = DistilledEDMDPMSolverMultistepScheduler if edm else DistilledDPMSolverMultistepScheduler
    teacher = solver.from_config(config, **settings)
    teacher.set_timesteps(len(fine.nodes) - 1, device=fine.timesteps.device)
    flow = teacher.config.get("use_flow_sigmas", False)
    sigmas = [level[1] if flow else ratio(level) for level in fine.nodes]
    teacher.sigmas, teacher.timesteps = torch.tensor(sigmas, dtype=torch.float32), fine.node_timesteps
    return teacher


class _Counted:
    """`predict`, counting samples."""

    def __init__(self, predict: Predict):
        self.predict, self.samples, self.bar = predict, 0, None

    def __call__(self, sample: torch.Tensor, t: torch.Tensor, cond: Cond | None) -> torch.Tensor:
        self.samples += len(sample)
        self.bar.update(len(sample))
        return self.predict(sample, t, cond) if cond else self.predict(sample, t)


def _parts(
    noise: torch.Tensor, cond: Cond | None, batch_size: int | None, argument: str
) -> list[tuple[torch.Tensor, Cond | None]]:
    for name, value in (cond or {}).items():
        if len(value) != len(noise):
            raise ValueError(
                f"`{argument}` must have {len(noise)} rows, one per noise, but {name!r} has {len(value)}."
            )
    places = torch.arange(len(noise)).split(batch_size or len(noise))
    return [(noise[p], None if cond is None else {k: v[p.to(v.device)] for k, v in cond.items()}) for p in places]


def trajectory(scheduler: SchedulerMixin, x: torch.Tensor, cond: Cond | None, predict: Predict) -> Iterable:
    """The states of a run from `x`: `(call, state)` after each network call."""
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    for call, t in enumerate(scheduler.timesteps):
        output = predict(scheduler.scale_model_input(x, t), t, cond)
        x = scheduler.step(output, t, x, return_dict=False)[0]
        yield call, x


def end_of(states: Iterable[tuple[int, torch.Tensor]]) -> torch.Tensor:
    """The last state of a `trajectory`."""
    return deque(states, maxlen=1).pop()[1]


def _teacher_states(student, teacher, places, x, cond, predict) -> list[torch.Tensor]:
    """The teacher's states at the student's nodes, in the student's coordinates, from the same start `x`."""
    scales = [math.hypot(*student.nodes[k]) / math.hypot(*teacher.nodes[place]) for k, place in enumerate(places)]
    teacher = copy.deepcopy(teacher)
    wanted = {place: k for k, place in enumerate(places)}
    states: list[torch.Tensor] = [x] * len(places)
    for call, state in trajectory(teacher, x / scales[0], cond, predict):
        target = teacher.call_nodes(call)[1]
        if target in wanted:  # a corrector's state replaces its predictor's
            states[wanted[target]] = state * scales[wanted[target]]
    return states


class _Run:
    """One micro-batch: the teacher's states, and the student on its way."""

    def __init__(self, student, teacher, places, noise, cond, predict):
        self.scheduler, self.cond, self.predict = copy.deepcopy(student), cond, predict
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)
        self.x = noise * student.init_noise_sigma
        self.states = _teacher_states(student, teacher, places, self.x, cond, predict)

    def advance(self, call: int, directions: int) -> None:
        t = self.scheduler.timesteps[call]
        output = self.predict(self.scheduler.scale_model_input(self.x, t), t, self.cond)
        _, step, (whole, difference) = self.scheduler.advance(output, t, self.x)
        self.base = step.prev_sample
        kept = [difference, whole][:directions] if self.scheduler.is_fitted(call) else [None] * directions
        self.directions = [torch.zeros_like(self.base) if d is None else d for d in kept]
        r = self.states[self.scheduler.call_nodes(call)[1]] - self.base
        # (B, k, D) and (B, D), one row per sample
        d = torch.stack([v.flatten(1) for v in self.directions], 1).double()
        r = r.flatten(1).double()
        self.projection = torch.einsum("bkd,bd->bk", d, r)
        self.gram = torch.einsum("bkd,bld->bkl", d, d)
        self.square, self.scale = (r**2).sum(), (whole.double() ** 2).sum()

    def correct(self, lambdas: list[float]) -> None:
        moved = zip(lambdas, self.directions, strict=True)
        self.x = self.base + sum(weight * d for weight, d in moved if weight) if any(lambdas) else self.base


def _fit_call(runs: list[_Run], ridge: float, where: str) -> tuple[list[float], list[float], float]:
    """`lambda`, its standard error and the cosine of one call, over all micro-batches and ranks."""
    gram = _total(sum(run.gram.sum(0) for run in runs))
    projection = _total(sum(run.projection.sum(0) for run in runs))
    square, scale = (_total(sum(getattr(run, name) for run in runs)) for name in ("square", "scale"))
    if not torch.isfinite(gram.sum() + projection.sum() + square):
        raise FloatingPointError(f"D-ODE: the states of {where}, are not finite.")
    lambdas, errors = torch.zeros_like(projection), torch.zeros_like(projection)
    # a direction that is no more than rounding of `w m` cannot be fitted
    usable = gram.diagonal() > 1e-6 * scale
    while usable.any():
        G, p = gram[usable][:, usable], projection[usable]
        fitted = solve(G, p, ridge)
        # sandwich: G^-1 (sum_b s_b s_b') G^-1 with s_b = D_b' (r_b - D_b lambda)
        s = [run.projection[:, usable] - run.gram[:, usable][:, :, usable] @ fitted for run in runs]
        meat = _total(sum(v.T @ v for v in s))
        bread = torch.linalg.inv(G)
        stderr = (bread @ meat @ bread).diagonal().clamp(min=0).sqrt()
        significant = fitted.abs() >= 2 * stderr
        if significant.all():
            lambdas[usable], errors[usable] = fitted, stderr
            break
        weakest = (fitted.abs() / stderr).argmin()
        place = usable.nonzero()[weakest]
        errors[place] = stderr[weakest]  # the error of a number that was set to zero because of it
        usable[place] = False
    correction = lambdas @ gram @ lambdas
    cosine = (lambdas @ projection) / (correction * square).sqrt() if correction > 0 and square > 0 else 0.0
    return lambdas.tolist(), errors.tolist(), float(cosine)


def _held_out(student, teacher, places, parts, predict, steps: int, table: dict) -> dict[str, float | None]:
    """Mean squared distance to the teacher's final samples and its standard error: of the distilled solver, and of
    its base."""
    fitted = copy.deepcopy(student)
    fitted.add_table(steps, table)
    squares, squares_base = [], []
    for noise, cond in parts:
        x = noise * student.init_noise_sigma
        target = _teacher_states(student, teacher, places, x, cond, predict)[-1]
        for solver, own in ((fitted, squares), (student, squares_base)):
            solver.set_timesteps(steps, device=noise.device)
            final = end_of(trajectory(solver, x, cond, predict))
            own.append(square_distances(final, target))
    (error, stderr), (error_base, stderr_base) = (mean_and_stderr(torch.cat(own)) for own in (squares, squares_base))
    errors = {"heldout_stderr": stderr, "heldout_stderr_base": stderr_base}
    return {"heldout_mse": error, "heldout_mse_base": error_base} | errors


def square_distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean squared distance of each sample `(B,)`, in float64."""
    return ((a - b).double() ** 2).flatten(1).mean(1)


def mean_and_stderr(values: torch.Tensor) -> tuple[float, float | None]:
    """Mean of values `(n,)` over the samples of all processes, and its standard error; None for one sample."""
    count, mean = (_total(v).item() for v in (torch.tensor(len(values), device=values.device), values.sum()))
    mean /= count
    square = _total(((values - mean) ** 2).sum()).item()
    return mean, (square / (count - 1) / count) ** 0.5 if count > 1 else None


def _total(value: torch.Tensor) -> torch.Tensor:
    """The sum over processes."""
    return reduce(value, "sum")
