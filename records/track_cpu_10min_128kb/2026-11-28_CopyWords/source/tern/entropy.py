"""Entropy coding of a model's stored tensors: an adaptive model of the symbols and constriction's range coder.

    data = encode(arrays, kind)             # kind: ternary, five, int2 to int8, uint4 to uint8,
                                            # u8 or u16, as in pack.py
    arrays = decode(data, shapes, kind)

Encoder and decoder run the same model over the same history, so nothing but the coded bits is stored: no tables, no
side information. Arrays of one shape form a stack [layers, rows, cols]; the model walks down the rows, in segments of
columns, and codes a whole step (layers x rows of the step x columns of the segment) at once, so that numpy does the
work. A symbol is a few binary decisions, and each decision's probability is mixed, in the logistic domain, from what
the layer, the column and the row so far say (the mixing of PAQ: Mahoney 2005, "Adaptive Weighing of Context Models
for Lossless Data Compression"). A share of ones is always shrunk to that of its more general context.

All of it is integer arithmetic, also where numpy's floats are used: those hold integers below 2^53. So a file decodes
to the same symbols on every machine, whatever its vector units, thread count or mathematical library.
docs/format.md specifies the model exactly; a change here is a change of the file format. Integers of files from before
0.2.0 have a simpler model (widths=False).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import constriction
import numpy as np

ONE = 1 << 16  # probability 1 of what is coded
SHARE = 1 << 12  # probability 1 of a context's estimate
LOGIT = 1 << 10  # logit 1
MAX_LOGIT = 8 * LOGIT - 1
WEIGHT = 1 << 20  # mixing weight 1


def logit_tables() -> tuple[np.ndarray, np.ndarray]:
    """(logit of each share, int32 [4096]; probability of each logit + MAX_LOGIT + 1, int32 [16384]).

    No value lies near a rounding boundary, so every mathematical library gives these tables (a test has their CRC32).
    """
    stretch = [round(LOGIT * math.log((i + 0.5) / (SHARE - 0.5 - i))) for i in range(SHARE)]
    squash = [round(ONE / (1 + math.exp(-(i - MAX_LOGIT - 1) / LOGIT))) for i in range(2 * MAX_LOGIT + 2)]
    return np.array(stretch, np.int32), np.array(squash, np.int32)


STRETCH, SQUASH = logit_tables()


class DecodeError(ValueError):
    """Data that is not what encode gives."""


class Encoder:
    """Bits to bytes; its twin Decoder turns them back. Probabilities are integers out of ONE."""

    def __init__(self):
        self.coder = constriction.stream.queue.RangeEncoder()

    def bits(self, p: np.ndarray, bits: np.ndarray | None) -> np.ndarray:
        """Code bits (bool [n]) of which each is 1 with probability p / ONE (int [n])."""
        self.coder.encode(bits.astype(np.int32), FAMILY, tables(p))
        return bits

    def finish(self) -> bytes:
        return self.coder.get_compressed().astype("<u4").tobytes()


class Decoder:
    """Bytes to bits. It encodes again what it decodes, so that no other bytes than the encoder's are accepted."""

    def __init__(self, data):
        if len(data) % 4:
            raise DecodeError(f"entropy-coded data is in words of 4 bytes, not {len(data)} bytes")
        self.words = np.frombuffer(data, "<u4").astype(np.uint32)
        self.coder, self.again = constriction.stream.queue.RangeDecoder(self.words), Encoder()

    def bits(self, p: np.ndarray, bits: np.ndarray | None) -> np.ndarray:
        probabilities = tables(p)
        try:
            symbols = self.coder.decode(FAMILY, probabilities)
        except (ValueError, AssertionError) as e:
            raise DecodeError(f"entropy-coded data is not valid ({e})") from None
        self.again.coder.encode(symbols, FAMILY, probabilities)
        return symbols.astype(bool)

    def finish(self) -> None:
        if not np.array_equal(self.again.coder.get_compressed(), self.words):
            raise DecodeError("entropy-coded data goes on after the last symbol, or is not what its symbols encode to")


FAMILY = constriction.stream.model.Categorical(perfect=False)


def tables(p: np.ndarray) -> np.ndarray:
    """Probabilities of 0 and 1 as constriction takes them, float64 [n, 2]: multiples of 2^-16, exact."""
    out = np.empty((p.size, 2))
    np.multiply(p, 1 / ONE, out=out[:, 1])
    np.subtract(1.0, out[:, 1], out=out[:, 0])
    return out


