import hashlib
import io
import json
import pickle
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from conftest import training_module
from hub_server import LocalHub
from PIL import Image
from safetensors.torch import save_file
from torch_fidelity import feature_extractor_inceptionv3
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, Dinov2Config, Dinov2Model

from diffusers_onestep import OneStepPipeline
from diffusers_onestep.data import load_images
from diffusers_onestep.features import FashionCNN, InceptionV3, load_extractor
from diffusers_onestep.metrics import frechet_distance, inception_score, kernel_distance, moments, precision_recall
from diffusers_onestep.pictures import picture
from diffusers_onestep.reference import Reference

REAL_IMAGES = Path("/work/shared/data/fashion32.npz")  # only here, and only where it is


class Ours(FeatureExtractorBase):
    """One of our extractors, as torch-fidelity takes them; float64, so that no neighbour is lost to rounding."""

    extractor = None

    def __init__(self, name, features_list, **kwargs):
        super().__init__(name, features_list)

    @staticmethod
    def get_provided_features_list():
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "logits" if metric == "isc" else "features"

    def forward(self, pixels):
        both = dict(zip(("features", "logits"), self.extractor(pixels), strict=True))
        return tuple(both[name].double() for name in self.features_list)


class Pictures(torch.utils.data.Dataset):
    def __init__(self, pixels):
        self.pixels = pixels

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        return self.pixels[i]


@cache
def generated_images():
    pipe = OneStepPipeline.from_pretrained("fashion32-onestep")
    labels, generator = torch.arange(400) % 10, torch.Generator().manual_seed(0)
    return picture(pipe(class_labels=labels, generator=generator, output_type="latent").images).split(200)


def real_images():
    if not REAL_IMAGES.is_file():
        pytest.skip("no real images here")
    images = load_images(str(REAL_IMAGES), "test").images
    return images[:200], images[5000:5200]


@pytest.mark.parametrize(
    "name, sets", [("fashion", generated_images), ("fashion", real_images), ("effnet-lite0", real_images)]
)
def test_our_numbers_are_those_of_torch_fidelity(name, sets):
    a, b = sets()
    Ours.extractor = load_extractor(name)
    key = f"ours-{name}-{sets.__name__}"
    torch_fidelity.register_feature_extractor(key, Ours)
    settings = {"cuda": False, "cache": False, "verbose": False, "samples_shuffle": False, "batch_size": len(a)}
    theirs = torch_fidelity.calculate_metrics(
        input1=Pictures(a), input2=Pictures(b), feature_extractor=key, isc=True, kid=True, prc=True,
        fid=name == "fashion", kid_subsets=1, kid_subset_size=len(a), **settings,
    )  # fmt: skip
    (features, logits), (real, _) = Ours.extractor(a), Ours.extractor(b)
    ours = {"kernel_inception_distance_mean": kernel_distance(features, real)}
    ours["inception_score_mean"], ours["inception_score_std"] = inception_score(logits.double().softmax(1))
    ours["precision"], ours["recall"] = precision_recall(real, features)
    if name == "fashion":  # their eigenvalues of a general matrix of 1280 take minutes
        ours["frechet_inception_distance"] = frechet_distance(features, real)
    for key, value in ours.items():
        assert value == pytest.approx(theirs[key], rel=1e-4), key


def test_efficientnet_lite0_has_its_imagenet_weights():
    network = load_extractor("effnet-lite0")
    grey = torch.randint(0, 256, (3, 1, 20, 40), dtype=torch.uint8)
    features, logits = network(grey)
    assert features.shape == (3, 1280) and logits.shape == (3, 1000)
    in_parts = network(grey.expand(-1, 3, -1, -1), batch_size=2)[0]
    torch.testing.assert_close(in_parts, features, rtol=1e-4, atol=1e-4)
    assert network.number("FD") == "FD-EffNetLite0@64" and network.digest() == "2e472b50d8504605"
    assert not any(p.requires_grad for p in network.parameters()) and not network.training


