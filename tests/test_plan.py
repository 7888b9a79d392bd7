"""`onestep plan` against the steps that it foretells."""

import gc
import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT, tiny_unet
from diffusers import DDPMScheduler, UNet2DConditionModel
from families import tiny_pipeline
from hub_server import LocalHub

from diffusers_onestep import DMD, Denoiser, GuidedDenoiser, SiD, VPSchedule
from diffusers_onestep.cli import main
from diffusers_onestep.methods.gan import GANHead
from diffusers_onestep.models import network_from_config
from diffusers_onestep.optimization import checkpoint_gradients
from diffusers_onestep.plan import (
    CUDAAutocast,
    MemoryMeter,
    PlanArguments,
    example_cond,
    plan,
    plan_distiller,
    plan_step,
)

CONFIG = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 16,
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
}
SCHEDULER = DDPMScheduler()


def arguments(**other):
    defaults = {"pretrained_teacher_model": "", "train_batch_size": 2, "device": "cpu"}
    return PlanArguments(**defaults | other)


def real_step(args, **options):
    """The same step with data, under the same meter."""
    network = UNet2DConditionModel.from_config(CONFIG).requires_grad_(False).eval()
    denoiser = Denoiser(network, VPSchedule(SCHEDULER.alphas_cumprod), "epsilon")
    method, cond = {"sid": SiD, "dmd": DMD}[args.method], example_cond(network, 2)
    teacher = GuidedDenoiser(denoiser, args.guidance_scale, {k: v[:1] for k, v in cond.items()})
    distiller = method(teacher, lora=args.lora_config(), fake_score_updates=args.fake_score_updates, **options)
    if args.gradient_checkpointing:
        for part in (distiller.teacher, distiller.student, distiller.fake_score):
            checkpoint_gradients(part.network)
    return plan_distiller(distiller, {"batch_size": 2, "cond": cond, "x0": torch.zeros(2, 4, 16, 16)}, args)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"sequential": True},
        {"lora_rank": 4, "ema_halflife_kimg": 1.0},
        {"method": "dmd", "fake_score_updates": 2, "gradient_checkpointing": True},
        {"method": "dmd", "gan_weight": 1e-3, "guidance_scale": 3.0},
        {"kappas": [1.5], "gradient_checkpointing": True},
        {"gan_weight": 0.1, "sequential": True},
    ],
)
def test_a_step_without_data_needs_what_a_real_one_does(flags):
    args = arguments(**flags)
    gc.collect()
    planned = plan_step(CONFIG, SCHEDULER, args)
    gc.collect()
    real = real_step(args, **{k: flags[k] for k in ("sequential", "kappas", "gan_weight") if k in flags})
    assert planned.parameters == real.parameters
    assert planned.flops == real.flops > 0
    for purpose in ("weights, frozen", "weights, trained", "optimizer", "EMA"):
        assert planned.memory[purpose] == pytest.approx(real.memory[purpose], abs=4096), purpose
    # garbage that Python has not collected yet counts too: of the real step, mostly
    assert 0.92 * planned.peak <= real.peak <= 1.15 * planned.peak


