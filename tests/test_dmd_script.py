"""`train_dmd.py` and `make_pairs.py`: what they make of their flags, in this process."""

import json
import shutil

import numpy as np
import pytest
from conftest import run_script, tiny_unet
from diffusers import (
    ConsistencyModelPipeline,
    DDPMParallelScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    LCMScheduler,
)

from diffusers_onestep import OneStepPipeline


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory):
    """An unconditional RGB teacher on disk, as google/ddpm-cifar10-32 is one."""
    folder = tmp_path_factory.mktemp("unconditional")
    DDPMPipeline(tiny_unet(channels=3), DDPMScheduler()).save_pretrained(folder)
    return folder


def images(path, shape=(6, 16, 16, 3), labels=3):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    names = np.array([str(label) for label in range(labels)])
    np.savez(path, images_train=pixels, labels_train=np.arange(len(pixels)) % labels, class_names=names)
    return path


def train(teacher, output, script="train_dmd", **settings):
    given = {"pretrained_teacher_model": teacher, "output_dir": output, "max_train_steps": 1, "train_batch_size": 2}
    given |= {"lr_warmup_steps": 0} | settings
    run_script(script, *(part for k, v in given.items() for part in (f"--{k}", v)))


def test_gan_of_an_unconditional_teacher_leaves_the_labels_out(unconditional, tmp_path):
    train(unconditional, tmp_path / "out", gan_weight=3e-3, dataset=images(tmp_path / "a.npz"))
    assert OneStepPipeline.from_pretrained(tmp_path / "out")(batch_size=1).images[0].size == (16, 16)


def test_sid_has_the_gan_branch_too(teacher_folder, tmp_path):
    grey = images(tmp_path / "a.npz", (6, 16, 16))
    train(teacher_folder, tmp_path / "out", "train_sid", gan_weight=0.1, dataset=grey)
    assert OneStepPipeline.from_pretrained(tmp_path / "out")(class_labels=[1]).images[0].size == (16, 16)
    with pytest.raises(ValueError, match=r"`dataset` .* must be given with a `gan_weight` of 0\.1, but is None"):
        train(teacher_folder, tmp_path / "none", "train_sid", gan_weight=0.1)


def test_gan_of_a_labelled_teacher_needs_its_images(teacher_folder, tmp_path):
    grey = images(tmp_path / "a.npz", (6, 16, 16))
    train(teacher_folder, tmp_path / "out", gan_weight=3e-3, dataset=grey)
    for name, shape, labels, message in (
        ("size", (6, 32, 32), 3, r"images of the teacher's shape \(1, 16, 16\) .* have \(1, 32, 32\)"),
        ("channels", (6, 16, 16, 3), 3, r"images of the teacher's shape \(1, 16, 16\) .* have \(3, 16, 16\)"),
        ("labels", (6, 16, 16), 4, r"the teacher's labels 0..2, but those of .* are 0 to 3"),
    ):
        other = images(tmp_path / f"{name}.npz", shape, labels)
        with pytest.raises(ValueError, match=f"`dataset` must h(old|ave) {message}"):
            train(teacher_folder, tmp_path / name, gan_weight=3e-3, dataset=other)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"gan_weight": 1e-3, "dataset_name": "x"}, "`dataset_name` must be None for a teacher that takes no prompts"),
        ({"gan_weight": 1e-3, "dataset": "x", "prompts": "x"}, "`prompts` must be None for a teacher that takes no"),
        ({"dataset": "x.npz"}, "`dataset` must be None without a `gan_weight`, but is 'x.npz'"),
        ({"pairs": "x"}, "`pairs` must be None without a `regression_weight`, but is 'x'"),
        ({"pairs": "x", "preset": "dmd2-imagenet64-no-gan"}, "`pairs` must be None without a `regression_weight`"),
        ({"preset": "dmd2-imagenet64"}, "must be given with a `gan_weight` of 0.003"),
        ({"preset": "imagenet64-cond"}, "`pairs` must be given with a `regression_weight` of 0.25"),
    ],
)
def test_flags_that_nothing_would_read_are_refused(teacher_folder, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        train(teacher_folder, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def make(teacher, output, **settings):
    given = {"pretrained_teacher_model": teacher, "output_dir": output, "num_pairs": 3, "num_inference_steps": 2}
    run_script("make_pairs", *(part for k, v in (given | settings).items() for part in (f"--{k}", v)))


REGRESSION = {"regression_weight": 0.25, "regression_loss": "l2"}


def test_pairs_say_how_they_were_made_and_train_only_what_they_fit(tmp_path):
    labels = {"id2label": {0: "a", 1: "b"}}  # the third is the null label
    for size in (16, 32):
        unet = tiny_unet(classes=3, size=size)
        unet.register_to_config(**labels)
        ConsistencyModelPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / f"teacher{size}")
    teacher, pairs = tmp_path / "teacher16", tmp_path / "pairs"
    make(teacher, pairs, guidance_scale=2.0)
    assert json.loads((pairs / "pairs.json").read_text()) == {
        "pretrained_teacher_model": str(teacher),
        "revision": None,
        "variant": None,
        "num_inference_steps": 2,
        "guidance_scale": 2.0,
        "seed": 0,
        "scheduler": "DDIMScheduler",
    }
    train(teacher, tmp_path / "fits", pairs=pairs, guidance_scale=2.0, **REGRESSION)
    with pytest.raises(ValueError, match=r"`guidance_scale` must be that of `pairs`, 2.0, but is 1.0"):
        train(teacher, tmp_path / "out", pairs=pairs, **REGRESSION)
    with pytest.raises(
        ValueError, match=r"`pairs` must have the teacher's shape \(1, 32, 32\), but have \(1, 16, 16\)"
    ):
        train(tmp_path / "teacher32", tmp_path / "out", pairs=pairs, **REGRESSION)
    (pairs / "pairs.json").unlink()  # as made before there was a record
    train(teacher, tmp_path / "old", pairs=pairs, **REGRESSION)


def test_pairs_of_another_teacher_give_a_warning(teacher_folder, tmp_path, caplog):
    make(teacher_folder, tmp_path / "pairs")
    again = shutil.copytree(teacher_folder, tmp_path / "again")
    for teacher, warned in ((teacher_folder, False), (again, True)):
        train(teacher, tmp_path / teacher.name, pairs=tmp_path / "pairs", **REGRESSION)
        assert ("`pairs` were made by" in caplog.text) == warned


@pytest.mark.parametrize(
    "scheduler",
    [
        EulerAncestralDiscreteScheduler(),
        DDPMParallelScheduler(),
        LCMScheduler(),
        DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    ],
)
def test_a_stochastic_solver_makes_no_pairs(tmp_path, scheduler):
    ConsistencyModelPipeline(tiny_unet(), scheduler).save_pretrained(tmp_path / "teacher")
    with pytest.raises(
        ValueError, match=f"`pretrained_teacher_model` must be deterministic, .* {type(scheduler).__name__}"
    ):
        make(tmp_path / "teacher", tmp_path / "pairs")
    assert not (tmp_path / "pairs").exists()


@pytest.mark.parametrize("name", ["num_pairs", "num_inference_steps", "batch_size"])
def test_no_pairs_and_no_steps_are_refused(teacher_folder, tmp_path, name):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, but is 0"):
        make(teacher_folder, tmp_path / "pairs", **{name: 0})
