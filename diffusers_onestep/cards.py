"""Model cards: what the files of a folder tell, for somebody else to use and trust what is in it."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import jinja2
import yaml
from diffusers.utils import logging
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .conditions import label_embeddings
from .files import read_json, write_text
from .lora import LORA_WEIGHTS
from .records import on_hub, read_record, without_secrets
from .reports import markdown_table, stated_root
from .repository import ASSETS, resolve_model

logger = logging.get_logger(__name__)

TEMPLATE = ASSETS / "template.md"
_UNRECORDED = "of no recorded run"
_ENDING = re.compile(rf"<!-- made by diffusers_onestep(?: {_UNRECORDED})?: ([0-9a-f]{{16}})[^>]*-->\s*$")
_RESTRICTIONS = {
    "openrail": "Its use-based restrictions (Attachment A of the licence) hold for this model and for all that its "
    "users make of it, and must be passed on with it.",
    "-nc|non-?commercial": "Commercial use of this model is not allowed.",
    "-sa": "What is made of this model must be under the same licence.",
    "-nd": "The licence does not allow derivatives to be shared: ask the teacher's authors before you publish this.",
    "^other": "It is none of the usual licences: read its terms before you use or share this model.",
}


def create_model_card(folder: str | Path, *, repo_id: str | None = None, revision: str | None = None) -> Path:
    """Write the card of a student (or solver, or teacher) from what its folder holds, as `README.md`.

    It is made of the configs, `training_args.json`, `training_run.json` (of a converted file `conversion.json`),
    `metrics.json`, the pictures, and `notes.md`, which is for your own words. A card that was edited by hand is left
    as it is, and so is one of a download, whose record of the run was not published.

    Args:
        folder (`str` or `Path`): what a script of `training/` or `convert` wrote.
        repo_id (`str`, *optional*): what the card's code loads; by default the folder.
        revision (`str`, *optional*): branch that it loads.

    Returns:
        `Path`: of the card.

    Raises:
        ValueError: if the folder holds neither a pipeline nor a scheduler.

    Example:

    ```python
    >>> from diffusers_onestep import create_model_card
    >>> create_model_card("fashion32-sid")
    PosixPath('fashion32-sid/README.md')
    ```
    """
    folder = Path(folder)
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else None
    if text is not None and not is_ours(text):
        logger.warning(f"{path} was edited by hand and stays as it is; delete it to have it made anew.")
    elif text is not None and not read_record(folder) and _UNRECORDED not in text[_ENDING.search(text).start() :]:
        logger.warning(
            f"{path} tells of a run that {folder} has no record of, as a download has none: it stays as it is."
        )
    else:
        write_text(path, render_card(folder, repo_id or str(folder), revision))
    return path


def render_card(
    folder: str | Path, name: str, revision: str | None = None, pictures: dict[str, str] | None = None
) -> str:
    """The text of a card.

    Args:
        folder (`str` or `Path`): what it describes.
        name (`str`): what its code loads: a Hub id, a folder or a shipped name.
        revision (`str`, *optional*): branch that it loads.
        pictures (`dict`, *optional*): path by kind (`"samples"`, `"quality"`, `"health"`, ...); by default the PNG
            files of the folder.
    """
    facts = card_facts(Path(folder), name, revision)
    if pictures is None:
        pictures = {file.stem: file.name for file in sorted(Path(folder).glob("*.png"))}
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    text = template.render(metadata=card_metadata(facts).to_yaml(), pictures=pictures, **facts)
    text = re.sub(r"\n{3,}", "\n\n", without_secrets(text)).rstrip() + "\n\n"
    ModelCard(text)  # the Hub client parses metadata and model-index; it raises on what it cannot read
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    source = "" if facts["run"] else f" {_UNRECORDED}"
    return f"{text}<!-- made by diffusers_onestep{source}: {digest}; put your own words into notes.md -->\n"


def is_ours(text: str) -> bool:
    """Whether a card is as `create_model_card` wrote it."""
    ending = _ENDING.search(text)
    return ending is not None and hashlib.sha256(text[: ending.start()].encode()).hexdigest()[:16] == ending.group(1)


class _Row(dict):
    """A JSON object, such as a row of `Metrics`, whose keys are attributes; None if it lacks one."""

    __getattr__ = dict.get


def card_facts(folder: Path, name: str, revision: str | None = None) -> dict[str, Any]:
    """What the template tells, read from the folder's files."""
    files = ("model_index.json", "scheduler/scheduler_config.json", "unet/config.json", "training_args.json")
    index, scheduler, network, settings = (
        read_json(folder / file) if (folder / file).is_file() else {} for file in files
    )
    run = read_record(folder)
    measured = folder / "metrics.json"
    metrics = json.loads(measured.read_text(encoding="utf-8"), object_hook=_Row) if measured.is_file() else _Row()
    if not scheduler:
        raise ValueError(f"`folder` must hold a model or a scheduler, but {str(folder)!r} has no scheduler/.")
    tables = {int(steps): table for steps, table in (scheduler.get("dode_tables") or {}).items()}
    tables = dict(sorted(tables.items()))
    steps = scheduler.get("student_timesteps") or [None] * (
        scheduler["original_inference_steps"] if scheduler["_class_name"] == "LCMScheduler" else 0
    )
    kind = "solver" if tables else "student" if steps else "model"
    parts = {part: entry for part, entry in index.items() if isinstance(entry, list) and entry[0]}
    names = index.get("id2label") or network.get("id2label") or ({} if parts else run.get("id2label")) or {}
    count = len(names) or label_embeddings(network) or run.get("num_labels")
    rows = metrics.results or []
    notes, notice = folder / "notes.md", folder / "NOTICE"
    own = _own_rows(rows, kind)
    teacher = run.get("teacher") or next((t["teacher_model"] for t in tables.values() if t.get("teacher_model")), None)
    prompts = "text_encoder" in index or bool(settings.get("prompts"))
    guidance = run.get("guidance_scale") or settings.get("guidance_scale", 1.0)
    shapes = [table["sample_shape"] for table in tables.values() if table.get("sample_shape")]
    channels = network.get("in_channels") or (shapes[0][0] if shapes else None)
    pixels = prompts or channels in (None, 1, 3)
    learned_variance = kind != "student" and network.get("out_channels") != network.get("in_channels")
    # diffusers' loader finds no such class; its stock pipeline makes pixels alone, and gives DDIM the variances too
    ours_alone = index.get("_class_name") == "OneStepPipeline" or not pixels or learned_variance
    base_license = run.get("base_license", {})  # of what a converted U-Net was put into
    terms = base_license | run.get("license", {})
    start_license = run.get("start", {}).get("license", {})  # of the student that it went on from
    given, start_terms = (own.get("license_name") or own.get("license") for own in (terms, start_license))
    start_terms = start_terms if start_terms != given else None
    resolution = settings.get("resolution")
    loaded = {"revision": run.get("revision"), "variant": settings.get("variant")}
    licenses = run.get("license", {}), base_license, start_license
    joined = {"license": "other", "license_name": f"{given or 'unknown'}-and-{start_terms}"} if start_terms else {}
    return {
        "source": _arguments(name, revision),
        "stock_source": _arguments(name, revision, stock=True),
        "title": name if "/" not in name or not Path(name).is_dir() else Path(name).name,
        "shipped": _is_shipped(name),
        "kind": kind,
        "nfe": len(steps) or None,
        "tables": tables,
        "stated_root": stated_root,
        "scheduler_class": scheduler["_class_name"],
        "whole": bool(parts),
        "ours_alone": ours_alone,
        "pixels": pixels,
        "stock": not ours_alone and {entry[0] for entry in parts.values()} <= {"diffusers", "transformers"},
        "labels": json.dumps([next(iter(names.values()), 0)]) if count else None,
        "prompts": prompts,
        # diffusers loads float16 files as float32, transformers as float16
        "one_dtype": ", dtype=torch.float32" if prompts else "",
        "lora": prompts and teacher is not None and (folder / LORA_WEIGHTS).is_file(),  # others load no adapters
        "guidance_scale": guidance,
        "size": f"height={resolution}, width={resolution}, " if resolution else "",  # of a stock call
        "stock_guidance": _stock_guidance(index, scheduler, 1.0 if kind == "student" else guidance),
        "teacher": teacher,
        "teacher_source": _arguments(teacher or "its teacher", **loaded, stock=True),
        "teacher_own_source": _arguments(teacher or "its teacher", **loaded),
        "teacher_shipped": teacher is not None and _is_shipped(teacher),
        "run": run,
        "converted": "sha256" in run,
        "paper": run.get("paper"),
        "bibtex": _bibtex(run["paper"]) if run.get("paper") else None,
        "license": joined or {"license": "unknown"} | run.get("license", {}),
        "start_terms": start_terms,
        "notice": notice.read_text(encoding="utf-8") if notice.is_file() else terms.get("notice"),
        "gated": terms.get("gated"),
        "base_license": base_license,
        "restrictions": list(dict.fromkeys(s for terms in licenses for s in _restrictions(terms))),
        "settings": settings,
        "settings_yaml": yaml.safe_dump({k: v for k, v in settings.items() if v is not None}, sort_keys=False).strip(),
        "metrics": metrics,
        "rows": rows,
        "own_rows": own,
        "networks": _networks(own),
        "metrics_table": markdown_table(rows) if rows else None,
        "not_measured": _not_measured(rows, own, kind, teacher, prompts),
        "notes": notes.read_text(encoding="utf-8").strip() if notes.is_file() else None,
    }


