"""The invariants of the SiD specification, numbered as there."""

import math

import pytest
import torch
from analytic import gaussian_denoiser, hermite_grid
from conftest import tiny_unet
from peft import LoraConfig

from diffusers_onestep import DMD, Denoiser, EDM2UNet2DModel, EDMSchedule, FlowSchedule, SiD, VPSchedule, train
from diffusers_onestep.arguments import TrainArguments
from diffusers_onestep.data import Batches, Conditions
from diffusers_onestep.ema import HalfLifeEMA
from diffusers_onestep.methods.base import normal, sample_generators
from diffusers_onestep.methods.dmd import distribution_matching_loss, gan_losses
from diffusers_onestep.methods.sid import sid_loss
from diffusers_onestep.models import has_train_mode

EDM = EDMSchedule()
VP = VPSchedule(torch.linspace(0.9999, 0.01, 1000))
CASES = [
    {"m": 1.0, "v_d": 0.25, "sigma": 0.7, "th": 0.2, "s": 0.9},
    {"m": -0.4, "v_d": 0.6, "sigma": 1.3, "th": 0.5, "s": 0.4},
]


def fixture(m, v_d, sigma, th, s):
    """Closed-form value and gradients of the loss at alpha, and the loss itself by quadrature."""
    v = s**2
    c, c_d = v / (v + sigma**2), v_d / (v_d + sigma**2)
    q = (1 - c_d) * (m - th)
    mesm = (c_d - c) ** 2 * (v + sigma**2) + q**2

    def closed_form(alpha):
        d_th = 2 * (1 - alpha) * q * (c_d - c) - q * (1 - c)
        d_s = 2 * s * ((1 - alpha) * (c_d - c) ** 2 - (c_d - c) * (1 - c))
        return (1 - alpha) * mesm, d_th, d_s

    def measured(loss_of):
        z, noise, weight = hermite_grid(24)
        parameters = torch.tensor([th, s], dtype=torch.float64, requires_grad=True)
        x0 = parameters[0] + parameters[1] * z
        x_t = x0 + sigma * noise
        teacher_x0, fake_x0 = c_d * x_t + (1 - c_d) * m, c * x_t + (1 - c) * th
        rows = zip(x0, teacher_x0, fake_x0, weight, strict=True)
        loss = sum(w * loss_of(*(r.reshape(1, 1) for r in row)) for *row, w in rows)
        return (loss.item(), *torch.autograd.grad(loss, parameters)[0].tolist())

    return closed_form, measured, mesm


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.2])
def test_1_2_value_and_gradient_have_their_closed_form(case, alpha):
    closed_form, measured, _ = fixture(**case)
    got = measured(lambda x0, a, b: sid_loss(x0, a, b, alpha=alpha, normalize=False))
    assert got == pytest.approx(closed_form(alpha), abs=1e-6)


def test_1_the_numbers_of_the_specification():
    closed_form, measured, mesm = fixture(**CASES[0])
    assert mesm == pytest.approx(0.386383, abs=1e-6)
    assert closed_form(0.5)[1:] == pytest.approx((-0.701534 / 2, 0.533498 / 2), abs=1e-6)  # half the true gradient
    rows = {
        0.0: (0.386383, -0.501867, 0.339974),
        0.5: (0.193192, -0.350767, 0.266749),
        1.0: (0.0, -0.199667, 0.193524),
        1.2: (-0.077277, -0.139228, 0.164234),
    }
    for alpha, row in rows.items():
        assert closed_form(alpha) == pytest.approx(row, abs=1e-6)
    squared = measured(lambda x0, a, b: ((a - b) ** 2).sum())  # L1 alone
    assert squared == pytest.approx((0.386383, -0.302199, 0.146450), abs=1e-6)
    for k in (1, 2):  # the gradient is linear in alpha
        assert rows[1.2][k] == pytest.approx(rows[0.0][k] - 1.2 * squared[k], abs=2e-6)
    # detached outputs: DMD's gradient
    got = measured(lambda x0, a, b: sid_loss(x0, a.detach(), b.detach(), normalize=False))
    assert got[1:] == pytest.approx((-0.529730, 0.256715), abs=1e-6)


