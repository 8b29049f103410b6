"""What packing costs and saves, measured on artifacts.

    python bench/packing.py models FILE ...        # the ternary codes under simpler and richer models
    python bench/packing.py field RUN ...          # a run's file against the same model in PR 367's format
    python bench/packing.py formats DATA RUN ...   # trained latents in other scale and vector formats: bytes and bpb
    python bench/packing.py bits RUN               # what a symbol of each format takes, from a run's latents
    python bench/packing.py repack PROGRAMS FILE OUT   # an older file, read by the pack.py of the folder PROGRAMS
    python bench/packing.py synthetic OUT [settings of train_gpt.py]   # a random model of that shape: plan, file, field
    python bench/packing.py time FILE              # seconds and memory of decoding and encoding, by thread count

LOG.md holds what these printed, with the artifacts that they were run on.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import lzma
import os
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np

if __package__ in (None, ""):  # run as a script, only bench/ is on the module path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pack
from tern import entropy


def order0(codes: np.ndarray) -> float:
    """Bits of an array's symbols at the entropy of their frequencies, which cost nothing to know."""
    counts = np.unique(codes, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum())


# ---------------------------------------------------------------------------------------------------------------
# models: which context pays
# ---------------------------------------------------------------------------------------------------------------

NEVER = 2.0**40  # as a strength of the parent: the context says nothing


class Neighbours(entropy.Ternary):
    """The model with one more hint: the codes above, and the place in the group of 128."""

    def start(self, layers: int, rows: int, cols: int) -> None:
        super().start(layers, rows, cols)
        self.rows = np.zeros((layers, 2, cols), np.int64)  # the last two
        self.above, self.place = entropy.Counts(2, 9), entropy.Counts(2, 128)

    def end_rows(self, block: slice, rows: np.ndarray) -> None:
        super().end_rows(block, rows)
        self.rows = np.concatenate([self.rows, rows], 1)[:, -2:]

    def decide(self, node, columns, level, truth, active=None, more=()):
        general = self.everywhere.share(node, 0, 0).item()
        above = (self.rows[:, 0, columns] + 1) * 3 + self.rows[:, 1, columns] + 1
        contexts = [(self.above, (node, above)), (self.place, (node, np.arange(columns.start, columns.stop) % 128))]
        hints = [entropy.logit(c.share(at, general, 16)) - entropy.STRETCH[general] for c, at in contexts]
        hints = [h[:, None] if h.ndim == 2 else h[None, None] for h in hints]
        bits = super().decide(node, columns, level, truth, active, [*more, *hints])
        taken = np.ones(bits.shape, bool) if active is None else active
        np.add.at(self.above.ones, contexts[0][1], bits.sum(1))
        np.add.at(self.above.total, contexts[0][1], taken.sum(1))
        np.add.at(self.place.ones, contexts[1][1], bits.sum((0, 1)))
        np.add.at(self.place.total, contexts[1][1], taken.sum((0, 1)))
        return bits


VARIANTS = {  # name -> (constants of tern/entropy.py, transposed?, class)
    "order 0, adaptive, all tensors": (dict(LAYER=NEVER, COLUMN=NEVER, ROW=NEVER, MAX_CORRELATED=0), False, None),
    "per tensor": (dict(COLUMN=NEVER, ROW=NEVER, MAX_CORRELATED=0), False, None),
    "per tensor and column": (dict(ROW=NEVER, MAX_CORRELATED=0), False, None),
    "per tensor and row so far": (dict(COLUMN=NEVER, MAX_CORRELATED=0), False, None),
    "column and row, weights fixed at 1": (dict(MAX_CORRELATED=0, FIXED=True), False, None),
    "column and row, mixed": (dict(MAX_CORRELATED=0), False, None),
    "column and row, mixed, transposed": (dict(MAX_CORRELATED=0), True, None),
    "and neighbours, place in group": (dict(MAX_CORRELATED=0), False, Neighbours),
    "and correlation of columns (kept)": (dict(), False, None),
}


