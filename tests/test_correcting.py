"""Statistics correction: moments match, nothing changes where nothing is compressed, and what cannot be told stays."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import ConvNet, batches, convnet, images, profiled, seeded
from torch import nn

import autocompress as ac
from autocompress.applying import CORRECTION_SAMPLES
from autocompress.batches import join_batches, split_batches
from autocompress.correcting import correct_statistics
from autocompress.layers import find_layers
from autocompress.records import VectorStore, fold_norms, foldable_norms, make_template


class Normed(nn.Module):
    """Layer norms between linear layers with biases, over sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Linear(6, 10), nn.LayerNorm(10)
        self.second, self.norm2 = nn.Linear(10, 10), nn.LayerNorm(10)
        self.head = nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm1(self.first(x)))
        return self.head(self.norm2(x + self.second(x)))


class Twice(nn.Module):
    """One norm and one layer, each called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.head = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = torch.relu(self.norm(self.inner(x)))
        return self.head(x)


def sequence() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 6, 3, padding=1),
        nn.BatchNorm1d(6),
        nn.ReLU(),
        nn.Conv1d(6, 6, 3, groups=3),
        nn.Flatten(),
        nn.Linear(24, 4),
    )


def volume() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(2, 4, 2, bias=False), nn.BatchNorm3d(4), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4, bias=False)
    )


def biases() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4))


def upsampling() -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose2d(3, 6, 3, stride=2, padding=1, groups=3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 2),
        nn.Flatten(2),
        nn.Linear(144, 3),
    )


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutions": (ConvNet, (3, 6, 6)),
    "layer norms": (Normed, (5, 6)),
    "called twice": (Twice, (6,)),
    "conv1d": (sequence, (3, 6)),
    "conv3d": (volume, (2, 3, 3, 3)),
    "biases": (biases, (3, 6, 6)),
    "transposed convolutions": (upsampling, (3, 6, 6)),
    "no biases": (plain, (6,)),
}


def shifted(*shape: int, seed: int = 0) -> list[torch.Tensor]:
    """Data whose statistics are far from those that the norms remember (the trap: never re-estimate)."""
    return [2.5 * b + 1.7 for b in batches(*shape, count=5, size=16, seed=seed)]


def corrected_on(data: list[torch.Tensor]) -> torch.Tensor:
    return join_batches(split_batches(data)[0], CORRECTION_SAMPLES)


def moments(model: nn.Module, x: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Mean and standard deviation of each module's output per channel, of modules that run once."""
    found: dict[str, list[torch.Tensor]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.Linear, nn.modules.conv._ConvNd)):
            last = isinstance(module, (nn.LayerNorm, nn.Linear))

            def hook(m: Any, args: Any, out: torch.Tensor, name: str = name, last: bool = last) -> None:
                flat = out.double().movedim(-1 if last else 1, 0).flatten(1)
                found.setdefault(name, []).append(torch.stack([flat.mean(1), flat.std(1, correction=0)]))

            handles.append(module.register_forward_hook(hook))
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return {name: (values[0][0], values[0][1]) for name, values in found.items() if len(values) == 1}


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    scale = float(a.abs().max())
    return float((a - b).abs().max()) <= tolerance * scale


