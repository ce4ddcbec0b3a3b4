"""Sound: pitches learnt, other rates and lengths read, silence of the padding not counted."""

import numpy as np
import pytest
import torch

from tests.recipes.tasks import medias

NAME = "audio-classification"


def note(number, draw):
    name = list(medias.NOTES)[number % 3]
    return medias.tone(medias.NOTES[name], draw.uniform(0.3, 0.6), draw), name


@pytest.fixture(scope="module")
def wav2vec(tmp_path_factory):
    return medias.wav2vec(tmp_path_factory.mktemp("wav2vec"))


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
    return medias.sounds(tmp_path_factory.mktemp("notes"), {"train": 48, "validation": 21}, "label", note)


def test_it_learns_pitches_and_answers_files(wav2vec, notes, tmp_path):
    run = medias.trained(NAME, wav2vec, notes, tmp_path / "run", steps=40, learning_rate=1e-2)
    before, after = run.result["evaluations"][0], run.result["final"]["validation"]
    assert before["accuracy"] < 0.7 and after["accuracy"] > 0.9
    assert run.result["throughput"]["unit"] == "seconds"
    heard = 40 * 16 * 0.45
    assert 0.7 * heard < run.result["throughput"]["units"] < 1.3 * heard

    from peft_fast.recipes import use

    path = notes["validation"].removesuffix("validation.csv") + "validation-2.wav"
    (answer,) = use.predict(tmp_path / "run", [path])
    assert answer["label"] == "high"


def test_whisper_s_encoder_is_taken_and_its_padding_is_not_counted(tmp_path, notes):
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    config = WhisperConfig(
        d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=16, max_source_positions=50, vocab_size=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    extractor = WhisperFeatureExtractor(feature_size=16, chunk_length=1)
    model = medias.saved(tmp_path / "whisper", (WhisperForConditionalGeneration, config), extractor)
    task, splits = medias.made(NAME, model, notes, max_seconds=1.0)
    loaded = task.load_model(torch.float32)
    assert task.head(loaded) == ["projector", "classifier"]
    features = task.encode(splits["validation"], "validation")
    rows = [features[i] for i in range(8)]
    batch = task.collate(rows)
    assert batch["input_features"].shape == (8, 16, 100)
    heard = sum(task.length(row) for row in rows), sum(medias_seconds(row) for row in rows)
    assert abs(task.count(batch) - heard[1]) <= 1
    loss = task.loss(loaded(**task.inputs(batch)), batch)
    assert torch.isfinite(loss)


def medias_seconds(row):
    from peft_fast.recipes.data import audio_seconds

    return audio_seconds(row["audio"])


def test_a_batch_is_in_the_model_s_dtype_and_cut_to_max_seconds(wav2vec, notes, tmp_path):
    import soundfile

    task, splits = medias.made(NAME, wav2vec, notes, max_seconds=0.5)
    task.see(task.load_model(torch.bfloat16))
    sizes, most = task.too_long(splits["train"])
    assert most == 0.5 and min(sizes) < 0.5 < max(sizes)
    stereo = np.random.default_rng(0).normal(0, 0.1, (44100, 2))
    soundfile.write(tmp_path / "long.flac", stereo, 44100)
    soundfile.write(tmp_path / "blip.wav", stereo[:50, 0], 8000)
    batch = task.collate([{"audio": str(tmp_path / name), "row": 0} for name in ("long.flac", "blip.wav")])
    assert batch["input_values"].dtype == torch.bfloat16 and batch["input_values"].shape == (2, 8000)
    assert batch["attention_mask"].sum(1).tolist() == [8000, 6400]


def test_what_cannot_be_learnt_is_refused(wav2vec, notes, tmp_path, tiny_bert):
    assert "no class shrill" in medias.stopped(NAME, wav2vec, notes, tmp_path / "a", class_weights={"shrill": 2.0})
    assert medias.stopped(NAME, tiny_bert, notes, tmp_path / "b")
    said = medias.stopped(NAME, wav2vec, notes, tmp_path / "c", progressive=[100])
    assert "progressive: means nothing for audio-classification" in said
    (tmp_path / "bad.wav").write_bytes(b"RIFF no sound")
    medias.sounds(tmp_path, {"more": 12}, "label", note)
    rows = [{"audio": f"more-{i}.wav", "label": ("low", "high")[i % 2]} for i in range(12)]
    bad = medias.table(tmp_path / "rows.csv", [*rows, {"audio": "bad.wav", "label": "low"}])
    said = medias.stopped(NAME, wav2vec, {"train": bad, "validation": notes["validation"]}, tmp_path / "d")
    assert "rows.csv, row 14, column audio: bad.wav" in said
