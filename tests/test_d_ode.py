"""The checkable invariants of D-ODE (numbers as in the specification), on known denoisers."""

import copy
import inspect
import json
import math
import runpy
import sys

import diffusers
import pytest
import torch
from conftest import ROOT, run, run_on_two_ranks, run_script, script, tiny_unet
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.utils import DummyObject
from families import tiny_pipeline
from PIL import Image
from test_cards import python_blocks

import diffusers_onestep
from diffusers_onestep import fit_d_ode
from diffusers_onestep.methods.dode import (
    _fit_call,
    _Run,
    end_of,
    mean_and_stderr,
    nested_teacher,
    solve,
    square_distances,
    trajectory,
)
from diffusers_onestep.metrics import standard_error
from diffusers_onestep.reports import stated_root
from diffusers_onestep.schedulers import DISTILLED_SCHEDULERS, solver_for
from diffusers_onestep.schedulers import SOLVERS as NAMED
from diffusers_onestep.schedulers.scheduling_d_ode import distilled_copy, first_order

TRAILING = {"timestep_spacing": "trailing"}
SOLVERS = {
    "ddim": ("DDIM", TRAILING | {"clip_sample": False}),
    "plms": ("PNDM", TRAILING | {"skip_prk_steps": True}),
    "ipndm": ("PNDM", TRAILING | {"skip_prk_steps": True, "pndm_type": "ipndm"}),
    "dpm1": ("DPMSolverMultistep", TRAILING | {"solver_order": 1}),
    "dpm2": ("DPMSolverMultistep", TRAILING),
    "dpm3": ("DPMSolverMultistep", TRAILING | {"solver_order": 3}),
    "deis": ("DEISMultistep", TRAILING),
    "single2": ("DPMSolverSinglestep", {}),
    "single3": ("DPMSolverSinglestep", {"solver_order": 3, "solver_type": "heun", "lower_order_final": True}),
    "euler": ("EulerDiscrete", TRAILING),
    "euler-karras": ("EulerDiscrete", {"use_karras_sigmas": True}),
    "edm-euler": ("EDMEuler", {}),
    "edm-dpm": ("EDMDPMSolverMultistep", {}),
    "heun": ("HeunDiscrete", {"use_karras_sigmas": True, "beta_start": 1e-4, "beta_end": 0.02}),
}
EVERY = pytest.mark.parametrize("name", SOLVERS)


def build(name, **options):
    kind, settings = SOLVERS[name]
    return getattr(diffusers_onestep, f"Distilled{kind}Scheduler")(**settings, **options)


def stock(name):
    """The stock scheduler of the same settings."""
    kind, settings = SOLVERS[name]
    return getattr(diffusers, f"{kind}Scheduler")(**{k: v for k, v in settings.items() if k != "pndm_type"})


def levels(t, beta_end=0.02):
    """alpha and sigma of DDPM's linear betas, at fractional timesteps by the ratio, as diffusers interpolates it."""
    products = DDPMScheduler(beta_end=beta_end).alphas_cumprod.double()
    ratio = ((1 - products) / products).sqrt()
    low = int(t)
    high = min(low + 1, len(ratio) - 1)
    r = ratio[low] + (float(t) - low) * (ratio[high] - ratio[low])
    return 1 / (1 + r**2).sqrt(), r / (1 + r**2).sqrt()


def predictor(denoise, edm=False, beta_end=0.02):
    """`predict(scaled_sample, t)` of a data prediction `denoise(x, alpha, sigma)`: epsilon, or EDM's F."""

    def epsilon(sample, t):
        alpha, sigma = levels(t, beta_end)
        x = sample.double()
        return ((x - alpha * denoise(x, alpha, sigma)) / sigma).to(sample.dtype)

    def f_theta(sample, t):
        sigma, sd = (4 * t.double()).exp(), 0.5
        x = sample.double() * (sigma**2 + sd**2).sqrt()
        x0 = denoise(x, torch.ones((), dtype=torch.float64), sigma)
        return ((x0 - sd**2 / (sigma**2 + sd**2) * x) * (sigma**2 + sd**2).sqrt() / (sigma * sd)).to(sample.dtype)

    return f_theta if edm else epsilon


def gaussian(variance, mu=0.0):
    variance = torch.as_tensor(variance, dtype=torch.float64)
    return lambda x, alpha, sigma: mu + alpha * variance / (alpha**2 * variance + sigma**2) * (x - alpha * mu)


