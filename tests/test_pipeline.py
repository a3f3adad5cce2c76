"""The whole way: the same bytes for the same seed, whatever watches, and results that are replaced only at the end."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import KINDS, OPTIONS, Kinds, batches, convnet, images, kinds, profiled, seeded
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

import autocompress as ac
from autocompress import pipeline
from autocompress.applying import encoded_of
from autocompress.costs import code_bits
from autocompress.errors import CalibrationError, InfeasibleError, TaskError
from autocompress.layers import find_layers, model_digest
from autocompress.pipeline import RESULTS
from autocompress.planning import least_bytes
from autocompress.profiling import load_profile
from autocompress.records import make_template
from autocompress.saving import OutputError
from autocompress.strategies import StrategyError
from autocompress.tasks import load_task
from autocompress.types import Budget, Option

# The keys of metrics.json that are promised; there may be more.
KEYS = {
    "bytes",
    "budget_bytes",
    "original_bytes",
    "ratio",
    "metric",
    "baseline_metric",
    "predicted_loss",
    "bound",
    "gap",
}
KEYS |= {"strategy", "seconds"}
ROOT = Path(__file__).parent.parent


def run(out: Path, **changes: Any) -> Any:
    given: dict[str, Any] = {"budget": "5x", "options": list(OPTIONS), "workers": 1, "effort": "fast", **changes}
    return ac.compress(given.pop("model", None) or convnet(), given.pop("data", None) or images(), out=out, **given)


def results(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in RESULTS}


def same(a: Path, b: Path) -> bool:
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in ("model.acz", "plan.json"))


@pytest.mark.parametrize("strategy", ["auto", "exact"])
def test_the_same_seed_gives_the_same_bytes_for_any_number_of_workers(strategy: str, tmp_path: Path) -> None:
    for name, workers in [("once", 1), ("twice", 1), ("two", 2)]:
        run(tmp_path / name, workers=workers, strategy=strategy, effort="normal")
    assert same(tmp_path / "once", tmp_path / "twice")
    assert same(tmp_path / "once", tmp_path / "two")
    run(tmp_path / "another", seed=1, strategy=strategy, effort="normal")
    assert not same(tmp_path / "once", tmp_path / "another")


def test_labelled_batches_reach_the_strategies(tmp_path: Path) -> None:
    """`loss` goes by the task's own loss where there are labels for it, by the KL where there are none."""
    seen = []

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        seen.append(len(batch[1]))
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

    labelled = [(batch, torch.arange(len(batch)) % 3) for batch in images()]
    run(tmp_path / "without", strategy="loss", effort="normal", loss=loss)
    assert not seen
    run(tmp_path / "with", strategy="loss", effort="normal", loss=loss, training=labelled)
    assert seen


def test_every_kind_of_layer_goes_the_whole_way(tmp_path: Path) -> None:
    """Calibrated, profiled, planned, applied, saved, verified, loaded: the same outputs, bit for bit."""
    model, data = kinds()
    dense = copy.deepcopy(model.state_dict())
    options = [*OPTIONS, "w8", "w3", "s50w5"]
    result = run(tmp_path / "out", model=model, data=data, budget="3x", options=options, strategy="exact")
    assert list(result.plan.layers) == KINDS
    assert result.profile.skipped == {}
    assert result.profile.statistics.unreached == ("spare",)
    assert all(torch.equal(v, dense[k]) for k, v in model.state_dict().items())
    assert ac.verify(tmp_path / "out").good
    assert result.info.bytes <= result.info.budget_bytes == result.profile.template.dense_bytes // 3
    with torch.no_grad():
        wanted = result.model(data[0])
        assert torch.equal(ac.load(result.info.path, seeded(Kinds, seed=1))(data[0]), wanted)
        for packed in (True, "bits"):
            back: Any = ac.load(result.info.path, seeded(Kinds, seed=1), packed=packed)
            assert torch.equal(back(data[0]), wanted)
            for kind in (back.words, back.topic, back.encoder.self_attn, back.cell, back.up):
                assert is_parametrized(kind)
            assert not is_parametrized(back.lstm), "its weights would be decoded into a list that stays"
        assert 0 < float((wanted - model(data[0])).abs().max()) < float(model(data[0]).abs().max())
    for name, option in result.plan.layers.items():
        layer = result.profile.layers[name].layer
        weight = layer.matrix(result.model.get_parameter(layer.key))
        problem = result.profile.problem(name, model.get_parameter(layer.key))
        error = result.profile.layers[name].row(option).error
        assert error == (0.0 if name == "spare" else pytest.approx(problem.error(weight), rel=1e-9))
        assert not np.array_equal(weight, problem.weight) or option.is_dense
    stored = load_profile(tmp_path / "out" / "profile")
    assert stored.fingerprint == result.profile.fingerprint
    assert {n: x.layer for n, x in stored.layers.items()} == {n: x.layer for n, x in result.profile.layers.items()}


