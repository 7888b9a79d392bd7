"""Build the data of the shipped teachers from packages: Fashion-MNIST and captioned emoji at 32x32 pixels.

    python training/fetch_data.py .

writes `fashion32.npz` (60,000 + 10,000 images, MIT, © 2017 Zalando SE; from the Debian package
`dataset-fashion-mnist`, by `apt-get` and `dpkg-deb`) and `emoji32.npz` (7,519 pictures: Twemoji, CC BY 4.0, and Noto
Emoji, Apache-2.0; from two npm packages, by `npm`), whose attributions are in
`diffusers_onestep/assets/emoji-sd/NOTICE`. Nothing is installed. The pixels are compared with fixed digests, so that
a source that changed is noticed. `--only emoji` builds one of them.
"""

import argparse
import gzip
import hashlib
import io
import json
import re
import shutil
import struct
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffusers_onestep.files import written_beside

SIZE = 32
FASHION_PACKAGE = "dataset-fashion-mnist"
FASHION_FOLDER = "usr/share/datasets/fashion-mnist"
FASHION_FILES = {
    "images_train": "train-images-idx3-ubyte.gz",
    "labels_train": "train-labels-idx1-ubyte.gz",
    "images_test": "t10k-images-idx3-ubyte.gz",
    "labels_test": "t10k-labels-idx1-ubyte.gz",
}
FASHION_CLASSES = ["t-shirt", "trouser", "pullover", "dress", "coat"]
FASHION_CLASSES += ["sandal", "shirt", "sneaker", "bag", "ankle boot"]
EMOJI_VERSION = "16.0.0"
# set -> npm package and its folder; those of other vendors may not be redistributed
EMOJI_PACKAGES = {"noto": ("emoji-datasource-google", "google"), "twemoji": ("emoji-datasource-twitter", "twitter")}
TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
TONE_NAMES = ["none", *TONES.values(), "mixed"]
MIXED = len(TONE_NAMES) - 1
JOINERS = {"200D", "FE0F", "2640", "2642"}
PEOPLE = {"1F468", "1F469", "1F9D1", "1F466", "1F467", "1F9D2", "1F474", "1F475", "1F9D3"}
HANDSHAKE = "1F91D"
DIGESTS = {  # SHA-256 of the arrays' bytes
    "fashion": {
        "images_train": "f21823848e3746519cfba6963d2cdca7d14fb77efc488374f5e245a186d0b3c7",
        "labels_train": "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
        "images_test": "2364637858a173aa0e745190f014fc8725b7e094c85554c0da5de720bfb02d3d",
        "labels_test": "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
    },
    "emoji": {"images": "8741edb37fb0f8ca1e30905882906b00cc84cd004fde54632fea3d65069f40a0"},
}


def run(command: list[str], folder: Path) -> None:
    """Run another program, with an error that tells what it said."""
    if shutil.which(command[0]) is None:
        raise OSError(f"{command[0]!r} is needed to fetch the data, and is not on this machine.")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-8:])
        raise OSError(f"`{' '.join(command)}` failed with status {done.returncode}:\n{said}")


def read_idx(path: Path) -> np.ndarray:
    """An array of unsigned bytes in MNIST's format."""
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path.name} must be an IDX file of unsigned bytes, but begins with {raw[:4]!r}.")
    start = 4 + 4 * raw[3]
    return np.frombuffer(raw, np.uint8, offset=start).reshape(struct.unpack(f">{raw[3]}I", raw[4:start]))


def build_fashion(cache: Path) -> dict[str, np.ndarray]:
    """Fashion-MNIST, zero padded to 32x32."""
    run(["apt-get", "download", FASHION_PACKAGE], cache)
    run(["dpkg-deb", "-x", str(next(cache.glob(f"{FASHION_PACKAGE}_*.deb"))), "unpacked"], cache)
    arrays = {key: read_idx(cache / "unpacked" / FASHION_FOLDER / name) for key, name in FASHION_FILES.items()}
    for split in ("train", "test"):
        arrays[f"images_{split}"] = np.pad(arrays[f"images_{split}"], ((0, 0), (2, 2), (2, 2)))
    return arrays | {"class_names": np.array(FASHION_CLASSES)}


def build_emoji(cache: Path) -> dict[str, np.ndarray]:
    """Emoji of two sets with captions, on white, without exact copies, split by concept."""
    rows: list[dict[str, Any]] = []
    seen: set[bytes] = set()
    for vendor, (package, folder) in enumerate(EMOJI_PACKAGES.values()):
        run(["npm", "pack", "--loglevel=error", f"{package}@{EMOJI_VERSION}"], cache)
        pictures, entries = read_package(cache / f"{package}-{EMOJI_VERSION}.tgz", f"package/img/{folder}/64/")
        for entry in sorted(entries, key=lambda e: (e["sort_order"], e["unified"])):
            for tones, form in [("", entry), *sorted((entry.get("skin_variations") or {}).items())]:
                if form["image"] not in pictures or not form.get(f"has_img_{folder}", False):
                    continue
                pixels = halved(on_white(Image.open(io.BytesIO(pictures[form["image"]]))))
                blank = int(pixels.max()) - int(pixels.min()) < 8
                if blank or pixels.tobytes() in seen:  # such as territories with another country's flag
                    continue
                seen.add(pixels.tobytes())
                rows.append(
                    described(entry, tones) | {"images": pixels, "codepoints": form["unified"], "vendor": vendor}
                )
    arrays = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    for key, kind in (("category", np.uint8), ("subcategory", np.uint8), ("group", np.int32)):
        names = list(dict.fromkeys(arrays[key].tolist()))  # numbered as they come
        arrays[key] = np.array([names.index(name) for name in arrays[key].tolist()], kind)
        if key != "group":
            arrays[f"{key}_names"] = np.array(names)
    for key in ("vendor", "skin_tone", "split"):
        arrays[key] = arrays[key].astype(np.uint8)
    names = {"vendor": list(EMOJI_PACKAGES), "skin_tone": TONE_NAMES, "split": ["train", "validation", "test"]}
    return arrays | {f"{key}_names": np.array(values) for key, values in names.items()}


