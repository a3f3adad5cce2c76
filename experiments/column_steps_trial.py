"""Steps per column or per input channel against one step per layer: bytes at equal error on layers of ResNet-20.

    python experiments/column_steps_trial.py    # minutes on one core; rows that stand in the CSV are not computed again

A step per column is one step on a scaled problem: with D = diag(Δ_a / Δ), codes of W D⁻¹ under D H D. The steps are
Δ_a ∝ C_aa^-power, H = C Cᵀ from the last column back (at high rate power = 1 is optimal: every column then causes the
same error), rounded to half octaves, and paid for: `bytes` holds their exponents under the entropy codec. Rows are
hulls over steps and λ, `percent` against one step per layer with the same kind of codes, at errors relative to the
layer's energy. `order0_percent` compares ideal order-0 entropies instead, a histogram for every step that occurs and
the steps unpaid: what a coder could hope for that knows the steps and nothing else.

It did not pay: by order-0 entropy the steps save up to a tenth on narrow layers and little on wide ones, but the
context models of the codec have found that redundancy already: with them 141 of the 180 rows are no gain.
"""

from __future__ import annotations

import sys

import numpy as np
from common import RESULTS, ROOT, done_keys, environment, keep_row
from trellis_trial import Hull, bytes_at, hull

from autocompress import calibrate, obs
from autocompress.layers import find_layers
from autocompress.storage import CODECS, coded_size, order0_bits
from autocompress.threads import single_threaded

LAYERS = ("layer1.1.conv1", "layer2.1.conv1", "layer3.0.conv1", "linear", "layer3.1.conv1")
KEYS = ("layer", "codes", "steps_per", "power", "error")
ERRORS = (0.001, 0.003, 0.01, 0.03, 0.1)


def exponents(H: np.ndarray, power: float, width: int) -> np.ndarray:
    """Half octaves of the steps, int (d,), one value per `width` columns."""
    pivots = np.diag(np.linalg.cholesky(H[::-1, ::-1]))[::-1]
    wanted = -power * np.log2(pivots).reshape(-1, width).mean(axis=1)
    return np.repeat(np.rint(2 * (wanted - wanted.mean())).astype(int), width)


def points(W: np.ndarray, H: np.ndarray, shape: tuple[int, ...], halves: np.ndarray, extra: int, kind: str):
    """(relative error, bytes) and (relative error, order-0 bytes) over steps and λ; column steps 2^(halves / 2)."""
    scale = 2.0 ** (halves / 2)
    V, K = W / scale, H * np.outer(scale, scale)
    energy, rms = obs.layer_error(W, np.zeros_like(W), H), float(np.sqrt((V**2).mean()))
    found: Hull = []
    ideal: Hull = []
    if kind == "tcq":
        grid = [(0.17 * 2 ** (k / 2) * rms, lam) for k in range(8) for lam in (0.25, 0.4, 0.7, 1.0)]
        results = obs.trellis_codes(V, K, grid, threads=1)
    else:
        grid = [(0.283 * 2 ** (k / 2) * rms, lam) for k in range(8) for lam in (0.06, 0.1, 0.2, 0.4)]
        order, losses = obs.prune_trace(V, K, threads=1)
        results = []
        for sparsity in (0, 0.35, 0.6, 0.8):
            counts = obs.pruned_counts(losses, sparsity)
            cells = obs.rate_distortion_cells(V, K, order, counts, grid, threads=1)
            results += list(obs.salient_cells(V, K, order, counts, cells, threads=1)[0])
        grid = grid * 4
    codec = CODECS["trellis" if kind == "tcq" else "entropy"]
    for codes, (step, _) in zip(results, grid, strict=True):
        error = obs.layer_error(V, codes * step, K) / energy
        found.append((error, codec.size(codes.reshape(shape)) + extra))
        ideal.append((error, sum(order0_bits(codes[:, halves == h]) for h in np.unique(halves)) / 8))
    return hull(found), hull(ideal)


def main() -> None:
    sys.path.insert(0, str(ROOT / "experiments" / "tasks"))
    import resnet20_cifar10 as task

    model = task.model()
    stats = calibrate(model, task.calibration(seed=0), seed=0)
    layers = find_layers(model)
    known = done_keys(RESULTS / "column_steps_trial.csv", KEYS)
    for name in LAYERS:
        layer = layers[name]
        W = layer.matrix(model.get_parameter(layer.key))[0]
        H = stats.layers[name].hessian[0]
        kernel = int(np.prod(layer.shape[2:]))
        for kind in ("rd", "tcq"):
            if (name, kind, "column", "1.0", str(ERRORS[-1])) in known:
                continue
            with single_threaded():
                plain, plain_ideal = points(W, H, layer.shape, np.zeros(W.shape[1], int), 0, kind)
            variants = [(p, width) for width in {1, kernel} for p in (0.5, 1.0)]
            for power, width in sorted(variants, key=lambda v: (v[0], -v[1])):
                with single_threaded():
                    halves = exponents(H, power, width)
                    paid = coded_size(halves[::width])
                    mine, ideal = points(W, H, layer.shape, halves, paid, kind)
                for error in ERRORS:
                    row = {
                        "layer": name,
                        "codes": kind,
                        "steps_per": "column" if width == 1 else "channel",
                        "power": power,
                        "error": error,
                        "bytes_one_step": round(bytes_at(plain, error)),
                        "bytes": round(bytes_at(mine, error)),
                        "bytes_of_steps": paid,
                        "percent": round(100 * (bytes_at(mine, error) / bytes_at(plain, error) - 1), 2),
                        "order0_percent": round(100 * (bytes_at(ideal, error) / bytes_at(plain_ideal, error) - 1), 2),
                        **environment(),
                    }
                    keep_row(RESULTS / "column_steps_trial.csv", row, KEYS)
                print(name, kind, "per column" if width == 1 else "per channel", power, "paid", paid, end=": ")
                for some, reference, end in ((mine, plain, " | order 0: "), (ideal, plain_ideal, "\n")):
                    print(*(f"{100 * (bytes_at(some, e) / bytes_at(reference, e) - 1):+.1f}" for e in ERRORS), end=end)


if __name__ == "__main__":
    main()
