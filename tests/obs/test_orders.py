"""Greedy quantisation and the fixed orders against the float64 reference."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress import obs

from . import reference
from .test_engine import KINDS, make_layer

LAWS = settings(max_examples=25, deadline=None, derandomize=True)
#: Relative margin within which float32 may prefer another weight, as for the golden layers.
TIE = 1e-3


@LAWS
@given(st.sampled_from(KINDS), st.integers(1, 3), st.integers(1, 130), st.integers(0, 2**32 - 1), st.integers(2, 4))
def test_obq_keeps_its_rules(kind: str, rows: int, d: int, seed: int, bits: int) -> None:
    W, H = make_layer(kind, rows, d, seed)
    grids = [reference.search_grid(w, bits, symmetric=seed % 2 == 0) for w in W]
    step, zero = np.array([g.scale for g in grids]), np.array([g.zero for g in grids])
    codes = obs.obq(W, H, step, -zero, 2**bits - 1 - zero)
    assert codes.dtype == np.int32
    assert (codes >= -zero[:, None]).all()
    assert (codes <= (2**bits - 1 - zero)[:, None]).all()
    ours = reference.layer_error(W, codes * step[:, None], H)
    theirs = reference.layer_error(W, reference.greedy_quantise(W, H, grids), H)
    assert ours <= theirs * 1.3 + 1e-9
    for w, grid, q in zip(W, grids, codes, strict=True):
        if d <= 40:
            assert reference.is_greedy_quantisation(w, H, grid, q * grid.scale, TIE)


@pytest.mark.parametrize("kind", ["white", "correlated", "half zero"])
def test_obq_codes_equal_the_reference(kind: str) -> None:
    W, H = make_layer(kind, rows=4, d=150, seed=21)
    grids = [reference.search_grid(w, 3, symmetric=True) for w in W]
    codes = obs.obq(W, H, np.array([g.scale for g in grids]), -4, 3)
    expected = np.rint(reference.greedy_quantise(W, H, grids) / np.array([[g.scale] for g in grids]))
    np.testing.assert_array_equal(codes, expected)


def test_obq_after_pruning_is_obq_of_what_is_left() -> None:
    W, H = make_layer("correlated", rows=3, d=90, seed=22)
    order, _ = obs.prune_trace(W, H)
    counts = np.array([0, 30, 90])
    codes = obs.obq(W, H, 0.3, -4, 3, order, counts)
    pruned = reference.rebuild(W, H, order, counts)
    for i, n in enumerate(counts):
        kept = np.sort(order[i, n:])
        assert not np.delete(codes[i], kept).any()
        if len(kept):
            expected = reference.greedy_quantise(
                pruned[i : i + 1, kept], H[np.ix_(kept, kept)], [reference.Grid(0.3, 4, 8)]
            )
            np.testing.assert_array_equal(codes[i, kept], np.rint(expected[0] / 0.3))


@pytest.mark.parametrize("order", ["salient", "act", "natural", "pruning"])
@pytest.mark.parametrize("lost", [0, 25])
def test_fixed_orders_equal_the_reference(order: str, lost: int) -> None:
    W, H = make_layer("log-normal", rows=3, d=60, seed=23)
    trace, _ = obs.prune_trace(W, H)
    counts = np.array([lost, lost // 2, 0])

    def sequence(i: int) -> np.ndarray:
        kept = trace[i, counts[i] :].astype(int)
        match order:
            case "salient":
                return kept[::-1]
            case "act":
                return kept[np.argsort(-np.diag(H)[kept])]
            case "natural":
                return np.sort(kept)
            case _:
                return kept

    expected = reference.quantise_in_order(W, H, sequence, lambda i, w: np.clip(np.round(w / 0.4), -4, 3) * 0.4)
    codes = obs.quantise(W, H, 0.4, -4, 3, order, trace, counts)
    np.testing.assert_array_equal(codes, np.rint(expected / 0.4))
    if lost == 0:
        np.testing.assert_array_equal(obs.quantise(W, H, 0.4, -4, 3, order), codes)


@pytest.mark.parametrize("order", obs.ORDERS)
def test_every_order_with_the_identity_is_plain_rounding(order: str) -> None:
    W, _ = make_layer("white", rows=3, d=70, seed=24)
    codes = obs.quantise(W, np.eye(70), np.array([0.2, 0.5, 1.0]), -4, 3, order)
    np.testing.assert_array_equal(codes, np.clip(np.rint(W / [[0.2], [0.5], [1.0]]), -4, 3))


@pytest.mark.parametrize("order", obs.ORDERS)
@pytest.mark.parametrize("threads", [1, 3])
def test_every_order_gives_the_same_bits_for_any_number_of_threads(order: str, threads: int) -> None:
    W, H = make_layer("correlated", rows=9, d=100, seed=25)
    np.testing.assert_array_equal(
        obs.quantise(W, H, 0.3, -2, 1, order, threads=threads), obs.quantise(W, H, 0.3, -2, 1, order)
    )


@pytest.mark.parametrize("scale", [1e-20, 1e20])
@pytest.mark.parametrize("order", obs.ORDERS)
def test_units_and_groups(order: str, scale: float) -> None:
    parts = [make_layer("correlated", rows=2, d=50, seed=s) for s in (26, 27)]
    W, H = np.stack([w for w, _ in parts]), np.stack([h for _, h in parts])
    codes = obs.quantise(W, H, 0.25, -8, 7, order)
    for g, (w, h) in enumerate(parts):
        np.testing.assert_array_equal(codes[g], obs.quantise(w, h, 0.25, -8, 7, order))
    different = obs.quantise(W * scale, H, 0.25 * scale, -8, 7, order) != codes
    assert different.mean() < 0.05  # weights are rounded to float32 in other units


def test_refusals() -> None:
    W, H = make_layer("white", rows=2, d=4, seed=28)
    with pytest.raises(ValueError, match="order is 'best', needed one of obq, salient, act, natural, pruning"):
        obs.quantise(W, H, 0.1, -1, 1, "best")
    with pytest.raises(ValueError, match=r"a step is 0\.0, needed steps above 0"):
        obs.obq(W, H, np.array([0.1, 0.0]), -1, 1)
