"""Techniques that are not in the trainer, each as a patch of its classes. program.py applies them; matrices name them.

A patch is a function that replaces something of train_gpt (or eval_bpb) once, before anything runs, in the training
process and in the one that scores: what a patch does to the model must be in both. Arguments follow the name: "xsa=4".
Definitions give their source where there is one; where the field's code was never published, its words were taken.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import eval_bpb
import train_gpt
from ablations.formats import Codebook
from ablations.hooks import after, before
from tern import copying, kernels, metric
from tern import muon as tern_muon
from tern.adapt import ScoreFirst
from tern.groups import decode_scales, join_groups, split_groups
from tern.kernels import rotate
from tern.settings import ConfigError
from tern.shards import read_shard
from train_gpt import GPT, MLP, Attention, Block, Float, Latents, Linear, Optimizer, Ternary, Trainer, norm, previous

PATCHES: dict[str, Callable] = {}
ALLOWED: dict[str, dict[str, Container]] = {}  # of each patch: the values that an argument may have
SCORING: set[str] = set()  # patches of the scorer alone: they make no other artifact
RESHAPING = {"activation", "bigram", "factored"}  # the model has other parameters
OPEN_A_GAP = {"unrounded_scales"}  # what is packed is not what was trained, and that is the point


@dataclass(frozen=True)
class Within:
    """Numbers from low to below high."""

    low: float
    high: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.low <= value < self.high

    def __str__(self) -> str:
        return f"at least {self.low:g}" + (f" and below {self.high:g}" if self.high < math.inf else "")


def patch(scorer: bool = False, **allowed: Container) -> Callable[[Callable], Callable]:
    """Register a technique; scorer: it changes how an artifact is scored, not what is trained."""
    def register(function: Callable) -> Callable:
        name = function.__name__
        PATCHES[name], ALLOWED[name] = function, allowed
        if scorer:
            SCORING.add(name)
        return function

    return register


def parse(text: str) -> tuple[Callable, list]:
    """A patch and its arguments from "name" or "name=a,b". Raises ValueError."""
    name, _, rest = text.partition("=")
    if name not in PATCHES:
        raise ValueError(f"there is no patch {name!r}; patches: {', '.join(sorted(PATCHES))}")
    signature = inspect.signature(PATCHES[name])
    parameters = list(signature.parameters.values())
    texts = rest.split(",") if rest else []
    kinds = {"int": int, "float": float, "str": str}
    try:
        signature.bind(*texts)
        values = [kinds[p.annotation](t) for p, t in zip(parameters, texts, strict=False)]
    except (ValueError, TypeError):
        wants = ", ".join(str(p) for p in parameters) or "none"
        raise ValueError(f"patch {text!r}: the arguments must be {wants}") from None
    for parameter, value in zip(parameters, values, strict=False):
        allowed = ALLOWED[name].get(parameter.name)
        if allowed is not None and value not in allowed:
            may_be = allowed if isinstance(allowed, Within) else ", ".join(allowed)
            raise ValueError(f"patch {text!r}: {parameter.name} must be {may_be}")
    return PATCHES[name], values


def name_of(text: str) -> str:
    """The patch that a text such as "xsa=4" names."""
    return text.partition("=")[0]


def apply(texts: Sequence[str]) -> None:
    for text in texts:
        function, values = parse(text)
        function(*values)


# ---------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------


@patch(last=Within(1))
def xsa(last: int = 2) -> None:
    """Exclusive self-attention in the last layers: a head's output without its part along the token's own value
    (parameter-golf, use_xsa)."""
    class Exclusive(Attention):
        @staticmethod
        def attend(q: Tensor, k: Tensor, v: Tensor, window: int = 0) -> Tensor:
            y = train_gpt.attend(q, k, v, window)
            own = F.normalize(v[:, :, -q.shape[2]:].float(), dim=-1).to(y.dtype)
            own = own.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
            return y - (y * own).sum(-1, keepdim=True) * own

    def exclude(model: GPT, config) -> None:
        for block in model.blocks[-last:]:
            block.attn.__class__ = Exclusive

    after(GPT, "__init__", exclude)


@patch(what=("keys", "values", "both"), start=Within(0, 1.001))
def shift(what: str = "values", start: float = 0.3) -> None:
    """KV shifting attention (arXiv 2411.19574): k or v, before RoPE, as a x_t + b x_{t-1}, with a and b learned for
    each head from 1 - start and start. Shifted keys are not offset."""
    def make(model: GPT, config) -> None:
        for block in model.blocks:
            attention = block.attn
            attention.__class__ = Shifted
            for name in ("keys", "values") if what == "both" else (what,):
                mix = torch.tensor([1 - start, start])[:, None].repeat(1, config.num_kv_heads)
                attention.register_parameter(f"shift_{name}", nn.Parameter(mix))
            attention.offset = attention.offset and what == "values"

    def shifted(x: Tensor, mix: Tensor) -> Tensor:
        return x * mix[0, :, None, None] + F.pad(x, (0, 0, 1, 0))[:, :, :-1] * mix[1, :, None, None]

    class Shifted(Attention):
        def forward(self, x: Tensor, cos: Tensor, sin: Tensor, last: int) -> Tensor:
            x = norm(x)
            q, k, v = (self.split_heads(f(x)) for f in (self.c_q, self.c_k, self.c_v))
            k = norm(k)
            if what != "values":
                k = norm(shifted(k, self.shift_keys))
            if what != "keys":
                v = shifted(v, self.shift_values)
            q = rotate(norm(q[:, :, -last:]), cos[-last:], sin[-last:]) * self.q_gain[:, None, None]
            return self.mix(q, rotate(k, cos, sin), v)

    after(GPT, "__init__", make)


@patch(part=Within(2))
def late_loss(part: int = 8) -> None:
    """No loss in training at the first part-th of each window: a sliding score asks no token with so little before it,
    and their logits are saved."""
    def forward(self: GPT, ids: Tensor, targets: Tensor) -> Tensor:
        first = ids.shape[1] // part
        logits = self.head(self.hidden(ids)[:, first:])
        return kernels.token_losses(logits, targets[:, first:], self.config.logit_softcap).mean()

    GPT.forward = forward


@patch(where=("attention", "mlp", "both"), width=Within(1, 4))
def canon(where: str = "mlp", width: int = 1) -> None:
    """Canon layers (Allen-Zhu, arXiv 2512.17351): what enters attention, or the MLP, is the position's own plus learned
    shares, from 0, of the `width` positions before it, for each dimension."""
    places = ("attention", "mlp") if where == "both" else (where,)

    def make(model: GPT, config) -> None:
        for block in model.blocks:
            block.__class__ = CanonBlock
            for place in places:
                block.register_parameter(f"canon_{place}", nn.Parameter(torch.zeros(width, config.model_dim)))

    def blended(x: Tensor, shares: Tensor) -> Tensor:
        out, shifted = x, x
        for share in shares:
            shifted = previous(shifted)
            out = out + share * shifted
        return out

    class CanonBlock(Block):
        def forward(self, x: Tensor, x0: Tensor, cos: Tensor, sin: Tensor, last: int) -> Tensor:
            x = self.resid_mix[0] * x + self.resid_mix[1] * x0
            entering = blended(x, self.canon_attention) if "attention" in places else x
            kept = min(x.shape[1], last + width * ("mlp" in places))
            x = x[:, -kept:] + self.attn_scale * self.attn(entering, cos, sin, kept)
            entering = blended(x, self.canon_mlp)[:, -last:] if "mlp" in places else x
            return x[:, -last:] + self.mlp_scale * self.mlp(entering)

    after(GPT, "__init__", make)


@patch()
def column_gains() -> None:
    """A learned gain for each input of each product, from 1: what scales per row of a ternary matrix cannot say. It is
    multiplied into the matrix, so that a step costs nothing more."""
    def make(model: GPT, config) -> None:
        for block in model.blocks:
            block.attn.__class__, block.mlp.__class__ = GainedAttention, GainedMLP
            for part, inputs in ((block.attn, config.model_dim), (block.mlp, config.hidden_dim)):
                part.gain_in = nn.Parameter(torch.ones(config.model_dim))
                part.gain_out = nn.Parameter(torch.ones(inputs))

    class GainedAttention(Attention):
        def forward(self, x: Tensor, cos: Tensor, sin: Tensor, last: int) -> Tensor:
            x = norm(x)
            qkv = kernels.linear(x, torch.cat((self.c_q.weight, self.c_k.weight, self.c_v.weight)) * self.gain_in)
            q, k, v = self.split_heads(qkv).split((self.heads, self.kv_heads, self.kv_heads), dim=1)
            q = rotate(norm(q[:, :, -last:]), cos[-last:], sin[-last:]) * self.q_gain[:, None, None]
            return self.mix(q, rotate(norm(k), cos, sin), v)

        def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            y = self.attend(q, kernels.offset_keys(k) if self.offset else k, v, self.window)
            return kernels.linear(norm(y.transpose(1, 2).flatten(2)), self.proj.weight * self.gain_out)

    class GainedMLP(MLP):
        def forward(self, x: Tensor) -> Tensor:
            hidden = norm(kernels.linear(norm(x), self.fc.weight * self.gain_in).relu().square())
            return kernels.linear(hidden, self.proj.weight * self.gain_out)

    after(GPT, "__init__", make)


def extend_embedding(make: Callable[[GPT], None], change: Callable[[GPT, Tensor, Tensor], Tensor]) -> None:
    """Add parameters to the model (make) and change what enters its first block: change(model, ids, x)."""
    original = GPT.embed

    def embed(self: GPT, ids: Tensor) -> Tensor:
        return change(self, ids, original(self, ids))

    after(GPT, "__init__", lambda model, config: make(model))
    GPT.embed = embed


@patch(rows=Within(1), dim=Within(1))
def bigram(rows: int = 1024, dim: int = 32) -> None:
    """BigramHash: a table by a hash of each token and the one before, projected to the model's width and added, at a
    learned scale that starts at 0.05 (parameter-golf PR 162). Table and projection start at zero and 1 / sqrt(dim)
    normal; both are stored in matrix_format."""
    def make(model: GPT) -> None:
        model.bigram_table = nn.Embedding(rows, dim)
        model.bigram_proj = Linear(dim, model.config.model_dim)
        nn.init.zeros_(model.bigram_table.weight)
        nn.init.normal_(model.bigram_proj.weight, std=dim**-0.5)
        model.bigram_scale = nn.Parameter(torch.full((1,), 0.05))

    def change(model: GPT, ids: Tensor, x: Tensor) -> Tensor:
        before = train_gpt.previous(ids[..., None])[..., 0]
        index = (36313 * ids ^ 27191 * before) % (rows - 1)
        index = torch.where(torch.arange(ids.shape[1], device=ids.device) > 0, index, rows - 1)  # nothing before
        added = F.linear(F.embedding(index, model.bigram_table.weight.float()), model.bigram_proj.weight.float())
        return x + model.bigram_scale.float() * added

    extend_embedding(make, change)


@patch(dim=Within(1))
def factored(dim: int = 64) -> None:
    """The embedding as a product [vocab, dim] x [dim, model_dim], used at both ends (ALBERT, arXiv 1909.11942)."""
    def make(model: GPT, config) -> None:
        model.tok_emb = nn.Embedding(config.vocab_size, dim)
        nn.init.normal_(model.tok_emb.weight, std=config.tied_embed_init_std)
        model.embed_proj = Linear(dim, config.model_dim)
        nn.init.orthogonal_(model.embed_proj.weight)

    def lookup(model: GPT, ids: Tensor) -> Tensor:
        return norm(F.linear(F.embedding(ids, model.tok_emb.weight.float()), model.embed_proj.weight.float()))

    def logits(model: GPT, states: Tensor) -> Tensor:
        cap, low = model.config.logit_softcap, kernels.linear(states, model.embed_proj.weight.mT)
        return cap * torch.tanh(kernels.linear(low, model.tok_emb.weight).float() / cap)

    after(GPT, "__init__", make)
    GPT.lookup, GPT.logits = lookup, logits


@patch(kind=("relu", "leaky2", "gelu", "swiglu"))
def activation(kind: str) -> None:
    """The MLP's nonlinearity in place of relu squared: relu, leaky2 (leaky relu of slope 0.5, squared with its sign
    lost, as parameter-golf has it), gelu, or swiglu (arXiv 2002.05202; two thirds of the width, for equal weights)."""
    functions = {"relu": F.relu, "leaky2": lambda x: F.leaky_relu(x, 0.5).square(), "gelu": F.gelu}

    class Other(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return self.proj(norm(functions[kind](self.fc(norm(x)))))

    class SwiGLU(nn.Module):
        def __init__(self, c):
            super().__init__()
            width = round(c.hidden_dim * 2 / 3 / 8) * 8
            self.gate = Linear(c.model_dim, width)
            self.fc = Linear(c.model_dim, width)
            self.proj = Linear(width, c.model_dim)

        def forward(self, x: Tensor) -> Tensor:
            x = norm(x)
            return self.proj(norm(F.silu(self.gate(x)) * self.fc(x)))

    train_gpt.MLP = SwiGLU if kind == "swiglu" else Other


@patch()
def parallel() -> None:
    """Attention and MLP read the same input and are added together (GPT-J)."""
    def forward(self: Block, x: Tensor, x0: Tensor, cos: Tensor, sin: Tensor, last: int) -> Tensor:
        x = self.resid_mix[0] * x + self.resid_mix[1] * x0
        end = x[:, -last:]
        return end + self.attn_scale * self.attn(x, cos, sin, last) + self.mlp_scale * self.mlp(end)

    Block.forward = forward


@patch(start=Within(0, 1))
def recur(start: float = 0.5) -> None:
    """Late depth recurrence: from this progress on the second half of the blocks runs twice."""
    GPT.recurrent = True  # what is scored; in training Trainer says

    def states(self: GPT, ids: Tensor, last: int) -> Tensor:
        dtype, half = self.tok_emb.weight.dtype, self.config.model_dim // self.config.num_heads // 2
        cos, sin = train_gpt.rope_tables(ids, half, self.config.rope_base).to(dtype)
        x = x0 = self.embed(ids).to(dtype)
        half_way, skips, time = self.config.num_layers // 2, [], ids.shape[1]
        for block in self.blocks[:half_way]:
            x = block(x, x0, cos, sin, time)
            skips.append(x)
        passes = 2 if self.recurrent else 1
        for again in range(passes):
            for i, block in enumerate(self.blocks[half_way:]):
                if i < len(skips) and not again:
                    x = x + self.skip_weights[i] * skips[-1 - i]
                end = again == passes - 1 and i == len(self.blocks) - half_way - 1
                x = block(x, x0, cos, sin, last if end else time)
        return norm(x)

    def set_recurrence(self: Trainer, *_, **__) -> None:
        self.model.recurrent = progress_of(self) >= start or self.finished

    def recur_from_now_on(self: Trainer) -> None:
        self.model.recurrent = True

    GPT.states = states
    before(Trainer, "forward_backward", set_recurrence)
    before(Trainer, "settle", recur_from_now_on)


@patch(times=Within(2, 8))
def loop(times: int = 2) -> None:
    """All blocks, with their skips, this many times over, the same weights each time (Universal Transformer, arXiv
    1807.03819)."""
    def states(self: GPT, ids: Tensor, last: int) -> Tensor:
        dtype, half = self.tok_emb.weight.dtype, self.config.model_dim // self.config.num_heads // 2
        cos, sin = train_gpt.rope_tables(ids, half, self.config.rope_base).to(dtype)
        x = x0 = self.embed(ids).to(dtype)
        layers, half_way, skips = self.config.num_layers, self.config.num_layers // 2, []
        for i in range(times * layers):
            layer = i % layers
            if layer >= half_way and skips:
                x = x + self.skip_weights[layer - half_way] * skips.pop()
            x = self.blocks[layer](x, x0, cos, sin, last if i == times * layers - 1 else ids.shape[1])
            if layer < half_way:
                skips.append(x)
        return norm(x)

    GPT.states = states


@patch(bos=Within(0))
def document_mask(bos: int = 1) -> None:
    """Attention does not look past the beginning of a document, a BOS token (through SDPA, slower on a CPU). A
    model that copies may still copy from before it."""
    original = GPT.states

    def states(self: GPT, ids: Tensor, last: int) -> Tensor:
        document = (ids == bos).cumsum(1)
        seen = (document[:, :, None] == document[:, None, :]).tril()[:, None]  # [batch, 1, query, key]
        for block in self.blocks:
            block.attn.mask = seen
        self.blocks[-1].attn.mask = seen[:, :, -last:]
        return original(self, ids, last)

    def attend(self: Attention, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        dtype, (q, k, v) = q.dtype, kernels.factors(q, k, v)
        queries, time = self.mask.shape[-2:]
        seen = self.mask.triu(time - queries - window + 1) if window else self.mask
        return F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=q.shape[1] != k.shape[1]).to(dtype)

    GPT.states, Attention.attend = states, attend


@patch(longest=Within(1))
def matches(longest: int = 3) -> None:
    """A model that copies knows where tokens are the same: the mass of what followed an earlier position is multiplied
    by exp(b_1 + .. + b_n), learned from 0, where the n tokens before that, of at most `longest`, are those before the
    prediction. Contexts of an order, as in PPM (Cleary and Witten, IEEE Trans. Comm. 32, 1984)."""
    def make(model: GPT, config) -> None:
        if model.copying is None:
            raise ConfigError("patch matches is for models that copy: set copy_dim")
        model.copying.__class__ = Matching
        model.copying.by_match = nn.Parameter(torch.zeros(longest))

    class Matching(copying.Copying):
        def gain(self, ids: Tensor, rows: slice, known: int, last: int) -> Tensor:
            """Factors of masses, of tokens ids [batch, time] but the first, which nothing is known to be like."""
            same = total = None
            for n, more in enumerate(self.by_match.float()):
                keys, queries = (F.pad(ids[:, 1 : ids.shape[1] - n], (n + 1, 0), value=v) for v in (-1, -2))
                equal = queries[:, -last:][:, rows, None] == keys[:, None, :known]
                same = equal if same is None else same & equal
                gained = torch.where(same, more, 0.0)
                total = gained if total is None else total + gained
            return total.exp()

        def losses(self, losses: Tensor, states: Tensor, targets: Tensor) -> Tensor:
            found, ids = [], F.pad(targets[:, :-1], (1, 0))
            for rows, known, masses in self.tiles(states, states.shape[1]):
                masses = masses * self.gain(ids, rows, known, ids.shape[1])
                right = torch.where(targets[:, rows, None] == targets[:, None, :known], masses, 0.0).sum(-1)
                found.append(masses.sum(-1).log1p() - copying.log(right + (-losses[:, rows]).exp()))
            return torch.cat(found, 1)

        def with_masses(self, states: Tensor, ids: Tensor, last: int) -> Tensor:
            found = [self.of_tokens((masses * self.gain(ids, rows, known, last))[..., :-1], ids[:, 1:known])
                     for rows, known, masses in self.tiles(states, last)]
            return torch.cat((states[:, -last:], torch.cat(found, 1)), -1)

    after(GPT, "__init__", make)


@patch(longest=Within(1), recent=Within(1))
def recent_matches(longest: int = 3, recent: int = 8) -> None:
    """As matches, where the positions whose n tokens are those before the prediction, n = 1 .. longest, are found by
    sorting, and no two are compared: of the last `recent` of each n the m-th mass grows by exp(b_nm) times itself."""
    def make(model: GPT, config) -> None:
        if model.copying is None:
            raise ConfigError("patch recent_matches is for models that copy: set copy_dim")
        if config.vocab_size**longest >= 1 << 63:
            raise ConfigError(f"patch recent_matches: {longest} tokens of {config.vocab_size} pieces have no number "
                              "of 64 bits")
        model.copying.__class__ = Recalling
        model.copying.by_match = nn.Parameter(torch.full((longest, recent), -3.0))

    class Recalling(copying.Copying):
        def recalled(self, ids: Tensor, last: int) -> tuple[Tensor, Tensor]:
            """(positions [batch, last, longest * recent], whether there is one) of ids [batch, time] but the first."""
            found, at, context = [], torch.arange(ids.shape[1], device=ids.device), torch.zeros_like(ids)
            for n in range(1, longest + 1):
                context = torch.where(at < n, -1 - at, F.pad(context[:, :-1], (1, 0)) * self.vocab_size + ids)
                values, order = context.sort(stable=True, dim=1)
                before = F.pad(order, (recent, 0)).unfold(1, recent, 1)[:, :-1]
                same = F.pad(values, (recent, 0), value=-1 - len(at)).unfold(1, recent, 1)[:, :-1] == values[..., None]
                place = order.argsort(1)[:, -last:, None].expand(-1, -1, recent)
                found.append((before.gather(1, place), same.gather(1, place)))
            positions, there = (torch.cat(x, -1) for x in zip(*found, strict=True))
            return torch.where(there, positions, 0), there

        def gained(self, masses: Tensor, positions: Tensor, there: Tensor) -> Tensor:
            """By which each of the masses at some positions grows."""
            return torch.where(there, masses.gather(2, positions) * self.by_match.float().exp().flatten(), 0.0)

        def losses(self, losses: Tensor, states: Tensor, targets: Tensor) -> Tensor:
            positions, there = self.recalled(F.pad(targets[:, :-1], (1, 0)), targets.shape[1])
            following, found = targets.gather(1, positions.flatten(1)).view(positions.shape), []
            for rows, known, masses in self.tiles(states, states.shape[1]):
                gained, wanted = self.gained(masses, positions[:, rows], there[:, rows]), targets[:, rows, None]
                right = (torch.where(wanted == targets[:, None, :known], masses, 0.0).sum(-1)
                         + torch.where(wanted == following[:, rows], gained, 0.0).sum(-1))
                found.append((masses.sum(-1) + gained.sum(-1)).log1p()
                             - copying.log(right + (-losses[:, rows]).exp()))
            return torch.cat(found, 1)

        def with_masses(self, states: Tensor, ids: Tensor, last: int) -> Tensor:
            positions, there = self.recalled(ids, last)
            following = F.pad(ids, (0, 1)).gather(1, positions.flatten(1) + 1).view(positions.shape)
            found = []
            for rows, known, masses in self.tiles(states, last):
                gained = self.gained(masses, positions[:, rows], there[:, rows])
                found.append(self.of_tokens(masses[..., :-1], ids[:, 1:known])
                             .scatter_add(2, following[:, rows], gained))
            return torch.cat((states[:, -last:], torch.cat(found, 1)), -1)

    after(GPT, "__init__", make)


@patch()
def orthogonal() -> None:
    """Block matrices start orthogonal (arXiv 1312.6120), scaled to the norm they had; those that start at zero stay."""
    def start(model: GPT, config) -> None:
        for name, p in model.named_parameters():
            if name.startswith("blocks.") and name.endswith(".weight") and not p.is_meta and p.any():
                size = p.detach().norm()
                nn.init.orthogonal_(p)
                p.data.mul_(size / p.norm())

    after(GPT, "__init__", start)


# ---------------------------------------------------------------------------------------------------------------
# Latents and optimizer
# ---------------------------------------------------------------------------------------------------------------


@patch()
def bf16_latents() -> None:
    """Latents and momentum of the block matrices in bf16, as PR 367 had them: small updates are lost."""
    def shorten(self: Latents, *_) -> None:
        for bank in self.mine:
            if bank.optimizer == "muon":
                bank.latent = bank.latent.bfloat16()

    original = Optimizer.saved

    def saved(self: Optimizer, bank) -> dict[str, Tensor]:
        return {name: x.float() for name, x in original(self, bank).items()}  # checkpoints have no bf16

    after(Latents, "__init__", shorten)
    Optimizer.saved = saved


@patch(margin=Within(0, 1))
def hysteresis(margin: float = 0.1) -> None:
    """A ternary code becomes or ceases to be 0 where its latent is past the threshold by this share of it: latents that
    sit at the threshold keep their codes, which would change to and fro (Nagel et al., arXiv 2203.11086).
    For the absmean rule."""
    class Sticky(Ternary):
        def quantize(self, latent: Tensor):
            w, sizes = split_groups(latent.float(), self.group_size)
            magnitude, before = w.abs(), vars(self).get("before")
            mean = magnitude.sum(-1, keepdim=True) / sizes
            kept = 0.0 if before is None else margin * (1 - 2 * before.abs())
            codes = w.sign() * (magnitude > self.threshold * mean * (1 + kept))
            object.__setattr__(self, "before", codes)
            return self.store(codes, mean[..., 0], magnitude.amax(-1) > 0, latent.shape)

    def stick(self: Latents, *_) -> None:
        for bank in self.banks:
            if type(bank.format) is Ternary:
                bank.format = Sticky(**{f.name: getattr(bank.format, f.name) for f in fields(bank.format)})

    after(Latents, "__init__", stick)


@patch(rate=Within(0, 1))
def dampen(rate: float = 0.01) -> None:
    """Latents of ternary matrices are drawn to the values that they are stored as, by this share of the distance times
    the run's progress at each step (oscillation dampening: Nagel et al., arXiv 2203.11086, section 4)."""
    def draw(self: Trainer, plan) -> None:
        for bank in self.latents.mine:
            if isinstance(bank.format, Ternary):
                bank.latent.lerp_(bank.format.dequantize(bank.stored).to(bank.latent.dtype), rate * progress_of(self))

    after(Trainer, "after_step", draw)


