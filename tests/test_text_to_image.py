"""Text-to-image teachers of every family: conditions, all methods by their real scripts, students' pipelines."""

import json

import diffusers
import numpy as np
import pytest
import torch
from conftest import run_on_two_ranks, run_script, script
from families import BUILDERS, CALLS, tiny_pipeline
from PIL import Image

from diffusers_onestep import OneStepPipeline, Teacher
from diffusers_onestep.distillation import DistillationArguments
from diffusers_onestep.evaluation import generate
from diffusers_onestep.features import load_extractor
from diffusers_onestep.pipelines.pipeline_text_to_image import TEXT_TO_IMAGE_PIPELINES

FAMILIES = list(BUILDERS)
STOCK = {
    "sd": "StableDiffusionPipeline",
    "sd-v": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "flux": "FluxPipeline",
    "pixart": "PixArtAlphaPipeline",
    "pixart-sigma": "PixArtSigmaPipeline",
    "sana": "SanaPipeline",
}
PROMPTS = ["a cat", "a red car", "the sea at night"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A teacher of each family on disk, prompts, and captioned images."""
    root = tmp_path_factory.mktemp("text-to-image")
    for family in FAMILIES:
        tiny_pipeline(family).save_pretrained(root / family)
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    images = [Image.fromarray(np.full((20, 24, 3), 80 * i, np.uint8)) for i in range(3)]
    rows = Dataset.from_dict(
        {"image": images, "text": PROMPTS}, features=Features({"image": ImageFeature(), "text": Value("string")})
    )
    rows.save_to_disk(root / "images")
    return root


def flags(folders, family, output, **others):
    given = {
        "pretrained_teacher_model": folders / family,
        "output_dir": output,
        "cache_dir": folders / "cache",
        "resolution": 32 if family == "sana" else 16,
        "train_batch_size": 2,
        "max_train_steps": 2,
        "learning_rate": 1e-3,
        "lr_warmup_steps": 0,
        "prompts": folders / "prompts.txt",
    } | others
    return [
        part for k, v in given.items() if v is not None for part in (f"--{k}", *(v if isinstance(v, list) else [v]))
    ]


def size(family):
    side = 32 if family == "sana" else 16
    return {"height": side, "width": side} | CALLS.get(family, {})


def teacher_of(pipeline, family):
    return Teacher(pipeline, resolution=32 if family == "sana" else 16)


@pytest.mark.parametrize("family", FAMILIES)
def test_conditions_and_guidance_are_those_of_the_stock_pipeline(family):
    pipeline = tiny_pipeline(family)
    if hasattr(pipeline.scheduler, "alphas_cumprod"):
        pipeline.scheduler = type(pipeline.scheduler).from_config(
            pipeline.scheduler.config, timestep_spacing="trailing", clip_sample=False
        )
    teacher = teacher_of(pipeline, family)
    noise = torch.randn(2, *teacher.sample_shape, generator=seeded())
    settings = {"guidance_scale": 3.0}
    latents = noise
    if family == "flux":
        settings = {"true_cfg_scale": 3.0, "negative_prompt": "", "guidance_scale": 3.5}
        latents = pipeline._pack_latents(noise, *noise.shape)
    expected = pipeline(
        PROMPTS[:2], latents=latents, num_inference_steps=4, output_type="latent", **settings, **size(family)
    ).images
    if family == "flux":
        expected = pipeline._unpack_latents(expected, 16, 16, 2)
    ours = teacher.sample(noise, teacher.encode(PROMPTS[:2]), num_inference_steps=4, guidance_scale=3.0)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    other = teacher.sample(noise, teacher.encode(["x", "y"]), num_inference_steps=4, guidance_scale=3.0)
    assert (other - ours).abs().max() > 1e-4  # prompts matter


@pytest.mark.parametrize("family", FAMILIES)
def test_text_encoders_are_loaded_in_the_dtype_of_the_teacher(folders, tmp_path, family):
    given = {"pretrained_teacher_model": str(folders / family), "prompts": str(folders / "prompts.txt")}
    given |= {"cache_dir": str(tmp_path / "cache"), "resolution": size(family)["height"]}
    embedded = {}
    for dtype in (None, "bf16"):
        args = DistillationArguments(output_dir=str(tmp_path / "out"), teacher_dtype=dtype, **given)
        samples = args.load_samples(args.load_teacher())
        embedded[dtype] = samples.batch([0, 1])["cond"]["encoder_hidden_states"]
    assert [rows.dtype for rows in embedded.values()] == [torch.float32, torch.bfloat16]
    error = (embedded["bf16"].float() - embedded[None]).norm() / embedded[None].norm()
    assert 0 < error < 0.05


METHODS = {
    "sida": ("train_sid", {"kappas": 1.5, "prompts": None, "gan_weight": 0.1}),
    "sid": ("train_sid", {"kappas": 1.5}),
    "dmd": ("train_dmd", {"guidance_scale": 2.0, "fake_score_updates": 2, "prompts": None, "gan_weight": 1e-3}),
    "pid": ("train_pid", {"guidance_scale": 2.0, "distance": "pseudo-huber", "num_points": 20}),
    "dkdm": ("train_dkdm", {"shrink": 0.5, "num_steps": 10, "reservoir_ratio": 0.2, "validation_inference_steps": 5}),
}


@pytest.mark.parametrize(
    "family, method", [(f, m) for f in FAMILIES for m in METHODS if m != "sida" or f in ("sd", "sd3")]
)
def test_every_method_trains_every_family(folders, tmp_path, family, method):
    """Two steps by the real script; the saved model gives the same image here and in plain diffusers."""
    script, settings = METHODS[method]
    if "gan_weight" in settings:
        settings = settings | {"dataset_name": folders / "images"}
    run_script(script, *flags(folders, family, tmp_path, **settings))
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == STOCK[family]
    assert (tmp_path / "samples.png").is_file() and not list(tmp_path.glob(".*"))
    network = "unet" if "unet" in index else "transformer"
    before, after = (_weights(folder / network) for folder in (folders / family, tmp_path))
    if method != "dkdm":
        assert sum(not torch.equal(before[k], after[k]) for k in before) > len(before) // 2
    ours = OneStepPipeline.from_pretrained(tmp_path)
    assert type(ours).__name__ == f"OneStep{STOCK[family]}"
    stock = getattr(diffusers, STOCK[family]).from_pretrained(tmp_path)
    for pipeline in (ours, stock):
        pipeline.set_progress_bar_config(disable=True)
    steps = {"num_inference_steps": 5} if method == "dkdm" else {}
    image = ours(PROMPTS[0], generator=seeded(), output_type="np", **steps, **size(family)).images
    plain = {"num_inference_steps": 1, "guidance_scale": 3.5 if family == "flux" else 1.0} | steps
    if method == "dkdm":
        plain.pop("guidance_scale")
    assert np.array_equal(
        stock(PROMPTS[0], generator=seeded(), output_type="np", **plain, **size(family)).images, image
    )
    if family == "flux":
        assert "guidance_scale=3.5" in (tmp_path / "README.md").read_text()
    own = index["scheduler"][0] == "diffusers_onestep"
    assert own == (method in ("sida", "sid", "pid") or (method == "dmd" and family in ("sd3", "flux", "sana")))


def _weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "diffusion_pytorch_model.safetensors")


FIT = {
    "max_train_steps": None,
    "train_batch_size": None,
    "learning_rate": None,
    "lr_warmup_steps": None,
    "cache_dir": None,
    "num_inference_steps": 5,
    "scale": 4,
    "num_samples": 16,
    "num_holdout_samples": 8,
    "batch_size": 8,
    "guidance_scale": 3.0,
}


@pytest.mark.parametrize(
    "family, solver", [("sd-v", "ddim"), ("sdxl", "euler"), ("sd3", "dpmsolver++"), ("flux", "dpmsolver++")]
)
def test_solvers_are_fitted_to_every_kind_of_teacher(folders, tmp_path, family, solver):
    """A guided fit by the script, stored with the teacher's weights; sampled with the guidance of the fit."""
    run_script("fit_d_ode", *flags(folders, family, tmp_path, solver=solver, **FIT), "--save_pipeline")
    ours = OneStepPipeline.from_pretrained(tmp_path)
    stock = getattr(diffusers, STOCK[family]).from_pretrained(tmp_path)
    for pipeline in (ours, stock):
        pipeline.set_progress_bar_config(disable=True)
    plain = {"num_inference_steps": 5, "guidance_scale": 3.0}
    if family == "flux":
        plain |= {"true_cfg_scale": 3.0, "negative_prompt": "", "guidance_scale": 3.5}
    image = ours(PROMPTS[0], generator=seeded(), output_type="np", **size(family)).images
    again = stock(PROMPTS[0], generator=seeded(), output_type="np", **plain, **size(family)).images
    assert np.array_equal(again, image)
    if family == "flux":
        card = (tmp_path / "README.md").read_text()
        assert 'guidance_scale=3.5, true_cfg_scale=3.0, negative_prompt=""' in card
    table = next(iter(ours.scheduler.config.dode_tables.values()))
    assert table["guidance_scale"] == 3.0 and any(table["lambdas"])


def test_pairs_hold_prompts_and_feed_the_regression(folders, tmp_path):
    """DMD's pairs of a guided teacher: the regression's target is what the stored noise became."""
    settings = {"num_pairs": 3, "num_inference_steps": 4, "guidance_scale": 2.0, "batch_size": 2}
    leave = dict.fromkeys(("max_train_steps", "train_batch_size", "learning_rate", "lr_warmup_steps", "cache_dir"))
    run_script("make_pairs", *flags(folders, "sdxl", tmp_path / "pairs", **settings, **leave))
    train = {"prompts": None, "pairs": tmp_path / "pairs", "regression_weight": 0.25, "regression_loss": "l2"}
    run_script("train_dmd", *flags(folders, "sdxl", tmp_path / "out", guidance_scale=2.0, **train))
    assert OneStepPipeline.from_pretrained(tmp_path / "out").student_steps == 1
    from datasets import load_from_disk

    rows = load_from_disk(tmp_path / "pairs").with_format("torch")
    teacher = Teacher.from_pretrained(folders / "sdxl", resolution=16)
    target = teacher.sample(
        rows["noise"][:], teacher.encode(list(rows["prompt"])), num_inference_steps=4, guidance_scale=2.0
    )
    torch.testing.assert_close(rows["target"][:], target, rtol=1e-4, atol=1e-4)


def test_stages_of_a_published_run_go_on_from_each_other(folders, tmp_path):
    """DMD's Stable Diffusion on LAION-6+: one output folder, its settings changed on the way."""
    leave = dict.fromkeys(("max_train_steps", "train_batch_size", "learning_rate", "lr_warmup_steps", "cache_dir"))
    pairs = {"num_pairs": 2, "num_inference_steps": 4, "guidance_scale": 8.0, "batch_size": 2}
    run_script("make_pairs", *flags(folders, "sd", tmp_path / "pairs", **pairs, **leave))
    run = {"prompts": None, "pairs": tmp_path / "pairs", "regression_loss": "l2", "logging_steps": 1}
    run |= {"global_batch_size": 2, "mixed_precision": "no", "learning_rate": None, "resume_from_checkpoint": "latest"}
    for step, stage in enumerate((1, 4, 8), start=1):
        preset = {"preset": f"sd15-laion6-{stage}", "max_train_steps": step}
        run_script("train_dmd", *flags(folders, "sd", tmp_path / "out", **preset, **run))
        settings = json.loads((tmp_path / "out" / "training_args.json").read_text())
        assert settings["regression_weight"] == {1: 0.1, 4: 1.0, 8: 0.25}[stage]
        teacher = Teacher.from_pretrained(folders / "sd")
        levels = [teacher.denoiser.schedule.timestep(ratio).item() for ratio in settings["level_ratios"]]
        assert levels == [20, 980 if stage == 1 else 500]
    steps = [json.loads(line)["step"] for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(steps)) == [1, 2, 3]


def test_prompts_of_the_command_line_are_those_of_a_file(folders, tmp_path):
    settings = {"max_train_steps": 1}
    run_script("train_dmd", *flags(folders, "sd", tmp_path / "file", **settings))
    run_script("train_dmd", *flags(folders, "sd", tmp_path / "line", prompts=None, prompt=PROMPTS, **settings))
    one, two = (_weights(tmp_path / name / "unet") for name in ("file", "line"))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompt": ["a cat"]}, "One of `prompts` and `dataset_name`"),
        ({"prompts": None}, "One of `prompts` and `dataset_name`"),
        ({"resolution": 15}, "`resolution` must be a multiple of 2, but is 15"),
        ({"prompts": "nothing.txt"}, "`prompts` must be a UTF-8 file"),
        ({"start_ratio": 2.5}, "`start_ratio` must be left out for a StableDiffusion3Pipeline"),
    ],
)
def test_bad_flags_end_before_training(folders, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run_script("train_sid", *flags(folders, "sd3", tmp_path, **changes))
    assert not (tmp_path / "checkpoints").exists()


def test_the_folder_of_another_run_is_refused_before_anything_is_written_to_it(folders, tmp_path):
    run_script("train_dmd", *flags(folders, "sd", tmp_path, max_train_steps=1))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(ValueError, match="`output_dir` must hold no checkpoints of another run"):
        run_script("train_dmd", *flags(folders, "sd-v", tmp_path, max_train_steps=1))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("family", ["pixart", "pixart-sigma", "sana"])
def test_sizes_that_stock_pipelines_have_no_table_for_are_the_default(family):
    pipeline = tiny_pipeline(family)
    student = TEXT_TO_IMAGE_PIPELINES[STOCK[family]].of(pipeline)
    student.set_progress_bar_config(disable=True)
    call = {k: v for k, v in CALLS.get(family, {}).items() if k == "clean_caption"}
    side = student.transformer.config.sample_size * student.vae_scale_factor
    assert student("x", num_inference_steps=1, output_type="np", **call).images.shape[1:3] == (side, side)


@pytest.mark.parametrize("resolution, sliced", [(256, False), (512, True)])
def test_large_images_are_encoded_and_decoded_one_at_a_time(resolution, sliced):
    teacher = Teacher(tiny_pipeline("sd"), resolution=resolution)
    assert teacher.pipeline.vae.use_slicing is sliced
    student = TEXT_TO_IMAGE_PIPELINES[STOCK["sd"]].of(tiny_pipeline("sd"))  # as its evaluation has it
    settings = {"num_inference_steps": 1, "num_samples": 1, "prompts": ["x"], "resolution": resolution}
    generate(student, load_extractor("effnet-lite0"), **settings)
    assert student.vae.use_slicing is sliced


def test_pixel_teachers_take_no_prompts(folders, tmp_path):
    with pytest.raises(ValueError, match="`prompts` must be None for a teacher that takes no prompts"):
        run_script("train_sid", *flags(folders, "sd", tmp_path, pretrained_teacher_model="fashion32", resolution=None))


def test_two_real_ranks_equal_one_process(folders, tmp_path):
    """SiD-LSG with the same global batch of 4; both ranks encode prompts into one cache. (At a large rate the second
    update would magnify the rounding of the first.)"""
    settings = {"kappas": 1.5, "adam_epsilon": 1.0, "learning_rate": 1e-3, "alpha": 1.0}
    one, two = tmp_path / "one", tmp_path / "two"
    more = {"cache_dir": tmp_path / "cache", **settings}
    run_script("train_sid", *flags(folders, "sd", one, gradient_accumulation_steps=2, **settings))
    run_on_two_ranks(script("train_sid.py", *flags(folders, "sd", two, **more)))
    assert len(list((tmp_path / "cache" / "text").rglob("*.safetensors"))) == len(PROMPTS)
    assert (two / "checkpoints" / "step-000002" / "random_states_1.pkl").is_file()  # there really were two
    start, *results = (_weights(folder / "unet") for folder in (folders / "sd", one, two))
    first, second = (torch.cat([(result[key] - start[key]).flatten() for key in start]) for result in results)
    assert first.abs().max() > 1e-7
    torch.testing.assert_close(first, second, rtol=0, atol=2e-3 * first.abs().max().item())


def tiny_autoencoder(channels=4, width=(8, 8)):
    torch.manual_seed(0)
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=width,
        decoder_block_out_channels=width,
        num_encoder_blocks=(1,) * len(width),
        num_decoder_blocks=(1,) * len(width),
        latent_channels=channels,
    ).eval()


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_a_tiny_autoencoder_takes_the_latents_of_the_network(family, tmp_path):
    """Those that an AutoencoderKL takes are scaled, and for flow teachers shifted."""
    tiny_autoencoder().save_pretrained(tmp_path)
    teacher = teacher_of(tiny_pipeline(family), family)
    vae = teacher.load_tiny_vae(tmp_path)
    x0 = torch.randn(2, *teacher.sample_shape, generator=seeded()).requires_grad_(True)
    images = teacher.decode(x0, vae)
    torch.testing.assert_close(images, 2 * vae.decoder.layers(torch.tanh(x0 / 3) * 3) - 1)
    assert images.shape == teacher.decode(x0).shape == (2, 3, 16, 16)
    images.sum().backward()
    assert x0.grad.abs().max() > 0 and all(p.grad is None for p in vae.parameters())
    scaled = x0.detach() / teacher.pipeline.vae.config.scaling_factor
    shifted = scaled + (teacher.pipeline.vae.config.shift_factor or 0)
    torch.testing.assert_close(teacher.decode(x0.detach()), teacher.pipeline.vae.decode(shifted).sample)


