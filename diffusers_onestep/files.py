"""Files that are whole at every moment: written beside, then renamed."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def check_writable(folder: Path) -> None:
    """Raise a `PermissionError` that names `folder` unless files can be written there, which is made if it is not
    there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PermissionError(
            f"`folder` must be one that can be written to, but {str(folder)!r} is not: {error}"
        ) from error


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Where to write a file that is then renamed to `path`: a reader finds the old one or the new one, whole."""
    beside = path.with_name(f".{path.name}.writing")
    yield beside
    os.replace(beside, path)


def write_json(path: Path, content: dict) -> None:
    """Write beside, then rename."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write beside, then rename."""
    with written_beside(path) as beside:
        beside.write_text(text, encoding="utf-8")
