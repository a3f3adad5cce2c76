"""The comparison: what a row says, rows that are found again, the same table for any number of workers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from networks import grid_profile, images, small_profile
from torch import nn

import autocompress as ac
from autocompress.comparing import COLUMNS, CompareWarning, bench, summary
from autocompress.errors import InfeasibleError, MismatchError, StoreError
from autocompress.planning import Allocation, make_plan
from autocompress.profiling import Profile
from autocompress.strategies import STRATEGIES, StrategyError
from autocompress.types import Budget, Plan

CURVES = ["uniform", "greedy", "exact"]


def context(**changes: Any) -> ac.Context:
    model, data, _ = small_profile()
    return ac.Context(model, data, **changes)


def fraction(model: nn.Module) -> float:
    """A stand-in for a metric."""
    with torch.no_grad():
        return float((model(torch.cat(images(seed=1))).argmax(1) == 0).double().mean())


def any_choice(profile: Profile, budget: Budget, context: ac.Context | None) -> Plan:
    """A strategy that draws: of a hundred random choices, the first that fits."""
    assert context is not None
    generator = np.random.default_rng(context.seed)
    for _ in range(100):
        rows = {n: x.rows[int(generator.integers(len(x.rows)))] for n, x in profile.layers.items()}
        size = profile.template.file_bytes(rows)
        if size <= (budget.size or 0):
            loss = float(generator.random())
            return make_plan(profile, budget, Allocation(rows, loss, loss, 0.0, size, 0), "drawn")
    raise InfeasibleError("none of a hundred choices fits", 1)


def compared(budgets: Any, strategies: Any, **given: Any) -> pd.DataFrame:
    return ac.compare(small_profile()[2], budgets, strategies, given.pop("context", None) or context(), **given)


def without_seconds(table: pd.DataFrame) -> pd.DataFrame:
    return table.drop(columns="seconds")


def test_a_row_says_what_the_strategy_itself_hands_out(tmp_path: Path) -> None:
    model, data, profile = small_profile()
    table = compared(["3x", "9x"], ["uniform", "exact", "kl", "auto"], evaluate=fraction)
    assert list(table.columns) == [*COLUMNS, "layers"]
    assert list(table["strategy"]) == ["uniform", "exact", "kl", "auto"] * 2
    assert list(table["budget"]) == ["3x"] * 4 + ["9x"] * 4
    for row in table.to_dict("records"):
        own = context()
        if row["strategy"] == "auto":
            plan = ac.plan(profile, row["budget"], "auto", own)  # what users get
        else:
            plan = STRATEGIES[row["strategy"]](profile, Budget.parse(row["budget"]), own)
        small = ac.apply(model, plan, profile, data)
        assert ac.save(small, plan, tmp_path / "model.acz").bytes == row["bytes"] <= row["budget_bytes"]
        said = [plan.predicted_loss, plan.bound, plan.gap, plan.strategy, own.evaluations]
        assert [row[k] for k in ("predicted_loss", "bound", "gap", "plan", "evaluations")] == said
        assert row["kl"] == pytest.approx(own.divergence_of(small), rel=1e-9)
        assert row["metric"] == fraction(small)
        assert row["error"] == ""
        assert {n: o for n, (o, _) in json.loads(row["layers"]).items()} == {n: str(o) for n, o in plan.layers.items()}
        rows = [profile.layers[n].row(o) for n, o in plan.layers.items()]
        assert row["paper_bytes"] == -(-sum(r.nonzero * r.width for r in rows) // 8)


def test_who_spends_the_bytes_where() -> None:
    profile = small_profile()[2]
    table = compared(["5x", 100], ["exact", "greedy"])
    found = ac.spending(table)
    assert list(found.columns) == ["strategy", "budget", "seed", "layer", "option", "bytes", "share"]
    assert list(found["layer"]) == list(profile.layers) * 2
    assert set(found["budget"]) == {"5x"}  # nothing fits in 100 bytes
    for row in found.to_dict("records"):
        (whole,) = table.query(f"strategy == {row['strategy']!r} and error == ''").to_dict("records")
        assert row["bytes"] == profile.layers[row["layer"]].row(ac.Option.parse(row["option"])).bytes
        assert row["share"] == row["bytes"] / whole["bytes"]
    assert (found.groupby("strategy")["share"].sum() < 1.0).all()


def test_a_strategy_that_fails_is_a_row_and_the_table_goes_on() -> None:
    def too_large(profile: Profile, budget: Budget, context: Any) -> Plan:
        return ac.plan(profile, 10**6)

    def too_small(profile: Profile, budget: Budget, context: Any) -> Plan:
        plan = ac.plan(profile, budget)
        return plan.replace(predicted_bytes=plan.predicted_bytes - 1)

    def broken(profile: Profile, budget: Budget, context: Any) -> Plan:
        raise ZeroDivisionError("a slip")

    table = compared([100, "5x"], ["uniform", too_large, too_small, "exact"])
    assert list(table["strategy"]) == ["uniform", "too_large", "too_small", "exact"] * 2
    assert table["error"][0].startswith("InfeasibleError: no single option for all layers (uniform) fits in 100 bytes")
    assert table["error"][3].startswith("InfeasibleError: no allocation fits in 100 bytes: the smallest file has ")
    assert "the plan makes a file of " in table["error"][5]
    assert "; the budget is 711" in table["error"][5]
    assert "MismatchError" in table["error"][6]
    assert list(table["error"] == "") == [False] * 4 + [True, False, False, True]
    failed = table[table["error"] != ""]
    assert failed[["bytes", "kl", "predicted_loss", "evaluations"]].isna().all(axis=None)
    assert (failed["plan"] == "").all()
    assert set(failed["budget_bytes"]) == {100, 711}
    # What a strategy refuses is a row; a slip in its code is not.
    with pytest.raises(ZeroDivisionError, match="a slip"):
        compared(["5x"], [broken])


def test_the_seed_reaches_strategies_that_draw_and_no_others(tmp_path: Path) -> None:
    table = compared([800], {"drawn": any_choice, "exact": "exact", "auto": "auto"}, seeds=(0, 1, 2))
    drawn, rest = table[table["strategy"] == "drawn"], table[table["strategy"] != "drawn"]
    assert drawn["error"].tolist() == [""] * 3
    assert drawn["predicted_loss"].nunique() == 3
    for _, rows in rest.groupby("strategy"):
        assert len(rows) == 3
        assert rows.drop(columns=["seed", "seconds"]).drop_duplicates().shape[0] == 1
    assert compared([800], [any_choice], seeds=(1,))["predicted_loss"][0] == drawn["predicted_loss"].iloc[1]
    # The split stays: only what is drawn differs.
    own = context()
    other = own.seeded(5)
    assert (other.seed, other.data_digest, other.held is own.held) == (5, own.data_digest, True)
    assert context(seed=5).data_digest != own.data_digest


def test_a_row_is_made_on_one_thread_whatever_the_process_has() -> None:
    before, seen = torch.get_num_threads(), []

    def threads(model: nn.Module) -> float:
        seen.append(torch.get_num_threads())
        return 0.0

    torch.set_num_threads(2)
    try:
        compared(["5x"], ["exact"], evaluate=threads)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [1]


def test_rows_are_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counted(model: nn.Module) -> float:
        calls.append("")
        return fraction(model)

    first = compared(["5x", 100], CURVES, evaluate=counted, store=tmp_path)
    assert len(list((tmp_path / "rows").iterdir())) == 6
    evaluated = len(calls)
    assert evaluated > 0
    told: list[tuple[str, int, int]] = []
    again = compared(
        ["5x", 100], [*CURVES, "dp"], evaluate=counted, store=tmp_path, progress=lambda *at: told.append(at)
    )
    assert told == [("compare", 6, 8), ("compare", 7, 8), ("compare", 8, 8)]
    assert len(calls) == evaluated + 1
    kept = again[again["strategy"] != "dp"].reset_index(drop=True)
    pd.testing.assert_frame_equal(kept, first, check_exact=True)  # the seconds too
    # Another seed, effort, sample, or something else to evaluate are other rows.
    for change in ({"seeds": (1,)}, {"context": context(effort="fast")}, {"evaluate": fraction}, {"evaluate": None}):
        before = len(list((tmp_path / "rows").iterdir()))
        compared(["5x"], ["exact"], **{"evaluate": counted, "store": tmp_path, **change})
        assert len(list((tmp_path / "rows").iterdir())) == before + 1, change
    # So are those of a strategy that says that it is another one.
    monkeypatch.setattr(STRATEGIES["exact"], "version", 2, raising=False)
    compared(["5x"], ["exact"], evaluate=counted, store=tmp_path)
    assert len(list((tmp_path / "rows").iterdir())) == before + 2


@pytest.mark.parametrize("changed", ["strategies/solved.py", "planning.py", "lagrangian.py", ""])
def test_rows_of_other_code_are_made_again(changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same files elsewhere find the rows; a strategy's own file, what it asks, and its solver are part of it."""
    store, copies = tmp_path / "store", []
    compared(["5x"], ["exact"], store=store)
    for package in bench.PACKAGES:
        copies.append(tmp_path / package.name)
        shutil.copytree(package, copies[-1], ignore=shutil.ignore_patterns("__pycache__"))
    for folder in copies:
        if changed and (folder / changed).is_file():
            (folder / changed).write_text((folder / changed).read_text() + "\n")
    monkeypatch.setattr(bench, "PACKAGES", tuple(copies))
    compared(["5x"], ["exact"], store=store)
    assert len(list((store / "rows").iterdir())) == (2 if changed else 1)


