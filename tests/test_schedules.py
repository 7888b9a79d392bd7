import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    ScoreSdeVeScheduler,
)

from diffusers_onestep import EDMSchedule, FlowSchedule, NoiseSchedule, VPSchedule
from diffusers_onestep.schedules import karras_sigma

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def test_continuous_timesteps_are_refused():
    with pytest.raises(ValueError, match="`scheduler` must have discrete timesteps"):
        NoiseSchedule.from_scheduler(
            EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction")
        )


@pytest.mark.parametrize(
    "config, values",
    [
        (SD, {20: 0.138, 249: 0.693, 399: 1.161, 499: 1.613, 749: 4.082, 980: 13.04, 999: 14.61, 625: 2.5017}),
        ({}, {20: 0.079, 399: 2.031, 980: 130.1, 999: 157.4}),
    ],
)
def test_vp_ratios_are_those_of_the_specification(config, values):
    schedule = NoiseSchedule.from_scheduler(DDPMScheduler(**config))
    ratios = schedule.ratio(torch.tensor(list(values)))
    torch.testing.assert_close(ratios, torch.tensor(list(values.values())).double(), rtol=6e-3, atol=0)


def test_vp_reads_alphas_cumprod_and_inverts_the_ratio():
    scheduler = EulerDiscreteScheduler(**SD)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    t = torch.tensor([0, 1, 399, 999])
    alpha, sigma = schedule.alpha_sigma(t)
    assert isinstance(schedule, VPSchedule) and alpha.shape == (4, 1, 1, 1) and alpha.dtype == torch.float32
    torch.testing.assert_close(alpha.flatten(), scheduler.alphas_cumprod[t].sqrt())
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha))
    assert schedule.timestep(schedule.ratio(t)).tolist() == t.tolist()
    assert schedule.timestep(2.5).item() == 625


def test_a_schedule_is_copied_to_a_device_once():
    schedule = NoiseSchedule.from_scheduler(EulerDiscreteScheduler(**SD))
    calls, t = [], torch.zeros(2, dtype=torch.long, device="meta")
    table = schedule.alphas_cumprod
    schedule.alphas_cumprod = SimpleNamespace(to=lambda device: calls.append(device) or table.to(device))
    for _ in range(3):
        alpha, _ = schedule.alpha_sigma(t)
        assert alpha.device.type == "meta"
    assert calls == [t.device]


def test_zero_terminal_snr_is_kept():
    schedule = NoiseSchedule.from_scheduler(
        DDIMScheduler(**SD, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    )
    alpha, sigma = schedule.alpha_sigma(torch.tensor([999]))
    assert alpha.item() == 0 and sigma.item() == 1
    assert schedule.timestep(math.inf).item() == 999


def test_fractional_timesteps_lie_between_their_neighbours():
    schedule = VPSchedule(DDPMScheduler().alphas_cumprod)
    low, middle, high = schedule.ratio(torch.tensor([10.0, 10.5, 11.0]))
    assert low < middle < high


def test_flow_schedule():
    schedule = NoiseSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert isinstance(schedule, FlowSchedule)
    alpha, sigma = schedule.alpha_sigma(torch.tensor([0.0, 250.0, 1000.0]))
    torch.testing.assert_close(sigma.flatten(), torch.tensor([0.0, 0.25, 1.0]))
    torch.testing.assert_close(alpha + sigma, torch.ones_like(alpha))
    assert schedule.timestep(2.5).item() == pytest.approx(714.2857)
    assert schedule.timestep(math.inf).item() == 1000


def test_edm_schedule_and_karras_grid():
    schedule = NoiseSchedule.from_scheduler(EDMEulerScheduler())
    assert isinstance(schedule, EDMSchedule)
    sigmas = torch.tensor([0.002, 0.5, 80.0])
    alpha, sigma = schedule.alpha_sigma(schedule.timestep(sigmas))
    torch.testing.assert_close(sigma.flatten(), sigmas, rtol=1e-5, atol=0)
    assert alpha.unique().item() == 1
    expected = {0: 0.002, 20: 0.00323, 250: 0.1703, 500: 2.527, 750: 17.62, 980: 72.05, 999: 80.0}
    got = schedule.ratio(schedule.grid(torch.tensor(list(expected))))
    torch.testing.assert_close(got, torch.tensor(list(expected.values())).double(), rtol=2e-3, atol=0)


def test_karras_sigma_invariant_11():
    u = torch.tensor([0.0, 0.5, 0.8, 1.0])
    torch.testing.assert_close(
        karras_sigma(u), torch.tensor([0.002, 2.5152, 24.4083, 80.0]).double(), rtol=1e-4, atol=0
    )


def test_unknown_scheduler_is_refused():
    with pytest.raises(ValueError, match=r"`scheduler` must be .* but is ScoreSdeVeScheduler"):
        NoiseSchedule.from_scheduler(ScoreSdeVeScheduler())
