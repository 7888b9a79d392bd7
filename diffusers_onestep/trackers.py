"""TensorBoard, Weights & Biases and trackio: one record per run, pictures too, and no secrets."""

import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image

from .files import write_text
from .records import shown_arguments


def start_trackers(accelerator: Accelerator, output_dir: Path, step: int, settings: dict[str, Any]) -> None:
    """Open this run's record in every tracker; a run that is resumed in its folder goes on with its own."""
    logs = output_dir / "logs"
    run_id = logs / "run_id"
    if accelerator.is_main_process and accelerator.log_with and not (step and run_id.is_file()):
        logs.mkdir(exist_ok=True)
        write_text(run_id, uuid.uuid4().hex[:8])
    own = run_id.read_text() if run_id.is_file() else None
    name = output_dir.resolve().name
    environment = os.environ.get
    options = {
        "tensorboard": {"purge_step": step + 1},
        "wandb": {
            "id": environment("WANDB_RUN_ID", own),
            "name": environment("WANDB_NAME", name),
            "dir": environment("WANDB_DIR", str(logs)),
            "resume": "allow",
        },
        "trackio": {"name": f"{name}-{own}", "resume": "allow"},
    }
    scalars = {k: v if isinstance(v, (int, float, str, bool)) or v is None else str(v) for k, v in settings.items()}
    with shown_arguments():
        accelerator.init_trackers("diffusers-onestep", config=scalars, init_kwargs=options)


def log_picture(accelerator: Accelerator, path: Path, step: int) -> None:
    """Show a picture in the trackers that take one."""
    if not (accelerator.trackers and path.is_file()):
        return
    picture = Image.open(path).convert("RGB")
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            shown = {path.stem: np.asarray(picture)[None]}
            tracker.log_images(shown, step=step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({path.stem: [picture]}, step=step)
        elif tracker.name == "trackio":
            from trackio import Image as TrackioImage

            tracker.log({path.stem: TrackioImage(picture)}, step=step)


def log_text(accelerator: Accelerator, name: str, text: str, step: int) -> None:
    """Show a text in the trackers that take one."""
    for tracker in accelerator.trackers:
        if tracker.name in ("tensorboard", "wandb", "trackio"):
            tracker.log({name: text}, step=step)


def finish_trackers(accelerator: Accelerator) -> None:
    """Not `end_training`, which takes the process group from a second `train()` of the same process."""
    for tracker in accelerator.trackers:
        tracker.finish()
