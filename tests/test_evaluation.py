import dataclasses
import json
import math
import re
import tomllib
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import ROOT, run, run_on_two_ranks, run_script, script, tiny_unet, training_module
from datasets import Dataset
from diffusers import (
    AutoencoderKL,
    ConsistencyModelPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from families import tiny_pipeline
from PIL import Image
from test_extractors import tiny_clip
from transformers import CLIPTextConfig, CLIPTextModel

from diffusers_onestep import Metrics, OneStepPipeline, Teacher, evaluate
from diffusers_onestep.arguments import parse_args
from diffusers_onestep.evaluation import METRICS, generate, images_per_second, measure
from diffusers_onestep.features import FashionCNN, load_extractor
from diffusers_onestep.pictures import picture
from diffusers_onestep.reference import Reference
from diffusers_onestep.reports import Score, comparison_grid, markdown_table, quality_plot, write_metrics
from diffusers_onestep.sampler import (
    Noises,
    batch_size_for,
    between_steps,
    evaluations_of,
    inputs_of,
    sampler,
    shared_inputs,
)
from diffusers_onestep.schedulers import solver_for, student_scheduler

OF_PIXELS = [metric for metric in METRICS if metric not in ("clip_score", "retrieval")]
NUMBERS = ["FD", "KID", "precision", "recall", "density", "coverage", "IS", "diversity", "agreement"]


def test_processes_share_the_sampling_and_find_the_same_numbers(tmp_path):
    flags = ["--model", "fashion32-onestep", "--pretrained_teacher_model", "fashion32", "--teacher_steps", "2"]
    Reference.load(None, FashionCNN.from_shipped()).save(tmp_path / "small.safetensors", features=200)
    flags += ["--num_samples", "60", "--batch_size", "20", "--metrics", *OF_PIXELS]
    flags += ["--reference", str(tmp_path / "small.safetensors")]
    results = []
    for name, start in (("one", run), ("two", run_on_two_ranks)):
        command = script("evaluate.py", *flags, "--output_dir", tmp_path / name)
        start(command, ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
        results.append(json.loads((tmp_path / name / "metrics.json").read_text()))
        assert all((tmp_path / name / picture).is_file() for picture in ("quality.png", "samples.png"))
    teacher = Teacher.from_pretrained("fashion32")
    noise, cond = inputs_of(teacher, 20, 0, None)
    above = sampler(teacher, num_inference_steps=2)(noise[:], cond, None)[:10]
    with Image.open(tmp_path / "one" / "samples.png") as grid:
        assert np.abs(np.asarray(grid)[:64:2, ::2] - np.hstack(above[:, 0]).astype(float)).max() <= 1
    assert "2 processes" in results[1]["hardware"] and "1 processes" in results[0]["hardware"]
    rows = [result["results"] for result in results]
    assert [row["model"] for row in rows[0]] == ["fashion32-onestep", "teacher"]
    for one, two in zip(*rows, strict=True):
        assert list(one["scores"]) == [f"{name}-fashion" for name in NUMBERS]
        for name, score in one["scores"].items():
            other = two["scores"][name]
            assert other["value"] == pytest.approx(score["value"], rel=1e-6), name
            if score["error"] is None:  # there are too few samples for one
                assert other["error"] is None
            else:
                assert other["error"] == pytest.approx(score["error"], rel=1e-6), name
            assert score["num_samples"] == 60 and len(score["weights"]) == 16 and score["extractor"] == "fashion"
    # FD uses the moments of all real images, what follows their features, of which the file has 200
    compared = {name: score["num_reference"] for name, score in rows[0][0]["scores"].items()}
    assert list(compared.values()) == [10_000, *[200] * 5, None, None, None]
    assert rows[0][1]["scores"]["agreement-fashion"]["value"] == 1  # the teacher with itself
    assert results[0]["precision"] == "no"
    assert results[0]["seed"] == 0 and {"torch", "diffusers", "python"} <= results[0]["versions"].keys()


@pytest.mark.parametrize("evaluations", [[1], [1, 2]])
def test_quality_is_drawn_of_any_number_of_rows(evaluations, tmp_path):
    rows = [Metrics("m", nfe, "FD-fashion", 2.0 / nfe, 10, 1.0, 0) for nfe in evaluations]
    quality_plot(rows, tmp_path / "quality.png")
    assert Image.open(tmp_path / "quality.png").size == (720, 480)


def test_a_student_keeps_its_own_scheduler():
    pipe = OneStepPipeline.from_pretrained("fashion32-onestep")
    with pytest.raises(ValueError, match="`scheduler` must be None for a student"):
        evaluate(pipe, scheduler=DDIMScheduler(), num_samples=4)


def test_models_of_several_steps_are_measured_at_the_fitted_ones(tmp_path):
    scheduler = solver_for("heun", Teacher.from_pretrained("fashion32").scheduler)
    scheduler.set_timesteps(2)
    scheduler.add_table(2, scheduler.fingerprint() | {"lambdas": [0.0, -0.5, 0.0]})
    pipe = OneStepPipeline.from_pretrained("fashion32", scheduler=scheduler)
    pipe.save_pretrained(tmp_path / "model")
    flags = ["--model", tmp_path / "model", "--num_samples", 10, "--batch_size", 10, "--output_dir", tmp_path / "out"]
    run(script("evaluate.py", *flags))
    (row,) = json.loads((tmp_path / "out" / "metrics.json").read_text())["results"]
    assert row["resolution"] == [32, 32]
    assert row["nfe"] == 3 and row["error"] > 0 and len(row["extractor"]) == 16


def test_errors_cover_what_another_seed_finds():
    """Two draws of the same student differ by a few of the errors that were stated for them."""
    pipe, network = OneStepPipeline.from_pretrained("fashion32-onestep"), FashionCNN.from_shipped()
    reference = Reference.load(None, network)
    reference = dataclasses.replace(reference, features=reference.features[:500])
    draws = [generate(pipe, network, num_samples=300, batch_size=100, seed=seed) for seed in (0, 1)]
    metrics = [metric for metric in OF_PIXELS if metric != "agreement"]
    first, second = (measure(samples, reference, metrics) for samples in draws)
    for name, score in first.scores.items():
        error = (score.error**2 + second.scores[name].error ** 2) ** 0.5
        assert 0 < error < abs(score.value) and abs(score.value - second.scores[name].value) < 5 * error, name
    # in the order of the noises: it agrees with itself, and other noises give other images
    same = measure(draws[0], None, ["agreement"], draws[0]), measure(draws[0], None, ["agreement"], draws[1])
    assert same[0].value == 1 and abs(same[1].value) < 0.2
    assert draws[0].latency > draws[0].latency_error > 0 and draws[0].images_per_second > draws[0].speed_error > 0


def test_a_speed_has_the_standard_error_of_its_batches():
    speed, error = images_per_second([(4, 1.0), (4, 3.0), (4, 5.0)])
    assert speed == pytest.approx(4 / 3)
    assert error == pytest.approx(speed * 2 / 3**0.5 / 3)  # relative, that of the seconds' mean: 3 +- 2 / sqrt(3)
    assert images_per_second([(4, 2.0), (2, 1.0)]) == (2, 0)  # a last batch may be smaller
    one, unknown = images_per_second([(4, 2.0)])
    assert one == 2 and math.isnan(unknown)
    row = Metrics("m", 1, "FD-fashion", 0.85, 10, 1234.5, 0, latency=1.5, latency_error=0.02, speed_error=23.0)
    assert markdown_table([row]).splitlines()[-1] == "| m | 1 | 0.850 | 1500 ± 20 | 1234 ± 23 |"
    row = dataclasses.replace(row, latency_error=None, speed_error=None)
    assert markdown_table([row]).splitlines()[-1] == "| m | 1 | 0.850 | 1,500 | 1,234 |"


def test_colour_images_of_another_size_with_general_features(tmp_path):
    pipe = ConsistencyModelPipeline(tiny_unet(classes=2, size=24, channels=3), DDPMScheduler())
    pipe.save_pretrained(tmp_path)
    teacher, network = Teacher.from_pretrained(tmp_path), load_extractor("effnet-lite0")
    images = torch.randint(0, 256, (12, 3, 24, 24), dtype=torch.uint8)
    Reference.from_images(images, network).save(tmp_path / "r.safetensors")
    row = evaluate(
        teacher, num_inference_steps=2, guidance_scale=1.0, num_samples=8, batch_size=4, extractor=network,
        reference=tmp_path / "r.safetensors", metrics=("kid", "inception_score"),
    )  # fmt: skip
    assert row.nfe == 2 and list(row.scores) == ["KID-EffNetLite0@64", "IS-EffNetLite0@64"]
    assert row.metric == "KID-EffNetLite0@64" and row.num_reference == 12
    assert row.error is None and row.scores["IS-EffNetLite0@64"].error is None  # of eight samples
    assert row.scores["IS-EffNetLite0@64"].value >= 1
    with pytest.raises(ValueError, match=r"`pixels` must be uint8 .* for fashion"):
        evaluate(teacher, num_inference_steps=1, num_samples=4)


def tiny_stable_diffusion(folder):
    """Random Stable Diffusion with a tiny CLIP beside it; both share a tokenizer."""
    tiny_clip(folder / "clip")
    clip = load_extractor("clip", str(folder / "clip"))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    text = CLIPTextModel(CLIPTextConfig(vocab_size=len(clip.tokenizer), max_position_embeddings=77, **sizes)).eval()
    vae = AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4, sample_size=32)  # fmt: skip
    unet = UNet2DConditionModel(sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=2)  # fmt: skip
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, timestep_spacing="trailing")
    return StableDiffusionPipeline(vae.eval(), text, clip.tokenizer, unet.eval(), scheduler, None, None,
        requires_safety_checker=False), clip  # fmt: skip


