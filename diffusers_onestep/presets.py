"""Published configurations by name: what the papers' tables were made with.

`max_train_steps` is the published duration in images over the global batch; `train_batch_size` the published batch of
one GPU, where it is known (SiD's is CIFAR-10's). PID and DKDM have no published text-to-image model.

What differs from the published runs: SDXL's four-step LoRA (DMD2) is an adapter beside a whole fake score, both are
adapters here; DMD's Stable Diffusion runs regress on half or a quarter of the samples that they match, on all of them
here. DMD2's runs that go on from another (`dmd2-imagenet64-resumed`, `dmd2-sd15-gan`) take its student as
--student_init: the fake score starts again at the teacher. FastGen's and Self-Forcing's own configurations of DMD2 are
not here.
"""


def _sid(
    alpha: float,
    batch: int,
    rate: float,
    million_images: int,
    dropout: float,
    augment: float,
    halflife_kimg: float = 500.0,
    **other,
) -> dict:
    return {
        "alpha": alpha,
        "start_ratio": 2.5,
        "noise_levels": "karras",
        "network_dropout": dropout,
        "augment_probability": augment,
        "global_batch_size": batch,
        "train_batch_size": 16,
        "learning_rate": rate,
        "adam_beta1": 0.0,
        "adam_weight_decay": 0.0,
        "ema_halflife_kimg": halflife_kimg,
        "max_train_steps": million_images * 1_000_000 // batch,
    } | other


_FP16 = {"mixed_precision": "fp16", "adam_epsilon": 1e-6}

SID_PRESETS = {
    "cifar10-uncond": _sid(1.2, 256, 1e-5, 500, 0.13, 0.12),
    "cifar10-cond": _sid(1.2, 256, 1e-5, 800, 0.13, 0.12),
    "imagenet64-cond": _sid(1.2, 8192, 4e-6, 1000, 0.1, 0.0, 2000.0, **_FP16),
    "ffhq64": _sid(1.2, 512, 1e-5, 500, 0.05, 0.15, student_adam_beta1=0.9, **_FP16),
    "afhqv2-64": _sid(1.0, 512, 5e-6, 500, 0.05, 0.15, **_FP16),
}


def _lsg(kappa: float) -> dict:
    return _sid(
        1.0,
        512,
        1e-6,
        10,
        dropout=0.0,
        augment=0.0,
        halflife_kimg=50.0,
        train_batch_size=1,
        start_ratio=None,
        student_timesteps=[625],
        noise_levels="uniform",
        loss_scale=1.0,
        kappas=[kappa],
        resolution=512,
    )


def _sid_dit(rate: float = 1e-6, **other) -> dict:
    # how long these ran, and on how many GPUs, is not published. Theirs, and not done here: a student's loss that is
    # weighted by 1 - s in place of SiD's normaliser, gradients clipped by value, no dropped prompts, and one number of
    # steps for both updates
    return {
        "alpha": 1.0,
        "student_timesteps": [1000.0, 750.0, 500.0, 250.0],
        "noise_levels": "logit_normal",
        "loss_scale": 100.0,
        "kappas": [4.5],
        "global_batch_size": 256,
        "train_batch_size": 1,
        "learning_rate": rate,
        "adam_beta1": 0.0,
        "adam_weight_decay": 0.0,
        "ema_halflife_kimg": 0.0,
        "mixed_precision": "bf16",
    } | other


SID_PRESETS |= {f"{model}-lsg-{kappa:g}": _lsg(kappa) for model in ("sd15", "sd21-base") for kappa in (1.5, 2, 3, 4.5)}
SID_PRESETS |= {
    "sd3-4step": _sid_dit(),
    "sana-4step": _sid_dit(5e-6),
    "flux-dev-4step": _sid_dit(embedded_guidance=4.5),
}


def _dmd(batch: int, gpus: int, rate: float, steps: int, **other) -> dict:
    return {
        "global_batch_size": batch,
        "train_batch_size": batch // gpus,
        "learning_rate": rate,
        "adam_beta1": 0.9,
        "adam_weight_decay": 0.01,
        "lr_warmup_steps": 500,
        "max_grad_norm": 10.0,
        "ema_halflife_kimg": 0.0,
        "max_train_steps": steps,
    } | other