def test_3_equal_variances_make_alpha_irrelevant():
    _, measured, _ = fixture(m=1.0, v_d=0.25, sigma=0.7, th=0.2, s=0.5)
    for alpha in (0.5, 1.2):
        got = measured(lambda x0, a, b, alpha=alpha: sid_loss(x0, a, b, alpha=alpha, normalize=False))
        assert got[1] == pytest.approx(-((1 - 0.25 / 0.74) ** 2) * 0.8, abs=1e-6)


def test_5_equal_scores_give_zero_per_sample():
    x0, same = torch.randn(3, 1, 4, 4, requires_grad=True), torch.randn(3, 1, 4, 4)
    for alpha in (0.5, 1.2):
        for row in ([0], [1], [2], [0, 1, 2]):
            loss = sid_loss(x0[row], same[row], same[row], alpha=alpha)
            assert loss.item() == 0 and torch.autograd.grad(loss, x0)[0].abs().max() == 0


def test_7_no_gradient_through_the_normaliser_and_its_floor():
    x0 = torch.randn(2, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    teacher_x0, fake_x0 = torch.randn(2, 2, 1, 3, 3, dtype=torch.float64)
    w = 1 / (x0 - teacher_x0).abs().mean((1, 2, 3)).detach()
    d = teacher_x0 - fake_x0
    (gradient,) = torch.autograd.grad(sid_loss(x0, teacher_x0, fake_x0, alpha=1.2), x0)
    torch.testing.assert_close(gradient, -w.reshape(2, 1, 1, 1) * d / 2)
    at_floor = sid_loss(teacher_x0, teacher_x0, fake_x0, alpha=1.2)
    torch.testing.assert_close(at_floor, -1.2e5 * (d**2).sum() / 2)


def test_7_the_normaliser_bias_shrinks_with_the_dimension():
    """At alpha 1 the loss has mean 0 without its normaliser alone."""
    generator = torch.Generator().manual_seed(0)
    c, c_d = 0.81 / (0.81 + 0.49), 0.25 / 0.74
    for dim, expected in ((64, -0.0043), (1024, -0.0002)):
        n = 4_000_000 // dim
        x0 = 0.2 + 0.9 * torch.randn(n, dim, generator=generator)
        x_t = x0 + 0.7 * torch.randn(n, dim, generator=generator)
        teacher_x0, fake_x0 = c_d * x_t + (1 - c_d), c * x_t + (1 - c) * 0.2
        plain = sid_loss(x0, teacher_x0, fake_x0, normalize=False).item() / dim
        assert plain == pytest.approx(0, abs=5e-4)
        # less the mean of w times the plain loss, which has mean 0: what is left of the sampling error is small
        w = (1 / (x0 - teacher_x0).abs().mean(1)).mean().item()
        loss = sid_loss(x0, teacher_x0, fake_x0).item() / dim
        assert loss - w * plain == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_8_both_algebraic_forms_agree(alpha):
    x0, teacher_x0, fake_x0 = torch.randn(3, 5, 2, 4, 4, dtype=torch.float64)
    d = teacher_x0 - fake_x0
    other = (d * (fake_x0 - x0) + (1 - alpha) * d**2).sum((1, 2, 3)).mean()
    torch.testing.assert_close(sid_loss(x0, teacher_x0, fake_x0, alpha=alpha, normalize=False), other)


def test_detached_outputs_give_the_direction_of_dmd():
    x0 = torch.randn(4, 1, 5, 5, requires_grad=True)
    teacher_x0, fake_x0 = torch.randn(2, 4, 1, 5, 5)
    (sid,) = torch.autograd.grad(sid_loss(x0, teacher_x0, fake_x0), x0)
    (dmd,) = torch.autograd.grad(distribution_matching_loss(x0, teacher_x0, fake_x0), x0)
    torch.testing.assert_close(sid / 25, dmd)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_15_a_nan_sample_is_dropped(place):
    x0, teacher_x0, fake_x0 = values = list(torch.randn(3, 4, 1, 3, 3))
    (clean,) = torch.autograd.grad(sid_loss(x0.requires_grad_(True), teacher_x0, fake_x0), x0)
    values[0] = x0 = x0.detach()
    values[place][1, 0, 0, 0] = math.nan
    (dropped,) = torch.autograd.grad(sid_loss(x0.requires_grad_(True), teacher_x0, fake_x0), x0)
    keep = [0, 2, 3]
    torch.testing.assert_close(dropped[keep], clean[keep])
    assert dropped[1].abs().max() == 0
    (none,) = torch.autograd.grad(sid_loss(x0, teacher_x0 * math.nan, fake_x0), x0)
    assert none.abs().max() == 0


def small_sid(**options):
    teacher = Denoiser(tiny_unet(classes=3), VP, "epsilon")
    return SiD(teacher, **options)


BATCH = {"batch_size": 4, "cond": {"class_labels": torch.tensor([0, 1, 2, 0])}}


def gradient_norm(loss, distiller):
    gradients = torch.autograd.grad(loss, list(distiller.student.network.parameters()), allow_unused=True)
    return torch.nn.utils.get_total_norm([g for g in gradients if g is not None]).item()


def test_5_6_state_at_initialisation_is_stationary_until_the_fake_score_moves():
    distiller = small_sid()
    updates = distiller.updates(BATCH, torch.Generator().manual_seed(0))
    name, loss = next(updates)
    assert name == "fake_score"
    distiller.learn("student")
    still = distiller.student_loss(distiller.generate(BATCH), BATCH)
    assert still.item() == 0
    at_rest = gradient_norm(still, distiller)
    distiller.learn("fake_score")
    loss.backward()
    with torch.no_grad():
        for parameter in distiller.fake_score.network.parameters():
            parameter -= 1e-3 * parameter.grad.sign()
    name, loss = next(updates)
    assert name == "student" and loss.item() != 0
    # through teacher and fake score it cancels, up to rounding
    assert at_rest < 1e-4 * gradient_norm(loss, distiller)
    assert next(updates, None) is None


def test_9_gradients_reach_only_the_network_that_learns():
    distiller = small_sid()
    networks = {"teacher": distiller.teacher.network} | distiller.trainable
    for name, loss in distiller.updates(BATCH):
        loss.backward()
        for other, network in networks.items():
            moved = [p.grad is not None for p in network.parameters()]
            assert any(moved) if other == name else not any(moved), (name, other)
        with torch.no_grad():
            for parameter in networks[name].parameters():
                if parameter.grad is not None:
                    parameter -= 1e-4 * parameter.grad.sign()
                parameter.grad = None


def test_10_sequential_path_equals_autograd():
    results = []
    for sequential in (False, True):
        distiller = small_sid(sequential=sequential)
        with torch.no_grad():
            for parameter in distiller.fake_score.network.parameters():
                parameter += 0.01
        distiller.learn("student")
        x0 = distiller.generate(BATCH, torch.Generator().manual_seed(1))
        loss = distiller.student_loss(x0, BATCH, torch.Generator().manual_seed(2))
        loss.backward()
        gradients = [p.grad for p in distiller.student.network.parameters() if p.grad is not None]
        results.append((loss, torch.cat([g.flatten() for g in gradients])))
    (loss, gradient), (loss_sequential, gradient_sequential) = results
    torch.testing.assert_close(loss_sequential, loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient_sequential, gradient, rtol=1e-3, atol=1e-3 * gradient.abs().max().item())


@pytest.mark.parametrize("sequential", [False, True])
def test_the_gan_branch_adds_its_weighted_losses(sequential):
    """SiDA: the critic judges at the noise and level of the scores, real images too."""
    gan = small_sid(sequential=sequential, gan_weight=0.3, gan_critic_weight=0.7)
    with torch.no_grad():  # the scores move apart
        for parameter in gan.fake_score.network.parameters():
            parameter += 0.01
    real = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(3))
    cond, features = BATCH["cond"], []

    def draws(level):
        generator = torch.Generator().manual_seed(2)
        return level(4, generator, None), normal(x0.shape, generator)

    def verdict(images, noise, t):
        hook = gan.fake_score.network.mid_block.register_forward_hook(lambda m, i, output: features.append(output))
        fake_x0 = gan.fake_score(gan.fake_score.add_noise(images, noise, t), t, cond)
        hook.remove()
        return fake_x0, gan.head(features[-1])

    x0 = gan.generate(BATCH, torch.Generator().manual_seed(1)).detach().requires_grad_(True)
    loss = gan.student_loss(x0, BATCH, torch.Generator().manual_seed(2))
    t, noise = draws(gan.student_level)
    fake_x0, logits = verdict(x0, noise, t)
    teacher_x0 = gan.teacher(gan.teacher.add_noise(x0, noise, t), t, cond)
    expected = 100 * (sid_loss(x0, teacher_x0, fake_x0, alpha=1.2) + 0.3 * gan_losses(None, logits)[1])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    ours, theirs = (torch.autograd.grad(value, x0)[0] for value in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())

    loss = gan.fake_score_loss(x0.detach(), BATCH | {"x0": real}, torch.Generator().manual_seed(2))
    t, noise = draws(gan.fake_score_level)
    fake_x0, fake_logits = verdict(x0.detach(), noise, t)
    denoising = (gan.fake_score_weight(t) * (fake_x0 - x0) ** 2).sum() / 4
    critic, _ = gan_losses(verdict(real, noise, t)[1], fake_logits)
    torch.testing.assert_close(loss, denoising + 0.7 * critic, rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match="`gan_weight` needs batches with real images"):
        gan.fake_score_loss(x0.detach(), BATCH)


