"""Sequential mode: each layer compressed on the inputs that the already compressed ones before it really produce."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from autocompress.applying import (
    check_plan,
    correction_batch,
    kept_weight,
    made,
    realised_layers,
    set_weight,
    with_records,
    with_weights,
)
from autocompress.batches import (
    Batch,
    Enough,
    batch_samples,
    chunk_batch,
    evaluating,
    feed,
    materialise,
    split_batches,
)
from autocompress.calibration import Collector
from autocompress.compressors import LayerProblem, Measured, compressor_of, measure, realise
from autocompress.correcting import Moments, correct_statistics, dense_moments
from autocompress.errors import CalibrationError
from autocompress.inputs import slow_attention
from autocompress.layers import CONVOLUTIONS, TRANSPOSED, Layer, weight_of
from autocompress.profiling import Profile
from autocompress.records import VectorStore
from autocompress.threads import default_workers, single_threaded
from autocompress.types import Option, Plan

__all__ = ["apply_sequentially", "neighbours"]

PASS_SAMPLES = 64  # samples of a forward pass, of which the inputs of one step's layers are held
TARGET_BYTES = 1 << 28  # dense outputs that are kept, so that the dense model runs once for several steps


def apply_sequentially(
    model: nn.Module,
    plan: Plan,
    profile: Profile,
    batches: Iterable[Batch],
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """What `apply` returns, with every layer compressed anew in forward order, within the plan's bytes.

    A layer's Hessian is 2 X̂ X̂ᵀ / N + damping over the inputs X̂ that the layers before it, compressed and corrected,
    produce on the data that `calibrate` saw; its weight is refitted to the dense outputs first (`_problems`). Of the
    options near the planned one (`neighbours`) it gets the one of least error whose bytes are at most the planned ones,
    plus its part of what the plan left of the budget, plus what layers before it saved. Layers that read the same
    tensor are one step, and only one step's statistics are in memory, beside the dense outputs of a block of steps.
    The plan that the model carries holds what was realised. progress: called with (steps done, steps in all). Raises
    MismatchError if plan, profile and model do not belong together, CalibrationError if the compressed model calls its
    layers in another order than the dense one. Source: OBC, arXiv 2208.11580 (sequential mode, refit to dense outputs).
    """
    check_plan(model, plan, profile)
    if profile.kept(plan.layers):
        raise CalibrationError("layers of a narrower network are not compressed one after another yet; apply the plan")
    profile = profile.with_vectors(plan.vector_bits)
    fit = split_batches(materialise(batches), seed=seed)[0]
    pieces = [piece for batch in fit for piece in chunk_batch(batch, PASS_SAMPLES)]
    data = correction_batch(fit)
    with evaluating(model):
        moments = dense_moments(model, [o for x in profile.layers.values() for o in x.layer.owners], data)
        steps = _steps(
            model, [x.layer for x in profile.layers.values() if x.reached and _linear(model, x.layer)], pieces[0]
        )
    rows = {name: profile.layers[name].row(option) for name, option in plan.layers.items()}
    planned = sum(row.bytes for row in rows.values())
    allowance = (planned + plan.budget_bytes - plan.predicted_bytes) / max(planned, 1)
    untouched = {n: o for n, o in plan.layers.items() if not any(n == x.name for step in steps for x in step.layers)}
    done = realised_layers(model, profile, untouched)
    small = with_weights(model, profile, {}, None)
    with torch.no_grad():
        for name, weight in done.items():
            set_weight(small, profile.layers[name].layer, made(weight))
    targets = _Targets(model, steps, pieces)
    room = 0.0
    for number, step in enumerate(steps):
        _correct_until(model, small, step, profile, data, moments)
        for problem in _problems(model, small, step, pieces, targets.take(number), profile.statistics.damping):
            problem.exact_limit = profile.exact_limit
            name = problem.name
            room += allowance * rows[name].bytes

            def fits(row: Measured, name: str = name, room: float = room) -> bool:
                # The header depends on all names, so that it has to be asked for the whole file.
                return row.bytes <= room and profile.template.file_bytes({**rows, name: row}) <= plan.budget_bytes

            found = next((row for row in _candidates(problem, plan.layers[name]) if fits(row)), None)
            if found is not None:
                rows[name] = found
                done[name] = kept_weight(model, profile, name, found.option, realise(problem, found.option))
            else:  # The planned weight itself always fits: the file has had room for it all the way.
                done |= realised_layers(model, profile, {name: plan.layers[name]})
            room -= rows[name].bytes
            with torch.no_grad():
                set_weight(small, profile.layers[name].layer, made(done[name]))
        if progress is not None:
            progress(number + 1, len(steps))
    small = with_weights(model, profile, {n: made(done[n]) for n in profile.layers}, data, moments)
    size = profile.template.file_bytes(rows)
    final = plan.replace(
        layers={name: rows[name].option for name in plan.layers},
        predicted_bytes=size,
        fixed_bytes=size - sum(row.bytes for row in rows.values()),
        realised={
            name: {
                key: value
                for key in ("error", "bytes", "width", "nonzero", "row_bits")
                if (value := getattr(rows[name], key)) is not None
            }
            for name in plan.layers
        },
        measured={},
    )
    return with_records(small, final, profile, done)


def _correct_until(
    model: nn.Module, small: nn.Module, step: _Step, profile: Profile, data: Batch, moments: Moments
) -> None:
    """Correct the statistics of everything in front of a step's layers, as `with_weights` does for the whole model."""

    def stop(module: nn.Module, args: Any) -> None:
        raise Enough

    handles = [small.get_submodule(owner).register_forward_pre_hook(stop) for owner in step.owners]
    everywhere = [owner for layer in profile.layers.values() for owner in layer.layer.owners]
    try:
        correct_statistics(model, small, everywhere, data, VectorStore(profile.template), moments)
    except Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()


