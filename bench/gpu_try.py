"""Changes to the training step, each tried alone on one GPU before the trainer has it.

    python bench/gpu_try.py --out RESULTS --seconds 150
    python bench/gpu_try.py --out RESULTS --device cpu --tokens 256     # toy shapes: does every change run?

Of forward and backward: pr367's model with four blocks, compiled, on 65,536 tokens. Every change is a process of its
own; they compile side by side, several at a time, and are then timed one after the other. Of optimizer and refresh: the
whole of pr367's weights. RESULTS/try.json has all figures, with kernels by kind; RESULTS/try.txt what was printed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

if __package__ in (None, ""):  # run as a script, only bench/ is on the module path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_gpt
from bench import gpu_stage, gpu_step
from bench.gpu_card import Clock, alone
from tern import command, fused, kernels, machine
from tern.muon import newton_schulz

TILES = [(128, 256, 64, 8, 3, False, False), (128, 256, 64, 8, 4, False, True), (128, 256, 64, 8, 3, True, True),
         (128, 256, 64, 8, 3, True, False), (256, 128, 64, 8, 4, False, True)]
HEADS = (8, 16, 32)
ROWS = [(2, 6), (2, 16), (4, 5), (4, 8), (4, 10), (8, 5), (8, 8)]
TRITON = ("kernels", "plain joins")  # what runs nowhere without it
AT_A_TIME, REPEATS, PROFILED, E4M3 = 5, 12, 2, torch.float8_e4m3fn
COMPILED: dict[str, dict] = {}  # what a change asks torch.compile for

# ---------------------------------------------------------------------------------------------------------------
# Changes of forward and backward
# ---------------------------------------------------------------------------------------------------------------


def base(stack: ExitStack) -> None:
    """The trainer as it is."""


def by(backend: SDPBackend):
    def change(stack: ExitStack) -> None:
        stack.enter_context(sdpa_kernel(backend))

    return change


def plain_blocks(stack: ExitStack) -> None:
    """The MLP and what joins a block's branches as products and Inductor's kernels."""
    train_gpt.fuses = lambda x, *widths: not widths and kernels.fuses(x)


class Products(torch.autograd.Function):
    """kernels.relu_squared_products with a backward of its own."""

    @staticmethod
    def forward(ctx, x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        z, scale, a = kernels.relu_squared_products(x, up, down)
        ctx.save_for_backward(x, up, down, scale, a)
        return z, scale

    @staticmethod
    def backward(ctx, dz: Tensor, dscale: Tensor):
        return products_backward(dz, dscale, *ctx.saved_tensors)


@torch.library.custom_op("tern_bench::products_backward", mutates_args=())
def products_backward(dz: Tensor, dscale: Tensor, x: Tensor, up: Tensor, down: Tensor, scale: Tensor, a: Tensor
                      ) -> tuple[Tensor, Tensor, Tensor]:
    dz = dz.contiguous()
    du = fused.down_backward(dz, down, a, (dscale * scale.pow(3) / -a.shape[1]).contiguous())
    return du @ up, du.mT @ x, dz.mT @ a


@products_backward.register_fake
def _(dz, dscale, x, up, down, scale, a):
    return torch.empty_like(x), torch.empty_like(up), torch.empty_like(down)


def plain_joins(stack: ExitStack) -> None:
    """What joins a block's branches as Inductor's kernels; products and heads fused."""
    def forward(self, x: Tensor, x0: Tensor, cos: Tensor, sin: Tensor, last: int) -> Tensor:
        x = self.resid_mix[0] * x + self.resid_mix[1] * x0
        x = x + self.attn_scale * self.attn(x, cos, sin, last)
        z, scale = Products.apply(x.flatten(0, -2), self.mlp.fc.weight, self.mlp.proj.weight)
        return x + self.mlp_scale * (z * scale[:, None]).to(x.dtype).view(x.shape)

    train_gpt.Block.forward = forward


def plain_heads(stack: ExitStack) -> None:
    """Norm, RoPE and gain of the heads as Inductor's kernels."""
    train_gpt.fuses = lambda x, *widths: bool(widths) and kernels.fuses(x, *widths)


def plain(stack: ExitStack) -> None:
    """Without the kernels of tern/fused.py."""
    train_gpt.fuses = lambda *_: False


