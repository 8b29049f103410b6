"""What a training step has to do, and where its time goes.

Counted: floating-point operations and bytes of device memory of each kind of work in a step, and so the shortest time
in which a card can do it. Measured: the time of each kind of kernel, from a trace that torch.profiler wrote. gpu.py
prints one beside the other.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from train_gpt import Config, optimizer_of, param_shapes

# NVIDIA's H100 data sheet, SXM: dense bf16 flop/s, HBM3 bytes/s. A card has less (gpu.py's stage machine measures it).
PEAK_FLOPS, HBM_BYTES = 989e12, 3.35e12

# ---------------------------------------------------------------------------------------------------------------
# Counted
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """One kind of work in a step, whose kernels wait for each other but not for those of another card."""

    name: str
    flops: float
    bytes: float  # of device memory, read and written

    @property
    def seconds(self) -> float:
        """The shortest on an H100: arithmetic and memory overlap fully inside of a kind."""
        return max(self.flops / PEAK_FLOPS, self.bytes / HBM_BYTES)


def products(config: Config) -> dict[str, tuple[int, int, int]]:
    """Product -> (inputs, outputs, how many of them the model has)."""
    c = config
    heads_out = c.model_dim + 2 * c.num_kv_heads * (c.model_dim // c.num_heads)
    return {
        "qkv": (c.model_dim, heads_out, c.num_layers), "proj": (c.model_dim, c.model_dim, c.num_layers),
        "up": (c.model_dim, c.hidden_dim, c.num_layers), "down": (c.hidden_dim, c.model_dim, c.num_layers),
        "head": (c.model_dim, c.vocab_size, 1),
    }


def flops_per_token(config: Config) -> tuple[float, float]:
    """(6N, attention) of a model-flops utilisation, forward and backward.

    N: weights that multiply, those of the head too; 2 flops of each forward, 4 backward (Kaplan et al., arXiv
    2001.08361, section 2.1). Attention: 2 products of 2 * dim flops a key forward, twice that backward; a query sees
    half the keys under the causal mask. What a kernel computes again is not counted.
    """
    n = sum(inputs * outputs * count for inputs, outputs, count in products(config).values())
    return 6.0 * n, 6.0 * config.num_layers * config.model_dim * config.train_seq_len


FORMULA = "(6N + 6 layers * dim * sequence) * tokens/s / 989e12, N: weights that multiply, with the head"


def utilisation(config: Config, tokens_per_second: float) -> float:
    """Model-flops utilisation of an H100's dense bf16 peak."""
    return sum(flops_per_token(config)) * tokens_per_second / PEAK_FLOPS


# Elements that the kernels of a block read and write per token, in units of (dim, kv dim, hidden), forward and
# backward. A product, attention and each chain of elementwise operations between two of them is one kernel, which reads
# each input and writes each output once; nothing stays in the cache between two kernels.
PRODUCT_TRAFFIC = {
    "qkv": ((2, 2, 0), (4, 4, 0)),  # backward: two products, each reads the gradient of the output
    "proj": ((2, 0, 0), (4, 0, 0)),
    "up": ((1, 0, 1), (2, 0, 2)),
    "down": ((1, 0, 1), (2, 0, 2)),
}
ATTENTION_TRAFFIC = ((2, 2, 0), (4, 4, 0))  # backward: q, k, v, output and its gradient; three gradients
ELEMENTWISE_TRAFFIC = {
    "add, mix, norm": ((5, 0, 0), (8, 0, 0)),  # x, branch, x0 -> x, normed; 4 saved or given -> 2, and x0's sum
    "norm and rotate q, k": ((2, 2, 0), (3, 3, 0)),
    "norm": ((2, 0, 0), (3, 0, 0)),
    "add, norm": ((4, 0, 0), (5, 0, 0)),
    "relu squared, norm": ((0, 0, 2), (0, 0, 3)),
}
LOGITS_TRAFFIC = 6  # written, read by the loss; read and overwritten by its gradient; read by two products
SUM_BYTES = 12  # of a weight and micro-batch: bf16 gradient written and read, fp32 sum read and written
# Of a weight and step: gradient read and cleared 8; momentum, or AdamW's moments, 8 or 16; latent 8; code and param 3
MUON_BYTES, ADAM_BYTES = 27, 35