def mixture(modes=25, variance=0.02, d=64, seed=0):
    means = torch.randn(modes, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def denoise(x, alpha, sigma):
        var = alpha**2 * variance + sigma**2
        logits = -((x[:, None] - alpha * means) ** 2).sum(-1) / (2 * var)
        means_of_modes = means + alpha * variance / var * (x[:, None] - alpha * means)
        return (logits.softmax(-1)[..., None] * means_of_modes).sum(1)

    return denoise


MILD = gaussian(torch.linspace(0.2, 0.6, 64))  # every solver's table is accepted on it


def noises(n, d=64, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def predict_for(name, denoise=None):
    return predictor(denoise or gaussian(torch.arange(1, 65.0) ** -1.2), edm=name.startswith("edm"))


def final(scheduler, predict, noise, steps):
    scheduler.set_timesteps(steps)
    return end_of(trajectory(scheduler, noise * scheduler.init_noise_sigma, None, lambda s, t, _: predict(s, t)))


def fit(scheduler, predict, steps, noise=None, **options):
    noise = noises(100, seed=1) if noise is None else noise
    return fit_d_ode(scheduler, predict, steps, noise, progress_bar=False, **options)


def table(scheduler, steps, lambdas):
    fresh = distilled_copy(scheduler)
    fresh.set_timesteps(steps)
    return {str(steps): fresh.fingerprint() | {"lambdas": lambdas}}


def random_network(sample, t):
    return torch.tanh(sample * 1.3 + torch.roll(sample, 1, -1) - float(t) / 900).to(sample.dtype)


# 1. identity


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_zeros_are_the_base_solver_to_the_bit(name, dtype):
    ours = build(name)
    ours.set_timesteps(5)
    zeros = table(ours, 5, [0.0] * len(ours.timesteps))
    ours = build(name, dode_tables=zeros)
    base = build(name) if name == "ipndm" else stock(name)  # stock diffusers has no VP iPNDM
    noise = noises(3).to(dtype)
    assert torch.equal(final(ours, random_network, noise, 5), final(base, random_network, noise, 5))
    assert torch.equal(final(build(name), random_network, noise, 5), final(base, random_network, noise, 5))


def test_ipndm_is_adams_bashforth_on_ddim_steps():
    ours, ddim = build("ipndm"), DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **TRAILING)
    coefficients = [[1], [1.5, -0.5], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]
    x = noises(2)
    expected, history = final(ours, random_network, x, 5), []
    ddim.set_timesteps(5)
    for t in ddim.timesteps:
        history = [random_network(x, t), *history][:4]
        combined = sum(c * e for c, e in zip(coefficients[len(history) - 1], history, strict=True))
        x = ddim.step(combined, t, x).prev_sample
    torch.testing.assert_close(expected, x, rtol=1e-5, atol=1e-5)


@EVERY
def test_half_precision_is_fitted_arithmetic_in_float32(name):
    ours = build(name)
    ours.set_timesteps(4)
    lambdas = [0.1] * len(ours.timesteps)
    outcome = {
        dtype: final(build(name, dode_tables=table(ours, 4, lambdas)), random_network, noises(3).to(dtype), 4)
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert outcome[torch.bfloat16].dtype == torch.bfloat16
    scale = outcome[torch.float32].abs().mean()
    assert (outcome[torch.bfloat16].float() - outcome[torch.float32]).abs().mean() < 0.03 * scale


# 2. to 4. the closed form


@EVERY
def test_a_teacher_of_as_many_steps_of_the_same_solver_gives_exact_zeros(name):
    scheduler = build(name)
    report = fit(scheduler, predict_for(name), 5, scale=1, teacher_scheduler=build(name))
    assert all(value == 0 for row in report.lambdas for value in row)
    assert report.heldout_mse == report.heldout_mse_base


@pytest.mark.parametrize("directions", [1, 2])
def test_heun_is_corrected_where_its_states_stay(directions):
    report = fit(build("heun"), predictor(mixture()), 4, directions=directions)
    assert report.accepted and [any(row) for row in report.lambdas][:6] == [False, True] * 3


@pytest.mark.parametrize("k", [1, 2])
def test_closed_form_is_least_squares(k):
    generator = torch.Generator().manual_seed(0)
    D = torch.randn(1000, k, generator=generator, dtype=torch.float64)
    r = torch.randn(1000, generator=generator, dtype=torch.float64)
    fitted = solve(D.T @ D, D.T @ r)
    torch.testing.assert_close(fitted, torch.linalg.lstsq(D, r[:, None]).solution[:, 0], rtol=1e-12, atol=1e-12)
    errors = [((r - D @ (fitted + shift)) ** 2).sum() for shift in torch.linspace(-0.1, 0.1, 21).double()]
    assert min(range(21), key=errors.__getitem__) == 10


@EVERY
def test_fitted_numbers_are_the_least_squares_of_their_own_states(name):
    """Run the fit by hand: at every call the fitted number minimises the distance to the teacher's state."""
    scheduler, predict, noise = build(name), predict_for(name), noises(50, seed=3)
    report = fit(scheduler, predict, 4, noise, batch_size=50)
    student = build(name)
    student.set_timesteps(4)
    teacher, places = nested_teacher(student, 10, None)
    x = noise * student.init_noise_sigma
    ratio = [student.nodes[k][0] / teacher.nodes[p][0] for k, p in enumerate(places)]
    states = {}
    for call, state in trajectory(teacher, x / ratio[0], None, lambda s, t, _: predict(s, t)):
        states[teacher.call_nodes(call)[1]] = state
    fitted = 0
    for call, t in enumerate(student.timesteps):
        _, step, (_, d) = student.advance(predict(student.scale_model_input(x, t), t), t, x)
        node = student.call_nodes(call)[1]
        r = states[places[node]] * ratio[node] - step.prev_sample
        value = report.lambdas[call][0]
        x = step.prev_sample
        if value:
            exact = torch.linalg.lstsq(d.double().reshape(-1, 1), r.double().reshape(-1, 1)).solution.item()
            assert value == pytest.approx(exact, rel=1e-5)
            assert (r - value * d).norm() <= r.norm()
            x, fitted = x + value * d, fitted + 1
    assert fitted >= 2


# 5. to 7. known distributions


ONE_CALL_A_STEP = ["ddim", "ipndm", "dpm1", "dpm2", "deis", "euler", "edm-euler", "edm-dpm"]


def exact_flow(scheduler, x, variance, mu):
    """The states at the nodes of the exact flow from `x`, for data N(mu, variance)."""
    alpha, sigma = scheduler.nodes[0]
    start = x.double() - alpha * mu
    spread = alpha**2 * variance + sigma**2
    return [a * mu + ((a**2 * variance + s**2) / spread) ** 0.5 * start for a, s in scheduler.nodes]


@pytest.mark.parametrize("name", ONE_CALL_A_STEP)
@pytest.mark.parametrize("variance, mu", [(0.25, 0.0), (0.6, 0.3)])
def test_on_an_isotropic_gaussian_the_fit_equals_its_teacher(name, variance, mu):
    scheduler, predict = build(name), predict_for(name, gaussian(variance, mu))
    held = noises(400, seed=9)
    report = fit(scheduler, predict, 5, holdout=held)
    student = build(name)
    student.set_timesteps(5)
    teacher, _ = nested_teacher(student, 10, None)
    x = held * student.init_noise_sigma
    ratio = student.nodes[0][0] / teacher.nodes[0][0]
    target = end_of(trajectory(teacher, x / ratio, None, lambda s, t, _: predict(s, t)))
    moved = final(scheduler, predict, held, 5) - target
    base = final(build(name), predict, held, 5) - target
    assert moved.norm() < 5e-5 * target.norm() and base.norm() > 0.03 * target.norm()
    assert report.accepted


@pytest.mark.parametrize(
    "name, teacher, base, fitted",
    [
        ("ddim", DDIMScheduler(clip_sample=False, **TRAILING), 0.2378, 0.0286),
        ("dpm2", DPMSolverMultistepScheduler(**TRAILING), 0.2290, 0.0005),
    ],
)
def test_i5_the_numbers_of_the_specification(name, teacher, base, fitted):
    """RMSE to the exact flow at s**2 = 0.25: the fitted solver has its teacher's."""
    scheduler, predict, held = build(name), predict_for(name, gaussian(0.25)), noises(400, seed=9)
    fit(scheduler, predict, 5, teacher_scheduler=teacher)
    scheduler.set_timesteps(5)
    exact = exact_flow(scheduler, held, 0.25, 0.0)[-1]
    solvers = (build(name), 5), (scheduler, 5), (teacher, 50)
    rmse = [((final(s, predict, held, n) - exact) ** 2).mean().sqrt().item() for s, n in solvers]
    assert rmse[0] == pytest.approx(base, rel=0.01) and rmse[1] == pytest.approx(fitted, rel=0.01, abs=5e-5)
    assert rmse[1] == pytest.approx(rmse[2], rel=1e-3)


def errors_of_a_fit_to_the_flow(scheduler, predict, variance, mu):
    """Relative errors to the exact flow at nodes 1..5 of a solver that is fitted to the flow itself, and by node
    whether the fit left its number at 0 because its direction is below a thousandth of `w m`; of these nodes the
    error is the one that the closed form reaches nevertheless."""
    scheduler.set_timesteps(5)
    teacher, places = nested_teacher(scheduler, 2, None)
    errors, degenerate = [], []
    with torch.no_grad():
        run = _Run(scheduler, teacher, places, noises(100, seed=1), None, lambda x, t, _: predict(x, t))
        flow = exact_flow(scheduler, run.x, variance, mu)
        run.states = [state.float() for state in flow]
        for call, exact in enumerate(flow[1:]):
            run.advance(call, 1)
            fitted, _, _ = _fit_call([run], 0.0, "a test")
            run.correct(fitted)
            square, state = run.gram.sum(), run.x
            degenerate.append(bool(square <= 1e-6 * run.scale))
            if degenerate[-1]:
                assert fitted == [0.0]
                state = run.base + (run.projection.sum() / square if square else 0.0) * run.directions[0]
            errors.append(((state - exact).norm() / exact.norm()).item())
    return errors, degenerate


@pytest.mark.parametrize("name", ONE_CALL_A_STEP)
@pytest.mark.parametrize("variance, mu", [(0.25, 0.0), (0.6, 0.3)])
def test_i5_fitted_to_the_exact_flow_every_node_from_the_second_on_is_on_it(name, variance, mu):
    """The bound of the specification. At DDPM's noisiest levels two noise predictions differ by less than a
    thousandth, where the specification's guard sets the number to 0: that node, the second at most, is 5e-3 off the
    flow, and the closed form without the guard is on it."""
    predict = predict_for(name, gaussian(variance, mu))
    errors, degenerate = errors_of_a_fit_to_the_flow(build(name), predict, variance, mu)
    assert max(errors[1:]) < 5e-4
    assert not any(degenerate[2:]) and (not degenerate[1] or build(name).dode_space == "epsilon")


@pytest.mark.parametrize("name", ["ddim", "ipndm", "deis"])
@pytest.mark.parametrize("first_step", ["none", "noise"])
def test_i5_on_a_milder_schedule_no_number_is_guarded_and_noise_reaches_the_first_node(name, first_step):
    scheduler = build(name, beta_end=0.006, dode_first_step=first_step)
    predict = predictor(gaussian(0.25), beta_end=0.006)
    errors, degenerate = errors_of_a_fit_to_the_flow(scheduler, predict, 0.25, 0.0)
    first = 0 if first_step == "noise" else 1
    assert max(errors[first:]) < 5e-4 and not any(degenerate[first:])
    assert first == 0 or errors[0] > 5e-4


@pytest.mark.parametrize(
    "name, steps, base, fitted",
    [
        ("ddim", 4, 0.145, 0.098),
        ("ddim", 5, 0.131, 0.085),
        ("ddim", 10, 0.090, 0.049),
        ("dpm2", 4, 0.143, 0.100),
        ("dpm2", 5, 0.127, 0.086),
        ("dpm2", 10, 0.084, 0.039),
        ("deis", 4, 0.135, 0.088),
        ("deis", 5, 0.120, 0.075),
        ("deis", 10, 0.077, 0.037),
    ],
)
def test_on_an_anisotropic_gaussian_the_published_prototype_is_reached(name, steps, base, fitted):
    variance = torch.arange(1, 65.0, dtype=torch.float64) ** -1.2
    scheduler, held = build(name), noises(500, seed=5)
    predict = predict_for(name, gaussian(variance))
    fit(scheduler, predict, steps)
    alpha, sigma = levels(999)
    scheduler.set_timesteps(steps)
    end = scheduler.nodes[-1]
    scale = ((end[0] ** 2 * variance + end[1] ** 2) / (alpha**2 * variance + sigma**2)).sqrt()
    rmse = [((final(s, predict, held, steps) - scale * held) ** 2).mean().sqrt() for s in (build(name), scheduler)]
    assert rmse[1] < 0.75 * rmse[0]
    assert rmse[0].item() == pytest.approx(base, rel=0.01)
    assert rmse[1].item() < 1.01 * fitted


@pytest.mark.parametrize("denoise", [gaussian(torch.logspace(0, -3, 64)), mixture(seed=4), mixture(5, 0.1)])
@pytest.mark.parametrize("name", ["ddim", "ipndm", "dpm2", "deis", "euler-karras", "edm-euler"])
def test_teachers_that_are_not_in_the_specification(name, denoise):
    scheduler, held = build(name), noises(300, seed=6)
    predict = predict_for(name, denoise)
    report = fit(scheduler, predict, 5, holdout=held)
    assert report.accepted and report.heldout_mse < 0.9 * report.heldout_mse_base


def test_on_a_mixture_ddim_passes_dpm_solver():
    predict, held = predictor(mixture()), noises(400, seed=8)
    fine = final(DPMSolverMultistepScheduler(solver_order=2, **TRAILING), predict, held, 500)
    scheduler = build("ddim")
    fit(scheduler, predict, 4)
    rmse = {
        name: (final(s, predict, held, 4) - fine).pow(2).mean().sqrt().item()
        for name, s in {"base": build("ddim"), "dpm2": build("dpm2"), "fitted": scheduler}.items()
    }
    # the specification's drop, .266 to .174; its modes are not known
    assert rmse["fitted"] < 0.654 * rmse["base"] and rmse["fitted"] < rmse["dpm2"] < rmse["base"]


def test_two_directions_are_nearer_than_one():
    predict, held = predictor(mixture()), noises(400, seed=8)
    one, two = (fit(build("ddim"), predict, 5, holdout=held, directions=k) for k in (1, 2))
    assert two.heldout_mse < 0.6 * one.heldout_mse
    scheduler = build("ddim")
    report = fit(scheduler, predict, 5, holdout=held, directions=2)
    again = type(scheduler).from_config(json.loads(scheduler.to_json_string()))
    assert torch.equal(final(again, predict, held, 5), final(scheduler, predict, held, 5))
    assert len(report.lambdas[2]) == 2


# 8. and 9. identities


@pytest.mark.parametrize("name", ["ddim", "dpm1"])
def test_data_space_with_half_the_step_ratio_is_dpm_solver_2m(name):
    steps = 8
    ours = build(name, dode_space="sample")
    ours.set_timesteps(steps)
    half_log_snr = [math.log(alpha / sigma) for alpha, sigma in ours.nodes[:-1]]
    h = [b - a for a, b in zip(half_log_snr, half_log_snr[1:], strict=False)]
    lambdas = [0.0] + [h[i] / (2 * h[i - 1]) for i in range(1, steps - 1)] + [0.0]
    ours = build(name, dode_space="sample", dode_tables=table(ours, steps, lambdas))
    base = DPMSolverMultistepScheduler(solver_order=2, solver_type="midpoint", **TRAILING)
    predict = predict_for(name)
    noise = noises(4) * 140 / final(base, predict, noises(4), steps).abs().max()  # ends at |x| = 140
    torch.testing.assert_close(
        final(ours, predict, noise, steps), final(base, predict, noise, steps), atol=8e-5, rtol=0
    )


@pytest.mark.filterwarnings("ignore:.*algorithm_type `dpmsolver` is deprecated")
@pytest.mark.parametrize(
    "algorithm, beta_end, tolerance",
    [
        ("dpmsolver++", 0.02, 3e-5),
        ("dpmsolver", 0.006, 3e-5),
        # from DDPM's last level the noise form grows by 1 / alpha = 157, and float32's rounding of alpha with it, also
        # for float64 samples
        ("dpmsolver", 0.02, 1.5e-3),
    ],
)
def test_singlestep_is_dpm_solver_2_by_hand(algorithm, beta_end, tolerance):
    """Kim et al.'s D-DPM-Solver-2 and its data form, block by block."""
    options = {"algorithm_type": algorithm, "final_sigmas_type": "sigma_min", "lower_order_final": False}
    options["beta_end"] = beta_end
    cls = diffusers_onestep.DistilledDPMSolverSinglestepScheduler
    ours, lambdas = cls(**options), [0.0, 0.3, -0.2, 0.4]
    ours.set_timesteps(4)
    ours = cls(**options, dode_tables=table(ours, 4, lambdas))
    predict, x = predictor(gaussian(torch.arange(1, 65.0) ** -1.2), beta_end=beta_end), noises(4)
    result, x = final(ours, predict, x, 4), x.double()
    nodes, ts, last = ours.nodes, ours.timesteps, None
    log_snr = [math.log(alpha / sigma) for alpha, sigma in nodes]
    noise_form = algorithm == "dpmsolver"
    for i in (0, 2):

        def output(sample, j):
            alpha, sigma = nodes[j]
            eps = predict(sample, ts[j])
            return eps if noise_form else (sample - sigma * eps) / alpha

        def coefficients(j, k):
            """`a` and `w` of the first-order update from node j to node k, by h."""
            h = log_snr[k] - log_snr[j]
            if noise_form:
                return nodes[k][0] / nodes[j][0], -nodes[k][1] * math.expm1(h)
            return nodes[k][1] / nodes[j][1], -nodes[k][0] * math.expm1(-h)

        r1 = (log_snr[i + 1] - log_snr[i]) / (log_snr[i + 2] - log_snr[i])
        m = output(x, i)
        a, w = coefficients(i, i + 1)
        inner = a * x + w * (m if last is None else m + lambdas[i] * (m - last))
        newest = output(inner, i + 1)
        a, w = coefficients(i, i + 2)
        x = a * x + w * m + w / (2 * r1) * (1 + lambdas[i + 1]) * (newest - m)
        last = newest
    torch.testing.assert_close(result.double(), x, atol=tolerance, rtol=0)
    assert (final(cls(**options), predict, noises(4), 4) - x).abs().mean() > 0.01


# 10. and 11. statistics


@EVERY
def test_micro_batches_and_order_do_not_matter(name):
    noise, predict = noises(60, seed=2).double(), predict_for(name)
    whole = fit(build(name), predict, 4, noise)
    parts = fit(build(name), predict, 4, noise, batch_size=17)
    turned = fit(build(name), predict, 4, noise.flip(0))
    for other in (parts, turned):
        for a, b in zip(whole.lambdas, other.lambdas, strict=True):
            assert a == pytest.approx(b, rel=1e-10)


TWO_RANKS = """
import json, sys
from pathlib import Path
from test_d_ode import *
state = diffusers_onestep.methods.dode.PartialState()
noise = noises(60, seed=2).double()[state.process_index :: state.num_processes]
report = fit(build("dpm2"), predict_for("dpm2"), 4, noise, batch_size=17)
if state.is_main_process:
    numbers = [report.table["batch_size"], report.lambdas, report.stderr, report.heldout_mse, report.heldout_stderr]
    Path(sys.argv[1]).write_text(json.dumps(numbers))
state.destroy_process_group()
"""


def test_a_held_out_rmse_has_the_standard_error_of_its_samples():
    a, b = torch.zeros(3, 1, 2), torch.tensor([1.0, 2.0, 6.0]).sqrt()[:, None, None].expand(3, 1, 2)
    squares = square_distances(a, b)
    assert mean_and_stderr(squares) == (pytest.approx(3), pytest.approx((7 / 3) ** 0.5))
    assert standard_error(squares) == pytest.approx((7 / 3) ** 0.5)
    assert mean_and_stderr(squares[:1]) == (pytest.approx(1), None)
    assert stated_root(4.0, 0.4) == "2.00 ± 0.10"
    assert stated_root(4.0, None) == "2.00" and stated_root(0.0, 0.0) == "0.00"
    report = fit(build("ddim"), predict_for("ddim"), 5)
    assert report.table["heldout_stderr"] == report.heldout_stderr > 0
    assert f"RMSE to the teacher {stated_root(report.heldout_mse, report.heldout_stderr)}, base" in str(report)


def test_two_ranks_in_float64_agree_to_1e_10(tmp_path):
    (tmp_path / "fit.py").write_text(TWO_RANKS)
    command = [sys.executable, str(tmp_path / "fit.py"), str(tmp_path / "numbers.json")]
    run_on_two_ranks(command, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    count, lambdas, stderr, *heldout = json.loads((tmp_path / "numbers.json").read_text())
    whole = fit(build("dpm2"), predict_for("dpm2"), 4, noises(60, seed=2).double())
    assert count == 60 and any(any(row) for row in lambdas)
    for ours, theirs in ((whole.lambdas, lambdas), (whole.stderr, stderr)):
        for a, b in zip(ours, theirs, strict=True):
            assert a == pytest.approx(b, rel=1e-10)
    assert heldout == pytest.approx([whole.heldout_mse, whole.heldout_stderr], rel=1e-10)


def test_orthogonal_transforms_do_not_matter_to_a_rotation_invariant_denoiser():
    noise = noises(60, seed=2).double()
    rotation, _ = torch.linalg.qr(noises(64, seed=7).double())
    teacher = DDIMScheduler(clip_sample=False, **TRAILING)  # the default one rounds its states to float32
    predict = predictor(gaussian(0.3))
    plain, turned = (fit(build("ddim"), predict, 4, x, teacher_scheduler=teacher) for x in (noise, noise @ rotation))
    assert sum(any(row) for row in plain.lambdas) >= 2
    for a, b in zip(plain.lambdas, turned.lambdas, strict=True):
        assert a == pytest.approx(b, rel=1e-10)


def test_two_batches_agree_within_their_standard_errors():
    predict = predictor(mixture())
    a, b = (fit(build("ddim"), predict, 5, noises(100, seed=seed)) for seed in (20, 21))
    compared = 0
    for (la,), (lb,), (sa,), (sb,) in zip(a.lambdas, b.lambdas, a.stderr, b.stderr, strict=True):
        if la and lb:
            assert abs(la - lb) < 4 * math.hypot(sa, sb)
            compared += 1
    assert compared >= 3 and a.accepted and b.accepted


# 12. re-entrance


@EVERY
def test_a_second_run_is_the_same_and_copies_share_nothing(name):
    scheduler, predict = build(name), predict_for(name, MILD)
    fit(scheduler, predict, 5)
    assert scheduler.fitted_steps == [5]
    noise = noises(3)
    first = final(scheduler, predict, noise, 5)
    assert torch.equal(final(scheduler, predict, noise, 5), first)
    # a copy that is made half way goes on as the run does, and whatever it is fed leaves the run alone
    scheduler.set_timesteps(5)
    x, ends = noise * scheduler.init_noise_sigma, []
    half = len(scheduler.timesteps) // 2
    for t in scheduler.timesteps[:half]:
        x = scheduler.step(predict(scheduler.scale_model_input(x, t), t), t, x).prev_sample
    twin, other = copy.deepcopy(scheduler), copy.deepcopy(scheduler)
    for t in other.timesteps[half:]:
        other.step(noise, t, noise)
    for solver in (twin, scheduler):
        y = x
        for t in solver.timesteps[half:]:
            y = solver.step(predict(solver.scale_model_input(y, t), t), t, y).prev_sample
        ends.append(y)
    assert torch.equal(ends[0], first) and torch.equal(ends[1], first)


@pytest.mark.parametrize("name", [n for n in SOLVERS if n != "plms"])
def test_a_partial_start_begins_with_the_base_and_keeps_its_place_in_the_table(name):
    predict, first = predict_for(name), 2
    blank = build(name)
    blank.set_timesteps(5)
    calls = len(blank.timesteps)
    ours = build(name, dode_tables=table(blank, 5, [0.2 + 0.1 * i for i in range(calls)]))
    runs = []
    for scheduler in (ours, build(name)):
        scheduler.set_timesteps(5)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        x, states = noises(3), []
        for t in scheduler.timesteps[first : first + 3]:
            states.append(x := scheduler.step(predict(scheduler.scale_model_input(x, t), t), t, x).prev_sample)
        runs.append(states)
    assert torch.equal(runs[0][0], runs[1][0])
    assert not torch.equal(runs[0][1], runs[1][1])
    # the second step is moved by the third or fourth number of the table, not by the second
    again = build(name)
    again.set_timesteps(5)
    if hasattr(again, "set_begin_index"):
        again.set_begin_index(first)
    x = noises(3)
    for t, expected in zip(again.timesteps[first : first + 2], runs[0], strict=False):
        call, output, (_, d) = again.advance(predict(again.scale_model_input(x, t), t), t, x)
        x = output.prev_sample + (0.2 + 0.1 * call) * d if d is not None else output.prev_sample
        torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)
    assert call == first + 1


@pytest.mark.parametrize("first", [1, 2, 3, 4])
def test_plms_from_a_partial_start_keeps_its_place_in_the_table(first):
    """The stock class takes a start's first step twice wherever it starts: these two calls are not the table's."""
    blank = build("plms")
    blank.set_timesteps(5)
    ours = build("plms", dode_tables=table(blank, 5, [0.2] * 6))
    ours.set_timesteps(5)
    x, calls = noises(3), []
    ours.advance, advance = (
        lambda *a, **k: (lambda out: (calls.append(out[0]), out)[1])(advance(*a, **k)),
        ours.advance,
    )
    for t in ours.timesteps[first:]:
        x = ours.step(predict_for("plms")(x, t), t, x).prev_sample
    # the two calls at the first step's end share a timestep, so a start at either is one at the first
    start = 1 if first == 2 else first
    assert calls == [start, start + 1, *range(first + 2, 6)] and x.isfinite().all()


# 13. grids

NESTED = [
    ("DDIM", TRAILING, (4, 5, 8, 10, 20), "CN"),
    ("DPMSolverMultistep", {"timestep_spacing": "linspace"}, (4, 5, 7, 8, 10, 20), "CN"),
    ("DPMSolverMultistep", TRAILING, (4, 5, 7, 8, 10, 20), "CN"),
    ("DEISMultistep", {"timestep_spacing": "linspace"}, (4, 5, 7, 8, 10, 20), "CN"),
    ("DEISMultistep", TRAILING, (4, 5, 7, 8, 10, 20), "CN"),
    ("DPMSolverSinglestep", {}, (4, 5, 7, 8, 10, 20), "CN"),
    ("EulerDiscrete", TRAILING, (4, 5, 7, 8, 10, 20), "CN"),
    ("HeunDiscrete", TRAILING, (4, 5, 7, 8, 10, 20), "CN"),
    ("EulerDiscrete", {"timestep_spacing": "linspace"}, (4, 5, 7, 8, 10, 20), "inclusive"),
    ("HeunDiscrete", {"timestep_spacing": "linspace"}, (4, 5, 7, 8, 10, 20), "inclusive"),
    ("DPMSolverMultistep", {"use_karras_sigmas": True}, (4, 5, 7, 8, 10, 20), "inclusive"),
    ("DPMSolverMultistep", {"use_exponential_sigmas": True}, (4, 5, 7, 8, 10, 20), "inclusive"),
    ("DPMSolverMultistep", {"use_lu_lambdas": True}, (4, 5, 7, 8, 10, 20), "inclusive"),
    ("EulerDiscrete", {"use_karras_sigmas": True}, (4, 5, 7, 8, 10, 20), "inclusive"),
    ("HeunDiscrete", {"use_karras_sigmas": True}, (4, 5, 7, 8, 10, 20), "inclusive"),
    ("EulerDiscrete", {"use_exponential_sigmas": True}, (4, 5, 7, 8, 10, 20), "inclusive"),
    ("HeunDiscrete", {"use_exponential_sigmas": True}, (4, 5, 7, 8, 10, 20), "inclusive"),
    ("DEISMultistep", {"use_karras_sigmas": True}, (4, 5, 7, 8, 10, 20), "inclusive"),
    ("DEISMultistep", {"use_exponential_sigmas": True}, (4, 5, 7, 8, 10, 20), "inclusive"),
    ("DPMSolverSinglestep", {"use_karras_sigmas": True}, (4, 5, 7, 8, 10, 20), "inclusive"),
    ("DPMSolverSinglestep", {"use_exponential_sigmas": True}, (4, 5, 7, 8, 10, 20), "inclusive"),
    ("EDMEuler", {}, (4, 5, 7, 8, 10, 20), "inclusive"),
    ("EDMEuler", {"sigma_schedule": "exponential"}, (4, 5, 7, 8, 10, 20), "inclusive"),
    ("EDMDPMSolverMultistep", {}, (4, 5, 7, 8, 10, 20), "inclusive"),
    ("EDMDPMSolverMultistep", {"sigma_schedule": "exponential"}, (4, 5, 7, 8, 10, 20), "inclusive"),
]


@pytest.mark.parametrize("kind, settings, counts, form", NESTED)
def test_the_teachers_grid_contains_the_students(kind, settings, counts, form):
    scheduler = getattr(diffusers_onestep, f"Distilled{kind}Scheduler")(**settings)
    for steps in counts:
        scheduler.set_timesteps(steps)
        scheduler.check_grid()
        teacher, places = nested_teacher(scheduler, 10, None)
        assert len(teacher.nodes) - 1 == (10 * steps if form == "CN" else 10 * (steps - 1) + 1)
        for (alpha, sigma), place in zip(scheduler.nodes, places, strict=True):
            assert sigma / alpha == pytest.approx(
                teacher.nodes[place][1] / teacher.nodes[place][0], rel=1e-5, abs=1e-8
            )


@pytest.mark.parametrize(
    "kind, settings, steps",
    [
        ("DDIM", {"timestep_spacing": "leading"}, 10),
        ("DDIM", {"timestep_spacing": "linspace"}, 10),
        ("DDIM", TRAILING, 7),
        ("PNDM", {"timestep_spacing": "leading", "skip_prk_steps": True}, 10),
        ("DPMSolverMultistep", {"timestep_spacing": "leading"}, 7),
        ("DEISMultistep", {"timestep_spacing": "leading"}, 7),
        ("EulerDiscrete", {"timestep_spacing": "leading"}, 7),
    ],
)
def test_other_grids_are_refused_with_the_remedy(kind, settings, steps):
    scheduler = getattr(diffusers_onestep, f"Distilled{kind}Scheduler")(**settings)
    with pytest.raises(ValueError, match=r"with `timestep_spacing='trailing'`|`timestep_spacing` must be 'trailing'"):
        fit(scheduler, random_network, steps)
    assert scheduler.fitted_steps == []


@pytest.mark.parametrize("kind", ["EulerDiscrete", "HeunDiscrete"])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_curved_grids_that_do_not_nest_are_refused_with_the_remedy(kind, spacing):
    cls = getattr(diffusers_onestep, f"Distilled{kind}Scheduler")
    remedy = (
        f"`timestep_spacing` {spacing!r}.* Build the scheduler with `timestep_spacing='linspace'`, whose grids nest"
    )
    with pytest.raises(ValueError, match=remedy + r"\.$"):
        fit(cls(use_karras_sigmas=True, timestep_spacing=spacing), random_network, 5)
    assert fit(cls(use_karras_sigmas=True, timestep_spacing="linspace"), predictor(MILD), 5).accepted


@pytest.mark.parametrize("kind", ["exponential", "beta"])
@pytest.mark.parametrize("solver", [name for name in NAMED if not name.startswith("edm-")])
def test_teachers_with_another_curve_of_levels(solver, kind):
    """Exponential and beta levels exclude the Karras levels of some of our solvers, which replace them."""
    if kind == "beta":
        pytest.importorskip("scipy")
    scheduler = solver_for(solver, diffusers.EulerDiscreteScheduler(**{f"use_{kind}_sigmas": True}))
    scheduler.set_timesteps(5)
    scheduler.check_grid()
    assert scheduler.setting("use_karras_sigmas") or solver not in ("euler", "heun")
    nested_teacher(scheduler, 10, None)


def test_a_teacher_on_another_grid_is_refused():
    with pytest.raises(ValueError, match="is not contained"):
        fit(build("dpm2"), random_network, 5, teacher_scheduler=DDIMScheduler(timestep_spacing="leading"))


def test_scale_stops_at_the_training_steps():
    scheduler = diffusers_onestep.DistilledDPMSolverMultistepScheduler(num_train_timesteps=100, **TRAILING)
    scheduler.set_timesteps(20)
    teacher, _ = nested_teacher(scheduler, 10, None)
    assert len(teacher.timesteps) == 100


# 14. configuration


@EVERY
def test_tables_survive_disk_and_other_classes(name, tmp_path):
    scheduler = build(name)
    for steps in (5, 8):
        fit(scheduler, predict_for(name, MILD), steps)
    assert scheduler.fitted_steps == [5, 8]
    scheduler.save_pretrained(tmp_path)
    again = type(scheduler).from_pretrained(tmp_path)
    stored = json.loads((tmp_path / "scheduler_config.json").read_text())["dode_tables"]
    assert stored == json.loads(json.dumps(scheduler.config.dode_tables)) and set(stored) == {"5", "8"}
    entry = stored["5"]
    assert {"timesteps", "sigmas", "stderr", "cosine", "heldout_mse", "heldout_mse_base", "teacher"} <= entry.keys()
    noise, predict = noises(3), predict_for(name)
    expected = final(scheduler, predict, noise, 5)
    assert torch.equal(final(again, predict, noise, 5), expected)
    through = type(scheduler).from_config(scheduler._stock_class.from_config(scheduler.config).config)
    assert torch.equal(final(through, predict, noise, 5), expected)


def test_an_unfitted_number_of_steps_names_the_fitted_ones():
    scheduler, predict = build("ddim"), predict_for("ddim")
    for steps in (4, 5):
        fit(scheduler, predict, steps)
    with pytest.raises(ValueError, match=r"one of the fitted numbers \[4, 5\], but is 10"):
        scheduler.set_timesteps(10)
    lenient = type(scheduler).from_config(scheduler.config, dode_on_unfitted="base")
    assert torch.equal(final(lenient, predict, noises(2), 10), final(build("ddim"), predict, noises(2), 10))


@pytest.mark.parametrize(
    "settings, key",
    [
        ({"timestep_spacing": "linspace"}, "timesteps"),
        ({"use_karras_sigmas": True}, "timesteps"),
        ({"beta_schedule": "scaled_linear"}, "sigmas"),
        ({"solver_order": 3}, "solver"),
        ({"dode_space": "epsilon"}, "space"),
    ],
)
def test_a_table_is_refused_on_another_grid_or_solver(settings, key):
    scheduler = build("dpm2")
    fit(scheduler, predict_for("dpm2"), 5)
    with pytest.raises(ValueError, match=f"was fitted with `{key}`"):
        type(scheduler).from_config(scheduler.config, **settings).set_timesteps(5)


def test_a_table_is_refused_by_another_class():
    scheduler = build("ddim")
    fit(scheduler, predict_for("ddim"), 5)
    other = diffusers_onestep.DistilledDPMSolverMultistepScheduler.from_config(scheduler.config)
    with pytest.raises(ValueError, match="was fitted with `base_class` DDIMScheduler"):
        other.set_timesteps(5)


@pytest.mark.parametrize("value", [math.nan, math.inf, "0.1"])
def test_tables_must_be_finite_numbers(value):
    with pytest.raises(ValueError, match="`dode_tables` must map"):
        build("ddim", dode_tables={"5": {"lambdas": [0.0, value]}})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dode_space": "v"}, "`dode_space` must be one of"),
        ({"dode_first_step": "zero"}, "`dode_first_step` must be one of"),
        ({"dode_on_unfitted": "guess"}, "`dode_on_unfitted` must be one of"),
        ({"dode_tables": {5: {"lambdas": [0.0]}}}, "as strings"),
    ],
)
def test_bad_settings_name_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        build("ddim", **options)


