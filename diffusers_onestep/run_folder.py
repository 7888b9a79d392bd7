"""What a run leaves in its folder and finds there again: checkpoints, the log, old numbers."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from .files import read_json, write_text
from .records import RUN_RECORD


def checkpoint_path(output_dir: Path, step: int) -> Path:
    return output_dir / "checkpoints" / f"step-{step:06d}"


def checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted((Path(output_dir) / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))


def remove_checkpoint(path: Path) -> None:
    """Hide it first: a checkpoint is complete or absent."""
    hidden = path.with_name(f".{path.name}.removing")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(path, hidden)
    shutil.rmtree(hidden)


def latest_checkpoint(output_dir: Path) -> Path | None:
    return next(reversed(checkpoints(output_dir)), None)


def checkpoint_to_go_on_from(output_dir: Path, wanted: str | None) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` names; None where a run starts from the beginning.

    Raises:
        ValueError: if the checkpoint is none, or a new run would start in the folder of another one.
    """
    own = checkpoints(output_dir)
    if not wanted:
        if own:
            raise ValueError(
                f"`output_dir` must hold no checkpoints of another run, but {str(output_dir)!r} does: give another "
                "folder, or go on with --resume_from_checkpoint latest."
            )
        return None
    path = latest_checkpoint(output_dir) if wanted == "latest" else Path(wanted)
    if own and path.resolve().parent != own[0].resolve().parent:
        raise ValueError(
            f"`resume_from_checkpoint` must be one of the checkpoints that `output_dir` {str(output_dir)!r} holds "
            f"already, but is {wanted!r}: give another folder."
        )
    if path is not None and not (path / "trainer_state.json").is_file():
        raise ValueError(f"`resume_from_checkpoint` must be 'latest' or a complete checkpoint, but is {wanted!r}.")
    return path


def truncate_log(path: Path, step: int) -> None:
    """Drop what an interrupted run logged after `step`."""
    if path.exists():
        write_text(path, "".join(json.dumps(line) + "\n" for line in read_log(path) if line["step"] <= step))


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a `log.jsonl`, but for a last one that a full disk or a kill cut off; none if there is no file."""
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines() if line]


def put_aside_old_numbers(folder: Path, step: int | None = None) -> None:
    """What was measured of this folder's student at another step than `step`, or in another run if that is None, says
    nothing of the one that comes."""
    record, measured = folder / RUN_RECORD, folder / "metrics.json"
    if record.is_file() and measured.is_file() and ((old := read_json(record).get("steps")) != step or step is None):
        measured.replace(folder / ("metrics-old.json" if old is None else f"metrics-step-{old}.json"))
        (folder / "quality.png").unlink(missing_ok=True)
