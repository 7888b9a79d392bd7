"""Guidance in the score methods against the specification's conventions and numbers, on a tiny Stable Diffusion."""

import gc
import weakref

import pytest
import torch
from conftest import tiny_unet
from families import tiny_pipeline

from diffusers_onestep import DMD, Denoiser, GuidedDenoiser, SiD, Teacher, VPSchedule
from diffusers_onestep.methods.base import normal
from diffusers_onestep.methods.dmd import distribution_matching_loss

PROMPTS = ["a cat", "a red car", "the sea", "x"]


@pytest.fixture
def teacher():
    return Teacher(tiny_pipeline("sd"))


@pytest.fixture
def batch(teacher):
    return {"batch_size": 4, "cond": teacher.encode(PROMPTS)}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_stable_diffusions_levels(teacher):
    sid, dmd = SiD(teacher, alpha=1.0), DMD(teacher)
    assert sid.student_timesteps == [625]
    assert sid.init_noise_sigma == pytest.approx(0.92856, abs=1e-5)
    assert teacher.denoiser.schedule.ratio(torch.tensor(625)).item() == pytest.approx(2.5017, abs=1e-4)
    assert dmd.student_timesteps == [999] and dmd.init_noise_sigma == 1.0
    for distiller, low, high in ((sid, 20, 979), (dmd, 20, 980)):
        t = distiller.student_level(60_000, seeded(), "cpu")
        assert (t.min().item(), t.max().item()) == (low, high)
    t = dmd.fake_score_level(60_000, seeded(), "cpu")
    assert (t.min().item(), t.max().item()) == (0, 999)


def test_a_run_names_the_paper_of_what_it_does(teacher):
    runs = {
        "2404.04057": [SiD(teacher), SiD(teacher, kappas=(1, 1, 1, 2))],
        "2406.01561": [SiD(teacher, kappas=1.5)],
        "2410.14919": [SiD(teacher, gan_weight=1.0), SiD(teacher, kappas=1.5, gan_weight=1.0)],
        "2311.18828": [DMD(teacher), DMD(teacher, regression_weight=0.25, regression_loss="l2")],
        "2405.14867": [
            DMD(teacher, gan_weight=1e-3),
            DMD(teacher, fake_score_updates=5),
            DMD(teacher, student_timesteps=[999, 499]),
            DMD(teacher, matching_weight=0.0, regression_weight=1.0, regression_loss="l2"),
        ],
        "2505.12674": [SiD(teacher, student_timesteps=[999, 499])],
        "2509.25127": [SiD(Teacher(tiny_pipeline("sd3")), kappas=1.5)],
    }
    for arxiv_id, distillers in runs.items():
        assert {distiller.paper.arxiv_id for distiller in distillers} == {arxiv_id}


def test_guiding_the_noise_is_guiding_the_sample(teacher):
    cond, null = teacher.encode(PROMPTS[:1]), teacher.null_condition(1)
    x_t, t = torch.randn(1, 4, 8, 8, generator=seeded()), torch.tensor([400])
    with torch.no_grad():
        eps_c, eps_u = (teacher.denoiser.model_output(x_t, t, c) for c in (cond, null))
        alpha, sigma = teacher.denoiser.schedule.alpha_sigma(t.double())
        expected = (x_t - sigma * (eps_u + 8.0 * (eps_c - eps_u))) / alpha
        torch.testing.assert_close(teacher.guided(8.0)(x_t, t, cond), expected.float(), rtol=1e-4, atol=1e-4)


def test_kappa_one_is_the_plain_method(teacher, batch):
    plain, lsg = SiD(teacher, alpha=1.0), SiD(teacher, alpha=1.0, kappas=1.0)
    sizes = []
    for network in (lsg.teacher.network, lsg.fake_score.network):
        network.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    losses = [[(n, v.item()) for n, v in d.updates(batch, seeded())] for d in (plain, lsg)]
    assert losses[0] == losses[1] and set(sizes) == {4}


def test_long_and_short_guidance_starts_at_zero_and_long_guidance_does_not(teacher, batch):
    """Specification of SiD, 10.17: equal scales and equal networks give no loss."""
    x0 = torch.randn(4, 4, 8, 8, generator=seeded(1))
    with torch.no_grad():
        assert SiD(teacher, kappas=2.0).student_loss(x0, batch, seeded()).item() == pytest.approx(0, abs=1e-3)
        assert abs(SiD(teacher, kappas=(1, 1, 1, 2)).student_loss(x0, batch, seeded()).item()) > 1
        # the teacher's scale alone is what a guided teacher means
        long = SiD(teacher, kappas=(1, 1, 1, 2)).student_loss(x0, batch, seeded())
        guided = SiD(teacher.guided(2.0)).student_loss(x0, batch, seeded())
        torch.testing.assert_close(long, guided)


