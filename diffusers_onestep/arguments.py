"""The flags that all training scripts share, and their reading from the command line or a YAML/JSON file."""

import argparse
import atexit
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator, PartialState, tracking
from accelerate.utils import InitProcessGroupKwargs, LoggerType
from transformers import HfArgumentParser

from .errors import input_errors
from .files import check_writable

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_AT_LEAST_ONE = (
    "train_batch_size",
    "gradient_accumulation_steps",
    "max_train_steps",
    "checkpointing_steps",
    "logging_steps",
)


@dataclass(kw_only=True)
class HubArguments:
    """Flags of everything that can push what it wrote."""

    push_to_hub: bool = field(default=False, metadata={"help": "Push the result, with its card, when it is done."})
    hub_model_id: str | None = field(
        default=None, metadata={"help": "Repository to push to; default: named as the pushed folder."}
    )
    hub_private_repo: bool = field(default=False, metadata={"help": "Make the repository private, if it is new."})
    hub_token: str | None = field(
        default=None,
        metadata={"help": "Token to push with, better not given here; default: HF_TOKEN or that of `hf auth login`."},
    )

    def repo_id(self, folder: str | Path) -> str:
        """Where `folder` is pushed to."""
        return self.hub_model_id or Path(folder).resolve().name

    def open_repository(self, folder: str | Path) -> None:
        """Make the repository, if `push_to_hub` is on: a token that will not do must not show after the work."""
        if self.push_to_hub:
            from .hub import open_repository

            check_writable(Path(folder))
            open_repository(self.repo_id(folder), private=self.hub_private_repo, token=self.hub_token)

    def push(self, folder: str | Path) -> None:
        """Push `folder`, if `push_to_hub` is on; see `push_student`."""
        if self.push_to_hub:
            from .hub import push_student

            url = push_student(folder, self.repo_id(folder), private=self.hub_private_repo, token=self.hub_token)
            print(f"Pushed: {url}", flush=True)


@dataclass
class TrainArguments(HubArguments):
    """Settings of the training loop. A method's script adds its own; names are those of diffusers' examples."""

    output_dir: str = field(metadata={"help": "Where the student, its card and the checkpoints go."})
    seed: int = field(default=0, metadata={"help": "Seed of every random draw."})
    train_batch_size: int = field(default=64, metadata={"help": "Samples per device and micro-batch."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Micro-batches per optimiser step."})
    global_batch_size: int | None = field(
        default=None, metadata={"help": "Samples per optimiser step over all ranks; sets gradient_accumulation_steps."}
    )
    max_train_steps: int = field(default=1000, metadata={"help": "Student updates."})
    learning_rate: float = field(default=1e-5, metadata={"help": "Learning rate of the student."})
    fake_score_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the fake score; default: `learning_rate`."}
    )
    optimizer: str = field(
        default="adamw", metadata={"help": "adamw, radam or adamw8bit (of bitsandbytes or torchao)."}
    )
    adam_beta1: float = field(default=0.9, metadata={"help": "Adam's first beta."})
    student_adam_beta1: float | None = field(
        default=None, metadata={"help": "Adam's first beta for the student alone; default: `adam_beta1`."}
    )
    adam_beta2: float = field(default=0.999, metadata={"help": "Adam's second beta."})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "Adam's epsilon."})
    adam_weight_decay: float = field(default=0.0, metadata={"help": "Decoupled weight decay."})
    lr_scheduler: str = field(
        default="constant_with_warmup", metadata={"help": "A name that `diffusers.optimization` knows."}
    )
    lr_warmup_steps: int = field(default=0, metadata={"help": "Student updates of linear warm-up."})
    max_grad_norm: float | None = field(
        default=None, metadata={"help": "Clip gradients to this norm; default: the method's; 0: no clipping."}
    )
    ema_halflife_kimg: float = field(
        default=0.0,
        metadata={"help": "Half-life, in 1000 images, of the average of the student's weights; 0: no average."},
    )
    ema_rampup_ratio: float = field(
        default=0.05, metadata={"help": "Half-life is at most this part of the images seen."}
    )
    mixed_precision: str | None = field(
        default=None, metadata={"help": "no, bf16 or fp16; weights stay float32. Default: the launcher's."}
    )
    checkpointing_steps: int = field(default=500, metadata={"help": "Write a checkpoint every so many steps."})
    checkpoints_total_limit: int | None = field(default=2, metadata={"help": "Keep so many checkpoints, the newest."})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "Go on, at this command's rates, from a checkpoint: 'latest' of output_dir, or a folder."},
    )
    validation_steps: int = field(
        default=0, metadata={"help": "Write samples.png and health.png every so many steps; 0: at the end."}
    )
    validation_samples: int = field(
        default=0, metadata={"help": "Samples of the live distance, diversity and saturation; 0: none of them."}
    )
    validation_extractor: str | None = field(
        default=None,
        metadata={"help": "Network of the live distance; default: fashion for Fashion-MNIST, else effnet-lite0."},
    )
    validation_reference: str | None = field(
        default=None,
        metadata={"help": "Images of the live distance; default: its own with fashion, else the teacher's."},
    )
    stop_on_divergence: bool = field(
        default=False, metadata={"help": "When a health warning comes, write a checkpoint and stop."}
    )
    logging_steps: int = field(default=10, metadata={"help": "Write log.jsonl and trackers every so many steps."})
    report_to: str | None = field(
        default=None,
        metadata={"help": "tensorboard, wandb, trackio, several with commas, or all; default: log.jsonl alone."},
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Keep few activations and compute the others again in the backward pass."}
    )
    teacher_dtype: str | None = field(
        default=None,
        metadata={"help": "fp32, bf16 or fp16 of the teacher's frozen weights and text encoders; default: fp32."},
    )
    offload_teacher: bool = field(
        default=False, metadata={"help": "Keep the teacher in the CPU's memory while it is not needed."}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Print the plan, take two steps of a tiny batch, and write nothing."}
    )
    cpu_threads: int | None = field(
        default=None, metadata={"help": "Threads of a process on the CPU; default: torch's."}
    )

    def __post_init__(self):
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, but is {getattr(self, name)}.")
        if self.validation_samples == 1:
            raise ValueError("`validation_samples` must be 0 or at least 2, but is 1: one image has no distance.")
        if self.optimizer not in ("adamw", "radam", "adamw8bit"):
            raise ValueError(f"`optimizer` must be 'adamw', 'radam' or 'adamw8bit', but is {self.optimizer!r}.")
        if self.teacher_dtype not in (None, *DTYPES):
            raise ValueError(f"`teacher_dtype` must be one of {list(DTYPES)}, but is {self.teacher_dtype!r}.")
        if self.mixed_precision not in (None, "no", "bf16", "fp16"):
            raise ValueError(f"`mixed_precision` must be 'no', 'bf16' or 'fp16', but is {self.mixed_precision!r}.")
        if unknown := set(self.trackers) - set(LoggerType.list()):
            raise ValueError(f"`report_to` must be of {LoggerType.list()}, but has {sorted(unknown)}.")
        if missing := set(self.trackers) - {"all", *map(str, tracking.get_available_trackers())}:
            raise ValueError(
                f"`report_to` must name installed trackers, but is {self.report_to!r}: "
                f"pip install {' '.join(sorted(missing))}"
            )

    def accelerator(self, **settings: Any) -> Accelerator:
        """The run's; see `patient_accelerator`."""
        return patient_accelerator(mixed_precision=self.mixed_precision, **settings)

    def refuse_live_numbers(self) -> None:
        """Raise a `ValueError` if there should be any, for a teacher, which is measured when it is done."""
        if self.validation_samples or self.stop_on_divergence:
            raise ValueError(
                "`validation_samples` and `stop_on_divergence` must be off for a teacher, which evaluate.py measures."
            )

    @property
    def trackers(self) -> list[str]:
        """The names in `report_to`."""
        return [name.strip() for name in (self.report_to or "").split(",") if name.strip()]