def averaged(values: Callable[[Trainer], list[Tensor]], weight: Callable[[Trainer, int], float]) -> None:
    """Keep averages of values, one tensor per bank, moved by weight(trainer, averages so far) of each step (0: not),
    and let them be the latents in the end."""
    def refuse(self: Trainer, *_) -> None:
        raise ConfigError("resume='auto': an average is in no checkpoint, and would begin anew; train from the start, "
                          "under another --run-id")

    def follow(self: Trainer, plan) -> None:
        so_far = getattr(self, "averages", 0)
        share = weight(self, so_far)
        if share <= 0:
            return
        now = [x.float().clone() for x in values(self)]  # an average in bf16 would stand still
        self.averages = so_far + 1
        if self.averages == 1:
            self.average = now
        else:
            torch._foreach_lerp_(self.average, now, share)

    def use(self: Trainer) -> None:
        if not hasattr(self, "average"):
            raise ConfigError("no step was averaged: train longer, or begin to average earlier")
        for bank, x in zip(self.latents.mine, self.average, strict=True):
            bank.latent.copy_(x)
        self.latents.refresh()

    before(Trainer, "restore", refuse)
    after(Trainer, "after_step", follow)
    before(Trainer, "settle", use)


def latents_of(trainer: Trainer) -> list[Tensor]:
    return [bank.latent for bank in trainer.latents.mine]


