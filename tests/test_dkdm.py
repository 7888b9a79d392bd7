"""The invariants of the DKDM specification, numbered as there."""

import json
import math
import shutil

import pytest
import torch
from accelerate import PartialState
from analytic import GaussianNetwork, gaussian_denoiser
from conftest import run, run_script, script, tiny_unet
from diffusers import ConsistencyModelPipeline, DDIMScheduler, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file
from torch import nn

from diffusers_onestep import (
    DKDM,
    Denoiser,
    EDMSchedule,
    FlowSchedule,
    GuidedDenoiser,
    OneStepPipeline,
    Teacher,
    VPSchedule,
    train,
)
from diffusers_onestep.arguments import TrainArguments
from diffusers_onestep.data import Batches, Conditions
from diffusers_onestep.hooks import compression_hooks
from diffusers_onestep.methods.dkdm import Chain, Reservoir, dkdm_loss, gaussian_kl
from diffusers_onestep.models import network_from_config, shrunk

VP = VPSchedule(DDPMScheduler().alphas_cumprod)
SHORT = VPSchedule(DDPMScheduler(num_train_timesteps=200, beta_schedule="squaredcos_cap_v2").alphas_cumprod)
MU, S = 0.3, 0.5


class WithVariance(nn.Module):
    """A network with two kinds of channels: a Gaussian's epsilon, and variance channels of a number per timestep."""

    def __init__(self, schedule, share=0.0, error=0.0):
        super().__init__()
        self.mean = GaussianNetwork(schedule, "epsilon", MU, S)
        self.share = nn.Parameter(torch.full((schedule.num_train_timesteps,), float(share)))
        self.error = nn.Parameter(torch.tensor(float(error)))

    def forward(self, sample, timestep, class_labels=None):
        eps = self.mean(sample, timestep) + self.error
        return torch.cat([eps, self.share[timestep.long()].reshape(-1, 1, 1, 1).expand_as(eps)], 1)


def variance_chain(schedule=SHORT, **options):
    denoiser = Denoiser(WithVariance(schedule), schedule, "epsilon")
    return Chain(denoiser, clip=False, learned_variance=True, **options), denoiser


def toy(student=None, schedule=SHORT, **options):
    teacher = gaussian_denoiser(schedule, "epsilon", MU, S)
    student = student or gaussian_denoiser(schedule, "epsilon", 0.0, 1.0)
    return DKDM(teacher, student, sample_shape=(1, 1, 1), **{"batch_size": 160, "clip": False} | options)


def test_i1_identical_networks_have_no_loss():
    chain, denoiser = variance_chain()
    x_t, place, offset = torch.randn(64, 1, 4, 4), torch.randint(200, (64,)), torch.zeros(64)
    output = chain.output(denoiser, x_t, place, offset, None)
    terms = {"x_t": x_t, "chain": chain, "place": place, "offset": offset}
    assert dkdm_loss(output, output, **terms).item() == pytest.approx(0, abs=1e-6)
    unclipped = chain.moments(3 * x_t, place, offset, output)
    chain.clip = True
    clipped = chain.moments(3 * x_t, place, offset, output)
    assert gaussian_kl(*clipped, *unclipped).max() > 0.1  # the mismatch that both sides' clipping avoids
    assert dkdm_loss(output, output, **terms | {"x_t": 3 * x_t}).item() == pytest.approx(0, abs=1e-6)


def test_i2_one_teacher_forward_per_sample_no_gradient_and_no_data():
    class Asked(dict):
        """A batch that notes what is read of it: images and conditions of a data set would be."""

        def __getitem__(self, key):
            read.add(key)
            return super().__getitem__(key)

        def get(self, key, default=None):
            read.add(key)
            return super().get(key, default)

    distiller, seen, read = toy(reservoir_ratio=0.02), [], set()
    distiller.prepare(progress_bar=False)
    distiller.teacher.network.register_forward_hook(lambda m, i, o: seen.append(len(o)))
    ((name, loss),) = distiller.updates(Asked(batch_size=160, x0=None, cond={}), torch.Generator().manual_seed(0))
    loss.backward()
    assert name == "student" and seen == [160] and read <= {"batch_size", "shared_generator"}
    assert all(p.grad is None for p in distiller.teacher.parameters())
    assert all(p.grad is not None for p in distiller.student.parameters())


def test_i3_i4_slots_are_distinct_and_move_one_step():
    distiller = toy(reservoir_ratio=0.1)
    reservoir, generator = distiller.reservoir, torch.Generator().manual_seed(0)
    assert len(reservoir) == round(0.1 * 200) * 160
    distiller.prepare(progress_bar=False)
    assert reservoir.r.min() >= 1 and reservoir.r.max() <= 199
    reservoir.r[:50] = 0
    for _ in range(20):
        before, x = reservoir.r.clone(), reservoir.x.clone()
        index, x_t, t, _ = reservoir.draw(160, generator)
        assert len(index.unique()) == 160
        expected = torch.where(before[index] == 0, 199, before[index] - 1)
        assert torch.equal(t, expected) and t.min() >= 0 and t.max() <= 199
        distiller.advance(index, x_t, t, {}, generator)
        assert torch.equal(reservoir.r[index], t)
        others = torch.ones(len(reservoir), dtype=torch.bool)
        others[index] = False
        assert torch.equal(reservoir.x[others], x[others]) and torch.equal(reservoir.r[others], before[others])


