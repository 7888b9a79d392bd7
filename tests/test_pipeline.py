import json
import sys

import numpy as np
import pytest
import torch
from conftest import run, tiny_unet
from diffusers import (
    ConsistencyModelPipeline,
    DDPMParallelScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DiTTransformer2DModel,
    EDMEulerScheduler,
    LCMScheduler,
)
from peft import LoraConfig

from diffusers_onestep import DMD, PID, EDMUNet2DModel, OneStepPipeline, OneStepScheduler, SiD, SpaceToDepthUNet2DModel
from diffusers_onestep.arguments import TrainArguments
from diffusers_onestep.hooks import student_hooks
from diffusers_onestep.repository import write_repository
from diffusers_onestep.schedulers import student_scheduler
from diffusers_onestep.teacher import Teacher

NAMES = {0: "Shirt", 1: "Bag", 2: "Ankle boot"}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def student():
    scheduler = student_scheduler(DDPMScheduler(), "epsilon", [440], 0.93)
    pipeline = OneStepPipeline(tiny_unet(classes=3), scheduler, NAMES)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_one_network_call_and_the_training_forward(student):
    calls = []
    student.unet.register_forward_hook(lambda *_: calls.append(1))
    noise = torch.randn(3, 1, 16, 16)
    labels = torch.tensor([0, 1, 2])
    images = student(latents=noise, class_labels=labels, output_type="latent").images
    assert len(calls) == 1
    teacher = Teacher(ConsistencyModelPipeline(student.unet, DDPMScheduler()))
    x_t = 0.93 * noise
    torch.testing.assert_close(images, teacher.denoiser(x_t, torch.full((3,), 440), {"class_labels": labels}))


def test_labels_by_id_and_name_and_number_of_images(student):
    by_name = student(class_labels=["bag", "Ankle boot"], generator=seeded(), output_type="np").images
    by_id = student(class_labels=[1, 2], generator=seeded(), output_type="np").images
    assert by_name.shape == (2, 16, 16, 1) and np.array_equal(by_name, by_id)
    assert len(student(class_labels=["bag", 2], num_images_per_prompt=3).images) == 6
    assert len(student(4, class_labels="bag").images) == 4
    for labels in (range(1, 3), np.array([1, 2]), torch.tensor([1, 2])):
        assert np.array_equal(student(class_labels=labels, generator=seeded(), output_type="np").images, by_id)
    for label in (np.int64(2), torch.tensor(2)):
        assert len(student(class_labels=label).images) == 1
    assert student().images[0].size == (16, 16)
    first, second = (student(2, generator=seeded(), output_type="np").images for _ in range(2))
    assert np.array_equal(first, second)


def test_one_generator_per_image(student):
    whole = student(2, class_labels=1, generator=[seeded(0), seeded(1)], output_type="latent").images
    alone = student(1, class_labels=1, generator=seeded(1), output_type="latent").images
    torch.testing.assert_close(whole[1:], alone)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_inference_steps": 4}, r"`num_inference_steps` must be 1, .* but is 4"),
        ({"class_labels": "Sock"}, r"`class_labels` must be 0..2 or one of .*'Bag'.* but is 'Sock'"),
        ({"class_labels": 3}, r"`class_labels` must be 0..2 .* but is 3"),
        ({"class_labels": [1.7]}, r"`class_labels` must be 0..2 .* but is 1.7"),
        ({"class_labels": -1}, r"`class_labels` must be 0..2 .* but is -1"),
        ({"guidance_scale": 7.5}, r"`guidance_scale` must be 1.0 .* but is 7.5"),
        ({"batch_size": 3, "class_labels": [0, 1]}, r"`class_labels` must be one label or as many as .* \(3\)"),
        ({"batch_size": 2, "generator": [torch.Generator()] * 3}, r"`generator` must be one generator or a list of 2"),
        ({"batch_size": 2, "latents": torch.zeros(2, 3, 16, 16)}, r"`latents` must have shape \(2, 1, 16, 16\)"),
        ({"batch_size": 0}, r"`batch_size` must be at least 1, but is 0"),
        ({"callback_on_step_end_tensor_inputs": ["x"]}, r"`callback_on_step_end_tensor_inputs` must be of"),
    ],
)
def test_bad_calls_name_argument_allowed_and_given(student, arguments, message):
    with pytest.raises(ValueError, match=message):
        student(**arguments)