def test_text_to_image_models_are_measured_by_prompts(tmp_path):
    pipe, clip = tiny_stable_diffusion(tmp_path)
    prompts = ["a cat", "a dog", "snow"]
    asked = {"prompts": prompts, "num_inference_steps": 2, "num_samples": 4, "batch_size": 3, "clip_model": clip}
    metrics = ("clip_score", "diversity", "agreement")
    target = generate(
        pipe, clip, num_inference_steps=2, guidance_scale=1.0, num_samples=4, batch_size=4, prompts=prompts
    )
    row = evaluate(Teacher(pipe), **asked, metrics=metrics, extractor=clip, teacher=target)
    assert row.nfe == 2 and list(row.scores) == ["CLIP-score-clip@32", "diversity-clip@32", "agreement-clip@32"]
    assert row.scores["agreement-clip@32"].value == pytest.approx(1, abs=1e-4)  # the same images
    assert evaluate(pipe, **asked, metrics=("clip_score",), extractor=clip, guidance_scale=3.0).nfe == 4  # both halves
    with pytest.raises(ValueError, match="`prompts` must be given for a text-to-image model"):
        evaluate(pipe, num_samples=2, extractor=clip, metrics=("diversity",))
    with pytest.raises(ValueError, match="`prompts` must be None for a pixel model"):
        evaluate(OneStepPipeline.from_pretrained("fashion32-onestep"), num_samples=2, prompts=prompts)


