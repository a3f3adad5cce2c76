"""Counted work against loops that count, and the schedule against what it cannot be better than."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from autocompress import obs, workloads
from autocompress.compressors import LayerProblem, compressor_of, default_options, named_options
from autocompress.compressors.base import Realised
from autocompress.obs import wide
from autocompress.types import Option
from autocompress.workloads import KINDS, REFERENCE, counts, pays, schedule, seconds

ROWS, D = 5, 12


def problem(exact_limit: float = 1e12) -> LayerProblem:
    """Rows of the same weights in another order, on inputs that do not correlate: each loses as many as the others."""
    row = np.random.default_rng(0).standard_normal(D)
    W = np.stack([np.roll(row, r) for r in range(ROWS)])[None]
    return LayerProblem("layer", (ROWS, D), W, np.eye(D)[None], exact_limit=exact_limit)


class Counter:
    """Sums what calls of the engine are about to do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found = dict.fromkeys(("trace", "factor", "walked", "trellis"), 0.0)
        for name in ("prune_trace", "salient_cells", "prune"):
            monkeypatch.setattr(obs, name, self.counted(name, getattr(obs, name)))
        # The first pass of rate-distortion cells has the function as its default argument.
        monkeypatch.setattr(obs, "rate_distortion_cells", self.with_passes(obs.rate_distortion_cells))
        monkeypatch.setattr(
            "autocompress.obs.trellis._quantise_rows", self.walks(obs.trellis_codes.__globals__["_quantise_rows"])
        )

    def counted(self, name: str, function: Any) -> Any:
        def call(W: Any, H: Any, *rest: Any, **named: Any) -> Any:
            rows, d = np.prod(np.shape(W)[:-1]), np.shape(W)[-1]
            if name == "prune_trace":
                self.found["trace"] += rows * d**3 / 3
            else:
                self.passed(d, rest[0], rest[1], rest[2] if name == "salient_cells" else ())
            return function(W, H, *rest, **named)

        return call

    def passed(self, d: int, order: Any, pruned: Any, cells: Any) -> None:
        m, order = d - np.asarray(pruned).reshape(-1), np.asarray(order).reshape(-1, d)
        # A row that loses nothing has the factor of the one before it, if it has its order.
        own = np.array(
            [not r or (m[r - 1 : r + 1] < d).any() or (order[r] != order[r - 1]).any() for r in range(len(m))]
        )
        self.found["factor"] += float((m[own].astype(float) ** 3).sum() / 3)
        self.found["walked"] += float(m.sum() * len(cells))

    def with_passes(self, function: Any) -> Any:
        def call(W: Any, H: Any, order: Any, pruned: Any, grid: Any, **named: Any) -> Any:
            named["passes"] = obs.salient_cells
            return function(W, H, order, pruned, grid, **named)

        return call

    def walks(self, function: Any) -> Any:
        def call(F: Any, pivot: Any, weight: Any, *rest: Any) -> Any:
            self.found["trellis"] += weight.size
            return function(F, pivot, weight, *rest)

        return call


