"""Files and folders of every kind, datasets, pictures and recordings; and those that cannot be read."""

import json
import re
from pathlib import Path

import pytest

from peft_fast.errors import DataError
from peft_fast.recipes import data, files
from peft_fast.recipes.tasks import Column

from .reading import LABEL, ROWS, TEXT, pairs, picture, problems, read, refused, task, write_csv, write_jsonl

datasets = pytest.importorskip("datasets")


# ---- formats


def as_records():
    return [{"text": text, "label": label} for text, label in ROWS]


def parquet(path):
    datasets.Dataset.from_list(as_records()).to_parquet(path)


def arff(path):
    head = "% loans\n@relation x\n@attribute text string\n@ATTRIBUTE 'label' {good, bad}\n@data\n"
    path.write_text(head + "".join(f"'{text}',{label}\n" for text, label in ROWS))


WRITERS = {
    "d.csv": write_csv,
    "d.tsv": lambda path: write_csv(path, delimiter="\t"),
    "semicolons.csv": lambda path: write_csv(path, delimiter=";"),
    "crlf.csv": lambda path: write_csv(path, lineterminator="\r\n"),
    "bom.csv": lambda path: path.write_bytes(b"\xef\xbb\xbf" + write_csv(path).read_bytes()),
    "d.jsonl": lambda path: write_jsonl(path, as_records()),
    "list.json": lambda path: path.write_text(json.dumps(as_records(), indent=1)),
    "data.json": lambda path: path.write_text(json.dumps({"data": as_records()})),
    "columns.json": lambda path: path.write_text(
        json.dumps({"text": [text for text, _ in ROWS], "label": [label for _, label in ROWS]})
    ),
    "lines.json": lambda path: write_jsonl(path, as_records()),
    "d.parquet": parquet,
    "d.arff": arff,
}


@pytest.mark.parametrize("name", WRITERS)
def test_formats(tmp_path, name):
    WRITERS[name](tmp_path / name)
    splits = read(tmp_path / name)
    assert pairs(splits) == sorted(ROWS) and not splits.problems
    assert splits.sources == {"train": name, "validation": name}
    assert (len(splits["train"]), len(splits["validation"])) == (54, 6)


def test_lines_of_text_and_words_with_tags(tmp_path):
    (tmp_path / "d.txt").write_text("one\n\n two words \nthree\n" * 5)
    splits = read(tmp_path / "d.txt", TEXT, task="masked-lm", validation_share=0.5)
    assert " two words " in splits["train"]["text"] or " two words " in splits["validation"]["text"]
    (tmp_path / "d.conll").write_text(
        "-DOCSTART- O\n\n" + "".join(f"Ada B-PER\nL{i} I-PER\nslept O\n\nIn O\nRome{i} B-LOC\n\n" for i in range(9))
    )
    splits = read(tmp_path / "d.conll", Column("tokens", "tokens"), Column("tags", "tags"), task="token-classification")
    assert sorted({tuple(row["tags"]) for row in splits["train"]}) == [("B-PER", "I-PER", "O"), ("O", "B-LOC")]
    assert [row["tokens"] for row in splits["train"] if row["row"] == 7] in ([["In", "Rome0"]], [])


