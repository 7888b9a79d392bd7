import json
from datetime import timedelta

import pytest
from conftest import training_module

from diffusers_onestep.arguments import TrainArguments, parse_args
from diffusers_onestep.presets import DKDM_PRESETS, DMD_PRESETS, PID_PRESETS, SID_PRESETS

REQUIRED = ["--pretrained_teacher_model", "fashion32", "--output_dir", "out"]


SID, DMD = training_module("train_sid").SiDArguments, training_module("train_dmd").DMDArguments
PID, DKDM = training_module("train_pid").PIDArguments, training_module("train_dkdm").DKDMArguments


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


def test_batches_of_presets_divide():
    presets = (SID_PRESETS, DMD_PRESETS, PID_PRESETS, DKDM_PRESETS)
    for preset in (preset for table in presets for preset in table.values()):
        assert preset["global_batch_size"] % preset["train_batch_size"] == 0


def preset(arguments_class, name, presets):
    """With the defaults that it leaves."""
    return parse_args(arguments_class, [*REQUIRED, "--preset", name], presets)


SID_TABLE = {  # alpha, batch, rate, million images, dropout, augmentation, EMA's half-life, epsilon, student's beta 1
    "cifar10-uncond": (1.2, 256, 1e-5, 500, 0.13, 0.12, 500, 1e-8, 0),
    "cifar10-cond": (1.2, 256, 1e-5, 800, 0.13, 0.12, 500, 1e-8, 0),
    "imagenet64-cond": (1.2, 8192, 4e-6, 1000, 0.10, 0, 2000, 1e-6, 0),
    "ffhq64": (1.2, 512, 1e-5, 500, 0.05, 0.15, 500, 1e-6, 0.9),
    "afhqv2-64": (1.0, 512, 5e-6, 500, 0.05, 0.15, 500, 1e-6, 0),
}


@pytest.mark.parametrize("name", SID_TABLE)
def test_the_table_of_sid(name):
    a = preset(SID, name, SID_PRESETS)
    images = a.max_train_steps * a.global_batch_size / 1e6
    beta1 = a.adam_beta1 if a.student_adam_beta1 is None else a.student_adam_beta1
    row = (a.alpha, a.global_batch_size, a.learning_rate, round(images), a.network_dropout, a.augment_probability)
    assert (*row, a.ema_halflife_kimg, a.adam_epsilon, beta1) == SID_TABLE[name]
    assert (a.start_ratio, a.noise_levels, a.loss_scale, a.fake_score_updates) == (2.5, "karras", 100.0, 1)
    assert (a.adam_beta1, a.adam_beta2, a.adam_weight_decay, a.lr_warmup_steps) == (0, 0.999, 0, 0)
    assert a.fake_score_learning_rate is None and a.kappas is None and a.ema_rampup_ratio == 0.05
    assert a.mixed_precision == ("fp16" if a.adam_epsilon == 1e-6 else None)