def _arguments(name: str, revision: str | None, variant: str | None = None, stock: bool = False) -> str:
    """How code names a model to `from_pretrained`, ours or (which does not know the shipped ones) a stock one."""
    source = json.dumps(name)
    if stock and _is_shipped(name):
        source = f"shipped_model({source})"
    given = {"revision": revision, "variant": variant}
    return ", ".join([source, *(f"{key}={json.dumps(value)}" for key, value in given.items() if value)])


def _stock_guidance(index: dict[str, Any], scheduler: dict[str, Any], guidance_scale: float) -> str:
    """The arguments of a stock call; FLUX's `guidance_scale` is what its guidance embedding is fed."""
    embedded = index.get("embedded_guidance")
    if scheduler.get("use_flow_sigmas") and index.get("_class_name", "FluxPipeline") == "FluxPipeline":
        tables = (scheduler.get("dode_tables") or {}).values()
        embedded = next((t["embedded_guidance"] for t in tables if t.get("embedded_guidance")), embedded)
    if embedded is None:
        return f"guidance_scale={guidance_scale}"
    guided = "" if guidance_scale == 1.0 else f', true_cfg_scale={guidance_scale}, negative_prompt=""'
    return f"guidance_scale={embedded}{guided}"


def _is_shipped(name: str) -> bool:
    return Path(resolve_model(name)).is_relative_to(ASSETS)


