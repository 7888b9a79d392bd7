"""Pushes to the Hub: one commit of a student, its card, metrics and pictures."""

import json
import shlex
import tempfile
from pathlib import Path

from accelerate import PartialState
from diffusers.utils import logging
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from .cards import create_model_card, is_ours
from .files import check_writable, read_json
from .lora import LORA_WEIGHTS
from .records import look_up_license, without_secrets

logger = logging.get_logger(__name__)

# what scripts write beside the model: of an earlier push it says nothing of this one
_REPLACED = ("model_index.json", "NOTICE", "samples.png", "quality.png", "health.png", "metrics.json", LORA_WEIGHTS)
_NO_SAFETENSORS = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5", ".onnx"}


def student_files(folder: Path) -> list[str]:
    """What a push uploads, as paths in the repository: the model or scheduler (and adapters beside it), the card,
    metrics, pictures, and the texts of licences and attributions.

    Raises:
        ValueError: if a part of the model is missing, or its weights are no safetensors.
    """
    if not folder.is_dir():
        raise ValueError(f"`folder` must be one that a training script wrote, but {str(folder)!r} does not exist.")
    index = folder / "model_index.json"
    parts = ["scheduler"]
    if index.is_file():
        parts = [part for part, entry in read_json(index).items() if isinstance(entry, list) and entry[0]]
    files = [file for file in (index, folder / "README.md", folder / "metrics.json") if file.is_file()]
    files += [file for kind in ("*.png", LORA_WEIGHTS, "LICENSE*", "NOTICE*") for file in sorted(folder.glob(kind))]
    for part in parts:
        own = [file for file in sorted((folder / part).rglob("*")) if file.is_file() and not file.name.startswith(".")]
        if not own:
            raise ValueError(f"`folder` must hold a whole model or a scheduler, but {str(folder)!r} lacks {part!r}.")
        if unsafe := [file.name for file in own if file.suffix in _NO_SAFETENSORS]:
            raise ValueError(f"`folder` must hold safetensors weights alone, but {str(folder / part)!r} has {unsafe}.")
        files += own
    return [file.relative_to(folder).as_posix() for file in files]


