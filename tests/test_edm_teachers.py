"""EDM networks as teachers: through every method, the solvers, and the scripts' `--dry_run`."""

import runpy
import sys

import pytest
import torch
from conftest import ROOT, tiny_unet
from diffusers import ConsistencyModelPipeline, EDMEulerScheduler

from diffusers_onestep import (
    DKDM,
    DMD,
    PID,
    Denoiser,
    EDMHeunScheduler,
    EDMSchedule,
    EDMUNet2DModel,
    OneStepPipeline,
    SiD,
    Teacher,
    fit_d_ode,
    train,
)
from diffusers_onestep.arguments import TrainArguments
from diffusers_onestep.augmentation import augment
from diffusers_onestep.data import Batches, Conditions
from diffusers_onestep.distillation import StudentArguments
from diffusers_onestep.hooks import default_hooks
from diffusers_onestep.models import SpaceToDepthUNet2DModel, network_from_config, set_dropout, shrunk
from diffusers_onestep.schedulers import solver_for
from diffusers_onestep.schedules import karras_sigma


def edm_network(architecture="ddpmpp", **config):
    torch.manual_seed(0)
    network = EDMUNet2DModel(
        sample_size=8,
        architecture=architecture,
        model_channels=8,
        channel_mult=(1, 2),
        layers_per_block=1,
        attention_resolutions=(4,),
        num_class_embeds=3,
        augment_dim=9,
        dropout=0.1,
        **config,
    )
    return network.eval()


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edm")
    ConsistencyModelPipeline(edm_network(), EDMEulerScheduler()).save_pretrained(folder)
    return folder


def methods(teacher):
    yield SiD(teacher, augment_probability=0.12)
    yield DMD(teacher)
    yield PID(teacher, distance="l2")
    student = Denoiser(shrunk_network(), teacher.denoiser.schedule, "edm")
    yield DKDM(teacher, student, batch_size=2, num_steps=4, sample_shape=teacher.sample_shape)


def shrunk_network():
    return shrunk(edm_network(), 0.5)


@pytest.mark.parametrize("place, name", list(enumerate(["SiD", "DMD", "PID", "DKDM"])))
def test_two_steps_of_every_method(place, name, teacher_folder, tmp_path):
    teacher = Teacher.from_pretrained(teacher_folder)
    distiller = list(methods(teacher))[place]
    before = {k: v.clone() for k, v in distiller.student.network.state_dict().items()}
    args = TrainArguments(output_dir=str(tmp_path), train_batch_size=2, max_train_steps=2, learning_rate=1e-3)
    conditions = Conditions({} if name == "DKDM" else teacher.encode())
    save, _ = default_hooks(distiller, args)
    train(distiller, Batches(conditions, 2), args, save=save)
    after = distiller.student.network.state_dict()
    assert any(not torch.equal(before[k], after[k]) for k in before)
    if name == "DKDM":
        assert Teacher.from_pretrained(tmp_path).denoiser.prediction_type == "edm"
        return
    pipe = OneStepPipeline.from_pretrained(tmp_path)
    noise, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 2])
    distiller.student.eval()  # dropout off
    expected = distiller.sample(noise, {"class_labels": labels})
    images = pipe(latents=noise, class_labels=labels, output_type="latent").images
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)
    start = StudentArguments(output_dir="", pretrained_teacher_model="", student_init=str(tmp_path))
    if name == "PID":
        with pytest.raises(ValueError, match=r"`student_init` must predict as .* of PID with the head 'network'"):
            start.load_student()
    started = start.load_student("network")
    again = type(distiller)(teacher, student=started, **({"distance": "l2"} if name == "PID" else {}))
    assert all(torch.equal(v, after[k]) for k, v in again.student.network.state_dict().items())
    if name == "SiD":
        assert pipe.scheduler.init_noise_sigma == pytest.approx(2.5, rel=1e-6)
    if name in ("DMD", "PID"):
        assert pipe.scheduler.init_noise_sigma == pytest.approx(80.0, rel=1e-6)


