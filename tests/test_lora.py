"""One trunk: student and fake score as adapters on the frozen teacher's own weights."""

import re

import pytest
import torch
from conftest import run, run_on_two_ranks, script, tiny_unet
from diffusers import (
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from families import tiny_pipeline
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from diffusers_onestep import (
    DMD,
    Denoiser,
    EDM2UNet2DModel,
    EDMUNet2DModel,
    FlowSchedule,
    OneStepPipeline,
    SiD,
    Teacher,
    VPSchedule,
    train,
)
from diffusers_onestep.arguments import TrainArguments
from diffusers_onestep.data import Batches, Conditions
from diffusers_onestep.distillation import DistillationArguments
from diffusers_onestep.lora import adapted, adapter, merged, save_lora_weights
from diffusers_onestep.methods.base import normal
from diffusers_onestep.optimization import checkpoint_gradients
from diffusers_onestep.prompts import PromptEmbeddings
from diffusers_onestep.run_folder import checkpoints, latest_checkpoint

VP = VPSchedule(torch.linspace(0.9999, 0.01, 1000))
RANK = 2


def seeded(make):
    torch.manual_seed(0)
    return make().double().eval()


def sd_unet():
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )


def sd3():
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=8,
        pooled_projection_dim=8,
    )


class UnpackedFlux(nn.Module):
    """FLUX's transformer, called as an image model."""

    _supports_gradient_checkpointing = True

    def __init__(self):
        super().__init__()
        self.transformer = FluxTransformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=8,
            pooled_projection_dim=8,
            axes_dims_rope=(2, 2, 4),
        )

    def enable_gradient_checkpointing(self):
        self.transformer.enable_gradient_checkpointing()

    def forward(self, x, t, encoder_hidden_states, pooled_projections):
        tokens = self.transformer(
            x.flatten(2).mT,
            encoder_hidden_states,
            pooled_projections,
            t / 1000,
            img_ids=torch.zeros(x[0, 0].numel(), 3),
            txt_ids=torch.zeros(encoder_hidden_states.shape[1], 3),
        ).sample
        return tokens.mT.reshape(x.shape)


def cond(*names):
    generator = torch.Generator().manual_seed(7)
    shapes = {"encoder_hidden_states": (2, 3, 8), "pooled_projections": (2, 8)}
    return {name: torch.randn(shapes[name], generator=generator, dtype=torch.float64) for name in names}


PROMPT, POOLED = "encoder_hidden_states", "pooled_projections"
FAMILIES = {
    "unet": (lambda: tiny_unet(classes=3), VP, "epsilon", (1, 16, 16), {"class_labels": torch.tensor([0, 2])}),
    "sd": (sd_unet, VP, "v_prediction", (4, 8, 8), cond(PROMPT)),
    "sd3": (sd3, FlowSchedule(), "flow_prediction", (4, 8, 8), cond(PROMPT, POOLED)),
    "flux": (UnpackedFlux, FlowSchedule(), "flow_prediction", (4, 4, 4), cond(PROMPT, POOLED)),
}
METHODS = {"sid": (SiD, {}), "sequential": (SiD, {"sequential": True}), "dmd": (DMD, {})}


def shaken(network):
    """An adapter as training might leave it: no part of it is zero."""
    with torch.no_grad():
        for number, parameter in enumerate(adapter(network).parameters()):
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return network


def trunk_and_three(family, method, options):
    """A method on one trunk, and the same method on three networks with merged weights."""
    make, schedule, kind, shape, cond = FAMILIES[family]
    teacher = Denoiser(seeded(make), schedule, kind)
    torch.manual_seed(1)
    one = method(teacher, lora=LoraConfig(r=RANK, lora_alpha=3.0), sample_shape=shape, **options)
    three = method(Denoiser(seeded(make), schedule, kind), sample_shape=shape, **options)
    for name in ("student", "fake_score"):
        denoiser, plain = getattr(one, name), getattr(three, name)
        if name == "fake_score":  # another adapter than the student's
            with torch.no_grad():
                for parameter in adapter(shaken(denoiser.network)).parameters():
                    parameter.mul_(-0.7)
        else:
            shaken(denoiser.network)
        plain.network.double().load_state_dict(merged(denoiser.network).state_dict())
    return one, three, {"batch_size": 2, "cond": cond}


