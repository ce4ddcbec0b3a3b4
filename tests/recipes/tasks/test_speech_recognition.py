"""Speech: letters that are tones, learnt by both kinds of model; transcripts, vocabularies and prefixes checked."""

import numpy as np
import pytest
import torch

from peft_fast.errors import SettingsError
from peft_fast.recipes.tasks import speech_recognition as speech
from tests.recipes.tasks import medias

NAME = "speech-recognition"
LETTERS = {"a": 300.0, "b": 800.0, "c": 2000.0}


def spoken(number, draw):
    """A tone and a pause, or two tones: a letter each."""
    letters = [list(LETTERS)[int(i)] for i in draw.integers(0, 3, 1 + number % 2)]
    parts = [np.concatenate([medias.tone(LETTERS[one], 0.2, draw), np.zeros(800, np.float32)]) for one in letters]
    return np.concatenate(parts), "".join(letters).upper() + "."


@pytest.fixture(scope="module")
def wav2vec(tmp_path_factory):
    return medias.wav2vec(tmp_path_factory.mktemp("wav2vec"), spread=0.2)


@pytest.fixture(scope="module")
def tones(tmp_path_factory):
    return medias.sounds(tmp_path_factory.mktemp("tones"), {"train": 64, "validation": 16}, "text", spoken)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    """A Whisper of two layers for one second, its words letters."""
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizer,
    )

    folder = tmp_path_factory.mktemp("whisper")
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"]
    vocabulary = {letter: place for place, letter in enumerate(["Ġ", ".", *"ABCDEF"])}
    tokenizer = WhisperTokenizer(vocab=vocabulary, merges=[], unk_token=special[0], pad_token=special[0])
    tokenizer.add_tokens(special, special_tokens=True)
    end, start, plain = tokenizer.convert_tokens_to_ids(special)
    config = WhisperConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=20, max_source_positions=50, max_target_positions=32,
        vocab_size=len(tokenizer), decoder_start_token_id=start, bos_token_id=end, eos_token_id=end, pad_token_id=end,
        dropout=0.0, begin_suppress_tokens=None, init_std=0.1,
    )  # fmt: skip
    processor = WhisperProcessor(WhisperFeatureExtractor(feature_size=20, chunk_length=1), tokenizer)
    medias.saved(folder, (WhisperForConditionalGeneration, config), processor)
    GenerationConfig(
        decoder_start_token_id=start, bos_token_id=end, eos_token_id=end, pad_token_id=end, max_length=32,
        no_timestamps_token_id=plain, is_multilingual=False, return_timestamps=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


SHORT = dict(max_seconds=1.0, max_target_length=16, max_new_tokens=8)


def test_a_ctc_model_trains_on_a_vocabulary_of_the_transcripts(wav2vec, tones, tmp_path):
    run = medias.trained(NAME, wav2vec, tones, tmp_path / "run", steps=40, max_seconds=1.0)
    before, after = run.result["evaluations"][0], run.result["final"]["validation"]
    assert run.task.facts["letters"] == ["a", "b", "c"] and run.task.facts["case"] is None
    assert after["loss"] < before["loss"] / 5 and after["cer"] < before["cer"]

    from peft_fast.recipes import use

    path = tones["validation"].removesuffix("validation.csv") + "validation-0.wav"
    (answer,) = use.predict(tmp_path / "run", [path])
    assert set(answer["text"]) <= set("abc ")


@pytest.mark.slow  # the plateau on which a CTC model says nothing ends after some 250 steps
def test_a_ctc_model_learns_the_letters(wav2vec, tones, tmp_path):
    run = medias.trained(NAME, wav2vec, tones, tmp_path / "run", steps=500, max_seconds=1.0)
    assert run.result["final"]["validation"]["cer"] < 0.3


def test_whisper_trains_and_writes(whisper, tones, tmp_path):
    run = medias.trained(NAME, whisper, tones, tmp_path / "run", steps=40, learning_rate=5e-3, **SHORT)
    before, after = run.result["evaluations"][0], run.result["final"]["validation"]
    assert after["loss"] < 0.6 * before["loss"] and after["cer"] < before["cer"]
    assert {"wer", "cer", "wer_as_written"} <= set(after)


def test_lora_of_whisper_has_no_head_and_is_fast(whisper, tones, tmp_path):
    run = medias.trained(NAME, whisper, tones, tmp_path / "run", steps=2, method="lora", **SHORT)
    assert not run.result["fast"]["slow"] and len(run.result["fast"]["fast"]) == 32
    trained = [name for name, p in run.model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)


def test_the_labels_begin_behind_the_start_that_the_model_adds(whisper, tones):
    task, splits = medias.made(NAME, whisper, tones, **SHORT)
    labels = task.encode(splits["train"], "train")[0]["labels"]
    start, end = task.known.decoder_start_token_id, task.known.eos_token_id
    assert labels[0] == task.processor.tokenizer.convert_tokens_to_ids("<|notimestamps|>") and labels[-1] == end
    assert start not in labels and task.said(labels) == splits["train"]["text"][0]
    cut, _ = medias.made(NAME, whisper, tones, **SHORT | {"max_target_length": 3})
    short = cut.encode(splits["train"], "train")[0]["labels"]
    assert short == [*labels[:2], end]
    notes = [p for p in cut.check(splits) if "are used" in p.what]
    assert notes and not any(problem.stops for problem in notes)


def test_an_own_vocabulary_in_capitals_is_kept_if_it_has_every_letter(wav2vec, tones, tmp_path):
    import json
    import shutil

    from transformers import Wav2Vec2CTCTokenizer

    for letters, case in (("ABCXYZ", "upper"), ("AB", None)):
        folder = tmp_path / letters
        shutil.copytree(wav2vec, folder)
        words = {"<pad>": 0, "<unk>": 1, "|": 2} | {letter: 3 + i for i, letter in enumerate(letters)}
        (tmp_path / "vocab.json").write_text(json.dumps(words))
        Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"), bos_token=None, eos_token=None, pad_token="<pad>",
                             unk_token="<unk>").save_pretrained(folder)  # fmt: skip
        task, splits = medias.made(NAME, folder, tones, max_seconds=1.0)
        assert task.facts["case"] == case
        ids = task.encode(splits["train"], "train")[0]["labels"]
        assert task.processor.tokenizer.unk_token_id not in ids
        assert task.said(ids).lower() == speech.normalised(splits["train"]["text"][0])


