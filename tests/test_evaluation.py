import json
import sys

import pytest
from diffusers import DDIMScheduler
from test_trainer import run, script

from diffusers_onestep import OneStepPipeline, Teacher, evaluate
from diffusers_onestep.schedulers import solver_for


def test_processes_share_the_sampling_and_find_the_same_distance(tmp_path):
    flags = ["--model", "fashion32-onestep", "--num_samples", "60", "--batch_size", "20"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29523"]
    commands = script("evaluate.py", *flags), [*launcher, *script("evaluate.py", *flags)[1:]]
    results = []
    for name, command in zip(("one", "two"), commands, strict=True):
        run([*command, "--output_dir", str(tmp_path / name)], ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
        results.append(json.loads((tmp_path / name / "metrics.json").read_text()))
    (one,), (two,) = (result["results"] for result in results)
    assert two["value"] == pytest.approx(one["value"], rel=1e-4) and one["num_samples"] == two["num_samples"] == 60
    assert "2 processes" in results[1]["hardware"]


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
    assert row["nfe"] == 3 and row["error"] > 0 and len(row["extractor"]) == 16
