"""Where a training step's time goes on this machine, and what keeping freed memory is worth.

    python bench/step.py                    # split of one step, and paired medians with and without keep_freed_memory
    python bench/step.py --train-seq-len 512

Options are train_gpt.py's. Random tokens, no data needed; forward and backward compiled as in training.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a script, only bench/ is on the module path

import train_gpt  # noqa: E402
from eval_bpb import keep_freed_memory  # noqa: E402

PAIRS, STEPS = 3, 12


def make_step(argv: list[str]):
    """(config, function that runs one forward and backward, function that updates and refreshes)."""
    _, config, _, _ = train_gpt.resolve_settings(["--preset", "cpu", *argv], {})
    torch.set_num_threads(config.threads or train_gpt.cores())
    torch.manual_seed(0)
    model = train_gpt.GPT(config)
    latents = train_gpt.Latents(model, config)
    optimizer = train_gpt.Optimizer(latents, config)
    forward = torch.compile(model, dynamic=False, fullgraph=True) if config.compile else model
    rows = config.train_batch_tokens // config.train_seq_len
    tokens = torch.randint(config.vocab_size, (rows, config.train_seq_len + 1))

    def forward_backward() -> None:
        loss = forward(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        latents.accumulate(loss, 1)

    def update() -> None:
        optimizer.step(1.0, 0.9)
        latents.refresh()

    return config, forward_backward, update


def measure(argv: list[str], keep: bool) -> None:
    """Print the median seconds of a step and of its update; run in a process of its own."""
    if keep:
        keep_freed_memory()
    _, forward_backward, update = make_step(argv)
    steps, updates = [], []
    for i in range(STEPS + 3):
        start = time.perf_counter()
        forward_backward()
        middle = time.perf_counter()
        update()
        if i >= 3:  # the first ones compile and fill caches
            steps.append(time.perf_counter() - start)
            updates.append(time.perf_counter() - middle)
    print(statistics.median(steps), statistics.median(updates))


def main() -> int:
    if len(sys.argv) > 1 and sys.argv[1] in ("keep", "give"):
        measure(sys.argv[2:], sys.argv[1] == "keep")
        return 0
    argv, ratios = sys.argv[1:], []
    for pair in range(PAIRS):
        times = {}
        for mode in ("give", "keep"):
            done = subprocess.run([sys.executable, __file__, mode, *argv], capture_output=True, text=True, check=True)
            times[mode], update = map(float, done.stdout.split())
            print(f"pair {pair + 1}: {mode:<5} {1000 * times[mode]:7.1f} ms/step, of it update {1000 * update:5.1f} ms")
        ratios.append(times["give"] / times["keep"])
    print(f"keeping freed memory: {statistics.median(ratios):.2f} times the steps, "
          f"{min(ratios):.2f} to {max(ratios):.2f} over {PAIRS} pairs")

    keep_freed_memory()
    config, forward_backward, _ = make_step(argv)
    for _ in range(5):
        forward_backward()
    with profile(activities=[ProfilerActivity.CPU]) as p:
        forward_backward()
    events = sorted(p.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in events)
    print(f"forward and backward, {config.train_batch_tokens} tokens of sequence {config.train_seq_len}: "
          f"{total / 1000:.0f} ms of CPU time")
    for e in events[:8]:
        print(f"  {100 * e.self_cpu_time_total / total:5.1f}%  {e.key[:70]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