def test_kappa_1_guides_what_the_fake_score_learns(teacher, batch):
    distiller = SiD(teacher, alpha=1.0, kappas=(3.0, 1.5, 1.5, 2.0))
    assert distiller.teacher.guidance_scale == 2.0
    x0 = torch.randn(4, 4, 8, 8, generator=seeded(1))
    with torch.no_grad():
        loss = distiller.fake_score_loss(x0, batch, seeded())
        generator = seeded()
        t = distiller.fake_score_level(4, generator, "cpu")
        noise = normal(x0.shape, generator)
        x_t = distiller.fake_score.add_noise(x0, noise, t)
        eps_c = distiller.fake_score.model_output(x_t, t, batch["cond"])
        eps_u = distiller.fake_score.model_output(x_t, t, teacher.null_condition(4))
        expected = ((eps_u + 3.0 * (eps_c - eps_u) - noise) ** 2).flatten(1).sum(1).mean()
        torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)


def test_a_tenth_of_the_prompts_is_dropped_where_the_fake_score_learns(teacher):
    cond = {"encoder_hidden_states": torch.ones(5000, 1, 1)}
    distiller = SiD(teacher, kappas=1.5)
    distiller.negative_cond = {"encoder_hidden_states": torch.zeros(1, 1, 1)}
    kept = distiller.fake_score_batch({"batch_size": 5000, "cond": cond}, seeded())["cond"]["encoder_hidden_states"]
    assert kept.mean().item() == pytest.approx(0.9, abs=0.015)
    for kappas in (None, (1, 1, 1, 4.5)):
        whole = SiD(teacher, kappas=kappas).fake_score_batch({"batch_size": 5000, "cond": cond}, seeded())
        assert whole["cond"] is cond


def test_sequential_path_with_guidance(teacher, batch):
    gradients = []
    for sequential in (False, True):
        distiller = SiD(teacher, alpha=1.2, kappas=(1.5, 1.5, 1.5, 3.0), sequential=sequential)
        distiller.learn("student")
        x0 = distiller.generate(batch, seeded())
        distiller.student_loss(x0, batch, seeded(2)).backward()
        gradients.append(distiller.student.network.conv_in.weight.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3 * gradients[0].abs().max().item())


def test_conditions_with_drops_do_not_outlive_their_micro_batch(teacher, batch, monkeypatch):
    distiller, made = SiD(teacher, kappas=1.5), []
    drop = distiller.fake_score_batch

    def noted(*args):
        dropped = drop(*args)
        made.extend(weakref.ref(value) for value in dropped["cond"].values())
        return dropped

    monkeypatch.setattr(distiller, "fake_score_batch", noted)
    run = distiller.updates(batch, seeded())
    name, loss = next(run)
    assert name == "fake_score"
    loss.backward()
    del loss
    gc.collect()
    assert made and not any(ref() is not None for ref in made)


@pytest.mark.parametrize("kappas", [(1, 2), (1, 2, 3, 4)])
def test_kappas_that_mean_nothing(teacher, kappas):
    with pytest.raises(ValueError, match="`kappas` must be one number or four with equal middle ones"):
        SiD(teacher, kappas=kappas)
    with pytest.raises(ValueError, match="`kappas` must be None for a teacher with a guidance scale"):
        SiD(teacher.guided(2.0), kappas=1.5)


def test_i8_first_step_of_a_guided_dmd(teacher, batch):
    """With the fake score still equal to the teacher, the direction is `-(w - 1) (mu_c - mu_u) / normaliser`."""
    distiller = DMD(teacher.guided(8.0), sample_shape=teacher.sample_shape)
    assert isinstance(distiller.teacher, GuidedDenoiser) and not isinstance(distiller.fake_score, GuidedDenoiser)
    x0 = torch.randn(4, 4, 8, 8, generator=seeded(1), requires_grad=True)
    teacher_x0, fake_x0 = distiller.scores(x0, batch, seeded())
    distribution_matching_loss(x0, teacher_x0, fake_x0).backward()
    generator = seeded()
    t = distiller.student_level(4, generator, "cpu")
    x_t = distiller.student.add_noise(x0.detach(), normal(x0.shape, generator), t)
    with torch.no_grad():
        mu_c, mu_u = (teacher.denoiser(x_t, t, c) for c in (batch["cond"], teacher.null_condition(4)))
    scale = (x0.detach() - teacher_x0).flatten(1).abs().mean(1).reshape(-1, 1, 1, 1)
    expected = -7.0 * (mu_c - mu_u) / scale
    torch.testing.assert_close(x0.grad * x0.numel(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kappas", [(1.5, 1, 1, 1), (1, 1.5, 1.5, 1), (1, 1, 1, 1.5), 1.5])
def test_kappas_need_a_null_condition(kappas):
    unconditional = Denoiser(tiny_unet(), VPSchedule(torch.linspace(0.9999, 0.01, 1000)), "epsilon")
    with pytest.raises(ValueError, match=r"`kappas` must be 1.0 for a teacher without a null condition"):
        SiD(unconditional, kappas=kappas)
    assert SiD(unconditional, kappas=1.0).fake_guidance == (1.0, 1.0)


def test_the_critic_judges_with_the_condition(teacher):
    with pytest.raises(ValueError, match=r"`kappas` of the fake score must not be 0 .* but are \(0, 1, 1, 1\.5\)"):
        SiD(teacher, kappas=(0, 1, 1, 1.5), gan_weight=1.0)
