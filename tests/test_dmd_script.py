"""`train_dmd.py` and `make_pairs.py`: what they make of their flags, in this process."""

import numpy as np
import pytest
from conftest import run_script, tiny_unet
from diffusers import DDPMPipeline, DDPMScheduler

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


def train(teacher, output, **settings):
    given = {"pretrained_teacher_model": teacher, "output_dir": output, "max_train_steps": 1, "train_batch_size": 2}
    given |= {"lr_warmup_steps": 0} | settings
    run_script("train_dmd", *(part for k, v in given.items() for part in (f"--{k}", v)))


def test_gan_of_an_unconditional_teacher_leaves_the_labels_out(unconditional, tmp_path):
    train(unconditional, tmp_path / "out", gan_weight=3e-3, dataset=images(tmp_path / "a.npz"))
    assert OneStepPipeline.from_pretrained(tmp_path / "out")(batch_size=1).images[0].size == (16, 16)


def test_gan_of_a_labelled_teacher_needs_its_images(teacher_folder, tmp_path):
    grey = images(tmp_path / "a.npz", (6, 16, 16))
    train(teacher_folder, tmp_path / "out", gan_weight=3e-3, dataset=grey)
    for name, shape, labels, message in (
        ("size", (6, 32, 32), 3, r"images of the teacher's shape \(1, 16, 16\) .* have \(1, 32, 32\)"),
        ("channels", (6, 16, 16, 3), 3, r"images of the teacher's shape \(1, 16, 16\) .* have \(3, 16, 16\)"),
        ("labels", (6, 16, 16), 4, r"labels of the teacher's 3, but .* has 4"),
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
        ({"preset": "dmd2-imagenet64"}, "`dataset` must be given with a `gan_weight` of 0.003"),
        ({"preset": "imagenet64-cond"}, "`pairs` must be given with a `regression_weight` of 0.25"),
    ],
)
def test_flags_that_nothing_would_read_are_refused(teacher_folder, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        train(teacher_folder, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
