"""Signals: the first one ends a run after its step, a second one, later, at once."""

from __future__ import annotations

import os
import signal
import time


class Interrupted(Exception):
    """A signal ended the run; the message says what is left of it."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


class Signals:
    """The signals that end a run: `last` is the number of the last one, 0 until one comes."""

    def __init__(self):
        self.last, self.came_at = 0, 0.0
        self.caught = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # nohup ignores it; else a closed terminal ends the run
            self.caught.append(signal.SIGHUP)

    def note(self) -> None:
        """From now on signals are noted in `last`, for a loop that looks there."""
        for signum in self.caught:
            signal.signal(signum, self._on_signal)

    def interrupt(self, what_is_left: str) -> None:
        """From now on a signal raises Interrupted at once."""
        def stop(signum: int, _frame) -> None:
            raise Interrupted(signum, f"stopped by signal {signum} {what_is_left}")

        for signum in self.caught:
            signal.signal(signum, stop)

    def _on_signal(self, signum: int, _frame) -> None:
        if self.last and time.monotonic() - self.came_at > 2:  # launchers repeat a signal within moments
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        self.last, self.came_at = signum, time.monotonic()
