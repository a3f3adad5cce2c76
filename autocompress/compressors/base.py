"""What every compressor works on and gives back: one layer's problem in, options with error and bytes out. No torch
here.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from autocompress import obs
from autocompress.storage import Entry, float_entry, weight_entry, weight_size
from autocompress.types import Option

__all__ = ["Compressor", "LayerProblem", "Measured", "Realised"]


@dataclass
class LayerProblem:
    """One layer: weight float64 (groups, rows, d), Hessian float64 (groups, d, d) or None where calibration saw
    nothing.

    `shape` is the weight's own shape, the shape of what is stored. `order` (int32) and `losses` (float32, in units of
    the layer's largest loss) are the pruning trace in the shape of `weight`; they are computed when first asked for,
    and handed in when a profile has them.
    """

    name: str
    shape: tuple[int, ...]
    weight: np.ndarray
    hessian: np.ndarray | None
    order: np.ndarray | None = None
    losses: np.ndarray | None = None

    def trace(self) -> tuple[np.ndarray, np.ndarray]:
        """Order and losses of exact greedy pruning. Raises ValueError where there is no Hessian."""
        if self.order is None or self.losses is None:
            order, losses = obs.prune_trace(self.weight, self.known_hessian(), threads=1)
            # In units of the largest: a weight of 1e20 or 1e-20 has losses that float32 cannot hold.
            self.order, self.losses = order, (losses / (losses.max(initial=0.0) or 1.0)).astype(np.float32)
        return self.order, self.losses

    def known_hessian(self) -> np.ndarray:
        if self.hessian is None:
            raise ValueError("calibration never reached this layer, so it has no Hessian")
        return self.hessian

    def counts(self, percent: float) -> np.ndarray:
        """Weights that each row loses at a sparsity in percent, int64 (groups, rows)."""
        return obs.pruned_counts(self.trace()[1], percent / 100.0)

    def error(self, weight: np.ndarray) -> float:
        """½ tr(ΔW H ΔWᵀ) of a weight of the layer's size."""
        return obs.layer_error(self.weight, weight.reshape(self.weight.shape), self.known_hessian())

    @property
    def energy(self) -> float:
        """½ tr(W H Wᵀ): the error of losing the whole layer."""
        return self.error(np.zeros_like(self.weight))

    @property
    def rms(self) -> float:
        """Root mean square weight; 1 for a layer of zeros. Steps of rate-distortion options are in units of it."""
        peak = float(np.abs(self.weight).max(initial=0.0))
        return peak * float(np.sqrt(np.mean((self.weight / peak) ** 2))) if peak > 0.0 else 1.0


@dataclass(frozen=True)
class Realised:
    """A compressed weight, exactly as it will be stored: codes times step, or values in a float codec."""

    shape: tuple[int, ...]
    codec: str
    codes: np.ndarray | None = None
    step: np.ndarray | float = 1.0
    values: np.ndarray | None = None

    @property
    def step_kind(self) -> str:
        if self.codes is None:
            return "none"
        return "row" if np.ndim(self.step) else "tensor"

    def weight(self) -> np.ndarray:
        """What a reader of the file gets, float32 in the weight's shape."""
        if self.codes is None:
            assert self.values is not None
            stored = self.values.astype(np.float16) if self.codec == "fp16" else self.values
            return stored.astype(np.float32).reshape(self.shape)
        step = np.asarray(self.step, np.float32)
        if step.ndim:
            step = step.reshape(-1, *(1,) * (len(self.shape) - 1))
        return self.codes.reshape(self.shape).astype(np.float32) * step

    def entry(self, key: str, option: Option) -> Entry:
        """The record for the file."""
        params = {"option": str(option)}
        if self.codes is None:
            assert self.values is not None
            return float_entry(key, self.values.reshape(self.shape).astype(np.float32), codec=self.codec, params=params)
        return weight_entry(key, self.codes.reshape(self.shape), self.step, codec=self.codec, params=params)

    def bytes(self) -> int:
        """Length of the entry's payload, exactly."""
        if self.codes is None:
            assert self.values is not None
            return self.values.size * (2 if self.codec == "fp16" else 4)
        return weight_size(self.codes.reshape(self.shape), self.step, codec=self.codec)


@dataclass(frozen=True)
class Measured:
    """One row of a profile: error ½ tr(ΔW H ΔWᵀ) of exactly what would be stored, bytes of its payload, seconds to find
    it.

    `codec` and `step` (none, tensor, row) say how it would be stored, which the file's header has to spell out.
    """

    option: Option
    error: float
    bytes: int
    codec: str
    step: str
    seconds: float = field(compare=False)


class Compressor(Protocol):
    """Turns a layer into options with error and bytes; `version` changes whenever its results do."""

    version: int
    source: str

    def offers(self, option: Option) -> bool:
        """Whether this compressor realises that option."""
        ...

    def needs_data(self, option: Option) -> bool:
        """Whether it needs a Hessian."""
        ...

    def realise_all(self, problem: LayerProblem, options: Sequence[Option]) -> list[Realised | None]:
        """Each option's weight; None where the layer cannot have it (a value beyond half precision, say)."""
        ...


def measure(compressor: Compressor, problem: LayerProblem, options: Sequence[Option]) -> list[Measured]:
    """Error and bytes of every option that the layer can have."""
    return [row for row, _ in measured_weights(compressor, problem, options)]


def measured_weights(
    compressor: Compressor, problem: LayerProblem, options: Sequence[Option]
) -> list[tuple[Measured, Realised]]:
    """The same with the weights themselves."""
    start = time.perf_counter()
    found = compressor.realise_all(problem, options)
    each = (time.perf_counter() - start) / max(len(options), 1)
    rows = []
    for option, realised in zip(options, found, strict=True):
        if realised is None:
            continue
        start = time.perf_counter()
        error = 0.0 if problem.hessian is None else problem.error(realised.weight())
        size = realised.bytes()
        seconds = each + time.perf_counter() - start
        rows.append((Measured(option, error, size, realised.codec, realised.step_kind, seconds), realised))
    return rows
