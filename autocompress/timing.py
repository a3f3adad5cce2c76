"""Milliseconds in onnxruntime on this machine: what each form of each layer adds to the dense model, measured in the
model's own graph.

A layer is timed where it stands, as onnxruntime fuses it with its neighbours and lays out memory for all of them: one
alone, with its own input and output, takes another time. For every layer shape and every form that the exporter gives
a weight (int4 behind DequantizeLinear with a step per row, MatMulNBits, ...), a model is timed in which the layers of
that shape have the form and all others are dense float32, in turns with the dense model; the difference, over the
number of layers, is what one of them adds. Options that an exporter holds in the same form take the same time.
"""

from __future__ import annotations

import copy
import hashlib
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from autocompress.batches import Batch, chunk_batch, describe_batch, evaluating, feed, model_arguments
from autocompress.compressors import Measured
from autocompress.costs import Cell, Latency
from autocompress.doctor import cores, version
from autocompress.exporting import ExportError, Held, Onnx, Request, Weight, aliases_of, export, in_float32
from autocompress.exporting.onnx import arguments, outputs_of, trace
from autocompress.files import atomic_path, cache_dir
from autocompress.layers import CONVOLUTIONS, TABLES, TRANSPOSED, Layer, find_layers, stored_tensors
from autocompress.profiling import Profile
from autocompress.types import DENSE, Option

__all__ = [
    "DENSE_FORM",
    "Runtime",
    "Timer",
    "all_forms",
    "form_name",
    "forms_of",
    "in_turns",
    "measured_ms",
    "require_forms",
    "require_runtime",
    "timed",
]

TIMING_VERSION = 1
DENSE_FORM = "float32"


@dataclass(frozen=True)
class Runtime:
    """How a model is run and timed: the exporter that writes it, threads, and how long to measure.

    A turn runs one model for `slice_ms`, once for the caches and then at least three times, and counts the median;
    `turns` of two models alternate, so that both see the same machine, and their least are compared, as others on the
    machine only ever add.
    """

    exporter: Onnx = field(default_factory=Onnx)
    threads: int = 1
    turns: int = 9
    slice_ms: float = 20.0

    def facts(self) -> dict[str, str]:
        """Everything that a time depends on but the model: the key of the cache."""
        return {
            "processor": _processor(),
            "cores": str(cores()),
            "threads": str(self.threads),
            **{name: version(name) or "none" for name in ("onnxruntime", "onnx", "torch")},
            "exporter": repr(self.exporter),
            "timing_version": str(TIMING_VERSION),
        }


