"""PreCropping: a narrower network before it is trained, its widths chosen under exact budgets."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from autocompress import costs
from autocompress.batches import Batch, batch_samples, chunk_batch
from autocompress.calibration import positions_of
from autocompress.channels import channel_groups
from autocompress.errors import BudgetError, InfeasibleError, LayerError, TaskError
from autocompress.layers import dense_file_bytes, find_layers, float32_file_bytes, stored_tensors
from autocompress.narrowing import ChannelGroup, Groups, reshape_to
from autocompress.synflow import ROUNDS, synflow_densities
from autocompress.tasks import Task
from autocompress.types import Budget, amount
from solvers.solution import Status
from solvers.widths import WidthProblem, WidthSolution, fitted_logs, largest_widths, solve_widths

__all__ = ["METHODS", "Precropped", "Structure", "count_macs", "count_params", "precrop"]

METHODS = ("programme", "synflow", "uniform")
RESOURCES = ("params", "macs", "bytes")
Form = Mapping[int, int]  # a size as a linear form of widths: {variable: positions per unit}, and what is fixed


@dataclass(frozen=True)
class Precropped:
    """An untrained narrower network and the account of its widths.

    model: in training mode. widths: {group: (channels given, channels now)}, of the group's first layer; a group of
    concatenated layers has an entry for each run of channels that are alike. kept: groups that keep their width, with
    the reason. params, macs (of one sample), bytes (as float32 in a safetensors file): of the network itself, counted;
    dense: the same of the factory's. limits: what they were held to. value: Σ log p_l over the layers, p_l the part of
    its weights that a layer keeps; relaxed: the programme's value before widths were whole; bound: no widths within the
    limits have a larger one. It is -inf, nothing claimed, for a rule's widths, and where a layer reads several groups
    side by side: there the programme takes the mean of the logarithms for that of the sum, which is larger. method: how
    the widths were found; rounded: how they became whole. copied: parameters whose modules have no initialiser of their
    own, which are cut from the factory's network as it made them.
    """

    model: nn.Module = field(repr=False)
    widths: Mapping[str, tuple[int, int]]
    kept: Mapping[str, str]
    params: int
    macs: int
    bytes: int
    dense: Mapping[str, int]
    limits: Mapping[str, float]
    value: float
    relaxed: float
    bound: float
    method: str
    rounded: str
    copied: tuple[str, ...] = ()

    def to_json(self) -> str:
        """The account without the network, and the shapes of its tensors; the same widths give the same text."""
        names = ("kept", "params", "macs", "bytes", "dense", "limits", "value", "relaxed", "method", "rounded")
        body = {name: getattr(self, name) for name in names}
        body["bound"] = self.bound if math.isfinite(self.bound) else None
        body["widths"] = {name: {"given": given, "now": now} for name, (given, now) in self.widths.items()}
        body["copied"] = list(self.copied)
        body["shapes"] = {key: list(tensor.shape) for key, tensor in stored_tensors(self.model).items()}
        return json.dumps(body, indent=2, default=dict, allow_nan=False) + "\n"


def precrop(
    model_factory: Callable[[], nn.Module] | Task,
    budget: Budget | str | int | None = None,
    *,
    params: float | str | None = None,
    macs: float | str | None = None,
    example: Batch | None = None,
    method: str = "programme",
    round_to: int = 1,
    widest: float = 1.0,
    seed: int = 0,
    initialise: Callable[[nn.Module], Any] | None = None,
) -> Precropped:
    """An untrained network like the factory's, as narrow as the budget asks: PreCropping.

        maximise Σ_l log p_l   subject to   params ≤ P, MACs ≤ M, bytes ≤ B,    p_l = Π (width now / width given)

    over the channel groups that can change their width (`channels.channel_groups`), rounded to multiples of `round_to`
    channels, never above a limit. params, macs: numbers or percentages of the factory's network ("50%"); budget: its
    bytes hold for the network as float32 in a safetensors file. All that are given hold at once.

    method: "programme", the geometric programme or its closed form, with a bound; "synflow", widths nearest to the
    layer densities that SynFlow leaves of the network at its full width; "uniform", the same part of every group.
    widest: the largest ratio of a width to the given one; above 1 it is PreConfig, and groups may become wider.

    Every module is initialised anew by its own `reset_parameters` at its new size, from the seed, whatever weights the
    factory's network has; what a constructor does beyond that is not repeated: give it as `initialise(model)`, which
    runs last. Factories that draw from other generators than torch's are not seeded. A task stands for its model() and
    its example_input(). Raises InfeasibleError where the smallest widths do not fit, BudgetError for a budget that is
    none, LayerError where no width can change. Source: PreCrop, arXiv 2203.02549 (widths from layer densities; SynExp's
    programme and PreConfig in its later version, after its abstract and reviews: how the paper turns densities into
    widths could not be read, and is ours).
    """
    if method not in METHODS:
        raise BudgetError(f"method is {method!r}; it is one of {', '.join(METHODS)}")
    if round_to < 1 or not widest >= 1.0:
        raise BudgetError(f"round_to is {round_to} and widest {widest:g}; both must be at least 1")
    if method == "synflow" and widest > 1.0:
        raise BudgetError(f"SynFlow only prunes: widest is {widest:g} and needs method='programme' or 'uniform'")
    build, example = _factory(model_factory, example, seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build()
        _initialise(model, initialise)
    structure = Structure.of(model, example)
    wanted = None if budget is None else Budget.of(budget)
    limits = structure.limits(wanted, params, macs)
    problem = structure.problem(limits, round_to, widest)
    found = structure.choose(problem, method, model, example)
    if found.status is Status.INFEASIBLE:
        raise InfeasibleError(
            f"no widths are within the budget: {found.message} (rounded to {round_to}; groups that keep "
            f"their width: {len(structure.kept)}). Raise the limit" + (", or lower round_to" if round_to > 1 else ""),
            int(structure.cost("bytes", found.widths)),
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        reshape_to(model, structure.shapes(found.widths))
        copied = _initialise(model, initialise)
    return structure.result(model.train(), example, found, limits, round_to, copied)


def _factory(given: Any, example: Batch | None, seed: int) -> tuple[Callable[[], nn.Module], Batch]:
    if isinstance(given, Task):
        if example is None:
            batch = given.calibration_batches(seed)[0] if given.example_input is None else given.example_input()
            example = chunk_batch(batch, 1)[0]
        return given.build_model, example
    if example is None:
        raise TaskError(
            "precrop runs the network once, to follow its channels and count its MACs: give example=, a batch"
        )
    return given, example


def _initialise(model: nn.Module, then: Callable[[nn.Module], Any] | None) -> tuple[str, ...]:
    """Run every module's own initialiser, the innermost first; the names of parameters that none of them owns."""
    copied = []
    for name, module in reversed(list(model.named_modules())):
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if callable(reset):
            reset()
        else:
            copied += [f"{name}.{key}" if name else key for key, p in module._parameters.items() if p is not None]
    if then is not None:
        then(model)
    return tuple(sorted(copied))


