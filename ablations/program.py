"""train_gpt.py, or eval_bpb.py, with techniques of patches.py applied.

    python ablations/program.py --patch xsa=2 --patch ema=0.99 -- train --preset cpu
    python ablations/program.py --patch ttt=vectors -- eval_bpb runs/RUN/model.tern --data data/packages

The run's own scoring process gets the same patches, so what they do to the model is in both.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("--patch", action="append", default=[], help="a technique, NAME or NAME=ARGUMENTS; may be repeated")
    p.add_argument("program", choices=("train", "eval_bpb"))
    p.add_argument("rest", nargs=argparse.REMAINDER, help="the program's own arguments")
    args = p.parse_args()
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
