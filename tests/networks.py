"""Small networks, data and profiles that several test files use."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import autocompress as ac
from autocompress.calibration import calibrate
from autocompress.profiling import Profile, profile
from autocompress.salience import widths

OPTIONS = ("fp16", "w4", "rd(0.5,0.3)", "rd(0.9,0.3)s60", "rd(1.4,0.7)s85")
LEVELS = (100, 75, 50, 25)
# Bits on top of sparsities, ranks and narrower layers beside them, for rules that set them.
GRID = (
    *(*OPTIONS, "w2", "s60w2", "s85w2", "s60w4", "s85w4"),
    *("rank1w4", "rank2w4", "rank3w4", "k2r1w4", "k2r2w4", "rank1fp16", "rank2fp16"),
    *(f"n{a}/{b}{value}" for a in LEVELS for b in LEVELS if a + b < 200 for value in ("w2", "w4")),
)


def seeded(build: Any, seed: int = 0) -> nn.Module:
    """What `build()` makes from a fixed seed, in eval mode; the global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
        # Norms as training leaves them: nothing is at its initial value.
        for module in model.modules():
            for name in ("weight", "bias", "running_mean"):
                value = getattr(module, name, None)
                if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)) and value is not None:
                    value.data.add_(0.3 * torch.randn_like(value))
            if isinstance(getattr(module, "running_var", None), torch.Tensor):
                module.running_var.mul_(0.5 + torch.rand_like(module.running_var))
        return model.eval()


def batches(*shape: int, count: int = 5, size: int = 12, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, *shape, generator=generator) for _ in range(count)]


class ConvNet(nn.Module):
    """Convolutions with batch norm, one of them grouped, a residual connection, a linear head with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 8, 1, bias=True), nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = x + torch.relu(self.bn2(self.conv2(x)))
        x = torch.relu(self.bn3(self.conv3(x)))
        return self.linear(x.mean((2, 3)))


class Kinds(nn.Module):
    """Every kind of layer: a table that is the head too, a bag, attention, recurrence, a cell, grouped transposed
    convolutions, and a layer that nothing calls. Takes tokens (N, T).
    """

    def __init__(self) -> None:
        super().__init__()
        self.words, self.topic = nn.Embedding(24, 16), nn.EmbeddingBag(24, 16)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        self.lstm = nn.LSTM(16, 12, 2, batch_first=True, bidirectional=True, proj_size=8)
        self.cell = nn.GRUCell(16, 16)
        self.up = nn.ConvTranspose1d(16, 12, 3, stride=2, padding=1, groups=2)
        self.down = nn.ConvTranspose2d(12, 16, (1, 2))
        self.spare = nn.Linear(16, 16)
        self.head = nn.Linear(16, 24)
        self.head.weight = self.words.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.words(tokens) + self.topic(tokens)[:, None]
        x = self.encoder(x)
        x = x + self.lstm(x)[0]
        y = torch.relu(self.down(torch.relu(self.up(x.transpose(1, 2)))[:, :, None]))
        return self.head(self.cell(y.mean((2, 3)), x.mean(1)))


KINDS = (
    "words topic encoder.self_attn.in_proj_weight encoder.self_attn.out_proj encoder.linear1 encoder.linear2 "
    "lstm.weight_ih_l0 lstm.weight_hh_l0 lstm.weight_hr_l0 lstm.weight_ih_l0_reverse lstm.weight_hh_l0_reverse "
    "lstm.weight_hr_l0_reverse lstm.weight_ih_l1 lstm.weight_hh_l1 lstm.weight_hr_l1 lstm.weight_ih_l1_reverse "
    "lstm.weight_hh_l1_reverse lstm.weight_hr_l1_reverse cell.weight_ih cell.weight_hh up down spare"
).split()


def kinds() -> tuple[nn.Module, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return seeded(Kinds), [torch.randint(0, 22, (8, 6), generator=generator) for _ in range(5)]


def convnet(seed: int = 0) -> nn.Module:
    return seeded(ConvNet, seed)


def images(count: int = 5, size: int = 12, seed: int = 0) -> list[torch.Tensor]:
    return batches(3, 6, 6, count=count, size=size, seed=seed)


def profiled(
    model: nn.Module,
    data: list[Any],
    options: Sequence[str] = OPTIONS,
    store: Path | None = None,
    workers: int = 1,
    seed: int = 0,
) -> Profile:
    return profile(model, calibrate(model, data, seed=seed), store=store, options=options, workers=workers)


@functools.cache
def small_profile() -> tuple[nn.Module, list[torch.Tensor], Profile]:
    """The network above, its data and its profile. Shared: tests leave all three alone."""
    model, data = convnet(), images()
    return model, data, profiled(model, data)


@functools.cache
def grid_profile() -> tuple[nn.Module, list[torch.Tensor], Profile]:
    """The same with options for every strategy."""
    model, data = convnet(), images()
    stats = calibrate(model, data)
    return model, data, profile(model, stats, options=GRID, workers=1, channels=widths(model, data[0], stats))


def compressed(model: nn.Module, data: list[Any], budget: str | int, options: Sequence[str] = OPTIONS) -> Any:
    """(applied model, plan, profile) of an exact solve."""
    found = profiled(model, data, options)
    plan = ac.plan(found, budget)
    return ac.apply(model, plan, found, data), plan, found
