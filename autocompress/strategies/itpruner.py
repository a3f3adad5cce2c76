"""ITPruner: layers whose outputs resemble those of the others may lose more."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch

from autocompress.batches import batch_samples, evaluating, feed, join_batches
from autocompress.errors import CalibrationError
from autocompress.measuring import Context
from autocompress.planning import allocate, energy_losses, limits_of
from autocompress.profiling import Profile
from autocompress.strategies.base import chosen_plan, no_worse_than, with_context
from autocompress.types import Budget, Plan

__all__ = ["ItPruner", "features", "importances", "kept_linear", "kept_quadratic", "linear_cka"]

SAMPLES = 100  # the paper's single batch
SPAN = 10.0  # how much more the most important layer counts than the least
REFERENCE_BITS = 8
ROUNDS, TRUST = 30, 0.3


class ItPruner:
    """Σ importance · kept share as large as the budget lets it be, importances from how alike layers' outputs are.
    Needs the model's outputs on 100 calibration samples; no gradients, no evaluations.

    K_lm is the linear CKA of the outputs of layers l and m, a_l = Σ_{m≠l} K_lm scaled to sum to one, and a layer's
    importance is exp(-β a_l). The paper sets β by hand for every network (246 for ResNet-20); here it is such that the
    most important layer counts `SPAN` times the least. What is kept of a layer is a share x_l in [0, 1] of its bytes at
    8 bits, B_l (the paper: channels, and FLOPs):

        linear      maximise Σ_l importance_l x_l   such that   Σ_l B_l x_l ≤ budget
        quadratic   maximise Σ_l importance_l x_l   such that   Σ_l B_l x_{l-1} x_l ≤ budget,   x_0 = 1

    the second with x_l as the share of a layer's outputs, which are the inputs of the next in the order of the model
    (in networks with branches, an approximation). It is not convex; successive linear programmes within a shrinking
    region of trust give a local answer. Every layer then gets the option of least error within its share, or, where
    none is as short, one that makes the file fit, and what is left of the budget goes where no layer gets worse.
    Source: ITPruner, arXiv 2108.08532, sections 3.2 and 3.3. Raises MismatchError without a context.
    """

    needs = "weights"

    def __init__(self, quadratic: bool = False) -> None:
        self.quadratic = quadratic
        self.name = "itpruner_quadratic" if quadratic else "itpruner"

    def __call__(self, profile: Profile, budget: Budget, context: Context | None) -> Plan:
        context = with_context(context, self.name, "looks at the outputs of layers")
        limits = limits_of(budget, profile)
        errors = energy_losses(profile)
        first = allocate(profile, limits, errors)  # refuses what cannot be, and knows how long the header is
        sizes = {n: np.array([row.bytes for row in x.rows], np.float64) for n, x in profile.layers.items()}
        least = np.array([s.min() for s in sizes.values()])
        full = np.array([max(REFERENCE_BITS / 8 * math.prod(profile.shape(n)), s.min()) for n, s in sizes.items()])
        importance = importances(linear_cka(features(context, profile)))
        solve = kept_quadratic if self.quadratic else kept_linear
        share = np.maximum(solve(importance, full, least / full, float(first.payload_bytes)) * full, least)
        # An option beyond its layer's share costs more than any sum of errors: the solver takes as few as it must.
        beyond = 2.0 * sum(float(e.max()) for e in errors.values()) + 1.0
        wanted = {
            n: e + beyond * (sizes[n] > math.floor(s + 1e-6)) for (n, e), s in zip(errors.items(), share, strict=True)
        }
        rows = allocate(profile, limits, wanted).rows
        narrowed = no_worse_than(profile, rows)
        rows = allocate(narrowed, limits, energy_losses(narrowed)).rows
        return chosen_plan(profile, budget, rows, self.name)


def features(context: Context, profile: Profile) -> list[np.ndarray | None]:
    """What every layer puts out for the first `SAMPLES` calibration samples, float64 (samples, values); None for a
    layer whose module is not called by itself, or whose outputs are not one per sample.
    """
    batch = join_batches(context.fit, SAMPLES)
    count = batch_samples(batch)
    found: dict[str, np.ndarray] = {}

    def hook(module: Any, inputs: Any, output: Any, name: str) -> None:
        tensor = output[0] if isinstance(output, tuple | list) and output else output
        if name not in found and isinstance(tensor, torch.Tensor) and tensor.ndim and len(tensor) == count:
            found[name] = tensor.detach().reshape(count, -1).double().cpu().numpy()

    handles = [
        context.model.get_submodule(layer.layer.owners[0]).register_forward_hook(functools.partial(hook, name=name))
        for name, layer in profile.layers.items()
    ]
    try:
        with torch.no_grad(), evaluating(context.model):
            feed(context.model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return [found.get(name) for name in profile.layers]


def linear_cka(outputs: list[np.ndarray | None]) -> np.ndarray:
    """CKA_lm = ‖Y_lᵀ Y_m‖² / (‖Y_lᵀ Y_l‖ ‖Y_mᵀ Y_m‖) of column-centred outputs Y (samples, values), in Frobenius norms,
    (layers, layers); nan where one is None, 0 where one is constant. Source: arXiv 1905.00414, equation 4.
    """
    grams: list[np.ndarray | None] = []
    for y in outputs:
        if y is None:
            grams.append(None)
            continue
        centred = y - y.mean(axis=0)
        gram = centred @ centred.T  # <Y_l Y_lᵀ, Y_m Y_mᵀ> = ‖Y_lᵀ Y_m‖²
        norm = float(np.linalg.norm(gram))
        grams.append(gram / norm if norm > 0.0 else gram)
    found = np.full((len(grams), len(grams)), np.nan)
    for i, a in enumerate(grams):
        for j, b in enumerate(grams):
            if a is not None and b is not None:
                found[i, j] = float(np.sum(a * b))
    return found


def importances(cka: np.ndarray, span: float = SPAN) -> np.ndarray:
    """exp(-β a), (layers,), a_l = Σ_{m≠l} CKA_lm scaled to sum to one, β = ln(span) / (max a - min a); layers without
    outputs count as the mean of the others. Scaled so that the largest is one.
    """
    seen = ~np.isnan(np.diag(cka))
    if not seen.any():
        raise CalibrationError("no layer puts out one value per sample, so none can be compared with another")
    a = np.nansum(cka, axis=1) - np.nan_to_num(np.diag(cka))
    a[~seen] = a[seen].mean()
    a = a / (a.sum() or 1.0)
    spread = float(a.max() - a.min())
    beta = math.log(span) / spread if spread > 1e-12 else 0.0
    return np.exp(-beta * (a - a.min()))


def kept_linear(importance: np.ndarray, size: np.ndarray, least: np.ndarray, budget: float) -> np.ndarray:
    """x (layers,) in [least, 1] of largest importanceᵀ x such that sizeᵀ x ≤ budget; `least` where nothing fits."""
    import cvxpy as cp

    x = cp.Variable(len(size))
    scale = float(size.sum())
    within = [(size / scale) @ x <= budget / scale, x >= least, x <= 1.0]
    cp.Problem(cp.Maximize(importance @ x), within).solve(solver=cp.HIGHS)
    return np.minimum(least, 1.0) if x.value is None else np.clip(x.value, least, 1.0)


def kept_quadratic(importance: np.ndarray, size: np.ndarray, least: np.ndarray, budget: float) -> np.ndarray:
    """x_{l-1} x_l (layers,), the share of a layer's bytes, for x in (0, 1] of largest importanceᵀ x such that
    Σ size_l x_{l-1} x_l ≤ budget.

    Successive linear programmes: products are linearised at the last x, steps are at most a trusted length, and a step
    that does not help after scaling back into the budget halves it. Starts where all layers keep the same share.
    """
    import cvxpy as cp

    n = len(size)
    first = np.zeros(n)
    first[0] = size[0]

    def used(x: np.ndarray) -> float:
        return float(size[0] * x[0] + np.sum(size[1:] * x[:-1] * x[1:]))

    def fitted(x: np.ndarray) -> np.ndarray:
        """The largest multiple of x that is within the budget and has no share above one."""
        pairs, alone = used(x) - size[0] * x[0], size[0] * x[0]
        root = (-alone + math.sqrt(alone * alone + 4.0 * pairs * budget)) / (2.0 * pairs) if pairs else budget / alone
        return x * min(1.0 / x.max(), root)

    x = fitted(np.ones(n))
    trust, floor = TRUST, 1e-3
    step, slope, room = cp.Variable(n), cp.Parameter(n), cp.Parameter()
    low, high = cp.Parameter(n), cp.Parameter(n)
    problem = cp.Problem(cp.Maximize(importance @ step), [slope @ step <= room, step >= low, step <= high])
    for _ in range(ROUNDS):
        gradient = first.copy()
        gradient[1:] += size[1:] * x[:-1]
        gradient[:-1] += size[1:] * x[1:]
        slope.value, room.value = gradient / size.sum(), (budget - used(x)) / size.sum()
        low.value, high.value = np.maximum(-trust * x, floor - x), np.minimum(trust * x, 1.0 - x)
        problem.solve(solver=cp.HIGHS)
        trial = x if step.value is None else fitted(np.clip(x + step.value, floor, 1.0))
        if importance @ trial > importance @ x * (1.0 + 1e-9):
            x = trial
        else:
            trust *= 0.5
    shares = x.copy()
    shares[1:] *= x[:-1]
    return np.maximum(shares, np.minimum(least, 1.0))
