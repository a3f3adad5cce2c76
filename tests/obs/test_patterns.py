"""Masks of structured pruning and quantisation on any grid, against references written for clarity, in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress import obs

from . import reference
from .test_engine import KINDS, Layer, make_layer

LAWS = settings(max_examples=25, deadline=None, derandomize=True)
layers = st.builds(make_layer, st.sampled_from(KINDS), st.integers(1, 5), st.integers(1, 14), st.integers(0, 2**31))


@pytest.mark.parametrize(("channels", "positions", "size"), [(8, 1, 4), (8, 9, 4), (6, 4, 4), (3, 9, 4), (1, 1, 5)])
def test_blocks_run_along_the_input_channels(channels: int, positions: int, size: int) -> None:
    columns = obs.input_blocks(channels * positions, positions, size)
    assert sorted(columns[columns >= 0].tolist()) == list(range(channels * positions))
    assert ((columns >= 0).sum(axis=1).reshape(-1, positions).sum(axis=0) == channels).all()
    for block in columns:
        kept = block[block >= 0]
        assert (np.diff(kept) == positions).all()  # consecutive channels, one position
        assert kept[0] // positions % size == 0
    if channels % size == 0:
        expected = reference.input_channel_groups((1, channels, positions), size)
        assert sorted(map(tuple, columns)) == sorted(map(tuple, expected))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("kept", "size", "positions"), [(2, 4, 1), (1, 4, 3), (4, 8, 1), (2, 3, 2)])
def test_nm_masks_and_losses_are_the_reference_s(kind: str, kept: int, size: int, positions: int) -> None:
    W, H = make_layer(kind, 4, 24, seed=kept)
    gone = obs.nm_mask(W, H, kept, size, positions)
    groups = reference.input_channel_groups((4, 24 // positions, positions), size)
    expected = reference.nm_prune(W, H, groups, zeros=size - kept)
    order, counts = obs.order_of_mask(np.tile(np.arange(24), (4, 1)), gone)
    error = reference.layer_error(W, reference.rebuild(W, H, order, counts), H)
    assert error == pytest.approx(reference.layer_error(W, expected, H), rel=1e-9)
    if kind not in ("twins", "constant inputs", "half zero"):  # these have ties
        np.testing.assert_array_equal(gone, expected == 0)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("twins", "constant inputs", "half zero")])
@pytest.mark.parametrize(("size", "rows", "positions"), [(4, 1, 1), (4, 2, 1), (3, 2, 2), (5, 3, 2), (2, 5, 1)])
def test_blocks_and_channels_go_in_the_reference_s_order(kind: str, size: int, rows: int, positions: int) -> None:
    W, H = make_layer(kind, 5, 24, seed=size)
    columns = obs.input_blocks(24, positions, size)
    units = obs.unit_trace(W, H, columns, rows)
    order, losses = reference.band_losses(W, H, [c[c >= 0] for c in columns], rows)
    np.testing.assert_array_equal(units.order[0], order)
    np.testing.assert_allclose(units.losses[0], losses, rtol=1e-7)


@LAWS
@given(layers, st.integers(1, 5), st.integers(1, 3), st.floats(0, 1))
def test_losses_add_up_to_the_error_and_masks_are_large_enough(
    layer: Layer, size: int, rows: int, sparsity: float
) -> None:
    W, H = layer
    units = obs.unit_trace(W, H, obs.input_blocks(W.shape[1], 1, size), rows)
    gone = obs.unit_mask(units, W.shape, sparsity)
    assert gone.sum() >= np.ceil(sparsity * W.size - 1e-9)
    assert gone.sum() < sparsity * W.size + size * rows
    order, counts = obs.order_of_mask(np.tile(np.arange(W.shape[1]), (len(W), 1)), gone)
    error = reference.layer_error(W, reference.rebuild(W, H, order, counts), H)
    taken = sum(
        units.losses[0, band, step]
        for band, step in np.ndindex(units.order.shape[1:])
        if gone[band * rows, units.columns[units.order[0, band, step], 0]]
    )
    assert taken == pytest.approx(error, rel=1e-6, abs=1e-12 * reference.layer_error(W, 0 * W, H))


@LAWS
@given(layers, st.integers(1, 6).flatmap(lambda m: st.tuples(st.integers(1, m), st.just(m))))
def test_nm_holds_in_every_group_whatever_the_layer(layer: Layer, pattern: tuple[int, int]) -> None:
    (W, H), (kept, size) = layer, pattern
    gone = obs.nm_mask(W, H, kept, size)
    for start in range(0, W.shape[1], size):
        run = gone[:, start : start + size]
        assert (run.sum(axis=1) == max(run.shape[1] - kept, 0)).all()


def test_nothing_depends_on_threads_and_groups_are_layers() -> None:
    layers = [make_layer("correlated", 6, 12, seed) for seed in (1, 2)]
    W, H = (np.stack(parts) for parts in zip(*layers, strict=True))
    columns = obs.input_blocks(12, 3, 2)
    both, alone = obs.unit_trace(W, H, columns, 2, threads=2), obs.unit_trace(*layers[1], columns, 2, threads=1)
    assert both.losses[1].tobytes() == alone.losses[0].tobytes()
    assert both.order[1].tobytes() == alone.order[0].tobytes()
    np.testing.assert_array_equal(obs.nm_mask(W, H, 1, 3, threads=2)[1], obs.nm_mask(*layers[1], 1, 3, threads=1))
    np.testing.assert_allclose(
        obs.row_losses(W, H)[1], [reference.layer_error(w[None], 0 * w[None], layers[1][1]) for w in layers[1][0]]
    )


@LAWS
@given(layers, st.integers(0, 2**31))
def test_a_mask_makes_an_order(layer: Layer, seed: int) -> None:
    W, H = layer
    gone = np.random.default_rng(seed).random(W.shape) < 0.4
    order, _ = obs.prune_trace(W, H)
    made, counts = obs.order_of_mask(order, gone)
    np.testing.assert_array_equal(np.sort(made, axis=1), np.sort(order, axis=1))
    for r in range(len(W)):
        assert set(made[r, : counts[r]]) == set(np.flatnonzero(gone[r]))
        place = {column: i for i, column in enumerate(order[r])}
        for part in np.split(made[r], [counts[r]]):  # both parts in the order of the trace
            assert [place[c] for c in part] == sorted(place[c] for c in part)


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_quantising_on_levels_is_the_reference_s_error_feedback(sparsity: float) -> None:
    W, H = make_layer("correlated", 4, 16, seed=3)
    order, losses = obs.prune_trace(W, H)
    counts = obs.pruned_counts(losses, sparsity)
    levels = np.array([-3.0, -1.0, 0.5, 2.0])
    step = np.random.default_rng(0).random(W.shape) + 0.2
    codes = obs.quantise_levels(W, H, order, counts, step, levels=levels)
    for r in range(len(W)):
        w, G = W[r].copy(), np.linalg.inv(H)
        for t, j in enumerate(np.concatenate([order[r, : counts[r]], order[r, counts[r] :][::-1]])):
            nearest = step[r, j] * levels[np.argmin(np.abs(levels * step[r, j] - w[j]))]
            q = 0.0 if t < counts[r] else nearest
            assert codes[r, j] * step[r, j] == pytest.approx(q, abs=1e-9)
            w, G = w - G[:, j] * ((w[j] - q) / G[j, j]), G - np.outer(G[:, j], G[j]) / G[j, j]


def test_quantising_with_one_step_per_row_is_what_salient_cells_do() -> None:
    W, H = make_layer("correlated", 8, 24, seed=4)
    order, losses = obs.prune_trace(W, H)
    counts = obs.pruned_counts(losses, 0.4)
    step = obs.search_scale(W, 4)
    expected = obs.quantise_salient(W, H, order, counts, step, -8, 7)
    codes = obs.quantise_levels(W, H, order, counts, step.astype(np.float32)[:, None], -8, 7)
    assert (codes != expected).mean() < 0.02  # float32 against float64: a code on the edge


def test_a_step_of_zero_gives_codes_of_zero_and_a_matrix_that_is_none_is_refused() -> None:
    W, H = make_layer("white", 3, 8, seed=5)
    order, counts = np.tile(np.arange(8), (3, 1)), np.zeros(3, int)
    codes = obs.quantise_levels(W, H, order, counts, np.where(np.arange(8) < 4, 0.0, 0.1), -8, 7)
    assert (codes[:, :4] == 0).all()
    assert (codes[:, 4:] != 0).any()
    with pytest.raises(ValueError, match="not positive definite over what row 0 keeps"):
        obs.quantise_levels(W, -H, order, counts, np.full(8, 0.1), -8, 7)


@LAWS
@given(st.integers(1, 8), st.booleans(), st.booleans(), st.integers(0, 2**31), st.sampled_from([1e-20, 1.0, 1e20]))
def test_grids_hold_zero_and_lose_no_more_than_the_whole_range(
    bits: int, asymmetric: bool, minmax: bool, seed: int, size: float
) -> None:
    rng = np.random.default_rng(seed)
    weight = size * rng.standard_normal((5, 12)) * (rng.random((5, 12)) < 0.7)
    weight[0] = 0.0
    weight[1] = np.abs(weight[1])
    scale, low = obs.search_grid(weight, bits, asymmetric, minmax)
    assert scale[0] == 0
    if bits > 1 or asymmetric:
        assert ((low <= 0) & (low + 2**bits > 0)).all()

    def lost(scale: np.ndarray, low: np.ndarray) -> np.ndarray:
        unit, step = weight / size, scale[:, None] / size
        codes = np.clip(np.rint(unit / np.where(step > 0, step, 1)), low[:, None], low[:, None] + 2**bits - 1)
        if bits == 1 and not asymmetric:
            return ((np.abs(unit) - step) ** 2 * (unit != 0)).sum(axis=1)
        return (np.abs(codes * step - unit) ** 2.4).sum(axis=1)

    whole = obs.search_grid(weight, bits, asymmetric, minmax=True)
    assert (lost(scale, low) <= lost(*whole) * (1 + 1e-9) + 1e-30).all()
    if minmax and bits > 1:
        reach = scale * np.maximum(-low, low + 2**bits - 1)
        assert (np.abs(weight).max(axis=1) <= reach * (1 + 1e-9) + scale / 2).all()


def test_column_runs_pad_the_last_one() -> None:
    runs = obs.column_runs(np.arange(10.0).reshape(2, 5), 3)
    np.testing.assert_array_equal(runs, [[[0, 1, 2], [3, 4, 0]], [[5, 6, 7], [8, 9, 0]]])
