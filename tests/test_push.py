"""Pushes by the real client to a Hub on this machine, loads from it, and what happens when things go wrong."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from accelerate import PartialState
from conftest import ROOT, tiny_unet, training_module
from diffusers import ConsistencyModelPipeline, DDPMScheduler
from edm_files import write_pickle
from hub_server import TOKEN, LocalHub, Repository
from huggingface_hub import ModelCard, constants
from PIL import Image
from test_cards import python_blocks, trained
from test_conversion import DDPMPP, SONG, network

from diffusers_onestep import OneStepPipeline, Teacher, convert, create_model_card, push_student
from diffusers_onestep.arguments import TrainArguments
from diffusers_onestep.cli import main
from diffusers_onestep.records import license_of
from diffusers_onestep.repository import ASSETS, shipped_names

STUDENT = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
}
BESIDE = {"README.md", "metrics.json", "samples.png", "health.png", "NOTICE", "pytorch_lora_weights.safetensors"}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that this process talks to, with an empty cache."""
    with LocalHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.endpoint)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture(scope="module")
def trained_folder(teacher_folder, tmp_path_factory):
    """A student that stock diffusers loads, with metrics and all that a push must leave out."""
    folder = trained(teacher_folder, tmp_path_factory.mktemp("trained") / "student")
    row = {"model": "student", "nfe": 1, "metric": "FD-fashion", "value": 1.5, "num_samples": 10, "seed": 0}
    about = {"command": "evaluate", "hardware": "a machine", "versions": {"torch": "2"}}
    metrics = about | {"results": [row | {"images_per_second": 3.0, "error": None, "extractor": "abc"}]}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    assert (folder / "checkpoints").is_dir() and (folder / "log.jsonl").is_file()
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"an adapter")
    (folder / "emoji-train.safetensors").write_bytes(b"somebody's images")
    (folder / "NOTICE").write_text("Drawn by Ada.\n")
    (folder / "unet" / ".diffusion_pytorch_model.safetensors.writing").write_bytes(b"half")
    return folder


@pytest.fixture
def folder(trained_folder, tmp_path):
    return shutil.copytree(trained_folder, tmp_path / "student")


