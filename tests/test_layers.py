"""Who may import whom, and what importing the package must not do."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "triton",
    "matplotlib",
    "rich",
    "typer",
    "pandas",
    "numpy",
}
# of the commands that fine-tune: each is imported where it is used
TRAINING = {"PIL", "huggingface_hub", "jiwer", "optuna", "pyarrow", "pycocotools", "rouge_score", "sacrebleu"}
TRAINING |= {"safetensors", "scipy", "seqeval", "sklearn", "soundfile", "tokenizers"}
STDLIB = set(sys.stdlib_module_names)

# layer -> (third-party packages, peft_fast modules) that its files may import anywhere; None: any
LAW = {
    "kernels": ({"torch", "triton"}, {"peft_fast.kernels"}),
    "peft_fast/reference": ({"torch"}, {"peft_fast.reference"}),
    "peft_fast/errors.py": (set(), set()),
    "peft_fast/settings.py": (set(), {"peft_fast.errors"}),
    "peft_fast/build.py": (set(), set()),
    "peft_fast/build_machine.py": (set(), set()),
    "peft_fast/build_cuda.py": (set(), set()),
    "peft_fast/build_steps.py": (set(), set()),
    "peft_fast/native.py": ({"torch"}, {"peft_fast.settings", "peft_fast.errors", "peft_fast.backends"}),
    "peft_fast/dispatch.py": (
        {"torch"},
        {"peft_fast." + m for m in ("settings", "errors", "native", "reference", "backends")},
    ),
    "peft_fast/backends": (
        {"torch", "triton"},
        {
            "peft_fast." + m
            for m in ("settings", "errors", "native", "build", "reference", "backends", "kernels", "ops")
        },
    ),
    "peft_fast/ops": (
        {"torch"},
        {"peft_fast." + m for m in ("settings", "errors", "native", "dispatch", "reference", "backends", "ops")},
    ),
    "peft_fast/patch": (
        {"torch", "peft", "transformers"},
        {"peft_fast"} | {"peft_fast." + m for m in ("ops", "errors", "settings", "dispatch", "patch")},
    ),
    "peft_fast/pages": (
        {"matplotlib", "optuna"},
        {"peft_fast." + m for m in ("pages", "benchmarks", "recipes.config")},
    ),
    "peft_fast/recipes": (
        (HEAVY | TRAINING | {"torch", "pydantic", "pydantic_core", "yaml"}) - {"triton", "typer", "matplotlib"},
        {"peft_fast"}
        | {"peft_fast." + m for m in ("recipes", "errors", "settings", "patch", "ops", "pages", "benchmarks")}
        | {"peft_fast.demo.measure"},
    ),
}
# packages that a layer may name inside a function but not at the top of a file
LAZY = {
    "peft_fast/backends": HEAVY,
    "peft_fast/patch": HEAVY - {"numpy"},
    "peft_fast/demo": HEAVY,
    "peft_fast/pages": HEAVY | TRAINING,
    # numbers are what tasks are about, and each task is imported when it is asked for
    "peft_fast/recipes": (HEAVY | TRAINING) - {"numpy"},
    "peft_fast/cli": (HEAVY | TRAINING | {"torch"}) - {"rich", "typer"},
}


def python_files(layer: str) -> list[Path]:
    path = ROOT / layer
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


def imports(path: Path, top_level: bool = False) -> set[str]:
    """Dotted names a file imports; with top_level, only those that run when the file is imported."""
    tree = ast.parse(path.read_text())
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            names.update(whole if node.module == "peft_fast" else {node.module})
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level)
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        checking = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if not (top_level and (lazy or checking)):
            for child in ast.iter_child_nodes(node):
                visit(child)

    visit(tree)
    return names


def within(name: str, allowed: set[str]) -> bool:
    return any(name == a or name.startswith(a + ".") for a in allowed)


@pytest.mark.parametrize("layer", LAW)
def test_a_layer_imports_only_what_it_may(layer):
    packages, modules = LAW[layer]
    wrong = []
    for path in python_files(layer):
        for name in imports(path):
            own = name.startswith(("peft_fast", "."))
            # the package itself, for accelerate() and its like, is not all that is in it
            mine = (name == "peft_fast" and name in modules) or within(name, modules - {"peft_fast"})
            fine = mine if own else name.partition(".")[0] in packages | STDLIB
            if not fine:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("layer", LAZY)
def test_heavy_packages_are_imported_inside_functions(layer):
    # a module whose whole purpose is to stand between a library and us is itself imported lazily
    between = {"peft_fast/patch/guard.py"}
    trainers = ("batches", "clock", "interrupt", "progress", "trainer", "unfreeze")  # have the Trainer's base classes
    between |= {f"peft_fast/recipes/{name}.py" for name in trainers}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name} at the top"
        for path in python_files(layer)
        if str(path.relative_to(ROOT)) not in between
        for name in imports(path, top_level=True)
        if name.partition(".")[0] in LAZY[layer]
    ]
    assert not wrong, "\n".join(wrong)


def test_the_reader_of_imports_sees_each_kind(tmp_path):
    path = tmp_path / "a.py"
    path.write_text(
        "import torch.nn\nfrom peft_fast import ops\nfrom . import b\nif TYPE_CHECKING:\n    import peft\n"
        "def f():\n    from transformers import Trainer\n"
    )
    assert imports(path) == {"torch.nn", "peft_fast.ops", ".", "peft", "transformers"}
    assert imports(path, top_level=True) == {"torch.nn", "peft_fast.ops", "."}


def test_only_settings_reads_the_environment():
    # the build runs before there is a package
    may = {"peft_fast/settings.py", *(f"peft_fast/build{part}.py" for part in ("", "_machine", "_cuda"))}
    readers = set()
    for path in [*python_files("peft_fast"), *python_files("kernels")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
                readers.add(path.relative_to(ROOT).as_posix())
    assert readers <= may


def test_kernels_has_no_init():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_no_file_is_longer_than_a_reader_bears():
    long = {}
    for folder in ("peft_fast", "kernels", "csrc", "benchmarks", "tests"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"):
                count = len(path.read_text().splitlines())
                if count > 500:
                    long[path.relative_to(ROOT).as_posix()] = count
    assert not long


IMPORT = """
import socket, sys
import torch
before = set(sys.modules)
state, threads = torch.get_rng_state(), torch.get_num_threads()
def no_network(*a, **k): raise AssertionError("network")
socket.socket.connect = no_network
import peft_fast{more}
new = {{m.partition(".")[0] for m in set(sys.modules) - before}} - set(sys.stdlib_module_names)
assert new <= {{"peft_fast"}}, new
assert torch.equal(state, torch.get_rng_state()) and torch.get_num_threads() == threads
assert not torch.cuda.is_initialized()
"""


@pytest.mark.parametrize("more", ["", ", peft_fast.ops, peft_fast.dispatch, peft_fast.native, peft_fast.recipes"])
def test_import_does_nothing_but_import(more):
    done = subprocess.run([sys.executable, "-c", IMPORT.format(more=more)], cwd=ROOT, text=True, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_wrong_option_is_said_before_torch_is_imported():
    """Seconds, which a typing error should not cost."""
    code = (
        "import sys, peft_fast.recipes.run, peft_fast.cli.train; print({'torch', 'numpy', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "set()\n", "")


def test_import_needs_no_torch():
    """`python -m peft_fast build` has to say that torch is missing."""
    code = "import sys; sys.modules['torch'] = None; import peft_fast, peft_fast.build, peft_fast.cli.app"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_contributing_names_every_op_and_who_asks_for_it():
    from peft_fast.backends import OPS

    rows = re.findall(r"^\| (`.*`) \| .* \| (`.*) \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    named = [op for ops, _ in rows for op in re.findall(r"`(\w+)`", ops)]
    assert set(OPS) <= set(named)
    assert all(
        (ROOT / "peft_fast" / "patch" / file).is_file() for _, by in rows for file in re.findall(r"`(\w+\.py)`", by)
    )
