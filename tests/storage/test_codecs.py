"""Every codec is exactly inverse and says its exact size, on every kind of array that it accepts."""

from __future__ import annotations

import numpy as np
import pytest
from reference_decoder import NEXT

from autocompress.storage import (
    CODECS,
    E4M3,
    FormatError,
    encode_codebook,
    encode_codes,
    nm_pattern,
    order0_bits,
    round_small,
    weight_entry,
    with_fixed_fields,
)
from autocompress.storage.bits import pack_bits, unpack_bits
from autocompress.storage.vectors import codebook_size

SHAPES = [(16, 3, 3, 3), (10, 64), (33,), (1, 1), (7, 5, 3), (4, 1, 3, 3), (2, 3, 2, 2, 2), (0, 4), (5, 0), ()]
CODE_CODECS = sorted(name for name, codec in CODECS.items() if codec.kind == "codes")
FLOAT_CODECS = sorted(name for name, codec in CODECS.items() if codec.kind == "floats")


def laplace(shape: tuple[int, ...], scale: float, seed: int = 0) -> np.ndarray:
    """Integer codes of a Laplace-distributed tensor."""
    return np.rint(np.random.default_rng(seed).laplace(size=shape) * scale).astype(np.int64)


def accepted(name: str, codes: np.ndarray) -> np.ndarray:
    """The codes, or for a codec that takes only some, ones near them that it takes."""
    codes = codes.copy()
    if name == "nm":
        codes.reshape(-1)[1::2] = 0
    if name == "trellis":  # even in even states, odd or zero in odd ones
        for row in codes.reshape(codes.shape[0] if codes.ndim > 1 else 1, -1) if codes.size else ():
            state = 0
            for i, code in enumerate(row.tolist()):
                index = (abs(code) + state % 2) // 2
                row[i] = np.sign(code) * max(2 * index - state % 2, 0)
                state = NEXT[state][index % 2]
    return codes


@pytest.mark.parametrize("scale", [0.0, 0.2, 1.0, 20.0, 900.0], ids=lambda s: f"scale{s}")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CODE_CODECS)
def test_integer_codecs_are_inverse_and_know_their_size(name: str, shape: tuple[int, ...], scale: float) -> None:
    codes = accepted(name, laplace(shape, scale))
    if name == "nm" and nm_pattern(codes) is None:
        with pytest.raises(ValueError, match="follow none of the patterns"):
            CODECS["nm"].encode(codes)
        return
    payload = CODECS[name].encode(codes)
    decoded = CODECS[name].decode(payload, shape, "int32")
    assert decoded.dtype == np.int32
    assert decoded.shape == shape
    np.testing.assert_array_equal(decoded, codes)
    assert CODECS[name].size(codes) == len(payload)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FLOAT_CODECS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_float_codecs_are_inverse_and_know_their_size(name: str, shape: tuple[int, ...], dtype: str) -> None:
    array = np.random.default_rng(1).standard_normal(shape).astype(np.float16).astype(dtype)
    array.reshape(-1)[::5] = 0
    payload = CODECS[name].encode(array)
    np.testing.assert_array_equal(CODECS[name].decode(payload, shape, dtype), array)
    assert CODECS[name].size(array) == len(payload)


@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_masked_values_come_back_bit_for_bit(shape: tuple[int, ...], density: float) -> None:
    rng = np.random.default_rng(2)
    for values in (rng.standard_normal(shape), 1e-20 * rng.standard_normal(shape), rng.standard_normal(shape) * 1e20):
        array = (values * (rng.random(shape) < density)).astype(np.float32)
        half = np.clip(array, -60000, 60000).astype(np.float16).astype(np.float32)
        for given in (array, np.copysign(array, -1.0), half):
            payload = CODECS["masked"].encode(given)
            decoded = CODECS["masked"].decode(payload, shape, "float32")
            assert decoded.dtype == np.float32
            assert decoded.tobytes() == given.tobytes()
            assert CODECS["masked"].size(given) == len(payload)


