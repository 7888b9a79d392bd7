"""The networks, preconditionings and sampler of EDM: golden values of the originals, and facts that need none."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler
from formula import formula_state, u
from safetensors.torch import load_file

from diffusers_onestep import (
    Denoiser,
    EDM2UNet2DModel,
    EDMHeunScheduler,
    EDMSchedule,
    EDMUNet2DModel,
    NoiseSchedule,
    SiD,
)
from diffusers_onestep.conversion.edm import edm2_settings, edm_settings, network_from_edm
from diffusers_onestep.conversion.kinds import EDM_WRAPPERS
from diffusers_onestep.models import cast
from diffusers_onestep.sampling import sample
from diffusers_onestep.schedules import iddpm_sigmas

GOLDEN = Path("/work/shared/golden/edm")
CASES = sorted(path.stem for path in GOLDEN.glob("*.json"))
NETWORKS = [name for name in CASES if "wrapper" in json.loads((GOLDEN / f"{name}.json").read_text())]
SAMPLERS = [name for name in CASES if "sampler" in json.loads((GOLDEN / f"{name}.json").read_text())]


def golden_denoiser(name):
    case = json.loads((GOLDEN / f"{name}.json").read_text())
    network = network_from_edm(case["wrapper"], case["config"], load_file(GOLDEN / f"{name}.safetensors")).network
    preconditioning = EDM_WRAPPERS.get(case["wrapper"], "edm")
    schedule = EDMSchedule(sigma_data=case["config"].get("sigma_data", 0.5), preconditioning=preconditioning)
    return Denoiser(network, schedule, schedule.prediction_type)


def error(value, expected):
    """Largest relative error of a sample."""
    value, expected = value.double().flatten(1), expected.double().flatten(1)
    return ((value - expected).norm(dim=1) / expected.norm(dim=1)).max().item()


@pytest.mark.skipif(not NETWORKS, reason="no golden values here")
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype, key, limit", [(torch.float32, "D", 1e-5), (torch.float64, "D_float64", 1e-9)])
@torch.no_grad()
def test_networks_are_the_originals(name, dtype, key, limit):
    denoiser, io = golden_denoiser(name), load_file(GOLDEN / f"{name}.io.safetensors")
    denoiser.to(dtype)
    t = denoiser.schedule.c_noise(io["sigma"].flatten())
    t = t.expand(len(io["x"])).to(dtype)
    cond = {k: io[k].to(dtype) for k in ("class_labels", "augment_labels") if k in io}
    assert error(denoiser(io["x"].to(dtype), t, cond), io[key]) < limit
    if "D_plain" in io and dtype == torch.float32:
        assert error(denoiser(io["x"], t, {}), io["D_plain"]) < limit
    if dtype == torch.float64:
        torch.testing.assert_close(denoiser.schedule.network_timestep(t), io["c_noise"], rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(not SAMPLERS, reason="no golden values here")
@pytest.mark.parametrize("name", SAMPLERS)
def test_heun_is_the_original(name):
    case = json.loads((GOLDEN / f"{name}.json").read_text())
    denoiser, io = golden_denoiser(case["network"]), load_file(GOLDEN / f"{name}.io.safetensors")
    settings = dict(case["sampler"])
    steps = settings.pop("num_steps")
    scheduler = EDMHeunScheduler(preconditioning=denoiser.schedule.preconditioning, **settings)
    x0 = sample(denoiser, scheduler, io["latents"].double(), num_inference_steps=steps)
    assert len(scheduler.timesteps) == case["network_evaluations"]
    torch.testing.assert_close(scheduler.levels, io["sigmas"], rtol=1e-12, atol=0)
    assert error(x0, io["x"]) < 1e-5


# facts that need no file

CONFIGS = {  # parameters and tensors of the published files
    "cifar10-cond-vp": ({"num_class_embeds": 10, "augment_dim": 9}, 55_735_299),
    "cifar10-cond-ve": ({"num_class_embeds": 10, "augment_dim": 9, "architecture": "ncsnpp"}, 56_400_643),
    "cifar10-uncond-vp": ({"augment_dim": 9}, 55_733_891),
    "cifar10-uncond-ve": ({"augment_dim": 9, "architecture": "ncsnpp"}, 56_397_827),
    "ffhq-vp": ({"sample_size": 64, "channel_mult": (1, 2, 2, 2), "augment_dim": 9}, 61_805_571),
    "ffhq-ve": (
        {"sample_size": 64, "channel_mult": (1, 2, 2, 2), "augment_dim": 9, "architecture": "ncsnpp"},
        62_761_091,
    ),
    "imagenet": (
        {
            "sample_size": 64,
            "architecture": "adm",
            "model_channels": 192,
            "channel_mult": (1, 2, 3, 4),
            "layers_per_block": 3,
            "attention_resolutions": (32, 16, 8),
            "num_class_embeds": 1000,
        },
        295_899_267,
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_published_networks_have_their_number_of_parameters(name):
    config, parameters = CONFIGS[name]
    with torch.device("meta"):
        assert sum(p.numel() for p in EDMUNet2DModel(**config).parameters()) == parameters


@pytest.mark.parametrize(
    "channels, millions", [(128, 124.7), (192, 280.2), (256, 497.8), (320, 777.5), (384, 1119.3), (448, 1523.2)]
)
def test_published_edm2_networks_have_their_number_of_parameters(channels, millions):
    with torch.device("meta"):
        network = EDM2UNet2DModel(model_channels=channels, num_class_embeds=1000)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == millions


def tiny(architecture="ddpmpp", **config):
    torch.manual_seed(0)
    config = {"sample_size": 8, "model_channels": 8, "channel_mult": (1, 2), "layers_per_block": 1} | config
    network = EDMUNet2DModel(architecture=architecture, attention_resolutions=(4,), **config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network.eval()


def tiny_edm2(**config):
    torch.manual_seed(0)
    config = {"in_channels": 3, "out_channels": 3, "num_class_embeds": 4, "attention_head_dim": 8} | config
    network = EDM2UNet2DModel(
        sample_size=8, model_channels=8, channel_mult=(1, 2), layers_per_block=1, attention_resolutions=(4,), **config
    )
    for name, parameter in network.named_parameters():
        if name.endswith("gain"):
            torch.nn.init.constant_(parameter, 0.7)
    return network.eval()


ALL = [
    lambda: tiny(num_class_embeds=4, augment_dim=9),
    lambda: tiny("ncsnpp", num_class_embeds=4),
    lambda: tiny("ddpmpp", encoder_type="skip", decoder_type="skip", resample_filter=(1, 3, 3, 1), num_class_embeds=4),
    lambda: tiny("adm", model_channels=64, num_class_embeds=4),
    tiny_edm2,
]


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("labels", [[1, 4], [-1, 2]])
def test_labels_that_there_are_none_of_are_refused(make, labels):
    message = rf"`class_labels` must be in 0\.\.3, but are {min(labels)} to {max(labels)}"
    with pytest.raises(ValueError, match=message):
        make()(torch.randn(2, 3, 8, 8), torch.zeros(2), torch.tensor(labels))


@pytest.mark.parametrize("make", ALL)
@torch.no_grad()
def test_save_and_load(make, tmp_path):
    network = make()
    x, t, labels = torch.randn(2, 3, 8, 8), torch.tensor([-1.0, 0.3]), torch.tensor([1, 3])
    expected = network(x, t, class_labels=labels).sample
    assert expected.shape == x.shape and expected.std() > 1e-3
    network.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    loaded = type(network).from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(x, t, labels).sample, expected, rtol=0, atol=0)
    # one-hot rows are the same labels, and no labels are a zero row
    rows = torch.nn.functional.one_hot(labels, 4).float()
    torch.testing.assert_close(network(x, t, rows).sample, expected, rtol=0, atol=0)
    torch.testing.assert_close(network(x, t).sample, network(x, t, 0 * rows).sample, rtol=0, atol=0)
    assert (network(x, t).sample - expected).abs().max() > 1e-4
    # another memory layout, the same numbers
    torch.testing.assert_close(
        network.to(memory_format=torch.channels_last)(x, t, labels).sample, expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("make", ALL)
def test_gradient_checkpointing_changes_nothing(make):
    network = make()
    x, t = torch.randn(1, 3, 8, 8, requires_grad=True), torch.tensor([0.1])

    def gradients():
        network.zero_grad()
        loss = network(x, t).sample.square().mean()
        return torch.autograd.grad(loss, [x, *(p for p in network.parameters() if p.requires_grad)], allow_unused=True)

    plain = gradients()
    network.enable_gradient_checkpointing()
    calls = []
    original = network._gradient_checkpointing_func
    network._gradient_checkpointing_func = lambda *args: calls.append(1) or original(*args)
    checkpointed = gradients()
    assert len(calls) >= 7
    for a, b in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@torch.no_grad()
def test_half_precision_keeps_the_embedding(tmp_path):
    network = tiny("ncsnpp", num_class_embeds=4)
    network.save_pretrained(tmp_path)
    half = EDMUNet2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.map_noise.freqs.dtype == half.map_layer0.weight.dtype == torch.float32
    assert half.enc["8x8_conv"].weight.dtype == half.dtype == torch.bfloat16
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([-1.0, 0.3])
    output = half(x.bfloat16(), t).sample
    assert output.dtype == torch.bfloat16
    assert error(output, network(x, t).sample) < 0.05


def test_edm2_normalises_its_weights_in_training_only():
    network = tiny_edm2()
    weight = network.enc["8x8_block0"].conv_res0.weight
    before = weight.detach().clone()
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([0.1])
    with torch.no_grad():
        expected = network(x, t).sample
        assert torch.equal(weight, before)
        output = network.train()(x, t).sample
    assert not torch.equal(weight, before)
    torch.testing.assert_close(weight.square().mean((1, 2, 3)).sqrt(), torch.ones(8), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"architecture": "vp"}, "`architecture` must be one of"),
        ({"encoder_type": "none"}, "`encoder_type` must be one of"),
        ({"sample_size": 7}, "`sample_size` must be divisible by"),
        ({"architecture": "adm", "encoder_type": "skip"}, "`architecture` 'adm' must have its own"),
    ],
)
def test_bad_configs_name_what_is_allowed(config, message):
    with pytest.raises(ValueError, match=message):
        tiny(**config)


# known answers of the originals, whose weights are a formula (D at the first three pixels, and its root mean square)

CIFAR = {"img_resolution": 32, "img_channels": 3, "label_dim": 0, "model_type": "SongUNet", "channel_mult": [2, 2, 2]}
CIFAR |= {"augment_dim": 9, "dropout": 0.13}
VE = {
    "embedding_type": "fourier",
    "channel_mult_noise": 2,
    "encoder_type": "residual",
    "resample_filter": [1, 3, 3, 1],
}
COND = {"label_dim": 10}
FFHQ = CIFAR | {"img_resolution": 64, "channel_mult": [1, 2, 2, 2]}
ADM_HEADS = {"img_resolution": 16, "img_channels": 3, "label_dim": 10, "model_channels": 64, "channel_mult": [1, 2, 3]}
ADM_HEADS |= {"num_blocks": 2, "attn_resolutions": [8, 4], "model_type": "DhariwalUNet"}
IMAGENET = {"img_resolution": 64, "img_channels": 3, "label_dim": 1000, "model_type": "DhariwalUNet"}
EDM2_XS = {"img_resolution": 64, "img_channels": 4, "label_dim": 1000, "model_channels": 128}
BOTH, ONE, SLOW = [0.3, 2.5], [2.5], pytest.mark.slow
KNOWN = [
    ("adm-heads", ADM_HEADS, BOTH, [-0.455045, -0.479769, 0.376667], 0.381243),
    pytest.param("uncond-vp", CIFAR, BOTH, [-0.515887, -0.133716, 0.439761], 0.382108, marks=SLOW),
    pytest.param("cond-vp", CIFAR | COND, BOTH, [-0.565318, -0.233006, 0.341643], 0.394477, marks=SLOW),
    pytest.param("cond-ve", CIFAR | VE | COND, BOTH, [-0.473848, -0.104481, 0.457090], 0.387752, marks=SLOW),
    pytest.param("ffhq-vp", FFHQ, ONE, [0.118067, -0.148624, 0.374617], 0.412326, marks=SLOW),
    pytest.param("ffhq-ve", FFHQ | VE, ONE, [0.027712, -0.178497, 0.259950], 0.368678, marks=SLOW),
    pytest.param("imagenet", IMAGENET, ONE, [-0.043250, -0.246375, 0.081993], 0.389849, marks=SLOW),
    pytest.param("edm2-xs", EDM2_XS, ONE, [-0.323979, -0.494198, 0.095936], 0.449604, marks=SLOW),
]


KEYS = [  # tensors of the original's state dict, buffers included, and a digest of their names and shapes
    (ADM_HEADS, 317, "96981b17e90b"),
    (CIFAR, 425, "5b64854adf30"),
    (CIFAR | COND, 427, "2fa7b34b55c2"),
    (CIFAR | VE | COND, 434, "6b4cc8682004"),
    (FFHQ, 553, "f955a245c76e"),
    (FFHQ | VE, 563, "e4fe182e5798"),
    (IMAGENET, 553, "462dae53f276"),
    (EDM2_XS, 203, "dc4b6d591236"),
]


@pytest.mark.parametrize("options, tensors, digest", KEYS)
def test_names_and_shapes_are_the_originals(options, tensors, digest):
    with torch.device("meta"):
        if options is EDM2_XS:
            network, prefix = EDM2UNet2DModel(**edm2_settings(options)[0]), "unet"
        else:
            network, prefix = EDMUNet2DModel(**edm_settings(options, "edm")[0]), "model"
    shapes = {f"{prefix}.{name}": list(tensor.shape) for name, tensor in network.state_dict().items()}
    # of the original alone: every convolution that resamples keeps the filter, and EDM2 learns a variance
    if prefix == "unet":
        shapes |= {"logvar_fourier.freqs": [128], "logvar_fourier.phases": [128], "logvar_linear.weight": [1, 128]}
    else:
        places = [f"enc.{name}" for name in network.enc if name.endswith("_aux_residual")]
        for side in ("enc", "dec"):
            blocks = [name for name in getattr(network, side) if name.endswith(("_down", "_up"))]
            places += [f"{side}.{name}.{part}" for name in blocks for part in ("conv0", "skip")]
        shapes |= {f"model.{place}.resample_filter": list(network.aux_kernel.shape) for place in places}
    assert len(shapes) == tensors
    lines = "\n".join(f"{name} {shape}" for name, shape in sorted(shapes.items()))
    assert hashlib.sha256(lines.encode()).hexdigest()[:12] == digest


def test_formula_of_the_weights():
    torch.testing.assert_close(u("x", 3), torch.tensor([-0.468797, -0.392881, 0.859797]), rtol=0, atol=1e-6)
    values = torch.tensor([0.340743, 0.962146, 0.522306])
    torch.testing.assert_close(u("model.map_layer0.weight", 3), values, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name, options, sigmas, first, rms", KNOWN)
@torch.no_grad()
def test_known_answers_of_the_published_networks(name, options, sigmas, first, rms):
    wrapper = "Precond" if name == "edm2-xs" else "EDMPrecond"
    with torch.device("meta"):
        if wrapper == "Precond":
            ours, prefix = EDM2UNet2DModel(**edm2_settings(options)[0]), "unet"
        else:
            ours, prefix = EDMUNet2DModel(**edm_settings(options, "edm")[0]), "model"
    network = network_from_edm(wrapper, options, formula_state(ours, prefix)).network
    denoiser = Denoiser(network, EDMSchedule(), "edm")
    sigma, channels, size = torch.tensor(sigmas), options["img_channels"], options["img_resolution"]
    shape = (len(sigma), channels, size, size)
    scale = (3 * (0.25 + sigma.double() ** 2)).sqrt().float()  # float32 roots differ by CPU
    x = u("x", len(sigma) * channels * size**2).reshape(shape) * scale.reshape(-1, 1, 1, 1)
    cond = {}
    if options["label_dim"]:
        cond["class_labels"] = (7 * torch.arange(len(sigma)) + 3) % options["label_dim"]
    if options.get("augment_dim"):
        cond["augment_labels"] = u("augment", 9 * len(sigma)).reshape(-1, 9)
    x0 = denoiser(x, denoiser.schedule.c_noise(sigma).float(), cond)
    torch.testing.assert_close(x0[0, 0, 0, :3], torch.tensor(first), rtol=0, atol=4e-6)
    assert x0.square().mean().sqrt().item() == pytest.approx(rms, abs=2e-6)


# preconditionings


def test_levels_of_the_four_preconditionings():
    sigma = torch.tensor([0.002, 0.5, 2.5, 80.0], dtype=torch.float64)
    vp, iddpm = EDMSchedule(preconditioning="vp"), EDMSchedule(preconditioning="iddpm")
    torch.testing.assert_close(
        vp.c_noise(sigma), torch.tensor([0.0398, 144.67, 440.76, 932.58]).double(), rtol=1e-4, atol=1e-4
    )
    # close to, and not, the timesteps of DDPM's linear betas
    products = DDIMScheduler().alphas_cumprod.double()[[10, 100, 500, 999]]
    expected = torch.tensor([10.65, 100.51, 501.10, 1002.4]).double()
    torch.testing.assert_close(vp.c_noise((1 / products - 1).sqrt()), expected, rtol=0, atol=0.05)
    levels = iddpm_sigmas()
    assert levels[0].item() == pytest.approx(0.0064223, rel=1e-4)
    assert levels[-1].item() == pytest.approx(20291.17, rel=1e-4)
    cosine = DDIMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod.double()
    torch.testing.assert_close(levels, ((1 - cosine) / cosine).sqrt(), rtol=1e-3, atol=0)
    for preconditioning in ("edm", "vp", "ve", "iddpm"):
        schedule = EDMSchedule(0.02, 80.0, preconditioning=preconditioning)
        t = schedule.c_noise(sigma[1:])
        alpha, back = schedule.alpha_sigma(t)
        torch.testing.assert_close(back.flatten(), sigma[1:], rtol=1e-9, atol=0)
        assert (alpha == 1).all() and (t.diff() > 0).all()
    # the network sees whole timesteps, those of the nearest level
    t = iddpm.c_noise(sigma[1:])
    assert torch.equal(iddpm.network_timestep(t), (levels - sigma[1:, None]).abs().argmin(1).double())
    torch.testing.assert_close(iddpm.round_sigma(sigma[1:]), levels[iddpm.network_timestep(t).long()])


@pytest.mark.parametrize("preconditioning", ["edm", "vp", "ve", "iddpm"])
@torch.no_grad()
def test_heun_has_order_two_and_starts_at_the_noise(preconditioning):
    """Against the known ODE of Gaussian data, through the preconditioning of each kind."""

    class Gaussian(torch.nn.Module):
        def forward(self, sample, timestep):
            sigma = self.sigma_of(timestep)
            x_t = sample / schedule.c_in(sigma)
            x0 = x_t * 0.25 / (0.25 + sigma**2)
            c_skip, c_out = coefficients(timestep)
            return (x0 - c_skip * x_t) / c_out

        def sigma_of(self, timestep):
            return schedule.alpha_sigma(timestep)[1]

    from diffusers_onestep.denoiser import x0_coefficients

    schedule = EDMSchedule(preconditioning=preconditioning)

    def coefficients(t):
        return x0_coefficients(schedule, schedule.prediction_type, t)

    network = Gaussian()
    network.weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    denoiser = Denoiser(network, schedule, schedule.prediction_type)
    noise = torch.randn(8, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors = []
    for steps in (32, 64):
        scheduler = EDMHeunScheduler(0.02, 80.0, preconditioning=preconditioning)
        scheduler.set_timesteps(steps)
        assert scheduler.init_noise_sigma == pytest.approx(80.0, rel=0.02 if preconditioning == "iddpm" else 1e-12)
        assert len(scheduler.timesteps) == 2 * steps - 1
        start, end = scheduler.sigmas[0], scheduler.sigmas[-2]
        x = noise * start
        for t in scheduler.timesteps[:-1]:  # down to the last level
            output = denoiser.call_network(scheduler.scale_model_input(x, t), scheduler.time(x))
            x = scheduler.step(output, t, x).prev_sample
        exact = noise * start * ((0.25 + end**2) / (0.25 + start**2)) ** 0.5
        errors.append((x - exact).abs().max().item())
    if preconditioning != "iddpm":  # whose levels are rounded
        assert errors[0] / errors[1] == pytest.approx(4, rel=0.35)
    assert errors[1] < 5e-3


def test_grid_of_the_paper():
    scheduler = EDMHeunScheduler()
    scheduler.set_timesteps(18)
    expected = [80, 57.585985, 40.785574, 28.374585, 19.352453]
    torch.testing.assert_close(torch.tensor(scheduler.sigmas[:5]), torch.tensor(expected), rtol=1e-7, atol=1e-6)
    assert scheduler.sigmas[-3:] == pytest.approx([0.007528, 0.002, 0], rel=1e-4)
    scheduler.set_timesteps(40)
    assert scheduler.sigmas[:3] == pytest.approx([80, 69.450946, 60.117395], abs=1e-6)
    assert len(scheduler.timesteps) == 79


def test_fresh_noise_keeps_the_level():
    """With a network that says x0 = 0, all there is is noise: of the level's size after every step."""
    scheduler = EDMHeunScheduler(s_churn=40.0, s_min=0.05, s_max=50.0)
    scheduler.set_timesteps(16)
    x = scheduler.init_noise_sigma * torch.randn(1, 1, 256, 256, generator=torch.Generator().manual_seed(0)).double()
    for call, t in enumerate(scheduler.timesteps[:-1]):
        sigma = scheduler.levels[call]
        output = -(0.25 / (sigma**2 + 0.25)) * x / (sigma * 0.5 / (sigma**2 + 0.25).sqrt())
        x = scheduler.step(output, t, x, generator=torch.Generator().manual_seed(call)).prev_sample
        assert x.std().item() == pytest.approx(scheduler.levels[call + 1].item(), rel=0.02)
    assert max(scheduler.hats) == scheduler.sigmas[0]
    assert scheduler.hats[8] == pytest.approx(scheduler.sigmas[8] * 2**0.5)


