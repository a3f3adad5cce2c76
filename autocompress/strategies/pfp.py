"""PFP: provable filter pruning. How much of any output comes from a channel at most, and so how many channels a layer
needs for an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from autocompress.batches import Batch, evaluating, feed
from autocompress.layers import CONVOLUTIONS
from autocompress.measuring import Context
from autocompress.narrowing import ChannelGroup
from autocompress.profiling import Profile
from autocompress.strategies.base import with_context
from autocompress.strategies.structures import Shares, WidthRule, widths_of

__all__ = ["channels_needed", "pfp", "unit_sensitivities"]

FAILURE = 1e-16  # δ, of the bound not holding: a constant that is nearly the same for all layers
AT_ONCE = 16  # samples whose contributions, (samples, inputs, outputs, positions), are in memory together
WIDEST, CLOSEST = 1e9, 1e-9  # ε at t = 0 and t = 1: one channel, and all


def unit_sensitivities(
    model: nn.Module, groups: Iterable[ChannelGroup], batches: Sequence[Batch]
) -> dict[str, tuple[np.ndarray, float]]:
    """By group (s, α): the sensitivity of each of its units, (size,), and α = 2 log(8 (P + 1) κ / δ).

        s_j = max over samples, outputs i and positions p of  Σ_k w_ijk a_jk(p) / Σ_j'k w_ij'k a_j'k(p)

    over the positive and the negative weights each, and the positive and the negative inputs a: the largest part that a
    channel has in any output of any layer that reads the group. P positions, κ kernel positions of such a layer, the
    most if there are several. A group that something else than linear layers and convolutions of one group reads is
    left out. Source: PFP, arXiv 1911.07412, definition 1 and theorem 2, with torchprune's constants.
    """
    owners = {
        f"{name}.weight" if name else "weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, CONVOLUTIONS) and module.groups == 1)
    }
    wanted = {g.name: g for g in groups if all(axis.key in owners for axis in g.consumers)}
    readers = {axis.key: owners[axis.key] for group in wanted.values() for axis in group.consumers}
    largest: dict[str, np.ndarray] = {}
    positions: dict[str, int] = {}

    def hook(key: str) -> Callable[..., None]:
        def seen(module: Any, args: Any, output: Any) -> None:
            found, count = _parts(module, args[0].detach())
            largest[key] = np.maximum(largest.get(key, 0.0), found)
            positions[key] = count

        return seen

    handles = [module.register_forward_hook(hook(key)) for key, module in readers.items()]
    try:
        with torch.no_grad(), evaluating(model):
            for batch in batches:
                feed(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for name, group in wanted.items():
        s, logs = np.zeros(group.size), [0.0]
        for axis in group.consumers:
            if axis.key in largest:
                units = np.array(axis.units)
                np.maximum.at(s, units[units >= 0], largest[axis.key][units >= 0])
                kernel = int(np.prod(readers[axis.key].weight.shape[2:]))
                logs.append(2.0 * np.log(8.0 * (positions[axis.key] + 1) * kernel / FAILURE))
        found[name] = s, float(max(logs))
    return found


def _parts(module: Any, x: torch.Tensor) -> tuple[np.ndarray, int]:
    """The largest part of each input channel in an output, (inputs,), and the output's positions for one sample."""
    if isinstance(module, nn.Linear):
        x = x.reshape(-1, x.shape[-1])[..., None]
        weight, convolve, geometry = module.weight.detach()[..., None], F.conv1d, {}
    else:
        dims = len(module.kernel_size)
        x = x if x.ndim == dims + 2 else x[None]
        weight, convolve = module.weight.detach(), (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
        geometry = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}
    f, c = weight.shape[:2]
    each = weight.transpose(0, 1).reshape(c * f, 1, *weight.shape[2:])  # the outputs of every input by itself
    best, count = torch.zeros(c, dtype=x.dtype), 1
    for part in x.split(AT_ONCE):
        for inputs in (part.clamp(min=0.0), (-part).clamp(min=0.0)):
            if not bool(inputs.any()):
                continue
            for kernel in (each.clamp(min=0.0), (-each).clamp(min=0.0)):
                made = convolve(inputs, kernel, groups=c, **geometry).reshape(len(inputs), c, f, -1)
                count = made.shape[-1]
                total = made.sum(dim=1, keepdim=True)
                share = torch.where(total > 0.0, made / total, 0.0)
                best = torch.maximum(best, share.amax(dim=(0, 2, 3)).cpu())
    return best.double().numpy(), count


def channels_needed(s: np.ndarray, alpha: float, epsilon: float) -> int:
    """How many channels of sensitivities s (n,) a layer keeps for a relative error ε: those that m draws with
    probabilities s / S are expected to hit, m = ⌈3 (6 + 2 ε) α S / ε²⌉, S = Σ s; at least one.

    Source: PFP, arXiv 1911.07412, theorem 2 (sample complexity), and torchprune's count of distinct channels.
    """
    total = float(s.sum())
    if total <= 0.0:
        return 1
    m = max(1.0, np.ceil(3.0 * (6.0 + 2.0 * epsilon) * alpha * total / epsilon**2))
    with np.errstate(divide="ignore"):
        missed = np.exp(m * np.log1p(-np.minimum(s / total, 1.0)))
    return int(np.clip(np.ceil((1.0 - missed).sum() - 1e-9), 1, len(s)))


def _one_error(profile: Profile, context: Context | None) -> Callable[[float], Shares]:
    """As many channels of every group as one ε needs. The paper keeps those of the largest sensitivities (its
    deterministic variant); here which ones stay is the profile's score, and "pfp" is one (`salience.widths`).
    """
    widths, given = widths_of(profile, "pfp"), with_context(context, "pfp", "runs the model")
    key = "pfp" + given.data_digest
    if profile.fingerprint + key not in given.kept:
        groups = [widths.groups[name] for name in widths.kept]
        found = unit_sensitivities(given.model, groups, given.pieces("sample")[:1])
        given.kept[profile.fingerprint + key] = dict(found)
    known: Mapping[str, tuple[np.ndarray, float]] = given.kept[profile.fingerprint + key]

    def shares(t: float) -> Shares:
        epsilon = WIDEST * (CLOSEST / WIDEST) ** t
        return {
            name: 1.0 if t >= 1.0 else channels_needed(s, alpha, epsilon) / len(s) for name, (s, alpha) in known.items()
        }

    return shares


pfp = WidthRule("pfp", _one_error, needs="weights")
