"""The same model, training step and sliding score as the field writes them: what speed.py measures ours against.

The shape of PR 367's script (BitLinear layers that quantize in every forward, torch.compile around the model, Muon one
matrix at a time, all logits of all windows), with our mathematics where the two differ: fp32 latents, the softcap in
fp32, windows that score each token once. tests/test_bench.py holds it to train_gpt.py: equal quantized weights, equal
losses, gradients and scores to bf16 accuracy. It is a fair opponent, not a straw man: what costs nothing to write
better (fused AdamW, RoPE tables made once, one compiled graph for scoring too) is written better.
"""

from __future__ import annotations

import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tern.metric import Score, sliding_windows


def check_settings(config) -> None:
    """Raise ValueError for settings whose mathematics is not written here."""
    only = {"matrix_format": "ternary", "embed_format": "bf16", "vector_format": "bf16", "scale_dtype": "bf16",
            "muon_wd": 0.0, "grad_clip_norm": 0.0, "smear": False, "key_offset": False, "copy_dim": 0,
            "attn_window": 0}
    for name, value in only.items():
        if getattr(config, name) != value:
            raise ValueError(f"{name}={getattr(config, name)!r}: the textbook has only {value!r}")
    if config.group_size == 0:
        raise ValueError("group_size=0: the textbook's scales are per group")


# ---------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],))


