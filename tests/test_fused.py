"""The ops of tern/kernels.py for a GPU: their mathematics, with tern/fused.py's kernels by their definitions.

The kernels themselves need a GPU: bench/gpu.py's stage correct checks them against float64.
"""

from __future__ import annotations

import pytest
import torch

import eval_bpb
import train_gpt
from bench import gpu_correct
from tern import fused, kernels
from train_gpt import PRESETS, Config, norm

pytestmark = pytest.mark.fast


def split_and_rotate(qkv, gain, cos, sin, heads, kv_heads):
    q, k, v = qkv.unflatten(-1, (heads + 2 * kv_heads, -1)).split((heads, kv_heads, kv_heads), dim=2)
    assert cos.shape == sin.shape == (qkv.shape[1], qkv.shape[2] // (heads + 2 * kv_heads) // 2)
    cos, sin = cos[:, None], sin[:, None]
    return kernels.rotate(norm(q), cos, sin) * gain[:, None], kernels.rotate(norm(k), cos, sin), v.clone()


def split_and_rotate_backward(qkv, gain, cos, sin, dq, dk, dv):
    """By hand: within an operator there is no autograd. A rotation's transpose turns back."""
    heads, kv_heads = dq.shape[2], dk.shape[2]
    q, k, _ = qkv.unflatten(-1, (heads + 2 * kv_heads, -1)).split((heads, kv_heads, kv_heads), dim=2)

    def through_norm(x, dy):
        n, dn = norm(x), kernels.rotate(dy, cos[:, None], -sin[:, None])
        along = (n * dn).sum(-1, keepdim=True)
        return (dn - n * along / x.shape[-1]) * torch.rsqrt(x.square().mean(-1, keepdim=True)), along[..., 0]

    (dq, along), (dk, _) = through_norm(q, dq), through_norm(k, dk)
    return torch.cat((dq * gain[:, None], dk, dv), 2).flatten(2), along.sum((0, 1))


def mix_backward(dmixed, dnormed, x, x0, mix):
    mixed = mix[0] * x + mix[1] * x0
    scale = torch.rsqrt(mixed.square().mean(-1, keepdim=True))
    d = dmixed + scale * (dnormed - (dnormed * mixed).mean(-1, keepdim=True) * scale**2 * mixed)
    return mix[0] * d, mix[1] * d, torch.stack(((d * x).sum(0), (d * x0).sum(0)))


def scaled_branch_backward(dy, gain, z, scale, hidden):
    dz = dy * gain * scale[:, None]
    return dz, (dy * gain * z).sum(1) * scale**3 / -hidden, (dy * z * scale[:, None]).sum(0)


def branch_backward(dy, more, gain, branch):
    return dy + more, (dy + more) * gain, ((dy + more) * branch).sum(0)


# In place of the kernels, what their docstrings say.
STAND_INS = {
    "up_squared": lambda x, up: ((a := (x @ up.mT).relu().square()), a.square().sum(1)),
    "down_backward": lambda dz, down, a, pull: 2 * a.sqrt() * (dz @ down + pull[:, None] * a),
    "split_and_rotate": split_and_rotate, "split_and_rotate_backward": split_and_rotate_backward,
    "mix_backward": mix_backward, "scaled_branch_backward": scaled_branch_backward, "branch_backward": branch_backward,
}


@pytest.fixture
def plain(monkeypatch):
    for name, function in STAND_INS.items():
        monkeypatch.setattr(fused, name, function)


def results(function, inputs):
    """Output and gradients for a gradient that is always the same."""
    out = function(*inputs)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, weight)]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_branches_are_added_as_in_the_model(plain, backend):
    """Also where the rows that enter have other scales, for the norm that is left out before it has no effect."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 5, 8), (2, 5, 8), (8,), (24, 8), (8, 24), (8,)
    inputs = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    for x in inputs[:2]:
        x *= 10 ** torch.linspace(0, 2, 5, dtype=torch.float64)[:, None]
    inputs = [t.requires_grad_() for t in inputs]
    found = results(torch.compile(kernels.add_branches, fullgraph=True, backend=backend), inputs)
    for a, b in zip(found, results(gpu_correct.branches_exactly, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # the eps of the norms


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_mix_that_enters_a_block_is_the_one_of_the_model(plain, backend):
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
              for shape in ((2, 5, 8), (2, 5, 8), (2, 8))]
    found = results(torch.compile(gpu_correct.mix, fullgraph=True, backend=backend), inputs)
    for a, b in zip(found, results(gpu_correct.mix_exactly, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_model_with_fused_kernels_is_the_same_function(plain, monkeypatch):
    torch.manual_seed(0)
    config = Config(**PRESETS["tiny"] | dict(vocab_size=100))
    model = train_gpt.GPT(config)
    for p in model.parameters():
        if not p.any():  # blocks that start as the identity would hide them
            torch.nn.init.normal_(p, std=0.05)
    ids, targets = torch.randint(100, (2, 2, config.train_seq_len))
    parameters = list(model.parameters())

    def step(forward):
        loss = forward(ids, targets)
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]

    right, asked = step(model), []
    monkeypatch.setattr(train_gpt, "fuses", lambda x, *widths: asked.append(widths) or True)
    for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        for a, b in zip(step(forward), right, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    assert asked[:2] == [(config.hidden_dim, config.model_dim), ()]


@torch.no_grad()
def test_a_model_sampled_one_token_after_the_other_is_the_same_function(plain, monkeypatch):
    """Its blocks have other parts, which the kernels that join a block's do not know: what is new has late angles."""
    torch.manual_seed(0)
    model = train_gpt.GPT(Config(**PRESETS["tiny"] | dict(vocab_size=100)))
    for p in model.parameters():
        p.data = torch.randn_like(p) / 5
    ids = torch.randint(100, (1, 12))
    monkeypatch.setattr(train_gpt, "fuses", lambda *_: False)
    right = model.hidden(ids)
    monkeypatch.setattr(train_gpt, "fuses", lambda *_: True)
    cached = eval_bpb.Cached(model, 12)
    for known in (5, 6, 7, 12):
        torch.testing.assert_close(cached.hidden_last(ids[:, :known], 1), right[:, known - 1 : known], rtol=1e-3,
                                   atol=1e-5)


def test_a_cpu_and_other_dtypes_have_the_models_own_path():
    assert not kernels.fuses(torch.zeros(1, dtype=torch.bfloat16)) and not kernels.fuses(torch.zeros(1))
