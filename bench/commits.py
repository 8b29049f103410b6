"""Training speed of this checkout against another one, turn about, each in a process of its own.

    git worktree add /tmp/before HEAD~3
    python bench/commits.py /tmp/before                                     # at the CPU track's shape
    python bench/commits.py /tmp/before --pairs 9 -- --train-seq-len 512    # more settings of train_gpt.py, for both

Random tokens, no data needed. A turn is a few whole steps (forward, backward, update, refresh); what counts is the
ratio within a pair of turns. Settings must be known to both checkouts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEPS = 4  # of a turn


def work(checkout: str, settings: list[str]) -> None:
    """Answer each line on stdin with the medians, in ms, of forward, backward, update and the whole of a step."""
    sys.path.insert(0, checkout)
    import torch

    import eval_bpb
    import train_gpt

    _, config, _, _ = train_gpt.resolve_settings(["--preset", "cpu_10min_128kb", *settings], {})
    torch.set_num_threads(config.threads or len(os.sched_getaffinity(0)))
    eval_bpb.keep_freed_memory()
    torch.compiler.config.cache_key_tag = eval_bpb.sha256_file(train_gpt.__file__)
    torch.manual_seed(0)
    model = train_gpt.GPT(config)
    latents = train_gpt.Latents(model, config)
    optimizer = train_gpt.Optimizer(latents, config)
    forward = torch.compile(model, dynamic=False, fullgraph=True) if config.compile else model
    tokens = torch.randint(config.vocab_size, (config.train_batch_tokens // config.train_seq_len,
                                               config.train_seq_len + 1))

    def step() -> list[float]:
        marks = [time.perf_counter()]
        loss = forward(tokens[:, :-1], tokens[:, 1:])
        marks.append(time.perf_counter())
        loss.backward()
        latents.accumulate(loss, 1)
        marks.append(time.perf_counter())
        optimizer.step(1.0, 0.9)
        latents.refresh()
        marks.append(time.perf_counter())
        return [1000 * (b - a) for a, b in zip(marks, marks[1:], strict=False)] + [1000 * (marks[-1] - marks[0])]

    step(), step()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(*map(statistics.median, zip(*(step() for _ in range(STEPS)), strict=True)), flush=True)


def main() -> int:
    if sys.argv[1:2] == ["--work"]:  # what this program starts itself as
        work(sys.argv[2], sys.argv[3:])
        return 0
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("checkout", type=Path, help="folder of the other checkout")
    p.add_argument("--pairs", type=int, default=5, help="turns of each side")
    p.add_argument("settings", nargs="*", help="settings of train_gpt.py, after --")
    args = p.parse_args()
    if not (args.checkout / "train_gpt.py").is_file():
        p.error(f"{args.checkout}: no train_gpt.py there; make it with: git worktree add {args.checkout} COMMIT")
    sides = {"other": args.checkout.resolve(), "this": ROOT}
    workers = {name: subprocess.Popen([sys.executable, __file__, "--work", str(folder), *args.settings],
                                      stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
               for name, folder in sides.items()}
    try:
        for name, worker in workers.items():
            if worker.stdout.readline().strip() != "ready":
                print(f"error: {sides[name]} does not run these settings, see above", file=sys.stderr)
                return 1
        turns: dict[str, list[list[float]]] = {name: [] for name in workers}
        for _ in range(args.pairs):
            for name, worker in workers.items():
                print(file=worker.stdin, flush=True)
                turns[name].append([float(x) for x in worker.stdout.readline().split()])
    finally:
        for worker in workers.values():
            worker.kill()
    print(f"{'':<8}{'forward':>9}{'backward':>10}{'update':>8}{'step':>8}   ms, medians of {args.pairs} turns")
    for name, rows in turns.items():
        f, b, u, s = map(statistics.median, zip(*rows, strict=True))
        print(f"{name:<8}{f:>9.1f}{b:>10.1f}{u:>8.1f}{s:>8.1f}")
    ratios = [a[3] / b[3] for a, b in zip(turns["other"], turns["this"], strict=True)]
    print(f"this checkout trains {statistics.median(ratios):.2f} times as fast as {args.checkout} "
          f"({min(ratios):.2f} to {max(ratios):.2f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
