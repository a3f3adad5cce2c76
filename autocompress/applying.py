"""Plan -> model. The only place that makes one: a copy whose weights are exactly what the file will hold, statistics
corrected.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import nn

from autocompress.batches import Batch, join_batches, materialise, samples_within, split_batches
from autocompress.compressors import Realised, realise
from autocompress.compressors.base import Parts, factor_keys, product
from autocompress.correcting import Moments, correct_statistics, dense_moments
from autocompress.errors import MismatchError
from autocompress.factors import Halves, factorise, renamed
from autocompress.layers import Layer, weight_of
from autocompress.narrowing import Groups, narrow
from autocompress.offloading import READER, Reader, is_streamed
from autocompress.profiling import Profile
from autocompress.records import VectorStore, fold_norms, records, rename_vectors, stored_values
from autocompress.storage import Entry
from autocompress.threads import default_workers, single_threaded
from autocompress.types import Option, Plan

__all__ = [
    "CORRECTION_SAMPLES",
    "CORRECTION_TOKENS",
    "Encoded",
    "Made",
    "apply",
    "carrying",
    "check_plan",
    "correction_batch",
    "encoded_of",
    "kept_weight",
    "made",
    "realise_layers",
    "realised_layers",
    "set_weight",
    "with_records",
    "with_weights",
]

CORRECTION_SAMPLES = 512
CORRECTION_TOKENS = 4096  # what a large model makes of them is in memory at once
_ATTRIBUTE = "_autocompress_encoded"
Made = Parts | list[Entry]  # a compressed weight as a model gets it: dense, or for a streamed model its records


@dataclass(frozen=True)
class Encoded:
    """What an applied model carries: the records of its file, in order, and the plan that they realise."""

    entries: tuple[Entry, ...]
    plan: Plan


def encoded_of(model: nn.Module) -> Encoded:
    """The records that `apply` left on a model. Raises MismatchError on any other model."""
    found = getattr(model, _ATTRIBUTE, None)
    if not isinstance(found, Encoded):
        raise MismatchError("this model carries no encoded weights; save what `apply` or `compress` returned")
    return found


def apply(
    model: nn.Module,
    plan: Plan,
    profile: Profile,
    batches: Iterable[Batch] | None = None,
    seed: int = 0,
) -> nn.Module:
    """A compressed copy of the model that carries its encoded weights; the model itself is not touched.

    Weights are rebuilt from the profile's traces, bit for bit what was measured; batch norms are folded to a scale and
    a shift and, if there are batches, statistics are corrected on them (`correct_statistics`, on the part that
    `calibrate` saw). Raises MismatchError if the plan is of another profile or the profile of other weights.
    """
    check_plan(model, plan, profile)
    profile = profile.with_vectors(plan.vector_bits)
    weights = realised_layers(model, profile, plan.layers)
    data = None
    if batches is not None:
        data = correction_batch(split_batches(materialise(batches), seed=seed)[0])
    small = with_weights(model, profile, {n: made(r) for n, r in weights.items()}, data, layers=plan.layers)
    return with_records(small, plan, profile, weights)


def correction_batch(fit: Sequence[Batch], samples: int = CORRECTION_SAMPLES) -> Batch:
    """The first samples of the part that `calibrate` saw, on which statistics are corrected."""
    return join_batches(fit, samples_within(fit[0], samples, CORRECTION_TOKENS))


def check_plan(model: nn.Module, plan: Plan, profile: Profile) -> None:
    """Raise MismatchError unless the plan is one of this profile, which made no weights yet, of layers whose widths fit
    together, and the profile of this model.
    """
    profile.check_model(model)
    if plan.realised:
        raise MismatchError(
            "field 'realised': this plan records what sequential mode made, which no profile can make again; load the "
            "file it belongs to, or compress again"
        )
    if plan.fingerprint != profile.fingerprint:
        raise MismatchError("field 'fingerprint': the plan was made from another profile")
    if other := set(plan.layers) ^ set(profile.layers):
        raise MismatchError(f"field 'layers': the plan and the profile differ in {', '.join(map(repr, sorted(other)))}")
    profile.kept(plan.layers)  # refuses widths that do not fit together


def with_records(
    small: nn.Module, plan: Plan, profile: Profile, weights: Mapping[str, Realised | list[Entry]]
) -> nn.Module:
    """The model itself, now carrying the records of its file: these weights, and every other tensor as it stands."""
    found = {n: _entries(profile, n, plan.layers[n], weight) for n, weight in weights.items()}
    compressed = {entry.name: entry for entries in found.values() for entry in entries}
    half = renamed(profile.template.half, [n for n, entries in found.items() if len(entries) > 1]).values()
    return carrying(small, records(small, compressed, frozenset(half), profile.template.bits), plan)


def _entries(profile: Profile, name: str, option: Option, weight: Realised | list[Entry]) -> list[Entry]:
    layer = profile.layers[name].layer
    return weight if isinstance(weight, list) else weight.entries(layer.key, option, layer.params)


def carrying(small: nn.Module, entries: Iterable[Entry], plan: Plan) -> nn.Module:
    """The model itself, now carrying these records and the plan that they realise: what `save` writes."""
    setattr(small, _ATTRIBUTE, Encoded(tuple(entries), plan))
    return small


def realise_layers(model: nn.Module, profile: Profile, layers: Mapping[str, Option]) -> dict[str, Realised]:
    """Every layer's compressed weight, on as many threads as there are cores; the bits do not depend on how many."""

    def of(name: str) -> Realised:
        return realise(profile.problem(name, weight_of(model, profile.layers[name].layer.key)), layers[name])

    order = sorted(layers, key=lambda n: (-profile.layers[n].layer.size, n))
    with single_threaded(), ThreadPoolExecutor(default_workers()) as pool:
        found = dict(zip(order, pool.map(of, order), strict=True))
    return {name: found[name] for name in layers}