def weights_of(folder):
    return (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


def image_of(path_or_id, **kwargs):
    pipe = OneStepPipeline.from_pretrained(path_or_id, **kwargs)
    return pipe(class_labels=[0], generator=torch.Generator().manual_seed(0), output_type="np").images


def fresh_process(code, cwd, hub, cache, **environment):
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | environment,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with Image.open(cwd / "sample.png") as image:
        return np.asarray(image)


# pushes


def test_push_is_one_commit_of_student_card_metrics_and_pictures(hub, folder, caplog):
    url = push_student(folder, "student")
    repository = hub.repositories["user/student"]
    assert url == f"{hub.endpoint}/user/student/commit/{repository.refs['main']}"
    assert set(repository.files()) == STUDENT | BESIDE | {".gitattributes"}
    assert repository.messages == ["initial commit", "student, pushed by diffusers_onestep"]
    assert repository.files()["unet/diffusion_pytorch_model.safetensors"] == weights_of(folder)
    assert b'from_pretrained("user/student")' in repository.files()["README.md"]
    assert ("POST", "/api/validate-yaml") in hub.requests and not repository.private

    push_student(folder, "student")  # nothing has changed
    assert len(repository.messages) == 2
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["results"][0]["value"] = 1.25
    (folder / "metrics.json").write_text(json.dumps(metrics))
    push_student(folder, "user/student")
    assert len(repository.messages) == 3 and b"1.25" in repository.files()["README.md"]
    edited = repository.files()["README.md"].replace(b"---\n", b"---\nextra_gated_prompt: Do no harm.\n", 1)
    repository.commit("main", repository.files() | {"README.md": edited}, "on the Hub")
    push_student(folder, "student")
    assert repository.files()["README.md"] == edited and "edited on the Hub" in caplog.text
    repository.commit("main", repository.files() | {"README.md": b"---\nlicense: mit\n---\n"}, "of a licence alone")
    push_student(folder, "student")
    assert b"made by diffusers_onestep" in repository.files()["README.md"]
    for words in (b"By hand.\n", b"By hand, again.\n"):  # here
        text = b"---\nlicense: mit\npipeline_tag: text-to-image\n---\n" + words
        (folder / "README.md").write_bytes(text)
        push_student(folder, "student")
        assert repository.files()["README.md"] == text


def test_files_of_an_earlier_student_do_not_stay(hub, folder):
    push_student(folder, "student")
    repository = hub.repositories["user/student"]
    files = repository.files() | {"unet/old-00001-of-00002.safetensors": b"", "notes/mine.txt": b"kept"}
    files |= {"quality.png": b"of the old one", "notes/mine.png": b"kept"}
    repository.commit("main", files, "by hand")
    (folder / "metrics.json").unlink()
    push_student(folder, "student")
    gone = {"unet/old-00001-of-00002.safetensors", "quality.png", "metrics.json"}
    assert not gone & repository.files().keys() and "samples.png" in repository.files()
    assert {repository.files()[f"notes/mine.{kind}"] for kind in ("txt", "png")} == {b"kept"} and set(
        repository.files()
    ) >= STUDENT
    # a solver by itself takes the place of a whole model
    for name in ("model_index.json", "NOTICE", "samples.png", "health.png", "pytorch_lora_weights.safetensors"):
        (folder / name).unlink()
    shutil.rmtree(folder / "unet")
    push_student(folder, "student")
    rest = {"scheduler/scheduler_config.json", "README.md", ".gitattributes"}
    assert set(repository.files()) == rest | {"notes/mine.txt", "notes/mine.png"}


def test_branch_and_pull_request(hub, folder):
    with pytest.raises(ValueError, match="`revision` must be None with `create_pr`"):
        push_student(folder, "student", revision="dev/one", create_pr=True)
    with pytest.raises(ValueError, match="`repo_id` must be 'user/name' or 'name', but is 'user/my student'"):
        push_student(folder, "user/my student")
    assert not hub.repositories
    push_student(folder, "student", revision="dev/one")
    repository = hub.repositories["user/student"]
    assert set(repository.files()) == {".gitattributes"} and set(repository.files("dev/one")) >= STUDENT
    assert b'from_pretrained("user/student", revision="dev/one")' in repository.files("dev/one")["README.md"]
    assert np.array_equal(image_of("user/student", revision="dev/one"), image_of(folder))
    url = push_student(folder, "student", create_pr=True)
    assert url == f"{hub.endpoint}/user/student/discussions/1"
    assert set(repository.files()) == {".gitattributes"} and set(repository.files("refs/pr/1")) >= STUDENT
    (folder / "samples.png").write_bytes(b"better")
    push_student(folder, "student", revision="refs/pr/1")  # the same pull request goes on
    assert repository.files("refs/pr/1")["samples.png"] == b"better" and "refs/pr/2" not in repository.refs
    push_student(folder, "student")
    head = push_student(folder, "student")  # nothing has changed
    assert "/commit/" in head and push_student(folder, "student", create_pr=True) == head


def test_pushed_student_in_fresh_processes_makes_the_same_image(hub, folder, tmp_path):
    """The card's code as it stands: ours, plain diffusers without us, and ours from the cache without a network."""
    push_student(folder, "user/student")
    ours, stock = python_blocks(hub.repositories["user/student"].files()["README.md"].decode())
    pipe = OneStepPipeline.from_pretrained(folder)
    expected = np.asarray(pipe(class_labels=[0], generator=torch.Generator().manual_seed(0)).images[0])
    assert "diffusers_onestep" in ours and "diffusers_onestep" not in stock
    alone = "import sys; sys.modules['diffusers_onestep'] = None\n" + stock
    assert np.array_equal(fresh_process(ours, tmp_path, hub, tmp_path / "a"), expected)
    assert np.array_equal(fresh_process(alone, tmp_path, hub, tmp_path / "b"), expected)
    asked = len(hub.requests)
    offline = fresh_process(ours, tmp_path, hub, tmp_path / "a", HF_HUB_OFFLINE="1")
    assert np.array_equal(offline, expected) and len(hub.requests) == asked


@pytest.mark.parametrize(
    "method, path, what", [("PUT", "storage", "drop"), ("POST", "preupload", 500), ("POST", "batch", 429)]
)
def test_a_passing_failure_is_survived(hub, folder, method, path, what):
    hub.fail(method, path, what)
    push_student(folder, "student")
    assert hub.repositories["user/student"].files()["unet/diffusion_pytorch_model.safetensors"] == weights_of(folder)


@pytest.mark.parametrize(
    "method, path, what, times, message",
    [
        ("POST", "/commit/", 500, 1, "500"),
        ("POST", "/commit/", "drop", 1, "did not go through"),
        ("POST", "/commit/", 429, 1, "429"),
        ("PUT", "storage", "drop", 99, "Error while uploading"),
        ("PUT", "storage", "corrupt", 1, "422"),
        ("POST", "repos/create", 403, 1, "Your token must have write access there"),
    ],
)
def test_a_failed_push_loses_nothing_and_says_how_to_go_on(hub, folder, method, path, what, times, message, capsys):
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != "README.md"}
    hub.fail(method, path, what, times)
    with pytest.raises(ConnectionError, match=message) as error:
        push_student(folder, "user/student", private=True)
    assert f"onestep push {folder} user/student --private" in str(error.value)
    assert all(repository.messages == ["initial commit"] for repository in hub.repositories.values())
    assert {file: file.read_bytes() for file in before} == before
    hub.faults.clear()
    command = re.search(r"onestep (push .*)", str(error.value)).group(1)
    main(command.split())
    assert "Pushed: " in capsys.readouterr().out and set(hub.repositories["user/student"].files()) >= STUDENT
    assert hub.repositories["user/student"].private


