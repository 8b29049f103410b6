"""What it costs to round an embedding anew after training: all rows on a coarser grid, or rows of rare tokens alone.

    python bench/rounding.py RUN [--tokens 150000]     # the folder of a finished run with an int embedding

Bytes of the file and chunked bits per byte on the first validation tokens, of the run's own model and of what
tern/rate.py would make of it. Nothing is written.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

import pack
from tern import command, groups
from tern.metric import evaluate
from tern.rate import RateControl
from tern.shards import TokenStream, open_data, read_shard
from tern.tokenizers import ByteCounter
from train_gpt import GPT, Config, Int, Latents, artifact_meta, load_checkpoint

FACTORS = (0.9, 1.02, 1.07, 1.2)  # of the step of all rows
SHARES = (0.1, 0.2, 0.25, 0.3, 0.4, 0.5)  # of the doublings that there are


def main(argv: list[str] | None = None) -> int:
    p = command.Parser(description=__doc__.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", help="folder of a finished run, or its checkpoint")
    p.add_argument("--tokens", type=int, default=150_000, help="validation tokens to score, from the first on")
    p.add_argument("--data", help="the run's data folder, where it is another than it was")
    args = p.parse_args(argv)
    try:
        table(args)
    except ValueError as e:  # every error that is foreseen
        command.say_error(e)
        return 1
    return 0


def table(args: argparse.Namespace) -> None:
    """Print what each way of rounding anew costs. Raises ConfigError, CheckpointError and DataError."""
    tensors, state = load_checkpoint(args.run)
    c = Config(**state["config"])
    data = open_data(args.data or c.data_path, c.tokenizer_path)
    counter, stream = ByteCounter(data.tokenizer), TokenStream(data.train, c.vocab_size)
    tokens = np.concatenate([read_shard(path) for path in data.val])[: args.tokens + 1]
    model = GPT(c)
    order = [name for name, _ in model.named_parameters()]
    latents = Latents(model, c)
    latents.load({name.removeprefix("latent/"): x for name, x in tensors.items() if name.startswith("latent/")},
                 args.run)
    embedding = next(bank for bank in latents.banks if "tok_emb.weight" in bank.names)
    fmt = embedding.format
    if not isinstance(fmt, Int):
        raise ValueError(f"{args.run}: its embedding is {c.embed_format}; only that of integers has a step")
    rate = RateControl(c, c.cap_bytes, 2 ** (fmt.bits - 1) - 1, stream.counts(), embedding.grad.numel(), latents.ranks,
                       dict, len, torch.device("cpu"))
    rate.restore(state["rate"])
    embedding.format = replace(fmt, steps=rate.steps)
    first: list[float] = []

    def row(what: str) -> None:
        latents.refresh()
        size = len(pack.encode_artifact(latents.pack(order), artifact_meta(c, data)))
        bpb = evaluate(model, tokens, counter, c.score_len, c.score_len).val_bpb
        first.extend([] if first else [size, bpb])
        print(f"{what:<34}{size:>10,}{size - first[0]:>+9,}{bpb:>11.5f}{bpb - first[1]:>+10.5f}", flush=True)

    print(f"{'rounded anew':<34}{'bytes':>10}{'':>9}{'bpb':>11}")
    row("nothing")
    scales = groups.decode_scales(latents.stored(embedding).scales[0], c.scale_dtype).mean(-1)
    ladder, step = rate.ladder(scales), rate.step
    for share in SHARES:
        doubled = ladder[: int(share * len(ladder))]
        rate.set_step(step, torch.bincount(doubled, minlength=len(rate.steps)))
        row(f"{len(doubled.unique()):,} rare rows, {share:.0%} of doublings")
    for factor in FACTORS:
        rate.set_step(step * factor)
        row(f"all rows, step {factor} times as large")


if __name__ == "__main__":
    sys.exit(main())