def require_runtime() -> None:
    """Raise ExportError, with the command that adds them, where onnx or onnxruntime is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExportError(
            f"milliseconds are measured in onnxruntime, which needs {error.name}; "
            "install it with: pip install 'autocompress[onnx]'"
        ) from error


def require_forms(options: Iterable[Option]) -> None:
    """Raise ExportError for an option that makes two layers of one: the graph that is timed has one."""
    if (found := next((option for option in options if option.rank is not None), None)) is not None:
        raise ExportError(
            f"there is no table of milliseconds for low-rank options ({found}); leave them out, or limit macs instead"
        )


class Timer:
    """A model's graph, traced once, to be timed with any form of any layer.

    `sites`: of every layer its shape as text, weight, geometry and input, or "" where the example never reaches it.
    Raises ExportError where the model cannot be exported, or onnxruntime is not installed.
    """

    def __init__(self, model: nn.Module, example: Batch, runtime: Runtime | None = None) -> None:
        require_runtime()
        self.runtime = runtime or Runtime()
        self.model = in_float32(copy.deepcopy(model)).eval()
        self.example = one_sample(self.model, example)
        self.layers = {layer.name: layer for layer in find_layers(self.model)}
        self.sites, self.macs = self._visit()
        self.program = trace(self.model, self.example, self.runtime.exporter.dynamic_batch)
        keys = {layer.key for layer in self.layers.values()}
        self.floats = {n: t.cpu().numpy() for n, t in stored_tensors(self.model).items() if n not in keys}
        self.aliases = aliases_of(self.model)

    @cached_property
    def feeds(self) -> list[np.ndarray]:
        """The example's tensors in the order of the graph's inputs, one sample."""
        return [tensor.cpu().numpy() for tensor in outputs_of(arguments(self.example, dynamic_batch=False))]

    @cached_property
    def key(self) -> str:
        """A digest of the runtime's facts and of the graph: operators, shapes of layers and of the example, no weights.

        So training a network further, or compressing it, leaves its times as they are.
        """
        graph = [node.op_type for node in self._graph({}).graph.node]
        facts = [self.runtime.facts(), graph, self.sites, describe_batch(self.example)]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @cached_property
    def dense(self) -> Callable[[], Any]:
        """A call that runs the dense model once."""
        return self.runner({})

    def _visit(self) -> tuple[dict[str, str], dict[str, int]]:
        """Where each layer stands (see `sites`), and its MACs for the example's one sample."""
        calls: dict[str, list[str]] = {name: [] for name in self.layers}
        counted = dict.fromkeys(self.layers, 0)
        handles = []
        for name, layer in self.layers.items():
            for owner in layer.owners:

                def hook(module: Any, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
                    given = args[0] if args else next(iter(kwargs.values()))
                    geometry = [
                        f"{k} {getattr(module, k)}" for k in ("stride", "padding", "dilation") if hasattr(module, k)
                    ]
                    calls[name].append(" ".join([*geometry, f"of {tuple(given.shape)}"]))
                    counted[name] += self.layers[name].size * _positions(self.layers[name], module, given, output)

                module = self.model.get_submodule(owner)
                handles.append(module.register_forward_hook(hook, with_kwargs=True))
        try:
            with torch.no_grad(), evaluating(self.model):
                feed(self.model, self.example)
        finally:
            for handle in handles:
                handle.remove()
        sites = {
            name: f"{_kind(self.model.get_submodule(name))} {'x'.join(map(str, self.layers[name].shape))}"
            + (f" groups {self.layers[name].groups}" if self.layers[name].groups > 1 else "")
            + f", {' + '.join(where)}"
            if where
            else ""
            for name, where in calls.items()
        }
        return sites, counted

    def held(self, name: str, width: int, step: str = "row", group: int | None = None) -> Held:
        """What the exporter makes of a layer's weight with codes of `width` bits (16 and 32: floats); random codes of
        the size of the layer's own weights.
        """
        layer = self.layers[name]
        weight = self.model.get_parameter(layer.key).detach().cpu().numpy().astype(np.float32)
        owner = self.model.get_submodule(name)
        exporter = self.runtime.exporter
        if width >= 16:
            values = weight.astype(np.float16 if width == 16 else np.float32)
            return exporter.hold(Weight(layer.key, layer.owners, layer.shape, DENSE, values=values), owner)
        low = -(2 ** (width - 1))
        codes = np.random.default_rng(0).integers(low, -low, layer.shape, dtype=np.int32)
        codes.reshape(-1)[0] = low  # so that they need all of the bits
        size = np.float32(max(float(weight.std()), 1e-6) / max(float(codes.std()), 1.0))
        columns = layer.size // layer.shape[0]
        shape = {"tensor": (), "row": (layer.shape[0],)}.get(step, (layer.shape[0], -(-columns // (group or columns))))
        scales = np.full(shape, size, np.float32)
        own = group if scales.ndim == 2 else None
        made = Weight(layer.key, layer.owners, layer.shape, DENSE, codes, scales, group=own)
        return exporter.hold(made, owner)

    def _graph(self, held: Mapping[str, Held]) -> Any:
        """The model with these layers as given, all others dense."""
        filled = {x.key: held[n] if n in held else self.held(n, 32) for n, x in self.layers.items()}
        request = Request(self.model, filled, self.floats, self.aliases, self.example)
        return self.runtime.exporter.graph(self.program, request)

    def runner(self, held: Mapping[str, Held]) -> Callable[[], Any]:
        """A call that runs the model once with these layers as given."""
        return _runner(self._graph(held).SerializeToString(), self.feeds, self.runtime.threads)

    def table(
        self,
        forms: Mapping[str, Mapping[str, Held]],
        folder: Path | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> tuple[float, list[Cell]]:
        """(milliseconds of the dense model, what each form of each layer adds), from the cache where it is there.

        forms: of every layer the forms that are asked for, by name. folder: of the cache, a file for each graph and
        machine; None for `latency` in the cache folder.
        """
        path = (folder or cache_dir() / "latency") / f"{self.key[:32]}.json"
        known = _read(path, self.key)
        wanted: dict[tuple[str, str], dict[str, Held]] = {}
        for name, found in forms.items():
            for form, held in found.items():
                if self.sites[name] and form != DENSE_FORM:
                    wanted.setdefault((self.sites[name], form), {})[name] = held
        todo = [cell for cell in wanted if list(cell) not in [entry[:2] for entry in known["cells"]]]
        if known["dense_ms"] is None:
            known["dense_ms"] = in_turns([self.dense], self.runtime)[0]
            _write(path, self.key, self.runtime, known)
        for done, cell in enumerate(todo):
            if progress is not None:
                progress(done, len(todo))
            base, other = in_turns([self.dense, self.runner(wanted[cell])], self.runtime)
            known["dense_ms"] = min(known["dense_ms"], base)
            # A ratio: where others slow the machine down, they slow both down.
            known["cells"].append([*cell, (other / base - 1.0) / len(wanted[cell])])
            _write(path, self.key, self.runtime, known)
        extra = {(site, form): known["dense_ms"] * share for site, form, share in known["cells"]}
        return known["dense_ms"], [Cell(*cell, tuple(held), extra[cell]) for cell, held in sorted(wanted.items())]


def one_sample(model: nn.Module, batch: Batch) -> Any:
    """What the model takes of the first sample of a batch, labels left out: positional arguments, or named ones."""
    args, kwargs = model_arguments(model, chunk_batch(batch, 1)[0])
    return kwargs or args


def all_forms(timer: Timer) -> dict[str, dict[str, Held]]:
    """Every layer in every form that the exporter gives the options of a default profile."""
    widths = ((4, "row"), (8, "row"), (4, "tensor"), (8, "tensor"), (16, "none"))
    made = {name: [timer.held(name, width, step) for width, step in widths] for name in timer.layers}
    return {name: {form_name(held): held for held in found} for name, found in made.items()}


def _positions(layer: Layer, module: nn.Module, given: Any, output: Any) -> int:
    """How often each weight of a layer is multiplied in one call, as `calibrate` counts it."""
    if isinstance(module, TABLES):
        return 0
    if isinstance(module, TRANSPOSED):
        return int(given.numel() // module.in_channels)
    if isinstance(module, (nn.Linear, *CONVOLUTIONS)):
        return int(output.numel() // layer.shape[0])
    return int(given.numel() // given.shape[-1])


def forms_of(timer: Timer, profile: Profile) -> dict[str, dict[Option, tuple[str, Held]]]:
    """How the exporter holds every option of every layer: by name of the form, and as a weight to be timed."""
    known: dict[tuple[Any, ...], tuple[str, Held]] = {}

    def form(name: str, row: Measured) -> tuple[str, Held]:
        key = (name, row.width, row.step, row.option.group)
        if key not in known:
            held = timer.held(name, row.width, row.step, row.option.group)
            known[key] = form_name(held), held
        return known[key]

    return {name: {row.option: form(name, row) for row in layer.rows} for name, layer in profile.layers.items()}


def form_name(held: Held) -> str:
    """What of a held weight its time depends on: kind, and where steps stand."""
    if held.kind.startswith("float") or held.weight.codes is None:
        return held.kind
    if held.kind.startswith("MatMulNBits"):  # one step per row or per layer is repeated for each block
        return held.kind if held.weight.group is None else f"{held.kind} by {held.weight.group}"
    steps = {0: "one step", 1: "a step per row"}.get(held.weight.step.ndim, f"steps by {held.weight.group}")
    return f"{held.kind}, {steps}"


def timed(
    profile: Profile,
    model: nn.Module,
    example: Batch,
    runtime: Runtime | None = None,
    folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Profile:
    """The profile with a table of what every option of every layer adds to the model's milliseconds (`Latency`).

    example: a batch as the model takes it, of which one sample is used. folder, progress: see `Timer.table`.
    Raises ExportError, for low-rank options too; MismatchError for another model than the profile's.
    """
    profile.check_model(model)
    require_forms(row.option for layer in profile.layers.values() for row in layer.rows)
    timer = Timer(model, example, runtime)
    forms = forms_of(timer, profile)
    asked = {name: dict(found.values()) for name, found in forms.items()}
    dense_ms, cells = timer.table(asked, folder, progress)
    extra = {(name, cell.form): cell.extra_ms for cell in cells for name in cell.layers}
    by_option = {
        name: {option: extra.get((name, form), 0.0) for option, (form, _) in found.items()}
        for name, found in forms.items()
    }
    return replace(profile, latency=Latency(dense_ms, by_option, cells, timer.runtime.facts()))


def measured_ms(small: nn.Module, example: Batch, runtime: Runtime | None = None) -> float:
    """Milliseconds of a compressed model (what `apply` returned) as the exporter writes it, one sample."""
    require_runtime()
    chosen, one = runtime or Runtime(), one_sample(small, example)
    feeds = [tensor.cpu().numpy() for tensor in outputs_of(arguments(one, dynamic_batch=False))]
    with tempfile.TemporaryDirectory() as scratch:
        info = export(small, None, chosen.exporter, Path(scratch) / "model.onnx", example=one)
        run = _runner(str(info.path), feeds, chosen.threads)
        return in_turns([run], chosen)[0]


def _runner(model: bytes | str, feeds: list[np.ndarray], threads: int) -> Callable[[], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    given = dict(zip([value.name for value in session.get_inputs()], feeds, strict=False))
    return lambda: session.run(None, given)


def in_turns(runs: list[Callable[[], Any]], runtime: Runtime) -> tuple[float, ...]:
    """Milliseconds of each model: the least over its turns of the median run of a turn.

    On one thread they are those of the processor, which are the wall clock's where nothing else runs: a thread that has
    to wait for others does not count it.
    """
    clock = time.thread_time if runtime.threads == 1 else time.perf_counter
    found: list[list[float]] = [[] for _ in runs]
    for _ in range(runtime.turns):
        for run, times in zip(runs, found, strict=True):
            run()
            taken: list[float] = []
            while len(taken) < 3 or sum(taken) < runtime.slice_ms:
                begun = clock()
                run()
                taken.append(1e3 * (clock() - begun))
            times.append(statistics.median(taken))
    return tuple(map(min, found))


def _read(path: Path, key: str) -> dict[str, Any]:
    """What the cache has; nothing where it is not there, damaged, or of something else."""
    try:
        found = json.loads(path.read_text())
        if found["key"] == key:
            return {
                "dense_ms": float(found["dense_ms"]),
                "cells": [[a, b, float(share)] for a, b, share in found["cells"]],
            }
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return {"dense_ms": None, "cells": []}


def _write(path: Path, key: str, runtime: Runtime, known: Mapping[str, Any]) -> None:
    with atomic_path(path) as scratch:
        scratch.write_text(json.dumps({"key": key, "facts": runtime.facts(), **known}, indent=1) + "\n")


def _kind(module: nn.Module) -> str:
    return type(module).__name__


def _processor() -> str:
    """The processor's name, as the system knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
