"""The compiled core of the entropy codec: a binary range coder driven by adaptive contexts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import njit

__all__ = ["DECODE", "ENCODE", "MEASURE", "decode_pass", "encode_pass", "measure_pass"]

MEASURE, ENCODE, DECODE = 0, 1, 2
TOP = 1 << 48  # low and code are kept modulo 2**48; range lies in (2**32, 2**48]
BOTTOM = 1 << 32
_CONTEXTS = 12
_BINS = 64


@njit(inline="always")
def _carry(buffer: np.ndarray, position: int) -> None:
    """Add one to the number that the bytes before `position` spell."""
    position -= 1
    while buffer[position] == 255:
        buffer[position] = 0
        position -= 1
    buffer[position] += 1


def _build(mode: int) -> Callable[..., tuple[int, int]]:
    """Specialise the one coding loop for measuring, encoding or decoding; the model is the same text in all three."""

    @njit(cache=True, nogil=True)
    def run(codes, kernel, rate, buffer, size):
        task = mode

        def code_bit(bit, model, index, rate, low, span, position, buffer, size):
            state = model[index]
            p = (state[0] + state[1]) >> 1
            bound = (span >> 16) * p
            if task == DECODE:
                bit = 1 if low < bound else 0
            if bit:
                span = bound
                state[0] += (65536 - state[0]) >> 4
                state[1] += (65536 - state[1]) >> rate
            else:
                span -= bound
                if task == DECODE:
                    low -= bound
                else:
                    low += bound
                state[0] -= state[0] >> 4
                state[1] -= state[1] >> rate
            state[0] = min(max(state[0], 32), 65536 - 32)
            state[1] = min(max(state[1], 32), 65536 - 32)
            while span <= BOTTOM:
                span <<= 16
                if task == DECODE:
                    low <<= 8
                    if position < size:
                        low |= buffer[position]
                    low <<= 8
                    if position + 1 < size:
                        low |= buffer[position + 1]
                elif task == ENCODE:
                    if low >= TOP:
                        low -= TOP
                        _carry(buffer, position)
                    buffer[position] = low >> 40
                    buffer[position + 1] = (low >> 32) & 255
                    low = (low & 0xFFFFFFFF) << 16
                else:
                    low = (low & 0xFFFFFFFF) << 16
                position += 2
            return bit, low, span, position

        rows, columns = codes.shape
        model = np.full((_CONTEXTS * _BINS, 2), 32768, np.int64)
        low, span, position = 0, TOP, 0
        if mode == DECODE:
            for i in range(6):
                low = (low << 8) | (buffer[i] if i < size else 0)
            position = 6
        for r in range(rows):
            for c in range(columns):
                left = abs(codes[r, c - 1]) if c > 0 else 0
                back = abs(codes[r, c - kernel]) if c >= kernel else 0
                up = abs(codes[r - 1, c]) if r > 0 else 0
                over = abs(codes[r - 2, c]) if r > 1 else 0
                total = min(left, 3) + min(back, 3) + 2 * min(up, 3) + min(over, 3)
                base = min(total, _CONTEXTS - 1) * _BINS
                value = 0
                if mode != DECODE:
                    value = codes[r, c]
                size_left = abs(value)
                bit, low, span, position = code_bit(
                    1 if value != 0 else 0, model, base, rate, low, span, position, buffer, size
                )
                if bit == 0:
                    if mode == DECODE:
                        codes[r, c] = 0
                    continue
                sign, low, span, position = code_bit(
                    1 if value < 0 else 0, model, 1, 10, low, span, position, buffer, size
                )
                # magnitude: Elias gamma with adaptive bits, exponent in unary, then the mantissa
                exponent = 0
                while exponent < 30:
                    bit, low, span, position = code_bit(
                        1 if (size_left >> (exponent + 1)) != 0 else 0,
                        model, base + 2 + exponent, rate, low, span, position, buffer, size,
                    )
                    if bit == 0:
                        break
                    exponent += 1
                magnitude = 1
                for k in range(exponent - 1, -1, -1):
                    slot = 32 + min(exponent, 7) * 4 + (magnitude if magnitude < 4 else 0)
                    bit, low, span, position = code_bit(
                        (size_left >> k) & 1, model, base + slot, rate, low, span, position, buffer, size
                    )
                    magnitude = (magnitude << 1) | bit
                if mode == DECODE:
                    codes[r, c] = -magnitude if sign else magnitude
                    if position - 6 > size:
                        return -1, 0
            if mode == DECODE and position - 6 > size:
                return -1, 0
        if mode == DECODE:
            return position - 6, 0
        # the fewest bytes of a number inside [low, low + span)
        tail, kept = 0, 0
        for count in range(7):
            unit = TOP >> (8 * count)
            tail = (low + unit - 1) // unit * unit
            kept = count
            if tail < low + span:
                break
        if mode == ENCODE:
            if tail >= TOP:
                tail -= TOP
                _carry(buffer, position)
            for i in range(kept):
                buffer[position + i] = (tail >> (40 - 8 * i)) & 255
        return position + kept, kept

    return run


measure_pass = _build(MEASURE)
encode_pass = _build(ENCODE)
decode_pass = _build(DECODE)