def test_inception_takes_torch_fidelitys_weights_and_no_pickle(tmp_path, monkeypatch):
    path, other = tmp_path / "inception.pth", tmp_path / "inception.safetensors"
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    torch.manual_seed(0)
    with monkeypatch.context() as patch:  # random weights: their constructor takes no other
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        theirs = FeatureExtractorInceptionV3("any", ["2048", "logits_unbiased"], feature_extractor_weights_path=empty)
    torch.save(theirs.state_dict(), path)
    save_file(theirs.state_dict(), other)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    ours = load_extractor("inception-v3-compat", str(path))
    for got, expected in zip(ours(pixels), theirs(pixels), strict=True):
        assert torch.equal(got, expected)
    assert ours.digest() == InceptionV3(str(other)).digest()
    assert ours.number("FD") == "FD-inception-v3-compat"  # only what torch-fidelity's weights measure is called FID
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    monkeypatch.setattr(feature_extractor_inceptionv3, "URL_INCEPTION_V3", f"https://host/weights-2015-{digest}.pth")
    published = load_extractor("inception-v3-compat", str(path))
    assert [published.number(k) for k in ("FD", "KID", "IS")] == ["FID", "KID", "IS"]
    assert published.number("recall") == "recall-inception-v3-compat"
    (tmp_path / "bad.pth").write_bytes(pickle.dumps(Opens(tmp_path / "ran")))
    with pytest.raises(pickle.UnpicklingError):
        load_extractor("inception-v3-compat", str(tmp_path / "bad.pth"))
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match=r"`extractor` 'inception-v3-compat' must be given weights that can be had"):
        load_extractor("inception-v3-compat", str(tmp_path / "none.pth"))


class Opens:
    """What a malicious pickle does."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def tiny_clip(folder):
    """A random CLIP with a tokenizer of bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = alphabet + [c + "</w>" for c in alphabet] + ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(vocabulary)}, merges=[], model_max_length=77)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    tokens = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    text = {"vocab_size": len(vocabulary), "max_position_embeddings": 77, **tokens, **sizes}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(text_config=text, vision_config={"image_size": 32, "patch_size": 8, **sizes}, projection_dim=8)
    ).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def test_clip_score_is_the_cosine_of_clip(tmp_path):
    model, network = tiny_clip(tmp_path / "clip"), load_extractor("clip", str(tmp_path / "clip"))
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    prompts = ["a cat", "two dogs in the snow", "x" * 300]  # the last is cut off
    tokens = network.tokenizer(prompts, padding=True, truncation=True, max_length=77, return_tensors="pt")
    mean, std = (torch.tensor(v)[:, None, None] for v in network.normalisation)
    with torch.no_grad():
        expected = model(pixel_values=(pixels / 255 - mean) / std, **tokens)
        cosines = expected.logits_per_image.diagonal() / model.logit_scale.exp()
    torch.testing.assert_close(network.score(pixels, prompts), cosines.clamp(min=0))
    assert (cosines > 0).any() and network.number("FD") == "FD-clip@32"
    torch.testing.assert_close(torch.nn.functional.normalize(network(pixels)[0], dim=1), expected.image_embeds)
    with pytest.raises(ValueError, match="`prompts` must be one for each of 3 images"):
        network.score(pixels, prompts[:2])


def test_dinov2_of_a_folder(tmp_path):
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(tmp_path / "dino")
    network = load_extractor("dinov2", str(tmp_path / "dino"))
    features, logits = network(torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8))
    assert features.shape == (2, 16) and logits is None and network.number("KID") == "KID-dino@28"
    pixels = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8)  # of its own size
    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    model = Dinov2Model.from_pretrained(tmp_path / "dino").eval()
    with torch.no_grad():
        expected = model((pixels / 255 - mean) / std).last_hidden_state[:, 0]  # the class token, normalised
    torch.testing.assert_close(network(pixels)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision_are_taken_as_float32(tmp_path, dtype):
    tiny_clip(tmp_path / "clip").to(dtype).save_pretrained(tmp_path / "clip")
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).to(dtype).save_pretrained(tmp_path / "dinov2")
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    for name in ("clip", "dinov2"):
        network = load_extractor(name, str(tmp_path / name))
        assert network(pixels)[0].dtype == torch.float32 and len(network.digest()) == 16