def test_i4_noise_is_added_unless_the_step_is_the_last():
    chain = toy().chain
    x_t, place = torch.randn(4, 1, 1, 1), torch.tensor([0, 1, 50, 199])
    output = chain.output(chain.denoiser, x_t, place, torch.zeros(4), None)
    one, two = (chain.step(x_t, place, torch.zeros(4), output, torch.full_like(x_t, n)) for n in (0.0, 1.0))
    assert (one == two).flatten().tolist() == [True, False, False, False]


def test_i4_steps_are_those_of_ddpm():
    for kind in ("fixed_small", "learned_range"):
        scheduler = DDPMScheduler(200, beta_schedule="squaredcos_cap_v2", clip_sample=False, variance_type=kind)
        learned = kind == "learned_range"
        chain = variance_chain()[0] if learned else toy().chain
        x_t = torch.randn(3, 1, 4, 4)
        for t in (199, 120, 1, 0):
            output = torch.randn(3, 2 if learned else 1, 4, 4)
            noise = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(5))
            ours = chain.step(x_t, torch.full((3,), t), torch.zeros(3), output, noise)
            theirs = scheduler.step(output, t, x_t, generator=torch.Generator().manual_seed(5)).prev_sample
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_i5_times_stay_uniform_in_a_long_run():
    """The method's own choice of slots on the specification's reservoir and run. As many independent draws would be
    0.0057 away from uniform in the mean."""
    distiller, generator = toy(reservoir_ratio=0.4), torch.Generator().manual_seed(0)
    reservoir, counts = distiller.reservoir, torch.zeros(200)
    reservoir.reset(torch.arange(len(reservoir)), generator)
    reservoir.r = torch.randint(1, 200, (len(reservoir),), generator=generator)  # as the preparation leaves them
    for _ in range(6000):
        index, x_t, t, _ = reservoir.take(distiller.slots(160, None, generator), generator)
        counts += torch.bincount(t, minlength=200)
        reservoir.write(index, x_t)
    assert len(reservoir) == 12_800 and 0.5 * (counts / counts.sum() - 1 / 200).abs().sum() < 0.006


def test_i6_i14_states_stay_on_the_forward_process():
    distiller = toy(reservoir_ratio=0.4)
    generator = torch.Generator().manual_seed(0)
    distiller.prepare(batch_size=4000, progress_bar=False)
    reservoir = distiller.reservoir
    resets = 0
    squares = {t: [] for t in (0, 10, 50, 100, 150, 199)}
    for _ in range(1500):
        index = distiller.slots(160, None, generator)
        resets += (reservoir.r[index] == 0).sum().item()
        _, x_t, t, _ = reservoir.take(index, generator)
        for level, values in squares.items():
            alpha, sigma = SHORT.alpha_sigma(torch.tensor([float(level)]))
            z = (x_t[t == level].flatten() - alpha.item() * MU) / (alpha**2 * S**2 + sigma**2).sqrt().item()
            values.append(z)
        distiller.advance(index, x_t, t, {}, generator)
    assert resets == pytest.approx(1500 * 160 / 200, rel=0.1)
    for values in squares.values():  # about 1200 of each: three standard errors
        z = torch.cat(values)
        assert abs(z.mean().item()) < 0.09 and 0.94 <= z.std().item() < 1.06


def test_i7_iterative_and_shuffled():
    iterative = toy(scheme="iterative", batch_size=8)
    seen = []
    iterative.chain.timestep = lambda place, offset, f=iterative.chain.timestep: (
        seen.append(place.clone()),
        f(place, offset),
    )[1]
    iterative.prepare()
    for _ in range(203):
        seen.clear()
        list(iterative.updates({"batch_size": 8}, torch.Generator().manual_seed(0)))
        assert len(seen[0].unique()) == 1
    assert seen[0][0] == 197  # 199 .. 0, then 199, 198, 197
    shuffled = toy(scheme="shuffled", batch_size=8)
    shuffled.prepare(progress_bar=False)
    assert len(shuffled.reservoir) == 8 and len(shuffled.reservoir.r.unique()) > 3
    before = shuffled.reservoir.r.clone()
    list(shuffled.updates({"batch_size": 8}, torch.Generator().manual_seed(0)))
    assert torch.equal(shuffled.reservoir.r, torch.where(before == 0, 199, before - 1))


def test_every_rank_prepares_a_reservoir_of_its_own(monkeypatch):
    states = []
    for rank in (0, 1, 1):
        monkeypatch.setattr(PartialState(), "process_index", rank)
        distiller = toy(scheme="shuffled", batch_size=8)
        next(distiller.updates({"batch_size": 8}, torch.Generator().manual_seed(0)))
        states.append(distiller.reservoir.x)
    assert not torch.equal(states[0], states[1]) and torch.equal(states[1], states[2])


def test_i7_dynamic_batches_are_nearly_independent():
    distiller, generator = toy(batch_size=8, reservoir_ratio=0.025), torch.Generator().manual_seed(0)
    assert len(distiller.reservoir) == 40
    for draw in (lambda: distiller.slots(8, None, generator), lambda: distiller.reservoir.draw(8, generator)[0]):
        drawn = torch.zeros(4000, 40)
        for held in drawn:
            held[draw()] = 1
        together = (drawn[:, :20] * drawn[:, 20:]).mean().item()  # of twenty pairs
        assert together == pytest.approx((8 / 40) * (7 / 39), rel=0.06)