class Weights:
    """Weights of a mixed decision's inputs, trained online by Newton's method with a diagonal Hessian."""

    START, TRUST = 3 * WEIGHT // 10, 8 << 20  # what a weight is at first, and how much curvature backs that

    def __init__(self, inputs: int):
        self.weights, self.curvature = [self.START] * inputs, [self.TRUST] * inputs

    def mix(self, base: np.ndarray, inputs: list[np.ndarray]) -> np.ndarray:
        """Probability of 1, int32, of logits base + weights * inputs (int32, of shapes that broadcast)."""
        z = base + (MAX_LOGIT + 1)
        for weight, x in zip(self.weights, inputs, strict=True):
            z = z + ((x * (weight >> 8)) >> 12)
        return SQUASH.take(z, mode="clip")

    def learn(self, inputs: list[np.ndarray], error: np.ndarray, taken: np.ndarray) -> None:
        """error: bit * ONE - probability where the decision was taken, else 0; int32 [layers, rows, cols]."""
        sums = {shape: [reduced(y, shape).ravel().astype(np.float64) for y in (error, taken)]
                for shape in {x.shape for x in inputs}}
        for i, x in enumerate(inputs):
            e, n = sums[x.shape]
            x = x.ravel().astype(np.float64)  # sums of at most 2^19 products below 2^31: exact, in any order
            self.curvature[i] += int((x * n) @ x) >> 2  # variance of a bit: at most 1/4
            step = (int(x @ e) << 14) // self.curvature[i]
            self.weights[i] = min(max(self.weights[i] + step, -2 * WEIGHT), 4 * WEIGHT)


def reduced(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """x summed over the dimensions that are 1 in shape."""
    axes = tuple([i for i in range(3) if shape[i] < x.shape[i]])
    return np.add.reduce(x, axes, np.int64, keepdims=True) if axes else x


class Counts:
    """How often a decision was 1, and how often it was taken, in each of some contexts: integers, as float64."""

    def __init__(self, *shape: int):
        self.ones, self.total = np.zeros(shape), np.zeros(shape)
        self.flat_ones, self.flat_total = self.ones.reshape(-1), self.total.reshape(-1)  # views
        self.strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]

    def rest(self, *at) -> np.ndarray:
        """What `each` takes: all of a context but its node, from an index or an array of them for each dimension."""
        return sum(i * stride for i, stride in zip(at, self.strides[1:], strict=True))

    def each(self, node: np.ndarray, rest: np.ndarray | int = 0) -> np.ndarray:
        """Contexts of lanes as they lie in the flat views."""
        where = node * self.strides[0]
        return where + rest if isinstance(rest, np.ndarray) or rest else where

    def share(self, at, parent, strength: int) -> np.ndarray:
        """Estimate, int32 out of SHARE: the share of ones, shrunk to `parent` as if that were `strength` decisions.

        at: contexts as numpy indexes them, or one array of them from `each`.
        """
        flat = isinstance(at, np.ndarray)
        x = (self.flat_ones.take(at) if flat else self.ones[at]) * SHARE
        x += strength * parent
        x /= (self.flat_total.take(at) if flat else self.total[at]) + strength
        return x.astype(np.int32)  # rounds down, exactly: numerators below 2^53, quotients below 2^12

    def add(self, at, bits: np.ndarray, taken: np.ndarray) -> None:
        """Count decisions, bool or int [layers, rows, cols], in contexts [layers, rows or 1, cols or 1]."""
        shape = self.ones[at].shape
        self.ones[at] += reduced(bits, shape)
        self.total[at] += reduced(taken, shape)

    def add_each(self, at, bits: np.ndarray) -> None:
        """One decision per lane, whose contexts are `at`, of `each`; lanes may share one."""
        at = at.reshape(-1)  # add.at is several times as fast on one dimension and one type
        np.add.at(self.flat_ones, at, bits.reshape(-1).astype(np.float64, copy=False))
        np.add.at(self.flat_total, at, 1.0)


def logit(share: np.ndarray) -> np.ndarray:
    return STRETCH.take(share)


