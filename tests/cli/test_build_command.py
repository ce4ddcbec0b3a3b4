"""`python -m peft_fast build` is peft_fast/build.py."""

import pytest

from peft_fast import build
from peft_fast.cli.app import main


@pytest.mark.parametrize(
    "ok, machine, flags, status",
    [
        (True, True, [], 0),
        (False, True, [], 1),
        (False, True, ["--if-possible"], 0),
        (False, False, ["--if-possible"], 1),
    ],
)
def test_exit_status(monkeypatch, ok, machine, flags, status):
    monkeypatch.setattr(build, "build", lambda **kwargs: {"ok": ok, "machine": machine})
    assert main(["build", *flags]) == status


def test_options_reach_the_build(monkeypatch):
    seen = {}
    monkeypatch.setattr(build, "build", lambda **kwargs: seen.update(kwargs) or {"ok": True, "machine": True})
    assert main(["build", "--clean", "--jobs", "3"]) == 0
    assert seen == {"clean": True, "jobs": 3}
