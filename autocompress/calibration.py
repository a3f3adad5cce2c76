"""Calibration: forward hooks that stream Hessians. The only place where Hessians are accumulated."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import weakref
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from scipy.linalg.blas import ssyrk
from torch import nn
from torch.nn import functional as F

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
from autocompress.inputs import attention_inputs, cell_inputs, lookups, recurrent_inputs, slow_attention
from autocompress.layers import TABLES, TRANSPOSED, Layer, find_layers, model_digest
from autocompress.threads import default_workers, single_threaded

__all__ = ["LayerStatistics", "Statistics", "calibrate"]

CALIBRATION_VERSION = 3
FLOOR = 0.5  # uses that every row of a table has beside those that calibration saw (Krichevsky and Trofimov's add-half)
IN_FLIGHT = 1 << 22  # entries of the unfolded input per core held at a time (16 MiB of float32), unless that is
POSITIONS = 4096  # fewer positions than these or d: summing d x d products in float64 would take longer than they do
PANEL = 256  # rows of a panel where symmetric matrices are worked on in panels


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
        arrays: dict[str, np.ndarray] = {}
        names: dict[str, Any] = {}
        stored: dict[int, str] = {}
        for i, (name, s) in enumerate(self.layers.items()):
            at = stored.setdefault(id(s.hessian), f"h{i}")
            arrays.setdefault(at, s.hessian)
            arrays[f"m{i}"], arrays[f"v{i}"] = s.mean, s.var
            if s.row_weights is not None:
                arrays[f"r{i}"] = s.row_weights
            names[name] = [at, f"m{i}", f"v{i}", s.calls, s.dead, s.positions, f"r{i}"]
        meta = {
            "layers": names,
            "samples": self.samples,
            "damping": self.damping,
            "unreached": self.unreached,
            "fields": dict(self.fields),
            "seen": self.seen,
        }
        arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
        with atomic_path(path) as scratch, scratch.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Inverse of `save`. Raises MismatchError if the file is not one of statistics."""
        try:
            with np.load(path, allow_pickle=False) as data:
                meta = json.loads(bytes(data["meta"]))
                cache = {key: data[key] for key in data.files}
            layers = {
                name: LayerStatistics(cache[h], calls, cache[m], cache[v], dead, positions, cache.get(r))
                for name, (h, m, v, calls, dead, positions, r) in meta["layers"].items()
            }
            return cls(
                layers, meta["samples"], meta["damping"], tuple(meta["unreached"]), meta["fields"], tuple(meta["seen"])
            )
        except (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise MismatchError(f"{path} does not hold statistics: {error}") from error


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
    data = materialise(batches)
    layers = find_layers(model)
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
    collector = Collector(model, list(layers))
    with evaluating(model), torch.no_grad(), slow_attention(), collector, single_threaded():
        for batch in fit:
            feed(model, batch)
            collector.end_batch()
    samples = sum(batch_samples(b) for b in fit)
    found = {name: acc.finish(samples, damping) for name, acc in collector.accumulators.items() if acc.calls}
    _share_equal(found)
    unreached = tuple(name for name, acc in collector.accumulators.items() if not acc.calls)
    seen = tuple(digest for b in fit for digest in sample_digests(b))
    return Statistics(found, samples, damping, unreached, fields, seen)


def _share_equal(found: dict[str, LayerStatistics]) -> None:
    """Let layers whose Hessians are bit for bit equal (the same input) hold one array."""
    known: dict[bytes, np.ndarray] = {}
    for name, s in found.items():
        key = hashlib.sha256(s.hessian.tobytes()).digest()
        array = known.setdefault(key, s.hessian)
        if array is not s.hessian:
            found[name] = dataclasses.replace(s, hessian=array)


class _Accumulator:
    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.gram: np.ndarray | None = None
        self.uses: np.ndarray | None = None
        self.calls = 0
        self.positions = 0  # outputs that the moments are of
        self.multiplied = 0
        self.sum = self.squares = np.zeros(0)

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

    def finish(self, samples: int, damping: float) -> LayerStatistics:
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
        mean = self.sum / max(self.positions, 1)
        var = np.maximum(self.squares / max(self.positions, 1) - mean**2, 0.0)
        weights = None
        if self.uses is not None:
            dead += int((self.uses == 0.0).sum())
            weights = (self.uses + FLOOR) * (2.0 / samples)
        return LayerStatistics(hessian, self.calls, mean, var, dead, self.multiplied, weights)


Inputs = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], dict[str, list[torch.Tensor]]]


