"""Columns to roles, cells to the forms of tasks, the held-out rows, and rows to predict."""

import json
from types import SimpleNamespace

import pytest

from peft_fast.errors import DataError, SettingsError
from peft_fast.recipes import data, examples, sources
from peft_fast.recipes.tasks import Column

from .reading import LABEL, ROWS, TEXT, pairs, picture, problems, read, refused, task, write_csv, write_jsonl

datasets = pytest.importorskip("datasets")


# ---- columns


def test_roles_by_name_alias_and_config(tmp_path):
    path = write_csv(tmp_path / "d.csv", [(y, t, "noise") for t, y in ROWS], head=("Class", " Review ", "body"))
    assert pairs(read(path)) == sorted(ROWS)
    path = write_csv(tmp_path / "e.csv", [(t, y, "noise", "z") for t, y in ROWS], head=("a", "b", "text", "label"))
    splits = read(path, columns={"text": "a", "label": "b"})
    assert pairs(splits) == sorted(ROWS) and splits.names == {"text": "a", "label": "b"}
    assert splits["train"].column_names == ["text", "label", "row"]


def test_a_column_in_a_dict_and_several_as_one(tmp_path):
    records = [{"translation": {"en": f"word {i}", "fr": f"mot {i}"}} for i in range(20)]
    path = write_jsonl(tmp_path / "d.jsonl", records)
    roles = Column("source", "text"), Column("target", "text", truth=True)
    chosen = {"source": "translation.en", "target": "translation.fr"}
    splits = read(path, *roles, task="translation", columns=chosen)
    assert all(row["target"] == row["source"].replace("word", "mot") for row in splits["train"])
    path = write_csv(tmp_path / "d.csv", [(f"text {i}", i, i / 2) for i in range(20)], head=("text", "x", "y"))
    splits = read(path, TEXT, Column("value", "number"), task="regression", columns={"value": "x, y"})
    assert splits["train"][0]["value"] in [[float(i), i / 2] for i in range(20)]


@pytest.mark.parametrize(
    "head, given, hint",
    [
        (("txt", "label"), "no column text (nor sentence, review); it has txt, label", "--columns text=txt"),
        (("a", "b"), "no column text (nor sentence, review), no column label", "--columns text=NAME label=NAME"),
        (("A good film, a very good film and no doubt", "1"), "no column text", "a first line of column names"),
        (("text", "text"), "column 'text' twice", "a name of its own"),
    ],
)
def test_missing_columns(tmp_path, head, given, hint):
    message = refused(write_csv(tmp_path / "d.csv", head=head))
    assert "d.csv" in message and given in message and hint in message


def test_wrong_names_in_columns(tmp_path):
    path = write_csv(tmp_path / "d.csv")
    assert "no column txt" in refused(path, columns={"text": "txt"}) and "text=text" in refused(
        path, columns={"text": "txt"}
    )
    assert "no role texts" in refused(path, columns={"texts": "text"})


def test_optional_columns_have_to_be_in_every_split(tmp_path):
    write_csv(tmp_path / "train.csv", [(t, "second", y) for t, y in ROWS], head=("text", "hypothesis", "label"))
    write_csv(tmp_path / "test.csv", [("new", "good")])
    assert "text_pair" not in read(tmp_path)["train"].column_names
    (tmp_path / "test.csv").unlink()
    assert set(read(tmp_path)["train"]["text_pair"]) == {"second"}


# ---- forms


def converted(tmp_path, column, *cells, **options):
    """The cells that have the form, and the problems of the others."""
    records = [{"text": f"text {i}", column.role: cell} for i, cell in enumerate([*cells, *cells])]
    path = write_jsonl(tmp_path / "d.jsonl", records)
    splits = read(path, TEXT, column, **options)
    rows = sorted((row for part in splits.values() for row in part), key=lambda row: row["row"])
    made = {row["row"]: row[column.role] for row in rows}
    wrong = {problem.row: problem.what for problem in splits.problems}
    return [made.get(i, wrong.get(i)) for i in range(1, len(cells) + 1)]


