"""Every variant of EDM's networks against a second implementation, written from the specification alone.

`edm_second_implementation.safetensors` holds its D(x; sigma, labels, augmentation labels), and D(x; sigma) as
`.plain`, in float64, for formula weights; the inputs are those of the known answers in `test_edm.py`.
"""

from pathlib import Path

import pytest
import torch
from formula import formula_state, u
from safetensors.torch import load_file
from test_edm import error

from diffusers_onestep import Denoiser, EDM2UNet2DModel, EDMHeunScheduler, EDMSchedule, EDMUNet2DModel
from diffusers_onestep.conversion.edm import edm2_settings, edm_settings, network_from_edm
from diffusers_onestep.conversion.kinds import EDM_WRAPPERS
from diffusers_onestep.schedules import iddpm_sigmas

SMALL = {"img_resolution": 8, "img_channels": 3, "label_dim": 4, "model_channels": 16, "channel_mult": [1, 2]}
SMALL |= {"num_blocks": 1, "attn_resolutions": [4]}
SONG = SMALL | {"model_type": "SongUNet"}
NCSN = {
    "embedding_type": "fourier",
    "channel_mult_noise": 2,
    "encoder_type": "residual",
    "resample_filter": [1, 3, 3, 1],
}
ADM = SMALL | {"model_type": "DhariwalUNet"}
EDM2 = {"model_channels": 16, "channels_per_head": 16, "channel_mult_noise": 2, "channel_mult_emb": 3}
BALANCES = {"label_balance": 0.4, "concat_balance": 0.6, "res_balance": 0.2, "attn_balance": 0.4, "clip_act": 1.5}
CASES = {
    "vp": ("VPPrecond", SONG | {"augment_dim": 9, "attn_resolutions": [8]}, [0.002, 2.5, 150.0]),
    "vp-skip": (
        "VPPrecond",
        SONG | {"encoder_type": "skip", "decoder_type": "skip", "resample_filter": [1, 3, 3, 1], "img_channels": 2},
        [0.3, 80.0],
    ),
    "residual-skip": ("EDMPrecond", SONG | NCSN | {"decoder_type": "skip", "channel_mult": [2, 1, 2]}, [0.3, 80.0]),
    "ve-labels": ("VEPrecond", SONG | NCSN | {"augment_dim": 9, "num_blocks": 2}, [0.02, 2.5, 100.0]),
    "iddpm": ("iDDPMPrecond", SONG | {"channel_mult": [2, 1]}, [0.007, 2.5, 1000.0]),
    "iddpm-adm": ("iDDPMPrecond", ADM | {"model_channels": 64, "augment_dim": 9}, [0.007, 2.5, 80.0]),
    "adm-heads": ("EDMPrecond", ADM | {"model_channels": 64, "channel_mult": [1, 3]}, [0.002, 80.0]),
    "edm2": ("Precond", SMALL | EDM2, [0.002, 2.5, 80.0]),
    "edm2-balances": ("Precond", SMALL | EDM2 | BALANCES | {"channel_mult": [2, 1, 3], "num_blocks": 2}, [0.3, 80.0]),
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_variants_agree_with_a_second_implementation(name):
    wrapper, options, sigmas = CASES[name]
    expected = load_file(Path(__file__).with_name("edm_second_implementation.safetensors"))
    preconditioning = EDM_WRAPPERS.get(wrapper, "edm")
    with torch.device("meta"):
        if wrapper == "Precond":
            state = formula_state(EDM2UNet2DModel(**edm2_settings(options)[0]), "unet")
        else:
            state = formula_state(EDMUNet2DModel(**edm_settings(options, preconditioning)[0]), "model")
    network = network_from_edm(wrapper, options, state).network
    schedule = EDMSchedule(preconditioning=preconditioning)
    denoiser = Denoiser(network, schedule, schedule.prediction_type)
    sigma, channels = torch.tensor(sigmas), options["img_channels"]
    x = u("x", len(sigma) * channels * 64).reshape(-1, channels, 8, 8)
    scale = (3 * (0.25 + sigma.double() ** 2)).sqrt().float()  # float32 roots differ by CPU
    x = x * scale.reshape(-1, 1, 1, 1)
    cond = {"class_labels": (7 * torch.arange(len(sigma)) + 3) % options["label_dim"]}
    if options.get("augment_dim"):
        cond["augment_labels"] = u("augment", 9 * len(sigma)).reshape(-1, 9)
    t = schedule.c_noise(sigma)
    assert error(denoiser(x, t, cond), expected[name]) < 1e-5
    network.double()
    assert error(denoiser(x.double(), t, cond), expected[name]) < 1e-9
    assert error(denoiser(x.double(), t), expected[f"{name}.plain"]) < 1e-9


@pytest.mark.parametrize("cls", [EDMUNet2DModel, EDM2UNet2DModel])
@torch.no_grad()
def test_a_network_loaded_in_double_precision_is_all_double(cls, tmp_path):
    config = {"sample_size": 8, "in_channels": 3, "out_channels": 3, "model_channels": 8, "channel_mult": (1, 2)}
    network = cls(**config, layers_per_block=1, attention_resolutions=(4,)).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    network.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path, dtype=torch.float64)
    assert {p.dtype for p in (*loaded.parameters(), *loaded.buffers())} == {torch.float64}
    x, t = torch.randn(2, 3, 8, 8).double(), torch.tensor([-1.3, 0.7]).double()
    assert error(loaded(x, t).sample, network.double()(x, t).sample) < 1e-14
    _, info = cls.from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert not info["missing_keys"]