def test_i8_the_exact_reverse_variance_lies_in_the_learned_range():
    chain, _ = variance_chain()
    place, x_t = torch.arange(1, 200), torch.zeros(199, 1, 1, 1)
    alpha, sigma, alpha_next, sigma_next = (v.double() for v in chain.levels(place, torch.zeros(199)))
    beta = 1 - (alpha / alpha_next) ** 2
    c1 = alpha_next * beta / sigma**2
    limits = [chain.moments(x_t, place, torch.zeros(199), torch.cat([x_t, v + x_t], 1))[1] for v in (-1.0, 1.0)]
    for s2 in (0.25, 1.0, 1e-9):
        exact = beta * sigma_next**2 / sigma**2 + c1**2 * s2 * sigma**2 / (alpha**2 * s2 + sigma**2)
        share = (exact.log() - limits[0]) / (limits[1] - limits[0])
        assert share.min() > -2e-3 and share.max() < 1 + 2e-3
        if s2 == 0.25:
            assert share.min().item() == pytest.approx(0.25, abs=5e-3)
            assert share.max().item() == pytest.approx(0.999, abs=2e-3)
        if s2 == 1.0:
            torch.testing.assert_close(share, torch.ones_like(share), rtol=0, atol=2e-3)
        if s2 == 1e-9:
            assert share.max() < 2e-3


def test_i9_the_variance_absorbs_the_squared_error_of_the_mean():
    mean_t, logvar_t, d = torch.zeros(1), torch.tensor([-2.0]), 0.7
    logvar = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([logvar], lr=0.05)
    for _ in range(500):
        optimizer.zero_grad()
        gaussian_kl(mean_t, logvar_t, torch.tensor([d]), logvar).sum().backward()
        optimizer.step()
    assert logvar.exp().item() == pytest.approx(math.exp(-2) + d**2, rel=1e-3)
    p, q = (torch.distributions.Normal(m, math.exp(lv / 2)) for m, lv in ((0.1, -1.0), (0.5, 0.3)))
    values = [torch.tensor(v) for v in (0.1, -1.0, 0.5, 0.3)]
    torch.testing.assert_close(gaussian_kl(*values), torch.distributions.kl_divergence(p, q))


@pytest.mark.parametrize("schedule, num_steps, weight", [(VP, None, 1.0), (VP, 50, 0.05), (SHORT, None, 0.2)])
def test_i10_i11_gradients_and_weight(schedule, num_steps, weight):
    """The KL in bits has the weight 1 on the published 1000 steps, T / 1000 on chains of T."""
    chain, teacher = variance_chain(schedule, num_steps=num_steps)
    student = Denoiser(WithVariance(schedule, share=0.5, error=0.2), schedule, "epsilon")
    x_t, place, offset = torch.randn(32, 1, 2, 2), torch.randint(chain.num_steps, (32,)), torch.zeros(32)
    outputs = [chain.output(n, x_t, place, offset, None).detach().requires_grad_(True) for n in (student, teacher)]
    loss = dkdm_loss(*outputs, x_t=x_t, chain=chain, place=place, offset=offset)
    moments = [chain.moments(x_t, place, offset, o) for o in (outputs[1], outputs[0])]
    mse = ((outputs[0][:, :1] - outputs[1][:, :1]) ** 2).mean()
    kl = gaussian_kl(*moments[0], *moments[1]).mean()
    torch.testing.assert_close(loss, mse + weight * kl / math.log(2))
    (grad,) = torch.autograd.grad(loss, outputs[0])
    (of_mse,) = torch.autograd.grad(mse, outputs[0])
    torch.testing.assert_close(grad[:, :1], of_mse[:, :1])  # the KL adds nothing to epsilon's channels
    assert (of_mse[:, 1:] == 0).all() and (grad[:, 1:] != 0).any()
    plain = dkdm_loss(outputs[0][:, :1], outputs[1][:, :1])
    torch.testing.assert_close(plain, mse)


class Affine(nn.Module):
    """`a[t] * x + b[t]`: holds the exact epsilon of a Gaussian."""

    def __init__(self, steps):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(steps)), nn.Parameter(torch.zeros(steps))

    def forward(self, sample, timestep, class_labels=None):
        a, b = (p[timestep.long()].reshape(-1, 1, 1, 1) for p in (self.a, self.b))
        return a * sample + b


