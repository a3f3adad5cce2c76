"""Which layers of a network share their channels, from Torch-Pruning's dependency graph, each group proven by narrowing
it.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from autocompress.batches import Batch, batch_samples, chunk_batch, evaluating, feed
from autocompress.errors import LayerError
from autocompress.layers import CONVOLUTIONS, NORMS, TRANSPOSED
from autocompress.narrowing import INSTANCE_NORMS, Axis, ChannelGroup, Groups, Heads, heads_of, narrow, narrow_to

__all__ = ["Axis", "ChannelGroup", "Groups", "channel_groups", "narrow", "narrow_to"]

EXAMPLES = 4  # samples that groups are proven on
TOLERANCE = 1e-3  # of the largest output: sums of float32 in another order, through a deep network
SAME = 1e-6  # of the largest output: what erasing channels must change, or nothing is proven by it
PRODUCES, CONSUMES, RIDES, WITHIN = "producer", "consumer", "vector", "within"
Place = tuple[str, int]  # a tensor and a dimension of it; -1: the inputs of a grouped convolution, which no tensor has


def channel_groups(model: nn.Module, example: Batch) -> Groups:
    """The groups of channels of a model that can only go together, found on a copy that is traced on `example`.

    Layers are coupled by additions, concatenations, norms and grouped convolutions, as Torch-Pruning's dependency graph
    has them, and by the heads of attention that a module computes from linear layers. Every group that is offered has
    been narrowed and run: the outputs are those of the dense model with the same channels erased where they are read
    (where a norm is over channels: the dense model gives the same outputs for channels in another order, and the
    narrower one outputs of the same shapes). Any other group keeps its width and says why in `reason`; of a model that
    cannot be traced there are none, and the answer says why. Source: DepGraph, arXiv 2301.12900.
    """
    if batch_samples(example) > EXAMPLES:
        example = next(iter(chunk_batch(example, EXAMPLES)))
    try:
        # A copy, since tracing needs gradients; whatever the model or the tracer raises is the answer.
        traced = copy.deepcopy(model).eval().requires_grad_(True)
        _fill_zeros(traced)
        outputs = _run(traced, example)
        drafts = _drafts(traced, example)
    except Exception as error:
        return Groups((), f"{type(model).__name__} cannot be traced: {_words(error)}")
    heads = [found for name, module in traced.named_modules() for found in _head_groups(traced, name, module)]
    heads = [group for group in heads if not _why_not(traced, group, example, outputs)]
    taken = {(axis.key, axis.dim) for group in heads for axis in group.axes}
    groups = [group for group in drafts if not any((axis.key, axis.dim) in taken for axis in group.axes)]
    proven = _proven_together(traced, [group for group in groups if group.prunable], example)
    checked = [
        g if g.reason or g.name in proven else replace(g, reason=_why_not(traced, g, example, outputs)) for g in groups
    ]
    order = {key: i for i, key in enumerate(traced.state_dict())}
    return Groups(tuple(sorted((*checked, *heads), key=lambda group: order[group.producers[0].key])))


def _fill_zeros(model: nn.Module) -> None:
    """Give weights that are all zero, as some are before training, values through which channels can be seen."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and not bool(parameter.any()):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def _words(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


# ---------------------------------------------------------------------------------------------------------- the graph


@dataclass
class _Classes:
    """Positions of tensors that are one channel, by union and find; `places` in the order that they were met."""

    parent: dict[tuple[Place, int], tuple[Place, int]] = field(default_factory=dict)
    roles: dict[Place, str] = field(default_factory=dict)
    sizes: dict[Place, int] = field(default_factory=dict)
    reasons: dict[Place, str] = field(default_factory=dict)
    made: set[Place] = field(default_factory=set)  # outputs that some group has in full

    def find(self, position: tuple[Place, int]) -> tuple[Place, int]:
        root = position
        while self.parent.setdefault(root, root) != root:
            root = self.parent[root]
        while self.parent[position] != root:
            self.parent[position], position = root, self.parent[position]
        return root

    def join(self, one: tuple[Place, int], other: tuple[Place, int]) -> None:
        self.parent[self.find(other)] = self.find(one)


@dataclass(frozen=True)
class _Member:
    place: Place
    size: int
    role: str


def _drafts(model: nn.Module, example: Batch) -> list[ChannelGroup]:
    """The groups as the graph has them, not proven yet."""
    import torch_pruning

    def forward(network: nn.Module, batch: Batch) -> list[torch.Tensor]:
        outputs = [out for out in _flat(feed(network, batch)) if out.requires_grad]
        if not outputs:
            raise LayerError("no gradient comes from what it returns to its weights")
        return outputs

    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")  # what it cannot follow shows when the groups are proven
        graph: Any = torch_pruning.DependencyGraph()
        graph.build_dependency(model, example, forward_fn=forward, verbose=False)
        classes, names = _Classes(), {module: name for name, module in model.named_modules()}
        for module in names:
            if isinstance(module, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)) and module in graph.module2node:
                _collect(graph, module, names, classes)
    return _groups_of(model, classes)


