"""`--dry_run`: what a run would do, said in words and shown by two steps."""

import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, replace

import torch

from .arguments import TrainArguments
from .methods.base import Batch, Distiller, OneStepDistiller
from .records import without_secret_settings
from .trainer import Trainer


def dry_run(distiller: Distiller, batches: Iterable[Batch], args: TrainArguments, batch_size: int = 2) -> None:
    """Print what a run would do, and take two steps with `batch_size` samples, in a folder that is then removed."""
    with tempfile.TemporaryDirectory() as folder:
        planned = replace(args, output_dir=folder, report_to=None)
        trainer = Trainer(distiller, planned)
        trainer.accelerator.print(run_summary(distiller, planned, trainer.accelerator.num_processes))
        stream = trainer.stream(batches)
        for _ in range(2):
            started = time.perf_counter()
            losses = trainer.train_step([_first(next(stream), batch_size)])
            took = time.perf_counter() - started
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
            trainer.accelerator.print(f"step {trainer.step}: {batch_size} samples, {took:.1f} s, losses: {numbers}")


def _first(batch: Batch, size: int) -> Batch:
    cut = {k: v[:size] if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    cond = {k: v[:size] for k, v in batch.get("cond", {}).items()}
    return cut | {"cond": cond, "batch_size": min(size, batch["batch_size"])}


def run_summary(distiller: Distiller, args: TrainArguments, num_processes: int) -> str:
    """What a run would do: method, networks, batch, steps, levels and settings."""
    lines = [f"{type(distiller).__name__} ({distiller.paper.title}, arXiv:{distiller.paper.arxiv_id})"]
    teacher = {"teacher": distiller.teacher.network} if distiller.teacher is not None else {}
    for name, network in (teacher | distiller.trainable).items():
        parameters = sum(p.numel() for p in network.parameters())
        dropout = getattr(network, "config", {}).get("dropout")
        lines.append(
            f"  {name}: {type(network).__name__}, {parameters:,} parameters"
            + ("" if dropout is None else f", dropout {dropout}")
        )
    batch = args.train_batch_size * args.gradient_accumulation_steps * num_processes
    lines.append(
        f"  batch: {batch} = {args.train_batch_size} samples x {args.gradient_accumulation_steps} micro-batches x "
        f"{num_processes} processes"
    )
    lines.append(f"  steps: {args.max_train_steps:,}, {args.max_train_steps * batch:,} images")
    if isinstance(distiller, OneStepDistiller):
        timesteps = distiller.student_timesteps
        levels = distiller.student.schedule.ratio(torch.tensor(timesteps, dtype=torch.float64)).tolist()
        where = ", ".join(f"{t:.6g} (sigma / alpha {level:.6g})" for t, level in zip(timesteps, levels, strict=True))
        lines.append(f"  student at t = {where}, noise scaled by {distiller.init_noise_sigma:.6g}")
    own = {k: v for k, v in vars(distiller).items() if isinstance(v, (int, float, str, bool)) and k[0] != "_"}
    lines.append("  method: " + ", ".join(f"{k} {v}" for k, v in sorted(own.items())))
    settings = without_secret_settings(asdict(args))
    lines.append("  settings: " + ", ".join(f"{k} {v}" for k, v in sorted(settings.items())))
    return "\n".join(lines)
