"""What arrives in the trackers, read back from their own files."""

import json
import sqlite3
import struct
import sys
from types import SimpleNamespace

import pytest
import torch
from test_trainer import Scripted, arguments, batches_of

from diffusers_onestep import train
from diffusers_onestep.pictures import save_grid
from diffusers_onestep.run_folder import checkpoints
from diffusers_onestep.trackers import log_text

PICTURES = {"samples": 8, "health": 24}  # and their heights
TOKEN, SECRET = "hf_" + "a1B2" * 6, "the-value-of-a-secret-variable"


def from_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "logs" / "diffusers-onestep")).Reload()
    numbers = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    [texts] = [events.Tensors(tag) for tag in events.Tags()["tensors"] if tag.startswith("warning")]
    numbers["warning"] = {event.step: event.tensor_proto.string_val[0].decode() for event in texts}
    pictures = [(image.step, image.height) for name in PICTURES for image in events.Images(name)]
    (config, *_) = (folder / "logs").rglob("hparams.yml")
    return numbers, pictures, config.read_text()


def from_wandb(folder):
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # waits until the files are whole
    numbers, pictures, settings, runs = {}, [], "", set()
    for path in sorted((folder / "logs" / "wandb").glob("offline-run-*/*.wandb")):
        data, place, parts = path.read_bytes(), 7, b""
        while place + 7 <= len(data):  # LevelDB's log format: blocks of 32 KiB, records of one or more parts
            if (left := 32768 - place % 32768) < 7:
                place += left
                continue
            _, size, kind = struct.unpack("<IHB", data[place : place + 7])
            parts += data[place + 7 : (place := place + 7 + size)]
            if kind in (2, 3):
                continue
            record, parts = Record.FromString(parts), b""
            runs |= {record.run.run_id} - {""}
            settings += "".join(f"{item.key}: {item.value_json}\n" for item in record.config.update)
            values = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            for name, value in values.items():
                if name in [f"{picture}/height" for picture in PICTURES]:
                    pictures.append((values["_step"], value))
                elif isinstance(value, float | int | str):
                    numbers.setdefault(name, {})[values["_step"]] = value
    assert len(runs) == 1  # after the stop it goes on in the same one
    return numbers, pictures, settings


def from_trackio(folder):
    from trackio.utils import TRACKIO_DIR

    with sqlite3.connect(TRACKIO_DIR / "diffusers-onestep.db") as database:
        name = f"{folder.name}-{(folder / 'logs' / 'run_id').read_text()}"
        rows = database.execute("select step, metrics from metrics where run_name = ? order by id", [name]).fetchall()
        [[config]] = database.execute("select config from configs where run_name = ?", [name]).fetchall()
    numbers, pictures = {}, []
    for step, metrics in rows:
        for key, value in json.loads(metrics).items():
            if isinstance(value, dict):
                assert (TRACKIO_DIR / "media" / value["file_path"]).is_file()
                pictures.append((step, PICTURES[key]))
            else:
                numbers.setdefault(key, {})[step] = value
    return numbers, pictures, config.decode()


@pytest.mark.parametrize("read", [from_tensorboard, from_wandb, from_trackio])
def test_numbers_pictures_and_settings_arrive_and_no_secret(read, tmp_path, monkeypatch):
    """Of a run that stops after step 3 and goes on from its checkpoint of step 2."""
    name = read.__name__.removeprefix("from_")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB__SERVICE_WAIT", "300")  # seconds that its other process may take to start
    for kind in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{kind}_DIR", str(tmp_path / "wandb"))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("SOME_API_KEY", SECRET)
    monkeypatch.setattr(sys, "argv", ["train.py", "--hub_token", TOKEN, "--caption_column", "text"])
    tiny = torch.zeros(3, 1, 4, 4, dtype=torch.uint8)  # the real one takes its time
    monkeypatch.setattr("diffusers_onestep.trainer.draw_health", lambda log, output: save_grid(tiny, output, 1))
    pytest.importorskip(name)

    diversities = iter([0.9, 0.3, 0.3])  # after step 2, after step 3, and after step 4 of the run that goes on

    def validate(folder):
        save_grid(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), folder / "samples.png", 2)
        return {"distance": 7.0, "diversity": next(diversities)}

    folder = tmp_path / "out"
    settings = {"checkpointing_steps": 2, "report_to": name, "validation_steps": 2, "hub_token": TOKEN}
    train(Scripted(), batches_of(), arguments(folder, max_train_steps=3, **settings), validate=validate)
    settings |= {"resume_from_checkpoint": str(checkpoints(folder)[0]), "validation_reference": SECRET}
    train(Scripted(), batches_of(), arguments(folder, max_train_steps=4, **settings), validate=validate)
    assert sys.argv[2] == TOKEN

    numbers, pictures, config = read(folder)
    assert sorted(numbers["loss/student"]) == [1, 2, 3, 4]
    logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    expected = {line["step"]: line["loss/student"] for line in logged if "loss/student" in line}
    assert numbers["loss/student"] == pytest.approx(expected)
    assert set(numbers["distance"]) >= {2, 4} and set(pictures) >= {(2, 8), (4, 8), (2, 24), (4, 24)}
    assert "it is collapsing" in numbers["warning"][4]
    assert "train_batch_size" in config and "64" in config
    for path in tmp_path.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert TOKEN.encode() not in content and SECRET.encode() not in content, path


def test_a_text_is_shown_only_where_one_is_taken():
    class Tracker:
        def __init__(self, name):
            self.name, self.texts = name, []

        def log(self, values, step):
            self.texts.append((values, step))

    wandb, aim = Tracker("wandb"), Tracker("aim")  # aim ends a run that logs a text
    log_text(SimpleNamespace(trackers=[wandb, aim]), "warning", "it is collapsing", 4)
    assert wandb.texts == [({"warning": "it is collapsing"}, 4)] and not aim.texts