def test_custom_timesteps_must_be_a_fitted_grid():
    scheduler = build("dpm2")
    fit(scheduler, predict_for("dpm2"), 5)
    scheduler.set_timesteps(5)
    scheduler.set_timesteps(timesteps=scheduler.timesteps.tolist())
    with pytest.raises(ValueError, match="was fitted with `timesteps`"):
        scheduler.set_timesteps(timesteps=[999, 700, 500, 300, 100])


@pytest.mark.parametrize("name, option", [("ddim", {"eta": 0.5}), ("euler", {"s_churn": 1.0})])
def test_stochastic_steps_are_refused(name, option):
    scheduler, predict = build(name), predict_for(name)
    fit(scheduler, predict, 5)
    scheduler.set_timesteps(5)
    t, x = scheduler.timesteps[0], noises(2)
    with pytest.raises(ValueError, match=f"`{next(iter(option))}` must be 0.0"):
        scheduler.step(predict(scheduler.scale_model_input(x, t), t), t, x, **option)
    with pytest.raises(ValueError, match="must be deterministic"):
        fit(diffusers_onestep.DistilledDPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), predict, 5)


def test_first_step_from_the_noise_is_an_option_of_epsilon_space():
    x, predict = noises(2), predict_for("ddim")
    for setting, expected in (("none", None), ("noise", predict(x, 999.0) - x / levels(999)[1])):
        scheduler = build("ddim", dode_first_step=setting)
        scheduler.set_timesteps(5)
        _, _, (_, difference) = scheduler.advance(predict(x, 999.0), 999, x)
        if expected is None:
            assert difference is None
        else:
            _, w = first_order(scheduler.nodes[0], scheduler.nodes[1], "epsilon")
            torch.testing.assert_close(difference, (w * expected).float(), atol=1e-4, rtol=1e-3)
    with pytest.raises(ValueError, match="`dode_first_step` must be 'none' in sample space"):
        build("dpm2", dode_first_step="noise")


