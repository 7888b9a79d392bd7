"""The magnitude-preserving networks of EDM2 (Karras et al. 2024, arXiv:2312.02696).

Names of parameters are those of the published checkpoints, without their prefix `unet.`.
"""

import math

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from .unet_edm import FloatEmbeddingMixin, label_vectors, noise_vector, resample, resample_kernel


def normalize(x: torch.Tensor, dim: int | tuple[int, ...], eps: float = 1e-4) -> torch.Tensor:
    """`x` with a root mean square of (almost) 1 over `dim`: Karras et al. 2024, Eq. 47; norms in float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=dtype)
    return x / (eps + norm * math.sqrt(norm.numel() / x.numel())).to(x.dtype)


def mp_silu(x: torch.Tensor) -> torch.Tensor:
    """`silu(x) / 0.596` (Karras et al. 2024, Eq. 81)."""
    return F.silu(x) / 0.596


def mp_sum(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """`((1 - t) a + t b) / sqrt((1 - t)**2 + t**2)` (Karras et al. 2024, Eq. 88)."""
    return ((1 - t) * a + t * b) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """Channels of `a` and `b`, weighted to contribute `1 - t` and `t` (Karras et al. 2024, Eq. 103)."""
    n_a, n_b = a.shape[1], b.shape[1]
    scale = math.sqrt((n_a + n_b) / ((1 - t) ** 2 + t**2))
    return torch.cat([scale * (1 - t) / math.sqrt(n_a) * a, scale * t / math.sqrt(n_b) * b], dim=1)


class MPConv(nn.Module):
    """A convolution (or, with `kernel_size` 0, a linear layer) without bias whose weight is normalised per output
    channel before use; in training the stored weight is replaced by its normalised value (Karras et al. 2024,
    Algorithm 1)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__()
        kernel = (kernel_size, kernel_size) if kernel_size else ()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *kernel))

    def forward(self, x: torch.Tensor, gain: torch.Tensor | float = 1.0) -> torch.Tensor:
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        dims = tuple(range(1, weight.ndim))
        if self.training:
            with torch.no_grad():
                self.weight.copy_(normalize(weight, dims))
            weight = self.weight.to(weight.dtype)
        weight = normalize(weight, dims) * (gain / math.sqrt(weight[0].numel()))
        weight = weight.to(x.dtype)
        return F.linear(x, weight) if weight.ndim == 2 else F.conv2d(x, weight, padding=weight.shape[-1] // 2)


class MPFourier(nn.Module):
    """`sqrt(2) cos(c * freqs + phases)`: random features, drawn once, which belong to the weights."""

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("freqs", 2 * torch.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * torch.pi * torch.rand(channels))

    def forward(self, c: torch.Tensor) -> torch.Tensor:
        return math.sqrt(2) * (torch.outer(c, self.freqs.to(c.dtype)) + self.phases.to(c.dtype)).cos()


class EDM2UNetBlock(nn.Module):
    """A magnitude-preserving residual block of the encoder or the decoder, with attention if there are `heads`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        decoder: bool,
        heads: int,
        dropout: float,
        mode: str | None,
        balances: tuple[float, float],
        clip: float,
    ):
        super().__init__()
        self.decoder, self.heads, self.dropout, self.mode, self.clip = decoder, heads, dropout, mode, clip
        self.res_balance, self.attn_balance = balances
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(in_channels if decoder else out_channels, out_channels, 3)
        self.emb_linear = MPConv(emb_channels, out_channels, 0)
        self.conv_res1 = MPConv(out_channels, out_channels, 3)
        self.conv_skip = MPConv(in_channels, out_channels, 1) if in_channels != out_channels else None
        if heads:
            self.attn_qkv = MPConv(out_channels, 3 * out_channels, 1)
            self.attn_proj = MPConv(out_channels, out_channels, 1)
        if mode is not None:
            self.register_buffer("resample_filter", resample_kernel((1, 1)), persistent=False)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        if self.mode is not None:
            x = resample(x, self.resample_filter, up=self.mode == "up")
        if not self.decoder:
            x = normalize(x if self.conv_skip is None else self.conv_skip(x), dim=1)
        y = self.conv_res0(mp_silu(x))
        style = self.emb_linear(emb, gain=self.emb_gain) + 1
        y = mp_silu(y * style[:, :, None, None].to(y.dtype))
        y = self.conv_res1(F.dropout(y, self.dropout, self.training))
        if self.decoder and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, y, self.res_balance)
        if self.heads:
            x = mp_sum(x, self.attn_proj(self.attention(self.attn_qkv(x))), self.attn_balance)
        return x.clamp(-self.clip, self.clip)

    def attention(self, qkv: torch.Tensor) -> torch.Tensor:
        """Cosine attention; channels of `qkv` lie as in `unet_edm.attention`."""
        batch, _, height, width = qkv.shape
        qkv = normalize(qkv.reshape(batch, self.heads, -1, 3, height * width), dim=2)
        q, k, v = qkv.permute(3, 0, 1, 4, 2)
        out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(2, 3).reshape(batch, -1, height, width)


class EDM2UNet2DModel(FloatEmbeddingMixin, ConfigMixin):
    r"""
    The U-Net of EDM2. Its output is the `F` of Karras et al. 2022, Eq. 7, for an input `c_in * x_t` and a timestep
    `c_noise = ln(sigma) / 4`, as in [`EDMUNet2DModel`].

    In training mode a forward pass normalises the stored weights; in eval mode nothing is changed.

    Parameters:
        sample_size (`int`, *optional*, defaults to `64`): Height and width; resolutions are counted from it.
        in_channels (`int`, *optional*, defaults to `4`): Channels of the input.
        out_channels (`int`, *optional*, defaults to `4`): Channels of the output.
        model_channels (`int`, *optional*, defaults to `192`): What all widths are multiples of.
        channel_mult (`tuple[int]`, *optional*, defaults to `(1, 2, 3, 4)`): Width of each level.
        channel_mult_noise (`int`, *optional*): Width of the noise embedding; by default that of the first level.
        channel_mult_emb (`int`, *optional*): Width of the embedding; by default that of the widest level.
        layers_per_block (`int`, *optional*, defaults to `3`): Residual blocks per level; the decoder has one more.
        attention_resolutions (`tuple[int]`, *optional*, defaults to `(16, 8)`): Resolutions whose blocks attend.
        attention_head_dim (`int`, *optional*, defaults to `64`): Channels per attention head.
        dropout (`float`, *optional*, defaults to `0.0`): In the residual blocks.
        num_class_embeds (`int`, *optional*): Number of class labels.
        label_balance (`float`, *optional*, defaults to `0.5`): Share of the label in the embedding.
        concat_balance (`float`, *optional*, defaults to `0.5`): Share of the encoder's features in the decoder.
        res_balance (`float`, *optional*, defaults to `0.3`): Share of the residual branch.
        attn_balance (`float`, *optional*, defaults to `0.3`): Share of attention.
        clip_act (`float`, *optional*, defaults to `256.0`): Activations are clipped to this.
        id2label (`dict[int, str]`, *optional*): Names of the labels.
    """

    _supports_gradient_checkpointing = True
    _keep_in_fp32_modules = ["emb_fourier", "emb_noise", "emb_label"]
    _repeated_blocks = ["EDM2UNetBlock"]
    _no_split_modules = ["EDM2UNetBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 4,
        out_channels: int = 4,
        model_channels: int = 192,
        channel_mult: tuple[int, ...] = (1, 2, 3, 4),
        channel_mult_noise: int | None = None,
        channel_mult_emb: int | None = None,
        layers_per_block: int = 3,
        attention_resolutions: tuple[int, ...] = (16, 8),
        attention_head_dim: int = 64,
        dropout: float = 0.0,
        num_class_embeds: int | None = None,
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float = 256.0,
        id2label: dict[int, str] | None = None,
    ):
        super().__init__()
        if sample_size % 2 ** (len(channel_mult) - 1):
            raise ValueError(
                f"`sample_size` must be divisible by {2 ** (len(channel_mult) - 1)} for {len(channel_mult)} levels, "
                f"but is {sample_size}."
            )
        self.label_balance, self.concat_balance = label_balance, concat_balance
        self.gradient_checkpointing = False
        widths = [int(model_channels * mult) for mult in channel_mult]
        sizes = [sample_size >> level for level in range(len(widths))]
        noise_channels = int(model_channels * (channel_mult_noise or channel_mult[0]))
        emb_channels = int(model_channels * (channel_mult_emb or max(channel_mult)))

        def block(c_in: int, c_out: int, decoder: bool, attend: bool = False, mode: str | None = None):
            return EDM2UNetBlock(
                c_in,
                c_out,
                emb_channels,
                decoder=decoder,
                heads=c_out // attention_head_dim if attend else 0,
                dropout=dropout,
                mode=mode,
                balances=(res_balance, attn_balance),
                clip=clip_act,
            )

        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier = MPFourier(noise_channels)
        self.emb_noise = MPConv(noise_channels, emb_channels, 0)
        self.emb_label = MPConv(num_class_embeds, emb_channels, 0) if num_class_embeds else None

        # encoder; a channel of ones stands in for the biases
        self.enc = nn.ModuleDict()
        current, pushed = in_channels + 1, []
        for level, (size, width) in enumerate(zip(sizes, widths, strict=True)):
            name = f"{size}x{size}"
            if level == 0:
                self.enc[f"{name}_conv"] = MPConv(current, width, 3)
                current = width
            else:
                self.enc[f"{name}_down"] = block(current, current, False, mode="down")
            pushed.append(current)
            for i in range(layers_per_block):
                self.enc[f"{name}_block{i}"] = block(current, width, False, size in attention_resolutions)
                current = width
                pushed.append(current)

        # decoder
        self.dec = nn.ModuleDict()
        for level in reversed(range(len(widths))):
            name, width = f"{sizes[level]}x{sizes[level]}", widths[level]
            if level == len(widths) - 1:
                self.dec[f"{name}_in0"] = block(current, current, True, attend=True)
                self.dec[f"{name}_in1"] = block(current, current, True)
            else:
                self.dec[f"{name}_up"] = block(current, current, True, mode="up")
            for i in range(layers_per_block + 1):
                attend = sizes[level] in attention_resolutions
                self.dec[f"{name}_block{i}"] = block(current + pushed.pop(), width, True, attend)
                current = width
        self.out_conv = MPConv(current, out_channels, 3)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """
        Args:
            sample (`torch.Tensor`): `c_in * x_t`, `(B, C, H, W)`.
            timestep (`torch.Tensor` or `float`): `c_noise = ln(sigma) / 4`, `(B,)` or one number.
            class_labels (`torch.Tensor`, *optional*): `(B,)` ids or `(B, num_class_embeds)` rows; zeros if not given.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return a [`UNet2DOutput`].
        """
        with torch.autocast(sample.device.type, enabled=False):
            emb = self.emb_noise(self.emb_fourier(noise_vector(timestep, sample)))
            if self.emb_label is not None:
                classes = self.emb_label.weight.shape[1]
                labels = label_vectors(class_labels, classes, emb)
                emb = mp_sum(emb, self.emb_label(labels * math.sqrt(classes)), self.label_balance)
            emb = mp_silu(emb)
        dtype = next(self.enc.parameters()).dtype  # the embedding may have another one
        x, emb = sample.to(dtype), emb.to(dtype)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        skips = []
        for layer in self.enc.values():
            x = self._run(layer, x, emb)
            skips.append(x)
        for name, layer in self.dec.items():
            if "_block" in name:
                x = mp_cat(x, skips.pop(), self.concat_balance)
            x = self._run(layer, x, emb)
        x = self.out_conv(x, gain=self.out_gain)
        return UNet2DOutput(sample=x) if return_dict else (x,)

    def _run(self, layer: nn.Module, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        if not isinstance(layer, EDM2UNetBlock):
            return layer(x)
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(layer, x, emb)
        return layer(x, emb)