@pytest.mark.parametrize("option", ["w4", "w3", "rd(0.5,0.3)s60", "fp16", "s50w4", "mix12.5/0/25/62.5/0"])
def test_every_kind_of_layer_with_every_kind_of_step(option: str, tmp_path: Path) -> None:
    model, data = kinds()
    found = profiled(model, data, [option, "w8"])
    plan = ac.plan(found, "1x")
    layers = {n: Option.parse(option) if n != "spare" else Option.parse("w8") for n in plan.layers}
    plan = plan.replace(layers=layers)
    small = ac.apply(model, plan, found, data)
    path = ac.save(small, plan, tmp_path / "model.acz").path
    assert path.stat().st_size == found.template.file_bytes({n: found.layers[n].row(o) for n, o in layers.items()})
    with torch.no_grad():
        for packed in (False, True):
            back = ac.load(path, seeded(Kinds, seed=1), packed=packed)
            assert torch.equal(back(data[0]), small(data[0]))


def test_every_layer_that_can_have_a_codebook_goes_the_whole_way(tmp_path: Path) -> None:
    model, data = kinds()
    options = ["w8", *("pq2x16@1w5", "pq3x8w4", "pq4x8pw6", "kq4w6")]
    found = profiled(model, data, options)
    plan, wanted = ac.plan(found, "1x"), itertools.cycle(map(Option.parse, options[1:]))
    layers = dict.fromkeys(plan.layers, Option(bits=8))
    for name, layer in found.layers.items():
        offered = {row.option for row in layer.rows}
        for option in itertools.islice(wanted, 4):
            layers[name] = option if option in offered else layers[name]
        next(wanted)
    # A table that is the head too has none, and a layer that calibration never reached only what needs no data.
    assert [n for n, option in layers.items() if option.words is None] == ["words", "spare"]
    assert {"kq4w6", "pq3x8w4", "pq2x16@1w5", "pq4x8pw6"} == {str(o) for o in layers.values() if o.words is not None}
    plan = plan.replace(layers=layers, budget_bytes=10**6)
    small = ac.apply(model, plan, found, data)
    path = ac.save(small, plan, tmp_path / "model.acz").path
    assert path.stat().st_size == found.template.file_bytes({n: found.layers[n].row(o) for n, o in layers.items()})
    with torch.no_grad():
        for packed in (False, True, "bits"):
            back: Any = ac.load(path, seeded(Kinds, seed=1), packed=packed)
            assert torch.equal(back(data[0]), small(data[0])), packed
    for name, option in layers.items():
        layer = found.layers[name]
        if layer.reached:
            problem = found.problem(name, model.get_parameter(layer.layer.key))
            error = problem.error(layer.layer.matrix(small.get_parameter(layer.layer.key)))
            assert error == pytest.approx(layer.row(option).error, rel=1e-9)


@pytest.mark.parametrize("sequential", [False, True], ids=["independent", "sequential"])
def test_codebooks_are_chosen_where_they_are_best_and_verified(sequential: bool, tmp_path: Path) -> None:
    effort = "normal" if sequential else "fast"
    options = ["kq8w6", "kq8@1w4", "pq2x8w5", "pq4x4w6", "fp16"]
    result = run(tmp_path / "out", budget="5x", options=options, strategy="exact", effort=effort, sequential=sequential)
    assert any(option.words for option in result.plan.layers.values())
    assert all(check.good for check in ac.verify(tmp_path / "out").checks)
    assert result.info.bytes <= result.info.budget_bytes


