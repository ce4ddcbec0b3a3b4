"""Weights of other formats read bit by bit, and the sets and models that are generated."""

import json
import struct

import numpy as np
import pytest
import torch

from peft_fast.recipes.examples import media, media_models


def message(*fields):
    """Protocol buffer: (number, int or bytes) each."""

    def number(value):
        parts = bytearray()
        while value > 127:
            parts.append(value & 127 | 128)
            value >>= 7
        return bytes([*parts, value])

    made = b""
    for key, value in fields:
        if isinstance(value, int):
            made += number(key << 3) + number(value)
        else:
            made += number(key << 3 | 2) + number(len(value)) + value
    return made


def tensor(name, values):
    shape = [(1, size) for size in values.shape]
    return message(*shape, (2, 1), (8, name.encode()), (9, values.astype("<f4").tobytes()))


def test_onnx_weights_get_the_names_of_their_modules_back():
    plain, product = np.arange(3.0), np.arange(600.0).reshape(200, 3)
    node = message((1, b"hidden"), (1, b"onnx::MatMul_7"), (3, b"/body/layer.0/fc/MatMul"), (4, b"MatMul"))
    graph = message((1, node), (5, tensor("body.norm.bias", plain)), (5, tensor("onnx::MatMul_7", product)))
    found = media_models.onnx_weights(message((1, 8), (2, b"an exporter"), (7, graph)))
    assert set(found) == {"body.norm.bias", "body.layer.0.fc.weight"}
    assert torch.equal(found["body.norm.bias"], torch.arange(3.0))
    assert torch.equal(found["body.layer.0.fc.weight"], torch.tensor(product.T, dtype=torch.float32))


def test_ctranslate2_weights_are_taken_apart_into_those_of_whisper():
    def text(name):
        return struct.pack("<H", len(name) + 1) + name.encode() + b"\0"

    def entry(name, values):
        shape = struct.pack(f"<B{values.ndim}I", values.ndim, *values.shape)
        return text(name) + shape + struct.pack("<BI", 4, values.nbytes) + values.tobytes()

    draw = np.random.default_rng(0)
    joined, bias, shift = (draw.normal(size=size).astype("<f2") for size in ((12, 4), (12,), (4,)))
    blob = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, 4)
    blob += text("encoder/num_heads") + struct.pack("<BBIh", 0, 2, 2, 6)
    blob += entry("encoder/layer_0/self_attention/linear_0/weight", joined)
    blob += entry("encoder/layer_0/self_attention/linear_0/bias", bias)
    blob += entry("decoder/layer_1/attention/layer_norm/gamma", shift)
    found = media_models._whisper_names(media_models.ctranslate2_weights(blob))
    layer = "model.encoder.layers.0.self_attn"
    assert set(found) == {
        *(f"{layer}.{part}_proj.weight" for part in "qkv"),
        *(f"{layer}.{part}_proj.bias" for part in "qv"),  # Whisper's keys have no bias
        "model.decoder.layers.1.encoder_attn_layer_norm.weight",
    }
    assert torch.equal(found[f"{layer}.v_proj.weight"], torch.from_numpy(joined[8:]))
    assert torch.equal(found[f"{layer}.v_proj.bias"], torch.from_numpy(bias[8:]))


def test_shapes_lie_in_their_pictures_apart_from_each_other_and_are_always_the_same(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        media._shapes(tmp_path / name, None)
    texts = [(tmp_path / name / "test" / "annotations.json").read_text() for name in "ab"]
    assert texts[0] == texts[1]
    found = json.loads(texts[0])
    by_image = {}
    for entry in found["annotations"]:
        by_image.setdefault(entry["image_id"], []).append(entry["bbox"])
    assert len(by_image) == len(found["images"]) == 80
    for boxes in by_image.values():
        taken = np.zeros((media.SIDE, media.SIDE), int)
        for x, y, w, h in boxes:
            assert 0 <= x and 0 <= y and x + w <= media.SIDE and y + h <= media.SIDE
            taken[y : y + h, x : x + w] += 1
        assert taken.max() == 1


TINY = [name for name in media_models.ENTRIES if name.startswith("tiny-")]


@pytest.mark.parametrize("name", TINY)
def test_random_models_load_and_are_always_the_same(name, tmp_path):
    import transformers

    states = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        before = torch.get_rng_state()
        media_models.ENTRIES[name].make(folder, None)
        assert torch.equal(before, torch.get_rng_state())
        cls = getattr(transformers, transformers.AutoConfig.from_pretrained(folder).architectures[0])
        states.append(cls.from_pretrained(folder).state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