def test_no_safety_checker_blackens_what_is_measured(tmp_path):
    pipe, clip = tiny_stable_diffusion(tmp_path)
    asked = {"prompts": ["a cat"], "num_inference_steps": 1, "num_samples": 2}
    before = generate(pipe, clip, **asked).features
    pipe.register_modules(safety_checker=pipe.text_encoder)  # any module
    pipe.run_safety_checker = lambda image, device, dtype: (
        (image, None) if pipe.safety_checker is None else (torch.zeros_like(image), [True])
    )
    assert torch.equal(generate(pipe, clip, **asked).features, before) and pipe.safety_checker is not None


def test_noise_between_steps_is_not_that_of_the_start():
    pipe = OneStepPipeline(tiny_unet(), student_scheduler(DDPMScheduler(), "epsilon", [999, 749, 499], 1.0))
    pipe.set_progress_bar_config(disable=True)
    added, add = [], pipe.scheduler.step

    def step(output, t, sample, generator=None, **settings):
        result = add(output, t, sample, generator=generator, **settings)
        alpha = pipe.scheduler.alphas_cumprod[749] if len(added) == 0 else pipe.scheduler.alphas_cumprod[499]
        prev_sample, x0 = result
        added.append((prev_sample - alpha.sqrt() * x0) / (1 - alpha).sqrt())
        return result

    pipe.scheduler.step = step
    noise, cond = inputs_of(pipe, 4, 0, None)
    noise = noise[:]
    sampler(pipe)(noise, cond, between_steps(0, 0))
    assert all((a - noise).abs().mean() > 0.5 for a in added[:2]) and len(added) == 3


