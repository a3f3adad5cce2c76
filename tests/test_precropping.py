"""PreCropping: exact budgets on real networks, brute force over widths, initialisation, and what it refuses."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_tasks import write_task
from torch import Tensor, nn
from torch.nn import functional as F

import autocompress as ac
from autocompress.calibration import calibrate, positions_of
from autocompress.errors import BudgetError, InfeasibleError, LayerError, TaskError
from autocompress.layers import dense_file_bytes
from autocompress.narrowing import reshape_to
from autocompress.precropping import METHODS, Structure, count_macs, count_params, precrop
from autocompress.tasks import load_task

IMAGE = torch.zeros(1, 3, 8, 8)


@pytest.fixture(autouse=True)
def same_weights() -> Iterator[None]:
    """Networks here draw their weights; now and then those leave a group of channels that nothing can be proven of."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


class Chain(nn.Sequential):
    """Convolutions with norms, 2 x 2 pixels flattened, two linear layers."""

    def __init__(self, first: int = 8, second: int = 12, third: int = 10) -> None:
        super().__init__(
            nn.Conv2d(3, first, 3, padding=1, bias=False),
            nn.BatchNorm2d(first),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(first, second, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * second, third),
            nn.ReLU(),
            nn.Linear(third, 5),
        )


class Residual(nn.Module):
    """A stem, a residual block, and a strided one whose shortcut is a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.a1, self.a2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.b1, self.b2 = nn.Conv2d(8, 16, 3, 2, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.shortcut, self.head = nn.Conv2d(8, 16, 1, 2), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.a2(F.relu(self.a1(x))))
        x = F.relu(self.shortcut(x) + self.b2(F.relu(self.b1(x))))
        return self.head(x.mean(dim=(2, 3)))


class Mixed(nn.Module):
    """Two branches that are concatenated, one of them depthwise, and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.deep = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.wide = nn.Conv2d(6, 8, 1)
        self.last, self.head = nn.Conv2d(14, 6, 3), nn.Linear(6, 5)
        self.gain = nn.Parameter(torch.full((1,), 3.0))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(torch.cat([self.deep(x), self.wide(x)], dim=1))
        return self.head(self.gain * F.relu(self.last(x)).mean(dim=(2, 3)))


NETWORKS: list[Callable[[], nn.Module]] = [Chain, Residual, Mixed]


def everything(model: nn.Module) -> dict[str, int]:
    return {"params": count_params(model), "macs": count_macs(model, IMAGE), "bytes": dense_file_bytes(model)}


@pytest.mark.parametrize("network", NETWORKS)
def test_costs_of_any_widths_are_those_of_the_network_that_has_them(network: Callable[[], nn.Module]) -> None:
    rng = np.random.default_rng(0)
    structure = Structure.of(network(), IMAGE)
    assert len(structure.variables) >= 3
    for _ in range(6):
        widths = np.array([rng.integers(1, 2 * v.count) for v in structure.variables])
        built = everything(reshape_to(network(), structure.shapes(widths)))
        assert {name: structure.cost(name, widths) for name in ("params", "macs")} == {
            name: built[name] for name in ("params", "macs")
        }
        # The header of the file is shorter where its numbers are.
        if (widths <= [v.count for v in structure.variables]).all():
            assert 0 <= structure.cost("bytes", widths) - built["bytes"] < 64
    given = np.array([v.count for v in structure.variables])
    assert {name: structure.cost(name, given) for name in structure.dense} == dict(structure.dense)
    assert dict(structure.dense) == everything(network())


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "limits", [{"params": "50%"}, {"macs": "40%"}, {"params": "60%", "macs": "35%"}, {"budget": "2x"}], ids=str
)
def test_budgets_hold_on_the_network_that_is_handed_out(
    network: Callable[[], nn.Module], method: str, limits: dict[str, Any]
) -> None:
    found = precrop(network, example=IMAGE, method=method, **limits)
    got = everything(found.model)
    assert got == {"params": found.params, "macs": found.macs, "bytes": found.bytes}
    for name, limit in found.limits.items():
        assert got[name] <= limit
        # A rule with few widths to choose from leaves some; the programme's answer is as tight as whole channels allow.
        assert got[name] > 0.25 * limit
    with torch.no_grad():
        assert found.model(torch.randn(4, 3, 8, 8)).shape == (4, 5)
    assert found.model.training
    if any("#" in name for name in found.widths):  # what is read side by side has no bound
        assert found.bound == -math.inf
    elif method == "programme":
        assert found.value <= found.relaxed + 1e-6
        assert found.value <= found.bound < 0.0
        for other in METHODS[1:]:
            assert precrop(network, example=IMAGE, method=other, **limits).value <= found.bound


