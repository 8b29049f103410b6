"""A second decoder for artifacts, written from docs/format.md alone: its names and order are that page's.

It shares no code with pack.py and tern/, and computes on Python integers and int64 arrays. It is there to
test the page and the packer against each other; it is slow, and checks a file only where that costs nothing.
"""

import json
import lzma
import math
import zlib

import numpy as np
import zstandard

CODE_TYPES = dict.fromkeys(("ternary", "binary", "five", "int", "codebook"), "i1") | {
    "fp8": "u1", "bf16": "<u2", "fp16": "<u2", "fp32": "<u4"}
CODE_KINDS = {"ternary": "ternary", "binary": "ternary", "five": "five", "fp8": "u8", "bf16": "u16", "fp16": "u16",
              "fp32": "u32"}


def bits(x):
    return int(x).bit_length()


def clip(x, low, high):
    return min(max(x, low), high)


# ---------------------------------------------------------------------------------------------------- container


def decode(data):
    """An artifact's bytes -> ({name: (format, shape, codes, scales or None)}, meta)."""
    size, json_size, crc = (int.from_bytes(data[i : i + 4], "little") for i in (5, 9, 13))
    assert data[:4] == b"TRNY" and data[4] == 2 and 1 <= json_size <= 262144
    packed, streams = data[17 : 17 + size], memoryview(data)[17 + size :]
    assert zlib.crc32(data[:13] + packed) == crc
    text = zlib.decompress(packed, wbits=-15)
    header = json.loads(text)
    canonical = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
    assert len(text) == json_size and text == canonical
    assert sorted(header) == ["formats", "meta", "streams", "tensors"]
    formats, rows = header["formats"], list(unfold(header["tensors"]))
    codes, scales, table = {}, {}, iter(header["streams"])

    def stream(kind, dtype, shapes):
        nonlocal streams
        codec, size, crc = next(table)
        blob, streams = bytes(streams[:size]), streams[size:]
        assert len(blob) == size and zlib.crc32(blob) == crc
        return [x.astype(dtype) for x in symbols(codec, blob, kind, shapes)]

    for index, fmt in enumerate(formats):
        mine = [(name, shape) for name, shape, i in rows if i == index]
        kind = code_kind(fmt)
        arrays = stream(kind, CODE_TYPES[fmt["kind"]], [shape for _, shape in mine])
        codes.update((name, x) for (name, _), x in zip(mine, arrays, strict=True))
        if "group_size" in fmt:
            log = fmt.get("scale", "bf16").startswith("log")
            kind = f"uint{fmt['scale'][3:]}" if log else "u16"
            arrays = stream(kind, "u1" if log else "<u2", [scales_shape(fmt, shape) for _, shape in mine])
            scales.update((name, x) for (name, _), x in zip(mine, arrays, strict=True))
    assert next(table, None) is None and not streams
    return {n: (formats[i], tuple(shape), codes[n], scales.get(n)) for n, shape, i in rows}, header["meta"]


def unfold(table):
    for row in table:
        if len(row) == 3:
            yield row
        else:
            before, first, layers, entries = row
            for i in range(first, first + layers):
                for after, shape, index in entries:
                    yield [f"{before}{i}{after}", shape, index]


def code_kind(fmt):
    if fmt["kind"] == "codebook":
        return f"int{bits(fmt['entries'] - 1) + 1}"
    return CODE_KINDS.get(fmt["kind"]) or f"int{fmt['bits']}"