def test_perceptual_distances_decode_by_a_tiny_autoencoder(folders, tmp_path, monkeypatch):
    tiny_autoencoder().save_pretrained(tmp_path / "tiny")
    calls, decode = [], diffusers.AutoencoderTiny.decode

    def counted(*args, **kwargs):
        calls.append(1)
        return decode(*args, **kwargs)

    monkeypatch.setattr(diffusers.AutoencoderTiny, "decode", counted)
    settings = {"distance": "stlpips", "num_points": 20, "tiny_vae": tmp_path / "tiny"}
    run_script("train_pid", *flags(folders, "sd", tmp_path / "out", **settings))
    assert len(calls) == 2 * 2  # two images of each of two steps
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderKL"]  # the student keeps its teacher's


def test_what_a_tiny_autoencoder_can_not_serve_is_refused(folders, tmp_path):
    for name, vae in (("channels", tiny_autoencoder(16)), ("scale", tiny_autoencoder(4, (8, 8, 8)))):
        vae.save_pretrained(tmp_path / name)
    pid = {"distance": "stlpips"}
    for name, settings, message in (
        ("train_pid", pid | {"tiny_vae": tmp_path / "channels"}, "must have 4 latent channels .* has 16 and 2"),
        ("train_pid", pid | {"tiny_vae": tmp_path / "scale"}, ".* and 2 pixels .* has 4 and 4"),
        ("train_pid", pid | {"tiny_vae": folders / "sd" / "vae"}, "must be an AutoencoderTiny, but .* AutoencoderKL"),
        ("train_pid", {"distance": "l2", "tiny_vae": tmp_path / "scale"}, "must be None where nothing is decoded"),
        ("train_dmd", {"tiny_vae": tmp_path / "scale"}, "must be None without a `regression_weight`"),
    ):
        with pytest.raises(ValueError, match=f"`tiny_vae` {message}"):
            run_script(name, *flags(folders, "sd", tmp_path / "out", **settings))
