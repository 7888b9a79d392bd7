"""What was measured, as rows, tables, files and pictures."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .files import write_json, written_beside
from .pictures import save_grid
from .records import provenance
from .sampler import Noises, Sampler, between_steps


@dataclass
class Score:
    """One number with its standard error (None if there are too few samples for one), what it was measured on and with
    which weights."""

    value: float
    error: float | None
    num_samples: int
    extractor: str
    weights: str  # digest
    num_reference: int | None = None  # real images that it was compared with


@dataclass
class Metrics:
    """One row of a table: a model at a number of network evaluations per image (NFE). `metric`, `value` and `error`
    are the first of `scores`."""

    model: str
    nfe: int
    metric: str
    value: float
    num_samples: int
    images_per_second: float
    seed: int
    error: float | None = None  # standard error of `value`
    extractor: str | None = None  # digest of the feature network's weights
    latency: float | None = None  # seconds of one image by itself, the median of some calls
    latency_error: float | None = None  # standard errors
    speed_error: float | None = None
    reference: str | None = None
    num_reference: int | None = None
    resolution: list[int] | None = None  # height and width of the images, in pixels
    scores: dict[str, Score] = field(default_factory=dict)  # by name, such as KID-fashion

    def __post_init__(self):
        # rows of a metrics.json are read with Metrics(**row)
        self.scores = {name: Score(**v) if isinstance(v, dict) else v for name, v in self.scores.items()}


def markdown_table(rows: list[Metrics]) -> str:
    """Rows as a table for a terminal or a card."""
    names = list(dict.fromkeys(name for row in rows for name in row.scores or [row.metric]))
    sizes = {row.num_samples for row in rows}
    count = f" (n = {rows[0].num_samples:,})" if len(sizes) == 1 else ""
    head = ["model", "NFE", f"{names[0]}{count}", *names[1:], "latency (ms)", "images/s"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        own = row.scores or {row.metric: row}
        cells = [stated(own[name].value, own[name].error) if name in own else "–" for name in names]
        latency = "–" if row.latency is None else measured(1000 * row.latency, 1000 * (row.latency_error or 0))
        cells = [row.model, str(row.nfe), *cells, latency, measured(row.images_per_second, row.speed_error)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def stated(value: float, error: float | None) -> str:
    """A value to the digits that its error leaves it."""
    if not error:
        return f"{value:#.3g}"
    digits = min(6, max(0, 1 - math.floor(math.log10(error))))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def measured(value: float, error: float | None) -> str:
    """A time or a speed, which may be large; to whole numbers if its error is not known."""
    return stated(value, error) if error or value < 10 else f"{value:,.0f}"


def stated_root(mean_square: float, error: float | None) -> str:
    """The root of a mean square whose standard error is given, with the error that it has by it."""
    root = mean_square**0.5
    return stated(root, error / (2 * root) if error and root else None)


def comparison_grid(above: Sampler, below: Sampler, noise: Noises, cond: dict[str, Any], path: Path) -> None:
    """A picture of one model (upper row of each pair) and another (lower) on the same noises and conditions."""
    columns, generators = (len(noise) + 1) // 2, [between_steps(0, 0) for _ in range(2)]
    pictures = [run(noise[:], cond, generator) for run, generator in zip((above, below), generators, strict=True)]
    if len(noise) % 2:  # the last row of an odd number is filled with white
        pictures = [torch.cat([picture, torch.full_like(picture[:1], 255)]) for picture in pictures]
    rows = [part for pair in zip(*(p.split(columns) for p in pictures), strict=True) for part in pair]
    save_grid(torch.cat(rows), path, columns, scale=2 if rows[0].shape[-1] <= 64 else 1)


def write_metrics(path: Path, rows: list[Metrics], *, command: str, precision: str | None = None) -> None:
    """Rows as `metrics.json`, with all that it takes to measure them again; `precision` of the networks' calls, where
    a launcher may have set it."""
    seeds = sorted({row.seed for row in rows})
    about = provenance(command) | {"precision": precision, "seed": seeds[0] if len(seeds) == 1 else seeds}
    write_json(path, about | {"results": [asdict(row) for row in rows]})


def quality_plot(rows: list[Metrics], path: Path) -> None:
    """Distance against network evaluations, a line per model with several and a point for each of the others."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    for name in dict.fromkeys(row.model for row in rows):
        own = sorted((row for row in rows if row.model == name), key=lambda row: row.nfe)
        axes.plot([row.nfe for row in own], [row.value for row in own], marker="o", label=name)
    scale = "log" if all(row.value > 0 for row in rows) else "linear"  # an unbiased KID may be negative
    axes.set(xscale="log", yscale=scale, xlabel="network evaluations", ylabel=rows[0].metric)
    counts = sorted({row.nfe for row in rows})
    axes.set_xticks(counts, [str(count) for count in counts], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    save_figure(figure, path)


def save_figure(figure: Any, path: Path, dpi: int = 120) -> None:
    """Write a figure as PNG, beside first and then renamed."""
    with written_beside(path) as beside:
        figure.savefig(beside, dpi=dpi, format="png")