def params_of(trainer: Trainer) -> list[Tensor]:
    return [torch.stack([p.detach().float() for p in bank.params]) for bank in trainer.latents.mine]


def progress_of(trainer: Trainer) -> float:
    """Of the count or the clock, whichever is further, in [0, 1]."""
    c = trainer.config
    return max(trainer.step / c.iterations if c.iterations else 0.0,
               trainer.elapsed / c.max_wallclock_seconds if c.max_wallclock_seconds else 0.0)


@patch(decay=Within(0, 1))
def ema(decay: float = 0.99) -> None:
    """The average of latents, exponential with this decay, goes through the quantizer in the end."""
    averaged(latents_of, lambda trainer, n: 1 - decay)


@patch(decay=Within(0, 1))
def ema_params(decay: float = 0.99) -> None:
    """The same average of dequantized weights: quantized again, it is another model."""
    averaged(params_of, lambda trainer, n: 1 - decay)


@patch(start=Within(0, 1))
def swa(start: float = 0.75) -> None:
    """The plain average of latents from this progress on (arXiv 1803.05407), every step, through the quantizer."""
    averaged(latents_of, lambda trainer, n: 1 / (n + 1) if progress_of(trainer) >= start else 0.0)


@patch(decay=Within(0, 1), commitment=Within(0))
def codebook(decay: float = 0.99, commitment: float = 0.0) -> None:
    """How fast the codebooks of the format codebookK follow the weights, and the weight of their commitment loss."""
    Codebook.DECAY, Codebook.COMMITMENT = decay, commitment


