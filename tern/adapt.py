"""Score-first test-time training: a model that learns from the stream it scores, each token after its score."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn


class Adapter:
    """What metric.evaluate calls with the number of positions scored so far: one step of Adam (arXiv 1412.6980) on the
    windows of seq_len tokens among them that it has not learned from.

    rate: of each parameter, in units of its root mean square in the file: matrices between norms may have any scale
    (LOG.md). The model's params, which must not be inference tensors, change in place. They are the rounded form of
    fp32 values, as in training, which begin at what the file holds: at a rate of 0 nothing changes.
    """

    def __init__(self, model: nn.Module, tokens: np.ndarray, seq_len: int, rate: float):
        self.model, self.seq_len, self.learned, self.steps = model, seq_len, 0, 0
        self.stream = torch.from_numpy(np.asarray(tokens).astype(np.int64))
        self.params = [p.requires_grad_() for p in model.parameters()]
        self.values = [p.detach().float().clone() for p in self.params]
        each = [{"params": [x], "lr": rate * float(x.square().mean().sqrt())} for x in self.values]
        self.adam = torch.optim.Adam(each, betas=(0.9, 0.95), fused=True)

    @torch.inference_mode(False)
    @torch.enable_grad()
    def __call__(self, scored: int) -> None:
        """Positions [0, scored) have their scores, so that tokens [0, scored] may be learned from."""
        windows = (scored - self.learned) // self.seq_len
        if windows < 1:
            return
        span = self.stream[self.learned : self.learned + windows * self.seq_len + 1].to(self.params[0].device)
        self.learned, self.steps = self.learned + windows * self.seq_len, self.steps + 1
        self.step(span[:-1].view(windows, -1), span[1:].view(windows, -1))

    def step(self, ids: Tensor, targets: Tensor) -> None:
        """Learn from inputs and targets [windows, seq_len]."""
        grads = torch.autograd.grad(self.model(ids, targets), self.params)
        for value, grad in zip(self.values, grads, strict=True):
            value.grad = grad.float()
        self.adam.step()
        with torch.no_grad():
            torch._foreach_copy_([p.data for p in self.params], self.values)
