"""Every patcher test starts and ends with PEFT's own forward on the class, and prints nothing."""

import gc

import pytest

from peft_fast import settings
from peft_fast.patch import embedding, guard, marks, plan, switch

guard.load()
embedding.load()
# what was imported stays: nothing of it has to be looked at each time that a test collects
gc.collect()
gc.freeze()


@pytest.fixture(autouse=True)
def untouched_peft():
    assert plan.Linear.forward is plan.stock_linear
    with settings.override(quiet=True, disable=False, exact=False):
        yield
    plan.Linear.forward = plan.stock_linear
    switch._uninstall()
    marks.state.__init__()
    assert plan.Embedding.forward is plan.stock_embedding
    gc.collect()  # marked layers of this test must not keep the guard in use in the next
