import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)

from diffusers_onestep import NoiseSchedule, OneStepScheduler
from diffusers_onestep.schedulers import student_scheduler


def test_one_step_is_x0_of_ddim():
    ours = OneStepScheduler(student_timesteps=[440])
    ddim = DDIMScheduler(clip_sample=False)
    ddim.set_timesteps(10)
    x_t, output = torch.randn(2, 2, 1, 4, 4)
    got = ours.step(output, 440, x_t)
    torch.testing.assert_close(got.prev_sample, ddim.step(output, 440, x_t).pred_original_sample, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.prev_sample, got.pred_original_sample)


@pytest.mark.parametrize(
    "scheduler",
    [FlowMatchEulerDiscreteScheduler(), EDMEulerScheduler(), DDIMScheduler(rescale_betas_zero_snr=True)],
)
def test_other_schedulers_configs_are_not_taken_for_variance_preserving_ones(scheduler):
    with pytest.raises(ValueError, match="`config` must be of a variance-preserving scheduler"):
        OneStepScheduler.from_config(scheduler.config)


def test_few_steps_add_fresh_noise_of_the_next_level():
    scheduler = OneStepScheduler(student_timesteps=[999, 499], prediction_type="sample")
    x0 = torch.randn(2, 1, 4, 4)
    got = scheduler.step(x0, 999, torch.randn(2, 1, 4, 4), generator=torch.Generator().manual_seed(3)).prev_sample
    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(got, DDPMScheduler().add_noise(x0, noise, torch.tensor([499])), rtol=1e-5, atol=1e-5)
    assert torch.equal(scheduler.step(x0, 499, x0).prev_sample, x0)


def test_another_step_count_is_refused():
    with pytest.raises(ValueError, match=r"`num_inference_steps` must be 1, .* but is 4"):
        OneStepScheduler(student_timesteps=[999]).set_timesteps(4)


@pytest.mark.parametrize("timesteps, allowed", [([999], "1, "), (None, "between 1 and 1000, ")])
@pytest.mark.parametrize("count", [0, -3, 1001])
def test_counts_without_a_run_are_refused(timesteps, allowed, count):
    with pytest.raises(ValueError, match=rf"`num_inference_steps` must be {allowed}.*but is {count}"):
        OneStepScheduler(student_timesteps=timesteps).set_timesteps(count)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"student_timesteps": [1000]}, r"`student_timesteps` must fall and lie between 0 and 999"),
        ({"student_timesteps": [1, 2]}, r"`student_timesteps` must fall"),
        ({"prediction_type": "eps"}, r"`prediction_type` must be one of"),
        ({"schedule_type": "ve"}, r"`schedule_type` must be 'vp', 'flow' or 'edm', but is 've'"),
        ({"parameterization": "score"}, r"`parameterization` must be"),
    ],
)
def test_bad_configs_name_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        OneStepScheduler(**options)


@pytest.mark.parametrize(
    "teacher, prediction_type",
    [
        (DDPMScheduler(beta_schedule="scaled_linear"), "epsilon"),
        (DDIMScheduler(rescale_betas_zero_snr=True), "v_prediction"),
        (EDMEulerScheduler(sigma_max=40.0), "edm"),
        (FlowMatchEulerDiscreteScheduler(), "flow_prediction"),
    ],
)
def test_student_scheduler_keeps_the_teachers_schedule(teacher, prediction_type, tmp_path):
    schedule = NoiseSchedule.from_scheduler(teacher)
    t_start = schedule.timestep(2.5).item()
    scheduler = student_scheduler(teacher, prediction_type, [t_start], 0.9)
    scheduler.save_pretrained(tmp_path)
    again = OneStepScheduler.from_pretrained(tmp_path)
    t = schedule.timestep(torch.tensor([0.1, 1.0, 5.0]))
    for expected, got in zip(schedule.alpha_sigma(t), NoiseSchedule.from_scheduler(again).alpha_sigma(t), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert again.init_noise_sigma == 0.9
    assert again.timesteps.tolist() == pytest.approx([t_start])


@pytest.mark.parametrize("timesteps", [[399], [999], [999, 749, 499, 249]])
def test_unit_variance_students_get_a_stock_scheduler_with_the_same_x0(timesteps):
    teacher = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    stock = student_scheduler(teacher, "epsilon", timesteps, 1.0)
    ours = OneStepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", student_timesteps=timesteps
    )
    assert isinstance(stock, LCMScheduler)
    stock.set_timesteps(len(timesteps))
    ours.set_timesteps(len(timesteps))
    assert stock.timesteps.tolist() == timesteps == ours.timesteps.tolist()
    x_t, output = torch.randn(2, 1, 1, 4, 4)
    for t in timesteps:
        results = [
            scheduler.step(output, t, x_t, generator=torch.Generator().manual_seed(0), return_dict=False)[0]
            for scheduler in (stock, ours)
        ]
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError):
        stock.set_timesteps(len(timesteps) + 1)


@pytest.mark.parametrize("timesteps, sigma", [([440], 0.93), ([999, 500], 1.0)])
def test_rules_without_a_stock_scheduler_get_ours(timesteps, sigma):
    assert isinstance(student_scheduler(DDPMScheduler(), "epsilon", timesteps, sigma), OneStepScheduler)


def test_compatible_with_stock_configs():
    ddpm = DDPMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
    ours = OneStepScheduler.from_config(ddpm.config)
    torch.testing.assert_close(ours.alphas_cumprod, ddpm.alphas_cumprod)
    assert ours.config.prediction_type == "v_prediction"
    assert isinstance(DDPMScheduler.from_config(ours.config), DDPMScheduler)
    assert DDPMScheduler in ours.compatibles


def test_free_step_counts_are_trailing():
    scheduler = OneStepScheduler()
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
