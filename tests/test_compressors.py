"""Conformance: every compressor of the registry, every option that it offers, on problems that are awkward on purpose.

A compressor that is added to `COMPRESSORS` is covered as soon as it offers one of `OPTIONS`, and a test fails if it
offers none; the laws are those of compressors/base.py.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from autocompress import obs
from autocompress.compressors import (
    COMPRESSORS,
    FAMILIES,
    LayerProblem,
    Realised,
    compressor_of,
    default_options,
    named_options,
    profile_layer,
    realise,
)
from autocompress.errors import OptionError
from autocompress.storage import E4M3, serialise
from autocompress.types import DENSE, Option

OPTIONS = [
    Option.parse(name)
    for name in (
        "dense fp16 w2 w3 w4 w8 s50w4 s90w2 s100w4 "
        "rank2 rank1fp16 rank2fp16 rank1w8 rank2w8 rank3w4 rank2p rank2pfp16 rank1pw3 k2r1 k2r1w8 "
        "rd(0.25,0.1) rd(0.5,0) rd(0.5,0.3)s60 rd(1.5,0.7)s90 rd(0.02,0.1) rd(3,1)s100 rd(0.5,0.3)2:4 "
        "s75 s75fp16 s100 2:4 1:4fp16 3:5 2:4w4 4:8w4a blk4@50 blk4@50w4 blk2x4@50fp16 blk3x2@70w3g5 ch50 ch50w4 "
        "out50 out50w4t w4g8 w1 w1a w1t w1g4 s50w1 w2a w3a w8a w4t w4m w8m w4am w4ta w4tm w2g5 w4g4a w3g32am w4g1000 "
        "s60w4a s50w4g4 fp8 s50fp8 2:4fp8 tcq(0.15,0) tcq(0.3,0.4) tcq(1,1) tcq(0.01,0.2) "
        "mix25/0/25/50/0 mix0/0/0/0/100 mix100/0/0/0/0 mix12.5/37.5/50/0/0 "
        "n50/50w4 n50/100 n100/50w8 n50/100fp16 n100/50tcq(0.3,0.4) n50/50tcq(0.3,0.4) n50/50rd(0.5,0.3)s60 n50/100w2a "
        "n50/50s50w4 n100/50w2g4 n50/50fp8 "
        "rank1w4+w2 rank2w8+s50w4 rank2+rd(0.5,0.3) k2r1w6+2:4w4 rank1pfp16+s75 rank1w4+tcq(0.3,0.4) rank1w6+kq4w4 "
        "kq4w6 kq5@1w4 kq4pw6 pq2x8w8 pq2x16@1w6 pq3x4@2.5w2 pq9x4w5 pq2x8pw6 pq6x4pw3"
    ).split()
]
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


def constant() -> LayerProblem:
    """Every weight of a row the same: nothing but ties."""
    p = problem()
    p.weight[:] = np.linspace(-0.5, 0.75, 6).astype(np.float32)[None, :, None]
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


def table(head: bool = False, scale: float = 1.0) -> LayerProblem:
    """An embedding whose rows weigh four decades apart; `head`: it is the output head too."""
    p = problem(rows=12, d=10, scale=scale)
    assert p.hessian is not None
    weights = np.logspace(-2, 2, 12)
    return LayerProblem(p.name, p.shape, p.weight, p.hessian if head else p.hessian[:0], row_weights=weights)


def narrower(groups: int = 1) -> LayerProblem:
    """A convolution that can lose two of four input channels and three outputs; or, grouped, three whole groups."""
    p = problem(rows=6 // groups, d=16, groups=groups)
    inputs = {50.0: np.r_[4:8, 12:16]} if groups == 1 else {}
    return dataclasses.replace(p, shape=(6, 4, 2, 2), inputs=inputs, outputs={50.0: np.array([0, 1, 4])})


PROBLEMS: dict[str, Callable[[], LayerProblem]] = {
    "random": problem,
    "dead columns": lambda: problem(dead=7),
    "rank 2": lambda: problem(rank=2),
    "one row": lambda: problem(rows=1),
    "one column": lambda: problem(d=1),
    "one weight": lambda: problem(rows=1, d=1),
    "zero layer": zeros,
    "zero row": zero_row,
    "constant rows": constant,
    "1e-20": lambda: problem(scale=1e-20),
    "1e20": lambda: problem(scale=1e20),
    "grouped kernel": kernel,
    "depthwise": lambda: problem(rows=1, d=9, groups=8),
    "uneven rows": uneven,
    "table": table,
    "table, 1e-20": lambda: table(scale=1e-20),
    "table and head": lambda: table(head=True),
    "too wide": lambda: dataclasses.replace(zero_row(), exact_limit=0.0),
    "too wide, grouped kernel": lambda: dataclasses.replace(kernel(), exact_limit=0.0),
    "narrower": narrower,
    "narrower, grouped": lambda: narrower(6),
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
    if p.row_weights is not None:
        shared = p.hessian[0] if len(p.hessian) else np.zeros((delta.shape[-1],) * 2)
        rows = [0.5 * d @ (shared + c * np.eye(len(d))) @ d for d, c in zip(delta[0], p.row_weights, strict=True)]
        return float(sum(rows))
    return float(0.5 * np.einsum("grd,gde,gre->", delta, p.hessian, delta))


def splits(p: LayerProblem, option: Option) -> bool:
    """Whether two layers of that rank can be made of one, and hold fewer weights."""
    groups, rank = option.groups or 1, option.rank or 0
    f, c, *kernel = p.shape
    d = c * int(np.prod(kernel))
    fits = len(p.weight) == 1 and c % groups == 0 and rank <= min(f, d // groups)
    return fits and rank * groups * f + rank * d < f * d


def out_of_reach(p: LayerProblem, option: Option) -> bool:
    """Whether a layer is too wide for an option that works row by row."""
    return not p.exact and option.structure != Option(sparsity=option.sparsity)


def run_of(p: LayerProblem, option: Option) -> int:
    """How many consecutive weights become one word of that codebook."""
    return option.vector or int(np.prod(p.shape[2:]))


def cut(p: LayerProblem, option: Option) -> bool:
    """Whether the layer's rows are whole runs of a codebook's length, and enough of them."""
    length = run_of(p, option)
    return length > 1 and p.weight.shape[-1] % length == 0 and p.weight.size // length >= (option.words or 0)


def realised(name: str, p: LayerProblem, option: Option) -> Realised | None:
    return COMPRESSORS[name].realise_all(p, [option])[0]


@functools.cache
def shared(case: str) -> LayerProblem:
    """A problem that several tests look at, and leave alone; it remembers its trace and masks."""
    return PROBLEMS[case]()


@functools.cache
def found_on(name: str, option: Option, case: str) -> Realised | None:
    return realised(name, shared(case), option)


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
    with pytest.raises(OptionError, match=r"no compressor realises 'rank2w8a'; there are plain, pruned, obc, fp8, rd"):
        compressor_of(Option.parse("rank2w8a"))


@pytest.mark.parametrize(("name", "option"), OFFERED)
def test_error_and_bytes_are_those_of_what_is_stored(name: str, option: Option) -> None:
    for case, make in PROBLEMS.items():
        p = make()
        rows, order, losses, energy = profile_layer(p, [option])
        np.testing.assert_allclose(energy, reference_error(p, np.zeros_like(p.weight)), rtol=1e-9)
        again = found_on(name, option, case)
        if again is None:  # a float format cannot hold the weights, or a table has no such structure
            assert rows == []
            beyond = np.abs(p.weight).max() > np.finfo(np.float16).max
            words = option if option.residual is None else option.residual
            other = (option.rank and not splits(p, option)) or (words.words and not cut(p, words))
            narrow = option.width is not None and p.cut(option.width) is None
            assert p.row_weights is not None or beyond or other or narrow or out_of_reach(p, words), case
            continue
        (row,) = rows
        entries = again.entries("layer.weight", option)
        stored = again.weight()
        assert stored.shape == again.shape
        assert again.shape == p.shape or again.cut is not None
        assert stored.dtype == np.float32
        for part, entry in zip(again.factors or (again,), entries, strict=True):
            np.testing.assert_array_equal(entry.dequantise(), part.weight())
        assert abs(row.error - reference_error(p, p.whole(again))) <= 1e-4 * row.error + FLOOR * energy, case
        assert row.bytes == sum(len(entry.payload) for entry in entries) == again.bytes()
        assert row.codec == ",".join(entry.codec for entry in entries)
        assert row.step == ",".join(entry.step for entry in entries)
        assert row.part_bytes == (tuple(entry.bytes for entry in entries) if again.factors else ())
        assert len(serialise(entries)) > row.bytes
        # Handed the trace of the profile, as `apply` is, the same weight comes out bit for bit.
        told = LayerProblem(p.name, p.shape, p.weight, p.hessian, order, losses, p.row_weights)
        told = dataclasses.replace(told, inputs=p.inputs, outputs=p.outputs, exact_limit=p.exact_limit)
        np.testing.assert_array_equal(realise(told, option).weight(), stored)
        assert realise(told, option).entries("layer.weight", option) == entries


@pytest.mark.parametrize(
    "case", ["random", "rank 2", "grouped kernel", "zero row", "1e-20", "table", "table and head", "narrower"]
)
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
                assert found.entries("w", option) == expected.entries("w", option)


@pytest.mark.parametrize(("name", "option"), OFFERED)
def test_an_option_never_costs_more_than_losing_the_layer(name: str, option: Option) -> None:
    """All zeros is a choice that every grid has; nothing may be worse than it by more than 5 percent."""
    for case in PROBLEMS:
        p, found = shared(case), found_on(name, option, case)
        if found is not None and (option.bits != 1 or option.asymmetric):  # between -1 and 1 there is no zero
            assert p.error(p.whole(found)) <= 1.05 * p.energy + FLOOR * p.energy, case


QUANTISED = [
    pytest.param(name, option, id=f"{name}-{option}")
    for name, compressor in COMPRESSORS.items()
    for option in OPTIONS
    if compressor.offers(option) and (option.bits or option.fp8) and not (option.rank or option.width or option.words)
]


def steps_of(found: Realised) -> np.ndarray:
    """The step of every weight, (rows, columns)."""
    step = np.asarray(found.step, np.float64)
    columns = int(np.prod(found.shape[1:]))
    if step.ndim == 2:
        step = np.repeat(step, found.group or 1, axis=1)[:, :columns]
    return np.broadcast_to(step[:, None] if step.ndim == 1 else step, (found.shape[0], columns))


def rounded(weight: np.ndarray, found: Realised, option: Option) -> np.ndarray:
    """Weights (rows, columns) rounded to the nearest value of the grid that was found, whatever their curvature."""
    steps = steps_of(found)
    assert found.codes is not None
    if option.fp8 or (option.bits == 1 and not option.asymmetric):
        levels = np.concatenate([-E4M3, E4M3]) if option.fp8 else np.array([-1.0, 1.0])
        return steps * levels[np.abs(weight[..., None] - steps[..., None] * levels).argmin(axis=-1)]
    codes = found.codes.reshape(weight.shape)
    low, high = -(2 ** ((option.bits or 8) - 1)), 2 ** ((option.bits or 8) - 1) - 1
    if option.asymmetric:  # at least what is used of the range
        low, high = (end(axis=1, initial=0, keepdims=True) for end in (codes.min, codes.max))
    return steps * np.clip(np.rint(weight / steps), low, high)


def gone(p: LayerProblem, structure: Option) -> np.ndarray:
    """What a structure prunes, bool (rows, columns)."""
    order, counts = p.kept(structure)
    mask = np.zeros(p.weight.shape, bool)
    np.put_along_axis(mask, order.astype(np.int64), np.arange(p.weight.shape[-1]) < counts[..., None], 2)
    return mask.reshape(p.shape[0], -1)


@pytest.mark.parametrize(("name", "option"), QUANTISED)
def test_error_feedback_is_no_worse_than_rounding(name: str, option: Option) -> None:
    """On the same grid and the same zeros, round to nearest loses at least as much, but for a margin of 10 percent."""
    cases = ("random", "dead columns", "rank 2", "grouped kernel", "depthwise", "uneven rows", "1e20")
    for case in (*cases, "table", "table and head"):
        if case == "uneven rows" and option.bits == 1:
            continue  # one row is all of the error, and one bit a coin
        p, found = shared(case), found_on(name, option, case)
        if found is None:
            assert p.row_weights is not None
            continue
        plain = rounded(p.weight.reshape(p.shape[0], -1), found, option) * ~gone(p, option.structure)
        assert p.error(found.weight()) <= 1.1 * reference_error(p, plain) + FLOOR * p.energy, case


@pytest.mark.parametrize("case", ["random", "zero row", "1e-20", "1e20"])
def test_more_bits_lose_less(case: str) -> None:
    p = PROBLEMS[case]()
    errors = [p.error(realise(p, Option(bits=b)).weight()) / p.energy for b in range(2, 9)]
    assert all(b < 0.6 * a for a, b in itertools.pairwise(errors)), errors
    assert errors[-1] < 1e-3


STRUCTURES = [o for o in OPTIONS if o.structure != DENSE and o.rank is None and o.width is None and o.words is None]


@pytest.mark.parametrize("option", STRUCTURES, ids=str)
def test_the_pattern_of_a_name_holds(option: Option) -> None:
    for case in PROBLEMS:
        p, found = shared(case), found_on(compressor_of(option)[0], option, case)
        if found is None:
            continue
        positions = int(np.prod(p.shape[2:]))
        # (groups, rows, channels, positions)
        zero = (found.weight() == 0).reshape(*p.weight.shape[:2], -1, positions)
        groups, rows, channels, _ = zero.shape
        if option.sparsity:
            assert zero.sum() >= np.ceil(option.sparsity / 100 * zero.size - 1e-9)
        if option.nm is not None:
            kept, size = option.nm
            for start in range(0, channels, size):
                assert ((~zero[:, :, start : start + size]).sum(axis=2) <= kept).all(), case
            assert gone(p, option.structure).sum() == groups * rows * positions * (
                channels // size * (size - kept) + max(channels % size - kept, 0)
            )
        if option.block is not None:
            mask = gone(p, option.structure).reshape(zero.shape)
            for r, c in itertools.product(range(0, rows, option.block_rows), range(0, channels, option.block)):
                whole = mask[:, r : r + option.block_rows, c : c + option.block]
                assert (whole.all(axis=(1, 2)) | ~whole.any(axis=(1, 2))).all(), case
            assert mask.sum() < option.sparsity / 100 * mask.size + option.block_rows * option.block, case
        if option.channels is not None:
            empty = gone(p, option.structure).reshape(zero.shape).all(axis=(1, 3))
            assert empty.sum() == np.ceil(option.channels / 100 * groups * channels - 1e-9)
            assert zero.transpose(0, 2, 1, 3)[empty].all(), case
        if option.out is not None:
            assert zero.all(axis=(2, 3)).sum() >= np.ceil(option.out / 100 * groups * rows - 1e-9)
            assert gone(p, option.structure).all(axis=1).sum() == np.ceil(option.out / 100 * groups * rows - 1e-9)


@pytest.mark.parametrize(("name", "option"), QUANTISED)
def test_codes_are_on_the_grid_of_the_name(name: str, option: Option) -> None:
    for case in PROBLEMS:
        p, found = shared(case), found_on(name, option, case)
        if found is None:
            assert p.row_weights is not None or out_of_reach(p, option)
            continue
        assert found.codes is not None
        codes = found.codes.reshape(p.shape[0], -1)
        if option.fp8:
            assert np.isin(np.abs(codes), E4M3).all()
            continue
        bits = option.bits or 0
        if option.asymmetric:
            runs = obs.column_runs(codes, option.group or codes.shape[1])
            runs = runs.reshape(1, 1, -1) if option.per_tensor else runs
            assert (runs.max(axis=-1, initial=0) - runs.min(axis=-1, initial=0) < 2**bits).all(), case
        elif bits == 1:
            pruned = gone(p, option.structure)
            assert set(np.unique(codes[~pruned])) <= {-1, 1} or not p.weight.any(axis=-1).all()
            assert np.isin(codes, (-1, 0, 1)).all()
            assert (codes[pruned] == 0).all()
        else:
            assert -(2 ** (bits - 1)) <= codes.min()
            assert codes.max() < 2 ** (bits - 1), case


@pytest.mark.parametrize(("name", "option"), QUANTISED)
@pytest.mark.parametrize("shape", [(6, 8), (6, 4, 2, 2)], ids=str)
def test_without_curvature_options_are_plain_rounding_of_the_largest_weights(
    name: str, option: Option, shape: tuple[int, ...]
) -> None:
    """H = I: nothing makes up for anything, so the smallest weights (or blocks of them) go and the rest is rounded."""
    p = flat(shape)
    found = realised(name, p, option)
    assert found is not None
    mask = gone(p, option.structure)
    np.testing.assert_array_equal(mask, smallest(p, option))
    plain = rounded(p.weight[0], found, option) * ~mask
    place = np.where(mask, 0, p.weight[0] / steps_of(found))
    tie = np.abs(place % 1 - 0.5) < 1e-5 if option.bits != 1 and option.bits else np.zeros(mask.shape, bool)
    assert tie.sum() <= 1  # the largest weight of a grid that is not shrunk
    np.testing.assert_allclose(found.weight().reshape(plain.shape)[~tie], plain[~tie], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("option", [o for o in STRUCTURES if o.bits is o.step is None and not o.fp8], ids=str)
@pytest.mark.parametrize("shape", [(6, 8), (6, 4, 2, 2)], ids=str)
def test_without_curvature_pruning_is_by_magnitude(option: Option, shape: tuple[int, ...]) -> None:
    p = flat(shape)
    weight = realise(p, option).weight().reshape(p.weight[0].shape)
    expected = np.where(smallest(p, option), 0, p.weight[0])
    expected = expected.astype(np.float16) if option.half else expected
    np.testing.assert_allclose(weight, expected, rtol=1e-6)


@pytest.mark.parametrize("case", ["narrower", "narrower, grouped"])
def test_a_narrower_layer_is_the_best_one_on_its_inputs_and_rows_are_those_of_the_whole(case: str) -> None:
    p = PROBLEMS[case]()
    assert p.hessian is not None
    rows = p.outputs[50.0]
    floats = realise(p, Option.parse("n100/50"))
    np.testing.assert_array_equal(floats.weight(), p.weight.reshape(p.shape)[rows].astype(np.float32))
    assert profile_layer(p, [Option.parse("n100/50")])[0][0].multiplied == floats.weight().size
    if "grouped" in case:
        with pytest.raises(OptionError, match="cannot have option 'n50/50w4'"):
            realise(p, Option.parse("n50/50w4"))
        return
    # The least squares problem itself, with a root of the Hessian for inputs.
    root = np.linalg.cholesky(p.hessian[0]).T
    columns = p.inputs[50.0]
    best = np.linalg.lstsq(root[:, columns], root @ p.weight[0].T, rcond=None)[0].T
    np.testing.assert_allclose(realise(p, Option.parse("n50/100")).weight().reshape(6, 8), best, rtol=1e-5)
    for inner in ("w4", "tcq(0.3,0.4)", "rd(0.5,0.3)s60"):
        whole, part = (realise(p, Option.parse(f"n50/{level}{inner}")).weight() for level in (100, 50))
        np.testing.assert_array_equal(part, whole[rows])


MIXED = [o for o in OPTIONS if o.mix is not None]


@pytest.mark.parametrize("option", MIXED, ids=str)
def test_mixed_rows_are_those_of_uniform_widths_least_energy_first(option: Option) -> None:
    assert option.mix is not None
    for case in PROBLEMS:
        p, found = shared(case), found_on("mixed", option, case)
        assert found is not None
        assert found.codes is not None
        rows = p.shape[0]
        energies = p.row_errors(np.zeros_like(p.weight)).reshape(-1)
        ascending = np.argsort(energies, kind="stable")
        ends = [int(np.floor(rows * sum(option.mix[: i + 1]) / 100 + 0.5)) for i in range(5)]
        start = 0
        for bits, end in zip((0, 2, 4, 6, 8), ends, strict=True):
            weight = found.weight().reshape(rows, -1)[ascending[start:end]]
            codes = found.codes.reshape(rows, -1)[ascending[start:end]]
            if bits == 0:
                assert not weight.any()
            else:
                assert codes.min(initial=0) >= -(2 ** (bits - 1))
                assert codes.max(initial=0) < 2 ** (bits - 1)
                plain = realise(p, Option(bits=bits))
                if np.ndim(found.step) and np.ndim(plain.step):  # else one step is for all rows
                    np.testing.assert_array_equal(weight, plain.weight().reshape(rows, -1)[ascending[start:end]], case)
            start = end
        assert start == rows
        assert np.ndim(found.step) == 1 or case not in ("random", "grouped kernel", "depthwise", "table")


def test_rows_of_several_widths_are_counted_at_their_own() -> None:
    p, option = problem(rows=8), Option.parse("mix25/0/25/50/0")
    (row,) = profile_layer(p, [option])[0]
    codes = np.asarray(realise(p, option).codes).reshape(8, -1)
    kept = {bits: np.abs(codes).max(axis=1) >= 2 ** (bits - 2) for bits in (4, 6)}
    assert (kept[6].sum(), (kept[4] & ~kept[6]).sum(), (codes == 0).all(axis=1).sum()) == (4, 2, 2)
    assert (
        row.row_bits
        == row.bits
        == 6 * np.count_nonzero(codes[kept[6]]) + 4 * np.count_nonzero(codes[kept[4] & ~kept[6]])
    )
    assert row.width == 6
    (plain,) = profile_layer(p, [Option(bits=4)])[0]
    assert (plain.row_bits, plain.bits) == (None, 4 * plain.nonzero)


CODEBOOKS = [o for o in OPTIONS if o.words is not None]


def words_of(p: LayerProblem, option: Option, weight: np.ndarray) -> np.ndarray:
    """The distinct words of a weight, (count, length)."""
    return np.unique(weight.reshape(-1, run_of(p, option)), axis=0)


@pytest.mark.parametrize("option", CODEBOOKS, ids=str)
def test_a_codebook_has_the_words_and_the_bits_of_its_name(option: Option) -> None:
    met = 0
    for case in PROBLEMS:
        p, found = shared(case), found_on(compressor_of(option)[0], option, case)
        assert (found is None) == (not cut(p, option) or case == "table and head"), case
        if found is None:
            continue
        met += 1
        assert found.codes is not None
        words = words_of(p, option, found.codes)
        assert len(words) <= (option.words or 0), case
        assert np.abs(found.codes).max() < 2 ** ((option.bits or 0) - 1), case
        if not option.plain:  # as many words are stored as there are up to their sign, and none for zeros
            first = np.take_along_axis(words, (words != 0).argmax(axis=1)[:, None], 1)
            up_to_sign = np.unique((words * np.sign(first))[first[:, 0] != 0], axis=0)
            assert len(up_to_sign) <= ((option.words or 0) - 1) // 2, case
    assert met >= (3 if option.vector else 1)


def kernels(rows: int = 24, channels: int = 12) -> LayerProblem:
    """A convolution whose inputs are correlated, as those of real networks are, with more kernels than words."""
    rng = np.random.default_rng(11)
    weight = rng.standard_normal((1, rows, 9 * channels)).astype(np.float32).astype(np.float64)
    return LayerProblem("conv", (rows, channels, 3, 3), weight, hessian(rng, 9 * channels, 3 * channels))


@pytest.mark.parametrize(("name", "least"), [("kq16{}w6", 1.15), ("pq3x16{}w6", 1.5), ("pq2x16{}w8", 1.7)])
def test_a_codebook_of_least_output_error_beats_the_plain_one(name: str, least: float) -> None:
    p = kernels()
    ours, plain = (p.error(realise(p, Option.parse(name.format(how))).weight()) for how in ("", "p"))
    assert plain > least * ours


@pytest.mark.parametrize("name", ["kq", "pq3x"])
def test_a_price_of_bits_buys_fewer_bytes_for_more_error(name: str) -> None:
    rows = profile_layer(kernels(48), [Option.parse(f"{name}32{price}w6") for price in ("", "@4", "@16")])[0]
    for dear, cheap in itertools.pairwise(rows):
        assert cheap.bytes < dear.bytes
        assert cheap.error > dear.error


def test_a_plain_codebook_is_k_means_whatever_the_hessian() -> None:
    p = kernels()
    other = LayerProblem(p.name, p.shape, p.weight, 2.0 * np.eye(p.weight.shape[-1])[None])
    option = Option.parse("kq16pw6")
    weight = realise(p, option).weight()
    np.testing.assert_array_equal(weight, realise(other, option).weight())
    runs, words = p.weight.reshape(-1, 9), words_of(p, option, weight)
    distance = ((runs[:, None] - words[None]) ** 2).sum(axis=2)
    taken = ((runs - weight.reshape(-1, 9)) ** 2).sum(axis=1)
    np.testing.assert_allclose(taken, distance.min(axis=1), rtol=1e-4)  # distances are in float32
    near = distance.argmin(axis=1)
    centres = np.stack([runs[near == k].mean(axis=0) for k in range(len(words))])
    step = float(realise(p, option).step)
    assert np.abs(centres - words).mean() < step  # k-means has nearly ended, and words are rounded


def test_a_table_has_codebooks_that_mind_how_often_rows_are_used() -> None:
    rng = np.random.default_rng(5)
    weights = np.repeat([1e-3, 1.0], 40)
    weight = rng.standard_normal((1, 80, 12)) * np.repeat([3.0, 1.0], 40)[:, None]
    table = LayerProblem("t", (80, 12), weight, np.zeros((0, 12, 12)), row_weights=weights)
    ours, plain = (table.error(realise(table, Option.parse(f"pq3x16{p}w8")).weight()) for p in ("", "p"))
    assert ours < 0.7 * plain


def flat(shape: tuple[int, ...]) -> LayerProblem:
    weight = np.random.default_rng(7).standard_normal(shape).astype(np.float32).astype(np.float64)
    d = int(np.prod(shape[1:]))
    return LayerProblem("layer", shape, weight.reshape(1, shape[0], d), 2.0 * np.eye(d)[None])


def smallest(p: LayerProblem, option: Option) -> np.ndarray:
    """What plain magnitude pruning takes: the units of the structure with the least sum of squares, bool (rows, d)."""
    positions = int(np.prod(p.shape[2:]))
    square = (p.weight[0] ** 2).reshape(p.shape[0], -1, positions)
    rows, channels, _ = square.shape
    mask = np.zeros(square.shape, bool)
    if option.nm is not None:
        kept, size = option.nm
        for start in range(0, channels, size):
            run = square[:, start : start + size]
            rank = np.argsort(np.argsort(run, axis=1), axis=1)
            mask[:, start : start + size] = rank < run.shape[1] - kept
        return mask.reshape(rows, -1)
    if option.channels is not None:
        least = np.argsort(square.sum(axis=(0, 2)))[: int(np.ceil(option.channels / 100 * channels))]
        mask[:, least] = True
    elif option.out is not None:
        mask[np.argsort(square.sum(axis=(1, 2)))[: int(np.ceil(option.out / 100 * rows))]] = True
    elif option.sparsity:
        height, width = (option.block_rows, option.block) if option.block else (1, 1)
        units = [
            (slice(r, r + height), slice(c, c + width), k)
            for r, c, k in itertools.product(range(0, rows, height), range(0, channels, width), range(positions))
        ]
        for unit in sorted(units, key=lambda u: square[u].sum()):
            if mask.sum() >= np.ceil(option.sparsity / 100 * mask.size - 1e-9):
                break
            mask[unit] = True
    return mask.reshape(rows, -1)


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
    rows, order, losses, energy = profile_layer(p, [DENSE, Option(half=True), Option(bits=8), Option(bits=4)])
    assert [row.option for row in rows] == [DENSE, Option(half=True), Option(bits=8)]
    assert (order, losses, energy) == (None, None, 0.0)
    with pytest.raises(ValueError, match="calibration never reached this layer"):
        realise(p, Option(bits=4))


def test_dense_is_exact_and_half_is_refused_where_it_overflows() -> None:
    p = problem(scale=1e20)
    np.testing.assert_array_equal(realise(p, DENSE).weight(), p.weight.reshape(p.shape))
    with pytest.raises(OptionError, match="layer 'layer' cannot have option 'fp16'"):
        realise(p, Option(half=True))


def test_families_are_lists_of_options_that_compressors_offer() -> None:
    everything = named_options(["all"])
    for name in FAMILIES:
        found = named_options([name])
        assert found
        # Which narrower layers there are is a question to the network.
        assert set(found) <= set(everything) or all(option.width for option in found)
        with pytest.raises(OptionError):  # no name means two things
            Option.parse(name)
    assert named_options(["default"]) == default_options()
    assert [str(o) for o in named_options(["w4, rd(0.5,0.1)s60 2:4", Option(bits=4), "w8"])] == [
        "w4", "rd(0.5,0.1)s60", "2:4", "w8",
    ]  # fmt: skip
    for text, words in {
        "rank8w8a": "no compressor",
        "w44": "44 bits, needed 1 to 8; families of",
        "": "is not an",
    }.items():
        with pytest.raises(OptionError, match=words):
            named_options([text])


def test_the_page_on_options_names_what_there_is() -> None:
    text = (Path(__file__).parents[1] / "docs" / "options.md").read_text()
    assert re.findall(r"`(\w+)`", text[text.index("## Families") : text.index("    autocompress")]) == list(FAMILIES)
    tables = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    lines = text.splitlines()
    assert all(above.startswith("|") for above, line in itertools.pairwise(lines) if line.startswith("| `"))
    names = re.findall(r"`([^`]+)`", " ".join(tables))
    suffixes = [name for name in names if name in ("t", "a", "m", "g128")]
    assert len(suffixes) == 4
    for name in [*(name for name in names if name not in suffixes), *(f"w4{s}" for s in suffixes), "w4g128am", "w1a"]:
        assert COMPRESSORS[compressor_of(Option.parse(name))[0]].offers(Option.parse(name)), name
    shown = {compressor_of(Option.parse(name))[0] for name in names if name not in (*suffixes, "(none)")}
    assert shown | {"plain", "narrow"} == set(COMPRESSORS)  # `dense` and `n75/50` stand in the text
