"""A short run of experiments/fuzz_format.py, and proof that its judge can fail."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from autocompress.storage import FormatError, float_entry, serialise
from autocompress.storage.container import Archive


@pytest.fixture(scope="module")
def fuzzer() -> ModuleType:
    path = Path(__file__).parents[2] / "experiments" / "fuzz_format.py"
    spec = importlib.util.spec_from_file_location("fuzz_format", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_format"] = module
    spec.loader.exec_module(module)
    return module


def test_mutants_are_refused_or_harmless(fuzzer: ModuleType) -> None:
    counts, _, _ = fuzzer.fuzz(2000, seed=1)
    assert sum(counts.values()) == 2000
    assert counts["hostile decoded"] > 0  # the decoders behind the checksums were reached
    assert counts["hostile refused"] > 0


def test_the_judge_notices_other_weights(fuzzer: ModuleType) -> None:
    entries = fuzzer.sample_entries()
    values = {entry.name: entry.dequantise() for entry in entries}
    assert fuzzer.judge(serialise(entries), values).kind == "same"
    values["bn1.weight"] = values["bn1.weight"] + 1
    with pytest.raises(fuzzer.FuzzFailure, match=r"bn1\.weight: other weights"):
        fuzzer.judge(serialise(entries), values)


def test_hostile_repair_makes_a_valid_file(fuzzer: ModuleType) -> None:
    blob = serialise(fuzzer.sample_entries(), {"a": 1})
    raw, payloads = fuzzer._parts(blob)
    lengths = [entry.bytes for entry in fuzzer.sample_entries()]
    assert fuzzer._assemble(raw, payloads, lengths) == blob


def test_a_deflate_bomb_is_refused(fuzzer: ModuleType) -> None:
    bomb = fuzzer._assemble(bytes(1 << 23), b"", [])
    with pytest.raises(FormatError, match="header"):
        Archive(bomb, "bomb")
    blob = serialise([float_entry("a", np.zeros(4, np.float32))])
    raw, payloads = fuzzer._parts(blob)
    announced = fuzzer._assemble(raw + bytes(5), payloads, [8])
    with pytest.raises(FormatError, match="5 bytes too many"):
        Archive(announced, "long")


def test_a_huge_shape_is_refused_before_it_is_allocated(fuzzer: ModuleType) -> None:
    raw, payloads = fuzzer._parts(serialise([float_entry("a", np.zeros(4, np.float32))]))
    at = raw.index(b"a\0") + 2 + 3  # behind codec, dtype and rank stands the axis, one byte
    huge = raw[:at] + b"\x80\x80\x80\x80\x10" + raw[at + 1 :]
    with pytest.raises(FormatError, match=r"entry 'a': 8 bytes cannot hold the shape \(4294967296,\)"):
        Archive(fuzzer._assemble(huge, payloads, [8]), "huge")


def test_an_unknown_codec_is_refused_by_its_number(fuzzer: ModuleType) -> None:
    raw, payloads = fuzzer._parts(serialise([float_entry("a", np.zeros(4, np.float32))]))
    at = raw.index(b"a\0") + 2
    with pytest.raises(FormatError, match="entry 'a': unknown codec number 99; this version knows 0 to 11"):
        Archive(fuzzer._assemble(raw[:at] + b"\x63" + raw[at + 1 :], payloads, [8]), "foreign")