def test_row_numbers_are_the_lines_where_rows_begin(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text('text,label\n"two\nlines",a\n\n"a, b ""c""",b\nlast,a\n')
    splits = read({"train": str(path), "validation": str(write_csv(tmp_path / "v.csv"))})
    assert [(row["text"], row["row"]) for row in splits["train"]] == [("two\nlines", 2), ('a, b "c"', 5), ("last", 6)]


def test_long_cells_are_read(tmp_path):
    rows = [*ROWS, ("x" * 200_000, "good")]
    assert pairs(read(write_csv(tmp_path / "d.csv", rows))) == sorted(rows)


# ---- folders, datasets


def test_folders_of_splits(tmp_path):
    write_csv(tmp_path / "a" / "train.csv", ROWS[:40])
    write_csv(tmp_path / "a" / "dev.csv", ROWS[40:50])
    write_jsonl(tmp_path / "a" / "test.jsonl", as_records()[50:])
    (tmp_path / "a" / "README.txt").write_text("about\n")
    splits = read(tmp_path / "a")
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 40, "validation": 10, "test": 10}
    assert splits.sources == {"train": "train.csv", "validation": "dev.csv", "test": "test.jsonl"}
    for name, part in (("train-00000-of-00002.csv", ROWS[:30]), ("train-00001-of-00002.csv", ROWS[30:])):
        write_csv(tmp_path / "b" / "data" / name, part)
    splits = read(tmp_path / "b", seed=3)
    assert pairs(splits) == sorted(ROWS)
    names = {splits.file("validation", i): row["text"] for i, row in enumerate(splits["validation"])}
    expected = {
        t: "train-00000-of-00002.csv" if i < 30 else "train-00001-of-00002.csv" for i, (t, _) in enumerate(ROWS)
    }
    assert names and all(expected[text] == name for name, text in names.items())
    for split in ("train", "test"):
        write_csv(tmp_path / "c" / split / "rows.csv")
    assert read(tmp_path / "c").sources["test"] == "test/rows.csv"


def test_folders_that_hold_nothing_of_use(tmp_path):
    (tmp_path / "a").mkdir()
    assert "a/: no data file in this folder" in refused(tmp_path / "a")
    write_csv(tmp_path / "b" / "test.csv")
    assert "test.csv and no train file" in refused(tmp_path / "b")
    assert "b.csvx" not in refused(tmp_path / "b" / "tests.csv") and "Did you mean test.csv?" in refused(
        tmp_path / "b" / "tests.csv"
    )


def test_saved_datasets_with_named_classes(tmp_path):
    names = datasets.ClassLabel(names=["bad", "fine"])
    features = datasets.Features({"sentence": datasets.Value("string"), "label": names, "id": datasets.Value("int64")})
    columns = {"sentence": [t for t, _ in ROWS], "label": [i % 2 for i in range(60)], "id": list(range(60))}
    rows = datasets.Dataset.from_dict(columns, features=features)
    hidden = rows.select(range(5)).map(lambda row: {"label": -1})
    datasets.DatasetDict({"train": rows, "validation_matched": rows.select(range(8)), "test": hidden}).save_to_disk(
        tmp_path / "d"
    )
    splits = read(tmp_path / "d")
    assert set(splits) == {"train", "validation"} and len(splits["validation"]) == 8
    assert splits["validation"]["label"][:2] == ["bad", "fine"]
    assert any("no public labels" in note for note in splits.notes)
    tags = datasets.Features({"tokens": datasets.List(datasets.Value("string")), "ner_tags": datasets.List(names)})
    words = datasets.Dataset.from_dict(
        {"tokens": [["a", "b"]] * 9, "ner_tags": [[0, 1]] * 8 + [[0, -1]]}, features=tags
    )
    words.save_to_disk(tmp_path / "e")
    roles = Column("tokens", "tokens"), Column("tags", "tags", ("ner_tags",))
    splits = read(
        {"train": str(tmp_path / "e"), "validation": str(tmp_path / "e")}, *roles, task="token-classification"
    )
    assert splits["train"][0]["tags"] == ["bad", "fine"]
    assert "row 9, column ner_tags: label -1 is out of range 0 … 1" in problems(splits)[0]


def test_hub_ids_without_a_network_are_refused_at_once():
    before = datasets.config.HF_HUB_OFFLINE
    message = refused("somebody/nothing-at-all", network=False)
    assert "data somebody/nothing-at-all" in message and "let it use the network once" in message
    assert datasets.config.HF_HUB_OFFLINE == before


# ---- pictures and recordings


