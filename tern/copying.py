"""A head that copies: what followed an earlier position of the window may come again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tern.kernels import Linear, factors


def log(x: Tensor) -> Tensor:
    """Of probabilities; one that is less than fp32's least, as a large softcap allows, counts as that."""
    return x.clamp_min(torch.finfo(torch.float32).tiny).log()


class Copying(nn.Module):
    """Gives every earlier token of the window some of the probability of the next.

    The token after position j gets the mass m_j = exp(sharpness * (cos(q, k_j) - 1) + bias), by how alike the state
    that is to predict (q) and the one that predicted that token (k_j) are in `dim` learned directions; then

        p(v) = (softmax(logits)_v + sum of m_j where v follows j) / (1 + sum of all m_j).

    So a model that finds nothing alike is what it would be without. A pointer network (Vinyals et al., arXiv
    1506.03134) whose masses are shared with the vocabulary's by one sum, as in CopyNet (Gu et al., arXiv 1603.06393,
    section 3.3), and whose keys are states that have predicted, as in the neural cache (Grave et al., arXiv
    1612.04426, section 3).
    """

    def __init__(self, c: Any):
        """c: the trainer's Config."""
        super().__init__()
        self.vocab_size = c.vocab_size
        self.c_q, self.c_k = Linear(c.model_dim, c.copy_dim), Linear(c.model_dim, c.copy_dim)
        nn.init.orthogonal_(self.c_q.weight)
        self.c_k.weight.data.copy_(self.c_q.weight.data)  # alike states are found from the start
        self.sharpness_and_bias = nn.Parameter(torch.tensor([16.0, -2.0]))

    def keys(self, states: Tensor) -> Tensor:
        """[batch, time, dim] of normalised hidden states [batch, time, model_dim]."""
        return self.c_k(states)

    def masses(self, states: Tensor, last: int) -> Tensor:
        """Of what follows each position, for the prediction at each of the last ones: fp32 [batch, last, time]. Zero
        from the position itself on, of which nothing follows yet. Cosines are rounded to the dtype of the products."""
        q, k = (F.rms_norm(x, x.shape[-1:]) for x in (self.c_q(states[:, -last:]), self.keys(states)))
        alike = torch.matmul(*factors(q, k.mT)).float() / q.shape[-1]  # cosines
        sharpness, bias = self.sharpness_and_bias.float()
        at = torch.arange(k.shape[1], device=k.device)
        masses = (sharpness * (alike - 1) + bias).clamp_max(60.0).exp()  # no sum of them leaves fp32
        return torch.where(at < at[-last:, None], masses, 0.0)

    def losses(self, losses: Tensor, states: Tensor, targets: Tensor) -> Tensor:
        """Losses in nats, fp32 [batch, time], by those of the softmax alone, all states and the tokens that follow."""
        masses = self.masses(states, states.shape[1])
        found = torch.where(targets[:, :, None] == targets[:, None], masses, 0.0).sum(-1)
        return masses.sum(-1).log1p() - log(found + (-losses).exp())

    def with_masses(self, states: Tensor, ids: Tensor, last: int) -> Tensor:
        """The last states and the masses of all tokens, fp32 [batch, last, model_dim + vocab_size], in windows of ids
        [batch, time]; states may begin later, where keys are known."""
        masses, following = self.masses(states, last)[:, :, :-1], ids[:, 1:]
        if ids.is_cpu:
            of_tokens = masses.new_zeros(*masses.shape[:2], self.vocab_size)
            of_tokens.scatter_add_(2, following[:, None].expand(-1, last, -1), masses)
        else:  # where a scatter would add in any order, and give other bits each time
            of_tokens = masses @ (following[..., None] == torch.arange(self.vocab_size, device=ids.device)).float()
        return torch.cat((states[:, -last:], of_tokens), -1)

    def head(self, hidden: Tensor, logits: Callable[[Tensor], Tensor]) -> Tensor:
        """Logits of all tokens, fp32 [.., vocab_size], by what with_masses gave and the model's own, of states."""
        states, masses = hidden.tensor_split((hidden.shape[-1] - self.vocab_size,), -1)
        return log(logits(states.to(self.sharpness_and_bias.dtype)).softmax(-1) + masses)