def test_i12_i13_an_affine_student_becomes_the_teacher():
    short = VPSchedule(DDPMScheduler(num_train_timesteps=50, beta_schedule="squaredcos_cap_v2").alphas_cumprod)
    distiller = toy(Denoiser(Affine(50), short, "epsilon"), short, batch_size=200)
    distiller.prepare(batch_size=4000, progress_bar=False)
    network, generator = distiller.student.network, torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    for step in range(1500):
        if step == 1000:
            optimizer.param_groups[0]["lr"] = 0.002
        ((_, loss),) = distiller.updates({"batch_size": 200}, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    alpha, sigma = (v.flatten() for v in short.alpha_sigma(torch.arange(50).float()))
    slope = sigma / (alpha**2 * S**2 + sigma**2)
    torch.testing.assert_close(network.a.detach(), slope, rtol=0.02, atol=0.01)
    torch.testing.assert_close(network.b.detach(), -slope * alpha * MU, rtol=0.05, atol=0.02)
    ends = []
    for denoiser in (distiller.teacher, distiller.student):
        scheduler = DDIMScheduler(
            50, beta_schedule="squaredcos_cap_v2", clip_sample=False, timestep_spacing="trailing"
        )
        scheduler.set_timesteps(50)
        x = torch.randn(20_000, 1, 1, 1, generator=torch.Generator().manual_seed(7))
        with torch.no_grad():
            for t in scheduler.timesteps:
                x = scheduler.step(denoiser.call_network(x, t, None), t, x).prev_sample
        ends.append(x)
    assert ends[1].mean().item() == pytest.approx(ends[0].mean().item(), rel=0.02)
    assert ends[1].std().item() == pytest.approx(ends[0].std().item(), rel=0.02)


def test_i14_resets_bring_fresh_noise():
    reservoir, generator = Reservoir(4, (1, 8, 8), 5), torch.Generator().manual_seed(0)
    first = reservoir.take(torch.arange(4), generator)[1]
    reservoir.r[:] = 0
    second = reservoir.take(torch.arange(4), generator)[1]
    assert (first - second).abs().min(0).values.max() > 0 and reservoir.r.tolist() == [5, 5, 5, 5]
    assert second.std().item() == pytest.approx(1, abs=0.2)


def test_i15_saved_reservoirs_give_the_same_next_batch_for_any_number_of_processes(tmp_path):
    cond = {"class_labels": torch.arange(3)}
    distiller = toy(batch_size=10, reservoir_ratio=0.05, cond=cond)
    distiller.prepare(progress_bar=False)
    distiller.reservoir.r[::2] = 1  # at their last step
    distiller.save_state(tmp_path, 0)
    saved = distiller.reservoir.x.clone()
    again = toy(batch_size=10, reservoir_ratio=0.05, cond=cond)
    again.load_state(tmp_path, 0, 1)
    for seed in range(30):
        (*own, label), (*others, same) = (
            d.reservoir.draw(10, torch.Generator().manual_seed(seed)) for d in (distiller, again)
        )
        assert all(torch.equal(a, b) for a, b in zip(own, others, strict=True))
        assert torch.equal(label["class_labels"], same["class_labels"])
        for d in (distiller, again):
            d.reservoir.write(own[0], own[1] + 1)
    halves = []
    for rank in range(2):
        again.load_state(tmp_path, rank, 2)
        halves.append(again.reservoir.x.clone())
    assert torch.equal(torch.cat(halves), saved)
    with pytest.raises(ValueError, match="must hold trajectories of 10 steps"):
        Reservoir(4, (1, 1, 1), 10).load(list(tmp_path.glob("reservoir-*")))


def test_i15_what_several_processes_saved_is_dealt_out_in_their_order(tmp_path):
    saved = []
    for rank in range(2):
        distiller = toy(batch_size=10, reservoir_ratio=0.05, cond={"class_labels": torch.arange(3)})
        distiller.prepare(seed=rank, progress_bar=False)
        distiller.save_state(tmp_path, rank)
        saved.append(distiller.reservoir)
    for ranks in (1, 2, 3):
        shares = [
            toy(batch_size=10, reservoir_ratio=0.05, cond={"class_labels": torch.arange(3)}) for _ in range(ranks)
        ]
        for rank, share in enumerate(shares):
            share.load_state(tmp_path, rank, ranks)
        for name in ("x", "r", "row", "offset"):
            held = [torch.cat([getattr(r, name) for r in parts]) for parts in (saved, [d.reservoir for d in shares])]
            assert torch.equal(*held)


def test_i16_conditions_stay_with_their_trajectory():
    reservoir, generator = Reservoir(30, (1, 1, 1), 4, cond={"class_labels": torch.arange(5)}), torch.Generator()
    everything = torch.arange(30)
    labels = []
    for _ in range(8):
        _, x, _, cond = reservoir.take(everything, generator)
        labels.append(cond["class_labels"])
        reservoir.write(everything, x)
    assert all(torch.equal(labels[0], v) for v in labels[1:4]) and all(torch.equal(labels[4], v) for v in labels[5:])
    assert not torch.equal(labels[0], labels[4]) and len(labels[0].unique()) == 5


def test_states_that_are_not_finite_are_never_written_back():
    reservoir = Reservoir(3, (1, 1, 1), 4)
    index, x, _, _ = reservoir.take(torch.arange(3), torch.Generator().manual_seed(0))
    x[1] = math.nan
    reservoir.write(index, x)
    assert reservoir.r.tolist() == [3, -1, 3] and reservoir.x.isfinite().all()


@pytest.mark.parametrize(
    "schedule, kind", [(EDMSchedule(), "edm"), (FlowSchedule(), "flow_prediction"), (VP, "v_prediction")]
)
def test_other_teachers_pass_through_shifted_levels_to_the_data(schedule, kind):
    teacher = gaussian_denoiser(schedule, kind, MU, S)
    student = gaussian_denoiser(schedule, kind, 0.0, 1.0)
    options = {"num_steps": 50, "clip": False, "sample_shape": (1, 1, 1), "batch_size": 200}
    distiller = DKDM(teacher, student, scheme="synthetic", reservoir_ratio=0.4, **options)
    distiller.prepare(batch_size=4000, progress_bar=False)
    x = distiller.reservoir.x
    # fifty ancestral steps of the least variance lose some of the spread
    assert x.mean().item() == pytest.approx(MU, abs=0.03) and x.std().item() == pytest.approx(S, rel=0.15)
    dynamic = DKDM(teacher, student, **options | {"batch_size": 64})
    generator = torch.Generator().manual_seed(0)
    list(dynamic.updates({"batch_size": 64}, generator))
    offset = torch.rand(50, generator=generator)
    t = dynamic.chain.timestep(torch.arange(50), offset)
    assert (t.diff() > 0).all()
    top = dynamic.chain.timestep(torch.full((2,), 49), torch.tensor([0.0, 0.999]))
    assert top[0] == pytest.approx(schedule.t_max) and (top[1] < top[0] or isinstance(schedule, FlowSchedule))


def test_short_chains_reach_every_timestep():
    chain = Chain(gaussian_denoiser(VP, "epsilon"), 50, clip=False)
    place, offset = torch.arange(50).repeat_interleave(200), torch.linspace(0, 0.9999, 200).repeat(50)
    assert chain.timestep(place, offset).unique().tolist() == list(range(1000))
    whole = Chain(gaussian_denoiser(VP, "epsilon"), clip=False)
    assert torch.equal(whole.timestep(torch.arange(1000), torch.rand(1000)), torch.arange(1000))


@pytest.mark.parametrize("scheme", ["dynamic", "shuffled", "iterative"])
def test_micro_batches_of_an_update_share_no_slot(scheme):
    distiller = toy(batch_size=8, scheme=scheme, reservoir_ratio=0.1)
    distiller.prepare(progress_bar=False)
    for step in range(3):
        before = distiller.reservoir.r.clone()
        for micro in range(4):
            shared = torch.Generator().manual_seed(100 + step)
            own = [torch.Generator().manual_seed(1000 * step + 10 * micro + i) for i in range(2)]
            list(distiller.updates({"batch_size": 2, "shared_generator": shared}, own))
        after = distiller.reservoir.r
        expected = torch.where(before == 0, 199, before - 1)
        assert ((after == expected) | (after == before)).all() and (after != before).sum() == 8
    with pytest.raises(ValueError, match="`batch_size` must be at most the number of slots"):
        list(distiller.updates({"batch_size": 5000}))


def test_learned_variances_are_told_from_the_networks():
    double = UNet2DModel(**(dict(tiny_unet().config) | {"out_channels": 2})).eval()
    teacher = Denoiser(double, VP, "epsilon")
    distiller = DKDM(teacher, batch_size=2, num_steps=10)
    assert distiller.chain.learned_variance and distiller.student.network.config.out_channels == 2
    ((_, loss),) = distiller.updates({"batch_size": 2})
    loss.backward()
    assert distiller.student.network.conv_out.weight.grad[1].abs().sum() > 0
    with pytest.raises(ValueError, match="`student` must have 2 channels out"):
        DKDM(teacher, Denoiser(tiny_unet(), VP, "epsilon"), batch_size=2, num_steps=10)
    with pytest.raises(ValueError, match="`teacher` must have 2 channels out"):
        DKDM(Denoiser(tiny_unet(), VP, "epsilon"), batch_size=2, num_steps=10, learned_variance=True)
    with pytest.raises(ValueError, match="in the synthetic scheme"):
        DKDM(teacher, batch_size=2, num_steps=10, scheme="synthetic", learned_variance=True)


@pytest.mark.parametrize("case", ["guided", "synthetic"])
def test_a_variance_that_nobody_can_learn_is_left_out(case):
    config = dict(tiny_unet(classes=3).config) | {"out_channels": 2}
    teacher = Denoiser(UNet2DModel(**config).eval(), VP, "epsilon")
    if case == "guided":
        teacher = GuidedDenoiser(teacher, 3.0, {"class_labels": torch.tensor([2])})
    more = {"scheme": "synthetic"} if case == "synthetic" else {}
    cond = {"class_labels": torch.arange(2)}
    distiller = DKDM(teacher, batch_size=2, num_steps=4, cond=cond, **more)
    ((_, loss),) = distiller.updates({"batch_size": 2})
    loss.backward()
    mean, variance = distiller.student.network.conv_out.weight.grad
    assert mean.abs().sum() > 0 and variance.abs().sum() == 0


def test_a_student_of_a_guided_teacher_with_learned_variance_samples_as_an_ordinary_model(tmp_path):
    config = dict(tiny_unet(classes=3).config) | {"out_channels": 2}
    scheduler = DDPMScheduler(variance_type="learned_range")
    teacher = Teacher(ConsistencyModelPipeline(UNet2DModel(**config).eval(), scheduler), {0: "a", 1: "b"})
    distiller = DKDM(teacher.guided(2.0), batch_size=2, num_steps=4)
    args = TrainArguments(str(tmp_path), max_train_steps=1, train_batch_size=2)
    save, _ = compression_hooks(distiller, args)
    train(distiller, Batches(Conditions(), 2), args, save=save)
    saved = OneStepPipeline.from_pretrained(tmp_path)
    assert saved.unet.config.out_channels == 1 and saved.scheduler.config.variance_type == "fixed_small"
    saved.scheduler.set_timesteps(10)
    for t in saved.scheduler.timesteps[:2]:  # noisy steps of the stock scheduler
        x_t = torch.randn(1, 1, 16, 16)
        x = saved.scheduler.step(saved.unet(x_t, t, torch.tensor([0])).sample, t, x_t)
        assert x.prev_sample.isfinite().all()


def test_a_guided_teacher_keeps_its_schedulers_settings_and_labels():
    teacher = Teacher.from_pretrained("fashion32")
    plain = DKDM(teacher, num_steps=10, batch_size=2)
    guided = DKDM(teacher.guided(2.0), num_steps=10, batch_size=2)
    assert plain.chain.clip and guided.chain.clip
    assert guided.reservoir.cond.cond["class_labels"].tolist() == list(range(10))  # and no null label


def test_slots_in_turn_go_on_where_a_checkpoint_left_them(tmp_path):
    first, again = (toy(batch_size=8, scheme="shuffled") for _ in range(2))
    list(first.updates({"batch_size": 6}))
    first.save_state(tmp_path, 0)
    again.load_state(tmp_path, 0, 1)
    assert again.slots(4, None, None).tolist() == first.slots(4, None, None).tolist() == [6, 7, 0, 1]


def test_a_teachers_scheduler_says_how_it_steps():
    pipe = ConsistencyModelPipeline(tiny_unet(), DDPMScheduler(variance_type="fixed_large", clip_sample=False))
    chain = DKDM(Teacher(pipe), batch_size=2, num_steps=10).chain
    assert chain.large_variance and not chain.clip
    scheduler = DDPMScheduler(200, beta_schedule="squaredcos_cap_v2", clip_sample=False, variance_type="fixed_large")
    chain = Chain(gaussian_denoiser(SHORT, "epsilon"), clip=False, large_variance=True)
    x_t, output = torch.randn(2, 3, 1, 4, 4)
    noise = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(5))
    ours = chain.step(x_t, torch.full((3,), 77), torch.zeros(3), output, noise)
    theirs = scheduler.step(output, 77, x_t, generator=torch.Generator().manual_seed(5)).prev_sample
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_the_null_label_is_learned_too():
    teacher = Teacher.from_pretrained("fashion32")
    rows = DKDM(teacher, num_steps=10, batch_size=2).reservoir.cond.cond["class_labels"]
    assert (rows == teacher.null_label).float().mean() == pytest.approx(0.1)
    assert torch.bincount(rows).tolist() == [9] * 10 + [10]


