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

from autocompress.batches import Batch, join_batches, materialise, split_batches
from autocompress.compressors import Realised, realise
from autocompress.compressors.base import Parts, factor_keys, product
from autocompress.correcting import Moments, correct_statistics, dense_moments
from autocompress.errors import MismatchError
from autocompress.factors import Halves, factorise, renamed
from autocompress.narrowing import Groups, narrow
from autocompress.profiling import Profile
from autocompress.records import VectorStore, fold_norms, records, rename_vectors
from autocompress.storage import Entry
from autocompress.threads import default_workers, single_threaded
from autocompress.types import Option, Plan

__all__ = [
    "CORRECTION_SAMPLES",
    "Encoded",
    "apply",
    "carrying",
    "check_plan",
    "encoded_of",
    "realise_layers",
    "with_records",
    "with_weights",
]

CORRECTION_SAMPLES = 512
_ATTRIBUTE = "_autocompress_encoded"


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
    weights = realise_layers(model, profile, plan.layers)
    data = None
    if batches is not None:
        data = join_batches(split_batches(materialise(batches), seed=seed)[0], CORRECTION_SAMPLES)
    small = with_weights(model, profile, {n: r.parts() for n, r in weights.items()}, data, layers=plan.layers)
    return with_records(small, plan, profile, weights)


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


def with_records(small: nn.Module, plan: Plan, profile: Profile, weights: Mapping[str, Realised]) -> nn.Module:
    """The model itself, now carrying the records of its file: these weights, and every other tensor as it stands."""
    layers = {name: found.layer for name, found in profile.layers.items()}
    compressed = {
        entry.name: entry
        for n, r in weights.items()
        for entry in r.entries(layers[n].key, plan.layers[n], layers[n].params)
    }
    half = renamed(profile.template.half, [n for n, r in weights.items() if r.factors]).values()
    return carrying(small, records(small, compressed, frozenset(half), profile.template.bits), plan)


def carrying(small: nn.Module, entries: Iterable[Entry], plan: Plan) -> nn.Module:
    """The model itself, now carrying these records and the plan that they realise: what `save` writes."""
    setattr(small, _ATTRIBUTE, Encoded(tuple(entries), plan))
    return small


def realise_layers(model: nn.Module, profile: Profile, layers: Mapping[str, Option]) -> dict[str, Realised]:
    """Every layer's compressed weight, on as many threads as there are cores; the bits do not depend on how many."""
    tasks = [
        (profile.problem(name, model.get_parameter(profile.layers[name].layer.key)), option)
        for name, option in layers.items()
    ]
    tasks.sort(key=lambda t: (-t[0].weight.size, t[0].name))
    with single_threaded(), ThreadPoolExecutor(default_workers()) as pool:
        found = dict(zip([t[0].name for t in tasks], pool.map(lambda t: realise(*t), tasks), strict=True))
    return {name: found[name] for name in layers}


def with_weights(
    model: nn.Module,
    profile: Profile,
    weights: Mapping[str, Parts],
    data: Batch | None,
    moments: Moments | None = None,
    layers: Mapping[str, Option] | None = None,
) -> nn.Module:
    """A copy of the model with these weights, norms folded, statistics corrected on `data`, and every float as it will
    be stored; a layer of which there are factors becomes as many layers. `moments`: the dense model's on `data`, where
    they are known. layers: the options that the weights are of, where some are narrower: so is the copy then.
    """
    kept = profile.kept(layers or {})
    groups = Groups(()) if profile.widths is None else profile.widths.groups
    small = (narrow(model, kept, groups) if kept else copy.deepcopy(model)).eval()
    found = {}
    split = {n: parts for n, parts in weights.items() if isinstance(parts, tuple)}
    with torch.no_grad():
        for name, parts in weights.items():
            weight = small.get_parameter(profile.layers[name].layer.key)
            layer = found[name] = replace(profile.layers[name].layer, shape=tuple(weight.shape))
            whole = product(parts, layer.stored_shape) if isinstance(parts, tuple) else parts
            weight.copy_(torch.from_numpy(layer.unmatrix(whole)))
        fold_norms(small)
        store = VectorStore(profile.template)
        if data is not None:  # with the product, as the names of the layers are still the dense model's
            owners = [owner for layer in profile.layers.values() for owner in layer.layer.owners]
            reference = model
            if kept:
                moments = _of_channels(dense_moments(model, owners, data) if moments is None else moments, kept, groups)
                reference = narrow(model, kept, groups)
            correct_statistics(reference, small, owners, data, store, moments)
        store.store_rest(small)
        groups_of = {n: found[n].shape[1] // p[0].shape[1] for n, p in split.items()}
        factorise(small, {n: Halves(groups_of[n], len(p[0]), len(p) > 2) for n, p in split.items()})
        rename_vectors(small, split)
        for name, parts in split.items():
            for key, values in zip(factor_keys(found[name].key, len(parts)), parts, strict=True):
                small.get_parameter(key).copy_(torch.from_numpy(values))
    return small


def _of_channels(moments: Moments, kept: Mapping[str, Sequence[int]], groups: Groups) -> Moments:
    """The moments of the channels that stay, for every norm and every bias."""
    stay = {axis.key: axis.kept(units) for name, units in kept.items() for axis in groups[name].vectors}
    found = {}
    for name, (mean, std, calls) in moments.items():
        index = stay.get(f"{name}.bias" if name else "bias")
        found[name] = (mean, std, calls) if index is None else (mean[index], std[index], calls)
    return found
