"""Several processes under torchrun: what each holds and sends, resuming on another number, and losing one."""

from __future__ import annotations

import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from bench import gpu_step
from conftest import NAME, PATIENCE, ROOT, clean_env, ended, metrics, run, started, tiny_args
from records import costs
from tern.checkpoints import FILE, read_checkpoint, read_state
from tern.processes import launcher
from train_gpt import GPT, PRESETS, Config, Latents, Optimizer, optimizer_of, owners, param_shapes

TINY = Config(**PRESETS["tiny"])
MARK = "MARK_OF_A_TEST_RUN"  # an environment variable
FOUR = pytest.param(4, marks=pytest.mark.rehearsal)  # processes: too many for two cores to be quick
needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")


# -- runs under torchrun -----------------------------------------------------------------------------------------

# The trainer, of which one rank stays behind after a step and says so: the others wait for it in the next exchange.
STAYS_BEHIND = """
import os, sys, time, train_gpt

class Held(train_gpt.Trainer):
    def after_step(self, plan):
        super().after_step(plan)
        if [self.rank, self.step] == [int(os.environ["HELD_RANK"]), int(os.environ["HELD_STEP"])]:
            with open(os.environ["HELD_FILE"], "w") as f:
                print(os.getpid(), file=f)
            time.sleep(3600)

train_gpt.Trainer = Held
sys.exit(train_gpt.main())
"""


@dataclass
class Ended:
    folder: Path  # of the run
    statuses: list[int]  # of each agent
    out: str
    err: str


class Torchrun:
    """A run of the trainer: one torchrun per "node", each on its own address of this machine.

    torchrun puts workers into sessions of their own, where no group of ours reaches them. So every process carries a
    mark in its environment, and by it all are found, whoever their parent is, and ended with the test.
    """

    def __init__(self, logs: Path, args: list[str], ranks: int, nodes: int = 1, program: Path = ROOT / "train_gpt.py",
                 **env: str):
        self.mark, self.logs, self.agents = uuid.uuid4().hex, logs, []
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        for node in range(nodes):
            where = ["--standalone"] if nodes == 1 else [
                f"--nnodes={nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}",
                f"--rdzv-id={self.mark}", f"--rdzv-conf=is_host={int(node == 0)}", f"--local-addr=127.0.0.{node + 1}"]
            command = [sys.executable, "-m", "torch.distributed.run", *where, f"--nproc-per-node={ranks // nodes}",
                       str(program), *args]
            with open(logs / f"out{node}", "w") as out, open(logs / f"err{node}", "w") as err:
                self.agents.append(subprocess.Popen(command, cwd=ROOT, env=clean_env(**{MARK: self.mark}, **env),
                                                    stdout=out, stderr=err))

    def __enter__(self) -> Torchrun:
        return self

    def __exit__(self, *_) -> None:
        deadline = time.monotonic() + PATIENCE
        while (left := self.processes()) and time.monotonic() < deadline:
            self.kill(*left)
            time.sleep(0.02)
        for agent in self.agents:
            agent.wait(timeout=PATIENCE)

    def processes(self) -> list[int]:
        """Every living process of the run."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                entries = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:  # another user's, or gone by now; a zombie's is empty
                continue
            if f"{MARK}={self.mark}" in entries:
                found.append(int(folder.name))
        return found

    def kill(self, *pids: int) -> None:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def until(self, ready: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not ready():
            assert time.monotonic() < deadline, self.text("out") + self.text("err")
            time.sleep(0.01)

    def text(self, stream: str) -> str:
        return "".join((self.logs / f"{stream}{node}").read_text() for node in range(len(self.agents)))

    def ended(self, folder: Path) -> Ended:
        """Wait for every process to end."""
        self.until(lambda: all(agent.poll() is not None for agent in self.agents) and not self.processes())
        return Ended(folder, [agent.returncode for agent in self.agents], self.text("out"), self.text("err"))


def args_of(data: Path, out: Path, *more: object) -> list[str]:
    return tiny_args(data, out, "--eval-stride", 0, *more)


def lose(data: Path, out: Path, rank: int, step: int, ranks: int, nodes: int = 1) -> Ended:
    """A run that saves after every step and loses this rank in the middle of this step; of two nodes, rank 1's."""
    (out / "held.py").write_text(STAYS_BEHIND)
    args = args_of(data, out, "--checkpoint-every", 1, "--resume", "auto")
    hold = {"HELD_RANK": str(rank), "HELD_STEP": str(step), "HELD_FILE": str(out / "held"), "PYTHONPATH": str(ROOT)}
    with Torchrun(out, args, ranks, nodes, out / "held.py", **hold) as running:
        def held() -> bool:
            assert all(agent.poll() is None for agent in running.agents), running.text("out") + running.text("err")
            return (out / "held").exists() and (out / "held").read_text().endswith("\n")

        running.until(held)
        running.kill(*([running.agents[1].pid] if nodes > 1 else []), int((out / "held").read_text()))
        return running.ended(out / NAME)


