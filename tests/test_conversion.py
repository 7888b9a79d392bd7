"""Published checkpoints to folders, and files that mean harm."""

import copyreg
import hashlib
import io
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from conftest import training_module
from diffusers import AutoencoderKL, UNet2DModel
from edm_files import SOURCE, module, original_modules, random_weights, write_pickle
from families import tiny_pipeline
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from test_cards import python_blocks
from test_edm import GOLDEN, NETWORKS, error

from diffusers_onestep import (
    EDM2UNet2DModel,
    EDMSchedule,
    EDMUNet2DModel,
    OneStepPipeline,
    SiD,
    Teacher,
    convert,
    create_model_card,
)
from diffusers_onestep.arguments import parse_args
from diffusers_onestep.cli import main
from diffusers_onestep.conversion.adm import adm_to_stock, stock_settings
from diffusers_onestep.conversion.dmd2 import told_timesteps
from diffusers_onestep.conversion.guided_diffusion import guided_levels, guided_to_edm
from diffusers_onestep.conversion.kinds import EDM_WRAPPERS, kind_of, licence_of, method_of
from diffusers_onestep.conversion.pickles import StoredModule, UnsafeCheckpointError, read_checkpoint
from diffusers_onestep.network_calls import network_output
from diffusers_onestep.records import run_record

DDPMPP = {"img_resolution": 8, "img_channels": 3, "label_dim": 4, "model_channels": 16, "channel_mult": [1, 2]}
DDPMPP |= {"num_blocks": 1, "attn_resolutions": [4], "augment_dim": 9, "model_type": "SongUNet", "dropout": 0.13}
SONG = {"sample_size": 8, "model_channels": 16, "channel_mult": (1, 2), "layers_per_block": 1}
SONG |= {"attention_resolutions": (4,), "num_class_embeds": 4}
# wide enough for the stock network
ADM = {"img_resolution": 8, "img_channels": 3, "label_dim": 4, "model_channels": 128, "channel_mult": [1, 2]}
ADM |= {"num_blocks": 1, "attn_resolutions": [4], "model_type": "DhariwalUNet"}
OURS_ADM = SONG | {"architecture": "adm", "model_channels": 128}


def network(config, seed=0):
    torch.manual_seed(seed)
    net = EDMUNet2DModel(**config).eval()
    weights = random_weights(net, "model", seed)
    net.load_state_dict({k.removeprefix("model."): v for k, v in weights.items()})
    return net, weights


@pytest.fixture
def run_card(tmp_path, monkeypatch):
    """Runs the code of the card in `tmp_path / "out"` as it stands; returns its names."""
    monkeypatch.chdir(tmp_path)

    def run():
        names = {}
        for code in python_blocks((tmp_path / "out" / "README.md").read_text()):
            exec(code, names)
        return names

    return run


@pytest.fixture
def small_vae(monkeypatch):
    """Stands in for the autoencoder of EDM2's latents, which the Hub has."""
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4).eval()
    monkeypatch.setattr(AutoencoderKL, "from_pretrained", {"stabilityai/sd-vae-ft-mse": vae}.__getitem__)
    return vae


@pytest.fixture
def song(tmp_path):
    net, weights = network(SONG | {"augment_dim": 9})
    weights["model.enc.4x4_down.conv0.resample_filter"] = torch.full((1, 1, 2, 2), 0.25)
    return net, write_pickle(tmp_path / "edm-tiny.pkl", "EDMPrecond", DDPMPP, weights, loss_fn=None)


@torch.no_grad()
def test_edm_teacher(song, tmp_path, capsys, run_card):
    net, file = song
    out = tmp_path / "out"
    main(["convert", str(file), str(out)])
    assert "cc-by-nc-sa-4.0" in capsys.readouterr().out
    teacher = Teacher.from_pretrained(out)
    loaded = teacher.denoiser.network
    assert isinstance(loaded, EDMUNet2DModel) and loaded.config.architecture == "ddpmpp"
    assert loaded.config.dropout == 0.13
    x, t, labels = torch.randn(2, 3, 8, 8), torch.tensor([0.1, -1.0]), torch.tensor([0, 3])
    torch.testing.assert_close(loaded(x, t, labels).sample, net(x, t, labels).sample, rtol=0, atol=0)
    # D by its formula
    sigma, x_t = torch.tensor([0.3, 2.5]).reshape(-1, 1, 1, 1), torch.randn(2, 3, 8, 8)
    expected = (
        0.25 / (sigma**2 + 0.25) * x_t
        + sigma
        * 0.5
        / (sigma**2 + 0.25).sqrt()
        * net(x_t / (sigma**2 + 0.25).sqrt(), sigma.flatten().log() / 4, labels).sample
    )
    t = teacher.denoiser.schedule.timestep(sigma.flatten())
    torch.testing.assert_close(teacher.denoiser(x_t, t, {"class_labels": labels}), expected, rtol=1e-4, atol=1e-5)
    samples = teacher.sample(torch.randn(2, 3, 8, 8), teacher.encode([0, 1]), num_inference_steps=3)
    assert samples.isfinite().all()
    assert json.loads((out / "conversion.json").read_text())["kind"] == "edm"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["edm-tiny.pkl", "out"]
    text = (out / "README.md").read_text()
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    for part in (
        "license: cc-by-nc-sa-4.0",
        "from `edm-tiny.pkl` (edm)",
        "abs/2206.00364",
        digest,
        "Commercial use of",
    ):
        assert part in text, part
    assert text.split("\n# ")[1].startswith("out\n")  # no folders of this machine
    assert run_card()["image"].size == (8, 8)


