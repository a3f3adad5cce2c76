"""OBC's loss mode: what compressing one layer alone does to the loss, measured along its error curve."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import isotonic_regression
from torch import nn

from autocompress.applying import with_weights
from autocompress.batches import Batch, batch_digest, batch_samples, chunk_batch, evaluating, join_batches
from autocompress.compressors import Measured
from autocompress.measuring import PASS_SAMPLES, Context
from autocompress.profiling import LayerProfile, Profile
from autocompress.strategies.base import solved_plan, with_context
from autocompress.strategies.weighing import kept, realised_weights, require_whole
from autocompress.types import Budget, Plan

__all__ = ["LayerLoss", "along_errors", "levels"]

VERSION = 1
LEAST_ERROR = 1e-4  # relative; what a layer with less does to the loss drowns in the rounding of the outputs


class LayerLoss:
    """Least summed rise of the loss, each layer compressed alone, by an exact solve. Runs the model: `levels` times per
    layer.

    The loss is the task's where the context has one and labelled batches, else the KL to the dense model, on
    `samples` samples. OBC measures every option; here a dozen options are measured along each layer's error curve,
    evenly in log error, and the rest interpolated: the rise as a monotone function of the error, linear in their
    logarithms, in proportion to the error outside of what was measured. What was measured is kept in the profile's
    store. Source: OBC, arXiv 2208.11580, section 6 and its code (`loss` mode). Raises MismatchError without a context.
    """

    needs = "evaluations"

    def __init__(self, levels: int = 12, samples: int = 256) -> None:
        self.levels, self.samples = levels, samples

    def __call__(self, profile: Profile, budget: Budget, context: Context | None) -> Plan:
        context = with_context(context, "loss", "measures the model")
        points = self.measured(profile, context)
        losses = {
            name: along_errors(np.array([row.error for row in layer.rows]), points[name])
            for name, layer in profile.layers.items()
        }
        return solved_plan(profile, budget, losses, "loss")

    def measured(self, profile: Profile, context: Context) -> dict[str, list[list[float]]]:
        """[error, rise of the loss] at a dozen options of every layer, by rising error; none for a layer that
        calibration never reached.
        """
        labelled = context.labelled(self.samples)
        batch = join_batches(labelled or context.fit, self.samples)
        key = [VERSION, batch_digest(batch), *context.loss_key(labelled), self.levels]
        return kept(context, profile, "loss", key, lambda: self.measure(profile, context, batch, bool(labelled)))

    def measure(self, profile: Profile, context: Context, batch: Batch, labelled: bool) -> dict[str, list[list[float]]]:
        require_whole(context.model)
        # One copy of the model for all, norms and biases as they will be stored; only a layer's weight comes and goes.
        small = with_weights(context.model, profile, {}, None)
        pieces = chunk_batch(batch, PASS_SAMPLES)
        measure = mean_loss(context, small, pieces) if labelled else mean_divergence(context, small, pieces)
        dense = measure()
        found: dict[str, list[list[float]]] = {}
        for name, layer in profile.layers.items():
            weight = small.get_parameter(layer.layer.key)
            before = weight.detach().clone()
            errors = {row.option: row.error for row in levels(layer, self.levels)}
            found[name] = []
            for option, made in realised_weights(context.model, profile, name, list(errors)):
                with torch.no_grad():
                    weight.copy_(torch.from_numpy(made))
                found[name].append([errors[option], measure() - dense])
                context.evaluations += 1
            with torch.no_grad():
                weight.copy_(before)
            found[name].sort()
        return found


def levels(layer: LayerProfile, count: int) -> list[Measured]:
    """The options, at most `count`, whose errors lie nearest to levels that are even in log error between the least and
    the largest of the layer; of options no worse in error, only the shortest.
    """
    rows: list[Measured] = []
    for row in sorted(layer.rows, key=lambda r: (r.error, r.bytes, str(r.option))):
        if row.error > LEAST_ERROR * layer.energy and (not rows or row.bytes < rows[-1].bytes):
            rows.append(row)
    if not layer.reached or layer.energy <= 0.0 or not rows:
        return []
    logs = np.log([row.error for row in rows])
    nearest = {int(np.argmin(np.abs(logs - level))) for level in np.linspace(logs[0], logs[-1], count)}
    return [rows[i] for i in sorted(nearest)]


def along_errors(errors: np.ndarray, points: list[list[float]]) -> np.ndarray:
    """Losses (options,) at errors, from measured [error, rise] points by rising error.

    Logarithms of the rises, made monotone by least squares, are interpolated linearly over the logarithms of the
    errors, with slope 1 outside; no error is no loss. A rise that is not positive, as labels give, counts as a
    millionth of what the point of the largest rise has per error.
    """
    measured = np.array(points, np.float64).reshape(-1, 2)
    if not len(measured) or measured[:, 1].max() <= 0.0:
        return np.zeros(len(errors))
    at, rise = measured.T
    top = int(np.argmax(rise))
    x, y = np.log(at), np.log(np.maximum(rise, 1e-6 * rise[top] * at / at[top]))
    y = isotonic_regression(y).x
    z = np.log(np.maximum(errors, 1e-300))
    inside = np.interp(z, x, y)
    logs = inside + np.minimum(z - x[0], 0.0) + np.maximum(z - x[-1], 0.0)
    return np.where(errors > 0.0, np.exp(logs), 0.0)


def mean_loss(context: Context, small: nn.Module, pieces: list[Batch]) -> Callable[[], float]:
    """Measures the task's loss of the model as it stands, mean over samples."""
    sizes = np.array([batch_samples(piece) for piece in pieces])

    def measure() -> float:
        assert context.loss is not None
        with torch.no_grad(), evaluating(small):
            return float(sizes @ [float(context.loss(small, piece)) for piece in pieces] / sizes.sum())

    return measure


def mean_divergence(context: Context, small: nn.Module, pieces: list[Batch]) -> Callable[[], float]:
    """Measures the KL of the model as it stands from what it is now, mean over samples."""

    def outputs() -> list[torch.Tensor]:
        with torch.no_grad(), evaluating(small):
            return [context.output(small, piece) for piece in pieces]

    reference = outputs()
    return lambda: context.mean_divergence(reference, outputs(), pieces)
