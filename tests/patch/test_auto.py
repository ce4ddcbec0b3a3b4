"""`import peft_fast.auto` at every place of a script, and `python -m peft_fast run`."""

import os
import subprocess
import sys

import pytest

MODEL = """
import torch
from torch import nn
def make():
    from peft import LoraConfig, get_peft_model
    return get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"]))
"""
TRAIN = "make()(torch.ones(2, 8)).sum().backward()\n"
AUTO = "import peft_fast.auto\n"
CLEAN = """
import inspect, sys, peft.tuners.lora.layer as layer
assert not any(type(finder).__module__ == "peft_fast.auto" for finder in sys.meta_path)
assert type(layer.__loader__).__name__ == "SourceFileLoader" and "exec_module" not in vars(layer.__loader__)
assert "lora_A_keys" in inspect.getsource(Linear.forward)
"""
COUNT = "import peft_fast\nfrom peft_fast import ops\nprint(ops.fast_calls(), peft_fast.report().fast_calls)\n"


@pytest.fixture
def python(root, tmp_path):
    """Runs code or an argument list in an empty folder; returns the finished process."""

    def run(code=None, *args, check=True, **env):
        env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", **env}
        args = ["-c", code] if code is not None else list(args)
        done = subprocess.run([sys.executable, *args], cwd=tmp_path, env=env, text=True, capture_output=True)
        if check:
            assert done.returncode == 0, done.stderr
        return done

    return run


@pytest.mark.parametrize(
    "code",
    [
        AUTO + MODEL + "from peft.tuners.lora import Linear\n" + TRAIN + CLEAN,
        MODEL + "model = make()\n" + AUTO + AUTO + "model(torch.ones(2, 8))\n",
    ],
    ids=["before PEFT", "after the model"],
)
def test_auto_anywhere(python, code):
    done = python(code + COUNT)
    assert (done.stdout, done.stderr) == ("1 1\n", "")


def test_auto_costs_nothing_without_peft(python):
    """A script that never imports PEFT pays for neither torch nor PEFT; without PEFT nothing breaks."""
    done = python(AUTO + "import sys\nprint({'torch', 'peft', 'transformers'} & set(sys.modules))\n")
    assert (done.stdout, done.stderr) == ("set()\n", "")
    done = python(
        "import sys\nsys.modules['peft'] = None\n" + AUTO + "try:\n import peft\nexcept ImportError: print('none')\n"
    )
    assert (done.stdout, done.stderr) == ("none\n", "")


def test_a_failed_import_of_peft_is_pefts_own_error_and_may_be_repeated(python, tmp_path):
    package = tmp_path / "peft" / "tuners" / "lora"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    (package / "layer.py").write_text("raise RuntimeError('broken')\n")
    attempt = "try:\n import peft.tuners.lora.layer\nexcept RuntimeError as error: print(error)\n"
    assert python(AUTO + attempt + attempt).stdout == "broken\nbroken\n"


def test_wrong_setting_is_named_where_auto_is_imported(python):
    done = python(AUTO, check=False, PEFT_FAST_EXACT="perhaps")
    assert done.returncode == 1 and "PEFT_FAST_EXACT" in done.stderr and 'File "<string>", line 1' in done.stderr


SCRIPT = """
import sys, pickle, helper
class Thing: pass
if __name__ == "__main__":
    assert sys.modules["__main__"].__dict__ is globals()
    assert type(pickle.loads(pickle.dumps(Thing()))) is Thing
    print(sys.argv, sys.path[0], __file__, helper.value)
    if sys.argv[-1] == "raise": raise ValueError("from the script")
    if sys.argv[-1] == "interrupt": raise KeyboardInterrupt
    if sys.argv[-1] == "exit": sys.exit(7)
    if sys.argv[-1] == "message": sys.exit("a last word")
"""


@pytest.fixture
def script(tmp_path):
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "helper.py").write_text("value = 'helped'\n")
    (folder / "script.py").write_text(SCRIPT)
    return "scripts/script.py"


RUNS = [[], ["--help", "-q", "--lr=1", "x y"], ["raise"], ["interrupt"], ["exit"], ["message"]]


@pytest.mark.parametrize("args", RUNS, ids=" ".join)
def test_run_is_as_python(python, script, args):
    plain = python(None, script, *args, check=False)
    ours = python(None, "-m", "peft_fast", "run", script, *args, check=False)
    status = 130 if plain.returncode == -2 else plain.returncode  # Python kills itself after an interrupt
    assert (ours.returncode, ours.stdout) == (status, plain.stdout)
    line = "peft_fast: the script did not import PEFT's LoRA layers\n"
    assert ours.stderr == plain.stderr + line


def test_run_a_module(python, tmp_path):
    (tmp_path / "package").mkdir()
    code = "import sys; print(__name__, sys.argv, sys.path[0], __package__)"
    (tmp_path / "package" / "tool.py").write_text(code)
    plain = python(None, "-m", "package.tool", "--help", "-m")
    ours = python(None, "-m", "peft_fast", "run", "--quiet", "-m", "package.tool", "--help", "-m")
    assert (ours.stdout, ours.stderr) == (plain.stdout, "")


def test_run_a_script_that_trains(python, tmp_path):
    code = MODEL + TRAIN + "model = make()\nwith model.disable_adapter(): model(torch.ones(1, 8))\n"
    (tmp_path / "train.py").write_text(code)
    done = python(None, "-m", "peft_fast", "run", "train.py")
    assert done.stdout == ""
    expected = "peft_fast: 1 fast calls, 1 handed back to PEFT (1 the adapters are disabled)"
    assert done.stderr.splitlines()[-1] == expected


@pytest.mark.parametrize(
    "args, status, words",
    [
        ([], 2, "usage: python -m peft_fast run"),
        (["--help"], 0, "torchrun"),
        (["nosuch.py"], 1, "given: the script 'nosuch.py', which does not exist\nneeded: "),
        (["-m"], 1, "given: -m without a module\nneeded: "),
    ],
    ids=["nothing", "help", "no such file", "no module"],
)
def test_run_bad_command_lines(capsys, args, status, words):
    from peft_fast.cli.app import main

    assert main(["run", *args]) == status
    output = capsys.readouterr()
    assert words in output.out + output.err
    assert "Traceback" not in output.err