def test_a_folder_named_like_a_shipped_model_is_itself(song, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    convert(song[1], "fashion32")
    assert "shipped" not in Path("fashion32/README.md").read_text()


def test_a_folder_without_its_card_is_no_folder(song, tmp_path, monkeypatch):
    def fails(folder):
        raise OSError("no space left")

    monkeypatch.setattr("diffusers_onestep.conversion.create_model_card", fails)
    with pytest.raises(OSError, match="no space left"):
        convert(song[1], tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["edm-tiny.pkl"]


def test_students_of_a_converted_teacher_have_its_licence_and_notes(song, tmp_path):
    convert(song[1], tmp_path / "out")
    path = tmp_path / "out" / "conversion.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"notes": ["Of latents."]}))
    for _ in range(2):  # by its card, then by the record of its conversion
        record = run_record("SiD", SiD.paper, str(tmp_path / "out"))
        assert record["license"] == {"license": "cc-by-nc-sa-4.0"} and record["notes"] == ["Of latents."]
        (tmp_path / "out" / "README.md").unlink(missing_ok=True)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("latent", [False, True])
def test_the_card_of_a_solver_of_a_converted_teacher_runs(latent, whole, tmp_path, small_vae, run_card):
    """Of networks that also give a variance, and of those that make latents."""
    torch.manual_seed(0)
    if latent:
        net = EDM2UNet2DModel(**SONG | {"in_channels": 4, "out_channels": 4, "attention_head_dim": 16})
        options = {"img_resolution": 8, "img_channels": 4, "label_dim": 4, "model_channels": 16, "num_blocks": 1}
        options |= {"channel_mult": [1, 2], "attn_resolutions": [4], "channels_per_head": 16}
        file = write_pickle(tmp_path / "a.pkl", "Precond", options, random_weights(net, "unet"))
    else:
        _, weights = network(SONG | {"out_channels": 6})
        file = write_pickle(tmp_path / "a.pkl", "iDDPMPrecond", DDPMPP | {"augment_dim": 0}, weights)
    convert(file, tmp_path / "teacher")
    module = training_module("fit_d_ode")
    flags = ["--pretrained_teacher_model", str(tmp_path / "teacher"), "--output_dir", str(tmp_path / "out")]
    flags += ["--solver", "edm-euler" if latent else "ddim", "--num_inference_steps", "4", "--scale", "2"]
    flags += ["--num_samples", "4", "--num_holdout_samples", "4", *["--save_pipeline"] * whole]
    module.main(parse_args(module.FitArguments, flags))
    names = run_card()
    assert names["latents"].shape == (1, 4, 8, 8) if latent else names["image"].size == (8, 8)
    assert Path("sample.png").exists() != latent


def test_a_converted_model_has_the_numbers_that_were_measured_of_it(song, tmp_path):
    convert(song[1], tmp_path / "out", kind="sid")
    row = {"model": "out", "nfe": 1, "metric": "fid", "value": 1.92, "error": 0.02, "num_samples": 50000, "seed": 0}
    row |= {"images_per_second": 100.0, "latency": 0.01}
    (tmp_path / "out" / "metrics.json").write_text(json.dumps({"results": [row]}))
    (tmp_path / "out" / "notes.md").write_text("Seen by me.\n")
    card = ModelCard.load(create_model_card(tmp_path / "out"))
    assert card.data.license == "apache-2.0" and {"sid", "one-step"} <= set(card.data.tags)
    assert card.data.eval_results[0].metric_value == 1.92
    for part in ("Converted from `edm-tiny.pkl` (sid)", "Seen by me.", "1.92"):
        assert part in card.text, part


@torch.no_grad()
def test_sid_student_samples_as_its_authors_do(song, tmp_path, run_card):
    net, file = song
    assert convert(file, tmp_path / "out", kind="sid") == "sid"
    pipe = OneStepPipeline.from_pretrained(tmp_path / "out")
    seeds = [7, 8, 9]
    images = pipe(3, generator=[torch.Generator().manual_seed(s) for s in seeds], output_type="latent").images
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    z = torch.stack([torch.randn(3, 8, 8, generator=g) for g in generators])
    labels = torch.stack([torch.randint(4, (), generator=g) for g in generators])
    sigma = torch.tensor(2.5)
    x_t = sigma * z
    output = net(x_t / (sigma**2 + 0.25).sqrt(), sigma.log() / 4, labels).sample
    expected = 0.25 / (sigma**2 + 0.25) * x_t + sigma * 0.5 / (sigma**2 + 0.25).sqrt() * output
    torch.testing.assert_close(images, expected, rtol=1e-5, atol=1e-5)
    pixels = pipe(3, generator=[torch.Generator().manual_seed(s) for s in seeds], output_type="np").images
    theirs = (expected * 127.5 + 128).clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    assert ((pixels * 255).round().astype("uint8") != theirs.numpy()).mean() < 0.005  # but where rounding decides
    with pytest.raises(ValueError, match="`num_inference_steps` must be 1"):
        pipe(1, num_inference_steps=2)
    assert run_card()["image"].size == (8, 8)


@torch.no_grad()
@pytest.mark.parametrize("wrapper", ["VPPrecond", "VEPrecond", "iDDPMPrecond"])
def test_baselines(wrapper, tmp_path, run_card):
    config, options = dict(SONG), dict(DDPMPP) | {"augment_dim": 0}
    if wrapper == "VEPrecond":
        config |= {"architecture": "ncsnpp"}
        options |= {"embedding_type": "fourier", "channel_mult_noise": 2, "encoder_type": "residual"}
        options |= {"resample_filter": [1, 3, 3, 1], "decoder_type": "standard"}
    if wrapper == "iDDPMPrecond":
        config |= {"out_channels": 6}
    net, weights = network(config)
    convert(write_pickle(tmp_path / "a.pkl", wrapper, options, weights), tmp_path / "out")
    assert run_card()["image"].size == (8, 8)
    teacher = Teacher.from_pretrained(tmp_path / "out")
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([1, 2])
    if wrapper == "VEPrecond":
        sigma = torch.tensor([0.3, 20.0])
        t = teacher.denoiser.schedule.timestep(sigma)
        sigma = sigma.reshape(-1, 1, 1, 1)
        expected = x + sigma * net(x, (sigma.flatten() / 2).log(), labels).sample
        torch.testing.assert_close(teacher.denoiser(x, t, {"class_labels": labels}), expected, rtol=1e-4, atol=1e-4)
        return
    t = torch.tensor([100, 441])
    alpha, sigma = teacher.denoiser.schedule.alpha_sigma(t)
    level = sigma / alpha
    if wrapper == "VPPrecond":
        time = t / 999
        expected = (torch.exp(19.9 * time**2 / 2 + 0.1 * time) - 1).sqrt()
        torch.testing.assert_close(level.flatten(), expected, rtol=1e-4, atol=0)
    output = net(x / (level**2 + 1).sqrt(), t, labels).sample[:, :3]
    x0 = teacher.denoiser(alpha * x, t, {"class_labels": labels})
    torch.testing.assert_close(x0, x - level * output, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "kind, name, licence",
    [
        ("edm", "edm-cifar10-32x32-uncond-vp.pkl", "cc-by-nc-sa-4.0"),
        ("edm", "baseline-cifar10-32x32-uncond-ve.pkl", "apache-2.0"),
        ("edm", "baseline-cifar10-32x32-cond-ve.pkl", "cc-by-nc-sa-4.0"),
        ("edm", "baseline-imagenet-64x64-cond-adm.pkl", "mit"),
        ("edm2", "edm2-img512-xs-2147483-0.135.pkl", "cc-by-nc-sa-4.0"),
        ("guided-diffusion", "64x64_diffusion.pt", "mit"),
        ("sid", "network-snapshot-1.2-403968.pkl", "apache-2.0"),
        ("dmd2", "pytorch_model.bin", "cc-by-nc-4.0"),
    ],
)
def test_licences_are_those_of_the_weights(kind, name, licence):
    assert licence_of(kind, name)[0] == licence


@pytest.mark.parametrize(
    "kind, name, wrapper, arxiv_id",
    [
        ("edm", "edm-cifar10-32x32-uncond-vp.pkl", "EDMPrecond", "2206.00364"),
        ("edm", "baseline-cifar10-32x32-uncond-ve.pkl", "VEPrecond", "2011.13456"),
        ("edm", "baseline-cifar10-32x32-cond-ve.pkl", "VEPrecond", "2206.00364"),
        ("edm", "baseline-imagenet-64x64-cond-adm.pkl", "iDDPMPrecond", "2105.05233"),
        ("sid", "network-snapshot-1.2-403968.pkl", "EDMPrecond", "2404.04057"),
        ("sid", "network-snapshot-1.0-1.pkl", "EDMPrecond_EncoderDecoder", "2410.14919"),
        ("dmd2", "pytorch_model.bin", None, "2405.14867"),
    ],
)
def test_papers_are_those_of_the_weights(kind, name, wrapper, arxiv_id):
    assert method_of(kind, name, wrapper)[1].arxiv_id == arxiv_id


def test_a_baseline_keeps_the_licence_of_its_origin(tmp_path, capsys):
    _, weights = network(SONG | {"out_channels": 6})
    name = "baseline-imagenet-64x64-cond-adm.pkl"
    file = write_pickle(tmp_path / name, "iDDPMPrecond", DDPMPP | {"augment_dim": 0}, weights)
    main(["convert", str(file), str(tmp_path / "out")])
    assert "licence: mit" in capsys.readouterr().out
    assert "license: mit\n" in (tmp_path / "out" / "README.md").read_text()


@torch.no_grad()
def test_adm_becomes_the_stock_network(tmp_path):
    net, weights = network(OURS_ADM)
    convert(write_pickle(tmp_path / "edm-adm.pkl", "EDMPrecond", ADM, weights), tmp_path / "out")
    stock = UNet2DModel.from_pretrained(tmp_path / "out" / "unet")  # plain diffusers
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.1, -1.0])
    for labels, theirs in ((torch.tensor([0, 3]), torch.tensor([0, 3])), (torch.tensor([4, 4]), None)):
        assert error(stock(x, t, labels).sample, net(x, t, theirs).sample) < 1e-5
    # in float64 they differ by the embedding of the timestep, which diffusers alone computes in float32
    net.double(), stock.double()
    x, t = x.double(), t.double()
    expected = net(x, t, theirs).sample
    assert 1e-10 < error(stock(x, t, labels).sample, expected) < 1e-7
    assert error(network_output(stock, x, t, {"class_labels": labels}), expected) < 1e-12
    assert error(stock(x, t, labels).sample, expected) > 1e-10  # nothing stays behind
    assert "embeds the timestep in float32" in (tmp_path / "out" / "README.md").read_text()
    teacher = Teacher.from_pretrained(tmp_path / "out")
    assert (teacher.num_labels, teacher.null_label) == (4, 4)


