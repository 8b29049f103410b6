"""Score-first test-time training: a model that learns from the stream it scores, each token after its score."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from tern.shards import AuditError


class ScoreFirst:
    """What metric.evaluate calls with the number of positions scored so far: a step on the windows of seq_len tokens
    among them that it has not learned from, once these make up `every` positions, and a whole window.

    The model's params, which must not be inference tensors, change in place.
    """

    def __init__(self, model: nn.Module, tokens: np.ndarray, seq_len: int, every: int = 0):
        self.model, self.seq_len, self.every = model, seq_len, max(every, seq_len)
        self.stream = torch.from_numpy(np.asarray(tokens).astype(np.int64))
        self.learned, self.steps = 0, 0  # positions, and steps on them

    @torch.inference_mode(False)
    @torch.enable_grad()
    def __call__(self, scored: int) -> None:
        """Positions [0, scored) have their scores, so that tokens [0, scored] may be learned from."""
        if scored - self.learned < self.every:
            return
        windows = (scored - self.learned) // self.seq_len
        span = self.stream[self.learned : self.learned + windows * self.seq_len + 1]
        span = span.to(next(self.model.parameters()).device)
        self.learned, self.steps = self.learned + windows * self.seq_len, self.steps + 1
        self.step(span[:-1].view(windows, -1), span[1:].view(windows, -1))

    def step(self, ids: Tensor, targets: Tensor) -> None:
        """Learn from inputs and targets [windows, seq_len]."""
        raise NotImplementedError


class Adapter(ScoreFirst):
    """Adam (arXiv 1412.6980) on all params.

    rate: of each parameter, in units of its root mean square in the file, or of 1 where that is 0: matrices between
    norms may have any scale (LOG.md). The params are fp32 values, which begin at what the file holds, rounded to the
    dtype of the model: at a rate of 0 nothing changes. Raises AuditError when the loss of a step is not finite.
    """

    def __init__(self, model: nn.Module, tokens: np.ndarray, seq_len: int, rate: float):
        super().__init__(model, tokens, seq_len)
        self.rate, self.params = rate, [p.requires_grad_() for p in model.parameters()]
        self.values = [p.detach().float().clone() for p in self.params]
        each = [{"params": [x], "lr": rate * (float(x.square().mean().sqrt()) or 1.0)} for x in self.values]
        self.adam = torch.optim.Adam(each, betas=(0.9, 0.95), fused=True)

    def step(self, ids: Tensor, targets: Tensor) -> None:
        loss = self.model(ids, targets)
        if not bool(torch.isfinite(loss)):
            raise AuditError(f"the loss of what learns at a rate of {self.rate:g} is not finite after {self.steps - 1} "
                             "steps; give a lower rate")
        grads = torch.autograd.grad(loss, self.params)
        for value, grad in zip(self.values, grads, strict=True):
            value.grad = grad.float()
        self.adam.step()
        with torch.no_grad():
            torch._foreach_copy_([p.data for p in self.params], self.values)
