"""`python -m peft_fast run script.py args…`: an unmodified script, as Python runs it, with PEFT made fast."""

from __future__ import annotations

import atexit
import builtins
import importlib.machinery
import io
import os
import runpy
import sys
import types

from peft_fast import settings
from peft_fast.errors import UnsupportedError, fail

USAGE = """usage: {prog} [-q] script.py [args …]
       {prog} [-q] -m module [args …]

Runs the script as `python script.py args …` would, with `import peft_fast.auto` in front: every PEFT LoRA
layer in this process is fast. A line on stderr at exit says how many calls were (-q: no line). Processes that
the script starts are on their own; under torchrun, use `torchrun … -m peft_fast run script.py`."""


def app(args: list[str], prog_name: str) -> int:
    """Runs the script; its exit status, its exceptions and its SystemExit come out as without peft_fast."""
    quiet = bool(args) and args[0] in ("-q", "--quiet")
    args = args[1:] if quiet else args
    if not args or args[0] in ("-h", "--help"):
        print(USAGE.format(prog=prog_name))
        return 0 if args else 2
    if args[0] == "-m" and len(args) == 1:
        fail(UnsupportedError, "-m without a module", "a module's name", f"run {prog_name} -m package.module")
    if args[0] != "-m" and not os.path.exists(args[0]):
        given, need = f"the script {args[0]!r}, which does not exist", "a Python file, or -m and a module"
        fail(UnsupportedError, given, need, f"see {prog_name} --help")

    import peft_fast.auto  # noqa: F401

    if not quiet and not settings.get().quiet:
        atexit.register(_last_line)
    try:
        _run(args)
    except SystemExit:
        raise
    except BaseException as error:
        return _as_python(error)
    return 0


def _run(args: list[str]) -> None:
    # sys.path[0] is the current folder now; Python puts the script's folder there, or the current one for -m
    if args[0] == "-m":
        sys.argv = args[1:]
        sys.path[0] = os.getcwd()
        runpy.run_module(args[1], run_name="__main__", alter_sys=True)
        return
    sys.argv = args
    if not os.path.isfile(args[0]):  # a folder or an archive with a __main__.py
        runpy.run_path(args[0], run_name="__main__")
        return
    sys.path[0] = os.path.dirname(os.path.realpath(args[0]))
    path = os.path.abspath(args[0])
    # not run_path: it changes sys.argv[0], and takes __main__ away before threads and atexit functions end
    module = types.ModuleType("__main__")
    module.__file__ = path
    module.__loader__ = importlib.machinery.SourceFileLoader("__main__", path)
    module.__builtins__ = builtins
    sys.modules["__main__"] = module
    with io.open_code(path) as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)
    exec(code, module.__dict__)


def _as_python(error: BaseException) -> int:
    """Reports an exception as Python does, without the frames of this file and runpy; the exit status."""
    error = error.with_traceback(_script_frames(error.__traceback__))
    sys.excepthook(type(error), error, error.__traceback__)
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def _script_frames(tb: types.TracebackType | None) -> types.TracebackType | None:
    ours = {__file__, runpy.__file__, "<frozen runpy>"}
    first = tb
    while first is not None and first.tb_frame.f_code.co_filename in ours:
        first = first.tb_next
    return first


def _last_line() -> None:
    if "peft.tuners.lora.layer" not in sys.modules:
        print("peft_fast: the script did not import PEFT's LoRA layers", file=sys.stderr)
        return
    from peft_fast.patch import report

    calls = report()
    why = "; ".join(f"{n:,} {reason}" for reason, n in calls.handed_back.items())
    print(calls.calls() + (f" ({why})" if why else ""), file=sys.stderr)
