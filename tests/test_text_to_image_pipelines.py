"""Students in their stock pipelines: what diffusers' users do with them, and what is refused."""

import os
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from families import CALLS, tiny_pipeline
from hub_server import LocalHub

from diffusers_onestep import DistilledDDIMScheduler, OneStepPipeline, Teacher
from diffusers_onestep.pipelines import pipeline_text_to_image
from diffusers_onestep.sampler import sample_shape

FOUR = [999, 749, 499, 249]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def student(family="sd", timesteps=(999,), sigma=1.0, seed=0, **trajectory):
    pipeline = tiny_pipeline(family, seed)
    pipeline = Teacher(pipeline, resolution=32 if family == "sana" else 16).student_pipeline(
        getattr(pipeline, "unet", None) or pipeline.transformer,
        student_timesteps=list(timesteps),
        init_noise_sigma=sigma,
        **trajectory,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def image(pipeline, prompt="a cat", **arguments):
    return pipeline(prompt, generator=seeded(), output_type="np", **arguments).images


SIZE = {"height": 16, "width": 16}


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_one_call_of_the_network_is_the_denoiser_of_training(family):
    flow = family in ("sd3", "flux")
    pipeline = student(family, [1000.0] if flow else [399])
    teacher = Teacher(pipeline, resolution=16)
    network = pipeline.transformer if flow else pipeline.unet
    calls = []
    network.register_forward_hook(lambda *_: calls.append(1))
    noise = torch.randn(2, 4, 8, 8, generator=seeded())
    latents = pipeline._pack_latents(noise, *noise.shape) if family == "flux" else noise
    x0 = pipeline(["a", "b"], latents=latents, output_type="latent", **SIZE).images
    assert len(calls) == 1
    if family == "flux":
        x0 = pipeline._unpack_latents(x0, 16, 16, 2)
    t = torch.full((2,), 1000.0 if flow else 399)
    with torch.no_grad():
        expected = teacher.denoiser(noise, t, teacher.encode(["a", "b"]))
    torch.testing.assert_close(x0, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux", "pixart", "sana"])
def test_students_of_another_resolution_default_to_it(family, tmp_path):
    pipeline, side = tiny_pipeline(family), 64 if family == "sana" else 32
    network = getattr(pipeline, "unet", None) or pipeline.transformer
    if family == "sana":  # with positions, as PixArt has them
        network = type(network).from_config(network.config, interpolation_scale=2.0).eval()
        pipeline.register_modules(transformer=network)
    if family == "sd":  # as checkpoints of Stable Diffusion 1.x say
        network.register_to_config(_diffusers_version="0.6.0")
    before = dict(network.config)
    teacher = Teacher(pipeline, resolution=side)
    own = teacher.student_pipeline(network, student_timesteps=[999], init_noise_sigma=1.0)
    assert dict(network.config) == before
    own.save_pretrained(tmp_path)
    loaded = OneStepPipeline.from_pretrained(tmp_path)
    binning = {"use_resolution_binning": False} if family in ("pixart", "sana") else {}
    for pipe in (own, loaded):
        pipe.set_progress_bar_config(disable=True)
        assert sample_shape(pipe) == teacher.sample_shape
    assert [image(pipe, **binning).shape[1:3] for pipe in (own, loaded)] == [(side, side)] * 2
    noise, t, cond = torch.randn(1, *teacher.sample_shape), torch.full((1,), 999), teacher.encode(["a cat"])
    with torch.no_grad():
        expected, found = teacher.denoiser(noise, t, cond), Teacher(loaded).denoiser(noise, t, cond)
    # x0 is what is left of the noise, divided by a small alpha
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_what_would_be_silently_wrong_is_refused():
    pipeline = student()
    for arguments, message in (
        ({"num_inference_steps": 4}, "`num_inference_steps` must be 1"),
        ({"guidance_scale": 7.5}, "`guidance_scale` must be 1.0"),
        ({"timesteps": [399]}, "`timesteps` must be None"),
        ({"sigmas": [1.0]}, "`sigmas` must be None"),
        ({"negative_prompt": "ugly"}, "`negative_prompt` must be None"),
        ({"negative_prompt_embeds": torch.zeros(1, 77, 16)}, "`negative_prompt_embeds` must be None"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline("a cat", **arguments)
    assert image(pipeline, guidance_scale=0.0, num_inference_steps=1, negative_prompt="").shape == (1, 16, 16, 3)
    flux = student("flux", [1000.0])
    assert flux.config.embedded_guidance == 3.5
    for arguments, message in (
        ({"guidance_scale": 2.0}, "`guidance_scale` must be 3.5"),
        ({"true_cfg_scale": 4.0, "negative_prompt": ""}, "`true_cfg_scale` must be 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            flux("a cat", **SIZE, **arguments)


def test_flow_students_that_no_stock_call_can_start_are_refused():
    with pytest.raises(ValueError, match="`start_ratio` must be left out for a StableDiffusion3Pipeline"):
        student("sd3", [714.0], sigma=0.714)


ALL = ["sd", "sdxl", "sd3", "flux", "pixart", "pixart-sigma", "sana"]


def of_family(family):
    """A one-step student with what its stock call needs, but for the size."""
    pipeline = student(family, [1000.0] if family in ("sd3", "flux", "sana") else [999])
    return pipeline, {k: v for k, v in CALLS.get(family, {}).items() if k not in ("height", "width")}


@pytest.mark.parametrize("family", ALL)
def test_odd_captions_and_rectangles_give_an_image(family):
    pipeline, call = of_family(family)
    side = 32 if family == "sana" else 16
    for prompt in ("", "a" * 10_000, "🦊🎈", "قطة حمراء", "\x00\n\t"):
        assert np.isfinite(image(pipeline, prompt, height=side, width=side, **call)).all()
    assert image(pipeline, height=side, width=2 * side, **call).shape == (1, side, 2 * side, 3)


@pytest.mark.parametrize("family", ALL)
def test_a_rectangular_call_is_the_denoiser_of_training(family):
    """A teacher of that size gives the network the same positions, sizes and guidance."""
    pipeline, call = of_family(family)
    height, width = (64, 32) if family == "sana" else (32, 16)
    teacher = Teacher(pipeline, resolution=(height, width))
    noise = torch.randn(1, *teacher.sample_shape, generator=seeded())
    call |= teacher.family.start(pipeline, noise)
    x0 = pipeline("a cat", output_type="latent", **call).images
    if family == "flux":
        x0 = pipeline._unpack_latents(x0, height, width, 2)
    t = torch.full((1,), 1000.0 if family in ("sd3", "flux", "sana") else 999)
    with torch.no_grad():
        expected = teacher.denoiser(noise, t, teacher.encode(["a cat"]))
    torch.testing.assert_close(x0, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_ip_adapter():
    pipeline = student()
    base, width = image(pipeline), 16
    torch.manual_seed(1)
    names = [name for name in pipeline.unet.attn_processors if "attn2" in name]
    layers = {}
    for number, name in enumerate(names):
        to_k = pipeline.unet.get_submodule(name.removesuffix(".processor")).to_k
        for part in ("to_k_ip", "to_v_ip"):
            layers[f"{2 * number + 1}.{part}.weight"] = 0.3 * torch.randn(to_k.out_features, width)
    project = torch.nn.Linear(8, 4 * width)
    norm = {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    weights = {f"proj.{k}": v for k, v in project.state_dict().items()} | norm
    adapter = {"image_proj": weights, "ip_adapter": layers}
    pipeline.load_ip_adapter(adapter, subfolder="", weight_name=None, image_encoder_folder=None)
    pipeline.set_ip_adapter_scale(1.0)
    one, other = (image(pipeline, ip_adapter_image_embeds=[torch.randn(1, 1, 8)]) for _ in range(2))
    assert not np.allclose(one, other, atol=1e-4) and not np.allclose(one, base, atol=1e-4)
    pipeline.unload_ip_adapter()
    assert np.allclose(image(pipeline), base, atol=1e-5)


def test_parts_wait_off_their_device():
    """On a GPU `enable_model_cpu_offload` does it by the same hooks; it refuses a machine without one."""
    pipeline = student()
    base = image(pipeline)
    with pytest.raises((RuntimeError, ValueError), match="accelerator"):
        pipeline.enable_model_cpu_offload()
    pipeline.unet.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert np.array_equal(image(pipeline), base)
    pipeline = student()
    cpu_offload(pipeline.unet, torch.device("cpu"))  # as `enable_sequential_cpu_offload` does
    assert np.array_equal(image(pipeline), base)
    pipeline = student()
    for part in (pipeline.text_encoder, pipeline.unet, pipeline.vae):  # as `enable_model_cpu_offload` does
        cpu_offload_with_hook(part, torch.device("cpu"))
    assert np.array_equal(image(pipeline), base)


def test_weights_in_eight_bits(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    student().save_pretrained(tmp_path)
    base = image(OneStepPipeline.from_pretrained(tmp_path))
    how = diffusers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    config = diffusers.PipelineQuantizationConfig(quant_mapping={"unet": how})
    pipeline = OneStepPipeline.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    kinds = {type(module.weight).__name__ for module in pipeline.unet.modules() if isinstance(module, torch.nn.Linear)}
    assert any("Int8" in kind or "Quantized" in kind for kind in kinds)
    found = image(pipeline)
    assert not np.array_equal(found, base) and np.abs(found - base).max() < 0.1


def test_stock_features():
    pipeline = student()
    base = image(pipeline)
    # several images, one generator for each
    two = pipeline("a cat", num_images_per_prompt=2, generator=[seeded(0), seeded(1)], output_type="np").images
    assert np.allclose(two[0], base[0], atol=1e-5) and not np.allclose(two[1], base[0], atol=1e-3)
    # embeddings instead of prompts
    embeddings, _ = pipeline.encode_prompt("a cat", "cpu", 1, False)
    assert np.array_equal(image(pipeline, None, prompt_embeds=embeddings), base)

    def zero(pipe, step, timestep, tensors):
        assert int(timestep) == 999
        return {"latents": torch.zeros_like(tensors["latents"])}

    latents = pipeline("a cat", output_type="latent", callback_on_step_end=zero).images
    assert latents.abs().max() == 0
    # a small decoder
    tiny = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
    )
    pipeline.vae = tiny.eval()
    assert image(pipeline).shape == (1, 16, 16, 3)


def test_lora_weights_load_and_fuse(tmp_path):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline, other = student(), tiny_pipeline("sd")
    base = image(pipeline)
    other.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = get_peft_model_state_dict(other.unet)
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    pipeline.load_lora_weights(tmp_path)
    changed = image(pipeline)
    assert not np.allclose(changed, base, atol=1e-4)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    assert np.allclose(image(pipeline), changed, atol=1e-4)


def test_image_to_image_with_a_few_step_student():
    pipeline = student(timesteps=FOUR)
    calls = []
    pipeline.unet.register_forward_hook(lambda *_: calls.append(1))
    assert len(image(pipeline)) == 1 and len(calls) == 4
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipeline)
    other.set_progress_bar_config(disable=True)
    calls.clear()
    start = torch.rand(1, 3, 16, 16, generator=seeded())
    settings = {"strength": 0.5, "num_inference_steps": 4, "guidance_scale": 1.0, "generator": seeded()}
    result = other("a cat", image=start, output_type="np", **settings).images
    assert len(calls) == 2 and np.isfinite(result).all()
    wide = torch.rand(1, 3, 16, 32, generator=seeded())
    assert other("a cat", image=wide, output_type="np", **settings).images.shape == (1, 16, 32, 3)


@pytest.mark.parametrize(
    "family, kind", [("sd3", diffusers.StableDiffusion3Img2ImgPipeline), ("flux", diffusers.FluxImg2ImgPipeline)]
)
def test_image_to_image_with_a_few_step_flow_student(family, kind):
    pipeline = student(family, [1000.0, 750.0, 500.0, 250.0])
    calls = []
    pipeline.transformer.register_forward_hook(lambda *_: calls.append(1))
    other = kind.from_pipe(pipeline)
    other.set_progress_bar_config(disable=True)
    start = torch.rand(1, 3, 16, 16, generator=seeded())
    settings = {"strength": 0.5, "num_inference_steps": 4, "guidance_scale": 1.0, "generator": seeded()} | SIZE
    result = other("a cat", image=start, output_type="np", **settings).images
    assert len(calls) == 2 and np.isfinite(result).all()


def test_compiled_without_graph_breaks():
    pipeline = student()
    before = image(pipeline)
    pipeline.unet.compile(backend="eager", fullgraph=True)
    assert np.allclose(image(pipeline), before, atol=1e-5)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_few_step_flow_students_repeat_with_their_generator(family):
    pipeline = student(family, [1000.0, 750.0, 500.0])
    first, second = image(pipeline, **SIZE), image(pipeline, **SIZE)
    assert np.array_equal(first, second) and pipeline.scheduler.generator is None
    assert not np.array_equal(first, pipeline("a cat", generator=seeded(1), output_type="np", **SIZE).images)


def test_distilled_solvers_and_compressed_models_come_through_the_same_door(tmp_path):
    pipeline = tiny_pipeline("sd")
    with pytest.raises(ValueError, match="`num_inference_steps` must be given for a model with a DDIMScheduler"):
        pipeline_text_to_image.OneStepStableDiffusionPipeline.of(pipeline)("a cat")
    scheduler = DistilledDDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    scheduler.set_timesteps(4)
    scheduler.add_table(4, scheduler.fingerprint() | {"lambdas": [0.0, 0.3, 0.2, 0.1], "guidance_scale": 5.0})
    pipeline.register_modules(scheduler=scheduler)
    pipeline.save_pretrained(tmp_path)
    ours = OneStepPipeline.from_pretrained(tmp_path)
    expected = image(pipeline, num_inference_steps=4, guidance_scale=5.0, negative_prompt="ugly")
    assert np.array_equal(image(ours, negative_prompt="ugly"), expected)
    with pytest.raises(ValueError, match=r"`guidance_scale` must be 5.0, which the solver was fitted to"):
        ours("a cat", guidance_scale=7.5)


SAMPLE = """
import hashlib, torch
{imports}
for name in ("stock", "ours"):
    pipe = {loader}.from_pretrained("user/" + name)
    image = pipe("a cat", generator=torch.Generator().manual_seed(0), output_type="np"{arguments}).images
    print(name, type(pipe).__name__, hashlib.sha256(image.tobytes()).hexdigest(), flush=True)
"""
OURS = {"imports": "from diffusers_onestep import OneStepPipeline", "loader": "OneStepPipeline", "arguments": ""}
ALONE = {"imports": "import diffusers", "loader": "diffusers.DiffusionPipeline"}
ALONE |= {"arguments": ", num_inference_steps=1, guidance_scale=1.0"}


def test_students_load_from_the_hub_in_a_fresh_process(tmp_path):
    """An SDXL student at t = 399 by our pipeline and by plain diffusers alone; a signal-free one, which no stock
    scheduler states, is refused there by name."""
    root = tmp_path / "hub" / "user"
    student("sdxl", [399]).save_pretrained(root / "stock")
    student("sd", [625], sigma=0.92856).save_pretrained(root / "ours")
    with LocalHub(tmp_path / "hub") as hub:
        environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1"}
        ours, alone = (
            subprocess.run(
                [sys.executable, "-c", SAMPLE.format(**how)],
                capture_output=True,
                text=True,
                env=environment | {"HF_HOME": str(tmp_path / how["loader"])},
                timeout=600,
            )
            for how in (OURS, ALONE)
        )
    assert ours.returncode == 0, ours.stderr[-2000:]
    (name, kind, digest), (_, other_kind, _) = (line.split() for line in ours.stdout.splitlines())
    assert (kind, other_kind) == ("OneStepStableDiffusionXLPipeline", "OneStepStableDiffusionPipeline")
    assert alone.stdout.splitlines() == [f"{name} StableDiffusionXLPipeline {digest}"], alone.stderr[-2000:]
    assert alone.returncode != 0 and "diffusers_onestep" in alone.stderr


def test_half_precision_files_are_loaded_as_float32(tmp_path):
    """transformers alone would take the dtype of the file, and networks of two dtypes do not fit together."""
    half = tiny_pipeline("sd").to(torch.float16)
    half.save_pretrained(tmp_path / "teacher")
    teacher = Teacher.from_pretrained(tmp_path / "teacher")
    made = Teacher(half).student_pipeline(half.unet, student_timesteps=[999], init_noise_sigma=1.0)
    made.save_pretrained(tmp_path / "student")
    student = OneStepPipeline.from_pretrained(tmp_path / "student")
    for pipeline in (teacher.pipeline, student):
        parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
        assert {p.dtype for part in parts for p in part.parameters()} == {torch.float32}
        pipeline("a cat", num_inference_steps=1, height=16, width=16)
    given = OneStepPipeline.from_pretrained(tmp_path / "student", dtype=torch.float16)
    assert given.unet.dtype == given.text_encoder.dtype == torch.float16
