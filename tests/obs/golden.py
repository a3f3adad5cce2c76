"""The golden layers: what the published OBC code makes of four layers, where a machine has them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from . import reference

__all__ = ["NAMES", "GoldenLayer", "load"]

NAMES = ("synthetic_8x32", "synthetic_rank_deficient_12x64", "synthetic_dead_columns_8x48", "resnet20_layer1.0.conv1")

#: Shape of the layer before it became a matrix, for those that were not one.
_KERNELS = {"resnet20_layer1.0.conv1": (16, 16, 3, 3)}


@dataclass(frozen=True)
class GoldenLayer:
    """A layer `W` (rows, d), its damped Hessian `H` (d, d), both float64, and every array of its file as it is."""

    name: str
    W: NDArray[np.float64]
    H: NDArray[np.float64]
    arrays: dict[str, NDArray[np.generic]]

    def __getitem__(self, key: str) -> NDArray[np.float64]:
        return self.arrays[key].astype(np.float64)

    @property
    def order(self) -> reference.Indices:
        return self.arrays["unstructured_order"].astype(np.int64)

    @property
    def positions(self) -> int:
        """Positions of the kernel; 1 for a matrix."""
        return int(np.prod(_KERNELS.get(self.name, (1, 1))[2:]))

    @property
    def groups_of_four(self) -> reference.Indices:
        return reference.input_channel_groups(_KERNELS.get(self.name, self.W.shape), 4)


def _folder() -> Path | None:
    if "AUTOCOMPRESS_GOLDEN" in os.environ:
        return Path(os.environ["AUTOCOMPRESS_GOLDEN"])
    if "AUTOCOMPRESS_DATA" in os.environ:
        return Path(os.environ["AUTOCOMPRESS_DATA"]).parent / "golden"
    return None


def load(name: str) -> GoldenLayer:
    """The golden layer `name`; skips the test that asks for it where there is none."""
    folder = _folder()
    if folder is None:
        pytest.skip("no golden layers: set AUTOCOMPRESS_GOLDEN, or AUTOCOMPRESS_DATA to the folder beside golden/")
    path = folder / f"obc_{name}.npz"
    if not path.is_file():
        pytest.skip(f"no golden layer: {path} does not exist")
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    H = reference.damped(arrays["hessian"], float(arrays["rel_damp"]))
    return GoldenLayer(name, arrays["weight"].astype(np.float64), H, arrays)
