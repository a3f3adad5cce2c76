"""The page: whole, self-contained, escaped, and of the same numbers as the files beside it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from pages import nasty_result, parsed

import autocompress as ac
from autocompress.reporting import byte_groups, file_parts, layer_rows, render_report
from autocompress.reporting.svg import nice_steps
from autocompress.storage import read


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> ac.Result:
    return nasty_result(tmp_path_factory.mktemp("page"))


def test_the_page_is_whole_and_self_contained(result: ac.Result) -> None:
    page = (result.out / "report.html").read_text()
    reader = parsed(page)
    assert "script" not in reader.tags
    assert not {"img", "link", "iframe", "object"} & set(reader.tags)
    assert len(reader.links) > len(result.plan.layers), "names of layers lead to their curves"
    assert all(link.startswith("#") and link[1:] in reader.ids for link in reader.links)
    assert "http" not in page
    assert "@import" not in page
    assert "url(" not in page
    assert "prefers-color-scheme: dark" in page
    assert len(reader.ids) == len(set(reader.ids))


def test_names_are_text(result: ac.Result) -> None:
    page = (result.out / "report.html").read_text()
    assert "<script" not in page
    name = result.metrics["asked"]["task"]
    assert name in result.plan.layers
    assert any(name in words for words in parsed(page).words)


def test_the_page_holds_the_numbers_of_the_files(result: ac.Result) -> None:
    words = " ".join(parsed((result.out / "report.html").read_text()).words)
    plan, metrics = result.plan, result.metrics
    for value in (
        f"{metrics['bytes']:,}",
        f"{metrics['budget_bytes']:,}",
        f"{plan.measured['kl']:.3g}",
        "no choice depends",
    ):
        assert value in words
    assert "auto(energy)" in words, "what auto tried is a table, whatever it writes in its notes"
    assert "on the held-out slice, " in words
    assert " on all calibration data, " not in words
    for row in layer_rows(plan, result.profile):
        assert row.option in words
        assert f"{row.bytes:,}" in words
    assert "spare: calibration never reached it" in words
    assert result.profile.fingerprint in words


def test_what_sequential_mode_made_stands_beside_what_the_proof_is_about(result: ac.Result) -> None:
    head = result.profile.layers["head"]
    made = {"head": {"bytes": 4321, "error": 0.5 * head.energy, "width": 4, "nonzero": 5}}
    for realised in ({}, made):
        plan = result.plan.replace(realised=realised)
        words = " ".join(parsed(render_report(plan, result.profile, result.metrics, result.info.path)).words)
        assert ("Every layer was then compressed anew" in words) == bool(realised)
        if realised:
            assert next(row for row in layer_rows(plan, result.profile) if row.name == "head").error == 0.5
            assert "4,321" in words
    plain = result.plan.replace(realised={})
    asked = {**result.metrics["asked"], "sequential": False}
    words = " ".join(
        parsed(render_report(plain, result.profile, {**result.metrics, "asked": asked}, result.info.path)).words
    )
    assert "--no-sequential" in words


def test_rows_add_up(result: ac.Result) -> None:
    rows = layer_rows(result.plan, result.profile)
    assert sum(row.bytes for row in rows) + result.plan.fixed_bytes == result.metrics["bytes"]
    assert math.isclose(sum(row.share for row in rows), 1.0)
    with read(result.info.path) as archive:
        parts, size = file_parts(archive), archive.bytes
    assert sum(part.bytes for part in parts) == size == result.metrics["bytes"]
    groups = byte_groups(parts)
    assert list(groups) == ["weights", "biases", "header", "checksums"]
    assert sum(part.bytes for group in groups.values() for part in group) == result.info.path.stat().st_size
    assert sum(part.bytes for part in groups["weights"]) == sum(row.bytes for row in rows)


def test_the_page_shows_every_plan_that_was_measured(result: ac.Result) -> None:
    tried = result.metrics["measured_plans"]
    assert len(tried) > 4
    page = (result.out / "report.html").read_text().replace("<wbr>", "")
    words = parsed(page).words
    for found in tried:
        assert found["name"] in words
        assert f"{found['kl']:.3g}" in words
        assert found["bytes"] <= result.metrics["budget_bytes"]
    singles = [found["kl"] for found in tried if found["name"].startswith("single ")]
    assert min(singles) == result.plan.measured["single_option_kl"]
    alone = result.metrics["measured_layers"]
    assert set(alone) == set(result.plan.layers)
    assert all(error > 0.0 <= kl for points in alone.values() for error, kl in points)


def test_what_is_not_proven_or_not_measured_says_so(result: ac.Result) -> None:
    plan = result.plan.replace(bound=-math.inf, gap=math.inf, measured={}, notes=("a <b>note</b>",))
    metrics = {**result.metrics, "metric": None, "baseline_metric": None, "asked": {}, "environment": {}}
    words = " ".join(parsed(render_report(plan, result.profile, metrics, result.info.path)).words)
    for text in (
        "no guarantee",
        "There is no guarantee",
        "Nothing was measured",
        "defines no evaluate()",
        "From Python",
    ):
        assert text in words
    noted = result.plan.replace(notes=("a <b>note</b>",))
    assert "a &lt;b&gt;note" in render_report(noted, result.profile, metrics, result.info.path)


def test_a_page_of_a_damaged_file_is_refused(result: ac.Result, tmp_path: Path) -> None:
    damaged = tmp_path / "model.acz"
    damaged.write_bytes(result.info.path.read_bytes()[:-1])
    with pytest.raises(ac.FormatError, match="announced"):
        render_report(result.plan, result.profile, result.metrics, damaged)


@pytest.mark.parametrize("top", [0.02, 0.5, 1.0, 3.3, 10.6, 32.0, 100.0])
def test_steps_of_an_axis(top: float) -> None:
    steps = nice_steps(top)
    assert steps[0] == 0
    assert 3 <= len(steps) <= 8
    assert steps[-1] <= top * (1 + 1e-9)
