import pytest
import torch
from analytic import GaussianNetwork, gaussian_denoiser
from conftest import tiny_unet
from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

from diffusers_onestep import Denoiser, EDMSchedule, FlowSchedule, GuidedDenoiser, NoiseSchedule, VPSchedule

VP = VPSchedule(DDIMScheduler().alphas_cumprod)
KINDS = [
    (VP, "epsilon"),
    (VP, "v_prediction"),
    (VP, "sample"),
    (FlowSchedule(), "flow_prediction"),
    (EDMSchedule(), "edm"),
]


def timesteps_of(schedule):
    return schedule.timestep(torch.tensor([0.05, 0.5, 2.5, 10.0]))


@pytest.mark.parametrize("schedule, prediction_type", KINDS)
def test_gaussian_denoiser_has_its_closed_form(schedule, prediction_type):
    denoiser = gaussian_denoiser(schedule, prediction_type).double()
    t = timesteps_of(schedule)
    x_t = torch.randn(4, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    x0 = denoiser(x_t, t)
    alpha, sigma = schedule.alpha_sigma(t.double())
    var = alpha**2 * 0.25 + sigma**2
    torch.testing.assert_close(x0, 0.3 + alpha * 0.25 / var * (x_t - alpha * 0.3), rtol=1e-7, atol=1e-7)
    # never clipped: the gradient is the slope everywhere
    (slope,) = torch.autograd.grad(x0.sum(), x_t)
    torch.testing.assert_close(slope, (alpha * 0.25 / var).expand_as(x_t), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_parity_with_ddim(unet, prediction_type):
    scheduler = DDIMScheduler(prediction_type=prediction_type, clip_sample=False)
    denoiser = Denoiser(unet, NoiseSchedule.from_scheduler(scheduler), prediction_type)
    scheduler.set_timesteps(10)
    x_t = torch.randn(2, 1, 16, 16)
    for t in scheduler.timesteps[[0, 5, 9]]:
        with torch.no_grad():
            expected = scheduler.step(unet(x_t, t).sample, t, x_t).pred_original_sample
            torch.testing.assert_close(denoiser(x_t, t), expected, rtol=1e-4, atol=1e-4)


def test_parity_with_edm(unet):
    scheduler = EDMEulerScheduler()
    denoiser = Denoiser(unet, NoiseSchedule.from_scheduler(scheduler), "edm")
    scheduler.set_timesteps(5)
    t = scheduler.timesteps[2]
    x_t = torch.randn(2, 1, 16, 16) * scheduler.sigmas[2]
    with torch.no_grad():
        output = unet(scheduler.scale_model_input(x_t, t), t).sample
        expected = scheduler.step(output, t, x_t).pred_original_sample
        torch.testing.assert_close(denoiser(x_t, t), expected, rtol=1e-4, atol=1e-5)


def test_parity_with_flow_step_to_zero(unet):
    scheduler = FlowMatchEulerDiscreteScheduler()
    denoiser = Denoiser(unet, NoiseSchedule.from_scheduler(scheduler), "flow_prediction")
    scheduler.set_timesteps(sigmas=[0.7])
    t = scheduler.timesteps[0]
    x_t = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        expected = scheduler.step(unet(x_t, t).sample, t, x_t).prev_sample
        torch.testing.assert_close(denoiser(x_t, t), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("schedule, prediction_type", KINDS)
def test_weight_turns_the_x0_error_into_the_network_error(schedule, prediction_type):
    denoiser = gaussian_denoiser(schedule, prediction_type)
    other = gaussian_denoiser(schedule, prediction_type, mu=-0.2, s=0.8)
    t = timesteps_of(schedule)
    x_t = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    x0_error = denoiser.weight(t) * (denoiser(x_t, t) - other(x_t, t)) ** 2
    network_error = (denoiser.model_output(x_t, t) - other.model_output(x_t, t)) ** 2
    torch.testing.assert_close(x0_error, network_error, rtol=1e-4, atol=1e-6)


def test_low_precision_network_keeps_float32_outside(unet):
    x_t, t = torch.randn(2, 1, 16, 16), torch.tensor([10, 300])
    exact = Denoiser(unet, VP, "epsilon")(x_t, t)
    half = Denoiser(tiny_unet().to(torch.bfloat16), VP, "epsilon")(x_t, t)
    assert half.dtype == torch.float32
    ratio = VP.ratio(t).float().reshape(2, 1, 1, 1)
    assert ((half - exact).abs() / ratio).max() < 0.05
    assert Denoiser(unet, VP, "epsilon")(x_t.to(torch.bfloat16), t).dtype == torch.bfloat16


def test_learned_variance_channels_are_dropped():
    class Doubled(torch.nn.Module):
        def forward(self, x, t):
            return torch.cat([x, 7 * x], 1)

    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(Denoiser(Doubled(), VP, "sample")(x, torch.tensor([1, 2])), x)


def test_guidance_equals_guidance_of_the_model_output():
    denoiser = Denoiser(tiny_unet(classes=4), VP, "epsilon")
    x_t, t = torch.randn(2, 1, 16, 16), torch.tensor([100, 440])
    cond, negative = {"class_labels": torch.tensor([0, 1])}, {"class_labels": torch.tensor([3])}
    both = {"class_labels": torch.tensor([3, 3])}
    with torch.no_grad():
        eps = 3.0 * denoiser.model_output(x_t, t, cond) - 2.0 * denoiser.model_output(x_t, t, both)
        alpha, sigma = VP.alpha_sigma(t)
        guided = GuidedDenoiser(denoiser, 3.0, negative)(x_t, t, cond)
        torch.testing.assert_close(guided, (x_t - sigma * eps) / alpha, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(GuidedDenoiser(denoiser, 1.0, negative)(x_t, t, cond), denoiser(x_t, t, cond))
        torch.testing.assert_close(GuidedDenoiser(denoiser, 0.0, negative)(x_t, t, cond), denoiser(x_t, t, both))


def test_guidance_off_is_one_call_of_the_plain_batch():
    sizes = []

    class Counting(GaussianNetwork):
        def forward(self, sample, timestep, class_labels=None):
            sizes.append(len(sample))
            return super().forward(sample, timestep)

    denoiser = Denoiser(Counting(VP, "epsilon"), VP, "epsilon")
    labels = {"class_labels": torch.tensor([0, 0])}
    for scale in (1.0, 0.0, 2.0):
        GuidedDenoiser(denoiser, scale, labels)(torch.randn(2, 1, 2, 2), torch.tensor([5, 5]), labels)
    assert sizes == [2, 2, 4]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((VP, "eps"), r"`prediction_type` must be one of .* but is 'eps'"),
        ((VP, "edm"), r"`prediction_type` must not be 'edm' without an EDM schedule"),
        ((FlowSchedule(), "epsilon"), r"`prediction_type` must not be 'epsilon'"),
    ],
)
def test_bad_arguments_name_what_is_allowed(unet, arguments, message):
    with pytest.raises(ValueError, match=message):
        Denoiser(unet, *arguments)


def test_guidance_without_a_null_condition_is_refused(unet):
    with pytest.raises(ValueError, match=r"`guidance_scale` must be 1.0 .* but is 2.0"):
        GuidedDenoiser(Denoiser(unet, VP, "epsilon"), 2.0)
