"""Channel groups: what is coupled, what must stay, and that a narrower model computes what the dense one does with the
same channels erased.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from networks import ConvNet, Kinds, seeded
from torch import nn

from autocompress import digits
from autocompress.channels import Groups, channel_groups, narrow, narrow_to
from autocompress.errors import LayerError, MismatchError
from autocompress.tasks import load_task

ROOT = Path(__file__).resolve().parents[1]


class Concat(nn.Module):
    """Two branches side by side, one of them read alone too, flattened into a linear layer; images (N, 2, 4, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(2, 6, 1)
        self.only = nn.Conv2d(4, 3, 1)
        self.both = nn.Conv2d(10, 5, 1)
        self.flat, self.head = nn.Linear(5 * 16, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = torch.relu(self.a(x)), self.b(x)
        y = torch.relu(self.both(torch.cat([a, b], 1))).flatten(1)
        return self.flat(y) + self.head(self.only(a).mean((2, 3)))


class Separable(nn.Module):
    """Depthwise convolutions, one of two outputs per channel, and a group norm; images (N, 3, 6, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.point, self.norm = nn.Conv2d(3, 8, 1), nn.GroupNorm(4, 8)
        self.depth = nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.slope = nn.PReLU(16)
        self.mix = nn.Conv2d(16, 6, 1)
        self.each = nn.Conv2d(6, 6, 3, groups=6)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.slope(self.depth(self.norm(self.point(x))))
        return self.last(torch.relu(self.up(torch.relu(self.each(self.mix(x))))))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(n, t, -1))


class Transformer(nn.Module):
    """A block of a vision transformer with an attention of its own; tokens (N, T, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(6, 12), nn.Parameter(torch.randn(1, 5, 12))
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(12), Attention(12, 3), nn.LayerNorm(12)
        self.up, self.down, self.head = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x) + self.place
        x = x + self.attention(self.norm1(x))
        return self.head(x + self.down(nn.functional.gelu(self.up(self.norm2(x)))))


class NoGradient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)))


