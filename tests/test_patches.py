"""Techniques of ablations/patches.py: each does what its source says, trains, and is in the model that is scored."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_fused import STAND_INS

import eval_bpb
import pack
import train_gpt
from ablations import hooks, patches
from conftest import tiny_trainer
from tern import fused, metric, muon
from tern.settings import ConfigError
from tern.shards import AuditError, open_data, read_shard
from tern.tokenizers import ByteCounter

SMALL = train_gpt.Config(
    num_layers=2, model_dim=32, num_heads=2, num_kv_heads=1, mlp_hidden=80, vocab_size=64, group_size=32,
    train_seq_len=32, train_batch_tokens=64, eval_stride=0, micro_batch_tokens=64)
CPU = torch.device("cpu")


@contextmanager
def restored() -> Iterator[None]:
    """What patches and formats.register change is put back: names of the program's modules and of their classes."""
    modules = [m for name, m in sys.modules.items() if name in ("train_gpt", "pack", "eval_bpb")
               or name.startswith(("tern.", "ablations."))]
    classes = [x for m in modules for x in vars(m).values() if isinstance(x, type) and x.__module__ == m.__name__]
    before = [(owner, dict(vars(owner))) for owner in [*modules, *classes]]
    tables = [(table, dict(table)) for table in (train_gpt.RULES, train_gpt.FORMATS)]
    yield
    for owner, names in before:
        for name in [name for name in vars(owner) if name not in names]:
            delattr(owner, name)
        for name, value in names.items():
            if vars(owner).get(name) is not value:
                setattr(owner, name, value)
    for table, entries in tables:
        table.clear()
        table.update(entries)


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    with restored():
        yield


TRAINING = ["xsa=1", "bigram=64,8", "factored=16", "activation=leaky2", "activation=swiglu", "parallel", "recur=0.4",
            "loop=2", "document_mask", "orthogonal", "bf16_latents", "ema=0.5", "ema_params=0.5", "swa=0.3",
            "muon=polar", "warmdown=cosine,0.1", "gptq=4", "shift=both", "column_gains", "canon=both,2",
            "hysteresis=0.3", "dampen=0.1", "part_format=attn,bf16", "part_format=blocks,ternary,0"]