@torch.no_grad()
def test_dmd2_student_on_imagenet(tmp_path, run_card):
    net, weights = network(OURS_ADM)
    torch.save(OrderedDict(weights), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(ADM))
    main(
        [
            "convert",
            str(tmp_path / "pytorch_model.bin"),
            str(tmp_path / "out"),
            "--config",
            str(tmp_path / "config.json"),
        ]
    )
    assert run_card()["image"].size == (8, 8)
    pipe = OneStepPipeline.from_pretrained(tmp_path / "out")
    z = torch.randn(2, 3, 8, 8)
    x_t, labels = 80 * z, torch.tensor([1, 2])
    c = (80.0**2 + 0.25) ** 0.5
    expected = 0.25 / c**2 * x_t + 40 / c * net(x_t / c, torch.tensor(80.0).log() / 4, labels).sample
    images = pipe(class_labels=labels, latents=z, output_type="latent").images
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="does not fit its config"):
        convert(tmp_path / "pytorch_model.bin", tmp_path / "other")  # not the published network
    assert not (tmp_path / "other").exists()


@torch.no_grad()
def test_edm2_in_half_precision(tmp_path, run_card):
    config = SONG | {"in_channels": 3, "out_channels": 3, "attention_head_dim": 16}
    net = EDM2UNet2DModel(**config).eval()
    weights = {k: v.half() for k, v in random_weights(net, "unet").items()}
    net.load_state_dict({k.removeprefix("unet."): v.float() for k, v in weights.items()})
    weights |= {"logvar_linear.weight": torch.randn(1, 128), "logvar_fourier.freqs": torch.randn(128)}
    options = {"img_resolution": 8, "img_channels": 3, "label_dim": 4, "model_channels": 16, "channel_mult": [1, 2]}
    options |= {"num_blocks": 1, "attn_resolutions": [4], "channels_per_head": 16, "use_fp16": True, "sigma_data": 0.5}
    file = write_pickle(tmp_path / "edm2.pkl", "Precond", options, weights, easy=True, encoder=None)
    assert convert(file, tmp_path / "out") == "edm2"
    assert run_card()["image"].size == (8, 8)
    loaded = Teacher.from_pretrained(tmp_path / "out").denoiser.network
    assert loaded.dtype == torch.float32
    x, t, labels = torch.randn(2, 3, 8, 8), torch.tensor([0.1, -1.0]), torch.tensor([0, 3])
    torch.testing.assert_close(loaded(x, t, labels).sample, net(x, t, labels).sample, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("channels, labels", [(4, 4), (4, 0), (3, 4)])
def test_the_code_of_a_card_makes_images(channels, labels, tmp_path, small_vae, run_card):
    """Of a student in EDM2's latents it decodes them; here with a small autoencoder on this machine."""
    config = {"in_channels": channels, "out_channels": channels, "num_class_embeds": labels or None}
    net = EDM2UNet2DModel(**SONG | config | {"attention_head_dim": 16}).eval()
    options = {"img_resolution": 8, "img_channels": channels, "label_dim": labels, "model_channels": 16}
    options |= {"channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "channels_per_head": 16}
    weights = random_weights(net, "unet")
    convert(write_pickle(tmp_path / "a.pkl", "EDM_2_Precond_Generator", options, weights), tmp_path / "out")
    names = run_card()
    if channels == 3:
        assert names["image"].size == (8, 8)
        return
    assert ("class_labels" in (tmp_path / "out" / "README.md").read_text()) == bool(labels)
    deviation, mean = torch.tensor([4.17, 4.62, 3.71, 3.28]), torch.tensor([5.81, 3.25, 0.12, -2.15])
    raw = (names["latents"].movedim(1, -1) / 0.5 * deviation + mean).movedim(-1, 1)
    torch.testing.assert_close(names["images"], small_vae.decode(raw).sample.clamp(0, 1), rtol=1e-4, atol=1e-5)
    assert names["images"].shape == (1, 3, 16, 16) and names["images"].std() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize(
    "flags", [{"use_new_attention_order": True, "noise_schedule": "cosine"}, {"num_heads": 4}, {}]
)
def test_guided_diffusion(flags, tmp_path, run_card):
    """Weights that are renamed back give the network of EDM's names."""
    heads = flags.get("num_heads")
    net, weights = network(OURS_ADM | {"out_channels": 6, "num_attention_heads": heads})
    state = {k.removeprefix("model."): v for k, v in weights.items()}
    guided = to_guided(state, heads, flags.get("use_new_attention_order"))
    # renaming is a bijection: back again gives the same tensors
    settings = dict(net.config)
    back = guided_to_edm(settings, guided, bool(flags.get("use_new_attention_order")))
    assert back.keys() == state.keys() and all(torch.equal(back[k], state[k]) for k in state)
    torch.save(guided, tmp_path / "tiny.pt")
    config = flags | {"image_size": 8, "attention_resolutions": "4"}
    convert(tmp_path / "tiny.pt", tmp_path / "out", config=config)
    assert run_card()["image"].size == (8, 8)
    teacher = Teacher.from_pretrained(tmp_path / "out")
    loaded = teacher.denoiser.network
    assert isinstance(loaded, EDMUNet2DModel if heads else UNet2DModel)
    x, t, labels = torch.randn(2, 3, 8, 8), torch.tensor([10, 500]), torch.tensor([0, 3])
    assert error(loaded(x, t, labels).sample, net(x, t, labels).sample) < 1e-5
    assert teacher.scheduler.config.beta_schedule == ("squaredcos_cap_v2" if len(flags) == 2 else "linear")
    with pytest.raises(ValueError, match="`config` must be given for a network of 128 channels"):
        convert(tmp_path / "tiny.pt", tmp_path / "other")


@pytest.mark.parametrize(
    "mult, blocks, attention", [((2, 2), 1, ()), ((1, 1, 1), 1, (4,)), ((1, 2, 2), 2, (8, 4)), ((2,), 3, (16,))]
)
def test_levels_of_guided_diffusion_networks(mult, blocks, attention):
    """Also where all levels are of one width: by their blocks alone they could be one level."""
    state, k, size = {"time_embed.0.weight": torch.zeros(64, 16)}, 1, 16
    for level, m in enumerate(mult):
        for _ in range(blocks):
            state |= dict.fromkeys([f"input_blocks.{k}.0.in_layers.0.weight"], torch.zeros(16))
            state[f"input_blocks.{k}.0.out_layers.3.weight"] = torch.zeros(16 * m, 1, 3, 3)
            k += 1
        if level + 1 < len(mult):
            state[f"input_blocks.{k}.0.in_layers.0.weight"] = torch.zeros(16 * m)
            state[f"input_blocks.{k}.0.out_layers.3.weight"] = torch.zeros(16 * m, 1, 3, 3)
            k += 1
    for k in range(len(mult) * (blocks + 1)):
        state[f"output_blocks.{k}.0.in_layers.0.weight"] = torch.zeros(16)
        level = len(mult) - 1 - k // (blocks + 1)
        attends = size >> level in attention
        if attends:
            state[f"output_blocks.{k}.1.qkv.weight"] = torch.zeros(48, 16, 1)
        if level and k % (blocks + 1) == blocks:
            state[f"output_blocks.{k}.{1 + attends}.in_layers.0.weight"] = torch.zeros(16)
    assert guided_levels(state, 16) == (mult, blocks)
    state["input_blocks.99999999999.0.in_layers.0.weight"] = torch.zeros(16)  # nothing is counted up to it
    with pytest.raises(ValueError, match="with residual resampling"):
        guided_levels(state, 16)


def to_guided(state, heads, new_order):
    """EDM's names to guided-diffusion's, for one block per level and two levels."""
    blocks = {"enc.8x8_conv": "input_blocks.0.0", "enc.8x8_block0": "input_blocks.1", "enc.4x4_down": "input_blocks.2"}
    blocks |= {"enc.4x4_block0": "input_blocks.3", "dec.4x4_in0": "middle_block", "dec.4x4_in1": "middle_block.2"}
    blocks |= {
        "dec.4x4_block0": "output_blocks.0",
        "dec.4x4_block1": "output_blocks.1",
        "dec.8x8_up": "output_blocks.1.2",
    }
    blocks |= {"dec.8x8_block0": "output_blocks.2", "dec.8x8_block1": "output_blocks.3"}
    outer = {"map_layer0": "time_embed.0", "map_layer1": "time_embed.2", "out_norm": "out.0", "out_conv": "out.2"}
    outer["enc.8x8_conv"] = "input_blocks.0.0"
    res = {"norm0": "in_layers.0", "conv0": "in_layers.2", "affine": "emb_layers.1", "norm1": "out_layers.0"}
    res |= {"conv1": "out_layers.3", "skip": "skip_connection"}
    guided = {}
    for key, value in state.items():
        name, _, kind = key.rpartition(".")
        if name == "map_label":
            guided["label_emb.weight"] = value.T.contiguous()
        elif name in outer:
            guided[f"{outer[name]}.{kind}"] = value
        else:
            block, _, part = name.rpartition(".")
            place = blocks[block]
            if part in res:
                number = "" if place.count(".") > 1 or place == "middle_block.2" else ".0"
                guided[f"{place}{number}.{res[part]}.{kind}"] = value
                continue
            if part == "qkv":
                width = len(value) // 3
                h = heads or width // 64
                rows = value.reshape(h, -1, 3, *value.shape[1:])
                order = (2, 0, 1) if new_order else (0, 2, 1)
                value = rows.permute(*order, *range(3, rows.ndim)).reshape(value.shape)
            if part != "norm2" and kind == "weight":
                value = value.reshape(*value.shape[:2], 1)
            named = {"norm2": "norm", "qkv": "qkv", "proj": "proj_out"}[part]
            guided[f"{place}.1.{named}.{kind}"] = value
    return guided


def test_stock_names_are_complete():
    with torch.device("meta"):
        ours = EDMUNet2DModel(
            sample_size=64,
            architecture="adm",
            model_channels=192,
            channel_mult=(1, 2, 3, 4),
            layers_per_block=3,
            attention_resolutions=(32, 16, 8),
            num_class_embeds=1000,
        )
        renamed = adm_to_stock(ours.config, ours.state_dict())
    with torch.device("meta"):
        stock = UNet2DModel(**stock_settings(ours.config)).state_dict()
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in stock.items()}


@pytest.mark.parametrize(
    "name, steps", [("dmd2_sdxl_1step_unet.bin", [399]), ("dmd2_sdxl_4step_unet.bin", [999, 749, 499, 249])]
)
def test_text_student(name, steps, tmp_path, run_card):
    from diffusers import (
        DDIMScheduler,
        DiffusionPipeline,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=4,
            hidden_size=8,
            intermediate_size=8,
            num_attention_heads=2,
            num_hidden_layers=1,
            bos_token_id=2,
            eos_token_id=3,
            pad_token_id=3,
        )
    )
    vocabulary = {t: i for i, t in enumerate(["a", "a</w>", "<|startoftext|>", "<|endoftext|>"])}
    base = StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=text,
        tokenizer=CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77),
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "NOTICE").write_text("Drawn by Ada.\n")
    (tmp_path / "base" / "README.md").write_text(
        "---\nlicense: creativeml-openrail-m\nextra_gated_prompt: Do no harm.\n---\n# base\n"
    )
    state = {k: torch.randn_like(v) for k, v in unet.state_dict().items()}
    torch.save({k: v.half() for k, v in state.items()}, tmp_path / name)
    with pytest.raises(ValueError, match="`base` must be the pipeline"):
        convert(tmp_path / name, tmp_path / "out")
    torch.save({"conv_in.weight": "no tensor"}, tmp_path / f"wrong_{name}")
    with pytest.raises(ValueError, match=r"'conv_in.weight' must be .*, but is none"):
        convert(tmp_path / f"wrong_{name}", tmp_path / "out", base=tmp_path / "base")
    convert(tmp_path / name, tmp_path / "out", base=tmp_path / "base")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.unet.state_dict()["conv_in.weight"], state["conv_in.weight"].half().float())
    loaded.scheduler.set_timesteps(len(steps))
    assert loaded.scheduler.timesteps.tolist() == steps
    assert loaded.scheduler.init_noise_sigma == 1.0
    # x0 = (x_t - sigma * eps) / alpha, and fresh noise of the next timestep
    network = unet.eval().requires_grad_(False)
    network.load_state_dict({k: v.half().float() for k, v in state.items()})
    pipe, generator = OneStepPipeline.from_pretrained(tmp_path / "out"), torch.Generator().manual_seed(0)
    x_t, products = torch.randn(1, 4, 8, 8), base.scheduler.alphas_cumprod
    images = pipe("a", latents=x_t, generator=torch.Generator().manual_seed(0), output_type="latent").images
    embeddings, _ = base.encode_prompt("a", "cpu", 1, False)
    for t, following in zip(steps, [*steps[1:], None], strict=True):
        eps = network(x_t, t, embeddings).sample
        x0 = (x_t - (1 - products[t]).sqrt() * eps) / products[t].sqrt()
        if following is not None:
            noise = torch.randn(x0.shape, generator=generator)
            x_t = products[following].sqrt() * x0 + (1 - products[following]).sqrt() * noise
    assert error(images, x0) < 1e-4 and error(images, x_t) > 0.1
    text = (tmp_path / "out" / "README.md").read_text()
    for part in ("license: cc-by-nc-4.0", f"all else is `{tmp_path / 'base'}`'s", "under creativeml-openrail-m",
                 "Commercial use of this model is not allowed", "use-based restrictions", "accept conditions first",
                 "Drawn by Ada."):  # fmt: skip
        assert part in text, part
    assert run_card()["image"].size == (8, 8)


