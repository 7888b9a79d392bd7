"""The invariants of the PID specification, numbered as there."""

import shutil

import pytest
import torch
from analytic import GaussianNetwork, gaussian_denoiser, kinds_of_teachers
from conftest import run, script, tiny_unet
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from families import tiny_pipeline
from torch import nn

from diffusers_onestep import (
    PID,
    Denoiser,
    EDMSchedule,
    FlowSchedule,
    GuidedDenoiser,
    NoiseSchedule,
    OneStepPipeline,
    OneStepScheduler,
    Teacher,
    VPSchedule,
)
from diffusers_onestep.denoiser import ode_time, scale_input
from diffusers_onestep.methods.distances import Perceptual, average_pooling, image_distance
from diffusers_onestep.methods.pid import central_residual, residual, time_grid, trajectory
from diffusers_onestep.schedulers import student_scheduler

MU, S, T = 0.3, 0.5, 80.0
VP, FLOW = VPSchedule(DDPMScheduler().alphas_cumprod), FlowSchedule()


def exact(z, t, t_max=T):
    return MU + (z - MU) * ((S**2 + t**2) / (S**2 + t_max**2)) ** 0.5


def denoised(x, t):
    return (S**2 * x + t**2 * MU) / (S**2 + t**2)


def exact_f(z, t):
    """The ideal network, whose trajectory is the solution."""
    return (exact(z, t) - t / T * z) / (1 - t / T)


def starts(n=4000):
    return T * torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class TimeMLP(nn.Module):
    """A small student of pixels `(B, 1, 1, 1)`, as smooth in time as a U-Net's embedding."""

    def __init__(self, width=64):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.last = nn.Linear(width, 1)

    def forward(self, sample, timestep, class_labels=None):
        t = timestep.float().reshape(-1, 1)
        x = sample.reshape(-1, 1)
        return self.last(self.layers(torch.cat([x, t, torch.sin(3 * t)], 1))).reshape(sample.shape)


def test_i1_boundary_holds_to_the_bit():
    z, f = 80 * torch.randn(100), torch.randn(100)
    assert torch.equal(trajectory(f, z, torch.tensor(T), T), z)
    assert torch.equal(trajectory(f, z, torch.tensor(0.0), T), f)
    for schedule, kind in ((EDMSchedule(), "edm"), (FLOW, "flow_prediction"), (VP, "epsilon")):
        distiller = PID(Denoiser(TimeMLP(), schedule, kind), distance="l2", sample_shape=(1, 1, 1))
        start, index = distiller.init_noise_sigma * z.reshape(-1, 1, 1, 1), torch.zeros(100, dtype=torch.long)
        x_t = distiller.point(distiller.f(start, index), start, index)
        if schedule is VP:  # in the teacher's coordinates: over its scale and times it again
            torch.testing.assert_close(x_t, start, rtol=3e-7, atol=0)
        else:
            assert torch.equal(x_t, start)


@pytest.mark.parametrize("t", [80, 10, 1, 0.1, 0.002])
def test_i2_exact_residual(t):
    z = starts().requires_grad_(True)
    time = torch.full_like(z, t, requires_grad=True)
    x = exact(z, time)
    (slope,) = torch.autograd.grad(x.sum(), time)
    assert (x - time * slope - denoised(x, time)).abs().max() < 1e-12


def grid_residual(n, central=False):
    z, grid = starts(), time_grid(n, 0.002, T)
    worst = 0.0
    for i in range(1, n - 1):
        t, s, before = grid[i], grid[i + 1], grid[i - 1]
        if central:
            A = central_residual(*(exact_f(z, v) for v in (t, before, s)), t, before, s, T) if i > 1 else None
        else:
            A = residual(exact_f(z, t), exact_f(z, s), t, s, T)
        if A is not None:
            worst = max(worst, (A - denoised(exact(z, t), t)).square().mean().sqrt().item())
    return worst


@pytest.mark.parametrize("n, rms", [(35, 0.031), (80, 0.013), (150, 0.0068), (250, 0.0041), (500, 0.0020)])
def test_i3_first_order_residual(n, rms):
    assert grid_residual(n) == pytest.approx(rms, rel=0.08)


