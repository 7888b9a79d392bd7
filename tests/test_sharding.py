"""FSDP2 on two real gloo ranks of CPUs. Run by itself, this file is what every rank does."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import run_on_two_ranks
from families import tiny_pipeline
from safetensors.torch import load_file

from diffusers_onestep import DMD, OneStepPipeline, SiD, Teacher
from diffusers_onestep.arguments import TrainArguments
from diffusers_onestep.data import Batches
from diffusers_onestep.trainer import Trainer, train

WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"
LAUNCHER = {  # what `accelerate launch` makes of training/configs/fsdp2.yaml, without GPUs
    "ACCELERATE_USE_CPU": "true",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "OMP_NUM_THREADS": "1",
}


class Pictures:
    """Four prompts with latents."""

    def __init__(self, teacher):
        self.cond = teacher.encode(["a cat", "a red car", "the sea", ""])
        self.x0 = torch.randn(4, *teacher.sample_shape, generator=torch.Generator().manual_seed(3))

    def __len__(self):
        return 4

    def batch(self, places):
        return {"x0": self.x0[places], "cond": {k: v[places] for k, v in self.cond.items()}}


def run(method, folder, **other):
    """Two steps of a global batch of four."""
    teacher = Teacher(tiny_pipeline("sd"), resolution=16)
    torch.manual_seed(0)
    if method == "sid":
        distiller, more = SiD(teacher, kappas=1.5, sequential=True, gan_weight=0.1), {"ema_halflife_kimg": 0.01}
    else:
        distiller = DMD(teacher.guided(2.0), gan_weight=1e-3, fake_score_updates=2, sample_shape=teacher.sample_shape)
        distiller.origin = teacher
        # with averages, which leave the network and come back between two steps
        more = {"gradient_checkpointing": True, "validation_steps": 1, "ema_halflife_kimg": 0.01}
    settings = {"train_batch_size": 2, "global_batch_size": 4, "max_train_steps": 2, "learning_rate": 1e-3}
    # an epsilon far above the gradients' noise, or Adam turns rounding into full steps
    settings |= {"adam_epsilon": 1.0, "checkpointing_steps": 1, "logging_steps": 1} | more
    args = TrainArguments(output_dir=str(folder), **settings | other)
    train(distiller, Batches(Pictures(teacher), 2), args)
    return distiller


def on_two_ranks(root):
    from torch.distributed.tensor import DTensor

    for method in ("sid", "dmd"):
        distiller = run(method, root / method)
        for network in (distiller.teacher.network, *distiller.trainable.values()):
            parts = [p for p in network.parameters() if p.dim() > 1]
            assert all(isinstance(p, DTensor) for p in parts)
            assert sum(p.to_local().numel() for p in parts) < 0.6 * sum(p.numel() for p in parts)
    # once more from the first of the two steps
    again = root / "sid-again"
    if int(os.environ["RANK"]) == 0:
        shutil.copytree(root / "sid" / "checkpoints" / "step-000001", again / "checkpoints" / "step-000001")
    torch.distributed.barrier()
    run("sid", again, resume_from_checkpoint="latest")
    AcceleratorState._reset_state()  # of another precision
    run("dmd", root / "dmd-bf16", mixed_precision="bf16")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The folder that two ranks have left."""
    root = tmp_path_factory.mktemp("ranks")
    run_on_two_ranks([sys.executable, __file__, str(root)], **LAUNCHER)
    return root


def moves(*folders):
    start = tiny_pipeline("sd").unet.state_dict()
    weights = [load_file(folder / WEIGHTS) for folder in folders]
    return [torch.cat([(w[name] - start[name]).flatten() for name in start]) for w in weights]


@pytest.mark.parametrize("method", ["sid", "dmd"])
def test_two_sharded_ranks_equal_one_process(ranks, tmp_path, method):
    run(method, tmp_path)
    one, two = moves(tmp_path, ranks / method)
    assert one.abs().max() > 1e-7
    torch.testing.assert_close(two, one, rtol=0, atol=2e-3 * one.abs().max().item())


def test_a_sharded_run_goes_on_from_its_checkpoint(ranks):
    unbroken, resumed = moves(ranks / "sid", ranks / "sid-again")
    assert torch.equal(unbroken, resumed)


def test_checkpoints_hold_whole_tensors_and_no_code(ranks):
    files = {path.name for path in (ranks / "dmd" / "checkpoints" / "step-000002").iterdir()}
    assert {"student.safetensors", "fake_score.safetensors", "random_states_1.pkl"} <= files
    assert not [name for name in files if name.endswith((".bin", ".distcp"))]
    held, stored = load_file(ranks / "dmd" / WEIGHTS), ranks / "dmd" / "checkpoints" / "step-000002"
    state = load_file(stored / "student.safetensors")
    assert all(state[f"network.{name}"].shape == weight.shape for name, weight in held.items())
    first = next(tiny_pipeline("sd").unet.parameters())
    assert all(state[f"optimizer.0.{name}"].shape == first.shape for name in ("exp_avg", "exp_avg_sq"))


def test_a_sharded_run_leaves_an_ordinary_repository(ranks):
    for method in ("sid", "dmd", "dmd-bf16"):
        assert (ranks / method / "README.md").is_file()
        pipeline = OneStepPipeline.from_pretrained(ranks / method)
        assert pipeline("a cat", output_type="np", height=16, width=16).images.shape == (1, 16, 16, 3)


@pytest.mark.parametrize(
    "flags, variables, message",
    [
        ({"mixed_precision": "fp16"}, {}, "`mixed_precision` must be 'no' or 'bf16' with FSDP, but is 'fp16'"),
        ({}, {"FSDP_VERSION": "1"}, "`fsdp_version` of the launcher must be 2, but is 1"),
        ({"offload_teacher": True}, {}, "`offload_teacher` must be off with FSDP"),
        ({"optimizer": "adamw8bit"}, {}, "`optimizer` must be 'adamw' or 'radam' with FSDP"),
    ],
)
def test_what_does_not_work_sharded_is_refused(tmp_path, monkeypatch, flags, variables, message):
    for name, value in (LAUNCHER | variables).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("accelerate.Accelerator.num_processes", 2)
    monkeypatch.setattr("diffusers_onestep.sharding.init_device_mesh", lambda *_: None)
    teacher = Teacher(tiny_pipeline("sd"), resolution=16)
    with pytest.raises(ValueError, match=message):
        Trainer(SiD(teacher), TrainArguments(output_dir=str(tmp_path), **flags))


if __name__ == "__main__":
    on_two_ranks(Path(sys.argv[1]))
