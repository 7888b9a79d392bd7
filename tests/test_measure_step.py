"""`measure_step.py`: steps and calls of true size; a small network stands in for it by default."""

import json
import re

import pytest
from test_plan import CONFIG
from test_trainer import run, script


@pytest.mark.parametrize("flags", [["--method", "dmd"], ["--method", "sid", "--lora_rank", "4"]])
def test_steps_run_and_their_memory_is_compared_with_the_plan(flags, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    flags = [*flags, "--network_config", str(tmp_path / "config.json"), "--resolution", "64"]
    done = run(script("measure_step.py", *flags, "--train_batch_size", "1"), OMP_NUM_THREADS="1")
    peak, share = re.search(r"measured peak +([\d.]+) GiB, ([\d.]+) of the plan", done.stdout).groups()
    assert 0 < float(peak) < 1 and float(share) > 0


@pytest.mark.slow
def test_a_students_call_takes_three_percent_more_than_network_and_decoder():
    """Of 121 M parameters, where what is not network would show more than at true size."""
    flags = ["--latency", "--method", "sid", "--width", "0.375", "--resolution", "256", "--calls", "15"]
    done = run(script("measure_step.py", *flags))
    print(done.stdout)
    assert float(re.search(r"pipeline [\d.]+ s: ([\d.]+) times", done.stdout)[1]) <= 1.03
