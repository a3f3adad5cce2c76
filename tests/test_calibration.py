"""Hessians against an unfolding written as loops, in float64: every kind of layer, of padding, of sharing."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import autocompress as ac
from autocompress import grams
from autocompress.calibration import Statistics, calibrate
from autocompress.errors import CalibrationError, MismatchError

DAMPING = 1e-2
Array = NDArray[np.float64]


def _padded(x: Array, module: Any) -> Array:
    """`x` (samples, channels, *positions) as the convolution pads it."""
    modes: dict[str, Any] = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    widths = []
    for axis, kernel in enumerate(module.kernel_size):
        if module.padding == "same":
            total = module.dilation[axis] * (kernel - 1)
            widths.append((total // 2, total - total // 2))
        else:
            both = 0 if module.padding == "valid" else module.padding[axis]
            widths.append((both, both))
    return np.pad(x, [(0, 0), (0, 0), *widths], mode=modes[module.padding_mode])


def patches(x: Array, module: nn.Module) -> Array:
    """Inputs of the layer's matrix X, (groups, columns of W, samples * positions); columns of W run (in, *kernel)."""
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1]).T[None]
    m: Any = module
    x = _padded(x, m)
    dims, per_group = range(len(m.kernel_size)), m.in_channels // m.groups
    reach = [m.dilation[a] * (m.kernel_size[a] - 1) + 1 for a in dims]
    starts = [range(0, x.shape[2 + a] - reach[a] + 1, m.stride[a]) for a in dims]
    out = []
    for sample in x:
        for corner in itertools.product(*starts):
            window = tuple(slice(corner[a], corner[a] + reach[a], m.dilation[a]) for a in dims)
            out.append(sample[(slice(None), *window)].reshape(m.groups, per_group * int(np.prod(m.kernel_size))))
    return np.stack(out, axis=-1)


def naive(inputs: list[Array], module: nn.Module, samples: int) -> Array:
    """2 X X^T / N + damping, over all calls of the layer."""
    H = sum(2 / samples * X @ X.transpose(0, 2, 1) for X in (patches(x, module) for x in inputs))
    assert isinstance(H, np.ndarray)
    means = np.diagonal(H, axis1=1, axis2=2).mean(axis=1)
    return H + DAMPING * means[:, None, None] * np.eye(H.shape[-1])


def check(model: nn.Module, batches: list[Any], recorded: dict[str, list[str]] | None = None) -> Statistics:
    """Calibrate, and compare every layer that was reached with what hooks of this test saw of its inputs.

    `recorded` maps a layer to the modules whose inputs count for it, where these are not just the module of that name.
    """
    seen: dict[str, list[Array]] = {}

    def remember(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            seen.setdefault(name, []).append(args[0].detach().numpy().astype(np.float64))

        return hook

    handles = [m.register_forward_pre_hook(remember(n)) for n, m in model.named_modules(remove_duplicate=False)]
    with torch.no_grad():
        for batch in batches:
            model.eval()(*batch) if isinstance(batch, tuple) else model.eval()(batch)
    for handle in handles:
        handle.remove()
    stats = calibrate(model, batches, damping=DAMPING, holdout=0)
    samples = sum(len(b[0] if isinstance(b, tuple) else b) for b in batches)
    assert stats.samples == samples
    for name, layer in stats.layers.items():
        inputs = [x for owner in (recorded or {}).get(name, [name]) for x in seen[owner]]
        expected = naive(inputs, model.get_submodule(name), samples)
        assert layer.hessian.dtype == np.float64
        assert layer.calls == len(inputs)
        np.testing.assert_allclose(layer.hessian, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    return stats


def _batches(*shape: int, seed: int = 0, sizes: tuple[int, ...] = (3, 2)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, *shape, generator=generator) + 0.3 for n in sizes]


def test_linear() -> None:
    check(nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)), _batches(7))


def test_linear_on_sequences_counts_samples_not_positions() -> None:
    stats = check(nn.Linear(6, 4), _batches(9, 6))
    assert stats.samples == 5


