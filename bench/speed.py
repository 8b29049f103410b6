"""How fast this trainer and its scorer are, against the textbook of the same model on the same machine.

    python bench/speed.py                                        # all of it
    python bench/speed.py --shapes S --seq 512 --only train      # training rate of one shape
    python bench/speed.py --json speed.json --threads 1

Both sides (ours, and bench/textbook.py compiled by torch.compile) live in one process and take turns, so that a slow
minute of the machine hits both; what counts is the ratio within a pair of turns. Both start from the same latents, read
the same shard of random tokens and use machine.keep_freed_memory. Formats are bf16 where the textbook has no other.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

if __package__ in (None, ""):  # run as a script, only bench/ is on the module path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_gpt
from bench import textbook
from tern import machine
from tern.metric import Score, evaluate
from tern.shards import SHARD_HEADER_INTS, SHARD_MAGIC, SHARD_VERSION

# Ternary weights of the three: 0.5, 2.3 and 8.0 million.
SHAPES = {
    "S": "--num-layers 4 --model-dim 128 --num-heads 2 --num-kv-heads 1 --mlp-hidden 304",
    "M": "--num-layers 6 --model-dim 192 --num-heads 3 --num-kv-heads 1 --mlp-hidden 744",
    "L": "--num-layers 8 --model-dim 320 --num-heads 5 --num-kv-heads 1 --mlp-hidden 1176",
}
# A large embedding, so that the score depends on the blocks and a difference between the sides would show.
COMMON = ("--preset cpu --embed-format bf16 --vector-format bf16 --scale-dtype bf16 --train-batch-tokens 8192 "
          "--tied-embed-init-std 0.1 --smear 0 --key-offset 0 --copy-dim 0 --attn-window 0 --eval-seq-len 0 "
          "--eval-stride 64")  # the textbook has none of these
TURN_SECONDS, TURN_STEPS = 2.0, 2  # a turn of training lasts at least this long and this many steps
STRIDE, BATCH_SEQS, SCORE_BATCHES = 64, 32, 2
SECTIONS = ("machine", "train", "split", "score")


class OneByteEach:
    """A byte counter for random tokens."""

    def count(self, prev_ids, ids) -> np.ndarray:
        return np.ones(len(ids), dtype=np.int64)


def settings(argv: list[str]) -> train_gpt.Config:
    return train_gpt.resolve_settings([*COMMON.split(), *argv], {})[1]


# ---------------------------------------------------------------------------------------------------------------
# The two sides
# ---------------------------------------------------------------------------------------------------------------


class Ours:
    """The trainer's own step, as Trainer runs it, and the scorer's evaluate."""

    name = "ours"

    def __init__(self, config: train_gpt.Config, compiled: bool = True):
        self.config, self.model, self.compiled = config, train_gpt.GPT(config), compiled
        for p in self.model.parameters():  # blocks that start as the identity would hide a difference in them
            if not p.any():
                nn.init.normal_(p, std=0.02)
        self.latents = train_gpt.Latents(self.model, config)
        self.optimizer = train_gpt.Optimizer(self.latents, config)
        self.loss = torch.compile(self.model, dynamic=False, fullgraph=True) if compiled else self.model

    def state(self) -> dict[str, Tensor]:
        """A copy of the latents by name."""
        return {name: latent.clone() for name, _, latent, _ in self.latents.named()}

    def forward_backward(self, ids: Tensor, targets: Tensor) -> float:
        torch.use_deterministic_algorithms(True)  # as train_gpt.main does on a CPU; the textbook does without
        loss = self.loss(ids, targets)
        loss.backward()
        self.latents.accumulate(loss, 1)
        torch.use_deterministic_algorithms(False)
        return float(loss.detach())

    def optimize(self) -> None:
        self.optimizer.step(1.0, 0.95)

    def refresh(self) -> None:
        self.latents.refresh()

    def score(self, tokens: np.ndarray, seq_len: int, stride: int, batch_seqs: int) -> Score:
        return evaluate(self.model, tokens, OneByteEach(), seq_len, stride, batch_seqs, self.compiled)


class Textbook:
    """bench/textbook.py with the same latents; the same methods as Ours."""

    name = "textbook"

    def __init__(self, config: train_gpt.Config, state: dict[str, Tensor], compiled: bool = True):
        self.model = textbook.TextbookGPT(config)
        self.load(state)
        self.optimizer = textbook.TextbookOptimizer(self.model, config)
        self.loss, self.logits = self.model, self.model.logits
        if compiled:
            self.loss = torch.compile(self.model, dynamic=False, fullgraph=True)
            self.logits = torch.compile(self.model.logits, dynamic=False, fullgraph=True)

    def load(self, state: dict[str, Tensor]) -> None:
        self.model.load_state_dict(state)

    def forward_backward(self, ids: Tensor, targets: Tensor) -> float:
        loss = self.loss(ids, targets)
        loss.backward()
        return float(loss.detach())

    def optimize(self) -> None:
        self.optimizer.step(1.0, 0.95)

    def refresh(self) -> None:
        """Nothing: every forward quantizes."""

    def score(self, tokens: np.ndarray, seq_len: int, stride: int, batch_seqs: int) -> Score:
        return textbook.evaluate_textbook(self.logits, tokens, OneByteEach(), seq_len, stride, batch_seqs)


Side = Ours | Textbook


def random_loader(folder: Path, vocab_size: int) -> train_gpt.TokenLoader:
    """The trainer's loader over a shard of random tokens."""
    tokens = np.random.default_rng(0).integers(0, vocab_size, 2**20).astype("<u2")
    header = np.zeros(SHARD_HEADER_INTS, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, len(tokens)
    path = folder / f"random_train_{vocab_size}.bin"
    path.write_bytes(header.tobytes() + tokens.tobytes())
    return train_gpt.TokenLoader((path,), vocab_size)


# ---------------------------------------------------------------------------------------------------------------
# Measurements
# ---------------------------------------------------------------------------------------------------------------


def product_rate(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> float:
    """GFLOP/s of [rows, inputs] x [inputs, outputs]."""
    x, w = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    times = []
    with torch.inference_mode():
        while sum(times) < 0.15 or len(times) < 5:
            began = time.perf_counter()
            F.linear(x, w)
            times.append(time.perf_counter() - began)
    return 2e-9 * rows * inputs * outputs / statistics.median(times)


def measure_machine(shapes: list[str]) -> dict:
    rates = {}
    for shape in shapes:
        c = settings(SHAPES[shape].split())
        head_dim = c.model_dim // c.num_heads
        for name, (inputs, outputs) in {
            "qkv": (c.model_dim, c.model_dim + 2 * c.num_kv_heads * head_dim), "up": (c.model_dim, c.hidden_dim),
            "down": (c.hidden_dim, c.model_dim), "head": (c.model_dim, c.vocab_size),
        }.items():
            rates[f"{shape} {name}"] = {"inputs": inputs, "outputs": outputs} | {
                n: product_rate(c.train_batch_tokens, inputs, outputs, dtype)
                for n, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))}
    return machine.describe() | {"threads": torch.get_num_threads(), "gflops": rates}