class Collector:
    """Forward hooks on every owner of every layer, for the time of a `with` block."""

    def __init__(self, model: nn.Module, layers: list[Layer]) -> None:
        self.model = model
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
                own["weight"].add_uses(lookups(m, args, kwargs))
            elif inside is None:
                x = args[0] if args else kwargs["input"]
                own["weight"].add_products([self._product(own["weight"].layer, m, x, output)])
                flat = _channels_last(m, output.detach())
                own["weight"].add_moments(flat)
                # A transposed convolution multiplies each weight by every input position, not for every output one.
                own["weight"].multiplied += x.numel() // m.in_channels if isinstance(m, TRANSPOSED) else flat.shape[0]
            else:
                found = inside(m, args, kwargs)
                for parameter, accumulator in own.items():
                    accumulator.add_products([self._product(accumulator.layer, None, x) for x in found[parameter]])
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
        gram = _gram(module, x.detach(), output)
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


def _gram(module: nn.Module | None, x: torch.Tensor, output: Any = None) -> torch.Tensor:
    """X Xᵀ of one input, float64 (groups, d, d): float32 products of `_in_flight` positions, or of one sample, each."""
    if module is None or isinstance(module, nn.Linear):
        rows = x.reshape(-1, x.shape[-1]).float()
        d = rows.shape[1]
        gram = torch.zeros(1, d, d, dtype=torch.float64, device=x.device)
        for product in _products(rows.split(_in_flight(d, d)), lambda chunk: [chunk.t()]):
            gram += product
        return _mirror(gram)
    m: Any = module
    dims = len(m.kernel_size)
    x = x.float() if x.ndim == dims + 2 else x.float()[None]
    transposed = isinstance(module, TRANSPOSED)
    if transposed:
        x, m = _stuffed(m, x, output.shape[-dims:])
    else:
        x = _pad(m, x)
    groups, d = m.groups, x.shape[1] // m.groups * int(np.prod(m.kernel_size))
    spatial = [(x.shape[2 + i] - m.dilation[i] * (m.kernel_size[i] - 1) - 1) // m.stride[i] + 1 for i in range(dims)]
    gram = torch.zeros(groups, d, d, dtype=torch.float64, device=x.device)
    per_chunk = max(1, _in_flight(d, d * groups) // max(1, int(np.prod(spatial))))
    for product in _products(x.split(per_chunk), lambda chunk: _windows(m, chunk, spatial)):
        gram += product
    gram = _mirror(gram)
    if transposed:  # the kernel is applied the other way round
        taps = [-1, *m.kernel_size]
        axes = [*range(2, dims + 2), *range(dims + 3, 2 * dims + 3)]
        gram = gram.reshape(groups, d // int(np.prod(m.kernel_size)), *taps[1:], *taps).flip(axes)
        gram = gram.reshape(groups, d, d)
    return gram


def _stuffed(m: Any, x: torch.Tensor, spatial: Sequence[int]) -> tuple[torch.Tensor, Any]:
    """The input and the geometry of the plain convolution, its kernel reversed, that a transposed one is.

    Between inputs stand stride - 1 zeros; before them dilation (kernel - 1) - padding, after them what the output's
    size asks for. Exact whatever overlaps, but for stride s most of what is multiplied is zeros.
    """
    dims = len(m.kernel_size)
    size = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], m.stride, strict=True)]
    wide = x.new_zeros(*x.shape[:2], *size)
    wide[(slice(None), slice(None), *(slice(None, None, s) for s in m.stride))] = x
    sides: list[int] = []
    for i in reversed(range(dims)):  # F.pad wants the last dimension first, and cuts off what is negative
        reach = m.dilation[i] * (m.kernel_size[i] - 1)
        before = reach - m.padding[i]
        sides += [before, spatial[i] + reach - before - size[i]]
    plain = SimpleNamespace(kernel_size=m.kernel_size, stride=(1,) * dims, dilation=m.dilation, groups=m.groups)
    return F.pad(wide, sides), plain


