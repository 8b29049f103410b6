"""Seconds and memory of data/prepare.py on many generated documents.

    python bench/documents.py --documents 1000000 --bytes 200     # what a million short documents take
    python bench/documents.py --documents 100000 --program OTHER/data/prepare.py   # another checkout's

The documents are words drawn by a seeded generator, each of about so many bytes, one in fifty twice. Prints one line:
documents, bytes, seconds, peak memory of the program, and the identity of the folder that it wrote.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def write_documents(path: Path, count: int, size: int) -> int:
    """A JSONL file of `count` documents of about `size` bytes; its bytes of text."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlucmfwypvbgk", k=rng.randint(2, 9))) for _ in range(20_000)]
    total, text = 0, ""
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            if number % 50 or not text:
                text = " ".join(rng.choices(words, k=max(1, round(size / 6.5)))) + f" {number}.\n"
            file.write(json.dumps({"text": text}) + "\n")
            total += len(text)
    return total


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("--documents", type=int, default=1_000_000)
    p.add_argument("--bytes", type=int, default=200, help="of a document, about")
    p.add_argument("--program", default=str(ROOT / "data" / "prepare.py"), help="data/prepare.py of another checkout")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "documents.jsonl", Path(folder) / "out"
        total = write_documents(source, args.documents, args.bytes)
        began = time.perf_counter()
        done = subprocess.run([sys.executable, args.program, "--source", "text", "--input", str(source), "--out",
                               str(out)], stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - began
        if done.returncode:
            print(f"error: {args.program} ended with {done.returncode}", file=sys.stderr)
            return 1
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024  # kB on Linux
        identity = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["identity"]
    print(f"{args.documents:,} documents, {total:,} bytes: {seconds:.1f} s, {peak:,.0f} MiB at peak, {identity[:16]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
