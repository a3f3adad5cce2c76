"""The commands: what they print, write and return, on models of a few hundred weights; and the demo as it is."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from tiny_tasks import EVALUATE, MODEL, RESULTS, call, contents, write_task

import autocompress as ac


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a good result in `out`, its task in task.py."""
    folder = tmp_path_factory.mktemp("done")
    outcome = call("compress", write_task(folder), "--budget", "4x", "--out", folder / "out", "--workers", 1)
    assert outcome.code == 0, outcome.err
    return folder


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, autocompress.cli; print([m for m in ('torch', 'numpy', 'numba', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert "compress" in call("--help").out
    assert call("--version").out.strip() == ac.__version__
    for verb in (
        "demo",
        "compress",
        "profile",
        "plan",
        "compare",
        "verify",
        "unpack",
        "inspect",
        "report",
        "costs",
        "precrop",
        "doctor",
    ):
        assert "Usage" in call(verb, "--help").out


def test_usage_errors_have_code_2() -> None:
    for arguments in ([], ["nonesuch"], ["compress"], ["compress", "x.py", "--budget", "4x"], ["verify"]):
        assert call(*arguments).code == 2
    assert "no command" in call("--debug").refused(2)


def test_compress_writes_its_four_files_and_says_what_it_did(done: Path) -> None:
    out = done / "out"
    assert sorted(p.name for p in out.iterdir()) == sorted([*RESULTS, "profile"])
    metrics = json.loads((out / "metrics.json").read_text())
    plan = ac.Plan.from_json((out / "plan.json").read_text())
    size = (out / "model.acz").stat().st_size
    assert metrics["bytes"] == size == plan.predicted_bytes <= plan.budget_bytes == metrics["budget_bytes"]
    assert metrics["original_bytes"] // 4 == metrics["budget_bytes"]
    assert metrics["ratio"] >= 4
    assert {"metric", "baseline_metric", "predicted_loss", "bound", "gap", "strategy", "seconds"} <= set(metrics)
    assert plan.is_measured
    assert plan.measured["kl"] <= plan.measured["single_option_kl"]


def test_json_goes_to_stdout_and_progress_to_stderr(done: Path, tmp_path: Path) -> None:
    outcome = call("compress", done / "task.py", "--budget", "5x", "--out", tmp_path, "--workers", 1, "--json")
    assert json.loads(outcome.out) == json.loads((tmp_path / "metrics.json").read_text())
    assert [line.split(":")[0] for line in outcome.err.strip().splitlines()] == [
        "calibrate",
        "evaluate the dense model",
        "profile",
        "plan",
        "apply",
        "sequential",
        "tune",
        "save and verify",
        "evaluate the file",
    ]
    human = call("compress", done / "task.py", "--budget", "5x", "--out", tmp_path, "--workers", 1).out
    for words in ("promised", "on disk", "metric", "gap", "KL to the dense model", "written"):
        assert words in human


def test_options_by_name_and_by_family(done: Path, tmp_path: Path) -> None:
    task, out = done / "task.py", tmp_path / "out"
    arguments = ("compress", task, "--budget", "2.2x", "--out", out, "--effort", "fast", "--options")
    dry = call(*arguments, "int8,nm rd(0.5,0.1)2:4", "--dry-run", "--json")
    assert json.loads(dry.out)["options_per_layer"] == 17
    assert call(*arguments, "int8, 2:4fp16 blk4@50w4g8").code == 0
    options = set(json.loads((out / "plan.json").read_text())["layers"].values())
    assert options <= {"dense", "w8", "w8t", "w8a", "2:4fp16", "blk4@50w4g8"}
    assert call("verify", out).code == 0
    words = call(*arguments, "int9").refused(2)
    assert "'int9' is not an option" in words
    assert "families of options are default, lean, fine, int8, int4g128" in words
    assert "no compressor realises 'rank8w8t'" in call(
        "profile", task, "--store", out, "--options", "rank8w8t"
    ).refused(2)


def test_a_dry_run_writes_nothing(done: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    outcome = call("compress", done / "task.py", "--budget", "4x", "--out", target, "--dry-run", "--json")
    facts = json.loads(outcome.out)
    assert facts["layers"] == 3
    assert facts["no_file_below_bytes"] < facts["budget_bytes"] < facts["original_bytes"]
    assert call("profile", done / "task.py", "--store", target, "--dry-run").code == 0
    assert "by itself" in call("compress", done / "task.py", "--budget", "9", "--out", target, "--dry-run").refused(3)
    assert not list(tmp_path.iterdir())


def test_the_next_budget_takes_the_profile_from_the_store(done: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    facts = json.loads(call("profile", done / "task.py", "--store", store, "--workers", 1, "--json").out)
    assert facts["layers"] == 3
    assert facts["not_reached"] == []
    assert facts["fingerprint"] == ac.load_profile(done / "out" / "profile").fingerprint
    before = {p: p.stat().st_mtime_ns for p in store.rglob("*.npz")}
    for budget in ("4x", "6x"):
        assert (
            call("compress", done / "task.py", "--budget", budget, "--out", tmp_path / budget, "--store", store).code
            == 0
        )
    assert {p: p.stat().st_mtime_ns for p in store.rglob("*.npz")} == before
    assert not (tmp_path / "4x" / "profile").exists()
    assert contents(tmp_path / "4x", ("model.acz", "plan.json")) == contents(done / "out", ("model.acz", "plan.json"))


def test_the_limit_of_exact_work_is_an_option_and_a_store_of_another_one_is_refused(done: Path, tmp_path: Path) -> None:
    task, store = done / "task.py", tmp_path / "store"
    arguments = ("profile", task, "--options", "w4,s50w4", "--workers", 1, "--json", "--store")
    limit = 6 * 9**3 / 3  # of conv, 6 x 9; wide has 8 x 54, head 3 x 8
    facts = json.loads(call(*arguments, store, "--exact-limit", limit).out)
    assert facts["one_order_for_all_rows"] == ["wide"]
    table = ac.load_profile(store).table
    assert dict(zip(table["layer"], table["method"], strict=True)) == {
        "conv": "exact",
        "wide": "shared",
        "head": "exact",
    }
    assert json.loads(call(*arguments, tmp_path / "all").out)["one_order_for_all_rows"] == []
    for other in ((), ("--exact-limit", limit - 1)):
        assert "field 'exact_limit'" in call(*arguments, store, *other).refused(2)
    compress = (
        "compress",
        task,
        "--budget",
        "3x",
        "--effort",
        "fast",
        "--options",
        "w4,s50w4",
        "--store",
        store,
        "--out",
    )
    assert "field 'exact_limit'" in call(*compress, tmp_path / "out").refused(2)
    assert call(*compress, tmp_path / "out", "--exact-limit", limit).code == 0
    assert call(*arguments, tmp_path / "none", "--exact-limit", -1).code == 2


def test_the_number_of_workers_changes_nothing(done: Path, tmp_path: Path) -> None:
    assert call("compress", done / "task.py", "--budget", "4x", "--out", tmp_path, "--workers", 2).code == 0
    assert contents(tmp_path, ("model.acz", "plan.json")) == contents(done / "out", ("model.acz", "plan.json"))


@pytest.mark.parametrize(
    "evaluate",
    [
        "",
        EVALUATE.replace(
            "return", "torch.manual_seed(5)\n        torch.rand(7)\n        model.train()\n        return"
        ),
        EVALUATE.replace("return", "model.head.weight.data.zero_()\n        return"),
    ],
    ids=["removed", "draws random numbers", "changes its model"],
)
def test_no_choice_depends_on_evaluate(done: Path, tmp_path: Path, evaluate: str) -> None:
    task = write_task(tmp_path, evaluate=evaluate)
    outcome = call("compress", task, "--budget", "4x", "--out", tmp_path / "out", "--workers", 1)
    assert outcome.code == 0, outcome.err
    assert contents(tmp_path / "out", ("model.acz", "plan.json")) == contents(done / "out", ("model.acz", "plan.json"))


def test_effort_fast_is_one_exact_solve(done: Path, tmp_path: Path) -> None:
    store = done / "out" / "profile"
    call("compress", done / "task.py", "--budget", "4x", "--out", tmp_path, "--store", store, "--effort", "fast")
    assert json.loads((tmp_path / "metrics.json").read_text())["strategy"] in ("exact", "uniform")


def test_plan_from_a_store(done: Path, tmp_path: Path) -> None:
    text = call("plan", done / "out", "--budget", "4x", "--strategy", "exact", "--json").out
    plan = ac.Plan.from_json(text)
    assert not plan.is_measured
    assert plan.gap < 1e-9
    target = tmp_path / "plan.json"
    outcome = call("plan", done / "out" / "profile", "--budget", "4x", "--strategy", "exact", "--out", target)
    assert target.read_text() == text
    assert "share of error" in outcome.out
    assert f"{plan.predicted_loss:.6g} predicted, {plan.bound:.6g} is the proven lower bound" in outcome.out
    assert "the model was not run" in outcome.out
    default = ac.Plan.from_json(call("plan", done / "out", "--budget", "4x", "--json").out)
    assert default == plan
    task = ("--strategy", "auto", "--task", done / "task.py")
    measured = call("plan", done / "out", "--budget", "4x", *task, "--json").out
    planned, finished = ac.Plan.from_json(measured), ac.Plan.from_json((done / "out" / "plan.json").read_text())
    # What `compress` hands out began as this plan, and has been compressed in order and tuned since.
    for name in ("strategy", "predicted_loss", "bound", "gap", "budget_bytes", "fingerprint"):
        assert getattr(planned, name) == getattr(finished, name)
    assert finished.notes[: len(planned.notes)] == planned.notes
    assert finished.measured["kl"] <= planned.measured["kl"]


def test_verify_without_a_task_imports_nothing_of_anybodys(done: Path, tmp_path: Path) -> None:
    for name in ("model.acz", "plan.json", "metrics.json"):
        (tmp_path / name).write_bytes((done / "out" / name).read_bytes())
    outcome = call("verify", tmp_path, "--json")
    checks = json.loads(outcome.out)
    assert checks["good"]
    assert [c["name"] for c in checks["checks"]] == ["budget", "prediction", "contents", "options", "metrics"]
    result = ac.verify(tmp_path)
    assert result.good
    result.require()


def test_verify_with_a_task_loads_and_scores(done: Path) -> None:
    outcome = call("verify", done / "out", "--task", done / "task.py")
    assert outcome.code == 0, outcome.err
    for words in ("ok   loading", "ok   metric", "every tensor arrives in Tiny"):
        assert words in outcome.out


def test_inspect_accounts_for_every_byte(done: Path) -> None:
    path = done / "out" / "model.acz"
    found = json.loads(call("inspect", path, "--json").out)
    assert found["bytes"] == path.stat().st_size == sum(part["bytes"] for part in found["parts"])
    plan = ac.Plan.from_json((done / "out" / "plan.json").read_text())
    options = {part["name"]: part["option"] for part in found["parts"] if part["kind"] == "layer"}
    assert options == {f"{name}.weight": str(option) for name, option in plan.layers.items()}
    assert f"{path.stat().st_size:,}" in call("inspect", path).out


def test_unpack_writes_what_load_gives(done: Path, tmp_path: Path) -> None:
    target = tmp_path / "dense.safetensors"
    assert call("unpack", done / "out" / "model.acz", "--out", target).code == 0
    dense, loaded = load_file(target), ac.load(done / "out" / "model.acz")
    assert set(dense) == set(loaded)
    assert all(torch.equal(dense[name], loaded[name]) for name in dense)


def test_report_makes_the_same_page_again(done: Path, tmp_path: Path) -> None:
    page = (done / "out" / "report.html").read_bytes()
    (done / "out" / "report.html").unlink()
    assert call("report", done / "out").code == 0
    assert (done / "out" / "report.html").read_bytes() == page
    assert "there is no profile" in call("report", done / "out", "--store", tmp_path).refused(2)


def test_doctor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = json.loads(call("doctor", "--json").out)
    assert found["torch"] == {"good": True, "found": torch.__version__}
    assert found["cores"]["good"]
    monkeypatch.setenv("AUTOCOMPRESS_DATA", str(tmp_path / "nowhere"))
    outcome = call("doctor")
    assert "data: see above" in outcome.refused(1)
    assert "which is not a folder" in outcome.out


def test_a_pipe_that_closes_is_no_error(done: Path) -> None:
    path = done / "out" / "model.acz"
    code = "import sys; from autocompress.cli import main; sys.argv[1:] = ['inspect', sys.argv[1], '--json']; main()"
    reader, writer = os.pipe()
    os.close(reader)
    found = subprocess.run(
        [sys.executable, "-c", code, path], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert "Traceback" not in found.stderr
    assert "autocompress:" not in found.stderr


def test_a_model_of_two_layers_with_shared_weights(tmp_path: Path) -> None:
    tied = MODEL.replace("self.head = nn.Linear(8, 3)", "self.a = nn.Linear(8, 8); self.b = nn.Linear(8, 8)").replace(
        "return self.head(torch.relu(self.wide(x)).mean(dim=(2, 3)))",
        "return self.b(torch.relu(self.a(torch.relu(self.wide(x)).mean(dim=(2, 3)))))",
    )
    tied = tied.replace("return Tiny().eval()", "net = Tiny()\n        net.b.weight = net.a.weight\n        return net")
    task = write_task(tmp_path, model=tied)
    assert call("compress", task, "--budget", "4x", "--out", tmp_path / "out", "--workers", 1).code == 0
    assert call("verify", tmp_path / "out", "--task", task).code == 0


@pytest.mark.parametrize("budget", ["1GB", "0.5x"])
def test_a_budget_that_asks_for_nothing_says_so(done: Path, tmp_path: Path, budget: str) -> None:
    store = done / "out" / "profile"
    outcome = call("compress", done / "task.py", "--budget", budget, "--out", tmp_path, "--store", store)
    assert outcome.code == 0, outcome.err
    assert "the budget has room for the network as it is" in outcome.out
    assert call("verify", tmp_path, "--task", done / "task.py").code == 0


@pytest.fixture
def quick_clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Models run once in onnxruntime, but the clock says what it is told: any form adds a tenth of the dense model."""
    from autocompress import timing

    def in_turns(runs: Sequence[Callable[[], Any]], runtime: object) -> tuple[float, ...]:
        for run in runs:
            run()
        return tuple(1.0 + 0.1 * i for i in range(len(runs)))

    monkeypatch.setattr(timing, "in_turns", in_turns)
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")  # no line of a table is folded


@pytest.mark.usefixtures("quick_clock")
def test_budgets_on_several_costs(done: Path, tmp_path: Path) -> None:
    out, store = tmp_path / "out", done / "out" / "profile"
    limits = ("--budget", "3x", "--max-bops", "20%", "--max-macs", "100%", "--max-latency-ms", "1e4")
    outcome = call("compress", done / "task.py", *limits, "--out", out, "--store", store)
    assert outcome.code == 0, outcome.err
    for words in ("BOPs", "at most 1,818,624 asked", "ms", "predicted", "measured, per sample in onnxruntime"):
        assert words in outcome.out
        assert words in (out / "report.html").read_text()
    costs = json.loads((out / "metrics.json").read_text())["costs"]
    assert costs["macs"] == {"predicted": 8880, "dense": 8880, "limit": 8880}
    assert 0 < costs["bops"]["predicted"] <= costs["bops"]["limit"] == 0.2 * 32 * 32 * 8880
    assert costs["latency_ms"]["limit"] == 1e4
    assert (costs["latency_ms"]["dense"], costs["latency_ms"]["measured"]) == (1.0, 1.0)
    changed = sum(
        option != ac.Option() for option in ac.Plan.from_json((out / "plan.json").read_text()).layers.values()
    )
    assert costs["latency_ms"]["predicted"] == pytest.approx(1.0 + 0.1 * changed, abs=1e-5)
    plan = ac.Plan.from_json((out / "plan.json").read_text())
    assert str(plan.budget) == "3x,macs=100%,bops=20%,latency_ms=10000"
    marks = call("verify", out, "--task", done / "task.py")
    assert marks.code == 0, marks.out
    for words in ("ok   macs", "ok   bops", "ok   latency_ms"):
        assert words in marks.out
    refused = call(
        "compress", done / "task.py", "--budget", "3x", "--max-latency-ms", "1e-5", "--out", out, "--store", store
    )
    assert re.search(r"no allocation is within 0.000010 ms: the least possible is 1\.\d+ ms", refused.refused(3))


def test_verify_counts_bops_again(done: Path, tmp_path: Path) -> None:
    store = done / "out" / "profile"
    call("compress", done / "task.py", "--budget", "3x", "--max-bops", "20%", "--out", tmp_path, "--store", store)
    assert ac.verify(tmp_path).good
    text = (tmp_path / "metrics.json").read_text()
    metrics = json.loads(text)
    for change in ({"predicted": 1.0}, {"dense": 10.0}, {"dense": None}):
        metrics["costs"]["bops"] = json.loads(text)["costs"]["bops"] | change
        (tmp_path / "metrics.json").write_text(json.dumps(metrics))
        assert "bops" in call("verify", tmp_path).refused(2)
    plan = (tmp_path / "plan.json").read_text()
    (tmp_path / "metrics.json").write_text(text)
    (tmp_path / "plan.json").write_text(plan.replace("bops=20%", "bops=1%"))
    assert "at most 90,931.2 allowed" in call("verify", tmp_path).refused(2)


def test_plan_takes_the_same_limits(done: Path) -> None:
    outcome = call("plan", done / "out", "--budget", "3x", "--max-bops", "5%")
    assert outcome.code == 0, outcome.err
    assert "at most 454,656 asked" in outcome.out
    assert "exact(milp)" in outcome.out
    assert "the least possible is 8,880 MACs" in call("plan", done / "out", "--budget", "3x", "--max-macs", 99).refused(
        3
    )
    assert "plan with --task" in call("plan", done / "out", "--budget", "3x", "--max-latency-ms", 9).refused(2)
    assert "budget bops is '0'" in call("plan", done / "out", "--budget", "3x", "--max-bops", "").refused(2)


@pytest.mark.usefixtures("quick_clock")
def test_costs_prints_the_table_of_times(done: Path) -> None:
    found = json.loads(call("costs", done / "task.py", "--json").out)
    assert found["dense_ms"] == 1.0
    assert found["macs"] == {"conv": 1944, "wide": 6912, "head": 24}
    assert len(found["cells"]) == 15
    table = call("costs", done / "task.py").out
    for words in ("Conv2d 8x6x3x3", "int4 QDQ, a step per row", "float16", "8,880", "the dense model:", "onnxruntime"):
        assert words in table
    assert f"{found['dense_ms']:.3f} ms" in table, "the second call finds the first one's times"


def test_precrop_writes_a_narrower_network_and_its_widths(tmp_path: Path) -> None:
    task, names = write_task(tmp_path), ("widths.json", "model.safetensors")
    outcome = call("precrop", task, "--params", "60%", "--macs", "70%", "--out", tmp_path / "narrow")
    assert outcome.code == 0, outcome.err
    body = json.loads((tmp_path / "narrow" / "widths.json").read_text())
    state = load_file(tmp_path / "narrow" / "model.safetensors")
    assert {name: list(tensor.shape) for name, tensor in state.items()} == body["shapes"]
    assert body["params"] <= 0.6 * body["dense"]["params"]
    assert body["macs"] <= 0.7 * body["dense"]["macs"]
    assert f"{body['params']:,} of {body['dense']['params']:,}" in outcome.out
    again = call("precrop", task, "--params", "60%", "--macs", "70%", "--out", tmp_path / "b", "--json")
    assert json.loads(again.out) == body
    assert contents(tmp_path / "narrow", names) == contents(tmp_path / "b", names)
    assert "smallest widths take" in call("precrop", task, "--params", "9", "--out", tmp_path).refused(3)
    assert "no limit is given" in call("precrop", task, "--out", tmp_path).refused(2)


def test_precrop_writes_tied_weights_once(tmp_path: Path) -> None:
    (tmp_path / "tied.py").write_text(
        """
import torch
from torch import nn


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.wide, self.back = nn.Embedding(20, 8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x):
        return self.head(self.back(torch.relu(self.wide(self.table(x).mean(1)))))


def model():
    return Tied()


def calibration():
    return [torch.randint(0, 20, (8, 5)) for _ in range(3)]
"""
    )
    outcome = call("precrop", tmp_path / "tied.py", "--params", "80%", "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert "table.weight" in state
    assert "head.weight" not in state


def test_the_demo(tmp_path: Path) -> None:
    """The embedded default: a tenth of the size, nearly nothing lost, proven, and verified from the file."""
    outcome = call("demo", "--out", tmp_path / "demo")
    assert outcome.code == 0, outcome.err
    for words in (
        "share of error",
        "promised",
        "on disk",
        "400 digits that nothing else ever saw",
        "proven",
        "written",
    ):
        assert words in outcome.out
    metrics = json.loads((tmp_path / "demo" / "metrics.json").read_text())
    assert metrics["bytes"] <= metrics["budget_bytes"] == metrics["original_bytes"] // 10
    assert metrics["metric"] > metrics["baseline_metric"] - 1.0
    assert metrics["gap"] < 0.05  # of a plan that a search found; 0 where one of the objectives' own is best
    assert call("verify", tmp_path / "demo", "--task", "digits").code == 0


COMPARED = [(b, s) for b in ("6x", "1.2x,bops=90%") for s in ("uniform", "exact", "kl")]


def test_compare_prints_its_table_and_keeps_every_plan(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # no line of a table is folded
    task, out, other = done / "task.py", tmp_path / "out", tmp_path / "other"
    arguments = ("compare", task, "--budgets", "6x,1.2x,bops=90%", "--strategies", "uniform,exact,kl", "--out")
    outcome = call(*arguments, out, "--seeds", "0,1", "--workers", 1)
    assert outcome.code == 0, outcome.err
    assert sorted(p.name for p in out.iterdir()) == ["compare.csv", "compare.html", "plans.jsonl", "seed0", "seed1"]
    assert "seed 1: compare" in outcome.err
    table = ac.load_comparison(out)
    rows = list(zip(table["seed"], table["budget"], table["strategy"], strict=True))
    assert rows == [(seed, *at) for seed in (0, 1) for at in COMPARED]
    assert (table["error"] == "").all()
    assert table[["kl", "metric"]].notna().all(axis=None)
    for words in ("means of 2 seeds", "6x", "1.2x,bops=90%", "as papers count", "±", "uniform", "kl"):
        assert words in outcome.out
    assert outcome.out.count(" *") == 2  # the best of each budget
    # A row is the plan that the profile of its seed gives.
    assert call("plan", out / "seed1", "--budget", "6x", "--out", tmp_path / "plan.json").code == 0
    plan = ac.Plan.from_json((tmp_path / "plan.json").read_text())
    (row,) = table.query("seed == 1 and budget == '6x' and strategy == 'exact'").to_dict("records")
    assert {n: o for n, (o, _) in json.loads(row["layers"]).items()} == {n: str(o) for n, o in plan.layers.items()}
    # Again: the same rows, none of them computed anew.
    before = {p: p.stat().st_mtime_ns for p in out.rglob("rows/*.json")}
    assert len(before) == 12
    again = call(*arguments, out, "--seeds", "0,1", "--workers", 1, "--json")
    assert {p: p.stat().st_mtime_ns for p in out.rglob("rows/*.json")} == before
    assert [(r["seed"], r["budget"], r["strategy"]) for r in json.loads(again.out)["rows"]] == rows
    # Workers load the task, whose model no pickle could find, and the rows are the same.
    shutil.copytree(out / "seed0" / "profile", other / "seed0" / "profile")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert call(*arguments, other, "--workers", 2).code == 0
    pd.testing.assert_frame_equal(
        ac.load_comparison(other).drop(columns="seconds"),
        table[table["seed"] == 0].drop(columns="seconds"),
        check_exact=True,
    )


def test_what_compare_refuses(done: Path, tmp_path: Path) -> None:
    task, out = done / "task.py", tmp_path / "out"

    def refused(code: int, budgets: str, *more: object) -> str:
        return call("compare", task, "--budgets", budgets, "--out", out, *more).refused(code)

    assert "'8y' is not a budget" in refused(2, "4x,8y")
    assert "there is no strategy 'best'; there are uniform," in refused(2, "4x", "--strategies", "uniform,best")
    assert "effort is 'slow'" in refused(2, "4x", "--effort", "slow")
    assert "--seeds has '-1'; needed whole numbers" in refused(2, "4x", "--seeds", "0,-1")
    assert "'int9' is not an option" in refused(2, "4x", "--options", "int9")
    assert "what no choice changes has" in refused(3, "4x,9")
    dry = json.loads(call("compare", task, "--budgets", "4x,700", "--out", out, "--dry-run", "--json").out)
    assert dry["budgets"]["700"] == 700
    assert dry["rows"] == 2 * len(dry["strategies"]) >= 14
    assert not out.exists()
    # Nothing is as small as that; the table says so, line by line, and so does the exit code.
    outcome = call("compare", task, "--budgets", "160", "--strategies", "uniform,exact", "--out", out, "--workers", 1)
    assert "no strategy has a plan at any of these budgets" in outcome.refused(3)
    assert "no plan: exact at 160: InfeasibleError: no allocation fits in 160 bytes" in outcome.out
    # With one that has a plan, the others are lines.
    outcome = call("compare", task, "--budgets", "160,6x", "--strategies", "exact", "--out", out, "--workers", 1)
    assert outcome.code == 0
    assert "no plan: exact at 160: InfeasibleError" in outcome.out


def test_compare_says_what_evaluate_raises(tmp_path: Path) -> None:
    task = write_task(tmp_path, evaluate="def evaluate(model):\n    raise ValueError('no images')\n")
    arguments = ("compare", task, "--budgets", "4x", "--strategies", "uniform,exact", "--out", tmp_path / "out")
    for workers in (1, 2):
        outcome = call(*arguments, "--workers", workers)
        assert "task task: evaluate() failed: ValueError: no images" in outcome.refused(2)
