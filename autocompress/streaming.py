"""Calibration of a model folder that is larger than memory: one transformer block at a time, everything else on disk.

A chain of blocks (the `nn.ModuleList` that holds most weights) is run block by block: all samples go through one block
before the next is read. What a block puts out is kept on disk, as float32, for the next one. The rest of the model
(embeddings, norms, output head) runs twice, with stand-ins for the blocks: once for what the blocks are called with,
once at the end for its own statistics. Every number is computed as `calibrate` does, in the same order.

Memory:  4 bytes per weight of what is loaded + 8 per entry of the Hessians of its inputs + 4 per entry of products on
         their way + activations of one batch + what blocks are called with, equal tensors once + the libraries; later,
         what a layer's profile takes (`estimating.streaming_bytes`, held by a test)

Source of the walk: GPTQ, arXiv 2210.17323, section 4 (one block at a time).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from autocompress.batches import Batch, Enough, batch_digest, evaluating, feed, map_tensors
from autocompress.calibration import Collector, LayerStatistics, Statistics, fit_part
from autocompress.errors import CalibrationError, LayerError, MismatchError, TaskError
from autocompress.files import atomic_path
from autocompress.hf import skeleton
from autocompress.inputs import slow_attention
from autocompress.layers import Layer, find_layers, weight_of
from autocompress.offloading import READER
from autocompress.profiling import Store
from autocompress.threads import single_threaded

__all__ = [
    "Tensors",
    "calibrate_streamed",
    "find_chain",
    "loaded",
    "streamed_model",
    "too_large",
]

SHARE = 0.25  # of physical memory
INDEX = "model.safetensors.index.json"
log = logging.getLogger(__name__)


class Tensors:
    """The tensors of a model folder's safetensors files, read by their names in the state dict, as float32."""

    def __init__(self, folder: Path, prefix: str = "") -> None:
        self.folder, self.prefix = folder, prefix
        self.files: dict[str, str] = {}
        try:
            if (folder / INDEX).is_file():
                self.files = dict(json.loads((folder / INDEX).read_text())["weight_map"])
            else:
                for path in sorted(folder.glob("*.safetensors")):
                    with safe_open(path, "pt") as file:
                        self.files |= dict.fromkeys(file.keys(), path.name)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise TaskError(f"the weights in {folder} cannot be read: {' '.join(str(error).split())}") from error

    def name_of(self, key: str) -> str | None:
        """What the files call a tensor of the state dict: a model may have been saved with a head about it, or without
        one.
        """
        names = (key, f"{self.prefix}.{key}", key.removeprefix(f"{self.prefix}."))
        return next((name for name in names if name in self.files), None)

    def __call__(self, key: str) -> torch.Tensor:
        """A copy in memory, so that its pages of the file can go. Raises TaskError where there is none."""
        name = self.name_of(key)
        if name is None:
            raise TaskError(f"{self.folder} holds no tensor {key!r}; save the model again by save_pretrained")
        try:
            with safe_open(self.folder / self.files[name], "pt") as file:
                found = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise TaskError(f"{self.folder / self.files[name]} cannot be read: {error}") from error
        return found.to(torch.float32, copy=True) if found.is_floating_point() else found.clone()


def streamed_model(folder: str | Path) -> nn.Module:
    """The model of a folder with the weights of its layers left in their files, and everything else in memory.

    A layer's parameter is on the meta device; `weight_of` reads it, `loaded` puts some of them in their places.
    Raises TaskError where the folder lacks a tensor, or has one of another shape.
    """
    model = skeleton(folder)
    read = Tensors(Path(folder), getattr(model, "base_model_prefix", ""))
    owners: dict[int, list[str]] = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(key)
    names: dict[str, str] = {}  # a tied tensor is in the files under one of its names
    for keys in owners.values():
        there = next((key for key in keys if read.name_of(key) is not None), keys[0])
        names |= dict.fromkeys(keys, there)
    reader = _Reader(read, names)
    setattr(model, READER, reader)
    weights = {layer.key for layer in find_layers(model)}
    for keys in owners.values():
        if not weights & set(keys):
            _put(model, keys, nn.Parameter(reader(keys[0]), requires_grad=False))
    for key, buffer in model.named_buffers():
        if read.name_of(key) is not None:
            buffer.copy_(read(key))
    return model


@dataclass(frozen=True)
class _Reader:
    """`Tensors` for a model some of whose tensors are tied."""

    read: Tensors
    names: Mapping[str, str]

    def __call__(self, key: str) -> torch.Tensor:
        return self.read(self.names[key])


