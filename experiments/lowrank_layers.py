"""How factors are best made: error and bytes of low-rank options on layers of ResNet-20, CIFAR-10.

    python experiments/lowrank_layers.py         # results/lowrank_layers.csv

share: the power of the singular values that the first factor gets (0: all of it is in the second; .5: the roots, as
the paper has it). sweeps: how often runs of channels make up for each other's errors. `plain`: singular vectors of the
weight instead of those of least output error. Relative error ½ tr(ΔW H ΔWᵀ) / energy; bits per weight of the layer.
Hessians of 819 unaugmented training images. Nothing here is timed.
"""

from __future__ import annotations

from common import RESULTS, ROOT, environment, keep_row

import autocompress as ac
from autocompress.compressors import LayerProblem, measure
from autocompress.compressors.lowrank import LowRank
from autocompress.layers import find_layers
from autocompress.tasks import load_task
from autocompress.types import Option

KEYS = ("layer", "structure", "values", "share", "sweeps")
LAYERS = ("layer1.2.conv2", "layer2.2.conv2", "layer3.0.conv2", "layer3.2.conv1")
STRUCTURES = ("rank8", "rank8p", "rank16", "rank16p", "rank24", "rank24p", "k2r16", "k2r16p", "k4r8", "k4r8p")
VALUES = ("", "fp16", "w8", "w6", "w4", "w3")
WAYS = ((0.5, 2), (0.5, 0), (0.5, 6), (0.0, 2), (0.25, 2), (1.0, 2))


def main() -> None:
    task = load_task(ROOT / "experiments" / "tasks" / "resnet20_cifar10.py")
    model = task.build_model()
    stats = ac.calibrate(model, task.calibration_batches(0), seed=0)
    layers = {layer.name: layer for layer in find_layers(model)}
    for name in LAYERS:
        layer = layers[name]
        weight = layer.matrix(model.get_parameter(layer.key))
        problem = LayerProblem(name, layer.stored_shape, weight, stats.layers[name].hessian)
        for share, sweeps in WAYS:
            for structure in STRUCTURES:
                groups = Option.parse(structure).groups
                if sweeps != 2 and (groups is None or structure.endswith("p")):
                    continue  # the same as with two
                found = measure(LowRank(share, sweeps), problem, [Option.parse(structure + v) for v in VALUES])
                for value, row in zip(VALUES, found, strict=False):
                    at = {"layer": name, "structure": structure, "values": value or "float32"}
                    at |= {"share": str(share), "sweeps": str(sweeps)}
                    error, bits = row.error / problem.energy, 8 * row.bytes / weight.size
                    figures = {"relative_error": f"{error:.5f}", "bits_per_weight": f"{bits:.3f}"}
                    keep_row(RESULTS / "lowrank_layers.csv", {**at, **figures, **environment()}, KEYS)


if __name__ == "__main__":
    main()
