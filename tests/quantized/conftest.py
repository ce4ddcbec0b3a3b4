"""LoRA over quantized bases: needs libraries that live in a folder of their own, see requirements-quantized.txt.

Each of them slows every import of PEFT down and writes to stderr, so they are no part of the environment of the other
tests: tests/patch/test_quantized.py runs this folder in a process that sees them.
"""

import gc
import importlib.util
import warnings

import pytest

LIBRARIES = ("bitsandbytes", "torchao", "hqq")
missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
if not missing:
    import peft  # noqa: F401

    # what was imported stays: nothing of it has to be looked at each time that a test collects
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    why = f"{', '.join(missing)} not installed here; tests/patch/test_quantized.py runs this where they are"
    for item in items:
        if missing and "quantized" in item.path.parts:
            item.add_marker(pytest.mark.skip(why))


@pytest.fixture(autouse=True)
def untouched_peft():
    from peft_fast import settings
    from peft_fast.patch import marks, switch

    switch._uninstall()
    marks.state.__init__()
    with settings.override(quiet=True, disable=False, exact=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    switch._uninstall()
    marks.state.__init__()
    gc.collect()
