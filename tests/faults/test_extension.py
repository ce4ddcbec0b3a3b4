"""A missing, damaged or strange extension: plain torch takes over, and the reason says why."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from peft_fast import build, native
from peft_fast.cli import doctor

CODE = """
import sys
from pathlib import Path
from peft_fast import native
native.LIBRARY = Path(sys.argv[1])
import torch, peft_fast
from peft_fast import dispatch, ops

x, W = torch.ones(3, 8, requires_grad=True), torch.ones(4, 8)
adapter = ops.Adapter(torch.ones(2, 8), torch.ones(4, 2), 0.5)
y = ops.lora_linear(x, W, adapters=[adapter])
y.sum().backward()
assert torch.equal(y, torch.full((3, 4), 16.0)) and torch.equal(x.grad, torch.full((3, 8), 8.0))
assert "cpu" in [name for name, live, why in dispatch.backends() if not live]
print(native.load(), native.reason())
try:
    ops.lora_linear(x, W, adapters=[adapter], backend="cpu")
except peft_fast.errors.PeftFastError as error:
    print(len(str(error).splitlines()))
"""

# content, or the share of the real library that is left
DAMAGED = {"empty": b"", "text": b"not a library\n", "a tenth": 0.1, "most": 0.95}


def run(root: Path, library: Path) -> list[str]:
    command = [sys.executable, "-c", CODE, str(library)]
    done = subprocess.run(command, cwd=root, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_missing(root, tmp_path):
    state, lines = run(root, tmp_path / "libpeft_fast.so")
    assert state.startswith("False ") and state.endswith(" is not built; run `python -m peft_fast build`")
    assert lines == "3"


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged(root, tmp_path, kind):
    path, content = tmp_path / "libpeft_fast.so", DAMAGED[kind]
    if isinstance(content, float):
        if not native.LIBRARY.exists():
            pytest.skip("there is no extension to cut short")
        blob = native.LIBRARY.read_bytes()
        content = blob[: int(len(blob) * content)]
    path.write_bytes(content)
    state, lines = run(root, path)
    assert state.startswith("False libpeft_fast.so does not load (") and "run `python -m peft_fast build`" in state
    assert lines == "3"


def test_a_library_of_older_sources(root, tmp_path):
    """An update of the Python files alone, as `git pull` makes it, must not end in a traceback."""
    if not native.LIBRARY.exists():
        pytest.skip("there is no extension to make older")
    blob, path = native.LIBRARY.read_bytes(), tmp_path / "libpeft_fast.so"
    for here in (b"lora_group_backward(", b"\0lora_group_backward\0"):  # its schema, its kernel
        assert here in blob
        blob = blob.replace(here, here.replace(b"group", b"grope"))
    path.write_bytes(blob)
    state, lines = run(root, path)
    assert state.startswith("False libpeft_fast.so does not load (") and lines == "3"


@pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler named c++")
def test_a_library_that_is_not_ours(root, tmp_path):
    path = tmp_path / "libpeft_fast.so"
    (tmp_path / "other.cpp").write_text("int other() { return 1; }\n")
    subprocess.run(["c++", "-shared", "-fPIC", str(tmp_path / "other.cpp"), "-o", str(path)], check=True)
    state, lines = run(root, path)
    assert state.startswith("False libpeft_fast.so does not load (") and lines == "3"


@pytest.mark.parametrize("share", [0, 0.1, 0.9])
def test_a_damaged_module(root, tmp_path, share):
    """Without peft_fast._C nothing is known about the processor, and nothing else changes."""
    whole = root / "peft_fast" / build.MODULE
    if not whole.exists():
        pytest.skip("there is no module to damage")
    shutil.copytree(root / "peft_fast", tmp_path / "peft_fast", ignore=shutil.ignore_patterns("*.so"))
    blob = whole.read_bytes()
    (tmp_path / "peft_fast" / build.MODULE).write_bytes(blob[: int(len(blob) * share)])
    code = "from peft_fast import native; print(native.capabilities(), native.load())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True, capture_output=True)
    assert (done.returncode, done.stdout) == (0, "{} False\n"), done.stderr


@pytest.mark.parametrize("text", ["", "{", "[]", '{"ok": true}', None])
def test_a_damaged_build_info(monkeypatch, tmp_path, capsys, text):
    if text is not None:
        (tmp_path / build.INFO).write_text(text)
    assert build.read_info(tmp_path) == {}
    monkeypatch.setattr(build, "read_info", lambda: {})
    report = doctor.gather()
    json.dumps(report)
    doctor.show(report)
    assert "C++ kernels" in capsys.readouterr().out