def test_logits_that_are_not_finite_or_beyond_ten_do_not_move_the_student(monkeypatch):
    distiller, logits = small_sid(gan_weight=2.0), torch.tensor([[0.5], [11.0], [math.nan], [-math.inf]])
    logits.requires_grad_(True)
    monkeypatch.setattr(distiller, "last_logits", lambda batch_size: logits)
    distiller.gan_loss(4).backward()
    expected = [-2.0 / 4 * torch.sigmoid(torch.tensor(-0.5)).item(), 0.0, 0.0, 0.0]
    assert logits.grad.flatten().tolist() == pytest.approx(expected)


def test_11_levels_of_the_edm_runs():
    distiller = SiD(gaussian_denoiser(EDM, "edm"), sample_shape=(1, 1, 1))
    generator = torch.Generator().manual_seed(0)
    sigma = EDM.ratio(distiller.student_level(100_000, generator, None))
    assert sigma.min() > 0.0019 and sigma.max() < 24.41 and sigma.max() > 24
    log_sigma = EDM.ratio(distiller.fake_score_level(100_000, generator, None)).log()
    assert log_sigma.mean().item() == pytest.approx(-1.2, abs=0.02)
    assert log_sigma.std().item() == pytest.approx(1.2, abs=0.02)
    assert EDM.ratio(torch.tensor(distiller.student_timesteps)).item() == pytest.approx(2.5, rel=1e-5)
    assert distiller.init_noise_sigma == pytest.approx(2.5, rel=1e-5)