@pytest.mark.parametrize("name, nfe", [("fashion32", 3), ("fashion-edm", 5)])
def test_a_model_of_many_steps_is_sampled_as_its_teacher_is(name, nfe):
    """By DDIM, or Heun's method, from the same noises: a model agrees with itself."""
    settings = {"num_inference_steps": 3, "num_samples": 20}
    extractor = load_extractor("fashion")
    target = generate(Teacher.from_pretrained(name), extractor, **settings)
    row = evaluate(OneStepPipeline.from_pretrained(name), **settings, metrics=("agreement",), teacher=target)
    assert row.nfe == target.nfe == nfe
    assert row.scores["agreement-fashion"].value == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("family", ["flux", "pixart", "sana"])
def test_teachers_of_every_family_and_size_are_sampled_as_in_training(family):
    pipeline = tiny_pipeline(family)
    own = pipeline.scheduler
    if family == "pixart":  # by DDIM, as DDPM's noise is not the teacher's
        own = pipeline.scheduler = DDPMScheduler(clip_sample=False, timestep_spacing="trailing")
    teacher = Teacher(pipeline, resolution=64 if family == "sana" else 32, embedded_guidance=2.5)
    prompts = ["a cat", "snow"]
    noise, cond = inputs_of(teacher, 2, 0, prompts)
    noise = noise[:]
    for guidance_scale in (1.0, 3.0):
        settings = {"num_inference_steps": 2, "guidance_scale": guidance_scale}
        expected = picture(teacher.decode(teacher.sample(noise, teacher.encode(prompts), **settings)))
        found = sampler(teacher, **settings)(noise, cond, None)
        assert found.shape == expected.shape and (found.int() - expected.int()).abs().max() <= 1
        assert teacher.pipeline.scheduler is own
    network = teacher.denoiser.network
    student = teacher.student_pipeline(network, student_timesteps=[999], init_noise_sigma=1.0)
    assert torch.equal(inputs_of(student, 2, 0, prompts)[0][:], noise)
    with evaluations_of(student.transformer) as seen:
        assert sampler(student)(noise, cond, None).shape == expected.shape
    assert seen == [2]


def test_models_are_measured_at_another_size_and_embedded_guidance(tmp_path, monkeypatch):
    """By the script: the teacher and a model of several steps get what is asked for; a student keeps its own."""
    pipeline = tiny_pipeline("flux")
    teacher = Teacher(pipeline, resolution=16, embedded_guidance=2.5)
    teacher.compressed_pipeline(pipeline.transformer).save_pretrained(tmp_path / "model")
    student = teacher.student_pipeline(pipeline.transformer, student_timesteps=[1000.0], init_noise_sigma=1.0)
    student.save_pretrained(tmp_path / "student")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    tiny_clip(tmp_path / "clip")
    seen, forward = set(), type(pipeline.transformer).forward

    def watched(self, hidden_states, *args, guidance, **kwargs):
        seen.update((hidden_states.shape[1], scale) for scale in guidance.tolist())
        return forward(self, hidden_states, *args, guidance=guidance, **kwargs)

    monkeypatch.setattr(type(pipeline.transformer), "forward", watched)
    flags = ["--pretrained_teacher_model", tmp_path / "model", "--teacher_steps", 2, "--num_inference_steps", 2]
    flags += ["--prompts", tmp_path / "prompts.txt", "--metrics", "clip_score", "--clip_model", tmp_path / "clip"]
    flags += ["--extractor", "clip", "--extractor_weights", tmp_path / "clip", "--output_dir", tmp_path / "out"]
    flags += ["--num_samples", 2, "--batch_size", 1, "--resolution", 32]
    run_script("evaluate", *flags, "--model", tmp_path / "model", "--embedded_guidance", 1.5)
    assert seen == {(8 * 8, 1.5)}  # tokens of 2 x 2 latents of 2 x 2 pixels
    seen.clear()
    run_script("evaluate", *flags, "--model", tmp_path / "student")
    assert seen == {(8 * 8, 2.5), (8 * 8, 3.5)}  # the student's own, and the teacher's default
    for changes, message in (
        (["--model", tmp_path / "student", "--embedded_guidance", 1.5], "`guidance_scale` must be 2.5"),
        (["--model", "fashion32-onestep", "--embedded_guidance", 1.5], "`embedded_guidance` must be None"),
        (["--model", "fashion32-onestep"], "`resolution` must be None for a OneStepPipeline"),
        (["--model", tmp_path / "model", "--resolution", 30], "`resolution` must be a multiple of 4, but is 30"),
    ):
        with pytest.raises(ValueError, match=message):
            run_script("evaluate", *flags, *changes)