@pytest.fixture(scope="module")
def whole(data_dir, tmp_path_factory) -> Ended:
    """Two ranks from beginning to end, on two nodes that share the folder."""
    out = tmp_path_factory.mktemp("whole")
    with Torchrun(out, args_of(data_dir, out), ranks=2, nodes=2) as running:
        return running.ended(out / NAME)


@pytest.fixture(scope="module")
def killed(data_dir, tmp_path_factory) -> Callable[[int], Ended]:
    """0: what was left of two ranks when rank 0 got SIGKILL. 1: of four, which went on from there, when rank 1 did."""
    @cache
    def of(rank: int) -> Ended:
        out = tmp_path_factory.mktemp(f"killed{rank}")
        if rank == 1:
            shutil.copytree(of(0).folder, out / NAME)
        return lose(data_dir, out, rank, step=12 if rank else 6, ranks=4 if rank else 2)

    return of


@pytest.fixture(scope="module")
def resumed(data_dir, tmp_path_factory, killed) -> Callable[[int], Ended]:
    """By number of ranks: the end of a run that two ranks began. Of the four, one was lost on the way."""
    @cache
    def on(ranks: int) -> Ended:
        out = tmp_path_factory.mktemp(f"resumed{ranks}")
        folder, args = out / NAME, args_of(data_dir, out, "--resume", "auto")
        shutil.copytree(killed(1 if ranks == 4 else 0).folder, folder)
        if ranks == 1:
            done = run(*args)
            return Ended(folder, [done.returncode], done.stdout, done.stderr)
        with Torchrun(out, args, ranks) as running:
            return running.ended(folder)

    return on


@pytest.fixture(params=[2, FOUR])
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


def check_loss_curve(folder: Path, one_rank: Path) -> None:
    one, more = losses(one_rank), losses(folder)
    assert one[1] == pytest.approx(more[1], abs=2e-4)
    assert [more[step] for step in one] == pytest.approx(list(one.values()), abs=0.06)  # of sums in another order


@needs_proc
def test_replicas_are_identical_and_the_file_holds_them(several, tiny_run):
    ranks, done = several
    assert f"{ranks} ranks hold identical params" in done.out
    final = metrics(done.folder, "final")[0]
    assert final["roundtrip_gap"] == 0.0 and final["logits_identical"] is True
    assert metrics(done.folder, "header")[-1]["world_size"] == ranks
    check_loss_curve(done.folder, tiny_run[0])


# -- what is held and sent ---------------------------------------------------------------------------------------


