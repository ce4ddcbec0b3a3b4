"""Examples: made once, whole or not at all, healed when damaged; and what the texts' makers write."""

import csv
import io
import json
import subprocess
import tarfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from peft_fast import settings
from peft_fast.errors import DataError
from peft_fast.recipes import apt, config, data, examples, fetch, tasks
from peft_fast.recipes.examples import Example, text


@pytest.fixture
def cache(tmp_path):
    with settings.override(cache_dir=tmp_path / "cache"):
        yield tmp_path / "cache"


@pytest.fixture
def mine(monkeypatch, cache):
    """An example of data named `mine`; its calls are counted."""

    def make(folder, fetched):
        entry.calls += 1
        (folder / "deep").mkdir()
        (folder / "deep" / "train.csv").write_text("text,label\na,b\n")
        if entry.fails:
            raise entry.fails

    entry = SimpleNamespace(**vars(Example("some rows", make, splits={"train": "deep/train.csv"})), calls=0, fails=None)
    monkeypatch.setitem(text.ENTRIES, "mine", entry)
    return entry


def test_made_once_and_whole(mine, cache):
    said = []
    for _ in range(2):
        found = examples.data("example:mine", say=said.append)
        assert found == {"train": cache / "examples" / "mine" / "deep" / "train.csv"}
        assert found["train"].read_text().startswith("text")
    assert mine.calls == 1 and said == ["making example:mine: some rows"]
    assert [path.name for path in (cache / "examples").iterdir()] == ["mine"]


@pytest.mark.parametrize("damage", ["cut", "gone", "unsealed", "older"])
def test_a_damaged_or_older_one_is_made_again(mine, cache, damage):
    folder = examples.path("example:mine")
    if damage == "cut":
        (folder / "deep" / "train.csv").write_text("text")
    elif damage == "gone":
        (folder / "deep" / "train.csv").unlink()
    else:
        seal = json.loads((folder / examples.SEAL).read_text())
        (folder / examples.SEAL).write_text("{" if damage == "unsealed" else json.dumps(seal | {"version": 0}))
    assert (examples.path("example:mine") / "deep" / "train.csv").read_text() == "text,label\na,b\n"
    assert mine.calls == 2 and [path.name for path in (cache / "examples").iterdir()] == ["mine"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), DataError("given: x\nneeded: y\ndo: z")])
def test_one_that_was_interrupted_leaves_nothing(mine, cache, error):
    mine.fails = error
    with pytest.raises(type(error)):
        examples.path("example:mine")
    assert list((cache / "examples").iterdir()) == []


def test_two_processes_at_once(mine, cache):
    make = mine.make

    def slow(folder, fetched):
        make(folder, fetched)
        mine.make = make
        examples.path("example:mine")  # the other process is done first

    mine.make = slow
    assert examples.path("example:mine").is_dir() and mine.calls == 2
    assert [path.name for path in (cache / "examples").iterdir()] == ["mine"]


def test_a_cache_that_cannot_be_written(mine, cache):
    cache.mkdir()
    (cache / "examples").write_text("in the way")
    with pytest.raises(DataError, match="set PEFT_FAST_CACHE"):
        examples.path("example:mine")


def test_names_that_are_none(cache):
    with pytest.raises(DataError, match=r"did you mean example:movie-reviews\?"):
        examples.get("example:movie-review")
    model = next(name for name, entry in examples.entries().items() if not entry.splits)
    with pytest.raises(DataError, match="a model, "):
        examples.data(f"example:{model}")


def test_entries_are_whole():
    names = [name for module in examples.MODULES for name in examples._entries(module)]
    assert len(names) == len(set(names))
    for name, entry in examples.entries().items():
        assert entry.what and not entry.what.endswith("."), name
        assert set(entry.tasks) <= set(config.TASKS), name
        assert entry.splits is None or "train" in entry.splits, name
        roles = {column.role for task in entry.tasks for column in tasks.get(task).columns}
        assert set(entry.columns) <= roles, name


# ---- what the makers write


class Fetched:
    """Stands in for fetch.Fetch: folders of files made here."""

    def __init__(self, folder: Path, **described: str) -> None:
        self.folder, self.described = folder, described

    def __call__(self, package):
        return self.folder

    def descriptions(self, *languages):
        return {language: self.described[language] for language in languages}


def made(name, tmp_path, fetched=None):
    folder = tmp_path / name
    folder.mkdir()
    text.ENTRIES[name].make(folder, fetched)
    return {split: folder / file for split, file in text.ENTRIES[name].splits.items()}