def no_norm(stack: ExitStack) -> None:
    """No norm before the MLP: relu squared and a norm after it leave nothing of a row's scale."""
    train_gpt.MLP.forward = lambda self, x: self.proj(train_gpt.norm(self.fc(x).relu().square()))


def late_norm(stack: ExitStack) -> None:
    """The norm of attention's output after the product."""
    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, last: int) -> Tensor:
        batch, _ = x.shape[:2]
        x = train_gpt.norm(x)
        heads = self.split_heads(F.linear(x, torch.cat((self.c_q.weight, self.c_k.weight, self.c_v.weight))))
        q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        q = train_gpt.rotate(train_gpt.norm(q), cos, sin) * self.q_gain[:, None, None]
        y = self.attend(q, train_gpt.rotate(train_gpt.norm(k), cos, sin), v).transpose(1, 2).reshape(batch, last, -1)
        scale = torch.rsqrt(y.float().square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps)
        return (self.proj(y) * scale).to(y.dtype)

    train_gpt.Attention.forward = forward


def tuned(stack: ExitStack) -> None:
    """Inductor searches tile sizes of its kernels by measuring them."""
    torch._inductor.config.coordinate_descent_tuning = True


def graphs(stack: ExitStack) -> None:
    """Forward and backward as CUDA graphs: some 900 launches of a step that need no host, with less between them."""
    COMPILED["options"] = {"triton.cudagraphs": True}


def other_reductions(stack: ExitStack) -> None:
    """Sums over rows and over columns of one tensor in one kernel, or apart, whichever is not torch's default."""
    torch._inductor.config.triton.mix_order_reduction = not torch._inductor.config.triton.mix_order_reduction


def by_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [rows, k] in e4m3 and a scale for each row."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / 448
    return (x.float() / scale).to(E4M3), scale


def product8(a: Tensor, b: Tensor) -> Tensor:
    """a b^T of a [m, k], b [n, k], each rounded by rows."""
    (a8, sa), (b8, sb) = by_rows(a), by_rows(b)
    return torch._scaled_mm(a8, b8.t(), sa, sb.t(), out_dtype=torch.bfloat16, use_fast_accum=True)