class Lopsided(nn.Module):
    """Channels that cannot go: a mean of them that no gradient tells of, a slice, ones beside the input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(10, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = torch.relu(self.a(x))
        b = self.b(a) + a.detach().mean()
        c = torch.relu(self.c(torch.cat([x, b], 1)))
        return self.d(c) * c[:, :2]


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (ConvNet, (3, 8, 8)),
    "concat": (Concat, (2, 4, 4)),
    "separable": (Separable, (3, 6, 6)),
    "transformer": (Transformer, (5, 6)),
}


def found(name: str) -> tuple[nn.Module, torch.Tensor, Groups]:
    build, shape = MODELS[name]
    model = seeded(build)
    example = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    return model, example, channel_groups(model, example)


def test_a_residual_stage_is_one_group() -> None:
    groups = channel_groups(digits.model(), digits.example_input())
    stage = groups["blocks.1.conv2"]
    assert [axis.key for axis in stage.producers] == [
        "blocks.1.conv2.weight",
        "blocks.1.shortcut.0.weight",
        "blocks.2.conv2.weight",
    ]
    assert [(axis.key, axis.dim) for axis in stage.consumers] == [("blocks.2.conv1.weight", 1), ("linear.weight", 1)]
    assert (stage.size, stage.unit) == (32, 1)
    assert [group.name for group in groups if not group.prunable] == ["linear"]
    assert groups["linear"].reason == "it is what the model returns"


def test_branches_side_by_side_are_one_group_and_flattened_channels_are_several_columns() -> None:
    _, _, groups = found("concat")
    both = groups["a"]
    assert {axis.key: axis.units for axis in both.producers} == {
        "a.weight": (0, 1, 2, 3),
        "b.weight": (4, 5, 6, 7, 8, 9),
    }
    wide = next(axis for axis in both.consumers if axis.key == "both.weight")
    assert wide.units == tuple(range(10))
    assert next(axis for axis in both.consumers if axis.key == "only.weight").units == (0, 1, 2, 3)
    flat = groups["both"].consumers[0]
    assert flat.key == "flat.weight"
    assert [len(flat.of(unit)) for unit in range(5)] == [16] * 5
    assert flat.units[:17] == (0,) * 16 + (1,)


def test_a_unit_is_as_many_channels_as_must_go_together() -> None:
    _, _, groups = found("separable")
    first = groups["point"]
    # A group of the norm has 2 channels, and each of them 2 outputs of the depthwise convolution.
    assert (first.size, first.unit) == (4, 2)
    assert next(axis for axis in first.producers if axis.key == "depth.weight").of(0) == [0, 1, 2, 3]
    assert {axis.key for axis in groups["mix"].producers} == {"mix.weight", "each.weight"}
    assert groups["up"].producers[0].dim == 1  # of a transposed convolution
    _, _, groups = found("transformer")
    heads = groups["attention.qkv"]
    assert (heads.size, heads.unit) == (3, 12)
    assert heads.prunable


@pytest.mark.parametrize("name", MODELS)
def test_a_narrower_model_computes_what_the_dense_one_does_with_channels_erased(name: str) -> None:
    model, example, groups = found(name)
    assert groups.prunable
    for group in groups.prunable:
        kept = [unit for unit in range(group.size) if unit != 1]
        small = narrow(model, {group.name: kept}, groups)
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
        output = small(example)
        if any(isinstance(model.get_submodule(axis.key.rpartition(".")[0]), nn.LayerNorm) for axis in group.vectors):
            continue
        with torch.no_grad():
            erased = seeded(MODELS[name][0])
            for axis in group.consumers:
                erased.get_parameter(axis.key).index_fill_(axis.dim, torch.tensor(axis.of(1)), 0.0)
        torch.testing.assert_close(output, erased(example))


@pytest.mark.parametrize("name", MODELS)
def test_shapes_alone_make_the_same_modules(name: str) -> None:
    model, example, groups = found(name)
    kept = {group.name: list(range(1, group.size)) for group in groups.prunable}
    small = narrow(model, kept, groups)
    again = narrow_to(seeded(MODELS[name][0], seed=5), groups.shapes(model, kept))
    assert str(again) == str(small)
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(example), small(example))


def test_what_cannot_go_says_why() -> None:
    model = seeded(Lopsided)
    example = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    groups = channel_groups(model, example)
    assert groups["a"].reason == "something beside its layers depends on its channels"
    assert groups.prunable == ()
    with pytest.raises(LayerError, match="channel group 'a' keeps its width: something beside"):
        narrow(model, {"a": [0]}, groups)


def test_what_cannot_be_proven_is_not_offered_and_weights_that_are_zero_hide_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        model.get_parameter("0.bias").fill_(-100.0)
    example = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    assert channel_groups(model, example)["0"].reason.startswith("no output depends on its channels for this example")
    nn.init.zeros_(model.get_parameter("0.bias"))
    nn.init.zeros_(model.get_parameter("2.weight"))
    assert channel_groups(model, example)["0"].prunable
    assert not model.get_parameter("2.weight").any()


def test_a_model_that_cannot_be_traced_has_no_groups_and_says_so() -> None:
    groups = channel_groups(seeded(NoGradient), torch.randn(3, 4))
    assert len(groups) == 0
    assert groups.reason.startswith("NoGradient cannot be traced: ")
    tokens = torch.randint(0, 24, (2, 6), generator=torch.Generator().manual_seed(0))
    assert channel_groups(seeded(Kinds), tokens).reason.startswith("Kinds cannot be traced: ")
    with pytest.raises(LayerError, match="no channel group 'x'; the groups are none: NoGradient cannot"):
        groups["x"]


def test_what_narrow_refuses() -> None:
    model, _, groups = found("concat")
    with pytest.raises(LayerError, match=r"nothing would be left of dimension 0 of 'b\.weight'"):
        narrow(model, {"a": [0, 1]}, groups)
    with pytest.raises(LayerError, match="units 0 to 9; got 10"):
        narrow(model, {"a": [0, 10]}, groups)
    with pytest.raises(MismatchError, match=r"'a.weight' is \(4, 2, 3, 3\) in the model; it cannot become \(5, 2, 3"):
        narrow_to(model, {"a.weight": (5, 2, 3, 3)})
    with pytest.raises(MismatchError, match=r"no tensor 'c\.weight'"):
        narrow_to(model, {"c.weight": (1,)})


@pytest.mark.data
def test_shortcuts_padded_with_zeros_keep_a_stage_and_blocks_can_lose_channels(data_folder: Path) -> None:
    task = load_task(ROOT / "experiments" / "tasks" / "resnet56_cifar10.py")
    groups = channel_groups(task.model(), next(iter(task.calibration(0))))
    assert groups["conv1"].reason == "F.pad widens it by channels of zeros, as shortcuts without weights do"
    blocks = [f"layer{i}.{j}.conv1" for i in (1, 2, 3) for j in range(9)]
    assert [group.name for group in groups.prunable] == blocks
