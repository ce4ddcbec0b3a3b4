"""The benchmarks: the files of <root>/benchmarks in a clone or editable install, of this folder in a wheel."""

from pathlib import Path

_root = Path(__file__).resolve().parents[2]
# beside an installed package, a folder of that name is somebody else's
if (_root / "setup.py").is_file() and (_root / "benchmarks").is_dir():
    __path__.append(str(_root / "benchmarks"))
