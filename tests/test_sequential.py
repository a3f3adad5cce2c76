"""Sequential mode: the refit against its formula, bytes that never grow beyond the plan's, and what is handed on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import OPTIONS, ConvNet, batches, convnet, images, kinds, profiled, seeded, small_profile
from torch import nn
from torch.nn import functional as F

import autocompress as ac
from autocompress import sequential
from autocompress.applying import encoded_of
from autocompress.errors import CalibrationError, MismatchError
from autocompress.layers import find_layers, model_digest
from autocompress.sequential import apply_sequentially, neighbours
from autocompress.storage import file_size
from autocompress.tuning import tune


class Chain(nn.Module):
    """Linear layers, one after another: errors add up, and the later ones can make good for the earlier."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.act = nn.LeakyReLU(0.3, inplace=inplace)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = self.act(layer(x))
        return x


def chain(inplace: bool = False) -> nn.Module:
    return seeded(lambda: Chain(inplace))


def rows(model: nn.Module, layer: Any, data: torch.Tensor) -> torch.Tensor:
    """The unfolded inputs of a layer, float64 (groups, d, positions)."""
    seen: list[torch.Tensor] = []
    module: Any = model.get_submodule(layer.name)
    handle = module.register_forward_hook(lambda m, args, out: seen.append(args[0].double()))
    with torch.no_grad():
        model(data)
    handle.remove()
    (x,) = seen
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1]).t()[None]
    columns = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
    n, _, positions = columns.shape
    return columns.reshape(n, module.groups, -1, positions).permute(1, 2, 0, 3).flatten(2)


def expected(model: nn.Module, small: nn.Module, layer: Any, data: torch.Tensor, damping: float) -> tuple[Any, Any]:
    """W' = (Y X̂ᵀ + δ W) (X̂ X̂ᵀ + δ)⁻¹ and H, from whole matrices in float64."""
    dense: Any = model.get_submodule(layer.name)
    weight, X, X_hat = layer.matrix(dense.weight), rows(model, layer, data).numpy(), rows(small, layer, data).numpy()
    refits, hessians = [], []
    for w, x, x_hat in zip(weight, X, X_hat, strict=True):
        gram = 2.0 / len(data) * x_hat @ x_hat.T
        level = damping * np.diag(gram).mean() * np.eye(len(gram))
        hessians.append(gram + level)
        target = 2.0 / len(data) * (w @ x) @ x_hat.T + w @ level
        refits.append(np.linalg.solve(gram + level, target.T).T)
    return np.stack(refits), np.stack(hessians)


@pytest.mark.parametrize("name", ["conv1", "conv2", "conv3", "linear"])
def test_the_refit_is_the_ridge_solution_for_the_dense_outputs(name: str) -> None:
    model, small, data = convnet(), convnet(), torch.cat(images())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # stands for a compressed model: the inputs of every layer but the first are others
        for parameter in small.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    layer = find_layers(model)[name]
    (step,) = sequential._steps(model, [layer], data)
    pieces = list(data.split(25))
    targets = sequential._Targets(model, [step], pieces).take(0)
    (problem,) = sequential._problems(model, small, step, pieces, targets, 0.01)
    weight, hessian = expected(model, small, layer, data, 0.01)
    np.testing.assert_allclose(problem.shared_hessian(), hessian, rtol=1e-5, atol=1e-6 * np.abs(hessian).max())
    np.testing.assert_allclose(problem.weight, weight, atol=2e-5 * np.abs(weight).max())
    moved = np.abs(problem.weight - layer.matrix(model.get_submodule(name).weight)).max()  # type: ignore[arg-type]
    assert (moved > 1e-3) == (name != "conv1"), "the first layer sees the dense inputs, and stays"


@pytest.mark.parametrize("budget", ["5x", "7x"])
def test_the_file_is_what_the_plan_says_and_within_the_budget(budget: str, tmp_path: Path) -> None:
    model, data, profile = small_profile()
    digest = model_digest(model)
    plan = ac.plan(profile, budget)
    small = apply_sequentially(model, plan, profile, data)
    assert model_digest(model) == digest
    made = encoded_of(small).plan
    entries = {e.name.rpartition(".")[0]: e for e in encoded_of(small).entries if "option" in e.params}
    assert {n: e.params["option"] for n, e in entries.items()} == {n: str(o) for n, o in made.layers.items()}
    assert {n: e.bytes for n, e in entries.items()} == {n: r["bytes"] for n, r in made.realised.items()}
    assert made.predicted_bytes == file_size(encoded_of(small).entries) <= plan.budget_bytes
    assert made.fixed_bytes + sum(r["bytes"] for r in made.realised.values()) == made.predicted_bytes
    assert ac.save(small, made, tmp_path / "model.acz").bytes == made.predicted_bytes
    assert (made.predicted_loss, made.bound, made.strategy) == (plan.predicted_loss, plan.bound, plan.strategy)
    assert ac.Plan.from_json(made.to_json()) == made
    again = apply_sequentially(model, plan, profile, data)
    assert encoded_of(again).entries == encoded_of(small).entries


