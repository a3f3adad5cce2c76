"""Norms and biases in few bits: the length is known in advance, the values are the file's, and tables stay exact."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import convnet, images
from test_applying import profiled
from torch import nn

import autocompress as ac
from autocompress.errors import InfeasibleError
from autocompress.layers import find_layers, stored_tensors
from autocompress.records import HALF_BITS, LEAST_BITS, VectorStore, make_template, vector_bits, vector_keys
from autocompress.storage import grid_codes, grid_entry, grid_size, read

VALUES = st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=70)


@given(VALUES, st.integers(1, 13))
def test_a_grid_holds_every_value_to_half_a_step(values: list[float], bits: int) -> None:
    array = np.array(values, np.float32)
    codes, step = grid_codes(array, bits)
    entry = grid_entry("bn.bias", codes, step, bits)
    assert entry.bytes == grid_size(array.size, bits)
    assert int(codes.max()) - int(codes.min()) < 2**bits
    assert np.array_equal(entry.dequantise(), codes.astype(np.float32) * step)
    half = max(float(array.max() - array.min()) / (2**bits - 1), float(np.abs(array).max()) / 32000) / 2
    # The ends lie on the grid to half a step, so one of them may be off by as much again.
    assert float(np.abs(entry.dequantise() - array).max()) <= 2 * half * (1 + 1e-5) + 1e-37


@pytest.mark.parametrize("value", [0.0, 1.0, -3e4, 1e-30, 1e-45])
def test_constant_vectors(value: float) -> None:
    codes, step = grid_codes(np.full(5, value, np.float32), 8)
    entry = grid_entry("x", codes, step, 8)
    assert entry.bytes == grid_size(5, 8)
    np.testing.assert_allclose(entry.dequantise(), np.full(5, value), rtol=1e-4, atol=1e-38)


def test_fewer_bits_than_the_codes_need_are_refused() -> None:
    with pytest.raises(ValueError, match=r"codes from 0 to 9 need 4 bits, got 3"):
        grid_entry("x", np.array([0, 9], np.int32), 1.0, 3)


def test_bits_follow_the_budget() -> None:
    assert [vector_bits(b, 8000) for b in (1, 1000, 2000, 2999, 7000, 8000, 10**6)] == [6, 7, 8, 8, 13, 16, 16]


@pytest.mark.parametrize("bits", [LEAST_BITS, 8, 13, HALF_BITS])
def test_the_file_has_the_length_that_the_template_says(bits: int, tmp_path: Path) -> None:
    model, data = convnet(), images()
    found = profiled(model, data)
    template = found.template.at(bits)
    rows = {name: min(layer.rows, key=lambda row: row.bytes) for name, layer in found.layers.items()}
    plan = ac.plan(found, 10**6).replace(
        layers={n: r.option for n, r in rows.items()},
        vector_bits=bits,
        predicted_bytes=template.file_bytes(rows),
        budget_bytes=template.file_bytes(rows),
    )
    small = ac.apply(model, plan, found, data)
    assert ac.save(small, plan, tmp_path / "model.acz").bytes == plan.predicted_bytes
    with read(tmp_path / "model.acz") as archive:
        stored = {e.name: e.bytes for e in archive.values()}
        for entry in template.entries:
            if entry.name not in template.keys.values():
                assert stored[entry.name] == entry.bytes, entry.name
    fresh = stored_tensors(ac.load(tmp_path / "model.acz", convnet()))
    for key, tensor in stored_tensors(small).items():
        assert torch.equal(fresh[key], tensor), key


def test_a_small_budget_has_coarser_norms_and_says_so() -> None:
    model, data = convnet(), images()
    found = profiled(model, data)
    with pytest.raises(InfeasibleError) as refused:
        ac.plan(found, 1)
    wide, narrow = ac.plan(found, 10**6), ac.plan(found, refused.value.smallest_bytes)
    assert wide.vector_bits == HALF_BITS > narrow.vector_bits >= LEAST_BITS
    assert narrow.fixed_bytes < wide.fixed_bytes
    assert ac.Plan.from_json(narrow.to_json()) == narrow


def test_every_budget_from_the_smallest_size_on_is_met() -> None:
    """The refusal's own number works, although more budget may mean more bits for the norms."""
    model, data = convnet(), images()
    found = profiled(model, data)
    for strategy in ("exact", "uniform"):
        with pytest.raises(InfeasibleError) as refused:
            ac.plan(found, 1, strategy)
        smallest = refused.value.smallest_bytes
        for extra in range(0, 200, 10):
            assert ac.plan(found, smallest + extra, strategy).predicted_bytes <= smallest + extra
        with pytest.raises(InfeasibleError):
            ac.plan(found, smallest - 1, strategy)


class Wide(nn.Module):
    """A bias whose values lie much further apart than its outputs spread, and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 20), nn.Linear(20, 20)
        with torch.no_grad():
            self.a.bias.copy_(torch.linspace(-8, 8, 20))
            self.b.bias.copy_(torch.linspace(-1, 1, 20))

    def forward(self, x: torch.Tensor) -> Any:
        return self.b(torch.tanh(self.a(x)))


def test_only_narrow_ranges_go_on_a_grid() -> None:
    model = Wide()
    half, grid = vector_keys(model, find_layers(model))
    assert (half, grid) == ({"a.bias", "b.bias"}, {"b.bias"})
    template = make_template(model, find_layers(model)).at(8)
    store = VectorStore(template)
    store.store_rest(model.requires_grad_(False))
    assert set(store.codes) == {"b.bias"}
    assert not dataclasses.replace(template, bits=HALF_BITS).on_grid("b.bias", 20)
