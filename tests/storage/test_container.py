"""The container: what is written is read, every byte is accounted for, and damage is refused with its place."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from autocompress.storage import (
    Entry,
    FormatError,
    file_size,
    float_entry,
    read,
    serialise,
    weight_entry,
    weight_size,
    write,
)
from autocompress.storage.bits import Value
from autocompress.storage.container import Archive


def resnet20_entries(scale: float = 1.0) -> list[Entry]:
    """Entries with the names, shapes and options of a CIFAR ResNet-20 with folded batch norm."""
    rng = np.random.default_rng(0)
    entries: list[Entry] = []

    def weight(name: str, shape: tuple[int, ...]) -> None:
        option = f"rd({2.0 ** -rng.integers(3, 7):.3g},{rng.choice([0.05, 0.1, 0.2])})s{10 * rng.integers(3, 9)}"
        codes = np.rint(rng.laplace(size=shape) * scale).astype(int)
        entries.append(weight_entry(name, codes, float(rng.random()), params={"option": option}))

    def norm(name: str, width: int) -> None:
        for part in ("weight", "bias"):
            entries.append(float_entry(f"{name}.{part}", rng.standard_normal(width).astype(np.float32)))

    weight("conv1.weight", (16, 3, 3, 3))
    norm("bn1", 16)
    width = 16
    for stage, out in ((1, 16), (2, 32), (3, 64)):
        for block in range(3):
            weight(f"layer{stage}.{block}.conv1.weight", (out, width, 3, 3))
            norm(f"layer{stage}.{block}.bn1", out)
            weight(f"layer{stage}.{block}.conv2.weight", (out, out, 3, 3))
            norm(f"layer{stage}.{block}.bn2", out)
            width = out
    weight("linear.weight", (10, 64))
    entries.append(float_entry("linear.bias", rng.standard_normal(10).astype(np.float32)))
    return entries


META: dict[str, Value] = {"budget": 67424, "strategy": "exact", "fingerprint": "0123456789abcdef", "gap": 0.00125}


@pytest.fixture(scope="module")
def entries() -> list[Entry]:
    return resnet20_entries()


@pytest.fixture(scope="module")
def blob(entries: list[Entry]) -> bytes:
    return serialise(entries, META)


def test_what_is_written_is_read(tmp_path: Path, entries: list[Entry]) -> None:
    info = write(tmp_path / "model.acz", entries, META)
    assert info.bytes == os.path.getsize(tmp_path / "model.acz") == file_size(entries, META)
    assert os.listdir(tmp_path) == ["model.acz"]
    with read(tmp_path / "model.acz") as archive:
        assert archive.meta == META
        assert list(archive.names) == [entry.name for entry in entries]
        for entry in entries:
            assert archive[entry.name] == entry
            np.testing.assert_array_equal(archive[entry.name].dequantise(), entry.dequantise())


def test_serialising_is_deterministic(blob: bytes) -> None:
    assert serialise(resnet20_entries(), dict(reversed(list(META.items())))) == blob


def test_header_of_resnet20_is_below_700_bytes(entries: list[Entry], blob: bytes) -> None:
    assert len(blob) - sum(entry.bytes for entry in entries) < 700


def test_describe_accounts_for_every_byte(blob: bytes) -> None:
    rows = Archive(blob, "memory").describe()
    assert sum(size for _, size in rows) == len(blob)
    assert all(size >= 0 for _, size in rows)
    assert ("conv1.weight: steps", 4) in rows


def test_dequantised_weights_are_float32_products() -> None:
    codes = np.array([[3, -2], [0, 7]])
    by_tensor = weight_entry("w", codes, 0.1)
    by_row = weight_entry("w", codes, np.array([0.1, 0.3]))
    np.testing.assert_array_equal(by_tensor.dequantise(), codes.astype(np.float32) * np.float32(0.1))
    steps = np.array([0.1, 0.3]).astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(by_row.dequantise(), codes.astype(np.float32) * steps[:, None])
    assert by_tensor.bytes == weight_size(codes, 0.1)
    assert by_row.bytes == weight_size(codes, np.array([0.1, 0.3])) == by_tensor.bytes


def test_an_empty_file_holds_nothing() -> None:
    archive = Archive(serialise([]), "memory")
    assert len(archive) == 0
    assert archive.meta == {}


def test_every_truncation_is_refused(blob: bytes) -> None:
    for length in [*range(600), *range(600, len(blob), 997), len(blob) - 1]:
        with pytest.raises(FormatError, match="memory"):
            Archive(blob[:length], "memory").verify()


def test_trailing_bytes_are_refused(blob: bytes) -> None:
    with pytest.raises(FormatError, match=rf"{len(blob)} bytes announced, the file has {len(blob) + 1}"):
        Archive(blob + b"\0", "memory")


def test_a_flipped_bit_is_refused_and_located(blob: bytes, entries: list[Entry]) -> None:
    for place in [*range(0, 600, 3), *range(600, len(blob), 1999)]:
        damaged = bytearray(blob)
        damaged[place] ^= 1 << place % 8
        with pytest.raises(FormatError):
            Archive(bytes(damaged), "memory").verify()
    damaged = bytearray(blob)
    damaged[-1] ^= 1
    archive = Archive(bytes(damaged), "memory")
    archive["conv1.weight"].dequantise()  # the other layers stay readable
    with pytest.raises(FormatError, match=r"memory: section \d+ .*does not match its checksum"):
        archive["linear.bias"]


def test_unknown_versions_and_foreign_files_are_named(blob: bytes) -> None:
    with pytest.raises(FormatError, match="format version 9 is unknown; this reader knows version"):
        Archive(blob[:4] + b"\x09" + blob[5:], "memory")
    with pytest.raises(FormatError, match="not an autocompress file"):
        Archive(b"PK\x03\x04 something else", "memory")


def test_an_empty_path_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(FormatError, match="the file is empty"):
        read(tmp_path / "empty")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, entries: list[Entry]) -> None:
    path = tmp_path / "model.acz"
    write(path, entries[:3])
    before = path.read_bytes()
    bad = Entry("w", (4, 4), "float32", "entropy", bytes(4) + b"\xff" * 8, "tensor")
    with pytest.raises(FormatError, match="entry 'w'"):
        write(path, [bad])
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.acz"]


def test_two_entries_of_one_name_are_refused() -> None:
    entry = float_entry("a", np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="the same name"):
        serialise([entry, entry])


@pytest.mark.parametrize("value", [True, False, 0, -1, 2**62, 0.1, 1.5, 1e300, "", "µ", [1, 2.5, "x"], []], ids=repr)
def test_metadata_values_survive(value: Value) -> None:
    archive = Archive(serialise([], {"key": value}), "memory")
    assert archive.meta == {"key": value}
    assert type(archive.meta["key"]) is type(value)


def test_raw_entries_keep_their_dtype() -> None:
    for dtype in ("float32", "float64", "int64", "bool", "uint8"):
        array = np.array([[0, 1, 1], [1, 0, 1]]).astype(dtype)
        entry = float_entry("x", array, codec="raw")
        again = Archive(serialise([entry]), "memory")["x"].dequantise()
        assert again.dtype == array.dtype
        np.testing.assert_array_equal(again, array)


def test_weights_that_are_no_numbers_are_refused() -> None:
    codes = np.array([[2**30, 1]])
    good = weight_entry("w", codes, 1.0)
    cases = {
        np.float32(3e38): "entry 'w': a weight beyond float32",
        np.float32(np.nan): "entry 'w': a step that is negative or not finite",
        np.float32(-1): "entry 'w': a step that is negative or not finite",
    }
    for step, words in cases.items():
        bad = Entry("w", good.shape, "float32", "entropy", step.tobytes() + good.payload[4:], "tensor")
        with pytest.raises(FormatError, match=words):
            bad.dequantise()
    with pytest.raises(ValueError, match="finite and not negative"):
        weight_entry("w", codes, np.array([70000.0]))
    with pytest.raises(ValueError, match=r"one number or one per row \(1,\), got shape \(2,\)"):
        weight_entry("w", codes, np.array([1.0, 2.0]))


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (5, 32), (3, 7), (1, 1), (0, 4), (4, 0)], ids=str)
@pytest.mark.parametrize("group", [1, 5, 32, 1000])
def test_a_step_per_group_multiplies_the_codes_of_its_group(shape: tuple[int, ...], group: int) -> None:
    rng = np.random.default_rng(group)
    codes, columns = rng.integers(-8, 8, shape), int(np.prod(shape[1:]))
    steps = rng.random((shape[0], -(-columns // group))).astype(np.float16)
    entry = weight_entry("w", codes, steps, group=group)
    again = Archive(serialise([float_entry("a", np.ones(3)), entry, weight_entry("b", codes, 0.5)]), "memory")
    assert again["w"] == entry
    assert again["w"].group == group
    assert again["w"].bytes == weight_size(codes, steps, group=group)
    expected = [[c * np.float32(steps[r, j // group]) for j, c in enumerate(codes.reshape(shape[0], -1)[r])]
                for r in range(shape[0])]  # fmt: skip
    np.testing.assert_array_equal(again["w"].dequantise(), np.array(expected, np.float32).reshape(shape))
    assert sum(size for _, size in again.describe()) == again.bytes


def test_impossible_steps_are_refused() -> None:
    codes = np.ones((4, 6), np.int64)
    good = weight_entry("w", codes, np.ones((4, 2)), group=3)
    for step, words in {"group0": "unknown kind", "group": "unknown kind", "row3": "unknown kind", "x": "unknown kind",
                        "group1": "48 bytes of steps wanted"}.items():  # fmt: skip
        with pytest.raises(FormatError, match=words):
            Entry("w", (4, 6), "float32", "entropy", good.payload, step).check()
    with pytest.raises(FormatError, match="fp8 needs steps"):
        Entry("w", (4, 6), "float32", "fp8", good.payload).check()
    with pytest.raises(ValueError, match=r"one per row \(4,\) or one per group of 4, got shape \(4, 3\)"):
        weight_entry("w", codes, np.ones((4, 3)), group=4)
    with pytest.raises(ValueError, match="e4m3 numbers only"):
        weight_entry("w", codes * 17, 1.0, codec="fp8")
