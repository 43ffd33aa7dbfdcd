"""A second, slow decoder of payloads, written from `dtrain/artifact/FORMAT.md` alone.

Standard library and zstandard only: no torch, no numpy, nothing of dtrain. Every check is an `assert`. A stage is its
tag and its parameters: (1, 0.25, 7) is the selection bernoulli with keep 0.25 and seed 7.
"""

import bisect
import hashlib
import math
import struct
from collections import namedtuple
from itertools import accumulate, count, repeat, takewhile

import zstandard

Payload = namedtuple("Payload", "transform select quantise code scale data")
MASK = 0xFFFFFFFF


class Reader:
    """Takes bytes from the front, never past the end."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, size):
        assert self.at + size <= len(self.data), "ends early"
        self.at += size
        return self.data[self.at - size : self.at]

    def unpack(self, form):
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def halves(self, size):
        return list(struct.unpack(f"<{size}e", self.take(2 * size)))

    def varint(self):
        value = 0
        for shift in range(0, 63, 7):
            byte = self.unpack("B")
            value |= (byte & 127) << shift
            if byte < 128:
                assert byte or not shift, "overlong varint"
                return value
        raise AssertionError("varint of more than 63 bits")


def single(value):
    """Rounds to float32."""
    try:
        return struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


def decode(payload: Payload, name: str, shape) -> dict:
    """The values of a tensor by position; with transform 0 only those that are stored."""
    rows, columns = (1, math.prod(shape)) if len(shape) < 2 else (shape[0], math.prod(shape[1:]))
    grid = grid_of(payload.transform, rows, columns)
    reader, size = Reader(payload.data), math.prod(grid)
    where = index(reader, size) if payload.select == (5,) else positions(payload.select, name, grid)
    found = dict(zip(where, values(payload.quantise, payload.code, reader, where, size), strict=True))
    assert reader.at == len(reader.data), "bytes are left over"
    if payload.transform == (0,):
        return found
    coefficients = [found.get(i, 0.0) for i in range(size)]
    return dict(enumerate(inverse(payload.transform, coefficients, rows, columns)))


def grid_of(transform, rows, columns):
    tag, *parameters = transform
    if tag == 1:
        (patch,) = parameters
        return -(-rows // patch) * -(-columns // patch), patch**2
    if tag == 2:
        rank, first = parameters
        assert first + rank <= min(rows, columns)
        return rank, rows + columns
    return (columns, rows) if tag == 3 else (rows, columns)


def inverse(transform, grid, rows, columns):
    """The tensor, element by element, from its flattened coefficients."""
    tag, *parameters = transform
    cells = [(i, j) for i in range(rows) for j in range(columns)]
    if tag == 3:
        return [grid[j * rows + i] for i, j in cells]
    if tag == 2:
        starts = [k * (rows + columns) for k in range(parameters[0])]
        return [single(sum(grid[k + i] * grid[k + rows + j] for k in starts)) for i, j in cells]
    (p,), across = parameters, -(-columns // parameters[0])
    basis = [[math.cos(math.pi * (2 * i + 1) * k / (2 * p)) * math.sqrt((2 if k else 1) / p) for i in range(p)]
             for k in range(p)]  # fmt: skip
    patches = []
    for start in range(0, len(grid), p * p):
        lines = [grid[start + k * p : start + k * p + p] for k in range(p)]
        half = [[sum(line[n] * basis[n][j] for n in range(p)) for j in range(p)] for line in lines]
        patches.append([[single(sum(basis[k][i] * half[k][j] for k in range(p))) for j in range(p)] for i in range(p)])
    return [patches[i // p * across + j // p][i % p][j % p] for i, j in cells]


def philox(counter, key):
    """Philox4x32-10 (Salmon et al., SC 2011): four counter words and two key words give four words."""
    a, b, c, d = counter
    k, m = key
    for _ in range(10):
        high, low = divmod(0xD2511F53 * a, 1 << 32)
        top, end = divmod(0xCD9E8D57 * c, 1 << 32)
        a, b, c, d = top ^ b ^ k, end, high ^ d ^ m, low
        k, m = k + 0x9E3779B9 & MASK, m + 0xBB67AE85 & MASK
    return a, b, c, d


def words(seed, name, first=0):
    """w(first), w(first + 1), ..."""
    key = struct.unpack("<II", hashlib.sha256(struct.pack("<Q", seed) + name.encode()).digest()[:8])
    for block in count(first // 4):
        out = philox((block & MASK, block >> 32, 0, 0), key)
        yield from out[max(0, first - 4 * block) :]


def positions(select, name, grid):
    """The ascending positions that have values."""
    if select == (0,):
        return range(math.prod(grid))
    tag, *parameters, seed = select
    if tag < 3:
        return list((bernoulli, stratified)[tag - 1](*parameters, words(seed, name), math.prod(grid)))
    return list((groups, units)[tag - 3](*parameters, words(seed, name), *grid))


def bernoulli(keep, word, size):
    assert 2.0**-24 <= keep < 1
    one = 1 << 128
    miss = one - math.floor(math.ldexp(keep, 80)) * (1 << 48)
    power = list(accumulate(repeat(miss, 1024), lambda p, m: p * m >> 128, initial=one))
    cut = power[1024]
    low = [-(((p - cut) << 32) // (one - cut)) for p in power[1:1024]]
    tail = accumulate(repeat(cut), lambda t, c: t * c >> 128)
    high = [-h for h in takewhile(lambda h: h > 0, (t >> 96 for t in tail))]
    position = -1
    while True:  # both tables are ascending after the change of sign: bisect counts the entries below -w
        fine, coarse = next(word), next(word)
        position += 1 + 1024 * bisect.bisect_left(high, -coarse) + bisect.bisect_left(low, -fine)
        if position >= size:
            return
        yield position


def stratified(keep, word, size):
    assert 2.0**-24 <= keep < 1
    rate = min(keep, 1 - keep)
    stride = round(4096 / rate)
    starts = takewhile(lambda start: start < 4096 * size, count(0, stride))
    draws = {(start + (w * stride >> 32)) >> 12 for start, w in zip(starts, word, strict=False)}
    return sorted(set(range(size)) - draws if keep > 0.5 else {draw for draw in draws if draw < size})


def groups(size, kept, word, rows, columns):
    assert 1 <= kept < size <= 65536
    if size > columns:
        rows, columns = 1, rows * columns
    for row in range(rows):
        for start in range(0, columns, size):
            drawn = [next(word) for _ in range(size)]
            places = sorted(sorted(range(size), key=lambda i: (drawn[i], i))[:kept])
            yield from (row * columns + start + i for i in places if start + i < columns)


def units(unit, block, keep, word, rows, columns):
    assert block == 1 or (unit == 2 and 1 <= block <= 1024)
    if not rows * columns:
        return []
    height, width = ((1, columns), (rows, 1), (block, block))[unit]
    across = -(-columns // width)
    kept = set(bernoulli(keep, word, -(-rows // height) * across))
    cells = ((i, j) for i in range(rows) for j in range(columns))
    return [i * columns + j for i, j in cells if i // height * across + j // width in kept]


def index(reader, size):
    """The positions of an index stream."""
    number = reader.varint()
    if not number:
        return []
    low, length = reader.unpack("B"), reader.varint()
    assert number <= size
    assert low <= 48
    assert 0 <= length - number <= size // 63
    gaps = [0] * number
    for at in range(0, low, 16):
        bits = min(16, low - at)
        gaps = [g | code << at for g, code in zip(gaps, packed(reader, bits, number), strict=True)]
    symbols = iter(rans(reader, length, 64))
    for i in range(number):
        while (symbol := next(symbols)) == 63:
            gaps[i] += 63 << low
        gaps[i] += symbol << low
    assert next(symbols, None) is None
    found = [end - 1 for end in accumulate(gap + 1 for gap in gaps)]
    assert found[-1] < size
    return found


def packed(reader, bits, number):
    """Codes of `bits` bits."""
    held = have = 0
    codes, stream = [], iter(reader.take((bits * number + 7) // 8))
    for _ in range(number):
        while have < bits:
            held |= next(stream) << have
            have += 8
        codes.append(held & (1 << bits) - 1)
        held, have = held >> bits, have - bits
    assert held == 0, "the last byte is not filled with zeros"
    return codes


def rans(reader, number, limit):
    """Entropy-coded symbols."""
    if not number:
        return []
    precision, size = reader.unpack("B"), reader.varint()
    assert size <= limit
    shares = [reader.varint() for _ in range(size)]
    assert precision <= 20
    assert sum(shares) == 1 << precision
    shares += [0] * (size == 1)
    frequencies = [max(1, share << (24 - precision)) for share in shares]
    frequencies[frequencies.index(max(frequencies))] -= sum(frequencies) - (1 << 24)
    starts = list(accumulate(frequencies, initial=0))
    stack = [reader.unpack("I") for _ in range(reader.varint())]
    assert not stack or stack[-1]
    state, symbols = 0, []
    for step in range(number + 1):
        if step:
            slot = state & 0xFFFFFF
            symbols.append(bisect.bisect_right(starts, slot) - 1)
            state = frequencies[symbols[-1]] * (state >> 24) + slot - starts[symbols[-1]]
        while state < 1 << 32 and stack:
            state = state << 32 | stack.pop()
    assert not stack
    assert state == 0
    return symbols


def coded(code, reader, bits, number):
    """The symbols that a code stage wrote."""
    tag, *parameters = code
    if tag == 1:
        frame, size = reader.take(len(reader.data) - reader.at), (bits * number + 7) // 8
        assert zstandard.get_frame_parameters(frame, zstandard.FORMAT_ZSTD1).content_size == size
        stream = zstandard.ZstdDecompressor().decompressobj()
        raw = stream.decompress(frame)
        assert stream.eof
        assert not stream.unused_data
        assert len(raw) == size
        reader = Reader(raw)
    if tag < 2:
        return packed(reader, bits, number)
    if tag == 2:
        assert bits <= 12
        return rans(reader, number, 1 << bits)
    low = bits - parameters[0]
    assert low >= 0
    part = rans(reader, number, 1 << parameters[0])
    rest = [iter(packed(reader, low, part.count(j)) if low else repeat(0)) for j in range(1 << parameters[0])]
    return [j << low | next(rest[j]) for j in part]


def values(quantise, code, reader, where, size):
    """The values at the positions `where` of a grid of `size` coefficients; whole numbers for `bits`."""
    (tag, *parameters), number = quantise, len(where)
    group = parameters[-1] if tag in (2, 3, 6) else parameters[0] if tag == 7 else 0
    blocks, block = (-(-size // group), [i // group for i in where]) if group else (1, [0] * number)
    if tag == 7:
        return mixed(bool(parameters[1]), group, blocks, code, reader)
    if tag in (0, 1):
        raw = bytes(coded(code, reader, 8, 2 * number))
        if tag == 0:
            return list(struct.unpack(f"<{number}e", raw))
        return [struct.unpack("<f", b"\0\0" + raw[2 * i : 2 * i + 2])[0] for i in range(number)]
    if tag == 4:
        raw = bytes(coded(code, reader, 8, parameters[0] * number))
        return [int.from_bytes(raw[i::number], "little") for i in range(number)]
    if tag == 5:
        top = parameters[1]
        means = reader.halves(top)
        table = [-mean for mean in reversed(means)] + [0.0, *means]
        return [table[symbol] for symbol in coded(code, reader, (2 * top).bit_length(), number)]
    bits = 1 if tag == 2 else parameters[0]
    scales = reader.halves(blocks) if group else None
    zeros = packed(reader, bits, blocks) if tag == 6 else None
    found = coded(code, reader, bits, number)
    if tag == 2:
        found = [2 * symbol - 1 for symbol in found]
    elif tag == 3:
        found = [symbol - (2 ** (bits - 1) - 1) for symbol in found]
    else:
        found = [symbol - zeros[i] for symbol, i in zip(found, block, strict=True)]
    return [single(value * scales[i]) for value, i in zip(found, block, strict=True)] if group else found


def mixed(fill, group, blocks, code, reader):
    widths = rans(reader, blocks, 9)
    fine = [i for i in range(blocks) if widths[i]]
    held = range(blocks) if fill else fine
    low = dict(zip(held, reader.halves(len(held)), strict=True))
    step = dict(zip(fine, reader.halves(len(fine)), strict=True))
    sizes = [(width * group * widths.count(width) + 7) // 8 for width in range(1, 9)]
    streams = Reader(bytes(coded(code, reader, 8, sum(sizes))))
    codes = {width: iter(packed(streams, width, group * widths.count(width))) for width in range(1, 9)}
    out = []
    for i, width in enumerate(widths):
        if width:
            out += [single(low[i] + single(step[i] * next(codes[width]))) for _ in range(group)]
        else:
            out += [low.get(i, 0.0)] + [0.0] * (group - 1)
    return out


def check_pipeline(transform, select, quantise, code):
    """The rules about which stages go together."""
    if quantise[0] in (4, 8):
        assert (transform, select) == ((0,), (0,))
    if quantise[0] == 8:
        assert code == (0,)
    if quantise[0] == 7:
        assert (transform, select) == ((1, math.isqrt(quantise[1])), (0,))
        assert math.isqrt(quantise[1]) ** 2 == quantise[1]
        assert quantise[2] in (0, 1)
    if select[0] in (3, 4):
        assert transform[0] in (0, 3)
    if code[0] == 3:
        assert quantise[0] == 6
        assert 1 <= code[1] <= quantise[1]
