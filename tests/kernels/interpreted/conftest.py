"""These run in processes of their own, which tests/kernels/test_interpreter.py starts with TRITON_INTERPRET=1."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    if "TESTS_PLAIN_INTERPRETER" not in os.environ:
        from tests.kernels import interpreter_bf16

        interpreter_bf16.install()
        interpreter_bf16.patch_once()
else:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Memory full of NaN, and few draws: the criterion knows how much less a small sample tells."""
    from tests import numerics

    monkeypatch.setattr(numerics, "MOST_DRAWS", 2)
    with numerics.poisoned():
        yield


@pytest.fixture
def no_call_left_to_torch(monkeypatch):
    """What fails in a kernel is not computed by torch instead."""
    from peft_fast.backends.triton import lora_linear

    monkeypatch.setattr(lora_linear.guarded, "failed", {})
    yield
    assert not lora_linear.failures()
