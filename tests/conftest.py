"""Tiny real diffusers teachers."""

import contextlib
import importlib.util
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import ConsistencyModelPipeline, DDPMScheduler, UNet2DModel

from diffusers_onestep.arguments import parse_args

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "training")]  # train_teacher imports a recipe


def training_module(name):
    """A script of `training/` as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "training" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def run_script(name, *flags):
    """A script's `main` in this process, with flags as on its command line."""
    module = training_module(name)
    presets = next((v for k, v in vars(module).items() if k.endswith("_PRESETS")), None)
    arguments = [v for k, v in vars(module).items() if k.endswith("Arguments") and v.__module__ == name]
    module.main(parse_args(arguments[0], [str(flag) for flag in flags], presets=presets))


def script(name, *flags):
    """The command line of a script of ours."""
    return [sys.executable, str(ROOT / "training" / name), *map(str, flags)]


def run(command, expected=0, **environment):
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=1500)
    assert done.returncode == expected, done.stderr[-3000:]
    return done


def free_port():
    """Below those that the system hands out, so that nobody takes it before the ranks do."""
    for port in random.SystemRandom().sample(range(20_000, 30_000), 50):
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port
    raise OSError("no free port")


def run_on_two_ranks(command, **environment):
    """A command line of Python as two processes of a thread each."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | environment
    return run([command[0], *launcher, *command[1:]], **environment)


def tiny_unet(classes=None, seed=0, size=16, channels=1, out_channels=None):
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=out_channels or channels,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        num_class_embeds=classes,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()


@pytest.fixture(autouse=True)
def own_accelerator():
    """Each test with the precision that it asks for: accelerate keeps the first one for the process."""
    yield
    AcceleratorState._reset_state()


@pytest.fixture
def unet():
    return tiny_unet()


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory):
    """A class-conditional DDPM teacher on disk."""
    folder = tmp_path_factory.mktemp("teacher")
    ConsistencyModelPipeline(tiny_unet(classes=3), DDPMScheduler()).save_pretrained(folder)
    return folder