@pytest.mark.parametrize("n, rms", [(50, 2.0e-3), (100, 4.9e-4), (200, 1.2e-4), (400, 3.0e-5)])
def test_i4_central_rule_is_second_order(n, rms):
    assert grid_residual(n, central=True) == pytest.approx(rms, rel=0.1)


EULER = {18: 0.074, 35: 0.0387, 80: 0.0171, 150: 0.0091, 250: 0.0055, 1000: 0.0014}


def euler(z, grid):
    states = [z]
    for t, s in zip(grid, grid[1:], strict=False):
        states.append(states[-1] + (s - t) * (states[-1] - denoised(states[-1], t)) / t)
    return states


@pytest.mark.parametrize("n, error", EULER.items())
def test_i5_the_optimum_is_the_euler_solution(n, error):
    z, grid = starts(), time_grid(n, 0.002, T)
    states = euler(z, grid)
    f = [(x - t / T * z) / (1 - t / T) for x, t in zip(states[1:], grid[1:], strict=True)]
    for i in range(1, n - 1):
        A = residual(f[i - 1], f[i], grid[i], grid[i + 1], T)
        assert (A - denoised(states[i], grid[i])).square().mean() < 1e-12
    assert (f[0] - denoised(z, torch.tensor(T))).square().mean() < 1e-12  # index 0, where w1 = 0
    # the error is affine in z: starts at plus and minus one standard deviation give its mean square exactly
    z = torch.tensor([-T, T], dtype=torch.float64)
    rms = (euler(z, grid)[-1] - exact(z, grid[-1])).square().mean().sqrt().item()
    # the specification's numbers are of random starts: each is 1.5 to 4 % below the exact one
    assert error < rms < 1.045 * error


@pytest.mark.parametrize("n", EULER)
def test_i5_the_methods_own_loss_vanishes_at_the_euler_solution(n):
    """Of a student that tabulates it, on every index but the last, which asks for the reversed step."""
    distiller = edm_pid(student=TimeMLP(), num_points=n)
    noise, grid = starts(16).reshape(-1, 1, 1, 1) / T, distiller.times
    t_max = grid[0]  # 80, up to the rounding of a timestep
    states = euler(t_max * noise, grid)
    f = [(x - t * noise) / (1 - t / t_max) for x, t in zip(states[1:], grid[1:], strict=True)]
    table = torch.stack([torch.zeros_like(noise), *f]).float()  # the start's own f has no weight
    distiller.f = lambda x_start, index, cond, repeats: table[index, torch.arange(16).repeat(repeats)]
    for i in range(n - 1):
        assert distiller.loss(noise.float(), torch.full((16,), i)) < 1e-10  # float32's rounding, times w2 of up to 119


def test_i6_the_noise_cancels():
    f_t, f_s = torch.randn(2, 50, dtype=torch.float64)
    t, s = torch.tensor(7.0, dtype=torch.float64), torch.tensor(6.2, dtype=torch.float64)
    for z in starts(100).split(50):
        x_t, x_s = trajectory(f_t, z, t, T), trajectory(f_s, z, s, T)
        direct = x_t - t * (x_t - x_s) / (t - s)
        torch.testing.assert_close(residual(f_t, f_s, t, s, T), direct, atol=1e-10, rtol=0)
        torch.testing.assert_close(central_residual(f_t, f_t, f_s, t, t, s, T), direct, atol=1e-10, rtol=0)
    ones = torch.ones(1, dtype=torch.float64)
    torch.testing.assert_close(residual(ones, ones, t, s, T), ones)


def test_i7_limits_of_the_ideal_network():
    z = starts()
    torch.testing.assert_close(exact_f(z, T - 1e-4), denoised(z, T), atol=1e-4, rtol=0)
    torch.testing.assert_close(exact_f(z, 0.0), exact(z, 0.0))


def edm_pid(teacher=None, student=None, **options):
    teacher = teacher or gaussian_denoiser(EDMSchedule(), "edm", MU, S)
    options = {"distance": "l2", "head": "network", "sample_shape": (1, 1, 1)} | options
    return PID(teacher, student=student and Denoiser(student, EDMSchedule(), "edm"), **options)


