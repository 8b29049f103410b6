"""The machine: its cores, its compiler and where that keeps what it made, its memory."""

from __future__ import annotations

import atexit
import ctypes
import getpass
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from tern import runlog, source
from tern.files import folder_identity, sha256_file
from tern.settings import ConfigError


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def bf16_products() -> bool:
    """Whether torch has kernels for products of bf16 matrices on this CPU. With AVX2 alone it has none, and takes ten
    times as long for them as in fp32 (LOG.md)."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def describe() -> dict:
    """Versions and hardware, as a run's header has them."""
    cpu = torch.backends.cpu.get_cpu_capability() + ("" if bf16_products() else runlog.NO_BF16_PRODUCTS)
    gpu = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__,
        "platform": f"{platform.system()} {platform.machine()}", "cpu": cpu,
        "cores": cores(), "gpu": gpu,
    }


def pick_device(wanted: str, local_rank: int) -> torch.device:
    """The device of this process; wanted: auto, cpu or cuda. Raises ConfigError if it is not there."""
    cuda = torch.cuda.is_available() if wanted == "auto" else wanted == "cuda"
    if not cuda:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device='cuda': this machine has no CUDA device; use --device cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(f"nproc_per_node: this machine has {torch.cuda.device_count()} GPU(s), and this is process "
                          f"{local_rank + 1} of it")
    return torch.device("cuda", local_rank)


class Undrawn(TorchFunctionMode):
    """Leaves a tensor as it is where a layer's initialisation would draw its values."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        initial = getattr(func, "__module__", None) == "torch.nn.init" or func is torch.Tensor.normal_
        return [*args, *kwargs.values()][0] if initial else func(*args, **kwargs)


@contextmanager
def no_values() -> Iterator[None]:
    """What is built herein has shapes and dtypes alone: it is on the meta device, and nothing is drawn for it. (To draw
    numbers there torch imports its compiler, which takes 2 s.)"""
    with torch.device("meta"), Undrawn():
        yield


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The state of torch's generators, as a checkpoint has it: rng/cpu and, with a GPU, rng/cuda."""
    state = {"rng/cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["rng/cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Restore what random_state gave, on the same kind of device or another. Raises KeyError without rng/cpu."""
    torch.set_rng_state(state["rng/cpu"])
    if device.type == "cuda" and "rng/cuda" in state:
        torch.cuda.set_rng_state(state["rng/cuda"], device)


def prepare_device(device: torch.device) -> None:
    """Make the device the one in use; on a CPU, keep its memory."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()


def compute_deterministically(device: torch.device) -> None:
    """The same seed must give the same bytes; on a CPU this costs nothing."""
    if device.type == "cpu":
        # As torch.use_deterministic_algorithms(True), which also tells the compiler not to measure kernels on a GPU and
        # imports all of it for that: 2 s.
        torch.set_deterministic_debug_mode("error")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """x of the host's memory, there; a GPU fetches it when it comes to it, and the host does not wait."""
    return x if device.type == "cpu" else x.pin_memory().to(device, non_blocking=True)


class Fetch:
    """A few numbers on their way from the device, which is asked now and waited for when they are read."""

    def __init__(self, x: torch.Tensor):
        self.there, self.event = x, None
        if x.device.type == "cuda":
            self.there = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def numbers(self) -> list[float]:
        if self.event is not None:
            self.event.synchronize()
        return self.there.tolist()


def synchronize(device: torch.device) -> None:
    """Wait for what the device has been asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile finds a compiler: of C++ for a CPU, of C for a GPU."""
    return any(map(shutil.which, ("g++", "clang++") if device.type == "cpu" else ("cc", "gcc", "clang")))


OWN_CACHES: list[str] = []  # made by this process, which removes them


def remove_caches() -> None:
    while OWN_CACHES:
        shutil.rmtree(OWN_CACHES.pop(), ignore_errors=True)


def writable_compiler_cache() -> list[str]:
    """Give torch's compiler a cache folder that it can write, in the environment; a notice if not the usual one.

    torch makes the folder when parts of it are imported, compiled or not. Raises OSError where nothing can be written.
    """
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user id that the machine has no name for
        user = ""
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    if not folder and user:
        folder = os.path.join(tempfile.gettempdir(), "torchinductor_" + re.sub(r'[\\/:*?"<>|]', "_", user))
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return []
    except OSError as e:
        own = tempfile.mkdtemp(prefix="torchinductor_")
        OWN_CACHES.append(own)
        atexit.register(remove_caches)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = own
        return [f"the compiler's cache {folder or 'of a user without a name'} cannot be written ({e.strerror}): another"
                " one is used and thrown away; TORCHINDUCTOR_CACHE_DIR names a folder to keep"]


def prepare_compiler(graphs: int) -> None:
    """Let torch.compile make so many graphs of one function, each for its shapes."""
    torch._dynamo.config.recompile_limit = max(8, graphs + 1)
    if torch.are_deterministic_algorithms_enabled():  # the compiler's own flag too: it is part of its cache's keys
        torch.use_deterministic_algorithms(True)
    tag_compiler_cache()


def tag_compiler_cache() -> None:
    """Make the compiler's cache ask for this very program: it does not look into operators (tern/kernels.py)."""
    hashes = {name: sha256_file(source.root() / name) for name in source.code_files()}
    torch.compiler.config.cache_key_tag = folder_identity(hashes)


def keep_freed_memory() -> None:
    """Tell glibc to reuse freed memory instead of returning it to the kernel, which then zeroes every page again.

    PyTorch's CPU allocator is malloc; the activations of a step are megabytes each. LOG.md has the measured effect.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return  # not glibc
    for name, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD (malloc.h)
        mallopt(name, value)