def test_no_hub_at_all(hub, folder):
    hub.server.shutdown()
    hub.server.server_close()
    with pytest.raises(ConnectionError, match=r"(?s)Nothing is lost.*onestep push"):
        push_student(folder, "user/student")


def test_no_token_other_peoples_names_and_public_repositories(hub, folder, monkeypatch):
    with pytest.raises(ConnectionError, match=r"write access"):
        push_student(folder, "somebody/student")
    push_student(folder, "student")
    with pytest.raises(ValueError, match=r"`private` must be False for 'user/student'"):
        push_student(folder, "student", private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ConnectionError, match=r"Log in with `hf auth login`"):
        push_student(folder, "other")
    push_student(folder, "other", token=TOKEN)
    assert "user/other" in hub.repositories


def test_only_the_main_process_pushes(hub, folder, monkeypatch):
    monkeypatch.setattr(PartialState, "is_main_process", False)
    assert push_student(folder, "student") is None and not hub.requests


def test_half_a_student_and_pickles_are_refused_before_the_hub_is_asked(hub, folder):
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"`folder` must hold safetensors weights alone"):
        push_student(folder, "student")
    shutil.rmtree(folder / "unet")
    with pytest.raises(ValueError, match=r"`folder` must hold a whole model or a scheduler, but .* lacks 'unet'"):
        push_student(folder, "student")
    assert not hub.requests


def test_a_folder_that_cannot_be_written_is_refused_before_the_hub_is_asked(hub, folder, monkeypatch):
    def refuse(dir):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("diffusers_onestep.files.TemporaryFile", refuse)
    with pytest.raises(PermissionError, match=r"`folder` must be one that can be written to.*Read-only"):
        push_student(folder, "user/student")
    arguments = TrainArguments(output_dir=str(folder), push_to_hub=True, hub_model_id="user/student")
    with pytest.raises(PermissionError, match="`folder` must be one that can be written to"):
        arguments.open_repository(folder)
    assert not hub.requests


