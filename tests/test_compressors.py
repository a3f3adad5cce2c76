"""Conformance: every compressor of the registry, every option that it offers, on problems that are awkward on purpose.

A compressor that is added to `COMPRESSORS` is covered as soon as it offers one of `OPTIONS`, and a test fails if it
offers none; the laws are those of compressors/base.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from autocompress.compressors import (
    COMPRESSORS,
    LayerProblem,
    Realised,
    compressor_of,
    default_options,
    profile_layer,
    realise,
)
from autocompress.errors import OptionError
from autocompress.storage import serialise
from autocompress.types import DENSE, Option

OPTIONS = [
    Option.parse(name)
    for name in ("dense fp16 w2 w3 w4 w8 s50w4 s90w2 s100w4 w4g8 s75 2:4 2:4w4 blk4@50w4 rank2w8 k2r2w8 ch50w4 "
    "rd(0.25,0.1) rd(0.5,0) rd(0.5,0.3)s60 rd(1.5,0.7)s90 rd(0.02,0.1) rd(3,1)s100 "
    "tcq(0.15,0) tcq(0.3,0.4) tcq(1,1) tcq(0.01,0.2)").split()
]  # fmt: skip
FLOOR = 1e-7  # of the layer's energy: float32 rounding of weights and kernels


def hessian(rng: np.random.Generator, d: int, rank: int, groups: int = 1, dead: int = 0) -> np.ndarray:
    """2 X Xᵀ / N of random inputs of a rank, `dead` columns always zero, damped as `calibrate` does."""
    out = np.empty((groups, d, d))
    for g in range(groups):
        X = rng.standard_normal((d, rank)) @ rng.standard_normal((rank, 4 * d))
        X[rng.permutation(d)[:dead]] = 0.0
        out[g] = 2.0 * X @ X.T / (4 * d)
        out[g] += 1e-2 * np.diag(out[g]).mean() * np.eye(d)
    return out


def problem(
    rows: int = 6, d: int = 18, rank: int | None = None, groups: int = 1, dead: int = 0, scale: float = 1.0
) -> LayerProblem:
    rng = np.random.default_rng([rows, d, groups, dead])
    # Weights come from float32 parameters.
    weight = (scale * rng.standard_normal((groups, rows, d))).astype(np.float32).astype(np.float64)
    return LayerProblem("layer", (groups * rows, d), weight, hessian(rng, d, rank or d, groups, dead))


def zero_row() -> LayerProblem:
    """A row of zeros beside weights so small that half precision cannot hold their steps."""
    p = problem(scale=1e-4)
    p.weight[:, 2] = 0.0
    return p


def zeros() -> LayerProblem:
    p = problem()
    p.weight[:] = 0.0
    return p


def kernel() -> LayerProblem:
    """A convolution's weight, stored in its own shape."""
    p = problem(d=18, groups=2, rows=3)
    return LayerProblem(p.name, (6, 2, 3, 3), p.weight, p.hessian)


def uneven() -> LayerProblem:
    """Rows whose magnitudes lie eight decades apart."""
    p = problem()
    p.weight *= np.logspace(-4, 4, 6).astype(np.float32)[None, :, None]
    p.weight[:] = p.weight.astype(np.float32)
    return p


PROBLEMS: dict[str, Callable[[], LayerProblem]] = {
    "random": problem,
    "dead columns": lambda: problem(dead=7),
    "rank 2": lambda: problem(rank=2),
    "one row": lambda: problem(rows=1),
    "one column": lambda: problem(d=1),
    "one weight": lambda: problem(rows=1, d=1),
    "zero layer": zeros,
    "zero row": zero_row,
    "1e-20": lambda: problem(scale=1e-20),
    "1e20": lambda: problem(scale=1e20),
    "grouped kernel": kernel,
    "depthwise": lambda: problem(rows=1, d=9, groups=8),
    "uneven rows": uneven,
}

OFFERED = [
    pytest.param(name, option, id=f"{name}-{option}")
    for name, compressor in COMPRESSORS.items()
    for option in OPTIONS
    if compressor.offers(option)
]