def part_settings(config: train_gpt.Config, name: str, part: str, kind: str, group: int = -1) -> train_gpt.Config:
    """The settings by which part_format stores a matrix."""
    if f".{part}." not in f".{name}":
        return config
    return replace(config, matrix_format=kind, group_size=config.group_size if group < 0 else group)


def settings_of(texts: Sequence[str], config: train_gpt.Config, name: str) -> train_gpt.Config:
    """The settings by which a run with these patches stores a matrix."""
    for function, values in map(parse, texts):
        if function is part_format:
            config = part_settings(config, name, *values)
    return config


@patch(part=("blocks", "attn", "mlp", "mlp.fc", "mlp.proj"), kind=("ternary", "five", "fp8", "bf16"), group=Within(-1))
def part_format(part: str, kind: str, group: int = -1) -> None:
    """Some block matrices are stored in another format than matrix_format; or, group not -1, with other groups than
    group_size (0: one per matrix). Latents stacks matrices of one shape: of two formats it would take the first."""
    original, make = train_gpt.format_of, Latents.make_bank

    def format_of(config: train_gpt.Config, name: str, ndim: int) -> train_gpt.Format:
        return original(part_settings(config, name, part, kind, group) if ndim == 2 else config, name, ndim)

    def make_bank(self: Latents, config: train_gpt.Config, rank: int, optimizer: str, members: list, grad: Tensor):
        if len({str(format_of(config, name, param.ndim)) for name, param in members}) > 1:
            raise ConfigError(f"part_format: {', '.join(name for name, _ in members)}: one shape, two formats")
        return make(self, config, rank, optimizer, members, grad)

    train_gpt.format_of, Latents.make_bank = format_of, make_bank


