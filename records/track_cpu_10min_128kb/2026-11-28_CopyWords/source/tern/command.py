"""What every command line here shares: one-line errors, streams that take any text, how a process ends."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import threading
import time
import traceback
from pathlib import Path


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all errors here are."""

    def error(self, message: str):
        say_error(f"{message}; --help lists what there is")
        sys.exit(2)


def say_error(e: object) -> None:
    """One line on the standard error file, whatever names of files are in it."""
    if sys.stderr is not None:  # closed: print would take the standard output
        print("error: " + " ".join(str(e).splitlines()), file=sys.stderr, flush=True)


def print_if_open(text: str) -> None:
    """To the terminal, if there is one."""
    try:
        print(text, flush=True)
    except OSError:
        return


def write_out(text: str) -> None:
    """To the standard output, at once. Raises OSError, BrokenPipeError where its reader is gone; what was not written
    is dropped then, so that Python does not try again at its end."""
    try:
        print(text, end="", flush=True)
    except OSError as e:
        with contextlib.suppress(OSError, ValueError):  # ValueError: no file is behind it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise type(e)(f"cannot write to the standard output: {e.strerror}") from None


def steady_streams() -> None:
    """Let text out whatever the locale is: a character that it does not have is written as its number."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def describe_unexpected(e: BaseException) -> str:
    """One line of an error that nobody foresaw, with where it came from; TRACEBACK=1 shows all of it instead."""
    if os.environ.get("TRACEBACK"):
        raise e
    if isinstance(e, MemoryError) or "can't allocate memory" in str(e) or "out of memory" in str(e):
        return ("out of memory: use a smaller batch (--micro-batch-tokens, --val-batch-size, --eval-batch-seqs; "
                "--batch-seqs of eval_bpb.py), a smaller model or a larger machine")
    at = traceback.extract_tb(e.__traceback__)[-1:]
    place = f" at {Path(at[0].filename).name}:{at[0].lineno}" if at else ""
    return (f"{type(e).__name__}{place}: {' '.join(str(e).split())[:300]}; nobody expected this: set TRACEBACK=1 "
            "to see where it happened, and report it")


FOLLOWED = "SCORING_FOR"  # of the environment: the process id of the run whose file is scored


def follow(process: int) -> None:
    """End when the run that asked for this score is gone, however it went: nobody waits for the result, and a new run
    may be at work in its folder."""
    child = os.getppid() == process

    def watch() -> None:
        while os.getppid() == process if child else Path(f"/proc/{process}").exists():
            time.sleep(0.3)
        os._exit(1)

    if child or Path("/proc/self").exists():
        threading.Thread(target=watch, daemon=True).start()
