"""Every test of an op runs on poisoned memory."""

import pytest

from tests import numerics


@pytest.fixture(autouse=True)
def _poisoned_memory():
    with numerics.poisoned():
        yield
