"""docs/format.md is enough to write a reader: the plain-Python one reads the same values as the compiled one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from reference_decoder import NEXT, codebook, decode_codes, read_file
from test_container import META, resnet20_entries
from tiny_tasks import call, write_task

import autocompress as ac
from autocompress.storage import (
    E4M3,
    encode_codebook,
    encode_codes,
    float_entry,
    grid_codes,
    grid_entry,
    serialise,
    weight_entry,
)


def on_the_trellis(codes: np.ndarray) -> np.ndarray:
    """Codes near those given that a row's states allow: even in even states, odd or zero in odd ones."""
    rows = np.array(codes).reshape(codes.shape[0] if codes.ndim > 1 else 1, -1)
    for row in rows:
        state = 0
        for i, code in enumerate(row.tolist()):
            odd = state % 2
            index = (abs(code) + odd) // 2
            row[i] = np.sign(code) * max(2 * index - odd, 0)
            state = NEXT[state][index % 2]
    return rows.reshape(codes.shape)


@pytest.mark.parametrize("shape", [(8, 5, 3, 3), (5, 30), (30, 5), (37,), (4, 1, 3, 3)], ids=str)
@pytest.mark.parametrize("scale", [0.5, 3.0, 5000.0])
def test_reference_decoder_agrees_on_the_trellis(shape: tuple[int, ...], scale: float) -> None:
    rng = np.random.default_rng(0)
    codes = on_the_trellis(np.rint(rng.laplace(size=shape) * scale).astype(int))
    assert decode_codes(encode_codes(codes, dependent=True), shape, dependent=True) == codes.reshape(-1).tolist()


@pytest.mark.parametrize(
    "shape", [(8, 5, 3, 3), (6, 4, 5), (3, 2, 5, 7), (40, 30), (37,), (4, 1, 3, 3), (2, 2, 3, 3, 3)], ids=str
)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("scale", [0.3, 3.0, 5000.0])
def test_reference_decoder_agrees(shape: tuple[int, ...], axis: int, scale: float) -> None:
    rng = np.random.default_rng(0)
    spread = np.exp(2 * rng.normal(size=[n if i == axis else 1 for i, n in enumerate(shape)]))
    codes = np.rint(rng.laplace(size=shape) * spread * scale).astype(int)
    codes.reshape(-1)[0] = 2**30
    assert decode_codes(encode_codes(codes), shape) == codes.reshape(-1).tolist()


@pytest.mark.parametrize("dependent", [False, True], ids=["entropy", "trellis"])
def test_both_orientations_and_rates_are_met(dependent: bool) -> None:
    seen = set()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        spread = np.exp(2 * rng.normal(size=(1, 24) if seed % 2 else (24, 1)))
        codes = np.rint(rng.laplace(size=(24, 24)) * spread * [0.2, 1, 20][seed % 3]).astype(int)
        codes = on_the_trellis(codes) if dependent else codes
        payload = encode_codes(codes, dependent)
        seen.add(payload[0])
        assert decode_codes(payload, codes.shape, dependent) == codes.reshape(-1).tolist()
    assert seen == {0, 1, 2, 3}


@pytest.mark.parametrize("signed", [False, True], ids=["plain", "signed"])
@pytest.mark.parametrize("count", [1, 3, 40])
@pytest.mark.parametrize(
    ("shape", "length"), [((8, 5, 3, 3), 9), ((8, 6, 3, 3), 18), ((6, 40), 4), ((30,), 5), ((5, 2, 3), 15)], ids=str
)
def test_reference_decoder_agrees_on_codebooks(shape: tuple[int, ...], length: int, count: int, signed: bool) -> None:
    rng = np.random.default_rng(count)
    words = np.rint(3 * rng.laplace(size=(count, length))).astype(int)
    words = np.concatenate([-words, 0 * words[:1], words]) if signed else words
    codes = words[rng.geometric(0.3, int(np.prod(shape)) // length) % len(words)].reshape(shape)
    assert codebook(encode_codebook(codes, length), shape) == codes.reshape(-1).tolist()


def test_codebooks_are_met_signed_and_packed_both_ways() -> None:
    rng, seen = np.random.default_rng(0), set()
    for runs, count, spread in [(40, 3, 1), (40, 30, 60), (3000, 256, 60), (3000, 127, 60), (600, 4, 60)]:
        for signed in (False, True):
            words = np.rint(spread * rng.laplace(size=(count, 8))).astype(int)
            words = np.concatenate([-words, 0 * words[:1], words]) if signed else words
            for skew in (False, True):
                place = rng.geometric(0.7, runs) if skew else rng.integers(len(words), size=runs)
                codes = words[place % len(words)].reshape(4, -1)
                payload = encode_codebook(codes, 8)
                seen.add(payload[0])
                if codes.size < 2000:
                    assert codebook(payload, codes.shape) == codes.reshape(-1).tolist()
    assert seen >= {0, 1, 2, 3}
    assert any(flags & 4 for flags in seen)


def test_reference_reader_reads_a_whole_file() -> None:
    entries = resnet20_entries(scale=0.5)[:5]
    rows = weight_entry("rows", np.arange(-10, 10).reshape(4, 5), np.array([0.5, 0.25, 2.0, 1.0]))
    trellis = weight_entry("trellis", on_the_trellis(np.arange(-10, 10).reshape(4, 5)), 0.5, codec="trellis")
    rng = np.random.default_rng(0)
    codes, values = rng.integers(-8, 8, (4, 5, 3)), rng.standard_normal((6, 4, 3, 3)).astype(np.float32)
    numbers = rng.choice(np.concatenate([E4M3, -E4M3]), (3, 40))
    numbers[0, :2] = -448.0, 2.0**-9
    entries = [
        *entries,
        rows,
        trellis,
        weight_entry("vector", np.array([1, 0, -3]), 0.1),
        weight_entry("codebook", np.tile([[1, 2, 3, -1, -2, -3, 0, 0, 0]], (4, 2)), 0.3, codec="codebook", vector=3),
        grid_entry("norm", *grid_codes(values[0, 0].reshape(-1), 7), 7),
        weight_entry("groups", codes, rng.random((4, 4)), group=4),
        weight_entry("fp8", numbers, rng.random(3), codec="fp8"),
        float_entry("masked", values * (values > 0.5), codec="masked"),
        float_entry("masked half", (values * (values > 0.5)).astype(np.float16), codec="masked"),
        float_entry("raw", values, codec="raw"),
    ]
    decoded = {name: (shape, values) for name, shape, values in read_file(serialise(entries, META))}
    assert list(decoded) == [entry.name for entry in entries]
    for entry in entries:
        shape, values = decoded[entry.name]
        assert shape == entry.shape
        np.testing.assert_array_equal(np.array(values, np.float32).reshape(shape), entry.dequantise())


def test_reference_reader_reads_what_compress_writes(tmp_path: Path) -> None:
    """Every tensor of a file as `ac.load` reads it."""
    task = write_task(tmp_path)
    outcome = call("compress", task, "--budget", "4x", "--effort", "fast", "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    path = tmp_path / "out" / "model.acz"
    loaded = ac.load(path)
    decoded = {name: (shape, values) for name, shape, values in read_file(path.read_bytes())}
    assert set(decoded) == {name for name in loaded if "running" not in name}
    for name, (shape, values) in decoded.items():
        np.testing.assert_array_equal(np.array(values, np.float32).reshape(shape), loaded[name].numpy())