def test_secrets_do_not_leave_the_machine(hub, folder, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "wandb-secret-value")
    (folder / "notes.md").write_text("Logged with wandb-secret-value.\n")
    push_student(folder, "student")
    everything = b"".join(hub.repositories["user/student"].files().values())
    assert b"Logged with REDACTED." in everything and b"wandb-secret-value" not in everything
    (folder / "metrics.json").write_text(json.dumps({"command": f"x --hub_token {TOKEN}", "results": []}))
    with pytest.raises(ValueError, match=r"`folder` must hold no secrets, but '.*metrics.json' has one"):
        push_student(folder, "student")
    (folder / "metrics.json").unlink()
    (folder / "NOTICE").write_text(f"From https://me:{TOKEN}@host/drawings\n")
    with pytest.raises(ValueError, match=r"`folder` must hold no secrets, but '.*NOTICE' has one"):
        push_student(folder, "student")


# the scripts


def test_training_pushes_when_it_is_done_and_stops_at_once_without_access(hub, teacher_folder, tmp_path, capsys):
    flags = {"push_to_hub": True, "hub_model_id": "user/trained", "hub_private_repo": True, "hub_token": TOKEN}
    folder = trained(teacher_folder, tmp_path / "out", **flags)
    repository = hub.repositories["user/trained"]
    assert repository.private and set(repository.files()) == STUDENT | {
        "README.md",
        "samples.png",
        "health.png",
        ".gitattributes",
    }
    assert "Pushed: " in capsys.readouterr().out
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert not [file for file in files if TOKEN.encode() in file.read_bytes()]
    assert json.loads((folder / "training_args.json").read_text())["hub_token"] is None
    with pytest.raises(ConnectionError, match=r"write access"):
        trained(teacher_folder, tmp_path / "other", push_to_hub=True, hub_model_id="somebody/trained")
    assert not (tmp_path / "other" / "checkpoints").exists()


def test_a_fitted_solver_is_pushed_and_its_card_runs(hub, teacher_folder, tmp_path, monkeypatch, capsys):
    fit = training_module("fit_d_ode")
    (tmp_path / "teacher").mkdir()
    teacher = shutil.copytree(teacher_folder, tmp_path / "teacher" / "there")
    args = fit.FitArguments(
        pretrained_teacher_model=str(teacher), output_dir=str(tmp_path / "solver"), solver="ddim",
        num_inference_steps=[4, 5], scale=5, num_samples=12, num_holdout_samples=12, push_to_hub=True,
    )  # fmt: skip
    fit.main(args)
    files = hub.repositories["user/solver"].files()
    assert set(files) == {"scheduler/scheduler_config.json", "README.md", ".gitattributes"}
    (code,) = python_blocks(files["README.md"].decode())
    assert 'DistilledDDIMScheduler.from_pretrained("user/solver", subfolder="scheduler")' in code
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert (tmp_path / "sample.png").is_file()


def test_a_converted_file_is_pushed_and_the_card_of_its_download_stays(hub, tmp_path, caplog):
    _, weights = network(SONG | {"augment_dim": 9})
    convert(write_pickle(tmp_path / "a.pkl", "EDMPrecond", DDPMPP, weights), tmp_path / "converted", kind="sid")
    push_student(tmp_path / "converted", "converted")
    files = hub.repositories["user/converted"].files()
    assert set(files) == STUDENT | {"README.md", ".gitattributes"}
    card = files["README.md"].decode()
    assert 'from_pretrained("user/converted")' in card and "Converted from `a.pkl` (sid)" in card
    download = Path(huggingface_hub.snapshot_download("user/converted", local_dir=tmp_path / "download"))
    assert np.array_equal(image_of(download), image_of("user/converted"))
    create_model_card(download)
    assert (download / "README.md").read_text() == card and "as a download has none" in caplog.text


