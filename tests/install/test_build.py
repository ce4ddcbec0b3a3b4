"""peft_fast/build.py on a small clone: what it builds, and what it says when it cannot."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.install.calls import call, info_of, load

OLD_COMPILER = """#!/bin/bash
for flag in "$@"; do
  case $flag in -mamx*|-mavx512bf16) echo "error: unrecognized option $flag" >&2; exit 1;; esac
done
exec c++ "$@"
"""

pytestmark = pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler named c++")


def test_builds_both_files_and_says_with_what(clone):
    log = []
    info = load(clone).build(log=log.append)
    assert info["ok"] and not info["reason"]
    assert set(info["built"]) == {p.name for p in (clone / "peft_fast").glob("*.so")} and len(info["built"]) == 2
    assert info == info_of(clone)
    for key in (
        "compiler",
        "compiler_version",
        "torch",
        "python",
        "flags",
        "isa_flags",
        "sources_hash",
        "date",
    ):
        assert info[key], key
    assert any("cpu/isa_avx2.cpp" in line for line in log)


def test_unchanged_sources_compile_nothing(clone):
    build = load(clone)
    build.build(log=lambda _: None)
    files = list((clone / "peft_fast").glob("*.so"))
    before = [(f.stat().st_ino, f.stat().st_mtime_ns) for f in files]
    log = []
    assert build.build(log=log.append)["ok"]
    assert [(f.stat().st_ino, f.stat().st_mtime_ns) for f in files] == before
    assert not any(".cpp" in line for line in log)


def test_a_changed_source_changes_the_library_and_the_hash(clone):
    build = load(clone)
    before = build.build(log=lambda _: None)
    source = clone / "csrc" / "cpu" / "isa_avx2.cpp"
    source.write_text(source.read_text().replace("return 1", "return 7"))
    assert build.sources_hash() != before["sources_hash"]
    log = []
    build.build(log=log.append)
    assert call(clone / "peft_fast" / build.LIBRARY, "isa_avx2") == 7
    assert not any("schema.cpp" in line for line in log)


def test_a_file_whose_flags_the_compiler_does_not_know_is_built_without_them(clone, tmp_path, monkeypatch):
    compiler = tmp_path / "old-c++"
    compiler.write_text(OLD_COMPILER)
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    build = load(clone)
    info = build.build(log=lambda _: None)
    assert info["ok"]
    assert info["isa_flags"]["isa_amx.cpp"] == info["isa_flags"]["isa_avx512_bf16.cpp"] == build.UNAVAILABLE
    assert call(clone / "peft_fast" / build.LIBRARY, "isa_amx") == 0


def test_no_isa_flags_on_another_processor(clone, monkeypatch):
    build = load(clone)
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    assert set(build.build(log=lambda _: None)["isa_flags"].values()) == {build.UNAVAILABLE}


def test_portable_objects_come_first_on_the_link_line(clone):
    build = load(clone)
    names = ["isa_amx.cpp", "isa_avx2.cpp", "isa_portable.cpp", "gemm.cpp", "isa_avx512.cpp"]
    ordered = [p.name for p in sorted((Path(n) for n in names), key=build._link_order)]
    assert ordered == ["gemm.cpp", "isa_portable.cpp", "isa_avx2.cpp", "isa_avx512.cpp", "isa_amx.cpp"]


def test_without_ninja_the_same_files_come_out(clone, monkeypatch):
    build = load(clone)
    monkeypatch.setattr(build, "find_ninja", lambda: None)
    info = build.build(log=lambda _: None)
    assert info["ok"] and len(info["built"]) == 2
    assert call(clone / "peft_fast" / build.LIBRARY, "isa_avx2") == 1


@pytest.mark.parametrize("ninja", [True, False], ids=["ninja", "plain"])
def test_a_broken_file_spoils_only_its_own_target(clone, monkeypatch, ninja):
    build = load(clone)
    assert build.build(log=lambda _: None)["ok"]  # so that there is an old _C to be mistaken for a new one
    if not ninja:
        monkeypatch.setattr(build, "find_ninja", lambda: None)
    (clone / "csrc" / "module.cpp").write_text("int module_( { return 1; }\n")
    info = build.build(log=lambda _: None)
    assert not info["ok"] and not info["machine"]
    assert info["built"] == [build.LIBRARY]
    assert "module.cpp:1" in info["reason"] and "error" in info["reason"]


REFUSALS = {
    "no compiler": ({"PATH": "/nonexistent", "CXX": ""}, "no C++ compiler"),
    "CXX does not run": ({"CXX": "no-such-compiler"}, "CXX=no-such-compiler does not run"),
    "MAX_JOBS is a word": ({"MAX_JOBS": "many"}, "MAX_JOBS='many' is not a positive number"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_is_a_reason_and_a_remedy(clone, case):
    env, reason = REFUSALS[case]
    script = [sys.executable, str(clone / "peft_fast" / "build.py")]
    run = {"env": {**os.environ, **env}, "text": True, "capture_output": True}
    done = subprocess.run(script, **run)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert reason in done.stdout and "what to do:" in done.stdout
    assert reason in info_of(clone)["reason"] and info_of(clone)["do"]
    assert not list((clone / "peft_fast").glob("*.so"))
    assert subprocess.run([*script, "--if-possible"], **run).returncode == 0


@pytest.mark.parametrize("version, reason", [("2.10.1", "torch 2.10.1 is too old"), ("2.13.0", "has no C++ headers")])
def test_a_torch_it_cannot_use(clone, tmp_path, monkeypatch, version, reason):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text(f"__version__ = '{version}'\n")
    build = load(clone)
    monkeypatch.setattr(build.machine, "package_dir", lambda name: tmp_path / name)
    assert reason in build.build(log=lambda _: None)["reason"]


def test_no_torch(clone, monkeypatch):
    build = load(clone)
    monkeypatch.setattr(build.machine, "package_dir", lambda name: None)
    assert "torch is not installed" in build.build(log=lambda _: None)["reason"]


def test_other_systems_go_without(clone, monkeypatch):
    build = load(clone)
    monkeypatch.setattr(build.sys, "platform", "win32")
    info = build.build(log=lambda _: None)
    assert not info["ok"] and info["machine"] and "Linux only" in info["reason"]


def test_build_py_is_the_standard_library_alone(root):
    """An isolated build has setuptools and nothing else; -S leaves no package to import."""
    code = "import runpy, sys; runpy.run_path(sys.argv[1])"
    command = [sys.executable, "-I", "-S", "-c", code, str(root / "peft_fast" / "build.py")]
    done = subprocess.run(command, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")
