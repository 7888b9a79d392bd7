"""What the training loop needs from a method, and the random draws that all methods share."""

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from peft import LoraConfig
from torch import nn

from ..denoiser import Cond, Denoiser, GuidedDenoiser
from ..lora import adapted
from ..network_calls import sample_shape_of
from ..schedules import NoiseSchedule

Batch = dict[str, Any]
Generators = torch.Generator | list[torch.Generator] | None
Updates = Iterator[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class Paper:
    """Where a method comes from."""

    title: str
    arxiv_id: str
    citation: str


def sample_generators(seed: int, step: int, places: Iterable[int | str]) -> list[torch.Generator]:
    """One CPU generator per place in the global batch of a step."""
    digests = (hashlib.blake2b(f"{seed}/{step}/{place}".encode(), digest_size=4).digest() for place in places)
    return [torch.Generator().manual_seed(int.from_bytes(digest, "little")) for digest in digests]


def normal(shape: tuple[int, ...], generator: Generators = None, device: torch.device | None = None) -> torch.Tensor:
    """Standard normal noise; one generator per sample makes it independent of how the batch is split."""
    return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)


def uniform(batch_size: int, generator: Generators = None, device: torch.device | None = None) -> torch.Tensor:
    """`(B,)` draws from [0, 1), from one generator or one per sample."""
    if isinstance(generator, list):
        return torch.cat([torch.rand(1, generator=g, device=g.device) for g in generator]).to(device)
    return torch.rand(batch_size, generator=generator, device=generator.device if generator else device).to(device)


def edm_training_level(
    schedule: NoiseSchedule, batch_size: int, generator: Generators = None, device: torch.device | None = None
) -> torch.Tensor:
    """Timesteps `(B,)` of the noise levels that EDM networks learn at: `ln(sigma) ~ N(-1.2, 1.2**2)`, as ratios `sigma
    / alpha` (Karras et al. 2022, Table 1)."""
    return schedule.timestep(torch.exp(-1.2 + 1.2 * normal((batch_size,), generator, device).double()))


def check_start_ratio(schedule: NoiseSchedule, start_ratio: float) -> None:
    """Raise a `ValueError` for a level `sigma / alpha` that the schedule does not have."""
    low, high = (schedule.ratio(torch.tensor(float(t))).item() for t in (schedule.t_min, schedule.t_max))
    if not low < start_ratio <= high * (1 + 1e-6):
        raise ValueError(f"`start_ratio` must lie between {low:.4g} and {high:.4g}, but is {start_ratio}.")


def copy_denoiser(denoiser: Denoiser | GuidedDenoiser, lora: LoraConfig | None = None) -> Denoiser:
    """An unguided, trainable float32 copy of a denoiser: fp32 master weights, whatever the teacher's dtype. With
    `lora`, a float32 adapter on the denoiser's own weights instead."""
    if lora is None:
        network = copy.deepcopy(denoiser.network).float().requires_grad_(True)
    else:
        network = adapted(denoiser.network, lora)
    return Denoiser(network, denoiser.schedule, denoiser.prediction_type)


def check_same_prediction(student: Denoiser, teacher: Denoiser | GuidedDenoiser) -> None:
    """Raise a `ValueError` unless both predict the same thing."""
    if student.prediction_type != teacher.prediction_type:
        raise ValueError(
            f"`student` must predict what the teacher does ({teacher.prediction_type!r}), but predicts "
            f"{student.prediction_type!r}."
        )


class Distiller(ABC):
    """A method: networks to train, and the paper's algorithm box as a generator of losses.

    `updates(batch)` yields `(name, loss)`; the loop steps network `name` before it asks for the next loss. With
    gradient accumulation the loop runs one such generator per micro-batch in lock step. Draws that the whole global
    batch shares come from `batch["shared_generator"]`, if it is there.
    """

    paper: Paper
    student: Denoiser
    sample_shape: tuple[int, int, int]
    teacher: Denoiser | GuidedDenoiser | None = None  # frozen
    origin: Any = None  # the `Teacher` that it was made from, or a bare denoiser
    diagnostics: dict[str, torch.Tensor] = {}  # means over the last micro-batch, which the loop averages
    max_grad_norm: float | None = None
    sanitize_gradients: bool = False  # replace non-finite gradients, as SiD does, instead of stopping

    @property
    @abstractmethod
    def trainable(self) -> dict[str, nn.Module]:
        """What is trained by name: networks, or their adapters; `"student"` is the one that is saved."""

    @abstractmethod
    def updates(self, batch: Batch, generator: Generators = None) -> Updates:
        """Yield `(network name, loss)` in the paper's order, for a batch of `"batch_size"` and `"cond"`."""

    def take_teacher(self, teacher: Any, sample_shape: tuple[int, int, int] | None) -> None:
        """Freeze `teacher` (`Teacher`, `Denoiser` or `GuidedDenoiser`) and keep it; `sample_shape` is for networks
        without a diffusers config."""
        self.origin = getattr(teacher, "origin", None) or teacher
        self.teacher = teacher if isinstance(teacher, nn.Module) else teacher.denoiser
        self.teacher.requires_grad_(False).eval()
        own = getattr(self.origin, "sample_shape", None)
        self.sample_shape = tuple(sample_shape or own or sample_shape_of(self.teacher.network))

    def diagnosis(self, diagnostics: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What is logged of `diagnostics` that are averaged over the global batch."""
        return diagnostics

    def save_state(self, folder: Path, rank: int) -> None:  # noqa: B027 (most have none)
        """Write what this process's method holds besides networks into a checkpoint, without pickles."""

    def load_state(self, folder: Path, rank: int, ranks: int) -> None:  # noqa: B027
        """Read it again, in a run of `ranks` processes."""


class OneStepDistiller(Distiller):
    """A method whose student makes images of noise in one call, or few: what it takes to sample and save it."""

    student_timesteps: list[float]
    init_noise_sigma: float

    @property
    def student_settings(self) -> dict[str, Any]:
        """What `student_scheduler` needs to know."""
        return {"student_timesteps": self.student_timesteps, "init_noise_sigma": self.init_noise_sigma}

    @abstractmethod
    def sample(self, noise: torch.Tensor, cond: Cond | None = None, generator: Generators = None) -> torch.Tensor:
        """The student's images `(B, C, H, W)` of unit-variance `noise`."""
