import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from analytic import gaussian_denoiser
from conftest import ROOT, run, run_on_two_ranks, script, tiny_unet
from PIL import Image
from safetensors.torch import load_file

from diffusers_onestep import DMD, Denoiser, EDMSchedule, OneStepPipeline, SiD, Teacher, VPSchedule, train
from diffusers_onestep.arguments import TrainArguments, leave_process_group
from diffusers_onestep.cli import main
from diffusers_onestep.data import Batches, Conditions, LabelledImages
from diffusers_onestep.hooks import student_hooks
from diffusers_onestep.methods.base import Distiller, Paper
from diffusers_onestep.optimization import optimizer_class, set_learning_rate
from diffusers_onestep.pictures import picture
from diffusers_onestep.run_folder import checkpoints, latest_checkpoint, read_log
from diffusers_onestep.trainer import Trainer

WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"


def sid_flags(teacher, output, steps=6, **other):
    flags = {
        "pretrained_teacher_model": teacher,
        "output_dir": output,
        "max_train_steps": steps,
        "train_batch_size": 4,
        "checkpointing_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
    } | other
    return [part for key, value in flags.items() for part in (f"--{key}", str(value))]


@pytest.fixture(scope="session")
def unbroken(teacher_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("unbroken")
    run(script("train_sid.py", *sid_flags(teacher_folder, output)))
    return output


def test_a_run_leaves_a_student_that_makes_images(unbroken):
    assert OneStepPipeline.from_pretrained(unbroken)(class_labels=[0, 2]).images[0].size == (16, 16)
    assert (unbroken / "samples.png").is_file()
    assert json.loads((unbroken / "training_args.json").read_text())["alpha"] == 1.2
    lines = [json.loads(line) for line in (unbroken / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {"loss/student", "loss/fake_score", "score_gap", "fake_score_lag"} <= lines[-1].keys()
    assert [path.name for path in checkpoints(unbroken)] == ["step-000004", "step-000006"]


def test_resumed_run_has_bit_identical_weights(unbroken, teacher_folder, tmp_path):
    run(script("train_sid.py", *sid_flags(teacher_folder, tmp_path, steps=4)))
    done = run(script("train_sid.py", *sid_flags(teacher_folder, tmp_path, resume_from_checkpoint="latest")))
    assert "6/6" in done.stderr and "1/6" not in done.stderr
    assert_same_weights(tmp_path, unbroken)


def wait_for(path, process):
    """Until a process has written a file."""
    deadline = time.monotonic() + 500
    while not path.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    assert path.is_file(), f"{process.args}: {process.poll()}"


def test_killed_run_resumes_and_its_folder_always_loads(unbroken, teacher_folder, tmp_path):
    # a checkpoint and a student at every step, so that a kill at any moment finds them being written
    command = script("train_sid.py", *sid_flags(teacher_folder, tmp_path, checkpointing_steps=1))
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(tmp_path / "model_index.json", process)
    OneStepPipeline.from_pretrained(tmp_path)  # beside the run, which goes on
    time.sleep(random.uniform(0, 0.3))
    process.kill()
    process.wait()
    OneStepPipeline.from_pretrained(tmp_path)
    for path in checkpoints(tmp_path):
        assert (path / "trainer_state.json").is_file() and (path / "optimizer.bin").is_file()
    run(script("train_sid.py", *sid_flags(teacher_folder, tmp_path, resume_from_checkpoint="latest")))
    assert_same_weights(tmp_path, unbroken)


def test_sigterm_writes_a_checkpoint_and_says_how_to_go_on(teacher_folder, tmp_path):
    process = subprocess.Popen(
        script("train_sid.py", *sid_flags(teacher_folder, tmp_path, steps=100_000, checkpointing_steps=100_000)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(tmp_path / "log.jsonl", process)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=500)
    assert process.returncode == 128 + signal.SIGTERM, errors[-2000:]
    assert "--resume_from_checkpoint latest" in output
    step = json.loads((latest_checkpoint(tmp_path) / "trainer_state.json").read_text())["step"]
    assert f"after step {step};" in output
    OneStepPipeline.from_pretrained(tmp_path)


def test_a_second_signal_interrupts_but_not_the_echo_of_a_launcher(tmp_path, monkeypatch):
    """A cluster signals the launcher and the ranks, and the launcher passes it on to the ranks once more."""
    trainer = Trainer(Scripted(), arguments(tmp_path))
    with trainer.signals():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert trainer.stopping() == signal.SIGTERM
        monkeypatch.setattr("diffusers_onestep.trainer.ECHO_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_two_real_ranks_agree_with_one_process(teacher_folder, tmp_path):
    """Same global batch of 4 as one process x 2 micro-batches x 2, and two ranks x 2."""
    one, two = tmp_path / "one", tmp_path / "two"
    # an epsilon far above the gradients' noise, or Adam turns rounding into full steps
    shared = {"steps": 2, "train_batch_size": 2, "adam_epsilon": 1.0}
    run(script("train_sid.py", *sid_flags(teacher_folder, one, gradient_accumulation_steps=2, **shared)))
    command = script("train_sid.py", *sid_flags(teacher_folder, two, **shared))
    run_on_two_ranks(command)
    assert (latest_checkpoint(two) / "random_states_1.pkl").is_file()  # there really were two
    start = load_file(teacher_folder / WEIGHTS)
    results = [load_file(output / WEIGHTS) for output in (one, two)]
    first, second = (torch.cat([(result[key] - start[key]).flatten() for key in start]) for result in results)
    assert first.abs().max() > 1e-4
    torch.testing.assert_close(first, second, rtol=0, atol=2e-3 * first.abs().max().item())
    # what is logged is of the whole global batch too
    of_one, of_two = (
        next(line for line in read_log(folder / "log.jsonl") if "score_gap" in line) for folder in (one, two)
    )
    for name in ("score_gap", "fake_score_lag"):
        assert of_two[name] == pytest.approx(of_one[name], rel=1e-3)


def test_the_lag_is_a_ratio_of_means_over_the_global_batch(tmp_path):
    """Of single samples it would be noise: here +2 and -2 of a gap of 1 and 3, together (2 - 6) / 4."""

    class Compared(Scripted):
        diagnosis = SiD.diagnosis

        def updates(self, batch, generator=None):
            gap, along = batch["found"]
            self.diagnostics = {"score_gap": torch.tensor(gap), "error_along_gap": torch.tensor(along)}
            yield from super().updates(batch, generator)

    batches = iter([{"batch_size": 2, "cond": {}, "found": found} for found in ((1.0, 2.0), (3.0, -6.0))])
    train(Compared(), batches, arguments(tmp_path, max_train_steps=1, gradient_accumulation_steps=2))
    (line,) = read_log(tmp_path / "log.jsonl")
    assert (line["score_gap"], line["fake_score_lag"]) == (2.0, -1.0)


HOLDS_ITS_GROUP = """
import sys, torch
from diffusers_onestep.arguments import patient_accelerator
patient_accelerator()
group = torch.distributed.group.WORLD  # as FSDP2 does, in caches
sys.setswitchinterval(100)  # or gloo's thread gets Python before the process ends, nearly always
torch.distributed.all_gather([torch.empty(4), torch.empty(4)], torch.ones(4))
"""


def test_a_process_group_that_something_holds_does_not_abort_the_end(tmp_path):
    (tmp_path / "holds.py").write_text(HOLDS_ITS_GROUP)
    for _ in range(3):  # every second one aborts without `leave_process_group`
        run_on_two_ranks([sys.executable, str(tmp_path / "holds.py")], PYTHONPATH=str(ROOT))


@pytest.mark.parametrize("backend, left", [("gloo", 2), ("cpu:gloo,cuda:nccl", 1)])
def test_a_rank_that_failed_does_not_wait_for_the_others_of_nccl(monkeypatch, backend, left):
    ended = []
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_backend", lambda: backend)
    monkeypatch.setattr("accelerate.PartialState.destroy_process_group", lambda self: ended.append(self))
    leave_process_group(failed=True)
    leave_process_group(failed=False)
    assert len(ended) == left


def assert_same_weights(a, b):
    first, second = load_file(a / WEIGHTS), load_file(b / WEIGHTS)
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


# in this process

EDM = EDMSchedule()


def arguments(folder, **other):
    return TrainArguments(output_dir=str(folder), **({"train_batch_size": 64, "logging_steps": 1} | other))


@pytest.mark.parametrize(
    "method, rates, steps",
    [
        (SiD, {"learning_rate": 1e-2, "fake_score_learning_rate": 3e-2, "adam_beta1": 0.0}, 250),
        (DMD, {"learning_rate": 1e-2, "fake_score_learning_rate": 3e-2, "adam_beta1": 0.0}, 250),
    ],
)
def test_student_of_a_gaussian_teacher_takes_its_mean_and_std(tmp_path, method, rates, steps):
    """The student starts with one step's collapsed spread and must find N(0.3, 0.5**2)."""
    teacher = gaussian_denoiser(EDM, "edm", 0.3, 0.5)
    options = {"alpha": 1.0} if method is SiD else {"start_ratio": 2.5}
    distiller = method(teacher, sample_shape=(1, 4, 4), **options)
    batch = {"batch_size": 1000, "cond": {}}
    before = distiller.generate(batch).std().item()
    train(distiller, Batches(Conditions(), 64), arguments(tmp_path, max_train_steps=steps, **rates))
    x0 = distiller.generate(batch)
    assert before < 0.15
    assert x0.mean().item() == pytest.approx(0.3, abs=0.06)
    assert x0.std().item() == pytest.approx(0.5, abs=0.06)
    assert all(p.item() == pytest.approx(v) for p, v in zip(teacher.parameters(), (0.3, 0.5), strict=True))


class Scripted(Distiller):
    """Two linear networks and losses that a test can see through."""

    paper = Paper("", "", "")

    def __init__(self, losses=None, moves_at_once=True):
        self.student = gaussian_denoiser(EDM, "edm")
        self.critic = torch.nn.Linear(1, 1)
        self.losses, self.seen, self.moves_at_once = losses, [], moves_at_once
        self.sample_shape = (1, 1, 1)

    @property
    def trainable(self):
        return {"student": self.student.network, "fake_score": self.critic}

    def updates(self, batch, generator=None):
        self.seen.append(
            (batch["shared_generator"].initial_seed(), [g.initial_seed() for g in generator], batch["cond"])
        )
        for name in ("fake_score", "fake_score", "student"):
            parameter = next(self.trainable[name].parameters())
            before = parameter.detach().clone()
            step = len({shared for shared, _, _ in self.seen}) - 1
            value = self.losses[step] if self.losses else 1.0
            if value == "no slope":  # a loss of 0 with an infinite gradient
                yield name, (parameter - before).sum().sqrt()
            else:
                yield name, (parameter * value).sum() * batch.get("scale", 1.0)
            if self.moves_at_once:  # the loop steps before it asks again
                assert not torch.equal(parameter.detach(), before)


def batches_of(**other):
    while True:
        yield {"batch_size": 2, "cond": {}, **other}


def test_the_loop_steps_before_it_asks_again_and_accumulation_counts_optimiser_steps(tmp_path):
    distiller = Scripted()
    train(distiller, batches_of(), arguments(tmp_path, max_train_steps=3, gradient_accumulation_steps=2))
    shared = [seed for seed, _, _ in distiller.seen]
    assert shared[::2] == shared[1::2] and len(set(shared)) == 3
    seeds = [seed for _, seeds, _ in distiller.seen for seed in seeds]
    assert len(set(seeds)) == len(seeds) == 12
    state = json.loads((latest_checkpoint(tmp_path) / "trainer_state.json").read_text())
    assert state["step"] == 3 and state["images_seen"] == 12


@pytest.mark.parametrize("bad, what", [(float("nan"), "loss"), ("no slope", "gradient norm")])
def test_non_finite_loss_or_gradient_names_everything(tmp_path, bad, what):
    distiller = Scripted(losses=[1.0, 1.0, bad])
    with pytest.raises(FloatingPointError) as error:
        train(distiller, batches_of(), arguments(tmp_path, max_train_steps=5, checkpointing_steps=2))
    message = str(error.value)
    for part in ("Scripted", "'fake_score'", what, "step 2", "step-000002"):
        assert part in message
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["warning"] == message


def test_infinite_gradients_are_replaced_where_the_method_says_so(tmp_path):
    distiller = Scripted(losses=[1.0, "no slope", 1.0])
    distiller.sanitize_gradients = True  # as SiD
    train(distiller, batches_of(), arguments(tmp_path, max_train_steps=3))
    assert SiD.sanitize_gradients and not DMD.sanitize_gradients
    assert all(p.isfinite().all() for network in distiller.trainable.values() for p in network.parameters())


def test_a_fake_score_that_equals_the_teacher_moves_the_student_by_weight_decay_alone(tmp_path):
    """Specification of DMD, I8."""
    distiller = DMD(gaussian_denoiser(EDM, "edm", 0.3, 0.5), sample_shape=(1, 4, 4))
    trainer = Trainer(distiller, arguments(tmp_path, learning_rate=1e-2, adam_weight_decay=0.01))
    trainer.train_step([{"batch_size": 8, "cond": {}}])
    moved = [p.item() for p in distiller.student.parameters()]
    assert moved == pytest.approx([v * (1 - 1e-2 * 0.01) for v in (0.3, 0.5)], rel=1e-6)
    assert [p.item() for p in distiller.fake_score.parameters()] != pytest.approx([0.3, 0.5], rel=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_resumed_run_of_dmd2_has_bit_identical_weights(optimizer, tmp_path):
    """Specification of DMD, I25: with a GAN head, a three-step student, accumulation and an average of the weights."""
    images = torch.randint(0, 256, (7, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    real = Batches(LabelledImages(images, torch.arange(7) % 3), 2)

    def run(folder, steps, **other):
        torch.manual_seed(0)  # of the head
        schedule = VPSchedule(torch.linspace(0.9999, 0.01, 1000))
        settings = {"fake_score_updates": 3, "gan_weight": 1e-2, "student_timesteps": [999, 600, 300]}
        distiller = DMD(Denoiser(tiny_unet(classes=3), schedule, "epsilon"), **settings)
        settings = {"learning_rate": 1e-3, "ema_halflife_kimg": 0.01, "gradient_accumulation_steps": 2}
        settings["optimizer"] = optimizer
        settings |= {"train_batch_size": 2, "max_train_steps": steps, "checkpointing_steps": 2}
        with torch.compiler.set_stance("force_eager"):  # torchao's AdamW compiles itself for every shape
            train(distiller, real, arguments(folder, lr_warmup_steps=2, **settings, **other))

    run(tmp_path / "unbroken", 4)
    run(tmp_path / "resumed", 2)
    run(tmp_path / "resumed", 4, resume_from_checkpoint="latest")
    whole, resumed = (latest_checkpoint(tmp_path / name) for name in ("unbroken", "resumed"))
    assert whole.name == resumed.name == "step-000004"
    files = sorted(path.name for path in whole.glob("*.safetensors"))
    assert "ema.safetensors" in files and len(files) >= 3  # student, fake score with its head, average
    for name in files:
        first, second = load_file(whole / name), load_file(resumed / name)
        assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first), name
    before = load_file(checkpoints(tmp_path / "unbroken")[0] / "ema.safetensors")
    assert any(not torch.equal(before[k], v) for k, v in load_file(whole / "ema.safetensors").items())


def test_a_resumed_run_has_its_own_rates(tmp_path, caplog):
    def trainer(**settings):
        settings = {"max_train_steps": 4, "lr_warmup_steps": 0} | settings
        return Trainer(
            DMD(gaussian_denoiser(EDM, "edm", 0.3, 0.5), sample_shape=(1, 4, 4)), arguments(tmp_path, **settings)
        )

    first = trainer(learning_rate=1e-2, fake_score_learning_rate=1e-3)
    for _ in range(2):
        first.train_step([{"batch_size": 8, "cond": {}}])
    first.save_checkpoint()
    again = trainer(learning_rate=4e-2, lr_scheduler="cosine", adam_beta1=0.5)
    again.resume(latest_checkpoint(tmp_path))
    (jump,) = [r.getMessage() for r in caplog.records if "at once" in r.getMessage()]
    assert "rate of the fake_score goes from 1.0e-03 to 2.0e-02" in jump and str(tmp_path) in jump
    for name in ("student", "fake_score"):  # half way down the cosine
        (group,) = again.optimizers[name].param_groups
        assert group["lr"] == pytest.approx(2e-2) and group["betas"][0] == 0.5
        moments = [[s["exp_avg_sq"] for s in t.optimizers[name].state.values()] for t in (again, first)]
        assert len(moments[0]) > 0 and all(torch.equal(a, b) for a, b in zip(*moments, strict=True))
    again.train_step([{"batch_size": 8, "cond": {}}])
    again.train_step([{"batch_size": 8, "cond": {}}])
    assert again.optimizers["student"].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)


def test_interrupted_checkpoint_is_absent(tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers_onestep.trainer.write_json", _write_args_then_break)
    with pytest.raises(OSError, match="disk full"):
        train(Scripted(), batches_of(), arguments(tmp_path, max_train_steps=2))
    assert checkpoints(tmp_path) == []
    monkeypatch.undo()
    train(Scripted(), batches_of(), arguments(tmp_path, max_train_steps=2, resume_from_checkpoint="latest"))
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000002"]


def test_pictures_that_fail_lose_nothing(tmp_path):
    def validate(folder):
        raise torch.OutOfMemoryError("no room for pictures")

    saved = []
    with pytest.raises(torch.OutOfMemoryError):
        train(Scripted(), batches_of(), arguments(tmp_path, max_train_steps=2), save=saved.append, validate=validate)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000002"] and saved == [tmp_path]
    shown = []
    for _ in range(2):  # the second one has nothing to do
        hooks = {"save": saved.append, "validate": lambda folder: shown.append(folder) or {}}
        args = arguments(tmp_path, max_train_steps=2, resume_from_checkpoint="latest")
        train(Scripted(), batches_of(), args, **hooks)
    assert shown == [tmp_path]


def test_a_run_gone_on_with_knows_the_best_of_its_last_pictures(tmp_path):
    distances = iter([3.0, 2.0])
    options = {"validation_steps": 1, "checkpointing_steps": 2, "max_train_steps": 2}
    hooks = {
        "save": lambda folder: folder.mkdir(exist_ok=True),
        "validate": lambda folder: {"distance": next(distances)},
    }
    train(Scripted(), batches_of(), arguments(tmp_path, **options), **hooks)
    assert json.loads((latest_checkpoint(tmp_path) / "trainer_state.json").read_text())["best_distance"] == 2.0


def test_launchers_that_wrap_networks_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(ValueError, match="launcher must not use DEEPSPEED: FSDP2 spreads networks here"):
        Trainer(Scripted(), arguments(tmp_path))


def _write_args_then_break(path, content):
    if path.name == "trainer_state.json":
        raise OSError("disk full")


def test_another_runs_folder_is_refused_and_going_back_drops_what_came_later(tmp_path):
    train(Scripted(), batches_of(), arguments(tmp_path, max_train_steps=4, checkpointing_steps=2))
    with pytest.raises(ValueError, match=r"`output_dir` must hold no checkpoints of another run"):
        train(Scripted(), batches_of(), arguments(tmp_path, max_train_steps=4))
    earlier = str(checkpoints(tmp_path)[0])
    args = arguments(tmp_path, max_train_steps=3, checkpointing_steps=2, resume_from_checkpoint=earlier)
    train(Scripted(), batches_of(), args)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000002", "step-000003"]
    assert not list((tmp_path / "checkpoints").glob(".*"))
    other = tmp_path / "other"
    train(Scripted(), batches_of(), arguments(other, max_train_steps=1))
    with pytest.raises(ValueError, match="`resume_from_checkpoint` must be one of the checkpoints"):
        foreign = str(checkpoints(other)[0])
        train(Scripted(), batches_of(), arguments(tmp_path, max_train_steps=4, resume_from_checkpoint=foreign))
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000002", "step-000003"]
    with pytest.raises(ValueError, match="`ema_halflife_kimg` must be 0"):
        averaged = {"ema_halflife_kimg": 1.0, "resume_from_checkpoint": "latest"}
        train(Scripted(), batches_of(), arguments(tmp_path, max_train_steps=4, **averaged))


def test_checkpoints_hold_no_code(tmp_path):
    train(Scripted(), batches_of(), arguments(tmp_path, max_train_steps=1, ema_halflife_kimg=1.0))
    names = {path.name for path in latest_checkpoint(tmp_path).iterdir()}
    assert {"ema.safetensors", "trainer_state.json", "model.safetensors"} <= names
    assert not [name for name in names if name.startswith("custom_checkpoint")]


def test_train_saves_the_student_of_a_teacher(teacher_folder, tmp_path):
    teacher = Teacher.from_pretrained(teacher_folder)
    train(SiD(teacher), Batches(Conditions(teacher.encode()), 2), arguments(tmp_path, max_train_steps=1))
    assert OneStepPipeline.from_pretrained(tmp_path)(class_labels=1).images
    assert (tmp_path / "samples.png").is_file()
    settings = json.loads((tmp_path / "training_args.json").read_text())
    assert (settings["pretrained_teacher_model"], settings["train_batch_size"]) == (str(teacher_folder), 2)


def test_train_saves_the_averaged_student_of_a_guided_teacher(tmp_path):
    teacher = Teacher.from_pretrained("fashion32")
    args = arguments(tmp_path, max_train_steps=3, ema_halflife_kimg=0.01, learning_rate=1e-2)
    distiller = DMD(teacher.guided(2.0))
    start = [p.detach().clone() for p in distiller.student.network.parameters()]
    train(distiller, Batches(Conditions(teacher.encode()), 2), args)
    assert json.loads((tmp_path / "training_args.json").read_text())["pretrained_teacher_model"] == "fashion32"
    averages = list(load_file(latest_checkpoint(tmp_path) / "ema.safetensors").items())
    averages = [tensor for _, tensor in sorted(averages, key=lambda item: int(item[0]))]
    saved = OneStepPipeline.from_pretrained(tmp_path).unet
    for first, average, raw, kept in zip(
        start, averages, distiller.student.network.parameters(), saved.parameters(), strict=True
    ):
        assert torch.equal(kept, average) and not torch.equal(average, raw) and not torch.equal(average, first)


def test_a_quickstart_clears_no_other_runs_checkpoints(tmp_path):
    train(Scripted(), batches_of(), arguments(tmp_path, max_train_steps=1))
    with pytest.raises(SystemExit):
        main(["quickstart", "--output_dir", str(tmp_path), "--max_train_steps", "1"])
    assert checkpoints(tmp_path)


def test_samples_png_shows_teacher_and_student_on_the_same_noises(teacher_folder, tmp_path):
    teacher = Teacher.from_pretrained(teacher_folder)
    distiller = DMD(teacher)
    with torch.no_grad():  # or both would be the teacher's
        for parameter in distiller.student.network.parameters():
            parameter += 0.01
    _, validate = student_hooks(distiller, arguments(tmp_path, seed=3))
    validate(tmp_path)
    noise = torch.randn(20, 1, 16, 16, generator=torch.Generator().manual_seed(3))
    cond = {"class_labels": torch.arange(20) % 3}
    of_teacher = picture(teacher.sample(noise, cond, num_inference_steps=50))
    with torch.no_grad():
        of_student = picture(distiller.student(noise, torch.full((20,), 999), cond))
    shown = torch.from_numpy(np.array(Image.open(tmp_path / "samples.png")))[::2, ::2]  # every pixel is a 2 x 2 square
    shown = shown.reshape(4, 16, 10, 16).transpose(1, 2)  # (row, column, height, width)
    for rows, expected in (((0, 2), of_teacher), ((1, 3), of_student)):
        got = torch.cat([shown[row] for row in rows])[:, None].int()
        assert (got - expected.int()).abs().max() <= 1 < expected.float().std()
    assert not torch.equal(of_teacher, of_student)


def test_clipping_warm_up_and_rates(tmp_path):
    args = arguments(
        tmp_path, max_grad_norm=0.5, lr_scheduler="constant_with_warmup", lr_warmup_steps=10, learning_rate=1.0,
        fake_score_learning_rate=0.1, max_train_steps=5,
    )  # fmt: skip
    trainer = Trainer(Scripted(moves_at_once=False), args)  # warm-up starts at rate 0
    seen = []
    for name, optimizer in trainer.optimizers.items():
        parameters = trainer.parameters[name]
        optimizer.optimizer.register_step_pre_hook(
            lambda *_, parameters=parameters: seen.append(
                torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).item()
            )
        )
    trainer.run(batches_of(scale=100.0))
    assert len(seen) == 15 and seen == pytest.approx([0.5] * 15, rel=1e-4)  # each network by itself
    rates = {name: optimizer.param_groups[0]["lr"] for name, optimizer in trainer.optimizers.items()}
    assert rates == pytest.approx({"student": 0.5, "fake_score": 0.05})
    plain = arguments(tmp_path / "other")
    assert Trainer(DMD(gaussian_denoiser(EDM, "edm"), sample_shape=(1, 1, 1)), plain).max_grad_norm == 10  # DMD's


def test_missing_tracker_and_bad_arguments_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
    with pytest.raises(ValueError, match=r"`report_to` must name installed trackers, but is 'trackio': pip"):
        arguments(tmp_path, report_to="trackio")
    with pytest.raises(ValueError, match=r"`report_to` must be of .*'wandb'.* but has \['wandbb'\]"):
        arguments(tmp_path, report_to="tensorboard, wandbb")
    with pytest.raises(ValueError, match=r"`train_batch_size` must be at least 1, but is 0"):
        arguments(tmp_path, train_batch_size=0)
    with pytest.raises(ValueError, match=r"`mixed_precision` must be"):
        arguments(tmp_path, mixed_precision="int8")
    with pytest.raises(ValueError, match=r"`global_batch_size` must be a multiple"):
        Trainer(Scripted(), arguments(tmp_path, global_batch_size=100, train_batch_size=64))
    with pytest.raises(ValueError, match=r"`resume_from_checkpoint` must be"):
        train(Scripted(), batches_of(), arguments(tmp_path, resume_from_checkpoint="nowhere"))


def test_global_batch_size_sets_the_accumulation(tmp_path):
    trainer = Trainer(Scripted(), arguments(tmp_path, global_batch_size=256, train_batch_size=64))
    assert trainer.args.gradient_accumulation_steps == 4


def test_a_run_says_where_it_starts_and_that_its_warm_up_is_too_long(tmp_path, capsys, caplog):
    settings = {"max_train_steps": 2, "lr_warmup_steps": 2, "resume_from_checkpoint": "latest"}
    train(Scripted(moves_at_once=False), batches_of(), arguments(tmp_path, **settings))
    assert f"No checkpoint in {tmp_path}: starting from the beginning." in capsys.readouterr().out
    assert "`lr_warmup_steps` (2) is not below `max_train_steps` (2)" in caplog.text
    assert "The student is saved in checkpoints alone" in caplog.text


def test_bad_input_ends_a_script_with_a_message(tmp_path):
    done = run(script("train_dmd.py", *sid_flags("fashion32", tmp_path), "--gan_weight", "1"), expected=2)
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("train_dmd.py: error: `dataset`") and last.endswith("`gan_weight` of 1.0, but is None.")


def test_bf16_keeps_float32_weights_and_trains_the_student(teacher_folder, tmp_path):
    run(script("train_sid.py", *sid_flags(teacher_folder, tmp_path, steps=2, mixed_precision="bf16")))
    weights, start = load_file(tmp_path / WEIGHTS), load_file(teacher_folder / WEIGHTS)
    assert all(w.dtype == torch.float32 for w in weights.values())
    moved = [k for k in start if not torch.equal(weights[k], start[k])]
    assert len(moved) > 0.9 * len(start)


@pytest.mark.parametrize("name", ["adamw", "radam"])
def test_weight_decay_is_decoupled(name):
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.zeros(3)
    optimizer_class(name)([weight], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(weight.data, torch.full((3,), 0.95))


def test_eight_bit_moments_move_weights_as_whole_ones_do():
    """And are a quarter as large; torchao's, where there is no CUDA."""
    generator, weights, sizes = torch.Generator().manual_seed(0), {}, {}
    start, gradients = torch.randn(64, 64, generator=generator), torch.randn(5, 64, 64, generator=generator)
    for name in ("adamw", "adamw8bit"):
        weight = torch.nn.Parameter(start.clone())
        optimizer = optimizer_class(name)([weight], lr=0.1, betas=(0.9, 0.999), weight_decay=0.01)
        with torch.compiler.set_stance("force_eager"):
            for gradient in gradients:
                weight.grad = gradient.clone()
                set_learning_rate(optimizer.param_groups[0], 0.01)
                optimizer.step()
        weights[name] = weight.detach()
        moments = [optimizer.state[weight][key] for key in ("exp_avg", "exp_avg_sq")]
        codes = [m.codes if name == "adamw8bit" else m for m in moments]
        sizes[name] = sum(c.numel() * c.element_size() for c in codes)
    moved = (weights["adamw"] - start).abs().mean()
    assert (weights["adamw8bit"] - weights["adamw"]).abs().mean() < 0.05 * moved and 0.005 < moved < 0.05
    assert sizes == {"adamw": 8 * 64 * 64, "adamw8bit": 2 * 64 * 64}
