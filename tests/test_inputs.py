"""What weights multiply inside modules, against the error that it has to predict: for any change ΔW of a weight,
½ tr(ΔW H ΔWᵀ) + ½ Σ_r c_r |ΔW_r|² is the mean squared change of what the weight puts out.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from networks import seeded
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

from autocompress.calibration import FLOOR, Statistics, calibrate
from autocompress.inputs import recurrent_inputs
from autocompress.layers import find_layers


def batches(*shape: int, sizes: tuple[int, ...] = (3, 2), seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, *shape, generator=generator) + 0.3 for n in sizes]


def change(model: nn.Module, name: str, seed: int = 0) -> torch.Tensor:
    weight = model.get_parameter(find_layers(model)[name].key)
    return torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def predicted(model: nn.Module, stats: Statistics, name: str, delta: torch.Tensor) -> float:
    """The error of a change by the statistics, without what the floor of rows adds."""
    layer, found = find_layers(model)[name], stats.layers[name]
    d = layer.matrix(delta)
    error = sum(0.5 * np.trace(d[g] @ h @ d[g].T) for g, h in enumerate(found.hessian))
    if found.row_weights is not None:
        weights = found.row_weights - 2.0 * FLOOR / stats.samples
        error += 0.5 * float(weights @ (d[0] ** 2).sum(axis=1))
    return float(error)


def measured(model: nn.Module, data: list[Any], name: str, delta: torch.Tensor) -> float:
    """Mean over samples of the squared change of a model's output that ΔW makes, in float64."""
    before = copy.deepcopy(model).double()
    after = copy.deepcopy(before)
    with torch.no_grad():
        after.get_parameter(find_layers(model)[name].key).add_(delta)
        total = samples = 0.0
        for batch in data:
            given = batch if isinstance(batch, dict) else {"input": batch}
            given = {k: t.double() if t.is_floating_point() else t for k, t in given.items()}
            total += float((after(**given) - before(**given)).square().sum())
            samples += len(given["input"])
    return total / samples


def calibrated(model: nn.Module, data: list[Any]) -> Statistics:
    return calibrate(model, data, damping=0.0, holdout=0)


def check(model: nn.Module, data: list[Any], name: str) -> None:
    delta = change(model, name)
    assert predicted(model, calibrated(model, data), name, delta) == pytest.approx(
        measured(model, data, name, delta), rel=1e-5
    )


TRANSPOSED = [
    {},
    {"stride": 2},
    {"stride": 2, "padding": 1, "output_padding": 1},
    {"stride": 3, "padding": 2, "dilation": 2},
    {"padding": 2},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": 4, "stride": 2, "padding": 3},
]


@pytest.mark.parametrize("options", TRANSPOSED, ids=str)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_transposed_convolutions(dims: int, groups: int, options: dict[str, Any]) -> None:
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    model = seeded(lambda: kind(4, 6, **{"kernel_size": 3, "groups": groups, **options}))
    check(model, batches(4, *(5, 4, 3)[:dims]), "")


def test_transposed_convolutions_with_an_option_per_axis_and_no_batch() -> None:
    model = seeded(lambda: nn.ConvTranspose2d(3, 2, (3, 2), stride=(1, 3), padding=(2, 0), dilation=(2, 1)))
    check(model, batches(3, 6, 5), "")
    one = batches(3, 6, 5)[0][0]
    np.testing.assert_allclose(
        calibrated(model, [one]).layers[""].hessian * 3, calibrated(model, [one[None]]).layers[""].hessian, rtol=1e-6
    )


def tokens(rows: int, *shape: int, sizes: tuple[int, ...] = (4, 3)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, rows, (n, *shape), generator=generator) for n in sizes]


def test_rows_of_an_embedding_weigh_what_they_are_used() -> None:
    model, data = seeded(lambda: nn.Embedding(9, 4)), tokens(7, 5)
    check(model, data, "")
    found = calibrated(model, data)
    uses = torch.cat([t.flatten() for t in data]).bincount(minlength=9).numpy()
    weights = found.layers[""].row_weights
    assert weights is not None
    np.testing.assert_allclose(weights, 2 * (uses + 0.5) / 7)
    assert found.layers[""].hessian.shape == (0, 4, 4)
    assert found.layers[""].dead == 2 == int((uses == 0).sum())
    assert (weights[uses == 0] > 0).all(), "words that calibration never saw keep a floor"