@pytest.mark.parametrize("sequential", [False, True], ids=["independent", "sequential"])
def test_rows_of_several_widths_go_the_whole_way_with_exact_bops(sequential: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    # Sequential mode takes no other limits.
    budget, effort = ("5x", "normal") if sequential else ("5x,bops=9%", "fast")
    result = run(out, budget=budget, options=["mixed"], strategy="exact", effort=effort, sequential=sequential)
    assert any(option.mix for option in result.plan.layers.values())
    assert all(check.good for check in ac.verify(out).checks)
    stored = load_profile(out / "profile")
    assert stored.fingerprint == result.profile.fingerprint
    plan = ac.Plan.from_json((out / "plan.json").read_text())
    assert bool(plan.realised) == sequential
    profile = stored.with_realised(plan)
    entries = {entry.name: entry for entry in encoded_of(result.model).entries}
    for name, option in plan.layers.items():
        if option.mix is None:
            continue
        codes = entries[f"{name}.weight"].codes()
        bits = sum(code_bits(row) * np.count_nonzero(row) for row in codes)
        assert profile.layers[name].row(option).bits == bits
        assert profile.bops(name, profile.layers[name].row(option)) == -(-32 * profile.macs(name) * bits // codes.size)
    restored: Any = ac.load(out / "model.acz", convnet())
    assert torch.equal(restored(images()[0]), result.model(images()[0]))


def test_a_profile_that_is_there_is_used_and_gives_the_same_bytes(tmp_path: Path) -> None:
    run(tmp_path / "first", store=tmp_path / "store", budget="4x")
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "store" / "layers").iterdir()}
    run(tmp_path / "second", store=tmp_path / "store")
    run(tmp_path / "third")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "store" / "layers").iterdir()} == files
    assert same(tmp_path / "second", tmp_path / "third")
    assert not (tmp_path / "second" / "profile").exists()
    assert (tmp_path / "third" / "profile" / "profile.json").is_file()


def test_evaluate_reports_and_decides_nothing(tmp_path: Path) -> None:
    calls: list[nn.Module] = []

    def evaluate(model: nn.Module) -> float:
        """A vandal: it moves weights, modes and the generator of whatever it is handed."""
        calls.append(model)
        model.train()
        with torch.no_grad():
            for tensor in model.parameters():
                tensor.add_(torch.randn(()))
        return 10.0 - len(calls)

    model = convnet()
    digest = model_digest(model)
    with torch.random.fork_rng(devices=[]):
        found = run(tmp_path / "with", evaluate=evaluate, model=model, effort="normal")
    run(tmp_path / "without", effort="normal")
    assert same(tmp_path / "with", tmp_path / "without")
    assert model_digest(model) == digest
    assert len(calls) == 2, "the dense model and the final one, no other"
    assert (found.metrics["baseline_metric"], found.metrics["metric"]) == (9.0, 8.0)
    assert json.loads((tmp_path / "without" / "metrics.json").read_text())["metric"] is None