class Padded(nn.Module):
    """An encoder over sequences of several lengths, which torch would run on nested tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(20, 16), nn.Linear(16, 5)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2)

    def forward(self, tokens: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.words(tokens), src_key_padding_mask=padding)[:, 0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_norms_inside_an_encoder_are_corrected_although_torch_has_one_kernel_for_it() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 7, (5, 8, 1), generator=generator)
    data = [
        {"tokens": torch.randint(0, 20, (8, 6), generator=generator), "padding": torch.arange(6) >= n} for n in lengths
    ]
    model = seeded(Padded)
    found = profiled(model, data)
    assert found.statistics.unreached == ()
    plan = ac.plan(found, "5x")
    small, plain = (ac.apply(model, plan, found, given) for given in (data, None))
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            assert not torch.equal(small.get_parameter(f"{name}.weight"), plain.get_parameter(f"{name}.weight"))

    def loss(network: nn.Module) -> float:
        with torch.no_grad():
            return sum(float((network(**b) - model(**b)).square().sum()) for b in data)

    assert 0 < loss(small) < loss(plain)


@pytest.mark.parametrize("name", NETS)
def test_nothing_changes_where_nothing_is_compressed(name: str) -> None:
    """Outputs are the dense ones up to half precision, on the correction data and on other data."""
    build, shape = NETS[name]
    model, data = seeded(build), shifted(*shape)
    found = profiled(model, data, options=())
    plan = ac.plan(found, 10**6)
    assert all(option.is_dense for option in plan.layers.values())
    other = batches(*shape, seed=7)[0]
    for given in (None, data, data[:1]):
        small = ac.apply(model, plan, found, given)
        with torch.no_grad():
            for x in (*data, other):
                assert close(model(x), small(x), 4e-3)


@pytest.mark.parametrize("name", NETS)
def test_moments_match_after_compression(name: str) -> None:
    build, shape = NETS[name]
    model, data = seeded(build), shifted(*shape)
    found = profiled(model, data, options=("w2", "w3"))
    plan = ac.plan(found, found.template.file_bytes({n: x.rows[1] for n, x in found.layers.items()}) + 20)
    assert not any(option.is_dense for option in plan.layers.values())
    x = corrected_on(data)
    dense, raw = moments(model, x), moments(ac.apply(model, plan, found), x)
    small = ac.apply(model, plan, found, data)
    after = moments(small, x)
    assert after.keys() == dense.keys()
    improved = 0
    for key, (mean, std) in dense.items():
        module: Any = model.get_submodule(key)
        norm = not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))
        if norm or module.bias is not None:
            spread = float(std.max())
            assert float((after[key][0] - mean).abs().max()) <= 5e-3 * max(spread, float(mean.abs().max())), key
            improved += float((raw[key][0] - mean).abs().max()) > 5e-3 * spread
        if norm:
            assert float((after[key][1] - std).abs().max()) <= 5e-3 * float(std.max()), key
    if any(getattr(model.get_submodule(key), "bias", None) is not None for key in dense) and name != "called twice":
        assert improved, "compression moved no mean: this test shows nothing"


class Offset(nn.Module):
    """A norm whose scale is one plus its weight, as some architectures have it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), 0.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x, x.shape[-1:]) * (1.0 + self.weight)


class OffsetRMSNorm(Offset):
    pass


@pytest.mark.parametrize("kind", [nn.RMSNorm, OffsetRMSNorm])
def test_a_norm_without_a_shift_keeps_its_mean_square_and_one_of_another_kind_its_scale(kind: Any) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8, bias=False), kind(8)))
    data = shifted(6)
    found = profiled(model, data, options=("w2",))
    assert "3.weight" in found.template.half  # stored as the scales of other norms are
    plan = ac.plan(found, found.template.file_bytes({n: x.rows[1] for n, x in found.layers.items()}) + 20)
    x = corrected_on(data)
    raw, small = ac.apply(model, plan, found), ac.apply(model, plan, found, data)
    with torch.no_grad():
        dense, before, after = ((m(x).double() ** 2).mean(0).sqrt() for m in (model, raw, small))
    assert float((before - dense).abs().max()) > 0.05 * float(dense.max()), "this test shows nothing"
    if kind is nn.RMSNorm:
        assert close(dense, after, 5e-3)
    else:
        assert torch.equal(small.get_parameter("3.weight"), raw.get_parameter("3.weight"))
    untouched = ac.apply(model, ac.plan(found, 10**6, "exact"), found, data)
    with torch.no_grad():
        assert close(model(x), untouched(x), 4e-3)


def test_modules_that_run_twice_are_left_alone() -> None:
    build, shape = NETS["called twice"]
    model, data = seeded(build), shifted(*shape)
    found = profiled(model, data, options=("w2",))
    plan = ac.plan(found, found.template.file_bytes({n: x.rows[1] for n, x in found.layers.items()}) + 20)
    alone, small = ac.apply(model, plan, found), ac.apply(model, plan, found, data)
    a, b = alone.state_dict(), small.state_dict()
    assert {key for key in a if not torch.equal(a[key], b[key])} == {"head.bias"}


