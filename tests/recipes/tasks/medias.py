"""Pictures, sounds and series that tiny models learn in seconds, as files; and what their tests do with them."""

import csv
import json

import numpy as np
import torch

RATE = 16000
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 220)}
NOTES = {"low": 300.0, "middle": 900.0, "high": 2500.0}


def options(task, model, data, folder, **more):
    """Of a run of seconds that trains everything, judged before and at its end."""
    given = dict(task=task, model=str(model), data=data, out=str(folder), method="full", dtype="fp32", device="cpu")
    given |= dict(learning_rate=3e-3, batch_size=16, evaluate_every=10_000, overwrite=True, schedule="cosine")
    return given | more


def trained(*args, **more):
    """The Run of ``options``."""
    from peft_fast.recipes import run

    return run.train(options(*args, **more), say=lambda text: None)


def stopped(*args, **more):
    """What a run says that does not begin."""
    import pytest

    from peft_fast.errors import PeftFastError

    with pytest.raises(PeftFastError) as error:
        trained(*args, **more)
    return str(error.value)


def saved(folder, model, *processors, spread=()):
    """A model of random weights, always the same, as a folder; ``spread``: parameters that would begin as zeros."""
    cls, config = model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = cls(config)
        for name in spread:
            torch.nn.init.normal_(made.get_parameter(name), std=2.0)
        made.save_pretrained(folder)
    for processor in processors:
        processor.save_pretrained(folder)
    return folder


def table(path, rows):
    """A CSV of dicts."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def pictures(folder, counts, side=16):
    """{split: csv}: a picture is of its class's colour, with noise."""
    from PIL import Image

    draw, found = np.random.default_rng(0), {}
    for split, count in counts.items():
        rows = []
        for number in range(count):
            name = list(COLOURS)[number % len(COLOURS)]
            pixels = np.clip(COLOURS[name] + draw.normal(0, 40, (side, side, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{split}-{number}.png")
            rows.append({"image": f"{split}-{number}.png", "label": name})
        found[split] = table(folder / f"{split}.csv", rows)
    return found


def scenes(folder, counts, side=32):
    """{split: folder}: one square in a corner's quarter, its class its colour; boxes as COCO has them."""
    from PIL import Image

    draw, found = np.random.default_rng(1), {}
    kinds = list(COLOURS)[:2]
    for split, count in counts.items():
        (folder / split).mkdir()
        images, boxes = [], []
        for number in range(count):
            kind, size = number % 2, 14
            x, y = (int(v) * (side // 2) + 1 for v in draw.integers(0, 2, 2))
            pixels = np.full((side, side, 3), 230, np.uint8)
            pixels[0, 0] = draw.integers(0, 256, 3)  # no two pictures alike
            pixels[y : y + size, x : x + size] = COLOURS[kinds[kind]]
            Image.fromarray(pixels).save(folder / split / f"{number}.png")
            images.append({"id": number, "file_name": f"{number}.png", "width": side, "height": side})
            boxes.append({"id": number, "image_id": number, "category_id": kind, "bbox": [x, y, size, size],
                          "area": size * size, "iscrowd": 0})  # fmt: skip
        names = [{"id": place, "name": name} for place, name in enumerate(kinds)]
        content = {"images": images, "annotations": boxes, "categories": names}
        (folder / split / "annotations.json").write_text(json.dumps(content))
        found[split] = str(folder / split)
    return found


def tone(pitch, seconds, draw, rate=RATE):
    """A sine with a little noise."""
    times = np.arange(int(seconds * rate)) / rate
    sound = 0.4 * np.sin(2 * np.pi * pitch * times + draw.uniform(0, 6)) + draw.normal(0, 0.01, len(times))
    return sound.astype(np.float32)


def sounds(folder, counts, role, make):
    """{split: csv}: ``make(number, draw)`` gives a sound and its truth."""
    import soundfile

    draw, found = np.random.default_rng(2), {}
    for split, count in counts.items():
        rows = []
        for number in range(count):
            sound, truth = make(number, draw)
            soundfile.write(folder / f"{split}-{number}.wav", sound, RATE)
            rows.append({"audio": f"{split}-{number}.wav", role: truth})
        found[split] = table(folder / f"{split}.csv", rows)
    return found


def wav2vec(folder, spread=0.02):
    """A wav2vec 2.0 of two narrow layers, 50 frames a second, without a tokenizer."""
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

    config = Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, conv_dim=(16,) * 3,
        conv_stride=(8, 8, 5), conv_kernel=(16, 8, 5), feat_extract_norm="layer", num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2, classifier_proj_size=32, mask_time_prob=0.0, hidden_dropout=0.0,
        attention_dropout=0.0, feat_proj_dropout=0.0, activation_dropout=0.0, final_dropout=0.0, layerdrop=0.0,
        initializer_range=spread,
    )  # fmt: skip
    return saved(folder, (Wav2Vec2Model, config), Wav2Vec2FeatureExtractor(return_attention_mask=True))


def made(task, model, splits=None, facts=None, **more):
    """A task with its processor, and the splits that it learnt from."""
    from peft_fast.recipes import config, data, tasks

    given = config.read(options(task, model, splits or "rows", "unused", **more))
    one = tasks.get(task)(given, facts)
    found = data.read(given, one) if splits else None
    if found:
        one.learn(found)
    one.load_processor()
    return one, found