def test_a_many_step_model_must_be_told_its_steps(unet):
    pipeline = OneStepPipeline(unet, DDPMScheduler())
    with pytest.raises(ValueError, match=r"`num_inference_steps` must be given for a model with a DDPMScheduler"):
        pipeline()
    assert pipeline(num_inference_steps=2).images[0].size == (16, 16)


def test_a_stock_lcm_scheduler_takes_one_step_unless_told_otherwise(unet):
    """As the example of a student that plain diffusers can state: truncated betas, the class's own 50."""
    truncated = {"num_train_timesteps": 400, "trained_betas": DDPMScheduler().betas[:400].tolist()}
    scheduler = LCMScheduler(**truncated, original_inference_steps=50, clip_sample=False)
    pipeline, calls = OneStepPipeline(unet, scheduler), []
    unet.register_forward_hook(lambda *_: calls.append(1))
    noise = torch.randn(1, 1, 16, 16)
    images = pipeline(latents=noise, output_type="latent").images
    teacher = Teacher(ConsistencyModelPipeline(unet, DDPMScheduler()))
    assert len(calls) == 1
    torch.testing.assert_close(images, teacher.denoiser(noise, torch.tensor([399])), rtol=1e-4, atol=1e-4)
    pipeline(num_inference_steps=4)
    assert len(calls) == 1 + 1 + 4


def test_labels_on_an_unconditional_student_are_refused(unet):
    pipeline = OneStepPipeline(unet, OneStepScheduler(student_timesteps=[999]))
    with pytest.raises(ValueError, match=r"`class_labels` must be None"):
        pipeline(class_labels=1)


def test_callback_sees_and_changes_the_latents(student):
    def zero(pipeline, step, timestep, tensors):
        assert step == 0 and int(timestep) == 440
        return {"latents": torch.zeros_like(tensors["latents"])}

    assert student(output_type="latent", callback_on_step_end=zero).images.abs().max() == 0


def test_callback_knows_the_last_step(unet):
    seen = []

    def zero_at_the_end(pipeline, step, timestep, tensors):
        seen.append(step)
        return {"latents": tensors["latents"] * (step < pipeline.num_timesteps - 1)}

    scheduler = student_scheduler(DDPMScheduler(), "epsilon", [999, 600, 300], 1.0)
    images = OneStepPipeline(unet, scheduler)(output_type="latent", callback_on_step_end=zero_at_the_end).images
    assert seen == [0, 1, 2] and images.abs().max() == 0


@pytest.mark.parametrize("sigma, library", [(1.0, "diffusers"), (0.93, "diffusers_onestep")])
def test_saved_student_gives_the_same_image_in_both_pipelines(tmp_path, sigma, library):
    scheduler = student_scheduler(DDPMScheduler(), "epsilon", [440], sigma)
    pipeline = OneStepPipeline(tiny_unet(classes=3), scheduler, NAMES)
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "ConsistencyModelPipeline"
    assert index["scheduler"][0] == library and index["unet"] == ["diffusers", "UNet2DModel"]
    ours = OneStepPipeline.from_pretrained(tmp_path)
    stock = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(stock) is ConsistencyModelPipeline
    arguments = {"class_labels": [2, 1], "output_type": "np"}
    expected = pipeline(2, generator=seeded(), **arguments).images
    assert np.array_equal(ours(2, generator=seeded(), **arguments).images, expected)
    assert np.array_equal(stock(2, generator=seeded(), **arguments).images, expected)
    assert ours(class_labels="bag").images