def test_what_cannot_be_had_is_refused():
    with pytest.raises(ValueError, match=r"`extractor` must be one of .*'effnet-lite0'.*, but is 'vgg'"):
        load_extractor("vgg")
    with pytest.raises(ValueError, match=r"`extractor` 'dinov2' must be given weights that can be had"):
        load_extractor("dinov2", "/nowhere/at/all")
    with pytest.raises(ValueError, match=r"`extractor_weights` must be None for 'fashion'"):
        load_extractor("fashion", "file")
    with pytest.raises(ValueError, match=r"`pixels` must be uint8 .* for fashion"):
        load_extractor("fashion")(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ImportError, match=r"pip install 'diffusers-onestep\[metrics\]'"):
        load_extractor("effnet-lite0")


# references


def test_a_saved_reference_is_the_one_that_was_made(tmp_path):
    network, images = FashionCNN.from_shipped(), torch.randint(0, 256, (60, 1, 32, 32), dtype=torch.uint8)
    made = Reference.from_images(images, network, "noise")
    made.save(tmp_path / "r.safetensors", features=40)
    read = Reference.load(str(tmp_path / "r.safetensors"), network)
    assert torch.equal(read.mean, made.mean) and torch.equal(read.covariance, made.covariance)
    assert read.features.shape == (40, 128) and (read.num_images, read.source) == (60, "noise")
    drawn = torch.cdist(read.features, made.features).argmin(1)
    assert len(drawn.unique()) == 40
    torch.testing.assert_close(read.features, made.features[drawn], rtol=1e-3, atol=1e-3)
    network.fc.bias.data[0] += 1
    with pytest.raises(
        ValueError, match=r"must be that of the extractor fashion with weights .* but is that of fashion"
    ):
        Reference.load(tmp_path / "r.safetensors", network)


