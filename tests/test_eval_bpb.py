"""eval_bpb.py: bytes against decoded text, windows against brute force, and models that cheat."""

from __future__ import annotations

import json
import math
import random
import sys

import numpy as np
import pytest
import sentencepiece as spm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import eval_bpb
import pack
import train_gpt
from conftest import ROOT, VOCAB, ended, is_one_error, run, small_corpus, started
from eval_bpb import audit_model, audit_ternary, load_artifact
from tern.audits import audit_bytes
from tern.files import WriteError, folder_identity
from tern.metric import evaluate, sliding_windows
from tern.processes import end_process
from tern.shards import AuditError, DataError, open_data, read_shard
from tern.tokenizers import ByteCounter

NASTY = ["Hello world", "line\nnext\n\n para", "漢字 and 中文", "😀 emoji 👩‍👩‍👧 end", "\x00\x01 ctl \x7f\t tab",
         "a  b   c ",
         "é ñ ü — “quotes”", "x" * 300, "𝔘𝔫𝔦", "1,234.5 % €", " lead", "trail ", "ſ ﬁ ½", "\u200b\u00a0nbsp", "🇩🇪"]


# -- bytes -------------------------------------------------------------------------------------------------------


def official_kind(folder) -> spm.SentencePieceProcessor:
    """A tokenizer with the options of the competition's: text is normalized, and what is unknown becomes bytes."""
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(small_corpus(60)).split("\t")), model_prefix=str(folder / "official"),
        model_type="bpe", vocab_size=VOCAB, byte_fallback=True, split_digits=True, normalization_rule_name="nmt_nfkc",
        add_dummy_prefix=False, minloglevel=2)
    return spm.SentencePieceProcessor(model_file=str(folder / "official.model"))


def random_text(rng: random.Random, length: int = 60) -> str:
    return "".join(chr(rng.choice([rng.randrange(32, 127), rng.randrange(1, 0x800), rng.randrange(0x3000, 0xD7FF),
                                   rng.randrange(0x1F300, 0x1FAFF), 10, 32, 32])) for _ in range(length))


# The tokenizers that data/prepare.py has fetched into this checkout, if any, are held to the same.
@pytest.mark.fast
@pytest.mark.parametrize("fetched", [None, *sorted((ROOT / "data").glob("*/*.model"))],
                         ids=lambda path: path.stem if path else "official kind")
def test_counts_are_the_bytes_of_the_decoded_text(tmp_path, fetched):
    sp = official_kind(tmp_path) if fetched is None else spm.SentencePieceProcessor(model_file=str(fetched))
    counter, rng, stream, unknown = ByteCounter(sp), random.Random(0), [], []
    for text in NASTY + [random_text(rng) for _ in range(300)]:
        ids = sp.encode(text)
        if any(sp.is_unknown(i) for i in ids):
            unknown.append([sp.bos_id()] + ids)
            continue
        assert counter.count([sp.bos_id()] + ids[:-1], ids).sum() == len(sp.decode(ids).encode()), text
        stream += [sp.bos_id()] + ids
    shard = np.array(stream, dtype=np.uint16)
    report = audit_bytes({"x": shard}, counter)
    assert report["x"]["documents"] == stream.count(sp.bos_id()) == 300 + len(NASTY) - len(unknown)
    assert report["x"]["bytes"] == counter.count_stream(shard).sum() > 100
    has_bytes = any(sp.is_byte(i) for i in range(sp.vocab_size()))
    assert any(sp.is_byte(i) for i in stream) == (not unknown) == has_bytes
    for ids in unknown[:3]:  # without byte fallback such text must not be scored
        with pytest.raises(AuditError, match="byte audit failed"):
            audit_bytes({"x": np.array(ids, dtype=np.uint16)}, counter)


@pytest.mark.fast
def test_our_tokenizer_counts_original_bytes(data_dir):
    sp = spm.SentencePieceProcessor(model_file=str(data_dir / "tokenizer.model"))
    counter = ByteCounter(sp)
    for text in NASTY:
        ids = sp.encode(text)
        assert sp.decode(ids) == text
        assert counter.count([sp.bos_id()] + ids[:-1], ids).sum() == len(text.encode()), text


class FakePieces(spm.SentencePieceProcessor):
    """A hand-made vocabulary for goldens of the counting rule."""

    PIECES = ["<unk>", "<s>", "▁", "▁the", "at", "▁▁", "é", "<0xF0>", "a▁b"]

    def vocab_size(self):
        return len(self.PIECES)

    def bos_id(self):
        return 1

    def is_control(self, i):
        return i == 1

    def is_unknown(self, i):
        return i == 0

    def is_unused(self, i):
        return False

    def is_byte(self, i):
        return i == 7

    def id_to_piece(self, i):
        return self.PIECES[i]


