"""The CUDA part of the build: what PEFT_FAST_CUDA_ARCHS means, and that nvcc's troubles never cost the CPU kernels."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from peft_fast import build_cuda
from tests.install.calls import call, info_of, load

pytestmark = pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler named c++")
ALL = build_cuda.ARCHS
# what build_cuda asks of an nvcc, and c++ in the place of its compiler
NVCC = """#!/bin/bash
case "$*" in
  --version) echo "Cuda compilation tools, release {version}, V{version}.1"; exit;;
  --list-gpu-arch) printf 'compute_80\\ncompute_86\\ncompute_89\\ncompute_90\\n'; exit;;
  --dryrun*) echo "#\\$ TOP={home}" >&2; exit;;
esac
echo "$*" >> {home}/calls
[ -e {home}/broken ] && {{ echo "kernel.cu(1): error: this nvcc is broken" >&2; exit 1; }}
args=()
for arg in "$@"; do case $arg in -gencode=*|-Xptxas=*|-Xcompiler=*) ;; *) args+=("$arg");; esac; done
exec c++ -fPIC -x c++ "${{args[@]}}"
"""
KERNEL = 'extern "C" __attribute__((visibility("default"))) int kernel() { return 5; }\n'
TELLS = """
extern "C" __attribute__((visibility("default"))) int told() {
#if defined(PEFT_FAST_CUDA_ARCHS) && defined(PEFT_FAST_HOPPER)
  return 2;
#elif defined(PEFT_FAST_CUDA_ARCHS)
  return 1;
#else
  return 0;
#endif
}
"""


@pytest.fixture
def toolkit(clone, tmp_path, monkeypatch):
    """A CUDA part in the clone, and a toolkit that compiles it."""
    (clone / "csrc" / "cuda").mkdir()
    (clone / "csrc" / "cuda" / "kernel.cu").write_text(KERNEL)
    (clone / "csrc" / "cuda" / "hopper.cu").write_text(KERNEL.replace("kernel()", "hopper()"))
    (clone / "csrc" / "cuda" / "operators.cpp").write_text(TELLS)
    home = tmp_path / "toolkit"
    (home / "lib64").mkdir(parents=True)
    subprocess.run(["ar", "rc", str(home / "lib64" / "libcudart_static.a")], check=True)
    install(home)
    monkeypatch.setenv("CUDACXX", str(home / "nvcc"))
    monkeypatch.delenv(build_cuda.VARIABLE, raising=False)
    return home


def install(home: Path, version: str = "12.4"):
    (home / "nvcc").write_text(NVCC.format(home=home, version=version))
    (home / "nvcc").chmod(0o755)


@pytest.mark.parametrize(
    "text, archs",
    [
        ("", None),
        ("  ", None),
        ("none", ()),
        ("NONE", ()),
        ("80", ("80",)),
        ("90", ("90a",)),
        ("9.0", ("90a",)),
        ("120;80", ("80", "120")),
        ("8.6, 90a 90", ("86", "90a")),
        (";".join(ALL), ALL),
    ],
)
def test_what_the_variable_means(text, archs):
    assert build_cuda.asked(text) == archs


@pytest.mark.parametrize("text", ["banana", "75", "80,none", "sm_80", "80 8.7", "all"])
def test_a_wrong_word_is_named_with_the_right_ones(text):
    with pytest.raises(build_cuda.WrongArchs) as wrong:
        build_cuda.asked(text)
    assert repr(text) in str(wrong.value) and "80, 86, 89, 90a, 100, 120, native or none" in str(wrong.value)


@pytest.mark.parametrize(
    "gpus, archs",
    [
        ("9.0\n9.0\n", ("90a",)),
        ("8.0\n12.0\n", ("80", "120")),
        ("8.7\n", ("86",)),
        ("10.3\n", ("100",)),
        ("11.0\n", ("80",)),
    ],
)
def test_native_is_what_the_gpus_here_run(tmp_path, monkeypatch, gpus, archs):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{gpus}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert build_cuda.asked("native") == archs


def test_native_without_a_gpu_leaves_the_kernels_out(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(build_cuda.NoCuda, match="shows no GPU"):
        build_cuda.asked("native")


def test_a_wrong_word_stops_the_build_but_no_install(clone):
    env = {**os.environ, build_cuda.VARIABLE: "80,banana"}
    script = [sys.executable, str(clone / "peft_fast" / "build.py")]
    done = subprocess.run(script, env=env, text=True, capture_output=True)
    assert done.returncode == 1 and "'banana' is none of" in done.stdout and "what to do: set PEFT" in done.stdout
    assert not info_of(clone)["ok"] and info_of(clone)["cuda"]["archs"] == ""


@pytest.mark.parametrize("ninja", [True, False], ids=["ninja", "plain"])
def test_kernels_are_compiled_and_linked(clone, toolkit, monkeypatch, ninja):
    build = load(clone)
    if not ninja:
        monkeypatch.setattr(build, "find_ninja", lambda: None)
    info = build.build(log=lambda _: None)
    assert info["ok"] and info["cuda"] == {
        "archs": "80;86;89;90a",  # those that this nvcc knows
        "ptx": "80",
        "nvcc": str(toolkit / "nvcc"),
        "nvcc_version": "12.4",
        "reason": "",
    }
    library = clone / "peft_fast" / build.LIBRARY
    assert call(library, "kernel") == call(library, "hopper") == 5 and call(library, "told") == 2
    commands = {line.split(" -c ")[1].split("csrc/cuda/")[1].split()[0]: line for line in calls(toolkit)}
    assert commands["kernel.cu"].count("-gencode") == 5 and "code=compute_80" in commands["kernel.cu"]
    assert "arch=compute_90a,code=sm_90a" in commands["kernel.cu"]
    assert commands["hopper.cu"].count("-gencode") == 1 and "code=sm_90a" in commands["hopper.cu"]


def calls(toolkit: Path) -> list[str]:
    return (toolkit / "calls").read_text().splitlines()


def test_hoppers_file_is_compiled_for_hopper_alone(clone, toolkit, monkeypatch):
    monkeypatch.setenv(build_cuda.VARIABLE, "80")
    build = load(clone)
    info = build.build(log=lambda _: None)
    assert info["ok"] and info["cuda"]["archs"] == "80"
    assert call(clone / "peft_fast" / build.LIBRARY, "told") == 1
    assert len(calls(toolkit)) == 1 and "kernel.cu" in calls(toolkit)[0]
    monkeypatch.setenv(build_cuda.VARIABLE, "90")  # another choice compiles again
    assert build.build(log=lambda _: None)["cuda"]["archs"] == "90a"
    assert call(clone / "peft_fast" / build.LIBRARY, "told") == 2


@pytest.mark.parametrize("ninja", [True, False], ids=["ninja", "plain"])
def test_an_nvcc_that_fails_leaves_the_cpu_kernels(clone, toolkit, monkeypatch, ninja):
    (toolkit / "broken").touch()
    build, log = load(clone), []
    if not ninja:
        monkeypatch.setattr(build, "find_ninja", lambda: None)
    info = build.build(log=log.append)
    assert info["ok"] and len(info["built"]) == 2, info["reason"]
    assert info["cuda"]["archs"] == "" and "this nvcc is broken" in info["cuda"]["reason"]
    assert any("once more without the CUDA kernels" in line for line in log)
    library = clone / "peft_fast" / build.LIBRARY
    assert call(library, "told") == 0 and call(library, "isa_avx2") == 1


def test_broken_cpu_sources_are_not_put_down_to_nvcc(clone, toolkit):
    (clone / "csrc" / "schema.cpp").write_text("int schema( { return 1; }\n")
    info = load(clone).build(log=lambda _: None)
    assert not info["ok"] and "schema.cpp:1" in info["reason"] and not info["cuda"]["reason"]


def test_no_nvcc(clone, toolkit, monkeypatch):
    monkeypatch.setenv("CUDACXX", "/nonexistent/nvcc")
    info = load(clone).build(log=lambda _: None)
    assert info["ok"] and info["cuda"] == {"archs": "", "reason": "CUDACXX=/nonexistent/nvcc does not run"}


REFUSALS = {
    "an old nvcc": ("11.8", "", "nvcc 11.8 is older than 12.0"),
    "an architecture it does not know": ("12.4", "100,80", "nvcc 12.4 does not know compute capability 100"),
    "no runtime to link": ("12.4", "", "libcudart_static.a is not in"),
    "left out": ("12.4", "none", "PEFT_FAST_CUDA_ARCHS=none left them out"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_toolkit_that_cannot_be_used_is_a_reason(clone, toolkit, monkeypatch, case):
    version, archs, reason = REFUSALS[case]
    install(toolkit, version)
    monkeypatch.setenv(build_cuda.VARIABLE, archs)
    if case == "no runtime to link":
        (toolkit / "lib64" / "libcudart_static.a").unlink()
    with pytest.raises(build_cuda.NoCuda, match=reason):
        build_cuda.find(clone / "csrc")


def test_as_many_compilers_as_the_memory_holds(clone, monkeypatch):
    steps = load(clone).steps_of
    free = {"/proc/meminfo": 3.5 * 2**30, "/sys/fs/cgroup/memory.max": None, "/sys/fs/cgroup/memory.current": None}
    monkeypatch.setattr(steps, "_number", lambda pattern, path, unit: free[path])
    assert [steps.jobs_that_fit(n) for n in (1, 3, 8)] == [1, 3, 3]
    free |= {"/sys/fs/cgroup/memory.max": 4 * 2**30, "/sys/fs/cgroup/memory.current": 1.5 * 2**30}
    assert steps.jobs_that_fit(8) == 2
    free["/proc/meminfo"] = 1
    assert steps.jobs_that_fit(8) == 1