def sent_by_hand(config: Config, world: int) -> tuple[list[int], list[int], float]:
    """(gradient bytes, code bytes) that each rank sends in a step, and bytes for a ternary weight, for preset tiny."""
    shapes, owner, stacks = param_shapes(config), owners(config, world), defaultdict(list)
    for name, shape in shapes.items():
        stacks[owner[name], shape, optimizer_of(name)].append(name)
    gradients, codes, ternary, weights = [4 * sum(map(math.prod, shapes.values()))] * world, [0] * world, 0, 0
    for (rank, shape, optimizer), names in stacks.items():
        count = math.prod(shape) * len(names)
        gradients[rank] -= 4 * count  # what a rank owns it keeps
        size = 2 * count  # bf16
        if optimizer == "muon":  # five codes to a byte over the stack, a byte of log7 for 32 weights of a row
            size = -(-count // 5) + len(names) * shape[0] * -(-shape[1] // 32)
            ternary, weights = ternary + size, weights + count
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
    stacks = 13 * ranks  # no more than that, and a stack wastes less than a byte
    least = 2 * (parameters - matrices) + matrices / 5 + scales
    assert least <= sum(codes) < least + stacks
    assert 0.2 + scales / matrices <= each < 0.2 + scales / matrices + stacks / matrices < 0.24


@needs_proc
def test_a_rank_holds_what_the_plan_counts(several):
    """To the byte, but for the last bytes of ternary tensors, which share them in a stack."""
    ranks, done = several
    config, held = settings_of(done.folder), metrics(done.folder, "memory")[-1]["state_bytes"]
    _, codes, _ = sent_by_hand(config, ranks)
    for rank in range(ranks):
        counted = costs.state_bytes(config, ranks, rank)
        assert held[rank] == pytest.approx(sum(counted.values()), rel=0.005)
        assert held[rank] == sum((counted | {"payload": sum(codes)}).values())


@pytest.mark.rehearsal
@needs_proc
def test_memory_falls_with_the_number_of_ranks(tiny_run, whole, resumed):
    """Params, gradient sums and received codes are on every rank; all else is on one of them."""
    config, own, busiest = settings_of(whole.folder), [], []
    everywhere = (2 + 4) * sum(map(math.prod, param_shapes(config).values())) + 4
    for ranks, folder in ((1, tiny_run[0]), (2, whole.folder), (4, resumed(4).folder)):
        held = metrics(folder, "memory")[-1]["state_bytes"]
        received = sum(sent_by_hand(config, ranks)[1]) if ranks > 1 else 0
        own.append(sum(held) - ranks * (everywhere + received))
        busiest.append(max(held))
        assert len(held) == ranks
    assert busiest[0] > busiest[1] > busiest[2]
    assert own[0] == own[1] == own[2] > 0


@pytest.mark.fast
def test_eight_owners_have_about_the_same_work():
    """Counted in the products of Newton-Schulz alone, which are nearly all of it."""
    for preset, bound in (("pr367", 1.001), ("golf16mb", 1.03)):
        config, load = Config(**PRESETS[preset]), [0.0] * 8
        shapes = param_shapes(config)
        for name, rank in owners(config, 8).items():
            if optimizer_of(name) == "muon":
                load[rank] += gpu_step.newton_schulz(*shapes[name], config.muon_backend_steps)[0]
        assert max(load) <= bound * sum(load) / 8, preset


# -- another number of ranks, and a lost one ---------------------------------------------------------------------


@needs_proc
@pytest.mark.parametrize("ranks", [1, FOUR])
def test_what_two_ranks_saved_resumes_on_any_number(resumed, tiny_run, ranks):
    done = resumed(ranks)
    assert not any(done.statuses), done.out + done.err
    headers = metrics(done.folder, "header")
    assert [h["world_size"] for h in headers] == {1: [2, 1], 4: [2, 4, 4]}[ranks]
    assert [h["resumed_at"] for h in headers] == [0, 5, 11][: len(headers)]
    check_loss_curve(done.folder, tiny_run[0])
    assert metrics(done.folder, "final")[0]["tokens_seen"] == 30 * 1024  # none skipped or repeated


@needs_proc
def test_a_lost_rank_and_the_nodes_do_not_change_the_file(resumed, whole):
    """One run lost a rank and was resumed, on one node; the other went through, on two nodes of a process each."""
    done = resumed(2)
    assert done.statuses == [0] and whole.statuses == [0, 0], done.err + whole.err
    assert whole.out.count("2 ranks hold identical params") == 1
    assert (done.folder / "model.tern").read_bytes() == (whole.folder / "model.tern").read_bytes()
    mine, theirs = (read_checkpoint(x.folder)[0] for x in (done, whole))
    assert mine.keys() == theirs.keys() and all(np.array_equal(mine[k], theirs[k]) for k in mine)


def check_one_line(done: Ended) -> None:
    """One message for the user, with the way on, and no traceback but torchrun's own of its ChildFailedError."""
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 == done.err.count("a process of this run was lost"), done.err
    assert str(done.folder / FILE) in errors[0] and "--resume auto" in errors[0]
    assert 'train_gpt.py", line' not in done.err and "terminate called" not in done.err, done.err
    assert not (done.folder / "model.tern").exists() and done.statuses[0] == 1


@needs_proc
@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.rehearsal)])
def test_a_killed_rank_ends_the_run_with_one_line(killed, rank):
    done = killed(rank)
    check_one_line(done)
    state = read_state(done.folder)
    assert state["step"] == (11 if rank else 5) and not state["finished"]


@needs_proc
def test_a_lost_node_ends_the_run_with_one_line(data_dir, tmp_path):
    check_one_line(lose(data_dir, tmp_path, rank=1, step=3, ranks=2, nodes=2))