@patch()
def unrounded_scales() -> None:
    """Training runs on exact scales of the ternary matrices, and only the file rounds them, to whatever scale_dtype
    is: the model scored is not the one trained. For the absmean rule."""
    original = Latents.refresh

    def refresh(self: Latents, quantized: float = 1.0, measure: bool = False):
        ternary = [bank for bank in self.banks if bank.format.kind == "ternary"]
        if not ternary or any(bank.format.rule != "absmean" for bank in ternary):
            raise ConfigError("unrounded_scales needs ternary matrices, and ternary_rule absmean")
        result = original(self, quantized, measure)
        for bank in ternary:
            if quantized == 1:
                stored = bank.stored
                groups, sizes = split_groups(bank.latent, bank.format.group_size)
                exact = groups.abs().sum(-1) / sizes[:, 0]
                codes, _ = split_groups(stored.codes.float(), bank.format.group_size)
                param = join_groups(codes * exact[..., None], stored.codes.shape).bfloat16()
                torch._foreach_copy_([p.data for p in bank.params], list(param.unbind()))
        return result

    Latents.refresh = refresh


@patch(kind=("polar", "rows"))
def muon(kind: str) -> None:
    """Muon's orthogonalisation: polar (Polar Express coefficients, arXiv 2505.16932, table 1), or rows (rows of the
    momentum are normalised first, as PR 640 has it)."""
    original = tern_muon.newton_schulz
    # Of the method for five steps from singular values in [0.001, 1], with the paper's safety factor of 1.01.
    coefficients = [(8.28721201814563, -23.595886519098837, 17.300387312530933),
                    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
                    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
                    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
                    (2.300652019954817, -1.6689039845747493, 0.4188073119525673)]

    def polar(g: Tensor, steps: int) -> Tensor:
        (x,) = kernels.factors(g.bfloat16())
        tall = x.shape[-2] > x.shape[-1]
        if tall:
            x = x.mT
        x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-7)
        for a, b, c in coefficients[:steps]:
            xx = x @ x.mT
            x = a / 1.01 * x + (b / 1.01**3 * xx + c / 1.01**5 * xx @ xx) @ x
        return x.mT if tall else x

    def rows(g: Tensor, steps: int) -> Tensor:
        return original(g / (g.norm(dim=-1, keepdim=True) + 1e-7), steps)

    tern_muon.newton_schulz = {"polar": polar, "rows": rows}[kind]