def test_levels_of_the_stable_diffusion_and_flow_runs():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    vp = VPSchedule((1 - betas).cumprod(0))
    t = SiD(gaussian_denoiser(vp, "epsilon"), sample_shape=(1, 1, 1)).student_level(100_000, None, None)
    assert t.min().item() == 20 and t.max().item() == 979 and not t.is_floating_point()
    distiller = SiD(gaussian_denoiser(FlowSchedule(), "flow_prediction"), sample_shape=(1, 1, 1))
    s = distiller.student_level(100_000, None, None).double() / 1000
    logit = (s / (1 - s)).log()
    assert logit.mean().item() == pytest.approx(math.log(2), abs=0.03)
    assert logit.std().item() == pytest.approx(1.6, abs=0.03)


def test_12_fake_score_loss_is_the_noise_error_for_eps_and_v():
    for prediction_type in ("epsilon", "v_prediction"):
        distiller = SiD(gaussian_denoiser(VP, prediction_type), sample_shape=(1, 2, 2))
        x0 = torch.randn(5, 1, 2, 2)
        loss = distiller.fake_score_loss(x0, {"cond": {}}, torch.Generator().manual_seed(3))
        generator = torch.Generator().manual_seed(3)
        t = distiller.fake_score_level(5, generator, None)
        noise = normal(x0.shape, generator)
        x_t = distiller.student.add_noise(x0, noise, t)
        alpha, sigma = VP.alpha_sigma(t)
        eps = (x_t - alpha * distiller.fake_score(x_t, t)) / sigma
        torch.testing.assert_close(loss, ((eps - noise) ** 2).sum((1, 2, 3)).mean(), rtol=1e-3, atol=1e-4)
        if prediction_type == "v_prediction":
            snr = (alpha / sigma) ** 2
            error = distiller.fake_score.model_output(x_t, t) - (alpha * noise - sigma * x0)
            expected = (snr / (1 + snr) * error**2).sum((1, 2, 3)).mean()
            torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-4)


