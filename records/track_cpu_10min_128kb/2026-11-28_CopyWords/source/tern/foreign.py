"""Environment variables of PR 367 (openai/parameter-golf) for techniques that this trainer does not have."""

from __future__ import annotations

from collections.abc import Mapping

from tern.settings import ConfigError

# Name -> the values under which nothing is lost (the first of them asks for nothing), or None for any; and why.
FOREIGN_ENV: dict[str, tuple[tuple[str, ...] | None, str]] = {
    "XSA_LAST_N": (("0",), "exclusive self-attention is not in this trainer (no gain was seen: LOG.md, negatives)"),
    "TIE_EMBEDDINGS": (("1",), "the embedding is always tied to the output head"),
    "CONTROL_TENSOR_NAME_PATTERNS": ((), "storage formats are chosen with matrix_format, embed_format, vector_format"),
    "TTT_ENABLED": (("0", "1"), "no test-time training: the score is of the model as stored (LOG.md, negatives)"),
    "TTT_LR": (None, "no test-time training"),
    "TTT_EPOCHS": (None, "no test-time training"),
    "TTT_CHUNK_TOKENS": (None, "no test-time training"),
    "EMBED_LR": (None, "used with untied embeddings only"),
    "HEAD_LR": (None, "used with untied embeddings only"),
}


def check_foreign(env: Mapping[str, str]) -> list[str]:
    """Notices about variables that have no effect here. Raises ConfigError on one that asks for what is not here."""
    notices = []
    for name, (allowed, why) in FOREIGN_ENV.items():
        value = env.get(name, "")
        if value == "":
            continue
        if allowed is not None and value not in allowed:
            raise ConfigError(f"environment {name}={value!r}: {why}; unset it")
        if allowed is None or value != allowed[0]:
            notices.append(f"{name}={value} has no effect here: {why}")
    return notices