def logits_after_training(data_dir, folder) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the model in memory and of the one in the file, after a few steps."""
    trainer = tiny_trainer(data_dir, folder, "--iterations", 6, "--lr-warmup-steps", 0, "--checkpoint-every", 3,
                           "--smear", 1)
    trainer.train()
    trainer.folder.close()
    pack.write_artifact(folder / "model.tern", trainer.latents.pack(trainer.order),
                        train_gpt.artifact_meta(trainer.config))
    loaded = eval_bpb.load_artifact(folder / "model.tern", CPU)
    ids = torch.from_numpy(trainer.val_tokens[:128].astype(np.int64)).view(2, 64)
    with torch.no_grad():
        return tuple(m.head(m.hidden(ids)) for m in (trainer.model, loaded))


@pytest.fixture(scope="module")
def plain(data_dir, tmp_path_factory) -> torch.Tensor:
    return logits_after_training(data_dir, tmp_path_factory.mktemp("plain"))[0]


@pytest.mark.parametrize("text", TRAINING)
def test_it_trains_changes_the_run_and_is_what_the_file_holds(text, plain, data_dir, tmp_path):
    patches.apply([text])
    memory, file = logits_after_training(data_dir, tmp_path)
    assert torch.equal(memory, file), "the scoring process would see another model"
    assert torch.isfinite(memory).all() and not torch.equal(memory, plain), "the patch does nothing"


@pytest.mark.fast
def test_canon_sees_what_is_before_alone_and_the_last_positions_are_those_of_all():
    patches.apply(["canon=both,3"])
    torch.manual_seed(0)
    model, ids = train_gpt.GPT(SMALL), torch.randint(SMALL.vocab_size, (2, 16))
    for p in model.parameters():
        p.data = torch.randn_like(p) / 5
    whole = model.hidden(ids)
    for last in (1, 3, 14):
        assert torch.allclose(model.hidden_last(ids, last), whole[:, -last:], atol=1e-5)
    ids[:, 9] = (ids[:, 9] + 1) % SMALL.vocab_size
    moved = (model.hidden(ids) - whole).abs().amax((0, 2)) > 0
    assert not moved[:9].any() and moved[9:13].all()


@pytest.mark.fast
def test_masses_grow_where_tokens_match():
    """By hand, one pair of positions at a time; losses and distributions say the same."""
    patches.apply(["matches=3"])
    torch.manual_seed(0)
    model, ids = train_gpt.GPT(replace(SMALL, copy_dim=8)), torch.randint(3, (2, 16))
    copying, targets = model.copying, torch.cat((ids[:, 1:], ids[:, :1]), 1)
    with torch.no_grad():
        copying.by_match.copy_(torch.tensor([0.5, -0.25, 1.0]))
        states = model.states(ids, 16)
        ((_, _, plain),) = copying.tiles(states, 16)
        masses = plain.clone()
        for b, q, k in np.ndindex(*masses.shape):
            n = 0
            while n < min(3, k) and ids[b, q - n] == ids[b, k - n]:  # the window's first token tells nothing
                n += 1
            masses[b, q, k] *= math.exp(sum([0.5, -0.25, 1.0][:n]))
        by_token = torch.stack([torch.where(targets[:, None] == v, masses, 0.0).sum(-1)
                                for v in range(SMALL.vocab_size)], -1)
        probabilities = (model.logits(states).softmax(-1) + by_token) / (1 + masses.sum(-1, keepdim=True))
        expected = -probabilities.gather(-1, targets[..., None])[..., 0].log()
        found = -model.head(model.hidden(ids)).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        assert not torch.allclose(plain, masses)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(ids, targets), expected.mean(), rtol=1e-4, atol=1e-5)
        assert torch.allclose(model.hidden_last(ids, 5), model.hidden(ids)[:, -5:], atol=1e-5)


@pytest.mark.fast
def test_masses_grow_where_the_last_matches_were():
    """As above; of equal tokens, pairs and triples the last two each, by a number for each."""
    patches.apply(["recent_matches=3,2"])
    torch.manual_seed(0)
    model, ids = train_gpt.GPT(replace(SMALL, copy_dim=8)), torch.randint(3, (2, 24))
    copying, targets = model.copying, torch.cat((ids[:, 1:], ids[:, :1]), 1)
    with torch.no_grad():
        copying.by_match.copy_(torch.randn(3, 2))
        grows, states = copying.by_match.exp().flip(1), model.states(ids, 24)  # the most recent first
        ((_, _, plain),) = copying.tiles(states, 24)
        masses = plain.clone()
        for b, q, n in np.ndindex(2, 24, 3):
            alike = [k for k in range(n + 1, q) if ids[b, k - n : k + 1].tolist() == ids[b, q - n : q + 1].tolist()]
            for m, k in enumerate(alike[::-1][:2]):
                masses[b, q, k] += plain[b, q, k] * grows[n, m]
        by_token = torch.stack([torch.where(targets[:, None] == v, masses, 0.0).sum(-1)
                                for v in range(SMALL.vocab_size)], -1)
        probabilities = (model.logits(states).softmax(-1) + by_token) / (1 + masses.sum(-1, keepdim=True))
        expected = -probabilities.gather(-1, targets[..., None])[..., 0].log()
        found = -model.head(model.hidden(ids)).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        assert not torch.allclose(plain, masses)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(ids, targets), expected.mean(), rtol=1e-4, atol=1e-5)
        assert torch.allclose(model.hidden_last(ids, 5), model.hidden(ids)[:, -5:], atol=1e-5)
        assert model.hidden(ids[:, :1]).isfinite().all()


@pytest.mark.fast
@pytest.mark.parametrize("text", ["activation=leaky2", "activation=swiglu", "parallel", "loop=2", "shift=both",
                                  "column_gains", "canon=both,2", "recur=0.4", "document_mask", "factored=16",
                                  "bigram=64,8", "late_loss=8"])
def test_fused_kernels_compute_it_too_or_are_not_used(text, monkeypatch):
    """A patch of what tern/fused.py has a kernel for must not be lost on a GPU."""
    for name, function in STAND_INS.items():
        monkeypatch.setattr(fused, name, function)
    patches.apply([text])
    torch.manual_seed(0)
    model, (ids, targets) = train_gpt.GPT(SMALL), torch.randint(SMALL.vocab_size, (2, 2, 16))
    for p in model.parameters():
        p.data = torch.randn_like(p) / 5

    def results(fuses: bool) -> list[torch.Tensor]:
        monkeypatch.setattr(train_gpt, "fuses", lambda *_: fuses)
        gradients = torch.autograd.grad(model(ids, targets), list(model.parameters()))
        return [model.hidden(ids), model.hidden_last(ids, 5), *gradients]

    for found, right in zip(results(True), results(False), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-4)


def test_unrounded_scales_open_a_gap_by_design(plain, data_dir, tmp_path):
    patches.apply(["unrounded_scales"])
    memory, file = logits_after_training(data_dir, tmp_path)
    assert not torch.equal(memory, file) and torch.allclose(memory, file, atol=0.5)


@pytest.mark.fast
def test_a_wrong_patch_is_one_clear_error():
    for text, message in (
            ("xsa=a", "arguments must be last: 'int' = 2"), ("xsa=1,2", "arguments must be"),
            ("recur=x", "arguments must be"), ("activation", "arguments must be kind"),
            ("nothing", "there is no patch 'nothing'"), ("codebook=1", "decay must be at least 0 and below 1"),
            ("ttt=some", "what must be all, vectors, scales, none"), ("part_format=mlp", "arguments must be part"),
            ("part_format=mlp,int4", "kind must be ternary, five, fp8, bf16")):
        with pytest.raises(ValueError, match=message):
            patches.parse(text)


@pytest.mark.fast
def test_exclusive_attention_is_orthogonal_to_the_own_value():
    patches.xsa(1)
    model = train_gpt.GPT(SMALL)
    assert [type(b.attn).__name__ for b in model.blocks] == ["Attention", "Exclusive"]
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 16, 8, generator=g) for heads in (4, 2, 2))
    y = model.blocks[1].attn.attend(q, k, v)
    own = v.repeat_interleave(2, dim=1)
    assert (y * own).sum(-1).abs().max() < 1e-5
    left = train_gpt.attend(q, k, v) - y
    assert torch.allclose(F.normalize(left, dim=-1).abs(), F.normalize(own, dim=-1).abs(), atol=1e-4)


@pytest.mark.fast
def test_bigrams_see_the_token_before_and_nothing_else():
    patches.bigram(64, 8)
    model = train_gpt.GPT(SMALL)
    torch.nn.init.normal_(model.bigram_table.weight)
    a, b = model.embed(torch.tensor([[5, 9, 9, 7], [6, 9, 9, 7]]))
    same = [torch.allclose(x, y) for x, y in zip(a, b, strict=True)]
    assert same == [False, False, True, True]


@pytest.mark.fast
def test_documents_do_not_see_each_other():
    patches.document_mask(1)
    model = train_gpt.GPT(SMALL)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    ids = torch.tensor([[1, 5, 6, 1, 7, 8], [1, 9, 4, 1, 7, 8]])
    with torch.no_grad():
        a, b = model.hidden(ids)
        assert torch.allclose(a[3:], b[3:], atol=1e-5) and not torch.allclose(a[1:3], b[1:3], atol=1e-2)
        assert torch.allclose(model.hidden_last(ids, 2), model.hidden(ids)[:, -2:], atol=1e-5)


def test_bf16_latents_lose_what_fp32_keeps(data_dir, tmp_path):
    patches.bf16_latents()
    trainer = tiny_trainer(data_dir, tmp_path)
    bank = next(b for b in trainer.latents.mine if b.optimizer == "muon")
    assert bank.latent.dtype == torch.bfloat16
    before = bank.latent.clone()
    bank.latent.mul_(1 - 0.04 * 0.04)
    assert torch.equal(bank.latent, before), "decoupled weight decay changes no bf16 weight (field notes)"
    trainer.folder.close()


@pytest.mark.fast
@pytest.mark.parametrize(("kind", "least"), [("polar", 0.85), ("rows", 0.6)])
def test_orthogonalisation_variants(kind, least):
    """polar comes closer to one than Muon's own coefficients reach."""
    patches.muon(kind)
    g = torch.randn(2, 24, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 0, 24)[:, None]
    values = torch.linalg.svdvals(muon.newton_schulz(g, 5).float())
    assert values.min() > least and values.max() < 1.25