def test_no_bytes_are_taken_where_the_plan_leaves_none() -> None:
    model, data, profile = small_profile()
    plan = ac.plan(profile, "6x")
    tight = plan.replace(budget_bytes=plan.predicted_bytes)
    made = encoded_of(apply_sequentially(model, tight, profile, data)).plan
    assert made.predicted_bytes <= plan.predicted_bytes
    spent = 0
    for name in profile.layers:  # in forward order, and what a layer saves is for those after it only
        spent += int(made.realised[name]["bytes"]) - profile.layers[name].row(plan.layers[name]).bytes
        assert spent <= 0


def test_where_nothing_near_fits_the_planned_weight_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data, profile = small_profile()
    monkeypatch.setattr(sequential, "_candidates", lambda problem, option: [])
    plan = ac.plan(profile, "6x")
    made = apply_sequentially(model, plan, profile, data)
    assert encoded_of(made).entries == encoded_of(ac.apply(model, plan, profile, data)).entries


def test_later_layers_make_good_for_earlier_ones() -> None:
    model, data = chain(), batches(16, count=6, size=64)
    profile = profiled(model, data, ("rd(0.7,0.3)", "rd(1,0.3)", "rd(1.4,0.3)", "rd(2,0.3)s60"))
    plan = ac.plan(profile, "9x")
    with torch.no_grad():
        wanted = model(torch.cat(data))
        alone, together = (
            float((f(model, plan, profile, data)(torch.cat(data)) - wanted).square().mean())
            for f in (ac.apply, apply_sequentially)
        )
    assert together < 0.9 * alone


class Fork(nn.Module):
    """Two layers on one tensor; what the first gives is written over before the second runs."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.first, self.left, self.right = (nn.Linear(16, 16) for _ in range(3))
        self.act = nn.ReLU(inplace=inplace)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.first(x))
        return self.act(self.left(x)) + self.right(x)


def test_activations_in_place_change_nothing() -> None:
    data = batches(16, count=5, size=20)
    found = []
    for inplace in (False, True):
        model = seeded(lambda inplace=inplace: Fork(inplace))
        profile = profiled(model, data, OPTIONS)
        found.append(encoded_of(apply_sequentially(model, ac.plan(profile, "6x"), profile, data)).entries)
    assert found[0] == found[1]


def test_statistics_are_corrected_before_the_next_layer_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data, profile = small_profile()
    seen: list[dict[str, torch.Tensor]] = []
    problems = sequential._problems

    def spy(model: nn.Module, small: nn.Module, *rest: Any) -> Any:
        seen.append({name: value.clone() for name, value in small.state_dict().items()})
        return problems(model, small, *rest)

    monkeypatch.setattr(sequential, "_problems", spy)
    final = apply_sequentially(model, ac.plan(profile, "7x"), profile, data).state_dict()
    norms = ("bn1", "bn2", "bn3")  # of the convolutions 1 to 3; the linear layer comes last
    for number, state in enumerate(seen):
        same = [torch.equal(state[f"{name}.weight"], final[f"{name}.weight"]) for name in norms]
        assert same == [i < number for i in range(3)]


class Attention(nn.Module):
    """Three layers on one tensor, one weight that runs twice, one layer that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.out, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)
        self.again = nn.Linear(8, 8)
        self.again.weight = self.out.weight
        self.norm = nn.LayerNorm(8)

    def forward(self, *, tokens: torch.Tensor) -> torch.Tensor:
        x = self.norm(tokens)
        scores = torch.softmax(self.q(x) @ self.k(x).transpose(1, 2), -1)
        return self.again(torch.tanh(self.out(input=scores @ self.v(x))))[:, 0]


def test_layers_on_one_tensor_are_one_step_and_shared_weights_one_layer() -> None:
    model = seeded(Attention)
    data = [{"tokens": x} for x in batches(6, 8, size=12)]
    profile = profiled(model, data, OPTIONS)
    reached = [x.layer for x in profile.layers.values() if x.reached]
    steps = sequential._steps(model, reached, data[0])
    assert [([x.name for x in step.layers], step.calls) for step in steps] == [(["q", "k", "v"], 3), (["out"], 2)]
    plan = ac.plan(profile, "2.5x")
    small: Any = apply_sequentially(model, plan, profile, data)
    assert small.again.weight is small.out.weight
    applied: Any = ac.apply(model, plan, profile, data)
    assert torch.equal(small.unused.weight, applied.unused.weight)
    assert encoded_of(small).plan.layers["unused"] == plan.layers["unused"]