def _restrictions(license: dict[str, Any]) -> list[str]:
    """What users must know of a licence, by its identifier and its name."""
    text = f"{license.get('license')} {license.get('license_name')}".casefold()
    return [sentence for pattern, sentence in _RESTRICTIONS.items() if re.search(rf"(?:{pattern})\b", text)]


def _is_teacher(row: _Row) -> bool:
    return row.model.split(",")[0] == "teacher"  # also "teacher, guidance 2"


def _own_rows(rows: list[_Row], kind: str) -> list[_Row]:
    """The rows of the card's model: of the first that is not the teacher, which stands beside it; a model of as many
    steps as a teacher may have been measured as one."""
    names = [row.model for row in rows if not _is_teacher(row)]
    if not names:
        return rows if kind == "model" else []
    return [row for row in rows if row.model == names[0]]


def _networks(rows: list[_Row]) -> str:
    """The networks whose features were compared, with digests of their weights."""
    scores = [score for row in rows for score in (row.scores or {}).values()]
    known = dict.fromkeys((score.extractor, score.weights) for score in scores)
    if not known:  # older files have the digest alone
        known = dict.fromkeys(("a network", row.extractor) for row in rows if row.extractor)
    return "; ".join(f"{name}, digest of its weights `{digest}`" for name, digest in known)