class BitLinear(nn.Linear):
    """BitNet b1.58's layer: RMS norm, then a product with the ternary form of its fp32 latent, made in every call."""

    def __init__(self, inputs: int, outputs: int, config):
        super().__init__(inputs, outputs, bias=False)
        self.group_size, self.threshold = min(config.group_size, inputs), config.threshold

    def quantize(self) -> Tensor:
        """codes * scale, fp32: groups of group_size inputs, scale mean|w| in bf16, zero up to threshold * mean|w|."""
        w, (rows, cols) = self.weight.detach(), self.weight.shape
        groups = -(-cols // self.group_size)
        w = F.pad(w, (0, groups * self.group_size - cols)).view(rows, groups, self.group_size)
        sizes = torch.full((groups, 1), float(self.group_size), device=w.device)
        sizes[-1] = cols - (groups - 1) * self.group_size
        mean = w.abs().sum(-1, keepdim=True) / sizes
        codes = w.sign() * (w.abs() > self.threshold * mean)
        return (codes * mean.bfloat16().float()).view(rows, -1)[:, :cols]

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight + (self.quantize() - self.weight).detach()  # straight-through: the gradient is the latent's
        return F.linear(norm(x), w.to(x.dtype))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.num_heads, c.num_kv_heads, c.model_dim // c.num_heads
        self.c_q = BitLinear(c.model_dim, c.model_dim, c)
        self.c_k = BitLinear(c.model_dim, c.num_kv_heads * self.head_dim, c)
        self.c_v = BitLinear(c.model_dim, c.num_kv_heads * self.head_dim, c)
        self.proj = BitLinear(c.model_dim, c.model_dim, c)
        self.q_gain = nn.Parameter(torch.full((c.num_heads,), c.qk_gain_init))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, time, dim = x.shape
        q = self.c_q(x).view(batch, time, self.heads, self.head_dim).transpose(1, 2)
        k = self.c_k(x).view(batch, time, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.c_v(x).view(batch, time, self.kv_heads, self.head_dim).transpose(1, 2)
        q = rotate(norm(q), cos, sin) * self.q_gain.to(q.dtype)[:, None, None]
        k = rotate(norm(k), cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        return self.proj(y.transpose(1, 2).reshape(batch, time, dim))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.fc = BitLinear(c.model_dim, c.hidden_dim, c)
        self.proj = BitLinear(c.hidden_dim, c.model_dim, c)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.fc(x).relu().square())


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.attn, self.mlp = Attention(c), MLP(c)
        self.attn_scale = nn.Parameter(torch.ones(c.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(c.model_dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(c.model_dim), torch.zeros(c.model_dim))))

    def forward(self, x: Tensor, x0: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn_scale.to(x.dtype) * self.attn(x, cos, sin)
        return x + self.mlp_scale.to(x.dtype) * self.mlp(x)


class TextbookGPT(nn.Module):
    """train_gpt.GPT with fp32 parameters, the latents, under the same names; activations in bf16."""

    def __init__(self, config):
        super().__init__()
        check_settings(config)
        c = self.config = config
        self.tok_emb = nn.Embedding(c.vocab_size, c.model_dim)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.num_layers))
        self.skip_weights = nn.Parameter(torch.ones(c.num_layers // 2, c.model_dim))
        half = c.model_dim // c.num_heads // 2
        angle = torch.outer(torch.arange(c.train_seq_len).float(), c.rope_base ** -(torch.arange(half).float() / half))
        self.register_buffer("cos", angle.cos().bfloat16(), persistent=False)
        self.register_buffer("sin", angle.sin().bfloat16(), persistent=False)

    def logits(self, ids: Tensor) -> Tensor:
        """Softcapped logits of every position, fp32 [batch, time, vocab]; time is at most train_seq_len."""
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        x = x0 = norm(F.embedding(ids, self.tok_emb.weight).bfloat16())
        half_way, skips = len(self.blocks) // 2, []
        for i, block in enumerate(self.blocks):
            if i >= half_way and skips:
                x = x + self.skip_weights[i - half_way].to(x.dtype) * skips.pop()
            x = block(x, x0, cos, sin)
            if i < half_way:
                skips.append(x)
        logits = F.linear(norm(x), self.tok_emb.weight.bfloat16()).float()
        return self.config.logit_softcap * torch.tanh(logits / self.config.logit_softcap)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean loss in nats per token."""
        return F.cross_entropy(self.logits(ids).flatten(0, 1), targets.flatten())


# ---------------------------------------------------------------------------------------------------------------
# Optimizer
# ---------------------------------------------------------------------------------------------------------------


def newton_schulz(g: Tensor, steps: int) -> Tensor:
    """Muon's quintic iteration on one matrix [rows, cols], in bf16."""
    x = g.bfloat16()
    if tall := x.shape[0] > x.shape[1]:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, then each matrix's update orthogonalised by itself."""

    def __init__(self, params, lr: float, steps: int):
        super().__init__(params, dict(lr=lr, steps=steps))

    @torch.no_grad()
    def step(self, momentum: float) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                buffer = state["momentum"].mul_(momentum).add_(p.grad)
                update = newton_schulz(p.grad.add(buffer, alpha=momentum), group["steps"])
                p.add_(update.float(), alpha=-group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)


class TextbookOptimizer:
    """Muon for the block matrices, fused AdamW for the embedding and the vectors; step() also clears the gradients."""

    def __init__(self, model: TextbookGPT, config):
        named = dict(model.named_parameters())
        matrices = {n: p for n, p in named.items() if n.startswith("blocks.") and n.endswith(".weight")}
        vectors = [p for n, p in named.items() if n not in matrices and n != "tok_emb.weight"]
        self.muon = Muon(matrices.values(), config.matrix_lr, config.muon_backend_steps)
        groups = [{"params": [model.tok_emb.weight], "lr": config.tied_embed_lr},
                  {"params": vectors, "lr": config.scalar_lr}]
        self.adam = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.adam_eps,
                                      weight_decay=0.0, fused=True)
        self.base_lr = [(g, g["lr"]) for o in (self.muon, self.adam) for g in o.param_groups]

    def step(self, lr_scale: float, momentum: float) -> None:
        for group, lr in self.base_lr:
            group["lr"] = lr * lr_scale
        self.muon.step(momentum)
        self.adam.step()
        self.muon.zero_grad()
        self.adam.zero_grad()


# ---------------------------------------------------------------------------------------------------------------
# Sliding score
# ---------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate_textbook(logits, tokens, counter, seq_len: int, stride: int, batch_seqs: int = 32) -> Score:
    """Score a token stream [n + 1] as tern.metric.evaluate does: all logits of every window, then the scored ones kept.

    logits: TextbookGPT.logits, or its compiled form.
    """
    began = time.perf_counter()
    tokens = torch.from_numpy(np.asarray(tokens).astype(np.int64))
    windows = list(sliding_windows(len(tokens) - 1, seq_len, stride))
    total, count = torch.zeros((), dtype=torch.float64), 0
    for i in range(0, len(windows), batch_seqs):
        batch = windows[i : i + batch_seqs]
        ids = torch.stack([tokens[start:end] for start, end, _ in batch])
        targets = torch.stack([tokens[start + 1 : end + 1] for start, end, _ in batch])
        every = logits(ids)
        losses = F.cross_entropy(every.flatten(0, 1), targets.flatten(), reduction="none").view(ids.shape)
        for row, (start, end, score_from) in zip(losses, batch, strict=True):
            total += row[score_from - start :].double().sum()
            count += end - score_from
    scored_bytes = int(counter.count(tokens[:-1], tokens[1:]).sum())
    loss = float(total) / count
    return Score(loss, float(total) / math.log(2) / scored_bytes, count, scored_bytes, time.perf_counter() - began)
