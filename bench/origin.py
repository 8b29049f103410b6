"""How well does a shard's text tell its tokenizer? Every validation split against every tokenizer of some data folders.

    python bench/origin.py DATA DATA [DATA ...]

Prints the share of a split's tokens that come again when the text that a tokenizer makes of them is encoded, which is
what tern.audits.audit_origin refuses below REPRODUCED; "-" where the split holds ids that the tokenizer does not have.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

if __package__ in (None, ""):  # run as a script, only bench/ is on the module path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tern.audits import reproduced
from tern.shards import open_data, read_shard
from tern.tokenizers import ByteCounter


def share(tokens: np.ndarray, counter: ByteCounter) -> str:
    if int(tokens.max()) >= counter.vocab_size:
        return "-"
    return f"{reproduced(tokens, counter)[0]:.2%}"


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("data", nargs="+", help="folders with *_val_*.bin shards and their tokenizer")
    folders = [open_data(path, need_train=False) for path in p.parse_args().data]
    counters = [ByteCounter(folder.tokenizer) for folder in folders]
    names = [folder.path.name for folder in folders]
    print("| validation text of | " + " | ".join(f"tokenizer of {name}" for name in names) + " |")
    print("|---|" + "---|" * len(names))
    for name, folder in zip(names, folders, strict=True):
        tokens = np.concatenate([read_shard(path) for path in folder.val])
        print(f"| {name} | " + " | ".join(share(tokens, counter) for counter in counters) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
