"""csrc/ → peft_fast/libpeft_fast.so (operators, LibTorch stable ABI) and peft_fast/_C.*.so (pybind11).

setup.py loads this file by path, `python -m peft_fast build` calls it, and `python peft_fast/build.py` runs it
alone. It imports neither torch nor the package; beside it, build_machine.py knows what is installed, build_cuda.py
knows nvcc and build_steps.py runs the compilers. Where it cannot build, it does not raise: the reason goes to
peft_fast/build_info.json, and the package works without, or without the CUDA kernels alone.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent
IS_CLONE = (ROOT / "setup.py").is_file() and (ROOT / "csrc").is_dir()
LIBRARY = "libpeft_fast.so"
MODULE = "_C" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")
INFO = "build_info.json"
MODULE_SOURCE = "module.cpp"
TORCH_TARGET_VERSION = "0x020b000000000000"  # the stable ABI of build_machine.MIN_TORCH

# no -ffast-math: NaN and Inf must reach the output
BASE_FLAGS = (
    "-std=c++20 -O3 -fPIC -fvisibility=hidden -fvisibility-inlines-hidden "
    "-fno-math-errno -fno-trapping-math -ffp-contract=fast -fno-strict-aliasing -Wall"
).split()

Log = Callable[[str], None]


def _sibling(name: str):
    """A file beside this one, wherever this one was loaded from."""
    spec = importlib.util.spec_from_file_location(f"peft_fast_{name}", PACKAGE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


machine, cuda, steps_of = _sibling("build_machine"), _sibling("build_cuda"), _sibling("build_steps")
CannotBuild, ISA_FILES, UNAVAILABLE = machine.CannotBuild, machine.ISA_FILES, machine.UNAVAILABLE
find_torch, find_compiler, find_ninja = machine.find_torch, machine.find_compiler, machine.find_ninja
Step = steps_of.Step


def csrc_dir() -> Path:
    """The C++ sources: beside the package in a clone, inside it in an installed wheel."""
    folder = (ROOT if IS_CLONE else PACKAGE) / "csrc"
    if not (folder / MODULE_SOURCE).is_file():
        raise CannotBuild(f"there are no C++ sources in {folder}", "install again from a complete checkout")
    return folder


def default_build_dir() -> Path | None:
    """<root>/build/native in a clone; None (a temporary folder) for an installed package."""
    return ROOT / "build" / "native" if IS_CLONE else None


# ---- what has to be done


def _link_order(source: Path) -> tuple[int, str]:
    """Files without ISA flags first, then from the weakest to the strongest instruction set.

    The linker keeps the first copy of an inline function it meets; a copy compiled for AVX-512 must never be
    the one that the portable code calls.
    """
    names = list(ISA_FILES)
    return (names.index(source.name) + 1 if source.name in names else 0, source.as_posix())


def _has_python_headers() -> bool:
    return (Path(sysconfig.get_path("include")) / "Python.h").is_file()


def plan(
    compiler: str, torch: Path, torch_version: str, csrc: Path, toolkit: cuda.Toolkit | None = None
) -> tuple[list[Step], dict]:
    """Every compile and link step, with CUDA kernels where there is a toolkit, and the per-file ISA flags."""
    isa = machine.isa_flags(compiler)
    cxx = (*shlex.split(compiler), *BASE_FLAGS)
    extra = tuple(shlex.split(os.environ.get("CXXFLAGS", "")))
    include = torch / "include"
    torch_flags = (
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
        # never read: it makes ninja rebuild when torch changes
        f'-DPEFT_FAST_TORCH="{torch_version}"',
        f"-I{csrc}",
        f"-isystem{include}",
        f"-isystem{include / 'torch' / 'csrc' / 'api' / 'include'}",
    )
    macros = toolkit.macros() if toolkit else ()
    pybind = include if (include / "pybind11").is_dir() else (machine.package_dir("pybind11") or include) / "include"
    module_flags = (f"-I{csrc}", f"-isystem{pybind}", f"-isystem{sysconfig.get_path('include')}")

    def compile_step(source: Path, flags: tuple[str, ...]) -> Step:
        name, obj = object_of(source)
        files = ("-MD", "-MF", f"{obj}.d", "-c", str(source), "-o", obj)
        told = macros if source.parent.name == "cuda" else ()
        command = (*cxx, *flags, *told, *isa.get(source.name, ()), *extra, *files)
        return Step(obj, (str(source),), command, name, f"{obj}.d", "compile")

    def nvcc_step(source: Path) -> Step:
        name, obj = object_of(source)
        return Step(obj, (str(source),), toolkit.compile(source, csrc, obj), name, f"{obj}.d", "nvcc")

    def object_of(source: Path) -> tuple[str, str]:
        name = source.relative_to(csrc).as_posix()
        return name, name.removesuffix(".cpp").replace("/", "__").replace(".cu", "_cu") + ".o"

    def link_step(output: str, objects: list[Step], flags: tuple[str, ...]) -> Step:
        inputs = tuple(step.output for step in objects)
        command = (*shlex.split(compiler), "-shared", *inputs, "-o", output, *extra, *flags)
        return Step(output, inputs, command, output, None, "link")

    sources = sorted(csrc.rglob("*.cpp"), key=_link_order)
    operators = [compile_step(s, torch_flags) for s in sources if s != csrc / MODULE_SOURCE]
    kernels = [nvcc_step(s) for s in toolkit.sources(csrc)] if toolkit else []
    libs = (f"-L{torch / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10", *(toolkit.link_flags() if toolkit else ()))
    steps = [*kernels, *operators, link_step(LIBRARY, [*operators, *kernels], libs)] if operators else []
    if _has_python_headers():
        module = compile_step(csrc / MODULE_SOURCE, module_flags)
        steps += [module, link_step(MODULE, [module], ())]
    return steps, {name: " ".join(flags) for name, flags in isa.items()}


def sources_hash(csrc: Path | None = None) -> str:
    """Changes when a C++ source, a header or this file changes."""
    csrc = csrc or csrc_dir()
    digest = hashlib.sha256(b"".join(Path(file).read_bytes() for file in (__file__, machine.__file__, cuda.__file__)))
    for path in sorted(p for p in csrc.rglob("*") if p.suffix in (".cpp", ".h", ".hpp", ".cu", ".cuh")):
        digest.update(path.relative_to(csrc).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def read_info(folder: Path = PACKAGE) -> dict:
    """What the last build left in build_info.json; empty when there is none, or not a whole one."""
    try:
        info = json.loads((folder / INFO).read_text())
    except (OSError, ValueError):
        return {}
    whole = isinstance(info, dict) and info.keys() >= {"ok", "reason", "do", "built", "python", "date"}
    return info if whole else {}


# ---- doing it


@contextlib.contextmanager
def _locked(build_dir: Path):
    """One build at a time in a folder."""
    import fcntl  # not on Windows, where nothing is built

    build_dir.mkdir(parents=True, exist_ok=True)
    with open(build_dir / ".lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _place(source: Path, target: Path) -> None:
    """Replace `target` in one step: a process that has the old file mapped keeps it."""
    if target.is_file() and target.read_bytes() == source.read_bytes():
        return
    fresh = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copy2(source, fresh)
    os.replace(fresh, target)


def _utc(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).isoformat(timespec="seconds")


def _first_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines()]
    wrong = re.compile(r"\berror\b|undefined reference|cannot find")
    return next((line for line in lines if wrong.search(line)), lines[-1])


def _toolkit(csrc: Path, info: dict) -> cuda.Toolkit | None:
    try:
        toolkit = cuda.find(csrc)
    except cuda.WrongArchs as wrong:
        do = f"set {cuda.VARIABLE} to a list of these, or unset it, and build again"
        raise CannotBuild(str(wrong), do) from wrong
    except cuda.NoCuda as without:
        info["cuda"] = {"archs": "", "reason": str(without)}
        return None
    info["cuda"] = toolkit.info()
    return toolkit


def _build(out_dir: Path, build_dir: Path, jobs: int | None, clean: bool, info: dict, log: Log) -> None:
    if not sys.platform.startswith("linux"):
        raise CannotBuild("the C++ kernels build on Linux only", "nothing: the torch backend is used")
    csrc, jobs = csrc_dir(), jobs or machine.default_jobs()
    torch, info["torch"] = find_torch()
    info["compiler"], info["compiler_version"] = find_compiler()
    ninja = find_ninja()
    toolkit = _toolkit(csrc, info)
    log(f"torch     {info['torch']}  ({torch})")
    log(f"compiler  {info['compiler']}  ({info['compiler_version']})")
    log(f"ninja     {ninja or 'not found: every file is compiled again'}")
    log(f"CUDA      {info['cuda']['reason'] or '{archs}, nvcc {nvcc_version}  ({nvcc})'.format(**info['cuda'])}")
    with _locked(build_dir):
        if clean:
            for path in build_dir.glob("*"):
                path.unlink() if path.name != ".lock" else None
        steps, info["isa_flags"] = plan(info["compiler"], torch, info["torch"], csrc, toolkit)
        for name, flags in info["isa_flags"].items():
            if flags == UNAVAILABLE and any(csrc.rglob(name)):
                log(f"          {name}: this compiler or machine does not know the instruction set")
        info["flags"] = " ".join((*BASE_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))))
        info["sources_hash"] = sources_hash(csrc)

        def run(steps: list[Step]) -> str:
            where = build_dir, jobs, log
            return steps_of.run_ninja(ninja, steps, *where) if ninja else steps_of.run_plain(steps, *where)

        failed = run(steps)
        if toolkit and failed and not (build_dir / LIBRARY).is_file():
            log("once more without the CUDA kernels")
            why, failed = failed, run(plan(info["compiler"], torch, info["torch"], csrc)[0])
            if (build_dir / LIBRARY).is_file():
                info["cuda"] = {"archs": "", "reason": f"nvcc or its linking failed: {_first_error(why)}"}
                log(f"CUDA      {info['cuda']['reason']}")
        out_dir.mkdir(parents=True, exist_ok=True)
        for name in (LIBRARY, MODULE):
            if (build_dir / name).is_file():
                _place(build_dir / name, out_dir / name)
                info["built"].append(name)
                info["date"] = _utc((build_dir / name).stat().st_mtime)
    if failed:
        raise CannotBuild(
            f"the compiler failed: {_first_error(failed)}",
            "run `python -m peft_fast build` to see its log",
            machine=False,
        )
    if not _has_python_headers():
        raise CannotBuild(
            f"Python.h is missing in {sysconfig.get_path('include')}",
            "install them (`apt-get install python3-dev`), then run `python -m peft_fast build`",
        )


def build(
    out_dir: Path | str | None = None,
    build_dir: Path | str | None = None,
    jobs: int | None = None,
    clean: bool = False,
    log: Log = print,
) -> dict:
    """Compile, place the files in `out_dir` (default: the package) and return what build_info.json holds."""
    out_dir = Path(out_dir or PACKAGE).resolve()
    started = time.perf_counter()
    info = {"ok": False, "machine": True, "reason": "", "do": "", "built": []}
    info["python"] = platform.python_version()
    with contextlib.ExitStack() as stack:
        try:
            folder = build_dir or default_build_dir() or stack.enter_context(tempfile.TemporaryDirectory())
            _build(out_dir, Path(folder).resolve(), jobs, clean, info, log)
            info["ok"] = True
        except CannotBuild as why:
            info["reason"], info["do"], info["machine"] = why.reason, why.do, why.machine
        except Exception as why:  # whatever it is, an install must not fail on it
            info["reason"] = f"{type(why).__name__}: {why}"
            info["do"] = "put that right, then run `python -m peft_fast build`"
    info["seconds"] = round(time.perf_counter() - started, 1)
    info.setdefault("date", _utc(time.time()))
    info.setdefault("cuda", {"archs": "", "reason": info["reason"]})
    if info["ok"]:
        log(f"built     {', '.join(str(out_dir / name) for name in info['built'])}  ({info['seconds']} s)")
    else:
        log(f"not built: {info['reason']}\nwhat to do: {info['do']}")
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        (out_dir / INFO).write_text(json.dumps(info, indent=1) + "\n")
    except OSError as why:
        log(f"{out_dir / INFO} not written: {why}")
    return info


def main(argv: list[str] | None = None, prog: str = "python -m peft_fast.build") -> int:
    parser = argparse.ArgumentParser(prog=prog, description="Compile the C++ kernels into the package.")
    parser.add_argument("--clean", action="store_true", help="compile every file again")
    parser.add_argument("--jobs", type=int, metavar="N", help="compilers at once (MAX_JOBS, else all cores)")
    parser.add_argument("--if-possible", action="store_true", help="exit 0 on a machine that cannot build")
    args = parser.parse_args(argv)
    info = build(jobs=args.jobs, clean=args.clean)
    return 0 if info["ok"] or (args.if_possible and info["machine"]) else 1


if __name__ == "__main__":
    sys.exit(main())
