"""What rules that weigh changes of weights share: every option's change, and results kept in the store."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from autocompress.compressors import COMPRESSORS, compressor_of
from autocompress.compressors.base import CODES_HELD
from autocompress.errors import CalibrationError
from autocompress.layers import weight_of
from autocompress.measuring import Context
from autocompress.offloading import is_streamed
from autocompress.profiling import Profile
from autocompress.threads import default_workers, single_threaded
from autocompress.types import Option

__all__ = ["differentiable", "kept", "losses_of_changes", "realised_weights", "require_whole"]


def kept(
    context: Context, profile: Profile, what: str, key: Sequence[Any], make: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """`make()`, a JSON value by layer, or what it gave before for the key and the rows of this profile: in this
    context, or in another one where the profile has a store.

    The key holds a version and all that the value depends on beside the profile.
    """
    digest = hashlib.sha256(json.dumps([what, profile.key, *key]).encode()).hexdigest()
    name = f"extra/{what}-{digest[:16]}.json"
    if name not in context.kept:
        found = None if profile.store is None else profile.store.read_json(name)
        if found is None:
            found = make()
            if profile.store is not None:
                with profile.store.writing():
                    profile.store.write_json(name, found)
        context.kept[name] = found
    return context.kept[name]


def realised_weights(
    model: nn.Module, profile: Profile, name: str, options: Sequence[Option]
) -> Iterator[tuple[Option, np.ndarray]]:
    """Each of these options of a layer with its weight, float32 in the parameter's shape.

    Made together, as far as memory allows: options share masks and passes, so that all of them take little longer than
    the profile took to measure them.
    """
    layer = profile.layers[name].layer
    problem = profile.problem(name, weight_of(model, layer.key))
    by_compressor: dict[str, list[Option]] = {}
    for option in options:
        by_compressor.setdefault(compressor_of(option)[0], []).append(option)
    at_once = max(1, CODES_HELD // max(problem.weight.size, 1))
    for compressor, group in by_compressor.items():
        for start in range(0, len(group), at_once):
            part = group[start : start + at_once]
            for option, found in zip(part, COMPRESSORS[compressor].realise_all(problem, part), strict=True):
                assert found is not None, f"{option} has a row in the profile"
                yield option, layer.unmatrix(problem.whole(found).astype(np.float32))


def losses_of_changes(
    model: nn.Module, profile: Profile, loss: Callable[[str, np.ndarray], float], narrowed: bool = False
) -> dict[str, list[float]]:
    """loss(layer, ΔW) of every option of every layer, in the order of the profile's rows; narrowed: those of narrower
    layers behind them, whose outputs that go are not changed. ΔW float64 in the parameter's shape. Each option is
    realised once: the time of a profile without its traces.
    """

    def of_layer(name: str) -> list[float]:
        layer = profile.layers[name]
        dense = weight_of(model, layer.layer.key).detach().double().cpu().numpy()
        options = [row.option for row in (*layer.rows, *(layer.narrowed if narrowed else ()))]
        found = {o: loss(name, w - dense) for o, w in realised_weights(model, profile, name, options)}
        return [found[option] for option in options]

    names = sorted(profile.layers, key=lambda n: (-profile.layers[n].layer.size, n))
    with single_threaded(), ThreadPoolExecutor(default_workers()) as pool:
        found = dict(zip(names, pool.map(of_layer, names), strict=True))
    return {name: found[name] for name in profile.layers}


def require_whole(model: nn.Module) -> None:
    """Raise CalibrationError for a streamed model."""
    if is_streamed(model):
        raise CalibrationError(
            "this strategy changes or differentiates weights of the whole model in memory; leave streaming off "
            "(--no-stream), or ask one that only runs the model, such as auto"
        )


@contextlib.contextmanager
def differentiable(context: Context, profile: Profile) -> Iterator[tuple[nn.Module, Mapping[str, nn.Parameter]]]:
    """A copy of the dense model in eval mode, with the weights of its layers by name, whose losses can be
    differentiated twice within the block. Raises CalibrationError for a streamed model.
    """
    require_whole(context.model)
    model = copy.deepcopy(context.model).eval().requires_grad_(True)
    weights = {name: model.get_parameter(found.layer.key) for name, found in profile.layers.items()}
    # The fused kernels of attention have no second derivative.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        yield model, weights
