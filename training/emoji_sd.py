"""The recipe `emoji-sd`: a small Stable Diffusion (text encoder, KL autoencoder, U-Net) of captioned emoji.

ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 training/train_teacher.py --recipe emoji-sd \
    --dataset emoji32.npz --output_dir emoji-sd --mixed_precision bf16

`python training/emoji_sd.py emoji32.npz emoji-data` writes the same pictures as a captioned data set, for
`--dataset_name` of the distillation scripts and `--reference` of `evaluate.py`.

Two trainings, one after the other: the autoencoder in `OUTPUT_DIR/autoencoder`, then U-Net and text encoder together
on its latents. `--resume_from_checkpoint latest` goes on in whichever was interrupted.
"""

import argparse
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from datasets import Image as ImageColumn
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusers_onestep import Denoiser, NoiseSchedule, train
from diffusers_onestep.arguments import TrainArguments
from diffusers_onestep.data import Batches, LabelledImages
from diffusers_onestep.files import write_json, written_beside
from diffusers_onestep.methods.pretrain import AutoencoderPretraining, Pretraining
from diffusers_onestep.models import PromptedUNet
from diffusers_onestep.pictures import picture, save_grid
from diffusers_onestep.repository import write_repository

RECIPE = "emoji-sd"
MAX_TOKENS = 32  # the longest caption has 26
COLUMNS = 12  # of samples.png
NOTICE = """\
This model learned from two sets of emoji drawings. Whoever shows its pictures should carry both attributions.

Twemoji graphics are copyright Twitter, Inc and other contributors, and the contributors of the jdecked/twemoji fork,
licensed under CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/).

Noto Emoji pictures are copyright Google LLC and the Noto Emoji authors, licensed under the Apache License, Version
2.0; its flags are in the public domain or otherwise exempt from copyright.

Names of the emoji: emoji-data, MIT, copyright 2013 Cal Henderson.

Changes: each 64x64 picture was composited on white and box filtered to 32x32, exact copies were removed, and captions
were derived from the names.
"""


@dataclass
class EmojiArguments(TrainArguments):
    dataset: str = field(kw_only=True, metadata={"help": "An .npz file of captioned emoji."})
    recipe: str = field(default=RECIPE, metadata={"help": "This one."})
    train_batch_size: int = 64
    max_train_steps: int = field(default=3800, metadata={"help": "Of U-Net and text encoder."})
    learning_rate: float = 1e-3
    lr_scheduler: str = "cosine"
    lr_warmup_steps: int = 300
    ema_halflife_kimg: float = 25.0
    caption_dropout: float = field(
        default=0.1, metadata={"help": "How often the empty caption replaces the true one."}
    )
    license: str | None = field(default="cc-by-4.0", metadata={"help": "Of the model, in the Hub's spelling."})
    autoencoder_steps: int = field(default=5500, metadata={"help": "Updates of the autoencoder, before."})
    autoencoder_batch_size: int = field(default=16, metadata={"help": "Images per device."})
    autoencoder_learning_rate: float = field(default=1e-3, metadata={"help": "Of the autoencoder."})
    kl_weight: float = field(default=1e-3, metadata={"help": "Of the latents' divergence, per latent element."})
    autoencoder_channels: list[int] = field(
        default_factory=lambda: [32, 64, 96], metadata={"help": "Of each level; each but the first halves the size."}
    )
    unet_channels: list[int] = field(default_factory=lambda: [96, 160], metadata={"help": "Of each level."})
    text_width: int = field(default=128, metadata={"help": "Of the text encoder."})
    text_layers: int = field(default=4, metadata={"help": "Of the text encoder."})
    vocab_size: int = field(default=2048, metadata={"help": "Tokens at most, 514 of them bytes and marks."})


class Emoji:
    """Captioned pictures in memory: images uint8 `(N, 3, H, W)`, captions, and the captions with the drawing's style.

    Args:
        path (`str`): an `.npz` with `images` `(N, H, W, 3)` uint8, `captions`, `vendor` and `vendor_names`,
            `skin_tone` (0: none) and `split`.
        split (`int`): 0 training, 1 validation, 2 test; concepts of one are in no other.
    """

    def __init__(self, path: str, split: int):
        if not Path(path).is_file():
            raise ValueError(f"`dataset` must be an .npz file of captioned emoji, but {path!r} does not exist.")
        arrays = np.load(path, allow_pickle=False)
        needed = {"images", "captions", "vendor", "vendor_names", "skin_tone", "split"}
        if missing := needed - set(arrays.files):
            raise ValueError(f"`dataset` must hold captioned emoji, but {path!r} lacks {sorted(missing)}.")
        rows = np.flatnonzero(arrays["split"] == split)
        if not len(rows):
            raise ValueError(f"`dataset` must hold pictures of splits 0, 1 and 2, but {path!r} has none of {split}.")
        self.images = torch.from_numpy(arrays["images"][rows]).permute(0, 3, 1, 2).contiguous()
        self.captions = [str(caption) for caption in arrays["captions"][rows]]
        vendors = [str(arrays["vendor_names"][vendor]) for vendor in arrays["vendor"][rows]]
        self.styled = [f"{caption}, {vendor} style" for caption, vendor in zip(self.captions, vendors, strict=True)]
        self.toned = arrays["skin_tone"][rows] > 0

    def pairs(self) -> list[tuple[int, str]]:
        """Image number and caption of one epoch: every picture with its plain and its styled caption, but those with
        a skin tone, half of all pictures, with one of the two."""
        plain = [(n, text) for n, text in enumerate(self.captions) if not self.toned[n] or n % 2 == 0]
        styled = [(n, text) for n, text in enumerate(self.styled) if not self.toned[n] or n % 2 == 1]
        return plain + styled

    def spread(self, count: int) -> list[int]:
        """Numbers of `count` pictures without skin tone, evenly over the file."""
        untoned = np.flatnonzero(~self.toned)
        return untoned[np.linspace(0, len(untoned) - 1, count).round().astype(int)].tolist()