@patch(kind=("linear", "cosine", "sqrt"), floor=Within(0, 1))
def warmdown(kind: str = "linear", floor: float = 0.0) -> None:
    """The shape of the warmdown, cosine, sqrt (1 - sqrt of its progress) or linear, and the least learning rate."""
    shapes = {"linear": lambda x: x, "cosine": lambda x: (1 - math.cos(math.pi * x)) / 2,
              "sqrt": lambda x: 1 - math.sqrt(1 - x)}
    original = train_gpt.schedule

    def schedule(config, step: int, progress: float):
        plan = original(config, step, progress)
        if config.lr_warmup_steps and step < config.lr_warmup_steps:
            return plan
        return replace(plan, lr_scale=floor + (1 - floor) * shapes[kind](plan.lr_scale))

    train_gpt.schedule = schedule


@patch(sequences=Within(1), damp=Within(0))
def gptq(sequences: int = 32, damp: float = 0.01) -> None:
    """Codes of the block matrices found one input column after the other, each column's error made up for by the
    columns to come (GPTQ, arXiv 2210.17323, algorithm 1), after training, on training tokens. Scales are those of
    rounding to nearest. Ternary and int formats."""
    def settle(self: Trainer) -> None:
        seq_len = self.config.train_seq_len
        ids, _ = self.loader.batch(sequences, seq_len, 0, self.rank, self.world)
        inputs: dict[str, Tensor] = {}

        def watch(name: str):
            def hook(_module, args):
                x = args[0].detach().flatten(0, -2).double()
                inputs[name] = inputs.get(name, 0) + x.mT @ x
            return hook

        def through_linear(self_attention: Attention, x, cos, sin, last):
            """The forward reads three matrices in one product: give the three its input."""
            for part in (self_attention.c_q, self_attention.c_k, self_attention.c_v):
                part(norm(x))

        hooks = [m.register_forward_pre_hook(watch(n)) for n, m in self.model.named_modules() if isinstance(m, Linear)]
        hooks += [block.attn.register_forward_pre_hook(lambda m, args: through_linear(m, *args))
                  for block in self.model.blocks]
        self.latents.refresh(0.0)  # inputs as the full-precision model has them
        fuses, train_gpt.fuses = train_gpt.fuses, lambda *_: False  # a fused kernel has no module whose input is seen
        with torch.no_grad():
            self.model.hidden(ids.to(self.device))
        train_gpt.fuses = fuses
        for hook in hooks:
            hook.remove()
        self.quantized = 0.0  # so that the params are made anew
        original(self)
        for bank in self.latents.mine:
            if bank.optimizer != "muon" or isinstance(bank.format, Float):
                continue
            if bank.format.kind not in ("ternary", "five", "int") or getattr(bank.format, "threshold", 0.5) != 0.5:
                raise ConfigError(f"gptq rounds to the nearest of evenly spaced values, not {bank.format}")
            for i, name in enumerate(bank.names):
                codes = compensate(bank.latent[i], bank.stored.codes[i], bank.stored.scales[i], bank.format,
                                   inputs[name.removesuffix(".weight")], damp)
                bank.stored.codes[i].copy_(codes)
            param = bank.format.dequantize(bank.stored)
            torch._foreach_copy_([p.data for p in bank.params], list(param.unbind()))

    original = Trainer.settle
    Trainer.settle = settle