def scaled_loss(scale: float) -> Any:
    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return scale * model(batch).square().mean()

    return loss


def test_rows_of_another_loss_are_made_again_where_it_is_looked_at(tmp_path: Path) -> None:
    counts = []
    for scale in (1.0, 2.0, 2.0):
        given = context(loss=scaled_loss(scale), training=images(1, seed=3))
        table = compared(["5x"], ["exact", "fisher"], context=given, store=tmp_path)
        assert (table["error"] == "").all()
        counts.append(len(list((tmp_path / "rows").iterdir())))
    assert counts == [2, 3, 3]


def test_strategies_get_narrower_layers_as_users_get_them() -> None:
    _, _, found = grid_profile()
    table = ac.compare(found, ["300", "700, macs=60%"], ["exact", "raw"], None)
    assert set(table["plan"]) == {"exact(coupled)", "raw(coupled)"}
    for row in table.to_dict("records"):
        plan = ac.plan(found, row["budget"], row["strategy"])
        own = [plan.strategy, plan.predicted_loss, plan.predicted_bytes, plan.bound]
        assert [row[k] for k in ("plan", "predicted_loss", "bytes", "bound")] == own


def test_rows_of_one_structure_are_not_found_for_another(tmp_path: Path) -> None:
    _, _, found = grid_profile()
    parts = [found.at({"conv1": level, "conv3": level}) for level in (75.0, 25.0)]
    kept, fresh = (
        [ac.compare(part, [430], ["exact"], context(), store=store) for part in parts] for store in (tmp_path, None)
    )
    for one, other in zip(kept, fresh, strict=True):
        pd.testing.assert_frame_equal(without_seconds(one), without_seconds(other), check_exact=True)
    assert kept[0]["layers"][0] != kept[1]["layers"][0]


