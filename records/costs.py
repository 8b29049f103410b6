"""What a training step costs on H100s, for plan.py: flops, bytes, memory, and a predicted time.

Nothing here was measured by this project: it has no GPU. Flops, bytes and state are counted. The time is a roofline
sum, calibrated when the plan is printed on six published runs of other programs (RUNS):

    seconds = (flops / PEAK_FLOPS + HBM bytes / HBM_BYTES + bytes sent / LINK_BYTES) / efficiency of the stack

A stack is what a group of programs has in common beside the shape of its model: attention kernel, torch version, fused
q, k, v. Shapes alone do not tell PR 666 (119 ms) from PR 640 (92 ms), whose roofline sums agree within 1%, so each of
the two stacks has its own efficiency. They were told apart after seeing the residuals of one efficiency for all, which
the plan prints too. Which stack ours is near is not known: the plan prints both ends.

Terms that six points cannot identify were dropped, tests/test_costs.py shows why: separate efficiencies of matrix
products, attention and HBM, and a fixed time per step or per layer. All of them fit best where the hardware exceeds its
peaks or its products take no time; those for HBM and fixed times on the word of one run, PR 2086.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from scipy.optimize import nnls

import pack
from tern import base3
from tern.settings import ConfigError
from train_gpt import GPT, Config, format_of, micro_batch_tokens, optimizer_of, owners

# NVIDIA's H100 data sheet, SXM: dense bf16 flop/s; HBM3 bytes/s; NVLink 4 bytes/s each way (900e9 both ways)
PEAK_FLOPS, HBM_BYTES, LINK_BYTES, GPU_MEMORY = 989e12, 3.35e12, 450e9, 80e9
TRAIN_SECONDS = 600  # the competition's


@dataclass(frozen=True)
class Shape:
    """What the counts need to know of a model and its step; also of models that are not ours."""

    layers: int
    dim: int
    kv_dim: int  # key heads * head_dim; as many for the values
    hidden: int
    vocab: int
    seq_len: int
    batch_tokens: int  # per step over all GPUs
    ns_steps: int  # Newton-Schulz iterations
    embed_dim: int = 0  # width of a factored embedding; 0: dim, without projections
    fused_qkv: bool = False  # one matrix of q, k, v for Muon, not three


@dataclass(frozen=True)
class Run:
    """A published run on 8 H100 SXM with 524,288 tokens per step."""

    pr: int  # of github.com/openai/parameter-golf
    stack: str
    ms: float  # per step, mean over the run
    peak_mib: int  # torch.cuda.max_memory_allocated; 0: not published
    shape: Shape


SDPA, FA3 = "SDPA stack", "FA3 stack"
# Their programs:
# SDPA stack: descendants of the competition's baseline. torch.compile, DDP (one graph per bucket), flash SDPA,
#   q, k, v as three matrices, Muon with 5 iterations, latents bf16 (367) or fp32 (666).
# FA3 stack: PR 640 and its descendants. torch.compile, DDP with optimize_ddp off, FlashAttention 3, one q, k, v matrix,
#   Muon with 3 iterations on row-normalised momentum, fp32 latents, torch 2.10 (log of PR 923, the same program).
# All of them quantize inside the forward, on every rank; ours on the owner alone and once per step.
_PR139 = Shape(12, 768, 384, 2304, 1024, 2048, 524_288, 5)
_PR640 = Shape(10, 768, 384, 3072, 8192, 1024, 524_288, 3, embed_dim=254, fused_qkv=True)
RUNS = (
    # records/track_non_record_16mb/2026-03-19_BitNet158: run_8xh100.sh, train_gpt.py, train.log
    Run(139, SDPA, 127.32, 22_355, _PR139),
    # records/track_non_record_16mb/2026-03-21_BitNet158_v2: run_8xh100.sh, train_bitnet.py, train.log
    Run(367, SDPA, 130.71, 23_245, Shape(12, 768, 384, 2496, 1024, 2048, 524_288, 5)),
    # README.md and train_gpt.py of the PR. The first 30% of its 600 s ran without quantizing, which is not corrected
    # for: the quantizer is 1% of the traffic. Nor are its clipping to norm 1, its copies of k and v for every head, and
    # the two norms per block that it does not have.
    Run(666, SDPA, 119.38, 23_774, Shape(12, 768, 384, 2304, 1024, 1024, 524_288, 5)),
    # ms/step as in the table of submissions that this project started from; settings as a public rerun's page of
    # 2026-03-24_74M_Ternary_UNet_FP8_10L_8192BPE_YaRN_NeoMuon repeats them. The PR's own folder was not found.
    Run(640, FA3, 91.8, 0, _PR640),
    # README.md of the PR (mean of 3 seeds)
    Run(920, FA3, 91.87, 0, Shape(10, 768, 384, 3072, 8192, 1024, 524_288, 3, embed_dim=312, fused_qkv=True)),
    # README.md of the PR: "7,800 steps in 599s". Five levels; the same program as 640 otherwise
    Run(2086, FA3, 76.8, 0, Shape(10, 576, 288, 2304, 16384, 1024, 524_288, 3, embed_dim=380, fused_qkv=True)),
)
RUN_GPUS = 8


def shape_of(config: Config) -> Shape:
    """Ours; a plan is for the full sequence length and the full batch, after any ramp."""
    c = config
    return Shape(c.num_layers, c.model_dim, c.num_kv_heads * (c.model_dim // c.num_heads), c.hidden_dim, c.vocab_size,
                 c.train_seq_len, c.train_batch_tokens, c.muon_backend_steps)


# ---------------------------------------------------------------------------------------------------------------
# Flops
# ---------------------------------------------------------------------------------------------------------------


def layer_matrices(s: Shape) -> list[tuple[int, int]]:
    """(rows, columns) of the matrices of one block, in the order in which the programs register them."""
    d, kv = s.dim, s.kv_dim
    qkv = [(d + 2 * kv, d)] if s.fused_qkv else [(d, d), (kv, d), (kv, d)]
    return [*qkv, (d, d), (s.hidden, d), (d, s.hidden)]


def block_flops(s: Shape) -> float:
    """Of the blocks' matrices, per token: 2 per weight forward, 4 backward (Kaplan et al., arXiv 2001.08361, 2.1)."""
    return 6.0 * s.layers * sum(r * c for r, c in layer_matrices(s))