LAYER, COLUMN, ROW, REFERENCE = 64, 64, 128, 16  # observations that the more general estimate counts for
MIN_SEGMENT = 16  # columns: a row is coded in several pieces, so that the later ones know of the first
MAX_COLUMNS = 1 << 18  # layers times columns, for exact sums and little memory
MAX_CORRELATED = 256  # columns: wider matrices gain 0.05% from it (LOG.md), for time with the cube of the width
REFERENCES, DISTANCES = 1024, 16  # earlier rows that one may resemble, and how finely the resemblance is told
WIDTHS, OWN = 48, 16  # classes of how wide a row's codes spread; columns that the rows above count for
FINE, FINE_BEFORE = 5, 4  # bits of an integer code that have contexts; without widths
MIN_P = 32  # the least probability, out of ONE, of a bit that is not mixed


class Model:
    """The adaptive model of one stream; `walk` codes a stack, and each kind of symbol has its own `step`."""

    # A step costs as much as some hundred symbols, so it takes several rows if they are short or very many.
    segments, min_lanes, max_steps = 8, 256, 1 << 10
    low: int  # the smallest symbol
    high: int  # and the largest

    def __init__(self, coder: Encoder | Decoder, nodes: int, detailed: int | None = None):
        """nodes: decisions there are; detailed: those, from 0 on, that have contexts of their own (None: all)."""
        self.coder, self.detailed = coder, nodes if detailed is None else detailed
        self.everywhere = Counts(nodes, 1, 1, 1)
        self.everywhere.ones += 1
        self.everywhere.total += 2
        self.weights: dict[tuple, Weights] = {}

    def start(self, layers: int, rows: int, cols: int) -> None:
        """Forget the contexts of the last stack; what holds everywhere stays."""
        self.layer, self.column = Counts(self.detailed, layers, 1, 1), Counts(self.detailed, layers, 1, cols)
        self.rests: dict[tuple[int, int], tuple] = {}
        self.seen = 0  # rows

    def start_rows(self, block: slice) -> None:
        """Forget the contexts of the last rows."""
        self.height = block.stop - block.start
        # A row of one segment never learns from itself.
        self.row = Counts(self.detailed, self.layer.ones.shape[1], self.height, 1) if self.segments > 1 else None

    def end_rows(self, block: slice, rows: np.ndarray) -> None:
        self.seen = block.stop

    def step(self, block: slice, columns: slice, truth: np.ndarray | None, done: np.ndarray) -> np.ndarray:
        """Code the symbols of a step, int32 [layers, rows, cols]; done: all columns of its rows, so far."""
        raise NotImplementedError

    def decide(self, node, columns: slice, level, truth: np.ndarray | None, active: np.ndarray | None = None,
               more: Sequence[np.ndarray] = ()) -> np.ndarray:
        """Code one decision in each lane of a step, or in the active ones; bool [layers, rows, cols].

        node: which decision, an int, or an array that names each lane's. level: chooses the weights. truth: the
        answers, None when decoding. more: further inputs, logits in excess of the layer's.
        """
        shape = self.layer.ones.shape[1], self.height, columns.stop - columns.start
        alike = isinstance(node, int)
        if alike:
            at_all, at_layer, at_row, at_column = node, node, node, (node, slice(None), slice(None), columns)
        else:
            at_all, of_layer, of_row, of_column = self.everywhere.each(node), *self.rests_of(columns)
            at_layer, at_row, at_column = (counts.each(node, rest) for counts, rest in (
                (self.layer, of_layer), (self.row, of_row), (self.column, of_column)))
        layer = self.layer.share(at_layer, self.everywhere.share(at_all, 0, 0), LAYER)
        base = logit(layer)
        by_row = np.zeros((1, 1, 1), np.int32) if self.row is None else logit(self.row.share(at_row, layer, ROW)) - base
        inputs = [by_row, logit(self.column.share(at_column, layer, COLUMN)) - base, *more]
        weights = self.weights.setdefault((level, self.seen.bit_length()), Weights(len(inputs)))
        p = weights.mix(base, inputs)
        p = p if p.shape == shape else np.broadcast_to(p, shape)
        if active is None:
            bits = self.coder.bits(p.ravel(), None if truth is None else truth.ravel()).reshape(shape)
            taken, error = np.ones(shape, bool), bits * np.int32(ONE) - p
        else:
            bits = np.zeros(shape, bool)
            bits[active] = self.coder.bits(p[active], None if truth is None else truth[active])
            taken, error = active, (bits * np.int32(ONE) - p) * active
        weights.learn(inputs, error, taken)
        if alike:
            self.column.add(at_column, bits, taken)
            ones, total = reduced(bits, (shape[0], shape[1], 1)), reduced(taken, (shape[0], shape[1], 1))
            for counts in (self.row, self.layer, self.everywhere):
                if counts is not None:
                    counts.add(node, ones, total)
        else:
            ones = bits.astype(np.float64)
            for counts, at in ((self.column, at_column), (self.row, at_row), (self.layer, at_layer),
                               (self.everywhere, at_all)):
                counts.add_each(at, ones)
        return bits

    def rests_of(self, columns: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Counts.rest of a step's lanes in the counts by layer, row and column: the same in all rows of a stack."""
        key = self.height, columns.start
        if key not in self.rests:
            layers, rows, cols = np.ogrid[: self.layer.ones.shape[1], : self.height, columns]
            self.rests[key] = (self.layer.rest(layers, 0, 0), self.row.rest(layers, rows, 0),
                               self.column.rest(layers, 0, cols))
        return self.rests[key]

    @classmethod
    def geometry(cls, layers: int, rows: int, cols: int) -> tuple[int, int]:
        """(segments of a row, rows per step) of a stack."""
        segments = max(min(cls.segments, cols // MIN_SEGMENT), 1)
        rows_per_step = max(cls.min_lanes * segments // (layers * cols), rows * segments // cls.max_steps)
        return segments, min(max(rows_per_step, 1), REFERENCES)

    def walk(self, stack: np.ndarray | None, shape: tuple[int, int, int]) -> np.ndarray:
        """Code a stack (integers [layers, rows, cols], None when decoding) and return it, int32."""
        self.start(*shape)
        _, rows, cols = shape
        segments, rows_per_step = self.geometry(*shape)
        edges = [cols * i // segments for i in range(segments + 1)]
        out = np.empty(shape, np.int32)
        for first in range(0, rows, rows_per_step):
            block = slice(first, min(first + rows_per_step, rows))
            self.start_rows(block)
            for a, b in zip(edges, edges[1:], strict=False):
                truth = None if stack is None else stack[:, block, a:b].astype(np.int32)
                out[:, block, a:b] = self.step(block, slice(a, b), truth, out[:, block])
            self.end_rows(block, out[:, block])
        return out


class Ternary(Model):
    """Codes in {-1, 0, 1}: is it zero, and which sign? The sign also follows from the columns' correlation."""

    def __init__(self, coder: Encoder | Decoder):
        super().__init__(coder, nodes=2)
        self.low, self.high = -1, 1

    def start(self, layers: int, rows: int, cols: int) -> None:
        super().start(layers, rows, cols)
        pays = 2 * MIN_SEGMENT <= cols <= min(MAX_CORRELATED, 4 * rows) and rows < 1 << 18  # sums stay below 2^52
        self.correlation = np.zeros((layers, cols, cols)) if pays else None

    def end_rows(self, block: slice, rows: np.ndarray) -> None:
        super().end_rows(block, rows)
        if self.correlation is not None:
            x = rows.astype(np.float64)
            self.correlation += x.mT @ x
            diagonal = np.arange(x.shape[2])
            self.correlation[:, diagonal, diagonal] = 0

    def step(self, block, columns, truth, done):
        nonzero = self.decide(0, columns, 0, None if truth is None else truth != 0)
        if not nonzero.any():
            return np.zeros(nonzero.shape, np.int32)
        hint = self.expected_sign(columns, done)
        positive = self.decide(1, columns, 1, None if truth is None else truth > 0, nonzero, [hint])
        return nonzero * (2 * positive.astype(np.int32) - 1)

    def expected_sign(self, columns: slice, done: np.ndarray) -> np.ndarray:
        """What the codes left of a segment say about its signs, through the columns' correlation C in earlier rows:
        left @ C @ C, which among the directions that C holds favours the strong ones. In units of its own spread."""
        before, c = columns.start, self.correlation
        if c is None or not before or not self.seen:
            return np.zeros((1, 1, 1), np.int32)
        x = (done[:, :, :before].astype(np.float64) @ c[:, :before]) @ c[:, :, columns]
        spread = math.isqrt(self.seen * self.seen * before * c.shape[1]) + 1
        return (x.astype(np.int64) * LOGIT // spread).clip(-MAX_LOGIT, MAX_LOGIT).astype(np.int32)


class Table(Model):
    """Integers of a few bits, most significant bit first, all of them modelled up to five: with steps of several times
    the finest the lowest is no noise. How far codes spread goes with the row (frequent tokens have finer steps), so a
    lane looks at the squares left of it and in the rows above. And rows that were hardly trained resemble one another,
    so it also looks at the value that its row's nearest earlier row has there."""

    min_lanes, max_steps = 64, 1 << 12

    def __init__(self, coder: Encoder | Decoder, low: int, high: int, widths: bool):
        self.low, self.high, self.bits = low, high, (high - low).bit_length()
        self.fine = min(self.bits, FINE if widths else FINE_BEFORE)
        nodes = 1 << self.fine
        self.near, self.wide = Counts(nodes, DISTANCES, nodes), Counts(nodes, WIDTHS) if widths else None
        super().__init__(coder, nodes=1 << self.bits, detailed=nodes)

    def start(self, layers: int, rows: int, cols: int) -> None:
        super().start(layers, rows, cols)
        self.past = np.zeros((layers, min(rows, REFERENCES), cols))
        self.square = np.full((layers, 1), 256, np.int64)  # mean square of the rows above, in units of 1/256

    def start_rows(self, block: slice) -> None:
        super().start_rows(block)
        self.apart = np.zeros((len(self.past), self.height, min(self.seen, REFERENCES)))  # squared distance
        self.squares = np.zeros(self.apart.shape[:2], np.int64)  # sums over the columns so far

    def end_rows(self, block: slice, rows: np.ndarray) -> None:
        super().end_rows(block, rows)
        self.past[:, np.arange(block.start, block.stop) % REFERENCES] = self.coarse(rows)
        mean = 256 * self.squares.sum(1, keepdims=True) // (rows.shape[1] * rows.shape[2])
        self.square = (self.square + mean) >> 1 if block.start else mean

    def width(self, columns: slice) -> np.ndarray:
        """How far the codes of each row may spread, int64 [layers, rows, 1]: twice the log2 of their mean square."""
        mean = (256 * self.squares + OWN * self.square) // (columns.start + OWN)
        return np.frexp(mean * mean + 0.0)[1].astype(np.int64)[:, :, None]  # below 2^44: a code is at most 127

    def coarse(self, x: np.ndarray) -> np.ndarray:
        """Codes, their highest bits alone."""
        return (x - self.low) >> (self.bits - self.fine)

    def reference(self, columns: slice) -> tuple[np.ndarray, np.ndarray]:
        """(how far, value) of each lane in its row's nearest earlier row."""
        if not self.seen:
            return np.zeros((1, 1, 1), np.int64), np.zeros((1, 1, 1), np.int64)
        nearest = self.apart.argmin(2)
        far = np.take_along_axis(self.apart, nearest[:, :, None], 2).astype(np.int64)
        far = DISTANCES - 1 if not columns.start else np.frexp(far * 8 // columns.start + 0.0)[1]
        value = self.past[np.arange(len(self.past))[:, None], nearest, columns].astype(np.int64)
        return np.broadcast_to(np.minimum(far, DISTANCES - 1), value.shape[:2] + (1,)), value

    def step(self, block, columns, truth, done):
        (far, value), width = self.reference(columns), self.width(columns)
        shape = done.shape[0], done.shape[1], columns.stop - columns.start
        node, out = np.ones(shape, np.int64), None
        offset = None if truth is None else truth - self.low
        near, wide = self.near.rest(far, value), None if self.wide is None else self.wide.rest(width)
        for bit in range(self.bits - 1, -1, -1):
            everywhere = self.everywhere.each(node)
            general = self.everywhere.share(everywhere, 0, 0)
            answer = None if offset is None else (offset >> bit & 1).astype(bool)
            if bit >= self.bits - self.fine:
                contexts = [(self.near, self.near.each(node, near))]
                if self.wide is not None:
                    contexts.append((self.wide, self.wide.each(node, wide)))
                hints = [logit(counts.share(at, general, REFERENCE)) - logit(general) for counts, at in contexts]
                out = self.decide(node, columns, self.bits - bit, answer, more=hints)
                for counts, at in contexts:
                    counts.add_each(at, out)
            else:  # the low bits of wide codes are nearly noise
                p = (general * (ONE // SHARE)).clip(MIN_P, ONE - MIN_P).ravel()
                out = self.coder.bits(p, None if answer is None else answer.ravel()).reshape(shape)
                self.everywhere.add_each(everywhere, out)
            node = node << 1 | out
        x = (node - (1 << self.bits) + self.low).astype(np.int32)
        self.squares += np.square(x, dtype=np.int64).sum(2)
        if self.seen:
            mine, past = self.coarse(x).astype(np.float64), self.past[:, : self.apart.shape[2], columns]
            self.apart += (past * past).sum(2)[:, None] - 2 * (mine @ past.mT) + (mine * mine).sum(2)[:, :, None]
        return x


class Classes:
    """Magnitudes 0 to `limit` in classes, one per power of two, below 256 exact up to 8; lower bits come after it."""

    def __init__(self, limit: int):
        exact = min(limit, 8 if limit < 256 else 1)
        lows = [*range(exact + 1), *(1 << k for k in range(exact.bit_length(), limit.bit_length()))]
        sizes = [high - low for low, high in zip(lows, [*lows[1:], limit + 1], strict=True)]
        self.lows, self.extra = np.array(lows, np.int32), np.array([(size - 1).bit_length() for size in sizes])
        self.of = np.repeat(np.arange(len(lows)), sizes)  # class of each magnitude


class Predicted(Model):
    """Numbers that are near the ones above them: coded is what they exceed a running mean of their column by."""

    segments, min_lanes, max_steps = 1, 4, 1 << 8  # short streams, where every row teaches
    RATE = 5  # the mean forgets over about 2^5 rows

    def __init__(self, coder: Encoder | Decoder, high: int):
        self.classes, self.low, self.high = Classes(high), 0, high
        self.within = Counts(len(self.classes.lows), 16, 8)
        self.within.ones += 1
        self.within.total += 2
        self.first = high // 2
        super().__init__(coder, nodes=len(self.classes.lows))

    def start(self, layers: int, rows: int, cols: int) -> None:
        super().start(layers, rows, cols)
        self.mean = np.full((layers, 1, cols), self.first << 8, np.int64)

    def end_rows(self, block: slice, rows: np.ndarray) -> None:
        super().end_rows(block, rows)
        for i in range(rows.shape[1]):
            age = min((block.start + i).bit_length(), self.RATE)
            self.mean += ((rows[:, i : i + 1].astype(np.int64) << 8) - self.mean) >> age
        self.first = int(self.mean.sum()) // (256 * self.mean.size)

    def step(self, block, columns, truth, done):
        expected = ((self.mean[:, :, columns] + 128) >> 8).astype(np.int32)
        excess = None if truth is None else truth - expected
        magnitude = None if excess is None else np.abs(excess)
        true_class = None if excess is None else self.classes.of[magnitude]
        sign = len(self.classes.lows) - 1
        cls, active = np.zeros((), np.int32), None  # an array of the step's shape after the first node
        for node in range(sign):
            active = self.decide(node, columns, node, None if true_class is None else true_class > node, active)
            cls = cls + active.astype(np.int32)
            if not active.any():
                break
        out = self.classes.lows[cls] + self.bits_within(magnitude, cls)
        positive = self.decide(sign, columns, sign, None if excess is None else excess > 0, out != 0)
        return expected + np.where(positive, out, -out)

    def bits_within(self, magnitude: np.ndarray | None, cls: np.ndarray) -> np.ndarray:
        """The position of each magnitude in its class (int32, of cls's shape), most significant bits first."""
        width, value = self.classes.extra[cls], np.zeros(cls.shape, np.int32)
        offset = None if magnitude is None else magnitude - self.classes.lows[cls]
        for place in range(int(width.max())):
            lanes = width > place
            prefix = value[lanes] if place < 3 else 0  # deeper bits are noise: one context
            at = self.within.each(cls[lanes], self.within.rest(place, prefix))
            p = self.within.flat_ones[at] * ONE // self.within.flat_total[at]
            p = p.astype(np.int32).clip(MIN_P, ONE - MIN_P)
            truth = None if offset is None else (offset[lanes] >> (width[lanes] - 1 - place) & 1).astype(bool)
            bits = self.coder.bits(p, truth)
            self.within.add_each(at, bits)
            value[lanes] = value[lanes] << 1 | bits
        return value


# ---------------------------------------------------------------------------------------------------------------
# Streams
# ---------------------------------------------------------------------------------------------------------------

FLOATS = ("u8", "u16")
Stack = tuple[list[int], tuple[int, int, int]]


def stacks(shapes: Sequence[tuple[int, ...]], floats: bool) -> list[Stack]:
    """(indices, [layers, rows, cols]) of arrays of one shape, in order of the shape's first occurrence.

    An array is a matrix of its last dimension's rows. Of floats, a matrix wider than high is taken as that many
    layers of one column, so that a vector is predicted along itself.
    """
    found: dict[tuple[int, int], list[int]] = {}
    for i, shape in enumerate(shapes):
        if math.prod(shape):
            found.setdefault((math.prod(shape[:-1]), shape[-1] if shape else 1), []).append(i)
    out: list[Stack] = []
    for (rows, cols), indices in found.items():
        along = floats and rows < cols
        most = max(MAX_COLUMNS // (rows if along else cols), 1)  # layers
        for first in range(0, len(indices), most):
            some = indices[first : first + most]
            out.append((some, (len(some) * rows, cols, 1) if along else (len(some), rows, cols)))
    return out


def models(coder: Encoder | Decoder, kind: str, widths: bool = True) -> list[tuple[Model, int, int]]:
    """(model, bits below its symbol, mask of its symbol) of a symbol's parts; a float is a magnitude and a sign.

    widths: whether integers are modelled by their rows' widths, or as before 0.2.0; nothing to other kinds.
    """
    if kind == "ternary":
        return [(Ternary(coder), 0, -1)]
    if kind == "five":
        return [(Table(coder, -2, 2, widths), 0, -1)]
    bits = int(kind.lstrip("uint"))
    if kind.startswith("int"):
        limit = (1 << bits - 1) - 1
        return [(Table(coder, -limit, limit, widths), 0, -1)]
    if kind.startswith("uint"):
        return [(Predicted(coder, (1 << bits) - 1), 0, -1)]
    return [(Predicted(coder, (1 << bits - 1) - 1), 0, (1 << bits - 1) - 1), (Predicted(coder, 1), bits - 1, 1)]


def suits(shapes: Sequence[tuple[int, ...]], kind: str) -> bool:
    """Whether no array is too wide to be modelled."""
    return all(layers * cols <= MAX_COLUMNS for _, (layers, _, cols) in stacks(shapes, kind in FLOATS))


def steps(shapes: Sequence[tuple[int, ...]], kind: str) -> int:
    """Steps of decoding, each of which takes about a millisecond, and more if it has thousands of lanes."""
    parts, total = models(Encoder(), kind), 0
    for _, shape in stacks(shapes, kind in FLOATS):
        for model, _, _ in parts:
            segments, rows_per_step = model.geometry(*shape)
            total += segments * -(-shape[1] // rows_per_step)
    return total


def free_symbols(kind: str) -> int:
    """Symbols whose decoding takes seconds: what a reader may grant a stream however short it is."""
    return 4096 * next(model.min_lanes for model, _, _ in models(Encoder(), kind))


def encode(arrays: Sequence[np.ndarray], kind: str, widths: bool = True) -> bytes:
    """The arrays' symbols as bytes, the same for the same input. widths: see models."""
    coder = Encoder()
    parts = models(coder, kind, widths)
    for indices, shape in stacks([a.shape for a in arrays], kind in FLOATS):
        stack = np.stack([arrays[i].reshape(-1) for i in indices]).reshape(shape)
        for model, shift, mask in parts:
            model.walk(stack if mask < 0 else stack.astype(np.int32) >> shift & mask, shape)
    return coder.finish()


def decode(data, shapes: Sequence[tuple[int, ...]], kind: str, widths: bool = True) -> list[np.ndarray]:
    """What encode was given, int32 in the given shapes. Raises DecodeError unless encode gives data again."""
    coder, out = Decoder(data), [np.zeros(shape, np.int32) for shape in shapes]
    parts = models(coder, kind, widths)
    for indices, shape in stacks(shapes, kind in FLOATS):
        stack = np.zeros(shape, np.int32)
        for model, shift, _ in parts:
            part = model.walk(None, shape)
            if part.min() < model.low or part.max() > model.high:
                raise DecodeError(f"entropy-coded data holds a symbol outside {model.low}..{model.high}")
            stack += part << shift
        for i, layer in zip(indices, np.split(stack, len(indices)), strict=True):
            out[i] = layer.reshape(shapes[i])
    coder.finish()
    return out
