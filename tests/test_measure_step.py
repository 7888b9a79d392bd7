"""`measure_step.py`: steps and calls of true size; a small network stands in for it by default."""

import json
import re

import pytest
from conftest import run, script
from test_plan import CONFIG


@pytest.mark.parametrize(
    "flags", [["--method", "dmd", "--gan_weight", "1e-3"], ["--method", "sid", "--lora_rank", "4"]]
)
def test_steps_run_and_their_memory_is_compared_with_the_plan(flags, tmp_path):
    """Of 15 M parameters, whose optimizer alone takes 0.23 GiB; libraries take less than 0.1 GiB besides."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"block_out_channels": [128, 256]}))
    flags = [*flags, "--network_config", str(tmp_path / "config.json"), "--resolution", "64"]
    done = run(script("measure_step.py", *flags, "--train_batch_size", "1"), OMP_NUM_THREADS="1")
    found = re.search(r"measured peak +([\d.]+) GiB, ([\d.]+) of the plan", done.stdout)
    peak, share = map(float, found.groups())
    assert -0.03 < peak - peak / share < 0.12, done.stdout


@pytest.mark.slow
def test_a_students_call_takes_three_percent_more_than_network_and_decoder():
    """Of 121 M parameters, where what is not network would show more than at true size."""
    flags = ["--latency", "--method", "sid", "--width", "0.375", "--resolution", "256", "--calls", "15"]
    done = run(script("measure_step.py", *flags))
    print(done.stdout)
    assert float(re.search(r"pipeline [\d.]+ s: ([\d.]+) times", done.stdout)[1]) <= 1.03
