"""`train()`: the one Accelerate loop for every method, with EMA, checkpoints, resume, samples and trackers.

A step is one student update. Randomness comes from one generator per sample, seeded by (seed, step, place in the
global batch): a resumed run repeats the draws exactly, and they do not depend on how a batch is split over ranks and
micro-batches.
"""

import copy
import importlib.util
import json
import math
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import UserCpuOffloadHook
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, DynamoBackend, broadcast, set_seed
from diffusers.optimization import get_scheduler
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_map_only
from tqdm.auto import tqdm

from .arguments import DTYPES, TrainArguments
from .cards import create_model_card
from .ema import HalfLifeEMA
from .files import write_json
from .health import Health, draw_health
from .lora import is_adapted
from .methods.base import Batch, Distiller, sample_generators
from .models import cast
from .optimization import average_gradients, configure_networks, keep_freed_memory, optimizer_class, set_learning_rate
from .records import RUN_RECORD, license_of, on_hub, run_record, without_secret_settings
from .run_folder import (
    checkpoint_path,
    checkpoint_to_go_on_from,
    checkpoints,
    latest_checkpoint,
    put_aside_old_numbers,
    read_log,
    remove_checkpoint,
    truncate_log,
)
from .sharding import Sharding, gather, keep_input_dtypes, load_part, local, save_part, whole, without_weights
from .trackers import finish_trackers, log_picture, log_text, start_trackers

logger = get_logger(__name__)

DIVERGED = 1000  # beyond the number of any signal
ECHO_SECONDS = 2.0  # within which a launcher passes a signal on

# what trainer_state.json holds, with the schedules
_STATE = ("step", "images_seen", "train_seconds", "best_distance", "sampled_step")


def train(
    distiller: Distiller,
    batches: Iterable[Batch],
    args: TrainArguments,
    *,
    save: Callable[[Path], None] | None = None,
    validate: Callable[[Path], dict[str, float]] | None = None,
) -> None:
    """Train `distiller.trainable` for `args.max_train_steps` student updates.

    Args:
        distiller (`Distiller`): the method.
        batches (iterable of `dict`): endless micro-batches for this process. An object with
            `start(step, accelerator, gradient_accumulation_steps)` is asked for its iterator from there; any other
            iterable is advanced past what an earlier run has used.
        args (`TrainArguments`): settings of the loop.
        save (callable, *optional*): writes the student, `distiller.student.network` as it is then, whose averaged
            weights are in place, into a folder. By default a student that was made from a `Teacher` is saved as that
            teacher's repository would be.
        validate (callable, *optional*): writes sample pictures into a folder and returns numbers to log; the student
            with the lowest `"distance"` among them is kept in `output_dir/best`.

    Raises:
        FloatingPointError: when a loss is not finite; names method, network, step and the last good checkpoint.
        SystemExit: after SIGTERM or Ctrl-C, or a health warning under `stop_on_divergence`, when the checkpoint is
            written.
    """
    if args.dry_run:
        from .dry_run import dry_run

        dry_run(distiller, batches, args)
        return
    if save is None and validate is None:
        from .hooks import default_hooks

        save, validate = default_hooks(distiller, args)
    Trainer(distiller, args, save, validate).run(batches)


