"""How a run ends that did not get to its end: said once, over all its processes."""

from __future__ import annotations

import time

from tern import command, processes
from tern.errors import Foreseen
from tern.processes import Elsewhere, LaunchError, Place, RankLost
from tern.runfolder import AlreadyFinished, RunFolder
from tern.signals import Interrupted


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
        command.say_error(text)
    elif place.local_rank == 0 and not shared:  # another machine's own trouble
        command.say_error(f"rank {place.rank}: {text}")
    else:
        time.sleep(processes.LET_RANK_0_SPEAK)
    return status