# augmentation


def test_fake_score_alone_sees_augmented_images(teacher_folder):
    teacher = Teacher.from_pretrained(teacher_folder)
    distiller = SiD(teacher, augment_probability=1.0, network_dropout=0.05)
    seen = {"teacher": [], "student": [], "fake_score": []}
    for name in seen:
        network = getattr(distiller, name).network
        network.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: seen[name].append(kwargs.get("augment_labels")), with_kwargs=True
        )
    list(distiller.updates({"batch_size": 2, "cond": {"class_labels": torch.tensor([0, 1])}}))
    assert seen["teacher"] == [None] and set(seen["student"]) == {None}
    first, second = seen["fake_score"]
    assert first.shape == (2, 9) and second is None
    assert distiller.student.network.config.dropout == 0.05
    assert distiller.student.network.enc["8x8_block0"].dropout == 0.05
    assert distiller.teacher.network.enc["8x8_block0"].dropout == 0.1


def dropouts(network):
    found = {name: m.p for name, m in network.named_modules() if isinstance(m, torch.nn.Dropout)}
    return found | {name: m.__dict__["dropout"] for name, m in network.named_modules() if "dropout" in m.__dict__}


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("make", [tiny_unet, edm_network, SpaceToDepthUNet2DModel])
def test_dropout_is_that_of_the_saved_network(make, tmp_path):
    network = make()
    before = dropouts(network)
    set_dropout(network, 0.25)
    network.save_pretrained(tmp_path)
    assert dropouts(network) == dropouts(type(network).from_pretrained(tmp_path)) != before
    assert network_from_config(network.config | {"_class_name": type(network).__name__}).config.dropout == 0.25
    assert set(dropouts(network).values()) == ({0.25} if make is edm_network else {0.0, 0.25})
    if make is not edm_network:
        assert all(p == 0 for name, p in dropouts(network).items() if "attentions" in name)


def test_dropout_of_a_network_that_has_none_is_refused():
    with pytest.raises(ValueError, match="`network_dropout` must be None for Linear"):
        set_dropout(torch.nn.Linear(2, 2), 0.1)


def test_networks_without_augmentation_labels_have_none(unet):
    teacher = Denoiser(unet, EDMSchedule(), "edm")
    assert SiD(teacher, augment_probability=0.12).augment_probability == 0
    assert SiD(teacher, augment_probability=0.12, gan_weight=1.0).augment_probability == 0
    with pytest.raises(ValueError, match="`augment_probability` must lie between 0 and 1"):
        SiD(teacher, augment_probability=2.0)


def test_augmentation_does_what_its_labels_say():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4000, 1, 8, 8, generator=generator)
    changed, labels = augment(images, 0.12, generator)
    assert labels.shape == (4000, 9) and changed.shape == images.shape
    torch.testing.assert_close(labels[:, 0].mean(), torch.tensor(0.5), atol=0.05, rtol=0)  # a fair coin, always
    torch.testing.assert_close(labels[:, 1].mean(), torch.tensor(0.06), atol=0.015, rtol=0)
    for group, probability in (([2], 0.12), ([4], 0.12), ([5, 6], 0.12), ([7, 8], 0.12)):
        share = (labels[:, group] != 0).any(1).float().mean().item()
        assert share == pytest.approx(probability, abs=0.02)
    plain = (labels == 0).all(1)
    assert torch.equal(changed[plain], images[plain])
    only_x = (labels[:, 0] == 1) & (labels[:, 1:] == 0).all(1)
    assert torch.equal(changed[only_x], images[only_x].flip(3)) and only_x.any()

    # one generator per sample makes the draws independent of the batch
    def generators():
        return [torch.Generator().manual_seed(i) for i in range(6)]

    whole = augment(images[:6], 1.0, generators())
    halves = [augment(images[:6][part], 1.0, generators()[part]) for part in (slice(0, 3), slice(3, 6))]
    for i in (0, 1):
        torch.testing.assert_close(whole[i], torch.cat([half[i] for half in halves]))


