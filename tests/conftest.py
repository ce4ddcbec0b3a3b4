"""One thread, no network, a cache of its own, and the same seeds for every test."""

import os
import signal
import sys
import tempfile
import warnings
from pathlib import Path

# read by torch and transformers when they are imported, so set before that
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# oneDNN 3.12's products by AMX read behind rows whose length is no multiple of 32: with them, torch alone lets a NaN
# spread from one row to the one before. Ours by AMX are tested all the same, and beside those in tests/ops/test_amx.py
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

import pytest
import torch

# a download is the one thing that tests share with the user: it is large and checked by its hash
USER_CACHE = Path(os.environ.get("PEFT_FAST_CACHE") or "~/.cache/peft_fast").expanduser()
# a test runs this suite again on another build, and a build that a test starts in place makes what is there
_KEPT = "PEFT_FAST_LIBRARY", "PEFT_FAST_CUDA_ARCHS"
for name in [name for name in os.environ if name.startswith("PEFT_FAST_") and name not in _KEPT]:
    del os.environ[name]
_scratch = tempfile.TemporaryDirectory(prefix="peft_fast-tests-", ignore_cleanup_errors=True)
os.environ["PEFT_FAST_CACHE"] = _scratch.name
os.environ.setdefault("TRITON_CACHE_DIR", str(Path(_scratch.name) / "triton"))
# a shell that runs this in the background has it ignored, and every process that a test starts would inherit that
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# the tests' models are small; the rule itself has tests of its own
os.environ["PEFT_FAST_MIN_TOKENS"] = "0"


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where the numeric contract runs: cpu or cuda")


def pytest_configure(config):
    if (device := config.getoption("--device")) != "cpu":
        # tests/numerics.py reads the first, cuBLAS the second, without which deterministic mode refuses it
        os.environ["TESTS_DEVICE"] = device
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        numerics = sys.modules.get("tests.numerics")
        if numerics and numerics.DEVICE.type != torch.device(device).type:
            raise pytest.UsageError("a conftest.py imported tests.numerics before --device was read")


@pytest.fixture(autouse=True)
def as_any_other():
    """A test starts with the same seeds and nothing compiled, and what it leaves changed is undone, and told."""
    from tests import process

    process.seed()
    before = process.state()
    yield
    process.forget_what_was_compiled()
    for told in process.restore(before):
        warnings.warn(f"the test left something changed: {told}", stacklevel=1)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def download_cache() -> Path:
    """The user's own cache folder, for tests that need the real model and data."""
    return USER_CACHE


@pytest.fixture(scope="session")
def pinned(download_cache):
    """package -> its folder in the user's cache, fetched if that is possible, else the test is skipped."""
    from peft_fast.errors import DataError
    from peft_fast.recipes import fetch

    def folder(package):
        try:
            return fetch.ensure(package, download_cache)
        except DataError as error:
            pytest.skip(f"{package.title} can not be had here: {error}".splitlines()[0])

    return folder