def _in_flight(d: int, entries: int) -> int:
    """Positions unfolded at a time by each core, for groups of d columns and so many entries per position."""
    return max(1, IN_FLIGHT // entries, min(POSITIONS, d))


def _windows(m: Any, x: torch.Tensor, spatial: list[int]) -> torch.Tensor:
    """Unfolded input (groups, in/groups · kernel, samples · positions), columns in the order of the weight: in, then
    kernel.
    """
    dims = len(m.kernel_size)
    x = x.contiguous()
    n, c = x.shape[:2]
    s = x.stride()
    size = (c, *m.kernel_size, n, *spatial)
    stride = (
        s[1],
        *(s[2 + i] * m.dilation[i] for i in range(dims)),
        s[0],
        *(s[2 + i] * m.stride[i] for i in range(dims)),
    )
    return x.as_strided(size, stride).reshape(m.groups, c // m.groups * int(np.prod(m.kernel_size)), -1)


def _pad(m: Any, x: torch.Tensor) -> torch.Tensor:
    """The input padded as the module pads it before its convolution."""
    if m.padding == "valid":
        return x
    sides: list[int] = []
    for i in reversed(range(len(m.kernel_size))):  # F.pad wants the last dimension first
        if m.padding == "same":
            total = m.dilation[i] * (m.kernel_size[i] - 1)
            sides += [total // 2, total - total // 2]
        else:
            sides += [m.padding[i], m.padding[i]]
    if not any(sides):
        return x
    return F.pad(x, sides) if m.padding_mode == "zeros" else F.pad(x, sides, mode=m.padding_mode)


def _products(
    chunks: Sequence[torch.Tensor], unfold: Callable[[torch.Tensor], Iterable[torch.Tensor]]
) -> Iterator[torch.Tensor]:
    """Per chunk, in order, X Xᵀ on and above the diagonal for each group, X (d, positions) = unfold(chunk)[group].

    On the CPU one thread per core works on a chunk of its own, with BLAS on one thread; the sums keep their order.
    """

    def product(chunk: torch.Tensor) -> torch.Tensor:
        products = [_upper_product(X) for X in unfold(chunk)]
        return torch.stack(products) if len(products) > 1 else products[0][None]

    if chunks[0].device.type != "cpu" or len(chunks) == 1:
        yield from map(product, chunks)
        return
    workers = default_workers()
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(chunks), workers):
            yield from pool.map(product, chunks[start : start + workers])


def _upper_product(X: torch.Tensor) -> torch.Tensor:
    """X Xᵀ on and above the diagonal, float32 (d, d): half the multiplications of the full product."""
    if X.device.type == "cpu":
        # BLAS wants columns, so it gets the transpose, which is a view whichever way X lies in memory.
        array = X.numpy()
        by_columns = array.flags.f_contiguous
        return torch.from_numpy(ssyrk(1.0, array) if by_columns else ssyrk(1.0, array.T, trans=1))
    d = X.shape[0]
    product = X.new_zeros(d, d)
    panels = max(1, -(-d // PANEL))
    edges = [d * i // panels for i in range(panels + 1)]
    for a, b in itertools.pairwise(edges):
        product[a:b, a:] = X[a:b] @ X[a:].t()
    return product


def _mirror(gram: torch.Tensor) -> torch.Tensor:
    """Symmetric (groups, d, d) from sums of upper halves, in place: the lower half is written panel by panel."""
    for start in range(0, gram.shape[1], PANEL):
        stop = start + PANEL
        square = gram[:, start:stop, start:stop]
        square.copy_(square.triu() + square.triu(1).transpose(1, 2))
        gram[:, stop:, start:stop] = gram[:, start:stop, stop:].transpose(1, 2)
    return gram