def losses_and_gradients(distiller, batch):
    """Every loss of an iteration, and the gradients of what it is for, by name of the parameter."""
    found = []
    generator = torch.Generator().manual_seed(3)
    for name, loss in distiller.updates(batch, generator):
        loss.backward()
        network = getattr(distiller, name).network
        found.append((name, loss.detach(), {k: p.grad for k, p in network.named_parameters() if p.grad is not None}))
        other = {"student": distiller.fake_score, "fake_score": distiller.student}[name]
        assert all(p.grad is None for p in (*other.network.parameters(), *distiller.teacher.parameters())
                   if not any(p is q for q in network.parameters()))  # fmt: skip
        network.zero_grad()
    return found


def projected(weight_gradients, network):
    """The chain rule from merged weights `W + s * B @ A` to A and B."""
    expected = {}
    for name, layer in network.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        a, b, s = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
        g = weight_gradients.get(f"{name}.weight")
        if g is None:
            continue
        out = g.shape[0]
        full = g.reshape(out, -1)
        expected[f"{name}.lora_A.default.weight"] = (s * b.reshape(out, RANK).mT @ full).reshape(a.shape)
        expected[f"{name}.lora_B.default.weight"] = (s * full @ a.reshape(RANK, -1).mT).reshape(b.shape)
    return expected


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_of_three_networks(family, method, checkpointing, monkeypatch):
    # whole iterations in float64, the noises too
    monkeypatch.setattr("diffusers_onestep.methods.score.normal", lambda *args: normal(*args).double())
    one, three, batch = trunk_and_three(family, *METHODS[method])
    if checkpointing:
        for denoiser in (one.teacher, one.student, one.fake_score):
            checkpoint_gradients(denoiser.network)
    for (name, loss, gradients), (_, expected_loss, weight_gradients) in zip(
        losses_and_gradients(one, batch), losses_and_gradients(three, batch), strict=True
    ):
        torch.testing.assert_close(loss, expected_loss, rtol=1e-9, atol=1e-9)
        expected = projected(weight_gradients, getattr(one, name).network)
        assert expected.keys() == gradients.keys() and len(expected) > 10
        assert sum(g.abs().max() > 0 for g in gradients.values()) > 0.9 * len(gradients)
        for key, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[key], rtol=1e-7, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")


def storages(*networks):
    """Bytes of each storage that the networks hold, once."""
    tensors = (t for network in networks for t in (*network.parameters(), *network.buffers()))
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def test_the_trunk_is_in_memory_once():
    teacher = Denoiser(sd_unet().eval(), VP, "epsilon")
    trunk = storages(teacher)
    distiller = SiD(teacher, lora=LoraConfig(r=RANK))
    networks = [distiller.teacher, distiller.student.network, distiller.fake_score.network]
    adapters = storages(*distiller.trainable.values())
    assert storages(*networks) == trunk | adapters and not trunk.keys() & adapters.keys()
    distiller.teacher.to(torch.bfloat16)  # one conversion is everybody's
    assert sum(storages(*networks).values()) == sum(trunk.values()) // 2 + sum(adapters.values())
    assert all(p.dtype == torch.float32 for part in distiller.trainable.values() for p in part.parameters())


