# mypy: ignore-errors
"""A reader of the format written from docs/format.md alone: plain Python, nothing but zlib, struct and math.

Entries in raw floats, fp16, packed, entropy-coded, trellis-coded, masked, fp8 and codebooks, which is what
`autocompress compress` writes; slow, and meant to be read.
"""

import math
import struct
import zlib
from pathlib import Path

SQUASH = [min(max(round(65536 / (1 + math.exp(-i / 256))), 32), 65504) for i in range(-2048, 2048)]
STRETCH = [round(256 * math.log((i + 0.5) / (4095.5 - i))) for i in range(4096)]
PAGE = Path(__file__).parents[2] / "docs" / "format.md"
DICTIONARY = bytes.fromhex(PAGE.read_text(encoding="utf-8").split("```hex")[1].split("```")[0])
LIMITS, SPEEDS = (400, 100), (8, 12)
NEXT = ((0, 1), (3, 2), (5, 4), (6, 7), (1, 0), (2, 3), (4, 5), (7, 6))


def level(x):
    return 0 if x < 2 else min(2 * x.bit_length() - 3 + (x >> (x.bit_length() - 2) & 1), 23)


def clamp(x, low, high):
    return min(max(x, low), high)


def decode_codes(data, shape, dependent=False):
    out, inner, kernel = (shape[0], shape[1], math.prod(shape[2:])) if len(shape) > 1 else (1, shape[0], 1)
    width = shape[-1] if len(shape) > 2 else 1
    limit, speed, swapped, flat = LIMITS[data[0] & 1], SPEEDS[data[0] & 1], data[0] >> 1, kernel == 1
    rows, channels = (inner, out) if swapped else (out, inner)
    body, position, span = data[1:] + bytes(8), 6, 1 << 48
    code, counters, weights = int.from_bytes((data[1:] + bytes(6))[:6], "big"), {}, {}

    def bit(node, *contexts):
        nonlocal code, span, position, body
        slots = [(node, i, c) for i, c in enumerate(contexts)]
        states = [counters.get(s, (1 << 21, 0)) for s in slots]
        inputs = [STRETCH[p >> 10] for p, _ in states]
        mix = weights.setdefault(node, [20000] * 4)
        p = SQUASH[clamp(sum(w * s for w, s in zip(mix, inputs, strict=True)) >> 16, -2047, 2047) + 2048]
        bound = (span >> 16) * p
        b = int(code < bound)
        code, span = (code, bound) if b else (code - bound, span - bound)
        for i, (q, n) in enumerate(states):
            mix[i] += (inputs[i] * ((b << 16) - p) * speed + 131072) >> 18
            counters[slots[i]] = q + ((((1 << 22) - 1) * b - q) * (655360 // (10 * n + 16)) >> 16), min(n + 1, limit)
        if span <= 1 << 32:
            body += bytes(2)
            code, span, position = code << 16 | body[position] << 8 | body[position + 1], span << 16, position + 2
        return b

    far = [[0] * (channels * kernel) for _ in range(rows + 2)]  # two rows of zeros in front
    channel, row_level, channel_level, states = [0] * channels, 256, 0, [0] * out
    for r in range(2, rows + 2):
        row = far[r]
        for c in range(channels * kernel):
            i, k = divmod(c, kernel)
            kx, total = k % width, sum(map(abs, row[c - k : c]))

            def at(step, row=row, c=c):
                return row[c - step] if c >= step else 0

            left = at(1) if kx > 0 or flat else 0
            up, left_up, right_up = 0, 0, 0
            if k >= width and not flat:
                up, left_up = at(width), at(width + 1) if kx > 0 else 0
                right_up = at(width - 1) if kx < width - 1 else 0
            back, over = at(4 if flat else kernel), far[r - 1][c]
            a1, ab, ao = abs(at(1)), abs(back), abs(over)
            near = 2 * sum(min(abs(v), 15) for v in (at(1), at(3 if flat else width), back, over))
            near += sum(min(abs(v), 15) for v in (at(5 if flat else 2 * kernel), far[r - 2][c], at(2)))
            trend = clamp(3 * (left + up) - left_up + right_up, -60, 60)
            pull = level(min(abs(4 * (left + up) + 2 * right_up + back + over), 4095))
            place = min(k, 15), level(row_level >> 2 if flat else min(total, 4095))
            magnitude = 0
            channel_level = level(channel[i] >> 2) if k == 0 else channel_level
            state = states[i if swapped else r - 2]
            odd, fourth = state % 2, (state, channel_level) if dependent else channel_level
            if bit(64 * odd, (pull, min(ab + ao, 2)), place, level(2 * near), fourth):
                lf, u, rt, lt, bk = ((v > 0) - (v < 0) for v in (left, up, right_up, left_up, back))
                drift = clamp(sum(row[c - k : c]), -4, 4)
                negative = bit(1, (lf, u, rt, lt), (level(abs(trend)), trend < 0), (drift, bk), (lf, u))
                agree = clamp(-trend if negative else trend, -8, 8)
                size = agree, place, level(min(max(a1, abs(at(2))) + max(ab, ao), 4095)), level(2 * near)
                exponent, magnitude = 0, 1
                while exponent < (29 if dependent else 30) and bit(64 * odd + 2 + exponent, *size):
                    exponent += 1
                for _ in range(exponent):
                    node = 32 + 4 * min(exponent - 1, 7) + (magnitude if magnitude < 4 else 0)
                    magnitude = magnitude << 1 | bit(64 * odd + node, *size)
            if dependent:
                states[i if swapped else r - 2] = NEXT[state][magnitude % 2]
                magnitude = 2 * magnitude - odd if magnitude else 0
            if magnitude:
                row[c] = -magnitude if negative else magnitude
            capped = min(magnitude, 63) << 6
            channel[i] += (capped - channel[i]) >> 4
            row_level += (capped - row_level) >> 6 if flat else 0
    flat_codes = [v for row in far[2:] for v in row]
    if swapped:
        order = [(o * kernel + i * out * kernel + k) for o in range(out) for i in range(inner) for k in range(kernel)]
        flat_codes = [flat_codes[j] for j in order]
    return flat_codes


def codebook(data, shape):
    def uint(shift=0):
        nonlocal data
        byte, data = data[0], data[1:]
        return (byte & 127) << shift | (uint(shift + 7) if byte > 127 else 0)

    def integers(raw, packed, shape):
        if math.prod(shape) == 0:
            return []
        return unpack(raw, math.prod(shape)) if packed else decode_codes(raw, shape)

    numel, flags, data = math.prod(shape), data[0], data[1:]
    length, count, n, m = uint(), uint(), uint(), uint()
    words = integers(data[:n], flags & 4, (count, length))
    words = [words[i * length : (i + 1) * length] for i in range(count)]
    rows = shape[0] if len(shape) > 1 and numel // shape[0] % length == 0 else 0
    index = integers(data[n : n + m], flags & 2, (rows, numel // length // rows) if rows else (numel // length,))
    if flags & 1:
        words = [[0] * length, *words]
        return [-v if i < 0 else v for i in index for v in words[abs(i)]]
    return [v for i in index for v in words[i]]


def e4m3(code):
    n = abs(code)
    return math.copysign(n / 512 if n < 8 else (8 + n % 8) * 2.0 ** (n // 8 - 10), code)


def floats(kind, data):
    return list(struct.unpack(f"<{len(data) // struct.calcsize(kind)}{kind}", data))


def unpack(data, numel):
    bits, low, stream = data[0], int.from_bytes(data[1:3], "little", signed=True), int.from_bytes(data[3:], "little")
    return [low + (stream >> j * bits & ((1 << bits) - 1)) for j in range(numel)]


def read_file(data):
    """Yield (name, shape, values) of every entry; values are floats, or codes where an entry has no step."""
    version, crc = data[4], int.from_bytes(data[5:9], "little")
    if data[:4] != b"\x89ACZ" or version != 1:
        raise ValueError("not a version 1 file")
    stream, at = data, 9

    def take(count):
        nonlocal at
        at += count
        return stream[at - count : at]

    def uint(shift=0):
        byte = take(1)[0]
        return (byte & 127) << shift | (uint(shift + 7) if byte > 127 else 0)

    length, sections = uint(), uint()
    payload = at + length
    if zlib.crc32(data[:5] + data[9:payload]) != crc:
        raise ValueError("damaged header")
    raw_length, checks = uint(), struct.unpack(f"<{sections}I", take(4 * sections))
    stream, at = zlib.decompressobj(-15, DICTIONARY).decompress(data[at:payload], raw_length), 0
    count = uint()
    names = take(uint()).decode().split("\0")
    codecs, kinds, ranks = take(count), take(count), take(count)
    shapes = [tuple(uint() for _ in range(rank)) for rank in ranks]
    lengths = [uint() for _ in range(count)]
    spans = [uint() if kind % 4 == 3 else 0 for kind in kinds]
    crc, filled, section = 0, 0, 0
    for i, shape in enumerate(shapes):
        body, payload = data[payload : payload + lengths[i]], payload + lengths[i]
        crc, filled = zlib.crc32(body, crc), filled + lengths[i]
        if filled >= 4096 or i == count - 1:
            if crc != checks[section]:
                raise ValueError(f"damaged section {section}")
            crc, filled, section = 0, 0, section + 1
        numel, kind, letter = math.prod(shape), kinds[i] % 4, "fed"[min(kinds[i] // 4, 2)]
        if codecs[i] == 0 and kinds[i] < 12:
            yield names[i], shape, floats(letter, body)
        elif codecs[i] == 1:
            yield names[i], shape, floats("e", body)
        elif codecs[i] == 8:
            split = 5 + int.from_bytes(body[1:5], "little")
            kept = iter(floats("e" if body[0] == 2 else letter, body[split:]))
            yield names[i], shape, [next(kept) if m else 0.0 for m in decode_codes(body[5:split], shape)]
        elif codecs[i] in (3, 7, 9, 10, 11):
            columns = numel // shape[0]
            per_row = (0, 0, 1, -(-columns // max(spans[i], 1)))[kind]
            width = 4 if kind == 1 else 2 * shape[0] * per_row
            steps = floats("f" if kind == 1 else "e", body[:width])
            rest = body[width:]
            if codecs[i] in (3, 11):
                codes = unpack(rest, numel) if codecs[i] == 3 else codebook(rest, shape)
            else:
                codes = decode_codes(rest, shape, codecs[i] == 10)
            codes = [e4m3(c) for c in codes] if codecs[i] == 9 else codes
            span = spans[i] or columns
            at = [j // columns * per_row + j % columns // span * (per_row > 0) for j in range(numel)]
            yield names[i], shape, [c * steps[k] for c, k in zip(codes, at, strict=True)] if kind else codes