def test_labels_are_names(tmp_path):
    made = converted(tmp_path, LABEL, 1, 1.0, "1", True, " a b ", "", None, float("nan"), {"a": 1})
    assert made[:5] == ["1", "1", "1", "true", "a b"]
    assert made[5:8] == ["empty"] * 3 and "an object instead of a class" in made[8]
    path = write_csv(tmp_path / "d.csv", [(t, f"{i % 2}.0") for i, (t, _) in enumerate(ROWS)])
    assert set(read(path)["train"]["label"]) == {"0", "1"}


def test_several_labels_a_row(tmp_path):
    made = converted(tmp_path, LABEL, ["a", 2], ["b"], "c", [])
    assert made[:2] == [["a", "2"], ["b"]] and "other rows have a list" in made[2] and made[3] == []


def test_numbers(tmp_path):
    number = Column("value", "number")
    made = converted(tmp_path, number, 1, "2.5", float("nan"), float("inf"), "3,5", "x", None, True, "1e400")
    assert made[:2] == [1.0, 2.5]
    assert "nan is no finite number" in made[2] and "inf is no finite" in made[3] and "'3,5'" in made[4]
    assert "'x'" in made[5] and made[6] == "empty" and "True" in made[7] and "inf" in made[8]


def test_words_answers_boxes_and_messages(tmp_path):
    words = converted(tmp_path, Column("tokens", "tokens"), ["a", 1], "b c", '["d"]', "['e', 'f']", [], [None], 3)
    assert words[:4] == [["a", "1"], ["b", "c"], ["d"], ["e", "f"]]
    assert "empty list" in words[4] and "None" in words[5] and "no list: 3" in words[6]
    answers = converted(
        tmp_path,
        Column("answers", "answers"),
        {"text": ["x"], "answer_start": [3]},
        {"text": "y", "answer_start": 0},
        [{"text": "z", "answer_start": 1}],
        {"text": ["x", "y"], "answer_start": [1]},
        {"start": 1},
    )
    assert answers[:3] == [{"text": [t], "answer_start": [n]} for t, n in (("x", 3), ("y", 0), ("z", 1))]
    assert "as many starts" in answers[3] and "no answers" in answers[4]
    boxes = converted(
        tmp_path,
        Column("boxes", "boxes", ("objects",)),
        {"bbox": [[0, 0, 2, 2]], "category": ["cat"]},
        [{"bbox": [1, 1, 1, 1], "category_id": 3}],
        {"bbox": [], "category": []},
        {"bbox": [[1, 2, 3]], "category": ["cat"]},
        {"bbox": [[1, 2, 3, 4]], "category": []},
    )
    assert boxes[0] == {"bbox": [[0.0, 0.0, 2.0, 2.0]], "category": ["cat"]} and boxes[1]["category"] == ["3"]
    assert boxes[2] == {"bbox": [], "category": []} and "4 numbers" in boxes[3] and "as many categories" in boxes[4]
    said = [{"role": "user", "content": "hi"}]
    made = converted(tmp_path, Column("messages", "messages"), said, json.dumps(said), "hi", [])
    assert json.loads(made[0]) == json.loads(made[1]) == said and "no JSON" in made[2] and "no list" in made[3]


def test_answers_without_a_place_are_looked_for(tmp_path):
    records = [{"context": f"Ada lives in town {i}.", "answers": [f"town {i}"]} for i in range(20)]
    records.append({"context": "Nobody here.", "answers": "Bob"})
    roles = Column("context", "text"), Column("answers", "answers")
    splits = read(write_jsonl(tmp_path / "d.jsonl", records), *roles, task="question-answering")
    assert all(row["answers"]["answer_start"] == [13] for row in splits["train"])
    assert problems(splits) == [
        "d.jsonl, row 21, column answers: answer 'Bob' is not in the context. Copy it from the context"
    ]


def test_options_that_would_do_nothing_are_said(tmp_path):
    rows = write_csv(tmp_path / "rows.csv")
    with pytest.raises(SettingsError, match="subset: foo, and data is no dataset of the hub"):
        read(rows, subset="foo")
    both = {"train": str(rows), "validation": str(write_csv(tmp_path / "more.csv", ROWS[:9]))}
    (note,) = read(both, validation_share=0.2).notes
    assert note == "there is a validation split: validation_share 0.2 is not used"
    assert read(both).notes == [] and "held out" in read(rows, validation_share=0.2).notes[0]


