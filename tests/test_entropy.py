"""tern/entropy.py: round trips, golden bytes, independence of the machine, sizes, and the range coder below it.

    PYTHONPATH=. python tests/test_entropy.py      # prints GOLDEN anew, after a deliberate change of the format
"""

from __future__ import annotations

import hashlib
import math
import os
import statistics
import subprocess
import sys
import time
import zlib
from decimal import Decimal, localcontext
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pack
from tern import entropy
from tern.entropy import ONE, Decoder, Encoder

fast = pytest.mark.fast
KINDS = pack.CODECS["model"].kinds
SLOW = [kind for kind in KINDS if kind[0] == "u"]  # many decisions for each symbol, few symbols in a step


def kind_range(kind: str) -> tuple[int, int]:
    """The smallest and largest symbol."""
    return (0, 2 ** int(kind[1:]) - 1) if kind in entropy.FLOATS else pack.range_of(kind)


def filled(kind: str, shape, fill: str, seed: int = 0) -> np.ndarray:
    """An array of a kind, in the type that pack.py has for it."""
    (low, high), rng, n = kind_range(kind), np.random.default_rng(seed), math.prod(shape)
    spread = rng.integers(low, high, n, endpoint=True)
    flat = {
        "random": spread,
        "zeros": np.zeros(n, int),
        "lowest": np.full(n, low),
        "highest": np.full(n, high),
        "one sign": np.maximum(spread, 0) if low else spread // 2,
        "rare": np.where(rng.random(n) < 0.01, spread, 0),
        "extremes": np.where(np.arange(n) % 2, low, high),
        "ramp": low + np.arange(n) % (high - low + 1),
    }[fill]
    return flat.astype(pack.SYMBOLS[kind]).reshape(shape)


FILLS = ["random", "zeros", "lowest", "highest", "one sign", "rare", "extremes", "ramp"]


def check_round_trip(arrays: list[np.ndarray], kind: str) -> bytes:
    data, shapes = entropy.encode(arrays, kind), [a.shape for a in arrays]
    back = entropy.decode(data, shapes, kind)
    assert [x.shape for x in back] == shapes and all(x.dtype == np.int32 for x in back)
    assert all(np.array_equal(x, a) for x, a in zip(back, arrays, strict=True))
    return data


# Round trips --------------------------------------------------------------------------------------------------