def open_repository(repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Make the repository if it is not there.

    Returns:
        `str`: its whole name, with the user's.

    Raises:
        ValueError: if `repo_id` is no name of a repository, or it is public already and `private` asks for a private
            one.
        ConnectionError: if the Hub refused or could not be reached.
    """
    api = HfApi(token=token)
    try:
        name = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        public = private and not api.model_info(name).private
    except HFValidationError as error:
        raise ValueError(f"`repo_id` must be 'user/name' or 'name', but is {repo_id!r}: {error}") from error
    except Exception as error:  # the HTTP library and its errors changed between versions of the Hub client
        raise ConnectionError(f"The Hub did not open the repository {repo_id!r}{_reason(error)}") from error
    if public:
        raise ValueError(f"`private` must be False for {name!r}, which is public: make it private on the Hub first.")
    return name


def push_student(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
) -> str | None:
    """Push a student to the Hub: one commit of the model, its card, metrics and pictures, and nothing else.

    The folder is only read, but for its card, which is made anew with the name of the repository (one that was edited
    by hand, or downloaded, stays as it is); a card that was edited on the Hub stays there. Parts of the model that is
    there, metrics, pictures and adapters that are on the Hub and not in the folder are deleted. Of several processes
    the main one pushes.

    Args:
        folder (`str` or `Path`): what a script of `training/` wrote.
        repo_id (`str`): `"user/name"`, or `"name"` for the user who is logged in; made if it is not there.
        private (`bool`, *optional*): make a new repository private.
        revision (`str`, *optional*): branch to commit to, made if it is not there, or the `refs/pr/N` of a pull
            request. Default: `main`.
        create_pr (`bool`, *optional*, defaults to `False`): open a pull request against `main` instead.
        token (`str`, *optional*): default: `HF_TOKEN`, or what `hf auth login` stored.

    Returns:
        `str`: URL of the commit or the pull request (of the commit that is there, if nothing has changed); None on
            other processes than the main one.

    Raises:
        ValueError: if the folder holds no whole student, or a file with a secret in it; or if the repository should be
            private and is public.
        ConnectionError: if the Hub refused or could not be reached; says how to try again.

    Example:

    ```python
    >>> from diffusers_onestep import push_student
    >>> push_student("fashion32-sid", "user/fashion32-sid", private=True)
    'https://huggingface.co/user/fashion32-sid/commit/...'
    ```
    """
    if not PartialState().is_main_process:
        return None
    if create_pr and revision is not None:
        raise ValueError(f"`revision` must be None with `create_pr`, which is against main, but is {revision!r}.")
    folder, api = Path(folder), HfApi(token=token)
    student_files(folder)  # before anything is made on the Hub
    check_writable(folder)  # its card
    again = ["onestep", "push", str(folder), repo_id]
    again += ["--private"] * bool(private) + ["--create_pr"] * create_pr
    again += [] if revision is None else ["--revision", revision]
    try:
        name = open_repository(repo_id, private=private, token=token)
        look_up_license(folder)
        create_model_card(folder, repo_id=name, revision=revision)
        files = student_files(folder)
        _check_secrets(folder, files)
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(name, branch=revision, exist_ok=True)
        there = set(api.list_repo_files(name, revision=revision))
        made = is_ours((folder / "README.md").read_text(encoding="utf-8"))  # else somebody wrote it here
        if made and "README.md" in there and _is_edited(_remote(api, name, "README.md", revision)):
            logger.warning(
                f"The card of {name} was edited on the Hub and stays as it is; delete it there for a new one."
            )
            files.remove("README.md")
        parts = {file.split("/")[0] for file in files if "/" in file}
        if "model_index.json" in there:
            parts |= json.loads(_remote(api, name, "model_index.json", revision)).keys()
        replaced = {file for file in there if file.split("/")[0] in parts or file in _REPLACED}
        info: CommitInfo = api.create_commit(  # one, where `upload_folder` may make several
            name,
            [CommitOperationAdd(file, folder / file) for file in files]
            + [CommitOperationDelete(file) for file in sorted(replaced - set(files))],
            revision=revision,
            create_pr=create_pr,
            commit_message=f"{folder.resolve().name}, pushed by diffusers_onestep",
        )
    except Exception as error:  # as in open_repository
        if isinstance(error, ValueError) and not isinstance(error, HfHubHTTPError):
            raise
        raise ConnectionError(
            f"The push to {repo_id!r} did not go through{_reason(error)} Nothing is lost: {str(folder)!r} is whole. "
            f"Try again with\n\n    {shlex.join(again)}\n"
        ) from error
    return info.pr_url or info.commit_url


def _remote(api: HfApi, name: str, file: str, revision: str | None) -> str:
    """A text as it is on the Hub."""
    with tempfile.TemporaryDirectory() as folder:
        path = api.hf_hub_download(name, file, revision=revision, local_dir=folder)
        return Path(path).read_text(encoding="utf-8")


def _is_edited(card: str) -> bool:
    """Whether somebody wrote a card; one of metadata alone comes with a repository."""
    return not is_ours(card) and bool(ModelCard(card, ignore_metadata_errors=True).text.strip())


def _reason(error: Exception) -> str:
    """`: the reason.`, and what to do about it where that is known."""
    chain = [error] if error.__cause__ is None else [error, error.__cause__]
    advice = {401: " Log in with `hf auth login`.", 403: " Your token must have write access there."}
    known = [advice.get(getattr(getattr(e, "response", None), "status_code", None), "") for e in chain]
    lines = [without_secrets(str(e).strip() or type(e).__name__).splitlines()[0].rstrip(".") for e in chain]
    return f": {': '.join(lines)}.{known[-1]}"


def _check_secrets(folder: Path, files: list[str]) -> None:
    """Refuse to publish a token or password that got into a card, a config, the metrics or a notice."""
    for file in files:
        if Path(file).suffix not in (".safetensors", ".png") and "tokenizer" not in file:
            text = (folder / file).read_text(encoding="utf-8", errors="replace")
            if without_secrets(text) != text:
                raise ValueError(f"`folder` must hold no secrets, but {str(folder / file)!r} has one: take it out.")
