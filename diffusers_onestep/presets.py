"""Published configurations by name: what the papers' tables were made with. Sources: `Paper` of each method.

`max_train_steps` is the published duration in images over the global batch. SiD's durations are those of its scripts.
"""


def _sid(alpha: float, batch: int, rate: float, million_images: int, halflife_kimg: float = 500.0, **other) -> dict:
    return {
        "alpha": alpha,
        "start_ratio": 2.5,
        "noise_levels": "karras",
        "global_batch_size": batch,
        "learning_rate": rate,
        "adam_beta1": 0.0,
        "adam_weight_decay": 0.0,
        "ema_halflife_kimg": halflife_kimg,
        "max_train_steps": million_images * 1_000_000 // batch,
    } | other


_FP16 = {"mixed_precision": "fp16", "adam_epsilon": 1e-6}
_LSG = {"noise_levels": "uniform", "loss_scale": 1.0}

SID_PRESETS = {
    "cifar10-uncond": _sid(1.2, 256, 1e-5, 500),
    "cifar10-cond": _sid(1.2, 256, 1e-5, 800),
    "imagenet64-cond": _sid(1.2, 8192, 4e-6, 1000, 2000.0, **_FP16),
    "ffhq64": _sid(1.2, 512, 1e-5, 500, student_adam_beta1=0.9, **_FP16),
    "afhqv2-64": _sid(1.0, 512, 5e-6, 500, **_FP16),
    "sd15-lsg": _sid(1.0, 512, 1e-6, 10, 50.0, guidance_scale=1.5, **_LSG),
    "sd21-base-lsg": _sid(1.0, 512, 1e-6, 10, 50.0, guidance_scale=1.5, **_LSG),
}


def _dmd(batch: int, rate: float, steps: int, **other) -> dict:
    return {
        "global_batch_size": batch,
        "learning_rate": rate,
        "adam_beta1": 0.9,
        "adam_weight_decay": 0.01,
        "lr_warmup_steps": 500,
        "max_grad_norm": 10.0,
        "ema_halflife_kimg": 0.0,
        "max_train_steps": steps,
    } | other


def _dmd2(batch: int, rate: float, iterations: int, fake_score_updates: int, **other) -> dict:
    # DMD2's iterations are fake-score updates; the student moves in every `fake_score_updates`-th of them
    steps = iterations // fake_score_updates
    warmup = {"lr_warmup_steps": 500 // fake_score_updates, "mixed_precision": "bf16"}
    return _dmd(batch, rate, steps, fake_score_updates=fake_score_updates, **(warmup | other))


DMD_PRESETS = {
    "cifar10-cond": _dmd(392, 5e-5, 300_000, regression_weight=0.25),
    "cifar10-uncond": _dmd(392, 5e-5, 300_000, regression_weight=0.5),
    "imagenet64-cond": _dmd(336, 2e-6, 350_000, regression_weight=0.25, mixed_precision="bf16"),
    "sd15-laion6.25": _dmd(2304, 1e-5, 20_000, regression_weight=0.25, guidance_scale=3.0, mixed_precision="bf16"),
    "dmd2-imagenet64": _dmd2(280, 2e-6, 200_000, 5, gan_weight=3e-3),
    "dmd2-imagenet64-no-gan": _dmd2(280, 2e-6, 400_000, 5),
    "dmd2-imagenet64-resumed": _dmd2(280, 5e-7, 150_000, 5, gan_weight=3e-3),
    "dmd2-sd15-stage1": _dmd2(2048, 1e-5, 40_000, 10, guidance_scale=1.75),
    "dmd2-sd15-stage2": _dmd2(2048, 5e-7, 5_000, 10, guidance_scale=1.75, gan_weight=1e-3),
    "dmd2-sdxl-4step": _dmd2(
        128, 5e-7, 20_000, 5, guidance_scale=8.0, gan_weight=5e-3, student_timesteps=[999, 749, 499, 249]
    ),
    "dmd2-sdxl-1step": _dmd2(128, 5e-7, 25_000, 5, guidance_scale=8.0, gan_weight=5e-3, student_timesteps=[399]),
}

# the shipped teacher, in minutes on two cores: settings found here, not published
FASHION32_QUICKSTART = {
    "method": {"alpha": 1.0, "start_ratio": 2.5, "noise_levels": "karras"},
    "loop": {
        "train_batch_size": 64,
        "learning_rate": 2e-4,
        "fake_score_learning_rate": 1e-3,
        "adam_beta1": 0.0,
        "ema_halflife_kimg": 1.0,
        "logging_steps": 5,
    },
}
