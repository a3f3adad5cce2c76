"""Task files of a few hundred weights, for tests of the command line: written where a test wants them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from typer.testing import CliRunner

MODEL = """
import torch
from torch import nn

SEED = 0


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.wide = nn.Conv2d(6, 8, 3)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x)))
        return self.head(torch.relu(self.wide(x)).mean(dim=(2, 3)))


def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return Tiny().eval()
"""
CALIBRATION = """
DATA_SEED = 1


def calibration():
    return list(torch.rand(48, 1, 6, 6, generator=torch.Generator().manual_seed(DATA_SEED)).split(8))
"""
EVALUATE = """
def evaluate(model):
    with torch.no_grad():
        return float(model(torch.ones(2, 1, 6, 6)).sum())
"""
RESULTS = ("metrics.json", "model.acz", "plan.json", "report.html")


def write_task(folder: Path, name: str = "task.py", **parts: str) -> Path:
    """A task file made of the parts above, each replaced by the argument of its name (model, calibration, evaluate)."""
    chosen = {"model": MODEL, "calibration": CALIBRATION, "evaluate": EVALUATE} | parts
    path = folder / name
    path.write_text("\n".join(chosen.values()))
    return path


class Outcome:
    """What a call of the command line left: exit code, standard output, standard error."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def refused(self, code: int) -> str:
        """The one line that a refusal is, once everything else about it holds."""
        assert self.code == code, (self.code, self.out, self.err)
        # Stages that were done before it may have said so; the refusal itself is the last line.
        lines = self.err.strip().splitlines()
        assert lines[-1].startswith("autocompress: "), self.err
        assert sum(line.startswith("autocompress: ") for line in lines) == 1
        assert "Traceback" not in self.err + self.out
        return lines[-1]


def call(*arguments: object, env: Mapping[str, str] | None = None) -> Outcome:
    """The command line, in this process."""
    from autocompress.cli import app

    result = CliRunner().invoke(app, [str(a) for a in arguments], env=env)
    return Outcome(result.exit_code, result.stdout, result.stderr)


def contents(folder: Path, names: tuple[str, ...] = RESULTS) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names}


Caller = Callable[..., Outcome]
