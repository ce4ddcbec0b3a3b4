"""What `git clone` gives, to install from."""

from pathlib import Path

import pytest

from tests.install.calls import copy_sources


@pytest.fixture
def checkout(tmp_path, root) -> Path:
    """The sources in a folder of their own, nothing built."""
    return copy_sources(root, tmp_path / "checkout")
