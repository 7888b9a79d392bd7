import json
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run, run_script, script, training_module

from diffusers_onestep.data import (
    Batches,
    Conditions,
    LabelledImages,
    _in_memory,
    load_images,
    load_pairs,
    write_pairs,
)

IMAGES = LabelledImages(torch.arange(10, dtype=torch.uint8).reshape(10, 1, 1, 1), torch.arange(10))


def labels_of(batches, ranks, rank, accumulation, step, count):
    accelerator = SimpleNamespace(num_processes=ranks, process_index=rank)
    stream = batches.start(step, accelerator, accumulation)
    return [next(stream)["cond"]["class_labels"].tolist() for _ in range(count)]


def test_an_epoch_holds_every_sample_once_and_epochs_differ():
    rows = labels_of(Batches(IMAGES, 5), 1, 0, 1, 0, 4)
    assert sorted(rows[0] + rows[1]) == list(range(10)) == sorted(rows[2] + rows[3])
    assert rows[:2] != rows[2:]


def test_the_global_batch_does_not_depend_on_how_it_is_split():
    whole = labels_of(Batches(IMAGES, 4), 1, 0, 1, 0, 3)
    by_rank = [labels_of(Batches(IMAGES, 2), 2, rank, 1, 0, 3) for rank in (0, 1)]
    accumulated = labels_of(Batches(IMAGES, 2), 1, 0, 2, 0, 6)
    for step in range(3):
        assert by_rank[0][step] + by_rank[1][step] == whole[step]
        assert accumulated[2 * step] + accumulated[2 * step + 1] == whole[step]


def test_any_step_can_be_started():
    batches = Batches(IMAGES, 3, seed=4)
    assert labels_of(batches, 1, 0, 2, 5, 2) == labels_of(Batches(IMAGES, 3, seed=4), 1, 0, 2, 0, 12)[10:]


def test_the_seed_sets_the_order():
    first, again, other = (labels_of(Batches(IMAGES, 10, seed=seed), 1, 0, 1, 0, 1) for seed in (4, 4, 5))
    assert first == again != other


def test_conditions():
    assert Conditions().batch([0, 0]) == {"cond": {}}
    batch = Conditions({"class_labels": torch.arange(3)}).batch([2, 0])
    assert batch["cond"]["class_labels"].tolist() == [2, 0]


def test_images_come_in_minus_one_to_one():
    x0 = LabelledImages(torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1), None).batch([0, 1])["x0"]
    assert x0.flatten().tolist() == [-1.0, 1.0]


def test_load_npz(tmp_path):
    path = str(tmp_path / "a.npz")
    images = np.zeros((3, 8, 8), np.uint8)
    np.savez(path, images_train=images, labels_train=np.array([0, 1, 0]), class_names=np.array(["a", "b"]))
    loaded = load_images(path)
    assert loaded.images.shape == (3, 1, 8, 8) and loaded.names == ["a", "b"] and len(loaded) == 3
    with pytest.raises(ValueError, match=r"`dataset` must hold `images_test`"):
        load_images(path, "test")
    with pytest.raises(ValueError, match=r"does not exist"):
        load_images(str(tmp_path / "b.npz"))


def test_the_recipes_pad_what_their_network_can_not_halve(tmp_path, capsys):
    """Fashion-MNIST as it is on the Hub has 28 pixels on a side; the shipped teacher's were padded to 32."""
    named = {"labels_train": [0, 1], "class_names": ["a", "b"]}
    with pytest.raises(ValueError, match="`resolution` must be at least 1, but is 0"):
        load_images(str(tmp_path), resolution=0)
    np.savez(tmp_path / "a.npz", images_train=np.full((2, 28, 28), 255, np.uint8), **named)
    np.savez(tmp_path / "b.npz", images_train=np.zeros((2, 32, 24), np.uint8), **named)
    flags = ["--output_dir", tmp_path / "out", "--train_batch_size", 2, "--max_train_steps", 1, "--dataset"]
    run_script("train_teacher", *flags, tmp_path / "a.npz")
    assert "padded with black to 32x32" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "unet" / "config.json").read_text())["sample_size"] == 32
    with pytest.raises(ValueError, match=r"`dataset` must hold square images, but those of .* are 32x24"):
        run_script("train_teacher", *flags, tmp_path / "b.npz")


def test_images_of_many_sizes_need_a_resolution(tmp_path):
    from PIL import Image

    for side in (8, 16):
        Image.new("L", (side, side)).save(tmp_path / f"{side}.png")
    with pytest.raises(
        ValueError, match=r"`dataset` must hold images of one size, but .* has \(16, 16\) and \(8, 8\) \(height, w"
    ):
        load_images(str(tmp_path))
    assert load_images(str(tmp_path), resolution=8).images.shape == (2, 1, 8, 8)
    # a photograph on its side: of 32 x 16 pixels the middle 16 are red, and stay
    wide = Image.new("RGB", (32, 16))
    wide.paste((204, 0, 0), (8, 0, 24, 16))
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was
    wide.save(tmp_path / "wide.png", exif=turned)
    images = load_images(str(tmp_path), resolution=8).images
    assert images.shape == (3, 3, 8, 8)  # grey ones beside coloured ones
    assert (images[2, :, 2:6].int() - torch.tensor([204, 0, 0]).reshape(3, 1, 1)).abs().max() <= 2
    with pytest.raises(ValueError, match="`resolution` must be at least 1, but is 0"):
        load_images(str(tmp_path), resolution=0)
    np.savez(tmp_path / "a.npz", images_train=np.zeros((1, 8, 8), np.uint8), labels_train=[0], class_names=["a"])
    with pytest.raises(ValueError, match=r"`resolution` must be None for the \.npz file"):
        load_images(str(tmp_path / "a.npz"), resolution=8)


