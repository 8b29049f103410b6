"""Products of bf16 with and without instructions for them, attention made of them, the loss in one pass over the
logits, and scores of the end of a window only."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tern import kernels
from tern.kernels import HEAD_TILE, Q_TILE, attend, attention_op, linear, rope_op, token_losses
from tern.machine import can_compile
from tern.metric import evaluate, sliding_windows
from train_gpt import GPT, PRESETS, Config, Latents, norm

# Three layers, so that the second half has a block without a skip; two query heads for each of two key heads.
SMALL = replace(Config(**PRESETS["tiny"]), num_layers=3, model_dim=48, num_heads=4, num_kv_heads=2, vocab_size=97,
                tied_embed_init_std=1.0)
needs_compiler = pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="torch.compile needs a C++ compiler")


def small_model(**changes: object) -> GPT:
    """An fp32 model as it is before Latents; no projection is zero, as blocks that are the identity hide a mistake."""
    torch.manual_seed(0)
    model = GPT(replace(SMALL, **changes))
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(std=0.1)
    return model


def tokens(*shape: int) -> Tensor:
    return torch.randint(SMALL.vocab_size, shape, generator=torch.Generator().manual_seed(1))


def error(x: Tensor, reference: Tensor) -> float:
    """Norm of the error relative to that of the reference, and absolute where the reference is zero."""
    scale = float(reference.double().norm())
    return float((x.double() - reference.double()).norm()) / (scale or 1.0)


@pytest.fixture(params=[False, True], ids=["products of bf16", "products in fp32"])
def fp32_products(request, monkeypatch) -> bool:
    """Both kinds of CPU, whichever this one is."""
    monkeypatch.setattr(kernels, "FP32_PRODUCTS", request.param)
    return request.param


# -- products ----------------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_a_product_of_bf16_is_summed_in_fp32_and_rounded_once(fp32_products):
    """On either kind of CPU, in the forward and in both gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 30, 256), (40, 256), (2, 30, 40)
    x, w, grad = (torch.randn(*shape, generator=generator).bfloat16() for shape in shapes)
    x.requires_grad_(), w.requires_grad_()
    y = linear(x, w)
    found = y.detach(), *torch.autograd.grad(y, (x, w), grad)
    with torch.no_grad():
        x, w, grad = x.double(), w.double(), grad.double()
        exact = x @ w.mT, grad @ w, grad.flatten(0, 1).mT @ x.flatten(0, 1)
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a == b.bfloat16()).double().mean() > 0.99, "sums in bf16 would be far from it"


@pytest.mark.fast
def test_products_of_fp32_stay_as_they_are(fp32_products):
    x, w = torch.randn(5, 64), torch.randn(7, 64)
    assert torch.equal(linear(x, w), F.linear(x, w))


@pytest.mark.fast
def test_both_kinds_of_cpu_make_one_model(monkeypatch):
    """Loss and gradients, bf16 params and activations: what differs is where a bf16 rounding falls."""
    model, made = small_model(), []
    Latents(model, SMALL)
    ids, targets = tokens(3, Q_TILE + 3)[:, :-1], tokens(3, Q_TILE + 3)[:, 1:]
    for wide in (False, True):
        monkeypatch.setattr(kernels, "FP32_PRODUCTS", wide)
        loss = model(ids, targets)
        made.append((loss.item(), torch.autograd.grad(loss, list(model.parameters()))))
    (narrow_loss, narrow), (wide_loss, wide) = made
    assert not all(map(torch.equal, narrow, wide)), "the same way twice"
    assert wide_loss == pytest.approx(narrow_loss, rel=1e-3)
    for (name, _), a, b in zip(model.named_parameters(), narrow, wide, strict=True):
        assert a.dtype == b.dtype == torch.bfloat16 and error(a, b) < 0.1, name


# -- attention ---------------------------------------------------------------------------------------------------

# kv heads, query heads for each, queries, time, head dim: whole tiles, parts of them, queries of the end only
SHAPES = [
    (1, 1, 1, 1, 8),
    (5, 3, Q_TILE - 1, Q_TILE - 1, 16),
    (2, 1, Q_TILE, Q_TILE, 64),
    (HEAD_TILE + 1, 2, Q_TILE + 1, Q_TILE + 1, 16),
    (4, 3, 1, 200, 32),
    (HEAD_TILE + 2, 3, Q_TILE + 2, 2 * Q_TILE + 1, 16),
]


