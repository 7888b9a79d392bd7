"""Draw the numbers of a run's `log.jsonl` against the images seen.

python training/plot_curves.py outputs/fashion32-sid/log.jsonl --output curves.png
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure


def main(log: str, output: str) -> None:
    lines = [json.loads(line) for line in Path(log).read_text().splitlines()]
    names = sorted({name for line in lines for name in line} - {"step", "images", "seconds"})
    figure = Figure(figsize=(3.2 * len(names), 3))
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        points = [(line["images"] / 1000, line[name]) for line in lines if name in line]
        axes.plot(*zip(*points, strict=True), linewidth=1)
        axes.set(title=name, xlabel="thousand images")
        axes.grid(alpha=0.3)
        if min(value for _, value in points) > 0:
            axes.set_yscale("log")
    figure.tight_layout()
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log", help="A run's log.jsonl.")
    parser.add_argument("--output", default="curves.png")
    main(**vars(parser.parse_args()))