def test_i8_i9_gradients_reach_the_student_alone_and_in_the_stated_ratio():
    class Steep(GaussianNetwork):
        def forward(self, sample, timestep, class_labels=None):
            out = super().forward(sample, timestep)
            return out + factor * (sample - sample.detach())  # another Jacobian, the same values

    grads, factor = [], 0.0
    for steepness in (0.0, 5.0):
        factor = steepness
        torch.manual_seed(0)
        distiller = edm_pid(Denoiser(Steep(EDMSchedule(), "edm", MU, S), EDMSchedule(), "edm"), TimeMLP())
        captured = {}

        def keep(x_start, index, cond, repeats=1, f=distiller.f, captured=captured):
            captured["f"] = f(x_start, index, cond, repeats)
            captured["f"].retain_grad()
            return captured["f"]

        distiller.f = keep
        index = torch.tensor([0, 3, 100, 249])
        distiller.loss(torch.ones(4, 1, 1, 1), index).backward()
        f_t, f_s = captured["f"].grad.flatten().chunk(2)
        grads.append(captured["f"].grad)
        t, s = distiller.times[index], distiller.times[torch.where(index < 249, index + 1, index - 1)]
        w1, w2 = -s * (1 - t / distiller.times[0]), t * (1 - s / distiller.times[0])
        torch.testing.assert_close((f_t * w2).double(), (f_s * w1).double(), rtol=1e-3, atol=1e-9)
        assert f_t[0] == 0  # i9: w1 vanishes at the start
        assert all(p.grad is None for p in distiller.teacher.parameters())
        assert all(p.grad is not None for p in distiller.student.network.parameters())
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("rule, times", [("first", 2), ("second", 3), ("exact", 1)])
def test_a_step_is_one_call_of_the_student_for_all_its_times_and_one_of_the_teacher(rule, times):
    distiller, calls = edm_pid(student=TimeMLP(), rule=rule), []
    for name in ("student", "teacher"):
        network = getattr(distiller, name).network
        network.register_forward_hook(
            lambda module, args, out, name=name: calls.append((name, len(out), torch.is_grad_enabled()))
        )
    list(distiller.updates({"batch_size": 4}, torch.Generator().manual_seed(0)))
    assert calls == [("student", 4 * times, True), ("teacher", 4, False)]