@pytest.mark.parametrize("model", ["sd15", "sd21-base"])
@pytest.mark.parametrize("kappa", [1.5, 2, 3, 4.5])
def test_the_settings_of_sid_lsg(model, kappa):
    a = preset(SID, f"{model}-lsg-{kappa}", SID_PRESETS)
    assert (a.alpha, a.global_batch_size, a.train_batch_size, a.learning_rate) == (1.0, 512, 1, 1e-6)
    assert (a.kappas, a.student_timesteps, a.noise_levels, a.loss_scale) == ([kappa], [625], "uniform", 1.0)
    assert (a.ema_halflife_kimg, a.resolution, a.adam_beta1, a.max_train_steps) == (50, 512, 0, 10_000_000 // 512)


FOUR = [999, 749, 499, 249]
DMD_TABLE = {  # rate, batch, of a GPU, fake-score updates, guidance, GAN, regression, student updates, timesteps
    "cifar10-cond": (5e-5, 392, 56, 1, 1, 0, 0.25, 300_000, None),
    "cifar10-uncond": (5e-5, 392, 56, 1, 1, 0, 0.5, 300_000, None),
    "imagenet64-cond": (2e-6, 336, 48, 1, 1, 0, 0.25, 350_000, None),
    "sd15": (1e-5, 2304, 32, 1, 3, 0, 0.25, 20_000, None),
    "sd15-laion6-1": (1e-5, 2560, 32, 1, 8, 0, 0.1, 5_400, None),
    "sd15-laion6-2": (1e-5, 2560, 32, 1, 8, 0, 0.5, 8_600, None),
    "sd15-laion6-3": (1e-5, 2560, 32, 1, 8, 0, 1, 74_000, None),
    "sd15-laion6-4": (1e-5, 2560, 32, 1, 8, 0, 1, 80_000, None),
    "sd15-laion6-5": (1e-5, 1280, 16, 1, 8, 0, 1, 127_000, None),
    "sd15-laion6-6": (1e-5, 1280, 16, 1, 8, 0, 0.75, 149_500, None),
    "sd15-laion6-7": (1e-5, 1280, 16, 1, 8, 0, 0.5, 162_500, None),
    "sd15-laion6-8": (1e-5, 1280, 16, 1, 8, 0, 0.25, 165_000, None),
    "dmd2-imagenet64": (2e-6, 280, 40, 5, 1, 3e-3, 0, 40_000, None),
    "dmd2-imagenet64-no-gan": (2e-6, 280, 40, 5, 1, 0, 0, 80_000, None),
    "dmd2-imagenet64-resumed": (5e-7, 280, 40, 5, 1, 3e-3, 0, 30_000, None),
    "dmd2-sd15": (1e-5, 2048, 32, 10, 1.75, 0, 0, 4_000, None),
    "dmd2-sd15-gan": (5e-7, 2048, 32, 10, 1.75, 1e-3, 0, 500, None),
    "dmd2-sdxl-4step": (5e-7, 128, 2, 5, 8, 5e-3, 0, 4_000, FOUR),
    "dmd2-sdxl-4step-lora": (5e-5, 128, 2, 5, 8, 5e-3, 0, 3_200, FOUR),
    "dmd2-sdxl-warmup": (1e-5, 256, 4, 1, 8, 0, 1, 2_000, [399]),
    "dmd2-sdxl-1step": (5e-7, 128, 2, 5, 8, 5e-3, 0, 5_000, [399]),
}


def test_the_tables_of_dmd_and_dmd2():
    assert DMD_TABLE.keys() == DMD_PRESETS.keys()
    for name, expected in DMD_TABLE.items():
        a = preset(DMD, name, DMD_PRESETS)
        row = (a.learning_rate, a.global_batch_size, a.train_batch_size, a.fake_score_updates, a.guidance_scale)
        assert (*row, a.gan_weight, a.regression_weight, a.max_train_steps, a.student_timesteps) == expected, name
        assert (a.adam_beta1, a.adam_beta2, a.adam_weight_decay, a.ema_halflife_kimg) == (0.9, 0.999, 0.01, 0), name
        assert a.max_grad_norm == (0 if name == "dmd2-sdxl-warmup" else 10), name
        assert a.gan_critic_weight == 0.01 and a.matching_weight == (name != "dmd2-sdxl-warmup"), name
        assert a.lr_warmup_steps == 500 // a.fake_score_updates, name  # counted in updates of the fake score
        assert (a.lora_rank, a.lora_alpha) == ((64, 8) if "lora" in name else (None, None)), name


def test_the_tables_of_pid_and_dkdm():
    table = {"cifar10-uncond": (512, 64, 2e-4, 800_000), "imagenet64-cond": (2048, 32, 1e-4, 400_000)}
    for name, expected in table.items():
        a = preset(PID, name, PID_PRESETS)
        assert (a.global_batch_size, a.train_batch_size, a.learning_rate, a.max_train_steps) == expected
        assert (a.num_points, a.rule, a.distance, a.optimizer) == (250, "first", "lpips-average", "radam")
        assert (a.adam_weight_decay, a.lr_warmup_steps, a.start_ratio) == (0, 0, 80)
        assert 0.5 ** (a.global_batch_size / a.ema_halflife_kimg / 1000) == pytest.approx(0.9999, abs=1e-7)
    for name, batches in {"cifar10": (128, 128), "imagenet32": (512, 128), "celeba64": (256, 64)}.items():
        a = preset(DKDM, name, DKDM_PRESETS)
        assert (a.global_batch_size, a.train_batch_size) == batches
        assert (a.learning_rate, a.reservoir_ratio, a.scheme, a.adam_weight_decay) == (1e-4, 0.4, "dynamic", 0)
        assert 0.5 ** (a.global_batch_size / a.ema_halflife_kimg / 1000) == pytest.approx(0.9999, abs=1e-7)


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


def test_ranks_wait_for_one_that_works_alone(tmp_path):
    assert TrainArguments(output_dir=str(tmp_path)).accelerator().init_handler.timeout >= timedelta(hours=6)