def test_the_script_makes_the_reference_of_a_split(tmp_path):
    images = {split: torch.randint(0, 256, (30, 32, 32), dtype=torch.uint8) for split in ("train", "test")}
    arrays = {f"images_{split}": pixels.numpy() for split, pixels in images.items()}
    labels = {f"labels_{split}": np.zeros(30, dtype=np.int64) for split in images}
    np.savez(tmp_path / "data.npz", class_names=np.array(["one"]), **arrays, **labels)
    make, network = training_module("make_reference").main, FashionCNN.from_shipped()
    given = {"dataset": str(tmp_path / "data.npz"), "split": "test", "extractor": "fashion", "extractor_weights": None}
    given |= {"resolution": None}
    make(**given, features=20, output=str(tmp_path / "r.safetensors"))
    read, features = Reference.load(tmp_path / "r.safetensors", network), network(images["test"][:, None])[0]
    for got, expected in zip((read.mean, read.covariance), moments(features), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert read.features.shape == (20, 128) and read.num_images == 30 and read.weights == network.digest()
    with pytest.raises(ValueError, match=r"`output` must end with \.safetensors"):
        make(**given, features=20, output="r.npz")
    (tmp_path / "pictures").mkdir()
    for side in (32, 64):  # of several sizes
        Image.new("L", (side, 48), side).save(tmp_path / "pictures" / f"{side}.png")
    given |= {"dataset": str(tmp_path / "pictures"), "split": "train", "resolution": 32}
    make(**given, features=20, output=str(tmp_path / "p.safetensors"))
    read = Reference.load(tmp_path / "p.safetensors", network)
    assert (read.num_images, read.source) == (2, "pictures, train, 32 x 32")
    flat = torch.tensor([32, 64], dtype=torch.uint8).reshape(2, 1, 1, 1).expand(2, 1, 32, 32)
    torch.testing.assert_close(read.mean, moments(network(flat)[0])[0], rtol=1e-5, atol=1e-6)
    for name in (tmp_path / "p.safetensors", tmp_path / "data.npz", None):
        with pytest.raises(ValueError, match="`resolution` must be None but for a data set of pictures, but is 32"):
            Reference.load(name, network, resolution=32)


def test_folders_of_local_references_are_not_published(tmp_path):
    network = FashionCNN.from_shipped()
    images = torch.zeros(3, 1, 32, 32, dtype=torch.uint8)
    np.savez(tmp_path / "adm.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
    images = {"images_test": images[:, 0].numpy(), "labels_test": np.zeros(3, dtype=np.int64)}
    np.savez(tmp_path / "set.npz", class_names=np.array(["one"]), **images)
    Reference(torch.zeros(128), torch.eye(128)).save(tmp_path / "r.safetensors")
    for name, source in (("adm.npz", "adm.npz"), ("set.npz", "set.npz, test"), ("r.safetensors", "r.safetensors")):
        assert Reference.load(tmp_path / name, network).source == source


def test_references_of_edm_and_adm_are_read_without_pickle(tmp_path):
    network = FashionCNN.from_shipped()
    images = torch.randint(0, 256, (30, 32, 32, 1), dtype=torch.uint8)
    features = network(images.permute(0, 3, 1, 2))[0]
    mean, covariance = moments(features)
    np.savez(tmp_path / "edm.npz", mu=mean.numpy(), sigma=covariance.numpy())
    edm = Reference.load(tmp_path / "edm.npz", network)
    assert torch.equal(edm.mean, mean) and edm.features is None
    # ADM's moments are of the whole data set, its images a part of it
    np.savez(tmp_path / "adm.npz", arr_0=images.numpy()[:20], mu=mean.numpy(), sigma=covariance.numpy())
    adm = Reference.load(tmp_path / "adm.npz", network)
    assert torch.equal(adm.features, features[:20]) and torch.equal(adm.mean, mean) and adm.num_images is None
    np.savez(tmp_path / "images.npz", arr_0=images.numpy())
    alone = Reference.load(tmp_path / "images.npz", network)
    assert torch.equal(alone.features, features) and torch.equal(alone.mean, mean) and alone.num_images == 30
    np.savez(tmp_path / "other.npz", arr_0=images.numpy(), mu=np.zeros(2048), sigma=np.zeros((2048, 2048)))
    with pytest.raises(ValueError, match=r"`reference` must have the 128 features of fashion, .* has \(2048,\)"):
        Reference.load(tmp_path / "other.npz", network)
    np.savez(tmp_path / "code.npz", mu=np.array([Opens(tmp_path / "ran")], dtype=object), sigma=np.zeros(1))
    with pytest.raises(ValueError, match="allow_pickle"):
        Reference.load(tmp_path / "code.npz", network)
    assert not (tmp_path / "ran").exists()
    np.savez(tmp_path / "inception.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(ValueError, match=r"`reference` must have the 128 features of fashion, .* has \(2048,\)"):
        Reference.load(tmp_path / "inception.npz", network)
    with pytest.raises(ValueError, match="never a pickle"):
        Reference.load("stats.pkl", network)
    with pytest.raises(ValueError, match="does not exist"):
        Reference.load("none.npz", network)
    with pytest.raises(ValueError, match=r"`reference` must be given for the extractor EffNetLite0@64"):
        Reference.load(None, load_extractor("effnet-lite0"))


def test_the_shipped_reference_says_what_it_is():
    reference = Reference.load(None, FashionCNN.from_shipped())
    assert reference.num_images == 10_000 and json.dumps(reference.source)
    mean, covariance = moments(reference.features)
    torch.testing.assert_close(mean, reference.mean, rtol=1e-3, atol=1e-3)  # kept in float16
    torch.testing.assert_close(covariance, reference.covariance, rtol=1e-2, atol=1e-3)


def test_a_published_reference_is_read_from_the_hub(tmp_path, monkeypatch):
    network, folder = FashionCNN.from_shipped(), tmp_path / "hub" / "someone" / "statistics"
    folder.mkdir(parents=True)
    images = torch.randint(0, 256, (20, 1, 32, 32), dtype=torch.uint8)
    made = Reference.from_images(images, network)
    made.save(folder / "noise.safetensors")
    with LocalHub(tmp_path / "hub") as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        read = Reference.load("hf://someone/statistics/noise.safetensors", network)
    assert torch.equal(read.mean, made.mean)
    with pytest.raises(ValueError, match="`reference` must be hf://"):
        Reference.load("hf://datasets/someone/file", network)