def test_13_all_prediction_types_give_the_same_loss():
    """The same Gaussian in VP, flow and EDM, at equal ratio sigma / alpha."""
    losses = []
    for schedule, prediction_type in (
        (VP, "epsilon"),
        (VP, "v_prediction"),
        (FlowSchedule(), "flow_prediction"),
        (EDM, "edm"),
    ):
        teacher, fake = (gaussian_denoiser(schedule, prediction_type, mu, s) for mu, s in ((0.3, 0.5), (-0.1, 0.7)))
        t = schedule.timestep(VP.ratio(torch.tensor([300, 500])))
        generator = torch.Generator().manual_seed(0)
        x0 = torch.randn(2, 1, 3, 3, generator=generator)
        x_t = teacher.add_noise(x0, torch.randn(2, 1, 3, 3, generator=generator), t)
        losses.append(sid_loss(x0, teacher(x_t, t), fake(x_t, t), alpha=1.2))
    torch.testing.assert_close(torch.stack(losses), losses[0].expand(4), rtol=1e-3, atol=1e-4)


def test_14_ema_copies_first_and_halves_after_the_half_life():
    parameter = torch.nn.Parameter(torch.tensor([1.0]))
    ema = HalfLifeEMA([parameter], halflife_images=1000, rampup_ratio=0.05)
    ema.images_seen, ema.batch_size = 0, 64
    parameter.data.fill_(5.0)
    ema.step([parameter])
    assert ema.shadow_params[0].item() == 5.0
    parameter.data.fill_(0.0)
    ema.images_seen, ema.batch_size = 10**6, 100
    for _ in range(10):
        ema.step([parameter])
    assert ema.shadow_params[0].item() == pytest.approx(2.5)
    ema.images_seen = 2000  # ramp: the half-life is 100 images
    ema.step([parameter])
    assert ema.shadow_params[0].item() == pytest.approx(1.25)


def test_16_noise_per_sample_does_not_depend_on_the_split():
    whole = small_sid().generate(BATCH, sample_generators(0, 7, range(4)))
    parts = [
        small_sid().generate(
            {"batch_size": 2, "cond": {"class_labels": BATCH["cond"]["class_labels"][first : first + 2]}},
            sample_generators(0, 7, range(first, first + 2)),
        )
        for first in (0, 2)
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)


def test_16_every_split_of_a_batch_trains_the_same_weights(tmp_path):
    """Three updates on batches of 4 x 1, 2 x 2 and 1 x 4 samples x micro-batches."""
    results = []
    for size in (4, 2, 1):
        distiller = small_sid()
        start = [p.detach().clone() for p in distiller.student.network.parameters()]
        # an epsilon far above the gradients' noise, or Adam turns rounding into full steps
        args = TrainArguments(
            str(tmp_path / str(size)),
            train_batch_size=size,
            gradient_accumulation_steps=4 // size,
            max_train_steps=3,
            learning_rate=1e-3,
            adam_epsilon=1.0,
            lr_scheduler="constant",
        )
        train(distiller, Batches(Conditions(BATCH["cond"]), size), args)
        moved = [p - q for p, q in zip(distiller.student.network.parameters(), start, strict=True)]
        results.append(torch.cat([m.detach().flatten() for m in moved]))
    largest = results[0].abs().max().item()
    assert largest > 1e-4
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=2e-3 * largest)


def test_dropout_is_on_only_where_a_network_learns():
    distiller = small_sid(network_dropout=0.1)
    distiller.learn("fake_score")
    assert distiller.fake_score.network.training and not distiller.student.network.training
    distiller.learn("student")
    assert distiller.student.network.training and not distiller.fake_score.network.training
    assert not distiller.teacher.network.training
    without = small_sid(network_dropout=0.0)
    without.learn("student")
    assert not without.student.network.training


def test_networks_that_train_mode_changes_have_it():
    lora = small_sid(lora=LoraConfig(r=2, lora_dropout=0.1), network_dropout=None)
    lora.learn("student")
    assert lora.student.network.training
    network = EDM2UNet2DModel(sample_size=8, in_channels=1, model_channels=8, num_class_embeds=None, dropout=0.0)
    assert has_train_mode(network)  # forced weight normalisation
    assert not has_train_mode(tiny_unet())