def test_captioned_images_give_prompts_and_what_they_retrieve(tmp_path, monkeypatch):
    """By the script, at several guidance scales, in bfloat16: every network call is cast, and gives float32; the real
    images are of two sizes."""
    pipeline = tiny_pipeline("sd")
    pipeline.save_pretrained(tmp_path / "teacher")
    # the real images are the teacher's own, each beside the prompt that it was made of
    network, asked = load_extractor("effnet-lite0"), [f"drawing {letter}" for letter in "abcdefghijklmnopqrst"]
    teacher = Teacher.from_pretrained(tmp_path / "teacher", resolution=16)
    noise, cond = inputs_of(teacher, 20, 0, asked)
    drawn = sampler(teacher, num_inference_steps=1)(noise[:], cond, None)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in drawn]
    pictures[::2] = [picture.resize((32, 32)) for picture in pictures[::2]]
    for split, captions in (("train", ["a cat", "a dog"]), ("test", asked)):
        rows = Dataset.from_dict({"image": pictures[: len(captions)], "caption": captions})
        rows.to_parquet(str(tmp_path / "data" / f"{split}.parquet"))
    seen, forward = [], StableDiffusionPipeline.encode_prompt
    inside, convolve = set(), torch.nn.Conv2d.forward

    def watched(self, prompt, *args, **kwargs):
        seen.extend(prompt)
        return forward(self, prompt, *args, **kwargs)

    def watched_convolution(self, x):
        made = convolve(self, x)
        inside.add((made.dtype, torch.is_autocast_enabled("cpu")))
        return made

    monkeypatch.setattr(StableDiffusionPipeline, "encode_prompt", watched)
    monkeypatch.setattr(torch.nn.Conv2d, "forward", watched_convolution)
    flags = ["--pretrained_teacher_model", tmp_path / "teacher", "--teacher_steps", 1, "--guidance_scale", 1, 2]
    flags += ["--reference", tmp_path / "data", "--extractor", "effnet-lite0", "--num_samples", 20]
    flags += ["--reference_resolution", 16]
    flags += ["--resolution", 16, "--batch_size", 8, "--mixed_precision", "bf16", "--output_dir", tmp_path]
    run_script("evaluate", *flags, "--metrics", "retrieval", "diversity")
    assert seen[-20:] == asked  # of the split that is asked for, in the order of the noises
    assert (torch.bfloat16, True) in inside
    rows = json.loads((tmp_path / "metrics.json").read_text())["results"]
    assert [(row["model"], row["nfe"]) for row in rows] == [("teacher, guidance 1", 1), ("teacher, guidance 2", 2)]
    measured = (tmp_path / "metrics.json").read_text()
    assert json.loads(measured)["precision"] == "bf16"
    flags[flags.index("--num_samples") + 1] = 2
    run_script("evaluate", *flags, "--metrics", "retrieval")
    assert (tmp_path / "metrics-1.json").read_text() == measured != (tmp_path / "metrics.json").read_text()
    for row in rows:
        found = row["scores"]["recall-at-5-EffNetLite0@64"]
        assert row["value"] == found["value"] == 1.0  # every image finds itself
    reference = Reference.load(str(tmp_path / "data"), network, resolution=16)
    assert reference.source == "data, test, 16 x 16"
    settings = {"num_inference_steps": 1, "num_samples": 20, "batch_size": 8, "prompts": reference.captions}
    samples = generate(teacher, network, **settings)
    turned = [*asked[7:], *asked[:7]]
    assert measure(samples, reference, ["retrieval"]).value == 1
    for images, real in (
        (dataclasses.replace(samples, prompts=turned), reference),
        (samples, dataclasses.replace(reference, captions=turned)),
    ):
        assert measure(images, real, ["retrieval"]).value < 0.5  # 0.25 by chance
    with pytest.raises(ValueError, match="`metrics` must be without 'retrieval' unless models have prompts"):
        network = FashionCNN.from_shipped()
        pixels = generate(OneStepPipeline.from_pretrained("fashion32-onestep"), network, num_samples=4)
        measure(pixels, Reference.load(None, network), ["retrieval"])


