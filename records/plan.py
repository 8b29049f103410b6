"""The budget of a model before it is trained.

    python records/plan.py --preset golf16mb --num-layers 12      # any settings of train_gpt.py

Parameters and predicted bytes of each part, and the widest MLP, the most layers and the largest vocabulary that fit
the cap with everything else as it is. Bits per symbol are pack.expected_bits, measured on trained artifacts; bytes of
code are those of the one file that is submitted. Then what a step costs on H100s (costs.py).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pack
from records import costs
from tern import command, source
from tern.settings import ConfigError, changed, largest
from train_gpt import Config, model_bytes, predicted_bytes, resolve_settings

# PR 367 of openai/parameter-golf: its README and submission.json
PR367_TERNARY, PR367_BYTES = 67_239_936, 15_882_274

LARGEST = {  # setting -> (what it is, in steps of)
    "mlp_hidden": ("MLP width", 8),
    "num_layers": ("layers", 1),
    "vocab_size": ("vocabulary", 64),
}


def ternary_weights(config: Config) -> int:
    return sum(n for spec, n, _ in codes(config) if spec["kind"] == "ternary")


def codes(config: Config) -> list[tuple[dict, int, float]]:
    return [row for part, row in predicted_bytes(config).items() if part.endswith(" codes")]


def report(preset: str, config: Config, gpus: tuple[int, ...] = (1, 8)) -> str:
    """The plan of a configuration, as text, its costs for each number of GPUs. Trains nothing, reads no data."""
    c = config
    parts = predicted_bytes(c)
    model, code = model_bytes(c), source.code_bytes()
    counted = code if c.cap_counts_code else 0
    weights = sum(n for _, n, _ in codes(c))
    lines = [
        f"plan of preset {preset}: {c.num_layers} layers x {c.model_dim}, {c.num_heads} heads, {c.num_kv_heads} kv, "
        f"mlp {c.hidden_dim}, vocab {c.vocab_size}; nothing was trained",
        "", f"{'part':<18}{'format':<24}{'count':>14}{'bits each':>11}{'bytes':>14}",
    ]

    def line(part: str, label: str, count: int | None, size: float) -> None:
        bits = f"{8 * size / count:.3f}" if count else ""
        number = f"{count:,}" if count else ""
        lines.append(f"{part:<18}{label:<24}{number:>14}{bits:>11}{size:>14,.0f}")

    for part, (spec, count, size) in parts.items():
        line(part, pack.format_label(spec) if spec else "", count or None, size)
    line("model", "", weights, model)
    line("code", "as one file", None, code)
    total = model + counted
    lines += [
        "", f"total {total:,} bytes of {c.cap_bytes:,}" + ("" if counted else " (the cap does not cover the code)")
        + f": {'fits, margin' if total <= c.cap_bytes else 'OVER by'} {abs(c.cap_bytes - total):,}",
        f"parameters {weights:,}, of them {ternary_weights(c):,} ternary; {8 * model / weights:.4f} bits per parameter",
        "Assumed: bits per symbol measured on trained artifacts (pack.BITS, LOG.md). Untrained tensors pack smaller.",
        "", "the largest that fits the cap, all else as above:",
    ]

    def fits(name: str) -> Callable[[int], bool]:
        def test(value: int) -> bool:
            other = changed(c, name, value)
            return other is None or model_bytes(other) + counted <= c.cap_bytes
        return test

    for name, (what, step) in LARGEST.items():
        value = largest(fits(name), c.hidden_dim if name == "mlp_hidden" else getattr(c, name), step)
        best = changed(c, name, value) if value else None
        if best is None:
            lines.append(f"  {what:<12} none: even {step} is over the cap")
            continue
        parameters = sum(n for _, n, _ in codes(best))
        lines.append(f"  {what:<12}{value:>8,}  (steps of {step})  {parameters:>12,} parameters, "
                     f"{ternary_weights(best):,} ternary, {model_bytes(best) + counted:,} bytes")
        if name == "mlp_hidden" and c.cap_bytes == pack.DEFAULT_CAP and c.cap_counts_code:
            more = ternary_weights(best) - PR367_TERNARY
            lines.append(f"{'':<14}{more:+,} ternary parameters against PR 367's {PR367_TERNARY:,} in "
                         f"{PR367_BYTES:,} bytes")
    return "\n".join([*lines, "", *costs.report(c, gpus)])


def main(argv: list[str] | None = None) -> int:
    command.steady_streams()
    try:
        preset, config, _, notices = resolve_settings(sys.argv[1:] if argv is None else argv, os.environ)
    except ConfigError as e:
        command.say_error(e)
        return 2
    print("\n".join([*(f"notice      {notice}" for notice in notices), report(preset, config)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