def realised_layers(
    model: nn.Module, profile: Profile, layers: Mapping[str, Option]
) -> dict[str, Realised | list[Entry]]:
    """`realise_layers`; of a streamed model the records, made one layer after another: weights of all of them, or of
    two at work, would be more than memory may hold.
    """
    if not is_streamed(model):
        return dict(realise_layers(model, profile, layers))
    return {n: kept_weight(model, profile, n, o, realise_layers(model, profile, {n: o})[n]) for n, o in layers.items()}


def kept_weight(
    model: nn.Module, profile: Profile, name: str, option: Option, found: Realised
) -> Realised | list[Entry]:
    """A layer's compressed weight as it is held: of a streamed model its records."""
    return _entries(profile, name, option, found) if is_streamed(model) else found


def made(weight: Realised | list[Entry]) -> Made:
    """A weight as `with_weights` takes it."""
    return weight if isinstance(weight, list) else weight.parts()


class _Decoder:
    """What reads the weights of a compressed copy of a streamed model: those of records decoded, the others dense."""

    def __init__(self, dense: Reader) -> None:
        self.dense = dense
        self.entries: dict[str, list[Entry]] = {}

    def __call__(self, key: str) -> torch.Tensor:
        if key not in self.entries:
            return self.dense(key)
        first, *others = (stored_values(entry) for entry in self.entries[key])
        if others:
            shape = (others[0].shape[0], self.entries[key][0].params["factor"] * first.shape[1], *first.shape[2:])
            first = product([first, *others], shape)
        return torch.from_numpy(first)


def set_weight(small: nn.Module, layer: Layer, weight: Made) -> None:
    """Give a layer of a copy its compressed weight; of factors the product, as long as the layer is whole."""
    if isinstance(weight, list):
        decoder = getattr(small, READER)
        decoder.entries |= {f"{owner}.{layer.parameter}": weight for owner in layer.owners}
        return
    whole = product(weight, layer.stored_shape) if isinstance(weight, tuple) else weight
    small.get_parameter(layer.key).copy_(torch.from_numpy(layer.unmatrix(whole)))


def with_weights(
    model: nn.Module,
    profile: Profile,
    weights: Mapping[str, Made],
    data: Batch | None,
    moments: Moments | None = None,
    layers: Mapping[str, Option] | None = None,
) -> nn.Module:
    """A copy of the model with these weights, norms folded, statistics corrected on `data`, and every float as it will
    be stored; a layer of which there are factors becomes as many layers. A copy of a streamed model decodes each weight
    when its layer runs. `moments`: the dense model's on `data`, where they are known. layers: the options that the
    weights are of, where some are narrower: so is the copy then.
    """
    kept = profile.kept(layers or {})
    channels = Groups(()) if profile.widths is None else profile.widths.groups
    small = (narrow(model, kept, channels) if kept else copy.deepcopy(model)).eval()
    if is_streamed(model):
        setattr(small, READER, _Decoder(getattr(model, READER)))
    whole = {n: profile.layers[n].layer for n in weights}
    found = {n: replace(layer, shape=tuple(small.get_parameter(layer.key).shape)) for n, layer in whole.items()}
    shapes = {n: _factor_shapes(parts) for n, parts in weights.items()}
    split = {n: each for n, each in shapes.items() if len(each) > 1}
    with torch.no_grad():
        for name, parts in weights.items():
            set_weight(small, found[name], parts)
        fold_norms(small)
        store = VectorStore(profile.template)
        if data is not None:  # with the product, as the names of the layers are still the dense model's
            owners = [owner for layer in profile.layers.values() for owner in layer.layer.owners]
            reference = model
            if kept:
                moments = _of_channels(
                    dense_moments(model, owners, data) if moments is None else moments, kept, channels
                )
                reference = narrow(model, kept, channels)
            correct_statistics(reference, small, owners, data, store, moments)
        store.store_rest(small)
        groups = {n: found[n].shape[1] // first[1] for n, (first, *_) in split.items()}
        factorise(small, {n: Halves(groups[n], each[0][0], len(each) > 2) for n, each in split.items()})
        rename_vectors(small, split)
        for name, each in split.items():
            for key, part in zip(factor_keys(found[name].key, len(each)), weights[name], strict=True):
                if isinstance(part, Entry):
                    getattr(small, READER).entries[key] = [part]
                else:
                    small.get_parameter(key).copy_(torch.from_numpy(part))
    return small


def _factor_shapes(weight: Made) -> list[tuple[int, ...]]:
    """The shapes of a weight's factors; of a whole one its own."""
    return [tuple(part.shape) for part in weight] if isinstance(weight, tuple | list) else [weight.shape]


def _of_channels(moments: Moments, kept: Mapping[str, Sequence[int]], groups: Groups) -> Moments:
    """The moments of the channels that stay, for every norm and every bias."""
    stay = {axis.key: axis.kept(units) for name, units in kept.items() for axis in groups[name].vectors}
    found = {}
    for name, (mean, std, calls) in moments.items():
        index = stay.get(f"{name}.bias" if name else "bias")
        found[name] = (mean, std, calls) if index is None else (mean[index], std[index], calls)
    return found
