"""HAWQ-V2: how curved the loss is along each layer's weights, by the trace of its Hessian."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from autocompress.batches import Batch, batch_digest, chunk_batch, join_batches
from autocompress.errors import CalibrationError
from autocompress.measuring import PASS_SAMPLES, Context
from autocompress.profiling import Profile
from autocompress.strategies.base import solved_plan, with_context
from autocompress.strategies.weighing import differentiable, kept, losses_of_changes
from autocompress.types import Budget, Plan

__all__ = ["Hawq", "average_traces"]

VERSION = 1


class Hawq:
    """Least Σ_l ½ t_l ‖W_l - Ŵ_l‖² by an exact solve, t_l the trace of the loss's Hessian over a layer's weights,
    divided by their number. Needs gradients, `vectors` Hessian-vector products; no evaluations.

    Traces by Hutchinson's estimate: mean of v_lᵀ (H v)_l, v of random signs over all layers at once, each v on
    another piece of 64 samples of a batch. The loss is the task's where the context has one and labelled batches, else
    the cross-entropy to the dense model's own soft outputs (its Hessian is that of the KL, and never negative). A
    trace that comes out below a thousandth of the largest average counts as that: labelled losses can curve downwards.
    Source: HAWQ-V2, arXiv 1911.03852, equation 11 and algorithm 1, with an exact solver for its Pareto search; the ½
    is ours and changes no answer. Raises MismatchError without a context, CalibrationError for a model that cannot be
    differentiated twice.
    """

    needs = "gradients"

    def __init__(self, vectors: int = 50, samples: int = 512) -> None:
        self.vectors, self.samples = vectors, samples

    def __call__(self, profile: Profile, budget: Budget, context: Context | None) -> Plan:
        context = with_context(context, "hawq", "needs gradients of the model")
        traces = self.traces(profile, context)
        floor = 1e-3 * max(traces.values())
        squares = kept(
            context,
            profile,
            "squares",
            [VERSION],
            lambda: losses_of_changes(context.model, profile, lambda _, change: float(np.sum(change * change))),
        )
        losses = {name: 0.5 * max(traces[name], floor, 0.0) * np.array(squares[name]) for name in profile.layers}
        return solved_plan(profile, budget, losses, "hawq")

    def traces(self, profile: Profile, context: Context) -> dict[str, float]:
        """The average trace of every layer."""
        labelled = context.labelled(self.samples)
        batch = join_batches(labelled or context.fit, self.samples)
        key = [VERSION, batch_digest(batch), *context.loss_key(labelled), context.seed, self.vectors]
        pieces = chunk_batch(batch, PASS_SAMPLES)
        return kept(
            context,
            profile,
            "traces",
            key,
            lambda: average_traces(context, profile, pieces, bool(labelled), self.vectors),
        )


def average_traces(
    context: Context, profile: Profile, pieces: Sequence[Batch], labelled: bool, vectors: int
) -> dict[str, float]:
    """Hutchinson's estimate of tr(H_l) / n_l for every layer, over pieces of data that are taken in turns. 0 for a
    layer that the loss does not depend on.

    Raises CalibrationError where torch has no second derivative of something in the model (EmbeddingBag, for one).
    """
    generator = torch.Generator().manual_seed(context.seed)
    total = dict.fromkeys(profile.layers, 0.0)
    with differentiable(context, profile) as (model, weights):
        known = list(weights.values())
        for index in range(vectors):
            piece = pieces[index % len(pieces)]
            if labelled:
                assert context.loss is not None
                loss = context.loss(model, piece)
            else:
                output = context.output(model, piece)
                loss = distance_from_itself(output, context.class_axis(output))
            first = torch.autograd.grad(loss, known, create_graph=True, allow_unused=True)
            signs = [torch.randint(0, 2, w.shape, generator=generator).to(w) * 2 - 1 for w in known]
            along = sum(((g * v).sum() for g, v in zip(first, signs, strict=True) if g is not None), loss.new_zeros(()))
            try:
                second = torch.autograd.grad(along, known, allow_unused=True)
            except RuntimeError as error:  # NotImplementedError is one
                if "not implemented" not in str(error):
                    raise  # anything else, memory for one, is what it says
                raise CalibrationError(
                    f"strategy 'hawq' needs second derivatives, and this model has none: {error}; 'fisher' needs first "
                    "ones only"
                ) from error
            for name, v, hv in zip(weights, signs, second, strict=True):
                if hv is not None:
                    total[name] += float((v * hv).double().sum())
    return {name: t / vectors / weights[name].numel() for name, t in total.items()}


def distance_from_itself(output: torch.Tensor, axis: int | None) -> torch.Tensor:
    """Cross-entropy to the output's own softmax over the dimension of its classes, held constant, mean over positions;
    without classes (None) half the mean squared distance. Its gradient is zero and its Hessian that of the divergence
    from the dense model.
    """
    if axis is None:
        return 0.5 * (output - output.detach()).square().mean()
    log_p = torch.log_softmax(output, axis)
    return -(log_p.detach().exp() * log_p).sum(axis).mean()