def newton_schulz(rows: int, cols: int, steps: int) -> tuple[float, float]:
    """(flops, bytes) of one matrix: x x^T, its square, a product with x, all in bf16, the sums inside of products."""
    m, n = min(rows, cols), max(rows, cols)
    return steps * (4.0 * m * m * n + 2.0 * m**3), steps * 2.0 * (3 * m * n + 6 * m * m)


def step_work(config: Config, tokens: int, micro_batches: int = 1) -> list[Work]:
    """The work of one step of so many tokens on one card, which owns all parameters.

    Left out: the embedding's look-up and its gradient, the loader's copies, checks; under 2% of the bytes at the
    presets' shapes.
    """
    c = config
    kv = c.num_kv_heads * (c.model_dim // c.num_heads)

    def traffic(passes) -> float:
        elements = sum(d * c.model_dim + k * kv + h * c.hidden_dim for d, k, h in passes)
        return 2.0 * c.num_layers * elements * tokens

    blocks = {name: inputs * outputs * count for name, (inputs, outputs, count) in products(c).items()}
    head = blocks.pop("head")
    weights = sum(blocks.values())
    shapes = param_shapes(c)
    muon = [shape for name, shape in shapes.items() if optimizer_of(name) == "muon"]
    adam = sum(math.prod(shape) for name, shape in shapes.items() if optimizer_of(name) != "muon")
    updates = [newton_schulz(*shape, c.muon_backend_steps) for shape in muon]
    state = MUON_BYTES * sum(map(math.prod, muon)) + ADAM_BYTES * adam
    return [
        Work("products", 6.0 * weights * tokens,
             traffic(p for both in PRODUCT_TRAFFIC.values() for p in both) + micro_batches * 4.0 * weights),
        Work("attention", flops_per_token(c)[1] * tokens, traffic(ATTENTION_TRAFFIC)),
        Work("elementwise", 0.0, traffic(p for both in ELEMENTWISE_TRAFFIC.values() for p in both)),
        Work("head and loss", 6.0 * head * tokens,
             2.0 * LOGITS_TRAFFIC * c.vocab_size * tokens + micro_batches * 4.0 * head),
        Work("gradient sums", 0.0, float(micro_batches * SUM_BYTES * sum(map(math.prod, shapes.values())))),
        Work("optimizer and refresh", sum(flops for flops, _ in updates), state + sum(moved for _, moved in updates)),
    ]


def floor_lines(work: list[Work], tokens: int) -> list[str]:
    """What was counted, as a table."""
    lines = ["work                    TFLOP       GB  floor ms"]
    for w in work:
        lines.append(f"{w.name:<22}{w.flops / 1e12:>7.2f}{w.bytes / 1e9:>9.2f}{1000 * w.seconds:>10.2f}")
    seconds = sum(w.seconds for w in work)
    return [*lines, f"{'in all':<22}{sum(w.flops for w in work) / 1e12:>7.2f}{sum(w.bytes for w in work) / 1e9:>9.2f}"
            f"{1000 * seconds:>10.2f}   {tokens / seconds:,.0f} tokens/s on an H100 of {PEAK_FLOPS / 1e12:.0f} TFLOP/s "
            f"and {HBM_BYTES / 1e12:.2f} TB/s"]


# ---------------------------------------------------------------------------------------------------------------
# Measured: kinds of kernels in a trace
# ---------------------------------------------------------------------------------------------------------------

# Ranges of a step (torch.profiler.record_function) whose kernels have kinds of their own, whatever their names are.
RANGES = ("optimizer", "refresh", "gradient sums")
# Names of kernels; the first pattern that is found decides. Those that Inductor made carry the operators that they came
# from, products and attention among them, whose outputs they only take: hence "not triton_". tanh is the softcap's.
NAMES = (
    ("attention", r"^(?!triton_(?:poi|per|red)).*(flash|fmha|sdpa|attention|attn)"),
    ("products", r"^(?!triton_(?:poi|per|red)).*(gemm|nvjet|cutlass|xmma|wgmma|cublas|splitk|triton_tem)"),
    ("communication", r"nccl"),
    ("loss", r"tanh|nll_loss|log_softmax|logsumexp|softmax|cross_entropy"),
    ("copies", r"^mem(cpy|set)\b"),
)
KINDS = (*(kind for kind, _ in NAMES), "elementwise", *RANGES)


@dataclass(frozen=True)
class Profile:
    """Milliseconds of a step on the device."""

    kinds: dict[str, float]
    busy: float  # in which at least one kernel ran
    launches: float  # kernels and copies, a count
    longest: list[tuple[float, float, str]]  # (ms, launches, name) of the kernels that took most of the time
    idle: list[tuple[float, float, str]]  # (ms, times, "kernel -> kernel") of the gaps that took most of the time


def kind_of(name: str) -> str:
    """The kind of a kernel, by its name alone."""
    for kind, pattern in NAMES:
        if re.search(pattern, name.lower()):
            return kind
    return "elementwise"


def read_profile(trace: dict, steps: int, longest: int = 80) -> Profile:
    """The profile of `steps` steps from a trace in Chrome's format (torch.profiler's export_chrome_trace).

    A kernel belongs to the range in which it was launched; the launch is found by its correlation id.
    """
    events = [e for e in trace["traceEvents"] if e.get("ph") == "X"]
    ranges = [(e["ts"], e["ts"] + e["dur"], e["name"]) for e in events
              if e.get("cat") == "user_annotation" and e["name"] in RANGES]
    launched = {e["args"]["correlation"]: e["ts"] for e in events
                if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})}
    kinds, by_name, busy, reached, count = dict.fromkeys(KINDS, 0.0), {}, 0.0, -math.inf, 0
    idle: dict[str, tuple[float, int]] = {}
    before_it = ""  # the kernel that ended last
    for e in sorted((e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")),
                    key=lambda e: e["ts"]):
        start, end, kind = e["ts"], e["ts"] + e["dur"], kind_of(e["name"])
        at = launched.get(e.get("args", {}).get("correlation"))
        for first, last, name in ranges:
            if at is not None and first <= at <= last:
                kind = name
        kinds[kind] += e["dur"]
        before, n = by_name.get(e["name"], (0.0, 0))
        by_name[e["name"]] = before + e["dur"], n + 1
        if before_it and start > reached:
            gap = f"{before_it[:50]} -> {e['name'][:50]}"
            before, n = idle.get(gap, (0.0, 0))
            idle[gap] = before + start - reached, n + 1
        before_it = e["name"] if end > reached else before_it
        busy += max(end - max(start, reached), 0.0)
        reached, count = max(reached, end), count + 1
    scale = 1000.0 * steps  # the trace is in microseconds

    def top(found: dict[str, tuple[float, int]]) -> list[tuple[float, float, str]]:
        ranked = sorted(((us, n, name) for name, (us, n) in found.items()), reverse=True)
        return [(us / scale, n / steps, name) for us, n, name in ranked[:longest]]

    return Profile({kind: time / scale for kind, time in kinds.items()}, busy / scale, count / steps, top(by_name),
                   top(idle))


def profile_lines(profile: Profile, step_ms: float) -> list[str]:
    """A profile as a table; step_ms: of a step that nobody watched, so that the gaps are its own."""
    rows = {kind: ms for kind, ms in profile.kinds.items() if ms}
    rows["launch gaps"] = max(step_ms - profile.busy, 0.0)
    lines = [f"{kind:<22}{ms:>9.3f} ms{ms / step_ms:>7.1%}" for kind, ms in rows.items()]
    lines.append(f"{'step':<22}{step_ms:>9.3f} ms, {profile.launches:,.0f} launches")
    lines += [f"  {ms:>8.3f} ms{n:>7.1f} x {name[:90]}" for ms, n, name in profile.longest[:20]]
    return [*lines, "nothing ran between", *(f"  {ms:>8.3f} ms{n:>7.1f} x {name}" for ms, n, name in profile.idle[:8])]


