"""The processes of a run: how they find each other, and all that they say to each other."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from tern.errors import Foreseen
from tern.machine import remove_caches


class LaunchError(Foreseen):
    """Processes that are not the group that the environment says; the message says how to start them."""

    status = 2


@dataclass(frozen=True)
class Place:
    """A process among those of a run; the defaults are those of a process alone."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0  # on this machine
    local_world: int = 1


def process_place(env: Mapping[str, str]) -> Place:
    """This process's place, from the variables that torchrun sets. Raises LaunchError.

    Clusters and notebooks set some of them too. WORLD_SIZE alone decides: empty or 1 is a process alone, whatever the
    others say; more needs all that a group needs.
    """
    def number(name: str, default: int, low: int, high: int) -> int:
        text = env.get(name, "").strip()
        if not text:
            return default
        if len(text) > 9 or not (text.isascii() and text.isdecimal()) or not low <= int(text) <= high:
            raise LaunchError(f"environment {name}={text[:40]!r}: must be a whole number from {low} to {high}; start "
                              "with torchrun, which sets it, or unset WORLD_SIZE for a process alone")
        return int(text)

    world = number("WORLD_SIZE", 1, 1, 1 << 20)
    if world == 1:
        return Place()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not env.get(name, "").strip()]
    if missing:
        raise LaunchError(
            f"WORLD_SIZE={world} is set in the environment, but not {', '.join(missing)}: start all processes with "
            f"torchrun --standalone --nproc_per_node={world}, or unset WORLD_SIZE for a process alone"
        )
    number("MASTER_PORT", 0, 1, 65535)
    local_world = number("LOCAL_WORLD_SIZE", 1, 1, world)
    return Place(number("RANK", 0, 0, world - 1), world, number("LOCAL_RANK", 0, 0, world - 1), local_world)


# How long processes look for each other. torchrun starts all of them, which on a busy file system takes its time; a
# person who started one of two should not have to wait.
FIND_EACH_OTHER, WITH_TORCHRUN = timedelta(seconds=40), timedelta(minutes=10)

TORCHRUN = {"TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE", "GROUP_RANK"}  # it sets all of them

SETTING_UP = timedelta(minutes=30)  # compiling and reading data may keep a process from answering for this long

def join_group(place: Place, backend: str) -> None:
    """Make the process group of all processes of this run. Raises LaunchError within a minute if they are not there."""
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    patience = WITH_TORCHRUN if os.environ.keys() >= TORCHRUN else FIND_EACH_OTHER
    if place.rank:
        patience /= 2  # a rank that does not find rank 0 tries twice
    try:
        with quiet_stderr():  # torch warns of every attempt to connect
            store, _, _ = next(dist.rendezvous("env://", place.rank, place.world, timeout=patience))
            if store.add(f"here/{place.rank}", 1) > 1:
                raise ValueError(f"RANK={place.rank} was started twice")
            store.wait([f"here/{rank}" for rank in range(place.world)], patience)
            store.set_timeout(SETTING_UP)  # NCCL's ranks find each other through it at their first collective
            dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world, timeout=SETTING_UP)
    except (RuntimeError, ValueError, OSError) as e:  # torch's errors of connection are RuntimeErrors
        if "EADDRINUSE" in str(e):
            raise LaunchError(f"MASTER_PORT={port}: another program uses this port; choose another one for all "
                              "processes") from None
        why = " ".join(str(e).splitlines()[0].split())[:200] if str(e) else repr(e)
        raise LaunchError(
            f"rank {place.rank} did not find the other processes of WORLD_SIZE={place.world} at MASTER_ADDR={address} "
            f"MASTER_PORT={port} ({why}); start all of them, each with its RANK, or use torchrun; unset WORLD_SIZE for "
            "a process alone"
        ) from None


def launcher(processes: int) -> list[str]:
    """What runs a program's script in so many processes of this machine."""
    if processes == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]


def environment_alone(env: Mapping[str, str]) -> dict[str, str]:
    """The environment without what makes a process one of a group."""
    group = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK"}
    return {name: value for name, value in env.items()
            if name not in group and not name.startswith("TORCHELASTIC_")}


def leave_group() -> None:
    """For a process that ends with an error. NCCL's shutdown waits for all ranks, and they wait for this one: there
    the process just ends, by end_process."""
    if dist.is_initialized() and dist.get_backend() != "nccl":
        dist.destroy_process_group()


def first_to_speak(of: str = "lost", alone: bool = True) -> bool:
    """Whether this is the first process that asks, of a group that has lost one; `alone` where nobody can say."""
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set_timeout(timedelta(seconds=5))
        return store.add(of, 1) == 1
    except (RuntimeError, ValueError):  # the store went with the lost process; or there is no group
        return alone


LET_RANK_0_SPEAK = 2.0  # seconds: torchrun stops all processes, rank 0 too, when the first one ends with an error

