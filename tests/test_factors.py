"""A layer as two: low-rank options from the profile to the file and back, and what goes by the name of their layers."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from networks import batches, compressed, convnet, images, kinds, profiled, seeded
from torch import nn

import autocompress as ac
from autocompress.applying import encoded_of
from autocompress.costs import factor_shapes
from autocompress.errors import AutocompressError, InfeasibleError, MismatchError
from autocompress.exporting import ExportError
from autocompress.factors import Factored, Halves, factorise, split_shapes
from autocompress.layers import find_layers, stored_tensors
from autocompress.planning import coarsest, cost_facts, dense_cost, running_cost
from autocompress.profiling import Profile, load_profile
from autocompress.saving import halves_of
from autocompress.storage import Entry, FormatError, read, serialise
from autocompress.types import Budget, Option, Plan

RANKS = (
    *("fp16", "w8", "rank1w8", "rank2fp16", "rank2", "k2r2", "k2r2w8", "k2r1w8", "rank3w6", "rank2pw8", "rank3p"),
    *("k2r1w4+s75w2", "rank1w4+w2", "rank2+s75fp16"),
)


class Geometry(nn.Module):
    """Strides, dilations, paddings of every kind; a layer under two names; linear layers on sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 10, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), padding_mode="reflect")
        self.b = nn.Conv2d(10, 8, 3, padding="same", bias=False)
        self.again = self.b
        self.c = nn.Conv1d(8, 12, 3, stride=2)
        self.fc = nn.Linear(12, 16)
        self.head = nn.Linear(16, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.b(torch.relu(self.a(x)))).mean(3)
        return self.head(torch.relu(self.fc(torch.relu(self.c(x)).transpose(1, 2)))).mean(1)


def geometry() -> tuple[nn.Module, list[torch.Tensor]]:
    return seeded(Geometry), batches(4, 11, 9)


def planned(profile: Profile, layers: dict[str, str], budget: str = "1x") -> Plan:
    """A plan with these options, wherever they come from."""
    plan = ac.plan(profile, budget)
    options = {n: Option.parse(layers.get(n, "dense")) for n in plan.layers}
    size = profile.with_vectors(plan.vector_bits).template.file_bytes(
        {n: profile.layers[n].row(o) for n, o in options.items()}
    )
    return plan.replace(layers=options, predicted_bytes=size)


MIXED = {"a": "k2r2w8", "b": "k2r2", "c": "rank3w6", "fc": "k2r1w8", "head": "rank2fp16"}
BESIDE = {"a": "k2r1w4+s75w2", "b": "rank1w4+w2", "c": "rank1w4+w2", "fc": "k2r1w4+s75w2", "head": "rank2+s75fp16"}


@pytest.fixture(scope="module")
def geometry_profile() -> Profile:
    return profiled(*geometry(), RANKS)


def assert_same(again: nn.Module, small: nn.Module, batch: torch.Tensor) -> None:
    """The same weights, bit for bit, and outputs but for BLAS: its sums for so thin a layer depend on alignment."""
    for name, module in small.named_modules():
        if not isinstance(module, Factored) and hasattr(module, "weight"):
            assert torch.equal(again.get_submodule(name).weight, module.weight), name  # type: ignore[arg-type]
    torch.testing.assert_close(again(batch), small(batch), rtol=1e-5, atol=1e-6)


def written(found: Profile, layers: dict[str, str], folder: Path) -> Any:
    model, data = geometry()
    plan = planned(found, layers)
    small = ac.apply(model, plan, found, data)
    info = ac.save(small, plan, folder / "model.acz")
    return model, data, found, plan, small, folder / "model.acz", info