def _collect(graph: Any, root: Any, names: Mapping[nn.Module, str], classes: _Classes) -> None:
    """Add what depends on the outputs of a layer to the classes."""
    start = _members(root, names[root], True, True)[0]
    if start.place in classes.made:
        return
    prune = graph.get_pruner_of_module(root).prune_out_channels
    for item in graph.get_pruning_group(root, prune, list(range(start.size))):
        node, handler, idxs = item.dep.target, item.dep.handler, item.idxs
        module = node.module
        if reason := _obstacle(node, names):
            classes.reasons.setdefault(start.place, reason)
        if isinstance(module, nn.Parameter):
            name = graph._param_to_name[module]
            members = [_Member((name, node.pruning_dim % module.ndim), module.shape[node.pruning_dim], RIDES)]
        else:
            out, into = graph.is_out_channel_pruning_fn(handler), graph.is_in_channel_pruning_fn(handler)
            members = _members(module, names.get(module, ""), out, into)
            if out and members and members[0].role == PRODUCES and len(idxs) == members[0].size:
                classes.made.add(members[0].place)
        for member in members:
            classes.roles[member.place], classes.sizes[member.place] = member.role, member.size
            if isinstance(module, CONVOLUTIONS) and not (into if member.role in (CONSUMES, WITHIN) else out):
                continue  # the other end of a grouped convolution, which is coupled below
            for position, origin in zip(idxs, item.root_idxs, strict=True):
                if origin is None or not 0 <= position < member.size:
                    classes.reasons.setdefault(start.place, f"its channels cannot be followed to {member.place[0]!r}")
                else:
                    classes.join((start.place, origin), (member.place, position))
        if members and (count := _bundle(module)) > 1:
            for member in members:
                part = member.size // count
                for i in range(member.size):
                    classes.join((members[0].place, i // part * (members[0].size // count)), (member.place, i))


def _bundle(module: nn.Module) -> int:
    """How many equal runs of channels a module has that go together: a grouped convolution's, a group norm's."""
    if isinstance(module, nn.GroupNorm):
        return module.num_groups
    return module.groups if isinstance(module, CONVOLUTIONS) else 1


def _members(module: Any, name: str, out: bool, into: bool) -> list[_Member]:
    """The tensors of a module whose positions are channels that it makes, or takes, or both."""

    def at(field: str, dim: int, role: str) -> list[_Member]:
        tensor = getattr(module, field, None)
        key = f"{name}.{field}" if name else field
        return [] if tensor is None else [_Member((key, dim), tensor.shape[dim], role)]

    if isinstance(module, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)):
        first, second = (1, 0) if isinstance(module, TRANSPOSED) else (0, 1)
        made = [*at("weight", first, PRODUCES), *at("bias", 0, RIDES)]
        if getattr(module, "groups", 1) > 1 and isinstance(module, CONVOLUTIONS):
            return [*made, _Member((f"{name}.weight" if name else "weight", -1), module.in_channels, WITHIN)]
        return made if out else at("weight", second, CONSUMES) if into else []
    if isinstance(module, (*NORMS, *INSTANCE_NORMS, nn.LayerNorm, nn.GroupNorm)):
        fields = ("weight", "bias", "running_mean", "running_var")
        return [member for field in fields for member in at(field, 0, RIDES)]
    if isinstance(module, nn.PReLU):
        return at("weight", 0, RIDES) if module.num_parameters > 1 else []
    return at("weight", 1, PRODUCES) if isinstance(module, nn.Embedding) else []


def _obstacle(node: Any, names: Mapping[nn.Module, str]) -> str:
    """Why channels that come through here must all stay; empty where they need not."""
    module, kind = node.module, type(node.module).__name__
    if kind == "_OutputOp":
        return "it is what the model returns"
    function = node.grad_fn
    if "ConstantPad" in type(function).__name__ and any(getattr(function, "_saved_pad", ())[4:]):
        return "F.pad widens it by channels of zeros, as shortcuts without weights do"
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
        return f"it goes through {names[module]!r}, a {kind}, whose width is fixed"
    if isinstance(module, TRANSPOSED) and module.groups > 1:
        return f"{names[module]!r} is a transposed convolution of {module.groups} groups"
    if isinstance(module, CONVOLUTIONS) and 1 < module.groups == module.out_channels < module.in_channels:
        return f"{names[module]!r} is a grouped convolution that has fewer outputs than inputs"
    if isinstance(module, (nn.LayerNorm, nn.GroupNorm)) and (module.weight is None or module.weight.ndim != 1):
        return f"{names[module]!r} has no scale per channel that would tell its width"
    return ""


def _groups_of(model: nn.Module, classes: _Classes) -> list[ChannelGroup]:
    """Places that share a channel, directly or through others, as groups; names and units in the order of the model."""
    home: dict[Any, Place] = {}
    joined = _Classes()
    for position in list(classes.parent):
        place, root = position[0], classes.find(position)
        joined.join((home.setdefault(root, place), 0), (place, 0))
    components: dict[Any, list[Place]] = {}
    order = {key: i for i, key in enumerate(model.state_dict())}
    for place in sorted(classes.roles, key=lambda p: (order.get(p[0], len(order)), p[1])):
        components.setdefault(joined.find((place, 0)), []).append(place)
    users: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        users[id(parameter)] = users.get(id(parameter), 0) + 1
    shared = {name for name, p in model.named_parameters(remove_duplicate=False) if users[id(p)] > 1}
    return [group for places in components.values() if (group := _group(classes, places, shared)) is not None]


def _group(classes: _Classes, places: list[Place], shared: set[str]) -> ChannelGroup | None:
    units: dict[Any, int] = {}
    axes: dict[str, list[Axis]] = {PRODUCES: [], CONSUMES: [], RIDES: []}
    for role in (PRODUCES, CONSUMES, RIDES):
        for place in (p for p in places if classes.roles[p] == role):
            found = []
            for i in range(classes.sizes[place]):
                known = (place, i) in classes.parent
                found.append(units.setdefault(classes.find((place, i)), len(units)) if known else -1)
            axes[role].append(Axis(*place, tuple(found)))
    if not axes[PRODUCES]:
        return None
    first = axes[PRODUCES][0]
    reason = next((classes.reasons[place] for place in places if place in classes.reasons), "")
    if not reason and (tied := [place[0] for place in places if place[0] in shared]):
        reason = f"{tied[0]!r} is shared by several modules"
    if not reason and not axes[CONSUMES]:
        reason = "it is what the model returns"
    if not reason and len(units) < 2:
        reason = "it has a single channel"
    return ChannelGroup(
        first.key.removesuffix("weight").removesuffix("."),
        len(units),
        tuple(axes[PRODUCES]),
        tuple(axes[CONSUMES]),
        tuple(axes[RIDES]),
        len(first.of(first.units[0])),
        reason,
    )


def _head_groups(model: nn.Module, name: str, module: nn.Module) -> Iterator[ChannelGroup]:
    """The heads of a module that computes attention from linear layers, as a group; not proven yet."""
    heads: Heads | None = heads_of(module)
    if heads is None:
        return
    prefix, size = f"{name}." if name else "", heads.width // heads.count
    producers, vectors = [], []
    for layer in heads.projections:
        linear: Any = module.get_submodule(layer)
        units = tuple(i % heads.width // size for i in range(linear.out_features))
        producers.append(Axis(f"{prefix}{layer}.weight", 0, units))
        if linear.bias is not None:
            vectors.append(Axis(f"{prefix}{layer}.bias", 0, units))
    consumer = Axis(f"{prefix}{heads.output}.weight", 1, tuple(i // size for i in range(heads.width)))
    unit = len(producers[0].of(0))
    title = prefix + heads.projections[0]
    yield ChannelGroup(title, heads.count, tuple(producers), (consumer,), tuple(vectors), unit)


# ---------------------------------------------------------------------------------------------------------- the proof


def _flat(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in _flat(item)]
    return [tensor for item in value for tensor in _flat(item)] if isinstance(value, tuple | list) else []


def _run(model: nn.Module, example: Batch) -> list[torch.Tensor]:
    with torch.no_grad(), evaluating(model):
        return [out.double() for out in _flat(feed(model, example)) if out.is_floating_point()]


def _proven_together(model: nn.Module, groups: list[ChannelGroup], example: Batch) -> set[str]:
    """The groups that one narrower copy proves at once, which takes a forward pass for each instead of copies of the
    model: it computes what the model does with the channels of all of them erased, and that is not what it does with
    the channels of any single one of them put back.
    """
    kept = {group.name: _some(group) for group in groups if not _norms_across(model, group)}
    groups = [group for group in groups if len(kept.get(group.name, range(group.size))) < group.size]
    try:
        small = _run(narrow(model, {group.name: kept[group.name] for group in groups}, Groups(tuple(groups))), example)
    except Exception:  # then each is tried by itself, and the one that does this says what it was
        return set()
    with contextlib.ExitStack() as stack:
        erased = {group.name: stack.enter_context(_erased(model, group, kept[group.name])) for group in groups}
        if not _alike(small, together := _run(model, example)):
            return set()
        found = set()
        for group in groups:
            _copy(model, erased[group.name])
            if not _alike(_run(model, example), together, SAME):
                found.add(group.name)
            _erase(model, group, kept[group.name])
    return found


def _why_not(model: nn.Module, group: ChannelGroup, example: Batch, outputs: list[torch.Tensor]) -> str:
    """Why a group cannot lose channels after all; empty where narrowing it does exactly what erasing channels does."""
    kept = _some(group)
    if len(kept) == group.size:
        return "none of its channels can go without emptying a layer"
    try:
        small = _run(narrow(model, {group.name: kept}, Groups((group,))), example)
    except Exception as error:  # the model's own forward may raise anything
        return f"the model does not run without some of its channels ({_words(error)})"
    if [out.shape for out in small] != [out.shape for out in outputs]:
        return "the model returns other shapes without some of its channels"
    if _alike(small, outputs, SAME):
        return "no output depends on its channels for this example, so nothing can be proven; give another"
    across = _norms_across(model, group)
    with _permuted(model, group) if across else _erased(model, group, kept):
        wanted = _run(model, example)
    if not _alike(wanted, outputs if across else small):
        return "something beside its layers depends on its channels"
    return ""


def _some(group: ChannelGroup) -> list[int]:
    """About half of the units, at random, with something left for every tensor."""
    kept = set(range(group.size))
    for unit in np.random.default_rng(0).permutation(group.size).tolist():
        if 2 * len(kept) > group.size and all(axis.kept(kept - {unit}) for axis in group.axes):
            kept.discard(unit)
    return sorted(kept)


def _norms_across(model: nn.Module, group: ChannelGroup) -> bool:
    """Whether a norm of the group is over channels of several units."""
    owners = [model.get_submodule(axis.key.rpartition(".")[0]) for axis in group.vectors]
    return any(isinstance(m, nn.LayerNorm) or (isinstance(m, nn.GroupNorm) and m.num_groups == 1) for m in owners)


@contextlib.contextmanager
def _erased(model: nn.Module, group: ChannelGroup, kept: list[int]) -> Iterator[dict[str, torch.Tensor]]:
    """Have layers read zeros instead of the channels that go; gives the weights that they have without that."""
    before = {axis.key: model.get_parameter(axis.key).detach().clone() for axis in group.consumers}
    _erase(model, group, kept)
    try:
        yield before
    finally:
        _copy(model, before)


def _erase(model: nn.Module, group: ChannelGroup, kept: list[int]) -> None:
    with torch.no_grad():
        for axis in group.consumers:
            stay = set(axis.kept(kept))
            gone = torch.tensor([i for i in range(len(axis.units)) if i not in stay], dtype=torch.long)
            parameter = model.get_parameter(axis.key)
            parameter.index_fill_(axis.dim, gone.to(parameter.device), 0.0)


def _copy(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    state = model.state_dict()
    for key, values in tensors.items():
        state[key].copy_(values)


@contextlib.contextmanager
def _permuted(model: nn.Module, group: ChannelGroup) -> Iterator[None]:
    """Have the units in another order, each in the place of one of the same make."""
    makes: dict[tuple[int, ...], list[int]] = {}
    for unit in range(group.size):
        makes.setdefault(tuple(len(axis.of(unit)) for axis in group.axes), []).append(unit)
    moved = {old: new for alike in makes.values() for old, new in zip(alike, [*alike[1:], alike[0]], strict=True)}
    state = model.state_dict()
    before = {axis.key: state[axis.key].clone() for axis in group.axes}
    for axis in group.axes:
        order = list(range(len(axis.units)))
        for old, new in moved.items():
            for i, j in zip(axis.of(new), axis.of(old), strict=True):
                order[i] = j
        tensor = state[axis.key]
        tensor.copy_(tensor.index_select(axis.dim, torch.tensor(order, device=tensor.device)))
    try:
        yield
    finally:
        _copy(model, before)


def _alike(one: list[torch.Tensor], other: list[torch.Tensor], tolerance: float = TOLERANCE) -> bool:
    return [out.shape for out in one] == [out.shape for out in other] and all(
        bool(torch.isfinite(a).all()) and float((a - b).abs().max()) <= tolerance * max(float(b.abs().max()), 1e-30)
        for a, b in zip(one, other, strict=True)
        if a.numel()
    )