def test_the_value_is_the_sum_of_the_layers_log_densities() -> None:
    found = precrop(Chain, params="50%", example=IMAGE)
    whole, small = Chain(), found.model
    layers = [k for k, p in whole.named_parameters() if p.ndim > 1]
    logs = [math.log(small.get_parameter(k).numel() / whole.get_parameter(k).numel()) for k in layers]
    assert found.value == pytest.approx(math.fsum(logs), rel=1e-12)
    widths = [small.get_parameter(f"{name}.weight").shape[0] for name in (0, 4, 8)]
    assert found.widths == {"0": (8, widths[0]), "4": (12, widths[1]), "8": (10, widths[2])}


def test_concatenated_inputs_count_by_their_parts() -> None:
    """log of a sum of parts is at least the mean of their logs, so nothing that the programme says bounds Σ log p."""
    structure = Structure.of(Mixed(), IMAGE)
    shares = dict(zip(structure.keys, structure.shares.tolist(), strict=True))
    names = [v.name for v in structure.variables]
    # The depthwise layer's channels are the stem's, and the first 6 of the 14 that are concatenated.
    assert dict(zip(names, shares["last.weight"], strict=True)) == pytest.approx(
        {name: {6: 6 / 14, 8: 8 / 14}[v.count] for name, v in zip(names, structure.variables, strict=True)}
        | {names[-1]: 1.0}
    )
    found = precrop(Mixed, params="50%", example=IMAGE)
    whole, small = Mixed(), found.model
    logs = [math.log(small.get_parameter(k).numel() / whole.get_parameter(k).numel()) for k in structure.keys]
    assert found.value == pytest.approx(math.fsum(logs), abs=1e-9)
    assert math.fsum(logs) - 0.5 < found.relaxed
    assert found.bound == -math.inf