def check_agreement(said: Mapping[str, object], device: torch.device) -> None:
    """Raises LaunchError unless all processes of the group say the same under each name: machines may hold older copies
    of data or program. A process alone agrees with itself."""
    if not dist.is_initialized():
        return
    digests = [hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest() for value in said.values()]
    mine = torch.tensor([list(digest) for digest in digests], dtype=torch.int64, device=device)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    for i, name in enumerate(said):
        differ = [rank for rank, theirs in enumerate(every) if not torch.equal(theirs[i], every[0][i])]
        if differ:
            raise LaunchError(f"rank(s) {', '.join(map(str, differ))} do not have the {name} of rank 0; give all "
                              "processes the same, on every machine")


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Drop what libraries write to the standard error file, past Python."""
    try:
        saved = os.dup(2)
    except OSError:  # it is closed: then there is nothing to hear
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def end_process(status: int) -> int:
    """The status of a command that is over; one of several processes ends here and now with it.

    A process group that the compiler has seen outlives its destruction: its threads run on while the interpreter is
    taken down, and one that still lets go of a tensor then aborts the process ("terminate called without an active
    exception"), after the work is done.
    """
    if os.environ.get("WORLD_SIZE", "").strip() not in ("", "1"):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # nobody listens any more
                stream.flush()
        remove_caches()
        os._exit(status)
    return status


class Elsewhere(Exception):
    """Rank 0 has met an error, and says it."""


class RankLost(RuntimeError):
    """Another process of the run does not answer."""


def share_out(costs: Mapping[str, int], world: int) -> dict[str, int]:
    """Name -> the rank that does this work: each in turn, the costliest first, goes to the rank with the least so far.

    The same on every rank.
    """
    load, owner = [0] * world, {}
    for name in sorted(costs, key=lambda name: costs[name], reverse=True):  # a stable sort
        owner[name] = load.index(min(load))
        load[owner[name]] += costs[name]
    return {name: owner[name] for name in costs}


class Ranks:
    """The processes of a run and all that they say to each other. With one process nothing is said."""

    def __init__(self, rank: int = 0, world: int = 1):
        self.rank, self.world = rank, world
        self.group: dist.ProcessGroup | None = None  # None: the group of all, which is patient
        self.host: dist.ProcessGroup | None = None
        self.sent = {"gradients": 0, "codes": 0}  # bytes that this rank gave away; of a broadcast, once

    @contextlib.contextmanager
    def naming_failures(self) -> Iterator[None]:
        """Within it a failure of the backend becomes a RankLost."""
        try:
            yield
        except RuntimeError as e:  # gloo's and NCCL's errors have no type of their own
            if self.world == 1 or isinstance(e, torch.OutOfMemoryError | torch.AcceleratorError):
                raise
            raise RankLost(re.sub(r"^\[[^ ]*\] |\. This is .*|\n.*", "", str(e), flags=re.S)) from e

    def be_impatient(self, silence: timedelta) -> None:
        """From now on a rank that does not answer for so long is lost. Collective.

        What the hosts say to each other goes beside NCCL: on its stream it would wait for all that the GPUs still do.
        """
        self.group = self.call(dist.new_group, timeout=silence)
        self.host = self.call(dist.new_group, timeout=silence, backend="gloo")

    def call(self, function: Callable, *args, **kwargs):
        """function(*args), or None with one process."""
        if self.world > 1:
            with self.naming_failures():
                return function(*args, **kwargs)

    def differing(self, digest: bytes, device: torch.device) -> list[int]:
        """Ranks whose digest is not rank 0's; collective, and patient with a rank that comes late."""
        mine = torch.tensor(list(digest), dtype=torch.int64, device=device)
        every = [mine.clone() for _ in range(self.world)]
        self.call(dist.all_gather, every, mine)
        return [rank for rank, theirs in enumerate(every) if not torch.equal(theirs, every[0])]

    def same_bits(self, tensors: Iterable[Tensor]) -> tuple[str, list[int]]:
        """(sha256 of tensors, ranks whose tensors have other bits than rank 0's); collective."""
        digest = hashlib.sha256()
        for x in tensors:
            digest.update(x.detach().cpu().contiguous().view(torch.uint8).numpy().data)
            device = x.device
        return digest.hexdigest(), self.differing(digest.digest(), device) if self.world > 1 else []

    def sum(self, x: Tensor, patient: bool = False) -> Tensor:
        """x <- sum over all ranks, on all ranks. patient: one of them may come late."""
        self.call(dist.all_reduce, x, group=None if patient else self.group)
        return x

    def largest(self, numbers: Sequence[float]) -> list[float]:
        """Of each number the largest of all ranks, from host to host."""
        word = torch.tensor(numbers, dtype=torch.float64)
        self.call(dist.all_reduce, word, op=dist.ReduceOp.MAX, group=self.host)
        return word.tolist()

    def reduce(self, x: Tensor, owner: int) -> dist.Work | None:
        """Begin: x <- sum over all ranks, on the owner only; elsewhere x becomes undefined."""
        if owner != self.rank:
            self.sent["gradients"] += x.nbytes
        return self.call(dist.reduce, x, dst=owner, group=self.group, async_op=True) if x.numel() else None

    def broadcast(self, x: Tensor, owner: int) -> dist.Work | None:
        """Begin: x <- the owner's x, on all ranks."""
        if owner == self.rank:
            self.sent["codes"] += x.nbytes
        return self.call(dist.broadcast, x, src=owner, group=self.group, async_op=True) if x.numel() else None

    def wait(self, work: dist.Work | None) -> None:
        if work is not None:
            self.call(work.wait)

    def gather(self, x: Tensor, owner: int) -> Tensor:
        """The owner's x, of equal shape on all ranks, on rank 0; collective, as all of these."""
        if owner and self.rank == owner:
            self.call(dist.send, x, dst=0, group=self.group)
        elif owner and self.rank == 0:
            self.call(dist.recv, x, src=owner, group=self.group)
        return x
