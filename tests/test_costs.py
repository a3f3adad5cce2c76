"""MACs from the shapes that calibration saw, BOPs by their formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import images, seeded, small_profile
from torch import nn

from autocompress import costs
from autocompress.calibration import Statistics, calibrate


class Mixed(nn.Module):
    """A strided, dilated convolution, a depthwise one, one layer called twice, a linear layer on a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.strided = nn.Conv2d(3, 4, 3, stride=2, dilation=2, padding=2)
        self.depthwise = nn.Conv2d(4, 8, (1, 3), groups=4)
        self.twice = nn.Linear(8, 8)
        self.idle = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(self.strided(x)).flatten(2).transpose(1, 2)  # 3 x 3, then 3 x 1 positions
        return self.twice(torch.relu(self.twice(x)))


@pytest.mark.parametrize("sizes", [[12, 12], [5, 1, 7]], ids=str)
def test_macs_are_counted_at_calibration(sizes: list[int]) -> None:
    data = [torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(n)) for n in sizes]
    stats = calibrate(seeded(Mixed), data)
    weights = {"strided": 4 * 27, "depthwise": 8 * 3, "twice": 64}
    found = {n: costs.macs(weights[n], s.positions, stats.samples) for n, s in stats.layers.items()}
    assert found == {"strided": 4 * 27 * 9, "depthwise": 8 * 3 * 3, "twice": 2 * 64 * 3}
    assert stats.unreached == ("idle",)


def test_statistics_keep_the_positions(tmp_path: Any) -> None:
    stats = calibrate(small_profile()[0], images())
    stats.save(tmp_path / "statistics.npz")
    kept = Statistics.load(tmp_path / "statistics.npz")
    assert {n: s.positions for n, s in kept.layers.items()} == {n: s.positions for n, s in stats.layers.items()}
    assert stats.layers["conv1"].positions == 36 * stats.samples
    assert stats.layers["linear"].positions == stats.samples


def test_sequences_of_different_lengths_count_their_mean_rounded_up() -> None:
    assert costs.macs(weights=10, positions=7 + 5 + 3, samples=2) == 75
    assert costs.macs(weights=1, positions=7, samples=2) == 4


def test_bops_are_widths_times_macs_times_density() -> None:
    assert costs.bops(1000) == 32 * 32 * 1000
    assert costs.bops(1000, width=4, nonzero=25, weights=100) == 4 * 32 * 1000 // 4
    assert costs.bops(3, width=1, nonzero=1, weights=97) == 1, "rounded up"
    assert costs.bops(1000, width=8, nonzero=0, weights=100) == 0


def test_a_profile_says_what_its_options_take() -> None:
    profile = small_profile()[2]
    table = profile.table.set_index(["layer", "option"])
    assert table.loc[("conv2", "dense"), "macs"] == 8 * 2 * 9 * 36
    assert table.loc[("conv2", "dense"), "bops"] == 32 * 32 * 8 * 2 * 9 * 36
    assert table.loc[("conv2", "fp16"), "bops"] == 16 * 32 * 8 * 2 * 9 * 36
    pruned = table.loc[("conv3", "rd(0.9,0.3)s60"), "bops"]
    assert 0 < pruned <= 0.4 * 32 * 8 * 64 * 36, "at least 60 of 100 weights are gone, and codes have at most 8 bits"
