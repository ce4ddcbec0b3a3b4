"""The Triton kernels: the files of <root>/kernels in a clone or editable install, of this folder in a wheel.

The top-level folder has no __init__.py, because the import name `kernels` belongs to Hugging Face.
"""

from pathlib import Path

_root = Path(__file__).resolve().parents[2]
# beside an installed package, a folder of that name is somebody else's
if (_root / "setup.py").is_file() and (_root / "kernels").is_dir():
    __path__.append(str(_root / "kernels"))