def read_package(path: Path, folder: str) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """The pictures of a folder by name, and the entries of `emoji.json`."""
    pictures, entries = {}, []
    with tarfile.open(path, "r|gz") as archive:
        for member in archive:
            if member.isfile() and member.name.startswith(folder):
                pictures[member.name.removeprefix(folder)] = archive.extractfile(member).read()
            elif member.name == "package/emoji.json":
                entries = json.load(archive.extractfile(member))
    return pictures, entries


def on_white(picture: Image.Image) -> np.ndarray:
    """Pixels `(H, W, 3)` composited on white."""
    pixels = np.asarray(picture.convert("RGBA")).astype(np.uint32)
    alpha = pixels[..., 3:]
    return ((pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def halved(pixels: np.ndarray) -> np.ndarray:
    """64x64 pixels box filtered to 32x32, in whole numbers."""
    if pixels.shape != (2 * SIZE, 2 * SIZE, 3):
        raise ValueError(f"Pictures must be of {2 * SIZE} x {2 * SIZE} pixels, but one is of {pixels.shape}.")
    sums = pixels.astype(np.uint32).reshape(SIZE, 2, SIZE, 2, 3).sum((1, 3))
    return ((sums + 2) // 4).astype(np.uint8)


def described(entry: dict[str, Any], tones: str) -> dict[str, Any]:
    """What is said of an emoji in its form with these skin tones."""
    distinct = {TONES[tone] for tone in tones.split("-") if tone}
    tone = 0 if not distinct else TONE_NAMES.index(min(distinct)) if len(distinct) == 1 else MIXED
    words = "" if not tone else ", mixed skin tones" if tone == MIXED else f", {TONE_NAMES[tone]} skin tone"
    concept = concept_of(entry["unified"])
    return {
        "captions": caption_of(entry) + words,
        "names": entry["name"],
        "short_names": " ".join(entry["short_names"]),
        "category": entry["category"],
        "subcategory": f"{entry['category']} / {entry['subcategory']}",
        "skin_tone": tone,
        "group": concept,
        "split": split_of(concept),
    }


def concept_of(unified: str) -> str:
    """One key for all skin tones, genders and sets of an emoji, so that near-copies of a training picture are not
    held out."""
    points = [point for point in unified.split("-") if point not in JOINERS and point not in TONES]
    rest = [point for point in points if point not in PEOPLE]
    if not rest:
        return "people-" + ("alone" if len(points) == 1 else "family")
    return "holding-hands" if HANDSHAKE in rest else "-".join(rest)


def caption_of(entry: dict[str, Any]) -> str:
    """The name in plain words, and the short name where it says something new."""
    flag = re.fullmatch(r"(.*) Flag", entry["name"])
    if flag and entry["category"] == "Flags":
        return f"flag of {flag.group(1)}"
    text = entry["name"].lower().replace(": ", " ").replace(":", " ").replace(",", "").replace("_", " ")
    short = re.sub(r"[^a-z0-9 ]", "", entry["short_name"].replace("_", " ").replace("-", " ")).strip()
    short = re.sub(r"(?<=[a-z])\d+$", "", short)  # "train2" is only a second "train"
    new = short.replace(" ", "") not in text.replace(" ", "").replace("-", "")
    if len(short) > 2 and new and not set(short.split()) <= set(re.findall(r"[a-z0-9]+", text)):
        text = f"{text}, {short}"
    return re.sub(r"\s+", " ", text).strip()


def split_of(concept: str) -> int:
    """0 train, 1 validation, 2 test: 80, 10 and 10 % of the concepts."""
    return {0: 2, 1: 1}.get(hashlib.sha256(f"emoji:{concept}".encode()).digest()[0] % 10, 0)


BUILDERS: dict[str, Callable[[Path], dict[str, np.ndarray]]] = {"fashion": build_fashion, "emoji": build_emoji}


def main(out: str, only: str | None) -> None:
    Path(out).mkdir(parents=True, exist_ok=True)
    for name in [only] if only else BUILDERS:
        with tempfile.TemporaryDirectory() as cache:
            arrays = BUILDERS[name](Path(cache))
        for key, expected in DIGESTS[name].items():
            if (found := hashlib.sha256(np.ascontiguousarray(arrays[key]).tobytes()).hexdigest()) != expected:
                raise ValueError(
                    f"`{key}` of {name} must have the digest {expected}, but has {found}: its source changed."
                )
        path = Path(out) / f"{name}{SIZE}.npz"
        with written_beside(path) as beside, open(beside, "wb") as file:
            np.savez_compressed(file, **arrays)
        print(f"{path}: {', '.join(f'{key} {array.shape}' for key, array in arrays.items())}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", help="Folder to write to.")
    parser.add_argument("--only", choices=sorted(BUILDERS), help="Build this one; default: both.")
    main(**vars(parser.parse_args()))
