"""Errors that the programs foresee: each message says what is wrong, where, and what to do."""

from __future__ import annotations


class Foreseen(ValueError):
    """Told to the user in one line. status: of the process; shared: whether all ranks of a run meet it together."""

    status, shared = 1, False