def coded(arrays: list[np.ndarray], constants: dict, transposed: bool, model: type | None) -> tuple[int, float, float]:
    """(bytes, encode seconds, decode seconds) of ternary arrays under a variant of the model."""
    constants, held = dict(constants), {name: getattr(entropy, name) for name in constants if name != "FIXED"}
    start, trust, kept = entropy.Weights.START, entropy.Weights.TRUST, entropy.Ternary
    if constants.pop("FIXED", False):
        entropy.Weights.START, entropy.Weights.TRUST = entropy.WEIGHT, 1 << 60
    arrays = [np.ascontiguousarray(a.T) for a in arrays] if transposed else arrays
    try:
        for name, value in constants.items():
            setattr(entropy, name, value)
        entropy.Ternary = model or kept
        began = time.perf_counter()
        data = entropy.encode(arrays, "ternary")
        middle = time.perf_counter()
        back = entropy.decode(data, [a.shape for a in arrays], "ternary")
        end = time.perf_counter()
    finally:
        for name, value in held.items():
            setattr(entropy, name, value)
        entropy.Weights.START, entropy.Weights.TRUST, entropy.Ternary = start, trust, kept
    assert all(np.array_equal(a, b) for a, b in zip(arrays, back, strict=True))
    return len(data), middle - began, end - middle


def deflated_bytes(*names: str) -> int:
    """Deflated bytes of tern/entropy.py's functions and classes of these names, without comments; no names: of all."""
    tree = ast.parse(Path(entropy.__file__).read_bytes())
    parts = [n for n in ast.walk(tree) if getattr(n, "name", None) in names] if names else [tree]
    return len(zlib.compress("\n".join(map(ast.unparse, parts)).encode(), 9))


def models(paths: list[str]) -> None:
    print(f"tern/entropy.py deflates to {deflated_bytes():,} bytes, expected_sign within it to "
          f"{deflated_bytes('expected_sign'):,}")
    for path in paths:
        tensors, _ = pack.read_artifact(path)
        arrays = [t.codes for t in tensors.values() if t.format["kind"] == "ternary"]
        n, base = sum(a.size for a in arrays), sum(map(order0, arrays))
        plain = pack.pack_base3(np.concatenate([a.reshape(-1) for a in arrays]))
        print(f"\n{path}: {n:,} ternary weights in {len(arrays)} tensors, "
              f"zeros {sum(int((a == 0).sum()) for a in arrays) / n:.4f}")
        print(f"{'':<38}{'bytes':>10}{'bits/weight':>13}{'to order 0':>12}{'enc s':>8}{'dec s':>8}")

        def line(name: str, size: float, seconds: tuple[float, ...] = (), n=n, base=base) -> None:
            times = "".join(f"{s:>8.2f}" for s in seconds)
            print(f"{name:<38}{size:>10,.0f}{8 * size / n:>13.5f}{100 * (8 * size / base - 1):>+11.3f}%{times}",
                  flush=True)

        line("sum of per-tensor order-0 entropies", base / 8)
        line("2 bits", n / 4)
        line("base3", len(plain))
        line("base3, zstd 22", len(pack.zstd_encode(plain)))
        line("base3, lzma 9", len(pack.lzma_encode(plain)))
        for name, variant in VARIANTS.items():
            size, *seconds = coded(arrays, *variant)
            line(name, size, tuple(seconds))


# ---------------------------------------------------------------------------------------------------------------
# field: PR 367's file of the same tensors
# ---------------------------------------------------------------------------------------------------------------