def reference_error(p: LayerProblem, weight: np.ndarray) -> float:
    """½ tr(ΔW H ΔWᵀ), element by element."""
    assert p.hessian is not None
    delta = weight.astype(np.float64).reshape(p.weight.shape) - p.weight
    return float(0.5 * np.einsum("grd,gde,gre->", delta, p.hessian, delta))


def realised(name: str, p: LayerProblem, option: Option) -> Realised | None:
    return COMPRESSORS[name].realise_all(p, [option])[0]


@pytest.mark.parametrize("name", COMPRESSORS)
def test_every_compressor_offers_something_that_is_tested_here(name: str) -> None:
    mine = [option for option in [*OPTIONS, *default_options()] if COMPRESSORS[name].offers(option)]
    assert mine
    assert [option for option in OPTIONS if COMPRESSORS[name].offers(option)], "add one of its options to OPTIONS"
    assert COMPRESSORS[name].version >= 1
    assert COMPRESSORS[name].source


def test_no_option_belongs_to_two_compressors_and_the_default_ones_to_one() -> None:
    for option in [*OPTIONS, *default_options()]:
        assert sum(c.offers(option) for c in COMPRESSORS.values()) <= 1
    for option in default_options():
        assert COMPRESSORS[compressor_of(option)[0]].offers(option)


def test_an_option_that_nobody_offers_is_refused_by_name() -> None:
    with pytest.raises(OptionError, match=r"no compressor realises 'blk4@50'; there are plain, obc, rd, tcq"):
        compressor_of(Option.parse("blk4@50"))


@pytest.mark.parametrize("case", PROBLEMS)
@pytest.mark.parametrize(("name", "option"), OFFERED)
def test_error_and_bytes_are_those_of_what_is_stored(name: str, option: Option, case: str) -> None:
    p = PROBLEMS[case]()
    rows, order, losses, energy = profile_layer(p, [option])
    np.testing.assert_allclose(energy, reference_error(p, np.zeros_like(p.weight)), rtol=1e-9)
    again = realised(name, PROBLEMS[case](), option)
    if again is None:  # allowed where a float format cannot hold the weights, for nothing else
        assert rows == []
        assert np.abs(p.weight).max() > np.finfo(np.float16).max
        return
    (row,) = rows
    entry = again.entry("layer.weight", option)
    stored = entry.dequantise()
    assert stored.shape == p.shape
    assert stored.dtype == np.float32
    np.testing.assert_array_equal(stored, again.weight())
    assert abs(row.error - reference_error(p, stored)) <= 1e-4 * row.error + FLOOR * energy
    assert row.bytes == entry.bytes == len(entry.payload) == again.bytes()
    assert (row.codec, row.step) == (entry.codec, entry.step)
    assert len(serialise([entry])) > row.bytes
    # Handed the trace of the profile, as `apply` is, the same weight comes out bit for bit.
    told = LayerProblem(p.name, p.shape, p.weight, p.hessian, order, losses)
    np.testing.assert_array_equal(realise(told, option).weight(), stored)
    assert realise(told, option).entry("layer.weight", option) == entry


@pytest.mark.parametrize("case", ["random", "rank 2", "grouped kernel", "zero row", "1e-20"])
@pytest.mark.parametrize("name", COMPRESSORS)
def test_options_do_not_influence_each_other(name: str, case: str) -> None:
    mine = [option for option in OPTIONS if COMPRESSORS[name].offers(option)]
    alone = [realised(name, PROBLEMS[case](), option) for option in mine]
    for order in (mine, mine[::-1], mine[::2] + mine[1::2]):
        swept = COMPRESSORS[name].realise_all(PROBLEMS[case](), order)
        for option, found in zip(order, swept, strict=True):
            expected = alone[mine.index(option)]
            assert (found is None) == (expected is None)
            if found is not None and expected is not None:
                assert found.weight().tobytes() == expected.weight().tobytes(), str(option)
                assert found.entry("w", option) == expected.entry("w", option)


