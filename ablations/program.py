"""train_gpt.py, or eval_bpb.py, with what lies in this folder: storage formats that lost, and techniques of patches.py.

    python ablations/program.py --patch xsa=2 --patch ema=0.99 -- train --preset cpu
    python ablations/program.py train --preset cpu --matrix-format elastic
    python ablations/program.py --patch ttt=vectors -- eval_bpb runs/RUN/model.tern --data data/packages
    python ablations/program.py --patch xsa=2 -- eval_bpb sample runs/RUN/model.tern --tokenizer MODEL

The run's own scoring process gets the same, so that what a technique does to the model is in both.
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
    end_with_parent()  # before what takes seconds to import
    import eval_bpb
    import train_gpt
    from ablations import formats, patches
    from tern.command import say_error
    from tern.shards import open_data

    formats.register()
    try:
        patches.apply(args.patch)
    except ValueError as e:
        say_error(e)
        return 2

    def scoring_command() -> list[str]:
        again = [word for patch in args.patch for word in ("--patch", patch)]
        return [str(Path(__file__).resolve()), *again, "eval_bpb"]

    def by_whole_windows(model, window: int):
        """A patch may let a position need more of those before it than the keys and values that a cache has."""
        print("notice      patched models have no cache: every token takes a whole window", file=sys.stderr)
        return model

    train_gpt.scoring_command = scoring_command
    if args.patch:
        eval_bpb.for_sampling = by_whole_windows
    if args.program == "train":
        return train_gpt.main(args.rest)
    if "temperature" in map(patches.name_of, args.patch) and args.rest[:1] != ["sample"]:
        parsed = eval_bpb.parse_args(args.rest)
        patches.TRAINING_SHARDS[:] = open_data(parsed.data, parsed.tokenizer_path).train
    return eval_bpb.main(args.rest)


if __name__ == "__main__":
    if __package__ in (None, ""):
        sys.path.insert(0, str(ROOT))
    sys.exit(main())