def test_training_by_the_api_leaves_a_pipeline(teacher_folder, tmp_path):
    distiller = DKDM(Teacher.from_pretrained(teacher_folder), batch_size=2, num_steps=10)
    train(distiller, [{"batch_size": 2, "cond": {}}] * 2, TrainArguments(output_dir=str(tmp_path), max_train_steps=2))
    assert OneStepPipeline.from_pretrained(tmp_path)(class_labels=0, num_inference_steps=2).images


@pytest.mark.parametrize("learned_variance", [False, True])
def test_an_overflowing_teacher_teaches_nothing_and_stops_nothing(learned_variance):
    make = (lambda: Denoiser(WithVariance(SHORT), SHORT, "epsilon")) if learned_variance else None
    teacher = make() if make else gaussian_denoiser(SHORT, "epsilon", MU, S)
    student = make() if make else gaussian_denoiser(SHORT, "epsilon", 0.0, 1.0)
    options = {"batch_size": 8, "clip": False, "learned_variance": learned_variance, "sample_shape": (1, 1, 1)}
    distiller = DKDM(teacher, student, **options)
    distiller.prepare(progress_bar=False)
    student.network.requires_grad_(True)
    teacher.network.forward = lambda sample, timestep, class_labels=None: torch.full(
        (len(sample), 1 + learned_variance, 1, 1), math.inf
    )
    ((_, loss),) = distiller.updates({"batch_size": 8}, torch.Generator().manual_seed(0))
    loss.backward()
    assert loss.item() == 0 and all(not p.grad.any() for p in student.network.parameters() if p.grad is not None)
    assert distiller.reservoir.x.isfinite().all() and (distiller.reservoir.r == -1).sum() == 8


