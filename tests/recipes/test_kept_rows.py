"""What rows are read from: once for a search, kept once, and known again when it goes on."""

import pytest

from peft_fast.recipes import config as configs
from peft_fast.recipes import data, sources, space, tasks
from peft_fast.recipes.config import Config
from tests.recipes.tasks import medias, texts

MADE = {
    "sequence-classification": texts.classes,
    "token-classification": texts.tagged,
    "question-answering": texts.question,
    "causal-lm": texts.echoes,
    "masked-lm": texts.echoes,
    "regression": lambda draw: {"text": texts.rated(draw)["text"], "rating": draw.random()},
    "translation": lambda draw: {"en": " ".join(texts.words(draw)), "fr": " ".join(texts.words(draw))},
    "summarization": lambda draw: {"text": " ".join(texts.words(draw)), "summary": " ".join(texts.words(draw))},
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """task -> a folder or file of training rows."""

    def note(number, draw):
        return medias.tone(300 + number, 0.1, draw), ("low", "high")[number % 2]

    folder = {name: tmp_path_factory.mktemp(name) for name in (*MADE, "images", "boxes", "sounds")}
    found = {name: texts.files(folder[name], make, {"train": 40})["train"] for name, make in MADE.items()}
    found["image-classification"] = medias.pictures(folder["images"], {"train": 12})["train"]
    found["object-detection"] = str(medias.scenes(folder["boxes"], {"train": 12})["train"])
    sounds = medias.sounds(folder["sounds"], {"train": 12}, "text", note)["train"]
    return found | {"speech-recognition": sounds, "audio-classification": sounds}


def test_the_rows_of_every_task_but_series_are_looked_at():
    every = {name for name in configs.TASKS if tasks.get(name).modality != "series"}
    assert every == {*MADE, "image-classification", "object-detection", "speech-recognition", "audio-classification"}


@pytest.mark.parametrize("name", [name for name in configs.TASKS if tasks.get(name).modality != "series"])
def test_reading_asks_for_no_other_option_than_rows_are_kept_by(rows, name, monkeypatch):
    """A new option that reading looks at has to become part of READS, or a search would take other trials' rows."""
    columns = {"label": "text"} if name == "audio-classification" else {}
    given = dict(task=name, model="m", data=rows[name], columns=columns, train_rows=8, validation_share=0.3)
    config, asked = configs.read(given), set()
    inner = Config.__getattribute__

    def spy(self, option):
        if option in Config.model_fields:
            asked.add(option)
        return inner(self, option)

    with monkeypatch.context() as patch:
        patch.setattr(Config, "__getattribute__", spy)
        splits = data._read(config, tasks.get(name)(config), lambda text: None)
    assert len(splits["train"]) == 8 and {"train_rows", "validation_share", "seed"} <= asked <= data.READS


def test_what_rows_are_kept_by_can_not_be_tried():
    assert data.READS <= space.FIXED


def test_one_reading_is_kept_and_other_options_do_not_read_again(rows, monkeypatch):
    inner, read = sources.tables, []
    monkeypatch.setattr(sources, "tables", lambda *args: read.append(args) or inner(*args))
    base = dict(task="summarization", model="m", data=rows["summarization"])

    def get(**more):
        given = configs.read(base | more)
        return data.read(given, tasks.get(given.task)(given))

    with data.kept():
        first = get()
        for more in ({"max_length": 16}, {"prefix": "summarize: "}, {"model": "n"}, {"max_target_length": 8}):
            again = get(**more)
            assert again is not first and again["train"][:] == first["train"][:] and again.drawn == first.drawn
        assert len(read) == 1
        other = get(seed=1)
        assert len(read) == 2 and len(data._kept) == 1 and other["train"][:] != first["train"][:]
        # whether an option was given may be what a note is about
        get(seed=1, validation_share=0.1)
        assert len(read) == 3


# ---- how rows were chosen


def test_it_is_known_how_the_rows_of_a_split_were_chosen(rows, tmp_path):
    def drawn(source, **more):
        given = configs.read(dict(task="sequence-classification", model="m", data=source, seed=3) | more)
        return data.read(given, tasks.get(given.task)(given)).drawn

    train = rows["sequence-classification"]
    how = "0.1 of train, drawn by seed 3"
    assert drawn(train) == {"validation": how, "train": f"without {how}"}
    assert drawn(train, train_rows=9)["train"] == f"without {how}; 9 drawn by seed 3"
    both = texts.files(tmp_path, texts.classes, {"train": 30, "validation": 12})
    assert drawn(both) == {} and drawn(both, train_rows=30) == {}
    assert drawn(both, validation_rows=6) == {"validation": "6 drawn by seed 3"}


def test_the_result_says_it(options):
    from peft_fast.recipes import result, run

    prepared = run.prepare(run.resolve(options, {"train_rows": 20}))
    assert result.description(prepared)["drawn"] == {"train": "20 drawn by seed 0"}


# ---- known again


def test_another_file_of_the_same_size_is_another_row(tmp_path):
    made = medias.pictures(tmp_path, {"train": 6, "validation": 3})
    given = configs.read(task="image-classification", model="m", data=made)

    def known():
        task = tasks.get(given.task)(given)
        return data.fingerprint(data.read(given, task), task)

    # of a size that no other has: that alone tells it from them, and not from what it was
    path = tmp_path / "train-4.png"
    path.write_bytes(path.read_bytes() + bytes(1000))
    before = known()
    assert before == known()
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    after = known()
    assert after["train"] != before["train"] and after["validation"] == before["validation"]
    assert after["train"][0] == before["train"][0] == 6