def head_flops(s: Shape) -> float:
    """Of the output head, per token, likewise, and of a factored embedding's two projections. A look-up has none."""
    width = s.embed_dim or s.dim
    return 6.0 * (s.vocab * width + (2 * s.dim * width if s.embed_dim else 0))


def attention_flops(s: Shape) -> float:
    """Of q k^T and of the mean of the values, per token: a query sees (seq_len + 1) / 2 keys in the mean.

    Forward 2 products of 2 * dim per key; backward 5, one of them the forward's again, so 2.5 times as many
    (FlashAttention-2, arXiv 2307.08691, section 4.1). The masked half of a diagonal tile is not counted.
    """
    return s.layers * 3.5 * 2 * (2 * s.dim) * (s.seq_len + 1) / 2


def newton_schulz_flops(rows: int, cols: int, steps: int) -> float:
    """Of one matrix: x x^T, its square, a product with x: 2 (2 n m^2 + m^3) a step (kellerjordan.github.io/posts/muon).
    """
    m, n = min(rows, cols), max(rows, cols)
    return steps * (4.0 * m * m * n + 2.0 * m**3)


# ---------------------------------------------------------------------------------------------------------------
# HBM traffic
# ---------------------------------------------------------------------------------------------------------------

# Elements that the compiled kernels of one block read and write per token, in units of (dim, kv_dim, hidden): each row
# is one kernel, the pointwise neighbours fused into one. Assumed: nothing stays in the 50 MB L2 between two kernels.
BLOCK_TRAFFIC: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {  # forward, backward
    "residual, mix, norm": ((5, 0, 0), (8, 0, 0)),  # x, branch, x0 -> x, normed; 2 gradients + 3 saved -> 3 gradients
    "q, k, v": ((2, 2, 0), (4, 4, 0)),  # backward: two products, each reads the gradient of the output
    "norm, rotate q and k": ((2, 2, 0), (3, 3, 0)),
    "attention": ((2, 2, 0), (4, 4, 0)),
    "norm": ((2, 0, 0), (3, 0, 0)),
    "output": ((2, 0, 0), (4, 0, 0)),
    "residual, norm": ((4, 0, 0), (6, 0, 0)),
    "fc": ((1, 0, 1), (2, 0, 2)),
    "relu squared, norm": ((0, 0, 2), (0, 0, 3)),
    "proj": ((1, 0, 1), (2, 0, 2)),
}
# bf16 elements of a block kept from forward to backward: x twice, q before and after its norm, attention's output and
# that normed, both branches' outputs; k likewise and v; fc's output, its square and that normed.
BLOCK_SAVED = (8, 3, 3)


