"""A cache that is damaged, half written or not writable: noticed, repaired, or a three-line error."""

import hashlib
import io
import os
import zipfile

import pytest

from peft_fast.errors import DataError
from peft_fast.recipes import fetch

CONTENT = b"the pinned words\n"


def sha256(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()


@pytest.fixture
def cache(tmp_path):
    """A cache into which a user has laid the archive."""
    blob = io.BytesIO()
    with zipfile.ZipFile(blob, "w") as archive:
        archive.writestr("inside/words.txt", CONTENT)
    (tmp_path / "words-1.whl").write_bytes(blob.getvalue())
    return tmp_path


@pytest.fixture
def package(cache):
    return fetch.Package(
        title="some words",
        requirement="words==1",
        archive="words-1.whl",
        sha256=sha256((cache / "words-1.whl").read_bytes()),
        option="--data",
        folder="words",
        files={"words.txt": ("inside/words.txt", sha256(CONTENT))},
        reader=fetch.zipped,
    )


@pytest.mark.parametrize("damage", [b"", CONTENT[:5], CONTENT + b"x", None], ids=["empty", "cut", "longer", "gone"])
def test_a_damaged_file_is_put_right(cache, package, damage):
    path = fetch.ensure(package, cache, network=False) / "words.txt"
    assert path.read_bytes() == CONTENT
    path.unlink() if damage is None else path.write_bytes(damage)
    said = []
    assert fetch.ensure(package, cache, network=False, say=said.append) == path.parent
    assert path.read_bytes() == CONTENT
    assert damage is None or any("damaged" in line for line in said)
    assert [p.name for p in path.parent.iterdir()] == ["words.txt"]


def test_a_whole_file_is_not_touched(cache, package):
    path = fetch.ensure(package, cache, network=False) / "words.txt"
    before = path.stat().st_mtime_ns
    fetch.ensure(package, cache, network=False)
    assert path.stat().st_mtime_ns == before


def test_a_damaged_archive_without_network(cache, package):
    (cache / package.archive).write_bytes(b"PK")
    with pytest.raises(DataError) as error:
        fetch.ensure(package, cache, network=False)
    assert len(str(error.value).splitlines()) == 3 and "--data" in str(error.value)
    assert not (cache / package.folder).exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written(cache, package):
    cache.chmod(0o500)
    with pytest.raises(DataError, match="PEFT_FAST_CACHE"):
        fetch.ensure(package, cache, network=False)


def test_a_file_where_the_folder_should_be(cache, package):
    (cache / package.folder).write_text("in the way")
    with pytest.raises(DataError) as error:
        fetch.ensure(package, cache, network=False)
    assert "PEFT_FAST_CACHE" in str(error.value)
