"""Throw damaged and hostile files at the reader: only FormatError, bounded time and memory, never other weights.

    python experiments/fuzz_format.py --files 100000 --seed 0
    python experiments/fuzz_format.py --atheris -max_total_time=600     # coverage-guided, needs `pip install atheris`

Half of the mutants are damaged (bytes flipped, cut, inserted, moved): they must be refused or read exactly as before.
The other half are hostile: the header or a payload is changed and every checksum is made right again, so that the
parsers and decoders behind the checksums are reached; they may decode to anything of the declared shape.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import tracemalloc
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if "--atheris" in sys.argv:  # coverage comes from instrumenting the storage modules as they are imported
    atheris = importlib.import_module("atheris")  # not a dependency
    with atheris.instrument_imports(include=["autocompress.storage"], exclude=["autocompress.storage.kernels"]):
        importlib.import_module("autocompress.storage")

from autocompress.obs import trellis_codes
from autocompress.storage import Entry, FormatError, float_entry, round_small, serialise, weight_entry
from autocompress.storage.bits import Cursor, put_uint
from autocompress.storage.container import SECTION_BYTES, Archive
from autocompress.storage.header import deflate, inflate, parse_header

SECONDS = 2.0  # the longest that one file may take
EXTRA_BYTES = 64 << 20  # the most memory beyond the declared tensors


class FuzzFailure(AssertionError):
    """A file that the reader took wrongly."""


@dataclass(frozen=True)
class Outcome:
    """What one mutant did: "refused", "same" or "decoded", the seconds it took and the peak memory in bytes."""

    kind: str
    seconds: float
    peak_bytes: int


def sample_entries(seed: int = 0) -> list[Entry]:
    """Small entries that use every codec, every kind of step and several shapes."""
    rng = np.random.default_rng(seed)

    def codes(*shape: int, scale: float = 1.0) -> np.ndarray:
        return np.rint(rng.laplace(size=shape) * scale).astype(int)

    pairs = codes(8, 32)
    pairs[:, ::2] = 0
    vector = rng.standard_normal(24).astype(np.float32)
    half = codes(3, 9, scale=2)
    books = {"plain": codes(6, 9, scale=2), "signed": np.concatenate([-half, 0 * half[:1], half])}

    def spelled(words: np.ndarray) -> np.ndarray:
        return words[rng.integers(len(words), size=(8, 6))].reshape(8, 6, 3, 3)

    entries = [
        weight_entry("conv1.weight", codes(8, 3, 3, 3), 0.1, params={"option": "rd(0.031,0.2)s60"}),
        weight_entry("layer1.0.conv1.weight", codes(16, 8, 3, 3, scale=0.4), np.full(16, 0.05)),
        weight_entry("linear.weight", codes(10, 16, scale=30), 0.01),
        weight_entry("zeros", np.zeros((64, 64), int), 1.0),
        *(weight_entry(f"plain.{c}", pairs, 0.2, codec=c) for c in ("packed", "bitmask", "sparse", "nm")),
        weight_entry("groups", codes(6, 4, 3, 3), rng.random((6, 5)), group=8),
        weight_entry("eight", rng.choice([0.0, 0.25, -1.5, 448.0], (6, 40)), rng.random(6), codec="fp8"),
        float_entry("pruned", (vector * (vector > 0)).astype(np.float32), codec="masked"),
        weight_entry(
            "trellis", trellis_codes(rng.laplace(size=(8, 27)), np.eye(27), [(0.4, 0.1)])[0], 0.4, codec="trellis"
        ),
        *(weight_entry(f"book.{k}", spelled(words), 0.3, codec="codebook", vector=9) for k, words in books.items()),
        float_entry("bn1.weight", vector),
        float_entry("bn1.bias", round_small(vector, 5), codec="smallfloat"),
        float_entry("counter", np.arange(6, dtype=np.int64), codec="raw"),
        weight_entry("large", codes(64, 64, scale=3), 0.1),
    ]
    return entries


def damage(blob: bytes, rng: np.random.Generator) -> bytes:
    """Change a file without touching its checksums: flip, overwrite, cut, insert, delete or move bytes."""
    data = bytearray(blob)
    for _ in range(rng.integers(1, 4)):
        at, length = int(rng.integers(len(data) + 1)), int(rng.integers(1, 40))
        match rng.integers(6):
            case 0:
                data[at % len(data)] ^= 1 << int(rng.integers(8))
            case 1:
                data[at : at + length] = rng.bytes(min(length, len(data) - at))
            case 2:
                del data[at:]
            case 3:
                data[at:at] = rng.bytes(length)
            case 4:
                del data[at : at + length]
            case _:
                data[at : at + length] = data[: min(length, len(data) - at)]
        if not data:
            break
    return bytes(data)


def _parts(blob: bytes) -> tuple[bytes, bytes]:
    """Split a valid file into its inflated header and its payloads."""
    cursor = Cursor(blob[9:], "file")
    length, sections = cursor.uint(), cursor.uint()
    region, payloads = cursor.take(length), cursor.rest()
    inner = Cursor(region, "region")
    raw_length = inner.uint()
    inner.take(4 * sections)
    return inflate(inner.rest(), raw_length), payloads


def _assemble(raw: bytes, payloads: bytes, lengths: list[int]) -> bytes:
    """Put a file together with right checksums around whatever header and payloads are given."""
    checks, start, filled = b"", 0, 0
    for i, length in enumerate(lengths):
        filled += length
        if filled >= SECTION_BYTES or i == len(lengths) - 1:
            checks += zlib.crc32(payloads[start : start + filled]).to_bytes(4, "little")
            start, filled = start + filled, 0
    region = put_uint(len(raw)) + checks + deflate(raw)
    tail = put_uint(len(region)) + put_uint(len(checks) // 4) + region
    front = b"\x89ACZ\x01"
    return front + zlib.crc32(front + tail).to_bytes(4, "little") + tail + payloads


def hostile(blob: bytes, rng: np.random.Generator) -> bytes:
    """Change the header or the payloads and make every checksum and length right again."""
    raw, payloads = (bytearray(part) for part in _parts(blob))
    target = raw if rng.random() < 0.6 else payloads
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(len(target)))
        choice = rng.integers(5)
        if choice == 0:
            target[at] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF]))
        elif choice == 1:
            target[at] ^= 1 << int(rng.integers(8))
        elif choice == 2:
            target[at] = int(rng.integers(256))
        elif choice == 3 and target is payloads:
            stop = at + int(rng.integers(1, 400))
            target[at:stop] = bytes(len(target[at:stop]))
        else:
            run = int(rng.integers(1, 9))
            target[at : at + run] = rng.bytes(len(target[at : at + run]))
    try:
        lengths = [slot.length for slot in parse_header(bytes(raw)).slots]
    except FormatError:
        lengths = [len(payloads)]
    body = bytes(payloads)
    if sum(lengths) < 1 << 20:
        body = body[: sum(lengths)].ljust(sum(lengths), b"\0")
    return _assemble(bytes(raw), body, lengths)


def judge(data: bytes, original: dict[str, np.ndarray] | None) -> Outcome:
    """Read every entry of a file. Raises FuzzFailure on anything but a refusal or, if given, the original values."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    start, declared, kind = time.perf_counter(), 0, "decoded"
    try:
        archive = Archive(data, "mutant")
        for name in archive.names:
            entry = archive[name]
            declared = max(declared, entry.numel * np.dtype(entry.dtype).itemsize)
            values = entry.dequantise()
            if values.shape != entry.shape or values.dtype.name != entry.dtype:
                raise FuzzFailure(f"{name}: declared {entry.dtype} {entry.shape}, got {values.dtype} {values.shape}")
            if original is not None:
                wanted = original.get(name)
                if wanted is None or wanted.dtype != values.dtype or not np.array_equal(wanted, values):
                    raise FuzzFailure(f"{name}: other weights were read from a damaged file")
            del values, entry
        if original is not None:
            if set(archive.names) != set(original):
                raise FuzzFailure("other names were read from a damaged file")
            kind = "same"
    except FormatError:
        kind = "refused"
    seconds, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1] - before
    if seconds > SECONDS:
        raise FuzzFailure(f"{seconds:.1f} s for {len(data)} bytes")
    if peak > declared + EXTRA_BYTES:
        raise FuzzFailure(f"{peak >> 20} MiB for {declared >> 20} MiB of declared tensors")
    return Outcome(kind, seconds, peak)


