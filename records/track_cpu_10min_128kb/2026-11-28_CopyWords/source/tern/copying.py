"""A head that copies: what followed an earlier position of the window may come again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tern.kernels import Linear, factors

TILE = 512  # queries whose masses are there at once


def log(x: Tensor) -> Tensor:
    """Of probabilities; one that is less than fp32's least, as a large softcap allows, counts as that."""
    return x.clamp_min(torch.finfo(torch.float32).tiny).log()


class Copying(nn.Module):
    """Gives every earlier token of the window some of the probability of the next.

    The token after position j gets the mass m_j = exp(scale * ln(n + 1) * (cos(q, k_j) - 1) + bias), by how alike
    the state that is to predict (q, after n others) and the one that predicted that token (k_j) are in `dim` learned
    directions; then

        p(v) = (softmax(logits)_v + sum of m_j where v follows j) / (1 + sum of all m_j).

    So a model that finds nothing alike is what it would be without. A pointer network (Vinyals et al., arXiv
    1506.03134) whose masses are shared with the vocabulary's by one sum, as in CopyNet (Gu et al., arXiv 1603.06393,
    section 3.3), and whose keys are states that have predicted, as in the neural cache (Grave et al., arXiv
    1612.04426, section 3). The logarithm (as of Scalable-Softmax, arXiv 2501.19399) keeps what is not alike from having
    more mass where there is more of it, so that windows may be longer than those of training.
    """

    def __init__(self, c: Any):
        """c: the trainer's Config."""
        super().__init__()
        self.vocab_size = c.vocab_size
        self.c_q, self.c_k = Linear(c.model_dim, c.copy_dim), Linear(c.model_dim, c.copy_dim)
        nn.init.orthogonal_(self.c_q.weight)
        self.c_k.weight.data.copy_(self.c_q.weight.data)  # alike states are found from the start
        self.scale_and_bias = nn.Parameter(torch.tensor([2.5, -2.0]))

    def keys(self, states: Tensor) -> Tensor:
        """[batch, time, dim] of normalised hidden states [batch, time, model_dim]."""
        return self.c_k(states)

    def masses(self, q: Tensor, k: Tensor) -> Tensor:
        """Of what follows each position, of keys k [batch, time, dim], for the predictions at the last of them, by q
        [batch, queries, dim]: fp32 [batch, queries, time]. Zero from the position itself on, of which nothing follows
        yet. Cosines are rounded to the dtype of the products."""
        alike = torch.matmul(*factors(q, k.mT)).float() / q.shape[-1]  # cosines
        scale, bias = self.scale_and_bias.float()
        at = torch.arange(k.shape[1], device=k.device)
        others = at[-q.shape[1] :, None]
        masses = (scale * others.log1p() * (alike - 1) + bias).clamp_max(60.0).exp()  # no sum of them leaves fp32
        return torch.where(at < others, masses, 0.0)

    def tiles(self, states: Tensor, last: int) -> Iterator[tuple[slice, int, Tensor]]:
        """(which of the last positions, how many positions they know of, masses of those) for all of the last."""
        q, k = (F.rms_norm(x, x.shape[-1:]) for x in (self.c_q(states[:, -last:]), self.keys(states)))
        for start in range(0, last, TILE):
            rows = slice(start, min(start + TILE, last))
            known = k.shape[1] - last + rows.stop
            yield rows, known, self.masses(q[:, rows], k[:, :known])

    def losses(self, losses: Tensor, states: Tensor, targets: Tensor) -> Tensor:
        """Losses in nats, fp32 [batch, time], by those of the softmax alone, all states and the tokens that follow."""
        found = []
        for rows, known, masses in self.tiles(states, states.shape[1]):
            right = torch.where(targets[:, rows, None] == targets[:, None, :known], masses, 0.0).sum(-1)
            found.append(masses.sum(-1).log1p() - log(right + (-losses[:, rows]).exp()))
        return torch.cat(found, 1)

    def with_masses(self, states: Tensor, ids: Tensor, last: int) -> Tensor:
        """The last states and the masses of all tokens, fp32 [batch, last, model_dim + vocab_size], in windows of ids
        [batch, time]; states may begin later, where keys are known."""
        found = [self.of_tokens(masses[..., :-1], ids[:, 1:known]) for _, known, masses in self.tiles(states, last)]
        return torch.cat((states[:, -last:], torch.cat(found, 1)), -1)

    def of_tokens(self, masses: Tensor, following: Tensor) -> Tensor:
        """Sums of masses [batch, queries, n] of the same token, by the tokens [batch, n] that they are of: [batch,
        queries, vocab_size]."""
        if masses.is_cpu:
            sums = masses.new_zeros(*masses.shape[:2], self.vocab_size)
            return sums.scatter_add_(2, following[:, None].expand(masses.shape), masses)
        # on a GPU a scatter would add in any order, and give other bits each time
        return masses @ (following[..., None] == torch.arange(self.vocab_size, device=following.device)).float()

    def head(self, hidden: Tensor, logits: Callable[[Tensor], Tensor]) -> Tensor:
        """Logits of all tokens, fp32 [.., vocab_size], by what with_masses gave and the model's own, of states."""
        states, masses = hidden.tensor_split((hidden.shape[-1] - self.vocab_size,), -1)
        return log(logits(states.to(self.scale_and_bias.dtype)).softmax(-1) + masses)