def _not_measured(rows: list[_Row], own: list[_Row], kind: str, teacher: str | None, prompts: bool) -> list[str]:
    """What a reader might look for in vain."""
    measured = " ".join(name for row in own for name in row.scores or [row.metric]).casefold()
    missing = [] if own else ["any distance between its images and real ones, and its speed"]
    if own and "fid" not in measured.split():
        missing.append("FID (with Inception-v3 features)")
    # recall at 5 is of a retrieval
    missing += [w for w in ("precision", "recall") if own and not re.search(rf"\b{w}-(?!at-)", measured)]
    if own and teacher and kind != "model" and not any(map(_is_teacher, rows)):
        missing.append("the teacher in the same run")
    source = "its teacher's data" if teacher or kind == "student" else "its data"
    if prompts and not re.search("clip|retriev|recall-at", measured):
        missing.append("how well images fit their captions")
    return [*missing, "people's preference", "copies of training images", f"biases that it has from {source}"]


def _bibtex(paper: dict[str, str]) -> str:
    authors, venue = paper["citation"].rsplit(", ", 1)
    key = re.sub(r"\W", "", authors.split(", ")[0]).lower() + venue[-4:]
    return (
        f"@misc{{{key},\n  title = {{{paper['title']}}},\n  author = {{{authors.replace(', ', ' and ')}}},\n"
        f"  year = {{{venue[-4:]}}},\n  note = {{{venue}}},\n  eprint = {{{paper['arxiv_id']}}},\n"
        "  archivePrefix = {arXiv}\n}"
    )


def _protocol(row: _Row, score: _Row) -> dict[str, Any]:
    """How a number was measured."""
    known = {
        "nfe": row.nfe,
        "num_samples": score.num_samples,
        "num_reference": score.num_reference or row.num_reference,
        "standard_error": None if score.error is None else round(score.error, 4),
        "weights_digest": score.weights or row.extractor,
        "seed": row.seed,
    }
    return {name: value for name, value in known.items() if value is not None}


def card_metadata(facts: dict[str, Any]) -> ModelCardData:
    """The card's YAML block: what the Hub shows, filters and links by."""
    run, kind = facts["run"], facts["kind"]
    task = "text-to-image" if facts["prompts"] else "unconditional-image-generation"
    method = run.get("method")
    distilled = facts["teacher"] or kind == "student"
    tags = ["diffusers-onestep", "distillation" if distilled else None, method and method.lower()]
    if facts["nfe"] == 1:
        tags.append("one-step")
    data = run.get("datasets", on_hub([facts["settings"].get("dataset")]))
    results = [
        EvalResult(
            task_type=task,
            dataset_type="fashion_mnist" if name.endswith("-fashion") else "custom",
            dataset_name=row.reference or ("Fashion-MNIST (test)" if name.endswith("-fashion") else "see the card"),
            metric_type=name.lower(),
            metric_name=", ".join([name, *row.model.split(", ")[1:] * _is_teacher(row), f"NFE {row.nfe}"]),
            metric_value=round(score.value, 4),
            metric_args=_protocol(row, score),
        )
        for row in facts["own_rows"]
        for name, score in (row.scores or {row.metric: row}).items()
    ]
    return ModelCardData(
        **{key: facts["license"].get(key) for key in ("license", "license_name", "license_link")},
        library_name="diffusers",
        pipeline_tag=task,
        base_model=run.get("base_model"),
        base_model_relation=None if not run.get("base_model") else "adapter" if kind == "solver" else "finetune",
        datasets=data or None,
        tags=[tag for tag in tags if tag],
        model_name=facts["title"] if results else None,
        eval_results=results or None,
    )