def test_a_folder_of_an_example_is_shown_as_one(tmp_path, monkeypatch):
    coco = {"images": [{"id": 0, "file_name": "0.png"}], "categories": [{"id": 1, "name": "a"}]}
    coco["annotations"] = [{"image_id": 0, "category_id": 1, "bbox": [0, 0, 1, 1]}]
    picture(tmp_path / "train" / "0.png", 9)
    (tmp_path / "train" / "annotations.json").write_text(json.dumps(coco))
    monkeypatch.setattr(examples, "data", lambda *args: {"train": tmp_path / "train"})
    made = task(Column("image", "image"), Column("objects", "boxes"), task="object-detection")
    ((table,),) = sources.tables("example:shapes", made).values()
    assert table.file == "train/annotations.json"


def test_squad_and_coco_files(tmp_path):
    asked = [{"id": i, "question": f"q{i}", "answers": [{"text": "is", "answer_start": 4}]} for i in range(12)]
    squad = {"version": "1", "data": [{"title": "t", "paragraphs": [{"context": "Ada is here", "qas": asked}]}] * 2}
    (tmp_path / "squad.json").write_text(json.dumps(squad))
    roles = Column("question", "text"), Column("context", "text"), Column("answers", "answers")
    splits = read(tmp_path / "squad.json", *roles, task="question-answering")
    assert len(splits["train"]) + len(splits["validation"]) == 24
    assert splits["train"][0]["answers"] == {"text": ["is"], "answer_start": [4]}
    roles = Column("image", "image"), Column("boxes", "boxes")
    coco = {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in range(10)],
        "categories": [{"id": 7, "name": "cat"}],
        "annotations": [{"image_id": i, "category_id": 7, "bbox": [0, 0, i + 1, 1]} for i in range(9)],
    }
    for split in ("train", "validation"):
        (tmp_path / "d" / split).mkdir(parents=True)
        for i in range(10):
            (tmp_path / "d" / split / f"{i}.png").write_bytes(b"-")
        (tmp_path / "d" / split / "annotations.json").write_text(json.dumps(coco))
    splits = read(tmp_path / "d", *roles, task="object-detection")
    row = splits["train"][3]
    assert row["boxes"] == {"bbox": [[0.0, 0.0, 4.0, 1.0]], "category": ["cat"]}
    assert row["image"].endswith("train/3.png")
    assert splits["train"][9]["boxes"]["bbox"] == []
    coco["annotations"][2]["category_id"] = 8
    (tmp_path / "d" / "train" / "annotations.json").write_text(json.dumps(coco))
    assert "annotation 3: category_id 8 is not listed" in refused(tmp_path / "d", *roles, task="object-detection")


# ---- held-out and drawn rows


def test_held_out_rows_have_each_class_by_its_share(tmp_path):
    rows = [(f"text {i}", label) for i, label in enumerate(["a"] * 700 + ["b"] * 290 + ["c"] * 10)]
    path = write_csv(tmp_path / "d.csv", rows)
    splits = read(path, validation_share=0.2, seed=5)
    held = list(splits["validation"]["label"])
    assert [held.count(name) for name in "abc"] == [140, 58, 2]
    assert pairs(splits) == sorted(rows)
    assert list(read(path, validation_share=0.2, seed=5)["validation"]["text"]) == list(splits["validation"]["text"])
    assert list(read(path, validation_share=0.2, seed=6)["validation"]["text"]) != list(splits["validation"]["text"])
    assert "200 of 1,000 training rows are held out" in splits.notes[0]


