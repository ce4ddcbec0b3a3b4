"""Ctrl-C: the first finishes the step and saves a checkpoint, the second stops at once. SIGTERM counts as one."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from transformers import TrainerCallback


class Stopped(KeyboardInterrupt):
    """Training was asked to stop, and has saved where it is."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class Stopper(TrainerCallback):
    """Asks for a checkpoint after the step in which a signal came, and ends training when it is saved."""

    def __init__(self, progress: Any = None) -> None:
        self.signum = 0
        self.progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Not should_training_stop: a checkpoint with that in it would look finished."""
        if self.signum:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The checkpoint is there."""
        if self.signum:
            raise Stopped(self.signum)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Takes SIGINT and SIGTERM inside the block; elsewhere than in the main thread Python takes none."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # what was to be ignored stays ignored: a run in the background hears the Ctrl-C of the foreground
        before = {s: had for s in (signal.SIGINT, signal.SIGTERM) if (had := signal.getsignal(s)) != signal.SIG_IGN}
        for signum in before:
            signal.signal(signum, self._asked)
        try:
            yield
        finally:
            for signum, handler in before.items():
                # None: the handler was not Python's
                signal.signal(signum, signal.SIG_DFL if handler is None else handler)

    def _asked(self, signum: int, frame: Any) -> None:
        if self.signum:
            raise KeyboardInterrupt
        self.signum = signum
        if self.progress and self.progress.live:
            self.progress.doing = "stopping after this step (Ctrl-C: at once)"
        elif not (self.progress and self.progress.screen.quiet):
            # print() may be what the signal interrupted
            os.write(2, b"stopping after this step; Ctrl-C again stops at once\n")
