"""Draw the numbers of a run's `log.jsonl` against the images seen, as `health.png` of a running one is.

python training/plot_curves.py outputs/fashion32-sid/log.jsonl --output curves.png
"""

import argparse
from pathlib import Path

from diffusers_onestep.health import draw_health
from diffusers_onestep.run_folder import read_log

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log", type=Path, help="A run's log.jsonl.")
    parser.add_argument("--output", type=Path, default=Path("curves.png"))
    args = parser.parse_args()
    if not read_log(args.log):
        raise SystemExit(f"`log` must be a run's log.jsonl with numbers in it, but is {str(args.log)!r}.")
    draw_health(args.log, args.output)
