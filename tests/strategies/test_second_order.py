"""Fisher weights and Hessian traces against plain loops on small networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import batches, grid_profile, images, kinds, profiled, seeded, small_profile
from torch import nn
from torch.nn import functional as F

import autocompress as ac
from autocompress.applying import realise_layers
from autocompress.errors import CalibrationError, MismatchError
from autocompress.strategies import STRATEGIES
from autocompress.strategies.fisher import Fisher, own_loss, squared_gradients
from autocompress.strategies.hawq import Hawq, average_traces, distance_from_itself
from autocompress.strategies.weighing import losses_of_changes


def small() -> tuple[nn.Module, list[torch.Tensor]]:
    return seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))), batches(4, size=6)


def task_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y)


def labelled(data: list[torch.Tensor]) -> list[Any]:
    return [[x, torch.arange(len(x)) % 3] for x in data]


def test_fisher_of_labels_is_the_mean_of_squared_gradients_of_single_samples() -> None:
    model, data = small()
    found = profiled(model, data, ["w4"])
    context = ac.Context(model, data, loss=task_loss, training=labelled(data))
    batch = [torch.cat([x for x, _ in labelled(data)]), torch.cat([y for _, y in labelled(data)])]
    weights = squared_gradients(context, found, batch, labelled=True)
    for name in ("0", "2"):
        expected = np.zeros(model.get_parameter(f"{name}.weight").shape)
        for x, y in zip(*batch, strict=True):
            model.zero_grad()
            F.cross_entropy(model(x[None]), y[None]).backward()
            gradient = model.get_parameter(f"{name}.weight").grad
            assert gradient is not None
            expected = expected + gradient.double().numpy() ** 2 / len(batch[0])
        np.testing.assert_allclose(weights[name], expected, rtol=1e-5)
    model.zero_grad()


def test_fisher_of_drawn_targets_is_the_diagonal_of_the_hessian_of_the_divergence() -> None:
    """In expectation: 4,000 draws of a few samples, against second derivatives of the KL at its minimum."""
    model, data = small()
    found = profiled(model, data, ["w4"])
    context = ac.Context(model, data)
    few = data[0][:2]
    drawn = squared_gradients(context, found, few.repeat(2000, 1), labelled=False)
    weight = model.get_parameter("2.weight")
    dense = F.softmax(model(few), -1).detach()

    def divergence(w: torch.Tensor) -> torch.Tensor:
        changed = torch.func.functional_call(model, {"2.weight": w}, (few,))
        return -(dense * F.log_softmax(changed, -1)).sum(-1).mean()

    hessian = torch.autograd.functional.hessian(divergence, weight.detach()).reshape(weight.numel(), -1)
    exact = hessian.diagonal().reshape(weight.shape).numpy()
    np.testing.assert_allclose(drawn["2"], exact, rtol=0.2, atol=0.05 * exact.max())
    assert np.abs(drawn["2"] / exact - 1.0).mean() < 0.06


def test_a_target_is_drawn_at_every_position() -> None:
    generator = torch.Generator().manual_seed(0)
    output = torch.zeros(1, 50, 4, requires_grad=True)
    loss = own_loss(output, -1, generator)
    (gradient,) = torch.autograd.grad(loss, output)
    drawn = (gradient[0] < 0).int()
    assert (drawn.sum(-1) == 1).all()
    assert (drawn.sum(0) > 4).all()
    assert float(loss.detach()) == pytest.approx(50 * np.log(4) / 50**0.5)
    single = own_loss(torch.full((1, 1), 2.0, requires_grad=True), None, generator)
    assert single.requires_grad


@pytest.mark.parametrize("with_labels", [True, False])
def test_traces_are_those_of_the_exact_hessian(with_labels: bool) -> None:
    model, data = small()
    found = profiled(model, data, ["w4"])
    context = ac.Context(model, data, loss=task_loss, training=labelled(data))
    batch: Any = labelled(data)[0] if with_labels else data[0]
    estimated = average_traces(context, found, [batch], with_labels, vectors=3000)
    dense = F.softmax(model(data[0]), -1).detach()

    def loss(w: torch.Tensor, key: str) -> torch.Tensor:
        output = torch.func.functional_call(model, {key: w}, (data[0],))
        if with_labels:
            return F.cross_entropy(output, batch[1])
        return -(dense * F.log_softmax(output, -1)).sum(-1).mean()

    for name in ("0", "2"):
        w = model.get_parameter(f"{name}.weight").detach()
        hessian = torch.autograd.functional.hessian(lambda w, k=f"{name}.weight": loss(w, k), w)
        exact = float(hessian.reshape(w.numel(), w.numel()).trace()) / w.numel()
        assert estimated[name] == pytest.approx(exact, rel=0.05)


def test_the_distance_from_itself_is_flat_and_curves_as_the_divergence() -> None:
    for shape in ((5, 4), (5, 1)):
        output = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
        (gradient,) = torch.autograd.grad(distance_from_itself(output, -1 if shape[-1] > 1 else None), output)
        assert float(gradient.abs().max()) < 1e-7


def test_changes_are_those_of_each_option_realised_alone() -> None:
    model, _, found = small_profile()
    squares = losses_of_changes(model, found, lambda _, change: float(np.sum(change**2)))
    for name, layer in found.layers.items():
        dense = model.get_parameter(layer.layer.key).detach().double().numpy()
        for row, value in zip(layer.rows, squares[name], strict=True):
            weight = realise_layers(model, found, {name: row.option})[name].weight()
            assert value == pytest.approx(float(np.sum((layer.layer.unmatrix(weight) - dense) ** 2)), rel=1e-12, abs=0)


def test_objectives_weigh_the_changes() -> None:
    model, data, found = small_profile()
    context = ac.Context(model, data)
    squares = losses_of_changes(model, found, lambda _, change: float(np.sum(change**2)))
    traces = Hawq().traces(found, context)
    assert min(traces.values()) > 0.0
    plan = Hawq()(found, ac.Budget(ratio=6.0), context)
    at = {n: [row.option for row in found.layers[n].rows].index(option) for n, option in plan.layers.items()}
    expected = sum(0.5 * traces[n] * squares[n][i] for n, i in at.items())
    assert plan.predicted_loss == pytest.approx(expected)
    losses = Fisher().losses(found, context)
    weight = squared_gradients(context, found, torch.cat(context.fit)[:128], labelled=False)
    option = found.layers["conv2"].rows[2].option
    change = realise_layers(model, found, {"conv2": option})["conv2"].weight().astype(np.float64)
    change = change - model.get_parameter("conv2.weight").detach().double().numpy()
    assert losses["conv2"][2] == pytest.approx(0.5 * float(np.sum(weight["conv2"] * change**2)), rel=1e-9)


def test_what_was_realised_is_kept_in_the_store(tmp_path: Path) -> None:
    model, data, _ = small_profile()
    found = profiled(model, data, store=tmp_path)
    for strategy in (Fisher(), Hawq(vectors=2)):
        before = set((tmp_path / "extra").glob("*")) if (tmp_path / "extra").exists() else set()
        first = strategy(found, ac.Budget(ratio=6.0), ac.Context(model, data))
        made = set((tmp_path / "extra").glob("*")) - before
        assert made
        stamps = {path: path.stat().st_mtime_ns for path in made}
        assert strategy(found, ac.Budget(ratio=6.0), ac.Context(model, data)) == first
        assert {path: path.stat().st_mtime_ns for path in made} == stamps
        # Labels make another objective, and another file.
        other = ac.Context(model, data, loss=convnet_loss, training=[[x, torch.arange(len(x)) % 5] for x in images()])
        strategy(found, ac.Budget(ratio=6.0), other)
        assert set((tmp_path / "extra").glob("*")) - before - made


def test_what_is_kept_of_one_structure_is_not_taken_for_another() -> None:
    """One context for all of them gives what a new one does: losses by row, and choices of rows."""
    model, data, found = grid_profile()
    narrow, wide = (found.at({"conv1": level, "conv3": level}) for level in (25.0, 75.0))
    shared = ac.Context(model, data, effort="fast")
    rule = Fisher(samples=8)
    kept = [rule.losses(profile, shared) for profile in (wide, narrow, found)]
    assert kept == [rule.losses(p, ac.Context(model, data, effort="fast")) for p in (wide, narrow, found)]
    assert [len(kept[2][n]) for n in found.layers] == [len(x.rows) for x in found.layers.values()]
    for name in ("loss", "kl"):
        for profile in (wide, narrow):
            own = ac.Context(model, data, effort="fast")
            plan, fresh = (STRATEGIES[name](profile, ac.Budget(size=430), context) for context in (shared, own))
            assert (plan.layers, plan.predicted_loss) == (fresh.layers, fresh.predicted_loss), name


def convnet_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def test_every_kind_of_layer_has_its_derivatives() -> None:
    """Attention, recurrence and tables too, and a layer that nothing calls, which weighs nothing."""
    model, data = kinds()
    found = profiled(model, data, ["w4"])
    context = ac.Context(model, data)
    weights = squared_gradients(context, found, data[0][:2], labelled=False)
    assert weights["spare"].max() == 0.0
    for name in found.layers:
        if name != "spare":
            assert weights[name].max() > 0.0, name
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(CalibrationError, match=r"'hawq' needs second derivatives, and this model has none.*'fisher'"):
        Hawq(vectors=1).traces(found, context)


def test_attention_is_differentiated_twice() -> None:
    model = seeded(lambda: nn.TransformerEncoderLayer(8, 2, 12, batch_first=True))
    data = batches(5, 8, size=4)
    found = profiled(model, data, ["w4"])
    traces = Hawq(vectors=20).traces(found, ac.Context(model, data))
    assert len(traces) == 4
    assert min(traces.values()) > 0.0


def test_a_context_is_asked_for() -> None:
    found = small_profile()[2]
    for strategy in ("fisher", "hawq"):
        with pytest.raises(MismatchError, match=f"strategy '{strategy}' needs gradients of the model: give a context"):
            ac.plan(found, "6x", strategy)