SHAPES = {
    "none": [],
    "empty": [(0,), (3, 0), (0, 5), (2, 0, 3)],
    "scalar": [()],
    "one": [(1,)],
    "two scalars": [(), (1, 1), ()],
    "vector": [(70,)],
    "column": [(67, 1)],
    "row": [(1, 67)],
    "mixed": [(3, 5), (), (0, 4), (5, 3), (16,), (3, 5), (1, 1), (1, 16)],
    "alike": [(4, 33), (4, 33), (4, 33)],
    "many": [(2, 3)] * 40,
    "3-D": [(2, 3, 17), (6, 17), (3, 2, 17)],
    "around a segment": [(1, cols) for cols in (15, 16, 17, 31, 32, 33)],
    "around eight segments": [(1, 127), (1, 128), (1, 129)],
    "around fives": [(n,) for n in (4, 5, 6, 9, 10, 11)],
    "around a step": [(rows, 1) for rows in (3, 4, 5, 63, 64, 65)],
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_round_trip_of_shapes(shapes):
    """A kind of each model: of ternary codes, of a table with references, of excesses over a mean, and two of these."""
    for kind in ("ternary", "int4", "uint6", "u16"):
        data = check_round_trip([filled(kind, shape, "random", i) for i, shape in enumerate(shapes)], kind)
        assert bool(data) == any(map(math.prod, shapes)) and len(data) % 4 == 0, kind


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_of_values(kind):
    """Each filling alone, and all of them in one stream, whose statistics change under it."""
    shapes, every = [(6, 9), (5, 7)] if kind in SLOW else [(6, 36), (6, 36), (4, 64)], []
    for fill in FILLS:
        arrays = [filled(kind, shape, fill, i) for i, shape in enumerate(shapes)]
        every += arrays[-1:]
        check_round_trip(arrays, kind)
    check_round_trip(every, kind)


LARGE = {
    "more rows than one may refer to": ("int8", [(entropy.REFERENCES + 70, 3)]),
    "a wide row": ("ternary", [(1, 20_000)]),
    "a tall column": ("ternary", [(4_500, 1)]),
    "both, of integers": ("int2", [(1, 9_000), (4_500, 1)]),
    "around the widest that is correlated": ("ternary", [(3, entropy.MAX_CORRELATED), (3, entropy.MAX_CORRELATED + 1)]),
    "around the least that is correlated": ("ternary", [(8, 32), (8, 31), (7, 32)]),
    "around a segment": ("int8", [(2, cols) for cols in (15, 16, 17, 31, 32, 33)]),
    "around eight segments": ("int4", [(3, 127), (3, 128), (3, 129)]),
    "many layers": ("ternary", [(3,)] * 3000),
    "many layers of integers": ("int8", [(3,)] * 1000),
}


@pytest.mark.parametrize(("kind", "shapes"), LARGE.values(), ids=LARGE)
def test_round_trip_of_large_and_odd_shapes(kind, shapes):
    check_round_trip([filled(kind, shape, "random", i) for i, shape in enumerate(shapes)], kind)


def test_round_trip_of_the_widest_matrices_that_are_correlated():
    """A quarter as many rows as columns is enough."""
    wide = entropy.MAX_CORRELATED
    shapes = [(wide // 4 + more, cols) for more in (-1, 0, 5) for cols in (wide, wide + 1)]
    check_round_trip([filled("ternary", shape, "random", i) for i, shape in enumerate(shapes)], "ternary")


def test_round_trip_of_more_columns_than_one_stack_takes():
    """They are cut into several, whose layers begin anew."""
    shapes = [(2, entropy.MAX_COLUMNS // 2 - 1)] * 3
    assert [len(indices) for indices, _ in entropy.stacks(shapes, False)] == [2, 1]
    check_round_trip([filled("ternary", shape, "rare", i) for i, shape in enumerate(shapes)], "ternary")


ARRAYS = st.lists(
    st.one_of(
        st.just(()),
        st.tuples(st.integers(0, 40)),
        st.tuples(st.integers(0, 9), st.integers(0, 40)),
        st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 20)),
    ).filter(lambda shape: math.prod(shape) <= 120),
    max_size=4,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.sampled_from(KINDS), ARRAYS, st.data())
def test_round_trip(kind, shapes, data):
    """Whatever the shapes and values, in any memory layout and integer type, and always the same bytes."""
    fills = st.tuples(st.sampled_from(FILLS), st.integers(0, 99))
    arrays = [filled(kind, shape, *data.draw(fills)) for shape in shapes]
    first = check_round_trip(arrays, kind)
    assert entropy.encode([np.asfortranarray(a.astype(np.int64)) for a in arrays], kind) == first


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.sampled_from(KINDS), ARRAYS, st.binary(max_size=60))
def test_any_bytes_give_arrays_or_a_decode_error(kind, shapes, data):
    try:
        found = [x.shape for x in entropy.decode(data, shapes, kind)]
    except entropy.DecodeError:
        found = None
    assert found in (None, shapes)


@fast
def test_arrays_of_a_shape_are_one_stack_in_order_of_the_first():
    shapes = [(3, 5), (), (0, 4), (15,), (5, 3), (3, 1, 5), (1, 1)]
    assert entropy.stacks(shapes, False) == [
        ([0, 5], (2, 3, 5)), ([1, 6], (2, 1, 1)), ([3], (1, 1, 15)), ([4], (1, 5, 3))]
    assert entropy.stacks(shapes, True) == [  # of floats, the wide ones run along their rows
        ([0, 5], (6, 5, 1)), ([1, 6], (2, 1, 1)), ([3], (1, 15, 1)), ([4], (1, 5, 3))]


@fast
def test_too_wide_an_array_does_not_suit():
    wide = entropy.MAX_COLUMNS
    assert entropy.suits([(1, wide), (2, wide)], "ternary") and not entropy.suits([(3,), (1, wide + 1)], "ternary")
    assert entropy.suits([(4 * wide,)], "u16"), "a vector of floats is a column"


@fast
@pytest.mark.parametrize("kind", ["ternary", "int4", "uint5", "u16"])
def test_steps_are_as_many_as_are_taken(monkeypatch, kind):
    """A reader refuses a stream for their number before it decodes any."""
    shapes, taken = [(3, 5), (), (40, 33), (3, 5), (0, 4), (90, 2), (1, 130), (1100, 1)], []
    for model in {type(model) for model, _, _ in entropy.models(Encoder(), kind)}:
        step = model.step
        monkeypatch.setattr(model, "step", lambda *args, step=step: taken.append(1) or step(*args))
    entropy.encode([np.zeros(shape, pack.SYMBOLS[kind]) for shape in shapes], kind)
    assert entropy.steps(shapes, kind) == len(taken)


# Golden bytes -------------------------------------------------------------------------------------------------


def numbers(n: int, seed: int) -> list[int]:
    """n numbers below 2^31 from Knuth's MMIX generator: the same in every version of everything."""
    out = []
    for _ in range(n):
        seed = (6364136223846793005 * seed + 1442695040888963407) % 2**64
        out.append(seed >> 33)
    return out


def golden_arrays(kind: str) -> list[np.ndarray]:
    """Symbols somewhat like a model's: columns of unequal zero shares, rows that repeat, scales that drift."""
    low, high = kind_range(kind)
    shapes = [(9, 33), (7,), (), (0, 3), (9, 33), (2, 3, 17), (40, 1)]
    shapes += [] if kind in SLOW else [(20, 64), (entropy.REFERENCES + 40, 2)]
    out = []
    for i, shape in enumerate(shapes):
        rows, cols = math.prod(shape[:-1]), shape[-1] if shape else 1
        a, b = numbers(rows * cols, 2 * i + 1), numbers(rows * cols, 2 * i + 2)
        values = []
        for k in range(rows * cols):
            row, col = divmod(k, cols)
            if kind == "ternary":
                values.append(0 if a[k] % 100 < 15 + col % 40 else 1 - 2 * (b[k] % 2))
            elif kind.startswith("int") or kind == "five":
                at = k if row % 3 else col  # every third row is the first again
                values.append((a[at] % (high + 1) + b[at] % (high + 1)) + low)
            elif kind.startswith("uint"):
                values.append(min(high, high // 3 + row // 4 + col % 3 + (a[k] % 64) // 60))
            else:
                bits = int(kind[1:])
                values.append((b[k] % 8 == 0) << (bits - 1) | (0x30 << (bits - 8)) + a[k] % (24 << (bits - 8)))
        out.append(np.array(values, pack.SYMBOLS[kind]).reshape(shape))
    return out


GOLDEN = {  # kind: (bytes, sha256)
    "ternary": (804, "b3ebf0360ec1ca35d91f01498d4103386796277faf9025784871c5cfd6657829"),
    "five": (1020, "eee9ed30cc5c7211cf5c28bf58b32016003a2bf8b5d3fefa5039c208d723e20c"),
    "int2": (688, "4f7be692db950fcdc747f8a8d3920dc173e421f44ccd460486f13a145406f473"),
    "int3": (1228, "d0698439d260a7c9297e84f28595204dbd6ae9c7731b67580537e2abb1141508"),
    "int4": (1736, "3c40bd1690f5baca946703137b2ab66088d015a74acb2c6bd81f0e740cf770ef"),
    "int5": (2228, "6d7498230ee63fbe3525740ba770bc3c9cffa0dcfc98737674e60f47fdaa51ce"),
    "int6": (2684, "2ba2d969a9ce361454b6b0f8edc0d45f2d4c7cf861b6d326e3014b5f2d2e4fde"),
    "int7": (3176, "6d0456844737b0f42961ba3f22e6bc805aae2e5e88f352023106ec3bcdb4763c"),
    "int8": (3612, "0b7b82afb9a4cc4df3fd1ac5991a5b7786200f35b29ec159051d3df7b3278fa0"),
    "uint4": (220, "31363c753b93f64c9093309f9ecc42f01f0b88dd07757ea62cdfd96c01da3254"),
    "uint5": (324, "72ab701e604d961d34f225e72d30204e62c697d574b6b7555e743061a68bf5a4"),
    "uint6": (392, "05e34071383554fe88d4413eb1228e319a77d64e1392e326b751be4b88ac4e12"),
    "uint7": (408, "49aabe4c0d1f6c5dae68ba81ac9b974d0b59a7ba4a04bbcaae9f384d83cd01ad"),
    "uint8": (424, "272473c8572e438d2574ed0e230b5defdef954452fbe10f79d2a1c08f17282fc"),
    "u8": (536, "2c8a3bb145ae4c6b7bdc82acbb23869bed884bca8e485d50734a76b6061e0024"),
    "u16": (1312, "6a5a804fd5db25e7e4cd0b7509d820e9b0af612f3f083f797fedc70200f87c11"),
}


GOLDEN_BEFORE = {  # the same of files from before 0.2.0, which have no widths
    "five": (1020, "53dd2d5a934fdf1ef78a78d2699839064478e8ffffc2fce0b8ab5fafde821629"),
    "int2": (688, "5b7580b903e173f74dc18d35642b054f655c09b8e90dfc6c2b13e16bda4a547e"),
    "int3": (1228, "dffa89dfda9b0040fc8b8551cad09322e623b1b7e40d2f6e5208489b0171d262"),
    "int4": (1736, "488e59acf53f2bd84e8fbbe3d1ec933f34ddec4f3ca078fbb184bbd5f0db658c"),
    "int5": (2244, "cc01859369967824f3a5b3cbdb5071b089fe55184deb69754c4090fc7f77b616"),
    "int6": (2700, "5cb4f1a8be1d02852477dfe3d90d40f3cf06d042f5c2f94b2081430af9debe88"),
    "int7": (3196, "2ed16aef03036365f5d2e91df8ae0f3d675ae13a4e22691246665a3c18f8595c"),
    "int8": (3628, "86a425ed00261b46be5b20e0943d1dd584b5e8b5c9660211c45159384c180e54"),
}


@fast
@pytest.mark.parametrize("kind", GOLDEN_BEFORE)
def test_golden_bytes_of_files_from_before(kind):
    arrays = golden_arrays(kind)
    data = entropy.encode(arrays, kind, widths=False)
    assert (len(data), hashlib.sha256(data).hexdigest()) == GOLDEN_BEFORE[kind]
    back = entropy.decode(data, [a.shape for a in arrays], kind, widths=False)
    assert all(np.array_equal(a, b) for a, b in zip(arrays, back, strict=True))


@fast
@pytest.mark.parametrize("kind", KINDS)
def test_golden_bytes(kind):
    """A change of the model, of numpy or of constriction that moves one bit would orphan every file."""
    data = check_round_trip(golden_arrays(kind), kind)
    assert (len(data), hashlib.sha256(data).hexdigest()) == GOLDEN[kind]


# Independence of the machine ----------------------------------------------------------------------------------

SCRIPT = """
import hashlib, sys
sys.path[:0] = ["tests", "."]
import numpy as np, test_entropy as t
from tern import entropy
out = hashlib.sha256()
for kind, shapes in (("ternary", [(70, 256), (300, 64), (300, 64)]), ("int6", [(90, 64)]), ("uint6", [(30, 3)])):
    data = entropy.encode([t.filled(kind, shape, "random", 5) for shape in shapes], kind)
    out.update(data)
    out.update(b"".join(x.astype("<i4").tobytes() for x in entropy.decode(data, shapes, kind)))
print(out.hexdigest())
"""


def test_bytes_do_not_depend_on_threads_or_vector_units():
    import numpy._core._multiarray_umath as core

    names = [name for name in core.__cpu_dispatch__ if core.__cpu_features__.get(name)]
    plain = {"OPENBLAS_CORETYPE": "Nehalem", "NPY_DISABLE_CPU_FEATURES": " ".join(names)} if names else {}
    found = []
    for threads, more in ((1, {}), (2, {}), (1, plain)):
        limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        done = subprocess.run([sys.executable, "-B", "-c", SCRIPT], cwd=Path(pack.__file__).parent, check=False,
                              env=os.environ | limits | more, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(done.stdout)
    assert found[0] == found[1] == found[2] and len(found[0]) == 65


@fast
def test_tables_are_these():
    assert (zlib.crc32(entropy.STRETCH.astype("<i4")), zlib.crc32(entropy.SQUASH.astype("<i4"))) == (
        1111621447, 926667819)
    assert entropy.STRETCH.shape == (4096,) and entropy.SQUASH.shape == (16384,)
    assert (np.diff(entropy.STRETCH) > 0).all() and np.array_equal(entropy.STRETCH, -entropy.STRETCH[::-1])
    assert (np.diff(entropy.SQUASH) >= 0).all() and entropy.SQUASH.min() > 0 and entropy.SQUASH.max() < ONE
    assert np.array_equal(entropy.SQUASH[1:], ONE - entropy.SQUASH[:0:-1])


def test_no_entry_of_a_table_lies_near_a_rounding_boundary():
    """Else a mathematical library with another last digit would make another table. math is exact to 1e-11 here."""

    def check(exact: Decimal, entry: int) -> None:
        assert abs(exact - entry) < Decimal("0.5") - Decimal("1e-9"), (exact, entry)

    with localcontext(prec=30):
        for i, entry in enumerate(entropy.STRETCH.tolist()):
            check(1024 * ((Decimal(i) + Decimal("0.5")) / (Decimal("4095.5") - i)).ln(), entry)
        for i, entry in enumerate(entropy.SQUASH.tolist()):
            check(65536 / (1 + (-Decimal(i - 8192) / 1024).exp()), entry)


# Exactness of what is computed in floats ----------------------------------------------------------------------


@fast
def test_shares_round_down_exactly():
    """Against Python's integers, also where the quotient is whole or lacks one part in 2^40."""
    rng = np.random.default_rng(0)
    for bits in (4, 12, 20, 30, 40):
        total = rng.integers(0, 2**bits, 4000)
        ones = np.minimum(total, rng.integers(0, 2**bits, 4000))
        ones[:1000] = total[:1000] * rng.integers(0, 4097, 1000) // 4096  # at and around whole quotients
        ones[500:1000] = np.maximum(ones[500:1000] - 1, 0)
        counts, parent = entropy.Counts(4000), rng.integers(0, 4096, 4000).astype(np.int32)
        counts.ones[:], counts.total[:] = ones, total
        for strength in (16, 64, 128):
            found = counts.share(np.arange(4000), parent, strength)
            exact = [(int(a) * 4096 + strength * int(q)) // (int(n) + strength)
                     for a, n, q in zip(ones, total, parent, strict=True)]
            assert found.tolist() == exact and found.dtype == np.int32


@fast
def test_weights_learn_exactly_in_the_largest_step():
    """Every term at its largest and of one sign: still whole numbers that a float64 holds."""
    most = 2 * int(entropy.STRETCH.max())  # difference of two logits
    for shape in ((1, 4, entropy.MAX_COLUMNS), (entropy.MAX_COLUMNS, 4, 1)):
        x, error, taken = np.full(shape, most, np.int32), np.full(shape, 65514, np.int32), np.ones(shape, bool)
        x[0, :, 0] -= 1
        weights, n = entropy.Weights(2), x.size
        weights.learn([x, x[:, :1]], error, taken)  # the second is a column's, shared by four rows
        square = most * most * (n - 4) + 4 * (most - 1) ** 2
        product = 65514 * (most * (n - 4) + 4 * (most - 1))
        curvature = entropy.Weights.TRUST + (square >> 2)
        weight = min(entropy.Weights.START + (product << 14) // curvature, 4 * entropy.WEIGHT)
        assert max(square, product) < 2**53
        assert weights.curvature == [curvature] * 2 and weights.weights == [weight] * 2


@fast
def test_mixing_does_not_overflow():
    """The largest weights on the largest inputs, in 32 bits, as in Python's integers."""
    most = 2 * int(entropy.STRETCH.max())
    for weight in (4 * entropy.WEIGHT, -2 * entropy.WEIGHT):
        for x in (most, -most, 1, -1, 0):
            weights = entropy.Weights(3)
            weights.weights = [weight] * 3
            base = int(entropy.STRETCH[-1])
            exact = base + 3 * (x * (weight >> 8) >> 12)
            p = weights.mix(np.array([base], np.int32), [np.array([x], np.int32)] * 3)
            assert p.tolist() == [entropy.SQUASH[min(max(exact, -8192), 8191) + 8192]] and p.dtype == np.int32


@fast
@pytest.mark.parametrize("signs", ["alike", "random"])
def test_correlation_is_exact_at_its_largest(signs):
    """As many rows and columns as it takes, all of them correlated: against Python's integers."""
    rows, cols, before = (1 << 18) - 1, entropy.MAX_CORRELATED, 240
    model, rng = entropy.Ternary(Encoder()), np.random.default_rng(0)
    model.start(1, rows, cols)
    model.seen = rows
    sign = np.ones((cols, cols)) if signs == "alike" else rng.integers(0, 2, (cols, cols)) * 2 - 1
    model.correlation[0] = sign * rows
    done = (np.ones((1, 2, cols)) if signs == "alike" else rng.integers(-1, 2, (1, 2, cols))).astype(np.int32)
    found = model.expected_sign(slice(before, cols), done)
    c, spread = model.correlation[0].astype(np.int64).astype(object), math.isqrt(rows * rows * before * cols) + 1
    sums = done[0, :, :before].astype(object) @ c[:before] @ c[:, before:]
    assert abs(sums).max() < 2**53 and found.shape == (1, 2, cols - before)
    assert found[0].tolist() == [[min(max(x * 1024 // spread, -8191), 8191) for x in row] for row in sums.tolist()]


# Sizes --------------------------------------------------------------------------------------------------------


def order0(arrays: list[np.ndarray]) -> float:
    """Bytes at the entropy of each array's own frequencies, which cost nothing to know."""
    bits = 0.0
    for a in arrays:
        counts = np.unique(a, return_counts=True)[1]
        bits -= float((counts * np.log2(counts / counts.sum())).sum())
    return bits / 8


def ternary(shape: tuple[int, ...], zeros, seed: int) -> np.ndarray:
    """Independent codes; zeros: their share, a number or an array that broadcasts to shape."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(shape) < zeros, 0, rng.integers(0, 2, shape) * 2 - 1).astype(np.int8)


@pytest.mark.parametrize(("shape", "zeros"), [((256, 256), 0.2), ((64, 1024), 0.31), ((1024, 64), 0.44),
                                              ((256, 256), 0.6)])
def test_independent_codes_cost_their_entropy(shape, zeros):
    x = [ternary(shape, zeros, 1)]
    assert len(check_round_trip(x, "ternary")) < 1.003 * order0(x)


def test_matrices_of_different_zero_shares_cost_their_own_entropies():
    x = [ternary((64, 256), zeros, i) for i, zeros in enumerate((0.2, 0.31, 0.44, 0.6))]
    y = [ternary(shape, 0.2 + i / 9, i) for i, shape in enumerate([(64, 256), (256, 64), (32, 512), (512, 32)])]
    for arrays in (x, y):
        assert len(entropy.encode(arrays, "ternary")) < 1.003 * order0(arrays)


def test_columns_and_rows_of_different_zero_shares_cost_less():
    zeros = np.linspace(0.1, 0.8, 256)
    for shares in (zeros, zeros[:, None]):
        x = [ternary((256, 256), shares, 2)]
        exact = -sum(z * math.log2(z) + (1 - z) * math.log2((1 - z) / 2) for z in zeros) * 256 / 8
        assert exact < len(entropy.encode(x, "ternary")) < 1.03 * exact < 0.96 * order0(x)


def test_signs_that_follow_from_others_cost_less():
    """Each row is one of four patterns or its negative, with noise: the columns are correlated."""
    rng = np.random.default_rng(3)
    rows = (rng.integers(0, 2, (4, 128)) * 2 - 1)[rng.integers(0, 4, 512)] * (rng.integers(0, 2, (512, 1)) * 2 - 1)
    x = [np.where(rng.random(rows.shape) < 0.2, ternary(rows.shape, 0.4, 3), rows).astype(np.int8)]
    signs = float((x[0] != 0).sum()) / 8
    assert len(entropy.encode(x, "ternary")) < order0(x) - 0.3 * signs


def test_rows_that_repeat_earlier_ones_cost_little_more_than_their_first_segment():
    rng = np.random.default_rng(4)
    base = np.clip(np.rint(rng.normal(0, 2.5, (8, 256))), -7, 7).astype(np.int8)
    once, often = (len(entropy.encode([x], "int4")) for x in (base, base[rng.integers(0, 8, 128)]))
    assert often - once < 0.18 * 15 * once  # an eighth of each row must tell which row it is
    assert len(entropy.encode([np.zeros((256, 64), np.int8)], "int4")) < 200


@pytest.mark.parametrize(("jumps", "share"), [(False, 1.025), (True, 1.05)])
def test_rows_cost_little_more_than_if_their_widths_were_known(jumps, share):
    """Normal codes, as of an embedding whose tokens' steps go with how often they occur."""
    rng, normal = np.random.default_rng(0), statistics.NormalDist()
    widths = np.exp(rng.normal(0, 0.7, 600) if jumps else np.linspace(-1, 1.5, 600)).clip(0.3, 5)
    x = [np.rint(rng.normal(size=(600, 128)) * widths[:, None]).clip(-15, 15).astype(np.int8)]
    known = 0.0
    for row, width in zip(x[0], widths.tolist(), strict=True):
        edges = [0.0, *(normal.cdf((k - 14.5) / width) for k in range(30)), 1.0]
        known -= np.log2(np.maximum(np.diff(edges), 1e-300))[row + 15].sum() / 8
    assert known < len(check_round_trip(x, "int5")) < share * known < 0.93 * order0(x)


def test_scales_that_drift_or_differ_by_column_cost_less():
    rng = np.random.default_rng(5)
    drift = 16 + 8 * np.sin(np.arange(600) / 30)[:, None] + np.arange(8)
    columns = np.broadcast_to(8 + 3 * np.arange(6), (400, 6))
    for kind, mean, noise, share in (("uint5", drift, 0.4, 0.88), ("uint8", 7 * drift, 0.5, 0.94),
                                     ("uint5", columns, 0.6, 0.5)):
        x = [np.rint(mean + rng.normal(0, noise, mean.shape)).clip(*kind_range(kind)).astype(np.uint8)]
        assert len(entropy.encode(x, kind)) < share * order0(x)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_constant_costs_next_to_nothing_and_noise_little_more_than_its_bits(kind):
    shape, most = ((32, 16), 1.2) if kind in SLOW else ((64, 64), 1.03)
    for fill in ("zeros", "highest"):
        assert len(entropy.encode([filled(kind, shape, fill)], kind)) < 120, fill
    low, high = kind_range(kind)
    noise = math.prod(shape) * math.log2(high - low + 1) / 8
    assert noise < len(entropy.encode([filled(kind, shape, "random")], kind)) < most * noise


def test_it_is_fast_enough_for_a_large_model():
    x = [ternary((512, 512), 0.31, i) for i in range(2)]
    start = time.process_time()
    check_round_trip(x, "ternary")
    assert time.process_time() - start < 20  # 1 s here: 16 MB, 80 million codes, in a few minutes


# The range coder ----------------------------------------------------------------------------------------------
# constriction's, written once more with Python's integers: what docs/format.md says of it, as code.


def zeros_share(p: int) -> int:
    """Of 2^24, the share of 0 where a 1 has probability p / 2^16."""
    return ((ONE - p) * (2**24 - 2) >> 16) + 1


class PlainDecoder:
    """A stand-in for entropy.Decoder."""

    def __init__(self, data: bytes):
        self.words = [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]
        self.lower, self.range, self.read = 0, 2**64 - 1, 2
        self.point = self.word(0) << 32 | self.word(1)

    def word(self, i: int) -> int:
        return self.words[i] if i < len(self.words) else 0

    def bits(self, p: np.ndarray, bits: None = None) -> np.ndarray:
        return np.array([self.bit(int(x)) for x in p], bool)

    def bit(self, p: int) -> bool:
        split, scale = zeros_share(p), self.range >> 24
        quantile = (self.point - self.lower) % 2**64 // scale
        if quantile >= 2**24:
            raise entropy.DecodeError("no such quantile")
        if bit := quantile >= split:
            self.lower, self.range = (self.lower + scale * split) % 2**64, scale * (2**24 - split)
        else:
            self.range = scale * split
        if self.range < 2**32:  # once is enough: it was at least 2^32, and shrinks to no less than 2^-24 of that
            self.lower, self.range = self.lower << 32 & 2**64 - 1, self.range << 32
            self.point = (self.point << 32 & 2**64 - 1) | self.word(self.read)
            self.read += 1
        return bit

    def finish(self) -> None:
        assert self.read - 2 < len(self.words) <= self.read or not self.words


def plain_encode(bits, p) -> bytes:
    """The encoder, with a lower end of as many digits as it takes, so that a carry needs no thought."""
    lower, size, moved = 0, 2**64 - 1, 0
    for bit, x in zip(bits, p, strict=True):
        split, scale = zeros_share(int(x)), size >> 24
        lower, size = (lower + scale * split, scale * (2**24 - split)) if bit else (lower, scale * split)
        if size < 2**32:
            lower, size, moved = lower << 32, size << 32, moved + 1
    if not len(bits):
        return b""
    last = lower + 2**32 - 1 >> 32  # the first point with 32 zeros at its end
    words = [last >> 32 * (moved - i) & 2**32 - 1 for i in range(moved + 1)]
    if (lower + size >> 32) & 2**32 - 1 == words[-1]:
        words.append(0)  # else whatever followed could lie above the range
    return b"".join(word.to_bytes(4, "little") for word in words)


def coded(bits: np.ndarray, p: np.ndarray, pieces: int = 1) -> bytes:
    """By constriction, in so many calls."""
    coder = Encoder()
    for some, q in zip(np.array_split(bits, pieces), np.array_split(p, pieces), strict=True):
        coder.bits(q, some)
    return coder.finish()


@fast
@pytest.mark.parametrize("seed", range(4))
def test_the_range_coder_is_this_one(seed):
    """Probabilities of all sizes and fewer bits than a word to many words, in one call or several."""
    rng = np.random.default_rng(seed)
    for n in (0, 1, 2, 3, 5, 30, 31, 32, 33, 63, 64, 65, 100, 1000):
        p = rng.integers(1, ONE, n) if seed < 2 else np.minimum(np.exp(rng.uniform(0, 11.09, n)).astype(int), ONE - 1)
        p = ONE - p if seed == 3 else p
        bits = rng.random(n) < p / ONE if seed else rng.random(n) < 0.5
        data = coded(bits, p, 3)
        assert data == coded(bits, p) == plain_encode(bits, p)
        for decoder in (PlainDecoder(data), Decoder(data)):
            assert np.array_equal(decoder.bits(p, None), bits)
            decoder.finish()


def test_every_probability_is_split_by_this_rule():
    """All 65,535, each with both bits: one that is split elsewhere would change all bytes after it."""
    p = np.repeat(np.arange(1, ONE), 2)
    bits = np.arange(p.size) % 2 == 1
    for order in (slice(None), slice(None, None, -1)):
        assert coded(bits[order], p[order]) == plain_encode(bits[order], p[order])
    assert np.array_equal(PlainDecoder(coded(bits, p)).bits(p), bits)
    assert [zeros_share(x) for x in (ONE - 1, ONE // 2, ONE // 2 - 1, 1)] == [256, 2**23, 2**23 + 255, 2**24 - 257]


@fast
@pytest.mark.parametrize("words", [[2**31], [2**31, 0, 0, 1], [2**31 - 1, 2**32 - 1, 2**32 - 1, 2**32 - 1, 2**32 - 1],
                                   [5, 0, 0, 0, 0, 0], [7] + [2**32 - 1] * 6])
def test_carries_run_through_many_words(words):
    """The bits that decode such a point keep the range around it, where a carry is open for long."""
    rng = np.random.default_rng(len(words))
    data = b"".join(word.to_bytes(4, "little") for word in words)
    p = rng.integers(1, ONE, 400)
    for n in range(0, 150, 7):
        bits = PlainDecoder(data).bits(p[:n])
        found = coded(bits, p[:n])
        assert found == plain_encode(bits, p[:n]) and np.array_equal(PlainDecoder(found).bits(p[:n]), bits)


@fast
def test_probabilities_are_exact_in_floats():
    p = np.arange(ONE + 1)
    assert np.array_equal(entropy.tables(p) * ONE, np.stack([ONE - p, p], 1))


@fast
@pytest.mark.parametrize("kind", ["ternary", "int3", "int8", "uint5", "u8", "u16"])
def test_streams_decode_over_plain_integers(monkeypatch, kind):
    """Every bit of a stream by the coder above: nothing of constriction but what these tests pin down is used."""
    arrays = [filled(kind, shape, fill, 7) for shape, fill in (((6, 20), "random"), ((9,), "ramp"), ((6, 20), "rare"))]
    data = entropy.encode(arrays, kind)
    monkeypatch.setattr(entropy, "Decoder", PlainDecoder)
    back = entropy.decode(data, [a.shape for a in arrays], kind)
    assert all(np.array_equal(x, a) for x, a in zip(back, arrays, strict=True))


@fast
def test_data_that_is_no_stream():
    for size in (1, 2, 3, 5, 4097):
        with pytest.raises(entropy.DecodeError, match="words of 4 bytes"):
            entropy.decode(bytes(size), [(5,)], "ternary")
    with pytest.raises(entropy.DecodeError, match="not valid"):
        entropy.decode(bytes([255] * 8), [(5,)], "ternary")
    with pytest.raises(entropy.DecodeError, match="goes on"):
        entropy.decode(bytes(12), [(5,)], "ternary")


if __name__ == "__main__":
    for name in KINDS:
        stream = entropy.encode(golden_arrays(name), name)
        print(f'    "{name}": ({len(stream)}, "{hashlib.sha256(stream).hexdigest()}"),')
    print(tuple(zlib.crc32(table.astype("<i4")) for table in (entropy.STRETCH, entropy.SQUASH)))
