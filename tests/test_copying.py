"""A model that copies: its probabilities by hand, what it learns, and that it sees no future."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_attention import SMALL, small_model, tokens

import train_gpt
from tern import copying
from train_gpt import GPT, Config, artifact_meta

pytestmark = pytest.mark.fast


def copier(**changes: object) -> GPT:
    """A small model that gives copies about half of the probability."""
    model = small_model(copy_dim=24, **changes)
    with torch.no_grad():
        model.copying.scale_and_bias.copy_(torch.tensor([4.0, 1.0]))
    return model


@torch.inference_mode()
def by_hand(model: GPT, ids: list[int]) -> np.ndarray:
    """log p [time, vocab_size], by the formula, one position and one earlier token at a time."""
    states = model.states(torch.tensor([ids]), len(ids))[0]
    own = model.logits(states).double().softmax(-1).numpy()
    q, k = (np.asarray(states.double() @ w.weight.double().T) for w in (model.copying.c_q, model.copying.c_k))
    scale, bias = model.copying.scale_and_bias.tolist()
    found = []
    for t in range(len(ids)):
        p = own[t].copy()
        for j in range(t):  # after position j comes token j + 1, which is known at t
            cosine = q[t] @ k[j] / np.linalg.norm(q[t]) / np.linalg.norm(k[j])
            p[ids[j + 1]] += math.exp(scale * math.log(t + 1) * (cosine - 1) + bias)
        found.append(np.log(p / p.sum()))
    return np.stack(found)


@torch.inference_mode()
def test_probabilities_are_those_of_the_formula():
    model, ids = copier(), [3, 9, 9, 4, 3, 9, 70, 3, 9, 4, 4, 3]
    right = by_hand(model, ids)
    hidden = model.hidden(torch.tensor([ids]))
    assert hidden.shape == (1, 12, SMALL.model_dim + SMALL.vocab_size)
    np.testing.assert_allclose(model.head(hidden)[0].double().log_softmax(-1).numpy(), right, atol=2e-5)
    plain = model.logits(model.states(torch.tensor([ids]), 12))[0].log_softmax(-1)
    assert np.abs(plain.numpy() - right).max(-1)[0] < 1e-5 < 0.1 < np.abs(plain.numpy() - right).max(-1)[1:].min()


@pytest.mark.parametrize("softcap", [30.0, 100.0])
def test_the_loss_in_training_is_the_one_that_is_scored(softcap):
    model, ids = copier(logit_softcap=softcap), tokens(3, 41)
    x, y = ids[:, :-1], ids[:, 1:]
    losses = model(x, y), F.cross_entropy(model.head(model.hidden(x)).flatten(0, 1), y.flatten())
    assert float(losses[0].detach()) == pytest.approx(float(losses[1].detach()), rel=1e-6)
    first, second = (torch.autograd.grad(loss, list(model.parameters())) for loss in losses)
    for (name, _), a, b in zip(model.named_parameters(), first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=lambda said, name=name: f"{name}: {said}")
        assert b.any(), name


@torch.inference_mode()
def test_in_tiles_of_queries_it_is_the_same(monkeypatch):
    """Losses and logits, all positions and the last ones, with whole tiles and a part of one."""
    model, ids = copier(), tokens(2, 41)
    x, y = ids[:, :-1], ids[:, 1:]
    whole = model(x, y), model.head(model.hidden(x)), model.head(model.hidden_last(x, 13))
    monkeypatch.setattr(copying, "TILE", 6)
    parts = model(x, y), model.head(model.hidden(x)), model.head(model.hidden_last(x, 13))
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@torch.inference_mode()
def test_what_comes_later_changes_no_bit():
    model, ids = copier(), tokens(2, 30)
    logits = model.head(model.hidden(ids))
    for t in range(1, 30, 4):
        changed = ids.clone()
        changed[:, t:] = (ids[:, t:] + 13) % SMALL.vocab_size
        after = model.head(model.hidden(changed))
        assert torch.equal(after[:, :t], logits[:, :t]) and not torch.equal(after[:, t], logits[:, t])


@torch.inference_mode()
def test_the_last_positions_are_those_of_all():
    model, ids = copier(), tokens(2, 40)
    for last in (1, 7, 40):
        torch.testing.assert_close(model.head(model.hidden_last(ids, last)), model.head(model.hidden(ids))[:, -last:],
                                   rtol=1e-5, atol=1e-5)
    assert model.hidden(ids[:, :1]).shape == (2, 1, SMALL.model_dim + SMALL.vocab_size)  # nothing to copy yet


def test_without_masses_it_is_the_model_that_does_not_copy():
    model, plain, ids = copier(), small_model(), tokens(2, 20)
    plain.load_state_dict({n: p for n, p in model.state_dict().items() if not n.startswith("copying.")})
    with torch.no_grad():
        model.copying.scale_and_bias[1] = -1000.0
        assert model(ids[:, :-1], ids[:, 1:]) == plain(ids[:, :-1], ids[:, 1:])
    assert plain.copying is None


def test_masses_however_large_are_finite_in_both_directions():
    """Where one token has all of the mass, and where none has any."""
    model, ids = copier(), torch.tensor([[1, 2] * 10])
    for most in (60.0, 200.0, -90.0):
        with torch.no_grad():
            model.copying.scale_and_bias.copy_(torch.tensor([40.0, most]))
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


def loss_of_what_came_before(copy_dim: int) -> tuple[float, float]:
    """Nats of random tokens, and of the same again, after 120 steps on such texts."""
    torch.manual_seed(0)
    model = GPT(replace(SMALL, copy_dim=copy_dim, smear=True, tied_embed_init_std=0.1))
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(120):
        ids = torch.randint(SMALL.vocab_size, (8, 24)).repeat(1, 2)
        loss = model(ids[:, :-1], ids[:, 1:])
        adam.zero_grad()
        loss.backward()
        adam.step()
    with torch.inference_mode():
        losses = F.cross_entropy(model.head(model.hidden(ids[:, :-1])).mT, ids[:, 1:], reduction="none")
    return float(losses[:, :20].mean()), float(losses[:, 25:].mean())


def test_it_learns_to_copy_what_no_weight_can_know():
    """And sooner than attention does, which needs two layers for it."""
    (first, again), (_, plain) = loss_of_what_came_before(24), loss_of_what_came_before(0)
    assert first > math.log(SMALL.vocab_size) - 0.1 and again < 1.6 < plain


@torch.inference_mode()
def test_a_probability_that_fp32_does_not_hold_is_the_least_that_it_does():
    model, ids = small_model(copy_dim=24, logit_softcap=400.0), tokens(2, 20)
    model.tok_emb.weight.mul_(100)
    model.copying.scale_and_bias[1] = -1000.0
    x, y = ids[:, :-1], ids[:, 1:]
    losses = F.cross_entropy(model.head(model.hidden(x)).mT, y, reduction="none")
    assert losses.max() == pytest.approx(-math.log(torch.finfo(torch.float32).tiny), rel=1e-4)
    assert float(model(x, y)) == pytest.approx(float(losses.mean()), rel=1e-5)


def test_it_is_in_the_file_where_it_is_not_the_default():
    assert artifact_meta(replace(SMALL, copy_dim=24))["config"]["copy_dim"] == 24
    reach = {"attn_window": 30, "eval_seq_len": 128}
    assert reach.items() <= artifact_meta(replace(SMALL, **reach))["config"].items()
    assert not reach.keys() & artifact_meta(SMALL)["config"].keys()
    assert "copy_dim" not in artifact_meta(SMALL)["config"]
    names = [n for n, _ in GPT(replace(SMALL, copy_dim=24)).named_parameters() if n.startswith("copying.")]
    assert [train_gpt.optimizer_of(n) for n in sorted(names)] == ["muon", "muon", "scalar"]
    formats = [train_gpt.format_of(Config(), n, 2 if n.endswith("weight") else 1).kind for n in sorted(names)]
    assert formats == ["ternary", "ternary", "bf16"]
