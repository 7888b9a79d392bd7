import importlib.util
import json
import sys

import pytest
from conftest import ROOT

from diffusers_onestep.arguments import parse_args
from diffusers_onestep.presets import DKDM_PRESETS, DMD_PRESETS, PID_PRESETS, SID_PRESETS

REQUIRED = ["--pretrained_teacher_model", "fashion32", "--output_dir", "out"]


sys.path.insert(0, str(ROOT / "training"))  # train_teacher imports a recipe


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "training" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SID, DMD = script("train_sid").SiDArguments, script("train_dmd").DMDArguments
PID, DKDM = script("train_pid").PIDArguments, script("train_dkdm").DKDMArguments


def test_defaults_are_the_papers():
    sid, dmd = parse_args(SID, REQUIRED), parse_args(DMD, REQUIRED)
    assert (sid.alpha, sid.start_ratio, sid.adam_beta1, sid.loss_scale) == (1.2, None, 0.0, 100.0)
    pid, dkdm = parse_args(PID, REQUIRED), parse_args(DKDM, REQUIRED)
    assert (pid.num_points, pid.rule, pid.distance, pid.optimizer) == (250, "first", "lpips-average", "radam")
    assert (dkdm.scheme, dkdm.reservoir_ratio, dkdm.learning_rate) == ("dynamic", 0.4, 1e-4)
    assert (dmd.start_ratio, dmd.adam_beta1, dmd.adam_weight_decay, dmd.ema_halflife_kimg) == (None, 0.9, 0.01, 0.0)


@pytest.mark.parametrize(
    "arguments_class, presets",
    [(SID, SID_PRESETS), (DMD, DMD_PRESETS), (PID, PID_PRESETS), (DKDM, DKDM_PRESETS)],
)
def test_every_preset_is_made_of_flags(arguments_class, presets):
    for name, values in presets.items():
        args = parse_args(arguments_class, [*REQUIRED, "--preset", name], presets)
        for key, value in values.items():
            assert getattr(args, key) == value, (name, key)


def test_published_numbers():
    assert SID_PRESETS["cifar10-uncond"]["max_train_steps"] == 1_953_125
    assert SID_PRESETS["ffhq64"]["student_adam_beta1"] == 0.9
    assert DMD_PRESETS["dmd2-imagenet64"]["max_train_steps"] == 40_000
    assert DMD_PRESETS["cifar10-cond"]["train_batch_size"] == 56
    names = ("global_batch_size", "train_batch_size", "learning_rate", "max_train_steps", "num_points", "start_ratio")
    pid = [[PID_PRESETS[name][key] for key in names] for name in ("cifar10-uncond", "imagenet64-cond")]
    assert pid == [[512, 64, 2e-4, 800_000, 250, 80.0], [2048, 32, 1e-4, 400_000, 250, 80.0]]
    for preset in PID_PRESETS.values():  # of 0.9999 an update
        halflife = 1000 * preset["ema_halflife_kimg"] / preset["global_batch_size"]
        assert 0.5 ** (1 / halflife) == pytest.approx(0.9999, abs=1e-8)
        assert (preset["optimizer"], preset["adam_weight_decay"]) == ("radam", 0.0)
    assert DMD_PRESETS["dmd2-sdxl-1step"]["student_timesteps"] == [399.0]
    assert DMD_PRESETS["dmd2-sdxl-4step"]["max_train_steps"] == 4_000
    assert DMD_PRESETS["dmd2-sd15"]["train_batch_size"] == 32 and DMD_PRESETS["dmd2-sd15"]["fake_score_updates"] == 10
    assert SID_PRESETS["sd15-lsg-1.5"]["max_train_steps"] == 19_531 and SID_PRESETS["sd15-lsg-4.5"]["kappas"] == [4.5]
    presets = (SID_PRESETS, DMD_PRESETS, PID_PRESETS, DKDM_PRESETS)
    for preset in (preset for table in presets for preset in table.values()):
        assert preset["global_batch_size"] % preset["train_batch_size"] == 0


@pytest.mark.parametrize("name", ["a.yaml", "a.json"])
def test_file_beats_preset_and_command_line_beats_file(tmp_path, name):
    values = {"alpha": 0.5, "output_dir": "from-file", "learning_rate": 2e-5, "pretrained_teacher_model": "t"}
    (tmp_path / name).write_text(json.dumps(values))
    flags = ["--config", str(tmp_path / name), "--preset", "cifar10-uncond", "--learning_rate", "3e-5"]
    args = parse_args(SID, flags, SID_PRESETS)
    assert (args.alpha, args.learning_rate, args.global_batch_size) == (0.5, 3e-5, 256)
    assert args.output_dir == "from-file"


@pytest.mark.parametrize("text", ["preset: cifar10-cond\n", "config: other.yaml\n"])
def test_a_file_cannot_name_another_source(tmp_path, text, capsys):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(SystemExit):
        parse_args(SID, [*REQUIRED, "--config", str(tmp_path / "a.yaml")], SID_PRESETS)
    assert "`config` must not name" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--learning_rat", "1"], ["--preset", "cifar100"], ["--alpha", "big"]])
def test_unknown_flags_and_bad_values_end_the_program(flags, capsys):
    with pytest.raises(SystemExit):
        parse_args(SID, [*REQUIRED, *flags], SID_PRESETS)
    assert flags[0] in capsys.readouterr().err


def test_unknown_key_in_a_file_ends_the_program(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("alhpa: 1.0\n")
    with pytest.raises(SystemExit):
        parse_args(SID, [*REQUIRED, "--config", str(tmp_path / "a.yaml")], SID_PRESETS)
    assert "--alhpa" in capsys.readouterr().err


def test_a_missing_file_of_flags_ends_the_program(capsys):
    with pytest.raises(SystemExit):
        parse_args(SID, [*REQUIRED, "--config", "nowhere.yaml"], SID_PRESETS)
    assert "`config` must be a YAML or JSON file, but 'nowhere.yaml' does not exist" in capsys.readouterr().err