PADDINGS = [
    pytest.param({"padding": 0}, id="none"),
    pytest.param({"padding": "valid"}, id="valid"),
    pytest.param({"padding": 2}, id="two"),
    pytest.param({"padding": "same"}, id="same"),
    pytest.param({"padding": "same", "kernel_size": 4}, id="same, even kernel"),
    pytest.param({"padding": "same", "dilation": 2, "padding_mode": "reflect"}, id="same, reflect, dilated"),
    pytest.param({"padding": 2, "padding_mode": "reflect"}, id="reflect"),
    pytest.param({"padding": 2, "padding_mode": "circular"}, id="circular"),
    pytest.param({"padding": 2, "padding_mode": "replicate"}, id="replicate"),
    pytest.param({"padding": "same", "padding_mode": "circular", "kernel_size": 2}, id="same, circular, even kernel"),
    pytest.param({"stride": 2, "padding": 1}, id="stride"),
    pytest.param({"stride": 3, "dilation": 2, "padding": 1}, id="stride and dilation"),
    pytest.param({"kernel_size": 1}, id="kernel of one"),
    pytest.param({"kernel_size": 1, "stride": 2}, id="kernel of one, stride"),
]


@pytest.mark.parametrize("options", PADDINGS)
@pytest.mark.parametrize("groups", [1, 2, 4], ids=["one group", "two groups", "depthwise"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions(dims: int, groups: int, options: dict[str, Any]) -> None:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    layer: nn.Module = kind(4, 4, **{"kernel_size": 3, "groups": groups, **options})
    check(layer, _batches(4, *(7, 6, 5)[:dims], sizes=(2, 1)))


def test_a_different_size_option_per_axis() -> None:
    layer = nn.Conv2d(3, 2, kernel_size=(3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1))
    check(layer, _batches(3, 9, 8))
    check(nn.Conv2d(3, 2, (2, 5), padding="same", padding_mode="replicate"), _batches(3, 9, 8))


def test_the_matrix_multiplies_the_patches() -> None:
    """The unfolding of this file is right itself: W X is what the layer puts out."""
    layer = nn.Conv2d(6, 4, 3, stride=2, padding=1, padding_mode="circular", groups=2, bias=False).double()
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    W = layer.weight.detach().numpy().reshape(2, 2, -1)
    out = layer(x).detach().movedim(1, 0).reshape(2, 2, -1).numpy()
    np.testing.assert_allclose(W @ patches(x.numpy(), layer), out, atol=1e-12)


def test_more_samples_than_one_chunk_holds(monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr(grams, "IN_FLIGHT", 100)
    monkeypatch.setattr(grams, "POSITIONS", 1)
    monkeypatch.setattr(grams, "PANEL", 5)
    check(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(100, 3)), _batches(3, 5, 5))
    check(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1, padding=1)), _batches(3, 5, 4))
    check(nn.Conv3d(3, 4, 1), _batches(3, 2, 3, 4))