def test_a_model_in_half_precision() -> None:
    model, data = chain().bfloat16(), [x.bfloat16() for x in batches(16, count=6, size=64)]
    profile = profiled(model, data, ("rd(0.7,0.3)", "rd(1,0.3)", "rd(1.4,0.3)", "rd(2,0.3)s60"))
    plan, context = ac.plan(profile, "9x"), ac.Context(model, data)
    small = apply_sequentially(model, plan, profile, data)
    assert context.divergence_of(small) < context.divergence_of(ac.apply(model, plan, profile, data))
    # Nothing in it is stored so that it could be tuned finely, and it is handed back as it is.
    assert tune(model, small, context, 5) is small


def test_every_kind_of_layer_is_refitted_or_keeps_what_the_plan_gives_it(tmp_path: Path) -> None:
    model, data = kinds()
    profile = profiled(model, data, OPTIONS)
    plan = ac.plan(profile, "5x")
    small, applied = (f(model, plan, profile, data) for f in (apply_sequentially, ac.apply))
    assert ac.save(small, encoded_of(small).plan, tmp_path / "model.acz").bytes <= plan.budget_bytes
    found, planned = ({e.name: e for e in encoded_of(m).entries} for m in (small, applied))
    kept = {n for n, x in profile.layers.items() if not x.reached or not sequential._linear(model, x.layer)}
    assert kept
    assert kept != set(profile.layers)
    for name in kept:
        assert found[profile.layers[name].layer.key] == planned[profile.layers[name].layer.key]
    tuned = tune(model, small, ac.Context(model, data), 5)
    assert (
        ac.save(tuned, encoded_of(tuned).plan, tmp_path / "tuned.acz").bytes == encoded_of(small).plan.predicted_bytes
    )


class Fickle(nn.Module):
    """Runs its second layer only as long as the first is exactly what it was."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.last(self.second(y) if float(self.first.weight.detach().sum()) == SUM[0] else y)


SUM = [0.0]


def test_a_model_that_takes_another_way_when_compressed_is_refused() -> None:
    model: Any = seeded(Fickle)
    SUM[0] = float(model.first.weight.detach().sum())
    data = batches(8)
    profile = profiled(model, data, ("w3",))
    with pytest.raises(CalibrationError, match="layer 'second' is not called as in the dense model"):
        apply_sequentially(model, ac.plan(profile, "3x"), profile, data)


def test_what_sequential_mode_made_is_not_made_again_from_the_profile() -> None:
    model, data, profile = small_profile()
    made = encoded_of(apply_sequentially(model, ac.plan(profile, "6x"), profile, data)).plan
    for stage in (ac.apply, apply_sequentially):
        with pytest.raises(MismatchError, match=r"field 'realised'.*load the file"):
            stage(model, made, profile, data)
    with pytest.raises(MismatchError, match="field 'fingerprint'"):
        apply_sequentially(model, dataclasses.replace(made, realised={}, fingerprint="other"), profile, data)


@pytest.mark.parametrize(
    "text", ["rd(0.5,0.3)", "rd(0.9,0.3)s60", "s75w4", "w3", "fp16", "dense", "rd(0.1,0)s99", "tcq(0.34,0.4)"]
)
def test_neighbours_are_options_around_the_given_one(text: str) -> None:
    option = ac.Option.parse(text)
    near = neighbours(option)
    assert near[0] == option
    assert len(set(near)) == len(near)
    assert [ac.Option.parse(str(o)) for o in near] == near
    assert {(o.bits, o.half, o.step is None) for o in near} == {(option.bits, option.half, option.step is None)}
    if option.step is not None:
        steps = sorted({o.step or 0.0 for o in near})
        assert 0.6 * option.step < steps[0] < option.step < steps[-1] < 1.6 * option.step
    if option.sparsity:
        sparsities = sorted({o.sparsity for o in near})
        assert sparsities[0] < option.sparsity < sparsities[-1] < 100.0


def test_one_block_of_dense_outputs_is_as_good_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data, profile = small_profile()
    plan = ac.plan(profile, "7x")
    blocks: list[int] = []
    calls = sequential._calls

    def spy(model: nn.Module, owners: Any, *rest: Any, **more: Any) -> Any:
        blocks.extend([len(owners)] if more.get("inputs") is False else [])
        return calls(model, owners, *rest, **more)

    monkeypatch.setattr(sequential, "_calls", spy)
    whole = encoded_of(apply_sequentially(model, plan, profile, data)).entries
    assert set(blocks) == {4}
    blocks.clear()
    # Of 48 samples, conv1 and conv2 put out 2 x 8 x 36 values each, which is what fits.
    monkeypatch.setattr(sequential, "TARGET_BYTES", 4 * 48 * 2 * 288)
    assert encoded_of(apply_sequentially(model, plan, profile, data)).entries == whole
    assert list(dict.fromkeys(blocks)) == [2]


def test_progress_counts_the_steps() -> None:
    model, data, profile = small_profile()
    told: list[tuple[int, int]] = []
    apply_sequentially(model, ac.plan(profile, "6x"), profile, data, progress=lambda *call: told.append(call))
    assert told == [(i, 4) for i in range(1, 5)]
    assert isinstance(model, ConvNet)
