"""Files of Debian's archive by its own client, without root and without installing anything.

Package lists that are missing or stale are refreshed in a temporary folder of ours: apt checks their signatures as
it always does, and the machine's own lists stay as they are.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

HELPER = Path("/usr/lib/apt/apt-helper")
# hooks of the machine's own apt may need root; downloads go to a folder that apt's own user may not enter
OPTIONS = """\
Dir::State::lists "{folder}/lists";
Dir::Cache "{folder}/cache";
APT::Sandbox::User "root";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear Acquire::Languages;
Acquire::Languages {{ {languages} }};
Acquire::Retries "1";
Acquire::http::Timeout "20";
Acquire::https::Timeout "20";
"""


def download(package: str, folder: Path) -> str | None:
    """Puts the .deb of ``package`` into ``folder``; else what apt says is wrong."""
    if missing := _missing("apt-get", "dpkg-deb"):
        return missing
    first = _run("apt-get", "download", "--quiet", "-o", "APT::Sandbox::User=root", package, cwd=folder)
    if not first.returncode:
        return None
    wrong, options = _updated(folder)
    if wrong:
        return wrong
    second = _run("apt-get", "-c", str(options), "download", "--quiet", package, cwd=folder)
    return _reason(second) if second.returncode else None


def members(archive: Path) -> Callable[[str], bytes]:
    """name -> content in a .deb; a name that ends in / is all below it as one tar, the same bytes every time."""
    packed = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(archive)], capture_output=True)
    if packed.returncode:
        raise OSError(_reason(packed))
    contents = tarfile.open(fileobj=io.BytesIO(packed.stdout))

    def read(name: str) -> bytes:
        if name.endswith("/"):
            return _pack(contents, f"./{name}")
        return contents.extractfile(f"./{name}").read()

    return read


def translations(languages: Sequence[str], folder: Path) -> dict[str, bytes] | str:
    """Descriptions of all packages of the machine's distribution by language; else what is wrong."""
    if missing := _missing("apt-get", str(HELPER)):
        return missing
    wrong, options = _updated(folder, languages)
    if wrong:
        return wrong
    found: dict[str, bytes] = {}
    listed = _run("apt-get", "-c", str(options), "indextargets", "--format", "$(LANGUAGE) $(FILENAME)")
    for line in sorted(listed.stdout.splitlines()):
        language, _, path = line.partition(" ")
        if language in languages:
            # apt keeps its lists compressed in a way of its own choice
            content = subprocess.run([str(HELPER), "cat-file", path], capture_output=True).stdout
            found[language] = found.get(language, b"") + content + b"\n\n"
    lacking = [language for language in languages if not found.get(language, b"").strip()]
    return f"this distribution has no descriptions in {', '.join(lacking)}" if lacking else found


def _updated(folder: Path, languages: Sequence[str] = ("none",)) -> tuple[str | None, Path]:
    """(what went wrong, options of an apt whose lists are fresh and in ``folder``)."""
    home = Path(tempfile.mkdtemp(prefix="apt-", dir=folder))
    for name in ("lists/partial", "cache/archives/partial"):
        (home / name).mkdir(parents=True)
    options = home / "apt.conf"
    options.write_text(OPTIONS.format(folder=home, languages=" ".join(f'"{name}";' for name in languages)))
    result = _run("apt-get", "-c", str(options), "update", "--quiet")
    return (_reason(result) if result.returncode else None), options


def _missing(*programs: str) -> str | None:
    lacking = [program for program in programs if not shutil.which(program)]
    return f"no {' and no '.join(lacking)} here: not a Debian or Ubuntu system" if lacking else None


def _run(*command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["env", "LC_ALL=C", *command], capture_output=True, text=True, errors="replace", cwd=cwd)


def _reason(result: subprocess.CompletedProcess) -> str:
    """The first error of apt or dpkg, else their last line."""
    text = result.stderr if isinstance(result.stderr, str) else result.stderr.decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("E: ") for line in lines if line.startswith("E: ")]
    return (errors or lines[-1:] or ["no message"])[0]


def _pack(contents: tarfile.TarFile, prefix: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as packed:
        for member in sorted(contents.getmembers(), key=lambda member: member.name):
            if member.isreg() and member.name.startswith(prefix):
                plain = tarfile.TarInfo(member.name.removeprefix(prefix))
                plain.size = member.size
                packed.addfile(plain, contents.extractfile(member))
    return buffer.getvalue()