def bags() -> Iterator[Any]:
    plain = tokens(4, 3)
    flat = torch.tensor([0, 1, 1, 2, 3, 0, 2])
    weighted = {"input": plain[0], "per_sample_weights": torch.rand(4, 3, generator=torch.Generator().manual_seed(1))}
    yield pytest.param({"mode": "sum"}, plain, id="sum")
    yield pytest.param({"mode": "mean"}, plain, id="mean")
    yield pytest.param({"mode": "mean", "padding_idx": 1}, plain, id="mean, padding")
    yield pytest.param({"mode": "sum", "padding_idx": 1}, [weighted], id="sum, padding, weights")
    yield pytest.param({"mode": "mean"}, [{"input": flat, "offsets": torch.tensor([0, 3, 3])}], id="offsets, one empty")
    ends = {"input": flat, "offsets": torch.tensor([0, 2, 7])}
    yield pytest.param({"include_last_offset": True}, [ends], id="last offset")


@pytest.mark.parametrize(("options", "data"), bags())
def test_bags_are_exact_where_the_changes_of_tokens_are_orthogonal(options: Any, data: list[Any]) -> None:
    model = seeded(lambda: nn.EmbeddingBag(4, 6, **options))
    delta = torch.linalg.qr(change(model, "").T)[0].T * torch.tensor([[1.0], [2.0], [3.0], [0.5]]).double()
    assert predicted(model, calibrated(model, data), "", delta) == pytest.approx(
        measured(model, data, "", delta), rel=1e-5
    )


