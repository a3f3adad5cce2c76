"""The page of a comparison: every strategy, the failures, and figures as the table has them."""

from __future__ import annotations

import math

import pandas as pd
import pytest
from pages import parsed

from autocompress.reporting import render_comparison

NAN = math.nan


def compared(seeds: int = 2, metric: bool = True) -> pd.DataFrame:
    """Six strategies at two budgets; one is named like markup, and one has no plan at the smaller budget."""
    rows = [
        {
            "strategy": name,
            "budget": budget,
            "seed": seed,
            "budget_bytes": size,
            "bytes": None if failed else size - place,
            "paper_bytes": None if failed else size // 2,
            "predicted_loss": NAN if failed else 0.1,
            "bound": NAN if failed else 0.1 if name == "exact" else -math.inf,
            "gap": NAN if failed else 0.0 if name == "exact" else math.inf,
            "kl": NAN if failed else (place + 1) * 1e-3 * (1 + seed),
            "metric": NAN if failed or not metric else 95.0 - place + 0.5 * seed,
            "seconds": NAN if failed else 1.25,
            "evaluations": None if failed else 7,
            "plan": "" if failed else name,
            "error": "InfeasibleError: no <choice>" if failed else "",
        }
        for seed in range(seeds)
        for budget, size in (("8x", 8000), ("16x", 4000))
        for place, name in enumerate(("exact", "auto", "kl", "<b>own</b>", "greedy", "uniform"))
        for failed in (name == "greedy" and budget == "16x",)
    ]
    return pd.DataFrame(rows).astype(dict.fromkeys(("bytes", "paper_bytes", "evaluations"), "Int64"))


def test_every_strategy_and_failure_is_on_the_page() -> None:
    page = render_comparison(compared(), "a <task>")
    reader = parsed(page)
    words = " ".join(reader.words)
    assert "script" not in reader.tags
    assert "<b>own" not in page
    assert "a <task>" in words
    for text in ("exact", "<b>own</b>", "no plan: greedy at 16x: InfeasibleError: no <choice>"):
        assert text in words
    assert "95.25 ± 0.35" in words, "the mean of 95 and 95.5, and their deviation"
    assert "0.0015" in words, "the mean KL of the first"
    assert all(link[1:] in reader.ids for link in reader.links)


def test_the_best_of_a_budget_is_the_table_s() -> None:
    page = render_comparison(compared())
    assert "8x: <strong>exact</strong>; 16x: <strong>exact</strong>" in page
    flipped = compared()
    flipped["metric"] = 190.0 - flipped["metric"]
    assert "8x: <strong>uniform</strong>" in render_comparison(flipped)


@pytest.mark.parametrize(("seeds", "metric"), [(1, True), (1, False), (3, False)])
def test_what_was_not_measured_is_left_out(seeds: int, metric: bool) -> None:
    page = render_comparison(compared(seeds, metric))
    words = parsed(page).words
    assert any("± 0" in word for word in words) == (seeds > 1)
    assert page.count("<figure>") == 1 + metric
    assert not any("nan" in word.split() for word in words)


def test_a_comparison_without_any_plan_says_so() -> None:
    table = compared(1)
    table["error"] = "InfeasibleError: nothing fits"
    page = render_comparison(table)
    assert "No strategy has a plan" in page
    assert "nothing fits" in page