def test_bytes_by_purpose():
    count = sum(p.numel() for p in UNet2DConditionModel.from_config(CONFIG).parameters())
    whole = plan_step(CONFIG, SCHEDULER, arguments(teacher_dtype="bf16", ema_halflife_kimg=1.0))
    assert whole.memory["weights, frozen"] == 2 * count
    assert whole.memory["weights, trained"] == 2 * 4 * count
    assert whole.memory["optimizer"] == pytest.approx(2 * 8 * count, abs=4096)  # and a step count for each tensor
    assert whole.memory["EMA"] == 4 * count and 0 <= whole.memory["gradients"] <= 4 * count
    assert whole.peak == sum(whole.memory.values())
    # the student's update needs the teacher; where the critic's is the larger one, the teacher is away
    for gan, saved in ((0.0, 0), (1e-3, 4 * count)):
        here, away = (
            plan_step(CONFIG, SCHEDULER, arguments(method="dmd", gan_weight=gan, offload_teacher=flag))
            for flag in (False, True)
        )
        assert here.peak - saved - 1e5 <= away.peak <= here.peak and (away.peak < here.peak) == bool(saved)
    with pytest.raises(ValueError, match="`offload_teacher` must be off with adapters"):
        plan_step(CONFIG, SCHEDULER, arguments(lora_rank=4, offload_teacher=True))
    eight = plan_step(CONFIG, SCHEDULER, arguments(optimizer="adamw8bit"))
    assert 2 * 2 * count < eight.memory["optimizer"] < 0.5 * whole.memory["optimizer"]
    lora = plan_step(CONFIG, SCHEDULER, arguments(lora_rank=4, lora_target_modules=["to_q"]))
    adapters = 2 * sum(4 * (p.shape[0] + p.shape[1]) for name, p in _queries())
    assert lora.memory["weights, frozen"] == 4 * count and lora.memory["weights, trained"] == 4 * adapters
    assert lora.memory["optimizer"] == pytest.approx(8 * adapters, abs=4096)


def _queries():
    network = UNet2DConditionModel.from_config(CONFIG)
    return [(name, p) for name, p in network.named_parameters() if name.endswith("to_q.weight")]


def test_the_head_of_the_gan_is_counted():
    plain, gan = (plan_step(CONFIG, SCHEDULER, arguments(method="dmd", gan_weight=w)) for w in (0.0, 1e-3))
    head = sum(p.numel() for p in GANHead(64, 8).parameters())
    added = {name: gan.parameters[name] - plain.parameters[name] for name in plain.parameters}
    assert added == {"teacher": 0, "student, trained": 0, "fake score, trained": head}
    assert gan.memory["weights, trained"] == plain.memory["weights, trained"] + 4 * head
    assert gan.memory["optimizer"] == pytest.approx(plain.memory["optimizer"] + 8 * head, abs=4096)
    # one fake-score evaluation more in the student's step, with a gradient back, and two in its own
    assert gan.flops > 1.3 * plain.flops
    # those two keep a graph to the network's middle alone, the smaller half: what is behind it is dropped
    saved = "activations and temporaries"
    assert gan.memory[saved] < 2.5 * plain.memory[saved]


def test_gradients_live_through_the_micro_batches_that_follow():
    one = plan_step(CONFIG, SCHEDULER, arguments(train_batch_size=8))
    count = one.parameters["student, trained"]
    spread = plan_step(CONFIG, SCHEDULER, arguments(train_batch_size=8, global_batch_size=32, num_processes=4))
    assert spread.peak == one.peak
    for flags in ({"gradient_accumulation_steps": 2}, {"gradient_accumulation_steps": 16}, {"global_batch_size": 32}):
        several = plan_step(CONFIG, SCHEDULER, arguments(train_batch_size=8, **flags))
        assert several.peak == pytest.approx(one.peak - one.memory["gradients"] + 4 * count, rel=0.01)
        assert several.memory["gradients"] == 4 * count and several.flops == one.flops