def test_a_sample_that_overflows_the_fake_score_teaches_it_nothing():
    distiller = small_sid()
    fake = distiller.fake_score.forward

    def overflowing(x_t, t, cond=None):
        factor = torch.tensor([1.0, 1.0, math.inf, 1.0]).reshape(4, 1, 1, 1)
        return torch.where(factor.isfinite(), fake(x_t, t, cond), factor)

    x0, generators = torch.randn(4, 1, 16, 16), lambda: [torch.Generator().manual_seed(i) for i in range(4)]
    whole = distiller.fake_score_loss(x0, BATCH, generators())
    distiller.fake_score.forward = overflowing
    part = distiller.fake_score_loss(x0, BATCH, generators())
    assert part.isfinite() and 0 < part < whole
    distiller.learn("fake_score")
    distiller.fake_score_loss(x0, BATCH, generators()).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in distiller.fake_score.parameters() if p.grad is not None])
    assert norm.isfinite() and norm > 0


@pytest.mark.parametrize("method", [SiD, DMD])
def test_levels_that_the_teacher_does_not_have_are_refused(method):
    for wrong in (0.0, 1000.0):
        with pytest.raises(ValueError, match=rf"`start_ratio` must lie between .* but is {wrong}"):
            method(Denoiser(tiny_unet(), VP, "epsilon"), start_ratio=wrong)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_18_linear_gaussian_student_finds_the_teacher(alpha):
    """G(z) = th + s z against N(1, 0.5**2), with a fake score of the same form fitted 1:1."""
    generator = torch.Generator().manual_seed(0)
    student = torch.tensor([0.0, 1.0], requires_grad=True)
    fake = torch.tensor([0.0, 1.0], requires_grad=True)  # its mean and std
    optimizers = {
        "fake": torch.optim.Adam([fake], lr=2e-2, betas=(0.0, 0.999)),
        "student": torch.optim.Adam([student], lr=4e-3, betas=(0.0, 0.999)),
    }

    def denoise(x_t, sigma, mu, s):
        return mu + s**2 / (s**2 + sigma**2) * (x_t - mu)

    def draw():
        z, noise = torch.randn(2, 512, 8, generator=generator)
        sigma = torch.exp(torch.randn(512, 1, generator=generator) - 0.5)
        x0 = student[0] + student[1] * z
        return x0, x0 + sigma * noise, sigma

    for _ in range(1200):
        x0, x_t, sigma = (v.detach() for v in draw())
        loss = ((1 / sigma**2 + 4) * (denoise(x_t, sigma, *fake) - x0) ** 2).mean()
        optimizers["fake"].zero_grad()
        loss.backward()
        optimizers["fake"].step()
        x0, x_t, sigma = draw()
        frozen = fake.detach()
        loss = sid_loss(x0, denoise(x_t, sigma, 1.0, 0.5), denoise(x_t, sigma, *frozen), alpha=alpha)
        optimizers["student"].zero_grad()
        loss.backward()
        optimizers["student"].step()
    assert student[0].item() == pytest.approx(1.0, abs=0.08)
    assert abs(student[1].item()) == pytest.approx(0.5, abs=0.08)


def test_bad_noise_levels_name_what_is_allowed():
    with pytest.raises(ValueError, match=r"`noise_levels` must be one of .* but is 'cosine'"):
        small_sid(noise_levels="cosine")


def test_4_the_squared_difference_alone_has_the_wrong_sign_for_a_narrow_student():
    """With the fake score frozen, `w * d**2` shrinks a student that is too narrow already."""
    _, measured, _ = fixture(m=1.0, v_d=0.25, sigma=0.7, th=1.0, s=0.3)
    _, _, d_s = measured(lambda x0, a, b: ((a - b) ** 2).sum())
    assert d_s == pytest.approx(0.02002, abs=1e-5)
    closed_form, _, _ = fixture(m=1.0, v_d=0.25, sigma=0.7, th=1.0, s=0.3)
    assert 2 * closed_form(0.5)[2] == pytest.approx(-0.165165, abs=1e-6)