def run_steps(side: Side, loader: train_gpt.TokenLoader) -> dict[str, list[float]]:
    """One turn of training: seconds of each step's parts."""
    seq_len, tokens = side.model.config.train_seq_len, side.model.config.train_batch_tokens
    parts: dict[str, list[float]] = {"loader": [], "forward_backward": [], "optimizer": [], "refresh": []}
    began = time.perf_counter()
    while len(parts["loader"]) < TURN_STEPS or time.perf_counter() - began < TURN_SECONDS:
        marks = [time.perf_counter()]
        ids, targets = loader.batch(tokens // seq_len, seq_len, 0, 0, 1)
        loader.position += tokens
        marks.append(time.perf_counter())
        side.forward_backward(ids, targets)
        marks.append(time.perf_counter())
        side.optimize()
        marks.append(time.perf_counter())
        side.refresh()
        marks.append(time.perf_counter())
        for seconds, start, end in zip(parts.values(), marks, marks[1:], strict=False):
            seconds.append(end - start)
    return parts


def take_turns(sides: tuple[Side, Side], rate: Callable[[Side], float], pairs: int) -> dict:
    """Rates of both sides, turn about, and the ratio ours / textbook of each pair."""
    rates: dict[str, list[float]] = {side.name: [] for side in sides}
    for pair in range(pairs):
        for side in sides if pair % 2 == 0 else sides[::-1]:
            rates[side.name].append(rate(side))
    ratios = [a / b for a, b in zip(rates["ours"], rates["textbook"], strict=True)]
    return rates | {"ratios": ratios}


# What forward and backward run, by the names that torch.profiler shows; the first pattern that matches decides. Kernels
# that Inductor fused carry the operators that they came from: tanh and nll occur in the loss only, and one named after
# attention only prepares its inputs. Quantizing in the forward has no class of its own: Inductor fuses it with norms.
CLASSES = (
    ("attention", r"^(?!.*cpp_fused).*(attention|attn)"),
    ("products", r"^aten::(mm|bmm|addmm|baddbmm|linear|matmul|_int_mm)(_out)?$|mkldnn|onednn"),
    ("loss", r"cpp_fused\w*?_(nll_loss|tanh|logsumexp|log_softmax)|^(?!.*cpp_fused).*cross_entropy"),
    ("elementwise", r"cpp_fused|^aten::(?!empty)"),
)
PARTS = (*(label for label, _ in CLASSES), "other", "optimizer", "refresh", "loader")


def kernel_class(name: str) -> str | None:
    """The class of a profiler event; None for what only calls others (a graph's wrapper, the autograd engine)."""
    return next((label for label, pattern in CLASSES if re.search(pattern, name)), None)


def measure_split(side: Side, loader: train_gpt.TokenLoader) -> dict[str, float]:
    """Seconds of a median step, by part. The parts of forward and backward are the profiler's shares of their time.

    An event belongs to the class of the outermost one around it: a product inside attention is attention.
    """
    parts = {name: statistics.median(seconds) for name, seconds in run_steps(side, loader).items()}
    forward_backward = parts.pop("forward_backward")
    split = dict.fromkeys(PARTS, 0.0) | parts
    seq_len, tokens = side.model.config.train_seq_len, side.model.config.train_batch_tokens
    batch = loader.batch(tokens // seq_len, seq_len, 0, 0, 1)
    with profile(activities=[ProfilerActivity.CPU]) as p:
        for _ in range(3):
            with record_function("forward_backward"):
                side.forward_backward(*batch)
            side.optimize()
            side.refresh()
    inside: dict[str, float] = {}
    for event in p.events():
        label, at = "other", event
        while at is not None and at.name != "forward_backward":
            outer = kernel_class(at.name)
            label = outer if outer and (outer != "elementwise" or label == "other") else label
            at = at.cpu_parent
        if at is not None:
            inside[label] = inside.get(label, 0.0) + event.self_cpu_time_total
    for label, time_total in inside.items():
        split[label] += forward_backward * time_total / sum(inside.values())
    return split


def measure_case(shape: str, seq_len: int, sections: list[str], pairs: int, folder: Path, log: Callable) -> dict:
    """Everything about one shape at one sequence length."""
    torch._dynamo.reset()  # the graphs of the case before
    torch.manual_seed(0)
    config = settings([*SHAPES[shape].split(), "--train-seq-len", str(seq_len)])
    ours = Ours(config)
    book = Textbook(config, ours.state())
    sides, loader = (ours, book), random_loader(folder, config.vocab_size)
    ternary = sum(p.numel() for n, p in ours.model.named_parameters() if n.startswith("blocks.") and p.ndim == 2
                  and n.endswith(".weight"))
    case: dict = {"shape": shape, "seq_len": seq_len, "ternary_weights": ternary}
    tokens = config.train_batch_tokens

    def first(run: Callable[[Side], float]) -> tuple[dict[str, float], dict[str, float]]:
        """Seconds and results of the first call of each side, which compiles."""
        seconds, results = {}, {}
        for side in sides:
            began = time.perf_counter()
            results[side.name] = run(side)
            seconds[side.name] = time.perf_counter() - began
        log(f"{shape} {seq_len}: first call {seconds['ours']:.1f} s, textbook {seconds['textbook']:.1f} s")
        return seconds, results

    if "train" in sections or "split" in sections:
        batch = loader.batch(tokens // seq_len, seq_len, 0, 0, 1)
        case["compile_seconds"], losses = first(lambda side: side.forward_backward(*batch))
        case["loss_difference"] = losses["textbook"] / losses["ours"] - 1
        for side in sides:
            run_steps(side, loader)
    if "train" in sections:
        def train_rate(side: Side) -> float:
            parts = run_steps(side, loader)
            return tokens * len(parts["loader"]) / sum(map(sum, parts.values()))

        case["train"] = take_turns(sides, train_rate, pairs)
        log(f"{shape} {seq_len}: training {statistics.median(case['train']['ratios']):.2f} times the textbook")
    if "split" in sections:
        case["split"] = {side.name: measure_split(side, loader) for side in sides}
    if "score" in sections:
        book.load(ours.state())
        windows = BATCH_SEQS * SCORE_BATCHES  # full batches, so that no shape is compiled for a rest
        stream = np.random.default_rng(1).integers(0, config.vocab_size, seq_len + STRIDE * (windows - 1) + 1)

        def score(side: Side) -> Score:
            return side.score(stream.astype(np.uint16), seq_len, STRIDE, BATCH_SEQS)

        case["score_compile_seconds"], scores = first(lambda side: score(side).val_loss)
        case["score_difference"] = scores["textbook"] / scores["ours"] - 1
        # The rate of a long stream: its windows score a stride each, only the first one of a stream scores all.
        case["score"] = take_turns(sides, lambda side: STRIDE * windows / score(side).seconds, pairs)
        log(f"{shape} {seq_len}: scoring {statistics.median(case['score']['ratios']):.2f} times the textbook")
    return case


# ---------------------------------------------------------------------------------------------------------------
# Report
# ---------------------------------------------------------------------------------------------------------------


def machine_lines(m: dict) -> list[str]:
    lines = [f"machine   {m['cpu']}, {m['cores']} cores, {m['threads']} threads, torch {m['torch']}, "
             f"python {m['python']}, {m['platform']}",
             "", "matrix products of 8,192 rows, GFLOP/s", "  product     inputs x outputs     bf16     fp32"]
    for name, r in m["gflops"].items():
        lines.append(f"  {name:<10}{r['inputs']:>8} x {r['outputs']:<9}{r['bf16']:>7.0f}{r['fp32']:>9.0f}")
    return lines


def rate_lines(cases: list[dict], key: str, difference: str, title: str) -> list[str]:
    lines = ["", title, f"  shape   ternary    seq      ours  textbook   ratio   lowest  highest   {difference}"]
    for c in cases:
        t = c[key]
        lines.append(
            f"  {c['shape']:<5}{c['ternary_weights']:>10,}{c['seq_len']:>7}{statistics.median(t['ours']):>10,.0f}"
            f"{statistics.median(t['textbook']):>10,.0f}{statistics.median(t['ratios']):>8.2f}{min(t['ratios']):>9.2f}"
            f"{max(t['ratios']):>9.2f}   {c[difference.replace(' ', '_')]:+.1e}")
    return lines


def split_lines(cases: list[dict]) -> list[str]:
    lines = ["", "milliseconds of a training step, by part, and shares; seconds of the first call, which compiles or",
             "finds code in Inductor's cache. Ours quantizes in refresh, the textbook within its elementwise kernels.",
             f"  shape  seq  side      step{''.join(f'{name:>12}' for name in PARTS)}  compile"]
    for c in cases:
        for name, split in c["split"].items():
            step = sum(split.values())
            cells = "".join(f"{1000 * split[part]:>7.0f} {split[part] / step:>4.0%}" for part in PARTS)
            lines.append(f"  {c['shape']:<5}{c['seq_len']:>5}  {name:<8}{1000 * step:>6.0f}{cells}"
                         f"{c['compile_seconds'][name]:>9.1f}")
    return lines


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="what to measure")
    p.add_argument("--shapes", default="S,M,L", help="which of S, M and L (default: all)")
    p.add_argument("--seq", default="512,1024", help="sequence lengths")
    p.add_argument("--pairs", type=int, default=5, help="turns of each side")
    p.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all cores")
    p.add_argument("--json", default="", help="write every figure to this file as well")
    args = p.parse_args()
    shapes = args.shapes.split(",")
    if unknown := set(shapes) - SHAPES.keys():
        p.error(f"--shapes: no shape {', '.join(sorted(unknown))}")
    began = time.perf_counter()

    def log(text: str) -> None:
        print(f"[{time.perf_counter() - began:6.0f} s] {text}", file=sys.stderr, flush=True)

    torch.set_num_threads(args.threads or machine.cores())
    machine.keep_freed_memory()
    torch.utils.deterministic.fill_uninitialized_memory = False  # train_gpt.main's as well
    torch._inductor.config.cpp.enable_kernel_profile = True  # fused kernels get names; costs nothing unprofiled
    machine.tag_compiler_cache()
    result: dict = {"cases": []}
    if "machine" in args.only:
        result["machine"] = measure_machine(shapes)
        print("\n".join(machine_lines(result["machine"])), flush=True)
    if args.only != ["machine"]:
        with tempfile.TemporaryDirectory() as folder:
            for shape in shapes:
                for seq_len in map(int, args.seq.split(",")):
                    result["cases"].append(measure_case(shape, seq_len, args.only, args.pairs, Path(folder), log))
                    if args.json:
                        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    cases = result["cases"]
    if "train" in args.only:
        print("\n".join(rate_lines(cases, "train", "loss difference",
                                   f"training, 8,192 tokens per step: tokens/s, medians of {args.pairs} pairs")))
    if "split" in args.only:
        print("\n".join(split_lines(cases)))
    if "score" in args.only:
        print("\n".join(rate_lines(cases, "score", "score difference",
                                   f"scoring at stride {STRIDE}: tokens/s, medians of {args.pairs} pairs")))
    print(f"\n{time.perf_counter() - began:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
