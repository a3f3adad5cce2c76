"""From a plan to a model, a file and back: the same bits all the way, and refusals that name what differs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import ConvNet, batches, compressed, convnet, images, profiled, seeded, small_profile
from safetensors.torch import load_file
from test_correcting import NETS, close, shifted
from torch import nn

import autocompress as ac
from autocompress.applying import encoded_of, realise_layers
from autocompress.errors import BudgetError, MismatchError
from autocompress.layers import model_digest, stored_tensors
from autocompress.storage import FormatError, float_entry, write


class Rich(nn.Module):
    """Buffers of many types, a tied weight, a table of positions, a scale, and a constant far from its inputs' size."""

    index: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight
        self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.tensor(1.1))
        self.register_buffer("index", torch.tensor([5, 0, 1, 4, 3, 2]))
        self.register_buffer("mask", torch.tensor([True] * 5 + [False]))
        self.register_buffer("small", torch.arange(6, dtype=torch.uint8))
        self.register_buffer("positions", torch.arange(2040.0, 2060.0) + 0.25)  # half precision holds none of these
        self.register_buffer("wall", torch.tensor([0.0, float("-inf"), float("nan")]))
        self.register_buffer("empty", torch.zeros(0, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(x[:, self.index]))) * self.mask
        return self.head(self.second(x) * self.scale + (self.positions[:6] - 2040.0))


def offset() -> nn.Module:
    """A regression whose output lies far from zero: half precision of the bias would be off by several spreads."""
    last = nn.Linear(8, 1)
    last.bias.data.fill_(30001.0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), last)


def far_mean() -> nn.Module:
    """A norm whose inputs lie a thousand spreads from zero."""
    model: Any = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    model[0].bias.data.fill_(1000.0)
    model[1].running_mean.fill_(1000.0)
    return model


ALL = {
    **NETS,
    "rich": (Rich, (6,)),
    "offset": (offset, (6,)),
    "far mean": (far_mean, (6,)),
    "one": (lambda: nn.Linear(6, 4), (6,)),
}
MIXED = ("fp16", "w4", "rd(0.5,0.3)s50")


def same_outputs(a: nn.Module, b: nn.Module, data: list[torch.Tensor]) -> bool:
    with torch.no_grad():
        return all(torch.equal(a(x), b(x)) for x in data)