def test_6_alpha_above_one_drives_a_wide_student_away():
    """The gradient in s changes sign at `v = v_d + (v_d + sigma**2) / (alpha - 1)`; at alpha 1 it never does."""
    v_d, sigma, alpha = 0.25, 0.1, 1.2
    threshold = v_d + (v_d + sigma**2) / (alpha - 1)
    for factor in (0.9, 1.1):
        _, measured, _ = fixture(m=1.0, v_d=v_d, sigma=sigma, th=1.0, s=(factor * threshold) ** 0.5)
        d_s = measured(lambda x0, a, b: sid_loss(x0, a, b, alpha=alpha, normalize=False))[2]
        assert (d_s > 0) == (factor < 1)  # descent narrows the student only below the threshold
        assert measured(lambda x0, a, b: sid_loss(x0, a, b, alpha=1.0, normalize=False))[2] > 0
    threshold = v_d + (v_d + sigma**2) / (2 * (alpha - 1))  # for the mean
    for factor in (0.9, 1.1):
        _, measured, _ = fixture(m=1.0, v_d=v_d, sigma=sigma, th=0.5, s=(factor * threshold) ** 0.5)
        d_th = measured(lambda x0, a, b: sid_loss(x0, a, b, alpha=alpha, normalize=False))[1]
        assert (d_th < 0) == (factor < 1)


def test_diagnostics_are_the_real_objective_and_the_lag_of_the_fake_score():
    distiller = SiD(gaussian_denoiser(EDM, "edm", 1.0, 0.5), sample_shape=(1, 1, 2))
    x0, teacher_x0, fake_x0 = (torch.full((4, 1, 1, 2), v) for v in (0.0, 3.0, 1.0))
    distiller.diagnose(x0, teacher_x0, fake_x0)
    found = distiller.diagnosis(distiller.diagnostics)
    assert {k: v.item() for k, v in found.items()} == {"score_gap": 8.0, "fake_score_lag": 0.5}
    # samples of N(0.2, 0.9**2): with the score of just these the lag is 0, with that of others it is not
    x0 = 0.2 + 0.9 * torch.randn(100_000, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    lags = []
    for mu, s in ((0.2, 0.9), (1.0, 0.5)):
        distiller.fake_score = gaussian_denoiser(EDM, "edm", mu + 1e-3, s)
        distiller.scores(x0, {"cond": {}}, torch.Generator().manual_seed(1))
        lags.append(distiller.diagnosis(distiller.diagnostics)["fake_score_lag"].item())
    assert abs(lags[0]) < 0.02 < 1 < abs(lags[1])


def student_gradient(alpha, th, s, m=1.0, v_d=0.25, sigma=0.1):
    """The loss's gradient in (th, s) by quadrature, the optimal fake score frozen. The loss is quadratic in its three
    arguments together, so weights of the samples go in as roots."""
    z, noise, weight = hermite_grid(24)
    parameters = torch.tensor([th, s], dtype=torch.float64, requires_grad=True)
    x0 = parameters[0] + parameters[1] * z
    x_t = x0 + sigma * noise
    c, c_d = s**2 / (s**2 + sigma**2), v_d / (v_d + sigma**2)
    values = x0, c_d * x_t + (1 - c_d) * m, c * x_t + (1 - c) * th
    rows = ((weight.sqrt() * v)[:, None] for v in values)
    loss = len(z) * sid_loss(*rows, alpha=alpha, normalize=False)
    return torch.autograd.grad(loss, parameters)[0].tolist()


@pytest.mark.parametrize("alpha, arrives", [(0.5, True), (1.0, True), (1.2, False)])
def test_6_gradient_flow_from_a_wide_student(alpha, arrives):
    """At sigma = 0.1 from s = 1.5: to 0.5, or away at alpha 1.2."""
    s = 1.5
    for _ in range(400):
        s -= 50 * student_gradient(alpha, 1.0, s)[1]
        if s > 3:
            break
    assert s == pytest.approx(0.5, abs=1e-3) if arrives else s > 3


@pytest.mark.parametrize("alpha", [0.5, 0.75, 1.0])
def test_6_alpha_from_one_half_to_one_is_always_a_descent_direction(alpha):
    for sigma in (0.1, 1.0):
        for th, s in ((0.2, 0.2), (0.2, 1.5), (3.0, 0.5), (-1.0, 4.0), (1.0, 0.1)):
            true = [2 * g for g in student_gradient(0.5, th, s, sigma=sigma)]
            got = student_gradient(alpha, th, s, sigma=sigma)
            assert sum(a * b for a, b in zip(true, got, strict=True)) > 0
