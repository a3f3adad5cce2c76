"""Bytes at equal error, ResNet-20: trellis-coded options against scalar ones, and scalar grids against each other.

    python experiments/trellis_trial.py              # 20 minutes on a busy core; layers that are done are kept
    python experiments/trellis_trial.py --layers 3   # only the first three

Every option of every set below is realised for every layer, with its bytes from the real codec and its error from the
layer's Hessian (1,024 calibration images, seed 0, a fifth held out). Errors are relative to the layer's energy and
summed over the layers. Each set is first planned exactly to the budget of the row by its own convex hulls (least error
in a number of bytes: the Lagrangian over all layers). `percent` is then what the set needs more or less than the
default scalar grid for the summed error that the latter has at that budget; `per_layer_percent` is the same with every
layer held to its own error in the scalar plan. Bytes are those of the layers' payloads; the budget is the whole file's,
of which 3,150 bytes are assumed to be something else.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

import numpy as np
from common import RESULTS, ROOT, environment, keep_row

from autocompress import calibrate
from autocompress.compressors import COMPRESSORS
from autocompress.compressors.base import LayerProblem, measure
from autocompress.layers import find_layers
from autocompress.threads import single_threaded
from autocompress.types import Option

RATIOS = (8, 12, 16, 20, 24, 32, 48)
DENSE_BYTES, FIXED_BYTES = 1_092_516, 3_150
SPARSITIES = (0, 20, 35, 50, 60, 70, 77.5, 85, 90, 94, 97)
QUARTERS = [round(0.2 * 2 ** (k / 4), 3) for k in range(15)]  # 0.2 ... 2.26
LAMBDAS = (0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.7)
TRELLIS_STEPS = [round(0.12 * 2 ** (k / 4), 3) for k in range(17)]  # 0.12 ... 1.92
TRELLIS_LAMBDAS = (0.15, 0.25, 0.4, 0.55, 0.7, 0.9, 1.2)

Corner = tuple[float, float]  # error, bytes
Hull = list[Corner]


def rd(sparsities, steps, lambdas) -> set[Option]:
    return {Option(sparsity=float(s), step=t, lam=x) for s in sparsities for t in steps for x in lambdas}


def tcq(steps, lambdas) -> set[Option]:
    return {Option(step=t, lam=x, trellis=True) for t in steps for x in lambdas}


def option_sets() -> dict[str, set[Option]]:
    """What is compared: rate-distortion options alone, scalar and on the trellis, without wN and fp16.

    "rd default" was the default before there was a trellis, and "tcq default" the first grid of the trellis.
    """
    first = rd(SPARSITIES, [round(0.1 * 2 ** (k / 2), 3) for k in range(11)], (0.1, 0.3, 0.7))
    trellis = tcq(TRELLIS_STEPS[::2], (0.25, 0.4, 0.7))
    halves, odd = QUARTERS[::2], QUARTERS[1::2]
    sets = {
        "rd default": first,
        "tcq default": trellis,
        "rd + tcq default": first | trellis,
        "rd all": rd(SPARSITIES, QUARTERS, LAMBDAS),
        "tcq all": tcq(TRELLIS_STEPS, TRELLIS_LAMBDAS),
        "rd + tcq all": rd(SPARSITIES, QUARTERS, LAMBDAS) | tcq(TRELLIS_STEPS, TRELLIS_LAMBDAS),
    }
    scalar: tuple[tuple[str, tuple[float, ...]], ...] = (
        ("0.1", (0.1,)),
        ("0.1 0.2", (0.1, 0.2)),
        ("0.06 0.1 0.2", (0.06, 0.1, 0.2)),
        ("0.1 0.2 0.3", (0.1, 0.2, 0.3)),
        ("0.1 0.3 0.7", (0.1, 0.3, 0.7)),
        ("0.03 0.1 0.2", (0.03, 0.1, 0.2)),
    )
    for name, lambdas in scalar:
        sets[f"rd half octaves, lam {name}"] = rd(SPARSITIES, halves, lambdas)
    sets["rd half octaves, all lam"] = rd(SPARSITIES, halves, LAMBDAS)
    sets["rd quarter octaves, lam 0.1"] = rd(SPARSITIES, QUARTERS, (0.1,))
    sets["rd quarter octaves, lam 0.1 0.2"] = rd(SPARSITIES, QUARTERS, (0.1, 0.2))
    sets["rd quarter octaves, lam 0.1 and 0.3 in turn"] = rd(SPARSITIES, halves, (0.1,)) | rd(SPARSITIES, odd, (0.3,))
    sets["rd quarter octaves, lam 0.1, no pruning first"] = rd((0,), QUARTERS, (0.1,))
    dependent: tuple[tuple[str, tuple[float, ...]], ...] = (
        ("0.4", (0.4,)),
        ("0.4 0.7", (0.4, 0.7)),
        ("0.25 0.55", (0.25, 0.55)),
        ("0.25 0.4 0.7", (0.25, 0.4, 0.7)),
        ("0.25 0.4 0.7 1.2", (0.25, 0.4, 0.7, 1.2)),
    )
    for name, lambdas in dependent:
        sets[f"tcq half octaves, lam {name}"] = tcq(TRELLIS_STEPS[::2], lambdas)
        sets[f"tcq quarter octaves, lam {name}"] = tcq(TRELLIS_STEPS, lambdas)
    # how few scalar options do beside the trellis
    steps = sorted({o.step or 0.0 for o in sets["rd default"]})
    for sparsities, lambdas in (
        ((0, 35, 60, 77.5, 90, 97), (0.1, 0.3, 0.7)),
        ((0, 50, 77.5, 90, 97), (0.1, 0.7)),
        ((0, 60, 85, 97), (0.1,)),
    ):
        fewer = rd(sparsities, steps, lambdas)
        sets[f"rd s {' '.join(map(str, sparsities))}, lam {' '.join(map(str, lambdas))}; tcq default"] = (
            fewer | sets["tcq default"]
        )
    return sets


def layer_rows(problem: LayerProblem, options: set[Option], path: Path) -> dict[Option, tuple[float, int]]:
    """(relative error, bytes) of every option of a layer; what `path` has is not computed again."""
    known = json.loads(path.read_text()) if path.exists() else {}
    missing = sorted({o for o in options if str(o) not in known}, key=str)
    with single_threaded():
        for compressor in (COMPRESSORS["rd"], COMPRESSORS["tcq"]):
            for row in measure(compressor, problem, [o for o in missing if compressor.offers(o)]):
                known[str(row.option)] = (row.error / problem.energy, row.bytes)
    path.write_text(json.dumps(known))
    return {o: tuple(known[str(o)]) for o in options}


def hull(points: Hull) -> Hull:
    """Lower convex hull of (error, bytes), by rising error."""
    found: Hull = []
    for error, size in sorted(points):
        if found and size >= found[-1][1]:
            continue
        while len(found) > 1 and (found[-1][1] - found[-2][1]) * (error - found[-2][0]) >= (size - found[-2][1]) * (
            found[-1][0] - found[-2][0]
        ):
            found.pop()
        found.append((error, size))
    return found


def network(hulls: list[Hull]) -> tuple[np.ndarray, np.ndarray, list[tuple[float, int, Corner, Corner]]]:
    """The hull of all layers together: (errors, bytes) by falling bytes per error, and the pieces it is made of."""
    pieces = sorted(
        ((a[1] - b[1]) / (b[0] - a[0]), layer, a, b) for layer, h in enumerate(hulls) for a, b in itertools.pairwise(h)
    )[::-1]
    error, size = sum(h[0][0] for h in hulls), sum(h[0][1] for h in hulls)
    errors, sizes = [error], [size]
    for _, _, a, b in pieces:
        error, size = error + b[0] - a[0], size + b[1] - a[1]
        errors.append(error)
        sizes.append(size)
    return np.array(errors), np.array(sizes), pieces


def bytes_at(h: Hull, error: float) -> float:
    """Bytes on the hull at an error, linear between its corners in the logarithms of both; flat beyond its ends."""
    errors, sizes = np.log([max(e, 1e-12) for e, _ in h]), np.log([s for _, s in h])
    return float(np.exp(np.interp(np.log(error), errors, sizes)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--cache", default="runs/trellis_trial")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT / "experiments" / "tasks"))
    import resnet20_cifar10 as task

    cache = ROOT / arguments.cache
    cache.mkdir(parents=True, exist_ok=True)
    model = task.model()
    stats = calibrate(model, task.calibration(seed=0), seed=0)
    sets = option_sets()
    wanted = set().union(*sets.values())
    rows = {}
    for layer in list(find_layers(model))[: arguments.layers]:
        weight = layer.matrix(model.get_parameter(layer.key))
        problem = LayerProblem(layer.name, layer.shape, weight, stats.layers[layer.name].hessian)
        start = time.perf_counter()
        rows[layer.name] = layer_rows(problem, wanted, cache / f"{layer.name}.json")
        print(f"{layer.name}: {len(wanted)} options, {time.perf_counter() - start:.0f} s", flush=True)
    hulls = {name: [hull([r[o] for o in options]) for r in rows.values()] for name, options in sets.items()}
    reference = hulls["rd default"]
    errors, sizes, pieces = network(reference)
    for ratio in RATIOS:
        budget = DENSE_BYTES / ratio - FIXED_BYTES
        at = int(np.argmax(sizes <= budget))
        corner = [h[0] for h in reference]
        for _, index, _, b in pieces[:at]:
            corner[index] = b
        for name, mine in hulls.items():
            e, s, _ = network(mine)
            together = float(np.interp(errors[at], e, s))
            apart = sum(bytes_at(h, c[0]) for h, c in zip(mine, corner, strict=True))
            row = {
                "ratio": ratio,
                "options": name,
                "per_layer": len(sets[name]),
                "relative_error": f"{errors[at]:.5f}",
                "bytes": round(together),
                "percent": round(100 * (together / sizes[at] - 1), 2),
                "per_layer_percent": round(100 * (apart / sizes[at] - 1), 2),
                **environment(),
            }
            keep_row(RESULTS / "trellis_trial.csv", row, ("ratio", "options"))
            print(f"{ratio}x {name:46s} {row['bytes']:7d} {row['percent']:+7.2f} % {row['per_layer_percent']:+7.2f} %")


if __name__ == "__main__":
    main()
