"""How a run ends: with its page, or, where it did not get to its end, with why, said once over all its processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from tern import command, processes, source
from tern.errors import Foreseen
from tern.processes import Elsewhere, LaunchError, Place, RankLost
from tern.runfolder import AlreadyFinished, RunFolder
from tern.signals import Interrupted

PAGE_PATIENCE = 120  # seconds after which a page is not worth waiting for


def end_well(place: Place, folder: RunFolder) -> int:
    """Have a finished run drawn on rank 0, after all that is timed or counts; the exit status, which is 0 whatever
    comes of the page.

    By a process of its own: what draws is no part of the program, so it takes no bytes of code, and a submission's one
    file, which has no such thing beside it, leaves the page out.
    """
    script = source.root() / "tern/report.py"
    if place.rank or not folder.config.write_page or not script.is_file():
        return 0
    try:
        done = subprocess.run([sys.executable, str(script), str(folder.path)], stdin=subprocess.DEVNULL,
                              env=processes.environment_alone(os.environ), capture_output=True, encoding="utf-8",
                              errors="replace", timeout=PAGE_PATIENCE, check=False)
        why = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1] if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as e:
        why = str(e)
    except (KeyboardInterrupt, Interrupted):  # all that counts is done
        why = "stopped"
    if why:
        folder.log.line(f"notice      no report.html was written ({why.removeprefix('error: ')}); try again: python "
                        f"tern/report.py {folder.path}")
    return 0


def report_end(e: BaseException, place: Place, folder: RunFolder | None) -> int:
    """Say it, on the terminal and in the run's log; the exit status. folder: of the run, once there is one."""
    log = folder.log if folder is not None else None
    left = folder.what_is_left() if folder is not None else "nothing was trained"
    if log is not None:
        log.strict = False
        log.clear_bar()
    if isinstance(e, AlreadyFinished):
        if place.rank == 0:
            command.print_if_open(str(e))
        return 0
    if isinstance(e, Interrupted):
        log.line(str(e))
        return 128 + e.signum
    if isinstance(e, Elsewhere):
        time.sleep(processes.LET_RANK_0_SPEAK)
        return 1
    if isinstance(e, LaunchError):
        command.say_error(e)  # every process that meets one: it may be the only one
        return e.status
    if isinstance(e, RankLost):
        text = f"a process of this run was lost, so all stop ({e}); {left}"
        log.line(f"error: {text}", console=False)
        if processes.first_to_speak():
            command.say_error(text)
        return 1
    status, text, shared = 1, str(e), False
    if isinstance(e, Foreseen):
        status, shared = e.status, e.shared
    elif isinstance(e, KeyboardInterrupt):
        status, text, shared = 130, f"stopped; {left}", True
    elif not isinstance(e, OSError):
        text = command.describe_unexpected(e)
    if log is not None:
        log.line(f"error: {text}", console=False)
    if place.rank == 0:
        processes.first_to_speak("failed")
        command.say_error(text)
    elif place.local_rank == 0 and not shared:  # another machine's own trouble
        command.say_error(f"rank {place.rank}: {text}")
    else:
        time.sleep(processes.LET_RANK_0_SPEAK)
        if not isinstance(e, Foreseen | OSError | KeyboardInterrupt) and processes.first_to_speak("failed", False):
            command.say_error(f"rank {place.rank}: {text}")  # maybe this rank's alone, as of memory
    return status
