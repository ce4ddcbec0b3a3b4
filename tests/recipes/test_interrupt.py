"""Signals that are not for the run, words that Ctrl-C cuts off, and folders that another process holds."""

import errno
import io
import signal

import pytest
from rich.console import Console

from peft_fast.errors import SettingsError
from peft_fast.recipes import config as configs
from peft_fast.recipes import record, run, search
from peft_fast.recipes.progress import Screen


@pytest.fixture
def ignoring():
    """ignoring(signum): ignored until the test is over, as by a script that starts a run with `&`."""
    before = {}

    def ignore(signum):
        before[signum] = signal.signal(signum, signal.SIG_IGN)

    yield ignore
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize("other", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_is_ignored_stays_ignored(learn, signalled, ignoring, other):
    ignored = signal.SIGINT if other == signal.SIGTERM else signal.SIGTERM
    ignoring(ignored)
    made = learn([signalled(2, ignored)], steps=4)
    assert made.result["state"] == "done" and made.signum == 0
    made = learn([signalled(2, ignored), signalled(3, other)], overwrite=True)
    assert made.signum == other and made.result["throughput"]["steps"] == 3
    assert signal.getsignal(ignored) is signal.SIG_IGN


class Cut(io.StringIO):
    """A terminal at which Ctrl-C comes while the first line is written."""

    def write(self, text):
        if "first" in text and not self.getvalue():
            super().write(text[:3])
            raise KeyboardInterrupt
        return super().write(text)


def test_a_line_that_ctrl_c_cut_off_is_not_said_again():
    out = Cut()
    screen = Screen(console=Console(file=out, width=80))
    with pytest.raises(KeyboardInterrupt):
        screen.say("first line")
    screen.say("stopped")
    assert out.getvalue() == "firstopped\n"


@pytest.mark.parametrize("what", ["run", "search"])
@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "no locks available"), BlockingIOError()])
def test_a_file_system_without_locks_is_no_other_process(options, monkeypatch, tmp_path, what, error):
    import fcntl

    def flock(file, how):
        raise error

    monkeypatch.setattr(fcntl, "flock", flock)
    given = configs.read(options)
    if isinstance(error, BlockingIOError):
        with pytest.raises(SettingsError, match=f"another process is {'training' if what == 'run' else 'searching'}"):
            _take(what, given)
    else:
        _take(what, given)


def _take(what, given):
    if what == "run":
        held = record.Record(given)
        held.open({}, {})
        held.close()
    else:
        with search._held(given.out, given) as there:
            assert there is False


def test_a_run_in_a_folder_that_is_held_says_who_has_it(options, tmp_path):
    """The lock of a real other holder: two descriptors of one process exclude each other as two processes do."""
    first = record.Record(run.resolve(options, {}))
    first.open({}, {})
    try:
        with pytest.raises(SettingsError, match="another process is training"):
            run.train(options, overwrite=True, say=lambda line: None)
    finally:
        first.close()