def activation_traffic(s: Shape) -> float:
    """HBM bytes per token of the blocks' activations, forward and backward, all bf16. Embedding (under 2%) left out."""
    passes = [p for both in BLOCK_TRAFFIC.values() for p in both]
    return 2.0 * s.layers * sum(d * s.dim + kv * s.kv_dim + h * s.hidden for d, kv, h in passes)


def logits_traffic(s: Shape) -> float:
    """HBM bytes per token of the bf16 logits: written, read for maximum and sum, read and overwritten by their
    gradient, which two products read. Softcap and fp32 stay inside the kernels (assumed)."""
    return 2.0 * 7 * s.vocab


def newton_schulz_traffic(rows: int, cols: int, steps: int) -> float:
    """HBM bytes of one matrix: 8 passes over x and 12 over x x^T per iteration, bf16, no kernels fused."""
    m, n = min(rows, cols), max(rows, cols)
    return steps * 2.0 * (8 * m * n + 12 * m * m)


# HBM bytes per weight, counted in train_gpt.py without fusion where it runs eagerly; all of it is a few % of a step.
MICRO_BATCH_BYTES = 16  # read bf16 forward and backward, gradient written bf16, read, added to the fp32 sum
STEP_BYTES = 8  # fp32 sum checked for finiteness and cleared
DEQUANTIZE_BYTES = 23  # codes to fp32, times scale, to bf16, copied
MUON_BYTES, ADAM_BYTES, QUANTIZE_BYTES = 64, 28, 50  # of the owner
# In the runs' programs: weight quantized in the compiled forward 10, read by two products 4, gradient written and
# copied 12, update received and added 10
THEIR_WEIGHT_BYTES = 36


