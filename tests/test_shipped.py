"""The models that ship with the package, and the console command on them."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from diffusers_onestep import OneStepPipeline, Teacher, evaluate, shipped_model
from diffusers_onestep.cli import main


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


def test_sample_and_info_commands(tmp_path, capsys):
    picture = tmp_path / "a.png"
    main(["sample", "fashion32-onestep", "--class_labels", "sandal", "8", "--output", str(picture)])
    assert picture.is_file()
    main(["info", "fashion32-onestep"])
    assert "SpaceToDepthUNet2DModel" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"`class_labels` must be .* but is 'sock'"):
        main(["sample", "fashion32-onestep", "--class_labels", "sock", "--output", str(picture)])
    with pytest.raises(SystemExit, match=r"`model` must be a folder"):
        main(["info", "nowhere"])


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