def test_augmentation_moves_a_spot_where_its_labels_say():
    """A bright spot goes where the affine map of the labels takes it."""
    size = 64
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    spot = torch.exp(-((x - 40) ** 2 + (y - 28) ** 2) / 8.0)[None, None]
    generator = torch.Generator().manual_seed(3)
    checked = 0
    for _ in range(40):
        moved, (label,) = augment(spot, 0.5, generator)
        start = torch.tensor([40.0, 28.0]) - (size - 1) / 2
        start = start * (1 - 2 * label[:2]) * 2 ** (0.2 * label[2])
        cos, sin = label[3] + 1, label[4]
        start = torch.stack([cos * start[0] + sin * start[1], -sin * start[0] + cos * start[1]])
        if label[5:7].norm() > 0:
            continue
        target = start + 0.125 * size * label[7:]
        if target.abs().max() < 24:
            column, row = (target + (size - 1) / 2).round().long()
            assert moved[0, 0, row, column] > 0.8
            checked += 1
    assert checked >= 5


# solvers


def test_distilled_solvers_and_the_reference(teacher_folder):
    teacher = Teacher.from_pretrained(teacher_folder)
    noise = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    held = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    cond = {"class_labels": torch.arange(16) % 3}
    assert isinstance(teacher.reference_scheduler, EDMHeunScheduler)
    samples = teacher.sample(noise, cond, num_inference_steps=18)
    fine = teacher.sample(noise, cond, num_inference_steps=40)
    euler = teacher.sample(noise, cond, num_inference_steps=18, scheduler=teacher.scheduler)
    assert (samples - fine).norm() < 0.7 * (euler - fine).norm()
    for solver in ("edm-euler", "edm-dpmsolver++"):
        scheduler = solver_for(solver, teacher.scheduler)
        scheduler.set_timesteps(5)
        expected = karras_sigma(torch.linspace(1, 0, 5, dtype=torch.float64)).float()
        torch.testing.assert_close(scheduler.sigmas[:5], expected, rtol=1e-5, atol=0)
        report = fit_d_ode(
            scheduler,
            teacher.denoiser.call_network,
            5,
            noise,
            scale=4,
            cond=cond,
            holdout=held,
            holdout_cond=cond,
            progress_bar=False,
        )
        assert report.accepted and report.heldout_mse < 0.9 * report.heldout_mse_base


def test_solvers_of_another_preconditioning_are_refused():
    with pytest.raises(ValueError, match="`preconditioning` must be 'edm'"):
        solver_for("edm-euler", EDMHeunScheduler(0.02, preconditioning="ve"))


# --dry_run


@pytest.mark.parametrize(
    "script, flags, words",
    [
        ("train_sid", ["--preset", "cifar10-cond"], ["SiD", "batch: 256 = 16", "800,000,000 images", "2.5", "0.13"]),
        ("train_dmd", [], ["DMD", "sigma / alpha 80"]),
        ("train_pid", ["--distance", "l2"], ["PID", "noise scaled by 80"]),
        ("train_dkdm", ["--shrink", "0.5"], ["DKDM"]),
    ],
)
def test_dry_run_writes_nothing(script, flags, words, teacher_folder, tmp_path, capsys, monkeypatch):
    argv = [
        script,
        "--pretrained_teacher_model",
        str(teacher_folder),
        "--output_dir",
        str(tmp_path / "out"),
        "--dry_run",
        "--hub_token",
        "a-secret",
    ]
    monkeypatch.setattr(sys, "argv", [*argv, *flags])
    runpy.run_path(str(ROOT / "training" / f"{script}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    parameters = sum(p.numel() for p in edm_network().parameters())
    for word in (*words, f"teacher: EDMUNet2DModel, {parameters:,} parameters", "step 2: 2 samples"):
        assert word in printed, word
    assert "a-secret" not in printed
    assert not (tmp_path / "out").exists()