def test_stock_euler_in_one_step_is_the_denoiser():
    network = tiny(num_class_embeds=4)
    scheduler = EDMEulerScheduler(sigma_max=2.5)
    scheduler.set_timesteps(1)
    denoiser = Denoiser(network, NoiseSchedule.from_scheduler(scheduler), "edm")
    assert scheduler.init_noise_sigma == pytest.approx(2.6926, abs=1e-4)  # not 2.5: why students have their own
    x = 2.5 * torch.randn(2, 3, 8, 8)
    t = scheduler.timesteps[0]
    with torch.no_grad():
        output = network(scheduler.scale_model_input(x, t), t).sample
        stepped = scheduler.step(output, t, x).prev_sample
        torch.testing.assert_close(denoiser(x, t.expand(2)), stepped, rtol=1e-5, atol=1e-5)


def test_lower_precision_leaves_what_a_network_keeps_in_float32():
    widths = {"model_channels": 8, "channel_mult": (1, 2), "layers_per_block": 1}
    network = EDMUNet2DModel(sample_size=8, architecture="ncsnpp", **widths)
    before = {name: buffer.clone() for name, buffer in network.map_noise.named_buffers()}
    cast(network, torch.bfloat16)
    assert before and all(torch.equal(network.map_noise.get_buffer(name), value) for name, value in before.items())
    assert network.map_layer0.weight.dtype == torch.float32
    assert {p.dtype for name, p in network.named_parameters() if not name.startswith("map")} == {torch.bfloat16}


def test_a_learning_edm2_normalises_its_stored_weights():
    """Of the one that learns alone, in the update itself."""
    distiller = SiD(Denoiser(tiny_edm2(), EDMSchedule(), "edm"))
    batch = {"batch_size": 2, "cond": {"class_labels": torch.tensor([0, 1])}}
    networks = {name: getattr(distiller, name).network for name in ("fake_score", "student", "teacher")}
    before = {name: network.enc["8x8_conv"].weight.clone() for name, network in networks.items()}
    for learning, loss in distiller.updates(batch, torch.Generator().manual_seed(0)):
        loss.backward()
        own = networks[learning].enc["8x8_conv"].weight
        norms = own.detach().flatten(1).norm(dim=1)
        torch.testing.assert_close(norms, torch.full_like(norms, own[0].numel() ** 0.5), rtol=1e-3, atol=0)
        assert not torch.allclose(own, before[learning], rtol=1e-3)
        assert not networks["teacher"].training and torch.equal(
            networks["teacher"].enc["8x8_conv"].weight, before["teacher"]
        )