def field_entry(t: pack.StoredTensor, latent, kinder: bool) -> dict:
    """A tensor as train_bitnet.py of PR 367 stores it: base 3 with fp16 scales mean|w| per 64, everything else fp16.

    The codes are ours, which differ from those of groups of 64 only where the groups' means do. kinder: more than it
    does: int codes stay codes, packed, with fp16 scales, and fp8 stays a byte.
    """
    import torch
    import torch.nn.functional as F

    from tern.groups import decode_scales, from_patterns
    from train_gpt import param_of_file

    if t.format["kind"] == "ternary":
        pad = (0, -t.shape[-1] % 64)
        codes, groups = F.pad(torch.from_numpy(t.codes), pad).numpy(), F.pad(latent.float(), pad).reshape(-1, 64)
        return {"type": "ternary", "packed": pack.pack_base3(codes), "scale": groups.abs().mean(-1).half(),
                "shape": list(t.shape), "padded_cols": codes.shape[1], "group_size": 64, "n_trits": codes.size}
    if kinder and t.format["kind"] == "fp8":
        return {"type": "fp8", "data": torch.from_numpy(t.codes.copy())}
    if kinder and t.format["kind"] == "int":
        return {"type": "int", "packed": pack.pack_bits(t.codes, f"int{t.format['bits']}"), "shape": list(t.shape),
                "scale": decode_scales(from_patterns(t.scales, t.format["scale"]), t.format["scale"]).half()}
    return {"type": "fp16", "data": param_of_file(t).half()}


def field_bytes(tensors: dict[str, pack.StoredTensor], latents: dict, kinder: bool, bare: bool = False) -> int:
    """Bytes of torch.save and lzma 9; bare: with scales that cost nothing."""
    import torch

    entries = {name: field_entry(t, latents[name], kinder) for name, t in tensors.items()}
    if bare:
        for entry in entries.values():
            entry["scale"] = torch.zeros_like(entry["scale"])
    buffer = io.BytesIO()
    torch.save(entries, buffer)
    return len(lzma.compress(buffer.getvalue(), preset=9))


def field_report(name: str, data: bytes, latents: dict) -> None:
    header, (tensors, _) = pack.parse_header(data), pack.decode_artifact(data)
    theirs, kinder = (field_bytes(tensors, latents, kind) for kind in (False, True))
    less, least = (f"{100 * (1 - len(data) / size):.1f}%" for size in (theirs, kinder))
    print(f"\n{name}: {len(data):,} bytes; in PR 367's format {theirs:,}: ours is {less} smaller; than that format "
          f"with int codes and fp8 {kinder:,}: {least}")
    print(f"{'part':<34}{'theirs':>12}{'kinder':>12}{'ours':>12}{'saved':>12}")
    groups: dict[str, dict] = {}
    for n, t in tensors.items():
        groups.setdefault(pack.format_label(t.format), {})[n] = t
    spent = [0, 0]

    def line(part: str, their: int, kind: int, ours: int) -> None:
        spent[0], spent[1] = spent[0] + their, spent[1] + kind
        print(f"{part:<34}{their:>12,}{kind:>12,}{ours:>12,}{their - ours:>12,}")

    for label, some in groups.items():
        ours = {s.role: s.bytes for s in header.streams if pack.format_label(header.formats[s.format]) == label}
        their, kind = (field_bytes(some, latents, k) for k in (False, True))
        if "ternary" in label:  # codes and scales apart
            codes = field_bytes(some, latents, True, bare=True)
            line(label + " codes", codes, codes, ours["codes"])
            line(label + " scales", their - codes, kind - codes, ours["scales"])
        else:
            line(label, their, kind, sum(ours.values()))
    line("header; parts' overlap", theirs - spent[0], kinder - spent[1], header.header_bytes)


def field(runs: list[str]) -> None:
    from train_gpt import load_checkpoint

    for run in runs:
        state, _ = load_checkpoint(run)
        latents = {name.removeprefix("latent/"): x for name, x in state.items() if name.startswith("latent/")}
        field_report(run, (Path(run) / "model.tern").read_bytes(), latents)


# ---------------------------------------------------------------------------------------------------------------
# formats: what rounding costs a model that was trained without it
# ---------------------------------------------------------------------------------------------------------------

FORMATS = [{}, *({"scale_dtype": f"log{bits}"} for bits in (8, 7, 6, 5, 4)), {"vector_format": "fp8"},
           {"scale_dtype": "log6", "vector_format": "fp8"}]