def test_half_precision_overflow_is_not_stored():
    reservoir = Reservoir(2, (1, 1, 1), 4, dtype=torch.float16)
    index, x, _, _ = reservoir.take(torch.arange(2), torch.Generator().manual_seed(0))
    x[0] = 1e6
    reservoir.write(index, x)
    assert reservoir.r.tolist() == [-1, 3] and reservoir.x.isfinite().all()
    reservoir.take(torch.arange(2), torch.Generator().manual_seed(0))
    assert reservoir.r.tolist() == [4, 3]


def test_unfinished_samples_are_no_synthetic_data():
    teacher, student = (gaussian_denoiser(SHORT, "epsilon", MU, S) for _ in range(2))
    whole = DKDM(teacher, student, batch_size=2, scheme="synthetic", clip=False, sample_shape=(1, 1, 1))
    whole.prepare(progress_bar=False)
    assert (whole.reservoir.r == 0).all()
    broken = DKDM(teacher, student, batch_size=2, scheme="synthetic", clip=False, sample_shape=(1, 1, 1))
    answer, calls = teacher.network.forward, []

    def overflow_once(sample, *args, **kwargs):
        output = answer(sample, *args, **kwargs).clone()
        calls.append(1)
        if len(calls) == 2:
            output[:3] = math.inf
        return output

    teacher.network.forward = overflow_once
    broken.prepare(progress_bar=False)  # the lost ones begin again
    assert (broken.reservoir.r == 0).all() and len(calls) > SHORT.num_train_timesteps
    teacher.network.forward = lambda sample, *args, **kwargs: torch.full_like(sample, math.inf)
    broken.reservoir.r[:] = 0
    with pytest.raises(FloatingPointError, match=r"trajectories of the teacher were not finite"):
        broken.prepare(progress_bar=False)