def rows(path):
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_questions_have_answers_that_need_the_name(tmp_path):
    found = {split: rows(path) for split, path in made("questions", tmp_path).items()}
    assert {split: len(part) for split, part in found.items()} == {"train": 5000, "validation": 500, "test": 500}
    for row in found["train"]:
        (answer,), (start,) = row["answers"]["text"], row["answers"]["answer_start"]
        assert row["context"][start : start + len(answer)] == answer
    contexts = {split: {row["context"] for row in part} for split, part in found.items()}
    assert not contexts["train"] & (contexts["test"] | contexts["validation"])
    # the commonest answer, and even knowing the kind asked for, are far from enough
    answers = Counter(row["answers"]["text"][0] for row in found["train"])
    assert max(answers.values()) < 0.05 * 5000


def test_german_credit_is_text(tmp_path):
    lines = [f"'<0',{i},'a, b',good" for i in range(300)] + [f"'>=200',{i},?,bad" for i in range(100)]
    head = "@relation x\n@attribute checking_status {'<0','>=200'}\n@attribute duration numeric\n"
    head += "@attribute purpose {'a, b'}\n@attribute class {good, bad}\n@data\n"
    (tmp_path / "credit-g.arff").write_text(head + "\n".join(lines) + "\n")
    found = {split: rows(path) for split, path in made("german-credit", tmp_path, Fetched(tmp_path)).items()}
    assert {split: len(part) for split, part in found.items()} == {"train": 100, "validation": 100, "test": 200}
    everything = {row["text"]: row["label"] for part in found.values() for row in part}
    assert everything["checking status: <0; duration: 7; purpose: a, b"] == "good"
    assert everything["checking status: >=200; duration: 7"] == "bad"


def test_movie_reviews_keep_clear_ratings_once(tmp_path):
    lines = [f"{i}\t{1.5 if i % 2 else -1.5}\tsentence number {i}" for i in range(1, 3001)]
    lines += ["3001\t0.49\ttoo weak", "3002\t-0.5\tjust\u2028strong enough", "3003\t2.0\tSENTENCE number 1", ""]
    (tmp_path / "movie-reviews.tsv").write_text("\r\n".join(lines), encoding="utf-8")
    found = {split: rows(path) for split, path in made("movie-reviews", tmp_path, Fetched(tmp_path)).items()}
    assert {split: len(part) for split, part in found.items()} == {"train": 1001, "validation": 1000, "test": 1000}
    everything = {row["text"]: row["label"] for part in found.values() for row in part}
    assert len(everything) == 3001 and "too weak" not in everything
    assert everything["just\u2028strong enough"] == "negative" and everything["sentence number 1"] == "positive"


def test_tweets_and_ratings(tmp_path):
    (tmp_path / "ner.txt").write_text("".join(f"Ada{i}\tB-person\nslept\tO\n\t\n" for i in range(700)) + "End\tO")
    found = {split: rows(path) for split, path in made("ner-tweets", tmp_path, Fetched(tmp_path)).items()}
    assert sum(map(len, found.values())) == 701 and len(found["test"]) == 400
    assert all(len(row["tokens"]) == len(row["tags"]) for row in found["train"])
    (tmp_path / "user").write_text("head\n" + "".join(f"{i}\t30\tF\twriter\t1234\n" for i in range(120)))
    (tmp_path / "item").write_text("head\n" + "".join(f"{i}\tFilm {i}\t1995\tDrama\n" for i in range(100)))
    (tmp_path / "inter").write_text("head\n" + "".join(f"{i % 120}\t{i % 100}\t{i % 5 + 1}\t0\n" for i in range(600)))
    found = {split: rows(path) for split, path in made("movielens", tmp_path, Fetched(tmp_path)).items()}
    everything = {row["text"]: row["rating"] for part in found.values() for row in part}
    assert everything["Film 7 (1995), Drama. viewer 7, 30, F, writer"] == "3" and len(everything) == 600


def entry(i, language, title, *paragraphs):
    lines = "\n .\n".join("\n".join(f" {line}" for line in paragraph.split("\n")) for paragraph in paragraphs)
    return f"Package: p{i}\nDescription-md5: {i:032x}\nDescription-{language}: {title}\n{lines}\n"


def test_translations_are_aligned_by_paragraph(tmp_path, monkeypatch):
    english = [entry(i, "en", f"a small program {i}", f"It does thing {i}\nvery well.", "  * list") for i in range(99)]
    french = [entry(i, "fr", f"un petit programme {i}", f"Il fait {i}\ntrès bien.", "  * liste") for i in range(90)]
    english.append(entry(99, "en", "another small program", "First paragraph.", "Second paragraph."))
    french.append(entry(99, "fr", "un autre petit programme", "Un seul paragraphe."))
    fetched = Fetched(tmp_path, en="\n".join(english), fr="\n".join(french))
    with pytest.raises(DataError, match="180 English-French pairs"):
        made("translations", tmp_path, fetched)
    monkeypatch.setattr(text, "FEWEST_PAIRS", 100)
    (tmp_path / "translations").rename(tmp_path / "refused")
    found = [row for path in made("translations", tmp_path, fetched).values() for row in rows(path)]
    assert {"source": "It does thing 3 very well.", "target": "Il fait 3 très bien."} in found and len(found) == 180