def test_a_new_adapter_changes_nothing_and_the_teacher_never_does():
    teacher = Denoiser(sd_unet().eval(), VP, "epsilon")
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    distiller = SiD(teacher, lora=LoraConfig(r=RANK))
    x_t, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), {PROMPT: torch.randn(2, 3, 8)}
    expected = teacher(x_t, t, cond)
    torch.testing.assert_close(distiller.student(x_t, t, cond), expected)
    shaken(distiller.student.network)
    assert (distiller.student(x_t, t, cond) - expected).abs().max() > 1e-3
    assert torch.equal(distiller.fake_score(x_t, t, cond), expected)
    assert torch.equal(teacher(x_t, t, cond), expected)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_bf16_trunk_with_float32_adapters_learns(tmp_path):
    teacher = Denoiser(sd_unet().eval(), VP, "epsilon")
    distiller = DMD(teacher, lora=LoraConfig(r=RANK))
    start = {name: [p.clone() for p in part.parameters()] for name, part in distiller.trainable.items()}
    args = TrainArguments(
        output_dir=str(tmp_path), max_train_steps=3, train_batch_size=2, learning_rate=1e-3, mixed_precision="bf16",
        teacher_dtype="bf16", gradient_checkpointing=True,
    )  # fmt: skip
    train(distiller, Batches(Conditions({PROMPT: torch.randn(5, 3, 8)}), 2), args)
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
    for name, part in distiller.trainable.items():
        moved = [not torch.equal(p, q) for p, q in zip(part.parameters(), start[name], strict=True)]
        assert sum(moved) > 0.9 * len(moved), name
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in part.parameters())


def test_a_trunk_in_bf16_is_loaded_so(tmp_path):
    tiny_pipeline("sd").save_pretrained(tmp_path / "teacher")
    flags = {"pretrained_teacher_model": str(tmp_path / "teacher"), "output_dir": "", "resolution": 16}
    found = {}
    for rank in (None, RANK):
        args = DistillationArguments(**flags, teacher_dtype="bf16", lora_rank=rank)
        teacher = args.load_teacher()
        found[rank] = [getattr(teacher.pipeline, part).dtype for part in ("unet", "vae", "text_encoder")]
    bf16, fp32 = torch.bfloat16, torch.float32
    assert found == {None: [fp32, fp32, bf16], RANK: [bf16, fp32, bf16]}
    trained = SiD(teacher, lora=args.lora_config()).trainable.values()
    assert {p.dtype for part in trained for p in part.parameters()} == {torch.float32}


@pytest.mark.parametrize("method", [DMD, SiD])
def test_the_critic_sits_on_the_fake_scores_adapter_alone(method):
    torch.manual_seed(0)
    distiller = method(Denoiser(tiny_unet(), VP, "epsilon"), lora=LoraConfig(r=RANK), gan_weight=1e-2)
    shaken(distiller.fake_score.network)
    parts = distiller.trainable
    assert len(list(parts["fake_score"].parameters())) == len(list(distiller.head.parameters())) + len(
        list(adapter(distiller.fake_score.network).parameters())
    )
    batch = {"batch_size": 2, "cond": {}, "x0": torch.rand(2, 1, 16, 16)}
    for name, loss in distiller.updates(batch, torch.Generator().manual_seed(0)):
        loss.backward()
        own = list(parts.pop(name).parameters())
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in own)
        for p in (q for other in distiller.trainable.values() for q in other.parameters()):
            assert p.grad is None or any(p is q for q in own)
            p.grad = None
    assert not parts


PIPELINES = {
    "sd": (
        StableDiffusionPipeline,
        "unet",
        {"feature_extractor": None, "safety_checker": None, "requires_safety_checker": False},
    ),
    "sd3": (StableDiffusion3Pipeline, "transformer", {"text_encoder_3": None, "tokenizer_3": None}),
}