class CaptionedLatents:
    """`"x0"` from latents `(N, C, H, W)` and `"cond"` of token ids, one entry per pair of image number and caption."""

    def __init__(self, latents: torch.Tensor, pairs: list[tuple[int, str]], tokenizer: CLIPTokenizer):
        self.latents = latents
        self.image = torch.tensor([image for image, _ in pairs])
        self.input_ids = token_ids(tokenizer, [caption for _, caption in pairs])

    def __len__(self):
        return len(self.image)

    def batch(self, places):
        return {"x0": self.latents[self.image[places]], "cond": {"input_ids": self.input_ids[places]}}


def build_tokenizer(captions: list[str], vocab_size: int) -> CLIPTokenizer:
    """CLIP's byte-pair encoding with merges learned from `captions`. Every byte is a token, also as the end of a word,
    so that no text is unknown."""
    letters = sorted(ByteLevel.alphabet())
    symbols = letters + [letter + "</w>" for letter in letters]
    marks = ["<|startoftext|>", "<|endoftext|>"]

    def tokenizer(words, merges):
        vocab = {token: number for number, token in enumerate([*words, *marks])}
        return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)

    learned = tokenizer(symbols, []).train_new_from_iterator(sorted(set(captions)), vocab_size)
    merges = [tuple(merge) for merge in json.loads(learned.backend_tokenizer.to_str())["model"]["merges"]]
    merges = merges[: vocab_size - len(symbols) - len(marks)]
    return tokenizer(list(dict.fromkeys([*symbols, *("".join(merge) for merge in merges)])), merges)


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """`(B, L)` as StableDiffusionPipeline makes them."""
    tokens = tokenizer(
        captions, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    )
    return tokens.input_ids


def build_autoencoder(args: EmojiArguments, size: int) -> AutoencoderKL:
    levels = len(args.autoencoder_channels)
    return AutoencoderKL(
        sample_size=size,
        latent_channels=4,
        block_out_channels=args.autoencoder_channels,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        layers_per_block=1,
        norm_num_groups=8,
    )


