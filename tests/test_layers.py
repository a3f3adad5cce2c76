"""What counts as a layer, what a file holds, and how long the dense file is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from networks import ConvNet, seeded
from safetensors.torch import save as safetensors_bytes
from torch import nn

from autocompress import digits
from autocompress.errors import LayerError
from autocompress.layers import dense_file_bytes, find_layers, model_digest, stored_tensors, swapped_shape


class Tied(nn.Module):
    """An embedding whose weight is the head's, two linear layers on one weight, and a layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight
        self.third = nn.Linear(6, 6)
        self.again = self.third

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.again(self.third(self.second(self.first(self.embedding(x))))))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.attention(x, x, x)[0])


class Mixed(nn.Module):
    """Buffers of several kinds beside the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("table", torch.arange(5))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("nothing", torch.zeros(0))
        self.register_buffer("hidden", torch.zeros(3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(x)) * self.scale


MODELS: dict[str, Any] = {
    "linear": lambda: nn.Linear(5, 3),
    "convolutions": ConvNet,
    "tied": Tied,
    "attention": Attention,
    "mixed": Mixed,
    "digits": digits.DigitsNet,
    "half": lambda: ConvNet().half(),
    "bfloat16": lambda: ConvNet().bfloat16(),
    "double": lambda: ConvNet().double(),
    "names": lambda: nn.ModuleDict({'quo"te': nn.Linear(2, 2), "überall": nn.Linear(2, 2), "tab\t": nn.Linear(1, 1)}),
    "many": lambda: nn.Sequential(*(nn.Linear(3, 3) for _ in range(101))),
}


@pytest.mark.parametrize("name", MODELS)
def test_dense_file_is_as_long_as_safetensors_makes_it(name: str) -> None:
    model = seeded(MODELS[name])
    floats = {}
    seen = set()
    for key, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and id(tensor) not in seen:
            seen.add(id(tensor))
            floats[key] = tensor.detach().float().contiguous().clone()
    assert dense_file_bytes(model) == len(safetensors_bytes(floats))


CONVOLUTIONS = [
    (nn.Conv1d(6, 4, 3), (1, 4, 18)),
    (nn.Conv1d(6, 4, 3, groups=2), (2, 2, 9)),
    (nn.Conv2d(6, 4, (3, 2)), (1, 4, 36)),
    (nn.Conv2d(6, 6, 3, groups=6), (6, 1, 9)),
    (nn.Conv3d(2, 4, (1, 2, 3), groups=2), (2, 2, 6)),
    (nn.Linear(6, 4), (1, 4, 6)),
]


@pytest.mark.parametrize(("module", "shape"), CONVOLUTIONS, ids=lambda value: str(value))
def test_a_layer_is_one_matrix_per_group(module: Any, shape: tuple[int, int, int]) -> None:
    (layer,) = find_layers(nn.Sequential(module))
    assert (layer.name, layer.key, layer.matrix_shape) == ("0", "0.weight", shape)
    matrix = layer.matrix(module.weight)
    assert matrix.dtype == np.float64
    assert layer.size == module.weight.numel()
    # Row r of group g is output channel g * rows + r.
    expected = module.weight.detach().numpy().reshape(shape[0] * shape[1], shape[2])
    np.testing.assert_array_equal(matrix.reshape(-1, shape[2]), expected)


def test_a_bare_layer_has_an_empty_name() -> None:
    (layer,) = find_layers(nn.Linear(3, 2))
    assert (layer.name, layer.key) == ("", "weight")


def test_tied_weights_are_one_layer_also_where_one_use_is_a_table() -> None:
    layers = find_layers(Tied())
    assert [(x.name, x.owners) for x in layers] == [
        ("embedding", ("embedding", "head")),
        ("first", ("first", "second")),
        ("third", ("third",)),
    ]
    assert layers.skipped == {}
    with pytest.raises(LayerError, match=r"no layer 'head'; the layers are embedding, first, third"):
        layers["head"]


def test_a_weight_shared_by_different_kinds_is_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1, groups=1), nn.Conv2d(8, 4, 1, groups=2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    layers = find_layers(model)
    assert [x.name for x in layers] == ["2"]
    assert layers.skipped["0"] == "its weight is shared by different kinds of layers: 0, 1"


def test_a_weight_that_another_module_holds_is_left_alone() -> None:
    first: Any = nn.Linear(3, 3)
    model = nn.Sequential(first, nn.Linear(3, 3))
    model.register_parameter("alias", first.weight)
    assert find_layers(model).skipped == {"0": "its weight is also used as alias"}


@pytest.mark.parametrize("kind", ["parametrizations", "old"])
def test_a_computed_weight_is_left_alone(kind: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    if kind == "old":
        with pytest.warns(FutureWarning):
            nn.utils.weight_norm(model[0])
    else:
        nn.utils.parametrizations.weight_norm(model[0])
    layers = find_layers(model)
    assert [x.name for x in layers] == ["1"]
    assert "computed from other parameters" in layers.skipped["0"]


INSIDE = [
    (nn.MultiheadAttention(8, 2), {"m.in_proj_weight": (3, 8, 8), "m.out_proj": (1, 8, 8)}),
    (
        nn.MultiheadAttention(8, 2, kdim=4, vdim=6),
        {
            "m.q_proj_weight": (1, 8, 8),
            "m.k_proj_weight": (1, 8, 4),
            "m.v_proj_weight": (1, 8, 6),
            "m.out_proj": (1, 8, 8),
        },
    ),
    (
        nn.LSTM(5, 3, 2, proj_size=2),
        {
            "m.weight_ih_l0": (1, 12, 5),
            "m.weight_hh_l0": (1, 12, 2),
            "m.weight_hr_l0": (1, 2, 3),
            "m.weight_ih_l1": (1, 12, 2),
            "m.weight_hh_l1": (1, 12, 2),
            "m.weight_hr_l1": (1, 2, 3),
        },
    ),
    (
        nn.GRU(5, 3, bidirectional=True),
        {
            "m.weight_ih_l0": (1, 9, 5),
            "m.weight_hh_l0": (1, 9, 3),
            "m.weight_ih_l0_reverse": (1, 9, 5),
            "m.weight_hh_l0_reverse": (1, 9, 3),
        },
    ),
    (nn.RNNCell(5, 3), {"m.weight_ih": (1, 3, 5), "m.weight_hh": (1, 3, 3)}),
    (nn.Embedding(7, 4), {"m": (1, 7, 4)}),
    (nn.EmbeddingBag(7, 4), {"m": (1, 7, 4)}),
]


@pytest.mark.parametrize(("module", "expected"), INSIDE, ids=lambda value: type(value).__name__)
def test_weights_inside_a_module_have_its_name_and_theirs(module: nn.Module, expected: dict[str, Any]) -> None:
    layers = find_layers(nn.ModuleDict({"m": module}))
    assert {x.name: x.matrix_shape for x in layers} == expected
    assert layers.skipped == {}
    for layer in layers:
        weight = module.get_parameter(layer.key.removeprefix("m."))
        np.testing.assert_array_equal(layer.matrix(weight).reshape(layer.shape), weight.detach().double().numpy())


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_transposed_convolution_is_stored_by_its_outputs(dims: int, groups: int) -> None:
    kind: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    module = kind(6, 4, (3, 2, 1)[:dims], groups=groups)
    (layer,) = find_layers(nn.Sequential(module))
    kernel = (3, 2, 1)[:dims]
    assert layer.stored_shape == (4, 6 // groups, *kernel)
    assert layer.matrix_shape == (groups, 4 // groups, 6 // groups * int(np.prod(kernel)))
    weight = module.weight.detach().numpy()
    stored = layer.matrix(weight).reshape(layer.stored_shape)
    for out in range(4):
        g, o = divmod(out, 4 // groups)
        for i in range(6 // groups):
            np.testing.assert_array_equal(stored[out, i], weight[g * (6 // groups) + i, o])
    np.testing.assert_array_equal(layer.unmatrix(stored), weight)
    assert swapped_shape(layer.stored_shape, groups) == layer.shape


class Positions(nn.Embedding):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + 2)


LEFT_ALONE = {
    "Bilinear is not supported": nn.Bilinear(3, 3, 2),
    "(max_norm)": nn.Embedding(5, 3, max_norm=1.0),
    "the maximum over a bag is not linear": nn.EmbeddingBag(5, 3, mode="max"),
    "it has a forward of its own": Positions(5, 3),
}


@pytest.mark.parametrize("words", LEFT_ALONE)
def test_what_is_left_alone_has_a_reason(words: str) -> None:
    layers = find_layers(nn.ModuleDict({"odd": LEFT_ALONE[words], "fine": nn.Linear(2, 2)}))
    assert [x.name for x in layers] == ["fine"]
    assert words in layers.skipped["odd"]


def test_a_table_whose_weight_something_strange_uses_too_is_left_alone() -> None:
    model = nn.ModuleDict({"a": nn.Embedding(5, 3), "b": Positions(5, 3), "fine": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    assert [x.name for x in find_layers(model)] == ["fine"]
    assert find_layers(model).skipped["a"] == "its weight is also used as b.weight"


def test_an_empty_weight_is_left_alone() -> None:
    with pytest.warns(UserWarning, match="zero-element"):
        model = nn.Sequential(nn.Linear(0, 3), nn.Linear(3, 2))
    assert find_layers(model).skipped == {"0": "its weight is empty"}


def test_nothing_to_compress_says_why() -> None:
    with pytest.raises(LayerError, match=r"nothing to compress \(it has no layer with a weight matrix\)"):
        find_layers(nn.Sequential(nn.ReLU()))
    with pytest.raises(LayerError, match=r"nothing to compress .*Bilinear is not supported"):
        find_layers(nn.Bilinear(3, 3, 2))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_name_the_layer(value: float) -> None:
    model = ConvNet()
    with torch.no_grad():
        model.conv2.weight[1, 0, 0, 0] = value
    with pytest.raises(LayerError, match="layer 'conv2' has weights that are NaN or infinite"):
        find_layers(model)


def test_stored_tensors_are_those_of_a_file() -> None:
    assert list(stored_tensors(Tied())) == [
        "embedding.weight",
        "first.weight",
        "first.bias",
        "third.weight",
        "third.bias",
    ]
    names = list(stored_tensors(Mixed()))
    assert "norm.num_batches_tracked" not in names
    assert "hidden" not in names
    assert {"table", "mask", "nothing", "scale", "norm.running_var"} <= set(names)


def test_stored_tensors_are_the_models_own_memory() -> None:
    model = nn.Linear(2, 2)
    stored_tensors(model)["bias"].fill_(3.0)
    assert model.bias.tolist() == [3.0, 3.0]


class Stateful(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"calls": 3}

    def set_extra_state(self, state: Any) -> None: ...


def test_state_that_a_file_cannot_hold_is_refused_by_name() -> None:
    with pytest.raises(LayerError, match=r"the state '0._extra_state' is a dict; a file holds tensors only"):
        stored_tensors(nn.Sequential(Stateful(2, 2)))
    model = nn.Linear(2, 2)
    model.register_buffer("phases", torch.zeros(2, dtype=torch.complex64))
    for function in (stored_tensors, model_digest):
        with pytest.raises(LayerError, match="'phases' is complex64; a file holds dense real tensors only"):
            function(model)


def test_the_digest_tells_weights_buffers_and_types_apart() -> None:
    model = seeded(Mixed)
    digests = {model_digest(model)}
    for key in ("linear.weight", "norm.running_mean", "table", "mask"):
        tensor = model.state_dict()[key]
        before = tensor.clone()
        tensor.view(-1)[0] = 1 - int(before.view(-1)[0])
        digests.add(model_digest(model))
        tensor.copy_(before)
    digests.add(model_digest(seeded(Mixed).double()))
    assert len(digests) == 6
    assert model_digest(model) in digests
    assert model_digest(seeded(Mixed)) == model_digest(model)
