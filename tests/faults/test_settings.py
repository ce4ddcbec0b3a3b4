"""Wrong values in the environment: one class, three lines, the variable named; no traceback in a command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from peft_fast import settings
from peft_fast.errors import PeftFastError, SettingsError

WRONG = [
    ("PEFT_FAST_BACKEND", "gpu"),
    ("PEFT_FAST_BACKEND", "CPU "),
    ("PEFT_FAST_ISA", "avx9"),
    ("PEFT_FAST_PACK_MB", "lots"),
    ("PEFT_FAST_PACK_MB", "-1"),
    ("PEFT_FAST_PACK_MB", "1.5"),
    ("PEFT_FAST_MIN_TOKENS", "few"),
    ("PEFT_FAST_MIN_TOKENS", "-1"),
    ("PEFT_FAST_EXACT", "maybe"),
    ("PEFT_FAST_GROUPS", "all"),
    ("PEFT_FAST_BLOCKS", "-1"),
    ("PEFT_FAST_DISABLE", "2"),
    ("PEFT_FAST_QUIET", "nein"),
]
RIGHT = [
    ("PEFT_FAST_BACKEND", "torch", "backend", "torch"),
    ("PEFT_FAST_ISA", "avx2", "isa", "avx2"),
    ("PEFT_FAST_PACK_MB", "0", "pack_mb", 0),
    ("PEFT_FAST_PACK_MB", "", "pack_mb", 0),
    ("PEFT_FAST_MIN_TOKENS", "0", "min_tokens", 0),
    ("PEFT_FAST_MIN_TOKENS", "", "min_tokens", 128),
    ("PEFT_FAST_EXACT", "1", "exact", True),
    ("PEFT_FAST_GROUPS", "0", "groups", False),
    ("PEFT_FAST_BLOCKS", "no", "blocks", False),
    ("PEFT_FAST_BLOCKS", "", "blocks", True),
    ("PEFT_FAST_DISABLE", "off", "disable", False),
    ("PEFT_FAST_QUIET", "TRUE", "quiet", True),
    ("PEFT_FAST_LIBRARY", "other.so", "library", Path("other.so")),
]


@pytest.mark.parametrize("variable, value", WRONG)
def test_a_wrong_value(variable, value):
    with pytest.raises(SettingsError) as error:
        settings.from_env({variable: value})
    assert isinstance(error.value, PeftFastError) and isinstance(error.value, ValueError)
    given, needed, do = str(error.value).splitlines()
    assert given.startswith("given: ") and value in given
    assert needed.startswith("needed: ") and do.startswith("do: ")
    assert variable in given + do


@pytest.mark.parametrize("variable, value, field, wanted", RIGHT)
def test_a_right_value(variable, value, field, wanted):
    assert getattr(settings.from_env({variable: value}), field) == wanted


def test_an_empty_environment_gives_the_defaults():
    assert settings.from_env({}) == settings.Settings()


def test_a_field_that_is_none():
    with pytest.raises(TypeError), settings.override(no_such_setting=1):
        pass


def test_override_ends_with_its_block():
    before = settings.get()
    with pytest.raises(RuntimeError), settings.override(backend="reference"):
        assert settings.get().backend == "reference"
        raise RuntimeError
    assert settings.get() == before


def test_importing_with_a_wrong_value_works_and_the_command_says_what_is_wrong(root):
    env = {**os.environ, "PEFT_FAST_ISA": "avx9"}
    run = {"cwd": root, "env": env, "text": True, "capture_output": True, "timeout": 300}
    assert subprocess.run([sys.executable, "-c", "import peft_fast.ops"], **run).returncode == 0
    done = subprocess.run([sys.executable, "-m", "peft_fast", "bench", "lora_linear", "--tiny"], **run)
    assert done.returncode == 1 and done.stderr.startswith("given: isa='avx9'")
    assert len(done.stderr.splitlines()) == 3
    # the command that looks for what is wrong goes on, and says it
    done = subprocess.run([sys.executable, "-m", "peft_fast", "doctor"], **run)
    assert done.returncode == 1 and "PEFT_FAST_ISA='avx9' is not valid" in done.stdout and "backends" in done.stdout


def test_every_setting_is_in_the_table_and_has_a_case_above():
    import dataclasses

    covered = {field for _, _, field, _ in RIGHT} | {"cache_dir"}
    fields = {field.name for field in dataclasses.fields(settings.Settings)}
    assert fields == covered
    assert all(f"| {name} |" in settings.__doc__ for name in fields)


def test_the_cache_folder(tmp_path):
    assert settings.from_env({"PEFT_FAST_CACHE": str(tmp_path)}).cache_dir == tmp_path
    assert not str(settings.Settings().cache_dir).startswith("~")