def test_i10_point_masses():
    c, z = 0.7, starts(100)
    for n in (3, 18, 250):
        grid = time_grid(n, 0.002, T)
        x = [c + t / T * (z - c) for t in grid]
        f = [(x_t - t / T * z) / (1 - t / T) for x_t, t in zip(x[1:], grid[1:], strict=True)]
        assert all((v - c).abs().max() < 1e-10 for v in f)  # the ideal network is constant
        for i in range(1, n - 1):
            assert (residual(f[i - 1], f[i], grid[i], grid[i + 1], T) - c).abs().max() < 1e-10
    constant = nn.Module()
    constant.value = nn.Parameter(torch.tensor(-1.0))
    constant.forward = lambda sample, timestep, class_labels=None: constant.value.expand(sample.shape)
    distiller = edm_pid(gaussian_denoiser(EDMSchedule(), "edm", c, 1e-6), constant)
    value = distiller.student.network.value
    distiller.student.network.forward = lambda sample, timestep, class_labels=None: value.expand(sample.shape)
    optimizer = torch.optim.Adam([value], lr=0.05)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        ((_, loss),) = distiller.updates({"batch_size": 64}, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert value.item() == pytest.approx(c, abs=2e-3)


def test_i11_grid():
    grid = time_grid(250, 0.002, T)
    expected = torch.tensor([80, 78.262, 0.002208, 0.002], dtype=torch.float64)
    torch.testing.assert_close(grid[[0, 1, 248, 249]], expected, rtol=3e-5, atol=0)
    assert (grid.diff() < 0).all()
    torch.testing.assert_close(edm_pid(student=TimeMLP()).times, grid, rtol=1e-5, atol=0)


@pytest.mark.parametrize("schedule, prediction_type", kinds_of_teachers(VP))
def test_i12_every_kind_of_teacher_gives_the_same_denoiser_and_solution(schedule, prediction_type):
    """At any level the teacher's x0 is the Gaussian's, and the exact solution leaves no residual."""
    teacher = gaussian_denoiser(schedule, prediction_type, MU, S, torch.float64)
    distiller = PID(teacher, num_points=150, distance="l2", sample_shape=(1, 1, 1))
    u, c = ode_time(schedule, distiller.timesteps)
    noise = torch.randn(64, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    start = distiller.init_noise_sigma * noise / c[0]
    flow = isinstance(schedule, FlowSchedule)

    def solution(level):
        """Of the ODE in its own time: VE for all but flow, where alpha = 1 - u."""
        if flow:
            spread = lambda v: (((1 - v) * S) ** 2 + v**2).sqrt()  # noqa: E731
            return (1 - level) * MU + (start - (1 - u[0]) * MU) * spread(level) / spread(u[0])
        return MU + (start - MU) * ((S**2 + level**2) / (S**2 + u[0] ** 2)).sqrt()

    for i in (1, 40, len(u) - 2):
        x = solution(u[i])
        x0 = teacher(c[i] * x, distiller.timesteps[i].expand(64))
        alpha, sigma = ((1 - u[i]), u[i]) if flow else (1.0, u[i])
        expected = MU + alpha * S**2 / (alpha**2 * S**2 + sigma**2) * (x - alpha * MU)
        torch.testing.assert_close(x0, expected, rtol=0, atol=1e-10)
        f = [(solution(v) - v / u[0] * start) / (1 - v / u[0]) for v in (u[i], u[i + 1])]
        A = residual(*f, u[i], u[i + 1], u[0])
        assert (A - x0).square().mean().sqrt() < 0.03


class Guise(nn.Module):
    """One function of a start and a noise level, as the networks of all schedules would have to compute it."""

    def __init__(self, function, schedule):
        super().__init__()
        self.function, self.schedule = function, schedule

    def forward(self, sample, timestep, class_labels=None):
        level = self.schedule.ratio(timestep).log() / 4
        return self.function(self.scale * sample, level)


def test_i12_the_loss_does_not_depend_on_the_schedule_nor_on_what_the_teacher_predicts():
    """Flow's samples are `x / (1 + u)` of the others at `s = u / (1 + u)`, which maps lines to lines and clean samples
    to themselves: even the secant of the residual is the same one."""
    places = torch.tensor([820, 700, 560, 400, 250, 120, 40, 5, 0])
    levels = VP.ratio(places)
    timesteps = {VPSchedule: places, FlowSchedule: 1000 * levels / (1 + levels), EDMSchedule: levels.log() / 4}
    noise = torch.randn(9, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = {}
    for schedule, kind in kinds_of_teachers(VP):
        torch.manual_seed(0)
        teacher, student = gaussian_denoiser(schedule, kind, MU, S, torch.float64), Guise(TimeMLP(), schedule)
        options = {"distance": torch.sub, "head": "network", "sample_shape": (1, 1, 1)}
        distiller = PID(teacher, student=Denoiser(student.double(), schedule, kind), num_points=9, **options)
        on_levels(distiller, timesteps[type(schedule)])
        difference = distiller.loss(noise, torch.arange(9))
        (difference**2).mean().backward()
        gradient = torch.cat([p.grad.flatten() for p in distiller.student.network.parameters()])
        found[kind] = difference.detach(), gradient
    for difference, gradient in found.values():
        torch.testing.assert_close(difference, found["epsilon"][0], rtol=0, atol=1e-6)
        torch.testing.assert_close(gradient, found["epsilon"][1], rtol=0, atol=1e-6)
    assert found["epsilon"][0].abs().min() > 1e-3 and len(found) == 5


def on_levels(distiller, timesteps):
    """Put a distiller on a grid of our choice; its student hears of starts of unit variance."""
    schedule = distiller.teacher.schedule
    u, scale = ode_time(schedule, timesteps)
    distiller.timesteps, distiller.times, distiller.start = timesteps, u.flatten(), timesteps[0].item()
    distiller.init_noise_sigma = (u[0] * scale[0]).item()
    seen = scale_input(schedule, torch.full((1, 1, 1, 1), distiller.init_noise_sigma).double(), timesteps[:1])
    distiller.student.network.scale = 1 / seen.item()


@pytest.mark.parametrize("rule, head", [("first", "network"), ("second", "network"), ("first", "teacher")])
def test_i13_a_trained_toy_has_the_pushforwards_moments(rule, head):
    torch.manual_seed(0)
    distiller = edm_pid(student=TimeMLP(), rule=rule, head=head)
    network = distiller.student.network
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2500)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2500):
        ((name, loss),) = distiller.updates({"batch_size": 256}, generator)
        assert name == "student"
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    quantiles = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    noise = (2**0.5 * torch.erfinv(2 * quantiles - 1)).float().reshape(-1, 1, 1, 1)
    x = distiller.sample(noise / noise.std())
    mean, std = MU - MU * S / (S**2 + T**2) ** 0.5, S * T / (S**2 + T**2) ** 0.5
    # the first rule's very optimum, Euler's solution on the paper's 250 points, has a spread 1.13 % too small
    assert x.mean().item() == pytest.approx(mean, rel=0.02) and x.std().item() == pytest.approx(std, rel=0.02)


@pytest.mark.parametrize("head", ["network", "teacher"])
@pytest.mark.parametrize(
    "scheduler, schedule, prediction_type",
    [
        (DDPMScheduler(), VP, "epsilon"),
        (EDMEulerScheduler(), EDMSchedule(), "edm"),
        (FlowMatchEulerDiscreteScheduler(), FlowSchedule(), "flow_prediction"),
    ],
)
def test_i14_sampling_is_one_call_and_the_pipeline_does_the_same(scheduler, schedule, prediction_type, head, tmp_path):
    unet = tiny_unet(classes=3)
    distiller = PID(Denoiser(unet, schedule, prediction_type), distance="l2", head=head, num_points=20)
    network = distiller.student.network.eval()
    saved = student_scheduler(scheduler, prediction_type, **distiller.student_settings)
    assert isinstance(saved, OneStepScheduler)
    OneStepPipeline(network, saved).save_pretrained(tmp_path)
    pipe = OneStepPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    seen = []
    pipe.unet.register_forward_hook(lambda *_: seen.append(1))
    noise, labels = torch.randn(3, 1, 16, 16), torch.tensor([0, 1, 2])
    images = pipe(latents=noise, class_labels=labels, output_type="latent").images
    assert seen == [1]
    torch.testing.assert_close(images, distiller.sample(noise, {"class_labels": labels}), rtol=1e-5, atol=1e-5)
    index = torch.full((3,), len(distiller.timesteps) - 1)
    f = distiller.f(distiller.init_noise_sigma * noise, index, {"class_labels": labels})
    u, c = ode_time(schedule, distiller.timesteps[:1])
    start = distiller.init_noise_sigma * noise / c.float()
    torch.testing.assert_close(
        images, trajectory(f, start, distiller.times[-1].float(), u.float()), rtol=1e-5, atol=1e-5
    )


def test_heads_at_the_start():
    """With the teacher's head training starts at the teacher's x0; EDM's published head at about twice its x0."""
    unet = UNet2DModel(**tiny_unet().config).eval()
    noise = torch.randn(4, 1, 16, 16)
    for schedule, kind in ((VP, "epsilon"), (EDMSchedule(), "edm")):
        teacher = Denoiser(unet, schedule, kind)
        start = torch.zeros(4, dtype=torch.long)
        for head in ("teacher", "network"):
            distiller = PID(teacher, distance="l2", head=head)
            x = distiller.init_noise_sigma * noise
            x0 = teacher(x, distiller.timesteps[:1].expand(4))
            f = distiller.f(x, start, {})
            if head == "teacher":
                torch.testing.assert_close(f, x0.float(), rtol=1e-3, atol=1e-3)
            elif kind == "edm":
                torch.testing.assert_close(f, 2 * x0.float(), rtol=0.05, atol=0.02)


def test_i15_precision_of_the_network_does_not_reach_the_residual():
    torch.manual_seed(0)
    losses = []
    for dtype in (None, torch.bfloat16):
        distiller = edm_pid(student=TimeMLP())
        torch.manual_seed(1)
        for p in distiller.student.network.parameters():
            nn.init.normal_(p, std=0.3)
        distiller.student.autocast_dtype = dtype
        index = torch.randint(250, (2000,), generator=torch.Generator().manual_seed(2))
        noise = torch.randn(2000, 1, 1, 1, generator=torch.Generator().manual_seed(3))
        losses.append(distiller.loss(noise, index).item())
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_the_exact_derivative_is_the_limit_of_the_first_order_rule():
    torch.manual_seed(0)
    distiller = edm_pid(student=TimeMLP(), num_points=2000)
    noise, index = torch.randn(16, 1, 1, 1), torch.randint(200, 1500, (16,))
    x_start = distiller.init_noise_sigma * noise
    f, slope = distiller.derivative(x_start, index, None)
    (u, _), (v, _) = (ode_time(distiller.teacher.schedule, distiller.timesteps[i]) for i in (index, index + 1))
    g = distiller.f(x_start, index + 1, None)
    torch.testing.assert_close(slope.double(), (f - g).double() / (u - v), rtol=0.05, atol=1e-4)


class Solution(nn.Module):
    """The ideal network of the EDM toy, whose trajectory is the solution of its ODE."""

    def forward(self, sample, timestep, class_labels=None):
        z = (S**2 + T**2) ** 0.5 * sample.double()
        return exact_f(z, (4 * timestep.double()).exp().reshape(-1, 1, 1, 1)).to(sample.dtype)


def test_i2_the_exact_rules_own_loss_vanishes_at_the_solution():
    """Where the first-order rule leaves its residual of order 1 / N."""
    noise = starts(248).float().reshape(-1, 1, 1, 1) / T
    exact_rule, first = (edm_pid(student=Solution(), rule=rule) for rule in ("exact", "first"))
    assert exact_rule.loss(noise, torch.arange(1, 249)) < 1e-8 < 1e-6 < first.loss(noise, torch.arange(1, 249))


@pytest.mark.parametrize("schedule, kind", [(VP, "epsilon"), (FlowSchedule(), "flow_prediction")])
def test_the_exact_rule_trains_a_real_network(schedule, kind):
    distiller = PID(Denoiser(tiny_unet(classes=3), schedule, kind), distance="l2", rule="exact", num_points=20)
    batch = {"batch_size": 2, "cond": {"class_labels": torch.tensor([0, 1])}}
    ((_, loss),) = distiller.updates(batch)
    loss.backward()
    assert loss.isfinite() and any(p.grad.abs().sum() > 0 for p in distiller.student.network.parameters())


def test_the_script_trains_saves_and_goes_on_bit_for_bit(teacher_folder, tmp_path):
    flags = {"pretrained_teacher_model": teacher_folder, "distance": "l2", "num_points": 18, "train_batch_size": 2}
    flags |= {"max_train_steps": 4, "checkpointing_steps": 2, "ema_halflife_kimg": 0.01}
    folders = [tmp_path / name for name in ("whole", "resumed")]
    for folder in folders:
        command = script("train_pid.py", *(p for k, v in flags.items() for p in (f"--{k}", v)), "--output_dir", folder)
        run(command)
    shutil.rmtree(folders[1] / "checkpoints" / "step-000004")
    run([*command, "--resume_from_checkpoint", "latest"])
    weights = [(f / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() for f in folders]
    assert weights[0] == weights[1]
    pipe = OneStepPipeline.from_pretrained(folders[0])
    assert pipe.scheduler.config.parameterization == "trajectory"
    assert pipe(class_labels=[0, 2]).images[0].size == (16, 16)
    with pytest.raises(ValueError, match="`num_inference_steps` must be 1"):
        pipe(class_labels=0, num_inference_steps=4)


def test_vp_grids_lie_on_the_teachers_timesteps_without_repeats():
    distiller = PID(Denoiser(tiny_unet(), VP, "epsilon"), distance="l2", num_points=250)
    assert distiller.timesteps.dtype == torch.long and (distiller.timesteps.diff() < 0).all()
    assert distiller.timesteps[-1] == 0 and distiller.times[0] == pytest.approx(80, rel=0.02)
    assert 100 < len(distiller.timesteps) <= 250


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rule": "third"}, "`rule` must be 'first', 'second' or 'exact', but is 'third'"),
        ({"head": "v"}, "`head` must be 'network' or 'teacher'"),
        ({"num_points": 2}, "`num_points` must be at least 3"),
        ({"start_ratio": 500.0}, "`start_ratio` must lie between"),
        ({"start_ratio": 0.0105}, r"`start_ratio` must leave at least 3 timesteps of the teacher, .* leaves \[0"),
        ({"start_ratio": 0.012}, r"`start_ratio` must leave at least 3 timesteps of the teacher, .* leaves \[0"),
        ({"distance": "ssim"}, "`distance` must be one of"),
    ],
)
def test_bad_options_name_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        PID(Denoiser(tiny_unet(), VP, "epsilon"), **{"distance": "l2"} | options)