@needs_proc
@pytest.mark.parametrize("found", ["a finished run", "text that is not this tokenizer's"])
def test_what_ends_all_ranks_is_said_once(whole, data_dir, tmp_path, found):
    data = data_dir
    if found == "a finished run":
        shutil.copytree(whole.folder, tmp_path / NAME)
        before = (tmp_path / NAME / "metrics.jsonl").read_bytes()
    else:  # only rank 0 looks
        data = Path(shutil.copytree(data_dir, tmp_path / "data", ignore=shutil.ignore_patterns("manifest.json")))
        shard = next(data.glob("*_val_*.bin"))
        tokens = np.frombuffer(shard.read_bytes(), dtype="<u2").copy()
        tokens[512:] = np.random.default_rng(0).permutation(tokens[512:])  # 512: the header's length
        shard.write_bytes(tokens.tobytes())
    with Torchrun(tmp_path, args_of(data, tmp_path, "--resume", "auto"), ranks=2) as running:
        done = running.ended(tmp_path / NAME)
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    if found == "a finished run":
        assert done.statuses == [0] and done.out.count("is finished and left as it is") == 1 and not errors
        assert (tmp_path / NAME / "metrics.jsonl").read_bytes() == before
    else:
        assert done.statuses == [1] and len(errors) == 1 and "not of this tokenizer" in errors[0], done.err
        assert 'train_gpt.py", line' not in done.err and not (tmp_path / NAME).exists()


# -- three ranks, step by step -----------------------------------------------------------------------------------

RULES = [TINY, replace(TINY, embed_format="ternary", quantize_start=0.5, grad_clip_norm=0.1)]
STEPS = [(0.0, 1.0), (0.5, 1.0), (1.0, 0.5)]  # how far params are quantized where that begins later; learning rate

# Three ranks and a gradient each, or one with all three; any order of summing such numbers gives the same.
THREE = """
import os, sys
import safetensors.torch, torch
import torch.distributed as dist
sys.path.insert(0, "tests")
from test_distributed import RULES, take_steps
from tern import processes
from tern.processes import Ranks

place = processes.process_place(os.environ)
processes.join_group(place, "gloo")
for i, config in enumerate(RULES):
    torch.manual_seed(0)
    found = take_steps(config, Ranks(place.rank, place.world), [place.rank])
    safetensors.torch.save_file(found, f"{sys.argv[1]}/{i}_{place.rank}.safetensors")
dist.destroy_process_group()
sys.exit(processes.end_process(0))
"""


def take_steps(config: Config, ranks, shares: list[int]) -> dict[str, torch.Tensor]:
    """Params, and on rank 0 the optimizer's state, after steps on the gradients of these shares of three."""
    model = GPT(config)
    latents = Latents(model, config, ranks)
    optimizer = Optimizer(latents, config)
    for step, (quantized, lr) in enumerate(STEPS):
        for share in shares:
            generator = torch.Generator().manual_seed(10 * step + share)
            for p in model.parameters():
                p.grad = (torch.randint(-8, 9, p.shape, generator=generator) / 16).to(p.dtype)
            latents.accumulate(torch.tensor(1.0), 1)
        assert latents.loss_word()[0] == 3.0
        optimizer.step(lr, 0.9)
        latents.refresh(quantized if config.quantize_start else 1.0)
    found, state = {f"param/{name}": p.data for name, p in model.named_parameters()}, optimizer.state()
    if latents.ranks.rank == 0:
        found |= state
    return {name: x.contiguous().clone() for name, x in found.items()}


def test_three_ranks_make_the_step_of_one(tmp_path):
    (tmp_path / "three.py").write_text(THREE)
    done = ended(started(*launcher(3), tmp_path / "three.py", tmp_path, PYTHONPATH=str(ROOT)))
    assert done.returncode == 0, done.stderr
    for i, config in enumerate(RULES):
        first, *others = (safetensors.torch.load_file(tmp_path / f"{i}_{rank}.safetensors") for rank in range(3))
        params = [name for name in first if name.startswith("param/")]
        for other in others:
            assert sorted(other) == sorted(params) and all(torch.equal(first[name], other[name]) for name in params)
        torch.manual_seed(0)
        one = take_steps(config, None, [0, 1, 2])
        assert one.keys() == first.keys()
        for name, x in one.items():
            assert (first[name].double() - x.double()).norm() <= 1e-3 * x.double().norm(), name
