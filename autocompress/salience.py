"""Which channels of a group go first, and so what stays of each group at each level: `widths`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from autocompress.batches import Batch, batch_samples, evaluating, feed, join_batches, materialise
from autocompress.calibration import Statistics
from autocompress.channels import channel_groups
from autocompress.compressors.narrow import LEVELS
from autocompress.errors import LayerError, MismatchError, OptionError
from autocompress.layers import CONVOLUTIONS, TRANSPOSED, Layer, Layers, find_layers, model_digest
from autocompress.narrowing import WHOLE, Axis, ChannelGroup, Groups, Widths
from autocompress.strategies.itpruner import linear_cka
from autocompress.strategies.pfp import unit_sensitivities

__all__ = ["SCORES", "obs_order", "widths"]

SAMPLES = 64  # samples that CKA compares channels on


def widths(
    model: nn.Module,
    example: Batch,
    stats: Statistics,
    score: str = "obs",
    levels: Sequence[float] = LEVELS,
    round_to: int = 1,
    batches: Iterable[Batch] | None = None,
    loss: Callable[[nn.Module, Batch], Any] | None = None,
) -> Widths:
    """What stays of each group of channels of a model at each level, in percent, for `profile(..., channels=)`.

    score, which says what goes first: "obs" (default), the error of losing a whole input channel of the layers that
    read it, the rest refitted, over their energies, greedily (`obs_order`); "l1", the norm of the weights that make a
    channel (arXiv 1608.08710); "taylor", (Σ w ∂L/∂w)² of them, summed over labelled `batches`, with `loss` (1906.10771,
    equation 8); "cka", how alike a channel is to the others of its group on `batches`, ITPruner's measure between
    layers (arXiv 2105.13649) between channels: what others say too goes first; "pfp", the largest part that a channel
    has in any output on `batches` (arXiv 1911.07412, `strategies.pfp`). round_to: channels of a group that stay are a
    multiple of it, where the group has so many. Left out are groups that reach beyond the linear layers that
    calibration reached. Raises LayerError where no group can lose channels, saying why; OptionError for a score or a
    level that is none, or a score that lacks its data.
    """
    if score not in SCORES:
        raise OptionError(f"score is {score!r}; it is one of {', '.join(SCORES)}")
    if stats.fields["model"] != model_digest(model):
        raise MismatchError("field 'model': the statistics were made from other weights; calibrate this model")
    groups, layers = channel_groups(model, example), find_layers(model)
    usable = [group for group in groups.prunable if _is_profiled(model, group, layers, stats)]
    if not usable:
        reasons = groups.reason or "; ".join(f"{group.name}: {group.reason}" for group in groups if group.reason)
        raise LayerError(f"no channel of the model can go ({reasons})")
    data = _Data(model, layers, stats, None if batches is None else materialise(batches), loss)
    kept: dict[str, dict[float, tuple[int, ...]]] = {}
    for group in usable:
        order = _removable(group, SCORES[score](data, group))
        kept[group.name] = {}
        for level in sorted({float(level) for level in levels} - {WHOLE}, reverse=True):
            if not 0.0 < level < WHOLE:
                raise OptionError(f"level {level:g}: a level is above 0 and at most 100 percent")
            gone = order[: group.size - _count(group, level, round_to)]
            kept[group.name][level] = tuple(sorted(set(range(group.size)) - set(gone)))
    ends = {}
    for layer in layers:
        names = [
            next((g.name for g in usable if any(axis.key == layer.key for axis in axes(g))), "")
            for axes in (lambda g: g.consumers, lambda g: g.producers)
        ]
        ends[layer.name] = (names[0], names[1])
    return Widths(Groups(tuple(usable)), kept, ends)


def _is_profiled(model: nn.Module, group: ChannelGroup, layers: Layers, stats: Statistics) -> bool:
    """Whether every weight of a group is of a linear layer of its own that has a Hessian."""
    by_key = {layer.key: layer for layer in layers}
    for axis in (*group.producers, *group.consumers):
        layer = by_key.get(axis.key)
        known = None if layer is None else stats.layers.get(layer.name)
        if layer is None or known is None or known.row_weights is not None or len(layer.owners) > 1:
            return False
        if not isinstance(model.get_submodule(layer.owners[0]), (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)):
            return False
    return True


def _count(group: ChannelGroup, level: float, round_to: int) -> int:
    """Units that stay at a level: the nearest multiple of `round_to` channels, at least one such multiple."""
    if round_to < 1:
        raise OptionError(f"round_to is {round_to}; needed at least 1")
    step = min(round_to // math.gcd(round_to, group.unit), group.size)
    return min(group.size, max(step, math.floor(level / WHOLE * group.size / step + 0.5) * step))


def _removable(group: ChannelGroup, order: Sequence[int]) -> list[int]:
    """The units that can go, in that order, so that something is left of every tensor."""
    kept, gone = set(range(group.size)), []
    for unit in order:
        if all(axis.kept(kept - {unit}) for axis in group.axes):
            kept.discard(unit)
            gone.append(unit)
    return gone


# --------------------------------------------------------------------------------------------------------- the scores


@dataclass
class _Data:
    """What scores look at."""

    model: nn.Module
    layers: Layers
    stats: Statistics
    batches: list[Batch] | None
    loss: Callable[[nn.Module, Batch], Any] | None

    def layer(self, axis: Axis) -> Layer:
        return next(layer for layer in self.layers if layer.key == axis.key)

    def weight(self, axis: Axis) -> np.ndarray:
        return self.model.get_parameter(axis.key).detach().double().cpu().numpy()


def _obs(data: _Data, group: ChannelGroup) -> list[int]:
    readers = []
    for axis in group.consumers:
        layer = data.layer(axis)
        positions = int(np.prod(layer.shape[2:]))
        units = np.repeat(np.array(axis.units), positions)
        readers.append((layer.matrix(data.weight(axis))[0], data.stats.layers[layer.name].hessian[0], units))
    return obs_order(readers, group.size)


def obs_order(readers: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], size: int) -> list[int]:
    """The units 0 ... size - 1, the one that costs least first: greedy OBS on all columns of a unit, over its readers.

    readers: W (rows, d), H (d, d) and the unit of each column (d,), -1 where it is of none. The cost of a unit is Σ
    over readers of ½ tr(W_B ([H⁻¹]_BB)⁻¹ W_Bᵀ) / (½ tr(W H Wᵀ)); when it goes, the rest of each W makes up for it.
    Source: OBC, arXiv 2208.11580, section 4 (blocks), summed over layers as relative errors.
    """
    states = []
    for W, H, units in readers:
        energy = 0.5 * float(np.einsum("rd,rd->", W @ H, W))
        inverse = np.linalg.inv(np.asarray(H, np.float64))
        columns = [np.flatnonzero(units == unit) for unit in range(size)]
        states.append((W.astype(np.float64).copy(), 0.5 * (inverse + inverse.T), columns, energy or 1.0))
    alive, order = list(range(size)), []
    while alive:
        costs = np.zeros(len(alive))
        for W, inverse, columns, energy in states:
            for width in {len(columns[unit]) for unit in alive} - {0}:
                at = [i for i, unit in enumerate(alive) if len(columns[unit]) == width]
                index = np.stack([columns[alive[i]] for i in at])
                blocks, rows = inverse[index[:, :, None], index[:, None, :]], W.T[index]  # (units, width, ...)
                costs[at] += 0.5 * np.einsum("uwr,uwr->u", np.linalg.solve(blocks, rows), rows) / energy
        unit = alive.pop(int(np.argmin(costs)))
        order.append(unit)
        for W, inverse, columns, _ in states:
            B = columns[unit]
            if len(B):
                solved = np.linalg.solve(inverse[np.ix_(B, B)], inverse[B])
                W -= W[:, B] @ solved
                inverse -= inverse[:, B] @ solved
    return order


def _l1(data: _Data, group: ChannelGroup) -> list[int]:
    return _by_producers(group, lambda axis: _other_sums(np.abs(data.weight(axis)), axis.dim))


def _taylor(data: _Data, group: ChannelGroup) -> list[int]:
    if data.loss is None or not data.batches:
        raise OptionError("score 'taylor' needs labelled batches and the task's loss")
    squares: dict[tuple[str, int], Any] = {(axis.key, axis.dim): 0.0 for axis in group.producers}
    keys = {axis.key: data.model.get_parameter(axis.key) for axis in group.producers}
    asked = [p for p in keys.values() if not p.requires_grad]
    with torch.enable_grad(), evaluating(data.model):
        try:
            for parameter in asked:
                parameter.requires_grad_(True)
            for batch in data.batches:  # of each by itself: the mean gradient of a trained network is next to nothing
                gradients = torch.autograd.grad(data.loss(data.model, batch), list(keys.values()))
                products = {k: (p.detach() * g).double() for (k, p), g in zip(keys.items(), gradients, strict=True)}
                for key, dim in squares:
                    squares[key, dim] = squares[key, dim] + _other_sums(products[key].cpu().numpy(), dim) ** 2
        finally:
            for parameter in asked:
                parameter.requires_grad_(False)
    return _by_producers(group, lambda axis: squares[axis.key, axis.dim])


def _other_sums(values: np.ndarray, dim: int) -> np.ndarray:
    """Sums over all dimensions but one."""
    return values.sum(axis=tuple(i for i in range(values.ndim) if i != dim))


def _by_producers(group: ChannelGroup, values: Callable[[Axis], np.ndarray]) -> list[int]:
    """Units by the sum of values, of the outputs that make them, in units of the mean of each producer."""
    total = np.zeros(group.size)
    for axis in group.producers:
        sums = values(axis)
        own = np.bincount(np.maximum(axis.units, 0), weights=sums * (np.array(axis.units) >= 0), minlength=group.size)
        total += own / (float(sums.mean()) or 1.0)
    return np.argsort(total, kind="stable").tolist()


def _cka(data: _Data, group: ChannelGroup) -> list[int]:
    if not data.batches:
        raise OptionError("score 'cka' needs batches of data")
    batch = join_batches(data.batches, SAMPLES)
    samples = batch_samples(batch)
    parts: list[list[np.ndarray]] = [[] for _ in range(group.size)]

    def hook(module: Any, args: Any, output: torch.Tensor, axis: Axis) -> None:
        dim = output.ndim - 1 if isinstance(module, nn.Linear) else 1
        channels = output.detach().double().movedim(dim, 1).reshape(samples, len(axis.units), -1).cpu().numpy()
        for i, unit in enumerate(axis.units):
            if unit >= 0:
                parts[unit].append(channels[:, i])

    handles = [
        data.model.get_submodule(data.layer(axis).owners[0]).register_forward_hook(
            lambda m, a, y, axis=axis: hook(m, a, y, axis)
        )
        for axis in group.producers
    ]
    try:
        with torch.no_grad(), evaluating(data.model):
            feed(data.model, batch)
    finally:
        for handle in handles:
            handle.remove()
    alike = np.nan_to_num(linear_cka([np.concatenate(found, axis=1) if found else None for found in parts]))
    return np.argsort(-(alike.sum(axis=1) - np.diag(alike)), kind="stable").tolist()


def _pfp(data: _Data, group: ChannelGroup) -> list[int]:
    if not data.batches:
        raise OptionError("score 'pfp' needs batches of data")
    found = unit_sensitivities(data.model, [group], [join_batches(data.batches, SAMPLES)])
    if group.name not in found:
        raise OptionError(f"score 'pfp': {group.name!r} is read by a grouped or transposed convolution; take 'obs'")
    return np.argsort(found[group.name][0], kind="stable").tolist()


SCORES: dict[str, Callable[[_Data, ChannelGroup], list[int]]] = {
    "obs": _obs,
    "l1": _l1,
    "taylor": _taylor,
    "cka": _cka,
    "pfp": _pfp,
}
