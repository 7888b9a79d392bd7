"""Prompt embeddings and latents: computed once, kept on disk, and the text encoders let go."""

from types import SimpleNamespace

import pytest
import torch
from families import tiny_pipeline

from diffusers_onestep import Teacher
from diffusers_onestep.data import Batches, captions_of, column_of, load_rows
from diffusers_onestep.prompts import (
    CaptionedLatents,
    PromptEmbeddings,
    TensorCache,
    digest,
    read_prompts,
    text_digest,
)

ODD = ["", "a" * 10_000, "🦊🎈 fox", "قطة حمراء", "a\ttab", "x" * 300 + " مرحبا", "same", "same"]


def counting(teacher):
    calls = []
    teacher.pipeline.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_that_start_late_take_their_own_share(ranks, tmp_path, monkeypatch):
    keys = [digest(str(i)) for i in range(64)]
    written = []
    for rank in range(ranks):  # one after another: as late as can be
        cache = TensorCache(tmp_path)
        state = SimpleNamespace(
            process_index=rank, num_processes=ranks, is_main_process=False, wait_for_everyone=stop_waiting
        )
        monkeypatch.setattr("diffusers_onestep.prompts.PartialState", lambda state=state, **_: state)
        monkeypatch.setattr(
            cache, "write", lambda key, tensors, write=cache.write: written.append(key) or write(key, tensors)
        )
        with pytest.raises(Waits):
            cache.fill(keys, lambda places: [{"x": torch.zeros(1)} for _ in places], 4, "encoding")
    assert sorted(written) == sorted(keys)  # none twice, none left for all


class Waits(Exception):
    """A rank has done its share."""


def stop_waiting():
    raise Waits


def test_embeddings_are_computed_once_and_encoders_freed(tmp_path):
    teacher = Teacher(tiny_pipeline("sdxl"), resolution=16)
    expected, null = teacher.encode(["dog", "a cat"]), teacher.null_condition(2)
    calls = counting(teacher)
    samples = PromptEmbeddings(teacher, ["a cat", "dog", "a cat"], tmp_path, batch_size=1)
    assert len(calls) == 2 and len(samples) == 3
    for key, value in samples.cond([1, 2]).items():
        torch.testing.assert_close(value, expected[key])
    PromptEmbeddings(teacher, ["dog", "a cat"], tmp_path)
    assert len(calls) == 2
    assert not list(tmp_path.rglob(".*"))
    teacher.free_text_encoders()
    assert not any(p.device.type != "meta" for e in teacher.text_encoders().values() for p in e.parameters())
    assert samples.batch([0])["cond"]["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]]
    for key, value in teacher.null_condition(2).items():
        assert torch.equal(value, null[key])
    assert not null["encoder_hidden_states"].any() and not null["text_embeds"].any()  # SDXL's null are zeros
    with pytest.raises(ValueError, match="the text encoders have been freed"):
        teacher.encode(["a cat"])


def test_other_weights_are_another_encoder(tmp_path):
    first, second = (Teacher(tiny_pipeline("sd", seed=seed)) for seed in (0, 1))
    assert text_digest(first) == text_digest(Teacher(tiny_pipeline("sd", seed=0))) != text_digest(second)
    rows = [PromptEmbeddings(teacher, ["a cat"], tmp_path).cond([0]) for teacher in (first, second)]
    assert not torch.equal(rows[0]["encoder_hidden_states"], rows[1]["encoder_hidden_states"])
    name = text_digest(first)
    first.pipeline.text_encoder.half()
    assert text_digest(first) != name


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux", "pixart", "sana"])
def test_odd_captions_have_embeddings(tmp_path, family):
    teacher = Teacher(tiny_pipeline(family), resolution=32 if family == "sana" else 16)
    samples = PromptEmbeddings(teacher, ODD, tmp_path, batch_size=3)
    batch = next(iter(Batches(samples, len(ODD))))
    assert all(value.isfinite().all() for value in batch["cond"].values())
    noise = torch.randn(len(ODD), *teacher.sample_shape)
    t = torch.full((len(ODD),), 500)
    with torch.no_grad():
        assert teacher.denoiser(noise, t, batch["cond"]).isfinite().all()
        direct = teacher.encode(ODD[2:4])
    for key, value in samples.cond([2, 3]).items():
        torch.testing.assert_close(value, direct[key])


def test_null_rows_for_the_students_own_guidance(tmp_path):
    teacher = Teacher(tiny_pipeline("sdxl"), resolution=16)
    samples = PromptEmbeddings(teacher, [f"prompt {i}" for i in range(18)], tmp_path).with_null(0.1)
    assert len(samples) == 20
    rows = samples.cond([17, 18, 19])["encoder_hidden_states"]
    assert rows[0].any() and not rows[1:].any()
    assert not samples.cond([19])["encoder_hidden_states"].any()


def test_prompts_of_a_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa cat\r\n\r\n  قطة  \r\nline\u2028separator\n".encode())
    assert read_prompts(str(path)) == ["a cat", "قطة", "line\u2028separator"]
    path.write_text("\n \n")
    with pytest.raises(ValueError, match="`prompts` must have one prompt a line"):
        read_prompts(str(path))
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="`prompts` must be a UTF-8 file"):
        read_prompts(str(path))
    with pytest.raises(ValueError, match="`prompts` must be a UTF-8 file"):
        read_prompts(str(tmp_path / "none.txt"))


@pytest.fixture
def rows(tmp_path):
    import numpy as np
    from datasets import Dataset, Features, Image, Value
    from PIL import Image as Picture

    pictures = [Picture.fromarray(np.full((20, 30, 3), value, np.uint8)) for value in (0, 255)]
    features = Features({"image": Image(), "text": Value("string"), "id": Value("int64")})
    table = Dataset.from_dict({"image": pictures, "text": ["black", None], "id": [0, 1]}, features=features)
    table.save_to_disk(tmp_path / "rows")
    return load_rows(str(tmp_path / "rows"))


def test_captioned_images_as_latents(tmp_path, rows):
    teacher = Teacher(tiny_pipeline("sd3"), resolution=16)
    encoded = []
    teacher.pipeline.vae.encoder.register_forward_hook(lambda *_: encoded.append(1))
    samples = CaptionedLatents(teacher, rows, "image", "text", tmp_path / "cache")
    batch = samples.batch([1, 0])
    white = teacher.encode_images(torch.ones(1, 3, 16, 16))
    torch.testing.assert_close(batch["x0"][:1], white)
    torch.testing.assert_close(
        batch["cond"]["pooled_projections"], teacher.encode(["", "black"])["pooled_projections"]
    )
    count = len(encoded)
    CaptionedLatents(teacher, rows, "image", "text", tmp_path / "cache")
    assert len(encoded) == count
    # in latents of unit scale: the stock pipelines' (z - shift) * scale
    vae = teacher.pipeline.vae
    z = vae.encode(torch.ones(1, 3, 16, 16)).latent_dist.mode()
    torch.testing.assert_close(white, (z - vae.config.shift_factor) * vae.config.scaling_factor)
    torch.testing.assert_close(teacher.decode(white), vae.decode(z).sample, rtol=1e-4, atol=1e-4)


def test_columns_are_found_or_named(rows):
    assert column_of(rows, None, "caption_column", "string", ("caption",)) == "text"
    assert column_of(rows, None, "image_column", "image", ("picture",)) == "image"
    assert captions_of(rows, "text") == ["black", ""]
    with pytest.raises(ValueError, match=r"`caption_column` must be a column of .*'text'.* but is 'words'"):
        column_of(rows, "words", "caption_column", "string", ())