@pytest.mark.skipif(not NETWORKS, reason="no golden values here")
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_golden_networks_through_their_files(name, tmp_path):
    case = json.loads((GOLDEN / f"{name}.json").read_text())
    state, io_ = load_file(GOLDEN / f"{name}.safetensors"), load_file(GOLDEN / f"{name}.io.safetensors")
    file = write_pickle(tmp_path / "a.pkl", case["wrapper"], case["config"], state, loss_fn=None)
    convert(file, tmp_path / "out")
    teacher = Teacher.from_pretrained(tmp_path / "out")
    network = teacher.denoiser.network.double()
    schedule = EDMSchedule(preconditioning=EDM_WRAPPERS.get(case["wrapper"], "edm"))
    sigma = io_["sigma"].double().reshape(-1, 1, 1, 1)
    cond = {k: io_[k].double() for k in ("class_labels", "augment_labels") if k in io_}
    if isinstance(network, UNet2DModel) and cond:
        cond = {"class_labels": cond["class_labels"].argmax(1)}
    output = network(schedule.c_in(sigma) * io_["x"].double(), io_["c_noise"], **cond).sample
    expected = io_["F_float64"]
    assert ((output[:, : expected.shape[1]] - expected).norm() / expected.norm()).item() < 1e-9


# files that mean harm