def fuzz(files: int, seed: int) -> tuple[Counter[str], float, int]:
    """Judge `files` mutants. Returns counts by mutation and outcome, the longest seconds, the largest peak in bytes."""
    blob = serialise(sample_entries(), {"seed": 0, "task": "fuzz"})
    with_values = {name: entry.dequantise() for name, entry in Archive(blob, "original").items()}
    counts: Counter[str] = Counter()
    longest, largest = 0.0, 0
    tracemalloc.start()
    try:
        for i in range(files):
            rng = np.random.default_rng((seed, i))
            mutate, values = (damage, with_values) if i % 2 else (hostile, None)
            data = mutate(blob, rng)
            passed = False
            try:
                outcome = judge(data, values)
                passed = True
            finally:
                if not passed:
                    Path("fuzz_failure.acz").write_bytes(data)  # kept for the report; the error goes on
            counts[f"{mutate.__name__} {outcome.kind}"] += 1
            longest, largest = max(longest, outcome.seconds), max(largest, outcome.peak_bytes)
    finally:
        tracemalloc.stop()
    return counts, longest, largest


def run_atheris(arguments: list[str]) -> None:
    """Let atheris look for inputs: half of each input steers the header, the other half the payloads."""
    blob = serialise(sample_entries())
    raw, payloads = _parts(blob)
    tracemalloc.start()

    def one(data: bytes) -> None:
        judge(data, None)
        start = data[: len(data) // 2].ljust(len(raw), b"\0")
        head = bytes(a ^ b for a, b in zip(raw, start, strict=False))
        tail = data[len(data) // 2 :].ljust(len(payloads), b"\0")
        body = bytes(a ^ b for a, b in zip(payloads, tail, strict=False))
        try:
            lengths = [slot.length for slot in parse_header(head).slots]
        except FormatError:
            return
        if sum(lengths) < 1 << 20:
            judge(_assemble(head, body[: sum(lengths)].ljust(sum(lengths), b"\0"), lengths), None)

    atheris.Setup([sys.argv[0], *arguments], one)
    atheris.Fuzz()


def main() -> None:
    """Parse the command line and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--atheris", action="store_true", help="coverage-guided; further arguments go to libFuzzer")
    options, rest = parser.parse_known_args()
    if options.atheris:
        run_atheris(rest)
        return
    start = time.perf_counter()
    counts, longest, largest = fuzz(options.files, options.seed)
    for kind, count in sorted(counts.items()):
        sys.stdout.write(f"{kind:20s} {count:8d}\n")
    seconds = time.perf_counter() - start
    sys.stdout.write(
        f"{options.files} files in {seconds:.0f} s; slowest {longest:.3f} s; peak {largest / 2**20:.1f} MiB\n"
    )


if __name__ == "__main__":
    main()
