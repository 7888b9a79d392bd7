"""The flags that the distillation scripts share, and what they stand for: teacher, samples, student, adapters."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import set_seed
from peft import LoraConfig

from .arguments import DTYPES, TrainArguments
from .data import CAPTION_COLUMNS, Conditions, Samples, captions_of, column_of, load_pairs, load_rows, real_images
from .denoiser import Denoiser, GuidedDenoiser
from .methods.distances import PERCEPTUAL, Decoded
from .prompts import DEFAULT_CACHE, CaptionedLatents, PromptEmbeddings, PromptPairs, read_prompts
from .repository import keep_parts
from .run_folder import checkpoint_to_go_on_from
from .teacher import Teacher

_TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass
class TeacherArguments(TrainArguments):
    """Flags of everything that learns from a teacher."""

    pretrained_teacher_model: str = field(kw_only=True, metadata={"help": "A Hub id, a folder or a shipped name."})
    revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the teacher's repository; default: main."}
    )
    variant: str | None = field(
        default=None,
        metadata={"help": "Variant of the teacher's weight files, such as fp16; default: the plain ones."},
    )
    guidance_scale: float = field(
        default=1.0, metadata={"help": "Guidance of the teacher, which the student bakes in; 1.0: off."}
    )
    prompts: str | None = field(default=None, metadata={"help": "Text-to-image: a file of prompts, one a line."})
    prompt: list[str] | None = field(
        default=None, metadata={"help": "Text-to-image: the prompts themselves, instead of the file `prompts`."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Text-to-image: a data set of captions (and images), instead of `prompts`."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of `dataset_name`."})
    caption_column: str | None = field(
        default=None, metadata={"help": "Column of captions; default: text, caption, prompt or the only one of texts."}
    )
    image_column: str | None = field(
        default=None, metadata={"help": "Column of images; default: image or the only one of images."}
    )
    resolution: int | None = field(
        default=None, metadata={"help": "Text-to-image: height and width in pixels. Default: the teacher's."}
    )
    embedded_guidance: float = field(default=3.5, metadata={"help": "What FLUX.1-dev's guidance embedding is fed."})
    cache_dir: str | None = field(
        default=None,
        metadata={"help": "Folder that keeps text embeddings and latents for later runs; default: Hugging Face's."},
    )
    encoding_batch_size: int = field(default=16, metadata={"help": "Prompts or images encoded at a time."})

    def load_teacher(self) -> Teacher:
        """The frozen teacher."""
        set_seed(self.seed)  # adapters and heads that are made next start at random
        return Teacher.from_pretrained(
            self.pretrained_teacher_model,
            revision=self.revision,
            variant=self.variant,
            dtype=self.weights_dtype(),
            resolution=self.resolution,
            embedded_guidance=self.embedded_guidance,
        )

    def weights_dtype(self) -> torch.dtype | dict[str, torch.dtype]:
        """In which the teacher's parts are loaded: text encoders in `teacher_dtype`, what is copied to be trained in
        float32."""
        if self.teacher_dtype is None:
            return torch.float32
        return {"default": torch.float32} | dict.fromkeys(_TEXT_ENCODERS, DTYPES[self.teacher_dtype])

    def guided(self, teacher: Teacher) -> Teacher | GuidedDenoiser:
        """The teacher with `guidance_scale`."""
        return teacher if self.guidance_scale == 1.0 else teacher.guided(self.guidance_scale)

    def prompt_sources(self) -> dict[str, str | list[str]]:
        """What is given of the flags that say where prompts come from."""
        values = {name: getattr(self, name) for name in ("prompts", "prompt", "dataset_name")}
        return {name: value for name, value in values.items() if value is not None}

    def refuse_prompts(self) -> None:
        """Raise a `ValueError` if there are any, for a teacher that takes none."""
        if wrong := self.prompt_sources():
            raise ValueError(f"`{min(wrong)}` must be None for a teacher that takes no prompts.")

    def load_samples(self, teacher: Teacher, *, images: bool = False, pairs: str | None = None) -> Samples:
        """What batches are drawn from: conditions (every label, or what `prompts`, `prompt` or `dataset_name` say),
        with real `images` of `dataset_name`, or teacher `pairs`. Text encoders, which are not needed after that, are
        saved to the output folder and freed."""
        if not self.dry_run:  # refuse the folder of another run before anything is written to it
            checkpoint_to_go_on_from(Path(self.output_dir), self.resume_from_checkpoint)
        paired = None
        if pairs is not None:
            guidance = {"guidance_scale": self.guidance_scale}
            if teacher.takes_prompts:
                guidance["embedded_guidance"] = self.embedded_guidance
            paired = load_pairs(pairs).check(teacher.sample_shape, self.pretrained_teacher_model, **guidance)
        if not teacher.takes_prompts:
            self.refuse_prompts()
            return Conditions(teacher.encode()) if paired is None else paired
        given = self.prompt_sources() | ({} if pairs is None else {"pairs": pairs})
        if len(given) != 1 or (images and "dataset_name" not in given):
            needed = "`dataset_name`" if images else "One of `prompts` and `dataset_name` (or `prompt`, or `pairs`)"
            raise ValueError(f"{needed} must be given for this text-to-image teacher, but given are {given}.")
        accelerator = self.accelerator()
        how = {
            "cache_dir": self.cache_dir or DEFAULT_CACHE,
            "batch_size": self.encoding_batch_size,
            "device": accelerator.device,
        }
        samples: Samples
        if paired is not None:
            samples = PromptPairs(teacher, paired.rows, **how)
        elif self.prompts is not None:
            samples = PromptEmbeddings(teacher, read_prompts(self.prompts), **how)
        elif self.prompt is not None:
            samples = PromptEmbeddings(teacher, self.prompt, **how)
        else:
            rows = load_rows(self.dataset_name, self.dataset_split)
            captions = column_of(rows, self.caption_column, "caption_column", "string", CAPTION_COLUMNS)
            if images:
                pictures = column_of(rows, self.image_column, "image_column", "image", ("image",))
                samples = CaptionedLatents(teacher, rows, pictures, captions, **how)
            else:
                samples = PromptEmbeddings(teacher, captions_of(rows, captions), **how)
        if accelerator.is_main_process and not self.dry_run:
            keep_parts(teacher.pipeline, Path(self.output_dir), teacher.text_encoders())
        accelerator.wait_for_everyone()
        teacher.free_text_encoders()
        return samples


@dataclass
class StudentArguments(TeacherArguments):
    """Flags of one-step students."""

    student_init: str | None = field(
        default=None,
        metadata={
            "help": "Model that the student starts as, a Hub id, a folder or a shipped name; default: the teacher."
        },
    )
    start_ratio: float | None = field(
        default=None, metadata={"help": "sigma / alpha that the student starts from; default: the method's."}
    )

    def load_student(self, trajectory_head: str | None = None) -> Denoiser | None:
        """The model that `--student_init` names; a student of PID, whose network returns something else than a
        teacher's, only for a run of PID with the same `trajectory_head`."""
        if self.student_init is None:
            return None
        start = Teacher.from_pretrained(self.student_init)
        config = start.scheduler.config
        if config.get("parameterization") == "trajectory" and config["trajectory_head"] != trajectory_head:
            raise ValueError(
                f"`student_init` must predict as the run's student does, but {self.student_init!r} is a student of "
                f"PID with the head {config['trajectory_head']!r}."
            )
        return start.denoiser


