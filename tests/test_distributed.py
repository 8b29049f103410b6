"""Several processes under torchrun: what each holds and sends, resuming on another number, and losing one."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch

import costs
import pack
from conftest import ROOT, clean_env, metrics, run, tiny_args
from train_gpt import (
    GPT,
    PRESETS,
    Config,
    Float,
    Int,
    Latents,
    Optimizer,
    Ranks,
    Stored,
    Ternary,
    from_wire,
    load_checkpoint,
    owners,
    resolve_settings,
    to_wire,
)

TINY = Config(**PRESETS["tiny"])
MARK = "MARK_OF_A_TEST_RUN"  # an environment variable
needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")


# -- runs under torchrun -----------------------------------------------------------------------------------------


@dataclass
class Ended:
    folder: Path  # of the run
    statuses: list[int]  # of each agent
    out: str
    err: str
    seconds: float = 0.0  # from the loss of a process to the end of the last


class Torchrun:
    """A run of the trainer: one torchrun per "node", each on its own address of this machine.

    torchrun puts workers into sessions of their own, where no group of ours reaches them. So every process carries a
    mark in its environment, and by it all are found, whoever their parent is, and ended with the test.
    """

    def __init__(self, logs: Path, args: list[str], ranks: int, nodes: int = 1):
        self.mark, self.logs, self.agents = uuid.uuid4().hex, logs, []
        self.saved_before = modified(folder_in(logs))
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        for node in range(nodes):
            where = ["--standalone"] if nodes == 1 else [
                f"--nnodes={nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}",
                f"--rdzv-id={self.mark}", f"--rdzv-conf=is_host={int(node == 0)}", f"--local-addr=127.0.0.{node + 1}"]
            command = [sys.executable, "-m", "torch.distributed.run", *where, f"--nproc-per-node={ranks // nodes}",
                       str(ROOT / "train_gpt.py"), *args]
            with open(logs / f"out{node}", "w") as out, open(logs / f"err{node}", "w") as err:
                self.agents.append(subprocess.Popen(command, cwd=ROOT, env=clean_env(**{MARK: self.mark}), stdout=out,
                                                    stderr=err))

    def __enter__(self) -> Torchrun:
        return self

    def __exit__(self, *_) -> None:
        deadline = time.monotonic() + 20
        while (left := self.processes()) and time.monotonic() < deadline:
            self.kill(*left)
            time.sleep(0.02)
        for agent in self.agents:
            agent.wait(timeout=20)

    def processes(self) -> dict[int, str]:
        """pid -> rank, or "" of an agent, of every living process of the run."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                entries = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:  # another user's, or gone by now; a zombie's is empty
                continue
            if f"{MARK}={self.mark}" in entries:
                found[int(folder.name)] = next((e[5:] for e in entries if e.startswith("RANK=")), "")
        return found

    def kill(self, *pids: int) -> None:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def until(self, ready: Callable[[], object], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < deadline, self.text("out") + self.text("err")
            time.sleep(0.01)

    def workers_at_next_checkpoint(self, folder: Path) -> dict[str, int]:
        """Rank -> pid, as soon as the run has saved."""
        def saved() -> bool:
            assert all(agent.poll() is None for agent in self.agents), self.text("out") + self.text("err")
            return modified(folder) > self.saved_before

        self.until(saved, 90)
        workers = {rank: pid for pid, rank in self.processes().items() if rank}
        assert not (folder / "model.tern").exists(), "too late to test anything"
        return workers

    def text(self, stream: str) -> str:
        return "".join((self.logs / f"{stream}{node}").read_text() for node in range(len(self.agents)))

    def ended(self, folder: Path, seconds: float = 120) -> Ended:
        """Wait for every process to end."""
        began = time.monotonic()
        self.until(lambda: all(agent.poll() is not None for agent in self.agents) and not self.processes(), seconds)
        took = time.monotonic() - began
        return Ended(folder, [agent.returncode for agent in self.agents], self.text("out"), self.text("err"), took)


def modified(folder: Path) -> int:
    path = folder / "checkpoint.safetensors"
    return path.stat().st_mtime_ns if path.exists() else 0


def folder_in(out: Path) -> Path:
    return out / "tiny_seed1337"


def args_of(data: Path, out: Path, *more: object) -> list[str]:
    return tiny_args(data, out, "--eval-stride", 0, *more)


def lose(data: Path, out: Path, choose: Callable[[Torchrun, dict[str, int]], list[int]], ranks: int = 2, nodes: int = 1
         ) -> Ended:
    """A run that saves after every step; once it has saved, the processes that choose names get SIGKILL."""
    args = args_of(data, out, "--checkpoint-every", 1, "--resume", "auto")
    with Torchrun(out, args, ranks, nodes) as running:
        running.kill(*choose(running, running.workers_at_next_checkpoint(folder_in(out))))
        return running.ended(folder_in(out), 60)


@pytest.fixture(scope="module")
def whole(data_dir, tmp_path_factory) -> Ended:
    """Two ranks from beginning to end, on two nodes that share the folder."""
    out = tmp_path_factory.mktemp("whole")
    with Torchrun(out, args_of(data_dir, out), ranks=2, nodes=2) as running:
        return running.ended(folder_in(out))


@pytest.fixture(scope="module")
def killed(data_dir, tmp_path_factory) -> Callable[[int], Ended]:
    """0: what was left of two ranks when rank 0 got SIGKILL. 1: of four, which went on from there, when rank 1 did."""
    @cache
    def of(rank: int) -> Ended:
        out = tmp_path_factory.mktemp(f"killed{rank}")
        if rank == 1:
            shutil.copytree(of(0).folder, folder_in(out))
        return lose(data_dir, out, lambda _, workers: [workers[str(rank)]], ranks=4 if rank else 2)

    return of


@pytest.fixture(scope="module")
def resumed(data_dir, tmp_path_factory, killed) -> Callable[[int], Ended]:
    """By number of ranks: the end of a run that two ranks began. Of the four, one was lost on the way."""
    @cache
    def on(ranks: int) -> Ended:
        out = tmp_path_factory.mktemp(f"resumed{ranks}")
        folder, args = folder_in(out), args_of(data_dir, out, "--resume", "auto")
        shutil.copytree(killed(1 if ranks == 4 else 0).folder, folder)
        if ranks == 1:
            done = run(*args)
            return Ended(folder, [done.returncode], done.stdout, done.stderr)
        with Torchrun(out, args, ranks) as running:
            return running.ended(folder)

    return on


@pytest.fixture(params=[2, 4])
def several(request) -> tuple[int, Ended]:
    """A number of ranks, and a run that they ended: 2 ran all of it, 4 what another two had begun."""
    done = request.getfixturevalue("whole") if request.param == 2 else request.getfixturevalue("resumed")(4)
    assert not any(done.statuses), done.out + done.err
    return request.param, done


def losses(folder: Path) -> dict[int, float]:
    """By step; of a step that was done again, the later."""
    return {r["step"]: r["loss"] for r in metrics(folder, "train")}


def settings_of(folder: Path) -> Config:
    return Config(**metrics(folder, "header")[-1]["settings"])


@needs_proc
def test_replicas_are_identical_and_the_file_holds_them(several):
    ranks, done = several
    assert f"{ranks} ranks hold identical params" in done.out
    final = metrics(done.folder, "final")[0]
    assert final["roundtrip_gap"] == 0.0 and final["logits_identical"] is True
    assert metrics(done.folder, "header")[-1]["world_size"] == ranks


@needs_proc
def test_the_loss_curve_is_that_of_one_rank(several, tiny_run):
    ranks, done = several
    one, more = losses(tiny_run[0]), losses(done.folder)
    assert one.keys() <= more.keys() and one[1] == pytest.approx(more[1], abs=2e-4)
    assert [more[step] for step in one] == pytest.approx(list(one.values()), abs=0.06)  # as in test_end_to_end


def sent_by_hand(config: Config, world: int) -> tuple[list[int], list[int], float]:
    """(gradient bytes, code bytes) that each rank sends in a step, and bytes for a ternary weight, for preset tiny."""
    owner, stacks = owners(config, world), defaultdict(list)
    for name, p in costs.parameters(config).items():
        stacks[owner[name], p.shape].append(p)
    every = sum(p.size for p in costs.parameters(config).values())
    gradients, codes, ternary, weights = [4 * every] * world, [0] * world, 0, 0
    for (rank, shape), ps in stacks.items():
        count = math.prod(shape) * len(ps)
        gradients[rank] -= 4 * count  # what a rank owns it keeps
        if ps[0].muon:  # five codes to a byte over the stack, a byte of log7 for 32 weights of a row
            size = -(-count // 5) + len(ps) * shape[0] * -(-shape[1] // 32)
            ternary, weights = ternary + size, weights + count
        else:
            size = 2 * count  # bf16
        codes[rank] += size
    return gradients, codes, ternary / weights


@needs_proc
def test_ranks_send_gradients_to_owners_and_codes_back(several):
    """fp32 of every parameter that a rank does not own; the codes and scales of those that it owns."""
    ranks, done = several
    config, record = settings_of(done.folder), metrics(done.folder, "memory")[-1]
    gradients, codes, each = sent_by_hand(config, ranks)
    assert record["gradient_bytes"] == gradients and record["code_bytes"] == codes
    assert record["bytes_per_ternary_weight"] == each
    matrices = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 2 * 80 * 32)
    scales = 2 * (2 * 32 + 2 * 16 + 80 + 32 * 3)  # three groups in a row of 80
    parameters = 400 * 32 + matrices + 2 * (2 + 4 * 32) + 32
    assert sum(gradients) == 4 * parameters * (ranks - 1)
    stacks = len({(owner, shape) for owner, shape in zip(owners(config, ranks).values(), (
        p.shape for p in costs.parameters(config).values()), strict=True)})
    least = 2 * (parameters - matrices) + matrices / 5 + scales
    assert least <= sum(codes) < least + stacks  # a stack wastes less than a byte
    assert 0.2 + scales / matrices <= each < 0.2 + scales / matrices + stacks / matrices < 0.235


def padding_by_hand(config: Config, world: int) -> list[int]:
    """Bytes on each rank that a count of shapes does not see: codes stay in whole groups, 96 columns for 80."""
    padding = [0] * world
    for name, rank in owners(config, world).items():
        shape = costs.parameters(config)[name].shape
        padding[rank] += shape[0] * (-shape[1] % 32) if name.endswith("mlp.proj.weight") else 0
    return padding


@needs_proc
def test_a_rank_holds_what_the_plan_counts(several):
    """To the byte, but for the codes' padding and for the last bytes of ternary tensors, shared in a stack."""
    ranks, done = several
    config, held = settings_of(done.folder), metrics(done.folder, "memory")[-1]["state_bytes"]
    _, codes, _ = sent_by_hand(config, ranks)
    padding = padding_by_hand(config, ranks)
    for rank in range(ranks):
        counted = costs.state_bytes(config, ranks, rank)
        assert held[rank] == pytest.approx(sum(counted.values()), rel=0.005)
        assert held[rank] == sum((counted | {"payload": sum(codes)}).values()) + padding[rank]


@needs_proc
def test_memory_falls_with_the_number_of_ranks(tiny_run, whole, resumed):
    """Params, gradient sums and received codes are on every rank; all else is on one of them."""
    config, own, busiest = settings_of(whole.folder), [], []
    everywhere = (2 + 4) * sum(p.size for p in costs.parameters(config).values()) + 4
    for ranks, folder in ((1, tiny_run[0]), (2, whole.folder), (4, resumed(4).folder)):
        held = metrics(folder, "memory")[-1]["state_bytes"]
        received = sum(sent_by_hand(config, ranks)[1]) if ranks > 1 else 0
        own.append(sum(held) - ranks * (everywhere + received))
        busiest.append(max(held))
        assert len(held) == ranks
    assert busiest[0] > busiest[1] > busiest[2]
    assert own[0] == own[1] == own[2] > 0


# -- another number of ranks, and a lost one ---------------------------------------------------------------------


@needs_proc
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_what_two_ranks_saved_resumes_on_any_number(resumed, tiny_run, ranks):
    done = resumed(ranks)
    assert not any(done.statuses), done.out + done.err
    headers = metrics(done.folder, "header")
    assert [h["world_size"] for h in headers] == {1: [2, 1], 2: [2, 2], 4: [2, 4, 4]}[ranks]
    at = [h["resumed_at"] for h in headers]
    assert at[0] == 0 and all(x < y for x, y in zip(at, at[1:], strict=False)), at  # each went on from the one before
    one, mine = losses(tiny_run[0]), losses(done.folder)
    assert [mine[step] for step in one] == pytest.approx(list(one.values()), abs=0.06)
    assert metrics(done.folder, "final")[0]["tokens_seen"] == 30 * 1024  # none skipped or repeated


@needs_proc
def test_a_lost_rank_and_the_nodes_do_not_change_the_file(resumed, whole):
    """One run lost a rank and was resumed, on one node; the other went through, on two nodes of a process each."""
    done = resumed(2)
    assert done.statuses == [0] and whole.statuses == [0, 0], done.err + whole.err
    assert whole.out.count("2 ranks hold identical params") == 1
    assert (done.folder / "model.tern").read_bytes() == (whole.folder / "model.tern").read_bytes()
    mine, theirs = (load_checkpoint(x.folder)[0] for x in (done, whole))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def assert_one_line(done: Ended) -> None:
    """One message for the user, with the way on, and no traceback but torchrun's own of its ChildFailedError."""
    print(f"all processes gone {done.seconds:.2f} s after the loss")
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 == done.err.count("a process of this run was lost"), done.err
    assert re.match(r"error: a process of this run was lost at step \d+, so all stop \(", errors[0])
    assert f"continue from {done.folder / 'checkpoint.safetensors'} with --resume auto" in errors[0]
    assert 'train_gpt.py", line' not in done.err and "terminate called" not in done.err, done.err
    assert not (done.folder / "model.tern").exists()
    assert done.statuses[0] == 1 and done.seconds < 60


@needs_proc
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_run_with_one_line(killed, rank):
    done = killed(rank)
    assert_one_line(done)
    state = load_checkpoint(done.folder)[1]  # whole, though its writer may have died at any moment
    assert 0 < state["step"] < 30 and not state["finished"]


@needs_proc
def test_a_lost_node_ends_the_run_with_one_line(data_dir, tmp_path):
    done = lose(data_dir, tmp_path, lambda running, workers: [running.agents[1].pid, workers["1"]], nodes=2)
    assert_one_line(done)


# -- owners ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_every_parameter_has_one_owner(preset, world):
    config = Config(**PRESETS[preset])
    owner = owners(config, world)
    with torch.device("meta"):
        names = [name for name, _ in GPT(config).named_parameters()]
    assert list(owner) == names and set(owner.values()) <= set(range(world))
    assert owner == owners(config, world)
    assert world > 1 or set(owner.values()) == {0}


def test_owners_by_hand():
    """The costliest first, each to the rank with the least work. Millions of flops at 5 iterations, with 100 for an
    element: fc and mlp.proj 2.222, the embedding of 400 x 32 1.280, c_q and attn.proj 1.085, c_k and c_v 0.256."""
    owner = owners(resolve_settings(["--preset", "tiny", "--vocab-size", "400"], {})[1], 4)
    expected = {
        "blocks.0.mlp.fc": 0, "blocks.0.mlp.proj": 1, "blocks.1.mlp.fc": 2, "blocks.1.mlp.proj": 3,
        "tok_emb": 0,  # loads are now 3.502, 2.222, 2.222, 2.222
        "blocks.0.attn.c_q": 1, "blocks.0.attn.proj": 2, "blocks.1.attn.c_q": 3,  # 3.308 each
        "blocks.1.attn.proj": 1,  # 4.393
        "blocks.0.attn.c_k": 2, "blocks.0.attn.c_v": 3,  # 3.564 each
        "blocks.1.attn.c_k": 0,  # 3.758
        "blocks.1.attn.c_v": 2,  # 3.820, so that 3 is left the least, also by all vectors
    }
    assert {n.removesuffix(".weight"): r for n, r in owner.items() if n.endswith(".weight")} == expected
    assert {r for n, r in owner.items() if not n.endswith(".weight")} == {3}


@pytest.mark.parametrize(("preset", "bound"), [("pr367", 1.001), ("golf16mb", 1.01)])
def test_eight_owners_have_about_the_same_work(preset, bound):
    config = Config(**PRESETS[preset])
    load, owner = [0.0] * 8, owners(config, 8)
    for name, p in costs.parameters(config).items():
        products = costs.newton_schulz_flops(*p.shape, config.muon_backend_steps) if p.muon else 0.0
        load[owner[name]] += products + 100 * p.size
    print(f"{preset}: busiest / mean = {max(load) / (sum(load) / 8):.4f}")
    assert max(load) <= bound * sum(load) / 8


class Mute(Ranks):
    """A rank whose words nobody hears."""

    def call(self, function, *args, **kwargs):
        return None


@pytest.mark.parametrize("world", [2, 3, 8])
def test_all_ranks_agree_on_segments(world):
    """Or they would wait for one another for ever."""
    seen = []
    for rank in range(world):
        torch.manual_seed(0)
        latents = Latents(GPT(TINY), TINY, Mute(rank, world))
        seen.append(latents)
        assert [b.latent is not None for b in latents.banks] == [b.owner == rank for b in latents.banks]
        assert [b.stored is not None for b in latents.banks] == [b.owner == rank for b in latents.banks]
    first = seen[0]
    assert sorted(n for x in seen for b in x.mine for n in b.names) == sorted(owners(TINY, world))
    for x in seen:
        assert [(b.names, b.owner) for b in x.banks] == [(b.names, b.owner) for b in first.banks]
        assert [len(s) for s in x.grad_segments] == [len(s) for s in first.grad_segments]
        assert [len(s) for s in x.wire_segments] == [len(s) for s in first.wire_segments]
        for bank in x.banks:  # a bank's gradient and codes are in the segment that goes to, and comes from, its owner
            for part, segment in ((bank.grad, x.grad_segments[bank.owner]), (bank.wire, x.wire_segments[bank.owner])):
                start = part.data_ptr() - segment.data_ptr()
                assert start >= 0 and start + part.nbytes <= segment.nbytes


def test_one_process_says_nothing_and_sums_gradients_in_one_buffer():
    def make(*ranks: Ranks) -> tuple[GPT, Latents]:
        torch.manual_seed(0)
        model = GPT(TINY)
        return model, Latents(model, TINY, *ranks)

    model, latents = make(Ranks(rank=0, world=1))
    count = sum(p.numel() for p in model.parameters())
    assert latents.flat_grad.numel() == count + 1 and latents.wire.numel() == 0 and latents.mine == latents.banks
    latents.flat_grad.copy_(torch.arange(count + 1))
    assert torch.equal(torch.cat([b.grad.flatten() for b in latents.banks]), latents.flat_grad[:-1])
    for bank in latents.banks:
        bank.grad += 1
    assert torch.equal(latents.flat_grad[:-1], torch.arange(1.0, count + 1))

    other, plain = make()
    for x, its in ((model, latents), (other, plain)):
        its.flat_grad.copy_(torch.linspace(-1, 1, count + 1))
        Optimizer(its, TINY).step(1.0, 0.9)  # would raise without a process group if it said anything
        its.refresh()
        assert not its.flat_grad.any() and its.ranks.sent == {"gradients": 0, "codes": 0}
        assert all(torch.equal(p.data, q) for b in its.banks for p, q in zip(
            b.params, b.format.dequantize(b.format.quantize(b.latent)), strict=True))
        assert {n for n, _ in x.named_parameters()} == {n for b in its.banks for n in b.names}
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


# -- what is sent ------------------------------------------------------------------------------------------------

WIRE_FORMATS = [
    *(Ternary(group, scale=scale) for group in (0, 3, 128) for scale in ("bf16", "fp16", "log7")),
    *(Int(bits, 4, ("bf16", "fp16", "log7", "log4")[bits % 4]) for bits in range(2, 9)),
    *(Float(dtype) for dtype in ("fp8", "bf16", "fp16")),
]
WIRE_SHAPES = [(1, 1), (6,), (3, 7), (2, 5, 5), (4, 3, 11), (3, 16, 32)]  # a bank is a stack of matrices or vectors


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize("fmt", WIRE_FORMATS, ids=lambda fmt: "-".join(map(str, fmt.spec().values())))
def test_the_wire_carries_every_bit(fmt):
    """At any address, as segments start where the one before ends; and for any bits of a float, also of NaN."""
    generator = torch.Generator().manual_seed(0)
    for shape in WIRE_SHAPES:
        stored = fmt.quantize(torch.randn(shape, generator=generator))
        if isinstance(fmt, Float):
            random = torch.randint(256, (stored.codes.nbytes,), generator=generator, dtype=torch.uint8)
            stored = Stored(random.view(stored.codes.dtype).view(shape), None)
        meta = Stored(stored.codes.to("meta"), None if stored.scales is None else stored.scales.to("meta"))
        wire = to_wire(stored, fmt)
        count, scales = stored.codes.numel(), 0 if stored.scales is None else stored.scales.nbytes
        codes = -(-count // 5) if isinstance(fmt, Ternary) else stored.codes.nbytes
        assert wire.dtype == torch.uint8 and len(wire) == codes + scales
        if isinstance(fmt, Ternary):
            assert wire[:codes].numpy().tobytes() == pack.pack_base3(stored.codes.numpy())
        for offset in range(4):
            buffer = torch.full((len(wire) + 8,), 255, dtype=torch.uint8)
            view = buffer[offset : offset + len(wire)]
            view.copy_(wire)
            got = from_wire(view, fmt, meta)
            buffer.fill_(0)  # the next step's codes arrive there while these may be in use
            assert got.codes.dtype == stored.codes.dtype and got.codes.shape == stored.codes.shape
            assert torch.equal(bits(got.codes), bits(stored.codes)), (shape, offset)
            assert (got.scales is None) == (stored.scales is None)
            if got.scales is not None:
                assert got.scales.dtype == stored.scales.dtype and got.scales.shape == stored.scales.shape
                assert torch.equal(bits(got.scales), bits(stored.scales)), (shape, offset)


def test_every_ternary_byte():
    """The first code is the least digit: all 243 quintuples in order are the bytes 0 to 242."""
    codes = torch.tensor([five[::-1] for five in product((-1, 0, 1), repeat=5)], dtype=torch.int8)
    stored, fmt = Stored(codes, torch.zeros(0, 1)), Ternary()
    wire = to_wire(stored, fmt)
    assert wire.tolist() == list(range(243)) == list(pack.pack_base3(codes.numpy()))
    assert torch.equal(from_wire(wire, fmt, stored).codes, codes)