def compensate(latent: Tensor, codes: Tensor, scales: Tensor, fmt, hessian: Tensor, damp: float) -> Tensor:
    """GPTQ's codes, int8 [rows, cols], of a latent [rows, cols] for inputs with this second moment [cols, cols]."""
    w, cols = latent.double().clone(), latent.shape[1]
    values = decode_scales(scales, fmt.scale).double()
    size = fmt.group_size or cols
    scale = values.repeat_interleave(size, dim=1)[:, :cols] if fmt.group_size else values.expand(len(w), cols)
    limit = 2 ** (fmt.bits - 1) - 1 if fmt.kind == "int" else {"ternary": 1, "five": 2}[fmt.kind]
    hessian = hessian + damp * hessian.diagonal().mean() * torch.eye(cols, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    out = torch.empty_like(codes)
    for j in range(cols):
        s = scale[:, j]
        code = torch.where(s > 0, (w[:, j] / torch.where(s > 0, s, 1.0)).round().clamp(-limit, limit), 0.0)
        out[:, j] = code.to(torch.int8)
        error = (w[:, j] - code * s) / upper[j, j]
        w[:, j:] -= error[:, None] * upper[j, j:]
    return out


# ---------------------------------------------------------------------------------------------------------------
# Scoring
# ---------------------------------------------------------------------------------------------------------------


@patch(scorer=True, sequences=Within(1))
def temperature(sequences: int = 64) -> None:
    """Logits divided by the temperature that makes the loss of training tokens least (Guo et al., arXiv 1706.04599)."""
    original = eval_bpb.evaluate

    def evaluate(model, tokens, counter, seq_len, *args, **kwargs):
        if not hasattr(model, "temperature"):
            model.temperature = best_temperature(model, seq_len, sequences)
            head = model.head
            model.head = lambda hidden: head(hidden) / model.temperature
        return original(model, tokens, counter, seq_len, *args, **kwargs)

    eval_bpb.evaluate = evaluate


@torch.inference_mode()
def best_temperature(model, seq_len: int, sequences: int) -> float:
    """By bisection on the sign of the loss's slope over the first training sequences of the data being scored."""
    shard = read_shard(TRAINING_SHARDS[0])[: sequences * seq_len + 1]
    ids = torch.from_numpy(np.asarray(shard).astype(np.int64))
    logits = torch.cat([model.head(model.hidden(x)) for x in ids[:-1].view(-1, seq_len).split(8)]).flatten(0, 1)
    targets, low, high = ids[1:], 0.5, 2.0
    for _ in range(20):
        middle = (low * high) ** 0.5
        at = [float(F.cross_entropy(logits / t, targets)) for t in (middle / 1.001, middle * 1.001)]
        low, high = (middle, high) if at[1] < at[0] else (low, middle)
    return (low * high) ** 0.5


TRAINING_SHARDS: list = []  # of the data that are scored; program.py knows them


@patch(scorer=True, what=("all", "vectors", "scales", "none"), chunk=Within(1), group=Within(1))
def ttt(what: str, lr: float = 0.001, chunk: int = 4096, group: int = 128) -> None:
    """Score-first test-time training: the stream is scored by windows as ever, and after each chunk of it, never
    before, a step of SGD with momentum 0.9 is taken on each of its sequences. what: all params, vectors (all but
    matrices and embedding), scales (one factor for each group of the matrices and embedding, the codes staying as they
    are), or none, which must give the score of no training."""

    def evaluate(model, tokens, counter, seq_len, stride, batch_seqs=32, compiled=False, kept=None, learn=None):
        if learn is not None:
            raise ConfigError("--adapt and the patch ttt: the model learns in one way or the other")
        model = copy.deepcopy(model)
        learn = Descent(model, tokens, seq_len, chunk, what, lr, group)
        return metric.evaluate(model, tokens, counter, seq_len, stride, batch_seqs, learn=learn)

    eval_bpb.evaluate = evaluate


class Values:
    """A param that SGD moves as it is, in fp32: bf16 would lose the updates."""

    def __init__(self, param: Tensor, group: int):
        self.value = param.detach().float()

    def grad(self, grad: Tensor) -> Tensor:
        return grad.float()

    def param(self) -> Tensor:
        return self.value


class Factors(Values):
    """A param that SGD moves by one factor per group of inputs, 1 at first."""

    def __init__(self, param: Tensor, group: int):
        self.group, self.shape = group, param.shape
        self.start = split_groups(param.detach().float(), group)[0]
        self.value = torch.ones_like(self.start[..., :1])

    def grad(self, grad: Tensor) -> Tensor:
        return (split_groups(grad.float(), self.group)[0] * self.start).sum(-1, keepdim=True)

    def param(self) -> Tensor:
        return join_groups(self.start * self.value, self.shape)


class Descent(ScoreFirst):
    """SGD with momentum 0.9 on one sequence after the other, of the params that `what` names (ttt)."""

    def __init__(self, model: GPT, tokens: np.ndarray, seq_len: int, chunk: int, what: str, lr: float, group: int):
        super().__init__(model, tokens, seq_len, chunk)
        for name, p in model.named_parameters():
            is_vector = train_gpt.optimizer_of(name) == "scalar"
            p.requires_grad_({"all": True, "vectors": is_vector, "scales": not is_vector, "none": False}[what])
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.moved = [(Factors if what == "scales" else Values)(p, group) for p in self.trained]
        self.speed, self.lr = [torch.zeros_like(m.value) for m in self.moved], lr

    def step(self, ids: Tensor, targets: Tensor) -> None:
        for one, its in zip(ids.split(1), targets.split(1), strict=True) if self.trained else ():
            grads = torch.autograd.grad(self.model(one, its), self.trained)
            with torch.no_grad():
                for p, m, v, g in zip(self.trained, self.moved, self.speed, grads, strict=True):
                    m.value.sub_(v.mul_(0.9).add_(m.grad(g)), alpha=self.lr)
                    p.data.copy_(m.param())