def test_shared_parameters_are_left_alone() -> None:
    """Two norms on one scale and shift, with statistics of their own: neither is folded, neither is corrected."""

    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
        model[3].weight, model[3].bias = model[1].weight, model[1].bias
        model[2].bias = model[0].bias
        return model

    model = seeded(build)
    data = shifted(6)
    assert foldable_norms(model) == []
    found = profiled(model, data, options=("w3",))
    plan = ac.plan(found, found.template.file_bytes({n: x.rows[1] for n, x in found.layers.items()}) + 20)
    small: Any = ac.apply(model, plan, found, data)
    for key in ("0.bias", "1.weight", "1.bias", "1.running_mean", "3.running_var"):
        assert close(model.state_dict()[key], small.state_dict()[key], 1e-3), key
    assert small[3].weight is small[1].weight


def test_a_channel_that_compression_kills_is_silent() -> None:
    """σ_p = 0: the scale is 0, and the shift is the dense mean."""
    model: Any = convnet()
    small: Any = copy.deepcopy(model)
    x = corrected_on(images())
    with torch.no_grad():
        fold_norms(small)
        small.conv1.weight[2] = 0.0
        correct_statistics(model, small, [], x)
    assert small.bn1.weight[2] == 0.0
    assert (small.bn1.weight[:2] != 0.0).all()
    a, b = moments(model, x)["bn1"], moments(small, x)["bn1"]
    torch.testing.assert_close(a[0], b[0], rtol=1e-4, atol=1e-5)
    assert b[1][2] == 0.0


def test_a_channel_that_is_silent_on_this_batch_only_keeps_its_scale() -> None:
    """The dense channel is constant here and alive elsewhere: a scale of zero would lose it for good."""
    model: Any = seeded(lambda: nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4)))
    model[0].weight.data[1] = torch.tensor([0.0, 0.0, 1.0])
    small = copy.deepcopy(model)
    x = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    x[:, 2] = 0.5
    with torch.no_grad():
        fold_norms(small)
        correct_statistics(model, small, ["0"], x)
        other = torch.randn(30, 3, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(small(other), model(other), rtol=1e-4, atol=1e-4)


def test_one_sample_is_not_enough_to_zero_a_network() -> None:
    """A single sample has no spread in any channel of a vector."""
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)))
    data = [torch.randn(1, 6, generator=torch.Generator().manual_seed(0))]
    found = profiled(model, data, options=("w8",))
    plan = ac.plan(found, 10**6)
    small = ac.apply(model, plan, found, data)
    x = batches(6)[0]
    with torch.no_grad():
        assert close(model(x), small(x), 0.05)


def test_corrections_stay_within_half_precision() -> None:
    """A channel of which little is left would need a scale that binary16 cannot hold: it gets the largest."""
    model: Any = convnet()
    small: Any = copy.deepcopy(model)
    with torch.no_grad():
        fold_norms(small)
        small.conv1.weight[2] *= 1e-5
        correct_statistics(
            model, small, [], corrected_on(images()), VectorStore(make_template(model, find_layers(model)))
        )
    assert torch.isfinite(small.bn1.weight).all()
    assert torch.isfinite(small.bn1.bias).all()
    assert torch.equal(small.bn1.weight.half().float(), small.bn1.weight)


FOLDED = [(nn.BatchNorm1d, (7,)), (nn.BatchNorm1d, (7, 5)), (nn.BatchNorm2d, (7, 3, 2)), (nn.BatchNorm3d, (7, 2, 2, 2))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize(("kind", "shape"), FOLDED, ids=lambda v: getattr(v, "__name__", str(v)))
def test_a_folded_norm_computes_the_same(kind: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    model: Any = seeded(lambda: kind(7, eps=1e-3)).to(dtype)
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = model(x)
    with torch.no_grad():
        fold_norms(model)
    assert model.running_mean.abs().max() == 0
    assert (model.running_var == 1).all()
    tolerance = {torch.float16: 5e-3, torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    torch.testing.assert_close(model(x), before, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("changes", [{"affine": False}, {"track_running_stats": False}], ids=str)
def test_norms_without_scale_or_statistics_are_left_alone(changes: dict[str, bool]) -> None:
    model: Any = seeded(lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5, **changes), nn.Linear(5, 2)))
    assert foldable_norms(model) == []
    data = shifted(6)
    found = profiled(model, data, options=("w4",))
    small: Any = ac.apply(model, ac.plan(found, 10**6), found, data)
    for key, tensor in model[1].state_dict().items():
        assert torch.equal(small[1].state_dict()[key], tensor) or close(tensor, small[1].state_dict()[key], 1e-3)
    with torch.no_grad():
        assert close(model(data[0]), small(data[0]), 5e-3)
