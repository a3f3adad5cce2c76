"""SynFlow against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from autocompress.errors import LayerError
from autocompress.synflow import synflow_densities


def linear(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7, bias=False), nn.ReLU(), nn.Linear(7, 3, bias=False))


def test_one_round_keeps_the_weights_of_largest_flow() -> None:
    """Two layers by hand: the flow through A_ij is |A_ij| Σ_k |B_ki|, through B_ki |B_ki| Σ_j |A_ij|."""
    model = linear()
    A, B = (model.get_parameter(f"{i}.weight").detach().double().abs().numpy() for i in (0, 2))
    flows = [A * B.sum(axis=0)[:, None], B * A.sum(axis=1)[None]]
    every = np.sort(np.concatenate([f.ravel() for f in flows]))[::-1]
    kept = round(0.4 * every.size)
    wanted = [float((f >= every[kept - 1]).mean()) for f in flows]
    found = synflow_densities(model, torch.randn(2, 5), ["0.weight", "2.weight"], 0.4, rounds=1)
    assert found[0] == {"0.weight": 1.0, "2.weight": 1.0}
    assert list(found[1].values()) == wanted


def test_rounds_go_down_to_the_density_and_no_layer_is_lost() -> None:
    model = linear()
    found = synflow_densities(model, torch.randn(2, 5), ["0.weight", "2.weight"], 0.1, rounds=30)
    sizes = np.array([35, 21])
    kept = [round(float(sizes @ list(each.values()))) for each in found]
    wanted = [max(1, round(56 * 0.1 ** (k / 30))) for k in range(31)]
    assert kept[:10] == wanted[:10]
    # Weights on no path any more go too.
    assert all(k <= w for k, w in zip(kept, wanted, strict=True))
    # What one shot at this density does not promise, the rounds do: a path is left (its theorem 3).
    assert min(found[-1].values()) > 0.0
    # Later rounds see what earlier ones took.
    assert found[-1] != synflow_densities(model, torch.randn(2, 5), ["0.weight", "2.weight"], 0.1, rounds=1)[-1]


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2)).train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    synflow_densities(model, torch.randn(3, 1, 4, 4), ["0.weight", "3.weight"], 0.5, rounds=3)
    assert model.training
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])
        assert tensor.dtype == before[key].dtype


def test_what_has_no_flow_is_refused() -> None:
    model = linear()
    nn.init.zeros_(model.get_parameter("2.weight"))
    with pytest.raises(LayerError, match="SynFlow's measure of Sequential is 0 after 0 rounds"):
        synflow_densities(model, torch.randn(2, 5), ["0.weight"], 0.5)
    with pytest.raises(LayerError, match="the example holds no floating-point tensor"):
        synflow_densities(linear(), torch.zeros(2, 5, dtype=torch.long), ["0.weight"], 0.5)