def test_labels_go_to_the_student_and_with_guidance_to_the_teacher():
    plain = Denoiser(tiny_unet(classes=3), VP, "epsilon")
    student = Denoiser(tiny_unet(classes=3, seed=1), VP, "epsilon")
    compared = []
    distiller = PID(
        GuidedDenoiser(plain, 3.0, {"class_labels": torch.tensor([2])}),
        student=student,
        num_points=20,
        distance=lambda a, b: (compared.append((a, b)), ((a - b) ** 2).mean())[1],
    )
    noise, index, labels = torch.randn(2, 1, 16, 16), torch.tensor([3, 8]), torch.tensor([0, 1])
    distiller.loss(noise, index, {"class_labels": labels})
    ((A, target),) = compared
    x_start, t = distiller.init_noise_sigma * noise, distiller.timesteps[index]
    with torch.no_grad():
        f_t, f_s = (distiller.f(x_start, i, {"class_labels": labels}) for i in (index, index + 1))
        x_t = distiller.point(f_t, x_start, index)
        cond, null = (plain(x_t, t, {"class_labels": c}) for c in (labels, torch.full((2,), 2)))
    u_t, u_s, u_max = (distiller.times[i].float().reshape(-1, 1, 1, 1) for i in (index, index + 1, 0 * index))
    torch.testing.assert_close(target, null + 3.0 * (cond - null), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(A, residual(f_t, f_s, u_t, u_s, u_max), rtol=1e-4, atol=1e-4)
    assert (cond - null).abs().max() > 1e-3


def test_the_papers_defaults_need_nothing_but_a_teacher():
    assert len(PID(Denoiser(tiny_unet(), EDMSchedule(), "edm")).timesteps) == 250


def test_stlpips_is_a_distance_of_images():
    distance = image_distance("stlpips")
    a = torch.rand(2, 1, 32, 32) * 2 - 1
    near, far = (a + s * torch.randn_like(a) for s in (0.05, 0.5))
    assert distance(a, a) == pytest.approx(0, abs=1e-5) and 0 < distance(near, a) < distance(far, a)
    with pytest.raises(ValueError, match=r"`b` must be images in \[-1, 1\]"):
        distance(a, 127 * a)
    assert distance(a, a + 10 * torch.randn_like(a)) > 0  # what an epsilon teacher says to a young student
    with pytest.raises(ValueError, match="must have 1 or 3 channels"):
        distance(torch.rand(1, 4, 32, 32), torch.rand(1, 4, 32, 32))


def test_lpips_average_is_lpips_without_max_pooling():
    lpips = pytest.importorskip("lpips")
    torch.manual_seed(0)
    network = lpips.LPIPS(net="vgg", verbose=False, pretrained=False, pnet_rand=True)
    a, b = torch.rand(2, 1, 3, 64, 64)
    before = network(a, b)
    average_pooling(network)
    kinds = [type(module) for module in network.modules()]
    assert nn.MaxPool2d not in kinds and kinds.count(nn.AvgPool2d) == 4
    assert before != network(a, b) and network(a, a).item() == 0


def test_flow_grids_are_shifted_as_the_teachers_scheduler_is():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    teacher = gaussian_denoiser(NoiseSchedule.from_scheduler(scheduler), "flow_prediction", MU, S)
    distiller = PID(teacher, num_points=1000, distance="l2", sample_shape=(1, 1, 1))
    torch.testing.assert_close(distiller.timesteps, scheduler.timesteps.double(), rtol=1e-5, atol=1e-3)


def test_any_network_can_be_a_distance():
    distance = Perceptual(lambda_module(lambda a, b: ((a - b) ** 2).mean((1, 2, 3))), 8)
    a, b = torch.rand(2, 3, 3, 16, 16)
    assert distance(a, b).item() == pytest.approx(((a - b) ** 2).mean().item())


def lambda_module(function):
    module = nn.Module()
    module.forward = function
    return module


def test_flux_in_lower_precision_is_refused():
    """It rounds its times, and the derivative along the trajectory with them (specification, section 10)."""
    teacher = Teacher(tiny_pipeline("flux"), resolution=16)
    distiller = PID(teacher, distance="l2", num_points=4)
    distiller.student.autocast_dtype = torch.bfloat16
    with pytest.raises(ValueError, match="`mixed_precision` must be 'no' for PID on FLUX"):
        next(distiller.updates({"batch_size": 1, "cond": teacher.encode(["a"])}))