@pytest.mark.parametrize("kind", ["unet", "edm", "dit"])
@pytest.mark.parametrize("method", [SiD, DMD, PID])
def test_a_student_of_a_teacher_with_learned_variance_has_none(tmp_path, method, kind):
    torch.manual_seed(0)
    network = {
        "unet": lambda: tiny_unet(classes=3, channels=3, out_channels=6),
        "edm": lambda: EDMUNet2DModel(8, out_channels=6, model_channels=8, channel_mult=(1, 1), num_class_embeds=3),
        "dit": lambda: DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8, patch_size=2, in_channels=3,
            out_channels=6, num_embeds_ada_norm=3, norm_num_groups=1,
        ),
    }[kind]()  # fmt: skip
    torch.nn.init.normal_(list(network.parameters())[-1])  # no head of zeros
    teacher = Teacher(OneStepPipeline(network.eval(), DDPMScheduler(variance_type="learned_range")))
    options = {"distance": "l2", "num_points": 4} if method is PID else {}
    distiller = method(teacher, **options)
    state = torch.get_rng_state()
    pipeline = teacher.student_pipeline(distiller.student.network.eval(), **distiller.student_settings)
    assert torch.equal(torch.get_rng_state(), state)
    assert pipeline.unet.config.out_channels == 3 and distiller.student.network.config.out_channels == 6
    pipeline.save_pretrained(tmp_path)
    size = network.config.sample_size
    noise, labels = torch.randn(2, 3, size, size), torch.tensor([0, 2])
    expected = distiller.sample(noise, {"class_labels": labels})
    loaded = OneStepPipeline.from_pretrained(tmp_path)
    images = loaded(latents=noise, class_labels=labels, output_type="latent").images
    tolerance = {"rtol": 1e-4, "atol": 1e-5 * expected.abs().max().item()}  # DMD's start divides by a small alpha
    torch.testing.assert_close(images, expected, **tolerance)
    # a whole network in a student's pipeline, which a distilled solver's is
    whole = OneStepPipeline(distiller.student.network, pipeline.scheduler)
    images = whole(latents=noise, class_labels=labels, output_type="latent").images
    torch.testing.assert_close(images, expected, **tolerance)


def test_adapters_on_a_teacher_with_learned_variance_make_a_student_without(tmp_path):
    teacher = Teacher(OneStepPipeline(tiny_unet(channels=3, out_channels=6), DDPMScheduler()))
    distiller = SiD(teacher, lora=LoraConfig(r=2, target_modules=["conv1"]))
    save, _ = student_hooks(distiller, TrainArguments(output_dir=str(tmp_path)))
    save(tmp_path)
    assert OneStepPipeline.from_pretrained(tmp_path).unet.config.out_channels == 3


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDPMParallelScheduler])
def test_schedulers_that_learn_the_variance_are_given_it(scheduler):
    whole = OneStepPipeline(tiny_unet(channels=3, out_channels=6), scheduler(variance_type="learned_range"))
    assert whole(2, num_inference_steps=2, output_type="latent").images.shape == (2, 3, 16, 16)


def test_few_step_student_samples_as_in_training():
    teacher = Teacher(ConsistencyModelPipeline(tiny_unet(), DDPMScheduler()))
    distiller = DMD(teacher, student_timesteps=[999, 499])
    pipeline = teacher.student_pipeline(distiller.student.network.eval(), **distiller.student_settings)
    noise = torch.randn(2, 1, 16, 16)
    images = pipeline(latents=noise, generator=seeded(), output_type="latent").images
    torch.testing.assert_close(distiller.sample(noise, {}, seeded()), images, rtol=1e-3, atol=1e-3)


def test_few_step_student_in_both_pipelines(tmp_path):
    timesteps = [999, 749, 499, 249]
    OneStepPipeline(tiny_unet(), student_scheduler(DDPMScheduler(), "epsilon", timesteps, 1.0)).save_pretrained(
        tmp_path
    )
    ours, stock = OneStepPipeline.from_pretrained(tmp_path), DiffusionPipeline.from_pretrained(tmp_path)
    calls = []
    ours.unet.register_forward_hook(lambda *_: calls.append(1))
    images = ours(2, generator=seeded(), output_type="np").images
    assert len(calls) == 4
    assert np.array_equal(stock(2, num_inference_steps=4, generator=seeded(), output_type="np").images, images)