def formats(data: str, runs: list[str]) -> None:
    """Chunked bpb and bytes of each run's latents, stored in each format; a run that trains on it can only adapt."""
    from dataclasses import replace

    from tern.metric import evaluate
    from tern.shards import open_data, read_shard
    from tern.tokenizers import ByteCounter
    from train_gpt import Config, artifact_meta, format_of, load_checkpoint, model_from_stored, param_shapes, to_pack

    folder = open_data(data, "", need_train=False)
    counter, tokens = ByteCounter(folder.tokenizer), np.concatenate([read_shard(p) for p in folder.val])
    rows: dict[str, list[tuple[float, int]]] = {}
    for run in runs:
        state, about = load_checkpoint(run)
        for change in FORMATS:
            config = replace(Config(**about["config"]), **change)
            tensors = {}
            for name, shape in param_shapes(config).items():
                fmt = format_of(config, name, len(shape))
                tensors[name] = to_pack(fmt.quantize(state[f"latent/{name}"]), fmt)
            model = model_from_stored(tensors, artifact_meta(config))
            score = evaluate(model, tokens, counter, config.score_len, config.score_len, 32)
            size = len(pack.encode_artifact(tensors, artifact_meta(config)))
            key = ", ".join(f"{k} {v}" for k, v in change.items()) or "as trained"
            rows.setdefault(key, []).append((score.val_bpb, size))
            print(f"{run}: {key:<36}{score.val_bpb:.6f} bpb {size:>9,} bytes", flush=True)
    base = rows["as trained"]
    print(f"\n{'':<38}{'bpb, less as trained: mean (sd)':>34}{'bytes, less as trained':>24}")
    for key, row in rows.items():
        bpb = np.array([a[0] - b[0] for a, b in zip(row, base, strict=True)])
        spread = f" ({bpb.std(ddof=1):.6f})" if len(bpb) > 1 else ""
        less = np.mean([a[1] - b[1] for a, b in zip(row, base, strict=True)])
        print(f"{key:<38}{f'{bpb.mean():+.6f}{spread}':>34}{less:>+24,.0f}")


# ---------------------------------------------------------------------------------------------------------------
# bits, repack
# ---------------------------------------------------------------------------------------------------------------


def bits(run: str) -> None:
    """Bits per symbol of every format, made of a run's latents after training: what pack.BITS is taken from."""
    from tern.groups import SCALE_DTYPES
    from train_gpt import Float, Int, Ternary, load_checkpoint, to_pack

    state, _ = load_checkpoint(run)
    latents = {name.removeprefix("latent/"): x for name, x in state.items() if name.startswith("latent/")}
    embedding = [x for name, x in latents.items() if name == "tok_emb.weight"]
    matrices = [x for name, x in latents.items() if name.endswith(".weight") and name != "tok_emb.weight"]
    vectors = [x for name, x in latents.items() if not name.endswith(".weight")]
    cases = [("matrices", matrices, Ternary(scale=scale)) for scale in SCALE_DTYPES]
    cases += [("embedding", embedding, Int(b)) for b in range(2, 9)]
    cases += [(part, some, Float(kind)) for part, some in (("embedding", embedding), ("vectors", vectors))
              for kind in ("fp8", "bf16", "fp16")]
    for part, some, fmt in cases:
        tensors = {str(i): to_pack(fmt.quantize(x), fmt) for i, x in enumerate(some)}
        found = pack.describe(pack.encode_artifact(tensors, {}))["streams"]
        each = ", ".join(f"{s['role']} {8 * s['bytes'] / s['count']:.3f} ({s['codec']})" for s in found)
        print(f"{part:<10}{pack.format_label(fmt.spec()):<20}{each}", flush=True)


READ = """import json, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
import pack
tensors, meta = pack.read_artifact(sys.argv[2])
arrays = {f"{role}/{name}": getattr(t, role) for name, t in tensors.items() for role in ("codes", "scales")}
about = {"meta": meta, "formats": {name: t.format for name, t in tensors.items()}}
np.savez(sys.argv[3], about=json.dumps(about), **{key: x for key, x in arrays.items() if x is not None})
"""


