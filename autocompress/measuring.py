"""Context: the model and the data that a plan is measured on, for strategies that run the model and for the never-worse
rule.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from autocompress.applying import (
    CORRECTION_SAMPLES,
    Made,
    correction_batch,
    made,
    realised_layers,
    set_weight,
    with_weights,
)
from autocompress.batches import (
    Batch,
    batch_digest,
    batch_samples,
    chunk_batch,
    evaluating,
    feed,
    join_batches,
    materialise,
    sample_digests,
    samples_within,
    split_batches,
)
from autocompress.compressors import realise_each
from autocompress.correcting import Moments, dense_moments
from autocompress.coupling import is_coupled
from autocompress.errors import CalibrationError, MismatchError
from autocompress.layers import model_digest, weight_of
from autocompress.offloading import is_streamed
from autocompress.profiling import Profile
from autocompress.storage import Entry
from autocompress.threads import default_workers, single_threaded
from autocompress.types import Option, Plan

__all__ = ["EVALUATIONS", "LEVELS", "Context", "Trial", "class_axis", "divergence", "logits", "merit"]

CACHE_BYTES = 1 << 30
OUTPUT_BYTES = 1 << 29  # of the dense model's outputs, kept because every plan is compared with them
SCORES_AT_ONCE = 1 << 24  # in double precision: a language model has tens of thousands at every position
SENSITIVITY_VERSION = 3
# Samples per forward pass when outputs are compared: small enough for activations to stay near the cores, and a bound
# on the memory.
PASS_SAMPLES = 64
PASS_TOKENS = 2048  # of which a language model puts out tens of thousands of scores each
LEVELS = (0.01, 0.05, 0.2)
SAMPLE = 256  # samples of `fit` that layers are measured on alone, and that a search may look at as often as it likes
# Statistics are corrected on so many samples where a search scores a choice: correction on `CORRECTION_SAMPLES` would
# be most of the time.
SCORE_SAMPLES = 128
# A confident model's KL is decided by a handful of samples. Where plans are compared for a choice its outputs are
# therefore softened, until the mean of their largest probability is at most this.
SOFT = 0.95
TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
# What an effort grants a search: how often it may run the model.
EVALUATIONS = {"fast": 40, "normal": 120, "max": 1000}


@dataclass(frozen=True)
class Trial:
    """A plan that was measured: what it was tried as, its options, its KL on the held-out slice and, where known, on
    all of the data. plan: the plan itself, of a strategy that would hand it out if its first choice may not be.
    """

    label: str
    layers: Mapping[str, Option]
    kl: float
    kl_all: float | None = None
    plan: Plan | None = None


class Context:
    """A model and calibration batches, split as `calibrate` splits them: `fit` for corrections, `held` to measure plans
    on.

    The Hessians never saw `held`. `loss(model, batch)` is the task's own and `training` its labelled batches, for
    methods that need gradients of it; they do without where there is none. embedding(output, batch): what of the
    model's output plans are judged by, and by squared distance, where it is not scores of classes. effort grants
    searches their evaluations (`granted`); the seed draws the split and whatever a search draws. `log` and `alone` keep
    what was measured for the report: plans, and layers by themselves. Measured weights are kept in memory (up to
    1 GiB), as plans share most of their layers. Raises CalibrationError for an effort that is none.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        loss: Callable[[nn.Module, Batch], Any] | None = None,
        seed: int = 0,
        effort: str = "normal",
        training: Iterable[Batch] | None = None,
        embedding: Callable[[Any, Batch], torch.Tensor] | None = None,
    ) -> None:
        if effort not in EVALUATIONS:
            raise CalibrationError(f"effort is {effort!r}; it is one of {', '.join(EVALUATIONS)}")
        self.model = model
        self.loss = loss
        self.seed = seed
        self.effort = effort
        self.training = training
        self.embedding = embedding
        self.kept: dict[str, dict[str, Any]] = {}  # what strategies found out about a profile, by a digest of its key
        self._rest: Iterator[Batch] = iter(training or ())
        self._labelled: list[Batch] = []
        self.fit, self.held = split_batches(materialise(batches), seed=seed)
        self.evaluations = 0
        self.log: list[Trial] = []
        self.alone: dict[str, list[tuple[float, float]]] = {}
        self._pieces = {
            part: [piece for batch in batches for piece in chunk_batch(batch, PASS_SAMPLES)]
            for part, batches in (("fit", self.fit), ("held", self.held), ("all", [*self.fit, *self.held]))
        }
        self._pieces["sample"] = chunk_batch(
            join_batches(self.fit, SAMPLE), samples_within(self.fit[0], PASS_SAMPLES, PASS_TOKENS)
        )
        self._corrections = {n: correction_batch(self.fit, n) for n in (CORRECTION_SAMPLES, SCORE_SAMPLES)}
        self._digest = model_digest(model)
        self._outputs: dict[tuple[str, int], torch.Tensor] = {}
        self._moments: dict[tuple[str, int], Moments] = {}
        self._weights: dict[tuple[str, str, str], Made] = {}
        self._checked: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Without what can be measured again."""
        return {**self.__dict__, "_outputs": {}, "_moments": {}, "_weights": {}}

    @property
    def held_samples(self) -> int:
        return sum(batch_samples(b) for b in self.held)

    def pieces(self, part: str = "held") -> list[Batch]:
        """The held-out slice, `fit`, `all` or `sample` (of `fit`), in passes of at most `PASS_SAMPLES` samples."""
        return self._pieces[part]

    def seeded(self, seed: int) -> Context:
        """This context with another seed for what searches draw, and evaluations counted from 0; the same split of the
        data. Weights and outputs are shared. What strategies found out (`kept`) is not: that comes from a store, which
        can say what it took.
        """
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, seed=seed, evaluations=0, kept={})
        return other

    @functools.cached_property
    def data_digest(self) -> str:
        """SHA-256 of the batches, of how they are split, and of what outputs on them are judged by."""
        digests = [[batch_digest(batch) for batch in part] for part in (self.fit, self.held)]
        return hashlib.sha256(json.dumps([*digests, *self.judged_by]).encode()).hexdigest()

    def check(self, profile: Profile) -> None:
        """Raise MismatchError unless the profile is of this model and its Hessians never saw the held-out slice."""
        if profile.fingerprint in self._checked:
            return
        if profile.fields["model"] != self._digest:
            raise MismatchError("field 'model': the context holds another model than the one that was profiled")
        # By sample, so that other batches of the same data are refused too. What the data holds twice cannot be kept
        # apart.
        own = {digest for b in self.fit for digest in sample_digests(b)}
        held = {digest for b in self.held for digest in sample_digests(b)}
        if (held - own) & set(profile.statistics.seen):
            raise MismatchError(
                "field 'data': the Hessians saw the slice that plans are measured on; calibrate with the context's seed"
            )
        self._checked.add(profile.fingerprint)

    @property
    def judged_by(self) -> list[str]:
        """The name of the task's `embedding`, if it has one."""
        how = self.embedding
        return [] if how is None else [f"{how.__module__}.{getattr(how, '__qualname__', type(how).__name__)}"]

    @property
    def granted(self) -> int:
        """How often a search may run the model, by the effort."""
        return EVALUATIONS[self.effort]

    def labelled(self, samples: int) -> list[Batch]:
        """The first labelled batches that hold so many samples together; none where there is no loss of them."""
        while self.loss is not None and sum(map(batch_samples, self._labelled)) < samples:
            if (batch := next(self._rest, None)) is None:
                break
            self._labelled.append(batch)
        counts = np.cumsum([0, *map(batch_samples, self._labelled)])
        return [b for b, before in zip(self._labelled, counts[:-1], strict=True) if before < samples]

    def loss_key(self, labelled: list[Batch]) -> list[str]:
        """What tells one loss from another in the keys of what is kept: the value of the task's on the dense model, or
        the name of what outputs are judged by.
        """
        if not labelled or self.loss is None:
            return self.judged_by
        with torch.no_grad(), evaluating(self.model):
            return [float(self.loss(self.model, labelled[0])).hex()]

    def build(self, profile: Profile, layers: Mapping[str, Option], correction: int = CORRECTION_SAMPLES) -> nn.Module:
        """The compressed model of a plan: exactly the weights that `apply` with these batches would give."""
        self.check(profile)
        keys = {name: (profile.fingerprint, name, str(option)) for name, option in layers.items()}
        weights = {name: self._weights[key] for name, key in keys.items() if key in self._weights}
        todo = {name: option for name, option in layers.items() if name not in weights}
        for name, found in realised_layers(self.model, profile, todo).items():
            weights[name] = made(found)
            if is_streamed(self.model):
                continue  # what all of them take is what memory lacks
            if sum(map(_held, self._weights.values())) > CACHE_BYTES:
                self._weights.clear()
            self._weights[keys[name]] = weights[name]
        weights = {name: weights[name] for name in layers}
        data, key = self._corrections[correction], (profile.fingerprint, correction)
        if key not in self._moments:
            owners = [owner for layer in profile.layers.values() for owner in layer.layer.owners]
            with evaluating(self.model):
                self._moments[key] = dense_moments(self.model, owners, data)
        return with_weights(self.model, profile, weights, data, self._moments[key], layers)

    def prepare(self, profile: Profile, options: Mapping[str, Sequence[Option]]) -> None:
        """Make the weights of several options of each layer, for a search that will want many of them.

        At once they cost little more than one of them, as they share a factorisation. Others make room for them;
        nothing is done where they would not all be kept even so, or the model is streamed.
        """
        self.check(profile)
        if is_streamed(self.model):
            return
        size = sum(4 * profile.layers[name].layer.size * len(wanted) for name, wanted in options.items())
        if size > CACHE_BYTES:
            return
        if size + sum(map(_held, self._weights.values())) > CACHE_BYTES:
            self._weights.clear()

        def every(name: str) -> dict[Option, Any]:
            todo = [o for o in options[name] if (profile.fingerprint, name, str(o)) not in self._weights]
            weight = weight_of(self.model, profile.layers[name].layer.key)
            return realise_each(profile.problem(name, weight), todo) if todo else {}

        with single_threaded(), ThreadPoolExecutor(default_workers()) as pool:
            for name, found in zip(options, pool.map(every, options), strict=True):
                for option, realised in found.items():
                    self._weights[(profile.fingerprint, name, str(option))] = made(realised)

    def measure(self, profile: Profile, layers: Mapping[str, Option], label: str = "") -> float:
        """Mean KL(dense ‖ compressed) per sample of a plan on the held-out slice; one with a label stands in `log`."""
        kl = self.divergence_of(self.build(profile, layers))
        if label:
            self.log.append(Trial(label, dict(layers), kl))
        return kl

    def score(self, profile: Profile, layers: Mapping[str, Option], part: str = "held") -> float:
        """What a search goes by: the `merit` of a plan on a part of the data, with statistics corrected on fewer
        samples.
        """
        return merit(*self.judge(self.build(profile, layers, SCORE_SAMPLES), part))

    def divergence_of(self, model: nn.Module, part: str = "held") -> float:
        """Mean divergence per sample of a model's outputs from the dense model's on a part of the data (see
        `pieces`).
        """
        return self._distances(model, part, (1.0,))[0]

    def judge(self, model: nn.Module, part: str = "held") -> tuple[float, float]:
        """`divergence_of`, and the same of outputs divided by `temperature`, from one pass."""
        plain, *soft = self._distances(model, part, tuple(dict.fromkeys((1.0, self.temperature))))
        return plain, soft[0] if soft else plain

    def _distances(self, model: nn.Module, part: str, temperatures: Sequence[float]) -> list[float]:
        """The mean divergence per sample at each temperature. One piece of data after the other, as the outputs of a
        language model for all of them may not fit into memory.
        """
        self.evaluations += 1
        found: list[list[float]] = [[] for _ in temperatures]
        sizes = [batch_samples(piece) for piece in self._pieces[part]]
        with torch.no_grad(), evaluating(model):
            for piece, size, dense in zip(self._pieces[part], sizes, self._dense(part), strict=True):
                output = self.output(model, piece)
                for terms, temperature in zip(found, temperatures, strict=True):
                    terms.append(divergence(dense, output, temperature, self.embedding is None) * size)
        return [sum(terms) / sum(sizes) for terms in found]

    def output(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """What a model puts out for a batch, as plans are judged by it."""
        found = feed(model, batch)
        return logits(found) if self.embedding is None else self.embedding(found, batch)

    def class_axis(self, output: torch.Tensor) -> int | None:
        """The dimension of the classes of such an output (see `class_axis`); None for an embedding."""
        return class_axis(output) if self.embedding is None else None

    def mean_divergence(
        self,
        reference: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
        pieces: Sequence[Batch],
        temperature: float = 1.0,
    ) -> float:
        """`divergence` per sample of outputs for these pieces of data, from the dense model's."""
        sizes = [batch_samples(piece) for piece in pieces]
        scores = self.embedding is None
        found = [divergence(a, b, temperature, scores) for a, b in zip(reference, outputs, strict=True)]
        return sum(d * n for d, n in zip(found, sizes, strict=True)) / sum(sizes)

    @functools.cached_property
    def temperature(self) -> float:
        """What outputs are divided by where plans are compared: the least of `TEMPERATURES` at which the dense model's
        largest probability is at most `SOFT` on average.
        """
        for temperature in TEMPERATURES[:-1]:
            tops = [
                float((output.double() / temperature).softmax(axis).amax(axis).mean())
                for output in self._dense("held")
                if (axis := self.class_axis(output)) is not None
            ]
            if sum(tops) <= SOFT * len(tops):
                return temperature
        return TEMPERATURES[-1]

    def _dense(self, part: str) -> Iterator[torch.Tensor]:
        """The dense model's outputs for the pieces of a part, kept as far as `OUTPUT_BYTES` go, else computed again."""
        if not self._pieces[part]:
            raise CalibrationError("there is no held-out slice: calibration has a single sample; give at least two")
        for i, piece in enumerate(self._pieces[part]):
            output = self._outputs.get((part, i))
            if output is None:
                with torch.no_grad(), evaluating(self.model):
                    output = self.output(self.model, piece)
                if output.nbytes + sum(kept.nbytes for kept in self._outputs.values()) <= OUTPUT_BYTES:
                    self._outputs[(part, i)] = output
            yield output

    def sensitivities(
        self, profile: Profile, levels: tuple[float, ...] = LEVELS, soft: bool = False
    ) -> dict[str, list[tuple[float, float]]]:
        """(error, measured rise of the divergence) of each layer compressed alone, at options near these relative
        errors; soft: of outputs divided by `temperature`.

        Measured on at most `SAMPLE` samples of the part that the Hessians saw; kept in the profile's store, where there
        is one.
        """
        self.check(profile)
        if is_coupled(profile):
            profile = profile.whole()
        batch = join_batches(self.fit, SAMPLE)
        facts = [SENSITIVITY_VERSION, profile.key, batch_digest(batch), levels, self.temperature]
        key = json.dumps([*facts, *self.judged_by])
        name = f"extra/sensitivity-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
        found: dict[str, list[list[float]]] | None = None
        if profile.store is not None:
            found = profile.store.read_json(name)
        if found is None:
            found = self._sensitivities(profile, levels)
            if profile.store is not None:
                with profile.store.writing():
                    profile.store.write_json(name, found)
        self.alone = {layer: [(error, plain) for error, plain, _ in points] for layer, points in found.items()}
        if not soft:
            return self.alone
        return {layer: [(error, softened) for error, _, softened in points] for layer, points in found.items()}

    def _sensitivities(self, profile: Profile, levels: tuple[float, ...]) -> dict[str, list[list[float]]]:
        """[error, rise, rise of softened outputs] of each layer alone, at each of its levels."""
        chosen = {n: [o for o, _ in _near(layer, levels)] for n, layer in profile.layers.items()}
        found: dict[str, list[list[float]]] = {n: [] for n in profile.layers}
        for level in range(len(levels)):
            alone = {n: options[level] for n, options in chosen.items() if level < len(options)}
            for layer_name, realised in realised_layers(self.model, profile, alone).items():
                layer = profile.layers[layer_name].layer
                weight: Made = realised if isinstance(realised, list) else realised.weight()
                if not isinstance(realised, list) and realised.cut is not None:
                    # Alone, it reads zeros and makes what it made.
                    weight = profile.problem(layer_name, self.model.get_parameter(layer.key)).whole(realised)
                small = with_weights(self.model, profile, {}, None)
                with torch.no_grad():
                    set_weight(small, layer, weight)
                error = profile.layers[layer_name].row(alone[layer_name]).error
                found[layer_name].append([error, *(max(rise, 0.0) for rise in self.judge(small, "sample"))])
        return found


def _held(weight: Made) -> int:
    if isinstance(weight, np.ndarray):
        return weight.nbytes
    return sum(part.bytes if isinstance(part, Entry) else part.nbytes for part in weight)


def _near(layer: Any, levels: tuple[float, ...]) -> list[tuple[Option, float]]:
    """The cheapest options whose relative errors lie nearest to the levels (in ratio)."""
    if not layer.reached or layer.energy <= 0.0:
        return []
    rows = [row for row in layer.rows if row.error > 0.0]
    chosen = {}
    for level in levels:
        if rows:
            row = min(
                rows, key=lambda r: (round(abs(np.log(r.error / layer.energy / level)), 1), r.bytes, str(r.option))
            )
            chosen[row.option] = row.error
    return list(chosen.items())


def merit(plain: float, soft: float) -> float:
    """√(KL · softened KL) of a plan, the less the better: what plans are compared by where one is chosen.

    The KL of a confident model is decided by a handful of samples; that of its softened outputs by all of them, but it
    cares for the order of the wrong classes as much as for the right one.
    """
    return math.sqrt(max(plain, 0.0) * max(soft, 0.0))


def logits(output: Any) -> torch.Tensor:
    """The tensor that a model's output is judged by: itself, its `logits`, or the first tensor in it."""
    if isinstance(output, torch.Tensor):
        return output
    logits = getattr(output, "logits", None)
    if isinstance(logits, torch.Tensor):
        return logits
    items = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    for item in items:
        if isinstance(item, torch.Tensor):
            return item
    raise CalibrationError(
        f"the model puts out a {type(output).__name__}; needed a tensor, or something with one in it"
    )


def class_axis(output: torch.Tensor) -> int | None:
    """The dimension of the classes: the last one of (N, C) and (N, T, C), 1 of images (N, C, H, W); None for a single
    class.
    """
    axis = 1 if output.ndim >= 4 else -1
    return None if output.ndim < 2 or output.shape[axis] == 1 else axis


def divergence(reference: torch.Tensor, output: torch.Tensor, temperature: float = 1.0, classes: bool = True) -> float:
    """How far outputs are from the dense model's, per sample: mean KL(dense ‖ compressed) of the softmax over classes.

    Classes are the last dimension of (N, C) and (N, T, C), dimension 1 of images (N, C, H, W). With a single class,
    or where there are no classes, a softmax says nothing: it is the mean squared difference over the mean square of the
    dense output. Outputs are divided by the temperature before the softmax. Infinite where the output is not finite.
    """
    if not bool(torch.isfinite(output).all()):
        return float("inf")
    axis = class_axis(reference) if classes else None
    if axis is None:
        scale = float(reference.double().square().mean()) or 1.0
        return float((reference.double() - output.double()).square().mean()) / scale
    if reference.numel() > SCORES_AT_ONCE and axis == -1:
        rows = max(1, SCORES_AT_ONCE // reference.shape[-1])
        pairs = zip(*(t.reshape(-1, t.shape[-1]).split(rows) for t in (reference, output)), strict=True)
        return sum(_kl(a, b, axis, temperature) * len(a) for a, b in pairs) / (reference.numel() // reference.shape[-1])
    return _kl(reference, output, axis, temperature)


def _kl(reference: torch.Tensor, output: torch.Tensor, axis: int, temperature: float) -> float:
    log_p, log_q = (F.log_softmax(t.double() / temperature, axis) for t in (reference, output))
    return float((log_p.exp() * (log_p - log_q)).sum(axis).mean())
