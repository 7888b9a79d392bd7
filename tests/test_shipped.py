"""The models that ship with the package, and the console command on them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_unet, training_module
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.utils import logging
from PIL import Image

from diffusers_onestep import OneStepPipeline, Teacher, evaluate, shipped_model
from diffusers_onestep.cli import main
from diffusers_onestep.pictures import picture as as_picture


def test_names():
    assert (shipped_model("fashion32") / "model_index.json").is_file()
    with pytest.raises(ValueError, match=r"`name` must be one of .*'fashion32'.* but is 'fashion64'"):
        shipped_model("fashion64")


def test_teacher_is_the_one_that_was_agreed():
    teacher = Teacher.from_pretrained("fashion32")
    assert teacher.sample_shape == (1, 32, 32) and teacher.num_labels == 10 and teacher.null_label == 10
    assert sum(p.numel() for p in teacher.denoiser.parameters()) < 1_500_000
    assert teacher.denoiser.prediction_type == "epsilon"


def test_teacher_runs_in_the_stock_pipeline():
    pipeline = DiffusionPipeline.from_pretrained(shipped_model("fashion32"))
    images = pipeline(2, class_labels=[1, 8], num_inference_steps=4, output_type="np").images
    assert images.shape == (2, 32, 32, 1) and images.mean() > 0.05


@pytest.mark.parametrize(
    "name, settings", [("emoji-sd", {"num_inference_steps": 20, "guidance_scale": 4.0}), ("emoji-sd-onestep", {})]
)
def test_the_small_stable_diffusion_and_its_student_draw_what_is_asked_for(name, settings):
    folder = shipped_model(name)
    assert (
        sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 20e6
        and (folder / "NOTICE").is_file()
    )
    pipeline = (OneStepPipeline if not settings else DiffusionPipeline).from_pretrained(folder, dtype=torch.float32)
    images = pipeline(
        ["red heart", "green heart", "blue heart"],
        **settings,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    assert images.shape == (3, 32, 32, 3)
    assert images[:, :3, :3].min() > 0.8  # white paper
    assert images[:, 12:18, 13:19].mean((1, 2)).argmax(1).tolist() == [0, 1, 2]  # in the middle of the heart


def test_shipped_student_is_good_in_one_call():
    """A distance at 1,000 samples: that of images without content is above 100."""
    pipeline = OneStepPipeline.from_pretrained("fashion32-onestep")
    row = evaluate(pipeline, name="student", num_samples=1000, seed=5)
    assert row.nfe == 1 and row.value < 2.0


def test_shipped_student_in_stock_diffusers_makes_the_same_image():
    ours = OneStepPipeline.from_pretrained("fashion32-onestep")
    stock = DiffusionPipeline.from_pretrained(shipped_model("fashion32-onestep"))
    images = [
        pipeline(3, class_labels=[0, 5, 9], generator=torch.Generator().manual_seed(0), output_type="np").images
        for pipeline in (ours, stock)
    ]
    assert np.array_equal(*images)


def test_latents_are_not_drawn(tmp_path, capsys):
    OneStepPipeline(tiny_unet(channels=4), DDPMScheduler()).save_pretrained(tmp_path / "latents")
    with pytest.raises(SystemExit):
        main(["sample", str(tmp_path / "latents"), "--num_inference_steps", "2", "--output", str(tmp_path / "a.png")])
    assert "makes latents of 4 channels" in capsys.readouterr().err and not (tmp_path / "a.png").exists()


def test_sample_and_info_commands(tmp_path, capsys):
    picture = tmp_path / "a.png"
    main(["sample", "fashion32-onestep", "--class_labels", "sandal", "8", "--output", str(picture)])
    assert picture.is_file()
    main(["info", "fashion32-onestep"])
    assert "SpaceToDepthUNet2DModel" in capsys.readouterr().out
    main(["sample", "fashion32-onestep", "--output", str(tmp_path / "a.jpg")])
    assert Image.open(tmp_path / "a.jpg").format == "JPEG"
    labels = ["--class_labels", "0", "9", "--output", str(picture)]
    main(["sample", "fashion32", "--num_inference_steps", "3", *labels])  # a model of many steps, by DDIM
    teacher, generator = Teacher.from_pretrained("fashion32"), torch.Generator().manual_seed(0)
    x0 = teacher.sample(
        torch.randn(2, *teacher.sample_shape, generator=generator), teacher.encode([0, 9]), num_inference_steps=3
    )
    shown = np.asarray(Image.open(picture))[::2, ::2]
    assert np.abs(shown - np.concatenate(list(as_picture(x0)[:, 0].numpy()), 1).astype(int)).max() <= 1
    assert not list(tmp_path.glob(".*"))


def test_samples_are_made_in_the_asked_precision_on_the_accelerator(monkeypatch, tmp_path):
    moved, dtypes, call = [], [], OneStepPipeline.__call__
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(OneStepPipeline, "to", lambda self, device: moved.append(device))
    monkeypatch.setattr(
        OneStepPipeline,
        "__call__",
        lambda self, *args, **kw: dtypes.append(self.unet.dtype) or call(self, *args, **kw),
    )
    main(["sample", "fashion32-onestep", "--dtype", "bf16", "--output", str(tmp_path / "a.png")])
    assert moved == [torch.device("cuda")] and dtypes == [torch.bfloat16]
    assert Image.open(tmp_path / "a.png").size == (640, 64)


@pytest.mark.parametrize(
    "command, message",
    [
        ("sample fashion32-onestep --class_labels sock", r"`class_labels` must be .* but is 'sock'"),
        ("sample fashion32-onestep --output nowhere/a.png", r"`output` must lie in an existing folder, but 'nowhere'"),
        ("sample fashion32-onestep --output a", r"`output` must end in one of \('.png', .* but is 'a'"),
        ("info nowhere", r"`model` must be a folder"),
        ("push nowhere me/it", r"`folder` must be .* but 'nowhere' does not exist"),
        (
            "convert README.md out",
            r"`file` 'README.md' is no readable checkpoint, of pickle, torch.save or safetensors",
        ),
    ],
)
def test_bad_input_ends_a_command_with_a_message(command, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text("# A card\n")
    with pytest.raises(SystemExit) as stop:
        main(command.split())
    assert stop.value.code == 2
    assert re.fullmatch(f"onestep: error: {message}.*", capsys.readouterr().err.splitlines()[-1])


def test_a_bug_keeps_its_traceback(monkeypatch):
    """Also if it is a ValueError inside this package: only what a `raise` of ours says is about input."""
    monkeypatch.setattr("diffusers_onestep.repository.resolve_model", lambda model: 1 / int(model))
    with pytest.raises(ValueError, match="invalid literal"):
        main(["info", "fashion32"])


def test_the_shipped_teacher_loads_without_a_word(caplog):
    logging.enable_propagation()
    try:
        Teacher.from_pretrained("fashion32")
    finally:
        logging.disable_propagation()
    assert not caplog.records


def test_quickstart_end_to_end_on_a_few_steps(tmp_path, capsys):
    main(["quickstart", "--output_dir", str(tmp_path), "--max_train_steps", "1", "--num_samples", "20"])
    output = capsys.readouterr().out
    assert "| this student | 1 |" in output and "| shipped student | 1 |" in output and "| teacher | 50 |" in output
    assert (tmp_path / "samples.png").is_file()
    assert len(json.loads((tmp_path / "metrics.json").read_text())["results"]) == 5
    OneStepPipeline.from_pretrained(tmp_path)


@pytest.mark.slow
def test_quickstart_keeps_its_promise(tmp_path):
    """Under five minutes on two cores, and better in one step than the teacher in five."""
    command = [sys.executable, "-m", "diffusers_onestep.cli", "quickstart", "--output_dir", str(tmp_path)]
    subprocess.run(command, check=True, timeout=300)
    rows = {(r["model"], r["nfe"]): r["value"] for r in json.loads((tmp_path / "metrics.json").read_text())["results"]}
    assert rows["this student", 1] < rows["teacher", 5]


def test_shipping_renames_the_folder_and_nothing_else():
    text = '{"out_channels": 1, "dropout": 0.0, "output_dir": "out", "command": "train.py --output_dir out --x ./out"}'
    expected = text.replace('"out"', '"mine"').replace("_dir out", "_dir mine")
    assert training_module("ship_model").renamed(text, "out", "mine") == expected