def test_class_folders_metadata_and_encoded_images(tmp_path):
    roles = Column("image", "image"), LABEL
    for i in range(20):
        picture(tmp_path / "a" / ("cat" if i % 2 else "dog") / f"{i}.png", i)
    splits = read(tmp_path / "a", *roles, task="image-classification")
    assert {row["label"] for row in splits["train"]} == {"cat", "dog"}
    for row in splits["train"]:
        shade = data.load_image(row["image"]).getpixel((0, 0))[0]
        assert row["label"] == ("cat" if shade % 2 else "dog")
    write_csv(tmp_path / "b.csv", [(f"a/dog/{i}.png", "even") for i in range(0, 20, 2)], head=("file_name", "label"))
    splits = read(tmp_path / "b.csv", *roles, task="image-classification")
    assert data.load_image(splits["train"][0]["image"]).size == (8, 8)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "cat"])})
    encoded = [{"bytes": (tmp_path / "a" / "dog" / f"{i}.png").read_bytes(), "path": None} for i in range(0, 12, 2)]
    columns = {"image": encoded, "label": [0, 1] * 3}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "c.parquet")
    splits = read(tmp_path / "c.parquet", *roles, task="image-classification", validation_share=0.4)
    row = splits["train"][0]
    assert row["image"]["bytes"] and data.load_image(row["image"]).getpixel((0, 0))[0] in range(0, 12, 2)
    write_csv(
        tmp_path / "d.csv",
        [("a/dog/0.png", "x"), ("a/dog/no.png", "y"), ("https://a/b.png", "z")] * 2,
        ("image", "label"),
    )
    told = problems(read({"train": str(tmp_path / "d.csv"), "validation": str(tmp_path / "b.csv")}, *roles))
    assert "row 3, column image: no such file: 'a/dog/no.png'" in told[0] and "an address" in told[1]
    (tmp_path / "empty").mkdir()
    assert "no image file in this folder" in refused(tmp_path / "empty", *roles, task="image-classification")


def test_recordings(tmp_path):
    np, soundfile = pytest.importorskip("numpy"), pytest.importorskip("soundfile")
    path = tmp_path / "tone.wav"
    wave = np.sin(2 * np.pi * 100 * np.arange(8000) / 8000).astype(np.float32)
    soundfile.write(path, np.stack([wave, wave], 1), 8000)
    assert data.audio_seconds(str(path)) == 1.0
    heard = data.load_audio(str(path), 16000)
    expected = np.sin(2 * np.pi * 100 * np.arange(16000) / 16000)
    assert heard.dtype == np.float32 and heard.shape == (16000,)
    assert np.abs(heard - expected)[200:-200].max() < 0.01
    assert len(data.load_audio({"bytes": path.read_bytes(), "path": None}, 8000, max_seconds=0.25)) == 2000
    assert np.allclose(data.load_audio({"array": wave, "sampling_rate": 8000}, 8000), wave)
    path.write_bytes(b"RIFF")
    with pytest.raises(DataError, match="tone.wav"):
        data.load_audio(str(path), 16000)


# ---- files that cannot be read


