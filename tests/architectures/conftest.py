"""Whatever a test here accelerated, the next one starts with PEFT's and transformers' own forwards."""

import pytest

import peft_fast
from peft_fast import settings


@pytest.fixture(autouse=True)
def own_forwards():
    with settings.override(quiet=True, disable=False, exact=False):
        yield
    peft_fast.disable()
