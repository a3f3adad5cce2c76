"""Profile: error and bytes of every option of every layer, over a store on disk that survives a kill at any moment.

Store:  lock                 held (flock) by the one process that writes
        profile.json         the index: what the profile depends on, and its layers; written once, before the work
        statistics.npz       the calibration statistics
        layers/<key>.npz     one file per finished layer, named by the digest of weight, Hessian, options and versions
        seconds/<key>.json   how long that took: the only files that are not the same bytes after every run
        extra/<name>.json    what strategies measured on the model, named by what it depends on
Every file is written beside its place and renamed into it, so a file that is there is whole. Only the calling process
writes, whatever the engine. Where a shared file system keeps no locks between hosts, a second writer is still harmless:
the index is made by a link, which one of them wins and the other compares itself with, and a layer's file has the same
bytes whoever wrote it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from autocompress import costs
from autocompress.calibration import Statistics
from autocompress.compressors import COMPRESSORS, LayerProblem, Measured, named_options, profile_layer
from autocompress.costs import Latency
from autocompress.engines import check_engine, run_tasks
from autocompress.errors import MismatchError, OptionError, StoreError
from autocompress.files import atomic_path, write_once
from autocompress.layers import Layer, Layers, find_layers, model_digest, weight_of
from autocompress.narrowing import WHOLE, Groups, Widths
from autocompress.obs import EXACT_LIMIT, exact_operations
from autocompress.records import Template, make_template
from autocompress.storage import VERSION as FORMAT_VERSION
from autocompress.threads import default_workers
from autocompress.types import DENSE, Option, Plan
from autocompress.workloads import pays

__all__ = ["LayerProfile", "Profile", "Store", "load_profile", "profile"]

PROFILE_VERSION = 9
DAMAGE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)  # what reading a layer's file may raise
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerProfile:
    """One layer of a profile: its options as rows, its pruning trace (order and losses; the layer's file in the store
    where that is left there; None where no option needed one), and the energy ½ tr(W H Wᵀ) that errors are compared
    with. narrowed: rows of narrower layers, which take part in `Profile.at` a structure only.
    """

    layer: Layer
    rows: tuple[Measured, ...]
    energy: float
    kept: tuple[np.ndarray, np.ndarray] | Path | None
    narrowed: tuple[Measured, ...] = ()

    def trace(self) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
        """Order and losses; (None, None) where no option needed them. Raises StoreError where their file is damaged."""
        found = _load_trace(self.kept) if isinstance(self.kept, Path) else self.kept
        return (None, None) if found is None else found

    @property
    def order(self) -> np.ndarray | None:
        return self.trace()[0]

    @property
    def losses(self) -> np.ndarray | None:
        return self.trace()[1]

    @property
    def reached(self) -> bool:
        """Whether calibration reached the layer; where it did not, its options are those that need no data."""
        return self.kept is not None or self.energy > 0.0  # options without a structure have no order

    def row(self, option: Option) -> Measured:
        for row in (*self.rows, *self.narrowed):
            if row.option == option:
                return row
        raise MismatchError(f"layer {self.layer.name!r} has no option {str(option)!r} in this profile")


@dataclass(frozen=True)
class Profile:
    """Every option of every layer. `table` is the same as a DataFrame; `fingerprint` covers all of it but the clock
    times. `latency`: a table of times, where one was measured (`timing.timed`). widths: where layers can be narrower,
    which channels stay; `rows` are those of layers of full width, `at` gives the profile of a narrower structure.
    """

    layers: Mapping[str, LayerProfile]
    skipped: Mapping[str, str]
    statistics: Statistics
    fields: Mapping[str, str]
    template: Template
    store: Store | None = field(default=None, compare=False)
    latency: Latency | None = field(default=None, compare=False)
    widths: Widths | None = None

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over what the profile depends on and every row and trace in it, clock times left out."""
        digest = hashlib.sha256(json.dumps(dict(sorted(self.fields.items()))).encode())
        for name, layer in self.layers.items():
            digest.update(
                json.dumps(
                    [
                        name,
                        layer.energy.hex(),
                        [
                            [str(r.option), r.error.hex(), r.bytes, r.width, r.nonzero]
                            + ([] if r.row_bits is None else [r.row_bits])
                            for r in (*layer.rows, *layer.narrowed)
                        ],
                    ]
                ).encode()
            )
            for array in layer.trace():
                if array is not None:
                    digest.update(array.tobytes())
        return digest.hexdigest()

    @functools.cached_property
    def key(self) -> str:
        """SHA-256 of the fingerprint and of the rows that each layer has now: what is kept by row is kept under this.

        Plans of all structures of a profile are plans of that profile, so these share its fingerprint; their rows
        differ.
        """
        rows = [
            [name, *([[str(r.option), r.error.hex(), r.bytes] for r in each] for each in (layer.rows, layer.narrowed))]
            for name, layer in self.layers.items()
        ]
        return hashlib.sha256(json.dumps([self.fingerprint, rows]).encode()).hexdigest()

    def with_vectors(self, bits: int) -> Profile:
        """The profile with that many bits per value of norms and biases (16: half precision); its rows are the same."""
        if bits == self.template.bits:
            return self
        found = dataclasses.replace(self, template=self.template.at(bits))
        for name in ("fingerprint", "key"):  # which the template is no part of
            if name in self.__dict__:
                found.__dict__[name] = self.__dict__[name]
        return found

    def levels(self) -> dict[str, tuple[float, ...]]:
        """The levels of each group of channels, in percent, the whole first; none where no layer can be narrower."""
        return {} if self.widths is None else self.widths.levels

    def links(self) -> dict[str, list[tuple[str, float, str, float]]]:
        """What every row of every layer, those of `rows` and then those of `narrowed`, needs of the channels beside it:
        (group of its inputs, level in percent, group of its outputs, level); "" and 100 where its width is fixed.

        A choice of rows is a network if all layers of a group need the same level of it.
        """
        widths = self.widths or Widths(Groups(()), {}, {})
        return {
            name: [widths.link(name, row.option) for row in (*layer.rows, *layer.narrowed)]
            for name, layer in self.layers.items()
        }

    def at(self, structure: Mapping[str, float]) -> Profile:
        """The profile of a network that is narrower: levels by group, in percent; groups that are not named are whole.

        Each layer has the rows of its two levels, and the file the norms and biases that stay. Plans of it are applied
        with either profile. There is no table of times of a narrower network. Raises MismatchError for a group or a
        level that is none, and where a layer has no row.
        """
        template, widths = self.template.narrowed(structure), self.widths
        assert widths is not None
        layers = {}
        for name, layer in self.layers.items():
            rows = [
                row
                for row in (*layer.rows, *layer.narrowed)
                if all(
                    not group or structure.get(group, WHOLE) == level
                    for group, level in _sides(widths.link(name, row.option))
                )
            ]
            if not rows:
                raise MismatchError(f"layer {name!r} has no option at these widths; profile it with family 'channels'")
            layers[name] = dataclasses.replace(layer, rows=tuple(rows), narrowed=())
        narrower = any(level != WHOLE for level in structure.values())
        latency = None if narrower else self.latency
        found = dataclasses.replace(self, template=template, layers=layers, latency=latency)
        found.__dict__["fingerprint"] = self.fingerprint
        return found

    def joint(self) -> Profile:
        """The profile with narrower layers among the rows of each, for a solve that makes layers agree on channels."""
        return self._with_rows(lambda x: ((*x.rows, *x.narrowed), ()))

    def whole(self) -> Profile:
        """The profile with the rows of whole layers only: of a joint one, what it was made from."""

        def rows(x: LayerProfile) -> tuple[tuple[Measured, ...], tuple[Measured, ...]]:
            own, narrower = (tuple(r for r in x.rows if (r.option.width is None) == whole) for whole in (True, False))
            return own, (*narrower, *x.narrowed)

        return self._with_rows(rows)

    def _with_rows(self, rows: Callable[[LayerProfile], tuple[tuple[Measured, ...], tuple[Measured, ...]]]) -> Profile:
        if self.widths is None:
            return self
        layers = {}
        for name, layer in self.layers.items():
            own, narrowed = rows(layer)
            layers[name] = dataclasses.replace(layer, rows=own, narrowed=narrowed)
        found = dataclasses.replace(self, layers=layers)
        found.__dict__["fingerprint"] = self.fingerprint
        return found

    def cut(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The columns and the rows of a layer's matrices (rows of all groups one after the other) that are left in all
        of its options: all of them, but for the profile `at` a narrower structure.
        """
        layer = self.layers[name].layer
        groups, rows, columns = layer.matrix_shape
        found = np.arange(columns), np.arange(groups * rows)
        at = {row.option.width for row in self.layers[name].rows}
        if self.widths is None or len(at) != 1 or (width := at.pop()) is None:
            return found
        inputs, outputs = self.widths.cuts(layer)
        return inputs.get(width[0], found[0]), outputs.get(width[1], found[1])

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a layer's weight, all rows in the first dimension, as this profile's options leave it (`cut`)."""
        columns, rows = self.cut(name)
        kernel = self.layers[name].layer.stored_shape[2:]
        return (len(rows), len(columns) // math.prod(kernel), *kernel)

    def kept(self, layers: Mapping[str, Option]) -> dict[str, tuple[int, ...]]:
        """The units that stay of each group that these options narrow. Raises MismatchError where layers disagree."""
        if self.widths is None:
            if narrower := [name for name, option in layers.items() if option.width is not None]:
                raise MismatchError(f"layer {narrower[0]!r} is planned narrower, and the profile has no such layers")
            return {}
        return self.widths.units(self.widths.structure_of(layers))

    def with_realised(self, plan: Plan) -> Profile:
        """The profile with what sequential mode made of a plan's layers as rows of theirs, under the plan's options."""
        layers = dict(self.layers)
        for name, made in ((n, made) for n, made in plan.realised.items() if n in layers):
            option = plan.layers[name]
            size, width, nonzero = (int(made[key]) for key in ("bytes", "width", "nonzero"))
            bits = int(made["row_bits"]) if "row_bits" in made else None
            changed = next((r.multiplied for r in layers[name].rows if r.option == option), None)
            row = Measured(option, made["error"], size, "", "", 0.0, width, nonzero, bits, changed)
            rows = (*(r for r in layers[name].rows if r.option != option), row)
            layers[name] = dataclasses.replace(layers[name], rows=rows)
        found = dataclasses.replace(self, layers=layers)
        found.__dict__["fingerprint"] = self.fingerprint
        return found

    @property
    def exact_limit(self) -> float:
        """Operations of a layer's exact trace above which one order is shared by its rows."""
        return float(self.fields["exact_limit"])

    def method(self, name: str) -> str:
        """exact: an order of its own for every row; shared: one for all, as the layer is too wide (`obs.wide`)."""
        if exact_operations(self.layers[name].layer.matrix_shape) <= self.exact_limit:
            return "exact"
        stats = self.statistics.layers.get(name)
        return "shared" if stats is None or stats.row_weights is None else "exact"  # a table is never too wide

    @property
    def table(self) -> pd.DataFrame:
        """One row per (layer, option): method (exact or shared order), error, relative error, bytes, bits per weight,
        MACs, BOPs, seconds; where the profile has a table of times, extra_ms.
        """
        methods = {name: self.method(name) for name in self.layers}
        records = [
            {
                "layer": name,
                "option": str(row.option),
                "method": methods[name],
                "error": row.error,
                "relative_error": row.error / layer.energy if layer.energy > 0 else 0.0,
                "bytes": row.bytes,
                "bits_per_weight": 8 * row.bytes / layer.layer.size,
                "macs": self.macs(name, row),
                "bops": self.bops(name, row),
                "seconds": row.seconds,
                **({} if self.latency is None else {"extra_ms": self.latency.extra_ms[name][row.option]}),
            }
            for name, layer in self.layers.items()
            for row in layer.rows
        ]
        return pd.DataFrame.from_records(records)

    def macs(self, name: str, row: Measured | None = None) -> int:
        """MACs of a layer for one sample, dense or with one of its options; 0 where calibration never reached it."""
        return costs.macs(self._multiplied(name, row), self.positions(name), self.statistics.samples)

    def positions(self, name: str) -> int:
        """How often calibration used each weight of a layer, over all of its samples."""
        stats = self.statistics.layers.get(name)
        return 0 if stats is None else stats.positions

    def _multiplied(self, name: str, row: Measured | None) -> int:
        """How many weights of a layer a position multiplies."""
        changed = None if row is None else row.multiplied
        return self.layers[name].layer.size if changed is None else changed

    def bops(self, name: str, row: Measured) -> int:
        """BOPs of a layer for one sample with one of its options."""
        return costs.bops(self.macs(name, row), 1, row.bits, self._multiplied(name, row))

    def check_model(self, model: nn.Module) -> None:
        """Raise MismatchError unless the model's weights are the ones that were profiled."""
        if model_digest(model) != self.fields["model"]:
            raise MismatchError(
                "field 'model': the profile was made from other weights; profile this model, "
                "or give the one it was made from"
            )

    def problem(self, name: str, weight: Any) -> LayerProblem:
        """The layer as compressors take it, with its trace; `weight` is the model's own."""
        found = self.layers[name]
        stats = self.statistics.layers.get(name)
        order, losses = found.trace()
        return LayerProblem(
            name,
            found.layer.stored_shape,
            found.layer.matrix(weight),
            None if stats is None else stats.hessian,
            order,
            losses,
            None if stats is None else stats.row_weights,
            self.exact_limit,
            found.layer.factorable,
            *_cuts(self.widths, found.layer),
        )


def _sides(link: tuple[str, float, str, float]) -> tuple[tuple[str, float], tuple[str, float]]:
    return link[:2], link[2:]


def _cuts(widths: Widths | None, layer: Layer) -> tuple[Mapping[float, np.ndarray], Mapping[float, np.ndarray], bool]:
    """What a layer's problem has to know of its narrower forms: columns, rows, whether they go together."""
    return ({}, {}, False) if widths is None else (*widths.cuts(layer), widths.coupled(layer.name))


class Store:
    """A folder with one writer. Raises StoreError where it cannot be made, read or locked."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            (self.path / "layers").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"cannot make the profile store {self.path}: {error.strerror or error}") from error

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the store's lock; the kernel drops it when this process ends, however it ends."""
        import fcntl

        try:
            handle = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise StoreError(f"cannot write in the profile store {self.path}: {error.strerror or error}") from error
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise StoreError(
                    f"the profile store {self.path} is being written by another process; wait for it, or name another"
                ) from None
            yield
        finally:
            os.close(handle)

    def read_json(self, name: str) -> Any | None:
        path = self.path / name
        try:
            return json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise StoreError(f"{path} cannot be read: {error}; remove it to make it again") from error

    def write_json(self, name: str, value: Any) -> None:
        with atomic_path(self.path / name) as scratch:
            scratch.write_text(json.dumps(value, indent=1) + "\n")

    def write_head(self, head: dict[str, Any]) -> dict[str, Any]:
        """Make profile.json, unless one is there: of several writers the first. Returns what is there then."""
        if write_once(self.path / "profile.json", json.dumps(head, indent=1) + "\n"):
            return head
        found: Any = _read_head(self)
        return found

    def layer_path(self, key: str) -> Path:
        return self.path / "layers" / f"{key}.npz"

    def write_seconds(self, key: str, rows: Sequence[Measured]) -> None:
        self.write_json(f"seconds/{key}.json", [round(row.seconds, 6) for row in rows])

    def read_seconds(self, key: str, count: int) -> list[float]:
        """Seconds of that many rows; zeros where they were not kept: nothing depends on them."""
        with contextlib.suppress(StoreError, TypeError, ValueError):
            found = [float(seconds) for seconds in self.read_json(f"seconds/{key}.json") or ()]
            if len(found) == count:
                return found
        return [0.0] * count


def _layer_key(problem: LayerProblem, options: Sequence[Option], versions: str) -> str:
    """Digest of all that a layer's profile depends on."""
    digest = hashlib.sha256(f"{versions}|{problem.exact}|{problem.shape}|{'|'.join(map(str, options))}".encode())
    digest.update(b"factorable" if problem.factorable else b"")
    for side in (problem.inputs, problem.outputs):
        for level, kept in sorted(side.items()):
            digest.update(f"{level}:{kept.tolist()}".encode())
    for array in (problem.weight, problem.hessian, *([] if problem.row_weights is None else [problem.row_weights])):
        digest.update(b"none" if array is None else np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _save_layer(
    path: Path, rows: Sequence[Measured], order: np.ndarray | None, losses: np.ndarray | None, energy: float
) -> None:
    arrays: dict[str, Any] = {
        "options": np.frombuffer("\n".join(f"{r.option} {r.codec} {r.step}" for r in rows).encode(), np.uint8),
        "errors": np.array([r.error for r in rows]),
        "bytes": np.array([r.bytes for r in rows], np.int64),
        "widths": np.array([r.width for r in rows], np.int64),
        "nonzero": np.array([r.nonzero for r in rows], np.int64),
        "row_bits": np.array([-1 if r.row_bits is None else r.row_bits for r in rows], np.int64),
        "multiplied": np.array([r.multiplied or 0 for r in rows], np.int64),
        "part_bytes": np.array([n for r in rows for n in r.part_bytes], np.int64),
        "energy": np.array(energy),
    }
    if order is not None and losses is not None:
        arrays |= {"order": order, "losses": losses}
    with atomic_path(path) as scratch, scratch.open("wb") as file:
        np.savez(file, **arrays)


def _load_layer(store: Store, key: str, held: bool = True) -> tuple[Any, ...] | None:
    """(rows, trace, energy) that `_save_layer` wrote, the trace as its path unless it is to be held; None where the
    file is not there. Raises StoreError where it is damaged.
    """
    path = store.layer_path(key)

    def own(bits: int) -> int | None:
        return bits if bits >= 0 else None

    try:
        with np.load(path, allow_pickle=False) as data:
            names = [line.split(" ") for line in bytes(data["options"]).decode().split("\n")]
            numbers = ("errors", "bytes", "widths", "nonzero", "row_bits", "multiplied")
            columns = zip(*(data[field].tolist() for field in numbers), strict=True)
            parts = iter(data["part_bytes"].tolist())
            rows = [
                Measured(
                    *(Option.parse(option), error, size, codec, step, seconds, width, nonzero, own(b), m or None),
                    tuple(itertools.islice(parts, len(step.split(",")) if "," in step else 0)),
                )
                for (option, codec, step), seconds, (error, size, width, nonzero, b, m) in zip(
                    names, store.read_seconds(key, len(names)), columns, strict=True
                )
            ]
            if list(parts):
                raise ValueError("lengths of parts that belong to no option")
            trace: Any = None
            if "order" in data.files:
                trace = (data["order"], data["losses"]) if held else path
            return rows, trace, float(data["energy"])
    except FileNotFoundError:
        return None
    except DAMAGE as error:
        raise StoreError(f"{path} is damaged ({error}); remove it and run again") from error


def _load_trace(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as data:
            return data["order"], data["losses"]
    except DAMAGE as error:
        raise StoreError(f"{path} is damaged ({error}); remove it and run again") from error


def profile(
    model: nn.Module,
    stats: Statistics,
    store: str | Path | None = None,
    options: Sequence[Option | str] | None = None,
    workers: int | None = None,
    progress: Any = None,
    exact_limit: float = EXACT_LIMIT,
    channels: Widths | None = None,
    engine: str | None = None,
) -> Profile:
    """Measure every option of every layer, and keep each finished layer in the store at once.

    options: what every layer may become, by name or by the name of a family (`compressors.FAMILIES`; by default,
    "default"); `dense` is always among them. A layer that calibration never reached has those that need no data
    (`dense`, `fp16`, `w8`), with errors of 0. store: a folder that is resumed if it was made for the same model, data,
    options and code versions; None keeps everything in memory.
    engine: where layers are computed, one of `engines.ENGINES`; workers: how many at a time (default: one per core). By
    default processes are started if several are wanted, or if nobody says how many and the work pays for their start.
    Neither changes the result, or a byte of the store but its clock times. progress: called with (layers done, layers
    in all, layer name). exact_limit: a layer whose exact trace costs more operations than that, d³/3 per row, shares
    one order between its rows instead. channels: which channels a narrower network keeps (`salience.widths`), which
    options with a width (family "channels") need. Raises MismatchError, naming the field, for a store or statistics of
    something else; OptionError for an unknown option; EngineError and WorkerError as `run_tasks`.
    """
    check_engine(engine)
    layers = find_layers(model)
    if stats.fields["model"] != model_digest(model):
        raise MismatchError("field 'model': the statistics were made from other weights; calibrate this model")
    wanted = _options(options)
    if channels is None and (narrower := [option for option in wanted if option.width is not None]):
        raise OptionError(f"option {str(narrower[0])!r} needs channels=: which ones a narrower network keeps")
    versions = code_versions()
    fields = {
        **stats.fields,
        "options": hashlib.sha256("|".join(map(str, wanted)).encode()).hexdigest(),
        "exact_limit": repr(float(exact_limit)),
        **versions,
    }
    if channels is not None:
        fields["channels"] = hashlib.sha256(json.dumps(channels.to_json()).encode()).hexdigest()
    template = dataclasses.replace(make_template(model, layers), widths=channels)

    # Where weights are not held, nor are Hessians and traces: each layer's are read when its turn comes.
    held = not any(model.get_parameter(layer.key).is_meta for layer in layers)
    if not held and store is None:
        raise StoreError("the profile of a streamed model needs a store, as it is more than memory may hold; name one")

    def work_on(stats: Statistics) -> _Work:
        problems = _Problems(model, layers, stats, exact_limit, channels)
        keys = {name: _layer_key(problems[name], wanted, json.dumps(versions)) for name in problems}
        return _Work(layers, problems, wanted, keys, workers, engine, progress, held)

    work = work_on(stats)
    if store is None:
        return Profile(work.run(None), layers.skipped, stats, fields, template, widths=channels)
    place = Store(store)
    with place.writing():
        known = _read_head(place)
        if known is None:
            stats.save(place.path / "statistics.npz")
            head = {
                "fields": fields,
                "skipped": layers.skipped,
                "layers": [
                    [x.name, x.owners, x.shape, x.groups, x.parameter, x.swapped, x.factorable, work.keys[x.name]]
                    for x in layers
                ],
                "template": template.to_json(),
                **({} if channels is None else {"channels": channels.to_json()}),
            }
            known = place.write_head(head)
        _check_fields(known["fields"], fields, place.path)
        if (keys := {entry[0]: entry[-1] for entry in known["layers"]}) != work.keys:
            # The same sums from another processor or BLAS differ in their last bits; the store goes on with its own.
            stats = Statistics.load(place.path / "statistics.npz", held)
            work = work_on(stats)
            if work.keys != keys:
                raise _damaged_head(place)
        elif not held:
            stats = Statistics.load(place.path / "statistics.npz", held)  # those that were given may go away
        return Profile(work.run(place), layers.skipped, stats, fields, template, place, widths=channels)


@dataclass(frozen=True)
class _Problems(Mapping[str, LayerProblem]):
    """Every layer's problem by name, made when it is asked for: a float64 copy of all weights is never in memory."""

    model: nn.Module
    layers: Layers
    stats: Statistics
    exact_limit: float
    channels: Widths | None

    def __getitem__(self, name: str) -> LayerProblem:
        layer, found = self.layers[name], self.stats.layers.get(name)
        return LayerProblem(
            layer.name,
            layer.stored_shape,
            layer.matrix(weight_of(self.model, layer.key)),
            None if found is None else found.hessian,
            None,
            None,
            None if found is None else found.row_weights,
            self.exact_limit,
            layer.factorable,
            *_cuts(self.channels, layer),
        )

    def __iter__(self) -> Iterator[str]:
        return (layer.name for layer in self.layers)

    def __len__(self) -> int:
        return len(self.layers)


@dataclass(frozen=True)
class _Tasks(Sequence[tuple[LayerProblem, list[Option]]]):
    """Arguments of `profile_layer` for these layers, made when they are asked for."""

    problems: Mapping[str, LayerProblem]
    names: Sequence[str]
    options: list[Option]

    def __getitem__(self, index: Any) -> Any:
        return self.problems[self.names[index]], self.options

    def __len__(self) -> int:
        return len(self.names)


def code_versions() -> dict[str, str]:
    """The versions of all code that a profile's rows depend on: their errors, their bytes, and what is in the store."""
    return {
        "compressors": json.dumps({name: c.version for name, c in sorted(COMPRESSORS.items())}),
        "format_version": str(FORMAT_VERSION),
        "profile_version": str(PROFILE_VERSION),
    }


def _options(options: Sequence[Option | str] | None) -> list[Option]:
    return list(dict.fromkeys([DENSE, *named_options(["default"] if options is None else options)]))


def _check_fields(known: Mapping[str, str], wanted: Mapping[str, str], path: Path) -> None:
    meaning = {
        "model": "other weights",
        "data": "other calibration data",
        "damping": "another damping",
        "options": "other options",
        "exact_limit": "another limit of exact work on a layer",
        "channels": "other channels kept",
        "compressors": "other versions of the compressors",
        "calibration_version": "another version of the calibration",
        "format_version": "another version of the file format",
        "profile_version": "another version of the profile",
    }
    for name in sorted(set(known) | set(wanted)):
        if known.get(name) != wanted.get(name):
            raise MismatchError(
                f"field {name!r}: the profile in {path} was made with {meaning.get(name, 'another value')}; "
                "name another store"
            )


@dataclass(frozen=True)
class _Work:
    """The layers to profile, and how."""

    layers: Layers
    problems: Mapping[str, LayerProblem]
    options: list[Option]
    keys: Mapping[str, str]
    workers: int | None
    engine: str | None
    progress: Any
    held: bool

    def run(self, store: Store | None) -> dict[str, LayerProfile]:
        """Compute what the store lacks, each finished layer kept at once."""
        done: dict[str, tuple[Any, ...]] = {}
        if store is not None:
            kept = {name: _load_layer(store, key, self.held) for name, key in self.keys.items()}
            done = {name: found for name, found in kept.items() if found is not None}
            log.info("%d of %d layers are in the store already", len(done), len(self.keys))
        todo = [layer for layer in self.layers if layer.name not in done]
        # Large layers first: the last task to finish should be a small one.
        todo.sort(key=lambda x: (-x.size * x.matrix_shape[-1] ** 2, x.name))
        tasks = _Tasks(self.problems, [layer.name for layer in todo], self.options)
        started = time.perf_counter()
        workers = default_workers() if self.workers is None else self.workers
        engine = self.engine
        if engine is None and self.workers is None and not pays([x.matrix_shape for x in todo], self.options, workers):
            engine = "inline"
        for index, result in run_tasks(profile_layer, tasks, workers, engine):
            name = todo[index].name
            rows, order, losses, energy = result
            trace: Any = None if order is None else (order, losses)
            if store is not None:
                store.write_seconds(self.keys[name], rows)
                _save_layer(path := store.layer_path(self.keys[name]), *result)
                if trace is not None and not self.held:
                    trace = path
            done[name] = rows, trace, energy
            del result, order, losses, trace  # before the next task is made
            if self.progress is not None:
                self.progress(len(done), len(self.problems), name)
        log.info("profiled %d layers in %.1f s", len(todo), time.perf_counter() - started)
        return {layer.name: _layer_profile(layer, done[layer.name]) for layer in self.layers}


def _layer_profile(layer: Layer, found: tuple[Any, ...]) -> LayerProfile:
    rows, trace, energy = found
    own, narrowed = (tuple(r for r in rows if (r.option.width is None) == whole) for whole in (True, False))
    return LayerProfile(layer, own, energy, trace, narrowed)


def _read_head(store: Store) -> dict[str, Any] | None:
    """profile.json; None where there is none. Raises StoreError where it lacks something."""
    head = store.read_json("profile.json")
    if head is not None and not (isinstance(head, dict) and {"fields", "skipped", "layers", "template"} <= set(head)):
        raise _damaged_head(store)
    return head


def _damaged_head(store: Store) -> StoreError:
    return StoreError(f"{store.path / 'profile.json'} is damaged; remove it and run again")


def load_profile(store: str | Path, held: bool = True) -> Profile:
    """The finished profile of a store; held: whether Hessians and traces are read now, or each when it is asked for.

    Raises StoreError where there is none or layers are missing, MismatchError, naming the field, where other versions
    of the code made it.
    """
    path = Path(store)
    if not (path / "profile.json").is_file():
        raise StoreError(f"there is no profile in {path}; run `autocompress profile TASK --store {path}` first")
    place = Store(path)
    known: Any = _read_head(place)
    _check_fields(known["fields"], {**known["fields"], **code_versions()}, path)
    try:
        widths = Widths.from_json(known["channels"]) if "channels" in known else None
        template = dataclasses.replace(Template.from_json(known["template"]), widths=widths)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged_head(place) from error
    profiles = {}
    for name, owners, shape, groups, parameter, swapped, factorable, key in known["layers"]:
        kept = _load_layer(place, key, held)
        if kept is None:
            raise StoreError(
                f"the profile in {path} is not finished (layer {name!r} is missing); run the command that made it again"
            )
        layer = Layer(name, tuple(owners), tuple(shape), groups, parameter, swapped, factorable)
        profiles[name] = _layer_profile(layer, kept)
    stats = Statistics.load(path / "statistics.npz", held)
    return Profile(profiles, known["skipped"], stats, known["fields"], template, place, widths=widths)