def test_the_script_reads_prompts_as_training_does(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("café", encoding="latin-1")
    with pytest.raises(ValueError, match="`prompts` must be a UTF-8 file of one prompt a line"):
        run_script("evaluate", "--model", "emoji-sd-onestep", "--prompts", prompts, "--metrics", "diversity",
                   "--extractor", "effnet-lite0", "--output_dir", tmp_path)  # fmt: skip


def test_numbers_go_into_the_card_of_their_own_model_alone(tmp_path):
    flags = ["--output_dir", tmp_path, "--metrics", "diversity"]
    with pytest.raises(ValueError, match="`model` or `pretrained_teacher_model` must be given, but neither is"):
        run_script("evaluate", *flags)
    OneStepPipeline(tiny_unet(), student_scheduler(DDPMScheduler(), "epsilon", [440], 1.0)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`output_dir` must be the folder of 'fashion32-onestep', whose numbers"):
        run_script("evaluate", "--model", "fashion32-onestep", tmp_path, *flags)


def test_models_whose_images_the_extractor_does_not_take_are_refused_at_the_start(tmp_path):
    scheduler = student_scheduler(DDPMScheduler(), "epsilon", [440], 1.0)
    OneStepPipeline(tiny_unet(channels=3), scheduler).save_pretrained(tmp_path / "model")
    flags = ["--model", "fashion32-onestep", tmp_path / "model", "--output_dir", tmp_path, "--num_samples", 2]
    expected = r"must be one for images of shape \(3, 16, 16\), but 'fashion' takes \(1, 32, 32\) .*effnet-lite0"
    with pytest.raises(ValueError, match=f"`extractor` {expected}"):
        run_script("evaluate", *flags)
    with pytest.raises(ValueError, match=r"`pixels` must be uint8 \(N, 1, 32, 32\) for fashion"):
        FashionCNN.from_shipped()(torch.zeros(1, 4, 8, 8, dtype=torch.uint8))


def test_what_cannot_be_measured_is_refused():
    pipe, network = OneStepPipeline.from_pretrained("fashion32-onestep"), FashionCNN.from_shipped()
    with pytest.raises(ValueError, match=r"`metrics` must be some of \['fd', .*\], but are \['fid'\]"):
        evaluate(pipe, metrics=("fid",))
    samples = generate(pipe, network, num_samples=4)
    with pytest.raises(ValueError, match=r"`teacher` must be given for the metrics \['agreement'\]"):
        measure(samples, None, ["agreement"])
    with pytest.raises(ValueError, match=r"`reference` must be given for the metrics \['kid'\]"):
        measure(samples, None, ["kid"])
    moments_alone = dataclasses.replace(Reference.load(None, network), features=None)
    with pytest.raises(ValueError, match=r"`reference` must hold features for the metrics \['kid'\]"):
        measure(samples, moments_alone, ["fd", "kid"])
    with pytest.raises(ValueError, match="`metrics` must be without 'clip_score' for samples without prompts"):
        measure(samples, None, ["clip_score"])
    with pytest.raises(ValueError, match="`num_inference_steps` must be given for a model of many steps"):
        evaluate(Teacher.from_pretrained("fashion32"), num_samples=2)
    stock = DDPMPipeline(Teacher.from_pretrained("fashion32").denoiser.network, DDPMScheduler())
    with pytest.raises(ValueError, match=r"`pipeline` must be a .*, but is a DDPMPipeline: load it by `Teacher"):
        evaluate(stock, num_inference_steps=2, num_samples=2)


def test_what_cannot_be_measured_is_refused_before_anything_is_sampled(tmp_path, monkeypatch):
    module = training_module("evaluate")
    monkeypatch.setattr(module, "generate", lambda *args, **kwargs: pytest.fail("sampled"))
    network = FashionCNN.from_shipped()
    moments_alone = dataclasses.replace(Reference.load(None, network), features=None)
    moments_alone.save(tmp_path / "moments.safetensors")
    for size in (16, 24):
        pipeline = ConsistencyModelPipeline(tiny_unet(size=size, channels=3), DDPMScheduler())
        pipeline.save_pretrained(tmp_path / f"teacher{size}")
        scheduler = student_scheduler(DDPMScheduler(), "epsilon", student_timesteps=[999], init_noise_sigma=1.0)
        OneStepPipeline(pipeline.unet, scheduler).save_pretrained(tmp_path / f"student{size}")

    def refused(message, *flags):
        with pytest.raises(ValueError, match=message):
            arguments = [str(flag) for flag in (*flags, "--output_dir", tmp_path / "out", "--num_samples", 4)]
            module.main(parse_args(module.EvaluateArguments, arguments))

    student = ["--model", tmp_path / "student16", "--extractor", "effnet-lite0", "--metrics", "diversity"]
    refused(
        r"`resolution` must be one at which all models have the same noises, but the teacher's are of shape \(3, 24",
        *student, "--pretrained_teacher_model", tmp_path / "teacher24",
    )  # fmt: skip
    refused("`metrics` must be without 'clip_score' for models without", *student, "clip_score")
    tiny_clip(tmp_path / "clip")
    logits = ["--extractor", "clip", "--extractor_weights", tmp_path / "clip", "--metrics", "inception_score"]
    refused("`metrics` must be without 'inception_score' for ", "--model", tmp_path / "student16", *logits)
    refused("`num_inference_steps` must be given", "--model", "fashion32", "--pretrained_teacher_model", "fashion32")
    flags = ["--model", "fashion32-onestep", "--reference", tmp_path / "moments.safetensors", "--metrics", "kid"]
    refused(r"`reference` must hold features for the metrics \['kid'\]", *flags)


def test_no_more_samples_at_a_time_than_asked_for_and_no_two_models_on_the_device(tmp_path, monkeypatch):
    sizes, there, forward = [], [], UNet2DModel.forward
    module = training_module("evaluate")

    def noting(network, sample, *args, **kwargs):
        sizes.append(len(sample))
        return forward(network, sample, *args, **kwargs)

    @contextmanager
    def on_device(model, device):
        there.append(model)
        assert len(there) == 1
        yield
        there.pop()

    monkeypatch.setattr(UNet2DModel, "forward", noting)
    monkeypatch.setattr(module, "on_device", on_device)
    flags = ["--model", "fashion32-onestep", "--pretrained_teacher_model", "fashion32", "--teacher_steps", "1"]
    flags += ["--num_samples", "6", "--batch_size", "3", "--metrics", "diversity", "--output_dir", str(tmp_path)]
    module.main(parse_args(module.EvaluateArguments, flags))
    assert max(sizes) == 3 and not there
    with Image.open(tmp_path / "samples.png") as grid:
        assert grid.size == (10 * 64, 4 * 64)


@pytest.mark.parametrize("side, number", [(32, 250), (64, 250), (256, 32), (512, 8), (1024, 2), (4096, 1)])
def test_large_images_are_sampled_fewer_at_a_time(side, number):
    assert batch_size_for((3, side, side)) == number


def test_an_evaluation_that_is_cut_off_leaves_its_rows(tmp_path, monkeypatch):
    module = training_module("evaluate")
    sampled = []

    def generate(*inputs, **settings):
        if len(sampled) == 1:
            raise MemoryError
        sampled.append(settings["name"])
        return original(*inputs, **settings)

    original = module.generate
    monkeypatch.setattr(module, "generate", generate)
    (tmp_path / "metrics.json").write_text("{}")
    flags = ["--model", "fashion32-onestep", "--pretrained_teacher_model", "fashion32", "--teacher_steps", "1"]
    flags += ["--num_samples", "6", "--metrics", "diversity", "--output_dir", str(tmp_path)]
    with pytest.raises(MemoryError):
        module.main(parse_args(module.EvaluateArguments, flags))
    (row,) = json.loads((tmp_path / "metrics.json").read_text())["results"]
    assert row["model"] == "teacher" and (tmp_path / "metrics-1.json").read_text() == "{}"


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 3), (1, 5, 7), (4, 8, 8)])
@pytest.mark.parametrize("number", [1, 15, 63, 65, 127, 130, 200])
def test_noises_in_parts_are_those_drawn_at_once(shape, number):
    noise = torch.randn(number, *shape, generator=torch.Generator().manual_seed(3))
    parts = Noises(shape, number, 3)
    for size in (7, 100):
        batches = torch.arange(number).split(size)
        assert all(torch.equal(parts[places], noise[places]) for places in [*batches[1::2], *batches[::2]])
    assert torch.equal(parts[:], noise) and torch.equal(parts[[number - 1, 0]], noise[[number - 1, 0]])


