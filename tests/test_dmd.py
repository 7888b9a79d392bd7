"""The invariants of the DMD specification, numbered as there."""

import math
from functools import partial

import pytest
import torch
from analytic import gaussian_denoiser, hermite_grid, kinds_of_teachers
from conftest import tiny_unet
from diffusers import DDPMScheduler
from torch._subclasses.fake_tensor import FakeTensor

from diffusers_onestep import DMD, Denoiser, EDMSchedule, FlowSchedule, GuidedDenoiser, VPSchedule
from diffusers_onestep.denoiser import predict_x0
from diffusers_onestep.methods.base import normal
from diffusers_onestep.methods.distances import image_distance
from diffusers_onestep.methods.dmd import distribution_matching_loss, gan_losses
from diffusers_onestep.methods.gan import GANHead

VP = VPSchedule(torch.linspace(0.9999, 0.01, 1000))
EDM = EDMSchedule()
BATCH = {"batch_size": 4, "cond": {"class_labels": torch.tensor([0, 1, 2, 0])}}


def small_teacher():
    return Denoiser(tiny_unet(classes=3), VP, "epsilon")


@pytest.mark.parametrize("schedule, prediction_type", kinds_of_teachers(VP))
def test_i1_every_output_is_read_as_the_same_sample_and_score(schedule, prediction_type):
    t = schedule.timestep(torch.tensor([0.05, 0.5, 2.5, 10.0]))
    x0, noise = torch.randn(2, 4, 1, 3, 3, dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma(t.double())
    x_t, root = alpha * x0 + sigma * noise, (sigma**2 + 0.25).sqrt()
    model_output = {
        "epsilon": noise,
        "v_prediction": alpha * noise - sigma * x0,
        "sample": x0,
        "flow_prediction": noise - x0,
        "edm": (x0 - 0.25 / root**2 * x_t) * root / (0.5 * sigma),
    }[prediction_type]
    read = predict_x0(schedule, prediction_type, x_t, t, model_output)
    torch.testing.assert_close(read, x0, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close((alpha * read - x_t) / sigma**2, -noise / sigma, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("schedule, prediction_type, t", [(VP, "epsilon", 440), (EDM, "edm", 0.1)])
def test_i2_i3_kl_gradient_of_gaussians(schedule, prediction_type, t):
    """E[fake - teacher] and its product with z, for teacher N(m, s**2) and student a + b z."""
    m, s, a, b = 0.7, 0.5, -0.2, 0.8
    teacher, fake = (gaussian_denoiser(schedule, prediction_type, *p) for p in ((m, s), (a, b)))
    z, noise, weight = hermite_grid()
    alpha, sigma = (v.double().item() for v in schedule.alpha_sigma(torch.tensor([t], dtype=torch.float64)))
    x_t = (alpha * (a + b * z) + sigma * noise).reshape(-1, 1, 1, 1)
    ts = torch.full((len(z),), t)
    difference = (fake(x_t, ts) - teacher(x_t, ts)).flatten()
    v_r, v_f = alpha**2 * s**2 + sigma**2, alpha**2 * b**2 + sigma**2
    assert (weight * difference).sum().item() == pytest.approx(sigma**2 * (a - m) / v_r, abs=1e-5)
    expected = sigma**2 * b * (1 / v_r - 1 / v_f)
    assert (weight * difference * z).sum().item() == pytest.approx(expected, abs=1e-5)
    # alpha * (s_fake - s_teacher) is alpha**2 / sigma**2 of it, and the gradient of KL
    student = torch.tensor([a, b], dtype=torch.float64, requires_grad=True)
    spread = alpha**2 * student[1] ** 2 + sigma**2
    kl = 0.5 * (spread / v_r - 1 - (spread / v_r).log()) + alpha**2 * (student[0] - m) ** 2 / (2 * v_r)
    for factor, gradient in zip((1, z), torch.autograd.grad(kl, student)[0].tolist(), strict=True):
        scores = (alpha / sigma) ** 2 * (weight * difference * factor).sum().item()
        assert scores == pytest.approx(gradient, rel=1e-4)


def test_i4_matched_gaussians_give_no_gradient_pointwise():
    """The same data seen by an epsilon and by a v network."""
    teacher, fake = gaussian_denoiser(VP, "epsilon", 0.3, 0.5), gaussian_denoiser(VP, "v_prediction", 0.3, 0.5)
    x_t, t = torch.randn(6, 1, 2, 2, dtype=torch.float64), torch.tensor([1, 50, 200, 440, 800, 999])
    x0 = torch.randn(6, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    distribution_matching_loss(x0, teacher(x_t, t), fake(x_t, t)).backward()
    assert x0.grad.abs().max() < 1e-6


def test_i5_gradient_and_value():
    x0, teacher_x0, fake_x0 = torch.randn(3, 4, 2, 3, 3, dtype=torch.float64)
    for v in (x0, teacher_x0, fake_x0):
        v.requires_grad_(True)
    loss = distribution_matching_loss(x0, teacher_x0, fake_x0)
    w = (x0 - teacher_x0).abs().mean((1, 2, 3), keepdim=True)
    g = ((fake_x0 - teacher_x0) / w).detach()
    torch.testing.assert_close(loss, 0.5 * (g**2).mean())
    loss.backward()
    torch.testing.assert_close(x0.grad, g / x0.numel())
    assert teacher_x0.grad is None and fake_x0.grad is None


def test_i6_scale_shift_and_batch_invariance():
    x0, teacher_x0, fake_x0 = torch.randn(3, 4, 2, 3, 3, dtype=torch.float64)

    def gradient(*v):
        x = v[0].clone().requires_grad_(True)
        return torch.autograd.grad(distribution_matching_loss(x, *v[1:]), x)[0] * x.numel()

    g = gradient(x0, teacher_x0, fake_x0)
    torch.testing.assert_close(gradient(*(7 * v for v in (x0, teacher_x0, fake_x0))), g)
    torch.testing.assert_close(gradient(*(v + 3 for v in (x0, teacher_x0, fake_x0))), g)
    torch.testing.assert_close(gradient(*(v[1:2] for v in (x0, teacher_x0, fake_x0))), g[1:2])


@pytest.mark.parametrize("x0", [torch.zeros(2, 1, 3, 3), torch.linspace(-1, 1, 18).reshape(2, 1, 3, 3)])
def test_i24_floor_keeps_the_gradient_finite(x0):
    x0 = x0.clone().requires_grad_(True)
    loss = distribution_matching_loss(x0, x0.detach(), x0.detach() + 1e-3)
    (gradient,) = torch.autograd.grad(loss, x0)
    torch.testing.assert_close(gradient, torch.full_like(x0, 1e-3 / 1e-5 / 18), rtol=1e-3, atol=0)


def test_i24_half_precision_networks_give_the_same_direction():
    distiller, directions = DMD(small_teacher()), []
    with torch.no_grad():
        for parameter in distiller.fake_score.network.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    x0 = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
    t = distiller.student_level(4, torch.Generator().manual_seed(2), None)
    calls = []
    for denoiser in (distiller.teacher, distiller.fake_score):
        denoiser.network.register_forward_hook(lambda m, inputs, output: calls.append((inputs[0], output.sample)))
    for dtype in (None, torch.bfloat16):
        calls.clear()
        distiller.teacher.autocast_dtype = distiller.fake_score.autocast_dtype = dtype
        scores = distiller.scores(x0.detach(), BATCH, torch.Generator().manual_seed(2))
        for (x_t, eps), prediction in zip(calls, scores, strict=True):
            # all but the network is float32: epsilon's conversion would multiply every rounding by sigma / alpha
            alpha, sigma = VP.alpha_sigma(t.double())
            assert eps.dtype == (dtype or torch.float32) and x_t.dtype == prediction.dtype == torch.float32
            torch.testing.assert_close(prediction.double(), (x_t - sigma * eps) / alpha, rtol=1e-5, atol=1e-5)
        w = (x0 - scores[0]).detach().abs().mean((1, 2, 3), keepdim=True)
        loss = distribution_matching_loss(x0, *scores)
        directions.append(torch.autograd.grad(loss, x0)[0] * x0.numel())
    scaled = VP.ratio(t).float().reshape(-1, 1, 1, 1) / w  # of the networks' outputs in g
    exact, half = directions
    assert not torch.equal(half, exact) and ((half - exact).abs() < 0.05 * scaled).all()
    assert (exact.abs() / scaled).max() > 0.05


def test_i8_fake_score_equal_to_teacher_gives_zero_and_guidance_gives_its_difference():
    distiller = DMD(small_teacher())
    distiller.learn("student")
    x0 = distiller.generate(BATCH)
    assert distiller.student_loss(x0, BATCH).item() == 0
    negative = {"class_labels": torch.tensor([2])}
    teacher = GuidedDenoiser(small_teacher(), 3.0, negative)
    distiller = DMD(teacher)
    x0, generator = torch.randn(4, 1, 16, 16), torch.Generator()
    teacher_x0, fake_x0 = distiller.scores(x0, BATCH, generator.manual_seed(5))
    generator.manual_seed(5)
    t = distiller.student_level(4, generator, None)
    x_t = teacher.add_noise(x0, normal(x0.shape, generator), t)
    uncond = teacher.denoiser(x_t, t, {"class_labels": torch.full((4,), 2)})
    cond = teacher.denoiser(x_t, t, BATCH["cond"])
    torch.testing.assert_close(fake_x0 - teacher_x0, -2.0 * (cond - uncond), rtol=1e-3, atol=1e-4)


def test_i10_i11_best_fake_score_loss():
    """The exact denoiser of the student's Gaussian reaches the closed-form minimum of the noise error."""
    a, b = 0.3, 0.5
    distiller = DMD(gaussian_denoiser(VP, "epsilon", a, b), sample_shape=(1, 1, 1))
    generator = torch.Generator().manual_seed(0)
    x0 = a + b * torch.randn(200_000, 1, 1, 1, generator=generator)
    measured = distiller.fake_score_loss(x0, {"cond": {}}, generator)
    alpha, sigma = VP.alpha_sigma(torch.arange(1000))
    expected = (alpha**2 * b**2 / (alpha**2 * b**2 + sigma**2)).mean()
    torch.testing.assert_close(measured, expected, rtol=1e-2, atol=0)
    # the exact denoiser has no expected gradient, one of another mean or spread has
    mean_and_spread = list(distiller.fake_score.parameters())
    assert all(abs(g) < 0.02 for g in torch.autograd.grad(measured, mean_and_spread))
    for parameter in mean_and_spread:
        parameter.data += 0.2
        loss = distiller.fake_score_loss(x0, {"cond": {}}, generator)
        assert torch.autograd.grad(loss, parameter)[0] > 0.05
        parameter.data -= 0.2
    sigma = torch.tensor([0.002, 0.5, 80.0])
    weight = DMD(gaussian_denoiser(EDM, "edm"), sample_shape=(1, 1, 1)).fake_score_weight(EDM.timestep(sigma))
    torch.testing.assert_close(weight.flatten(), 1 / sigma**2 + 4, rtol=1e-4, atol=0)


def test_i11_a_linear_fake_score_learns_the_slope_of_the_students_gaussian():
    """`alpha b**2 / V`, at the least noise error `alpha**2 b**2 / V`, which is `b**2 sigma**2 / V` of x0."""

    class Linear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.line = torch.nn.Parameter(torch.tensor([0.5, 0.0]))

        def forward(self, sample, timestep):
            return self.line[0] * sample + self.line[1]

    a, b, t = 0.3, 0.5, 300
    distiller = DMD(Denoiser(Linear(), VP, "epsilon"), sample_shape=(1, 1, 1))
    distiller.fake_score_level = lambda batch_size, generator, device: torch.full((batch_size,), t)
    x0 = a + b * torch.randn(400_000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    line = distiller.fake_score.network.line

    def loss():
        return distiller.fake_score_loss(x0, {"cond": {}}, torch.Generator().manual_seed(1))

    (gradient,) = torch.autograd.grad(loss(), line, create_graph=True)
    hessian = torch.stack([torch.autograd.grad(g, line, retain_graph=True)[0] for g in gradient])
    line.data -= torch.linalg.solve(hessian, gradient.detach())  # quadratic: one Newton step is the fit
    alpha, sigma = (v.item() for v in VP.alpha_sigma(torch.tensor([float(t)])))
    spread = alpha**2 * b**2 + sigma**2
    best = loss().item()
    assert best == pytest.approx(alpha**2 * b**2 / spread, rel=1e-2)
    assert best * sigma**2 / alpha**2 == pytest.approx(b**2 * sigma**2 / spread, rel=1e-2)
    ends = torch.tensor([[0.0], [1.0]]).reshape(2, 1, 1, 1)
    x0_at = distiller.fake_score(ends, torch.tensor([t, t])).flatten()
    assert (x0_at[1] - x0_at[0]).item() == pytest.approx(alpha * b**2 / spread, rel=1e-2)


def test_i12_student_at_initialisation_is_the_teachers_first_step():
    mu, s = 0.3, 0.5
    distiller = DMD(gaussian_denoiser(EDM, "edm", mu, s), sample_shape=(1, 1, 1))
    assert distiller.init_noise_sigma == pytest.approx(80, rel=1e-5)
    x0 = distiller.generate({"batch_size": 100_000, "cond": {}}, torch.Generator().manual_seed(0))
    assert x0.mean().item() == pytest.approx(mu * 6400 / 6400.25, abs=1e-4)
    assert x0.std().item() == pytest.approx(s**2 * 80 / 6400.25, rel=2e-2)
    teacher = small_teacher()
    distiller = DMD(teacher)
    z = torch.randn(2, 1, 16, 16)
    labels = {"class_labels": torch.tensor([0, 1])}
    assert distiller.student_timesteps == [999] and distiller.init_noise_sigma == 1.0
    with torch.no_grad():
        torch.testing.assert_close(distiller.sample(z, labels), teacher(z, torch.tensor([999, 999]), labels))


def test_i13_draws_reach_their_ends_per_sample():
    stable_diffusion = VPSchedule((1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0))
    distiller = DMD(gaussian_denoiser(stable_diffusion, "epsilon"), sample_shape=(1, 1, 1))
    t = distiller.student_level(100_000, None, None)
    assert t.min().item() == 20 and t.max().item() == 980
    t = distiller.fake_score_level(100_000, None, None)
    assert t.min().item() == 0 and t.max().item() == 999
    # the same ratios on DDPM's linear betas, which are far noisier at equal t
    ddpm = VPSchedule(DDPMScheduler().alphas_cumprod)
    t = DMD(gaussian_denoiser(ddpm, "epsilon"), sample_shape=(1, 1, 1)).student_level(100_000, None, None)
    assert t.min().item() == 38 and t.max().item() == 711
    edm = DMD(gaussian_denoiser(EDM, "edm"), sample_shape=(1, 1, 1))
    sigma = EDM.ratio(edm.student_level(100_000, None, None))
    assert sigma.min().item() == pytest.approx(0.00323, rel=2e-3)
    assert sigma.max().item() == pytest.approx(72.05, rel=1e-3)


def test_levels_can_be_given_as_ratios():
    teacher = small_teacher()
    t = DMD(teacher, level_ratios=(0.5, 2.0)).student_level(100_000, None, None)
    assert [t.min().item(), t.max().item()] == VP.timestep(torch.tensor([0.5, 2.0])).tolist()
    with pytest.raises(ValueError, match=r"`level_ratios` must be two rising positive numbers"):
        DMD(teacher, level_ratios=(2, 1))


def test_i14_exact_scores_bring_the_student_to_the_teacher():
    """(a, b) -> (m, s), with no noise floor: the gradient's variance vanishes at the optimum."""
    generator = torch.Generator().manual_seed(0)
    parameters = torch.tensor([-0.5, 1.2], dtype=torch.float64, requires_grad=True)
    m, s = 0.7, 0.5
    for _ in range(1500):
        z, noise = torch.randn(2, 128, 32, generator=generator, dtype=torch.float64)
        sigma = 10 ** (2 * torch.rand(128, 1, generator=generator, dtype=torch.float64) - 1)
        a, b = parameters
        x0 = a + b * z
        with torch.no_grad():
            x_t = x0 + sigma * noise
            teacher_x0 = m + s**2 / (s**2 + sigma**2) * (x_t - m)
            fake_x0 = a + b**2 / (b**2 + sigma**2) * (x_t - a)
        loss = distribution_matching_loss(x0, teacher_x0, fake_x0)
        (gradient,) = torch.autograd.grad(loss, parameters)
        parameters.data -= 0.05 * gradient
    torch.testing.assert_close(parameters.data, torch.tensor([m, s], dtype=torch.float64), atol=1e-14, rtol=0)


@pytest.mark.parametrize("fake_score_updates, rings", [(1, True), (5, False), (10, False)])
def test_i15_a_fake_score_that_is_no_faster_than_the_student_lags_and_rings(fake_score_updates, rings):
    """Student and fake score of one number each, their means, in the order and ratio of the real updates."""

    class Means(DMD):
        def generate(self, batch, generator=None):
            return means["student"] * 1.0

        def student_loss(self, x0, batch, generator=None):
            return means["fake_score"].detach() * x0  # the teacher's mean is 0

        def fake_score_loss(self, x0, batch, generator=None):
            return 0.5 * (means["fake_score"] - x0) ** 2

    means = {name: torch.tensor(1.0, requires_grad=True) for name in ("student", "fake_score")}
    teacher, seen = gaussian_denoiser(EDM, "edm"), []
    distiller = Means(teacher, fake_score_updates=fake_score_updates, sample_shape=(1, 1, 1))
    for _ in range(150):
        for name, loss in distiller.updates(BATCH):
            (gradient,) = torch.autograd.grad(loss, means[name])
            means[name].data -= 0.05 * gradient
        seen.append(means["student"].item())
    assert (min(seen) < -1e-3) == rings and abs(seen[-1]) < 0.1
    assert rings or all(before >= after >= 0 for before, after in zip(seen, seen[1:], strict=False))
    # the specification's matrix of one iteration, c = rho = 0.05, but that the first of the fake score's updates has
    # the student's samples from before its step, as in DMD2
    q, p = 0.95**fake_score_updates, 0.95 ** (fake_score_updates - 1)
    matrix = torch.tensor([[1, -0.05], [1 - q, q - (1 - p) * 0.05]], dtype=torch.float64)
    for steps in (1, 20, 150):
        expected = (torch.linalg.matrix_power(matrix, steps) @ torch.ones(2, dtype=torch.float64))[0].item()
        assert seen[steps - 1] == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_i16_gan_losses_at_matched_distributions_and_their_gradients():
    zero = torch.zeros(8, 1, requires_grad=True)
    critic, student = gan_losses(torch.zeros(8, 1), zero)
    assert critic.item() == pytest.approx(2 * math.log(2)) and student.item() == pytest.approx(math.log(2))
    (gradient,) = torch.autograd.grad(student, zero)
    torch.testing.assert_close(gradient, torch.full((8, 1), -0.5 / 8))
    # at the optimal logit log p_real - log p_fake the critic's expected gradient vanishes
    z, _, weight = hermite_grid()
    shift = 0.8
    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    real, fake = (scale * (shift * x - shift**2 / 2) for x in (z + shift, z))
    loss = sum(w * gan_losses(r.reshape(1), f.reshape(1))[0] for r, f, w in zip(real, fake, weight, strict=True))
    assert torch.autograd.grad(loss, scale)[0].item() == pytest.approx(0, abs=1e-6)


def test_i17_i19_routing_order_and_ratio():
    distiller = DMD(small_teacher(), gan_weight=1e-3, fake_score_updates=3)
    networks = {"teacher": distiller.teacher.network} | distiller.trainable
    names = []
    for name, loss in distiller.updates(BATCH | {"x0": torch.randn(4, 1, 16, 16)}):
        names.append(name)
        loss.backward()
        for other, network in networks.items():
            with_gradient = [p.grad is not None for p in network.parameters()]
            assert any(with_gradient) if other == name else not any(with_gradient), (name, other)
            for parameter in network.parameters():
                parameter.grad = None
    assert names == ["student", "fake_score", "fake_score", "fake_score"]


def test_i17_the_gan_loss_alone_moves_the_student_and_trains_the_encoder():
    distiller = DMD(small_teacher(), gan_weight=1.0)
    x0 = torch.randn(4, 1, 16, 16, requires_grad=True)
    distiller.learn("student")
    gan_losses(None, distiller.logits(x0, BATCH))[1].backward()
    assert x0.grad.abs().max() > 0
    assert all(p.grad is None for p in distiller.trainable["fake_score"].parameters())
    distiller.learn("fake_score")
    gan_losses(None, distiller.logits(x0.detach(), BATCH))[0].backward()
    assert distiller.fake_score.network.conv_in.weight.grad.abs().max() > 0
    assert distiller.head.layers[0].weight.grad.abs().max() > 0


def test_dropout_is_off_everywhere():
    distiller = DMD(small_teacher())
    for name in ("student", "fake_score"):
        distiller.learn(name)
        networks = [d.network for d in (distiller.teacher, distiller.student, distiller.fake_score)]
        assert not any(module.training for network in networks for module in network.modules())


@pytest.mark.parametrize("size", [4, 6, 8, 12, 32])
def test_i18_head_gives_one_logit(size):
    assert GANHead(32, size)(torch.randn(2, 32, size, size)).shape == (2, 1)


def test_i18_a_bottleneck_smaller_than_the_kernel_is_refused():
    with pytest.raises(ValueError, match=r"`size` .* but is 3"):
        GANHead(32, 3)


def test_i20_backward_simulation():
    distiller = DMD(small_teacher(), student_timesteps=[999, 749, 499, 249])
    calls = []
    distiller.student.network.register_forward_hook(
        lambda module, inputs, output: calls.append(torch.is_grad_enabled())
    )
    inputs = []
    distiller.student.network.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    seen = set()

    def shared(step):
        return BATCH | {"shared_generator": torch.Generator().manual_seed(step)}

    for step in range(20):
        calls.clear(), inputs.clear()
        distiller.generate(shared(step), torch.Generator().manual_seed(0))
        assert calls[-1] and not any(calls[:-1])
        torch.testing.assert_close(inputs[0], normal((4, 1, 16, 16), torch.Generator().manual_seed(0)))
        first = len(calls)
        calls.clear()
        distiller.generate(shared(step), torch.Generator().manual_seed(9))
        assert len(calls) == first  # shared by every rank, whatever its noise
        seen.add(first)
    assert seen == {1, 2, 3, 4}


def test_i21_regression():
    pairs = {"noise": torch.randn(4, 1, 16, 16), "target": torch.randn(4, 1, 16, 16)}
    distiller = DMD(small_teacher(), regression_weight=0.25, regression_loss="l2")
    expected = torch.nn.functional.mse_loss(distiller.sample(pairs["noise"], BATCH["cond"]), pairs["target"])
    torch.testing.assert_close(distiller.regression_loss(BATCH | pairs), expected)
    with pytest.raises(ValueError, match=r"`regression_weight` needs batches with 'noise' and 'target'"):
        next(distiller.updates(BATCH))
    called = []
    off = DMD(small_teacher(), regression_weight=0.0, regression_loss=lambda a, b: called.append(1))
    next(off.updates(BATCH | pairs))
    assert not called


def test_the_heads_size_costs_no_evaluation():
    """On a CPU that of FLUX would take half an hour."""
    teacher, seen = small_teacher(), []

    def note(module, inputs, output):
        if isinstance(module, torch.nn.Conv2d):
            seen.append(type(output))

    handle = torch.nn.modules.module.register_module_forward_hook(note)
    distiller = DMD(teacher, gan_weight=1e-3)
    handle.remove()
    assert set(seen) == {FakeTensor}
    assert {type(table) for table in teacher.schedule._tables.values()} == {torch.Tensor}
    list(distiller.updates(BATCH | {"x0": torch.zeros(4, 1, 16, 16)}))


def test_regression_alone_is_a_warm_up():
    pairs = {"noise": torch.randn(4, 1, 16, 16), "target": torch.randn(4, 1, 16, 16)}
    distiller = DMD(small_teacher(), matching_weight=0.0, regression_weight=2.0, regression_loss="l2")
    ((name, loss),) = distiller.updates(BATCH | pairs)
    assert name == "student" and list(distiller.trainable) == ["student"] and distiller.fake_score is None
    torch.testing.assert_close(loss, 2.0 * distiller.regression_loss(BATCH | pairs))
    with pytest.raises(ValueError, match=r"`gan_weight` must be 0 with `matching_weight` 0, .* but is 0.1"):
        DMD(small_teacher(), matching_weight=0.0, regression_weight=1.0, regression_loss="l2", gan_weight=0.1)
    with pytest.raises(ValueError, match="`matching_weight` and `regression_weight` must not both be 0"):
        DMD(small_teacher(), matching_weight=0.0)


@pytest.mark.parametrize("name", ["l2", "pseudo-huber"])
def test_regression_distances_vanish_only_at_equality(name):
    distance = image_distance(name)
    y = torch.randn(2, 1, 8, 8)
    assert distance(y, y).item() == pytest.approx(0, abs=1e-6) and distance(y, y + 0.1).item() > 1e-3


def test_i21_lpips_vanishes_at_equality(monkeypatch):
    """With random weights of its network, which can not be downloaded here."""
    lpips = pytest.importorskip("lpips")
    monkeypatch.setattr(lpips, "LPIPS", partial(lpips.LPIPS, pnet_rand=True))
    distance = image_distance("lpips")
    y = torch.randn(1, 1, 16, 16).clamp(-1, 1)
    with torch.no_grad():
        assert distance(y, y).item() == 0 < distance(y + 0.1, y).item()


def test_lpips_without_its_weights_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", _unreachable)
    with pytest.raises(RuntimeError, match="--regression_loss l2 or pseudo-huber"):
        image_distance("lpips", "regression_loss")


def _unreachable(*args, **kwargs):
    from urllib.error import URLError

    raise URLError("no network")


def test_fake_score_reuses_the_students_samples_once():
    distiller = DMD(small_teacher(), fake_score_updates=2)
    count = []
    distiller.student.network.register_forward_hook(lambda *_: count.append(1))
    list(distiller.updates(BATCH))
    assert len(count) == 2  # the student's own, and fresh samples for the second update


def test_flow_teacher_starts_at_pure_noise():
    distiller = DMD(gaussian_denoiser(FlowSchedule(), "flow_prediction", 0.3, 0.5), sample_shape=(1, 1, 1))
    assert distiller.student_timesteps == [1000.0] and distiller.init_noise_sigma == 1.0
    t = distiller.student_level(50_000, None, None)
    assert 20 <= t.min().item() <= 22 and 980 <= t.max().item() <= 982


@pytest.mark.parametrize(
    "options, message",
    [
        ({"fake_score_updates": 0}, r"`fake_score_updates` must be at least 1, but is 0"),
        ({"student_timesteps": [249, 999]}, r"`student_timesteps` must fall"),
        (
            {"regression_weight": 1.0, "regression_loss": "ssim"},
            r"`regression_loss` must be one of .* but is 'ssim'",
        ),
    ],
)
def test_bad_options_name_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        DMD(small_teacher(), **options)


def test_i7_the_papers_weight_is_the_codes_times_alpha():
    """Eq. 7, `w_t * alpha * (s_fake - s_real)`, with Eq. 8's `w_t = sigma**2 / alpha * CS / |x0 - teacher_x0|_1`."""
    teacher, fake = (gaussian_denoiser(VP, "epsilon", *p) for p in ((0.3, 0.5), (-0.2, 0.8)))
    x0, t = torch.randn(4, 1, 3, 3, dtype=torch.float64, requires_grad=True), torch.tensor([50, 300, 600, 900])
    x_t = teacher.add_noise(x0.detach(), torch.randn_like(x0), t)
    teacher_x0, fake_x0 = teacher(x_t, t), fake(x_t, t)
    alpha, sigma = VP.alpha_sigma(t.double())
    scores = [(alpha * prediction - x_t) / sigma**2 for prediction in (fake_x0, teacher_x0)]
    size = (x0 - teacher_x0).abs().sum((1, 2, 3), keepdim=True)
    paper = (sigma**2 / alpha * 9 / size) * alpha * (scores[0] - scores[1])
    (gradient,) = torch.autograd.grad(distribution_matching_loss(x0, teacher_x0, fake_x0), x0)
    torch.testing.assert_close(paper, alpha * gradient * x0.numel())


def two_modes(x_t, sigma, modes=(-4.0, 4.0), s=0.3):
    """The denoiser of an even mixture of two far Gaussians, at alpha = 1."""
    means = torch.tensor(modes)
    var = (s**2 + sigma**2)[:, None]
    posterior = means + s**2 / var * (x_t[:, None] - means)
    return ((-((x_t[:, None] - means) ** 2) / (2 * var)).softmax(1) * posterior).sum(1)


def samples_own_denoiser(x_t, sigma, samples):
    """The exact denoiser of an empirical distribution, so that no fake score has to be trained."""
    weights = (-((x_t[:, None] - samples) ** 2) / (2 * sigma[:, None] ** 2)).softmax(1)
    return weights @ samples


@pytest.mark.parametrize("terms", ["matching", "matching and regression", "real score"])
def test_i22_two_far_modes(terms):
    torch.manual_seed(0)
    student = torch.nn.Sequential(torch.nn.Linear(1, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    pairs = torch.linspace(-2.5, 2.5, 64)
    targets = 4 * pairs.sign() + 0.3 * pairs  # what the ODE makes of these noises, about

    def generate(noise):
        return 4 + student(noise[:, None])[:, 0]  # starts near the mode at 4

    for _ in range(600):
        x0 = generate(torch.randn(256))
        sigma = 0.2 + 0.8 * torch.rand(256)
        with torch.no_grad():
            x_t = x0 + sigma * torch.randn(256)
            fake_x0 = x0 if terms == "real score" else samples_own_denoiser(x_t, sigma, x0)
        loss = distribution_matching_loss(x0[:, None], two_modes(x_t, sigma)[:, None], fake_x0[:, None])
        if terms == "matching and regression":
            loss = loss + ((generate(pairs) - targets) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        x0 = generate(torch.randn(4000))
    at_the_other = (x0 < 0).float().mean().item()
    near = x0[x0 > 2]
    if terms == "matching":
        assert at_the_other < 0.01 and near.std().item() == pytest.approx(0.3, abs=0.12)
    elif terms == "real score":
        assert at_the_other < 0.01 and near.std() < 0.1
    else:
        assert 0.4 < at_the_other < 0.6


def moved_apart(**options):
    """A DMD whose fake score and head are no longer the teacher's, with a batch of real images and pairs."""
    torch.manual_seed(0)
    distiller = DMD(small_teacher(), regression_loss="l2", **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in distiller.trainable["fake_score"].parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    x0, noise, target, real = torch.randn(4, 4, 1, 16, 16, generator=generator)
    return distiller, x0.requires_grad_(True), BATCH | {"noise": noise, "target": target, "x0": real}


def noised(distiller, x0, generator, level):
    t = level(x0.shape[0], generator, None)
    return VP.alpha_sigma(t)[0] * x0 + VP.alpha_sigma(t)[1] * normal(x0.shape, generator), t


@pytest.mark.parametrize("weights", [(1.0, 0.25, 0.0), (0.5, 0.0, 0.3), (1.0, 0.25, 0.3)])
def test_the_students_loss_is_the_sum_of_its_weighted_parts(weights):
    matching, regression, gan = weights
    distiller, x0, batch = moved_apart(matching_weight=matching, regression_weight=regression, gan_weight=gan)
    loss = distiller.student_loss(x0, batch, torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(2)
    x_t, t = noised(distiller, x0, generator, distiller.student_level)
    predictions = [denoiser(x_t, t, batch["cond"]) for denoiser in (distiller.teacher, distiller.fake_score)]
    expected = matching * distribution_matching_loss(x0, *predictions)
    if regression:
        t = torch.full((4,), 999)
        of_pairs = distiller.student(batch["noise"], t, batch["cond"])
        expected = expected + regression * image_distance("l2")(of_pairs, batch["target"])
    if gan:
        expected = expected + gan * gan_losses(None, logits_of(distiller, x0, batch["cond"], generator))[1]
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    gradients = [torch.autograd.grad(value, x0, retain_graph=True)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def test_the_fake_scores_loss_is_denoising_and_the_weighted_critic():
    distiller, x0, batch = moved_apart(gan_weight=0.3, gan_critic_weight=0.7)
    loss = distiller.fake_score_loss(x0.detach(), batch, torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(2)
    x_t, t = noised(distiller, x0.detach(), generator, distiller.fake_score_level)
    alpha, sigma = VP.alpha_sigma(t)
    eps = (x_t - alpha * distiller.fake_score(x_t, t, batch["cond"])) / sigma
    denoising = ((eps - (x_t - alpha * x0.detach()) / sigma) ** 2).mean()
    real, fake = (logits_of(distiller, images, batch["cond"], generator) for images in (batch["x0"], x0.detach()))
    torch.testing.assert_close(loss, denoising + 0.7 * gan_losses(real, fake)[0], rtol=1e-4, atol=1e-6)


def logits_of(distiller, x0, cond, generator):
    """The head on the features of the fake score's middle block, hooked here."""
    features = []
    hook = distiller.fake_score.network.mid_block.register_forward_hook(lambda m, i, output: features.append(output))
    x_t, t = noised(distiller, x0, generator, distiller.fake_score_level)
    distiller.fake_score(x_t, t, cond)
    hook.remove()
    return distiller.head(features[0])
