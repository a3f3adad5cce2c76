"""Narrower layers beside all other options in one solve: against every structure by itself, and through the file."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
from test_narrowing import digits_profile

import autocompress as ac
from autocompress.coupling import is_coupled, vector_bytes
from autocompress.errors import InfeasibleError
from autocompress.measuring import Context
from autocompress.planning import allocate, dense_cost, energy_losses, limits_of, running_cost
from autocompress.records import Template
from autocompress.strategies.auto import Auto
from autocompress.types import Budget


def test_a_profile_is_coupled_where_widths_are_open() -> None:
    _, _, found = digits_profile()
    assert not is_coupled(found)
    assert is_coupled(found.joint())
    assert not is_coupled(found.joint().whole())
    assert not is_coupled(found.joint().at(dict.fromkeys(found.levels(), 50.0)))
    assert found.joint().whole().layers.keys() == found.layers.keys()
    assert found.joint().fingerprint == found.fingerprint


def test_every_structure_has_a_key_of_its_own_and_whole_undoes_joint() -> None:
    _, _, found = digits_profile()
    made = [found, found.joint(), *(found.at({group: 50.0}) for group in found.levels())]
    assert len({part.fingerprint for part in made}) == 1
    assert len({part.key for part in made}) == len(made)
    assert found.joint().whole().layers == found.layers
    assert found.joint().whole().key == found.with_vectors(7).key == found.key


def test_vectors_of_a_group_are_counted_once() -> None:
    _, _, found = digits_profile()
    groups = found.levels()
    saved = {group: vector_bytes(found, group, 50.0) for group in groups}
    assert all(value < 0 for value in saved.values())
    narrower = found.template.narrowed(dict.fromkeys(groups, 50.0))
    weights = set(found.template.keys.values())

    def total(template: Template) -> int:
        return sum(entry.bytes for entry in template.entries if entry.name not in weights)

    assert sum(saved.values()) == total(narrower) - total(found.template)
    assert vector_bytes(found, "conv1", 100.0) == 0


@pytest.mark.parametrize("budget", ["9000", "12000, macs=70%", "9000, macs=50%"])
def test_no_structure_by_itself_is_better(budget: str) -> None:
    _, _, found = digits_profile()
    joint = found.joint()
    limits = limits_of(Budget.parse(budget), found)
    answer = allocate(joint, limits, energy_losses(joint))
    alone = []
    for levels in itertools.product((100.0, 50.0), repeat=len(found.levels())):
        part = found.at(dict(zip(found.levels(), levels, strict=True)))
        try:
            alone.append(allocate(part, limits, energy_losses(part), "milp").loss)
        except InfeasibleError:
            continue
    assert answer.loss <= min(alone) * (1 + 2e-4)
    assert answer.bound <= min(alone) * (1 + 1e-9)
    assert answer.gap <= 2e-4
    assert answer.file_bytes <= limits.bytes
    assert answer.file_bytes == found.template.file_bytes(answer.rows)


def test_a_joint_plan_goes_through_the_file_and_back(tmp_path: Path) -> None:
    model, data, found = digits_profile()
    budget = Budget.parse("9000, macs=50%")
    plan = ac.plan(found, budget, "exact", Context(model, data))
    assert plan.strategy == "exact(coupled)"
    assert any(option.width is not None for option in plan.layers.values())
    assert running_cost(found, "macs", plan.layers) <= 0.5 * dense_cost(found, "macs")
    small = ac.apply(model, plan, found, data)
    info = ac.save(small, plan, tmp_path / "model.acz")
    assert info.bytes == plan.predicted_bytes <= 9000
    restored = ac.load(tmp_path / "model.acz", copy.deepcopy(model))
    assert sum(p.numel() for p in restored.parameters()) < sum(p.numel() for p in model.parameters())
    assert (restored(data[0]) == small(data[0])).all()


def test_auto_takes_part_in_widths() -> None:
    model, data, found = digits_profile()
    plan = ac.plan(found, "9000, macs=50%", "auto", Context(model, data, effort="fast"))
    assert plan.strategy.startswith("auto(")
    assert found.widths is not None
    assert 50.0 in found.widths.structure_of(plan.layers).values()
    assert plan.bound <= plan.predicted_loss


def test_auto_measures_plans_that_leave_channels_alone_too() -> None:
    model, data, found = digits_profile()
    plan = ac.plan(found, "12000", "auto", Context(model, data, effort="fast"))
    names = [note.split(":")[0] for note in plan.notes]
    assert {"energy", "energy, whole", "kl", "kl, whole"} <= set(names)
    measured = [note for note in plan.notes if " merit " in note]
    best = min(measured, key=lambda note: float(note.rsplit("merit ", 1)[-1].split(":")[0]))
    assert f"auto({best.split(':')[0]}" in plan.strategy or "search" in best
    assert plan.bound <= plan.predicted_loss


def test_the_search_of_auto_keeps_the_widths_and_the_bound_of_the_plan_it_begins_with() -> None:
    model, data, found = digits_profile()
    assert found.widths is not None
    budget, half = Budget.parse("6000"), dict.fromkeys(found.levels(), 50.0)
    begin = ac.plan(found.at(half), budget, "raw").replace(bound=0.001)
    joint = found.joint()
    context = Context(model, data, effort="fast")
    rival = Auto()._nearby(joint, budget, context, begin, energy_losses(joint))
    assert rival is not None
    assert found.widths.structure_of(rival.plan.layers) == half
    assert rival.plan.bound == 0.001
    assert rival.plan.gap == pytest.approx((rival.plan.predicted_loss - 0.001) / 0.001)


def test_what_no_width_can_meet_is_refused_with_what_would_do() -> None:
    _, _, found = digits_profile()
    with pytest.raises(InfeasibleError, match=r"narrower layers included: .* MACs would do") as refusal:
        ac.plan(found, "9000, macs=5%", "exact")
    text = str(refusal.value)
    least = int(text.split(" would do")[0].split()[-2].replace(",", ""))
    ac.plan(found, f"12000, macs={least}", "exact")
    with pytest.raises(InfeasibleError):
        ac.plan(found, f"12000, macs={least - 1}", "exact")
