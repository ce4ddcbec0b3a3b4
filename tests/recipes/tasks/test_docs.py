"""The pages' commands: all parse; the first trains two steps; all run as they are, and the first learns (slow)."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from peft_fast import settings
from peft_fast.benchmarks import pages
from peft_fast.cli import options as flags
from peft_fast.cli import train
from peft_fast.errors import DataError, PeftFastError
from peft_fast.recipes import config, examples, record

DOCS = Path(train.__file__).parents[1] / "recipes" / "docs"
PAGES = sorted(DOCS.glob("*.md"))
COMMANDS = ("train", "search", "eval", "predict", "merge", "compare")
# in place of what is large to fetch (84, 93, 90 and 71 MB): a small model of random weights for the same task
SMALL = {"minilm": "tiny-bert", "smollm2": "tiny-llama", "dinov2": "tiny-vit", "whisper-tiny": "tiny-wav2vec2"}
FEW = "--steps 2 --train-rows 32 --validation-rows 8 --test-rows 8 --overwrite --no-network --device cpu".split()
LONGER = [{"32": "600", "8": "200"}.get(word, word) for word in FEW]


def commands(page):
    """The peft-fast commands of a page's sh blocks, as lists of words."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line for line in words if line[:1] == ["peft-fast"] and line[1] in COMMANDS]


def made_of_files(line):
    """The files and folders a command reads that only a reader of the page has."""
    return [word for word in line if re.search(r"(\.(csv|jsonl|json|tsv|yaml|txt|parquet|jpg|png|wav)|/)$", word)]


ALL = [(page.stem, line) for page in PAGES for line in commands(page)]
named = pytest.mark.parametrize(("page", "line"), ALL, ids=[f"{page}-{' '.join(line[1:5])}" for page, line in ALL])


def test_the_pages_are_there():
    missing = {task for task in config.TASKS} - {page.stem for page in PAGES}
    # translation and summarization may share a page
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert all(f"--task {task}" in text for task in missing), f"no page for {', '.join(sorted(missing))}"


@named
def test_a_command_parses_and_configures(page, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, command, *args = line
    if command == "search":
        importlib.import_module("peft_fast.cli.search")._parser("peft-fast search").parse_known_args(args)
    elif command != "train":
        # beyond its flags it asks for the run's folder
        with pytest.raises(PeftFastError):
            importlib.import_module(f"peft_fast.cli.{command}").app(args)
    else:
        given, rest = train.parser(train.NAME).parse_known_args(args)
        chosen = flags.given(given) | flags.unknown(rest)
        if given.config:
            chosen = {"task": "sequence-classification", "model": "a", "data": "b"} | chosen
        if not (given.schema or given.examples or chosen.get("resume")):
            config.read(chosen)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_command_reads_was_made_by_one_before_it(page):
    made = set()
    for line in commands(page):
        if made_of_files(line):
            continue
        out = line[line.index("--out") + 1] if "--out" in line else None
        read = {word for word in line[2:] if word.startswith("runs/") and (word != out or "--resume" in line)}
        assert read <= made, f"{shlex.join(line)}: nothing on the page makes {', '.join(sorted(read - made))}"
        made.add(out)


FIRST = [next(line for line in commands(page) if line[1] == "train") for page in PAGES if page.stem in config.TASKS]


@pytest.mark.parametrize("line", FIRST, ids=[line[line.index("--task") + 1] for line in FIRST])
def test_the_first_command_of_a_page_trains(line, tmp_path, download_cache, capsys):
    few = LONGER if "time-series" in line else FEW
    args = [re.sub(r"^example:(.+)$", lambda m: f"example:{SMALL.get(m[1], m[1])}", word) for word in line[2:]]
    with settings.override(cache_dir=download_cache, quiet=True):
        try:
            for source in filter(examples.named, args):
                examples.path(source)
        except DataError as error:
            pytest.skip(f"an example can not be had here: {error}".splitlines()[0])
        assert train.app([*args, *few, "--out", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_all_commands_of_a_page_run_as_they_are(page, tmp_path, download_cache):
    """In processes of their own, on the data and the model that they name; a task's first one learns."""
    environment = os.environ | {"PEFT_FAST_CACHE": str(download_cache), "PYTHONPATH": str(DOCS.parents[2])}
    first = next((line for line in FIRST if page.stem in line), None)
    for line in commands(page):
        if made_of_files(line):
            continue
        command = [sys.executable, "-m", "peft_fast", *line[1:]]
        ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, f"{shlex.join(line)}\n{ran.stdout}{ran.stderr}"
        if line == first:
            found = record.read(tmp_path / line[line.index("--out") + 1])
            assert found["model"]["name"] == line[line.index("--model") + 1]
            assert not pages.unlearnt(found), f"{shlex.join(line)}\n{json.dumps(found['evaluations'], indent=1)}"
