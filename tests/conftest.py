"""Tiny real diffusers teachers."""

import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import ConsistencyModelPipeline, DDPMScheduler, UNet2DModel

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))


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
