"""The table of times: what is timed, what is kept, what is told apart. No figure of a clock is judged here."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import convnet, images, profiled, seeded
from torch import nn

import autocompress as ac
from autocompress import timing
from autocompress.errors import MismatchError
from autocompress.exporting import ExportError, Onnx, export
from autocompress.timing import Runtime, Timer, all_forms, form_name, forms_of, measured_ms, timed

QUICK = Runtime(turns=1, slice_ms=0.1)
OPTIONS = ("fp16", "w4", "w6", "rd(0.005,0.1)", "rd(0.5,0.3)", "rd(0.9,0.3)s60")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, list[Any], Any, Path]:
    """(model, data, profile with times, the cache's folder)"""
    folder = tmp_path_factory.mktemp("times")
    model, data = convnet(), images()
    return model, data, timed(profiled(model, data, OPTIONS), model, data[0], QUICK, folder), folder


def scripted(monkeypatch: pytest.MonkeyPatch, clock: Callable[[int], float] | None = None) -> list[int]:
    """Replace the clock by a script; the list gets the number of models of each call."""
    calls: list[int] = []

    def in_turns(runs: list[Callable[[], Any]], runtime: Runtime) -> tuple[float, ...]:
        calls.append(len(runs))
        if clock is None:
            raise AssertionError("nothing is timed")
        for run in runs:
            run()
        return tuple(clock(i) for i in range(len(runs)))

    monkeypatch.setattr(timing, "in_turns", in_turns)
    return calls


def test_every_option_of_every_layer_has_a_time(table: Any) -> None:
    _, _, profile, _ = table
    latency = profile.latency
    assert latency.dense_ms > 0
    assert set(latency.extra_ms) == set(profile.layers)
    for name, layer in profile.layers.items():
        assert set(latency.extra_ms[name]) == {row.option for row in layer.rows}
        assert latency.extra_ms[name][ac.Option()] == 0.0
    whole = {name: ac.Option.parse("w4") for name in profile.layers}
    assert latency.predicted(whole) == pytest.approx(
        latency.dense_ms + sum(latency.extra_ms[n][o] for n, o in whole.items())
    )
    assert {"processor", "threads", "onnxruntime", "onnx", "exporter"} <= set(latency.facts)
    assert "extra_ms" in profile.table


def test_a_form_is_what_the_exporter_writes(table: Any, tmp_path: Path) -> None:
    model, data, profile, _ = table
    timer = Timer(model, data[0], QUICK)
    forms = forms_of(timer, profile)
    for first in (0, 3):  # each option in some layer
        mixed = dict(zip(profile.layers, map(ac.Option.parse, [*OPTIONS, *OPTIONS][first:]), strict=False))
        small = ac.apply(model, ac.plan(profile, 10**6, _Given(mixed)), profile)
        info = export(small, None, "onnx", tmp_path / "model.onnx", example=data[0])
        assert {n: forms[n][mixed[n]][0].partition(",")[0] for n in mixed} == {n: kind for n, _, kind in info.layers}
    steps = {str(o): form for o, (form, _) in forms["conv1"].items()}
    assert steps["w4"] == "int4 QDQ, a step per row"
    assert steps["w6"] == "int8 QDQ, a step per row"
    assert steps["rd(0.5,0.3)"].endswith("QDQ, one step")
    assert (steps["dense"], steps["fp16"], steps["rd(0.005,0.1)"]) == ("float32", "float16", "float32")


class _Given:
    """A strategy that was told the answer."""

    def __init__(self, options: dict[str, ac.Option]) -> None:
        self.options = options

    def __call__(self, profile: Any, budget: Any, context: Any) -> ac.Plan:
        from autocompress.planning import Allocation, make_plan

        rows = {name: layer.row(self.options[name]) for name, layer in profile.layers.items()}
        return make_plan(profile, budget, Allocation(rows, 0, 0, 0, profile.template.file_bytes(rows), 0), "given")


def test_matmul_nbits_is_a_form_of_its_own() -> None:
    timer = Timer(convnet(), images()[0], Runtime(Onnx(matmul_nbits=True), turns=1, slice_ms=0.1))
    assert [form_name(timer.held("linear", 4, step)) for step in ("row", "tensor")] == ["MatMulNBits 4"] * 2
    assert form_name(timer.held("linear", 8, "group", 4)) == "int8 QDQ, steps by 4"
    assert form_name(timer.held("conv1", 3, "row")) == "int4 QDQ, a step per row"


def test_times_are_kept_and_found_again(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data, profile, folder = table
    calls = scripted(monkeypatch)
    again = timed(replace(profile, latency=None), model, data[0], QUICK, folder)
    assert again.latency == profile.latency
    # Other weights of the same architecture take the same time: nothing is measured for them either.
    other = convnet(seed=5)
    found = timed(profiled(other, data, ("w4",)), other, data[0], QUICK, folder)
    assert found.latency is not None
    assert found.latency.dense_ms == profile.latency.dense_ms
    assert found.latency.extra_ms["conv2"][ac.Option(bits=4)] == profile.latency.extra_ms["conv2"][ac.Option(bits=4)]
    assert calls == []


@pytest.mark.parametrize("what", ["form", "exporter", "example", "damage", "another key"])
def test_what_is_not_in_the_cache_is_timed(
    table: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str
) -> None:
    model, data, profile, folder = table
    kept = next(iter(folder.glob("*.json")))
    text = kept.read_text()
    assert len(list(folder.iterdir())) == 1
    runtime, example = QUICK, data[0]
    if what == "form":
        body = json.loads(text)
        text = json.dumps({**body, "cells": [c for c in body["cells"] if not c[1].startswith("int8")]})
    elif what == "exporter":
        runtime = Runtime(Onnx(weights="int8"), turns=1, slice_ms=0.1)
    elif what == "example":
        example = torch.zeros(1, 3, 8, 8)
    else:
        text = text[:-9] if what == "damage" else text.replace('"key": "', '"key": "0')
    (tmp_path / kept.name).write_text(text)
    calls = scripted(monkeypatch, lambda i: 1.0 + i)
    found = timed(replace(profile, latency=None), model, example, runtime, tmp_path)
    assert found.latency is not None
    kept_cells = [cell for cell in found.latency.cells if what == "form" and not cell.form.startswith("int8")]
    assert calls.count(2) == len(found.latency.cells) - len(kept_cells) >= 4
    if what == "form":
        assert (
            found.latency.extra_ms["conv1"][ac.Option(bits=4)] == profile.latency.extra_ms["conv1"][ac.Option(bits=4)]
        )


def test_a_form_adds_its_share_of_the_difference(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Twice the dense model's time with three layers in a form: each adds a third of it."""
    model = seeded(lambda: nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(6, 6), nn.ReLU())), nn.Linear(6, 2)))
    timer = Timer(model, torch.zeros(4, 6), QUICK)
    assert timer.macs == {"0": 36, "2": 36, "4": 36, "6": 12}, "one sample of the batch"
    calls = scripted(monkeypatch, lambda i: (3.0, 6.0)[i])
    seen: list[tuple[int, int]] = []
    dense_ms, cells = timer.table(all_forms(timer), tmp_path, lambda *at: seen.append(at))
    assert dense_ms == 3.0
    assert {cell.layers for cell in cells} == {("0", "2", "4"), ("6",)}
    assert {(len(c.layers), round(c.extra_ms, 12)) for c in cells} == {(3, 1.0), (1, 3.0)}
    assert seen == [(i, len(cells)) for i in range(len(cells))]
    assert calls == [1] + [2] * len(cells)
    assert (timer.sites["0"], timer.sites["6"]) == ("Linear 6x6, of (1, 6)", "Linear 2x6, of (1, 6)")