def test_ones_own_strategies_run_again_unless_they_have_a_version(tmp_path: Path) -> None:
    class Mine:
        runs = 0

        def __call__(self, profile: Profile, budget: Budget, context: Any) -> Plan:
            Mine.runs += 1
            return ac.plan(profile, budget)

    class Versioned(Mine):
        def __init__(self, version: int) -> None:
            self.version = version

    for given, runs in ((Mine(), 1), (Mine(), 2), (Versioned(1), 3), (Versioned(1), 3), (Versioned(2), 4)):
        table = compared(["5x"], [given], store=tmp_path)
        assert Mine.runs == runs
        assert table["error"].tolist() == [""]


KILLED = """
import sys
sys.path.insert(0, {tests!r})
import os
from test_comparing import any_choice, compared
from autocompress.strategies import STRATEGIES

def last_breath(profile, budget, context):
    os._exit(9)

STRATEGIES["greedy"] = last_breath
compared(["3x", "5x"], ["uniform", "exact", "greedy"], store={store!r})
"""


def test_a_kill_loses_the_row_that_was_being_made_and_no_other(tmp_path: Path) -> None:
    code = KILLED.format(tests=str(Path(__file__).parent), store=str(tmp_path))
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    told: list[int] = []
    table = compared(
        ["3x", "5x"], ["uniform", "exact", "greedy"], store=tmp_path, progress=lambda _, done, all: told.append(done)
    )
    assert told[0] == 2  # uniform and exact at 3x
    fresh = compared(["3x", "5x"], ["uniform", "exact", "greedy"])
    pd.testing.assert_frame_equal(without_seconds(table), without_seconds(fresh), check_exact=True)


def test_the_same_table_for_any_number_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Workers import this file by its name: the folder of the tests is on their path.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    strategies = {"kl": "kl", "loss": "loss", "auto": "auto", "drawn": any_choice, "exact": "exact"}
    given: dict[str, Any] = {"evaluate": fraction, "seeds": (0, 1)}
    alone = compared([500, 100], strategies, store=tmp_path / "1", **given)
    many = compared([500, 100], strategies, store=tmp_path / "2", workers=2, **given)
    pd.testing.assert_frame_equal(without_seconds(alone), without_seconds(many), check_exact=True)
    assert (tmp_path / "1" / "plans.jsonl").read_bytes() == (tmp_path / "2" / "plans.jsonl").read_bytes()
    # What was measured for several plans counts for each of them, whoever came first.
    for name in ("kl", "loss"):
        assert alone[(alone["strategy"] == name) & (alone["error"] == "")]["evaluations"].nunique() == 1


def test_what_workers_cannot_load_runs_here_and_says_so() -> None:
    with pytest.warns(CompareWarning, match=r"rows are computed in this process, .*: .*(pickle|local)"):
        table = compared(["3x", "5x"], ["exact", "uniform"], evaluate=lambda model: 1.0, workers=2)
    assert table["metric"].tolist() == [1.0] * 4