def test_masked_values_take_two_bytes_where_that_is_exact() -> None:
    array = np.zeros((64, 64), np.float32)
    array[:, :8] = np.random.default_rng(0).standard_normal((64, 8))
    exact, half = (len(CODECS["masked"].encode(a.astype(np.float32))) for a in (array, array.astype(np.float16)))
    assert exact - half == 2 * 512
    assert half < 2 * 512 + 50


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp8_is_inverse_on_its_numbers(shape: tuple[int, ...]) -> None:
    numbers = np.random.default_rng(4).choice(np.concatenate([E4M3, -E4M3]), shape)
    payload = CODECS["fp8"].encode(numbers)
    decoded = CODECS["fp8"].decode(payload, shape, "float32")
    assert decoded.dtype == np.float32
    np.testing.assert_array_equal(decoded, numbers)
    assert CODECS["fp8"].size(numbers) == len(payload)


def test_fp8_holds_what_torch_calls_e4m3_and_nothing_else() -> None:
    torch = pytest.importorskip("torch")
    every = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(E4M3, every)
    with pytest.raises(ValueError, match="e4m3 numbers only"):
        CODECS["fp8"].encode(np.array([[1.0, 1.01]], np.float32))
    with pytest.raises(ValueError, match="e4m3 numbers only"):
        CODECS["fp8"].encode(np.array([[449.0]], np.float32))


@pytest.mark.parametrize(("n", "m"), [(1, 2), (1, 4), (2, 4), (1, 8), (4, 8), (2, 16), (8, 16)])
def test_nm_finds_its_pattern(n: int, m: int) -> None:
    rng = np.random.default_rng(n * m)
    codes = np.zeros((12, m), np.int64)
    for group in codes:
        group[rng.choice(m, n, replace=False)] = rng.integers(1, 8, n)
    codes = codes.reshape(4, -1)
    found = nm_pattern(codes)
    assert found is not None
    assert found[0] / found[1] <= n / m
    np.testing.assert_array_equal(CODECS["nm"].decode(CODECS["nm"].encode(codes), codes.shape, "int32"), codes)


def test_nm_refuses_dense_codes() -> None:
    with pytest.raises(ValueError, match="follow none of the patterns 1:2, 1:4"):
        CODECS["nm"].encode(np.ones((4, 16), np.int64))


