"""Every patcher test starts and ends with PEFT's own forward on the class, and prints nothing."""

import gc

import pytest

from peft_fast import native, settings
from peft_fast.patch import dora, embedding, guard, ledger, marks, plan, switch
from peft_fast.patch import norms as kept_norms

guard.load()
embedding.load()
# what was imported stays: nothing of it has to be looked at each time that a test collects
gc.collect()
gc.freeze()


def _reset():
    plan.Linear.forward = plan.stock_linear
    switch._uninstall()
    marks.state.__init__()
    ledger._traced.clear()


@pytest.fixture(autouse=True)
def untouched_peft():
    _reset()  # a test elsewhere may keep a model that it trained
    with settings.override(quiet=True, disable=False, exact=False):
        yield
    _reset()
    assert plan.Embedding.forward is plan.stock_embedding
    gc.collect()  # marked layers of this test must not keep the guard in use in the next


@pytest.fixture
def norms(monkeypatch):
    """The norms of DoRA that were computed: one entry each."""
    found = []

    def counted(run):
        return lambda *args, **kwargs: found.append(args) or run(*args, **kwargs)

    monkeypatch.setattr(dora, "dora_norm", counted(dora.dora_norm))
    monkeypatch.setattr(kept_norms, "computed", counted(kept_norms.computed))
    return found


@pytest.fixture
def as_shipped(untouched_peft):
    """The compiled call of few tokens, and the number of them that users have."""
    assert native.decode() is not None and native.few_tokens() is not None
    with settings.override(min_tokens=128):
        yield