@pytest.mark.parametrize("family", PIPELINES)
def test_stock_pipelines_load_and_fuse_the_adapter(family, tmp_path):
    make, schedule, kind, _, cond = FAMILIES[family]
    cls, component, others = PIPELINES[family]
    trunk = make().eval()
    network = shaken(adapted(trunk, LoraConfig(r=RANK, lora_alpha=3.0)))
    save_lora_weights(cls, component, network, tmp_path)
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        assert all(key.startswith(f"{component}.") for key in file.keys())  # noqa: SIM118 (no mapping)
    scheduler = DDPMScheduler() if family == "sd" else FlowMatchEulerDiscreteScheduler()
    parts = {"vae": None, "text_encoder": None, "tokenizer": None, "scheduler": scheduler, component: trunk} | others
    if family == "sd3":
        parts |= {"text_encoder_2": None, "tokenizer_2": None}
    pipe = cls(**parts)
    denoiser, whole = (Denoiser(n, schedule, kind) for n in (trunk, merged(network)))
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 900.0]), {k: v.float() for k, v in cond.items()}
    expected = Denoiser(network, schedule, kind)(*inputs)
    torch.testing.assert_close(whole(*inputs), expected, rtol=1e-4, atol=1e-4)
    pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(denoiser(*inputs), expected, rtol=1e-4, atol=1e-4)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(denoiser(*inputs), expected, rtol=1e-4, atol=1e-4)
    weights = whole.network.state_dict()
    for key, tensor in trunk.state_dict().items():
        torch.testing.assert_close(tensor, weights[key], rtol=1e-5, atol=1e-5)


def test_default_targets_are_the_layers_wider_than_the_rank():
    network = sd_unet()
    layers = {
        name: min(m.weight.shape[:2]) for name, m in network.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))
    }
    config = adapted(network, LoraConfig(r=4)).peft_config["default"]
    assert config.r == 4
    inside = adapted(network, LoraConfig(r=4))
    found = {name for name, m in inside.named_modules() if hasattr(m, "lora_A")}
    assert found == {name for name, width in layers.items() if width > 4} and "conv_in" not in found
    few = adapted(network, LoraConfig(r=4, target_modules=["to_q"]))
    assert all(name.endswith("to_q") for name, m in few.named_modules() if hasattr(m, "lora_A"))


@pytest.mark.parametrize("architecture", ["ddpmpp", "ncsnpp", "adm"])
def test_every_wide_layer_of_an_edm_network_is_adapted_and_merges(architecture):
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "model_channels": 16, "channel_mult": (1, 2), "layers_per_block": 1}
    trunk = EDMUNet2DModel(architecture=architecture, **sizes, num_attention_heads=1).double().eval()
    network = adapted(trunk, LoraConfig(r=4))
    layers = {name for name, m in network.named_modules() if hasattr(m, "lora_A")}
    wide = {name.removesuffix(".weight") for name, p in trunk.named_parameters() if min((p.ndim, *p.shape[:2])) > 1}
    assert layers == {name for name in wide if min(trunk.get_submodule(name).weight.shape[:2]) > 4}
    assert {"enc.4x4_down.conv0", "dec.8x8_up.conv0", "dec.4x4_in0.qkv"} < layers
    for parameter in adapter(network).parameters():
        nn.init.normal_(parameter, std=0.1)
    x, t = torch.randn(2, 3, 8, 8).double(), torch.zeros(2).double()
    change = network(x, t).sample - trunk(x, t).sample
    assert change.abs().max() > 1e-3
    torch.testing.assert_close(merged(network)(x, t).sample, network(x, t).sample)


def test_a_network_of_layers_that_take_no_adapter_is_refused():
    network = EDM2UNet2DModel(sample_size=8, model_channels=64, channel_mult=(1,), layers_per_block=1)
    with pytest.raises(ValueError, match=r"`network` must have linear .* layers of torch .* EDM2UNet2DModel has none"):
        adapted(network, LoraConfig(r=2))


