"""How the steps of an embedding's rows should go with how often they are used: bits per weight by the exponent.

    python experiments/row_steps.py [--minilm DIR]

Row r of a table has the step (u/u_r)^exponent times the option's, u_r its weight (see `RowHessian.step_scales`).
For every exponent all rate-distortion options without pruning are coded, and the smallest within each relative error
is kept, at the same error for all exponents: between the two options next to it, bits are interpolated in the logarithm
of the error. MiniLM's table is thinned to every sixth row. Rows go to results/row_steps.csv.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
from bench_layers import minilm, stories
from common import RESULTS, environment, keep_row
from torch import nn

from autocompress.calibration import calibrate
from autocompress.compressors import COMPRESSORS, LayerProblem, default_options
from autocompress.compressors.base import measure
from autocompress.layers import find_layers
from autocompress.obs import weighted

OUT = RESULTS / "row_steps.csv"
EXPONENTS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625)
TARGETS = (0.003, 0.01, 0.03, 0.1, 0.2)


def bits_at(points: list[tuple[float, float]], target: float) -> float:
    """Bits at a relative error, from (relative error, bits per weight) of all options."""
    hull: list[tuple[float, float]] = []
    for error, bits in sorted(points):
        if not hull or bits < hull[-1][1]:
            hull.append((error, bits))
    errors, bits_ = np.log([e for e, _ in hull]), [b for _, b in hull]
    return float(np.interp(np.log(target), errors, bits_))


def run(network: str, model: nn.Module, batches: list[Any], name: str, thin: int) -> None:
    layer, found = find_layers(model)[name], calibrate(model, batches).layers[name]
    assert found.row_weights is not None
    weight = layer.matrix(model.get_parameter(layer.key))[:, ::thin]
    options = [o for o in default_options() if o.step is not None and not o.sparsity]
    for exponent in EXPONENTS:
        weighted.RowHessian.step_scales.__defaults__ = (exponent,)
        problem = LayerProblem(
            name, weight.shape[1:], weight, found.hessian, row_weights=found.row_weights[::thin].copy()
        )
        rows = measure(COMPRESSORS["rd"], problem, options)
        energy = problem.energy
        points = [(row.error / energy, 8 * row.bytes / weight.size) for row in rows if row.error > 0]
        figures = {f"bits_at_{target}": f"{bits_at(points, target):.3f}" for target in TARGETS}
        print(network, exponent, *figures.values())
        keep_row(
            OUT,
            {"network": network, "layer": name, "exponent": exponent, **figures, **environment()},
            ("network", "exponent"),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minilm", type=Path)
    given = parser.parse_args()
    folder = Path(os.environ["AUTOCOMPRESS_DATA"])
    if given.minilm is None:
        model, texts = stories(folder)
        run("stories260k", model, texts[:40], "embed", 1)
    else:
        run("all-MiniLM-L6-v2", *minilm(given.minilm, folder), "embeddings.word_embeddings", 6)


if __name__ == "__main__":
    main()