def inputs(n: int, r: int, queries: int, time: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v and a gradient of the output, of the sizes that the model gives them: normed q and k, a gain of 1.5."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(*shape, dim, generator=generator)
                     for shape in ((n, r, queries), (n, time), (n, time), (n, r, queries)))
    return tuple(x.to(dtype) for x in (1.5 * norm(q), norm(k), v, grad))


def definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention as it is written down, all scores at once."""
    queries, time = q.shape[2], k.shape[1]
    future = torch.ones(queries, time, dtype=torch.bool).triu(time - queries + 1)
    scores = (q @ k[:, None].mT / q.shape[-1] ** 0.5).masked_fill(future, -torch.inf)
    return scores.softmax(-1) @ v[:, None]


def torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    queries, time = q.shape[2], k.shape[1]
    if queries == time:
        return F.scaled_dot_product_attention(q, k[:, None], v[:, None], is_causal=True, enable_gqa=True)
    mask = torch.ones(queries, time, dtype=torch.bool).tril(time - queries)
    return F.scaled_dot_product_attention(q, k[:, None], v[:, None], mask, enable_gqa=True)


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q.flatten(0, 1)[None], k[None], v[None]).view_as(q)


def forward_backward(attention, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> dict[str, Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves)
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *torch.autograd.grad(out, leaves, grad)), strict=True))


@pytest.mark.fast
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_is_its_definition_in_fp32(shape):
    given = inputs(*shape, torch.float32)
    exact = forward_backward(definition, *(x.double() for x in given))
    for name, x in forward_backward(ours, *given).items():
        assert x.shape == exact[name].shape and x.dtype == torch.float32
        assert error(x, exact[name]) < 1e-5, name


@pytest.mark.fast
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_in_bf16_is_about_as_exact_as_torchs(shape, fp32_products):
    """Against float64 of the same bf16 inputs. Scores and probabilities are rounded to bf16 on the way, as products
    of matrices must."""
    given = inputs(*shape, torch.bfloat16)
    exact = forward_backward(definition, *(x.double() for x in given))
    theirs = forward_backward(torchs, *given)
    for name, x in forward_backward(ours, *given).items():
        assert x.dtype == torch.bfloat16
        assert error(x, exact[name]) <= 3.5 * error(theirs[name], exact[name]) + 1e-7, name  # scores in bf16


@pytest.mark.fast
@pytest.mark.parametrize(("queries", "time"), [(150, 150), (20, 150)])
def test_query_heads_share_key_heads_as_in_torchs(queries, time):
    """Query heads 0 and 1 are those of key head 0, 2 and 3 of key head 1, and so on, in every row of the batch."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 6, queries, 16), torch.randn(3, 3, time, 16), torch.randn(3, 3, time, 16)
    mask = torch.ones(queries, time, dtype=torch.bool).tril(time - queries)
    expected = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    assert error(attend(q, k, v), expected) < 1e-5


@pytest.mark.fast
@pytest.mark.parametrize(("queries", "time", "window"), [
    (300, 300, 2), (300, 300, 100), (300, 300, Q_TILE), (300, 300, 299), (40, 300, 130), (1, 300, 7), (77, 500, 200)])
def test_a_window_is_the_mask_of_one_in_torchs(queries, time, window):
    """Forward and backward, in tiles that see a window's beginning, and all of those that do not."""
    q, k, v, grad = inputs(HEAD_TILE + 1, 2, queries, time, 16, torch.float32)
    at, keys = torch.arange(time)[-queries:, None], torch.arange(time)
    mask = (keys <= at) & (keys > at - window)

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k[:, None], v[:, None], mask, enable_gqa=True)

    def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q.flatten(0, 1)[None], k[None], v[None], window).view_as(q)

    expected = forward_backward(masked, q, k, v, grad)
    for name, x in forward_backward(windowed, q, k, v, grad).items():
        assert error(x, expected[name]) < 1e-5, name


@pytest.mark.fast
def test_a_window_that_holds_all_is_none():
    q, k, v, _ = inputs(3, 2, 200, 200, 16, torch.float32)
    all_of_it = ours(q, k, v)
    for window in (200, 201, 10**9):
        assert torch.equal(attend(q.flatten(0, 1)[None], k[None], v[None], window).view_as(q), all_of_it)