def patient_accelerator(**settings: Any) -> Accelerator:
    """An `Accelerator` whose ranks wait for hours where one of them samples or prepares alone (unless an earlier one
    has made the process group), and that ends it in order."""
    atexit.register(leave_process_group)
    return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))], **settings)


def leave_process_group(failed: bool = True) -> None:
    """At the end of the process, or of a script that has not `failed`.

    Gloo's threads need Python once more, to let go of their last tensors, and without it they abort a process that had
    done its work; half a second is far more than they need. They outlive the group where something still holds it, as
    FSDP does. NCCL waits for the other ranks, which a rank that failed must not.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    if "nccl" in torch.distributed.get_backend() and failed:
        return
    PartialState().destroy_process_group()
    time.sleep(0.5)


def parse_args(
    arguments_class: type,
    argv: list[str] | None = None,
    presets: dict[str, dict] | None = None,
    *,
    program: str | None = None,
):
    """Read one dataclass of flags: `[--config FILE] [--preset NAME] --flag value ...`.

    A preset is overridden by the file, and the file by the command line. An unknown flag or key ends the program.

    Args:
        arguments_class (`type`): the dataclass to fill.
        argv (`list[str]`, *optional*): defaults to the command line.
        presets (`dict`, *optional*): published configurations by name.
        program (`str`, *optional*): its name in messages; defaults to the script's.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    sources = argparse.ArgumentParser(prog=program, add_help=False, allow_abbrev=False)
    sources.add_argument("--config", type=Path, help="YAML or JSON file of flags; the command line wins.")
    if presets:
        sources.add_argument("--preset", choices=sorted(presets), help="A published configuration.")
    known, flags = sources.parse_known_args(argv)
    values = dict((presets or {}).get(getattr(known, "preset", None), {}))
    if known.config is not None:
        if not known.config.is_file():
            sources.error(f"`config` must be a YAML or JSON file, but {str(known.config)!r} does not exist.")
        try:
            written = yaml.safe_load(known.config.read_text()) or {}  # JSON is YAML too
        except yaml.YAMLError as error:
            sources.error(f"`config` must be a YAML or JSON file, but {str(known.config)!r} is not: {error}")
        if not isinstance(written, dict):
            sources.error(f"`config` must hold flags and their values, but {str(known.config)!r} does not.")
        values |= written
        if nested := values.keys() & {"config", "preset"}:
            sources.error(f"`config` must not name {sorted(nested)}: give them on the command line.")
    parser = HfArgumentParser(arguments_class, prog=program, parents=[sources], allow_abbrev=False)
    # of a flag that is given twice, argparse takes the later one
    namespace = parser.parse_args([*_as_flags(values), *flags])
    return arguments_class(**{f.name: getattr(namespace, f.name) for f in fields(arguments_class)})


def run_script(main: Callable[[Any], None], arguments_class: type, presets: dict[str, dict] | None = None) -> None:
    """What a script does when it is started: `main` with the flags of the command line. Bad ones end it with a
    message."""
    with input_errors(Path(sys.argv[0]).name):
        main(parse_args(arguments_class, presets=presets))
        leave_process_group(failed=False)


def _as_flags(values: dict) -> list[str]:
    given = {k: v if isinstance(v, list) else [v] for k, v in values.items() if v is not None}
    return [part for k, parts in given.items() for part in (f"--{k}", *map(str, parts))]
