"""Draw the numbers of a run's `log.jsonl` against the images seen, as `health.png` of a running one is.

python training/plot_curves.py outputs/fashion32-sid/log.jsonl --output curves.png
"""

import argparse
from pathlib import Path

from diffusers_onestep.health import draw_health

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log", type=Path, help="A run's log.jsonl.")
    parser.add_argument("--output", type=Path, default=Path("curves.png"))
    args = parser.parse_args()
    draw_health(args.log, args.output)