@pytest.mark.parametrize("name", shipped_names())
def test_cards_of_shipped_models_are_valid_on_the_hub(hub, name):
    ModelCard.load(ROOT / "model_cards" / f"{name}.md").validate()
    assert ("POST", "/api/validate-yaml") in hub.requests


def test_a_text_to_image_student_is_pushed_and_draws_the_same(hub, tmp_path):
    student = shutil.copytree(ASSETS / "emoji-sd-onestep", tmp_path / "emoji")
    push_student(student, "emoji")
    images = [
        OneStepPipeline.from_pretrained(place)(
            "blue heart", generator=torch.Generator().manual_seed(0), output_type="np"
        ).images
        for place in ("user/emoji", student)
    ]
    assert np.array_equal(*images)
    card = hub.repositories["user/emoji"].files()["README.md"].decode()
    assert "pipeline_tag: text-to-image" in card and "NOTICE" in hub.repositories["user/emoji"].files()


def test_evaluation_puts_its_numbers_into_the_card_and_pushes(hub, folder, tmp_path):
    evaluation = training_module("evaluate")
    student = shutil.copytree(
        OneStepPipeline.from_pretrained("fashion32-onestep").config._name_or_path, tmp_path / "m"
    )
    args = evaluation.EvaluateArguments(model=[str(student)], num_samples=20, batch_size=20, push_to_hub=True)
    evaluation.main(args)
    files = hub.repositories["user/m"].files()
    measured = json.loads(files["metrics.json"])["results"][0]["value"]
    assert f"value: {round(measured, 4)}" in files["README.md"].decode() and "quality.png" in files
    with pytest.raises(ValueError, match=r"`output_dir` must be the student's folder to be pushed"):
        evaluation.main(dataclasses.replace(args, output_dir=str(tmp_path / "n")))


# loads


def test_repositories_that_are_missing_or_closed_are_named(hub, folder, monkeypatch):
    push_student(folder, "student")
    for load in (OneStepPipeline.from_pretrained, Teacher.from_pretrained):
        with pytest.raises(ValueError, match=r"'user/none' must be .* does not exist, or is private: .*hf auth login"):
            load("user/none")
        with pytest.raises(ValueError, match=r"`revision` must be a branch, tag or commit .* but is 'v9'"):
            load("user/student", revision="v9")
        with pytest.raises(ValueError, match=r"'a/b/c' must be a folder"):
            load("a/b/c")
    hub.repositories["user/student"].gated = True
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    with pytest.raises(ValueError, match=r"is gated: ask for access at https://huggingface.co/user/student"):
        OneStepPipeline.from_pretrained("user/student")
    hub.server.shutdown()
    hub.server.server_close()
    with pytest.raises(ConnectionError, match=r"not in the cache, and the Hub could not be reached"):
        OneStepPipeline.from_pretrained("user/student", local_files_only=True)


def test_a_dropped_download_goes_on_where_it_stopped(hub, folder):
    push_student(folder, "student")
    hub.fail("GET", "resolve.*safetensors", "drop")
    assert np.array_equal(image_of("user/student"), image_of(folder))
    assert sum("safetensors" in path and method == "GET" for method, path in hub.requests) == 2
    before = len(hub.requests)
    assert np.array_equal(image_of("user/student", local_files_only=True), image_of(folder))
    assert not [path for _, path in hub.requests[before:] if "resolve" in path]


@pytest.mark.parametrize(
    "method, path, what", [("HEAD", "index", 500), ("GET", "safetensors", 429), ("GET", "api/models", 500)]
)
def test_a_passing_failure_of_a_download_is_survived(hub, folder, method, path, what):
    push_student(folder, "student")
    hub.fail(method, path, what)
    assert np.array_equal(image_of("user/student"), image_of(folder))
    assert not any(fault.times for fault in hub.faults)