@pytest.mark.fast
@torch.inference_mode()
def test_a_models_window_says_how_far_back_a_token_reaches():
    """Three layers of 10 positions see 9 back each, and the keys' offset and the smear one more."""
    model, ids = small_model(attn_window=10, key_offset=True, smear=True), tokens(1, 90)
    changed = ids.clone()
    changed[:, 20] = (ids[:, 20] + 1) % SMALL.vocab_size
    differs = (model.hidden(ids) != model.hidden(changed)).any(-1)[0].nonzero()[:, 0].tolist()
    assert differs[0] == 20 and 20 + 9 < differs[-1] <= 20 + 3 * (9 + 1) + 1


@pytest.mark.fast
@pytest.mark.parametrize(("queries", "dtype"), [(300, torch.float32), (180, torch.bfloat16)])
def test_later_keys_and_values_do_not_reach_earlier_outputs(queries, dtype):
    """Nor does the gradient of an earlier output reach later keys and values: to the bit, not to a tolerance."""
    time = 300
    q, k, v, grad = inputs(HEAD_TILE + 1, 3, queries, time, 16, dtype)
    out = ours(q, k, v)
    for at in (121, Q_TILE, 2 * Q_TILE + 1, time - 1):
        other_k, other_v = k.clone(), v.clone()
        other_k[:, at:], other_v[:, at:] = v[:, at:], k[:, at:]
        other, first = ours(q, other_k, other_v), at - (time - queries)  # the first query that sees a change
        assert torch.equal(out[:, :, :first], other[:, :, :first])
        assert (out[:, :, first:] != other[:, :, first:]).any(-1).all(), "nothing was changed, so nothing was tested"
        early = grad.clone()
        early[:, :, first:] = 0
        got = forward_backward(ours, q, k, v, early)
        for name in ("dk", "dv"):
            assert not got[name][:, at:].any() and got[name][:, at - 1].any(), name
        assert not got["dq"][:, :, first:].any()


def test_the_ops_are_what_they_tell_torch(fp32_products):
    """Schema, fake shapes, autograd, and a traced forward and backward; several tiles of heads and of queries."""
    for queries, dtype in ((Q_TILE + 2, torch.float32), (7, torch.bfloat16)):
        q, k, v, _ = inputs(HEAD_TILE + 1, 2, queries, Q_TILE + 2, 8, dtype)
        for window in (0, Q_TILE - 5):
            torch.library.opcheck(attention_op, (*(x.requires_grad_() for x in (q, k, v)), True, window))
    torch.library.opcheck(rope_op, (tokens(2, 9), 4, 10000.0))