@pytest.mark.fast
@pytest.mark.parametrize(("kind", "half"), [("linear", 0.5), ("cosine", 0.5), ("sqrt", 1 - math.sqrt(0.5))])
def test_warmdowns_begin_and_end_alike(kind, half):
    config = replace(SMALL, warmdown_frac=0.5, lr_warmup_steps=3)
    early = train_gpt.schedule(config, 1, 0.01).lr_scale
    patches.warmdown(kind, 0.1)
    scale = [train_gpt.schedule(config, step, progress).lr_scale for step, progress in (
        (1, 0.01), (50, 0.5), (75, 0.75), (100, 1.0))]
    assert scale == pytest.approx([early, 1.0, 0.1 + 0.9 * half, 0.1])


def test_averages_are_those_of_their_definition(data_dir, tmp_path):
    seen: list[list[torch.Tensor]] = []
    hooks.before(train_gpt.Trainer, "after_step", lambda self, plan: seen.append(
        [b.latent.clone() for b in self.latents.mine]))
    patches.ema(0.5)
    trainer = tiny_trainer(data_dir, tmp_path, "--iterations", 4)
    trainer.train()
    expected = seen[0][0]
    for latents in seen[1:]:
        expected = 0.5 * expected + 0.5 * latents[0]
    assert torch.allclose(trainer.latents.mine[0].latent, expected, atol=1e-6)
    trainer.folder.close()