def test_cudas_autocast_keeps_norms_in_float32():
    saved = []

    def kept(tensor):
        saved.append(tensor.dtype)
        return tensor

    norm, x = torch.nn.GroupNorm(2, 4), torch.randn(1, 4, 2, 2, requires_grad=True)
    for mode, dtype in ((nullcontext(), torch.bfloat16), (CUDAAutocast(), torch.float32)):
        with mode, torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(kept, lambda t: t):
            saved.clear()
            assert norm(x.bfloat16()).dtype == dtype == saved[0]
            assert torch.nn.functional.interpolate(x.bfloat16(), scale_factor=2).dtype == dtype
    with CUDAAutocast():  # outside of autocast all is as it is
        assert torch.nn.GroupNorm(2, 4, dtype=torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    cpu, cuda = (
        plan_step(CONFIG, SCHEDULER, arguments(train_batch_size=8, mixed_precision="bf16", device=device)).memory
        for device in ("cpu", "cuda")
    )
    saved = "activations and temporaries"
    assert 1.15 * cpu[saved] < cuda[saved] < 1.6 * cpu[saved]


def test_what_saves_memory_saves_memory():
    def activations(**flags):
        return plan_step(CONFIG, SCHEDULER, arguments(**flags)).memory["activations and temporaries"]

    plain = activations()
    assert activations(sequential=True) < 0.6 * plain
    assert activations(gradient_checkpointing=True) < 0.8 * plain
    assert activations(method="dmd") < 0.6 * plain
    assert activations(train_batch_size=4) == pytest.approx(2 * plain, rel=0.1)


def test_guidance_and_attention_are_counted():
    plain, guided = (plan_step(CONFIG, SCHEDULER, arguments(method="dmd", guidance_scale=g)) for g in (1.0, 3.0))
    assert guided.flops > 1.1 * plain.flops  # one more evaluation of eight
    unit = plan_step(CONFIG, SCHEDULER, arguments()).flops / 11  # SiD: 7 F of the student's step, 4 F of the other
    assert plan_step(CONFIG, SCHEDULER, arguments(kappas=[1.0])).flops == pytest.approx(11 * unit, rel=1e-6)
    # of an evaluation that is guided twice the samples: two of the student's step that hand on a gradient (1 F and
    # 1 F back), and one of the fake score's that learns (1 F and 2 F)
    for kappas, more in ([1, 1, 1, 2.0], 2), ([1, 2, 2, 2.0], 4), ([2.0], 7):
        flops = plan_step(CONFIG, SCHEDULER, arguments(kappas=kappas)).flops
        assert flops == pytest.approx((11 + more) * unit, rel=0.05), kappas
    q = torch.randn(1, 2, 8, 4, requires_grad=True)
    with MemoryMeter() as meter:
        torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
    product = 2 * 2 * 8 * 8 * 4
    assert meter.flops == (2 + 5) * product  # two products forward, five back


def test_the_meter_counts_what_lives():
    kept = torch.zeros(100)
    meter = MemoryMeter()
    meter.leave_out([kept])
    with meter:
        first = kept.view(10, 10) + 1
        assert meter.live == 400
        second = first * 2
        del first
        assert (meter.live, meter.peak) == (400, 800)
        meter.reset()
        second.add_(1)
        kept.view(-1)
        assert meter.peak == 400
    del second
    assert meter.live == 0


@pytest.fixture
def configs_only(teacher_folder, tmp_path):
    shutil.copytree(teacher_folder, tmp_path / "teacher", ignore=shutil.ignore_patterns("*.safetensors"))
    return tmp_path / "teacher"


def test_config_files_are_enough(configs_only, capsys):
    assert not list(configs_only.rglob("*.safetensors"))
    args = arguments(pretrained_teacher_model=str(configs_only), lora_rank=2, resolution=32)
    planned = plan(args)
    assert planned.parameters["teacher"] == sum(p.numel() for p in tiny_unet(classes=3).parameters())
    main(["plan", "--pretrained_teacher_model", str(configs_only), "--method", "dmd", "--train_batch_size", "2"])
    text = capsys.readouterr().out
    assert "peak" in text and "TFLOP" in text and "Not counted" in text
    flags = ["--pretrained_teacher_model", str(configs_only), "--preset", "cifar10-uncond"]
    main(["plan", *flags, "--train_batch_size", "2"])
    assert "fake score, trained" in capsys.readouterr().out
    with pytest.raises(SystemExit):  # compares no scores
        main(["plan", *flags[:2], "--method", "dmd", "--preset", "dmd2-sdxl-warmup"])
    assert "dmd2-sdxl-4step-lora" in capsys.readouterr().err


def test_a_hub_id_costs_its_config_files(configs_only, tmp_path):
    shutil.copytree(configs_only, tmp_path / "hub" / "user" / "teacher")
    with LocalHub(tmp_path / "hub") as hub:
        done = subprocess.run(
            [sys.executable, "-m", "diffusers_onestep.cli", "plan", "--pretrained_teacher_model", "user/teacher"],
            env=os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")},
            capture_output=True,
            text=True,
            timeout=500,
        )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "parameters: teacher" in done.stdout
    fetched = {path.name for path in (tmp_path / "home" / "hub").rglob("snapshots/*/**/*") if not path.is_dir()}
    assert fetched == {"model_index.json", "config.json", "scheduler_config.json"}


def test_resolution_counts_in_latents(configs_only):
    (configs_only / "vae").mkdir()
    (configs_only / "vae" / "config.json").write_text(json.dumps({"block_out_channels": [8, 16, 32]}))
    index = json.loads((configs_only / "model_index.json").read_text())
    (configs_only / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", "AutoencoderKL"]}))
    at = {r: plan(arguments(pretrained_teacher_model=str(configs_only), resolution=r)).flops for r in (32, 64)}
    assert at[64] == pytest.approx(4 * at[32], rel=0.05)
    with pytest.raises(ValueError, match=r"`resolution` must be a multiple of 4, but is 30"):
        plan(arguments(pretrained_teacher_model=str(configs_only), resolution=30))


def test_old_repositories_have_their_configs_at_the_root(configs_only):
    (configs_only / "unet" / "config.json").rename(configs_only / "config.json")
    (configs_only / "scheduler" / "scheduler_config.json").rename(configs_only / "scheduler_config.json")
    planned = plan(arguments(pretrained_teacher_model=str(configs_only)))
    assert planned.parameters["teacher"] == sum(p.numel() for p in tiny_unet(classes=3).parameters())


def test_flux_is_planned_at_the_size_that_it_is_trained_at(tmp_path):
    tiny_pipeline("flux").save_pretrained(tmp_path)
    at = {r: plan(arguments(pretrained_teacher_model=str(tmp_path), resolution=r)).flops for r in (None, 128, 256)}
    assert at[None] == at[256] > at[128]  # 128 latents, of two pixels


def test_pixart_at_1024_pixels_is_told_its_size():
    network = tiny_pipeline("pixart").transformer
    config = dict(network.config) | {"_class_name": "PixArtTransformer2DModel", "use_additional_conditions": True}
    config |= {"num_attention_heads": 3, "cross_attention_dim": 24}  # a third of the width for each of three numbers
    with torch.device("meta"):
        assert set(example_cond(network_from_config(config), 2)) > {"resolution", "aspect_ratio"}
    plan_step(config, DDPMScheduler(), arguments(method="sid", train_batch_size=2))


def test_bad_flags_are_refused(configs_only):
    with pytest.raises(ValueError, match=r"`method` must be one of"):
        arguments(method="pid")
    for wrong in ({"sequential": True}, {"kappas": [1.5]}):
        with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` must be off with method 'dmd'"):
            arguments(method="dmd", **wrong)
    with pytest.raises(ValueError, match=r"`lora_rank` must be given"):
        arguments(lora_alpha=2.0)
    with pytest.raises(ValueError, match=r"`lora_rank` must be at least 1"):
        arguments(lora_rank=0)
    with pytest.raises(SystemExit):
        main(["plan", "--pretrained_teacher_model", str(configs_only), "--no_such_flag", "1"])
    with pytest.raises(SystemExit):
        main(["info", "fashion32", "--no_such_flag", "1"])


@pytest.mark.parametrize("path", sorted((ROOT / "training" / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_launcher_configs_are_accelerates(path):
    config = load_config_from_file(str(path))  # an unknown key is an error
    assert config.num_processes == yaml.safe_load(path.read_text())["num_processes"]
    assert str(config.distributed_type.value) in ("NO", "MULTI_GPU", "FSDP")
    if path.stem == "fsdp2":  # a wrong name in here is left out without a word
        assert set(config.fsdp_config) <= {action.dest for action in launch_command_parser()._actions}
        assert config.fsdp_config["fsdp_version"] == 2