def _put(model: nn.Module, keys: Sequence[str], parameter: nn.Parameter) -> None:
    """One parameter in all the places that have these names."""
    old = model.get_parameter(keys[0])
    if parameter.shape != old.shape:
        raise TaskError(
            f"the file's {keys[0]!r} is {tuple(parameter.shape)}, and config.json makes it {tuple(old.shape)}; save "
            "the model again by save_pretrained"
        )
    for key in keys:
        owner, _, name = key.rpartition(".")
        model.get_submodule(owner)._parameters[name] = parameter


def too_large(folder: str | Path) -> bool:
    """Whether a folder's weights, as float32, are more than a quarter of this machine's memory: a compressed copy, a
    layer's work and the Hessians want room beside them.
    """
    weights = 4 * sum(parameter.numel() for parameter in skeleton(folder).parameters())
    return weights > SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@contextlib.contextmanager
def loaded(model: nn.Module, layers: Iterable[Layer]) -> Iterator[None]:
    """Have these layers' weights in memory for a `with` block. Raises LayerError for weights that are not finite."""
    before = {}
    try:
        for layer in layers:
            before[layer.name] = _places(layer), model.get_parameter(layer.key)
            _put(model, _places(layer), nn.Parameter(_finite_weight(model, layer), requires_grad=False))
        yield
    finally:
        for keys, parameter in before.values():
            _put(model, keys, parameter)


def _places(layer: Layer) -> list[str]:
    return [f"{owner}.{layer.parameter}" for owner in layer.owners]


def _finite_weight(model: nn.Module, layer: Layer) -> torch.Tensor:
    weight = weight_of(model, layer.key)
    if not bool(torch.isfinite(weight).all()):
        raise LayerError(
            f"layer {layer.name!r} has weights that are NaN or infinite; repair or retrain the model first"
        )
    return weight


def find_chain(model: nn.Module) -> str:
    """Name of the module list that holds most weights, of two modules at least. Raises CalibrationError."""
    found = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1
    }
    if not found:
        raise CalibrationError(
            f"{type(model).__name__} has no list of two blocks or more to stream; calibrate it whole (--no-stream)"
        )
    return max(found, key=lambda name: found[name])  # of equal ones the first


def calibrate_streamed(
    model: nn.Module,
    batches: Iterable[Batch],
    store: str | Path,
    seed: int = 0,
    damping: float = 1e-2,
    holdout: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Statistics:
    """What `calibrate` computes, of a model from `streamed_model`, one block in memory at a time.

    The statistics are left in store/streaming, each layer's read when it is asked for. A block that is done is kept:
    after a kill the same call goes on with the next. progress: called with (parts done, parts in all). Raises as
    `calibrate`; CalibrationError too for a model whose blocks are not a chain, each on what the one before it puts out.
    """
    fit, fields = fit_part(model, batches, seed, damping, holdout)
    place = Store(store)
    with place.writing():
        folder = place.path / "streaming"
        target = folder / "statistics.npz"
        for path in (place.path / "statistics.npz", target):
            if (known := _known(path, fields)) is not None:
                return known
        folder.mkdir(exist_ok=True)
        with evaluating(model), torch.no_grad(), slow_attention(), single_threaded():
            parts = _walk(model, fit, folder, fields, damping, progress)
        order = [layer.name for layer in find_layers(model)]
        reached = _Parts(parts, [name for name in order if any(name in part.layers for part in parts)])
        unreached = tuple(name for name in order if name not in reached)
        replace(parts[0], layers=reached, unreached=unreached).save(target)
        for path in folder.iterdir():
            if path != target:
                path.unlink()
        return Statistics.load(target, held=False)


def _known(path: Path, fields: Mapping[str, str]) -> Statistics | None:
    """The statistics in a file, if there is one and they depend on the same."""
    with contextlib.suppress(MismatchError):
        found = Statistics.load(path, held=False)
        if dict(found.fields) == dict(fields):
            return found
    return None


@dataclass(frozen=True)
class _Parts(Mapping[str, LayerStatistics]):
    """The layers of several statistics in one order."""

    parts: Sequence[Statistics]
    order: Sequence[str]

    def __getitem__(self, name: str) -> LayerStatistics:
        return next(part for part in self.parts if name in part.layers).layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.order)