@dataclass
class DistanceArguments(StudentArguments):
    """Flags of methods that compare images."""

    tiny_vae: str | None = field(
        default=None,
        metadata={"help": "AutoencoderTiny, a Hub id or folder, that decodes latents for perceptual distances."},
    )

    def model_distance(self, teacher: Teacher, name: str, argument: str) -> str | Decoded:
        """A distance for the teacher's model space: perceptual ones see the images that latents stand for."""
        if teacher.takes_prompts and name in PERCEPTUAL:
            vae = None if self.tiny_vae is None else teacher.load_tiny_vae(self.tiny_vae)
            return Decoded(name, partial(teacher.decode, vae=vae), argument)
        if self.tiny_vae is not None:
            raise ValueError(
                f"`tiny_vae` must be None where nothing is decoded, with a `{argument}` of {name!r} on a "
                f"{type(teacher.pipeline).__name__}, but is {self.tiny_vae!r}."
            )
        return name


@dataclass
class DistillationArguments(StudentArguments):
    """Flags of score distillation."""

    student_timesteps: list[float] | None = field(
        default=None,
        metadata={"help": "Instead of start_ratio: the timesteps, noisiest first; several: a few-step student."},
    )
    fake_score_updates: int = field(default=1, metadata={"help": "Fake-score updates per student update."})
    gan_weight: float = field(
        default=0.0, metadata={"help": "Weight of the student's GAN loss; DMD2: 1e-3 to 5e-3, SiD: about 10; 0: off."}
    )
    dataset: str | None = field(default=None, metadata={"help": "Real images for the GAN branch of a pixel teacher."})
    lora_rank: int | None = field(
        default=None,
        metadata={"help": "Train adapters of this rank on the teacher's weights; default: whole networks."},
    )
    lora_alpha: float | None = field(
        default=None,
        metadata={"help": "Adapters are scaled by lora_alpha / lora_rank; default: `lora_rank`, a scale of 1."},
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Layers with an adapter, by the ends of their names; default: all that are wider than the rank."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.lora_rank is None and (self.lora_alpha is not None or self.lora_target_modules):
            raise ValueError("`lora_rank` must be given with `lora_alpha` or `lora_target_modules`, but is None.")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(f"`lora_rank` must be at least 1, but is {self.lora_rank}.")

    def check_images(self) -> None:
        """Raise a `ValueError` unless real images are named just where there is a GAN branch."""
        if self.gan_weight and self.dataset is None and self.dataset_name is None:
            raise ValueError(
                "`dataset` (for a text-to-image teacher `dataset_name`) must be given with a `gan_weight` of "
                f"{self.gan_weight}, but is None."
            )
        if not self.gan_weight and self.dataset is not None:
            raise ValueError(f"`dataset` must be None without a `gan_weight`, but is {self.dataset!r}.")

    def load_samples(self, teacher: Teacher, *, images: bool = False, pairs: str | None = None) -> Samples:
        """As of every method, with the real images of a GAN branch."""
        images = images or bool(self.gan_weight)
        if teacher.takes_prompts and self.dataset is not None:
            raise ValueError(
                "`dataset` must be None for a text-to-image teacher, whose images are those of `dataset_name`, but is "
                f"{self.dataset!r}."
            )
        if images and not teacher.takes_prompts:
            self.refuse_prompts()
            return real_images(self.dataset, teacher.sample_shape, teacher.num_labels)
        return super().load_samples(teacher, images=images, pairs=pairs)

    def weights_dtype(self):
        """Adapters leave the teacher's network as it is: never in float32 if it is not to be."""
        loaded = super().weights_dtype()
        if self.lora_rank is None or self.teacher_dtype is None:
            return loaded
        return loaded | dict.fromkeys(("unet", "transformer"), DTYPES[self.teacher_dtype])

    def lora_config(self) -> LoraConfig | None:
        """What the `lora_` flags say."""
        if self.lora_rank is None:
            return None
        alpha = self.lora_rank if self.lora_alpha is None else self.lora_alpha
        return LoraConfig(r=self.lora_rank, lora_alpha=alpha, target_modules=self.lora_target_modules)