class Tied(nn.Module):
    """A table that is the output head too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(8, 5), nn.Linear(5, 8, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.embed(x)))


def test_a_tied_table_has_the_errors_of_both_uses() -> None:
    model: Any = seeded(Tied)
    data = tokens(6, 5)
    delta = change(model, "embed")
    embed, head = nn.Embedding.from_pretrained(model.embed.weight), nn.Linear(5, 8, bias=False)
    head.weight = model.head.weight
    inner = [torch.tanh(model.embed(x)).detach() for x in data]
    both = measured(embed, data, "", delta) + measured(head, inner, "", delta)
    stats = calibrated(model, data)
    assert predicted(model, stats, "embed", delta) == pytest.approx(both, rel=1e-5)
    assert stats.layers["embed"].hessian.shape == (1, 5, 5)


class Cross(nn.Module):
    """Attention whose query, key and value are three inputs, of which some may be the same."""

    def __init__(self, same: bool, **options: Any) -> None:
        super().__init__()
        self.attention, self.same = nn.MultiheadAttention(8, 2, **options), same
        masked = torch.rand(5, 5, generator=torch.Generator().manual_seed(3)) < 0.3
        self.register_buffer("mask", masked & ~torch.eye(5, dtype=torch.bool))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.same:
            return self.attention(x, x, x, attn_mask=self.mask, need_weights=False)[0]
        m = self.attention
        return m(query=x, value=torch.sin(x)[..., : m.vdim], key=torch.cos(x)[..., : m.kdim])[0]


def seen_by_linear(model: nn.Module, data: list[Any], weights: dict[str, torch.Tensor]) -> dict[str, list[Any]]:
    """Everything that `F.linear` multiplied with (parts of) weights: (input, which rows of the weight)."""
    found: dict[str, list[Any]] = {name: [] for name in weights}
    original = F.linear

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
        for name, whole in weights.items():
            offset = (weight.data_ptr() - whole.data_ptr()) // whole.element_size()
            if 0 <= offset < whole.numel():
                first = offset // whole.shape[1]
                found[name].append((x.reshape(-1, x.shape[-1]).double(), slice(first, first + len(weight))))
        return original(x, weight, bias)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(F, "linear", linear)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            for batch in data:
                model(batch)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    return found


ATTENTION = {
    "self": lambda: Cross(True, batch_first=True),
    "self, time first": lambda: Cross(True),
    "no bias": lambda: Cross(True, bias=False, batch_first=True),
    "bias for keys, a zero more": lambda: Cross(True, add_bias_kv=True, add_zero_attn=True, batch_first=True),
    "three inputs": lambda: Cross(False, batch_first=True),
    "three widths": lambda: Cross(False, kdim=6, vdim=4),
    "encoder": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2, enable_nested_tensor=False
    ),
    "decoder": lambda: Decoder(),
}


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(8, 2, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x, torch.tanh(x))


@pytest.mark.parametrize("case", ATTENTION)
def test_projections_of_attention(case: str) -> None:
    model, data = seeded(ATTENTION[case]), batches(5, 8, sizes=(5, 5))
    layers = find_layers(model)
    stats = calibrated(model, data)
    assert stats.unreached == ()
    assert torch.backends.mha.get_fastpath_enabled()
    seen = seen_by_linear(model, data, {x.name: model.get_parameter(x.key) for x in layers})
    assert {name.rpartition(".")[2] for name in seen} >= {"out_proj"}
    for name, calls in seen.items():
        delta = change(model, name)
        total = sum(float((x @ delta[rows].T).square().sum()) for x, rows in calls) / stats.samples
        assert predicted(model, stats, name, delta) == pytest.approx(total, rel=1e-4), name


def test_a_calibration_that_fails_leaves_attention_as_it_was() -> None:
    model = seeded(lambda: Cross(True, batch_first=True))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(AssertionError, match="expecting embedding dimension of 8"):
        calibrated(model, [torch.zeros(2, 5, 9)])
    assert torch.backends.mha.get_fastpath_enabled()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model(torch.zeros(2, 5, 8))


RECURRENT = {
    "lstm": lambda: nn.LSTM(4, 3),
    "lstm, two layers": lambda: nn.LSTM(4, 3, 2, batch_first=True),
    "lstm, both ways, no bias": lambda: nn.LSTM(4, 3, 2, bidirectional=True, bias=False),
    "lstm, projected": lambda: nn.LSTM(4, 5, 2, proj_size=2, bidirectional=True, batch_first=True),
    "gru": lambda: nn.GRU(4, 3, 2, bidirectional=True, dropout=0.5),
    "tanh": lambda: nn.RNN(4, 3, 2),
    "relu": lambda: nn.RNN(4, 3, nonlinearity="relu", bidirectional=True, batch_first=True),
}


def layer_by_layer(module: Any, sequence: Any, hidden: Any) -> dict[str, torch.Tensor]:
    """What each weight multiplies, from the outputs of torch's own one-layer modules: weight_hh gets the output of the
    step before, and the states at first.
    """
    directions, width = 1 + module.bidirectional, module.proj_size or module.hidden_size
    found = {}
    for layer in range(module.num_layers):
        wide = module.input_size if layer == 0 else directions * width
        options = {"proj_size": module.proj_size} if module.proj_size else {}
        options |= {"nonlinearity": module.nonlinearity} if isinstance(module, nn.RNN) else {}
        one = type(module)(wide, module.hidden_size, bias=module.bias, bidirectional=module.bidirectional, **options)
        for name in one._flat_weights_names:
            one.get_parameter(name).data.copy_(module.get_parameter(name.replace("l0", f"l{layer}")))
        part = slice(layer * directions, (layer + 1) * directions)
        states: Any = None
        if hidden is not None:
            states = tuple(h[part] for h in hidden) if isinstance(hidden, tuple) else hidden[part]
        output, _ = one(sequence, states)
        first = states[0] if isinstance(states, tuple) else states
        for direction in range(directions):
            suffix = f"_l{layer}" + ("_reverse" if direction else "")
            own = output[..., direction * width : (direction + 1) * width]
            start = torch.zeros(own.shape[1], width) if first is None else first[direction]
            own = torch.cat([own[1:], start[None]]) if direction else torch.cat([start[None], own[:-1]])
            found[f"weight_ih{suffix}"], found[f"weight_hh{suffix}"] = sequence, own
        sequence = output.detach()
    return found


def agree(module: Any, found: dict[str, list[torch.Tensor]], wanted: dict[str, list[torch.Tensor]]) -> None:
    for name, parts in wanted.items():
        w = torch.cat([p.reshape(-1, p.shape[-1]) for p in parts])
        (x,) = found[name]
        torch.testing.assert_close(x.T @ x, w.T @ w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("given", [False, True], ids=["from zero", "from given states"])
@pytest.mark.parametrize("case", RECURRENT)
def test_weights_of_recurrent_modules(case: str, given: bool) -> None:
    module: Any = seeded(RECURRENT[case])
    generator = torch.Generator().manual_seed(5)
    time_first = torch.randn(6, 4, 4, generator=generator)
    x = time_first.transpose(0, 1) if module.batch_first else time_first
    layers = module.num_layers * (1 + module.bidirectional)
    h = torch.randn(layers, 4, module.proj_size or module.hidden_size, generator=generator)
    c = torch.randn(layers, 4, module.hidden_size, generator=generator)
    hidden = None if not given else (h, c) if module.mode == "LSTM" else h
    with torch.no_grad():
        found = recurrent_inputs(module, (x, hidden), {})
        agree(module, found, {k: [v] for k, v in layer_by_layer(module, time_first, hidden).items()})
        if module.proj_size:  # the states before the projection: projected, they are the states
            last = f"_l{module.num_layers - 1}"
            out = module(x, hidden)[0].transpose(0, 1).reshape(24, -1)[:, : module.proj_size]
            projected = found[f"weight_hr{last}"][0] @ module.get_parameter(f"weight_hr{last}").T
            torch.testing.assert_close(projected, out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", RECURRENT)
def test_sequences_of_different_lengths(case: str) -> None:
    """A packed batch is its sequences, each by itself."""
    module: Any = seeded(RECURRENT[case])
    generator = torch.Generator().manual_seed(6)
    lengths = (3, 6, 1, 4)
    sequences = [torch.randn(n, 4, generator=generator) for n in lengths]
    layers = module.num_layers * (1 + module.bidirectional)
    h = torch.randn(layers, 4, module.proj_size or module.hidden_size, generator=generator)
    c = torch.randn(layers, 4, module.hidden_size, generator=generator)
    hidden: Any = (h, c) if module.mode == "LSTM" else h
    with torch.no_grad():
        wanted: dict[str, list[torch.Tensor]] = {}
        for i, x in enumerate(sequences):
            mine = (h[:, i : i + 1], c[:, i : i + 1]) if module.mode == "LSTM" else h[:, i : i + 1]
            for name, value in layer_by_layer(module, x[:, None], mine).items():
                wanted.setdefault(name, []).append(value)
        agree(module, recurrent_inputs(module, (pack_sequence(sequences, False), hidden), {}), wanted)


class Reader(nn.Module):
    """Words through a packed LSTM and a cell of its own; the last state is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(12, 5), nn.LSTM(5, 6, batch_first=True, bidirectional=True)
        self.cell, self.head = nn.GRUCell(12, 7), nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        packed = pack_padded_sequence(self.embed(x), torch.arange(len(x)) % 4 + 1, True, enforce_sorted=False)
        y = self.lstm(packed)[0]
        assert isinstance(y, PackedSequence)
        state = self.cell(y.data[: len(x)])
        return self.head(self.cell(input=y.data[-len(x) :], hx=state))


def test_cells_and_modules_that_feed_them() -> None:
    model: Any = seeded(Reader)
    data = tokens(12, 4, sizes=(4, 8))
    stats = calibrated(model, data)
    assert stats.unreached == ()
    inputs: list[Any] = []
    handle = model.cell.register_forward_hook(lambda m, a, k, y: inputs.append((a, k)), with_kwargs=True)
    with torch.no_grad():
        for batch in data:
            model(batch)
    handle.remove()
    xs = torch.cat([a[0] if a else k["input"] for a, k in inputs]).double()
    hs = torch.cat([k["hx"] for _, k in inputs if "hx" in k]).double()
    for name, values in (("cell.weight_ih", xs), ("cell.weight_hh", hs)):
        delta = change(model, name)
        total = float((values @ delta.T).square().sum()) / stats.samples
        assert predicted(model, stats, name, delta) == pytest.approx(total, rel=1e-5)
    assert stats.layers["cell.weight_hh"].calls == 4