def test_pictures_are_held_once():
    from PIL import Image

    def pictures():
        for value in range(200):
            yield Image.new("RGB", (64, 64), (value, 0, 255 - value)) if value else Image.new("L", (64, 64), 7)

    tracemalloc.start()  # it sees NumPy's arrays, which were all of the pictures a second time; PyTorch's it does not
    images = _in_memory(pictures(), 200, "some")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert images[:, :, 5, 5].tolist() == [[7, 7, 7]] + [[value, 0, 255 - value] for value in range(1, 200)]
    assert peak < images.numel() / 5


def test_palettes_are_shown_as_their_colours(tmp_path):
    from PIL import Image

    colours = Image.new("RGB", (8, 8), (0, 204, 51))
    for number, picture in enumerate([colours, colours.convert("P"), colours.convert("RGBA")]):
        picture.save(tmp_path / f"{number}.png")
    images = load_images(str(tmp_path)).images
    Image.new("L", (8, 8), 7).save(tmp_path / "3.png")  # grey among colour
    assert load_images(str(tmp_path)).images[3].unique().tolist() == [7]
    assert images.shape == (3, 3, 8, 8) and (images[:, :, 0, 0] == torch.tensor([0, 204, 51])).all()


def test_the_first_of_several_captions_is_the_image_s(tmp_path):
    from datasets import Dataset
    from PIL import Image

    image = Image.new("L", (8, 8))
    columns = {"image": [image] * 3, "caption": ["other"] * 3, "text": [["a", "b"], [], ["c"]]}
    Dataset.from_dict(columns).save_to_disk(tmp_path / "rows")
    assert load_images(str(tmp_path / "rows")).captions == ["a", "", "c"]


def test_pairs_replay_the_teachers_solver(tmp_path, teacher_folder):
    """What `make_pairs.py` stores is what the deterministic solver makes of the stored noise."""
    from diffusers_onestep import Teacher

    output = tmp_path / "pairs"
    flags = {"pretrained_teacher_model": teacher_folder, "output_dir": output, "num_pairs": 5, "batch_size": 2}
    flags |= {"num_inference_steps": 4}
    run(script("make_pairs.py", *(part for k, v in flags.items() for part in (f"--{k}", v))))
    pairs = load_pairs(str(output))
    assert len(pairs) == 5
    batch = pairs.batch([4, 1])
    assert batch["noise"].shape == (2, 1, 16, 16) and batch["cond"]["class_labels"].tolist() == [1, 1]
    target = Teacher.from_pretrained(teacher_folder).sample(batch["noise"], batch["cond"], num_inference_steps=4)
    torch.testing.assert_close(batch["target"], target, rtol=1e-4, atol=1e-4)


def test_pairs_are_never_overwritten_and_must_be_pairs(tmp_path):
    row = {"noise": torch.zeros(1, 2, 2), "target": torch.ones(1, 2, 2)}
    write_pairs(iter([row]), tmp_path / "p", (1, 2, 2))
    assert load_pairs(str(tmp_path / "p")).batch([0])["target"].sum() == 4
    with pytest.raises(ValueError, match=r"`output_dir` must not exist yet"):
        write_pairs(iter([row]), tmp_path / "p", (1, 2, 2))
    from datasets import Dataset

    Dataset.from_dict({"noise": [1]}).save_to_disk(tmp_path / "q")
    with pytest.raises(ValueError, match=r"lacks \['target'\]"):
        load_pairs(str(tmp_path / "q"))


def test_data_are_built_from_packages():
    """Pixels on white and halved, captions and concepts; the whole is compared with digests when it is fetched."""
    from PIL import Image

    fetch = training_module("fetch_data")
    half = Image.new("RGBA", (64, 64), (0, 100, 200, 51))  # a fifth
    assert fetch.on_white(half)[0, 0].tolist() == [204, 224, 244]
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:2, :2, 0] = [[10, 11], [12, 13]]
    assert fetch.halved(pixels)[0, 0].tolist() == [12, 0, 0] and fetch.halved(pixels).shape == (32, 32, 3)
    with pytest.raises(ValueError, match=r"must be of 64 x 64 pixels, but one is of \(8, 8, 3\)"):
        fetch.halved(pixels[:8, :8])
    train = {"name": "Steam Locomotive", "short_name": "train2", "category": "Travel & Places"}
    assert fetch.caption_of(train) == "steam locomotive, train"
    assert fetch.caption_of({"name": "Chad Flag", "short_name": "flag-td", "category": "Flags"}) == "flag of Chad"
    assert fetch.concept_of("1F469-1F3FB-200D-1F680") == fetch.concept_of("1F468-200D-1F680") == "1F680"
    assert fetch.concept_of("1F466") == "people-alone" and fetch.concept_of("1F468-200D-1F467") == "people-family"
    entry = train | {"unified": "1F44B", "short_names": ["wave"], "subcategory": "hands"}
    assert [fetch.described(entry, tones)["skin_tone"] for tones in ("", "1F3FB", "1F3FB-1F3FF")] == [0, 1, 6]
    assert fetch.described(entry, "1F3FB-1F3FF")["captions"].endswith(", mixed skin tones")


def test_idx_files_are_read(tmp_path):
    import gzip
    import struct

    read = training_module("fetch_data").read_idx
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"\0\0\x08\x02" + struct.pack(">2I", 2, 3) + bytes(range(6))))
    assert read(tmp_path / "a.gz").tolist() == [[0, 1, 2], [3, 4, 5]]
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"\0\0\x0d\x01" + struct.pack(">I", 1) + bytes(4)))
    with pytest.raises(ValueError, match="must be an IDX file of unsigned bytes"):
        read(tmp_path / "b.gz")