class Trainer:
    """The state of one run; use `train()`."""

    def __init__(self, distiller: Distiller, args: TrainArguments, save=None, validate=None):
        self.distiller, self.args = distiller, args
        self.save_student, self.validate = save, validate
        self.output_dir = Path(args.output_dir)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        if args.cpu_threads:
            torch.set_num_threads(args.cpu_threads)
        self.accelerator = args.accelerator(log_with=args.trackers or None, project_dir=self.output_dir / "logs")
        if args.global_batch_size:
            micro_batch = args.train_batch_size * self.accelerator.num_processes
            if args.global_batch_size % micro_batch:
                raise ValueError(
                    f"`global_batch_size` must be a multiple of `train_batch_size` times the number of processes "
                    f"({micro_batch}), but is {args.global_batch_size}."
                )
            args.gradient_accumulation_steps = args.global_batch_size // micro_batch
        if self.accelerator.device.type == "cpu":
            keep_freed_memory()
        self._check_launcher()
        self.sharding = Sharding.of(self.accelerator)
        if self.sharding:
            self._check_sharded()
        set_seed(args.seed)
        self.step, self.images_seen, self.train_seconds = 0, 0, 0.0
        self.best_distance: float | None = None
        self.sampled_step = 0  # of the last pictures
        self._stop_signal = None
        self._batch_size = args.train_batch_size
        self._record: dict = {}
        self._divergence: str | None = None
        self.gradient_norms: dict[str, torch.Tensor] = {}  # of the last update, before clipping
        self.diagnostics: dict[str, torch.Tensor] = {}  # of the last step, means over this rank's samples
        self._check_health()
        self._prepare()

    def _check_health(self) -> None:
        """Refuse to stop on what nobody looks at."""
        args = self.args
        live = args.validation_steps and args.validation_samples
        if args.stop_on_divergence and not live and "fake_score" not in self.distiller.trainable:
            raise ValueError(
                "`stop_on_divergence` needs `validation_steps` and `validation_samples` with "
                f"{type(self.distiller).__name__}, which compares no scores, but they are {args.validation_steps} and "
                f"{args.validation_samples}."
            )

    def _check_launcher(self) -> None:
        """Refuse what Accelerate would do to wrapped models: the loop calls the networks themselves."""
        kind = self.accelerator.distributed_type
        if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
            raise ValueError(f"The launcher must not use {kind.value}: FSDP2 spreads networks here.")
        if self.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
            logger.warning("`dynamo_backend` of the launcher is ignored: networks are trained as they are.")

    def _check_sharded(self) -> None:
        refused = {
            "lora_rank": (is_adapted(self.distiller.student.network), "None", "adapters share the teacher's weights"),
            "offload_teacher": (self.args.offload_teacher, "off", "its weights are spread over the GPUs"),
            "optimizer": (self.args.optimizer == "adamw8bit", "'adamw' or 'radam'", "it takes no sharded weights"),
        }
        for name, (given, allowed, reason) in refused.items():
            if given:
                raise ValueError(f"`{name}` must be {allowed} with FSDP: {reason}.")

    def _prepare(self) -> None:
        args, accelerator = self.args, self.accelerator
        dtype = DTYPES.get(accelerator.mixed_precision)
        self._teacher_hook = self._prepare_teacher()
        for denoiser in (v for v in vars(self.distiller).values() if isinstance(v, torch.nn.Module)):
            if not (self.sharding or (self._teacher_hook and denoiser is self.distiller.teacher)):
                denoiser.to(accelerator.device)
            configure_networks(denoiser, dtype, args.gradient_checkpointing)
            if self.sharding:
                keep_input_dtypes(denoiser)
        if self.sharding:
            self._student_without_weights = without_weights(self.distiller.student.network)
            if self.distiller.teacher is not None:
                self.sharding.shard(self.distiller.teacher.network)
        self.optimizers, self.lr_schedulers, self.parameters = {}, {}, {}
        for name, network in self.distiller.trainable.items():
            # evaluation mode: no DDP wrapper. Gradients of frozen networks flow in some phases and several forwards
            # share one backward, so the loop averages gradients itself.
            if not self.sharding:
                accelerator.prepare_model(network, evaluation_mode=True)
            if accelerator.num_processes > 1:  # all ranks start as rank 0
                for tensor in (*network.parameters(), *network.buffers()):
                    tensor.data.copy_(broadcast(tensor.data.to(accelerator.device)))
            if self.sharding:
                self.sharding.shard(network)
            self.parameters[name] = list(network.parameters())
            optimizer = self._optimizer(name)
            self.lr_schedulers[name] = get_scheduler(
                args.lr_scheduler,
                optimizer,
                num_warmup_steps=args.lr_warmup_steps,
                num_training_steps=args.max_train_steps,
            )
            self.optimizers[name] = optimizer if self.sharding else accelerator.prepare_optimizer(optimizer)
        self.ema = None
        if args.ema_halflife_kimg:
            self.ema = HalfLifeEMA(self.parameters["student"], 1000 * args.ema_halflife_kimg, args.ema_rampup_ratio)
        self.max_grad_norm = self.distiller.max_grad_norm if args.max_grad_norm is None else args.max_grad_norm

    def _optimizer(self, name: str) -> torch.optim.Optimizer:
        """Of one network, some of which have a rate or a first beta of their own."""
        args = self.args
        rate, beta1 = args.learning_rate, args.adam_beta1
        if name == "fake_score" and args.fake_score_learning_rate is not None:
            rate = args.fake_score_learning_rate
        if name == "student" and args.student_adam_beta1 is not None:
            beta1 = args.student_adam_beta1
        return optimizer_class(args.optimizer)(
            self.parameters[name],
            lr=rate,
            betas=(beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.adam_weight_decay,
        )

    def _prepare_teacher(self) -> UserCpuOffloadHook | None:
        """The frozen weights in their dtype, and where they wait for their use."""
        args = self.args
        if not (args.teacher_dtype or args.offload_teacher):
            return None
        teacher = self.distiller.teacher
        if teacher is None:
            raise ValueError(
                f"`teacher_dtype` and `offload_teacher` need a teacher, but {type(self.distiller).__name__} has none."
            )
        if args.teacher_dtype:
            cast(teacher.network, DTYPES[args.teacher_dtype])
        if not args.offload_teacher:
            return None
        if is_adapted(self.distiller.student.network):
            raise ValueError("`offload_teacher` must be off with adapters, which live on the teacher's weights.")
        return cpu_offload_with_hook(teacher.network, self.accelerator.device)[1]

    # the loop

    def run(self, batches: Iterable[Batch]) -> None:
        args, accelerator = self.args, self.accelerator
        self._batch_size = getattr(batches, "batch_size", None) or args.train_batch_size
        if args.lr_scheduler != "constant" and args.lr_warmup_steps >= args.max_train_steps:
            logger.warning(
                "`lr_warmup_steps` (%d) is not below `max_train_steps` (%d): the student hardly learns, since the "
                "learning rate does not reach its value. Give --lr_warmup_steps 0 for so short a run.",
                args.lr_warmup_steps,
                args.max_train_steps,
            )
        if self.save_student is None:
            logger.warning(
                "The student is saved in checkpoints alone: give `save`, or a method that is made from a `Teacher`."
            )
        if checkpoint := checkpoint_to_go_on_from(self.output_dir, args.resume_from_checkpoint):
            self.resume(checkpoint)
        elif args.resume_from_checkpoint:
            accelerator.print(f"No checkpoint in {self.output_dir}: starting from the beginning.")
        if accelerator.is_main_process:
            if checkpoint is None:
                for folder in (self.output_dir, self.output_dir / "best"):
                    put_aside_old_numbers(folder)
            for later in checkpoints(self.output_dir):
                if int(later.name[5:]) > self.step:
                    remove_checkpoint(later)
            args.open_repository(self.output_dir)
            self._record = self.start_record()
            write_json(self.output_dir / "training_args.json", self.settings)
            truncate_log(self.output_dir / "log.jsonl", self.step)
            self.health = Health(read_log(self.output_dir / "log.jsonl"), math.prod(self.distiller.sample_shape))
        start_trackers(accelerator, self.output_dir, self.step, self.settings)
        if self.step >= args.max_train_steps:  # perhaps stopped between the last checkpoint and the student
            self.write_student()
        if checkpoint and self.shows() and self.sampled_step != self.step:  # or between it and its pictures
            self.write_samples()
        stream = self.stream(batches)
        bar = tqdm(
            total=args.max_train_steps, initial=self.step, disable=not accelerator.is_main_process, desc="training"
        )
        with self.signals():
            while self.step < args.max_train_steps:
                started = time.perf_counter()
                losses = self.train_step([next(stream) for _ in range(args.gradient_accumulation_steps)])
                self.train_seconds += time.perf_counter() - started
                bar.update()
                if self.step % args.logging_steps == 0 or self.step == args.max_train_steps:
                    bar.set_postfix({k: f"{v:.4g}" for k, v in losses.items()})
                    self.log(losses)
                last = self.step == args.max_train_steps
                saved = last or self.step % args.checkpointing_steps == 0
                if saved:  # before the pictures, which may ask for more memory than there is
                    bar.set_description("saving")
                    self.save_checkpoint()
                if self.shows():
                    bar.set_description("sampling")
                    self.write_samples()
                bar.set_description("trained" if last else "training", refresh=last)
                if stopping := self.stopping():
                    if not saved:
                        self.save_checkpoint()
                    self.leave(stopping)
        bar.close()
        finish_trackers(self.accelerator)
        if self.save_student is not None:
            accelerator.print(f"The student and its card are in {self.output_dir}.")
        if accelerator.is_main_process:
            args.push(self.output_dir)

    def shows(self) -> bool:
        """Whether pictures are due after this step."""
        every, last = self.args.validation_steps, self.args.max_train_steps
        return self.step >= last or bool(every and self.step % every == 0)

    def train_step(self, micro_batches: list[Batch]) -> dict[str, float]:
        """One student update and all that belongs to it; returns the mean loss of each network."""
        count = len(micro_batches)
        runs = []
        for number, batch in enumerate(micro_batches):
            (shared,) = sample_generators(self.args.seed, self.step, ["shared"])
            own = self.generators(number, batch["batch_size"])
            runs.append(self.distiller.updates(self.to_device(batch) | {"shared_generator": shared}, own))
        losses: dict[str, list[torch.Tensor]] = {}
        found: list[dict[str, torch.Tensor]] = []
        while True:
            items = []
            for run in runs:
                if (item := next(run, None)) is not None:
                    name, loss = item
                    self.accelerator.backward(loss / count)
                    items.append((name, loss.detach() / count))
                    del item, loss
                if self.distiller.diagnostics:
                    found.append(self.distiller.diagnostics)
                    self.distiller.diagnostics = {}
            if not items:
                break
            name = items[0][0]
            loss = self.accelerator.reduce(sum(loss for _, loss in items), "mean")
            if not torch.isfinite(loss):
                self.fail(name, loss)
            losses.setdefault(name, []).append(loss)
            self.optimizer_step(name)
        self.diagnostics = {key: sum(own[key] for own in found) / len(found) for key in (found[0] if found else ())}
        batch_size = sum(batch["batch_size"] for batch in micro_batches) * self.accelerator.num_processes
        if self.ema is not None:
            self.ema.images_seen, self.ema.batch_size = self.images_seen, batch_size
            for parameter in self.parameters["student"]:
                parameter.requires_grad_(True)  # EMAModel copies what needs no gradient
            self.ema.step(self.parameters["student"])
        for scheduler in self.lr_schedulers.values():
            scheduler.step()
        self.step += 1
        self.images_seen += batch_size
        return {name: torch.stack(values).mean().item() for name, values in losses.items()}

    def optimizer_step(self, name: str) -> None:
        optimizer, parameters = self.optimizers[name], self.parameters[name]
        if self.accelerator.num_processes > 1 and not self.sharding:
            average_gradients(self.accelerator, parameters)
        gradients = [p.grad for p in parameters if p.grad is not None]
        # the gradient scaler of fp16 skips such steps, and has to see them
        if self.distiller.sanitize_gradients and self.accelerator.mixed_precision != "fp16":
            for gradient in gradients:
                local(gradient).nan_to_num_(nan=0.0, posinf=1e5, neginf=-1e5)
        self.accelerator.unscale_gradients(optimizer)
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, norm)
        norm = whole(norm)
        if self.accelerator.mixed_precision != "fp16" and not torch.isfinite(norm):
            self.fail(name, norm, "gradient norm")
        self.gradient_norms[name] = norm.detach()
        optimizer.step()
        if self.sharding:
            self.sharding.reshard()
        for other in self.optimizers.values():
            other.zero_grad()
        if self._teacher_hook:
            self._teacher_hook.offload()

    def generators(self, micro_batch: int, batch_size: int) -> list[torch.Generator]:
        first = (micro_batch * self.accelerator.num_processes + self.accelerator.process_index) * batch_size
        return sample_generators(self.args.seed, self.step, range(first, first + batch_size))

    def stream(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        accumulation = self.args.gradient_accumulation_steps
        if hasattr(batches, "start"):
            return iter(batches.start(self.step, self.accelerator, accumulation))
        return islice(iter(batches), self.step * accumulation, None)

    def to_device(self, batch: Batch) -> Batch:
        device = self.accelerator.device
        moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        return moved | {"cond": {k: v.to(device) for k, v in batch.get("cond", {}).items()}}

    def fail(self, name: str, value: torch.Tensor, what: str = "loss") -> None:
        last = latest_checkpoint(self.output_dir)
        text = (
            f"{type(self.distiller).__name__}: the {what} of network {name!r} is {value.item()} at step {self.step}. "
            f"Last good checkpoint: {last or 'none'}. Lower `learning_rate` or use `mixed_precision` 'no'."
        )
        if self.accelerator.is_main_process:
            self.write_line({"warning": text})
            self.draw_health()
        raise FloatingPointError(text)

    # stopping and going on

    @contextmanager
    def signals(self):
        """Note SIGTERM and Ctrl-C; the loop leaves after the update at hand. A second one interrupts at once, but for
        the echo of a launcher, which passes on what the whole process group has received already."""
        noted = math.inf

        def note(number, frame):
            nonlocal noted
            if self._stop_signal is None:
                self._stop_signal, noted = number, time.monotonic()
            elif time.monotonic() > noted + ECHO_SECONDS:
                raise KeyboardInterrupt

        previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def stopping(self) -> int:
        """The signal that any rank has received, `DIVERGED`, or 0."""
        own = DIVERGED if self._divergence else self._stop_signal or 0
        if self.accelerator.num_processes == 1:
            return own
        flag = torch.tensor([float(own)], device=self.accelerator.device)
        return int(self.accelerator.gather(flag).max().item())

    def leave(self, number: int) -> None:
        why = "--stop_on_divergence" if number == DIVERGED else signal.Signals(number).name
        if self.accelerator.is_main_process:
            print(
                f"\nStopped by {why} after step {self.step}; the checkpoint is written. "
                f"{self._divergence or 'Go on with the same command and --resume_from_checkpoint latest.'}",
                flush=True,
            )
        finish_trackers(self.accelerator)
        raise SystemExit(1 if number == DIVERGED else 128 + number)

    def save_checkpoint(self) -> None:
        """Write `checkpoints/step-N`, complete or absent, and the student as it stands."""
        final = checkpoint_path(self.output_dir, self.step)
        beside = final.with_name(f".{final.name}.writing")
        if self.accelerator.is_main_process:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        main = self.accelerator.is_main_process
        self.accelerator.save_state(str(beside))
        self.distiller.save_state(beside, self.accelerator.process_index)
        if self.sharding:
            for name, network in self.distiller.trainable.items():
                save_part(network, self.optimizers[name], beside / f"{name}.safetensors", main)
        averages = gather(self.ema.named(), main) if self.ema is not None else {}
        if main:
            if averages:
                save_file(averages, beside / "ema.safetensors")
            self.write_state(beside)
        self.accelerator.wait_for_everyone()
        if main:
            if final.exists():
                remove_checkpoint(final)
            os.replace(beside, final)
            if self.args.checkpoints_total_limit:
                for old in checkpoints(self.output_dir)[: -self.args.checkpoints_total_limit]:
                    remove_checkpoint(old)
        self.write_student()

    def write_state(self, checkpoint: Path) -> None:
        """What a checkpoint holds besides tensors."""
        state = {name: getattr(self, name) for name in _STATE}
        schedules = {name: scheduler.state_dict() for name, scheduler in self.lr_schedulers.items()}
        schedules = tree_map_only(torch.Tensor, float, schedules)  # rates of torchao's optimizers
        write_json(checkpoint / "trainer_state.json", state | {"lr_schedulers": schedules})

    def write_student(self) -> None:
        """The student as it stands, into the output folder."""
        if self.save_student is not None:
            with self.averaged(), torch.no_grad():
                self.write_folder(self.output_dir)
        self.accelerator.wait_for_everyone()

    @contextmanager
    def whole_student(self):
        """The student in one piece, on the main process, to be written; all ranks must ask for it."""
        denoiser = self.distiller.student
        sharded = denoiser.network
        if self.sharding:
            weights = gather(sharded.state_dict().items(), self.accelerator.is_main_process)
            if weights:
                denoiser.network = copy.deepcopy(self._student_without_weights)
                denoiser.network.load_state_dict(weights, assign=True)
        try:
            yield
        finally:
            denoiser.network = sharded

    def write_folder(self, folder: Path, picture: Path | None = None) -> None:
        """The student, what its card is made of, and the card, by the main process; all ranks must call it."""
        with self.whole_student():
            if self.accelerator.is_main_process:
                put_aside_old_numbers(folder, self.step)
                self.save_student(folder)
        if picture is not None and picture.is_file() and self.accelerator.is_main_process:
            shutil.copy(picture, folder)
        self.write_about(folder)

    def write_about(self, folder: Path) -> None:
        """What the card of a folder is made of, and the card, by the main process."""
        if not self.accelerator.is_main_process:
            return
        write_json(folder / "training_args.json", self.settings)
        numbers = {"steps": self.step, "images_seen": self.images_seen, "seconds": round(self.train_seconds, 1)}
        write_json(folder / RUN_RECORD, self._record | numbers | {"best_distance": self.best_distance})
        if (folder / "model_index.json").is_file():  # what is saved may be a part of a model
            create_model_card(folder)

    @property
    def settings(self) -> dict:
        """The arguments, without secrets, and what the objects that `train()` was given say instead of them."""
        origin = self.distiller.origin
        named = (
            {"pretrained_teacher_model": origin.name, "revision": origin.revision} if hasattr(origin, "name") else {}
        )
        effective = {"train_batch_size": self._batch_size, "mixed_precision": self.accelerator.mixed_precision}
        return without_secret_settings(named | asdict(self.args) | effective)

    def start_record(self) -> dict:
        """Method, teacher, command, versions and hardware of this run."""
        origin, args = self.distiller.origin, self.args
        start = getattr(args, "student_init", None)
        return run_record(
            type(self.distiller).__name__,
            self.distiller.paper,
            getattr(args, "pretrained_teacher_model", None) or getattr(origin, "name", None),
            getattr(args, "revision", None) or getattr(origin, "revision", None),
            getattr(args, "license", None),
        ) | {
            "guidance_scale": getattr(self.distiller.teacher, "guidance_scale", 1.0),
            "datasets": on_hub([getattr(args, name, None) for name in ("dataset", "dataset_name", "pairs")]),
            **({"start": {"name": start, "license": license_of(start)}} if start else {}),
        }

    def resume(self, path: Path) -> None:
        """Load a checkpoint: its weights and moments, to go on by this run's rates, betas, epsilon and decay."""
        if any((path / f"{name}.safetensors").is_file() for name in self.optimizers) != (self.sharding is not None):
            other = "without" if self.sharding else "with"
            raise ValueError(
                f"`resume_from_checkpoint` must be launched as its run was, but {str(path)!r} is of one {other} FSDP."
            )
        given = {name: [dict(group) for group in self.optimizers[name].param_groups] for name in self.optimizers}
        self.accelerator.load_state(str(path))
        self.distiller.load_state(path, self.accelerator.process_index, self.accelerator.num_processes)
        state = json.loads((path / "trainer_state.json").read_text())
        for name in _STATE:
            setattr(self, name, state.get(name, state["step"]))  # earlier releases had no `sampled_step`
        if self.sharding:
            self._resume_sharded(path)
        for name, scheduler in self.lr_schedulers.items():
            scheduler.load_state_dict(state["lr_schedulers"][name] | {"base_lrs": scheduler.base_lrs})
            for group, own in zip(self.optimizers[name].param_groups, given[name], strict=True):
                (last,) = state["lr_schedulers"][name]["_last_lr"]
                group.update({key: own[key] for key in ("initial_lr", "betas", "eps", "weight_decay")})
                rate = float(own["initial_lr"]) * scheduler.lr_lambdas[0](scheduler.last_epoch)
                set_learning_rate(group, rate)
                if rate > 2 * last:
                    logger.warning(
                        "The learning rate of the %s goes from %.1e to %.1e at once: Adam's moments are those of "
                        "small steps, and runs have diverged from this. A new run, with --lr_warmup_steps and, where "
                        "the script has it, --student_init %s, goes on from the student itself.",
                        name,
                        last,
                        rate,
                        self.output_dir,
                    )
        if self.ema is not None:
            if not (path / "ema.safetensors").is_file():
                raise ValueError(
                    f"`ema_halflife_kimg` must be 0 to go on from {str(path)!r}, which has no averaged weights, but "
                    f"is {self.args.ema_halflife_kimg}."
                )
            self.ema.load_tensors(load_file(path / "ema.safetensors"))

    def _resume_sharded(self, path: Path) -> None:
        """Networks and optimizers, which Accelerate leaves to us."""
        for name, network in self.distiller.trainable.items():
            load_part(network, self.optimizers[name], path / f"{name}.safetensors")

    # what a person looks at

    @contextmanager
    def averaged(self):
        """The student with its EMA weights, in eval mode."""
        network = self.distiller.student.network
        was_training = network.training
        network.eval()
        if self.sharding:
            self.sharding.reshard()
        try:
            if self.ema is None:
                yield
            else:
                with self.ema.applied(self.parameters["student"]):
                    yield
        finally:
            network.train(was_training)
            if self.sharding:
                self.sharding.reshard()

    def write_samples(self) -> None:
        main = self.accelerator.is_main_process
        if self.validate is not None and (main or self.sharding):  # sharded networks answer all ranks or none
            with self.averaged(), torch.no_grad(), tempfile.TemporaryDirectory() as unseen:
                values = self.validate(self.output_dir if main else Path(unseen))
                if main:
                    log_picture(self.accelerator, self.output_dir / "samples.png", self.step)
                if self.is_best(values.get("distance", math.inf)) and self.save_student is not None:
                    self.write_folder(self.output_dir / "best", picture=self.output_dir / "samples.png")
            if self._teacher_hook:
                self._teacher_hook.offload()
            if main and values:
                self.write_log(values)
        if main:
            self.draw_health()
            log_picture(self.accelerator, self.output_dir / "health.png", self.step)
        self.sampled_step = self.step
        written = checkpoint_path(self.output_dir, self.step)
        if main and written.is_dir():  # a resumed run knows that they are there, and what is to be beaten
            self.write_state(written)
            if self.save_student is not None:
                self.write_about(self.output_dir)
        self.accelerator.wait_for_everyone()

    def is_best(self, distance: float) -> bool:
        """Whether `distance`, as the main process has it, is the least so far; it is noted then."""
        if self.sharding:
            distance = broadcast(torch.tensor([distance], dtype=torch.float64, device=self.accelerator.device)).item()
        best = math.inf if self.best_distance is None else self.best_distance
        if distance < best:
            self.best_distance = distance
        return distance < best

    def draw_health(self) -> None:
        """Rewrite `health.png`; without matplotlib there is `log.jsonl` alone."""
        if importlib.util.find_spec("matplotlib"):
            draw_health(self.output_dir / "log.jsonl", self.output_dir / "health.png")

    def log(self, losses: dict[str, float]) -> None:
        values = {f"loss/{name}": value for name, value in losses.items()}
        diagnostics = self.accelerator.reduce(self.diagnostics, "mean")
        values |= {name: float(value) for name, value in self.distiller.diagnosis(diagnostics).items()}
        norms = {name: float(norm) for name, norm in self.gradient_norms.items()}
        values |= {f"gradient_norm/{name}": norm for name, norm in norms.items()}
        if norms.get("fake_score"):
            values["gradient_norm_ratio"] = norms["student"] / norms["fake_score"]
        if self.accelerator.is_main_process:
            self.write_log(values)

    def write_log(self, values: dict[str, float]) -> None:
        self.accelerator.log(values, step=self.step)
        self.write_line(values)
        texts = self.health.add(values)
        for text in texts:
            logger.warning("Step %d: %s", self.step, text)
            self.write_line({"warning": text})
            if self.args.stop_on_divergence:
                self._divergence = text
        if texts:
            log_text(self.accelerator, "warning", "\n".join(texts), self.step)
            self.draw_health()  # a run that stops by it is looked at

    def write_line(self, values: dict[str, float | str]) -> None:
        about = {"step": self.step, "images": self.images_seen, "seconds": round(self.train_seconds, 1)}
        with open(self.output_dir / "log.jsonl", "a") as file:
            file.write(json.dumps(about | values) + "\n")