def _walk(
    model: nn.Module,
    fit: Sequence[Batch],
    folder: Path,
    fields: Mapping[str, str],
    damping: float,
    progress: Callable[[int, int], None] | None,
) -> list[Statistics]:
    """The statistics of every block, and of what stands outside of them, each from its file."""
    chain = find_chain(model)
    layers = _by_block(model, chain)
    outside = layers.pop(-1)
    blocks = _Blocks(model, chain)
    found = [_known(folder / f"part{number}.npz", fields) for number in range(len(blocks))]
    begun = next((number for number, part in enumerate(found) if part is None), len(blocks))
    while begun and not (folder / f"inputs{begun}.bin").is_file():
        begun -= 1
    log.info("%d of %d blocks are in the store already", begun, len(blocks))
    with loaded(model, outside):
        first = blocks.first_call(fit[0])
    with loaded(model, layers[0]):
        blocks.output(0, first)
    with loaded(model, outside):
        calls = _Calls(blocks, fit, None if begun else folder / "inputs0.bin")
    for number in range(begun, len(blocks)):
        if progress is not None:
            progress(number, len(blocks) + 1)
        collector = Collector(model, layers[number], sharing=True)
        before, after = folder / f"inputs{number}.bin", folder / f"inputs{number + 1}.bin"
        with loaded(model, layers[number]), collector, atomic_path(after) as scratch, scratch.open("wb") as file:
            for call, state in zip(calls.of(number), _read_states(before, calls.shapes), strict=True):
                _write_state(file, blocks.output(number, call.on(state)))
                collector.end_batch()
        collector.finish(fit, damping, fields).save(folder / f"part{number}.npz")
        before.unlink(missing_ok=True)
    if progress is not None:
        progress(len(blocks), len(blocks) + 1)
    collector = Collector(model, outside, sharing=True)
    with loaded(model, outside), collector:
        for batch, state in zip(fit, _read_states(folder / f"inputs{len(blocks)}.bin", calls.shapes), strict=True):
            blocks.around(batch, state)
            collector.end_batch()
    rest = collector.finish(fit, damping, fields)
    parts = (Statistics.load(folder / f"part{number}.npz", held=False) for number in range(len(blocks)))
    return [rest, *parts]


def _by_block(model: nn.Module, chain: str) -> dict[int, list[Layer]]:
    """The layers of every block, and under -1 those outside. Raises CalibrationError for one that is in several."""
    found: dict[int, list[Layer]] = {number: [] for number in range(-1, len(model.get_submodule(chain)))}  # type: ignore[arg-type]
    for layer in find_layers(model):
        places = {
            int(owner.removeprefix(f"{chain}.").split(".")[0]) if owner.startswith(f"{chain}.") else -1
            for owner in layer.owners
        }
        if len(places) > 1:
            raise CalibrationError(
                f"the weight of {layer.name!r} is shared by {', '.join(layer.owners)}; streaming needs every weight in "
                "one block: calibrate the model whole (--no-stream)"
            )
        found[places.pop()].append(layer)
    return found


