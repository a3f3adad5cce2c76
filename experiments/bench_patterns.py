"""What each pattern loses and weighs on the layers of a network: error, bytes in the file, bytes of a plain layout.

    python experiments/bench_patterns.py                      # ResNet-20, 1,024 calibration images; needs the data
    python experiments/bench_patterns.py --options "2:4,w4"   # names or families; rows that are there are replaced

`relative_error` is the mean over the layers of ½ tr(ΔW H ΔWᵀ) over the layer's energy, `largest` the worst of them;
`bytes` what the file holds of the weights (entropy-coded codes or masks, steps), `plain_bytes` what fixed fields need:
see `plain_bytes`. `cpu_seconds`: processor time of mask, refit, quantisation and coding of all layers on one thread,
without the pruning trace.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from common import RESULTS, environment, keep_row

import autocompress as ac
from autocompress.compressors import LayerProblem, Measured, Realised, named_options, profile_layer, realise
from autocompress.layers import find_layers
from autocompress.tasks import load_task
from autocompress.threads import single_threaded
from autocompress.types import Option

NAMES = """
dense fp16 fp8 s50fp8
s50 s75 s90 s50fp16 s75fp16 s90fp16
2:4 1:4 4:8 2:4fp16 2:4w8 2:4w4 4:8w4
blk4@50 blk4@75 blk4x4@50 blk4@50w8 blk4x4@50w8
ch25 ch50 ch50w8 out25 out50 out50w8
w1 w2 w3 w4 w5 w6 w7 w8
w1a w2a w3a w4a w8a
w2m w4m w8m w4am
w4t w8t w4ta
w2g32 w4g32 w4g64 w4g128 w4g32a w4g128a
s50w4 s75w4 s60w4a s50w4g32
rd(0.5,0.1) rd(0.5,0.3) rd(0.5,0.3)s60 rd(0.5,0.3)2:4 rd(0.5,0.3)blk4@50 rd(0.5,0.3)ch25
"""


def plain_bytes(found: Realised, option: Option) -> int:
    """Bytes of the shortest layout of fixed fields: all values; or a bit per weight and what is not zero; or the number
    of the subset and the N values of every M input channels. Values have the bits of the option, or as many as the
    codes need. Channels that go leave a smaller matrix and a bit for each channel. Steps as the file has them, with a
    zero point of the same width as a code where the grid is not symmetric.
    """
    weight = found.weight().reshape(*found.shape[:2], -1) != 0
    extra = 0
    if option.channels is not None or option.out is not None:
        rows, channels = weight.any(axis=(1, 2)), weight.any(axis=(0, 2))
        extra += math.ceil(rows.size / 8) + math.ceil(channels.size / 8)
        weight = weight[rows][:, channels]
    if option.step is not None and found.codes is not None:
        width = max(int(found.codes.max()) - int(found.codes.min()), 1).bit_length()
    else:
        width = option.bits or (8 if option.fp8 else 16 if option.half else 32)
    if found.codes is not None:
        extra += 2 * np.size(found.step) if np.ndim(found.step) else 4
        extra += math.ceil(np.size(found.step) * width / 8) if option.asymmetric else 0
    count, kept = weight.size, int(np.count_nonzero(weight))
    sizes = [math.ceil(count / 8) + math.ceil(kept * width / 8)]
    if option.bits != 1 or kept == count:  # between -1 and 1 there is no zero
        sizes.append(math.ceil(count * width / 8))
    if option.nm is not None and weight.shape[1] % option.nm[1] == 0:
        n, m = option.nm
        index = math.ceil(math.log2(math.comb(m, n)))
        sizes.append(math.ceil(count // m * (index + n * width) / 8))
    return min(sizes) + extra


def main(
    task: Annotated[Path, typer.Option(help="A task file.")] = RESULTS.parent / "tasks" / "resnet20_cifar10.py",
    options: Annotated[str, typer.Option(help="Names or families.")] = NAMES,
    out: Annotated[Path, typer.Option(help="The CSV.")] = RESULTS / "patterns.csv",
    seed: int = 0,
) -> None:
    """Measure every option on every layer, one row per option."""
    found = load_task(str(task))
    model = found.build_model()
    stats = ac.calibrate(model, found.calibration_batches(seed), seed=seed)
    layers = [layer for layer in find_layers(model) if layer.name in stats.layers]
    problems = []
    for layer in layers:
        weight = layer.matrix(model.get_parameter(layer.key))
        problems.append(LayerProblem(layer.name, layer.shape, weight, stats.layers[layer.name].hessian))
    with single_threaded():
        for problem in problems:
            problem.trace()
    for option in named_options([options]):
        rows: list[Measured] = []
        plain, seconds = 0, 0.0
        for problem in problems:
            fresh = LayerProblem(
                *(getattr(problem, n) for n in ("name", "shape", "weight", "hessian", "order", "losses"))
            )
            start = time.process_time()
            measured = profile_layer(fresh, [option])[0]
            seconds += time.process_time() - start
            rows += measured
            plain += plain_bytes(realise(fresh, option), option) if measured else 0
        if len(rows) < len(problems):
            raise RuntimeError(f"{option}: {len(problems) - len(rows)} layers cannot have it")
        errors = [row.error / problem.energy for row, problem in zip(rows, problems, strict=True)]
        weights = sum(problem.weight.size for problem in problems)
        size = sum(row.bytes for row in rows)
        row = {
            "task": task.stem,
            "option": str(option),
            "relative_error": f"{np.mean(errors):.5g}",
            "largest": f"{max(errors):.5g}",
            "bytes": size,
            "bits_per_weight": f"{8 * size / weights:.3f}",
            "plain_bytes": plain,
            "cpu_seconds": f"{seconds:.3g}",
            "layers": len(problems),
            "seed": seed,
            **environment(),
        }
        keep_row(out, row, ("task", "option"))
        print(f"{option!s:24} {row['relative_error']:>10} {size:>9,} {plain:>9,} {row['cpu_seconds']:>7}")


if __name__ == "__main__":
    typer.run(main)