def scales_shape(fmt, shape):
    rows, last = (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)
    each = fmt.get("entries", 1)
    return [rows, -(-last // fmt["group_size"]) * each] if fmt["group_size"] else [1, each]


# ----------------------------------------------------------------------------------------------- plain codecs


def symbols(codec, data, kind, shapes):
    """A stream's bytes -> its arrays of symbols."""
    if codec in ("model", "widths"):
        return model(data, kind, shapes, codec == "widths")
    count = sum(math.prod(shape) for shape in shapes)
    plain, _, compression = codec.partition("+")
    if kind in ("u8", "u16", "u32"):
        width, low, dtype = int(kind[1:]), 0, f"<u{int(kind[1:]) // 8}"
    elif kind.startswith("uint"):
        width, low, dtype = int(kind[4:]), 0, "u1"
    else:
        width = 0 if kind in ("ternary", "five") else int(kind[3:])
        low, dtype = -(2 ** (width - 1)) + 1 if width else -1, "i1"
    item = np.dtype(dtype).itemsize
    size = {"base3": -(-count // 5), "bits": -(-count * width // 8)}.get(plain, count * item)
    if compression == "zstd":
        decompressor = zstandard.ZstdDecompressor(format=zstandard.FORMAT_ZSTD1_MAGICLESS)
        data = decompressor.decompress(data, max_output_size=size)
    elif compression == "lzma":
        filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 2 ** clip(bits(size), 12, 24)}]
        data = lzma.decompress(data, format=lzma.FORMAT_RAW, filters=filters)
    assert len(data) == size
    octets = np.frombuffer(data, np.uint8)
    if plain == "base3":
        flat = (octets[:, None] // 3 ** np.arange(5) % 3 - 1).ravel()[:count]
    elif plain == "bits":
        digits = np.unpackbits(octets, bitorder="little")[: count * width].reshape(count, width)
        flat = digits @ (1 << np.arange(width)) + low
    elif plain == "planes":
        flat = octets.reshape(item, count)[::-1].T.copy().view(dtype).ravel()
    else:
        assert plain == "raw"
        flat = np.frombuffer(data, dtype)
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    return [x.reshape(shape) for x, shape in zip(np.split(flat, ends[:-1]), shapes, strict=True)]


# -------------------------------------------------------------------------------------------------- the model


class RangeDecoder:
    def __init__(self, data):
        self.data, self.coded, self.shifts = np.frombuffer(data, "<u4").tolist(), False, 0
        self.words = iter(self.data)
        self.lower, self.range = 0, 2**64 - 1
        self.point = next(self.words, 0) << 32 | next(self.words, 0)

    def decode(self, ps):
        """One bit per probability p / 2^16 of a 1."""
        lower, range_, point, out, mask = self.lower, self.range, self.point, [], 2**64 - 1
        for p in ps.tolist():
            w = ((2**16 - p) * (2**24 - 2) >> 16) + 1
            s = range_ >> 24
            q = (point - lower & mask) // s
            assert q < 2**24, "damaged"
            out.append(int(q >= w))
            if q >= w:
                lower, range_ = lower + s * w & mask, s * (2**24 - w)
            else:
                range_ = s * w
            while range_ < 2**32:
                lower, range_ = lower << 32 & mask, range_ << 32
                point = point << 32 & mask | next(self.words, 0)
                self.shifts += 1
        self.lower, self.range, self.point = lower, range_, point
        self.coded |= bool(out)
        return np.array(out, np.int64)

    def check_end(self):
        """The words before are checked by the bits they coded; one was written at each shift."""
        end = []
        if self.coded:
            end = [(self.lower + 2**32 - 1 >> 32) % 2**32]
            end += [0] * ((self.lower + self.range >> 32) % 2**32 == end[0])
        assert self.data[self.shifts :] == end, "damaged"


ST = np.array([round(1024 * math.log((x + 0.5) / (4095.5 - x))) for x in range(4096)])
SIGMOID = np.array([round(65536 / (1 + math.exp(-z / 1024))) for z in range(-8192, 8192)])


def share(counts, parent, strength):
    return (4096 * counts[..., 0] + strength * parent) // (counts[..., 1] + strength)


def add(counts, index, bit):
    np.add.at(counts[..., 0], index, bit)
    np.add.at(counts[..., 1], index, 1)


class Model:
    """What the kinds share. A subclass has step(), which returns the symbols of the lanes of a step."""

    split, lanes, most = 8, 64, 2**12

    def __init__(self, decoder, nodes):
        self.decoder, self.nodes, self.weights = decoder, nodes, {}
        self.everywhere = np.tile([1, 2], (nodes, 1))

    def stack(self, layers, rows, cols):
        self.x = x = np.zeros((layers, rows, cols), np.int64)
        self.layer = np.zeros((self.nodes, layers, 2), np.int64)
        self.column = np.zeros((self.nodes, layers, cols, 2), np.int64)
        self.begin_stack()
        segments = max(min(self.split, cols // 16), 1)
        height = max(self.lanes * segments // (layers * cols), rows * segments // self.most)
        height = clip(height, 1, 1024)
        for top in range(0, rows, height):
            end = min(top + height, rows)
            self.row = np.zeros((self.nodes, layers, end - top, 2), np.int64)
            for i in range(segments):
                left, right = cols * i // segments, cols * (i + 1) // segments
                shape = layers, end - top, right - left
                at = [a.ravel() for a in np.indices(shape)]  # each lane's layer, row of the block, column
                at[2] = at[2] + left
                x[:, top:end, left:right] = self.step(at, top, end, left, right).reshape(shape)
            self.end_block(top, end)
        self.end_stack()
        return x

    def begin_stack(self):
        pass

    def end_block(self, top, end):
        pass

    def end_stack(self):
        pass

    def decide(self, node, level, at, top, hints=()):
        """A decision at these lanes; node is a number or one for each lane, hints x3, x4 of each lane."""
        layer, row, column = at
        node = node + np.zeros_like(layer)
        places = [(self.everywhere, (node,)), (self.layer, (node, layer))]
        places += [(self.row, (node, layer, row)), (self.column, (node, layer, column))]
        counts = [a[index] for a, index in places]
        g = 4096 * counts[0][:, 0] // counts[0][:, 1]
        l = share(counts[1], g, 64)  # noqa: E741
        x = [ST[share(counts[2], l, 128)] - ST[l], ST[share(counts[3], l, 64)] - ST[l]]
        x += [hint(g) if callable(hint) else hint for hint in hints]
        start = [[3 * 2**20 // 10] * len(x), [8 * 2**20] * len(x)]
        w, h = self.weights.setdefault((level, bits(top)), start)
        z = ST[l] + sum(x[i] * (w[i] >> 8) >> 12 for i in range(len(x)))
        p = SIGMOID[np.clip(z, -8192, 8191) + 8192]
        bit = self.decoder.decode(p)
        for i in range(len(x)):
            h[i] += int((x[i] ** 2).sum()) >> 2
            w[i] += (int((x[i] * (65536 * bit - p)).sum()) << 14) // h[i]
            w[i] = clip(w[i], -(2**21), 2**22)
        for a, index in places:
            add(a, index, bit)
        return bit


class Ternary(Model):
    lanes, most = 256, 2**10

    def __init__(self, decoder):
        super().__init__(decoder, 2)

    def begin_stack(self):
        layers, rows, cols = self.x.shape
        self.hinted = 32 <= cols <= min(256, 4 * rows) and rows < 2**18
        if self.hinted:
            self.products = np.zeros((layers, cols, cols))  # C; the sums below are integers under 2^53

    def step(self, at, top, end, left, right):
        cols, hint = self.x.shape[2], np.zeros_like(at[0])
        if self.hinted and top > 0 and left > 0:
            y, c, b = self.x[:, top:end, :left], self.products, left
            sums = (y @ c[:, :b] @ c[:, :, left:right]).astype(np.int64)
            hint = 1024 * sums // (math.isqrt(top * top * b * cols) + 1)
            hint = np.clip(hint, -8191, 8191).ravel()
        code = self.decide(0, 0, at, top)
        (where,) = np.nonzero(code)
        if len(where):
            code[where] = 2 * self.decide(1, 1, [a[where] for a in at], top, [hint[where]]) - 1
        return code

    def end_block(self, top, end):
        if self.hinted:
            x = self.x[:, top:end].astype(float)
            self.products += x.transpose(0, 2, 1) @ x
            diagonal = np.arange(x.shape[2])
            self.products[:, diagonal, diagonal] = 0


class Int(Model):
    def __init__(self, decoder, m, widths):
        self.m, self.widths = m, widths
        self.b = bits(2 * self.m)
        self.f = min(self.b, 5 if widths else 4)
        super().__init__(decoder, 2**self.b)
        self.near = np.zeros((2**self.f, 16, 2**self.f, 2), np.int64)  # node, distance, value
        self.wide = np.zeros((2**self.f, 48, 2), np.int64)  # node, width

    def begin_stack(self):
        self.usual = [256] * len(self.x)  # R of each layer

    def end_block(self, top, end):
        for layer, x in enumerate(self.x[:, top:end]):
            mean = 256 * int((x**2).sum()) // x.size
            self.usual[layer] = self.usual[layer] + mean >> 1 if top else mean

    def width(self, layer, row, left):
        squares = int((self.x[layer, row, :left] ** 2).sum())
        return bits(((256 * squares + 16 * self.usual[layer]) // (left + 16)) ** 2)

    def reference(self, top, end, left, right):
        """The distance and value of each lane's reference."""
        t = (self.x + self.m) >> (self.b - self.f)
        layers, value = len(t), np.zeros((len(t), end - top, right - left), np.int64)
        distance = np.zeros_like(value)
        window = np.arange(max(top - 1024, 0), top)
        window = window[np.argsort(window % 1024)]
        for i in range(layers if top else 0):
            mine, theirs = t[i, top:end, :left], t[i, window, :left]
            d = (mine**2).sum(1)[:, None] + (theirs**2).sum(1) - 2 * mine @ theirs.T  # = sums of (difference)^2
            best = d.argmin(1)
            value[i] = t[i, window[best], left:right]
            near = [min(bits(8 * n // left), 15) if left else 15 for n in d.min(1).tolist()]
            distance[i] = np.array(near)[:, None]
        return distance.ravel(), value.ravel()

    def step(self, at, top, end, left, right):
        distance, value = self.reference(top, end, left, right)
        widths = {(i, j): self.width(i, top + j, left) for i in range(len(self.x)) for j in range(end - top)}
        width = np.array([widths[place] for place in zip(at[0].tolist(), at[1].tolist(), strict=True)])
        node = np.ones_like(at[0])
        for level in range(1, self.b + 1):
            if level <= self.f:
                seen = [(self.near, (node, distance, value)), (self.wide, (node, width))][: 1 + self.widths]
                bit = self.decide(node, level, at, top, [
                    lambda g, n=counts[index]: ST[share(n, g, 16)] - ST[g] for counts, index in seen])
                for counts, index in seen:
                    add(counts, index, bit)
            else:
                counts = self.everywhere[node]
                bit = self.decoder.decode(np.clip(16 * (4096 * counts[:, 0] // counts[:, 1]), 32, 65504))
                add(self.everywhere, node, bit)
            node = 2 * node + bit
        return node - 2**self.b - self.m


class Excess(Model):
    """uint, and the two arrays of u8 and u16: symbols 0 .. largest."""

    split, lanes, most = 1, 4, 2**8

    def __init__(self, decoder, largest):
        begins = list(range(min(largest, 8) + 1)) if largest < 256 else [0, 1]
        begins += [2**k for k in range(1, 64) if begins[-1] < 2**k <= largest]
        self.begins, sizes = np.array(begins), np.diff([*begins, largest + 1])
        self.widths = np.array([bits(n - 1) for n in sizes.tolist()])
        self.first, self.counts = largest // 2, {}
        super().__init__(decoder, len(begins))

    def begin_stack(self):
        layers, _, cols = self.x.shape
        self.mean = np.full((layers, cols), 256 * self.first)

    def step(self, at, top, end, left, right):
        classes, k = np.zeros_like(at[0]), len(self.begins) - 1
        where = np.arange(len(at[0]))
        for node in range(k):
            if len(where):
                bit = self.decide(node, node, [a[where] for a in at], top)
                where = where[bit == 1]
                classes[where] += 1
        rest = np.zeros_like(classes)
        for place in range(self.widths[classes].max()):
            (where,) = np.nonzero(self.widths[classes] > place)
            before = rest[where] if place < 3 else np.zeros_like(where)
            keys = [(c, place, r) for c, r in zip(classes[where].tolist(), before.tolist(), strict=True)]
            counts = [self.counts.setdefault(key, [1, 2]) for key in keys]
            bit = self.decoder.decode(np.array([clip(65536 * a // n, 32, 65504) for a, n in counts]))
            for count, b in zip(counts, bit.tolist(), strict=True):
                count[0] += b
                count[1] += 1
            rest[where] = 2 * rest[where] + bit
        magnitude = self.begins[classes] + rest
        (where,) = np.nonzero(classes)
        if len(where):
            positive = self.decide(k, k, [a[where] for a in at], top)
            magnitude[where] *= 2 * positive - 1
        return magnitude + (self.mean[at[0], at[2]] + 128 >> 8)

    def end_block(self, top, end):
        for row in range(top, end):
            self.mean += (256 * self.x[:, row] - self.mean) >> min(bits(row), 5)

    def end_stack(self):
        self.first = int(self.mean.sum()) // (256 * self.mean.size)


def model(data, kind, shapes, widths):
    decoder, out, groups = RangeDecoder(data), [np.zeros(shape, np.int64) for shape in shapes], {}
    width = int(kind.lstrip("uint") or 0) if kind not in ("ternary", "five") else 0
    pair = kind in ("u8", "u16")
    if kind == "ternary":
        models = [Ternary(decoder)]
    elif kind == "five":
        models = [Int(decoder, 2, widths)]
    elif kind.startswith("int"):
        models = [Int(decoder, 2 ** (width - 1) - 1, widths)]
    elif kind.startswith("uint"):
        models = [Excess(decoder, 2**width - 1)]
    else:
        models = [Excess(decoder, 2 ** (width - 1) - 1), Excess(decoder, 1)]
    for i, shape in enumerate(shapes):
        if math.prod(shape):
            groups.setdefault((math.prod(shape[:-1]), shape[-1] if shape else 1), []).append(i)
    for (rows, cols), members in groups.items():
        turned = pair and rows < cols
        most = 2**18 // (rows if turned else cols)
        for begin in range(0, len(members), most):
            part = members[begin : begin + most]
            shape = (len(part) * rows, cols, 1) if turned else (len(part), rows, cols)
            x = models[0].stack(*shape)
            if pair:
                x = x + (models[1].stack(*shape) << (width - 1))
            for i, array in zip(part, x.reshape(len(part), -1), strict=True):
                out[i] = array.reshape(shapes[i])
    decoder.check_end()
    return out


# ------------------------------------------------------------------------------------------------------ values


def to_bf16(x):
    """float32 -> the nearest bf16 (ties to even), as float32."""
    pattern = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((pattern + 0x7FFF + (pattern >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)
    return np.where(np.isnan(x), np.float32(np.nan), rounded)


def e4m3(codes):
    c = codes.astype(np.int64)
    exponent, fraction = c >> 3 & 15, c & 7
    value = np.where(exponent > 0, (8 + fraction) * 2.0 ** (exponent - 10), fraction * 2.0**-9)
    value = np.where(c & 127 == 127, np.nan, value)
    return np.where(c >> 7, -value, value).astype(np.float32)


def floats(kind, x):
    """Bit patterns, or the codes of a log scale, as float32."""
    if kind == "fp8":
        return e4m3(x)
    if kind == "bf16":
        return (x.astype(np.uint32) << 16).view(np.float32)
    if kind in ("fp16", "fp32"):
        return x.view({"fp16": np.float16, "fp32": np.float32}[kind]).astype(np.float32)
    s = 2 ** (int(kind[3:]) - 4)
    table = [2.0 ** (c // s - 12) * (1 + round(128 * (2 ** (c % s / s) - 1)) / 128) for c in range(16 * s)]
    return np.array([0.0] + table[1:], np.float32)[x]


def values(fmt, codes, scales):
    """The values of a tensor, rounded to bf16, as float32."""
    if scales is None:
        return to_bf16(floats(fmt["kind"], codes))
    size = fmt["group_size"]
    if fmt["kind"] == "codebook":
        last = codes.shape[-1] if codes.ndim and size else codes.size
        table = floats("bf16", scales).reshape(len(scales), -1, fmt["entries"])
        index = codes.reshape(-1, last).astype(np.int64) + fmt["entries"] // 2
        return table[np.arange(len(index))[:, None], np.arange(last) // (size or last), index].reshape(codes.shape)
    scale = floats(fmt["scale"], scales)
    if size:
        last = codes.shape[-1] if codes.ndim else 1
        scale = np.repeat(scale, size, axis=1)[:, :last].reshape(codes.shape)
    else:
        scale = scale.reshape(())
    return to_bf16(codes.astype(np.float32) * scale)
