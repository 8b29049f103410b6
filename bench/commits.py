"""Training speed of this checkout against another one, turn about, each in a process of its own.

    git worktree add /tmp/before HEAD~3
    python bench/commits.py /tmp/before                                     # at the CPU track's shape
    python bench/commits.py /tmp/before --pairs 9 -- --train-seq-len 512    # more settings of train_gpt.py, for both

Random tokens, no data needed. A turn is a few whole steps (forward, backward, update, refresh); what counts is the
ratio within a pair of turns. Settings must be known to both checkouts, and either may be from before 0.1.0.
"""

from __future__ import annotations

import argparse
import hashlib
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

    import train_gpt

    try:
        from tern.machine import keep_freed_memory
    except ModuleNotFoundError:  # before 0.1.0
        from eval_bpb import keep_freed_memory

    _, config, _, _ = train_gpt.resolve_settings(["--preset", "cpu_10min_128kb", *settings], {})
    torch.set_num_threads(config.threads or len(os.sched_getaffinity(0)))
    keep_freed_memory()
    # The compiler's cache does not look into the trainer's own operators: another program must be another key.
    sources = sorted(Path(checkout).glob("*.py")) + sorted(Path(checkout).glob("tern/*.py"))
    torch.compiler.config.cache_key_tag = hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()
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
    p.epilog = "after --: settings of train_gpt.py, for both"
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, settings = p.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    if not (args.checkout / "train_gpt.py").is_file():
        p.error(f"{args.checkout}: no train_gpt.py there; make it with: git worktree add {args.checkout} COMMIT")
    sides = {"other": args.checkout.resolve(), "this": ROOT}
    workers = {name: subprocess.Popen([sys.executable, __file__, "--work", str(folder), *settings],
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