BAD_FILES = {
    "missing.csv": (None, "missing.csv: no such file or folder"),
    "empty.csv": (b"", "empty.csv: empty file, 0 bytes"),
    "head.csv": (b"text,label\n", "head.csv: no rows"),
    "blank.jsonl": (b"\n\n", "blank.jsonl: no rows"),
    "wide.csv": ("text,label\na,b\n".encode("utf-16"), "wide.csv: UTF-16, no UTF-8 text"),
    "sheet.csv": (b"PK\x03\x04...", "sheet.csv: a zip archive or Excel sheet"),
    "cut.json": (b'[{"text": "a"},', "cut.json"),
    "one.json": (b'"text"', "one.json: JSON of a str"),
    "no.parquet": (b"PAR0", "no.parquet: no parquet"),
    "d.xlsx": (b"PK", "d.xlsx: a .xlsx file"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_files_that_cannot_be_read(tmp_path, name):
    content, given = BAD_FILES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    message = refused(tmp_path / name)
    assert given in message and str(tmp_path) not in message.replace(str(tmp_path / name), name)


@pytest.mark.parametrize(
    "head, told",
    [
        (b"t\xe9xt,label", "row 1: byte 0xe9 at offset 1 of the file is no UTF-8. Save the file as UTF-8"),
        (b'"text"s,label', "row 1: malformed"),
    ],
)
def test_a_line_of_names_that_cannot_be_read(tmp_path, head, told):
    (tmp_path / "d.csv").write_bytes(head + b"\na film,good\nanother,bad\n")
    message = refused(tmp_path / "d.csv")
    assert message.startswith(f"given: d.csv, {told}") and "no column" not in message


def test_an_attribute_that_is_no_utf8(tmp_path):
    (tmp_path / "d.arff").write_bytes(b"@attribute t\xe9xt string\n@attribute label {a,b}\n@data\n'x',a\n'y',b\n")
    assert "given: d.arff, row 1: byte 0xe9 at offset 12" in refused(tmp_path / "d.arff")


def test_files_of_one_name_are_told_apart(tmp_path):
    files = {split: str(write_csv(tmp_path / split / "data.csv")) for split in ("tr", "te")}
    splits = read({"train": files["tr"], "test": files["te"]}, validation_share=0.2)
    assert splits.sources["train"] == "tr/data.csv" and splits.file("test", 3) == "te/data.csv"
    write_csv(tmp_path / "tr" / "data.csv", [*ROWS, ("", "good")])
    splits = read({"train": files["tr"], "test": files["te"]})
    assert problems(splits) == ["tr/data.csv, row 62, column text: empty. Fill the cell, or remove the row"]
    (tmp_path / "te" / "data.csv").write_bytes(b"")
    assert "given: te/data.csv: empty file" in refused({"train": files["tr"], "test": files["te"]})
    (tmp_path / "empty" / "tr").mkdir(parents=True)
    message = refused({"train": str(tmp_path / "tr"), "test": str(tmp_path / "empty" / "tr")})
    assert "given: empty/tr/: no data file in this folder" in message
    other = str(write_csv(tmp_path / "x" / "held.csv"))
    assert read({"train": files["tr"], "test": other}).sources["train"] == "data.csv"
    for split in ("train_set", "test_set"):
        write_csv(tmp_path / "both" / split / "data.csv").write_bytes(b"text,label\na\nb,good\nc,bad\nd,bad\ne,good\n")
    told = problems(read(tmp_path / "both", validation_share=0.5))
    assert sorted(line.partition(":")[0] for line in told) == ["test_set/data.csv, row 2", "train_set/data.csv, row 2"]


def test_every_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"")
    message = refused({"train": str(tmp_path / "a.csv"), "test": str(tmp_path / "b.csv")})
    assert "a.csv: empty file" in message and "b.csv: no such file" in message
    write_csv(tmp_path / "a.csv", head=("x", "label"))
    write_csv(tmp_path / "b.csv", head=("text", "y"))
    message = refused({"train": str(tmp_path / "a.csv"), "test": str(tmp_path / "b.csv")})
    assert "a.csv: no column text" in message and "b.csv: no column label" in message


def test_one_file_for_two_splits(tmp_path):
    path = write_csv(tmp_path / "a.csv")
    again = str(tmp_path / "x" / ".." / "a.csv")
    (tmp_path / "x").mkdir()
    assert "train and test are both" in refused({"train": str(path), "test": again})


def test_rows_of_pictures_and_recordings_in_memory():
    np, Image = pytest.importorskip("numpy"), pytest.importorskip("PIL.Image")
    pytest.importorskip("soundfile")
    made = task(Column("image", "image"), LABEL, task="image-classification")
    row = data.rows([Image.new("RGB", (3, 2), (1, 2, 3))], made)[0]
    assert data.load_image(row["image"]).getpixel((0, 0)) == (1, 2, 3)
    made = task(Column("audio", "audio"), LABEL, task="audio-classification")
    wave = np.linspace(-0.5, 0.5, 80, dtype=np.float32)
    row = data.rows([{"audio": {"array": wave, "sampling_rate": 8000}}], made)[0]
    assert np.array_equal(data.load_audio(row["audio"], 8000), wave)


def test_the_page_of_data_names_every_format():
    page = (Path(data.__file__).parent / "docs" / "data.md").read_text(encoding="utf-8")
    table = page.partition("| what | how it is read |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\.[a-z]+)`", table)) == set(files.READERS)