def test_guided_teachers_hand_their_guidance_on():
    unet = tiny_unet(classes=3)
    guided = GuidedDenoiser(Denoiser(unet, VP, "epsilon"), 3.0, {"class_labels": torch.tensor([2])})
    student = Denoiser(tiny_unet(classes=3, seed=1), VP, "epsilon")
    distiller = DKDM(guided, student, batch_size=4, num_steps=10, cond={"class_labels": torch.arange(2)})
    generator = torch.Generator().manual_seed(0)
    index, x_t, place, cond = distiller.reservoir.draw(4, generator)
    output, *_ = distiller.advance(index, x_t, place, cond, generator)
    t = distiller.chain.timestep(place, distiller.reservoir.offset[index])
    torch.testing.assert_close(output, guided.call_network(x_t, t, cond))


def test_half_precision_reservoirs_hold_half_the_bytes():
    reservoir = Reservoir(8, (4, 8, 8), 10, dtype=torch.float16, pin_memory=True)
    _, x, _, _ = reservoir.take(torch.arange(8), torch.Generator().manual_seed(0))
    assert reservoir.x.dtype == torch.float16 and x.dtype == torch.float32 and x.std() > 0.9


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scheme": "static"}, "`scheme` must be one of"),
        ({"reservoir_ratio": 0.001}, "`reservoir_ratio` times 200 steps must round to at least 1"),
        ({"num_steps": 7}, "`num_steps` must divide 200, but is 7"),
        ({"learned_variance": True, "stochastic": False}, "`learned_variance` must be False"),
    ],
)
def test_bad_options_name_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        toy(**options)


def test_students_of_other_architectures():
    unet = tiny_unet(classes=3)
    small = shrunk(unet, 0.5)
    assert small.config.block_out_channels == [4, 8]
    assert sum(p.numel() for p in small.parameters()) < 0.4 * sum(p.numel() for p in unet.parameters())
    with pytest.raises(ValueError, match="`shrink` must lie between 0 and 1"):
        shrunk(unet, 2.0)
    with pytest.raises(ValueError, match="`_class_name` of the student's config must be a model of diffusers"):
        network_from_config({"_class_name": "DDPMPipeline"})


DIT = {
    "_class_name": "DiTTransformer2DModel",
    "sample_size": 16,
    "patch_size": 4,
    "num_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "in_channels": 1,
    "out_channels": 1,
    "num_embeds_ada_norm": 3,
}