@pytest.mark.parametrize("kernel", [3, (3, 1), (1, 3)], ids=str)
@pytest.mark.parametrize("size", [(7, 6), (2, 3), (3, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("chunks", ["one chunk", "a chunk per sample"])
def test_convolutions_by_correlation(
    kernel: Any, size: tuple[int, int], chunks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grams, "LEAST_CHANNELS", 3)
    if chunks != "one chunk":
        monkeypatch.setattr(grams, "IN_FLIGHT", 1)
        monkeypatch.setattr(grams, "POSITIONS", 1)
    layer = nn.Conv2d(3, 2, kernel, padding="same")
    assert grams._correlates(layer, torch.zeros(1, 3, *size))
    check(layer, _batches(3, *size))
    padding: Any = tuple(k // 2 for k in layer.kernel_size)
    check(nn.Conv2d(3, 2, kernel, padding=padding), _batches(3, *size))


def test_taps_that_meet_no_pixel_are_dead_by_correlation_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grams, "LEAST_CHANNELS", 3)
    monkeypatch.setattr(grams, "IN_FLIGHT", 1)  # sums over samples one by one, and over all at once, round differently
    monkeypatch.setattr(grams, "POSITIONS", 1)
    stats = check(nn.Conv2d(3, 2, 3, padding=1), _batches(3, 1, 1, sizes=(40, 31)))
    assert next(iter(stats.layers.values())).dead == 3 * 8


@pytest.mark.parametrize("options", PADDINGS)
@pytest.mark.parametrize("groups", [1, 4], ids=["one group", "depthwise"])
def test_what_correlation_cannot_do_is_unfolded(
    groups: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grams, "LEAST_CHANNELS", 4)
    layer = nn.Conv2d(4, 4, **{"kernel_size": 3, "groups": groups, **options})
    assert grams._correlates(layer, torch.zeros(1, 4, 7, 6)) == (options == {"padding": "same"} and groups == 1)
    check(layer, _batches(4, 7, 6))


class Twice(nn.Module):
    """One layer, called on its input and on its own output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.relu(self.layer(x)))


def test_a_layer_that_is_called_twice_sums_its_calls() -> None:
    stats = check(Twice(), _batches(5))
    assert stats.layers["layer"].calls == 4


class Branches(nn.Module):
    """Three layers on one input, which one of them sees after it was changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.late = nn.Linear(5, 4), nn.Linear(5, 3), nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        out = torch.cat([self.query(x), self.key(x)], dim=1)
        x.mul_(3.0).add_(1.0)
        return torch.cat([out, self.late(x)], dim=1)


def test_layers_that_share_an_input_share_a_hessian_until_it_changes() -> None:
    stats = calibrate(Branches(), _batches(5), holdout=0)
    x = torch.cat(_batches(5)).numpy().astype(np.float64)
    query, key, late = (stats.layers[n].hessian for n in ("query", "key", "late"))
    np.testing.assert_allclose(query, naive([x], nn.Linear(5, 1), 5), rtol=1e-5)
    np.testing.assert_array_equal(query, key)
    np.testing.assert_allclose(late, naive([3 * x + 1], nn.Linear(5, 1), 5), rtol=1e-5)


def test_the_same_input_unfolded_in_two_ways() -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.near, self.far = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=2, dilation=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.near(x) + self.far(x)

    stats = check(Pyramid(), _batches(2, 6, 6))
    assert not np.array_equal(stats.layers["near"].hessian, stats.layers["far"].hessian)


class Tied(nn.Module):
    """Two modules, one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def test_tied_weights_are_one_layer_that_sees_both_inputs() -> None:
    stats = check(Tied(), _batches(4), recorded={"first": ["first", "second"]})
    assert list(stats.layers) == ["first"]


def test_dead_inputs_are_counted_and_keep_the_damping() -> None:
    batches = _batches(6)
    for batch in batches:
        batch[:, [1, 4]] = 0.0
    stats = check(nn.Linear(6, 3), batches)
    layer = stats.layers[""]
    assert layer.dead == 2
    H = layer.hessian[0]
    undamped_mean = np.trace(H) / 6 / (1 + DAMPING)
    assert H[1, 1] == pytest.approx(DAMPING * undamped_mean)
    assert not H[1, [0, 2, 3, 4, 5]].any()


def test_a_layer_whose_inputs_are_all_zero_measures_the_weights_themselves() -> None:
    stats = calibrate(nn.Linear(4, 2), [torch.zeros(3, 4)], holdout=0)
    np.testing.assert_array_equal(stats.layers[""].hessian[0], np.eye(4))
    assert stats.layers[""].dead == 4


def test_layers_that_are_never_reached_are_named() -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 2), "spare": nn.Linear(4, 2)})
    model.forward = lambda x: model["used"](x)
    stats = calibrate(model, _batches(4), holdout=0)
    assert set(stats.layers) == {"used"}
    assert stats.unreached == ("spare",)


def test_pairs_of_inputs_and_labels_and_dicts_give_the_same() -> None:
    model, batches = nn.Linear(4, 2), _batches(4)
    plain = calibrate(model, batches, holdout=0)
    pairs = calibrate(model, [[b, torch.zeros(len(b), dtype=torch.long)] for b in batches], holdout=0)
    named = calibrate(model, [{"input": b} for b in batches], holdout=0)
    for other in (pairs, named):
        np.testing.assert_array_equal(other.layers[""].hessian, plain.layers[""].hessian)


def test_moments_of_the_output_are_per_channel() -> None:
    model, batches = nn.Conv2d(3, 5, 3), _batches(3, 6, 6)
    stats = calibrate(model, batches, holdout=0)
    with torch.no_grad():
        out = model(torch.cat(batches)).double().movedim(1, 0).reshape(5, -1).numpy()
    np.testing.assert_allclose(stats.layers[""].mean, out.mean(axis=1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stats.layers[""].var, out.var(axis=1), rtol=1e-5)


def test_the_order_of_the_batches_hardly_matters_and_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    batches = _batches(4, sizes=(4, 3, 5))
    one, two = (calibrate(model, b, holdout=0) for b in (batches, batches[::-1]))
    for name in one.layers:
        np.testing.assert_allclose(one.layers[name].hessian, two.layers[name].hessian, rtol=1e-10, atol=1e-12)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_slice_of_the_data_is_held_out_by_the_seed() -> None:
    model, batches = nn.Linear(4, 2), _batches(4, sizes=(2,) * 10)
    everything = calibrate(model, batches, holdout=0)
    one, same, other = (ac.calibrate(model, batches, seed=s) for s in (1, 1, 2))
    assert (everything.samples, one.samples) == (20, 16)
    np.testing.assert_array_equal(one.layers[""].hessian, same.layers[""].hessian)
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert set(one.seen) < set(everything.seen)


def test_statistics_survive_a_file(tmp_path: Path) -> None:
    stats = calibrate(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2)), _batches(2, 4, 4), holdout=0)
    stats.save(tmp_path / "stats.npz")
    again = Statistics.load(tmp_path / "stats.npz")
    assert again.fingerprint == stats.fingerprint
    assert (again.samples, again.damping, again.unreached, again.seen) == (5, DAMPING, (), stats.seen)
    for name, layer in stats.layers.items():
        for field in ("hessian", "mean", "var", "calls", "dead"):
            np.testing.assert_array_equal(getattr(again.layers[name], field), getattr(layer, field))
    (tmp_path / "noise.npz").write_bytes(b"PK not really")
    with pytest.raises(MismatchError, match="does not hold statistics"):
        Statistics.load(tmp_path / "noise.npz")


def test_weights_of_rows_survive_a_file(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 3))
    stats = calibrate(model, [torch.tensor([[0, 1], [1, 3]])], holdout=0)
    stats.save(tmp_path / "stats.npz")
    again = Statistics.load(tmp_path / "stats.npz")
    np.testing.assert_array_equal(again.layers["0"].row_weights, [1.5, 2.5, 0.5, 1.5, 0.5, 0.5])
    assert again.layers["0"].hessian.shape == (0, 4, 4)
    assert again.layers["1"].row_weights is None


def test_refusals_name_the_layer_or_the_batch() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(CalibrationError, match="no batches"):
        calibrate(model, [])
    with pytest.raises(CalibrationError, match=r"float32 \(2, 5\)"):
        calibrate(model, [torch.zeros(2, 5)], holdout=0)
    with pytest.raises(CalibrationError, match="layer '0' receives values that are NaN"):
        calibrate(model, [torch.full((2, 4), torch.nan)], holdout=0)
    nn.init.constant_(model[0].get_parameter("bias"), 1e30)
    with pytest.raises(CalibrationError, match=r"layer '[01]' "):
        calibrate(model, [torch.ones(2, 4)], holdout=0)
