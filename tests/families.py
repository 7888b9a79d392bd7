"""Tiny pipelines of random weights, one of each family of text-to-image teachers."""

import diffusers
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

UNET = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "sample_size": 8,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def clip_tokenizer(pad="<|endoftext|>"):
    symbols = sorted(ByteLevel.alphabet())
    vocab = symbols + [c + "</w>" for c in symbols] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(vocab)}, merges=[], model_max_length=77, pad_token=pad
    )


def t5_tokenizer():
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    return T5Tokenizer(vocab=vocab + [(chr(c), -3.0) for c in range(33, 127)], extra_ids=0, model_max_length=32)


def clip_encoder(tokenizer, projection=None, width=16):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=77,
        projection_dim=projection or width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5_encoder(tokenizer, width=16):
    config = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()


def autoencoder(scale=0.18215, shift=None, channels=4):
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        sample_size=16,
        scaling_factor=scale,
        shift_factor=shift,
        use_quant_conv=shift is None,
        use_post_quant_conv=shift is None,
    ).eval()


def stable_diffusion(prediction_type="epsilon"):
    tokenizer = clip_tokenizer()
    return diffusers.StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=clip_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=diffusers.UNet2DConditionModel(cross_attention_dim=16, attention_head_dim=2, **UNET).eval(),
        scheduler=diffusers.DDIMScheduler(
            clip_sample=False, set_alpha_to_one=False, prediction_type=prediction_type, **BETAS
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl():
    first, second = clip_tokenizer(), clip_tokenizer(pad="!")
    unet = diffusers.UNet2DConditionModel(
        cross_attention_dim=32,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=6 * 8 + 16,
        **UNET,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=autoencoder(0.13025),
        text_encoder=clip_encoder(first),
        text_encoder_2=clip_encoder(second, projection=16),
        tokenizer=first,
        tokenizer_2=second,
        unet=unet.eval(),
        scheduler=diffusers.EulerDiscreteScheduler(**BETAS),
    )


def stable_diffusion_3():
    first, second, third = clip_tokenizer(), clip_tokenizer(pad="!"), t5_tokenizer()
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        vae=autoencoder(1.5305, 0.0609),
        text_encoder=clip_encoder(first, 16),
        tokenizer=first,
        text_encoder_2=clip_encoder(second, 16),
        tokenizer_2=second,
        text_encoder_3=t5_encoder(third, 32),
        tokenizer_3=third,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flux(guidance_embeds=True):
    first, second = clip_tokenizer(), t5_tokenizer()
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds,
    )
    pipeline = diffusers.FluxPipeline(
        transformer=transformer.eval(),
        vae=autoencoder(1.5305, 0.0609),
        text_encoder=clip_encoder(first),
        tokenizer=first,
        text_encoder_2=t5_encoder(second),
        tokenizer_2=second,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
    )
    return pipeline


def pixart():
    tokenizer = t5_tokenizer()
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_attention_heads=2,
        caption_channels=16,
        cross_attention_dim=16,
    )
    return diffusers.PixArtAlphaPipeline(
        transformer=transformer.eval(),
        vae=autoencoder(),
        scheduler=diffusers.DDIMScheduler(),
        text_encoder=t5_encoder(tokenizer),
        tokenizer=tokenizer,
    )


def sana():
    vocab = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", *map(chr, range(33, 127))]
    tokenizer = GemmaTokenizer(vocab={token: i for i, token in enumerate(vocab)}, merges=[])
    encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
    )
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=16,
    )
    vae = diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=[1, 1],
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    return diffusers.SanaPipeline(
        transformer=transformer.eval(),
        vae=vae.eval(),
        text_encoder=encoder.eval(),
        tokenizer=tokenizer,
        scheduler=diffusers.DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
        ),
    )


BUILDERS = {
    "sd": stable_diffusion,
    "sd-v": lambda: stable_diffusion("v_prediction"),
    "sdxl": stable_diffusion_xl,
    "sd3": stable_diffusion_3,
    "flux": flux,
    "pixart": pixart,
    "pixart-sigma": lambda: diffusers.PixArtSigmaPipeline(**pixart().components),
    "sana": sana,
}
# what a stock call needs to take the tiny models as they are
CALLS = {
    "sd3": {"max_sequence_length": 256},
    "flux": {"height": 16, "width": 16},
    "pixart": {"use_resolution_binning": False, "clean_caption": False},
    "pixart-sigma": {"use_resolution_binning": False, "clean_caption": False},
    "sana": {"use_resolution_binning": False, "height": 32, "width": 32},
}


def tiny_pipeline(family, seed=0):
    """A pipeline of 16 x 16 images and 4 x 8 x 8 latents; SANA's, which refuses those, of twice that."""
    torch.manual_seed(seed)
    pipeline = BUILDERS[family]()
    if family == "flux":
        pipeline.default_sample_size = 8
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
