"""The recipe `emoji-sd`, from captioned pictures to a stock Stable Diffusion pipeline, in a tiny version."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline
from transformers import CLIPTokenizer

from diffusers_onestep import Denoiser, NoiseSchedule, Teacher
from diffusers_onestep.data import load_images
from diffusers_onestep.methods.pretrain import AutoencoderPretraining, Pretraining

sys.path.insert(0, str(ROOT / "training"))
import emoji_sd
import ship_model

ODD = ["", "x" * 10_000, "cat " * 3000, "🎉👩🏽‍🚀", "שלום עולم", "naïve Åland\x00\n", "<|endoftext|> cat"]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "emoji.npz"
    generator = np.random.default_rng(0)
    captions = ["cat face", "dog face", "red heart", "raised hand, dark skin tone", "flag of Curaçao", "woman’s hat"]
    np.savez(
        path,
        images=generator.integers(0, 256, (18, 16, 16, 3), dtype=np.uint8),
        captions=np.array(captions * 3),
        vendor=np.array([0, 1] * 9, np.uint8),
        vendor_names=np.array(["noto", "twemoji"]),
        skin_tone=np.array([0, 0, 0, 5, 0, 0] * 3, np.uint8),
        split=np.repeat([0, 1, 2], 6).astype(np.uint8),
    )
    return path


def train(dataset, output, steps, *flags):
    tiny = "--autoencoder_channels 8 16 --autoencoder_steps 2 --autoencoder_batch_size 4 --unet_channels 16 32"
    tiny += " --text_width 32 --text_layers 1 --vocab_size 560 --train_batch_size 4 --lr_scheduler constant"
    script = [sys.executable, str(ROOT / "training" / "train_teacher.py"), "--recipe", "emoji-sd"]
    paths = ["--dataset", str(dataset), "--output_dir", str(output), "--max_train_steps", str(steps)]
    done = subprocess.run([*script, *paths, *tiny.split(), *flags], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="session")
def trained(dataset, tmp_path_factory):
    output = tmp_path_factory.mktemp("emoji-sd")
    train(dataset, output, 2)
    return output


def test_the_stock_pipeline_makes_pictures_of_any_caption(trained):
    pipeline = StableDiffusionPipeline.from_pretrained(trained)
    assert isinstance(pipeline.tokenizer, CLIPTokenizer) and pipeline.safety_checker is None
    captions = ["cat face", *ODD]
    images = [
        pipeline(caption, num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images[
            0
        ]
        for caption in captions
    ]
    assert all(image.shape == (16, 16, 3) and np.isfinite(image).all() for image in images)
    assert not np.array_equal(images[0], images[1])  # the caption matters
    assert "Twitter" in (trained / "NOTICE").read_text() and (trained / "samples.png").is_file()
    assert len(json.loads((trained / "samples.json").read_text())["prompts"]) == 5


def test_latents_have_unit_variance(trained, dataset):
    pipeline = StableDiffusionPipeline.from_pretrained(trained)
    x0 = emoji_sd.Emoji(str(dataset), 0).images.float() / 127.5 - 1
    latents = pipeline.vae.encode(x0).latent_dist.mean * pipeline.vae.config.scaling_factor
    assert latents.std().item() == pytest.approx(1, abs=0.01)


def test_a_resumed_run_trains_the_autoencoder_no_further(trained, dataset, tmp_path):
    output = tmp_path / "again"
    shutil.copytree(trained, output)
    train(dataset, output, 3, "--resume_from_checkpoint", "latest")
    before, after = (StableDiffusionPipeline.from_pretrained(folder) for folder in (trained, output))
    for name, parameter in before.vae.named_parameters():
        assert torch.equal(parameter, after.vae.get_parameter(name))
    moved = [not torch.equal(p, after.unet.get_parameter(n)) for n, p in before.unet.named_parameters()]
    assert any(moved)
    words = "text_model.embeddings.token_embedding.weight"
    words = next(n for n, _ in before.text_encoder.named_parameters() if words.endswith(n) or n.endswith(words))
    assert not torch.equal(before.text_encoder.get_parameter(words), after.text_encoder.get_parameter(words))


def test_shipped_in_half_precision_and_taken_as_a_teacher(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ship_model, "ASSETS", tmp_path)
    monkeypatch.setattr(ship_model, "MODEL_CARDS", tmp_path)
    ship_model.main(str(trained), "emoji-sd")
    assert "emoji-sd" in capsys.readouterr().out and (tmp_path / "emoji-sd" / "NOTICE").is_file()
    assert str(trained) not in "".join(path.read_text() for path in (tmp_path / "emoji-sd").rglob("*.json"))
    half = StableDiffusionPipeline.from_pretrained(tmp_path / "emoji-sd", dtype=torch.float16)
    assert {p.dtype for part in (half.unet, half.vae, half.text_encoder) for p in part.parameters()} == {torch.float16}
    teacher = Teacher.from_pretrained(tmp_path / "emoji-sd")
    noise = torch.randn(2, *teacher.sample_shape, generator=torch.Generator().manual_seed(0))
    latents = teacher.sample(noise, teacher.encode(["cat face", ""]), num_inference_steps=3, guidance_scale=4.0)
    assert latents.shape == (2, 4, 8, 8) and latents.isfinite().all()


def test_no_text_is_unknown_to_the_tokenizer(tmp_path):
    captions = ["cat face", "dog face", "woman’s hat", "flag of Curaçao"]
    tokenizer = emoji_sd.build_tokenizer(captions, 540)
    tokenizer.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == len(again) <= 540 and again.model_max_length == emoji_sd.MAX_TOKENS
    end = again.eos_token_id
    assert end == len(again) - 1 == again.pad_token_id  # as in CLIP, the end mark is the last token and the padding
    for caption in [*captions, *ODD]:
        ids = emoji_sd.token_ids(again, [caption])
        assert ids.shape == (1, emoji_sd.MAX_TOKENS) and torch.equal(ids, emoji_sd.token_ids(tokenizer, [caption]))
        if "<|" not in caption:
            words = ids[0, 1:][ids[0, 1:] != end]
            assert (ids[0, 1 + len(words) :] == end).all()  # none inside
    text = "🎉 שלום curaçao"
    assert again.decode(again(text).input_ids, skip_special_tokens=True).strip() == text
    assert len(again("cat face").input_ids) < len(again("zyx wvut").input_ids)  # merges were learned


def test_emoji_with_a_skin_tone_come_with_one_caption(dataset):
    emoji = emoji_sd.Emoji(str(dataset), 0)
    counts = np.bincount([image for image, _ in emoji.pairs()])
    assert counts.tolist() == [2, 2, 2, 1, 2, 2]
    assert (0, "cat face") in emoji.pairs() and (1, "dog face, twemoji style") in emoji.pairs()


def test_errors_name_the_data_set(tmp_path):
    with pytest.raises(ValueError, match=r"`dataset` must be an .npz file of captioned emoji, but .* does not exist"):
        emoji_sd.Emoji(str(tmp_path / "none.npz"), 0)
    np.savez(tmp_path / "a.npz", images=np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"lacks \['captions', 'skin_tone'"):
        emoji_sd.Emoji(str(tmp_path / "a.npz"), 0)


def test_divergence_of_a_known_posterior():
    """Mean 2 and variance 1 everywhere: 2 nats per latent element from the standard normal."""
    network = AutoencoderKL(
        sample_size=8,
        block_out_channels=(8, 8),
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=4,
    )
    torch.nn.init.zeros_(network.quant_conv.weight)
    with torch.no_grad():
        network.quant_conv.bias.copy_(torch.tensor([2.0] * 4 + [0.0] * 4))
    distiller = AutoencoderPretraining(network, kl_weight=3.0, distance=lambda a, b: (a - b).sum() * 0)
    ((name, loss),) = distiller.updates({"x0": torch.zeros(2, 3, 8, 8)}, torch.Generator().manual_seed(0))
    assert name == "student" and loss.item() == pytest.approx(6.0, rel=1e-5)


@pytest.mark.parametrize(("dropout", "expected"), [(0.0, 7), (1.0, 3)])
def test_dropped_conditions_become_the_null_condition(dropout, expected):
    seen = []

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.config = type("Config", (), {"sample_size": 4, "in_channels": 1})

        def forward(self, sample, timestep, input_ids):
            seen.append(input_ids)
            return sample * self.weight

    schedule = NoiseSchedule.from_scheduler(DDPMScheduler())
    student = Denoiser(Network(), schedule, "epsilon")
    distiller = Pretraining(student, {"input_ids": torch.full((1, 5), 3)}, dropout)
    next(distiller.updates({"x0": torch.zeros(2, 1, 4, 4), "cond": {"input_ids": torch.full((2, 5), 7)}}))
    assert (seen[0] == torch.full((2, 5), expected)).all()


def test_the_pictures_are_a_captioned_data_set_too(dataset, tmp_path):
    emoji_sd.write_data_set(str(dataset), str(tmp_path / "data"))
    emoji, written = emoji_sd.Emoji(str(dataset), 2), load_images(str(tmp_path / "data"), "test")
    assert torch.equal(written.images, emoji.images) and written.captions == emoji.captions
    assert len(load_images(str(tmp_path / "data"), "train")) == 6