def test_a_network_may_grow_up_to_the_last_byte_of_its_header() -> None:
    """Wider layers have longer numbers in the header, which the budget in bytes counts too."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 3))

    for budget in range(1500, 2410, 37):
        found = precrop(build, budget, example=torch.zeros(1, 5), widest=2.0)
        assert budget - 120 < found.bytes <= budget


@pytest.mark.parametrize("limits", [{"params": 700}, {"macs": 15_000}, {"params": 900, "macs": 12_000}], ids=str)
def test_brute_force_over_networks_finds_nothing_better(limits: dict[str, int]) -> None:
    """Every width of a chain built as its own network and counted."""
    found = precrop(Chain, example=IMAGE, **limits)  # type: ignore[arg-type]

    def value(widths: tuple[int, ...]) -> float:
        a, b, c = (n / given for n, given in zip(widths, (8, 12, 10), strict=True))
        return math.log(a) + math.log(a * b) + math.log(b * c) + math.log(c)

    best = -math.inf
    for widths in itertools.product(range(1, 9), range(1, 13), range(1, 11)):
        if value(widths) > best:  # counting takes longer
            model = Chain(*widths)
            if all(
                limit >= (count_params(model) if n == "params" else count_macs(model, IMAGE))
                for n, limit in limits.items()
            ):
                best = value(widths)
    assert found.value == pytest.approx(best, abs=1e-12)
    assert best <= found.bound


def test_widths_inside_blocks_alone_are_a_closed_form_and_stages_are_not() -> None:
    class Inner(Residual):
        """Channels of the skip path that cannot change: they are what the model returns."""

        def forward(self, x: Tensor) -> Any:
            x = F.relu(self.norm(self.stem(x)))
            y = F.relu(x + self.a2(F.relu(self.a1(x))))
            return x, F.relu(self.shortcut(y) + self.b2(F.relu(self.b1(y))))

    found = precrop(Inner, params="60%", example=IMAGE)
    assert found.method == "closed form"
    assert set(found.widths) == {"a1", "b1"}
    assert found.kept["stem"] == "it is what the model returns"
    assert precrop(Residual, params="60%", example=IMAGE).method == "geometric programme"
    assert precrop(Residual, params="100%", example=IMAGE).method == "all"


def test_widths_are_multiples_where_that_is_asked_for() -> None:
    found = precrop(Residual, params="40%", example=IMAGE, round_to=4)
    assert found.params <= 0.4 * count_params(Residual())
    assert all(now % 4 == 0 for _, now in found.widths.values())
    assert "multiples of 4 channels" in found.rounded
    # One that was narrower than that from the start keeps its width.
    assert precrop(Chain, params="85%", example=IMAGE, round_to=9).widths["0"] == (8, 8)


def test_preconfig_spends_a_budget_on_wider_layers_too() -> None:
    crop = precrop(Residual, macs="100%", example=IMAGE)
    config = precrop(Residual, macs="100%", example=IMAGE, widest=2.0)
    assert crop.value == 0.0
    assert config.value > 0.05
    assert config.macs <= crop.macs
    assert any(now > given for given, now in config.widths.values())
    assert all(now <= 2 * given for given, now in config.widths.values())
    assert config.model(torch.zeros(2, 3, 8, 8)).shape == (2, 5)


def test_a_seed_gives_one_network_and_leaves_others_their_randomness() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = precrop(Residual, params="50%", example=IMAGE, seed=1, method="synflow")
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    again = precrop(Residual, params="50%", example=IMAGE, seed=1, method="synflow")
    other = precrop(Residual, params="50%", example=IMAGE, seed=2)
    assert first.widths == again.widths
    assert first.to_json() == again.to_json()
    for key, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[key])
    assert not torch.equal(first.model.get_parameter("stem.weight")[:1], other.model.get_parameter("stem.weight")[:1])


def test_weights_are_drawn_anew_for_the_narrower_layers() -> None:
    class Trained(Mixed):
        def __init__(self) -> None:
            super().__init__()
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.fill_(7.0)

    found = precrop(Trained, params="50%", example=IMAGE)
    state = dict(found.model.named_parameters())
    assert found.copied == ("gain",)  # no module of it knows how to begin
    assert float(state["gain"].detach()) == 7.0
    assert all(float(p.detach().abs().max()) < 2.0 for name, p in state.items() if name != "gain")
    # torch draws a convolution's weights from ± 1 / √(inputs of one output), those of its new size.
    weight = state["last.weight"].detach()
    assert 0.9 / math.sqrt(weight[0].numel()) < float(weight.abs().max()) <= 1 / math.sqrt(weight[0].numel())
    assert weight[0].numel() < Mixed().last.weight[0].numel()

    def ones(model: nn.Module) -> None:
        nn.init.ones_(model.get_parameter("gain"))

    assert precrop(Trained, params="50%", example=IMAGE, initialise=ones).model.get_parameter("gain").item() == 1.0


def test_a_task_stands_for_its_model_and_its_example(tmp_path: Path) -> None:
    task = load_task(str(write_task(tmp_path)))
    found = precrop(task, params="50%", macs="60%")
    trained = task.build_model()
    assert found.params <= 0.5 * count_params(trained)
    assert found.macs <= 0.6 * found.dense["macs"]
    assert set(found.model.state_dict()) == set(trained.state_dict())
    body = json.loads(found.to_json())
    assert body["params"] == found.params
    assert body["shapes"]["wide.weight"] == list(found.model.get_parameter("wide.weight").shape)
    assert ac.precrop is precrop


def test_macs_are_those_of_a_profile() -> None:
    model, data = Residual().eval(), [torch.randn(4, 3, 8, 8)]
    stats = calibrate(model, data, holdout=0)
    assert positions_of(model, data[0]) == {name: s.positions for name, s in stats.layers.items()}
    assert count_macs(model, data[0]) == count_macs(model, IMAGE)
    # By hand: 64 pixels at the full size, 16 behind the stride.
    assert count_macs(model, IMAGE) == 64 * 9 * 8 * (3 + 8 + 8) + 16 * 9 * 16 * (8 + 16) + 16 * 8 * 16 + 16 * 5


def test_what_cannot_be_met_says_what_the_least_is() -> None:
    with pytest.raises(
        InfeasibleError, match=r"the smallest widths take \d+ params, the limit is 50 .* Raise the limit"
    ):
        precrop(Chain, params=50, example=IMAGE)
    with pytest.raises(InfeasibleError, match="or lower round_to") as caught:
        precrop(Chain, params=350, example=IMAGE, round_to=8)
    assert precrop(Chain, params=350, example=IMAGE).params <= 350
    # The size that it names is enough.
    assert precrop(Chain, caught.value.smallest_bytes, example=IMAGE, round_to=8).bytes <= caught.value.smallest_bytes


def test_requests_that_are_wrong_are_refused() -> None:
    for wrong, words in [
        ({}, "no limit is given"),
        ({"params": "50%", "method": "best"}, "method is 'best'; it is one of programme, synflow, uniform"),
        ({"params": "50%", "round_to": 0}, "round_to is 0"),
        ({"params": "50%", "widest": 0.5}, "widest 0.5; both must be at least 1"),
        ({"params": "-3%"}, "budget params is '-3%'; needed a positive number, or a percentage"),
        ({"params": 0}, "budget params is '0'"),
        ({"budget": "2x,bops=5%"}, "precrop limits bytes, params and macs"),
        ({"params": "50%", "method": "synflow", "widest": 2.0}, "SynFlow only prunes"),
    ]:
        with pytest.raises(BudgetError, match=words):
            precrop(Chain, example=IMAGE, **wrong)  # type: ignore[arg-type]
    with pytest.raises(TaskError, match="give example=, a batch"):
        precrop(Chain, params="50%")
    with pytest.raises(LayerError, match=r"no width of Linear can change \(.*it is what the model returns"):
        precrop(lambda: nn.Linear(4, 3), params="50%", example=torch.zeros(1, 4))
