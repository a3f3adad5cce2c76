"""Fisher weights: how much the model's predictions feel a change of each single weight."""

from __future__ import annotations

import numpy as np
import torch

from autocompress.batches import Batch, batch_digest, batch_samples, chunk_batch, join_batches
from autocompress.measuring import Context
from autocompress.profiling import Profile
from autocompress.strategies.base import solved_plan, with_context
from autocompress.strategies.weighing import differentiable, kept, losses_of_changes
from autocompress.types import Budget, Plan

__all__ = ["Fisher", "own_loss", "squared_gradients"]

VERSION = 1


class Fisher:
    """Least ½ Σ_i F_i (w_i - ŵ_i)² over all weights, F the diagonal of the Fisher information, by an exact solve. Needs
    gradients; no evaluations.

    F_i = mean over samples of (∂ loss of that sample / ∂ w_i)²: of the task's loss where the context has one and
    labelled batches (the empirical Fisher), else of -log p(y | x) with y drawn from the model's own prediction (the
    true one: then the sum is the KL to the dense model to second order, off-diagonal terms left out). Every option of
    every layer is realised once for its w - ŵ; the sums are kept in the profile's store.
    Source: Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", arXiv 1801.05787, section 2,
    for changes of any kind instead of removal. Raises MismatchError without a context.
    """

    needs = "gradients"

    def __init__(self, samples: int = 128) -> None:
        self.samples = samples

    def __call__(self, profile: Profile, budget: Budget, context: Context | None) -> Plan:
        context = with_context(context, "fisher", "needs gradients of the model")
        found = self.losses(profile, context)
        return solved_plan(profile, budget, {n: np.array(v) for n, v in found.items()}, "fisher")

    def losses(self, profile: Profile, context: Context) -> dict[str, list[float]]:
        """½ Σ F (w - ŵ)² of every option of every layer, in the order of the profile's rows."""
        labelled = context.labelled(self.samples)
        batch = join_batches(labelled or context.fit, self.samples)

        def make() -> dict[str, list[float]]:
            weight = squared_gradients(context, profile, batch, bool(labelled))
            return losses_of_changes(
                context.model, profile, lambda name, change: float(0.5 * np.sum(weight[name] * change * change))
            )

        return kept(
            context, profile, "fisher", [VERSION, batch_digest(batch), *context.loss_key(labelled), context.seed], make
        )


def squared_gradients(context: Context, profile: Profile, batch: Batch, labelled: bool) -> dict[str, np.ndarray]:
    """Mean over the samples of a batch of the squared gradient of each sample's own loss, by layer, float64 in the
    shape of the parameter. Zero where the loss does not depend on a layer.
    """
    generator = torch.Generator().manual_seed(context.seed)
    with differentiable(context, profile) as (model, weights):
        total = {name: torch.zeros_like(w, dtype=torch.float64) for name, w in weights.items()}
        for sample in chunk_batch(batch, 1):
            assert not labelled or context.loss is not None
            if labelled and context.loss:
                loss = context.loss(model, sample)
            else:
                output = context.output(model, sample)
                loss = own_loss(output, context.class_axis(output), generator)
            found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for name, gradient in zip(weights, found, strict=True):
                if gradient is not None:
                    total[name] += gradient.detach().double().square()
    return {name: (t / batch_samples(batch)).cpu().numpy() for name, t in total.items()}


def own_loss(output: torch.Tensor, axis: int | None, generator: torch.Generator) -> torch.Tensor:
    """-log p(y | x) of one sample's output, y drawn from the model's own prediction at every position, over the root of
    their number: its squared gradient is then in expectation the mean over positions.

    Where there are no classes, y is the output plus noise of variance one.
    """
    if axis is None:
        noise = torch.randn(output.shape, generator=generator).to(output)
        return (noise * output).sum() / output.numel() ** 0.5
    log_p = torch.log_softmax(output, axis).movedim(axis, -1).flatten(0, -2)
    drawn = torch.multinomial(log_p.detach().double().exp().cpu(), 1, generator=generator).to(log_p.device)
    return -log_p.gather(1, drawn).sum() / len(log_p) ** 0.5
