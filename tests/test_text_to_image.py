"""Text-to-image teachers of every family: conditions, all methods by their real scripts, students' pipelines."""

import importlib.util
import json
import sys

import diffusers
import numpy as np
import pytest
import torch
from conftest import ROOT
from families import BUILDERS, CALLS, tiny_pipeline
from PIL import Image

from diffusers_onestep import OneStepPipeline, Teacher
from diffusers_onestep.arguments import parse_args

FAMILIES = list(BUILDERS)
STOCK = {
    "sd": "StableDiffusionPipeline",
    "sd-v": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "flux": "FluxPipeline",
    "pixart": "PixArtAlphaPipeline",
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


def run_script(name, *flags):
    """A script's `main` in this process, with flags as on its command line."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "training" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    presets = next((v for k, v in vars(module).items() if k.endswith("_PRESETS")), None)
    arguments = [v for k, v in vars(module).items() if k.endswith("Arguments") and v.__module__ == name]
    module.main(parse_args(arguments[0], [str(flag) for flag in flags], presets=presets))


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


METHODS = {
    "sid": ("train_sid", {"kappas": 1.5}),
    "dmd": ("train_dmd", {"guidance_scale": 2.0, "fake_score_updates": 2, "prompts": None, "gan_weight": 1e-3}),
    "pid": ("train_pid", {"guidance_scale": 2.0, "distance": "pseudo-huber", "num_points": 20}),
    "dkdm": ("train_dkdm", {"shrink": 0.5, "num_steps": 10, "reservoir_ratio": 0.2, "validation_inference_steps": 5}),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_trains_every_family(folders, tmp_path, family, method):
    """Two steps by the real script; the saved model gives the same image here and in plain diffusers."""
    script, settings = METHODS[method]
    if method == "dmd":
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
    own = index["scheduler"][0] == "diffusers_onestep"
    assert own == (method in ("sid", "pid") or (method == "dmd" and family in ("sd3", "flux", "sana")))


def _weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "diffusion_pytorch_model.safetensors")