class Forward8(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return product8(x, w)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, w = ctx.saved_tensors
        return dy @ w, dy.t() @ x


class Both8(Forward8):
    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return product8(x, w)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, w = ctx.saved_tensors
        return product8(dy, w.t().contiguous()), dy.t() @ x


def in_eight_bits(function: type[torch.autograd.Function]):
    """Products of the blocks in e4m3, a scale per row: what a format with one scale per row would allow."""
    def change(stack: ExitStack) -> None:
        usual = F.linear

        def linear(x: Tensor, w: Tensor, bias=None) -> Tensor:
            if w.shape[0] == 1024 or x.dtype != torch.bfloat16:  # the head
                return usual(x, w)
            return function.apply(x.flatten(0, -2), w).view(*x.shape[:-1], -1)

        train_gpt.F.linear = linear
        train_gpt.Linear.forward = lambda self, x: linear(x, self.weight)

    return change


FLASH = by(SDPBackend.FLASH_ATTENTION)
CHANGES = {
    "base": (base,), "copies": (base,), "plain": (plain,), "plain blocks": (plain_blocks,),
    "plain joins": (plain_joins,), "plain heads": (plain_heads,),
    "plain, flash": (plain, FLASH), "plain, no norm": (plain, no_norm), "plain, late norm": (plain, late_norm),
    "plain, other reductions": (plain, other_reductions), "tuned": (tuned,), "graphs": (graphs,),
    "plain, fp8 forward": (plain, in_eight_bits(Forward8)), "plain, fp8 both": (plain, in_eight_bits(Both8)),
}


def config(args: argparse.Namespace, layers: int) -> train_gpt.Config:
    toy = {} if args.device == "cuda" else dict(
        model_dim=64, num_heads=2, num_kv_heads=1, mlp_hidden=160, train_seq_len=64, compile=False)
    return train_gpt.Config(**train_gpt.PRESETS["pr367"] | dict(num_layers=layers) | toy
                            | dict(train_batch_tokens=args.tokens, copy_dim=64 if args.change == "copies" else 0))


def time_change(args: argparse.Namespace) -> dict:
    """Forward and backward under one change: said when compiled, timed when told to."""
    c, device = config(args, 4), torch.device(args.device)
    with ExitStack() as stack:
        for change in CHANGES[args.change]:
            change(stack)
        torch.manual_seed(0)
        model = train_gpt.GPT(c).to(device)
        for p in model.parameters():
            if not p.any():
                torch.nn.init.normal_(p, std=0.02)
        latents = train_gpt.Latents(model, c)
        machine.prepare_compiler(1)
        loss_of = torch.compile(model, dynamic=False, fullgraph=True, **COMPILED) if args.device == "cuda" else model
        ids, targets = torch.randint(c.vocab_size, (2, args.tokens // c.train_seq_len, c.train_seq_len), device=device)

        def step() -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            loss = loss_of(ids, targets)
            loss.backward()
            for p in model.parameters():
                p.grad = None
            return loss

        with alone(args.lock, shared=True):
            began = time.perf_counter()
            loss = float(step().detach())
            model_loss = float(model(ids[:1], targets[:1]).detach())
            compiled = time.perf_counter() - began
            for _ in range(3):
                step()
            machine.synchronize(device)
        print("ready", flush=True)
        sys.stdin.readline()
        clock = Clock(device)
        with alone(args.lock):
            seconds = clock.median(step, REPEATS)
        found = {"ms": 1000 * seconds, "compile_seconds": compiled, "loss": loss, "loss_eager_one_row": model_loss,
                 "latents": sum(b.grad.numel() for b in latents.banks)}
        if args.device == "cuda":
            found["peak_GiB"] = torch.cuda.max_memory_allocated() / 2**30
            found["mix_order_reduction"] = torch._inductor.config.triton.mix_order_reduction
            found["profile"] = asdict(profiled(step, Path(args.out) / "trace.json"))
        return found


def profiled(step, trace: Path) -> gpu_step.Profile:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED):
            step()
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(trace))
    found = gpu_step.read_profile(json.loads(trace.read_text(encoding="utf-8")), PROFILED)
    trace.unlink()
    return found


# ---------------------------------------------------------------------------------------------------------------
# Optimizer and refresh; the MLP's kernels alone
# ---------------------------------------------------------------------------------------------------------------


def time_update(args: argparse.Namespace) -> dict:
    """Milliseconds of the parts of an update of all of pr367's weights, as they are and compiled."""
    device = torch.device(args.device)
    c, clock = config(args, 12 if args.device == "cuda" else 2), Clock(device)
    model = train_gpt.GPT(c).to(device)
    latents = train_gpt.Latents(model, c)
    optimizer = train_gpt.Optimizer(latents, c)
    latents.flat_grad.normal_()
    found: dict[str, object] = {}

    def put(name: str, function) -> None:
        with alone(args.lock):
            found[name] = 1000 * clock.median(function, 8)
        print(json.dumps({name: found[name]}), flush=True)

    def update() -> None:
        optimizer.step(1e-3, 0.95)

    def accumulate() -> None:
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        latents.accumulate(torch.zeros((), device=device), 1, first=True)

    put("accumulate, with zeros", accumulate)
    put("optimizer", update)
    put("refresh", latents.refresh)
    put("loss", latents.loss_word)
    for bank in latents.banks:
        if bank.latent.numel() > 2**20 or args.device == "cpu":
            shape = tuple(bank.latent.shape)
            put(f"quantize {shape}", lambda bank=bank: bank.format.quantize(bank.latent))
            put(f"dequantize {shape}", lambda bank=bank: bank.format.dequantize(bank.stored))
            if bank.optimizer == "muon":
                put(f"Newton-Schulz {shape}", lambda bank=bank: newton_schulz(bank.grad, 5))
    if args.device == "cuda":
        put("Muon", lambda: all_of_muon(optimizer))
        put("AdamW", lambda: optimizer.update_others(1.0))
        optimizer.compile()
        put("Muon, compiled", lambda: all_of_muon(optimizer))
        put("optimizer, compiled", update)
        quantize = latents.quantize = torch.compile(train_gpt.quantize, dynamic=False)
        put("refresh, quantize compiled", latents.refresh)
        for bank in optimizer.muon:
            bank.latent.normal_()
            a, b = bank.format.quantize(bank.latent), quantize(bank.format, bank.latent)
            found[f"compiled differs {tuple(bank.latent.shape)}"] = [int((a.codes != b.codes).sum()),
                                                                     int((a.scales != b.scales).sum())]
    return found


def all_of_muon(optimizer: train_gpt.Optimizer) -> None:
    with torch.no_grad():
        for bank, buffer in zip(optimizer.muon, optimizer.momentum, strict=True):
            optimizer.update_bank(bank.latent, buffer, bank.grad, 1e-3, 0.95)


def time_kernels(args: argparse.Namespace) -> dict:
    """The kernels of tern/fused.py for several sizes of tiles, with their errors, the products beside torch's alone."""
    c, device = config(args, 2), torch.device(args.device)
    clock, found = Clock(device), {}
    x, dz = (torch.randn(args.tokens, c.model_dim, device=device).bfloat16() for _ in range(2))
    up, down = (0.03 * torch.randn(*shape, device=device).bfloat16()
                for shape in ((c.hidden_dim, c.model_dim), (c.model_dim, c.hidden_dim)))
    scale, pull = torch.rand(args.tokens, device=device) + 0.5, torch.randn(args.tokens, device=device)
    gain, mix = (torch.randn(*shape, c.model_dim, device=device).bfloat16() for shape in ((), (2,)))
    a = (x @ up.mT).relu().square()
    width = c.model_dim + 2 * c.num_kv_heads * (c.model_dim // c.num_heads)
    qkv = torch.randn(args.tokens // c.train_seq_len, c.train_seq_len, width, device=device).bfloat16()
    head_gain, half = torch.ones(c.num_heads, device=device).bfloat16(), c.model_dim // c.num_heads // 2
    tables = kernels.rope_tables(qkv[:, :, 0], half, c.rope_base).bfloat16()

    def heads() -> tuple[Tensor, ...]:
        return fused.split_and_rotate(qkv, head_gain, *tables, c.num_heads, c.num_kv_heads)

    def put(name: str, value: object) -> None:
        found[name] = value
        print(json.dumps({name: value}), flush=True)

    head_grads = heads()  # of their shapes
    # Name -> (constant of fused.py, its values, the kernel, what is right in float64 or nothing)
    trials = {
        "up": ("UP", TILES, lambda: fused.up_squared(x, up), right_up(x, up)),
        "down backward": ("DOWN", TILES, lambda: (fused.down_backward(dz, down, a, pull),),
                          right_down(dz, down, a, pull)),
        "mix backward": ("MIX", ROWS, lambda: fused.mix_backward(x, dz, dz, x, mix), right_mix(x, dz, dz, x, mix)),
        "scaled branch backward": ("BRANCH", ROWS,
                                   lambda: fused.scaled_branch_backward(x, gain, dz, scale, c.hidden_dim),
                                   right_scaled(x, gain, dz, scale, c.hidden_dim)),
        "branch backward": ("BRANCH", ROWS, lambda: fused.branch_backward(x, dz, gain, x),
                            right_branch(x, dz, gain, x)),
        "heads": ("HEAD_ROWS", HEADS, heads, ()),
        "heads backward": ("HEAD_ROWS", HEADS, lambda: fused.split_and_rotate_backward(
            qkv, head_gain, *tables, *head_grads), ()),
    }
    works = []
    with alone(args.lock, shared=True):
        for name, (constant, sizes, run, right) in trials.items():
            for size in sizes:
                setattr(fused, constant, size)
                try:
                    errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(run(), right, strict=False)]
                except Exception as e:  # too much shared memory, say
                    put(f"{name} {size}", repr(e)[:200])
                    continue
                works.append((name, constant, size, run))
                if errors:
                    put(f"{name} {size}, error", max(errors))
    with alone(args.lock):
        put("product up alone", 1000 * clock.median(lambda: x @ up.mT, 10))
        put("product down backward alone", 1000 * clock.median(lambda: dz @ down, 10))
        for name, constant, size, run in works:
            setattr(fused, constant, size)
            put(f"{name} {size}", 1000 * clock.median(run, 10))
    return found


def right_up(x: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    a = (x.double() @ up.double().mT).relu().square()
    return a, a.square().sum(1)


def right_down(dz: Tensor, down: Tensor, a: Tensor, pull: Tensor) -> tuple[Tensor, ...]:
    return (2 * a.double().sqrt() * (dz.double() @ down.double() + pull.double()[:, None] * a.double()),)


def right_mix(dmixed: Tensor, dnormed: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    x, x0, mix = (t.double().requires_grad_() for t in inputs)
    mixed = mix[0] * x + mix[1] * x0
    return torch.autograd.grad((mixed, train_gpt.norm(mixed)), (x, x0, mix), (dmixed.double(), dnormed.double()))


def right_scaled(dy: Tensor, gain: Tensor, z: Tensor, scale: Tensor, hidden: int) -> tuple[Tensor, ...]:
    d, scale = dy.double() * gain.double(), scale.double()[:, None]
    return d * scale, (d * z.double()).sum(1) * scale[:, 0] ** 3 / -hidden, (dy.double() * z.double() * scale).sum(0)


def right_branch(dy: Tensor, more: Tensor, gain: Tensor, branch: Tensor) -> tuple[Tensor, ...]:
    d = dy.double() + more.double()
    return d, d * gain.double(), (d * branch.double()).sum(0)


# ---------------------------------------------------------------------------------------------------------------
# All of them
# ---------------------------------------------------------------------------------------------------------------


def start(args: argparse.Namespace, change: str) -> subprocess.Popen:
    words = [sys.executable, __file__, "--out", args.out, "--device", args.device, "--tokens", args.tokens,
             "--change", change, "--lock", args.lock]
    log = open(Path(args.out) / "try_log.txt", "ab")
    return subprocess.Popen(list(map(str, words)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                            env=os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "4"})


def run_all(args: argparse.Namespace) -> int:
    out, began, results, failed = Path(args.out), time.monotonic(), {}, 0
    program = {"commit": gpu_stage.commit(), "source": gpu_stage.source_identity(), "machine": machine.describe()}

    def say(line: str) -> None:
        print(line, flush=True)
        with open(out / "try.txt", "a", encoding="utf-8") as f:
            f.write(line + "\n")

    names = args.only or [*CHANGES, "kernels", "update"]
    if not fused.AVAILABLE:
        say(f"not there without Triton: {', '.join(name for name in names if name in TRITON) or 'nothing'}")
        names = [name for name in names if name not in TRITON]
    batches = [[name] for name in names if name in ("kernels", "update")]  # they need no compiler's minute
    changes = [name for name in names if [name] not in batches]
    batches += [changes[first : first + AT_A_TIME] for first in range(0, len(changes), AT_A_TIME)]
    for several in batches:
        batch = {name: start(args, name) for name in several}
        ends = [threading.Timer(max(args.seconds - (time.monotonic() - began), 1.0), p.kill) for p in batch.values()]
        for end in ends:
            end.start()
        for process in batch.values():  # until each is compiled, or dead
            for line in process.stdout:
                if line.startswith("ready"):
                    break
        for name, process in batch.items():
            try:
                said, _ = process.communicate("go\n")
                figures = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
                results[name] = {name: value for found in figures for name, value in found.items()}
                if process.returncode:
                    raise RuntimeError(f"status {process.returncode}, {len(figures)} lines of figures")
                kinds = {k: round(v, 2) for k, v in results[name].get("profile", {}).get("kinds", {}).items() if v}
                figures = {k: v for k, v in results[name].items() if k != "profile"}
                say(f"{name:<28}{json.dumps(figures)} {json.dumps(kinds)}")
            except Exception as e:
                process.kill()
                failed += 1
                say(f"{name:<28}FAILED {e!r}")
            (out / "try.json").write_text(json.dumps(program | results, indent=1), encoding="utf-8")
        for end in ends:
            end.cancel()
        if time.monotonic() - began > args.seconds:
            break
    return int(failed > 0 or len(results) < len(names))


def main(argv: list[str]) -> int:
    p = command.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("--out", required=True)
    p.add_argument("--seconds", type=float, default=150.0)
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    p.add_argument("--tokens", type=int, default=65_536)
    p.add_argument("--only", nargs="+", choices=[*CHANGES, "kernels", "update"], default=[])
    p.add_argument("--lock", default="", metavar="FILE", help="as of gpu.py")
    p.add_argument("--change", default="", choices=["", *CHANGES, "kernels", "update"])
    args = p.parse_args(argv)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    if not args.change:
        return run_all(args)
    command.follow(os.getppid())
    if args.change in ("kernels", "update"):
        print("ready", flush=True)
        sys.stdin.readline()
        found = time_kernels(args) if args.change == "kernels" else time_update(args)
    else:
        found = time_change(args)
    print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