def test_heun_draws_the_noise_of_its_authors():
    """At every step, also where none is added. A network that says x0 = 0 makes every step exact: x / sigma stays."""
    generator = torch.Generator().manual_seed(1)
    noises = [torch.randn(1, 1, 4, 4, dtype=torch.float64, generator=generator) for _ in range(4)]
    scheduler = EDMHeunScheduler(s_churn=40.0, s_min=0.05, s_max=50.0, s_noise=1.003, preconditioning="ve")
    scheduler.set_timesteps(4)
    x = expected = torch.full((1, 1, 4, 4), 80.0, dtype=torch.float64)
    for sigma, following, noise in zip(scheduler.sigmas, scheduler.sigmas[1:], noises, strict=False):
        hat = sigma * 2**0.5 if 0.05 <= sigma <= 50 else sigma
        expected = expected + (hat**2 - sigma**2) ** 0.5 * 1.003 * noise
        if following:
            expected = expected * following / hat
    generator.manual_seed(1)
    for sigma, t in zip(scheduler.levels[:-1], scheduler.timesteps, strict=False):  # the last call gives x0
        x = scheduler.step(-x / sigma, t, x, generator=generator).prev_sample
    torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-9)


def test_noise_levels_are_those_that_the_networks_know():
    """The authors sample on `max(0.002, sigma_min)` to `min(80, sigma_max)` of the network."""
    u = iddpm_sigmas()
    least = {"edm": 0.002, "vp": 0.002, "ve": 0.02, "iddpm": u[0].item()}
    known = {"edm": (1e-6, 1e6), "vp": (0.0010005, 152.167), "ve": (0.02, 100), "iddpm": (u[0].item(), u[-1].item())}
    for preconditioning, sigma_min in least.items():
        scheduler = EDMHeunScheduler(preconditioning=preconditioning)
        assert scheduler.sigmas[-2] == pytest.approx(sigma_min, rel=1e-12)
        schedule = EDMSchedule(1e-6, 1e6, preconditioning=preconditioning)
        assert (schedule.sigma_min, schedule.sigma_max) == pytest.approx(known[preconditioning], rel=1e-5)
        ends = schedule.alpha_sigma(torch.tensor([schedule.t_min, schedule.t_max]).double())[1].flatten()
        assert ends.tolist() == pytest.approx(known[preconditioning], rel=1e-5)
    # the grid is of these levels, and rounded only then
    scheduler = EDMHeunScheduler(preconditioning="iddpm")
    low, high = least["iddpm"] ** (1 / 7), 80 ** (1 / 7)
    grid = (high + torch.arange(18).double() / 17 * (low - high)) ** 7
    nearest = (grid[:, None] - iddpm_sigmas()).abs().argmin(1)
    assert scheduler.sigmas[:-1] == pytest.approx(iddpm_sigmas()[nearest].tolist(), rel=1e-12)
