"""FT: how many channels of every group stay, the same part of each, or as many as have a norm above one threshold.

Which of them stay is the profile's score (`salience.widths`; "l1" for the paper's), as for all rules that set widths.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from autocompress.measuring import Context
from autocompress.narrowing import ChannelGroup
from autocompress.profiling import Profile
from autocompress.strategies.base import with_context
from autocompress.strategies.structures import Shares, WidthRule, widths_of

__all__ = ["filter_norms", "ft", "ft_global"]


def filter_norms(profile: Profile, context: Context | None, group: ChannelGroup) -> np.ndarray:
    """Mean |w| of the weights that make each unit of a group, (size,): its L1 norm over its number of weights, so that
    filters of different layers can be compared.
    """
    model = with_context(context, "ft_global", "looks at the weights").model
    total, count = np.zeros(group.size), np.zeros(group.size)
    for axis in group.producers:
        weight = model.get_parameter(axis.key).detach().double().abs().cpu().numpy()
        sums = weight.sum(axis=tuple(i for i in range(weight.ndim) if i != axis.dim))
        units = np.array(axis.units)
        np.add.at(total, units[units >= 0], sums[units >= 0])
        np.add.at(count, units[units >= 0], weight.size / weight.shape[axis.dim])
    return total / np.maximum(count, 1.0)


def _same_part(profile: Profile, context: Context | None) -> Callable[[float], Shares]:
    """The part t of every group (torchprune's FilterThresNet: Li et al., arXiv 1608.08710, ranks a layer's filters by
    their L1 norm, and every layer keeps the same part).
    """
    names = list(widths_of(profile, "ft").kept)
    return lambda t: dict.fromkeys(names, t)


def _above_one_threshold(profile: Profile, context: Context | None) -> Callable[[float], Shares]:
    """Every group keeps its units of larger norm than one threshold, the part t of all units together."""
    widths = widths_of(profile, "ft_global")
    norms = {name: np.sort(filter_norms(profile, context, widths.groups[name])) for name in widths.kept}
    every = np.sort(np.concatenate(list(norms.values())))

    def shares(t: float) -> Shares:
        kept = round(t * every.size)
        threshold = every[-kept] if kept else np.inf
        return {n: 1.0 - float(np.searchsorted(each, threshold)) / each.size for n, each in norms.items()}

    return shares


ft = WidthRule("ft", _same_part, needs="curves")
ft_global = WidthRule("ft_global", _above_one_threshold)
