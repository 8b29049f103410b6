"""What data/prepare.py says while it runs: lines on stdout, and now and then how far it is on stderr."""

import contextlib
import os
import sys
import time

PROGRESS_SECONDS = 8


def printable(text: str) -> str:
    """The text in one line, with what a terminal may not be able to show (a name that is not UTF-8) spelled out."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return " ".join(text.split()).encode(encoding, "backslashreplace").decode(encoding)


def say(text: str) -> None:
    """One line on stdout. A reader that has gone away (`| head -1`) or a full disk there must not cost the work."""
    try:
        print(printable(text), flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


class Progress:
    """At most one line in PROGRESS_SECONDS on stderr: a long run is seen to live, a short one is silent."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def show(self, phase: str, done: int, total: int = 0, size: int = 0) -> None:
        """Say how many documents of how many, and their bytes, if the last line is long enough ago."""
        now = time.monotonic()
        if now - self.last < PROGRESS_SECONDS or sys.stderr is None:  # closed: print would take the standard output
            return
        self.last = now
        of = f" of {total:,}" if total else ""
        with contextlib.suppress(OSError):
            print(f"{phase}: {done:,}{of} documents" + (f", {size / 1e6:,.0f} MB" if size else ""),
                  file=sys.stderr, flush=True)
