"""What a run writes down about itself, so that its card can be made from the folder alone; never a secret."""

import os
import platform
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import PartialState
from diffusers.utils import logging
from huggingface_hub import ModelCard, get_token, hf_hub_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from yaml import YAMLError

from .files import read_json, write_json
from .methods.base import Paper
from .repository import resolve_model

logger = logging.get_logger(__name__)

RUN_RECORD = "training_run.json"  # beside training_args.json: what was asked for; here: what it came to
CONVERSION_RECORD = "conversion.json"  # the same of a published file that was converted
PACKAGES = ("diffusers-onestep", "torch", "diffusers", "transformers", "accelerate", "peft", "torch-fidelity")

HIDDEN = "REDACTED"
_SECRET_NAME = re.compile(
    r"(?:(?:^|[_-])(?:token|secret|passphrase|credentials?|(?:api)?key)|[_-](?:pass|pwd|pat)|passw(?:or)?d)"
    r"(?:[_-](?:read|write|ro|rw|\d+))?$",
    re.I,
)
_SECRET_IN_URL = re.compile(
    r"([?&](?:[\w-]*(?:token|key|secret|passw(?:or)?d|signature)|sig|x-amz-[\w-]+)=)[^&\s\"']+", re.I
)
_SECRET_SHAPE = re.compile(
    r"\bhf_\w{20,}|\bsk-[\w-]{20,}|\bgh[opsu]_\w{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{20,}|\bxox[abeprs]-[\w-]{10,}|\bAIza[\w-]{35}|\bAKIA[A-Z0-9]{16}\b|(?<=://)[^/\s@]+(?=@)"
)
_LICENSE_KEYS = ("license", "license_name", "license_link")