# -- model -------------------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_a_second_derivative_is_refused():
    """Its probabilities are constants to autograd: it would be wrong and nothing would say so."""
    q, k, v = (torch.randn(1, 2, 5, 4, requires_grad=True) for _ in range(3))
    first, = torch.autograd.grad(attend(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.fast
@pytest.mark.parametrize("softcap", [30.0, 1000.0])
def test_the_loss_in_one_pass_is_cross_entropy(softcap):
    model = small_model(logit_softcap=softcap)
    ids, targets = tokens(3, 41)[:, :-1], tokens(3, 41)[:, 1:]
    logits = model.head(model.hidden(ids))
    assert logits.max() > 20 and logits.min() < -20  # where the cap of 30 bends and an exponential is large
    losses = model(ids, targets), F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    mine, theirs = (torch.autograd.grad(loss, list(model.parameters())) for loss in losses)
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    for (name, _), a, b in zip(model.named_parameters(), mine, theirs, strict=True):
        assert b.any() and error(a, b) < 1e-5, name


@pytest.mark.fast
def test_the_loss_in_one_pass_holds_at_the_ends_of_the_cap():
    """Where all logits are far from the cap, or at it, a fixed shift would overflow, or underflow to a sum of zero."""
    targets = torch.tensor([[0, 7, 49], [1, 1, 30]])
    for cap, value in ((30.0, 30.0), (30.0, -30.0), (400.0, 200.0), (400.0, -90.0)):
        logits = torch.full((2, 3, 50), value) + torch.linspace(-1, 0, 50)
        expected = float(F.cross_entropy(logits.flatten(0, 1).double(), targets.flatten()))
        assert float(token_losses(logits, targets, cap).mean()) == pytest.approx(expected, abs=2e-5), (cap, value)


@pytest.mark.fast
@torch.inference_mode()
def test_the_last_hidden_states_are_the_end_of_all():
    model, ids = small_model(), tokens(3, 150)
    for offset in (False, True):
        for block in model.blocks:
            block.attn.offset = offset
        every = model.hidden(ids)
        for last in (1, 5, 150):
            torch.testing.assert_close(model.hidden_last(ids, last), every[:, -last:], rtol=1e-6, atol=1e-6)
        assert error(every[:, -1], every[:, -2]) > 0.1  # not the same at every position


@pytest.mark.rehearsal
@needs_compiler
def test_a_compiled_model_has_the_loss_and_gradients_of_the_eager_one(monkeypatch):
    """In fp32, where a mistake cannot hide; test_end_to_end.py compiles whole runs in bf16."""
    monkeypatch.setattr(kernels, "FP32_PRODUCTS", True)
    model = small_model(num_layers=2, copy_dim=16, attn_window=50)  # compiling is what takes long, a minute with three
    compiled = torch.compile(model, dynamic=False, fullgraph=True)
    ids, targets = tokens(3, Q_TILE + 3)[:, :-1], tokens(3, Q_TILE + 3)[:, 1:]
    losses = model(ids, targets), compiled(ids, targets)
    eager, fast = (torch.autograd.grad(loss, list(model.parameters())) for loss in losses)
    assert float(losses[1]) == pytest.approx(float(losses[0]), rel=1e-5)
    for (name, _), a, b in zip(model.named_parameters(), fast, eager, strict=True):
        assert a.dtype == b.dtype and error(a, b) < 1e-4, name


# -- score -------------------------------------------------------------------------------------------------------


class OneByteEach:
    """A byte counter for random tokens."""

    def count(self, prev_ids, ids) -> np.ndarray:
        return np.ones(len(ids), dtype=np.int64)


@torch.inference_mode()
def score_by_hand(model: GPT, stream: np.ndarray, seq_len: int, stride: int) -> float:
    """Mean loss in nats: all logits of all windows, one window at a time."""
    ids, total = torch.from_numpy(stream.astype(np.int64)), 0.0
    for start, end, score_from in sliding_windows(len(ids) - 1, seq_len, stride):
        logits = model.head(model.hidden(ids[None, start:end]))[0]
        losses = F.cross_entropy(logits, ids[start + 1 : end + 1], reduction="none")
        total += float(losses[score_from - start :].double().sum())
    return total / (len(ids) - 1)


@pytest.mark.fast
@pytest.mark.parametrize(("count", "seq_len", "stride", "batch_seqs"), [
    (300, 64, 16, 4),
    (300, 150, 40, 3),  # more keys than a tile of queries
    (300, 64, 64, 4),  # chunked
    (40, 64, 8, 4),  # one short window
])
def test_a_score_of_ends_is_the_score_of_whole_windows(count, seq_len, stride, batch_seqs):
    model, stream = small_model(), tokens(count + 1).numpy().astype(np.uint16)
    score = evaluate(model, stream, OneByteEach(), seq_len, stride, batch_seqs)
    expected = score_by_hand(model, stream, seq_len, stride)
    assert (score.tokens, score.bytes) == (count, count)
    assert score.val_loss == pytest.approx(expected, rel=1e-6)
    assert score.val_bpb == pytest.approx(expected / np.log(2), rel=1e-6)


@needs_compiler
def test_a_compiled_score_is_the_eager_one(monkeypatch):
    model, stream, calls = small_model(), tokens(521).numpy().astype(np.uint16), []
    compile_ = torch.compile

    def counting(function, **options):
        fast = compile_(function, **options)
        return lambda *args: calls.append(args[1].shape) or fast(*args)

    monkeypatch.setattr(torch, "compile", counting)
    eager, compiled = (evaluate(model, stream, OneByteEach(), 64, 16, 4, compiled=c) for c in (False, True))
    assert calls == [(4, 64)] * 7  # 30 windows: the first, 7 batches of 4, and one left over, not worth a compilation
    assert compiled.val_loss == pytest.approx(eager.val_loss, rel=1e-6)
    assert (compiled.tokens, compiled.bytes) == (eager.tokens, eager.bytes)


@pytest.mark.fast
def test_a_model_without_hidden_last_is_scored_alike():
    model, stream = small_model(), tokens(301).numpy().astype(np.uint16)
    stub = SimpleNamespace(hidden=model.hidden, head=model.head, parameters=model.parameters)
    score = evaluate(stub, stream, OneByteEach(), 64, 16, 4)
    assert score.val_loss == pytest.approx(score_by_hand(model, stream, 64, 16), rel=1e-6)
