import copy
import json

import pytest
import torch
from conftest import tiny_unet
from diffusers import ConsistencyModelPipeline, DDPMScheduler, DiffusionPipeline
from families import tiny_pipeline
from test_trainer import Scripted, arguments, batches_of

from diffusers_onestep import OneStepPipeline, SiD, Teacher, train
from diffusers_onestep.arguments import TrainArguments
from diffusers_onestep.data import Batches, Conditions
from diffusers_onestep.features import FashionCNN
from diffusers_onestep.health import GAP_WINDOW, PATIENCE, WINDOW, Health, Watch, draw_health, warnings
from diffusers_onestep.hooks import validation
from diffusers_onestep.run_folder import latest_checkpoint, read_log, truncate_log
from diffusers_onestep.sampler import spread


def updates(lag, number=WINDOW, gap=30.0):
    return [{"step": i, "images": 64 * i, "fake_score_lag": lag * (-1) ** i, "score_gap": gap} for i in range(number)]


def validations(key, *values):
    return [{"step": i, "images": 64 * i, key: value} for i, value in enumerate(values)]


def test_a_healthy_log_brings_no_warning():
    falling = [10 / (i + 1) for i in range(20)]
    log = updates(0.97) + validations("distance", *falling, 0.52, 0.6, 0.55, 0.7, 0.6, 0.6, 0.6)
    assert warnings(log + validations("diversity", 0.3, 0.4, 0.8, 0.9, 0.7)) == {}
    assert warnings([]) == {} and warnings(updates(5.0, WINDOW - 1)) == {}  # too early to say
    assert warnings(updates(5.0) + updates(0.8)) == {}  # over
    assert warnings(updates(90.0) + updates(30.0)) == {}  # two scores that are still nearly one
    assert warnings(updates(0.9) + updates(0.9, GAP_WINDOW - 3, gap=900.0)) == {}  # two wild batches
    assert warnings(updates(0.9, gap=1.0) + updates(0.9, 4 * WINDOW, gap=9.0)) == {}  # the student leaves the teacher


def said(*gaps):
    """The lines of a log at which a warning comes, line by line as a run writes them."""
    health = Health([])
    return [i for i, gap in enumerate(gaps) if health.add({"score_gap": gap, "fake_score_lag": -0.5})]


def test_a_gap_that_grows_from_zero_is_healthy_and_one_that_leaps_is_not():
    assert said(*(0.01 * i**2 for i in range(60)), *[36.0] * 40) == []  # the student leaves the teacher
    assert said(*[1.0] * 20, *(1.0 * 2**i for i in range(10))) == [25]


@pytest.mark.parametrize(
    "log, kind, words",
    [
        (updates(0.9) + updates(2.5), "fake_score_lag", "its lag is 2.5 times"),
        (updates(0.9) + updates(0.99, GAP_WINDOW, 2900.0), "score_gap", "difference is 2.9e+03"),
        (validations("diversity", 0.7, 0.9, 0.45), "diversity", "45% as much as the teacher's"),
        (validations("diversity", *[0.1] * 2 * PATIENCE), "diversity", "10% as much"),  # never rose
        (validations("distance", 3.0, 1.0, *[1.2] * 3, 2.0, 2.5, 3.0), "distance", "3 now, against 1 at its best, 6"),
    ],
)
def test_what_goes_wrong_is_said_in_plain_words(log, kind, words):
    found = warnings(log)
    assert list(found) == [kind] and words in found[kind]


def test_scores_farther_apart_than_any_two_images_are_wrong_from_the_start():
    assert warnings(updates(1.0, GAP_WINDOW, 4000.0), 1024) == warnings(updates(1.0, GAP_WINDOW - 1, 9e4), 1024) == {}
    assert "9e+04" in warnings(updates(1.0, GAP_WINDOW, 9e4), 1024)["score_gap"]


def test_a_warning_comes_once_and_again_only_after_it_was_over():
    health = Health([])
    said = [bool(health.add({"diversity": value})) for value in (0.8, 0.4, 0.3, 0.7, 0.4)]
    assert said == [False, True, False, False, True]
    assert Health(health.lines).add({"diversity": 0.3}) == []  # known when the run went on