class Reduces:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile_files(folder):
    """Name and bytes of files that must be refused, and the words of the refusal."""
    mark = folder / "was-run"
    dump = pickle.dumps
    with original_modules():
        good = dump({"ema": module("EDMPrecond", {"a": torch.zeros(2)}, {})}, protocol=4)
    torch_file = io.BytesIO()
    torch.save({"a": Reduces(os.system, f"touch {mark}")}, torch_file)
    legacy = io.BytesIO()
    torch.save({"a": Reduces(os.system, f"touch {mark}")}, legacy, _use_new_zipfile_serialization=False)
    inner = dump(Reduces(os.system, f"touch {mark}"))
    with original_modules():
        nested = dump({"ema": Reduces(torch.storage._load_from_bytes, inner)})
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", dump({}))
        archive.writestr("a/data/0", bytes(5_000_000))
    big = b"\x80\x04"  # protocol 4
    yield "os.system", dump(Reduces(os.system, f"touch {mark}")), "posix.system"
    yield "eval", dump(Reduces(eval, f"open({str(mark)!r}, 'w')")), "builtins.eval"
    yield "import", dump(Reduces(__import__, "antigravity")), "builtins.__import__"
    yield "getattr of a module", b"cos\nsystem\n(S'touch'\ntR.", "os.system"
    yield "dotted", b"\x80\x04\x8c\x0bcollections\x8c\x18OrderedDict.__init__.x.y\x93.", "OrderedDict.__init__"
    yield "instance opcode", b"(S'touch x'\nios\nsystem\n.", "opcode"
    yield "extension registry", b"\x80\x02\x82\x01.", "opcode"
    yield "bytearray of 2**50", big + b"\x96" + struct.pack("<Q", 1 << 50) + b".", "opcode"
    # refused without a MemoryError: nothing of that size was asked for
    yield "bytes of 2**50", big + b"\x8e" + struct.pack("<Q", 1 << 50) + b".", "EOFError"
    yield "text of 2**50", big + b"\x8d" + struct.pack("<Q", 1 << 50) + b".", "EOFError"
    yield "frame of 2**60", big + b"\x95" + struct.pack("<Q", 1 << 60) + b".", "IndexError"
    yield "memo at 2**32", big + b"Nr" + b"\xff\xff\xff\xff" + b".", "none of the kinds"
    yield "persistent id", b"\x80\x02(S'storage'\ntQ.", "persistent object"
    yield "torch zip", torch_file.getvalue(), "posix.system"
    yield "torch legacy", legacy.getvalue(), "posix.system"
    yield "nested pickle", nested, "posix.system"
    yield "zip bomb", bomb.getvalue(), "unpacks to"
    yield "truncated", good[: len(good) // 2], "no readable checkpoint"
    yield "truncated zip", torch_file.getvalue()[:-100], "no readable checkpoint"
    yield "no pickle", b"<html>404</html>", "no readable checkpoint"
    yield "empty", b"", "no readable checkpoint"
    yield "state of a class", b"\x80\x02cnumpy\ndtype\n}X\x08\x00\x00\x00__init__Nsb.", "sets the state"
    calls = b"\x80\x02(c%s\nq\x010%sq\x020" + b"h\x01h\x02\x85R" * 100 + b"l."
    text, stored = io.BytesIO(), b"X" + struct.pack("<I", 4000) + b"a" * 4000
    torch.save(torch.zeros(1000), text, _use_new_zipfile_serialization=False)
    data = b"B" + struct.pack("<I", text.tell()) + text.getvalue()
    yield "encoded a hundred times", calls % (b"_codecs\nencode", stored), "again and again"
    yield "loaded a hundred times", calls % (b"torch.storage\n_load_from_bytes", data), "again and again"
    head = b"".join(dump(part, protocol=2) for part in (0x1950A86A20F9469CFC6C, 1001, {}))
    key = b")" + b"2\x86" * 28  # a tuple of two tuples of two, 28 times over
    storage = b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\n%sX\x03\x00\x00\x00cpuK\x01tQ."
    yield "tower of tuples as a storage", head + storage % key, "names a storage by a tuple"
    named = head + storage % b"K\x00" + b"\x80\x02" + key + b"\x85."
    yield "tower of tuples in the list of storages", named, "names a storage by a tuple"
    many = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(%sK\x00(" + b"K\x01" * 1000 + b"t2tR."
    yield "a thousand dimensions", head + many % storage[2:-1].replace(b"%s", b"K\x00"), "1000 dimensions"
    view = b"ctorch._utils\n_rebuild_tensor_v2\n(h\x00K\x00M\xe8\x03\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtR"
    first = storage[:-1].replace(b"K\x01tQ", b"M\xe8\x03tQq\x000") % b"K\x00" + b"("
    data = head + first + 100 * view + b"l." + dump([0], 2) + struct.pack("<q", 1000) + bytes(4000)
    yield "a hundred tensors of one storage", data, "again and again"
    named = b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n(}(U\x04typeU\x05classU\nclass_nameT%sutR."
    yield "a long class name", named % (struct.pack("<I", 9999) + b"a" * 9999), "no class instance"
    yield "persistent module", named.replace(b"class", b"modul", 1) % b"\x01\0\0\0a", "no class instance"
    yield "reconstructor", dump(Reduces(copyreg._reconstructor, list, list, [1]), 2), "copy_?reg._reconstructor"
    yield "partial", b"cfunctools\npartial\n(cos\nsystem\ntR.", "functools.partial"
    stand_in = b"cbuiltins\ngetattr\n(cdnnlib.util\nEasyDict\nS'__globals__'\ntR"
    yield "attribute that is called", stand_in + b"(S'x'\ntR.", "calls something that is no function"
    yield "attributes of a function", stand_in + b".", "none of the kinds"
    yield "instance of a text", b"\x80\x02X\x01\x00\x00\x00a)\x81.", "calls something that is no function"
    yield "dtype that is called", b"\x80\x02ctorch\nFloatStorage\nK\x01\x85R.", "no readable checkpoint"
    yield "deep lists", b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "none of the kinds"
    yield "deep tuples", b"\x80\x02)" + b"\x85" * 100_000 + b".", "none of the kinds"
    doubled = b"".join(b"]q%c(h%ch%ce" % (i, i - 1, i - 1) for i in range(1, 60))
    yield "a list of two lists of two", b"\x80\x02]q\x00" + doubled + b".", "none of the kinds"
    yield "number of a million digits", b"I" + b"9" * 1_000_000 + b"\n.", "no readable checkpoint"
    yield "marks", b"(" * 100_000 + b".", "none of the kinds|no readable checkpoint"
    yield "unknown protocol", b"\x80\xc8N.", "no readable checkpoint"
    yield "dict of itself", b"\x80\x02}q\x00X\x03\x00\x00\x00emah\x00s.", "none of the kinds"
    yield (
        "storage of 2**50",
        head + storage.replace(b"K\x01", b"\x8a\x08" + struct.pack("<q", 1 << 50)) % b"K\x00",
        "states",
    )
    two = (storage.replace(b"K\x01", b"M\xe8\x03") % key for key in (b"K\x00", b"K\x01"))
    yield (
        "two storages of one file's size",
        head + next(two)[:-1] + next(two)[2:] + bytes(5000),
        "states 1000 elements",
    )
    yield "storage that is listed but not there", head + dump({}, 2) + dump(["a"], 2), "no readable checkpoint"
    for words in ("short", "absent", "damaged"):
        other, good_zip = io.BytesIO(), io.BytesIO()
        torch.save({"conv_in.weight": torch.zeros(300)}, good_zip)
        with zipfile.ZipFile(good_zip) as source, zipfile.ZipFile(other, "w") as archive:
            for entry in source.namelist():
                if "/data/" not in entry:
                    archive.writestr(entry, source.read(entry))
                elif words != "absent":
                    archive.writestr(entry, b"abc" if words == "short" else b"abc" * 400)
        data = other.getvalue()
        data = data.replace(b"abcabc", b"abcabd", 1) if words == "damaged" else data
        yield f"zip whose storage is {words}", data, "no readable checkpoint|states 300 elements"
    twice = io.BytesIO()
    with zipfile.ZipFile(twice, "w") as archive:
        archive.writestr("a/data.pkl", dump({}))
        archive.writestr("b/data.pkl", dump({}))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a/data.pkl", os.urandom(1000))
    yield "packed zip", packed.getvalue(), "a compressed zip archive"
    yield "zip of two files", twice.getvalue(), "none of torch"
    yield "an innocent list", dump([1, 2, 3]), "none of the kinds"
    tower = b"".join([big, b")", *[b"\x94h" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60)]])
    yield "tower of tuples as a key", tower + b"}\x85.", "none of the kinds|no readable|refused"


HOSTILE = [name for name, _, _ in hostile_files(__import__("pathlib").Path("/nonexistent"))]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_and_leave_no_trace(name, tmp_path):
    data, words = next((data, words) for n, data, words in hostile_files(tmp_path) if n == name)
    (tmp_path / "file.pkl").write_bytes(data)
    with pytest.raises(ValueError, match=words):
        convert(tmp_path / "file.pkl", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["file.pkl"]


def test_the_source_text_of_a_file_is_never_run(tmp_path):
    mark = tmp_path / "was-run"
    _, weights = network(SONG)
    source = f"open({str(mark)!r}, 'w').close()\n{SOURCE}"
    options = DDPMPP | {"augment_dim": 0}
    convert(write_pickle(tmp_path / "edm-a.pkl", "EDMPrecond", options, weights, source), tmp_path / "out")
    assert not mark.exists() and (tmp_path / "out" / "model_index.json").is_file()


def raw_tensor(size, stride, count=4):
    """A pickle of one tensor that claims `size` and `stride` over a storage of `count` floats."""
    storage = torch.zeros(count).storage()
    return Reduces(torch._utils._rebuild_tensor_v2, storage, 0, size, stride, False, OrderedDict())


@pytest.mark.parametrize(
    "size, stride",
    [((1 << 40,), (0,)), ((1 << 40,), (1,)), ((5,), (1,)), ((2, 2), (4, 1)), ((2,), (-1,)), ((-2,), (1,))],
)
def test_tensors_are_no_larger_than_the_file(size, stride, tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": raw_tensor(size, stride)}))
    with pytest.raises(UnsafeCheckpointError, match="larger than its storage"):
        read_checkpoint(tmp_path / "a.pkl")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"img_resolution": 1 << 30}, "a whole number from 1 to 1048576 as its option 'img_resolution'"),
        ({"num_blocks": 10**9}, "a whole number from 1 to 1048576 as its option 'num_blocks'"),
        ({"num_blocks": 10**5}, "does not fit its config"),
        ({"channel_mult": [1] * 10**6}, "option|does not fit"),
        ({"model_channels": 10**7}, "a whole number from 1 to 1048576 as its option 'model_channels'"),
        ({"model_channels": 32}, "'map_label.weight' must be"),
        ({"label_dim": 5}, "'map_label.weight' must be"),
        ({"resample_filter": [1, 3, 3, 1]}, "is not the filter|does not fit"),
        ({"secret": 1}, "options that no network of EDM knows: .'secret'."),
        ({"model_type": "VisionTransformer"}, "`model_type` must be"),
        ({"dropout": "x"}, r"a number in \[0, 1\] as its option 'dropout', but has 'x'"),
        ({"dropout": float("nan")}, "as its option 'dropout', but has nan"),
        ({"sigma_data": 0.0}, "as its option 'sigma_data', but has 0.0"),
        ({"sigma_data": float("inf")}, "as its option 'sigma_data', but has inf"),
        ({"M": 4000}, "must have 1000 as its option 'M', but has 4000"),
        ({"beta_d": 10.0}, "must have 19.9 as its option 'beta_d', but has 10.0"),
        ({"img_resolution": 10**5000}, "`file` .*holds no network of the kind 'edm': Exceeds the limit"),
        ({"channel_mult": [float("nan"), 2]}, "a list of numbers as its option 'channel_mult'"),
        ({"channel_mult": [-1, 2]}, "a list of numbers as its option 'channel_mult'"),
        ({"channel_mult": ["a", "b"]}, "a list of numbers as its option 'channel_mult'"),
        ({"channel_mult": [0.1, 2]}, "levels of at least 4 channels"),
        ({"channel_mult": 5}, "a list of numbers as its option 'channel_mult', but has 5"),
        ({"attn_resolutions": "abc"}, "a list of numbers as its option 'attn_resolutions'"),
        ({"label_dim": -4}, "a whole number from 0 to 1048576 as its option 'label_dim', but has -4"),
        ({"label_dim": 1 << 60}, "a whole number from 0 to 1048576 as its option 'label_dim'"),
        ({"augment_dim": float("nan")}, "a whole number from 0 to 1048576 as its option 'augment_dim', but has nan"),
        ({"channel_mult_emb": 1 << 60}, "a positive number as its option 'channel_mult_emb'"),
        ({"channel_mult_emb": 1.5}, "`channel_mult_emb` must be a whole number, but is 1.5"),
        ({"model_channels": 7}, "`file` .*divisible by num_groups"),
        ({"resample_filter": [0, 0]}, "`resample_filter` must be one of"),
        ({"resample_filter": [10**400, 1]}, "a list of numbers as its option 'resample_filter'"),
    ],
)
def test_options_that_do_not_fit_the_file(change, message, tmp_path):
    _, weights = network(SONG | {"augment_dim": 9})
    weights["model.enc.4x4_down.conv0.resample_filter"] = torch.full((1, 1, 2, 2), 0.25)
    file = write_pickle(tmp_path / "edm-a.pkl", "EDMPrecond", DDPMPP | change, weights)
    with pytest.raises(ValueError, match=message):
        convert(file, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["edm-a.pkl"]


def test_a_bug_of_ours_keeps_its_traceback(song, tmp_path, monkeypatch):
    def bug(*args):
        return {}["a key that is not there"]

    monkeypatch.setattr("diffusers_onestep.conversion.edm.load_network", bug)
    monkeypatch.setattr("diffusers_onestep.conversion.edm.adm_network", bug)
    with pytest.raises(KeyError, match="a key that is not there"):
        main(["convert", str(song[1]), str(tmp_path / "out")])


def test_a_bug_in_the_reader_is_no_fault_of_the_file(song, tmp_path, monkeypatch):
    def bug(*args):
        raise AssertionError("a bug")

    monkeypatch.setattr("diffusers_onestep.conversion.pickles._rebuild_tensor", bug)
    with pytest.raises(AssertionError, match="a bug"):
        convert(song[1], tmp_path / "out")
    # what a file can cause says so, and keeps what it was
    (tmp_path / "a.pkl").write_bytes(b"\x80\x04e.")
    with pytest.raises(ValueError, match="no readable checkpoint") as raised:
        convert(tmp_path / "a.pkl", tmp_path / "out")
    assert isinstance(raised.value.__cause__, IndexError)


def test_what_cannot_be_told_is_asked_for(song, tmp_path):
    _, file = song
    with pytest.raises(ValueError, match="`out` must not exist"):
        convert(file, tmp_path)
    for kind in ("edm2", "guided-diffusion", "dmd2"):
        with pytest.raises(ValueError, match="`file`"):
            convert(file, tmp_path / "out", kind=kind)
    with pytest.raises(ValueError, match="`kind` must be 'auto' or one of"):
        convert(file, tmp_path / "out", kind="gan")
    with pytest.raises(ValueError, match="does not exist"):
        convert(tmp_path / "none.pkl", tmp_path / "out")
    _, weights = network(SONG)
    lone = write_pickle(tmp_path / "network.pkl", "EDMPrecond", DDPMPP | {"augment_dim": 0}, weights)
    with pytest.raises(ValueError, match=r"`kind` must be given .* 'edm' for a teacher, 'sid' for a one-step student"):
        convert(lone, tmp_path / "out")
    torch.save({"fake_unet.model.a": torch.zeros(1)}, tmp_path / "critic.bin")
    with pytest.raises(ValueError, match="critic of a DMD2 run"):
        convert(tmp_path / "critic.bin", tmp_path / "out")


@pytest.mark.parametrize(
    "place, student",
    [
        ("alpha/network.pkl", False),
        ("alpha1.2/run/network.pkl", False),
        ("residual/network.pkl", False),
        ("run/residual.pkl", False),
        ("cifar10-cond/alpha1.2/network-snapshot-1.2-403968.pkl", True),
        ("run/cifar10_sida_alpha1-10240.pkl", True),
        ("run/my-sid.pkl", True),
        ("run/cifar10_sid2a.pkl", True),
    ],
)
def test_students_of_sid_are_told_by_the_end_of_their_path(place, student, tmp_path):
    content = {"ema": StoredModule("EDMPrecond")}
    if student:
        assert kind_of(content, tmp_path / place) == "sid"
    else:
        with pytest.raises(ValueError, match="`kind` must be given"):
            kind_of(content, tmp_path / place)


@pytest.mark.parametrize(
    "place, steps",
    [
        ("4step/dmd2_sdxl_1step_unet.bin", [399]),
        ("1step/dmd2_sdxl_4step_unet_fp16.bin", [999, 749, 499, 249]),
        ("dmd2_4step/unet.bin", [999, 749, 499, 249]),
        ("sdv1.5/laion_fid8.35_checkpoint_model_041000/pytorch_model.bin", [999]),
        ("4step/run/unet.bin", None),
        ("dmd2_14step/unet.bin", None),
    ],
)
def test_timesteps_are_told_by_the_end_of_a_path(place, steps, tmp_path):
    if steps is not None:
        assert told_timesteps(tmp_path / place) == steps
    else:
        with pytest.raises(ValueError, match="`student_timesteps` must be given"):
            told_timesteps(tmp_path / place)


@pytest.mark.parametrize("version, said", [(6, None), (7, "7"), ("6", "None"), (10**9, "None")])
def test_pickles_of_another_version_are_read_with_a_warning(version, said, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("edm_files.VERSION", version)  # of the file that is written
    _, weights = network(SONG)
    convert(write_pickle(tmp_path / "edm-a.pkl", "EDMPrecond", DDPMPP | {"augment_dim": 0}, weights), tmp_path / "out")
    warned = [r.message for r in caplog.records if "what is known is version 6" in r.message]
    assert len(warned) == (said is not None) and all(f"is of version {said}," in text for text in warned)
    assert (tmp_path / "out" / "model_index.json").is_file()


@pytest.mark.parametrize("text", [None, "{", "[1, 2]", b"\xff\xfe\x00"])
def test_options_that_are_no_json_object(text, song, tmp_path, capsys):
    file = tmp_path / "options.json"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(song[1]), str(tmp_path / "out"), "--config", str(file)])
    assert ended.value.code == 2 and "onestep: error: `config` must be a" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_base_must_have_a_unet(tmp_path):
    tiny_pipeline("sd3").save_pretrained(tmp_path / "base")
    torch.save({"conv_in.weight": torch.zeros(1)}, tmp_path / "dmd2_sdxl_1step_unet.bin")
    with pytest.raises(ValueError, match=r"`base` must be a text-to-image pipeline with a U-Net, but .* is a Stable"):
        convert(tmp_path / "dmd2_sdxl_1step_unet.bin", tmp_path / "out", base=tmp_path / "base")
    assert not (tmp_path / "out").exists()


def test_legacy_files_of_torch(tmp_path):
    state = {"a": torch.randn(3, 2), "b": torch.randn(4).half(), "c": torch.arange(3)}
    state["view"] = state["a"].T
    for new in (True, False):
        torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
        read = read_checkpoint(tmp_path / "a.pt")
        assert all(torch.equal(read[k], v) and read[k].dtype == v.dtype for k, v in state.items())
