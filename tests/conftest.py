"""One thread, no network, a cache of its own, and the same seeds for every test."""

import os
import random
import tempfile
from pathlib import Path

# read by torch and transformers when they are imported, so set before that
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

# a download is the one thing that tests share with the user: it is large and checked by its hash
USER_CACHE = Path(os.environ.get("PEFT_FAST_CACHE") or "~/.cache/peft_fast").expanduser()
# (PEFT_FAST_LIBRARY stays: a test runs this suite again on another build)
for name in [name for name in os.environ if name.startswith("PEFT_FAST_") and name != "PEFT_FAST_LIBRARY"]:
    del os.environ[name]
_scratch = tempfile.TemporaryDirectory(prefix="peft_fast-tests-", ignore_cleanup_errors=True)
os.environ["PEFT_FAST_CACHE"] = _scratch.name
# the tests' models are small; the rule itself has tests of its own
os.environ["PEFT_FAST_MIN_TOKENS"] = "0"


@pytest.fixture(autouse=True)
def seeds():
    """torch's and Python's generators start every test the same."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def download_cache() -> Path:
    """The user's own cache folder, for tests that need the real model and data."""
    return USER_CACHE