@pytest.mark.parametrize("case", PROBLEMS)
@pytest.mark.parametrize(("name", "option"), OFFERED)
def test_an_option_never_costs_more_than_losing_the_layer(name: str, option: Option, case: str) -> None:
    """All zeros is a choice that every grid has; nothing may be worse than it by more than 5 percent."""
    p = PROBLEMS[case]()
    found = realised(name, p, option)
    if found is not None:
        assert p.error(found.weight()) <= 1.05 * p.energy + FLOOR * p.energy


QUANTISED = [pytest.param(*param.values, id=param.id) for param in OFFERED if "w" in str(param.values[1])]


@pytest.mark.parametrize(
    "case", ["random", "dead columns", "rank 2", "grouped kernel", "depthwise", "uneven rows", "1e20"]
)
@pytest.mark.parametrize(("name", "option"), QUANTISED)
def test_error_feedback_is_no_worse_than_rounding(name: str, option: Option, case: str) -> None:
    """On the same grid and the same zeros, round to nearest loses at least as much, but for a margin of 10 percent."""
    p = PROBLEMS[case]()
    found = realised(name, p, option)
    if found is None or found.codes is None:
        pytest.skip("not on a grid")
    step = np.asarray(found.step, np.float64).reshape(-1, *(1,) * (len(p.shape) - 1))
    high = 2 ** ((option.bits or 8) - 1) - 1
    codes = np.clip(np.rint(p.weight.reshape(p.shape) / step), -high - 1, high)
    if option.sparsity:
        order, _ = p.trace()
        gone = np.arange(p.weight.shape[-1]) < p.counts(option.sparsity)[..., None]
        mask = np.zeros(p.weight.shape, bool)
        np.put_along_axis(mask, order.astype(np.int64), gone, 2)
        codes[mask.reshape(p.shape)] = 0
    rounded = reference_error(p, codes * step)
    assert p.error(found.weight()) <= 1.1 * rounded + FLOOR * p.energy


@pytest.mark.parametrize("case", ["random", "zero row", "1e-20", "1e20"])
def test_more_bits_lose_less(case: str) -> None:
    p = PROBLEMS[case]()
    errors = [p.error(realise(p, Option(bits=b)).weight()) / p.energy for b in range(2, 9)]
    assert all(b < 0.6 * a for a, b in itertools.pairwise(errors)), errors
    assert errors[-1] < 1e-3


@pytest.mark.parametrize("case", PROBLEMS)
def test_sparsity_is_at_least_what_the_name_says(case: str) -> None:
    p = PROBLEMS[case]()
    for option in (o for o in OPTIONS if o.sparsity):
        try:
            weight = realise(p, option).weight()
        except OptionError:
            continue
        assert (weight == 0).sum() >= np.ceil(option.sparsity / 100 * weight.size - 1e-9)


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e20])
def test_relative_errors_do_not_depend_on_the_scale(scale: float) -> None:
    """Up to the rounding of steps: rate-distortion steps are in units of the weights."""
    here, there = problem(), problem(scale=scale)
    for option in map(Option.parse, ("rd(0.5,0.3)s60", "rd(0.25,0.1)", "tcq(0.3,0.4)")):
        a, b = (p.error(realise(p, option).weight()) / p.energy for p in (here, there))
        assert b == pytest.approx(a, rel=0.02)


def test_a_layer_that_calibration_never_reached_has_only_what_needs_no_data() -> None:
    p = problem()
    p.hessian = None
    rows, order, losses, energy = profile_layer(p, [DENSE, Option(half=True), Option(bits=4)])
    assert [row.option for row in rows] == [DENSE, Option(half=True)]
    assert (order, losses, energy) == (None, None, 0.0)
    with pytest.raises(ValueError, match="calibration never reached this layer"):
        realise(p, Option(bits=4))


def test_dense_is_exact_and_half_is_refused_where_it_overflows() -> None:
    p = problem(scale=1e20)
    np.testing.assert_array_equal(realise(p, DENSE).weight(), p.weight.reshape(p.shape))
    with pytest.raises(OptionError, match="layer 'layer' cannot have option 'fp16'"):
        realise(p, Option(half=True))
