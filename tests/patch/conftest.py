"""Every patcher test starts and ends with PEFT's own forward on the class, and prints nothing."""

import gc

import pytest

from peft_fast import settings
from peft_fast.patch import guard

guard.load()


@pytest.fixture(autouse=True)
def untouched_peft():
    assert guard.Linear.forward is guard.stock_forward
    with settings.override(quiet=True, disable=False, exact=False):
        yield
    guard.Linear.forward = guard.stock_forward
    guard.state.__init__()
    gc.collect()  # marked layers of this test must not keep the guard in use in the next