def _linear(model: nn.Module, layer: Layer) -> bool:
    """Whether the layer's modules put out what its weight makes of their input. Those of tables, recurrence and
    attention do not, so that these keep the weights that the plan gives them.
    """
    modules = [model.get_submodule(owner) for owner in layer.owners]
    return layer.parameter == "weight" and all(isinstance(m, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)) for m in modules)


def neighbours(option: Option) -> list[Option]:
    """The option and those a little finer and coarser: steps to a factor of 1.5, λ to 1.7, densities to 1.25.

    Options without a step or a sparsity have no neighbours but themselves.
    """
    steps: list[float | None] = [option.step]
    lams = [option.lam]
    if option.step is not None and option.lam is not None:
        steps += [_rounded(option.step * 2.0 ** (k / 8), 3) for k in range(-5, 6) if k]
        lams += [_rounded(option.lam * factor, 2) for factor in (0.6, 1.7)]
    density = 100.0 - option.sparsity
    sparsities = [option.sparsity]
    if option.sparsity > 0.0:
        near = [round(100.0 - factor * density, 1) for factor in (0.8, 0.9, 1.1, 1.25)]
        sparsities += [s for s in near if 0.0 < s < 100.0]
    found = [
        dataclasses.replace(option, sparsity=s, step=t, lam=lam) for s in sparsities for t in steps for lam in lams
    ]
    return list(dict.fromkeys(found))


