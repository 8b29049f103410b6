"""Stage correct of gpu.py: is what the device computes right?

    python bench/gpu_correct.py '{"deterministic": true, "kill_at": 7}' --preset tiny ...

is the trainer under conditions, for the stage's runs: deterministic algorithms, which its scoring process then uses as
well, for they choose another kernel of attention; killed after a step; in a process group of one ("group": its back
end); all ranks on one device ("one_device": likewise).
"""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

if __package__ in (None, ""):  # run as a script, only bench/ is on the module path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import eval_bpb
import train_gpt
from bench import gpu_card, gpu_step
from bench.gpu_stage import PRESETS, Stage, flags, records
from tern import kernels, machine, processes
from tern.muon import newton_schulz

SAVED_EVERY, KILLED_AT = 4, 7  # steps, of the run that is killed
KERNEL, MODEL_LOSS, MODEL_GRADIENT = 1e-2, 2e-3, 1e-1  # relative errors that bf16, which keeps 8 bits, explains


def check_correct(stage: Stage) -> None:
    torch.manual_seed(0)
    checks = {"attention": check_attention, "RoPE": check_rope, "loss": check_loss, "fused kernels": check_fused,
              "8-bit products": check_eight_bits, "compiled": check_compiled, "sampling": check_sampling,
              "operators": check_operators}
    with ThreadPoolExecutor(max(2, machine.cores() // 2)) as pool:
        runs: dict[str, Future] = {}
        with stage.part("runs, begun"):  # as processes, while this one checks kernels
            runs = begin_runs(stage, pool)
        for name, check in checks.items():
            with stage.part(name):
                check(stage)
        with stage.part("runs"):
            check_runs(stage, runs)


# ---------------------------------------------------------------------------------------------------------------
# Kernels and the model, against float64
# ---------------------------------------------------------------------------------------------------------------


def error_of(found: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """||found - right|| / ||right|| over all of the tensors."""
    differences = [(a.double() - b.double()).norm() for a, b in zip(found, right, strict=True)]
    norms = [b.double().norm() for b in right]
    return float(torch.stack(differences).norm() / torch.stack(norms).norm())


def with_gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], gradient: Tensor) -> list[Tensor]:
    """Output and gradients of function(*inputs)."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, gradient.to(out.dtype))]


def check_attention(stage: Stage) -> None:
    for shape in stage.sizes.attention:
        *inputs, gradient = gpu_card.attention_inputs((min(shape[0], 2), *shape[1:]), stage.device)
        right = with_gradients(gpu_card.attention_in_float64, inputs, gradient)
        found = with_gradients(train_gpt.attend, inputs, gradient)
        for what, a, b in zip(("output", "gradient of q", "of k", "of v"), found, right, strict=True):
            stage.check(f"attention {shape[1:]}, {what}", error_of([a], [b]), KERNEL)
        last = (inputs[0][:, :, -16:], *inputs[1:])
        with torch.no_grad():
            stage.check(f"attention {shape[1:]}, 16 last queries", error_of(
                [train_gpt.attend(*last)], [gpu_card.attention_in_float64(*last)]), KERNEL)


def check_rope(stage: Stage) -> None:
    for preset in PRESETS:
        c = stage.config(preset)
        half, ids = c.model_dim // c.num_heads // 2, torch.zeros(1, c.train_seq_len, dtype=torch.long)
        position = torch.arange(c.train_seq_len, dtype=torch.float64)
        angle = position[:, None] * c.rope_base ** -(torch.arange(half, dtype=torch.float64) / half)
        found = kernels.rope_tables(ids.to(stage.device), half, c.rope_base)
        stage.check(f"RoPE of {preset}, tables", error_of([found.cpu()], [torch.stack((angle.cos(), angle.sin()))]),
                    1e-3)
        x = torch.randn(1, 2, c.train_seq_len, 2 * half).bfloat16()
        rotated = kernels.rotate(x.to(stage.device), *found.bfloat16()).cpu()
        pairs = torch.complex(*x.double().chunk(2, -1)) * torch.polar(torch.ones_like(angle), -angle)
        stage.check(f"RoPE of {preset}, rotated", error_of([rotated], [torch.cat((pairs.real, pairs.imag), -1)]),
                    KERNEL)


def check_loss(stage: Stage) -> None:
    """The head with its softcap, and the loss: its value and the gradient of the hidden states."""
    for preset in PRESETS:
        c = stage.config(preset, num_layers=2)
        model = train_gpt.GPT(c).to(stage.device).bfloat16()
        nn.init.normal_(model.tok_emb.weight)
        hidden = torch.randn(min(stage.sizes.rows, 4096), c.model_dim, device=stage.device).bfloat16()
        targets, weight = torch.randint(c.vocab_size, hidden.shape[:1], device=stage.device), model.tok_emb.weight

        def ours(hidden: Tensor, model=model, targets=targets, cap=c.logit_softcap) -> Tensor:
            return train_gpt.token_losses(model.logits(hidden), targets, cap).mean()

        def right(hidden: Tensor, weight=weight, targets=targets, cap=c.logit_softcap) -> Tensor:
            logits = F.linear(hidden.double(), weight.double())
            return F.cross_entropy(cap * torch.tanh(logits / cap), targets)

        one = torch.ones((), device=stage.device)
        (loss, gradient), exact = (with_gradients(f, [hidden], one) for f in (ours, right))
        stage.check(f"loss of {preset}", error_of([loss], exact[:1]), 1e-3)
        stage.check(f"loss of {preset}, gradient", error_of([gradient], exact[1:]), KERNEL)


def check_fused(stage: Stage) -> None:
    """The kernels of tern/fused.py: queries, keys and values from their joint product; what joins a block's branches,
    the MLP's products in it."""
    for preset in PRESETS:
        c, device = stage.config(preset), stage.device
        dim, heads, kv_heads, half = c.model_dim, c.num_heads, c.num_kv_heads, c.model_dim // c.num_heads // 2

        def split(qkv: Tensor, gain: Tensor, *tables: Tensor, sizes=(heads, kv_heads)) -> Tensor:
            return torch.cat(kernels.split_and_rotate(qkv, gain, *tables, *sizes), 2)

        def split_exactly(qkv: Tensor, gain: Tensor, *tables: Tensor, sizes=(heads, kv_heads)) -> Tensor:
            q, k, v = qkv.unflatten(-1, (sum(sizes) + sizes[1], -1)).transpose(1, 2).split((*sizes, sizes[1]), dim=1)
            q, k = (kernels.rotate(train_gpt.norm(x), *tables) for x in (q, k))
            return torch.cat((q * gain[:, None, None], k, v), 1).transpose(1, 2)

        tokens = torch.zeros(1, c.train_seq_len, dtype=torch.long, device=device)
        tables = [x.bfloat16() for x in kernels.rope_tables(tokens, half, c.rope_base)]
        x = (2, c.train_seq_len, dim)
        checks = {
            "heads": (split, split_exactly, tables, ((2, c.train_seq_len, dim + 4 * kv_heads * half), (heads,))),
            "mix": (mix, mix_exactly, [], (x, x, (2, dim))),
            "branches": (kernels.add_branches, branches_exactly, [],
                         (x, x, (dim,), (c.hidden_dim, dim), (dim, c.hidden_dim), (dim,))),
        }
        for what, (ours, right, more, shapes) in checks.items():
            inputs = [torch.randn(*shape, device=device).bfloat16() for shape in shapes]
            if not kernels.fuses(inputs[0], dim, c.hidden_dim):
                stage.missing(f"{what} of {preset}, fused", "Triton, and a GPU with tensor maps")
                continue
            gradient = torch.randn_like(right(*inputs, *more))
            found = with_gradients(lambda *x, f=ours, more=more: f(*x, *more), inputs, gradient)
            exact = with_gradients(lambda *x, f=right, more=more: f(*x, *(t.double() for t in more)),
                                   [x.double() for x in inputs], gradient.double())
            for i, (a, b) in enumerate(zip(found, exact, strict=True)):
                name = f"gradient of its input {i}" if i else "output"
                stage.check(f"{what} of {preset}, fused, {name}", error_of([a], [b]), KERNEL)


def mix(x: Tensor, x0: Tensor, shares: Tensor) -> Tensor:
    return torch.cat(kernels.mix_and_norm(x, x0, shares))


def mix_exactly(x: Tensor, x0: Tensor, shares: Tensor) -> Tensor:
    mixed = shares[0] * x + shares[1] * x0
    return torch.cat((mixed, train_gpt.norm(mixed)))


def branches_exactly(x: Tensor, branch: Tensor, gain: Tensor, up: Tensor, down: Tensor, mlp_gain: Tensor) -> Tensor:
    x = x + gain * branch
    return x + mlp_gain * F.linear(train_gpt.norm(F.linear(train_gpt.norm(x), up).relu().square()), down)


def check_eight_bits(stage: Stage) -> None:
    """Products of activations with ternary codes: right for what was rounded, and how far that is from the unrounded.
    """
    for precision, multiply in gpu_card.EIGHT_BITS.items():
        for preset in PRESETS:
            for name in ("up", "down"):
                inputs, outputs, _ = gpu_step.products(stage.config(preset))[name]
                x = torch.randn(min(stage.sizes.rows, 1024), inputs, device=stage.device)
                codes = torch.randint(-1, 2, (outputs, inputs), device=stage.device).float()
                product = multiply(x, codes)
                try:
                    found = product.run()
                except gpu_card.NOT_THERE as e:
                    stage.missing(f"{precision}, {preset} {name}", e)
                    continue
                a, b = product.operands()
                exact = precision == "int8"
                stage.check(f"{precision}, {preset} {name}", error_of([found], [a @ b.mT]), 0.0 if exact else KERNEL)
                if not exact:  # int8's operands are codes without their scales
                    rounding = error_of([a @ b.mT], [x.double() @ codes.double().mT])
                    stage.put(f"{precision}, {preset} {name}, rounding", rounding,
                              f"{precision}, {preset} {name}: rounding the activations changes the product by "
                              f"{rounding:.2%}")


def small_model(stage: Stage, preset: str) -> train_gpt.GPT:
    """Of a preset's shape and two blocks, in bf16."""
    c = stage.config(preset, num_layers=2)
    model = train_gpt.GPT(c).to(stage.device)
    for p in model.parameters():  # blocks that start as the identity would hide a difference in them
        if not p.any():
            nn.init.normal_(p, std=0.02)
    train_gpt.Latents(model, c)  # which makes it bf16
    return model


def check_sampling(stage: Stage) -> None:
    """Hidden states of the last of some tokens, by a model that keeps keys and values of those before, and by one that
    does not."""
    for preset in PRESETS:
        model = small_model(stage, preset)
        ids = torch.randint(model.config.vocab_size, (1, 40), device=stage.device)
        with torch.no_grad():
            cached = eval_bpb.Cached(model, 40)
            found = [cached.hidden_last(ids[:, :known], 1) for known in (30, 31, 32, 40)]
            right = model.double().hidden(ids)
        stage.check(f"sampling with {preset}, hidden states", error_of(
            found, [right[:, known - 1 : known] for known in (30, 31, 32, 40)]), 5e-2)


def check_compiled(stage: Stage) -> None:
    """A model of pr367's shape and two blocks, compiled, eager and in float64: loss and gradients of a batch."""
    model = small_model(stage, "pr367")
    c = model.config
    ids, targets = torch.randint(c.vocab_size, (2, 4, c.train_seq_len), device=stage.device)

    def results(forward, model) -> list[Tensor]:
        loss = forward(ids, targets)
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    eager, exact = results(model, model), copy.deepcopy(model).double()
    right = results(exact, exact)
    stage.check("model in bf16, loss", error_of(eager[:1], right[:1]), MODEL_LOSS)
    stage.check("model in bf16, gradients", error_of(eager[1:], right[1:]), MODEL_GRADIENT)
    backend = "inductor" if stage.cuda else "aot_eager"  # on a CPU this takes half a minute, and tests see to it
    found = results(torch.compile(model, dynamic=False, fullgraph=True, backend=backend), model)
    stage.check("compiled model, loss of the eager one", error_of(found[:1], eager[:1]), MODEL_LOSS)
    stage.check("compiled model, gradients", error_of(found[1:], right[1:]), MODEL_GRADIENT)


def check_operators(stage: Stage) -> None:
    """Which parts of a step give other bits when they run again?"""
    c, device = stage.config("pr367"), stage.device
    *qkv, gradient = gpu_card.attention_inputs(stage.sizes.attention[0], device)
    ids = torch.randint(16, (8, c.train_seq_len), device=device)  # few tokens, so that many rows meet in a sum
    table, x = (torch.randn(*shape, c.model_dim, device=device) for shape in ((c.vocab_size,), ids.shape))
    weight = torch.randn(c.hidden_dim, c.model_dim, device=device).bfloat16()
    wide = torch.randn(*ids.shape, c.hidden_dim, device=device).bfloat16()
    matrices, one = torch.randn(4, c.model_dim, c.hidden_dim, device=device), torch.ones((), device=device)

    def loss(logits: Tensor) -> Tensor:
        return train_gpt.token_losses(logits, ids, c.logit_softcap).mean()

    operators: dict[str, Callable[[], list[Tensor]]] = {
        "attention": lambda: with_gradients(train_gpt.attend, qkv, gradient),
        "embedding": lambda: with_gradients(lambda t: F.embedding(ids, t), [table], x),
        "products": lambda: with_gradients(F.linear, [x.bfloat16(), weight], wide),
        "norm": lambda: with_gradients(train_gpt.norm, [x.bfloat16()], x),
        "loss": lambda: with_gradients(loss, [x], one),
        "Newton-Schulz": lambda: [newton_schulz(matrices, 5)],
    }
    differing = []
    for name, run in operators.items():
        first = run()
        if not all(torch.equal(a, b) for _ in range(5) for a, b in zip(first, run(), strict=True)):
            differing.append(name)
    stage.put("operators that differ", differing,
              f"operators that give other bits when they run again: {', '.join(differing) or 'none'}")


# ---------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------


def begin_runs(stage: Stage, pool: ThreadPoolExecutor) -> dict[str, Future]:
    """Whole runs of the trainer as processes, side by side: the file, a seed again, a kill, groups of processes."""
    data, vocab = stage.any_data()
    backend, alone = "nccl" if stage.cuda else "gloo", {"deterministic": True}
    settings = dict(preset="tiny") | stage.sizes.checked | dict(
        vocab_size=vocab, data_path=data, out_dir=stage.work / "checked", device=stage.device.type, threads=1,
        checkpoint_every=SAVED_EVERY)

    def train(name: str, how: dict | None = None, ranks: int = 1, status: int = 0, seconds: float = 1e6,
              **more) -> None:
        program = ["train_gpt.py"] if how is None else ["bench/gpu_correct.py", json.dumps(how)]
        stage.run(*processes.launcher(ranks)[1:], *program, *flags(settings | dict(run_id=name) | more), status=status,
                  seconds=seconds, CUBLAS_WORKSPACE_CONFIG=":4096:8")  # which deterministic products ask for

    def killed() -> None:
        train("killed", alone | {"kill_at": KILLED_AT}, status=-signal.SIGKILL)
        train("killed", alone, resume="auto")

    tasks: dict[str, Callable[[], None]] = {
        "killed": killed,
        "whole": lambda: train("whole"),
        "group_of_one": lambda: train("group_of_one", alone | {"group": backend}),
        "again": lambda: train("again"),
        "two_ranks": lambda: train("two_ranks", {"one_device": "gloo"}, ranks=2, compile=False),
    }
    if stage.cuda:  # which may hang or refuse
        tasks["two_ranks_nccl"] = lambda: train("two_ranks_nccl", {"one_device": "nccl"}, 2, seconds=60, compile=False)
    return {name: pool.submit(task) for name, task in tasks.items()}


def check_runs(stage: Stage, runs: dict[str, Future]) -> None:
    out, finals = stage.work / "checked", {}
    for name, future in runs.items():
        error = future.exception()
        if name == "two_ranks_nccl" and error is not None:
            stage.missing("two ranks of NCCL on one card", error)
        elif error is not None:
            stage.fail(f"run {name}", error)
        else:
            final = finals[name] = records(out / name)[-1]
            stage.check(f"run {name}: gap between memory and file, bpb", abs(final["roundtrip_gap"]), 0.0)
            stage.check(f"run {name}: logits not equal bit for bit", float(not final["logits_identical"]), 0.0)
    compare_runs(stage, finals, out, "nccl" if stage.cuda else "gloo")
    if "whole" in finals:
        path = stage.work / "score_by_the_cpu.json"
        stage.run("eval_bpb.py", out / "whole" / "model.tern", "--data", stage.any_data()[0], "--stride", 0, "--json",
                  path, CUDA_VISIBLE_DEVICES="")
        on_cpu, here = (s["chunked"]["val_bpb"] for s in (json.loads(path.read_text()), finals["whole"]["score"]))
        stage.check("score, bpb by the CPU", abs(on_cpu / here - 1), 1e-3)


def compare_runs(stage: Stage, finals: dict[str, dict], out: Path, backend: str) -> None:
    def files_differ(a: str, b: str) -> bool:
        return finals[a]["artifact_sha256"] != finals[b]["artifact_sha256"]

    if finals.keys() >= {"killed", "group_of_one"}:
        stage.check(f"killed and resumed, or {backend} group of one: another file",
                    float(files_differ("killed", "group_of_one")), 0.0)
    if finals.keys() >= {"whole", "again"}:
        losses = [{r["step"]: r["loss"] for r in records(out / name) if r["type"] == "train"}
                  for name in ("whole", "again")]
        first = next((step for step, loss in losses[0].items() if losses[1].get(step) != loss), None)
        said = "the same file"
        if files_differ("whole", "again"):
            said = f"another file; the first logged loss that differs is that of step {first}"
        stage.put("same seed twice", said, f"same seed twice: {said}")
    if finals.keys() >= {"whole", "two_ranks"}:
        one, two = (finals[name]["memory"]["val_bpb"] for name in ("whole", "two_ranks"))
        stage.check("two ranks on one device, bpb of one rank", abs(two / one - 1), 2e-2)


class AlwaysAsking(processes.Ranks):
    """Ranks that talk over their group even where there is only one."""

    def call(self, function: Callable, *args, **kwargs):
        return function(*args, **kwargs)


class ThroughMemory(processes.Ranks):
    """Ranks whose back end sends and receives in the host's memory only, as gloo does."""

    def gather(self, x: Tensor, owner: int) -> Tensor:
        return super().gather(x.cpu(), owner).to(x.device)


def ask_everything(device: torch.device) -> None:
    """The collectives that a run of one process has no use for, with the types that they send."""
    for dtype in (torch.uint8, torch.int64, torch.float32, torch.float64):
        x = torch.arange(8, device=device).to(dtype)
        dist.broadcast(x, src=0, async_op=True).wait()
        every = [torch.zeros_like(x)]
        dist.all_gather(every, x)
        if not torch.equal(every[0].cpu(), torch.arange(8).to(dtype)):
            raise RuntimeError(f"collectives of {dtype} do not give what was sent")
    dist.all_reduce(x, op=dist.ReduceOp.MAX, group=dist.new_group(timeout=train_gpt.SILENCE))


def train_under(how: dict, argv: list[str]) -> int:
    """The trainer under the conditions of this module's docstring; the exit status."""
    usual, pick, join = machine.compute_deterministically, machine.pick_device, processes.join_group

    def deterministically(device: torch.device) -> None:
        usual(device)
        torch.use_deterministic_algorithms(True)

    class Watched(train_gpt.Trainer):
        def after_step(self, plan) -> None:
            super().after_step(plan)
            if self.step == how.get("kill_at"):
                os.kill(os.getpid(), signal.SIGKILL)

        def score_file(self, artifact: Path) -> dict:
            self.place = replace(self.place, local_world=1)  # the scorer knows nothing of two ranks on a device
            return super().score_file(artifact)

    train_gpt.Trainer = Watched
    if how.get("deterministic"):
        machine.compute_deterministically = deterministically
        if how.get("score"):
            torch.use_deterministic_algorithms(True)
            return eval_bpb.main(argv)
        train_gpt.scoring_command = lambda: [__file__, json.dumps({"deterministic": True, "score": True})]
    if "one_device" in how:
        train_gpt.Ranks = ThroughMemory if how["one_device"] == "gloo" else processes.Ranks
        machine.pick_device = lambda wanted, local_rank: pick(wanted, 0)
        processes.join_group = lambda place, backend: join(place, how["one_device"])
    if "group" in how:
        train_gpt.Ranks = AlwaysAsking
        dist.init_process_group(how["group"], store=dist.HashStore(), rank=0, world_size=1)
        ask_everything(torch.device("cuda" if how["group"] == "nccl" else "cpu"))
    return train_gpt.main(argv)


if __name__ == "__main__":
    exit_status = train_under(json.loads(sys.argv[1]), sys.argv[2:])
    sys.stdout.flush()
    os._exit(exit_status)  # a process group may abort a process that ends as usual (tern/processes.py, end_process)
