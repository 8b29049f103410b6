"""Where the bits of a score go: by the length of documents, by position in the window, in which text.

Made of the losses that every token had when it was scored (metric.evaluate, kept), so that nothing is computed twice;
lengths, positions and the score add up to the same nats and bytes. No torch is needed: the page of a run reads these
records (tern/report.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from tern.audits import document_bounds
from tern.tokenizers import ByteCounter

SHOWN_DOCUMENTS, SHOWN_TOKENS = 3, 320  # best and worst documents, and tokens of each
LEAST_BYTES = 200  # of a document that is shown: of two words any score is luck
PICTURE = 144  # rows and columns of a matrix that are shown, at most


@dataclass(frozen=True)
class Bin:
    """What was scored from low to high, both included: bytes of a document, or tokens of context in the window."""

    low: int
    high: int
    count: int  # of documents, or of tokens
    tokens: int
    bytes: int
    nats: float


@dataclass(frozen=True)
class Document:
    """A document, with [text, bytes, nats] of its first tokens; a run of byte tokens is one text."""

    number: int  # in the stream
    tokens: int
    bytes: int
    nats: float
    shown: list[tuple[str, int, float]]


@dataclass(frozen=True)
class Picture:
    """A ternary matrix: the codes of its first rows and columns, one of "-0+" each, and the zeros of all of them."""

    tensor: str
    shape: list[int]
    corner: list[str]
    zeros_of_rows: list[float]  # shares
    zeros_of_columns: list[float]


@dataclass(frozen=True)
class Spread:
    """Lengths and documents are of the sliding windows where there are some, positions always of the chunks."""

    seq_len: int
    documents_by: str  # "sliding" or "chunked"
    lengths: list[Bin]
    positions: list[Bin]
    best: list[Document]
    worst: list[Document]


def spread(tokens: np.ndarray, counter: ByteCounter, losses: Mapping[str, np.ndarray], seq_len: int,
           chunks: Iterable[tuple[int, int, int]]) -> Spread:
    """tokens: [n + 1]; losses: "chunked" and perhaps "sliding" -> nats, float64 [n]; chunks: the windows (start, end,
    score_from) of the former."""
    size = counter.count(tokens[:-1], tokens[1:])
    by = "sliding" if "sliding" in losses else "chunked"
    bounds = document_bounds(tokens, counter)
    # The first token of the stream is given, not scored; a document's first token is the end of the one before it, and
    # counts with the document that it begins.
    of_document = [np.add.reduceat(np.concatenate(([0], x)), bounds[:-1]) for x in (size, losses[by])]
    lengths, nats = of_document
    counts = np.diff(bounds)
    counts[0] -= 1
    order = by_score(lengths, nats)
    best, worst = order[:SHOWN_DOCUMENTS], order[::-1][: min(SHOWN_DOCUMENTS, max(len(order) - SHOWN_DOCUMENTS, 0))]

    def shown(number: int) -> Document:
        begin, end = max(int(bounds[number]), 1), min(int(bounds[number + 1]), int(bounds[number]) + SHOWN_TOKENS)
        scored = slice(begin - 1, end - 1)
        return Document(int(number), int(counts[number]), int(lengths[number]), float(nats[number]),
                        texts(tokens[begin:end], size[scored], losses[by][scored], counter))

    return Spread(seq_len, by, binned(lengths, counts, lengths, nats), by_position(size, losses["chunked"], chunks),
                  [shown(i) for i in best], [shown(i) for i in worst])


def by_score(size: np.ndarray, nats: np.ndarray) -> np.ndarray:
    """Numbers of documents that are long enough to be shown, by their bits per byte; of all, where none is."""
    chosen = np.flatnonzero(size >= min(LEAST_BYTES, size.max(initial=1)))
    return chosen[np.argsort(nats[chosen] / size[chosen], kind="stable")]


def by_position(size: np.ndarray, nats: np.ndarray, chunks: Iterable[tuple[int, int, int]]) -> list[Bin]:
    """By tokens of context that the predicted one had in its chunk."""
    context = np.zeros(len(nats), dtype=np.int64)
    for start, end, score_from in chunks:
        context[score_from:end] = np.arange(score_from + 1, end + 1) - start
    return binned(context, np.ones_like(context), size, nats)


def binned(values: np.ndarray, tokens: np.ndarray, size: np.ndarray, nats: np.ndarray) -> list[Bin]:
    """Sums over what has its value [n] in a bin; two bins an octave, those without any left out."""
    # The largest value is not alone in a bin: 512 tokens of context are with 363 to 511.
    place = np.floor(2 * np.log2(np.clip(values, 1, max(int(values.max(initial=0)) - 1, 1)))).astype(np.int64)
    bins = []
    for i in np.unique(place):
        inside = place == i
        bins.append(Bin(int(values[inside].min()), int(values[inside].max()), int(inside.sum()),
                        int(tokens[inside].sum()), int(size[inside].sum()), math.fsum(nats[inside])))
    return bins


def texts(ids: np.ndarray, size: np.ndarray, nats: np.ndarray, counter: ByteCounter) -> list[tuple[str, int, float]]:
    """The text of tokens [n] with its bytes and nats; tokens that are single bytes of a character come together."""
    sp, found, pending = counter.tokenizer, [], bytearray()
    first, spent = 0, np.concatenate(([0.0], np.cumsum(nats)))

    def flush(end: int) -> None:
        if pending:
            found.append((pending.decode(errors="replace"), len(pending), float(spent[end] - spent[first])))
            pending.clear()

    for i, token in enumerate(ids.tolist()):
        if sp.is_byte(token):
            first = first if pending else i
            pending.append(int(sp.id_to_piece(token)[3:5], 16))  # <0x0A>
            continue
        flush(i)
        text = "" if counter.boundary[token] else sp.id_to_piece(token).replace("\N{LOWER ONE EIGHTH BLOCK}", " ")
        if len(text.encode()) > size[i]:  # the space that follows a boundary is not in the text
            text = text.removeprefix(" ")
        found.append((text, int(size[i]), float(nats[i])))
    flush(len(ids))
    return found


def entropy(codes: np.ndarray) -> float:
    """Bits of a code if each were coded alone, by how often each value occurs; 0 without any."""
    shares = np.unique(codes, return_counts=True)[1] / max(codes.size, 1)
    return float(-(shares * np.log2(shares)).sum() + 0.0)


def picture(matrices: Mapping[str, np.ndarray]) -> Picture | None:
    """Of the largest matrix of codes, int8 in {-1, 0, 1}; None without any."""
    if not matrices:
        return None
    name = max(matrices, key=lambda name: matrices[name].size)
    codes = matrices[name]
    rows = ["".join("-0+"[code + 1] for code in row) for row in codes[:PICTURE, :PICTURE].tolist()]
    zeros = codes == 0
    return Picture(name, list(codes.shape), rows, zeros.mean(1).round(4).tolist(), zeros.mean(0).round(4).tolist())