def _dmd2(rate: float, iterations: int, batch: int = 280, gpus: int = 7, updates: int = 5, **other) -> dict:
    # DMD2's iterations are fake-score updates; the student moves in every fifth or tenth of them
    settings = {"fake_score_updates": updates, "lr_warmup_steps": 500 // updates, "mixed_precision": "bf16"} | other
    return _dmd(batch, gpus, rate, iterations // updates, **settings)


_SD15 = {"batch": 2048, "gpus": 64, "updates": 10, "guidance_scale": 1.75, "resolution": 512}
_SDXL = {"batch": 128, "gpus": 64, "guidance_scale": 8.0, "gan_weight": 5e-3, "resolution": 1024}

# Yin et al. 2024 (DMD), Table 5: weight of the regression, levels compared (t = 20 to 980, then to 500), batch of each
# of about 80 GPUs, updates in all. One run of eight commands, each with the next preset and --resume_from_checkpoint
# latest, on 2.5 million pairs of 50 PNDM steps that grow to 12 million in the third; a tiny VAE up to the fourth
_LAION6 = [
    (0.1, [0.138, 13.04], 32, 5_400),
    (0.5, [0.138, 13.04], 32, 8_600),
    (1.0, [0.138, 13.04], 32, 74_000),
    (1.0, [0.138, 1.618], 32, 80_000),
    (1.0, [0.138, 1.618], 16, 127_000),
    (0.75, [0.138, 1.618], 16, 149_500),
    (0.5, [0.138, 1.618], 16, 162_500),
    (0.25, [0.138, 1.618], 16, 165_000),
]

DMD_PRESETS = {
    "cifar10-cond": _dmd(392, 7, 5e-5, 300_000, regression_weight=0.25),
    "cifar10-uncond": _dmd(392, 7, 5e-5, 300_000, regression_weight=0.5),
    "imagenet64-cond": _dmd(336, 7, 2e-6, 350_000, regression_weight=0.25, mixed_precision="bf16"),
    "dmd2-imagenet64": _dmd2(2e-6, 200_000, gan_weight=3e-3),
    "dmd2-imagenet64-no-gan": _dmd2(2e-6, 400_000),
    "dmd2-imagenet64-resumed": _dmd2(5e-7, 150_000, gan_weight=3e-3),
    # LAION-6.25+; 500,000 pairs of 50 PNDM steps at the same guidance
    "sd15": _dmd(
        2304, 72, 1e-5, 20_000, guidance_scale=3.0, regression_weight=0.25, mixed_precision="bf16", resolution=512
    ),
    **{
        f"sd15-laion6-{stage}": _dmd(
            80 * micro_batch,
            80,
            1e-5,
            steps,
            level_ratios=levels,
            guidance_scale=8.0,
            regression_weight=weight,
            mixed_precision="bf16",
            resolution=512,
        )
        for stage, (weight, levels, micro_batch, steps) in enumerate(_LAION6, start=1)
    },
    "dmd2-sd15": _dmd2(1e-5, 40_000, **_SD15),
    "dmd2-sd15-gan": _dmd2(5e-7, 5_000, gan_weight=1e-3, **_SD15),  # goes on from the student of the one above
    "dmd2-sdxl-4step": _dmd2(5e-7, 20_000, student_timesteps=[999.0, 749.0, 499.0, 249.0], **_SDXL),
    # adapters on layers of attention, feed-forward, convolution and time there, on all wide ones here
    "dmd2-sdxl-4step-lora": _dmd2(
        5e-5, 16_000, student_timesteps=[999.0, 749.0, 499.0, 249.0], lora_rank=64, lora_alpha=8.0, **_SDXL
    ),
    # 10,000 pairs of Euler's method at guidance 8; its student is what the next one takes as --student_init
    "dmd2-sdxl-warmup": _dmd(
        256,
        64,
        1e-5,
        2_000,
        guidance_scale=8.0,
        student_timesteps=[399.0],
        matching_weight=0.0,
        regression_weight=1.0,
        max_grad_norm=0.0,
        mixed_precision="bf16",
        resolution=1024,
    ),
    "dmd2-sdxl-1step": _dmd2(5e-7, 25_000, student_timesteps=[399.0], **_SDXL),
}


def _pid(batch: int, micro_batch: int, rate: float, steps: int, **other) -> dict:
    # EMA rates 0.999, 0.9999 and 0.99995 are published; 0.9999 is a half-life of 6,931 updates
    return {
        "num_points": 250,
        "start_ratio": 80.0,
        "rule": "first",
        "distance": "lpips-average",
        "optimizer": "radam",
        "global_batch_size": batch,
        "train_batch_size": micro_batch,
        "learning_rate": rate,
        "adam_weight_decay": 0.0,
        "ema_halflife_kimg": 6931 * batch / 1000,
        "ema_rampup_ratio": 1.0,
        "max_train_steps": steps,
    } | other


PID_PRESETS = {
    "cifar10-uncond": _pid(512, 64, 2e-4, 800_000),
    "imagenet64-cond": _pid(2048, 32, 1e-4, 400_000, mixed_precision="fp16"),
}


def _dkdm(batch: int, gpus: int, **other) -> dict:
    # EMA 0.9999 is a half-life of 6,931 updates; the number of updates is not published (ablations stop at 200,000)
    return {
        "scheme": "dynamic",
        "reservoir_ratio": 0.4,
        "global_batch_size": batch,
        "train_batch_size": batch // gpus,
        "learning_rate": 1e-4,
        "adam_weight_decay": 0.0,
        "ema_halflife_kimg": 6931 * batch / 1000,
        "ema_rampup_ratio": 1.0,
        "mixed_precision": "fp16",
        "max_train_steps": 200_000,
    } | other


DKDM_PRESETS = {
    "cifar10": _dkdm(128, 1, learned_variance=True),
    "imagenet32": _dkdm(512, 4, learned_variance=True),
    "celeba64": _dkdm(256, 4, learned_variance=True),
}

# the shipped teacher, in minutes on two cores: settings found here, not published
FASHION32_QUICKSTART = {
    "method": {"alpha": 1.0, "start_ratio": 2.5, "noise_levels": "karras"},
    "loop": {
        "train_batch_size": 64,
        "learning_rate": 1e-4,
        "fake_score_learning_rate": 1e-3,
        "adam_beta1": 0.0,
        "ema_halflife_kimg": 1.5,
        "ema_rampup_ratio": 0.15,
        "logging_steps": 5,
    },
}