@pytest.mark.parametrize("bits", range(33))
def test_packing_is_inverse(bits: int) -> None:
    values = np.random.default_rng(bits).integers(0, 2**bits, 101)
    packed = pack_bits(values, bits)
    assert len(packed) == -(-101 * bits // 8)
    np.testing.assert_array_equal(unpack_bits(packed, 101, bits), values)


def test_packing_layout() -> None:
    assert pack_bits(np.array([1, 2, 3, 4, 5]), 3) == bytes([0b11_010_001, 0b0_101_100_0])


@pytest.mark.parametrize("magnitude", [0, 1, 2, 3, 4, 7, 8, 255, 65535, 2**30 - 1, 2**30])
def test_entropy_coder_holds_every_magnitude(magnitude: int) -> None:
    codes = np.array([[magnitude, -magnitude, 0, 1]])
    np.testing.assert_array_equal(CODECS["entropy"].decode(encode_codes(codes), (1, 4), "int32"), codes)


def test_entropy_coder_refuses_larger_magnitudes() -> None:
    with pytest.raises(ValueError, match=r"at most 2\*\*30, got 1073741825"):
        encode_codes(np.array([[2**30 + 1]]))


def test_order0_bits_of_a_fair_coin() -> None:
    assert order0_bits(np.array([0, 1] * 50)) == pytest.approx(100)


def test_entropy_coding_beats_order_0_on_a_tensor_with_structure() -> None:
    rng = np.random.default_rng(3)
    scale = np.exp(rng.normal(size=(64, 1, 1, 1)) + rng.normal(size=(1, 64, 1, 1)))
    codes = np.rint(rng.laplace(size=(64, 64, 3, 3)) * scale * 0.4).astype(int)
    assert len(encode_codes(codes)) < 0.85 * order0_bits(codes) / 8


@pytest.mark.parametrize("mantissa", range(0, 24, 3))
def test_round_small_is_idempotent_and_close(mantissa: int) -> None:
    array = np.random.default_rng(5).standard_normal(500).astype(np.float32)
    rounded = round_small(array, mantissa)
    np.testing.assert_array_equal(round_small(rounded, mantissa), rounded)
    assert (np.abs(rounded - array) <= 2.0 ** -(mantissa + 1) * np.abs(array)).all()
    np.testing.assert_array_equal(
        CODECS["smallfloat"].decode(CODECS["smallfloat"].encode(rounded), (500,), "float32"), rounded
    )


@pytest.mark.parametrize("name", CODE_CODECS)
def test_a_shape_that_the_payload_cannot_hold_is_refused_at_once(name: str) -> None:
    payload = CODECS[name].encode(np.zeros((4, 16), np.int64))
    with pytest.raises(FormatError, match="bytes cannot hold 1099511627776 values"):
        CODECS[name].decode(payload, (2**20, 2**20), "int32")


@pytest.mark.parametrize("name", CODE_CODECS)
def test_a_cut_payload_is_refused(name: str) -> None:
    payload = CODECS[name].encode(codes := accepted(name, laplace((8, 64), 2.0)))
    with pytest.raises(FormatError):
        CODECS[name].decode(payload[: len(payload) // 2], codes.shape, "int32")
    with pytest.raises(FormatError):
        CODECS[name].decode(payload + bytes(9), codes.shape, "int32")


@pytest.mark.parametrize("magnitude", [0, 2, 4, 8, 256, 65536, 2**30])
def test_the_trellis_holds_every_magnitude(magnitude: int) -> None:
    codes = accepted("trellis", np.array([[magnitude, -magnitude, 0, 1 - magnitude, 7, magnitude]]))
    assert np.abs(codes).max() >= magnitude
    np.testing.assert_array_equal(CODECS["trellis"].decode(CODECS["trellis"].encode(codes), (1, 6), "int32"), codes)


@pytest.mark.parametrize("codes", [[[1, 0]], [[2, 2]], [[0, 0, 0, 3]]], ids=str)
def test_codes_that_leave_the_trellis_are_refused(codes: list[list[int]]) -> None:
    for act in (CODECS["trellis"].encode, CODECS["trellis"].size):
        with pytest.raises(ValueError, match="do not lie on the trellis"):
            act(np.array(codes))


def test_a_trellis_tensor_larger_than_the_trial_is_inverse_and_refused_where_it_leaves_late() -> None:
    codes = accepted("trellis", laplace((96, 96, 3, 3), 1.5))
    payload = CODECS["trellis"].encode(codes)
    assert CODECS["trellis"].size(codes) == len(payload)
    np.testing.assert_array_equal(CODECS["trellis"].decode(payload, codes.shape, "int32"), codes)
    codes[-1, -1, -1, -1] += 1 if codes[-1, -1, -1, -1] else 100
    codes[-1, -1, -1, -2] += 1 if codes[-1, -1, -1, -2] else 100
    for act in (CODECS["trellis"].encode, CODECS["trellis"].size):
        with pytest.raises(ValueError, match="do not lie on the trellis"):
            act(codes)


def test_a_tensor_larger_than_the_trial_knows_its_size() -> None:
    codes = laplace((96, 96, 3, 3), 0.5) * np.arange(96)[:, None, None, None] // 48
    payload = CODECS["entropy"].encode(codes)
    assert CODECS["entropy"].size(codes) == len(payload)
    np.testing.assert_array_equal(CODECS["entropy"].decode(payload, codes.shape, "int32"), codes)


def test_entropy_coder_refuses_endless_rows() -> None:
    with pytest.raises(ValueError, match="rows of at most 1048576 codes, got 1048577"):
        encode_codes(np.zeros((1, 1, 2**20 + 1), np.int64))
    with pytest.raises(FormatError, match="a row of 1048577 codes"):
        CODECS["entropy"].decode(bytes(2000), (2**20 + 1,), "int32")


def spelled(shape: tuple[int, ...], length: int, count: int, signed: bool = True) -> np.ndarray:
    """Codes whose runs of `length` are drawn from `count` words, and their negatives and zeros where signed."""
    rng = np.random.default_rng([length, count])
    words = np.rint(5 * rng.standard_normal((count, length))).astype(np.int64)
    words = np.concatenate([-words, 0 * words[:1], words]) if signed else words
    return words[rng.integers(len(words), size=int(np.prod(shape)) // length)].reshape(shape)


@pytest.mark.parametrize("signed", [False, True], ids=["plain", "signed"])
@pytest.mark.parametrize(
    ("shape", "length", "count"), [((64, 32, 3, 3), 9, 16), ((10, 64), 4, 8), ((12, 4, 3, 3), 18, 5), ((60,), 6, 3)]
)
def test_a_codebook_is_stored_once(shape: tuple[int, ...], length: int, count: int, signed: bool) -> None:
    codes = spelled(shape, length, count, signed)
    payload = encode_codebook(codes, length)
    np.testing.assert_array_equal(CODECS["codebook"].decode(payload, shape, "int32"), codes)
    assert codebook_size(codes, length) == len(payload)
    # Words of 6 bits a number at most, and an index of fixed width for each run; heads are a few bytes.
    assert len(payload) <= (6 * count * length + 7) // 8 + 3 + codes.size // length * 6 / 8 + 3 + 12
    # Without signs the words would be stored twice, and the zeros too.
    assert payload[0] & 1 == signed
    assert payload[2] == count


def test_a_codebook_with_fixed_fields_is_the_same_weight() -> None:
    for codes, flags in ((spelled((64, 32, 3, 3), 9, 15), 7), (spelled((4, 40), 4, 3) * 2**16, 2 + 1)):
        entry = weight_entry(
            "w", codes, 0.5, codec="codebook", vector=codes.shape[-1] // 3 * 9 if codes.ndim > 2 else 4
        )
        fixed = with_fixed_fields(entry)
        np.testing.assert_array_equal(fixed.dequantise(), entry.dequantise())
        assert fixed.bytes >= entry.bytes
        assert fixed.payload[4] == flags  # behind one step


def test_a_codebook_wants_whole_vectors_of_integers() -> None:
    with pytest.raises(ValueError, match="30 codes are not whole vectors of 4"):
        encode_codebook(np.zeros((5, 6), np.int64), 4)
    with pytest.raises(ValueError, match="codes are integers, got dtype float64"):
        encode_codebook(np.zeros((5, 6)), 3)
    with pytest.raises(ValueError, match="vectors belong to the codec codebook, not to entropy"):
        weight_entry("w", np.zeros((5, 6), np.int64), 1.0, vector=3)


def test_words_of_large_numbers_are_told_apart() -> None:
    """More digits than one number holds: nine codes of thirty bits."""
    codes = np.full((6, 9), -(2**30))  # numbers that span 31 bits
    codes[1], codes[2, 0], codes[3:5, 1] = 2**30 - 1, 5, 7
    payload = encode_codebook(codes, 9)
    assert payload[2] == 4
    np.testing.assert_array_equal(CODECS["codebook"].decode(payload, codes.shape, "int32"), codes)


def book(flags: int, length: int, words: np.ndarray, index: np.ndarray, count: int | None = None) -> bytes:
    """A codebook's payload, entropy-coded, that says what it is told to."""
    parts = encode_codes(words), encode_codes(index)
    head = [length, len(words) if count is None else count, *map(len, parts)]
    return bytes([flags, *head]) + b"".join(parts)


WORDS = np.array([[1, 2], [3, 4]])
HOSTILE = [
    ("codebook", book(8, 2, WORDS, np.array([[0, 1]])), (1, 4), "unknown flags 8"),
    ("codebook", book(0, 0, WORDS, np.array([[0, 1]])), (1, 4), "4 codes are not whole vectors of 0"),
    ("codebook", book(0, 3, WORDS, np.array([[0, 1]])), (1, 4), "4 codes are not whole vectors of 3"),
    ("codebook", book(0, 2, WORDS, np.array([[0, 2]])), (1, 4), "indices from 0 to 2 of 2 words"),
    ("codebook", book(0, 2, WORDS, np.array([[0, -1]])), (1, 4), "indices from -1 to 0 of 2 words"),
    ("codebook", book(1, 2, WORDS, np.array([[-3, 2]])), (1, 4), "indices from -3 to 2 of 2 words"),
    ("codebook", book(0, 2, WORDS, np.array([[0, 1]]), 3), (1, 4), "the integer 3 is above its limit 2"),
    ("codebook", book(0, 2, WORDS, np.array([[0, 1]]))[:-1], (1, 4), "bytes wanted"),
    ("codebook", book(0, 2, WORDS, np.array([[0, 1]])) + b"\1", (1, 4), "1 bytes too many"),
    ("entropy", encode_codes(laplace((8, 64), 2.0))[:99], (8, 64), "ends before the last code"),
    ("entropy", encode_codes(laplace((8, 64), 2.0)) + bytes(9), (8, 64), "bytes follow the last code"),
    ("entropy", b"\x04" + bytes(9), (4,), "unknown entropy model 4; this version knows 0 to 3"),
    ("trellis", b"\x04" + bytes(9), (4,), "unknown entropy model 4"),
    ("packed", b"\x03\0\0\xff\xff", (5,), "filling bits after the last packed value are not zero"),
    ("packed", b"\0\0\0\0\x01", (5000,), "padding that is not zero"),
    ("packed", b"\x11\0\0" + bytes(9), (4,), "a field of 17 bits; at most 16"),
    ("bitmask", b"\x01\0\0\x0f\x0f\x01", (4,), "1 bytes too many"),
    ("sparse", b"\x01\x01\0\x08\x01\0\0\0\x30\x01", (4,), "an index 48 in a tensor of 4 codes"),
    ("sparse", b"\x01\x01\0\x11\x01\0\0\0\x30\x01", (4,), "a gap width of 17 bits"),
    ("nm", b"\x01\0\0\x09" + bytes(9), (4,), "an unknown N:M pattern 9"),
    ("nm", b"\x01\0\0\x02\x07\0", (4,), "a subset index of 7 among 6"),
    ("nm", b"\x01\0\0\x02\x07\0", (5,), "5 codes are not whole groups of 4"),
    ("smallfloat", b"\0\x08\x7f\0\xff", (1,), "a value beyond float32"),
    ("smallfloat", b"\x20\0\0\0" + bytes(9), (1,), "32 mantissa bits"),
    ("fp16", b"\0\0\0", (2,), "4 bytes wanted, got 3"),
    ("raw", b"\0\0\0", (2,), "8 bytes wanted, got 3"),
    ("masked", CODECS["masked"].encode(np.ones((4, 4), np.float32))[:-1], (4, 4), "bytes wanted"),
    ("masked", CODECS["masked"].encode(np.ones((4, 4), np.float32)) + b"\0", (4, 4), "1 bytes too many"),
    ("masked", b"\x03" + CODECS["masked"].encode(np.ones((4, 4), np.float32))[1:], (4, 4), "3 bytes for each float32"),
    ("masked", b"\x02\xff\xff\xff\xff\0", (4, 4), "4294967295 bytes wanted"),
    ("masked", b"\x02\x03\0\0\0" + encode_codes(np.full(4, 2)), (4,), "more than zeros and ones"),
    ("fp8", encode_codes(np.array([127, -127])), (2,), "an e4m3 number 127; at most 126"),
]


@pytest.mark.parametrize(("name", "payload", "shape", "words"), HOSTILE, ids=[f"{h[0]}-{h[3][:24]}" for h in HOSTILE])
def test_a_hostile_payload_is_refused_with_the_reason(
    name: str, payload: bytes, shape: tuple[int, ...], words: str
) -> None:
    with pytest.raises(FormatError, match=words):
        CODECS[name].decode(payload, shape, "float32" if CODECS[name].kind == "floats" else "int32")
