"""The networks of EDM (Karras et al. 2022, arXiv:2206.00364): DDPM++, NCSN++ and ADM.

Names of parameters are those of the published checkpoints, without their prefix `model.`.
"""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

# what an architecture's name stands for
ARCHITECTURES = {
    "ddpmpp": {"embedding": "positional", "encoder": "standard", "noise_channels": 1, "taps": (1, 1)},
    "ncsnpp": {"embedding": "fourier", "encoder": "residual", "noise_channels": 2, "taps": (1, 3, 3, 1)},
    "adm": {"embedding": "positional", "encoder": "standard", "noise_channels": 1, "taps": (1, 1)},
}


def resample(x: torch.Tensor, kernel: torch.Tensor, *, up: bool = False, padding: int | None = None) -> torch.Tensor:
    """`x` `(B, C, H, W)` at half the resolution, or twice with `up`, by a smoothing `kernel` `(1, 1, L, L)` of sum 1
    and zero padding."""
    if kernel.shape[-1] == 2:  # the box: pooling and doubling
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if up else F.avg_pool2d(x, 2)
    channels = x.shape[1]
    padding = (kernel.shape[-1] - 1) // 2 if padding is None else padding
    kernel = kernel.to(x.dtype).expand(channels, 1, -1, -1)
    if up:
        return F.conv_transpose2d(x, 4 * kernel, stride=2, padding=padding, groups=channels)
    return F.conv2d(x, kernel, stride=2, padding=padding, groups=channels)


def resample_kernel(taps: tuple[int, ...]) -> torch.Tensor:
    """The separable kernel `(1, 1, L, L)` of 1-D taps, of sum 1."""
    taps = torch.tensor(taps, dtype=torch.float32)
    return (taps[:, None] * taps / taps.sum() ** 2)[None, None]


class Resample2d(nn.Module):
    """Resampling by `taps`, twice as large with `up`, else half."""

    def __init__(self, taps: tuple[int, ...], *, up: bool):
        super().__init__()
        self.up = up
        self.register_buffer("resample_filter", resample_kernel(taps), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return resample(x, self.resample_filter, up=self.up)


def convolution(in_channels: int, out_channels: int, kernel_size: int, padding: int = 0) -> nn.Conv2d:
    """A convolution that keeps the resolution, or adds `padding` pixels more on all sides, at its initial weights."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2 + padding)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="linear")
    nn.init.zeros_(conv.bias)
    return conv


def group_norm(channels: int, eps: float) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 4), channels, eps=eps)


def attention(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    """Self-attention over the positions of `qkv` `(B, 3 C, H, W)`, whose channel `(head * d + c) * 3 + j` is channel
    `c` of query, key or value `j`; returns `(B, C, H, W)`."""
    batch, _, height, width = qkv.shape
    q, k, v = qkv.reshape(batch, heads, -1, 3, height * width).permute(3, 0, 1, 4, 2)
    out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(2, 3).reshape(batch, -1, height, width)


class EDMUNetBlock(nn.Module):
    """A residual block with the embedding between its convolutions, and attention after it if there are `heads`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        adm: bool,
        heads: int,
        dropout: float,
        mode: str | None = None,
        taps: tuple[int, ...] = (1, 1),
    ):
        super().__init__()
        self.adm, self.heads, self.dropout = adm, heads, dropout
        self.scale = 1.0 if adm else 0.5**0.5
        eps = 1e-5 if adm else 1e-6
        self.norm0 = group_norm(in_channels, eps)
        self.resample = Resample2d(taps, up=mode == "up") if mode is not None else None
        self.conv0 = convolution(in_channels, out_channels, 3)
        self.affine = nn.Linear(emb_channels, out_channels * (2 if adm else 1))
        self.norm1 = group_norm(out_channels, eps)
        self.conv1 = convolution(out_channels, out_channels, 3)
        self.skip = None
        # ADM resamples the skip path without a convolution
        if in_channels != out_channels or (mode is not None and not adm):
            self.skip = convolution(in_channels, out_channels, 1)
        if heads:
            self.norm2 = group_norm(out_channels, eps)
            self.qkv = convolution(out_channels, 3 * out_channels, 1)
            self.proj = convolution(out_channels, out_channels, 1)
        for last in (self.conv1, *([self.proj] if heads else [])):
            nn.init.normal_(last.weight, std=1e-5)  # blocks start as identities

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        h = F.silu(self.norm0(x))
        if self.resample is not None:
            x, h = self.resample(x), self.resample(h)
        h = self.conv0(h)
        style = self.affine(emb)[:, :, None, None]
        if self.adm:
            scale, shift = style.chunk(2, dim=1)
            h = F.silu(torch.addcmul(shift, self.norm1(h), 1 + scale))
        else:
            h = F.silu(self.norm1(h + style))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = self.scale * (h + (x if self.skip is None else self.skip(x)))
        if self.heads:
            x = self.scale * (x + self.proj(attention(self.qkv(self.norm2(x)), self.heads)))
        return x


