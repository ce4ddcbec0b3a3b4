"""What `git clone` gives, to install from."""

import shutil
from pathlib import Path

import pytest

from tests.install.calls import copy_sources

ISA_SOURCE = """
#ifdef PEFT_FAST_ISA_UNAVAILABLE
extern "C" __attribute__((visibility("default"))) int {name}() {{ return 0; }}
#else
extern "C" __attribute__((visibility("default"))) int {name}() {{ return 1; }}
#endif
"""


@pytest.fixture
def checkout(tmp_path, root) -> Path:
    """The sources in a folder of their own, nothing built."""
    return copy_sources(root, tmp_path / "checkout")


@pytest.fixture
def clone(tmp_path, root) -> Path:
    """A repository with four tiny C++ files and the real build.py."""
    here = tmp_path / "a clone $x"  # a name that neither ninja nor the shell may trip over
    (here / "peft_fast").mkdir(parents=True)
    (here / "csrc" / "cpu").mkdir(parents=True)
    (here / "setup.py").touch()
    for file in ("build.py", "build_machine.py", "build_cuda.py", "build_steps.py"):
        shutil.copy(root / "peft_fast" / file, here / "peft_fast")
    (here / "csrc" / "schema.cpp").write_text("#include <torch/headeronly/version.h>\nint schema() { return 1; }\n")
    (here / "csrc" / "module.cpp").write_text("int module_() { return 1; }\n")
    for name in ("isa_avx2", "isa_amx"):
        (here / "csrc" / "cpu" / f"{name}.cpp").write_text(ISA_SOURCE.format(name=name))
    return here