def repack(programs: str, path: str, out: str) -> None:
    """A file of an older format in today's; the same codes and scales. The older programs read it in a process of
    their own, where their modules are not taken for today's."""
    with tempfile.TemporaryDirectory() as folder:
        held = Path(folder) / "tensors.npz"
        done = subprocess.run([sys.executable, "-c", READ, programs, path, str(held)])
        if done.returncode:
            sys.exit(f"error: {programs}/pack.py does not read {path}, see above")
        with np.load(held) as arrays:
            about, tensors = json.loads(str(arrays["about"])), {}
            for name, format in about["formats"].items():
                codes = arrays[f"codes/{name}"]
                scales = arrays.get(f"scales/{name}")
                tensors[name] = pack.StoredTensor(codes.shape, format, codes, scales)
    meta = about["meta"]
    print(f"{out}: {pack.write_artifact(out, tensors, meta):,} bytes, {Path(path).stat().st_size:,} before")


# ---------------------------------------------------------------------------------------------------------------
# synthetic, time
# ---------------------------------------------------------------------------------------------------------------


def synthetic(out: str, argv: list[str]) -> None:
    """Normal latents in every tensor, also in those that training starts at zero or one."""
    import torch

    from train_gpt import artifact_meta, format_of, param_shapes, predicted_bytes, resolve_settings, to_pack

    _, config, _, _ = resolve_settings(argv, {})
    torch.manual_seed(config.seed)
    shapes = param_shapes(config)
    latents = {n: torch.randn(s) * 0.1 if len(s) == 2 else 1 + torch.randn(s) * 0.3 for n, s in shapes.items()}
    tensors = {}
    for name, latent in latents.items():
        fmt = format_of(config, name, latent.ndim)
        tensors[name] = to_pack(fmt.quantize(latent), fmt)
    size = pack.write_artifact(out, tensors, artifact_meta(config))
    planned = round(sum(size for *_, size in predicted_bytes(config).values()))
    print(f"{out}: {size:,} bytes, planned {planned:,} ({100 * (planned / size - 1):+.2f}%), "
          f"{sum(t.codes.size for t in tensors.values()):,} parameters")
    field_report(out, Path(out).read_bytes(), latents)


def time_once(path: str) -> dict:
    data = Path(path).read_bytes()
    header, streams = pack.parse_header(data), {}
    for s in header.streams:  # one by one, for the table; then all, as a reader does
        began = time.perf_counter()
        pack.CODECS[s.codec].decode(memoryview(data)[s.offset : s.offset + s.bytes], s.kind, s.shapes)
        streams[f"{s.role} {s.kind} {s.count:,}"] = round(time.perf_counter() - began, 1)
    began = time.perf_counter()
    tensors, meta = pack.decode_artifact(data)
    decoded = time.perf_counter()
    same = pack.encode_artifact(tensors, meta) == data
    encoded = time.perf_counter()
    digest = hashlib.sha256()
    for t in tensors.values():
        for array in (t.codes, t.scales):
            digest.update(b"" if array is None else array.tobytes())
    return {"streams": streams, "decode_s": decoded - began, "encode_s": encoded - decoded, "same_bytes": same,
            "tensors_sha256": digest.hexdigest()[:16],
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def time_threads(path: str) -> None:
    for threads in ("1", "2"):
        env = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
        done = subprocess.run([sys.executable, __file__, "time-once", path], env=env, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        r = json.loads(done.stdout)
        print(f"{threads} thread(s): decode {r['decode_s']:.1f} s, encode {r['encode_s']:.1f} s, peak "
              f"{r['peak_mb']:,.0f} MB, encoded again to {'the same' if r['same_bytes'] else 'OTHER'} bytes, tensors "
              f"{r['tensors_sha256']}; decode by stream {r['streams']}", flush=True)


def main() -> int:
    commands = {"models": models, "field": field, "formats": lambda rest: formats(rest[0], rest[1:]),
                "bits": lambda rest: bits(rest[0]), "repack": lambda rest: repack(*rest),
                "synthetic": lambda rest: synthetic(rest[0], rest[1:]), "time": lambda rest: time_threads(rest[0]),
                "time-once": lambda rest: print(json.dumps(time_once(rest[0])))}
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return 0
    if len(sys.argv) < 3 or sys.argv[1] not in commands:
        print(__doc__, file=sys.stderr)
        return 2
    commands[sys.argv[1]](sys.argv[2:])
    return 0


if __name__ == "__main__":
    sys.exit(main())