def test_labels_in_the_batches_change_nothing(tmp_path: Path) -> None:
    run(tmp_path / "inputs")
    run(tmp_path / "pairs", data=[[x, torch.zeros(len(x))] for x in images()])
    a, b = (tmp_path / name / "model.acz" for name in ("inputs", "pairs"))
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.data
def test_evaluate_decides_nothing_on_a_real_network(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ResNet-20 with a short list of options and 128 images, with the task's own `evaluate` and without.

    Evaluated are 1,000 of the test images, for time.
    """
    task = load_task(ROOT / "experiments" / "tasks" / "resnet20_cifar10.py")
    cifar = sys.modules["cifar"]
    images, labels = cifar.test_images()
    monkeypatch.setattr(cifar, "test_images", lambda: (images[:1000], labels[:1000]))
    batches = task.calibration_batches(0)[:1]
    options: list[Any] = ["w3", "w4", "rd(0.8,0.3)"]
    for name, evaluate in [("with", task.evaluate), ("without", None)]:
        ac.compress(
            task.build_model(),
            batches,
            "9x",
            evaluate,
            "exact",
            "fast",
            out=tmp_path / name,
            store=tmp_path / "store",
            options=options,
        )
    assert same(tmp_path / "with", tmp_path / "without")
    metrics = json.loads((tmp_path / "with" / "metrics.json").read_text())
    assert metrics["bytes"] <= metrics["budget_bytes"] == metrics["original_bytes"] // 9
    assert metrics["baseline_metric"] == pytest.approx(91.73, abs=2.0)
    assert 78 < metrics["metric"] < 95


def test_what_is_written_agrees_with_itself(tmp_path: Path) -> None:
    found = run(tmp_path / "deep" / "out", evaluate=lambda model: 1, effort="normal")
    out = tmp_path / "deep" / "out"
    assert sorted(p.name for p in out.iterdir()) == sorted([*RESULTS, "profile"])
    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics) >= KEYS
    plan = ac.Plan.from_json((out / "plan.json").read_text())
    assert plan == found.plan
    size = (out / "model.acz").stat().st_size
    assert metrics["bytes"] == plan.predicted_bytes == found.info.bytes == size <= plan.budget_bytes
    assert metrics["budget_bytes"] == plan.budget_bytes == metrics["original_bytes"] // 5
    assert metrics["ratio"] == metrics["original_bytes"] / size
    assert metrics["strategy"] == plan.strategy
    assert math.isclose(metrics["predicted_loss"], plan.predicted_loss)
    assert found.info.path == out / "model.acz"
    with torch.no_grad():
        fresh = ac.load(out / "model.acz", convnet(seed=4))
        assert torch.equal(fresh(images()[0]), found.model(images()[0]))
    # Nothing that differs between machines or runs stands in the two files that must be the same everywhere.
    for text in (out / "plan.json").read_text(), (out / "model.acz").read_bytes().decode("latin-1"):
        assert str(tmp_path) not in text
        assert not re.search(r"20\d\d-\d\d-\d\d", text)


def _fails_late(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    calls: list[int] = []

    def evaluate(model: nn.Module) -> Any:
        calls.append(1)
        return 1.0 if len(calls) == 1 else "text"

    return {"evaluate": evaluate}


def _full_disk(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    def render(*args: Any, **kwargs: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("autocompress.reporting.render_report", render)
    return {}


@pytest.mark.parametrize(
    ("prepare", "changes", "error", "words"),
    [
        (None, {"budget": 10}, InfeasibleError, "fits in 10 bytes"),
        (None, {"strategy": "best"}, StrategyError, "no strategy 'best'"),
        (None, {"effort": "little"}, StrategyError, "effort is 'little'; it is one of fast, normal, max"),
        (_fails_late, {}, TaskError, r"evaluate returned str; needed a number"),
        (_full_disk, {}, OutputError, "No space left on device"),
    ],
    ids=["infeasible", "strategy", "effort", "evaluate", "disk"],
)
def test_old_results_stay_until_the_new_ones_are_complete(
    prepare: Any, changes: dict[str, Any], error: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path)
    before = results(tmp_path)
    more = prepare(monkeypatch) if prepare else {}
    with pytest.raises(error, match=words):
        run(tmp_path, **{"budget": "7x", **changes, **more})
    assert results(tmp_path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*RESULTS, "profile"]), "something half-written"


def test_new_results_replace_old_ones_and_leave_the_rest(tmp_path: Path) -> None:
    run(tmp_path)
    before = results(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    run(tmp_path, budget="7x")
    after = results(tmp_path)
    assert all(after[name] != before[name] for name in RESULTS)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    run(tmp_path / "fresh", budget="7x")
    assert same(tmp_path, tmp_path / "fresh")


def test_a_folder_that_cannot_be_one_is_named_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write in the output folder .*file"):
        run(tmp_path / "file")
    if os.geteuid() != 0:
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(OutputError, match="cannot write in the output folder"):
            run(tmp_path / "closed" / "out")


def test_fast_is_one_exact_solve(tmp_path: Path) -> None:
    fast, exact = (run(tmp_path / name, strategy=name) for name in ("auto", "exact"))
    assert same(tmp_path / "auto", tmp_path / "exact")
    assert fast.plan.strategy == exact.plan.strategy
    assert fast.plan.is_measured


def test_stages_are_told_in_order_and_to_their_end(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    run(tmp_path, progress=lambda *call: told.append(call), effort="normal")
    stages = list(dict.fromkeys(stage for stage, _, _ in told))
    assert stages == ["calibrate", "profile", "plan", "apply", "sequential", "tune", "save and verify"]
    for stage in stages:
        mine = [(done, total) for name, done, total in told if name == stage]
        assert mine[0][0] == 0
        assert mine[-1][0] == mine[-1][1]
        assert mine == sorted(mine)


@pytest.mark.parametrize(
    ("effort", "sequential", "stages"),
    [
        ("fast", None, set()),
        ("fast", True, {"sequential"}),
        ("normal", False, {"tune"}),
        ("normal", None, {"sequential", "tune"}),
    ],
)
def test_effort_and_a_choice_say_what_is_tried(
    effort: str, sequential: bool | None, stages: set[str], tmp_path: Path
) -> None:
    told: list[str] = []
    found = run(tmp_path, effort=effort, sequential=sequential, progress=lambda *call: told.append(call[0]))
    assert set(told) & {"sequential", "tune"} == stages
    assert {note.partition(":")[0] for note in found.plan.notes} & {"sequential", "tune"} == stages
    assert ("sequential" in stages) or not found.plan.realised
    # The plan's figure is that of the model in the file, not of the plan that it began as.
    context = ac.Context(convnet(), images())
    assert found.plan.measured["kl"] == context.divergence_of(ac.load(tmp_path / "model.acz", convnet()))
    assert found.plan.measured["kl"] <= found.plan.measured["single_option_kl"]


def test_other_limits_and_sequential_mode_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(StrategyError, match="keeps to a size only, and the budget limits macs too"):
        run(tmp_path, budget="5x,macs=1e9", sequential=True)
    found = run(tmp_path, budget="5x,macs=1e9", effort="normal")
    assert not found.plan.realised
    assert [note.partition(":")[0] for note in found.plan.notes][-1] == "tune"


def test_where_sequential_mode_is_not_possible_only_who_asked_for_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> nn.Module:
        raise CalibrationError("it goes another way")

    monkeypatch.setattr(pipeline, "apply_sequentially", refuse)
    with pytest.raises(CalibrationError, match="it goes another way"):
        run(tmp_path, sequential=True)
    found = run(tmp_path, effort="normal")
    assert "sequential: not possible (it goes another way)" in found.plan.notes
    assert not found.plan.realised


def _noise(small: nn.Module) -> nn.Module:
    """A model whose file is worse than that of `small`."""
    from autocompress.applying import carrying, encoded_of
    from autocompress.storage import float_entry

    encoded = encoded_of(small)
    worse = [
        float_entry(e.name, e.dequantise() + np.float32(1.0), codec=e.codec, params=e.params)
        if e.name == "linear.bias"
        else e
        for e in encoded.entries
    ]
    model: Any = copy.deepcopy(small)
    with torch.no_grad():
        model.linear.bias.add_(torch.arange(5.0))
    return carrying(model, worse, encoded.plan)


def test_what_measures_worse_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run(tmp_path / "plain", sequential=False)
    apply = pipeline.apply
    monkeypatch.setattr(pipeline, "apply_sequentially", lambda m, p, f, d, s, tell: _noise(apply(m, p, f, d, s)))
    monkeypatch.setattr(pipeline, "tune", lambda model, small, *rest: _noise(small))
    found = run(tmp_path / "tried", effort="normal", strategy="exact")
    assert (tmp_path / "plain" / "model.acz").read_bytes() == (tmp_path / "tried" / "model.acz").read_bytes()
    assert found.plan.measured["kl"] == plain.plan.measured["kl"]
    assert [note.rpartition(": ")[2] for note in found.plan.notes[-2:]] == ["not used", "not used"]
    assert found.plan.replace(notes=(), measured={}) == plain.plan.replace(notes=(), measured={})


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ([(9.0, 0.1), (10.5, 0.05)], ["kept", "not used"]),
        ([(11.0, 0.1), (9.0, 0.3)], ["not used", "not used"]),
        ([(9.9, 0.1), (9.95, 0.05)], ["kept", "kept"]),
    ],
)
def test_softened_outputs_decide_what_is_kept_within_the_best_single_option(
    found: list[tuple[float, float]], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([(10.0, 0.2), *found])
    apply = pipeline.apply
    monkeypatch.setattr(pipeline.Context, "judge", lambda *_: next(answers))
    monkeypatch.setattr(pipeline, "apply_sequentially", lambda m, p, f, d, s, tell: apply(m, p, f, d, s))
    monkeypatch.setattr(pipeline, "tune", lambda model, small, *rest: small)
    result = run(tmp_path, effort="normal", strategy="exact")
    assert [note.rpartition(": ")[2] for note in result.plan.notes[-2:]] == words
    kept = [kl for (kl, _), word in zip(found, words, strict=True) if word == "kept"]
    assert result.plan.measured["kl"] == (kept or [10.0])[-1]


def test_a_budget_below_what_the_whole_network_needs_is_not_refused_where_layers_narrow(tmp_path: Path) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 600), nn.BatchNorm1d(600), nn.ReLU(), nn.Linear(600, 3)))
    data = batches(4, size=32)
    options: list[Option | str] = ["w2", "s90w2", "n100/25w2", "n100/25s90w2", "n25/100w2", "n25/100s90w2"]
    assert "no_file_below_bytes" in pipeline.forecast(model, data, None, None, None)
    assert "no_file_below_bytes" not in pipeline.forecast(model, data, Budget.of(900), None, None, options)
    found = ac.compress(
        model, data, 900, strategy="exact", effort="fast", options=options, out=tmp_path / "out", workers=1
    )
    assert found.info.bytes <= 900 < least_bytes(make_template(model, find_layers(model)))