def test_of_many_noises_few_are_held(monkeypatch):
    drawn = []
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, **given: drawn.append(shape) or randn(*shape, **given))
    noise = Noises((2, 4, 4), 10_000, 0)
    for places in torch.arange(10_000).split(250)[1::2]:  # those of the second of two processes
        noise[places]
    assert max(shape[0] for shape in drawn) < 2 * Noises.PART and sum(shape[0] for shape in drawn) == 10_000


def test_with_fewer_samples_than_labels_they_are_of_all_kinds():
    _, cond = shared_inputs((1, 2, 2), 1000, 500, 0)
    assert cond["class_labels"].tolist() == list(range(0, 1000, 2))
    assert shared_inputs((1, 2, 2), 3, 5, 0)[1]["class_labels"].tolist() == [0, 1, 2, 0, 1]


def test_an_odd_number_of_pictures_keeps_the_teacher_above_the_student(tmp_path):
    def grey(value):
        return lambda noise, cond, generator: torch.full((len(noise), 1, 8, 8), value, dtype=torch.uint8)

    comparison_grid(grey(50), grey(200), Noises((1, 8, 8), 3, 0), {}, tmp_path / "grid.png")
    grid = np.array(Image.open(tmp_path / "grid.png").convert("L"))
    cells = grid.reshape(4, grid.shape[0] // 4, 2, -1)[:, 8, :, 8]
    assert cells.tolist() == [[50, 50], [200, 200], [50, 255], [200, 255]]


def test_files_of_an_earlier_version_still_read(tmp_path):
    """A row as it was written before there were several numbers of one model."""
    old = {"model": "m", "nfe": 1, "metric": "FD-fashion", "value": 0.85, "num_samples": 10, "images_per_second": 9.0}
    row = Metrics(**old, seed=0)
    assert markdown_table([row]).splitlines()[-1] == "| m | 1 | 0.850 | – | 9.00 |"
    write_metrics(tmp_path / "metrics.json", [row], command="here")
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["command"] == "here" and old.items() <= written["results"][0].items()
    row = Metrics(**old, seed=0, scores={"FD-fashion": Score(0.85, 0.04, 10, "fashion", "0123456789abcdef")})
    write_metrics(tmp_path / "metrics.json", [row], command="here")
    (read,) = json.loads((tmp_path / "metrics.json").read_text())["results"]
    assert Metrics(**read) == row and "0.850 ± 0.040" in markdown_table([Metrics(**read)])


def test_the_extra_for_evaluation_is_enough_for_it():
    """Of what `evaluate.py` imports besides the core: pictures by matplotlib, references by datasets."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.match(r"[\w-]+", line).group() for line in project["optional-dependencies"]["metrics"]}
    assert {"matplotlib", "datasets", "torch-fidelity", "efficientnet-lite-pytorch"} <= names