@pytest.mark.fast
def test_compensated_codes_have_less_error_than_rounded_ones():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 32, generator=g) @ torch.randn(32, 32, generator=g) / 4
    w, fmt = torch.randn(16, 32, generator=g), train_gpt.Int(3, 0)
    stored = fmt.quantize(w)
    codes = patches.compensate(w, stored.codes, stored.scales, fmt, (x.double().mT @ x.double()), 0.01)
    scale = stored.scales.double()
    error = [float(((c.double() * scale - w.double()) @ x.double().mT).square().sum()) for c in (codes, stored.codes)]
    assert error[0] < 0.7 * error[1]
    nearly_nothing = patches.compensate(w, stored.codes, stored.scales, fmt, 1e6 * torch.eye(32).double(), 0.01)
    assert torch.equal(nearly_nothing, stored.codes), "uncorrelated inputs leave nothing to make up for"


def test_test_time_training_scores_first(tiny_run, data_dir):
    """That no score knows what comes later is tests/test_adapt.py's, of the same loop."""
    model = eval_bpb.load_artifact(tiny_run[0] / "model.tern", CPU)
    data = open_data(data_dir)
    counter, tokens = ByteCounter(data.tokenizer), read_shard(data.val[0])[:2000].astype(np.int64)
    plain = eval_bpb.evaluate(model, tokens, counter, 64, 32)

    def score(what: str, lr: float = 0.01) -> metric.Score:
        patches.ttt(what, lr, 256)
        return eval_bpb.evaluate(model, tokens, counter, 64, 32, 8)

    assert score("none").val_loss == pytest.approx(plain.val_loss, rel=1e-6)
    assert score("all", 0.0).val_loss == pytest.approx(plain.val_loss, rel=1e-6)
    with pytest.raises(ConfigError, match="in one way or the other"):
        eval_bpb.evaluate(model, tokens, counter, 64, 32, 8, learn=print)
    with pytest.raises(AuditError, match="too high a rate"):
        score("all", 1e9)
    for what in ("all", "vectors", "scales"):
        trained = score(what)
        assert trained.tokens == plain.tokens and trained.val_loss != plain.val_loss
    again = eval_bpb.load_artifact(tiny_run[0] / "model.tern", CPU)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)), "a copy learns"