def count_params(model: nn.Module) -> int:
    """Values of all parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, example: Batch) -> int:
    """MACs of one sample, as profiles count them (`costs.macs`)."""
    positions, samples = positions_of(model, example), batch_samples(example)
    return sum(costs.macs(layer.size, positions[layer.name], samples) for layer in find_layers(model))


@dataclass(frozen=True)
class _Variable:
    """Units of one group that are alike, `count` of them: what a width is chosen for."""

    name: str
    count: int
    channels: int  # in one unit, of the group's first layer


@dataclass(frozen=True, eq=False)
class Structure:
    """What a network's sizes depend on: variables (see `Precropped.widths`), and each cost as Σ a n_i n_j.

    terms: {(i, j): (params, macs, bytes)}, i ≤ j, `len(variables)` for the constant 1. shares (layers, variables): how
    far the logarithm of a layer's density goes with that of a width (see `solvers.widths.fitted_logs`); keys: the
    layers' weights. forms: {(tensor, dimension): its size}. dense: what the network takes; samples: of the example.
    """

    variables: Sequence[_Variable]
    kept: Mapping[str, str]
    forms: Mapping[tuple[str, int], Form]
    terms: Mapping[tuple[int, int], np.ndarray]
    shares: np.ndarray
    keys: Sequence[str]
    dense: Mapping[str, int]
    parameters: int
    tensors: Mapping[str, tuple[int, ...]] = field(repr=False)
    floating: frozenset[str] = field(repr=False)

    @classmethod
    def of(cls, model: nn.Module, example: Batch) -> Structure:
        """Follow the channels of a model. Raises LayerError where none of its widths can change, saying why."""
        groups = channel_groups(model, example)
        if not groups.prunable:
            why = groups.reason or "; ".join(f"{g.name}: {g.reason}" for g in groups) or "it has no layers"
            raise LayerError(f"no width of {type(model).__name__} can change ({why})")
        variables, forms = _variables(groups)
        G = len(variables)
        tensors = {key: tuple(tensor.shape) for key, tensor in stored_tensors(model).items()}
        positions, samples = positions_of(model, example), batch_samples(example)
        per_sample = {x.key: -(-positions[x.name] // samples) for x in find_layers(model)}
        parameters = {name for name, _ in model.named_parameters()}
        floating = {key for key, tensor in stored_tensors(model).items() if tensor.is_floating_point()}
        terms: dict[tuple[int, int], np.ndarray] = {}
        for key, shape in tensors.items():
            weights = np.array([key in parameters, per_sample.get(key, 0), 4 * (key in floating)], np.int64)
            for pair, count in _numel(key, shape, forms, G).items():
                terms[pair] = terms.get(pair, 0) + count * weights
        dense = {
            "params": count_params(model),
            "macs": count_macs(model, example),
            "bytes": dense_file_bytes(model),
        }
        numbers = sum(math.prod(tensors[key]) for key in floating)
        # The header; it is not longer where sizes are smaller (where they are larger, see `problem`).
        terms[G, G] = terms.get((G, G), 0) + np.array([0, 0, dense["bytes"] - 4 * numbers], np.int64)
        keys = [key for key, uses in per_sample.items() if uses]
        shares = np.zeros((len(keys), G))
        for row, key in zip(shares, keys, strict=True):
            for (name, _), form in forms.items():
                if name == key:
                    size = sum(n * (1 if v == G else variables[v].count) for v, n in form.items())
                    for v, n in form.items():
                        if v != G:
                            row[v] += n * variables[v].count / size
        kept = {group.name: group.reason for group in groups if not group.prunable}
        return cls(variables, kept, forms, terms, shares, keys, dense, numbers, tensors, frozenset(floating))

    def limits(self, budget: Budget | None, params: float | str | None, macs: float | str | None) -> dict[str, float]:
        """The limits as numbers, of those resources that have one. Raises BudgetError."""
        found: dict[str, list[float]] = {name: [] for name in RESOURCES}
        if budget is not None:
            if budget.bops is not None or budget.latency_ms is not None:
                raise BudgetError(
                    f"budget {budget}: precrop limits bytes, params and macs; bops and latency_ms it cannot"
                )
            if (size := budget.bytes(self.dense["bytes"], self.parameters)) is not None:
                found["bytes"].append(size)
            if budget.macs is not None:
                found["macs"].append(amount("macs", budget.macs, self.dense["macs"]))
        for name, value in (("params", params), ("macs", macs)):
            if value is not None:
                found[name].append(amount(name, value, self.dense[name]))
        if not any(found.values()):
            raise BudgetError(
                'no limit is given; give one, for example params="50%", macs=20_000_000, or a budget "2x"'
            )
        return {name: min(values) for name, values in found.items() if values}

    def cost(self, name: str, widths: np.ndarray) -> int:
        """What these widths (variables,) take of a resource."""
        one = [*map(int, widths), 1]
        return sum(int(c[RESOURCES.index(name)]) * one[i] * one[j] for (i, j), c in self.terms.items())

    def problem(self, limits: Mapping[str, float], round_to: int = 1, widest: float = 1.0) -> WidthProblem:
        """The programme. A width may be the given one, or a multiple of `round_to` channels up to `widest` times it;
        one that no layer has keeps its own.
        """
        degree = self.shares.sum(axis=0)
        allowed = []
        for v, variable in enumerate(self.variables):
            step = round_to // math.gcd(round_to, variable.channels)
            most = math.floor(variable.count * widest + 1e-9)
            widths = {variable.count, *range(step, most + 1, step)} if degree[v] > 0.0 else {variable.count}
            allowed.append(np.array(sorted(widths)))
        rows = [RESOURCES.index(name) for name in limits]
        pairs, costs = list(self.terms), np.stack(list(self.terms.values()), axis=1)
        largest = np.array([widths[-1] for widths in allowed])
        extra = max(0, self._header(largest) - self._header(np.array([v.count for v in self.variables])))
        costs[RESOURCES.index("bytes"), pairs.index((len(self.variables),) * 2)] += extra
        return WidthProblem(
            degree,
            np.array([variable.count for variable in self.variables]),
            allowed,
            costs[rows],
            np.array(pairs),
            np.array(list(limits.values())),
            tuple(limits),
            tuple(variable.name for variable in self.variables),
        )

    def _header(self, widths: np.ndarray) -> int:
        """Bytes of the file's header at these widths; none of smaller ones has more."""
        shapes = {key: shape for key, shape in {**self.tensors, **self.shapes(widths)}.items() if key in self.floating}
        return float32_file_bytes(shapes) - 4 * sum(map(math.prod, shapes.values()))

    def choose(self, problem: WidthProblem, method: str, model: nn.Module, example: Batch) -> WidthSolution:
        """Widths by a method (see `precrop`); the model, at its full width, is what SynFlow looks at."""
        if method == "programme" or not problem.fits(problem.low):
            return solve_widths(problem)
        if method == "uniform":
            most = float((problem.high / problem.given).max())
            return largest_widths(problem, lambda t: np.full(problem.groups, most * t), method)
        if problem.fits(problem.given):
            return largest_widths(problem, lambda t: np.ones(problem.groups), method)
        least = float((problem.limit / problem.cost(problem.given)).min())
        # A quarter of what is asked for, so that the answer lies within: densities of weights are not those of MACs.
        rounds = synflow_densities(model, example, self.keys, max(least / 4.0, 1e-4))
        sizes = np.array([math.prod(self.tensors[key]) for key in self.keys])
        logs = np.log([np.maximum([r[key] for key in self.keys], 1.0 / sizes) for r in reversed(rounds)])

        def ratios(t: float) -> np.ndarray:
            at = t * ROUNDS
            i = min(int(at), ROUNDS - 1)
            between = logs[i] + (at - i) * (logs[i + 1] - logs[i])
            return np.exp(fitted_logs(problem, self.shares, np.exp(between)))

        return largest_widths(problem, ratios, method)

    def shapes(self, widths: np.ndarray) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that change with these widths."""
        one = [*map(int, widths), 1]
        found: dict[str, list[int]] = {}
        for (key, dim), form in self.forms.items():
            found.setdefault(key, list(self.tensors[key]))[dim] = sum(n * one[v] for v, n in form.items())
        return {key: tuple(shape) for key, shape in found.items() if tuple(shape) != self.tensors[key]}

    def result(
        self,
        model: nn.Module,
        example: Batch,
        found: WidthSolution,
        limits: Mapping[str, float],
        round_to: int,
        copied: tuple[str, ...],
    ) -> Precropped:
        """The account of a network that was built. Raises LayerError if it takes more than its widths should."""
        got = {"params": count_params(model), "macs": count_macs(model, example), "bytes": dense_file_bytes(model)}
        for name, limit in limits.items():
            if got[name] > limit:
                raise LayerError(
                    f"the network has {got[name]} {name}, its widths should have had {self.cost(name, found.widths)} "
                    f"and the limit is {limit:.12g}; give a model whose sizes all come from its layers"
                )
        widths = {
            v.name: (v.count * v.channels, int(n) * v.channels)
            for v, n in zip(self.variables, found.widths, strict=True)
        }
        value, bound = found.value, found.bound
        if (self.shares % 1.0 != 0.0).any():
            now = {**self.tensors, **self.shapes(found.widths)}
            value = math.fsum(math.log(math.prod(now[k]) / math.prod(self.tensors[k])) for k in self.keys)
            bound = -math.inf
        step = "whole channels" if round_to == 1 else f"multiples of {round_to} channels"
        rounded = f"down to {step}, then up and exchanged while that fits and gains"
        if found.method in METHODS:
            rounded = f"to the nearest {step} at the largest ratio found that fits"
        return Precropped(
            model,
            widths,
            self.kept,
            got["params"],
            got["macs"],
            got["bytes"],
            self.dense,
            dict(limits),
            value,
            found.relaxed_value,
            bound,
            found.method,
            rounded,
            copied,
        )


def _variables(groups: Groups) -> tuple[list[_Variable], dict[tuple[str, int], dict[int, int]]]:
    """Runs of alike units of every group that can change, and the sizes that depend on them."""
    variables: list[_Variable] = []
    forms: dict[tuple[str, int], dict[int, int]] = {}
    total = sum(len(_alike(group)) for group in groups.prunable)
    for group in groups.prunable:
        alike = _alike(group)
        for i, (make, units) in enumerate(alike.items()):
            name = group.name if len(alike) == 1 else f"{group.name}#{i}"
            for axis, count in zip(group.axes, make, strict=True):
                form = forms.setdefault((axis.key, axis.dim), {total: axis.units.count(-1)})
                form[len(variables)] = count
            variables.append(_Variable(name, len(units), group.unit))
    clean = {place: {v: n for v, n in form.items() if n} for place, form in forms.items()}
    return variables, clean


def _alike(group: ChannelGroup) -> dict[tuple[int, ...], list[int]]:
    """Units by how many positions of each axis they have."""
    counts = [np.bincount([u for u in axis.units if u >= 0], minlength=group.size) for axis in group.axes]
    found: dict[tuple[int, ...], list[int]] = {}
    for unit, make in enumerate(zip(*(c.tolist() for c in counts), strict=True)):
        found.setdefault(make, []).append(unit)
    return found


def _numel(key: str, shape: tuple[int, ...], forms: Mapping[tuple[str, int], Form], G: int) -> dict[Any, int]:
    """The number of values of a tensor as {(i, j): coefficient of n_i n_j}."""
    changing = [forms[key, dim] for dim in range(len(shape)) if (key, dim) in forms]
    rest = math.prod(size for dim, size in enumerate(shape) if (key, dim) not in forms)
    if len(changing) > 2:
        raise LayerError(f"{key!r} has {len(changing)} dimensions that change with widths; at most two are understood")
    first, second = [*changing, {G: 1}, {G: 1}][:2]
    found: dict[tuple[int, int], int] = {}
    for i, a in first.items():
        for j, b in second.items():
            pair = (min(i, j), max(i, j))
            found[pair] = found.get(pair, 0) + rest * a * b
    return found