def without_secrets(text: str) -> str:
    """`text` with tokens, what is secret in URLs and the values of this environment's secret variables hidden."""
    values = [value for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) >= 8]
    for value in sorted({*values, get_token() or ""} - {""}, key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return _SECRET_SHAPE.sub(HIDDEN, _SECRET_IN_URL.sub(rf"\g<1>{HIDDEN}", text))


def without_secret_words(words: list[str]) -> list[str]:
    """A command's words with the values of `--hub_token VALUE`, `--api-key=VALUE`, `WANDB_API_KEY=VALUE` hidden."""
    shown, secret_follows = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        named = bool(_SECRET_NAME.search(name)) and " " not in name
        if secret_follows and not word.startswith("--"):
            word = HIDDEN
        elif named and equals:
            word = f"{name}={HIDDEN}"
        secret_follows = named and not equals and word.startswith("-")
        shown.append(without_secrets(word))
    return shown


@contextmanager
def shown_arguments() -> Iterator[None]:
    """Trackers copy `sys.argv` when they start: meanwhile it has no secrets."""
    own = sys.argv
    sys.argv = without_secret_words(own)
    try:
        yield
    finally:
        sys.argv = own


def without_secret_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with those that are named like a secret set to None, and secrets inside the others hidden."""
    shown = {name: None if _SECRET_NAME.search(name) else value for name, value in settings.items()}
    return {name: without_secrets(value) if isinstance(value, str) else value for name, value in shown.items()}


def command_line() -> str | None:
    """The command that runs this process, with that of its launcher (`accelerate launch ...`), quoted for a shell;
    None in a notebook or a Python prompt."""
    if "ipykernel" in sys.modules or sys.argv[0] in ("", "-c"):
        return None
    words = list(sys.orig_argv)
    try:
        launcher = psutil.Process().parent().cmdline()
    except (psutil.Error, AttributeError):  # gone, or another user's
        launcher = []
    if Path((launcher or [""])[0]).name.startswith("python") and launcher[-len(sys.argv) :] == sys.argv:
        words = launcher
    if Path(words[0]).name.startswith("python"):
        script = Path(words[1])
        installed = script.is_absolute() and script.parent == Path(sys.executable).parent
        words = [script.name, *words[2:]] if installed else ["python", *words[1:]]
    return shlex.join(without_secret_words(words))


def read_record(folder: Path) -> dict[str, Any]:
    """What a folder says of the training, or else of the conversion, that it is from; empty if nothing."""
    records = (folder / name for name in (RUN_RECORD, CONVERSION_RECORD))
    return next((read_json(record) for record in records if record.is_file()), {})


def license_of(path_or_id: str, revision: str | None = None) -> dict[str, Any]:
    """What a model's card, or else the record of its training or conversion, says of its licence: `license`,
    `license_name`, `license_link`, `gated` where users must accept conditions first, and `notice`, the attributions
    of a folder's NOTICE; empty if nothing can be read."""
    folder = Path(resolve_model(path_or_id))
    notice = {"notice": (folder / "NOTICE").read_text(encoding="utf-8")} if (folder / "NOTICE").is_file() else {}
    recorded = read_record(folder)
    if recorded and not (folder / "README.md").is_file():
        return recorded.get("license", {}) | notice
    try:
        card = folder / "README.md" if folder.is_dir() else hf_hub_download(path_or_id, "README.md", revision=revision)
        data = ModelCard(Path(card).read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    except (OSError, ValueError, YAMLError):  # the Hub client's errors are among these
        return notice
    found = notice | {key: data.get(key) for key in _LICENSE_KEYS if data.get(key)}
    link = found.get("license_link")
    if link and "://" not in link:
        del found["license_link"]  # a file in this folder, which no student's card could link to
        if not folder.is_dir():
            found["license_link"] = f"https://huggingface.co/{path_or_id}/blob/{revision or 'main'}/{link}"
    if data.get("extra_gated_prompt") or data.get("extra_gated_fields"):
        found["gated"] = True
    return found


def run_record(
    method: str, paper: Paper, teacher: str | None = None, revision: str | None = None, license: str | None = None
) -> dict[str, Any]:
    """What stays the same through a run, for `training_run.json`: method, teacher with its licence and what its own
    conversion noted, command, versions, hardware.

    Args:
        method (`str`): its name.
        paper (`Paper`): where it comes from.
        teacher (`str`, *optional*): as it was given: a Hub id, a folder or a shipped name.
        revision (`str`, *optional*): of the teacher's repository.
        license (`str`, *optional*): of a model without a teacher; others inherit theirs.
    """
    on_hub = teacher is not None and not Path(resolve_model(teacher)).is_dir()
    inherited = license_of(teacher, revision) if teacher else {"license": license} if license else {}
    if on_hub and not inherited:
        logger.warning(f"The licence of {teacher!r} could not be read: a push will look for it again.")
    return {
        "method": method,
        "paper": asdict(paper),
        "teacher": teacher,
        "base_model": teacher if on_hub else None,
        "revision": revision,
        "license": inherited,
        "notes": read_record(Path(resolve_model(teacher))).get("notes", []) if teacher else [],
    } | provenance(command_line())


def look_up_license(folder: Path) -> None:
    """Note the licence of a folder's teacher, if the run that made it could not read it."""
    path = folder / RUN_RECORD
    record = read_json(path) if path.is_file() else {}
    lost = record.get("base_model") and not record.get("license")
    if lost and (found := license_of(record["base_model"], record.get("revision"))):
        write_json(path, record | {"license": found})


def on_hub(names: Sequence[str | None]) -> list[str]:
    """Those that may name data sets of the Hub, and nothing that is here."""
    found = []
    for name in names:
        if name and not Path(name).exists() and not name.endswith(".npz"):
            with suppress(HFValidationError):
                validate_repo_id(name)
                found.append(name)
    return found


def provenance(command: str) -> dict[str, Any]:
    """What numbers were measured with: command, versions, hardware."""
    return {
        "command": command,
        "versions": {"python": platform.python_version()} | _versions(PACKAGES),
        "hardware": f"{_processor()}, {os.cpu_count()} cores, "
        f"{PartialState().num_processes} processes with {torch.get_num_threads()} threads each, "
        f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}",
    }


def _processor() -> str:
    """The name of the CPU, where the system tells it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _versions(names: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue  # an extra that is not installed took no part
    return found
