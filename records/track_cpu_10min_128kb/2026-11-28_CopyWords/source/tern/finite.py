"""Where the first number came from that is none."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def first_bad(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor that is not finite; None if all are."""
    return next((name for name, x in tensors if not bool(torch.isfinite(x).all())), None)


@torch.no_grad()
def first_bad_output(model: nn.Module, *inputs: Tensor) -> str | None:
    """The name of the module whose output is the first that is not finite, "" for the model itself; None if all are."""
    bad: list[str] = []

    def look(name: str) -> Callable:
        def hook(_module, _inputs, output: Tensor) -> None:
            if not torch.isfinite(output).all():
                bad.append(name)
        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    try:
        model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return bad[0] if bad else None