@pytest.fixture(scope="module")
def compressed(teacher_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("compressed")
    flags = {"pretrained_teacher_model": teacher_folder, "output_dir": output, "shrink": 0.5, "num_steps": 10}
    flags |= {"train_batch_size": 4, "max_train_steps": 6, "checkpointing_steps": 2, "learning_rate": 1e-3}
    command = script("train_dkdm.py", *(part for k, v in flags.items() for part in (f"--{k}", v)))
    run(command)
    return output, command


def test_the_script_leaves_an_ordinary_pipeline(compressed):
    output, _ = compressed
    pipe = OneStepPipeline.from_pretrained(output)
    assert type(pipe.scheduler) is DDPMScheduler
    assert pipe.unet.config.block_out_channels == [4, 8]
    assert pipe(class_labels=[0, 1], num_inference_steps=3).images[0].size == (16, 16)
    assert (output / "samples.png").is_file()
    assert Teacher.from_pretrained(output).num_labels == 3


def test_a_resumed_run_ends_with_the_same_weights_and_reservoir(compressed, tmp_path):
    output, command = compressed
    shutil.copytree(output, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-000006")
    flags = [str(tmp_path / "again") if part == str(output) else part for part in command]
    run([*flags, "--resume_from_checkpoint", "latest"])
    for name in ("unet/diffusion_pytorch_model.safetensors", "checkpoints/step-000006/reservoir-00000.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (output / name).read_bytes()


def begin(**flags):
    """The script in this process, with a few small steps."""
    flags = {"shrink": 0.5, "num_steps": 10, "train_batch_size": 4, "max_train_steps": 1} | flags
    run_script("train_dkdm", *(part for k, v in flags.items() for part in (f"--{k}", v)))


def test_what_stops_a_run_does_so_before_hours_of_preparation(compressed, teacher_folder, tmp_path):
    shutil.copytree(compressed[0], tmp_path / "again")
    prepared = tmp_path / "again" / "reservoir" / "reservoir-00000.safetensors"
    before = prepared.read_bytes()
    with pytest.raises(ValueError, match="`output_dir` must hold no checkpoints of another run"):
        begin(pretrained_teacher_model=teacher_folder, output_dir=tmp_path / "again", seed=1)
    assert prepared.read_bytes() == before
    wrong = {"validation_samples": 4, "validation_extractor": "retina"}
    with pytest.raises(ValueError, match="`extractor` must be one of"):
        begin(pretrained_teacher_model=teacher_folder, output_dir=tmp_path / "new", **wrong)
    with pytest.raises(ValueError, match="`resume_from_checkpoint` must be"):
        begin(pretrained_teacher_model=teacher_folder, output_dir=tmp_path / "new", resume_from_checkpoint="nowhere")
    assert not (tmp_path / "new" / "reservoir").exists()


@pytest.fixture
def reservoir_alone(compressed, tmp_path):
    """What is left of a run that was stopped before its first checkpoint."""
    folder = tmp_path / "stopped" / "reservoir"
    shutil.copytree(compressed[0] / "reservoir", folder)
    return folder


def test_a_reservoir_is_taken_by_the_run_that_it_was_made_for_alone(teacher_folder, reservoir_alone, monkeypatch):
    flags = {"pretrained_teacher_model": teacher_folder, "output_dir": reservoir_alone.parent}
    flags["resume_from_checkpoint"] = "latest"
    (part,) = reservoir_alone.iterdir()
    before, prepared = part.read_bytes(), []
    monkeypatch.setattr(DKDM, "prepare", lambda self, **options: prepared.append(options))
    with pytest.raises(ValueError, match="`scheme` 'dynamic' instead of 'synthetic': go on as it was begun"):
        begin(**flags, scheme="synthetic")
    with pytest.raises(ValueError, match="`seed` 0 instead of 1, `slots` 16 instead of 8"):
        begin(**flags, seed=1, reservoir_ratio=0.2)
    assert part.read_bytes() == before
    begin(**flags)
    assert not prepared and part.read_bytes() == before


def test_parts_of_a_run_with_more_processes_do_not_stay(teacher_folder, reservoir_alone):
    (part,) = reservoir_alone.iterdir()
    shutil.copy(part, reservoir_alone / "reservoir-00001.safetensors")
    begin(pretrained_teacher_model=teacher_folder, output_dir=reservoir_alone.parent)
    assert [file.name for file in reservoir_alone.iterdir()] == ["reservoir-00000.safetensors"]


def test_a_run_that_goes_on_from_a_checkpoint_needs_no_other_reservoir(
    compressed, teacher_folder, tmp_path, monkeypatch
):
    shutil.copytree(compressed[0], tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "reservoir")
    monkeypatch.setattr(DKDM, "prepare", None)
    flags = {"pretrained_teacher_model": teacher_folder, "output_dir": tmp_path / "again", "max_train_steps": 7}
    begin(**flags, resume_from_checkpoint="latest")
    assert (tmp_path / "again" / "checkpoints" / "step-000007").is_dir()


def test_a_compressed_student_runs_in_int8(compressed):
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    output, _ = compressed
    pipe = OneStepPipeline.from_pretrained(output)
    wanted = pipe(class_labels=[0, 1], num_inference_steps=3, generator=generator(), output_type="pt").images
    small = type(pipe.unet).from_pretrained(
        output, subfolder="unet", quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
    )
    kinds = [type(m.weight.data).__name__ for m in small.modules() if isinstance(m, nn.Linear)]
    assert kinds and set(kinds) == {"Int8Tensor"}
    pipe.register_modules(unet=small)
    images = pipe(class_labels=[0, 1], num_inference_steps=3, generator=generator(), output_type="pt").images
    assert 0 < (images - wanted).abs().mean() < 0.01  # of pixels in 0..1; diffusers quantises in bfloat16


def generator():
    return torch.Generator().manual_seed(0)


def test_a_transformer_learns_from_a_u_net(teacher_folder, tmp_path):
    (tmp_path / "dit.json").write_text(json.dumps(DIT))
    flags = {"pretrained_teacher_model": teacher_folder, "output_dir": tmp_path / "out", "num_steps": 10}
    flags |= {"student_config": tmp_path / "dit.json", "train_batch_size": 4, "max_train_steps": 2}
    run(script("train_dkdm.py", *(part for k, v in flags.items() for part in (f"--{k}", v))))
    pipe = OneStepPipeline.from_pretrained(tmp_path / "out")
    assert type(pipe.unet).__name__ == "DiTTransformer2DModel"
    assert pipe(class_labels=[0], num_inference_steps=3).images[0].size == (16, 16)


@pytest.mark.parametrize("name", ["sid", "dmd"])
def test_a_compressed_student_is_where_a_one_step_student_starts(name, compressed, teacher_folder, tmp_path):
    """Generator of the small network, score of the big one; without a rate the weights stay where they started."""
    output, _ = compressed
    flags = {"pretrained_teacher_model": teacher_folder, "student_init": output, "output_dir": tmp_path / "out"}
    flags |= {"train_batch_size": 2, "max_train_steps": 2, "learning_rate": 0.0, "fake_score_learning_rate": 1e-3}
    run(script(f"train_{name}.py", *(part for k, v in flags.items() for part in (f"--{k}", v))))
    pipe = OneStepPipeline.from_pretrained(tmp_path / "out")
    assert pipe.unet.config.block_out_channels == [4, 8] and pipe(class_labels=0).images
    small, started = (
        load_file(f / "unet" / "diffusion_pytorch_model.safetensors") for f in (output, tmp_path / "out")
    )
    assert small.keys() == started.keys() and all(torch.equal(v, started[k]) for k, v in small.items())


def test_defaults_alone_make_a_student_of_half_the_width():
    teacher = Teacher.from_pretrained("fashion32")
    distiller = DKDM(teacher, num_steps=10)
    sizes = [sum(p.numel() for p in d.network.parameters()) for d in (distiller.student, distiller.teacher)]
    assert sizes[0] < 0.5 * sizes[1] and len(distiller.reservoir) == 4 * 128
    ((name, loss),) = distiller.updates({"batch_size": 4})
    assert name == "student" and loss.requires_grad
    with pytest.raises(ValueError, match="`shrink` needs a network with"):
        DKDM(gaussian_denoiser(VP, "epsilon"), sample_shape=(1, 1, 1))
