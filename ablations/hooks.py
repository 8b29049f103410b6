"""How a technique gets into the trainer: code that runs before or after one of its methods."""

from __future__ import annotations

import functools
from collections.abc import Callable


def before(owner: type, name: str, extra: Callable) -> None:
    """From now on run extra(self, *args) before the method called name."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def method(self, *args, **kwargs):
        extra(self, *args, **kwargs)
        return original(self, *args, **kwargs)

    setattr(owner, name, method)


def after(owner: type, name: str, extra: Callable) -> None:
    """From now on run extra(self, *args) after the method called name."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def method(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        extra(self, *args, **kwargs)
        return result

    setattr(owner, name, method)
