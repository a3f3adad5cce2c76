"""Calibration: forward hooks that stream Hessians. The only place where Hessians are accumulated."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import weakref
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from autocompress.batches import (
    Batch,
    batch_digest,
    batch_samples,
    evaluating,
    feed,
    materialise,
    sample_digests,
    split_batches,
)
from autocompress.errors import CalibrationError, MismatchError
from autocompress.files import atomic_path
from autocompress.grams import input_products
from autocompress.inputs import attention_inputs, cell_inputs, lookups, recurrent_inputs, slow_attention
from autocompress.layers import TABLES, TRANSPOSED, Layer, find_layers, model_digest
from autocompress.threads import single_threaded

__all__ = [
    "CALIBRATION_VERSION",
    "Collector",
    "LayerStatistics",
    "Statistics",
    "calibrate",
    "fit_part",
    "positions_of",
]

CALIBRATION_VERSION = 5
FLOOR = 0.5  # uses that every row of a table has beside those that calibration saw (Krichevsky and Trofimov's add-half)


@dataclass(frozen=True)
class LayerStatistics:
    """What calibration saw of one layer.

    hessian: 2 X Xᵀ / N + damping · mean(diag) · I, float64 (groups, d, d), N samples (batch entries, not positions);
    (0, d, d) for a table of rows that are only looked up. row_weights: for such a table, 2 (uses + 1/2) / N per row,
    float64 (rows,), else None; the error of a layer is ½ tr(ΔW H ΔWᵀ) + ½ Σ_r row_weights[r] |ΔW_r|², where a table
    that is an output head too has both terms. mean, var: moments of each output channel over samples and positions,
    float64 (out,); empty for tables and for weights inside attention and recurrence. dead: inputs that were always
    zero, rows that were never looked up. positions: how often each weight was multiplied, in all samples together (see
    `costs.macs`); 0 for a table that is only looked up.
    """

    hessian: np.ndarray
    calls: int
    mean: np.ndarray
    var: np.ndarray
    dead: int
    positions: int
    row_weights: np.ndarray | None = None


@dataclass(frozen=True)
class Statistics:
    """Per-layer statistics of one model on one set of data; `fields` is everything that they depend on, `fingerprint`
    its digest, `seen` a digest of every sample that went into them.
    """

    layers: Mapping[str, LayerStatistics]
    samples: int
    damping: float
    unreached: tuple[str, ...]
    fields: Mapping[str, str]
    seen: tuple[str, ...] = field(default=())

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(dict(sorted(self.fields.items()))).encode()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write one npz file (no pickle), atomically; layers with the same input share one Hessian in it."""
        with atomic_path(path) as scratch, scratch.open("wb") as file:
            write_npz(file, self._arrays())

    def _arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """What the file holds, one layer after the other: those that are kept on disk are never in memory together."""
        names: dict[str, Any] = {}
        stored: dict[Any, str] = {}
        held = isinstance(self.layers, dict)
        for i, (name, s) in enumerate(self.layers.items()):
            key = id(s.hessian) if held else _digest(s.hessian)  # one that was read from disk is gone after its turn
            if (at := stored.setdefault(key, f"h{i}")) == f"h{i}":
                yield at, s.hessian
            yield f"m{i}", s.mean
            yield f"v{i}", s.var
            if s.row_weights is not None:
                yield f"r{i}", s.row_weights
            names[name] = [at, f"m{i}", f"v{i}", s.calls, s.dead, s.positions, f"r{i}"]
        meta = {
            "layers": names,
            "samples": self.samples,
            "damping": self.damping,
            "unreached": self.unreached,
            "fields": dict(self.fields),
            "seen": self.seen,
        }
        yield "meta", np.frombuffer(json.dumps(meta).encode(), np.uint8)

    @classmethod
    def load(cls, path: str | Path, held: bool = True) -> Statistics:
        """Inverse of `save`; held: whether all is read now, or each layer when it is asked for, from the file as it is
        then. Raises MismatchError if the file is not one of statistics.
        """
        try:
            layers: Mapping[str, LayerStatistics]
            with np.load(path, allow_pickle=False) as data:
                meta = json.loads(bytes(data["meta"]))
                if held:
                    cache = {key: data[key] for key in data.files}
                    layers = {name: _layer_statistics(entry, cache) for name, entry in meta["layers"].items()}
                else:
                    layers = KeptStatistics(Path(path), meta["layers"])
            return cls(
                layers, meta["samples"], meta["damping"], tuple(meta["unreached"]), meta["fields"], tuple(meta["seen"])
            )
        except (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise MismatchError(f"{path} does not hold statistics: {error}") from error


def write_npz(file: Any, arrays: Iterable[tuple[str, np.ndarray]]) -> None:
    """What `np.savez` writes, byte for byte, with one array in memory at a time."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, array in arrays:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)


def _layer_statistics(entry: Sequence[Any], arrays: Mapping[str, np.ndarray]) -> LayerStatistics:
    h, m, v, calls, dead, positions, r = entry
    return LayerStatistics(arrays[h], calls, arrays[m], arrays[v], dead, positions, arrays[r] if r in arrays else None)


class KeptStatistics(Mapping[str, LayerStatistics]):
    """The layers of a file that `Statistics.save` wrote, each read when it is asked for."""

    def __init__(self, path: Path, entries: Mapping[str, Sequence[Any]]) -> None:
        self.path, self.entries = path, entries

    def __getitem__(self, name: str) -> LayerStatistics:
        entry = self.entries[name]
        with np.load(self.path, allow_pickle=False) as data:  # opened anew: threads of engines read at the same time
            return _layer_statistics(entry, data)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    seed: int = 0,
    damping: float = 1e-2,
    holdout: float | None = None,
) -> Statistics:
    """Run the model over the batches and accumulate every layer's Hessian.

    H = 2 X Xᵀ / N + damping · mean(diag) · I: float32 products of chunks, summed in float64; X holds each layer's
    inputs, a convolution's unfolded over its kernel, a transposed convolution's between its stuffed zeros. Rows of an
    embedding weigh 2 (n + 1/2) / N, n how often each was looked up, so that words that calibration lacks survive; a
    table that is the output head too has both terms. `holdout` (default 0.2; 0 for none) of the data, chosen by `seed`,
    is left out: it is what `Context` measures plans on. A layer called several times sums its calls; an input shared by
    several layers is multiplied once. Raises CalibrationError for no data, batches that do not fit, or values that are
    not finite (naming the layer). Source: OBC, arXiv 2208.11580, section 3.
    """
    layers = find_layers(model)
    fit, fields = fit_part(model, batches, seed, damping, holdout)
    collector = Collector(model, list(layers))
    with evaluating(model), torch.no_grad(), slow_attention(), collector, single_threaded():
        for batch in fit:
            feed(model, batch)
            collector.end_batch()
    return collector.finish(fit, damping, fields)


def fit_part(
    model: nn.Module, batches: Iterable[Batch], seed: int, damping: float, holdout: float | None
) -> tuple[list[Batch], dict[str, str]]:
    """What of the data the Hessians see, and the fields that statistics of it have: all that they depend on."""
    data = materialise(batches)
    fit = (
        split_batches(data, seed=seed)[0]
        if holdout is None
        else split_batches(data, holdout, seed)[0]
        if holdout
        else list(data)
    )
    fields = {
        "model": model_digest(model),
        "data": hashlib.sha256("".join(batch_digest(b) for b in fit).encode()).hexdigest(),
        "damping": repr(damping),
        "calibration_version": str(CALIBRATION_VERSION),
    }
    return fit, fields


def positions_of(model: nn.Module, batch: Batch) -> dict[str, int]:
    """How often one pass of a batch multiplies each weight of every layer, over all of its samples (see `costs.macs`);
    0 for a layer that it does not reach and for a table that is only looked up. Raises CalibrationError as `calibrate`.
    """
    collector = Collector(model, list(find_layers(model)), counting=True)
    with evaluating(model), torch.no_grad(), slow_attention(), collector:
        feed(model, batch)
    return {name: accumulator.multiplied for name, accumulator in collector.accumulators.items()}


def _share_equal(found: dict[str, LayerStatistics]) -> None:
    """Let layers whose Hessians are bit for bit equal (the same input) hold one array."""
    known: dict[bytes, np.ndarray] = {}
    for name, s in found.items():
        array = known.setdefault(_digest(s.hessian), s.hessian)
        if array is not s.hessian:
            found[name] = dataclasses.replace(s, hessian=array)


def _digest(array: np.ndarray) -> bytes:
    """SHA-256 of its bytes, of which no copy is made."""
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).digest()


class _Accumulator:
    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.gram: np.ndarray | None = None
        self.uses: np.ndarray | None = None
        self.calls = 0
        self.positions = 0  # outputs that the moments are of
        self.multiplied = 0
        self.sum = self.squares = np.zeros(0)
        self.leader: _Accumulator | None = None  # whose sum of products is this one's too
        self.fresh = True  # whether all products that were added are those of this batch
        self.batch: list[torch.Tensor] = []
        self.scaled: tuple[np.ndarray, int] | None = None

    def add_products(self, products: list[torch.Tensor]) -> None:
        """One X Xᵀ (1, d, d) per group, or one (groups, d, d) for all of them."""
        if self.gram is None:
            groups, _, d = self.layer.matrix_shape
            self.gram = np.zeros((groups, d, d))
        for i, product in enumerate(products):
            part = self.gram if len(products) == 1 else self.gram[i : i + 1]
            part += product.cpu().numpy()

    def add_uses(self, uses: torch.Tensor) -> None:
        self.uses = uses.numpy() if self.uses is None else self.uses + uses.numpy()

    def add_moments(self, flat: torch.Tensor) -> None:
        """Output values (positions, channels)."""
        count = flat.shape[0]
        var, mean = (t.double().cpu().numpy() for t in torch.var_mean(flat.float(), 0, correction=0))
        if not np.isfinite(var).all():
            raise CalibrationError(f"layer {self.layer.name!r} puts out values that are NaN or infinite")
        if not self.positions:
            self.sum, self.squares = np.zeros(flat.shape[1]), np.zeros(flat.shape[1])
        self.sum += mean * count
        self.squares += (var + mean**2) * count
        self.positions += count

    def hessian(self, samples: int, damping: float) -> tuple[np.ndarray, int]:
        """The sum of products as a Hessian, in its place, and the inputs that were always zero."""
        if self.leader is not None:
            return self.leader.hessian(samples, damping)
        if self.scaled is None:
            self.scaled = self._scale(samples, damping)
        return self.scaled

    def _scale(self, samples: int, damping: float) -> tuple[np.ndarray, int]:
        _, _, d = self.layer.matrix_shape
        hessian = np.zeros((0, d, d)) if self.gram is None else self.gram
        hessian *= 2.0 / samples
        dead = 0
        for h in hessian:
            diagonal = np.diag(h)
            dead += int((diagonal == 0.0).sum())
            level = float(diagonal.mean())
            # A layer whose inputs are all zero has no opinion: the identity makes its error the plain squared weight
            # error.
            h[np.diag_indices_from(h)] += damping * level if level > 0.0 else 1.0
        return hessian, dead

    def finish(self, samples: int, damping: float) -> LayerStatistics:
        hessian, dead = self.hessian(samples, damping)
        mean = self.sum / max(self.positions, 1)
        var = np.maximum(self.squares / max(self.positions, 1) - mean**2, 0.0)
        weights = None
        if self.uses is not None:
            dead += int((self.uses == 0.0).sum())
            weights = (self.uses + FLOOR) * (2.0 / samples)
        return LayerStatistics(hessian, self.calls, mean, var, dead, self.multiplied, weights)


Inputs = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], dict[str, list[torch.Tensor]]]


class Collector:
    """Forward hooks on every owner of every layer, for the time of a `with` block; counting: of positions alone.

    sharing: layers that read the same inputs from their first call on have one sum of products, and not one each that
    is found equal at the end; CalibrationError where they part later.
    """

    def __init__(self, model: nn.Module, layers: list[Layer], counting: bool = False, sharing: bool = False) -> None:
        self.model = model
        self.counting, self.sharing = counting, sharing
        self.accumulators = {layer.name: _Accumulator(layer) for layer in layers}
        self.layers = layers
        self.handles: list[Any] = []
        # Products of inputs that are still alive in this forward pass, so that several layers on one input cost one
        # product.
        self.products: dict[tuple[Any, ...], tuple[Any, torch.Tensor]] = {}

    def __enter__(self) -> Collector:
        wanted: dict[str, dict[str, _Accumulator]] = {}
        for layer in self.layers:
            for owner in layer.owners:
                wanted.setdefault(owner, {})[layer.parameter] = self.accumulators[layer.name]
        for name, module in self.model.named_modules():
            own = wanted.get(name, {})
            if isinstance(module, nn.MultiheadAttention):
                # Attention reads the weight of its output projection, and never calls it.
                inside = wanted.get(f"{name}.out_proj" if name else "out_proj", {})
                own |= {f"out_proj.{parameter}": accumulator for parameter, accumulator in inside.items()}
            if own:
                hook = self._hook_of(module, own)
                self.handles.append(module.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.products.clear()

    def end_batch(self) -> None:
        self.products.clear()
        for accumulator in self.accumulators.values():
            leader = accumulator.leader
            if leader is not None and list(map(id, leader.batch)) != list(map(id, accumulator.batch)):
                raise CalibrationError(
                    f"layers {leader.layer.name!r} and {accumulator.layer.name!r} read the same at first, and not in "
                    "all batches; calibrate the model whole (--no-stream)"
                )
        for accumulator in self.accumulators.values():
            accumulator.batch, accumulator.fresh = [], not accumulator.calls

    def _add(self, accumulator: _Accumulator, products: list[torch.Tensor]) -> None:
        """Add the products of one call, unless those of another layer, the same, stand for them."""
        if self.sharing:
            first = accumulator.fresh and not accumulator.batch
            accumulator.batch += products  # held until the batch ends, so that no other object takes their place
            if first:
                same = (a for a in self.accumulators.values() if a.fresh and a.leader is None and a is not accumulator)
                accumulator.leader = next((a for a in same if a.batch and a.batch[0] is products[0]), None)
        if accumulator.leader is None:
            accumulator.add_products(products)

    def finish(self, fit: Sequence[Batch], damping: float, fields: Mapping[str, str]) -> Statistics:
        """The statistics of these layers, once every batch of `fit` went through them; the accumulators are used up."""
        samples = sum(batch_samples(b) for b in fit)
        found = {name: acc.finish(samples, damping) for name, acc in self.accumulators.items() if acc.calls}
        _share_equal(found)
        unreached = tuple(name for name, acc in self.accumulators.items() if not acc.calls)
        seen = tuple(digest for b in fit for digest in sample_digests(b))
        return Statistics(found, samples, damping, unreached, fields, seen)

    def _hook_of(self, module: nn.Module, own: dict[str, _Accumulator]) -> Callable[..., None]:
        """The hook that adds what a module's weights, by parameter, saw in one call."""
        inside: Inputs | None = None
        if isinstance(module, nn.MultiheadAttention):
            inside = attention_inputs
        elif isinstance(module, nn.RNNBase):
            inside = recurrent_inputs
        elif isinstance(module, nn.RNNCellBase):
            inside = cell_inputs

        def hook(m: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if isinstance(m, TABLES):
                if not self.counting:
                    own["weight"].add_uses(lookups(m, args, kwargs))
            elif inside is None:
                x = args[0] if args else kwargs["input"]
                flat = _channels_last(m, output.detach())
                if not self.counting:
                    self._add(own["weight"], [self._product(own["weight"].layer, m, x, output)])
                    own["weight"].add_moments(flat)
                # A transposed convolution multiplies each weight by every input position, not for every output one.
                own["weight"].multiplied += x.numel() // m.in_channels if isinstance(m, TRANSPOSED) else flat.shape[0]
            else:
                found = inside(m, args, kwargs)
                for parameter, accumulator in own.items():
                    if not self.counting:
                        self._add(accumulator, [self._product(accumulator.layer, None, x) for x in found[parameter]])
                    accumulator.multiplied += found[parameter][0].numel() // found[parameter][0].shape[-1]
            for accumulator in own.values():
                accumulator.calls += 1

        return hook

    def _product(self, layer: Layer, module: nn.Module | None, x: torch.Tensor, output: Any = None) -> torch.Tensor:
        """X Xᵀ of an input, as the module unfolds it (None: its last dimension), once for all layers that get it."""
        key = (id(x), x._version, _geometry(module, output))
        cached = self.products.get(key)
        if cached is not None and cached[0]() is x:
            return cached[1]
        gram = input_products(module, x.detach(), output)
        if not bool(torch.isfinite(gram.diagonal(dim1=1, dim2=2)).all()):
            raise CalibrationError(
                f"layer {layer.name!r} receives values that are NaN, infinite or beyond 1e18; "
                "look at the layers before it and at the calibration data"
            )

        def forget(_: Any, key: tuple[Any, ...] = key) -> None:
            self.products.pop(key, None)

        self.products[key] = (weakref.ref(x, forget), gram)
        return gram


def _geometry(module: nn.Module | None, output: Any) -> tuple[Any, ...]:
    if module is None or isinstance(module, nn.Linear):
        return ("linear",)
    m: Any = module
    shape = (m.kernel_size, m.stride, m.padding, m.dilation, m.groups, m.padding_mode)
    return ("transposed", *shape, output.shape) if isinstance(module, TRANSPOSED) else ("conv", *shape)


def _channels_last(module: nn.Module, output: torch.Tensor) -> torch.Tensor:
    """(positions, channels)"""
    if isinstance(module, nn.Linear):
        return output.reshape(-1, output.shape[-1])
    dims = len(module.kernel_size)  # type: ignore[arg-type]
    batched = output if output.ndim == dims + 2 else output[None]
    return batched.movedim(1, -1).reshape(-1, batched.shape[1])
