"""OPQ-style: closed forms for Laplace weights, in two normalisations."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
from scipy.special import lambertw

from autocompress.compressors import Measured
from autocompress.measuring import Context
from autocompress.planning import limits_of, within_limits
from autocompress.profiling import Profile
from autocompress.strategies.base import Choice, chosen_plan, largest_that_fits, refused, weights_of
from autocompress.strategies.densities import LEAST_DENSITY, SparseFamily, integer_families
from autocompress.types import Budget, Plan

__all__ = ["Opq", "laplace_bits", "laplace_error", "laplace_threshold"]

STEPS = 24  # of the bisection for Δ, which changes a choice at most as often as there are layers times widths
LEAST_TAU = 1e-12  # a layer of zeros is pruned for nothing, whatever its scale
UNDERFLOW = 700.0  # e^-700 is still a float; of a layer so far below the threshold nothing is kept


class Opq:
    """One threshold for pruning and one step for all layers, in closed form for weights of Laplace distributions.

    Layer l: N_l weights, |w| exponential with mean τ_l = mean |w|; n_l = N_l e^{-β_l/τ_l} of them are above β_l.
    Pruning.  dE/ds = N_l β_l² for the error E of pruning a share s_l = 1 - e^{-β_l/τ_l}. Least Σ E_l for a given
    Σ N_l s_l has N_l β_l² = λ N_l: one threshold β for all layers.
    Widths.  2^b levels in ±c leave, per weight,
        2 τ² e^{-c/τ} + e^{-β/τ} Δ²/12   with the step Δ = 2c / 2^b,   least where (c/τ) e^{c/τ} = 3 · 4^b e^{β/τ}.
    There the error falls by n_l Δ_l² ln 2 / 6 for each bit, which costs n_l bits, so least error for a given Σ n_l b_l
    has one step Δ for all layers, and b_l = log2(2 c_l / Δ) (`laplace_bits`). All channels of a layer share it.
    `normalised`: errors are divided by the layer's mean square weight 2 τ_l². Then β_l and Δ_l are proportional to τ_l,
    which is one sparsity and one width for all layers.
    How much goes to which is no part of either Lagrangian: every density on offer is tried as that of the network, with
    the smallest step whose real file fits, and the least modelled error stays. Layers take the nearest options.
    Source: OPQ, arXiv 2205.11141 ("-style": the paper's text was not available, so its normaliser may be another; the
    derivation above is this project's). Needs the weights, and options such as s60w4.
    """

    needs = "weights"

    def __init__(self, name: str, normalised: bool) -> None:
        self.name = name
        self.normalised = normalised

    def __call__(self, profile: Profile, budget: Budget, context: Context | None) -> Plan:
        """Raises MismatchError without a context or sparse integers, InfeasibleError where not even the least fits."""
        families = integer_families(profile, self.name)
        weights = weights_of(profile, context, self.name)
        size = {n: w.size for n, w in weights.items()}
        tau = {n: 1.0 if self.normalised else max(float(np.abs(w).mean()), LEAST_TAU) for n, w in weights.items()}
        densities = {1.0 - row.option.sparsity / 100.0 for f in families.values() for n in tau for row in f.rows[n]}
        limits = limits_of(budget, profile)
        smallest: list[Choice] = []
        found: list[tuple[float, Choice]] = []
        for density in sorted(densities):
            beta = laplace_threshold(size, tau, density)
            propose = partial(_choice, families, tau, beta)
            smallest.append(propose(0.0))
            if within_limits(profile, limits, smallest[-1]):
                rows = largest_that_fits(profile, budget, propose, self.name, STEPS)
                options = {n: rows[n].option for n in tau}
                errors = [size[n] * tau[n] ** 2 * laplace_error(o.sparsity, o.bits or 0) for n, o in options.items()]
                found.append((sum(errors), rows))
        if not found:
            raise refused(profile, budget, smallest, f"no choice of strategy {self.name!r}")
        return chosen_plan(profile, budget, min(found, key=lambda pair: pair[0])[1], self.name)


def laplace_threshold(size: Mapping[str, int], tau: Mapping[str, float], density: float) -> float:
    """β with Σ N_l e^{-β/τ_l} = density · Σ N_l, to a part in 10^12; {layer: number of weights}, {layer: mean |w|}."""
    counts, scales = np.array([size[n] for n in tau], np.float64), np.array(list(tau.values()))
    density = max(density, LEAST_DENSITY)
    low, high = 0.0, -float(np.log(density)) * float(scales.max(initial=0.0))
    while high - low > 1e-12 * high:
        middle = 0.5 * (low + high)
        above = float((counts * np.exp(-middle / scales)).sum()) > density * counts.sum()
        low, high = (middle, high) if above else (low, middle)
    return high


def laplace_bits(step: float, pruned: float = 0.0) -> float:
    """Bits for a step Δ, both steps and thresholds (pruned = β) in units of τ: log2(2c/Δ), at the c that goes with it.

    (c) e^c = 3 · 4^b e^β and 4^b = 4 c²/Δ² give e^c / c = 12 e^β / Δ², so c = -W₋₁(-Δ² e^{-β} / 12), the lower branch
    of Lambert's function; where Δ² > 12 e^{β-1} no range goes with the step, and c = 1.
    """
    argument = step**2 * np.exp(-min(pruned, UNDERFLOW)) / 12.0
    # At the branch point, -1/e, rounding may leave no value.
    clip = 1.0 if argument > 0.3678 else -float(lambertw(-argument, -1).real)
    return float(np.log2(2.0 * max(clip, 1.0) / step))


def laplace_error(sparsity: float, bits: int) -> float:
    """Mean squared error per weight, in units of τ², of pruning that percentage and 2^bits levels for the others.

    2 - e^{-β}(β² + 2β + 2) + 2 e^{-c} + e^{-β} c² / (3 · 4^b), β and c in units of τ. Rounding errors are taken as even
    within a step, and the outermost levels as ±c: that is too little by a sixth for 3 bits with nothing pruned, and by
    a few percent where half of the weights or more are.
    """
    kept = max(1.0 - sparsity / 100.0, LEAST_DENSITY)
    beta = -np.log(kept)
    clip = float(lambertw(3.0 * 4.0**bits / kept).real)
    return float(2.0 - kept * (beta**2 + 2.0 * beta + 2.0) + 2.0 * np.exp(-clip) + kept * clip**2 / (3.0 * 4.0**bits))


def _choice(
    families: Mapping[int, SparseFamily], tau: Mapping[str, float], beta: float, t: float
) -> dict[str, Measured]:
    """Rows for the threshold β and a step that falls from one that gives every layer the least width (t = 0) to one
    that gives all of them the largest (t = 1).
    """
    widths = np.array(list(families))
    least, most = min(tau.values()), max(tau.values())
    # As c < 1.5 + 2 β/τ from Δ = 12 τ on, layers have less than a bit at the first; they have more than b at the last.
    high, low = np.log(12.0 * most + 4.0 * beta), np.log(least) - widths[-1] * np.log(4.0)
    step = float(np.exp(high + t * (low - high)))
    found = {}
    for name, rows in families[int(widths[0])].rows.items():
        if name in tau:
            bits = laplace_bits(step / tau[name], beta / tau[name])
            width = int(widths[np.argmin(np.abs(widths - bits))])
            found[name] = families[width].nearest_row(name, float(np.exp(-beta / tau[name])))
        else:
            found[name] = rows[0]
    return found


opq = Opq("opq", normalised=False)
opq_energy = Opq("opq_energy", normalised=True)