class PositionalEmbedding(nn.Module):
    """`[cos(c * f), sin(c * f)]` with `f_i = 10000**(-i / (channels / 2 - shift))`."""

    def __init__(self, channels: int, shift: int):
        super().__init__()
        self.channels, self.shift = channels, shift

    def forward(self, c: torch.Tensor) -> torch.Tensor:
        half = self.channels // 2
        index = torch.arange(half, dtype=c.dtype, device=c.device)
        angle = torch.outer(c, (1 / 10000) ** (index / (half - self.shift)))
        return torch.cat([angle.cos(), angle.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """`[cos(2 pi f c), sin(2 pi f c)]` with frequencies drawn once, which belong to the weights."""

    def __init__(self, channels: int, scale: float = 16.0):
        super().__init__()
        self.register_buffer("freqs", scale * torch.randn(channels // 2))

    def forward(self, c: torch.Tensor) -> torch.Tensor:
        angle = torch.outer(c, (2 * torch.pi * self.freqs).to(c.dtype))
        return torch.cat([angle.cos(), angle.sin()], dim=1)


def label_vectors(class_labels: torch.Tensor | None, classes: int, like: torch.Tensor) -> torch.Tensor:
    """Labels `(B,)` as one-hot rows, `(B, classes)` rows as they are, and None as zeros, in dtype and batch size of
    `like`."""
    if class_labels is None:
        return like.new_zeros(like.shape[0], classes)
    if class_labels.ndim == 1:
        try:  # torch looks at labels on the CPU; to look at others would wait for their device
            return F.one_hot(class_labels.long(), classes).to(like.dtype)
        except RuntimeError as error:
            if "Class values" not in str(error):
                raise
            least, largest = (value.item() for value in class_labels.aminmax())
            raise ValueError(f"`class_labels` must be in 0..{classes - 1}, but are {least} to {largest}.") from error
    if tuple(class_labels.shape) != (like.shape[0], classes):
        raise ValueError(
            f"`class_labels` must have shape ({like.shape[0]},) or ({like.shape[0]}, {classes}), but have "
            f"{tuple(class_labels.shape)}."
        )
    return class_labels.to(like.dtype)


def noise_vector(timestep: torch.Tensor | float | int, sample: torch.Tensor) -> torch.Tensor:
    """`timestep` as `(B,)`, in float64 for float64 samples, else in float32."""
    dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
    return torch.as_tensor(timestep, device=sample.device).to(dtype).reshape(-1).expand(sample.shape[0])


class FloatEmbeddingMixin(ModelMixin):
    """A model whose embeddings stay in float32 where the rest is in half precision, and in float64 follow it."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with `output_loading_info`
        if model.dtype == torch.float64:  # diffusers keeps `_keep_in_fp32_modules` from growing too
            nn.Module.to(model, torch.float64)
        return loaded


class EDMUNet2DModel(FloatEmbeddingMixin, ConfigMixin):
    r"""
    The U-Nets of EDM, for images and latents. Its output is the `F` of Karras et al. 2022, Eq. 7, for an input that is
    scaled already (by `c_in`) at a timestep `c_noise`: `x0 = c_skip * x_t + c_out * F(c_in * x_t, c_noise)`.

    Parameters:
        sample_size (`int`, *optional*, defaults to `32`): Height and width; resolutions are counted from it.
        in_channels (`int`, *optional*, defaults to `3`): Channels of the input.
        out_channels (`int`, *optional*, defaults to `3`): Channels of the output; twice as many with a learned
            variance.
        architecture (`str`, *optional*, defaults to `"ddpmpp"`): `"ddpmpp"` (DDPM++, the "vp" files), `"ncsnpp"`
            (NCSN++, the "ve" files) or `"adm"` (Dhariwal & Nichol 2021).
        model_channels (`int`, *optional*, defaults to `128`): What all widths are multiples of.
        channel_mult (`tuple[float]`, *optional*, defaults to `(2, 2, 2)`): Width of each level.
        channel_mult_emb (`int`, *optional*, defaults to `4`): Width of the embedding.
        layers_per_block (`int`, *optional*, defaults to `4`): Residual blocks per level; the decoder has one more.
        attention_resolutions (`tuple[int]`, *optional*, defaults to `(16,)`): Resolutions whose blocks attend.
        num_attention_heads (`int`, *optional*): Heads of every block that attends; by default 1, for ADM one per 64
            channels.
        dropout (`float`, *optional*, defaults to `0.0`): In the residual blocks.
        num_class_embeds (`int`, *optional*): Number of class labels.
        augment_dim (`int`, *optional*, defaults to `0`): Length of the augmentation labels.
        embedding_type (`str`, *optional*): `"positional"` or `"fourier"`; by default the architecture's, as are the
            next three.
        channel_mult_noise (`int`, *optional*): Width of the noise embedding.
        encoder_type (`str`, *optional*): `"standard"`, `"residual"` or `"skip"`.
        resample_filter (`tuple[int]`, *optional*): Taps of the resampling, `(1, 1)` or `(1, 3, 3, 1)`.
        decoder_type (`str`, *optional*, defaults to `"standard"`): `"standard"` or `"skip"`.
        id2label (`dict[int, str]`, *optional*): Names of the labels.
    """

    _supports_gradient_checkpointing = True
    _keep_in_fp32_modules = ["map_noise", "map_label", "map_augment", "map_layer0", "map_layer1"]
    _repeated_blocks = ["EDMUNetBlock"]
    _no_split_modules = ["EDMUNetBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        out_channels: int = 3,
        architecture: str = "ddpmpp",
        model_channels: int = 128,
        channel_mult: tuple[float, ...] = (2, 2, 2),
        channel_mult_emb: int = 4,
        layers_per_block: int = 4,
        attention_resolutions: tuple[int, ...] = (16,),
        num_attention_heads: int | None = None,
        dropout: float = 0.0,
        num_class_embeds: int | None = None,
        augment_dim: int = 0,
        embedding_type: str | None = None,
        channel_mult_noise: int | None = None,
        encoder_type: str | None = None,
        resample_filter: tuple[int, ...] | None = None,
        decoder_type: str = "standard",
        id2label: dict[int, str] | None = None,
    ):
        super().__init__()
        if architecture not in ARCHITECTURES:
            raise ValueError(f"`architecture` must be one of {sorted(ARCHITECTURES)}, but is {architecture!r}.")
        named = ARCHITECTURES[architecture]
        embedding_type = embedding_type or named["embedding"]
        encoder_type = encoder_type or named["encoder"]
        noise_channels = model_channels * (channel_mult_noise or named["noise_channels"])
        taps = tuple(resample_filter or named["taps"])
        for key, value, allowed in (
            ("embedding_type", embedding_type, ("positional", "fourier")),
            ("encoder_type", encoder_type, ("standard", "residual", "skip")),
            ("decoder_type", decoder_type, ("standard", "skip")),
            ("resample_filter", taps, ((1, 1), (1, 3, 3, 1))),
        ):
            if value not in allowed:
                raise ValueError(f"`{key}` must be one of {allowed}, but is {value!r}.")
        if sample_size % 2 ** (len(channel_mult) - 1):
            raise ValueError(
                f"`sample_size` must be divisible by {2 ** (len(channel_mult) - 1)} for {len(channel_mult)} levels, "
                f"but is {sample_size}."
            )
        self.adm = adm = architecture == "adm"
        if adm and (embedding_type, encoder_type, decoder_type, taps) != (
            "positional",
            "standard",
            "standard",
            (1, 1),
        ):
            raise ValueError("`architecture` 'adm' must have its own embedding, encoder, decoder and resampling.")
        self.encoder_type, self.decoder_type = encoder_type, decoder_type
        self.gradient_checkpointing = False
        self.register_buffer("aux_kernel", resample_kernel(taps), persistent=False)
        emb_channels = model_channels * channel_mult_emb
        widths = [int(model_channels * mult) for mult in channel_mult]
        sizes = [sample_size >> level for level in range(len(widths))]

        def heads(channels: int) -> int:
            return num_attention_heads or (channels // 64 if adm else 1)

        def block(c_in: int, c_out: int, attend: bool = False, mode: str | None = None) -> EDMUNetBlock:
            number = heads(c_out) if attend else 0
            kind = {"adm": adm, "heads": number, "dropout": dropout, "mode": mode, "taps": taps}
            return EDMUNetBlock(c_in, c_out, emb_channels, **kind)

        # embeddings of noise level, augmentation and label
        if embedding_type == "positional":
            self.map_noise = PositionalEmbedding(noise_channels, shift=0 if adm else 1)
        else:
            self.map_noise = FourierEmbedding(noise_channels)
        self.map_label = None
        if num_class_embeds:
            self.map_label = nn.Linear(num_class_embeds, emb_channels if adm else noise_channels, bias=not adm)
        self.map_augment = nn.Linear(augment_dim, noise_channels, bias=False) if augment_dim else None
        self.map_layer0 = nn.Linear(noise_channels, emb_channels)
        self.map_layer1 = nn.Linear(emb_channels, emb_channels)

        # encoder
        self.enc = nn.ModuleDict()
        current, aux = in_channels, in_channels
        pushed = []
        for level, (size, width) in enumerate(zip(sizes, widths, strict=True)):
            name = f"{size}x{size}"
            if level == 0:
                current = width if adm else model_channels
                self.enc[f"{name}_conv"] = convolution(in_channels, current, 3)
            else:
                self.enc[f"{name}_down"] = block(current, current, mode="down")
                if encoder_type == "skip":
                    self.enc[f"{name}_aux_down"] = Resample2d(taps, up=False)
                    self.enc[f"{name}_aux_skip"] = convolution(aux, current, 1)
                elif encoder_type == "residual":
                    self.enc[f"{name}_aux_residual"] = convolution(aux, current, 3, padding=(len(taps) - 1) // 2)
                    aux = current
            pushed.append(current)
            for i in range(layers_per_block):
                self.enc[f"{name}_block{i}"] = block(current, width, size in attention_resolutions)
                current = width
                pushed.append(current)

        # decoder
        self.dec = nn.ModuleDict()
        eps = 1e-5 if adm else 1e-6
        for level in reversed(range(len(widths))):
            name, width = f"{sizes[level]}x{sizes[level]}", widths[level]
            if level == len(widths) - 1:
                self.dec[f"{name}_in0"] = block(current, current, attend=True)
                self.dec[f"{name}_in1"] = block(current, current)
            else:
                self.dec[f"{name}_up"] = block(current, current, mode="up")
            for i in range(layers_per_block + 1):
                attend = sizes[level] in attention_resolutions and (adm or i == layers_per_block)
                self.dec[f"{name}_block{i}"] = block(current + pushed.pop(), width, attend)
                current = width
            if not adm and (decoder_type == "skip" or level == 0):
                if decoder_type == "skip" and level < len(widths) - 1:
                    self.dec[f"{name}_aux_up"] = Resample2d(taps, up=True)
                self.dec[f"{name}_aux_norm"] = group_norm(current, eps)
                self.dec[f"{name}_aux_conv"] = convolution(current, out_channels, 3)
        if adm:
            self.out_norm = group_norm(current, eps)
            self.out_conv = convolution(current, out_channels, 3)

    def embed(
        self, c_noise: torch.Tensor, class_labels: torch.Tensor | None, augment_labels: torch.Tensor | None
    ) -> torch.Tensor:
        """The vector `(B, emb)` that modulates every block, at noise levels `c_noise` `(B,)`."""
        emb = self.map_noise(c_noise).to(self.map_layer0.weight.dtype)
        if not self.adm:
            emb = torch.cat(emb.chunk(2, dim=1)[::-1], dim=1)  # [sin, cos]
            if self.map_label is not None:
                labels = label_vectors(class_labels, self.map_label.in_features, emb)
                emb = emb + self.map_label(labels * self.map_label.in_features**0.5)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels.to(emb.dtype))
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.adm and self.map_label is not None:
            emb = emb + self.map_label(label_vectors(class_labels, self.map_label.in_features, emb))
        return F.silu(emb)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """
        Args:
            sample (`torch.Tensor`): `c_in * x_t`, `(B, C, H, W)`.
            timestep (`torch.Tensor` or `float`): `c_noise`, `(B,)` or one number: `ln(sigma) / 4` for EDM.
            class_labels (`torch.Tensor`, *optional*): `(B,)` ids or `(B, num_class_embeds)` rows; zeros if not given.
            augment_labels (`torch.Tensor`, *optional*): `(B, augment_dim)`; zeros if not given.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return a [`UNet2DOutput`].
        """
        with torch.autocast(sample.device.type, enabled=False):
            emb = self.embed(noise_vector(timestep, sample), class_labels, augment_labels)
        dtype = next(self.enc.parameters()).dtype  # embeddings may have another one
        sample, emb = sample.to(dtype), emb.to(dtype)
        sample = self.decode(*self.encode(sample, emb), emb)
        return UNet2DOutput(sample=sample) if return_dict else (sample,)

    def encode(self, x: torch.Tensor, emb: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The bottleneck and what the decoder takes from every layer."""
        skips, aux = [], x
        for name, layer in self.enc.items():
            if name.endswith("_aux_down"):
                aux = layer(aux)
            elif name.endswith("_aux_skip"):
                x = skips[-1] = x + layer(aux)
            elif name.endswith("_aux_residual"):
                # convolved at the full resolution, with the padding that resampling leaves out
                aux = resample(layer(aux), self.aux_kernel, padding=0)
                x = skips[-1] = aux = (x + aux) * 0.5**0.5
            else:
                x = self._run(layer, x, emb)
                skips.append(x)
        return x, skips

    def decode(self, x: torch.Tensor, skips: list[torch.Tensor], emb: torch.Tensor) -> torch.Tensor:
        """The output of the bottleneck `x` and the encoder's `skips`."""
        image = None
        for name, layer in self.dec.items():
            if name.endswith("_aux_up"):
                image = layer(image)
            elif name.endswith("_aux_norm"):
                normed = layer(x)
            elif name.endswith("_aux_conv"):
                output = layer(F.silu(normed))
                image = output if image is None else image + output
            else:
                if "_block" in name:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = self._run(layer, x, emb)
        return self.out_conv(F.silu(self.out_norm(x))) if self.adm else image

    def _run(self, layer: nn.Module, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        if not isinstance(layer, EDMUNetBlock):
            return layer(x)
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(layer, x, emb)
        return layer(x, emb)
