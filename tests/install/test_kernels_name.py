"""The import name `kernels` stays Hugging Face's, also when Python starts in the root of this repository."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import transformers, peft
from transformers import LlamaForCausalLM
from transformers.utils import is_kernels_available
import peft_fast.kernels
import kernels
print(is_kernels_available(), kernels.__file__, peft_fast.kernels.__path__[-1])
"""
# any name: a class if it is spelled like one, else a function that makes decorators which change nothing
STAND_IN = """
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    make = lambda *a, **k: lambda thing: thing
    return type(name, (), {"__init__": lambda self, *a, **k: None}) if name[0].isupper() else make
"""


def start(where: Path, *path: Path) -> subprocess.CompletedProcess:
    """CODE in a python started in `where`, which comes first on its path, before `path`."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run([sys.executable, "-c", CODE], cwd=where, env=env, text=True, capture_output=True, timeout=300)


@pytest.fixture
def site(tmp_path) -> Path:
    """A folder with a stand-in for Hugging Face's package, in a version that transformers takes."""
    (tmp_path / "site" / "kernels").mkdir(parents=True)
    (tmp_path / "site" / "kernels" / "layer").mkdir()
    for module in ("__init__", "layer/__init__", "layer/mode"):
        (tmp_path / "site" / "kernels" / f"{module}.py").write_text(STAND_IN)
    info = tmp_path / "site" / "kernels-0.18.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    (info / "top_level.txt").write_text("kernels\n")
    return tmp_path / "site"


def test_from_the_root_with_hugging_faces_package(root, site):
    done = start(root, site)
    assert done.returncode == 0, done.stderr
    available, file, ours = done.stdout.split()
    assert available == "True" and Path(file).is_relative_to(site)
    assert Path(ours) == root / "kernels"


def test_from_the_root_without_it(root):
    done = start(root)
    assert done.returncode == 0, done.stderr
    available, file, ours = done.stdout.split()
    assert (available, file) == ("False", "None") and Path(ours) == root / "kernels"


def test_an_init_in_a_root_folder_would_break_transformers(root, site, tmp_path):
    """What the rule is for; without this failing, the tests above could not fail either."""
    (tmp_path / "other" / "kernels").mkdir(parents=True)
    (tmp_path / "other" / "kernels" / "__init__.py").touch()
    done = start(tmp_path / "other", root, site)
    assert done.returncode != 0 and "cannot import name" in done.stderr


@pytest.mark.slow
def test_with_the_real_package(root, tmp_path):
    target = tmp_path / "site"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--target",
        str(target),
        "kernels==0.17.2",
    ]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("Hugging Face's kernels cannot be downloaded here")
    done = start(root, target)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.split()[1]).is_relative_to(target)


def test_the_page_names_every_file(root):
    page = (root / "kernels" / "README.md").read_text()
    assert [path.name for path in sorted(root.glob("kernels/*.py")) if f"| `{path.name}` |" not in page] == []
