"""Images, speech and time series to learn from: pinned packages made into ordinary files, and one generated set."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import struct
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from peft_fast.recipes import fetch
from peft_fast.recipes.examples import Example, media_models

Fetch = Callable[[fetch.Package], Path]
SPLITS = ("train", "validation", "test")

DATASETS = "usr/share/datasets/fashion-mnist"
FASHION = fetch.Package(
    title="Fashion-MNIST (31 MB)",
    requirement="dataset-fashion-mnist",
    archive="dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
    sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    option="--data",
    folder="fashion-mnist-idx",
    files={
        "train-images.gz": (
            f"{DATASETS}/train-images-idx3-ubyte.gz",
            "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
        ),
        "train-labels.gz": (
            f"{DATASETS}/train-labels-idx1-ubyte.gz",
            "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
        ),
        "test-images.gz": (
            f"{DATASETS}/t10k-images-idx3-ubyte.gz",
            "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
        ),
        "test-labels.gz": (
            f"{DATASETS}/t10k-labels-idx1-ubyte.gz",
            "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
        ),
    },
    reader=fetch.debian,
)
GARMENTS = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
SOUNDS = fetch.Package(
    title="Asterisk's spoken prompts (18 MB)",
    requirement="asterisk-core-sounds-en-wav",
    archive="asterisk-core-sounds-en-wav_1.6.1-1_all.deb",
    sha256="2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d",
    option="--data",
    folder="asterisk-sounds",
    files={
        "sounds.tar": (
            "usr/share/asterisk/sounds/en_US_f_Allison/",
            "0305e06301b3c068a13a43f13ca6ffe8ca0bb09b349078877133da1cd3e46cbf",
        )
    },
    reader=fetch.debian,
)
WORDS = fetch.Package(
    title="the texts of Asterisk's prompts",
    requirement="asterisk-core-sounds-en",
    archive="asterisk-core-sounds-en_1.6.1-1_all.deb",
    sha256="973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50",
    option="--data",
    folder="asterisk-texts",
    files={
        "texts.gz": (
            "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz",
            "436538195b7c7361bd227036686f1a4039f694648c76573bdaca956655d34450",
        )
    },
    reader=fetch.debian,
)
VEGA = fetch.Package(
    title="daily weather of Seattle (0.2 MB)",
    requirement="vega-datasets==0.9.0",
    archive="vega_datasets-0.9.0-py3-none-any.whl",
    sha256="3d7c63917be6ca9b154b565f4779a31fedce57b01b5b9d99d8a34a7608062a1d",
    option="--data",
    folder="vega-weather",
    files={
        "weather.csv": (
            "vega_datasets/_data/seattle-weather.csv",
            "62f0609f787158128aa2bd102967173a4953122dd4f872bf1d502cae1037df0b",
        )
    },
    reader=fetch.zipped,
)


def _fashion(folder: Path, fetched: Fetch) -> None:
    """The 60,000 and 10,000 images of the original splits, as parquet files with PNG images and class names."""
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as Picture

    source = fetched(FASHION)

    def read(name: str, dimensions: int) -> np.ndarray:
        raw = gzip.decompress((source / name).read_bytes())
        shape = struct.unpack(f">{dimensions}I", raw[4 : 4 + 4 * dimensions])
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape)

    def rows(split: str) -> Iterator[dict]:
        images, labels = read(f"{split}-images.gz", 3), read(f"{split}-labels.gz", 1)
        for image, label in zip(images, labels, strict=True):
            file = io.BytesIO()
            Picture.fromarray(image).save(file, "PNG", compress_level=1)
            yield {"image": {"bytes": file.getvalue(), "path": None}, "label": int(label)}

    features = Features({"image": Image(), "label": ClassLabel(names=GARMENTS)})
    for split in ("train", "test"):
        Dataset.from_list(list(rows(split)), features=features).to_parquet(folder / f"{split}.parquet")


def _prompts(fetched: Fetch) -> list[tuple[str, str, bytes]]:
    """(name, text, WAV) of all prompts of speech; tones and silence have no text, or one in brackets."""
    texts = gzip.decompress((fetched(WORDS) / "texts.gz").read_bytes()).decode("utf-8", "replace")
    spoken = dict(line.split(": ", 1) for line in texts.splitlines() if ": " in line and not line.startswith(";"))
    found = []
    with tarfile.open(fetched(SOUNDS) / "sounds.tar") as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            name = member.name.removesuffix(".wav")
            text = spoken.get(name, "").strip()
            if text and not re.search(r"[\[\]<>]", text):
                found.append((name, text, archive.extractfile(member).read()))
    return found


def _sixth(name: str) -> str:
    """The split of a recording: four sixths train, by a checksum of its name."""
    import zlib

    return {0: "test", 1: "validation"}.get(zlib.crc32(name.encode()) % 6, "train")


def _sounds(folder: Path, rows: dict[str, list[tuple[str, str, bytes]]], role: str) -> None:
    for split in SPLITS:
        (folder / split).mkdir()
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            write = csv.writer(file, lineterminator="\n").writerow
            write(("audio", role))
            for name, truth, blob in rows[split]:
                path = f"{split}/{name.replace('/', '-')}.wav"
                (folder / path).write_bytes(blob)
                write((path, truth))


def _speech(folder: Path, fetched: Fetch) -> None:
    rows: dict[str, list[tuple[str, str, bytes]]] = {split: [] for split in SPLITS}
    split_of: dict[str, str] = {}  # a sentence that is spoken twice stays in one split
    for name, text, blob in _prompts(fetched):
        rows[split_of.setdefault(text.lower(), _sixth(name))].append((name, text, blob))
    _sounds(folder, rows, "text")


def _kinds(folder: Path, fetched: Fetch) -> None:
    """Single recordings by what they are: a letter, its code word, a number, or a phrase."""
    rows: dict[str, list[tuple[str, str, bytes]]] = {split: [] for split in SPLITS}
    for name, text, blob in _prompts(fetched):
        kind = None
        if re.fullmatch(r"letters/([a-z]|zed)", name):
            kind = "letter"
        elif name.startswith("phonetic/"):
            kind = "code word"
        elif re.fullmatch(r"digits/(h-)?(\d+|hundred|thousand|million|billion)", name):
            kind = "number"
        elif "/" not in name and 2 <= len(text.split()) <= 5:
            kind = "phrase"
        if kind:
            rows[_sixth(name)].append((name, kind, blob))
    _sounds(folder, rows, "label")


SHAPES = {"circle": (214, 69, 65), "square": (38, 132, 90), "triangle": (58, 99, 196)}
SIDE = 96


def _shapes(folder: Path, fetched: Fetch) -> None:
    """Pictures of one to three shapes that do not overlap, each kind in shades of its own colour; boxes as COCO has."""
    from PIL import Image, ImageDraw

    draw = np.random.default_rng(0)
    for split, count in zip(SPLITS, (600, 80, 80), strict=True):
        (folder / split).mkdir()
        images, found = [], []
        for number in range(count):
            ground = tuple(int(value) for value in draw.integers(200, 256, 3))
            picture = Image.new("RGB", (SIDE, SIDE), ground)
            boxes: list[tuple[int, int, int, int]] = []
            for _ in range(draw.integers(1, 4)):
                size = int(draw.integers(20, 41))
                x, y = (int(value) for value in draw.integers(0, SIDE - size, 2))
                if any(x < a + c and a < x + size and y < b + d and b < y + size for a, b, c, d in boxes):
                    continue
                boxes.append((x, y, size, size))
                kind = int(draw.integers(0, 3))
                colour = tuple(int(v) for v in np.clip(list(SHAPES.values())[kind] + draw.integers(-30, 31, 3), 0, 255))
                paint, right, low = ImageDraw.Draw(picture), x + size - 1, y + size - 1
                if kind == 0:
                    paint.ellipse((x, y, right, low), fill=colour)
                elif kind == 1:
                    paint.rectangle((x, y, right, low), fill=colour)
                else:
                    paint.polygon([(x, low), (right, low), (x + size // 2, y)], fill=colour)
                about = {"id": len(found) + 1, "image_id": number + 1, "category_id": kind + 1, "iscrowd": 0}
                found.append({**about, "bbox": [x, y, size, size], "area": size * size})
            name = f"{number:04}.png"
            picture.save(folder / split / name, compress_level=1)
            images.append({"id": number + 1, "file_name": name, "width": SIDE, "height": SIDE})
        kinds = [{"id": place + 1, "name": name} for place, name in enumerate(SHAPES)]
        content = {"images": images, "annotations": found, "categories": kinds}
        (folder / split / "annotations.json").write_text(json.dumps(content))


def _weather(folder: Path, fetched: Fetch) -> None:
    """One day a row; 2012 to 2014 to learn from, 2015 to test."""
    head = ("date", "temp_max", "temp_min", "wind", "precipitation")
    with (fetched(VEGA) / "weather.csv").open(newline="") as file:
        days = [[row[name].replace("/", "-") for name in head] for row in csv.DictReader(file)]
    for split, rows in (("train", [d for d in days if d[0] < "2015"]), ("test", [d for d in days if d[0] >= "2015"])):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([head, *rows])


CSV = {split: f"{split}.csv" for split in SPLITS}
ENTRIES = {
    "fashion-mnist": Example(
        what="70,000 grey 28-pixel images of garments in 10 classes",
        make=_fashion,
        tasks=("image-classification",),
        splits={"train": "train.parquet", "test": "test.parquet"},
    ),
    "shapes": Example(
        what="760 generated images of coloured shapes, with boxes",
        make=_shapes,
        tasks=("object-detection",),
        splits={split: split for split in SPLITS},
    ),
    "prompts": Example(
        what="530 spoken telephone prompts with their texts, one speaker (CC BY-SA 3.0)",
        make=_speech,
        tasks=("speech-recognition",),
        splits=CSV,
    ),
    "spoken-kinds": Example(
        what="spoken letters, code words, numbers and phrases of the same speaker (CC BY-SA 3.0)",
        make=_kinds,
        tasks=("audio-classification",),
        splits=CSV,
    ),
    "weather": Example(
        what="four years of daily weather in Seattle: highest and lowest temperature, wind, rain",
        make=_weather,
        tasks=("time-series",),
        splits={"train": "train.csv", "test": "test.csv"},
        columns={"value": "temp_max, temp_min, wind"},
    ),
} | media_models.ENTRIES