def test_what_evaluate_raises_is_raised(tmp_path: Path) -> None:
    def failing(model: nn.Module) -> float:
        raise ac.AutocompressError("no test images")

    def slipping(model: nn.Module) -> float:
        raise ZeroDivisionError("no images")

    for evaluate in (failing, slipping):
        with pytest.raises((ac.AutocompressError, ZeroDivisionError), match=r"no (test |)images"):
            compared(["5x"], ["exact"], evaluate=evaluate, store=tmp_path)
    assert not (tmp_path / "rows").exists()  # and it is no row


def test_requests_that_are_refused(tmp_path: Path) -> None:
    profile = small_profile()[2]
    with pytest.raises(StrategyError, match="there is no strategy 'best'; there are uniform, "):
        compared(["5x"], ["best"])
    with pytest.raises(StrategyError, match="two strategies are called 'fast'"):
        compared(["5x"], [any_named("fast"), any_named("fast")])
    with pytest.raises(MismatchError, match="evaluate needs a compressed model, and there is no context"):
        ac.compare(profile, ["5x"], ["exact"], evaluate=fraction)
    with pytest.raises(StoreError, match="there is no comparison in "):
        ac.load_comparison(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot make the comparison's store "):
        compared(["5x"], ["exact"], store=tmp_path / "file" / "store")
    compared(["5x"], ["exact"], store=tmp_path)
    (row,) = (tmp_path / "rows").iterdir()
    row.write_text(row.read_text()[:40])
    with pytest.raises(StoreError, match=f"{row.name} cannot be read: .*; remove it to make it again"):
        compared(["5x"], ["exact"], store=tmp_path)


def any_named(name: str) -> Any:
    def strategy(profile: Profile, budget: Budget, context: Any) -> Plan:
        return ac.plan(profile, budget)

    strategy.__name__ = name
    return strategy


def test_without_a_context_there_are_the_curves() -> None:
    table = ac.compare(grid_profile()[2], ["5x"])
    assert set(table["strategy"]) == {n for n, s in STRATEGIES.items() if getattr(s, "needs", "") == "curves"}
    assert table[["kl", "metric"]].isna().all(axis=None)
    assert (table["evaluations"] == 0).all()
    assert (table["error"] == "").all()


def test_a_table_comes_back_from_its_folder(tmp_path: Path) -> None:
    given = compared(["5x", 100], ["greedy", "exact"], store=tmp_path, seeds=(0, 3))
    pd.testing.assert_frame_equal(ac.load_comparison(tmp_path), given, check_exact=True)
    lines = [json.loads(line) for line in (tmp_path / "plans.jsonl").read_text().splitlines()]
    assert [(x["strategy"], x["budget"], x["seed"]) for x in lines] == [
        (name, "5x", seed) for seed in (0, 3) for name in ("greedy", "exact")
    ]
    plan = Plan.from_json(json.dumps(lines[-1]["plan"]))
    assert plan.seed == 3
    assert plan.predicted_bytes == given["bytes"].dropna().iloc[-1]
    assert {n: str(o) for n, o in plan.layers.items()} == {n: o for n, (o, _) in lines[-1]["layers"].items()}


def test_the_summary_is_the_mean_of_the_seeds_best_first() -> None:
    rows = [
        ("a", "8x", 0, 100, 0.2, 90.0, ""),
        ("a", "8x", 1, 110, 0.4, 92.0, ""),
        ("b", "8x", 0, 120, 0.1, 95.0, ""),
        ("b", "8x", 1, None, None, None, "InfeasibleError: no"),
        ("c", "8x", 0, 120, 0.3, 91.0, ""),
        ("c", "8x", 1, 120, 0.1, 91.0, ""),
        ("c", "4x", 0, 200, 0.01, 96.0, ""),
    ]
    table = pd.DataFrame(rows, columns=["strategy", "budget", "seed", "bytes", "kl", "metric", "error"])
    table = table.assign(paper_bytes=table["bytes"], gap=np.inf, evaluations=1, seconds=2.0)
    found = summary(table)
    assert list(zip(found["budget"], found["strategy"], found["best"], strict=True)) == [
        ("8x", "b", True),
        ("8x", "c", False),  # the metric of a, and a lower KL
        ("8x", "a", False),
        ("4x", "c", True),
    ]
    a = found.iloc[2]
    assert (a["seeds"], a["bytes"], a["metric"]) == (2, 105.0, 91.0)
    assert a["kl"] == pytest.approx(0.3)
    assert a["metric_std"] == pytest.approx(np.sqrt(2))
    assert np.isnan(found.iloc[0]["metric_std"])
    # Without a metric the KL decides.
    assert list(summary(table.assign(metric=np.nan)).query("best")["strategy"]) == ["b", "c"]