# ---- Debian's packages


@pytest.fixture
def deb(tmp_path):
    """A .deb with two files below usr/share/words/ and a link."""
    root = tmp_path / "root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "usr/share/words/b").mkdir(parents=True)
    (root / "usr/share/words/a.txt").write_text("first")
    (root / "usr/share/words/b/c.txt").write_text("second")
    (root / "usr/share/words/link").symlink_to("a.txt")
    fields = "Package: words\nVersion: 1\nArchitecture: all\nMaintainer: me <me@example.org>\nDescription: words\n"
    (root / "DEBIAN/control").write_text(fields)
    archive = tmp_path / "words_1_all.deb"
    try:
        subprocess.run(["dpkg-deb", "--build", str(root), str(archive)], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no dpkg-deb here")
    return archive


def words(**files):
    return fetch.Package("words", "words", "words_1_all.deb", "", "data", "words", files, fetch.debian)


def digest(blob):
    return fetch.hashlib.sha256(blob).hexdigest()


def test_files_and_folders_of_a_deb(tmp_path, deb, monkeypatch):
    monkeypatch.setattr(
        apt, "download", lambda package, folder: (folder / deb.name).write_bytes(deb.read_bytes()) and None
    )
    read = apt.members(deb)
    tar = read("usr/share/words/")
    assert tar == read("usr/share/words/")
    with tarfile.open(fileobj=io.BytesIO(tar)) as packed:
        assert packed.getnames() == ["a.txt", "b/c.txt"]
        assert packed.getmember("a.txt").mtime == 0
    package = words(
        **{"a.txt": ("usr/share/words/a.txt", digest(b"first")), "all.tar": ("usr/share/words/", digest(tar))}
    )
    folder = fetch.ensure(package, tmp_path / "cache")
    assert (folder / "a.txt").read_text() == "first" and (folder / "all.tar").read_bytes() == tar


def test_another_release_of_a_deb_is_refused_by_its_files(tmp_path, deb, monkeypatch):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / deb.name).write_bytes(deb.read_bytes())
    monkeypatch.setattr(apt, "download", lambda package, folder: pytest.fail("the file is there"))
    for files, told in (
        ({"a.txt": ("usr/share/words/a.txt", digest(b"other"))}, "a.txt is not the pinned file"),
        ({"d.txt": ("usr/share/words/d.txt", "")}, "there is no usr/share/words/d.txt in it"),
    ):
        with pytest.raises(DataError, match=told) as raised:
            fetch.ensure(words(**files), tmp_path / "cache")
        assert "words_1_all.deb of Debian 12" in str(raised.value) and str(tmp_path / "cache") in str(raised.value)


def test_no_debian_here(tmp_path, monkeypatch):
    monkeypatch.setattr(apt.shutil, "which", lambda program: None)
    with pytest.raises(DataError) as raised:
        fetch.ensure(words(**{"a.txt": ("a.txt", "")}), tmp_path)
    assert "no apt-get and no dpkg-deb here: not a Debian or Ubuntu system" in str(raised.value)
    assert f"or copy that file into {tmp_path}" in str(raised.value)
    with pytest.raises(DataError, match="not a Debian or Ubuntu system"):
        fetch.Fetch(tmp_path).descriptions("en", "fr")
    with pytest.raises(DataError, match="--no-network"):
        fetch.Fetch(tmp_path, network=False).descriptions("en", "fr")


def test_apt_that_fails_is_quoted(tmp_path, monkeypatch):
    asked = []

    def run(*command, cwd=None):
        asked.append(command)
        return subprocess.CompletedProcess(command, 100, "", "W: something\nE: Unable to locate package words\n")

    monkeypatch.setattr(apt, "_run", run)
    monkeypatch.setattr(apt.shutil, "which", lambda program: program)
    with pytest.raises(DataError, match="apt-get download words: Unable to locate package words"):
        fetch.ensure(words(**{"a.txt": ("a.txt", "")}), tmp_path)
    assert [command[1] for command in asked] == ["download", "-c"]


@pytest.mark.slow
@pytest.mark.parametrize("name", text.ENTRIES)
def test_the_real_ones_are_read_by_their_tasks(name, download_cache):
    source = f"example:{name}"
    with settings.override(cache_dir=download_cache):
        try:
            examples.path(source)
        except DataError as error:
            pytest.skip(f"{name} can not be had here: {error}".splitlines()[0])
        for kind in examples.get(source).tasks:
            chosen = config.read(task=kind, model="-", data=source)
            splits = data.read(chosen, tasks.get(kind)(chosen))
            assert not splits.problems and min(map(len, splits.values())) >= 100
