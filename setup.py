"""Packs kernels/, benchmarks/ and csrc/ into the package, and compiles csrc where that can be done."""

import importlib.util
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution

ROOT = Path(__file__).resolve().parent


def builder():
    """peft_fast/build.py without importing peft_fast, which needs torch."""
    spec = importlib.util.spec_from_file_location("peft_fast_build", ROOT / "peft_fast" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Pack(build_py):
    """Adds the top-level folders to a wheel; an editable install reads them where they are."""

    def run(self):
        target = Path(self.build_lib) / "peft_fast"
        if not self.editable_mode:
            # build/ survives from earlier runs, with files that may be gone by now
            shutil.rmtree(target, ignore_errors=True)
        super().run()
        if not self.editable_mode:
            for folder in ("kernels", "benchmarks", "csrc"):
                for source in sorted(p for p in (ROOT / folder).rglob("*") if self.wanted(p)):
                    self.copy_file(str(source), str(self.made(target / source.relative_to(ROOT))))

    @staticmethod
    def wanted(path):
        # the packages bring an __init__.py of their own; results and scripts stay in the clone
        return path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh") and path.name != "__init__.py"

    @staticmethod
    def made(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


class Compile(build_ext):
    """Compiles through peft_fast/build.py, beside the package when editable, else into the wheel."""

    def run(self):
        inplace = self.inplace or self.editable_mode
        builder().build(out_dir=None if inplace else Path(self.build_lib) / "peft_fast")

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


class Native(Distribution):
    def has_ext_modules(self):
        return True


setup(cmdclass={"build_py": Pack, "build_ext": Compile}, distclass=Native)