def test_a_table_worse_than_the_base_is_refused():
    """Steps that are each nearer to the teacher need not end nearer: so it is here, for a good base solver."""
    scheduler = build("edm-dpm")
    report = fit(scheduler, predict_for("edm-dpm"), 5)
    assert not report.accepted and report.heldout_mse > report.heldout_mse_base
    assert scheduler.fitted_steps == [] and "REFUSED" in str(report)


# 15. pipelines


def test_pixel_pipelines_keep_the_class(tmp_path):
    scheduler, unet = build("ddim", dode_tables=table(build("ddim"), 4, [0.0, 0.3, -0.2, 0.1])), tiny_unet()
    predict = lambda x, t: unet(x, t).sample  # noqa: E731
    DDPMPipeline(unet, scheduler).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers_onestep", "DistilledDDIMScheduler"]
    again = DDPMPipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is type(scheduler) and again.scheduler.fitted_steps == [4]
    loaded = type(scheduler).from_pretrained(tmp_path, subfolder="scheduler")
    pipe = DDIMPipeline(unet, DDIMScheduler(**TRAILING))
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = loaded
    image = pipe(num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert type(pipe.scheduler) is type(scheduler)
    noise = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = final(loaded, predict, noise, 4)
    torch.testing.assert_close(torch.from_numpy(image[0, ..., 0]), (expected[0, 0] / 2 + 0.5).clamp(0, 1))
    again.set_progress_bar_config(disable=True)
    same = again(num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="np").images
    torch.testing.assert_close(torch.from_numpy(same), torch.from_numpy(image))


@EVERY
def test_signatures_are_the_stock_ones(name):
    ours, base = type(build(name)), getattr(diffusers, f"{SOLVERS[name][0]}Scheduler")
    for method in ("step", "set_timesteps"):
        assert inspect.signature(getattr(ours, method)) == inspect.signature(getattr(base, method))


# 16. cost


@pytest.mark.parametrize("name, calls, teacher", [("ddim", 5, 50), ("heun", 9, 41), ("plms", 6, 50)])
def test_the_fit_evaluates_the_network_as_often_as_it_says(name, calls, teacher):
    seen = []

    def predict(sample, t):
        assert not torch.is_grad_enabled()
        seen.append(len(sample))
        return predict_for(name)(sample, t)

    scheduler = build(name)
    report = fit(scheduler, predict, 5, noises(20), holdout=noises(30, seed=4))
    assert sum(seen) == report.network_evaluations == 20 * (teacher + calls) + 30 * (teacher + 2 * calls)
    seen.clear()
    with torch.no_grad():
        final(scheduler, predict, noises(1), 5)
    assert len(seen) == calls


# 17. clipping


def test_with_clipping_a_step_is_still_affine_in_lambda():
    blank = diffusers_onestep.DistilledDDIMScheduler(clip_sample=True, clip_sample_range=0.5, **TRAILING)
    blank.set_timesteps(5)
    predict = predictor(gaussian(0.25, mu=0.5))  # half of what it predicts is clipped
    outcomes = []
    for value in (0.0, 0.5, 1.0):
        tables = table(blank, 5, [0.0, value, 1e-9, 0.0, 0.0])
        scheduler = type(blank).from_config(blank.config, dode_tables=tables)
        scheduler.set_timesteps(5)
        x = noises(3)
        for t in scheduler.timesteps[:2]:
            output = scheduler.step(predict(x, t), t, x)
            x = output.prev_sample
        outcomes.append(x)
        assert 0.2 < (output.pred_original_sample == 0.5).float().mean() < 0.8
    torch.testing.assert_close(outcomes[1], (outcomes[0] + outcomes[2]) / 2)
    assert not torch.equal(outcomes[0], outcomes[2])


def test_first_order_steps_are_exact_for_a_constant_output():
    source, target = (0.6, 0.8), (0.8, 0.6)
    x0, eps = 1.5, -0.7
    x, expected = source[0] * x0 + source[1] * eps, target[0] * x0 + target[1] * eps
    for space, m in (("epsilon", eps), ("sample", x0)):
        a, w = first_order(source, target, space)
        assert a * x + w * m == pytest.approx(expected)


def test_conditions_are_split_with_the_noises():
    shift = torch.linspace(-1, 1, 40)[:, None]
    predict = lambda x, t, cond: predictor(gaussian(0.3))(x - cond["shift"], t)  # noqa: E731
    noise = noises(40)
    whole, parts = (
        fit(build("ddim"), predict, 5, noise, cond={"shift": shift}, batch_size=size, holdout=noises(40, seed=2))
        for size in (40, 7)
    )
    for a, b in zip(whole.lambdas, parts.lambdas, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    with pytest.raises(ValueError, match="`cond` must have 40 rows"):
        fit(build("ddim"), predict, 5, noise, cond={"shift": shift[:3]})


def test_only_classes_with_a_distilled_version_are_taken():
    with pytest.raises(ValueError, match="`scheduler` must be one of"):
        distilled_copy(diffusers.LCMScheduler())
    with pytest.raises(ValueError, match="must be a distilled scheduler, but is DDIMScheduler"):
        fit(DDIMScheduler(), random_network, 5)
    assert len(DISTILLED_SCHEDULERS) == 9


# the command, other pipelines, several processes


def fit_script(*flags):
    return script("fit_d_ode.py", *flags)


@pytest.fixture(scope="module")
def fitted_folder(teacher_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("fitted")
    flags = {"pretrained_teacher_model": teacher_folder, "output_dir": output, "solver": "ddim", "scale": 5}
    flags |= {"num_samples": 12, "num_holdout_samples": 12, "batch_size": 5}
    command = fit_script(*(part for k, v in flags.items() for part in (f"--{k}", v)), "--num_inference_steps", 4, 5)
    run(command)
    return output, command


def test_the_script_writes_a_scheduler_that_keeps_earlier_tables(fitted_folder):
    output, command = fitted_folder
    kept = diffusers_onestep.DistilledDDIMScheduler.from_pretrained(output, subfolder="scheduler")
    assert kept.fitted_steps == [4, 5]
    assert "| 5 | 5 |" in (output / "README.md").read_text() and (output / "training_args.json").is_file()
    (output / "metrics.json").write_text("{}")
    run([*command[:-2], "10", "--save_pipeline"])
    assert not (output / "metrics.json").exists() and (output / "metrics-old.json").is_file()  # of other tables
    pipe = diffusers_onestep.OneStepPipeline.from_pretrained(output)
    assert pipe.scheduler.fitted_steps == [4, 5, 10]
    assert pipe.scheduler.config.dode_tables["5"] == kept.config.dode_tables["5"]
    assert pipe(class_labels=[0, 1], num_inference_steps=4).images[1].size == (16, 16)
    with pytest.raises(ValueError, match=r"fitted numbers \[4, 5, 10\]"):
        pipe(class_labels=0)
    with pytest.raises(ValueError, match=r"fitted numbers \[4, 5, 10\], but is 7"):
        pipe(class_labels=0, num_inference_steps=7)


@pytest.mark.parametrize("pipeline", ["DDPMPipeline", "DDIMPipeline"])
@pytest.mark.parametrize("solver, classes", [("ddim", 2), ("euler", None)])
def test_a_solver_with_its_teachers_weights_samples_alike_by_both_blocks_of_its_card(
    pipeline, solver, classes, tmp_path, monkeypatch
):
    stock = getattr(diffusers, pipeline)(tiny_unet(classes=classes), DDPMScheduler())
    stock.save_pretrained(tmp_path / "teacher")
    run_script(
        "fit_d_ode", "--pretrained_teacher_model", tmp_path / "teacher", "--output_dir", tmp_path / "out",
        "--solver", solver, "--num_inference_steps", 4, "--scale", 5, "--num_samples", 12, "--num_holdout_samples", 12,
        "--batch_size", 6, "--save_pipeline",
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    images = []
    for code in python_blocks((tmp_path / "out" / "README.md").read_text()):
        exec(code, {})
        images.append((tmp_path / "sample.png").read_bytes())
    assert len(images) == 2 and images[0] == images[1]


def test_the_card_of_a_solver_of_another_size_makes_images_of_this_size(tmp_path, monkeypatch):
    """FLUX's own would be of 1024 x 1024 pixels."""
    tiny_pipeline("flux").save_pretrained(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    run_script(
        "fit_d_ode", "--pretrained_teacher_model", tmp_path / "teacher", "--output_dir", tmp_path / "out",
        "--solver", "dpmsolver++", "--num_inference_steps", 2, "--scale", 2, "--num_samples", 2,
        "--num_holdout_samples", 2, "--batch_size", 2, "--resolution", 32, "--prompts", tmp_path / "prompts.txt",
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (code,) = python_blocks((tmp_path / "out" / "README.md").read_text())
    exec(code, {})
    assert Image.open(tmp_path / "sample.png").size == (32, 32)


NOTES = {"teacher_model": "a", "revision": None, "variant": None, "guidance_scale": 2.0, "embedded_guidance": 3.5}
NOTES |= {"sample_shape": [4, 8, 8], "prompts": "prompts.txt"}


@pytest.mark.parametrize(
    "key, value",
    [
        (None, None),
        ("teacher_model", "b"),
        ("revision", "v2"),
        ("variant", "fp16"),
        ("guidance_scale", 3.0),
        ("embedded_guidance", 7.0),
        ("sample_shape", [4, 16, 16]),
        ("prompts", "others.txt"),
    ],
)
def test_tables_of_another_model_or_resolution_are_not_mixed(key, value, tmp_path):
    from types import SimpleNamespace

    take_up = runpy.run_path(str(ROOT / "training" / "fit_d_ode.py"))["take_up"]
    fitted, args = build("ddim"), SimpleNamespace(output_dir=str(tmp_path))
    fit(fitted, predict_for("ddim"), 5, notes=NOTES)
    fitted.save_pretrained(tmp_path / "scheduler")
    fresh = build("ddim")
    if key is None:
        take_up(fresh, NOTES, args)
        assert fresh.fitted_steps == [5]
        return
    with pytest.raises(ValueError, match=rf"`output_dir` must be new or hold .*differs in \['{key}'\]"):
        take_up(fresh, NOTES | {key: value}, args)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--solver", "deis"], "`output_dir` must be new or hold tables of the same solver"),
        (["--num_inference_steps", "5", "7"], "`num_inference_steps` must divide 1000"),
        (["--guidance_scale", "2.0", "--save_pipeline"], "`save_pipeline` must be False for a guided pixel teacher"),
        (["--prompts", "prompts.txt"], "`prompts` must be None for this teacher"),
    ],
)
def test_the_script_refuses_before_the_first_fit(fitted_folder, flags, message):
    output, command = fitted_folder
    before = (output / "scheduler" / "scheduler_config.json").read_text()
    with pytest.raises(ValueError, match=message):
        run_script("fit_d_ode", *command[2:], *flags)
    assert (output / "scheduler" / "scheduler_config.json").read_text() == before


def test_two_processes_fit_the_same_numbers_as_one(fitted_folder, tmp_path):
    output, command = fitted_folder
    command = [str(tmp_path) if part == str(output) else part for part in command]
    run_on_two_ranks(command)
    one, two = (
        diffusers_onestep.DistilledDDIMScheduler.from_pretrained(folder, subfolder="scheduler").config.dode_tables
        for folder in (output, tmp_path)
    )
    assert two["5"]["batch_size"] == 12
    for steps in ("4", "5"):
        for key in ("lambdas", "stderr", "heldout_mse", "heldout_mse_base"):
            assert two[steps][key] == pytest.approx(one[steps][key], rel=1e-3, abs=1e-6)


@pytest.fixture(scope="module")
def stable_diffusion():
    return tiny_pipeline("sd")


PROMPTS = ["a cat", "a red car", "two hats", "sun"]


@pytest.mark.parametrize("solver", ["ddim", "dpmsolver++", "deis", "euler", "heun"])
def test_guided_text_to_image_is_fitted_as_the_pipeline_samples(stable_diffusion, solver, tmp_path):
    teacher = diffusers_onestep.Teacher(stable_diffusion)
    assert teacher.sample_shape == (4, 8, 8)
    denoiser = teacher.guided(5.0)
    scheduler = solver_for(solver, teacher.scheduler)
    noise = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    cond = teacher.encode(PROMPTS * 2)
    report = fit(scheduler, denoiser.call_network, 5, noise, cond=cond, scale=4)
    assert report.accepted and any(any(row) for row in report.lambdas)
    scheduler.save_pretrained(tmp_path / "scheduler")
    loaded = type(scheduler).from_pretrained(tmp_path, subfolder="scheduler")
    pipe = copy.copy(stable_diffusion)
    pipe.scheduler = loaded
    images = pipe(PROMPTS, latents=noise[:4], num_inference_steps=5, guidance_scale=5.0, output_type="latent").images
    assert type(pipe.scheduler) is type(scheduler)
    with torch.no_grad():
        ours = teacher.sample(
            noise[:4], teacher.encode(PROMPTS), num_inference_steps=5, guidance_scale=5.0, scheduler=loaded
        )
    torch.testing.assert_close(images, ours, rtol=1e-3, atol=1e-3)
    base = copy.copy(stable_diffusion)
    base.scheduler = loaded._stock_class.from_config(loaded.config)
    plain = base(PROMPTS, latents=noise[:4], num_inference_steps=5, guidance_scale=5.0, output_type="latent").images
    assert (plain - images).abs().max() > 1e-3


@pytest.mark.parametrize("solver", ["ddim", "pndm", "dpmsolver++", "euler", "heun"])
def test_image_to_image_starts_part_way(stable_diffusion, solver):
    teacher = diffusers_onestep.Teacher(stable_diffusion)
    scheduler = solver_for(solver, teacher.scheduler)
    scheduler.set_timesteps(5)
    calls = len(scheduler.timesteps)
    scheduler.add_table(5, table(scheduler, 5, [0.3] * calls)["5"])
    parts = dict(stable_diffusion.components) | {"scheduler": scheduler}
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    outcome = {}
    for name, used in (("distilled", scheduler), ("base", scheduler._stock_class.from_config(scheduler.config))):
        pipe.scheduler = used
        outcome[name] = pipe(
            PROMPTS[:1],
            image=torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)),
            strength=0.6,
            num_inference_steps=5,
            guidance_scale=5.0,
            generator=torch.Generator().manual_seed(2),
            output_type="latent",
        ).images
    assert outcome["distilled"].isfinite().all()
    assert (outcome["distilled"] - outcome["base"]).abs().max() > 1e-4


def test_solvers_are_named_for_the_kind_of_teacher():
    with pytest.raises(ValueError, match=r"`solver` must be one of .*'edm-euler'.* but is 'ddim'"):
        solver_for("ddim", diffusers.EDMEulerScheduler())
    with pytest.raises(ValueError, match=r"`solver` must be one of .* for a DDPMScheduler, but is 'edm-euler'"):
        solver_for("edm-euler", DDPMScheduler())


@pytest.mark.parametrize("algorithm", ["dpmsolver", "sde-dpmsolver++"])
@pytest.mark.parametrize("solver", [name for name in NAMED if not name.startswith("edm-")])
def test_the_algorithm_of_a_teachers_solver_is_not_that_of_ours(solver, algorithm):
    teacher = DPMSolverMultistepScheduler(algorithm_type=algorithm, final_sigmas_type="sigma_min")
    scheduler, fresh = solver_for(solver, teacher), solver_for(solver, DDPMScheduler())
    assert scheduler.setting("algorithm_type") == fresh.setting("algorithm_type")
    assert scheduler.dode_space == fresh.dode_space
    report = fit(scheduler, predictor(MILD), 5)
    assert report.table["space"] == fresh.dode_space and any(any(row) for row in report.lambdas)
    assert algorithm not in report.table["solver"].values()
    fit(build("ddim"), predictor(MILD), 5, teacher_scheduler=DDIMScheduler.from_config(teacher.config, **TRAILING))


def test_the_algorithm_may_be_chosen():
    settings = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
    assert solver_for("dpmsolver++", DDPMScheduler(), **settings).dode_space == "epsilon"


FLOW_TEACHERS = [
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    # as SANA's
    DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"),
]


@pytest.mark.parametrize("flow", FLOW_TEACHERS, ids=lambda teacher: type(teacher).__name__)
@pytest.mark.parametrize("solver", ["dpmsolver++", "dpmsolver-singlestep"])
def test_flow_teachers(solver, flow):
    scheduler = solver_for(solver, flow)
    assert scheduler.config.flow_shift == 3.0
    variance = torch.linspace(0.05, 0.8, 64).double()

    def velocity(sample, t):
        sigma = t.double() / 1000
        alpha, x = 1 - sigma, sample.double()
        x0 = alpha * variance / (alpha**2 * variance + sigma**2) * x
        return ((x - x0) / sigma).to(sample.dtype)

    report = fit(scheduler, velocity, 5)
    assert report.accepted and report.heldout_mse < 0.8 * report.heldout_mse_base


@pytest.mark.parametrize("flow", FLOW_TEACHERS, ids=lambda teacher: type(teacher).__name__)
@pytest.mark.parametrize("solver", ["ddim", "pndm", "ipndm", "deis", "euler", "heun", "edm-euler"])
def test_flow_teachers_have_few_solvers(solver, flow):
    allowed = r"\['dpmsolver\+\+', 'dpmsolver-singlestep'\]"
    with pytest.raises(
        ValueError, match=rf"`solver` must be one of {allowed} for a flow matching .*, but is '{solver}'"
    ):
        solver_for(solver, flow)


def test_text_to_image_teachers_take_lists_of_prompts(stable_diffusion):
    with pytest.raises(ValueError, match="`labels` must be a list of prompts"):
        diffusers_onestep.Teacher(stable_diffusion).encode("a cat")


# what diffusers asks of every scheduler


@EVERY
def test_configs_pass_through_every_compatible_class(name):
    scheduler = build(name)
    if name == "single3":
        pytest.skip("stock schedulers replace `solver_type` heun")
    assert {type(scheduler), scheduler._stock_class} <= set(scheduler.compatibles)
    for other in scheduler.compatibles:
        if isinstance(other, DummyObject):  # stands for a class whose package is not installed
            continue
        again = type(scheduler).from_config(other.from_config(scheduler.config).config)
        assert {k: v for k, v in again.config.items() if k in scheduler.config} == dict(scheduler.config)


@EVERY
def test_a_saved_config_is_the_same_config(name, tmp_path):
    scheduler = build(name, dode_on_unfitted="base")
    scheduler.save_pretrained(tmp_path)
    expected = dict(scheduler.config)
    del expected["_use_default_values"]
    assert dict(type(scheduler).from_pretrained(tmp_path).config) == expected


@EVERY
def test_tuple_and_object_outputs_agree(name):
    for fitted in (False, True):
        outcomes = []
        for return_dict in (True, False):
            scheduler = build(name)
            scheduler.set_timesteps(10)
            if fitted:
                scheduler.add_table(10, table(scheduler, 10, [0.1] * len(scheduler.timesteps))["10"])
                scheduler.set_timesteps(10)
            x = noises(2)
            for t in scheduler.timesteps[:3]:
                output = scheduler.step(
                    random_network(scheduler.scale_model_input(x, t), t), t, x, return_dict=return_dict
                )
                x = output.prev_sample if return_dict else output[0]
            outcomes.append(output.to_tuple() if return_dict else output)
        for a, b in zip(*outcomes, strict=True):
            assert torch.equal(a, b)


@EVERY
def test_noise_can_be_added_at_any_timestep(name):
    ours, base = build(name), stock(name)
    for scheduler in (ours, base):
        scheduler.set_timesteps(10)
    x, noise, t = noises(2), noises(2, seed=1), ours.timesteps[5].reshape(1)
    assert torch.equal(ours.add_noise(x, noise, t), base.add_noise(x, noise, t))
    assert ours.init_noise_sigma == base.init_noise_sigma


# what users bring


def test_teachers_without_signal_at_their_first_timestep():
    zero = DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction", clip_sample=False, **TRAILING)
    products = zero.alphas_cumprod.double()
    variance = torch.linspace(0.1, 0.6, 64).double()

    def velocity(sample, t):
        alpha, sigma = products[int(t)].sqrt(), (1 - products[int(t)]).sqrt()
        x0 = alpha * variance / (alpha**2 * variance + sigma**2) * sample.double()
        return (alpha * (sample - alpha * x0) / sigma - sigma * x0).to(sample.dtype)

    with pytest.raises(ValueError, match="`dode_space` must be 'sample' where the first timestep holds no signal"):
        fit(solver_for("ddim", zero), velocity, 5)
    for scheduler in (solver_for("ddim", zero, dode_space="sample"), solver_for("dpmsolver++", zero)):
        report = fit(scheduler, velocity, 5)
        assert report.accepted and report.heldout_mse < 0.9 * report.heldout_mse_base


@pytest.mark.parametrize(
    "teacher, message",
    [
        (DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", **TRAILING), "must be deterministic"),
        (DDIMScheduler(prediction_type="v_prediction", **TRAILING), "must have the student's prediction type"),
    ],
)
def test_unfit_teachers_are_refused(teacher, message):
    with pytest.raises(ValueError, match=f"`teacher_scheduler` {message}"):
        fit(build("ddim"), random_network, 5, teacher_scheduler=teacher)


def test_a_teacher_whose_own_steps_miss_its_timesteps_is_refused():
    with pytest.raises(ValueError, match=r"`scale` must be one of \[5"):
        fit(build("ddim"), random_network, 8, teacher_scheduler=DDIMScheduler(clip_sample=False, **TRAILING))


def test_scales_that_do_not_nest_name_those_that_do():
    with pytest.raises(ValueError, match=r"`scale` must be one of \[2, 4, 5"):
        fit(build("ddim"), random_network, 5, scale=3)


def test_evaluations_that_are_not_finite_stop_the_fit():
    with pytest.raises(FloatingPointError, match="D-ODE: the states of 5 steps, call 0, are not finite"):
        fit(build("ddim"), lambda sample, t: sample * math.nan, 5)


def test_inputs_of_a_fit_are_checked():
    cond = {"shift": torch.zeros(20, 1)}
    predict = lambda sample, t, cond: random_network(sample, t)  # noqa: E731
    with pytest.raises(ValueError, match="`holdout_cond` must be given"):
        fit(build("ddim"), predict, 5, noises(20), holdout=noises(7), cond=cond)
    with pytest.raises(ValueError, match="`holdout_cond` must have 7 rows"):
        fit(build("ddim"), predict, 5, noises(20), holdout=noises(7), cond=cond, holdout_cond=cond)
    with pytest.raises(ValueError, match="`noise` and `batch_size` must be at least 1"):
        fit(build("ddim"), random_network, 5, batch_size=0)
    scheduler = build("ddim")
    report = fit(scheduler, predict_for("ddim"), 5, cond={}, notes={"lambdas": [9.0] * 5, "guidance_scale": 2.0})
    assert report.table["lambdas"] == [row[0] for row in report.lambdas] and report.table["guidance_scale"] == 2.0


def test_half_precision_noise_is_fitted_in_float32():
    a, b = (fit(build("dpm2"), predict_for("dpm2"), 5, x) for x in (noises(50).half(), noises(50).half().float()))
    assert a.lambdas == b.lambdas


@pytest.mark.parametrize("tables", [{"5": None}, {"five": {"lambdas": [0.0]}}])
def test_tables_must_be_tables(tables):
    with pytest.raises(ValueError, match="`dode_tables` must map"):
        build("ddim", dode_tables=tables)


def test_short_tables_and_steps_after_a_refusal_are_errors():
    blank = build("ddim")
    blank.set_timesteps(5)
    with pytest.raises(ValueError, match="`lambdas` of 5 steps must be 5, one per call, but are 3"):
        build("ddim", dode_tables=table(blank, 5, [0.1] * 3)).set_timesteps(5)
    scheduler = build("ddim", dode_tables=table(blank, 5, [0.1] * 5))
    with pytest.raises(ValueError, match="fitted numbers"):
        scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="`set_timesteps` must succeed before `step`"):
        scheduler.step(noises(1), 999, noises(1))


@pytest.mark.parametrize("key, value", [("clip_sample", True), ("prediction_type", "v_prediction")])
def test_settings_of_the_step_belong_to_the_table(key, value):
    scheduler = build("ddim")
    fit(scheduler, predict_for("ddim"), 5)
    with pytest.raises(ValueError, match="was fitted with `solver`"):
        type(scheduler).from_config(scheduler.config, **{key: value}).set_timesteps(5)


def test_subclasses_keep_their_own_methods():
    class Mine(diffusers_onestep.DistilledDDIMScheduler):
        def step(self, *args, **kwargs):
            return "mine"

    assert (
        Mine().step() == "mine" and type(distilled_copy(DDIMScheduler())) is diffusers_onestep.DistilledDDIMScheduler
    )


@pytest.mark.parametrize("name", ["ddim", "ipndm", "dpm2", "deis", "euler"])
@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_what_the_network_predicts_does_not_matter(name, kind):
    """One Gaussian in three guises: the same samples."""
    denoise = gaussian(torch.linspace(0.1, 0.6, 64))

    def predict(sample, t):
        alpha, sigma = levels(t)
        x0 = denoise(sample.double(), alpha, sigma)
        output = x0 if kind == "sample" else alpha * (sample - alpha * x0) / sigma - sigma * x0
        return output.to(sample.dtype)

    ends = []
    for scheduler, network in ((build(name), predictor(denoise)), (build(name), predict)):
        if network is predict:
            scheduler = type(scheduler).from_config(scheduler.config, prediction_type=kind)
        fit(scheduler, network, 5)
        ends.append(final(scheduler, network, noises(4), 5))
    torch.testing.assert_close(*ends, rtol=2e-2, atol=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("teacher, solver", [("fashion32", "ddim"), ("fashion-edm", "edm-euler")])
def test_the_comparison_runs_and_goes_on(teacher, solver, tmp_path):
    flags = ["--pretrained_teacher_model", teacher, "--output_dir", tmp_path, "--num_samples", 250]
    flags += ["--solvers", solver, "--fit_samples", 10]
    run(script("compare_solvers.py", *flags, "--network_evaluations", 3, 5))
    content = json.loads((tmp_path / "metrics.json").read_text())
    assert len(content["results"]) == len(content["errors"]) and (tmp_path / "solvers.png").is_file()
    assert all(row["rmse"] / 100 < row["error"] < row["rmse"] for row in content["errors"])
    assert f"| {solver} |" in (table := (tmp_path / "table.md").read_text()) and "Standard errors are at most" in table
    run(script("compare_solvers.py", *flags, "--network_evaluations", 3, 5))
    assert json.loads((tmp_path / "metrics.json").read_text())["results"] == content["results"]


@pytest.mark.parametrize(
    "options",
    [
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"prediction_type": "v_prediction"},
        {"timestep_spacing": "leading"},
        {"timestep_spacing": "linspace"},
        {"num_train_timesteps": 200},
        {"trained_betas": torch.linspace(0.001, 0.02, 1000).tolist()},
    ],
)
@pytest.mark.parametrize("name", ["ddim", "plms", "dpm2", "dpm3", "deis", "single2", "euler", "heun"])
@pytest.mark.parametrize("steps", [4, 50])
def test_without_tables_every_config_is_the_stock_class(name, options, steps):
    kind, settings = SOLVERS[name]
    ours, base = getattr(diffusers_onestep, f"Distilled{kind}Scheduler"), getattr(diffusers, f"{kind}Scheduler")
    known = inspect.signature(base.__init__).parameters
    config = settings | {k: v for k, v in options.items() if k in known}
    noise = noises(2)
    expected = final(base(**config), random_network, noise, steps)
    assert torch.equal(final(ours(**config), random_network, noise, steps), expected)
    # positional arguments, as the stock class takes them
    first = list(known)[1:3]
    positional = [config.pop(key, known[key].default) for key in first]
    assert torch.equal(final(ours(*positional, **config), random_network, noise, steps), expected)


def test_ddim_clips_only_where_the_teachers_scheduler_says_so():
    for stock, clips in ((DPMSolverMultistepScheduler(), False), (DDPMScheduler(), True)):
        assert solver_for("ddim", stock).config.clip_sample == clips
    assert not solver_for("ddim", DDPMScheduler(clip_sample=False)).config.clip_sample