def build_network(args: EmojiArguments, tokenizer: CLIPTokenizer, size: int) -> PromptedUNet:
    """U-Net and text encoder for latents of `size` x `size`; text enters at every level but the finest."""
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.text_width,
            projection_dim=args.text_width,
            intermediate_size=4 * args.text_width,
            num_hidden_layers=args.text_layers,
            num_attention_heads=max(1, args.text_width // 32),
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    coarser = len(args.unet_channels) - 1
    unet = UNet2DConditionModel(
        sample_size=size,
        block_out_channels=tuple(args.unet_channels),
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * coarser),
        up_block_types=(*["CrossAttnUpBlock2D"] * coarser, "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=args.text_width,
        attention_head_dim=4,  # the number of heads, as in Stable Diffusion 1's config
    )
    return PromptedUNet(unet, text_encoder)


def train_autoencoder(args: EmojiArguments, emoji: Emoji, held_out: Emoji) -> AutoencoderKL:
    """Train on the pictures and their mirror images; returns the averaged weights."""
    torch.manual_seed(args.seed)
    network = build_autoencoder(args, emoji.images.shape[-1])
    # with gradients, the plain product is twice as fast as PyTorch's fused attention on a CPU
    network.set_attn_processor(AttnProcessor())
    settings = replace(
        args,
        output_dir=str(Path(args.output_dir) / "autoencoder"),
        max_train_steps=args.autoencoder_steps,
        train_batch_size=args.autoencoder_batch_size,
        learning_rate=args.autoencoder_learning_rate,
        resume_from_checkpoint=args.resume_from_checkpoint and "latest",
        push_to_hub=False,
    )

    def validate(folder: Path) -> dict[str, float]:
        x0 = LabelledImages(held_out.images, None).batch(list(range(len(held_out.images))))["x0"]
        x0 = x0.to(next(network.parameters()).device)
        decoded = torch.cat([network(part).sample.clamp(-1, 1) for part in x0.split(64)])
        psnr = 10 * torch.log10(4 / (decoded - x0).square().mean(dim=(1, 2, 3))).mean()
        shown = held_out.spread(2 * COLUMNS)
        rows = zip(x0[shown].split(COLUMNS), decoded[shown].split(COLUMNS), strict=True)
        save_grid(picture(torch.cat([part for pair in rows for part in pair])), folder / "samples.png", COLUMNS)
        return {"psnr": psnr.item()}

    both = LabelledImages(torch.cat([emoji.images, emoji.images.flip(3)]), None)
    batches = Batches(both, settings.train_batch_size, args.seed)
    distiller = AutoencoderPretraining(network, args.kl_weight)

    def save(folder: Path) -> None:
        distiller.student.network.save_pretrained(folder)

    train(distiller, batches, settings, save=save, validate=validate)
    return AutoencoderKL.from_pretrained(settings.output_dir)


@torch.no_grad()
def encode(autoencoder: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Means of the posterior of uint8 images, `(N, C, H, W)`, scaled to unit variance over the data set; the factor
    goes into the autoencoder's config."""
    x0 = (images.float() / 127.5 - 1).split(64)
    latents = torch.cat([autoencoder.encode(part).latent_dist.mean for part in x0])
    autoencoder.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    return latents * autoencoder.config.scaling_factor


def main(args: EmojiArguments) -> None:
    args.refuse_live_numbers()
    emoji, held_out, unseen = (Emoji(args.dataset, split) for split in (0, 1, 2))
    autoencoder = train_autoencoder(args, emoji, held_out).requires_grad_(False).eval()
    latents = encode(autoencoder, emoji.images)

    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer(emoji.captions + emoji.styled, args.vocab_size)
    network = build_network(args, tokenizer, latents.shape[-1])
    scheduler = DDIMScheduler(  # Stable Diffusion's, but that one trailing step starts at the last timestep
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )
    pipeline = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=network.text_encoder,
        tokenizer=tokenizer,
        unet=network.unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    network.unet.set_attn_processor(AttnProcessor())
    network.text_encoder.set_attn_implementation("eager")

    def save(folder: Path) -> None:
        write_repository(pipeline, folder)
        (folder / "NOTICE").write_text(NOTICE)

    def validate(folder: Path) -> dict[str, float]:
        autoencoder.to(network.unet.device)
        write_samples(pipeline, folder, emoji, unseen, args.seed)
        return {}

    student = Denoiser(network, NoiseSchedule.from_scheduler(scheduler), "epsilon")
    distiller = Pretraining(student, {"input_ids": token_ids(tokenizer, [""])}, args.caption_dropout)
    batches = Batches(CaptionedLatents(latents, emoji.pairs(), tokenizer), args.train_batch_size, args.seed)
    train(distiller, batches, args, save=save, validate=validate)


def write_samples(
    pipeline: StableDiffusionPipeline, folder: Path, emoji: Emoji, unseen: Emoji, seed: int, steps: int = 50
) -> None:
    """`samples.png`, rows of generated pictures each above the row of drawings with those captions: captions of the
    training split, then of concepts that were never seen; and `samples.json`, the captions row by row."""
    rows, captions = [], []
    for source, count in ((emoji, 3), (unseen, 2)):
        for shown in torch.tensor(source.spread(count * COLUMNS)).split(COLUMNS):
            prompts = [source.styled[number] for number in shown]
            generator = torch.Generator().manual_seed(seed + len(captions))
            images = pipeline(
                prompts, num_inference_steps=steps, guidance_scale=4.0, generator=generator, output_type="np"
            ).images
            made = torch.from_numpy(images * 255).round().to(torch.uint8).permute(0, 3, 1, 2)
            rows += [made, source.images[shown]]
            captions.append(prompts)
    save_grid(torch.cat(rows), folder / "samples.png", COLUMNS)
    write_json(folder / "samples.json", {"guidance_scale": 4.0, "num_inference_steps": steps, "prompts": captions})


def write_data_set(path: str, folder: str) -> None:
    """The captioned pictures of an .npz as `train.parquet`, `validation.parquet` and `test.parquet`, which
    `datasets.load_dataset(folder)` reads."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for number, split in enumerate(("train", "validation", "test")):
        emoji = Emoji(path, number)
        pictures = [Image.fromarray(image) for image in emoji.images.permute(0, 2, 3, 1).numpy()]
        rows = Dataset.from_dict({"image": pictures, "caption": emoji.captions}).cast_column("image", ImageColumn())
        with written_beside(Path(folder) / f"{split}.parquet") as beside:
            rows.to_parquet(str(beside))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write captioned emoji as a data set.")
    parser.add_argument("path", help="An .npz file of captioned emoji.")
    parser.add_argument("folder", help="Where the data set goes.")
    write_data_set(**vars(parser.parse_args()))
