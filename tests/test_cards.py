"""Cards are made from a folder alone, run as they stand, and are valid on the Hub."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import PartialState
from conftest import ROOT, run_script, tiny_unet, training_module
from diffusers import ConsistencyModelPipeline, DDPMScheduler
from huggingface_hub import ModelCard
from test_dkdm import DIT

from diffusers_onestep import DMD, GuidedDenoiser, OneStepPipeline, SiD, Teacher, create_model_card, train
from diffusers_onestep.arguments import TrainArguments, parse_args
from diffusers_onestep.cards import TEMPLATE
from diffusers_onestep.data import Batches, Conditions
from diffusers_onestep.distillation import DistillationArguments
from diffusers_onestep.hooks import student_hooks
from diffusers_onestep.records import (
    command_line,
    look_up_license,
    on_hub,
    provenance,
    run_record,
    without_secret_settings,
    without_secret_words,
    without_secrets,
)
from diffusers_onestep.repository import shipped_names
from diffusers_onestep.run_folder import put_aside_old_numbers


def trained(teacher_folder, folder, **flags):
    """A student of one update, in a folder as `train` leaves it."""
    teacher = Teacher.from_pretrained(teacher_folder)
    args = TrainArguments(output_dir=str(folder), max_train_steps=1, train_batch_size=2, **flags)
    train(DMD(teacher), Batches(Conditions(teacher.encode()), 2), args)
    return folder


def python_blocks(card):
    return re.findall(r"```python\n(.*?)```", card, re.S)


@pytest.fixture(scope="module")
def licensed(tmp_path_factory):
    """A teacher with a card of its own."""
    folder = tmp_path_factory.mktemp("licensed") / "teacher"
    ConsistencyModelPipeline(tiny_unet(classes=3), DDPMScheduler()).save_pretrained(folder)
    (folder / "NOTICE").write_text("Drawn by Ada.\n")
    (folder / "README.md").write_text(
        "---\nlicense: creativeml-openrail-m\nextra_gated_prompt: Do no harm.\n---\n# teacher\n"
    )
    return folder


@pytest.fixture(scope="module")
def student(licensed, tmp_path_factory):
    return trained(licensed, tmp_path_factory.mktemp("cards") / "student", validation_steps=1)


@pytest.fixture
def folder(student, tmp_path):
    return shutil.copytree(student, tmp_path / "student")


def test_the_gpu_is_named(monkeypatch):
    PartialState()  # of the machine as it is
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert provenance("command")["hardware"].endswith(", NVIDIA H100 80GB HBM3")


def test_the_processor_is_named():
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file() or "model name" not in cpuinfo.read_text():
        pytest.skip("this system does not tell")
    name = provenance("command")["hardware"].split(f", {os.cpu_count()} cores")[0]
    assert f": {name}\n" in cpuinfo.read_text()


def test_the_data_of_a_run_are_linked(folder):
    assert on_hub(["user/captioned-images", str(folder), None, "images.npz"]) == ["user/captioned-images"]
    record = json.loads((folder / "training_run.json").read_text())
    assert record["datasets"] == []
    (folder / "training_run.json").write_text(json.dumps(record | {"datasets": ["user/captioned-images"]}))
    assert ModelCard(create_model_card(folder).read_text()).data.datasets == ["user/captioned-images"]


def test_a_licence_that_could_not_be_read_is_looked_up_again(folder, licensed, monkeypatch, caplog):
    monkeypatch.setattr("diffusers_onestep.records.hf_hub_download", _offline)
    record = run_record("SiD", SiD.paper, "user/teacher")
    assert record["license"] == {} and "licence of 'user/teacher' could not be read" in caplog.text
    (folder / "training_run.json").write_text(json.dumps(record))
    look_up_license(folder)
    assert json.loads((folder / "training_run.json").read_text()) == record
    monkeypatch.setattr("diffusers_onestep.records.hf_hub_download", lambda *_, **__: licensed / "README.md")
    look_up_license(folder)
    found = json.loads((folder / "training_run.json").read_text())["license"]
    assert found == {"license": "creativeml-openrail-m", "gated": True}


def _offline(*arguments, **settings):
    raise OSError("no network")


def test_cards_that_are_not_ours_stay(folder, caplog):
    (folder / "README.md").write_text("Of somebody else.\n")
    create_model_card(folder)
    assert (folder / "README.md").read_text() == "Of somebody else.\n" and "edited by hand" in caplog.text


def test_the_card_of_a_download_stays(folder, caplog):
    """A push leaves the record of the run out: made anew, a card would lose licence, teacher and command."""
    before = (folder / "README.md").read_text()
    (folder / "training_run.json").unlink()
    (folder / "training_args.json").unlink()
    create_model_card(folder)
    assert (folder / "README.md").read_text() == before and "as a download has none" in caplog.text
    (folder / "README.md").unlink()
    create_model_card(folder)
    assert "Not recorded: teacher, command" in (folder / "README.md").read_text()


def test_a_training_run_leaves_a_card_that_runs(student, licensed, tmp_path, monkeypatch):
    card = ModelCard.load(student / "README.md")
    assert card.data.license == "creativeml-openrail-m" and card.data.pipeline_tag == "unconditional-image-generation"
    assert {"diffusers-onestep", "dmd", "one-step", "distillation"} <= set(card.data.tags)
    assert card.data.get("base_model") is None  # a folder is none on the Hub
    text = card.text
    for part in ("use-based restrictions", "accept conditions first", "Drawn by Ada.", "abs/2311.18828", "(NFE 1)",
                 "1 updates, 2 images seen", "Seed 0", "![samples](samples.png)", "![health](health.png)",
                 f"torch {torch.__version__.split('+')[0]}", "Not measured: any distance",
                 "@misc{yin2024", str(licensed)):  # fmt: skip
        assert part in text, part
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks(text)
    assert len(blocks) == 2
    for code in blocks:
        exec(code, {})
        (tmp_path / "sample.png").unlink()


@pytest.mark.parametrize(
    "name, method, flags",
    [
        ("train_sid", "SiD", []),
        ("train_pid", "PID", ["--distance", "l2", "--num_points", "4"]),
        ("train_dkdm", "DKDM", ["--shrink", "0.5", "--num_steps", "4", "--validation_inference_steps", "2"]),
    ],
)
def test_every_script_leaves_a_card(name, method, flags, licensed, tmp_path, monkeypatch):
    module = training_module(name)
    (arguments,) = [v for k, v in vars(module).items() if k == f"{method}Arguments"]
    flags = ["--pretrained_teacher_model", str(licensed), "--output_dir", str(tmp_path / "out"), *flags]
    module.main(parse_args(arguments, [*flags, "--max_train_steps", "1", "--train_batch_size", "2"]))
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "creativeml-openrail-m" and method.lower() in card.data.tags
    assert f"Method: {method}, [" in card.text and f"Teacher: `{licensed}`" in card.text
    monkeypatch.chdir(tmp_path)
    for code in python_blocks(card.text):
        exec(code, {})


def test_a_transformer_that_no_pipeline_of_diffusers_samples_has_a_card_that_says_so(licensed, tmp_path, monkeypatch):
    (tmp_path / "dit.json").write_text(json.dumps(DIT))
    module = training_module("train_dkdm")
    flags = ["--pretrained_teacher_model", str(licensed), "--output_dir", str(tmp_path / "out"), "--num_steps", "4"]
    flags += ["--student_config", str(tmp_path / "dit.json"), "--max_train_steps", "1", "--train_batch_size", "2"]
    module.main(parse_args(module.DKDMArguments, [*flags, "--validation_inference_steps", "2"]))
    card = (tmp_path / "out" / "README.md").read_text()
    (code,) = python_blocks(card)
    assert "`OneStepPipeline` alone samples it" in card and "class_labels=[0]" in code
    monkeypatch.chdir(tmp_path)
    exec(code, {})


def test_teachers_have_cards_too(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 16), dtype=np.uint8)
    labels = np.arange(8) % 2
    np.savez(tmp_path / "data.npz", images_train=images, labels_train=labels, class_names=np.array(["cat", "dog"]))
    module = training_module("train_teacher")
    flags = ["--dataset", str(tmp_path / "data.npz"), "--output_dir", str(tmp_path / "out"), "--max_train_steps", "1"]
    module.main(parse_args(module.TeacherArguments, [*flags, "--train_batch_size", "2", "--license", "mit"]))
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "mit" and "distillation" not in card.data.tags and 'class_labels=["cat"]' in card.text
    monkeypatch.chdir(tmp_path)
    exec(python_blocks(card.text)[0], {})


def test_its_settings_are_a_file_that_runs_again(student, tmp_path):
    (text,) = re.findall(r"```yaml\n(.*?)```", (student / "README.md").read_text(), re.S)
    (tmp_path / "again.yaml").write_text(text)
    again = parse_args(DistillationArguments, ["--config", str(tmp_path / "again.yaml")])
    assert (
        (again.max_train_steps, again.train_batch_size) == (1, 2)
        and again.output_dir == str(student)
        and yaml.safe_load(text)["seed"] == 0
    )


def test_hub_teachers_become_the_base_model(folder):
    record = (folder / "training_run.json").read_text()
    record = record.replace('"base_model": null', '"base_model": "google/ddpm-cifar10-32"')
    (folder / "training_run.json").write_text(record)
    data = ModelCard.load(create_model_card(folder, repo_id="user/x")).data
    assert (data.base_model, data.base_model_relation) == ("google/ddpm-cifar10-32", "finetune")


def test_a_student_that_went_on_from_anothers_is_under_both_licences(licensed, teacher_folder, tmp_path):
    start = shutil.copytree(teacher_folder, tmp_path / "start")
    (start / "README.md").write_text("---\nlicense: cc-by-nc-sa-4.0\n---\n")
    flags = ["--pretrained_teacher_model", licensed, "--student_init", start, "--max_train_steps", "1"]
    flags += ["--train_batch_size", "2", "--output_dir"]
    run_script("train_sid", *flags, tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "other" and card.data.license_name == "creativeml-openrail-m-and-cc-by-nc-sa-4.0"
    for part in ("Commercial use of this model is not allowed.", "use-based restrictions", "must be under the same",
                 f"It started from `{start}`.", "under cc-by-nc-sa-4.0: the terms of both hold."):  # fmt: skip
        assert part in card.text, part
    (start / "README.md").write_text("---\nlicense: creativeml-openrail-m\n---\n")
    run_script("train_sid", *flags, tmp_path / "same")
    card = ModelCard.load(tmp_path / "same" / "README.md")
    assert card.data.license == "creativeml-openrail-m" and "terms of both" not in card.text


def test_a_published_config_does_not_tell_where_its_parts_came_from(student, licensed, tmp_path):
    assert str(licensed) in Teacher.from_pretrained(licensed).denoiser.network.config._name_or_path
    assert all(str(licensed) not in config.read_text() for config in student.glob("*/*config.json"))


def test_the_card_of_a_shipped_teachers_adapter_imports_what_it_calls(folder):
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"an adapter")
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder"] = ["transformers", "CLIPTextModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    record = json.loads((folder / "training_run.json").read_text())
    (folder / "training_run.json").write_text(json.dumps(record | {"teacher": "emoji-sd"}))
    code = python_blocks(create_model_card(folder).read_text())[-1]
    assert "load_lora_weights" in code and 'shipped_model("emoji-sd")' in code
    imports = [line for line in code.splitlines() if line.startswith("from ")]
    exec("\n".join(imports), known := {})
    assert {"DiffusionPipeline", "shipped_model"} <= known.keys()


def test_the_teachers_files_are_loaded_as_the_run_loaded_them(folder):
    for name in ("unet", "model_index.json"):
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    for name, own in (("training_run.json", {"revision": "v2"}), ("training_args.json", {"variant": "fp16"})):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | own))
    (code,) = python_blocks(create_model_card(folder).read_text())
    assert re.search(r'OneStepPipeline.from_pretrained\(".*", revision="v2", variant="fp16"\)', code)


def test_numbers_from_a_python_session_keep_their_machine(folder):
    row = {"metric": "FD-fashion", "num_samples": 10, "seed": 0, "value": 1.5, "nfe": 1, "images_per_second": 2.0}
    about = {"command": "", "hardware": "a machine", "versions": {"torch": "2"}}
    (folder / "metrics.json").write_text(json.dumps(about | {"results": [row | {"model": "student"}]}))
    assert "Measured on a machine, with torch 2, in a Python session." in create_model_card(folder).read_text()


def test_own_words_stay(folder):
    (folder / "notes.md").write_text("Looks best at night.\n")
    assert "Looks best at night." in create_model_card(folder).read_text()
    edited = (folder / "README.md").read_text().replace("at night", "at noon")
    (folder / "README.md").write_text(edited)
    create_model_card(folder, repo_id="user/x")
    assert (folder / "README.md").read_text() == edited


def test_metrics_become_model_index_results_and_only_the_students(folder):
    row = {"metric": "FD-fashion", "num_samples": 10, "seed": 0, "error": 0.1, "images_per_second": 2.0}
    rows = [
        row | {"model": model, "nfe": n, "value": v} for model, n, v in (("student", 1, 0.5), ("teacher", 50, 1.5))
    ]
    about = {"command": "c", "hardware": "h", "versions": {"torch": "2"}}
    (folder / "metrics.json").write_text(json.dumps(about | {"results": rows}))
    card = ModelCard.load(create_model_card(folder))
    (result,) = card.data.eval_results
    assert (result.metric_value, result.metric_type, result.metric_args["nfe"]) == (0.5, "fd-fashion", 1)
    assert "| teacher | 50 | 1.5" in card.text and "Not measured: FID" in card.text
    assert "Measured on h" in card.text  # rows of before `resolution`
    about["results"] = [row | {"resolution": [16, 24]} for row in rows]
    for precision, said in (("no", "on h, with torch 2"), ("bf16", "on h, in bf16, with torch 2")):
        (folder / "metrics.json").write_text(json.dumps(about | {"precision": precision}))
        assert f"Measured on images of 16 x 24 pixels, {said}" in create_model_card(folder).read_text()


def test_a_teacher_that_was_measured_at_several_guidance_scales_is_the_teacher(folder):
    row = {"metric": "FD-fashion", "num_samples": 10, "seed": 0, "value": 1.5, "nfe": 50, "images_per_second": 2.0}
    rows = [row | {"model": f"teacher, guidance {g}"} for g in (1, 2)]
    about = {"command": "c", "hardware": "h", "versions": {"torch": "2"}}
    (folder / "metrics.json").write_text(json.dumps(about | {"results": [*rows, row | {"model": "s", "nfe": 1}]}))
    card = ModelCard.load(create_model_card(folder))
    (result,) = card.data.eval_results
    assert result.metric_args["nfe"] == 1 and "the teacher in the same run" not in card.text
    (folder / "metrics.json").write_text(json.dumps(about | {"results": rows}))
    card = ModelCard.load(create_model_card(folder))
    assert not card.data.eval_results and "Not measured: any distance" in card.text


@pytest.mark.parametrize(
    "license, commercial, own_terms",
    [
        ({"license": "other", "license_name": "flux-1-dev-non-commercial-license"}, False, True),
        ({"license": "cc-by-nc-sa-4.0"}, False, False),
        ({"license": "other", "license_name": "my-sampling-terms"}, True, True),
        ({"license": "apache-2.0"}, True, False),
    ],
)
def test_licences_of_their_own_are_read_by_their_name(folder, license, commercial, own_terms):
    record = json.loads((folder / "training_run.json").read_text())
    (folder / "training_run.json").write_text(json.dumps(record | {"license": license}))
    text = create_model_card(folder).read_text()
    assert ("Commercial use of this model is not allowed" not in text) == commercial
    assert ("read its terms" in text) == own_terms
    assert ("must be under the same licence" in text) == ("-sa-" in license["license"])


def test_what_is_not_recorded_is_not_invented(folder, tmp_path):
    for name in ("README.md", "training_run.json", "training_args.json", "samples.png"):
        (folder / name).unlink()
    card = create_model_card(folder).read_text()
    assert "Not recorded: teacher" in card and "license: unknown" in card and "samples.png" not in card
    with pytest.raises(ValueError, match="`folder` must hold a model or a scheduler"):
        create_model_card(tmp_path)


def test_many_step_models_run_by_their_cards(tmp_path, monkeypatch):
    pipeline = OneStepPipeline(tiny_unet(), DDPMScheduler())
    pipeline.save_pretrained(tmp_path / "model")
    blocks = python_blocks(create_model_card(tmp_path / "model").read_text())
    monkeypatch.chdir(tmp_path)
    for code in blocks:
        exec(code, {})
    assert len(blocks) == 2


@pytest.mark.parametrize(
    "scheduler, expected",
    [
        (
            {"_class_name": "LCMScheduler", "original_inference_steps": 1},
            "num_inference_steps=1, guidance_scale=1.0, ",
        ),
        (
            {"_class_name": "DistilledDDIMScheduler", "dode_tables": {"8": {"lambdas": [0.0] * 8}}},
            "guidance_scale=7.5",
        ),
        ({"_class_name": "DDPMScheduler"}, "num_inference_steps=20, guidance_scale=7.5"),
    ],
)
def test_text_to_image_models_are_asked_with_prompts(tmp_path, scheduler, expected):
    ours = scheduler["_class_name"].startswith("Distilled")
    index = {"_class_name": "StableDiffusionPipeline", "text_encoder": ["transformers", "CLIPTextModel"]}
    index |= {"scheduler": ["diffusers_onestep" if ours else "diffusers", scheduler["_class_name"]]}
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    (tmp_path / "training_args.json").write_text(json.dumps({"guidance_scale": 7.5}))
    card = ModelCard.load(create_model_card(tmp_path))
    assert card.data.pipeline_tag == "text-to-image"
    blocks = python_blocks(card.text)
    assert all(compile(code, "card", "exec") and 'pipe("a photo of a cat", ' in code for code in blocks)
    assert expected in blocks[-1] and len(blocks) == (2 if scheduler["_class_name"] == "LCMScheduler" else 1)
    assert ("import diffusers_onestep" in blocks[-1]) == ours


@pytest.mark.parametrize("name", shipped_names())
def test_shipped_cards_are_made_by_the_same_code_and_run(name, tmp_path, monkeypatch):
    card = (ROOT / "model_cards" / f"{name}.md").read_text()
    assert training_module("ship_model").shipped_card(name) == card, "python training/ship_model.py NAME makes it anew"
    assert ModelCard(card).data.license == ("cc-by-4.0" if name.startswith("emoji-sd") else "apache-2.0")
    files = re.findall(r"\]\(([\w.-]+\.png)\)", card)
    assert files and all((ROOT / "model_cards" / file).is_file() for file in files)
    monkeypatch.chdir(tmp_path)
    for code in python_blocks(card):
        torch.manual_seed(0)
        exec(code, {})


def test_the_template_is_one_file():
    assert (ROOT / "model_cards" / "template.md").resolve() == TEMPLATE.resolve()


# records


def test_secrets_in_commands_and_settings_are_hidden(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    words = ["train.py", "--hub_token", "abc", "--api-key=def", "WANDB_API_KEY=ghi", "--max_token_length", "77"]
    words += ["--tracker", "https://me:pass@host/x", "--note", "is 0123456789abcdef", "--revision", "a" * 40]
    shown = without_secret_words(words)
    assert shown[:7] == ["train.py", "--hub_token", "REDACTED", "--api-key=REDACTED", "WANDB_API_KEY=REDACTED",
                         "--max_token_length", "77"]  # fmt: skip
    assert shown[7:] == ["--tracker", "https://REDACTED@host/x", "--note", "is REDACTED", "--revision", "a" * 40]
    signed = "https://h/x.npz?part=1&X-Amz-Signature=abc&sig=d&token=e&v=2"
    assert without_secrets(signed) == (
        "https://h/x.npz?part=1&X-Amz-Signature=REDACTED&sig=REDACTED&token=REDACTED&v=2"
    )
    for name in ("DB_PASS", "MYSQL_PWD", "HF_TOKEN_READ", "OPENAI_API_KEY_2"):
        monkeypatch.setenv(name, f"value-of-{name}")
        assert without_secrets(f"as value-of-{name}") == "as REDACTED"
    for token in ("glpat-" + "x" * 20, "xoxb-1234567890-abc", "AIza" + "x" * 35):
        assert without_secrets(token) == "REDACTED"
    monkeypatch.setenv("PWD", "/home/somewhere")  # a folder
    assert without_secrets("/home/somewhere") == "/home/somewhere"
    monkeypatch.setenv("PGPASSWORD", "postgres-password")
    assert without_secrets("as postgres-password") == "as REDACTED"
    assert without_secrets("hf_" + "x" * 30) == "REDACTED" and without_secrets("hf_hub") == "hf_hub"
    settings = {"hub_token": "x", "seed": 1, "prompts": "0123456789abcdef.txt"}
    assert without_secret_settings(settings) == {"hub_token": None, "seed": 1, "prompts": "REDACTED.txt"}


@pytest.mark.parametrize(
    "parent, own, expected",
    [
        (
            ["/env/bin/python3.11", "{bin}/accelerate", "launch", "--cpu", "t.py", "--seed", "1"],
            ["/env/bin/python3.11", "-u", "t.py", "--seed", "1"],
            "accelerate launch --cpu t.py --seed 1",
        ),
        (["bash"], ["python", "t.py", "--seed", "1"], "python t.py --seed 1"),
        (["/usr/bin/python3", "test.py"], ["/env/bin/python", "{bin}/t.py", "--seed", "1"], "t.py --seed 1"),
        (["bash"], ["python", "t.py", "--hub_token", "x y"], "python t.py --hub_token REDACTED"),
    ],
)
def test_the_command_is_the_launchers(monkeypatch, parent, own, expected):
    folder = str(Path(sys.executable).parent)
    parent, own = ([word.format(bin=folder) for word in words] for words in (parent, own))
    monkeypatch.setattr(sys, "orig_argv", own)
    monkeypatch.setattr(sys, "argv", own[next(i for i, word in enumerate(own) if word.endswith(".py")) :])
    process = type("Process", (), {"cmdline": lambda self: parent, "parent": lambda self: self})
    monkeypatch.setattr("diffusers_onestep.records.psutil.Process", process)
    assert command_line() == expected


def test_numbers_of_another_step_are_put_aside(teacher_folder, tmp_path):
    folder = trained(teacher_folder, tmp_path / "out")
    row = {"model": "out", "nfe": 1, "metric": "FD-fashion", "value": 1.5, "num_samples": 10, "seed": 0}
    metrics = {"results": [row | {"images_per_second": 3.0}], "command": "", "hardware": "a machine", "versions": {}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    teacher = Teacher.from_pretrained(teacher_folder)
    args = TrainArguments(str(folder), max_train_steps=2, train_batch_size=2, resume_from_checkpoint="latest")
    train(DMD(teacher), Batches(Conditions(teacher.encode()), 2), args)
    assert "1.50" not in create_model_card(folder).read_text()
    assert json.loads((folder / "metrics-step-1.json").read_text()) == metrics


def test_numbers_of_another_run_are_put_aside(tmp_path):
    for record, name in (({"steps": 1}, "metrics-step-1.json"), ({}, "metrics-old.json")):
        (tmp_path / "metrics.json").write_text("{}")
        (tmp_path / "training_run.json").write_text(json.dumps(record))
        if record:
            put_aside_old_numbers(tmp_path, 1)
            assert (tmp_path / "metrics.json").is_file()
        put_aside_old_numbers(tmp_path)
        assert not (tmp_path / "metrics.json").exists() and (tmp_path / name).is_file()


def test_a_solver_from_python_names_its_teacher_or_that_there_is_none(tmp_path):
    (tmp_path / "scheduler").mkdir()
    for note, loaded in (({"teacher_model": "user/model"}, '"user/model"'), ({}, '"its teacher"')):
        config = {"_class_name": "DistilledDDIMScheduler", "dode_tables": {"8": {"lambdas": [0.0] * 8} | note}}
        (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
        assert f"DiffusionPipeline.from_pretrained({loaded})" in create_model_card(tmp_path).read_text()


def test_guidance_that_is_baked_in_is_in_the_card(teacher_folder, tmp_path):
    teacher = Teacher.from_pretrained(teacher_folder)
    distiller = DMD(GuidedDenoiser(teacher.denoiser, 3.0, {"class_labels": torch.tensor([2])}))
    distiller.origin = teacher
    save, _ = student_hooks(distiller, TrainArguments(str(tmp_path)))
    args = TrainArguments(str(tmp_path), max_train_steps=1, train_batch_size=2)
    train(distiller, Batches(Conditions(teacher.encode()), 2), args, save=save)
    assert "guidance 3.0 is baked in" in (tmp_path / "README.md").read_text()