def test_normalised_text_and_errors():
    assert speech.normalised("  It’s 5 o'clock — ÜBER-cool!\n") == "it's 5 o'clock über cool"
    found = speech.errors(["One two three.", "four", "..."], ["one too three", "four", "noise"])
    assert found["wer"] == pytest.approx(1 / 4) and found["cer"] == pytest.approx(1 / 17)
    assert found["wer_as_written"] == pytest.approx(4 / 5)
    assert speech.errors(["."], [""])["wer"] == 0.0


def test_a_long_recording_is_cut_where_it_is_quiet():
    sound = np.ones(25000, np.float32)
    sound[9000:9400] = 0
    pieces = speech.divided(sound, 10000, 1.0)
    assert np.array_equal(np.concatenate(pieces)[: len(sound)], sound)
    assert 9000 <= len(pieces[0]) <= 9400 and all(len(piece) <= 10000 for piece in pieces)
    assert len(speech.divided(sound[:100], 10000, 1.0)[0]) == 4000  # a blip is filled up


def test_a_transcript_that_cannot_be_said_in_its_time_is_named(wav2vec, tones, tmp_path):
    import soundfile

    for name, seconds in (("short", 0.1), ("fine", 1.0)):
        soundfile.write(tmp_path / f"{name}.wav", medias.tone(500, seconds, np.random.default_rng(0)), medias.RATE)
    rows = [{"audio": "short.wav", "text": "cab " * 30}, {"audio": "fine.wav", "text": "cab"}]
    more = [{"audio": "fine.wav", "text": "?!"}]
    files = {"train": medias.table(tmp_path / "train.csv", rows), "validation": medias.table(tmp_path / "v.csv", more)}
    said = medias.stopped(NAME, wav2vec, files, tmp_path / "run")
    assert "train.csv, row 2, column text: 119 letters in 0.10 seconds" in said
    assert "v.csv, row 2, column text: '?!' has no word" in said


def test_options_that_do_not_fit_the_model_are_refused(whisper, wav2vec, tones, tmp_path):
    for model, options, said in (
        (whisper, SHORT | {"max_seconds": 5.0}, "hears 1 seconds at once"),
        (whisper, SHORT | {"max_target_length": 64}, "32 positions"),
        (whisper, SHORT | {"source_language": "de"}, "knows English alone"),
        (wav2vec, {"label_smoothing": 0.1}, "label_smoothing: 0.1, and a CTC model"),
        (wav2vec, {"source_language": "de", "max_new_tokens": 9}, "leave source_language and max_new_tokens out"),
        (wav2vec, {"max_target_length": 9}, "CTC"),
    ):
        with pytest.raises(SettingsError, match=said):
            medias.made(NAME, model, tones, **options)


def test_evaluation_counts_nothing_of_the_padding(whisper, tones):
    task, splits = medias.made(NAME, whisper, tones, label_smoothing=0.1, **SHORT)
    model = task.load_model(torch.float32)
    features = task.encode(splits["validation"], "validation")
    batch = task.collate([features[0], features[1] | {"labels": features[1]["labels"][:2]}])
    assert (batch["labels"][1, 2:] == -100).all()
    outputs = model(**task.inputs(batch))
    wanted = torch.nn.functional.cross_entropy(
        outputs["logits"].flatten(0, 1), batch["labels"].flatten(), label_smoothing=0.1
    )
    assert torch.allclose(task.loss(outputs, batch), wanted)
    with torch.no_grad():
        assert torch.allclose(task.loss(model(**task.inputs(batch)), batch), model(**batch)["loss"], atol=1e-5)
