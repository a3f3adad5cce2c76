"""Narrower networks: which positions of which tensors are one channel, and copies of a model that lack some of them."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from autocompress.errors import LayerError, MismatchError
from autocompress.layers import CONVOLUTIONS, NORMS, RECURRENT, TRANSPOSED, Layer
from autocompress.types import Option

__all__ = [
    "WHOLE",
    "Axis",
    "ChannelGroup",
    "Groups",
    "Heads",
    "Widths",
    "heads_of",
    "narrow",
    "narrow_to",
    "reshape_to",
]

WHOLE = 100.0  # percent of its channels that a group has where nothing goes
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
# What modules that compute attention by themselves call the number of their heads, and the width of all of them.
HEADS = ("num_heads", "n_heads", "num_attention_heads", "heads")
WIDTHS = ("all_head_size", "inner_dim")


@dataclass(frozen=True)
class Axis:
    """Dimension `dim` of the tensor `key` of the state dict: position i belongs to unit `units[i]` of a group; -1: to
    none, it always stays.
    """

    key: str
    dim: int
    units: tuple[int, ...]

    def kept(self, units: Collection[int]) -> list[int]:
        """The positions that stay where these units do."""
        keep = {-1, *units}
        return [i for i, unit in enumerate(self.units) if unit in keep]

    def of(self, unit: int) -> list[int]:
        """The positions of one unit: 16 columns for a channel of 4 x 4 pixels that was flattened."""
        return [i for i, own in enumerate(self.units) if own == unit]


@dataclass(frozen=True)
class ChannelGroup:
    """Axes that can only lose channels together: `size` units, each the least that can go.

    name: of the first producing layer. producers: axes of weights that make the channels; consumers: axes of weights
    that multiply them; vectors: norms, biases, slopes, embeddings of positions. A grouped (depthwise) convolution is a
    producer alone, as a whole group of it, its inputs and outputs, is a unit. unit: channels of the first producer in
    one unit: 1, or those of a head of attention, or of a group of a convolution or of a group norm. reason: why no
    channel can go, empty where some can.
    """

    name: str
    size: int
    producers: tuple[Axis, ...]
    consumers: tuple[Axis, ...]
    vectors: tuple[Axis, ...]
    unit: int = 1
    reason: str = ""

    @property
    def axes(self) -> tuple[Axis, ...]:
        return (*self.producers, *self.consumers, *self.vectors)

    @property
    def prunable(self) -> bool:
        return not self.reason

    def check(self, kept: Collection[int]) -> None:
        """Raise LayerError unless these units can be all that stays."""
        if self.reason:
            raise LayerError(f"channel group {self.name!r} keeps its width: {self.reason}")
        if beyond := [unit for unit in kept if not 0 <= unit < self.size]:
            raise LayerError(f"channel group {self.name!r} has units 0 to {self.size - 1}; got {beyond[0]}")
        for axis in self.axes:
            if not axis.kept(kept):
                raise LayerError(
                    f"channel group {self.name!r}: nothing would be left of dimension {axis.dim} of {axis.key!r}; "
                    "keep a channel of each of its layers"
                )


@dataclass(frozen=True)
class Groups:
    """The channel groups of a model in the order of its modules; `reason`: why there are none, where it cannot be
    traced.
    """

    groups: tuple[ChannelGroup, ...]
    reason: str = ""

    def __iter__(self) -> Iterator[ChannelGroup]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, name: str) -> ChannelGroup:
        for group in self.groups:
            if group.name == name:
                return group
        known = ", ".join(group.name for group in self.groups) or f"none: {self.reason or 'it has no layers'}"
        raise LayerError(f"there is no channel group {name!r}; the groups are {known}")

    @property
    def prunable(self) -> tuple[ChannelGroup, ...]:
        """Those that can lose channels."""
        return tuple(group for group in self.groups if group.prunable)

    def shapes(self, model: nn.Module, kept: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that change where these units of each group are all that stays."""
        state = model.state_dict()
        found: dict[str, list[int]] = {}
        for name, units in kept.items():
            for axis in self[name].axes:
                found.setdefault(axis.key, list(state[axis.key].shape))[axis.dim] = len(axis.kept(units))
        return {key: tuple(shape) for key, shape in found.items()}


