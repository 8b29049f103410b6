"""tern/spread.py: where the bits of a score go; the parts add up to the score, and the score is none the worse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_eval_bpb import NASTY, Toy, official_kind

import eval_bpb
from conftest import VOCAB
from tern import spread
from tern.metric import evaluate, sliding_windows
from tern.shards import read_shard
from tern.tokenizers import ByteCounter


@pytest.fixture(scope="module")
def stream(data_dir):
    return read_shard(next(data_dir.glob("*_val_*.bin")))[:3000]


def kept_by(model, stream, counter, seq_len: int, stride: int):
    """(score, losses of every token)."""
    kept = torch.zeros(len(stream) - 1)
    return evaluate(model, stream, counter, seq_len, stride, 3, kept=kept), kept.double().numpy()


@pytest.mark.fast
@pytest.mark.parametrize(("seq_len", "stride"), [(64, 64), (64, 5), (4096, 16)])
def test_keeping_losses_keeps_the_score_to_the_bit(stream, data_dir, seq_len, stride):
    counter = ByteCounter(data_dir / "tokenizer.model")
    score, losses = kept_by(Toy(VOCAB), stream, counter, seq_len, stride)
    plain = evaluate(Toy(VOCAB), stream, counter, seq_len, stride, 3)
    assert (score.val_loss, score.val_bpb) == (plain.val_loss, plain.val_bpb)
    assert math.fsum(losses) == pytest.approx(score.val_loss * score.tokens, rel=1e-12) and (losses > 0).all()
    ids = torch.from_numpy(stream.astype(np.int64))
    model, (start, end, _) = Toy(VOCAB), list(sliding_windows(len(losses), seq_len, stride))[-1]
    with torch.inference_mode():
        log_p = model.head(model.hidden(ids[None, start:end])[0]).log_softmax(-1)
    assert losses[end - 1] == pytest.approx(-float(log_p[-1, ids[end]]), rel=1e-5), "each in its own place"


@pytest.mark.fast
def test_documents_and_positions_add_up_to_the_score(stream, data_dir):
    counter = ByteCounter(data_dir / "tokenizer.model")
    (chunked, by_chunk), (sliding, by_window) = (kept_by(Toy(VOCAB), stream, counter, 64, n) for n in (64, 8))
    found = spread.spread(stream, counter, {"chunked": by_chunk, "sliding": by_window}, 64,
                          sliding_windows(len(stream) - 1, 64, 64))
    documents = int((stream == counter.bos_id).sum())
    assert found.documents_by == "sliding" and sum(b.count for b in found.lengths) == documents > 3
    for bins, score in ((found.lengths, sliding), (found.positions, chunked)):
        assert sum(b.tokens for b in bins) == score.tokens and sum(b.bytes for b in bins) == score.bytes
        assert sum(b.nats for b in bins) == pytest.approx(score.val_loss * score.tokens, rel=1e-9)
        assert all(a.low <= a.high < b.low for a, b in zip(bins, bins[1:], strict=False))
    assert found.positions[0].low == 1 and found.positions[-1].high == 64
    worst, best = found.worst[0], found.best[0]
    assert worst.nats / worst.bytes == max(d.nats / d.bytes for d in (*found.worst, *found.best))
    assert best.nats / best.bytes == min(d.nats / d.bytes for d in (*found.worst, *found.best))
    assert not {d.number for d in found.best} & {d.number for d in found.worst}


@pytest.mark.fast
def test_the_text_of_tokens_is_the_text_of_the_document(tmp_path):
    """Also of byte tokens, which come together, so that no character is cut."""
    sp = official_kind(tmp_path)
    counter = ByteCounter(sp)
    for text in NASTY:
        ids = np.array([sp.bos_id(), *sp.encode(text)])
        size = counter.count(ids[:-1], ids[1:])
        nats = np.arange(len(size), dtype=np.float64)
        pieces = spread.texts(ids[1:], size, nats, counter)
        assert "".join(piece for piece, *_ in pieces) == sp.decode(ids[1:].tolist())
        assert sum(n for _, n, _ in pieces) == size.sum() and sum(x for *_, x in pieces) == pytest.approx(nats.sum())
        assert all(len(piece.encode()) == n for piece, n, _ in pieces)


@pytest.mark.fast
def test_a_matrix_as_a_picture():
    codes = np.array([[-1, 0, 1], [0, 0, 0]], dtype=np.int8)
    shown = spread.picture({"small": codes[:1], "large": codes})
    assert (shown.tensor, shown.shape, shown.corner) == ("large", [2, 3], ["-0+", "000"])
    assert shown.zeros_of_rows == [0.3333, 1.0] and shown.zeros_of_columns == [0.5, 1.0, 0.5]
    assert spread.picture({}) is None
    assert spread.entropy(codes[0]) == pytest.approx(math.log2(3)) and spread.entropy(codes[1]) == 0


@pytest.mark.fast
def test_losses_that_are_not_the_scores_are_refused(stream, data_dir):
    counter = ByteCounter(data_dir / "tokenizer.model")
    result = {"chunked": {"val_loss": 2.0, "tokens": len(stream) - 1}, "sliding": None, "seq_len": 64}
    kept = [torch.full((len(stream) - 1,), 2.5), torch.zeros(len(stream) - 1)]
    with pytest.raises(eval_bpb.AuditError, match="add up to"):
        eval_bpb.details_of(b"", {}, result, stream, counter, kept)


@pytest.mark.fast
def test_details_replace_no_other_file(tmp_path, capsys):
    mine = tmp_path / "notes.json"
    mine.write_text('{"artifact": 1, "chunked": 2}')
    assert eval_bpb.main(["x.tern", "--data", str(tmp_path), "--details", str(mine)]) == 1
    assert f"--details {mine}" in capsys.readouterr().err and mine.read_text() == '{"artifact": 1, "chunked": 2}'


def test_a_score_stays_whole_where_its_details_fail(tiny_run, data_dir, tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise eval_bpb.AuditError("the parts are not the whole")

    monkeypatch.setattr(eval_bpb, "details_of", fail)
    out, details = tmp_path / "score.json", tmp_path / "details.json"
    words = [tiny_run[0] / "model.tern", "--data", data_dir, "--stride", 0, "--json", out, "--details", details]
    assert eval_bpb.run(eval_bpb.parse_args(list(map(str, words)))) == 0
    assert out.exists() and not details.exists()
    assert "details.json was not written: the parts are not the whole" in capsys.readouterr().err