@pytest.mark.parametrize(
    "names",
    [("w2", "w4", "w8"), ("w2", "s50w2", "s50w4"), ("s50w4", "s50w8"), ("rd(0.5,0.3)", "rd(0.9,0.1)s50")],
)
def test_counts_are_what_the_engine_does(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    options = named_options(names)
    counter = Counter(monkeypatch)
    layer = problem()
    compressor_of(options[0])[1].realise_all(layer, options)
    counted = counts((1, ROWS, D), options)
    assert counted["trace"] == counter.found["trace"] == pytest.approx(ROWS * D**3 / 3)
    assert counted["factor"] == counter.found["factor"] > 0
    assert counted["coded"] - len(options) * ROWS * D == counter.found["walked"] > 0


@pytest.mark.parametrize(("name", "traced"), [("w4", False), ("rd(0.5,0.3)", False), ("w2", True), ("s50w4", True)])
def test_a_trace_is_counted_and_made_only_where_it_is_needed(name: str, traced: bool) -> None:
    options, layer = named_options([name]), problem()
    compressor_of(options[0])[1].realise_all(layer, options)
    assert (layer.order is not None) == traced == bool(counts((1, ROWS, D), options)["trace"])


def test_a_shared_order_is_counted_and_made_only_where_something_is_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    done, refit = [], wide._refit

    def counted(w: Any, gone: Any, H: Any, steps: int = wide.STEPS, start: Any = None) -> Any:
        done.append(0 if start is None else (steps + 1) * w.size * len(H))
        return refit(w, gone, H, steps, start)

    monkeypatch.setattr(wide, "_refit", counted)
    shape = (1, ROWS, D)
    whole, half = (named_options([name]) for name in ("w4", "s50w4"))
    layer = problem(exact_limit=1.0)
    compressor_of(whole[0])[1].realise_all(layer, whole)
    assert layer.order is None
    assert not done
    assert counts(shape, whole, exact_limit=1.0)["trace"] == 0
    compressor_of(half[0])[1].realise_all(layer, half)
    assert layer.order is not None
    found = counts(shape, half, exact_limit=1.0)
    assert found["trace"] == D**3
    # The error, two refits, one pass and its order.
    other = (1 + 2 * workloads.REFITS) * ROWS * D * D + ROWS * D * D // 2 + D**3 // 3
    assert found["product"] - other == sum(done) > 0


def test_counts_of_the_trellis_are_what_it_walks(monkeypatch: pytest.MonkeyPatch) -> None:
    options = named_options(["tcq(0.34,0.4)", "tcq(0.5,0)"])
    counter = Counter(monkeypatch)
    compressor_of(options[0])[1].realise_all(problem(), options)
    assert counts((1, ROWS, D), options)["trellis"] == counter.found["trellis"] == (1 + 3 + 1) * ROWS * D
    found = compressor_of(options[0])[1].realise_all(
        problem(exact_limit=1.0), options
    )  # as much where rows are too wide
    assert all(found)
    assert 2 * counts((1, ROWS, D), options, exact_limit=1.0)["trellis"] == counter.found["trellis"]


def test_layers_that_cannot_have_an_option_are_not_charged_for_it() -> None:
    tcq, plain = named_options(["tcq(0.34,0.4)"]), named_options(["dense", "fp16"])
    assert counts((1, ROWS, D), tcq, table=True)["trellis"] == 0
    assert set(counts((1, ROWS, D), plain).values()) == {0}
    table = counts((1, ROWS, D), named_options(["w4"]), table=True)
    assert {kind for kind in KINDS if table[kind]} == {"option", "coded", "searched"}
    row = problem()
    row.row_weights, row.hessian = np.ones(ROWS), np.zeros((0, D, D))
    found: list[Realised | None] = compressor_of(tcq[0])[1].realise_all(row, tcq)
    assert found == [None]


def test_work_grows_with_groups_as_with_layers() -> None:
    one, three = (counts((groups, ROWS, D), default_options()) for groups in (1, 3))
    assert {kind: round(three[kind] / one[kind], 2) for kind in KINDS if kind != "option"} == {
        kind: 3.0 for kind in KINDS if kind != "option"
    }
    assert seconds(three, REFERENCE) < 3 * seconds(one, REFERENCE)  # options cost something each


def test_a_schedule_is_between_its_bounds() -> None:
    tasks = sorted(np.random.default_rng(0).exponential(size=40).tolist(), reverse=True)
    for workers in (1, 2, 8, 64):
        found = schedule(tasks, workers)
        least = max(sum(tasks) / workers, tasks[0])
        assert least - 1e-9 <= found <= least + tasks[0]
    assert schedule(tasks, 1) == pytest.approx(sum(tasks))
    assert schedule([3.0, 3.0, 2.0, 2.0, 2.0], 2) == 7.0
    assert schedule([], 4) == 0.0


def test_processes_are_started_where_they_save_more_than_their_start(monkeypatch: pytest.MonkeyPatch) -> None:
    options: list[Option] = default_options()
    small, large = [(1, 8, 9)] * 3, [(1, 64, 576)] * 4
    assert not pays(small, options, 2)
    assert pays(large, options, 2)
    assert not pays(large, options, 1)
    assert not pays(large[:1], options, 8)
    monkeypatch.setattr(workloads, "START_SECONDS", 0.0)
    assert pays(small, options, 2)