@dataclass(frozen=True)
class Widths:
    """What stays of each group of channels at each level: `kept[group][level]`, units in ascending order, those of a
    lower level among those of a higher one; levels in percent. `ends`: of each layer, by name, the group of its inputs
    and that of its outputs ("": its width is fixed).

    A *structure* is a level for each group; groups that it does not name are whole.
    """

    groups: Groups
    kept: Mapping[str, Mapping[float, tuple[int, ...]]]
    ends: Mapping[str, tuple[str, str]]

    @property
    def levels(self) -> dict[str, tuple[float, ...]]:
        """The levels of each group, the whole first."""
        return {name: (WHOLE, *sorted(found, reverse=True)) for name, found in self.kept.items()}

    def axis(self, layer: Layer, inputs: bool) -> Axis | None:
        """The axis of a layer's weight that is its inputs, or its outputs, where it is in a group."""
        name = self.ends.get(layer.name, ("", ""))[0 if inputs else 1]
        if not name:
            return None
        group = self.groups[name]
        return next(axis for axis in (group.consumers if inputs else group.producers) if axis.key == layer.key)

    def cuts(self, layer: Layer) -> tuple[dict[float, np.ndarray], dict[float, np.ndarray]]:
        """The columns and the rows of a layer's matrices that stay at each level of its two groups."""
        positions = int(np.prod(layer.shape[2:]))
        found: list[dict[float, np.ndarray]] = []
        for inputs in (True, False):
            axis, levels = self.axis(layer, inputs), self.kept.get(self.ends.get(layer.name, ("", ""))[not inputs], {})
            own = {} if axis is None else {level: np.array(axis.kept(units)) for level, units in levels.items()}
            if inputs:
                own = {n: (at[:, None] * positions + np.arange(positions)).reshape(-1) for n, at in own.items()}
            found.append(own)
        return found[0], found[1]

    def coupled(self, layer: str) -> bool:
        """Whether a layer's inputs and outputs are of one group, so that it has one level for both."""
        inputs, outputs = self.ends.get(layer, ("", ""))
        return bool(inputs) and inputs == outputs

    def link(self, layer: str, option: Option) -> tuple[str, float, str, float]:
        """(group of the inputs, its level, group of the outputs, its level) that an option of a layer needs."""
        inputs, outputs = self.ends.get(layer, ("", ""))
        below, above = option.width or (WHOLE, WHOLE)
        return inputs, below, outputs, above

    def structure_of(self, layers: Mapping[str, Option]) -> dict[str, float]:
        """The level of each group that these options need. Raises MismatchError where two layers disagree."""
        found: dict[str, tuple[float, str]] = {}
        for layer, option in layers.items():
            inputs, below, outputs, above = self.link(layer, option)
            for group, level in ((inputs, below), (outputs, above)):
                if not group and level != WHOLE:
                    raise MismatchError(f"option {str(option)!r}: layer {layer!r} has a fixed width on that side")
                if group and found.setdefault(group, (level, layer))[0] != level:
                    other, first = found[group]
                    raise MismatchError(
                        f"channel group {group!r}: layer {first!r} is planned with {other:g} % of its channels and "
                        f"{layer!r} with {level:g} %; one level for all of its layers is needed (Profile.at)"
                    )
        return {group: level for group, (level, _) in found.items()}

    def units(self, structure: Mapping[str, float]) -> dict[str, tuple[int, ...]]:
        """The units that stay, of groups that are not whole. Raises MismatchError for a group or level that is none."""
        found = {}
        for group, level in structure.items():
            if group not in self.kept:
                raise MismatchError(f"there is no channel group {group!r}; there are {', '.join(self.kept) or 'none'}")
            if level != WHOLE:
                if level not in self.kept[group]:
                    known = ", ".join(f"{known:g}" for known in self.levels[group])
                    raise MismatchError(f"channel group {group!r} has no level {level:g}; it has {known}")
                found[group] = self.kept[group][level]
        return found

    def to_json(self) -> dict[str, Any]:
        """Inverse of `from_json`."""

        def axes(found: Sequence[Axis]) -> list[Any]:
            return [[axis.key, axis.dim, list(axis.units)] for axis in found]

        return {
            "groups": [
                [g.name, g.size, axes(g.producers), axes(g.consumers), axes(g.vectors), g.unit] for g in self.groups
            ],
            "kept": {n: [[level, list(units)] for level, units in found.items()] for n, found in self.kept.items()},
            "ends": {layer: list(ends) for layer, ends in self.ends.items()},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Widths:
        def axes(found: Any) -> tuple[Axis, ...]:
            return tuple(Axis(key, dim, tuple(units)) for key, dim, units in found)

        groups = tuple(
            ChannelGroup(name, size, axes(made), axes(taken), axes(ride), unit)
            for name, size, made, taken, ride, unit in value["groups"]
        )
        kept = {n: {float(level): tuple(u) for level, u in found} for n, found in value["kept"].items()}
        return cls(Groups(groups), kept, {layer: (ends[0], ends[1]) for layer, ends in value["ends"].items()})


def narrow(model: nn.Module, kept: Mapping[str, Sequence[int]], groups: Groups) -> nn.Module:
    """A copy of the model that is really narrower: of each group of channels that `kept` names, only these units stay,
    in their order; every other group is whole.

    Modules have the sizes of their weights (`in_channels`, `num_features`, `groups`, heads ...). Raises LayerError for
    a group that is not there, keeps its width, or would be empty.
    """
    for name, units in kept.items():
        groups[name].check(units)
    small = copy.deepcopy(model)
    tensors = _tensors(small)
    found: dict[str, torch.Tensor] = {}
    for name, units in kept.items():
        for axis in groups[name].axes:
            tensor = found.get(axis.key, tensors[axis.key].detach())
            index = torch.tensor(axis.kept(units), device=tensor.device)
            found[axis.key] = tensor.index_select(axis.dim, index)
    return _replace(small, found)


def narrow_to(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """The model itself with tensors of these shapes by name, the values in the new ones not set: what a file that is
    narrower than its architecture is read into.

    Raises MismatchError, before the model is touched, for a tensor that is not there, is not of as many dimensions, or
    would grow.
    """
    tensors = _tensors(model)
    found = {}
    for name, shape in shapes.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise MismatchError(f"the model has no tensor {name!r} that could become narrower")
        if tuple(tensor.shape) == tuple(shape):
            continue
        if len(shape) != tensor.ndim or not all(1 <= s <= t for s, t in zip(shape, tensor.shape, strict=True)):
            raise MismatchError(f"{name!r} is {tuple(tensor.shape)} in the model; it cannot become {tuple(shape)}")
        found[name] = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    return _replace(model, found)


def reshape_to(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """The model itself with tensors of these shapes by name, narrower or wider, whose modules have the sizes of them;
    position i of a dimension holds what i modulo its old size held. For networks that are initialised afterwards.
    """
    known = _tensors(model)
    found = {}
    for name, shape in shapes.items():
        tensor = known[name].detach()
        for dim, size in enumerate(shape):
            tensor = tensor.index_select(dim, torch.arange(size, device=tensor.device) % tensor.shape[dim])
        found[name] = tensor
    return _replace(model, found)


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by every name that they have."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return dict(named)


def _replace(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """Put new tensors into a model, wherever the old ones are, and give the modules that hold them their sizes."""
    known = _tensors(model)
    old = {id(known[name]): tensor for name, tensor in tensors.items()}
    changed = {}
    for name, module in model.named_modules():
        if any(id(t) in old for t in (*module._parameters.values(), *module._buffers.values())):
            if isinstance(module, (nn.MultiheadAttention, *RECURRENT)):
                raise MismatchError(f"{name!r} is a {type(module).__name__}, whose width cannot change")
            changed[name] = module
    attention = [(module, heads) for module in model.modules() if (heads := heads_of(module)) is not None]
    parameters: dict[int, nn.Parameter] = {}
    for module in changed.values():
        for field, held in module._parameters.items():
            if held is not None and id(held) in old:
                new = parameters.setdefault(id(held), nn.Parameter(old[id(held)], held.requires_grad))
                module._parameters[field] = new
        for field, buffer in module._buffers.items():
            if buffer is not None and id(buffer) in old:
                module._buffers[field] = old[id(buffer)]
        _resize(module)
    for owner, heads in attention:
        heads.resize(owner)
    return model


def _resize(module: Any) -> None:
    """Give a module the sizes of its tensors."""
    weight = module._parameters.get("weight")
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, CONVOLUTIONS):
        if module.groups > 1:
            module.groups = max(1, module.groups * weight.shape[0] // module.out_channels)
        module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * module.groups
    elif isinstance(module, TRANSPOSED):
        if module.groups > 1:
            module.groups = max(1, module.groups * weight.shape[0] // module.in_channels)
        module.in_channels, module.out_channels = weight.shape[0], weight.shape[1] * module.groups
    elif isinstance(module, (*NORMS, *INSTANCE_NORMS)):
        module.num_features = len(next(t for t in (weight, module.running_mean) if t is not None))
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.GroupNorm):
        if module.num_groups > 1:
            module.num_groups = max(1, module.num_groups * len(weight) // module.num_channels)
        module.num_channels = len(weight)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(weight)
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = weight.shape[1]


@dataclass(frozen=True)
class Heads:
    """Attention that a module computes by itself: what it calls its number of heads, how many there are, the names of
    the linear layers that make queries, keys and values (one for all three, or one each), and of the one behind them.
    """

    attribute: str
    count: int
    projections: tuple[str, ...]
    output: str
    width: int

    def resize(self, module: nn.Module) -> None:
        """Give the module the number of heads that its layers have; a head keeps its width."""
        width = module.get_submodule(self.output).in_features
        assert isinstance(width, int)
        if width != self.width:
            setattr(module, self.attribute, width * self.count // self.width)
            for name in WIDTHS:
                if module.__dict__.get(name) == self.width:
                    setattr(module, name, width)


def heads_of(module: nn.Module) -> Heads | None:
    """How a module computes attention over several heads of consecutive channels, as far as its layers tell; None where
    they do not.
    """
    attribute = next((n for n in HEADS if type(module.__dict__.get(n)) is int and module.__dict__[n] > 1), None)
    linear = [(name, child) for name, child in module.named_children() if type(child) is nn.Linear]
    if attribute is None or isinstance(module, nn.MultiheadAttention) or len(linear) not in (2, 4):
        return None
    count, (name, last) = module.__dict__[attribute], linear[-1]
    width = last.in_features
    made = sum(child.out_features for _, child in linear[:-1])
    even = all(child.out_features in (width, 3 * width) for _, child in linear[:-1])
    if made != 3 * width or not even or width % count:
        return None
    return Heads(attribute, count, tuple(n for n, _ in linear[:-1]), name, width)
