"""eval_bpb.py sample: a cache that changes nothing, rules of drawing by hand, text that never stops inside a letter."""

from __future__ import annotations

import io
import itertools
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece as spm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import error, small_model, tokens
from test_eval_bpb import NASTY, official_kind
from test_patches import restored

import eval_bpb
import pack
import train_gpt
from ablations import program
from conftest import ROOT, VOCAB, clean_env, is_one_error, small_corpus
from eval_bpb import Cached, load_artifact
from tern import command
from tern.sampling import Context, TextStream, continue_tokens, next_probabilities
from tern.shards import AuditError, open_data
from tern.tokenizers import ByteCounter

# -- the cache ---------------------------------------------------------------------------------------------------


@torch.inference_mode()
def both_ways(model: train_gpt.GPT, window: int, count: int, step: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits after every `step` of count tokens, with a cache and by whole windows."""
    stream, contexts = tokens(count).tolist(), (Context(Cached(model, window), window), Context(model, window))
    found: tuple[list, list] = ([], [])
    for at in range(0, count, step):
        for context, rows in zip(contexts, found, strict=True):
            context.add(stream[at : at + step])
            rows.append(context.logits())
    return torch.stack(found[0]), torch.stack(found[1])


@pytest.mark.fast
@pytest.mark.parametrize(("smear", "key_offset", "layers", "kv_heads", "copy_dim"),
                         [*itertools.product((False, True), (False, True), (2, 3), (1, 4), (0, 24))])
def test_logits_with_a_cache_are_those_of_whole_windows(smear, key_offset, layers, kv_heads, copy_dim):
    """At every position, through several windows. In fp64 all that is left is the logits' own rounding to fp32; a bf16
    product rounds a logit of 16 to 32 to a multiple of 1/8."""
    model = small_model(smear=smear, key_offset=key_offset, num_layers=layers, num_kv_heads=kv_heads,
                        copy_dim=copy_dim)
    for dtype, bound in ((torch.float32, 5e-5), (torch.float64, 1e-6), (torch.bfloat16, 0.25)):
        cached, whole = both_ways(model.to(dtype), window=12, count=32)
        assert (cached - whole).abs().max() <= bound, dtype
    assert error(whole[-1], whole[-2]) > 0.1  # not the same at every position


@pytest.mark.fast
@pytest.mark.parametrize("changes", [{}, {"attn_window": 5, "copy_dim": 24}], ids=str)
def test_more_tokens_at_once_than_one_and_than_a_window(changes):
    model = small_model(smear=True, key_offset=True, **changes)
    for step in (7, 33):
        cached, whole = both_ways(model, window=20, count=99, step=step)
        assert error(cached, whole) < 1e-5


@pytest.mark.fast
@torch.inference_mode()
def test_a_token_more_takes_one_position_and_a_full_window_half_of_one(monkeypatch):
    model, work = small_model(), []
    forward = train_gpt.Attention.forward
    monkeypatch.setattr(train_gpt.Attention, "forward",
                        lambda self, x, *rest: work.append(x.shape[1]) or forward(self, x, *rest))
    context = Context(Cached(model, 8), 8)
    for ids in tokens(13).split([3, *[1] * 10]):
        context.add(ids.tolist())
        context.logits()
    assert work[:: model.config.num_layers] == [3, 1, 1, 1, 1, 1, 4, 1, 1, 1, 1]


@pytest.mark.fast
@torch.inference_mode()
def test_no_order_of_sequences_changes_what_a_cached_model_says():
    model = small_model(smear=True, key_offset=True, copy_dim=24)
    cached, a, b = Cached(model, 30), tokens(30)[None], tokens(60)[None, 30:]
    for ids, last in ((a, 1), (a, 1), (a[:, :5], 2), (b, 3), (torch.cat((a[:, :9], b[:, :9]), 1), 1), (a[:, :1], 1)):
        assert error(cached.hidden_last(ids, last), model.hidden(ids)[:, -last:]) < 1e-5
    shared = dict(model.named_parameters())
    assert all(p.data_ptr() == shared[name].data_ptr() for name, p in cached.named_parameters())
    assert type(model.blocks[0].attn) is train_gpt.Attention


@pytest.mark.fast
def test_what_a_model_sees_by_hand():
    context = Context(None, 4)
    seen = [(context.add([i]), list(context.seen))[1] for i in range(8)]
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [3, 4], [3, 4, 5], [3, 4, 5, 6], [6, 7]]
    context.add(range(10, 20))
    assert context.seen == [18, 19]
    smallest = Context(None, 1)
    smallest.add([5, 6])
    assert smallest.seen == [6]


# -- which token -------------------------------------------------------------------------------------------------

LOGITS = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()


@pytest.mark.fast
@pytest.mark.parametrize(("temperature", "top_p", "expected"), [
    (1.0, 1.0, [0.15, 0.5, 0.05, 0.3]),
    (1.0, 0.4, [0, 1, 0, 0]),
    (1.0, 1e-9, [0, 1, 0, 0]),
    (1.0, 0.6, [0, 0.625, 0, 0.375]),
    (1.0, 0.9, [0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95]),
    (0.5, 1.0, [0.0225 / 0.365, 0.25 / 0.365, 0.0025 / 0.365, 0.09 / 0.365]),
    (0.5, 0.7, [0, 0.25 / 0.34, 0, 0.09 / 0.34]),  # the share is that of the probabilities at the temperature
    (0.0, 1.0, [0, 1, 0, 0]),
    (1e-300, 1.0, [0, 1, 0, 0]),
    (1e300, 1.0, [0.25] * 4),
])
def test_probabilities_by_hand(temperature, top_p, expected):
    found = next_probabilities(LOGITS, temperature, top_p)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(next_probabilities(LOGITS + 7, temperature, top_p), found, rtol=1e-5, atol=1e-7)


@pytest.mark.fast
@settings(deadline=None)
@given(st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=30), st.floats(0.1, 5), st.floats(0.01, 1))
def test_the_nucleus_is_the_smallest_of_its_share(logits, temperature, top_p):
    every = next_probabilities(torch.tensor(logits), temperature, 1.0)
    found = next_probabilities(torch.tensor(logits), temperature, top_p)
    inside = found > 0
    assert float(found.sum()) == pytest.approx(1) and torch.allclose(found[inside] * every[inside].sum(), every[inside])
    assert every[inside].sum() >= top_p - 1e-9 or inside.sum() == (every > 0).sum()
    if inside.sum() > 1:
        assert every[inside].sum() - every[inside].min() < top_p + 1e-9, "one fewer would do"
    assert not (~inside).any() or every[~inside].max() <= every[inside].min()


@pytest.mark.fast
def test_greedy_takes_the_first_of_equals_and_nothing_forbidden():
    assert next_probabilities(torch.tensor([1.0, 3.0, 3.0, -torch.inf]), 0, 0.5).tolist() == [0, 1, 0, 0]
    assert next_probabilities(torch.tensor([-torch.inf, 3.0, 3.0]), 1, 1).tolist() == [0, 0.5, 0.5]
    for broken in ([torch.nan, 1.0], [torch.inf, 1.0], [-torch.inf, -torch.inf]):
        for temperature in (0, 1):
            with pytest.raises(AuditError, match="not finite"):
                next_probabilities(torch.tensor(broken), temperature, 1.0)


def constant_model() -> SimpleNamespace:
    """The same logits wherever."""
    return SimpleNamespace(parameters=lambda: iter([LOGITS]), hidden=lambda ids: ids[..., None].float(),
                           head=lambda hidden: LOGITS.expand(*hidden.shape[:2], 4))


@pytest.mark.fast
def test_tokens_come_as_often_as_they_are_likely_and_as_the_seed_says():
    def drawn(seed: int, *forbidden: int) -> list[int]:
        context = Context(constant_model(), 8)
        context.add([0])
        mask = torch.tensor([i in forbidden for i in range(4)])
        return list(continue_tokens(context, mask, 2000, 1.0, 1.0, seed))

    shares = np.bincount(drawn(0), minlength=4) / 2000
    assert np.abs(shares - LOGITS.exp().numpy()).max() < 0.04  # four standard deviations
    assert drawn(0) == drawn(0) != drawn(1)
    assert set(drawn(0, 1, 2)) == {0, 3}


# -- text --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["own", "official kind"])
def counter(request, data_dir, tmp_path_factory) -> ByteCounter:
    if request.param == "own":
        return ByteCounter(data_dir / "tokenizer.model")
    return ByteCounter(official_kind(tmp_path_factory.mktemp("tokenizer")))


def one_mark(text: str) -> str:
    """With one mark where bytes are no letter: sentencepiece has one for each byte."""
    return re.sub("\ufffd+", "\ufffd", text)


@pytest.mark.fast
def test_text_comes_as_it_would_be_decoded_and_no_letter_in_parts(counter):
    sp = counter.tokenizer
    for text in NASTY:
        ids = sp.encode(text)
        stream, so_far = TextStream(counter), ""
        for i, token in enumerate([sp.bos_id(), *ids]):
            before = stream.before
            assert len(stream.bytes_of(token)) == counter.count([before], [token])[0]
            so_far += stream.add(token)
            whole = sp.decode(ids[:i])
            assert whole.rstrip("\ufffd").startswith(so_far), "what is out is what it will be"
            assert so_far == whole or "\ufffd" in whole
        assert so_far + stream.end() == sp.decode(ids) and "\ufffd" not in so_far


@pytest.mark.fast
def test_bytes_that_are_no_letter_become_marks_and_controls_nothing(counter):
    sp, rng = counter.tokenizer, np.random.default_rng(0)
    unknown = {i for i in range(VOCAB) if sp.is_unknown(i)}
    for _ in range(200):
        ids = [int(i) for i in rng.integers(0, VOCAB, 20) if i not in unknown and not sp.is_control(int(i))]
        stream = TextStream(counter)
        text = "".join(map(stream.add, [sp.bos_id(), *ids])) + stream.end()
        assert one_mark(text) == one_mark(sp.decode(ids))
    stream, controls = TextStream(counter), [i for i in range(VOCAB) if sp.is_control(i)]
    assert controls and "".join(map(stream.add, controls)) == ""
    half = TextStream(counter)
    first = sp.piece_to_id("<0xE6>")
    assert (half.add(first), half.end()) == ("", "\ufffd")


# -- the command -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def artifact(data_dir, tmp_path_factory):
    """A model of random weights that are large enough to say something, of this tokenizer, in a window of 64."""
    config = train_gpt.Config(**train_gpt.PRESETS["tiny"] | {"smear": True, "key_offset": True, "copy_dim": 16},
                              vocab_size=VOCAB)
    torch.manual_seed(1)
    model = train_gpt.GPT(config)
    for p in model.parameters():
        if p.ndim == 2 or not p.any():
            torch.nn.init.normal_(p, std=0.5)
    order, path = [name for name, _ in model.named_parameters()], tmp_path_factory.mktemp("artifact") / "model.tern"
    pack.write_artifact(path, train_gpt.Latents(model, config).pack(order),
                        train_gpt.artifact_meta(config, open_data(data_dir)))
    return path


def sample(capsys, artifact, tokenizer, *argv: object) -> tuple[int, str, str]:
    if tokenizer.is_dir():
        tokenizer = tokenizer / "tokenizer.model"
    status = eval_bpb.main(["sample", *map(str, (artifact, "--tokenizer", tokenizer, *argv))])
    return status, *capsys.readouterr()


@torch.inference_mode()
def greedy(model: train_gpt.GPT, sp: spm.SentencePieceProcessor, prompt: str, count: int) -> str:
    """By whole windows, each of them written down."""
    ids = seen = [sp.bos_id(), *sp.encode(prompt)]
    for _ in range(count):
        logits = model.head(model.hidden(torch.tensor([seen]))[0, -1])
        logits[[sp.is_control(i) or sp.is_unknown(i) for i in range(VOCAB)]] = -torch.inf
        ids, seen = [*ids, int(logits.argmax())], [*seen, int(logits.argmax())]
        seen = seen if len(seen) <= 64 else seen[-32:]
    return one_mark(sp.decode(ids)) + "\n"


@pytest.mark.fast
def test_command_continues_the_prompt_as_the_model_would(artifact, data_dir, capsys, monkeypatch):
    """In fp64, where no two logits are equal."""
    load = eval_bpb.load_tensors
    monkeypatch.setattr(eval_bpb, "load_tensors", lambda *args: load(*args).double())
    status, out, err = sample(capsys, artifact, data_dir, "--prompt", "No. 1", "--tokens", 90, "--temperature", 0)
    sp = spm.SentencePieceProcessor(model_file=str(data_dir / "tokenizer.model"))
    assert status == 0 and out.startswith("No. 1")
    assert one_mark(out) == greedy(load_artifact(artifact).double(), sp, "No. 1", 90)
    lines = err.splitlines()
    assert [line.split()[0] for line in lines] == ["loaded", "sampled"] and "90 tokens" in lines[1]
    assert float(re.search(r"([\d.]+) tokens/s", lines[1])[1]) > 0


@pytest.mark.fast
def test_command_repeats_with_its_seed_and_obeys_its_options(artifact, data_dir, capsys):
    def text(*argv: object) -> str:
        status, out, err = sample(capsys, artifact, data_dir, "--prompt", "a", "--tokens", 30, *argv)
        assert status == 0, err
        return out

    assert text() == text("--seed", 0) == text("--device", "cpu", "--threads", 1) != text("--seed", 1)
    assert text("--top-p", 1e-6) == text("--temperature", 0) != text()
    assert text("--seq-len", 4) != text() and text("--seq-len", 500) == text()
    assert text("--tokens", 1) != text()


@pytest.mark.fast
@pytest.mark.parametrize(("given", "begins"), [(b"ab\ncd\n", "ab\ncd"), (b"", ""), (b" ab\n\n", " ab\n"),
                                               ("é🤖".encode(), "é🤖")])
def test_the_prompt_may_come_from_the_standard_input(artifact, data_dir, capsys, monkeypatch, given, begins):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
    status, out, err = sample(capsys, artifact, data_dir, "--tokens", 5)
    assert status == 0 and out.startswith(begins), err
    assert (status, out) == sample(capsys, artifact, data_dir, "--tokens", 5, "--prompt", begins)[:2]


@pytest.mark.fast
def test_a_terminal_is_not_waited_for(artifact, data_dir, capsys, monkeypatch):
    for terminal in (SimpleNamespace(isatty=lambda: True), None):
        monkeypatch.setattr(sys, "stdin", terminal)
        assert sample(capsys, artifact, data_dir, "--tokens", 5)[0] == 0


@pytest.mark.fast
@pytest.mark.parametrize(("argv", "says"), [
    (["--tokens", 0], "--tokens 0"), (["--temperature", -1], "--temperature -1"), (["--temperature", "nan"], "nan"),
    (["--top-p", 0], "--top-p 0"), (["--top-p", 1.1], "1.1"), (["--seed", -1], "--seed -1"), (["--seq-len", -1], "-1"),
    (["--threads", -1], "--threads -1"),
    (["--prompt", "\udcff"], "not UTF-8 text (byte 0: 0xff)"),
])
def test_wrong_options_are_one_clear_error(artifact, data_dir, capsys, argv, says):
    status, out, err = sample(capsys, artifact, data_dir, *argv)
    assert is_one_error(status, err) and says in err and out == ""


@pytest.mark.fast
def test_wrong_files_are_one_clear_error(artifact, data_dir, tmp_path, capsys, monkeypatch):
    other = tmp_path / "other.model"
    other.write_bytes((official_kind(tmp_path), (tmp_path / "official.model").read_bytes())[1])
    tensors, meta = pack.read_artifact(artifact)
    pack.write_artifact(tmp_path / "old.tern", tensors, {"config": meta["config"]})
    small = tmp_path / "small.model"
    spm.SentencePieceTrainer.train(sentence_iterator=iter(["a b c d e"] * 9), model_prefix=str(tmp_path / "small"),
                                   model_type="bpe", vocab_size=270, byte_fallback=True, minloglevel=2)
    spm.SentencePieceTrainer.train(sentence_iterator=iter(small_corpus(60)), model_prefix=str(tmp_path / "no_bytes"),
                                   model_type="bpe", vocab_size=VOCAB, minloglevel=2)
    for file, tokenizer, says in (
            (artifact, other, "was trained with the tokenizer of sha256"),
            (tmp_path / "none.tern", data_dir, "none.tern"),
            (artifact, tmp_path / "none.model", "the tokenizer cannot be read"),
            (artifact, artifact, "not a SentencePiece model"),
            (tmp_path / "old.tern", small, f"the model has {VOCAB} tokens"),
            (tmp_path / "old.tern", tmp_path / "no_bytes.model", "no pieces for all of the prompt's characters")):
        status, out, err = sample(capsys, file, tokenizer, "--prompt", "xж")
        assert is_one_error(status, err.splitlines(True)[-1]) and says in err and out == "", err
    status, out, err = sample(capsys, tmp_path / "old.tern", data_dir, "--prompt", "x")  # older: names no tokenizer
    assert status == 0 and err.startswith("warning") and "was not checked" in err.splitlines()[0] and len(out) > 9
    monkeypatch.setattr("eval_bpb.load_tensors", lambda *_: pytest.fail("the model was built first"))
    assert sample(capsys, artifact, other, "--prompt", "x")[0] == 1


@pytest.mark.fast
def test_several_processes_are_refused(artifact, data_dir, capsys, monkeypatch):
    for name, value in dict(WORLD_SIZE=2, RANK=1, MASTER_ADDR="localhost", MASTER_PORT=29500).items():
        monkeypatch.setenv(name, str(value))
    status = eval_bpb.run(eval_bpb.parse_args(["sample", str(artifact), "--tokenizer", str(data_dir)]))
    assert status == 2 and "takes one process" in capsys.readouterr().err


@pytest.mark.fast
def test_what_no_reader_takes_is_not_tried_again_at_the_end(monkeypatch):
    """Python flushes the standard output when it ends, and complains if that fails."""
    end, begin = os.pipe()
    os.close(end)
    stream = open(begin, "w")
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(BrokenPipeError, match="cannot write to the standard output: Broken pipe"):
        command.write_out("x")
    assert os.fstat(begin).st_rdev == os.stat(os.devnull).st_rdev
    stream.close()


def test_text_comes_before_the_end_and_a_reader_that_goes_ends_it_quietly(artifact, data_dir):
    """So many tokens that this test would not end otherwise."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "eval_bpb.py"), "sample", str(artifact), "--tokenizer",
         str(data_dir / "tokenizer.model"), "--tokens", "1000000000"],
        env=clean_env(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdin.write(b"No. 1\n")
    process.stdin.close()
    assert process.stdout.read(12).startswith(b"No. 1")
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait() == 0 and err.startswith("loaded") and err.count("\n") == 1, err


@pytest.mark.fast
def test_a_patched_model_is_sampled_by_whole_windows(artifact, data_dir, capsys, monkeypatch):
    """Blocks that run twice would leave two kinds of keys in a cache."""
    options = ["--tokenizer", str(data_dir / "tokenizer.model"), "--prompt", "No. 1", "--tokens", "70"]
    argv = ["program.py", "--patch", "recur", "eval_bpb", "sample", str(artifact), *options, "--temperature", "0"]
    plain = sample(capsys, artifact, data_dir, *argv[8:])[1]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(program, "end_with_parent", lambda: None)
    with restored():
        load = eval_bpb.load_tensors
        monkeypatch.setattr(eval_bpb, "load_tensors", lambda *args: load(*args).double())
        assert program.main() == 0
        out, err = capsys.readouterr()
        sp = spm.SentencePieceProcessor(model_file=str(data_dir / "tokenizer.model"))
        assert one_mark(out) == greedy(load_artifact(artifact).double(), sp, "No. 1", 70)
    assert "no cache" in err and out != plain, "the patch did nothing"
