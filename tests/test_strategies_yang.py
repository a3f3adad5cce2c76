"""Yang et al.'s projections against naive ones and exact solvers, and their count of bytes."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from networks import convnet, grid_profile, images, profiled
from test_strategies_densities import fine_profile, ruled
from torch import nn

import autocompress as ac
from autocompress.compressors import COMPRESSORS, compressor_of
from autocompress.costs import code_bits
from autocompress.planning import budget_bytes, within
from autocompress.profiling import Profile
from autocompress.strategies import paper_counted
from autocompress.strategies.base import chosen_plan, largest_that_fits, weights_of
from autocompress.strategies.densities import integer_families
from autocompress.strategies.yang import Projections, kmeans_error, quantised_projection, sparse_projection
from autocompress.types import Budget, Option
from solvers import Problem, solve


@pytest.mark.parametrize("budget_bits", [0, 1, 5, 100, 333, 10**6])
def test_the_sparse_projection_keeps_the_prefix_of_the_ranking(budget_bits: int) -> None:
    generator = np.random.default_rng(0)
    weights = {"a": generator.laplace(size=40), "b": 0.3 * generator.laplace(size=70), "c": generator.normal(size=20)}
    bits = {"a": 3, "b": 2, "c": 8}
    ranked = sorted(((float(v**2) / bits[n], n) for n, w in weights.items() for v in w), reverse=True)
    kept, spent = dict.fromkeys(weights, 0), 0
    for _, name in ranked:
        if spent + bits[name] > budget_bits:
            break
        kept[name], spent = kept[name] + 1, spent + bits[name]
    assert sparse_projection({n: np.sort(w**2) for n, w in weights.items()}, bits, budget_bits) == kept


def test_bits_are_summed_as_whole_numbers() -> None:
    """2^24 is where sums in float32 stop counting."""
    squares = {"a": np.arange(1.0, 6_000_001.0)}
    assert sparse_projection(squares, {"a": 8}, 2**25 + 8) == {"a": 2**22 + 1}


def random_curves(seed: int) -> tuple[dict[str, int], dict[str, dict[int, float]]]:
    generator = np.random.default_rng(seed)
    kept = {f"l{i}": int(generator.integers(50, 500)) for i in range(6)}
    return kept, {
        n: {b: float(k * generator.lognormal() * 4.0**-b) for b in (2, 3, 4, 5, 6, 8)} for n, k in kept.items()
    }


@pytest.mark.parametrize("seed", range(5))
def test_the_quantised_projection_is_a_step_from_the_exact_answer_at_most(seed: int) -> None:
    """And the exact answer where the steps spend the budget to the bit."""
    kept, errors = random_curves(seed)
    total = sum(kept.values())
    met = 0
    for budget_bits in range(2 * total, 8 * total, total // 3):
        widths = quantised_projection(kept, errors, budget_bits)
        spent = sum(widths[n] * k for n, k in kept.items())
        assert spent <= budget_bits
        loss = sum(errors[n][b] for n, b in widths.items())

        def optimum(limit: int) -> float:
            problem = Problem(
                loss=[np.array(list(each.values())) for each in errors.values()],
                cost=[np.array([[b * kept[n]] for b in each], np.int64) for n, each in errors.items()],
                budget=np.array([limit], np.int64),
            )
            return float(solve(problem, "exact").loss)

        missed = max(errors[n][b] - min(errors[n].values()) for n, b in widths.items())
        assert optimum(budget_bits) <= loss * (1 + 1e-12) <= (optimum(budget_bits) + missed) * (1 + 1e-12)
        met += loss == pytest.approx(optimum(spent), rel=1e-12)
    assert met >= 3


def test_widths_are_the_smallest_where_even_those_cost_too_much() -> None:
    kept, errors = random_curves(0)
    assert set(quantised_projection(kept, errors, 2 * sum(kept.values()) - 1).values()) == {2}


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_kmeans_is_lloyds_with_one_entry_held_at_0(bits: int) -> None:
    values = np.sort(np.random.default_rng(bits).laplace(size=60))
    centres, error = [float(c) for c in np.linspace(values[0], values[-1], 2**bits)], np.inf
    while True:
        book = [*centres, 0.0]
        nearest = [min(range(len(book)), key=lambda k: abs(v - book[k])) for v in values]
        now = sum((v - book[k]) ** 2 for v, k in zip(values, nearest, strict=True))
        if error - now <= 1e-3 * now:
            break
        error = now
        for k in range(len(centres)):
            if mine := [v for v, j in zip(values, nearest, strict=True) if j == k]:
                centres[k] = float(np.mean(mine))
    assert kmeans_error(values, bits) == pytest.approx(min(now, error), rel=1e-9)
    assert now < float((values**2).sum())


def test_kmeans_of_few_values_is_exact() -> None:
    assert kmeans_error(np.zeros(0), 3) == 0.0
    assert kmeans_error(np.array([-1.0, 0.0, 1.0]), 1) == 0.0
    assert kmeans_error(np.array([-2.0, 0.5]), 1) == pytest.approx(0.0, abs=1e-12)


def test_the_error_of_a_choice_is_that_of_what_is_pruned_and_of_the_codebook() -> None:
    profile = fine_profile()
    context = ac.Context(*grid_profile()[:2])
    weights = weights_of(profile, context, "yang")
    rows = {n: profile.layers[n].row(Option.parse("s60w3")) for n in weights}
    expected = 0.0
    for weight in weights.values():
        values = weight.ravel()[np.argsort(np.abs(weight), axis=None)]
        gone = values.size - round(0.4 * values.size)
        expected += float((values[:gone] ** 2).sum()) + kmeans_error(np.sort(values[gone:]), 3)
    assert Projections(weights, integer_families(profile, "yang")).error(rows) == pytest.approx(expected, rel=1e-12)


def test_the_start_with_the_least_error_is_kept() -> None:
    model, data = convnet(), images()
    for parameter in (module.weight for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))):
        parameter.data.copy_(0.5 * (parameter / parameter.abs().max()) ** 5)  # few weights have most of the energy
    profile = profiled(model, data, [f"{s}w{b}" for b in (2, 4, 6) for s in ("", "s35", "s60", "s85")])
    context = ac.Context(model, data)
    best = set()
    for text in ("7x", "7.5x", "8x"):
        budget = Budget.parse(text)
        given = within(profile, budget_bytes(budget, profile))
        projections = Projections(weights_of(given, context, "yang"), integer_families(given, "yang"))
        errors = {}
        for start in (6, 4, 2):
            rows = largest_that_fits(given, budget, partial(projections.choice, start=start), "yang")
            errors[projections.error(rows)] = start, {n: row.option for n, row in rows.items()}
        start, options = errors[min(errors)]
        assert ruled(profile, text, "yang", context).layers == options
        best.add(start)
    assert best == {2, 4, 6}


def test_bytes_are_counted_without_positions() -> None:
    profile = fine_profile()
    model, data, _ = grid_profile()
    context = ac.Context(model, data)
    plan = ruled(profile, "8.2x", "yang", context)
    small = context.build(within(profile, plan.budget_bytes), plan.layers)
    bits = 0
    for name, option in plan.layers.items():
        assert option.bits is not None
        bits += option.bits * int(small.get_submodule(name).weight.count_nonzero())  # type: ignore[operator]
    assert paper_counted(profile, plan) == -(-bits // 8)
    weights = sum(layer.layer.size for layer in profile.layers.values())
    ratio = 4 * weights / paper_counted(profile, plan)
    assert plan.notes == (f"the plan of yang, paper-counted: {paper_counted(profile, plan)} bytes ({ratio:.1f}x)",)
    assert paper_counted(profile, plan) < plan.predicted_bytes - plan.fixed_bytes


def test_floats_count_in_full_and_entropy_coded_codes_by_their_width() -> None:
    profile = grid_profile()[2]
    plan = ac.plan(profile, "3x")
    sizes = {n: layer.layer.size for n, layer in profile.layers.items()}

    def counted(option: str) -> int:
        return paper_counted(profile, plan.replace(layers=dict.fromkeys(plan.layers, Option.parse(option))))

    assert counted("dense") == 4 * sum(sizes.values())
    assert counted("fp16") == 2 * sum(sizes.values())
    rows = [layer.row(Option.parse("rd(0.9,0.3)s60")) for layer in profile.layers.values()]
    assert counted("rd(0.9,0.3)s60") == -(-sum(row.width * row.nonzero for row in rows) // 8)
    made = {n: {"error": 0.0, "bytes": 9, "width": 7, "nonzero": 8} for n in plan.layers}
    dense = plan.replace(layers=dict.fromkeys(plan.layers, Option()), realised=made)
    assert paper_counted(profile, dense) == 7 * len(plan.layers)
    # An integer counts as the option says, whether or not its codes use all of it.
    assert paper_counted(profile, dense.replace(layers=dict.fromkeys(plan.layers, Option(bits=8)))) == 32


def test_rows_of_their_own_widths_and_codebooks_count_as_their_papers_have_it() -> None:
    model, data, _ = grid_profile()
    profile = profiled(model, data, ["mix25/25/0/25/25", "mix50/0/0/0/50", "kq8w4", "kq8pw4", "pq4x8w6"])
    plan = ac.plan(profile, 10**6)

    def counted(**options: str) -> int:
        layers = {n: Option.parse(options.get(n, "dense")) for n in profile.layers}
        dense = sum(4 * layer.layer.size for n, layer in profile.layers.items() if n not in options)
        return paper_counted(profile, plan.replace(layers=layers)) - dense

    # Codes of every row by what holds the largest of it.
    for name in ("mix25/25/0/25/25", "mix50/0/0/0/50"):
        option, layer = Option.parse(name), profile.layers["conv1"].layer
        problem = profile.problem("conv1", model.get_parameter(layer.key))
        (made,) = COMPRESSORS[compressor_of(option)[0]].realise_all(problem, [option])
        assert made is not None
        assert made.codes is not None
        rows = made.codes.reshape(len(made.codes), -1)
        bits = sum(code_bits(row) * int(np.count_nonzero(row)) for row in rows)
        assert 0 < counted(conv1=name) == -(-bits // 8) < 216
    # 24 kernels of 9 weights have an index of 3 bits each, and there are 8 of them of 9 numbers.
    assert counted(conv1="kq8w4") == counted(conv1="kq8pw4") == (24 * 3 + 8 * 9 * 4) // 8
    assert counted(conv3="pq4x8w6") == (16 * 3 + 8 * 4 * 6) // 8

    def given(profile: Profile, budget: Budget, context: ac.Context | None) -> ac.Plan:
        rows = {n: layer.row(Option.parse("mix50/0/0/0/50")) for n, layer in profile.layers.items()}
        return chosen_plan(profile, budget, rows, "given")

    (row,) = ac.compare(profile, [10**6], [given]).to_dict("records")
    assert row["paper_bytes"] == paper_counted(profile, given(profile, Budget(size=10**6), None))