# ---------------------------------------------------------------------------------------------------------------
# State and communication of our optimizer: each parameter has one owner
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameter:
    shape: tuple[int, ...]
    muon: bool  # else AdamW
    codes: int  # bytes of the stored codes in memory
    scales: int  # bytes
    payload: int  # bytes sent after an update: codes (ternary ones five to a byte) and scales

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@cache
def parameters(config: Config) -> dict[str, Parameter]:
    """Every parameter by name; not to be changed by the caller."""
    out = {}
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in GPT(config).named_parameters()}
    for name, shape in shapes.items():
        roles = pack.layout(format_of(config, name, len(shape)).spec(), shape)
        size = {role: math.prod(of) * np.dtype(pack.SYMBOLS[symbol]).itemsize for role, (symbol, of) in roles.items()}
        codes, scales = size["codes"], size.get("scales", 0)
        sent = -(-codes // base3.PER_BYTE) if roles["codes"][0] == "ternary" else codes
        out[name] = Parameter(shape, optimizer_of(name) == "muon", codes, scales, sent + scales)
    return out


def refresh_payload(config: Config) -> dict[str, int]:
    """Bytes that the owner of each parameter sends to all others after its update; if it were sent by itself, as
    codes of one owner and shape share their last byte: under one byte per parameter too many."""
    return {name: p.payload for name, p in parameters(config).items()}


def state_bytes(config: Config, world: int, rank: int) -> dict[str, int]:
    """Bytes that a rank holds between steps, by part: exact, but for AdamW's step counts and refresh_payload's excess.
    """
    every, owner = parameters(config), owners(config, world)
    mine = [p for name, p in every.items() if owner[name] == rank]
    n = sum(p.size for p in every.values())
    payload = sum(p.payload for p in every.values()) if world > 1 else 0
    return {
        "params, bf16": 2 * n,
        "gradient sums, fp32": 4 * (n + 1),  # flat, with the loss
        "payload": payload,
        "latents, fp32": sum(4 * p.size for p in mine),
        "momentum, fp32": sum(4 * p.size for p in mine if p.muon),
        "AdamW moments, fp32": sum(8 * p.size for p in mine if not p.muon),
        "codes": sum(p.codes for p in mine),
        "scales": sum(p.scales for p in mine),
    }


def communication(config: Config, world: int) -> dict[str, float]:
    """Bytes that a rank sends per step, mean over the ranks.

    A reduce to, and a broadcast from, one owner is a chain in which world - 1 of the ranks send each byte on once (the
    trainer's own counter, Ranks.sent, charges a broadcast to its owner alone).
    """
    every = parameters(config).values()
    share = (world - 1) / world
    return {"gradients, fp32": share * 4 * sum(p.size for p in every),
            "codes and scales": share * sum(p.payload for p in every)}


def activation_bytes(s: Shape, tokens: int) -> float:
    """Estimated bytes held at the start of a backward of that many tokens: BLOCK_SAVED, and logits as bf16, as fp32
    and their gradient as bf16. BLOCK_SAVED agrees with the peaks that PR 139, 367 and 666 logged; it is a guess which
    of them the compiler keeps and which it computes again."""
    d, kv, h = BLOCK_SAVED
    return tokens * (2.0 * s.layers * (d * s.dim + kv * s.kv_dim + h * s.hidden) + 8.0 * s.vocab)


# ---------------------------------------------------------------------------------------------------------------
# Cost of a step, and its time
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Of one GPU, the busiest, in one step; by part."""

    flops: dict[str, float]
    hbm: dict[str, float]  # bytes
    sent: dict[str, float]  # bytes

    @property
    def roofline(self) -> float:
        """Seconds at the hardware's peaks with nothing overlapped; latencies of kernels and messages are not in it."""
        return (sum(self.flops.values()) / PEAK_FLOPS + sum(self.hbm.values()) / HBM_BYTES
                + sum(self.sent.values()) / LINK_BYTES)


def model_cost(s: Shape, gpus: int) -> tuple[dict[str, float], dict[str, float]]:
    """(flops, HBM bytes) of forward and backward per GPU and step, without the weights' traffic."""
    tokens = s.batch_tokens / gpus
    return ({"blocks": tokens * block_flops(s), "head": tokens * head_flops(s),
             "attention": tokens * attention_flops(s)},
            {"activations": tokens * activation_traffic(s), "logits": tokens * logits_traffic(s)})


def step_cost(config: Config, gpus: int = 8) -> Cost:
    """Of our trainer. Raises ConfigError where the batch does not divide over the GPUs."""
    s, every, owner = shape_of(config), parameters(config), owners(config, gpus)
    micro_batches = s.batch_tokens // (gpus * micro_batch_tokens(config, gpus))
    flops, hbm = model_cost(s, gpus)
    owned = [[p for name, p in every.items() if owner[name] == rank] for rank in range(gpus)]

    def orthogonal(of: Callable[[int, int, int], float], ps: Iterable[Parameter]) -> float:
        return sum(of(*p.shape, s.ns_steps) for p in ps if p.muon)

    def update(ps: list[Parameter]) -> float:
        passes = sum(p.size * ((MUON_BYTES if p.muon else ADAM_BYTES) + QUANTIZE_BYTES) for p in ps)
        return passes + orthogonal(newton_schulz_traffic, ps)

    n, payload = sum(p.size for p in every.values()), sum(p.payload for p in every.values())
    flops["Newton-Schulz"] = max(orthogonal(newton_schulz_flops, ps) for ps in owned)
    hbm["weights, gradients"] = n * (micro_batches * MICRO_BATCH_BYTES + STEP_BYTES + DEQUANTIZE_BYTES)
    if gpus > 1:
        hbm["weights, gradients"] += 2 * payload  # packed or received, and unpacked
    hbm["optimizer"] = max(map(update, owned))
    return Cost(flops, hbm, communication(config, gpus))


def run_cost(run: Run) -> Cost:
    """Of a published run. Its gradients' all-reduce overlaps the backward and is not counted; Muon's update is: bf16,
    ring all-reduce, which sends 2 (W - 1) / W of it. Matrix i of Muon is orthogonalised by rank i mod 8."""
    s = run.shape
    matrices = layer_matrices(s) * s.layers
    weights = sum(r * c for r, c in matrices)
    flops, hbm = model_cost(s, RUN_GPUS)
    flops["Newton-Schulz"] = max(sum(newton_schulz_flops(r, c, s.ns_steps) for r, c in matrices[rank::RUN_GPUS])
                                 for rank in range(RUN_GPUS))
    hbm["weights, gradients"] = THEIR_WEIGHT_BYTES * (weights + head_flops(s) / 6)
    hbm["optimizer"] = max(sum(newton_schulz_traffic(r, c, s.ns_steps) for r, c in matrices[rank::RUN_GPUS])
                           for rank in range(RUN_GPUS))
    return Cost(flops, hbm, {"updates": 2 * 2 * weights * (RUN_GPUS - 1) / RUN_GPUS})


def fit(runs: Iterable[Run] = RUNS) -> dict[str, float]:
    """Efficiency of each stack that occurs: non-negative least squares of the relative errors of ms per step."""
    runs = tuple(runs)
    stacks = list(dict.fromkeys(run.stack for run in runs))
    a = np.array([[1000 * run_cost(run).roofline / run.ms if run.stack == stack else 0.0 for stack in stacks]
                  for run in runs])
    return {stack: float(1 / x) for stack, x in zip(stacks, nnls(a, np.ones(len(runs)))[0], strict=True)}


def error(run: Run, efficiency: float) -> float:
    """(predicted - published) / published."""
    return 1000 * run_cost(run).roofline / efficiency / run.ms - 1


def leave_one_out(runs: Iterable[Run] = RUNS) -> dict[int, float]:
    """PR -> error of its prediction from the other runs of its stack."""
    runs = tuple(runs)
    return {run.pr: error(run, fit(other for other in runs if other is not run)[run.stack]) for run in runs}


def leave_stack_out(runs: Iterable[Run] = RUNS) -> dict[int, float]:
    """PR -> error of its prediction from the other stack: what to expect of a program that is neither, as ours is."""
    runs = tuple(runs)
    found = {run.pr: [e for stack, e in fit(runs).items() if stack != run.stack] for run in runs}
    return {run.pr: error(run, found[run.pr][0]) for run in runs}


def launch_bound(config: Config, gpus: int = 8) -> bool:
    """Whether a forward and backward is under half the smallest run's: launching kernels, in no formula, would rule."""
    forwards = config.train_batch_tokens // (gpus * micro_batch_tokens(config, gpus))
    return step_cost(config, gpus).roofline / forwards < min(run_cost(run).roofline for run in RUNS) / 2


def predicted_seconds(config: Config, gpus: int = 8) -> dict[str, float]:
    """Stack -> seconds per step of our trainer if it were as efficient as that stack's programs."""
    return {stack: step_cost(config, gpus).roofline / e for stack, e in fit().items()}


# ---------------------------------------------------------------------------------------------------------------
# The plan's section
# ---------------------------------------------------------------------------------------------------------------


ROWS = ("Tflop (of it Newton-Schulz)", "HBM GB, activations, logits", "HBM GB, weights + optimizer",
        "MB sent, gradients + codes", "GB of state, counted", f"GB at peak, estimated, of {GPU_MEMORY / 1e9:.0f}",
        "ms per step, predicted", "million tokens/s", f"steps in {TRAIN_SECONDS} s")


def column(config: Config, gpus: int) -> list[str]:
    """The entries of ROWS. Raises ConfigError as step_cost does."""
    cost, tokens = step_cost(config, gpus), config.train_batch_tokens
    state = max(sum(state_bytes(config, gpus, rank).values()) for rank in range(gpus))
    gradients = 2 * sum(p.size for p in parameters(config).values())  # bf16, all there at the end of a backward
    peak = state + gradients + activation_bytes(shape_of(config), micro_batch_tokens(config, gpus))
    fast, slow = sorted(predicted_seconds(config, gpus).values())
    times = [f"{1000 * fast:,.1f} to {1000 * slow:,.1f}", f"{tokens / slow / 1e6:,.2f} to {tokens / fast / 1e6:,.2f}",
             f"{TRAIN_SECONDS / slow:,.0f} to {TRAIN_SECONDS / fast:,.0f}"]
    return [
        f"{sum(cost.flops.values()) / 1e12:,.2f} ({cost.flops['Newton-Schulz'] / 1e12:.2f})",
        f"{(cost.hbm['activations'] + cost.hbm['logits']) / 1e9:,.2f}",
        f"{cost.hbm['weights, gradients'] / 1e9:,.2f} + {cost.hbm['optimizer'] / 1e9:,.2f}",
        " + ".join(f"{x / 1e6:,.1f}" for x in cost.sent.values()),
        f"{state / 1e9:,.3f}",
        f"{peak / 1e9:,.1f}" + ("" if peak <= GPU_MEMORY else " OVER"),
        *(["too small"] * len(times) if launch_bound(config, gpus) else times),
    ]


def signed(x: float) -> str:
    return f"{100 * x:+.1f}%"


def report(config: Config, gpus: tuple[int, ...] = (1, 8)) -> list[str]:
    """The plan's lines on the cost of a step, one column for each number of GPUs."""
    s = shape_of(config)
    parts = {"blocks": block_flops(s), "head": head_flops(s), "attention": attention_flops(s)}
    lines = [
        "a step on H100 SXM. Nothing was run on a GPU here: times are predictions from other people's logs.",
        f"  {sum(parts.values()):,.0f} flops per token: " + ", ".join(f"{name} {x:,.0f}" for name, x in parts.items())
        + f"; {s.batch_tokens:,} tokens per step",
    ]
    columns = {}
    for count in gpus:
        try:
            columns[count] = column(config, count)
        except ConfigError:
            lines.append(f"  {count} GPU(s): the batch does not divide into whole sequences per GPU")
    if not columns:
        return lines
    heads = ["1 GPU" if count == 1 else f"{count} GPUs" for count in columns]
    for row, *entries in [("per GPU, the busiest", *heads), *zip(ROWS, *columns.values(), strict=True)]:
        lines.append(f"  {row:<28}" + "".join(f"{entry:>24}" for entry in entries))
    if any("too small" in entries for entries in columns.values()):
        lines.append("  too small: under half of any calibrating run; launches of kernels, in no formula, would rule")
    loo, across = leave_one_out(), leave_stack_out()
    worst, median = max(map(abs, loo.values())), float(np.median([abs(e) for e in loo.values()]))
    pooled = max(map(abs, leave_one_out(replace(run, stack="all") for run in RUNS).values()))
    return [
        *lines,
        "  ms = roofline sum / efficiency, fitted: " + ", ".join(f"{k} {100 * x:.1f}%" for k, x in fit().items())
        + ", from three 8-GPU runs each",
        "  a run predicted from the others: " + ", ".join(f"PR {pr} {signed(e)}" for pr, e in loo.items()),
        f"  worst {100 * worst:.1f}%, median {100 * median:.1f}% (640 and 920 are nearly one run); worst with one "
        f"efficiency for all six {100 * pooled:.1f}%",
        f"  from the other stack: {signed(min(across.values()))} to {signed(max(across.values()))}. Expect that here: "
        "ours is a third program, which quantizes",
        "  once per step on the owner, not in every forward, and reduces after the backward, not under it",
    ]