@pytest.mark.fast
def test_scales_train_without_their_codes():
    w = torch.randn(4, 300).bfloat16()
    factors = patches.Factors(w, 128)
    assert torch.equal(factors.param(), w.float()) and factors.value.shape == (4, 3, 1), "128, 128 and 44 inputs"
    x = torch.ones(4, 3, 1, requires_grad=True)
    wide = x.repeat_interleave(128, dim=1)[:, :300, 0]
    direct, = torch.autograd.grad((w.float() * wide).pow(3).sum(), x)
    assert torch.allclose(factors.grad(3 * w.float() ** 2), direct, rtol=1e-4)
    factors.value[1, 2] = 2.0
    ratio = factors.param() / w.float()
    assert torch.equal(ratio[1, 256:], torch.full((44,), 2.0)) and (ratio == 2).sum() == 44


@pytest.mark.fast
def test_activations_are_those_of_their_papers():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, SMALL.model_dim, generator=g)
    unit = F.rms_norm(x, (SMALL.model_dim,))
    for kind, function in {"relu": lambda h: h.clamp_min(0), "gelu": lambda h: h * (1 + torch.erf(h / 2**0.5)) / 2,
                           "leaky2": lambda h: torch.where(h > 0, h, h / 2) ** 2}.items():
        patches.activation(kind)
        mlp = train_gpt.MLP(SMALL)
        for p in mlp.parameters():
            torch.nn.init.normal_(p, std=0.2, generator=g)
        h = function(unit @ mlp.fc.weight.mT)
        assert torch.allclose(mlp(x), F.rms_norm(h, h.shape[-1:]) @ mlp.proj.weight.mT, atol=1e-5), kind
    patches.activation("swiglu")
    mlp = train_gpt.MLP(SMALL)
    for p in mlp.parameters():
        torch.nn.init.normal_(p, std=0.2, generator=g)
    gate = unit @ mlp.gate.weight.mT
    h = gate * torch.sigmoid(gate) * (unit @ mlp.fc.weight.mT)
    assert torch.allclose(mlp(x), F.rms_norm(h, h.shape[-1:]) @ mlp.proj.weight.mT, atol=1e-5)


def test_temperature_comes_from_training_tokens(tiny_run, data_dir):
    data = open_data(data_dir)
    patches.TRAINING_SHARDS[:] = data.train
    model = eval_bpb.load_artifact(tiny_run[0] / "model.tern", CPU)
    ids = torch.from_numpy(read_shard(data.train[0])[: 16 * 64 + 1].astype(np.int64))
    with torch.no_grad():
        logits = model.head(model.hidden(ids[:-1].view(16, 64))).flatten(0, 1)
    best = patches.best_temperature(model, 64, 16)
    losses = [float(F.cross_entropy(logits / t, ids[1:])) for t in (best, best * 1.05, best / 1.05)]
    assert losses[0] == min(losses)
    patches.temperature(16)
    counter, tokens = ByteCounter(data.tokenizer), read_shard(data.val[0])[:449]
    plain = eval_bpb.load_artifact(tiny_run[0] / "model.tern", CPU)
    with_it = eval_bpb.evaluate(plain, tokens, counter, 64, 64)
    assert plain.temperature == pytest.approx(best)
    with torch.no_grad():
        ids = torch.from_numpy(tokens.astype(np.int64))
        logits = train_gpt.GPT.head(plain, plain.hidden(ids[:-1].view(7, 64))).flatten(0, 1)
    assert with_it.val_loss == pytest.approx(float(F.cross_entropy(logits / best, ids[1:])), rel=1e-5)
def test_an_average_is_refused_where_a_run_is_resumed(data_dir, tmp_path):
    args = ("--iterations", 4, "--checkpoint-every", 2)
    first = tiny_trainer(data_dir, tmp_path, *args)
    first.train()
    first.folder.close()
    patches.ema(0.5)
    with pytest.raises(train_gpt.ConfigError, match="an average is in no checkpoint"):
        tiny_trainer(data_dir, tmp_path, *args, "--resume", "auto")