def test_the_picture_needs_the_log_alone(tmp_path):
    from PIL import Image

    log = tmp_path / "log.jsonl"
    lines = (
        updates(0.9) + validations("distance", 3.0, 2.0) + [{"step": 9, "images": 64, "warning": "It stopped. Why?"}]
    )
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_health(log, tmp_path / "health.png")
    with Image.open(tmp_path / "health.png") as image:
        assert image.size[0] > 800 and len(image.getcolors(1 << 20)) > 3
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    draw_health(tmp_path / "none.jsonl", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("colour")
    ConsistencyModelPipeline(tiny_unet(classes=3, channels=3), DDPMScheduler()).save_pretrained(folder)
    return Teacher.from_pretrained(folder)


def test_live_numbers_of_a_student_that_is_the_teacher(teacher):
    """Colour images of another size: the reference are the teacher's own."""
    args = TrainArguments(output_dir="unused", validation_samples=12)
    watch = Watch(teacher, args, num_inference_steps=2)

    def same(noise, cond, generator):
        return teacher.sample(noise, cond, num_inference_steps=2)

    values = watch(same)
    assert values["distance"] == pytest.approx(0, abs=0.01) and values["diversity"] == pytest.approx(1)
    assert values["saturation"] == values["teacher_saturation"]
    collapsed = watch(lambda *inputs: same(*inputs).mean(0, keepdim=True).expand(12, -1, -1, -1) * 50)
    assert collapsed["diversity"] < 1e-3 and collapsed["distance"] > 10 * values["distance"] + 1
    assert collapsed["saturation"] > 0.5
    halves = torch.tensor([-1.5, -1.001, 1.0, 2.0]).reshape(1, 1, 2, 2).expand(12, 3, -1, -1)
    assert watch(lambda *inputs: halves)["saturation"] == 0.5  # less than a grey level is no clipping


def test_only_a_teacher_of_fashion_is_compared_with_fashion():
    args = TrainArguments(output_dir="unused", validation_samples=2)
    network = tiny_unet(classes=10, channels=1, size=32)
    digits, fashion = ({i: str(i) for i in range(10)}, Teacher.from_pretrained("fashion32").id2label)
    for names, of_fashion in ((digits, False), (None, False), (fashion, True)):
        watch = Watch(Teacher(ConsistencyModelPipeline(network, DDPMScheduler()), names), args)
        assert isinstance(watch.extractor, FashionCNN) == of_fashion == (watch.reference is not None)


def test_latents_are_decoded_and_conditions_taken_in_turn(teacher):
    seen = []
    args = TrainArguments(output_dir="unused", validation_samples=5)
    cond = {"class_labels": torch.tensor([2, 0])}
    watch = Watch(teacher, args, cond=cond, decode=lambda x0: x0 / 2, num_inference_steps=1)

    def student(noise, cond, generator):
        seen.append(cond["class_labels"].tolist())
        return 3 * torch.ones_like(noise)

    assert watch(student)["saturation"] == 1.0 and seen == [[2, 0, 2, 0, 2]]


def test_latents_are_decoded_no_more_at_a_time_than_are_trained():
    teacher = Teacher(tiny_pipeline("sd"))
    args = TrainArguments(output_dir="unused", validation_samples=5, train_batch_size=2)
    cond, sizes = teacher.encode(["a cat"]), []
    watch = Watch(teacher, args, cond=cond, decode=teacher.decode, num_inference_steps=1)

    def student(noise, cond, generator):
        sizes.append(len(noise))
        return noise

    watch(student)
    assert sizes == [2, 2, 1]


def test_a_live_distance_asks_for_prompts_of_all_kinds(tmp_path):
    """A file of prompts is often sorted: its beginning alone is of one kind, and far from all images."""
    teacher, asked = Teacher(tiny_pipeline("sd")), []
    samples = Conditions({"encoder_hidden_states": torch.arange(40.0)[:, None, None].expand(-1, 3, 16)})
    args = TrainArguments(output_dir=str(tmp_path), validation_samples=4)

    def student(noise, cond, generator):
        asked.append(cond["encoder_hidden_states"][:, 0, 0].tolist())
        return noise

    validation(teacher, student, args, samples, num_inference_steps=1)(tmp_path)
    assert asked == [[0, 10, 20, 30]] * 2  # the picture's, then the distance's
    assert spread(3, 3) == [0, 1, 2] and spread(5, 2) == [0, 1, 0, 1, 0] and spread(3, 10) == [0, 3, 6]


def test_features_are_computed_where_training_has_put_the_teacher(teacher):
    watch = Watch(teacher, TrainArguments(output_dir="unused", validation_samples=2), num_inference_steps=1)
    watch.teacher = copy.deepcopy(teacher)
    watch.teacher.denoiser.network.to("meta")  # no images come from there, but the extractor has followed
    with pytest.raises(RuntimeError):
        watch(lambda noise, cond, generator: noise)
    assert next(watch.extractor.parameters()).device.type == "meta"


def test_a_run_keeps_its_health_and_resumes_it(teacher, tmp_path):
    """Unbroken and resumed runs have the same log, but for the seconds."""
    one, two = tmp_path / "one", tmp_path / "two"

    def go(folder, steps, **other):
        settings = {"train_batch_size": 2, "checkpointing_steps": 2, "validation_steps": 2, "validation_samples": 6}
        args = arguments(folder, max_train_steps=steps, **(settings | other))
        train(SiD(teacher), Batches(Conditions(teacher.encode()), 2), args)

    go(one, 4)
    go(two, 2)
    go(two, 4, resume_from_checkpoint="latest")
    logs = [
        [{k: v for k, v in line.items() if k != "seconds"} for line in read_log(f / "log.jsonl")] for f in (one, two)
    ]
    assert logs[0] == logs[1] and len(logs[0]) == 6
    keys = {"gradient_norm/student", "gradient_norm/fake_score", "gradient_norm_ratio", "score_gap", "fake_score_lag"}
    line = logs[0][0]
    assert keys <= line.keys()
    ratio = line["gradient_norm/student"] / line["gradient_norm/fake_score"]
    assert line["gradient_norm_ratio"] == pytest.approx(ratio) and ratio > 0
    assert {"distance", "diversity", "saturation", "teacher_saturation"} <= logs[0][-1].keys()
    assert (one / "health.png").is_file() and (one / "samples.png").is_file() and (one / "best").is_dir()
    OneStepPipeline.from_pretrained(two)
    assert isinstance(DiffusionPipeline.from_pretrained(one), DiffusionPipeline)


class Losing(Scripted):
    """A method whose fake score has lost its student."""

    logged = 0

    def updates(self, batch, generator=None):
        self.logged += 1
        lag = 0.9 if self.logged <= WINDOW else 7.0
        self.diagnostics = {"fake_score_lag": torch.tensor(lag), "score_gap": torch.tensor(1.0)}
        yield from super().updates(batch, generator)


def test_a_diverging_run_warns_and_stops_if_it_is_asked_to(tmp_path, capsys):
    going, stopping = tmp_path / "going", tmp_path / "stopping"
    train(Losing(), batches_of(), arguments(going, max_train_steps=2 * WINDOW + 2))
    warned = [line for line in read_log(going / "log.jsonl") if "warning" in line]
    assert [line["step"] for line in warned] == [2 * WINDOW] and "lag is 7.0 times" in warned[0]["warning"]
    settings = {"max_train_steps": 2 * WINDOW + 2, "stop_on_divergence": True}
    with pytest.raises(SystemExit) as stop:
        train(Losing(), batches_of(), arguments(stopping, **settings))
    assert stop.value.code == 1
    said = capsys.readouterr().out
    assert (
        f"Stopped by --stop_on_divergence after step {2 * WINDOW}" in said
        and "Raise `fake_score_learning_rate`" in said
    )
    assert latest_checkpoint(stopping).name == f"step-{2 * WINDOW:06d}" and (stopping / "health.png").is_file()
    # asked to go on, it does: the warning is known
    train(Losing(), batches_of(), arguments(stopping, resume_from_checkpoint="latest", **settings))
    assert read_log(stopping / "log.jsonl")[-1]["step"] == 2 * WINDOW + 2


def test_a_run_that_nobody_looks_at_is_not_to_be_stopped_by_its_health(tmp_path, teacher):
    from diffusers_onestep import PID
    from diffusers_onestep.trainer import Trainer

    distiller = PID(teacher, distance="pseudo-huber", num_points=4)
    with pytest.raises(
        ValueError, match="`stop_on_divergence` needs `validation_steps` and `validation_samples` with"
    ):
        Trainer(distiller, arguments(tmp_path, stop_on_divergence=True, validation_steps=1, validation_samples=0))
    Trainer(distiller, arguments(tmp_path, stop_on_divergence=True, validation_steps=1, validation_samples=2))
    with pytest.raises(ValueError, match="must be off for a teacher"):
        arguments(tmp_path, validation_samples=2).refuse_live_numbers()
    with pytest.raises(ValueError, match="`validation_samples` must be 0 or at least 2, but is 1"):
        arguments(tmp_path, validation_samples=1)


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1, "a": 0.1}\n{"step": 2, "a": NaN}\n{"step": 3, "a":')
    assert [line["step"] for line in read_log(log)] == [1, 2]
    truncate_log(log, 1)
    assert log.read_text() == '{"step": 1, "a": 0.1}\n'