def test_what_cannot_be_right_is_refused():
    teacher = Denoiser(sd_unet().eval(), VP, "epsilon")
    with pytest.raises(ValueError, match=r"`student` must be None with `lora`"):
        SiD(teacher, lora=LoraConfig(r=2), student=Denoiser(sd_unet(), VP, "epsilon"))
    with pytest.raises(ValueError, match=r"`lora` must leave the trunk as it is"):
        SiD(teacher, lora=LoraConfig(r=2, bias="all"))
    with pytest.raises(ValueError, match=r"`r` of `lora` must be less than the width"):
        SiD(teacher, lora=LoraConfig(r=4096))
    with pytest.raises(ValueError, match=r"`network` must have no adapters of its own"):
        adapted(adapted(sd_unet(), LoraConfig(r=2)), LoraConfig(r=2))


def test_the_card_loads_the_adapter_into_the_teacher(tmp_path):
    tiny_pipeline("sd").save_pretrained(tmp_path / "teacher")
    teacher = Teacher.from_pretrained(tmp_path / "teacher")
    prompts = PromptEmbeddings(teacher, ["a photo of a cat"], tmp_path / "cache")
    args = TrainArguments(output_dir=str(tmp_path / "out"), max_train_steps=2, train_batch_size=2, learning_rate=1e-2)
    train(DMD(teacher, lora=LoraConfig(r=2)), Batches(prompts, 2), args)
    whole, _, lora = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.S)
    latents = []
    for code in (whole, lora, re.sub(r"pipe.load_lora_weights.*", "", lora)):
        scope = {}
        exec(code.replace("generator=", 'output_type="latent", generator=').replace("image.save", "str"), scope)
        latents.append(scope["image"])
    torch.testing.assert_close(latents[0], latents[1], rtol=1e-3, atol=1e-3)
    assert (latents[0] - latents[2]).abs().max() > 0.05


# scripts


def sid_flags(teacher, output, steps=4, **other):
    flags = {
        "pretrained_teacher_model": teacher, "output_dir": output, "max_train_steps": steps, "train_batch_size": 4,
        "checkpointing_steps": 2, "learning_rate": 1e-2, "logging_steps": 1, "lora_rank": 2,
    } | other  # fmt: skip
    return [part for key, value in flags.items() for part in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def unbroken(teacher_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("lora")
    run(script("train_sid.py", *sid_flags(teacher_folder, output)))
    return output


def state(output):
    return load_file(latest_checkpoint(output) / "model.safetensors")


def test_a_run_saves_a_whole_student_and_small_checkpoints(unbroken, teacher_folder):
    pipe = OneStepPipeline.from_pretrained(unbroken)
    assert pipe(class_labels=[0, 2]).images[0].size == (16, 16)
    weights = pipe.unet.state_dict()
    teacher = Teacher.from_pretrained(teacher_folder).denoiser.network.state_dict()
    assert weights.keys() == teacher.keys()
    moved = [key for key in weights if not torch.equal(weights[key], teacher[key])]
    assert len(moved) > 10 and "conv_in.bias" not in moved
    assert all("lora" in key for key in state(unbroken))
    averages = load_file(latest_checkpoint(unbroken) / "ema.safetensors")
    assert len(averages) == len(state(unbroken))


def test_resumed_run_has_bit_identical_adapters(unbroken, teacher_folder, tmp_path):
    run(script("train_sid.py", *sid_flags(teacher_folder, tmp_path, steps=2)))
    run(script("train_sid.py", *sid_flags(teacher_folder, tmp_path, resume_from_checkpoint="latest")))
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000002", "step-000004"]
    for name in ("model.safetensors", "model_1.safetensors", "ema.safetensors"):
        first, second = (load_file(latest_checkpoint(folder) / name) for folder in (tmp_path, unbroken))
        assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first), name


def test_two_ranks_equal_one_process(unbroken, teacher_folder, tmp_path):
    run_on_two_ranks(script("train_sid.py", *sid_flags(teacher_folder, tmp_path, train_batch_size=2)))
    assert (latest_checkpoint(tmp_path) / "random_states_1.pkl").is_file()  # there really were two
    first, second = state(tmp_path), state(unbroken)
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=1e-3, atol=1e-4)
