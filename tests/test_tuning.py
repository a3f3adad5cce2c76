"""Tuning: outputs come nearer, codes and lengths stay, nothing else is touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import OPTIONS, batches, convnet, images, profiled, seeded
from test_sequential import Attention, chain
from torch import nn

import autocompress as ac
from autocompress.applying import encoded_of
from autocompress.errors import MismatchError
from autocompress.layers import model_digest
from autocompress.storage import file_size
from autocompress.tuning import tune


def applied(model: nn.Module, data: list[Any], budget: str, options: Any = OPTIONS) -> tuple[nn.Module, ac.Context]:
    profile = profiled(model, data, options)
    return ac.apply(model, ac.plan(profile, budget), profile, data), ac.Context(model, data)


def distance(model: nn.Module, small: nn.Module, context: ac.Context) -> float:
    """|z - z_d|² over the data that is tuned on, classes centred."""
    total = 0.0
    with torch.no_grad():
        for piece in context.pieces("fit"):
            a, b = (m(**piece) if isinstance(piece, dict) else m(piece) for m in (model, small))
            total += float(((a - b) - (a - b).mean(-1, keepdim=True)).square().sum())
    return total


CASES: dict[str, Callable[[], tuple[Any, list[Any], str]]] = {
    "batch norms": lambda: (convnet(), images(), "8x"),
    "no norms": lambda: (chain(), batches(16, size=40), "8x"),
    "layer norm": lambda: (seeded(Attention), [{"tokens": x} for x in batches(6, 8, size=20)], "2.5x"),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_come_nearer_while_codes_and_lengths_stay(case: str, tmp_path: Path) -> None:
    model, data, budget = CASES[case]()
    small, context = applied(model, data, budget)
    before, digests = encoded_of(small), (model_digest(model), model_digest(small))
    state = torch.get_rng_state()
    tuned = tune(model, small, context, 60)
    assert torch.equal(torch.get_rng_state(), state)
    assert (model_digest(model), model_digest(small)) == digests, "the models that were handed in are as they were"
    assert all(p.requires_grad for p in model.parameters())
    assert distance(model, tuned, context) < 0.98 * distance(model, small, context)
    after = encoded_of(tuned)
    assert after.plan == before.plan
    for old, new in zip(before.entries, after.entries, strict=True):
        assert (old.name, old.shape, old.codec, old.step, old.params) == (
            new.name,
            new.shape,
            new.codec,
            new.step,
            new.params,
        )
        assert old.bytes == new.bytes
        if "option" in old.params:
            np.testing.assert_array_equal(old.codes(), new.codes())
    assert file_size(after.entries) == file_size(before.entries) == before.plan.predicted_bytes
    # `save` refuses a model that computes with anything else than what its records hold.
    path = ac.save(tuned, after.plan, tmp_path / "model.acz").path
    loaded = ac.load(path, CASES[case]()[0])
    assert distance(tuned, loaded, context) == 0.0
    again = tune(model, small, context, 60)
    assert encoded_of(again).entries == after.entries
    assert encoded_of(tune(model, small, context, 60, seed=1)).entries != after.entries


def test_a_step_is_tuned_where_no_batch_norm_follows() -> None:
    model, data, _ = CASES["batch norms"]()
    small, context = applied(model, data, "4x", ("w4",))
    old, new = (
        {e.name: e for e in encoded_of(m).entries if e.step != "none"} for m in (small, tune(model, small, context, 20))
    )
    moved = {name for name in old if not np.array_equal(old[name].steps(), new[name].steps())}
    assert moved == {"linear.weight"}


def test_weights_of_several_modules_keep_their_steps() -> None:
    model, data, budget = CASES["layer norm"]()
    small, context = applied(model, data, budget, ("w4",))
    old, new = ({e.name: e for e in encoded_of(m).entries} for m in (small, tune(model, small, context, 20)))
    assert old["out.weight"] == new["out.weight"]
    assert old["q.weight"] != new["q.weight"]


def test_codes_on_a_trellis_keep_their_path_and_get_another_step(tmp_path: Path) -> None:
    model, data, _ = CASES["no norms"]()
    small, context = applied(model, data, "5x", ("tcq(0.5,0.3)", "tcq(0.7,0.3)", "tcq(1,0.3)"))
    tuned = tune(model, small, context, 20)
    before, after = ({e.name: e for e in encoded_of(m).entries} for m in (small, tuned))
    for name, old in before.items():
        if str(old.params.get("option")).startswith("tcq"):
            np.testing.assert_array_equal(old.codes(), after[name].codes())
            assert old.steps() != after[name].steps()
    assert any(str(e.params.get("option")).startswith("tcq") for e in before.values())
    path = ac.save(tuned, encoded_of(tuned).plan, tmp_path / "model.acz").path
    assert distance(tuned, ac.load(path, chain()), context) == 0.0


def test_activations_in_place_change_nothing() -> None:
    data, found = batches(16, size=40), []
    for model in (chain(), chain(inplace=True)):
        small, context = applied(model, data, "8x")
        found.append(encoded_of(tune(model, small, context, 10)).entries)
    assert found[0] == found[1]


def test_no_steps_change_nothing_and_a_dense_model_stays_what_it_is() -> None:
    model, data, _ = CASES["batch norms"]()
    small, context = applied(model, data, "8x")
    assert tune(model, small, context, 0) is small
    with pytest.raises(MismatchError, match="carries no encoded weights"):
        tune(model, model, context, 5)
    same, context = applied(model, data, "0.5x", ("dense",))
    tuned = tune(model, same, context, 20)
    with torch.no_grad():
        torch.testing.assert_close(tuned(data[0]), model(data[0]), atol=5e-3, rtol=5e-3)


def test_progress_counts_the_steps() -> None:
    model, data, _ = CASES["no norms"]()
    small, context = applied(model, data, "8x")
    told: list[tuple[int, int]] = []
    tune(model, small, context, 3, progress=lambda *call: told.append(call))
    assert told == [(1, 3), (2, 3), (3, 3)]