@dataclass(frozen=True)
class _Call:
    """What a block is called with; its first argument are the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def states(self) -> Any:
        return self.args[0] if self.args else next(iter(self.kwargs.values()), None)

    def on(self, states: Any) -> _Call:
        """The same call on other hidden states."""
        if self.args:
            return replace(self, args=(states, *self.args[1:]))
        return replace(self, kwargs={**self.kwargs, next(iter(self.kwargs)): states})


class _Blocks:
    """A chain of blocks, and the model about them with stand-ins in their places.

    Raises CalibrationError where a block is not called once, in order, on what the one before it put out, and where
    anything else that it is called with depends on that: then one cannot be run after the other.
    """

    def __init__(self, model: nn.Module, chain: str) -> None:
        self.model, self.chain = model, chain
        self.modules: Any = model.get_submodule(chain)
        self.tuple_length: int | None = None  # of what a block returns; None: the hidden states themselves

    def __len__(self) -> int:
        return len(self.modules)

    def output(self, number: int, call: _Call) -> torch.Tensor:
        """The hidden states that a block makes of a call."""
        given = self.modules[number](*call.args, **call.kwargs)
        found, *others = given if isinstance(given, tuple) else (given,)
        same = isinstance(found, torch.Tensor) and (found.shape, found.dtype) == (call.states.shape, call.states.dtype)
        if not same or any(other is not None for other in others):
            raise self._no_chain(number, "returns more than hidden states of the shape that it takes")
        self.tuple_length = len(given) if isinstance(given, tuple) else None
        return found

    def first_call(self, batch: Batch) -> _Call:
        """What the first block is called with."""
        found: list[_Call] = []

        def stop(number: int, call: _Call) -> torch.Tensor:
            found.append(call)
            raise Enough

        with contextlib.suppress(Enough):
            self._around(batch, stop)
        if not found:
            raise self._no_chain(0, "is not called")
        return found[0]

    def calls(self, batch: Batch, added: float = 0.0) -> tuple[torch.Tensor, list[_Call]]:
        """The first block's hidden states, and what every block is called with, hidden states left out; `added` to
        those by every stand-in.
        """
        found: list[_Call] = []
        first: list[torch.Tensor] = []
        handed = torch.empty(0)

        def reply(number: int, call: _Call) -> torch.Tensor:
            nonlocal handed
            if number != len(found) or (found and call.states is not handed):
                raise self._no_chain(number, "is not called on what the one before it puts out")
            first[:] = first or [call.states]
            found.append(call.on(None))
            handed = call.states + added
            return handed

        self._around(batch, reply)
        if len(found) != len(self):
            raise self._no_chain(len(found), "is not called")
        return first[0], found

    def check(self, batch: Batch) -> None:
        """Raise CalibrationError unless calls are the same whatever the blocks put out."""
        plain, moved = (self.calls(batch, added)[1] for added in (0.0, 1.0))
        for number, pair in enumerate(zip(plain, moved, strict=True)):
            one, other = (batch_digest((call.args, call.kwargs)) for call in pair)
            if one != other:
                raise self._no_chain(number, "is called with more that depends on the blocks before it")

    def around(self, batch: Batch, states: torch.Tensor) -> None:
        """Run what stands outside of the blocks, `states` being what the last one puts out."""
        self._around(batch, lambda number, call: states if number == len(self) - 1 else call.states)

    def _around(self, batch: Batch, reply: Callable[[int, _Call], torch.Tensor]) -> None:
        """The model on a batch, with a reply to its call in the place of every block."""

        def stand_in(number: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                call = _Call(args, kwargs)
                if not isinstance(call.states, torch.Tensor) or call.states.dtype != torch.float32:
                    given = getattr(call.states, "dtype", type(call.states).__name__)
                    raise self._no_chain(number, f"gets {given} as its first argument and no float32 hidden states")
                states = reply(number, call)
                return states if self.tuple_length is None else (states, *[None] * (self.tuple_length - 1))

            return forward

        try:
            for number, block in enumerate(self.modules):
                block.forward = stand_in(number)
            feed(self.model, batch)
        finally:
            for block in self.modules:
                block.__dict__.pop("forward", None)

    def _no_chain(self, number: int, what: str) -> CalibrationError:
        return CalibrationError(
            f"block {number} of {self.chain!r} {what}; streaming needs a chain of blocks: calibrate the model whole "
            "(--no-stream)"
        )


class _Calls:
    """What every block is called with for every batch, tensors of equal content once; hidden states go to a file."""

    def __init__(self, blocks: _Blocks, fit: Sequence[Batch], path: Path | None) -> None:
        blocks.check(fit[0])
        pool: dict[str, torch.Tensor] = {}
        self.shapes: list[torch.Size] = []
        self.calls: list[list[_Call]] = []

        def pooled(tensor: torch.Tensor) -> torch.Tensor:
            return pool.setdefault(batch_digest(tensor), tensor)

        with contextlib.nullcontext() if path is None else atomic_path(path) as scratch:
            with contextlib.nullcontext() if scratch is None else scratch.open("wb") as file:
                for batch in fit:
                    states, calls = blocks.calls(batch)
                    self.shapes.append(states.shape)
                    self.calls.append([_Call(*map_tensors((call.args, call.kwargs), pooled)) for call in calls])
                    if file is not None:
                        _write_state(file, states)
        self.held_bytes = sum(tensor.numel() * tensor.element_size() for tensor in pool.values())

    def of(self, number: int) -> list[_Call]:
        return [calls[number] for calls in self.calls]


def _write_state(file: Any, states: torch.Tensor) -> None:
    file.write(states.detach().cpu().contiguous().numpy())


def _read_states(path: Path, shapes: Sequence[torch.Size]) -> Iterator[torch.Tensor]:
    """The hidden states of every batch, float32, one after the other."""
    with path.open("rb") as file:
        for shape in shapes:
            yield torch.from_numpy(np.fromfile(file, np.float32, shape.numel())).reshape(shape)
