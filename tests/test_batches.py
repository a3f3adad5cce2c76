"""How batches are fed, split, joined and told apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from autocompress.batches import (
    batch_digest,
    batch_samples,
    describe_batch,
    evaluating,
    feed,
    join_batches,
    materialise,
    sample_digests,
    split_batches,
)
from autocompress.errors import CalibrationError


class Model(nn.Module):
    """Base of models that differ in the signature of forward only; the first input decides the output."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)


class One(Model):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class Two(Model):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.linear(x + y)


class Maybe(Model):
    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.linear(x if mask is None else x * mask)


class AllMaybe(Model):
    def forward(self, x: torch.Tensor | None = None, mask: torch.Tensor | None = None) -> torch.Tensor:
        assert x is not None
        return self.linear(x)


class Keyword(Model):
    def forward(self, x: torch.Tensor, *, flag: bool = False) -> torch.Tensor:
        return self.linear(-x if flag else x)


X = torch.arange(12.0).reshape(4, 3)
LABELS = torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize("batch", [X, (X,), [X], (X, LABELS), [X, LABELS], {"x": X}], ids=describe_batch)
def test_one_input_comes_in_many_ways(batch: Any) -> None:
    for model in (One(), Keyword()):
        assert torch.equal(feed(model, batch), model(X))


def test_a_model_of_two_inputs_gets_both() -> None:
    model = Two()
    assert torch.equal(feed(model, (X, X)), model(X, X))
    assert torch.equal(feed(model, {"y": X, "x": X}), model(X, X))


def test_sequential_takes_a_pair_as_input_and_labels() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    assert torch.equal(feed(model, [X, LABELS]), model(X))


@pytest.mark.parametrize("model", [Maybe(), AllMaybe()], ids=lambda m: type(m).__name__)
def test_a_pair_that_may_be_either_is_refused_with_the_way_to_say_it(model: nn.Module) -> None:
    with pytest.raises(
        CalibrationError, match=r"is the second item an input or the labels\? Yield the inputs alone, or a"
    ):
        feed(model, [X, LABELS])
    assert torch.equal(feed(model, X), model(X))
    assert torch.equal(feed(model, {"x": X, "mask": torch.ones(4, 3)}), model(X))


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ((X, X, X), "a batch has 3 items, One.forward takes 1 to 1"),
        (torch.zeros(4, 5), r"cannot take a batch of float32 \(4, 5\): mat1 and mat2"),
        ({"y": X}, r"cannot take a batch of \{y: float32 \(4, 3\)\}: .*unexpected keyword argument 'y'"),
        (LABELS, r"cannot take a batch of int64 \(4,\)"),
    ],
)
def test_what_a_model_refuses_is_described(batch: Any, words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        feed(One(), batch)


def test_materialise_refuses_what_are_no_batches() -> None:
    for given_batches, words in [
        ([], "yields no batches"),
        (3, "batches are a int; needed an iterable"),
        ([X, "text"], "batch 1 is str; needed a tensor"),
        ([torch.zeros(0, 3)], r"batch 0 is empty: float32 \(0, 3\)"),
    ]:
        with pytest.raises(CalibrationError, match=words):
            materialise(given_batches)
    assert len(materialise(X)) == 1
    assert len(materialise({"x": X})) == 1
    assert len(materialise(iter([X, X]))) == 2


def _rows(batches: list[Any]) -> list[float]:
    """The samples of batches of distinct numbers, in order."""
    return [float(v) for b in batches for v in (b if isinstance(b, torch.Tensor) else b["x"]).flatten()]


@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=9),
    holdout=st.sampled_from([0.01, 0.2, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 3),
    keyed=st.booleans(),
)
def test_a_split_is_disjoint_covers_repeats_and_leaves_both_sides_some(
    sizes: list[int], holdout: float, seed: int, keyed: bool
) -> None:
    numbers = torch.arange(float(sum(sizes)))[:, None]
    batches: list[Any] = list(numbers.split(sizes))
    if keyed:
        batches = [{"x": b, "shared": torch.ones(9, 2)} for b in batches]
    fit, held = split_batches(batches, holdout, seed)
    assert sorted(_rows(fit) + _rows(held)) == _rows(batches)
    assert _rows(fit)
    assert bool(_rows(held)) == (sum(sizes) > 1)
    again = split_batches(batches, holdout, seed)
    assert (_rows(again[0]), _rows(again[1])) == (_rows(fit), _rows(held))
    if keyed:
        assert all(b["shared"].shape == (9, 2) for b in fit + held)


def test_the_seed_picks_the_batches_that_are_held_out() -> None:
    batches = list(torch.arange(20.0)[:, None].split(1))
    assert len({tuple(_rows(split_batches(batches, seed=s)[1])) for s in range(6)}) > 1


def test_joining_takes_the_first_samples_in_order() -> None:
    batches = list(torch.arange(10.0)[:, None].split([4, 4, 2]))
    assert _rows([join_batches(batches, 6)]) == [0, 1, 2, 3, 4, 5]
    assert _rows([join_batches(batches, 100)]) == [float(i) for i in range(10)]
    first, second = join_batches([(b, -b) for b in batches], 5)
    assert torch.equal(first, -second)
    assert len(first) == 5


def test_joining_keeps_what_belongs_to_the_whole_batch() -> None:
    """Position tables and masks without a row per sample are not stacked."""
    positions = torch.arange(3)
    joined = join_batches([{"x": X, "positions": positions, "scale": torch.tensor(2.0)}] * 2, 100)
    assert joined["x"].shape == (8, 3)
    assert torch.equal(joined["positions"], positions)
    assert joined["scale"].ndim == 0


def test_joining_what_does_not_fit_together_takes_the_largest_batch() -> None:
    joined = join_batches([torch.zeros(2, 3), torch.ones(4, 5), torch.zeros(3, 3)], 100)
    assert torch.equal(joined, torch.ones(4, 5))
    other = join_batches([{"x": X, "p": torch.arange(3)}, {"x": X[:3], "p": torch.arange(1, 4)}], 100)
    assert batch_samples(other) == 4


def test_digests_depend_on_keys_types_shapes_and_values() -> None:
    batches = [
        X,
        X.double(),
        X.reshape(3, 4),
        X + 1,
        (X,),
        (X, X),
        {"x": X},
        {"y": X},
        torch.tensor(1.0),
        {"x": X, "n": 3},
    ]
    assert len({batch_digest(b) for b in batches}) == len(batches)
    assert batch_digest(X.t().contiguous().t()) == batch_digest(X)
    assert batch_digest(torch.zeros(0, 3)) != batch_digest(torch.zeros(3, 0))


def test_sample_digests_do_not_depend_on_the_batches() -> None:
    whole = sample_digests(X)
    assert len(set(whole)) == 4
    assert [d for part in X.split([1, 3]) for d in sample_digests(part)] == whole
    assert sample_digests([X, LABELS]) == sample_digests({"x": X, "mask": torch.ones(9)}) == whole


def test_every_module_gets_its_own_mode_back() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 2)).train()
    model[0].eval()
    with pytest.raises(CalibrationError), evaluating(model):
        feed(model, torch.zeros(2, 5))
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == [True, False, True, True]
