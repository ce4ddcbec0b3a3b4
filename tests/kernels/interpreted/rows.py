"""Which cases of an op's table are interpreted, by name, in which dtypes: a case takes a second."""

from __future__ import annotations

from collections.abc import Iterable

import pytest


def rows(kinds: dict[str, str], cases: Iterable, prefix: str = "") -> list:
    """``kinds``: dtypes -> names -> (case, dtypes) as pytest parameters, one for each name."""
    named = {case.name: case for case in cases}
    return [
        pytest.param(named[name], dtypes, id=f"{prefix}{dtypes}-{name}")
        for dtypes, names in kinds.items()
        for name in names.split()
    ]
