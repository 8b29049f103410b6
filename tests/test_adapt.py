"""eval_bpb.py --adapt: a score by a model that learns from each token after its score, never before."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import torch
import torch.distributed as dist

import eval_bpb
from conftest import run
from tern.adapt import Adapter
from tern.metric import evaluate
from tern.shards import open_data, read_shard
from tern.tokenizers import ByteCounter

WINDOW, STRIDE, BATCH = 64, 16, 8


@pytest.fixture(scope="module")
def stream(tiny_run, data_dir):
    """(makes the model of a run, its tokens' counter, 1,500 validation tokens)."""
    data = open_data(data_dir)
    return (lambda: eval_bpb.load_artifact(tiny_run[0] / "model.tern"), ByteCounter(data.tokenizer),
            read_shard(data.val[0])[:1500].astype(np.int64))


def score(stream, rate: float, tokens=None, kept=None):
    make, counter, own = stream
    model, tokens = make(), own if tokens is None else tokens
    learn = Adapter(model, tokens, WINDOW, rate)
    return evaluate(model, tokens, counter, WINDOW, STRIDE, BATCH, kept=kept, learn=learn), learn


def test_at_a_rate_of_zero_it_is_the_plain_score(stream):
    make, counter, tokens = stream
    plain = evaluate(make(), tokens, counter, WINDOW, STRIDE, BATCH)
    still, learn = score(stream, 0.0)
    assert (still.val_loss, still.tokens, still.bytes) == (plain.val_loss, plain.tokens, plain.bytes)
    assert learn.steps > 5
    assert all(torch.equal(a, b) for a, b in zip(learn.model.parameters(), make().parameters(), strict=True))
    moved, learn = score(stream, 0.01)
    assert moved.val_loss != plain.val_loss and (moved.tokens, moved.bytes) == (plain.tokens, plain.bytes)
    for value, param, before in zip(learn.values, learn.params, make().parameters(), strict=True):
        assert param.dtype == before.dtype and torch.equal(param, value.to(param.dtype))
    assert not all(torch.equal(a, b) for a, b in zip(learn.params, make().parameters(), strict=True))


def test_learning_pays_where_the_text_repeats(stream):
    tokens = np.tile(stream[2][:300], 8)
    make, counter, _ = stream
    plain = evaluate(make(), tokens, counter, WINDOW, STRIDE, BATCH).val_bpb
    assert score(stream, 0.01, tokens)[0].val_bpb < plain - 0.05


def test_a_text_shorter_than_a_window_teaches_nothing(stream):
    make, counter, tokens = stream
    plain = evaluate(make(), tokens[:40], counter, WINDOW, STRIDE, BATCH)
    same, learn = score(stream, 0.01, tokens[:40])
    assert learn.steps == 0 and same.val_loss == plain.val_loss


def test_what_is_zero_in_the_file_learns_too(stream):
    make, counter, tokens = stream
    model = make()
    with torch.no_grad():
        model.skip_weights.zero_()
    learn = Adapter(model, tokens, WINDOW, 0.01)
    evaluate(model, tokens, counter, WINDOW, STRIDE, BATCH, learn=learn)
    assert model.skip_weights.any()


def test_a_compiled_forward_sees_what_was_learned(stream, monkeypatch):
    """A traced one, without the minutes of a compiler: that keeps or reads parameters as any backend does."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    make, counter, tokens = stream
    plain, eager = evaluate(make(), tokens, counter, WINDOW, STRIDE, BATCH), score(stream, 0.01)[0]
    model = make()
    fast = evaluate(model, tokens, counter, WINDOW, STRIDE, BATCH, True, learn=Adapter(model, tokens, WINDOW, 0.01))
    assert abs(fast.val_loss - eager.val_loss) < 0.1 * abs(fast.val_loss - plain.val_loss)


def test_what_comes_later_changes_no_score(stream):
    tokens = stream[2]
    losses = []
    for text in (tokens, np.concatenate((tokens[:901], tokens[901:][::-1]))):
        kept = torch.zeros(len(text) - 1)
        score(stream, 0.01, text, kept)
        losses.append(kept)
    same = int((losses[0] == losses[1]).long().cumprod(0).sum())
    # Position 899 predicts token 900, the last that both have; a batch may not have been scored alone.
    assert same >= 900, "what comes later has changed an earlier score"
    assert same < len(tokens) - 1


@pytest.mark.parametrize(("stride", "batch", "every"), [(STRIDE, BATCH, 0), (STRIDE, 1, 0), (1, 9, 0), (WINDOW, 3, 0),
                                                        (STRIDE, BATCH, 300)])
def test_every_position_is_learned_from_once_after_its_score(stream, stride, batch, every):
    make, counter, tokens = stream
    model, scored, learned = make(), [], []

    class Spied(Adapter):
        def __call__(self, done: int) -> None:
            scored.append(done)
            before = self.learned
            super().__call__(done)
            learned.append((before, self.learned))
            assert self.learned <= done and done - self.learned < self.every == max(every, WINDOW)

        def step(self, ids, targets) -> None:
            at = self.learned - ids.numel()
            assert ids.flatten().tolist() == tokens[at : self.learned].tolist()
            assert targets.flatten().tolist() == tokens[at + 1 : self.learned + 1].tolist()
            assert ids.shape[1] == WINDOW and self.learned <= scored[-1]
            super().step(ids, targets)

    learn = Spied(model, tokens, WINDOW, 0.01)
    learn.every = max(every, WINDOW)
    evaluate(model, tokens, counter, WINDOW, stride, batch, learn=learn)
    assert scored == sorted(scored) and scored[-1] == len(tokens) - 1
    assert learn.steps > 3 and learned[0][0] == 0
    assert all(a[1] == b[0] for a, b in zip(learned, learned[1:], strict=False))


def test_it_takes_one_process(stream, monkeypatch):
    make, counter, tokens = stream
    for name, value in (("is_initialized", True), ("get_rank", 0), ("get_world_size", 2)):
        monkeypatch.setattr(dist, name, lambda value=value: value)
    with pytest.raises(ValueError, match="in order, by one process"):
        evaluate(make(), tokens, counter, WINDOW, STRIDE, BATCH, learn=print)


def test_command(tiny_run, data_dir, tmp_path):
    artifact, out = tiny_run[0] / "model.tern", tmp_path / "score.json"
    words = [artifact, "--data", data_dir, "--stride", 32]
    done = run(*words, "--adapt", 0.003, "--json", out, "--details", tmp_path / "details", program="eval_bpb.py")
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    plain, adapted = result["sliding"], result["adapted"]
    assert adapted["rate"] == 0.003 and adapted["steps"] > 5 and adapted["val_bpb"] != plain["val_bpb"]
    assert (adapted["tokens"], adapted["bytes"]) == (plain["tokens"], plain["bytes"])
    line = next(line for line in done.stdout.splitlines() if line.startswith("adapted "))
    assert f"{adapted['val_bpb']:.8f}  {adapted['val_bpb'] - plain['val_bpb']:+.4f} by learning" in line
    own, details = (json.loads((tiny_run[0] / f"{name}.json").read_text()) for name in ("score", "details"))
    for kind in ("chunked", "sliding"):
        assert result[kind]["val_bpb"] == own[kind]["val_bpb"], "the file's own score is what it was"
    assert json.loads((tmp_path / "details").read_text()) == details, "and so is what is behind it"


@pytest.mark.parametrize(("words", "said"), [
    (("--adapt", "-0.1"), "--adapt -0.1"), (("--adapt", "nan"), "--adapt nan"), (("--adapt", "inf"), "--adapt inf"),
    (("--adapt", "0.1", "--stride", "0"), "give a stride"),
    (("--adapt", "1e30"), "at a rate of 1e+30 is not finite after")])
def test_wrong_rates_are_one_clear_error(tiny_run, data_dir, words, said, capsys):
    argv = [str(tiny_run[0] / "model.tern"), "--data", str(data_dir), *words]
    status = eval_bpb.run(eval_bpb.parse_args(argv))
    err = capsys.readouterr().err
    assert status == 1 and said in err and "Traceback" not in err


def test_torchrun_is_refused(tiny_run, data_dir):
    done = run(tiny_run[0] / "model.tern", "--data", data_dir, "--adapt", 0.001, program="eval_bpb.py", ranks=2)
    assert done.returncode != 0 and "--adapt: takes one process" in done.stderr
