# mypy: ignore-errors
# numba gives every scalar here one integer type; mypy sees numpy's and Python's in turn
"""The compiled core of the entropy codec: a binary range coder whose probabilities four adaptive contexts mix.

Every decision (zero?, sign, exponent in unary, mantissa bits) is predicted by four counters, one per context; their
log-odds are added with weights that follow the prediction error (logistic mixing, M. Mahoney, "Adaptive weighing of
context models for lossless data compression", 2005). The contexts are what stands around a weight that is already
known: the same kernel, the previous input channels, the previous output channels. Integers only: the same bytes
everywhere. docs/format.md specifies all of it.

Codes may lie on a trellis (dependent quantisation: H. Schwarz et al., "Hybrid video coding with trellis-coded
quantization", DCC 2019). Then a state runs along every output's codes. It says whether the next code is even or is odd
or zero, so that only its index among those is coded, and the index's parity picks the next state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numba import int32 as i4
from numba import int64, njit, uint8

__all__ = ["DECODE", "ENCODE", "MEASURE", "NEXT_STATE", "RATES", "STATES", "coder"]

MEASURE, ENCODE, DECODE = 0, 1, 2
TOP = 1 << 48  # low and code are kept modulo 2**48; the span lies in (2**32, 2**48]
BOTTOM = 1 << 32

RATES = np.array([(400, 8), (100, 12)], np.int64)  # (limit of a counter, mixing rate)
SQUASH = np.array(
    [min(max(round(65536 / (1 + math.exp(-i / 256))), 32), 65504) for i in range(-2048, 2048)], np.uint16
)  # log-odds in 1/256 -> probability of a one in 1/65536
STRETCH = np.array([round(256 * math.log((i + 0.5) / (4095.5 - i))) for i in range(4096)], np.int16)  # its inverse
RECIPROCAL = np.array([655360 // (10 * n + 16) for n in range(1024)], np.uint16)  # step of a counter that saw n bits
LEVEL = np.array(
    [0, 0] + [min(2 * x.bit_length() - 3 + (x >> (x.bit_length() - 2) & 1), 23) for x in range(2, 4096)], np.int8
)  # half-octave levels

NODES = 64  # decisions: 0 zero?, 1 sign, 2-31 exponent, 32-63 mantissa
_LEVELS, _PLACES = 24, 16
_ZERO = (0, 3 * _LEVELS, 3 * _LEVELS + _LEVELS * _PLACES, 4 * _LEVELS + _LEVELS * _PLACES)
_SIGN = tuple(5 * _LEVELS + _LEVELS * _PLACES + x for x in (0, 81, 81 + 2 * _LEVELS, 108 + 2 * _LEVELS))
_SIZE = tuple(_SIGN[3] + 9 + NODES * x for x in (0, 17, 17 + _LEVELS * _PLACES, 17 + _LEVELS * _PLACES + _LEVELS))
_COUNTERS = _SIZE[3] + NODES * _LEVELS
Z0, Z1, Z2, Z3 = _ZERO
S0, S1, S2, S3 = _SIGN
M0, M1, M2, M3 = _SIZE

# The 8-state trellis of G. Ungerboeck, "Channel coding with multilevel/phase signals", 1982: NEXT_STATE[2 s + parity].
# Even states have the quantiser of even codes, odd states that of odd codes and zero.
STATES = 8
NEXT_STATE = np.array([0, 1, 3, 2, 5, 4, 6, 7, 1, 0, 2, 3, 4, 5, 7, 6], np.int64)
STATE_LEVEL = 2 * _COUNTERS  # counters: those of even states, of odd states, of (state, channel level)


@njit(inline="always")
def _carry(buffer, position) -> None:
    """Add one to the number that the bytes before `position` spell."""
    position -= 1
    while buffer[position] == 255:
        buffer[position] = 0
        position -= 1
    buffer[position] += 1


@lru_cache
def coder(mode: int, dependent: bool = False) -> Callable[[np.ndarray, int, int, np.ndarray], int]:
    """Specialise the one coding loop for MEASURE, ENCODE or DECODE; the model is the same text in all three.

    Returns run(codes, width, model, buffer) -> bytes used. `codes`, int32 of shape (rows, channels, kernel) with any
    strides, is read (or, decoding, written); `width` is the kernel's last axis; bit 0 of `model` picks a row of RATES,
    bit 1 says that the block's rows are input channels; `buffer` is written, read, or (measuring) ignored. Decoding
    returns -1 where the buffer ends too soon. `dependent`: the codes lie on the trellis; encoding and measuring return
    -1 where they do not.
    """

    # fmt: off
    @njit(int64(i4[:, :, :], int64, int64, uint8[::1]), cache=True, nogil=True)
    def run(codes, width, model, buffer):
        task = mode
        rate, swapped = model & 1, model & 2
        size = buffer.size

        # np.uintp indices spare the check for negative ones (5% of the time)
        def code_bit(bit, node, i0, i1, i2, i3, counters, weights, limit, speed, low, span, position, buffer, size):
            # predict: counters hold a probability in their high 22 bits and a count in their low 10
            c0, c1 = np.int64(counters[np.uintp(i0)]), np.int64(counters[np.uintp(i1)])
            c2, c3 = np.int64(counters[np.uintp(i2)]), np.int64(counters[np.uintp(i3)])
            s0, s1 = np.int64(STRETCH[np.uintp(c0 >> 20)]), np.int64(STRETCH[np.uintp(c1 >> 20)])
            s2, s3 = np.int64(STRETCH[np.uintp(c2 >> 20)]), np.int64(STRETCH[np.uintp(c3 >> 20)])
            w0, w1 = np.uintp(4 * node), np.uintp(4 * node + 1)
            w2, w3 = np.uintp(4 * node + 2), np.uintp(4 * node + 3)
            dot = (weights[w0] * s0 + weights[w1] * s1) + (weights[w2] * s2 + weights[w3] * s3)
            p = np.int64(SQUASH[np.uintp(min(max(dot >> 16, -2047), 2047) + 2048)])
            bound = (span >> 16) * p
            if task == DECODE:
                bit = 1 if low < bound else 0
            if bit != 0:
                span = bound
            else:
                span -= bound
                if task == DECODE:
                    low -= bound
                else:
                    low += bound
            # learn
            goal = 4194303 * bit
            error = ((bit << 16) - p) * speed
            weights[w0] += (s0 * error + 131072) >> 18
            weights[w1] += (s1 * error + 131072) >> 18
            weights[w2] += (s2 * error + 131072) >> 18
            weights[w3] += (s3 * error + 131072) >> 18
            n0, n1, n2, n3 = c0 & 1023, c1 & 1023, c2 & 1023, c3 & 1023
            p0 = (c0 >> 10) + (((goal - (c0 >> 10)) * np.int64(RECIPROCAL[np.uintp(n0)])) >> 16)
            p1 = (c1 >> 10) + (((goal - (c1 >> 10)) * np.int64(RECIPROCAL[np.uintp(n1)])) >> 16)
            p2 = (c2 >> 10) + (((goal - (c2 >> 10)) * np.int64(RECIPROCAL[np.uintp(n2)])) >> 16)
            p3 = (c3 >> 10) + (((goal - (c3 >> 10)) * np.int64(RECIPROCAL[np.uintp(n3)])) >> 16)
            counters[np.uintp(i0)] = (p0 << 10) | min(n0 + 1, limit)
            counters[np.uintp(i1)] = (p1 << 10) | min(n1 + 1, limit)
            counters[np.uintp(i2)] = (p2 << 10) | min(n2 + 1, limit)
            counters[np.uintp(i3)] = (p3 << 10) | min(n3 + 1, limit)
            if span <= BOTTOM:
                span <<= 16
                if task == DECODE:
                    low <<= 16
                    if position < size:
                        low |= np.int64(buffer[position]) << 8
                    if position + 1 < size:
                        low |= np.int64(buffer[position + 1])
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

        rows, channels, kernel = codes.shape
        columns = channels * kernel
        limit, speed = RATES[rate, 0], RATES[rate, 1]
        counters = np.full(STATE_LEVEL + STATES * _LEVELS if dependent else _COUNTERS, 1 << 31, np.uint32)
        weights = np.full(8 * NODES if dependent else 4 * NODES, 20000, np.int64)
        channel = np.zeros(channels, np.int64)
        states = np.zeros(channels if swapped else rows, np.int64)  # one per output
        state, odd = np.int64(0), np.int64(0)
        longest = 29 if dependent else 30  # codes are twice their indices and fit 31 bits
        # rows with a margin of zeros on the left, so that neighbours need no bounds
        margin = max(2 * kernel, 5)
        here = np.zeros(margin + columns, np.int32)
        above = np.zeros(margin + columns, np.int32)
        higher = np.zeros(margin + columns, np.int32)
        flat = kernel == 1
        back_step = 4 if flat else kernel  # a matrix has no kernel: its next neighbours to the left take these parts
        far_step = 5 if flat else 2 * kernel
        up_step = 3 if flat else width
        row_level = np.int64(256)
        low, span, position = np.int64(0), np.int64(TOP), np.int64(0)
        if task == DECODE:
            for i in range(6):
                low = (low << 8) | (np.int64(buffer[i]) if i < size else 0)
            position = np.int64(6)
        for r in range(rows):
            here, above, higher = higher, here, above
            if task != DECODE:
                c = margin
                for i in range(channels):
                    for k in range(kernel):
                        here[np.uintp(c)] = codes[r, i, k]
                        c += 1
            c = margin
            for channel_index in range(channels):
                level = np.int64(LEVEL[np.uintp(channel[np.uintp(channel_index)] >> 2)])
                total, weight_sum = np.int64(0), np.int64(0)
                mean = channel[np.uintp(channel_index)]
                if dependent:
                    state = states[np.uintp(channel_index if swapped else r)]
                kx = 0
                for k in range(kernel):
                    # neighbours: in the kernel, one and two channels back, one and two rows up
                    q1 = np.int64(here[np.uintp(c - 1)])
                    left = q1 if (kx > 0 or flat) else 0
                    up, left_up, right_up = 0, 0, 0
                    if k >= width and not flat:
                        up = here[np.uintp(c - width)]
                        left_up = here[np.uintp(c - width - 1)] if kx > 0 else 0
                        right_up = here[np.uintp(c - width + 1)] if kx < width - 1 else 0
                    back, over = here[np.uintp(c - back_step)], above[np.uintp(c)]
                    a1, a2, au = abs(q1), abs(here[np.uintp(c - 2)]), abs(here[np.uintp(c - up_step)])
                    ab, ao = abs(back), abs(over)
                    near = 2 * (min(a1, 15) + min(au, 15) + min(ab, 15) + min(ao, 15))
                    near += min(abs(here[np.uintp(c - far_step)]), 15) + min(abs(higher[np.uintp(c)]), 15) + min(a2, 15)
                    near_level = np.int64(LEVEL[np.uintp(2 * near)])
                    trend = min(max(3 * (left + up) - left_up + right_up, -60), 60)
                    pull = min(abs(4 * (left + up) + 2 * right_up + back + over), 4095)
                    amount = (row_level >> 2) if flat else min(total, 4095)
                    place = min(k, _PLACES - 1) + _PLACES * np.int64(LEVEL[np.uintp(amount)])
                    value = np.int64(0)
                    if task != DECODE:
                        value = here[np.uintp(c)]
                    size_left = abs(value)
                    first, shift, last = 0, 0, Z3 + level
                    if dependent:
                        odd = state & 1
                        if task != DECODE and (size_left & 1) != odd and size_left != 0:
                            return np.int64(-1)
                        size_left = (size_left + odd) >> 1  # the index
                        first, shift = odd * NODES, odd * _COUNTERS
                        last = STATE_LEVEL + _LEVELS * state + level
                    bit, low, span, position = code_bit(
                        1 if value != 0 else 0, first,
                        shift + Z0 + 3 * np.int64(LEVEL[np.uintp(pull)]) + min(ab + ao, 2),
                        shift + Z1 + place, shift + Z2 + near_level, last,
                        counters, weights, limit, speed, low, span, position, buffer, size,
                    )
                    magnitude = np.int64(0)
                    if bit != 0:
                        g_left, g_up = np.sign(left) + 1, np.sign(up) + 1
                        pair = g_left + 3 * g_up
                        slope = np.int64(LEVEL[np.uintp(abs(trend))]) + (_LEVELS if trend < 0 else 0)
                        drift = min(max(weight_sum, -4), 4) + 4
                        negative, low, span, position = code_bit(
                            1 if value < 0 else 0, 1,
                            S0 + pair + 9 * (np.sign(right_up) + 1) + 27 * (np.sign(left_up) + 1),
                            S1 + slope, S2 + drift + 9 * (np.sign(back) + 1), S3 + pair,
                            counters, weights, limit, speed, low, span, position, buffer, size,
                        )
                        # Elias gamma with adaptive bits: the exponent in unary, then the mantissa from the top
                        agree = min(max(-trend if negative != 0 else trend, -8), 8) + 8
                        m0, m1 = shift + M0 + NODES * agree, shift + M1 + NODES * place
                        m2 = shift + M2 + NODES * np.int64(LEVEL[np.uintp(min(max(a1, a2) + max(ab, ao), 4095))])
                        m3 = shift + M3 + NODES * near_level
                        exponent = 0
                        while exponent < longest:
                            node = 2 + min(exponent, 29)
                            bit, low, span, position = code_bit(
                                1 if (size_left >> (exponent + 1)) != 0 else 0, first + node,
                                m0 + node, m1 + node, m2 + node, m3 + node,
                                counters, weights, limit, speed, low, span, position, buffer, size,
                            )
                            if bit == 0:
                                break
                            exponent += 1
                        magnitude = np.int64(1)
                        for j in range(exponent - 1, -1, -1):
                            node = 32 + 4 * min(exponent - 1, 7) + (magnitude if magnitude < 4 else 0)
                            bit, low, span, position = code_bit(
                                (size_left >> j) & 1, first + node,
                                m0 + node, m1 + node, m2 + node, m3 + node,
                                counters, weights, limit, speed, low, span, position, buffer, size,
                            )
                            magnitude = (magnitude << 1) | bit
                        if dependent:
                            state = NEXT_STATE[np.uintp(2 * state + (magnitude & 1))]
                            magnitude = 2 * magnitude - odd
                        weight_sum += -magnitude if negative != 0 else magnitude
                        total += magnitude
                        if task == DECODE:
                            here[np.uintp(c)] = -magnitude if negative != 0 else magnitude
                    else:
                        if dependent:
                            state = NEXT_STATE[np.uintp(2 * state)]
                        if task == DECODE:
                            here[np.uintp(c)] = 0
                    capped = min(magnitude, 63) << 6
                    mean += (capped - mean) >> 4
                    if flat:
                        row_level += (capped - row_level) >> 6
                    c += 1
                    kx += 1
                    if kx == width:
                        kx = 0
                channel[np.uintp(channel_index)] = mean
                if dependent:
                    states[np.uintp(channel_index if swapped else r)] = state
                if task == DECODE and position - 6 > size:
                    return np.int64(-1)
            if task == DECODE:
                c = margin
                for i in range(channels):
                    for k in range(kernel):
                        codes[r, i, k] = here[np.uintp(c)]
                        c += 1
        if task == DECODE:
            return position - 6
        # the fewest bytes of a number inside [low, low + span)
        tail, kept = np.int64(0), 0
        for count in range(7):
            unit = np.int64(TOP) >> (8 * count)
            tail = (low + unit - 1) // unit * unit
            kept = count
            if tail < low + span:
                break
        if task == ENCODE:
            if tail >= TOP:
                tail -= TOP
                _carry(buffer, position)
            for i in range(kept):
                buffer[position + i] = (tail >> (40 - 8 * i)) & 255
        return position + kept
    # fmt: on

    return run
