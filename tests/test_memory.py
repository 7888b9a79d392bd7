"""What keeps a training step small."""

import os
import platform
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload_with_hook
from conftest import run, tiny_unet
from diffusers import DDIMScheduler
from peft import LoraConfig
from torch import nn

from diffusers_onestep import DMD, Denoiser, SiD, VPSchedule, train
from diffusers_onestep.arguments import TrainArguments
from diffusers_onestep.data import Batches, Conditions
from diffusers_onestep.methods.pretrain import Pretraining
from diffusers_onestep.network_calls import execution_device
from diffusers_onestep.optimization import average_gradients
from diffusers_onestep.sampling import sample
from diffusers_onestep.trainer import Trainer

VP = VPSchedule(torch.linspace(0.9999, 0.01, 1000))


def arguments(folder, **other):
    return TrainArguments(
        **{"output_dir": str(folder), "train_batch_size": 2, "max_train_steps": 2, "learning_rate": 1e-3} | other
    )


def teacher():
    return Denoiser(tiny_unet(), VP, "epsilon")


def weights(distiller):
    return torch.cat([p.flatten() for p in distiller.student.network.parameters()])


@pytest.mark.parametrize("method, options", [(SiD, {}), (DMD, {"fake_score_updates": 2})])
def test_checkpointing_and_offloading_change_no_weight(method, options, tmp_path):
    results = []
    for number, flags in enumerate([{}, {"gradient_checkpointing": True}, {"offload_teacher": True}]):
        distiller = method(teacher(), **options)
        distiller.dropout = False
        train(distiller, Batches(Conditions(), 2), arguments(tmp_path / str(number), **flags))
        results.append(weights(distiller))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-6)


def test_the_teacher_leaves_the_device_after_every_update(tmp_path):
    trainer = Trainer(DMD(teacher()), arguments(tmp_path, offload_teacher=True))
    seen = []
    trainer._teacher_hook.offload = lambda: seen.append("away")
    trainer.distiller.teacher.network.register_forward_hook(lambda *_: seen.append("used"))
    trainer.train_step([{"batch_size": 2, "cond": {}}])
    assert seen == ["used", "away", "away"]  # the student's update, then the fake score's


def test_an_offloaded_teacher_is_sampled_where_its_hook_takes_it_and_put_away_again(tmp_path):
    network = teacher().network
    assert execution_device(network).type == "cpu"
    cpu_offload_with_hook(network, torch.device("meta"))
    assert execution_device(network).type == "meta" and next(network.parameters()).device.type == "cpu"

    def call_network(x, t, cond):
        raise InterruptedError(f"called on {x.device}")

    with pytest.raises(InterruptedError, match="called on meta"):
        called = SimpleNamespace(network=network, call_network=call_network)
        sample(called, DDIMScheduler(), torch.randn(1, 1, 16, 16), num_inference_steps=2)

    trainer = Trainer(DMD(teacher()), arguments(tmp_path, offload_teacher=True))
    seen = []
    trainer._teacher_hook.offload = lambda: seen.append("away")
    trainer.validate = lambda folder: seen.append("shown") or {}
    (tmp_path / "samples.png").touch()
    trainer.write_samples()
    assert seen == ["shown", "away"]


def test_teacher_dtype_is_of_the_frozen_weights_alone(tmp_path):
    distiller = DMD(teacher())
    start = weights(distiller)
    train(distiller, Batches(Conditions(), 2), arguments(tmp_path, teacher_dtype="bf16"))
    assert {p.dtype for p in distiller.teacher.parameters()} == {torch.bfloat16}
    assert weights(distiller).dtype == torch.float32 and not torch.equal(weights(distiller), start)


def test_what_cannot_be_right_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"`offload_teacher` must be off with adapters"):
        Trainer(SiD(teacher(), lora=LoraConfig(r=2)), arguments(tmp_path, offload_teacher=True))
    with pytest.raises(ValueError, match=r"`gradient_checkpointing` must be off for a Conv2d"):
        denoiser = Denoiser(nn.Conv2d(1, 1, 1), VP, "epsilon")
        Trainer(SiD(denoiser, sample_shape=(1, 4, 4)), arguments(tmp_path, gradient_checkpointing=True))
    with pytest.raises(ValueError, match=r"`optimizer` must be 'adamw', 'radam' or 'adamw8bit'"):
        arguments(tmp_path, optimizer="sgd")
    with pytest.raises(ValueError, match=r"`teacher_dtype` must be one of"):
        arguments(tmp_path, teacher_dtype="int8")
    for library in ("bitsandbytes", "torchao"):
        monkeypatch.setattr(f"diffusers_onestep.optimization.is_{library}_available", lambda: False)
    with pytest.raises(ValueError, match=r"`optimizer` 'adamw8bit' needs bitsandbytes on a CUDA GPU, or torchao"):
        Trainer(SiD(teacher()), arguments(tmp_path, optimizer="adamw8bit"))
    with pytest.raises(ValueError, match=r"need a teacher, but Pretraining has none"):
        Trainer(Pretraining(teacher()), arguments(tmp_path, teacher_dtype="bf16"))


class Doubling:
    """Another rank has three times the gradient of this one."""

    def __init__(self):
        self.sizes = []

    def reduce(self, tensor, reduction):
        self.sizes.append(tensor.numel())
        return 2 * tensor


def test_gradients_travel_in_pieces():
    parameters = [nn.Parameter(torch.zeros(n)) for n in (3, 5, 2, 7)]
    for number, parameter in enumerate(parameters):
        if number != 2:
            parameter.grad = torch.full_like(parameter, 1.0 + number)
    ranks = Doubling()
    average_gradients(ranks, parameters, transfer_size=6)
    assert ranks.sizes == [8, 7]
    assert [p.grad.unique().tolist() for p in parameters if p.grad is not None] == [[2.0], [4.0], [8.0]]


KEPT = """
import psutil, sys, torch
from diffusers_onestep.optimization import keep_freed_memory

keep_freed_memory()
before = psutil.Process().memory_info().rss
activations = [torch.ones(6 * 2**20) for _ in range(3)]  # 24 MiB each
del activations
kept = psutil.Process().memory_info().rss - before
assert (kept > 36 * 2**20) == (sys.argv[1] == "True"), kept
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
@pytest.mark.parametrize(
    "environment, kept",
    [
        ({}, True),
        ({"MALLOC_ARENA_MAX": "2"}, True),
        ({"MALLOC_TRIM_THRESHOLD_": "1048576"}, False),
        ({"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1048576"}, False),
    ],
)
def test_freed_activations_are_kept_unless_the_environment_has_a_threshold(environment, kept, monkeypatch):
    for name in list(os.environ):
        if name.startswith(("MALLOC_", "GLIBC_")):
            monkeypatch.delenv(name)
    run([sys.executable, "-c", KEPT, str(kept)], **environment)