@pytest.mark.parametrize("ratio", ["1x", "3x"])
@pytest.mark.parametrize("name", ALL)
def test_a_file_gives_back_the_applied_model(name: str, ratio: str, tmp_path: Path) -> None:
    build, shape = ALL[name]
    model, data = seeded(build), batches(*shape, count=5, size=16)
    found = profiled(model, data, MIXED)
    smallest = found.template.file_bytes({n: min(x.rows, key=lambda r: r.bytes) for n, x in found.layers.items()})
    plan = ac.plan(found, max(smallest + 30, found.template.dense_bytes // int(ratio[:-1])))
    small = ac.apply(model, plan, found, data)
    info = ac.save(small, plan, tmp_path / "model.acz")
    assert info.bytes == plan.predicted_bytes == (tmp_path / "model.acz").stat().st_size <= plan.budget_bytes
    fresh = ac.load(tmp_path / "model.acz", seeded(build, seed=9).train())
    assert not any(m.training for m in fresh.modules())
    assert same_outputs(small, fresh, data)
    for key, tensor in stored_tensors(small).items():
        torch.testing.assert_close(stored_tensors(fresh)[key], tensor, rtol=0, atol=0, equal_nan=True)
    # The same bytes from the same plan.
    ac.save(ac.apply(model, plan, found, data), plan, tmp_path / "again.acz")
    assert (tmp_path / "again.acz").read_bytes() == (tmp_path / "model.acz").read_bytes()


@pytest.mark.parametrize("name", ["rich", "offset", "far mean"])
def test_values_that_half_precision_would_spoil_are_stored_exactly(name: str) -> None:
    build, shape = ALL[name]
    model, data = seeded(build), batches(*shape, count=5, size=16)
    found = profiled(model, data, ())
    small = ac.apply(model, ac.plan(found, 10**6), found, data)
    with torch.no_grad():
        for x in data:
            spread = float((model(x) - model(x).mean(0)).abs().max())
            assert float((model(x) - small(x)).abs().max()) <= 1e-2 * spread


def test_the_model_is_not_touched() -> None:
    model, data = convnet(), images()
    found = profiled(model, data)
    plan = ac.plan(found, 600, "auto", ac.Context(model, data))
    digest = model_digest(model)
    for training in (False, True):
        model.train(training)
        model.get_submodule("bn2").eval()
        modes = [m.training for m in model.modules()]
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        small = ac.apply(model, plan, found, data)
        ac.plan(found, 600, "kl", ac.Context(model, data))
        profiled(model, data)
        assert model_digest(model) == digest
        assert [m.training for m in model.modules()] == modes
        assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
        assert not hasattr(model, "_autocompress_encoded")
        assert not any(m.training for m in small.modules())
        mine = {t.data_ptr() for t in model.state_dict().values()}
        assert not mine & {t.data_ptr() for t in small.state_dict().values()}
    model.eval()
    other = ac.apply(model, plan, found, data)
    assert same_outputs(small, other, data), "a model in training mode gives the same as one in eval mode"


def test_weights_are_those_that_were_measured() -> None:
    model, _, found = small_profile()
    for option in ("w4", "rd(0.9,0.3)s60"):
        plan = {name: ac.Option.parse(option) for name in found.layers}
        for name, weight in realise_layers(model, found, plan).items():
            row = found.layers[name].row(plan[name])
            owner: Any = model.get_submodule(name)
            assert found.problem(name, owner.weight).error(weight.weight()) == row.error
            assert weight.bytes() == row.bytes
    small: Any = ac.apply(model, ac.plan(found, 600), found)
    for name, entry in ((e.name, e) for e in encoded_of(small).entries):
        if "option" in entry.params:
            assert torch.equal(small.get_parameter(name), torch.from_numpy(entry.dequantise()))


def _change(small: Any, key: str) -> None:
    owner, _, field = key.rpartition(".")
    module = small.get_submodule(owner)
    if field == "running_mean":
        module.train()
        module(torch.randn(4, 8, 3, 3))
        module.eval()
    else:
        with torch.no_grad():
            getattr(module, field).view(-1)[0] += 0.125


@pytest.mark.parametrize("key", ["conv2.weight", "linear.bias", "bn2.weight", "bn3.bias", "bn1.running_mean"])
def test_a_changed_model_is_not_saved(key: str, tmp_path: Path) -> None:
    small, plan, _ = compressed(convnet(), images(), 700)
    _change(small, key)
    with pytest.raises(MismatchError, match=rf"field '{key}'"):
        ac.save(small, plan, tmp_path / "model.acz")
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_an_applied_model_or_of_another_plan_is_not_saved(tmp_path: Path) -> None:
    model, data, found = small_profile()
    small, plan, _ = compressed(model, data, 700)
    path = tmp_path / "model.acz"
    with pytest.raises(MismatchError, match="carries no encoded weights"):
        ac.save(model, plan, path)
    with pytest.raises(MismatchError, match="field 'plan'"):
        ac.save(small, ac.plan(found, 500), path)
    with pytest.raises(BudgetError, match=r"the file would have \d+ bytes, the budget is 100"):
        ac.save(small, plan.replace(budget_bytes=100), path)
    broken = copy.deepcopy(small)
    broken.linear = nn.Linear(8, 6)
    with pytest.raises(MismatchError, match=r"field 'linear.(weight|bias)': the model no longer has this tensor"):
        ac.save(broken, plan, path)
    assert list(tmp_path.iterdir()) == []
    ac.save(copy.deepcopy(small), plan, path)


def test_plans_of_another_profile_or_for_other_weights_are_refused() -> None:
    model, data, found = small_profile()
    plan = ac.plan(found, 700)
    with pytest.raises(MismatchError, match="field 'model'"):
        ac.apply(convnet(seed=1), plan, found, data)
    with pytest.raises(MismatchError, match="field 'fingerprint': the plan was made from another profile"):
        ac.apply(model, plan.replace(fingerprint="0" * 64), found, data)
    for layers in ({"conv1": plan.layers["conv1"]}, {**plan.layers, "conv9": ac.Option()}):
        with pytest.raises(MismatchError, match="field 'layers': the plan and the profile differ in 'conv"):
            ac.apply(model, plan.replace(layers=layers), found, data)
    with pytest.raises(MismatchError, match="layer 'conv1' has no option 'w7'"):
        found.layers["conv1"].row(ac.Option(bits=7))


class Wider(ConvNet):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 7)


class Renamed(ConvNet):
    def __init__(self) -> None:
        super().__init__()
        self.head = self.linear
        del self.linear


def test_another_architecture_is_refused_and_not_touched(tmp_path: Path) -> None:
    small, plan, _ = compressed(convnet(), images(), 700)
    path = ac.save(small, plan, tmp_path / "model.acz").path
    for build, words in [
        (Wider, r"'linear.weight' is \(5, 8\) in the file and \(7, 8\) in the model"),
        (Renamed, r"the file lacks 'head.bias', 'head.weight'; the model lacks 'linear.bias', 'linear.weight'"),
        (lambda: nn.Linear(3, 3), "the file lacks 'bias', 'weight'; the model lacks 'bn1.bias', .* and 1[0-9] more"),
    ]:
        other = build()
        before = model_digest(other)
        with pytest.raises(MismatchError, match=words):
            ac.load(path, other)
        assert model_digest(other) == before
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    fresh = ConvNet()
    before = model_digest(fresh)
    with pytest.raises(FormatError, match="checksum"):
        ac.load(path, fresh)
    assert model_digest(fresh) == before


def test_a_file_unpacks_to_dense_tensors_that_make_the_same_model(tmp_path: Path) -> None:
    small, plan, _ = compressed(convnet(), images(), 700)
    ac.save(small, plan, tmp_path / "model.acz")
    size = ac.unpack(tmp_path / "model.acz", tmp_path / "dense.safetensors")
    assert size == (tmp_path / "dense.safetensors").stat().st_size
    fresh = seeded(ConvNet, seed=5)
    missing, extra = fresh.load_state_dict(load_file(tmp_path / "dense.safetensors"), strict=False)
    assert all(name.endswith("num_batches_tracked") for name in missing)
    assert extra == []
    assert same_outputs(small, fresh, images())


DTYPES = {torch.float64: 5e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_models_of_other_types(dtype: torch.dtype, tmp_path: Path) -> None:
    """Weights are stored in 32 bits or fewer whatever the model computes in; the applied model keeps its type."""
    build, shape = NETS["convolutions"]
    model = seeded(build).to(dtype)
    data = [b.to(dtype) for b in batches(*shape)]
    found = profiled(model, data, ("fp16", "w6"))
    for budget in (10**6, "3x"):
        plan = ac.plan(found, budget, "exact", ac.Context(model, data))
        small = ac.apply(model, plan, found, data)
        assert {p.dtype for p in small.parameters()} == {dtype}
        with torch.no_grad():
            assert close(model(data[0]).float(), small(data[0]).float(), DTYPES[dtype] * (1 if budget == 10**6 else 4))
        info = ac.save(small, plan, tmp_path / "model.acz")
        assert info.bytes == plan.predicted_bytes
        fresh = ac.load(tmp_path / "model.acz", seeded(build, seed=3).to(dtype))
        assert same_outputs(small, fresh, data)


def test_a_correction_sees_what_calibration_saw_and_no_more() -> None:
    """Changing the part that is held out changes nothing."""
    model, data, found = small_profile()
    plan = ac.plan(found, 600)
    fit, held = ac.Context(model, data).fit, ac.Context(model, data).held
    changed = [x * 3 if any(x is h for h in held) else x for x in data]
    assert len(fit) + len(held) == len(data)
    a, b = ac.apply(model, plan, found, data), ac.apply(model, plan, found, changed)
    assert same_outputs(a, b, data)
    assert not same_outputs(a, ac.apply(model, plan, found, shifted(3, 6, 6)), data)


@pytest.mark.parametrize("groups", [-1, 3, "two", 1.5])
def test_a_layout_that_makes_no_sense_is_a_damaged_file(groups: Any, tmp_path: Path) -> None:
    for shape in ((4, 2, 3), (4,)):
        values = np.zeros(shape, np.float32)
        write(tmp_path / "m.acz", [float_entry("weight", values, codec="raw", params={"swapped": groups})])
        with pytest.raises(FormatError, match=r"entry 'weight': .* groups"):
            ac.load(tmp_path / "m.acz")
