"""PreCropping's widths: SynFlow's, the programme's and uniform ones, on ResNet-20, ResNet-56 and a chain.

    python experiments/precrop_widths.py
    python experiments/precrop_widths.py --networks chain --methods programme

Nothing is trained. Networks: the CIFAR ResNets of depth 20 and 56 whose shortcuts have no weights, so that the widths
of their three stages are fixed (`resnet20`, `resnet56`); the same with a convolution as the shortcut where the width
changes, so that a stage has a width (`resnet20b`, `resnet56b`); six convolutions and a linear layer (`chain`). Limits:
50 % and 25 % of the parameters, of the MACs, and 50 % of both.

`value` is the objective, Σ log p_l over the layers with whole widths; `relaxed` that of the programme before rounding,
`bound` what no widths within the limit can exceed. `milliseconds`: choosing the widths, SynFlow's 100 rounds included,
without following the channels, which is `trace_milliseconds` and once for all limits; on a machine that others use, so
compare within a run. `widths` in channels, of every group in the order of the network.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, done_keys, environment, keep_row
from torch import Tensor, nn
from torch.nn import functional as F

from autocompress.precropping import METHODS, Structure, precrop

KEYS = ("network", "limit", "method")
LIMITS: dict[str, dict[str, Any]] = {
    "params 50%": {"params": "50%"},
    "params 25%": {"params": "25%"},
    "macs 50%": {"macs": "50%"},
    "macs 25%": {"macs": "25%"},
    "both 50%": {"params": "50%", "macs": "50%"},
}


class Block(nn.Module):
    """Two 3x3 convolutions; `projected`: the shortcut is a 1x1 convolution where sizes change, else padded."""

    def __init__(self, inputs: int, outputs: int, stride: int, projected: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.pad = stride, (outputs - inputs) // 2
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if projected and stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.shortcut is not None:
            return F.relu(y + self.shortcut(x))
        x = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + (F.pad(x, (0, 0, 0, 0, self.pad, self.pad)) if self.pad else x))


class ResNet(nn.Module):
    """The CIFAR ResNet of depth 6n + 2 (arXiv 1512.03385, section 4.2)."""

    def __init__(self, depth: int, projected: bool) -> None:
        super().__init__()
        n = (depth - 2) // 6
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        blocks = []
        for inputs, outputs, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2)):
            blocks += [
                Block(inputs if i == 0 else outputs, outputs, stride if i == 0 else 1, projected) for i in range(n)
            ]
        self.blocks, self.linear = nn.Sequential(*blocks), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.blocks(F.relu(self.bn1(self.conv1(x)))).mean(dim=(2, 3)))


def chain() -> nn.Module:
    """Widths 32, 32, 64, 64, 128, 128 with norms, halved after every second, 4 x 4 pixels flattened."""
    layers: list[nn.Module] = []
    inputs = 3
    for i, width in enumerate((32, 32, 64, 64, 128, 128)):
        layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] * (i % 2)
        inputs = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * inputs, 10))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "chain": chain,
    "resnet20": lambda: ResNet(20, False),
    "resnet20b": lambda: ResNet(20, True),
    "resnet56": lambda: ResNet(56, False),
    "resnet56b": lambda: ResNet(56, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--results", type=Path, default=RESULTS / "precrop_widths.csv")
    given = parser.parse_args()
    example = torch.zeros(1, 3, 32, 32)
    for network in given.networks.split(","):
        for limit, values in LIMITS.items():
            for method in given.methods.split(","):
                if (network, limit, method) not in done_keys(given.results, KEYS):
                    row = {"network": network, "limit": limit, "method": method}
                    row |= measured(NETWORKS[network], example, method, values)
                    keep_row(given.results, row | environment(), KEYS)
                    print({k: v for k, v in row.items() if k != "widths"}, flush=True)


def measured(network: Callable[[], nn.Module], example: Tensor, method: str, limits: dict[str, Any]) -> dict[str, Any]:
    """One choice of widths, counted on the network that has them."""
    found = precrop(network, example=example, method=method, **limits)
    torch.manual_seed(0)
    model = network()
    started = time.perf_counter()
    structure = Structure.of(model, example)
    traced = time.perf_counter() - started
    problem = structure.problem(structure.limits(None, limits.get("params"), limits.get("macs")))
    started = time.perf_counter()
    structure.choose(problem, method, model, example)
    chosen = time.perf_counter() - started
    return {
        "found_by": found.method,
        "value": f"{found.value:.4f}",
        "relaxed": f"{found.relaxed:.4f}",
        "bound": f"{found.bound:.4f}",
        "params": found.params,
        "params_share": f"{100 * found.params / found.dense['params']:.2f}",
        "macs": found.macs,
        "macs_share": f"{100 * found.macs / found.dense['macs']:.2f}",
        "milliseconds": f"{1000 * chosen:.0f}",
        "trace_milliseconds": f"{1000 * traced:.0f}",
        "widths": " ".join(str(now) for _, now in found.widths.values()),
    }


if __name__ == "__main__":
    main()