def test_plain_diffusers_loads_a_stock_student_and_refuses_ours(tmp_path):
    """In a process that never imports this package."""
    for sigma, name in ((1.0, "stock"), (0.93, "ours")):
        scheduler = student_scheduler(DDPMScheduler(), "epsilon", [440], sigma)
        OneStepPipeline(tiny_unet(), scheduler).save_pretrained(tmp_path / name)
    code = "import sys; from diffusers import DiffusionPipeline as D; D.from_pretrained(sys.argv[1])(1)"
    run([sys.executable, "-c", code, str(tmp_path / "stock")])
    assert "diffusers_onestep" in run([sys.executable, "-c", code, str(tmp_path / "ours")], expected=1).stderr


def test_edm_student_round_trip(tmp_path):
    scheduler = student_scheduler(EDMEulerScheduler(), "edm", [0.229], 2.5)
    pipeline = OneStepPipeline(tiny_unet(), scheduler)
    pipeline.save_pretrained(tmp_path)
    stock = DiffusionPipeline.from_pretrained(tmp_path)
    expected = pipeline(2, generator=seeded(), output_type="np").images
    assert np.array_equal(stock(2, generator=seeded(), output_type="np").images, expected)


def test_repository_is_replaced_file_by_file(tmp_path, student):
    write_repository(student, tmp_path)
    (tmp_path / "README.md").write_text("mine")
    torch.nn.init.zeros_(student.unet.conv_out.weight)
    write_repository(student, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert not list(tmp_path.glob(".*"))
    assert OneStepPipeline.from_pretrained(tmp_path).unet.conv_out.weight.abs().max() == 0
    assert not list(tmp_path.rglob("*.bin"))


def test_another_kind_of_repository_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "MusicPipeline"}))
    with pytest.raises(ValueError, match=r"must name a pipeline of .* names 'MusicPipeline'"):
        OneStepPipeline.from_pretrained(tmp_path)


def test_space_to_depth_unet_is_a_pixel_model_outside(tmp_path):
    network = SpaceToDepthUNet2DModel(sample_size=16, num_class_embeds=4, id2label=NAMES).eval()
    assert Teacher(ConsistencyModelPipeline(network, DDPMScheduler())).sample_shape == (1, 16, 16)
    x, labels = torch.randn(2, 1, 16, 16), torch.tensor([0, 3])
    output = network(x, 5, class_labels=labels).sample
    assert output.shape == x.shape and network.unet.config.in_channels == 4
    network.save_pretrained(tmp_path)
    again = SpaceToDepthUNet2DModel.from_pretrained(tmp_path)
    torch.testing.assert_close(again(x, 5, class_labels=labels).sample, output)
    with pytest.raises(ValueError, match=r"`factor` must divide `sample_size`"):
        SpaceToDepthUNet2DModel(sample_size=15)


def test_teacher_knows_its_labels_and_null_label(teacher_folder):
    network = SpaceToDepthUNet2DModel(sample_size=16, num_class_embeds=4, id2label=NAMES)
    teacher = Teacher(ConsistencyModelPipeline(network, DDPMScheduler()))
    assert teacher.num_labels == 3 and teacher.null_label == 3
    assert teacher.encode(["bag", 0])["class_labels"].tolist() == [1, 0]
    assert teacher.null_condition(2)["class_labels"].tolist() == [3, 3]
    plain = Teacher.from_pretrained(teacher_folder, dtype=torch.bfloat16)
    assert plain.num_labels == 3 and plain.null_condition(2) == {}
    assert plain.denoiser.network.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in plain.denoiser.parameters())
    with pytest.raises(ValueError, match=r"`guidance_scale` must be 1.0"):
        plain.guided(2.0)
    with pytest.raises(ValueError, match=r"`class_labels` must be 0..2"):
        plain.encode([3])
