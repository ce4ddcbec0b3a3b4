"""What a run says of rows before it trains: what is cut, what that costs, and which option mends it."""

import json
import shutil

import numpy as np
import pytest

from peft_fast.recipes import config, examples, run
from tests.recipes.tasks import medias

WRITING = ("translation", "summarization")


def notes(**options):
    """The notes that a run begins with; each is said, and is in its result."""
    said = []
    prepared = run.prepare(config.read(device="cpu", **options), said.append)
    found = [line.removeprefix("note: ") for line in said if line.startswith("note: ")]
    assert found == prepared.notes
    return found


@pytest.fixture
def pairs(tmp_path):
    """A folder of pairs; every third target is long."""
    rows = [(f"the house number {i}", f"{'la maison ' * 8}{i}" if i % 3 == 0 else f"oui {i}") for i in range(24)]
    for split, part in (("train", rows[:16]), ("validation", rows[16:])):
        text = "\n".join(json.dumps({"source": source, "target": target}) for source, target in part)
        (tmp_path / f"{split}.jsonl").write_text(text)
    names = {"source": "source", "target": "target"}
    return {"data": str(tmp_path), "columns": names, "max_target_length": 14, "max_new_tokens": 4}


@pytest.mark.parametrize("task", WRITING)
def test_long_targets_are_cut_for_the_loss_alone(task, pairs):
    train, validation, short = notes(task=task, model="example:tiny-t5", **pairs)
    assert train == (
        "train.jsonl: 6 of 16 rows of train are longer than 14 tokens in target and are cut (row 13 has 28)"
    )
    assert validation == (
        "validation.jsonl: 2 of 8 rows of validation are longer than 14 tokens in target and are cut for the loss; "
        "scores compare with the whole text (row 3 has 28)"
    )
    assert short == (
        "validation.jsonl, column target: 8 of 8 are longer than max_new_tokens: 4 tokens. "
        "Raise max_new_tokens: answers that end early score lower than they should"
    )


@pytest.mark.parametrize("task", WRITING)
def test_long_targets_that_are_left_out_are_not_written_either(task, pairs):
    train, validation, short = notes(task=task, model="example:tiny-t5", long_rows="skip", **pairs)
    assert train.startswith("train.jsonl: 6 of 16 rows") and train.endswith("in target and are left out")
    assert validation.startswith("validation.jsonl: 2 of 8 rows") and validation.endswith("in target and are left out")
    assert "6 of 6 are longer than max_new_tokens: 4" in short


@pytest.mark.parametrize("task", WRITING)
def test_nothing_is_said_where_nothing_is_cut(task, pairs):
    more = pairs | {"max_target_length": 64, "max_new_tokens": 64}
    assert notes(task=task, model="example:tiny-t5", **more) == []


@pytest.mark.parametrize(
    ("task", "hint"), [("translation", "translation_en_to_fr"), ("summarization", "summarization")]
)
def test_the_prefix_that_a_model_knows_is_named_until_one_is_given(task, hint, pairs, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(examples.path("example:tiny-t5"), folder)
    known = json.loads((folder / "config.json").read_text())
    prefixes = {"another": {"prefix": "other: "}, hint: {"prefix": "this: "}}
    (folder / "config.json").write_text(json.dumps(known | {"task_specific_params": prefixes}))
    more = pairs | {"max_target_length": 64, "max_new_tokens": 64}
    (said,) = notes(task=task, model=str(folder), **more)
    assert "pretrained for the task with the prefix 'this: ' before each source. Consider prefix: 'this: '" in said
    assert notes(task=task, model=str(folder), prefix="mine: ", **more) == []


def test_a_transcript_tells_more_than_a_cut_recording(tmp_path):
    def spoken(number, draw):
        tone = medias.tone(400, 0.4 if number % 4 else 0.8, draw)
        return np.concatenate([tone, np.zeros(800, np.float32)]), "ab"

    model = medias.wav2vec(tmp_path / "model")
    found = medias.sounds(tmp_path, {"train": 16, "validation": 8}, "text", spoken)
    given = dict(task="speech-recognition", model=str(model), data=found, max_seconds=0.5)
    train, validation = notes(**given)
    assert train.startswith("train.csv: 4 of 16 rows of train are longer than 0.5 seconds and are cut, and their")
    assert "their transcripts are not (row " in train and "WER" not in train
    assert "validation.csv: 2 of 8 rows of validation are longer than 0.5 seconds" in validation
    assert "their transcripts are not; WER counts what is not heard (row " in validation
    train, validation = notes(**given, long_rows="skip")
    assert train == "train.csv: 4 of 16 rows of train are longer than 0.5 seconds and are left out"
    assert validation == "validation.csv: 2 of 8 rows of validation are longer than 0.5 seconds and are left out"
