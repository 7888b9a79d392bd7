"""Every kind of saved repository, loaded over HTTP in a fresh process."""

import os
import subprocess
import sys

import pytest
from conftest import tiny_unet
from diffusers import ConsistencyModelPipeline, DDPMScheduler, EDMEulerScheduler
from hub_server import LocalHub

from diffusers_onestep import DistilledDDIMScheduler, OneStepPipeline, SpaceToDepthUNet2DModel
from diffusers_onestep.schedulers import student_scheduler

SAMPLE = """
import hashlib, sys, torch
{imports}
pipe = {loader}.from_pretrained("user/model")
pipe.set_progress_bar_config(disable=True)
image = pipe(2, generator=torch.Generator().manual_seed(0), output_type="np").images
print(hashlib.sha256(image.tobytes()).hexdigest())
"""
OURS = {"imports": "from diffusers_onestep import OneStepPipeline", "loader": "OneStepPipeline"}
STOCK_WITH_OURS = {"imports": "import diffusers_onestep, diffusers", "loader": "diffusers.DiffusionPipeline"}
STOCK_ALONE = {"imports": "import diffusers", "loader": "diffusers.DiffusionPipeline"}


def sample(hub, cache, how, code=SAMPLE):
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-c", code.format(**how)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=600,
    )


def student(kind):
    if kind == "stock":
        return OneStepPipeline(tiny_unet(), student_scheduler(DDPMScheduler(), "epsilon", [440], 1.0))
    if kind == "signal-free":
        return OneStepPipeline(tiny_unet(), student_scheduler(DDPMScheduler(), "epsilon", [440], 0.93))
    if kind == "edm":
        return OneStepPipeline(tiny_unet(), student_scheduler(EDMEulerScheduler(), "edm", [0.229], 2.5))
    if kind == "trajectory":
        settings = {"parameterization": "trajectory", "start_timestep": 900}
        return OneStepPipeline(tiny_unet(), student_scheduler(DDPMScheduler(), "epsilon", [0], 0.99, **settings))
    network = SpaceToDepthUNet2DModel(sample_size=16)
    return OneStepPipeline(network, student_scheduler(DDPMScheduler(), "epsilon", [440], 0.93))


@pytest.mark.parametrize("kind", ["stock", "signal-free", "edm", "trajectory", "space-to-depth"])
def test_students_load_from_the_hub(tmp_path, kind):
    student(kind).save_pretrained(tmp_path / "hub" / "user" / "model")
    with LocalHub(tmp_path / "hub") as hub:
        runs = [sample(hub, tmp_path / f"cache{i}", how) for i, how in enumerate((OURS, STOCK_WITH_OURS, STOCK_ALONE))]
    for run in runs[:2]:
        assert run.returncode == 0, run.stderr[-2000:]
    assert runs[0].stdout == runs[1].stdout
    if kind == "stock":
        assert runs[2].returncode == 0 and runs[2].stdout == runs[0].stdout, runs[2].stderr[-2000:]
    else:  # without our package: an error that names it, never a wrong image
        assert runs[2].returncode != 0 and "diffusers_onestep" in runs[2].stderr


def test_teachers_load_from_the_hub_and_offline_from_its_cache(tmp_path):
    ConsistencyModelPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(tmp_path / "hub" / "user" / "model")
    code = "from diffusers_onestep import Teacher\nprint(Teacher.from_pretrained('user/model').sample_shape)"
    with LocalHub(tmp_path / "hub") as hub:
        online = sample(hub, tmp_path / "cache", {}, code)
        os.environ["HF_HUB_OFFLINE"] = "1"
        try:
            offline = sample(hub, tmp_path / "cache", {}, code)
        finally:
            del os.environ["HF_HUB_OFFLINE"]
    assert online.stdout == offline.stdout == "(1, 16, 16)\n", online.stderr[-2000:] + offline.stderr[-2000:]


def test_distilled_solvers_load_from_the_hub(tmp_path):
    scheduler = DistilledDDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(4)
    scheduler.add_table(4, scheduler.fingerprint() | {"lambdas": [0.0, 0.3, 0.2, 0.1]})
    ConsistencyModelPipeline(tiny_unet(), scheduler).save_pretrained(tmp_path / "hub" / "user" / "model")
    four = SAMPLE.replace("pipe(2,", "pipe(2, num_inference_steps=4,")
    replaced = four.replace("pipe.set", "pipe.scheduler = {scheduler}\npipe.set")
    here = {
        "scheduler": "diffusers_onestep.DistilledDDIMScheduler.from_pretrained('user/model', subfolder='scheduler')"
    }
    with LocalHub(tmp_path / "hub") as hub:
        runs = [sample(hub, tmp_path / f"cache{i}", how, four) for i, how in enumerate((OURS, STOCK_WITH_OURS))]
        runs.append(sample(hub, tmp_path / "cache2", STOCK_WITH_OURS | here, replaced))
        alone = sample(hub, tmp_path / "cache3", STOCK_ALONE, four)
    assert all(run.returncode == 0 for run in runs), runs[-1].stderr[-2000:]
    assert runs[0].stdout == runs[1].stdout == runs[2].stdout
    assert alone.returncode != 0 and "diffusers_onestep" in alone.stderr
