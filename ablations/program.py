"""train_gpt.py, or eval_bpb.py, with techniques of patches.py applied.

    python ablations/program.py --patch xsa=2 --patch ema=0.99 -- train --preset cpu
    python ablations/program.py --patch ttt=vectors -- eval_bpb runs/RUN/model.tern --data data/packages

The run's own scoring process gets the same patches, so what they do to the model is in both.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARENT = "ABLATIONS_PARENT"  # of the environment: the process id of what started this one


def end_with_parent() -> None:
    """Kill this session, the scoring process too, when the process that started it is gone, however it went."""
    parent = int(os.environ.get(PARENT, os.getppid()))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.killpg(0, signal.SIGKILL)

    if os.getpgid(0) == os.getpid():  # a run of run.py, which gives each a session of its own
        threading.Thread(target=watch, daemon=True).start()


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("--patch", action="append", default=[], help="a technique, NAME or NAME=ARGUMENTS; may be repeated")
    p.add_argument("program", choices=("train", "eval_bpb"))
    p.add_argument("rest", nargs=argparse.REMAINDER, help="the program's own arguments")
    args = p.parse_args()
    end_with_parent()
    sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
    import patches

    import eval_bpb
    import train_gpt

    try:
        patches.apply(args.patch)
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    again = [part for patch in args.patch for part in ("--patch", patch)]
    eval_bpb.command = lambda: [str(Path(__file__).resolve()), *again, "eval_bpb"]
    if args.program == "train":
        return train_gpt.main(args.rest)
    if any(patch.partition("=")[0] == "temperature" for patch in args.patch):
        parsed = eval_bpb.parse_args(args.rest)
        patches.TRAINING_SHARDS[:] = eval_bpb.open_data(parsed.data, parsed.tokenizer_path).train
    return eval_bpb.main(args.rest)


if __name__ == "__main__":
    sys.exit(main())