@pytest.fixture(scope="module")
def mixed(geometry_profile: Profile, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return written(geometry_profile, MIXED, tmp_path_factory.mktemp("mixed"))


@pytest.fixture(scope="module", params=["two", "three"])
def split_model(geometry_profile: Profile, request: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """With every layer as two; and with every layer as three."""
    layers = MIXED if request.param == "two" else BESIDE
    return written(geometry_profile, layers, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("name", ["a", "b", "c", "fc", "head"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("residual", [False, True])
def test_the_layers_compute_what_one_with_their_product_does(name: str, groups: int, residual: bool) -> None:
    model, data = geometry()
    halves = Halves(groups, 2 * groups, residual)
    split = factorise(copy.deepcopy(model), {name: halves})
    found: Any = split.get_submodule(name)
    assert len(found) == 2 + residual
    with torch.no_grad():
        for i, parameter in enumerate(layer.weight for layer in found):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
        model.get_submodule(name).weight.copy_(found.weight)  # type: ignore[operator]
        torch.testing.assert_close(split(data[0]), model(data[0]), rtol=1e-4, atol=1e-5)
        assert isinstance(found, Factored)
        assert (found.bias is None) == (model.get_submodule(name).bias is None)
    wanted: dict[str, Any] = {n: tuple(t.shape) for n, t in stored_tensors(split).items()}
    dense = {n: tuple(t.shape) for n, t in stored_tensors(model).items()}
    assert split_shapes(model, dense, {name: halves}) == wanted
    option = Option(rank=2, groups=groups, residual=Option(bits=2) if residual else None)
    shapes = factor_shapes(find_layers(model)[name].shape, option)
    assert shapes == tuple(wanted[f"{name}.{i}.weight"] for i in range(2 + residual))


def test_a_layer_under_two_names_is_replaced_under_both() -> None:
    split: Any = factorise(geometry()[0], {"b": Halves(1, 2)})
    assert split.again is split.b


def test_only_plain_layers_with_a_weight_of_their_own_can_be_split() -> None:
    assert {x.name for x in find_layers(kinds()[0]) if x.factorable} == {"encoder.linear1", "encoder.linear2", "spare"}
    assert {x.name for x in find_layers(convnet()) if x.factorable} == {"conv1", "conv3", "linear"}
    assert not find_layers(nn.Linear(3, 3)).layers[0].factorable  # nothing holds it that could hold another
    model: Any = convnet()
    model.conv1.register_forward_hook(lambda *_: None)
    assert not find_layers(model)["conv1"].factorable


def test_the_file_has_the_predicted_length_and_gives_back_the_applied_model(split_model: Any) -> None:
    model, data, _, plan, small, path, info = split_model
    assert info.bytes == plan.predicted_bytes == path.stat().st_size
    assert all(isinstance(module, Factored) for module in small.children())
    for packed in (False, True, "bits"):
        again = ac.load(path, copy.deepcopy(model), packed=packed)
        assert_same(again, small, data[0])
    twice = ac.load(path, ac.load(path, copy.deepcopy(model)))  # what is split already is filled
    assert_same(twice, small, data[0])
    tensors = ac.load(path)
    assert all(torch.equal(t, tensors[n]) for n, t in stored_tensors(small).items())
    assert tensors["a.0.weight"].shape == ((4, 2, 3, 2) if plan.layers["a"].rank == 2 else (2, 2, 3, 2))
    assert ("a.2.weight" in tensors) == (plan.layers["a"].residual is not None)
    assert tensors["a.1.bias"].shape == (10,)


def test_the_applied_model_is_the_measured_one(split_model: Any) -> None:
    model, data, found, plan, small, *_ = split_model
    context = ac.Context(model, data)
    measured = context.measure(found.with_vectors(plan.vector_bits), plan.layers)
    assert measured == context.divergence_of(small)
    assert measured > 1e-6


def test_macs_and_bops_are_those_of_two_layers(split_model: Any) -> None:
    _, data, found, plan, small, *_ = split_model
    counted: dict[str, int] = {}

    def count(module: Any, args: Any, output: torch.Tensor, name: str) -> None:
        axis = -1 if output.shape[-1] == module.weight.shape[0] and module.weight.ndim == 2 else 1
        counted[name] = module.weight.numel() * output.numel() // output.shape[axis]

    small = copy.deepcopy(small)
    halves = {n: m for n, m in small.named_modules() if hasattr(m, "weight") and not isinstance(m, Factored)}
    for name, module in halves.items():
        module.register_forward_hook(lambda m, a, y, name=name: count(m, a, y, name))
    small(data[0][:1])
    for layer in plan.layers:
        row = found.layers[layer].row(plan.layers[layer])
        parts = sum(macs for name, macs in counted.items() if name.startswith(f"{layer}."))
        assert found.macs(layer, row) == parts
        assert (parts < found.macs(layer)) == (plan.layers[layer].residual is None)
    assert running_cost(found, "macs", plan.layers) == sum(counted.values())
    assert running_cost(found, "macs", dict.fromkeys(plan.layers, Option())) == dense_cost(found, "macs")
    assert running_cost(found, "bops", plan.layers) < 32 * 32 * sum(counted.values())
    table = found.table.set_index(["layer", "option"])
    whole = str(plan.layers["a"])
    assert table.loc[("a", whole), "macs"] == sum(m for name, m in counted.items() if name.startswith("a."))


def test_a_limit_on_macs_is_kept_and_one_below_every_rank_is_refused() -> None:
    model, data = convnet(), images()
    found = profiled(model, data, RANKS)
    plan = ac.plan(found, "2000, macs=70%")
    assert 0.4 * dense_cost(found, "macs") < running_cost(found, "macs", plan.layers) <= 0.7 * dense_cost(found, "macs")
    assert any(o.rank for o in plan.layers.values())
    assert cost_facts(found, plan.budget, plan.layers)["macs"]["limit"] == 0.7 * dense_cost(found, "macs")
    with pytest.raises(InfeasibleError, match="the least possible is"):
        ac.plan(found, "2000, macs=5%")


def test_a_store_gives_back_the_same_profile(tmp_path: Path) -> None:
    model, data = convnet(), images()
    made = profiled(model, data, RANKS, tmp_path / "store")
    again = load_profile(tmp_path / "store")
    assert again.fingerprint == made.fingerprint
    for name, layer in made.layers.items():
        assert again.layers[name].rows == layer.rows
        assert again.layers[name].layer == layer.layer


def test_tuning_and_sequential_mode_keep_the_two_layers(split_model: Any, tmp_path: Path) -> None:
    model, data, found, plan, small, *_ = split_model

    context = ac.Context(model, data)

    def error(other: nn.Module) -> float:
        with torch.no_grad():
            return sum(float((other(batch) - model(batch)).square().sum()) for batch in context.fit)

    tuned: Any = ac.tune(model, small, context, 50)
    for made in (tuned, ac.apply_sequentially(model, plan, found, data)):
        carried = encoded_of(made).plan
        assert isinstance(made.a, Factored)
        info = ac.save(made, carried, tmp_path / "model.acz")
        assert info.bytes == carried.predicted_bytes
        again = ac.load(tmp_path / "model.acz", copy.deepcopy(model))
        assert_same(again, made, data[0])
        assert error(made) < error(small)
    assert not torch.equal(tuned.a[1].bias, small.a[1].bias)
    realised = encoded_of(ac.apply_sequentially(model, plan, found, data)).plan
    taken = cost_facts(found.with_realised(realised), realised.budget, realised.layers)
    assert taken["macs"]["predicted"] == running_cost(found, "macs", plan.layers)


@pytest.mark.parametrize("format", ["onnx", "safetensors"])
def test_exports_hold_both_layers(split_model: Any, format: str, tmp_path: Path) -> None:
    model, data, _, plan, small, path, _ = split_model
    ways = (path, model), (small, None)
    for i, (source, given) in enumerate(ways):
        info = ac.export(source, given, format, tmp_path / f"{i}.bin", example=data[0][:2])
        assert ("a.0", str(plan.layers["a"])) in [layer[:2] for layer in info.layers]
    if format == "safetensors":
        from safetensors.torch import load_file

        assert set(load_file(tmp_path / "0.bin")) >= {"a.0.weight", "a.1.weight", "a.1.bias"}


def test_a_format_of_whole_layers_refuses(mixed: Any, tmp_path: Path) -> None:
    small = copy.deepcopy(mixed[4])
    small.config = SimpleNamespace(to_dict=dict)
    with pytest.raises(ExportError, match="layer 'a' is several layers"):
        ac.export(small, None, "compressed-tensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_coarsest_options_of_each_kind_are_looked_at() -> None:
    options = [Option.parse(n) for n in ("w4", "w2", "rank1w4", "rank2w4", "k2r1w4", "rank1w8", "rank1fp16", "rank2w2")]
    assert [str(o) for o in coarsest(options)] == ["w2", "rank1w4", "rank2w2"]


def test_compress_and_verify(tmp_path: Path) -> None:
    model, data = convnet(), images()
    options: list[Option | str] = list(RANKS)
    budget = "1500, macs=70%, bops=30%"
    result = ac.compress(model, data, budget, effort="normal", out=tmp_path / "out", options=options, workers=1)
    assert any(o.rank for o in result.plan.layers.values())
    found = ac.verify(tmp_path / "out")
    assert found.good, [c for c in found.checks if not c.good]
    assert {c.name for c in found.checks} >= {"macs", "bops", "options"}
    assert "rank" in (tmp_path / "out" / "report.html").read_text()


def test_verify_counts_the_macs_of_both_layers(tmp_path: Path) -> None:
    import json

    model, data = convnet(), images()
    ac.compress(model, data, "1500, macs=70%", effort="fast", out=tmp_path, options=list(RANKS), workers=1)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    metrics["positions"]["conv1"][0] += metrics["positions"]["conv1"][1]
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    (check,) = [c for c in ac.verify(tmp_path).checks if c.name == "macs"]
    assert not check.good


def test_milliseconds_are_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"no table of milliseconds for low-rank options \(rank1w8\)"):
        ac.compress(convnet(), images(), "2000, latency_ms=90%", out=tmp_path / "out", options=list(RANKS))
    assert not (tmp_path / "out").exists()


def test_another_architecture_is_refused_before_it_is_touched(mixed: Any) -> None:
    path = mixed[5]
    other: Any = seeded(Geometry, 1)
    other.a = nn.Conv2d(4, 12, (3, 2))
    before = copy.deepcopy(other.state_dict())
    for packed in (False, True):
        with pytest.raises(MismatchError, match=r"'a\.1\.weight' is \(10, 4, 1, 1\) in the file and \(12, 4, 1, 1\)"):
            ac.load(path, other, packed=packed)
    other.a = nn.ConvTranspose2d(4, 10, (3, 2))
    with pytest.raises(MismatchError, match=r"the file lacks 'a\.bias'"):
        ac.load(path, other)
    del other.a
    with pytest.raises(MismatchError, match="the model lacks"):
        ac.load(path, other)
    assert all(torch.equal(before[n], t) for n, t in other.state_dict().items())


def damaged(entries: dict[str, Entry], **changes: Any) -> dict[str, Entry]:
    """Entries with other facts about one factor; payloads stay."""
    return {n: dataclasses.replace(e, **changes) if n == "a.0.weight" else e for n, e in entries.items()}


def test_factors_that_do_not_fit_together_are_a_format_error(mixed: Any, tmp_path: Path) -> None:
    model, path = mixed[0], mixed[5]
    with read(path) as archive:
        good = dict(archive)
    assert halves_of(good)["a"] == Halves(2, 4)
    first = good["a.0.weight"]
    lone = {n: e for n, e in good.items() if n != "a.1.weight"}
    orphan = {n: e for n, e in good.items() if n != "a.0.weight"}
    moved = {"x" if n == "a.0.weight" else n: dataclasses.replace(e, name="x") if n == "a.0.weight" else e
             for n, e in good.items()}  # fmt: skip
    cases = [(lone, "other factor"), (orphan, "other factor"), (moved, "other factor")]
    for value in (0, -1, 3, "two", True, 2.0, [2]):
        words = "other factor" if value != 2.0 else "are no layer"
        cases.append((damaged(good, params={**first.params, "factor": value}), words))
    both = {n: dataclasses.replace(e, params={**e.params, "factor": 3}) if n.startswith("a.") else e
            for n, e in good.items()}  # fmt: skip
    cases.append((both, "are no layer"))
    cases.append((damaged(good, shape=(2, 4, 3, 2)), "are no layer"))
    for i, (entries, words) in enumerate(cases):
        file = tmp_path / f"{i}.acz"
        file.write_bytes(serialise(list(entries.values())))
        with pytest.raises(FormatError, match=words):
            ac.load(file, copy.deepcopy(model))
        with pytest.raises((FormatError, AutocompressError)):
            ac.export(file, copy.deepcopy(model), "safetensors", tmp_path / "out.safetensors")


def test_a_truncated_rank_is_the_best_of_its_rank() -> None:
    """Error of the file's weight against the tail of the whitened singular values, at half a float32's precision."""
    model, data = geometry()
    found = profiled(model, data, ("rank3", "k2r2", "rank3p"))
    for name in ("a", "b", "c", "fc"):
        layer = found.layers[name]
        weight = layer.layer.matrix(model.get_parameter(layer.layer.key))[0]
        hessian = found.statistics.layers[name].hessian
        assert hessian is not None
        values = np.linalg.svd(weight @ np.linalg.cholesky(hessian[0]), compute_uv=False)
        best = 0.5 * float((values[3:] ** 2).sum())
        assert layer.row(Option(rank=3)).error == pytest.approx(best, rel=1e-4)
        assert layer.row(Option(rank=3, plain=True)).error >= best * (1 - 1e-4)


def test_a_plan_without_ranks_splits_nothing() -> None:
    model, data = convnet(), images()
    small, plan, _ = compressed(model, data, "2x", ("fp16", "w4"))
    assert not any(isinstance(m, Factored) for m in small.modules())
    assert not halves_of({e.name: e for e in encoded_of(small).entries})
    assert Budget.of("2x") == plan.budget


def test_options_do_not_depend_on_what_else_is_asked_for_where_a_layer_is_nearly_too_wide(tmp_path: Path) -> None:
    """Factors of the highest rank alone would cost more than the limit, those of the chosen one less."""
    model = seeded(lambda: nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 5)))
    data = batches(32, count=5, size=40)
    options = [f"rank{r}w4" for r in (2, 3, 4, 6, 8)]
    found = ac.profile(model, ac.calibrate(model, data), options=options, workers=1, exact_limit=4 * 32**3 / 3 + 1)
    for budget in (300, 324, 340, 400):
        plan = ac.plan(found, budget, "exact")
        info = ac.save(ac.apply(model, plan, found, data), plan, tmp_path / "model.acz")
        assert info.bytes == plan.predicted_bytes