def test_a_layer_that_the_example_never_reaches_takes_no_time(tmp_path: Path) -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    timer = Timer(seeded(Idle), torch.zeros(4, 6), QUICK)
    assert timer.sites["idle"] == ""
    assert {cell.layers for cell in timer.table(all_forms(timer), tmp_path)[1]} == {("used",)}


def test_labels_are_not_fed() -> None:
    model, data = convnet(), images()
    timer = Timer(model, [data[0], torch.zeros(12)], QUICK)
    assert timer.sites["linear"] == "Linear 5x8, of (1, 8)"
    assert [given.shape for given in timer.feeds] == [(1, 3, 6, 6)]


def test_a_result_is_run_as_it_is_exported(table: Any) -> None:
    model, data, profile, _ = table
    small = ac.apply(model, ac.plan(profile, "600"), profile, data)
    assert measured_ms(small, data[0], QUICK) > 0


def test_another_model_is_refused(table: Any) -> None:
    _, data, profile, folder = table
    with pytest.raises(MismatchError, match="field 'model'"):
        timed(profile, convnet(seed=9), data[0], QUICK, folder)


@pytest.mark.parametrize("name", ["onnx", "onnxruntime", "onnxscript"])
def test_without_the_runtime_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ExportError, match=r"measured in onnxruntime, which needs .*pip install 'autocompress\[onnx\]'"):
        ac.compress(convnet(), images(), "4x,latency_ms=3")
