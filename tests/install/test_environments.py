"""pip in whole environments: isolated or not, editable or not, without torch; never a second torch."""

import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.install.calls import pip, python

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler named c++"),
]


def packages(executable: str) -> Path:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.run([executable, "-c", code], text=True, capture_output=True, check=True).stdout.strip())


@pytest.fixture
def environment(tmp_path) -> str:
    """The python of a fresh environment that holds this one's packages, as links, without ours."""
    venv.create(tmp_path / "venv", with_pip=True, symlinks=True)
    executable = str(tmp_path / "venv" / "bin" / "python")
    there = packages(executable)
    for old in there.glob("setuptools*"):  # venv brings an old one on some Pythons
        shutil.rmtree(old)
    for path in packages(sys.executable).iterdir():
        ours = "peft_fast" in path.name or path.suffix in (".pth", ".egg-link") or path.name == "__pycache__"
        if not ours and not (there / path.name).exists():
            (there / path.name).symlink_to(path)
    return executable


@pytest.fixture(scope="session")
def wheelhouse(tmp_path_factory) -> Path:
    """A folder with the one package that an isolated build asks for."""
    folder = tmp_path_factory.mktemp("wheelhouse")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), "setuptools>=64"]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("setuptools cannot be downloaded here")
    return folder


@pytest.mark.parametrize("editable", [False, True], ids=["regular", "editable"])
@pytest.mark.parametrize("isolated", [False, True], ids=["plain", "isolated"])
def test_pip_install(checkout, environment, wheelhouse, tmp_path, isolated, editable):
    args = ["--find-links", str(wheelhouse)] if isolated else ["--no-build-isolation"]
    out = pip("install", *args, *(["--editable"] if editable else []), ".", python=environment, cwd=checkout)
    assert "Collecting torch" not in out and "Requirement already satisfied: torch>=2.11" in out
    code = """
import peft_fast, peft_fast.kernels, peft_fast.benchmarks.stats
from peft_fast import native
print(native.load(), native.reason()); print(peft_fast.__file__); print(peft_fast.kernels.__path__[-1])
"""
    loads, file, kernels = python(code, tmp_path, executable=environment).splitlines()
    assert loads.strip() == "True"
    home = checkout if editable else packages(environment)
    assert Path(file) == home / "peft_fast" / "__init__.py"
    assert Path(kernels) == (checkout / "kernels" if editable else home / "peft_fast" / "kernels")
    script = Path(environment).with_name("peft-fast")
    assert subprocess.run([script, "--help"], capture_output=True).returncode == 0


@pytest.mark.parametrize("editable", [False, True], ids=["regular", "editable"])
def test_pip_install_without_a_compiler(checkout, environment, tmp_path, editable):
    args = ["--no-build-isolation", *(["--editable"] if editable else [])]
    pip("install", *args, ".", python=environment, cwd=checkout, CXX="no-such-compiler")
    code = "from peft_fast import native; print(native.load(), native.reason())"
    assert "False" in python(code, tmp_path, executable=environment)
    assert "no-such-compiler" in python(
        "from peft_fast.cli import doctor; print(doctor.gather()['to_do'])", tmp_path, executable=environment
    )


def test_pip_uninstall_leaves_nothing(checkout, environment):
    pip("install", "--no-build-isolation", ".", python=environment, cwd=checkout)
    pip("uninstall", "--yes", "peft_fast", python=environment)
    assert not (packages(environment) / "peft_fast").exists()


def test_an_environment_without_torch(checkout, tmp_path, wheelhouse):
    venv.create(tmp_path / "venv", with_pip=True, symlinks=True)
    executable = str(tmp_path / "venv" / "bin" / "python")
    args = ("install", "--no-deps", "--find-links", str(wheelhouse), ".")
    pip(*args, python=executable, cwd=checkout)
    command = [executable, "-m", "peft_fast", "build"]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 1 and "torch is not installed" in done.stdout
    done = subprocess.run([*command[:-1], "doctor"], cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 1 and "pip install 'torch>=2.11'" in done.stderr and "Traceback" not in done.stderr
