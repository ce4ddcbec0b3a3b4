"""The command line around the commands: help, typos, missing packages, exit statuses."""

import subprocess
import sys

import pytest

from peft_fast.cli import app
from peft_fast.errors import SettingsError


def run(root, *args, code=None, **kwargs):
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "peft_fast", *args]
    return subprocess.run(command, cwd=root, text=True, capture_output=True, timeout=300, **kwargs)


def test_help_is_there_at_once(root):
    """No torch, no rich: the first screen must not wait for them."""
    code = (
        "import sys; from peft_fast.cli.app import main; assert main(['--help']) == 0; "
        "assert not {'torch', 'rich'} & set(sys.modules)"
    )
    done = run(root, code=code)
    assert done.returncode == 0, done.stderr
    for name in app.COMMANDS:
        assert f"  {name}" in done.stdout


@pytest.mark.parametrize("width", [40, 80, 120, 300])
def test_help_fits_the_terminal(width):
    assert max(map(len, app.help_text(width).splitlines())) <= max(width, 48)


def test_no_command_shows_the_help_and_fails(capsys):
    assert app.main([]) == 2
    assert "commands:" in capsys.readouterr().out


def test_version(root):
    import peft_fast

    assert run(root, "--version").stdout == f"peft_fast {peft_fast.__version__}\n"


@pytest.mark.parametrize("typed, hint", [("docter", "peft_fast doctor"), ("zzz", "peft_fast --help")])
def test_a_command_that_is_none(capsys, typed, hint):
    assert app.main([typed]) == 2
    given, needed, do = capsys.readouterr().err.splitlines()
    assert (given, needed) == (f"given: command '{typed}'", "needed: one of " + ", ".join(app.COMMANDS))
    assert do.startswith("do: ") and hint in do


@pytest.mark.parametrize("name", app.COMMANDS)
def test_every_command_has_help(root, name):
    done = run(root, name, "--help")
    assert done.returncode == 0, done.stderr
    assert f"python -m peft_fast {name}" in " ".join(done.stdout.split())


@pytest.mark.parametrize("name", app.COMMANDS)
def test_a_wrong_option_is_a_usage_error(root, name):
    done = run(root, name, "--no-such-option")
    assert done.returncode == 2 or (name == "run" and done.returncode), done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_package_is_named_with_its_remedy(monkeypatch, capsys):
    def missing(name):
        raise ModuleNotFoundError("No module named 'rich'", name="rich")

    monkeypatch.setattr(app.importlib, "import_module", missing)
    assert app.main(["bench"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "given: `bench` without rich",
        "needed: the Python package rich",
        "do: run `pip install 'peft_fast[bench]'`",
    ]


def raising(error):
    def command(name):
        def call(args, prog_name):
            raise error

        return call

    return command


def test_our_errors_are_three_lines_without_a_traceback(monkeypatch, capsys):
    monkeypatch.setattr(app, "_command", raising(SettingsError("given: a\nneeded: b\ndo: c")))
    assert app.main(["doctor"]) == 1
    assert capsys.readouterr().err == "given: a\nneeded: b\ndo: c\n"


def test_ctrl_c(monkeypatch, capsys):
    monkeypatch.setattr(app, "_command", raising(KeyboardInterrupt()))
    assert app.main(["bench"]) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_a_reader_that_leaves_early(root):
    done = subprocess.run(
        f"{sys.executable} -m peft_fast doctor | head -1",
        shell=True,
        cwd=root,
        text=True,
        capture_output=True,
    )
    assert done.stderr == "" and done.stdout.strip() == "versions"


@pytest.mark.parametrize(
    "started, program",
    [("/usr/bin/peft-fast", "peft-fast"), ("peft-fast.exe", "peft-fast"), ("/x/__main__.py", "python -m peft_fast")],
)
def test_messages_name_the_program_as_it_was_started(started, program, monkeypatch, capsys):
    from peft_fast import errors
    from peft_fast.cli import train

    monkeypatch.setattr("sys.argv", [started])
    assert errors.program() == program
    assert train.app(["--help"], f"{program} train") == 0
    shown = capsys.readouterr().out
    assert f"usage: {program} train" in shown and f"\n  {program} train sentiment.yaml\n" in shown