@pytest.mark.fast
def test_counting_rule_by_hand():
    counter = ByteCounter(FakePieces())
    #        prev, id -> bytes
    cases = [(1, 3, 3), (4, 3, 4), (1, 2, 0), (4, 2, 1), (4, 4, 2), (1, 5, 1), (4, 5, 2), (4, 6, 2), (4, 7, 1),
             (7, 3, 4), (0, 3, 3), (4, 1, 0), (4, 0, 0), (4, 8, 3)]
    assert counter.count([c[0] for c in cases], [c[1] for c in cases]).tolist() == [c[2] for c in cases]
    with pytest.raises(DataError, match="not its shards"):
        counter.count([1], [9])


@pytest.mark.fast
def test_the_audit_finds_a_wrong_count_and_a_wrong_tokenizer(data_dir):
    counter = ByteCounter(data_dir / "tokenizer.model")
    shard = read_shard(next(data_dir.glob("*_val_*.bin")))
    total = audit_bytes({"v": shard}, counter)["v"]["bytes"]
    halves = audit_bytes({"a": shard[: len(shard) // 2], "b": shard[len(shard) // 2 :]}, counter)
    assert halves["a"]["bytes"] + halves["b"]["bytes"] == total
    counter.base_bytes[int(shard[5])] += 1
    with pytest.raises(AuditError, match="byte audit failed: document 0"):
        audit_bytes({"v": shard}, counter)


@pytest.mark.fast
def test_manifest_states_the_audited_bytes(data_dir):
    manifest = json.loads((data_dir / "manifest.json").read_text())
    data = open_data(data_dir)
    assert data.identity == manifest["identity"] == folder_identity(data.hashes)
    shards = {p.name: read_shard(p) for p in data.val}
    report = audit_bytes(shards, ByteCounter(data.tokenizer))
    assert sum(r["bytes"] for r in report.values()) == manifest["splits"]["val"]["bytes"]


# -- shards ------------------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_bad_shards_are_one_clear_error(data_dir, tmp_path):
    good, path = next(data_dir.glob("*_val_*.bin")).read_bytes(), tmp_path / "x_val_0.bin"
    with pytest.raises(DataError, match="x_val_0.bin: cannot read"):
        read_shard(path)
    for bad, said in ((good[:-1], "truncated"), (good + b"\0\0", "truncated or damaged"), (good[:500], "not a token"),
                      (b"\0" + good[1:], "not a token shard"), (good[:4] + b"\2" + good[5:], "not a token shard")):
        path.write_bytes(bad)
        with pytest.raises(DataError, match=f"x_val_0.bin: .*{said}"):
            read_shard(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match="x_val_0.bin"):
        read_shard(path)


@pytest.mark.fast
def test_a_changed_shard_does_not_pass_its_manifest(data_dir, tmp_path):
    for file in data_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    val = next(tmp_path.glob("*_val_*.bin"))
    data = bytearray(val.read_bytes())
    data[-2] ^= 1
    val.write_bytes(data)
    with pytest.raises(DataError, match="not the manifest's"):
        open_data(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="not a manifest"):
        open_data(tmp_path)


# -- windows -----------------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_gold_windows():
    for n, length, stride, expected in (
        (10, 4, 4, [(0, 4, 0), (4, 8, 4), (6, 10, 8)]),
        (10, 4, 2, [(0, 4, 0), (2, 6, 4), (4, 8, 6), (6, 10, 8)]),
        (9, 4, 3, [(0, 4, 0), (3, 7, 4), (5, 9, 7)]),
        (3, 4, 2, [(0, 3, 0)]),
        (4, 4, 1, [(0, 4, 0)]),
        (1, 1, 1, [(0, 1, 0)]),
        (0, 4, 2, []),
    ):
        assert list(sliding_windows(n, length, stride)) == expected


@pytest.mark.fast
@settings(deadline=None)
@given(st.integers(0, 3000), st.integers(1, 200), st.data())
def test_every_position_is_scored_exactly_once(n, length, data):
    stride = data.draw(st.integers(1, length))
    scored = []
    for start, end, score_from in sliding_windows(n, length, stride):
        assert 0 <= start <= score_from < end <= n and end - start == min(length, n)
        assert start == 0 or score_from - start >= length - stride
        scored.extend(range(score_from, end))
    assert scored == list(range(n))


@pytest.mark.fast
def test_windows_that_would_lose_tokens_are_refused():
    for length, stride in ((0, 1), (4, 0), (4, 5), (4, -1)):
        with pytest.raises(ValueError, match="stride"):
            list(sliding_windows(10, length, stride))


# -- scores ------------------------------------------------------------------------------------------------------


class Toy(torch.nn.Module):
    """hidden: a causal mix of embeddings; `leak` looks one token ahead, `blind` ignores all but the last token."""

    def __init__(self, vocab: int, leak: bool = False, blind: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.emb = torch.nn.Embedding(vocab, 16)
        self.out = torch.nn.Linear(16, vocab)
        self.leak, self.blind, self.rows = leak, blind, 0

    def hidden(self, ids):
        x = self.emb(ids)
        if self.leak:
            return x + F.pad(x[:, 1:], (0, 0, 0, 1))
        place = torch.arange(1, ids.shape[1] + 1)[:, None]
        return x if self.blind else (x * place).cumsum(1) / place**2

    def head(self, h):
        self.rows += h.shape[0]
        return self.out(h).float()


@pytest.fixture(scope="module")
def stream(data_dir):
    return read_shard(next(data_dir.glob("*_val_*.bin")))[:700]


@pytest.mark.fast
@pytest.mark.parametrize(("length", "stride"), [(32, 32), (64, 5), (1024, 16)])
@torch.inference_mode()
def test_score_is_brute_force(stream, data_dir, length, stride):
    counter, model = ByteCounter(data_dir / "tokenizer.model"), Toy(VOCAB)
    score = evaluate(model, stream, counter, length, stride, batch_seqs=3)
    total = 0.0
    ids = torch.from_numpy(stream.astype(np.int64))
    for start, end, score_from in sliding_windows(len(stream) - 1, length, stride):
        log_p = model.head(model.hidden(ids[None, start:end])[0]).double().log_softmax(-1)
        total -= sum(float(log_p[i - start, ids[i + 1]]) for i in range(score_from, end))
    bytes_ = int(counter.count_stream(stream)[1:].sum())
    assert score.tokens == len(stream) - 1 and score.bytes == bytes_
    assert score.val_loss == pytest.approx(total / score.tokens, rel=1e-6)
    assert score.val_bpb == pytest.approx(total / math.log(2) / bytes_, rel=1e-6)


@pytest.mark.fast
def test_only_scored_positions_go_through_the_head_and_batches_do_not_matter(stream, data_dir):
    counter = ByteCounter(data_dir / "tokenizer.model")
    scores = []
    for batch in (1, 7, 64):
        model = Toy(VOCAB)
        scores.append(evaluate(model, stream, counter, 64, 16, batch))
        assert model.rows == len(stream) - 1
    assert max(s.val_loss for s in scores) - min(s.val_loss for s in scores) < 1e-6


@pytest.mark.fast
def test_nothing_to_score_and_nan_are_errors(stream, data_dir):
    counter = ByteCounter(data_dir / "tokenizer.model")
    with pytest.raises(DataError, match="nothing to score"):
        evaluate(Toy(VOCAB), stream[:1], counter, 8, 8)
    broken = Toy(VOCAB)
    broken.out.bias.data[0] = math.nan
    with pytest.raises(AuditError, match="not finite"):
        evaluate(broken, stream, counter, 32, 32)


@pytest.mark.fast
def test_cheating_models_are_found(stream):
    assert audit_model(Toy(VOCAB), stream, 64)["uses_context"] is True
    assert audit_model(Toy(VOCAB, blind=True), stream, 64)["uses_context"] is False
    with pytest.raises(AuditError, match="look-ahead"):
        audit_model(Toy(VOCAB, leak=True), stream, 64)
    broken = Toy(VOCAB)
    broken.out.bias.data[3] = math.inf
    with pytest.raises(AuditError):
        audit_model(broken, stream, 64)


# -- artifacts ---------------------------------------------------------------------------------------------------


def test_the_file_proves_what_is_ternary(tiny_run):
    tensors, meta = pack.read_artifact(tiny_run[0] / "model.tern")
    proof = audit_ternary(tensors)
    assert proof["ternary_tensors"] == 12 and proof["unquantized_matrices"] == []
    name = "blocks.0.mlp.fc.weight"
    t = tensors[name]
    dense = pack.StoredTensor(t.shape, {"kind": "bf16"}, np.zeros(t.shape, dtype=np.uint16), None)
    assert audit_ternary(tensors | {name: dense})["unquantized_matrices"] == [name]
    lying = pack.StoredTensor(t.shape, t.format, np.full(t.shape, 2, dtype=np.int8), t.scales)
    with pytest.raises(AuditError, match="outside"):
        audit_ternary(tensors | {name: lying})


CHANGES = {
    "missing": lambda tensors, vector: tensors.pop("blocks.0.attn_scale"),
    "extra": lambda tensors, vector: tensors.update({"blocks.7.attn_scale": vector}),
    "shape": lambda tensors, vector: tensors.update({"blocks.0.attn_scale": pack.StoredTensor(
        (31,), vector.format, vector.codes[:31], None)}),
    "format": lambda tensors, vector: tensors.update({"blocks.0.attn_scale": pack.StoredTensor(
        vector.shape, {"kind": "fp32"}, vector.codes.astype(np.uint32), None)}),
    "width": {"model_dim": 48}, "layers": {"num_layers": 1000}, "types": {"num_layers": "2"},
    "huge": {"model_dim": 2**40}, "window": {"train_seq_len": 10**12},
}


@pytest.mark.fast
@pytest.mark.parametrize("change", CHANGES)
def test_artifacts_that_are_not_the_model_are_one_clear_error(tmp_path, change):
    config = train_gpt.Config(**train_gpt.PRESETS["tiny"], vocab_size=16)
    model = train_gpt.GPT(config)
    tensors = train_gpt.Latents(model, config).pack([name for name, _ in model.named_parameters()])
    meta = train_gpt.artifact_meta(config)
    if callable(CHANGES[change]):
        CHANGES[change](tensors, tensors["blocks.0.attn_scale"])
    else:
        meta["config"] |= CHANGES[change]
    pack.write_artifact(tmp_path / "bad.tern", tensors, meta)
    with pytest.raises(pack.ArtifactError, match="bad.tern"):
        load_artifact(tmp_path / "bad.tern")


def test_command_scores_a_file_and_says_what_is_wrong(tiny_run, data_dir, tmp_path, capsys):
    artifact, out = tiny_run[0] / "model.tern", tmp_path / "score.json"
    done = run(artifact, "--data", data_dir, "--stride", 32, "--json", out, program="eval_bpb.py", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["chunked"] == result["chunked"] | {"tokens": result["sliding"]["tokens"]}
    assert f"val_bpb:{result['sliding']['val_bpb']:.8f}" in done.stdout
    recorded = json.loads((tiny_run[0] / "score.json").read_text())
    assert result["chunked"]["val_bpb"] == recorded["chunked"]["val_bpb"]  # reproduced by a third process

    broken = tmp_path / "broken.tern"
    broken.write_bytes(artifact.read_bytes()[:-7])
    for argv in ([broken, "--data", data_dir], [artifact, "--data", tmp_path / "no"],
                 [artifact, "--data", data_dir, "--stride", 9999],
                 [artifact, "--data", data_dir, "--json", tmp_path / "no/x.json"],
                 [artifact, "--data", data_dir, "--json", tmp_path / "x", "--details", tmp_path / "x"]):
        assert is_one_error(eval_bpb.main([str(x) for x in argv]), (said := capsys.readouterr()).err)
        assert "val_bpb" not in said.out


def test_a_score_that_cannot_be_written_is_still_said(tiny_run, data_dir, tmp_path, capsys, monkeypatch):
    def full(path: str, result: dict) -> None:
        raise WriteError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr(eval_bpb, "write_json", full)
    argv = [str(x) for x in (tiny_run[0] / "model.tern", "--data", data_dir, "--stride", 0)]
    assert eval_bpb.main([*argv, "--json", str(tmp_path / "x")]) == 1
    said = capsys.readouterr()
    assert "chunked     val_loss:" in said.out and is_one_error(1, said.err)
    assert eval_bpb.main([*argv, "--details", str(tmp_path / "x")]) == 0
    said = capsys.readouterr()
    assert "chunked     val_loss:" in said.out and f"{tmp_path / 'x'} was not written: cannot write" in said.err


def test_one_of_several_processes_ends_without_the_interpreter_s_end(monkeypatch):
    program = ("import atexit, sys; from tern.processes import end_process; atexit.register(print, 'finalized'); "
               "print('done'); sys.exit(end_process(3))")
    done = ended(started(sys.executable, "-c", program, WORLD_SIZE="2"))
    assert (done.returncode, done.stdout) == (3, "done\n")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert end_process(3) == 3
