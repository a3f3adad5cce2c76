"""A result whose page is looked at."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import autocompress as ac

NASTY = "<script>alert('x')</script>&\""


@pytest.fixture(scope="session")
def result(tmp_path_factory: pytest.TempPathFactory) -> ac.Result:
    """A tiny compressed model, one of whose layers has a name that is markup, and one that nothing reaches."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(NASTY, nn.Linear(12, 8))
            self.spare = nn.Linear(3, 3)
            self.head = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.relu(self.get_submodule(NASTY)(x)))

    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net().eval()
    batches = [torch.randn(16, 12, generator=generator) for _ in range(6)]
    out = tmp_path_factory.mktemp("page")
    return ac.compress(model, batches, "2x", lambda m: 0.5, out=out, workers=1, task=NASTY)