def _rounded(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")  # short names: they stand in the file's header


def _candidates(problem: LayerProblem, option: Option) -> list[Measured]:
    """The option and its neighbours on this problem, least error first."""
    groups: dict[float, list[Option]] = {}
    for near in neighbours(option):
        groups.setdefault(near.sparsity, []).append(near)
    compressor = compressor_of(option)[1]
    with single_threaded(), ThreadPoolExecutor(default_workers()) as pool:
        if compressor.needs_data(option) and option.structure == Option(sparsity=option.sparsity):
            problem.kept(option.structure)  # its trace once, before the threads
        parts = list(pool.map(lambda group: measure(compressor, problem, group), groups.values()))
    return sorted((row for part in parts for row in part), key=lambda row: (row.error, row.bytes, str(row.option)))


@dataclass(frozen=True)
class _Step:
    """Layers that read the same tensor; `calls`: how many calls of them there are in one forward pass, and `numel` how
    many values they put out for one sample.
    """

    layers: list[Layer]
    calls: int
    numel: int

    @property
    def owners(self) -> list[str]:
        return [owner for layer in self.layers for owner in layer.owners]


@dataclass(frozen=True)
class _Call:
    """One call of a module in a forward pass: copies, because an in-place activation may write into what it took or
    gave; `source` and its version then tell which calls read the same values.
    """

    owner: str
    input: torch.Tensor
    output: torch.Tensor
    source: torch.Tensor
    version: int


def _steps(model: nn.Module, layers: Sequence[Layer], piece: Batch) -> list[_Step]:
    """The layers in the order of their first calls, those that read the same tensor together."""
    layer_of = {owner: layer for layer in layers for owner in layer.owners}
    calls = _calls(model, list(layer_of), chunk_batch(piece, 1)[0])
    groups: dict[tuple[int, int], list[Layer]] = {}
    for name in dict.fromkeys(layer_of[call.owner].name for call in calls):
        first = next(call for call in calls if layer_of[call.owner].name == name)
        groups.setdefault((id(first.source), first.version), []).append(layer_of[first.owner])
    found = []
    for group in groups.values():
        own = [call for call in calls if layer_of[call.owner] in group]
        found.append(_Step(group, len(own), sum(call.output.numel() for call in own)))
    return found


class _Targets:
    """The dense outputs of every step, for a block of steps at a time: as many as `TARGET_BYTES` hold, at least one."""

    def __init__(self, model: nn.Module, steps: Sequence[_Step], pieces: Sequence[Batch]) -> None:
        self.model, self.steps, self.pieces = model, steps, pieces
        self.samples = sum(batch_samples(piece) for piece in pieces)
        self.kept: dict[int, list[list[_Call]]] = {}

    def take(self, number: int) -> list[list[_Call]]:
        """The calls of one step in the dense model, for each piece of data; the steps are taken in order, once."""
        if number not in self.kept:
            block, size = [number], self.steps[number].numel
            while block[-1] + 1 < len(self.steps):
                size += self.steps[block[-1] + 1].numel
                if 4 * size * self.samples > TARGET_BYTES:
                    break
                block.append(block[-1] + 1)
            owners = [owner for i in block for owner in self.steps[i].owners]
            with evaluating(self.model):
                for piece in self.pieces:
                    calls = _calls(self.model, owners, piece, sum(self.steps[i].calls for i in block), inputs=False)
                    for i in block:
                        self.kept.setdefault(i, []).append([c for c in calls if c.owner in self.steps[i].owners])
        return self.kept.pop(number)


def _calls(
    model: nn.Module, owners: Sequence[str], batch: Batch, stop: int | None = None, inputs: bool = True
) -> list[_Call]:
    """The calls of these modules in a forward pass, which ends with number `stop` of them."""
    found: list[_Call] = []
    handles = []
    for owner in owners:

        def hook(module: nn.Module, args: Any, kwargs: Any, output: torch.Tensor, owner: str = owner) -> None:
            x = args[0] if args else kwargs["input"]
            held = x if inputs else x[:0]
            found.append(_Call(owner, held.clone(), output.clone(), held, x._version))
            if len(found) == stop:
                raise Enough

        handles.append(model.get_submodule(owner).register_forward_hook(hook, with_kwargs=True))
    try:
        with torch.no_grad(), slow_attention():
            feed(model, batch)
    except Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found


def _problems(
    model: nn.Module,
    small: nn.Module,
    step: _Step,
    pieces: Sequence[Batch],
    targets: Sequence[Sequence[_Call]],
    damping: float,
) -> list[LayerProblem]:
    """Each layer of a step with the Hessian of its inputs X̂ in `small` and its weight refitted to the dense outputs.

    W' = W + R X̂ᵀ (X̂ X̂ᵀ + δ)⁻¹, R = Y - W X̂, Y what the layer puts out in the dense model (`targets`: its calls there,
    for each piece of the data), δ the Hessian's damping: the ridge solution of W' X̂ = Y, which stays W where X̂ is the
    dense input.
    """
    layer_of = {owner: layer for layer in step.layers for owner in layer.owners}
    weights = {layer.name: weight_of(model, layer.key) for layer in step.layers}
    probes: dict[str, Any] = {owner: _probe(model, owner, weights[layer.name]) for owner, layer in layer_of.items()}
    moments = {layer.name: np.zeros(layer.matrix_shape) for layer in step.layers}  # R X̂ᵀ
    collector = Collector(small, step.layers)
    with collector, single_threaded():
        for piece, wanted in zip(pieces, targets, strict=True):
            given = _calls(small, list(layer_of), piece, step.calls)
            collector.end_batch()
            if [(c.owner, c.output.shape) for c in wanted] != [(c.owner, c.output.shape) for c in given]:
                raise CalibrationError(
                    f"layer {step.layers[0].name!r} is not called as in the dense model once layers before it are "
                    "compressed, so that there is nothing to refit it to; turn sequential mode off"
                )
            for dense, here in zip(wanted, given, strict=True):
                layer, probe = layer_of[here.owner], probes[here.owner]
                with torch.enable_grad():
                    output = probe(here.input.float())
                    # The layer is linear in its weight: the gradient of <R, W X̂> in W is R X̂ᵀ, for every kind of layer.
                    residual = dense.output - output.detach()
                    (gradient,) = torch.autograd.grad((output * residual).sum(), [probe.weight])
                moments[layer.name] += layer.matrix(gradient)
    samples = sum(batch_samples(piece) for piece in pieces)
    problems = []
    for layer in step.layers:
        hessian = collector.accumulators[layer.name].finish(samples, damping).hessian
        weight = layer.matrix(weights[layer.name])
        cross = moments[layer.name] * (2.0 / samples)
        moved = [np.linalg.solve(h, c.T).T for h, c in zip(hessian, cross, strict=True)]
        refitted = weight + np.stack(moved)
        problems.append(LayerProblem(layer.name, layer.stored_shape, refitted, hessian, factorable=layer.factorable))
    return problems


def _probe(model: nn.Module, owner: str, weight: torch.Tensor) -> nn.Module:
    """A copy of a layer's module in single precision, to differentiate in its weight."""
    probe = copy.deepcopy(model.get_submodule(owner))
    probe._parameters["weight"] = nn.Parameter(weight.detach().clone())
    return probe.float().requires_grad_(True)