@pytest.mark.parametrize("path", ["resolve.*model_index", "resolve.*safetensors"])
def test_a_download_that_failed_says_how_to_go_on(hub, folder, path):
    push_student(folder, "student")
    for load in (OneStepPipeline.from_pretrained, Teacher.from_pretrained):
        hub.fail("GET", path, 500)
        with pytest.raises(ConnectionError, match=r"'user/student' was downloaded \(.*500 Internal.*\n?.*Try again"):
            load("user/student")
    assert np.array_equal(image_of("user/student"), image_of(folder))


def test_a_download_that_is_refused_is_not_to_be_tried_again(hub, folder):
    push_student(folder, "student")
    hub.fail("GET", "resolve.*safetensors", 451)
    with pytest.raises(ValueError, match=r"'user/student' could not be read: .*451"):
        OneStepPipeline.from_pretrained("user/student")


def test_a_student_that_has_arrived_in_part_is_not_called_a_pickle(hub, folder, monkeypatch):
    push_student(folder, "student")
    hub.fail("GET", "resolve.*safetensors", 500)
    with pytest.raises(ConnectionError, match="Try again"):
        OneStepPipeline.from_pretrained("user/student")
    with pytest.raises(ConnectionError, match=r"'user/student' is in the cache in part\. Try again when"):
        OneStepPipeline.from_pretrained("user/student", local_files_only=True)
    hub.repositories["user/student"].gated = True
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    with pytest.raises(ValueError, match="'user/student' is gated: ask for access"):
        OneStepPipeline.from_pretrained("user/student")


def test_a_licence_in_the_teachers_own_repository_is_linked_there(hub, tmp_path):
    card = "---\nlicense: other\nlicense_name: own-terms\nlicense_link: LICENSE.md\n---\n"
    (tmp_path / "README.md").write_text(card)
    hub.repositories["user/teacher"] = Repository()
    hub.repositories["user/teacher"].commit("main", {"README.md": card.encode()}, "theirs")
    terms = {"license": "other", "license_name": "own-terms"}
    assert license_of("user/teacher") == terms | {
        "license_link": "https://huggingface.co/user/teacher/blob/main/LICENSE.md"
    }
    assert license_of(str(tmp_path)) == terms  # nobody else has this folder


def test_a_damaged_file_is_not_called_a_pickle(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for load in (OneStepPipeline.from_pretrained, Teacher.from_pretrained):
        with pytest.raises(OSError, match=r"must have weights that can be read: a file is damaged or incomplete"):
            load(folder)


def test_pickles_and_code_of_a_repository_are_refused(hub, tmp_path):
    pipeline = ConsistencyModelPipeline(tiny_unet(), DDPMScheduler())
    pipeline.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    pipeline.save_pretrained(tmp_path / "coded")
    index = json.loads((tmp_path / "coded" / "model_index.json").read_text())
    index["scheduler"] = ["own_scheduler", "OwnScheduler"]
    (tmp_path / "coded" / "model_index.json").write_text(json.dumps(index))
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    (tmp_path / "coded" / "scheduler" / "own_scheduler.py").write_text(code)
    for name in ("pickled", "coded"):
        folder = tmp_path / name
        files = {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
        hub.repositories[f"user/{name}"] = Repository()
        hub.repositories[f"user/{name}"].commit("main", files, "theirs")
    for place in ("user/pickled", tmp_path / "pickled"):
        for load in (OneStepPipeline.from_pretrained, Teacher.from_pretrained):
            with pytest.raises(OSError, match=r"must have its weights as safetensors: others are pickles"):
                load(place)
    with pytest.raises(ValueError, match=r"`use_safetensors` must be True"):
        OneStepPipeline.from_pretrained("user/pickled", use_safetensors=False)
    for place in ("user/coded", tmp_path / "coded"):
        with pytest.raises(ValueError, match=r"trust_remote_code"):
            OneStepPipeline.from_pretrained(place)
    assert not (tmp_path / "ran").exists()
