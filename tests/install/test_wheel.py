"""`pip install .`: the wheel's content, and that it works from elsewhere."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from filelock import FileLock

from tests.install.calls import copy_sources, pip, python

pytestmark = pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler named c++")


@pytest.fixture(scope="module")
def installed(tmp_path_factory, root) -> Path:
    """What `pip install --target` makes of a fresh copy of the sources; one for all xdist workers."""
    base = tmp_path_factory.getbasetemp()
    base = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "wheel"
    with FileLock(f"{base}.lock"):
        if not base.exists():
            base.mkdir()
            checkout = copy_sources(root, base / "checkout")
            args = ("--no-build-isolation", "--no-deps", "--target", str(base / "site"))
            pip("install", *args, ".", cwd=checkout)
    return base / "site"


def test_the_extension_is_in_it_and_loads(installed):
    code = "from peft_fast import native; print(native.load(), native.reason(), native.LIBRARY)"
    assert python(code, installed) == f"True  {installed / 'peft_fast' / 'libpeft_fast.so'}"
    assert "portable" in python("from peft_fast import native; print(native.capabilities())", installed)
    assert json.loads((installed / "peft_fast" / "build_info.json").read_text())["ok"]


def test_an_operator_runs(installed):
    code = """
import torch
from peft_fast import ops
x, W = torch.ones(3, 8), torch.ones(4, 8)
adapter = ops.Adapter(torch.ones(2, 8), torch.ones(4, 2), 0.5)
print(ops.lora_linear(x, W, adapters=[adapter], backend="cpu")[0, 0].item())
"""
    assert python(code, installed) == "16.0"


def test_top_level_folders_are_inside_the_package(installed, root):
    package = installed / "peft_fast"
    for folder, suffix in (
        ("kernels", ".py"),
        ("benchmarks", ".py"),
        ("csrc", ".cpp"),
        ("csrc", ".h"),
        ("csrc", ".cu"),
        ("csrc", ".cuh"),
    ):
        here = {p.relative_to(root / folder) for p in (root / folder).rglob(f"*{suffix}")}
        there = {p.relative_to(package / folder) for p in (package / folder).rglob(f"*{suffix}")}
        assert here <= there, folder
    for name in ("kernels", "benchmarks"):
        code = f"import peft_fast.{name} as m; print(list(m.__path__))"
        assert python(code, installed) == str([str(package / name)])
    names = [f"peft_fast.benchmarks.{p.stem}" for p in (root / "benchmarks").glob("*.py")]
    assert python(f"import {', '.join(names)}; print('ok')", installed) == "ok"


def test_what_the_package_reads_is_in_it(installed, root):
    read = {p for p in (root / "peft_fast").rglob("*") if p.suffix in (".css", ".html", ".js", ".txt")}
    assert all((installed / p.relative_to(root)).is_file() for p in read)


def test_nothing_else_is_installed(installed):
    tops = {p.name.partition("-")[0] for p in installed.iterdir()} - {"__pycache__"}
    assert tops == {"peft_fast", "bin"}
    assert not list(installed.rglob("tests"))


def test_a_neighbour_called_kernels_is_left_alone(installed, tmp_path):
    site = tmp_path / "site"
    shutil.copytree(installed, site)
    for name in ("kernels", "benchmarks"):
        (site / name).mkdir()
        (site / name / "stranger.py").touch()
    code = "import peft_fast.kernels as k, peft_fast.benchmarks as b; print(len(k.__path__), len(b.__path__))"
    assert python(code, site) == "1 1"


def test_it_can_build_itself_again(installed, tmp_path):
    site = tmp_path / "site"
    shutil.copytree(installed, site)
    for library in (site / "peft_fast").glob("*.so"):
        library.unlink()
    assert "run `python -m peft_fast build`" in python("from peft_fast import native; print(native.reason())", site)
    code = "import sys; from peft_fast.__main__ import main; sys.exit(main(['build']))"
    python(code, site, CXXFLAGS="-O0")
    assert python("from peft_fast import native; print(native.load())", site) == "True"


def test_without_a_compiler_it_installs_and_says_why(checkout, tmp_path):
    target = tmp_path / "site"
    args = ("install", "--no-build-isolation", "--no-deps", "--target", str(target), ".")
    pip(*args, cwd=checkout, CXX="no-such-compiler")
    assert not list(target.rglob("*.so"))
    assert "no-such-compiler does not run" in json.loads((target / "peft_fast/build_info.json").read_text())["reason"]
    code = """
import torch
from peft_fast import dispatch, ops
adapter = ops.Adapter(torch.ones(2, 8), torch.ones(4, 2), 0.5)
print(ops.lora_linear(torch.ones(3, 8), torch.ones(4, 8), adapters=[adapter])[0, 0].item())
print([live for name, live, why in dispatch.backends() if name in ("cpu", "cuda")])
"""
    assert python(code, target).splitlines() == ["16.0", "[False, False]"]


def test_leftovers_of_an_earlier_build_stay_out(checkout, tmp_path):
    folder = f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    old = checkout / "build" / folder / "peft_fast"
    for folder in (old, checkout / "peft_fast"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "libpeft_fast.so").write_text("old")
    args = ("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(tmp_path / "dist"), ".")
    pip(*args, cwd=checkout, CXX="no-such-compiler")
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]


def test_a_source_archive_holds_all_that_a_wheel_needs(checkout):
    code = "import setuptools.build_meta as b; print(b.build_sdist('.'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    names = {n.partition("/")[2] for n in tarfile.open(checkout / done.stdout.split()[-1]).getnames()}
    kinds = {".py", ".cpp", ".h", ".cu", ".cuh", ".css"}
    needed = [p for folder in ("csrc", "kernels", "benchmarks", "peft_fast") for p in (checkout / folder).rglob("*")]
    needed = [path for path in needed if path.suffix in kinds]
    assert {path.suffix for path in needed} == kinds
    assert not {path.relative_to(checkout).as_posix() for path in needed} - names
    assert not [n for n in names if n.endswith((".so", "build_info.json"))]