def test_rows_that_are_alike_stay_together(tmp_path):
    rows = [(f"  TEXT  {i % 200}" if i < 200 else f"text {i % 200}", "ab"[i % 2]) for i in range(400)]
    splits = read(write_csv(tmp_path / "d.csv", rows), validation_share=0.3)
    words = [{row["text"].split()[-1] for row in splits[split]} for split in ("train", "validation")]
    assert not words[0] & words[1] and 100 <= len(splits["validation"]) <= 140
    roles = Column("context", "text"), Column("question", "text"), Column("answers", "answers")
    asked = [(f"town {i // 4} is there", f"q{i}", "town") for i in range(200)]
    path = write_csv(tmp_path / "q.csv", asked, head=("context", "question", "answers"))
    splits = read(path, *roles, task="question-answering")
    assert not set(splits["train"]["context"]) & set(splits["validation"]["context"])


def test_a_class_with_one_row_stays_in_training(tmp_path):
    rows = [*ROWS, ("the only one", "rare")]
    for seed in range(5):
        assert "rare" in read(write_csv(tmp_path / "d.csv", rows), seed=seed, validation_share=0.5)["train"]["label"]


def test_rows_are_drawn_by_the_seed(tmp_path):
    path = write_csv(tmp_path / "d.csv")
    first = read(path, train_rows=10, validation_rows=3)
    assert {split: len(rows) for split, rows in first.items()} == {"train": 10, "validation": 3}
    assert list(read(path, train_rows=10)["train"]["row"]) == list(first["train"]["row"])
    assert list(read(path, train_rows=10, seed=1)["train"]["row"]) != list(first["train"]["row"])


def test_a_task_divides_and_draws_its_own_way(tmp_path):
    made = task(data=str(write_csv(tmp_path / "d.csv")), train_rows=7)
    made.divide = lambda rows, share: (rows.select(range(50)), rows.select(range(50, 60)))
    made.draw = lambda rows, count, split: rows.select(range(len(rows) - count, len(rows)))
    splits = data.read(made.config, made)
    assert list(splits["train"]["text"]) == [text for text, _ in ROWS[43:50]] and len(splits["validation"]) == 10


# ---- rows to predict


def test_rows_of_texts_dicts_and_files(tmp_path):
    made = task()
    assert list(data.rows(["a", "b"], made)["text"]) == ["a", "b"]
    found = data.rows([{"sentence": "a", "text_pair": "x", "label": None}, {"sentence": "b"}], made)
    assert found.to_list() == [{"text": "a", "text_pair": "x", "row": 1}, {"text": "b", "text_pair": "", "row": 2}]
    assert data.rows([{"text": "a", "label": 1}], made, need_truth=True)["label"][0] == "1"
    path = write_csv(tmp_path / "d.csv", [(t,) for t, _ in ROWS], head=("text",))
    assert list(data.rows(path, made)["row"]) == list(range(2, 62))
    with pytest.raises(DataError, match="no column label"):
        data.rows(path, made, need_truth=True)
    for bad, told in (
        ([], "no rows"),
        ([" "], "row 1, column text"),
        ([{"a": 1}], "no column text"),
        ([3], "a number"),
    ):
        with pytest.raises(DataError, match=told):
            data.rows(bad, made)
    made = task(bad_rows="skip")
    assert list(data.rows(["a", "", "c"], made)["row"]) == [1, 3]


def test_rows_of_an_example_take_its_columns(tmp_path, monkeypatch):
    write_csv(tmp_path / "t.csv", head=("x", "y"))
    entry = SimpleNamespace(columns={"text": "x", "label": "y"}, splits={"test": "t.csv"})
    monkeypatch.setattr(examples, "get", lambda source: entry)
    monkeypatch.setattr(examples, "path", lambda source, network, say: tmp_path)
    assert list(data.rows("example:mine", task(), need_truth=True)["label"])[:2] == ["bad", "good"]


def test_a_plain_text_for_a_task_that_reads_several_columns_asks_for_json():
    made = task(Column("question", "text"), Column("context", "text"), LABEL)
    both = {"question": "Where?", "context": "In Marlow."}
    for asked in (["Where was Clara born?"], [both, "Where was Clara born?"]):
        with pytest.raises(DataError) as caught:
            data.rows(asked, made)
        said = str(caught.value)
        assert "'Where was Clara born?', a plain text" in said and "--columns" not in said
        assert """'{"question": "…", "context": "…"}'""" in said
    assert data.rows([both], made)["context"][:] == ["In Marlow."]
